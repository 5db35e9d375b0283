// Causal attention over paged keys and values: decode, prefill and the verification of trees alike.
//
// The KV positions of a sequence are cut, from position 0 up, into blocks of 64 and splits of 256. A row (token, query head) walks the
// blocks of a split in order with an online softmax (arXiv:2205.14135); the splits' results are then merged in order:
//
//     rows  ×  K block ─▶ scores ─▶ highest, fade ─▶ weights  ×  V block ─▶ out    } one split
//     (highest, total, out) of split 0  ⊕  split 1  ⊕  …                          } one row
//
// A score is one chain over the head's D values, an output one chain over a split's positions; keys lie transposed in their page, so that
// a vector holds positions and no lanes are ever added up. What a row takes, and in which order, follows from its own position alone: it
// does not matter which rows stand beside it, how the prompt was cut, or which thread computes a split.
//
// A tile is one KV head of some tokens of one request with all query heads that read it: K and V come to the cache once for all of
// its rows. A unit of work is a tile; where there are few tiles (decode), a split of a tile.
//
// A token of a tree sees what its path from the root makes a plain sequence, and in that order, so that it comes out to the same bits as
// when that path alone is computed token by token. It is a tile of its own, whose keys are copied into order where they do not lie so.
#include <algorithm>

#include "ops.h"
#include "pages.h"
#include "rows.h"
#include "wide.h"

namespace headrace::HEADRACE_ISA {
namespace {

// Scores and outputs are summed up a lane each, as wide as the machine has vectors, and eight at a time where that does not go up.
using wide::Widest;

constexpr int64_t BLOCK = 64;
constexpr int64_t SPLIT = 256;
constexpr int64_t TILE_ROWS = 48;
constexpr int64_t ALONE = 16;  // rows of a tile up to which memory is slower than what they do with it
constexpr int TALL = 6;  // rows whose sums for SIDE vectors stay in registers together
constexpr int SIDE = wide::WIDTH > LANES ? 4 : 2;
constexpr int GROUPS = BLOCK / LANES;  // vectors of positions a block
constexpr float NOTHING = -1e30f;      // the highest score of a row that has seen no position yet

struct Problem {
    const float* q;
    const Heads& heads;
    const KV& kv;
    const Batch& batch;
    float scale;
    int window;
    float* out;

    int64_t sharing() const { return heads.query / heads.kv; }
    int64_t width() const { return kv.value_width(heads.dim); }
    // The first row of a request, and the position from which its rows' keys and values lie one after the other.
    int64_t first_row(int64_t request) const { return batch.query_start[request]; }
    int64_t base(int64_t request) const { return batch.positions[first_row(request)]; }
    // The first position that a token sees.
    int64_t first(int64_t token) const { return window ? std::max(0, batch.positions[token] - window + 1) : 0; }
    int64_t place(int64_t token, int64_t kv_head, int64_t member) const {
        return (token * heads.query + kv_head * sharing() + member) * heads.dim;
    }
};

struct Tile {
    int64_t request, from, to;    // tokens
    int64_t first_split, splits;  // that any of its tokens sees
    bool tree;                    // one token of a tree
};

// Where rows keep their softmax: `state` has highest and total of each row, `out` [rows, width] the weighted sum so far.
struct Partial {
    float* state;
    float* out;
};

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

// Turns a row's scores into weights and brings its sums up to the new highest score. Only [from, to) of the block is seen; what is not
// weighs 0.
inline void soften(float* scores, int64_t from, int64_t to, int64_t width, float* state, float* out) {
    const int groups = static_cast<int>((to + LANES - 1) / LANES);
    Vec highest = all(NOTHING);
    const bool whole = from == 0 && to % LANES == 0;
    if (!whole)
        for (int i = 0; i < groups; i++) {
            const Ints place = Ints{0, 1, 2, 3, 4, 5, 6, 7} + i * LANES;
            const Ints seen = (place >= static_cast<int>(from)) & (place < static_cast<int>(to));
            store(scores + i * LANES, select(seen, load(scores + i * LANES), all(2 * NOTHING)));
        }
    for (int i = 0; i < groups; i++) highest = larger(load(scores + i * LANES), highest);
    const float top = max_lane(highest);
    if (top > state[0]) {
        const float fade = state[0] == NOTHING ? 0.0f : exp(all(state[0] - top))[0];
        for (int64_t d = 0; d < width; d += LANES) store(out + d, load(out + d) * all(fade));
        state[0] = top;
        state[1] *= fade;
    }
    int group = 0;
    auto weigh = [&]<class L>() {
        for (constexpr int COUNT = L::WIDTH / LANES; group + COUNT <= groups; group += COUNT) {
            const auto score = L::load(scores + group * LANES);
            auto weight = exp_of<L>(score - L::all(state[0]));
            if (!whole) weight = score == L::all(2 * NOTHING) ? L::all(0.0f) : weight;
            L::store(scores + group * LANES, weight);
        }
    };
    weigh.template operator()<Widest>();
    weigh.template operator()<Eight>();
    Vec total = {};
    for (int i = 0; i < groups; i++) total += load(scores + i * LANES);
    for (int i = groups; i < GROUPS; i++) store(scores + i * LANES, all(0.0f));
    state[1] += sum(total);
}

// Asks memory for the values of the block that begins here, and for the keys of the one behind it: pages lie anywhere, so that the machine
// guesses nothing from the page before.
template <class T>
void fetch(const Pages<T>& pages, const int32_t* table, int64_t begin, int64_t end) {
    auto lines = [](const T* from, const T* to) {
        for (const char *at = reinterpret_cast<const char*>(from), *last = reinterpret_cast<const char*>(to); at < last; at += 64)
            __builtin_prefetch(at, 0, 3);
    };
    const int64_t size = pages.page_size, middle = std::min(begin + BLOCK, end), behind = std::min(begin + 2 * BLOCK, end);
    for (int64_t page = begin / size; page * size < middle; page++) lines(pages.value(table[page], 0), pages.value(table[page], size));
    for (int64_t page = middle / size; page * size < behind; page++) lines(pages.keys(table[page]), pages.keys(table[page]) + pages.keys_size);
}

struct Row {
    const float* q;
    float* out;
    int64_t first, last;  // positions that it sees
};

// What a thread needs for one tile beside its partial sums.
struct Room {
    float (*scores)[BLOCK];  // [rows]
    Row* row;                // [rows]
    float* keys;             // [D][BLOCK]

    static int64_t floats(int64_t rows, int64_t dim) { return rows * (BLOCK + sizeof(Row) / sizeof(float)) + dim * BLOCK; }
    static Room at(float* begin, int64_t rows) {
        float* behind = begin + rows * BLOCK;
        return {reinterpret_cast<float(*)[BLOCK]>(begin), reinterpret_cast<Row*>(behind), behind + rows * (sizeof(Row) / sizeof(float))};
    }
};

// One split of a tile, from nothing.
template <class T>
void split_of(const Problem& p, const Tile& tile, int64_t kv_head, int64_t split, Partial partial, const Room& room) {
    float (*scores)[BLOCK] = room.scores;
    Row* row = room.row;
    const int64_t sharing = p.sharing(), rows = (tile.to - tile.from) * sharing, width = p.width();
    int64_t begin = (split + 1) * SPLIT, end = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = tile.from + r / sharing;
        row[r] = {p.q + p.place(token, kv_head, r % sharing), partial.out + r * width, p.first(token), p.batch.positions[token]};
        begin = std::min(begin, row[r].first);
        end = std::max(end, row[r].last + 1);
        partial.state[2 * r] = NOTHING;
        partial.state[2 * r + 1] = 0.0f;
    }
    begin = std::max(split * SPLIT, begin / BLOCK * BLOCK);
    end = std::min((split + 1) * SPLIT, end);
    std::fill(partial.out, partial.out + rows * width, 0.0f);
    const int32_t* table = p.batch.pages + tile.request * p.batch.table_width;
    const Pages<T> pages(p.kv, p.heads, kv_head);
    Block<T> block;
    for (block.begin = begin; block.begin < end; block.begin += BLOCK) {
        block.known = std::min(BLOCK, end - block.begin);
        // Rows of a tile follow each other by position: those that see nothing of the block stand at its ends.
        int64_t from_row = 0, to_row = rows;
        while (from_row < to_row && row[from_row].last < block.begin) from_row++;
        while (to_row > from_row && row[to_row - 1].first >= block.begin + block.known) to_row--;
        tile.tree ? block.place_path(p, pages, table, tile, reinterpret_cast<T*>(room.keys)) : block.place(pages, table);
        if (rows <= ALONE) fetch(pages, table, block.begin, end);
        by_heights<TALL>(to_row - from_row, [&]<int R>(int64_t r) {
            const float* q[R];
            for (int i = 0; i < R; i++) q[i] = row[from_row + r + i].q;
            scores_of<R>(p, block, q, scores + from_row + r);
            if constexpr (SCALED<T>) multiply<R>(scores + from_row + r, block.key_scales, block.known);
        });
        for (int64_t r = from_row; r < to_row; r++) {
            const int64_t from = std::max<int64_t>(row[r].first - block.begin, 0), to = std::min(block.known, row[r].last + 1 - block.begin);
            if (from < to) {
                soften(scores[r], from, to, width, partial.state + 2 * r, row[r].out);
            } else {
                std::fill(scores[r], scores[r] + BLOCK, 0.0f);
            }
        }
        by_heights<TALL>(to_row - from_row, [&]<int R>(int64_t r) {
            float* out[R];
            int64_t seen = 0;  // positions behind these rows may hold anything
            for (int i = 0; i < R; i++) {
                out[i] = row[from_row + r + i].out;
                seen = std::max(seen, std::min(block.known, row[from_row + r + i].last + 1 - block.begin));
            }
            if constexpr (SCALED<T>) multiply<R>(scores + from_row + r, block.value_scales, block.known);
            add_values<R>(scores + from_row + r, block.values, 0, seen, width, out);
        });
    }
}

// into ⊕= next, for the rows of a tile.
void merge(int64_t rows, int64_t width, Partial into, Partial next) {
    for (int64_t r = 0; r < rows; r++) {
        float *a = into.state + 2 * r, *out = into.out + r * width;
        const float *b = next.state + 2 * r, *more = next.out + r * width;
        if (b[1] == 0.0f && b[0] == NOTHING) continue;
        if (a[1] == 0.0f && a[0] == NOTHING) {
            a[0] = b[0];
            a[1] = b[1];
            std::copy(more, more + width, out);
            continue;
        }
        float top = std::max(a[0], b[0]), mine = exp(all(a[0] - top))[0], theirs = exp(all(b[0] - top))[0];
        for (int64_t d = 0; d < width; d += LANES) store(out + d, fma(load(more + d), all(theirs), load(out + d) * all(mine)));
        a[0] = top;
        a[1] = a[1] * mine + b[1] * theirs;
    }
}

void finish(const Problem& p, const Tile& tile, int64_t kv_head, Partial partial) {
    const int64_t sharing = p.sharing(), rows = (tile.to - tile.from) * sharing, width = p.width();
    for (int64_t r = 0; r < rows; r++) {
        float* out = p.out + p.place(tile.from + r / sharing, kv_head, r % sharing);
        const float* from = partial.out + r * width;
        const float total = partial.state[2 * r + 1];
        for (int64_t d = 0; d < p.heads.dim; d++) out[d] = from[d] / total;
    }
}

// Whether a request's rows are anything but one sequence.
bool is_tree(const Problem& p, int64_t request) {
    if (!p.batch.parents) return false;
    const int64_t first = p.first_row(request);
    for (int64_t row = first; row < p.batch.query_start[request + 1]; row++)
        if (p.batch.parents[row] != row - first - 1) return true;
    return false;
}

// The batch's tiles, those with most to see first, so that no thread is left with a long one at the end. `tiles` has room for all.
int64_t tiles_of(const Problem& p, Tile* tiles) {
    int64_t count = 0;
    for (int64_t r = 0; r < p.batch.requests; r++) {
        const bool tree = is_tree(p, r);
        const int64_t most = tree ? 1 : std::max<int64_t>(1, TILE_ROWS / p.sharing());
        for (int64_t from = p.batch.query_start[r]; from < p.batch.query_start[r + 1]; from += most) {
            Tile& tile = tiles[count++] = {r, from, std::min<int64_t>(from + most, p.batch.query_start[r + 1]), INT64_MAX, 0, tree};
            int64_t last = 0;
            for (int64_t token = tile.from; token < tile.to; token++) {
                tile.first_split = std::min(tile.first_split, p.first(token) / SPLIT);
                last = std::max<int64_t>(last, p.batch.positions[token] / SPLIT);
            }
            tile.splits = last + 1 - tile.first_split;
        }
    }
    std::sort(tiles, tiles + count, [](const Tile& a, const Tile& b) { return a.splits != b.splits ? a.splits > b.splits : a.from < b.from; });
    return count;
}

template <class T>
void attend(Pool& pool, const Problem& p) {
    const int64_t most_tiles = p.batch.tokens + p.batch.requests;
    Tile* tiles = reinterpret_cast<Tile*>(Pool::scratch(0, most_tiles * sizeof(Tile) / sizeof(float)));
    const int64_t kv_heads = p.heads.kv, count = tiles_of(p, tiles) * kv_heads, most = count ? tiles[0].splits : 0;
    // Sizes of partial sums are multiples of a cache line.
    const int64_t tile_rows = std::max(TILE_ROWS, p.sharing()), width = p.width(), floats = (tile_rows * (width + 2) + 15) / 16 * 16;
    auto partial_at = [&](float* at) { return Partial{at + tile_rows * width, at}; };
    if (most > 1 && count < 4 * pool.threads()) {
        // Few tiles with much to see: every split is a unit, then every tile.
        float* partials = Pool::scratch(1, count * most * floats);
        pool.run(count * most, [&](int64_t unit) {
            const Tile& tile = tiles[unit / most / kv_heads];
            const int64_t s = unit % most;
            if (s >= tile.splits) return;
            const Room room = Room::at(Pool::scratch(2, Room::floats(tile_rows, p.heads.dim)), tile_rows);
            split_of<T>(p, tile, unit / most % kv_heads, tile.first_split + s, partial_at(partials + unit * floats), room);
        });
        pool.run(count, [&](int64_t unit) {
            const Tile& tile = tiles[unit / kv_heads];
            Partial sum = partial_at(partials + unit * most * floats);
            for (int64_t s = 1; s < tile.splits; s++)
                merge((tile.to - tile.from) * p.sharing(), width, sum, partial_at(partials + (unit * most + s) * floats));
            finish(p, tile, unit % kv_heads, sum);
        });
        return;
    }
    auto whole = [&](int64_t unit) {
        const Tile& tile = tiles[unit / kv_heads];
        const int64_t rows = (tile.to - tile.from) * p.sharing(), kv_head = unit % kv_heads;
        float* scratch = Pool::scratch(2, 2 * floats + Room::floats(tile_rows, p.heads.dim));
        Partial sum = partial_at(scratch), next = partial_at(scratch + floats);
        const Room room = Room::at(scratch + 2 * floats, tile_rows);
        split_of<T>(p, tile, kv_head, tile.first_split, sum, room);
        for (int64_t s = 1; s < tile.splits; s++) {
            split_of<T>(p, tile, kv_head, tile.first_split + s, next, room);
            merge(rows, width, sum, next);
        }
        finish(p, tile, kv_head, sum);
    };
    // One token that sees little takes less time than to tell the threads of it.
    if (p.batch.tokens == 1 && most == 1)
        for (int64_t unit = 0; unit < count; unit++) whole(unit);
    else
        pool.run(count, whole);
}

}  // namespace

void attention(Pool& pool, const float* q, const Heads& heads, const KV& kv, const Batch& batch, float scale, int window, float* out) {
    const Problem p{q, heads, kv, batch, scale, window, out};
    with_type(kv, [&]<class T>() { attend<T>(pool, p); });
}

}  // namespace headrace::HEADRACE_ISA
