// Products of codes in tiles of bytes: Intel AMX. See Planes in kernel.h.
#include "avx512.h"
#include "tiles.h"

namespace fewbits {
namespace {

constexpr int64_t TILE = 16;  // rows
constexpr int HALF = ROWS / 2;  // of a block: as many rows of W as a tile is wide

// Zero points are taken off codes as they are unpacked: what is left must be a byte. How many rows it is faster for was
// measured.
bool takes(const fewbits_weight &w, int inputs, int64_t rows) {
  const bool eight = inputs == FEWBITS_INPUTS_8, dear = w.group == CHUNK || (eight && w.zero_type == FEWBITS_TRELLIS);
  const int64_t least = !dear ? 4 : eight ? 6 : 8;
  return rows >= least && w.zero_type != FEWBITS_TABLE && (w.bits < 8 || w.zero_type != FEWBITS_ZERO_POINT);
}

// What is asked for two panels before it is needed, bit by bit: a core waits for 16 lines, and asked for more at once
// it stands still.
struct Ahead {
  const uint8_t *next, *end;
  Ahead(const uint8_t *codes, int64_t panel) : next(codes + 2 * panel), end(next + panel) {}

  void fetch(int lines) {
    for (const uint8_t *stop = next + lines * 64; next < stop && next < end; next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
  static void fetch_scales(const fewbits_weight &w, int64_t at) {
    const int64_t bytes = w.scale_type == FEWBITS_F32 ? 4 : 2;
    _mm_prefetch(static_cast<const char *>(w.scales) + (at + 16 * ROWS) * bytes, _MM_HINT_T0);
  }
};

// A panel of codes: of each half the columns below each other, four a vector. And what belongs to its segments.
struct Unpacked {
  alignas(64) int8_t codes[2][WIDE / 4 * 64];
  Floats scales[PANEL][2], offsets[PANEL][2];
  int begin[PANEL], end[PANEL], segments = 0;

  template <int BITS, int MOST>
  void fill(const uint8_t *stored, const fewbits_weight &w, int32_t middle, Segments<MOST> part, Ahead &ahead) {
    const Ints lowest = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    for (segments = 0; part.next(); segments++) {
      begin[segments] = part.begin;
      end[segments] = part.end;
      ahead.fetch_scales(w, part.scales());
      for (int t = 0; t < 2; t++) {
        const int64_t at = part.scales() + t * HALF;
        const Ints zero = _mm512_shuffle_epi8(zeros_of(w, middle, at), lowest);
        scales[segments][t] = scales_at(w, at);
        if (w.zero_type == FEWBITS_OFFSET) offsets[segments][t] = offsets_at(w, at);
        for (int c = part.begin; c < part.end; c++) {
          const uint8_t *chunk = stored + c * chunk_bytes(BITS);
          int8_t *to = codes[t] + c * 8 * 64;
#pragma GCC unroll 8
          for (int q = 0; q < 8; q++)
            _mm512_store_si512(to + q * 64, _mm512_sub_epi8(quad<BITS>(chunk, t, q), zero));
          ahead.fetch(chunk_bytes(BITS) / 256);
        }
      }
    }
  }
};

// Sums of a tile of x and a segment: of each plane and half.
template <int PLANES>
struct Sums {
  alignas(64) int32_t of[PLANES][2][TILE * HALF];
};

// Tiles of sums are used in pairs: while one pair waits for its sums and is stored, the other is multiplied into. A
// pair is of both halves, and with two planes of both planes of a half: what is unpacked is loaded once.
template <int PAIR>
inline void clear() {
  if constexpr (PAIR == 0) {
    _tile_zero(0);
    _tile_zero(1);
  } else {
    _tile_zero(2);
    _tile_zero(3);
  }
}

template <int PAIR>
inline void store(int32_t *first, int32_t *second) {
  constexpr int64_t stride = HALF * sizeof(int32_t);
  if constexpr (PAIR == 0) {
    _tile_stored(0, first, stride);
    _tile_stored(1, second, stride);
  } else {
    _tile_stored(2, first, stride);
    _tile_stored(3, second, stride);
  }
}

// A tile of x, whose steps of 64 columns are `apart`, times a segment of both halves of a panel.
template <int PAIR>
inline void multiply(const int8_t *x, int64_t apart, int chunks, const Unpacked &panel, int s, Ahead &ahead) {
  clear<PAIR>();
  for (int c = panel.begin[s]; c < panel.end[s]; c += chunks) {
    _tile_loadd(4, x + (c >> 1) * apart + (c & 1) * CHUNK, 64);
    _tile_loadd(6, panel.codes[0] + c * 8 * 64, 64);
    _tile_loadd(7, panel.codes[1] + c * 8 * 64, 64);
    if constexpr (PAIR == 0) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
    } else {
      _tile_dpbssd(2, 4, 6);
      _tile_dpbssd(3, 4, 7);
    }
    ahead.fetch(4);
  }
}

// Both planes of a tile of x, the low one a half of `apart` behind the high one, times half `PAIR`.
template <int PAIR>
inline void multiply_planes(const int8_t *x, int64_t apart, int chunks, const Unpacked &panel, int s, Ahead &ahead) {
  clear<PAIR>();
  for (int c = panel.begin[s]; c < panel.end[s]; c += chunks) {
    const int8_t *high = x + (c >> 1) * apart + (c & 1) * CHUNK;
    _tile_loadd(6, panel.codes[PAIR] + c * 8 * 64, 64);
    _tile_loadd(4, high, 64);
    _tile_loadd(5, high + apart / 2, 64);
    if constexpr (PAIR == 0) {  // bytes of the low plane have no sign
      _tile_dpbssd(0, 4, 6);
      _tile_dpbusd(1, 5, 6);
    } else {
      _tile_dpbssd(2, 4, 6);
      _tile_dpbusd(3, 5, 6);
    }
    ahead.fetch(4);
  }
}

// Those of `rows` rows, scaled, added to result (rows, 32). Meanwhile `next` is fetched, of which a row and a segment
// of 128 columns takes as much as is asked for here.
template <int PLANES, bool OFFSET>
inline void add_scaled(const Sums<PLANES> &sums, const Unpacked &panel, int s, const float *steps,
                       const int32_t *totals, int64_t rows, float *result, const int8_t *next) {
  const int begin = panel.begin[s], end = panel.end[s];
  const Floats scales[2] = {panel.scales[s][0], panel.scales[s][1]};
  const int32_t *dots = sums.of[0][0];
  steps += begin;
  for (int64_t m = 0; m < rows; m++, dots += HALF, result += ROWS) {
    const float own = steps[m * PANEL];
    for (int i = 0; i < 2 * PLANES; i++, next += 64) _mm_prefetch(next, _MM_HINT_T0);
    const Floats step = _mm512_set1_ps(own);
#pragma GCC unroll 2
    for (int t = 0; t < 2; t++) {
      Ints dot = _mm512_load_si512(dots + t * TILE * HALF);
      if constexpr (PLANES == 2)
        dot = _mm512_add_epi32(_mm512_slli_epi32(dot, 8), _mm512_load_si512(dots + (2 + t) * TILE * HALF));
      Floats sum = _mm512_loadu_ps(result + t * HALF);
      sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scales[t], step), sum);
      if constexpr (OFFSET) {
        int32_t total = 0;
        for (int c = begin; c < end; c++) total += totals[m * PANEL + c];
        sum = _mm512_fnmadd_ps(panel.offsets[s][t], _mm512_set1_ps(own * float(total)), sum);
      }
      _mm512_storeu_ps(result + t * HALF, sum);
    }
  }
}

template <int PLANES, int MOST, int BITS>
void product_of(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  const int64_t side = x.rows < TILE ? x.rows : TILE, filled = filled_tiles(x.rows, TILE);
  const int chunks = w.group % 64 || MOST == 1 ? 1 : 2;
  const Tiles tiles(int(side), chunks * CHUNK);
  BlockCodes panels(w, block, x);
  std::memset(result, 0, x.rows * ROWS * sizeof(float));
  Unpacked panel;
  Sums<PLANES> sums[2];
  for (int64_t p = 0; p * WIDE < w.columns; p++) {
    const Segments<MOST> part(w, block, p);
    const uint8_t *codes = panels.next(part.count);
    Ahead ahead(codes, w.zero_type == FEWBITS_TRELLIS ? 0 : part.count * chunk_bytes(BITS));  // looked up before
    panel.fill<BITS>(codes, w, x.middle, part, ahead);
    const int8_t *own = x.tiles + p * filled * WIDE * PLANES;
    // One step behind, sums are stored and scaled.
    int64_t row_before = -1;
    int step = 0, before = 0;
    const auto scale = [&] {
      const int64_t at = (p * x.rows + row_before) * PANEL, left = x.rows - row_before;
      const auto add = w.zero_type == FEWBITS_OFFSET ? add_scaled<PLANES, true> : add_scaled<PLANES, false>;
      add(sums[(step - 1) & 1], panel, before, x.scales + at, x.totals + at, left < side ? left : side,
          result + row_before * ROWS, own + side * PLANES * (WIDE + CHUNK * panel.begin[before]));
    };
    for (int64_t row = 0; row < x.rows; row += side, own += side * WIDE * PLANES)
      for (int s = 0; s < panel.segments; s++, step++) {
        auto &now = sums[step & 1], &last = sums[~step & 1];
        if constexpr (PLANES == 2) {
          multiply_planes<0>(own, 2 * side * 64, chunks, panel, s, ahead);
          if (step) store<1>(last.of[0][1], last.of[1][1]);
          multiply_planes<1>(own, 2 * side * 64, chunks, panel, s, ahead);
          store<0>(now.of[0][0], now.of[1][0]);
        } else if (step % 2) {
          multiply<1>(own, side * 64, chunks, panel, s, ahead);
          store<0>(last.of[0][0], last.of[0][1]);
        } else {
          multiply<0>(own, side * 64, chunks, panel, s, ahead);
          if (step) store<1>(last.of[0][0], last.of[0][1]);
        }
        if (step) scale();
        row_before = row;
        before = s;
      }
    auto &last = sums[~step & 1];
    if (PLANES == 1 && step % 2)
      store<0>(last.of[0][0], last.of[0][1]);
    else
      store<1>(PLANES == 1 ? last.of[0][0] : last.of[0][1], last.of[PLANES - 1][1]);
    scale();
    ahead.fetch(PANEL * chunk_bytes(BITS) / 64);
  }
}

template <int PLANES, int MOST>
void product(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  switch (x.look_up ? 8 : w.bits) {
    case 2: return product_of<PLANES, MOST, 2>(w, block, x, result);
    case 3: return product_of<PLANES, MOST, 3>(w, block, x, result);
    case 4: return product_of<PLANES, MOST, 4>(w, block, x, result);
    default: return product_of<PLANES, MOST, 8>(w, block, x, result);
  }
}

void product8(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  if (w.group == CHUNK) return product<1, 1>(w, block, x, result);
  product<1, SUMMED>(w, block, x, result);
}

void product16(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  if (w.group == CHUNK) return product<2, 1>(w, block, x, result);
  product<2, SUMMED>(w, block, x, result);
}

}  // namespace

const Planes *amx_planes() {
  static const Planes planes{TILE, takes, place8, place16, product8, product16};
  return &planes;
}

}  // namespace fewbits
