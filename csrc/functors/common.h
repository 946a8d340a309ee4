// What every functor needs: the function qualifier, bf16 and fp16, and bit casts.
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

#if defined(__CUDA_ARCH__)
#include <cuda_fp16.h>
#endif

#if defined(__CUDACC__)
#define AGORA_FN static __host__ __device__ __forceinline__
#else
#define AGORA_FN static inline __attribute__((always_inline))
#endif

namespace agora {

// Numbers of the dtypes, as the Python side passes them.
// kInt8: only on the wire (functors/wire.h).
enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
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

AGORA_FN float load(Fp16 value) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(value.bits));
#else
    uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, size = value.bits & 0x7fffu;
    if (size >= 0x7c00u) return bits_float(sign | 0x7f800000u | (size & 0x3ffu) << 13);
    if (size >= 0x400u) return bits_float(sign | ((size << 13) + 0x38000000u));
    float small = float(size) * 5.9604644775390625e-8f;  // 2^-24, exact
    return bits_float(sign | float_bits(small));
#endif
}

AGORA_FN void store(float* to, float value) { *to = value; }

// Round to nearest, ties to even; NaN stays NaN (the rounding addition could carry it into infinity).
AGORA_FN void store(Bf16* to, float value) {
    uint32_t bits = float_bits(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to->bits = uint16_t(nan ? 0x7fc0u : rounded);
}

AGORA_FN void store(Fp16* to, float value) {
#if defined(__CUDA_ARCH__)
    to->bits = __half_as_ushort(__float2half_rn(value));
#else
    uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    uint32_t half;
    if (size > 0x7f800000u)
        half = 0x7e00u;
    else if (size >= 0x477ff000u)  // rounds to 2^16 or more
        half = 0x7c00u;
    else if (size >= 0x38800000u)
        half = (size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u) >> 13;
    else  // subnormal: in [0.5, 1) the unit in the last place is that of fp16's subnormals, 2^-24
        half = float_bits(bits_float(size) + 0.5f) - 0x3f000000u;
    to->bits = uint16_t(sign | half);
#endif
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
