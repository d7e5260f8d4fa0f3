// Products with AVX-512 and VNNI, for avx512.cpp, avx512vbmi.cpp and codes_amx.cpp. A vector is 16 rows of W times four columns of a byte each, or two of 16 bits, so
// that a sum needs no adding across lanes: a lane is a row. A block is two such vectors wide.
#pragma once
#include <immintrin.h>

#include <type_traits>

#include "kernel.h"

namespace fewbits {
namespace {

using Ints = __m512i;
using Floats = __m512;

// -- codes -------------------------------------------------------------------------------------------

inline Ints shifted(Ints v, int bits) { return bits ? _mm512_srli_epi16(v, bits) : v; }

// Columns 4q to 4q+3 of a chunk, a byte each.
template <int BITS>
inline Ints quad(const uint8_t *chunk, int tile, int q) {
  if constexpr (BITS == 8) {
    return _mm512_loadu_si512(chunk + q * 128 + tile * 64);
  } else if constexpr (BITS == 4) {
    const Ints v = _mm512_loadu_si512(chunk + q / 2 * 128 + tile * 64);
    return _mm512_and_si512(shifted(v, q % 2 * 4), _mm512_set1_epi8(15));
  } else {
    const uint8_t *half = chunk + q / 4 * (BITS == 2 ? 128 : 192);
    Ints v = shifted(_mm512_loadu_si512(half + tile * 64), q % 4 * 2);
    v = _mm512_and_si512(v, _mm512_set1_epi8(3));
    if constexpr (BITS == 3) {
      uint64_t high;
      std::memcpy(&high, half + 128 + tile * 32 + q % 4 * 8, 8);
      v = _mm512_mask_add_epi8(v, high, v, _mm512_set1_epi8(4));
    }
    return v;
  }
}

// The even columns of a quad, or the odd ones, 16 bits each.
template <int BITS>
inline Ints pair(const uint8_t *chunk, int tile, int q, int odd) {
  if constexpr (BITS == 3) {
    const Ints v = quad<3>(chunk, tile, q);
    return odd ? _mm512_srli_epi16(v, 8) : _mm512_and_si512(v, _mm512_set1_epi16(255));
  } else {
    constexpr int quads = 8 / BITS;  // of a vector
    const Ints v = _mm512_loadu_si512(chunk + q / quads * 128 + tile * 64);
    const int shift = q % quads * BITS + odd * 8;
    if (shift + BITS == 16) return _mm512_srli_epi16(v, shift);
    return _mm512_and_si512(shifted(v, shift), _mm512_set1_epi16((1 << BITS) - 1));
  }
}

// -- scales and zero points --------------------------------------------------------------------------

inline Floats scales_at(const fewbits_weight &w, int64_t at) {
  if (w.scale_type == FEWBITS_F32) return _mm512_loadu_ps(static_cast<const float *>(w.scales) + at);
  auto from = reinterpret_cast<const __m256i *>(static_cast<const uint16_t *>(w.scales) + at);
  const __m256i half = _mm256_loadu_si256(from);
  if (w.scale_type == FEWBITS_F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// As distances from the middle.
inline Ints zeros_at(const fewbits_weight &w, int64_t at) {
  auto from = reinterpret_cast<const __m128i *>(static_cast<const int8_t *>(w.zeros) + at);
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(from));
}

inline Floats offsets_at(const fewbits_weight &w, int64_t at) {
  return _mm512_loadu_ps(static_cast<const float *>(w.zeros) + at);
}

// -- how inputs are multiplied -----------------------------------------------------------------------

// A unit is four bytes of x: what one instruction multiplies in each row.
struct Eight {
  static constexpr bool centres = false;  // whether codes may be negative, and zero points taken off early
  static constexpr int units = 8;  // of a chunk
  static constexpr int planes = 1, most = 8;  // rows of x at a time; measured
  static const uint8_t *inputs(const Inputs &x) { return reinterpret_cast<const uint8_t *>(x.x8); }
  static constexpr int64_t at(int64_t chunk) { return chunk * CHUNK; }
  template <int PLANE>
  static Ints dot(Ints sum, Ints codes, Ints x) { return _mm512_dpbusd_epi32(sum, codes, x); }
  template <int BITS>
  static Ints codes(const uint8_t *chunk, int tile, int unit, Ints) {
    return quad<BITS>(chunk, tile, unit);
  }
};

struct Sixteen {
  static constexpr bool centres = true;
  static constexpr int units = 16;
  static constexpr int planes = 1, most = 8;
  static const uint8_t *inputs(const Inputs &x) { return reinterpret_cast<const uint8_t *>(x.x16); }
  static constexpr int64_t at(int64_t chunk) { return chunk * CHUNK * 2; }
  template <int PLANE>
  static Ints dot(Ints sum, Ints codes, Ints x) { return _mm512_dpwssd_epi32(sum, codes, x); }
  template <int BITS>
  static Ints codes(const uint8_t *chunk, int tile, int unit, Ints) {
    return pair<BITS>(chunk, tile, unit / 2, unit % 2);
  }
};

// Codes of 4 bits that stand for the entries of a table. A lookup goes by the lowest five bits.
struct Table : Sixteen {
  template <int BITS>
  static Ints codes(const uint8_t *chunk, int tile, int unit, Ints table) {
    const Ints v = _mm512_loadu_si512(chunk + unit / 4 * 128 + tile * 64);
    return _mm512_permutexvar_epi16(shifted(v, unit / 2 % 2 * 4 + unit % 2 * 8), table);
  }
};

// 16 bits in planes: the high bytes are signed, the low ones are not, and codes may count as either.
struct Bytes : Eight {
  static constexpr int planes = 2, most = 3;
  static const uint8_t *inputs(const Inputs &x) { return reinterpret_cast<const uint8_t *>(x.tiles); }
  static constexpr int64_t at(int64_t chunk) { return chunk / 2 * 128 + chunk % 2 * CHUNK; }
  template <int PLANE>
  static Ints dot(Ints sum, Ints codes, Ints x) {
    return PLANE ? _mm512_dpbusd_epi32(sum, x, codes) : _mm512_dpbusd_epi32(sum, codes, x);
  }
};

constexpr int STEPS = WIDE / 64;

// Where the first of the bytes of a row and a step lie; those of the next plane are a tile further.
template <int PLANES>
inline int8_t *place(int8_t *tile, int64_t row, int64_t rows, int step) {
  return tile + (step * PLANES * rows + row) * 64;
}

inline void place8(const int8_t *x8, int64_t row, int64_t rows, int8_t *tile) {
  for (int step = 0; step < STEPS; step++)
    _mm512_storeu_si512(place<1>(tile, row, rows, step), _mm512_loadu_si512(x8 + step * 64));
}

inline void place16(const int16_t *x16, int64_t row, int64_t rows, int8_t *tile) {
  const Ints order = _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200);  // from a c b d
  for (int step = 0; step < STEPS; step++, x16 += 64) {
    const Ints a = _mm512_loadu_si512(x16), b = _mm512_loadu_si512(x16 + 32);
    const auto bytes = [&](const Ints &first, const Ints &second) {
      const Ints both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(first)),
                                           _mm512_cvtepi16_epi8(second), 1);
      return _mm512_shuffle_epi8(both, order);
    };
    int8_t *to = place<2>(tile, row, rows, step);
    _mm512_storeu_si512(to, bytes(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
    _mm512_storeu_si512(to + rows * 64, bytes(a, b));
  }
}

// What is taken off codes: the middle and the zero point.
inline Ints zeros_of(const fewbits_weight &w, int32_t middle, int64_t at) {
  const Ints all = _mm512_set1_epi32(middle);
  return w.zero_type == FEWBITS_ZERO_POINT ? _mm512_add_epi32(all, zeros_at(w, at)) : all;
}

// -- where codes come from ---------------------------------------------------------------------------

// Codes are asked for this many bytes before they are needed: a processor's own foresight ends with a
// page. Measured. Of a chunk a unit's share at a time: a core waits for 16 lines, and asked for more at once it
// stands still.
constexpr int AHEAD = 4096;

template <int BITS, int UNITS>
inline void ask_ahead(const uint8_t *chunk, int unit) {
  constexpr int lines = int(chunk_bytes(BITS) / 64);
  for (int i = unit * lines / UNITS; i < (unit + 1) * lines / UNITS; i++)
    _mm_prefetch(chunk + AHEAD + i * 64, _MM_HINT_T1);
}

// A block as it is stored.
template <class Mode, int BITS>
struct Stored {
  static constexpr bool centred = false;
  static constexpr int most = Mode::most;
  const uint8_t *codes;
  Ints table = _mm512_setzero_si512();

  Stored(const uint8_t *codes, const fewbits_weight &, const Inputs &x) : codes(codes) {
    auto half = reinterpret_cast<const __m256i *>(x.table);
    if (half) table = _mm512_broadcast_i32x8(_mm256_loadu_si256(half));
  }
  Ints operator()(int chunk, int tile, int unit) const {
    return Mode::template codes<BITS>(codes + chunk * chunk_bytes(BITS), tile, unit, table);
  }
  template <int UNITS>
  void fetch(int chunk, int unit) const {
    ask_ahead<BITS, UNITS>(codes + chunk * chunk_bytes(BITS), unit);
  }
};

// A panel of a trellis that was looked up.
template <class Mode>
struct LookedUp : Stored<Mode, 8> {
  using Stored<Mode, 8>::Stored;
  template <int>
  void fetch(int, int) const {}
};

// A panel that was unpacked, since many rows of x go through it.
template <class Mode>
struct Panel {
  static constexpr bool centred = Mode::centres;
  static constexpr int most = 6;
  alignas(64) uint8_t vectors[PANEL * Mode::units * 2 * 64];
  Ints operator()(int chunk, int tile, int unit) const {
    return _mm512_load_si512(vectors + ((chunk * Mode::units + unit) * 2 + tile) * 64);
  }
  template <int>
  void fetch(int, int) const {}

  template <class Source, class Part>
  void fill(const Source &source, const fewbits_weight &w, int32_t middle, Part part) {
    while (part.next())
      for (int t = 0; t < 2; t++) {
        Ints zero = zeros_of(w, middle, part.scales() + t * 16);
        zero = _mm512_mask_blend_epi16(0xaaaaaaaa, zero, _mm512_slli_epi32(zero, 16));
        for (int c = part.begin; c < part.end; c++)
#pragma GCC unroll 16
          for (int unit = 0; unit < Mode::units; unit++) {
            const Ints v = source(c, t, unit);
            _mm512_store_si512(vectors + ((c * Mode::units + unit) * 2 + t) * 64,
                               centred ? _mm512_sub_epi16(v, zero) : v);
          }
      }
  }
};

// -- products ----------------------------------------------------------------------------------------

// M rows of x from `row` on times one panel of a block, added to result (M, 32).
template <class Mode, int MOST, int M, class Source>
inline void rows(const fewbits_weight &w, const Source &source, int64_t panel, Segments<MOST> part,
                 const Inputs &x, int64_t row, float *result) {
  const int64_t from = panel * x.rows + row;
  constexpr int64_t bytes = Mode::at(PANEL);  // of a row
  const uint8_t *inputs = Mode::inputs(x) + from * bytes;
  Floats sum[M][2];
  for (int m = 0; m < M; m++)
    for (int t = 0; t < 2; t++) sum[m][t] = _mm512_loadu_ps(result + m * ROWS + t * 16);
  while (part.next()) {
    const float *steps = x.scales + from * PANEL + part.begin;
    int32_t total[M] = {};
    for (int m = 0; m < M; m++)
      for (int c = part.begin; c < part.end; c++) total[m] += x.totals[(from + m) * PANEL + c];
    constexpr int planes = Mode::planes;
    Ints dot[M][2][planes];
    for (int t = 0; t < 2; t++) {
      Ints zero = _mm512_setzero_si512();
      if constexpr (!Source::centred) zero = zeros_of(w, x.middle, part.scales() + t * 16);
      for (int m = 0; m < M; m++) {
        for (int p = 0; p < planes; p++) dot[m][t][p] = _mm512_setzero_si512();
        if constexpr (!Source::centred)
          dot[m][t][planes - 1] = _mm512_sub_epi32(dot[m][t][planes - 1],
                                                   _mm512_mullo_epi32(zero, _mm512_set1_epi32(total[m])));
      }
    }
    constexpr bool apart = M < 4 || Mode::units == 8;  // measured: else registers are few
    const auto add_chunk = [&](int c) {
      if constexpr (!apart) source.template fetch<1>(c, 0);
      const uint8_t *own = inputs + Mode::at(c);
#pragma GCC unroll 16
      for (int unit = 0; unit < Mode::units; unit++) {
        if constexpr (apart) source.template fetch<Mode::units>(c, unit);
        const Ints w0 = source(c, 0, unit), w1 = source(c, 1, unit);
        for (int m = 0; m < M; m++) {
          const auto add = [&](auto plane) {
            constexpr int p = decltype(plane)::value;
            int32_t four;
            std::memcpy(&four, own + m * bytes + p * 64 + unit * 4, 4);
            const Ints xs = _mm512_set1_epi32(four);
            dot[m][0][p] = Mode::template dot<p>(dot[m][0][p], w0, xs);
            dot[m][1][p] = Mode::template dot<p>(dot[m][1][p], w1, xs);
          };
          add(std::integral_constant<int, 0>());
          if constexpr (planes == 2) add(std::integral_constant<int, 1>());
        }
      }
    };
    if constexpr (MOST == 1)
      add_chunk(part.begin);
    else
      for (int c = part.begin; c < part.end; c++) add_chunk(c);
    for (int t = 0; t < 2; t++) {
      const Floats scale = scales_at(w, part.scales() + t * 16);
      for (int m = 0; m < M; m++) {
        const float own = steps[m * PANEL];
        const Floats both = _mm512_mul_ps(scale, _mm512_set1_ps(own));
        Ints whole = dot[m][t][planes - 1];
        if constexpr (planes == 2) whole = _mm512_add_epi32(_mm512_slli_epi32(dot[m][t][0], 8), whole);
        sum[m][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), both, sum[m][t]);
        if (w.zero_type == FEWBITS_OFFSET)
          sum[m][t] = _mm512_fnmadd_ps(offsets_at(w, part.scales() + t * 16),
                                       _mm512_set1_ps(own * float(total[m])), sum[m][t]);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int t = 0; t < 2; t++) _mm512_storeu_ps(result + m * ROWS + t * 16, sum[m][t]);
}

template <class Mode, int MOST, int M = 1, class Source>
inline void some_rows(int64_t some, const fewbits_weight &w, const Source &source, int64_t panel,
                      const Segments<MOST> &part, const Inputs &x, int64_t row, float *result) {
  if constexpr (M < Source::most)
    if (some > M) return some_rows<Mode, MOST, M + 1>(some, w, source, panel, part, x, row, result);
  rows<Mode, MOST, M>(w, source, panel, part, x, row, result);
}

constexpr int FEW = 16;  // rows of x that go straight through the codes, for more a panel is unpacked; measured

template <class Mode, int MOST, class Source>
void product_of(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  const int64_t chunks = w.columns / CHUNK;
  BlockCodes panels(w, block, x);
  std::memset(result, 0, x.rows * ROWS * sizeof(float));
  for (int64_t panel = 0; panel * PANEL < chunks; panel++) {
    const Segments<MOST> part(w, block, panel);
    const Source stored(panels.next(part.count), w, x);
    const auto in_turn = [&](const auto &source) {
      const int64_t most = source.most;
      for (int64_t row = 0; row < x.rows; row += most) {
        const int64_t rest = x.rows - row;
        some_rows<Mode, MOST>(rest < most ? rest : most, w, source, panel, part, x, row, result + row * ROWS);
      }
    };
    if (Mode::planes == 2 || x.rows <= FEW) {  // planes are taken for few rows alone
      in_turn(stored);
    } else if constexpr (Mode::planes == 1) {
      Panel<Mode> unpacked;
      unpacked.fill(stored, w, x.middle, part);
      in_turn(unpacked);
    }
  }
}

}  // namespace
}  // namespace fewbits
