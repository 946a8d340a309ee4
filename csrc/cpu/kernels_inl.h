// All CPU kernels for one instruction set. The including file names it (AGORA_TARGET) and the build gives
// it the matching compiler flags; nothing here may leave the namespace of that target.

#include <initializer_list>

#include "../functors/normal.h"
#include "../functors/reduce.h"
#include "../functors/slices.h"
#include "../functors/wire.h"
#include "kernels.h"

// clang-format off: the order matters
#include "vec_inl.h"
#include "rows_inl.h"
#include "normal_inl.h"
#include "products_inl.h"
#include "expand_inl.h"
#include "project_inl.h"
#include "subspace_inl.h"
#include "slices_inl.h"
#include "reduce_inl.h"
// clang-format on

#define AGORA_JOIN_(a, b) a##b
#define AGORA_JOIN(a, b) AGORA_JOIN_(a, b)
#define AGORA_TEXT_(a) #a
#define AGORA_TEXT(a) AGORA_TEXT_(a)

namespace agora {

const CpuKernels AGORA_JOIN(AGORA_TARGET, _kernels) = {
    AGORA_TEXT(AGORA_TARGET), AGORA_TARGET::kPairs,      AGORA_TARGET::fill,   AGORA_TARGET::rows,
    AGORA_TARGET::expand,     AGORA_TARGET::project,     AGORA_TARGET::wire,   AGORA_TARGET::subspace,
    AGORA_TARGET::pack,       AGORA_TARGET::merge,       AGORA_TARGET::reduce, AGORA_TARGET::finish,
    AGORA_TARGET::part_pack,  AGORA_TARGET::part_unpack,
};

}  // namespace agora
