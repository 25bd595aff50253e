// Phase 3: one pass over parameters, gradients and moments, one launch whatever the number of tensors.
//
// Bytes per float32 element: 16 read (p, g, m, v) + 12 written (p, m, v) = 28, amsgrad 36. About 20 operations, of
// which one square root and one division: an H100 moves 13 B a clock and multiprocessor, so there is room for 270
// instructions an element before they matter (bfloat16: 130). A thread keeps one 16-byte word of four tensors in
// flight, a multiprocessor 80 KB; 17 to 27 KB cover the latency, the rest evens out what the blocks do in between.
#include <optional>

#include "rows.h"

namespace fca {
namespace {

// ---------------------------------------------------------------- block gates

// Shared memory of a block. `product` and `keep` serve the gates of tiles that hold whole logical blocks.
struct Shared {
  double fold[kThreads / kWarp];
  bool last;
};
template <int TILE>
struct GateShared {
  double product[TILE];
  bool keep[TILE];
};

// Fills `gate.keep` for the logical blocks of a tile of `n` elements: sum m g > 0, products exact, sums in float64.
// A warp takes a block, so that the order of a sum depends on the block's length alone.
template <int TILE>
__device__ __forceinline__ void gate_tile(GateShared<TILE>& gate, unsigned n, unsigned block) {
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarp;
  for (unsigned b = threadIdx.x / kWarp; b * block < n; b += kThreads / kWarp) {
    const unsigned stop = (b + 1) * block < n ? (b + 1) * block : n;
    double dot = 0;
    for (unsigned i = b * block + lane; i < stop; i += kWarp) dot += gate.product[i];
    dot = warp_sum(dot);
    if (lane == 0) gate.keep[b] = dot > 0;  // all-zero momentum: nothing to drop, either answer gives d = b g
  }
  __syncthreads();
}

// What is the same for all elements of a chunk. In the kernels of one rule `rule` and `coupled` are constants.
struct Options {
  Overshoot rule;
  bool coupled;
  bool sum_dots;  // GUARDED
  Units units;    // GUARDED
};

struct Sums {
  double squares = 0, dot = 0;
};

// A thread's share of sum m g over a span, for logical blocks longer than a tile.
template <bool GUARDED, typename RowAccess>
__device__ __forceinline__ double dot_of_thread(const RowAccess& row, const StepScalars<typename RowAccess::T>& s,
                                                const Options& options, int64_t start, int64_t stop) {
  using T = typename RowAccess::T;
  double dot = 0;
  for (int64_t base = start; base < stop; base += RowAccess::kTile) {
    const Span span = {base, start, stop};
    T p[RowAccess::kHeld] = {}, g[RowAccess::kHeld], m[RowAccess::kHeld], v[RowAccess::kHeld] = {};
    row.template read<GRAD, false>(span, g);
    row.template read<EXP_AVG, false>(span, m);
    if (options.coupled) row.template read<PARAM, false>(span, p);
    if (GUARDED) {
      row.template read<EXP_AVG_SQ, false>(span, v);
      options.units.scale(row, span, g);
    }
#pragma unroll
    for (int j = 0; j < RowAccess::kHeld; ++j) {
      const T seen = seen_grad<T, GUARDED>(p[j], g[j], v[j], s, options.coupled);
      dot += static_cast<double>(m[j]) * static_cast<double>(seen);
    }
  }
  return dot;
}

// ---------------------------------------------------------------- one tile

// Reads, gates, updates and writes a tile; adds the thread's squares of raw gradients, and m g. `block`: 0 where all of
// the tile shares `keep`, else the length of the logical blocks that start with it.
template <bool WHOLE, bool AMSGRAD, bool GUARDED, typename RowAccess>
__device__ __forceinline__ void update_tile_of(const RowAccess& row, const StepScalars<typename RowAccess::T>& s,
                                               const Options& options, const Span& span, unsigned block, bool keep,
                                               GateShared<RowAccess::kTile>* gate, Sums& sums) {
  using T = typename RowAccess::T;
  constexpr int kHeld = RowAccess::kHeld;
  T p[kHeld], g[kHeld], m[kHeld], v[kHeld], v_max[AMSGRAD ? kHeld : 1];
  row.template read<GRAD, WHOLE>(span, g);
  row.template read<EXP_AVG, WHOLE>(span, m);
  row.template read<PARAM, WHOLE>(span, p);
  row.template read<EXP_AVG_SQ, WHOLE>(span, v);
  if constexpr (AMSGRAD) row.template read<MAX_EXP_AVG_SQ, WHOLE>(span, v_max);

  if constexpr (GUARDED) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) sums.squares += static_cast<double>(g[j]) * static_cast<double>(g[j]);
    options.units.scale(row, span, g);
    if (options.sum_dots && s.forget != T(1)) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {  // past the end m is 0
        sums.dot += momentum_dot(m[j], seen_grad<T, true>(p[j], g[j], v[j], s, options.coupled));
      }
    }
  }
  const bool gated = options.rule == Overshoot::ALIGN_BLOCK && block != 0;
  if (gated) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const T seen = seen_grad<T, GUARDED>(p[j], g[j], v[j], s, options.coupled);
      gate->product[RowAccess::place(j)] = static_cast<double>(m[j]) * static_cast<double>(seen);
    }
    gate_tile(*gate, static_cast<unsigned>(span.end - span.base), block);
  }
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    if (!GUARDED) sums.squares += static_cast<double>(g[j]) * static_cast<double>(g[j]);
    if (gated && j % RowAccess::kWidth == 0) {
      // A run lies within one logical block. Past the end of the span there is none, and nothing to keep.
      const unsigned place = static_cast<unsigned>(RowAccess::place(j));
      keep = place < static_cast<unsigned>(span.end - span.base) && gate->keep[place / block];
    }
    update_element<T, AMSGRAD, GUARDED>(p[j], g[j], m[j], v[j], v_max[AMSGRAD ? j : 0], s, options.rule,
                                        options.coupled, keep);
  }
  row.template write<PARAM, WHOLE>(span, p);
  row.template write<EXP_AVG, WHOLE>(span, m);
  row.template write<EXP_AVG_SQ, WHOLE>(span, v);
  if constexpr (AMSGRAD) row.template write<MAX_EXP_AVG_SQ, WHOLE>(span, v_max);
}

template <bool AMSGRAD, bool GUARDED, typename RowAccess>
__device__ __forceinline__ void update_tile(const RowAccess& row, const StepScalars<typename RowAccess::T>& s,
                                            const Options& options, const Span& span, unsigned block, bool keep,
                                            GateShared<RowAccess::kTile>* gate, Sums& sums) {
  if (RowAccess::whole(span)) {
    update_tile_of<true, AMSGRAD, GUARDED>(row, s, options, span, block, keep, gate, sums);
  } else {
    update_tile_of<false, AMSGRAD, GUARDED>(row, s, options, span, block, keep, gate, sums);
  }
}

// ---------------------------------------------------------------- one chunk

// GATED: the rule may be ALIGN_BLOCK.
template <bool AMSGRAD, bool GUARDED, bool GATED, typename RowAccess>
__device__ __forceinline__ Sums update_chunk(const RowAccess& access, const StepScalars<typename RowAccess::T>& s,
                                             const Options& options, int64_t begin, int64_t end, int64_t block,
                                             Shared& shared) {
  Sums sums;
  if constexpr (GATED) {
    if (options.rule == Overshoot::ALIGN_BLOCK) {
      if (block > RowAccess::kTile) {  // two passes over the block; the second finds much of it in the L2
        for (int64_t start = begin; start < end; start += block) {
          const int64_t stop = start + block < end ? start + block : end;
          const double dot = dot_of_thread<GUARDED>(access, s, options, start, stop);
          const bool keep = block_sum<kThreads>(dot, shared.fold) > 0;
          for (int64_t base = start; base < stop; base += RowAccess::kTile) {
            update_tile_of<false, AMSGRAD, GUARDED>(access, s, options, {base, start, stop}, 0, keep, nullptr, sums);
          }
        }
      } else {
        __shared__ GateShared<RowAccess::kTile> gate;
        const unsigned short_block = static_cast<unsigned>(block);
        const unsigned whole_blocks = RowAccess::kTile / short_block * short_block;
        for (int64_t base = begin; base < end; base += whole_blocks) {
          const int64_t stop = base + whole_blocks < end ? base + whole_blocks : end;
          update_tile<AMSGRAD, GUARDED>(access, s, options, {base, base, stop}, short_block, true, &gate, sums);
        }
      }
      return sums;
    }
  }
  for (int64_t base = begin - access.pad(begin); base < end; base += RowAccess::kTile) {
    update_tile<AMSGRAD, GUARDED>(access, s, options, {base, begin, end}, 0, true, nullptr, sums);
  }
  return sums;
}

// ---------------------------------------------------------------- kernels

// Blocks a multiprocessor should hold at least; tests/registers_cuda.json shows what registers that leaves. float32, a
// word of four elements a thread: five blocks of 48 registers were 2% faster on an H200 than three blocks of eight
// elements a thread and 80 registers. Where ptxas would spill a few bytes it is fewer.
template <int HELD>
constexpr int blocks_at_once(Overshoot rule, bool f64, bool coupled) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return HELD == 4 ? 4 : 2;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return HELD == 4 ? 4 : f64 || rule == Overshoot::ALIGN_BLOCK ? 2 : 3;
#else
  return f64 || (rule == Overshoot::ALIGN_BLOCK && HELD == 8 && coupled) ? 2 : HELD == 4 ? 5 : 3;
#endif
}

struct Work {
  const int64_t* fixed;
  const int64_t* grads;
  const Chunk* chunks;
  int64_t chunk_size;
  const TensorScalars* scalars;
  int64_t block;
  // Of the guarded kernels alone: the rule, whether weight decay is coupled, factors of output rows and where each
  // row's begin, sums of m g by chunk. The addresses may be null.
  Overshoot rule;
  bool coupled;
  const double* unit_factors;
  const int64_t* unit_starts;
  double* dots;
  Samples samples;          // where the gradients are stacks of samples
  double* grad_square_sum;  // null: the norm is known already
  double* partials;
  int* finished;  // blocks of this launch that are done; 0 between launches
};

// The last chunks first: some of the gradients that the norm pass has read last are still in the L2.
__device__ __forceinline__ unsigned chunk_index() { return gridDim.x - 1 - blockIdx.x; }

// Adds the launch's sum of squared unscaled gradients to `grad_square_sum`: the block that finishes last adds up what
// all have left, in their order, so that the sum does not depend on who was last.
__device__ __forceinline__ void gather_norm(const Work& work, double squares, double unscale, Shared& shared) {
  const double sum = block_sum<kThreads>(squares, shared.fold);
  if (threadIdx.x == 0) {
    work.partials[chunk_index()] = sum;
    __threadfence();
    shared.last = atomicAdd(work.finished, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!shared.last) return;
  double part = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) part += __ldcg(work.partials + i);
  const double total = block_sum<kThreads>(part, shared.fold);
  if (threadIdx.x == 0) {
    *work.grad_square_sum += total * unscale * unscale;
    *work.finished = 0;
  }
}

// What a kernel knows of its chunk.
struct Place {
  Chunk chunk;
  const Row& row;
  int64_t end;
};

__device__ __forceinline__ Place place_of(const Work& work, const Chunk& chunk) {
  const Row& row = reinterpret_cast<const Row*>(work.fixed)[chunk.row];
  return {chunk, row, chunk.begin + work.chunk_size < row.numel ? chunk.begin + work.chunk_size : row.numel};
}

template <bool AMSGRAD, bool GUARDED, bool GATED, bool SAMPLED, typename T>
__device__ __forceinline__ Sums update_singles(const Work& work, const Place& place, const StepScalars<T>& s,
                                               const Options& options, Shared& shared) {
  // Logical blocks and output rows are runs of the row-major order, so memory order will do only where the two agree.
  const bool logical = options.rule == Overshoot::ALIGN_BLOCK || (GUARDED && options.units.factors != nullptr);
  const bool flat = logical ? place.row.strided == 0 : in_memory_order(place.row, work.samples);
  const SinglesOfRow<T, SAMPLED> access = {
      {},           place.row,      work.grads[place.chunk.row], flat ? nullptr : work.fixed + place.row.strided,
      work.samples, place.chunk.row};
  return update_chunk<AMSGRAD, GUARDED, GATED>(access, s, options, place.chunk.begin, place.end, work.block, shared);
}

template <typename RowAccess, bool GUARDED, bool GATED, bool SAMPLED>
__device__ __forceinline__ Sums update_runs(const Work& work, const Place& place, const StepScalars<float>& s,
                                            const Options& options, Shared& shared) {
  const RowAccess access(place.row, work.grads[place.chunk.row], work.samples);
  bool runs = place.row.flat != 0 && access.fits() && (!SAMPLED || work.samples.seed == nullptr);
  if (GUARDED && options.units.factors != nullptr) runs = runs && place.row.strided == 0;
  if (options.rule == Overshoot::ALIGN_BLOCK) {  // every logical block has to start on a 16-byte boundary
    runs = runs && place.row.strided == 0 && access.pad(0) == 0 && work.block % RowAccess::kWidth == 0;
  }
  if (runs) {
    return update_chunk<false, GUARDED, GATED>(access, s, options, place.chunk.begin, place.end, work.block, shared);
  }
  return update_singles<false, GUARDED, GATED, SAMPLED>(work, place, s, options, shared);
}

// Tensors of any dtype and layout, and amsgrad.
template <typename T, Overshoot RULE, bool AMSGRAD, bool COUPLED>
__global__ void __launch_bounds__(kThreads, blocks_at_once<1>(RULE, sizeof(T) == 8, COUPLED))
    update_singles_kernel(Work work) {
  __shared__ Shared shared;
  const Chunk chunk = work.chunks[chunk_index()];
  const TensorScalars& scalars = work.scalars[chunk.row];
  if (scalars.skip != 0.0) return;
  const Options options = {RULE, COUPLED, false, {nullptr, 0}};
  const Sums sums = update_singles<AMSGRAD, false, RULE == Overshoot::ALIGN_BLOCK, false>(
      work, place_of(work, chunk), rounded<T>(scalars.step), options, shared);
  if (work.grad_square_sum != nullptr) gather_norm(work, sums.squares, scalars.unscale, shared);
}

// Storage types known: 16 bytes a thread, except for rows whose tensors are strided or start at different distances
// from a 16-byte boundary.
template <typename SP, typename SG, typename SS, Overshoot RULE, bool COUPLED>
__global__ void __launch_bounds__(kThreads, blocks_at_once<16 / sizeof(SP)>(RULE, false, COUPLED))
    update_runs_kernel(Work work) {
  __shared__ Shared shared;
  const Chunk chunk = work.chunks[chunk_index()];
  const TensorScalars& scalars = work.scalars[chunk.row];
  if (scalars.skip != 0.0) return;
  const Options options = {RULE, COUPLED, false, {nullptr, 0}};
  const Sums sums = update_runs<RunsOfRow<SP, SG, SS>, false, RULE == Overshoot::ALIGN_BLOCK, false>(
      work, place_of(work, chunk), rounded<float>(scalars.step), options, shared);
  if (work.grad_square_sum != nullptr) gather_norm(work, sums.squares, scalars.unscale, shared);
}

// The same for rules that look at the guards of StepScalars, and for FAdam: the rule is a uniform switch at run time,
// as seven times two kernels more for every pair above would double what is compiled, for rules that few use.
__device__ __forceinline__ Options guarded_options(const Work& work, const Chunk& chunk, const Row& row) {
  const double* factors = work.unit_factors == nullptr ? nullptr : work.unit_factors + work.unit_starts[chunk.row];
  return {work.rule, work.coupled, work.dots != nullptr, {factors, row.unit}};
}

__device__ __forceinline__ void finish_guarded(const Work& work, const Sums& sums, double unscale, Shared& shared) {
  if (work.dots != nullptr) {
    const double dot = block_sum<kThreads>(sums.dot, shared.fold);
    if (threadIdx.x == 0) work.dots[chunk_index()] = dot;
    __syncthreads();
  }
  if (work.grad_square_sum != nullptr) gather_norm(work, sums.squares, unscale, shared);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kGuardedBlocks = 3;  // of float32; elsewhere ptxas would spill a few bytes
#else
constexpr int kGuardedBlocks = 2;
#endif

template <typename T, bool AMSGRAD, bool SAMPLED>
__global__ void __launch_bounds__(kThreads, 2) update_singles_guarded_kernel(Work work) {
  __shared__ Shared shared;
  const Chunk chunk = work.chunks[chunk_index()];
  const TensorScalars& scalars = work.scalars[chunk.row];
  if (scalars.skip != 0.0) return;
  const Place place = place_of(work, chunk);
  const Sums sums = update_singles<AMSGRAD, true, true, SAMPLED>(work, place, rounded<T>(scalars.step),
                                                                 guarded_options(work, chunk, place.row), shared);
  finish_guarded(work, sums, scalars.unscale, shared);
}

template <typename SP, typename SG, typename SS>
__global__ void __launch_bounds__(kThreads, sizeof(SP) == 4 ? kGuardedBlocks : 2)
    update_runs_guarded_kernel(Work work) {
  __shared__ Shared shared;
  const Chunk chunk = work.chunks[chunk_index()];
  const TensorScalars& scalars = work.scalars[chunk.row];
  if (scalars.skip != 0.0) return;
  const Place place = place_of(work, chunk);
  const Sums sums = update_runs<RunsOfRow<SP, SG, SS>, true, true, false>(
      work, place, rounded<float>(scalars.step), guarded_options(work, chunk, place.row), shared);
  finish_guarded(work, sums, scalars.unscale, shared);
}

// The policy step: gradients are summed up from samples as they are read. B s + 24 bytes per float32 element, s of a
// score; 2 operations a score beside the update's.
template <typename SP, typename SG, typename SS>
__global__ void __launch_bounds__(kThreads, 2) update_samples_kernel(Work work) {
  __shared__ Shared shared;
  const Chunk chunk = work.chunks[chunk_index()];
  const TensorScalars& scalars = work.scalars[chunk.row];
  if (scalars.skip != 0.0) return;
  const Place place = place_of(work, chunk);
  const Sums sums = update_runs<RunsOfSamples<SP, SG, SS>, true, true, true>(
      work, place, rounded<float>(scalars.step), guarded_options(work, chunk, place.row), shared);
  finish_guarded(work, sums, scalars.unscale, shared);
}

// ---------------------------------------------------------------- choosing a kernel

using Kernel = void (*)(Work);

template <Overshoot RULE, bool COUPLED>
Kernel choose_runs(DType param, DType grad, DType state) {
#define FCA_KERNEL(SP, SG, SS) update_runs_kernel<SP, SG, SS, RULE, COUPLED>
  return FCA_CHOOSE_RUNS(param, grad, state, FCA_KERNEL, Kernel(nullptr));
#undef FCA_KERNEL
}

template <typename T, Overshoot RULE>
Kernel choose_singles(bool amsgrad, bool coupled) {
  if (amsgrad)
    return coupled ? update_singles_kernel<T, RULE, true, true> : update_singles_kernel<T, RULE, true, false>;
  return coupled ? update_singles_kernel<T, RULE, false, true> : update_singles_kernel<T, RULE, false, false>;
}

template <Overshoot RULE>
Kernel choose_of_rule(DType param, DType grad, DType state, bool amsgrad, bool coupled) {
  if (!amsgrad) {
    const Kernel runs =
        coupled ? choose_runs<RULE, true>(param, grad, state) : choose_runs<RULE, false>(param, grad, state);
    if (runs != nullptr) return runs;
  }
  return param == DType::F64 ? choose_singles<double, RULE>(amsgrad, coupled)
                             : choose_singles<float, RULE>(amsgrad, coupled);
}

template <bool SAMPLED>
Kernel choose_singles_guarded(DType param, bool amsgrad) {
  if (param == DType::F64) {
    return amsgrad ? update_singles_guarded_kernel<double, true, SAMPLED>
                   : update_singles_guarded_kernel<double, false, SAMPLED>;
  }
  return amsgrad ? update_singles_guarded_kernel<float, true, SAMPLED>
                 : update_singles_guarded_kernel<float, false, SAMPLED>;
}

Kernel choose_guarded(DType param, DType grad, DType state, bool amsgrad) {
#define FCA_KERNEL(SP, SG, SS) update_runs_guarded_kernel<SP, SG, SS>
  const Kernel runs = FCA_CHOOSE_RUNS(param, grad, state, FCA_KERNEL, Kernel(nullptr));
#undef FCA_KERNEL
  if (!amsgrad && runs != nullptr) return runs;
  return choose_singles_guarded<false>(param, amsgrad);
}

Kernel choose_samples(DType param, DType grad, DType state, bool amsgrad) {
#define FCA_KERNEL(SP, SG, SS) update_samples_kernel<SP, SG, SS>
  const Kernel runs = FCA_CHOOSE_SAMPLES(param, grad, state, FCA_KERNEL, Kernel(nullptr));
#undef FCA_KERNEL
  return !amsgrad && runs != nullptr ? runs : choose_singles_guarded<true>(param, amsgrad);
}

Kernel choose(DType param, DType grad, DType state, Overshoot rule, bool amsgrad, bool coupled, bool guarded,
              bool sampled) {
  if (sampled) return choose_samples(param, grad, state, amsgrad);
  if (guarded) return choose_guarded(param, grad, state, amsgrad);
  switch (rule) {
    case Overshoot::NONE:
      return choose_of_rule<Overshoot::NONE>(param, grad, state, amsgrad, coupled);
    case Overshoot::ALIGN_BLOCK:
      return choose_of_rule<Overshoot::ALIGN_BLOCK>(param, grad, state, amsgrad, coupled);
    case Overshoot::ALIGN_ELEMENT:
      return choose_of_rule<Overshoot::ALIGN_ELEMENT>(param, grad, state, amsgrad, coupled);
    case Overshoot::CAUTIOUS:
      return choose_of_rule<Overshoot::CAUTIOUS>(param, grad, state, amsgrad, coupled);
    case Overshoot::GRAMS:
      return choose_of_rule<Overshoot::GRAMS>(param, grad, state, amsgrad, coupled);
    case Overshoot::ATAN2:
      return choose_of_rule<Overshoot::ATAN2>(param, grad, state, amsgrad, coupled);
    case Overshoot::FADAM:
      check(!amsgrad && !coupled, "FAdam has neither amsgrad nor coupled weight decay");
      return choose_guarded(param, grad, state, amsgrad);
  }
  fail("unknown overshoot rule ", static_cast<int64_t>(rule));
}

void cuda_update_(const Tensor& fixed, const Tensor& fresh, int64_t chunks_at, int64_t first_chunk, int64_t chunks,
                  int64_t chunk_size, int64_t param_dtype, int64_t grad_dtype, int64_t state_dtype,
                  const Tensor& scalars, bool coupled, bool amsgrad, int64_t overshoot, int64_t block, bool guarded,
                  std::optional<Tensor> unit_factors, std::optional<Tensor> unit_starts, std::optional<Tensor> dots,
                  std::optional<Tensor> grad_square_sum, std::optional<Tensor> sample_weights,
                  std::optional<Tensor> seed, double noise, const Tensor& partials, const Tensor& finished) {
  check(block >= 1 && chunk_size % block == 0, "chunk_size must be a multiple of block, got ", chunk_size, " and ",
        block);
  if (grad_square_sum) check_buffer(*grad_square_sum, ScalarType::Double, 1, "grad_square_sum");
  check(guarded || (!unit_factors && !dots), "unit_factors and dots need guarded");
  check(unit_factors.has_value() == unit_starts.has_value(), "unit_factors go with unit_starts");
  const int64_t* words = const_data<int64_t>(fixed);
  const Work work = {words,
                     const_data<int64_t>(fresh),
                     reinterpret_cast<const Chunk*>(words + chunks_at) + first_chunk,
                     chunk_size,
                     reinterpret_cast<const TensorScalars*>(const_data<double>(scalars)),
                     block,
                     static_cast<Overshoot>(overshoot),
                     coupled,
                     unit_factors ? const_data<double>(*unit_factors) : nullptr,
                     unit_starts ? const_data<int64_t>(*unit_starts) : nullptr,
                     dots ? mutable_data<double>(*dots) + first_chunk : nullptr,
                     samples_of(sample_weights, seed, noise),
                     grad_square_sum ? mutable_data<double>(*grad_square_sum) : nullptr,
                     mutable_data<double>(partials) + first_chunk,
                     mutable_data<int>(finished)};
  const Kernel kernel =
      choose(static_cast<DType>(param_dtype), static_cast<DType>(grad_dtype), static_cast<DType>(state_dtype),
             work.rule, amsgrad, coupled, guarded, sample_weights.has_value());
  Launcher(fixed).run("update_kernel", kernel, chunks, kThreads, work);
}

}  // namespace
}  // namespace fca

FCA_REGISTER(m) { m.impl("cuda_update_", TORCH_BOX(&fca::cuda_update_)); }
