// Slice pack and merge, weighted reduce. Included once per instruction set by kernels_inl.h.

namespace agora::AGORA_TARGET {

static void pack(const PackTask& t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        uint64_t block = permute(t.permutation, uint64_t(t.first + i));
        memcpy(t.packed + i * kBlock, t.flat + block * kBlock, kBlock * sizeof(float));
    }
}

static void merge(const MergeTask& t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        int64_t packed = i * kBlock;
        int64_t from = t.start > packed ? t.start - packed : 0;
        int64_t to = t.stop < packed + kBlock ? t.stop - packed : kBlock;
        float* weights = t.flat + permute(t.permutation, uint64_t(t.first + i)) * kBlock;
        if (t.mode == kDelta) {
            for (int64_t j = from; j < to; j++)
                weights[j] = merged(weights[j], t.snapshot[packed + j], t.average[packed + j], kDelta);
        } else {
            memcpy(weights + from, t.average + packed + from, size_t(to - from) * sizeof(float));
        }
    }
}

template <typename Part>
static void inspect_part(const ReduceTask& t, int64_t begin, int64_t end) {
    constexpr int kSums = 16;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int64_t start = chunk * kReduceChunk, stop = start + kReduceChunk < t.n ? start + kReduceChunk : t.n;
        const Part* part = static_cast<const Part*>(t.part);
        double norm2[kSums] = {};
        int32_t bad[kSums] = {};
        int64_t i = start;
        for (; i + kSums <= stop; i += kSums) {
            for (int j = 0; j < kSums; j++) {
                float x = load(part[i + j]);
                bad[j] |= int32_t(unusable(x, t.weight));
                norm2[j] += double(x) * double(x);
            }
        }
        for (; i < stop; i++) {
            float x = load(part[i]);
            bad[0] |= int32_t(unusable(x, t.weight));
            norm2[0] += double(x) * double(x);
        }
        Verdict verdict = {0, 0};
        for (int j = 0; j < kSums; j++) {
            verdict.norm2 += norm2[j];
            verdict.bad |= bad[j];
        }
        t.verdicts[chunk] = verdict;
    }
}

template <typename Part>
static void add_part(const ReduceTask& t, int64_t begin, int64_t end) {
    const Part* part = static_cast<const Part*>(t.part);
    for (int64_t i = begin; i < end; i++) t.sum[i] = accumulated(t.sum[i], load(part[i]), t.weight);
}

static void inspect(const ReduceTask& t, int64_t begin, int64_t end) {
    (t.part_dtype == kFloat32 ? inspect_part<UnalignedFloat> : inspect_part<UnalignedBf16>)(t, begin, end);
}

static void add(const ReduceTask& t, int64_t begin, int64_t end) {
    (t.part_dtype == kFloat32 ? add_part<UnalignedFloat> : add_part<UnalignedBf16>)(t, begin, end);
}

static void finish(const FinishTask& t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) t.out[i] = finished(t.sum[i], t.weight_sum);
}

}  // namespace agora::AGORA_TARGET
