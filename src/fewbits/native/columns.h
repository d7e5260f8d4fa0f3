// Columns of a matrix rounded one after the other, for rows that lie side by side. Every instruction set
// compiles this file for itself: `F` has its vectors of `WIDTH` floats, and `fma(a, b, c)`, a * b + c.
#pragma once
#include "kernel.h"

namespace fewbits {

// Of columns k to k + K the rows of `LINE`: what errors from j to `end` move them by, added to `moved`.
template <class F, int K>
static void add_shares(const fewbits_columns &c, int64_t k, int64_t j, int64_t end, const float *errors,
                       float *moved) {
  constexpr int STRIP = F::WIDTH == 16 ? 4 : 2;  // vectors: sums stay in registers
  for (int r = 0; r < LINE; r += STRIP * F::WIDTH) {
    typename F::Vector sums[K][STRIP];
    for (int i = 0; i < K; i++)
      for (int v = 0; v < STRIP; v++) sums[i][v] = F::load(moved + i * LINE + r + v * F::WIDTH);
    for (int64_t l = j; l < end; l++) {
      typename F::Vector e[STRIP];
      for (int v = 0; v < STRIP; v++) e[v] = F::load(errors + l * LINE + r + v * F::WIDTH);
      for (int i = 0; i < K; i++) {
        const typename F::Vector share = F::all(c.shares[l * c.columns + k + i]);
        for (int v = 0; v < STRIP; v++) sums[i][v] = F::fma(share, e[v], sums[i][v]);
      }
    }
    for (int i = 0; i < K; i++)
      for (int v = 0; v < STRIP; v++) F::store(moved + i * LINE + r + v * F::WIDTH, sums[i][v]);
  }
}

// One column of a line, at the place nearest to where the others leave it. `values` and the grid are at its
// first row; of the `n` rows.
static inline void round_column(const fewbits_columns &c, int64_t k, int64_t at, int64_t n, const float *moved,
                                float *errors, float *losses) {
  const float *weight = c.weights + k * c.rows + at;
  const int64_t grid = c.groups[k] * c.rows + at;
  const float *step = c.steps + grid, *inverse = c.inverse + grid, *low = c.low + grid;
  const float cost = losses ? c.costs[k] : 0;
  float unused[LINE] = {}, *lost = losses ? losses : unused;
  for (int64_t r = 0; r < n; r++) {
    const float least = low[r], most = least + c.range, value = weight[r] * inverse[r];
    const float wanted = value + moved[r] * inverse[r];
    float nearest = wanted < least ? least : wanted;
    nearest = nearest > most ? most : nearest;
    nearest = (nearest + TO_INTEGER) - TO_INTEGER;
    errors[r] = (value - nearest) * step[r];
    const float left = (wanted - nearest) * step[r];
    lost[r] += cost * left * left;
  }
}

// All columns of one line; `errors` has room for (columns, LINE).
template <class F>
static void round_columns(const fewbits_columns &c, int64_t line, float *errors) {
  constexpr int BLOCK = 64, CHUNK = 64;  // columns corrected together; errors that stay in the cache
  const int64_t at = line * LINE, n = c.rows - at < LINE ? c.rows - at : LINE;
  for (int64_t j = 0; j < c.columns; j++) {
    std::memcpy(errors + j * LINE, c.errors + j * c.rows + at, n * sizeof(float));
    std::memset(errors + j * LINE + n, 0, (LINE - n) * sizeof(float));
  }
  float *losses = c.losses ? c.losses + at : nullptr;
  for (int64_t r = 0; losses && r < n; r++) losses[r] = 0;
  alignas(64) float moved[BLOCK * LINE];
  for (int64_t start = 0; start < c.columns; start += BLOCK) {
    const int64_t stop = start + BLOCK < c.columns ? start + BLOCK : c.columns;
    std::memset(moved, 0, sizeof(moved));
    const int64_t last = c.upper ? start : c.columns;
    for (int64_t j = 0; j < last; j += CHUNK) {
      if (j == start) continue;  // the block itself
      const int64_t end = j + CHUNK < last ? j + CHUNK : last;
      int64_t k = start;
      for (; k + 4 <= stop; k += 4) add_shares<F, 4>(c, k, j, end, errors, moved + (k - start) * LINE);
      for (; k < stop; k++) add_shares<F, 1>(c, k, j, end, errors, moved + (k - start) * LINE);
    }
    for (int64_t k = start; k < stop; k++) {
      float *own = moved + (k - start) * LINE;
      add_shares<F, 1>(c, k, start, k, errors, own);
      if (!c.upper) add_shares<F, 1>(c, k, k + 1, stop, errors, own);
      round_column(c, k, at, n, own, errors + k * LINE, losses);
    }
  }
  for (int64_t j = 0; j < c.columns; j++)
    std::memcpy(c.errors + j * c.rows + at, errors + j * LINE, n * sizeof(float));
}

}  // namespace fewbits
