// Products of tokens with the experts they chose, on a CPU: what cpp.py compiles and calls.
//
// Tokens are grouped by the experts they chose (order). Rows stay where they are and are read and written through their
// token's number; a group's products are computed in tiles whose sums stay in vector registers. Every sum has an order
// of its own, the same for any number of threads.
//
// Shape letters: T tokens, K features of the input and N of an output, F either, G projections that read the same
// input, E experts, r rank of one, R = E r, V visits of tokens, M experts of a visit, C = M r columns of a visit, Q
// columns of "others", which each token has once whatever it chose.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "../numbers.h"

namespace {

constexpr bool MANY = REGISTERS > 16;  // a tile's sums take 24 of 32 registers or 12 of 16, those of gradients 16 or 12
constexpr int64_t TILE_ROWS = 6, TILE_VECTORS = MANY ? 4 : 2, TILE_COLUMNS = TILE_VECTORS * LANES;
constexpr int64_t BLOCK_ROWS = 96;      // of a task, which share a panel of weights
constexpr int64_t PANEL = 384 * 64;     // numbers of a panel of weights: an eighth of 1 MiB of L2
constexpr int64_t MOST_FEATURES = 384;  // whose products are added up at a time
constexpr int64_t BLOCK_FEATURES = 64;  // of a task of gradients
constexpr int64_t GRAD_COLUMNS = MANY ? 8 : 6, GRAD_FEATURES = 2 * LANES, GRAD_ROWS = 352;

// --- what Python gives: cpp.py has both with the same fields ------------------------------------------------------

struct Projection {
  const float *a, *b;  // (R, K) and (N, R)
  float *da, *db;      // likewise
  void* y;             // (T, N) of the call's dtype, rows ldy apart: the output, or its gradient
  int64_t ldy, N;
};

struct Call {
  const Projection* projections;
  int64_t G;
  void* x;  // (T, K) of the call's dtype, rows ldx apart: the input, or its gradient
  int64_t ldx, T, K, E, r;
  int64_t H;  // heads of the gates: G, or one that all projections share; without gates 0, as are the next
  int64_t M, V, most, order_size;
  const int64_t* order;  // of each head, what order() wrote
  int64_t once;          // whether each token is visited once
  const float* gates;    // (T, H, E), or null
  float* dgates;         // likewise
  float* scratch;        // forward: all of s, A and B; to_shrink: all of s
  void* s;               // of the call's dtype, the shrinks of all projections: (G, V, C), or without gates (T, G r)
  float* ds;             // likewise, in fp32
  const float* others;   // (T, Q), or null
  float* of_others;      // (Q, K): what they are multiplied with (to_input), or the gradient of that (to_adapter)
  int64_t Q;
  double scaling;  // alpha / r
  double factor;   // of A: what dropout's survivors are multiplied by
  int64_t threads;
};

// --- numbers ------------------------------------------------------------------------------------------------------

template <typename T>
inline void prefetch(const T* row, int64_t n) {
  for (int64_t byte = 0; byte < n * int64_t(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
}

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory of this thread, kept from call to call; of any content. One for each purpose.
template <int purpose, typename T = float>
T* kept(int64_t size) {
  static thread_local std::vector<T> memory;
  if (int64_t(memory.size()) < size) memory.resize(size);
  return memory.data();
}

// --- terms --------------------------------------------------------------------------------------------------------

// What products of rows of T add up: numbers of fp32, or where the processor multiplies them (AVX512-BF16), pairs of
// bf16, to sums of fp32, twice as many in the same time.
#ifdef __AVX512BF16__
struct pair {
  bfloat16 first, second;
};
template <typename T>
using Term = std::conditional_t<std::is_same_v<T, float>, float, pair>;

inline __m512i load(const pair* p) { return _mm512_loadu_si512(p); }
inline vec add_product(vec sum, pair a, __m512i b) {
  int bits;
  std::memcpy(&bits, &a, 4);
  return vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(_mm512_set1_epi32(bits)), __m512bh(b)));
}

// The first n numbers of two rows side by side: to has whole vectors.
template <typename T>
inline void pair_up(const T* first, const T* second, pair* to, int64_t n) {
  alignas(64) static const uint16_t turns[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t some = std::min(LANES, n - i);
    const vec low = load(first + i, some), high = load(second + i, some);
    const __m512i both = __m512i(_mm512_cvtne2ps_pbh(__m512(high), __m512(low)));
    _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(_mm512_load_si512(turns), both));
  }
}
#else
template <typename T>
using Term = float;

template <typename T>
void pair_up(const T* first, const T* second, float* to, int64_t n);  // named below, and never called
#endif

template <typename T>
constexpr int64_t PER_TERM = std::is_same_v<Term<T>, float> ? 1 : 2;

inline vec add_product(vec sum, float a, vec b) { return sum + a * b; }

// --- tiles --------------------------------------------------------------------------------------------------------

// to[i][j] += sum over k of x[i][k] w[j][k ldw], of TILE_ROWS rows and N vectors of columns. Sums begin at zero and are
// added at the end: long ones are sums of sums, which err less.
template <int N, typename Term>
void tile(const Term* const* x, const Term* const* w, int64_t ldw, int64_t K, float* const* to) {
  vec s[TILE_ROWS][N] = {};
  for (int64_t k = 0; k < K; k++) {
    decltype(load(w[0])) b[N];
    UNROLLED
    for (int j = 0; j < N; j++) b[j] = load(w[j] + k * ldw);
    UNROLLED
    for (int i = 0; i < TILE_ROWS; i++) {
      const Term a = x[i][k];
      UNROLLED
      for (int j = 0; j < N; j++) s[i][j] = add_product(s[i][j], a, b[j]);
    }
  }
  UNROLLED
  for (int i = 0; i < TILE_ROWS; i++) {
    UNROLLED
    for (int j = 0; j < N; j++) add(to[i] + j * LANES, s[i][j]);
  }
}

// Of any number of vectors of columns.
template <typename Term>
void tiles(const Term* const* x, const std::vector<const Term*>& w, int64_t ldw, int64_t K, float* to, int64_t ldt) {
  for (int64_t j = 0; j < int64_t(w.size()); j += TILE_VECTORS) {
    float* rows[TILE_ROWS];
    for (int64_t i = 0; i < TILE_ROWS; i++) rows[i] = to + i * ldt + j * LANES;
    switch (std::min(TILE_VECTORS, int64_t(w.size()) - j)) {
      case 1:
        tile<1>(x, &w[j], ldw, K, rows);
        break;
      case 2:
        tile<2>(x, &w[j], ldw, K, rows);
        break;
      case 3:
        tile<3>(x, &w[j], ldw, K, rows);
        break;
      default:
        tile<TILE_VECTORS>(x, &w[j], ldw, K, rows);
    }
  }
}

// d[i][j] += sum over v of columns[v][i] rows[v][j], of M columns and GRAD_FEATURES features; likewise.
template <int M, typename Term>
void grad_tile(const Term* columns, int64_t ldc, const Term* rows, int64_t V, float* d) {
  vec s[M][2] = {};
  for (int64_t v = 0; v < V; v++, columns += ldc, rows += BLOCK_FEATURES) {
    const auto b0 = load(rows), b1 = load(rows + LANES);
    UNROLLED
    for (int i = 0; i < M; i++) {
      s[i][0] = add_product(s[i][0], columns[i], b0);
      s[i][1] = add_product(s[i][1], columns[i], b1);
    }
  }
  UNROLLED
  for (int i = 0; i < M; i++) {
    UNROLLED
    for (int j = 0; j < 2; j++) add(d + i * BLOCK_FEATURES + j * LANES, s[i][j]);
  }
}

// To ``many`` rows of d that follow one another, of as many columns, all features of a block.
template <typename Term, int... M>
void grad_tiles(const Term* columns, int64_t ldc, int64_t many, const Term* rows, int64_t V, float* d,
                std::integer_sequence<int, M...>) {
  static constexpr decltype(&grad_tile<1, Term>) of_columns[] = {grad_tile<M + 1, Term>...};
  int64_t parts = (many + GRAD_COLUMNS - 1) / GRAD_COLUMNS;
  for (int64_t i = 0, step; i < many; i += step, parts--) {
    step = (many - i + parts - 1) / parts;
    for (int64_t j = 0; j < BLOCK_FEATURES; j += GRAD_FEATURES)
      of_columns[step - 1](columns + i, ldc, rows + j, V, d + i * BLOCK_FEATURES + j);
  }
}

template <typename Term>
void grad_tiles(const Term* columns, int64_t ldc, int64_t many, const Term* rows, int64_t V, float* d) {
  grad_tiles(columns, ldc, many, rows, V, d, std::make_integer_sequence<int, GRAD_COLUMNS>{});
}

// --- jobs ---------------------------------------------------------------------------------------------------------

// The token of each visit (V,), where each group begins (count + 1,), and the experts of each (count, M).
struct Groups {
  const int64_t *tokens, *starts, *experts;
  int64_t count, M;
};

// Rows and the experts that they are multiplied with: the input and A of one projection, or, without gates, of all,
// which are one LoRA as far as their input goes; or an output and B.
struct Job {
  Groups groups;
  void* rows;  // (T, F), ld apart
  int64_t ld, F;
  std::vector<const float*> weights;  // of each expert, (F, r) with these steps from one to the next
  std::vector<float*> grads;          // likewise
  int64_t feature, column, r;
  float factor;  // of the weights
  void* s;       // (V, C) of visits, ldc apart; so are the next two
  float *ds, *gated;
  int64_t C, ldc;
  const float* gates;
  float* dgates;
  int64_t ldg;
};

// Null stays null.
template <typename T>
T* beyond(T* p, int64_t n) {
  return p ? p + n : nullptr;
}

class Jobs {
 public:
  // Of the call's dtype; gated, as large as s, or null.
  template <typename T>
  Jobs(const Call& call, T*, float* gated) : call(call), everyone(call.H ? 0 : call.T), all(call.H ? 0 : call.G) {
    std::iota(everyone.begin(), everyone.end(), 0);
    std::iota(all.begin(), all.end(), 0);
    for (int64_t g = 0; g < call.G; g++) {
      const Projection& p = call.projections[g];
      Job job{};
      const bool routed = call.H;
      job.r = call.r;
      const int64_t experts = routed ? call.E : 1, R = experts * call.r;
      job.C = routed ? call.M * call.r : call.r;
      job.ldc = routed ? job.C : call.G * call.r;
      const int64_t at = routed ? g * call.V * job.C : g * call.r;
      job.s = beyond(static_cast<T*>(call.s), at), job.ds = beyond(call.ds, at), job.gated = beyond(gated, at);
      const int64_t head = std::min(g, call.H - 1);
      job.gates = beyond(call.gates, head * call.E), job.dgates = beyond(call.dgates, head * call.E);
      job.ldg = call.H * call.E;
      job.groups =
          routed ? of_order(call.order + head * call.order_size) : Groups{everyone.data(), ends, all.data(), 1, 1};

      Job out = job;
      out.rows = p.y, out.ld = p.ldy, out.F = p.N, out.feature = R, out.column = 1, out.factor = 1.0f;
      for (int64_t e = 0; e < experts; e++) {
        out.weights.push_back(beyond(p.b, e * call.r));
        out.grads.push_back(beyond(p.db, e * call.r));
      }
      outputs.push_back(out);

      if (routed || g == 0) {
        job.rows = call.x, job.ld = call.ldx, job.F = call.K, job.feature = 1, job.column = call.K;
        job.factor = float(call.factor);
        if (!routed) job.C = job.ldc, job.groups.M = call.G;
        inputs.push_back(job);
      }
      for (int64_t e = 0; e < experts; e++) {
        inputs.back().weights.push_back(beyond(p.a, e * call.r * call.K));
        inputs.back().grads.push_back(beyond(p.da, e * call.r * call.K));
      }
    }
  }

  std::vector<Job> inputs, outputs;

 private:
  Groups of_order(const int64_t* order) const {
    const int64_t *starts = order + 1, *experts = starts + call.most + 1;
    return {experts + call.most * call.M, starts, experts, order[0], call.M};
  }

  const Call& call;
  std::vector<int64_t> everyone, all;
  int64_t ends[2] = {0, call.T};
};

// The job with its weights across, in memory that begins at room and is filled by turn.
Job across(const Job& job, float*& room) {
  Job to = job;
  const bool side_by_side = job.feature == 1;  // features, as in A
  const int64_t R = int64_t(job.weights.size()) * job.r;
  to.feature = side_by_side ? R : 1, to.column = side_by_side ? 1 : job.F;
  for (size_t e = 0; e < to.weights.size(); e++) to.weights[e] = room + int64_t(e) * job.r * to.column;
  room += R * job.F;
  return to;
}

std::vector<Job> across(const std::vector<Job>& jobs, float*& room) {
  std::vector<Job> to;
  for (const Job& job : jobs) to.push_back(across(job, room));
  return to;
}

// In a parallel region, which is to wait after it.
void turn(const std::vector<Job>& jobs, const std::vector<Job>& turned) {
  constexpr int64_t LINE = 16;
  for (size_t j = 0; j < jobs.size(); j++) {
    const Job &from = jobs[j], &to = turned[j];
    const bool side_by_side = from.feature == 1;
    const int64_t near = side_by_side ? from.F : from.r, far = side_by_side ? from.r : from.F;
    const int64_t step_from = side_by_side ? from.column : from.feature,
                  step_to = side_by_side ? to.feature : to.column;
    const int64_t lines = (near + LINE - 1) / LINE, all = lines * int64_t(from.weights.size());
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < all; n++) {
      const int64_t first = n % lines * LINE, last = std::min(near, first + LINE);
      const float* source = from.weights[n / lines];
      float* target = const_cast<float*>(to.weights[n / lines]);
      for (int64_t k = 0; k < far; k++)
        for (int64_t i = first; i < last; i++) target[i * step_to + k] = source[k * step_from + i];
    }
  }
}

// A share of a job: visits of a group from first to last, or features. Those of a later wave begin when all of earlier
// ones have ended.
struct Task {
  int64_t job, group, first, last, wave;
};

// Blocks of rows. In one wave no row is written twice: unless tokens are visited once, each group of a job has a wave
// of its own; and where jobs are to be kept apart, each job.
std::vector<Task> blocks_of(const std::vector<Job>& jobs, bool once, bool apart) {
  std::vector<Task> tasks;
  int64_t waves = 0, wave = 0;
  for (size_t j = 0; j < jobs.size(); j++) {
    const Groups& groups = jobs[j].groups;
    if (!apart) waves = 0;
    for (int64_t g = 0; g < groups.count; g++) {
      wave = once ? waves : waves + g;
      for (int64_t v = groups.starts[g]; v < groups.starts[g + 1]; v += BLOCK_ROWS)
        tasks.push_back({int64_t(j), g, v, std::min(v + BLOCK_ROWS, groups.starts[g + 1]), wave});
    }
    waves = wave + 1;
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.wave < b.wave; });
  return tasks;
}

std::vector<Task> features_of(const std::vector<Job>& jobs) {
  std::vector<Task> tasks;
  for (size_t j = 0; j < jobs.size(); j++)
    for (int64_t f = 0; f < jobs[j].F; f += BLOCK_FEATURES)
      tasks.push_back({int64_t(j), 0, f, std::min(f + BLOCK_FEATURES, jobs[j].F), 0});
  return tasks;
}

// In a parallel region.
template <typename Run>
void each(const std::vector<Task>& tasks, Run run) {
  for (size_t first = 0, last; first < tasks.size(); first = last) {
    for (last = first + 1; last < tasks.size() && tasks[last].wave == tasks[first].wave;) last++;
#pragma omp for schedule(dynamic)
    for (size_t i = first; i < last; i++) run(tasks[i]);
  }
}

// Rows times the weights of their experts (columns side by side), and what gates make of it, with
// c = scaling * gate, or scaling without gates:
// - forward: s, rounded to the rows' dtype, and gated = c s;
// - backward, of a given s: ds = c product, gated = c s, and dgates += scaling <product, s> of each chosen expert.
template <typename T>
void shrink(const Job& job, const Task& task, float scaling, bool backward) {
  constexpr int64_t PER = PER_TERM<T>;
  const int64_t r = job.r, M = job.groups.M, C = job.C, columns = padded(C, LANES), ldc = job.ldc;
  const int64_t K = std::clamp<int64_t>(PANEL / columns / 64 * 64, 64, MOST_FEATURES),
                *own = job.groups.experts + task.group * M;
  const int64_t* tokens = job.groups.tokens;
  Term<T>*panel = kept<0, Term<T>>(K * columns), *staged = kept<1, Term<T>>(TILE_ROWS * K);
  float *sums = kept<2>((BLOCK_ROWS + TILE_ROWS) * columns), *two = kept<3>(3 * columns), *zeros = two + 2 * columns;
  std::fill_n(sums, (task.last - task.first + TILE_ROWS) * columns, 0.0f);
  std::fill_n(two, 3 * columns, 0.0f);
  // Numbers are read where they lie if an expert's columns are whole vectors, else, as pairs always are, from a panel.
  const bool whole = r % LANES == 0;
  std::vector<const Term<T>*> w(columns / LANES);
  for (int64_t k0 = 0; k0 < job.F; k0 += K) {
    const int64_t n = std::min(K, job.F - k0), terms = (n + PER - 1) / PER;
    for (int64_t j = 0; j < int64_t(w.size()); j++) {
      w[j] = panel + j * LANES;
      if constexpr (PER == 1)
        if (whole) w[j] = job.weights[own[j * LANES / r]] + k0 * job.feature + j * LANES % r;
    }
    for (int64_t k = 0; k < terms && !(PER == 1 && whole); k++) {
      Term<T>* to = panel + k * columns;
      for (int64_t m = 0; m < M; m++) {
        const float* row = job.weights[own[m]] + (k0 + k * PER) * job.feature;
        if constexpr (PER == 1) {
          std::memcpy(to + m * r, row, 4 * r);
        } else {
          const float* next = k * PER + 1 < n ? row + job.feature : zeros;
          if (whole) {
            pair_up(row, next, to + m * r, r);
          } else {
            std::memcpy(two + m * r, row, 4 * r);
            std::memcpy(two + columns + m * r, next, 4 * r);
          }
        }
      }
      if constexpr (PER == 1)
        std::fill(to + C, to + columns, 0.0f);
      else if (!whole)
        pair_up(two, two + columns, to, columns);
    }
    for (int64_t v = task.first; v < task.last; v += TILE_ROWS) {
      const Term<T>* from[TILE_ROWS];
      for (int64_t i = 0; i < TILE_ROWS; i++) {  // beyond the last row, that row again
        const T* row = static_cast<const T*>(job.rows) + tokens[std::min(v + i, task.last - 1)] * job.ld + k0;
        from[i] = staged + i * K;
        if constexpr (sizeof(T) * PER == sizeof(Term<T>)) {
          if (n % PER == 0) {
            from[i] = reinterpret_cast<const Term<T>*>(row);
          } else {
            std::memset(staged + i * K + terms - 1, 0, sizeof(Term<T>));
            std::memcpy(staged + i * K, row, n * sizeof(T));
          }
        } else {
          read(row, staged + i * K, n, n);
        }
      }
      tiles(from, w, PER == 1 && whole ? job.feature : columns, terms, sums + (v - task.first) * columns, columns);
    }
  }
  for (int64_t v = task.first; v < task.last; v++) {
    for (int64_t m = 0; m < M; m++) {
      const int64_t at = v * ldc + m * r, gate = tokens[v] * job.ldg + own[m];
      const float* product = sums + (v - task.first) * columns + m * r;
      const float c = job.gates ? scaling * job.gates[gate] : scaling;
      T* s = static_cast<T*>(job.s) + at;
      float *gated = job.gated + at, dgate = 0.0f;
      if (!backward) {
        for (int64_t j = 0; j < r; j++) {
          const float own_s = job.factor * product[j];
          set(s[j], own_s);
          gated[j] = c * own_s;
        }
        continue;
      }
      float* ds = job.ds + at;
      for (int64_t j = 0; j < r; j++) {
        const float own_s = to_float(s[j]);
        ds[j] = c * product[j];
        gated[j] = c * own_s;
        dgate += product[j] * own_s;
      }
      if (job.dgates) job.dgates[gate] += scaling * dgate;
    }
  }
}

// Adds to rows their columns, as far apart as s, times the weights of their experts (features side by side); and
// others (T, Q) times of_others (Q, F).
template <typename T>
void expand(const Job& job, const Task& task, const float* columns, const float* others, const float* of_others,
            int64_t Q) {
  constexpr int64_t PER = PER_TERM<T>;
  const int64_t r = job.r, M = job.groups.M, C = job.C, all = C + Q, terms = (all + PER - 1) / PER;
  const int64_t *tokens = job.groups.tokens, *own = job.groups.experts + task.group * M;
  float staged[TILE_ROWS * TILE_COLUMNS], *numbers = kept<0>((all + 1) * TILE_COLUMNS);
  Term<T>* panel;
  if constexpr (PER == 1)
    panel = numbers;
  else
    panel = kept<1, Term<T>>(terms * TILE_COLUMNS);
  T* rows = static_cast<T*>(job.rows);
  // Columns and others, rounded, side by side: pairs.
  bfloat16* side_by_side = PER == 1 ? nullptr : kept<2, bfloat16>((task.last - task.first) * terms * PER);
  for (int64_t v = task.first; v < task.last && PER > 1; v++) {
    bfloat16* to = side_by_side + (v - task.first) * terms * PER;
    to[terms * PER - 1] = {0};
    write(columns + v * job.ldc, to, C);
    write(others + tokens[v] * Q, to + C, Q);
  }
  const Term<T>*w[TILE_VECTORS], *w_others[TILE_VECTORS];
  for (int64_t j = 0; j < TILE_VECTORS; j++) w[j] = panel + j * LANES, w_others[j] = w[j] + C * TILE_COLUMNS;
  for (int64_t f = 0; f < job.F; f += TILE_COLUMNS) {
    const int64_t n = std::min(TILE_COLUMNS, job.F - f);
    float* to = numbers;
    for (int64_t m = 0; m < M; m++) {
      for (int64_t j = 0; j < r; j++, to += TILE_COLUMNS) {
        read(job.weights[own[m]] + j * job.column + f, to, n, TILE_COLUMNS);
        for (int64_t i = 0; i < n && job.factor != 1.0f; i++) to[i] *= job.factor;
      }
    }
    for (int64_t q = 0; q < Q; q++, to += TILE_COLUMNS) read(of_others + q * job.F + f, to, n, TILE_COLUMNS);
    if constexpr (PER > 1) {
      std::fill_n(to, TILE_COLUMNS, 0.0f);
      for (int64_t k = 0; k < terms; k++) {
        const float* row = numbers + k * PER * TILE_COLUMNS;
        pair_up(row, row + TILE_COLUMNS, panel + k * TILE_COLUMNS, TILE_COLUMNS);
      }
    }
    for (int64_t v = task.first; v < task.last; v += TILE_ROWS) {
      const int64_t many = std::min(TILE_ROWS, task.last - v);
      const bool direct = sizeof(T) == sizeof(float) && many == TILE_ROWS && n == TILE_COLUMNS;
      const Term<T>*from[TILE_ROWS], *from_others[TILE_ROWS];
      float* sums[TILE_ROWS];
      T* to[TILE_ROWS];
      for (int64_t i = 0; i < TILE_ROWS; i++) {
        const int64_t u = std::min(v + i, task.last - 1);
        if constexpr (PER == 1) {
          from[i] = columns + u * job.ldc;
          from_others[i] = others + tokens[u] * Q;
        } else {
          from[i] = reinterpret_cast<const Term<T>*>(side_by_side + (u - task.first) * terms * PER);
        }
        to[i] = rows + tokens[u] * job.ld + f;
        sums[i] = direct ? reinterpret_cast<float*>(to[i]) : staged + i * TILE_COLUMNS;
        if (!direct) read(to[i], sums[i], n, TILE_COLUMNS);
        if (u + TILE_ROWS < task.last) prefetch(rows + tokens[u + TILE_ROWS] * job.ld + f, n);
      }
      tile<TILE_VECTORS>(from, w, TILE_COLUMNS, PER == 1 ? C : terms, sums);
      if (PER == 1 && Q) tile<TILE_VECTORS>(from_others, w_others, TILE_COLUMNS, Q, sums);
      for (int64_t i = 0; i < many && !direct; i++) write(sums[i], to[i], n);
    }
  }
}

// Of some features, the gradient of each expert's weights: the sum over its visits of columns (as far apart as s) times
// rows; and of others (T, Q), in of_others (Q, F).
template <typename T>
void grad(const Job& job, const Task& task, const float* columns, const float* others, float* of_others, int64_t Q) {
  constexpr int64_t PER = PER_TERM<T>;
  const Groups& groups = job.groups;
  const int64_t r = job.r, M = groups.M, R = int64_t(job.grads.size()) * r, n = task.last - task.first;
  const int64_t C = PER == 1 ? 0 : padded(job.C, LANES), all = C + padded(Q, LANES), *tokens = groups.tokens;
  Term<T>*rows = kept<0, Term<T>>(GRAD_ROWS * BLOCK_FEATURES), *staged = kept<1, Term<T>>(GRAD_ROWS * all);
  float *sums = kept<2>((R + Q) * BLOCK_FEATURES), *zeros = kept<3>(std::max(job.C, Q));
  static const T none[BLOCK_FEATURES] = {};
  const T* from = static_cast<const T*>(job.rows) + task.first;
  std::fill_n(sums, (R + Q) * BLOCK_FEATURES, 0.0f);
  std::fill_n(zeros, std::max(job.C, Q), 0.0f);
  for (int64_t g = 0; g < groups.count; g++) {
    const int64_t last = groups.starts[g + 1];
    for (int64_t v = groups.starts[g]; v < last; v += GRAD_ROWS) {
      const int64_t V = std::min(GRAD_ROWS, last - v), terms = (V + PER - 1) / PER;
      // Others come after the columns, which pairs have beside them.
      for (int64_t i = 0; i < terms; i++) {
        const int64_t u = v + i * PER;
        for (int64_t ahead = u + 8; ahead < std::min(u + 8 + PER, last); ahead++)
          prefetch(from + tokens[ahead] * job.ld, n);
        const T* row = from + tokens[u] * job.ld;
        Term<T>*own = rows + i * BLOCK_FEATURES, *beside = staged + i * all;
        if constexpr (PER == 1) {
          read(row, own, n, BLOCK_FEATURES);
          for (int64_t q = 0; q < Q; q++) beside[q] = others[tokens[u] * Q + q];
        } else {
          const bool two = u + 1 < last && i * PER + 1 < V;
          std::fill(own + n, own + BLOCK_FEATURES, Term<T>{});
          pair_up(row, two ? from + tokens[u + 1] * job.ld : none, own, n);
          pair_up(columns + u * job.ldc, two ? columns + (u + 1) * job.ldc : zeros, beside, job.C);
          pair_up(others + tokens[u] * Q, two ? others + tokens[u + 1] * Q : zeros, beside + C, Q);
        }
      }
      for (int64_t m = 0; m < M; m++) {
        float* to = sums + groups.experts[g * M + m] * r * BLOCK_FEATURES;
        if constexpr (PER == 1)
          grad_tiles(columns + v * job.ldc + m * r, job.ldc, r, rows, V, to);
        else
          grad_tiles(staged + m * r, all, r, rows, terms, to);
      }
      grad_tiles(staged + C, all, Q, rows, terms, sums + R * BLOCK_FEATURES);
    }
  }
  for (int64_t c = 0; c < R; c++) {
    float* to = job.grads[c / r] + c % r * job.column + task.first * job.feature;
    for (int64_t i = 0; i < n; i++) to[i * job.feature] = job.factor * sums[c * BLOCK_FEATURES + i];
  }
  for (int64_t q = 0; q < Q; q++) write(sums + (R + q) * BLOCK_FEATURES, of_others + q * job.F + task.first, n);
}

// --- calls --------------------------------------------------------------------------------------------------------

// s, and what it adds to the outputs.
template <typename T>
void forward(const Call& call) {
  const Jobs jobs(call, static_cast<T*>(nullptr), call.scratch);
  float* room = call.scratch + call.G * std::max<int64_t>(call.M * call.V, call.T) * call.r;
  const std::vector<Job> inputs = across(jobs.inputs, room), outputs = across(jobs.outputs, room);
  const std::vector<Task> to_s = blocks_of(inputs, true, false), to_y = blocks_of(outputs, call.once, false);
#pragma omp parallel num_threads(int(call.threads))
  {
    turn(jobs.inputs, inputs);
    turn(jobs.outputs, outputs);
#pragma omp barrier
    each(to_s, [&](const Task& task) { shrink<T>(inputs[task.job], task, float(call.scaling), false); });
    each(to_y, [&](const Task& task) {
      const Job& job = outputs[task.job];
      expand<T>(job, task, job.gated, nullptr, nullptr, 0);
    });
  }
}

// ds of the outputs' gradients, with dgates, and db where there is one.
template <typename T>
void to_shrink(const Call& call) {
  const Jobs jobs(call, static_cast<T*>(nullptr), call.scratch);
  const std::vector<Task> to_s = blocks_of(jobs.outputs, true, call.H == 1), to_b = features_of(jobs.outputs);
#pragma omp parallel num_threads(int(call.threads))
  {
    each(to_s, [&](const Task& task) { shrink<T>(jobs.outputs[task.job], task, float(call.scaling), true); });
    if (call.projections[0].db)
      each(to_b, [&](const Task& task) {
        const Job& job = jobs.outputs[task.job];
        grad<T>(job, task, job.gated, nullptr, nullptr, 0);
      });
  }
}

// Adds what ds gives, and others, to the input's gradient.
template <typename T>
void to_input(const Call& call) {
  const Jobs jobs(call, static_cast<T*>(nullptr), nullptr);
  const std::vector<Task> to_x = blocks_of(jobs.inputs, call.once, true);
#pragma omp parallel num_threads(int(call.threads))
  each(to_x, [&](const Task& task) {
    const Job& job = jobs.inputs[task.job];
    expand<T>(job, task, job.ds, call.others, call.of_others, task.job ? 0 : call.Q);
  });
}

// da of ds, and others' gradient.
template <typename T>
void to_adapter(const Call& call) {
  const Jobs jobs(call, static_cast<T*>(nullptr), nullptr);
  const std::vector<Task> to_a = features_of(jobs.inputs);
#pragma omp parallel num_threads(int(call.threads))
  each(to_a, [&](const Task& task) {
    const Job& job = jobs.inputs[task.job];
    grad<T>(job, task, job.ds, call.others, call.of_others, task.job ? 0 : call.Q);
  });
}

}  // namespace

extern "C" {

// Tokens grouped by what they chose, of each head of gates (T, H, E): the k of largest magnitude, ties to the lower
// expert (a chosen gate may have underflowed to zero, and then another zero may take its place). By set, each token is
// visited once, with M = k experts, and there are as many groups as sets that occur; else once with each of its
// experts, M = 1. There are at most ``most`` groups. Tokens and experts of a group ascend. To out, for each head: the
// number of groups; where each begins (most + 1,); the experts of each (most, M); the token of each visit (V,).
void order(const float* gates, int64_t T, int64_t H, int64_t E, int64_t k, bool by_set, int64_t most, int64_t* out,
           int threads) {
  const int64_t M = by_set ? k : 1, V = by_set ? T : T * k, size = 1 + most + 1 + most * M + V;
#pragma omp parallel for num_threads(threads)
  for (int64_t h = 0; h < H; h++) {
    std::vector<uint64_t> chosen(T), sets;
    int64_t *starts = out + h * size + 1, *experts = starts + most + 1, *tokens = experts + most * M;
    int64_t groups = 0, visits = 0;
    for (int64_t t = 0; t < T; t++) {
      const float* own = gates + (t * H + h) * E;
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
      if (by_set && std::find(sets.begin(), sets.end(), found) == sets.end()) sets.push_back(found);
    }
    if (!by_set)
      for (int64_t e = 0; e < E; e++) sets.push_back(uint64_t(1) << e);
    std::sort(sets.begin(), sets.end());
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
    out[h * size] = groups;
  }
}

#define OF_DTYPE(T, name)                                          \
  void forward_##name(const Call* call) { forward<T>(*call); }     \
  void to_shrink_##name(const Call* call) { to_shrink<T>(*call); } \
  void to_input_##name(const Call* call) { to_input<T>(*call); }   \
  void to_adapter_##name(const Call* call) { to_adapter<T>(*call); }

OF_DTYPE(float, float32)
OF_DTYPE(bfloat16, bfloat16)
}
