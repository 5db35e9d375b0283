// The order of tokens, by falling logit and equal ones by id, and the running sum of their weights in it, without sorting a row.
//
// The weight of a token is e^((logit - largest) / temperature) as an integer, in units of 2^-44. Sums of integers are exact, so that they may
// be taken in any order, by any instruction set; and the exponential is that of `kernels/reference/exact.py`, operation by operation.
//
//     row ─▶ 1024 intervals of the logit, with the sum of weights in each ─▶ the interval where the running sum passes a number
//              ▲                                                                │ its tokens
//              └──────────────── while they are many ◀──────────────────────────┴─▶ sort them, walk
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "vec.h"

namespace headrace::HEADRACE_ISA {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr double UNIT = static_cast<double>(INT64_C(1) << 44);  // what a probability of 1 is before it is normalized
constexpr float REACH = 31.0f;                                  // e^-31 is no unit any more
constexpr int INTERVALS = 1024;
constexpr int64_t FEW = 256;    // tokens that are sorted at once
constexpr int64_t CHUNK = 512;  // tokens that are worked on while they lie in the nearest cache; sums of 22 bits of so few fit 32

typedef uint16_t Shorts __attribute__((vector_size(16)));
typedef int64_t Longs __attribute__((vector_size(32)));

inline bool any(Ints mask) {
    Longs m = std::bit_cast<Longs>(mask);
    return m[0] | m[1] | m[2] | m[3];
}

inline float min_lane(Vec v) { return -max_lane(-v); }

// work(i, vector) for eight of `count` floats at a time; the last vector is filled up with minus infinity.
template <class Work>
inline void each(const float* values, int64_t count, const Work& work) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) work(i, load(values + i));
    if (i < count) {
        Vec last = all(-INF);
        std::memcpy(&last, values + i, (count - i) * sizeof(float));
        work(i, last);
    }
}

struct Extent {
    float largest, smallest;
    bool nan;
};

inline Extent extent(const float* values, int64_t count) {
    constexpr int CHAINS = 4;
    Vec high[CHAINS], low[CHAINS];
    Ints bad[CHAINS] = {};
    for (int c = 0; c < CHAINS; c++) high[c] = all(-INF), low[c] = all(INF);
    int64_t i = 0;
    for (; i + CHAINS * LANES <= count; i += CHAINS * LANES)
        for (int c = 0; c < CHAINS; c++) {
            Vec v = load(values + i + c * LANES);
            high[c] = larger(v, high[c]);
            low[c] = select(v < low[c], v, low[c]);
            bad[c] |= v != v;
        }
    for (int c = 1; c < CHAINS; c++) {
        high[0] = larger(high[0], high[c]);
        low[0] = select(low[0] < low[c], low[0], low[c]);
        bad[0] |= bad[c];
    }
    Extent found{max_lane(high[0]), min_lane(low[0]), any(bad[0])};
    for (; i < count; i++) {
        found.largest = std::max(found.largest, values[i]);
        found.smallest = std::min(found.smallest, values[i]);
        found.nan |= values[i] != values[i];
    }
    return found;
}

// The lowest id of a value that is there.
inline int64_t find(const float* values, int64_t count, float value) {
    int64_t i = 0;
    while (i + LANES <= count && !any(load(values + i) == all(value))) i += LANES;
    while (values[i] != value) i++;
    return i;
}

// Weights for exponents that are not positive, as floats whose whole part counts.
inline Vec weights(Vec x) {
    x = larger(x, all(-87.0f));
    // adding and subtracting 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits of the sum
    Vec shifted = x * all(1.4426950408889634f) + all(12582912.0f);
    Vec n = shifted - all(12582912.0f);
    Vec r = x - n * all(0.693359375f) - n * all(-2.12194440e-4f);
    Vec p = r * all(1.9875691500e-4f);
    p = (p + all(1.3981999507e-3f)) * r;
    p = (p + all(8.3334519073e-3f)) * r;
    p = (p + all(4.1665795894e-2f)) * r;
    p = (p + all(1.6666665459e-1f)) * r;
    p = (p + all(5.0000001201e-1f)) * r;
    p = p * r + r + all(1.0f);
    return p * std::bit_cast<Vec>((std::bit_cast<Ints>(shifted) << 23) + ((127 + 44) << 23));
}

// A sum of the whole parts of weights.
class Sum {
  public:
    void add(Vec weights) {
        Ints high = __builtin_convertvector(weights * all(0x1p-22f), Ints);
        high_ += high;
        low_ += __builtin_convertvector(weights - __builtin_convertvector(high, Vec) * all(0x1p22f), Ints);
    }

    // To be called after no more than CHUNK weights: 32 bits hold no more.
    void carry() {
        for (int lane = 0; lane < LANES; lane++) total += (static_cast<int64_t>(high_[lane]) << 22) + low_[lane];
        high_ = low_ = Ints{};
    }

    int64_t total = 0;

  private:
    Ints high_ = {}, low_ = {};  // in units of 2^22, and of 1
};

// The sum of weights of those tokens whose exponent is at least `least`.
inline int64_t mass(const float* values, int64_t count, float largest, float temperature, float least) {
    Sum sum;
    for (int64_t start = 0; start < count; start += CHUNK) {
        each(values + start, std::min(CHUNK, count - start), [&](int64_t, Vec v) {
            Vec x = (v - all(largest)) / all(temperature);
            sum.add(select(x >= all(least), weights(x), Vec{}));
        });
        sum.carry();
    }
    return sum.total;
}

// Logit and id in one integer, which rises along the order: the bits of floats rise as the floats do, save that negative ones fall.
inline int64_t key_of(float value, int64_t id) {
    const int32_t bits = std::bit_cast<int32_t>(value);
    const int64_t rank = bits < 0 ? bits & 0x7FFFFFFF : -static_cast<int64_t>(bits);
    return rank * (INT64_C(1) << 32) + id;
}

inline int32_t id_of(int64_t key) { return static_cast<int32_t>(key & 0xFFFFFFFF); }

inline float value_of(int64_t key) {
    const int64_t rank = key >> 32;
    return std::bit_cast<float>(static_cast<int32_t>(rank > 0 ? rank | 0x80000000 : -rank));
}

// The keys of the first `wanted` tokens in order.
inline void head(const float* values, int64_t count, int64_t wanted, std::vector<int64_t>& keys) {
    keys.clear();
    if (wanted == 0) return;
    // What is no better than the worst of `wanted` others is out. Of equal ones, later ones have the higher id: they are out too.
    const size_t room = wanted < count ? 2 * wanted + 64 : count;
    Vec floor = all(-INF);
    bool full = false;
    for (int64_t start = 0; start < count; start += 4 * LANES) {
        const int64_t stop = std::min(count, start + 4 * LANES);
        if (full && stop - start == 4 * LANES) {
            const float* p = values + start;
            if (!any((load(p) > floor) | (load(p + LANES) > floor) | (load(p + 2 * LANES) > floor) | (load(p + 3 * LANES) > floor))) continue;
        }
        for (int64_t i = start; i < stop; i++) {
            if (full && !(values[i] > floor[0])) continue;
            keys.push_back(key_of(values[i], i));
            if (keys.size() <= room) continue;
            std::nth_element(keys.begin(), keys.begin() + wanted - 1, keys.end());
            keys.resize(wanted);
            floor = all(value_of(keys.back()));
            full = true;
        }
    }
    std::sort(keys.begin(), keys.end());
    keys.resize(std::min<size_t>(keys.size(), wanted));
}

// Where a walk along the order ends: the sum of weights before the token and with it.
struct Stop {
    int64_t before, after;
    int32_t id;
};

constexpr int64_t NEVER = std::numeric_limits<int64_t>::max();

// A set of tokens, sorted into intervals of the logit of equal width: equal logits fall into the same.
class Intervals {
  public:
    int64_t sums[INTERVALS];
    int32_t counts[INTERVALS];
    int64_t likely;  // the sum of weights of those tokens whose exponent is at least the wanted one

    // Exponents are taken against `largest`, intervals begin at the extent's. Counts, and `likely`, only where they are wanted.
    void split(const float* values, int64_t count, const Extent& extent, float largest, float temperature, bool counted, float least) {
        // Beyond REACH all weights are 0. What infinity makes of these two numbers is set right: an index is always within bounds.
        const float span = std::min({extent.largest - extent.smallest, REACH * temperature, FLT_MAX});
        const float scale = std::min((INTERVALS - 1) / span, FLT_MAX);
        std::fill_n(sums, INTERVALS, 0);
        std::fill_n(more_, INTERVALS, 0);
        std::fill_n(counts, INTERVALS, 0);
        Sum sum;
        if (static_cast<int64_t>(index_.size()) < count + LANES) index_.resize(count + LANES);
        for (int64_t start = 0; start < count; start += CHUNK) {
            const int64_t size = std::min(CHUNK, count - start);
            alignas(32) float weight[CHUNK + LANES];
            uint16_t* index = index_.data() + start;
            each(values + start, size, [&](int64_t i, Vec v) {
                Vec x = (v - all(largest)) / all(temperature), w = weights(x);
                store(weight + i, w);
                if (least > -INF) sum.add(select(x >= all(least), w, Vec{}));
                Vec place = (all(extent.largest) - v) * all(scale);
                place = select(place < all(INTERVALS - 1), place, all(INTERVALS - 1));
                Shorts shorts = __builtin_convertvector(__builtin_convertvector(place, Ints), Shorts);
                std::memcpy(index + i, &shorts, sizeof shorts);
            });
            // Two sums an interval, so that an addition need not wait for the one before.
            int64_t i = 0;
            for (; i + 2 <= size; i += 2) {
                sums[index[i]] += static_cast<int64_t>(weight[i]);
                more_[index[i + 1]] += static_cast<int64_t>(weight[i + 1]);
            }
            if (i < size) sums[index[i]] += static_cast<int64_t>(weight[i]);
            if (counted)
                for (i = 0; i < size; i++) counts[index[i]]++;
            sum.carry();
        }
        for (int i = 0; i < INTERVALS; i++) sums[i] += more_[i];
        likely = sum.total;
    }

    // The places in the set of the tokens of an interval, in the order of the set. Returns how many there are.
    int64_t members(int interval, int64_t count, std::vector<int32_t>& places) const {
        if (static_cast<int64_t>(places.size()) < count) places.resize(count);
        int64_t found = 0;
        constexpr int64_t BLOCK = 32;
        for (int64_t start = 0; start < count; start += BLOCK) {
            const int64_t stop = std::min(count, start + BLOCK);
            bool some = stop - start < BLOCK;
            if (!some) {
                uint16_t different = 0xFFFF;
                for (int64_t i = 0; i < BLOCK; i++) different = std::min<uint16_t>(different, index_[start + i] ^ interval);
                some = different == 0;
            }
            if (!some) continue;
            for (int64_t i = start; i < stop; i++) {
                places[found] = static_cast<int32_t>(i);
                found += index_[i] == interval;
            }
        }
        return found;
    }

  private:
    int64_t more_[INTERVALS];
    std::vector<uint16_t> index_;  // each token's interval
};

// A walk along the order of a row, or of its first `top_k` tokens. One at a time on a thread.
class Walk {
  public:
    Walk(const float* values, int64_t count, const Extent& extent, float temperature, int64_t top_k, float least)
        : room_(room()), values_(values), count_(count), extent_(extent), temperature_(temperature) {
        const bool limited = 0 < top_k && top_k < count;
        const int64_t kept = limited ? top_k : count;
        if (kept <= FEW) {
            head(values, count, kept, room_.keys);
            sorted_ = true;
            mass = walk(0, NEVER, kept).after;
            float first[FEW];
            for (int64_t i = 0; i < kept; i++) first[i] = value_of(room_.keys[i]);
            likely = least > -INF ? HEADRACE_ISA::mass(first, kept, extent.largest, temperature, least) : mass;
        } else {
            Intervals& row = room_.row;
            row.split(values, count, extent, extent.largest, temperature, limited, least);
            mass = limited ? stop(NEVER, kept).after : std::accumulate(row.sums, row.sums + INTERVALS, int64_t{0});
            likely = least > -INF ? row.likely : mass;
        }
    }

    int64_t mass;    // the sum of all weights
    int64_t likely;  // that of tokens whose exponent is at least `least`; it may be more than `mass`

    // The first token with which the sum exceeds `sum`.
    Stop past(int64_t sum) { return stop(sum, NEVER); }

  private:
    struct Room {
        Intervals row, part;
        std::vector<int64_t> keys;
        std::vector<int32_t> places, ids;
        std::vector<float> values;
    };

    static Room& room() {
        thread_local Room one;
        return one;
    }

    // The first token with which the sum exceeds `sum`, or the one of number `limit`, counted from 1.
    Stop stop(int64_t sum, int64_t limit) {
        if (sorted_) return walk(0, sum, limit);
        int64_t before = 0, size = choose(room_.row, before, sum, limit, count_);
        if (size == 0) return {before, before, 0};
        auto& [row, part, keys, places, ids, values] = room_;
        ids.assign(places.begin(), places.begin() + size);
        while (true) {
            if (values.size() < ids.size()) values.resize(ids.size());
            for (size_t i = 0; i < ids.size(); i++) values[i] = values_[ids[i]];
            const Extent part_extent = extent(values.data(), size);
            if (part_extent.largest == part_extent.smallest) return among_equals(before, sum, limit, part_extent.largest);
            if (size <= FEW) break;
            part.split(values.data(), size, part_extent, extent_.largest, temperature_, limit != NEVER, -INF);
            const int64_t chosen = choose(part, before, sum, limit, size);
            if (chosen == 0) return {before, before, 0};
            if (chosen == size) break;  // logits so near to each other that floats hardly tell: sort them
            for (int64_t i = 0; i < chosen; i++) ids[i] = ids[places[i]];
            ids.resize(size = chosen);
        }
        keys.resize(size);
        for (int64_t i = 0; i < size; i++) keys[i] = key_of(values_[ids[i]], ids[i]);
        std::sort(keys.begin(), keys.end());
        return walk(before, sum, limit);
    }

    // Finds the interval in which the walk ends, and its members; there are none where they would all weigh nothing.
    // `before` and `limit` become the sum, and the number of tokens left, at the interval's begin.
    int64_t choose(const Intervals& intervals, int64_t& before, int64_t sum, int64_t& limit, int64_t count) {
        int last = INTERVALS - 1, i = 0;
        for (; i < last && before + intervals.sums[i] <= sum && (limit == NEVER || intervals.counts[i] < limit); i++) {
            before += intervals.sums[i];
            if (limit != NEVER) limit -= intervals.counts[i];
        }
        if (intervals.sums[i] == 0) return 0;
        return intervals.members(i, count, room_.places);
    }

    Stop among_equals(int64_t before, int64_t sum, int64_t limit, float value) const {
        const auto& ids = room_.ids;
        const int64_t each = weight(value);
        int64_t place = std::min<int64_t>(limit, ids.size()) - 1;
        if (sum != NEVER && each > 0) place = std::min(place, (sum - before) / each);
        return {before + place * each, before + (place + 1) * each, ids[place]};
    }

    // Along the sorted keys.
    Stop walk(int64_t before, int64_t sum, int64_t limit) const {
        const auto& keys = room_.keys;
        const int64_t count = std::min<int64_t>(limit, keys.size());
        Stop at{before, before, id_of(keys[0])};
        for (int64_t start = 0; start < count; start += LANES) {
            const int64_t size = std::min<int64_t>(LANES, count - start);
            Vec v = all(-INF);
            for (int64_t i = 0; i < size; i++) v[i] = value_of(keys[start + i]);
            const Vec w = weights((v - all(extent_.largest)) / all(temperature_));
            for (int64_t i = 0; i < size; i++) {
                at = {at.after, at.after + static_cast<int64_t>(w[i]), id_of(keys[start + i])};
                if (at.after > sum) return at;
            }
        }
        return at;
    }

    int64_t weight(float value) const {
        return static_cast<int64_t>(weights((all(value) - all(extent_.largest)) / all(temperature_))[0]);
    }

    Room& room_;
    const float* values_;
    int64_t count_;
    Extent extent_;
    float temperature_;
    bool sorted_ = false;
};

}  // namespace headrace::HEADRACE_ISA
