// NEON with dot products. A vector is 4 rows of W times four columns, one byte each, so that a sum needs no
// adding across lanes: a lane is a row. A block is eight such vectors wide.

// Moving loads up before registers are assigned makes gcc run out of them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-schedule-insns")
#endif

#include <arm_neon.h>
#ifdef __linux__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <type_traits>

#include "kernel.h"

namespace fewbits {
namespace {

using Bytes = int8x16_t;
using Floats = float32x4_t;

constexpr int LANES = 4, PARTS = ROWS / LANES;

// -- codes -------------------------------------------------------------------------------------------

// Columns 4q to 4q+3 of a chunk for part `h` of the rows. A byte is code - middle, at its top: times
// 2^(8-BITS), and signed, as the products want it.
template <int BITS>
inline Bytes quad(const uint8_t *chunk, int h, int q) {
  constexpr int quads = BITS == 3 ? 4 : 8 / BITS;
  const uint8_t *at = chunk + q / quads * (BITS == 3 ? 192 : 128);
  uint8x16_t v = vld1q_u8(at + h * 16);
  if constexpr (BITS == 3) {
    v = vshlq_u8(v, vdupq_n_s8(int8_t(5 - q % 4 * 2)));
    v = vandq_u8(v, vdupq_n_u8(0x60));
    const uint8_t *high = at + 128 + h / 4 * 32 + q % 4 * 8 + h % 4 * 2;  // a bit for a byte
    const uint8x16_t own = vcombine_u8(vld1_dup_u8(high), vld1_dup_u8(high + 1));
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    v = vorrq_u8(v, vbicq_u8(vdupq_n_u8(0x80), vtstq_u8(own, bit)));
  } else if constexpr (BITS == 8) {
    v = veorq_u8(v, vdupq_n_u8(0x80));
  } else {
    v = veorq_u8(v, vdupq_n_u8(BITS == 4 ? 0x88 : 0xaa));
    const int up = 8 - BITS - q % quads * BITS;
    if (up) v = vshlq_u8(v, vdupq_n_s8(int8_t(up)));
    v = vandq_u8(v, vdupq_n_u8(uint8_t(256 - (256 >> BITS))));
  }
  return vreinterpretq_s8_u8(v);
}

// -- what a code stands for --------------------------------------------------------------------------

inline Floats from_words(uint16x4_t v) { return vreinterpretq_f32_u32(vshll_n_u16(v, 16)); }

inline Floats scales_at(const fewbits_weight &w, int64_t at) {
  if (w.scale_type == FEWBITS_F32) return vld1q_f32(static_cast<const float *>(w.scales) + at);
  const uint16x4_t half = vld1_u16(static_cast<const uint16_t *>(w.scales) + at);
  return w.scale_type == FEWBITS_F16 ? vcvt_f32_f16(vreinterpret_f16_u16(half)) : from_words(half);
}

// Zero points, as distances from the middle.
inline int32x4_t zeros_at(const fewbits_weight &w, int64_t at) {
  int32_t four;
  std::memcpy(&four, static_cast<const int8_t *>(w.zeros) + at, 4);
  return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}

inline Floats offsets_at(const fewbits_weight &w, int64_t at) {
  return vld1q_f32(static_cast<const float *>(w.zeros) + at);
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

// Rows of x at a time: their sums fill 24 of the 32 registers.
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
  const int8_t *codes;
  Bytes operator()(int chunk, int h, int q) const {
    return vld1q_s8(codes + chunk * 1024 + q * 128 + h * 16);
  }
};

// Quad Q of each four: x has all four.
template <int Q, int M, class Source>
inline void dots(const Source &source, int c, int four, const Bytes (&xs)[M], int32x4_t (&dot)[M][PARTS]) {
#pragma GCC unroll 8
  for (int h = 0; h < PARTS; h++) {
    const Bytes v = source(c, h, four * 4 + Q);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) dot[m][h] = vdotq_laneq_s32(dot[m][h], v, xs[m], Q);
  }
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
  for (int c = 0; c < p.chunks; c++, x8 += CHUNK) {
    int32x4_t dot[M][PARTS];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int h = 0; h < PARTS; h++) dot[m][h] = vdupq_n_s32(0);
#pragma GCC unroll 2
    for (int four = 0; four < 2; four++) {
      Bytes xs[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) xs[m] = vld1q_s8(x8 + m * WIDE + four * 16);
      dots<0, M>(source, c, four, xs, dot);
      dots<1, M>(source, c, four, xs, dot);
      dots<2, M>(source, c, four, xs, dot);
      dots<3, M>(source, c, four, xs, dot);
    }
    const int64_t at = p.group(w, block, c) * ROWS;
#pragma GCC unroll 8
    for (int h = 0; h < PARTS; h++) {
      const Floats scale = scales_at(w, at + h * LANES);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const float step = steps[m * PANEL + c];
        const int32_t total = totals[m * PANEL + c];
        float *to = result + m * ROWS + h * LANES;
        int32x4_t all = dot[m][h];
        if (w.zero_type == FEWBITS_ZERO_POINT)
          all = vmlsq_n_s32(all, zeros_at(w, at + h * LANES), total * (1 << (8 - BITS)));
        Floats level;
        if constexpr (BITS == 8)
          level = vcvtq_f32_s32(all);
        else
          level = vcvtq_n_f32_s32(all, 8 - BITS);
        Floats sum = vfmaq_f32(vld1q_f32(to), level, vmulq_n_f32(scale, step));
        if (w.zero_type == FEWBITS_OFFSET)
          sum = vfmsq_f32(sum, offsets_at(w, at + h * LANES), vdupq_n_f32(step * float(total)));
        vst1q_f32(to, sum);
      }
    }
  }
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
    if (x.rows <= MOST) return all_rows(packed);
    alignas(64) int8_t panel[WIDE * ROWS];
    for (int c = 0; c < p.chunks; c++)
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++)
        for (int h = 0; h < PARTS; h++) vst1q_s8(panel + c * 1024 + q * 128 + h * 16, packed(c, h, q));
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

// Of codes as floats: what is kept of a quad, and from it the values of column J. Here a code's byte becomes
// the top one of its lane, a number with 32-BITS digits after the point.
template <int BITS>
struct Counted {
  static uint8x16_t quad_of(const uint8_t *chunk, int h, int q) {
    return vreinterpretq_u8_s8(quad<BITS>(chunk, h, q));
  }
  // An index past the end of a table gives 0.
  template <int J>
  static Floats column(uint8x16_t v) {
    constexpr uint32_t a = 0x00ffffff + (uint32_t(J) << 24), step = 4u << 24;
    const uint32x4_t lanes = {a, a + step, a + 2 * step, a + 3 * step};
    const uint8x16_t top = vqtbl1q_u8(v, vreinterpretq_u8_u32(lanes));
    return vcvtq_n_f32_s32(vreinterpretq_s32_u8(top), 32 - BITS);
  }
};

// Codes of 4 bits that are looked up: the two bytes of a bfloat16, then both into the upper half of a lane.
struct Looked {
  uint8x16_t low, high;

  static Looked of(const float *table) {
    uint8_t bytes[2][16];
    for (int i = 0; i < 16; i++) {
      const uint16_t word = to_bf16(table[i]);
      bytes[0][i] = uint8_t(word);
      bytes[1][i] = uint8_t(word >> 8);
    }
    return {vld1q_u8(bytes[0]), vld1q_u8(bytes[1])};
  }
  uint8x16x2_t quad_of(const uint8_t *chunk, int h, int q) const {
    const uint8x16_t v = vld1q_u8(chunk + q / 2 * 128 + h * 16);
    const uint8x16_t code = q % 2 ? vshrq_n_u8(v, 4) : vandq_u8(v, vdupq_n_u8(15));
    return {{vqtbl1q_u8(low, code), vqtbl1q_u8(high, code)}};
  }
  template <int J>
  static Floats column(uint8x16x2_t v) {
    constexpr uint32_t a = 0x1000ffff + J * 0x01010000u, step = 0x04040000;
    const uint32x4_t lanes = {a, a + step, a + 2 * step, a + 3 * step};
    return vreinterpretq_f32_u8(vqtbl2q_u8(v, vreinterpretq_u8_u32(lanes)));
  }
};

// x is stored a c b d: where column J lies.
template <int J>
constexpr int place = J == 1 ? 2 : J == 2 ? 1 : J;

// With one row each product would wait for the one before: columns are summed apart.
template <int M>
constexpr int apart = M == 1 ? 4 : M == 2 ? 2 : 1;

constexpr int TILE = PARTS / 2;

template <int J, int M, class Values, class Quad>
inline void products(Quad v, const Floats (&xs)[M], int h, Floats (&dot)[apart<M>][M][TILE]) {
  const Floats value = Values::template column<J>(v);
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) {
    Floats &to = dot[J % apart<M>][m][h];
    to = vfmaq_laneq_f32(to, value, xs[m], place<J>);
  }
}

// M rows of x straight from the codes: one tile of 16 rows, one panel of columns, added to result (M, 32).
template <int BITS, int M, class Values>
inline void tile16(const fewbits_weight &w, int64_t block, const Values &values, const uint8_t *codes,
                   const Part &p, int tile, const uint16_t *x16, const float *sums, float *result) {
  for (int c = 0; c < p.chunks;) {
    const int64_t group = p.group(w, block, c), at = group * ROWS;
    Floats dot[apart<M>][M][TILE];
#pragma GCC unroll 4
    for (auto &part : dot)
#pragma GCC unroll 4
      for (auto &lanes : part)
#pragma GCC unroll 4
        for (auto &each : lanes) each = vdupq_n_f32(0);
    float total[M] = {};
    for (; c < p.chunks && p.group(w, block, c) == group; c++) {
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++) {
        Floats xs[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) xs[m] = from_words(vld1_u16(x16 + m * WIDE + c * CHUNK + q * 4));
#pragma GCC unroll 4
        for (int h = 0; h < TILE; h++) {
          const auto v = values.quad_of(codes + c * chunk_bytes(BITS), tile * TILE + h, q);
          products<0, M, Values>(v, xs, h, dot);
          products<1, M, Values>(v, xs, h, dot);
          products<2, M, Values>(v, xs, h, dot);
          products<3, M, Values>(v, xs, h, dot);
        }
      }
      for (int m = 0; m < M; m++) total[m] += sums[m * PANEL + c];
    }
#pragma GCC unroll 4
    for (int h = 0; h < TILE; h++) {
      const int64_t lanes = (tile * TILE + h) * LANES;
      const Floats scale = scales_at(w, at + lanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        float *to = result + m * ROWS + lanes;
        Floats all = dot[0][m][h];
#pragma GCC unroll 4
        for (int i = 1; i < apart<M>; i++) all = vaddq_f32(all, dot[i][m][h]);
        if (w.zero_type == FEWBITS_ZERO_POINT)
          all = vfmsq_f32(all, vcvtq_f32_s32(zeros_at(w, at + lanes)), vdupq_n_f32(total[m]));
        Floats sum = vfmaq_f32(vld1q_f32(to), all, scale);
        if (w.zero_type == FEWBITS_OFFSET)
          sum = vfmsq_f32(sum, offsets_at(w, at + lanes), vdupq_n_f32(total[m]));
        vst1q_f32(to, sum);
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
      Floats zero = vdupq_n_f32(0), offset = zero;
      if (w.zero_type == FEWBITS_ZERO_POINT) zero = vcvtq_f32_s32(zeros_at(w, at + h * LANES));
      if (w.zero_type == FEWBITS_OFFSET) offset = vnegq_f32(offsets_at(w, at + h * LANES));
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++) {
        const auto v = values.quad_of(codes + c * chunk_bytes(BITS), h, q);
        float *to = panel + q * 4 * ROWS + h * LANES;
        const auto made = [&](Floats level) { return vfmaq_f32(offset, vsubq_f32(level, zero), scale); };
        vst1q_f32(to, made(Values::template column<0>(v)));
        vst1q_f32(to + ROWS, made(Values::template column<1>(v)));
        vst1q_f32(to + 2 * ROWS, made(Values::template column<2>(v)));
        vst1q_f32(to + 3 * ROWS, made(Values::template column<3>(v)));
      }
    }
  }
}

template <int J, int M>
inline void products_of_floats(const float *panel, const Floats (&xs)[M], Floats (&sum)[M][PARTS]) {
#pragma GCC unroll 8
  for (int h = 0; h < PARTS; h++) {
    const Floats v = vld1q_f32(panel + J * ROWS + h * LANES);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) sum[m][h] = vfmaq_laneq_f32(sum[m][h], v, xs[m], place<J>);
  }
}

// M rows of x times weights (columns, 32), added to result (M, 32).
template <int M>
[[gnu::noinline]] void rows_of_floats(const float *panel, int chunks, const uint16_t *x16, float *result) {
  Floats sum[M][PARTS];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int h = 0; h < PARTS; h++) sum[m][h] = vld1q_f32(result + m * ROWS + h * LANES);
  for (int i = 0; i < chunks * CHUNK; i += 4, panel += 4 * ROWS) {
    Floats xs[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) xs[m] = from_words(vld1_u16(x16 + m * WIDE + i));
    products_of_floats<0, M>(panel, xs, sum);
    products_of_floats<1, M>(panel, xs, sum);
    products_of_floats<2, M>(panel, xs, sum);
    products_of_floats<3, M>(panel, xs, sum);
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int h = 0; h < PARTS; h++) vst1q_f32(result + m * ROWS + h * LANES, sum[m][h]);
}

template <int BITS, class Values>
void block16(const fewbits_weight &w, int64_t block, const Values &values, const Inputs &x, float *result) {
  std::memset(result, 0, x.rows * ROWS * sizeof(float));
  each_panel<BITS>(w, block, [&](const Part &p, const uint8_t *codes) {
    const uint16_t *x16 = x.x16 + p.panel * x.rows * WIDE;
    const float *sums = x.sums + p.panel * x.rows * PANEL;
    if (x.rows <= MOST)
      return each_rows(x.rows, [&](auto count, int64_t) {
        for (int tile = 0; tile < 2; tile++)
          tile16<BITS, decltype(count)::value>(w, block, values, codes, p, tile, x16, sums, result);
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

void round8(const float *x, int64_t n, int8_t *x8, float *scales, int32_t *totals) {
  for (int64_t c = 0; c < n / CHUNK; c++, x += CHUNK, x8 += CHUNK) {
    Floats v[8], most = vdupq_n_f32(0), odd = vdupq_n_f32(0);
    for (int i = 0; i < 8; i++) {
      v[i] = vld1q_f32(x + i * 4);
      most = vmaxq_f32(most, vabsq_f32(v[i]));
      odd = vaddq_f32(odd, vsubq_f32(v[i], v[i]));
    }
    // A NaN or an infinity must not vanish: the scale is then NaN, and so is the row of the result.
    const bool finite = vminvq_u32(vceqq_f32(odd, odd)) != 0;
    const float size = vmaxvq_f32(most);
    const float times = finite && size >= LEAST_INPUT ? 127 / size : 0;
    int32x4_t level[8], total = vdupq_n_s32(0);
    for (int i = 0; i < 8; i++) {
      level[i] = finite ? vcvtnq_s32_f32(vmulq_n_f32(v[i], times)) : vdupq_n_s32(0);
      total = vaddq_s32(total, level[i]);
    }
    for (int i = 0; i < 8; i += 2) {
      const int16x8_t words = vcombine_s16(vmovn_s32(level[i]), vmovn_s32(level[i + 1]));
      vst1_s8(x8 + i * 4, vmovn_s16(words));
    }
    scales[c] = finite ? size / 127 : __builtin_nanf("");
    totals[c] = vaddvq_s32(total);
  }
}

void round16(const float *x, int64_t n, uint16_t *x16, float *sums) {
  const uint8x8_t order = {0, 1, 4, 5, 2, 3, 6, 7};  // a c b d
  for (int64_t c = 0; c < n / CHUNK; c++) {
    Floats sum = vdupq_n_f32(0);
    for (int i = 0; i < CHUNK; i += 4, x += 4, x16 += 4) {
      const Floats v = vld1q_f32(x);
      const uint32x4_t bits = vreinterpretq_u32_f32(v);
      const uint32x4_t last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      // To nearest, ties to even; a NaN keeps its upper half, made quiet.
      const uint32x4_t up = vaddq_u32(bits, vaddq_u32(last, vdupq_n_u32(0x7fff)));
      const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
      const uint16x4_t words = vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), up, quiet), 16);
      sum = vaddq_f32(sum, from_words(words));
      vst1_u16(x16, vreinterpret_u16_u8(vtbl1_u8(vreinterpret_u8_u16(words), order)));
    }
    sums[c] = vaddvq_f32(sum);
  }
}

}  // namespace

const Isa *neon() {
  static const Isa isa{product16, product8, round8, round16};
#ifdef __linux__
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? &isa : nullptr;
#else
  return &isa;  // Apple's processors have had dot products since they run macOS
#endif
}

}  // namespace fewbits
