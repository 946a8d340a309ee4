// What every functor needs: the function qualifier, bf16 and bit casts.
//
// A functor is the arithmetic of one element (or one group of four) and nothing else: no loops over
// tensors, no threads, no allocation. The CPU and the CUDA launchers call the same functor, so that there
// is one definition of what a kernel computes.
//
// The CPU sources are compiled once per instruction set. Everything here is `static` and forced inline:
// with ordinary inline functions the linker would keep one copy for all, perhaps the AVX-512 one, and
// crash on an older machine.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define AGORA_FN static __host__ __device__ __forceinline__
#else
#define AGORA_FN static inline __attribute__((always_inline))
#endif

namespace agora {

// Numbers of the dtypes, as the Python side passes them.
enum Dtype : int { kFloat32 = 0, kBfloat16 = 1 };

struct Bf16 {
    uint16_t bits;
};

// A float at any address: parts of an averaging round lie wherever the frame put them.
typedef float UnalignedFloat __attribute__((aligned(1), may_alias));
struct __attribute__((packed)) UnalignedBf16 {
    uint16_t bits;
};

AGORA_FN uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

AGORA_FN float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

AGORA_FN float load(float value) { return value; }
AGORA_FN float load(Bf16 value) { return bits_float(uint32_t(value.bits) << 16); }
AGORA_FN float load(UnalignedBf16 value) { return bits_float(uint32_t(value.bits) << 16); }

AGORA_FN void store(float* to, float value) { *to = value; }

// Round to nearest, ties to even; NaN stays NaN (the rounding addition could carry it into infinity).
AGORA_FN void store(Bf16* to, float value) {
    uint32_t bits = float_bits(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to->bits = uint16_t(nan ? 0x7fc0u : rounded);
}

// One rounding each, never contracted into a fused multiply-add: these results are equal to the bit on
// every machine. (CPU sources are compiled with -ffp-contract=off.)
AGORA_FN float mul_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

AGORA_FN float add_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

}  // namespace agora
