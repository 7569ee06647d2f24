// Numbers and vectors of them: what the C++ kernels share. cpp.py puts this in the place of its include.

#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// Before a loop whose sums are to stay in registers: left to itself, clang keeps them in memory.
#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

namespace {

// Numbers of a vector register, and how many of them the processor has.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int64_t LANES = 4, REGISTERS = 32;
#else
constexpr int64_t LANES = 4, REGISTERS = 16;
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void add(float* p, vec v) { *reinterpret_cast<vec*>(p) += v; }

struct bfloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline void set(float& to, float x) { to = x; }
inline void set(bfloat16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

// The same of a whole vector.
typedef uint32_t bits32 __attribute__((vector_size(4 * LANES), aligned(2)));
typedef uint16_t bits16 __attribute__((vector_size(2 * LANES), aligned(2)));

inline vec load(const bfloat16* p) {
  return vec(__builtin_convertvector(*reinterpret_cast<const bits16*>(p), bits32) << 16);
}
inline void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
inline void store(bfloat16* p, vec x) {
#ifdef __AVX512BF16__
  const __m256bh rounded = _mm512_cvtneps_pbh(__m512(x));
  std::memcpy(p, &rounded, sizeof rounded);
#else
  const bits32 bits = bits32(x), nan = bits32(x != x);
  const bits32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  *reinterpret_cast<bits16*>(p) = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), bits16);
#endif
}

// Of the first n of a vector; the others are zero.
template <typename T>
inline vec load(const T* p, int64_t n) {
  if (n == LANES) return load(p);
  T some[LANES] = {};
  std::memcpy(some, p, n * sizeof(T));
  return load(some);
}
template <typename T>
inline void store(T* p, vec x, int64_t n) {
  if (n == LANES) return store(p, x);
  T some[LANES];
  store(some, x);
  std::memcpy(p, some, n * sizeof(T));
}

// n numbers, and zeros after them.
template <typename T>
inline void read(const T* from, float* to, int64_t n, int64_t padded) {
  for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
  for (int64_t i = n; i < padded; i++) to[i] = 0.0f;
}

template <typename T>
inline void write(const float* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t some = n - i < LANES ? n - i : LANES;
    store(to + i, load(from + i, some), some);
  }
}

}  // namespace
