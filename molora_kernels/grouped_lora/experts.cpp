// Products of tokens with the experts they chose, on a CPU: what cpp.py compiles and calls.
//
// Tokens are grouped by the experts they chose (order). Rows stay where they are and are read and written through their
// token's number; a group's products are computed in tiles whose sums stay in vector registers. Every sum has an order
// of its own, the same for any number of threads.
//
// Shape letters: T tokens, F features, E experts, r rank of one, R = E r, V visits of tokens, M experts of a visit,
// C = M r columns of a visit, Q columns of "others", which each token has once whatever it chose.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANES = 16;  // of a vector; where registers are narrower the compiler makes several of one
constexpr int64_t TILE_ROWS = 6, TILE_COLUMNS = 4 * LANES;  // 24 of 32 vector registers hold sums
constexpr int64_t BLOCK_ROWS = 96;                          // of a task, which share a panel of weights
constexpr int64_t PANEL = 384 * 64;                         // numbers of a panel of weights: an eighth of 1 MiB of L2
constexpr int64_t GRAD_COLUMNS = 8, GRAD_FEATURES = 2 * LANES, GRAD_ROWS = 352;

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

template <typename T>
inline void prefetch(const T* row, int64_t n) {
  for (int64_t byte = 0; byte < n * int64_t(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
}

// sums[i][j] += sum over k of x[i][k] w[k][j], of TILE_ROWS rows and N vectors of columns. Sums begin at zero and are
// added at the end: long ones are sums of sums, which err less.
template <int N>
void tile(const float* const* x, const float* w, int64_t ldw, int64_t K, float* sums, int64_t lds) {
  vec s[TILE_ROWS][N] = {};
  for (int64_t k = 0; k < K; k++, w += ldw) {
    vec b[N];
    for (int j = 0; j < N; j++) b[j] = load(w + j * LANES);
    for (int i = 0; i < TILE_ROWS; i++) {
      float a = x[i][k];
      for (int j = 0; j < N; j++) s[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < TILE_ROWS; i++)
    for (int j = 0; j < N; j++) add(sums + i * lds + j * LANES, s[i][j]);
}

// d[i][j] += sum over v of columns[v][i] rows[v][j], of M columns and GRAD_FEATURES features; likewise.
template <int M>
void grad_tile(const float* columns, int64_t ldc, const float* rows, int64_t ldr, int64_t V, float* d, int64_t ldd) {
  vec s[M][2] = {};
  for (int64_t v = 0; v < V; v++, columns += ldc, rows += ldr) {
    vec b[2] = {load(rows), load(rows + LANES)};
    for (int i = 0; i < M; i++) {
      float a = columns[i];
      for (int j = 0; j < 2; j++) s[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < 2; j++) add(d + i * ldd + j * LANES, s[i][j]);
}

// An adapter's weights, (features, columns of all experts): B as it is, or A across.
struct Weights {
  const float* at;
  int64_t feature, column;  // steps from one to the next
};

// d[i * ldd + j] = of feature f + i and column c + j.
void copy(Weights w, int64_t f, int64_t features, int64_t c, int64_t columns, float* d, int64_t ldd) {
  const float* from = w.at + f * w.feature + c * w.column;
  if (w.column == 1) {
    for (int64_t i = 0; i < features; i++) std::memcpy(d + i * ldd, from + i * w.feature, 4 * columns);
  } else {
    for (int64_t j = 0; j < columns; j++)
      for (int64_t i = 0; i < features; i++) d[i * ldd + j] = from[i * w.feature + j * w.column];
  }
}

// Memory of this thread, kept from call to call; of any content. One for each purpose.
template <int purpose>
float* kept(int64_t size) {
  static thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < size) memory.resize(size);
  return memory.data();
}

// (F, R), or across: (R, F).
Weights weights(const float* at, bool across, int64_t F, int64_t R) {
  return across ? Weights{at, 1, F} : Weights{at, R, 1};
}

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Task {
  int64_t group, first, last;
};

// Blocks of rows of each group.
std::vector<Task> tasks_of(const int64_t* starts, int64_t groups) {
  std::vector<Task> tasks;
  for (int64_t g = 0; g < groups; g++)
    for (int64_t v = starts[g]; v < starts[g + 1]; v += BLOCK_ROWS)
      tasks.push_back({g, v, std::min(v + BLOCK_ROWS, starts[g + 1])});
  return tasks;
}

}  // namespace

// What all functions are told of the groups: the token of each visit (V,), where each group begins (groups + 1,), and
// the experts of each (groups, M).
#define GROUPS const int64_t *tokens, const int64_t *starts, const int64_t *experts, int64_t groups, int64_t M

// Rows of x times the weights of their experts: s (V, C) = x[tokens] w, w of F features and R columns; and what gates
// make of it, with c = scaling * gate (or scaling, without gates) and gated (V, C) beside s and ds, whose rows may lie
// apart:
// - forward: s rounded to x's dtype, gated = c s;
// - backward (of a given s): ds = c product, gated = c s, and dgates += scaling <product, s> of each chosen expert.
// Weights that lie the other way than a tile reads them are laid out in ``across``, which has their size; else it is
// null.
template <typename T>
void shrink(const T* x, int64_t ldx, Weights w, int64_t F, int64_t R, int64_t r, GROUPS, const float* gates,
            int64_t ldg, float scaling, bool backward, T* s, float* ds, int64_t lds, float* gated, float* dgates,
            float* across, int threads) {
  const int64_t C = M * r, columns = padded(C, LANES);
  const int64_t K = std::max<int64_t>(64, PANEL / columns / 64 * 64);
  const std::vector<Task> tasks = tasks_of(starts, groups);
#pragma omp parallel num_threads(threads)
  {
    float *panel = kept<0>(K * columns), *sums = kept<1>((BLOCK_ROWS + TILE_ROWS) * columns);
    float* rows = sizeof(T) == sizeof(float) ? nullptr : kept<2>(TILE_ROWS * K);
    if (across) {
#pragma omp for schedule(static)
      for (int64_t f = 0; f < F; f += 16) copy(w, f, std::min<int64_t>(16, F - f), 0, R, across + f * R, R);
    }
    const Weights own_w = across ? Weights{across, R, 1} : w;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); i++) {
      const Task task = tasks[i];
      const int64_t* own = experts + task.group * M;
      std::fill_n(sums, (task.last - task.first + TILE_ROWS) * columns, 0.0f);
      for (int64_t k0 = 0; k0 < F; k0 += K) {
        const int64_t n = std::min(K, F - k0);
        for (int64_t m = 0; m < M; m++) copy(own_w, k0, n, own[m] * r, r, panel + m * r, columns);
        for (int64_t k = 0; k < n; k++) std::fill(panel + k * columns + C, panel + (k + 1) * columns, 0.0f);
        for (int64_t v = task.first; v < task.last; v += TILE_ROWS) {
          const float* from[TILE_ROWS];
          for (int64_t i = 0; i < TILE_ROWS; i++) {  // beyond the last row, that row again
            const T* row = x + tokens[std::min(v + i, task.last - 1)] * ldx + k0;
            if constexpr (sizeof(T) == sizeof(float)) {
              from[i] = row;
            } else {
              read(row, rows + i * K, n, n);
              from[i] = rows + i * K;
            }
          }
          float* to = sums + (v - task.first) * columns;
          int64_t j = 0;
          for (; j + TILE_COLUMNS <= columns; j += TILE_COLUMNS) tile<4>(from, panel + j, columns, n, to + j, columns);
          for (; j < columns; j += LANES) tile<1>(from, panel + j, columns, n, to + j, columns);
        }
      }
      for (int64_t v = task.first; v < task.last; v++) {
        for (int64_t m = 0; m < M; m++) {
          const int64_t at = v * lds + m * r, gate = tokens[v] * ldg + own[m];
          float* own_gated = gated + v * C + m * r;
          const float* product = sums + (v - task.first) * columns + m * r;
          const float c = gates ? scaling * gates[gate] : scaling;
          if (!backward) {
            write(product, s + at, r);
            for (int64_t j = 0; j < r; j++) own_gated[j] = c * product[j];
            continue;
          }
          float dgate = 0.0f;
          for (int64_t j = 0; j < r; j++) {
            const float own_s = to_float(s[at + j]);
            ds[at + j] = c * product[j];
            own_gated[j] = c * own_s;
            dgate += product[j] * own_s;
          }
          if (dgates) dgates[gate] += scaling * dgate;
        }
      }
    }
  }
}

// y[tokens] += columns (V, C) times the weights of their experts, w across; + others (T, Q) w_others (Q, F). Where
// tokens are visited more than once, one group after another, so that no two threads write to one row. ``across`` as in
// shrink.
template <typename T>
void expand(T* y, int64_t ldy, const float* columns, int64_t ldc, Weights w, int64_t F, int64_t R, int64_t r, GROUPS,
            bool once, const float* others, const float* w_others, int64_t Q, float* across, int threads) {
  const int64_t C = M * r;
  const std::vector<Task> tasks = tasks_of(starts, groups);
#pragma omp parallel num_threads(threads)
  {
    float *panel = kept<0>((C + Q) * TILE_COLUMNS), sums[TILE_ROWS * TILE_COLUMNS];
    if (across) {
#pragma omp for schedule(static)
      for (int64_t c = 0; c < R; c += 16)
        copy({w.at, w.column, w.feature}, c, std::min<int64_t>(16, R - c), 0, F, across + c * F, F);
    }
    const float* own_w = across ? across : w.at;
    for (size_t first = 0, last; first < tasks.size(); first = last) {
      for (last = first + 1; last < tasks.size() && (once || tasks[last].group == tasks[first].group);) last++;
#pragma omp for schedule(dynamic)
      for (size_t i = first; i < last; i++) {
        const Task task = tasks[i];
        const int64_t* own = experts + task.group * M;
        for (int64_t f = 0; f < F; f += TILE_COLUMNS) {
          const int64_t n = std::min(TILE_COLUMNS, F - f);
          for (int64_t c = 0; c < C; c++)
            read(own_w + (own[c / r] * r + c % r) * F + f, panel + c * TILE_COLUMNS, n, TILE_COLUMNS);
          for (int64_t q = 0; q < Q; q++) read(w_others + q * F + f, panel + (C + q) * TILE_COLUMNS, n, TILE_COLUMNS);
          for (int64_t v = task.first; v < task.last; v += TILE_ROWS) {
            const float *from[TILE_ROWS], *from_others[TILE_ROWS];
            T* to[TILE_ROWS];
            for (int64_t i = 0; i < TILE_ROWS; i++) {
              const int64_t u = std::min(v + i, task.last - 1);
              from[i] = columns + u * ldc;
              from_others[i] = others + tokens[u] * Q;
              to[i] = y + tokens[u] * ldy + f;
              read(to[i], sums + i * TILE_COLUMNS, n, TILE_COLUMNS);
              if (u + TILE_ROWS < task.last) prefetch(y + tokens[u + TILE_ROWS] * ldy + f, n);
            }
            tile<4>(from, panel, TILE_COLUMNS, C, sums, TILE_COLUMNS);
            if (Q) tile<4>(from_others, panel + C * TILE_COLUMNS, TILE_COLUMNS, Q, sums, TILE_COLUMNS);
            for (int64_t i = 0; i < std::min(TILE_ROWS, task.last - v); i++) write(sums + i * TILE_COLUMNS, to[i], n);
          }
        }
      }
    }
  }
}

// d = factor * columns (V, C)^T x[tokens], of each expert the sum over its visits: (R, F), or across (F, R); and of
// others d_others (Q, F) = others (T, Q)^T x.
template <typename T>
void grad(const T* x, int64_t ldx, const float* columns, int64_t ldc, int64_t F, int64_t R, int64_t r, GROUPS,
          float factor, bool across, float* d, const float* others, float* d_others, int64_t Q, int threads) {
  const int64_t C = M * r, BLOCK = 2 * GRAD_FEATURES;
#pragma omp parallel num_threads(threads)
  {
    float *rows = kept<0>(GRAD_ROWS * BLOCK), *of_others = kept<1>(GRAD_ROWS * Q), *sums = kept<2>((R + Q) * BLOCK);
    // To ``many`` sums that follow one another, of as many columns, from all that rows has.
    auto accumulate = [&](const float* from, int64_t ld, int64_t many, int64_t V, float* to) {
      for (int64_t i = 0; i < many;) {
        const int64_t step = many - i >= GRAD_COLUMNS ? GRAD_COLUMNS : many - i >= 4 ? 4 : 1;
        for (int64_t j = 0; j < BLOCK; j += GRAD_FEATURES) {
          auto own = step == GRAD_COLUMNS ? grad_tile<GRAD_COLUMNS> : step == 4 ? grad_tile<4> : grad_tile<1>;
          own(from + i, ld, rows + j, BLOCK, V, to + i * BLOCK + j, BLOCK);
        }
        i += step;
      }
    };
#pragma omp for schedule(static)
    for (int64_t f = 0; f < F; f += BLOCK) {
      const int64_t n = std::min(BLOCK, F - f);
      std::fill_n(sums, (R + Q) * BLOCK, 0.0f);
      for (int64_t g = 0; g < groups; g++) {
        for (int64_t v = starts[g]; v < starts[g + 1]; v += GRAD_ROWS) {
          const int64_t V = std::min(GRAD_ROWS, starts[g + 1] - v);
          for (int64_t i = 0; i < V; i++) {
            if (i + 8 < V) prefetch(x + tokens[v + i + 8] * ldx + f, n);
            read(x + tokens[v + i] * ldx + f, rows + i * BLOCK, n, BLOCK);
            for (int64_t q = 0; q < Q; q++) of_others[i * Q + q] = others[tokens[v + i] * Q + q];
          }
          for (int64_t m = 0; m < M; m++)
            accumulate(columns + v * ldc + m * r, ldc, r, V, sums + experts[g * M + m] * r * BLOCK);
          accumulate(of_others, Q, Q, V, sums + R * BLOCK);
        }
      }
      for (int64_t c = 0; c < R; c++)
        for (int64_t i = 0; i < n; i++) d[across ? (f + i) * R + c : c * F + f + i] = factor * sums[c * BLOCK + i];
      for (int64_t q = 0; q < Q; q++) write(sums + (R + q) * BLOCK, d_others + q * F + f, n);
    }
  }
}

extern "C" {

// Tokens grouped by what they chose, of gates (T, E): the k of largest magnitude, ties to the lower expert (a chosen
// gate may have underflowed to zero, and then another zero may take its place). By set, each token is visited once,
// with M = k experts, and there are as many groups as sets that occur, at most most_sets; else once with each of its
// experts, M = 1. Tokens and experts of a group ascend. Returns the number of groups, or -1 if there were more sets.
int64_t order(const float* gates, int64_t ldg, int64_t T, int64_t E, int64_t k, int64_t most_sets, int64_t* tokens,
              int64_t* starts, int64_t* experts) {
  std::vector<uint64_t> chosen(T), sets;
  for (int64_t t = 0; t < T; t++) {
    const float* own = gates + t * ldg;
    uint64_t found = 0;
    for (int64_t e = 0; e < E; e++) found |= uint64_t(own[e] != 0) << e;
    const bool enough = __builtin_popcountll(found) == k;
    if (!enough) found = 0;
    for (int64_t i = enough ? k : 0; i < k; i++) {
      int64_t best = -1;
      for (int64_t e = 0; e < E; e++)
        if (!(found >> e & 1) && (best < 0 || std::abs(own[e]) > std::abs(own[best]))) best = e;
      found |= uint64_t(1) << best;
    }
    chosen[t] = found;
    if (most_sets && std::find(sets.begin(), sets.end(), found) == sets.end()) {
      if (int64_t(sets.size()) == most_sets) return -1;
      sets.push_back(found);
    }
  }
  if (!most_sets)
    for (int64_t e = 0; e < E; e++) sets.push_back(uint64_t(1) << e);
  std::sort(sets.begin(), sets.end());
  const int64_t M = most_sets ? k : 1;
  int64_t groups = 0, visits = 0;
  for (uint64_t set : sets) {
    starts[groups] = visits;
    for (int64_t t = 0; t < T; t++)
      if ((chosen[t] & set) == set) tokens[visits++] = t;
    if (visits == starts[groups]) continue;
    for (int64_t e = 0, m = 0; e < E; e++)
      if (set >> e & 1) experts[groups * M + m++] = e;
    groups++;
  }
  starts[groups] = visits;
  return groups;
}

#define OF_DTYPE(T, name)                                                                                             \
  void shrink_##name(const T* x, int64_t ldx, const float* w, bool across, int64_t F, int64_t R, int64_t r, GROUPS,   \
                     const float* gates, int64_t ldg, float scaling, bool backward, T* s, float* ds, int64_t lds,     \
                     float* gated, float* dgates, float* room, int threads) {                                         \
    shrink(x, ldx, weights(w, across, F, R), F, R, r, tokens, starts, experts, groups, M, gates, ldg, scaling,        \
           backward, s, ds, lds, gated, dgates, room, threads);                                                       \
  }                                                                                                                   \
  void expand_##name(T* y, int64_t ldy, const float* columns, int64_t ldc, const float* w, bool across, int64_t F,    \
                     int64_t R, int64_t r, GROUPS, bool once, const float* others, const float* w_others, int64_t Q,  \
                     float* room, int threads) {                                                                      \
    expand(y, ldy, columns, ldc, weights(w, across, F, R), F, R, r, tokens, starts, experts, groups, M, once, others, \
           w_others, Q, room, threads);                                                                               \
  }                                                                                                                   \
  void grad_##name(const T* x, int64_t ldx, const float* columns, int64_t ldc, int64_t F, int64_t R, int64_t r,       \
                   GROUPS, float factor, bool across, float* d, const float* others, float* d_others, int64_t Q,      \
                   int threads) {                                                                                     \
    grad(x, ldx, columns, ldc, F, R, r, tokens, starts, experts, groups, M, factor, across, d, others, d_others, Q,   \
         threads);                                                                                                    \
  }

OF_DTYPE(float, float32)
OF_DTYPE(bfloat16, bfloat16)
}
