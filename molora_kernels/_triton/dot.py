"""Matrix products whose precision is stated, on every GPU and in Triton's interpreter.

The interpreter multiplies the bits of bf16 operands as integers (silently), so there they are widened first; a product
of two bf16 numbers is exact in fp32, so the result is what a tensor core gives up to the order of the sum.
"""

# Kernels are Python in spelling only, so these do not apply to them.
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl
from triton import knobs

from molora_kernels._triton import tiles

INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether ``TRITON_INTERPRET`` was set when triton was first imported."""
PLANES: tl.constexpr = tl.constexpr(tiles.PLANES)


@triton.jit
def dot(b_a, b_b, b_acc):
    """``acc + a @ b``, operands of one dtype, fp32 sums; fp32 operands are not rounded to tf32."""
    if INTERPRETED:
        return b_acc + tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), input_precision="ieee")
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee")


@triton.jit
def dot_of_many(b_a, b_b, b_acc):
    """``dot`` as a step of a sum of thousands of products: in fp32, whose errors show, in steps."""
    if b_a.dtype == tl.float32:
        return dot_in_steps(b_a, b_b, b_acc)
    return dot(b_a, b_b, b_acc)


@triton.jit
def dot_in_steps(b_a, b_b, b_acc):
    """``acc + a @ b`` as ``dot``, but each step of a long sum is added up first, then added to what there is: by the
    fp32 units, which round to nearest (tensor cores truncate), and in fp32 with errors that grow with the number of
    steps and not of products (the summation in blocks of Higham, Accuracy and Stability of Numerical Algorithms, 4.2).
    Spelled as ``acc + step``, Triton would make the product begin from ``acc``."""
    if INTERPRETED:
        return dot(b_a, b_b, b_acc)
    return tl.fma(tl.dot(b_a, b_b, input_precision="ieee"), 1.0, b_acc)


@triton.jit
def dot_fp32_by_fp32(b_a, b_b, b_acc, OUT: tl.constexpr):
    """``acc + a @ b`` of fp32 operands, as accurate as a result that is rounded to ``OUT`` can show: full fp32 for
    fp32; for 16-bit results 16 bits of each operand, as two bf16 terms and three tensor-core products."""
    if INTERPRETED or OUT.primitive_bitwidth == 32:
        return tl.dot(b_a, b_b, b_acc, input_precision="ieee")
    b_a_high, b_b_high = b_a.to(tl.bfloat16), b_b.to(tl.bfloat16)
    b_a_low, b_b_low = (b_a - b_a_high.to(tl.float32)).to(tl.bfloat16), (b_b - b_b_high.to(tl.float32)).to(tl.bfloat16)
    b_acc = tl.dot(b_a_low, b_b_high, b_acc)
    b_acc = tl.dot(b_a_high, b_b_low, b_acc)
    return tl.dot(b_a_high, b_b_high, b_acc)


@triton.jit
def dot_by_fp32(b_a, b_b, b_acc):
    """``acc + a @ b`` for 16-bit or fp32 a and fp32 b, with every bit of b: fp32-true results from tensor cores.

    A bf16 number times a bf16 number is exact in fp32, and fp32's 24 bits are three times bf16's 8: b is split into
    three bf16 terms, without remainder. For fp16 a the terms of b are tf32 (11 + 11 + 2 bits), because fp16 terms
    would fall below fp16's range. For fp32 a the product runs on the fp32 units.

    Tensor cores truncate whatever they add to an accumulator. Over a long sum those errors have one sign and grow with
    its length, so each step has a fresh accumulator, smallest terms first, and is added to ``acc`` by the fp32 units,
    which round to nearest.
    """
    if INTERPRETED or b_a.dtype == tl.float32:
        return dot_in_steps(b_a.to(tl.float32), b_b, b_acc)
    if b_a.dtype == tl.bfloat16:
        b_high, b_middle, b_low = bf16_terms(b_b)
        b_step = tl.dot(b_a, b_middle, tl.dot(b_a, b_low))
        return b_acc + tl.dot(b_a, b_high, b_step)
    b_wide = b_a.to(tl.float32)
    b_high, b_middle, b_low = tf32_terms(b_b)
    b_step = tl.dot(b_wide, b_low, input_precision="tf32")
    b_step = tl.dot(b_wide, b_middle, b_step, input_precision="tf32")
    return b_acc + tl.dot(b_wide, b_high, b_step, input_precision="tf32")


@triton.jit
def bf16_terms(b_x):
    """fp32 as the exact sum of three bf16 numbers, largest first."""
    b_high = b_x.to(tl.bfloat16)
    b_rest = b_x - b_high.to(tl.float32)
    b_middle = b_rest.to(tl.bfloat16)
    return b_high, b_middle, (b_rest - b_middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def tf32_terms(b_x):
    """fp32 as the exact sum of three fp32 numbers with tf32's 11 bits at most, largest first."""
    b_high = _upper_11_bits(b_x)
    b_rest = b_x - b_high
    b_middle = _upper_11_bits(b_rest)
    return b_high, b_middle, b_rest - b_middle


@triton.jit
def _upper_11_bits(b_x):
    """fp32 truncated to tf32's mantissa: what is left over is exact."""
    return (b_x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
