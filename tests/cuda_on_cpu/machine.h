// The machine under cuda_runtime.h: fibers, the order in which they run, barriers, shared memory, launches.
#pragma once

#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>  // before __noinline__ becomes a macro, which libstdc++ uses as an attribute's name
#include <mutex>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_CPU_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_CPU_ASAN 1
#endif
#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct uint3 {
  unsigned x, y, z;
};

// Hidden: two libraries with kernels in one process do not share any of what follows.
#pragma GCC visibility push(hidden)

inline uint3 threadIdx, blockIdx;  // of the fiber that runs: set at every switch
inline dim3 blockDim, gridDim;
inline int warpSize = 32;

// ---------------------------------------------------------------- errors

// clang-format off
#define CUDA_ON_CPU_ERRORS(X)                                                                              \
  X(cudaSuccess, 0) X(cudaErrorInvalidValue, 1) X(cudaErrorMemoryAllocation, 2)                            \
  X(cudaErrorInvalidConfiguration, 9) X(cudaErrorInvalidDeviceFunction, 98) X(cudaErrorNoDevice, 100)      \
  X(cudaErrorInvalidDevice, 101) X(cudaErrorNoKernelImageForDevice, 209) X(cudaErrorIllegalAddress, 700)   \
  X(cudaErrorLaunchOutOfResources, 701) X(cudaErrorLaunchFailure, 719) X(cudaErrorNotSupported, 801)       \
  X(cudaErrorUnknown, 999)
// clang-format on
#define CUDA_ON_CPU_ENUMERATOR(name, code) name = code,
enum cudaError : int { CUDA_ON_CPU_ERRORS(CUDA_ON_CPU_ENUMERATOR) };
#undef CUDA_ON_CPU_ENUMERATOR
using cudaError_t = cudaError;
using cudaStream_t = struct CUstream_st*;

namespace cuda_on_cpu {

// ---------------------------------------------------------------- fibers: stacks that take turns

constexpr size_t kStack = 256 << 10, kGuard = 64 << 10;  // the guard covers the largest page size of any Linux

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
// swapcontext makes a system call (250 ns here); six registers and the stack pointer take 3 ns.
using Context = void*;
__attribute__((naked, noinline)) inline void swap_stacks(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
// Through a pointer that the compiler cannot see through: what a kernel keeps in shared memory may change meanwhile.
inline void (*volatile swap_pointer)(void**, void*) = swap_stacks;
inline void swap_context(Context& save, Context& load) { swap_pointer(&save, load); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack);
  std::memset(top - 8, 0, 8 * sizeof(void*));  // six registers, the entry, and its own return address, never used
  top[-2] = reinterpret_cast<void*>(entry);
  context = top - 8;
}
#else
using Context = ucontext_t;
inline void swap_context(Context& save, Context& load) { swapcontext(&save, &load); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

struct Fiber {
  Context context;
  const void* stack;
  size_t bytes;
  void* fake_stack;  // AddressSanitizer's
};

// ---------------------------------------------------------------- the machine: one launch, one block at a time

// clang-format off
enum class Op { NONE, RETURNED, SYNCTHREADS, SYNCTHREADS_COUNT, SYNCTHREADS_AND, SYNCTHREADS_OR,  // of the block
                SYNCWARP, SHFL, SHFL_UP, SHFL_DOWN, SHFL_XOR, BALLOT, ANY, ALL };                 // of the warp
constexpr const char* kOpNames[] = {
    "", "", "__syncthreads", "__syncthreads_count", "__syncthreads_and", "__syncthreads_or",
    "__syncwarp", "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
    "__ballot_sync", "__any_sync", "__all_sync"};
// clang-format on

struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

struct Thread {
  uint3 index;
  Fiber* fiber;  // null until it starts
  Op op;         // what it waits for
  Site site;
  unsigned mask, bytes;
  int source;  // the lane a shuffle reads
  uint64_t value, result;
};

enum class Order { FORWARD, REVERSE, SHUFFLE };
constexpr unsigned kMaxThreads = 1024;

struct Machine {
  std::mutex one_launch;
  const char* kernel = nullptr;  // null: no launch is running
  void (*body)(void*);
  void* arguments;
  Order order;
  uint64_t random;
  unsigned block_threads, waiting, returned;  // waiting: at a barrier of the whole block
  unsigned current;                           // the thread that runs
  Thread threads[kMaxThreads];
  uint64_t ready[kMaxThreads / 64];  // a bit a thread
  unsigned ready_n;
  Fiber host;
  Fiber* running;
  Fiber* previous;
  std::vector<Fiber*> idle;
  void* dynamic_shared = nullptr;
  std::map<void*, int> dynamic_limits;  // by kernel: cudaFuncSetAttribute
  cudaError_t fail_next = cudaSuccess;
  unsigned long long launches = 0;
};
inline Machine machine;
inline thread_local cudaError_t last_error = cudaSuccess;
inline thread_local bool in_kernel = false;

// Tells where the machine is, and aborts.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void die(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "cuda_on_cpu: ");
  if (in_kernel) {
    std::fprintf(stderr, "kernel %s, block (%u,%u,%u) of (%u,%u,%u) with (%u,%u,%u) threads, in thread (%u,%u,%u):\n  ",
                 machine.kernel, blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x, gridDim.y, gridDim.z, blockDim.x,
                 blockDim.y, blockDim.z, threadIdx.x, threadIdx.y, threadIdx.z);
  }
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::abort();
}

inline bool same(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// Aborts and tells where every thread of the block is, those at one place together.
[[noreturn]] inline void die_stuck(const char* what) {
  std::string places;
  const auto like = [](const Thread& a, const Thread& b, bool same_warp) {
    if (a.op != b.op || a.op == Op::RETURNED || a.op == Op::NONE) return a.op == b.op;
    return same(a.site, b.site) && (a.op < Op::SYNCWARP || (a.mask == b.mask && a.bytes == b.bytes && same_warp));
  };
  std::vector<char> told(machine.block_threads);
  for (unsigned i = 0; i < machine.block_threads; ++i) {
    if (told[i]) continue;
    const Thread& t = machine.threads[i];
    unsigned n = 0, lanes = 0;
    for (unsigned j = i; j < machine.block_threads; ++j) {
      if (!like(t, machine.threads[j], i / 32 == j / 32)) continue;
      told[j] = 1;
      ++n;
      if (i / 32 == j / 32) lanes |= 1u << (j % 32);
    }
    char line[400];
    int used = std::snprintf(line, sizeof(line), "\n    %u thread%s, the first (%u,%u,%u), ", n, n == 1 ? "" : "s",
                             t.index.x, t.index.y, t.index.z);
    if (t.op == Op::RETURNED) {
      std::snprintf(line + used, sizeof(line) - used, "returned");
    } else if (t.op == Op::NONE) {
      std::snprintf(line + used, sizeof(line) - used, "could go on");
    } else {
      used += std::snprintf(line + used, sizeof(line) - used, "at %s:%d wait%s at %s", t.site.file, t.site.line,
                            n == 1 ? "s" : "", kOpNames[static_cast<int>(t.op)]);
      if (t.op >= Op::SYNCWARP && used < int(sizeof(line))) {
        std::snprintf(line + used, sizeof(line) - used, "(mask 0x%08x) in warp %u, where lanes 0x%08x do not come",
                      t.mask, i / 32, t.mask & ~lanes);
      }
    }
    places += line;
  }
  die("%s%s", what, places.c_str());
}

inline uint64_t next_random() {  // splitmix64
  uint64_t z = machine.random += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Makes the next thread the current one, or aborts if all wait. False if all have returned.
inline bool choose_thread() {
  Machine& m = machine;
  if (m.ready_n == 0) {
    if (m.returned == m.block_threads) return false;
    die_stuck("deadlock, no thread can go on:");
  }
  unsigned rank = 0;  // among the ready threads
  if (m.order == Order::REVERSE) rank = m.ready_n - 1;
  if (m.order == Order::SHUFFLE) rank = static_cast<unsigned>(next_random() % m.ready_n);
  unsigned word = 0;
  for (unsigned n; rank >= (n = __builtin_popcountll(m.ready[word])); ++word) rank -= n;
  uint64_t bits = m.ready[word];
  while (rank-- > 0) bits &= bits - 1;
  m.ready[word] &= ~(bits & -bits);
  --m.ready_n;
  const unsigned next = word * 64 + __builtin_ctzll(bits);
  m.current = next;
  threadIdx = m.threads[next].index;
  return true;
}

inline void make_ready(unsigned thread) {
  machine.threads[thread].op = Op::NONE;
  ++machine.ready_n;
  machine.ready[thread / 64] |= uint64_t(1) << (thread % 64);
}

// On the new stack, after every switch. AddressSanitizer tells the bounds of the stack left, which for the host's
// stack are not known otherwise.
inline void arrived() {
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(machine.running->fake_stack, &machine.previous->stack, &machine.previous->bytes);
#endif
}

inline void switch_to(Fiber* to) {
  Fiber* from = machine.running;
  machine.previous = from;
  machine.running = to;
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->bytes);
#endif
  swap_context(from->context, to->context);
  arrived();
}

// A fiber runs threads from their start, one after another, as long as they return without waiting: a kernel without
// barriers needs one fiber. It never ends, so that its stack is clean when the next thread starts on it.
inline void fiber_main() {
  arrived();
  Machine& m = machine;
  Fiber* self = m.running;
  for (;;) {
    Thread& thread = m.threads[m.current];
    thread.fiber = self;
    try {
      m.body(m.arguments);
    } catch (const std::exception& error) {
      die("the kernel threw an exception: %s", error.what());
    } catch (...) {
      die("the kernel threw an exception");
    }
    thread.op = Op::RETURNED;
    ++m.returned;
    const bool more = choose_thread();
    if (more && m.threads[m.current].fiber == nullptr) continue;
    m.idle.push_back(self);
    switch_to(more ? m.threads[m.current].fiber : &m.host);
  }
}

inline Fiber* idle_fiber() {
  if (machine.idle.empty()) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) die("no memory for a thread's stack");
    char* stack = static_cast<char*>(memory) + kGuard;
    static std::vector<std::unique_ptr<Fiber>> all;
    all.push_back(std::make_unique<Fiber>());
    Fiber* fiber = all.back().get();
    fiber->stack = stack;
    fiber->bytes = kStack;
    make_context(fiber->context, stack, fiber_main);
    return fiber;
  }
  Fiber* fiber = machine.idle.back();
  machine.idle.pop_back();
  return fiber;
}

// The current thread gives way until it is chosen again.
inline void give_way() {
  choose_thread();  // never false: this thread has not returned
  Fiber* to = machine.threads[machine.current].fiber;
  if (to == nullptr) to = idle_fiber();
  if (to != machine.running) switch_to(to);
}

inline Thread& arrive(Op op, uint64_t value, const Site& site) {
  if (!in_kernel) die("%s outside of a kernel", kOpNames[static_cast<int>(op)]);
  Thread& self = machine.threads[machine.current];
  self.op = op;
  self.value = value;
  self.site = site;
  return self;
}

// A barrier of the block; the number of threads whose value is not 0.
inline int block_barrier(Op op, uint64_t value, const Site& site) {
  Machine& m = machine;
  Thread& self = arrive(op, value, site);
  if (++m.waiting == m.block_threads) {
    uint64_t count = 0;
    for (unsigned i = 0; i < m.block_threads; ++i) {
      const Thread& t = m.threads[i];
      if (t.op != op || !same(t.site, site)) die_stuck("the threads of the block are at different barriers:");
      count += t.value != 0;
    }
    for (unsigned i = 0; i < m.block_threads; ++i) {
      m.threads[i].result = count;
      make_ready(i);
    }
    m.waiting = 0;
  }
  give_way();
  return static_cast<int>(self.result);
}

// A barrier of the lanes in `mask`; the value of lane `source`, or the ballot where that is -1.
inline uint64_t warp_barrier(Op op, unsigned mask, uint64_t value, unsigned bytes, int source, const Site& site) {
  Machine& m = machine;
  Thread& self = arrive(op, value, site);
  const unsigned lane = m.current % 32, first = m.current - lane;
  const char* name = kOpNames[static_cast<int>(op)];
  if (!(mask >> lane & 1)) die("%s:%d: lane %u calls %s(mask 0x%08x)", site.file, site.line, lane, name, mask);
  if (source >= 0 && !(mask >> source & 1)) {
    die("%s:%d: lane %u reads lane %d by %s(mask 0x%08x)", site.file, site.line, lane, source, name, mask);
  }
  self.mask = mask;
  self.bytes = bytes;
  self.source = source;
  bool complete = true;
  uint64_t ballot = 0;
  for (unsigned rest = mask; rest != 0 && complete; rest &= rest - 1) {
    const unsigned other = __builtin_ctz(rest);
    const Thread& t = m.threads[first + other];
    complete = first + other < m.block_threads && t.op == op && t.mask == mask && t.bytes == bytes;
    if (complete && t.value != 0) ballot |= uint64_t(1) << other;
  }
  if (complete) {
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
      Thread& t = m.threads[first + __builtin_ctz(rest)];
      t.result = t.source < 0 ? ballot : m.threads[first + t.source].value;
      make_ready(first + __builtin_ctz(rest));
    }
  }
  give_way();
  return self.result;
}

// ---------------------------------------------------------------- shared memory

struct Span {
  void* data;
  size_t bytes;
};

// The __shared__ variables of the library (or program) that this code is part of, from its symbol table.
inline std::vector<Span> find_shared_memory() {
  Dl_info info;
  if (dladdr(&machine, &info) == 0) die("dladdr does not know this library");
  std::FILE* file = std::fopen(info.dli_fname, "rb");
  if (file == nullptr) file = std::fopen("/proc/self/exe", "rb");  // dli_fname is argv[0], and no longer there
  if (file == nullptr) die("cannot open %s", info.dli_fname);
  const auto read = [&](void* to, size_t bytes, uint64_t at) {
    if (std::fseek(file, static_cast<long>(at), SEEK_SET) != 0 || std::fread(to, 1, bytes, file) != bytes) {
      die("cannot read the symbol table of %s", info.dli_fname);
    }
  };
  Elf64_Ehdr header;
  read(&header, sizeof(header), 0);
  std::vector<Elf64_Shdr> sections(header.e_shnum);
  read(sections.data(), sections.size() * sizeof(Elf64_Shdr), header.e_shoff);
  const uintptr_t base = header.e_type == ET_DYN ? reinterpret_cast<uintptr_t>(info.dli_fbase) : 0;
  std::vector<Span> spans;
  bool stripped = true;
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    stripped = false;
    std::vector<Elf64_Sym> symbols(section.sh_size / sizeof(Elf64_Sym));
    read(symbols.data(), section.sh_size, section.sh_offset);
    std::vector<char> names(sections[section.sh_link].sh_size);
    read(names.data(), names.size(), sections[section.sh_link].sh_offset);
    for (const Elf64_Sym& symbol : symbols) {
      if (ELF64_ST_TYPE(symbol.st_info) != STT_OBJECT || symbol.st_shndx == SHN_UNDEF) continue;
      const char* name = &names[symbol.st_name];
      if (std::strncmp(name, "_ZZ", 3) != 0 || std::strstr(name, "B18cuda_on_cpu_shared") == nullptr) continue;
      spans.push_back({reinterpret_cast<void*>(base + symbol.st_value), symbol.st_size});
    }
  }
  std::fclose(file);
  if (stripped) die("%s has no symbol table, by which shared memory is found: do not strip it", info.dli_fname);
  return spans;
}

inline void poison_shared_memory(size_t dynamic_bytes) {
  static const std::vector<Span> spans = find_shared_memory();
  const int byte = machine.order == Order::REVERSE ? 0x7f : 0xff;  // 3.4e38 or a NaN in every float type
  for (const Span& span : spans) std::memset(span.data, byte, span.bytes);
  if (dynamic_bytes > 0) std::memset(machine.dynamic_shared, byte, dynamic_bytes);
}

// In place of `extern __shared__ T name[]`.
template <class T>
T* dynamic_shared() {
  return static_cast<T*>(machine.dynamic_shared);
}

// ---------------------------------------------------------------- launch

inline Order read_order() {
  const char* text = std::getenv("CUDA_ON_CPU_ORDER");
  if (text == nullptr || *text == 0 || std::strcmp(text, "forward") == 0) return Order::FORWARD;
  if (std::strcmp(text, "reverse") == 0) return Order::REVERSE;
  if (std::strcmp(text, "shuffle") == 0) return Order::SHUFFLE;
  die("CUDA_ON_CPU_ORDER=%s is unknown; accepted: forward, reverse, shuffle", text);
}

inline cudaError_t check_launch(void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, size_t argument_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || threads == 0 || threads > kMaxThreads) {
    return cudaErrorInvalidConfiguration;
  }
  if (grid.x == 0 || grid.x > INT_MAX || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const auto limit = machine.dynamic_limits.find(kernel);
  if (dynamic_bytes > (limit == machine.dynamic_limits.end() ? 48u << 10 : size_t(limit->second))) {
    return cudaErrorInvalidValue;
  }
  return argument_bytes > 4096 ? cudaErrorInvalidValue : cudaSuccess;
}

inline void run_blocks(size_t dynamic_bytes) {
  Machine& m = machine;
  const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  // Shuffled blocks are offset + stride * k modulo their number: a permutation that needs no memory.
  uint64_t stride = 1, offset = 0;
  while (m.order == Order::SHUFFLE && blocks > 1 && stride == 1 && offset == 0) {  // 1 and 0: not shuffled
    offset = next_random() % blocks;
    stride = next_random() % std::min<uint64_t>(blocks - 1, UINT_MAX) + 1;
    while (std::gcd(stride, blocks) != 1) ++stride;
  }
  for (unsigned i = 0; i < m.block_threads; ++i) {
    m.threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
  for (uint64_t k = 0, b = offset; k < blocks; ++k, b = (b + stride) % blocks) {
    const uint64_t at = m.order == Order::REVERSE ? blocks - 1 - b : b;
    blockIdx = {unsigned(at % gridDim.x), unsigned(at / gridDim.x % gridDim.y), unsigned(at / gridDim.x / gridDim.y)};
    poison_shared_memory(dynamic_bytes);
    m.waiting = m.returned = 0;
    for (unsigned i = 0; i < m.block_threads; ++i) {
      m.threads[i].fiber = nullptr;
      make_ready(i);
    }
    choose_thread();
    switch_to(idle_fiber());
  }
}

// All launches are counted, those refused too: none of them may be forgotten by a caller who counts.
inline void launch_body(void* kernel, const char* name, dim3 grid, dim3 block, size_t dynamic_bytes,
                        size_t argument_bytes, void (*body)(void*), void* arguments) {
  if (in_kernel) die("launch of %s inside of a kernel", name);
  Machine& m = machine;
  std::lock_guard<std::mutex> lock(m.one_launch);
  ++m.launches;
  const cudaError_t refused = check_launch(kernel, grid, block, dynamic_bytes, argument_bytes);
  const cudaError_t error = m.fail_next != cudaSuccess ? m.fail_next : refused;
  m.fail_next = cudaSuccess;
  if (error != cudaSuccess) {
    last_error = error;
    return;
  }
  m.order = read_order();
  const char* seed = std::getenv("CUDA_ON_CPU_SEED");
  m.random = seed != nullptr ? std::strtoull(seed, nullptr, 10) : 1;
  m.kernel = name;
  m.body = body;
  m.arguments = arguments;
  m.block_threads = block.x * block.y * block.z;
  m.running = &m.host;
  gridDim = grid;
  blockDim = block;
  // Exactly as much as asked for, so that AddressSanitizer sees its end.
  if (dynamic_bytes > 0 && posix_memalign(&m.dynamic_shared, 128, dynamic_bytes) != 0) die("no dynamic shared memory");
  in_kernel = true;
  run_blocks(dynamic_bytes);
  in_kernel = false;
  std::free(m.dynamic_shared);
  m.dynamic_shared = nullptr;
  m.kernel = nullptr;
}

template <class... P>
void launch_with(void (*kernel)(P...), const char* name, dim3 grid, dim3 block, size_t dynamic_bytes, P... arguments) {
  static_assert((std::is_trivially_copyable<P>::value && ...), "CUDA copies kernel arguments as bytes");
  size_t bytes = 0;
  ((bytes = (bytes + alignof(P) - 1) / alignof(P) * alignof(P) + sizeof(P)), ...);
  auto body = [&] { kernel(arguments...); };
  using Body = decltype(body);
  launch_body(
      reinterpret_cast<void*>(kernel), name, grid, block, dynamic_bytes, bytes,
      [](void* self) { (*static_cast<Body*>(self))(); }, &body);
}

// kernel<<<grid, block, dynamic_shared_bytes, stream>>>(arguments...)
template <class... P, class... A>
void launch(void (*kernel)(P...), const char* name, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            cudaStream_t /*stream*/, A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
  launch_with<P...>(kernel, name, grid, block, dynamic_shared_bytes, std::forward<A>(arguments)...);
}

inline void fail_next_launch(cudaError_t error) { machine.fail_next = error; }

}  // namespace cuda_on_cpu

// For tests, through ctypes: the next launch runs nothing and leaves this error; the number of launches so far.
extern "C" __attribute__((visibility("default"), used)) inline void cuda_on_cpu_fail_next_launch(int code) {
  cuda_on_cpu::fail_next_launch(static_cast<cudaError_t>(code));
}
extern "C" __attribute__((visibility("default"), used)) inline unsigned long long cuda_on_cpu_launch_count() {
  return cuda_on_cpu::machine.launches;
}

#pragma GCC visibility pop
