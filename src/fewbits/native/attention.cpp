// Attention of many queries in bfloat16, as calibration asks for it: softmax(scaling * Q K.T) V, scores and sums
// in float32, weights rounded to bfloat16. No square of all scores is ever in memory.
#include "kernel.h"
#include "parts.h"

namespace fewbits {
namespace {

constexpr float LOG2_E = 1.44269504f;

// One head's tokens, each in one piece of memory.
const uint16_t *head(const void *data, const int64_t *strides, int64_t batch, int64_t head) {
  return static_cast<const uint16_t *>(data) + batch * strides[0] + head * strides[1];
}

}  // namespace
}  // namespace fewbits

using namespace fewbits;

extern "C" int fewbits_attend(const fewbits_attention *attention, int threads, fewbits_parallel parallel) {
  const fewbits_attention &a = *attention;
  const Bf16 *isa = bf16();
  const bool shared = a.groups > 0 && a.heads % a.groups == 0;
  if (!isa || !shared || a.keys < 1 || a.width < 1 || a.value_width < 1 || (a.causal && a.queries != a.keys))
    return 1;
  const int64_t blocks = (a.keys + SQUARE - 1) / SQUARE;
  const int64_t pairs = ((a.width + 1) / 2 + isa->unit - 1) / isa->unit * isa->unit;
  const int64_t strips = (a.value_width + SQUARE - 1) / SQUARE;
  const int64_t key_size = blocks * pairs * SQUARE, value_size = blocks * strips * SQUARE / 2 * SQUARE;
  const auto keys = array<uint32_t>(a.batch * a.groups * key_size);
  const auto values = array<uint32_t>(a.batch * a.groups * value_size);
  if (!keys || !values) return 2;
  in_parts(a.batch * a.groups, 1, threads, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      isa->pack_keys(a, head(a.k, a.k_strides, i / a.groups, i % a.groups), pairs, &keys[i * key_size]);
      isa->pack_values(a, head(a.v, a.v_strides, i / a.groups, i % a.groups), &values[i * value_size]);
    }
  });
  const int64_t parts = (a.queries + SQUARE - 1) / SQUARE;
  std::atomic<bool> failed{false};
  in_parts(a.batch * a.heads * parts, 1, threads, parallel, [&](int64_t begin, int64_t end) {
    const auto rows = array<uint32_t>(SQUARE * pairs);
    const auto found = array<float>(SQUARE * strips * SQUARE);
    if (!rows || !found) return failed.store(true);
    for (int64_t i = begin; i < end; i++) {
      const int64_t batch = i / parts / a.heads, own = i / parts % a.heads, first = i % parts * SQUARE;
      const int64_t group = batch * a.groups + own / (a.heads / a.groups);
      const int64_t n = a.queries - first < SQUARE ? a.queries - first : SQUARE;
      std::memset(rows.get(), 0, SQUARE * pairs * sizeof(uint32_t));
      for (int64_t r = 0; r < n; r++)
        std::memcpy(&rows[r * pairs], head(a.q, a.q_strides, batch, own) + (first + r) * a.q_strides[2],
                    a.width * sizeof(uint16_t));
      const Keys all{pairs, strips, &keys[group * key_size], &values[group * value_size]};
      uint16_t *to = static_cast<uint16_t *>(a.result);
      to += ((batch * a.queries + first) * a.heads + own) * a.value_width;
      const Rows result{n, a.value_width, a.heads * a.value_width, to};
      isa->attend(rows.get(), all, a.scaling * LOG2_E, first, a.keys, a.causal, found.get(), result);
    }
  });
  return failed ? 2 : 0;
}
