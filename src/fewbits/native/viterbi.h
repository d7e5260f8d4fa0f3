// The best closed chain of trellis codes, 16 chains at a time, one to a lane: for files of an instruction set,
// whose compiler makes vectors of the loops over lanes. See trellis.py, whose `find_chains` this is, bit for
// bit: products are not fused with sums.
#pragma once
#include <cstdint>
#include <cstring>

namespace fewbits {
namespace {

constexpr int CHAIN = 32, WINDOW = 8, ABREAST = 16;

template <int BITS>
struct Viterbi {
  static constexpr int states = 1 << (WINDOW - BITS), codes = 1 << BITS;
  alignas(64) float x[CHAIN][ABREAST], scale[CHAIN][ABREAST], cost[states][ABREAST];
  alignas(64) uint8_t back[CHAIN][states][ABREAST];
  const float *table;

  // One step: into each state from the cheapest of those that lead to it.
  void step(int position, uint8_t (*forgotten)[ABREAST]) {
    alignas(64) float next[states][ABREAST];
    for (int state = 0; state < states; state++) {
      alignas(64) float least[ABREAST];
      alignas(64) int32_t which[ABREAST];
      for (int top = 0; top < codes; top++) {
        const int window = top * states + state;
        const float entry = table[window];
        const float *from = cost[window >> BITS];
#pragma GCC ivdep
        for (int i = 0; i < ABREAST; i++) {
          const float error = x[position][i] - scale[position][i] * entry;
          const float all = from[i] + error * error;
          const bool better = top == 0 || all < least[i];
          least[i] = better ? all : least[i];
          which[i] = better ? top : which[i];
        }
      }
      for (int i = 0; i < ABREAST; i++) {
        next[state][i] = least[i];
        forgotten[state][i] = uint8_t(which[i]);
      }
    }
    std::memcpy(cost, next, sizeof cost);
  }

  int before(int state, int top) const { return (top << (WINDOW - BITS) | state) >> BITS; }

  void run(uint8_t *result, int64_t lanes) {
    std::memset(cost, 0, sizeof cost);
    for (int t = 0; t < CHAIN; t++) step((t + CHAIN / 2) % CHAIN, back[t]);
    int closes[ABREAST];
    for (int i = 0; i < ABREAST; i++) {
      int state = 0;
      for (int s = 1; s < states; s++)
        if (cost[s][i] < cost[state][i]) state = s;
      for (int t = CHAIN - 1; t >= CHAIN / 2; t--) state = before(state, back[t][state][i]);
      closes[i] = state;
    }
    for (int s = 0; s < states; s++)
      for (int i = 0; i < ABREAST; i++) cost[s][i] = s == closes[i] ? 0 : __builtin_inff();
    for (int t = 0; t < CHAIN; t++) step(t, back[t]);
    for (int64_t i = 0; i < lanes; i++) {
      int state = closes[i];
      for (int t = CHAIN - 1; t >= 0; t--) {
        result[i * CHAIN + t] = uint8_t(state & (codes - 1));
        state = before(state, back[t][state][i]);
      }
    }
  }
};

// Chains from `begin` to `end` of (chains, 32), at most 16; absent ones cost nothing.
template <int BITS>
void chains_of(const float *x, const float *scale, const float *table, int64_t begin, int64_t end, uint8_t *codes) {
  Viterbi<BITS> v;
  v.table = table;
  for (int i = 0; i < ABREAST; i++)
    for (int t = 0; t < CHAIN; t++) {
      const int64_t at = (begin + i) * CHAIN + t;
      v.x[t][i] = begin + i < end ? x[at] : 0;
      v.scale[t][i] = begin + i < end ? scale[at] : 0;
    }
  v.run(codes + begin * CHAIN, end - begin);
}

void some_chains(const float *x, const float *scale, const float *table, int bits, int64_t begin, int64_t end,
                 uint8_t *codes) {
  switch (bits) {
    case 2: return chains_of<2>(x, scale, table, begin, end, codes);
    case 3: return chains_of<3>(x, scale, table, begin, end, codes);
    default: return chains_of<4>(x, scale, table, begin, end, codes);
  }
}

}  // namespace
}  // namespace fewbits
