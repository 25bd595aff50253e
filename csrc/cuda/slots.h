// Reading and writing the tensors of a row: 16 bytes a thread where all of them are aligned alike, else element by
// element, in any dtype and any strides.
#pragma once

#include <type_traits>

#include "device.h"

namespace fca {

// Elements [begin, end) of a row that a block works on, `base` onwards: a tile, of which each thread holds kHeld.
struct Span {
  int64_t base, begin, end;
};

// Addresses come out of a table, so the compiler cannot know that they are global memory: the cache-hinted accesses say
// so. Each byte is used once, by one thread; the L1 is left alone (.cg), while the L2 may hold what the next pass
// reads.
template <typename S, typename T>
__device__ __forceinline__ T load_one(int64_t address, int64_t i) {
  if constexpr (sizeof(S) == 2) {
    return load_as<T>(S{__ldcg(reinterpret_cast<const unsigned short*>(address) + i)});
  } else {
    return load_as<T>(__ldcg(reinterpret_cast<const S*>(address) + i));
  }
}

template <typename S, typename T>
__device__ __forceinline__ void store_one(int64_t address, int64_t i, T x) {
  if constexpr (sizeof(S) == 2) {
    __stcg(reinterpret_cast<unsigned short*>(address) + i, store_as<S>(x).bits);
  } else {
    __stcg(reinterpret_cast<S*>(address) + i, store_as<S>(x));
  }
}

// ---------------------------------------------------------------- 16 bytes at a time

// A thread holds HELD elements in runs of WIDTH; every tensor of the row starts a run on a 16-byte boundary. WHOLE: all
// of the tile lies within the span. Then there is no branch between the loads of a tile, and the compiler issues them
// all before it waits for the first.
template <int WIDTH, int HELD>
struct Runs {
  static constexpr int kHeld = HELD;
  static constexpr int kTile = kHeld * kThreads;

  // Where in the tile the element lies that a thread holds as its j-th.
  static __device__ __forceinline__ int place(int j) {
    return ((j / WIDTH) * kThreads + static_cast<int>(threadIdx.x)) * WIDTH + j % WIDTH;
  }
  static __device__ __forceinline__ bool whole(const Span& span) {
    return span.base >= span.begin && span.base + kTile <= span.end;
  }

  // One run, as it is stored.
  template <typename S>
  struct Words {
    static constexpr int kBytes = WIDTH * sizeof(S);
    using Word = std::conditional_t<kBytes == 8, uint2, uint4>;
    static constexpr int kWords = kBytes / sizeof(Word), kPerWord = sizeof(Word) / sizeof(S);
    static_assert(kBytes % sizeof(Word) == 0, "whole words of 8 or 16 bytes");
    Word word[kWords];

    __device__ __forceinline__ void load(int64_t address) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) word[w] = __ldcg(reinterpret_cast<const Word*>(address) + w);
    }
    __device__ __forceinline__ void store(int64_t address) const {
#pragma unroll
      for (int w = 0; w < kWords; ++w) __stcg(reinterpret_cast<Word*>(address) + w, word[w]);
    }
    template <typename T>
    __device__ __forceinline__ T at(int j) const {
      S stored;
      memcpy(&stored, reinterpret_cast<const char*>(&word[j / kPerWord]) + (j % kPerWord) * sizeof(S), sizeof(S));
      return load_as<T>(stored);
    }
    template <typename T>
    __device__ __forceinline__ void put(int j, T x) {
      const S stored = store_as<S>(x);
      memcpy(reinterpret_cast<char*>(&word[j / kPerWord]) + (j % kPerWord) * sizeof(S), &stored, sizeof(S));
    }
  };

  template <bool WHOLE, typename S, typename T>
  static __device__ __forceinline__ void load(int64_t address, const Span& span, T (&held)[kHeld]) {
    // 16-byte words, if a run has whole ones; registers and speed have been measured with these.
    constexpr int kWords = WIDTH * sizeof(S) / 16, kPerWord = 16 / sizeof(S);
#pragma unroll
    for (int run = 0; run < kHeld / WIDTH; ++run) {
      const int64_t i = span.base + place(run * WIDTH);
      if (WHOLE || (i >= span.begin && i + WIDTH <= span.end)) {
        if constexpr (kWords > 0) {
          const uint4* source = reinterpret_cast<const uint4*>(reinterpret_cast<const S*>(address) + i);
          uint4 words[kWords];
#pragma unroll
          for (int w = 0; w < kWords; ++w) words[w] = __ldcg(source + w);
#pragma unroll
          for (int j = 0; j < WIDTH; ++j) {
            S stored;
            memcpy(&stored, reinterpret_cast<const char*>(&words[j / kPerWord]) + (j % kPerWord) * sizeof(S),
                   sizeof(S));
            held[run * WIDTH + j] = load_as<T>(stored);
          }
        } else {
          Words<S> words;
          words.load(address + i * static_cast<int64_t>(sizeof(S)));
#pragma unroll
          for (int j = 0; j < WIDTH; ++j) held[run * WIDTH + j] = words.template at<T>(j);
        }
      } else {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
          const bool inside = i + j >= span.begin && i + j < span.end;
          held[run * WIDTH + j] = inside ? load_one<S, T>(address, i + j) : T(0);
        }
      }
    }
  }

  template <bool WHOLE, typename S, typename T>
  static __device__ __forceinline__ void store(int64_t address, const Span& span, const T (&held)[kHeld]) {
    constexpr int kWords = WIDTH * sizeof(S) / 16, kPerWord = 16 / sizeof(S);
#pragma unroll
    for (int run = 0; run < kHeld / WIDTH; ++run) {
      const int64_t i = span.base + place(run * WIDTH);
      if (WHOLE || (i >= span.begin && i + WIDTH <= span.end)) {
        if constexpr (kWords > 0) {
          uint4 words[kWords];
#pragma unroll
          for (int j = 0; j < WIDTH; ++j) {
            const S stored = store_as<S>(held[run * WIDTH + j]);
            memcpy(reinterpret_cast<char*>(&words[j / kPerWord]) + (j % kPerWord) * sizeof(S), &stored, sizeof(S));
          }
          uint4* target = reinterpret_cast<uint4*>(reinterpret_cast<S*>(address) + i);
#pragma unroll
          for (int w = 0; w < kWords; ++w) __stcg(target + w, words[w]);
        } else {
          Words<S> words;
#pragma unroll
          for (int j = 0; j < WIDTH; ++j) words.template put<T>(j, held[run * WIDTH + j]);
          words.store(address + i * static_cast<int64_t>(sizeof(S)));
        }
      } else {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
          if (i + j >= span.begin && i + j < span.end) store_one<S, T>(address, i + j, held[run * WIDTH + j]);
        }
      }
    }
  }
};

// ---------------------------------------------------------------- one element at a time

// A thread holds one element; dtype and strides are the row's own, known only at run time.
struct Singles {
  static constexpr int kHeld = 1;
  static constexpr int kTile = kThreads;

  static __device__ __forceinline__ int place(int) { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ bool whole(const Span&) { return false; }  // checks cost nothing beside the rest

  // Offset of the i-th element in row-major order. `record`: (dims, sizes, strides of each slot), null if contiguous.
  static __device__ __forceinline__ int64_t offset(const int64_t* record, int slot, int64_t i) {
    if (record == nullptr) return i;
    const int64_t dims = record[0];
    const int64_t* const sizes = record + 1;
    const int64_t* const strides = sizes + dims * (1 + slot);
    int64_t offset = 0;
#pragma unroll 1
    for (int64_t d = dims - 1; d >= 0; --d) {
      offset += i % sizes[d] * strides[d];
      i /= sizes[d];
    }
    return offset;
  }

  template <typename T>
  static __device__ __forceinline__ void load(DType dtype, int64_t address, const int64_t* record, int slot,
                                              const Span& span, T (&held)[kHeld]) {
    const int64_t i = span.base + place(0);
    held[0] = T(0);
    if (i < span.begin || i >= span.end) return;
    const int64_t at = offset(record, slot, i);
    if (dtype == DType::F32) {
      held[0] = load_one<float, T>(address, at);
    } else if constexpr (sizeof(T) == 8) {  // a float64 parameter has no 16-bit slot
      held[0] = load_one<double, T>(address, at);
    } else {
      held[0] = dtype == DType::BF16 ? load_one<BFloat16, T>(address, at) : load_one<Float16, T>(address, at);
    }
  }

  template <typename T>
  static __device__ __forceinline__ void store(DType dtype, int64_t address, const int64_t* record, int slot,
                                               const Span& span, const T (&held)[kHeld]) {
    const int64_t i = span.base + place(0);
    if (i < span.begin || i >= span.end) return;
    const int64_t at = offset(record, slot, i);
    if (dtype == DType::F32) {
      store_one<float, T>(address, at, held[0]);
    } else if constexpr (sizeof(T) == 8) {
      store_one<double, T>(address, at, held[0]);
    } else if (dtype == DType::BF16) {
      store_one<BFloat16, T>(address, at, held[0]);
    } else {
      store_one<Float16, T>(address, at, held[0]);
    }
  }
};

}  // namespace fca
