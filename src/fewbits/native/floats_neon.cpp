// lanes.h for NEON.
#define FEWBITS_WIDTH 4
#include "lanes.h"

namespace fewbits {
const FloatIsa *floats_neon() { return &code; }
}  // namespace fewbits
