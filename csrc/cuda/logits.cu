// From logits to the log-probability and entropy of each token, and back: one block a row of V logits.
//
// Bytes per logit: forward one read, backward one read and one write: 2 + 4 in bfloat16. Operations: one 2^x and six
// (eight with an entropy) others forward, fifteen and seventeen backward, loads and stores included. An H200 reads 18 B
// a clock and multiprocessor, which leaves a forward pass 14 instructions a logit: a polynomial exp would be the
// bottleneck, and an entropy that nobody reads was part of one.
#include <limits>
#include <optional>

#include "slots.h"

namespace fca {
namespace {

constexpr int kWords = 4;  // 16-byte words a thread asks for before it uses the first
// Threads of a block, at most, and blocks a multiprocessor: while one block is at the ends of its row, others keep the
// memory busy. Of 128, 256 and 512 the fastest on an H200: forward 0.567, 0.569 and 0.613 ms for 8,192 x 151,936
// bfloat16, backward 1.269, 1.260 and 1.229 ms.
constexpr int kForwardThreads = 256, kBackwardThreads = 512, kResidentThreads = 1024;
constexpr int kMostWarps = kForwardThreads / kWarp;

template <typename T>
constexpr int blocks_at_once(int threads) {
  return sizeof(T) == 8 ? 1 : kResidentThreads / threads;
}

// ---------------------------------------------------------------- powers of two

// Below this 2^t is 0 in either type, while t 2^t is not NaN.
constexpr double kFloor = -2000.0;
constexpr double kMostTop = 1e30;  // greater exponents, if there were any, take the difference from the maximum first
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// 2^t. float: within 2 units in the last place; results below 2^-126 are 0. NaN stays NaN.
__device__ __forceinline__ float power_of_2(float t) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
  return e;
#else
  return std::exp2(t);
#endif
}
__device__ __forceinline__ double power_of_2(double t) { return std::exp2(t); }

// ---------------------------------------------------------------- where the numbers are

// A [B, T] tensor of any strides.
template <typename X>
struct Plane {
  X* data = nullptr;
  int64_t row_stride = 0, col_stride = 0;
  __device__ __forceinline__ X& at(int64_t row, int64_t col) const { return data[row * row_stride + col * col_stride]; }
};

// A [B, T, V] tensor: rows of V elements side by side, at any distances.
struct Rows {
  int64_t address, row_stride, col_stride;  // strides in bytes
  __device__ __forceinline__ int64_t at(int64_t row, int64_t col) const {
    return address + row * row_stride + col * col_stride;
  }
};

// Elements [head, tail) lie in whole 16-byte words; those before and after are taken one at a time.
struct Parts {
  int64_t head, words, tail, size;
  __device__ __forceinline__ int64_t singles() const { return head + (size - tail); }
  __device__ __forceinline__ int64_t single(int64_t n) const { return n < head ? n : tail + (n - head); }
};

template <typename S>
__device__ __forceinline__ Parts parts_of(int64_t address, int64_t size, bool words) {
  const int64_t to_boundary = (-address & 15) / static_cast<int64_t>(sizeof(S));
  const int64_t head = words && to_boundary < size ? to_boundary : size;
  const int64_t count = (size - head) * static_cast<int64_t>(sizeof(S)) / 16;
  return {head, count, head + count * 16 / static_cast<int64_t>(sizeof(S)), size};
}

// A thread's next words; those past the end hold `absent`. The loads have no branch between them.
__device__ __forceinline__ void load_words(int64_t body, int64_t first, int64_t words, uint4 absent,
                                           uint4 (&held)[kWords]) {
  const uint4* source = reinterpret_cast<const uint4*>(body) + first;
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    held[k] = absent;
    if (first + k * static_cast<int64_t>(blockDim.x) < words) held[k] = __ldcg(source + k * blockDim.x);
  }
}

template <typename S, typename T>
__device__ __forceinline__ T element(const uint4& word, int j) {
  S stored;
  memcpy(&stored, reinterpret_cast<const char*>(&word) + j * sizeof(S), sizeof(S));
  return load_as<T>(stored);
}

// A word of elements that add nothing: -inf.
template <typename S>
__device__ __forceinline__ uint4 absent_word() {
  uint4 word;
#pragma unroll
  for (int j = 0; j < static_cast<int>(16 / sizeof(S)); ++j) {
    S stored;
    if constexpr (sizeof(S) == 8) stored = bit_cast<double>(uint64_t{0xfff0000000000000u});
    if constexpr (sizeof(S) == 4) stored = bit_cast<float>(0xff800000u);
    if constexpr (sizeof(S) == 2) stored = store_as<S>(bit_cast<float>(0xff800000u));
    memcpy(reinterpret_cast<char*>(&word) + j * sizeof(S), &stored, sizeof(S));
  }
  return word;
}

// The 16 bytes that begin `back` bytes into `a` and end in `b`.
__device__ __forceinline__ uint4 shifted_word(const uint4& a, const uint4& b, unsigned back) {
  const unsigned all[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  unsigned by_8[6], by_4[5], out[4];
#pragma unroll
  for (int i = 0; i < 6; ++i) by_8[i] = (back & 8) != 0 ? all[i + 2] : all[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) by_4[i] = (back & 4) != 0 ? by_8[i + 1] : by_8[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = static_cast<unsigned>((static_cast<uint64_t>(by_4[i + 1]) << 32 | by_4[i]) >> 8 * (back & 3));
  }
  return {out[0], out[1], out[2], out[3]};
}

// As load_words, from a row [body, end) that is not on a 16-byte boundary: each word from the two that hold it, two at
// a time. What they hold of the neighbours' comes from the L1. At the ends of the row, where one of the two would reach
// beyond it, element by element.
template <typename S>
__device__ __forceinline__ void load_straddling_words(int64_t body, int64_t end, int64_t first, int64_t words,
                                                      uint4 absent, uint4 (&held)[kWords]) {
  constexpr int kPair = 2;
  static_assert(kWords % kPair == 0, "whole pairs");
  const unsigned back = static_cast<unsigned>(body & 15);
#pragma unroll
  for (int pair = 0; pair < kWords; pair += kPair) {
    uint4 a[kPair], b[kPair];
#pragma unroll
    for (int k = 0; k < kPair; ++k) {
      const int64_t address = body + 16 * (first + (pair + k) * static_cast<int64_t>(blockDim.x));
      const uint4* const low = reinterpret_cast<const uint4*>(address - back);
      a[k] = b[k] = absent;
      if (address - back >= body && address - back + 32 <= end) {
        a[k] = __ldg(low);
        b[k] = __ldg(low + 1);
      }
    }
#pragma unroll
    for (int k = 0; k < kPair; ++k) {
      const int64_t at = first + (pair + k) * static_cast<int64_t>(blockDim.x), address = body + 16 * at;
      uint4& word = held[pair + k];
      word = at < words ? shifted_word(a[k], b[k], back) : absent;
      if (at < words && (address - back < body || address - back + 32 > end)) {
#pragma unroll
        for (int j = 0; j < static_cast<int>(16 / sizeof(S)); ++j) {
          const S stored = reinterpret_cast<const S*>(address)[j];
          memcpy(reinterpret_cast<char*>(&word) + j * sizeof(S), &stored, sizeof(S));
        }
      }
    }
  }
}

// ---------------------------------------------------------------- forward

// The exponents t = (x - max) log2(e) / temperature of a row, to be taken relative to its maximum: a difference and a
// multiply-add each. `top`, the rounded exponent of the maximum, is the same for a whole row and cancels in a softmax.
// Where it would overflow the difference is taken first.
template <typename T>
struct Exponent {
  T max, steepness;  // steepness: log2(e) / temperature
  T shift, top;

  __device__ __forceinline__ Exponent(T max, T steepness) : max(max), steepness(steepness) {
    top = max * steepness;
    const bool small = std::fabs(top) < T(kMostTop);
    shift = small ? T(0) : max;
    top = small ? top : T(0);
  }
  __device__ __forceinline__ T operator()(T x) const { return std::fma(x - shift, steepness, -top); }

  // What t is too much by, for having rounded `top`.
  __device__ __forceinline__ double excess() const {
    return (static_cast<double>(max) - static_cast<double>(shift)) * static_cast<double>(steepness) -
           static_cast<double>(top);
  }
};

// sum = sum of 2^t and tilt = sum of t 2^t of what a thread has seen. Before that the maximum is the least finite
// number and not -inf, so that no exponent is inf - inf.
template <typename T, bool TILT>
struct Softmax {
  static constexpr T kLowest = std::numeric_limits<T>::lowest();
  Exponent<T> exponent;
  T sum = 0, tilt = 0;

  __device__ __forceinline__ explicit Softmax(T steepness) : exponent(kLowest, steepness) {}

  __device__ __forceinline__ void raise(T to) {
    const Exponent<T> next(to, exponent.steepness);
    const T distance = exponent.shift == T(0) && next.shift == T(0) ? exponent.top - next.top
                                                                    : (exponent.max - to) * exponent.steepness;
    const T down = std::fmax(distance, T(kFloor)), factor = power_of_2(down);
    if (TILT) tilt = (tilt + down * sum) * factor;
    sum *= factor;
    exponent = next;
  }

  // fmax leaves a NaN out, but 2^t does not, and +inf becomes one by inf - inf.
  template <int N>
  __device__ __forceinline__ void add(const T (&x)[N]) {
    T most = x[0];
#pragma unroll
    for (int j = 1; j < N; ++j) most = std::fmax(most, x[j]);
    if (most > exponent.max) raise(most);
    T part_sum = 0, part_tilt = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const T t = exponent(x[j]);
      const T e = power_of_2(t);
      part_sum += e;
      if (TILT) part_tilt = std::fma(std::fmax(t, T(kFloor)), e, part_tilt);
    }
    sum += part_sum;
    if (TILT) tilt += part_tilt;
  }
};

template <typename T>
struct Forward {
  Rows logits;
  int64_t cols, vocabulary;
  Plane<const int64_t> tokens;
  Plane<const uint8_t> mask;  // bytes: a bool tensor viewed from other data may hold more than 0 and 1
  double inv_temperature;
  T steepness;        // log2(e) / temperature
  T *logp, *entropy;  // contiguous; entropy null: not wanted
  T *max, *log2_sum;  // contiguous: the greatest logit, log2 of the sum relative to it
};

template <typename S, typename T, bool ENTROPY>
__global__ void __launch_bounds__(kForwardThreads, blocks_at_once<T>(kForwardThreads))
    logits_forward_kernel(Forward<T> work) {
  __shared__ T fold_max[kMostWarps];
  __shared__ double fold[kMostWarps];
  constexpr int kPerWord = 16 / sizeof(S);
  const unsigned token = blockIdx.x, cols = static_cast<unsigned>(work.cols);
  const int64_t row = token / cols, col = token % cols;
  const bool masked = work.mask.data != nullptr && work.mask.at(row, col) == 0;
  const int64_t y = masked ? 0 : work.tokens.at(row, col);
  if (masked || y < 0 || y >= work.vocabulary) {
    if (threadIdx.x == 0) {
      const T bad = T(NAN);
      work.logp[token] = masked ? T(0) : bad;
      if (ENTROPY) work.entropy[token] = masked ? T(0) : bad;
      work.max[token] = work.log2_sum[token] = bad;  // no gradient, whatever comes from above
    }
    return;
  }
  const int64_t address = work.logits.at(row, col);
  __shared__ T x_y;
  if (threadIdx.x == 0) x_y = load_one<S, T>(address, y);  // read by the same thread, in the end

  // Which thread adds what does not depend on where the row lies in memory: a token's numbers have the same bits in
  // every batch. A row off a 16-byte boundary (V odd, or a slice) is read through the L1, and costs some more.
  const int64_t words = work.vocabulary / kPerWord, end = address + work.vocabulary * static_cast<int64_t>(sizeof(S));
  const bool aligned = address % 16 == 0;
  const uint4 absent = absent_word<S>();
  Softmax<T, ENTROPY> own(work.steepness);
  for (int64_t first = threadIdx.x; first < words; first += kWords * blockDim.x) {
    uint4 held[kWords];
    if (aligned) {
      load_words(address, first, words, absent, held);
    } else {
      load_straddling_words<S>(address, end, first, words, absent, held);
    }
    T x[kWords * kPerWord];
#pragma unroll
    for (int j = 0; j < kWords * kPerWord; ++j) x[j] = element<S, T>(held[j / kPerWord], j % kPerWord);
    own.add(x);
  }
#pragma unroll 1
  for (int64_t i = words * kPerWord + threadIdx.x; i < work.vocabulary; i += blockDim.x) {
    const T x[1] = {load_one<S, T>(address, i)};
    own.add(x);
  }

  // Over the block, in a fixed order: the maximum, then the sums relative to it.
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  T most = own.exponent.max;
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) {
    most = std::fmax(most, __shfl_xor_sync(0xffffffffu, most, width));
  }
  if (threadIdx.x % kWarp == 0) fold_max[warp] = most;
  __syncthreads();
  for (int i = 0; i < warps; ++i) most = std::fmax(most, fold_max[i]);
  own.raise(most);
  const double sum = block_sum(static_cast<double>(own.sum), fold);
  const double tilt = ENTROPY ? block_sum(static_cast<double>(own.tilt), fold) : 0.0;
  if (threadIdx.x != 0) return;
  const double log2_sum = std::log2(sum);
  const double from_max = (static_cast<double>(x_y) - static_cast<double>(most)) * work.inv_temperature;
  const T bad = T(NAN);
  const bool good = sum > 0 && most - most == T(0);  // else NaN in the row, +inf, or nothing but -inf
  work.logp[token] = good ? static_cast<T>(from_max - kLn2 * (log2_sum - own.exponent.excess())) : bad;
  if (ENTROPY) work.entropy[token] = good ? static_cast<T>(kLn2 * (log2_sum - tilt / sum)) : bad;
  work.max[token] = good ? most : bad;
  work.log2_sum[token] = good ? static_cast<T>(log2_sum) : bad;
}

// ---------------------------------------------------------------- backward

template <typename T>
struct Backward {
  Rows logits, out;
  int64_t cols, vocabulary;
  Plane<const int64_t> tokens;
  Plane<const T> grad_logp, grad_entropy, entropy, max, log2_sum;
  T inv_temperature, steepness;
};

// d = (([v == y] - p) g - h p (log p + H)) / temperature, without the token's own term
template <typename T, bool ENTROPY>
struct RowGradient {
  Exponent<T> exponent;
  T log2_sum;
  T base, slope;  // (g + h H) / temperature and h ln2 / temperature

  __device__ __forceinline__ T operator()(T x) const {
    const T t = exponent(x) - log2_sum;
    // The floor keeps p log p at 0 where p is.
    return -power_of_2(t) * (ENTROPY ? std::fma(slope, std::fmax(t, T(kFloor)), base) : base);
  }
};

template <typename S, typename T, bool ENTROPY>
__global__ void __launch_bounds__(kBackwardThreads, blocks_at_once<T>(kBackwardThreads))
    logits_backward_kernel(Backward<T> work) {
  constexpr int kPerWord = 16 / sizeof(S);
  // The last rows first: some of what the forward pass has read last is still in the L2.
  const unsigned token = gridDim.x - 1 - blockIdx.x, cols = static_cast<unsigned>(work.cols);
  const int64_t row = token / cols, col = token % cols;
  const T g = work.grad_logp.at(row, col);
  const T h = ENTROPY ? work.grad_entropy.at(row, col) : T(0), entropy = ENTROPY ? work.entropy.at(row, col) : T(0);
  const T max = work.max.at(row, col), log2_sum = work.log2_sum.at(row, col);
  const bool zero = (g == T(0) && h == T(0)) || !(max - max == T(0)) || !(log2_sum - log2_sum == T(0));
  const Exponent<T> exponent(max, work.steepness);
  const T pull = g * work.inv_temperature;
  const RowGradient<T, ENTROPY> gradient = {exponent, log2_sum, (ENTROPY ? g + h * entropy : g) * work.inv_temperature,
                                            h * work.inv_temperature * T(kLn2)};
  const int64_t y = zero ? -1 : work.tokens.at(row, col);

  const int64_t address = work.logits.at(row, col), out = work.out.at(row, col);
  // Words of 16 bytes need both rows at the same distance from a boundary.
  const Parts parts = parts_of<S>(out, work.vocabulary, (address - out) % 16 == 0);
  const int64_t to_body = parts.head * static_cast<int64_t>(sizeof(S));
  for (int64_t first = threadIdx.x; first < parts.words; first += kWords * blockDim.x) {
    uint4 held[kWords] = {};
    if (!zero) load_words(address + to_body, first, parts.words, uint4{}, held);
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const int64_t at = first + k * static_cast<int64_t>(blockDim.x);
      uint4 word = {};
      if (!zero) {
        T d[kPerWord];
#pragma unroll
        for (int j = 0; j < kPerWord; ++j) d[j] = gradient(element<S, T>(held[k], j));
        const int64_t place = y - parts.head - at * kPerWord;
        if (place >= 0 && place < kPerWord) {
#pragma unroll
          for (int j = 0; j < kPerWord; ++j) d[j] += j == place ? pull : T(0);
        }
#pragma unroll
        for (int j = 0; j < kPerWord; ++j) {
          const S stored = store_as<S>(d[j]);
          memcpy(reinterpret_cast<char*>(&word) + j * sizeof(S), &stored, sizeof(S));
        }
      }
      if (at < parts.words) __stcg(reinterpret_cast<uint4*>(out + to_body) + at, word);
    }
  }
#pragma unroll 1
  for (int64_t n = threadIdx.x; n < parts.singles(); n += blockDim.x) {
    const int64_t i = parts.single(n);
    T d = 0;
    if (!zero) d = gradient(load_one<S, T>(address, i)) + (i == y ? pull : T(0));
    store_one<S>(out, i, d);
  }
}

// ---------------------------------------------------------------- launching

// The same for every row of a length, so that a row's result does not depend on how many there are.
int threads_for(int64_t vocabulary, size_t element_size, int most) {
  const int64_t words = vocabulary * static_cast<int64_t>(element_size) / 16;
  int threads = kWarp;
  while (threads < most && threads * kWords < words) threads *= 2;
  return threads;
}

Rows rows_of(const Tensor& tensor, const char* name) {
  check(tensor.dim() == 3, name, " must be [B, T, V]");
  check(tensor.size(2) >= 1, name, " must have at least one entry a row");
  check(tensor.size(2) == 1 || tensor.stride(2) == 1, name, " must have stride 1 along its last dimension, got ",
        tensor.stride(2));
  const int64_t size = tensor.element_size();
  return {reinterpret_cast<int64_t>(tensor.const_data_ptr()), tensor.stride(0) * size, tensor.stride(1) * size};
}

template <typename X>
Plane<const X> plane_of(const Tensor& tensor, const Tensor& logits, ScalarType dtype, const char* name) {
  check(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  check(tensor.dim() == 2 && tensor.size(0) == logits.size(0) && tensor.size(1) == logits.size(1), name, " must be [",
        logits.size(0), ", ", logits.size(1), "]");
  return {const_data<X>(tensor), tensor.stride(0), tensor.stride(1)};
}

template <typename T>
constexpr ScalarType scalar_type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

int64_t token_count(const Tensor& logits) {
  const int64_t tokens = logits.size(0) * logits.size(1);
  check(tokens <= 0x7fffffff, "logits hold ", tokens, " rows; accepted: up to 2147483647");
  return tokens;
}

template <typename S, typename T>
void forward(const Tensor& logits, const Tensor& tokens, const std::optional<Tensor>& mask, double inv_temperature,
             const Tensor& logp, const std::optional<Tensor>& entropy, const Tensor& softmax) {
  const int64_t count = token_count(logits);
  check_buffer(logp, scalar_type<T>, count, "logp");
  if (entropy) check_buffer(*entropy, scalar_type<T>, count, "entropy");
  check_buffer(softmax, scalar_type<T>, 2 * count, "softmax");
  Forward<T> work;
  work.logits = rows_of(logits, "logits");
  work.cols = logits.size(1);
  work.vocabulary = logits.size(2);
  work.tokens = plane_of<int64_t>(tokens, logits, ScalarType::Long, "tokens");
  if (mask) work.mask = plane_of<uint8_t>(*mask, logits, ScalarType::Bool, "mask");
  work.inv_temperature = inv_temperature;
  work.steepness = static_cast<T>(inv_temperature * kLog2E);
  work.logp = mutable_data<T>(logp);
  work.entropy = entropy ? mutable_data<T>(*entropy) : nullptr;
  work.max = mutable_data<T>(softmax);
  work.log2_sum = work.max + count;
  if (count == 0) return;
  const auto kernel = entropy ? logits_forward_kernel<S, T, true> : logits_forward_kernel<S, T, false>;
  Launcher(logits).run("logits_forward_kernel", kernel, count, threads_for(work.vocabulary, sizeof(S), kForwardThreads),
                       work);
}

template <typename S, typename T>
void backward(const Tensor& logits, const Tensor& tokens, const Tensor& softmax, const Tensor& entropy,
              const Tensor& grad_logp, const std::optional<Tensor>& grad_entropy, double inv_temperature,
              const Tensor& out) {
  const int64_t count = token_count(logits);
  check_buffer(softmax, scalar_type<T>, 2 * count, "softmax");
  check(out.scalar_type() == logits.scalar_type(), "out has the wrong dtype");
  Backward<T> work;
  work.logits = rows_of(logits, "logits");
  work.out = rows_of(out, "out");
  for (int64_t d = 0; d < 3; ++d) {
    check(out.size(d) == logits.size(d), "out must be [", logits.size(0), ", ", logits.size(1), ", ", logits.size(2),
          "]");
    check(d == 2 || out.size(d) <= 1 || out.stride(d) >= out.size(2), "out must not overlap itself, got stride ",
          out.stride(d), " for rows of ", out.size(2));
  }
  work.cols = logits.size(1);
  work.vocabulary = logits.size(2);
  work.tokens = plane_of<int64_t>(tokens, logits, ScalarType::Long, "tokens");
  work.grad_logp = plane_of<T>(grad_logp, logits, scalar_type<T>, "grad_logp");
  if (grad_entropy) work.grad_entropy = plane_of<T>(*grad_entropy, logits, scalar_type<T>, "grad_entropy");
  if (grad_entropy) work.entropy = plane_of<T>(entropy, logits, scalar_type<T>, "entropy");
  work.max = {const_data<T>(softmax), work.cols, 1};
  work.log2_sum = {const_data<T>(softmax) + count, work.cols, 1};
  work.inv_temperature = static_cast<T>(inv_temperature);
  work.steepness = static_cast<T>(inv_temperature * kLog2E);
  if (count == 0) return;
  const auto kernel = grad_entropy ? logits_backward_kernel<S, T, true> : logits_backward_kernel<S, T, false>;
  Launcher(logits).run("logits_backward_kernel", kernel, count,
                       threads_for(work.vocabulary, sizeof(S), kBackwardThreads), work);
}

// The operators: arguments as above, logits of any dtype.
void cuda_logits_forward(const Tensor& logits, const Tensor& tokens, std::optional<Tensor> mask, double inv_temperature,
                         const Tensor& logp, std::optional<Tensor> entropy, const Tensor& softmax) {
  auto run = forward<float, float>;
  const DType dtype = floating_dtype(logits, "logits");
  if (dtype == DType::F64) run = forward<double, double>;
  if (dtype == DType::BF16) run = forward<BFloat16, float>;
  if (dtype == DType::F16) run = forward<Float16, float>;
  run(logits, tokens, mask, inv_temperature, logp, entropy, softmax);
}

void cuda_logits_backward(const Tensor& logits, const Tensor& tokens, const Tensor& softmax, const Tensor& entropy,
                          const Tensor& grad_logp, std::optional<Tensor> grad_entropy, double inv_temperature,
                          const Tensor& out) {
  auto run = backward<float, float>;
  const DType dtype = floating_dtype(logits, "logits");
  if (dtype == DType::F64) run = backward<double, double>;
  if (dtype == DType::BF16) run = backward<BFloat16, float>;
  if (dtype == DType::F16) run = backward<Float16, float>;
  run(logits, tokens, softmax, entropy, grad_logp, grad_entropy, inv_temperature, out);
}

}  // namespace
}  // namespace fca

FCA_REGISTER(m) {
  m.impl("cuda_logits_forward", TORCH_BOX(&fca::cuda_logits_forward));
  m.impl("cuda_logits_backward", TORCH_BOX(&fca::cuda_logits_backward));
}
