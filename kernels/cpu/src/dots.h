// Products of codes with int8 inputs: exact integers, whatever the instructions. A lane of 32 bits is an output, and its four bytes are
// inputs, in weights as in x.
//
//   VNNI       u8 * s8 to int32 at once; signed codes become unsigned by adding BIAS, which the caller takes off again
//   AVX2,      u8 * s8 in pairs to int16, where sums of 16 products of 4-bit codes fit (16 * 15 * 127 < 2^15), and 4 of 6-bit ones;
//   AVX-512    of 8-bit ones 2, as magnitudes, their signs being given to x (2 * 128 * 127 < 2^15)
//   otherwise  bytes shifted down in turn
#pragma once

#include "blocks.h"

namespace headrace::HEADRACE_ISA {

// What `add_unit` adds to every code of form F.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define HEADRACE_VNNI
template <Form F, bool minimums>
constexpr int BIAS = F == Form::int8 && !minimums ? 128 : 0;
#else
template <Form F, bool minimums>
constexpr int BIAS = 0;
#endif

namespace dots {

using wide::Ints;

inline Ints to_all(const uint8_t* p) {
    int32_t v;
    std::memcpy(&v, p, sizeof v);
    return Ints{} + v;
}

// Sums are added up in the order written: a compiler that makes trees of them has no registers for so many leaves.
inline Ints kept(Ints v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX2__)
    asm("" : "+x"(v));
#endif
    return v;
}

#if defined(__AVX512F__)

using Register = __m512i;

inline Ints multiply(Ints codes, Ints x) { return (Ints)_mm512_maddubs_epi16((Register)codes, (Register)x); }
inline Ints add(Ints a, Ints b) { return (Ints)_mm512_add_epi16((Register)a, (Register)b); }
inline Ints add_pairs(Ints a) { return (Ints)_mm512_madd_epi16((Register)a, _mm512_set1_epi16(1)); }
inline Ints magnitude(Ints a) { return (Ints)_mm512_abs_epi8((Register)a); }
inline Ints with_sign(Ints x, Ints codes) {
    return (Ints)_mm512_mask_sub_epi8((Register)x, _mm512_movepi8_mask((Register)codes), _mm512_setzero_si512(), (Register)x);
}

#elif defined(__AVX2__)

using Register = __m256i;

inline Ints multiply(Ints codes, Ints x) { return (Ints)_mm256_maddubs_epi16((Register)codes, (Register)x); }
inline Ints add(Ints a, Ints b) { return (Ints)_mm256_add_epi16((Register)a, (Register)b); }
inline Ints add_pairs(Ints a) { return (Ints)_mm256_madd_epi16((Register)a, _mm256_set1_epi16(1)); }
inline Ints magnitude(Ints a) { return (Ints)_mm256_abs_epi8((Register)a); }
inline Ints with_sign(Ints x, Ints codes) { return (Ints)_mm256_sign_epi8((Register)x, (Register)codes); }

#endif

#if defined(HEADRACE_VNNI) || !defined(__AVX2__)
#define HEADRACE_DOT

template <Form F, bool minimums>
inline Ints dot(Ints sum, Ints codes, Ints x) {
#if defined(HEADRACE_VNNI)
    if constexpr (BIAS<F, minimums> != 0) codes ^= static_cast<int32_t>(0x80808080);
    if constexpr (F == Form::int8 && minimums) {
        x = with_sign(x, codes);
        codes = magnitude(codes);
    }
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((Register)sum, (Register)codes, (Register)x);
#else
    return (Ints)_mm256_dpbusd_avx_epi32((Register)sum, (Register)codes, (Register)x);
#endif
#else
#pragma GCC unroll 4
    for (int up = 24; up >= 0; up -= 8) {
        const Ints code = F == Form::int8 ? (codes << up) >> 24 : (codes >> (24 - up)) & 255;
        sum += code * ((x << up) >> 24);
    }
    return sum;
#endif
}

#endif

// The codes of 4 inputs of VECTORS * WIDTH outputs, a byte each.
template <bool packed, int VECTORS>
inline void load(const uint8_t* p, Ints (&codes)[VECTORS]) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) codes[v] = packed ? wide::nibbles(p, v) & 0x0f0f0f0f : wide::ints(p + v * 4 * wide::WIDTH);
}

}  // namespace dots

// sums[row][vector] of codes times x over 4 * FOURS inputs; x are int8 in N rows that stand `stride` bytes apart. Codes are nibbles
// where `packed`, or else bytes.
template <Form F, bool minimums, bool packed, int FOURS, int N, int VECTORS>
inline void sum_unit(const uint8_t* codes, const uint8_t* x, int64_t stride, wide::Ints (&sums)[N][VECTORS]) {
    using dots::Ints;
    constexpr int NEXT = VECTORS * wide::WIDTH * (packed ? 2 : 4);
#if defined(HEADRACE_DOT)
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[r][v] = Ints{};
#pragma GCC unroll 1
    for (int i = 0; i < FOURS; i++) {
        Ints w[VECTORS];
        dots::load<packed>(codes + i * NEXT, w);
#pragma GCC unroll 8
        for (int r = 0; r < N; r++) {
            const Ints four = dots::to_all(x + r * stride + 4 * i);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[r][v] = dots::dot<F, minimums>(sums[r][v], w[v], four);
        }
    }
#else
    if constexpr (F == Form::int4) {
#pragma GCC unroll 8
        for (int i = 0; i < FOURS; i++) {
            Ints w[VECTORS];
            dots::load<packed>(codes + i * NEXT, w);
#pragma GCC unroll 8
            for (int r = 0; r < N; r++) {
                const Ints four = dots::to_all(x + r * stride + 4 * i);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    const Ints product = dots::multiply(w[v], four);
                    sums[r][v] = i ? dots::kept(dots::add(sums[r][v], product)) : product;
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < N; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[r][v] = dots::add_pairs(sums[r][v]);
    } else if constexpr (F == Form::int6) {
#pragma GCC unroll 4
        for (int i = 0; i < FOURS; i += 2) {
            Ints w[VECTORS], next[VECTORS];
            dots::load<packed>(codes + i * NEXT, w);
            dots::load<packed>(codes + (i + 1) * NEXT, next);
#pragma GCC unroll 8
            for (int r = 0; r < N; r++) {
                const Ints four = dots::to_all(x + r * stride + 4 * i), after = dots::to_all(x + r * stride + 4 * i + 4);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    const Ints product = dots::add_pairs(dots::add(dots::multiply(w[v], four), dots::multiply(next[v], after)));
                    sums[r][v] = i ? dots::kept(sums[r][v] + product) : product;
                }
            }
        }
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < FOURS; i++) {
            Ints w[VECTORS], magnitudes[VECTORS];
            dots::load<packed>(codes + i * NEXT, w);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) magnitudes[v] = dots::magnitude(w[v]);
#pragma GCC unroll 8
            for (int r = 0; r < N; r++) {
                const Ints four = dots::to_all(x + r * stride + 4 * i);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    const Ints product = dots::add_pairs(dots::multiply(magnitudes[v], dots::with_sign(four, w[v])));
                    sums[r][v] = i ? dots::kept(sums[r][v] + product) : product;
                }
            }
        }
    }
#endif
}

}  // namespace headrace::HEADRACE_ISA
