// The memory ceiling of one AdamW step: read p, g, m, v; write p, m, v; 28 bytes an element, next to no
// arithmetic. stream.py builds it and takes the fastest variant below in the same run as the optimizers it is
// compared with. All variants move the same bytes; they differ in what a CPU can gain from: how far ahead
// lines are asked for, whether the range is cut into one piece a thread or dealt out in chunks, and stores
// that bypass the cache. (Prefetching whole pages of one array at a time was tried as well and was always
// slower.)

#include <cstdint>

#include <omp.h>

#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#define HAS_BYPASS 1
#else
#define HAS_BYPASS 0
#endif

namespace {

constexpr int64_t LINE = 16;                 // floats in a 64-byte cache line
constexpr int64_t CYCLIC_CHUNK = 32 * 1024;  // 128 KiB of each array: many pages, small against the whole

enum class Store { PLAIN, BYPASS };
enum class Cut { CONTIGUOUS, CYCLIC };

// The written arrays converge to g: no overflow and no denormals, however often the stream is run.
inline void line_plain(float* __restrict p, const float* __restrict g, float* __restrict m,
                       float* __restrict v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    p[i] = 0.5f * (p[i] + g[i]);
    m[i] = 0.5f * (m[i] + g[i]);
    v[i] = 0.5f * (v[i] + g[i]);
  }
}

// One whole line; the arrays are 64-byte aligned (stream_run checks) and so is every chunk of them.
inline void line_bypass(float* p, const float* g, float* m, float* v) {
#if defined(__AVX512F__)
  const __m512 half = _mm512_set1_ps(0.5f), grad = _mm512_load_ps(g);
  _mm512_stream_ps(p, _mm512_mul_ps(half, _mm512_add_ps(_mm512_load_ps(p), grad)));
  _mm512_stream_ps(m, _mm512_mul_ps(half, _mm512_add_ps(_mm512_load_ps(m), grad)));
  _mm512_stream_ps(v, _mm512_mul_ps(half, _mm512_add_ps(_mm512_load_ps(v), grad)));
#elif HAS_BYPASS
  const __m256 half = _mm256_set1_ps(0.5f);
  for (int64_t i = 0; i < LINE; i += 8) {
    const __m256 grad = _mm256_load_ps(g + i);
    _mm256_stream_ps(p + i, _mm256_mul_ps(half, _mm256_add_ps(_mm256_load_ps(p + i), grad)));
    _mm256_stream_ps(m + i, _mm256_mul_ps(half, _mm256_add_ps(_mm256_load_ps(m + i), grad)));
    _mm256_stream_ps(v + i, _mm256_mul_ps(half, _mm256_add_ps(_mm256_load_ps(v + i), grad)));
  }
#else
  line_plain(p, g, m, v, LINE);
#endif
}

template <Store STORE, int64_t AHEAD>
void range(float* p, const float* g, float* m, float* v, int64_t n) {
  int64_t i = 0;
  for (; i + LINE <= n; i += LINE) {
    if constexpr (AHEAD > 0) {  // runs past the end of the arrays: a prefetch never faults
      __builtin_prefetch(p + i + AHEAD * LINE, 1);
      __builtin_prefetch(g + i + AHEAD * LINE, 0);
      __builtin_prefetch(m + i + AHEAD * LINE, 1);
      __builtin_prefetch(v + i + AHEAD * LINE, 1);
    }
    if constexpr (STORE == Store::BYPASS) {
      line_bypass(p + i, g + i, m + i, v + i);
    } else {
      line_plain(p + i, g + i, m + i, v + i, LINE);
    }
  }
  line_plain(p + i, g + i, m + i, v + i, n - i);
#if HAS_BYPASS
  if constexpr (STORE == Store::BYPASS) _mm_sfence();
#endif
}

template <Store STORE, int64_t AHEAD, Cut CUT>
void stream(float* p, const float* g, float* m, float* v, int64_t n, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t share = CUT == Cut::CONTIGUOUS ? (n / team / LINE + 1) * LINE : CYCLIC_CHUNK;
    for (int64_t start = me * share; start < n; start += team * share) {
      const int64_t length = start + share < n ? share : n - start;
      range<STORE, AHEAD>(p + start, g + start, m + start, v + start, length);
    }
  }
}

// A thread's share in four runs side by side: a core keeps more pages in flight than one run has.
float read_range(const float* x, int64_t n) {
  const int64_t quarter = n / 4 / LINE * LINE;
  float sums[LINE] = {};
  for (int64_t i = 0; i + LINE <= quarter; i += LINE) {
    for (int64_t run = 0; run < 4; ++run) {
      const float* line = x + run * quarter + i;
      __builtin_prefetch(line + 16 * LINE);
      for (int64_t j = 0; j < LINE; ++j) sums[j] += line[j];
    }
  }
  for (int64_t i = 4 * quarter; i < n; ++i) sums[0] += x[i];
  float sum = 0;
  for (int64_t j = 0; j < LINE; ++j) sum += sums[j];
  return sum;
}

struct Variant {
  const char* name;
  void (*run)(float*, const float*, float*, float*, int64_t, int);
  bool bypass;
};

const Variant VARIANTS[] = {
    {"plain stores, hardware prefetch", stream<Store::PLAIN, 0, Cut::CONTIGUOUS>, false},
    {"plain stores, 8 lines ahead", stream<Store::PLAIN, 8, Cut::CONTIGUOUS>, false},
    {"plain stores, 32 lines ahead", stream<Store::PLAIN, 32, Cut::CONTIGUOUS>, false},
    {"plain stores, hardware prefetch, chunks dealt out", stream<Store::PLAIN, 0, Cut::CYCLIC>, false},
    {"plain stores, 32 lines ahead, chunks dealt out", stream<Store::PLAIN, 32, Cut::CYCLIC>, false},
    {"bypassing stores, hardware prefetch", stream<Store::BYPASS, 0, Cut::CONTIGUOUS>, true},
    {"bypassing stores, 32 lines ahead", stream<Store::BYPASS, 32, Cut::CONTIGUOUS>, true},
    {"bypassing stores, 32 lines ahead, chunks dealt out", stream<Store::BYPASS, 32, Cut::CYCLIC>, true},
};
constexpr int COUNT = sizeof(VARIANTS) / sizeof(VARIANTS[0]);

}  // namespace

extern "C" {

int stream_variants() { return COUNT; }

// Reads n floats and writes nothing.
float stream_read(const float* x, int64_t n, int threads) {
  float sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num(), share = (n / team / LINE + 1) * LINE;
    const int64_t start = me * share, length = start + share < n ? share : n - start;
    if (length > 0) sum += read_range(x + start, length);
  }
  return sum;
}

const char* stream_name(int variant) {
  return variant >= 0 && variant < COUNT ? VARIANTS[variant].name : nullptr;
}

// 0: done. 1: this variant needs an instruction set or an alignment that is not there; nothing was touched.
int stream_run(int variant, float* p, const float* g, float* m, float* v, int64_t n, int threads) {
  if (variant < 0 || variant >= COUNT || threads < 1) return 1;
  const auto addresses = reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(g) |
                         reinterpret_cast<uintptr_t>(m) | reinterpret_cast<uintptr_t>(v);
  if (VARIANTS[variant].bypass && (!HAS_BYPASS || addresses % 64 != 0)) return 1;
  VARIANTS[variant].run(p, g, m, v, n, threads);
  return 0;
}

}  // extern "C"
