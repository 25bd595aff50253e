// What a step knows of its tensors: one row each, with addresses, dtypes and strides. Host and device, no torch.
//
// The operator `tensor_table` (cpu/table.cpp) fills it in from lists of tensors; the CPU kernels read it where it is,
// the GPU backends read a copy on the device (fused_clip_adam/backends/device_table.py).
#pragma once

#include <cstdint>

namespace fca {

// The storage types of parameters, gradients, states and log-probabilities.
enum class DType : int64_t { F64 = 0, F32 = 1, BF16 = 2, F16 = 3 };

enum Slot : int64_t { PARAM = 0, GRAD = 1, EXP_AVG = 2, EXP_AVG_SQ = 3, MAX_EXP_AVG_SQ = 4, kSlots = 5 };

struct Row {
  int64_t data[kSlots];  // addresses; 0 where absent (max_exp_avg_sq). On a device the gradient's is not read from here
  int64_t step;          // address of the 0-d float32 or float64 step
  int64_t step_is_f64;
  int64_t bias_weights;  // address of float64[2] = (W1, W2), or 0: bias corrections follow from step
  int64_t numel;
  DType dtype[3];  // of param, grad and the states
  int64_t flat;    // 1: all tensors share one dense memory order
  int64_t
      strided;  // 0: all C-contiguous, else the offset, from the table's word 0, of (ndim, sizes, strides of the slots)
  int64_t group;    // the parameter group: which row of group_scalars and control
  int64_t unit;     // elements of an output row: of one index of the first dimension; all of them below two dimensions
  int64_t samples;  // < 0: the gradient slot is a gradient; else how many samples it stacks (samples.h)
  int64_t sample;   // elements from one sample to the next
};
static_assert(sizeof(Row) % sizeof(int64_t) == 0, "rows are int64");
constexpr int64_t kRow = sizeof(Row) / sizeof(int64_t);

}  // namespace fca
