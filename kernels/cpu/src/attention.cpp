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
// A unit of work is a tile (`attention_tiles.h`); where there are few tiles (decode), a split of a tile. Requests with a common prefix have
// tiles together for its splits, before each goes on alone: K and V are read once for all of them.
//
// A token of a tree sees what its path from the root makes a plain sequence, and in that order, so that it comes out to the same bits as
// when that path alone is computed token by token. It is a tile of its own, whose keys are copied into order where they do not lie so.
#include <algorithm>

#include "attention_block.h"
#include "attention_tiles.h"
#include "rows.h"

namespace headrace::HEADRACE_ISA {
namespace {

// Where rows keep their softmax: `state` has highest and total of each row, `out` [rows, width] the weighted sum so far.
struct Partial {
    float* state;
    float* out;
};

struct Row {
    const float* q;
    float* out;
    int64_t first, last;  // positions that it sees
};

// What a thread needs for one tile beside its partial sums.
struct Room {
    Row* row;     // [rows]
    float* keys;  // [D][BLOCK]

    static int64_t floats(int64_t rows, int64_t dim) { return rows * static_cast<int64_t>(sizeof(Row) / sizeof(float)) + dim * BLOCK; }
    static Room at(float* begin, int64_t rows) { return {reinterpret_cast<Row*>(begin), begin + rows * (sizeof(Row) / sizeof(float))}; }
};

// One split of a tile, from nothing.
template <class T>
void split_of(const Problem& p, const Tile& tile, int64_t kv_head, int64_t split, Partial partial, const Room& room) {
    alignas(64) float scores[TALL][BLOCK];
    Row* row = room.row;
    const int64_t sharing = p.sharing(), rows = tile.tokens * sharing, width = p.width();
    int64_t begin = (split + 1) * SPLIT, end = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = tile.token(r / sharing);
        row[r] = {p.q + p.place(token, kv_head, r % sharing), partial.out + r * width, p.first(token), p.batch.positions[token]};
        begin = std::min(begin, row[r].first);
        end = std::max(end, row[r].last + 1);
        partial.state[2 * r] = NOTHING;
        partial.state[2 * r + 1] = 0.0f;
    }
    begin = std::max(split * SPLIT, begin / BLOCK * BLOCK);
    const int64_t sight = end;
    end = std::min((split + 1) * SPLIT, end);
    std::fill(partial.out, partial.out + rows * width, 0.0f);
    const int32_t* table = p.table(tile.request);
    const Pages<T> pages(p.kv, p.heads, kv_head);
    // Whether no other tile brings these keys and values to the cache.
    const bool once = tile.listed || tile.tokens == p.batch.query_start[tile.request + 1] - p.first_row(tile.request);
    Block<T> block;
    for (block.begin = begin; block.begin < end; block.begin += BLOCK) {
        block.known = std::min(BLOCK, end - block.begin);
        // Rows of a tile follow each other by position: those that see nothing of the block stand at its ends.
        int64_t from_row = 0, to_row = rows;
        while (from_row < to_row && row[from_row].last < block.begin) from_row++;
        while (to_row > from_row && row[to_row - 1].first >= block.begin + block.known) to_row--;
        tile.tree ? block.place_path(p, pages, table, tile, reinterpret_cast<T*>(room.keys)) : block.place(pages, table);
        Coming<T> coming(pages, table, block.begin + BLOCK, once ? sight : 0, 2 * ((to_row - from_row + TALL - 1) / TALL));
        by_heights<TALL>(to_row - from_row, [&]<int R>(int64_t r) {
            coming.ask();
            Row* const some = row + from_row + r;
            float* state = partial.state + 2 * (from_row + r);
            const float* q[R];
            float* out[R];
            for (int i = 0; i < R; i++) q[i] = some[i].q, out[i] = some[i].out;
            scores_of<R>(p, block, q, scores);
            if constexpr (SCALED<T>) multiply<R>(scores, block.key_scales, block.known);
            int64_t from[R], to[R], seen = 0;  // positions behind `seen` may hold anything
            bool whole = true;
            for (int i = 0; i < R; i++) {
                from[i] = some[i].first - block.begin;
                to[i] = std::min(block.known, some[i].last + 1 - block.begin);
                seen = std::max(seen, to[i]);
                whole = whole && from[i] <= 0 && to[i] == BLOCK;
            }
            if (whole)
                soften<R>(scores, width, state, out);
            else
                for (int i = 0; i < R; i++) soften_part(scores[i], from[i], to[i], width, state + 2 * i, out[i]);
            coming.ask();
            if constexpr (SCALED<T>) multiply<R>(scores, block.value_scales, block.known);
            add_values<R>(scores, block.values, 0, seen, width, out);
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
    const int64_t sharing = p.sharing(), rows = tile.tokens * sharing, width = p.width();
    for (int64_t r = 0; r < rows; r++) {
        float* out = p.out + p.place(tile.token(r / sharing), kv_head, r % sharing);
        const float* from = partial.out + r * width;
        const float total = partial.state[2 * r + 1];
        for (int64_t d = 0; d < p.heads.dim; d++) out[d] = from[d] / total;
    }
}

template <class T>
void attend(Pool& pool, const Problem& p) {
    const Tiles tiles(p);
    const int64_t kv_heads = p.heads.kv, count = static_cast<int64_t>(tiles.own.size()) * kv_heads;
    // Sizes of partial sums are multiples of a cache line.
    const int64_t tile_rows = std::max(TILE_ROWS, p.sharing()), width = p.width(), floats = (tile_rows * (width + 2) + 15) / 16 * 16;
    auto partial_at = [&](float* at) { return Partial{at + tile_rows * width, at}; };
    const int64_t most = count ? tiles.own[0].splits : 0;
    if (tiles.shared.empty() && most > 1 && count < 4 * pool.threads()) {
        // Few tiles with much to see: every split is a unit, then every tile.
        float* partials = Pool::scratch(1, count * most * floats);
        pool.run(count * most, [&](int64_t unit) {
            const Tile& tile = tiles.own[unit / most / kv_heads];
            const int64_t s = unit % most;
            if (s >= tile.splits) return;
            const Room room = Room::at(Pool::scratch(2, Room::floats(tile_rows, p.heads.dim)), tile_rows);
            split_of<T>(p, tile, unit / most % kv_heads, tile.first_split + s, partial_at(partials + unit * floats), room);
        });
        pool.run(count, [&](int64_t unit) {
            const Tile& tile = tiles.own[unit / kv_heads];
            Partial sum = partial_at(partials + unit * most * floats);
            for (int64_t s = 1; s < tile.splits; s++)
                merge(tile.tokens * p.sharing(), width, sum, partial_at(partials + (unit * most + s) * floats));
            finish(p, tile, unit % kv_heads, sum);
        });
        return;
    }
    // What a row has summed up in a shared tile: [T, Hq] of its sums, highest score and total.
    float* begun = tiles.shared.empty() ? nullptr : Pool::scratch(1, p.batch.tokens * p.heads.query * (width + 2));
    auto begun_of = [&](const Tile& tile, int64_t kv_head, int64_t r) {
        return begun + (tile.token(r / p.sharing()) * p.heads.query + kv_head * p.sharing() + r % p.sharing()) * (width + 2);
    };
    auto sum_up = [&](const Tile& tile, int64_t kv_head, const auto& use) {
        const int64_t rows = tile.tokens * p.sharing();
        float* scratch = Pool::scratch(2, 2 * floats + Room::floats(tile_rows, p.heads.dim));
        Partial sum = partial_at(scratch), next = partial_at(scratch + floats);
        const Room room = Room::at(scratch + 2 * floats, tile_rows);
        if (tile.begun) {
            for (int64_t r = 0; r < rows; r++) {
                const float* from = begun_of(tile, kv_head, r);
                std::copy(from, from + width, sum.out + r * width);
                std::copy(from + width, from + width + 2, sum.state + 2 * r);
            }
        } else {
            split_of<T>(p, tile, kv_head, tile.first_split, sum, room);
        }
        for (int64_t s = std::max<int64_t>(1, tile.begun); s < tile.splits; s++) {
            split_of<T>(p, tile, kv_head, tile.first_split + s, next, room);
            merge(rows, width, sum, next);
        }
        use(rows, sum);
    };
    pool.run(static_cast<int64_t>(tiles.shared.size()) * kv_heads, [&](int64_t unit) {
        const Tile& tile = tiles.shared[unit / kv_heads];
        sum_up(tile, unit % kv_heads, [&](int64_t rows, const Partial& sum) {
            for (int64_t r = 0; r < rows; r++) {
                float* to = begun_of(tile, unit % kv_heads, r);
                std::copy(sum.out + r * width, sum.out + (r + 1) * width, to);
                std::copy(sum.state + 2 * r, sum.state + 2 * r + 2, to + width);
            }
        });
    });
    auto whole = [&](int64_t unit) {
        const Tile& tile = tiles.own[unit / kv_heads];
        sum_up(tile, unit % kv_heads, [&](int64_t, const Partial& sum) { finish(p, tile, unit % kv_heads, sum); });
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
