// The tensor table of one step: every pointer, dtype and stride the passes need, checked and unboxed once.
//
// `tensor_table` turns the lists of a step into one int64 tensor; norm and update read it as rows. It holds raw
// pointers: it is made and used within one optimizer step, while Python holds the tensors.
#pragma once

#include <optional>
#include <vector>

#include "../check_args.h"
#include "../samples.h"
#include "../table.h"
#include "tile.h"

namespace fca {

struct Table {
  int64_t rows;
  const Row* row;
  const int64_t* words;          // word 0: the number of rows; rows follow; stride records follow the rows
  Samples samples;               // of a step from scores
  int64_t first_row;             // of this table among all of the step: tells the noise of their tensors apart
  std::vector<int64_t> weighed;  // the samples whose weight is not 0
};

Table read_table(const Tensor& table);

// Of an operator that reads gradients. sample_weights: float64 [samples], given exactly where they are stacks of
// samples; seed: int64 [1].
Table read_table(const Tensor& table, std::optional<Tensor> sample_weights, std::optional<Tensor> seed, double noise,
                 int64_t first_row);

inline DType slot_dtype(const Row& row, int64_t slot) { return row.dtype[slot < 2 ? slot : 2]; }

// A piece of one tensor: the unit of parallel work. Boundaries depend on shapes alone, never on the thread count.
struct Chunk {
  int64_t row, begin, end;
};

// Chunks of at least `kChunk` elements (a whole number of `block`s) per tensor.
std::vector<Chunk> make_chunks(const Table& table, int64_t block);

// The same, in whole output rows (Row::unit) of each tensor.
std::vector<Chunk> make_unit_chunks(const Table& table);

// Where each tensor's output rows begin among those of all: one entry a tensor, and their total.
std::vector<int64_t> unit_starts(const Table& table);

// How many chunks one thread should take at least, so that tiny work stays on the caller's thread.
int64_t chunk_grain(const Table& table, int64_t chunks);

// Elements [begin, begin + n) of a slot in logical (row-major) order, or in memory order where `flat`.
template <typename T>
void read_slot(const Table& table, const Row& row, Slot slot, bool flat, int64_t begin, int64_t n, T* tile);
template <typename T>
void write_slot(const Table& table, const Row& row, Slot slot, bool flat, int64_t begin, int64_t n, const T* tile);

// The gradient of a row of samples: sum_b w_b S_b over elements [begin, begin + n), plus noise.
template <typename T>
void read_samples(const Table& table, const Row& row, bool flat, int64_t begin, int64_t n, T* tile);

// Noise follows the logical order.
inline bool in_memory_order(const Table& table, const Row& row) {
  return table.samples.seed != nullptr ? row.strided == 0 : row.flat != 0;
}

template <typename T>
constexpr DType arithmetic_dtype() {
  return sizeof(T) == 8 ? DType::F64 : DType::F32;
}

// A tile of one slot: the tensor's own memory where that will do, else a copy.
template <typename T>
struct SlotTile {
  alignas(64) T buffer[kTile];
  T* data = nullptr;
  bool copied = false;

  void read(const Table& table, const Row& row, Slot slot, bool flat, int64_t begin, int64_t n);
  void write(const Table& table, const Row& row, Slot slot, bool flat, int64_t begin, int64_t n) const {
    if (copied) write_slot<T>(table, row, slot, flat, begin, n, buffer);
  }
};

// The slot's own memory where it can serve as the tile, else null.
template <typename T>
T* direct_slot(const Row& row, Slot slot, bool flat, int64_t begin) {
  if (!flat || slot_dtype(row, slot) != arithmetic_dtype<T>() || (slot == GRAD && row.samples >= 0)) return nullptr;
  return reinterpret_cast<T*>(row.data[slot]) + begin;
}

template <typename T>
void SlotTile<T>::read(const Table& table, const Row& row, Slot slot, bool flat, int64_t begin, int64_t n) {
  data = direct_slot<T>(row, slot, flat, begin);
  copied = data == nullptr;
  if (copied) read_slot<T>(table, row, slot, flat, begin, n, data = buffer);
}

template <typename T>
FCA_INLINE void scale_tile_body(const T* source, T* target, int64_t n, T factor) {  // they may be the same
  for (int64_t i = 0; i < n; ++i) target[i] = source[i] * factor;
}
FCA_LEAF((typename T), (T), void, scale_tile, (const T* source, T* target, int64_t n, T factor),
         (source, target, n, factor))

// A tile of gradients times the factors of their output rows, in the tile's own buffer.
template <typename T>
void scale_units(SlotTile<T>& grad, const Row& row, const double* unit_factors, int64_t begin, int64_t n) {
  for (int64_t i = 0; i < n;) {
    const int64_t unit = (begin + i) / row.unit, stop = std::min(n, (unit + 1) * row.unit - begin);
    scale_tile<T>(grad.data + i, grad.buffer + i, stop - i, static_cast<T>(unit_factors[unit]));
    i = stop;
  }
  grad.data = grad.buffer;
}

}  // namespace fca
