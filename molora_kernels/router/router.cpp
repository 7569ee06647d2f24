// What routers do with their logits, on a CPU: what cpp.py compiles and calls. The formulas are those of portable.py.
//
// Shape letters: T tokens, H routers that read the same input, E experts.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t BLOCK = 128;  // tokens whose sums are added up by one thread, and then block by block

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

}  // namespace

extern "C" {

// Adds bias (H, E), if there is one, to logits (T, H, E); gives gates (T, H, E), sums (H, 1 + E) and counts (H, E).
void route(float* logits, const float* bias, const float* selection_bias, const bool* mask, int64_t T, int64_t H,
           int64_t E, int64_t k, float* gates, float* sums, float* counts, int threads) {
  const int64_t blocks = (T + BLOCK - 1) / BLOCK, width = 1 + 2 * E;
  std::vector<float> partials(blocks * H * width, 0.0f);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> probs(E), scores(E), chosen(E);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      for (int64_t t = block * BLOCK; t < std::min(T, (block + 1) * BLOCK); t++) {
        for (int64_t h = 0; h < H; h++) {
          float *own = logits + (t * H + h) * E, *gate = gates + (t * H + h) * E;
          if (bias)
            for (int64_t e = 0; e < E; e++) own[e] += bias[h * E + e];
          const float lse = softmax(own, E, probs.data());
          const float* from = own;
          if (selection_bias) {
            for (int64_t e = 0; e < E; e++) scores[e] = probs[e] + selection_bias[h * E + e];
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

// The gradient of the logits (T, H, E), from that of the gates (or none) and that of the sums (or none).
void route_backward(const float* dgates, const float* dsums, const float* logits, const float* gates, const bool* mask,
                    int64_t T, int64_t H, int64_t E, int64_t k, float* dlogits, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> probs(E);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) {
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
      }
    }
  }
}
}
