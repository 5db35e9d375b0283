// q, k and v of each token: normalize q and k per head where the model does, rotate them, and put k and v into their page.
#include <algorithm>

#include "ops.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {

void normalize(const float* x, const float* weight, float eps, int64_t width, float* y);

namespace {

// Rotates the first 2 * half values of a head; the rest passes.
void rotate(const float* x, const float* cos, const float* sin, const Rope& r, float* y) {
    for (int i = 0; i < r.half; i++) {
        int a = r.interleaved ? 2 * i : i, b = r.interleaved ? 2 * i + 1 : i + r.half;
        float first = x[a] * cos[i] - x[b] * sin[i];
        float second = x[b] * cos[i] + x[a] * sin[i];
        y[a] = first;
        y[b] = second;
    }
    for (int i = 2 * r.half; i < r.dim; i++) y[i] = x[i];
}

void one_token(const Rope& r, int token) {
    const int dim = r.dim;
    const float* x = r.qkv + static_cast<int64_t>(token) * (r.query_heads + 2 * r.kv_heads) * dim;
    const float* cos = r.cos + static_cast<int64_t>(r.positions[token]) * r.half;
    const float* sin = r.sin + static_cast<int64_t>(r.positions[token]) * r.half;
    alignas(32) float head[1024];
    auto turn = [&](const float* from, const float* norm, float* to) {
        if (norm) {
            normalize(from, norm, r.eps, dim, head);
            from = head;
        }
        rotate(from, cos, sin, r, to);
    };
    for (int h = 0; h < r.query_heads; h++, x += dim) turn(x, r.q_norm, r.q + (static_cast<int64_t>(token) * r.query_heads + h) * dim);
    int64_t page = r.slots[token] / r.page_size, offset = r.slots[token] % r.page_size;
    auto place = [&](int h) { return ((page * r.kv_heads + h) * r.page_size + offset) * dim; };
    for (int h = 0; h < r.kv_heads; h++, x += dim) turn(x, r.k_norm, r.keys + place(h));
    for (int h = 0; h < r.kv_heads; h++, x += dim) std::copy(x, x + dim, r.values + place(h));
}

}  // namespace

void rope_write_kv(Pool& pool, const Rope& r) {
    constexpr int EACH = 8;
    pool.run((r.tokens + EACH - 1) / EACH, [&](int unit) {
        for (int token = unit * EACH; token < std::min(r.tokens, (unit + 1) * EACH); token++) one_token(r, token);
    });
}

}  // namespace headrace::HEADRACE_ISA
