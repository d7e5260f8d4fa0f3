// Threads for machines where torch's own are not reachable. They sleep between calls.
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "kernel.h"

namespace fewbits {
namespace {

struct Job {
  void (*work)(void *);
  void *data;
  unsigned waiting;  // helpers that have not begun
  unsigned running = 0;
};

// Never destroyed: threads may outlive what ends a process.
struct Pool {
  std::mutex mutex;
  std::condition_variable begun, ended;
  std::deque<Job *> jobs;
  unsigned threads = 0, busy = 0;

  void help() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      begun.wait(lock, [&] { return !jobs.empty(); });
      Job &job = *jobs.front();
      job.running++;
      if (--job.waiting == 0) jobs.pop_front();
      busy++;
      lock.unlock();
      job.work(job.data);
      lock.lock();
      busy--;
      if (--job.running == 0) ended.notify_all();
    }
  }

  void run(Job &job) {
    std::unique_lock<std::mutex> lock(mutex);
    while (threads - busy < job.waiting) {
      std::thread([this] { help(); }).detach();
      threads++;
    }
    jobs.push_back(&job);
    begun.notify_all();
    lock.unlock();
    job.work(job.data);
    lock.lock();
    // The work is all taken: helpers that have not begun are not needed.
    for (auto at = jobs.begin(); at != jobs.end(); ++at)
      if (*at == &job) {
        jobs.erase(at);
        break;
      }
    job.waiting = 0;
    ended.wait(lock, [&] { return job.running == 0; });
  }
};

}  // namespace

void own_threads(void (*work)(void *), void *data, unsigned threads, unsigned) {
  static Pool &pool = *new Pool;
  Job job{work, data, threads - 1};
  if (threads <= 1) return work(data);
  pool.run(job);
}

}  // namespace fewbits
