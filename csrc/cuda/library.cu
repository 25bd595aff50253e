// The CUDA operators, by the phases of a step. Their tensors are described in fused_clip_adam/backends/device_table.py.
#include <string>

#include "device.h"

namespace fca {
std::string cuda_build(bool) {
#if defined(CUDA_ON_CPU)
  return "emulated on the CPU";
#else
  return "CUDA " + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#endif
}
}  // namespace fca

STABLE_TORCH_LIBRARY_FRAGMENT(fused_clip_adam, m) {
  m.def(
      "cuda_norm(Tensor fixed, Tensor fresh, int chunks_at, int first_chunk, int chunks, int chunk_size, "
      "int grad_dtype, Tensor(a!) partials) -> ()");
  m.def(
      "cuda_prologue(Tensor fixed, Tensor fresh, int rows, Tensor? square_sums, Tensor? grad_scale, Tensor? found_inf, "
      "Tensor? observed, Tensor(a!) grad_square_sum, Tensor(b!) steps_skipped, bool skip_nonfinite, "
      "Tensor(c!) scalars) -> ()");
  m.def(
      "cuda_update_(Tensor fixed, Tensor fresh, int chunks_at, int first_chunk, int chunks, int chunk_size, "
      "int param_dtype, int grad_dtype, int state_dtype, Tensor scalars, bool coupled, bool amsgrad, int overshoot, "
      "int block, Tensor(a!)? grad_square_sum, Tensor(b!) partials, Tensor(c!) finished) -> ()");
  m.def("cuda_build(bool unused) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&fca::cuda_build));
}
