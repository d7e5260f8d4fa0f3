// The entry: which instruction set, which thread does what, and all that does not depend on either.
#include <atomic>
#include <cstdlib>
#include <memory>

#include "kernel.h"

namespace fewbits {
namespace {

// -- instruction sets --------------------------------------------------------------------------------

const Isa *isa_of(int which) {
  switch (which) {
    case FEWBITS_AVX512: return avx512();
    case FEWBITS_AVX2: return avx2();
    case FEWBITS_NEON: return neon();
    case FEWBITS_PORTABLE: return portable();
    default: return nullptr;
  }
}

int best() {
  int which = FEWBITS_AVX512;
  while (!isa_of(which)) which--;
  return which;
}

std::atomic<int> chosen{-1};

// -- threads -----------------------------------------------------------------------------------------

// Parts of a job, taken by whoever is free: long ones while there is much left, short ones in the end,
// so that no thread waits long for the last.
class Parts {
 public:
  Parts(int64_t count, int64_t least, int threads) : count_(count), least_(least), threads_(threads) {}

  bool take(int64_t &begin, int64_t &end) {
    begin = next_.load(std::memory_order_relaxed);
    do {
      if (begin >= count_) return false;
      const int64_t share = (count_ - begin) / (2 * threads_);
      end = begin + (share > least_ ? share : least_);
      end = end < count_ ? end : count_;
    } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
  }

 private:
  const int64_t count_, least_;
  const int threads_;
  std::atomic<int64_t> next_{0};
};

// `work(begin, end)` for parts of 0 to count.
template <class Work>
void in_parts(int64_t count, int64_t least, int threads, fewbits_parallel parallel, const Work &work) {
  if (threads <= 1 || count <= least) return work(int64_t(0), count);
  struct Job {
    Parts parts;
    const Work &work;
  } job{{count, least, threads}, work};
  const auto take_all = [](void *data) {
    Job &shared = *static_cast<Job *>(data);
    for (int64_t begin, end; shared.parts.take(begin, end);) shared.work(begin, end);
  };
  (parallel ? parallel : own_threads)(take_all, &job, unsigned(threads), 0);
}

// -- a product ---------------------------------------------------------------------------------------

constexpr int64_t FEW_ROWS = 8;        // are rounded by the caller alone
constexpr int64_t PART = 32 * 1024;    // bytes of codes that are worth a part
constexpr int64_t SLICE = 256;         // rows of x at a time: their results stay in the cache

struct Freed {
  void operator()(void *memory) const { std::free(memory); }
};

template <class T>
using Array = std::unique_ptr<T[], Freed>;

template <class T>
Array<T> array(int64_t n) {
  return Array<T>(static_cast<T *>(std::malloc(n * sizeof(T))));
}

// Rows of x, rounded.
struct Rounded {
  Array<int8_t> x8;
  Array<uint16_t> x16;
  Array<float> scales;
  Array<int32_t> totals;

  Rounded(int64_t rows, int64_t columns, int inputs) : scales(array<float>(rows * columns / CHUNK)) {
    if (inputs == FEWBITS_INPUTS_8) {
      x8 = array<int8_t>(rows * columns);
      totals = array<int32_t>(rows * columns / CHUNK);
    } else {
      x16 = array<uint16_t>(rows * columns);
    }
  }

  bool made() const { return scales && (x16 || (x8 && totals)); }
};

bool right(const fewbits_weight &w, int inputs, int type) {
  return w.out >= 0 && w.in >= 0 && w.group > 0 && w.group % CHUNK == 0 && w.columns >= w.in &&
         w.columns % w.group == 0 && (w.bits == 2 || w.bits == 3 || w.bits == 4 || w.bits == 8) &&
         w.scale_type >= FEWBITS_BF16 && w.scale_type <= FEWBITS_F32 && type >= FEWBITS_BF16 &&
         type <= FEWBITS_F32 && w.zero_type >= FEWBITS_MIDDLE && w.zero_type <= FEWBITS_TABLE &&
         (inputs == FEWBITS_INPUTS_16 || inputs == FEWBITS_INPUTS_8) &&
         (w.zero_type != FEWBITS_TABLE || (w.bits == 4 && inputs == FEWBITS_INPUTS_16));
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
  if (!right(w, inputs, type) || rows < 0) return 1;
  const Isa &isa = *isa_of(fewbits_isa());
  const int64_t columns = w.columns, chunks = columns / CHUNK, blocks = (w.out + ROWS - 1) / ROWS;
  const int64_t most = rows < SLICE ? rows : SLICE;
  const Rounded rounded(most, (columns + WIDE - 1) / WIDE * WIDE, inputs);
  if (!rounded.made()) return 2;
  const int64_t least = 1 + PART / (chunks * chunk_bytes(w.bits) + 1);
  std::atomic<bool> failed{false};
  for (int64_t first = 0; first < rows; first += SLICE) {
    const int64_t count = rows - first < SLICE ? rows - first : SLICE;
    in_parts(count, FEW_ROWS, threads, parallel, [&](int64_t begin, int64_t end) {
      const auto line = array<float>(columns);
      if (!line) return failed.store(true);
      std::memset(line.get() + w.in, 0, (columns - w.in) * sizeof(float));
      for (int64_t row = begin; row < end; row++) {
        const int64_t from = (first + row) * stride;
        for (int64_t i = 0; i < w.in; i++) line[i] = load(x, type, from + i);
        for (int64_t begin = 0; begin < columns; begin += WIDE) {
          const int64_t n = columns - begin < WIDE ? columns - begin : WIDE;
          const int64_t at = begin / WIDE * count + row;
          float *scales = rounded.scales.get() + at * PANEL;
          if (inputs == FEWBITS_INPUTS_8)
            isa.round8(&line[begin], n, &rounded.x8[at * WIDE], scales, &rounded.totals[at * PANEL]);
          else
            isa.round16(&line[begin], n, &rounded.x16[at * WIDE], scales);
        }
      }
    });
    if (failed) return 2;
    const Inputs in{count, rounded.x16.get(), rounded.scales.get(), rounded.x8.get(),
                    rounded.scales.get(), rounded.totals.get()};
    in_parts(blocks, least, threads, parallel, [&](int64_t begin, int64_t end) {
      alignas(64) float result[SLICE * ROWS];
      for (int64_t block = begin; block < end; block++) {
        (inputs == FEWBITS_INPUTS_8 ? isa.product8 : isa.product16)(w, block, in, result);
        const int64_t from = block * ROWS, filled = w.out - from < ROWS ? w.out - from : ROWS;
        for (int64_t row = 0; row < count; row++)
          for (int64_t i = 0; i < filled; i++)
            store(result[row * ROWS + i] + (bias ? load(bias, type, from + i) : 0.0f), type, y,
                  (first + row) * w.out + from + i);
      }
    });
  }
  return 0;
}

extern "C" uint64_t fewbits_stream(const void *data, int64_t bytes, int threads, fewbits_parallel parallel) {
  std::atomic<uint64_t> all{0};
  in_parts(bytes / 64, PART / 64, threads, parallel, [&](int64_t begin, int64_t end) {
    const auto *line = static_cast<const uint64_t *>(data);
    uint64_t sum[8] = {};
    for (int64_t i = begin * 8; i < end * 8; i += 8)
      for (int j = 0; j < 8; j++) sum[j] ^= line[i + j];
    uint64_t one = 0;
    for (uint64_t part : sum) one ^= part;
    all ^= one;
  });
  return all;
}
