// The tensors of one row of the table, as update and reductions read them.
#pragma once

#include "slots.h"

namespace fca {

// Tensors of one row whose storage types are known and whose 16-byte boundaries coincide.
template <typename SP, typename SG, typename SS>
struct RunsOfRow : Runs<16 / sizeof(SP), 16 / sizeof(SP)> {
  using T = float;
  static constexpr int kWidth = 16 / sizeof(SP);  // one 16-byte word of the parameter a thread
  using Access = Runs<kWidth, kWidth>;
  int64_t address[4];  // of param, grad, exp_avg, exp_avg_sq: copies, which no store can be thought to change

  __device__ __forceinline__ RunsOfRow(const Row& row, int64_t grad)
      : address{row.data[PARAM], grad, row.data[EXP_AVG], row.data[EXP_AVG_SQ]} {}

  // Elements from the last 16-byte boundary to element `begin`.
  __device__ __forceinline__ int64_t pad(int64_t begin) const {
    return (address[PARAM] / static_cast<int64_t>(sizeof(SP)) + begin) % kWidth;
  }
  __device__ __forceinline__ bool fits() const {
    const int64_t back = pad(0);
    const int64_t off = (address[GRAD] - back * static_cast<int64_t>(sizeof(SG))) |
                        (address[EXP_AVG] - back * static_cast<int64_t>(sizeof(SS))) |
                        (address[EXP_AVG_SQ] - back * static_cast<int64_t>(sizeof(SS)));
    return off % 16 == 0;
  }

  template <int SLOT, bool WHOLE>
  __device__ __forceinline__ void read(const Span& span, T (&held)[Access::kHeld]) const {
    if constexpr (SLOT == PARAM) Access::template load<WHOLE, SP, T>(address[SLOT], span, held);
    if constexpr (SLOT == GRAD) Access::template load<WHOLE, SG, T>(address[SLOT], span, held);
    if constexpr (SLOT == EXP_AVG || SLOT == EXP_AVG_SQ) Access::template load<WHOLE, SS, T>(address[SLOT], span, held);
  }
  template <int SLOT, bool WHOLE>
  __device__ __forceinline__ void write(const Span& span, const T (&held)[Access::kHeld]) const {
    if constexpr (SLOT == PARAM) Access::template store<WHOLE, SP, T>(address[SLOT], span, held);
    if constexpr (SLOT == EXP_AVG || SLOT == EXP_AVG_SQ)
      Access::template store<WHOLE, SS, T>(address[SLOT], span, held);
  }
};

// Any row.
template <typename T_>
struct SinglesOfRow : Singles {
  using T = T_;
  using Access = Singles;
  static constexpr int kWidth = 1;
  const Row& row;
  int64_t grad;
  const int64_t* record;  // null: memory order will do

  __device__ __forceinline__ int64_t pad(int64_t) const { return 0; }

  template <int SLOT, bool WHOLE>
  __device__ __forceinline__ void read(const Span& span, T (&held)[Access::kHeld]) const {
    Access::load<T>(row.dtype[SLOT < 2 ? SLOT : 2], SLOT == GRAD ? grad : row.data[SLOT], record, SLOT, span, held);
  }
  template <int SLOT, bool WHOLE>
  __device__ __forceinline__ void write(const Span& span, const T (&held)[Access::kHeld]) const {
    Access::store<T>(row.dtype[SLOT < 2 ? SLOT : 2], row.data[SLOT], record, SLOT, span, held);
  }
};

// The factors of a tensor's output rows; `factors` is null where there are none.
struct Units {
  const double* factors;
  int64_t length;

  template <typename RowAccess, typename T, int HELD>
  __device__ __forceinline__ void scale(const RowAccess&, const Span& span, T (&g)[HELD]) const {
    if (factors == nullptr) return;
#pragma unroll
    for (int j = 0; j < HELD; ++j) {
      const int64_t i = span.base + RowAccess::place(j);
      if (i >= span.begin && i < span.end) g[j] *= static_cast<T>(factors[i / length]);
    }
  }
};

// The row's 5 storage types that have loops of their own: what CALL<SP, SG, SS> makes of them, else `otherwise`.
#define FCA_CHOOSE_RUNS(param, grad, state, CALL, otherwise)                                                \
  [&]() -> decltype(otherwise) {                                                                            \
    const auto is = [&](DType p, DType g, DType s) { return (param) == p && (grad) == g && (state) == s; }; \
    constexpr DType F32 = DType::F32, BF16 = DType::BF16, F16 = DType::F16;                                 \
    if (is(F32, F32, F32)) return CALL(float, float, float);                                                \
    if (is(BF16, BF16, BF16)) return CALL(BFloat16, BFloat16, BFloat16);                                    \
    if (is(BF16, BF16, F32)) return CALL(BFloat16, BFloat16, float);                                        \
    if (is(BF16, F32, F32)) return CALL(BFloat16, float, float);                                            \
    if (is(F16, F16, F32)) return CALL(Float16, Float16, float);                                            \
    return otherwise;                                                                                       \
  }()

}  // namespace fca
