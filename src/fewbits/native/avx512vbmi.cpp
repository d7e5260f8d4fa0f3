// AVX-512 with VNNI, and VBMI, which looks up bytes in tables of 128: products of a trellis.
#include "avx512.h"

namespace fewbits {
namespace {

// Of both tiles: vectors of 16 rows.
struct Tiles {
  Ints t[2];
};

inline Tiles load(const uint8_t *from) { return {{_mm512_loadu_si512(from), _mm512_loadu_si512(from + 64)}}; }

// Bits of a byte to the left or to the right. What comes from the byte beside is for `chosen` to leave.
inline Ints left(Ints v, int bits) { return bits ? _mm512_slli_epi16(v, bits) : v; }
inline Tiles left(const Tiles &v, int bits) { return {{left(v.t[0], bits), left(v.t[1], bits)}}; }
inline Tiles right(const Tiles &v, int bits) { return {{shifted(v.t[0], bits), shifted(v.t[1], bits)}}; }

// What the row before has, or the one before that. A lane is a row, and before the first comes the last.
template <int N>
inline Tiles before(const Tiles &v) {
  return {{_mm512_alignr_epi32(v.t[0], v.t[1], 16 - N), _mm512_alignr_epi32(v.t[1], v.t[0], 16 - N)}};
}

// The bits of a mask from `a`, all others from `b`.
inline Tiles chosen(int mask, const Tiles &a, const Tiles &b) {
  const Ints bits = _mm512_set1_epi8(char(mask));
  return {{_mm512_ternarylogic_epi64(bits, a.t[0], b.t[0], 0xCA),
           _mm512_ternarylogic_epi64(bits, a.t[1], b.t[1], 0xCA)}};
}

// What is looked up for a quad: 7 bits a byte, and an eighth.
struct Windows {
  Tiles seven;
  __mmask64 eighth[2];

  explicit Windows(const Tiles &v) : seven(v), eighth{_mm512_movepi8_mask(v.t[0]), _mm512_movepi8_mask(v.t[1])} {}
  Windows(const Tiles &v, const uint8_t *bits) : seven(v) {
    std::memcpy(&eighth[0], bits, 8);
    std::memcpy(&eighth[1], bits + 32, 8);
  }
};

inline Windows windows_4(const uint8_t *chunk, int q) {
  const Tiles own = load(chunk + q / 2 * 128), last = before<1>(own);
  return Windows(q % 2 ? chosen(0xF0, last, right(own, 4)) : chosen(0xF0, left(last, 4), own));
}

// First the codes of this row and of the one before, side by side, those of two quads.
inline Windows windows_2(const uint8_t *chunk, int q) {
  const Tiles own = load(chunk + q / 4 * 128), last = before<1>(own);
  const Tiles two = q % 2 ? chosen(0xCC, last, right(own, 2)) : chosen(0xCC, left(last, 2), own);
  const Tiles older = before<2>(two);
  return Windows(q % 4 > 1 ? chosen(0xF0, older, right(two, 4)) : chosen(0xF0, left(older, 4), two));
}

// The eighth bit is the highest of the row's own code. Below it is the code of the row before, then the two lower
// bits of the one before that, then those of its own.
inline Windows windows_3(const uint8_t *chunk, int q) {
  const uint8_t *half = chunk + q / 4 * 192, *high = half + 128;
  const int odd = q % 2;
  const Tiles own = load(half), older = before<2>(own), moved = right(own, 2 * odd);
  const Tiles low = odd ? chosen(0xCC, older, moved) : chosen(0xCC, left(older, 2), moved);  // of two quads
  Tiles codes;
  for (int t = 0; t < 2; t++) {
    uint64_t bits[2];
    std::memcpy(&bits[0], high + t * 32 + odd * 8, 8);
    std::memcpy(&bits[1], high + t * 32 + odd * 8 + 16, 8);
    Ints v = _mm512_and_si512(moved.t[t], _mm512_set1_epi8(0x33));
    v = _mm512_mask_add_epi8(v, bits[0], v, _mm512_set1_epi8(0x04));
    codes.t[t] = _mm512_mask_add_epi8(v, bits[1], v, _mm512_set1_epi8(0x40));
  }
  const Tiles last = before<1>(codes);
  const Tiles seven = q % 4 > 1 ? chosen(0x0F, right(low, 4), last) : chosen(0x0F, low, left(last, 4));
  return Windows(seven, high + q % 4 * 8);
}

// Where the table has what windows_3 asks for.
struct Order {
  uint8_t of[256];

  constexpr Order() : of() {
    for (int i = 0; i < 256; i++) of[i] = uint8_t((i >> 2 & 3) << 6 | (i >> 4 & 7) << 3 | i >> 7 << 2 | (i & 3));
  }
};

alignas(64) constexpr Order ORDER;

template <int BITS>
struct Values {
  Ints part[4];

  explicit Values(const fewbits_weight &w) {
    for (int i = 0; i < 4; i++) {
      part[i] = _mm512_loadu_si512(static_cast<const int8_t *>(w.table) + 64 * i);
      part[i] = _mm512_xor_si512(part[i], _mm512_set1_epi8(char(MIDDLE_8)));
    }
    if (BITS != 3) return;
    Ints ordered[4];
    for (int i = 0; i < 4; i++) {
      const Ints order = _mm512_load_si512(ORDER.of + 64 * i);
      ordered[i] = one(order, _mm512_movepi8_mask(order));
    }
    for (int i = 0; i < 4; i++) part[i] = ordered[i];
  }

  Ints one(Ints seven, __mmask64 eighth) const {
    const Ints low = _mm512_permutex2var_epi8(part[0], seven, part[1]);
    const Ints high = _mm512_permutex2var_epi8(part[2], seven, part[3]);
    return _mm512_mask_blend_epi8(eighth, low, high);
  }
  Ints operator()(const uint8_t *chunk, int tile, int q) const {
    const Windows w = BITS == 2 ? windows_2(chunk, q) : BITS == 3 ? windows_3(chunk, q) : windows_4(chunk, q);
    return one(w.seven.t[tile], w.eighth[tile]);
  }
};

// A block as it is stored.
template <class Mode, int BITS>
struct Chains {
  static constexpr bool centred = false;
  static constexpr int most = 3;  // for more rows of x a panel is looked up once; measured
  const uint8_t *codes;
  const Values<BITS> values;

  Chains(const uint8_t *codes, const fewbits_weight &w, const Inputs &) : codes(codes), values(w) {}
  Ints operator()(int chunk, int tile, int unit) const {
    const int quads = Mode::units / 8;
    const Ints v = values(codes + chunk * chunk_bytes(BITS), tile, unit / quads);
    if (quads == 1) return v;
    return unit % 2 ? _mm512_srli_epi16(v, 8) : _mm512_and_si512(v, _mm512_set1_epi16(255));
  }
  template <int UNITS>
  void fetch(int chunk, int unit) const {
    ask_ahead<BITS, UNITS>(codes + chunk * chunk_bytes(BITS), unit);
  }
};

template <int BITS>
void look_up_of(const uint8_t *codes, int chunks, const fewbits_weight &w, uint8_t *result) {
  const Chains<Eight, BITS> source(codes, w, {});
  for (int c = 0; c < chunks; c++) {
#pragma GCC unroll 8
    for (int q = 0; q < 8; q++) {
      source.template fetch<8>(c, q);
      for (int t = 0; t < 2; t++, result += 64) _mm512_store_si512(result, source(c, t, q));
    }
  }
}

void look_up(const uint8_t *codes, int bits, int chunks, const int8_t *table, uint8_t *result) {
  fewbits_weight w{};
  w.table = table;
  switch (bits) {
    case 2: return look_up_of<2>(codes, chunks, w, result);
    case 3: return look_up_of<3>(codes, chunks, w, result);
    default: return look_up_of<4>(codes, chunks, w, result);
  }
}

template <class Mode, int MOST>
void product(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  if (x.rows > Chains<Mode, 4>::most) return product_of<Mode, MOST, LookedUp<Mode>>(w, block, x, result);
  Inputs stored = x;
  stored.look_up = nullptr;
  switch (w.bits) {
    case 2: return product_of<Mode, MOST, Chains<Mode, 2>>(w, block, stored, result);
    case 3: return product_of<Mode, MOST, Chains<Mode, 3>>(w, block, stored, result);
    default: return product_of<Mode, MOST, Chains<Mode, 4>>(w, block, stored, result);
  }
}

void product16(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  if (w.group == CHUNK) return product<Sixteen, 1>(w, block, x, result);
  product<Sixteen, SUMMED>(w, block, x, result);
}

void product8(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  if (w.group == CHUNK) return product<Eight, 1>(w, block, x, result);
  product<Eight, SUMMED>(w, block, x, result);
}

}  // namespace

const Trellis *avx512vbmi() {
  static const Trellis trellis{product16, product8, look_up};
  static const bool runs = __builtin_cpu_supports("avx512vbmi");
  return runs ? &trellis : nullptr;
}

}  // namespace fewbits
