// A step's gradient as a weighted sum over samples, formed where it is read: g = sum_b w_b S_b (+ noise). Host and
// device, no torch, no CUDA headers.
//
// Where Row::samples is not negative, the gradient slot of a row is a stack of that many samples, Row::sample elements
// apart; their weights are the same for every tensor of the step. A sample whose weight is 0 is not read.
#pragma once

#include <cmath>
#include <cstdint>

#include "storage.h"

namespace fca {

struct Samples {
  const double* weights;  // one a sample
  const int64_t* seed;    // of the noise, on the device; null where there is none
  double noise;           // standard deviation of what is added to every element
};

// ---------------------------------------------------------------- noise

struct Philox {
  uint32_t word[4];
};

// Philox4x32-10. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
FCA_INLINE Philox philox(uint64_t key, uint64_t counter, uint64_t stream) {
  Philox x = {{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), static_cast<uint32_t>(stream),
               static_cast<uint32_t>(stream >> 32)}};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = 0xD2511F53ull * x.word[0], q = 0xCD9E8D57ull * x.word[2];
    x = {{static_cast<uint32_t>(q >> 32) ^ x.word[1] ^ k0, static_cast<uint32_t>(q),
          static_cast<uint32_t>(p >> 32) ^ x.word[3] ^ k1, static_cast<uint32_t>(p)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return x;
}

// The standard normal of element i of a tensor: Box-Muller, one pair for two elements, in float64.
FCA_INLINE double standard_normal(int64_t seed, int64_t tensor, int64_t i) {
  const Philox x = philox(static_cast<uint64_t>(seed), static_cast<uint64_t>(i / 2), static_cast<uint64_t>(tensor));
  const double u = (static_cast<double>(x.word[0]) + 1.0) * 0x1p-32;  // (0, 1]
  const double turn = static_cast<double>(x.word[1]) * 0x1p-31;       // [0, 2), in units of pi
  const double size = std::sqrt(-2.0 * std::log(u));
#if defined(__CUDA_ARCH__)
  return size * (i % 2 == 0 ? cospi(turn) : sinpi(turn));
#else
  const double angle = 3.141592653589793 * turn;
  return size * (i % 2 == 0 ? std::cos(angle) : std::sin(angle));
#endif
}

}  // namespace fca
