// The ratio-clip objective on log-probabilities: loss, d loss / d logp and the clip statistics in one pass.
//
// Reads logp, old_logp, advantages (and mask, weights, aux, ref_logp, entropy where given) once, writes the gradient
// once; inputs are [rows, cols] with any strides, so an expanded advantage or a sliced log-prob is never copied.
// Objectives that need a number of the whole sequence first gather it, a sequence at a time (its tokens are then still
// in cache).
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "../check_args.h"
#include "../objective_math.h"
#include "tile.h"

namespace fca {
namespace {

constexpr int64_t kTokens = 256;         // a tile: some twenty arrays of it live in L1 (float) or L2 (double)
constexpr int64_t kUnit = 16 * kTokens;  // the unit of parallel work: a part of a row, or several short rows
static_assert(kTokens % kLanes == 0, "whole groups of lanes");

struct Matrix {
  const char* data = nullptr;
  DType dtype = DType::F32;
  int64_t row_stride = 0, col_stride = 0;
};

Matrix matrix(const std::optional<Tensor>& tensor, const Tensor& like, const char* name) {
  if (!tensor) return {};
  check(tensor->dim() == 2 && tensor->size(0) == like.size(0) && tensor->size(1) == like.size(1), name, " must be [",
        like.size(0), ", ", like.size(1), "]");
  return {static_cast<const char*>(tensor->const_data_ptr()), floating_dtype(*tensor, name), tensor->stride(0),
          tensor->stride(1)};
}

template <typename S, typename T>
void read_tokens_as(const Matrix& m, int64_t row, int64_t col, int64_t n, T* tile) {
  const S* source = reinterpret_cast<const S*>(m.data) + row * m.row_stride + col * m.col_stride;
  if (m.col_stride == 1) return load_tile<T, S>(source, tile, n);
  if (m.col_stride == 0) {
    const T value = load_as<T, S>(*source);
    std::fill(tile, tile + n, value);
    return;
  }
  for (int64_t i = 0; i < n; ++i) tile[i] = load_as<T, S>(source[i * m.col_stride]);
}

// The same from columns in any order.
template <typename S, typename T>
void gather_tokens_as(const Matrix& m, const int64_t* cols, int64_t n, T* tile) {
  const S* source = reinterpret_cast<const S*>(m.data);
  for (int64_t i = 0; i < n; ++i) tile[i] = load_as<T, S>(source[cols[i] * m.col_stride]);
}

// Calls read(S(), target) for the matrix's storage type S; 16-bit storage becomes float first.
template <typename T, typename Read>
void read_dtype(const Matrix& m, int64_t n, T* tile, Read read) {
  switch (m.dtype) {
    case DType::F64:
      return read(double(), tile);
    case DType::F32:
      return read(float(), tile);
    default:
      break;
  }
  float narrow[kTokens];
  float* target = narrow;
  if constexpr (sizeof(T) == 4) target = tile;
  if (m.dtype == DType::BF16) {
    read(BFloat16(), target);
  } else {
    read(Float16(), target);
  }
  if constexpr (sizeof(T) == 8) std::copy(narrow, narrow + n, tile);
}

template <typename T>
void read_tokens(const Matrix& m, int64_t row, int64_t col, int64_t n, T* tile) {
  read_dtype(m, n, tile,
             [&](auto storage, auto* target) { read_tokens_as<decltype(storage)>(m, row, col, n, target); });
}

template <typename T>
void gather_tokens(const Matrix& m, const int64_t* cols, int64_t n, T* tile) {
  read_dtype(m, n, tile, [&](auto storage, auto* target) { gather_tokens_as<decltype(storage)>(m, cols, n, target); });
}

struct Settings {
  Rule rule;
  RuleScalars<double> scalars;
  double kl_coef, entropy_coef;
  double normalizer;  // 0: the count
  KlEstimator kl;
  Aggregation aggregation;

  bool counts_tokens() const { return aggregation == Aggregation::TOKEN_MEAN && !(normalizer > 0); }
};

struct Inputs {
  Matrix logp, old_logp, advantages, weights, aux, ref_logp, entropy;
  const uint8_t* mask = nullptr;  // bytes: a bool tensor viewed from other data may hold more than 0 and 1
  int64_t mask_row = 0, mask_col = 0;
  // Packed layout: one row; the sequence of each token, the tokens sorted by sequence, where each sequence starts
  // there.
  const int64_t* sequence_ids = nullptr;
  int64_t sequence_stride = 1;
  const int64_t* order = nullptr;
  const int64_t* offsets = nullptr;
  int64_t rows = 0, cols = 0;
};

// One tile of tokens in the arithmetic type. Past its tokens, up to whole groups of lanes, lie masked ones.
template <typename T>
struct Tokens {
  uint8_t mask[kTokens];  // 0: left out
  T logp[kTokens], old_logp[kTokens], A[kTokens], w[kTokens], aux[kTokens], ref[kTokens], H[kTokens];
  T D[kTokens], valid[kTokens], bad[kTokens];  // valid: unmasked and finite; bad: unmasked and not finite
  T a[kTokens];                                // aggregation weight
  T s[kTokens], pull[kTokens];                 // of the sequence, where the rule has one: log-ratio, share of gradient
  T r[kTokens], loss[kTokens], grad[kTokens], grad_entropy[kTokens];
  T total[kTokens], suppressed[kTokens], kept[kTokens], k2[kTokens], k3[kTokens];

  Tokens() {  // what a call without weights, sequences, mask, ... never writes
    std::fill_n(mask, kTokens, uint8_t(1));
    for (T* ones : {w, a}) std::fill_n(ones, kTokens, T(1));
    for (T* zeros : {aux, ref, H, s, pull}) std::fill_n(zeros, kTokens, T(0));
  }
};

inline int64_t whole_groups(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// D, valid and bad. A token counts as unreadable if any of its inputs, or D itself, is not finite. EXTRAS: there are
// inputs beside logp, old_logp and A.
template <typename T, bool EXTRAS>
FCA_INLINE void classify_tile_body(Tokens<T>& t, const T* new_logp, const T* old_logp, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T logp = new_logp[i], A = t.A[i], d = logp - old_logp[i];
    // x - x is 0 for a finite x, else NaN; logp is in d, which is finite only if it is.
    T zero = (d - d) + (A - A);
    if (EXTRAS) {
      const T w = t.w[i], aux = t.aux[i], x = t.ref[i] - logp, H = t.H[i];
      zero = zero + (w - w) + (x - x) + (aux - aux) + (H - H);
    }
    const T unmasked = mask<T>(t.mask[i] != 0), valid = select(zero == T(0), unmasked, T(0));
    const bool used = valid != T(0);
    t.bad[i] = unmasked - valid;
    t.valid[i] = valid;
    t.D[i] = select(used, saturate(d), T(0));
    t.A[i] = select(used, A, T(0));
    t.logp[i] = select(used, logp, T(0));
    if (EXTRAS) {
      t.w[i] = select(used, t.w[i], T(0));
      t.aux[i] = select(used, t.aux[i], T(0));
      t.ref[i] = select(used, t.ref[i], T(0));
      t.H[i] = select(used, t.H[i], T(0));
    }
  }
}
FCA_LEAF((typename T, bool EXTRAS), (T, EXTRAS), void, classify_tile,
         (Tokens<T> & t, const T* new_logp, const T* old_logp, int64_t n), (t, new_logp, old_logp, n))

// What a unit sums, in lanes: token i of a tile goes to lane i % kLanes, and the lanes are folded once a unit. Counts
// stay in the arithmetic type, in which a lane of a unit counts exactly.
enum LaneSum : int {
  SUM_SUPPRESSED,
  SUM_TOTAL,
  SUM_LOG_RATIO,
  SUM_K2,
  SUM_K3,
  SUM_RATIO,
  SUM_RATIO_SQ,
  SUM_LOSS,
  kLaneSums
};
enum LaneCount : int { COUNT_TOKENS, COUNT_LOW, COUNT_HIGH, COUNT_DUAL, COUNT_BAD, kLaneCounts };

template <typename T>
struct Lanes {
  double sum[kLaneSums][kLanes];
  T count[kLaneCounts][kLanes], least[kLanes], greatest[kLanes];

  void clear() {
    std::fill_n(&sum[0][0], kLaneSums * kLanes, 0.0);
    std::fill_n(&count[0][0], kLaneCounts * kLanes, T(0));
    std::fill_n(least, kLanes, std::numeric_limits<T>::max());
    std::fill_n(greatest, kLanes, T(0));
  }
};

// Where a token's loss and gradient saturate: times 1 / normalizer they must still be finite.
template <typename T>
FCA_INLINE T token_limit(const Settings& settings) {
  const double shrink = settings.normalizer > 0 && settings.normalizer < 1 ? settings.normalizer : 1.0;
  return static_cast<T>(saturation(T()) * shrink);
}

template <typename T>
FCA_INLINE RuleScalars<T> rule_scalars(const Settings& settings) {
  const RuleScalars<double>& p = settings.scalars;
  return {static_cast<T>(p.low), static_cast<T>(p.high), static_cast<T>(p.dual), static_cast<T>(p.cap),
          static_cast<T>(p.a),   static_cast<T>(p.b),    static_cast<T>(p.c),    static_cast<T>(p.d)};
}

// What the tokens' sequences sum, into `grad`.
template <typename T, Rule RULE>
FCA_INLINE void sequence_term_tile_body(Tokens<T>& t, const Settings& settings, int64_t n) {
  const RuleScalars<T> p = rule_scalars<T>(settings);
  for (int64_t i = 0; i < n; ++i) t.grad[i] = t.valid[i] * sequence_term<T, RULE>(t.D[i], t.A[i], t.aux[i], p);
}
FCA_LEAF((typename T, Rule RULE), (T, RULE), void, sequence_term_tile,
         (Tokens<T> & t, const Settings& settings, int64_t n), (t, settings, n))

// The tokens' parts of their sequence's gradient, into `grad`.
template <typename T, Rule RULE>
FCA_INLINE void sequence_pull_tile_body(Tokens<T>& t, const Settings& settings, int64_t n) {
  const RuleScalars<T> p = rule_scalars<T>(settings);
  const T limit = token_limit<T>(settings);
  for (int64_t i = 0; i < n; ++i) {
    const T r = exp_clamped(clamp_log_ratio(t.s[i]));
    const Token<T> out = token<T, RULE>({r, t.D[i], t.A[i], t.logp[i], t.aux[i], t.s[i]}, p);
    t.grad[i] = saturate(t.a[i] * t.valid[i] * t.w[i] * saturate(out.grad), limit);
  }
}
FCA_LEAF((typename T, Rule RULE), (T, RULE), void, sequence_pull_tile,
         (Tokens<T> & t, const Settings& settings, int64_t n), (t, settings, n))

// The ratio of the rule, and what of k3 the statistics sum. A loop of its own: the processor keeps more of its short
// chains in flight than of one long one.
template <typename T, bool OF_SEQUENCE>
FCA_INLINE void ratio_tile_body(Tokens<T>& __restrict t, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const RatioParts<T> of_token = ratio_parts(t.D[i]);
    t.k3[i] = of_token.beyond_linear * t.valid[i];
    t.r[i] = OF_SEQUENCE ? exp_clamped(clamp_log_ratio(t.s[i])) : of_token.ratio;
  }
}
FCA_LEAF((typename T, bool OF_SEQUENCE), (T, OF_SEQUENCE), void, ratio_tile, (Tokens<T> & t, int64_t n), (t, n))

template <typename T>
FCA_INLINE void scale_tile_body(const T* __restrict tile, T factor, T* __restrict target, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] = tile[i] * factor;
}
FCA_LEAF((typename T), (T), void, scale_tile, (const T* tile, T factor, T* target, int64_t n),
         (tile, factor, target, n))

// How many of n bytes are not 0.
template <typename Byte>
FCA_INLINE int64_t count_mask_body(const Byte* mask, int64_t n) {
  constexpr int64_t kBlock = 1 << 16;  // counted in 32 bits, of which a vector holds more
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    int32_t of_block = 0;
    for (int64_t i = begin; i < end; ++i) of_block += mask[i] != 0;
    count += of_block;
  }
  return count;
}
FCA_LEAF((typename Byte), (Byte), int64_t, count_mask, (const Byte* mask, int64_t n), (mask, n))

// The token equations, their aggregation weight and what the statistics sum: counts and range at once, the others as
// arrays. `n`: in whole groups. `r` becomes 0 where a token is left out.
template <typename T, Rule RULE>
FCA_INLINE void token_tile_body(Tokens<T>& __restrict t, Lanes<T>& __restrict lanes, const Settings& settings,
                                int64_t n) {
  const RuleScalars<T> p = rule_scalars<T>(settings);
  const T limit = token_limit<T>(settings);
  for (int64_t group = 0; group < n; group += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const int64_t i = group + j;
      const T D = t.D[i], A = t.A[i], valid = t.valid[i], r = t.r[i];
      const Token<T> out = token<T, RULE>({r, D, A, t.logp[i], t.aux[i], t.s[i]}, p);
      const T a = t.a[i] * valid, aw = a * t.w[i];
      t.loss[i] = saturate(aw * saturate(out.loss), limit);
      t.grad[i] = has_sequence_ratio(RULE) ? t.pull[i] * (valid * out.keep) : saturate(aw * saturate(out.grad), limit);
      const T mass = at_most(a * r * std::fabs(A)), kept = valid * r;
      t.total[i] = mass;
      t.suppressed[i] = select(out.grad * out.keep == T(0), mass, T(0));
      t.k2[i] = at_most(T(0.5) * D * D);
      t.kept[i] = kept;
      lanes.count[COUNT_TOKENS][j] += valid;
      lanes.count[COUNT_LOW][j] += out.clipped_low * valid;
      lanes.count[COUNT_HIGH][j] += out.clipped_high * valid;
      lanes.count[COUNT_DUAL][j] += out.clipped_dual * valid;
      lanes.count[COUNT_BAD][j] += t.bad[i];
      const T least = select(valid != T(0), r, std::numeric_limits<T>::max());
      lanes.least[j] = select(least < lanes.least[j], least, lanes.least[j]);
      lanes.greatest[j] = select(kept > lanes.greatest[j], kept, lanes.greatest[j]);
    }
  }
}
FCA_LEAF((typename T, Rule RULE), (T, RULE), void, token_tile,
         (Tokens<T> & t, Lanes<T>& lanes, const Settings& settings, int64_t n), (t, lanes, settings, n))

// Adds x and y to their lanes in float64: two at a time, since a lone sum waits for the addition before. SQUARE: y =
// x^2.
template <typename T, bool SQUARE>
FCA_INLINE void add_two(const T* __restrict x, const T* __restrict y, double* __restrict to_x, double* __restrict to_y,
                        int64_t n) {
  double sum_x[kLanes], sum_y[kLanes];
  std::copy_n(to_x, kLanes, sum_x);
  std::copy_n(to_y, kLanes, sum_y);
  for (int64_t group = 0; group < n; group += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const double value = static_cast<double>(x[group + j]);
      sum_x[j] += value;
      sum_y[j] += SQUARE ? value * value : static_cast<double>(y[group + j]);
    }
  }
  std::copy_n(sum_x, kLanes, to_x);
  std::copy_n(sum_y, kLanes, to_y);
}

// All sums of a tile, once its losses are complete.
template <typename T>
FCA_INLINE void sum_into_lanes_body(const Tokens<T>& t, Lanes<T>& lanes, int64_t n) {
  auto& sum = lanes.sum;
  add_two<T, false>(t.total, t.suppressed, sum[SUM_TOTAL], sum[SUM_SUPPRESSED], n);
  add_two<T, false>(t.D, t.k2, sum[SUM_LOG_RATIO], sum[SUM_K2], n);
  add_two<T, false>(t.k3, t.loss, sum[SUM_K3], sum[SUM_LOSS], n);
  add_two<T, true>(t.kept, t.kept, sum[SUM_RATIO], sum[SUM_RATIO_SQ], n);
}
FCA_LEAF((typename T), (T), void, sum_into_lanes, (const Tokens<T>& t, Lanes<T>& lanes, int64_t n), (t, lanes, n))

// The KL term is added to what the tile holds; it takes the aggregation weight but not the rollout weight w.
template <typename T, KlEstimator KL>
FCA_INLINE void add_kl_tile_body(Tokens<T>& t, const Settings& settings, int64_t n) {
  const T kl_coef = static_cast<T>(settings.kl_coef), limit = token_limit<T>(settings);
  for (int64_t i = 0; i < n; ++i) {
    T value, grad;
    kl_token<T, KL>(t.logp[i] - t.ref[i], value, grad);
    const T a = t.a[i] * t.valid[i] * kl_coef;
    t.loss[i] = saturate(t.loss[i] + saturate(a * saturate(value)), limit);
    t.grad[i] = saturate(t.grad[i] + saturate(a * saturate(grad)), limit);
  }
}
FCA_LEAF((typename T, KlEstimator KL), (T, KL), void, add_kl_tile, (Tokens<T> & t, const Settings& settings, int64_t n),
         (t, settings, n))

template <typename T>
void add_kl(Tokens<T>& t, const Settings& settings, int64_t n) {
  switch (settings.kl) {
    case KlEstimator::K1:
      return add_kl_tile<T, KlEstimator::K1>(t, settings, n);
    case KlEstimator::K2:
      return add_kl_tile<T, KlEstimator::K2>(t, settings, n);
    case KlEstimator::K3:
      return add_kl_tile<T, KlEstimator::K3>(t, settings, n);
    case KlEstimator::K3_PLUS:
      return add_kl_tile<T, KlEstimator::K3_PLUS>(t, settings, n);
    case KlEstimator::NONE:
      return;
  }
}

// The entropy bonus, as the KL term; its gradient with respect to the entropy goes to `grad_entropy`.
template <typename T>
FCA_INLINE void add_entropy_tile_body(Tokens<T>& t, const Settings& settings, int64_t n) {
  const T coef = static_cast<T>(settings.entropy_coef), limit = token_limit<T>(settings);
  for (int64_t i = 0; i < n; ++i) {
    t.grad_entropy[i] = -coef * (t.a[i] * t.valid[i]);
    t.loss[i] = saturate(t.loss[i] + saturate(t.grad_entropy[i] * saturate(t.H[i])), limit);
  }
}
FCA_LEAF((typename T), (T), void, add_entropy_tile, (Tokens<T> & t, const Settings& settings, int64_t n),
         (t, settings, n))

// BAPO's balance: max(r, low) |A| of losses or min(r, high) A of gains.
template <typename T, bool HIGH>
FCA_INLINE void bound_tile_body(const Tokens<T>& t, T bound, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T r = t.r[i], A = t.A[i];
    const T gain = select(A > T(0), A, T(0)), harm = select(A < T(0), -A, T(0));
    out[i] = HIGH ? saturate(select(r > bound, bound, r) * gain) : saturate(select(r < bound, bound, r) * harm);
  }
}
FCA_LEAF((typename T, bool HIGH), (T, HIGH), void, bound_tile, (const Tokens<T>& t, T bound, T* out, int64_t n),
         (t, bound, out, n))

template <Rule RULE>
using RuleTag = std::integral_constant<Rule, RULE>;

// Calls the function with the rule as a compile-time constant: the only place that goes from number to template.
template <typename F>
void with_rule(Rule rule, F function) {
  switch (rule) {
#define FCA_CASE(NAME) \
  case Rule::NAME:     \
    return function(RuleTag<Rule::NAME>());
    FCA_CASE(PPO)
    FCA_CASE(CISPO)
    FCA_CASE(SAPO)
    FCA_CASE(GPG)
    FCA_CASE(DRO)
    FCA_CASE(DPPO_TV)
    FCA_CASE(DPPO_KL)
    FCA_CASE(GPPO)
    FCA_CASE(DCPO)
    FCA_CASE(ASPO)
    FCA_CASE(PPO_EWMA)
    FCA_CASE(KL_COV)
    FCA_CASE(CLIP_COV)
    FCA_CASE(VESPO)
    FCA_CASE(GSPO)
    FCA_CASE(GMPO)
#undef FCA_CASE
  }
}

// Reading the tokens of a call, in tiles; always with the same scratch, whose absent inputs keep their defaults.
template <typename T>
class Reader {
 public:
  explicit Reader(const Inputs& inputs)
      : in_(inputs), extras_(in_.weights.data || in_.aux.data || in_.ref_logp.data || in_.entropy.data) {}

  void read(Tokens<T>& t, int64_t row, int64_t col, int64_t n) const {
    const auto matrix = [&](const Matrix& m, T* tile) { read_tokens(m, row, col, n, tile); };
    const T* const new_logp = in_place(in_.logp, row, col, n);
    const T* const old_logp = in_place(in_.old_logp, row, col, n);
    if (new_logp == nullptr) matrix(in_.logp, t.logp);
    if (old_logp == nullptr) matrix(in_.old_logp, t.old_logp);
    load(t, n, matrix);
    if (in_.mask != nullptr) {
      const uint8_t* const mask = in_.mask + row * in_.mask_row + col * in_.mask_col;
      if (in_.mask_col == 1) {
        std::memcpy(t.mask, mask, n);
      } else {
        for (int64_t i = 0; i < n; ++i) t.mask[i] = mask[i * in_.mask_col];
      }
    }
    classify(t, new_logp == nullptr ? t.logp : new_logp, old_logp == nullptr ? t.old_logp : old_logp, n);
  }

  // Tokens of a packed row by their columns; consecutive ones, as a sorted packing has, are read as such.
  void gather(Tokens<T>& t, const int64_t* cols, int64_t n) const {
    if (cols[n - 1] - cols[0] == n - 1) return read(t, 0, cols[0], n);
    const auto matrix = [&](const Matrix& m, T* tile) { gather_tokens(m, cols, n, tile); };
    matrix(in_.logp, t.logp);
    matrix(in_.old_logp, t.old_logp);
    load(t, n, matrix);
    for (int64_t i = 0; in_.mask && i < n; ++i) t.mask[i] = in_.mask[cols[i] * in_.mask_col];
    classify(t, t.logp, t.old_logp, n);
  }

 private:
  // Where a matrix is a tile already: in the arithmetic type, contiguous, and in whole groups. Else null.
  static const T* in_place(const Matrix& m, int64_t row, int64_t col, int64_t n) {
    const bool direct = m.dtype == (sizeof(T) == 8 ? DType::F64 : DType::F32) && m.col_stride == 1 && n % kLanes == 0;
    return direct ? reinterpret_cast<const T*>(m.data) + row * m.row_stride + col : nullptr;
  }

  // All but the log-probabilities.
  template <typename Load>
  void load(Tokens<T>& t, int64_t n, Load matrix) const {
    matrix(in_.advantages, t.A);
    if (!extras_) return;
    optional(in_.weights, t.w, T(1), n, matrix);
    optional(in_.aux, t.aux, T(0), n, matrix);
    optional(in_.ref_logp, t.ref, T(0), n, matrix);
    optional(in_.entropy, t.H, T(0), n, matrix);
  }

  template <typename Load>
  static void optional(const Matrix& m, T* tile, T absent, int64_t n, Load matrix) {
    if (m.data) {
      matrix(m, tile);
    } else {
      std::fill_n(tile, n, absent);
    }
  }

  void classify(Tokens<T>& t, const T* new_logp, const T* old_logp, int64_t n) const {
    const int64_t padded = whole_groups(n);
    if (in_.mask == nullptr) std::fill_n(t.mask, n, uint8_t(1));
    std::fill_n(t.mask + n, padded - n, uint8_t(0));
    extras_ ? classify_tile<T, true>(t, new_logp, old_logp, padded)
            : classify_tile<T, false>(t, new_logp, old_logp, padded);
  }

  const Inputs& in_;
  const bool extras_;
};

// Columns [begin, end) of rows [first_row, last_row).
struct Unit {
  int64_t first_row, last_row, begin, end;
};

std::vector<Unit> units_of(const Inputs& in) {
  std::vector<Unit> units;
  const int64_t rows = std::max<int64_t>(1, kUnit / std::max<int64_t>(1, in.cols));
  for (int64_t row = 0; row < in.rows; row += rows) {
    for (int64_t begin = 0; begin < in.cols; begin += kUnit)
      units.push_back({row, std::min(row + rows, in.rows), begin, std::min(begin + kUnit, in.cols)});
  }
  return units;
}

// Calls visit(row, col, n) on each tile of a unit.
template <typename Visit>
void visit_unit(const Unit& unit, Visit visit) {
  for (int64_t row = unit.first_row; row < unit.last_row; ++row) {
    for (int64_t col = unit.begin; col < unit.end; col += kTokens) visit(row, col, std::min(kTokens, unit.end - col));
  }
}

int64_t grain(int64_t tokens_each) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, tokens_each)); }

template <typename T>
class Objective {
 public:
  Objective(const Inputs& inputs, const Settings& settings, int64_t sequences)
      : in_(inputs), set_(settings), reader_(inputs), sequences_(sequences), units_(units_of(inputs)) {
    partial_.assign(units_.size() * (kStats + 1), 0.0);
  }

  // Two units are work enough for a thread. Returns the loss sum; `grad` and `grad_entropy` (may be null) receive the
  // gradients times `factor`, `stats` the sums.
  double run(double factor, T* grad, T* grad_entropy, double* stats) {
    with_rule(set_.rule, [&](auto rule) {
      constexpr Rule RULE = decltype(rule)::value;
      if (needs_sequence(RULE) || set_.aggregation == Aggregation::SEQUENCE_MEAN) {
        length_.assign(sequences_, 1.0);
        log_ratio_.assign(sequences_, 0.0);
        pull_.assign(sequences_, 0.0);
        torch::stable::parallel_for(0, sequences_,
                                    grain(in_.offsets ? in_.cols / std::max<int64_t>(1, sequences_) : in_.cols),
                                    [&](int64_t first, int64_t last) {
                                      std::vector<Tokens<T>> scratch(1);
                                      for (int64_t k = first; k < last; ++k)
                                        sequence_pass<RULE>(scratch[0], k, grad != nullptr);
                                    });
      }
      torch::stable::parallel_for(0, static_cast<int64_t>(units_.size()), 2, [&](int64_t first, int64_t last) {
        std::vector<Tokens<T>> scratch(1);
        std::vector<Lanes<T>> lanes(1);
        for (int64_t u = first; u < last; ++u)
          token_pass<RULE>(scratch[0], lanes[0], u, static_cast<T>(factor), grad, grad_entropy);
      });
    });
    return fold(stats);
  }

 private:
  // Calls `visit` on each tile of a sequence.
  template <typename Visit>
  void visit_sequence(Tokens<T>& t, int64_t sequence, Visit visit) const {
    const int64_t begin = in_.offsets ? in_.offsets[sequence] : 0,
                  end = in_.offsets ? in_.offsets[sequence + 1] : in_.cols;
    for (int64_t i = begin; i < end; i += kTokens) {
      const int64_t n = std::min(kTokens, end - i);
      if (in_.offsets) {
        reader_.gather(t, in_.order + i, n);
      } else {
        reader_.read(t, sequence, i, n);
      }
      visit(n);
    }
  }

  T weight_of(int64_t sequence) const {
    return set_.aggregation == Aggregation::SEQUENCE_MEAN ? static_cast<T>(1.0 / length_[sequence]) : T(1);
  }

  template <Rule RULE>
  void sequence_pass(Tokens<T>& t, int64_t sequence, bool want_pull) {
    double count = 0, sum = 0;
    visit_sequence(t, sequence, [&](int64_t n) {
      count += sum_tile<T>(t.valid, n);
      if (!needs_sequence(RULE)) return;
      sequence_term_tile<T, RULE>(t, set_, n);
      sum += sum_tile<T>(t.grad, n);
    });
    length_[sequence] = std::max(count, 1.0);
    log_ratio_[sequence] = has_sequence_ratio(RULE) ? sum / length_[sequence] : sum;
    if constexpr (has_sequence_ratio(RULE)) {
      if (!want_pull) return;
      std::fill_n(t.s, kTokens, static_cast<T>(log_ratio_[sequence]));
      std::fill_n(t.a, kTokens, weight_of(sequence));
      double pull = 0;
      visit_sequence(t, sequence, [&](int64_t n) {
        sequence_pull_tile<T, RULE>(t, set_, n);
        pull += sum_tile<T>(t.grad, n);
      });
      pull_[sequence] = pull / length_[sequence];
    }
  }

  void sequence_scalars(Tokens<T>& t, int64_t row, int64_t col, int64_t n) const {
    if (length_.empty()) return;  // the aggregation weight is 1, and no rule reads of a sequence
    for (int64_t i = 0; i < n; ++i) {
      const int64_t sequence = in_.sequence_ids ? in_.sequence_ids[(col + i) * in_.sequence_stride] : row;
      t.a[i] = weight_of(sequence);
      t.s[i] = static_cast<T>(log_ratio_[sequence]);
      t.pull[i] = static_cast<T>(pull_[sequence]);
    }
  }

  template <Rule RULE>
  void token_pass(Tokens<T>& t, Lanes<T>& lanes, int64_t u, T factor, T* grad, T* grad_entropy) {
    lanes.clear();
    visit_unit(units_[u], [&](int64_t row, int64_t col, int64_t n) {
      reader_.read(t, row, col, n);
      sequence_scalars(t, row, col, n);
      const int64_t padded = whole_groups(n);
      ratio_tile<T, has_sequence_ratio(RULE)>(t, padded);
      token_tile<T, RULE>(t, lanes, set_, padded);
      if (in_.ref_logp.data) add_kl(t, set_, padded);
      if (in_.entropy.data) add_entropy_tile<T>(t, set_, padded);
      sum_into_lanes<T>(t, lanes, padded);
      const int64_t at = row * in_.cols + col;
      if (grad) scale_tile(t.grad, factor, grad + at, n);
      if (grad_entropy) scale_tile(t.grad_entropy, factor, grad_entropy + at, n);
    });
    fold_unit(lanes, partial_.data() + u * (kStats + 1));
  }

  static void fold_unit(const Lanes<T>& lanes, double* sum) {
    constexpr Stat kSumOf[kLaneSums] = {SUPPRESSED_MASS, TOTAL_MASS, KL_K1,        KL_K2,
                                        KL_K3,           RATIO_SUM,  RATIO_SQ_SUM, kStats};  // the loss comes last
    constexpr Stat kCountOf[kLaneCounts] = {TOKENS, CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_DUAL, NONFINITE};
    for (int k = 0; k < kLaneSums; ++k) sum[kSumOf[k]] = fold_lanes(lanes.sum[k]);
    sum[KL_K1] = -sum[KL_K1];
    for (int k = 0; k < kLaneCounts; ++k) sum[kCountOf[k]] = sum_tile<T>(lanes.count[k], kLanes);
    sum[RATIO_MIN] = *std::min_element(lanes.least, lanes.least + kLanes);
    sum[RATIO_MAX] = *std::max_element(lanes.greatest, lanes.greatest + kLanes);
  }

  double fold(double* stats) const {
    for (int64_t k = 0; k < kStats; ++k) stats[k] = 0;
    stats[RATIO_MIN] = std::numeric_limits<float>::max();
    double loss = 0;
    for (size_t u = 0; u < units_.size(); ++u) {
      const double* sum = partial_.data() + u * (kStats + 1);
      for (int64_t k = 0; k < kStats; ++k) {
        if (k == RATIO_MIN)
          stats[k] = std::min(stats[k], sum[k]);
        else if (k == RATIO_MAX)
          stats[k] = std::max(stats[k], sum[k]);
        else
          stats[k] += sum[k];
      }
      loss += sum[kStats];
    }
    return loss;
  }

  const Inputs& in_;
  const Settings& set_;
  const Reader<T> reader_;
  const int64_t sequences_;
  std::vector<double> length_, log_ratio_, pull_;  // of each sequence; empty where no one reads them
  const std::vector<Unit> units_;
  std::vector<double> partial_;
};

int64_t unmasked(const Inputs& in) {
  if (in.mask == nullptr) return in.rows * in.cols;
  std::vector<int64_t> of_row(in.rows, 0);
  torch::stable::parallel_for(0, in.rows, grain(in.cols / 16), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const uint8_t* const mask = in.mask + row * in.mask_row;
      if (in.mask_col == 1) {
        of_row[row] = count_mask(mask, in.cols);
      } else {
        for (int64_t col = 0; col < in.cols; ++col) of_row[row] += mask[col * in.mask_col] != 0;
      }
    }
  });
  return std::accumulate(of_row.begin(), of_row.end(), int64_t(0));
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Results run(const Inputs& in, const Settings& settings, int64_t sequences, bool want_grad) {
  constexpr ScalarType dtype = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const bool want_entropy = want_grad && in.entropy.data != nullptr;
  Tensor grad = torch::stable::empty({want_grad ? in.rows : 0, want_grad ? in.cols : 0}, dtype);
  Tensor grad_entropy = torch::stable::empty({want_entropy ? in.rows : 0, want_entropy ? in.cols : 0}, dtype);
  Tensor loss = torch::stable::empty({}, dtype), scale = torch::stable::empty({}, dtype);
  Tensor stats = torch::stable::empty({kStats}, ScalarType::Float);

  Objective<T> objective(in, settings, sequences);
  double counted = static_cast<double>(settings.counts_tokens() ? unmasked(in) : sequences), factor, total;
  double sums[kStats];
  while (true) {  // twice where tokens turn out not to be finite: then there are fewer than the mask says
    factor = 1.0 / (settings.normalizer > 0 ? settings.normalizer : std::max(counted, 1.0));
    total = objective.run(factor, want_grad ? mutable_data<T>(grad) : nullptr,
                          want_entropy ? mutable_data<T>(grad_entropy) : nullptr, sums);
    if (!settings.counts_tokens() || sums[TOKENS] == counted) break;
    counted = sums[TOKENS];
  }
  sums[SUPPRESSED_MASS] *= factor;
  sums[TOTAL_MASS] *= factor;
  const double most = std::numeric_limits<float>::max();
  for (int64_t k = 0; k < kStats; ++k) {
    mutable_data<float>(stats)[k] = static_cast<float>(std::clamp(sums[k], -most, most));
  }
  const double bound = static_cast<double>(std::numeric_limits<T>::max());
  *mutable_data<T>(loss) = static_cast<T>(std::clamp(total * factor, -bound, bound));
  *mutable_data<T>(scale) = T(1);  // the gradients have it already
  return {loss, grad, grad_entropy, scale, stats};
}

void set_mask(Inputs& in, const std::optional<Tensor>& mask) {
  if (!mask) return;
  check(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
  check(mask->dim() == 2 && mask->size(0) == in.rows && mask->size(1) == in.cols, "mask must be [", in.rows, ", ",
        in.cols, "]");
  in.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  in.mask_row = mask->stride(0);
  in.mask_col = mask->stride(1);
}

void set_sequences(Inputs& in, const std::optional<Tensor>& ids, const std::optional<Tensor>& order,
                   const std::optional<Tensor>& offsets, int64_t num_sequences) {
  if (!ids) return;
  check(in.rows == 1 && order && offsets, "sequence_ids need packed input, sequence_order and sequence_offsets");
  check(ids->scalar_type() == ScalarType::Long && ids->dim() == 1 && ids->numel() == in.cols,
        "sequence_ids must be int64 [", in.cols, "] beside packed input");
  check_buffer(*order, ScalarType::Long, in.cols, "sequence_order");
  check_buffer(*offsets, ScalarType::Long, num_sequences + 1, "sequence_offsets");
  in.sequence_ids = static_cast<const int64_t*>(ids->const_data_ptr());
  in.sequence_stride = ids->stride(0);
  in.order = const_data<int64_t>(*order);
  in.offsets = const_data<int64_t>(*offsets);
  for (int64_t i = 0; i < in.cols; ++i) {
    const int64_t id = in.sequence_ids[i * in.sequence_stride];
    check(id >= 0 && id < num_sequences, "sequence_ids[", i, "] is ", id, "; accepted: 0 to ", num_sequences - 1);
  }
}

double number_in(const Tensor& tensor) {
  const DType dtype = floating_dtype(tensor, "normalizer");
  check(tensor.numel() == 1 && (dtype == DType::F64 || dtype == DType::F32),
        "normalizer must be one float32 or float64");
  return dtype == DType::F64 ? *const_data<double>(tensor) : static_cast<double>(*const_data<float>(tensor));
}

Results policy_loss(const Tensor& logp, const Tensor& old_logp, const Tensor& advantages, std::optional<Tensor> mask,
                    std::optional<Tensor> weights, std::optional<Tensor> aux, std::optional<Tensor> ref_logp,
                    std::optional<Tensor> entropy, std::optional<Tensor> sequence_ids,
                    std::optional<Tensor> sequence_order, std::optional<Tensor> sequence_offsets, int64_t num_sequences,
                    int64_t rule, std::vector<double> scalars, std::optional<Tensor> bounds, int64_t aggregation,
                    double normalizer, std::optional<Tensor> normalizer_tensor, double kl_coef, int64_t kl_estimator,
                    double entropy_coef, bool want_grad) {
  check(logp.dim() == 2, "logp must be [rows, cols]");
  check(rule >= 0 && rule < kRules, "rule is ", rule, "; accepted: 0 to ", kRules - 1);
  check(aggregation >= 0 && aggregation <= 3, "aggregation is ", aggregation, "; accepted: 0 to 3");
  check(kl_estimator >= 0 && kl_estimator <= 4, "kl_estimator is ", kl_estimator, "; accepted: 0 to 4");
  check(scalars.size() == 8, "scalars must be 8 numbers, got ", scalars.size());
  Inputs in;
  in.rows = logp.size(0);
  in.cols = logp.size(1);
  in.logp = matrix(logp, logp, "logp");
  in.old_logp = matrix(old_logp, logp, "old_logp");
  in.advantages = matrix(advantages, logp, "advantages");
  in.weights = matrix(weights, logp, "weights");
  in.aux = matrix(aux, logp, "aux");
  in.ref_logp = matrix(ref_logp, logp, "ref_logp");
  in.entropy = matrix(entropy, logp, "entropy");
  set_mask(in, mask);
  set_sequences(in, sequence_ids, sequence_order, sequence_offsets, num_sequences);
  if (bounds) {
    check_buffer(*bounds, ScalarType::Double, 2, "bounds");
    scalars[0] = const_data<double>(*bounds)[0];
    scalars[1] = const_data<double>(*bounds)[1];
  }
  const Settings settings = {
      static_cast<Rule>(rule),
      {scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5], scalars[6], scalars[7]},
      kl_coef,
      entropy_coef,
      normalizer_tensor ? number_in(*normalizer_tensor) : normalizer,
      static_cast<KlEstimator>(kl_estimator),
      static_cast<Aggregation>(aggregation)};
  return in.logp.dtype == DType::F64 ? run<double>(in, settings, num_sequences, want_grad)
                                     : run<float>(in, settings, num_sequences, want_grad);
}

template <typename T>
void add_bound_sums(const Inputs& in, const std::vector<double>& lows, const std::vector<double>& highs, double* out) {
  const Reader<T> reader(in);
  const std::vector<Unit> units = units_of(in);
  const int64_t low_count = static_cast<int64_t>(lows.size()), count = low_count + static_cast<int64_t>(highs.size());
  std::vector<double> partial(units.size() * count, 0.0);
  torch::stable::parallel_for(0, static_cast<int64_t>(units.size()), 2, [&](int64_t first, int64_t last) {
    std::vector<Tokens<T>> scratch(1);
    Tokens<T>& t = scratch[0];
    for (int64_t u = first; u < last; ++u) {
      visit_unit(units[u], [&](int64_t row, int64_t col, int64_t n) {
        reader.read(t, row, col, n);
        ratio_tile<T, false>(t, n);
        for (int64_t k = 0; k < count; ++k) {
          if (k < low_count) {
            bound_tile<T, false>(t, static_cast<T>(lows[k]), t.loss, n);
          } else {
            bound_tile<T, true>(t, static_cast<T>(highs[k - low_count]), t.loss, n);
          }
          partial[u * count + k] += sum_tile<T>(t.loss, n);
        }
      });
    }
  });
  for (size_t i = 0; i < partial.size(); ++i) out[i % count] += partial[i];
}

Tensor bound_sums(const Tensor& logp, const Tensor& old_logp, const Tensor& advantages, std::optional<Tensor> mask,
                  std::vector<double> lows, std::vector<double> highs) {
  check(logp.dim() == 2, "logp must be [rows, cols]");
  Inputs in;
  in.rows = logp.size(0);
  in.cols = logp.size(1);
  in.logp = matrix(logp, logp, "logp");
  in.old_logp = matrix(old_logp, logp, "old_logp");
  in.advantages = matrix(advantages, logp, "advantages");
  set_mask(in, mask);
  const int64_t count = static_cast<int64_t>(lows.size() + highs.size());
  Tensor out = torch::stable::empty({count}, ScalarType::Double);
  double* sums = mutable_data<double>(out);
  std::fill_n(sums, count, 0.0);
  if (in.logp.dtype == DType::F64) {
    add_bound_sums<double>(in, lows, highs, sums);
  } else {
    add_bound_sums<float>(in, lows, highs, sums);
  }
  return out;
}

}  // namespace
}  // namespace fca

STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, CPU, m) {
  m.impl("policy_loss", TORCH_BOX(&fca::policy_loss));
  m.impl("bound_sums", TORCH_BOX(&fca::bound_sums));
}
