// AVX-512 with VNNI and BF16. A vector is 16 rows of W times four columns, one byte each, so that a sum
// needs no adding across lanes: a lane is a row. A block is two such vectors wide.
#include <immintrin.h>

#include "kernel.h"

namespace fewbits {
namespace {

using Bytes = __m512i;
using Floats = __m512;

// -- codes -------------------------------------------------------------------------------------------

// Columns 4q to 4q+3 of a chunk, a byte each.
template <int BITS>
inline Bytes quad(const uint8_t *chunk, int tile, int q) {
  if constexpr (BITS == 8) {
    return _mm512_loadu_si512(chunk + q * 128 + tile * 64);
  } else if constexpr (BITS == 4) {
    Bytes v = _mm512_loadu_si512(chunk + q / 2 * 128 + tile * 64);
    if (q % 2) v = _mm512_srli_epi16(v, 4);
    return _mm512_and_si512(v, _mm512_set1_epi8(15));
  } else {
    const uint8_t *half = chunk + q / 4 * (BITS == 2 ? 128 : 192);
    Bytes v = _mm512_srli_epi16(_mm512_loadu_si512(half + tile * 64), q % 4 * 2);
    v = _mm512_and_si512(v, _mm512_set1_epi8(3));
    if constexpr (BITS == 3) {
      uint64_t high;
      std::memcpy(&high, half + 128 + tile * 32 + q % 4 * 8, 8);
      v = _mm512_mask_add_epi8(v, high, v, _mm512_set1_epi8(4));
    }
    return v;
  }
}

// -- what a code stands for --------------------------------------------------------------------------

inline Floats widen(__m256i v, int type) {
  if (type == FEWBITS_F16) return _mm512_cvtph_ps(v);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

inline Floats scales_at(const fewbits_weight &w, int64_t at) {
  if (w.scale_type == FEWBITS_F32) return _mm512_loadu_ps(static_cast<const float *>(w.scales) + at);
  auto half = static_cast<const uint16_t *>(w.scales) + at;
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(half)), w.scale_type);
}

// Zero points, as distances from the middle.
inline Bytes zeros_at(const fewbits_weight &w, int64_t at) {
  auto zeros = static_cast<const int8_t *>(w.zeros) + at;
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(zeros)));
}

inline Floats offsets_at(const fewbits_weight &w, int64_t at) {
  return _mm512_loadu_ps(static_cast<const float *>(w.zeros) + at);
}

// Where a panel of a block begins, and how many chunks it has.
struct Part {
  int64_t panel;
  int chunks;

  int64_t group(const fewbits_weight &w, int64_t block, int c) const {
    return block * (w.columns / w.group) + (panel * PANEL + c) * CHUNK / w.group;
  }
};

// Calls `work` for the panels of a block, with the codes of each.
template <int BITS, class Work>
inline void each_panel(const fewbits_weight &w, int64_t block, const Work &work) {
  const int64_t chunks = w.columns / CHUNK;
  const uint8_t *codes = w.codes + block * chunks * chunk_bytes(BITS);
  for (int64_t begin = 0; begin < chunks; begin += PANEL, codes += PANEL * chunk_bytes(BITS))
    work(Part{begin / PANEL, int(chunks - begin < PANEL ? chunks - begin : PANEL)}, codes);
}

// -- int8 inputs -------------------------------------------------------------------------------------

// Where the vectors of codes come from: a block as it is stored, or a panel that was unpacked.
template <int BITS>
struct Packed {
  const uint8_t *codes;
  Bytes operator()(int chunk, int tile, int q) const {
    return quad<BITS>(codes + chunk * chunk_bytes(BITS), tile, q);
  }
};

struct Unpacked {
  const uint8_t *codes;
  Bytes operator()(int chunk, int tile, int q) const {
    return _mm512_loadu_si512(codes + chunk * 1024 + q * 128 + tile * 64);
  }
};

// M rows of x, one panel of columns, added to result (M, 32).
template <int M, class Source>
inline void rows8(const fewbits_weight &w, int64_t block, const Source &source, const Part &p, const Inputs &x,
                  int64_t row, float *result) {
  const int64_t from = p.panel * x.rows + row;
  const int8_t *x8 = x.x8 + from * WIDE;
  const float *steps = x.scales + from * PANEL;
  const int32_t *totals = x.totals + from * PANEL;
  Floats sum[M][2];
  for (int m = 0; m < M; m++)
    for (int t = 0; t < 2; t++) sum[m][t] = _mm512_loadu_ps(result + m * ROWS + t * 16);
  for (int c = 0; c < p.chunks; c++, x8 += CHUNK) {
    const int64_t at = p.group(w, block, c) * ROWS;
    // What is taken off every code, times the sum of x: both fit 16 bits, the upper ones are zero.
    Bytes zero[2], dot[M][2];
    for (int t = 0; t < 2; t++) {
      zero[t] = _mm512_set1_epi32(-(1 << (w.bits - 1)) & 0xffff);
      if (w.zero_type == FEWBITS_ZERO_POINT)
        zero[t] = _mm512_and_si512(_mm512_sub_epi32(zero[t], zeros_at(w, at + t * 16)), _mm512_set1_epi32(0xffff));
    }
    for (int m = 0; m < M; m++) {
      const Bytes total = _mm512_set1_epi32(totals[m * PANEL + c]);
      for (int t = 0; t < 2; t++) dot[m][t] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), zero[t], total);
    }
#pragma GCC unroll 8
    for (int q = 0; q < 8; q++) {
      const Bytes w0 = source(c, 0, q), w1 = source(c, 1, q);
      for (int m = 0; m < M; m++) {
        int32_t four;
        std::memcpy(&four, x8 + m * WIDE + q * 4, 4);
        const Bytes xs = _mm512_set1_epi32(four);
        dot[m][0] = _mm512_dpbusd_epi32(dot[m][0], w0, xs);
        dot[m][1] = _mm512_dpbusd_epi32(dot[m][1], w1, xs);
      }
    }
    for (int t = 0; t < 2; t++) {
      const Floats scale = scales_at(w, at + t * 16);
      for (int m = 0; m < M; m++) {
        const float step = steps[m * PANEL + c];
        sum[m][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m][t]), _mm512_mul_ps(scale, _mm512_set1_ps(step)),
                                    sum[m][t]);
        if (w.zero_type == FEWBITS_OFFSET) {
          const Floats total = _mm512_set1_ps(step * float(totals[m * PANEL + c]));
          sum[m][t] = _mm512_fnmadd_ps(offsets_at(w, at + t * 16), total, sum[m][t]);
        }
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int t = 0; t < 2; t++) _mm512_storeu_ps(result + m * ROWS + t * 16, sum[m][t]);
}

template <class Source>
inline void some_rows8(int64_t count, const fewbits_weight &w, int64_t block, const Source &source,
                        const Part &p, const Inputs &x, int64_t row, float *result) {
  switch (count) {
    case 1: return rows8<1>(w, block, source, p, x, row, result);
    case 2: return rows8<2>(w, block, source, p, x, row, result);
    case 3: return rows8<3>(w, block, source, p, x, row, result);
    case 4: return rows8<4>(w, block, source, p, x, row, result);
    case 5: return rows8<5>(w, block, source, p, x, row, result);
    case 6: return rows8<6>(w, block, source, p, x, row, result);
    case 7: return rows8<7>(w, block, source, p, x, row, result);
    default: return rows8<8>(w, block, source, p, x, row, result);
  }
}

// Rows of x at a time, straight from the codes and from a panel that was unpacked; measured.
constexpr int MOST = 8, MOST_UNPACKED = 6;

template <int BITS>
void block8(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  std::memset(result, 0, x.rows * ROWS * sizeof(float));
  each_panel<BITS>(w, block, [&](const Part &p, const uint8_t *codes) {
    const Packed<BITS> packed{codes};
    if (x.rows <= MOST) return some_rows8(x.rows, w, block, packed, p, x, 0, result);
    alignas(64) uint8_t panel[WIDE * ROWS];
    for (int c = 0; c < p.chunks; c++)
      for (int q = 0; q < 8; q++)
        for (int t = 0; t < 2; t++)
          _mm512_store_si512(panel + c * 1024 + q * 128 + t * 64, packed(c, t, q));
    for (int64_t row = 0; row < x.rows; row += MOST_UNPACKED) {
      const int64_t left = x.rows - row, count = left < MOST_UNPACKED ? left : MOST_UNPACKED;
      some_rows8(count, w, block, Unpacked{panel}, p, x, row, result + row * ROWS);
    }
  });
}

void product8(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  switch (w.bits) {
    case 2: return block8<2>(w, block, x, result);
    case 3: return block8<3>(w, block, x, result);
    case 4: return block8<4>(w, block, x, result);
    default: return block8<8>(w, block, x, result);
  }
}

// -- 16-bit inputs -----------------------------------------------------------------------------------

// Code -> bfloat16, by the lowest five bits of a word. Codes of 2 and 4 bits come with a bit or more of
// their neighbours, so what they stand for is repeated.
struct Tables {
  Bytes low, high;
};

Tables tables(const fewbits_weight &w) {
  alignas(64) uint16_t low[32], high[32];
  const int middle = 1 << (w.bits - 1), mask = w.bits == 8 ? 15 : (1 << w.bits) - 1;
  for (int i = 0; i < 32; i++) {
    const int code = i & mask;
    low[i] = to_bf16(w.table ? w.table[code] : w.bits == 8 ? float(code) : float(code - middle));
    high[i] = to_bf16(float(code * 16 - 128));
  }
  return {_mm512_load_si512(low), _mm512_load_si512(high)};
}

inline Floats dot16(Floats sum, Bytes a, Bytes b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// What a quad of codes stands for: its even bytes as pairs, then its odd ones.
template <int BITS>
struct Looked {
  const uint8_t *codes;
  Tables t;
  static constexpr bool centred = false;  // whether zero points are taken off already
  static constexpr int parts = BITS == 8 ? 2 : 1;  // 8 bits: as 16 high - 128 and as low, both exact
  Bytes operator()(int chunk, int tile, int q, int odd, int part) const {
    const uint8_t *at = codes + chunk * chunk_bytes(BITS);
    if constexpr (BITS == 8) {
      const Bytes v = _mm512_loadu_si512(at + q * 128 + tile * 64);
      const int shift = odd * 8 + part * 4;
      return _mm512_permutexvar_epi16(shift ? _mm512_srli_epi16(v, shift) : v, part ? t.high : t.low);
    } else if constexpr (BITS == 3) {
      const Bytes v = quad<3>(at, tile, q);
      return _mm512_permutexvar_epi16(odd ? _mm512_srli_epi16(v, 8) : v, t.low);
    } else {
      constexpr int quads = 8 / BITS;
      const Bytes v = _mm512_loadu_si512(at + q / quads * 128 + tile * 64);
      const int shift = odd * 8 + q % quads * BITS;
      return _mm512_permutexvar_epi16(shift ? _mm512_srli_epi16(v, shift) : v, t.low);
    }
  }
};

struct Panel16 {
  const uint8_t *words;
  static constexpr bool centred = true;
  static constexpr int parts = 1;
  Bytes operator()(int chunk, int tile, int q, int odd, int) const {
    return _mm512_loadu_si512(words + chunk * 2048 + q * 256 + odd * 128 + tile * 64);
  }
};

template <int M, class Source>
inline void rows16(const fewbits_weight &w, int64_t block, const Source &source, const Part &p,
                   const Inputs &x, int64_t row, float *result) {
  const int64_t from = p.panel * x.rows + row;
  const float *sums = x.sums + from * PANEL;
  const bool shifted = w.zero_type == FEWBITS_ZERO_POINT && !Source::centred;
  Floats sum[M][2];
  for (int m = 0; m < M; m++)
    for (int t = 0; t < 2; t++) sum[m][t] = _mm512_loadu_ps(result + m * ROWS + t * 16);
  for (int c = 0; c < p.chunks;) {
    const int64_t group = p.group(w, block, c), at = group * ROWS;
    // With one row each product would wait for the one before: odd columns are summed apart.
    constexpr int APART = M <= 2 ? 2 : 1;
    Floats dot[APART][M][2];
    for (auto &part : dot)
      for (auto &line : part) line[0] = line[1] = _mm512_setzero_ps();
    float total[M] = {};
    for (; c < p.chunks && p.group(w, block, c) == group; c++) {
      const uint16_t *x16 = x.x16 + from * WIDE + c * CHUNK;
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++)
        for (int odd = 0; odd < 2; odd++) {
          Bytes xs[M];
          for (int m = 0; m < M; m++) {
            int32_t two;
            std::memcpy(&two, x16 + m * WIDE + q * 4 + odd * 2, 4);
            xs[m] = _mm512_set1_epi32(two);
          }
          for (int part = 0; part < Source::parts; part++)
            for (int t = 0; t < 2; t++) {
              const Bytes v = source(c, t, q, odd, part);
              for (int m = 0; m < M; m++)
                dot[odd % APART][m][t] = dot16(dot[odd % APART][m][t], v, xs[m]);
            }
        }
      if (shifted || w.zero_type == FEWBITS_OFFSET)
        for (int m = 0; m < M; m++) total[m] += sums[m * PANEL + c];
    }
    for (int t = 0; t < 2; t++) {
      const Floats scale = scales_at(w, at + t * 16);
      for (int m = 0; m < M; m++) {
        Floats all = dot[0][m][t];
        if constexpr (APART == 2) all = _mm512_add_ps(all, dot[1][m][t]);
        if (shifted)
          all = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(zeros_at(w, at + t * 16)), _mm512_set1_ps(total[m]), all);
        sum[m][t] = _mm512_fmadd_ps(all, scale, sum[m][t]);
        if (w.zero_type == FEWBITS_OFFSET)
          sum[m][t] = _mm512_fnmadd_ps(offsets_at(w, at + t * 16), _mm512_set1_ps(total[m]), sum[m][t]);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int t = 0; t < 2; t++) _mm512_storeu_ps(result + m * ROWS + t * 16, sum[m][t]);
}

template <class Source>
inline void some_rows16(int64_t count, const fewbits_weight &w, int64_t block, const Source &source,
                        const Part &p, const Inputs &x, int64_t row, float *result) {
  switch (count) {
    case 1: return rows16<1>(w, block, source, p, x, row, result);
    case 2: return rows16<2>(w, block, source, p, x, row, result);
    case 3: return rows16<3>(w, block, source, p, x, row, result);
    case 4: return rows16<4>(w, block, source, p, x, row, result);
    case 5: return rows16<5>(w, block, source, p, x, row, result);
    case 6: return rows16<6>(w, block, source, p, x, row, result);
    case 7: return rows16<7>(w, block, source, p, x, row, result);
    default: return rows16<8>(w, block, source, p, x, row, result);
  }
}

// Pairs of bfloat16 as floats, and back; what is put back must be exact.
inline Floats lower(Bytes v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
inline Floats upper(Bytes v) {
  return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000))));
}
inline Bytes pairs(Floats low, Floats high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(low), 16),
                                 _mm512_castps_si512(high));
}

// A panel in bfloat16, (q, odd, tile): code - zero point, which has at most eight digits and a sign.
template <int BITS>
void unpack16(const fewbits_weight &w, int64_t block, const Looked<BITS> &looked, const Part &p,
              uint8_t *panel) {
  for (int c = 0; c < p.chunks; c++, panel += 2048)
    for (int t = 0; t < 2; t++) {
      Floats zero = _mm512_setzero_ps();
      if (w.zero_type == FEWBITS_ZERO_POINT)
        zero = _mm512_cvtepi32_ps(zeros_at(w, p.group(w, block, c) * ROWS + t * 16));
      for (int q = 0; q < 8; q++)
        for (int odd = 0; odd < 2; odd++) {
          Bytes v = looked(c, t, q, odd, 0);
          if constexpr (BITS == 8) {
            const Bytes high = looked(c, t, q, odd, 1);
            v = pairs(_mm512_add_ps(lower(v), lower(high)), _mm512_add_ps(upper(v), upper(high)));
          }
          if (w.zero_type == FEWBITS_ZERO_POINT)
            v = pairs(_mm512_sub_ps(lower(v), zero), _mm512_sub_ps(upper(v), zero));
          _mm512_store_si512(panel + q * 256 + odd * 128 + t * 64, v);
        }
    }
}

template <int BITS>
void block16(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  const Tables t = tables(w);
  std::memset(result, 0, x.rows * ROWS * sizeof(float));
  each_panel<BITS>(w, block, [&](const Part &p, const uint8_t *codes) {
    const Looked<BITS> looked{codes, t};
    if (x.rows <= MOST) return some_rows16(x.rows, w, block, looked, p, x, 0, result);
    alignas(64) uint8_t panel[WIDE * ROWS * 2];
    unpack16(w, block, looked, p, panel);
    for (int64_t row = 0; row < x.rows; row += MOST_UNPACKED) {
      const int64_t left = x.rows - row, count = left < MOST_UNPACKED ? left : MOST_UNPACKED;
      some_rows16(count, w, block, Panel16{panel}, p, x, row, result + row * ROWS);
    }
  });
}

void product16(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  switch (w.bits) {
    case 2: return block16<2>(w, block, x, result);
    case 3: return block16<3>(w, block, x, result);
    case 4: return block16<4>(w, block, x, result);
    default: return block16<8>(w, block, x, result);
  }
}

// -- inputs ------------------------------------------------------------------------------------------

void round8(const float *x, int64_t n, int8_t *x8, float *scales, int32_t *totals) {
  for (int64_t c = 0; c < n / CHUNK; c++, x += CHUNK, x8 += CHUNK) {
    const Floats a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    // A NaN or an infinity must not vanish: the scale is then NaN, and so is the row of the result.
    const Floats odd = _mm512_add_ps(_mm512_sub_ps(a, a), _mm512_sub_ps(b, b));
    const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    const float inverse = most >= LEAST_INPUT ? 127 / most : 0;
    const Floats times = _mm512_set1_ps(inverse);
    const bool finite = _mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q) == 0;
    const __mmask16 all = finite ? 0xffff : 0;
    const __m512i qa = _mm512_maskz_cvtps_epi32(all, _mm512_mul_ps(a, times));
    const __m512i qb = _mm512_maskz_cvtps_epi32(all, _mm512_mul_ps(b, times));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(x8), _mm512_cvtsepi32_epi8(qa));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(x8 + 16), _mm512_cvtsepi32_epi8(qb));
    scales[c] = finite ? most / 127 : __builtin_nanf("");
    totals[c] = _mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb));
  }
}

void round16(const float *x, int64_t n, uint16_t *x16, float *sums) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2,
                                         3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  for (int64_t c = 0; c < n / CHUNK; c++) {
    Floats sum = _mm512_setzero_ps();
    for (int half = 0; half < 2; half++, x += 16, x16 += 16) {
      const __m256i v = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x));
      sum = _mm512_add_ps(sum, widen(v, FEWBITS_BF16));
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(x16), _mm256_shuffle_epi8(v, order));
    }
    sums[c] = _mm512_reduce_add_ps(sum);
  }
}

}  // namespace

const Isa *avx512() {
  static const Isa isa{product16, product8, round8, round16};
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("avx512bf16");
  return runs ? &isa : nullptr;
}

}  // namespace fewbits
