// AVX2. A vector is 8 rows of W times four columns of a byte each, or two of 16 bits, so that a sum needs
// no adding across lanes: a lane is a row. A block is four such vectors wide.
#include <cpuid.h>
#include <immintrin.h>

#include <type_traits>

#include "columns.h"
#include "grid.h"
#include "kernel.h"
#include "viterbi.h"

namespace fewbits {
namespace {

using Ints = __m256i;
using Floats = __m256;

constexpr int LANES = 8, PARTS = ROWS / LANES;

inline Ints load_ints(const void *from) { return _mm256_loadu_si256(static_cast<const Ints *>(from)); }

// -- codes -------------------------------------------------------------------------------------------

inline Ints shifted(Ints v, int bits) { return bits ? _mm256_srli_epi16(v, bits) : v; }

// The vector that holds columns 4q to 4q+3 of a chunk, for part `h` of the rows.
template <int BITS>
inline Ints stored(const uint8_t *chunk, int h, int q) {
  constexpr int quads = BITS == 3 ? 4 : 8 / BITS;
  return load_ints(chunk + q / quads * (BITS == 3 ? 192 : 128) + h * 32);
}

// Those columns, a byte each.
template <int BITS>
inline Ints quad(const uint8_t *chunk, int h, int q) {
  const Ints v = stored<BITS>(chunk, h, q);
  if constexpr (BITS == 8) {
    return v;
  } else if constexpr (BITS == 3) {
    int32_t high;  // a bit for a byte
    std::memcpy(&high, chunk + q / 4 * 192 + 128 + h / 2 * 32 + q % 4 * 8 + h % 2 * 4, 4);
    const Ints spread = _mm256_setr_epi32(0, 0, 0x01010101, 0x01010101, 0x02020202, 0x02020202, 0x03030303,
                                          0x03030303);
    const Ints bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const Ints own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(high), spread), bit);
    return _mm256_or_si256(_mm256_and_si256(shifted(v, q % 4 * 2), _mm256_set1_epi8(3)),
                           _mm256_and_si256(_mm256_cmpeq_epi8(own, bit), _mm256_set1_epi8(4)));
  } else {
    constexpr int quads = 8 / BITS;
    return _mm256_and_si256(shifted(v, q % quads * BITS), _mm256_set1_epi8((1 << BITS) - 1));
  }
}

// The even columns of a quad, or the odd ones, 16 bits each.
template <int BITS>
inline Ints pair(const uint8_t *chunk, int h, int q, int odd) {
  if constexpr (BITS == 3) {
    const Ints v = quad<3>(chunk, h, q);
    return odd ? _mm256_srli_epi16(v, 8) : _mm256_and_si256(v, _mm256_set1_epi16(255));
  } else {
    const Ints v = stored<BITS>(chunk, h, q);
    const int shift = q % (8 / BITS) * BITS + odd * 8;
    if (shift + BITS == 16) return _mm256_srli_epi16(v, shift);
    return _mm256_and_si256(shifted(v, shift), _mm256_set1_epi16((1 << BITS) - 1));
  }
}

// -- scales and zero points --------------------------------------------------------------------------

inline Floats scales_at(const fewbits_weight &w, int64_t at) {
  if (w.scale_type == FEWBITS_F32) return _mm256_loadu_ps(static_cast<const float *>(w.scales) + at);
  auto from = reinterpret_cast<const __m128i *>(static_cast<const uint16_t *>(w.scales) + at);
  const __m128i half = _mm_loadu_si128(from);
  if (w.scale_type == FEWBITS_F16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// As distances from the middle.
inline Ints zeros_at(const fewbits_weight &w, int64_t at) {
  auto from = reinterpret_cast<const __m128i *>(static_cast<const int8_t *>(w.zeros) + at);
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(from));
}

inline Floats offsets_at(const fewbits_weight &w, int64_t at) {
  return _mm256_loadu_ps(static_cast<const float *>(w.zeros) + at);
}

// -- how inputs are multiplied -----------------------------------------------------------------------

inline Ints pairs_added(Ints v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }

// A unit is four bytes of x. Products are of unsigned and signed bytes, two of them added to 16 bits.
template <int BITS>
struct Eight {
  using Input = int8_t;
  static constexpr int units = 8;        // of a chunk
  static constexpr int summed = SUMMED;  // chunks that are summed before they are scaled
  static constexpr bool narrow = true;   // those of one in 16 bits
  static const Input *inputs(const Inputs &x) { return x.x8; }
  static int middle(const Inputs &x) { return x.middle; }
  Ints codes(const uint8_t *chunk, int h, int unit) const { return quad<BITS>(chunk, h, unit); }
  // The sums of a chunk fit 16 bits: 16 products of at most 15 * 127.
  static Ints dot(Ints sum, Ints codes, Ints x) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
  }
};

// Two products of unsigned codes of 8 bits may not fit: codes are signed, and their signs moved to x.
template <>
struct Eight<8> {
  using Input = int8_t;
  static constexpr int units = 8, summed = SUMMED;
  static constexpr bool narrow = false;
  static const Input *inputs(const Inputs &x) { return x.x8; }
  static int middle(const Inputs &) { return 0; }
  Ints codes(const uint8_t *chunk, int h, int unit) const {
    return _mm256_xor_si256(quad<8>(chunk, h, unit), _mm256_set1_epi8(-128));
  }
  static Ints dot(Ints sum, Ints codes, Ints x) {
    const Ints two = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
    return _mm256_add_epi32(sum, pairs_added(two));
  }
};

template <int BITS>
struct Sixteen {
  using Input = int16_t;
  static constexpr int units = 16, summed = SUMMED;
  static constexpr bool narrow = false;
  static const Input *inputs(const Inputs &x) { return x.x16; }
  static int middle(const Inputs &x) { return x.middle; }
  Ints codes(const uint8_t *chunk, int h, int unit) const { return pair<BITS>(chunk, h, unit / 2, unit % 2); }
  static Ints dot(Ints sum, Ints codes, Ints x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, x)); }
};

// Codes of 4 bits that stand for the entries of a table: their lower and their upper bytes are looked up.
struct Table : Sixteen<4> {
  static constexpr int summed = 1;
  Ints low, high;

  explicit Table(const int16_t *table) {
    alignas(16) uint8_t bytes[2][16];
    for (int i = 0; i < 16; i++) {
      bytes[0][i] = uint8_t(table[i]);
      bytes[1][i] = uint8_t(table[i] >> 8);
    }
    low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(bytes[0])));
    high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(bytes[1])));
  }
  Ints codes(const uint8_t *chunk, int h, int unit) const {
    const Ints code = quad<4>(chunk, h, unit / 2);
    const Ints lower = _mm256_shuffle_epi8(low, code), upper = _mm256_shuffle_epi8(high, code);
    const Ints bytes = _mm256_set1_epi16(255);
    if (unit % 2) return _mm256_or_si256(_mm256_srli_epi16(lower, 8), _mm256_andnot_si256(bytes, upper));
    return _mm256_or_si256(_mm256_and_si256(lower, bytes), _mm256_slli_epi16(upper, 8));
  }
};

// -- where codes come from ---------------------------------------------------------------------------

// Codes are asked for this many bytes before they are needed, as in avx512.cpp.
constexpr int AHEAD = 3072;

// A block as it is stored.
template <class Mode, int BITS>
struct Stored {
  const Mode &mode;
  const uint8_t *from;
  Ints operator()(int chunk, int h, int unit) const {
    return mode.codes(from + chunk * chunk_bytes(BITS), h, unit);
  }
  void fetch(int chunk) const {
    const uint8_t *next = from + chunk * chunk_bytes(BITS) + AHEAD;
    for (int i = 0; i < chunk_bytes(BITS); i += 64)
      _mm_prefetch(reinterpret_cast<const char *>(next + i), _MM_HINT_T0);
  }
};

// A panel of a trellis that was looked up.
template <class Mode>
struct LookedUp : Stored<Mode, 8> {
  void fetch(int) const {}
};

// A panel that was unpacked, since many rows of x go through it.
template <class Mode>
struct Panel {
  alignas(64) uint8_t vectors[PANEL * Mode::units * PARTS * 32];
  Ints operator()(int chunk, int h, int unit) const {
    return load_ints(vectors + ((chunk * Mode::units + unit) * PARTS + h) * 32);
  }
  void fetch(int) const {}

  template <class Source>
  void fill(const Source &source, int chunks) {
    for (int c = 0; c < chunks; c++)
#pragma GCC unroll 16
      for (int unit = 0; unit < Mode::units; unit++)
        for (int h = 0; h < PARTS; h++)
          _mm256_store_si256(reinterpret_cast<Ints *>(vectors + ((c * Mode::units + unit) * PARTS + h) * 32),
                             source(c, h, unit));
  }
};

// -- a trellis ---------------------------------------------------------------------------------------

// 256 bytes in tables of 16, each twice in a vector.
struct Values {
  Ints part[16];

  explicit Values(const int8_t *table) {
    for (int i = 0; i < 16; i++) {
      const __m128i own = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table + 16 * i));
      part[i] = _mm256_broadcastsi128_si256(_mm_xor_si128(own, _mm_set1_epi8(char(MIDDLE_8))));
    }
  }

  // A lookup goes by the lowest four bits, and gives 0 where the highest is set: one of two is not.
  struct Window {
    Ints low, high, bit4, bit5, bit6;  // each highest in its byte
  };
  Ints pair(const Window &w, int i) const {
    return _mm256_or_si256(_mm256_shuffle_epi8(part[i], w.low), _mm256_shuffle_epi8(part[i + 8], w.high));
  }
  Ints four(const Window &w, int i) const { return _mm256_blendv_epi8(pair(w, i), pair(w, i + 1), w.bit4); }
  Ints eight(const Window &w, int i) const { return _mm256_blendv_epi8(four(w, i), four(w, i + 2), w.bit5); }

  Ints operator()(Ints window) const {
    const Ints low = _mm256_and_si256(window, _mm256_set1_epi8(char(0x8F)));
    const Ints high = _mm256_xor_si256(low, _mm256_set1_epi8(char(0x80)));
    const Window w{low, high, _mm256_slli_epi16(window, 3), _mm256_slli_epi16(window, 2),
                   _mm256_slli_epi16(window, 1)};
    return _mm256_blendv_epi8(eight(w, 0), eight(w, 4), w.bit6);
  }
};

// Codes of the rows N before, times 2^(N * BITS), as far as that fits 8 bits, are added to a window.
template <int BITS, int N>
inline void add_before(const Ints *codes, Ints *windows) {
  if constexpr (N * BITS < 8) {
    const Ints order = _mm256_and_si256(_mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                                         _mm256_set1_epi32(8 - N)), _mm256_set1_epi32(7));
    Ints turned[PARTS];
    for (int h = 0; h < PARTS; h++) {
      const Ints kept = _mm256_and_si256(codes[h], _mm256_set1_epi8(char(255 >> N * BITS)));
      turned[h] = _mm256_permutevar8x32_epi32(_mm256_slli_epi16(kept, N * BITS), order);
    }
    for (int h = 0; h < PARTS; h++) {
      const Ints before = _mm256_blend_epi32(turned[h], turned[(h + PARTS - 1) % PARTS], (1 << N) - 1);
      windows[h] = _mm256_or_si256(windows[h], before);
    }
    add_before<BITS, N + 1>(codes, windows);
  }
}

template <int BITS>
void look_up_of(const uint8_t *codes, int chunks, const Values &values, uint8_t *result) {
  for (int c = 0; c < chunks; c++, codes += chunk_bytes(BITS)) {
    for (int i = 0; i < chunk_bytes(BITS); i += 64)
      _mm_prefetch(reinterpret_cast<const char *>(codes + AHEAD + i), _MM_HINT_T0);
#pragma GCC unroll 8
    for (int q = 0; q < 8; q++) {
      Ints own[PARTS], windows[PARTS];
      for (int h = 0; h < PARTS; h++) windows[h] = own[h] = quad<BITS>(codes, h, q);
      add_before<BITS, 1>(own, windows);
      for (int h = 0; h < PARTS; h++, result += 32)
        _mm256_store_si256(reinterpret_cast<Ints *>(result), values(windows[h]));
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
    Ints dot[M][PARTS], wide[M][PARTS];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int h = 0; h < PARTS; h++) dot[m][h] = wide[m][h] = _mm256_setzero_si256();
    int32_t total[M] = {};
    for (int c = part.begin; c < part.end; c++, inputs += CHUNK) {
      source.fetch(c);
#pragma GCC unroll 16
      for (int unit = 0; unit < Mode::units; unit++) {
        Ints xs[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
          int32_t four;
          std::memcpy(&four, reinterpret_cast<const uint8_t *>(inputs + m * WIDE) + unit * 4, 4);
          xs[m] = _mm256_set1_epi32(four);
        }
#pragma GCC unroll 4
        for (int h = 0; h < PARTS; h++) {
          const Ints codes = source(c, h, unit);
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) dot[m][h] = Mode::dot(dot[m][h], codes, xs[m]);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) total[m] += x.totals[(from + m) * PANEL + c];
      if constexpr (Mode::narrow)
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
          for (int h = 0; h < PARTS; h++) {
            wide[m][h] = _mm256_add_epi32(wide[m][h], pairs_added(dot[m][h]));
            dot[m][h] = _mm256_setzero_si256();
          }
    }
#pragma GCC unroll 4
    for (int h = 0; h < PARTS; h++) {
      const int64_t at = part.scales() + h * LANES;
      const Floats scale = scales_at(w, at);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const float step = x.scales[(from + m) * PANEL + part.begin];
        float *to = result + m * ROWS + h * LANES;
        const Ints sums = Mode::narrow ? wide[m][h] : dot[m][h];
        Ints all = _mm256_sub_epi32(sums, _mm256_set1_epi32(total[m] * Mode::middle(x)));
        if (w.zero_type == FEWBITS_ZERO_POINT)
          all = _mm256_sub_epi32(all, _mm256_mullo_epi32(zeros_at(w, at), _mm256_set1_epi32(total[m])));
        const Floats both = _mm256_mul_ps(scale, _mm256_set1_ps(step));
        Floats sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(all), both, _mm256_loadu_ps(to));
        if (w.zero_type == FEWBITS_OFFSET)
          sum = _mm256_fnmadd_ps(offsets_at(w, at), _mm256_set1_ps(step * float(total[m])), sum);
        _mm256_storeu_ps(to, sum);
      }
    }
  }
}

// Rows of x at a time: their sums fill 12 of the 16 registers.
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
  if (x.look_up) return product_of<LookedUp<Mode<8>>, Mode<8>>({}, w, block, x, result);
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

inline float largest_of(Floats v) {
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_shuffle_ps(most, most, 1)));
}

inline int32_t sum_of(Ints v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

inline Step range(const float *x, int64_t n, int bits) {
  Floats size = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i += 8) {
    const Floats v = _mm256_loadu_ps(x + i);
    size = _mm256_max_ps(size, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v));
    odd = _mm256_add_ps(odd, _mm256_sub_ps(v, v));  // NaN where v is not finite
  }
  return step_of(largest_of(size), _mm256_movemask_ps(_mm256_cmp_ps(odd, odd, _CMP_UNORD_Q)) == 0, bits);
}

// A chunk as integers, and their sum; zeros where the factor is 0, whatever x is.
struct Integers {
  Ints v[4];
  int32_t total;

  Integers(const float *x, const Step &s) {
    const Ints some = _mm256_set1_epi32(s.factor == 0 ? 0 : -1);
    Ints sum = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
      v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i * 8), _mm256_set1_ps(s.factor)));
      v[i] = _mm256_and_si256(_mm256_min_epi32(v[i], _mm256_set1_epi32(MOST_16)), some);
      sum = _mm256_add_epi32(sum, v[i]);
    }
    total = sum_of(sum);
  }
};

void round8(const float *x, int64_t n, int64_t columns, int8_t *x8, float *scales, int32_t *totals) {
  // Packing takes turns between the halves of vectors: the order of fours is put right afterwards.
  const Ints order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t begin = 0; begin < n; begin += columns) {
    const int64_t end = begin + columns < n ? begin + columns : n;
    const Step r = range(x + begin, end - begin, 8);
    for (int64_t c = begin / CHUNK; c < end / CHUNK; c++, x8 += CHUNK) {
      const Integers own(x + c * CHUNK, r);
      const Ints low = _mm256_packs_epi32(own.v[0], own.v[1]), high = _mm256_packs_epi32(own.v[2], own.v[3]);
      const Ints bytes = _mm256_packs_epi16(low, high);
      _mm256_storeu_si256(reinterpret_cast<Ints *>(x8), _mm256_permutevar8x32_epi32(bytes, order));
      scales[c] = r.step;
      totals[c] = own.total;
    }
  }
}

void round16(const float *x, int64_t n, int64_t columns, int16_t *x16, float *scales, int32_t *totals) {
  for (int64_t begin = 0; begin < n; begin += columns) {
    const int64_t end = begin + columns < n ? begin + columns : n;
    const Step r = range(x + begin, end - begin, 16);
    for (int64_t c = begin / CHUNK; c < end / CHUNK; c++) {
      const Integers own(x + c * CHUNK, r);
      for (int i = 0; i < 4; i++, x16 += 8) {
        const Ints acbd = _mm256_shuffle_epi32(own.v[i], 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(x16),
                         _mm_packs_epi32(_mm256_castsi256_si128(acbd), _mm256_extracti128_si256(acbd, 1)));
      }
      scales[c] = r.step;
      totals[c] = own.total;
    }
  }
}

// (Not every compiler has a name for half floats in __builtin_cpu_supports.)
bool half_floats() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

struct Lanes {
  using Vector = __m256;
  static constexpr int WIDTH = 8;
  static Vector load(const float *x) { return _mm256_loadu_ps(x); }
  static void store(float *x, Vector v) { _mm256_storeu_ps(x, v); }
  static Vector all(float x) { return _mm256_set1_ps(x); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace

const Isa *avx2() {
  static const Isa isa{product16, product<Eight>, round8, round16, round_columns<Lanes>, grid_errors,
                       some_chains, look_up, {}, load_some, store_rows};
  static const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && half_floats();
  return runs ? &isa : nullptr;
}

}  // namespace fewbits
