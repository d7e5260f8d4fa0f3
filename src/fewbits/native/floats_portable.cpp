// lanes.h for every machine.
#define FEWBITS_WIDTH 4
#include "lanes.h"

namespace fewbits {
const FloatIsa *floats_portable() { return &code; }
}  // namespace fewbits
