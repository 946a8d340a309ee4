#define AGORA_TARGET baseline
#include "kernels_inl.h"
