// Rows of x as int8, for `linear_int8` (`ops.h` has the layout and the rounding). Every step is one that all instruction sets round
// alike, so they give the same bytes.
#pragma once

#include <algorithm>

#include "ops.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {

constexpr int32_t INFINITY_BITS = 0x7f800000, NAN_BITS = 0x7fc00000;

inline Ints larger_of(Ints a, Ints b) { return a > b ? a : b; }

inline int32_t largest_of(Ints v) {
    v = larger_of(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = larger_of(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
    return std::max(v[0], v[1]);
}

inline int32_t sum_of(Ints v) {
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    return v[0] + v[1];
}

// To the nearest whole number, ties to even.
inline Ints rounded(Vec v) {
#if defined(__AVX2__)
    return reinterpret_cast<Ints>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(v)));
#else
    // adding 1.5 * 2^23 rounds, and the number stands in the lowest bits
    return std::bit_cast<Ints>(v + all(12582912.0f)) - 0x4b400000;
#endif
}

constexpr int VECTORS = QUANTUM / LANES;

// The lowest bytes of all lanes.
inline void store_bytes(uint8_t* p, const Ints (&v)[VECTORS]) {
#if defined(__AVX2__)
    // packing takes from the lower halves of both, then from the upper ones
    const __m256i low = _mm256_packs_epi32(reinterpret_cast<__m256i>(v[0]), reinterpret_cast<__m256i>(v[1]));
    const __m256i high = _mm256_packs_epi32(reinterpret_cast<__m256i>(v[2]), reinterpret_cast<__m256i>(v[3]));
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
#else
    typedef int8_t Bytes __attribute__((vector_size(8)));
    for (int i = 0; i < VECTORS; i++) {
        const Bytes bytes = __builtin_convertvector(v[i], Bytes);
        std::memcpy(p + i * LANES, &bytes, sizeof bytes);
    }
#endif
}

// 32 inputs. As integers, the bits of magnitudes are ordered as those are, infinity and NaN above.
template <int UNIT>
inline void quantize_step(const float* x, bool scaled, uint8_t* out) {
    constexpr int UNITS = QUANTUM / UNIT;
    Vec values[VECTORS];
    Ints magnitudes{};
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) {
        values[i] = load(x + i * LANES);
        magnitudes = larger_of(magnitudes, std::bit_cast<Ints>(values[i]) & 0x7fffffff);
    }
    const int32_t bits = largest_of(magnitudes);
    const float largest = std::bit_cast<float>(bits);
    float scale = largest / 127.0f, inverse = 127.0f / largest;
    if (bits >= INFINITY_BITS || largest < 0x1p-100f) [[unlikely]] {
        scale = bits >= INFINITY_BITS ? std::bit_cast<float>(NAN_BITS) : 0.0f;
        inverse = 0.0f;
        for (Vec& v : values) v = all(0.0f);
    }
    Ints codes[VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) codes[i] = rounded(values[i] * all(inverse));
    std::memcpy(out, &scale, sizeof scale);
    out += sizeof scale;
#pragma GCC unroll 2
    for (int unit = 0; unit < UNITS; unit++, out += sizeof(float)) {
        Ints sum = codes[unit * VECTORS / UNITS];
#pragma GCC unroll 4
        for (int i = unit * VECTORS / UNITS + 1; i < (unit + 1) * VECTORS / UNITS; i++) sum += codes[i];
        const float whole = static_cast<float>(sum_of(sum)), given = scaled ? scale * whole : whole;
        std::memcpy(out, &given, sizeof given);
    }
    store_bytes(out, codes);
}

// `steps` times 32 inputs that stand one after the other, for this weight.
inline void quantize_steps(const Linear& w, const float* x, int64_t steps, uint8_t* out) {
    const int64_t bytes = quantized_step(w.unit());
    for (; steps > 0; steps--, x += QUANTUM, out += bytes)
        w.unit() == 16 ? quantize_step<16>(x, w.minimums, out) : quantize_step<32>(x, w.minimums, out);
}

// A row of y as its reader wants it, given make(to), which writes its floats: codes, or these where there is no reader.
template <class Make>
inline void give_row(const Linear* reader, int64_t width, int64_t row, void* y, const Make& make) {
    if (!reader) return make(static_cast<float*>(y) + row * width);
    float* floats = Pool::scratch(3, width);
    make(floats);
    quantize_steps(*reader, floats, width / QUANTUM, static_cast<uint8_t*>(y) + row * quantized_bytes(*reader));
}

}  // namespace headrace::HEADRACE_ISA
