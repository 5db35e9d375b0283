// Eight floats at a time, by the compiler's own vectors, so that one source serves every instruction set.
//
// Results are defined by the order of operations written here: lanes never mix except in `sum`, whose tree is fixed. `fma` is one
// rounding where the instruction set has the instruction and two elsewhere, but always the same within one instruction set.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace headrace::HEADRACE_ISA {

constexpr int LANES = 8;

typedef float Vec __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
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

// The lanes' sum, always as ((0+4)+(2+6)) + ((1+5)+(3+7)).
inline float sum(Vec v) {
    float a = v[0] + v[4], b = v[1] + v[5], c = v[2] + v[6], d = v[3] + v[7];
    return (a + c) + (b + d);
}

inline float max_lane(Vec v) {
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
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

inline Vec widen(const int8_t* p) {
    Bytes v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, Ints), Vec);
}

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
