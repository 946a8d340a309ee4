// The weighted mean of the parts of an averaging round, one element.
//
// A part is looked at as a whole before any of it is added, so that a bad part leaves no trace. Usable
// means: weight * value is finite and at most 2^112 in size, so that even 2^15 hostile parts that all pass
// cannot make the sum overflow, and nobody can spoil a mean with a value that is merely enormous.
#pragma once

#include "common.h"

namespace agora {

constexpr float kLargestUsable = 5.192296858534828e33f;  // 2^112

AGORA_FN bool unusable(float value, float weight) {
    float weighted = mul_rounded(value, weight);
    float size = weighted < 0 ? -weighted : weighted;
    return !(size <= kLargestUsable);  // as NaN is, also that of infinity times weight 0
}

AGORA_FN float accumulated(float sum, float value, float weight) {
    return add_rounded(sum, mul_rounded(value, weight));
}

AGORA_FN float finished(float sum, float weight_sum) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(sum, weight_sum);
#else
    return sum / weight_sum;
#endif
}

}  // namespace agora
