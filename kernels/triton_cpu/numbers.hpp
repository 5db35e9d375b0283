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
    static constexpr int BIAS = (1 << (EXPONENT - 1)) - 1;
    static constexpr int TOP = (1 << EXPONENT) - 1;

    static float largest() {
        return FINITE ? std::ldexp(2.0f - std::ldexp(2.0f, -MANTISSA), TOP - BIAS) : std::ldexp(2.0f - std::ldexp(1.0f, -MANTISSA), TOP - 1 - BIAS);
    }
    static uint8_t to(float x) {
        const uint8_t sign = static_cast<uint8_t>(bits_of(x) >> 31 << 7);
        if (x != x) return sign | 0x7f;
        float a = std::fmin(std::fabs(x), largest());
        int e = 0;
        std::frexp(a, &e);
        e = e - 1 < 1 - BIAS ? 1 - BIAS : e - 1;
        // The current rounding mode is to the nearest, ties to even.
        const float steps = std::nearbyint(std::ldexp(a, MANTISSA - e));
        const int code = static_cast<int>(steps) + ((e + BIAS - 1) << MANTISSA);
        return sign | static_cast<uint8_t>(a == 0 ? 0 : code);
    }
    static float from(uint8_t b) {
        const int e = b >> MANTISSA & TOP, m = b & ((1 << MANTISSA) - 1);
        float a = e ? std::ldexp(1.0f + std::ldexp(static_cast<float>(m), -MANTISSA), e - BIAS) : std::ldexp(static_cast<float>(m), 1 - BIAS - MANTISSA);
        if (FINITE ? (b & 0x7f) == 0x7f : e == TOP) a = !FINITE && m == 0 ? INFINITY : NAN;
        return b & 0x80 ? -a : a;
    }
};
using E4M3 = Small<4, 3, true>;
using E5M2 = Small<5, 2, false>;

static inline float round_bf16(float x) { return from_bf16(to_bf16(x)); }
static inline float round_f16(float x) { return from_f16(to_f16(x)); }
static inline float round_f8e4m3(float x) { return E4M3::from(E4M3::to(x)); }
static inline float round_f8e5m2(float x) { return E5M2::from(E5M2::to(x)); }

// Kernels look at one place as elements of several types.
template <class T> using Any __attribute__((may_alias)) = T;

template <class T> static inline T get(const T* p) { return *reinterpret_cast<const Any<T>*>(p); }
static inline float get(const bf16* p) { return from_bf16(p->bits); }
static inline float get(const f16* p) { return from_f16(p->bits); }
static inline float get(const f8e4m3* p) { return E4M3::from(p->bits); }
static inline float get(const f8e5m2* p) { return E5M2::from(p->bits); }
template <class T, class V> static inline void put(T* p, V v) { *reinterpret_cast<Any<T>*>(p) = static_cast<T>(v); }
static inline void put(bf16* p, float v) { p->bits = to_bf16(v); }
static inline void put(f16* p, float v) { p->bits = to_f16(v); }
static inline void put(f8e4m3* p, float v) { p->bits = E4M3::to(v); }
static inline void put(f8e5m2* p, float v) { p->bits = E5M2::to(v); }

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

// Of integers, 0 where there is none.
template <class T> static inline T quotient(T a, T b) { return b == 0 ? T{} : b == static_cast<T>(-1) && static_cast<T>(-1) < 0 ? -a : a / b; }
template <class T> static inline T remainder(T a, T b) { return b == 0 || (b == static_cast<T>(-1) && static_cast<T>(-1) < 0) ? T{} : a % b; }

template <class T> static inline std::make_unsigned_t<T> unsigned_of(T x) { return static_cast<std::make_unsigned_t<T>>(x); }

template <class T> static inline T high_product(T a, T b) {
    if constexpr (sizeof(T) == 4) return static_cast<T>((static_cast<uint64_t>(static_cast<uint32_t>(a)) * static_cast<uint32_t>(b)) >> 32);
    else return static_cast<T>((static_cast<unsigned __int128>(static_cast<uint64_t>(a)) * static_cast<uint64_t>(b)) >> 64);
}
