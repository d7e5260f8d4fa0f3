// X.T @ X of bfloat16 inputs, summed in float32: what calibration collects.
#include <atomic>

#include "kernel.h"
#include "parts.h"

namespace fewbits {
namespace {

// Rows two by two, columns in tiles of 64: (tiles, pairs, 64), of each pair the first row's value below.
void pair_rows(const uint16_t *x, int64_t rows, int64_t columns, int64_t stride, int64_t tile, int64_t count,
               uint32_t *to) {
  std::memset(to + (rows + 1) / 2 * SQUARE, 0, (count - (rows + 1) / 2) * SQUARE * sizeof(uint32_t));
  const int64_t from = tile * SQUARE, n = columns - from < SQUARE ? columns - from : SQUARE;
  for (int64_t row = 0; row < rows; row += 2, to += SQUARE) {
    const uint16_t *a = x + row * stride + from, *b = a + stride;
    if (n < SQUARE) std::memset(to, 0, SQUARE * sizeof(uint32_t));
    if (row + 1 < rows)
      for (int64_t i = 0; i < n; i++) to[i] = uint32_t(a[i]) | uint32_t(b[i]) << 16;
    else
      for (int64_t i = 0; i < n; i++) to[i] = a[i];
  }
}

struct Panels {
  float *const *data;
  int64_t columns, width;  // of all, and of one panel

  // A tile of rows at `top` and columns at `left`, or its mirror image.
  void add(const float *tile, int64_t top, int64_t left, bool mirrored) const {
    const int64_t panel = left / width, start = panel * width;
    const int64_t own = columns - start < width ? columns - start : width;
    const int64_t rows = columns - top < SQUARE ? columns - top : SQUARE;
    const int64_t n = columns - left < SQUARE ? columns - left : SQUARE;
    for (int64_t i = 0; i < rows; i++) {
      float *to = data[panel] + (top - start + i) * own + left - start;
      for (int64_t j = 0; j < n; j++) to[j] += mirrored ? tile[j * SQUARE + i] : tile[i * SQUARE + j];
    }
  }
};

}  // namespace

#ifndef FEWBITS_WITH_BF16
const Bf16 *avx512_bf16() { return nullptr; }
#endif
#ifndef FEWBITS_WITH_AMX
const Bf16 *amx_bf16() { return nullptr; }
const Isa *amx() { return nullptr; }
#endif

const Bf16 *bf16() { return fewbits_isa() == FEWBITS_AMX ? amx_bf16() : avx512_bf16(); }

}  // namespace fewbits

using namespace fewbits;

extern "C" int fewbits_has_bf16(void) { return bf16() != nullptr; }

extern "C" int fewbits_gram(const void *x, int64_t rows, int64_t columns, int64_t stride, float *const *panels,
                            int64_t width, int threads, fewbits_parallel parallel) {
  const Bf16 *isa = bf16();
  if (!isa || rows < 0 || columns < 0 || width <= 0 || width % SQUARE) return 1;
  const int64_t count = ((rows + 1) / 2 + isa->unit - 1) / isa->unit * isa->unit, tiles = (columns + SQUARE - 1) / SQUARE;
  const auto pairs = array<uint32_t>(tiles * count * SQUARE);
  if (!pairs) return 2;
  in_parts(tiles, 1, threads, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++)
      pair_rows(static_cast<const uint16_t *>(x), rows, columns, stride, tile, count,
                &pairs[tile * count * SQUARE]);
  });
  const Panels to{panels, columns, width};
  std::atomic<bool> failed{false};
  in_parts(tiles * (tiles + 1) / 2, 1, threads, parallel, [&](int64_t begin, int64_t end) {
    alignas(64) float result[SQUARE * SQUARE];
    const auto turned = array<uint32_t>(isa->turn ? count * SQUARE : 1);
    if (!turned) return failed.store(true);
    int64_t top = 0;  // tiles below the diagonal, row by row
    while ((top + 1) * (top + 2) / 2 <= begin) top++;
    int64_t left = begin - top * (top + 1) / 2;
    for (int64_t i = begin; i < end; i++) {
      const uint32_t *own = &pairs[top * count * SQUARE];
      if (isa->turn && (i == begin || left == 0)) isa->turn(own, count, turned.get());
      isa->gram_tile(isa->turn ? turned.get() : own, &pairs[left * count * SQUARE], count, result);
      to.add(result, top * SQUARE, left * SQUARE, false);
      const bool both = top != left && top * SQUARE / width == left * SQUARE / width;
      if (both) to.add(result, left * SQUARE, top * SQUARE, true);  // panels have squares on the diagonal
      if (++left > top) top++, left = 0;
    }
  });
  return failed ? 2 : 0;
}
