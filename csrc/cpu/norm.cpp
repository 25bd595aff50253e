// Phase 1: the sum of squares of each gradient of a batch, in float64. Reads 4 B per float32 element.
#include "table.h"

namespace fca {

// Two stages: one partial sum a chunk, then the partial sums in order. float64 cannot overflow on squares of float32,
// so the result is finite exactly when every gradient is.
Tensor grad_square_sums(const Tensor& table_tensor) {
  const Table table = read_table(table_tensor);
  const std::vector<Chunk> chunks = make_chunks(table, kTile);
  const int64_t n = static_cast<int64_t>(chunks.size());
  std::vector<double> partial(n);
  torch::stable::parallel_for(0, n, chunk_grain(table, n), [&](int64_t first, int64_t last) {
    alignas(64) double buffer[kTile];
    for (int64_t c = first; c < last; ++c) {
      const Row& row = table.row[chunks[c].row];
      double sum = 0;
      for (int64_t i = chunks[c].begin; i < chunks[c].end; i += kTile) {
        const int64_t size = std::min(kTile, chunks[c].end - i);
        if (row.dtype[GRAD] == DType::F64) {
          double* tile = direct_slot<double>(row, GRAD, row.flat, i);
          if (tile == nullptr) read_slot<double>(table, row, GRAD, row.flat, i, size, tile = buffer);
          sum += sum_squares_tile<double, true>(tile, size);
        } else {
          float* tile = direct_slot<float>(row, GRAD, row.flat, i);
          if (tile == nullptr) {
            tile = reinterpret_cast<float*>(buffer);
            read_slot<float>(table, row, GRAD, row.flat, i, size, tile);
          }
          sum += sum_squares_tile<float, true>(tile, size);
        }
      }
      partial[c] = sum;
    }
  });
  Tensor out = torch::stable::empty({table.rows}, ScalarType::Double);
  double* sums = mutable_data<double>(out);
  std::fill_n(sums, table.rows, 0.0);
  for (int64_t c = 0; c < n; ++c) sums[chunks[c].row] += partial[c];
  return out;
}

}  // namespace fca

STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, CPU, m) { m.impl("grad_square_sums", TORCH_BOX(&fca::grad_square_sums)); }
