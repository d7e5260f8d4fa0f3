// What the files of the library share. An instruction set is a table of functions. Functions here are static:
// of inline ones the linker keeps one copy, and might keep that of a file with AVX-512 for all.
#pragma once
#include <cstdint>
#include <cstring>

#include "fewbits.h"

namespace fewbits {

constexpr int ROWS = 32;   // of W in a block
constexpr int CHUNK = 32;  // columns
constexpr int PANEL = 8;   // chunks that are gone through for all rows of x before the next
constexpr int WIDE = PANEL * CHUNK;
constexpr int VALUES = 256;  // that windows of a trellis stand for

static constexpr int64_t chunk_bytes(int bits) { return CHUNK * ROWS * bits / 8; }

constexpr int SUMMED = 4;  // chunks that are rounded together: 128 * 255 * 32768 fits int32
constexpr int MIDDLE_8 = 128;  // of codes of 8 bits, as which values of a trellis are multiplied
constexpr int TABLE = 2047;   // what the largest entry of a table becomes; there a chunk is rounded alone

// Values of a trellis for some chunks of a block, from `codes` on: in the layout of codes of 8 bits, at `result`,
// which is aligned to 64 bytes.
using LookUp = void (*)(const uint8_t *codes, int bits, int chunks, const int8_t *table, uint8_t *result);

// Rows of x as kernels read them: integers (panels, rows, 256), so that rows side by side lie side by
// side, and (panels, rows, 8) for what belongs to a chunk. The last panel is filled up with whatever is
// there. In 16 bit each four columns a b c d are stored a c b d: the even bytes of a vector of four a
// row are then a pair, and the odd ones.
struct Inputs {
  int64_t rows;
  const int8_t *x8;
  const int16_t *x16;
  const float *scales;    // of a chunk: x ~ integer * scale; alike for chunks rounded together
  const int32_t *totals;  // of a chunk: the sum of the integers
  int32_t middle;         // what is taken off a code, zero points aside
  const int16_t *table;   // (16,), or NULL
  LookUp look_up;         // of a trellis, or NULL
  const int8_t *tiles;    // instead of x8 and x16: see Planes
};

constexpr int LINE = 128;               // rows of columns that are rounded at a time
constexpr float TO_INTEGER = 0x1.8p23f;  // added and taken off it rounds to nearest, ties to even, below 2^22

// Products of bytes by bytes, summed in 32 bits. Inputs of 16 bits are two planes of bytes then, the high ones and
// the low ones; what they give is put together before it is scaled. All that are integers: the bits are those of
// any other product. Rows of x are in tiles of `side`, or of as many as there are:
// (panels, tiles, steps of 64 columns, planes, rows of a tile, 64).
struct Planes {
  int64_t side;
  // Whether it knows the weight, and is faster for so many rows of x; measured.
  bool (*takes)(const fewbits_weight &, int inputs, int64_t rows);
  // A panel of one row, as round8 or round16 left it, to its place: `tile` is that of its tile, of `rows` rows.
  void (*place8)(const int8_t *x8, int64_t row, int64_t rows, int8_t *tile);
  void (*place16)(const int16_t *x16, int64_t row, int64_t rows, int8_t *tile);
  void (*product8)(const fewbits_weight &, int64_t block, const Inputs &, float *result);
  void (*product16)(const fewbits_weight &, int64_t block, const Inputs &, float *result);
};

const Planes *amx_planes();

// Rows that whole tiles have.
static inline int64_t filled_tiles(int64_t rows, int64_t side) {
  return rows < side ? rows : (rows + side - 1) / side * side;
}

struct Isa {
  // One block of 32 rows of W times all rows of x: into result (rows, 32).
  void (*product16)(const fewbits_weight &, int64_t block, const Inputs &, float *result);
  void (*product8)(const fewbits_weight &, int64_t block, const Inputs &, float *result);
  // `n` floats of one row, a multiple of 32, at most a panel: rounded, `columns` of them together.
  void (*round8)(const float *x, int64_t n, int64_t columns, int8_t *x8, float *scales, int32_t *totals);
  void (*round16)(const float *x, int64_t n, int64_t columns, int16_t *x16, float *scales, int32_t *totals);
  // One line of rows of columns: see columns.h.
  void (*round_columns)(const fewbits_columns &, int64_t line, float *errors);
  // One row: see grid.h.
  void (*grid_errors)(const fewbits_grids &, int64_t row);
  // Codes of chains from `begin` to `end`, at most 16 of them.
  void (*some_chains)(const float *x, const float *scale, const float *table, int bits, int64_t begin,
                      int64_t end, uint8_t *codes);
  LookUp look_up;
  const Planes *planes[2];  // the first that is faster is taken; NULL where there are none
  // `n` values of a type, from number `at` on, as floats.
  void (*load_some)(const void *data, int type, int64_t at, int64_t n, float *values);
  // Results (rows, 32), to each row of which 32 values may be added: the first n, rounded, `stride` apart.
  void (*store_rows)(const float *result, int64_t rows, const float *added, int64_t n, int type, void *y, int64_t at,
                     int64_t stride);
};

constexpr int SQUARE = 64;  // rows and columns of a product of bfloat16

// Keys and values of one head, in blocks of 64 keys; in pairs along what is summed.
struct Keys {
  int64_t pairs;           // of a query or a key
  int64_t strips;          // of 64 of a value
  const uint32_t *keys;    // (blocks, pairs, 64)
  const uint32_t *values;  // (blocks, strips, 32, 64)
};

// Where some rows of bfloat16 go: `n` of so many columns, `stride` apart.
struct Rows {
  int64_t n, columns, stride;
  uint16_t *data;
};

// What takes instructions for bfloat16; a processor may have them or not, whatever else it has.
struct Bf16 {
  int64_t unit;  // of pairs: what is summed is filled up with zeros to a multiple
  // Pairs (count, 64) in the order in which `gram_tile` reads a; NULL: as they are.
  void (*turn)(const uint32_t *pairs, int64_t count, uint32_t *turned);
  // result (64, 64) = the sum over `count` pairs of a (count, 64) times b.
  void (*gram_tile)(const uint32_t *a, const uint32_t *b, int64_t count, float *result);
  // One head's keys -> (blocks, pairs, 64), and values -> (blocks, strips, 32, 64); what is past the last key,
  // or behind the width, is 0.
  void (*pack_keys)(const fewbits_attention &, const uint16_t *k, int64_t pairs, uint32_t *to);
  void (*pack_values)(const fewbits_attention &, const uint16_t *v, uint32_t *to);
  // Of 64 queries (64, pairs), the first of which is number `first`, to the first `seen` keys, or, causal,
  // those up to themselves: values weighted by 2^(factor * score) and divided by the sum of weights. `sums` has
  // room for (64, strips, 64).
  void (*attend)(const uint32_t *queries, const Keys &keys, float factor, int64_t first, int64_t seen,
                 bool causal, float *sums, const Rows &result);
};

const Bf16 *avx512_bf16();  // each NULL where the machine has it not
const Bf16 *amx_bf16();
const Bf16 *bf16();  // that of the instruction set in use

const Isa *portable();
const Isa *neon();
const Isa *avx2();
const Isa *avx512();
const Isa *amx();

// What AVX-512 does better with VBMI: products of a trellis. NULL where that is not known.
struct Trellis {
  void (*product16)(const fewbits_weight &, int64_t block, const Inputs &, float *result);
  void (*product8)(const fewbits_weight &, int64_t block, const Inputs &, float *result);
  LookUp look_up;
};

const Trellis *avx512vbmi();

// How inputs that are rounded together become integers: times `factor`; times `step` they are what they were.
struct Step {
  float factor, step;
};

constexpr float LEAST_INPUT = 0x1p-100f;  // where all are smaller they count as zeros: factors stay finite
constexpr int32_t MOST_16 = 32767;        // to which what is rounded up to 32768 is lowered

// For the largest of them in size. What is not finite must not vanish: the step is then NaN, and so is the
// row of the result. In 16 bit steps are powers of two, so that bfloat16 of one size stays what it is.
static inline Step step_of(float largest, bool finite, int bits) {
  if (!finite) return {0, __builtin_nanf("")};
  if (largest < LEAST_INPUT) return {0, 0};
  if (bits == 8) return {127 / largest, largest / 127};
  uint32_t exponent;
  std::memcpy(&exponent, &largest, 4);
  exponent = ((exponent >> 23) - 14) << 23;  // 2^15 steps from a power of two to zero
  float step;
  std::memcpy(&step, &exponent, 4);
  return {1 / step, step};
}

namespace {  // nor may the linker choose among these

// The chunks of a panel in segments that are summed before they are scaled: they share the scale of the
// weights and that of x, of which at most MOST chunks have the same. A segment is from `begin` to `end`.
template <int MOST>
struct Segments {
  int count, begin = 0, end = 0;
  int64_t per_group, group, group_end;

  Segments(const fewbits_weight &w, int64_t block, int64_t panel) : per_group(w.group / CHUNK) {
    const int64_t left = w.columns / CHUNK - panel * PANEL, within = panel * PANEL / per_group;
    count = int(left < PANEL ? left : PANEL);
    group = block * (w.columns / w.group) + within - 1;
    group_end = within * per_group - panel * PANEL;
  }

  bool next() {
    begin = end;
    if (begin == count) return false;
    if (begin >= group_end) {
      group++;
      group_end += per_group;
    }
    end = begin / MOST * MOST + MOST;
    if (MOST > 1 && end > group_end) end = int(group_end);
    if (MOST > 1 && end > count) end = count;
    return true;
  }

  int64_t scales() const { return group * ROWS; }  // where those of the weights lie
};

}  // namespace

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
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 64;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
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

// Loops without a branch, which a compiler makes vectors of: each file for its own instructions.
static inline void load_some(const void *data, int type, int64_t at, int64_t n, float *values) {
  if (type == FEWBITS_BF16)
    for (int64_t i = 0; i < n; i++) values[i] = from_bf16(static_cast<const uint16_t *>(data)[at + i]);
  else
    for (int64_t i = 0; i < n; i++) values[i] = load(data, type, at + i);
}

static inline void store_rows(const float *result, int64_t rows, const float *added, int64_t n, int type, void *y,
                              int64_t at, int64_t stride) {
  for (int64_t row = 0; row < rows; row++, result += ROWS, at += stride) {
    float sums[ROWS];
    for (int i = 0; i < ROWS; i++) sums[i] = added ? result[i] + added[i] : result[i];
    if (type == FEWBITS_BF16) {
      uint16_t halves[ROWS];
      for (int i = 0; i < ROWS; i++) halves[i] = to_bf16(sums[i]);
      std::memcpy(static_cast<uint16_t *>(y) + at, halves, n * sizeof *halves);
    } else {
      for (int64_t i = 0; i < n; i++) store(sums[i], type, y, at + i);
    }
  }
}

namespace {

// The chunks of a block, a panel at a time: of a trellis what was looked up, else its codes as they lie.
class BlockCodes {
 public:
  BlockCodes(const fewbits_weight &w, int64_t block, const Inputs &x)
      : w_(w), x_(x), codes_(w.codes + block * (w.columns / CHUNK) * chunk_bytes(w.bits)) {}

  const uint8_t *next(int chunks) {
    const uint8_t *codes = codes_;
    codes_ += PANEL * chunk_bytes(w_.bits);
    if (!x_.look_up) return codes;
    x_.look_up(codes, w_.bits, chunks, static_cast<const int8_t *>(w_.table), looked_up_);
    return looked_up_;
  }

 private:
  const fewbits_weight &w_;
  const Inputs &x_;
  const uint8_t *codes_;
  alignas(64) uint8_t looked_up_[PANEL * CHUNK * ROWS];
};

}  // namespace

// One code of the layout, and what it stands for.
int code_at(const fewbits_weight &w, int64_t row, int64_t column);
float value_at(const fewbits_weight &w, int64_t row, int64_t column);

// Threads of our own, where torch's are not known.
void own_threads(void (*work)(void *), void *data, unsigned threads, unsigned flags);

}  // namespace fewbits
