// Products of bfloat16 summed in float32, with AVX512-BF16: two products and two sums a lane at a time.
#include <immintrin.h>

#include "attend.h"

namespace fewbits {
namespace {

inline __m512bh pairs(const uint32_t *at) { return (__m512bh)_mm512_loadu_si512(at); }
inline __m512bh all(uint32_t pair) { return (__m512bh)_mm512_set1_epi32(int32_t(pair)); }

// result (64, 64) = the sum over `count` pairs of rows of a, (count, 64), times those of b.
void gram_tile(const uint32_t *a, const uint32_t *b, int64_t count, float *result) {
  constexpr int CHUNK_PAIRS = 64;  // of both: they stay in the first cache
  std::memset(result, 0, SQUARE * SQUARE * sizeof(float));
  for (int64_t first = 0; first < count; first += CHUNK_PAIRS) {
    const int64_t last = first + CHUNK_PAIRS < count ? first + CHUNK_PAIRS : count;
    for (int i = 0; i < SQUARE; i += 4) {
      Floats sums[4][4];
      for (int k = 0; k < 4; k++)
        for (int v = 0; v < 4; v++) sums[k][v] = _mm512_setzero_ps();
      for (int64_t p = first; p < last; p++) {
        __m512bh right[4];
        for (int v = 0; v < 4; v++) right[v] = pairs(b + p * SQUARE + 16 * v);
        for (int k = 0; k < 4; k++) {
          const __m512bh left = all(a[p * SQUARE + i + k]);
          for (int v = 0; v < 4; v++) sums[k][v] = _mm512_dpbf16_ps(sums[k][v], left, right[v]);
        }
      }
      for (int k = 0; k < 4; k++)
        for (int v = 0; v < 4; v++) {
          float *to = result + (i + k) * SQUARE + 16 * v;
          _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sums[k][v]));
        }
    }
  }
}

// c (64, 64), rows `stride` apart, plus a (64, count) times b (count, 64): pairs along what is summed.
void add_product(const uint32_t *a, const uint32_t *b, int64_t count, float *c, int64_t stride) {
  for (int i = 0; i < SQUARE; i += 4) {
    Floats sums[4][4];
    for (int k = 0; k < 4; k++)
      for (int v = 0; v < 4; v++) sums[k][v] = _mm512_loadu_ps(c + (i + k) * stride + 16 * v);
    for (int64_t p = 0; p < count; p++) {
      __m512bh right[4];
      for (int v = 0; v < 4; v++) right[v] = pairs(b + p * SQUARE + 16 * v);
      for (int k = 0; k < 4; k++) {
        const __m512bh left = all(a[(i + k) * count + p]);
        for (int v = 0; v < 4; v++) sums[k][v] = _mm512_dpbf16_ps(sums[k][v], left, right[v]);
      }
    }
    for (int k = 0; k < 4; k++)
      for (int v = 0; v < 4; v++) _mm512_storeu_ps(c + (i + k) * stride + 16 * v, sums[k][v]);
  }
}

}  // namespace

const Bf16 *avx512_bf16() {
  static const Bf16 found{1, nullptr, gram_tile, pack_keys, pack_values, attend<add_product>};
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
  return runs ? &found : nullptr;
}

}  // namespace fewbits
