// What the files of the library share. An instruction set is a table of functions. Functions here are static:
// of inline ones the linker keeps one copy, and might keep that of a file with AVX-512 for all.
#pragma once
#include <cstdint>
#include <cstring>

#include "fewbits.h"

namespace fewbits {

constexpr int ROWS = 32;   // of W in a block
constexpr int CHUNK = 32;  // columns: the inputs that share a scale when they are rounded to int8
constexpr int PANEL = 8;   // chunks that are gone through for all rows of x before the next
constexpr float LEAST_INPUT = 0x1p-120f;  // 127 divided by less is no float: 32 inputs below it are zeros
constexpr int WIDE = PANEL * CHUNK;

static constexpr int64_t chunk_bytes(int bits) { return CHUNK * ROWS * bits / 8; }

// Rows of x as kernels read them: (panels, rows, 256), so that rows side by side lie side by side, and
// (panels, rows, 8) for what belongs to a chunk. The last panel is filled up with whatever is there.
// In 16 bit each four columns a b c d are stored a c b d: a vector of four bytes a row gives its even
// and its odd bytes as pairs.
struct Inputs {
  int64_t rows;
  const uint16_t *x16;    // bfloat16
  const float *sums;      // of a chunk of x16
  const int8_t *x8;
  const float *scales;    // of a chunk: x ~ x8 * scale
  const int32_t *totals;  // of a chunk of x8
};

struct Isa {
  // One block of 32 rows of W times all rows of x: into result (rows, 32).
  void (*product16)(const fewbits_weight &, int64_t block, const Inputs &, float *result);
  void (*product8)(const fewbits_weight &, int64_t block, const Inputs &, float *result);
  // `n` floats of one row, a multiple of 32, at most a panel: rounded to int8, or to bfloat16.
  void (*round8)(const float *x, int64_t n, int8_t *x8, float *scales, int32_t *totals);
  void (*round16)(const float *x, int64_t n, uint16_t *x16, float *sums);
};

const Isa *portable();
const Isa *neon();
const Isa *avx2();
const Isa *avx512();

static inline float from_bf16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// To nearest, ties to even; NaN stays NaN.
static inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Branches that a compiler turns into selections, so that loops over it are vectorized.
static inline float from_f16(uint16_t half) {
  const uint32_t wide = uint32_t(half & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &wide, 4);
  value *= 0x1p112f;  // the exponent counts from 127, not 15; right for subnormal numbers as well
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits |= (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  bits |= uint32_t(half & 0x8000) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To nearest, ties to even.
static inline uint16_t to_f16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);  // from 65520 on
  if (size < 0x38800000) {  // steps of 2^-24: one of them is the last digit of half a float
    float small;
    std::memcpy(&small, &size, 4);
    small += 0.5f;
    std::memcpy(&bits, &small, 4);
    return uint16_t(sign | (bits & 0x7fffff));
  }
  return uint16_t(sign | ((size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13));
}

static inline float load(const void *data, int type, int64_t i) {
  if (type == FEWBITS_F32) return static_cast<const float *>(data)[i];
  const uint16_t bits = static_cast<const uint16_t *>(data)[i];
  return type == FEWBITS_F16 ? from_f16(bits) : from_bf16(bits);
}

static inline void store(float value, int type, void *data, int64_t i) {
  if (type == FEWBITS_F32)
    static_cast<float *>(data)[i] = value;
  else
    static_cast<uint16_t *>(data)[i] = type == FEWBITS_F16 ? to_f16(value) : to_bf16(value);
}

// One code of the layout, and what it stands for.
int code_at(const fewbits_weight &w, int64_t row, int64_t column);
float value_at(const fewbits_weight &w, int64_t row, int64_t column);

// Threads of our own, where torch's are not known.
void own_threads(void (*work)(void *), void *data, unsigned threads, unsigned flags);

}  // namespace fewbits
