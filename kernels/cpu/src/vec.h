// Eight floats at a time, by the compiler's own vectors, so that one source serves every instruction set. Only the widening of bytes,
// which the compiler does badly, is spelled out for AVX2.
//
// Results are defined by the order of operations written here: lanes never mix except in `sum`, whose tree is fixed. `fma` is one
// rounding where the instruction set has the instruction and two elsewhere, but always the same within one instruction set.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace headrace::HEADRACE_ISA {

constexpr int LANES = 8;

typedef float Vec __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef int8_t Bytes __attribute__((vector_size(8)));
typedef uint8_t UBytes __attribute__((vector_size(8)));
typedef uint16_t Halves __attribute__((vector_size(16)));

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec all(float x) { return Vec{x, x, x, x, x, x, x, x}; }

inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

inline Vec select(Ints mask, Vec yes, Vec no) { return mask ? yes : no; }

inline Vec larger(Vec a, Vec b) { return select(a > b, a, b); }

inline Four fold(Vec v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7); }

// The lanes' sum, always as ((0+4)+(2+6)) + ((1+5)+(3+7)).
inline float sum(Vec v) {
    Four f = fold(v);
    return (f[0] + f[2]) + (f[1] + f[3]);
}

// `sum` of four vectors at once.
inline Four sums(Vec a, Vec b, Vec c, Vec d) {
    Four p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    Four t = __builtin_shufflevector(p, q, 0, 4, 1, 5), u = __builtin_shufflevector(p, q, 2, 6, 3, 7);
    Four v = __builtin_shufflevector(r, s, 0, 4, 1, 5), w = __builtin_shufflevector(r, s, 2, 6, 3, 7);
    Four zero = __builtin_shufflevector(t, v, 0, 1, 4, 5), one = __builtin_shufflevector(t, v, 2, 3, 6, 7);
    Four two = __builtin_shufflevector(u, w, 0, 1, 4, 5), three = __builtin_shufflevector(u, w, 2, 3, 6, 7);
    return (zero + two) + (one + three);
}

inline float max_lane(Vec v) {
    Vec w = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    w = larger(w, __builtin_shufflevector(w, w, 2, 3, 0, 1, 6, 7, 4, 5));
    return w[0] > w[1] ? w[0] : w[1];
}

// e^x to about one unit in the last place, 0 below -87: range reduction by ln 2 in two parts, then a polynomial of degree 6
// (Cephes' expf). The same instructions for every lane, so a value does not depend on its place.
inline Vec exp(Vec x) {
    x = larger(x, all(-87.3f));
    x = select(x > all(88.0f), all(88.0f), x);
    Vec n = x * all(1.44269504088896341f);
    Ints whole = __builtin_convertvector(n + select(n < all(0.0f), all(-0.5f), all(0.5f)), Ints);
    n = __builtin_convertvector(whole, Vec);
    Vec r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    Vec p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, r * r, r + all(1.0f));
    return p * std::bit_cast<Vec>((whole + 127) << 23);
}

// Weights as they are stored, widened to float.

inline Vec widen(const float* p) { return load(p); }

inline Ints ints(const int8_t* p) {
#ifdef __AVX2__
    return reinterpret_cast<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    Bytes v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, Ints);
#endif
}

inline Ints ints(const uint8_t* p) {
#ifdef __AVX2__
    return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    UBytes v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, Ints);
#endif
}

inline Vec floats(Ints v) { return __builtin_convertvector(v, Vec); }

inline Vec widen(const int8_t* p) { return floats(ints(p)); }

// bfloat16: the upper half of a float32.
struct BFloat {
    uint16_t bits;
};

inline Vec widen(const BFloat* p) {
    Halves v;
    std::memcpy(&v, p, sizeof v);
    typedef uint32_t Words __attribute__((vector_size(32)));
    return std::bit_cast<Vec>(__builtin_convertvector(v, Words) << 16);
}

// IEEE binary16, subnormals included: exponents are rebased by a multiplication, which is exact.
struct Half {
    uint16_t bits;
};

inline Vec widen(const Half* p) {
    Halves v;
    std::memcpy(&v, p, sizeof v);
    typedef uint32_t Words __attribute__((vector_size(32)));
    Words w = __builtin_convertvector(v, Words);
    Vec magnitude = std::bit_cast<Vec>((w & 0x7fff) << 13) * all(0x1p112f);
    Words special = std::bit_cast<Words>((w & 0x7c00) == 0x7c00) & 0x7f800000;
    return std::bit_cast<Vec>(std::bit_cast<Words>(magnitude) | special | (w & 0x8000) << 16);
}

}  // namespace headrace::HEADRACE_ISA
