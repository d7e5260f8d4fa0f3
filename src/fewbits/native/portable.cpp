// Plain C++: for processors without a file of their own, and what the others are compared with.
#include <cmath>

#include "columns.h"
#include "grid.h"
#include "kernel.h"
#include "viterbi.h"

namespace fewbits {
namespace {

// A quad of 16 rows, a byte each: as avx512.cpp.
void quad(int bits, const uint8_t *chunk, int tile, int q, uint8_t *codes) {
  if (bits == 8) {
    std::memcpy(codes, chunk + q * 128 + tile * 64, 64);
  } else if (bits == 4) {
    const uint8_t *v = chunk + q / 2 * 128 + tile * 64;
    for (int i = 0; i < 64; i++) codes[i] = v[i] >> (q % 2 * 4) & 15;
  } else {
    const uint8_t *half = chunk + q / 4 * (bits == 2 ? 128 : 192), *v = half + tile * 64;
    const uint8_t *high = half + 128 + tile * 32 + q % 4 * 8;
    for (int i = 0; i < 64; i++) codes[i] = v[i] >> (q % 4 * 2) & 3;
    if (bits == 3)
      for (int i = 0; i < 64; i++) codes[i] |= (high[i / 8] >> (i % 8) & 1) << 2;
  }
}

// Both tiles of a quad are 32 rows of four bytes: what belongs to the row before lies four bytes before.
void look_up(const uint8_t *codes, int bits, int chunks, const int8_t *table, uint8_t *result) {
  constexpr int bytes = ROWS * 4;
  for (int c = 0; c < chunks; c++, codes += chunk_bytes(bits))
    for (int q = 0; q < 8; q++, result += bytes) {
      uint8_t own[bytes], window[bytes] = {};
      quad(bits, codes, 0, q, own);
      quad(bits, codes, 1, q, own + 64);
      for (int back = 7 / bits; back >= 0; back--)
        for (int i = 0; i < bytes; i++) window[i] = uint8_t(window[i] << bits | own[(i - back * 4 + bytes) % bytes]);
      for (int i = 0; i < bytes; i++) result[i] = uint8_t(table[window[i]] + MIDDLE_8);
    }
}

// What the sums of one segment are, and what comes of it: sums of integers are exact in any order.
template <class Input, int MOST, int A, int B>  // where the second and the third of four columns are
void product(const fewbits_weight &w, int64_t block, const Inputs &x, const Input *inputs, float *result) {
  const int64_t chunks = w.columns / CHUNK;
  std::memset(result, 0, x.rows * ROWS * sizeof(float));
  const int bits = x.look_up ? 8 : w.bits;
  BlockCodes panels(w, block, x);
  for (int64_t panel = 0; panel * PANEL < chunks; panel++) {
    Segments<MOST> part(w, block, panel);
    const uint8_t *codes = panels.next(part.count);
    while (part.next()) {
      const int c = part.begin, end = part.end;
      for (int tile = 0; tile < 2; tile++) {
        int16_t levels[MOST][8][64];
        for (int i = c; i < end; i++)
          for (int q = 0; q < 8; q++) {
            uint8_t own[64];
            quad(bits, codes + i * chunk_bytes(bits), tile, q, own);
            for (int j = 0; j < 64; j++) levels[i - c][q][j] = x.table ? x.table[own[j]] : int16_t(own[j]);
          }
        for (int64_t row = 0; row < x.rows; row++) {
          const int64_t first = (panel * x.rows + row) * PANEL;
          int32_t dot[16] = {}, total = 0;
          for (int i = c; i < end; i++) {
            const Input *four = inputs + (first + i) * CHUNK;
            total += x.totals[first + i];
            for (int q = 0; q < 8; q++, four += 4)
              for (int r = 0; r < 16; r++) {
                const int16_t *level = levels[i - c][q] + r * 4;
                dot[r] += level[0] * four[0] + level[1] * four[A] + level[2] * four[B] + level[3] * four[3];
              }
          }
          const float step = x.scales[first + c];
          for (int r = 0; r < 16; r++) {
            const int64_t own = part.scales() + tile * 16 + r;
            int zero = x.middle;
            if (w.zero_type == FEWBITS_ZERO_POINT) zero += static_cast<const int8_t *>(w.zeros)[own];
            float &sum = result[row * ROWS + tile * 16 + r];
            sum = std::fma(float(dot[r] - zero * total), load(w.scales, w.scale_type, own) * step, sum);
            if (w.zero_type == FEWBITS_OFFSET)
              sum = std::fma(-static_cast<const float *>(w.zeros)[own], step * float(total), sum);
          }
        }
      }
    }
  }
}

void product8(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  product<int8_t, SUMMED, 1, 2>(w, block, x, x.x8, result);
}

void product16(const fewbits_weight &w, int64_t block, const Inputs &x, float *result) {
  if (x.table) return product<int16_t, 1, 2, 1>(w, block, x, x.x16, result);
  product<int16_t, SUMMED, 2, 1>(w, block, x, x.x16, result);
}

template <class Input, int BITS, int A, int B>
void round(const float *x, int64_t n, int64_t columns, Input *integers, float *scales, int32_t *totals) {
  for (int64_t begin = 0; begin < n; begin += columns) {
    const int64_t end = begin + columns < n ? begin + columns : n;
    float largest = 0, odd = 0;
    for (int64_t i = begin; i < end; i++) {
      largest = std::fmax(largest, std::fabs(x[i]));
      odd += x[i] - x[i];  // NaN where x is not finite
    }
    const Step step = step_of(largest, odd == 0, BITS);
    for (int64_t i = begin; i < end; i++) {
      int32_t integer = step.factor == 0 ? 0 : int32_t(std::nearbyint(x[i] * step.factor));
      if (integer > MOST_16) integer = MOST_16;
      integers[i / 4 * 4 + (i % 4 == 1 ? A : i % 4 == 2 ? B : i % 4)] = Input(integer);
      if (i % CHUNK == 0) totals[i / CHUNK] = 0;
      totals[i / CHUNK] += integer;
      scales[i / CHUNK] = step.step;
    }
  }
}

void round8(const float *x, int64_t n, int64_t columns, int8_t *x8, float *scales, int32_t *totals) {
  round<int8_t, 8, 1, 2>(x, n, columns, x8, scales, totals);
}

void round16(const float *x, int64_t n, int64_t columns, int16_t *x16, float *scales, int32_t *totals) {
  round<int16_t, 16, 2, 1>(x, n, columns, x16, scales, totals);
}

// Four floats as any compiler of C++ for gcc or clang has them.
struct Lanes {
  typedef float Vector __attribute__((vector_size(16)));
  static constexpr int WIDTH = 4;
  static Vector load(const float *x) {
    Vector v;
    std::memcpy(&v, x, sizeof(v));
    return v;
  }
  static void store(float *x, Vector v) { std::memcpy(x, &v, sizeof(v)); }
  static Vector all(float x) { return Vector{x, x, x, x}; }
  static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
};

}  // namespace

const Isa *portable() {
  static const Isa isa{product16, product8, round8, round16, round_columns<Lanes>, grid_errors,
                       some_chains, look_up, {}, load_some, store_rows};
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
#ifndef FEWBITS_WITH_AVX512VBMI
const Trellis *avx512vbmi() { return nullptr; }
#endif

}  // namespace fewbits
