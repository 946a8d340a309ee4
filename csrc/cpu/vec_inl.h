// One vector of floats and one of 64-bit lanes, as wide as the target's registers. Included once per
// instruction set by kernels_inl.h.
//
// Only what the compiler does not find by itself: a fused multiply-add where contraction is switched off
// for everything else, 32 x 32 -> 64 bit products in 64-bit lanes, conversions, stores past the caches.

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace agora::AGORA_TARGET {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

// What Zen 4 wants of memory and the AVX-512 Xeon does not, whether AVX-512 is there or masked.
#if defined(AGORA_ZEN)
constexpr bool kZen = true;
#else
constexpr bool kZen = kWidth == 8;
#endif

// Whether large results of copies and sums go past the caches. Zen 4 then makes a sum in 3.5 ms beside 4.4;
// the Xeon writes 1.6 times as fast through them.
constexpr bool kStreamCopies = kZen;

typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Bits __attribute__((vector_size(kWidth * 4)));
typedef uint64_t Words __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));
typedef double Doubles __attribute__((vector_size(kWidth * 4)));
constexpr int kWords = kWidth / 2;

AGORA_FN Floats load_floats(const float* from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

AGORA_FN void store_floats(float* to, Floats x) { memcpy(to, &x, sizeof x); }

AGORA_FN Floats load_floats(const Bf16* from) {
    Halves x;
    memcpy(&x, from, sizeof x);
    return Floats(__builtin_convertvector(x, Bits) << 16);
}

// As store() of common.h rounds.
AGORA_FN Halves rounded_to(const Bf16*, Floats value) {
    Bits bits = Bits(value);
    Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    Bits nan = Bits((bits & 0x7fffffffu) > 0x7f800000u);
    return __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), Halves);
}

AGORA_FN Floats load_floats(const Fp16* from) {
#if defined(__AVX512F__)
    return Floats(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Floats x;
    for (int i = 0; i < kWidth; i++) x[i] = load(from[i]);
    return x;
#endif
}

AGORA_FN Halves rounded_to(const Fp16*, Floats value) {
#if defined(__AVX512F__)
    return Halves(_mm512_cvtps_ph(__m512(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    return Halves(_mm256_cvtps_ph(__m256(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    Halves x;
    for (int i = 0; i < kWidth; i++) {
        Fp16 one;
        store(&one, value[i]);
        x[i] = one.bits;
    }
    return x;
#endif
}

template <typename Half>
AGORA_FN void store_floats(Half* to, Floats value) {
    Halves x = rounded_to(to, value);
    memcpy(to, &x, sizeof x);
}

// Signed bytes, exact.
AGORA_FN Floats load_codes(const uint8_t* from) {
#if defined(__AVX512F__)
    __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)));
#elif defined(__AVX2__)
    __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return Floats(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)));
#else
    Floats x;
    for (int i = 0; i < kWidth; i++) x[i] = float(int8_t(from[i]));
    return x;
#endif
}

// Past the caches, to an address that is a multiple of the size of what is stored.
AGORA_FN void stream_floats(float* to, Floats x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, __m512(x));
#elif defined(__AVX2__)
    _mm256_stream_ps(to, __m256(x));
#elif defined(__SSE2__)
    _mm_stream_ps(to, __m128(x));
#else
    store_floats(to, x);
#endif
}

template <typename Half>
AGORA_FN void stream_floats(Half* to, Floats value) {
    Halves x = rounded_to(to, value);
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), __m256i(x));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), __m128i(x));
#else
    memcpy(to, &x, sizeof x);
#endif
}

// Before another thread reads what was streamed.
AGORA_FN void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// a * b + c. Fused where the instruction set has it: products with U are the only results that may differ
// between machines, by a rounding.
AGORA_FN Floats multiply_add(Floats wide, Floats b, Floats c) {
#if defined(__AVX512F__)
    return Floats(_mm512_fmadd_ps(__m512(wide), __m512(b), __m512(c)));
#elif defined(__AVX2__)
    return Floats(_mm256_fmadd_ps(__m256(wide), __m256(b), __m256(c)));
#else
    return wide * b + c;
#endif
}

#if defined(__AVX512BF16__)
// Lanes are pairs of bf16: c + a.low * b.low + a.high * b.high, rounded after each, and numbers below 1.2e-38
// (in sums too) count as zero.
AGORA_FN Floats multiply_add_pairs(Floats a, Floats b, Floats c) {
    return Floats(_mm512_dpbf16_ps(__m512(c), (__m512bh)(a), (__m512bh)(b)));
}
#endif

// The first and the second half of the lanes, exact.
AGORA_FN Doubles low_doubles(Floats x) {
#if defined(__AVX512F__)
    return Doubles(_mm512_cvtps_pd(_mm512_castps512_ps256(__m512(x))));
#elif defined(__AVX2__)
    return Doubles(_mm256_cvtps_pd(_mm256_castps256_ps128(__m256(x))));
#elif defined(__SSE2__)
    return Doubles(_mm_cvtps_pd(__m128(x)));
#else
    return Doubles{x[0], x[1]};
#endif
}

AGORA_FN Doubles high_doubles(Floats x) {
#if defined(__AVX512F__)
    return Doubles(_mm512_cvtps_pd(_mm512_extractf32x8_ps(__m512(x), 1)));
#elif defined(__AVX2__)
    return Doubles(_mm256_cvtps_pd(_mm256_extractf128_ps(__m256(x), 1)));
#elif defined(__SSE2__)
    return Doubles(_mm_cvtps_pd(_mm_movehl_ps(__m128(x), __m128(x))));
#else
    return Doubles{x[2], x[3]};
#endif
}

// sum + x * x of numbers that were floats: their squares are exact, so that fused or not is the same.
AGORA_FN Doubles add_square(Doubles sum, Doubles x) {
#if defined(__AVX512F__)
    return Doubles(_mm512_fmadd_pd(__m512d(x), __m512d(x), __m512d(sum)));
#elif defined(__AVX2__)
    return Doubles(_mm256_fmadd_pd(__m256d(x), __m256d(x), __m256d(sum)));
#else
    return sum + x * x;
#endif
}

// Product of the low halves of each lane.
AGORA_FN Words multiply_low(Words a, Words b) {
#if defined(__AVX512F__)
    return Words(_mm512_mul_epu32(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
    return Words(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__SSE2__)
    return Words(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// 32-bit lanes from the low halves of two vectors of words: a0, b0, a1, b1, ...
AGORA_FN Words low_pairs(Words a, Words b) {
#if defined(__AVX512F__)
    return Words(_mm512_mask_blend_epi32(0xaaaa, __m512i(a), __m512i(b << 32)));
#elif defined(__AVX2__)
    return Words(_mm256_blend_epi32(__m256i(a), __m256i(b << 32), 0xaa));
#else
    return (a & 0xffffffffu) | b << 32;
#endif
}

// The sum of the four bytes of each 32-bit lane.
AGORA_FN Ints byte_sums(Words x) {
#if defined(__AVX512BW__)
    __m512i pairs = _mm512_maddubs_epi16(__m512i(x), _mm512_set1_epi8(1));
    return Ints(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
    __m256i pairs = _mm256_maddubs_epi16(__m256i(x), _mm256_set1_epi8(1));
    return Ints(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    return Ints(sum_of_bytes(Bits(x)));
#endif
}

// (a0, b0, a2, b2, ...) and (a1, b1, a3, b3, ...).
AGORA_FN Words even_pairs(Words a, Words b) {
#if defined(__AVX512F__)
    return Words(_mm512_unpacklo_epi64(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
    return Words(_mm256_unpacklo_epi64(__m256i(a), __m256i(b)));
#else
    return Words{a[0], b[0]};
#endif
}

AGORA_FN Words odd_pairs(Words a, Words b) {
#if defined(__AVX512F__)
    return Words(_mm512_unpackhi_epi64(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
    return Words(_mm256_unpackhi_epi64(__m256i(a), __m256i(b)));
#else
    return Words{a[1], b[1]};
#endif
}

// N vectors of words that go through the same steps side by side: each step of a chain of products waits for
// the one before, so that a chain alone leaves the multipliers idle.
template <int N>
struct Abreast {
    Words v[N];
};

template <int N>
AGORA_FN Abreast<N> operator^(Abreast<N> a, Abreast<N> b) {
    for (int i = 0; i < N; i++) a.v[i] ^= b.v[i];
    return a;
}

template <int N>
AGORA_FN Abreast<N> operator^(Abreast<N> a, uint32_t b) {
    for (Words& v : a.v) v ^= uint64_t(b);
    return a;
}

template <int N>
AGORA_FN Abreast<N> operator+(Abreast<N> a, uint32_t b) {
    for (Words& v : a.v) v += uint64_t(b);
    return a;
}

}  // namespace agora::AGORA_TARGET

namespace agora {

// Lanes hold a 32-bit word each, with rubbish above it that nobody looks at.
template <int N>
struct Wide<AGORA_TARGET::Abreast<N>> {
    using Words = AGORA_TARGET::Words;
    using Several = AGORA_TARGET::Abreast<N>;

    AGORA_FN Several product(uint32_t constant, Several x) {
        for (Words& v : x.v) v = AGORA_TARGET::multiply_low(v, Words{} + uint64_t(constant));
        return x;
    }
    AGORA_FN Several high(Several product) {
        for (Words& v : product.v) v >>= 32;
        return product;
    }
    AGORA_FN Several low(Several product) { return product; }
};

}  // namespace agora
