// subspace_weights. Included once per instruction set by kernels_inl.h.

namespace agora::AGORA_TARGET {

static void subspace_panel(const SubspaceTask& t, int64_t first) {
    constexpr int64_t kDepth = kRun<Singles>;  // of W's rows that stay in L1
    Nothing nothing;
    alignas(64) float block[kDepth * kMaxPanel], products[kPanelFloats], sums[kRows * kMaxPanel];
    const int64_t panel = t.panel, width = t.n - first < panel ? t.n - first : panel;
    const int64_t vectors = (width + kWidth - 1) / kWidth, stride = padded(t.k);
    const int64_t size = t.w_dtype == kFloat32 ? 4 : 2;
    constexpr int64_t kAhead = 8;  // rows
    memset(products, 0, size_t(padded(t.k, kRowGroup) * panel) * sizeof(float));
    for (int64_t row = 0; row < t.d; row += kDepth) {
        int64_t depth = t.d - row < kDepth ? t.d - row : kDepth;
        for (int64_t i = 0; i < depth; i++) {
            int64_t at = (row + i) * t.n + first;
            const char* soon = static_cast<const char*>(t.w) + (at + kAhead * t.n) * size;
            for (int64_t byte = 0; byte < width * size; byte += 64) __builtin_prefetch(soon + byte);
            widen(block + i * panel, t.w, t.w_dtype, at, width);
            for (int64_t j = width; j < vectors * kWidth; j++) block[i * panel + j] = 0;
        }
        for (int64_t j = 0; j < t.k; j += kRows)
            product<Singles, kByColumns>(products + j * panel, panel, t.basis + row * stride + j, stride,
                                         block, panel, depth, vectors, nothing);
    }
    for (int64_t row = 0; row < t.d; row += kRows) {
        memset(sums, 0, sizeof sums);
        product<Singles, kByRows>(sums, panel, t.basis + row * stride, stride, products, panel, t.k, vectors,
                                  nothing);
        for (int64_t r = 0; r < kRows && row + r < t.d; r++)
            narrow(t.w, t.w_dtype, (row + r) * t.n + first, sums + r * panel, width, t.bypass);
    }
    if (t.bypass) finish_streams();
}

static void subspace(const SubspaceTask& t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) subspace_panel(t, i * t.panel);
}

}  // namespace agora::AGORA_TARGET
