// The 16-bit types of CUDA as names of their bits.
#pragma once

#include <stdint.h>

struct __nv_bfloat16 {
    uint16_t bits;
};
