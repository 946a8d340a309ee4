// Fill rows with nearly normal numbers. Included once per instruction set by kernels_inl.h.

namespace agora::AGORA_TARGET {

// The groups that the lanes of a vector work on, in the order that makes pairs of words come out sorted.
AGORA_FN Words lane_groups() {
    Words groups;
    for (int lane = 0; lane < kWords; lane++)
        groups[lane] = uint64_t(lane % 2 ? kWords / 2 + lane / 2 : lane / 2);
    return groups;
}

// `columns` values of one table row, beginning at a group.
static void normal_row(float* out, uint64_t seed, uint64_t stream, uint32_t row, uint32_t group,
                       int64_t columns, float factor) {
    int64_t done = 0;
    const Words lanes = lane_groups(), rows = Words{} + uint64_t(row);
    for (; done + 4 * kWords <= columns; done += 4 * kWords, group += uint32_t(kWords)) {
        Words4<Words> w = group_words(seed, stream, rows, lanes + uint64_t(group));
        Words ab = low_pairs(w.a, w.b), cd = low_pairs(w.c, w.d);
        Ints first = byte_sums(even_pairs(ab, cd)) - kCentre, second = byte_sums(odd_pairs(ab, cd)) - kCentre;
        store_floats(out + done, __builtin_convertvector(first, Floats) * factor);
        store_floats(out + done + kWidth, __builtin_convertvector(second, Floats) * factor);
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
        normal_row(static_cast<float*>(t.out) + start, t.seed, t.stream, uint32_t(group >> 32),
                   uint32_t(group), left < kFillChunk ? left : kFillChunk, t.factor);
    }
}

static void rows(const NormalTask& t, int64_t begin, int64_t end) {
    constexpr int64_t kSpan = 512;  // stays in L1
    alignas(64) float values[kSpan];
    for (int64_t r = begin; r < end; r++) {
        for (int64_t column = 0; column < t.columns; column += kSpan) {
            int64_t width = t.columns - column < kSpan ? t.columns - column : kSpan;
            normal_row(values, t.seed, t.stream, uint32_t(t.ids[r]), uint32_t(column / 4), width, t.factor);
            narrow(t.out, t.out_dtype, r * t.columns + column, values, width, t.bypass);
        }
    }
    if (t.bypass) finish_streams();
}

}  // namespace agora::AGORA_TARGET
