// lanes.h for AVX2.
#define FEWBITS_WIDTH 8
#include "lanes.h"

namespace fewbits {
const FloatIsa *floats_avx2() { return &code; }
}  // namespace fewbits
