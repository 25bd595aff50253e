// Phase 1: the sum of squares of the gradients, in float64. Reads 4 B per float32 element and writes 8 B a chunk.
//
// Two stages: one partial sum a chunk here, the partial sums in a fixed order in the prologue. float64 cannot overflow
// on squares of float32, so the result is finite exactly when every gradient is. Two operations an element: even a
// device with 1/64 of its float32 rate in float64 waits for memory, not for them.
#include "slots.h"

namespace fca {
namespace {

template <typename S, typename T, int WIDTH>
__device__ __forceinline__ double sum_squares_runs(int64_t address, int64_t begin, int64_t end) {
  using Access = Runs<WIDTH, 16>;  // one tensor only: twice the elements a thread keep as much in flight as an update's
  const int64_t pad = (address / static_cast<int64_t>(sizeof(S)) + begin) % WIDTH;  // back to the last 16-byte boundary
  double sum = 0;
  for (int64_t base = begin - pad; base < end; base += Access::kTile) {
    const Span span = {base, begin, end};
    T g[Access::kHeld];
    if (Access::whole(span)) {
      Access::template load<true, S, T>(address, span, g);
    } else {
      Access::template load<false, S, T>(address, span, g);
    }
#pragma unroll
    for (int j = 0; j < Access::kHeld; ++j) sum += static_cast<double>(g[j]) * static_cast<double>(g[j]);
  }
  return sum;
}

template <typename T>
__device__ __forceinline__ double sum_squares_singles(DType dtype, int64_t address, const int64_t* record,
                                                      int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t base = begin; base < end; base += Singles::kTile) {
    T g[Singles::kHeld];
    Singles::load<T>(dtype, address, record, GRAD, {base, begin, end}, g);
#pragma unroll
    for (int j = 0; j < Singles::kHeld; ++j) sum += static_cast<double>(g[j]) * static_cast<double>(g[j]);
  }
  return sum;
}

template <typename S, typename T>
__global__ void __launch_bounds__(kThreads) norm_kernel(const int64_t* fixed, const int64_t* grads, const Chunk* chunks,
                                                        int64_t chunk_size, DType dtype, double* partials) {
  __shared__ double fold[kThreads / kWarp];
  const Chunk chunk = chunks[blockIdx.x];
  const Row& row = reinterpret_cast<const Row*>(fixed)[chunk.row];
  const int64_t end = chunk.begin + chunk_size < row.numel ? chunk.begin + chunk_size : row.numel;
  const int64_t address = grads[chunk.row];
  const double sum = row.flat != 0 ? sum_squares_runs<S, T, 16 / sizeof(S)>(address, chunk.begin, end)
                                   : sum_squares_singles<T>(dtype, address, fixed + row.strided, chunk.begin, end);
  const double total = block_sum<kThreads>(sum, fold);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// Sums of squares of single samples: partials[chunk][sample], 0 for samples of weight 0, which are not read. Reads
// every score once. A block takes one sample of a chunk.
template <typename S, typename T>
__global__ void __launch_bounds__(kThreads)
    sample_squares_kernel(const int64_t* fixed, const int64_t* grads, const Chunk* chunks, int64_t chunk_size,
                          DType dtype, const double* weights, int64_t samples, double* partials) {
  __shared__ double fold[kThreads / kWarp];
  const int64_t b = blockIdx.x % samples;
  if (weights[b] == 0.0) {
    if (threadIdx.x == 0) partials[blockIdx.x] = 0.0;
    return;
  }
  const Chunk chunk = chunks[blockIdx.x / samples];
  const Row& row = reinterpret_cast<const Row*>(fixed)[chunk.row];
  const int64_t end = chunk.begin + chunk_size < row.numel ? chunk.begin + chunk_size : row.numel;
  const int64_t address = grads[chunk.row] + b * row.sample * static_cast<int64_t>(sizeof(S));
  const double sum = row.flat != 0 ? sum_squares_runs<S, T, 16 / sizeof(S)>(address, chunk.begin, end)
                                   : sum_squares_singles<T>(dtype, address, fixed + row.strided, chunk.begin, end);
  const double total = block_sum<kThreads>(sum, fold);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

void cuda_sample_squares(const Tensor& fixed, const Tensor& fresh, int64_t chunks_at, int64_t first_chunk,
                         int64_t chunks, int64_t chunk_size, int64_t grad_dtype, const Tensor& sample_weights,
                         const Tensor& partials) {
  const int64_t* words = const_data<int64_t>(fixed);
  const auto* chunk = reinterpret_cast<const Chunk*>(words + chunks_at) + first_chunk;
  const DType dtype = static_cast<DType>(grad_dtype);
  const int64_t samples = sample_weights.numel();
  if (samples == 0) return;
  auto kernel = sample_squares_kernel<float, float>;
  if (dtype == DType::F64) kernel = sample_squares_kernel<double, double>;
  if (dtype == DType::BF16) kernel = sample_squares_kernel<BFloat16, float>;
  if (dtype == DType::F16) kernel = sample_squares_kernel<Float16, float>;
  Launcher(fixed).run("sample_squares_kernel", kernel, chunks * samples, kThreads, words, const_data<int64_t>(fresh),
                      chunk, chunk_size, dtype, const_data<double>(sample_weights), samples,
                      mutable_data<double>(partials) + first_chunk * samples);
}

void cuda_norm(const Tensor& fixed, const Tensor& fresh, int64_t chunks_at, int64_t first_chunk, int64_t chunks,
               int64_t chunk_size, int64_t grad_dtype, const Tensor& partials) {
  const int64_t* words = const_data<int64_t>(fixed);
  const auto* chunk = reinterpret_cast<const Chunk*>(words + chunks_at) + first_chunk;
  const DType dtype = static_cast<DType>(grad_dtype);
  auto kernel = norm_kernel<float, float>;
  if (dtype == DType::F64) kernel = norm_kernel<double, double>;
  if (dtype == DType::BF16) kernel = norm_kernel<BFloat16, float>;
  if (dtype == DType::F16) kernel = norm_kernel<Float16, float>;
  Launcher(fixed).run("norm_kernel", kernel, chunks, kThreads, words, const_data<int64_t>(fresh), chunk, chunk_size,
                      dtype, mutable_data<double>(partials) + first_chunk);
}

}  // namespace
}  // namespace fca

FCA_REGISTER(m) {
  m.impl("cuda_norm", TORCH_BOX(&fca::cuda_norm));
  m.impl("cuda_sample_squares", TORCH_BOX(&fca::cuda_sample_squares));
}
