// Sums over the elements of each tensor, or of each of its output rows, that rules need before the update.
//
// Bytes per float32 element: 4 (g), and 4 more for each other tensor that `summand` reads.
#include <cmath>

#include "../update_math.h"
#include "table.h"

namespace fca {
namespace {

template <typename T>
struct Streams {
  const T *param, *grad, *exp_avg, *exp_avg_sq;  // null where the kind does not read it
};

template <typename T, Sum KIND, bool COUPLED, bool SPIKED>
FCA_INLINE Summand reduce_tile_body(const Streams<T>& streams, int64_t n, const StepScalars<T>& scalars) {
  const T* __restrict param = streams.param;
  const T* __restrict grad = streams.grad;
  const T* __restrict exp_avg = streams.exp_avg;
  const T* __restrict exp_avg_sq = streams.exp_avg_sq;
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T)), kFetch = 4096 / static_cast<int64_t>(sizeof(T));
  const StepScalars<T> s = scalars;
  double x[kLanes] = {}, y[kLanes] = {};
  const auto add = [&](int64_t lane, int64_t i) FCA_LAMBDA_INLINE {
    const T p = reads_param(KIND) || COUPLED ? param[i] : T(0);
    const Summand own = summand<T>(KIND, COUPLED, p, grad[i], reads_exp_avg(KIND) ? exp_avg[i] : T(0),
                                   reads_exp_avg_sq(KIND, SPIKED) ? exp_avg_sq[i] : T(0), s);
    x[lane] += own.x;
    if (KIND == Sum::SQUARES_MAX) {
      y[lane] = own.y > y[lane] ? own.y : y[lane];
    } else if (KIND == Sum::FADAM) {
      y[lane] += own.y;
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; j += kLine) {
      FCA_PREFETCH(grad + i + j + kFetch);
      if (reads_param(KIND) || COUPLED) FCA_PREFETCH(param + i + j + kFetch);
      if (reads_exp_avg(KIND)) FCA_PREFETCH(exp_avg + i + j + kFetch);
      if (reads_exp_avg_sq(KIND, SPIKED)) FCA_PREFETCH(exp_avg_sq + i + j + kFetch);
    }
    for (int64_t j = 0; j < kLanes; ++j) add(j, i + j);
  }
  for (int64_t j = 0; i + j < n; ++j) add(j, i + j);
  Summand out = {fold_lanes(x), 0.0};
  if (KIND == Sum::SQUARES_MAX) {
    for (int64_t j = 0; j < kLanes; ++j) out.y = y[j] > out.y ? y[j] : out.y;
  } else {
    out.y = fold_lanes(y);
  }
  return out;
}
FCA_LEAF((typename T, Sum KIND, bool COUPLED, bool SPIKED), (T, KIND, COUPLED, SPIKED), Summand, reduce_tile,
         (const Streams<T>& streams, int64_t n, const StepScalars<T>& scalars), (streams, n, scalars))

Summand joined(Sum kind, Summand left, Summand right) {
  const double y = kind == Sum::SQUARES_MAX ? (right.y > left.y ? right.y : left.y) : left.y + right.y;
  return {left.x + right.x, y};
}

template <typename T, Sum KIND, bool COUPLED, bool SPIKED>
Summand reduce_chunk(const Table& table, const Chunk& chunk, const StepScalars<T>& scalars,
                     const double* unit_factors) {
  const Row& row = table.row[chunk.row];
  const bool flat = unit_factors == nullptr ? in_memory_order(table, row) : row.strided == 0;
  SlotTile<T> param, grad, exp_avg, exp_avg_sq;
  Summand sum = {0.0, 0.0};
  for (int64_t i = chunk.begin; i < chunk.end; i += kTile) {
    const int64_t n = std::min(kTile, chunk.end - i);
    grad.read(table, row, GRAD, flat, i, n);
    if (unit_factors != nullptr) scale_units(grad, row, unit_factors, i, n);
    if (reads_param(KIND) || COUPLED) param.read(table, row, PARAM, flat, i, n);
    if (reads_exp_avg(KIND)) exp_avg.read(table, row, EXP_AVG, flat, i, n);
    if (reads_exp_avg_sq(KIND, SPIKED)) exp_avg_sq.read(table, row, EXP_AVG_SQ, flat, i, n);
    sum = joined(
        KIND, sum,
        reduce_tile<T, KIND, COUPLED, SPIKED>({param.data, grad.data, exp_avg.data, exp_avg_sq.data}, n, scalars));
  }
  return sum;
}

template <typename T>
using ReduceChunk = Summand (*)(const Table&, const Chunk&, const StepScalars<T>&, const double*);

template <typename T, Sum KIND>
ReduceChunk<T> choose_flags(bool coupled, bool spiked) {
  if (spiked) return coupled ? reduce_chunk<T, KIND, true, true> : reduce_chunk<T, KIND, false, true>;
  return coupled ? reduce_chunk<T, KIND, true, false> : reduce_chunk<T, KIND, false, false>;
}

template <typename T>
ReduceChunk<T> choose(Sum kind, bool coupled, bool spiked) {
  switch (kind) {
    case Sum::SQUARES_MAX:
      return reduce_chunk<T, Sum::SQUARES_MAX, false, false>;
    case Sum::DOT:
      return choose_flags<T, Sum::DOT>(coupled, spiked);
    case Sum::AGREE:
      return choose_flags<T, Sum::AGREE>(coupled, spiked);
    case Sum::RMS:
      return choose_flags<T, Sum::RMS>(coupled, spiked);
    case Sum::METRIC:
      return choose_flags<T, Sum::METRIC>(coupled, spiked);
    case Sum::TAU_SQUARES:
      return reduce_chunk<T, Sum::TAU_SQUARES, false, false>;
    case Sum::FADAM:
      return reduce_chunk<T, Sum::FADAM, false, false>;
  }
  fail("unknown reduction ", static_cast<int64_t>(kind));
}

// float64[rows, 2], by tensor. scalars: float64[rows, kTensorScalars], absent for SQUARES_MAX, which needs none.
// unit_factors: as of `update_`.
Tensor reduce(const Tensor& table_tensor, std::optional<Tensor> scalars_tensor, int64_t kind_code, bool coupled,
              bool spiked, std::optional<Tensor> unit_factors, std::optional<Tensor> sample_weights,
              std::optional<Tensor> seed, double noise, int64_t first_row) {
  const Table table = read_table(table_tensor, sample_weights, seed, noise, first_row);
  const Sum kind = static_cast<Sum>(kind_code);
  const ReduceChunk<float> reduce_f32 = choose<float>(kind, coupled, spiked);
  const ReduceChunk<double> reduce_f64 = choose<double>(kind, coupled, spiked);
  check(kind == Sum::SQUARES_MAX || scalars_tensor, "this reduction needs scalars");
  const TensorScalars none = {};
  const TensorScalars* scalars = nullptr;
  if (scalars_tensor) {
    check_buffer(*scalars_tensor, ScalarType::Double, table.rows * kTensorScalars, "scalars");
    scalars = reinterpret_cast<const TensorScalars*>(const_data<double>(*scalars_tensor));
  }
  const std::vector<int64_t> starts = unit_factors ? unit_starts(table) : std::vector<int64_t>();
  if (unit_factors) check_buffer(*unit_factors, ScalarType::Double, starts.back(), "unit_factors");
  const double* factors = unit_factors ? const_data<double>(*unit_factors) : nullptr;
  const std::vector<Chunk> chunks = make_chunks(table, kTile);
  const int64_t n = static_cast<int64_t>(chunks.size());
  std::vector<Summand> partial(n);
  torch::stable::parallel_for(0, n, chunk_grain(table, n), [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const StepScalars<double>& own = (scalars == nullptr ? none : scalars[chunks[c].row]).step;
      const double* own_factors = factors == nullptr ? nullptr : factors + starts[chunks[c].row];
      partial[c] = table.row[chunks[c].row].dtype[PARAM] == DType::F64
                       ? reduce_f64(table, chunks[c], own, own_factors)
                       : reduce_f32(table, chunks[c], rounded<float>(own), own_factors);
    }
  });
  Tensor out = torch::stable::empty({table.rows, 2}, ScalarType::Double);
  auto* sums = reinterpret_cast<Summand*>(mutable_data<double>(out));
  std::fill_n(sums, table.rows, Summand{0.0, 0.0});
  for (int64_t c = 0; c < n; ++c) sums[chunks[c].row] = joined(kind, sums[chunks[c].row], partial[c]);
  return out;
}

// sum of squares of n elements of a slot, in tiles
template <typename T>
double squares_of(const Table& table, const Row& row, Slot slot, SlotTile<T>& tile, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = std::min(kTile, end - i);
    tile.read(table, row, slot, row.strided == 0, i, n);
    sum += sum_squares_tile<T, true>(tile.data, n);
  }
  return sum;
}

template <typename T>
void units_of_chunk(const Table& table, const Chunk& chunk, Summand* sums) {
  const Row& row = table.row[chunk.row];
  SlotTile<T> tile;
  for (int64_t i = chunk.begin; i < chunk.end; i += row.unit) {
    sums[i / row.unit] = {squares_of<T>(table, row, GRAD, tile, i, i + row.unit),
                          squares_of<T>(table, row, PARAM, tile, i, i + row.unit)};
  }
}

// float64[output rows of all tensors, 2]: sums of squares of raw gradients and of parameters.
Tensor unit_sums(const Tensor& table_tensor, std::optional<Tensor> sample_weights, std::optional<Tensor> seed,
                 double noise, int64_t first_row) {
  const Table table = read_table(table_tensor, sample_weights, seed, noise, first_row);
  const std::vector<int64_t> starts = unit_starts(table);
  const std::vector<Chunk> chunks = make_unit_chunks(table);
  const int64_t n = static_cast<int64_t>(chunks.size());
  Tensor out = torch::stable::empty({starts.back(), 2}, ScalarType::Double);
  auto* sums = reinterpret_cast<Summand*>(mutable_data<double>(out));
  torch::stable::parallel_for(0, n, chunk_grain(table, n), [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t r = chunks[c].row;
      if (table.row[r].dtype[PARAM] == DType::F64) {
        units_of_chunk<double>(table, chunks[c], sums + starts[r]);
      } else {
        units_of_chunk<float>(table, chunks[c], sums + starts[r]);
      }
    }
  });
  return out;
}

template <typename T, typename S>
void squares_of_samples(const Row& row, const Table& table, const Chunk& chunk, double* sums) {
  const S* const stack = reinterpret_cast<const S*>(row.data[GRAD]);
  alignas(64) T buffer[kTile];
  for (const int64_t b : table.weighed) {
    Row one = row;
    one.samples = -1;
    one.data[GRAD] = reinterpret_cast<int64_t>(stack + b * row.sample);
    for (int64_t i = chunk.begin; i < chunk.end; i += kTile) {
      const int64_t n = std::min(kTile, chunk.end - i);
      const T* tile = direct_slot<T>(one, GRAD, row.flat != 0, i);
      if (tile == nullptr) read_slot<T>(table, one, GRAD, row.flat != 0, i, n, buffer);
      sums[b] += sum_squares_tile<T, true>(tile == nullptr ? buffer : tile, n);
    }
  }
}

// float64[samples]: the sum of squares of every sample over all tensors of the table, weights not counted. Those of
// weight 0 are not read, and 0.
Tensor sample_square_sums(const Tensor& table_tensor, const Tensor& sample_weights) {
  const Table table = read_table(table_tensor, sample_weights, {}, 0.0, 0);
  const std::vector<Chunk> chunks = make_chunks(table, kTile);
  const int64_t n = static_cast<int64_t>(chunks.size()), samples = sample_weights.numel();
  std::vector<double> partial(n * samples, 0.0);
  torch::stable::parallel_for(0, n, chunk_grain(table, n), [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Row& row = table.row[chunks[c].row];
      double* const sums = partial.data() + c * samples;
      switch (row.dtype[GRAD]) {
        case DType::F64:
          squares_of_samples<double, double>(row, table, chunks[c], sums);
          break;
        case DType::F32:
          squares_of_samples<float, float>(row, table, chunks[c], sums);
          break;
        case DType::BF16:
          squares_of_samples<float, BFloat16>(row, table, chunks[c], sums);
          break;
        case DType::F16:
          squares_of_samples<float, Float16>(row, table, chunks[c], sums);
          break;
      }
    }
  });
  Tensor out = torch::stable::empty({samples}, ScalarType::Double);
  double* sums = mutable_data<double>(out);
  std::fill_n(sums, samples, 0.0);
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t b = 0; b < samples; ++b) sums[b] += partial[c * samples + b];
  }
  return out;
}

}  // namespace
}  // namespace fca

STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, CPU, m) {
  m.impl("reduce", TORCH_BOX(&fca::reduce));
  m.impl("unit_sums", TORCH_BOX(&fca::unit_sums));
  m.impl("sample_square_sums", TORCH_BOX(&fca::sample_square_sums));
}
