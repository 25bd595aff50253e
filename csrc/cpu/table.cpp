#include "table.h"

#include <algorithm>
#include <atomic>

namespace fca {
namespace {

constexpr int64_t kChunk = 65536;   // elements: 256 KiB a stream, enough to amortise a task, small enough to balance
constexpr int64_t kMaxDims = 64;    // torch's own limit
constexpr int64_t kSerial = 32768;  // elements below which a second thread costs more than it brings

// What a row needs to know of one tensor, fetched through the shim once: the calls, not the checks, cost the time.
struct Meta {
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dims;
  bool contiguous;
  DType dtype;
  int64_t address;
};

Meta read_meta(AtenTensorHandle tensor, const char* name, int64_t index) {
  static const int32_t codes[] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float16()};
  Meta meta = {};
  int32_t code;
  void* address;
  int64_t *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &code));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &meta.dims));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor, &meta.contiguous));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &address));
  const int32_t* found = std::find(std::begin(codes), std::end(codes), code);
  if (found == std::end(codes)) fail(name, "[", index, "] must be float64, float32, bfloat16 or float16");
  if (meta.dims > kMaxDims) fail(name, "[", index, "] has ", meta.dims, " dimensions; accepted: up to ", kMaxDims);
  if (address == nullptr && std::find(sizes, sizes + meta.dims, 0) == sizes + meta.dims) {
    fail(name, "[", index, "] has no memory (was its storage resized to 0?)");
  }
  meta.sizes = sizes;
  meta.strides = strides;
  meta.dtype = static_cast<DType>(found - codes);
  meta.address = reinterpret_cast<int64_t>(address);
  return meta;
}

int64_t numel_of(const Meta& meta) {
  int64_t numel = 1;
  for (int64_t d = 0; d < meta.dims; ++d) numel *= meta.sizes[d];
  return numel;
}

// The (stride, size) of dimensions longer than one, innermost first.
std::vector<std::pair<int64_t, int64_t>> sorted_dims(const Meta& meta) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < meta.dims; ++d) {
    if (meta.sizes[d] > 1) dims.emplace_back(meta.strides[d], meta.sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  return dims;
}

// Could two of its elements share an address? Each stride must step over all that lies inside it.
bool overlaps_itself(const Meta& meta) {
  int64_t reach = 0;
  for (const auto& [stride, size] : sorted_dims(meta)) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

bool is_dense(const Meta& meta) {
  int64_t expected = 1;
  for (const auto& [stride, size] : sorted_dims(meta)) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_strides(const Meta& x, const Meta& y) {
  for (int64_t d = 0; d < x.dims; ++d) {
    if (x.sizes[d] > 1 && x.strides[d] != y.strides[d]) return false;
  }
  return true;
}

// What a stack of samples has after its first dimension.
Meta of_one_sample(const Meta& stack) {
  Meta one = stack;
  one.dims -= 1;
  one.sizes += 1;
  one.strides += 1;
  int64_t expected = 1;
  one.contiguous = true;
  for (int64_t d = one.dims - 1; d >= 0; --d) {
    one.contiguous = one.contiguous && (one.sizes[d] == 1 || one.strides[d] == expected);
    expected *= one.sizes[d];
  }
  one.contiguous = one.contiguous || expected == 0;
  return one;
}

bool same_sizes(const Meta& x, const Meta& y) {
  return x.dims == y.dims && std::equal(x.sizes, x.sizes + x.dims, y.sizes);
}

int64_t dtype_size(DType dtype) { return dtype == DType::F64 ? 8 : dtype == DType::F32 ? 4 : 2; }

// The memory of one slot of one row.
struct Range {
  int64_t begin, end, row;
  Slot slot;
};

// Addresses of every element, for the exact test where two bounding ranges meet and one of them is strided.
std::vector<int64_t> addresses(const Table& table, const Range& range) {
  const Row& row = table.row[range.row];
  const int64_t size = dtype_size(slot_dtype(row, range.slot));
  std::vector<int64_t> out;
  out.reserve(row.numel);
  if (row.strided == 0) {
    for (int64_t i = 0; i < row.numel; ++i) out.push_back(row.data[range.slot] + i * size);
    return out;
  }
  const int64_t* record = table.words + row.strided;
  const int64_t dims = record[0];
  const int64_t* sizes = record + 1;
  const int64_t* strides = sizes + dims * (1 + range.slot);
  for (int64_t i = 0; i < row.numel; ++i) {
    int64_t rest = i, offset = 0;
    for (int64_t d = dims - 1; d >= 0; --d) {
      offset += rest % sizes[d] * strides[d];
      rest /= sizes[d];
    }
    out.push_back(row.data[range.slot] + offset * size);
  }
  std::sort(out.begin(), out.end());
  return out;
}

const char* slot_name(Slot slot) {
  static const char* const names[] = {"params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"};
  return names[slot];
}

// Elements from a slot's first to past its last, and whether they fill that range without holes.
int64_t extent_of(const Table& table, const Row& row, Slot slot) {
  const int64_t others = slot == GRAD && row.samples > 1 ? (row.samples - 1) * row.sample : 0;
  if (row.strided == 0) return row.numel + others;
  const int64_t* record = table.words + row.strided;
  const int64_t dims = record[0];
  int64_t extent = 1 + others;
  for (int64_t d = 0; d < dims; ++d) extent += (record[1 + d] - 1) * record[1 + dims * (1 + slot) + d];
  return extent;
}

bool may_share(const Table& table, const Range& x, const Range& y) {
  // Reading a gradient that is its own parameter (or state), element for element, is well defined.
  if (x.row == y.row && (x.slot == GRAD || y.slot == GRAD) && x.begin == y.begin && table.row[x.row].samples < 0) {
    const Row& row = table.row[x.row];
    if (row.flat != 0 && slot_dtype(row, x.slot) == slot_dtype(row, y.slot)) return true;
  }
  const auto stacked = [&](const Range& own) { return own.slot == GRAD && table.row[own.row].samples >= 0; };
  if (stacked(x) || stacked(y)) return false;
  if (table.row[x.row].strided == 0 && table.row[y.row].strided == 0) return false;
  const std::vector<int64_t> a = addresses(table, x), b = addresses(table, y);
  std::vector<int64_t> common;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(common));
  return common.empty();
}

// No two written tensors may share memory, and no gradient may be written while it is read.
void check_disjoint(const Table& table, int64_t words) {
  // The addresses rarely change from step to step: what was found disjoint before need not be sorted again. The
  // fingerprint covers the whole table: addresses, sizes and strides.
  uint64_t fingerprint = 1469598103934665603ull;
  for (int64_t i = 0; i < words; ++i) {
    fingerprint = (fingerprint ^ static_cast<uint64_t>(table.words[i])) * 1099511628211ull;
  }
  static std::atomic<uint64_t> found_disjoint[64];
  std::atomic<uint64_t>& seen = found_disjoint[fingerprint % 64];
  if (seen.load(std::memory_order_relaxed) == fingerprint) return;

  std::vector<Range> ranges;
  for (int64_t r = 0; r < table.rows; ++r) {
    const Row& row = table.row[r];
    for (int64_t s = 0; s < kSlots; ++s) {
      const Slot slot = static_cast<Slot>(s);
      if (row.data[slot] == 0 || row.numel == 0) continue;
      const int64_t bytes = extent_of(table, row, slot) * dtype_size(slot_dtype(row, slot));
      ranges.push_back({row.data[slot], row.data[slot] + bytes, r, slot});
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& x, const Range& y) { return x.begin < y.begin; });
  for (size_t i = 0; i < ranges.size(); ++i) {
    for (size_t j = i + 1; j < ranges.size() && ranges[j].begin < ranges[i].end; ++j) {
      const Range &x = ranges[i], &y = ranges[j];
      if ((x.slot == GRAD && y.slot == GRAD) || may_share(table, x, y)) continue;
      fail(slot_name(x.slot), "[", x.row, "] and ", slot_name(y.slot), "[", y.row,
           "] share memory, so that updating one would change the other. Pass each storage once");
    }
  }
  seen.store(fingerprint, std::memory_order_relaxed);
}

// A Tensor[] argument. torch's own unboxing wraps every element in a shared_ptr, which costs as much as all the checks
// below; these are the bare handles, released together.
class TensorList {
 public:
  explicit TensorList(StableIValue argument) {
    const auto list = torch::stable::detail::to<StableListHandle>(argument);
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.resize(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue element;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
      handles_[i] = torch::stable::detail::to<AtenTensorHandle>(element);
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  TensorList(const TensorList&) = delete;
  ~TensorList() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }
  bool empty() const { return handles_.empty(); }
  int64_t size() const { return static_cast<int64_t>(handles_.size()); }
  AtenTensorHandle operator[](int64_t i) const { return handles_[i]; }

 private:
  std::vector<AtenTensorHandle> handles_;
};

struct Lists {
  const TensorList* list[kSlots];
};

Row make_row(const Lists& lists, const TensorList& steps, const TensorList& bias_weights, int64_t group,
             int64_t samples, int64_t i) {
  Row row = {};
  row.group = group;
  row.samples = samples;
  Meta param = {};
  bool contiguous = true, same_order = true;
  for (int64_t s = 0; s < kSlots; ++s) {
    const Slot slot = static_cast<Slot>(s);
    if (lists.list[slot]->empty()) continue;
    Meta meta = read_meta((*lists.list[slot])[i], slot_name(slot), i);
    const bool stack = slot == GRAD && samples >= 0;
    if (stack) {
      if (meta.dims != param.dims + 1 || meta.sizes[0] != samples) {
        fail("grads[", i, "] must be a stack of ", samples, " samples of the shape of params[", i, "]");
      }
      row.sample = meta.strides[0];
      meta = of_one_sample(meta);
    }
    if (slot == PARAM) param = meta;
    if (!same_sizes(param, meta)) fail(slot_name(slot), "[", i, "] must have the shape of params[", i, "]");
    DType& expected = row.dtype[slot < 2 ? slot : 2];
    if (slot <= EXP_AVG) expected = meta.dtype;
    if (meta.dtype != expected) {
      fail(slot_name(slot), "[", i, "] is ", dtype_name(meta.dtype), " but exp_avgs[", i, "] is ",
           dtype_name(expected));
    }
    const bool narrow_scores = stack && param.dtype != DType::F64 && meta.dtype != DType::F64;
    if (meta.dtype != param.dtype && meta.dtype != DType::F32 && !narrow_scores) {
      fail(slot_name(slot), "[", i, "] is ", dtype_name(meta.dtype), "; accepted for a ", dtype_name(param.dtype),
           " parameter: the same, or float32");
    }
    if (slot != GRAD && !meta.contiguous && overlaps_itself(meta)) {
      fail(slot_name(slot), "[", i,
           "] has elements that share memory (an expanded view?); it cannot be updated in place");
    }
    row.data[slot] = meta.address;
    contiguous = contiguous && meta.contiguous;
    same_order = same_order && same_strides(param, meta);
  }
  row.numel = numel_of(param);
  row.unit = param.dims < 2 || param.sizes[0] == 0 ? row.numel : row.numel / param.sizes[0];
  row.strided = contiguous ? 0 : 1;  // tensor_table fills in the offset
  row.flat = contiguous || (same_order && is_dense(param));

  const Meta step = read_meta(steps[i], "steps", i);
  if (numel_of(step) != 1 || (step.dtype != DType::F32 && step.dtype != DType::F64)) {
    fail("steps[", i, "] must be a 0-d float32 or float64 tensor");
  }
  row.step = step.address;
  row.step_is_f64 = step.dtype == DType::F64;
  if (!bias_weights.empty()) {
    const Meta weights = read_meta(bias_weights[i], "bias_weights", i);
    if (weights.dtype != DType::F64 || numel_of(weights) != 2 || !weights.contiguous) {
      fail("bias_weights[", i, "] must be a contiguous float64 tensor of 2 elements");
    }
    row.bias_weights = weights.address;
  }
  return row;
}

Tensor tensor_table(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                    const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs, const TensorList& steps,
                    const TensorList& bias_weights, int64_t group, int64_t samples) {
  const Lists lists = {{&params, &grads, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}};
  const int64_t n = params.size();
  for (const auto* list : {&grads, &exp_avgs, &exp_avg_sqs, &steps}) {
    check(list->size() == n, "tensor_table: lists differ in length");
  }
  for (const auto* list : {&max_exp_avg_sqs, &bias_weights}) {
    check(list->empty() || list->size() == n, "tensor_table: lists differ in length");
  }

  std::vector<Row> rows(n);
  std::vector<int64_t> records;
  for (int64_t i = 0; i < n; ++i) {
    rows[i] = make_row(lists, steps, bias_weights, group, samples, i);
    if (rows[i].strided == 0) continue;
    rows[i].strided = 1 + n * kRow + static_cast<int64_t>(records.size());
    const Meta param = read_meta(params[i], "params", i);
    records.push_back(param.dims);
    records.insert(records.end(), param.sizes, param.sizes + param.dims);
    for (int64_t slot = 0; slot < kSlots; ++slot) {
      if (lists.list[slot]->empty()) {
        records.insert(records.end(), param.dims, 0);
      } else {
        const Meta meta = read_meta((*lists.list[slot])[i], slot_name(static_cast<Slot>(slot)), i);
        const int64_t* strides = meta.strides + (slot == GRAD && samples >= 0 ? 1 : 0);
        records.insert(records.end(), strides, strides + param.dims);
      }
    }
  }
  Tensor table = torch::stable::empty({static_cast<int64_t>(1 + n * kRow + records.size())}, ScalarType::Long);
  int64_t* words = mutable_data<int64_t>(table);
  words[0] = n;
  if (n > 0) std::memcpy(words + 1, rows.data(), n * sizeof(Row));
  std::copy(records.begin(), records.end(), words + 1 + n * kRow);
  check_disjoint({n, reinterpret_cast<const Row*>(words + 1), words, {}, 0, {}}, table.numel());
  return table;
}

// A tensor with a pending negation, or torch's ZeroTensor, reaches an operator as a temporary copy: a table of its
// address would outlive it.
void refuse_lazy(StableIValue* stack, uint64_t, uint64_t) {
  for (int i = 0; i < 7; ++i) TensorList released(stack[i]);
  fail(
      "a parameter, gradient or state has a pending negation or is a ZeroTensor; make it real first: "
      "tensor.resolve_neg().clone()");
}

// A row of device addresses that held one of the host's (or of another device) would be read by a kernel.
void check_one_device(const TensorList& list, const char* name, AtenTensorHandle first) {
  int32_t type, index, own_type, own_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(first, &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(first, &index));
  for (int64_t i = 0; i < list.size(); ++i) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(list[i], &own_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(list[i], &own_index));
    if (own_type != type || own_index != index) fail(name, "[", i, "] is not on the device of params[0]");
  }
}

template <bool ON_DEVICE>
void boxed_tensor_table(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList params(stack[0]), grads(stack[1]), exp_avgs(stack[2]), exp_avg_sqs(stack[3]),
      max_exp_avg_sqs(stack[4]), steps(stack[5]), bias_weights(stack[6]);
  if (ON_DEVICE && !params.empty()) {
    const TensorList* const lists[] = {&params,          &grads, &exp_avgs,    &exp_avg_sqs,
                                       &max_exp_avg_sqs, &steps, &bias_weights};
    const char* const names[] = {"params",          "grads", "exp_avgs",    "exp_avg_sqs",
                                 "max_exp_avg_sqs", "steps", "bias_weights"};
    for (int64_t i = 0; i < 7; ++i) check_one_device(*lists[i], names[i], params[0]);
  }
  stack[0] = torch::stable::detail::from(tensor_table(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps,
                                                      bias_weights, torch::stable::detail::to<int64_t>(stack[7]),
                                                      torch::stable::detail::to<int64_t>(stack[8])));
}

template <typename S, typename T>
void gather(const Table& table, const Row& row, Slot slot, int64_t begin, int64_t n, T* tile, bool store) {
  const int64_t* record = table.words + row.strided;
  const int64_t dims = record[0];
  const int64_t* sizes = record + 1;
  const int64_t* strides = sizes + dims * (1 + slot);
  int64_t index[kMaxDims];
  int64_t rest = begin, offset = 0;
  for (int64_t d = dims - 1; d >= 0; --d) {
    index[d] = rest % sizes[d];
    rest /= sizes[d];
    offset += index[d] * strides[d];
  }
  S* const base = reinterpret_cast<S*>(row.data[slot]);
  for (int64_t i = 0; i < n; ++i) {
    if (store) {
      base[offset] = store_as<S, T>(tile[i]);
    } else {
      tile[i] = load_as<T, S>(base[offset]);
    }
    for (int64_t d = dims - 1; d >= 0; --d) {
      offset += strides[d];
      if (++index[d] < sizes[d]) break;
      offset -= strides[d] * sizes[d];
      index[d] = 0;
    }
  }
}

template <typename S, typename T>
void move_slot(const Table& table, const Row& row, Slot slot, bool flat, int64_t begin, int64_t n, T* tile,
               bool store) {
  if (!flat) return gather<S, T>(table, row, slot, begin, n, tile, store);
  S* const memory = reinterpret_cast<S*>(row.data[slot]) + begin;
  if (store) {
    store_tile<S, T>(tile, memory, n);
  } else {
    load_tile<T, S>(memory, tile, n);
  }
}

template <typename T>
void move_slot_of(const Table& table, const Row& row, Slot slot, bool flat, int64_t begin, int64_t n, T* tile,
                  bool store) {
  switch (slot_dtype(row, slot)) {
    case DType::F64:
      return move_slot<double, T>(table, row, slot, flat, begin, n, tile, store);
    case DType::F32:
      return move_slot<float, T>(table, row, slot, flat, begin, n, tile, store);
    default:
      break;
  }
  if constexpr (sizeof(T) == 4) {  // float64 arithmetic serves float64 parameters, which have no 16-bit slot
    if (slot_dtype(row, slot) == DType::BF16) {
      return move_slot<BFloat16, T>(table, row, slot, flat, begin, n, tile, store);
    }
    return move_slot<Float16, T>(table, row, slot, flat, begin, n, tile, store);
  }
}

// tile <- tile + w_0 S_0 + w_1 S_1 + ..., in that order, of COUNT samples, while the `next` ones are fetched.
constexpr int64_t kAtOnce = 4;
template <typename T, typename S>
struct SampleTile {
  const S* source[kAtOnce];
  const S* next[kAtOnce];
  T weight[kAtOnce];
};

template <typename T, typename S, int COUNT>
FCA_INLINE void add_samples_body(const SampleTile<T, S>& tiles, T* __restrict tile, int64_t n) {
  const SampleTile<T, S> own = tiles;
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
  const auto add = [&](int64_t i) FCA_LAMBDA_INLINE {
    T sum = tile[i];
    for (int k = 0; k < COUNT; ++k) sum += own.weight[k] * load_as<T>(own.source[k][i]);
    tile[i] = sum;
  };
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    for (int k = 0; k < COUNT; ++k) FCA_PREFETCH(own.next[k] + i);
    for (int64_t j = i; j < i + kLine; ++j) add(j);
  }
  for (; i < n; ++i) add(i);
}
FCA_LEAF((typename T, typename S, int COUNT), (T, S, COUNT), void, add_samples,
         (const SampleTile<T, S>& tiles, T* tile, int64_t n), (tiles, tile, n))

template <typename T, typename S>
void contract(const Table& table, const Row& row, bool flat, int64_t begin, int64_t n, T* tile) {
  std::fill_n(tile, n, T(0));
  const S* const stack = reinterpret_cast<const S*>(row.data[GRAD]);
  const std::vector<int64_t>& weighed = table.weighed;
  const int64_t count = static_cast<int64_t>(weighed.size());
  alignas(64) T buffer[kTile];
  for (int64_t k = 0; k < count;) {
    const bool four = flat && k + kAtOnce <= count;
    SampleTile<T, S> own = {};
    for (int64_t j = 0; j < (four ? kAtOnce : 1); ++j) {
      const int64_t b = weighed[k + j];
      own.source[j] = stack + b * row.sample + begin;
      own.weight[j] = static_cast<T>(table.samples.weights[b]);
      // Behind the last sample the next tile of the first ones.
      const int64_t later = k + j + kAtOnce;
      own.next[j] = later < count ? stack + weighed[later] * row.sample + begin
                                  : stack + weighed[(later - count) % count] * row.sample + begin + n;
    }
    if (four) {
      add_samples<T, S, kAtOnce>(own, tile, n);
    } else if (flat) {
      add_samples<T, S, 1>(own, tile, n);
    } else {
      Row one = row;
      one.data[GRAD] = reinterpret_cast<int64_t>(stack + weighed[k] * row.sample);
      gather<S, T>(table, one, GRAD, begin, n, buffer, false);
      for (int64_t i = 0; i < n; ++i) tile[i] += own.weight[0] * buffer[i];
    }
    k += four ? kAtOnce : 1;
  }
}

}  // namespace

template <typename T>
void read_samples(const Table& table, const Row& row, bool flat, int64_t begin, int64_t n, T* tile) {
  switch (row.dtype[GRAD]) {
    case DType::F64:
      if constexpr (sizeof(T) == 8) contract<T, double>(table, row, flat, begin, n, tile);
      break;
    case DType::F32:
      contract<T, float>(table, row, flat, begin, n, tile);
      break;
    case DType::BF16:
      if constexpr (sizeof(T) == 4) contract<T, BFloat16>(table, row, flat, begin, n, tile);
      break;
    case DType::F16:
      if constexpr (sizeof(T) == 4) contract<T, Float16>(table, row, flat, begin, n, tile);
      break;
  }
  if (table.samples.seed == nullptr) return;
  const int64_t tensor = table.first_row + (&row - table.row);
  for (int64_t i = 0; i < n; ++i) {
    tile[i] += static_cast<T>(table.samples.noise * standard_normal(*table.samples.seed, tensor, begin + i));
  }
}
template void read_samples<float>(const Table&, const Row&, bool, int64_t, int64_t, float*);
template void read_samples<double>(const Table&, const Row&, bool, int64_t, int64_t, double*);

Table read_table(const Tensor& table) {
  check(table.scalar_type() == ScalarType::Long && table.is_contiguous() && table.numel() > 0,
        "table must come from tensor_table");
  const int64_t* words = const_data<int64_t>(table);
  return {words[0], reinterpret_cast<const Row*>(words + 1), words, {}, 0, {}};
}

Table read_table(const Tensor& table, std::optional<Tensor> sample_weights, std::optional<Tensor> seed, double noise,
                 int64_t first_row) {
  Table out = read_table(table);
  out.samples.noise = noise;
  out.first_row = first_row;
  if (out.rows == 0) return out;
  const int64_t samples = out.row[0].samples;
  check(sample_weights.has_value() == (samples >= 0), "sample_weights go with a table of samples");
  if (sample_weights) {
    check_buffer(*sample_weights, ScalarType::Double, samples, "sample_weights");
    out.samples.weights = const_data<double>(*sample_weights);
    for (int64_t b = 0; b < samples; ++b) {
      if (out.samples.weights[b] != 0.0) out.weighed.push_back(b);
    }
  }
  if (seed) {
    check_buffer(*seed, ScalarType::Long, 1, "seed");
    out.samples.seed = const_data<int64_t>(*seed);
  }
  return out;
}

std::vector<Chunk> make_chunks(const Table& table, int64_t block) {
  const int64_t size = (kChunk + block - 1) / block * block;
  std::vector<Chunk> chunks;
  for (int64_t r = 0; r < table.rows; ++r) {
    for (int64_t begin = 0; begin < table.row[r].numel; begin += size) {
      chunks.push_back({r, begin, std::min(begin + size, table.row[r].numel)});
    }
  }
  return chunks;
}

std::vector<Chunk> make_unit_chunks(const Table& table) {
  std::vector<Chunk> chunks;
  for (int64_t r = 0; r < table.rows; ++r) {
    const Row& row = table.row[r];
    if (row.numel == 0) continue;
    const int64_t size = (kChunk + row.unit - 1) / row.unit * row.unit;
    for (int64_t begin = 0; begin < row.numel; begin += size) {
      chunks.push_back({r, begin, std::min(begin + size, row.numel)});
    }
  }
  return chunks;
}

std::vector<int64_t> unit_starts(const Table& table) {
  std::vector<int64_t> starts(table.rows + 1, 0);
  for (int64_t r = 0; r < table.rows; ++r) {
    const Row& row = table.row[r];
    starts[r + 1] = starts[r] + (row.numel > 0 ? row.numel / row.unit : 0);
  }
  return starts;
}

int64_t chunk_grain(const Table& table, int64_t chunks) {
  int64_t elements = 0;
  for (int64_t r = 0; r < table.rows; ++r) elements += table.row[r].numel;
  return elements > 0 ? std::max<int64_t>(1, chunks * kSerial / elements) : 1;
}

template <typename T>
void read_slot(const Table& table, const Row& row, Slot slot, bool flat, int64_t begin, int64_t n, T* tile) {
  if (slot == GRAD && row.samples >= 0) return read_samples<T>(table, row, flat, begin, n, tile);
  move_slot_of<T>(table, row, slot, flat, begin, n, tile, false);
}
template <typename T>
void write_slot(const Table& table, const Row& row, Slot slot, bool flat, int64_t begin, int64_t n, const T* tile) {
  move_slot_of<T>(table, row, slot, flat, begin, n, const_cast<T*>(tile), true);
}
template void read_slot<float>(const Table&, const Row&, Slot, bool, int64_t, int64_t, float*);
template void read_slot<double>(const Table&, const Row&, Slot, bool, int64_t, int64_t, double*);
template void write_slot<float>(const Table&, const Row&, Slot, bool, int64_t, int64_t, const float*);
template void write_slot<double>(const Table&, const Row&, Slot, bool, int64_t, int64_t, const double*);

}  // namespace fca

STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, CPU, m) { m.impl("tensor_table", &fca::boxed_tensor_table<false>); }
// Only addresses, sizes and strides are read: no kernel of the device is needed, nor its library.
STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, CUDA, m) { m.impl("tensor_table", &fca::boxed_tensor_table<true>); }
STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, Negative, m) { m.impl("tensor_table", &fca::refuse_lazy); }
STABLE_TORCH_LIBRARY_IMPL(fused_clip_adam, ZeroTensor, m) { m.impl("tensor_table", &fca::refuse_lazy); }
