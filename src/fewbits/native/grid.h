// What rounding to several grids costs. Every instruction set compiles this file for itself.
#pragma once
#include "kernel.h"

namespace fewbits {

// Of one row: the sum over each group of cost * (w - nearest point)^2, for all steps that are tried.
static void grid_errors(const fewbits_grids &g, int64_t row) {
  constexpr int SUMS = 32;  // side by side, so that they are vectors
  const int64_t size = g.columns / g.groups;
  for (int64_t group = 0; group < g.groups; group++) {
    const float *weight = g.weights + row * g.stride + group * size, *cost = g.costs + group * size;
    const float low = -g.points[row * g.groups + group], high = low + g.range;
    for (int64_t i = 0; i < g.tried; i++) {
      const int64_t at = (i * g.rows + row) * g.groups + group;
      const float step = g.steps[at];
      const auto lost = [&](int64_t k) {
        float nearest = weight[k] / step;
        nearest = nearest < low ? low : nearest;
        nearest = nearest > high ? high : nearest;
        nearest = (nearest + TO_INTEGER) - TO_INTEGER;
        const float error = nearest * step - weight[k];
        return error * error * cost[k];
      };
      float sums[SUMS] = {}, sum = 0;
      int64_t k = 0;
      for (; k + SUMS <= size; k += SUMS)
        for (int j = 0; j < SUMS; j++) sums[j] += lost(k + j);
      for (; k < size; k++) sum += lost(k);
      for (int half = SUMS / 2; half; half /= 2)
        for (int j = 0; j < half; j++) sums[j] += sums[j + half];
      g.errors[at] = sums[0] + sum;
    }
  }
}

}  // namespace fewbits
