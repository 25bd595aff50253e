// Storage types of parameters, gradients, states and log-probabilities, and their conversion to the arithmetic type.
// Host and device, no torch, no CUDA headers. tests/test_step.py tries all 65,536 patterns of each 16-bit type.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FCA_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__) || defined(__clang__)
#define FCA_INLINE inline __attribute__((always_inline))
#else
#define FCA_INLINE inline
#endif

namespace fca {

template <typename To, typename From>
FCA_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// ---------------------------------------------------------------- one element: storage <-> arithmetic

template <typename T, typename S>
FCA_INLINE T load_as(S x) {
  return static_cast<T>(x);
}

template <>
FCA_INLINE float load_as<float, BFloat16>(BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

// Reading the half's exponent field as a float's leaves the value 2^112 too small, subnormals included.
template <>
FCA_INLINE float load_as<float, Float16>(Float16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;  // inf and NaN keep their class
  return bit_cast<float>(bits | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
#endif
}

template <typename S, typename T>
FCA_INLINE S store_as(T x) {
  return static_cast<S>(x);
}

// Round to nearest even; NaN becomes the quiet NaN torch writes.
template <>
FCA_INLINE BFloat16 store_as<BFloat16, float>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t rounded_bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded_bits) : "f"(x));
  return {rounded_bits};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
#endif
}

template <>
FCA_INLINE Float16 store_as<Float16, float>(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t rounded_bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded_bits) : "f"(x));
  return {rounded_bits};
#else
  const uint32_t sign = (bit_cast<uint32_t>(x) >> 16) & 0x8000u;
  const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 0.5 moves the half's subnormal grid (2^-24) onto the float's last bit: the addition does the rounding.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t bits = magnitude < 0x38800000u ? subnormal : normal;
  bits = magnitude >= 0x477ff000u ? 0x7c00u : bits;  // 65520 and above round to infinity
  bits = magnitude > 0x7f800000u ? 0x7e00u : bits;
  return {static_cast<uint16_t>(bits | sign)};
#endif
}

}  // namespace fca
