// The ratio-clip objective on log-probabilities: loss, d loss / d logp and the clip statistics, in two or three
// launches.
//
//   [sequence_kernel] -> token_kernel -> finish_kernel: numbers of each sequence; tokens, and the sums of each block;
//   the scalars
//
// Bytes per float32 token: 12 read (logp, old_logp, advantages) + 1 (mask) + 4 written; a rule or an aggregation that
// needs sequences reads the inputs once more, GSPO and GMPO twice. Operations: some 400 instructions, a third of them
// for strides, dtypes and what may be absent; an H100 issues 160 in the time of those bytes. A million tokens are then
// 20 us of arithmetic, and no more than a few launches.
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "../objective_math.h"
#include "slots.h"

namespace fca {
namespace {

constexpr int kHeld = 2;  // tokens of a thread whose loads are under way together
constexpr int kTile = kHeld * kThreads;
constexpr int kMostSequenceThreads = 512;

// What a block leaves: the statistics, and behind them the sum of the loss.
constexpr int LOSS = kStats, kSums = kStats + 1;
template <typename T>
constexpr T kGreatest = std::numeric_limits<T>::max();
constexpr int kFinishThreads = 512;
static_assert(kSums <= kFinishThreads / kWarp, "finish_kernel: a warp a sum");

// ---------------------------------------------------------------- what the kernels are told

struct Matrix {
  int64_t address = 0;  // 0: absent
  DType dtype = DType::F32;
  int64_t row_stride = 0, col_stride = 0;  // in elements
};

// What sequence_kernel leaves for the tokens of a sequence, in float64.
struct SequenceNumbers {
  double inv_length;  // 1 / max(1, valid tokens)
  double s;           // the rule's sum or mean over the sequence
  double share;       // GSPO, GMPO: a token's part of the sequence's gradient
};
constexpr int64_t kSequenceNumbers = sizeof(SequenceNumbers) / sizeof(double);

template <typename T>
struct Work {
  Matrix logp, old_logp, advantages, weights, aux, ref_logp, entropy;
  const uint8_t* mask;  // bytes: a bool tensor viewed from other data may hold more than 0 and 1
  int64_t mask_row, mask_col;
  int64_t rows, cols, tokens;
  uint64_t inverse_cols;  // see place_of

  // Packed layout: one row, the sequence of each token, the tokens sorted by sequence, where each sequence begins
  // there.
  const int64_t *sequence_ids, *sequence_order, *sequence_offsets;
  int64_t sequence_stride, num_sequences;
  SequenceNumbers* sequences;  // null: nothing needs them

  Rule rule;
  RuleScalars<T> scalars;
  const double* bounds;  // null, or what replaces low and high
  Aggregation aggregation;
  double normalizer;               // 0: none given
  DeviceScalar normalizer_tensor;  // what replaces it, where given
  T kl_coef, entropy_coef;
  KlEstimator kl;

  double* partials;  // [kSums, blocks]
  int64_t blocks, tiles_per_block;
  T *loss, *grad, *grad_entropy, *scale;  // the gradients null where nobody wants them
  float* stats;

  __device__ __forceinline__ RuleScalars<T> rule_scalars() const {
    RuleScalars<T> p = scalars;
    if (bounds != nullptr) {
      p.low = static_cast<T>(bounds[0]);
      p.high = static_cast<T>(bounds[1]);
    }
    return p;
  }

  __device__ __forceinline__ double given_normalizer() const { return normalizer_tensor.read(normalizer); }

  // Where a token's loss and gradient saturate: times 1 / normalizer they must still be finite.
  __device__ __forceinline__ T token_limit() const {
    const double given = given_normalizer();
    return static_cast<T>(saturation(T()) * (given > 0 && given < 1 ? given : 1.0));
  }
};

// ---------------------------------------------------------------- reading tokens

struct Place {
  int64_t row, col;
};

// Row and column of the i-th token, i < 2^63. The product with 2^64 / cols, rounded down, is the row or one less: 20
// instructions where a division of 64 bits is 80 and a call.
template <typename T>
__device__ __forceinline__ Place place_of(const Work<T>& work, int64_t i) {
  int64_t row = static_cast<int64_t>(static_cast<unsigned __int128>(i) * work.inverse_cols >> 64);
  int64_t col = i - row * work.cols;
  if (col >= work.cols) {
    ++row;
    col -= work.cols;
  }
  return {row, col};
}

// Elements of one matrix: `load` asks for them, `value` waits. Every branch here is the same for all threads.
template <typename T, int HELD>
struct Elements {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits bits[HELD];

  __device__ __forceinline__ void load(const Matrix& m, const Place (&at)[HELD]) {
    if (m.address == 0) return;
    int64_t offset[HELD];
#pragma unroll
    for (int j = 0; j < HELD; ++j) offset[j] = at[j].row * m.row_stride + at[j].col * m.col_stride;
    if (m.dtype == DType::F64) {
#pragma unroll
      for (int j = 0; j < HELD; ++j) bits[j] = bit_cast<Bits>(load_one<double, T>(m.address, offset[j]));
    } else if (m.dtype == DType::F32) {
#pragma unroll
      for (int j = 0; j < HELD; ++j) bits[j] = __ldcg(reinterpret_cast<const unsigned*>(m.address) + offset[j]);
    } else {
#pragma unroll
      for (int j = 0; j < HELD; ++j) bits[j] = __ldcg(reinterpret_cast<const unsigned short*>(m.address) + offset[j]);
    }
  }

  __device__ __forceinline__ T value(const Matrix& m, int j, T absent) const {
    const uint32_t narrow = static_cast<uint32_t>(bits[j]);
    const float wide = bit_cast<float>(narrow << (m.dtype == DType::BF16 ? 16 : 0));
    const float half = load_as<float>(Float16{static_cast<uint16_t>(narrow)});
    T x = static_cast<T>(select(m.dtype == DType::F16, half, wide));
    if constexpr (sizeof(T) == 8) x = select(m.dtype == DType::F64, bit_cast<double>(bits[j]), x);
    return select(m.address == 0, absent, x);
  }
};

// A token in the arithmetic type: all 0 where it is masked or not readable.
template <typename T>
struct Read {
  T logp, D, A, w, aux, ref, entropy;
  T valid, bad;  // valid: unmasked and finite; bad: unmasked and not finite
};

// Tokens on their way: the constructor asks for everything, `read` waits.
template <typename T, int HELD>
struct Loads {
  Elements<T, HELD> logp, old_logp, advantages, weights, aux, ref_logp, entropy;
  uint8_t mask[HELD];

  __device__ __forceinline__ Loads(const Work<T>& work, const Place (&at)[HELD]) {
#pragma unroll
    for (int j = 0; j < HELD; ++j) {
      mask[j] = 1;
      if (work.mask != nullptr) mask[j] = __ldcg(work.mask + at[j].row * work.mask_row + at[j].col * work.mask_col);
    }
    logp.load(work.logp, at);
    old_logp.load(work.old_logp, at);
    advantages.load(work.advantages, at);
    weights.load(work.weights, at);
    aux.load(work.aux, at);
    ref_logp.load(work.ref_logp, at);
    entropy.load(work.entropy, at);
  }

  // `listed`: whether there is a j-th token. `known`: whether it belongs to a sequence.
  __device__ __forceinline__ Read<T> read(const Work<T>& work, int j, bool listed, bool known) const {
    const T lp = logp.value(work.logp, j, T(0)), old = old_logp.value(work.old_logp, j, T(0));
    const T A = advantages.value(work.advantages, j, T(0)), w = weights.value(work.weights, j, T(1));
    const T x = aux.value(work.aux, j, T(0)), ref = ref_logp.value(work.ref_logp, j, lp);
    const T H = entropy.value(work.entropy, j, T(0));
    const T d = lp - old, apart = ref - lp;
    // x - x is 0 for a finite x, else NaN; logp is in d, which is finite only if it is.
    const bool finite = (d - d) + (A - A) + (w - w) + (x - x) + (apart - apart) + (H - H) == T(0) && known;
    const bool unmasked = listed && mask[j] != 0, used = unmasked && finite;
    return {select(used, lp, T(0)),
            select(used, saturate(d), T(0)),
            select(used, A, T(0)),
            select(used, w, T(0)),
            select(used, x, T(0)),
            select(used, ref, T(0)),
            select(used, H, T(0)),
            fca::mask<T>(used),
            fca::mask<T>(unmasked && !finite)};
  }
};

// ---------------------------------------------------------------- rules

template <Rule RULE, typename T, int HELD>
__device__ __forceinline__ void evaluate(const TokenInput<T> (&in)[HELD], const RuleScalars<T>& p,
                                         Token<T> (&out)[HELD]) {
#pragma unroll
  for (int j = 0; j < HELD; ++j) out[j] = token<T, RULE>(in[j], p);
}

// A branch that all threads take alike, once for all tokens a thread holds: it costs a few instructions in 250, while a
// kernel a rule would be 40 kernels that differ in a tenth of their code.
template <typename T, int HELD>
__device__ __forceinline__ void evaluate(Rule rule, const TokenInput<T> (&in)[HELD], const RuleScalars<T>& p,
                                         Token<T> (&out)[HELD]) {
  switch (rule) {
    case Rule::PPO:
      return evaluate<Rule::PPO>(in, p, out);
    case Rule::CISPO:
      return evaluate<Rule::CISPO>(in, p, out);
    case Rule::SAPO:
      return evaluate<Rule::SAPO>(in, p, out);
    case Rule::GPG:
      return evaluate<Rule::GPG>(in, p, out);
    case Rule::DRO:
      return evaluate<Rule::DRO>(in, p, out);
    case Rule::DPPO_TV:
      return evaluate<Rule::DPPO_TV>(in, p, out);
    case Rule::DPPO_KL:
      return evaluate<Rule::DPPO_KL>(in, p, out);
    case Rule::GPPO:
      return evaluate<Rule::GPPO>(in, p, out);
    case Rule::DCPO:
      return evaluate<Rule::DCPO>(in, p, out);
    case Rule::ASPO:
      return evaluate<Rule::ASPO>(in, p, out);
    case Rule::PPO_EWMA:
      return evaluate<Rule::PPO_EWMA>(in, p, out);
    case Rule::KL_COV:
      return evaluate<Rule::KL_COV>(in, p, out);
    case Rule::CLIP_COV:
      return evaluate<Rule::CLIP_COV>(in, p, out);
    case Rule::VESPO:
      return evaluate<Rule::VESPO>(in, p, out);
    case Rule::GSPO:
      return evaluate<Rule::GSPO>(in, p, out);
    case Rule::GMPO:
      return evaluate<Rule::GMPO>(in, p, out);
  }
}

template <typename T>
__device__ __forceinline__ T term_of_sequence(Rule rule, const Read<T>& t, const RuleScalars<T>& p) {
  if (rule == Rule::VESPO) return sequence_term<T, Rule::VESPO>(t.D, t.A, t.aux, p);
  if (rule == Rule::GMPO) return sequence_term<T, Rule::GMPO>(t.D, t.A, t.aux, p);
  return sequence_term<T, Rule::GSPO>(t.D, t.A, t.aux, p);
}

// ---------------------------------------------------------------- sequences

// A token's loss and gradient times the aggregation and rollout weights, saturated.
template <typename T>
__device__ __forceinline__ T weighted(T aw, T x, T limit) {
  return saturate(aw * saturate(x), limit);
}

// Calls `each` for the tokens of a sequence that fall to this thread.
template <typename T, typename Each>
__device__ __forceinline__ void for_tokens_of_sequence(const Work<T>& work, int64_t sequence, const Each& each) {
  const bool packed = work.sequence_order != nullptr;
  const int64_t begin = packed ? work.sequence_offsets[sequence] : 0;
  const int64_t end = packed ? work.sequence_offsets[sequence + 1] : work.cols;
  for (int64_t first = begin + threadIdx.x; first < end; first += kHeld * blockDim.x) {
    Place at[kHeld];
    bool listed[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int64_t i = first + j * static_cast<int64_t>(blockDim.x);
      listed[j] = i < end;
      const int64_t safe = listed[j] ? i : first;
      at[j] = packed ? Place{0, work.sequence_order[safe]} : Place{sequence, safe};
    }
    const Loads<T, kHeld> loads(work, at);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) each(loads.read(work, j, listed[j], true));
  }
}

// A block a sequence: its length and its log-ratio, then (GSPO, GMPO) the sum of its tokens' gradients.
template <typename T>
__global__ void __launch_bounds__(kMostSequenceThreads) sequence_kernel(const __grid_constant__ Work<T> work) {
  __shared__ double fold[kMostSequenceThreads / kWarp];
  const int64_t sequence = blockIdx.x;
  const RuleScalars<T> p = work.rule_scalars();
  double valid = 0, term = 0, pull = 0;
  for_tokens_of_sequence(work, sequence, [&](const Read<T>& t) {
    valid += static_cast<double>(t.valid);
    term += static_cast<double>(term_of_sequence(work.rule, t, p));
  });
  valid = block_sum(valid, fold);
  term = block_sum(term, fold);
  SequenceNumbers out = {1.0 / (valid > 1.0 ? valid : 1.0), 0.0, 0.0};
  out.s = has_sequence_ratio(work.rule) ? term * out.inv_length : term;
  if (has_sequence_ratio(work.rule) && work.grad != nullptr) {
    const T s = static_cast<T>(out.s), r = exp_clamped(clamp_log_ratio(s)), limit = work.token_limit();
    const T a = work.aggregation == Aggregation::SEQUENCE_MEAN ? static_cast<T>(out.inv_length) : T(1);
    for_tokens_of_sequence(work, sequence, [&](const Read<T>& t) {
      const TokenInput<T> in[1] = {{r, t.D, t.A, t.logp, t.aux, s}};
      Token<T> own[1];
      if (work.rule == Rule::GSPO) evaluate<Rule::GSPO>(in, p, own);
      if (work.rule == Rule::GMPO) evaluate<Rule::GMPO>(in, p, own);
      pull += static_cast<double>(weighted(a * t.valid * t.w, own[0].grad, limit));
    });
    out.share = block_sum(pull, fold) * out.inv_length;
  }
  if (threadIdx.x == 0) work.sequences[sequence] = out;
}

// ---------------------------------------------------------------- tokens

// What a thread has summed: counts are exact in T up to 2^24 of them.
template <typename T>
struct Sums {
  T tokens = 0, low = 0, high = 0, dual = 0, bad = 0, least = kGreatest<T>, greatest = 0;
  double suppressed = 0, total = 0, k1 = 0, k2 = 0, k3 = 0, ratio = 0, ratio_sq = 0, loss = 0;
};

template <typename T>
struct Gradients {
  T logp, entropy;
};

// The aggregation weight, the KL and entropy terms, and what the statistics sum of a token that the rule has seen.
template <typename T>
__device__ __forceinline__ Gradients<T> add_token(const Work<T>& work, T limit, const Read<T>& t,
                                                  const SequenceNumbers& of_sequence, T r, T beyond_linear,
                                                  const Token<T>& own, Sums<T>& sums) {
  const bool mean = work.aggregation == Aggregation::SEQUENCE_MEAN;
  const T a = (mean ? static_cast<T>(of_sequence.inv_length) : T(1)) * t.valid;
  T loss = weighted(a * t.w, own.loss, limit);
  T grad = has_sequence_ratio(work.rule) ? static_cast<T>(of_sequence.share) * t.valid * own.keep
                                         : weighted(a * t.w, own.grad, limit);
  if (work.ref_logp.address != 0) {  // takes the aggregation weight but not the rollout weight w
    T square, linear, value, slope;
    const T x = t.logp - t.ref;
    kl_token<T, KlEstimator::K2>(x, square, linear);
    kl_token<T, KlEstimator::K3>(x, value, slope);
    if (work.kl == KlEstimator::K1) value = x, slope = T(1);
    if (work.kl == KlEstimator::K2) value = square, slope = linear;
    if (work.kl == KlEstimator::K3_PLUS) slope = linear;
    const T weight = a * work.kl_coef;
    loss = saturate(loss + weighted(weight, value, saturation(T())), limit);
    grad = saturate(grad + weighted(weight, slope, saturation(T())), limit);
  }
  const T grad_entropy = -work.entropy_coef * a;
  if (work.entropy.address != 0) loss = saturate(loss + weighted(grad_entropy, t.entropy, saturation(T())), limit);

  const T mass = at_most(a * r * std::fabs(t.A));
  sums.tokens += t.valid;
  sums.low += own.clipped_low * t.valid;
  sums.high += own.clipped_high * t.valid;
  sums.dual += own.clipped_dual * t.valid;
  sums.bad += t.bad;
  sums.suppressed += static_cast<double>(select(own.grad == T(0) || own.keep == T(0), mass, T(0)));
  sums.total += static_cast<double>(mass);
  sums.k1 += static_cast<double>(-t.D);
  sums.k2 += static_cast<double>(at_most(T(0.5) * t.D * t.D));
  sums.k3 += static_cast<double>(beyond_linear * t.valid);
  const T used_ratio = r * t.valid;
  sums.ratio += static_cast<double>(used_ratio);
  sums.ratio_sq += static_cast<double>(used_ratio) * static_cast<double>(used_ratio);
  sums.loss += static_cast<double>(loss);
  if (t.valid != T(0)) {
    sums.least = select(r < sums.least, r, sums.least);
    sums.greatest = select(r > sums.greatest, r, sums.greatest);
  }
  return {grad, grad_entropy};
}

__device__ __forceinline__ double combine(int stat, double x, double y) {
  if (stat == RATIO_MIN) return y < x ? y : x;
  if (stat == RATIO_MAX) return y > x ? y : x;
  return x + y;
}

__device__ __forceinline__ double warp_combine(int stat, double x) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) x = combine(stat, x, __shfl_xor_sync(0xffffffffu, x, width));
  return x;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) token_kernel(const __grid_constant__ Work<T> work) {
  __shared__ double fold[kSums][kThreads / kWarp];
  const RuleScalars<T> p = work.rule_scalars();
  const T limit = work.token_limit();
  Sums<T> sums;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * work.tiles_per_block * kTile;
  int64_t end = first + work.tiles_per_block * kTile;
  end = end < work.tokens ? end : work.tokens;
#pragma unroll 1
  for (int64_t base = first + threadIdx.x; base < end; base += kTile) {
    Place at[kHeld];
    bool listed[kHeld];
    int64_t sequence[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int64_t i = base + j * kThreads;
      listed[j] = i < end;
      at[j] = place_of(work, listed[j] ? i : base);
      sequence[j] = at[j].row;
      if (work.sequence_ids != nullptr) sequence[j] = work.sequence_ids[at[j].col * work.sequence_stride];
    }
    const Loads<T, kHeld> loads(work, at);
    SequenceNumbers numbers[kHeld];
    Read<T> tokens[kHeld];
    TokenInput<T> in[kHeld];
    Token<T> own[kHeld];
    T beyond_linear[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      numbers[j] = {1.0, 0.0, 0.0};
      bool known = true;
      if (work.sequences != nullptr) {
        known = sequence[j] >= 0 && sequence[j] < work.num_sequences;
        if (known) numbers[j] = work.sequences[sequence[j]];
      }
      tokens[j] = loads.read(work, j, listed[j], known);
      const Read<T>& t = tokens[j];
      const T s = static_cast<T>(numbers[j].s);
      const RatioParts<T> of_token = ratio_parts(t.D);
      beyond_linear[j] = of_token.beyond_linear;
      const T r = has_sequence_ratio(work.rule) ? exp_clamped(clamp_log_ratio(s)) : of_token.ratio;
      in[j] = {r, t.D, t.A, t.logp, t.aux, s};
    }
    evaluate(work.rule, in, p, own);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const Gradients<T> gradients =
          add_token(work, limit, tokens[j], numbers[j], in[j].r, beyond_linear[j], own[j], sums);
      const int64_t i = base + j * kThreads;
      if (listed[j] && work.grad != nullptr) __stcg(work.grad + i, gradients.logp);
      if (listed[j] && work.grad_entropy != nullptr) __stcg(work.grad_entropy + i, gradients.entropy);
    }
  }

  const double all[kSums] = {static_cast<double>(sums.tokens),
                             static_cast<double>(sums.low),
                             static_cast<double>(sums.high),
                             static_cast<double>(sums.dual),
                             sums.suppressed,
                             sums.total,
                             sums.k1,
                             sums.k2,
                             sums.k3,
                             sums.ratio,
                             sums.ratio_sq,
                             static_cast<double>(sums.least),
                             static_cast<double>(sums.greatest),
                             static_cast<double>(sums.bad),
                             sums.loss};
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    const double of_warp = warp_combine(k, all[k]);
    if (threadIdx.x % kWarp == 0) fold[k][threadIdx.x / kWarp] = of_warp;
  }
  __syncthreads();
  if (threadIdx.x < kSums) {
    const int k = static_cast<int>(threadIdx.x);
    double of_block = fold[k][0];
#pragma unroll
    for (int warp = 1; warp < kThreads / kWarp; ++warp) of_block = combine(k, of_block, fold[k][warp]);
    work.partials[k * work.blocks + blockIdx.x] = of_block;
  }
}

// ---------------------------------------------------------------- scalars

// What a warp makes of the blocks' sums, in a fixed order; a thread asks for eight before it uses the first.
__device__ __forceinline__ double fold_blocks(int stat, const double* partials, int64_t blocks) {
  constexpr int kTogether = 8;
  const double none = stat == RATIO_MIN ? static_cast<double>(kGreatest<float>) : 0.0;
  double sum = none;
  for (int64_t first = threadIdx.x % kWarp; first < blocks; first += kTogether * kWarp) {
    double held[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      held[k] = none;
      if (first + k * kWarp < blocks) held[k] = __ldcg(partials + first + k * kWarp);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) sum = combine(stat, sum, held[k]);
  }
  return warp_combine(stat, sum);
}

// A warp a sum; then the scale, and with it what is a mean.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const __grid_constant__ Work<T> work) {
  __shared__ double sums[kSums];
  const int k = static_cast<int>(threadIdx.x / kWarp);
  if (k < kSums) {
    const double sum = fold_blocks(k, work.partials + k * work.blocks, work.blocks);
    if (threadIdx.x % kWarp == 0) sums[k] = sum;
  }
  __syncthreads();
  double normalizer = work.given_normalizer();
  if (work.normalizer_tensor.data == nullptr && !(normalizer > 0)) {
    const double count =
        work.aggregation == Aggregation::TOKEN_MEAN ? sums[TOKENS] : static_cast<double>(work.num_sequences);
    normalizer = count > 1.0 ? count : 1.0;
  }
  const double factor = 1.0 / normalizer;
  if (threadIdx.x < kStats) {
    const int stat = static_cast<int>(threadIdx.x);
    const bool mean = stat == SUPPRESSED_MASS || stat == TOTAL_MASS;
    const double most = kGreatest<float>;
    work.stats[stat] = static_cast<float>(clip(sums[stat] * (mean ? factor : 1.0), -most, most));
  }
  if (threadIdx.x == 0) {
    const double most = kGreatest<T>;
    *work.loss = static_cast<T>(clip(sums[LOSS] * factor, -most, most));
    *work.scale = static_cast<T>(factor);
  }
}

// ---------------------------------------------------------------- candidate bounds

constexpr int kMostLevels = 128;
constexpr int kFoldThreads = 512;

// The bounds to try: the first `lows` of them for A < 0, the others for A >= 0.
template <typename T>
struct Levels {
  T bound[kMostLevels];
  int lows, count;
};

// Sum over A < 0 of max(r, low) |A| for each low, over A >= 0 of min(r, high) A for each high. The tokens of a tile go
// to shared memory, and each thread sums one level over a part of them: no atomics, no sorting, one pass over memory.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    bound_sums_kernel(const __grid_constant__ Work<T> work, const __grid_constant__ Levels<T> levels) {
  __shared__ T ratio[kThreads], advantage[kThreads];
  __shared__ double fold[kThreads];
  int width = kWarp;  // threads of a part; whole warps, so that a warp reads one token at a time
  while (width < levels.count) width *= 2;
  const int level = static_cast<int>(threadIdx.x) % width, part = static_cast<int>(threadIdx.x) / width;
  const int parts = kThreads / width;
  const T bound = level < levels.count ? levels.bound[level] : T(0);
  const bool is_low = level < levels.lows;
  double sum = 0;
  for (int64_t tile = 0; tile < work.tiles_per_block; ++tile) {
    const int64_t i = (blockIdx.x * work.tiles_per_block + tile) * kThreads + threadIdx.x;
    const bool listed = i < work.tokens;
    const Place at[1] = {place_of(work, listed ? i : 0)};
    const Read<T> token = Loads<T, 1>(work, at).read(work, 0, listed, true);
    __syncthreads();  // the previous tile has been used
    ratio[threadIdx.x] = exp_clamped(clamp_log_ratio(token.D));
    advantage[threadIdx.x] = token.A;  // 0 where the token does not count
    __syncthreads();
    for (int n = part; n < kThreads; n += parts) {
      const T r = ratio[n], A = is_low ? -advantage[n] : advantage[n];
      const T bounded = is_low == (r < bound) ? bound : r;
      sum += static_cast<double>(saturate(bounded * select(A > T(0), A, T(0))));
    }
  }
  fold[threadIdx.x] = sum;
  __syncthreads();
  if (part != 0 || level >= levels.count) return;
  for (int other = 1; other < parts; ++other) sum += fold[level + other * width];
  work.partials[level * work.blocks + blockIdx.x] = sum;
}

// A warp a level, in a fixed order.
__global__ void __launch_bounds__(kFoldThreads)
    bound_fold_kernel(const double* partials, int64_t blocks, int levels, double* out) {
  for (int level = static_cast<int>(threadIdx.x) / kWarp; level < levels; level += kFoldThreads / kWarp) {
    const double sum = fold_blocks(LOSS, partials + level * blocks, blocks);
    if (threadIdx.x % kWarp == 0) out[level] = sum;
  }
}

// ---------------------------------------------------------------- launching

Matrix matrix(const std::optional<Tensor>& tensor, const Tensor& like, const char* name) {
  if (!tensor) return {};
  check(tensor->dim() == 2 && tensor->size(0) == like.size(0) && tensor->size(1) == like.size(1), name, " must be [",
        like.size(0), ", ", like.size(1), "]");
  return {reinterpret_cast<int64_t>(tensor->const_data_ptr()), floating_dtype(*tensor, name), tensor->stride(0),
          tensor->stride(1)};
}

// Threads for sequences of a length: a warp for short ones, of which there are many.
int sequence_threads(int64_t length) {
  int threads = kWarp;
  while (threads < kMostSequenceThreads && threads * kHeld < length) threads *= 2;
  return threads;
}

// What every pass over tokens needs; `tile` tokens at a time, in as many blocks as `partials` has room for.
template <typename T>
Work<T> make_work(const Tensor& logp, const Tensor& old_logp, const Tensor& advantages,
                  const std::optional<Tensor>& mask, const Tensor& partials, int64_t sums, int64_t tile) {
  Work<T> work = {};
  work.rows = logp.size(0);
  work.cols = logp.size(1);
  work.tokens = work.rows * work.cols;
  work.inverse_cols = work.cols > 0 ? ~uint64_t{0} / static_cast<uint64_t>(work.cols) : 0;
  work.logp = matrix(logp, logp, "logp");
  work.old_logp = matrix(old_logp, logp, "old_logp");
  work.advantages = matrix(advantages, logp, "advantages");
  if (mask) {
    check(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    check(mask->dim() == 2 && mask->size(0) == work.rows && mask->size(1) == work.cols, "mask must be [", work.rows,
          ", ", work.cols, "]");
    work.mask = const_data<uint8_t>(*mask);
    work.mask_row = mask->stride(0);
    work.mask_col = mask->stride(1);
  }
  check_buffer(partials, ScalarType::Double, partials.numel(), "partials");
  const int64_t room = partials.numel() / sums, tiles = (work.tokens + tile - 1) / tile;
  check(room >= 1, "partials must hold at least ", sums, " elements, got ", partials.numel());
  work.tiles_per_block = (tiles + room - 1) / room;
  work.blocks = work.tiles_per_block == 0 ? 0 : (tiles + work.tiles_per_block - 1) / work.tiles_per_block;
  work.partials = mutable_data<double>(partials);
  return work;
}

template <typename T>
constexpr ScalarType scalar_type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

struct Arguments {
  const Tensor &logp, &old_logp, &advantages;
  const std::optional<Tensor>&mask, &weights, &aux, &ref_logp, &entropy, &sequence_ids, &sequence_order,
      &sequence_offsets;
  int64_t num_sequences, rule;
  const std::vector<double>& scalars;
  const std::optional<Tensor>& bounds;
  int64_t aggregation;
  double normalizer;
  const std::optional<Tensor>& normalizer_tensor;
  double kl_coef;
  int64_t kl_estimator;
  double entropy_coef;
  const Tensor &loss, &grad, &grad_entropy, &scale, &stats, &sequences, &partials;
};

template <typename T>
void run(const Arguments& in) {
  check(in.scalars.size() == 8, "scalars must be 8 numbers, got ", in.scalars.size());
  check_buffer(in.loss, scalar_type<T>, 1, "loss");
  check_buffer(in.scale, scalar_type<T>, 1, "scale");
  check_buffer(in.stats, ScalarType::Float, kStats, "stats");
  Work<T> work = make_work<T>(in.logp, in.old_logp, in.advantages, in.mask, in.partials, kSums, kTile);
  work.weights = matrix(in.weights, in.logp, "weights");
  work.aux = matrix(in.aux, in.logp, "aux");
  work.ref_logp = matrix(in.ref_logp, in.logp, "ref_logp");
  work.entropy = matrix(in.entropy, in.logp, "entropy");
  check(in.rule >= 0 && in.rule < kRules, "unknown rule ", in.rule);
  work.rule = static_cast<Rule>(in.rule);
  const auto& p = in.scalars;
  const auto rounded = [&](int64_t i) { return static_cast<T>(p[i]); };
  work.scalars = {rounded(0), rounded(1), rounded(2), rounded(3), rounded(4), rounded(5), rounded(6), rounded(7)};
  if (in.bounds) {
    check_buffer(*in.bounds, ScalarType::Double, 2, "bounds");
    work.bounds = const_data<double>(*in.bounds);
  }
  work.aggregation = static_cast<Aggregation>(in.aggregation);
  work.normalizer = in.normalizer;
  work.normalizer_tensor = device_scalar(in.normalizer_tensor, "normalizer");
  work.kl_coef = static_cast<T>(in.kl_coef);
  work.kl = static_cast<KlEstimator>(in.kl_estimator);
  work.entropy_coef = static_cast<T>(in.entropy_coef);
  work.loss = mutable_data<T>(in.loss);
  work.scale = mutable_data<T>(in.scale);
  work.stats = mutable_data<float>(in.stats);
  if (in.grad.numel() > 0) {
    check_buffer(in.grad, scalar_type<T>, work.tokens, "grad");
    work.grad = mutable_data<T>(in.grad);
  }
  if (in.grad_entropy.numel() > 0) {
    check_buffer(in.grad_entropy, scalar_type<T>, work.tokens, "grad_entropy");
    work.grad_entropy = mutable_data<T>(in.grad_entropy);
  }

  work.num_sequences = in.num_sequences;
  const bool with_sequences = work.aggregation == Aggregation::SEQUENCE_MEAN || needs_sequence(work.rule);
  if (with_sequences && in.sequence_ids) {
    check(in.sequence_order && in.sequence_offsets, "sequence_ids come with sequence_order and sequence_offsets");
    check(work.rows == 1 && in.sequence_ids->dim() == 1 && in.sequence_ids->numel() == work.cols &&
              in.sequence_ids->scalar_type() == ScalarType::Long,
          "sequence_ids must be int64 [", work.cols, "] beside packed input");
    check_buffer(*in.sequence_order, ScalarType::Long, work.cols, "sequence_order");
    check_buffer(*in.sequence_offsets, ScalarType::Long, work.num_sequences + 1, "sequence_offsets");
    work.sequence_ids = const_data<int64_t>(*in.sequence_ids);
    work.sequence_stride = in.sequence_ids->stride(0);
    work.sequence_order = const_data<int64_t>(*in.sequence_order);
    work.sequence_offsets = const_data<int64_t>(*in.sequence_offsets);
  } else if (with_sequences) {
    check(work.num_sequences == work.rows, "num_sequences must be the number of rows, ", work.rows, ", got ",
          work.num_sequences);
  }
  if (with_sequences) {
    check_buffer(in.sequences, ScalarType::Double, work.num_sequences * kSequenceNumbers, "sequences");
    work.sequences = reinterpret_cast<SequenceNumbers*>(mutable_data<double>(in.sequences));
  }

  const Launcher launcher(in.logp);
  if (with_sequences && work.num_sequences > 0)
    launcher.run("sequence_kernel", sequence_kernel<T>, work.num_sequences,
                 sequence_threads(work.tokens / work.num_sequences), work);
  if (work.blocks > 0) launcher.run("token_kernel", token_kernel<T>, work.blocks, kThreads, work);
  launcher.run("finish_kernel", finish_kernel<T>, 1, kFinishThreads, work);
}

void cuda_policy_loss(const Tensor& logp, const Tensor& old_logp, const Tensor& advantages, std::optional<Tensor> mask,
                      std::optional<Tensor> weights, std::optional<Tensor> aux, std::optional<Tensor> ref_logp,
                      std::optional<Tensor> entropy, std::optional<Tensor> sequence_ids,
                      std::optional<Tensor> sequence_order, std::optional<Tensor> sequence_offsets,
                      int64_t num_sequences, int64_t rule, std::vector<double> scalars, std::optional<Tensor> bounds,
                      int64_t aggregation, double normalizer, std::optional<Tensor> normalizer_tensor, double kl_coef,
                      int64_t kl_estimator, double entropy_coef, const Tensor& loss, const Tensor& grad,
                      const Tensor& grad_entropy, const Tensor& scale, const Tensor& stats, const Tensor& sequences,
                      const Tensor& partials) {
  check(logp.dim() == 2, "logp must be [rows, cols]");
  const Arguments in = {logp,
                        old_logp,
                        advantages,
                        mask,
                        weights,
                        aux,
                        ref_logp,
                        entropy,
                        sequence_ids,
                        sequence_order,
                        sequence_offsets,
                        num_sequences,
                        rule,
                        scalars,
                        bounds,
                        aggregation,
                        normalizer,
                        normalizer_tensor,
                        kl_coef,
                        kl_estimator,
                        entropy_coef,
                        loss,
                        grad,
                        grad_entropy,
                        scale,
                        stats,
                        sequences,
                        partials};
  floating_dtype(logp, "logp") == DType::F64 ? run<double>(in) : run<float>(in);
}

template <typename T>
void run_bound_sums(const Tensor& logp, const Tensor& old_logp, const Tensor& advantages,
                    const std::optional<Tensor>& mask, const std::vector<double>& lows,
                    const std::vector<double>& highs, const Tensor& partials, const Tensor& out) {
  Levels<T> levels = {};
  levels.lows = static_cast<int>(lows.size());
  levels.count = static_cast<int>(lows.size() + highs.size());
  check(levels.count >= 1 && levels.count <= kMostLevels, "lows and highs hold ", levels.count,
        " levels; accepted: 1 to ", kMostLevels);
  for (size_t i = 0; i < lows.size(); ++i) levels.bound[i] = static_cast<T>(lows[i]);
  for (size_t i = 0; i < highs.size(); ++i) levels.bound[lows.size() + i] = static_cast<T>(highs[i]);
  check_buffer(out, ScalarType::Double, levels.count, "out");
  const Work<T> work = make_work<T>(logp, old_logp, advantages, mask, partials, levels.count, kThreads);
  const Launcher launcher(logp);
  if (work.blocks > 0) launcher.run("bound_sums_kernel", bound_sums_kernel<T>, work.blocks, kThreads, work, levels);
  launcher.run("bound_fold_kernel", bound_fold_kernel, 1, kFoldThreads, work.partials, work.blocks, levels.count,
               mutable_data<double>(out));
}

void cuda_bound_sums(const Tensor& logp, const Tensor& old_logp, const Tensor& advantages, std::optional<Tensor> mask,
                     std::vector<double> lows, std::vector<double> highs, const Tensor& partials, const Tensor& out) {
  check(logp.dim() == 2, "logp must be [rows, cols]");
  const auto run = floating_dtype(logp, "logp") == DType::F64 ? run_bound_sums<double> : run_bound_sums<float>;
  run(logp, old_logp, advantages, mask, lows, highs, partials, out);
}

}  // namespace
}  // namespace fca

FCA_REGISTER(m) {
  m.impl("cuda_policy_loss", TORCH_BOX(&fca::cuda_policy_loss));
  m.impl("cuda_bound_sums", TORCH_BOX(&fca::cuda_bound_sums));
}
