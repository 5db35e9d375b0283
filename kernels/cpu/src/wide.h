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

#endif
#endif

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

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
