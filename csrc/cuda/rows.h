// The tensors of one row of the table, as update and reductions read them.
#pragma once

#include "../samples.h"
#include "slots.h"

namespace fca {

// g = w_0 S_0 + w_1 S_1 + ..., in that order, of up to TOGETHER samples in flight at once: load(b, x) asks for sample
// b, value(x, j) is its j-th element.
template <int TOGETHER, typename X, typename T, int HELD, typename Load, typename Value>
__device__ __forceinline__ void sum_samples(const double* weights, int64_t count, T (&g)[HELD], const Load& load,
                                            const Value& value) {
#pragma unroll
  for (int j = 0; j < HELD; ++j) g[j] = T(0);
#pragma unroll 1
  for (int64_t b = 0; b < count; b += TOGETHER) {
    T w[TOGETHER];
    X x[TOGETHER];
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) {
      w[k] = b + k < count ? static_cast<T>(weights[b + k]) : T(0);
      if (w[k] != T(0)) load(b + k, x[k]);
    }
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) {
      if (w[k] != T(0)) {
#pragma unroll
        for (int j = 0; j < HELD; ++j) g[j] += w[k] * value(x[k], j);
      }
    }
  }
}

// Tensors of one row whose storage types are known and whose 16-byte boundaries coincide. SAMPLED: its gradient slot is
// a stack of samples.
template <typename SP, typename SG, typename SS, bool SAMPLED = false, int WIDTH = 16 / sizeof(SP)>
struct RunsOfRow : Runs<WIDTH, WIDTH> {
  using T = float;
  static constexpr int kWidth = WIDTH;  // one word of the parameter a thread, of 16 bytes but for 16-bit samples
  using Access = Runs<kWidth, kWidth>;
  int64_t address[4];  // of param, grad, exp_avg, exp_avg_sq: copies, which no store can be thought to change
  const double* weights;
  int64_t samples, sample;  // how many, and bytes from one to the next

  __device__ __forceinline__ RunsOfRow(const Row& row, int64_t grad, const Samples& stack)
      : address{row.data[PARAM], grad, row.data[EXP_AVG], row.data[EXP_AVG_SQ]},
        weights(stack.weights),
        samples(row.samples),
        sample(row.sample * static_cast<int64_t>(sizeof(SG))) {}

  // Elements from the last 16-byte boundary to element `begin`.
  __device__ __forceinline__ int64_t pad(int64_t begin) const {
    return (address[PARAM] / static_cast<int64_t>(sizeof(SP)) + begin) % kWidth;
  }
  __device__ __forceinline__ bool fits() const {
    const int64_t back = pad(0);
    const int64_t off = (address[GRAD] - back * static_cast<int64_t>(sizeof(SG))) |
                        (address[EXP_AVG] - back * static_cast<int64_t>(sizeof(SS))) |
                        (address[EXP_AVG_SQ] - back * static_cast<int64_t>(sizeof(SS)));
    return off % 16 == 0 && (!SAMPLED || sample % (WIDTH * static_cast<int64_t>(sizeof(SG))) == 0);
  }

  template <int SLOT, bool WHOLE>
  __device__ __forceinline__ void read(const Span& span, T (&held)[Access::kHeld]) const {
    if constexpr (SLOT == PARAM) Access::template load<WHOLE, SP, T>(address[SLOT], span, held);
    if constexpr (SLOT == GRAD && !SAMPLED) Access::template load<WHOLE, SG, T>(address[SLOT], span, held);
    if constexpr (SLOT == GRAD && SAMPLED) read_samples<WHOLE>(span, held);
    if constexpr (SLOT == EXP_AVG || SLOT == EXP_AVG_SQ) Access::template load<WHOLE, SS, T>(address[SLOT], span, held);
  }
  template <bool WHOLE>
  __device__ __forceinline__ void read_samples(const Span& span, T (&held)[Access::kHeld]) const {
    if constexpr (WHOLE) {  // the words as they are stored: two bytes an element take half the registers
      using Words = typename Access::template Words<SG>;
      sum_samples<16 / sizeof(SG), Words>(  // 64 bytes
          weights, samples, held,
          [&](int64_t b, Words& words) {
            words.load(address[GRAD] + b * sample + (span.base + Access::place(0)) * static_cast<int64_t>(sizeof(SG)));
          },
          [](const Words& words, int j) { return words.template at<T>(j); });
    } else {
      struct Held {
        T x[Access::kHeld];
      };
      sum_samples<1, Held>(
          weights, samples, held,
          [&](int64_t b, Held& own) { Access::template load<false, SG, T>(address[GRAD] + b * sample, span, own.x); },
          [](const Held& own, int j) { return own.x[j]; });
    }
  }
  template <int SLOT, bool WHOLE>
  __device__ __forceinline__ void write(const Span& span, const T (&held)[Access::kHeld]) const {
    if constexpr (SLOT == PARAM) Access::template store<WHOLE, SP, T>(address[SLOT], span, held);
    if constexpr (SLOT == EXP_AVG || SLOT == EXP_AVG_SQ)
      Access::template store<WHOLE, SS, T>(address[SLOT], span, held);
  }
};

// Any row.
template <typename T_, bool SAMPLED = false>
struct SinglesOfRow : Singles {
  using T = T_;
  using Access = Singles;
  static constexpr int kWidth = 1;
  const Row& row;
  int64_t grad;
  const int64_t* record;  // null: memory order will do
  Samples stack;
  int64_t tensor;  // the row's number, for its noise

  __device__ __forceinline__ int64_t pad(int64_t) const { return 0; }

  template <int SLOT, bool WHOLE>
  __device__ __forceinline__ void read(const Span& span, T (&held)[Access::kHeld]) const {
    if constexpr (SLOT == GRAD && SAMPLED) return read_samples(span, held);
    Access::load<T>(row.dtype[SLOT < 2 ? SLOT : 2], SLOT == GRAD ? grad : row.data[SLOT], record, SLOT, span, held);
  }
  template <int SLOT, bool WHOLE>
  __device__ __forceinline__ void write(const Span& span, const T (&held)[Access::kHeld]) const {
    Access::store<T>(row.dtype[SLOT < 2 ? SLOT : 2], row.data[SLOT], record, SLOT, span, held);
  }

  __device__ __forceinline__ void read_samples(const Span& span, T (&held)[Access::kHeld]) const {
    const int64_t size = row.dtype[GRAD] == DType::F64 ? 8 : row.dtype[GRAD] == DType::F32 ? 4 : 2;
    struct One {
      T x[1];
    };
    sum_samples<4, One>(
        stack.weights, row.samples, held,
        [&](int64_t b, One& own) {
          Access::load<T>(row.dtype[GRAD], grad + b * row.sample * size, record, GRAD, span, own.x);
        },
        [](const One& own, int) { return own.x[0]; });
    const int64_t i = span.base + Access::place(0);
    if (stack.seed != nullptr && i >= span.begin && i < span.end) {
      held[0] += static_cast<T>(stack.noise * standard_normal(*stack.seed, tensor, i));
    }
  }
};

// Whether the elements of a row may be taken in memory order, where the rule does not mind: noise follows the logical.
__device__ __forceinline__ bool in_memory_order(const Row& row, const Samples& stack) {
  return stack.seed != nullptr ? row.strided == 0 : row.flat != 0;
}

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

// The same of rows of samples, whose scores may be narrower or wider than the parameter. Four elements a thread: 8
// bytes of 16-bit types, as eight elements and the sum over samples do not fit into 128 registers.
template <typename SP, typename SG, typename SS>
using RunsOfSamples = RunsOfRow<SP, SG, SS, true, 4>;

#define FCA_CHOOSE_SAMPLES(param, grad, state, CALL, otherwise)                                             \
  [&]() -> decltype(otherwise) {                                                                            \
    const auto is = [&](DType p, DType g, DType s) { return (param) == p && (grad) == g && (state) == s; }; \
    constexpr DType F32 = DType::F32, BF16 = DType::BF16, F16 = DType::F16;                                 \
    if (is(F32, F32, F32)) return CALL(float, float, float);                                                \
    if (is(F32, BF16, F32)) return CALL(float, BFloat16, float);                                            \
    if (is(F32, F16, F32)) return CALL(float, Float16, float);                                              \
    if (is(BF16, BF16, BF16)) return CALL(BFloat16, BFloat16, BFloat16);                                    \
    if (is(BF16, BF16, F32)) return CALL(BFloat16, BFloat16, float);                                        \
    if (is(BF16, F32, BF16)) return CALL(BFloat16, float, BFloat16);                                        \
    if (is(BF16, F32, F32)) return CALL(BFloat16, float, float);                                            \
    if (is(F16, F16, F32)) return CALL(Float16, Float16, float);                                            \
    return otherwise;                                                                                       \
  }()

}  // namespace fca
