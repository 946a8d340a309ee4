// Tensor cores on the CPU: every lane holds the whole of a fragment.
//
// A lane reads a tile when it gets there and writes only its share of one, so that a barrier that is missing
// around either shows. Sums are in fp32, in order.
#pragma once

#include <stdint.h>

#include "../../csrc/functors/common.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {
    static constexpr bool by_row = true;
};
struct col_major {
    static constexpr bool by_row = false;
};
enum layout_t { mem_row_major, mem_col_major };

inline float number(float x) { return x; }
inline float number(__half x) { return agora::load(agora::Fp16{x.bits}); }
inline float number(__nv_bfloat16 x) { return agora::load(agora::Bf16{x.bits}); }

// Of 16 x 16 x 16, the one shape in use: x is [16][16] by rows.
template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
    static_assert(M == 16 && N == 16 && K == 16, "the shape that is emulated");
    static constexpr int num_elements = 256;
    float x[num_elements];
};

template <typename F>
void fill_fragment(F& to, float value) {
    for (float& x : to.x) x = value;
}

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned line) {
    for (unsigned i = 0; i < 16; i++)
        for (unsigned j = 0; j < 16; j++)
            to.x[i * 16 + j] = number(from[Layout::by_row ? i * line + j : j * line + i]);
}

template <typename T>
void store_matrix_sync(T* to, const fragment<accumulator, 16, 16, 16, T>& from, unsigned line,
                       layout_t layout) {
    for (unsigned at = unsigned(emulated::lane()); at < 256; at += emulated::kLanes) {
        unsigned i = at / 16, j = at % 16;
        to[layout == mem_row_major ? i * line + j : j * line + i] = from.x[at];
    }
}

template <typename A, typename B, typename C>
void mma_sync(C& to, const A& a, const B& b, const C& c) {
    C sum = c;
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 16; j++) sum.x[i * 16 + j] += a.x[i * 16 + k] * b.x[k * 16 + j];
    to = sum;
}

}  // namespace nvcuda::wmma
