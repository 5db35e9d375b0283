// The widest vectors of the instruction set, for products with packed weights: sixteen lanes with AVX-512, eight otherwise. Here a
// lane is always one output, so the width changes no result.
//
// Weights as they are stored become floats here: bytes, nibbles, bfloat16 (the upper half of a float32) and IEEE binary16.
#pragma once

#include "vec.h"

namespace headrace::HEADRACE_ISA::wide {

struct BFloat {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

#if defined(__AVX512F__)

constexpr int WIDTH = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

inline Floats all(float x) { return reinterpret_cast<Floats>(_mm512_set1_ps(x)); }

inline Floats fma(Floats a, Floats b, Floats c) {
    return reinterpret_cast<Floats>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
}

inline Ints ints(const int8_t* p) {
    return reinterpret_cast<Ints>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline Ints ints(const uint8_t* p) {
    return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline Floats floats(Ints v) { return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(v))); }

inline Floats widen(const BFloat* p) {
    Ints v = reinterpret_cast<Ints>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    return std::bit_cast<Floats>(v << 16);
}

inline Floats widen(const Half* p) {
    return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}

#else

constexpr int WIDTH = LANES;
using Floats = Vec;
using Ints = HEADRACE_ISA::Ints;
using HEADRACE_ISA::all;
using HEADRACE_ISA::fma;

#if defined(__AVX2__)

inline Ints ints(const int8_t* p) {
    return reinterpret_cast<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline Ints ints(const uint8_t* p) {
    return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline Floats floats(Ints v) { return reinterpret_cast<Floats>(_mm256_cvtepi32_ps(reinterpret_cast<__m256i>(v))); }

inline Floats widen(const BFloat* p) {
    Ints v = reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    return std::bit_cast<Floats>(v << 16);
}

inline Floats widen(const Half* p) {
    return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

#else

typedef int8_t Bytes __attribute__((vector_size(8)));
typedef uint8_t UnsignedBytes __attribute__((vector_size(8)));
typedef uint16_t Words __attribute__((vector_size(16)));
typedef uint32_t DoubleWords __attribute__((vector_size(32)));

template <class From, class To, class T>
inline To converted(const T* p) {
    From v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, To);
}

inline Ints ints(const int8_t* p) { return converted<Bytes, Ints>(p); }

inline Ints ints(const uint8_t* p) { return converted<UnsignedBytes, Ints>(p); }

inline Floats floats(Ints v) { return __builtin_convertvector(v, Floats); }

inline Floats widen(const BFloat* p) { return std::bit_cast<Floats>(converted<Words, DoubleWords>(p) << 16); }

// Exponents are rebased by a multiplication, which is exact, subnormals included.
inline Floats widen(const Half* p) {
    DoubleWords w = converted<Words, DoubleWords>(p);
    Floats magnitude = std::bit_cast<Floats>((w & 0x7fff) << 13) * all(0x1p112f);
    DoubleWords special = std::bit_cast<DoubleWords>((w & 0x7c00) == 0x7c00) & 0x7f800000;
    return std::bit_cast<Floats>(std::bit_cast<DoubleWords>(magnitude) | special | (w & 0x8000) << 16);
}

#endif
#endif

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline Floats widen(const float* p) { return load(p); }

}  // namespace headrace::HEADRACE_ISA::wide
