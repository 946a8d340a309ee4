// The int8 form of one token's numbers: a scale in fp32 and a signed code for each.
//
// scale = largest magnitude / 127; code = x / scale, rounded half to even. One rounding each, so that every
// machine packs the same bytes. A scale that underflows to 0 would divide by 0: the divisor is at least the
// smallest normal number, and the codes are as worthless as the numbers.
#pragma once

#include "common.h"

namespace agora {

AGORA_FN float div_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

// The bits of |x|: their order is that of the magnitudes, with NaN above infinity.
AGORA_FN uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7fffffffu; }

AGORA_FN float wire_scale(uint32_t largest_magnitude) {
    return div_rounded(bits_float(largest_magnitude), 127.0f);
}

AGORA_FN float wire_divisor(float scale) { return scale < 1.17549435e-38f ? 1.17549435e-38f : scale; }

// Adding 1.5 * 2^23 rounds to an integer, half to even, and leaves it in the low bits. NaN gives 0.
AGORA_FN int8_t wire_code(float x, float divisor) {
    return int8_t(float_bits(add_rounded(div_rounded(x, divisor), 12582912.0f)) & 0xffu);
}

}  // namespace agora
