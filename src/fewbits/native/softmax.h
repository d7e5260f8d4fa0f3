// Softmax between two products of 64 x 64, for AVX-512 with BF16 and for AMX: each file compiles its own.
#pragma once
#include <immintrin.h>

#include "kernel.h"

namespace fewbits {
namespace {

using Floats = __m512;

// To 2^-18 of the result; 0 below 2^-149, NaN of NaN.
inline Floats exp2(Floats x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200), x);
  const Floats n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats f = _mm512_sub_ps(x, n);
  Floats y = _mm512_set1_ps(0.0013333558f);
  constexpr float MORE[] = {0.0096181291f, 0.0555041087f, 0.2402265070f, 0.6931471806f, 1.0f};
  for (float c : MORE)
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

// `add_product`: c (64, 64), rows `stride` apart, plus a (64, count) times b (count, 64).
template <void add_product(const uint32_t *a, const uint32_t *b, int64_t count, float *c, int64_t stride)>
void attend(const uint32_t *queries, const Keys &keys, float factor, int64_t first, int64_t seen, bool causal,
            float *result, float *sums) {
  alignas(64) float scores[SQUARE * SQUARE], largest[SQUARE];
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
}

}  // namespace
}  // namespace fewbits
