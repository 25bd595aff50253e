// The operators of the package, by the phases of a step, then the objectives. CPU kernels register beside their code.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "isa.h"

namespace fca {
std::string cpu_capability(bool) {
  switch (isa()) {
    case Isa::AVX512:
      return "avx512";
    case Isa::AVX2:
      return "avx2";
    default:
      return "baseline";
  }
}
}  // namespace fca

STABLE_TORCH_LIBRARY(fused_clip_adam, m) {
  m.def(
      "tensor_table(Tensor[] params, Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, "
      "Tensor[] max_exp_avg_sqs, Tensor[] steps, Tensor[] bias_weights, int group, int samples=-1) -> Tensor");
  m.def("grad_square_sums(Tensor table) -> Tensor");
  m.def(
      "prologue(Tensor group_scalars, Tensor? group_signals, Tensor? square_sums, Tensor? grad_scale, "
      "Tensor? found_inf, Tensor? observed, Tensor(a!) grad_square_sum, Tensor(b!) steps_skipped, bool skip_nonfinite) "
      "-> Tensor");
  m.def("tensor_scalars(Tensor table, Tensor group_scalars, Tensor control) -> Tensor");
  m.def(
      "reduce(Tensor table, Tensor? scalars, int kind, bool coupled, bool spiked, Tensor? unit_factors, "
      "Tensor? sample_weights=None, Tensor? seed=None, float noise=0.0, int first_row=0) -> Tensor");
  m.def(
      "unit_sums(Tensor table, Tensor? sample_weights=None, Tensor? seed=None, float noise=0.0, int first_row=0) -> "
      "Tensor");
  m.def("sample_square_sums(Tensor table, Tensor sample_weights) -> Tensor");
  m.def(
      "update_(Tensor table, Tensor scalars, bool coupled, bool amsgrad, int overshoot, int block, bool guarded, "
      "Tensor? unit_factors, Tensor(a!)? momentum_dots, Tensor(b!)? grad_square_sum, "
      "Tensor? sample_weights=None, Tensor? seed=None, float noise=0.0, int first_row=0) -> ()");
  m.def(
      "policy_loss(Tensor logp, Tensor old_logp, Tensor advantages, Tensor? mask, Tensor? weights, Tensor? aux, "
      "Tensor? ref_logp, Tensor? entropy, Tensor? sequence_ids, Tensor? sequence_order, Tensor? sequence_offsets, "
      "int num_sequences, int rule, float[] scalars, Tensor? bounds, int aggregation, float normalizer, "
      "Tensor? normalizer_tensor, float kl_coef, int kl_estimator, float entropy_coef, bool want_grad) "
      "-> (Tensor loss, Tensor grad, Tensor grad_entropy, Tensor scale, Tensor stats)");
  m.def(
      "bound_sums(Tensor logp, Tensor old_logp, Tensor advantages, Tensor? mask, float[] lows, float[] highs) -> "
      "Tensor");
  m.def(
      "logits_forward(Tensor logits, Tensor tokens, Tensor? mask, float inv_temperature, bool want_entropy) "
      "-> (Tensor logp, Tensor entropy, Tensor softmax)");
  m.def(
      "logits_backward(Tensor logits, Tensor tokens, Tensor softmax, Tensor entropy, Tensor grad_logp, "
      "Tensor? grad_entropy, float inv_temperature, Tensor(a!) out) -> ()");
  m.def("cpu_capability(bool unused) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&fca::cpu_capability));
}
