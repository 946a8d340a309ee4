// Runs CUDA kernels on the CPU, to check their indices, barriers and arithmetic where there is no GPU.
//
// Blocks run one after the other. The threads of a block are fibres of one CPU thread, switched only where
// they wait for each other; which one goes on is drawn at random (AGORA_EMULATION_SEED), so a kernel that
// lacks a barrier gives results that change with the seed. Shared memory is filled with NaN before each
// block, so that reading what nobody wrote shows. Threads that wait at different barriers, or for ever, end
// the launch with an error. With AddressSanitizer, addresses outside buffers are found as well.
// Not checked: speed, and everything about the memory model between barriers (a thread never sees another
// one's half-done work; asynchronous copies are done at once).
#pragma once

#include <link.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulated {

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr int kLanes = 32;
constexpr size_t kStack = 256 << 10;
constexpr int kMostShared = 227 << 10;

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = State::kDone;
    const char* file = nullptr;
    int line = 0;
    int predicate = 0;
    unsigned char value[16];
};

struct Grid {
    std::vector<std::unique_ptr<Fibre>> fibres;
    int threads = 0, current = 0, predicate = 0;
    std::function<void()> kernel;
    ucontext_t scheduler;
    std::unique_ptr<unsigned char[]> shared;
    std::mt19937 random{0};
    std::string error = "no error";
};

inline Grid& grid() {
    static Grid the;
    return the;
}

inline int lane() { return grid().current % kLanes; }

inline unsigned char* dynamic_shared() {
    uintptr_t address = reinterpret_cast<uintptr_t>(grid().shared.get());
    return reinterpret_cast<unsigned char*>((address + 127) / 128 * 128);
}

inline void wait(State state, const char* file, int line) {
    Fibre& fibre = *grid().fibres[size_t(grid().current)];
    fibre.state = state;
    fibre.file = file;
    fibre.line = line;
    swapcontext(&fibre.context, &grid().scheduler);
}

inline void block_barrier(const char* file, int line) { wait(State::kAtBlock, file, line); }

inline void warp_barrier(const char* file, int line) { wait(State::kAtWarp, file, line); }

inline int block_or(int predicate, const char* file, int line) {
    grid().fibres[size_t(grid().current)]->predicate = predicate;
    block_barrier(file, line);
    return grid().predicate;
}

template <typename T>
T shuffle(unsigned, T value, int from) {
    static_assert(sizeof(T) <= sizeof(Fibre::value), "one number");
    Grid& g = grid();
    int first = g.current / kLanes * kLanes;
    memcpy(g.fibres[size_t(g.current)]->value, &value, sizeof value);
    warp_barrier("shuffle", 1);
    int other = first + (from % kLanes + kLanes) % kLanes;
    if (other < g.threads && g.fibres[size_t(other)]->state != State::kDone)
        memcpy(&value, g.fibres[size_t(other)]->value, sizeof value);
    else
        memset(&value, 0xff, sizeof value);  // a lane that is gone: undefined
    warp_barrier("shuffle", 2);
    return value;
}

// Lets threads [begin, end) go on if all that still run wait at one barrier. False: they wait apart.
inline bool release(int begin, int end, State state) {
    Grid& g = grid();
    const Fibre* at = nullptr;
    int predicate = 0;
    for (int i = begin; i < end; i++) {
        const Fibre& fibre = *g.fibres[size_t(i)];
        if (fibre.state == State::kDone) continue;
        if (fibre.state != state) return true;  // not yet
        if (at != nullptr && (at->line != fibre.line || strcmp(at->file, fibre.file) != 0)) return false;
        at = &fibre;
        predicate |= fibre.predicate;
    }
    g.predicate = predicate;
    for (int i = begin; i < end; i++) {
        Fibre& fibre = *g.fibres[size_t(i)];
        if (fibre.state == State::kDone) continue;
        fibre.state = State::kReady;
        fibre.predicate = 0;
    }
    return true;
}

inline void thread_main() {
    Grid& g = grid();
    g.kernel();
    g.fibres[size_t(g.current)]->state = State::kDone;
    swapcontext(&g.fibres[size_t(g.current)]->context, &g.scheduler);
}

inline thread_local char tls_mark = 0;

// Static shared memory is this module's thread-local memory, that mark included.
inline void spoil_shared(int dynamic) {
    memset(dynamic_shared(), 0xff, size_t(dynamic));
    tls_mark = 1;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void*) {
            char* begin = static_cast<char*>(info->dlpi_tls_data);
            for (int i = 0; i < info->dlpi_phnum; i++) {
                const auto& header = info->dlpi_phdr[i];
                if (header.p_type != PT_TLS || begin == nullptr) continue;
                if (&tls_mark < begin || &tls_mark >= begin + header.p_memsz) continue;
                memset(begin, 0xff, header.p_memsz);
                return 1;
            }
            return 0;
        },
        nullptr);
}

inline bool run_block() {
    Grid& g = grid();
    for (int i = 0; i < g.threads; i++) {
        Fibre& fibre = *g.fibres[size_t(i)];
        fibre.state = State::kReady;
        fibre.predicate = 0;
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = kStack;
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, thread_main, 0);
    }
    std::vector<int> ready;
    for (;;) {
        ready.clear();
        bool done = true;
        for (int i = 0; i < g.threads; i++) {
            State state = g.fibres[size_t(i)]->state;
            if (state == State::kReady) ready.push_back(i);
            done = done && state == State::kDone;
        }
        if (done) return true;
        if (ready.empty()) {
            g.error = "emulated kernel: threads wait for each other for ever";
            return false;
        }
        std::shuffle(ready.begin(), ready.end(), g.random);
        for (int i : ready) {
            g.current = i;
            threadIdx = dim3(unsigned(i), 0, 0);
            swapcontext(&g.scheduler, &g.fibres[size_t(i)]->context);
            int warp = i / kLanes * kLanes, end = warp + kLanes < g.threads ? warp + kLanes : g.threads;
            // A thread that ended may be the one that others waited for, at either barrier.
            if (!release(warp, end, State::kAtWarp) || !release(0, g.threads, State::kAtBlock)) {
                g.error = "emulated kernel: threads wait at different barriers";
                return false;
            }
        }
    }
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared, void*,
           Arguments... arguments) {
    Grid& g = grid();
    if (blocks.x == 0 || blocks.x > 0x7fffffffu || blocks.y == 0 || blocks.y > 65535 || blocks.z == 0 ||
        blocks.z > 65535 || threads < 1 || threads > 1024 || shared < 0 || shared > kMostShared) {
        g.error = "emulated kernel: a grid, block or shared memory that no device has";
        return 1;
    }
    const char* seed = getenv("AGORA_EMULATION_SEED");
    g.random.seed(seed == nullptr ? 0u : unsigned(atoi(seed)));
    g.threads = threads;
    g.kernel = [&] { kernel(Parameters(arguments)...); };
    g.shared = std::make_unique<unsigned char[]>(size_t(shared) + 128);
    gridDim = blocks;
    blockDim = dim3(unsigned(threads));
    while (g.fibres.size() < size_t(threads)) {
        g.fibres.push_back(std::make_unique<Fibre>());
        g.fibres.back()->stack.reset(new char[kStack]);
    }
    for (unsigned z = 0; z < blocks.z; z++) {
        for (unsigned y = 0; y < blocks.y; y++) {
            for (unsigned x = 0; x < blocks.x; x++) {
                blockIdx = dim3(x, y, z);
                spoil_shared(shared);
                if (!run_block()) return 1;
            }
        }
    }
    return 0;
}

}  // namespace emulated
