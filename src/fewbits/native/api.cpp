// The entry: which instruction set, which thread does what, and all that does not depend on either.
#include <atomic>
#include <cmath>

#include "kernel.h"
#include "parts.h"

namespace fewbits {
namespace {

// -- instruction sets --------------------------------------------------------------------------------

const Isa *isa_of(int which) {
  switch (which) {
    case FEWBITS_AMX: return amx();
    case FEWBITS_AVX512: return avx512();
    case FEWBITS_AVX2: return avx2();
    case FEWBITS_NEON: return neon();
    case FEWBITS_PORTABLE: return portable();
    default: return nullptr;
  }
}

int best() {
  int which = FEWBITS_AMX;
  while (!isa_of(which)) which--;
  return which;
}

std::atomic<int> chosen{-1};

// -- a product ---------------------------------------------------------------------------------------

constexpr int64_t FEW_ROWS = 8;        // are rounded by the caller alone
constexpr int64_t PART = 32 * 1024;    // bytes of codes that are worth a part
constexpr int64_t SLICE = 256;         // rows of x at a time: their results stay in the cache
constexpr int64_t TILED = 3 << 19;     // bytes of x in tiles at a time, which are gone through for each block; measured

// Columns of x that share a scale. In 8 bits no more than share one of the weight: they are dear.
int64_t rounded_together(const fewbits_weight &w, int inputs) {
  const bool alone = w.zero_type == FEWBITS_TABLE || (inputs == FEWBITS_INPUTS_8 && w.group == CHUNK);
  return alone ? CHUNK : SUMMED * CHUNK;
}

// Rows of x as integers. With INPUTS_32 there are twice as many: what was rounded off follows.
class Rounded {
 public:
  Rounded(const fewbits_weight &w, const Isa &isa, int inputs, int64_t rows, const Planes *planes)
      : w_(w), isa_(isa), planes_(planes), inputs_(inputs), width_((w.columns + WIDE - 1) / WIDE * WIDE),
        scales_(array<float>(rows * width_ / CHUNK)), totals_(array<int32_t>(rows * width_ / CHUNK)) {
    if (planes)
      x8_ = array<int8_t>(filled_tiles(rows, planes->side) * width_ * bytes());
    else if (inputs == FEWBITS_INPUTS_8)
      x8_ = array<int8_t>(rows * width_);
    else
      x16_ = array<int16_t>(rows * width_);
    if (w.zero_type != FEWBITS_TABLE) return;
    const auto *table = static_cast<const float *>(w.table);
    for (int i = 0; i < 16; i++) largest_ = std::fmax(largest_, std::fabs(table[i]));
    for (int i = 0; largest_ > 0 && i < 16; i++) table_[i] = int16_t(std::nearbyint(table[i] / largest_ * TABLE));
  }

  bool made() const { return scales_ && totals_ && (x8_ || x16_); }

  Inputs of(int64_t rows) const {
    const bool table = w_.zero_type == FEWBITS_TABLE, trellis = w_.zero_type == FEWBITS_TRELLIS;
    const int32_t middle = trellis ? MIDDLE_8 : table ? 0 : 1 << (w_.bits - 1);
    return {rows, x8_.get(), x16_.get(), scales_.get(), totals_.get(), middle, table ? table_ : nullptr,
            trellis ? isa_.look_up : nullptr, x8_.get()};
  }

  // One row of `rows` (or of twice as many); `line` has w.columns floats, which may be changed.
  void round(float *line, int64_t row, int64_t rows) const {
    const bool twice = inputs_ == FEWBITS_INPUTS_32;
    const int64_t all = twice ? 2 * rows : rows;
    for (int64_t begin = 0; begin < w_.columns; begin += WIDE) {
      const int64_t n = w_.columns - begin < WIDE ? w_.columns - begin : WIDE;
      round_panel(line + begin, n, begin / WIDE, row, all);
      if (twice) round_panel(line + begin, n, begin / WIDE, rows + row, all);
    }
  }

 private:
  int64_t bytes() const { return inputs_ == FEWBITS_INPUTS_8 ? 1 : 2; }
  int64_t side(int64_t rows) const { return rows < planes_->side ? rows : planes_->side; }
  int8_t *tile(int64_t panel, int64_t row, int64_t rows) const {
    return x8_.get() + (panel * filled_tiles(rows, planes_->side) + row / side(rows) * side(rows)) * WIDE * bytes();
  }

  // Row `row` of `rows`. Leaves in `line` what was rounded off, and rounds it to be as large as it is stored.
  void round_panel(float *line, int64_t n, int64_t panel, int64_t row, int64_t rows) const {
    const int64_t at = panel * rows + row;
    float *scales = scales_.get() + at * PANEL;
    int32_t *totals = totals_.get() + at * PANEL;
    alignas(64) int16_t own[WIDE];
    const int64_t together = rounded_together(w_, inputs_);
    if (inputs_ == FEWBITS_INPUTS_8) {
      auto *x8 = planes_ ? reinterpret_cast<int8_t *>(own) : x8_.get() + at * WIDE;
      isa_.round8(line, n, together, x8, scales, totals);
      if (planes_) planes_->place8(x8, row % side(rows), side(rows), tile(panel, row, rows));
      return;
    }
    int16_t *x16 = planes_ ? own : x16_.get() + at * WIDE;
    isa_.round16(line, n, together, x16, scales, totals);
    if (planes_) planes_->place16(x16, row % side(rows), side(rows), tile(panel, row, rows));
    if (inputs_ == FEWBITS_INPUTS_32)
      for (int64_t i = 0; i < n; i++) {
        const int64_t stored = i % 4 == 1 ? i + 1 : i % 4 == 2 ? i - 1 : i;
        line[i] = std::fma(-float(x16[stored]), scales[i / CHUNK], line[i]);
      }
    if (w_.zero_type == FEWBITS_TABLE)
      for (int64_t c = 0; c < n / CHUNK; c++) scales[c] *= largest_ / TABLE;
  }

  const fewbits_weight &w_;
  const Isa &isa_;
  const Planes *const planes_;  // NULL: integers as they are
  const int inputs_;
  const int64_t width_;
  Array<int8_t> x8_;
  Array<int16_t> x16_;
  Array<float> scales_;
  Array<int32_t> totals_;
  float largest_ = 0;
  int16_t table_[16] = {};
};

// What is faster for so many rows, and takes the weight.
const Planes *planes_for(const Isa &isa, const fewbits_weight &w, int inputs, int64_t rows) {
  for (const Planes *planes : isa.planes)
    if (planes && planes->takes(w, inputs, rows)) return planes;
  return nullptr;
}

// So many rows in tiles, whole ones.
int64_t rows_at_once(int64_t columns, int inputs) {
  const int64_t fit = TILED / (columns * (inputs == FEWBITS_INPUTS_8 ? 1 : 2) + 1) / 16 * 16;
  return fit < 64 ? 64 : fit < SLICE ? fit : SLICE;
}

// Slices of at most so many rows, alike: the weights are gone through for each.
int64_t slice_of(int64_t rows, int64_t most) {
  const int64_t count = (rows + most - 1) / most;
  if (count <= 1) return rows;
  const int64_t each = ((rows + count - 1) / count + 15) / 16 * 16;
  return each < most ? each : most;
}

bool right(const fewbits_weight &w, int inputs, int type) {
  return w.out >= 0 && w.in >= 0 && w.group > 0 && w.group % CHUNK == 0 && w.columns >= w.in &&
         w.columns % w.group == 0 && (w.bits == 2 || w.bits == 3 || w.bits == 4 || w.bits == 8) &&
         w.scale_type >= FEWBITS_BF16 && w.scale_type <= FEWBITS_F32 && type >= FEWBITS_BF16 &&
         type <= FEWBITS_F32 && w.zero_type >= FEWBITS_MIDDLE && w.zero_type <= FEWBITS_TRELLIS &&
         inputs >= FEWBITS_INPUTS_16 && inputs <= FEWBITS_INPUTS_32 &&
         (w.zero_type != FEWBITS_TABLE || (w.bits == 4 && inputs != FEWBITS_INPUTS_8)) &&
         (w.zero_type != FEWBITS_TRELLIS || (w.bits != 8 && w.out % ROWS == 0));
}

}  // namespace
}  // namespace fewbits

using namespace fewbits;

extern "C" int fewbits_interface(void) { return FEWBITS_INTERFACE; }

extern "C" int fewbits_isa(void) {
  const int which = chosen.load();
  return which < 0 ? best() : which;
}

extern "C" int fewbits_use(int which) {
  if (which >= 0 && !isa_of(which)) return 1;
  chosen.store(which);
  return 0;
}

extern "C" int fewbits_linear(const fewbits_weight *weight, const void *x, int64_t rows, int64_t stride,
                              int type, const void *bias, void *y, int inputs, int threads,
                              fewbits_parallel parallel) {
  const fewbits_weight &w = *weight;
  if (rows < 0 || !right(w, inputs, type)) return 1;
  const Isa &isa = *isa_of(fewbits_isa());
  const int64_t least = 1 + PART / (w.columns / CHUNK * chunk_bytes(w.bits) + 1);
  const int parts = inputs == FEWBITS_INPUTS_32 ? 2 : 1;  // of a row
  const Planes *planes = planes_for(isa, w, inputs, rows * parts);
  const auto product = inputs == FEWBITS_INPUTS_8 ? (planes ? planes->product8 : isa.product8)
                                                  : (planes ? planes->product16 : isa.product16);
  const int64_t slice = slice_of(rows, (planes ? rows_at_once(w.columns, inputs) : SLICE) / parts);
  const Rounded rounded(w, isa, inputs, slice * parts, planes);
  if (!rounded.made()) return 2;
  std::atomic<bool> failed{false};
  for (int64_t begun = 0; begun < rows; begun += slice) {
    const int64_t some = rows - begun < slice ? rows - begun : slice;
    in_parts(some, FEW_ROWS, threads, parallel, [&](int64_t begin, int64_t end) {
      const auto line = array<float>(w.columns);
      if (!line) return failed.store(true);
      for (int64_t row = begin; row < end; row++) {
        const int64_t from = (begun + row) * stride;
        isa.load_some(x, type, from, w.in, line.get());
        std::memset(line.get() + w.in, 0, (w.columns - w.in) * sizeof(float));
        rounded.round(line.get(), row, some);
      }
    });
    if (failed) return 2;
    const Inputs in = rounded.of(some * parts);
    in_parts((w.out + ROWS - 1) / ROWS, least, threads, parallel, [&](int64_t begin, int64_t end) {
      alignas(64) float result[SLICE * ROWS];
      for (int64_t block = begin; block < end; block++) {
        product(w, block, in, result);
        const int64_t from = block * ROWS, filled = w.out - from < ROWS ? w.out - from : ROWS;
        float added[ROWS] = {};
        for (int64_t i = 0; bias && i < filled; i++) added[i] = load(bias, type, from + i);
        if (parts == 2)
          for (int64_t i = 0; i < some * ROWS; i++) result[i] += result[some * ROWS + i];
        isa.store_rows(result, some, bias ? added : nullptr, filled, type, y, begun * w.out + from, w.out);
      }
    }, {w.codes, w.columns / CHUNK * chunk_bytes(w.bits)});
  }
  return 0;
}

extern "C" int fewbits_find_chains(const float *x, const float *scale, const float *table, int64_t chains, int bits,
                                   uint8_t *codes, int threads, fewbits_parallel parallel) {
  if (chains < 0 || bits < 2 || bits > 4) return 1;
  const Isa &isa = *isa_of(fewbits_isa());
  constexpr int64_t together = 16;
  in_parts((chains + together - 1) / together, 1, threads, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * together; i < end * together && i < chains; i += together)
      isa.some_chains(x, scale, table, bits, i, i + together < chains ? i + together : chains, codes);
  });
  return 0;
}

extern "C" int fewbits_round_columns(const fewbits_columns *columns, int threads, fewbits_parallel parallel) {
  const fewbits_columns &c = *columns;
  if (c.columns < 0 || c.rows < 0 || !(c.range >= 0 && c.range < 0x1p16f)) return 1;
  const Isa &isa = *isa_of(fewbits_isa());
  std::atomic<bool> failed{false};
  in_parts((c.rows + LINE - 1) / LINE, 1, threads, parallel, [&](int64_t begin, int64_t end) {
    const auto errors = array<float>(c.columns * LINE + 1);
    if (!errors) return failed.store(true);
    for (int64_t line = begin; line < end; line++) isa.round_columns(c, line, errors.get());
  });
  return failed ? 2 : 0;
}

extern "C" int fewbits_grid_errors(const fewbits_grids *grids, int threads, fewbits_parallel parallel) {
  const fewbits_grids &g = *grids;
  if (g.rows < 0 || g.columns < 0 || g.groups < 1 || g.columns % g.groups || g.tried < 0 ||
      !(g.range >= 0 && g.range < 0x1p16f))
    return 1;
  const Isa &isa = *isa_of(fewbits_isa());
  in_parts(g.rows, 16, threads, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) isa.grid_errors(g, row);
  });
  return 0;
}

extern "C" uint64_t fewbits_stream(const void *data, int64_t bytes, int threads, fewbits_parallel parallel) {
  std::atomic<uint64_t> all{0};
  in_parts(bytes / 64, PART / 64, threads, parallel, [&](int64_t begin, int64_t end) {
    const auto *line = static_cast<const uint64_t *>(data);
    uint64_t sum[8] = {};
    for (int64_t i = begin * 8; i < end * 8; i += 8) {
      __builtin_prefetch(line + i + 384);
      for (int j = 0; j < 8; j++) sum[j] ^= line[i + j];
    }
    uint64_t one = 0;
    for (uint64_t part : sum) one ^= part;
    all ^= one;
  });
  return all;
}
