// Philox4x32-10: 128 random bits from a 128-bit counter and a 64-bit key.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Counter
// based, so that any element of a table can be computed alone, and integer only, so that every machine
// computes the same bits. The known answers of the paper's library are in tests/unit/test_kernels_table.py.
#pragma once

#include "common.h"

namespace agora {

struct Words4 {
    uint32_t a, b, c, d;
};

AGORA_FN Words4 philox(Words4 x, uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = uint64_t(0xD2511F53u) * x.a;
        uint64_t p1 = uint64_t(0xCD9E8D57u) * x.c;
        x = Words4{uint32_t(p1 >> 32) ^ x.b ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ x.d ^ k1, uint32_t(p0)};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return x;
}

}  // namespace agora
