// Which instruction set a loop runs on: each leaf loop is compiled three times and chosen once, at load.
//
// The loops keep a fixed number of accumulators and no contraction to fused multiply-add (-ffp-contract=off), so every
// variant gives the same bits; tests compare them. FUSED_CLIP_ADAM_CPU_ISA=baseline|avx2|avx512 lowers the choice.
#pragma once

#include <cstdlib>
#include <cstring>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define FCA_X86 1
#if defined(__clang__)
#define FCA_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define FCA_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#define FCA_TARGET_AVX2 __attribute__((target("avx2")))
#else
#define FCA_X86 0
#endif

#if defined(__GNUC__) || defined(__clang__)
#define FCA_LAMBDA_INLINE __attribute__((always_inline))
#define FCA_PREFETCH(address) __builtin_prefetch(address, 0, 3)
#else
#define FCA_LAMBDA_INLINE
#define FCA_PREFETCH(address) ((void)0)
#endif

namespace fca {

enum class Isa { BASELINE = 0, AVX2 = 1, AVX512 = 2 };

inline Isa detect_isa() {
#if FCA_X86
  __builtin_cpu_init();
  Isa best = Isa::BASELINE;
  if (__builtin_cpu_supports("avx2")) best = Isa::AVX2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    best = Isa::AVX512;
  }
  if (const char* wanted = std::getenv("FUSED_CLIP_ADAM_CPU_ISA")) {
    if (std::strcmp(wanted, "baseline") == 0) best = Isa::BASELINE;
    if (std::strcmp(wanted, "avx2") == 0 && best == Isa::AVX512) best = Isa::AVX2;
  }
  return best;
#else
  return Isa::BASELINE;
#endif
}

inline Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

}  // namespace fca

// FCA_LEAF(result, name, (parameters), (arguments)) defines `name` from the always-inlined template `name##_body`,
// compiled for each instruction set. `TEMPLATE` is the parenthesised template header, `TARGS` its arguments.
#define FCA_UNPAREN(...) __VA_ARGS__
#if FCA_X86
#define FCA_LEAF(TEMPLATE, TARGS, RESULT, NAME, PARAMS, ARGS) \
  template <FCA_UNPAREN TEMPLATE>                             \
  FCA_TARGET_AVX512 RESULT NAME##_avx512 PARAMS {             \
    return NAME##_body<FCA_UNPAREN TARGS> ARGS;               \
  }                                                           \
  template <FCA_UNPAREN TEMPLATE>                             \
  FCA_TARGET_AVX2 RESULT NAME##_avx2 PARAMS {                 \
    return NAME##_body<FCA_UNPAREN TARGS> ARGS;               \
  }                                                           \
  template <FCA_UNPAREN TEMPLATE>                             \
  RESULT NAME##_baseline PARAMS {                             \
    return NAME##_body<FCA_UNPAREN TARGS> ARGS;               \
  }                                                           \
  template <FCA_UNPAREN TEMPLATE>                             \
  RESULT NAME PARAMS {                                        \
    switch (isa()) {                                          \
      case Isa::AVX512:                                       \
        return NAME##_avx512<FCA_UNPAREN TARGS> ARGS;         \
      case Isa::AVX2:                                         \
        return NAME##_avx2<FCA_UNPAREN TARGS> ARGS;           \
      default:                                                \
        return NAME##_baseline<FCA_UNPAREN TARGS> ARGS;       \
    }                                                         \
  }
#else
#define FCA_LEAF(TEMPLATE, TARGS, RESULT, NAME, PARAMS, ARGS) \
  template <FCA_UNPAREN TEMPLATE>                             \
  RESULT NAME PARAMS {                                        \
    return NAME##_body<FCA_UNPAREN TARGS> ARGS;               \
  }
#endif
