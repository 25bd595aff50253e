// Log-probability of the taken token and entropy of each row of [B, T, V] logits, and the way back to the logits.
//
// Forward reads the logits once (a running maximum and two sums, rescaled when the maximum grows); backward reads them
// once and writes once, over the logits themselves if asked. Nothing else is V wide: tiles of a row live in L1. Rows
// that a mask takes out, and in the backward pass those without a gradient, are not read. Bytes of an element: forward
// its width, backward twice that. Operations: about 40, most of them exp's.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "../check_args.h"
#include "../objective_math.h"
#include "tile.h"

namespace fca {
namespace {

constexpr int64_t kLogits = 2048;  // a tile

// Beyond e^-80 ~ 2e-35 a probability is 0: in float32 it is lost beside any other of the row.
constexpr double kLeastLog = -80.0;

// The greatest value of a tile, and into `bad` how many are NaN or +inf.
template <typename T>
FCA_INLINE T max_tile_body(const T* __restrict x, int64_t n, T* bad) {
  T most[kLanes], broken[kLanes];
  std::fill_n(most, kLanes, -std::numeric_limits<T>::infinity());
  std::fill_n(broken, kLanes, T(0));
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const T v = x[i + j];
      most[j] = select(v > most[j], v, most[j]);
      broken[j] += select(v <= std::numeric_limits<T>::max(), T(0), T(1));
    }
  }
  for (int64_t j = 0; i + j < n; ++j) {
    const T v = x[i + j];
    most[j] = select(v > most[j], v, most[j]);
    broken[j] += select(v <= std::numeric_limits<T>::max(), T(0), T(1));
  }
  for (int64_t j = 0; j < kLanes; ++j) *bad += broken[j];
  return *std::max_element(most, most + kLanes);
}
FCA_LEAF((typename T), (T), T, max_tile, (const T* x, int64_t n, T* bad), (x, n, bad))

template <typename T, bool MOMENT>
FCA_INLINE void exp_term(T x, T m, T inv_temperature, T& sum, T& moment) {
  const T away = x * inv_temperature - m, d = clip(away, T(kLeastLog), T(0));
  const T e = select(away < T(kLeastLog), T(0), exp_clamped(d));
  sum += e;
  if (MOMENT) moment += d * e;
}

// sum += sum exp(z - m), moment += sum (z - m) exp(z - m), z = x inv_temperature
template <typename T, bool MOMENT>
FCA_INLINE void exp_tile_body(const T* __restrict x, int64_t n, T m, T inv_temperature, double* sum, double* moment) {
  T sums[kLanes] = {}, moments[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) exp_term<T, MOMENT>(x[i + j], m, inv_temperature, sums[j], moments[j]);
  }
  for (int64_t j = 0; i + j < n; ++j) exp_term<T, MOMENT>(x[i + j], m, inv_temperature, sums[j], moments[j]);
  double wide[kLanes], wide_moments[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) wide[j] = sums[j];
  for (int64_t j = 0; j < kLanes; ++j) wide_moments[j] = moments[j];
  *sum += fold_lanes(wide);
  if (MOMENT) *moment += fold_lanes(wide_moments);
}
FCA_LEAF((typename T, bool MOMENT), (T, MOMENT), void, exp_tile,
         (const T* x, int64_t n, T m, T inv_temperature, double* sum, double* moment),
         (x, n, m, inv_temperature, sum, moment))

template <typename T>
struct RowGrad {
  T m, log_sum, H, g, h, inv_temperature;
};

// d = inv_temperature (-g p - h p (log p + H)); the taken token's g is added by the caller.
template <typename T>
FCA_INLINE void grad_tile_body(const T* __restrict x, T* __restrict out, int64_t n, const RowGrad<T>& row) {
  for (int64_t i = 0; i < n; ++i) {
    const T log_p = (x[i] * row.inv_temperature - row.m) - row.log_sum;
    const T held = clip(log_p, T(kLeastLog), T(1));
    const T p = select(log_p < T(kLeastLog), T(0), exp_clamped(held));
    out[i] = row.inv_temperature * (-(p * (row.g + row.h * (held + row.H))));
  }
}
FCA_LEAF((typename T), (T), void, grad_tile, (const T* x, T* out, int64_t n, const RowGrad<T>& row), (x, out, n, row))

// [B, T] of any strides.
template <typename S>
struct Rows {
  const S* data = nullptr;
  int64_t batch = 0, time = 0;
  S at(int64_t b, int64_t t) const { return data[b * batch + t * time]; }
};

template <typename S>
Rows<S> rows_of(const Tensor& tensor, const Tensor& logits, ScalarType dtype, const char* name) {
  check(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  check(tensor.dim() == 2 && tensor.size(0) == logits.size(0) && tensor.size(1) == logits.size(1), name, " must be [",
        logits.size(0), ", ", logits.size(1), "]");
  return {static_cast<const S*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

void check_logits(const Tensor& logits, const char* name) {
  check(logits.dim() == 3 && logits.size(2) > 0 && (logits.stride(2) == 1 || logits.size(2) == 1), name,
        " must be [B, T, V], V > 0, with stride 1 in V");
}

int64_t row_grain(int64_t V) { return std::max<int64_t>(1, 32768 / V); }

// A tile in the arithmetic type: the row itself, or a converted copy.
template <typename S, typename T>
const T* arithmetic_tile(const S* row, T* tile, int64_t n) {
  if constexpr (std::is_same<S, T>::value) return row;
  load_tile<T, S>(row, tile, n);
  return tile;
}

// `entropy` null: not wanted.
template <typename S, typename T>
void forward_row(const S* row, int64_t V, int64_t token, T inv_temperature, T* logp, T* entropy, T* m_out, T* log_sum) {
  T tile[kLogits], bad = 0, m = -std::numeric_limits<T>::infinity();
  double sum = 0, moment = 0;
  for (int64_t begin = 0; begin < V; begin += kLogits) {
    const int64_t n = std::min(kLogits, V - begin);
    const T* x = arithmetic_tile<S, T>(row + begin, tile, n);
    const T tile_m = max_tile<T>(x, n, &bad) * inv_temperature;
    if (tile_m > m) {
      if (sum > 0) {
        const double shift = static_cast<double>(m) - static_cast<double>(tile_m), factor = std::exp(shift);
        moment = (moment + shift * sum) * factor;
        sum *= factor;
      }
      m = tile_m;
    }
    if (bad == T(0) && m - m == T(0)) {
      const auto add = entropy == nullptr ? exp_tile<T, false> : exp_tile<T, true>;
      add(x, n, m, inv_temperature, &sum, &moment);
    }
  }
  const bool known = token >= 0 && token < V;
  if (!known || bad != T(0) || !(m - m == T(0))) {
    *logp = *m_out = *log_sum = std::numeric_limits<T>::quiet_NaN();
    if (entropy != nullptr) *entropy = std::numeric_limits<T>::quiet_NaN();
    return;
  }
  const double log_of_sum = std::log(sum);
  const T at = load_as<T>(row[token]) * inv_temperature - m;
  *logp = static_cast<T>(static_cast<double>(at) - log_of_sum);
  if (entropy != nullptr) *entropy = static_cast<T>(log_of_sum - moment / sum);
  *m_out = m;
  *log_sum = static_cast<T>(log_of_sum);
}

template <typename S, typename T>
void forward(const Tensor& logits, const Rows<int64_t>& tokens, const Rows<uint8_t>& mask, T inv_temperature, T* logp,
             T* entropy, T* softmax) {
  const S* data = static_cast<const S*>(logits.const_data_ptr());
  const int64_t B = logits.size(0), L = logits.size(1), V = logits.size(2);
  const int64_t batch = logits.stride(0), time = logits.stride(1), rows = B * L;
  torch::stable::parallel_for(0, rows, row_grain(V), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / L, t = i % L;
      if (mask.data && !mask.at(b, t)) {
        logp[i] = T(0);
        if (entropy != nullptr) entropy[i] = T(0);
        softmax[i] = softmax[rows + i] = std::numeric_limits<T>::quiet_NaN();  // no gradient, whatever comes from above
        continue;
      }
      forward_row<S, T>(data + b * batch + t * time, V, tokens.at(b, t), inv_temperature, logp + i,
                        entropy == nullptr ? nullptr : entropy + i, softmax + i, softmax + rows + i);
    }
  });
}

template <typename S, typename T>
void backward_row(const S* row, S* out, int64_t V, int64_t token, const RowGrad<T>& grad) {
  T tile[kLogits], result[kLogits];
  for (int64_t begin = 0; begin < V; begin += kLogits) {
    const int64_t n = std::min(kLogits, V - begin);
    const T* x = arithmetic_tile<S, T>(row + begin, tile, n);
    grad_tile<T>(x, result, n, grad);
    if (token >= begin && token < begin + n) result[token - begin] += grad.inv_temperature * grad.g;
    if constexpr (std::is_same<S, T>::value) {
      std::copy(result, result + n, out + begin);
    } else {
      store_tile<S, T>(result, out + begin, n);
    }
  }
}

template <typename S, typename T>
void backward(const Tensor& logits, const Rows<int64_t>& tokens, const T* softmax, const Rows<T>& entropy,
              const Rows<T>& grad_logp, const Rows<T>& grad_entropy, T inv_temperature, const Tensor& out) {
  const S* data = static_cast<const S*>(logits.const_data_ptr());
  S* target = static_cast<S*>(out.mutable_data_ptr());
  const int64_t B = logits.size(0), L = logits.size(1), V = logits.size(2), rows = B * L;
  torch::stable::parallel_for(0, rows, row_grain(V), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / L, t = i % L;
      S* out_row = target + b * out.stride(0) + t * out.stride(1);
      const T m = softmax[i], log_sum = softmax[rows + i];
      const T g = grad_logp.at(b, t), h = grad_entropy.data ? grad_entropy.at(b, t) : T(0);
      if ((g == T(0) && h == T(0)) || !((m - m) + (log_sum - log_sum) == T(0))) {
        std::fill_n(out_row, V, S{});
        continue;
      }
      backward_row<S, T>(data + b * logits.stride(0) + t * logits.stride(1), out_row, V, tokens.at(b, t),
                         {m, log_sum, grad_entropy.data ? entropy.at(b, t) : T(0), g, h, inv_temperature});
    }
  });
}

// Calls the function with a value of the logits' storage type and one of the arithmetic type.
template <typename F>
void with_dtype(const Tensor& logits, F function) {
  switch (floating_dtype(logits, "logits")) {
    case DType::F64:
      return function(double(), double());
    case DType::F32:
      return function(float(), float());
    case DType::BF16:
      return function(BFloat16(), float());
    case DType::F16:
      return function(Float16(), float());
  }
}

template <typename T>
constexpr ScalarType kArithmetic = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

std::tuple<Tensor, Tensor, Tensor> logits_forward(const Tensor& logits, const Tensor& tokens,
                                                  std::optional<Tensor> mask, double inv_temperature,
                                                  bool want_entropy) {
  check_logits(logits, "logits");
  const int64_t B = logits.size(0), L = logits.size(1);
  const ScalarType dtype = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor logp = torch::stable::empty({B, L}, dtype);
  Tensor entropy = torch::stable::empty({want_entropy ? B : 0, want_entropy ? L : 0}, dtype);
  Tensor softmax = torch::stable::empty({2, B, L}, dtype);
  const Rows<int64_t> token_rows = rows_of<int64_t>(tokens, logits, ScalarType::Long, "tokens");
  Rows<uint8_t> mask_rows;
  if (mask) mask_rows = rows_of<uint8_t>(*mask, logits, ScalarType::Bool, "mask");
  with_dtype(logits, [&](auto storage, auto arithmetic) {
    using T = decltype(arithmetic);
    forward<decltype(storage), T>(logits, token_rows, mask_rows, static_cast<T>(inv_temperature), mutable_data<T>(logp),
                                  want_entropy ? mutable_data<T>(entropy) : nullptr, mutable_data<T>(softmax));
  });
  return {logp, entropy, softmax};
}

void logits_backward(const Tensor& logits, const Tensor& tokens, const Tensor& softmax, const Tensor& entropy,
                     const Tensor& grad_logp, std::optional<Tensor> grad_entropy, double inv_temperature,
                     const Tensor& out) {
  check_logits(logits, "logits");
  check_logits(out, "out");
  check(out.scalar_type() == logits.scalar_type(), "out must have the logits' dtype");
  for (int64_t d = 0; d < 3; ++d) check(out.size(d) == logits.size(d), "out must have the logits' shape");
  const int64_t rows = logits.size(0) * logits.size(1);
  const Rows<int64_t> token_rows = rows_of<int64_t>(tokens, logits, ScalarType::Long, "tokens");
  with_dtype(logits, [&](auto storage, auto arithmetic) {
    using T = decltype(arithmetic);
    check_buffer(softmax, kArithmetic<T>, 2 * rows, "softmax");
    const Rows<T> g = rows_of<T>(grad_logp, logits, kArithmetic<T>, "grad_logp");
    Rows<T> h, H;
    if (grad_entropy) {
      h = rows_of<T>(*grad_entropy, logits, kArithmetic<T>, "grad_entropy");
      H = rows_of<T>(entropy, logits, kArithmetic<T>, "entropy");
    }
    backward<decltype(storage), T>(logits, token_rows, const_data<T>(softmax), H, g, h, static_cast<T>(inv_temperature),
                                   out);
  });
}

}  // namespace
}  // namespace fca

STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, CPU, m) {
  m.impl("logits_forward", TORCH_BOX(&fca::logits_forward));
  m.impl("logits_backward", TORCH_BOX(&fca::logits_backward));
}
