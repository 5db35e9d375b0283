// Number formats: floats of 16 and 8 bits as a GPU rounds them, exponentials, integers where C++ leaves something undefined.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Floats of 16 and 8 bits as they lie in memory. In a kernel they are float, rounded after every operation.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct f8e4m3 { uint8_t bits; };
struct f8e5m2 { uint8_t bits; };

static inline uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
static inline float float_of(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

static inline uint16_t to_bf16(float x) {
    const uint32_t u = bits_of(x);
    return x != x ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline float from_bf16(uint16_t b) { return float_of(static_cast<uint32_t>(b) << 16); }
static inline uint16_t to_f16(float x) { const _Float16 h = static_cast<_Float16>(x); uint16_t b; std::memcpy(&b, &h, 2); return b; }
static inline float from_f16(uint16_t b) { _Float16 h; std::memcpy(&h, &b, 2); return static_cast<float>(h); }

// Of EXPONENT and MANTISSA bits; FINITE has no infinity and one NaN. Beyond the largest number it is that number (saturation).
template <int EXPONENT, int MANTISSA, bool FINITE>
struct Small {
    static constexpr int BIAS = (1 << (EXPONENT - 1)) - 1, SHIFT = 23 - MANTISSA;
    static constexpr uint32_t INFINITE = ((1u << EXPONENT) - 1) << MANTISSA, LARGEST = FINITE ? INFINITE + (1u << MANTISSA) - 2 : INFINITE - 1;

    static float power(int exponent) { return float_of(static_cast<uint32_t>(127 + exponent) << 23); }
    // The bits of a number of the type itself.
    static uint8_t pattern(float x) {
        const uint32_t sign = bits_of(x) >> 24 & 0x80;
        if (x != x) return sign | (FINITE ? 0x7f : INFINITE | (bits_of(x) >> SHIFT & ((1 << MANTISSA) - 1)));
        return x - x != 0 ? sign | INFINITE : to(x);
    }
    static uint8_t to(float x) {
        const uint32_t sign = bits_of(x) >> 24 & 0x80;
        const float most = from(LARGEST), magnitude = std::fabs(x), a = magnitude < most ? magnitude : most;
        // Adding half of the last place (less one bit, when that is even) and cutting is rounding to the nearest, ties to even; below the
        // normal numbers the addition of a float whose last place is the type's does it.
        const uint32_t u = bits_of(a), normal = ((u + (1u << (SHIFT - 1)) - 1 + (u >> SHIFT & 1)) >> SHIFT) - ((127 - BIAS) << MANTISSA);
        const float last = power(1 - BIAS - MANTISSA + 23);
        const uint32_t small = bits_of(a + last) - bits_of(last), code = a < power(1 - BIAS) ? small : normal;
        return static_cast<uint8_t>(sign | (x != x ? 0x7f : code));
    }
    static float from(uint8_t b) {
        const uint32_t sign = (b & 0x80u) << 24, rest = b & 0x7fu;
        // A float of the same mantissa and a small exponent, times the power of two between the biases: exact, subnormals too.
        const uint32_t a = bits_of(float_of(rest << SHIFT) * power(127 - BIAS));
        const uint32_t special = FINITE ? 0x7fc00000u : 0x7f800000u | (rest & ((1 << MANTISSA) - 1)) << SHIFT;
        return float_of(sign | (rest > LARGEST ? special : a));
    }
};
using E4M3 = Small<4, 3, true>;
using E5M2 = Small<5, 2, false>;

static inline float from_f8e4m3(uint8_t b) { return E4M3::from(b); }
static inline float from_f8e5m2(uint8_t b) { return E5M2::from(b); }
static inline uint16_t pattern_bf16(float x) { return static_cast<uint16_t>(bits_of(x) >> 16); }
static inline uint16_t pattern_f16(float x) { return to_f16(x); }
static inline uint8_t pattern_f8e4m3(float x) { return E4M3::pattern(x); }
static inline uint8_t pattern_f8e5m2(float x) { return E5M2::pattern(x); }

static inline float round_bf16(float x) { return from_bf16(to_bf16(x)); }
static inline float round_f16(float x) { return from_f16(to_f16(x)); }
static inline float round_f8e4m3(float x) { return E4M3::from(E4M3::to(x)); }
static inline float round_f8e5m2(float x) { return E5M2::from(E5M2::to(x)); }
template <class T, class V> static inline V rounded(V v) {
    if constexpr (std::is_same_v<T, bf16>) return round_bf16(v);
    else if constexpr (std::is_same_v<T, f16>) return round_f16(v);
    else return v;
}

// Kernels look at one place as elements of several types.
template <class T> using Any __attribute__((may_alias)) = T;

template <class T> static inline T get(const T* p) { return *reinterpret_cast<const Any<T>*>(p); }
static inline float get(const bf16* p) { return from_bf16(p->bits); }
static inline float get(const f16* p) { return from_f16(p->bits); }
static inline float get(const f8e4m3* p) { return E4M3::from(p->bits); }
static inline float get(const f8e5m2* p) { return E5M2::from(p->bits); }
// What is put is a number of the type already.
template <class T, class V> static inline void put(T* p, V v) { *reinterpret_cast<Any<T>*>(p) = static_cast<T>(v); }
static inline void put(bf16* p, float v) { p->bits = pattern_bf16(v); }
static inline void put(f16* p, float v) { p->bits = pattern_f16(v); }
static inline void put(f8e4m3* p, float v) { p->bits = pattern_f8e4m3(v); }
static inline void put(f8e5m2* p, float v) { p->bits = pattern_f8e5m2(v); }

// 2^x within 2 units in the last place, by the same instructions for every lane (the polynomial is that of e^y, Cephes' expf).
static inline float exp2_of(float x) {
    const float clamped = x < -126.0f ? -126.0f : x > 128.0f ? 128.0f : x;
    const float whole = __builtin_nearbyintf(clamped), y = (clamped - whole) * 0.693147180559945f;
    float p = 1.9875691500e-4f;
    p = p * y + 1.3981999507e-3f;
    p = p * y + 8.3334519073e-3f;
    p = p * y + 4.1665795894e-2f;
    p = p * y + 1.6666665459e-1f;
    p = p * y + 5.0000001201e-1f;
    p = p * y * y + y + 1.0f;
    const float half = float_of(static_cast<uint32_t>(static_cast<int>(whole) - 1 + 127) << 23);
    return x < -126.0f ? 0.0f : x != x ? x : p * half * 2.0f;
}
static inline float exp_of(float x) { return exp2_of(x * 1.44269504088896341f); }
static inline double exp2_of(double x) { return std::exp2(x); }
static inline double exp_of(double x) { return std::exp(x); }

// A float from which rounding to fewer bits gives what rounding the double itself would: its last bit is odd where it is not exact.
static inline float odd_float(double x) {
    const float f = static_cast<float>(x);
    if (!(f - f == 0) || f == x) return f;
    return float_of((bits_of(f) - (std::fabs(static_cast<double>(f)) > std::fabs(x))) | 1);
}

// Toward zero; what lies beyond the integers is the last of them, and NaN is 0, as PTX's cvt has it.
template <class To, class From> static inline To truncated(From x) {
    if constexpr (std::is_same_v<To, bool>) return x != 0;
    else {
        constexpr To most = static_cast<To>(std::is_signed_v<To> ? ~(static_cast<std::make_unsigned_t<To>>(1) << (sizeof(To) * 8 - 1)) : ~To{});
        constexpr To least = std::is_signed_v<To> ? -most - 1 : 0;
        return x != x ? To{} : x >= static_cast<From>(most) ? most : x <= static_cast<From>(least) ? least : static_cast<To>(x);
    }
}

template <class T> static inline T clamped(T x, T low, T high) { return std::fmin(std::fmax(x, low), high); }
template <class T> static inline T clamped_or_nan(T x, T low, T high) { return x != x ? x : clamped(x, low, high); }

// Shifts by the width and more shift everything out.
template <class T> static inline T shifted_left(T a, T b) {
    return static_cast<std::make_unsigned_t<T>>(b) < sizeof(T) * 8 ? static_cast<T>(a << b) : T{};
}
template <class T> static inline T shifted_right(T a, T b) {
    return static_cast<std::make_unsigned_t<T>>(b) < sizeof(T) * 8 ? static_cast<T>(a >> b) : a < 0 ? static_cast<T>(-1) : T{};
}

// Of integers, 0 where there is none.
template <class T> static inline T quotient(T a, T b) { return b == 0 ? T{} : b == static_cast<T>(-1) && static_cast<T>(-1) < 0 ? -a : a / b; }
template <class T> static inline T remainder(T a, T b) { return b == 0 || (b == static_cast<T>(-1) && static_cast<T>(-1) < 0) ? T{} : a % b; }

template <class T> static inline std::make_unsigned_t<T> unsigned_of(T x) { return static_cast<std::make_unsigned_t<T>>(x); }

template <class T> static inline T high_product(T a, T b) {
    if constexpr (sizeof(T) == 4) return static_cast<T>((static_cast<uint64_t>(static_cast<uint32_t>(a)) * static_cast<uint32_t>(b)) >> 32);
    else return static_cast<T>((static_cast<unsigned __int128>(static_cast<uint64_t>(a)) * static_cast<uint64_t>(b)) >> 64);
}
