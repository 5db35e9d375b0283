// Causal attention over paged keys and values, decode and prefill alike.
//
// A unit of work is one KV head of some tokens of one request, with all query heads that read it. It walks the KV positions in blocks
// of 32, counted from position 0, and keeps for each row (token, query head) what an online softmax needs (arXiv:2205.14135):
//
//     rows  ×  K block ─▶ scores ─▶ highest, fade ─▶ weights  ×  V block ─▶ out
//
// A row takes from a block only the positions that it sees, in their order. What it takes, and in which order, follows from its own
// position alone, so it does not matter which rows stand beside it or how the prompt was cut.
#include <algorithm>

#include "ops.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {
namespace {

constexpr int BLOCK = 32;   // KV positions between two looks at the maximum
constexpr int TOKENS = 16;  // tokens of a unit
constexpr int CHUNK = 8;    // vectors of `out` that stay in registers
constexpr float NOTHING = -1e30f;

struct Row {
    float highest, total;
};

// Dot products of q with eight consecutive keys.
inline Vec eight_scores(const float* q, const float* keys, int dim) {
    Vec acc[LANES] = {};
    for (int d = 0; d < dim; d += LANES) {
        Vec qd = load(q + d);
#pragma GCC unroll 8
        for (int j = 0; j < LANES; j++) acc[j] = fma(qd, load(keys + j * dim + d), acc[j]);
    }
    return __builtin_shufflevector(sums(acc[0], acc[1], acc[2], acc[3]), sums(acc[4], acc[5], acc[6], acc[7]), 0, 1, 2, 3, 4, 5, 6, 7);
}

// out[0 … dim) += Σ weights[j] * values[j], j from `from` to `to` in order.
inline void add_values(const float* weights, const float* const* values, int from, int to, int dim, float* out) {
    for (int base = 0; base < dim; base += CHUNK * LANES) {
        int vectors = std::min(CHUNK, (dim - base) / LANES);
        if (vectors == CHUNK) {
            Vec acc[CHUNK];
            for (int v = 0; v < CHUNK; v++) acc[v] = load(out + base + v * LANES);
            for (int j = from; j < to; j++) {
                Vec weight = all(weights[j]);
                const float* value = values[j] + base;
#pragma GCC unroll 8
                for (int v = 0; v < CHUNK; v++) acc[v] = fma(weight, load(value + v * LANES), acc[v]);
            }
            for (int v = 0; v < CHUNK; v++) store(out + base + v * LANES, acc[v]);
        } else {
            for (int v = 0; v < vectors; v++) {
                Vec acc = load(out + base + v * LANES);
                for (int j = from; j < to; j++) acc = fma(all(weights[j]), load(values[j] + base + v * LANES), acc);
                store(out + base + v * LANES, acc);
            }
        }
    }
}

// Lets one row see positions [from, to) of a block that starts at `begin`.
void see(const float* q, Row& row, float* out, const float* const* keys, const float* const* values, int from, int to, const Attention& a) {
    alignas(32) float weights[BLOCK];
    const Vec scale = all(a.scale);
    float highest = row.highest;
    for (int j = from / LANES * LANES; j < to; j += LANES) {
        Vec scores = eight_scores(q, keys[j], a.dim) * scale;
        Ints place = Ints{0, 1, 2, 3, 4, 5, 6, 7} + j;
        scores = select((place >= from) & (place < to), scores, all(NOTHING));
        highest = std::max(highest, max_lane(scores));
        store(weights + j, scores);
    }
    if (highest > row.highest) {
        float fade = exp(all(row.highest - highest))[0];
        if (row.highest == NOTHING) fade = 0.0f;
        for (int d = 0; d < a.dim; d += LANES) store(out + d, load(out + d) * all(fade));
        row.total *= fade;
        row.highest = highest;
    }
    Vec total = {};
    for (int j = from / LANES * LANES; j < to; j += LANES) {
        Vec scores = load(weights + j);
        Vec weight = select(scores == all(NOTHING), all(0.0f), exp(scores - all(highest)));
        store(weights + j, weight);
        total += weight;
    }
    row.total += sum(total);
    add_values(weights, values, from, to, a.dim, out);
}

void unit_of(const Attention& a, int request, int kv_head, int first, int last) {
    const int group = a.query_heads / a.kv_heads, dim = a.dim;
    const int32_t* table = a.pages + static_cast<int64_t>(request) * a.table_width;
    Row rows[TOKENS * 64];
    for (int i = 0; i < (last - first) * group; i++) rows[i] = {NOTHING, 0.0f};
    auto sees_from = [&](int token) { return a.window ? std::max(0, a.positions[token] - a.window + 1) : 0; };
    int begin = sees_from(first) / BLOCK * BLOCK, end = a.positions[last - 1] + 1;
    for (int token = first; token < last; token++)
        for (int g = 0; g < group; g++) {
            float* out = a.out + (static_cast<int64_t>(token) * a.query_heads + kv_head * group + g) * dim;
            std::fill(out, out + dim, 0.0f);
        }
    for (; begin < end; begin += BLOCK) {
        const float* keys[BLOCK];
        const float* values[BLOCK];
        int known = std::min(BLOCK, end - begin);
        for (int j = 0; j < known; j++) {
            int64_t page = table[(begin + j) / a.page_size], offset = (begin + j) % a.page_size;
            int64_t place = ((page * a.kv_heads + kv_head) * a.page_size + offset) * dim;
            keys[j] = a.keys + place;
            values[j] = a.values + place;
        }
        for (int token = first; token < last; token++) {
            int from = std::max(sees_from(token) - begin, 0), to = std::min(BLOCK, a.positions[token] + 1 - begin);
            if (from >= to) continue;
            for (int g = 0; g < group; g++) {
                int64_t head = static_cast<int64_t>(token) * a.query_heads + kv_head * group + g;
                see(a.q + head * dim, rows[(token - first) * group + g], a.out + head * dim, keys, values, from, to, a);
            }
        }
    }
    for (int token = first; token < last; token++)
        for (int g = 0; g < group; g++) {
            float* out = a.out + (static_cast<int64_t>(token) * a.query_heads + kv_head * group + g) * dim;
            Vec total = all(rows[(token - first) * group + g].total);
            for (int d = 0; d < dim; d += LANES) store(out + d, load(out + d) / total);
        }
}

}  // namespace

void attention(Pool& pool, const Attention& a) {
    struct Part {
        int request, first, last;
    };
    std::vector<Part> parts;
    for (int r = 0; r < a.requests; r++)
        for (int first = a.query_start[r]; first < a.query_start[r + 1]; first += TOKENS)
            parts.push_back({r, first, std::min(first + TOKENS, a.query_start[r + 1])});
    // Late tokens see most: they go first, so that no thread is left with a long unit at the end.
    pool.run(static_cast<int>(parts.size()) * a.kv_heads, [&](int unit) {
        const Part& part = parts[parts.size() - 1 - unit / a.kv_heads];
        unit_of(a, part.request, unit % a.kv_heads, part.first, part.last);
    });
}

}  // namespace headrace::HEADRACE_ISA
