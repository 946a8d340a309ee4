// Nearly normal numbers that are equal to the bit everywhere: the token table F and the genesis weights.
//
// A value is the sum of the four bytes of one random word, centred (an integer in [-510, 510], exact in
// fp32), times `factor` = fp32(std / sqrt(21845)): one rounding in all. The sum of four uniform bytes has
// mean 0, variance 4 * (256^2 - 1) / 12 = 21845, excess kurtosis -0.3, and never exceeds 3.451 std.
// No logarithm, no cosine: those differ between libraries, and a swarm must agree on every bit.
//
// Addressing: stream (64 bits: which table), row (32 bits: the token), group (32 bits: four neighbouring
// columns). A flat vector is read as rows of 2^32 groups.
#pragma once

#include "philox.h"

namespace agora {

// "TOKTABLE" in ASCII. Genesis streams are hashes of tensor names; meeting this number is a 2^-64 event.
constexpr uint64_t kTokenTableStream = 0x544F4B5441424C45ull;

AGORA_FN float centred_sum(uint32_t word, float factor) {
    uint32_t pairs = (word & 0x00ff00ffu) + ((word >> 8) & 0x00ff00ffu);
    int32_t sum = int32_t((pairs & 0xffffu) + (pairs >> 16)) - 510;
    return mul_rounded(float(sum), factor);
}

struct Normal4 {
    float v[4];
};

AGORA_FN Normal4 normal4(uint64_t seed, uint64_t stream, uint32_t row, uint32_t group, float factor) {
    Words4 w = philox(Words4{group, row, uint32_t(stream), uint32_t(stream >> 32)}, seed);
    return Normal4{{centred_sum(w.a, factor), centred_sum(w.b, factor), centred_sum(w.c, factor),
                    centred_sum(w.d, factor)}};
}

}  // namespace agora
