#include "basis.h"

#include <stdlib.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <utility>

#include "../functors/common.h"

namespace agora {
namespace {

// Pieces of memory between two calls, at most 16 MiB: the system takes a page fault for every 4 KB of a fresh
// one, which is five times the work of laying U out. A thread that finds the store busy does without.
class Store {
  public:
    // Null: none of that size.
    void* take(size_t bytes) {
        std::unique_lock<std::mutex> hold(mutex_, std::try_to_lock);
        if (!hold.owns_lock()) return nullptr;
        for (Piece& piece : pieces_) {
            if (piece.memory != nullptr && piece.bytes == bytes) return std::exchange(piece.memory, nullptr);
        }
        return nullptr;
    }

    // Frees what it does not keep: `memory`, or a piece of another layout in its place.
    void give(void* memory, size_t bytes) {
        std::unique_lock<std::mutex> hold(mutex_, std::try_to_lock);
        if (hold.owns_lock() && bytes <= kMostBytes) {
            Piece* place =
                std::find_if(pieces_, pieces_ + kPieces, [](Piece& p) { return p.memory == nullptr; });
            if (place == pieces_ + kPieces) {
                place = pieces_ + next_;
                next_ = (next_ + 1) % kPieces;
            }
            std::swap(place->memory, memory);
            place->bytes = bytes;
        }
        free(memory);
    }

  private:
    static constexpr int kPieces = 4;
    static constexpr size_t kMostBytes = size_t(4) << 20;
    struct Piece {
        void* memory = nullptr;
        size_t bytes = 0;
    };
    std::mutex mutex_;
    Piece pieces_[kPieces];
    int next_ = 0;
};

Store& store() {
    static Store* one = new Store;  // leaked on purpose: calls may outlive static objects
    return *one;
}

Layout zeros(int64_t floats) {
    size_t bytes = size_t(std::max(padded(floats), kPad)) * sizeof(float);
    void* memory = store().take(bytes);
    if (memory == nullptr) memory = aligned_alloc(64, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    memset(memory, 0, bytes);
    return Layout(static_cast<float*>(memory), Return{bytes});
}

// U's number (i, j) goes to place i * down + j * right.
template <typename From>
void spread(float* out, const From* u, int64_t d, int64_t k, int64_t stride, int64_t down, int64_t right) {
    for (int64_t i = 0; i < d; i++) {
        if (right == 1)
            for (int64_t j = 0; j < k; j++) out[i * down + j] = load(u[i * stride + j]);
        else
            for (int64_t j = 0; j < k; j++) out[i * down + j * right] = load(u[i * stride + j]);
    }
}

// Rows [row, row + d) and columns [column, column + k) of U.
void spread(float* out, const Basis& basis, int64_t row, int64_t d, int64_t column, int64_t k, int64_t down,
            int64_t right) {
    int64_t at = row * basis.k + column;
    if (basis.dtype == kFloat32)
        spread(out, static_cast<const float*>(basis.u) + at, d, k, basis.k, down, right);
    else if (basis.dtype == kBfloat16)
        spread(out, static_cast<const Bf16*>(basis.u) + at, d, k, basis.k, down, right);
    else
        spread(out, static_cast<const Fp16*>(basis.u) + at, d, k, basis.k, down, right);
}

// The bits of two numbers that are neighbours along a sum.
uint32_t paired(Bf16 first, Bf16 second) { return uint32_t(first.bits) | uint32_t(second.bits) << 16; }

void put(float* to, uint32_t unit) { memcpy(to, &unit, sizeof unit); }

}  // namespace

void Return::operator()(float* memory) const { store().give(memory, bytes); }

Layout rows_of(const Basis& basis, int64_t columns) {
    Layout out = zeros(padded(basis.d, kRowGroup) * padded(columns));
    spread(out.get(), basis, 0, basis.d, 0, columns, padded(columns), 1);
    return out;
}

Layout panels_of(const Basis& basis) {
    Layout out = zeros(padded(basis.d, kPanel) * basis.k);
    for (int64_t row = 0; row < basis.d; row += kPanel)
        spread(out.get() + row * basis.k, basis, row, std::min(kPanel, basis.d - row), 0, basis.k, 1, kPanel);
    return out;
}

Layout last_columns(const Basis& basis) {
    int64_t columns = std::min(kLast, basis.k), length = padded(basis.d);
    Layout out = zeros(kLast * length);
    spread(out.get() + (kLast - columns) * length, basis, 0, basis.d, basis.k - columns, columns, 1, length);
    return out;
}

Layout pair_rows_of(const Basis& basis, int64_t columns) {
    Layout out = zeros(padded((basis.d + 1) / 2, kRowGroup) * padded(columns));
    const Bf16* u = static_cast<const Bf16*>(basis.u);
    float* to = out.get();
    for (int64_t i = 0; i < basis.d; i += 2, u += 2 * basis.k, to += padded(columns)) {
        const bool both = i + 1 < basis.d;
        for (int64_t j = 0; j < columns; j++) put(to + j, paired(u[j], both ? u[basis.k + j] : Bf16{}));
    }
    return out;
}

Layout pair_panels_of(const Basis& basis) {
    const int64_t units = (basis.k + 1) / 2;
    Layout out = zeros(padded(basis.d, kPanel) * units);
    const Bf16* u = static_cast<const Bf16*>(basis.u);
    for (int64_t row = 0; row < basis.d; row++, u += basis.k) {
        float* to = out.get() + row / kPanel * kPanel * units + row % kPanel;
        for (int64_t j = 0; j < basis.k / 2; j++) put(to + j * kPanel, paired(u[2 * j], u[2 * j + 1]));
        if (basis.k % 2) put(to + (units - 1) * kPanel, paired(u[basis.k - 1], Bf16{}));
    }
    return out;
}

Layout pair_last_columns(const Basis& basis) {
    const int64_t columns = std::min(kLast, basis.k), length = padded((basis.d + 1) / 2);
    Layout out = zeros(kLast * length);
    const Bf16* u = static_cast<const Bf16*>(basis.u) + basis.k - columns;
    float* to = out.get() + (kLast - columns) * length;
    for (int64_t i = 0; i < basis.d; i += 2, u += 2 * basis.k)
        for (int64_t j = 0; j < columns; j++)
            put(to + j * length + i / 2, paired(u[j], i + 1 < basis.d ? u[basis.k + j] : Bf16{}));
    return out;
}

}  // namespace agora
