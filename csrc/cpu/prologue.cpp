// Phase 2: every scalar of the step, in float64: unscale, norm, clip coefficient, skip, brake; then those of each
// tensor.
#include <optional>

#include "../update_math.h"
#include "table.h"

namespace fca {
namespace {

double scalar_value(const Tensor& tensor, const char* name) {
  check(tensor.numel() == 1, name, " must hold one element, got ", tensor.numel());
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return *const_data<double>(tensor);
    case ScalarType::Float:
      return *const_data<float>(tensor);
    default:
      fail(name, " must be float32 or float64");
  }
}

// group_signals: float64[groups, kGroupSignals], absent where no rule resets.
// square_sums: float64[batches] of raw gradients, absent where no rule needs the norm before the update.
// grad_square_sum: float64 0-d, of unscaled gradients: the previous step's on entry; this step's on exit where
// square_sums is given, else 0, ready for the update pass to add to. A step that found_inf skips leaves it alone.
Tensor prologue(const Tensor& group_scalars, std::optional<Tensor> group_signals, std::optional<Tensor> square_sums,
                std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> observed,
                const Tensor& grad_square_sum, const Tensor& steps_skipped, bool skip_nonfinite) {
  const int64_t groups = group_scalars.numel() / kGroupScalars;
  check_buffer(group_scalars, ScalarType::Double, groups * kGroupScalars, "group_scalars");
  if (group_signals) check_buffer(*group_signals, ScalarType::Double, groups * kGroupSignals, "group_signals");
  check_buffer(grad_square_sum, ScalarType::Double, 1, "grad_square_sum");
  check_buffer(steps_skipped, ScalarType::Long, 1, "steps_skipped");

  const double unscale = grad_scale ? 1.0 / scalar_value(*grad_scale, "grad_scale") : 1.0;
  bool skip = found_inf && scalar_value(*found_inf, "found_inf") != 0.0;
  double* total = mutable_data<double>(grad_square_sum);
  const double previous_norm = std::sqrt(*total);
  double norm = 0;
  if (square_sums) {
    const double* sums = const_data<double>(*square_sums);
    for (int64_t i = 0; i < square_sums->numel(); ++i) norm += sums[i];
    norm = std::sqrt(norm) * std::fabs(unscale);
    if (!skip) *total = norm * norm;
    skip = skip || (skip_nonfinite && !(norm - norm == 0.0));
  } else if (!skip) {
    *total = 0;
  }
  double c = 0;
  if (observed) {
    check_buffer(*observed, ScalarType::Float, 2, "observed");
    const float* mass = const_data<float>(*observed);
    c = suppressed_fraction(mass[0], mass[1]);
  }
  if (skip) *mutable_data<int64_t>(steps_skipped) += 1;

  Tensor control = torch::stable::empty({groups, kControl}, ScalarType::Double);
  const auto* group = reinterpret_cast<const GroupScalars*>(const_data<double>(group_scalars));
  auto* out = reinterpret_cast<Control*>(mutable_data<double>(control));
  for (int64_t i = 0; i < groups; ++i) {
    const GroupSignals own =
        group_signals ? reinterpret_cast<const GroupSignals*>(const_data<double>(*group_signals))[i] : kNoSignals;
    out[i] = make_control(group[i], own, unscale, norm, previous_norm, c, skip);
  }
  return control;
}

// float64[rows, kTensorScalars]. Advances every tensor's step and bias weights, unless the step is skipped.
Tensor tensor_scalars(const Tensor& table_tensor, const Tensor& group_scalars, const Tensor& control) {
  const Table table = read_table(table_tensor);
  const int64_t groups = group_scalars.numel() / kGroupScalars;
  check_buffer(group_scalars, ScalarType::Double, groups * kGroupScalars, "group_scalars");
  check_buffer(control, ScalarType::Double, groups * kControl, "control");
  const auto* group = reinterpret_cast<const GroupScalars*>(const_data<double>(group_scalars));
  const auto* signals = reinterpret_cast<const Control*>(const_data<double>(control));
  for (int64_t r = 0; r < table.rows; ++r) {
    check(table.row[r].group >= 0 && table.row[r].group < groups, "control has no group ", table.row[r].group);
  }
  Tensor out = torch::stable::empty({table.rows, kTensorScalars}, ScalarType::Double);
  auto* scalars = reinterpret_cast<TensorScalars*>(mutable_data<double>(out));
  for (int64_t r = 0; r < table.rows; ++r) {
    const Row& row = table.row[r];
    if (signals[row.group].skip != 0.0) {
      scalars[r] = {};
      scalars[r].skip = 1.0;
    } else {
      scalars[r] = advance(row, group[row.group], signals[row.group], group[row.group].lr);
    }
  }
  return out;
}

}  // namespace
}  // namespace fca

STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, CPU, m) {
  m.impl("prologue", TORCH_BOX(&fca::prologue));
  m.impl("tensor_scalars", TORCH_BOX(&fca::tensor_scalars));
}
