// U prepared for tensor cores: terms [term][d padded to 64][64] whose sum is U, zeros around it.
#include "boundary.h"
#include "tiles.cuh"

namespace agora::cuda {
namespace {

constexpr int kThreads = 256;
// fp32 has 24 bits, bf16 has 8. (Also fp16's 11 in bf16: the third is then zero.)
constexpr int kTermsOfOther = 3;

int terms_of(int h_dtype, int basis_dtype) { return h_dtype == basis_dtype ? 1 : kTermsOfOther; }

int64_t padded_d(int64_t d) { return (d + kSide - 1) / kSide * kSide; }

template <typename From, typename To>
__global__ void prepare_kernel(const From* basis, To* prepared, int terms, int64_t d, int64_t k,
                               int64_t term) {
    int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= term) return;
    int64_t i = at / kSide, j = at % kSide;
    float rest = i < d && j < k ? load(basis[i * k + j]) : 0.0f;
    for (int t = 0; t < terms; t++) {
        To number;
        store(&number, rest);
        prepared[t * term + at] = number;
        rest -= load(number);
    }
}

template <typename From, typename To>
int prepare(const void* basis, void* prepared, int terms, int64_t d, int64_t k, void* stream) {
    int64_t term = padded_d(d) * kSide;
    return launch(prepare_kernel<From, To>, dim3(blocks_for(term, kThreads)), kThreads, 0, stream,
                  static_cast<const From*>(basis), static_cast<To*>(prepared), terms, d, k, term);
}

}  // namespace

int64_t prepared_numbers(int h_dtype, int basis_dtype, int64_t d, int64_t k) {
    // fp16 holds too small a range for terms of another type; fp32 h is fp32 arithmetic.
    bool suits = h_dtype == kBfloat16 || (h_dtype == kFloat16 && basis_dtype == kFloat16);
    if (!suits || k > kSide || d % kVector != 0) return 0;
    return terms_of(h_dtype, basis_dtype) * padded_d(d) * kSide;
}

int prepare_basis(const void* basis, int basis_dtype, void* prepared, int h_dtype, int64_t d, int64_t k,
                  void* stream) {
    int terms = terms_of(h_dtype, basis_dtype);
    if (h_dtype == kFloat16) return prepare<Fp16, Fp16>(basis, prepared, terms, d, k, stream);
    if (basis_dtype == kFloat32) return prepare<float, Bf16>(basis, prepared, terms, d, k, stream);
    if (basis_dtype == kFloat16) return prepare<Fp16, Bf16>(basis, prepared, terms, d, k, stream);
    return prepare<Bf16, Bf16>(basis, prepared, terms, d, k, stream);
}

}  // namespace agora::cuda
