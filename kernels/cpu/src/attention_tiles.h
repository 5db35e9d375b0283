// How a batch's attention is cut: into tiles, one KV head of some tokens with all query heads that read it, so that K and V come to the
// cache once for all rows of a tile.
//
//   a tile      tokens of one request that follow each other
//   shared      one token or a few of each of several requests, and the splits of their sequences that lie in the very same pages: what a
//               common prefix is made of. Their own tiles go on behind it
//
// Which rows stand beside a row changes nothing of what it takes, nor in which order.
#pragma once

#include <algorithm>
#include <span>

#include "ops.h"

namespace headrace::HEADRACE_ISA {

constexpr int64_t BLOCK = 64;
constexpr int64_t SPLIT = 256;
constexpr int64_t TILE_ROWS = 48;
constexpr int64_t ALONE = 16;  // rows of a tile up to which it gains from rows of others beside them

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
    const int32_t* table(int64_t request) const { return batch.pages + request * batch.table_width; }
};

struct Tile {
    int64_t request;              // whose pages are read
    const int32_t* listed;        // its tokens, or null where they follow each other
    int64_t from, tokens;         // the first, and how many
    int64_t first_split, splits;  // that any of them sees
    int64_t begun;                // of these, the first ones, which a shared tile does
    bool tree;                    // one token of a tree

    int64_t token(int64_t i) const { return listed ? listed[i] : from + i; }
    int64_t own_splits() const { return splits - begun; }
};

class Tiles {
  public:
    std::span<Tile> own, shared;

    // Those with most to see come first, so that no thread is left with a long one at the end.
    explicit Tiles(const Problem& p) : p_(p) {
        const int64_t most = p.batch.tokens + p.batch.requests;
        const size_t numbers = most + p.batch.tokens;
        Tile* room = reinterpret_cast<Tile*>(Pool::scratch(0, (2 * most * sizeof(Tile) + numbers * sizeof(int32_t)) / sizeof(float)));
        int32_t* order = reinterpret_cast<int32_t*>(room + 2 * most);
        own = {room, static_cast<size_t>(cut(room))};
        shared = {room + most, static_cast<size_t>(share(room + most, order, order + most))};
        auto longer = [](const Tile& a, const Tile& b) {
            return a.own_splits() != b.own_splits() ? a.own_splits() > b.own_splits() : a.from < b.from;
        };
        std::sort(own.begin(), own.end(), longer);
        std::sort(shared.begin(), shared.end(), longer);
    }

  private:
    // Whether a request's rows are anything but one sequence.
    bool is_tree(int64_t request) const {
        if (!p_.batch.parents) return false;
        const int64_t first = p_.first_row(request);
        for (int64_t row = first; row < p_.batch.query_start[request + 1]; row++)
            if (p_.batch.parents[row] != row - first - 1) return true;
        return false;
    }

    int64_t cut(Tile* tiles) const {
        int64_t count = 0;
        for (int64_t r = 0; r < p_.batch.requests; r++) {
            const bool tree = is_tree(r);
            const int64_t most = tree ? 1 : std::max<int64_t>(1, TILE_ROWS / p_.sharing()), end = p_.batch.query_start[r + 1];
            for (int64_t from = p_.first_row(r); from < end; from += most) {
                Tile& tile = tiles[count++] = {r, nullptr, from, std::min(most, end - from), INT64_MAX, 0, 0, tree};
                int64_t last = 0;
                for (int64_t token = from; token < from + tile.tokens; token++) {
                    tile.first_split = std::min(tile.first_split, p_.first(token) / SPLIT);
                    last = std::max<int64_t>(last, p_.batch.positions[token] / SPLIT);
                }
                tile.splits = last + 1 - tile.first_split;
            }
        }
        return count;
    }

    // Whole splits that the tile's tokens see, and that others may share.
    int64_t whole_splits(const Tile& tile) const { return (p_.batch.positions[tile.from] + 1) / SPLIT; }

    std::span<const int32_t> whole_pages(const Tile& tile) const {
        const int64_t size = p_.kv.page_size;
        return {p_.table(tile.request), static_cast<size_t>((whole_splits(tile) * SPLIT + size - 1) / size)};
    }

    // Splits that two tiles both see whole, and in the same pages.
    int64_t in_common(const Tile& a, const Tile& b) const {
        const auto x = whole_pages(a), y = whole_pages(b);
        const int64_t pages = std::mismatch(x.begin(), x.end(), y.begin(), y.end()).first - x.begin();
        return std::min({pages * p_.kv.page_size / SPLIT, whole_splits(a), whole_splits(b)});
    }

    // Makes tiles of what some of the own have in common. `order` has room for all of these, `tokens` for all tokens.
    int64_t share(Tile* tiles, int32_t* order, int32_t* tokens) {
        if (p_.window || p_.batch.requests == 1) return 0;
        int64_t candidates = 0, count = 0;
        for (size_t i = 0; i < own.size(); i++)
            if (!own[i].tree && own[i].tokens * p_.sharing() <= ALONE && whole_splits(own[i]) > 0) order[candidates++] = static_cast<int32_t>(i);
        // So that those with most in common stand side by side.
        std::sort(order, order + candidates, [&](int32_t a, int32_t b) {
            const auto x = whole_pages(own[a]), y = whole_pages(own[b]);
            return std::lexicographical_compare(x.begin(), x.end(), y.begin(), y.end());
        });
        for (int64_t i = 0, end; i < candidates; i = end) {
            int64_t splits = whole_splits(own[order[i]]), rows = own[order[i]].tokens * p_.sharing();
            for (end = i + 1; end < candidates; end++) {
                const Tile& next = own[order[end]];
                const int64_t common = std::min(splits, in_common(own[order[end - 1]], next)), alike = end - i;
                // Another one must not cost the others more than it gains.
                if (common == 0 || common * alike < splits * (alike - 1) || rows + next.tokens * p_.sharing() > TILE_ROWS) break;
                splits = common;
                rows += next.tokens * p_.sharing();
            }
            if (end == i + 1) continue;
            Tile& tile = tiles[count++] = {own[order[i]].request, tokens, own[order[i]].from, 0, 0, splits, 0, false};
            for (int64_t member = i; member < end; member++) {
                Tile& one = own[order[member]];
                one.begun = splits;
                for (int64_t token = one.from; token < one.from + one.tokens; token++) *tokens++ = static_cast<int32_t>(token);
                tile.tokens += one.tokens;
            }
        }
        return count;
    }

    const Problem& p_;
};

}  // namespace headrace::HEADRACE_ISA
