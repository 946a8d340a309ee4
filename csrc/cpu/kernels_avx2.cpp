#define AGORA_TARGET avx2
#include "kernels_inl.h"
