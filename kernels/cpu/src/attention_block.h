// What attention does with a block of keys and values: scores of some rows, their softmax, and the sums of values by its weights.
//
//     rows  ×  K block ─▶ scores ─▶ highest, fade ─▶ weights  ×  V block ─▶ out
#pragma once

#include <algorithm>

#include "attention_tiles.h"
#include "pages.h"
#include "wide.h"

namespace headrace::HEADRACE_ISA {

// Scores and outputs are summed up a lane each, as wide as the machine has vectors, and eight at a time where that does not go up.
using wide::Widest;

constexpr int TALL = 6;  // rows whose sums for SIDE vectors stay in registers together
constexpr int SIDE = wide::WIDTH > LANES ? 4 : 2;
constexpr int GROUPS = BLOCK / LANES;  // vectors of positions a block
constexpr float NOTHING = -1e30f;      // the highest score of a row that has seen no position yet

template <class T>
struct Block {
    int64_t begin, known;
    int64_t stride;          // from a key's value to the next of its D
    const T* keys[GROUPS];   // of eight positions each, [D][stride]
    const T* values[BLOCK];  // [width]
    float key_scales[BLOCK], value_scales[BLOCK];

    // Finds keys and values of the known positions. Groups behind them stand where the last does.
    void place(const Pages<T>& pages, const int32_t* table) {
        const int64_t page_size = pages.page_size;
        int64_t page = begin / page_size, offset = begin % page_size;
        stride = page_size;
        for (int64_t j = 0; j < known; j++) {
            if (j % LANES == 0) keys[j / LANES] = pages.keys(table[page]) + offset;
            take_value(pages, j, table[page], offset);
            if (++offset == page_size) page++, offset = 0;
        }
        for (int64_t g = (known + LANES - 1) / LANES; g < GROUPS; g++) keys[g] = keys[g - 1];
    }

    // The same for a token of a tree, `room` [D][BLOCK] taking the keys in order.
    void place_path(const Problem& p, const Pages<T>& pages, const int32_t* table, const Tile& tile, T* room) {
        const int64_t page_size = pages.page_size, first = p.first_row(tile.request), base = p.base(tile.request);
        int64_t places[BLOCK];
        for (int64_t j = 0; j < known; j++) places[j] = begin + j;
        int64_t position = p.batch.positions[tile.from];
        for (int64_t row = tile.from - first; row >= 0 && position >= begin; row = p.batch.parents[first + row], position--)
            if (position < begin + known) places[position - begin] = base + row;
        stride = BLOCK;
        for (int64_t j = 0; j < known; j++) {
            const int64_t page = table[places[j] / page_size], offset = places[j] % page_size;
            const T* key = pages.keys(page) + offset;
            for (int64_t d = 0; d < p.heads.dim; d++) room[d * BLOCK + j] = key[d * page_size];
            take_value(pages, j, page, offset);
        }
        for (int64_t g = 0; g < GROUPS; g++) keys[g] = room + g * LANES;
    }

  private:
    void take_value(const Pages<T>& pages, int64_t j, int64_t page, int64_t offset) {
        values[j] = pages.value(page, offset);
        if constexpr (SCALED<T>) {
            key_scales[j] = pages.key_scales(page)[offset];
            value_scales[j] = pages.value_scales(page)[offset];
        }
    }
};

// acc[r][v] += row(r) * column(v). The fewer of both are held in registers, the others come one by one.
template <class L, int R, int V, class Rows, class Columns>
inline void add_product(typename L::Floats (&acc)[R][V], const Rows& row, const Columns& column) {
    using Floats = typename L::Floats;
    if constexpr (R < V) {
        Floats rows[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) rows[r] = row(r);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            const Floats one = column(v);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[r][v] = L::fma(rows[r], one, acc[r][v]);
        }
    } else {
        Floats columns[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) columns[v] = column(v);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Floats one = row(r);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[r][v] = L::fma(one, columns[v], acc[r][v]);
        }
    }
}

// Of V vectors of positions, whose keys stand at every `apart`-th place of `keys`.
template <class L, int R, int V, class T>
inline void some_scores(const float* const* q, const T* const* keys, int64_t stride, int64_t dim, float scale, float (*scores)[BLOCK]) {
    constexpr int GROUP = L::WIDTH / LANES;
    typename L::Floats acc[R][V] = {};
    for (int64_t d = 0; d < dim; d++)
        add_product<L>(acc, [&](int r) { return L::all(q[r][d]); }, [&](int v) { return L::widen(keys[v * GROUP] + d * stride); });
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) L::store(scores[r] + v * L::WIDTH, acc[r][v] * L::all(scale));
}

// scores[r][j] of R rows with all positions of a block that are known, and some behind them, from group g on; g becomes the first group
// that is left.
template <class L, int R, class T>
inline void scores_of_groups(const Problem& p, const Block<T>& block, const float* const* q, int64_t groups, int64_t& g, float (*scores)[BLOCK]) {
    constexpr int GROUP = L::WIDTH / LANES;
    auto some = [&]<int V>() {
        while (g + V * GROUP <= groups) {
            auto* at = reinterpret_cast<float(*)[BLOCK]>(scores[0] + g * LANES);
            some_scores<L, R, V>(q, block.keys + g, block.stride, p.heads.dim, p.scale, at);
            g += V * GROUP;
        }
    };
    if constexpr (R <= 3 || SIDE >= 4) some.template operator()<4>();
    some.template operator()<2>();
    some.template operator()<1>();
}

template <int R, class T>
void scores_of(const Problem& p, const Block<T>& block, const float* const* q, float (*scores)[BLOCK]) {
    const int64_t groups = (block.known + LANES - 1) / LANES;
    int64_t g = 0;
    // Positions that share a vector lie side by side where pages are cut that way.
    if constexpr (Widest::WIDTH > LANES)
        if (block.stride % Widest::WIDTH == 0) scores_of_groups<Widest, R>(p, block, q, groups, g, scores);
    scores_of_groups<Eight, R>(p, block, q, groups, g, scores);
}

// out[r] += Σ weights[r][j] * values[j], j from `from` to `to` in order, V vectors of D at a time.
template <class L, int R, int V, class T>
inline void some_values(const float (*weights)[BLOCK], const T* const* values, int64_t from, int64_t to, int64_t at, float* const* out) {
    typename L::Floats acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc[r][v] = L::load(out[r] + at + v * L::WIDTH);
    for (int64_t j = from; j < to; j++) {
        const T* value = values[j] + at;
        add_product<L>(acc, [&](int r) { return L::all(weights[r][j]); }, [&](int v) { return L::widen(value + v * L::WIDTH); });
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) L::store(out[r] + at + v * L::WIDTH, acc[r][v]);
}

template <int R, class T>
void add_values(const float (*weights)[BLOCK], const T* const* values, int64_t from, int64_t to, int64_t width, float* const* out) {
    int64_t d = 0;
    auto some = [&]<class L, int V>() {
        for (; d + V * L::WIDTH <= width; d += V * L::WIDTH) some_values<L, R, V>(weights, values, from, to, d, out);
    };
    if constexpr (R <= 3 || SIDE >= 4) some.template operator()<Widest, 4>();
    some.template operator()<Widest, 2>();
    some.template operator()<Widest, 1>();
    if constexpr (Widest::WIDTH > LANES) some.template operator()<Eight, 1>();
}

// Brings scores, or weights, of whole numbers to what these stand for.
template <int R>
inline void multiply(float (*rows)[BLOCK], const float* scales, int64_t count) {
    for (int r = 0; r < R; r++)
        for (int64_t j = 0; j < count; j += LANES) store(rows[r] + j, load(rows[r] + j) * load(scales + j));
}

// Brings a row's sums up to a new highest score.
inline void raise(float top, int64_t width, float* state, float* out) {
    const float fade = state[0] == NOTHING ? 0.0f : exp(all(state[0] - top))[0];
    for (int64_t d = 0; d < width; d += LANES) store(out + d, load(out + d) * all(fade));
    state[0] = top;
    state[1] *= fade;
}

// Turns the scores of R rows into weights and brings their sums up to the new highest scores. All of the block is seen. The rows take
// each step together, for the steps of one wait for each other.
template <int R>
inline void soften(float (*scores)[BLOCK], int64_t width, float* state, float* const* out) {
    float top[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        Vec highest = load(scores[r]);
#pragma GCC unroll 8
        for (int i = 1; i < GROUPS; i++) highest = larger(load(scores[r] + i * LANES), highest);
        top[r] = max_lane(highest);
    }
    for (int r = 0; r < R; r++)
        if (top[r] > state[2 * r]) raise(top[r], width, state + 2 * r, out[r]);
    constexpr int TOGETHER = 4;  // vectors
    for (int r = 0; r < R; r++) {
        const auto shift = Widest::all(state[2 * r]);
        for (int64_t j = 0; j < BLOCK; j += TOGETHER * Widest::WIDTH) {
            Widest::Floats some[TOGETHER];
            for (int i = 0; i < TOGETHER; i++) some[i] = Widest::load(scores[r] + j + i * Widest::WIDTH) - shift;
            exps<Widest>(some);
            for (int i = 0; i < TOGETHER; i++) Widest::store(scores[r] + j + i * Widest::WIDTH, some[i]);
        }
    }
    Vec total[R] = {};
#pragma GCC unroll 8
    for (int i = 0; i < GROUPS; i++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) total[r] += load(scores[r] + i * LANES);
    for (int r = 0; r < R; r++) state[2 * r + 1] += sum(total[r]);
}

// The same where only [from, to) of the block is seen; what is not weighs 0.
inline void soften_part(float* scores, int64_t from, int64_t to, int64_t width, float* state, float* out) {
    if (from >= to) {
        std::fill(scores, scores + BLOCK, 0.0f);
        return;
    }
    const int groups = static_cast<int>((to + LANES - 1) / LANES);
    Vec highest = all(NOTHING);
    for (int i = 0; i < groups; i++) {
        const Ints place = Ints{0, 1, 2, 3, 4, 5, 6, 7} + i * LANES;
        const Ints seen = (place >= static_cast<int>(from)) & (place < static_cast<int>(to));
        const Vec score = select(seen, load(scores + i * LANES), all(2 * NOTHING));
        store(scores + i * LANES, score);
        highest = larger(score, highest);
    }
    const float top = max_lane(highest);
    if (top > state[0]) raise(top, width, state, out);
    Vec total = {};
    for (int i = 0; i < groups; i++) {
        const Vec score = load(scores + i * LANES), weight = select(score == all(2 * NOTHING), all(0.0f), exp(score - all(state[0])));
        store(scores + i * LANES, weight);
        total += weight;
    }
    for (int i = groups; i < GROUPS; i++) store(scores + i * LANES, all(0.0f));
    state[1] += sum(total);
}

// Keys and values of some KV heads at the positions [begin, end) of a sequence.
struct Reading {
    const int32_t* table = nullptr;
    int64_t kv_head = 0, heads = 0, begin = 0, end = 0;
};

// What is read next, up to a block of it, asked for in so many about equal portions: pages lie anywhere, so that the machine guesses
// nothing from the page before, and a memory that is asked for much at once lets the arithmetic wait.
template <class T>
class Coming {
  public:
    Coming(const Problem& p, const Reading& reading, int64_t times) : pages_(p.kv, p.heads, reading.kv_head) {
        const int64_t end = std::min(reading.begin + BLOCK, reading.end);
        if (reading.begin >= end) return;
        page_ = reading.table + reading.begin / pages_.page_size;
        last_ = reading.table + (end - 1) / pages_.page_size;
        bytes_ = reading.heads * pages_.size() * static_cast<int64_t>(sizeof(T));
        each_ = ((bytes_ + LINE - 1) / LINE * (last_ - page_ + 1) + times - 1) / times;
        turn();
    }

    void ask() {
        for (int64_t i = each_; i > 0 && at_; i--) {
            __builtin_prefetch(at_, 0, 3);
            if ((at_ += LINE) >= end_) page_++ < last_ ? turn() : void(at_ = nullptr);
        }
    }

  private:
    static constexpr int64_t LINE = 64;

    void turn() {
        at_ = reinterpret_cast<const char*>(pages_.keys(*page_));
        end_ = at_ + bytes_;
    }

    const Pages<T> pages_;
    const int32_t *page_ = nullptr, *last_ = nullptr;
    const char *at_ = nullptr, *end_ = nullptr;
    int64_t bytes_ = 0, each_ = 0;
};

}  // namespace headrace::HEADRACE_ISA
