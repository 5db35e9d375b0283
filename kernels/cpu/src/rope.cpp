// q, k and v of each token: normalize q and k per head where the model does, rotate them, and put k and v into their page.
#include <algorithm>
#include <limits>

#include "ops.h"
#include "pages.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {

void normalize(const float* x, const float* weight, float eps, int64_t width, float* y);

namespace {

// Rotates the first 2 * half values of a head; the rest passes. STRIDE 2: pairs are neighbours; 1: half a head apart.
template <int STRIDE>
void rotate(const float* x, const float* cos, const float* sin, int64_t half, int64_t dim, float* y) {
    const int64_t other = STRIDE == 2 ? 1 : half;
    for (int64_t i = 0; i < half; i++) {
        float first = x[STRIDE * i], second = x[STRIDE * i + other];
        y[STRIDE * i] = first * cos[i] - second * sin[i];
        y[STRIDE * i + other] = second * cos[i] + first * sin[i];
    }
    std::copy(x + 2 * half, x + dim, y + 2 * half);
}

// Where a head is put together before it goes to its page.
struct Scratch {
    float *turned, *normed;
};

// `dim` values to places `apart` from each other.
template <class T>
void put_all(const float* x, int64_t dim, T* to, int64_t apart, float*) {
    for (int64_t d = 0; d < dim; d++) put(to + d * apart, x[d]);
}

// As whole numbers of at most 127, to be multiplied with `scale`: the largest magnitude / 127, or NaN where there is NaN or infinity.
void put_all(const float* x, int64_t dim, int8_t* to, int64_t apart, float* scale) {
    float largest = 0.0f;
    bool finite = true;
    for (int64_t d = 0; d < dim; d++) {
        largest = std::max(largest, std::fabs(x[d]));
        finite &= std::fabs(x[d]) <= std::numeric_limits<float>::max();
    }
    *scale = finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
    const float inverse = finite && largest >= 0x1p-100f ? 127.0f / largest : 0.0f;
    // adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits
    for (int64_t d = 0; d < dim; d++)
        to[d * apart] = static_cast<int8_t>(std::bit_cast<int32_t>((finite ? x[d] : 0.0f) * inverse + 12582912.0f) - 0x4b400000);
}

template <class T>
void one_token(const float* x, const Heads& heads, const Rope& rope, const KV& kv, int64_t position, int64_t slot, Scratch scratch, float* q) {
    const int64_t dim = heads.dim, page = slot / kv.page_size, offset = slot % kv.page_size;
    const float* cos = rope.cos + position * rope.half;
    const float* sin = rope.sin + position * rope.half;
    auto turn = [&](const float* from, const float* norm, float* to) {
        if (norm) {
            normalize(from, norm, rope.eps, dim, scratch.normed);
            from = scratch.normed;
        }
        (rope.interleaved ? rotate<2> : rotate<1>)(from, cos, sin, rope.half, dim, to);
    };
    for (int h = 0; h < heads.query; h++, x += dim) turn(x, rope.q_norm, q + h * dim);
    for (int h = 0; h < heads.kv; h++, x += dim) {
        turn(x, rope.k_norm, scratch.turned);
        const Pages<T> pages(kv, heads, h);
        put_all(scratch.turned, dim, pages.keys(page) + offset, kv.page_size, pages.key_scales(page) + offset);
    }
    for (int h = 0; h < heads.kv; h++, x += dim) {
        const Pages<T> pages(kv, heads, h);
        put_all(x, dim, pages.value(page, offset), 1, pages.value_scales(page) + offset);
    }
}

}  // namespace

void rope_write_kv(Pool& pool, const float* qkv, const Heads& heads, const Rope& rope, const KV& kv, const Batch& batch, float* q) {
    constexpr int64_t EACH = 8;
    const int64_t width = static_cast<int64_t>(heads.query + 2 * heads.kv) * heads.dim, q_width = static_cast<int64_t>(heads.query) * heads.dim;
    pool.run((batch.tokens + EACH - 1) / EACH, [&](int64_t unit) {
        float* room = Pool::scratch(2, 2 * heads.dim);
        const Scratch scratch{room, room + heads.dim};
        with_type(kv, [&]<class T>() {
            for (int64_t t = unit * EACH; t < std::min(batch.tokens, (unit + 1) * EACH); t++)
                one_token<T>(qkv + t * width, heads, rope, kv, batch.positions[t], batch.slots[t], scratch, q + t * q_width);
        });
    });
}

}  // namespace headrace::HEADRACE_ISA
