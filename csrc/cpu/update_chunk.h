// One chunk of the update pass: the loops of step.cpp (plain rules) and step_guarded.cpp (those that look at the guards
// of StepScalars), which are two files so that they compile side by side.
#pragma once

#include "../update_math.h"
#include "table.h"

namespace fca {

// Addresses of one tile, in the storage type S.
template <typename S>
struct TileSet {
  S *param, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
  const S* grad;
};

// The loop of a rule over one tile; `keep` and `block` are read by ALIGN_BLOCK.
template <typename T, typename S>
using UpdateTile = void (*)(TileSet<S>, int64_t n, const StepScalars<T>&, bool keep, int64_t block);

// The loop that looks at no guard. A tile in which none does anything is left to it.
template <typename T, typename S>
UpdateTile<T, S> plain_tile(Overshoot rule, bool amsgrad, bool coupled);

// sum m g and sum |m g| over a tile in float32, where the first is not small beside the second its
// sign is that of the exact sum.
struct DotEstimate {
  double sum = 0, size = 0;
};

// What the loops need to know of a chunk beside its scalars.
struct ChunkOptions {
  int64_t block;               // logical blocks of ALIGN_BLOCK, else kTile
  bool sum_squares;            // of the raw gradients
  bool sum_dots;               // of m g, before the update (GUARDED)
  const double* unit_factors;  // of this tensor's output rows, or null (GUARDED)
  bool goes_on;                // the chunk behind this one in memory comes next
};

struct ChunkSums {
  double squares = 0, dot = 0;
};

// looked: what is known of the chunk's first block, and on return of the first block behind the chunk (ALIGN_BLOCK).
template <typename T>
using UpdateChunk = ChunkSums (*)(const Table&, const Chunk&, const StepScalars<T>&, const ChunkOptions&,
                                  DotEstimate& looked);

// The kernel of a rule that looks at the guards.
template <typename T>
UpdateChunk<T> choose_guarded(Overshoot rule, bool amsgrad, bool coupled);

// How far ahead of the arithmetic the streams are fetched, in bytes: 1 KiB was the best of 256 B to 4 KiB on a 2.5 GHz
// Xeon (7% over none; 4 KiB cost 30%). Past the end of a tensor a prefetch is harmless: it cannot fault.
constexpr int64_t kAhead = 1024;

template <typename T, typename S, Overshoot RULE, bool AMSGRAD, bool COUPLED, bool GUARDED>
FCA_INLINE void update_at(S* __restrict param, const S* __restrict grad, S* __restrict exp_avg,
                          S* __restrict exp_avg_sq, S* __restrict max_exp_avg_sq, int64_t i, const StepScalars<T>& s,
                          bool keep) {
  T p = load_as<T>(param[i]), m = load_as<T>(exp_avg[i]), v = load_as<T>(exp_avg_sq[i]);
  T v_max = AMSGRAD ? load_as<T>(max_exp_avg_sq[i]) : T(0);
  update_element<T, AMSGRAD, GUARDED, false>(p, load_as<T>(grad[i]), m, v, v_max, s, RULE, COUPLED, keep);
  param[i] = store_as<S>(p);
  exp_avg[i] = store_as<S>(m);
  exp_avg_sq[i] = store_as<S>(v);
  if (AMSGRAD) max_exp_avg_sq[i] = store_as<S>(v_max);
}

// Storage S, arithmetic T. Where all tensors share a 16-bit storage type they are converted in registers here; through
// tiles of float in L1 the same step took half as long again.
template <typename T, typename S, Overshoot RULE, bool AMSGRAD, bool COUPLED, bool GUARDED>
FCA_INLINE void update_tile_body(TileSet<S> tiles, int64_t n, const StepScalars<T>& scalars, bool keep, int64_t block) {
  S* __restrict param = tiles.param;
  S* __restrict exp_avg = tiles.exp_avg;
  S* __restrict exp_avg_sq = tiles.exp_avg_sq;
  S* __restrict max_exp_avg_sq = tiles.max_exp_avg_sq;
  const S* __restrict grad = tiles.grad;
  const StepScalars<T> s = scalars;
  const auto update = [&](int64_t j) FCA_LAMBDA_INLINE {
    update_at<T, S, RULE, AMSGRAD, COUPLED, GUARDED>(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, j, s, keep);
  };
  constexpr int64_t kLine = 64 / sizeof(S), ahead = kAhead / sizeof(S);
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    // With a gate, the next logical block: its reduction will find all that its update reads as well.
    const int64_t far = RULE == Overshoot::ALIGN_BLOCK ? block : ahead;
    FCA_PREFETCH(param + i + far);
    FCA_PREFETCH(grad + i + far);
    FCA_PREFETCH(exp_avg + i + far);
    FCA_PREFETCH(exp_avg_sq + i + far);
    for (int64_t j = i; j < i + kLine; ++j) update(j);
  }
  for (; i < n; ++i) update(i);
}
FCA_LEAF((typename T, typename S, Overshoot RULE, bool AMSGRAD, bool COUPLED, bool GUARDED),
         (T, S, RULE, AMSGRAD, COUPLED, GUARDED), void, update_tile,
         (TileSet<S> tiles, int64_t n, const StepScalars<T>& scalars, bool keep, int64_t block),
         (tiles, n, scalars, keep, block))

// `update_tile` of a gated block that gathers, `far` elements on, the DotEstimate of the next one: the update
// waits for memory anyhow, and the next block's update will find its tensors in the cache. n: a multiple of kLanes.
template <bool AMSGRAD, bool COUPLED>
FCA_INLINE DotEstimate update_looking_body(TileSet<float> tiles, int64_t n, const StepScalars<float>& scalars,
                                           bool keep, int64_t far) {
  float* __restrict param = tiles.param;
  float* __restrict exp_avg = tiles.exp_avg;
  float* __restrict exp_avg_sq = tiles.exp_avg_sq;
  float* __restrict max_exp_avg_sq = tiles.max_exp_avg_sq;
  const float* __restrict grad = tiles.grad;
  const float* __restrict far_param = tiles.param + far;
  const float* __restrict far_exp_avg = tiles.exp_avg + far;
  const StepScalars<float> s = scalars;
  float sum[kLanes] = {}, size[kLanes] = {};
  constexpr int64_t ahead = kAhead / sizeof(float);
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t j = i; j < i + kLanes; j += 16) {
      FCA_PREFETCH(param + j + far);
      FCA_PREFETCH(grad + j + far + ahead);
      FCA_PREFETCH(exp_avg + j + far + ahead);
      FCA_PREFETCH(exp_avg_sq + j + far);
    }
    for (int64_t j = i; j < i + kLanes; ++j) {
      update_at<float, float, Overshoot::ALIGN_BLOCK, AMSGRAD, COUPLED, false>(param, grad, exp_avg, exp_avg_sq,
                                                                               max_exp_avg_sq, j, s, keep);
    }
    for (int64_t j = 0; j < kLanes; ++j) {
      // Without an L2 term the factor of the gradient is left to the end.
      const float g =
          COUPLED ? seen_grad<float, false>(far_param[i + j], grad[i + j + far], 0.0f, s, true) : grad[i + j + far];
      const float x = far_exp_avg[i + j] * g;
      sum[j] += x;
      size[j] += std::fabs(x);
    }
  }
  DotEstimate out;
  for (int64_t j = 0; j < kLanes; ++j) {
    out.sum += static_cast<double>(sum[j]);
    out.size += static_cast<double>(size[j]);
  }
  const double factor = COUPLED ? 1.0 : static_cast<double>(s.grad_factor);
  if (out.size < 1e-30) return {0.0, HUGE_VAL};  // as good as unknown: the factor would enlarge what underflowed
  return {out.sum * factor, out.size * std::fabs(factor)};
}
FCA_LEAF((bool AMSGRAD, bool COUPLED), (AMSGRAD, COUPLED), DotEstimate, update_looking,
         (TileSet<float> tiles, int64_t n, const StepScalars<float>& scalars, bool keep, int64_t far),
         (tiles, n, scalars, keep, far))

// sum m g over a tile, for the block gate: products of float32 are exact in float64.
template <typename T, bool COUPLED, bool GUARDED>
FCA_INLINE double momentum_dot_tile_body(const T* __restrict param, const T* __restrict grad,
                                         const T* __restrict exp_avg, const T* __restrict exp_avg_sq, int64_t n,
                                         const StepScalars<T>& scalars) {
  const StepScalars<T> s = scalars;
  const auto product = [&](int64_t i) FCA_LAMBDA_INLINE {
    const T g = seen_grad<T, GUARDED>(COUPLED ? param[i] : T(0), grad[i], GUARDED ? exp_avg_sq[i] : T(0), s, COUPLED);
    return GUARDED ? momentum_dot(exp_avg[i], g) : static_cast<double>(exp_avg[i]) * static_cast<double>(g);
  };
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lane[j] += product(i + j);
  }
  for (int64_t j = 0; i + j < n; ++j) lane[j] += product(i + j);
  return fold_lanes(lane);
}
FCA_LEAF((typename T, bool COUPLED, bool GUARDED), (T, COUPLED, GUARDED), double, momentum_dot_tile,
         (const T* param, const T* grad, const T* exp_avg, const T* exp_avg_sq, int64_t n,
          const StepScalars<T>& scalars),
         (param, grad, exp_avg, exp_avg_sq, n, scalars))

template <bool COUPLED, bool GUARDED>
FCA_INLINE DotEstimate momentum_estimate_tile_body(const float* __restrict param, const float* __restrict grad,
                                                   const float* __restrict exp_avg, const float* __restrict exp_avg_sq,
                                                   int64_t n, const StepScalars<float>& scalars) {
  const StepScalars<float> s = scalars;
  float sum[kLanes] = {}, size[kLanes] = {};
  const auto add = [&](int64_t lane, int64_t i) FCA_LAMBDA_INLINE {
    const float v = GUARDED ? exp_avg_sq[i] : 0.0f;
    const float x = exp_avg[i] * seen_grad<float, GUARDED>(COUPLED ? param[i] : 0.0f, grad[i], v, s, COUPLED);
    sum[lane] += x;
    size[lane] += std::fabs(x);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) add(j, i + j);
  }
  for (int64_t j = 0; i + j < n; ++j) add(j, i + j);
  DotEstimate out;
  for (int64_t j = 0; j < kLanes; ++j) {
    out.sum += static_cast<double>(sum[j]);
    out.size += static_cast<double>(size[j]);
  }
  return out;
}
FCA_LEAF((bool COUPLED, bool GUARDED), (COUPLED, GUARDED), DotEstimate, momentum_estimate_tile,
         (const float* param, const float* grad, const float* exp_avg, const float* exp_avg_sq, int64_t n,
          const StepScalars<float>& scalars),
         (param, grad, exp_avg, exp_avg_sq, n, scalars))

// Whether the sign of the exact sum is known: 64 roundings of the terms are 4e-6 of their size, what underflows is less
// than 1e-35. Not where anything is infinite or NaN.
inline bool is_certain(const DotEstimate& estimate) {
  return std::fabs(estimate.sum) > 1e-5 * estimate.size && estimate.size > 1e-30 && estimate.size < 1e38;
}

// Whether a tile holds a spike, see `seen_grad`.
template <typename T, bool COUPLED>
FCA_INLINE bool has_spike_body(const T* __restrict param, const T* __restrict grad, const T* __restrict exp_avg_sq,
                               int64_t n, const StepScalars<T>& scalars) {
  const StepScalars<T> s = scalars;
  int found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T g = scaled_grad<T, true>(COUPLED ? param[i] : T(0), grad[i], s, COUPLED);
    const T v = exp_avg_sq[i];
    found |= static_cast<int>((g * g > s.theta * v) & (v > s.spike_floor));
  }
  return found != 0;
}
FCA_LEAF((typename T, bool COUPLED), (T, COUPLED), bool, has_spike,
         (const T* param, const T* grad, const T* exp_avg_sq, int64_t n, const StepScalars<T>& scalars),
         (param, grad, exp_avg_sq, n, scalars))

// The 16-bit type that all of a row's tensors are stored in, or F32 if there is none.
inline DType shared_narrow_dtype(const Row& row) {
  const bool shared = row.dtype[0] == row.dtype[1] && row.dtype[1] == row.dtype[2];
  return shared && (row.dtype[0] == DType::BF16 || row.dtype[0] == DType::F16) ? row.dtype[0] : DType::F32;
}

template <typename S>
TileSet<S> stored_tile(const Row& row, int64_t i) {
  const auto at = [&](Slot slot) { return reinterpret_cast<S*>(row.data[slot]) + i; };
  return {at(PARAM), at(EXP_AVG), at(EXP_AVG_SQ), row.data[MAX_EXP_AVG_SQ] ? at(MAX_EXP_AVG_SQ) : nullptr, at(GRAD)};
}

// A tile of tensors that share a 16-bit storage type.
template <typename T, typename S, Overshoot RULE, bool AMSGRAD, bool COUPLED, bool GUARDED>
void update_stored(const Row& row, int64_t i, int64_t n, const StepScalars<T>& scalars, bool keep, int64_t block,
                   bool plain) {
  if (plain) {
    plain_tile<T, S>(RULE, AMSGRAD, COUPLED)(stored_tile<S>(row, i), n, scalars, keep, block);
  } else {
    update_tile<T, S, RULE, AMSGRAD, COUPLED, GUARDED>(stored_tile<S>(row, i), n, scalars, keep, block);
  }
}

template <typename T>
void clear(const TileSet<T>& tiles, int64_t n) {
  std::fill_n(tiles.exp_avg, n, T(0));
  std::fill_n(tiles.exp_avg_sq, n, T(0));
  if (tiles.max_exp_avg_sq != nullptr) std::fill_n(tiles.max_exp_avg_sq, n, T(0));
}

// Whether a gated tensor's loop can be `update_looking`.
template <typename T, Overshoot RULE, bool GUARDED>
bool can_look(const Row& row, bool flat, int64_t block) {
  if (GUARDED || RULE != Overshoot::ALIGN_BLOCK || sizeof(T) != 4 || !flat || block % kLanes != 0) return false;
  if (row.samples >= 0) return false;
  return row.dtype[0] == DType::F32 && row.dtype[1] == DType::F32 && row.dtype[2] == DType::F32;
}

constexpr int64_t kMostKept = 65536;  // elements: a quarter of a megabyte stays in the L2

template <typename T, Overshoot RULE, bool AMSGRAD, bool COUPLED, bool GUARDED>
ChunkSums update_chunk(const Table& table, const Chunk& chunk, const StepScalars<T>& scalars,
                       const ChunkOptions& options, DotEstimate& looked) {
  const Row& row = table.row[chunk.row];
  const int64_t block = options.block;
  const bool units = GUARDED && options.unit_factors != nullptr, dots = GUARDED && options.sum_dots;
  const bool before = GUARDED && scalars.forget == T(1), after = GUARDED && scalars.forget == T(2);
  // Blocks and output rows are runs of the logical order: memory order will do only where the two agree.
  const bool flat = RULE == Overshoot::ALIGN_BLOCK || units ? row.strided == 0 : in_memory_order(table, row);
  // With a reduction before it the tiles have been converted already (and g++ leaves the gated 16-bit loop scalar).
  const bool stacked = row.samples >= 0;
  const DType narrow = flat && RULE != Overshoot::ALIGN_BLOCK && !units && !dots && !before && !after && !stacked
                           ? shared_narrow_dtype(row)
                           : DType::F32;
  SlotTile<T> param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq;
  ChunkSums sums;
  // The gradient of a block of samples, summed up once for all who read it.
  std::vector<T> kept(stacked && block <= kMostKept ? block : 0);
  int64_t kept_from = 0;
  const auto read_raw_grad = [&](int64_t i, int64_t n) {
    if (kept.empty()) return grad.read(table, row, GRAD, flat, i, n);
    grad.data = kept.data() + (i - kept_from);
  };
  const auto read_grad = [&](int64_t i, int64_t n) {
    read_raw_grad(i, n);
    if (units) scale_units(grad, row, options.unit_factors, i, n);
  };
  const auto read_for_dot = [&](int64_t i, int64_t n) {
    read_grad(i, n);
    exp_avg.read(table, row, EXP_AVG, flat, i, n);
    if (COUPLED) param.read(table, row, PARAM, flat, i, n);
    if (GUARDED) exp_avg_sq.read(table, row, EXP_AVG_SQ, flat, i, n);
  };
  const auto dot_of_tile = [&](int64_t i, int64_t n) {
    read_for_dot(i, n);
    return momentum_dot_tile<T, COUPLED, GUARDED>(param.data, grad.data, exp_avg.data, exp_avg_sq.data, n, scalars);
  };
  // Whether the momentum of a logical block is kept: sum m g > 0. (All-zero momentum: either answer gives d = b g.)
  const auto keeps = [&](int64_t start, int64_t stop, const DotEstimate& looked) {
    if (is_certain(looked)) return looked.sum > 0;
    if constexpr (sizeof(T) == 4) {
      DotEstimate estimate;
      for (int64_t i = start; i < stop; i += kTile) {
        const int64_t n = std::min(kTile, stop - i);
        read_for_dot(i, n);
        const DotEstimate own =
            momentum_estimate_tile<COUPLED, GUARDED>(param.data, grad.data, exp_avg.data, exp_avg_sq.data, n, scalars);
        estimate = {estimate.sum + own.sum, estimate.size + own.size};
      }
      if (is_certain(estimate)) return estimate.sum > 0;
    }
    double dot = 0;
    for (int64_t i = start; i < stop; i += kTile) dot += dot_of_tile(i, std::min(kTile, stop - i));
    return dot > 0;
  };
  // Guards that may act on any element; a spike is looked for tile by tile.
  const bool acting =
      GUARDED && (scalars.tau < std::numeric_limits<T>::infinity() || scalars.keep == T(0) || scalars.prox != T(0));
  const bool spikes = GUARDED && scalars.theta < std::numeric_limits<T>::infinity();
  const bool looking = can_look<T, RULE, GUARDED>(row, flat, block);
  for (int64_t start = chunk.begin; start < chunk.end; start += block) {
    const int64_t stop = std::min(start + block, chunk.end);
    if (!kept.empty()) {
      kept_from = start;
      for (int64_t i = start; i < stop; i += kTile) {
        read_samples<T>(table, row, flat, i, std::min(kTile, stop - i), kept.data() + (i - start));
      }
    }
    const bool keep = RULE == Overshoot::ALIGN_BLOCK ? keeps(start, stop, looked) : true;
    looked = {};
    if constexpr (sizeof(T) == 4 && RULE == Overshoot::ALIGN_BLOCK && !GUARDED) {
      if (looking && stop + block <= (options.goes_on ? row.numel : chunk.end)) {
        for (int64_t i = start; i < stop; i += kTile) {
          const int64_t n = std::min(kTile, stop - i);
          const DotEstimate own = update_looking<AMSGRAD, COUPLED>(stored_tile<float>(row, i), n, scalars, keep, block);
          looked = {looked.sum + own.sum, looked.size + own.size};
          if (options.sum_squares) {
            grad.read(table, row, GRAD, flat, i, n);
            sums.squares += sum_squares_tile<T, false>(grad.data, n);
          }
        }
        continue;
      }
    }
    for (int64_t i = start; i < stop; i += kTile) {
      const int64_t n = std::min(kTile, stop - i);
      if constexpr (sizeof(T) == 4) {
        if (narrow != DType::F32) {
          if (narrow == DType::BF16) {
            update_stored<T, BFloat16, RULE, AMSGRAD, COUPLED, GUARDED>(row, i, n, scalars, keep, block,
                                                                        GUARDED && !acting && !spikes);
          } else {
            update_stored<T, Float16, RULE, AMSGRAD, COUPLED, GUARDED>(row, i, n, scalars, keep, block,
                                                                       GUARDED && !acting && !spikes);
          }
          if (options.sum_squares) {
            grad.read(table, row, GRAD, flat, i, n);
            sums.squares += sum_squares_tile<T, false>(grad.data, n);
          }
          continue;
        }
      }
      if (dots && !before) sums.dot += dot_of_tile(i, n);
      param.read(table, row, PARAM, flat, i, n);
      read_grad(i, n);
      exp_avg.read(table, row, EXP_AVG, flat, i, n);
      exp_avg_sq.read(table, row, EXP_AVG_SQ, flat, i, n);
      if (AMSGRAD) max_exp_avg_sq.read(table, row, MAX_EXP_AVG_SQ, flat, i, n);
      const TileSet<T> tiles = {param.data, exp_avg.data, exp_avg_sq.data, AMSGRAD ? max_exp_avg_sq.data : nullptr,
                                grad.data};
      if (before) clear(tiles, n);
      const bool acts =
          acting || (spikes && has_spike<T, COUPLED>(tiles.param, tiles.grad, tiles.exp_avg_sq, n, scalars));
      if (GUARDED && !acts) {
        plain_tile<T, T>(RULE, AMSGRAD, COUPLED)(tiles, n, scalars, keep, block);
      } else {
        update_tile<T, T, RULE, AMSGRAD, COUPLED, GUARDED>(tiles, n, scalars, keep, block);
      }
      if (after) clear(tiles, n);
      if (options.sum_squares) {  // after the update: the gradient is in L1 now
        if (units || stacked) read_raw_grad(i, n);
        sums.squares += sum_squares_tile<T, false>(grad.data, n);
      }
      param.write(table, row, PARAM, flat, i, n);
      exp_avg.write(table, row, EXP_AVG, flat, i, n);
      exp_avg_sq.write(table, row, EXP_AVG_SQ, flat, i, n);
      if (AMSGRAD) max_exp_avg_sq.write(table, row, MAX_EXP_AVG_SQ, flat, i, n);
    }
  }
  return sums;
}

}  // namespace fca
