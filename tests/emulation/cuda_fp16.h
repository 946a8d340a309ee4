// The 16-bit types of CUDA as names of their bits.
#pragma once

#include <stdint.h>

struct __half {
    uint16_t bits;
};
