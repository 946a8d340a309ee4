// Philox4x32-10: 128 random bits from a 128-bit counter and a 64-bit key.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Counter
// based, so that any element of a table can be computed alone, and integer only, so that every machine
// computes the same bits. The known answers of the paper's library are in tests/unit/test_kernels_table.py.
// Written over the type of a word: uint32_t, or the CPU's vectors with one word a lane (csrc/cpu/vec_inl.h).
#pragma once

#include "common.h"

namespace agora {

template <typename Word>
struct Words4 {
    Word a, b, c, d;
};

// 32 x 32 -> 64 bit products of a type of word.
template <typename Word>
struct Wide;

template <>
struct Wide<uint32_t> {
    AGORA_FN uint64_t product(uint32_t constant, uint32_t x) { return uint64_t(constant) * x; }
    AGORA_FN uint32_t high(uint64_t product) { return uint32_t(product >> 32); }
    AGORA_FN uint32_t low(uint64_t product) { return uint32_t(product); }
};

template <typename Word>
AGORA_FN Words4<Word> philox(Words4<Word> x, uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; round++) {
        auto p0 = Wide<Word>::product(0xD2511F53u, x.a);
        auto p1 = Wide<Word>::product(0xCD9E8D57u, x.c);
        x = Words4<Word>{Wide<Word>::high(p1) ^ x.b ^ k0, Wide<Word>::low(p1),
                         Wide<Word>::high(p0) ^ x.d ^ k1, Wide<Word>::low(p0)};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return x;
}

}  // namespace agora
