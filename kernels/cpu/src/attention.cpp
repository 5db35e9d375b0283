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
// A unit of work is a tile (`attention_tiles.h`); of a tile that takes long beside the others, a split. Requests with a common prefix have
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

// Some KV heads that stand side by side.
struct HeadRange {
    int64_t first, count;
};

// What a thread needs for some heads of one tile beside its partial sums.
struct Room {
    Row* row;     // [heads][rows]
    float* keys;  // [D][BLOCK]

    static int64_t floats(int64_t rows, int64_t dim) { return rows * static_cast<int64_t>(sizeof(Row) / sizeof(float)) + dim * BLOCK; }
    static Room at(float* begin, int64_t rows) { return {reinterpret_cast<Row*>(begin), begin + rows * (sizeof(Row) / sizeof(float))}; }
};

// One split of a tile for some heads, from nothing, to partial(head) of each. `own` is what is read of the tile from there on, unless
// others bring it to the cache; `next` is what this thread is going to read after that.
template <class T, class Partials>
void split_of(const Problem& p, const Tile& tile, HeadRange heads, int64_t split, const Partials& partial, const Room& room, const Reading& own,
              const Reading& next) {
    alignas(64) float scores[TALL][BLOCK];
    const int64_t sharing = p.sharing(), rows = tile.tokens * sharing, width = p.width();
    int64_t begin = (split + 1) * SPLIT, end = 0;
    for (int64_t i = 0; i < tile.tokens; i++) {
        const int64_t token = tile.token(i);
        begin = std::min(begin, p.first(token));
        end = std::max<int64_t>(end, p.batch.positions[token] + 1);
    }
    begin = std::max(split * SPLIT, begin / BLOCK * BLOCK);
    end = std::min((split + 1) * SPLIT, end);
    for (int64_t h = 0; h < heads.count; h++) {
        const Partial sums = partial(h);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t token = tile.token(r / sharing);
            room.row[h * rows + r] = {p.q + p.place(token, heads.first + h, r % sharing), sums.out + r * width, p.first(token),
                                      p.batch.positions[token]};
            sums.state[2 * r] = NOTHING;
            sums.state[2 * r + 1] = 0.0f;
        }
        std::fill(sums.out, sums.out + rows * width, 0.0f);
    }
    const int32_t* table = p.table(tile.request);
    Block<T> block;
    for (block.begin = begin; block.begin < end; block.begin += BLOCK) {
        block.known = std::min(BLOCK, end - block.begin);
        // Rows of a tile follow each other by position: those that see nothing of the block stand at its ends.
        int64_t from_row = 0, to_row = rows;
        while (from_row < to_row && room.row[from_row].last < block.begin) from_row++;
        while (to_row > from_row && room.row[to_row - 1].first >= block.begin + block.known) to_row--;
        Reading after = own;
        after.begin = block.begin + BLOCK;
        if (after.begin >= own.end) after = after.begin >= end ? next : Reading{};
        Coming<T> coming(p, after, 2 * heads.count * std::max<int64_t>(1, (to_row - from_row + TALL - 1) / TALL));
        for (int64_t h = 0; h < heads.count; h++) {
            const Pages<T> pages(p.kv, p.heads, heads.first + h);
            tile.tree ? block.place_path(p, pages, table, tile, reinterpret_cast<T*>(room.keys)) : block.place(pages, table);
            float* const states = partial(h).state;
            by_heights<TALL>(to_row - from_row, [&]<int R>(int64_t r) {
                coming.ask();
                const Row* const some = room.row + h * rows + from_row + r;
                float* state = states + 2 * (from_row + r);
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

// The sums of some tiles, for every KV head of each.
template <class T>
class Sums {
  public:
    // `begun` is what rows have summed up in tiles that they shared, [T, Hq] of sums, highest score and total; null where there were none.
    Sums(Pool& pool, const Problem& p, float* begun) : pool_(pool), p_(p), begun_(begun) {}

    // Hands what each tile sums up for a KV head to use(tile, kv_head, sum). `tiles` come with the longest first. Those that would keep one
    // thread busy while others have nothing left are computed by the split.
    template <class Use>
    void of(std::span<const Tile> tiles, const Use& use) {
        const int64_t kv_heads = p_.heads.kv, cut = long_ones(tiles), most = cut ? tiles[0].own_splits() : 0;
        const int64_t tallest = std::max(TILE_ROWS, p_.sharing());
        float* partials = cut ? Pool::scratch(3, cut * kv_heads * most * floats_of(tallest)) : nullptr;
        auto partial = [&](int64_t tile, int64_t head, int64_t s) {
            return at(partials + ((tile * kv_heads + head) * most + s) * floats_of(tallest), tallest);
        };
        const std::span<const Unit> units = units_of(tiles, cut);
        auto compute = [&](int64_t number) {
            const Unit& unit = units[number];
            const Tile& tile = tiles[unit.tile];
            const HeadRange heads = unit.heads;
            // A thread mostly takes one unit after the other.
            const Reading own = reading_of(tiles, unit), next = number + 1 < std::ssize(units) ? reading_of(tiles, units[number + 1]) : Reading{};
            const int64_t rows = tile.tokens * p_.sharing(), floats = floats_of(rows), sums = 2 * heads.count * floats;
            float* scratch = Pool::scratch(2, sums + Room::floats(heads.count * rows, p_.heads.dim));
            const Room room = Room::at(scratch + sums, heads.count * rows);
            if (unit.split >= 0) {
                const auto to = [&](int64_t h) { return partial(unit.tile, heads.first + h, unit.split); };
                return split_of<T>(p_, tile, heads, tile.first_split + tile.begun + unit.split, to, room, own, next);
            }
            const auto sum = [&](int64_t h) { return at(scratch + h * floats, rows); };
            const auto more = [&](int64_t h) { return at(scratch + (heads.count + h) * floats, rows); };
            if (tile.begun)
                for (int64_t h = 0; h < heads.count; h++) take_up(tile, heads.first + h, sum(h));
            else
                split_of<T>(p_, tile, heads, tile.first_split, sum, room, own, next);
            for (int64_t s = std::max<int64_t>(1, tile.begun); s < tile.splits; s++) {
                split_of<T>(p_, tile, heads, tile.first_split + s, more, room, own, next);
                for (int64_t h = 0; h < heads.count; h++) merge(rows, p_.width(), sum(h), more(h));
            }
            for (int64_t h = 0; h < heads.count; h++) use(tile, heads.first + h, sum(h));
        };
        // One token that sees little takes less time than to tell the threads of it.
        if (p_.batch.tokens == 1 && cut == 0)
            for (int64_t number = 0; number < std::ssize(units); number++) compute(number);
        else
            pool_.run(std::ssize(units), compute);
        pool_.run(cut * kv_heads, [&](int64_t number) {
            const int64_t which = number / kv_heads, head = number % kv_heads;
            const Tile& tile = tiles[which];
            const int64_t rows = tile.tokens * p_.sharing();
            Partial sum = partial(which, head, 0);
            if (tile.begun) {
                sum = at(Pool::scratch(2, floats_of(rows)), rows);
                take_up(tile, head, sum);
            }
            for (int64_t s = tile.begun ? 0 : 1; s < tile.own_splits(); s++) merge(rows, p_.width(), sum, partial(which, head, s));
            use(tile, head, sum);
        });
    }

    // Where a tile's row has its sum in `begun`.
    Partial begun(const Tile& tile, int64_t kv_head, int64_t row) const {
        const int64_t head = kv_head * p_.sharing() + row % p_.sharing();
        float* out = begun_ + (tile.token(row / p_.sharing()) * p_.heads.query + head) * (p_.width() + 2);
        return {out + p_.width(), out};
    }

  private:
    // What a thread computes at a time: some heads of a tile, or of one of its own splits.
    struct Unit {
        int64_t tile;
        HeadRange heads;
        int64_t split;  // or -1
    };

    // How many of the tiles, the first ones, take so long that threads would wait for them.
    int64_t long_ones(std::span<const Tile> tiles) const {
        constexpr int64_t READING = 8;  // bringing K and V to the cache takes as long as so many rows do
        auto cost = [&](const Tile& tile) { return tile.own_splits() * (tile.tokens * p_.sharing() + READING); };
        int64_t all = 0, count = 0;
        for (const Tile& tile : tiles) all += cost(tile);
        all *= p_.heads.kv;
        while (count < std::ssize(tiles) && tiles[count].own_splits() > 1 && cost(tiles[count]) * 4 * pool_.threads() > all) count++;
        return count;
    }

    // Few rows take no longer than what they read, and heads that stand side by side are read faster together: so where there is enough
    // to do for every thread, a unit has all heads, or as many as leave room in the second-level cache for what they read next.
    std::span<const Unit> units_of(std::span<const Tile> tiles, int64_t cut) const {
        constexpr int64_t ROOM = 128 << 10;
        const int64_t kv_heads = p_.heads.kv, enough = p_.batch.tokens == 1 && cut == 0 ? 1 : 4 * pool_.threads();
        const int64_t together = std::clamp<int64_t>(ROOM / (BLOCK * (p_.heads.dim + p_.width()) * static_cast<int64_t>(sizeof(T))), 1, kv_heads);
        int64_t most = 0, count = 0;
        for (int64_t t = 0; t < std::ssize(tiles); t++) most += kv_heads * (t < cut ? tiles[t].own_splits() : 1);
        Unit* units = reinterpret_cast<Unit*>(Pool::scratch(4, most * sizeof(Unit) / sizeof(float)));
        for (int64_t t = 0; t < std::ssize(tiles); t++) {
            const Tile& tile = tiles[t];
            const int64_t splits = t < cut ? tile.own_splits() : 1, others = t < cut ? splits : std::ssize(tiles);
            const int64_t each = tile.tokens * p_.sharing() <= ALONE && others >= enough ? together : 1;
            for (int64_t head = 0; head < kv_heads; head += each)
                for (int64_t s = 0; s < splits; s++) units[count++] = {t, {head, std::min(each, kv_heads - head)}, t < cut ? s : -1};
        }
        return {units, static_cast<size_t>(count)};
    }

    // What a unit reads; nothing if others bring it to the cache too.
    Reading reading_of(std::span<const Tile> tiles, const Unit& unit) const {
        const Tile& tile = tiles[unit.tile];
        if (!tile.listed && tile.tokens < p_.batch.query_start[tile.request + 1] - p_.first_row(tile.request)) return {};
        const int64_t first = tile.first_split + tile.begun + std::max<int64_t>(unit.split, 0);
        const int64_t last = unit.split < 0 ? tile.first_split + tile.splits : first + 1;
        const int64_t begin = std::max(first * SPLIT, p_.first(tile.token(0)) / BLOCK * BLOCK);
        const int64_t seen = p_.batch.positions[tile.token(tile.tokens - 1)] + 1;
        return {p_.table(tile.request), unit.heads.first, unit.heads.count, begin, std::min(last * SPLIT, seen)};
    }

    // What a tile's rows had before it.
    void take_up(const Tile& tile, int64_t kv_head, Partial sum) const {
        const int64_t width = p_.width();
        for (int64_t r = 0; r < tile.tokens * p_.sharing(); r++) {
            const Partial from = begun(tile, kv_head, r);
            std::copy(from.out, from.out + width, sum.out + r * width);
            std::copy(from.state, from.state + 2, sum.state + 2 * r);
        }
    }

    // Floats of a partial sum of so many rows: a multiple of a cache line.
    int64_t floats_of(int64_t rows) const { return (rows * (p_.width() + 2) + 15) / 16 * 16; }

    Partial at(float* floats, int64_t rows) const { return {floats + rows * p_.width(), floats}; }

    Pool& pool_;
    const Problem& p_;
    float* begun_;
};

template <class T>
void attend(Pool& pool, const Problem& p) {
    const Tiles tiles(p);
    const int64_t width = p.width();
    Sums<T> sums(pool, p, tiles.shared.empty() ? nullptr : Pool::scratch(1, p.batch.tokens * p.heads.query * (width + 2)));
    sums.of(tiles.shared, [&](const Tile& tile, int64_t kv_head, const Partial& sum) {
        for (int64_t r = 0; r < tile.tokens * p.sharing(); r++) {
            const Partial to = sums.begun(tile, kv_head, r);
            std::copy(sum.out + r * width, sum.out + (r + 1) * width, to.out);
            std::copy(sum.state + 2 * r, sum.state + 2 * r + 2, to.state);
        }
    });
    sums.of(tiles.own, [&](const Tile& tile, int64_t kv_head, const Partial& sum) { finish(p, tile, kv_head, sum); });
}

}  // namespace

void attention(Pool& pool, const float* q, const Heads& heads, const KV& kv, const Batch& batch, float scale, int window, float* out) {
    const Problem p{q, heads, kv, batch, scale, window, out};
    with_type(kv, [&]<class T>() { attend<T>(pool, p); });
}

}  // namespace headrace::HEADRACE_ISA
