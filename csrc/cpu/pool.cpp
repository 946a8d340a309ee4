#include "pool.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace agora {
namespace {

class Pool {
  public:
    void run(int threads, int64_t units, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock() || getpid() != pid_) return work(0, units);
        grow(threads - 1);
        {
            std::lock_guard<std::mutex> hold(mutex_);
            work_ = &work;
            units_ = units;
            grain_ = grain;
            next_ = 0;
            wanted_ = std::min(threads - 1, started_);
            running_ = wanted_;
            generation_++;
        }
        wake_.notify_all();
        take();
        std::unique_lock<std::mutex> hold(mutex_);
        // Helpers that have not woken yet are not waited for: there is nothing left for them to take.
        running_ -= wanted_;
        wanted_ = 0;
        done_.wait(hold, [this] { return running_ == 0; });
    }

  private:
    void grow(int helpers) {
        while (started_ < helpers) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                return;  // the system has no thread to give: go on with what there is
            }
            started_++;
        }
    }

    void take() {
        for (;;) {
            int64_t begin = next_.fetch_add(grain_);
            if (begin >= units_) return;
            (*work_)(begin, std::min(begin + grain_, units_));
        }
    }

    void serve() {
        std::unique_lock<std::mutex> hold(mutex_);
        uint64_t seen = 0;
        for (;;) {
            wake_.wait(hold, [&] { return generation_ != seen && wanted_ > 0; });
            seen = generation_;
            wanted_--;
            hold.unlock();
            take();
            hold.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    const pid_t pid_ = getpid();
    std::mutex turn_;  // held by the caller whose work is being done
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(int64_t, int64_t)>* work_ = nullptr;
    int64_t units_ = 0, grain_ = 1;
    std::atomic<int64_t> next_{0};
    int started_ = 0;  // threads that exist
    int wanted_ = 0;   // helpers that may still join this work
    int running_ = 0;  // helpers that joined or may join, and have not finished
    uint64_t generation_ = 0;
};

// libgomp's entry for a parallel region; LLVM's runtime has it too, on Linux.
using Team = void (*)(void (*part)(void*), void* data, unsigned threads, unsigned flags);

// Null: nobody brought one.
Team find_team() { return reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

const pid_t loaded_in = getpid();

// A region's work, handed out as Pool does.
struct Shares {
    const std::function<void(int64_t, int64_t)>& work;
    const int64_t units, grain;
    std::atomic<int64_t> next{0};

    static void take(void* data) {
        Shares& all = *static_cast<Shares*>(data);
        for (;;) {
            int64_t begin = all.next.fetch_add(all.grain);
            if (begin >= all.units) return;
            all.work(begin, std::min(begin + all.grain, all.units));
        }
    }
};

}  // namespace

void team_for(int threads, int64_t units, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
    static const Team team = find_team();
    if (team == nullptr || getpid() != loaded_in || threads <= 1 || units <= grain)
        return parallel_for(threads, units, grain, work);
    Shares all{work, units, std::max<int64_t>(grain, 1)};
    team(&Shares::take, &all, unsigned(std::min(threads, kMaxThreads)), 0);
}

void parallel_for(int threads, int64_t units, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& work) {
    if (units <= 0) return;
    if (threads <= 1 || units <= grain) return work(0, units);
    // Leaked on purpose: its threads may be waiting in it when the process exits.
    static Pool* pool = new Pool;
    pool->run(std::min(threads, kMaxThreads), units, std::max<int64_t>(grain, 1), work);
}

}  // namespace agora
