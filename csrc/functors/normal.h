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

// The sum of the four bytes of a word, 0 to 1020.
template <typename Word>
AGORA_FN Word sum_of_bytes(Word word) {
    Word pairs = (word & 0x00ff00ffu) + ((word >> 8) & 0x00ff00ffu);
    return (pairs + (pairs >> 16)) & 0x7ffu;
}

constexpr int kCentre = 510;

AGORA_FN float centred(uint32_t sum, float factor) {
    return mul_rounded(float(int32_t(sum) - kCentre), factor);
}

// The four random words of a group.
template <typename Word>
AGORA_FN Words4<Word> group_words(uint64_t seed, uint64_t stream, Word row, Word group) {
    Word zero = group ^ group;
    Words4<Word> counter = {group, row, zero + uint32_t(stream), zero + uint32_t(stream >> 32)};
    return philox(counter, seed);
}

struct Normal4 {
    float v[4];
};

AGORA_FN Normal4 normal4(uint64_t seed, uint64_t stream, uint32_t row, uint32_t group, float factor) {
    Words4<uint32_t> w = group_words(seed, stream, row, group);
    return Normal4{{centred(sum_of_bytes(w.a), factor), centred(sum_of_bytes(w.b), factor),
                    centred(sum_of_bytes(w.c), factor), centred(sum_of_bytes(w.d), factor)}};
}

}  // namespace agora
