"""The router on a tile that already sits in registers: from logits to gates and sums, and back.

Shape letters: ROWS (token, router) pairs of the tile, E experts, E_PAD experts padded to a power of two. All values
are fp32 tiles (ROWS, E_PAD) or vectors (ROWS,). What padding columns hold is stated per function; a kernel
with several routers that read one input keeps them as rows: ``tl.reshape(acc, (BLOCK_T * HEADS, E_PAD))``.
Formulas and their derivation: ``molora_kernels/router/README.md``.
"""

# Kernels are Python in spelling only, so these do not apply to them.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def softmax(b_logits, E: tl.constexpr, E_PAD: tl.constexpr):
    """(probabilities, logsumexp (ROWS,)); padding columns may hold anything and get probability 0."""
    m_e = (tl.arange(0, E_PAD) < E)[None, :]
    b_logits = tl.where(m_e, b_logits, float("-inf"))
    b_max = tl.max(b_logits, axis=1)
    b_exp = tl.exp(b_logits - b_max[:, None])
    b_sum = tl.sum(b_exp, axis=1)
    return tl.div_rn(b_exp, tl.broadcast_to(b_sum[:, None], b_exp.shape)), b_max + tl.log(b_sum)


@triton.jit
def choose(b_scores, TOP_K: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr):
    """1.0 where an expert is among the TOP_K best scores, else 0.0; ties go to the lower index, padding never wins.

    NaN wins, as in ``torch.topk``: compiled, ``argmax`` would pass over it, to padding in the end.
    """
    o_e = tl.arange(0, E_PAD)[None, :]
    b_left = tl.where(b_scores == b_scores, b_scores, float("inf"))
    b_left = tl.where(o_e < E, b_left, float("-inf"))
    b_chosen = tl.zeros_like(b_scores)
    for _ in tl.static_range(TOP_K):
        b_best = tl.argmax(b_left, axis=1, tie_break_left=True)
        m_best = o_e == b_best[:, None]
        b_chosen = tl.where(m_best, 1.0, b_chosen)
        b_left = tl.where(m_best, float("-inf"), b_left)
    return b_chosen


@triton.jit
def gates_of(b_logits, b_probs, b_chosen, TOP_K: tl.constexpr):
    """The chosen probabilities renormalised to sum 1; for TOP_K = 1 the probability itself. Padding columns: 0.

    Renormalised, they are the softmax over the chosen logits: a selection bias may choose experts whose probabilities
    are all 0 in fp32, and 0 / 0 is NaN.
    """
    if TOP_K == 1:
        return b_probs * b_chosen
    b_left = tl.where(b_chosen > 0.0, b_logits, float("-inf"))
    b_exp = tl.exp(b_left - tl.max(b_left, axis=1)[:, None])
    return tl.div_rn(b_exp, tl.broadcast_to(tl.sum(b_exp, axis=1)[:, None], b_exp.shape))


@triton.jit
def sums_of(b_probs, b_lse, b_chosen, m_valid, HEADS: tl.constexpr, E_PAD: tl.constexpr):
    """Over the tile's valid rows, per router: squared logsumexp (HEADS,), probabilities and choices (HEADS, E_PAD).

    Rows are selected, not multiplied: a padding token may hold anything, and NaN * 0 is NaN.
    """
    BLOCK_T: tl.constexpr = b_lse.shape[0] // HEADS
    b_z = tl.where(m_valid, b_lse * b_lse, 0.0)
    b_probs = tl.where(m_valid[:, None], b_probs, 0.0)
    b_chosen = tl.where(m_valid[:, None], b_chosen, 0.0)
    return (
        tl.sum(tl.reshape(b_z, (BLOCK_T, HEADS)), axis=0),
        tl.sum(tl.reshape(b_probs, (BLOCK_T, HEADS, E_PAD)), axis=0),
        tl.sum(tl.reshape(b_chosen, (BLOCK_T, HEADS, E_PAD)), axis=0),
    )


@triton.jit
def dlogits_of_gates(b_gates, b_dgates, b_probs, TOP_K: tl.constexpr):
    """Gradient of the logits from the gates' own: ``h - g sum(h)`` with ``h = g dg`` (for TOP_K = 1, p in g's place).

    Padding columns of b_dgates hold 0.
    """
    b_weighted = b_gates * b_dgates
    b_total = tl.sum(b_weighted, axis=1)[:, None]
    if TOP_K == 1:
        return b_weighted - b_probs * b_total
    return b_weighted - b_gates * b_total


@triton.jit
def dlogits_of_sums(b_probs, b_lse, b_dz, b_dprobs, m_valid):
    """Gradient of the logits from the sums' own, b_dz (ROWS,) and b_dprobs (ROWS, E_PAD; padding columns 0):
    ``p (w - sum(w p) + 2 lse dz)`` on valid rows, else 0."""
    b_mean = tl.sum(b_probs * b_dprobs, axis=1)
    b_dlogits = b_probs * (b_dprobs + (2.0 * b_dz * b_lse - b_mean)[:, None])
    return tl.where(m_valid[:, None], b_dlogits, 0.0)
