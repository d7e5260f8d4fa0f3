// Threads that stay awake for the length of a step. A step of a model asks for a hundred products, and between two of
// them memory has nothing to do. Here threads wait for the next product where they are, and meanwhile read ahead what
// it will read: the step before has shown the order.
#pragma once
#include <atomic>
#include <cstdint>

#include "fewbits.h"

namespace fewbits {

// What the items of a job read, one after the other: so many bytes each.
struct Stream {
  const void *data = nullptr;
  int64_t bytes = 0;
};

class Crew;

// The crew of this thread, whose step it runs; NULL outside of a step.
Crew *crew();

// `work(context, begin, end)` for parts of 0 to count, at least `least` long, shared by the crew.
void in_crew(Crew &crew, int64_t count, int64_t least, const Stream &stream,
             void (*work)(const void *context, int64_t begin, int64_t end), const void *context);

}  // namespace fewbits
