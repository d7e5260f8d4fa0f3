// Attention in squares of 64, for AVX-512 with BF16 and for AMX: each file compiles its own.
#pragma once
#include <immintrin.h>

#include "kernel.h"

namespace fewbits {
namespace {

using Floats = __m512;

constexpr int SIDE = 16;  // numbers of 32 bits in a vector

// The first n of 32 numbers, then zeros.
inline __m512i load_some(const uint16_t *from, int64_t n) {
  return _mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32(0) : n <= 0 ? 0 : __mmask32((1u << n) - 1), from);
}

// The transpose of 16 x 16 numbers of 32 bits, its rows `stride` apart.
inline void transpose(__m512i *r, uint32_t *to, int64_t stride) {
  __m512i s[SIDE];
  for (int i = 0; i < SIDE; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < SIDE; i += 4)
    for (int k = 0; k < 2; k++) {
      r[i + 2 * k] = _mm512_unpacklo_epi64(s[i + k], s[i + k + 2]);
      r[i + 2 * k + 1] = _mm512_unpackhi_epi64(s[i + k], s[i + k + 2]);
    }
  for (int i = 0; i < SIDE; i += 8)
    for (int k = 0; k < 4; k++) {
      s[i + k] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0x88);
      s[i + k + 4] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0xdd);
    }
  for (int k = 0; k < 8; k++) {
    const __m512i low = _mm512_shuffle_i32x4(s[k], s[k + 8], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(s[k], s[k + 8], 0xdd);
    _mm512_storeu_si512(to + k * stride, low);
    _mm512_storeu_si512(to + (k + 8) * stride, high);
  }
}

// Keys -> (blocks, pairs, 64).
void pack_keys(const fewbits_attention &a, const uint16_t *k, int64_t pairs, uint32_t *to) {
  alignas(64) uint32_t turned[SIDE * SIDE];
  for (int64_t from = 0; from < a.keys; from += SQUARE, to += pairs * SQUARE)
    for (int64_t p = 0; p < pairs; p += SIDE)
      for (int64_t i = 0; i < SQUARE; i += SIDE) {
        __m512i rows[SIDE];
        for (int64_t l = 0; l < SIDE; l++) {
          const int64_t key = from + i + l;
          rows[l] = load_some(k + (key < a.keys ? key : 0) * a.k_strides[2] + 2 * p, key < a.keys ? a.width - 2 * p : 0);
        }
        const bool whole = p + SIDE <= pairs;
        transpose(rows, whole ? to + p * SQUARE + i : turned, whole ? SQUARE : SIDE);
        for (int64_t l = 0; !whole && l < pairs - p; l++)
          std::memcpy(to + (p + l) * SQUARE + i, turned + l * SIDE, SIDE * sizeof(uint32_t));
      }
}

// Values -> (blocks, strips, 32, 64).
void pack_values(const fewbits_attention &a, const uint16_t *v, uint32_t *to) {
  for (int64_t from = 0; from < a.keys; from += SQUARE)
    for (int64_t left = 0; left < a.value_width; left += SQUARE)
      for (int64_t token = from; token < from + SQUARE; token += 2, to += SQUARE)
        for (int64_t i = 0; i < SQUARE; i += SIDE) {
          const int64_t n = a.value_width - left - i;
          __m512i both = _mm512_setzero_si512();
          for (int64_t odd = 0; odd < 2; odd++) {
            const uint16_t *value = v + (token + odd < a.keys ? token + odd : 0) * a.v_strides[2] + left + i;
            const __m512i some = load_some(value, token + odd >= a.keys ? 0 : n < SIDE ? n : SIDE);
            const __m512i wide = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(some));
            both = _mm512_or_si512(both, odd ? _mm512_slli_epi32(wide, 16) : wide);
          }
          _mm512_storeu_si512(to + i, both);
        }
}

// To 2^-18 of the result; 0 below 2^-126 (smaller numbers take the processor a hundred times as long), NaN of NaN.
inline Floats exp2(Floats x) {
  const Floats least = _mm512_set1_ps(-126);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
  x = _mm512_max_ps(least, x);
  const Floats n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats f = _mm512_sub_ps(x, n);
  Floats y = _mm512_set1_ps(0.0013333558f);
  constexpr float MORE[] = {0.0096181291f, 0.0555041087f, 0.2402265070f, 0.6931471806f, 1.0f};
  for (float c : MORE)
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_maskz_scalef_ps(normal, y, n);
}

// `add_product`: c (64, 64), rows `stride` apart, plus a (64, count) times b (count, 64).
template <void add_product(const uint32_t *a, const uint32_t *b, int64_t count, float *c, int64_t stride)>
void attend(const uint32_t *queries, const Keys &keys, float factor, int64_t first, int64_t seen, bool causal,
            float *result, const Rows &to) {
  alignas(64) float scores[SQUARE * SQUARE], largest[SQUARE], sums[SQUARE];
  alignas(64) uint16_t weights[SQUARE * SQUARE];
  const int64_t width = keys.strips * SQUARE;
  for (int i = 0; i < SQUARE; i++) largest[i] = -__builtin_inff(), sums[i] = 0;
  std::memset(result, 0, SQUARE * width * sizeof(float));
  const int64_t all_keys = causal && first + SQUARE < seen ? first + SQUARE : seen;
  for (int64_t from = 0; from < all_keys; from += SQUARE) {
    std::memset(scores, 0, sizeof(scores));
    add_product(queries, keys.keys + from * keys.pairs, keys.pairs, scores, SQUARE);
    for (int i = 0; i < SQUARE; i++) {
      const int64_t last = causal && first + i + 1 < seen ? first + i + 1 : seen;  // keys that are seen
      Floats x[4], most = _mm512_set1_ps(largest[i]);
      for (int v = 0; v < 4; v++) {
        const int64_t left = last - from - 16 * v;
        const __mmask16 own = left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
        x[v] = _mm512_mask_mul_ps(_mm512_set1_ps(-__builtin_inff()), own,
                                  _mm512_load_ps(scores + i * SQUARE + 16 * v), _mm512_set1_ps(factor));
        most = _mm512_max_ps(most, x[v]);
      }
      const float now = _mm512_reduce_max_ps(most);
      Floats sum = _mm512_setzero_ps();
      for (int v = 0; v < 4; v++) {
        const Floats p = exp2(_mm512_sub_ps(x[v], _mm512_set1_ps(now)));
        sum = _mm512_add_ps(sum, p);
        _mm256_store_si256(reinterpret_cast<__m256i *>(weights + i * SQUARE + 16 * v),
                           (__m256i)_mm512_cvtneps_pbh(p));
      }
      if (now > largest[i]) {
        const Floats less = exp2(_mm512_set1_ps(largest[i] - now));
        for (int64_t j = 0; from > 0 && j < width; j += 16) {
          float *to = result + i * width + j;
          _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), less));
        }
        sums[i] *= _mm512_cvtss_f32(less);
        largest[i] = now;
      }
      sums[i] += _mm512_reduce_add_ps(sum);
    }
    const uint32_t *values = keys.values + from / 2 * width;
    for (int64_t strip = 0; strip < keys.strips; strip++)
      add_product(reinterpret_cast<const uint32_t *>(weights), values + strip * SQUARE * SQUARE / 2, SQUARE / 2,
                  result + strip * SQUARE, width);
  }
  for (int64_t i = 0; i < to.n; i++) {
    const Floats share = _mm512_set1_ps(1 / sums[i]);
    for (int64_t j = 0; j < to.columns; j += SIDE) {
      const int64_t left = to.columns - j;
      const __m256i done = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(result + i * width + j), share));
      _mm256_mask_storeu_epi16(to.data + i * to.stride + j, left >= SIDE ? 0xffff : __mmask16((1u << left) - 1), done);
    }
  }
}

}  // namespace
}  // namespace fewbits
