// What routers compute on a CPU, of a few rows: products with their weights, softmax, choice and gates. cpp.py puts
// this in the place of its include, after numbers.h.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

constexpr int64_t ROWS = 4, COLUMNS = REGISTERS > 16 ? 4 : 2;  // of a tile, whose sums stay in vector registers
constexpr int64_t PART = 512;  // features whose products are added up at a time: sums of sums err less

// The sum of its numbers, by halves: one after another, each would wait for the one before.
inline float total(vec x) {
  float sums[LANES];
  store(sums, x);
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t l = 0; l < half; l++) sums[l] += sums[l + half];
  return sums[0];
}

// to[i][j] += x[i] times w[j], of n numbers each, of R rows and the first ``columns`` of C columns.
template <int R, int C>
void products(const float* const* x, const float* const* w, int64_t n, int64_t columns, float* to, int64_t ldt) {
  const int64_t whole = n / LANES * LANES;
  vec s[R][C] = {};
  for (int64_t k = 0; k < whole; k += LANES) {
    UNROLLED
    for (int64_t i = 0; i < R; i++) {
      UNROLLED
      for (int64_t j = 0; j < C; j++) s[i][j] += load(x[i] + k) * load(w[j] + k);
    }
  }
  for (int64_t i = 0; i < R; i++) {
    for (int64_t j = 0; j < columns; j++) {
      float sum = total(s[i][j]);
      for (int64_t k = whole; k < n; k++) sum += x[i][k] * w[j][k];
      to[i * ldt + j] += sum;
    }
  }
}

// to (rows, columns), rows ldt apart: the products of as many x and w, of K numbers each. Each has a sum of its own,
// whatever is computed beside it.
template <typename Number>
void multiply(const Number* const* x, int64_t rows, const float* const* w, int64_t columns, int64_t K, float* to,
              int64_t ldt) {
  float room[sizeof(Number) == sizeof(float) ? 1 : ROWS * PART];
  for (int64_t t = 0; t < rows; t++) std::fill_n(to + t * ldt, columns, 0.0f);
  for (int64_t t = 0; t < rows; t += ROWS) {
    const int64_t many = std::min(ROWS, rows - t);
    const auto own = many == 1   ? products<1, COLUMNS>
                     : many == 2 ? products<2, COLUMNS>
                     : many == 3 ? products<3, COLUMNS>
                                 : products<ROWS, COLUMNS>;
    for (int64_t k0 = 0; k0 < K; k0 += PART) {
      const int64_t n = std::min(PART, K - k0);
      const float* from[ROWS];
      for (int64_t i = 0; i < many; i++) {
        if constexpr (sizeof(Number) == sizeof(float)) {
          from[i] = x[t + i] + k0;
        } else {
          read(x[t + i] + k0, room + i * PART, n, n);
          from[i] = room + i * PART;
        }
      }
      for (int64_t c = 0; c < columns; c += COLUMNS) {
        const float* of[COLUMNS];
        for (int64_t j = 0; j < COLUMNS; j++) of[j] = w[std::min(c + j, columns - 1)] + k0;
        own(from, of, n, std::min(COLUMNS, columns - c), to + t * ldt + c, ldt);
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

// Of E logits, and of the chosen ones and the softmax of all: the gates of the k chosen, zero for others.
void gates_of(const float* logits, const float* probs, const float* chosen, int64_t E, int64_t k, float* gates) {
  if (k == 1) {
    for (int64_t e = 0; e < E; e++) gates[e] = probs[e] * chosen[e];
    return;
  }  // the softmax over the chosen: it cannot become 0 / 0, as renormalised probabilities can
  float largest = -std::numeric_limits<float>::infinity(), sum = 0.0f;
  for (int64_t e = 0; e < E; e++)
    if (chosen[e] != 0.0f) largest = std::max(largest, logits[e]);
  for (int64_t e = 0; e < E; e++) sum += gates[e] = chosen[e] != 0.0f ? std::exp(logits[e] - largest) : 0.0f;
  for (int64_t e = 0; e < E; e++) gates[e] /= sum;
}

}  // namespace
