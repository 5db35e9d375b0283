// y = x W^T + b for x and W rounded to bfloat16, with sums in float32.
//
// A code becomes the weight fma(1 + code / 2^b, 2^b * scale, minimum - 2^b * scale), where b is the number of bits of a code,
// and 1 + code / 2^b needs no conversion: the code is the first bits of its fraction. That is scale * code + minimum, rounded once
// wherever minimum - 2^b * scale is exact. Float8 becomes code * scale, rounded once. Weights and x are then rounded to bfloat16, halves
// upwards in magnitude.
//
// For each 32 inputs in turn, with the products of the 16 even ones and of the 16 odd ones each added up by fma from 0 in order:
//
//   acc = acc + (even + odd)
//
// from 0; then the bias is added. Numbers too small for float32's full precision are 0 throughout. That is the whole definition, and what
// AMX computes (Intel SDM, TDPBF16PS), so that every other instruction set gives the same bits, only slower.
//
//   pairs   weights of two inputs side by side, the even one in the lower half: [inputs / 2][PANEL]. A stretch of inputs of some panels is
//           unpacked to pairs once, and read by all rows.
#include <algorithm>
#include <type_traits>

#include "blocks.h"
#include "flushing.h"
#include "rows.h"
#include "tiles.h"

namespace headrace::HEADRACE_ISA {
namespace {

using wide::Floats, wide::Ints;

constexpr int64_t DEPTH = 512;             // inputs unpacked at once: 16 KiB a panel
constexpr int64_t ROWS = 384;              // rows that share them, whose x stays in the second-level cache
constexpr int64_t WORTH = 1 << 19;         // multiply-adds that are worth handing to a thread
constexpr int64_t WORTH_NARROWING = 1 << 15;  // values of x that are
constexpr int SIDE = 2;                    // panels that are unpacked together: each few rows of x are read once for all of them
constexpr int32_t HALF = 0x8000, UPPER = static_cast<int32_t>(0xffff0000);

// Unsigned, as shifts to the right bring zeros.
typedef uint32_t Bits __attribute__((vector_size(sizeof(Ints))));

// (v & mask) ^ flip: one instruction where there is one for any function of three.
inline Ints masked(Ints v, int32_t mask, Ints flip) {
#if defined(__AVX512F__)
    return (Ints)_mm512_ternarylogic_epi32((__m512i)v, _mm512_set1_epi32(mask), (__m512i)flip, 0x6a);
#else
    return (v & mask) ^ flip;
#endif
}

inline void store_pairs(uint32_t* to, Ints even, Ints odd) {
    const Ints pairs = masked(odd, UPPER, (Ints)((Bits)even >> 16));
    std::memcpy(to, &pairs, sizeof pairs);
}

// Codes, a group of inputs at a time.
template <Form F>
struct CodePairs {
    static constexpr int BITS = F == Form::int4 ? 4 : F == Form::int6 ? 6 : 8, PLACE = 23 - BITS;  // of the fraction's first bits
    static constexpr int64_t FOUR = F == Form::int4 ? 2 * PANEL : 4 * PANEL;
    static constexpr int32_t MASK = ((1 << BITS) - 1) << PLACE, ONE = 0x3f800000;
    static constexpr int64_t UNIT = 16;  // inputs of which every group has some
    static constexpr int32_t HIGH = F == Form::int8 ? 128 : 0;  // signed codes are made unsigned by flipping their highest bit

    struct Group {
        Floats factor[PARTS], minimum[PARTS];
    };

    const Linear& w;
    Blocks blocks;
    Floats low;

    explicit CodePairs(const Linear& w) : w(w), blocks(w), low(wide::all(static_cast<float>(-(1 << BITS) - HIGH - w.offset))) {}

    Group group(int64_t panel, int64_t g) const {
        const Scale scale = blocks.scale(panel, g);
        Group group;
        for (int part = 0; part < PARTS; part++) {
            group.factor[part] = scale.factor[part] * wide::all(1 << BITS);
            group.minimum[part] = w.minimums ? wide::fused(low, scale.factor[part], scale.minimum[part]) : low * scale.factor[part];
        }
        return group;
    }

    template <int SHIFT>
    static Ints weight(Ints codes, Floats factor, Floats minimum) {
        const Ints placed = SHIFT < 0 ? codes >> (SHIFT < 0 ? -SHIFT : 0) : codes << (SHIFT < 0 ? 0 : SHIFT);
        const Ints fraction = masked(placed, MASK, Ints{} + (ONE ^ HIGH << PLACE));
        return std::bit_cast<Ints>(wide::fused(std::bit_cast<Floats>(fraction), factor, minimum)) + HALF;
    }

    static void four(const uint8_t* codes, const Group& group, uint32_t* to) {
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
            const Ints v = F == Form::int4 ? wide::nibbles(codes, part) : wide::ints(codes + part * 4 * wide::WIDTH);
            const Floats factor = group.factor[part], minimum = group.minimum[part];
            store_pairs(to + part * wide::WIDTH, weight<PLACE>(v, factor, minimum), weight<PLACE - 8>(v, factor, minimum));
            store_pairs(to + PANEL + part * wide::WIDTH, weight<PLACE - 16>(v, factor, minimum), weight<PLACE - 24>(v, factor, minimum));
        }
    }

    // Inputs [from, to) of a panel, and a word to memory of those that are `ahead` bytes further on.
    void unpack(int64_t panel, int64_t from, int64_t to, int64_t ahead, uint32_t* pairs) const {
        int64_t g = from / w.group, skipped = from - g * w.group;
        for (int64_t left = to - from; left > 0; g++, skipped = 0) {
            const Group scales = group(panel, g);
            const uint8_t* codes = blocks.codes(panel, g) + skipped / 4 * FOUR;
            const int64_t count = std::min(left, w.group - skipped);
            for (int64_t byte = 0; byte < count / 4 * FOUR; byte += 64) __builtin_prefetch(codes + byte + ahead, 0, 2);
            for (int64_t units = count / UNIT; units > 0; units--)
#pragma GCC unroll 8
                for (int i = 0; i < UNIT / 4; i++, codes += FOUR, pairs += 2 * PANEL) four(codes, scales, pairs);
            left -= count;
        }
    }
};

// Float8, a group of inputs at a time.
struct Float8Pairs {
    const Linear& w;
    Blocks blocks;

    explicit Float8Pairs(const Linear& w) : w(w), blocks(w) {}

    void unpack(int64_t panel, int64_t from, int64_t to, int64_t ahead, uint32_t* pairs) const {
        int64_t g = from / w.group, skipped = from - g * w.group;
        for (int64_t left = to - from; left > 0; g++, skipped = 0) {
            const Scale scale = blocks.scale(panel, g);
            Floats factor[PARTS];
            for (int part = 0; part < PARTS; part++) factor[part] = scale.factor[part] * wide::all(wide::FLOAT8);
            const uint8_t* codes = blocks.codes(panel, g) + skipped * PANEL;
            const int64_t count = std::min(left, w.group - skipped);
            for (int64_t four = count / 4; four > 0; four--) {
                __builtin_prefetch(codes + ahead, 0, 2);
#pragma GCC unroll 2
                for (int pair = 0; pair < 2; pair++, codes += 2 * PANEL, pairs += PANEL)
                    for (int part = 0; part < PARTS; part++)
                        store_pairs(pairs + part * wide::WIDTH, weight(codes + part * wide::WIDTH, factor[part]),
                                    weight(codes + PANEL + part * wide::WIDTH, factor[part]));
            }
            left -= count;
        }
    }

  private:
    static Ints weight(const uint8_t* codes, Floats factor) {
        return std::bit_cast<Ints>(wide::widen(reinterpret_cast<const wide::Float8*>(codes)) * factor) + HALF;
    }
};

// Weights that are bfloat16 as they are.
struct FloatPairs {
    const Linear& w;

    void unpack(int64_t panel, int64_t from, int64_t to, int64_t ahead, uint32_t* pairs) const {
        const wide::BFloat* at = reinterpret_cast<const wide::BFloat*>(w.panels + panel * w.panel()) + from * PANEL;
        for (int64_t k = from; k < to; k += 2, at += 2 * PANEL, pairs += PANEL) {
            __builtin_prefetch(reinterpret_cast<const uint8_t*>(at) + ahead, 0, 2);
            for (int part = 0; part < PARTS; part++)
                store_pairs(pairs + part * wide::WIDTH, std::bit_cast<Ints>(wide::widen(at + part * wide::WIDTH)),
                            std::bit_cast<Ints>(wide::widen(at + PANEL + part * wide::WIDTH)));
        }
    }
};

#if defined(HEADRACE_AMX)

struct Means {
    tiles::Paired tiles;

    // Calls each(first, count) for as many rows at a time as `add` takes.
    template <class Each>
    static void some_rows(int64_t rows, const Each& each) {
        constexpr int64_t TALL = 2 * tiles::ROWS;
        for (int64_t r = 0; r < rows; r += TALL) each(r, static_cast<int>(std::min(TALL, rows - r)));
    }

    void add(int count, const uint32_t* const* pairs, int64_t panels, const uint8_t* x, int64_t block, int64_t inputs, float* const* sums) {
        tiles.rows(count);
        auto product = [&]<bool MORE>() {
            if (panels == SIDE)
                tiles::add_pairs<MORE, SIDE>(pairs, x, block, inputs, sums);
            else
                tiles::add_pairs<MORE, 1>(pairs, x, block, inputs, sums);
        };
        count > tiles::ROWS ? product.template operator()<true>() : product.template operator()<false>();
    }
};

#else

struct Means {
    template <class Each>
    static void some_rows(int64_t rows, const Each& each) {
        by_most<4>(rows, [&]<int N>(int64_t r) { each(r, std::integral_constant<int, N>{}); });
    }

    template <int N>
    static void add(std::integral_constant<int, N>, const uint32_t* const* pairs, int64_t panels, const uint8_t* x, int64_t, int64_t inputs,
                    float* const* sums) {
        for (int64_t p = 0; p < panels; p++)
            for (int part = 0; part < PARTS; part++) add_part<N>(pairs[p] + part * wide::WIDTH, x, inputs, sums[p] + part * wide::WIDTH);
    }

  private:
    static Floats lower(Ints pair) { return std::bit_cast<Floats>(pair << 16); }
    static Floats upper(Ints pair) { return std::bit_cast<Floats>(pair & UPPER); }

    template <int N>
    static void add_part(const uint32_t* pairs, const uint8_t* x, int64_t inputs, float* sums) {
        Floats acc[N];
        for (int r = 0; r < N; r++) acc[r] = wide::load(sums + r * PANEL);
        for (int64_t k = 0; k < inputs; k += QUANTUM, x += 64 * NARROWED, pairs += QUANTUM / 2 * PANEL) {
            Floats even[N], odd[N];
            for (int r = 0; r < N; r++) even[r] = odd[r] = wide::all(0.0f);
            for (int64_t pair = 0; pair < QUANTUM / 2; pair++) {
                const Ints two = wide::ints(pairs + pair * PANEL);
#pragma GCC unroll 4
                for (int r = 0; r < N; r++) {
                    int32_t both;
                    std::memcpy(&both, x + r * 64 + 4 * pair, sizeof both);
                    even[r] = wide::fused(lower(Ints{} + both), lower(two), even[r]);
                    odd[r] = wide::fused(upper(Ints{} + both), upper(two), odd[r]);
                }
            }
            for (int r = 0; r < N; r++) acc[r] += even[r] + odd[r];
        }
        for (int r = 0; r < N; r++) wide::store(sums + r * PANEL, acc[r]);
    }
};

#endif

template <class Pairs>
struct Product {
    const Linear& w;
    Pairs source;
    int64_t block;  // bytes of NARROWED rows of x

    explicit Product(const Linear& w) : w(w), source{w}, block(narrowed_bytes(w, NARROWED)) {}

    // Of up to SIDE panels.
    void some_panels(const uint8_t* x, int64_t rows, int64_t panel, int64_t panels, float* y, int64_t width) const {
        alignas(64) uint32_t pairs[SIDE][DEPTH / 2 * PANEL];
        alignas(64) float sums[SIDE][ROWS * PANEL];
        for (int64_t p = 0; p < panels; p++) std::fill(sums[p], sums[p] + rows * PANEL, 0.0f);
        Means means;
        // Stretches of about equal length.
        const int64_t stretches = (w.inputs + DEPTH - 1) / DEPTH, units = w.inputs / QUANTUM;
        const int64_t longest = (units + stretches - 1) / stretches * QUANTUM;
        for (int64_t from = 0; from < w.inputs; from += longest) {
            const int64_t to = std::min(w.inputs, from + longest);
            for (int64_t p = 0; p < panels; p++) source.unpack(panel + p, from, to, SIDE * w.panel(), pairs[p]);
            Means::some_rows(rows, [&](int64_t r, auto count) {
                const uint32_t* of[SIDE] = {pairs[0], pairs[1]};
                if (from == 0)
                    for (int i = 0; i < count; i++)
                        for (int64_t p = 0; p < panels; p++) __builtin_prefetch(y + (r + i) * width + (panel + p) * PANEL, 1, 2);
                float* to_add[SIDE] = {sums[0] + r * PANEL, sums[1] + r * PANEL};
                means.add(count, of, panels, x + r / NARROWED * block + r % NARROWED * 64 + from * 2 * NARROWED, block, to - from, to_add);
            });
        }
        for (int64_t p = 0; p < panels; p++) finish(w, panel + p, sums[p], rows, y, width);
    }

};

template <class Work>
void with_product(const Linear& w, const Work& work) {
    switch (w.form) {
        case Form::int4: return work(Product<CodePairs<Form::int4>>(w));
        case Form::int6: return work(Product<CodePairs<Form::int6>>(w));
        case Form::int8: return work(Product<CodePairs<Form::int8>>(w));
        case Form::e4m3: return work(Product<Float8Pairs>(w));
        default: return work(Product<FloatPairs>(w));
    }
}

}  // namespace

void linear_bf16(Pool& pool, const Linear& w, const uint8_t* x, int64_t rows, float* y, int64_t width) {
    const int64_t panels = (w.outputs + PANEL - 1) / PANEL;
    // Blocks of rows are about equal, and whole ones of x; a unit of work is some panels of one block: enough to be worth a hand-over, enough of them to
    // balance.
    const int64_t blocks = (rows + ROWS - 1) / ROWS, height = ((rows + blocks - 1) / blocks + NARROWED - 1) / NARROWED * NARROWED;
    const int64_t wanted = std::max<int64_t>(1, WORTH / (height * w.inputs * PANEL));
    const int64_t most = std::max<int64_t>(1, panels / (4 * pool.threads()));
    const int64_t each = (std::min(wanted, most) + SIDE - 1) / SIDE * SIDE, groups = (panels + each - 1) / each;
    with_product(w, [&](const auto& product) {
        pool.run(groups * blocks, [&](int64_t unit) {
            Flushing flushing;
            const int64_t row = unit / groups * height, count = std::min(height, rows - row), last = std::min(panels, (unit % groups + 1) * each);
            for (int64_t panel = unit % groups * each; panel < last; panel += SIDE)
                product.some_panels(x + row / NARROWED * product.block, count, panel, std::min<int64_t>(SIDE, last - panel), y + row * width, width);
        });
    });
}

void narrow(Pool& pool, const Linear& w, const float* x, int64_t rows, uint8_t* narrowed) {
    const int64_t each = std::max<int64_t>(1, WORTH_NARROWING / w.inputs), block = narrowed_bytes(w, NARROWED);
    pool.run((rows + each - 1) / each, [&](int64_t unit) {
        for (int64_t r = unit * each; r < std::min(rows, (unit + 1) * each); r++) {
            uint8_t* out = narrowed + r / NARROWED * block + r % NARROWED * 64;
            for (int64_t from = 0; from < w.inputs; from += QUANTUM, out += 64 * NARROWED) {
                uint16_t line[QUANTUM];
                for (int64_t k = 0; k < QUANTUM; k++) {
                    const uint32_t bits = std::bit_cast<uint32_t>(x[r * w.inputs + from + k]);
                    // What is not a number must not become one by a carry.
                    line[k] = static_cast<uint16_t>(((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : bits + HALF) >> 16);
                }
                std::memcpy(out, line, sizeof line);
            }
        }
    });
}

}  // namespace headrace::HEADRACE_ISA
