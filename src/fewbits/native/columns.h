// Columns of a matrix rounded one after the other, for rows that lie side by side. Every instruction set
// compiles this file for itself: `F` has its vectors of `WIDTH` floats, and `fma(a, b, c)`, a * b + c.
#pragma once
#include "kernel.h"

namespace fewbits {

constexpr int TOGETHER = 64;   // columns corrected together, and the side of a tile of shares
constexpr int ONE_BY_ONE = 8;  // of them that are rounded before the rest is corrected

template <class F>
constexpr int STRIP = (F::WIDTH == 16 ? 4 : 2) * F::WIDTH;  // rows whose sums stay in registers

// Of K columns a strip of rows: what `count` errors move them by, added to `moved`. Shares are (count, TOGETHER).
template <class F, int K>
static void add_shares(const float *shares, int64_t count, const float *errors, float *moved) {
  constexpr int N = STRIP<F> / F::WIDTH;
  typename F::Vector sums[K][N];
  for (int i = 0; i < K; i++)
    for (int v = 0; v < N; v++) sums[i][v] = F::load(moved + i * LINE + v * F::WIDTH);
  for (int64_t l = 0; l < count; l++) {
    typename F::Vector e[N];
    for (int v = 0; v < N; v++) e[v] = F::load(errors + l * LINE + v * F::WIDTH);
    for (int i = 0; i < K; i++) {
      const typename F::Vector share = F::all(shares[l * TOGETHER + i]);
      for (int v = 0; v < N; v++) sums[i][v] = F::fma(share, e[v], sums[i][v]);
    }
  }
  for (int i = 0; i < K; i++)
    for (int v = 0; v < N; v++) F::store(moved + i * LINE + v * F::WIDTH, sums[i][v]);
}

// The same of all rows, and of columns from `begin` to `end` of a block.
template <class F>
static void add_all(const float *shares, int64_t count, const float *errors, int64_t begin, int64_t end,
                    float *moved) {
  constexpr int MANY = F::WIDTH == 16 ? 6 : 4;  // sums, errors and a share in 32 registers, or in 16
  for (int r = 0; r < LINE; r += STRIP<F>) {
    int64_t k = begin;
    for (; k + MANY <= end; k += MANY) add_shares<F, MANY>(shares + k, count, errors + r, moved + k * LINE + r);
    for (; k + 2 <= end; k += 2) add_shares<F, 2>(shares + k, count, errors + r, moved + k * LINE + r);
    for (; k < end; k++) add_shares<F, 1>(shares + k, count, errors + r, moved + k * LINE + r);
  }
}

// One column of a line, at the place nearest to where the others leave it. `values` and the grid are at its
// first row; of the `n` rows.
static void round_column(const fewbits_columns &c, int64_t k, int64_t at, int64_t n, const float *__restrict moved,
                         float *__restrict errors, float *__restrict losses) {
  const int64_t grid = c.groups[k] * c.rows + at;
  const float *__restrict weight = c.weights + k * c.rows + at, *__restrict step = c.steps + grid;
  const float *__restrict inverse = c.inverse + grid, *__restrict low = c.low + grid;
  const float cost = c.costs ? c.costs[k] : 0, range = c.range;
  for (int64_t r = 0; r < n; r++) {
    const float least = low[r], most = least + range, value = weight[r] * inverse[r];
    const float wanted = value + moved[r] * inverse[r];
    float nearest = wanted < least ? least : wanted;
    nearest = nearest > most ? most : nearest;
    nearest = (nearest + TO_INTEGER) - TO_INTEGER;
    errors[r] = (value - nearest) * step[r];
    const float left = (wanted - nearest) * step[r];
    losses[r] += cost * left * left;
  }
}

// All columns of one line; `errors` has room for (columns, LINE).
template <class F>
static void round_columns(const fewbits_columns &c, int64_t line, float *errors) {
  const int64_t at = line * LINE, n = c.rows - at < LINE ? c.rows - at : LINE;
  for (int64_t j = 0; j < c.columns; j++) {
    std::memcpy(errors + j * LINE, c.errors + j * c.rows + at, n * sizeof(float));
    std::memset(errors + j * LINE + n, 0, (LINE - n) * sizeof(float));
  }
  float losses[LINE] = {};
  alignas(64) float moved[TOGETHER * LINE];
  const int64_t blocks = (c.columns + TOGETHER - 1) / TOGETHER;
  for (int64_t which = 0; which < blocks; which++) {
    const int64_t start = which * TOGETHER, own = start + TOGETHER < c.columns ? TOGETHER : c.columns - start;
    const float *shares = c.shares + which * TOGETHER * TOGETHER;  // below each other, `blocks` apart
    const int64_t apart = blocks * TOGETHER * TOGETHER;
    std::memset(moved, 0, sizeof(moved));
    for (int64_t other = 0; other < (c.upper ? which : blocks); other++) {
      const int64_t left = c.columns - other * TOGETHER, count = left < TOGETHER ? left : TOGETHER;
      if (other + 1 < blocks)  // the next square
        for (int i = 0; i < TOGETHER * TOGETHER; i += 16) __builtin_prefetch(shares + (other + 1) * apart + i, 0, 2);
      if (other != which)
        add_all<F>(shares + other * apart, count, errors + other * TOGETHER * LINE, 0, own, moved);
    }
    shares += which * apart;
    float *block = errors + start * LINE;
    for (int64_t few = 0; few < own; few += ONE_BY_ONE) {
      const int64_t end = few + ONE_BY_ONE < own ? few + ONE_BY_ONE : own;
      add_all<F>(shares, few, block, few, end, moved);
      if (!c.upper) add_all<F>(shares + end * TOGETHER, own - end, block + end * LINE, few, end, moved);
      for (int64_t k = few; k < end; k++) {
        add_all<F>(shares + few * TOGETHER, k - few, block + few * LINE, k, k + 1, moved);
        if (!c.upper)
          add_all<F>(shares + (k + 1) * TOGETHER, end - k - 1, block + (k + 1) * LINE, k, k + 1, moved);
        round_column(c, start + k, at, n, moved + k * LINE, block + k * LINE, losses);
      }
    }
  }
  for (int64_t j = 0; j < c.columns; j++)
    std::memcpy(c.errors + j * c.rows + at, errors + j * LINE, n * sizeof(float));
  if (c.losses) std::memcpy(c.losses + at, losses, n * sizeof(float));
}

}  // namespace fewbits
