// A keyed permutation of [0, blocks) in O(1) memory: which weights belong to which slice of a cycle.
//
// Balanced Feistel network over the smallest even number of bits that holds `blocks` - 1, walked until the
// result falls inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
// The domain is less than 4 * blocks, so that fewer than four rounds of walking are expected. It is not
// a cipher: nobody gains by predicting a slice, it has to be fair, keyed and the same everywhere.
#pragma once

#include "philox.h"

namespace agora {

constexpr int kFeistelRounds = 6;
constexpr uint64_t kMaxBlocks = 1ull << 31;

struct Permutation {
    uint64_t blocks;
    uint32_t half_bits;
    uint32_t mask;
    uint32_t keys[8];  // six are used
};

AGORA_FN Permutation make_permutation(uint64_t blocks, uint64_t key) {
    Permutation p{};
    p.blocks = blocks;
    p.half_bits = 1;
    while (p.half_bits < 16 && (1ull << (2 * p.half_bits)) < blocks) p.half_bits++;
    p.mask = (1u << p.half_bits) - 1;
    Words4<uint32_t> low = philox(Words4<uint32_t>{0, 0, 0, 0}, key);
    Words4<uint32_t> high = philox(Words4<uint32_t>{1, 0, 0, 0}, key);
    uint32_t keys[8] = {low.a, low.b, low.c, low.d, high.a, high.b, high.c, high.d};
    for (int i = 0; i < 8; i++) p.keys[i] = keys[i];
    return p;
}

AGORA_FN uint32_t feistel_round(uint32_t right, uint32_t key, uint32_t mask) {
    uint32_t mixed = (right ^ key) * 0x85ebca6bu;
    mixed ^= mixed >> 13;
    mixed *= 0xc2b2ae35u;
    mixed ^= mixed >> 16;
    return mixed & mask;
}

AGORA_FN uint64_t permute(const Permutation& p, uint64_t position) {
    uint64_t x = position;
    do {
        uint32_t left = uint32_t(x >> p.half_bits), right = uint32_t(x) & p.mask;
        for (int i = 0; i < kFeistelRounds; i++) {
            uint32_t next = left ^ feistel_round(right, p.keys[i], p.mask);
            left = right;
            right = next;
        }
        x = uint64_t(left) << p.half_bits | right;
    } while (x >= p.blocks);
    return x;
}

}  // namespace agora
