// Slices of a stage's weights: 256-element blocks, picked by a permutation, packed into one buffer.
//
// The weights are one or many tensors, laid end to end, each filled up to whole blocks. Slice r of n consists
// of the blocks permute(j), j in [r * B / n, (r + 1) * B / n); packed block i of the slice is weight block
// permute(first + i). The last block of a tensor may be short: it is packed with zeros behind it, and only
// what exists is merged.
//
// Packed forms of a block: 256 fp32 or bf16 numbers; or int8, the difference to the last consensus, as a
// scale in fp32 and 256 codes (functors/wire.h).
#pragma once

#include "feistel.h"
#include "wire.h"

namespace agora {

constexpr int kBlock = 256;             // elements: 1 KiB of fp32, long enough to stream, short enough to mix
constexpr int kInt8Block = 4 + kBlock;  // bytes of a block as int8
constexpr int64_t kMaxTensors = 1 << 20;  // of a stage

enum MergeMode : int { kDelta = 0, kOverwrite = 1, kEma = 2 };

// A tensor among the weights: where it is, how long, and the number of its first block. Sorted by that.
struct TensorRow {
    int64_t address, numel, first_block;
};

// Where a block lies: in which tensor, from which element, how many elements of it exist.
struct Place {
    int64_t tensor, offset;
    int count;
};

AGORA_FN Place place_of(const TensorRow* table, int64_t tensors, int64_t block) {
    int64_t low = 0, high = tensors - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (table[middle].first_block <= block)
            low = middle;
        else
            high = middle - 1;
    }
    int64_t offset = (block - table[low].first_block) * kBlock, left = table[low].numel - offset;
    return Place{low, offset, int(left < kBlock ? left : kBlock)};
}

// What a merge does to one weight.
struct Merged {
    float weight, drift;
};

// `snapshot` is what this replica put into the average. Delta keeps what training did in the meantime; EMA
// keeps a running mean of it (AsyncMesh, arXiv 2601.22442); `rest` is 1 - mu.
AGORA_FN Merged merged(float weight, float snapshot, float average, float drift, int mode, float mu,
                       float rest) {
    if (mode == kDelta) return Merged{add_rounded(weight, add_rounded(average, -snapshot)), drift};
    if (mode == kOverwrite) return Merged{average, drift};
    float moved = add_rounded(weight, -snapshot);
    drift = add_rounded(mul_rounded(mu, drift), mul_rounded(rest, moved));
    return Merged{add_rounded(average, drift), drift};
}

// An average that came as a code of its difference to the last consensus.
AGORA_FN float from_code(float consensus, float scale, int8_t code) {
    return add_rounded(consensus, mul_rounded(scale, float(code)));
}

}  // namespace agora
