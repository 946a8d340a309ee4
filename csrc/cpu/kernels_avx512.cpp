#define AGORA_TARGET avx512
#include "kernels_inl.h"
