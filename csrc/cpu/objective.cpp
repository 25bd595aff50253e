// The ratio-clip objective on log-probabilities: loss, d loss / d logp and the clip statistics in one pass.
//
// Reads logp, old_logp, advantages (and mask, weights, ref_logp where given) once, writes the gradient once; inputs are
// [rows, cols] with any strides, so an expanded advantage or a sliced log-prob is never copied. Objectives that need
// a sequence's length or mean log-ratio first gather them (the row is then still in cache).
#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "../check_args.h"
#include "../objective_math.h"
#include "tile.h"

namespace fca {
namespace {

constexpr int64_t kTokens = 256;        // a tile: some twenty arrays of it live in L1 (float) or L2 (double)
constexpr int64_t kUnit = 8 * kTokens;  // the unit of parallel work, within one row

enum class Aggregation : int64_t { TOKEN_MEAN = 0, SEQUENCE_MEAN = 1, SEQUENCE_SUM = 2, CONSTANT = 3 };

// The layout of ClipStats.buffer (objectives/stats.py holds the same order).
enum Stat : int64_t {
  TOKENS,
  CLIPPED_LOW,
  CLIPPED_HIGH,
  CLIPPED_DUAL,
  SUPPRESSED_MASS,
  TOTAL_MASS,
  KL_K1,
  KL_K2,
  KL_K3,
  RATIO_SUM,
  RATIO_SQ_SUM,
  RATIO_MIN,
  RATIO_MAX,
  NONFINITE,
  kStats
};

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

template <typename T>
void read_tokens(const Matrix& m, int64_t row, int64_t col, int64_t n, T* tile) {
  switch (m.dtype) {
    case DType::F64:
      return read_tokens_as<double>(m, row, col, n, tile);
    case DType::F32:
      return read_tokens_as<float>(m, row, col, n, tile);
    default:
      break;
  }
  float narrow[kTokens];
  float* target = narrow;
  if constexpr (sizeof(T) == 4) target = tile;
  if (m.dtype == DType::BF16) {
    read_tokens_as<BFloat16>(m, row, col, n, target);
  } else {
    read_tokens_as<Float16>(m, row, col, n, target);
  }
  if constexpr (sizeof(T) == 8) std::copy(narrow, narrow + n, tile);
}

struct Settings {
  TokenRule rule;
  bool sequence_ratio;
  double low, high, dual, cap, kl_coef, normalizer;
  KlEstimator kl;
  Aggregation aggregation;
};

struct Inputs {
  Matrix logp, old_logp, advantages, weights, ref_logp;
  const uint8_t* mask = nullptr;  // bytes: a bool tensor viewed from other data may hold more than 0 and 1
  int64_t mask_row = 0, mask_col = 0;
  const int64_t* sequence_ids = nullptr;  // packed layout: one row, the sequence of each token
  int64_t sequence_stride = 1;
  int64_t rows = 0, cols = 0;
};

// One tile of tokens in the arithmetic type.
template <typename T>
struct Tokens {
  T logp[kTokens], old_logp[kTokens], A[kTokens], w[kTokens], ref[kTokens];
  T D[kTokens], valid[kTokens], bad[kTokens];  // valid: unmasked and finite; bad: unmasked and not finite
  T a[kTokens], s[kTokens];                    // aggregation weight; sequence log-ratio, where the objective has one
  T r[kTokens], loss[kTokens], grad[kTokens];
  T low[kTokens], high[kTokens], dual[kTokens], suppressed[kTokens], total[kTokens], k1[kTokens], k2[kTokens],
      k3[kTokens];
};

// D, valid and bad. A token counts as unreadable if any of its inputs, or D itself, is not finite.
template <typename T>
FCA_INLINE void classify_tile_body(Tokens<T>& t, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T logp = t.logp[i], A = t.A[i], w = t.w[i], ref = t.ref[i], unmasked = t.valid[i];
    const T d = logp - t.old_logp[i], x = ref - logp;
    // x - x is 0 for a finite x, else NaN; logp is in d, which is finite only if it is.
    const bool finite = (d - d) + (A - A) + (w - w) + (x - x) == T(0);
    const T valid = select(finite, unmasked, T(0));
    const bool used = valid != T(0);
    t.bad[i] = unmasked - valid;
    t.valid[i] = valid;
    t.D[i] = select(used, saturate(d), T(0));
    t.A[i] = select(used, A, T(0));
    t.logp[i] = select(used, logp, T(0));
    t.w[i] = select(used, w, T(0));
    t.ref[i] = select(used, ref, T(0));
  }
}
FCA_LEAF((typename T), (T), void, classify_tile, (Tokens<T> & t, int64_t n), (t, n))

// Where a token's loss and gradient saturate: times 1 / normalizer they must still be finite.
template <typename T>
FCA_INLINE T token_limit(const Settings& settings) {
  const double shrink = settings.normalizer > 0 && settings.normalizer < 1 ? settings.normalizer : 1.0;
  return static_cast<T>(saturation(T()) * shrink);
}

// The token equations, their aggregation weight and what the statistics sum.
template <typename T, TokenRule RULE, bool SEQUENCE>
FCA_INLINE void token_tile_body(Tokens<T>& t, const Settings& settings, int64_t n) {
  const Bounds<T> bound = {static_cast<T>(settings.low), static_cast<T>(settings.high), static_cast<T>(settings.dual),
                           static_cast<T>(settings.cap)};
  const T limit = token_limit<T>(settings);
  for (int64_t i = 0; i < n; ++i) {
    const T D = t.D[i], A = t.A[i], valid = t.valid[i];
    const T token_ratio = exp_clamped(clamp_log_ratio(D));
    const T r = SEQUENCE ? exp_clamped(clamp_log_ratio(t.s[i])) : token_ratio;
    const Token<T> token = RULE == TokenRule::CISPO ? cispo_token(r, A, t.logp[i], bound) : ppo_token(r, A, bound);
    const T a = t.a[i] * valid, aw = a * t.w[i];
    t.loss[i] = saturate(aw * saturate(token.loss), limit);
    t.grad[i] = saturate(aw * saturate(token.grad), limit);
    t.low[i] = token.clipped_low * valid;
    t.high[i] = token.clipped_high * valid;
    t.dual[i] = token.clipped_dual * valid;
    const T mass = saturate(a * r * select(A < T(0), -A, A));
    t.total[i] = mass;
    t.suppressed[i] = select(token.grad == T(0), mass, T(0));
    t.k1[i] = -D;
    t.k2[i] = saturate(T(0.5) * D * D);
    t.k3[i] = exp_beyond_linear(D, token_ratio) * valid;
    t.r[i] = r;
  }
}
FCA_LEAF((typename T, TokenRule RULE, bool SEQUENCE), (T, RULE, SEQUENCE), void, token_tile,
         (Tokens<T> & t, const Settings& settings, int64_t n), (t, settings, n))

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

// Least and greatest ratio of the valid tokens.
template <typename T>
FCA_INLINE void ratio_range_body(const T* __restrict r, const T* __restrict valid, int64_t n, double* least,
                                 double* greatest) {
  T low[kLanes], high[kLanes];
  std::fill_n(low, kLanes, std::numeric_limits<T>::max());
  std::fill_n(high, kLanes, T(0));
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t lanes = std::min(kLanes, n - i);
    for (int64_t j = 0; j < lanes; ++j) {
      const T x = select(valid[i + j] != T(0), r[i + j], std::numeric_limits<T>::max()), y = valid[i + j] * r[i + j];
      low[j] = select(x < low[j], x, low[j]);
      high[j] = select(y > high[j], y, high[j]);
    }
  }
  *least = *std::min_element(low, low + kLanes);
  *greatest = *std::max_element(high, high + kLanes);
}
FCA_LEAF((typename T), (T), void, ratio_range, (const T* r, const T* valid, int64_t n, double* least, double* greatest),
         (r, valid, n, least, greatest))

struct Unit {
  int64_t row, begin, end;
};

template <typename T>
class Objective {
 public:
  Objective(const Inputs& inputs, const Settings& settings, int64_t sequences)
      : in_(inputs), set_(settings), length_(sequences), mean_(sequences), sum_grad_(sequences) {
    for (int64_t row = 0; row < in_.rows; ++row) {
      for (int64_t begin = 0; begin < in_.cols; begin += kUnit) {
        units_.push_back({row, begin, std::min(begin + kUnit, in_.cols)});
      }
    }
    partial_.assign(units_.size() * (kStats + 1), 0.0);
  }

  // Returns the unscaled loss sum; `grad` (may be null) receives the unscaled gradient, `stats` the unscaled sums.
  double run(T* grad, double* stats) {
    if (needs_sequences()) gather_sequences();
    const int64_t n = static_cast<int64_t>(units_.size());
    torch::stable::parallel_for(0, n, grain(), [&](int64_t first, int64_t last) {
      for (int64_t u = first; u < last; ++u) token_pass(u, grad);
    });
    if (set_.sequence_ratio && grad != nullptr) spread_sequence_grad(grad);
    return fold(stats);
  }

  double valid_tokens() const { return valid_tokens_; }

 private:
  bool needs_sequences() const { return set_.sequence_ratio || set_.aggregation == Aggregation::SEQUENCE_MEAN; }
  int64_t grain() const { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, std::min(kUnit, in_.cols))); }
  int64_t sequence_of(int64_t row, int64_t col) const {
    return in_.sequence_ids ? in_.sequence_ids[col * in_.sequence_stride] : row;
  }

  void read(Tokens<T>& t, int64_t row, int64_t col, int64_t n) const {
    read_tokens(in_.logp, row, col, n, t.logp);
    read_tokens(in_.old_logp, row, col, n, t.old_logp);
    read_tokens(in_.advantages, row, col, n, t.A);
    std::fill_n(t.w, n, T(1));
    std::fill_n(t.ref, n, T(0));
    if (in_.weights.data) read_tokens(in_.weights, row, col, n, t.w);
    if (in_.ref_logp.data) read_tokens(in_.ref_logp, row, col, n, t.ref);
    if (in_.mask) {
      const uint8_t* mask = in_.mask + row * in_.mask_row + col * in_.mask_col;
      for (int64_t i = 0; i < n; ++i) t.valid[i] = mask[i * in_.mask_col] ? T(1) : T(0);
    } else {
      std::fill(t.valid, t.valid + n, T(1));
    }
    classify_tile<T>(t, n);
  }

  // Length and mean log-ratio of each sequence: rows in parallel, a packed row in order.
  void gather_sequences() {
    torch::stable::parallel_for(0, in_.rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, in_.cols)),
                                [&](int64_t first, int64_t last) {
                                  std::vector<Tokens<T>> scratch(1);
                                  Tokens<T>& t = scratch[0];
                                  for (int64_t row = first; row < last; ++row) {
                                    for (int64_t col = 0; col < in_.cols; col += kTokens) {
                                      const int64_t n = std::min(kTokens, in_.cols - col);
                                      read(t, row, col, n);
                                      if (in_.sequence_ids == nullptr) {
                                        length_[row] += sum_tile<T>(t.valid, n);
                                        mean_[row] += sum_tile<T>(t.D, n);
                                      } else {
                                        for (int64_t i = 0; i < n; ++i) {
                                          const int64_t sequence = sequence_of(row, col + i);
                                          length_[sequence] += t.valid[i];
                                          mean_[sequence] += t.D[i];
                                        }
                                      }
                                    }
                                  }
                                });
    for (size_t i = 0; i < length_.size(); ++i) {
      length_[i] = std::max(length_[i], 1.0);
      mean_[i] /= length_[i];
    }
  }

  void sequence_scalars(Tokens<T>& t, int64_t row, int64_t col, int64_t n) const {
    const bool mean = set_.aggregation == Aggregation::SEQUENCE_MEAN;
    if (in_.sequence_ids == nullptr) {
      std::fill(t.a, t.a + n, mean ? static_cast<T>(1.0 / length_[row]) : T(1));
      if (set_.sequence_ratio) std::fill(t.s, t.s + n, static_cast<T>(mean_[row]));
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t sequence = sequence_of(row, col + i);
      t.a[i] = mean ? static_cast<T>(1.0 / length_[sequence]) : T(1);
      if (set_.sequence_ratio) t.s[i] = static_cast<T>(mean_[sequence]);
    }
  }

  void token_pass(int64_t u, T* grad) {
    const Unit& unit = units_[u];
    double* sum = partial_.data() + u * (kStats + 1);
    sum[RATIO_MIN] = std::numeric_limits<double>::max();
    Tokens<T> t;
    const bool referenced = in_.ref_logp.data != nullptr;
    for (int64_t col = unit.begin; col < unit.end; col += kTokens) {
      const int64_t n = std::min(kTokens, unit.end - col);
      read(t, unit.row, col, n);
      sequence_scalars(t, unit.row, col, n);
      if (set_.sequence_ratio) {
        token_tile<T, TokenRule::PPO, true>(t, set_, n);
      } else if (set_.rule == TokenRule::CISPO) {
        token_tile<T, TokenRule::CISPO, false>(t, set_, n);
      } else {
        token_tile<T, TokenRule::PPO, false>(t, set_, n);
      }
      const T* const summed[] = {t.valid, t.low, t.high, t.dual, t.suppressed, t.total, t.k1, t.k2, t.k3};
      for (int64_t k = 0; k <= KL_K3; ++k) sum[k] += sum_tile<T>(summed[k], n);
      for (int64_t i = 0; i < n; ++i) t.total[i] = t.valid[i] * t.r[i];
      sum[RATIO_SUM] += sum_tile<T>(t.total, n);
      sum[RATIO_SQ_SUM] += sum_squares_tile<T, false>(t.total, n);
      double least, greatest;
      ratio_range<T>(t.r, t.valid, n, &least, &greatest);
      sum[RATIO_MIN] = std::min(sum[RATIO_MIN], least);
      sum[RATIO_MAX] = std::max(sum[RATIO_MAX], greatest);
      sum[NONFINITE] += sum_tile<T>(t.bad, n);
      T* out = grad == nullptr ? nullptr : grad + unit.row * in_.cols + col;
      // With a sequence ratio `out` first holds each token's part of its sequence's sum, without the KL term.
      if (out && set_.sequence_ratio) std::copy(t.grad, t.grad + n, out);
      if (referenced) add_kl(t, set_, n);
      if (out && !set_.sequence_ratio) std::copy(t.grad, t.grad + n, out);
      sum[kStats] += sum_tile<T>(t.loss, n);
    }
  }

  // Sequence ratio: every token's gradient is the sum over its sequence of a w g, over the length, plus its KL term.
  void spread_sequence_grad(T* grad) {
    const int64_t n = in_.rows;
    torch::stable::parallel_for(
        0, n, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, in_.cols)), [&](int64_t first, int64_t last) {
          std::vector<Tokens<T>> scratch(1);
          Tokens<T>& t = scratch[0];
          for (int64_t row = first; row < last; ++row) {
            T* out = grad + row * in_.cols;
            for (int64_t col = 0; col < in_.cols; ++col) {
              sum_grad_[sequence_of(row, col)] += static_cast<double>(out[col]);
            }
            for (int64_t col = 0; col < in_.cols; col += kTokens) {
              const int64_t size = std::min(kTokens, in_.cols - col);
              read(t, row, col, size);
              for (int64_t i = 0; i < size; ++i) {
                const int64_t sequence = sequence_of(row, col + i);
                t.grad[i] = static_cast<T>(sum_grad_[sequence] / length_[sequence]) * t.valid[i];
              }
              if (in_.ref_logp.data) {
                std::fill(t.loss, t.loss + size, T(0));
                sequence_scalars(t, row, col, size);
                add_kl(t, set_, size);
              }
              std::copy(t.grad, t.grad + size, out + col);
            }
          }
        });
  }

  double fold(double* stats) {
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
    valid_tokens_ = stats[TOKENS];
    return loss;
  }

  const Inputs& in_;
  const Settings& set_;
  std::vector<double> length_, mean_, sum_grad_;
  std::vector<Unit> units_;
  std::vector<double> partial_;
  double valid_tokens_ = 0;
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Inputs& in, const Settings& settings, int64_t sequences,
                                               double normalizer, bool want_grad) {
  constexpr ScalarType dtype = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  Tensor grad = torch::stable::empty({want_grad ? in.rows : 0, want_grad ? in.cols : 0}, dtype);
  Tensor loss = torch::stable::empty({}, dtype), scale = torch::stable::empty({}, dtype);
  Tensor stats = torch::stable::empty({kStats}, ScalarType::Float);

  Objective<T> objective(in, settings, sequences);
  double sums[kStats];
  const double total = objective.run(want_grad ? mutable_data<T>(grad) : nullptr, sums);

  double count = normalizer;
  if (!(normalizer > 0)) {
    count = settings.aggregation == Aggregation::TOKEN_MEAN ? objective.valid_tokens() : static_cast<double>(sequences);
  }
  const double factor = 1.0 / (normalizer > 0 ? count : std::max(count, 1.0));
  sums[SUPPRESSED_MASS] *= factor;
  sums[TOTAL_MASS] *= factor;
  const double most = std::numeric_limits<float>::max();
  for (int64_t k = 0; k < kStats; ++k) {
    mutable_data<float>(stats)[k] = static_cast<float>(std::clamp(sums[k], -most, most));
  }
  const double bound = static_cast<double>(std::numeric_limits<T>::max());
  *mutable_data<T>(loss) = static_cast<T>(std::clamp(total * factor, -bound, bound));
  *mutable_data<T>(scale) = static_cast<T>(factor);
  return {loss, grad, scale, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss(const Tensor& logp, const Tensor& old_logp,
                                                       const Tensor& advantages, std::optional<Tensor> mask,
                                                       std::optional<Tensor> weights, std::optional<Tensor> ref_logp,
                                                       std::optional<Tensor> sequence_ids, int64_t num_sequences,
                                                       int64_t token_rule, bool sequence_ratio, double low, double high,
                                                       double dual, double cap, int64_t aggregation, double normalizer,
                                                       double kl_coef, int64_t kl_estimator, bool want_grad) {
  check(logp.dim() == 2, "logp must be [rows, cols]");
  Inputs in;
  in.rows = logp.size(0);
  in.cols = logp.size(1);
  in.logp = matrix(logp, logp, "logp");
  in.old_logp = matrix(old_logp, logp, "old_logp");
  in.advantages = matrix(advantages, logp, "advantages");
  in.weights = matrix(weights, logp, "weights");
  in.ref_logp = matrix(ref_logp, logp, "ref_logp");
  if (mask) {
    check(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    check(mask->dim() == 2 && mask->size(0) == in.rows && mask->size(1) == in.cols, "mask must be [", in.rows, ", ",
          in.cols, "]");
    in.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    in.mask_row = mask->stride(0);
    in.mask_col = mask->stride(1);
  }
  if (sequence_ids) {
    check(sequence_ids->scalar_type() == ScalarType::Long && sequence_ids->dim() == 1 && in.rows == 1 &&
              sequence_ids->numel() == in.cols,
          "sequence_ids must be int64 [", in.cols, "] beside packed input");
    in.sequence_ids = static_cast<const int64_t*>(sequence_ids->const_data_ptr());
    in.sequence_stride = sequence_ids->stride(0);
    for (int64_t i = 0; i < in.cols; ++i) {
      const int64_t id = in.sequence_ids[i * in.sequence_stride];
      check(id >= 0 && id < num_sequences, "sequence_ids[", i, "] is ", id, "; accepted: 0 to ", num_sequences - 1);
    }
  }
  const int64_t sequences = sequence_ids ? num_sequences : in.rows;
  const Settings settings = {static_cast<TokenRule>(token_rule),
                             sequence_ratio,
                             low,
                             high,
                             dual,
                             cap,
                             kl_coef,
                             normalizer,
                             static_cast<KlEstimator>(kl_estimator),
                             static_cast<Aggregation>(aggregation)};
  return in.logp.dtype == DType::F64 ? run<double>(in, settings, sequences, normalizer, want_grad)
                                     : run<float>(in, settings, sequences, normalizer, want_grad);
}

}  // namespace
}  // namespace fca

STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, CPU, m) { m.impl("policy_loss", TORCH_BOX(&fca::policy_loss)); }
