/// Share a loop among threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace bnb {

namespace detail {
/// Calls `task(context, chunk)` once for each chunk in [0, chunks), on up to `chunks` threads; returns when all are done.
void run_chunks(int chunks, void (*task)(const void *context, int chunk), const void *context);
}  // namespace detail

/// Calls `body(begin, end)` on parts of [0, count), at the same time on up to `threads` threads, and returns when all are done.
///
/// Each part has at least `grain` iterations, so that little work stays on the calling thread, and begins at a multiple of
/// `grain`. The parts depend on the arguments only. `body` must not throw. Any number of threads may call this at once, also in a
/// process that was forked from one that did; a body may not call it.
template <class Body>
void parallel_for(int threads, int64_t count, int64_t grain, const Body &body) {
    const int64_t grains = (count + grain - 1) / grain;
    const int chunks = static_cast<int>(std::min<int64_t>(threads, count / grain));
    if (chunks <= 1) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    struct Shared {
        const Body &body;
        int64_t count, grain, grains;
        int chunks;
    } shared{body, count, grain, grains, chunks};
    detail::run_chunks(
        chunks,
        [](const void *context, int chunk) {
            const Shared &s = *static_cast<const Shared *>(context);
            const int64_t begin = s.grains * chunk / s.chunks * s.grain;
            const int64_t end = std::min(s.count, s.grains * (chunk + 1) / s.chunks * s.grain);
            s.body(begin, end);
        },
        &shared);
}

}  // namespace bnb
