// Phase 2: every scalar of the step, in float64, on the device: norm, unscale, clip coefficient, skip, brake; then each
// tensor's step, bias corrections and rounded factors. One block, whatever the number of tensors.
#include <optional>

#include "device.h"

namespace fca {
namespace {

constexpr int kPrologueThreads = 512;

struct Signals {
  const double* square_sums;  // null: no rule needs the norm before the update
  int64_t square_sums_count;
  DeviceScalar grad_scale, found_inf;
  const float* observed;  // suppressed and total mass, or null
  bool skip_nonfinite;
  const GroupSignals* groups;  // of every group, or null
};

__global__ void __launch_bounds__(kPrologueThreads, 1)
    prologue_kernel(const Row* rows, int64_t row_count, const GroupScalars* groups, Signals signals,
                    double* grad_square_sum, int64_t* steps_skipped, TensorScalars* scalars) {
  __shared__ double fold[kPrologueThreads / kWarp];
  double part = 0;
  for (int64_t i = threadIdx.x; i < signals.square_sums_count; i += kPrologueThreads) part += signals.square_sums[i];
  const double square_sum = block_sum<kPrologueThreads>(part, fold);
  const double previous_norm = std::sqrt(*grad_square_sum);
  __syncthreads();  // every thread has read it; now it may be written

  const double unscale = 1.0 / signals.grad_scale.read(1.0);
  const bool overflowed = signals.found_inf.read(0.0) != 0.0;
  const bool has_norm = signals.square_sums != nullptr;
  const double norm = has_norm ? std::sqrt(square_sum) * std::fabs(unscale) : 0.0;
  const bool skip = overflowed || (has_norm && signals.skip_nonfinite && !(norm - norm == 0.0));
  const double c = signals.observed == nullptr ? 0.0 : suppressed_fraction(signals.observed[0], signals.observed[1]);
  if (threadIdx.x == 0) {
    if (!overflowed) *grad_square_sum = norm * norm;
    if (skip) *steps_skipped += 1;
  }

  for (int64_t r = threadIdx.x; r < row_count; r += kPrologueThreads) {
    scalars[r].skip = skip ? 1.0 : 0.0;
    if (skip) continue;
    const Row& row = rows[r];
    const GroupScalars& group = groups[row.group];
    const GroupSignals own = signals.groups == nullptr ? GroupSignals{0.0, 0.0, 1.0} : signals.groups[row.group];
    const Control control = make_control(group, own, unscale, norm, previous_norm, c, skip);
    double lr = group.lr;
    if (group.lr_address != 0)
      lr = DeviceScalar{reinterpret_cast<const void*>(group.lr_address), group.lr_is_f64 != 0}.read(lr);
    scalars[r] = advance(row, group, control, lr);
  }
}

void cuda_prologue(const Tensor& fixed, const Tensor& fresh, int64_t rows, std::optional<Tensor> group_signals,
                   std::optional<Tensor> square_sums, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                   std::optional<Tensor> observed, const Tensor& grad_square_sum, const Tensor& steps_skipped,
                   bool skip_nonfinite, const Tensor& scalars) {
  const int64_t groups = (fresh.numel() - rows) / kGroupScalars;
  if (group_signals) check_buffer(*group_signals, ScalarType::Double, groups * kGroupSignals, "group_signals");
  check_buffer(grad_square_sum, ScalarType::Double, 1, "grad_square_sum");
  check_buffer(steps_skipped, ScalarType::Long, 1, "steps_skipped");
  check_buffer(scalars, ScalarType::Double, rows * kTensorScalars, "scalars");
  if (observed) check_buffer(*observed, ScalarType::Float, 2, "observed");
  if (square_sums) check_buffer(*square_sums, ScalarType::Double, square_sums->numel(), "square_sums");
  const Signals signals = {
      square_sums ? const_data<double>(*square_sums) : nullptr,
      square_sums ? square_sums->numel() : 0,
      device_scalar(grad_scale, "grad_scale"),
      device_scalar(found_inf, "found_inf"),
      observed ? const_data<float>(*observed) : nullptr,
      skip_nonfinite,
      group_signals ? reinterpret_cast<const GroupSignals*>(const_data<double>(*group_signals)) : nullptr};
  Launcher(fixed).run("prologue_kernel", prologue_kernel, 1, kPrologueThreads,
                      reinterpret_cast<const Row*>(const_data<int64_t>(fixed)), rows,
                      reinterpret_cast<const GroupScalars*>(const_data<int64_t>(fresh) + rows), signals,
                      mutable_data<double>(grad_square_sum), mutable_data<int64_t>(steps_skipped),
                      reinterpret_cast<TensorScalars*>(mutable_data<double>(scalars)));
}

}  // namespace
}  // namespace fca

FCA_REGISTER(m) { m.impl("cuda_prologue", TORCH_BOX(&fca::cuda_prologue)); }
