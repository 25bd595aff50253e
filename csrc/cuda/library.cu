// The CUDA operators: by the phases of a step, whose tensors are described in fused_clip_adam/backends/device_table.py;
// then the objective, see cuda_objective.py there.
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
      "cuda_sample_squares(Tensor fixed, Tensor fresh, int chunks_at, int first_chunk, int chunks, int chunk_size, "
      "int grad_dtype, Tensor sample_weights, Tensor(a!) partials) -> ()");
  m.def(
      "cuda_prologue(Tensor fixed, Tensor fresh, int rows, Tensor? group_signals, Tensor? square_sums, "
      "Tensor? grad_scale, Tensor? found_inf, Tensor? observed, Tensor(a!) grad_square_sum, Tensor(b!) steps_skipped, "
      "bool skip_nonfinite, Tensor(c!) scalars) -> ()");
  m.def(
      "cuda_reduce(Tensor fixed, Tensor fresh, int chunks_at, int first_chunk, int chunks, int chunk_size, "
      "int param_dtype, int grad_dtype, int state_dtype, Tensor? scalars, int kind, bool coupled, bool spiked, "
      "Tensor? unit_factors, Tensor? unit_starts, Tensor? sample_weights, Tensor? seed, float noise, "
      "Tensor(a!) pairs) -> ()");
  m.def(
      "cuda_unit_sums(Tensor fixed, Tensor fresh, Tensor unit_chunks, int first_chunk, int chunks, int param_dtype, "
      "Tensor starts, Tensor? sample_weights, Tensor? seed, float noise, Tensor(a!) sums) -> ()");
  m.def(
      "cuda_update_(Tensor fixed, Tensor fresh, int chunks_at, int first_chunk, int chunks, int chunk_size, "
      "int param_dtype, int grad_dtype, int state_dtype, Tensor scalars, bool coupled, bool amsgrad, int overshoot, "
      "int block, bool guarded, Tensor? unit_factors, Tensor? unit_starts, Tensor(a!)? dots, "
      "Tensor(b!)? grad_square_sum, Tensor? sample_weights, Tensor? seed, float noise, Tensor(c!) partials, "
      "Tensor(d!) finished) -> ()");
  m.def(
      "cuda_policy_loss(Tensor logp, Tensor old_logp, Tensor advantages, Tensor? mask, Tensor? weights, Tensor? aux, "
      "Tensor? ref_logp, Tensor? entropy, Tensor? sequence_ids, Tensor? sequence_order, Tensor? sequence_offsets, "
      "int num_sequences, int rule, float[] scalars, Tensor? bounds, int aggregation, float normalizer, "
      "Tensor? normalizer_tensor, float kl_coef, int kl_estimator, float entropy_coef, Tensor(a!) loss, "
      "Tensor(b!) grad, Tensor(c!) grad_entropy, Tensor(d!) scale, Tensor(e!) stats, Tensor(f!) sequences, "
      "Tensor(g!) partials) -> ()");
  m.def(
      "cuda_bound_sums(Tensor logp, Tensor old_logp, Tensor advantages, Tensor? mask, float[] lows, float[] highs, "
      "Tensor(a!) partials, Tensor(b!) out) -> ()");
  m.def(
      "cuda_logits_forward(Tensor logits, Tensor tokens, Tensor? mask, float inv_temperature, Tensor(a!) logp, "
      "Tensor(b!)? entropy, Tensor(c!) softmax) -> ()");
  m.def(
      "cuda_logits_backward(Tensor logits, Tensor tokens, Tensor softmax, Tensor entropy, Tensor grad_logp, "
      "Tensor? grad_entropy, float inv_temperature, Tensor(a!) out) -> ()");
  m.def("cuda_build(bool unused) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&fca::cuda_build));
}
