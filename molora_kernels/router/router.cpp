// Routers on a CPU: what cpp.py compiles and calls. The formulas are those of portable.py.
//
// Shape letters: T tokens, K features, H routers that read the same input, E experts.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../numbers.h"

namespace {

constexpr int64_t BLOCK = 128;  // tokens whose sums are added up by one thread, and then block by block
constexpr int64_t ROWS = 4, LOGITS = REGISTERS > 16 ? 4 : 2;  // of a tile, whose sums stay in vector registers
constexpr int64_t PART = 512;  // features whose products are added up at a time: sums of sums err less

// The sum of its numbers, by halves: one after another, each would wait for the one before.
inline float total(vec x) {
  float sums[LANES];
  store(sums, x);
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t l = 0; l < half; l++) sums[l] += sums[l + half];
  return sums[0];
}

// logits (rows, count) of x: its products with as many weights of K features.
template <typename Number>
void multiply(const Number* x, int64_t ldx, int64_t rows, int64_t K, const std::vector<const float*>& weights,
              float* logits) {
  const int64_t count = weights.size();
  float room[sizeof(Number) == sizeof(float) ? 1 : ROWS * PART];
  std::fill_n(logits, rows * count, 0.0f);
  for (int64_t t = 0; t < rows; t += ROWS) {
    for (int64_t k0 = 0; k0 < K; k0 += PART) {
      const int64_t n = std::min(PART, K - k0), whole = n / LANES * LANES;
      const float* from[ROWS];
      for (int64_t i = 0; i < ROWS; i++) {  // beyond the last row, that row again
        const Number* row = x + std::min(t + i, rows - 1) * ldx + k0;
        if constexpr (sizeof(Number) == sizeof(float)) {
          from[i] = row;
        } else {
          read(row, room + i * PART, n, n);
          from[i] = room + i * PART;
        }
      }
      for (int64_t c = 0; c < count; c += LOGITS) {
        const float* w[LOGITS];
        for (int64_t j = 0; j < LOGITS; j++) w[j] = weights[std::min(c + j, count - 1)] + k0;
        vec s[ROWS][LOGITS] = {};
        for (int64_t k = 0; k < whole; k += LANES)
          UNROLLED for (int64_t i = 0; i < ROWS; i++) UNROLLED for (int64_t j = 0; j < LOGITS; j++) s[i][j] +=
              load(from[i] + k) * load(w[j] + k);
        for (int64_t i = 0; i < std::min(ROWS, rows - t); i++) {
          for (int64_t j = 0; j < std::min(LOGITS, count - c); j++) {
            float sum = total(s[i][j]);
            for (int64_t k = whole; k < n; k++) sum += from[i][k] * w[j][k];
            logits[(t + i) * count + c + j] += sum;
          }
        }
      }
    }
  }
}

// The softmax of E logits; returns their logsumexp.
float softmax(const float* logits, int64_t E, float* probs) {
  float largest = logits[0], sum = 0.0f;
  for (int64_t e = 1; e < E; e++) largest = std::max(largest, logits[e]);
  for (int64_t e = 0; e < E; e++) sum += probs[e] = std::exp(logits[e] - largest);
  for (int64_t e = 0; e < E; e++) probs[e] /= sum;
  return largest + std::log(sum);
}

// One where a score is among the k best; ties go to the lower expert, and NaN is above all, as it is to torch.max.
void choose(const float* scores, int64_t E, int64_t k, float* chosen) {
  std::fill_n(chosen, E, 0.0f);
  for (int64_t i = 0; i < k; i++) {
    int64_t best = -1;
    for (int64_t e = 0; e < E; e++) {
      if (chosen[e] != 0.0f) continue;
      if (best < 0 || scores[e] > scores[best] || (scores[e] != scores[e] && scores[best] == scores[best])) best = e;
    }
    chosen[best] = 1.0f;
  }
}

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
      multiply(x + first * ldx, ldx, last - first, K, of_logits, logits + first * H * E);
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
          if (k == 1) {
            for (int64_t e = 0; e < E; e++) gate[e] = probs[e] * chosen[e];
          } else {  // the softmax over the chosen: it cannot become 0 / 0, as renormalised probabilities can
            float largest = -std::numeric_limits<float>::infinity(), sum = 0.0f;
            for (int64_t e = 0; e < E; e++)
              if (chosen[e] != 0.0f) largest = std::max(largest, own[e]);
            for (int64_t e = 0; e < E; e++) sum += gate[e] = chosen[e] != 0.0f ? std::exp(own[e] - largest) : 0.0f;
            for (int64_t e = 0; e < E; e++) gate[e] /= sum;
          }
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
