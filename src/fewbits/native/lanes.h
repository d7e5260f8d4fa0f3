// The code behind floats.h, for vectors of FEWBITS_WIDTH floats. Sixteen lanes are as many vectors as it
// takes; a product and a sum are rounded each, so that results are the same bits on every processor.
#include <cmath>

#include "floats.h"

namespace fewbits {
namespace {

typedef float Part __attribute__((vector_size(4 * FEWBITS_WIDTH)));
typedef int32_t Whole __attribute__((vector_size(4 * FEWBITS_WIDTH)));
typedef uint32_t Word __attribute__((vector_size(4 * FEWBITS_WIDTH)));
typedef uint16_t Half __attribute__((vector_size(2 * FEWBITS_WIDTH)));
constexpr int PARTS = LANES / FEWBITS_WIDTH;
constexpr int AHEAD_BYTES = 3072;  // asked for before they are needed; measured

// Sixteen floats.
struct Lanes {
  Part v[PARTS];

  static Lanes all(float value) {
    Lanes r;
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) r.v[i] = Part{} + value;
    return r;
  }
  static Lanes from(const float *data) {
    Lanes r;
    std::memcpy(&r, data, sizeof r);
    return r;
  }
  static Lanes from(const uint16_t *data) {  // bfloat16
    Lanes r;
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) {
      Half half;
      std::memcpy(&half, data + i * FEWBITS_WIDTH, sizeof half);
      r.v[i] = Part(__builtin_convertvector(half, Word) << 16);
    }
    return r;
  }
  // The first `n`, and zeros.
  template <class T>
  static Lanes first(const T *data, int64_t n) {
    T some[LANES] = {};
    std::memcpy(some, data, n * sizeof(T));
    return from(some);
  }
  void to(float *data) const { std::memcpy(data, this, sizeof *this); }
  void add(const Lanes &a, const Lanes &b) {
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) v[i] += a.v[i] * b.v[i];
  }
  void add(const Lanes &a, float b) {
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) v[i] += a.v[i] * b;
  }
  void add(const Lanes &a) {
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) v[i] += a.v[i];
  }
  // Lane i and lane i + FEWBITS_WIDTH, and so on until one vector is left.
  Part folded() const {
    Part part[PARTS];
    std::memcpy(part, v, sizeof part);
#pragma GCC unroll 4
    for (int half = PARTS / 2; half; half /= 2)
#pragma GCC unroll 4
      for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
  }
  float sum() const {
    float a[LANES];
    to(a);
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
  }
};

#ifdef __clang__
#define FEWBITS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FEWBITS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Whole{__VA_ARGS__})
#endif

// Pieces of 2 * HALF lanes are halved, lane i and lane i + HALF added: those of a, then those of b.
template <int HALF>
Part fold(Part a, Part b) {
#if FEWBITS_WIDTH == 16
  if constexpr (HALF == 8)
    return FEWBITS_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           FEWBITS_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  else if constexpr (HALF == 4)
    return FEWBITS_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           FEWBITS_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  else if constexpr (HALF == 2)
    return FEWBITS_SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           FEWBITS_SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  else
    return FEWBITS_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           FEWBITS_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif FEWBITS_WIDTH == 8
  if constexpr (HALF == 4)
    return FEWBITS_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + FEWBITS_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  else if constexpr (HALF == 2)
    return FEWBITS_SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + FEWBITS_SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
  else
    return FEWBITS_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + FEWBITS_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  if constexpr (HALF == 2)
    return FEWBITS_SHUFFLE(a, b, 0, 1, 4, 5) + FEWBITS_SHUFFLE(a, b, 2, 3, 6, 7);
  else
    return FEWBITS_SHUFFLE(a, b, 0, 2, 4, 6) + FEWBITS_SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}

// Lane i: the sum of all lanes of the i-th of 2 * HALF vectors.
template <int HALF>
Part sums_of(const Lanes *a) {
  if constexpr (HALF == 0)
    return a->folded();
  else
    return fold<FEWBITS_WIDTH / 2 / HALF>(sums_of<HALF / 2>(a), sums_of<HALF / 2>(a + HALF));
}

// -- a float weight ----------------------------------------------------------------------------------

template <int M>
void dots_of(const uint16_t *w, int64_t columns, const float *x, int64_t padded, float *result) {
  constexpr int VECTORS = STEP / LANES;
  Lanes sums[M][VECTORS];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sums[m][v] = Lanes::all(0);
  const auto step = [&](const uint16_t *from, int64_t at) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      const Lanes each = Lanes::from(from + v * LANES);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sums[m][v].add(each, Lanes::from(x + m * padded + at + v * LANES));
    }
  };
  const int64_t whole = columns / STEP * STEP;
  for (int64_t i = 0; i < whole; i += STEP) {
    __builtin_prefetch(w + i + AHEAD_BYTES / 2, 0, 2);  // into the second cache: measured
    __builtin_prefetch(w + i + AHEAD_BYTES / 2 + 32, 0, 2);
    step(w + i, i);
  }
  if (whole < columns) {
    uint16_t rest[STEP] = {};
    std::memcpy(rest, w + whole, (columns - whole) * sizeof *w);
    step(rest, whole);
  }
  for (int m = 0; m < M; m++) {
    for (int v = 1; v < VECTORS; v++) sums[m][0].add(sums[m][v]);
    result[m] = sums[m][0].sum();
  }
}

void dots(const uint16_t *w, int64_t columns, const float *x, int64_t rows, int64_t padded, float *result) {
  for (; rows >= 4; rows -= 4, x += 4 * padded, result += 4) dots_of<4>(w, columns, x, padded, result);
  if (rows >= 2) {
    dots_of<2>(w, columns, x, padded, result);
    rows -= 2, x += 2 * padded, result += 2;
  }
  if (rows) dots_of<1>(w, columns, x, padded, result);
}

// -- attention ---------------------------------------------------------------------------------------

// exp(x) for x <= 0; 0 below -87. The polynomial is that of Cephes (Moshier): 2 units in the last place.
void exponential(float *x) {
  Lanes a = Lanes::from(x);
#pragma GCC unroll 4
  for (int i = 0; i < PARTS; i++) {
    const Part v = a.v[i];
    const Whole low = v < -87.0f;
    const Part held = Part(Whole(v) & ~low);  // 0 instead: numbers stay in range
    const Whole n = __builtin_convertvector(held * 1.44269504f - 0.5f, Whole);
    const Part whole = __builtin_convertvector(n, Part);
    const Part r = held - whole * 0.693359375f - whole * -2.12194440e-4f;
    Part p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p = p * Part((Word(n) + 127) << 23);
    a.v[i] = Part(Whole(p) & ~low);
  }
  a.to(x);
}

void exponentials(float *x, int64_t count) {
  for (; count >= LANES; count -= LANES, x += LANES) exponential(x);
  if (count == 0) return;
  float some[LANES] = {};
  std::memcpy(some, x, count * sizeof *x);
  exponential(some);
  std::memcpy(x, some, count * sizeof *x);
}

constexpr int TOGETHER = 4;  // rows of queries
constexpr int BESIDE = FEWBITS_WIDTH >= 16 ? 4 : FEWBITS_WIDTH == 8 ? 2 : 1;  // vectors of values: registers are few

// Scores of J rows from `row` on, (J, KEYS); of as many keys at a time as a vector holds sums.
template <int J, class T>
void scores(const Seen &s, int64_t row, float (*result)[KEYS]) {
  constexpr int TIMES = FEWBITS_WIDTH / J;
  const float *queries = s.queries + row * s.padded;
  const auto *key = static_cast<const T *>(s.key);
  const int64_t whole = s.width / LANES * LANES;
  for (int64_t first = 0; first < s.keys; first += TIMES) {
    const T *keys[TIMES];
    for (int t = 0; t < TIMES; t++) keys[t] = key + (first + t < s.keys ? first + t : s.keys - 1) * s.key_stride;
    Lanes sums[FEWBITS_WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < FEWBITS_WIDTH; i++) sums[i] = Lanes::all(0);
    const auto step = [&](int t, const Lanes &each, int64_t at) {
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) sums[j * TIMES + t].add(each, Lanes::from(queries + j * s.padded + at));
    };
    for (int64_t i = 0; i < whole; i += LANES)
#pragma GCC unroll 16
      for (int t = 0; t < TIMES; t++) {
        __builtin_prefetch(reinterpret_cast<const char *>(keys[t] + i) + AHEAD_BYTES);
        step(t, Lanes::from(keys[t] + i), i);
      }
    if (whole < s.width)
#pragma GCC unroll 16
      for (int t = 0; t < TIMES; t++) step(t, Lanes::first(keys[t] + whole, s.width - whole), whole);
    const Part all = sums_of<FEWBITS_WIDTH / 2>(sums);
    float line[FEWBITS_WIDTH];
    std::memcpy(line, &all, sizeof line);
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) std::memcpy(result[j] + first, line + j * TIMES, TIMES * sizeof(float));
  }
}

// Weights of J rows times C vectors of values, from column `at` on.
template <int J, int C, class T>
void weighted(const Seen &s, const float (*weights)[KEYS], int64_t at, int64_t columns, float *result) {
  Lanes sums[J][C];
#pragma GCC unroll 4
  for (int j = 0; j < J; j++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) sums[j][c] = Lanes::all(0);
  const auto *value = static_cast<const T *>(s.value) + at;
  for (int64_t t = 0; t < s.keys; t++, value += s.value_stride) {
    __builtin_prefetch(reinterpret_cast<const char *>(value) + AHEAD_BYTES);
    Lanes each[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++)
      each[c] = columns >= (c + 1) * LANES ? Lanes::from(value + c * LANES)
                                           : Lanes::first(value + c * LANES, columns - c * LANES);
#pragma GCC unroll 4
    for (int j = 0; j < J; j++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) sums[j][c].add(each[c], weights[j][t]);
  }
  for (int j = 0; j < J; j++) {
    float line[C * LANES];
    for (int c = 0; c < C; c++) sums[j][c].to(line + c * LANES);
    std::memcpy(result + j * s.value_width + at, line, columns * sizeof(float));
  }
}

// Takes the largest of `keys` scores off all of them, and returns it. What is not a number must not vanish: it
// is not the largest, which is 0 where there is no other.
float below(float *scores, int64_t keys) {
  Lanes most = Lanes::all(-INFINITY);
  int64_t t = 0;
  for (; t + LANES <= keys; t += LANES) {
    const Lanes each = Lanes::from(scores + t);
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) most.v[i] = each.v[i] > most.v[i] ? each.v[i] : most.v[i];
  }
  float lane[LANES], largest = -INFINITY;
  most.to(lane);
  for (const float each : lane) largest = each > largest ? each : largest;
  for (; t < keys; t++) largest = scores[t] > largest ? scores[t] : largest;
  if (largest == -INFINITY) largest = 0;
  for (t = 0; t < keys; t++) scores[t] -= largest;
  return largest;
}

// Of those that are seen; minus infinity where there are none.
float below(float *scores, int64_t keys, const uint8_t *mask) {
  uint8_t any = 0;
  for (int64_t t = 0; t < keys; t++) {
    any |= mask[t];
    scores[t] = mask[t] ? scores[t] : -INFINITY;
  }
  const float largest = below(scores, keys);
  return any ? largest : -INFINITY;
}

template <int J, class T>
void attend_rows(const Seen &s, int64_t row, float *largest, float *sums, float *result) {
  alignas(64) float weights[J][KEYS];
  scores<J, T>(s, row, weights);
  for (int j = 0; j < J; j++) {
    largest[row + j] = s.masks ? below(weights[j], s.keys, s.masks[row + j]) : below(weights[j], s.keys);
    exponentials(weights[j], s.keys);
    Lanes all = Lanes::all(0);
    int64_t t = 0;
    for (; t + LANES <= s.keys; t += LANES) all.add(Lanes::from(weights[j] + t));
    if (t < s.keys) all.add(Lanes::first(weights[j] + t, s.keys - t));
    sums[row + j] = all.sum();
  }
  float *own = result + row * s.value_width;
  int64_t at = 0;
  for (; at + BESIDE * LANES <= s.value_width; at += BESIDE * LANES)
    weighted<J, BESIDE, T>(s, weights, at, BESIDE * LANES, own);
  for (; at < s.value_width; at += LANES)
    weighted<J, 1, T>(s, weights, at, s.value_width - at < LANES ? s.value_width - at : LANES, own);
}

template <class T>
void attend_in(const Seen &s, float *largest, float *sums, float *result) {
  int64_t row = 0;
  for (; row + TOGETHER <= s.rows; row += TOGETHER) attend_rows<TOGETHER, T>(s, row, largest, sums, result);
  for (; row < s.rows; row++) attend_rows<1, T>(s, row, largest, sums, result);
}

void attend(const Seen &s, float *largest, float *sums, float *result) {
  if (s.type == FEWBITS_F32) return attend_in<float>(s, largest, sums, result);
  attend_in<uint16_t>(s, largest, sums, result);
}

const FloatIsa code{dots, attend, exponentials};

}  // namespace
}  // namespace fewbits
