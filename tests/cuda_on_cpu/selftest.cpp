// Checks the tool itself: small kernels whose results are known, and wrong kernels that it must stop or expose.
// Prints a line per check and a closing count; fails if one does. tests/test_cuda_on_cpu_tool.py builds and runs it.
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#define LAUNCH(kernel, grid, block, ...) cuda_on_cpu::launch(kernel, #kernel, grid, block, 0, nullptr, __VA_ARGS__)

static int passed = 0, failed = 0;

static void check(const char* what, bool good) {
  std::printf("%s  %s\n", good ? "ok  " : "FAIL", what);
  ++(good ? passed : failed);
}

static void set_order(const char* order, const char* seed = "1") {
  setenv("CUDA_ON_CPU_ORDER", order, 1);
  setenv("CUDA_ON_CPU_SEED", seed, 1);
}
static const char* const kOrders[] = {"forward", "reverse", "shuffle"};

// ---------------------------------------------------------------- right kernels

struct Place {
  uint3 thread, block;
  dim3 threads, blocks;
};

__global__ void places(Place* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = {threadIdx, blockIdx, blockDim, gridDim};
}

static bool check_places() {
  const dim3 grid(3, 2, 4), block(5, 3, 2);
  std::vector<Place> out(24 * 30);
  LAUNCH(places, grid, block, out.data());
  for (unsigned i = 0; i < out.size(); ++i) {
    const Place& p = out[i];
    const unsigned b = i / 30, t = i % 30;
    if (p.thread.x != t % 5 || p.thread.y != t / 5 % 3 || p.thread.z != t / 15) return false;
    if (p.block.x != b % 3 || p.block.y != b / 3 % 2 || p.block.z != b / 6) return false;
    if (p.threads.x != 5 || p.threads.y != 3 || p.threads.z != 2 || p.blocks.x != 3 || p.blocks.z != 4) return false;
  }
  return true;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The scalar `total` is written by one thread between barriers: a compiler that kept it in a register would be seen.
template <class T>
__global__ void __launch_bounds__(256) block_sums(const T* __restrict__ in, int n, T* __restrict__ out) {
  __shared__ T partial[32];
  __shared__ T total;
  for (int tile = 0; tile < 3; ++tile) {
    T sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += in[i];
    sum = warp_sum(sum);
    if (threadIdx.x % warpSize == 0) partial[threadIdx.x / warpSize] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      total = static_cast<T>(tile);
      for (unsigned w = 0; w < blockDim.x / warpSize; ++w) total += partial[w];
    }
    __syncthreads();
    out[(blockIdx.x * 3 + tile) * blockDim.x + threadIdx.x] = total;
  }
}

template <class T>
static bool check_block_sums() {
  std::vector<T> in(1000), out(2 * 3 * 256);
  for (int i = 0; i < 1000; ++i) in[i] = static_cast<T>(i % 17);
  T sum = 0;
  for (T x : in) sum += x;
  LAUNCH(block_sums<T>, 2, 256, in.data(), 1000, out.data());
  for (size_t i = 0; i < out.size(); ++i) {
    if (out[i] != sum + static_cast<T>(i / 256 % 3)) return false;
  }
  return true;
}

__global__ void transpose(const float* in, float* out, int rows, int columns) {
  __shared__ float tile[16][17];
  const int x = blockIdx.x * 16 + threadIdx.x, y = blockIdx.y * 16 + threadIdx.y;
  if (x < columns && y < rows) tile[threadIdx.y][threadIdx.x] = in[y * columns + x];
  __syncthreads();
  const int row = blockIdx.x * 16 + threadIdx.y, column = blockIdx.y * 16 + threadIdx.x;
  if (row < columns && column < rows) out[row * rows + column] = tile[threadIdx.x][threadIdx.y];
}

static bool check_transpose() {
  const int rows = 37, columns = 50;
  std::vector<float> in(rows * columns), out(rows * columns);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  LAUNCH(transpose, dim3(4, 3), dim3(16, 16), in.data(), out.data(), rows, columns);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      if (out[c * rows + r] != in[r * columns + c]) return false;
    }
  }
  return true;
}

// The block that comes last, whichever it is, sums what all have left.
__global__ void last_block(double* partial, unsigned* done, double* out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = blockIdx.x + 1.0;
    __threadfence();
    last = atomicAdd(done, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  if (threadIdx.x == 0) {
    double sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += __ldcg(partial + b);
    *out = sum;
    *done = 0;
  }
}

static bool check_last_block() {
  std::vector<double> partial(37);
  unsigned done = 0;
  double out = 0;
  LAUNCH(last_block, 37, 64, partial.data(), &done, &out);
  return out == 37 * 38 / 2 && done == 0;
}

__global__ void vectors(const float4* in, float4* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float4 a = __ldcs(in + i), b = in[i];
  __stcs(out + i, make_float4(a.x, b.y + 1, a.z + 2, b.w + 3));
}

static bool check_vectors() {
  alignas(16) float in[4 * 70], out[4 * 70] = {};
  for (int i = 0; i < 280; ++i) in[i] = static_cast<float>(i);
  LAUNCH(vectors, 2, 64, reinterpret_cast<const float4*>(in), reinterpret_cast<float4*>(out), 70);
  for (int i = 0; i < 280; ++i) {
    if (out[i] != in[i] + static_cast<float>(i % 4)) return false;
  }
  static_assert(alignof(float4) == 16 && alignof(float2) == 8 && alignof(double2) == 16 && alignof(longlong2) == 16,
                "");
  static_assert(alignof(uint4) == 16 && alignof(int4) == 16 && alignof(uint3) == 4 && sizeof(float3) == 12, "");
  return true;
}

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  int k = 0;
  const auto put = [&](int value) { out[k++ * 32 + lane] = value; };
  put(__shfl_sync(0xffffffffu, lane, 37));
  put(__shfl_sync(0xffffffffu, lane, 3, 8));
  put(__shfl_up_sync(0xffffffffu, lane, 5u));
  put(__shfl_down_sync(0xffffffffu, lane, 5u));
  put(__shfl_down_sync(0xffffffffu, lane, 5u, 16));
  put(__shfl_xor_sync(0xffffffffu, lane, 9));
  put(__shfl_xor_sync(0xffffffffu, lane, 12, 8));
  put(static_cast<int>(__shfl_xor_sync(0xffffffffu, (lane + 0.5) * 2, 1)));
  put(static_cast<int>(__shfl_xor_sync(0xffffffffu, static_cast<unsigned long long>(lane) << 32, 1) >> 32));
  put(static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0) >> 1));
  put(__any_sync(0xffffffffu, lane == 7) * 2 + __all_sync(0xffffffffu, lane != 7));
  // The halves of the warp go separate ways and shuffle within themselves, the upper one more often.
  int sum = lane;
  if (lane < 16) {
    sum += __shfl_xor_sync(0x0000ffffu, sum, 8);
  } else {
    for (int o = 8; o > 0; o /= 2) sum += __shfl_xor_sync(0xffff0000u, sum, o);
  }
  __syncwarp();
  put(sum);
}

static bool check_shuffles() {
  std::vector<int> out(12 * 32);
  LAUNCH(shuffles, 1, 32, out.data());
  unsigned thirds = 0;
  for (int i = 0; i < 32; i += 3) thirds |= 1u << i;
  for (int i = 0; i < 32; ++i) {
    const int want[] = {5,
                        i / 8 * 8 + 3,
                        i < 5 ? i : i - 5,
                        i > 26 ? i : i + 5,
                        i % 16 > 10 ? i : i + 5,
                        i ^ 9,
                        (i ^ 12) < (i | 7) + 1 ? i ^ 12 : i,
                        2 * (i ^ 1) + 1,
                        i ^ 1,
                        static_cast<int>(thirds >> 1),
                        2,
                        i < 16 ? 2 * i + (i < 8 ? 8 : -8) : 16 * 23 + 8};
    for (int k = 0; k < 12; ++k) {
      if (out[k * 32 + i] != want[k]) return false;
    }
  }
  return true;
}

__global__ void votes(int* out) {
  const int t = threadIdx.x;
  const int count = __syncthreads_count(t % 5 == 0), any = __syncthreads_or(t == 99), all = __syncthreads_and(t != 99);
  out[t] = count * 100 + (any ? 10 : 0) + (all ? 1 : 0);
}

__global__ void atomics(int* i, unsigned* u, unsigned long long* l, float* f, double* d, unsigned* inc) {
  atomicAdd(i, -1);
  atomicAdd(u, 3);
  atomicAdd(l, 1ull << 40);
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
  atomicMax(i + 1, static_cast<int>(threadIdx.x));
  atomicMin(u + 1, threadIdx.x);
  atomicInc(inc, 9u);
  if (atomicCAS(u + 2, 0u, threadIdx.x + 1u) == 0u) atomicExch(i + 2, static_cast<int>(threadIdx.x) + 1);
}

static bool check_atomics() {
  int i[3] = {10, 0, 0};
  unsigned u[3] = {0xffffffffu, 1000, 0}, inc = 0;
  unsigned long long l = 0;
  float f = 0;
  double d = 0;
  LAUNCH(atomics, 2, 50, i, u, &l, &f, &d, &inc);
  return i[0] == -90 && u[0] == 299 && l == 100ull << 40 && f == 50 && d == 25 && i[1] == 49 && u[1] == 0 &&
         u[2] == static_cast<unsigned>(i[2]) && u[2] != 0 && inc == 0;
}

__global__ void count_visits(int* visits) { atomicAdd(visits + blockIdx.x * blockDim.x + threadIdx.x, 1); }

static bool check_visits() {
  for (int blocks : {1, 2, 3, 12, 97, 360}) {
    std::vector<int> visits(blocks * 70);
    LAUNCH(count_visits, blocks, 70, visits.data());
    for (int n : visits) {
      if (n != 1) return false;
    }
  }
  return true;
}

struct Large {
  char bytes[4000];
};
__global__ void by_value(const __grid_constant__ Large large, float scale, int* out) {
  out[threadIdx.x] = static_cast<int>(static_cast<float>(large.bytes[threadIdx.x]) * scale);
}

// ---------------------------------------------------------------- wrong kernels that give results

__global__ void missing_barrier(int* out) {
  __shared__ int slot[64];
  slot[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = slot[63 - threadIdx.x];
}

__global__ void barrier_only_once(int* out) {  // the second is missing: a fast thread overwrites what others read
  __shared__ int slot;
  for (int i = 0; i < 4; ++i) {
    if (threadIdx.x % 4 == static_cast<unsigned>(i)) slot = threadIdx.x;
    __syncthreads();
    out[i * 64 + threadIdx.x] = slot;
  }
}

__global__ void missing_syncwarp(int* out) {
  __shared__ int slot[32];
  slot[threadIdx.x] = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 31 - threadIdx.x);
  out[threadIdx.x] = slot[threadIdx.x ^ 1];
}

__global__ void block_chain(int* out) { out[blockIdx.x] = blockIdx.x == 0 ? 1 : out[blockIdx.x - 1] + 1; }

__global__ void who_came_when(int* counter, int* out) {
  for (int i = 0; i < 2; ++i) {
    out[(blockIdx.x * 2 + i) * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
    __syncthreads();
  }
}

template <class T>
__global__ void read_uninitialised(T* out) {
  __shared__ T never_written[33];
  __shared__ T sometimes_written;
  if (blockIdx.x == 0) sometimes_written = never_written[3] = T(7);
  __syncthreads();
  out[blockIdx.x * 2] = never_written[3];
  out[blockIdx.x * 2 + 1] = sometimes_written;
}

__global__ void read_dynamic(float* out, int written) {
  float* shared = cuda_on_cpu::dynamic_shared<float>();
  if (static_cast<int>(threadIdx.x) < written) shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

template <class Kernel>
static std::vector<int> in_order(const char* order, Kernel kernel, int blocks, int threads, size_t n,
                                 const char* seed = "1") {
  set_order(order, seed);
  std::vector<int> out(n);
  cuda_on_cpu::launch(kernel, "in_order", blocks, threads, 0, nullptr, out.data());
  set_order("forward");
  return out;
}

template <class Kernel>
static bool differs(Kernel kernel, int blocks, int threads, size_t n) {
  const auto forward = in_order("forward", kernel, blocks, threads, n);
  return forward != in_order("reverse", kernel, blocks, threads, n) &&
         forward != in_order("shuffle", kernel, blocks, threads, n);
}

static std::vector<int> arrivals(const char* order, const char* seed = "1") {
  set_order(order, seed);
  std::vector<int> out(5 * 2 * 64);
  int counter = 0;
  LAUNCH(who_came_when, 5, 64, &counter, out.data());
  set_order("forward");
  return out;
}

static bool check_shuffled_arrivals() {
  const auto a = arrivals("shuffle"), b = arrivals("shuffle"), c = arrivals("shuffle", "2");
  const auto rank = [&](int interval, int t) { return a[interval * 64 + t] % 64; };
  int moved = 0, blocks_moved = 0;
  for (int t = 0; t < 64; ++t) moved += rank(0, t) != rank(1, t);
  for (int k = 0; k < 5; ++k) blocks_moved += a[k * 128] / 128 != k;
  return a == b && a != c && moved > 32 && blocks_moved > 0;
}

static bool check_ordered_arrivals() {
  const auto forward = arrivals("forward"), reverse = arrivals("reverse");
  for (int i = 0; i < 640; ++i) {
    const int block = i / 128, interval = i / 64 % 2, t = i % 64;
    if (forward[i] != i) return false;
    if (reverse[i] != (4 - block) * 128 + interval * 64 + 63 - t) return false;
  }
  return true;
}

static bool check_poison() {
  float f[4];
  int i[4];
  double d[4];
  LAUNCH(read_uninitialised<float>, 2, 1, f);
  LAUNCH(read_uninitialised<double>, 2, 1, d);
  LAUNCH(read_uninitialised<int>, 2, 1, i);
  return f[0] == 7 && f[1] == 7 && std::isnan(f[2]) && std::isnan(f[3]) && d[1] == 7 && std::isnan(d[2]) &&
         std::isnan(d[3]) && i[0] == 7 && i[2] == -1 && i[3] == -1;
}

static bool check_dynamic() {
  std::vector<float> out(100);
  cuda_on_cpu::launch(read_dynamic, "read_dynamic", 1, 100, 400, nullptr, out.data(), 60);
  return out[59] == 1 && std::isnan(out[60]) && std::isnan(out[99]);
}

// ---------------------------------------------------------------- wrong kernels that must be stopped

__global__ void some_skip_barrier(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void barrier_against_warp(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else if (threadIdx.x != 35) {
    out[0] = __shfl_xor_sync(0xffffffffu, 1, 1);
  }
}
__global__ void two_barriers(int* out) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
    out[0] = 1;
  } else {
    __syncthreads();
    out[1] = 1;
  }
}
__global__ void exited_lane(int* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __any_sync(0xffffffffu, 1);
}
__global__ void unequal_masks(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(threadIdx.x < 4 ? 0xfu : 0xffffffffu, 1, 1);
}
__global__ void beyond_block(int* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1); }
__global__ void not_in_mask(int* out) { out[threadIdx.x] = __shfl_xor_sync(0x0fffffffu, 1, 1); }
__global__ void reads_outside(int* out) {
  if (threadIdx.x < 8) out[threadIdx.x] = __shfl_down_sync(0x000000ffu, 1, 4u);
}
__global__ void bad_width(int* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1, 12); }
__global__ void throws(int* out) {
  if (threadIdx.x == 3) throw std::runtime_error("no exceptions on a GPU");
  out[threadIdx.x] = 1;
}
__global__ void traps(int*) { __trap(); }
__global__ void launches(int* out) { LAUNCH(traps, 1, 1, out); }

// The child's standard error, and whether it aborted.
template <class Function>
static bool dies(const char* what, Function function, const std::vector<std::string>& words) {
  int ends[2];
  if (pipe(ends) != 0) return false;
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    close(ends[0]);
    function();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;) text.append(buffer, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  bool good = WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
  for (const std::string& word : words) good = good && text.find(word) != std::string::npos;
  check(what, good);
  if (!good) std::printf("%s(status %d)\n", text.c_str(), status);
  return good;
}
#define DIES(kernel, threads, ...)                              \
  for (const char* order : kOrders) {                           \
    const std::string what = std::string(#kernel ", ") + order; \
    const auto run = [&] {                                      \
      std::vector<int> out(1024);                               \
      set_order(order);                                         \
      LAUNCH(kernel, 2, threads, out.data());                   \
    };                                                          \
    dies(what.c_str(), run, {"kernel " #kernel, __VA_ARGS__});  \
  }

// ---------------------------------------------------------------- the host's side

struct TooLarge {
  char bytes[4097];
};
__global__ void too_large(TooLarge) {}
__global__ void mark(int* out) { *out = 1; }

static cudaError_t launch_mark(dim3 grid, dim3 block, size_t dynamic_bytes = 0) {
  int ran = 0;
  cuda_on_cpu::launch(mark, "mark", grid, block, dynamic_bytes, nullptr, &ran);
  const cudaError_t peeked = cudaPeekAtLastError(), error = cudaGetLastError();
  if (peeked != error || cudaGetLastError() != cudaSuccess || ran == (error != cudaSuccess)) return cudaErrorUnknown;
  return error;
}

static bool check_launch_errors() {
  const cudaError_t bad = cudaErrorInvalidConfiguration;
  bool good = launch_mark(1, 1) == cudaSuccess && launch_mark(1, 1024) == cudaSuccess;
  good = good && launch_mark(1, 0) == bad && launch_mark(1, 1025) == bad && launch_mark(1, dim3(32, 33)) == bad;
  good = good && launch_mark(1, dim3(1, 1, 65)) == bad && launch_mark(1, dim3(1u << 16, 1u << 16)) == bad;
  good = good && launch_mark(0, 1) == bad && launch_mark(dim3(1, 0), 1) == bad && launch_mark(1u << 31, 1) == bad;
  good = good && launch_mark(dim3(1, 65536), 1) == bad && launch_mark(dim3(1, 1, 65536), 1) == bad;
  good = good && launch_mark(1, 1, 48 << 10) == cudaSuccess && launch_mark(1, 1, (48 << 10) + 1) != cudaSuccess;
  good = good && cudaFuncSetAttribute(mark, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10) == cudaSuccess;
  good = good && launch_mark(1, 1, 100 << 10) == cudaSuccess && launch_mark(1, 1, 101 << 10) != cudaSuccess;
  LAUNCH(too_large, 1, 1, TooLarge());
  return good && cudaGetLastError() == cudaErrorInvalidValue;
}

static bool check_fail_next_launch() {
  const unsigned long long before = cuda_on_cpu_launch_count();
  cuda_on_cpu_fail_next_launch(cudaErrorLaunchOutOfResources);
  const bool first = launch_mark(1, 1) == cudaErrorLaunchOutOfResources, second = launch_mark(1, 1) == cudaSuccess;
  cuda_on_cpu::fail_next_launch(cudaErrorIllegalAddress);
  const bool third = launch_mark(1, 1) == cudaErrorIllegalAddress;
  return first && second && third && cuda_on_cpu_launch_count() == before + 3 &&
         std::string(cudaGetErrorName(cudaErrorIllegalAddress)) == "cudaErrorIllegalAddress" &&
         std::string(cudaGetErrorString(cudaErrorInvalidConfiguration)) == "invalid configuration argument";
}

static bool check_host_functions() {
  int a[4] = {1, 2, 3, 4}, b[4], device = -1, sms = 0;
  cudaStream_t stream = nullptr;
  bool good = cudaMemcpyAsync(b, a, sizeof(a), cudaMemcpyDeviceToDevice, stream) == cudaSuccess && b[3] == 4;
  good = good && cudaMemsetAsync(b, 0, 8, stream) == cudaSuccess && b[1] == 0 && b[2] == 3;
  good = good && cudaGetDevice(&device) == cudaSuccess && device == 0 && cudaSetDevice(0) == cudaSuccess;
  good = good && cudaSetDevice(1) == cudaErrorInvalidDevice && cudaGetLastError() == cudaErrorInvalidDevice;
  good = good && cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && sms > 0;
  return good && cudaStreamSynchronize(stream) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess;
}

__global__ void three_barriers(float* out) {
  __shared__ float tile[256];
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  const float other = tile[255 - threadIdx.x];
  __syncthreads();
  tile[threadIdx.x] = other;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

static void report_speed() {
  std::vector<float> out(256);
  std::vector<int> visits(256 * 2000);
  std::vector<float> in(256), sums(256 * 3 * 2000);
  const auto time = [](const char* what, auto run) {
    const auto start = std::chrono::steady_clock::now();
    run();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("      %.0f blocks of 256 threads a second: %s\n", 2000 / seconds, what);
  };
  time("no barrier", [&] { LAUNCH(count_visits, 2000, 256, visits.data()); });
  time("3 barriers", [&] { LAUNCH(three_barriers, 2000, 256, out.data()); });
  time("6 barriers, 15 shuffles", [&] { LAUNCH(block_sums<float>, 2000, 256, in.data(), 256, sums.data()); });
}

int main() {
  for (const char* order : kOrders) {
    std::printf("order %s\n", order);
    set_order(order);
    check("indices of a grid and a block in three dimensions", check_places());
    check("block sums by shuffles, float", check_block_sums<float>());
    check("block sums by shuffles, double", check_block_sums<double>());
    check("block sums by shuffles, long long", check_block_sums<long long>());
    check("transposition through shared memory", check_transpose());
    check("the last block sums", check_last_block());
    check("vector loads and stores", check_vectors());
    check("shuffles, votes, halves of a warp", check_shuffles());
    check("atomics", check_atomics());
    check("every block and thread runs once", check_visits());
    std::vector<int> out(100);
    LAUNCH(votes, 1, 100, out.data());
    check("barriers that count", out == std::vector<int>(100, 2010));
    Large large;
    for (int i = 0; i < 4000; ++i) large.bytes[i] = static_cast<char>(i % 50);
    LAUNCH(by_value, 1, 100, large, 2, out.data());  // the int becomes a float, as in any call
    check("arguments by value", out[7] == 14 && out[99] == 98);
  }
  set_order("forward");
  check("a missing barrier shows", differs(missing_barrier, 1, 64, 64));
  check("a second barrier missing in a loop shows", differs(barrier_only_once, 1, 64, 256));
  check("a missing __syncwarp shows", differs(missing_syncwarp, 1, 32, 32));
  check("work that depends on the order of blocks shows", differs(block_chain, 20, 1, 20));
  check("forward and reverse are what they say", check_ordered_arrivals());
  check("shuffle differs between intervals and seeds, and repeats", check_shuffled_arrivals());
  check("shared memory is poisoned between blocks", check_poison());
  check("dynamic shared memory is poisoned", check_dynamic());

  const char* deadlock = "deadlock, no thread can go on";
  DIES(some_skip_barrier, 64, deadlock, "40 threads", "wait at __syncthreads", "24 threads", "returned",
       "selftest.cpp:");
  DIES(barrier_against_warp, 64, deadlock, "32 threads", "__syncthreads", "31 threads", "__shfl_xor_sync",
       "lanes 0x00000008 do not come");
  DIES(two_barriers, 64, "at different barriers", "32 threads, the first (0,0,0)", "32 threads, the first (1,0,0)");
  DIES(exited_lane, 32, deadlock, "__any_sync(mask 0xffffffff)", "lanes 0x00000020 do not come");
  DIES(unequal_masks, 32, deadlock, "28 threads", "lanes 0x0000000f do not come");
  DIES(beyond_block, 48, deadlock, "in warp 1, where lanes 0xffff0000 do not come");
  DIES(not_in_mask, 32, "calls __shfl_xor_sync(mask 0x0fffffff)");
  DIES(reads_outside, 32, "by __shfl_down_sync(mask 0x000000ff)");
  DIES(bad_width, 32, "width 12");
  DIES(throws, 32, "the kernel threw an exception: no exceptions on a GPU");
  DIES(traps, 32, "__trap()");
  DIES(launches, 1, "launch of traps inside of a kernel");
  dies("__syncthreads on the host", [] { __syncthreads(); }, {"__syncthreads outside of a kernel"});
  const auto unknown = [] {
    set_order("backward");
    launch_mark(1, 1);
  };
  dies("an unknown order", unknown, {"CUDA_ON_CPU_ORDER=backward is unknown"});

  check("launches that CUDA refuses", check_launch_errors());
  check("fail_next_launch and launch_count", check_fail_next_launch());
  check("host functions", check_host_functions());
  report_speed();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
