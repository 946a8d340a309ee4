// Slice pack and merge: a warp moves a block of 256 weights, eight elements a lane.
//
// Eight blocks a warp and turn: lane j works out where block j lies (permutation and search in the table),
// the others hear it by shuffle. Several blocks are loaded before the first is stored, so that enough bytes
// are in flight. Whole, aligned blocks move 16 bytes a lane and access; all others element by element.
#include "averaging.h"
#include "device.cuh"

namespace agora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kTurn = 8;    // blocks a warp and turn
constexpr int kEach = 8;    // elements a lane: four of each half of a block
constexpr int kFlight = 4;  // blocks in flight while packing
constexpr int64_t kMostGrid = 132 * 64;
constexpr unsigned kAll = 0xffffffffu;
static_assert(kEach * kLanes == kBlock && kTurn % kFlight == 0, "a warp moves a whole block");

// Element of a block that a lane's number q is.
__device__ __forceinline__ int element_of(int lane, int q) {
    return (q / 4) * (kBlock / 2) + lane * 4 + q % 4;
}

__device__ __forceinline__ bool aligned(const void* address, unsigned bytes) {
    return (reinterpret_cast<uintptr_t>(address) & (bytes - 1)) == 0;
}

struct Eight {
    float v[kEach];
};

// Elements [from, to) of a block that begins at `block`; zeros for the others.
__device__ __forceinline__ Eight load_block(const float* block, int lane, int from, int to) {
    Eight x;
    if (to - from == kBlock && aligned(block, 16)) {
        float4 low = reinterpret_cast<const float4*>(block)[lane];
        float4 high = reinterpret_cast<const float4*>(block)[kLanes + lane];
        x = Eight{{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
    } else {
#pragma unroll
        for (int q = 0; q < kEach; q++) {
            int e = element_of(lane, q);
            x.v[q] = e >= from && e < to ? block[e] : 0.0f;
        }
    }
    return x;
}

__device__ __forceinline__ void store_block(float* block, const Eight& x, int lane, int from, int to) {
    if (to - from == kBlock && aligned(block, 16)) {
        reinterpret_cast<float4*>(block)[lane] = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
        reinterpret_cast<float4*>(block)[kLanes + lane] = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
        return;
    }
#pragma unroll
    for (int q = 0; q < kEach; q++) {
        int e = element_of(lane, q);
        if (e >= from && e < to) block[e] = x.v[q];
    }
}

// Half: Bf16 or Fp16.
template <typename Half>
__device__ __forceinline__ void store_halves(Half* block, const Eight& x, int lane, int from, int to) {
    Half halves[kEach];
#pragma unroll
    for (int q = 0; q < kEach; q++) store(&halves[q], x.v[q]);
    if (to - from == kBlock && aligned(block, 8)) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Half* h = halves + 4 * half;
            uint2 bits =
                make_uint2(h[0].bits | uint32_t(h[1].bits) << 16, h[2].bits | uint32_t(h[3].bits) << 16);
            reinterpret_cast<uint2*>(block)[half * kLanes + lane] = bits;
        }
        return;
    }
#pragma unroll
    for (int q = 0; q < kEach; q++) {
        int e = element_of(lane, q);
        if (e >= from && e < to) block[e] = halves[q];
    }
}

__device__ __forceinline__ Eight load_halves(const Bf16* block, int lane, int from, int to) {
    Eight x;
#pragma unroll
    for (int q = 0; q < kEach; q++) {
        int e = element_of(lane, q);
        x.v[q] = e >= from && e < to ? load(block[e]) : 0.0f;
    }
    return x;
}

__device__ __forceinline__ float scale_of(const uint8_t* block) {
    uint32_t bits = block[0] | uint32_t(block[1]) << 8 | uint32_t(block[2]) << 16 | uint32_t(block[3]) << 24;
    return bits_float(bits);
}

__device__ __forceinline__ void store_int8(uint8_t* block, const Eight& difference, int lane) {
    uint32_t largest = 0;
#pragma unroll
    for (int q = 0; q < kEach; q++) {
        uint32_t size = magnitude_bits(difference.v[q]);
        largest = size > largest ? size : largest;
    }
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) {
        uint32_t theirs = __shfl_xor_sync(kAll, largest, other);
        largest = theirs > largest ? theirs : largest;
    }
    float scale = wire_scale(largest), divisor = wire_divisor(scale);
    uint32_t bits = float_bits(scale);
    if (lane < 4) block[lane] = uint8_t(bits >> (8 * lane));
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t codes = 0;
#pragma unroll
        for (int q = 0; q < 4; q++)
            codes |= uint32_t(uint8_t(wire_code(difference.v[4 * half + q], divisor))) << (8 * q);
        uint8_t* to = block + 4 + half * (kBlock / 2) + lane * 4;
        if (aligned(block, 4)) {
            *reinterpret_cast<uint32_t*>(to) = codes;
        } else {
#pragma unroll
            for (int q = 0; q < 4; q++) to[q] = uint8_t(codes >> (8 * q));
        }
    }
}

// Where a warp's blocks lie: lane j knows block j of its turn.
struct Known {
    int64_t tensor, offset;
    int count;
};

__device__ __forceinline__ Known find(const Slice& slice, const Permutation& permutation, int64_t position) {
    if (position >= slice.count) return Known{0, 0, 0};
    uint64_t block = permute(permutation, uint64_t(slice.first + position));
    Place place = place_of(slice.table, slice.tensors, int64_t(block));
    return Known{place.tensor, place.offset, place.count};
}

__device__ __forceinline__ Known heard(const Known& known, int lane) {
    return Known{int64_t(__shfl_sync(kAll, (unsigned long long)(known.tensor), lane)),
                 int64_t(__shfl_sync(kAll, (unsigned long long)(known.offset), lane)),
                 __shfl_sync(kAll, known.count, lane)};
}

template <typename T>
__device__ __forceinline__ T* block_of(const TensorRow* table, const Known& known) {
    return reinterpret_cast<T*>(table[known.tensor].address) + known.offset;
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(Slice slice, Permutation permutation, const TensorRow* consensus, void* packed, int dtype,
                float* snapshot) {
    int lane = int(threadIdx.x % kLanes);
    int64_t warp = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
    int64_t warps = int64_t(gridDim.x) * (kThreads / kLanes);
    for (int64_t turn = warp * kTurn; turn < slice.count; turn += warps * kTurn) {
        Known mine = find(slice, permutation, turn + lane % kTurn);
#pragma unroll
        for (int flight = 0; flight < kTurn; flight += kFlight) {
            Eight values[kFlight], before[kFlight];
#pragma unroll
            for (int j = 0; j < kFlight; j++) {
                Known place = heard(mine, flight + j);
                if (place.count == 0) continue;
                values[j] = load_block(block_of<float>(slice.table, place), lane, 0, place.count);
                if (dtype == kInt8)
                    before[j] = load_block(block_of<float>(consensus, place), lane, 0, place.count);
            }
#pragma unroll
            for (int j = 0; j < kFlight; j++) {
                int64_t i = turn + flight + j;
                if (i >= slice.count) continue;
                if (snapshot != nullptr) store_block(snapshot + i * kBlock, values[j], lane, 0, kBlock);
                if (dtype == kFloat32) {
                    store_block(static_cast<float*>(packed) + i * kBlock, values[j], lane, 0, kBlock);
                } else if (dtype == kBfloat16) {
                    store_halves(static_cast<Bf16*>(packed) + i * kBlock, values[j], lane, 0, kBlock);
                } else {
                    Eight difference;
#pragma unroll
                    for (int q = 0; q < kEach; q++)
                        difference.v[q] = add_rounded(values[j].v[q], -before[j].v[q]);
                    store_int8(static_cast<uint8_t*>(packed) + i * kInt8Block, difference, lane);
                }
            }
        }
    }
}

__device__ __forceinline__ Eight average_of(const Merge& m, int64_t i, const Eight& consensus, int lane,
                                            int from, int to) {
    if (m.average_dtype == kFloat32)
        return load_block(static_cast<const float*>(m.average) + i * kBlock, lane, from, to);
    if (m.average_dtype == kBfloat16)
        return load_halves(static_cast<const Bf16*>(m.average) + i * kBlock, lane, from, to);
    const uint8_t* block = static_cast<const uint8_t*>(m.average) + i * kInt8Block;
    float scale = scale_of(block);
    Eight x;
#pragma unroll
    for (int q = 0; q < kEach; q++)
        x.v[q] = from_code(consensus.v[q], scale, int8_t(block[4 + element_of(lane, q)]));
    return x;
}

__global__ void __launch_bounds__(kThreads) merge_kernel(Slice slice, Permutation permutation, Merge m) {
    int lane = int(threadIdx.x % kLanes);
    int64_t warp = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
    int64_t warps = int64_t(gridDim.x) * (kThreads / kLanes);
    int64_t last = (m.stop + kBlock - 1) / kBlock;
    float rest = add_rounded(1.0f, -m.mu);
    for (int64_t turn = m.start / kBlock + warp * kTurn; turn < last; turn += warps * kTurn) {
        Known mine = find(slice, permutation, turn + lane % kTurn);
#pragma unroll 2
        for (int j = 0; j < kTurn; j++) {
            int64_t i = turn + j, at = i * kBlock;
            Known place = heard(mine, j);
            int from = m.start > at ? int(m.start - at) : 0;
            int to = m.stop - at < place.count ? int(m.stop - at) : place.count;
            if (i >= last || from >= to) continue;
            float* weights = block_of<float>(slice.table, place);
            Eight w = load_block(weights, lane, from, to), consensus = {}, snapshot = {}, drift = {};
            if (m.average_dtype == kInt8)
                consensus = load_block(block_of<float>(m.consensus, place), lane, from, to);
            if (m.mode != kOverwrite) snapshot = load_block(m.snapshot + at, lane, from, to);
            if (m.mode == kEma) drift = load_block(block_of<float>(m.drift, place), lane, from, to);
            Eight average = average_of(m, i, consensus, lane, from, to);
#pragma unroll
            for (int q = 0; q < kEach; q++) {
                Merged result = merged(w.v[q], snapshot.v[q], average.v[q], drift.v[q], m.mode, m.mu, rest);
                w.v[q] = result.weight;
                drift.v[q] = result.drift;
            }
            store_block(weights, w, lane, from, to);
            if (m.mode == kEma) store_block(block_of<float>(m.drift, place), drift, lane, from, to);
            if (m.consensus != nullptr)
                store_block(block_of<float>(m.consensus, place), average, lane, from, to);
            if (m.compute == nullptr) continue;
            if (m.compute_dtype == kBfloat16)
                store_halves(block_of<Bf16>(m.compute, place), w, lane, from, to);
            else
                store_halves(block_of<Fp16>(m.compute, place), w, lane, from, to);
        }
    }
}

unsigned grid_for(int64_t blocks) { return blocks_for(blocks, kTurn * (kThreads / kLanes), kMostGrid); }

}  // namespace

int pack(const Slice& slice, const TensorRow* consensus, void* packed, int dtype, float* snapshot,
         void* stream) {
    if (slice.count == 0) return 0;
    return launch(pack_kernel, grid_for(slice.count), kThreads, 0, stream, slice,
                  make_permutation(uint64_t(slice.blocks), slice.key), consensus, packed, dtype, snapshot);
}

int merge(const Slice& slice, const Merge& merge, void* stream) {
    int64_t touched = (merge.stop + kBlock - 1) / kBlock - merge.start / kBlock;
    if (merge.start >= merge.stop) return 0;
    return launch(merge_kernel, grid_for(touched), kThreads, 0, stream, slice,
                  make_permutation(uint64_t(slice.blocks), slice.key), merge);
}

}  // namespace agora::cuda
