// y = x W^T + b for packed weights of any form, and x as floats.
//
// Every output is a sum of chains: chain c runs over inputs 128 c … 128 c + 127 in order, acc = fma(x[k], w[k], acc) from 0, and the
// chains are added in order, then the bias. (One chain over all inputs would gather rounding errors as K grows.) That is the whole
// definition, whatever the number of rows and however the work is cut; the two ways below only differ in where weights and sums lie
// meanwhile.
//
//   one row     weights are widened in registers; several panels side by side hide the latency of the chain
//   more rows   a block of inputs of a panel is widened once into scratch, and read by all rows, up to TALL at a time
#include <algorithm>
#include <array>
#include <utility>

#include "packed.h"

namespace headrace::HEADRACE_ISA {
namespace {

using wide::Floats;

constexpr int TALL = wide::WIDTH == LANES ? 6 : 12;   // rows whose sums stay in registers together
constexpr int SHORT = wide::WIDTH == LANES ? 2 : 6;   // up to here two panels share a pass, to have enough chains
constexpr int64_t CHAIN = 128;                        // inputs of a chain; part of the result's definition
constexpr int64_t DEPTH = 256;                        // inputs of one panel widened at once: 16 KiB of scratch
constexpr int64_t ROWS = 96;                          // rows that share a widened block; their x stays in the second-level cache
constexpr int64_t WORTH = 1 << 18;                    // multiply-adds that are worth handing to a thread

// The first outputs of a panel's sums, with their bias.
inline void finish(const Linear& w, int64_t panel, const float* sums, float* y) {
    int64_t n = panel * PANEL, count = std::min<int64_t>(PANEL, w.outputs - n);
    if (w.bias)
        for (int64_t i = 0; i < count; i++) y[n + i] = sums[i] + w.bias[n + i];
    else
        std::memcpy(y + n, sums, count * sizeof(float));
}

template <int P, class Source>
void one_row(const Source& source, const float* x, int64_t panel, float* y) {
    const Linear& w = source.w;
    Floats total[P][PARTS] = {};
    auto place = source.at(panel, 0);
    int64_t g = 0, left = w.group;  // of the current group: no division, which would cost as much as a dozen inputs
    for (int64_t from = 0; from < w.inputs; from += CHAIN) {
        Floats acc[P][PARTS] = {};
        for (int64_t rest = std::min(CHAIN, w.inputs - from); rest > 0;) {
            typename Source::Group groups[P];
            for (int p = 0; p < P; p++) groups[p] = source.group(panel + p, g);
            const int64_t count = std::min(rest, left);
            for (const float* end = x + count; x < end; x += Source::STEP, place += Source::NEXT) {
#pragma GCC unroll 8
                for (int p = 0; p < P; p++)
                    Source::each(groups[p], place + p * source.apart, [&](int step, int part, Floats value) {
                        acc[p][part] = wide::fma(wide::all(x[step]), value, acc[p][part]);
                    });
            }
            rest -= count;
            left -= count;
            if (left == 0) {
                place = source.at(panel, ++g);
                left = w.group;
            }
        }
        for (int p = 0; p < P; p++)
            for (int part = 0; part < PARTS; part++) total[p][part] += acc[p][part];
    }
    for (int p = 0; p < P; p++) {
        float sums[PANEL];
        for (int part = 0; part < PARTS; part++) wide::store(sums + part * wide::WIDTH, total[p][part]);
        finish(w, panel + p, sums, y);
    }
}

// Adds the chains of `count` inputs of N rows to their sums, which wait in `sums` [rows, P * PANEL] between blocks of inputs. Scratch
// holds the weights as [P][count][PANEL]; count is a multiple of CHAIN, save at the end.
template <int N, int P>
void add_rows(const float* scratch, const float* x, int64_t stride, int64_t count, float* sums) {
    constexpr int VECTORS = P * PARTS;
    const float* second = scratch + count * PANEL;
    for (int64_t from = 0; from < count; from += CHAIN) {
        Floats acc[N][VECTORS];
#pragma GCC unroll 16
        for (int r = 0; r < N; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) acc[r][v] = wide::all(0.0f);
        for (int64_t k = from, to = std::min(count, from + CHAIN); k < to; k++) {
            Floats weights[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                weights[v] = wide::load((v < PARTS ? scratch : second) + k * PANEL + v % PARTS * wide::WIDTH);
#pragma GCC unroll 16
            for (int r = 0; r < N; r++) {
                Floats xk = wide::all(x[r * stride + k]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) acc[r][v] = wide::fma(xk, weights[v], acc[r][v]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < N; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                float* sum = sums + r * P * PANEL + v * wide::WIDTH;
                wide::store(sum, wide::load(sum) + acc[r][v]);
            }
    }
}

using AddRows = void (*)(const float*, const float*, int64_t, int64_t, float*);

template <int P, int... N>
constexpr std::array<AddRows, sizeof...(N)> add_rows_table(std::integer_sequence<int, N...>) {
    return {add_rows<N + 1, P>...};
}

constexpr auto ONE_PANEL = add_rows_table<1>(std::make_integer_sequence<int, TALL>());
constexpr auto TWO_PANELS = add_rows_table<2>(std::make_integer_sequence<int, SHORT>());

static_assert(DEPTH / 2 % CHAIN == 0, "blocks of inputs must hold whole chains");

template <int P, class Source>
void more_rows(const Source& source, const float* x, int64_t rows, int64_t panel, float* y, int64_t width) {
    alignas(64) float scratch[DEPTH * PANEL];
    alignas(64) float sums[(P == 1 ? ROWS : SHORT) * P * PANEL];
    const Linear& w = source.w;
    std::fill(sums, sums + rows * P * PANEL, 0.0f);
    const int64_t tiles = (rows + TALL - 1) / TALL, short_tile = rows / tiles, taller = rows % tiles;
    for (int64_t from = 0; from < w.inputs; from += DEPTH / P) {
        int64_t to = std::min(w.inputs, from + DEPTH / P), count = to - from;
        for (int p = 0; p < P; p++) widen_panel(source, panel + p, from, to, scratch + p * count * PANEL);
        for (int64_t tile = 0, r = 0; tile < tiles; tile++) {
            int64_t height = short_tile + (tile < taller);
            AddRows add = P == 1 ? ONE_PANEL[height - 1] : TWO_PANELS[height - 1];
            add(scratch, x + r * w.inputs + from, w.inputs, count, sums + r * P * PANEL);
            r += height;
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int p = 0; p < P; p++) finish(w, panel + p, sums + (r * P + p) * PANEL, y + r * width);
}

// Panels [first, last) of some rows.
template <class Source>
void panels_of(const Source& source, const float* x, int64_t rows, int64_t first, int64_t last, float* y, int64_t width) {
    if (rows == 1) {
        for (; first + Source::PANELS <= last; first += Source::PANELS) one_row<Source::PANELS>(source, x, first, y);
        for (; first < last; first++) one_row<1>(source, x, first, y);
        return;
    }
    if (rows <= SHORT)
        for (; first + 2 <= last; first += 2) more_rows<2>(source, x, rows, first, y, width);
    for (; first < last; first++) more_rows<1>(source, x, rows, first, y, width);
}

}  // namespace

void linear_floats(Pool& pool, const Linear& w, const float* x, int64_t rows, float* y, int64_t width) {
    const int64_t panels = (w.outputs + PANEL - 1) / PANEL;
    // Blocks of rows are about equal; a unit is some panels of one block: enough work to be worth a hand-over, enough units to balance.
    const int64_t blocks = (rows + ROWS - 1) / ROWS, height = (rows + blocks - 1) / blocks;
    const int64_t wanted = std::max<int64_t>(1, WORTH / (height * w.inputs * PANEL));
    const int64_t most = std::max<int64_t>(1, panels / (4 * pool.threads()));
    with_source(w, [&](auto source) {
        const int64_t side = rows == 1 ? source.PANELS : rows <= SHORT ? 2 : 1;
        const int64_t each = (std::min(wanted, most) + side - 1) / side * side, groups = (panels + each - 1) / each;
        pool.run(groups * blocks, [&](int64_t unit) {
            int64_t row = unit / groups * height, first = unit % groups * each;
            panels_of(source, x + row * w.inputs, std::min(height, rows - row), first, std::min(panels, first + each), y + row * width, width);
        });
    });
}

}  // namespace headrace::HEADRACE_ISA
