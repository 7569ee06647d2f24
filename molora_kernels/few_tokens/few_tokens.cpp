// Experts of a few tokens, on a CPU: what cpp.py compiles and calls. Weights are read once, where they lie, and only
// those of experts that a token chose. Every sum has an order of its own, whatever the number of threads.
//
// Shape letters: T tokens, K features of the input and N of an output, G projections that read the same input, H gate
// sets, E experts, r rank of one, R = E r.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../numbers.h"
#include "../routing.h"

namespace {

// What Python gives: cpp.py has both with the same fields.
struct Projection {
  const float *a, *b;  // (R, K) and (N, R)
  void* y;             // (T, N) of the call's dtype, rows ldy apart: added to
  int64_t ldy, N;
};

struct Call {
  const Projection* projections;
  int64_t G;
  const void* x;  // (T, K) of the call's dtype, rows ldx apart
  int64_t ldx, T, K, E, r;
  const float *const *weights, *const *biases;  // of each router (E, K) and (E,); or null, and gates are given
  int64_t H, k;
  float* gates;    // (H, T, E); null without experts to choose from
  double scaling;  // alpha / r
  int64_t threads;
};

constexpr int64_t BLOCK = 64;                        // features of a task
constexpr int64_t VECTORS = REGISTERS > 16 ? 4 : 2;  // of a tile
constexpr int64_t SHARE = 8;                         // columns of the shrink of a task

// Rows of B to fetch ahead: only some numbers of each are read, which no processor foresees.
constexpr int64_t AHEAD = 8;
inline void fetch(const float* numbers, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(numbers + i);
}

// The tokens that an expert is computed for, and where their columns of the shrink begin.
struct Visits {
  std::vector<int64_t> tokens;
  int64_t first;
};

// Of one head: the visits of each expert.
std::vector<Visits> visits_of(const float* gates, int64_t T, int64_t E) {
  std::vector<Visits> found(E);
  int64_t first = 0;
  for (int64_t e = 0; e < E; e++) {
    for (int64_t t = 0; t < T; t++)
      if (!gates || gates[t * E + e] != 0.0f) found[e].tokens.push_back(t);
    found[e].first = first;
    first += found[e].tokens.size();
  }
  return found;
}

// sums (T, BLOCK) of a block of features, of few tokens: each row of B is dotted with what is multiplied by it.
void dotted(const Projection& p, const Call& call, const std::vector<Visits>& visits, const float* s, int64_t n0,
            int64_t columns, float* sums) {
  const int64_t R = call.E * call.r, r = call.r;
  for (int64_t n = 0; n < columns; n++) {
    for (int64_t e = 0; e < call.E; e++) {
      const float *b = p.b + (n0 + n) * R + e * r, *own = s + visits[e].first * r;
      if (!visits[e].tokens.empty()) fetch(b + AHEAD * R, r);
      for (const int64_t t : visits[e].tokens) {
        products<1, 1>(&own, &b, r, 1, sums + t * BLOCK + n, 0);
        own += r;
      }
    }
  }
}

// The same of more: rows of B are laid across first.
template <int M>
void tile(const float* s, int64_t r, const float* across, float* const* sums) {
  UNROLLED
  for (int64_t j = 0; j < BLOCK; j += VECTORS * LANES) {
    vec own[M][VECTORS] = {};
    for (int64_t k = 0; k < r; k++) {
      UNROLLED
      for (int64_t i = 0; i < M; i++) {
        UNROLLED
        for (int64_t v = 0; v < VECTORS; v++) own[i][v] += s[i * r + k] * load(across + k * BLOCK + j + v * LANES);
      }
    }
    UNROLLED
    for (int64_t i = 0; i < M; i++) {
      UNROLLED
      for (int64_t v = 0; v < VECTORS; v++) add(sums[i] + j + v * LANES, own[i][v]);
    }
  }
}

void multiplied(const Projection& p, const Call& call, const std::vector<Visits>& visits, const float* s, int64_t n0,
                int64_t columns, float* sums) {
  const int64_t R = call.E * call.r, r = call.r;
  std::vector<float> across(r * BLOCK, 0.0f);
  for (int64_t e = 0; e < call.E; e++) {
    const std::vector<int64_t>& tokens = visits[e].tokens;
    const int64_t many = tokens.size();
    for (int64_t n = 0; n < columns && many; n++) {
      const float* b = p.b + (n0 + n) * R + e * r;
      fetch(b + AHEAD * R, r);
      for (int64_t j = 0; j < r; j++) across[j * BLOCK + n] = b[j];
    }
    for (int64_t v = 0; v < many; v += ROWS) {
      const float* own = s + (visits[e].first + v) * r;
      float* to[ROWS];
      for (int64_t i = 0; i < std::min(ROWS, many - v); i++) to[i] = sums + tokens[v + i] * BLOCK;
      switch (many - v) {
        case 1:
          tile<1>(own, r, across.data(), to);
          break;
        case 2:
          tile<2>(own, r, across.data(), to);
          break;
        case 3:
          tile<3>(own, r, across.data(), to);
          break;
        default:
          tile<ROWS>(own, r, across.data(), to);
      }
    }
  }
}

// y of one projection, of a block of its features, from the columns of its shrink, which gates and scaling are in.
template <typename T>
void expand(const Projection& p, const Call& call, const std::vector<Visits>& visits, const float* s, int64_t n0) {
  const int64_t columns = std::min(BLOCK, p.N - n0);
  std::vector<float> sums(call.T * BLOCK, 0.0f);
  (call.T < ROWS ? dotted : multiplied)(p, call, visits, s, n0, columns, sums.data());
  for (int64_t t = 0; t < call.T; t++) {
    T* y = static_cast<T*>(p.y) + t * p.ldy + n0;
    for (int64_t n = 0; n < columns; n++) set(y[n], to_float(y[n]) + sums[t * BLOCK + n]);
  }
}

template <typename T>
void few_tokens(const Call& call) {
  const int64_t tokens = call.T, K = call.K, E = call.E, r = call.r, H = call.H, threads = call.threads;
  std::vector<const T*> rows(tokens);
  for (int64_t t = 0; t < tokens; t++) rows[t] = static_cast<const T*>(call.x) + t * call.ldx;
  std::vector<float> logits(call.weights ? H * E * tokens : 0);
  std::vector<std::vector<Visits>> visits(std::max<int64_t>(H, 1));
  std::vector<float> s;  // of all projections, of all visits
  int64_t all = 0;       // visits, at most, of one projection
#pragma omp parallel num_threads(int(threads))
  {
    if (call.weights) {
#pragma omp for schedule(static)
      for (int64_t h = 0; h < H; h++) {
        std::vector<const float*> weights(E);
        for (int64_t e = 0; e < E; e++) weights[e] = call.weights[h] + e * K;
        std::vector<float> probs(E), chosen(E);
        multiply(rows.data(), tokens, weights.data(), E, K, logits.data() + h * tokens * E, E);
        for (int64_t t = 0; t < tokens; t++) {
          float* own = logits.data() + (h * tokens + t) * E;
          for (int64_t e = 0; e < E; e++) own[e] += call.biases[h][e];
          softmax(own, E, probs.data());
          choose(own, E, call.k, chosen.data());
          gates_of(own, probs.data(), chosen.data(), E, call.k, call.gates + (h * tokens + t) * E);
        }
      }
    }
#pragma omp single
    {
      for (size_t h = 0; h < visits.size(); h++) {
        visits[h] = visits_of(call.gates ? call.gates + int64_t(h) * tokens * E : nullptr, tokens, E);
        all = std::max(all, visits[h].back().first + int64_t(visits[h].back().tokens.size()));
      }
      s.resize(call.G * all * r);
    }
    const int64_t shares = (r + SHARE - 1) / SHARE, of_projection = E * shares;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < call.G * of_projection; i++) {
      const int64_t g = i / of_projection, e = i / shares % E, first = i % shares * SHARE;
      const int64_t h = std::min(g, int64_t(visits.size()) - 1), columns = std::min(SHARE, r - first);
      const Visits& own = visits[h][e];
      std::vector<const T*> from(own.tokens.size());
      for (size_t v = 0; v < from.size(); v++) from[v] = rows[own.tokens[v]];
      const float* weights[SHARE];
      for (int64_t j = 0; j < columns; j++) weights[j] = call.projections[g].a + (e * r + first + j) * K;
      float* to = s.data() + (g * all + own.first) * r + first;
      multiply(from.data(), from.size(), weights, columns, K, to, r);
      for (size_t v = 0; v < from.size(); v++) {
        const float gate = call.gates ? call.gates[(h * tokens + own.tokens[v]) * E + e] : 1.0f;
        for (int64_t j = 0; j < columns; j++) to[int64_t(v) * r + j] *= float(call.scaling) * gate;
      }
    }
    for (int64_t g = 0; g < call.G; g++) {
      const Projection& p = call.projections[g];
#pragma omp for schedule(dynamic) nowait
      for (int64_t n = 0; n < p.N; n += BLOCK)
        expand<T>(p, call, visits[std::min(g, int64_t(visits.size()) - 1)], s.data() + g * all * r, n);
    }
  }
}

}  // namespace

extern "C" {
void few_tokens_float32(const Call* call) { few_tokens<float>(*call); }
void few_tokens_bfloat16(const Call* call) { few_tokens<bfloat16>(*call); }
}
