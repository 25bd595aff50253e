// Phase 3: one pass over parameters, gradients and moments.
//
// Bytes per float32 element: 16 read (p, g, m, v) + 12 written (p, m, v) = 28, amsgrad 36. About 20 operations, of
// which one square root and one division: the pass is bound by memory, and every extra below is free or nearly so.
#include <optional>

#include "update_chunk.h"

namespace fca {
namespace {

// MAKE<RULE, AMSGRAD, COUPLED>::get() of what is known only now.
template <template <Overshoot, bool, bool> class MAKE, Overshoot RULE>
auto choose_flags(bool amsgrad, bool coupled) {
  if (amsgrad) return coupled ? MAKE<RULE, true, true>::get() : MAKE<RULE, true, false>::get();
  return coupled ? MAKE<RULE, false, true>::get() : MAKE<RULE, false, false>::get();
}

template <template <Overshoot, bool, bool> class MAKE>
auto choose_rule(Overshoot rule, bool amsgrad, bool coupled) {
  switch (rule) {
    case Overshoot::NONE:
      return choose_flags<MAKE, Overshoot::NONE>(amsgrad, coupled);
    case Overshoot::ALIGN_BLOCK:
      return choose_flags<MAKE, Overshoot::ALIGN_BLOCK>(amsgrad, coupled);
    case Overshoot::ALIGN_ELEMENT:
      return choose_flags<MAKE, Overshoot::ALIGN_ELEMENT>(amsgrad, coupled);
    case Overshoot::CAUTIOUS:
      return choose_flags<MAKE, Overshoot::CAUTIOUS>(amsgrad, coupled);
    case Overshoot::GRAMS:
      return choose_flags<MAKE, Overshoot::GRAMS>(amsgrad, coupled);
    case Overshoot::ATAN2:
      return choose_flags<MAKE, Overshoot::ATAN2>(amsgrad, coupled);
    case Overshoot::FADAM:
      check(!amsgrad && !coupled, "FAdam has neither amsgrad nor coupled weight decay");
      return MAKE<Overshoot::FADAM, false, false>::get();
  }
  fail("unknown overshoot rule ", static_cast<int64_t>(rule));
}

template <typename T>
struct Chunks {
  template <Overshoot RULE, bool AMSGRAD, bool COUPLED>
  struct Make {
    static UpdateChunk<T> get() { return update_chunk<T, RULE, AMSGRAD, COUPLED, false>; }
  };
};

template <typename T, typename S>
struct Tiles {
  template <Overshoot RULE, bool AMSGRAD, bool COUPLED>
  struct Make {
    static UpdateTile<T, S> get() { return update_tile<T, S, RULE, AMSGRAD, COUPLED, false>; }
  };
};

template <typename T>
UpdateChunk<T> choose(Overshoot rule, bool amsgrad, bool coupled, bool guarded) {
  if (guarded) return choose_guarded<T>(rule, amsgrad, coupled);
  return choose_rule<Chunks<T>::template Make>(rule, amsgrad, coupled);
}

// scalars: float64[rows, kTensorScalars], of the prologue. unit_factors: float64[output rows of the table].
// momentum_dots: float64[rows], receives sum m g of each tensor. grad_square_sum: float64 0-d, added to.
void update_(const Tensor& table_tensor, const Tensor& scalars_tensor, bool coupled, bool amsgrad, int64_t overshoot,
             int64_t block, bool guarded, std::optional<Tensor> unit_factors, std::optional<Tensor> momentum_dots,
             std::optional<Tensor> grad_square_sum, std::optional<Tensor> sample_weights, std::optional<Tensor> seed,
             double noise, int64_t first_row) {
  const Table table = read_table(table_tensor, sample_weights, seed, noise, first_row);
  check_buffer(scalars_tensor, ScalarType::Double, table.rows * kTensorScalars, "scalars");
  check(block >= 1, "block must be at least 1, got ", block);
  check(guarded || (!unit_factors && !momentum_dots), "unit_factors and momentum_dots need guarded");
  const std::vector<int64_t> starts = unit_factors ? unit_starts(table) : std::vector<int64_t>();
  if (unit_factors) check_buffer(*unit_factors, ScalarType::Double, starts.back(), "unit_factors");
  if (momentum_dots) check_buffer(*momentum_dots, ScalarType::Double, table.rows, "momentum_dots");
  const auto* scalars = reinterpret_cast<const TensorScalars*>(const_data<double>(scalars_tensor));

  const Overshoot rule = static_cast<Overshoot>(overshoot);
  const UpdateChunk<float> update_f32 = choose<float>(rule, amsgrad, coupled, guarded);
  const UpdateChunk<double> update_f64 = choose<double>(rule, amsgrad, coupled, guarded);
  ChunkOptions options = {rule == Overshoot::ALIGN_BLOCK ? block : kTile, grad_square_sum.has_value(),
                          momentum_dots.has_value(), nullptr, false};

  for (int64_t r = 0; r < table.rows; ++r) {
    const Row& row = table.row[r];
    check(!amsgrad || row.numel == 0 || row.data[MAX_EXP_AVG_SQ] != 0, "amsgrad needs max_exp_avg_sqs");
  }
  if (table.rows == 0 || scalars[0].skip != 0.0) return;

  const std::vector<Chunk> chunks = make_chunks(table, options.block);
  const int64_t n = static_cast<int64_t>(chunks.size());
  std::vector<ChunkSums> partial(n);
  const double* factors = unit_factors ? const_data<double>(*unit_factors) : nullptr;
  torch::stable::parallel_for(0, n, chunk_grain(table, n), [&](int64_t first, int64_t last) {
    ChunkOptions own = options;
    DotEstimate looked;
    for (int64_t done = 0; done < last - first; ++done) {
      // Backwards: the norm pass has just left the end of the gradients in the cache. But a gated block looks ahead.
      const int64_t c = rule == Overshoot::ALIGN_BLOCK ? first + done : last - 1 - done, r = chunks[c].row;
      own.unit_factors = factors == nullptr ? nullptr : factors + starts[r];
      own.goes_on = c + 1 < last && chunks[c + 1].row == r;
      partial[c] = table.row[r].dtype[PARAM] == DType::F64
                       ? update_f64(table, chunks[c], scalars[r].step, own, looked)
                       : update_f32(table, chunks[c], rounded<float>(scalars[r].step), own, looked);
    }
  });
  if (momentum_dots) {
    double* dots = mutable_data<double>(*momentum_dots);
    std::fill_n(dots, table.rows, 0.0);
    for (int64_t c = 0; c < n; ++c) dots[chunks[c].row] += partial[c].dot;
  }
  if (grad_square_sum) {
    double total = 0;
    for (const ChunkSums& part : partial) total += part.squares;
    const double unscale = scalars[0].unscale;  // one for the whole step
    *mutable_data<double>(*grad_square_sum) += total * unscale * unscale;
  }
}

}  // namespace

template <typename T, typename S>
UpdateTile<T, S> plain_tile(Overshoot rule, bool amsgrad, bool coupled) {
  return choose_rule<Tiles<T, S>::template Make>(rule, amsgrad, coupled);
}
template UpdateTile<float, float> plain_tile<float, float>(Overshoot, bool, bool);
template UpdateTile<float, BFloat16> plain_tile<float, BFloat16>(Overshoot, bool, bool);
template UpdateTile<float, Float16> plain_tile<float, Float16>(Overshoot, bool, bool);
template UpdateTile<double, double> plain_tile<double, double>(Overshoot, bool, bool);

}  // namespace fca

STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, CPU, m) { m.impl("update_", TORCH_BOX(&fca::update_)); }
