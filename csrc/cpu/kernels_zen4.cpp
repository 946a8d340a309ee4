#define AGORA_TARGET zen4
#define AGORA_ZEN 1
#include "kernels_inl.h"
