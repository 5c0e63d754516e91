/// The pool: every iteration once, from several threads at once, and after a fork.
#include <sys/wait.h>

#include <atomic>
#include <thread>

#include "check.hpp"
#include "parallel.hpp"

static void check_covers(int threads, int64_t count, int64_t grain) {
    std::vector<std::atomic<int>> seen(static_cast<std::size_t>(count));
    bnb::parallel_for(threads, count, grain, [&](int64_t begin, int64_t end) {
        CHECK(begin % grain == 0 && begin < end);
        for (int64_t i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
    });
    for (const auto &times : seen) CHECK(times == 1);
}

TEST(parallel_runs_each_iteration_once) {
    for (int threads : {1, 2, 3, 8})
        for (int64_t count : {0, 1, 7, 64, 1000})
            for (int64_t grain : {1, 6, 64}) check_covers(threads, count, grain);
}

TEST(parallel_keeps_little_work_on_the_caller) {
    const auto caller = std::this_thread::get_id();
    bnb::parallel_for(8, 99, 50, [&](int64_t, int64_t) { CHECK(std::this_thread::get_id() == caller); });
}

TEST(parallel_uses_several_threads) {
    std::atomic<int> inside{0};
    bnb::parallel_for(2, 2, 1, [&](int64_t, int64_t) {
        ++inside;
        while (inside != 2) std::this_thread::yield();  // returns only if both parts run at the same time
    });
}

TEST(parallel_from_several_threads) {
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([] {
            for (int repeat = 0; repeat < 200; ++repeat) check_covers(3, 100, 1);
        });
    for (std::thread &caller : callers) caller.join();
}

TEST(parallel_after_fork) {
    check_covers(3, 100, 1);
    const pid_t child = fork();
    if (child == 0) {
        check_covers(3, 100, 1);
        _exit(0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}
