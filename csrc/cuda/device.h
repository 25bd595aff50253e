// What every CUDA source shares: launching on torch's stream, errors that name the kernel, block-wide sums.
//
// The same sources are compiled as plain C++ by tests/cuda_on_cpu (CUDA_ON_CPU), which supplies a cuda_runtime.h of
// its own and runs them under the sanitizers.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <optional>

#include "../check_args.h"
#include "../samples.h"
#include "../update_math.h"

#if defined(CUDA_ON_CPU)
#define FCA_DEVICE_KEY CPU
#define FCA_RUN(kernel, name, grid, threads, stream, ...) \
  cuda_on_cpu::launch(kernel, name, dim3(grid), dim3(threads), 0, stream, __VA_ARGS__)
#else
#define FCA_DEVICE_KEY CUDA
#define FCA_RUN(kernel, name, grid, threads, stream, ...) kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif
// The key is itself a macro: one more expansion before torch's macro pastes it into a name.
#define FCA_REGISTER_FOR(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define FCA_REGISTER(m) FCA_REGISTER_FOR(fused_clip_adam, FCA_DEVICE_KEY, m)

namespace fca {

constexpr int kThreads = 256;  // of norm and update blocks
constexpr int kWarp = 32;

// A 0-d float32 or float64 tensor; null: absent.
struct DeviceScalar {
  const void* data;
  bool is_f64;
  __device__ __forceinline__ double read(double absent) const {
    if (data == nullptr) return absent;
    return is_f64 ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
  }
};

inline DeviceScalar device_scalar(const std::optional<Tensor>& tensor, const char* name) {
  if (!tensor) return {nullptr, false};
  check(tensor->numel() == 1, name, " must hold one element, got ", tensor->numel());
  const DType dtype = floating_dtype(*tensor, name);
  check(dtype == DType::F64 || dtype == DType::F32, name, " must be float32 or float64");
  return {tensor->const_data_ptr(), dtype == DType::F64};
}

struct Chunk {
  int64_t row, begin;
};

// sample_weights: float64 [samples], where gradients are stacks of samples; seed: int64 [1].
inline Samples samples_of(const std::optional<Tensor>& sample_weights, const std::optional<Tensor>& seed,
                          double noise) {
  if (seed) check_buffer(*seed, ScalarType::Long, 1, "seed");
  return {sample_weights ? const_data<double>(*sample_weights) : nullptr, seed ? const_data<int64_t>(*seed) : nullptr,
          noise};
}

// Makes a tensor's device and torch's current stream there the ones to launch on.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor)
#if defined(CUDA_ON_CPU)
      {}
#else
      : guard_(tensor.get_device()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif

  // One launch. An error of an earlier kernel is reported as such, not as this one's.
  template <typename Kernel, typename... Args>
  void run(const char* name, Kernel kernel, int64_t blocks, int threads, const Args&... args) const {
    report(cudaGetLastError(), "found before the launch of ", name);
    check(blocks <= 0x7fffffff, "CUDA kernel ", name, ": ", blocks, " blocks; accepted: up to 2147483647");
    FCA_RUN(kernel, name, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), stream_, args...);
    report(cudaGetLastError(), "in the launch of ", name);
    // An error inside a kernel surfaces at the next wait, wherever that is: this finds out which kernel it was.
    static const char* const wait = std::getenv("FUSED_CLIP_ADAM_SYNC");
    if (wait != nullptr && *wait == '1') report(cudaStreamSynchronize(stream_), "while running ", name);
  }

 private:
  static void report(cudaError_t error, const char* where, const char* name) {
    check(error == cudaSuccess, "CUDA error ", where, "fused_clip_adam's kernel ", name, ": ", cudaGetErrorName(error),
          " (", cudaGetErrorString(error), ")");
  }

#if !defined(CUDA_ON_CPU)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// ---------------------------------------------------------------- reductions

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) x += __shfl_xor_sync(0xffffffffu, x, width);
  return x;
}

// The sum over the block, in the same order every time; every thread receives it. `fold`: shared, one entry a warp.
template <int THREADS>
__device__ __forceinline__ double block_sum(double x, double* fold) {
  static_assert(THREADS % kWarp == 0 && THREADS <= 1024, "whole warps");
  x = warp_sum(x);
  __syncthreads();  // the previous sum's readers are done with `fold`
  if (threadIdx.x % kWarp == 0) fold[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / kWarp; ++warp) sum += fold[warp];
  return sum;
}

// The largest over the block of numbers that are not negative; every thread receives it.
template <int THREADS>
__device__ __forceinline__ double block_max(double x, double* fold) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) {
    const double other = __shfl_xor_sync(0xffffffffu, x, width);
    x = other > x ? other : x;
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) fold[threadIdx.x / kWarp] = x;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < THREADS / kWarp; ++warp) x = fold[warp] > x ? fold[warp] : x;
  return x;
}

// The sum over a block of as many whole warps as it was launched with.
__device__ __forceinline__ double block_sum(double x, double* fold) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) fold[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += fold[warp];
  return sum;
}

}  // namespace fca
