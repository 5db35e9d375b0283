// y = x W^T + b for codes and x as int8.
//
// For each unit of inputs in turn (32, or the group if that is 16), with the unit's exact sum of code * x:
//
//   acc = fma(minimum, x's sum times its scale, acc) if there are minimums, then acc = fma(sum * x's scale, scale, acc)
//
// from 0; then the bias is added. That is the whole definition, whatever the number of rows, the instruction set and however the work
// is cut. Two ways differ in where things lie meanwhile:
//
//   few rows    codes and scales are unpacked in registers, straight from the stream of blocks
//   more rows   a stretch of inputs of some panels is unpacked once into scratch, and read by all rows, a few at a time, or with AMX 16
#include <algorithm>

#include "dots.h"
#include "rows.h"
#include "tiles.h"

namespace headrace::HEADRACE_ISA {
namespace {

using wide::Floats;

// FEW: rows up to which codes are unpacked anew for every few of them. DEPTH: inputs unpacked at once. ROWS: rows that share them, whose x
// stays in the second-level cache. TALL: rows whose sums stay in registers together.
#if defined(HEADRACE_AMX)
constexpr int64_t FEW = 16, DEPTH = 256, ROWS = 192;
constexpr int TALL = 8;
#elif defined(__AVX512VNNI__)
constexpr int64_t FEW = 16, DEPTH = 640, ROWS = 96;
constexpr int TALL = 8;
#else
constexpr int64_t FEW = 8, DEPTH = 640, ROWS = 96;
#if defined(__AVX2__)
constexpr int TALL = 4;
#else
constexpr int TALL = 1;
#endif
#endif
constexpr int64_t WORTH = 1 << 19;  // multiply-adds that are worth handing to a thread

constexpr int SIDE = 2;             // panels that are unpacked together: each few rows of x are read once for all of them

// A unit of inputs of a panel, unpacked: scales, minimums, and a byte a code, for 4 inputs at a time.
template <int UNIT>
struct Unpacked {
    float scales[PANEL], minimums[PANEL];
    uint8_t codes[UNIT * PANEL];
};

// The units of a panel in turn, as they are stored.
template <Form F, int UNIT>
struct Stream {
    static constexpr bool PACKED = F == Form::int4;
    static constexpr int VECTORS = PARTS;
    static constexpr int64_t BYTES = UNIT * PANEL / (PACKED ? 2 : 1);

    const Blocks& blocks;
    int64_t panel, units;  // a group
    int64_t group = -1, left = 0;
    const uint8_t* codes = nullptr;
    Scale scale;

    Stream(const Blocks& blocks, int64_t panel, int64_t group) : blocks(blocks), panel(panel), units(group / UNIT) {}

    const uint8_t* next() {
        if (left == 0) {
            left = units;
            scale = blocks.scale(panel, ++group);
            codes = blocks.codes(panel, group) - BYTES;
        }
        left--;
        for (int64_t byte = 0; byte < BYTES; byte += 64) __builtin_prefetch(codes + BYTES + AHEAD + byte, 0, 2);
        return codes += BYTES;
    }
    Floats factor(int v) const { return scale.factor[v]; }
    Floats minimum(int v) const { return scale.minimum[v]; }
};

// Units in turn that were unpacked.
template <int UNIT>
struct Scratch {
    static constexpr bool PACKED = false;
    static constexpr int VECTORS = PARTS;

    const Unpacked<UNIT>* unit;

    const uint8_t* next() { return (unit++)->codes; }
    Floats factor(int v) const { return wide::load(unit[-1].scales + v * wide::WIDTH); }
    Floats minimum(int v) const { return wide::load(unit[-1].minimums + v * wide::WIDTH); }
};

inline float float_at(const uint8_t* p) {
    float v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// What every code is too high by, where its minimum does not say it; x's sum times that is a whole number, and so exact.
template <Form F, bool minimums, int bias>
struct High {
    static constexpr bool ANY = !minimums && (F != Form::int8 || bias != 0);
    Floats high;

    explicit High(int offset) : high(wide::all(static_cast<float>(-offset - bias))) {}

    Floats take_off(Floats sum, Floats x_sum) const {
        if constexpr (ANY) sum = wide::fma(high, x_sum, sum);
        return sum;
    }
};

// Adds a unit's exact sum to an output: the definition above.
template <bool minimums, class Units, class TooHigh>
inline Floats add_sum(Floats acc, wide::Ints products, const TooHigh& high, Floats x_scale, Floats x_sum, const Units& units, int v) {
    const Floats sum = high.take_off(wide::floats(products), x_sum);
    if constexpr (minimums) acc = wide::fused(units.minimum(v), x_sum, acc);
    return wide::fused(sum * x_scale, units.factor(v), acc);
}

// Adds the next `steps` * QUANTUM inputs of N rows of x to sums [N][outputs of the units].
template <Form F, int UNIT, bool minimums, int N, class Units>
inline void add_rows(Units units, int offset, const uint8_t* x, int64_t stride, int64_t steps, float* sums) {
    constexpr int V = Units::VECTORS;
    constexpr int64_t STEP = quantized_step(UNIT);
    const High<F, minimums, BIAS<F, minimums>> high(offset);
    Floats acc[N][V];
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) acc[r][v] = wide::load(sums + (r * V + v) * wide::WIDTH);
    for (; steps > 0; steps--, x += STEP)
#pragma GCC unroll 2
        for (int unit = 0; unit < QUANTUM / UNIT; unit++) {
            const uint8_t* codes = units.next();
            wide::Ints products[N][V];
            sum_unit<F, minimums, Units::PACKED, UNIT / 4, N>(codes, x + STEP - QUANTUM + unit * UNIT, stride, products);
#pragma GCC unroll 8
            for (int r = 0; r < N; r++) {
                const Floats x_scale = wide::all(float_at(x + r * stride)), x_sum = wide::all(float_at(x + r * stride + 4 + 4 * unit));
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) acc[r][v] = add_sum<minimums>(acc[r][v], products[r][v], high, x_scale, x_sum, units, v);
            }
        }
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) wide::store(sums + (r * V + v) * wide::WIDTH, acc[r][v]);
}

#if defined(HEADRACE_AMX)
// The same for unpacked units, by tiles: the products of some units, then the sums, which stay in registers meanwhile, a row in each.
// One unit at a time would have every sum wait for its product to come back from the tile.
template <Form F, int UNIT, bool minimums, int N>
inline void add_rows_by_tiles(tiles::Configured<UNIT / 4>& tiles, Scratch<UNIT> units, int offset, const uint8_t* x, int64_t stride,
                              int64_t steps, float* sums) {
    constexpr int64_t STEP = quantized_step(UNIT), PER_STEP = QUANTUM / UNIT, TOGETHER = 8;
    const High<F, minimums, 0> high(offset);
    tiles.rows(N);
    alignas(64) int32_t products[TOGETHER][N][PANEL];
    Floats acc[N][PARTS];
#pragma GCC unroll 16
    for (int r = 0; r < N; r++)
        for (int v = 0; v < PARTS; v++) acc[r][v] = wide::load(sums + r * PANEL + v * wide::WIDTH);
    while (steps > 0) {
        const int64_t now = std::min(steps, TOGETHER / PER_STEP);
        Scratch<UNIT> ahead = units;
        for (int64_t unit = 0; unit < now * PER_STEP; unit++)
            tiles::multiply<F>(ahead.next(), x + unit / PER_STEP * STEP + STEP - QUANTUM + unit % PER_STEP * UNIT, stride, products[unit][0]);
        for (int64_t step = 0; step < now; step++, x += STEP)
#pragma GCC unroll 2
            for (int unit = 0; unit < PER_STEP; unit++) {
                units.next();
#pragma GCC unroll 16
                for (int r = 0; r < N; r++) {
                    const Floats x_scale = wide::all(float_at(x + r * stride)), x_sum = wide::all(float_at(x + r * stride + 4 + 4 * unit));
                    const int32_t* product = products[step * PER_STEP + unit][r];
                    for (int v = 0; v < PARTS; v++)
                        acc[r][v] = add_sum<minimums>(acc[r][v], wide::ints(product + v * wide::WIDTH), high, x_scale, x_sum, units, v);
                }
            }
        steps -= now;
    }
#pragma GCC unroll 16
    for (int r = 0; r < N; r++)
        for (int v = 0; v < PARTS; v++) wide::store(sums + r * PANEL + v * wide::WIDTH, acc[r][v]);
}
#endif

// The panels that come next, asked for bit by bit while these are computed: their stream has stopped, and the machine has lost it.
struct Ahead {
    const uint8_t *at, *end;
    int64_t each;

    Ahead(const uint8_t* begin, const uint8_t* end, int64_t times) : at(begin), end(end), each((end - begin) / times + 64) {}

    void ask() {
        for (const uint8_t* stop = std::min(end, at + each); at < stop; at += 64) __builtin_prefetch(at, 0, 2);
    }
};

template <Form F, int UNIT, bool minimums>
struct Product {
    const Linear& w;
    Blocks blocks;
    int64_t stride;

    explicit Product(const Linear& w) : w(w), blocks(w), stride(quantized_bytes(w)) {}

    template <int N, class Units>
    void add(const Units& units, const uint8_t* x, int64_t steps, float* sums) const {
        add_rows<F, UNIT, minimums, N>(units, w.offset, x, stride, steps, sums);
    }

    // Of units that were unpacked, so many rows at a time.
#if defined(HEADRACE_AMX)
    static constexpr int SHARED = tiles::ROWS;
    using Means = tiles::Configured<UNIT / 4>;

    template <int N>
    void add_unpacked(Means& tiles, const Unpacked<UNIT>* units, const uint8_t* x, int64_t steps, float* sums) const {
        add_rows_by_tiles<F, UNIT, minimums, N>(tiles, {units}, w.offset, x, stride, steps, sums);
    }
#else
    static constexpr int SHARED = TALL;
    struct Means {};

    template <int N>
    void add_unpacked(Means&, const Unpacked<UNIT>* units, const uint8_t* x, int64_t steps, float* sums) const {
        add<N>(Scratch<UNIT>{units}, x, steps, sums);
    }
#endif

    void few_rows(const uint8_t* x, int64_t rows, int64_t panel, float* y, int64_t width) const {
        alignas(64) float sums[FEW * PANEL];
        std::fill(sums, sums + rows * PANEL, 0.0f);
        const int64_t steps = w.inputs / QUANTUM;
        by_heights<TALL>(rows, [&]<int N>(int64_t r) {
            add<N>(Stream<F, UNIT>(blocks, panel, w.group), x + r * stride, steps, sums + r * PANEL);
        });
        finish(w, panel, sums, rows, y, width);
    }

    // Of up to SIDE panels.
    void more_rows(const uint8_t* x, int64_t rows, int64_t panel, int64_t panels, float* y, int64_t width) const {
        alignas(64) Unpacked<UNIT> unpacked[SIDE][DEPTH / UNIT];
        alignas(64) float sums[SIDE][ROWS * PANEL];
        for (int64_t p = 0; p < panels; p++) std::fill(sums[p], sums[p] + rows * PANEL, 0.0f);
        const int64_t steps = w.inputs / QUANTUM, stretches = (w.inputs + DEPTH - 1) / DEPTH, longest = (steps + stretches - 1) / stretches;
        Ahead next(w.panels + (panel + panels) * blocks.panel_bytes, w.panels + std::min(panel + 2 * panels, panels_end()) * blocks.panel_bytes,
                   stretches * ((rows + SHARED - 1) / SHARED));
        static_assert(SIDE == 2);
        Stream<F, UNIT> streams[SIDE] = {{blocks, panel, w.group}, {blocks, panel + 1, w.group}};
        Means means;
        for (int64_t step = 0; step < steps; step += longest) {
            const int64_t count = std::min(longest, steps - step);
            for (int64_t p = 0; p < panels; p++)
                for (int64_t unit = 0; unit < count * (QUANTUM / UNIT); unit++) unpack(streams[p], unpacked[p][unit]);
            const uint8_t* from = x + step * quantized_step(UNIT);
            by_most<SHARED>(rows, [&]<int N>(int64_t r) {
                next.ask();
                if (step == 0)
                    for (int i = 0; i < N; i++)
                        for (int64_t p = 0; p < panels; p++) __builtin_prefetch(y + (r + i) * width + (panel + p) * PANEL, 1, 2);
                for (int64_t p = 0; p < panels; p++)
                    add_unpacked<N>(means, unpacked[p], from + r * stride, count, sums[p] + r * PANEL);
            });
        }
        for (int64_t p = 0; p < panels; p++) finish(w, panel + p, sums[p], rows, y, width);
    }

    static void unpack(Stream<F, UNIT>& from, Unpacked<UNIT>& to) {
        const uint8_t* codes = from.next();
        for (int part = 0; part < PARTS; part++) {
            wide::store(to.scales + part * wide::WIDTH, from.factor(part));
            if constexpr (minimums) wide::store(to.minimums + part * wide::WIDTH, from.minimum(part));
        }
#pragma GCC unroll 8
        for (int i = 0; i < UNIT / 4; i++) {
            wide::Ints four[PARTS];
            dots::load<Stream<F, UNIT>::PACKED>(codes + i * (from.BYTES / (UNIT / 4)), four);
            std::memcpy(to.codes + i * 4 * PANEL, four, sizeof four);
        }
    }

    int64_t panels_end() const { return (w.outputs + PANEL - 1) / PANEL; }


    // Panels [first, last) of some rows.
    void operator()(const uint8_t* x, int64_t rows, int64_t first, int64_t last, float* y, int64_t width) const {
        if (rows <= FEW)
            for (; first < last; first++) few_rows(x, rows, first, y, width);
        for (; first < last; first += SIDE) more_rows(x, rows, first, std::min<int64_t>(SIDE, last - first), y, width);
    }
};

// Calls work(product) with the product of this weight's form; `ops.h` says which there are.
template <class Work>
void with_product(const Linear& w, const Work& work) {
    if (w.form == Form::int4) return w.minimums ? work(Product<Form::int4, 32, true>(w)) : work(Product<Form::int4, 32, false>(w));
    if (w.form == Form::int8) return w.minimums ? work(Product<Form::int8, 32, true>(w)) : work(Product<Form::int8, 32, false>(w));
    if (w.unit() == 16) return work(Product<Form::int6, 16, false>(w));
    return w.minimums ? work(Product<Form::int6, 32, true>(w)) : work(Product<Form::int6, 32, false>(w));
}

}  // namespace

void linear_int8(Pool& pool, const Linear& w, const uint8_t* x, int64_t rows, float* y, int64_t width) {
    const int64_t panels = (w.outputs + PANEL - 1) / PANEL, stride = quantized_bytes(w);
    // Blocks of rows are about equal; a unit of work is some panels of one block: enough to be worth a hand-over, enough of them to
    // balance, and whole pairs where pairs are taken.
    const int64_t blocks = (rows + ROWS - 1) / ROWS, height = (rows + blocks - 1) / blocks, side = height > FEW ? SIDE : 1;
    const int64_t wanted = std::max<int64_t>(1, WORTH / (height * w.inputs * PANEL));
    const int64_t most = std::max<int64_t>(1, panels / (4 * pool.threads()));
    const int64_t each = (std::min(wanted, most) + side - 1) / side * side, groups = (panels + each - 1) / each;
    with_product(w, [&](const auto& product) {
        pool.run(groups * blocks, [&](int64_t unit) {
            const int64_t row = unit / groups * height, first = unit % groups * each;
            product(x + row * stride, std::min(height, rows - row), first, std::min(panels, first + each), y + row * width, width);
        });
    });
}

}  // namespace headrace::HEADRACE_ISA
