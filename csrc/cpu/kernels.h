// The CPU kernels as one table of functions per instruction set.
//
// A kernel works on units [begin, end) of a task; the caller splits the units over threads. What a unit is
// stands beside each function. Results do not depend on how units were split.
#pragma once

#include "averaging_tasks.h"
#include "boundary_tasks.h"

namespace agora {

struct CpuKernels {
    const char* name;
    bool pairs;  // whether it takes tasks whose factors are pairs of bf16
    void (*fill)(const NormalTask&, int64_t begin, int64_t end);        // chunks of a flat vector
    void (*rows)(const NormalTask&, int64_t begin, int64_t end);        // rows of a table
    void (*expand)(const ExpandTask&, int64_t begin, int64_t end);      // blocks of rows
    void (*project)(const ProjectTask&, int64_t begin, int64_t end);    // blocks of rows
    void (*wire)(const WireTask&, int64_t begin, int64_t end);          // rows
    void (*subspace)(const SubspaceTask&, int64_t begin, int64_t end);  // panels of columns
    void (*pack)(const PackTask&, int64_t begin, int64_t end);          // packed blocks
    void (*merge)(const MergeTask&, int64_t begin, int64_t end);        // packed blocks
    void (*reduce)(const ReduceTask&, int64_t begin, int64_t end);      // chunks
    void (*finish)(const FinishTask&, int64_t begin, int64_t end);      // elements
    void (*part_pack)(const PartTask&, int64_t begin, int64_t end);     // blocks
    void (*part_unpack)(const PartTask&, int64_t begin, int64_t end);   // blocks
};

extern const CpuKernels baseline_kernels;
#if defined(__x86_64__)
extern const CpuKernels avx2_kernels;
extern const CpuKernels avx512_kernels;
extern const CpuKernels zen4_kernels;
#endif

}  // namespace agora
