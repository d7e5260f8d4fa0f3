// The layout that kernels stream, and back.
//
// Rows are in blocks of 32, two tiles of 16; columns in quads. A vector of 64 bytes holds a quad of one
// tile: byte 4r + j is row r, column j of the quad. Within a block, from the first column to the last,
// always tile 0 before tile 1:
//
//   8 bits   a vector a quad                                    columns  4:  64 + 64 bytes
//   4 bits   two quads a vector: the first in bits 0-3          columns  8:  64 + 64
//   2 bits   four quads a vector: quad s in bits 2s, 2s + 1     columns 16:  64 + 64
//   3 bits   as 2 bits; then bit 2 of all, a bit for a byte:    columns 16:  64 + 64 + 32 + 32
//            quad s in bytes 8s to 8s + 7
//
// The blocks of a trellis are its chains: what is looked up for a code are the last 8 bits of the codes of its
// column down to its row, before whose first row comes the last of the block.
#include <vector>

#include "kernel.h"

namespace fewbits {
namespace {

bool fits(int64_t out, int64_t in, int64_t columns, int bits) {
  return out >= 0 && in >= 0 && columns >= in && columns % CHUNK == 0 &&
         (bits == 2 || bits == 3 || bits == 4 || bits == 8);
}

// Where a code lies: its byte, its bit, and for three bits those of its highest bit.
struct Place {
  int64_t byte;
  int bit;
  int64_t high_byte;
  int high_bit;
};

Place place(int row, int64_t column, int bits) {
  const int tile = row / 16, lane = row % 16 * 4 + int(column % 4);
  const int64_t quad = column / 4;
  if (bits == 8) return {quad * 128 + tile * 64 + lane, 0, 0, 0};
  if (bits == 4) return {quad / 2 * 128 + tile * 64 + lane, int(quad % 2) * 4, 0, 0};
  const int s = int(quad % 4);
  const int64_t start = quad / 4 * (bits == 2 ? 128 : 192);
  return {start + tile * 64 + lane, s * 2, start + 128 + tile * 32 + s * 8 + lane / 8, lane % 8};
}

}  // namespace
}  // namespace fewbits

using namespace fewbits;

extern "C" int64_t fewbits_packed_bytes(int64_t out, int64_t columns, int bits) {
  return (out + ROWS - 1) / ROWS * (columns / CHUNK) * chunk_bytes(bits);
}

extern "C" int fewbits_pack(const uint8_t *codes, int64_t out, int64_t in, int64_t columns, int bits,
                            uint8_t *packed) {
  if (!fits(out, in, columns, bits)) return 1;
  const int64_t bytes = columns / CHUNK * chunk_bytes(bits);
  const uint8_t middle = uint8_t(1 << (bits - 1));  // what is padded is zero
  for (int64_t block = 0; block * ROWS < out; block++, packed += bytes) {
    std::memset(packed, 0, bytes);
    for (int row = 0; row < ROWS; row++) {
      const uint8_t *line = codes + (block * ROWS + row) * in;
      const int64_t filled = block * ROWS + row < out ? in : 0;
      for (int64_t column = 0; column < columns; column++) {
        const unsigned code = column < filled ? line[column] : middle;
        const Place p = place(row, column, bits);
        if (bits == 3) {
          packed[p.byte] |= uint8_t((code & 3) << p.bit);
          packed[p.high_byte] |= uint8_t((code >> 2 & 1) << p.high_bit);
        } else {
          packed[p.byte] |= uint8_t((code & ((1 << bits) - 1)) << p.bit);
        }
      }
    }
  }
  return 0;
}

namespace fewbits {

int code_at(const fewbits_weight &w, int64_t row, int64_t column) {
  const uint8_t *block = w.codes + row / ROWS * (w.columns / CHUNK) * chunk_bytes(w.bits);
  const Place p = place(int(row % ROWS), column, w.bits);
  if (w.bits == 3) return (block[p.byte] >> p.bit & 3) | (block[p.high_byte] >> p.high_bit & 1) << 2;
  return block[p.byte] >> p.bit & ((1 << w.bits) - 1);
}

// What is looked up.
static int window_at(const fewbits_weight &w, int64_t row, int64_t column) {
  const int64_t start = row / ROWS * ROWS;
  int window = 0;
  for (int back = 7 / w.bits; back >= 0; back--)
    window = window << w.bits | code_at(w, start + (row - start + ROWS - back) % ROWS, column);
  return window % VALUES;
}

float value_at(const fewbits_weight &w, int64_t row, int64_t column) {
  const int code = code_at(w, row, column), level = code - (1 << (w.bits - 1));
  const int64_t at = (row / ROWS * (w.columns / w.group) + column / w.group) * ROWS + row % ROWS;
  const float scale = load(w.scales, w.scale_type, at);
  switch (w.zero_type) {
    case FEWBITS_ZERO_POINT: return scale * float(level - static_cast<const int8_t *>(w.zeros)[at]);
    case FEWBITS_OFFSET: return scale * float(level) - static_cast<const float *>(w.zeros)[at];
    case FEWBITS_TABLE: return scale * static_cast<const float *>(w.table)[code];
    case FEWBITS_TRELLIS: return scale * float(static_cast<const int8_t *>(w.table)[window_at(w, row, column)]);
    default: return scale * float(level);
  }
}

}  // namespace fewbits

extern "C" int fewbits_unpack(const fewbits_weight *w, int type, void *result) {
  if (!fits(w->out, w->in, w->columns, w->bits) || type < FEWBITS_BF16 || type > FEWBITS_F32) return 1;
  if (w->group <= 0 || w->group % CHUNK || w->columns % w->group) return 1;
  if (w->scale_type < FEWBITS_BF16 || w->scale_type > FEWBITS_F32) return 1;
  if (w->zero_type < FEWBITS_MIDDLE || w->zero_type > FEWBITS_TRELLIS) return 1;
  if (w->zero_type == FEWBITS_TABLE && w->bits != 4) return 1;
  if (w->zero_type == FEWBITS_TRELLIS && (w->bits == 8 || w->out % ROWS)) return 1;
  for (int64_t row = 0; row < w->out; row++)
    for (int64_t column = 0; column < w->in; column++)
      store(value_at(*w, row, column), type, result, row * w->in + column);
  return 0;
}
