// Numbers and vectors of them: what the C++ kernels share. cpp.py puts this in the place of its include.

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t LANES = 16;  // of a vector; where registers are narrower the compiler makes several of one

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

template <typename T>
inline void read(const T* from, float* to, int64_t n, int64_t padded) {
  for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
  for (int64_t i = n; i < padded; i++) to[i] = 0.0f;
}

template <typename T>
inline void write(const float* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) set(to[i], from[i]);
}

}  // namespace
