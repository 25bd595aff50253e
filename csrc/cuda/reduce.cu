// Sums over the elements of each tensor, or of each of its output rows, that rules need before the update.
//
// Bytes per float32 element: 4 (g), and 4 more for each other tensor that `summand` reads; 16 B written a chunk. What
// is summed is a uniform switch at run time: about ten operations an element where a pass has room for a hundred.
#include <optional>

#include "rows.h"

namespace fca {
namespace {

struct ReduceWork {
  const int64_t* fixed;
  const int64_t* grads;
  const Chunk* chunks;
  int64_t chunk_size;
  const TensorScalars* scalars;  // null for SQUARES_MAX
  Sum kind;
  bool coupled, spiked;
  const double* unit_factors;  // of the output rows, and where each row's begin; or null
  const int64_t* unit_starts;
  Samples samples;  // where the gradients are stacks of samples
  Summand* pairs;   // one a chunk
};

template <bool WHOLE, typename RowAccess>
__device__ __forceinline__ void reduce_tile_of(const RowAccess& row, const StepScalars<typename RowAccess::T>& s,
                                               const ReduceWork& work, const Units& units, const Span& span,
                                               Summand& sum) {
  using T = typename RowAccess::T;
  constexpr int kHeld = RowAccess::kHeld;
  T p[kHeld] = {}, g[kHeld], m[kHeld] = {}, v[kHeld] = {};
  row.template read<GRAD, WHOLE>(span, g);
  if (reads_exp_avg(work.kind)) row.template read<EXP_AVG, WHOLE>(span, m);
  if (reads_exp_avg_sq(work.kind, work.spiked)) row.template read<EXP_AVG_SQ, WHOLE>(span, v);
  if (reads_param(work.kind) || work.coupled) row.template read<PARAM, WHOLE>(span, p);
  units.scale(row, span, g);
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const Summand own = summand<T>(work.kind, work.coupled, p[j], g[j], m[j], v[j], s);
    const int64_t i = span.base + RowAccess::place(j);
    if (!WHOLE && (i < span.begin || i >= span.end)) continue;
    sum.x += own.x;
    sum.y = work.kind == Sum::SQUARES_MAX ? (own.y > sum.y ? own.y : sum.y) : sum.y + own.y;
  }
}

template <typename RowAccess>
__device__ __forceinline__ Summand reduce_chunk(const RowAccess& row, const StepScalars<typename RowAccess::T>& s,
                                                const ReduceWork& work, const Units& units, int64_t begin,
                                                int64_t end) {
  Summand sum = {0.0, 0.0};
  for (int64_t base = begin - row.pad(begin); base < end; base += RowAccess::kTile) {
    const Span span = {base, begin, end};
    if (RowAccess::whole(span)) {
      reduce_tile_of<true>(row, s, work, units, span, sum);
    } else {
      reduce_tile_of<false>(row, s, work, units, span, sum);
    }
  }
  return sum;
}

__device__ __forceinline__ void store_pair(const ReduceWork& work, const Summand& sum, double* fold) {
  const double x = block_sum<kThreads>(sum.x, fold);
  const double y = work.kind == Sum::SQUARES_MAX ? block_max<kThreads>(sum.y, fold) : block_sum<kThreads>(sum.y, fold);
  if (threadIdx.x == 0) work.pairs[blockIdx.x] = {x, y};
}

__device__ __forceinline__ Units units_of(const ReduceWork& work, const Chunk& chunk, const Row& row) {
  return {work.unit_factors == nullptr ? nullptr : work.unit_factors + work.unit_starts[chunk.row], row.unit};
}

template <typename T, bool SAMPLED>
__device__ __forceinline__ Summand reduce_singles(const ReduceWork& work, const Chunk& chunk, const Row& row,
                                                  int64_t end, const StepScalars<T>& s) {
  const Units units = units_of(work, chunk, row);
  const bool flat = units.factors == nullptr ? in_memory_order(row, work.samples) : row.strided == 0;
  const SinglesOfRow<T, SAMPLED> access = {
      {}, row, work.grads[chunk.row], flat ? nullptr : work.fixed + row.strided, work.samples, chunk.row};
  return reduce_chunk(access, s, work, units, chunk.begin, end);
}

__device__ __forceinline__ StepScalars<double> scalars_of(const ReduceWork& work, const Chunk& chunk) {
  return work.scalars == nullptr ? StepScalars<double>{} : work.scalars[chunk.row].step;
}

template <typename T, bool SAMPLED>
__global__ void __launch_bounds__(kThreads, 2) reduce_singles_kernel(ReduceWork work) {
  __shared__ double fold[kThreads / kWarp];
  const Chunk chunk = work.chunks[blockIdx.x];
  const Row& row = reinterpret_cast<const Row*>(work.fixed)[chunk.row];
  const int64_t end = chunk.begin + work.chunk_size < row.numel ? chunk.begin + work.chunk_size : row.numel;
  store_pair(work, reduce_singles<T, SAMPLED>(work, chunk, row, end, rounded<T>(scalars_of(work, chunk))), fold);
}

template <typename RowAccess, bool SAMPLED>
__global__ void __launch_bounds__(kThreads) reduce_runs_kernel(ReduceWork work) {
  __shared__ double fold[kThreads / kWarp];
  const Chunk chunk = work.chunks[blockIdx.x];
  const Row& row = reinterpret_cast<const Row*>(work.fixed)[chunk.row];
  const int64_t end = chunk.begin + work.chunk_size < row.numel ? chunk.begin + work.chunk_size : row.numel;
  const StepScalars<float> s = rounded<float>(scalars_of(work, chunk));
  const RowAccess access(row, work.grads[chunk.row], work.samples);
  const Units units = units_of(work, chunk, row);
  const bool runs = row.flat != 0 && access.fits() && (units.factors == nullptr || row.strided == 0) &&
                    (!SAMPLED || work.samples.seed == nullptr);
  const Summand sum = runs ? reduce_chunk(access, s, work, units, chunk.begin, end)
                           : reduce_singles<float, SAMPLED>(work, chunk, row, end, s);
  store_pair(work, sum, fold);
}

using ReduceKernel = void (*)(ReduceWork);

ReduceKernel choose_of_gradients(DType param, DType grad, DType state) {
  const ReduceKernel otherwise =
      param == DType::F64 ? reduce_singles_kernel<double, false> : reduce_singles_kernel<float, false>;
#define FCA_KERNEL(SP, SG, SS) reduce_runs_kernel<RunsOfRow<SP, SG, SS>, false>
  return FCA_CHOOSE_RUNS(param, grad, state, FCA_KERNEL, otherwise);
#undef FCA_KERNEL
}

ReduceKernel choose_of_samples(DType param, DType grad, DType state) {
  const ReduceKernel otherwise =
      param == DType::F64 ? reduce_singles_kernel<double, true> : reduce_singles_kernel<float, true>;
#define FCA_KERNEL(SP, SG, SS) reduce_runs_kernel<RunsOfSamples<SP, SG, SS>, true>
  return FCA_CHOOSE_SAMPLES(param, grad, state, FCA_KERNEL, otherwise);
#undef FCA_KERNEL
}

void cuda_reduce(const Tensor& fixed, const Tensor& fresh, int64_t chunks_at, int64_t first_chunk, int64_t chunks,
                 int64_t chunk_size, int64_t param_dtype, int64_t grad_dtype, int64_t state_dtype,
                 std::optional<Tensor> scalars, int64_t kind, bool coupled, bool spiked,
                 std::optional<Tensor> unit_factors, std::optional<Tensor> unit_starts,
                 std::optional<Tensor> sample_weights, std::optional<Tensor> seed, double noise, const Tensor& pairs) {
  check(kind >= 0 && kind <= static_cast<int64_t>(Sum::FADAM), "unknown reduction ", kind);
  check(scalars || kind == static_cast<int64_t>(Sum::SQUARES_MAX), "this reduction needs scalars");
  check(unit_factors.has_value() == unit_starts.has_value(), "unit_factors go with unit_starts");
  const int64_t* words = const_data<int64_t>(fixed);
  const ReduceWork work = {words,
                           const_data<int64_t>(fresh),
                           reinterpret_cast<const Chunk*>(words + chunks_at) + first_chunk,
                           chunk_size,
                           scalars ? reinterpret_cast<const TensorScalars*>(const_data<double>(*scalars)) : nullptr,
                           static_cast<Sum>(kind),
                           coupled,
                           spiked,
                           unit_factors ? const_data<double>(*unit_factors) : nullptr,
                           unit_starts ? const_data<int64_t>(*unit_starts) : nullptr,
                           samples_of(sample_weights, seed, noise),
                           reinterpret_cast<Summand*>(mutable_data<double>(pairs)) + first_chunk};
  const DType param = static_cast<DType>(param_dtype), grad = static_cast<DType>(grad_dtype),
              state = static_cast<DType>(state_dtype);
  const ReduceKernel kernel =
      sample_weights ? choose_of_samples(param, grad, state) : choose_of_gradients(param, grad, state);
  Launcher(fixed).run("reduce_kernel", kernel, chunks, kThreads, work);
}

// ---------------------------------------------------------------- output rows

// Output rows of one block, where each has `unit` elements: units_at_once of device_table.py.
__device__ __forceinline__ int64_t units_at_once(int64_t unit) {
  const int64_t fitting = 4096 / unit;
  return unit > 4096 ? 1 : fitting < 8 ? 8 : fitting > 512 ? 512 : fitting;
}

// A thread's share of the sum of squares of elements begin + first, begin + first + stride, ... of a slot.
template <int SLOT, typename RowAccess>
__device__ __forceinline__ double squares_of_thread(const RowAccess& access, int64_t begin, int64_t end, int first,
                                                    int stride) {
  double sum = 0;
#pragma unroll 1
  for (int64_t i = begin + first; i < end; i += stride) {
    typename RowAccess::T x[1];
    access.template read<SLOT, false>({i - RowAccess::place(0), begin, end}, x);
    sum += static_cast<double>(x[0]) * static_cast<double>(x[0]);
  }
  return sum;
}

template <typename T, bool SAMPLED>
__global__ void __launch_bounds__(kThreads, 2)
    unit_sums_kernel(const int64_t* fixed, const int64_t* grads, const Chunk* chunks, const int64_t* starts,
                     Samples samples, Summand* sums) {
  __shared__ double fold[kThreads / kWarp];
  const Chunk chunk = chunks[blockIdx.x];  // begin: the first output row
  const Row& row = reinterpret_cast<const Row*>(fixed)[chunk.row];
  const int64_t unit = row.unit, per = units_at_once(unit), all = row.numel / unit;
  const int64_t stop = chunk.begin + per < all ? chunk.begin + per : all;
  const int64_t* record = row.strided == 0 ? nullptr : fixed + row.strided;
  const SinglesOfRow<T, SAMPLED> access = {{}, row, grads[chunk.row], record, samples, chunk.row};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool alone = per == 1;  // long rows: all threads on one
  for (int64_t u = chunk.begin + (alone ? 0 : warp); u < stop; u += alone ? 1 : kThreads / kWarp) {
    const int first = alone ? threadIdx.x : lane, stride = alone ? kThreads : kWarp;
    double pair[2] = {squares_of_thread<GRAD>(access, u * unit, (u + 1) * unit, first, stride),
                      squares_of_thread<PARAM>(access, u * unit, (u + 1) * unit, first, stride)};
    for (double& part : pair) part = alone ? block_sum<kThreads>(part, fold) : warp_sum(part);
    if (alone ? threadIdx.x == 0 : lane == 0) sums[starts[chunk.row] + u] = {pair[0], pair[1]};
  }
}

void cuda_unit_sums(const Tensor& fixed, const Tensor& fresh, const Tensor& unit_chunks, int64_t first_chunk,
                    int64_t chunks, int64_t param_dtype, const Tensor& starts, std::optional<Tensor> sample_weights,
                    std::optional<Tensor> seed, double noise, const Tensor& sums) {
  const bool f64 = static_cast<DType>(param_dtype) == DType::F64;
  auto kernel = f64 ? unit_sums_kernel<double, false> : unit_sums_kernel<float, false>;
  if (sample_weights) kernel = f64 ? unit_sums_kernel<double, true> : unit_sums_kernel<float, true>;
  Launcher(fixed).run(
      "unit_sums_kernel", kernel, chunks, kThreads, const_data<int64_t>(fixed), const_data<int64_t>(fresh),
      reinterpret_cast<const Chunk*>(const_data<int64_t>(unit_chunks)) + first_chunk, const_data<int64_t>(starts),
      samples_of(sample_weights, seed, noise), reinterpret_cast<Summand*>(mutable_data<double>(sums)));
}

}  // namespace
}  // namespace fca

FCA_REGISTER(m) {
  m.impl("cuda_reduce", TORCH_BOX(&fca::cuda_reduce));
  m.impl("cuda_unit_sums", TORCH_BOX(&fca::cuda_unit_sums));
}
