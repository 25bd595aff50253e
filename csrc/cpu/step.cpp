// Phase 3: one pass over parameters, gradients and moments.
//
// Bytes per float32 element: 16 read (p, g, m, v) + 12 written (p, m, v) = 28, amsgrad 36. About 20 operations, of
// which one square root and one division: the pass is bound by memory, and every extra below is free or nearly so.
#include <optional>

#include "../update_math.h"
#include "table.h"

namespace fca {
namespace {

// Addresses of one tile, in the storage type S.
template <typename S>
struct TileSet {
  S *param, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
  const S* grad;
};

// How far ahead of the arithmetic the streams are fetched, in bytes: 1 KiB was the best of 256 B to 4 KiB on a 2.5 GHz
// Xeon (7% over none; 4 KiB cost 30%). Past the end of a tensor a prefetch is harmless: it cannot fault.
constexpr int64_t kAhead = 1024;

// Storage S, arithmetic T. Where all tensors share a 16-bit storage type they are converted in registers here; through
// tiles of float in L1 the same step took half as long again.
template <typename T, typename S, Overshoot RULE, bool AMSGRAD, bool COUPLED>
FCA_INLINE void update_tile_body(TileSet<S> tiles, int64_t n, const StepScalars<T>& scalars, bool keep) {
  S* __restrict param = tiles.param;
  S* __restrict exp_avg = tiles.exp_avg;
  S* __restrict exp_avg_sq = tiles.exp_avg_sq;
  S* __restrict max_exp_avg_sq = tiles.max_exp_avg_sq;
  const S* __restrict grad = tiles.grad;
  const StepScalars<T> s = scalars;
  const auto update = [&](int64_t j) FCA_LAMBDA_INLINE {
    T p = load_as<T>(param[j]), m = load_as<T>(exp_avg[j]), v = load_as<T>(exp_avg_sq[j]);
    T v_max = AMSGRAD ? load_as<T>(max_exp_avg_sq[j]) : T(0);
    update_element<T, RULE, AMSGRAD, COUPLED>(p, load_as<T>(grad[j]), m, v, v_max, s, keep);
    param[j] = store_as<S>(p);
    exp_avg[j] = store_as<S>(m);
    exp_avg_sq[j] = store_as<S>(v);
    if (AMSGRAD) max_exp_avg_sq[j] = store_as<S>(v_max);
  };
  constexpr int64_t kLine = 64 / sizeof(S), ahead = kAhead / sizeof(S);
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    if (RULE != Overshoot::ALIGN_BLOCK) {  // there the block's own reduction has fetched half of it already
      FCA_PREFETCH(param + i + ahead);
      FCA_PREFETCH(grad + i + ahead);
      FCA_PREFETCH(exp_avg + i + ahead);
      FCA_PREFETCH(exp_avg_sq + i + ahead);
    }
    for (int64_t j = i; j < i + kLine; ++j) update(j);
  }
  for (; i < n; ++i) update(i);
}
FCA_LEAF((typename T, typename S, Overshoot RULE, bool AMSGRAD, bool COUPLED), (T, S, RULE, AMSGRAD, COUPLED), void,
         update_tile, (TileSet<S> tiles, int64_t n, const StepScalars<T>& scalars, bool keep),
         (tiles, n, scalars, keep))

// sum m g over a tile, for the block gate: products of float32 are exact in float64.
template <typename T, bool COUPLED>
FCA_INLINE double momentum_dot_tile_body(const T* __restrict param, const T* __restrict grad,
                                         const T* __restrict exp_avg, int64_t n, const StepScalars<T>& scalars) {
  const StepScalars<T> s = scalars;
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const T g = scaled_grad<T, COUPLED>(COUPLED ? param[i + j] : T(0), grad[i + j], s);
      lane[j] += static_cast<double>(exp_avg[i + j]) * static_cast<double>(g);
    }
  }
  for (int64_t j = 0; i + j < n; ++j) {
    const T g = scaled_grad<T, COUPLED>(COUPLED ? param[i + j] : T(0), grad[i + j], s);
    lane[j] += static_cast<double>(exp_avg[i + j]) * static_cast<double>(g);
  }
  return fold_lanes(lane);
}
FCA_LEAF((typename T, bool COUPLED), (T, COUPLED), double, momentum_dot_tile,
         (const T* param, const T* grad, const T* exp_avg, int64_t n, const StepScalars<T>& scalars),
         (param, grad, exp_avg, n, scalars))

// A slot as a tile of the arithmetic type: its own memory, or a converted copy to be written back.
template <typename T>
struct SlotTile {
  alignas(64) T buffer[kTile];
  T* data;
  bool copied;
  void read(const Table& table, const Row& row, Slot slot, bool flat, int64_t begin, int64_t n) {
    data = direct_slot<T>(row, slot, flat, begin);
    copied = data == nullptr;
    if (copied) read_slot<T>(table, row, slot, flat, begin, n, data = buffer);
  }
  void write(const Table& table, const Row& row, Slot slot, bool flat, int64_t begin, int64_t n) const {
    if (copied) write_slot<T>(table, row, slot, flat, begin, n, buffer);
  }
};

// The 16-bit type that all of a row's tensors are stored in, or F32 if there is none.
DType shared_narrow_dtype(const Row& row) {
  const bool shared = row.dtype[0] == row.dtype[1] && row.dtype[1] == row.dtype[2];
  return shared && (row.dtype[0] == DType::BF16 || row.dtype[0] == DType::F16) ? row.dtype[0] : DType::F32;
}

template <typename S>
TileSet<S> stored_tile(const Row& row, int64_t i) {
  const auto at = [&](Slot slot) { return reinterpret_cast<S*>(row.data[slot]) + i; };
  return {at(PARAM), at(EXP_AVG), at(EXP_AVG_SQ), row.data[MAX_EXP_AVG_SQ] ? at(MAX_EXP_AVG_SQ) : nullptr, at(GRAD)};
}

// Returns the chunk's sum of squared raw gradients where asked, else 0.
template <typename T, Overshoot RULE, bool AMSGRAD, bool COUPLED>
double update_chunk(const Table& table, const Chunk& chunk, const StepScalars<T>& scalars, int64_t block,
                    bool sum_squares) {
  const Row& row = table.row[chunk.row];
  // Blocks are runs of the logical order, so memory order will do only where the two agree.
  const bool flat = RULE == Overshoot::ALIGN_BLOCK ? row.strided == 0 : row.flat != 0;
  // With a block gate the tiles have been converted already (and g++ leaves the gated 16-bit loop scalar).
  const DType narrow = flat && RULE != Overshoot::ALIGN_BLOCK ? shared_narrow_dtype(row) : DType::F32;
  SlotTile<T> param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq;
  double sum = 0;
  for (int64_t start = chunk.begin; start < chunk.end; start += block) {
    const int64_t stop = std::min(start + block, chunk.end);
    bool keep = true;
    if (RULE == Overshoot::ALIGN_BLOCK) {
      double dot = 0;
      for (int64_t i = start; i < stop; i += kTile) {
        const int64_t n = std::min(kTile, stop - i);
        grad.read(table, row, GRAD, flat, i, n);
        exp_avg.read(table, row, EXP_AVG, flat, i, n);
        if (COUPLED) param.read(table, row, PARAM, flat, i, n);
        dot += momentum_dot_tile<T, COUPLED>(COUPLED ? param.data : nullptr, grad.data, exp_avg.data, n, scalars);
      }
      keep = dot > 0;  // all-zero momentum: nothing to drop, either answer gives d = b g
    }
    for (int64_t i = start; i < stop; i += kTile) {
      const int64_t n = std::min(kTile, stop - i);
      if constexpr (sizeof(T) == 4) {
        if (narrow != DType::F32) {
          if (narrow == DType::BF16) {
            update_tile<T, BFloat16, RULE, AMSGRAD, COUPLED>(stored_tile<BFloat16>(row, i), n, scalars, keep);
          } else {
            update_tile<T, Float16, RULE, AMSGRAD, COUPLED>(stored_tile<Float16>(row, i), n, scalars, keep);
          }
          if (sum_squares) {
            grad.read(table, row, GRAD, flat, i, n);
            sum += sum_squares_tile<T, false>(grad.data, n);
          }
          continue;
        }
      }
      param.read(table, row, PARAM, flat, i, n);
      grad.read(table, row, GRAD, flat, i, n);
      exp_avg.read(table, row, EXP_AVG, flat, i, n);
      exp_avg_sq.read(table, row, EXP_AVG_SQ, flat, i, n);
      if (AMSGRAD) max_exp_avg_sq.read(table, row, MAX_EXP_AVG_SQ, flat, i, n);
      const TileSet<T> tiles = {param.data, exp_avg.data, exp_avg_sq.data, AMSGRAD ? max_exp_avg_sq.data : nullptr,
                                grad.data};
      update_tile<T, T, RULE, AMSGRAD, COUPLED>(tiles, n, scalars, keep);
      if (sum_squares) sum += sum_squares_tile<T, false>(grad.data, n);  // after the update: the gradient is in L1 now
      param.write(table, row, PARAM, flat, i, n);
      exp_avg.write(table, row, EXP_AVG, flat, i, n);
      exp_avg_sq.write(table, row, EXP_AVG_SQ, flat, i, n);
      if (AMSGRAD) max_exp_avg_sq.write(table, row, MAX_EXP_AVG_SQ, flat, i, n);
    }
  }
  return sum;
}

template <typename T>
using UpdateChunk = double (*)(const Table&, const Chunk&, const StepScalars<T>&, int64_t, bool);

template <typename T, Overshoot RULE>
UpdateChunk<T> choose_flags(bool amsgrad, bool coupled) {
  if (amsgrad) return coupled ? update_chunk<T, RULE, true, true> : update_chunk<T, RULE, true, false>;
  return coupled ? update_chunk<T, RULE, false, true> : update_chunk<T, RULE, false, false>;
}

template <typename T>
UpdateChunk<T> choose(Overshoot rule, bool amsgrad, bool coupled) {
  switch (rule) {
    case Overshoot::NONE:
      return choose_flags<T, Overshoot::NONE>(amsgrad, coupled);
    case Overshoot::ALIGN_BLOCK:
      return choose_flags<T, Overshoot::ALIGN_BLOCK>(amsgrad, coupled);
    case Overshoot::ALIGN_ELEMENT:
      return choose_flags<T, Overshoot::ALIGN_ELEMENT>(amsgrad, coupled);
    case Overshoot::CAUTIOUS:
      return choose_flags<T, Overshoot::CAUTIOUS>(amsgrad, coupled);
    case Overshoot::GRAMS:
      return choose_flags<T, Overshoot::GRAMS>(amsgrad, coupled);
    case Overshoot::ATAN2:
      return choose_flags<T, Overshoot::ATAN2>(amsgrad, coupled);
  }
  fail("unknown overshoot rule ", static_cast<int64_t>(rule));
}

void update_(const Tensor& table_tensor, const Tensor& group_scalars, const Tensor& control,
             std::optional<Tensor> clip_factors, bool coupled, bool amsgrad, int64_t overshoot, int64_t block,
             std::optional<Tensor> grad_square_sum) {
  const Table table = read_table(table_tensor);
  const int64_t groups = group_scalars.numel() / kGroupScalars;
  check_buffer(group_scalars, ScalarType::Double, groups * kGroupScalars, "group_scalars");
  check_buffer(control, ScalarType::Double, groups * kControl, "control");
  if (clip_factors) check_buffer(*clip_factors, ScalarType::Double, table.rows, "clip_factors");
  check(block >= 1, "block must be at least 1, got ", block);
  const auto* group = reinterpret_cast<const GroupScalars*>(const_data<double>(group_scalars));
  const auto* signals = reinterpret_cast<const Control*>(const_data<double>(control));

  const Overshoot rule = static_cast<Overshoot>(overshoot);
  const UpdateChunk<float> update_f32 = choose<float>(rule, amsgrad, coupled);
  const UpdateChunk<double> update_f64 = choose<double>(rule, amsgrad, coupled);
  const int64_t unit = rule == Overshoot::ALIGN_BLOCK ? block : kTile;

  for (int64_t r = 0; r < table.rows; ++r) {
    const Row& row = table.row[r];
    check(row.group >= 0 && row.group < groups, "control has no group ", row.group);
    check(!amsgrad || row.numel == 0 || row.data[MAX_EXP_AVG_SQ] != 0, "amsgrad needs max_exp_avg_sqs");
  }
  if (table.rows == 0 || signals[table.row[0].group].skip != 0.0) return;

  std::vector<StepScalars<double>> scalars(table.rows);
  const std::vector<Chunk> chunks = make_chunks(table, unit);
  const int64_t n = static_cast<int64_t>(chunks.size());
  const bool sum_squares = grad_square_sum.has_value();
  std::vector<double> partial(n);

  // Nothing below can fail: from here on memory is written.
  for (int64_t r = 0; r < table.rows; ++r) {
    const Row& row = table.row[r];
    scalars[r] = advance(row, group[row.group], signals[row.group], group[row.group].lr);
    if (clip_factors) scalars[r].grad_factor *= const_data<double>(*clip_factors)[r];
  }

  torch::stable::parallel_for(0, n, chunk_grain(table, n), [&](int64_t first, int64_t last) {
    // Backwards: the norm pass has just left the end of the gradients in the cache.
    for (int64_t c = last - 1; c >= first; --c) {
      const int64_t r = chunks[c].row;
      partial[c] = table.row[r].dtype[PARAM] == DType::F64
                       ? update_f64(table, chunks[c], scalars[r], unit, sum_squares)
                       : update_f32(table, chunks[c], rounded<float>(scalars[r]), unit, sum_squares);
    }
  });
  if (sum_squares) {
    double total = 0;
    for (double part : partial) total += part;
    const double unscale = signals[table.row[0].group].unscale;  // one for the whole step
    *mutable_data<double>(*grad_square_sum) += total * unscale * unscale;
  }
}

}  // namespace
}  // namespace fca

STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, CPU, m) { m.impl("update_", TORCH_BOX(&fca::update_)); }
