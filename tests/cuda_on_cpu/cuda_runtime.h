// Runs CUDA kernels as plain C++ on one CPU thread, to find their bugs: a test tool, not an emulator of a GPU.
//
//   g++ -std=c++17 -O1 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all -fvisibility=hidden
//       -Wno-unknown-pragmas -Itests/cuda_on_cpu -x c++ kernel.cu
//
// The include path puts this file in place of NVIDIA's. machine.h runs the threads; here are CUDA's names. CUDA_ON_CPU
// is defined; __CUDACC__ and __CUDA_ARCH__ are not. A launch runs at once: blocks one after another, the threads of a
// block as fibers that give way only at barriers and warp operations. Environment, read at every launch:
//   CUDA_ON_CPU_ORDER  forward (default): blocks in order, and of the threads that can run always the lowest.
//                      reverse: the opposite. shuffle: both at random, another order after every barrier.
//   CUDA_ON_CPU_SEED   of shuffle (default 1). The same seed, grid and block give the same order in every launch.
//
// What it finds: what AddressSanitizer and UBSan find (bounds of device and shared memory, alignment of vector types,
// integer overflow), a missing barrier (results change with the order; shared memory is poisoned before every block,
// with NaN bytes or, in reverse, with huge numbers), work that depends on the order of blocks, barriers that not all
// threads reach, warp masks that do not fit the lanes that come, launches that CUDA refuses. A finding aborts and says
// what every thread of the block waits for.
// Stricter than the hardware: a thread that has returned does not count for a barrier or a mask, a mask may not name
// lanes beyond the block's last thread, and all threads must wait at the same __syncthreads() of the source.
//
// What it does not model:
// - Concurrency. Between two barriers a thread runs undisturbed, so atomics are plain operations, fences do nothing,
//   and no order of memory operations is ever observed; a kernel that spins until another thread or block writes
//   something hangs. Run compute-sanitizer's racecheck on a GPU for these.
// - Streams, events, graphs, several devices, timing, occupancy. Every stream is the default one, and synchronous.
// - Resources: registers, 48 KiB of static shared memory, __launch_bounds__, thread-local stacks (256 KiB here).
// - Which memory is the device's: a kernel may touch host memory, and the host the device's.
// - Sticky errors: a bad access aborts here, on CUDA every later call returns its error.
// - Floating point: that of the host. exp, pow and the like differ from the device's in the last bits.
// - Inline PTX, textures, clusters, cooperative launches, cp.async, __activemask, cuda_fp16.h and cuda_bf16.h types.
// - `extern __shared__`: dynamic shared memory is cuda_on_cpu::dynamic_shared<T>(). `alignas` goes before `__shared__`.
#pragma once

#define CUDA_ON_CPU 1

#include "machine.h"

// ---------------------------------------------------------------- the language

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
// One copy serves all blocks, as they run one after another. The tag changes nothing but the variable's mangled name,
// by which poison_shared_memory() finds it in the symbol table: neither a section (ignored by g++ in templates) nor
// thread_local (no AddressSanitizer red zones) would do.
#define __shared__ static __attribute__((abi_tag("cuda_on_cpu_shared")))

inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
// Vectors of two and four are aligned to their size, those of three to their element.
#define CUDA_ON_CPU_VECTOR_2(name, type)                   \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }
#define CUDA_ON_CPU_VECTOR_3(name, type) \
  struct name##3 { type x, y, z; };      \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }
#define CUDA_ON_CPU_VECTOR_4(name, type)                         \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; }; \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
// clang-format off
#define CUDA_ON_CPU_SMALL(name, type) CUDA_ON_CPU_VECTOR_2(name, type) CUDA_ON_CPU_VECTOR_4(name, type)
CUDA_ON_CPU_SMALL(char, signed char) CUDA_ON_CPU_SMALL(uchar, unsigned char)
CUDA_ON_CPU_SMALL(short, short) CUDA_ON_CPU_SMALL(ushort, unsigned short)
CUDA_ON_CPU_SMALL(int, int) CUDA_ON_CPU_SMALL(uint, unsigned) CUDA_ON_CPU_SMALL(float, float)
CUDA_ON_CPU_VECTOR_2(double, double) CUDA_ON_CPU_VECTOR_2(longlong, long long)
CUDA_ON_CPU_VECTOR_2(ulonglong, unsigned long long)
CUDA_ON_CPU_VECTOR_3(int, int) CUDA_ON_CPU_VECTOR_3(float, float)
// clang-format on

#pragma GCC visibility push(hidden)  // as in machine.h

    // ---------------------------------------------------------------- errors

    inline const char* cudaGetErrorName(cudaError_t error) {
#define CUDA_ON_CPU_NAME(name, code) \
  if (error == name) return #name;
  CUDA_ON_CPU_ERRORS(CUDA_ON_CPU_NAME)
#undef CUDA_ON_CPU_NAME
  return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : cudaGetErrorName(error);
}

// ---------------------------------------------------------------- device functions

namespace cuda_on_cpu {
template <class T>
T shuffle(Op op, unsigned mask, T value, unsigned operand, int width, const Site& site) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 32 or 64 bits");
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    die("%s:%d: shuffle of width %d", site.file, site.line, width);
  const int64_t lane = machine.current % 32, begin = lane & -width, end = begin + width;
  int64_t source = lane;
  if (op == Op::SHFL) source = begin + (operand & (width - 1));
  if (op == Op::SHFL_UP && lane - int64_t(operand) >= begin) source = lane - operand;
  if (op == Op::SHFL_DOWN && lane + int64_t(operand) < end) source = lane + operand;
  if (op == Op::SHFL_XOR && (lane ^ int64_t(operand)) < end) source = lane ^ operand;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_barrier(op, mask, bits, sizeof(T), static_cast<int>(source), site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_SITE const cuda_on_cpu::Site& site = cuda_on_cpu::here()
#define CUDA_ON_CPU_SHUFFLE(name, op, operand)                                                               \
  template <class T>                                                                                         \
  T name(unsigned mask, T value, operand, int width = 32, CUDA_ON_CPU_SITE) {                                \
    return cuda_on_cpu::shuffle(cuda_on_cpu::Op::op, mask, value, static_cast<unsigned>(lane), width, site); \
  }
CUDA_ON_CPU_SHUFFLE(__shfl_sync, SHFL, int lane)
CUDA_ON_CPU_SHUFFLE(__shfl_up_sync, SHFL_UP, unsigned lane)
CUDA_ON_CPU_SHUFFLE(__shfl_down_sync, SHFL_DOWN, unsigned lane)
CUDA_ON_CPU_SHUFFLE(__shfl_xor_sync, SHFL_XOR, int lane)
#undef CUDA_ON_CPU_SHUFFLE

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::warp_barrier(cuda_on_cpu::Op::SYNCWARP, mask, 0, 0, -1, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return static_cast<unsigned>(cuda_on_cpu::warp_barrier(cuda_on_cpu::Op::BALLOT, mask, predicate != 0, 0, -1, site));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::warp_barrier(cuda_on_cpu::Op::ANY, mask, predicate != 0, 0, -1, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::warp_barrier(cuda_on_cpu::Op::ALL, mask, predicate != 0, 0, -1, site) == mask;
}
inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::block_barrier(cuda_on_cpu::Op::SYNCTHREADS, 0, site); }
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier(cuda_on_cpu::Op::SYNCTHREADS_COUNT, predicate != 0, site);
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_SITE) {
  const int count = cuda_on_cpu::block_barrier(cuda_on_cpu::Op::SYNCTHREADS_AND, predicate != 0, site);
  return count == static_cast<int>(cuda_on_cpu::machine.block_threads);
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier(cuda_on_cpu::Op::SYNCTHREADS_OR, predicate != 0, site) != 0;
}
#undef CUDA_ON_CPU_SITE

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
[[noreturn]] inline void __trap() { cuda_on_cpu::die("__trap()"); }

namespace cuda_on_cpu {
template <class T>
struct Same {
  using type = T;  // not deduced: atomicAdd(unsigned*, 1) adds an unsigned
};
template <class T, class... Allowed>
constexpr bool is_one_of = (std::is_same<T, Allowed>::value || ...);
using ull = unsigned long long;

template <class T>
T wrapping_sum(T a, T b) {
  if constexpr (std::is_floating_point<T>::value) {
    return a + b;
  } else {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
  }
}
}  // namespace cuda_on_cpu

// As overloaded by CUDA: int64_t (long) is not among the types, unsigned long long is.
#define CUDA_ON_CPU_ATOMIC(name, result, ...)                                                  \
  template <class T>                                                                           \
  T name(T* address, typename cuda_on_cpu::Same<T>::type value) {                              \
    static_assert(cuda_on_cpu::is_one_of<T, __VA_ARGS__>, #name " of a type that CUDA lacks"); \
    const T old = *address;                                                                    \
    *address = result;                                                                         \
    return old;                                                                                \
  }
CUDA_ON_CPU_ATOMIC(atomicAdd, cuda_on_cpu::wrapping_sum(old, value), int, unsigned, cuda_on_cpu::ull, float, double)
CUDA_ON_CPU_ATOMIC(atomicExch, value, int, unsigned, cuda_on_cpu::ull, float)
CUDA_ON_CPU_ATOMIC(atomicMax, old > value ? old : value, int, unsigned, cuda_on_cpu::ull, long long)
CUDA_ON_CPU_ATOMIC(atomicMin, old < value ? old : value, int, unsigned, cuda_on_cpu::ull, long long)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value, int, unsigned, cuda_on_cpu::ull)
CUDA_ON_CPU_ATOMIC(atomicAnd, old& value, int, unsigned, cuda_on_cpu::ull)
CUDA_ON_CPU_ATOMIC(atomicInc, old >= value ? 0u : old + 1u, unsigned)
#undef CUDA_ON_CPU_ATOMIC

template <class T>
T atomicCAS(T* address, typename cuda_on_cpu::Same<T>::type expected, typename cuda_on_cpu::Same<T>::type value) {
  static_assert(cuda_on_cpu::is_one_of<T, int, unsigned, cuda_on_cpu::ull, unsigned short>,
                "atomicCAS of a type that CUDA lacks");
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

#define CUDA_ON_CPU_LOAD(name)                                                     \
  template <class T>                                                               \
  T name(const T* address) {                                                       \
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 16, #name); \
    return *address;                                                               \
  }
#define CUDA_ON_CPU_STORE(name)                                                    \
  template <class T>                                                               \
  void name(T* address, typename cuda_on_cpu::Same<T>::type value) {               \
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 16, #name); \
    *address = value;                                                              \
  }
// clang-format off
CUDA_ON_CPU_LOAD(__ldg) CUDA_ON_CPU_LOAD(__ldca) CUDA_ON_CPU_LOAD(__ldcg) CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_LOAD(__ldlu) CUDA_ON_CPU_LOAD(__ldcv)
CUDA_ON_CPU_STORE(__stwb) CUDA_ON_CPU_STORE(__stcg) CUDA_ON_CPU_STORE(__stcs) CUDA_ON_CPU_STORE(__stwt)
// clang-format on
#undef CUDA_ON_CPU_LOAD
#undef CUDA_ON_CPU_STORE

#define CUDA_ON_CPU_BITS(name, from, to)      \
  inline to name(from value) {                \
    to result;                                \
    std::memcpy(&result, &value, sizeof(to)); \
    return result;                            \
  }
        CUDA_ON_CPU_BITS(__float_as_int, float, int) CUDA_ON_CPU_BITS(__float_as_uint, float, unsigned)
            CUDA_ON_CPU_BITS(__int_as_float, int, float) CUDA_ON_CPU_BITS(__uint_as_float, unsigned, float)
                CUDA_ON_CPU_BITS(__double_as_longlong, double, long long)
                    CUDA_ON_CPU_BITS(__longlong_as_double, long long, double)
#undef CUDA_ON_CPU_BITS

                        using std::max;
using std::min;
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

// ---------------------------------------------------------------- host functions

// clang-format off
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice,
                      cudaMemcpyDefault };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75,
                      cudaDevAttrComputeCapabilityMinor = 76, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
// clang-format on
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline cudaError_t cudaPeekAtLastError() { return cuda_on_cpu::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (n > 0) std::memcpy(to, from, n);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t = nullptr) {
  if (n > 0) std::memset(to, value, n);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device == 0) return cudaSuccess;
  return cuda_on_cpu::last_error = cudaErrorInvalidDevice;
}
// Three multiprocessors of an sm_90 with two blocks each: few enough that grid-stride loops go round.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cuda_on_cpu::last_error = cudaErrorInvalidDevice;
  *value = attribute == cudaDevAttrMultiProcessorCount            ? 3
           : attribute == cudaDevAttrComputeCapabilityMajor       ? 9
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 << 10
                                                                  : 0;
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > (227 << 10)) {
    return cuda_on_cpu::last_error = cudaErrorInvalidValue;
  }
  cuda_on_cpu::machine.dynamic_limits[reinterpret_cast<void*>(kernel)] = value;
  return cudaSuccess;
}

#pragma GCC visibility pop
