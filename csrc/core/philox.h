// SPDX-License-Identifier: Apache-2.0
// Philox4x32-7: counter-based random bits (Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011).  Block b of a stream is a function of the key and of b
// alone: the same bits for any thread count, SIMD level or device, and none to be kept for a
// backward pass.
//
// A round is two products of 32 by 32 bits with all 64 bits of the result.  A SIMD lane of 64 bits
// therefore holds a 32-bit word in its low half, which is what the multiplication reads: 8
// instructions a round for one block in every lane, and no shuffles.  Nothing reads the high
// halves.
#pragma once

#include "core/vec.h"
#if !defined(__CUDACC__) && defined(__SSE2__)
#include <immintrin.h>
#endif

PFK_BEGIN

constexpr int kPhiloxRounds = 7;  // the fewest that pass BigCrush; 10 cost dequantize 1.5x
constexpr int kPhiloxHalves = 8;  // 16-bit words of a block

// ---- words: a plain integer, or one in every lane ----------------------------------------------
template <class W>
struct WidePair {
  W high, low;
};

PFK_HD WidePair<uint32_t> multiply_wide(uint32_t a, uint32_t b) {
  const uint64_t p = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(p >> 32), static_cast<uint32_t>(p)};
}

#if !defined(__CUDACC__)
// Several vectors in each step: the rounds of one depend on each other and would leave the
// multipliers idle.  Nanoseconds for a 16-bit word of ten rounds on Zen 3: 0.41 with one vector,
// 0.31 with two, 0.27 with four.
struct Words {
  typedef uint64_t Raw __attribute__((vector_size(kVecBytes)));
  static constexpr int kVectors = 4;
  static constexpr int kLanes = kVecBytes / 8;
  Raw v[kVectors];

  Words() = default;
  PFK_HD explicit Words(uint64_t s) {
    for (Raw& x : v) x = s - Raw{};
  }
};
PFK_HD Words operator^(Words a, Words b) {
  for (int i = 0; i < Words::kVectors; ++i) a.v[i] ^= b.v[i];
  return a;
}

PFK_HD Words::Raw multiply_low(Words::Raw a, Words::Raw b) {
#if PFK_SIMD_LEVEL == 2
  return (Words::Raw)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif PFK_SIMD_LEVEL == 1
  return (Words::Raw)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words::Raw)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}
PFK_HD WidePair<Words> multiply_wide(Words a, Words b) {
  WidePair<Words> r;
  for (int i = 0; i < Words::kVectors; ++i) r.low.v[i] = multiply_low(a.v[i], b.v[i]);
  for (int i = 0; i < Words::kVectors; ++i) r.high.v[i] = r.low.v[i] >> 32;
  return r;
}
#endif

// ---- the generator -----------------------------------------------------------------------------
template <class W>
struct PhiloxBlock {
  W word[4];
};

// The keys of the rounds, broadcast to all lanes once.
template <class W>
struct PhiloxKeys {
  W key[kPhiloxRounds][2];
};
template <class W>
PFK_HD PhiloxKeys<W> philox_keys(uint64_t seed) {
  PhiloxKeys<W> k;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  PFK_UNROLL(7)
  for (int round = 0; round < kPhiloxRounds; ++round) {
    k.key[round][0] = W(k0);
    k.key[round][1] = W(k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return k;
}

template <class W>
PFK_HD PhiloxBlock<W> philox(PhiloxBlock<W> c, const PhiloxKeys<W>& k) {
  PFK_UNROLL(7)
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const WidePair<W> a = multiply_wide(c.word[0], W(0xD2511F53u));
    const WidePair<W> b = multiply_wide(c.word[2], W(0xCD9E8D57u));
    c = {
        {b.high ^ c.word[1] ^ k.key[round][0], b.low, a.high ^ c.word[3] ^ k.key[round][1], a.low}};
  }
  return c;
}

// Block `index` of a stream of the seed.
PFK_HD PhiloxBlock<uint32_t> philox_block(uint64_t index, uint64_t seed, uint64_t stream = 0) {
  const auto low = [](uint64_t x) { return static_cast<uint32_t>(x); };
  return philox<uint32_t>({{low(index), low(index >> 32), low(stream), low(stream >> 32)}},
                          philox_keys<uint32_t>(seed));
}

#if !defined(__CUDACC__)
constexpr int kPhiloxBlocks = Words::kVectors * Words::kLanes;  // that are made at once

// As many blocks, from `first` on.
PFK_HD PhiloxBlock<Words> philox_vectors(uint64_t first, const PhiloxKeys<Words>& keys,
                                         uint64_t stream) {
  Words::Raw lane;
  for (int j = 0; j < Words::kLanes; ++j) lane[j] = j;
  PhiloxBlock<Words> b;
  for (int k = 0; k < Words::kVectors; ++k) {
    b.word[0].v[k] = lane + (first + k * Words::kLanes);
    b.word[1].v[k] = b.word[0].v[k] >> 32;
  }
  b.word[2] = Words(stream);
  b.word[3] = Words(stream >> 32);
  return philox(b, keys);
}

// The words a and b of 32 bits side by side in lanes of 64.
PFK_HD Words::Raw beside(Words::Raw a, Words::Raw b) { return (a & 0xffffffffu) | (b << 32); }

// Blocks first .. first + count - 1, as 16-bit words in order: eight a block.  Writes whole
// vectors, up to philox_padding() words more.
constexpr int philox_padding() { return (kPhiloxBlocks - 1) * kPhiloxHalves; }

static inline void philox_fill(uint64_t first, int64_t count, uint64_t seed, uint16_t* out) {
  using Raw = Words::Raw;
  constexpr int w = Words::kLanes;
  const PhiloxKeys<Words> keys = philox_keys<Words>(seed);
  for (int64_t i = 0; i < count; i += kPhiloxBlocks) {
    const PhiloxBlock<Words> b = philox_vectors(first + i, keys, 0);
    for (int k = 0; k < Words::kVectors; ++k) {
      const Raw a = beside(b.word[0].v[k], b.word[1].v[k]);  // then block by block
      const Raw c = beside(b.word[2].v[k], b.word[3].v[k]);
#if PFK_SIMD_LEVEL == 2
      const Raw r[2] = {__builtin_shuffle(a, c, Raw{0, 8, 1, 9, 2, 10, 3, 11}),
                        __builtin_shuffle(a, c, Raw{4, 12, 5, 13, 6, 14, 7, 15})};
#elif PFK_SIMD_LEVEL == 1
      const Raw r[2] = {__builtin_shuffle(a, c, Raw{0, 4, 1, 5}),
                        __builtin_shuffle(a, c, Raw{2, 6, 3, 7})};
#else
      const Raw r[2] = {__builtin_shuffle(a, c, Raw{0, 2}), __builtin_shuffle(a, c, Raw{1, 3})};
#endif
      memcpy(out + (i + k * w) * kPhiloxHalves, r, sizeof r);
    }
  }
}
#endif

PFK_END
