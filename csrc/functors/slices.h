// Slices of a stage's weights: 256-element blocks, picked by a permutation, packed into one buffer.
//
// Slice r of n consists of the blocks permute(j), j in [r * B / n, (r + 1) * B / n); packed block i of the
// slice is weight block permute(first + i).
#pragma once

#include "feistel.h"

namespace agora {

constexpr int kBlock = 256;  // floats: 1 KiB, long enough to stream, short enough to mix layers

enum MergeMode : int { kDelta = 0, kOverwrite = 1 };

// `snapshot` is what this replica put into the average. Delta keeps what training did in the meantime.
AGORA_FN float merged(float weight, float snapshot, float average, int mode) {
    return mode == kDelta ? add_rounded(weight, add_rounded(average, -snapshot)) : average;
}

}  // namespace agora
