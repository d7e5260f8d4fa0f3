// Products in tiles: Intel AMX, of bfloat16 summed in float32. Elsewhere this is AVX-512.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attend.h"
#include "tiles.h"

namespace fewbits {
namespace {

// Four tiles of sums, two by two, over pairs that lie in tiles at a, and below each other at b.
// Of a: tiles of the two rows of tiles, `a_stride` bytes between rows, `a_tile` pairs from one to the next.
inline void multiply(const uint32_t *a0, const uint32_t *a1, int64_t a_stride, int64_t a_tile, const uint32_t *b,
                     int64_t count) {
  for (int64_t p = 0; p < count; p += SIDE, a0 += a_tile, a1 += a_tile, b += SIDE * SQUARE) {
    _tile_loadd(4, a0, a_stride);
    _tile_loadd(6, b, SQUARE * sizeof(uint32_t));
    _tile_loadd(7, b + SIDE, SQUARE * sizeof(uint32_t));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1, a_stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

inline void store(float *c, int64_t stride) {
  _tile_stored(0, c, stride * sizeof(float));
  _tile_stored(1, c + SIDE, stride * sizeof(float));
  _tile_stored(2, c + SIDE * stride, stride * sizeof(float));
  _tile_stored(3, c + SIDE * stride + SIDE, stride * sizeof(float));
}

// (count, 64) -> (count / 16, 4, 16, 16): tiles in one piece, of each the rows along what is summed.
void turn(const uint32_t *pairs, int64_t count, uint32_t *turned) {
  for (int64_t p = 0; p < count; p += SIDE)
    for (int i = 0; i < SQUARE; i += SIDE, turned += SIDE * SIDE) {
      __m512i rows[SIDE];
      for (int64_t l = 0; l < SIDE; l++) rows[l] = _mm512_loadu_si512(pairs + (p + l) * SQUARE + i);
      transpose(rows, turned, SIDE);
    }
}

void gram_tile(const uint32_t *a, const uint32_t *b, int64_t count, float *result) {
  const Tiles tiles;
  for (int i = 0; i < SQUARE; i += 2 * SIDE)
    for (int j = 0; j < SQUARE; j += 2 * SIDE) {
      const uint32_t *own = a + i * SIDE;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      multiply(own, own + SIDE * SIDE, SIDE * sizeof(uint32_t), SQUARE * SIDE, b + j, count);
      store(result + i * SQUARE + j, SQUARE);
    }
}

void add_product(const uint32_t *a, const uint32_t *b, int64_t count, float *c, int64_t stride) {
  const Tiles tiles;
  for (int i = 0; i < SQUARE; i += 2 * SIDE)
    for (int j = 0; j < SQUARE; j += 2 * SIDE) {
      float *to = c + i * stride + j;
      _tile_loadd(0, to, stride * sizeof(float));
      _tile_loadd(1, to + SIDE, stride * sizeof(float));
      _tile_loadd(2, to + SIDE * stride, stride * sizeof(float));
      _tile_loadd(3, to + SIDE * stride + SIDE, stride * sizeof(float));
      multiply(a + i * count, a + (i + SIDE) * count, count * sizeof(uint32_t), SIDE, b + j, count);
      store(to, stride);
    }
}

// Linux lets a process use tiles when it has asked.
bool may_use() {
  constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}

bool runs() {
  unsigned a, b, c, d;
  constexpr unsigned WANTED = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, int8
  return avx512() && avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & WANTED) == WANTED && may_use();
}

}  // namespace

const Bf16 *amx_bf16() {
  static const Bf16 found{SIDE, turn, gram_tile, pack_keys, pack_values, attend<add_product>};
  static const bool known = runs();
  return known ? &found : nullptr;
}

const Isa *amx() {
  if (!amx_bf16()) return nullptr;
  static const Isa isa = [] {
    Isa own = *avx512();
    own.planes[1] = amx_planes();
    return own;
  }();
  return &isa;
}

}  // namespace fewbits
