// Causal attention over paged keys and values, decode and prefill alike.
//
// The KV positions of a sequence are cut, from position 0 up, into blocks of 32 and splits of 256. A row (token, query head) walks the
// blocks of a split in order with an online softmax (arXiv:2205.14135); the splits' results are then merged in order:
//
//     rows  ×  K block ─▶ scores ─▶ highest, fade ─▶ weights  ×  V block ─▶ out    } one split
//     (highest, total, out) of split 0  ⊕  split 1  ⊕  …                          } one row
//
// A row takes from a block only the positions that it sees. What it takes, and in which order, follows from its own position
// alone, so it does not matter which rows stand beside it, how the prompt was cut, or which thread computes a split.
//
// A tile is one KV head of some tokens of one request with all query heads that read it: K and V come to the cache once for all of
// its rows. A unit of work is a tile; where there are few tiles (decode), a split of a tile.
#include <algorithm>
#include <vector>

#include "ops.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {
namespace {

constexpr int64_t BLOCK = 32;
constexpr int64_t SPLIT = 256;
constexpr int64_t TILE_ROWS = 48;
constexpr float NOTHING = -1e30f;  // the highest score of a row that has seen no position yet

struct Problem {
    const float* q;
    const Heads& heads;
    const KV& kv;
    const Batch& batch;
    float scale;
    int window;
    float* out;

    int64_t sharing() const { return heads.query / heads.kv; }
    // The first position that a token sees.
    int64_t first(int64_t token) const { return window ? std::max(0, batch.positions[token] - window + 1) : 0; }
    int64_t place(int64_t token, int64_t kv_head, int64_t member) const {
        return (token * heads.query + kv_head * sharing() + member) * heads.dim;
    }
};

struct Tile {
    int64_t request, from, to;    // tokens
    int64_t first_split, splits;  // that any of its tokens sees
};

// Where rows keep their softmax: `state` has highest and total of each row, `out` [rows, D] the weighted sum so far.
struct Partial {
    float* state;
    float* out;
};

struct Block {
    int64_t begin;
    const float* keys[BLOCK];
    const float* values[BLOCK];
};

// Dot products of R rows with four keys each: scores[r][j …].
template <int R>
inline void four_scores(const float* const* q, const float* const* keys, int64_t dim, float (*scores)[BLOCK], int64_t j) {
    Vec acc[R][4] = {};
    for (int64_t d = 0; d < dim; d += LANES) {
        Vec qd[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) qd[r] = load(q[r] + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            Vec key = load(keys[j + i] + d);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) acc[r][i] = fma(qd[r], key, acc[r][i]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        Four s = sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
        std::memcpy(scores[r] + j, &s, sizeof s);
    }
}

// out[r] += Σ weights[r][j] * values[j], j from `from` to `to` in order, V vectors of D at a time.
template <int R, int V>
inline void add_values(const float (*weights)[BLOCK], const float* const* values, int64_t from, int64_t to, int64_t at, float* const* out) {
    Vec acc[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) acc[r][v] = load(out[r] + at + v * LANES);
    for (int64_t j = from; j < to; j++) {
        const float* value = values[j] + at;
        Vec part[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) part[v] = load(value + v * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            Vec weight = all(weights[r][j]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[r][v] = fma(weight, part[v], acc[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(out[r] + at + v * LANES, acc[r][v]);
}

template <int R>
inline void add_all_values(const float (*weights)[BLOCK], const float* const* values, int64_t from, int64_t to, int64_t dim, float* const* out) {
    int64_t d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) add_values<R, 4>(weights, values, from, to, d, out);
    for (; d < dim; d += LANES) add_values<R, 1>(weights, values, from, to, d, out);
}

// Turns a row's scores into weights and brings its sums up to the new highest score. Only [from, to) of the block is seen.
inline void soften(float* scores, int64_t from, int64_t to, float scale, int64_t dim, float* state, float* out) {
    Vec part[BLOCK / LANES], highest = all(NOTHING);
    Ints seen[BLOCK / LANES];
    for (int i = 0; i < BLOCK / LANES; i++) {
        Ints place = Ints{0, 1, 2, 3, 4, 5, 6, 7} + i * LANES;
        seen[i] = (place >= static_cast<int>(from)) & (place < static_cast<int>(to));
        part[i] = select(seen[i], load(scores + i * LANES) * all(scale), all(NOTHING));
        highest = larger(part[i], highest);
    }
    float top = max_lane(highest);
    if (top > state[0]) {
        float fade = state[0] == NOTHING ? 0.0f : exp(all(state[0] - top))[0];
        for (int64_t d = 0; d < dim; d += LANES) store(out + d, load(out + d) * all(fade));
        state[0] = top;
        state[1] *= fade;
    }
    Vec total = {};
    for (int i = 0; i < BLOCK / LANES; i++) {
        Vec weight = select(seen[i], exp(part[i] - all(state[0])), all(0.0f));
        store(scores + i * LANES, weight);
        total += weight;
    }
    state[1] += sum(total);
}

// Lets R rows of a tile see a block.
template <int R>
void see(const Problem& p, const Block& block, int64_t known, const float* const* q, const int64_t* from, const int64_t* to, float* state,
         float* const* out) {
    alignas(32) float scores[R][BLOCK];
    const int64_t dim = p.heads.dim;
    for (int64_t j = 0; j < known; j += 4) four_scores<R>(q, block.keys, dim, scores, j);
    bool whole = true;
    for (int r = 0; r < R; r++) {
        if (from[r] >= to[r]) {
            whole = false;
            continue;
        }
        soften(scores[r], from[r], to[r], p.scale, dim, state + 2 * r, out[r]);
        whole &= from[r] == 0 && to[r] == known;
    }
    if (whole) return add_all_values<R>(scores, block.values, 0, known, dim, out);
    // One by one: a value that a row does not see must not even be multiplied by 0, it may not be finite.
    for (int r = 0; r < R; r++)
        if (from[r] < to[r]) add_all_values<1>(scores + r, block.values, from[r], to[r], dim, out + r);
}

// One split of a tile, from nothing.
void split_of(const Problem& p, const Tile& tile, int64_t kv_head, int64_t split, Partial partial) {
    constexpr int TOGETHER = 3;
    const int64_t sharing = p.sharing(), rows = (tile.to - tile.from) * sharing, dim = p.heads.dim;
    int64_t begin = (split + 1) * SPLIT, end = 0;
    for (int64_t token = tile.from; token < tile.to; token++) {
        begin = std::min(begin, p.first(token));
        end = std::max<int64_t>(end, p.batch.positions[token] + 1);
    }
    begin = std::max(split * SPLIT, begin / BLOCK * BLOCK);
    end = std::min((split + 1) * SPLIT, end);
    for (int64_t r = 0; r < rows; r++) {
        partial.state[2 * r] = NOTHING;
        partial.state[2 * r + 1] = 0.0f;
    }
    std::fill(partial.out, partial.out + rows * dim, 0.0f);
    const int32_t* table = p.batch.pages + tile.request * p.batch.table_width;
    Block block;
    for (block.begin = begin; block.begin < end; block.begin += BLOCK) {
        const int64_t known = std::min(BLOCK, end - block.begin);
        for (int64_t j = 0; j < BLOCK; j++) {
            int64_t position = block.begin + std::min(j, known - 1);
            int64_t place = ((table[position / p.kv.page_size] * static_cast<int64_t>(p.heads.kv) + kv_head) * p.kv.page_size +
                             position % p.kv.page_size) * dim;
            block.keys[j] = p.kv.keys + place;
            block.values[j] = p.kv.values + place;
        }
        for (int64_t r = 0; r < rows;) {
            const float* q[TOGETHER];
            float* out[TOGETHER];
            int64_t from[TOGETHER], to[TOGETHER];
            const int count = static_cast<int>(std::min<int64_t>(TOGETHER, rows - r));
            bool any = false;
            for (int i = 0; i < count; i++) {
                int64_t token = tile.from + (r + i) / sharing;
                q[i] = p.q + p.place(token, kv_head, (r + i) % sharing);
                out[i] = partial.out + (r + i) * dim;
                from[i] = std::max<int64_t>(p.first(token) - block.begin, 0);
                to[i] = std::min<int64_t>(known, p.batch.positions[token] + 1 - block.begin);
                any |= from[i] < to[i];
            }
            float* state = partial.state + 2 * r;
            r += count;
            if (!any) continue;
            switch (count) {
                case 1: see<1>(p, block, known, q, from, to, state, out); break;
                case 2: see<2>(p, block, known, q, from, to, state, out); break;
                case 3: see<3>(p, block, known, q, from, to, state, out); break;
            }
        }
    }
}

// into ⊕= next, for the rows of a tile.
void merge(int64_t rows, int64_t dim, Partial into, Partial next) {
    for (int64_t r = 0; r < rows; r++) {
        float *a = into.state + 2 * r, *out = into.out + r * dim;
        const float *b = next.state + 2 * r, *more = next.out + r * dim;
        if (b[1] == 0.0f && b[0] == NOTHING) continue;
        if (a[1] == 0.0f && a[0] == NOTHING) {
            a[0] = b[0];
            a[1] = b[1];
            std::copy(more, more + dim, out);
            continue;
        }
        float top = std::max(a[0], b[0]), mine = exp(all(a[0] - top))[0], theirs = exp(all(b[0] - top))[0];
        for (int64_t d = 0; d < dim; d += LANES) store(out + d, fma(load(more + d), all(theirs), load(out + d) * all(mine)));
        a[0] = top;
        a[1] = a[1] * mine + b[1] * theirs;
    }
}

void finish(const Problem& p, const Tile& tile, int64_t kv_head, Partial partial) {
    const int64_t sharing = p.sharing(), rows = (tile.to - tile.from) * sharing, dim = p.heads.dim;
    for (int64_t r = 0; r < rows; r++) {
        float* out = p.out + p.place(tile.from + r / sharing, kv_head, r % sharing);
        for (int64_t d = 0; d < dim; d += LANES) store(out + d, load(partial.out + r * dim + d) / all(partial.state[2 * r + 1]));
    }
}

// The batch's tiles, those with most to see first, so that no thread is left with a long one at the end.
std::vector<Tile> tiles_of(const Problem& p) {
    const int64_t most = std::max<int64_t>(1, TILE_ROWS / p.sharing());
    std::vector<Tile> tiles;
    for (int64_t r = 0; r < p.batch.requests; r++)
        for (int64_t from = p.batch.query_start[r]; from < p.batch.query_start[r + 1]; from += most) {
            Tile tile{r, from, std::min<int64_t>(from + most, p.batch.query_start[r + 1]), INT64_MAX, 0};
            int64_t last = 0;
            for (int64_t token = tile.from; token < tile.to; token++) {
                tile.first_split = std::min(tile.first_split, p.first(token) / SPLIT);
                last = std::max<int64_t>(last, p.batch.positions[token] / SPLIT);
            }
            tile.splits = last + 1 - tile.first_split;
            tiles.push_back(tile);
        }
    std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.splits > b.splits; });
    return tiles;
}

}  // namespace

void attention(Pool& pool, const float* q, const Heads& heads, const KV& kv, const Batch& batch, float scale, int window, float* out) {
    const Problem p{q, heads, kv, batch, scale, window, out};
    const std::vector<Tile> tiles = tiles_of(p);
    const int64_t count = static_cast<int64_t>(tiles.size()) * heads.kv, most = tiles.empty() ? 0 : tiles[0].splits;
    const int64_t tile_rows = std::max(TILE_ROWS, p.sharing()), floats = tile_rows * (heads.dim + 2);
    auto partial_at = [&](float* at) { return Partial{at, at + 2 * tile_rows}; };
    if (most > 1 && count < 4 * pool.threads()) {
        // Few tiles with much to see: every split is a unit, then every tile.
        float* partials = Pool::scratch(0, count * most * floats);
        pool.run(count * most, [&](int64_t unit) {
            const Tile& tile = tiles[unit / most / heads.kv];
            if (int64_t s = unit % most; s < tile.splits)
                split_of(p, tile, unit / most % heads.kv, tile.first_split + s, partial_at(partials + unit * floats));
        });
        pool.run(count, [&](int64_t unit) {
            const Tile& tile = tiles[unit / heads.kv];
            Partial sum = partial_at(partials + unit * most * floats);
            for (int64_t s = 1; s < tile.splits; s++)
                merge((tile.to - tile.from) * p.sharing(), heads.dim, sum, partial_at(partials + (unit * most + s) * floats));
            finish(p, tile, unit % heads.kv, sum);
        });
        return;
    }
    pool.run(count, [&](int64_t unit) {
        const Tile& tile = tiles[unit / heads.kv];
        const int64_t rows = (tile.to - tile.from) * p.sharing(), kv_head = unit % heads.kv;
        float* scratch = Pool::scratch(1, 2 * floats);
        Partial sum = partial_at(scratch), next = partial_at(scratch + floats);
        split_of(p, tile, kv_head, tile.first_split, sum);
        for (int64_t s = 1; s < tile.splits; s++) {
            split_of(p, tile, kv_head, tile.first_split + s, next);
            merge(rows, heads.dim, sum, next);
        }
        finish(p, tile, kv_head, sum);
    });
}

}  // namespace headrace::HEADRACE_ISA
