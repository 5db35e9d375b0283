// Eight floats at a time, by the compiler's own vectors, so that one source serves every instruction set. `wide.h` has the wider
// vectors that products of matrices use.
//
// Results are defined by the order of operations written here: lanes never mix except in `sum`, whose tree is fixed, and the compiler
// may not contract a product and a sum by itself (-ffp-contract=off). `fma` is one rounding where the instruction set has the
// instruction and two elsewhere, so AVX2 and AVX-512 give the same bits, and a machine without either gives its own.
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

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec all(float x) { return Vec{x, x, x, x, x, x, x, x}; }

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FMA__)
    return reinterpret_cast<Vec>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__FP_FAST_FMAF)
    Vec v;
    for (int i = 0; i < LANES; i++) v[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return v;
#else
    return a * b + c;
#endif
}

// IEEE binary16.
struct Half {
    uint16_t bits;
};

inline Vec widen(const float* p) { return load(p); }

#if defined(__AVX2__)

inline Vec widen(const int8_t* p) {
    return reinterpret_cast<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
}

inline Vec widen(const Half* p) { return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }

inline Half narrow(float x) { return {static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), 0)))}; }

#else

inline Vec widen(const int8_t* p) {
    typedef int8_t Bytes __attribute__((vector_size(8)));
    Bytes v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, Ints), Vec);
}

// Exponents are rebased by a multiplication, which is exact, subnormals included.
inline Vec widen(const Half* p) {
    typedef uint32_t Bits __attribute__((vector_size(32)));
    Bits w;
    for (int i = 0; i < LANES; i++) w[i] = p[i].bits;
    Vec magnitude = std::bit_cast<Vec>((w & 0x7fff) << 13) * all(0x1p112f);
    Bits special = std::bit_cast<Bits>((w & 0x7c00) == 0x7c00) & 0x7f800000;
    return std::bit_cast<Vec>(std::bit_cast<Bits>(magnitude) | special | (w & 0x8000) << 16);
}

// To the nearest, ties to even: adding a power of two pushes the bits that binary16 lacks out of the sum.
inline Half narrow(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x38800000)  // a subnormal of binary16: a multiple of 2^-24
        return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000))};
    return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

#endif

inline void put(float* p, float x) { *p = x; }

inline void put(Half* p, float x) { *p = narrow(x); }

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

// What code that is written for vectors of either width calls: these are eight lanes; `wide.h` has the widest.
struct Eight {
    using Floats = Vec;
    using Ints = HEADRACE_ISA::Ints;
    static constexpr int WIDTH = LANES;

    static Floats all(float x) { return HEADRACE_ISA::all(x); }
    static Floats fma(Floats a, Floats b, Floats c) { return HEADRACE_ISA::fma(a, b, c); }
    static Floats load(const float* p) { return HEADRACE_ISA::load(p); }
    static void store(float* p, Floats v) { HEADRACE_ISA::store(p, v); }
    template <class T>
    static Floats widen(const T* p) {
        return HEADRACE_ISA::widen(p);
    }
};

// e^x within 2 units in the last place: range reduction by ln 2 in two parts, then a polynomial of degree 6 (Cephes' expf). Below -87 it
// is e^-87, above 88 e^88; NaN stays NaN. The same instructions for every lane, so a value does not depend on its place. Several vectors
// go through each step together, so that a constant comes to a register once for all of them.
template <class L, int N>
inline void exps(typename L::Floats (&x)[N]) {
    using Floats = typename L::Floats;
    Floats shifted[N], p[N];
    auto each = [](const auto& step) {
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) step(i);
    };
    auto times_r = [&](float constant) { each([&](int i) { p[i] = L::fma(p[i], x[i], L::all(constant)); }); };
    // so written, a comparison and a choice are one instruction
    each([&](int i) { x[i] = L::all(-87.0f) > x[i] ? L::all(-87.0f) : x[i]; });
    each([&](int i) { x[i] = L::all(88.0f) < x[i] ? L::all(88.0f) : x[i]; });
    // adding and subtracting 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits of the sum
    each([&](int i) { shifted[i] = L::fma(x[i], L::all(1.44269504088896341f), L::all(12582912.0f)); });
    each([&](int i) { p[i] = shifted[i] - L::all(12582912.0f); });
    each([&](int i) { x[i] = L::fma(p[i], L::all(-0.693359375f), x[i]); });
    each([&](int i) { x[i] = L::fma(p[i], L::all(2.12194440e-4f), x[i]); });
    each([&](int i) { p[i] = L::all(1.9875691500e-4f); });
    times_r(1.3981999507e-3f);
    times_r(8.3334519073e-3f);
    times_r(4.1665795894e-2f);
    times_r(1.6666665459e-1f);
    times_r(5.0000001201e-1f);
    each([&](int i) { p[i] = L::fma(p[i], x[i] * x[i], x[i] + L::all(1.0f)); });
    each([&](int i) { x[i] = p[i] * std::bit_cast<Floats>((std::bit_cast<typename L::Ints>(shifted[i]) << 23) + (127 << 23)); });
}

inline Vec exp(Vec x) {
    Vec one[1] = {x};
    exps<Eight>(one);
    return one[0];
}

}  // namespace headrace::HEADRACE_ISA
