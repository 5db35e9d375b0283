// q, k and v of each token: normalize q and k per head where the model does, rotate them, and put k and v into their page.
#include <algorithm>

#include "ops.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {

void normalize(const float* x, const float* weight, float eps, int64_t width, float* y);

namespace {

constexpr int WIDEST_HEAD = 1024;

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

void one_token(const float* x, const Heads& heads, const Rope& rope, const KV& kv, int64_t position, int64_t slot, float* q) {
    const int64_t dim = heads.dim;
    const float* cos = rope.cos + position * rope.half;
    const float* sin = rope.sin + position * rope.half;
    auto turn = [&](const float* from, const float* norm, float* to) {
        alignas(32) float head[WIDEST_HEAD];
        if (norm) {
            normalize(from, norm, rope.eps, dim, head);
            from = head;
        }
        (rope.interleaved ? rotate<2> : rotate<1>)(from, cos, sin, rope.half, dim, to);
    };
    for (int h = 0; h < heads.query; h++, x += dim) turn(x, rope.q_norm, q + h * dim);
    const int64_t page = slot / kv.page_size, offset = slot % kv.page_size;
    auto place = [&](int h) { return ((page * heads.kv + h) * kv.page_size + offset) * dim; };
    for (int h = 0; h < heads.kv; h++, x += dim) turn(x, rope.k_norm, kv.keys + place(h));
    for (int h = 0; h < heads.kv; h++, x += dim) std::copy(x, x + dim, kv.values + place(h));
}

}  // namespace

void rope_write_kv(Pool& pool, const float* qkv, const Heads& heads, const Rope& rope, const KV& kv, const Batch& batch, float* q) {
    constexpr int64_t EACH = 8;
    const int64_t width = static_cast<int64_t>(heads.query + 2 * heads.kv) * heads.dim, q_width = static_cast<int64_t>(heads.query) * heads.dim;
    pool.run((batch.tokens + EACH - 1) / EACH, [&](int64_t unit) {
        for (int64_t t = unit * EACH; t < std::min(batch.tokens, (unit + 1) * EACH); t++)
            one_token(qkv + t * width, heads, rope, kv, batch.positions[t], batch.slots[t], q + t * q_width);
    });
}

}  // namespace headrace::HEADRACE_ISA
