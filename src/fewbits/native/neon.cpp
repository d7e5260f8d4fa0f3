// NEON with dot products. A vector is 4 rows of W times four columns of a byte each, or two of 16 bits, so
// that a sum needs little adding across lanes. A block is two tiles of four such vectors.

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

#include "columns.h"
#include "grid.h"
#include "kernel.h"
#include "viterbi.h"

namespace fewbits {
namespace {

using Bytes = uint8x16_t;
using Floats = float32x4_t;

constexpr int LANES = 4, PARTS = ROWS / LANES, TILE = PARTS / 2;

// -- codes -------------------------------------------------------------------------------------------

inline Bytes shifted(Bytes v, int bits) {
  return bits ? vreinterpretq_u8_u16(vshlq_u16(vreinterpretq_u16_u8(v), vdupq_n_s16(int16_t(-bits)))) : v;
}

// The vector that holds columns 4q to 4q+3 of a chunk, for part `h` of the rows.
template <int BITS>
inline Bytes stored(const uint8_t *chunk, int h, int q) {
  constexpr int quads = BITS == 3 ? 4 : 8 / BITS;
  return vld1q_u8(chunk + q / quads * (BITS == 3 ? 192 : 128) + h * 16);
}

// Those columns, a byte each.
template <int BITS>
inline Bytes quad(const uint8_t *chunk, int h, int q) {
  const Bytes v = stored<BITS>(chunk, h, q);
  if constexpr (BITS == 8) {
    return v;
  } else if constexpr (BITS == 3) {
    const uint8_t *high = chunk + q / 4 * 192 + 128 + h / 4 * 32 + q % 4 * 8 + h % 4 * 2;  // a bit for a byte
    const Bytes own = vcombine_u8(vld1_dup_u8(high), vld1_dup_u8(high + 1));
    const Bytes bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    const Bytes low = vandq_u8(shifted(v, q % 4 * 2), vdupq_n_u8(3));
    return vorrq_u8(low, vandq_u8(vtstq_u8(own, bit), vdupq_n_u8(4)));
  } else {
    constexpr int quads = 8 / BITS;
    return vandq_u8(shifted(v, q % quads * BITS), vdupq_n_u8((1 << BITS) - 1));
  }
}

// The even columns of a quad, or the odd ones, 16 bits each.
template <int BITS>
inline Bytes pair(const uint8_t *chunk, int h, int q, int odd) {
  const Bytes bytes = vreinterpretq_u8_u16(vdupq_n_u16(BITS == 3 ? 255 : (1 << BITS) - 1));
  if constexpr (BITS == 3) {
    const Bytes v = quad<3>(chunk, h, q);
    return odd ? shifted(v, 8) : vandq_u8(v, bytes);
  } else {
    const int shift = q % (8 / BITS) * BITS + odd * 8;
    const Bytes v = shifted(stored<BITS>(chunk, h, q), shift);
    return shift + BITS == 16 ? v : vandq_u8(v, bytes);
  }
}

// -- scales and zero points --------------------------------------------------------------------------

inline Floats scales_at(const fewbits_weight &w, int64_t at) {
  if (w.scale_type == FEWBITS_F32) return vld1q_f32(static_cast<const float *>(w.scales) + at);
  const uint16x4_t half = vld1_u16(static_cast<const uint16_t *>(w.scales) + at);
  if (w.scale_type == FEWBITS_F16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
  return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

// As distances from the middle.
inline int32x4_t zeros_at(const fewbits_weight &w, int64_t at) {
  int32_t four;
  std::memcpy(&four, static_cast<const int8_t *>(w.zeros) + at, 4);
  return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}

inline Floats offsets_at(const fewbits_weight &w, int64_t at) {
  return vld1q_f32(static_cast<const float *>(w.zeros) + at);
}

// -- how inputs are multiplied -----------------------------------------------------------------------

// A unit is four bytes of x, repeated. Products are of signed bytes: codes of 8 bits are made signed.
template <int BITS>
struct Eight {
  using Input = int8_t;
  static constexpr int units = 8;        // of a chunk
  static constexpr int summed = SUMMED;  // chunks that are summed before they are scaled
  static const Input *inputs(const Inputs &x) { return x.x8; }
  static int middle(const Inputs &x) { return BITS == 8 ? 0 : x.middle; }
  Bytes codes(const uint8_t *chunk, int h, int unit) const {
    const Bytes v = quad<BITS>(chunk, h, unit);
    return BITS == 8 ? veorq_u8(v, vdupq_n_u8(128)) : v;
  }
  struct Sum {
    int32x4_t all = vdupq_n_s32(0);
    void add(Bytes codes, int32x4_t x) {
      all = vdotq_s32(all, vreinterpretq_s8_u8(codes), vreinterpretq_s8_s32(x));
    }
    int32x4_t whole() const { return all; }
  };
};

// A row's two products stay in two lanes, which are added in the end.
template <int BITS>
struct Sixteen {
  using Input = int16_t;
  static constexpr int units = 16, summed = SUMMED;
  static const Input *inputs(const Inputs &x) { return x.x16; }
  static int middle(const Inputs &x) { return x.middle; }
  Bytes codes(const uint8_t *chunk, int h, int unit) const {
    return pair<BITS>(chunk, h, unit / 2, unit % 2);
  }
  struct Sum {
    int32x4_t low = vdupq_n_s32(0), high = vdupq_n_s32(0);
    void add(Bytes codes, int32x4_t x) {
      const int16x8_t level = vreinterpretq_s16_u8(codes), input = vreinterpretq_s16_s32(x);
      low = vmlal_s16(low, vget_low_s16(level), vget_low_s16(input));
      high = vmlal_high_s16(high, level, input);
    }
    int32x4_t whole() const { return vpaddq_s32(low, high); }
  };
};

// Codes of 4 bits that stand for the entries of a table: their lower and their upper bytes are looked up.
struct Table : Sixteen<4> {
  static constexpr int summed = 1;
  Bytes low, high;

  explicit Table(const int16_t *table) {
    uint8_t bytes[2][16];
    for (int i = 0; i < 16; i++) {
      bytes[0][i] = uint8_t(table[i]);
      bytes[1][i] = uint8_t(table[i] >> 8);
    }
    low = vld1q_u8(bytes[0]);
    high = vld1q_u8(bytes[1]);
  }
  Bytes codes(const uint8_t *chunk, int h, int unit) const {
    const Bytes code = quad<4>(chunk, h, unit / 2);
    const Bytes lower = vqtbl1q_u8(low, code), upper = vqtbl1q_u8(high, code);
    return unit % 2 ? vtrn2q_u8(lower, upper) : vtrn1q_u8(lower, upper);
  }
};

// -- where codes come from ---------------------------------------------------------------------------

// A block as it is stored.
template <class Mode, int BITS>
struct Stored {
  const Mode &mode;
  const uint8_t *from;
  Bytes operator()(int chunk, int h, int unit) const {
    return mode.codes(from + chunk * chunk_bytes(BITS), h, unit);
  }
};

// A panel that was unpacked, since many rows of x go through it.
template <class Mode>
struct Panel {
  alignas(64) uint8_t vectors[PANEL * Mode::units * PARTS * 16];
  Bytes operator()(int chunk, int h, int unit) const {
    return vld1q_u8(vectors + ((chunk * Mode::units + unit) * PARTS + h) * 16);
  }

  template <class Source>
  void fill(const Source &source, int chunks) {
    for (int c = 0; c < chunks; c++)
#pragma GCC unroll 16
      for (int unit = 0; unit < Mode::units; unit++)
        for (int h = 0; h < PARTS; h++)
          vst1q_u8(vectors + ((c * Mode::units + unit) * PARTS + h) * 16, source(c, h, unit));
  }
};

// -- a trellis ---------------------------------------------------------------------------------------

// 256 bytes; what lies outside of the 64 that a lookup knows stays as it was.
struct Values {
  uint8x16x4_t part[4];

  explicit Values(const int8_t *table) {
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++) 
        part[i].val[j] = veorq_u8(vreinterpretq_u8_s8(vld1q_s8(table + 64 * i + 16 * j)), vdupq_n_u8(MIDDLE_8));
  }
  Bytes operator()(Bytes window) const {
    Bytes result = vqtbl4q_u8(part[0], window);
    result = vqtbx4q_u8(result, part[1], vsubq_u8(window, vdupq_n_u8(64)));
    result = vqtbx4q_u8(result, part[2], vsubq_u8(window, vdupq_n_u8(128)));
    return vqtbx4q_u8(result, part[3], vsubq_u8(window, vdupq_n_u8(192)));
  }
};

// Codes of the rows N before, times 2^(N * BITS), as far as that fits 8 bits, are added to a window.
template <int BITS, int N>
inline Bytes with_before(Bytes window, Bytes own, Bytes last) {
  if constexpr (N * BITS < 8) {
    const Bytes before = vextq_u8(last, own, 16 - 4 * N);
    return with_before<BITS, N + 1>(vorrq_u8(window, vshlq_n_u8(before, N * BITS)), own, last);
  } else {
    return window;
  }
}

template <int BITS>
void look_up_of(const uint8_t *codes, int chunks, const Values &values, uint8_t *result) {
  for (int c = 0; c < chunks; c++, codes += chunk_bytes(BITS))
#pragma GCC unroll 8
    for (int q = 0; q < 8; q++) {
      Bytes last = quad<BITS>(codes, PARTS - 1, q);
      for (int h = 0; h < PARTS; h++, result += 16) {
        const Bytes own = quad<BITS>(codes, h, q);
        vst1q_u8(result, values(with_before<BITS, 1>(own, own, last)));
        last = own;
      }
    }
}

void look_up(const uint8_t *codes, int bits, int chunks, const int8_t *table, uint8_t *result) {
  const Values values(table);
  switch (bits) {
    case 2: return look_up_of<2>(codes, chunks, values, result);
    case 3: return look_up_of<3>(codes, chunks, values, result);
    default: return look_up_of<4>(codes, chunks, values, result);
  }
}

// -- products ----------------------------------------------------------------------------------------

// M rows of x from `row` on times one panel of a block, added to result (M, 32). (Loops that a compiler
// unrolls too late would keep the sums in memory.)
template <class Mode, int M, class Source>
inline void rows(const fewbits_weight &w, const Source &source, int64_t panel, Segments<Mode::summed> part,
                 const Inputs &x, int64_t row, float *result) {
  const int64_t from = panel * x.rows + row;
  const typename Mode::Input *inputs = Mode::inputs(x) + from * WIDE;
  while (part.next()) {
    int32_t total[M] = {};
    for (int m = 0; m < M; m++)
      for (int c = part.begin; c < part.end; c++) total[m] += x.totals[(from + m) * PANEL + c];
    for (int tile = 0; tile < 2; tile++) {
      typename Mode::Sum dot[M][TILE];
      for (int c = part.begin; c < part.end; c++) {
#pragma GCC unroll 16
        for (int unit = 0; unit < Mode::units; unit++) {
          int32x4_t xs[M];
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) {
            int32_t four;
            std::memcpy(&four, reinterpret_cast<const uint8_t *>(inputs + m * WIDE + c * CHUNK) + unit * 4, 4);
            xs[m] = vdupq_n_s32(four);
          }
#pragma GCC unroll 4
          for (int h = 0; h < TILE; h++) {
            const Bytes codes = source(c, tile * TILE + h, unit);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) dot[m][h].add(codes, xs[m]);
          }
        }
      }
#pragma GCC unroll 4
      for (int h = 0; h < TILE; h++) {
        const int64_t lanes = (tile * TILE + h) * LANES, at = part.scales() + lanes;
        const Floats scale = scales_at(w, at);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
          const float step = x.scales[(from + m) * PANEL + part.begin];
          float *to = result + m * ROWS + lanes;
          int32x4_t all = vsubq_s32(dot[m][h].whole(), vdupq_n_s32(total[m] * Mode::middle(x)));
          if (w.zero_type == FEWBITS_ZERO_POINT) all = vmlsq_n_s32(all, zeros_at(w, at), total[m]);
          Floats sum = vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(all), vmulq_n_f32(scale, step));
          if (w.zero_type == FEWBITS_OFFSET)
            sum = vfmsq_f32(sum, offsets_at(w, at), vdupq_n_f32(step * float(total[m])));
          vst1q_f32(to, sum);
        }
      }
    }
  }
}

// Rows of x at a time: their sums fill 24 of the 32 registers, in 16 bit.
constexpr int MOST = 3;

template <class Source, class Mode>
void product_of(const Mode &mode, const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  const int64_t chunks = w.columns / CHUNK;
  BlockCodes panels(w, block, x);
  std::memset(result, 0, x.rows * ROWS * sizeof(float));
  for (int64_t panel = 0; panel * PANEL < chunks; panel++) {
    const Segments<Mode::summed> part(w, block, panel);
    const Source stored{mode, panels.next(part.count)};
    const auto some = [&](auto number, const auto &source, int64_t row) {
      rows<Mode, decltype(number)::value>(w, source, panel, part, x, row, result + row * ROWS);
    };
    const auto all = [&](const auto &source) {
      int64_t row = 0;
      for (; x.rows - row >= MOST; row += MOST) some(std::integral_constant<int, MOST>(), source, row);
      if (x.rows - row == 2) some(std::integral_constant<int, 2>(), source, row);
      if (x.rows - row == 1) some(std::integral_constant<int, 1>(), source, row);
    };
    if (x.rows <= MOST) {
      all(stored);
    } else {
      Panel<Mode> unpacked;
      unpacked.fill(stored, part.count);
      all(unpacked);
    }
  }
}

template <template <int> class Mode>
void product(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  if (x.look_up) return product_of<Stored<Mode<8>, 8>, Mode<8>>({}, w, block, x, result);
  switch (w.bits) {
    case 2: return product_of<Stored<Mode<2>, 2>, Mode<2>>({}, w, block, x, result);
    case 3: return product_of<Stored<Mode<3>, 3>, Mode<3>>({}, w, block, x, result);
    case 4: return product_of<Stored<Mode<4>, 4>, Mode<4>>({}, w, block, x, result);
    default: return product_of<Stored<Mode<8>, 8>, Mode<8>>({}, w, block, x, result);
  }
}

void product16(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  if (x.table) return product_of<Stored<Table, 4>>(Table(x.table), w, block, x, result);
  product<Sixteen>(w, block, x, result);
}

// -- inputs ------------------------------------------------------------------------------------------

inline Step range(const float *x, int64_t n, int bits) {
  Floats size = vdupq_n_f32(0), odd = vdupq_n_f32(0);
  for (int64_t i = 0; i < n; i += 4) {
    const Floats v = vld1q_f32(x + i);
    size = vmaxq_f32(size, vabsq_f32(v));
    odd = vaddq_f32(odd, vsubq_f32(v, v));  // NaN where v is not finite
  }
  return step_of(vmaxvq_f32(size), vminvq_u32(vceqq_f32(odd, odd)) != 0, bits);
}

// Eight columns as integers, which are added to a sum; zeros where the factor is 0. (NaN becomes 0.)
inline int16x8_t integers(const float *x, const Step &s, int32x4_t &sum) {
  const int32x4_t most = vdupq_n_s32(MOST_16);
  const int32x4_t a = vminq_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x), s.factor)), most);
  const int32x4_t b = vminq_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4), s.factor)), most);
  sum = vaddq_s32(sum, vaddq_s32(a, b));
  return vcombine_s16(vmovn_s32(a), vmovn_s32(b));
}

void round8(const float *x, int64_t n, int64_t columns, int8_t *x8, float *scales, int32_t *totals) {
  for (int64_t begin = 0; begin < n; begin += columns) {
    const int64_t end = begin + columns < n ? begin + columns : n;
    const Step r = range(x + begin, end - begin, 8);
    for (int64_t c = begin / CHUNK; c < end / CHUNK; c++) {
      int32x4_t sum = vdupq_n_s32(0);
      for (int64_t i = c * CHUNK; i < (c + 1) * CHUNK; i += 8) vst1_s8(x8 + i, vmovn_s16(integers(x + i, r, sum)));
      scales[c] = r.step;
      totals[c] = vaddvq_s32(sum);
    }
  }
}

void round16(const float *x, int64_t n, int64_t columns, int16_t *x16, float *scales, int32_t *totals) {
  const Bytes acbd = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
  for (int64_t begin = 0; begin < n; begin += columns) {
    const int64_t end = begin + columns < n ? begin + columns : n;
    const Step r = range(x + begin, end - begin, 16);
    for (int64_t c = begin / CHUNK; c < end / CHUNK; c++) {
      int32x4_t sum = vdupq_n_s32(0);
      for (int64_t i = c * CHUNK; i < (c + 1) * CHUNK; i += 8) {
        const Bytes words = vreinterpretq_u8_s16(integers(x + i, r, sum));
        vst1q_s16(x16 + i, vreinterpretq_s16_u8(vqtbl1q_u8(words, acbd)));
      }
      scales[c] = r.step;
      totals[c] = vaddvq_s32(sum);
    }
  }
}

struct Lanes {
  using Vector = float32x4_t;
  static constexpr int WIDTH = 4;
  static Vector load(const float *x) { return vld1q_f32(x); }
  static void store(float *x, Vector v) { vst1q_f32(x, v); }
  static Vector all(float x) { return vdupq_n_f32(x); }
  static Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
};

}  // namespace

const Isa *neon() {
  static const Isa isa{product16, product<Eight>, round8, round16, round_columns<Lanes>, grid_errors,
                       some_chains, look_up, {}, load_some, store_rows};
#ifdef __linux__
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? &isa : nullptr;
#else
  return &isa;  // Apple's processors have had dot products since they run macOS
#endif
}

}  // namespace fewbits
