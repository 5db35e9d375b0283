// The widest vectors of the instruction set, for products with packed weights: sixteen lanes with AVX-512, eight otherwise. Here a
// lane is always one output, so the width changes no result.
//
// Weights as they are stored become floats here: bfloat16 (the upper half of a float32), IEEE binary16, bytes and nibbles.
#pragma once

#include "vec.h"

namespace headrace::HEADRACE_ISA::wide {

struct BFloat {
    uint16_t bits;
};

using HEADRACE_ISA::Half;

// A number of float8 (e4m3, no NaN). Its exponent and fraction stand in binary16 as they are, where they mean 2^-8 of it: that is what
// `widen` gives, exactly, and FLOAT8 times that is the number.
struct Float8 {
    uint8_t bits;
};

constexpr float FLOAT8 = 256.0f;

#if defined(__AVX512F__)

constexpr int WIDTH = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

inline Floats all(float x) { return reinterpret_cast<Floats>(_mm512_set1_ps(x)); }

inline Floats fma(Floats a, Floats b, Floats c) {
    return reinterpret_cast<Floats>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
}

inline Floats load(const float* p) { return reinterpret_cast<Floats>(_mm512_loadu_ps(p)); }

inline Floats widen(const float* p) { return load(p); }

inline Floats floats(Ints v) { return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(v))); }

inline Floats widen(const int8_t* p) {
    return floats(reinterpret_cast<Ints>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
}

inline Floats widen(const BFloat* p) {
    Ints v = reinterpret_cast<Ints>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    return std::bit_cast<Floats>(v << 16);
}

inline Floats widen(const Half* p) {
    return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}

inline Floats widen(const Float8* p) {
    const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 7);
    return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16(static_cast<int16_t>(0xbfff)))));
}

#else

constexpr int WIDTH = LANES;
using Floats = Vec;
using Ints = HEADRACE_ISA::Ints;
using HEADRACE_ISA::all;
using HEADRACE_ISA::fma;
using HEADRACE_ISA::load;
using HEADRACE_ISA::widen;

#if defined(__AVX2__)

inline Floats floats(Ints v) { return reinterpret_cast<Floats>(_mm256_cvtepi32_ps(reinterpret_cast<__m256i>(v))); }

inline Floats widen(const BFloat* p) {
    Ints v = reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    return std::bit_cast<Floats>(v << 16);
}

// The sign comes twice, at its own place and above the exponent's, where it is masked away.
inline Floats widen(const Float8* p) {
    const __m128i words = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 7);
    return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_and_si128(words, _mm_set1_epi16(static_cast<int16_t>(0xbfff)))));
}

#else

typedef uint16_t Words __attribute__((vector_size(16)));
typedef uint32_t DoubleWords __attribute__((vector_size(32)));

template <class From, class To, class T>
inline To converted(const T* p) {
    From v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, To);
}

inline Floats floats(Ints v) { return __builtin_convertvector(v, Floats); }

inline Floats widen(const BFloat* p) { return std::bit_cast<Floats>(converted<Words, DoubleWords>(p) << 16); }

// No subnormal float on the way, as these may count as 0.
inline Floats widen(const Float8* p) {
    Floats v;
    for (int i = 0; i < WIDTH; i++) {
        const uint32_t magnitude = p[i].bits & 127, normal = (magnitude << 20) + ((127 - 15) << 23);
        const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-17f : std::bit_cast<float>(normal);
        v[i] = p[i].bits & 128 ? -value : value;
    }
    return v;
}

#endif
#endif

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline void store(uint8_t* p, Ints v) { std::memcpy(p, &v, sizeof v); }

inline Ints ints(const void* p) {
    Ints v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

#if defined(__AVX512F__)
struct Widest {
    using Floats = wide::Floats;
    using Ints = wide::Ints;
    static constexpr int WIDTH = wide::WIDTH;

    static Floats all(float x) { return wide::all(x); }
    static Floats fma(Floats a, Floats b, Floats c) { return wide::fma(a, b, c); }
    static Floats load(const float* p) { return wide::load(p); }
    static void store(float* p, Floats v) { wide::store(p, v); }
    template <class T>
    static Floats widen(const T* p) {
        return wide::widen(p);
    }
};
#else
using Widest = Eight;
#endif

// Bytes whose nibbles are the codes of a panel's halves: the low nibbles of all lanes that `part` says.
inline Ints nibbles(const uint8_t* p, [[maybe_unused]] int part) {
#if defined(__AVX512F__)
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return reinterpret_cast<Ints>(_mm512_inserti64x4(_mm512_castsi256_si512(v), _mm256_srli_epi32(v, 4), 1));
#else
    return part ? ints(p) >> 4 : ints(p);
#endif
}

// One rounding on every instruction set, at the price of a call for each lane where the machine has no such instruction.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
    return fma(a, b, c);
#else
    Floats v;
    for (int i = 0; i < WIDTH; i++) v[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return v;
#endif
}

}  // namespace headrace::HEADRACE_ISA::wide
