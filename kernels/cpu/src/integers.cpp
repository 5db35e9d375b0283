// y = x W^T + b for codes and x as int8, as it is or gated and quantized for the next product.
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
#include <type_traits>

#include "dots.h"
#include "gated.h"
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
constexpr int64_t FEW = 8, DEPTH = 640, ROWS = 192;
#if defined(__AVX2__)
constexpr int TALL = 4;
#else
constexpr int TALL = 1;
#endif
#endif
constexpr int64_t WORTH = 1 << 19;  // multiply-adds that are worth handing to a thread

constexpr int SIDE = 2;             // panels that are unpacked together: each few rows of x are read once for all of them

// Such panels, and those that come after.
struct Side {
    int64_t count;
    int64_t panel[SIDE], next[SIDE];
};

// Whether codes that are stored as bytes are read where they stand: from every 32nd byte on, so that vectors of 64 would lie on two cache
// lines.
constexpr bool IN_PLACE = wide::WIDTH * 4 <= 32;

// A unit of inputs of a panel, unpacked: scales, minimums, and a byte a code, for 4 inputs at a time.
template <int UNIT, bool copied>
struct Unpacked {
    float scales[PANEL], minimums[PANEL];
    uint8_t bytes[UNIT * PANEL];

    const uint8_t* codes() const { return bytes; }
};

template <int UNIT>
struct alignas(64) Unpacked<UNIT, false> {
    float scales[PANEL], minimums[PANEL];
    const uint8_t* at;

    const uint8_t* codes() const { return at; }
};

// Where sums of some rows [rows][PANEL] come from, 0 if that is null, and where they go, rows `apart`; a bias is added if there is one.
struct Sums {
    const float* from;
    float* to;
    int64_t apart;
    const float* bias;

    Floats begun(int r, int v) const { return from ? wide::load(from + r * PANEL + v * wide::WIDTH) : wide::all(0.0f); }
    void take(int r, int v, Floats sum) const {
        if (bias) sum += wide::load(bias + v * wide::WIDTH);
        wide::store(to + r * apart + v * wide::WIDTH, sum);
    }
};

// The units of a panel in turn, as they are stored.
template <Form F, int UNIT>
struct Stream {
    static constexpr bool PACKED = F == Form::int4;
    static constexpr int64_t BYTES = UNIT * PANEL / (PACKED ? 2 : 1);

    const Blocks* blocks;
    int64_t panel, units;  // a group
    int64_t group = -1, left = 0;
    const uint8_t* codes = nullptr;
    Scale scale;

    Stream(const Blocks& blocks, int64_t panel, int64_t group) : blocks(&blocks), panel(panel), units(group / UNIT) {}

    const uint8_t* next() {
        if (left == 0) {
            left = units;
            scale = blocks->scale(panel, ++group);
            codes = blocks->codes(panel, group) - BYTES;
        }
        left--;
        for (int64_t byte = 0; byte < BYTES; byte += 64) __builtin_prefetch(codes + BYTES + AHEAD + byte, 0, 2);
        return codes += BYTES;
    }
    Floats factor(int v) const { return scale.factor[v]; }
    Floats minimum(int v) const { return scale.minimum[v]; }
};

// Units in turn that were unpacked.
template <class Unpacked>
struct Scratch {
    static constexpr bool PACKED = false;

    const Unpacked* unit;

    const uint8_t* next() { return (unit++)->codes(); }
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

// Adds the next `steps` * QUANTUM inputs of N rows of x to their sums.
template <Form F, int UNIT, bool minimums, int N, class Units>
inline void add_rows(Units units, int offset, const uint8_t* x, int64_t stride, int64_t steps, const Sums& sums) {
    constexpr int V = PARTS;
    constexpr int64_t STEP = quantized_step(UNIT);
    const High<F, minimums, BIAS<F, minimums>> high(offset);
    Floats acc[N][V];
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) acc[r][v] = sums.begun(r, v);
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
        for (int v = 0; v < V; v++) sums.take(r, v, acc[r][v]);
}

#if defined(HEADRACE_AMX)
// The same for unpacked units, by tiles: the products of some units, then the sums, which stay in registers meanwhile, a row in each.
// One unit at a time would have every sum wait for its product to come back from the tile.
template <Form F, int UNIT, bool minimums, int N, class Units>
inline void add_rows_by_tiles(tiles::Configured<UNIT / 4>& tiles, Units units, int offset, const uint8_t* x, int64_t stride, int64_t steps,
                              const Sums& sums) {
    constexpr int64_t STEP = quantized_step(UNIT), PER_STEP = QUANTUM / UNIT, TOGETHER = 8;
    const High<F, minimums, 0> high(offset);
    tiles.rows(N);
    alignas(64) int32_t products[TOGETHER][N][PANEL];
    Floats acc[N][PARTS];
#pragma GCC unroll 16
    for (int r = 0; r < N; r++)
        for (int v = 0; v < PARTS; v++) acc[r][v] = sums.begun(r, v);
    while (steps > 0) {
        const int64_t now = std::min(steps, TOGETHER / PER_STEP);
        Units ahead = units;
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
        for (int v = 0; v < PARTS; v++) sums.take(r, v, acc[r][v]);
}
#endif

// The panels that come next, asked for bit by bit while these are computed: their stream has stopped, and the machine has lost it.
struct Ahead {
    const uint8_t *at, *end;
    int64_t each;

    Ahead(const uint8_t* begin, int64_t bytes, int64_t times) : at(begin), end(begin + bytes), each(bytes / times + 64) {}

    void ask() {
        for (const uint8_t* stop = std::min(end, at + each); at < stop; at += 64) __builtin_prefetch(at, 0, 2);
    }
};

template <Form F, int UNIT, bool minimums>
struct Product {
    using Packed = Stream<F, UNIT>;
    static constexpr bool COPIED = Packed::PACKED || !IN_PLACE;
    using Unit = Unpacked<UNIT, COPIED>;

    const Linear& w;
    Blocks blocks;
    int64_t stride;

    explicit Product(const Linear& w) : w(w), blocks(w), stride(quantized_bytes(w)) {}

    template <int N, class Units>
    void add(const Units& units, const uint8_t* x, int64_t steps, const Sums& sums) const {
        add_rows<F, UNIT, minimums, N>(units, w.offset, x, stride, steps, sums);
    }

    // Of units that were unpacked, so many rows at a time.
#if defined(HEADRACE_AMX)
    static constexpr int SHARED = tiles::ROWS;
    using Means = tiles::Configured<UNIT / 4>;

    template <int N>
    void add_unpacked(Means& tiles, const Unit* units, const uint8_t* x, int64_t steps, const Sums& sums) const {
        add_rows_by_tiles<F, UNIT, minimums, N>(tiles, Scratch<Unit>{units}, w.offset, x, stride, steps, sums);
    }
#else
    static constexpr int SHARED = TALL;
    struct Means {};

    template <int N>
    void add_unpacked(Means&, const Unit* units, const uint8_t* x, int64_t steps, const Sums& sums) const {
        add<N>(Scratch<Unit>{units}, x, steps, sums);
    }
#endif

    static_assert(SHARED <= FEW && TALL <= FEW);

    // Of up to SIDE panels, for more rows than FEW. `Out` says where complete sums go, and is told when those of a few rows are there.
    template <class Out>
    void more_rows(const uint8_t* x, int64_t rows, const Side& side, const Out& out) const {
        alignas(64) Unit unpacked[SIDE][DEPTH / UNIT];
        alignas(64) float room[SIDE][ROWS * PANEL];
        const int64_t steps = w.inputs / QUANTUM, stretches = (w.inputs + DEPTH - 1) / DEPTH, longest = (steps + stretches - 1) / stretches;
        const int64_t times = stretches * ((rows + SHARED - 1) / SHARED);
        static_assert(SIDE == 2);
        Packed streams[SIDE] = {{blocks, side.panel[0], w.group}, {blocks, side.panel[1], w.group}};
        Ahead ahead[SIDE] = {{w.panels + side.next[0] * blocks.panel_bytes, blocks.panel_bytes, times},
                             {w.panels + side.next[1] * blocks.panel_bytes, blocks.panel_bytes, times}};
        Means means;
        for (int64_t step = 0; step < steps; step += longest) {
            const int64_t count = std::min(longest, steps - step);
            const bool last = step + count == steps;
            for (int64_t p = 0; p < side.count; p++) unpack(streams[p], count * (QUANTUM / UNIT), unpacked[p]);
            const uint8_t* from = x + step * quantized_step(UNIT);
            by_most<SHARED>(rows, [&]<int N>(int64_t r) {
                for (Ahead& next : ahead) next.ask();
                if (step == 0) out.expect(side, r, N);
                for (int64_t p = 0; p < side.count; p++) {
                    float* sums = room[p] + r * PANEL;
                    const float* begun = step ? sums : nullptr;
                    const Sums to = last ? out.sums(side, p, r, begun) : Sums{begun, sums, PANEL, nullptr};
                    add_unpacked<N>(means, unpacked[p], from + r * stride, count, to);
                }
                if (last) out.take(side, r, N);
            });
        }
    }

    static void unpack(Packed& stream, int64_t units, Unit* to) {
        Packed from = stream;
        for (; units > 0; units--, to++) {
            const uint8_t* codes = from.next();
            for (int part = 0; part < PARTS; part++) {
                wide::store(to->scales + part * wide::WIDTH, from.factor(part));
                if constexpr (minimums) wide::store(to->minimums + part * wide::WIDTH, from.minimum(part));
            }
            if constexpr (!COPIED) {
                to->at = codes;
            } else {
#pragma GCC unroll 8
                for (int i = 0; i < UNIT / 4; i++) {
                    wide::Ints four[PARTS];
                    dots::load<Packed::PACKED>(codes + i * (Packed::BYTES / (UNIT / 4)), four);
                    for (int part = 0; part < PARTS; part++) wide::store(to->bytes + i * 4 * PANEL + part * sizeof(wide::Ints), four[part]);
                }
            }
        }
        stream = from;
    }

    int64_t panels() const { return (w.outputs + PANEL - 1) / PANEL; }
};

// What becomes of a product: rows of y.
template <class Product>
class Plain {
  public:
    Plain(const Product& product, const uint8_t* x, int64_t rows, float* y, int64_t width)
        : product_(product), w_(product.w), x_(x), rows_(rows), y_(y), width_(width) {}

    // Panels [first, last).
    void operator()(int64_t first, int64_t last) const {
        if (rows_ <= FEW)
            for (; first < last; first++) few_rows(first);
        const int64_t end = product_.panels() - 1;
        for (; first < last; first += SIDE) {
            const int64_t next = std::min(first + 2, end), after = std::min(first + 3, end);
            product_.more_rows(x_, rows_, {std::min<int64_t>(SIDE, last - first), {first, first + 1}, {next, after}}, *this);
        }
    }

    void expect(const Side& side, int64_t row, int64_t rows) const {
        for (int64_t r = row; r < row + rows; r++)
            for (int64_t p = 0; p < side.count; p++) __builtin_prefetch(y_ + r * width_ + side.panel[p] * PANEL, 1, 2);
    }
    Sums sums(const Side& side, int64_t p, int64_t row, const float* from) const {
        const int64_t panel = side.panel[p];
        if (!whole(panel)) return {from, spare_, PANEL, nullptr};
        return {from, y_ + row * width_ + panel * PANEL, width_, w_.bias ? w_.bias + panel * PANEL : nullptr};
    }
    // Those of a panel that has less outputs, which is the last.
    void take(const Side& side, int64_t row, int64_t rows) const {
        const int64_t panel = side.panel[side.count - 1];
        if (!whole(panel)) finish(w_, panel, spare_, rows, y_ + row * width_, width_);
    }

  private:
    bool whole(int64_t panel) const { return (panel + 1) * PANEL <= w_.outputs; }

    void few_rows(int64_t panel) const {
        const Side side{1, {panel}, {}};
        by_heights<TALL>(rows_, [&]<int N>(int64_t r) {
            const typename Product::Packed units(product_.blocks, panel, w_.group);
            product_.template add<N>(units, x_ + r * product_.stride, w_.inputs / QUANTUM, sums(side, 0, r, nullptr));
            take(side, r, N);
        });
    }

    const Product& product_;
    const Linear& w_;
    const uint8_t* x_;
    const int64_t rows_;
    float* y_;
    const int64_t width_;
    alignas(64) mutable float spare_[FEW * PANEL];
};

// Or what a reader takes of the gates, of more rows than FEW. A panel of the first half of the outputs and its like of the second make a
// panel of gates, and PAIRS of those are as many inputs as are quantized together.
template <class Product>
class Gated {
  public:
    static constexpr int64_t PAIRS = QUANTUM / PANEL;

    Gated(const Product& product, const uint8_t* x, int64_t rows, bool gelu, const Linear& reader, uint8_t* y)
        : product_(product), w_(product.w), x_(x), rows_(rows), gelu_(gelu), reader_(reader), y_(y) {}

    // A step of the reader's inputs.
    void operator()(int64_t step) const {
        for (int64_t panel = step * PAIRS; panel < (step + 1) * PAIRS; panel++) {
            const int64_t next = std::min(panel + 1, half() - 1);
            product_.more_rows(x_, rows_, {2, {panel, half() + panel}, {next, half() + next}}, *this);
        }
        uint8_t* y = y_ + step * quantized_step(reader_.unit());
        for (int64_t r = 0; r < rows_; r++) quantize_steps(reader_, inner_ + r * QUANTUM, 1, y + r * quantized_bytes(reader_));
    }

    void expect(const Side&, int64_t, int64_t) const {}
    Sums sums(const Side& side, int64_t p, int64_t, const float* from) const { return {from, sums_[p], PANEL, bias(side.panel[p])}; }
    void take(const Side& side, int64_t row, int64_t rows) const {
        for (int64_t r = 0; r < rows; r++)
            gate(gelu_, sums_[0] + r * PANEL, sums_[1] + r * PANEL, PANEL, inner_ + (row + r) * QUANTUM + side.panel[0] % PAIRS * PANEL);
    }

  private:
    int64_t half() const { return w_.outputs / PANEL / 2; }
    const float* bias(int64_t panel) const { return w_.bias ? w_.bias + panel * PANEL : nullptr; }

    const Product& product_;
    const Linear& w_;
    const uint8_t* x_;
    const int64_t rows_;
    const bool gelu_;
    const Linear& reader_;
    uint8_t* y_;
    alignas(64) mutable float sums_[SIDE][FEW * PANEL];
    alignas(64) mutable float inner_[ROWS * QUANTUM];
};

// Calls work(product) with the product of this weight's form; `ops.h` says which there are.
template <class Work>
void with_product(const Linear& w, const Work& work) {
    if (w.form == Form::int4) return w.minimums ? work(Product<Form::int4, 32, true>(w)) : work(Product<Form::int4, 32, false>(w));
    if (w.form == Form::int8) return w.minimums ? work(Product<Form::int8, 32, true>(w)) : work(Product<Form::int8, 32, false>(w));
    if (w.unit() == 16) return work(Product<Form::int6, 16, false>(w));
    return w.minimums ? work(Product<Form::int6, 32, true>(w)) : work(Product<Form::int6, 32, false>(w));
}

// Calls work(row, rows, first, last) for blocks of rows and, of each, lots [first, last) of panels: some at a time, a multiple of `by`.
//
// Blocks of rows are about equal; what is handed to a thread is enough to be worth it, and little enough that all are busy to the end.
template <class Work>
void share_out(Pool& pool, const Linear& w, int64_t rows, int64_t panels, int64_t lot, int64_t by, const Work& work) {
    const int64_t blocks = (rows + ROWS - 1) / ROWS, height = (rows + blocks - 1) / blocks, lots = (panels + lot - 1) / lot;
    const int64_t wanted = std::max<int64_t>(1, WORTH / (height * w.inputs * PANEL * lot));
    const int64_t most = std::max<int64_t>(1, lots / (4 * pool.threads()));
    const int64_t each = (std::min(wanted, most) + by - 1) / by * by, groups = (lots + each - 1) / each;
    pool.run(groups * blocks, [&](int64_t unit) {
        const int64_t row = unit / groups * height, first = unit % groups * each;
        work(row, std::min(height, rows - row), first, std::min(lots, first + each));
    });
}

}  // namespace

void linear_int8(Pool& pool, const Linear& w, const uint8_t* x, int64_t rows, float* y, int64_t width) {
    with_product(w, [&](const auto& product) {
        share_out(pool, w, rows, product.panels(), 1, rows > FEW ? SIDE : 1, [&](int64_t row, int64_t height, int64_t first, int64_t last) {
            Plain(product, x + row * product.stride, height, y + row * width, width)(first, last);
        });
    });
}

void linear_gated(Pool& pool, const Linear& w, const uint8_t* x, int64_t rows, bool gelu, const Linear& reader, uint8_t* y) {
    if (rows <= FEW) {
        // One stream of weights is read faster than two.
        float* gate_up = Pool::scratch(2, rows * w.outputs);
        linear_int8(pool, w, x, rows, gate_up, w.outputs);
        return gate_rows(pool, gate_up, rows, w.outputs / 2, gelu, &reader, y);
    }
    with_product(w, [&](const auto& product) {
        using Gates = Gated<std::remove_cvref_t<decltype(product)>>;
        share_out(pool, w, rows, product.panels(), 2 * Gates::PAIRS, 1, [&](int64_t row, int64_t height, int64_t first, int64_t last) {
            const Gates gates(product, x + row * product.stride, height, gelu, reader, y + row * quantized_bytes(reader));
            for (; first < last; first++) gates(first);
        });
    });
}

}  // namespace headrace::HEADRACE_ISA
