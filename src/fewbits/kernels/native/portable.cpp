// Plain C++: for processors without a file of their own, and what the others are compared with.
#include <cmath>

#include "kernel.h"

namespace fewbits {
namespace {

// A quad of 16 rows, a byte each: as avx512.cpp.
void quad(const fewbits_weight &w, const uint8_t *chunk, int tile, int q, uint8_t *codes) {
  if (w.bits == 8) {
    std::memcpy(codes, chunk + q * 128 + tile * 64, 64);
  } else if (w.bits == 4) {
    const uint8_t *v = chunk + q / 2 * 128 + tile * 64;
    for (int i = 0; i < 64; i++) codes[i] = v[i] >> (q % 2 * 4) & 15;
  } else {
    const uint8_t *half = chunk + q / 4 * (w.bits == 2 ? 128 : 192), *v = half + tile * 64;
    const uint8_t *high = half + 128 + tile * 32 + q % 4 * 8;
    for (int i = 0; i < 64; i++) codes[i] = v[i] >> (q % 4 * 2) & 3;
    if (w.bits == 3)
      for (int i = 0; i < 64; i++) codes[i] |= (high[i / 8] >> (i % 8) & 1) << 2;
  }
}

struct Place {
  const uint8_t *chunk;
  int64_t at;  // of the group's scales
};

Place place(const fewbits_weight &w, int64_t block, int64_t c) {
  const int64_t chunks = w.columns / CHUNK;
  return {w.codes + (block * chunks + c) * chunk_bytes(w.bits),
          (block * (w.columns / w.group) + c * CHUNK / w.group) * ROWS};
}

void product8(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  const int64_t chunks = w.columns / CHUNK;
  const int middle = 1 << (w.bits - 1);
  std::memset(result, 0, x.rows * ROWS * sizeof(float));
  for (int64_t c = 0; c < chunks; c++) {
    const Place p = place(w, block, c);
    for (int tile = 0; tile < 2; tile++) {
      uint8_t codes[8][64];
      for (int q = 0; q < 8; q++) quad(w, p.chunk, tile, q, codes[q]);
      for (int64_t row = 0; row < x.rows; row++) {
        const int64_t from = c / PANEL * x.rows + row, chunk = from * PANEL + c % PANEL;
        const int8_t *x8 = x.x8 + chunk * CHUNK;
        int32_t dot[16] = {};
        for (int q = 0; q < 8; q++)
          for (int r = 0; r < 16; r++)
            for (int j = 0; j < 4; j++) dot[r] += int(codes[q][r * 4 + j]) * x8[q * 4 + j];
        const float step = x.scales[chunk];
        const int32_t total = x.totals[chunk];
        for (int r = 0; r < 16; r++) {
          const int64_t at = p.at + tile * 16 + r;
          int zero = middle;
          if (w.zero_type == FEWBITS_ZERO_POINT) zero += static_cast<const int8_t *>(w.zeros)[at];
          float sum = float(dot[r] - zero * total) * (load(w.scales, w.scale_type, at) * step);
          if (w.zero_type == FEWBITS_OFFSET) sum -= static_cast<const float *>(w.zeros)[at] * (step * float(total));
          result[row * ROWS + tile * 16 + r] += sum;
        }
      }
    }
  }
}

void product16(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  const int64_t chunks = w.columns / CHUNK;
  float value[256];
  for (int code = 0; code < 1 << w.bits; code++)
    value[code] = w.table ? from_bf16(to_bf16(w.table[code])) : float(code - (1 << (w.bits - 1)));
  std::memset(result, 0, x.rows * ROWS * sizeof(float));
  for (int64_t c = 0; c < chunks; c++) {
    const Place p = place(w, block, c);
    for (int tile = 0; tile < 2; tile++) {
      float values[8][64];
      for (int q = 0; q < 8; q++) {
        uint8_t codes[64];
        quad(w, p.chunk, tile, q, codes);
        for (int i = 0; i < 64; i++) values[q][i] = value[codes[i]];
      }
      for (int64_t row = 0; row < x.rows; row++) {
        const int64_t from = c / PANEL * x.rows + row, chunk = from * PANEL + c % PANEL;
        const uint16_t *x16 = x.x16 + chunk * CHUNK;
        float dot[16] = {};
        for (int q = 0; q < 8; q++) {
          const float quad[4] = {from_bf16(x16[q * 4]), from_bf16(x16[q * 4 + 2]), from_bf16(x16[q * 4 + 1]),
                                 from_bf16(x16[q * 4 + 3])};
          for (int r = 0; r < 16; r++)
            for (int j = 0; j < 4; j++) dot[r] += values[q][r * 4 + j] * quad[j];
        }
        const float total = x.sums[chunk];
        for (int r = 0; r < 16; r++) {
          const int64_t at = p.at + tile * 16 + r;
          float sum = dot[r];
          if (w.zero_type == FEWBITS_ZERO_POINT) sum -= float(static_cast<const int8_t *>(w.zeros)[at]) * total;
          sum *= load(w.scales, w.scale_type, at);
          if (w.zero_type == FEWBITS_OFFSET) sum -= static_cast<const float *>(w.zeros)[at] * total;
          result[row * ROWS + tile * 16 + r] += sum;
        }
      }
    }
  }
}

void round8(const float *x, int64_t n, int8_t *x8, float *scales, int32_t *totals) {
  for (int64_t c = 0; c < n / CHUNK; c++, x += CHUNK, x8 += CHUNK) {
    float most = 0, odd = 0;
    for (int i = 0; i < CHUNK; i++) {
      most = std::fmax(most, std::fabs(x[i]));
      odd += x[i] - x[i];  // NaN where x is not finite
    }
    const float inverse = most >= LEAST_INPUT ? 127 / most : 0;
    totals[c] = 0;
    for (int i = 0; i < CHUNK; i++) {
      x8[i] = odd == 0 ? int8_t(std::nearbyint(x[i] * inverse)) : int8_t(0);
      totals[c] += x8[i];
    }
    scales[c] = odd == 0 ? most / 127 : NAN;
  }
}

void round16(const float *x, int64_t n, uint16_t *x16, float *sums) {
  static const int order[4] = {0, 2, 1, 3};
  for (int64_t c = 0; c < n / CHUNK; c++, x += CHUNK, x16 += CHUNK) {
    sums[c] = 0;
    for (int i = 0; i < CHUNK; i++) {
      x16[i] = to_bf16(x[i / 4 * 4 + order[i % 4]]);
      sums[c] += from_bf16(x16[i]);
    }
  }
}

}  // namespace

const Isa *portable() {
  static const Isa isa{product16, product8, round8, round16};
  return &isa;
}

#ifndef FEWBITS_WITH_NEON
const Isa *neon() { return nullptr; }
#endif
#ifndef FEWBITS_WITH_AVX2
const Isa *avx2() { return nullptr; }
#endif
#ifndef FEWBITS_WITH_AVX512
const Isa *avx512() { return nullptr; }
#endif

}  // namespace fewbits
