// Entries for what is not quantized: float weights times few rows, and attention of few queries.
#include <cmath>

#include "floats.h"
#include "parts.h"

namespace fewbits {
namespace {

constexpr int64_t PART = 32 * 1024;  // bytes to read that are worth a part

const FloatIsa &float_isa() {
  switch (fewbits_isa()) {
#ifdef FEWBITS_WITH_AVX512
    case FEWBITS_AMX:
    case FEWBITS_AVX512: return *floats_avx512();
#endif
#ifdef FEWBITS_WITH_AVX2
    case FEWBITS_AVX2: return *floats_avx2();
#endif
#ifdef FEWBITS_WITH_NEON
    case FEWBITS_NEON: return *floats_neon();
#endif
    default: return *floats_portable();
  }
}

// What `attend` is given, with the sizes of its parts.
struct Few {
  const fewbits_few &a;
  int64_t shared, rows, parts, padded;  // heads that share keys; rows of queries of a group; parts of the keys

  explicit Few(const fewbits_few &a)
      : a(a), shared(a.heads / a.groups), rows(shared * a.queries), parts((a.keys + KEYS - 1) / KEYS),
        padded((a.width + LANES - 1) / LANES * LANES) {}

  int64_t items() const { return a.batch * a.groups * parts; }
  int64_t head(int64_t group, int64_t row) const { return group * shared + row / a.queries; }
};

const char *at(const void *data, int type, int64_t index) {
  return static_cast<const char *>(data) + index * (type == FEWBITS_F32 ? 4 : 2);
}

bool right(const fewbits_few &a) {
  return (a.type == FEWBITS_BF16 || a.type == FEWBITS_F32) && a.batch >= 0 && a.groups > 0 && a.heads >= 0 &&
         a.heads % a.groups == 0 && a.queries >= 0 && a.keys >= 0 && a.width >= 0 && a.value_width >= 0;
}

}  // namespace
}  // namespace fewbits

using namespace fewbits;

extern "C" int fewbits_float_linear(const void *weight, int64_t out, int64_t in, const void *x, int64_t rows,
                                    int64_t stride, int type, const void *bias, void *y, int threads,
                                    fewbits_parallel parallel) {
  if (out < 0 || in < 0 || rows < 0 || type != FEWBITS_BF16) return 1;
  const FloatIsa &isa = float_isa();
  const int64_t padded = (in + STEP - 1) / STEP * STEP;
  const auto line = array<float>(rows * padded + 1), all = array<float>(rows * out + 1);
  if (!line || !all) return 2;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < padded; i++) line[row * padded + i] = i < in ? load(x, type, row * stride + i) : 0;
  in_parts(out, 1 + PART / (2 * in + 1), threads, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++) {
      float *sums = all.get() + o * rows;
      isa.dots(static_cast<const uint16_t *>(weight) + o * in, in, line.get(), rows, padded, sums);
      for (int64_t row = 0; row < rows; row++)
        store(bias ? sums[row] + load(bias, type, o) : sums[row], type, y, row * out + o);
    }
  }, {weight, 2 * in});
  return 0;
}

extern "C" int fewbits_attend_few(const fewbits_few *few, int threads, fewbits_parallel parallel) {
  const fewbits_few &a = *few;
  if (!right(a)) return 1;
  const FloatIsa &isa = float_isa();
  const Few all(a);
  const int64_t rows = all.rows, width = a.value_width, lines = all.items() * rows;
  const auto queries = array<float>(a.batch * a.heads * a.queries * all.padded + 1);
  const auto largest = array<float>(lines + 1), sums = array<float>(lines + 1), values = array<float>(lines * width + 1);
  const auto masks = array<const uint8_t *>(a.mask ? lines + 1 : 1);
  if (!queries || !largest || !sums || !values || !masks) return 2;
  float *line = queries.get();
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.heads; h++)
      for (int64_t q = 0; q < a.queries; q++, line += all.padded) {
        const int64_t from = b * a.q_strides[0] + h * a.q_strides[1] + q * a.q_strides[2];
        for (int64_t i = 0; i < all.padded; i++) line[i] = i < a.width ? load(a.q, a.type, from + i) * a.scaling : 0;
      }
  const int64_t bytes = KEYS * (a.width + width) * (a.type == FEWBITS_F32 ? 4 : 2);
  in_parts(all.items(), 1 + PART / (bytes + 1), threads, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t part = item % all.parts, group = item / all.parts % a.groups, b = item / all.parts / a.groups;
      const int64_t first = part * KEYS, left = a.keys - first;
      const auto of_group = [&](const void *data, const int64_t *strides) {
        return at(data, a.type, b * strides[0] + group * strides[1] + first * strides[2]);
      };
      const uint8_t **own = masks.get() + item * rows;
      for (int64_t row = 0; a.mask && row < rows; row++)
        own[row] = a.mask + b * a.mask_strides[0] + all.head(group, row) * a.mask_strides[1] +
                   row % a.queries * a.mask_strides[2] + first;
      const Seen seen{queries.get() + (b * a.groups + group) * rows * all.padded, rows, all.padded,
                      left < KEYS ? left : KEYS, a.width, width, of_group(a.k, a.k_strides),
                      of_group(a.v, a.v_strides), a.k_strides[2], a.v_strides[2], a.type,
                      a.mask ? own : nullptr};
      isa.attend(seen, largest.get() + item * rows, sums.get() + item * rows, values.get() + item * rows * width);
    }
  });
  // The parts of a row are added in their order, relative to the largest score of all.
  const auto shares = array<float>(all.parts + 1), result = array<float>(width + 1);
  if (!shares || !result) return 2;
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t group = 0; group < a.groups; group++)
      for (int64_t row = 0; row < rows; row++) {
        const int64_t from = (b * a.groups + group) * all.parts * rows + row;  // parts are `rows` apart
        float most = -INFINITY, total = 0;
        for (int64_t p = 0; p < all.parts; p++) most = std::fmax(most, largest[from + p * rows]);
        for (int64_t p = 0; p < all.parts; p++) {
          const float own = largest[from + p * rows];
          shares[p] = own == -INFINITY ? -INFINITY : own - most;
        }
        isa.exponentials(shares.get(), all.parts);
        std::memset(result.get(), 0, width * sizeof(float));
        for (int64_t p = 0; p < all.parts; p++) {
          const float *own = values.get() + (from + p * rows) * width;
          total += shares[p] * sums[from + p * rows];
          for (int64_t i = 0; i < width; i++) result[i] += shares[p] * own[i];
        }
        const int64_t to = ((b * a.queries + row % a.queries) * a.heads + all.head(group, row)) * width;
        for (int64_t i = 0; i < width; i++) store(total == 0 ? 0 : result[i] / total, a.type, a.result, to + i);
      }
  return 0;
}
