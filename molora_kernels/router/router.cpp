// Routers on a CPU: what cpp.py compiles and calls. The formulas are those of portable.py.
//
// Shape letters: T tokens, K features, H routers that read the same input, E experts.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../numbers.h"
#include "../routing.h"

namespace {

constexpr int64_t BLOCK = 128;  // tokens whose sums are added up by one thread, and then block by block

// Of x (T, K) and of each head weights (E, K), biases (E,) and selection_biases (E,), of which the last two may be
// null: logits and gates (T, H, E), sums (H, 1 + E) and counts (H, E).
template <typename Number>
void route(const Number* x, int64_t ldx, int64_t K, const float* const* weights, const float* const* biases,
           const float* const* selection_biases, const bool* mask, int64_t T, int64_t H, int64_t E, int64_t k,
           float* logits, float* gates, float* sums, float* counts, int threads) {
  const int64_t blocks = (T + BLOCK - 1) / BLOCK, width = 1 + 2 * E;
  std::vector<float> partials(blocks * H * width, 0.0f);
  std::vector<const float*> of_logits;
  for (int64_t h = 0; h < H; h++)
    for (int64_t e = 0; e < E; e++) of_logits.push_back(weights[h] + e * K);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> probs(E), scores(E), chosen(E);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = block * BLOCK, last = std::min(T, first + BLOCK);
      const Number* rows[BLOCK];
      for (int64_t t = first; t < last; t++) rows[t - first] = x + t * ldx;
      multiply(rows, last - first, of_logits.data(), H * E, K, logits + first * H * E, H * E);
      for (int64_t t = first; t < last; t++) {
        for (int64_t h = 0; h < H; h++) {
          float *own = logits + (t * H + h) * E, *gate = gates + (t * H + h) * E;
          if (biases)
            for (int64_t e = 0; e < E; e++) own[e] += biases[h][e];
          const float lse = softmax(own, E, probs.data());
          const float* from = own;
          if (selection_biases) {
            for (int64_t e = 0; e < E; e++) scores[e] = probs[e] + selection_biases[h][e];
            from = scores.data();
          }
          choose(from, E, k, chosen.data());
          gates_of(own, probs.data(), chosen.data(), E, k, gate);
          if (mask && !mask[t]) continue;
          float* partial = partials.data() + (block * H + h) * width;
          partial[0] += lse * lse;
          for (int64_t e = 0; e < E; e++) partial[1 + e] += probs[e], partial[1 + E + e] += chosen[e];
        }
      }
    }
  }
  for (int64_t h = 0; h < H; h++) {
    for (int64_t i = 0; i < width; i++) {
      float sum = 0.0f;
      for (int64_t block = 0; block < blocks; block++) sum += partials[(block * H + h) * width + i];
      (i <= E ? sums[h * (1 + E) + i] : counts[h * E + i - 1 - E]) = sum;
    }
  }
}

}  // namespace

extern "C" {

#define ROUTE(Number, name)                                                                                           \
  void route_##name(const Number* x, int64_t ldx, int64_t K, const float* const* weights, const float* const* biases, \
                    const float* const* selection_biases, const bool* mask, int64_t T, int64_t H, int64_t E,          \
                    int64_t k, float* logits, float* gates, float* sums, float* counts, int threads) {                \
    route(x, ldx, K, weights, biases, selection_biases, mask, T, H, E, k, logits, gates, sums, counts, threads);      \
  }

ROUTE(float, float32)
ROUTE(bfloat16, bfloat16)

// The gradient of the logits (T, H, E), from that of the gates (or none) and that of the sums (or none); and what it
// adds up to over tokens, of each head (E,), if asked for.
void route_backward(const float* dgates, const float* dsums, const float* logits, const float* gates, const bool* mask,
                    int64_t T, int64_t H, int64_t E, int64_t k, float* dlogits, float* const* dbiases, int threads) {
  const int64_t blocks = (T + BLOCK - 1) / BLOCK;
  std::vector<float> partials(blocks * H * E, 0.0f);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> probs(E);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      for (int64_t t = block * BLOCK; t < std::min(T, (block + 1) * BLOCK); t++) {
        for (int64_t h = 0; h < H; h++) {
          const int64_t at = (t * H + h) * E;
          const float lse = softmax(logits + at, E, probs.data());
          float* own = dlogits + at;
          std::fill_n(own, E, 0.0f);
          if (dgates) {
            const float* share = k > 1 ? gates + at : probs.data();
            float sum = 0.0f;
            for (int64_t e = 0; e < E; e++) sum += own[e] = gates[at + e] * dgates[at + e];
            for (int64_t e = 0; e < E; e++) own[e] -= share[e] * sum;
          }
          if (dsums && (!mask || mask[t])) {
            const float *dz = dsums + h * (1 + E), *dprob = dz + 1;
            float sum = 0.0f;
            for (int64_t e = 0; e < E; e++) sum += probs[e] * dprob[e];
            for (int64_t e = 0; e < E; e++) own[e] += probs[e] * (dprob[e] - sum + 2.0f * *dz * lse);
          }
          for (int64_t e = 0; e < E; e++) partials[(block * H + h) * E + e] += own[e];
        }
      }
    }
  }
  for (int64_t h = 0; dbiases && h < H; h++) {
    for (int64_t e = 0; e < E; e++) {
      float sum = 0.0f;
      for (int64_t block = 0; block < blocks; block++) sum += partials[(block * H + h) * E + e];
      dbiases[h][e] = sum;
    }
  }
}
}
