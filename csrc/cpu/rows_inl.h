// Pieces of rows between fp32 in L1 and any dtype in memory. Included once per instruction set by
// kernels_inl.h.

namespace agora::AGORA_TARGET {

template <typename From>
AGORA_FN void widen_from(float* to, const From* from, int64_t n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store_floats(to + i, load_floats(from + i));
    for (; i < n; i++) to[i] = load(from[i]);
}

// n numbers as fp32, beginning at element `at` of `from`.
static void widen(float* to, const void* from, int dtype, int64_t at, int64_t n) {
    if (dtype == kFloat32)
        widen_from(to, static_cast<const float*>(from) + at, n);
    else if (dtype == kBfloat16)
        widen_from(to, static_cast<const Bf16*>(from) + at, n);
    else
        widen_from(to, static_cast<const Fp16*>(from) + at, n);
}

template <typename From>
AGORA_FN void difference_of(float* to, const From* from, const From* less, int64_t n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store_floats(to + i, load_floats(from + i) - load_floats(less + i));
    for (; i < n; i++) to[i] = add_rounded(load(from[i]), -load(less[i]));
}

// The same less elements of `less`, which lie as those of `from` do.
static void difference(float* to, const void* from, const void* less, int dtype, int64_t at, int64_t n) {
    if (dtype == kFloat32)
        difference_of(to, static_cast<const float*>(from) + at, static_cast<const float*>(less) + at, n);
    else if (dtype == kBfloat16)
        difference_of(to, static_cast<const Bf16*>(from) + at, static_cast<const Bf16*>(less) + at, n);
    else
        difference_of(to, static_cast<const Fp16*>(from) + at, static_cast<const Fp16*>(less) + at, n);
}

template <typename To>
AGORA_FN void narrow_to(To* to, const float* from, int64_t n, bool bypass) {
    int64_t i = 0;
    if (bypass && reinterpret_cast<uintptr_t>(to) % (kWidth * sizeof(To)) == 0) {
        for (; i + kWidth <= n; i += kWidth) stream_floats(to + i, load_floats(from + i));
    }
    for (; i + kWidth <= n; i += kWidth) store_floats(to + i, load_floats(from + i));
    for (; i < n; i++) {
        To one;
        store(&one, from[i]);
        memcpy(to + i, &one, sizeof one);  // a send buffer may lie at any address
    }
}

// n numbers rounded to element `at` of `to` and on.
static void narrow(void* to, int dtype, int64_t at, const float* from, int64_t n, bool bypass) {
    if (dtype == kFloat32)
        narrow_to(static_cast<float*>(to) + at, from, n, bypass);
    else if (dtype == kBfloat16)
        narrow_to(static_cast<Bf16*>(to) + at, from, n, bypass);
    else
        narrow_to(static_cast<Fp16*>(to) + at, from, n, bypass);
}

}  // namespace agora::AGORA_TARGET
