// The weighted mean of parts. Included once per instruction set by kernels_inl.h.

namespace agora::AGORA_TARGET {

// Elements [start, stop) of the part as fp32: in place where they are fp32, else in `buffer`.
// A chunk of a part is at most kReduceChunk elements and begins at a whole int8 block.
static void load_part(const ReduceTask& t, int64_t start, int64_t count, float* buffer) {
    const uint8_t* part = static_cast<const uint8_t*>(t.part);
    if (t.part_dtype == kFloat32) {
        memcpy(buffer, part + 4 * start, size_t(4 * count));
    } else if (t.part_dtype == kBfloat16) {
        const UnalignedBf16* from = reinterpret_cast<const UnalignedBf16*>(part) + start;
        for (int64_t i = 0; i < count; i++) buffer[i] = load(from[i]);
    } else if (t.part_dtype == kFloat16) {
        Fp16 halves[kReduceChunk];
        memcpy(halves, part + 2 * start, size_t(2 * count));
        int64_t i = 0;
        for (; i + kWidth <= count; i += kWidth) store_floats(buffer + i, load_floats(halves + i));
        for (; i < count; i++) buffer[i] = load(halves[i]);
    } else {
        for (int64_t block = start / kBlock; block * kBlock < start + count; block++) {
            float scale;
            memcpy(&scale, part + block * kInt8Block, sizeof scale);
            const int8_t* codes = reinterpret_cast<const int8_t*>(part + block * kInt8Block + sizeof scale);
            float* to = buffer + (block * kBlock - start);
            for (int j = 0; j < kBlock; j++) to[j] = mul_rounded(scale, float(codes[j]));
        }
    }
}

static Verdict verdict_of(const float* x, int64_t count, float weight) {
    constexpr int kSums = 16;
    double norm2[kSums] = {};
    int32_t bad[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums) {
        for (int j = 0; j < kSums; j++) {
            bad[j] |= int32_t(unusable(x[i + j], weight));
            norm2[j] += double(x[i + j]) * double(x[i + j]);
        }
    }
    for (; i < count; i++) {
        bad[0] |= int32_t(unusable(x[i], weight));
        norm2[0] += double(x[i]) * double(x[i]);
    }
    Verdict verdict = {0, 0};
    for (int j = 0; j < kSums; j++) {
        verdict.norm2 += norm2[j];
        verdict.bad |= bad[j];
    }
    return verdict;
}

// Chunks of a part: the look at it, and out = sum + weight * part where `out` is given, in one pass.
static void reduce(const ReduceTask& t, int64_t begin, int64_t end) {
    float buffer[kReduceChunk];
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int64_t start = chunk * kReduceChunk, left = t.n - start;
        int64_t count = left < kReduceChunk ? left : kReduceChunk;
        load_part(t, start, count, buffer);
        if (t.verdicts != nullptr) t.verdicts[chunk] = verdict_of(buffer, count, t.weight);
        if (t.out == nullptr) continue;
        const float* sum = t.sum + start;
        float* out = t.out + start;
        for (int64_t i = 0; i < count; i++) out[i] = accumulated(sum[i], buffer[i], t.weight);
    }
}

// Blocks of a part, of which the last may be short, and stays short in int8: its scale and its codes.
static void part_pack(const PartTask& t, int64_t begin, int64_t end) {
    const uint8_t* from = static_cast<const uint8_t*>(t.from);
    uint8_t* to = static_cast<uint8_t*>(t.to);
    for (int64_t block = begin; block < end; block++) {
        int64_t start = block * kBlock, left = t.n - start;
        int count = int(left < kBlock ? left : kBlock);
        float values[kBlock] = {};
        memcpy(values, from + 4 * start, size_t(4 * count));
        if (t.dtype == kInt8) {
            code_block(to + block * kInt8Block, values, count);
            continue;
        }
        Bf16 halves[kBlock];
        for (int j = 0; j < kBlock; j += kWidth) store_floats(halves + j, load_floats(values + j));
        memcpy(to + 2 * start, halves, size_t(2 * count));
    }
}

static void part_unpack(const PartTask& t, int64_t begin, int64_t end) {
    const uint8_t* from = static_cast<const uint8_t*>(t.from);
    uint8_t* to = static_cast<uint8_t*>(t.to);
    for (int64_t block = begin; block < end; block++) {
        int64_t start = block * kBlock, left = t.n - start;
        int count = int(left < kBlock ? left : kBlock);
        float values[kBlock];
        if (t.dtype == kInt8) {
            float scale;
            int8_t codes[kBlock] = {};
            memcpy(&scale, from + block * kInt8Block, sizeof scale);
            memcpy(codes, from + block * kInt8Block + sizeof scale, size_t(count));
            for (int j = 0; j < kBlock; j++) values[j] = mul_rounded(scale, float(codes[j]));
        } else {
            Bf16 halves[kBlock] = {};
            memcpy(halves, from + 2 * start, size_t(2 * count));
            for (int j = 0; j < kBlock; j++) values[j] = load(halves[j]);
        }
        memcpy(to + 4 * start, values, size_t(4 * count));
    }
}

static void finish(const FinishTask& t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) t.out[i] = finished(t.sum[i], t.weight_sum);
}

}  // namespace agora::AGORA_TARGET
