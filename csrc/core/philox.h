// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10: counter-based random bits (Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011).  Block b of a stream is a function of the key and of b
// alone: the same bits for any thread count, SIMD level or device, and none to be kept for a
// backward pass.
//
// A round is two 32 x 32 -> 64 bit products.  A SIMD lane therefore holds a 32-bit word in the low
// half of 64 bits, where the multiplier reads it and leaves the product in place: 8 instructions a
// round for one block in every lane, no shuffles.  The high halves carry rubbish, which no product
// reads.
#pragma once

#include "core/vec.h"
#if !defined(__CUDACC__) && defined(__SSE2__)
#include <immintrin.h>
#endif

PFK_BEGIN

constexpr int kPhiloxRounds = 10;
constexpr int kPhiloxHalves = 8;  // 16-bit words of a block

// ---- words: a plain integer, or one in every lane
// ----------------------------------------------------------------
template <class W>
struct WidePair {
  W high, low;
};

PFK_HD WidePair<uint32_t> multiply_wide(uint32_t a, uint32_t b) {
  const uint64_t p = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(p >> 32), static_cast<uint32_t>(p)};
}

#if !defined(__CUDACC__)
struct Words {
  typedef uint64_t Raw __attribute__((vector_size(kVecBytes)));
  static constexpr int kLanes = kVecBytes / 8;
  Raw v;

  Words() = default;
  PFK_HD Words(Raw r) : v(r) {}
  PFK_HD explicit Words(uint64_t s) : v(s - Raw{}) {}
};
PFK_HD Words operator^(Words a, Words b) { return a.v ^ b.v; }

PFK_HD WidePair<Words> multiply_wide(Words a, Words b) {
#if PFK_SIMD_LEVEL == 2
  const Words p = (Words::Raw)_mm512_maskz_mul_epu32(0xff, (__m512i)a.v, (__m512i)b.v);
#elif PFK_SIMD_LEVEL == 1
  const Words p = (Words::Raw)_mm256_mul_epu32((__m256i)a.v, (__m256i)b.v);
#elif defined(__SSE2__)
  const Words p = (Words::Raw)_mm_mul_epu32((__m128i)a.v, (__m128i)b.v);
#else
  const Words p = (a.v & 0xffffffffu) * (b.v & 0xffffffffu);
#endif
  return {Words(p.v >> 32), p};
}
#endif

// ---- the generator
// -------------------------------------------------------------------------------------------------
template <class W>
struct PhiloxBlock {
  W word[4];
};

template <class W>
PFK_HD PhiloxBlock<W> philox(PhiloxBlock<W> c, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const WidePair<W> a = multiply_wide(c.word[0], W(0xD2511F53u));
    const WidePair<W> b = multiply_wide(c.word[2], W(0xCD9E8D57u));
    c = {{b.high ^ c.word[1] ^ W(k0), b.low, a.high ^ c.word[3] ^ W(k1), a.low}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Block `index` of the stream.
PFK_HD PhiloxBlock<uint32_t> philox_block(uint64_t index, uint64_t seed) {
  const uint32_t low = static_cast<uint32_t>(index), high = static_cast<uint32_t>(index >> 32);
  return philox<uint32_t>({{low, high, 0, 0}}, seed);
}

#if !defined(__CUDACC__)
// Blocks first .. first + count - 1, as 16-bit words in order: eight a block.  Writes whole
// vectors, up to philox_padding() words more.
constexpr int philox_padding() { return (2 * Words::kLanes - 1) * kPhiloxHalves; }

static inline void philox_fill(uint64_t first, int64_t count, uint64_t seed, uint16_t* out) {
  constexpr int w = Words::kLanes;
  Words::Raw lane;
  for (int j = 0; j < w; ++j) lane[j] = j;
  for (int64_t i = 0; i < count; i += 2 * w) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {  // two independent chains hide each other's latency
      const Words::Raw index = lane + (first + i + half * w);
      PhiloxBlock<Words> b = philox<Words>({{index, index >> 32, Words(0), Words(0)}}, seed);
      // words 0 and 1, and 2 and 3, side by side; then block by block
      const Words::Raw a = (b.word[0].v & 0xffffffffu) | (b.word[1].v << 32);
      const Words::Raw c = (b.word[2].v & 0xffffffffu) | (b.word[3].v << 32);
      uint64_t* to = reinterpret_cast<uint64_t*>(out + (i + half * w) * kPhiloxHalves);
      Words::Raw r[2];
#if PFK_SIMD_LEVEL == 2
      r[0] = __builtin_shuffle(a, c, (Words::Raw){0, 8, 1, 9, 2, 10, 3, 11});
      r[1] = __builtin_shuffle(a, c, (Words::Raw){4, 12, 5, 13, 6, 14, 7, 15});
#elif PFK_SIMD_LEVEL == 1
      r[0] = __builtin_shuffle(a, c, (Words::Raw){0, 4, 1, 5});
      r[1] = __builtin_shuffle(a, c, (Words::Raw){2, 6, 3, 7});
#else
      r[0] = __builtin_shuffle(a, c, (Words::Raw){0, 2});
      r[1] = __builtin_shuffle(a, c, (Words::Raw){1, 3});
#endif
      memcpy(to, r, sizeof r);
    }
  }
}
#endif

PFK_END
