// lanes.h for AVX-512.
#define FEWBITS_WIDTH 16
#include "lanes.h"

namespace fewbits {
const FloatIsa *floats_avx512() { return &code; }
}  // namespace fewbits
