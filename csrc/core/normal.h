// SPDX-License-Identifier: Apache-2.0
// Standard normal numbers from Philox words, two from two words of 32 bits (Box and Muller 1958):
//
//   sqrt(-2 log u) (cos 2 pi v, sin 2 pi v),
//   u = (w + 1/2) / 2^31 of the upper 31 bits of one word,  v = w / 2^32 of the other.
//
// The angle is reduced to an eighth of a turn in integers, so that sine and cosine are as accurate
// as their polynomials.  No number is larger than 6.7: of 10^11 normal ones two or three would be.
#pragma once

#include "core/math.h"
#include "core/philox.h"

PFK_BEGIN

constexpr int kNormals = 4;  // of a Philox block

// ---- words beside numbers of type V: as wide, in as many lanes ---------------------------------
template <class V>
struct WordOf {
  using type = uint32_t;
};
template <class V>
using Word = typename WordOf<V>::type;

PFK_HD bool has_bit(uint32_t word, int bit) { return (word & bit) != 0; }
// The signed number that a word holds, below 2^31 in magnitude.
PFK_HD void convert(uint32_t word, float& x) { x = static_cast<float>(static_cast<int32_t>(word)); }
PFK_HD void convert(uint32_t word, double& x) {
  x = static_cast<double>(static_cast<int32_t>(word));
}

#if !defined(__CUDACC__)
template <class T>
struct WordOf<Vec<T>> {
  using type = typename Vec<T>::RawWord;
};
PFK_HD Mask<float> has_bit(Word<Vec<float>> word, int bit) { return {(word & bit) != 0}; }
PFK_HD Mask<double> has_bit(Word<Vec<double>> word, int bit) { return {(word & bit) != 0}; }
PFK_HD void convert(Word<Vec<float>> word, Vec<float>& x) {
  x = __builtin_convertvector((Vec<float>::RawInt)word, Vec<float>::Raw);
}
PFK_HD void convert(Word<Vec<double>> word, Vec<double>& x) {  // few processors do it by themselves
  const Vec<double> shift = Float<double>::kRound;
  x = from_bits<double>(plus_bits<double>((Vec<double>::RawInt)word, bits(shift))) - shift;
}
#endif

// ---- two numbers from two words ----------------------------------------------------------------
template <class V>
struct NormalPair {
  V first, second;
};

template <class V>
PFK_HD NormalPair<V> box_muller(Word<V> radius, Word<V> angle) {
  using T = Lane<V>;
  V u, rest;
  convert((radius >> 1) & 0x7fffffff, u);
  u = (u + V(T(0.5))) * V(T(0x1p-31));  // from 2^-32 to 1
  const V length = sqrt_(V(T(-2)) * log_normal(u));
  const Word<V> quarter = (angle + (1 << 29)) >> 30;  // of a turn, rounded
  convert(angle - (quarter << 30), rest);
  const SinCos<V> of_rest = sincos_small(rest * V(T(0x1p-31 * 3.14159265358979323846)));
  const auto odd = has_bit(quarter, 1);
  const V c = select(odd, of_rest.sin, of_rest.cos), s = select(odd, of_rest.cos, of_rest.sin);
  return {length * select(has_bit(quarter + 1, 2), -c, c),
          length * select(has_bit(quarter, 2), -s, s)};
}

// ---- the numbers of many blocks ----------------------------------------------------------------
#if !defined(__CUDACC__)
// Those of one vector of blocks, each of whose words is a lane of 64 bits, block by block.
PFK_HD void store_normals(const Words::Raw (&word)[4], float* out) {
  using V = Vec<float>;
  const NormalPair<V> z =
      box_muller<V>((Word<V>)beside(word[0], word[2]), (Word<V>)beside(word[1], word[3]));
#if PFK_SIMD_LEVEL == 2
  const V::RawInt low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#elif PFK_SIMD_LEVEL == 1
  const V::RawInt low = {0, 8, 1, 9, 2, 10, 3, 11};
#else
  const V::RawInt low = {0, 4, 1, 5};
#endif
  V(__builtin_shuffle(z.first.v, z.second.v, low)).store(out);
  V(__builtin_shuffle(z.first.v, z.second.v, low + V::kLanes / 2)).store(out + V::kLanes);
}
PFK_HD void store_normals(const Words::Raw (&word)[4], double* out) {
  using V = Vec<double>;
  for (int pair = 0; pair < kNormals; pair += 2) {
    const NormalPair<V> z =
        box_muller<V>((Word<V>)(word[pair] & 0xffffffffu), (Word<V>)(word[pair + 1] & 0xffffffffu));
    for (int lane = 0; lane < V::kLanes; ++lane) {
      out[lane * kNormals + pair] = z.first.v[lane];
      out[lane * kNormals + pair + 1] = z.second.v[lane];
    }
  }
}

// Those of blocks first .. first + count - 1 of a stream, four a block.  Writes whole vectors, up
// to kNormalPadding numbers more.
constexpr int kNormalPadding = (kPhiloxBlocks - 1) * kNormals;

template <class T>
static inline void normal_fill(uint64_t first, int64_t count, uint64_t seed, uint64_t stream,
                               T* out) {
  const PhiloxKeys<Words> keys = philox_keys<Words>(seed);
  for (int64_t i = 0; i < count; i += kPhiloxBlocks) {
    const PhiloxBlock<Words> b = philox_vectors(first + i, keys, stream);
    for (int k = 0; k < Words::kVectors; ++k) {
      const Words::Raw word[4] = {b.word[0].v[k], b.word[1].v[k], b.word[2].v[k], b.word[3].v[k]};
      store_normals(word, out + (i + k * Words::kLanes) * kNormals);
    }
  }
}
#endif

PFK_END
