// Work that several threads share, and memory for it.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>

#include "crew.h"
#include "kernel.h"

namespace fewbits {

// Parts of a job, taken by whoever is free: long ones while there is much left, short ones in the end,
// so that no thread waits long for the last.
class Parts {
 public:
  // Items from `begin` to `end`, for so many takers.
  void fill(int64_t begin, int64_t end, int takers) {
    end_ = end;
    takers_ = takers;
    next_.store(begin, std::memory_order_relaxed);
  }

  // At least so many of them, if there are as many.
  bool take(int64_t least, int64_t &begin, int64_t &end) {
    begin = next_.load(std::memory_order_relaxed);
    do {
      if (begin >= end_) return false;
      const int64_t share = (end_ - begin) / (2 * takers_);
      end = begin + (share > least ? share : least);
      end = end < end_ ? end : end_;
    } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
  }

 private:
  std::atomic<int64_t> next_{0};
  int64_t end_ = 0;
  int takers_ = 1;
};

// `work(begin, end)` for parts of 0 to count, each of which reads its piece of the stream.
template <class Work>
static void in_parts(int64_t count, int64_t least, int threads, fewbits_parallel parallel, const Work &work,
                     const Stream &stream = {}) {
  if (threads <= 1 || count <= least) return work(int64_t(0), count);
  if (Crew *const own = crew()) {
    const auto part = [](const void *work, int64_t begin, int64_t end) {
      (*static_cast<const Work *>(work))(begin, end);
    };
    return in_crew(*own, count, least, stream, part, &work);
  }
  struct Job {
    const Work &work;
    int64_t least;
    Parts parts;
  } job{work, least, {}};
  job.parts.fill(0, count, threads);
  const auto take_all = [](void *data) {
    Job &shared = *static_cast<Job *>(data);
    for (int64_t begin, end; shared.parts.take(shared.least, begin, end);) shared.work(begin, end);
  };
  (parallel ? parallel : own_threads)(take_all, &job, unsigned(threads), 0);
}

struct Freed {
  void operator()(void *memory) const { std::free(memory); }
};

template <class T>
using Array = std::unique_ptr<T[], Freed>;

// At the beginning of a line of the cache: no vector lies in two.
template <class T>
static Array<T> array(int64_t n) {
  return Array<T>(static_cast<T *>(std::aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64)));
}

}  // namespace fewbits
