// AVX2. A vector is 8 rows of W times four columns, one byte each, so that a sum needs no adding across
// lanes: a lane is a row. A block is four such vectors wide.
#include <immintrin.h>

#include <type_traits>

#include "kernel.h"

namespace fewbits {
namespace {

using Bytes = __m256i;
using Floats = __m256;

constexpr int LANES = 8, PARTS = ROWS / LANES;

inline Bytes load_bytes(const void *at) { return _mm256_loadu_si256(static_cast<const Bytes *>(at)); }

// -- codes -------------------------------------------------------------------------------------------

// The vector that holds columns 4q to 4q+3 of a chunk for part `h` of the rows: with its neighbours, where
// it has any.
template <int BITS>
inline Bytes stored(const uint8_t *chunk, int h, int q) {
  constexpr int quads = BITS == 3 ? 4 : 8 / BITS;
  return load_bytes(chunk + q / quads * (BITS == 3 ? 192 : 128) + h * 32);
}

// A quad, a byte for a code.
template <int BITS>
inline Bytes quad(const uint8_t *chunk, int h, int q) {
  Bytes v = stored<BITS>(chunk, h, q);
  if constexpr (BITS == 8) return v;
  constexpr int step = BITS == 4 ? 4 : 2, quads = 8 / step;
  if (q % quads) v = _mm256_srli_epi16(v, q % quads * step);
  v = _mm256_and_si256(v, _mm256_set1_epi8((1 << step) - 1));
  if constexpr (BITS == 3) {
    int32_t high;  // a bit for a byte
    std::memcpy(&high, chunk + q / 4 * 192 + 128 + h / 2 * 32 + q % 4 * 8 + h % 2 * 4, 4);
    const Bytes spread = _mm256_setr_epi32(0, 0, 0x01010101, 0x01010101, 0x02020202, 0x02020202, 0x03030303,
                                           0x03030303);
    const Bytes bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const Bytes own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(high), spread), bit);
    v = _mm256_or_si256(v, _mm256_and_si256(_mm256_cmpeq_epi8(own, bit), _mm256_set1_epi8(4)));
  }
  return v;
}

// -- what a code stands for --------------------------------------------------------------------------

inline Floats widen(__m128i v, int type) {
  if (type == FEWBITS_F16) return _mm256_cvtph_ps(v);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

inline Floats scales_at(const fewbits_weight &w, int64_t at) {
  if (w.scale_type == FEWBITS_F32) return _mm256_loadu_ps(static_cast<const float *>(w.scales) + at);
  auto half = static_cast<const uint16_t *>(w.scales) + at;
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i *>(half)), w.scale_type);
}

// Zero points, as distances from the middle.
inline Bytes zeros_at(const fewbits_weight &w, int64_t at) {
  auto zeros = static_cast<const int8_t *>(w.zeros) + at;
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(zeros)));
}

inline Floats offsets_at(const fewbits_weight &w, int64_t at) {
  return _mm256_loadu_ps(static_cast<const float *>(w.zeros) + at);
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

// Rows of x at a time: their sums fill 12 of the 16 registers.
constexpr int MOST = 3;

// Calls `work` with how many rows, as a constant, and the first of them.
template <class Work>
inline void each_rows(int64_t rows, const Work &work) {
  int64_t row = 0;
  for (; rows - row >= MOST; row += MOST) work(std::integral_constant<int, 3>(), row);
  if (rows - row == 2) work(std::integral_constant<int, 2>(), row);
  if (rows - row == 1) work(std::integral_constant<int, 1>(), row);
}

// -- int8 inputs -------------------------------------------------------------------------------------

// Where the vectors of codes come from: a block as it is stored, or a panel that was unpacked.
template <int BITS>
struct Packed {
  const uint8_t *codes;
  Bytes operator()(int chunk, int h, int q) const {
    return quad<BITS>(codes + chunk * chunk_bytes(BITS), h, q);
  }
};

struct Unpacked {
  const uint8_t *codes;
  Bytes operator()(int chunk, int h, int q) const {
    return load_bytes(codes + chunk * 1024 + q * 128 + h * 32);
  }
};

// Codes of up to 4 bits are unsigned, and the sums of a chunk stay in 16 bit: 16 products of at most
// 15 * 127. Of 8 bits two products might not: there codes are signed, and their signs are moved to x.
template <int BITS>
inline Bytes dot8(Bytes sum, Bytes v, Bytes x) {
  if constexpr (BITS < 8) return _mm256_add_epi16(sum, _mm256_maddubs_epi16(v, x));
  v = _mm256_xor_si256(v, _mm256_set1_epi8(-128));
  const Bytes two = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(x, v));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(two, _mm256_set1_epi16(1)));
}

// M rows of x, one panel of columns, added to result (M, 32). (A compiler that unrolls too late keeps sums in
// memory.)
template <int BITS, int M, class Source>
inline void rows8(const fewbits_weight &w, int64_t block, const Source &source, const Part &p,
                  const Inputs &x, int64_t row, float *result) {
  const int64_t from = p.panel * x.rows + row;
  const int8_t *x8 = x.x8 + from * WIDE;
  const float *steps = x.scales + from * PANEL;
  const int32_t *totals = x.totals + from * PANEL;
  Floats sum[M][PARTS];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int h = 0; h < PARTS; h++) sum[m][h] = _mm256_loadu_ps(result + m * ROWS + h * LANES);
  for (int c = 0; c < p.chunks; c++, x8 += CHUNK) {
    Bytes dot[M][PARTS];
    for (auto &line : dot)
      for (auto &part : line) part = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int q = 0; q < 8; q++) {
      Bytes xs[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        int32_t four;
        std::memcpy(&four, x8 + m * WIDE + q * 4, 4);
        xs[m] = _mm256_set1_epi32(four);
      }
#pragma GCC unroll 4
      for (int h = 0; h < PARTS; h++) {
        const Bytes v = source(c, h, q);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) dot[m][h] = dot8<BITS>(dot[m][h], v, xs[m]);
      }
    }
    const int64_t at = p.group(w, block, c) * ROWS;
#pragma GCC unroll 4
    for (int h = 0; h < PARTS; h++) {
      const Floats scale = scales_at(w, at + h * LANES);
      // What is taken off every code, times the sum of x: both fit 16 bits, the upper ones are zero.
      Bytes zero = _mm256_set1_epi32(BITS < 8 ? -(1 << (BITS - 1)) & 0xffff : 0);
      if (w.zero_type == FEWBITS_ZERO_POINT)
        zero = _mm256_and_si256(_mm256_sub_epi32(zero, zeros_at(w, at + h * LANES)),
                                _mm256_set1_epi32(0xffff));
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const float step = steps[m * PANEL + c];
        const int32_t total = totals[m * PANEL + c];
        Bytes all = BITS < 8 ? _mm256_madd_epi16(dot[m][h], _mm256_set1_epi16(1)) : dot[m][h];
        all = _mm256_add_epi32(all, _mm256_madd_epi16(zero, _mm256_set1_epi32(total)));
        sum[m][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(all), _mm256_mul_ps(scale, _mm256_set1_ps(step)),
                                    sum[m][h]);
        if (w.zero_type == FEWBITS_OFFSET)
          sum[m][h] = _mm256_fnmadd_ps(offsets_at(w, at + h * LANES), _mm256_set1_ps(step * float(total)),
                                       sum[m][h]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int h = 0; h < PARTS; h++) _mm256_storeu_ps(result + m * ROWS + h * LANES, sum[m][h]);
}

template <int BITS>
void block8(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  std::memset(result, 0, x.rows * ROWS * sizeof(float));
  each_panel<BITS>(w, block, [&](const Part &p, const uint8_t *codes) {
    const auto all_rows = [&](const auto &source) {
      each_rows(x.rows, [&](auto count, int64_t row) {
        rows8<BITS, decltype(count)::value>(w, block, source, p, x, row, result + row * ROWS);
      });
    };
    const Packed<BITS> packed{codes};
    if (BITS == 8 || x.rows <= MOST) return all_rows(packed);
    alignas(64) uint8_t panel[WIDE * ROWS];
    for (int c = 0; c < p.chunks; c++)
      for (int q = 0; q < 8; q++)
        for (int h = 0; h < PARTS; h++)
          _mm256_store_si256(reinterpret_cast<Bytes *>(panel + c * 1024 + q * 128 + h * 32), packed(c, h, q));
    all_rows(Unpacked{panel});
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

// There is no product of bfloat16: codes become floats, from a vector that holds those of a quad. A code that
// has turned signed is moved to the top of its 32 bits, where it is 1 / factor times too large, and exact.
template <int BITS>
struct Counted {
  static constexpr float factor = 1 / float(1u << (32 - BITS));

  static Bytes vector(const uint8_t *chunk, int h, int q) {
    constexpr int signs = BITS == 8 ? 0x80 : BITS == 4 ? 0x88 : BITS == 3 ? 4 : 0xaa;
    return _mm256_xor_si256(BITS == 3 ? quad<3>(chunk, h, q) : stored<BITS>(chunk, h, q),
                            _mm256_set1_epi8(char(signs)));
  }
  Floats operator()(Bytes v, int q, int j) const {
    const int up = 32 - BITS - j * 8 - (BITS == 3 ? 0 : q % (8 / BITS) * BITS);
    if (up) v = _mm256_slli_epi32(v, up);
    return _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(int(~0u << (32 - BITS)))));
  }
};

// The same for codes of 4 bits that are looked up, eight and eight.
struct Looked {
  Floats low, high;
  static constexpr float factor = 1;

  static Looked of(const float *table) {
    alignas(32) float exact[16];
    for (int i = 0; i < 16; i++) exact[i] = from_bf16(to_bf16(table[i]));
    return {_mm256_load_ps(exact), _mm256_load_ps(exact + 8)};
  }
  static Bytes vector(const uint8_t *chunk, int h, int q) { return stored<4>(chunk, h, q); }
  Floats operator()(Bytes v, int q, int j) const {
    const Bytes code = _mm256_srli_epi32(v, j * 8 + q % 2 * 4);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code),
                            _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
  }
};

// Chunks of a row of x as floats, their columns in order again, times `factor`.
inline void floats_of(const uint16_t *x16, int chunks, float factor, float *line) {
  for (int i = 0; i < chunks * CHUNK; i += 8) {
    const Floats v = widen(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x16 + i)), FEWBITS_BF16);
    _mm256_storeu_ps(line + i, _mm256_mul_ps(_mm256_permute_ps(v, 0xd8), _mm256_set1_ps(factor)));
  }
}

// M rows of x straight from the codes: one tile of 16 rows, one panel of columns, added to result (M, 32).
template <int BITS, int M, class Values>
inline void tile16(const fewbits_weight &w, int64_t block, const Values &values, const uint8_t *codes,
                   const Part &p, int tile, const float *line, const float *sums, float *result) {
  for (int c = 0; c < p.chunks;) {
    const int64_t group = p.group(w, block, c), at = group * ROWS;
    // With few rows each product would wait for the one before: columns are summed apart.
    constexpr int APART = M == 1 ? 4 : M == 2 ? 2 : 1;
    Floats dot[APART][M][2];
    for (auto &part : dot)
      for (auto &lanes : part) lanes[0] = lanes[1] = _mm256_setzero_ps();
    float total[M] = {};
    for (; c < p.chunks && p.group(w, block, c) == group; c++) {
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++) {
        const uint8_t *chunk = codes + c * chunk_bytes(BITS);
        const Bytes a = Values::vector(chunk, tile * 2, q), b = Values::vector(chunk, tile * 2 + 1, q);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const Floats from_a = values(a, q, j), from_b = values(b, q, j);
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) {
            const Floats x = _mm256_broadcast_ss(line + m * WIDE + c * CHUNK + q * 4 + j);
            Floats *to = dot[j % APART][m];
            to[0] = _mm256_fmadd_ps(from_a, x, to[0]);
            to[1] = _mm256_fmadd_ps(from_b, x, to[1]);
          }
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) total[m] += sums[m * PANEL + c];
    }
#pragma GCC unroll 4
    for (int h = 0; h < 2; h++) {
      const int64_t lanes = tile * 16 + h * LANES;
      const Floats scale = scales_at(w, at + lanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        float *to = result + m * ROWS + lanes;
        Floats all = dot[0][m][h];
#pragma GCC unroll 4
        for (int i = 1; i < APART; i++) all = _mm256_add_ps(all, dot[i][m][h]);
        if (w.zero_type == FEWBITS_ZERO_POINT)
          all = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(zeros_at(w, at + lanes)), _mm256_set1_ps(total[m]), all);
        Floats sum = _mm256_fmadd_ps(all, scale, _mm256_loadu_ps(to));
        if (w.zero_type == FEWBITS_OFFSET)
          sum = _mm256_fnmadd_ps(offsets_at(w, at + lanes), _mm256_set1_ps(total[m]), sum);
        _mm256_storeu_ps(to, sum);
      }
    }
  }
}

// For many rows weights are made, of half a panel at a time so that they stay in the first cache.
constexpr int HALF = PANEL / 2;

// Chunks `begin` to `end` of a panel as weights (columns, 32).
template <int BITS, class Values>
void unpack16(const fewbits_weight &w, int64_t block, const Values &values, const uint8_t *codes,
              const Part &p, int begin, int end, float *panel) {
  for (int c = begin; c < end; c++, panel += CHUNK * ROWS) {
    const int64_t at = p.group(w, block, c) * ROWS;
    for (int h = 0; h < PARTS; h++) {
      const Floats scale = scales_at(w, at + h * LANES);
      Floats zero = _mm256_setzero_ps(), offset = _mm256_setzero_ps();
      if (w.zero_type == FEWBITS_ZERO_POINT) zero = _mm256_cvtepi32_ps(zeros_at(w, at + h * LANES));
      if (w.zero_type == FEWBITS_OFFSET) offset = offsets_at(w, at + h * LANES);
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++) {
        const Bytes v = Values::vector(codes + c * chunk_bytes(BITS), h, q);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const Floats level = _mm256_fmsub_ps(values(v, q, j), _mm256_set1_ps(Values::factor), zero);
          _mm256_store_ps(panel + (q * 4 + j) * ROWS + h * LANES, _mm256_fmsub_ps(level, scale, offset));
        }
      }
    }
  }
}

// M rows of x times weights (columns, 32), added to result (M, 32).
template <int M>
[[gnu::noinline]] void rows_of_floats(const float *panel, int chunks, const uint16_t *x16, float *result) {
  alignas(64) float line[M][HALF * CHUNK];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) floats_of(x16 + m * WIDE, chunks, 1, line[m]);
  Floats sum[M][PARTS];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int h = 0; h < PARTS; h++) sum[m][h] = _mm256_loadu_ps(result + m * ROWS + h * LANES);
  for (int i = 0; i < chunks * CHUNK; i++) {
    Floats v[PARTS];
#pragma GCC unroll 4
    for (int h = 0; h < PARTS; h++) v[h] = _mm256_load_ps(panel + i * ROWS + h * LANES);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      const Floats xs = _mm256_broadcast_ss(line[m] + i);
#pragma GCC unroll 4
      for (int h = 0; h < PARTS; h++) sum[m][h] = _mm256_fmadd_ps(v[h], xs, sum[m][h]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int h = 0; h < PARTS; h++) _mm256_storeu_ps(result + m * ROWS + h * LANES, sum[m][h]);
}

template <int BITS, class Values>
void block16(const fewbits_weight &w, int64_t block, const Values &values, const Inputs &x, float *result) {
  std::memset(result, 0, x.rows * ROWS * sizeof(float));
  each_panel<BITS>(w, block, [&](const Part &p, const uint8_t *codes) {
    const uint16_t *x16 = x.x16 + p.panel * x.rows * WIDE;
    if (x.rows <= MOST)
      return each_rows(x.rows, [&](auto count, int64_t) {
        constexpr int M = decltype(count)::value;
        alignas(64) float line[M * WIDE];
        for (int m = 0; m < M; m++) floats_of(x16 + m * WIDE, p.chunks, Values::factor, line + m * WIDE);
        const float *sums = x.sums + p.panel * x.rows * PANEL;
        for (int tile = 0; tile < 2; tile++)
          tile16<BITS, M>(w, block, values, codes, p, tile, line, sums, result);
      });
    alignas(64) float panel[HALF * CHUNK * ROWS];
    for (int begin = 0; begin < p.chunks; begin += HALF) {
      const int end = begin + HALF < p.chunks ? begin + HALF : p.chunks;
      unpack16<BITS>(w, block, values, codes, p, begin, end, panel);
      each_rows(x.rows, [&](auto count, int64_t row) {
        rows_of_floats<decltype(count)::value>(panel, end - begin, x16 + row * WIDE + begin * CHUNK,
                                               result + row * ROWS);
      });
    }
  });
}

void product16(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  if (w.zero_type == FEWBITS_TABLE) return block16<4>(w, block, Looked::of(w.table), x, result);
  switch (w.bits) {
    case 2: return block16<2>(w, block, Counted<2>(), x, result);
    case 3: return block16<3>(w, block, Counted<3>(), x, result);
    case 4: return block16<4>(w, block, Counted<4>(), x, result);
    default: return block16<8>(w, block, Counted<8>(), x, result);
  }
}

// -- inputs ------------------------------------------------------------------------------------------

inline float most_of(Floats v) {
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_shuffle_ps(most, most, 1)));
}

inline float sum_of(Floats v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

void round8(const float *x, int64_t n, int8_t *x8, float *scales, int32_t *totals) {
  for (int64_t c = 0; c < n / CHUNK; c++, x += CHUNK, x8 += CHUNK) {
    Floats v[4], most = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    for (int i = 0; i < 4; i++) {
      v[i] = _mm256_loadu_ps(x + i * 8);
      most = _mm256_max_ps(most, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v[i]));
      odd = _mm256_add_ps(odd, _mm256_sub_ps(v[i], v[i]));
    }
    // A NaN or an infinity must not vanish: the scale is then NaN, and so is the row of the result.
    const bool finite = _mm256_movemask_ps(_mm256_cmp_ps(odd, odd, _CMP_UNORD_Q)) == 0;
    const float size = most_of(most);
    const Floats times = _mm256_set1_ps(finite && size >= LEAST_INPUT ? 127 / size : 0);
    Bytes level[4], total = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
      level[i] = finite ? _mm256_cvtps_epi32(_mm256_mul_ps(v[i], times)) : _mm256_setzero_si256();
      total = _mm256_add_epi32(total, level[i]);
    }
    // Packing takes turns between the halves of vectors: the order of fours is put right afterwards.
    const Bytes mixed = _mm256_packs_epi16(_mm256_packs_epi32(level[0], level[1]),
                                           _mm256_packs_epi32(level[2], level[3]));
    const Bytes order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<Bytes *>(x8), _mm256_permutevar8x32_epi32(mixed, order));
    scales[c] = finite ? size / 127 : __builtin_nanf("");
    totals[c] = int32_t(sum_of(_mm256_cvtepi32_ps(total)));  // exact: whole numbers below 2^24
  }
}

void round16(const float *x, int64_t n, uint16_t *x16, float *sums) {
  for (int64_t c = 0; c < n / CHUNK; c++) {
    Floats sum = _mm256_setzero_ps();
    for (int i = 0; i < CHUNK; i += 8, x += 8, x16 += 8) {
      const Floats v = _mm256_loadu_ps(x);
      const Bytes bits = _mm256_castps_si256(v);
      const Bytes last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      // To nearest, ties to even; a NaN keeps its upper half, made quiet.
      Bytes up = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
      const Bytes quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
      up = _mm256_blendv_epi8(up, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
      up = _mm256_and_si256(up, _mm256_set1_epi32(int(0xffff0000)));
      sum = _mm256_add_ps(sum, _mm256_castsi256_ps(up));
      const Bytes words = _mm256_shuffle_epi32(_mm256_srli_epi32(up, 16), 0xd8);  // a c b d
      _mm_storeu_si128(reinterpret_cast<__m128i *>(x16),
                       _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }
    sums[c] = sum_of(sum);
  }
}

}  // namespace

const Isa *avx2() {
  static const Isa isa{product16, product8, round8, round16};
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  return runs ? &isa : nullptr;
}

}  // namespace fewbits
