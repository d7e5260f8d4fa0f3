#include "crew.h"

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <unistd.h>
#endif

#include "kernel.h"
#include "parts.h"

namespace fewbits {
namespace {

constexpr int MOST = 256;            // threads
constexpr int NEXT = 4;              // jobs, of which it reads
constexpr int64_t AT_ONCE = 4 * 64;  // bytes, between two looks whether there is work
constexpr int LOOKS = 64;            // between two looks at the clock
constexpr int YIELDS = 1024;         // looks, between two offers to let others run
constexpr std::chrono::microseconds AWAKE(1000);

// Bytes that a thread reads ahead: half of its second cache (a quarter to all of it did as well), if that is known.
int64_t ahead_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t known = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (known > 0) return known / 2;
#endif
  return 128 << 10;
}

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The items of a job that a thread begins with; others take from it when they have none left.
struct alignas(64) Share : Parts {};

struct Job {
  int64_t least;
  void (*work)(const void *, int64_t, int64_t);
  const void *context;
};

enum State { WAITING, CALLED, ASLEEP, OVER };

struct alignas(64) Helper {
  std::atomic<int> state{WAITING};
};

// Steps that run at this moment. Of several none keeps threads awake: each has the others for neighbours.
std::atomic<int> steps{0};

bool crowded() { return steps.load(std::memory_order_relaxed) > 1; }

struct Ahead {
  Stream stream;
  int64_t count = 0;
};

// What the jobs of a step read, in their order, as the last step of this thread had it.
struct Tape {
  static constexpr int LENGTH = 4096;
  Ahead jobs[LENGTH];
  int length = 0;
};

// Reads ahead for one thread, as far as fits into its second cache.
class Reader {
 public:
  // From `next`, `count` jobs of which the first is number `from` of the step, until there is work.
  void read(const Ahead *next, int from, int count, int own, int threads, const std::atomic<int> &state) {
    if (number_ < from) number_ = from, read_ = 0;
    const int64_t most = ahead_bytes();
    int64_t held = 0;
    for (int i = 0; i < count; i++) {
      const Stream &stream = next[i].stream;
      const int64_t begin = next[i].count * own / threads, items = next[i].count * (own + 1) / threads - begin;
      const int64_t all = items * stream.bytes;
      if (from + i < number_) {
        held += all;
        continue;
      }
      const auto *data = static_cast<const char *>(stream.data) + begin * stream.bytes;
      held += read_;
      for (; read_ < all; read_ += AT_ONCE, held += AT_ONCE) {
        if (held >= most || state.load(std::memory_order_relaxed) != WAITING) return;
        for (int64_t line = read_; line < read_ + AT_ONCE && line < all; line += 64)
          __builtin_prefetch(data + line, 0, 2);
      }
      number_++;
      read_ = 0;
    }
  }

 private:
  int number_ = 0;    // of a job in the step, of whose stream
  int64_t read_ = 0;  // bytes have been read ahead
};

}  // namespace

class Crew {
 public:
  Crew(int threads, Tape &tape) : threads_(threads), tape_(tape) {}

  // What a helper does until the step is over.
  void help() {
    const int own = joined_.fetch_add(1);
    if (own >= threads_) return;
    Reader reader;
    auto &state = helpers_[own].state;
    auto since = std::chrono::steady_clock::now();
    for (int64_t looked = 1;; looked++) {
      const int now = state.load(std::memory_order_acquire);
      if (now == OVER) return;
      if (now == CALLED) {
        Ahead next[NEXT];
        const int from = at_, count = comes(next);
        take_all(own);
        state.store(WAITING, std::memory_order_release);
        reader.read(next, from, count, own, threads_, state);
        since = std::chrono::steady_clock::now();
        looked = 0;
      } else if (looked % LOOKS == 0 && (crowded() || std::chrono::steady_clock::now() - since > AWAKE)) {
        sleep(state);
        since = std::chrono::steady_clock::now();
      }
      looked % YIELDS ? pause() : std::this_thread::yield();
    }
  }

  void run(int64_t count, const Stream &stream, const Job &job) {
    follow(count, stream);
    job_ = job;
    for (int i = 0; i < threads_; i++) shares_[i].fill(count * i / threads_, count * (i + 1) / threads_, 1);
    bool called[MOST];
    const int joined = this->joined();
    call(joined, called);
    take_all(0);
    for (int i = 1; i < joined; i++)
      for (int64_t looked = 1; called[i] && helpers_[i].state.load(std::memory_order_acquire) == CALLED; looked++)
        looked % YIELDS ? pause() : std::this_thread::yield();
  }

  void end() {
    // Those that come later find no place.
    const int joined = joined_.exchange(MOST);
    for (int i = 1; i < joined && i < threads_; i++) {
      std::lock_guard<std::mutex> lock(mutex_);
      helpers_[i].state.store(OVER, std::memory_order_release);
    }
    wake_.notify_all();
  }

 private:
  int joined() const {
    const int joined = joined_.load(std::memory_order_acquire);
    return joined < threads_ ? joined : threads_;
  }

  // Those that wait; and those that sleep, which take part when they are awake.
  void call(int joined, bool *called) {
    bool all = true;
    for (int i = 1; i < joined; i++) {
      int waiting = WAITING;
      called[i] = helpers_[i].state.compare_exchange_strong(waiting, CALLED, std::memory_order_acq_rel);
      all = all && called[i];
    }
    if (all || crowded()) return;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (int i = 1; i < joined; i++)
        if (!called[i]) helpers_[i].state.store(CALLED, std::memory_order_release), called[i] = true;
    }
    wake_.notify_all();
  }

  void sleep(std::atomic<int> &state) {
    std::unique_lock<std::mutex> lock(mutex_);
    int waiting = WAITING;
    if (!state.compare_exchange_strong(waiting, ASLEEP, std::memory_order_acq_rel)) return;
    wake_.wait(lock, [&] { return state.load(std::memory_order_relaxed) != ASLEEP; });
  }

  void take_all(int own) {
    for (int i = 0; i < threads_; i++) {
      Share &share = shares_[(own + i) % threads_];
      for (int64_t begin, end; share.take(job_.least, begin, end);) job_.work(job_.context, begin, end);
    }
  }

  void follow(int64_t count, const Stream &stream) {
    if (at_ == Tape::LENGTH) return;
    Ahead &now = tape_.jobs[at_++];
    if (at_ <= tape_.length && now.stream.data == stream.data && now.count == count) return;
    now = {stream, count};
    tape_.length = at_;
  }

  // What comes after this job, if all is as it was.
  int comes(Ahead *next) const {
    int count = 0;
    for (int i = at_; i < tape_.length && count < NEXT; i++) next[count++] = tape_.jobs[i];
    return count;
  }

  const int threads_;
  Tape &tape_;
  int at_ = 0;
  Job job_{};
  std::atomic<int> joined_{1};
  std::mutex mutex_;
  std::condition_variable wake_;
  Share shares_[MOST];
  Helper helpers_[MOST];
};

namespace {

thread_local Crew *own_crew = nullptr;

Tape *tape() {
  thread_local const std::unique_ptr<Tape> tape(new (std::nothrow) Tape);
  return tape.get();
}

}  // namespace

Crew *crew() { return own_crew; }

void in_crew(Crew &crew, int64_t count, int64_t least, const Stream &stream,
             void (*work)(const void *, int64_t, int64_t), const void *context) {
  crew.run(count, stream, {least, work, context});
}

}  // namespace fewbits

using namespace fewbits;

extern "C" int fewbits_together(void (*work)(void *), void *data, int threads, fewbits_parallel parallel) {
  const auto alone = [&] {
    work(data);
    return 0;
  };
  if (own_crew || threads <= 1 || threads > MOST) return alone();
  struct Counted {
    const bool first = steps.fetch_add(1) == 0;
    ~Counted() { steps.fetch_sub(1); }
  } const counted;
  Tape *const order = tape();
  Crew *const made = counted.first && order ? new (std::nothrow) Crew(threads, *order) : nullptr;
  if (!made) return alone();
  struct Step {
    void (*work)(void *);
    void *data;
    Crew &crew;
  } step{work, data, *made};
  own_crew = made;
  (parallel ? parallel : own_threads)(
      [](void *data) {
        Step &step = *static_cast<Step *>(data);
        if (own_crew != &step.crew) return step.crew.help();
        step.work(step.data);
        step.crew.end();
      },
      &step, unsigned(threads), 0);
  own_crew = nullptr;
  delete made;  // not where a thread is ended in its step: helpers may still look
  return 0;
}
