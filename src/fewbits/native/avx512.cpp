// AVX-512 with VNNI.
#include "avx512.h"
#include "columns.h"
#include "grid.h"
#include "viterbi.h"

namespace fewbits {
namespace {

template <class Mode, int MOST>
void product(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  if (w.zero_type == FEWBITS_TRELLIS) return product_of<Mode, MOST, LookedUp<Mode>>(w, block, x, result);
  switch (w.bits) {
    case 2: return product_of<Mode, MOST, Stored<Mode, 2>>(w, block, x, result);
    case 3: return product_of<Mode, MOST, Stored<Mode, 3>>(w, block, x, result);
    case 4: return product_of<Mode, MOST, Stored<Mode, 4>>(w, block, x, result);
    default: return product_of<Mode, MOST, Stored<Mode, 8>>(w, block, x, result);
  }
}

void product8(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  if (x.look_up && avx512vbmi()) return avx512vbmi()->product8(w, block, x, result);
  if (w.group == CHUNK) return product<Eight, 1>(w, block, x, result);
  product<Eight, SUMMED>(w, block, x, result);
}

void product16(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  if (x.look_up && avx512vbmi()) return avx512vbmi()->product16(w, block, x, result);
  if (w.zero_type == FEWBITS_TABLE) return product_of<Table, 1, Stored<Table, 4>>(w, block, x, result);
  if (w.group == CHUNK) return product<Sixteen, 1>(w, block, x, result);
  product<Sixteen, SUMMED>(w, block, x, result);
}

// Of bytes: fewer instructions take codes out of vectors, which is most of the work for few rows.
template <int MOST>
void product_of_bytes(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  switch (w.bits) {
    case 2: return product_of<Bytes, MOST, Stored<Bytes, 2>>(w, block, x, result);
    case 3: return product_of<Bytes, MOST, Stored<Bytes, 3>>(w, block, x, result);
    default: return product_of<Bytes, MOST, Stored<Bytes, 4>>(w, block, x, result);
  }
}

void product_of_bytes(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  if (w.group == CHUNK) return product_of_bytes<1>(w, block, x, result);
  product_of_bytes<SUMMED>(w, block, x, result);
}

// Codes are signed to the instruction where the low bytes are not.
bool takes(const fewbits_weight &w, int inputs, int64_t rows) {
  return rows <= Bytes::most && inputs != FEWBITS_INPUTS_8 && w.bits < 8 && w.zero_type != FEWBITS_TABLE && w.zero_type != FEWBITS_TRELLIS;
}

constexpr Planes few_rows{1, takes, nullptr, place16, nullptr, product_of_bytes};

// -- inputs ------------------------------------------------------------------------------------------

// Without their signs floats are ordered as integers are, and what is not finite is beyond all others.
Step range(const float *x, int64_t n, int bits) {
  Ints largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16)
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi32(0x7fffffff)));
  const int32_t most = _mm512_reduce_max_epi32(largest);
  float value;
  std::memcpy(&value, &most, 4);
  return step_of(value, most < 0x7f800000, bits);
}

// Zeros where the factor is 0, whatever x is.
Ints integers(const float *x, const Step &s) {
  const Floats product = _mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(s.factor));
  const Ints v = _mm512_min_epi32(_mm512_cvtps_epi32(product), _mm512_set1_epi32(MOST_16));
  return s.factor == 0 ? _mm512_setzero_si512() : v;
}

void round8(const float *x, int64_t n, int64_t together, int8_t *x8, float *scales, int32_t *totals) {
  for (int64_t begin = 0; begin < n; begin += together) {
    const int64_t end = begin + together < n ? begin + together : n;
    const Step r = range(x + begin, end - begin, 8);
    for (int64_t i = begin; i < end; i += CHUNK) {
      const Ints a = integers(x + i, r), b = integers(x + i + 16, r);
      _mm_storeu_si128(reinterpret_cast<__m128i *>(x8 + i), _mm512_cvtsepi32_epi8(a));
      _mm_storeu_si128(reinterpret_cast<__m128i *>(x8 + i + 16), _mm512_cvtsepi32_epi8(b));
      scales[i / CHUNK] = r.step;
      totals[i / CHUNK] = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
    }
  }
}

void round16(const float *x, int64_t n, int64_t together, int16_t *x16, float *scales, int32_t *totals) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2,
                                         3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  for (int64_t begin = 0; begin < n; begin += together) {
    const int64_t end = begin + together < n ? begin + together : n;
    const Step r = range(x + begin, end - begin, 16);
    for (int64_t i = begin; i < end; i += CHUNK) {
      const Ints a = integers(x + i, r), b = integers(x + i + 16, r);
      const __m256i ha = _mm256_shuffle_epi8(_mm512_cvtsepi32_epi16(a), order);
      const __m256i hb = _mm256_shuffle_epi8(_mm512_cvtsepi32_epi16(b), order);
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(x16 + i), ha);
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(x16 + i + 16), hb);
      scales[i / CHUNK] = r.step;
      totals[i / CHUNK] = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
    }
  }
}

struct Lanes {
  using Vector = __m512;
  static constexpr int WIDTH = 16;
  static Vector load(const float *x) { return _mm512_loadu_ps(x); }
  static void store(float *x, Vector v) { _mm512_storeu_ps(x, v); }
  static Vector all(float x) { return _mm512_set1_ps(x); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

const Isa *avx512() {
  static const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vnni");
  if (!runs) return nullptr;
  static const LookUp look_up = avx512vbmi() ? avx512vbmi()->look_up : (avx2() ? avx2() : portable())->look_up;
  static const Isa isa{product16, product8, round8, round16, round_columns<Lanes>, grid_errors,
                       some_chains, look_up, {&few_rows}, load_some, store_rows};
  return &isa;
}

}  // namespace fewbits
