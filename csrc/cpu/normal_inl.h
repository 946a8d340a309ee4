// Fill rows with nearly normal numbers. Included once per instruction set by kernels_inl.h.

namespace agora::AGORA_TARGET {

// The groups that the lanes of a vector work on, in the order that makes pairs of words come out sorted.
AGORA_FN Words lane_groups() {
    Words groups;
    for (int lane = 0; lane < kWords; lane++)
        groups[lane] = uint64_t(lane % 2 ? kWords / 2 + lane / 2 : lane / 2);
    return groups;
}

// Vectors of groups that are made at once. Zen 4 takes 7.9 ms for 84 MB with four, 11.4 with one (AVX2),
// or 5.0 and 6.2 (AVX-512).
constexpr int kMostAbreast = kZen ? 4 : 1;

// Values of one table row from a group on, as long as N vectors of groups fit; how many it made.
template <int N>
AGORA_FN int64_t normal_groups(float* out, uint64_t seed, uint64_t stream, uint32_t row, uint32_t group,
                               int64_t columns, float factor) {
    int64_t done = 0;
    const Words lanes = lane_groups();
    Abreast<N> rows, groups;
    for (Words& v : rows.v) v = Words{} + uint64_t(row);
    for (; done + 4 * N * kWords <= columns; group += uint32_t(N * kWords)) {
        for (int i = 0; i < N; i++) groups.v[i] = lanes + uint64_t(group + uint32_t(i * kWords));
        Words4<Abreast<N>> w = group_words(seed, stream, rows, groups);
        for (int i = 0; i < N; i++, done += 4 * kWords) {
            Words ab = low_pairs(w.a.v[i], w.b.v[i]), cd = low_pairs(w.c.v[i], w.d.v[i]);
            Ints first = byte_sums(even_pairs(ab, cd)) - kCentre;
            Ints second = byte_sums(odd_pairs(ab, cd)) - kCentre;
            store_floats(out + done, __builtin_convertvector(first, Floats) * factor);
            store_floats(out + done + kWidth, __builtin_convertvector(second, Floats) * factor);
        }
    }
    return done;
}

// `columns` values of one table row, beginning at a group.
static void normal_row(float* out, uint64_t seed, uint64_t stream, uint32_t row, uint32_t group,
                       int64_t columns, float factor) {
    int64_t done = normal_groups<kMostAbreast>(out, seed, stream, row, group, columns, factor);
    if (kMostAbreast > 1)
        done += normal_groups<1>(out + done, seed, stream, row, group + uint32_t(done / 4), columns - done,
                                 factor);
    group += uint32_t(done / 4);
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
    constexpr int64_t kSpan = 2048;  // stays in L1, and pays for making the rounds' keys
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
