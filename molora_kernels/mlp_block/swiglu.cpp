// SwiGLU and its backward on a CPU: what cpp.py compiles and calls. Computed in fp32 and rounded once.

#include <initializer_list>

#include "../numbers.h"

namespace {

// e^x, to two roundings: 2^n e^y with n an integer and |y| <= ln 2 / 2, e^y as its series. Infinity from 88.4 on; for 1
// + e^x, the smallest normal number is small enough.
inline vec exp(vec x) {
  typedef int32_t integers __attribute__((vector_size(4 * LANES)));
  constexpr float LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  x = x > 89.0f ? vec{} + 89.0f : x;
  x = x < -87.0f ? vec{} - 87.0f : x;  // NaN passes both
  const vec scaled = x * LOG2_E, half = scaled < 0.0f ? vec{} - 0.5f : vec{} + 0.5f;
  const integers n = __builtin_convertvector(scaled + half, integers);
  const vec whole = __builtin_convertvector(n, vec), y = (x - whole * LN2_HIGH) - whole * LN2_LOW;
  vec series = vec{} + 1.0f / 5040.0f;
  UNROLLED
  for (float term : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f})
    series = series * y + term;
  return series * vec((n + 127) << 23);
}

inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

template <typename Number>
struct Forward {
  const Number *gate, *up;
  Number* h;

  void operator()(int64_t i, int64_t n) const {
    const vec g = load(gate + i, n);
    store(h + i, g * sigmoid(g) * load(up + i, n), n);
  }
};

// dgate takes the place of dh.
template <typename Number>
struct Backward {
  Number* dh;
  const Number *gate, *up;
  Number *h, *dup;

  void operator()(int64_t i, int64_t n) const {
    const vec g = load(gate + i, n), u = load(up + i, n), d = load(dh + i, n), s = sigmoid(g), silu = g * s;
    store(h + i, silu * u, n);
    store(dup + i, silu * d, n);
    store(dh + i, d * u * s * (1.0f + g * (1.0f - s)), n);
  }
};

// Over n numbers of each tensor.
template <typename Pass>
void over(const Pass& pass, int64_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n / LANES; i++) pass(i * LANES, LANES);
  if (n % LANES) pass(n / LANES * LANES, n % LANES);
}

}  // namespace

extern "C" {

#define OF_DTYPE(Number, name)                                                                                     \
  void swiglu_##name(const Number* gate, const Number* up, Number* h, int64_t n, int threads) {                    \
    over(Forward<Number>{gate, up, h}, n, threads);                                                                \
  }                                                                                                                \
  void swiglu_backward_##name(Number* dh, const Number* gate, const Number* up, Number* h, Number* dup, int64_t n, \
                              int threads) {                                                                       \
    over(Backward<Number>{dh, gate, up, h, dup}, n, threads);                                                      \
  }

OF_DTYPE(float, float32)
OF_DTYPE(bfloat16, bfloat16)
}
