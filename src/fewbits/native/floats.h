// Products of numbers in 16 and 32 bits: float weights, and attention. The code is in lanes.h, in plain C++
// with the compiler's vectors, and compiled once for each instruction set.
#pragma once
#include "kernel.h"

namespace fewbits {

constexpr int KEYS = 256;     // of attention that are gone through at a time: sums over parts of as many
constexpr int LANES = 16;     // sums are of 16 lanes, whatever the processor has: everywhere the same bits
constexpr int STEP = 64;      // columns of a float weight at a time; rows of x are filled up with zeros

// A part of the keys that some queries see, all of one group.
struct Seen {
  const float *queries;  // (rows, padded width), scaled
  int64_t rows, padded;  // a multiple of LANES
  int64_t keys, width, value_width;
  const void *key, *value;  // of the first key, in `type`
  int64_t key_stride, value_stride;
  int type;
  const uint8_t *const *masks;  // of each row, from the first key on; NULL: all are seen
};

struct FloatIsa {
  // One row of W (bfloat16) times `rows` rows of x, `padded` apart: into result (rows,).
  void (*dots)(const uint16_t *w, int64_t columns, const float *x, int64_t rows, int64_t padded, float *result);
  // At most KEYS keys: the largest score of each row, and relative to it the sums of weights and of weighted
  // values (rows, value_width).
  void (*attend)(const Seen &, float *largest, float *sums, float *result);
  // (count,) in place.
  void (*exponentials)(float *x, int64_t count);
};

const FloatIsa *floats_portable();
const FloatIsa *floats_neon();
const FloatIsa *floats_avx2();
const FloatIsa *floats_avx512();

}  // namespace fewbits
