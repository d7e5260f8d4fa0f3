// How the tiles of Intel AMX are set up, for amx.cpp and codes_amx.cpp.
#pragma once
#include <immintrin.h>

#include "kernel.h"

namespace fewbits {
namespace {

// Eight tiles while this lives: with them the core's power would stay up. Sums are in tiles 0 to 3, the left
// operand in 4 and 5, the right one in 6 and 7.
struct Tiles {
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  // Rows of the left operand, and bytes of each.
  explicit Tiles(int rows = 16, int bytes = 64) {
    Config config;
    for (int i = 0; i < 8; i++) {
      config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? bytes : 64);
      config.rows[i] = uint8_t(i < 6 ? rows : bytes / 4);
    }
    // gcc 12 believes that the instruction reads eight bytes, and leaves out what fills the others.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles &) = delete;
};

}  // namespace
}  // namespace fewbits
