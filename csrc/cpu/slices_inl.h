// Slice pack and merge. Included once per instruction set by kernels_inl.h.
//
// Blocks lie anywhere in memory; their places come from the permutation in batches, one lane a position. A
// core waits for a few cache lines at once, so it matters which it asks for (figures: docs/benchmarks.md).
// The Xeon that runs the AVX-512 table:
// - Of a block to come only the first line. That finds the page and wakes the processor's own prefetcher,
//   which brings the rest; asking for all sixteen takes places that nearer lines need.
// - What is written in order is asked for a block ahead, line by line, and stored through the caches. Stores
//   past the caches keep a place until memory has them, and the prefetcher alone stops at the end of a page.
// - Two outputs are written line by line in turn.
// Zen 4 (kZen) wants the opposite of each: pack takes it 40 ms so, and 21 as follows.
// - All lines of a group of blocks, early and into L2 only, whose places are many; in L1 they would be too
// many.
// - Stores past the caches where the results are large: lines that nobody reads are not fetched first.
// - One output after the other, a group of blocks each: two streams past the caches in turn take 23 ms where
//   this takes 18.

namespace agora::AGORA_TARGET {

constexpr int kBatch = 16;                 // positions permuted together
constexpr int kLine = 16;                  // floats of a cache line
constexpr bool kAskWhole = kZen;           // all lines of a block to come
constexpr int kGroup = kAskWhole ? 8 : 1;  // blocks that are asked for, and worked on, together
constexpr int kAhead = kAskWhole ? 8 : 2;  // blocks from the one that is worked on to the one asked for
static_assert(kBatch % kGroup == 0 && kAhead % kGroup == 0 && kAhead <= kBatch,
              "groups lie within a batch, and the places of two batches are known");

// permute() of `count` positions from `first` on, at most kBatch of them.
static void permute_batch(const Permutation& p, int64_t first, int count, int64_t* blocks) {
    uint32_t x[kBatch];
    for (int i = 0; i < kBatch; i++) x[i] = uint32_t(first + (i < count ? i : 0));
    uint32_t outside = 1;
    for (int walk = 0; outside; walk++) {
        uint32_t y[kBatch];
        for (int i = 0; i < kBatch; i++) {
            uint32_t left = x[i] >> p.half_bits, right = x[i] & p.mask;
            for (int round = 0; round < kFeistelRounds; round++) {
                uint32_t next = left ^ feistel_round(right, p.keys[round], p.mask);
                left = right;
                right = next;
            }
            y[i] = left << p.half_bits | right;
        }
        outside = 0;
        for (int i = 0; i < kBatch; i++) {
            bool walking = walk == 0 || uint64_t(x[i]) >= p.blocks;
            x[i] = walking ? y[i] : x[i];
            outside |= uint32_t(uint64_t(x[i]) >= p.blocks);
        }
    }
    for (int i = 0; i < count; i++) blocks[i] = int64_t(x[i]);
}

AGORA_FN float* element(const TensorRow* table, const Place& place) {
    return reinterpret_cast<float*>(table[place.tensor].address) + place.offset;
}

AGORA_FN void ask_for(const float* block) {
    if (!kAskWhole) return __builtin_prefetch(block);
    for (int j = 0; j < kBlock; j += kLine) __builtin_prefetch(block + j, 0, 2);
}

// Tensors like the weights that are visited with them; `table` may be null.
struct Twin {
    const TensorRow* table;
    int64_t element_bytes;
};

// Calls work(packed block, places, count) for the blocks of [begin, end), a group at a time, with the next
// ones and their twins on their way into the caches.
template <typename Work>
AGORA_FN void each_group(const SliceOf& slice, std::initializer_list<Twin> twins, int64_t begin, int64_t end,
                         const Work& work) {
    Place places[2 * kBatch];  // a ring of two batches
    auto fill = [&](int64_t from) {
        int count = int(end - from < kBatch ? end - from : kBatch);
        int64_t blocks[kBatch];
        if (count > 0) permute_batch(slice.permutation, slice.first + from, count, blocks);
        for (int i = 0; i < count; i++)
            places[((from - begin) + i) % (2 * kBatch)] = place_of(slice.table, slice.tensors, blocks[i]);
    };
    auto ask = [&](int64_t from) {
        for (int64_t i = from; i < from + kGroup && i < end; i++) {
            const Place& next = places[(i - begin) % (2 * kBatch)];
            ask_for(element(slice.table, next));
            for (const Twin& twin : twins) {
                if (twin.table == nullptr) continue;
                int64_t address = twin.table[next.tensor].address + next.offset * twin.element_bytes;
                __builtin_prefetch(reinterpret_cast<const void*>(address));
            }
        }
    };
    fill(begin);
    for (int64_t i = begin; i < begin + kAhead; i += kGroup) ask(i);
    for (int64_t i = begin; i < end; i += kGroup) {
        if ((i - begin) % kBatch == 0) fill(i + kBatch);
        ask(i + kAhead);
        work(i, places + (i - begin) % (2 * kBatch), int(end - i < kGroup ? end - i : kGroup));
    }
}

// One block to two buffers that are written from front to back; `second` may be null. Past the caches: both
// are aligned to lines.
template <bool kPast, typename To>
AGORA_FN void put_block(const float* values, To* first, float* second) {
    for (int j = 0; j < kBlock; j += kLine) {
        if (!kPast) {
            __builtin_prefetch(first + j + kBlock, 1);
            if (second != nullptr) __builtin_prefetch(second + j + kBlock, 1);
        }
        for (int i = j; i < j + kLine; i += kWidth) {
            Floats x = load_floats(values + i);
            if (kPast)
                stream_floats(first + i, x);
            else
                store_floats(first + i, x);
            if (second == nullptr) continue;
            if (kPast)
                stream_floats(second + i, x);
            else
                store_floats(second + i, x);
        }
    }
}

// A block as a scale and the codes of its first `count` numbers; what is behind them must be 0.
static void code_block(uint8_t* to, const float* values, int count) {
    uint32_t largest = 0;
    for (int j = 0; j < kBlock; j++) {
        uint32_t size = magnitude_bits(values[j]);
        largest = size > largest ? size : largest;
    }
    float scale = wire_scale(largest), divisor = wire_divisor(scale);
    int8_t codes[kBlock];
    for (int j = 0; j < kBlock; j++) codes[j] = wire_code(values[j], divisor);
    memcpy(to, &scale, sizeof scale);
    memcpy(to + sizeof scale, codes, size_t(count));
}

static void pack_int8(uint8_t* to, const float* values, const float* consensus, int count) {
    float difference[kBlock] = {};
    for (int j = 0; j < count; j++) difference[j] = add_rounded(values[j], -consensus[j]);
    code_block(to, difference, kBlock);
}

// The numbers of a block that is about to be packed; `whole` is for one that ends with its tensor, before
// zeros.
AGORA_FN const float* numbers(const SliceOf& slice, const Place& place, float* whole) {
    const float* values = element(slice.table, place);
    if (place.count == kBlock) return values;
    memset(whole, 0, kBlock * sizeof(float));
    memcpy(whole, values, size_t(place.count) * sizeof(float));
    return whole;
}

template <bool kPast>
AGORA_FN void pack_blocks(const PackTask& t, int64_t begin, int64_t end) {
    constexpr bool kApart = kGroup > 1;  // one output after the other
    each_group(t.slice, {{t.consensus, 4}}, begin, end, [&](int64_t first, const Place* places, int count) {
        float whole[kBlock];
        for (int b = 0; b < count; b++) {
            const int64_t i = first + b;
            const float* values = numbers(t.slice, places[b], whole);
            float* snapshot = kApart || t.snapshot == nullptr ? nullptr : t.snapshot + i * kBlock;
            if (t.dtype == kFloat32) {
                put_block<kPast>(values, static_cast<float*>(t.packed) + i * kBlock, snapshot);
            } else if (t.dtype == kBfloat16) {
                put_block<kPast>(values, static_cast<Bf16*>(t.packed) + i * kBlock, snapshot);
            } else {
                if (snapshot != nullptr) put_block<kPast, float>(values, snapshot, nullptr);
                pack_int8(static_cast<uint8_t*>(t.packed) + i * kInt8Block, values,
                          element(t.consensus, places[b]), places[b].count);
            }
        }
        if (!kApart || t.snapshot == nullptr) return;
        for (int b = 0; b < count; b++)
            put_block<kPast, float>(numbers(t.slice, places[b], whole), t.snapshot + (first + b) * kBlock,
                                    nullptr);
    });
    if (kPast) finish_streams();
}

static void pack(const PackTask& t, int64_t begin, int64_t end) {
    const uintptr_t packed = t.dtype == kInt8 ? 0 : reinterpret_cast<uintptr_t>(t.packed);
    const bool lines = (packed | reinterpret_cast<uintptr_t>(t.snapshot)) % 64 == 0;
    if (kStreamCopies && t.bypass && lines)
        pack_blocks<kStreamCopies>(t, begin, end);
    else
        pack_blocks<false>(t, begin, end);
}

template <typename Low>
static void refresh(Low* to, const float* from, int count) {
    int j = 0;
    for (; j + kWidth <= count; j += kWidth) store_floats(to + j, load_floats(from + j));
    for (; j < count; j++) store(to + j, from[j]);
}

// The averages of elements [from, to) of packed block i, as fp32 in `into[from..to)`.
static void averages(const MergeTask& t, int64_t i, const float* consensus, int from, int to, float* into) {
    if (t.average_dtype == kBfloat16) {
        const Bf16* packed = static_cast<const Bf16*>(t.average) + i * kBlock;
        for (int j = from; j < to; j++) into[j] = load(packed[j]);
        return;
    }
    const uint8_t* packed = static_cast<const uint8_t*>(t.average) + i * kInt8Block;
    float scale;
    memcpy(&scale, packed, sizeof scale);
    const int8_t* codes = reinterpret_cast<const int8_t*>(packed + sizeof scale);
    for (int j = from; j < to; j++) into[j] = from_code(consensus[j], scale, codes[j]);
}

template <int kMode>
AGORA_FN void merge_block(float* weights, const float* snapshot, const float* average, float* drift, int from,
                          int to, float mu) {
    float rest = add_rounded(1.0f, -mu);
    for (int j = from; j < to; j++) {
        Merged result = merged(weights[j], kMode == kOverwrite ? 0.0f : snapshot[j], average[j],
                               kMode == kEma ? drift[j] : 0.0f, kMode, mu, rest);
        weights[j] = result.weight;
        if (kMode == kEma) drift[j] = result.drift;
    }
}

static void merge(const MergeTask& t, int64_t begin, int64_t end) {
    const auto twins = {Twin{t.drift, 4}, Twin{t.consensus, 4}, Twin{t.compute, 2}};
    auto one = [&](int64_t i, const Place& place) {
        int64_t packed = i * kBlock;
        int from = int(t.start > packed ? t.start - packed : 0);
        int64_t stop = t.stop < packed + place.count ? t.stop - packed : place.count;
        int to = int(stop);
        if (from >= to) return;
        float* weights = element(t.slice.table, place);
        float* consensus = t.consensus == nullptr ? nullptr : element(t.consensus, place);
        float decoded[kBlock];
        const float* average = decoded;
        if (t.average_dtype == kFloat32)
            average = static_cast<const float*>(t.average) + packed;
        else
            averages(t, i, consensus, from, to, decoded);
        const float* snapshot = t.snapshot + (t.mode == kOverwrite ? 0 : packed);
        if (t.mode == kDelta)
            merge_block<kDelta>(weights, snapshot, average, nullptr, from, to, t.mu);
        else if (t.mode == kOverwrite)
            merge_block<kOverwrite>(weights, snapshot, average, nullptr, from, to, t.mu);
        else
            merge_block<kEma>(weights, snapshot, average, element(t.drift, place), from, to, t.mu);
        if (consensus != nullptr) memcpy(consensus + from, average + from, size_t(to - from) * sizeof(float));
        if (t.compute == nullptr) return;
        uint16_t* copy = reinterpret_cast<uint16_t*>(t.compute[place.tensor].address) + place.offset + from;
        if (t.compute_dtype == kBfloat16)
            refresh(reinterpret_cast<Bf16*>(copy), weights + from, to - from);
        else
            refresh(reinterpret_cast<Fp16*>(copy), weights + from, to - from);
    };
    each_group(t.slice, twins, begin, end, [&](int64_t first, const Place* places, int count) {
        for (int b = 0; b < count; b++) one(first + b, places[b]);
    });
}

}  // namespace agora::AGORA_TARGET
