/// The threads behind `parallel_for`: made when first needed, kept, and made anew in a forked child, which inherits none.
#include "parallel.hpp"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace bnb::detail {
namespace {

struct Job {
    void (*task)(const void *, int);
    const void *context;
    int chunks;
    int next = 0;
    int unfinished;
};

class Pool {
  public:
    bool belongs_here() const { return process_ == getpid(); }

    void run(Job &job) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (workers_ < job.chunks - 1) {
            std::thread([this] { work(); }).detach();
            ++workers_;
        }
        jobs_.push_back(&job);
        job_added_.notify_all();
        while (job.next < job.chunks) run_next_chunk(job, lock);
        job_done_.wait(lock, [&] { return job.unfinished == 0; });
    }

  private:
    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            job_added_.wait(lock, [&] { return !jobs_.empty(); });
            run_next_chunk(*jobs_.front(), lock);
        }
    }

    /// Runs a chunk that nobody has begun; the job leaves the queue with its last one.
    void run_next_chunk(Job &job, std::unique_lock<std::mutex> &lock) {
        const int chunk = job.next++;
        if (job.next == job.chunks) jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
        lock.unlock();
        job.task(job.context, chunk);
        lock.lock();
        if (--job.unfinished == 0) job_done_.notify_all();
    }

    std::mutex mutex_;
    std::condition_variable job_added_, job_done_;
    std::deque<Job *> jobs_;
    int workers_ = 0;
    const pid_t process_ = getpid();
};

/// The pool of this process. It is never destroyed: its threads may outlive everything else.
Pool &pool() {
    static std::atomic<Pool *> current{nullptr};
    Pool *found = current.load(std::memory_order_acquire);
    if (found && found->belongs_here()) return *found;
    Pool *made = new Pool;
    if (current.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return *made;
    delete made;  // another thread was faster
    return *found;
}

}  // namespace

void run_chunks(int chunks, void (*task)(const void *, int), const void *context) {
    Job job{task, context, chunks, 0, chunks};
    pool().run(job);
}

}  // namespace bnb::detail
