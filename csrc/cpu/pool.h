// Splits units of work over threads.
//
// One process-wide pool, started by the first call that wants more than one thread, never stopped. The
// calling thread takes part. Units are handed out in pieces of `grain`, by an atomic counter, so that a
// slow core gets fewer. Work of at most one piece, a call while the pool is busy, and a call after fork()
// (the threads stay behind) run on the calling thread alone: slower, never wrong and never stuck.
#pragma once

#include <stdint.h>

#include <functional>

namespace agora {

constexpr int kMaxThreads = 64;

void parallel_for(int threads, int64_t units, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& work);

// The same on the calling thread's OpenMP team, where the process has such a library (torch brings one) and
// was not forked since. For kernels that stand between torch's operations: its threads spin for milliseconds
// after each of them, and would take the cores that a pool of our own wants. Kernels that work beside the
// training, from threads of their own, use parallel_for(): a team of theirs would spin likewise.
void team_for(int threads, int64_t units, int64_t grain, const std::function<void(int64_t, int64_t)>& work);

}  // namespace agora
