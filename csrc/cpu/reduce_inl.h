// The weighted mean of parts. Included once per instruction set by kernels_inl.h.

namespace agora::AGORA_TARGET {

// Element i of a part, and the vector that begins there. A part lies at any address.
struct Fp32Part {
    const uint8_t* bytes;

    __attribute__((always_inline)) inline Floats vector(int64_t i) const {
        return load_floats(reinterpret_cast<const float*>(bytes + 4 * i));
    }
    __attribute__((always_inline)) inline float one(int64_t i) const {
        float x;
        memcpy(&x, bytes + 4 * i, sizeof x);
        return x;
    }
};

template <typename Half>
struct HalfPart {
    const uint8_t* bytes;

    __attribute__((always_inline)) inline Floats vector(int64_t i) const {
        return load_floats(reinterpret_cast<const Half*>(bytes + 2 * i));
    }
    __attribute__((always_inline)) inline float one(int64_t i) const {
        Half x;
        memcpy(&x, bytes + 2 * i, sizeof x);
        return load(x);
    }
};

struct CodedPart {  // int8: blocks of a scale and codes
    const uint8_t* bytes;

    __attribute__((always_inline)) inline float scale(int64_t i) const {
        float x;
        memcpy(&x, bytes + i / kBlock * kInt8Block, sizeof x);
        return x;
    }
    __attribute__((always_inline)) inline const uint8_t* codes(int64_t i) const {
        return bytes + i / kBlock * kInt8Block + sizeof(float) + i % kBlock;
    }
    __attribute__((always_inline)) inline Floats vector(int64_t i) const {
        return scale(i) * load_codes(codes(i));
    }
    __attribute__((always_inline)) inline float one(int64_t i) const {
        return mul_rounded(scale(i), float(int8_t(*codes(i))));
    }
};

// Square sums of a chunk: 16 of them on every instruction set, so that norms are equal to the bit.
constexpr int kSums = 16;

// One chunk in one pass, straight from where the part lies: the look at it, sum + weight * part, or both.
template <bool kLook, bool kAdd, typename Part>
AGORA_FN void reduce_chunk(const ReduceTask& t, const Part& part, int64_t start, int64_t stop,
                           Verdict* verdict) {
    const Floats limit = kLargestUsable - Floats{};
    const bool bypass =
        kStreamCopies && kAdd && t.bypass && reinterpret_cast<uintptr_t>(t.out + start) % 64 == 0;
    Doubles squares[kSums / kWords] = {};
    Ints bad = {};
    int64_t i = start;
    for (; i + kSums <= stop; i += kSums) {
        for (int v = 0; v < kSums / kWidth; v++) {
            int64_t at = i + v * kWidth;
            Floats x = part.vector(at), weighted = x * t.weight;
            if (kLook) {
                Floats size = Floats(Bits(weighted) & 0x7fffffffu);
                bad |= ~Ints(size <= limit);  // unusable()
                squares[2 * v] = add_square(squares[2 * v], low_doubles(x));
                squares[2 * v + 1] = add_square(squares[2 * v + 1], high_doubles(x));
            }
            if (kAdd) {
                Floats sum = load_floats(t.sum + at) + weighted;
                if (bypass)
                    stream_floats(t.out + at, sum);
                else
                    store_floats(t.out + at, sum);
            }
        }
    }
    double sums[kSums];
    memcpy(sums, squares, sizeof sums);
    int32_t any = 0;
    for (int j = 0; j < kWidth; j++) any |= bad[j];
    for (; i < stop; i++) {
        float x = part.one(i);
        if (kLook) {
            any |= int32_t(unusable(x, t.weight));
            sums[0] += double(x) * double(x);
        }
        if (kAdd) t.out[i] = accumulated(t.sum[i], x, t.weight);
    }
    if (!kLook) return;
    double norm2 = 0;
    for (int j = 0; j < kSums; j++) norm2 += sums[j];
    *verdict = Verdict{norm2, any != 0};
}

template <typename Part>
static void reduce_chunks(const ReduceTask& t, int64_t begin, int64_t end) {
    const Part part = {static_cast<const uint8_t*>(t.part)};
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int64_t start = chunk * kReduceChunk;
        int64_t stop = t.n - start < kReduceChunk ? t.n : start + kReduceChunk;
        if (t.verdicts == nullptr)
            reduce_chunk<false, true>(t, part, start, stop, nullptr);
        else if (t.out == nullptr)
            reduce_chunk<true, false>(t, part, start, stop, t.verdicts + chunk);
        else
            reduce_chunk<true, true>(t, part, start, stop, t.verdicts + chunk);
    }
    if (kStreamCopies && t.bypass) finish_streams();
}

static void reduce(const ReduceTask& t, int64_t begin, int64_t end) {
    if (t.part_dtype == kFloat32)
        reduce_chunks<Fp32Part>(t, begin, end);
    else if (t.part_dtype == kBfloat16)
        reduce_chunks<HalfPart<Bf16>>(t, begin, end);
    else if (t.part_dtype == kFloat16)
        reduce_chunks<HalfPart<Fp16>>(t, begin, end);
    else
        reduce_chunks<CodedPart>(t, begin, end);
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
