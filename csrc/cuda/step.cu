// Phase 3: one pass over parameters, gradients and moments, one launch whatever the number of tensors.
//
// Bytes per float32 element: 16 read (p, g, m, v) + 12 written (p, m, v) = 28, amsgrad 36. About 20 operations, of
// which one square root and one division: an H100 moves 13 B a clock and multiprocessor, so there is room for 270
// instructions an element before they matter (bfloat16: 130). A thread keeps one 16-byte word of four tensors in
// flight, a multiprocessor 80 KB; 17 to 27 KB cover the latency, the rest evens out what the blocks do in between.
#include <optional>

#include "slots.h"

namespace fca {
namespace {

// ---------------------------------------------------------------- where a row's elements are

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

// A thread's share of sum m g over a span, for logical blocks longer than a tile.
template <typename RowAccess, bool COUPLED>
__device__ __forceinline__ double dot_of_thread(const RowAccess& row, const StepScalars<typename RowAccess::T>& s,
                                                int64_t start, int64_t stop) {
  using T = typename RowAccess::T;
  double dot = 0;
  for (int64_t base = start; base < stop; base += RowAccess::kTile) {
    const Span span = {base, start, stop};
    T p[RowAccess::kHeld] = {}, g[RowAccess::kHeld], m[RowAccess::kHeld];
    row.template read<GRAD, false>(span, g);
    row.template read<EXP_AVG, false>(span, m);
    if (COUPLED) row.template read<PARAM, false>(span, p);
#pragma unroll
    for (int j = 0; j < RowAccess::kHeld; ++j) {
      dot += static_cast<double>(m[j]) * static_cast<double>(scaled_grad<T, COUPLED>(p[j], g[j], s));
    }
  }
  return dot;
}

// ---------------------------------------------------------------- one tile

// Reads, gates, updates and writes a tile; returns the thread's sum of squared raw gradients. `block`: 0 where all of
// the tile shares `keep`, else the length of the logical blocks that start with it.
template <bool WHOLE, typename RowAccess, Overshoot RULE, bool AMSGRAD, bool COUPLED>
__device__ __forceinline__ double update_tile_of(const RowAccess& row, const StepScalars<typename RowAccess::T>& s,
                                                 const Span& span, unsigned block, bool keep,
                                                 GateShared<RowAccess::kTile>* gate) {
  using T = typename RowAccess::T;
  constexpr int kHeld = RowAccess::kHeld;
  T p[kHeld], g[kHeld], m[kHeld], v[kHeld], v_max[AMSGRAD ? kHeld : 1];
  row.template read<GRAD, WHOLE>(span, g);
  row.template read<EXP_AVG, WHOLE>(span, m);
  row.template read<PARAM, WHOLE>(span, p);
  row.template read<EXP_AVG_SQ, WHOLE>(span, v);
  if constexpr (AMSGRAD) row.template read<MAX_EXP_AVG_SQ, WHOLE>(span, v_max);

  if (RULE == Overshoot::ALIGN_BLOCK && block != 0) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      gate->product[RowAccess::place(j)] =
          static_cast<double>(m[j]) * static_cast<double>(scaled_grad<T, COUPLED>(p[j], g[j], s));
    }
    gate_tile(*gate, static_cast<unsigned>(span.end - span.base), block);
  }
  double squares = 0;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    squares += static_cast<double>(g[j]) * static_cast<double>(g[j]);
    if (RULE == Overshoot::ALIGN_BLOCK && block != 0 && j % RowAccess::kWidth == 0) {
      // A run lies within one logical block. Past the end of the span there is none, and nothing to keep.
      const unsigned place = static_cast<unsigned>(RowAccess::place(j));
      keep = place < static_cast<unsigned>(span.end - span.base) && gate->keep[place / block];
    }
    update_element<T, RULE, AMSGRAD, COUPLED>(p[j], g[j], m[j], v[j], v_max[AMSGRAD ? j : 0], s, keep);
  }
  row.template write<PARAM, WHOLE>(span, p);
  row.template write<EXP_AVG, WHOLE>(span, m);
  row.template write<EXP_AVG_SQ, WHOLE>(span, v);
  if constexpr (AMSGRAD) row.template write<MAX_EXP_AVG_SQ, WHOLE>(span, v_max);
  return squares;
}

template <typename RowAccess, Overshoot RULE, bool AMSGRAD, bool COUPLED>
__device__ __forceinline__ double update_tile(const RowAccess& row, const StepScalars<typename RowAccess::T>& s,
                                              const Span& span, unsigned block, bool keep,
                                              GateShared<RowAccess::kTile>* gate) {
  if (RowAccess::whole(span)) {
    return update_tile_of<true, RowAccess, RULE, AMSGRAD, COUPLED>(row, s, span, block, keep, gate);
  }
  return update_tile_of<false, RowAccess, RULE, AMSGRAD, COUPLED>(row, s, span, block, keep, gate);
}

// ---------------------------------------------------------------- one chunk

template <typename RowAccess, Overshoot RULE, bool AMSGRAD, bool COUPLED>
__device__ __forceinline__ double update_chunk(const RowAccess& access, const StepScalars<typename RowAccess::T>& s,
                                               int64_t begin, int64_t end, int64_t block, Shared& shared) {
  double squares = 0;
  if constexpr (RULE == Overshoot::ALIGN_BLOCK) {
    if (block > RowAccess::kTile) {  // two passes over the block; the second finds much of it in the L2
      for (int64_t start = begin; start < end; start += block) {
        const int64_t stop = start + block < end ? start + block : end;
        const double dot = dot_of_thread<RowAccess, COUPLED>(access, s, start, stop);
        const bool keep = block_sum<kThreads>(dot, shared.fold) > 0;
        for (int64_t base = start; base < stop; base += RowAccess::kTile) {
          squares += update_tile_of<false, RowAccess, RULE, AMSGRAD, COUPLED>(access, s, {base, start, stop}, 0, keep,
                                                                              nullptr);
        }
      }
    } else {
      __shared__ GateShared<RowAccess::kTile> gate;
      const unsigned short_block = static_cast<unsigned>(block);
      const unsigned whole_blocks = RowAccess::kTile / short_block * short_block;
      for (int64_t base = begin; base < end; base += whole_blocks) {
        const int64_t stop = base + whole_blocks < end ? base + whole_blocks : end;
        squares +=
            update_tile<RowAccess, RULE, AMSGRAD, COUPLED>(access, s, {base, base, stop}, short_block, true, &gate);
      }
    }
  } else {
    for (int64_t base = begin - access.pad(begin); base < end; base += RowAccess::kTile) {
      squares += update_tile<RowAccess, RULE, AMSGRAD, COUPLED>(access, s, {base, begin, end}, 0, true, nullptr);
    }
  }
  return squares;
}

// ---------------------------------------------------------------- kernels

// Blocks a multiprocessor should hold at least; tests/registers_cuda.json shows what registers that leaves. float32, a
// word of four elements a thread: five blocks of 48 registers were 2% faster on an H200 than three blocks of eight
// elements a thread and 80 registers. Where ptxas would spill a few bytes it is fewer.
template <int HELD>
constexpr int blocks_at_once(Overshoot rule, bool f64) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return HELD == 4 ? 4 : 2;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return HELD == 4 ? 4 : f64 || rule == Overshoot::ALIGN_BLOCK ? 2 : 3;
#else
  return f64 ? 2 : HELD == 4 ? 5 : 3;
#endif
}

struct Work {
  const int64_t* fixed;
  const int64_t* grads;
  const Chunk* chunks;
  int64_t chunk_size;
  const TensorScalars* scalars;
  int64_t block;
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

template <typename T, Overshoot RULE, bool AMSGRAD, bool COUPLED>
__device__ __forceinline__ double update_singles(const Work& work, const Row& row, const Chunk& chunk, int64_t end,
                                                 const StepScalars<T>& s, Shared& shared) {
  // Logical blocks are runs of the row-major order, so memory order will do only where the two agree.
  const bool flat = RULE == Overshoot::ALIGN_BLOCK ? row.strided == 0 : row.flat != 0;
  const SinglesOfRow<T> access = {{}, row, work.grads[chunk.row], flat ? nullptr : work.fixed + row.strided};
  return update_chunk<SinglesOfRow<T>, RULE, AMSGRAD, COUPLED>(access, s, chunk.begin, end, work.block, shared);
}

// Tensors of any dtype and layout, and amsgrad.
template <typename T, Overshoot RULE, bool AMSGRAD, bool COUPLED>
__global__ void __launch_bounds__(kThreads, blocks_at_once<1>(RULE, sizeof(T) == 8)) update_singles_kernel(Work work) {
  __shared__ Shared shared;
  const Chunk chunk = work.chunks[chunk_index()];
  const TensorScalars& scalars = work.scalars[chunk.row];
  if (scalars.skip != 0.0) return;
  const Row& row = reinterpret_cast<const Row*>(work.fixed)[chunk.row];
  const int64_t end = chunk.begin + work.chunk_size < row.numel ? chunk.begin + work.chunk_size : row.numel;
  const StepScalars<T> s = rounded<T>(scalars.step);
  const double squares = update_singles<T, RULE, AMSGRAD, COUPLED>(work, row, chunk, end, s, shared);
  if (work.grad_square_sum != nullptr) gather_norm(work, squares, scalars.unscale, shared);
}

// Storage types known: 16 bytes a thread, except for rows whose tensors are strided or start at different distances
// from a 16-byte boundary.
template <typename SP, typename SG, typename SS, Overshoot RULE, bool COUPLED>
__global__ void __launch_bounds__(kThreads, blocks_at_once<16 / sizeof(SP)>(RULE, false))
    update_runs_kernel(Work work) {
  using RowAccess = RunsOfRow<SP, SG, SS>;
  __shared__ Shared shared;
  const Chunk chunk = work.chunks[chunk_index()];
  const TensorScalars& scalars = work.scalars[chunk.row];
  if (scalars.skip != 0.0) return;
  const Row& row = reinterpret_cast<const Row*>(work.fixed)[chunk.row];
  const int64_t end = chunk.begin + work.chunk_size < row.numel ? chunk.begin + work.chunk_size : row.numel;
  const StepScalars<float> s = rounded<float>(scalars.step);
  const RowAccess access(row, work.grads[chunk.row]);
  bool runs = row.flat != 0 && access.fits();
  if (RULE == Overshoot::ALIGN_BLOCK) {  // every logical block has to start on a 16-byte boundary
    runs = runs && row.strided == 0 && access.pad(0) == 0 && work.block % RowAccess::kWidth == 0;
  }
  double squares;
  if (runs) {
    squares = update_chunk<RowAccess, RULE, false, COUPLED>(access, s, chunk.begin, end, work.block, shared);
  } else {
    squares = update_singles<float, RULE, false, COUPLED>(work, row, chunk, end, s, shared);
  }
  if (work.grad_square_sum != nullptr) gather_norm(work, squares, scalars.unscale, shared);
}

// ---------------------------------------------------------------- choosing a kernel

using Kernel = void (*)(Work);

template <Overshoot RULE, bool COUPLED>
Kernel choose_runs(DType param, DType grad, DType state) {
  const auto is = [&](DType p, DType g, DType s) { return param == p && grad == g && state == s; };
  constexpr DType F32 = DType::F32, BF16 = DType::BF16, F16 = DType::F16;
  if (is(F32, F32, F32)) return update_runs_kernel<float, float, float, RULE, COUPLED>;
  if (is(BF16, BF16, BF16)) return update_runs_kernel<BFloat16, BFloat16, BFloat16, RULE, COUPLED>;
  if (is(BF16, BF16, F32)) return update_runs_kernel<BFloat16, BFloat16, float, RULE, COUPLED>;
  if (is(BF16, F32, F32)) return update_runs_kernel<BFloat16, float, float, RULE, COUPLED>;
  if (is(F16, F16, F32)) return update_runs_kernel<Float16, Float16, float, RULE, COUPLED>;
  return nullptr;
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

Kernel choose(DType param, DType grad, DType state, Overshoot rule, bool amsgrad, bool coupled) {
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
  }
  fail("unknown overshoot rule ", static_cast<int64_t>(rule));
}

void cuda_update_(const Tensor& fixed, const Tensor& fresh, int64_t chunks_at, int64_t first_chunk, int64_t chunks,
                  int64_t chunk_size, int64_t param_dtype, int64_t grad_dtype, int64_t state_dtype,
                  const Tensor& scalars, bool coupled, bool amsgrad, int64_t overshoot, int64_t block,
                  std::optional<Tensor> grad_square_sum, const Tensor& partials, const Tensor& finished) {
  check(block >= 1 && chunk_size % block == 0, "chunk_size must be a multiple of block, got ", chunk_size, " and ",
        block);
  if (grad_square_sum) check_buffer(*grad_square_sum, ScalarType::Double, 1, "grad_square_sum");
  const int64_t* words = const_data<int64_t>(fixed);
  const Work work = {words,
                     const_data<int64_t>(fresh),
                     reinterpret_cast<const Chunk*>(words + chunks_at) + first_chunk,
                     chunk_size,
                     reinterpret_cast<const TensorScalars*>(const_data<double>(scalars)),
                     block,
                     grad_square_sum ? mutable_data<double>(*grad_square_sum) : nullptr,
                     mutable_data<double>(partials) + first_chunk,
                     mutable_data<int>(finished)};
  const Kernel kernel = choose(static_cast<DType>(param_dtype), static_cast<DType>(grad_dtype),
                               static_cast<DType>(state_dtype), static_cast<Overshoot>(overshoot), amsgrad, coupled);
  Launcher(fixed).run("update_kernel", kernel, chunks, kThreads, work);
}

}  // namespace
}  // namespace fca

FCA_REGISTER(m) { m.impl("cuda_update_", TORCH_BOX(&fca::cuda_update_)); }
