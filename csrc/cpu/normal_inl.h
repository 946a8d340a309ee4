// Fill rows with nearly normal numbers. Included once per instruction set by kernels_inl.h.

namespace agora::AGORA_TARGET {

constexpr int64_t kLanes = 16;  // groups generated side by side

// `columns` values of one table row, beginning at a group. Lanes are independent, so that the compiler
// turns the loop over them into vector code.
static void normal_row(float* out, uint64_t seed, uint64_t stream, uint32_t row, uint32_t group, int64_t columns,
                       float factor) {
    int64_t done = 0;
    for (; done + 4 * kLanes <= columns; done += 4 * kLanes, group += uint32_t(kLanes)) {
        float* to = out + done;
        for (int lane = 0; lane < kLanes; lane++) {
            Normal4 x = normal4(seed, stream, row, group + uint32_t(lane), factor);
            to[4 * lane] = x.v[0];
            to[4 * lane + 1] = x.v[1];
            to[4 * lane + 2] = x.v[2];
            to[4 * lane + 3] = x.v[3];
        }
    }
    for (; done < columns; done += 4, group++) {
        Normal4 x = normal4(seed, stream, row, group, factor);
        for (int64_t i = 0; i < 4 && done + i < columns; i++) out[done + i] = x.v[i];
    }
}

static void fill(const NormalTask& t, int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int64_t start = chunk * kFillChunk, left = t.columns - start;
        uint64_t group = uint64_t(start) / 4;
        normal_row(t.out + start, t.seed, t.stream, uint32_t(group >> 32), uint32_t(group),
                   left < kFillChunk ? left : kFillChunk, t.factor);
    }
}

static void rows(const NormalTask& t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
        normal_row(t.out + r * t.columns, t.seed, t.stream, uint32_t(t.ids[r]), 0, t.columns, t.factor);
}

}  // namespace agora::AGORA_TARGET
