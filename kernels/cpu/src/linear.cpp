// y = x W^T + b for packed weights.
//
// Every output is one chain of fused multiply-adds over the inputs in order, from 0 up, whatever the number of rows and however
// the work is cut: acc = fma(x[k], w[k], acc). Integers are widened to value = scale * code + minimum first. That is the whole
// definition; the two ways below only differ in where values and sums lie meanwhile.
//
//   one row     values are widened in registers, two panels side by side hide the latency of the chain
//   more rows   a block of inputs of one panel is widened once into scratch, and read by all rows, six at a time
#include <algorithm>

#include "ops.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {
namespace {

constexpr int HALF = PANEL / LANES;  // vectors a panel
constexpr int64_t DEPTH = 256;       // inputs widened at once: 16 KiB of scratch
constexpr int64_t ROWS = 96;         // rows that share a widened block; their x stays in the second-level cache
constexpr int TALL = 6;              // rows whose sums stay in registers

template <class T>
struct Floats {
    const T* values;

    Floats(const Linear& w, int64_t panel) : values(static_cast<const T*>(w.values) + panel * w.inputs * PANEL) {}

    // Calls use(k, low lanes, high lanes) for k in [from, to).
    template <class Use>
    void widen_each(int64_t from, int64_t to, const Use& use) const {
        for (int64_t k = from; k < to; k++) use(k, widen(values + k * PANEL), widen(values + k * PANEL + LANES));
    }
};

template <bool MINIMUMS>
struct Scaled {
    Vec scale[HALF], minimum[HALF];

    Scaled(const Linear& w, int64_t panel, int64_t g) {
        int64_t at = (panel * (w.inputs / w.group) + g) * PANEL;
        for (int h = 0; h < HALF; h++) {
            scale[h] = load(w.scales + at + h * LANES);
            if (MINIMUMS) minimum[h] = load(w.minimums + at + h * LANES);
        }
    }

    Vec operator()(int h, Vec code) const { return MINIMUMS ? fma(scale[h], code, minimum[h]) : scale[h] * code; }
};

template <bool MINIMUMS>
struct Int8 {
    const Linear& w;
    int64_t panel;
    const int8_t* codes;

    Int8(const Linear& w, int64_t panel) : w(w), panel(panel), codes(static_cast<const int8_t*>(w.values) + panel * w.inputs * PANEL) {}

    template <class Use>
    void widen_each(int64_t from, int64_t to, const Use& use) const {
        for (int64_t k = from; k < to;) {
            int64_t g = k / w.group, end = std::min(to, (g + 1) * w.group);
            Scaled<MINIMUMS> value(w, panel, g);
            for (; k < end; k++) use(k, value(0, widen(codes + k * PANEL)), value(1, widen(codes + k * PANEL + LANES)));
        }
    }
};

template <bool MINIMUMS>
struct Int4 {
    const Linear& w;
    int64_t panel;
    const uint8_t* codes;

    Int4(const Linear& w, int64_t panel) : w(w), panel(panel), codes(static_cast<const uint8_t*>(w.values) + panel * w.inputs / 2 * PANEL) {}

    template <class Use>
    void widen_each(int64_t from, int64_t to, const Use& use) const {
        const int offset = w.offset;
        for (int64_t k = from; k < to;) {
            int64_t g = k / w.group, end = std::min(to, (g + 1) * w.group);
            Scaled<MINIMUMS> value(w, panel, g);
            for (; k < end; k += 2) {
                const uint8_t* pair = codes + k / 2 * PANEL;
                Ints a = ints(pair), b = ints(pair + LANES);
                auto code = [&](Ints nibble) { return floats(nibble - offset); };
                use(k, value(0, code(a & 15)), value(1, code(b & 15)));
                use(k + 1, value(0, code(a >> 4)), value(1, code(b >> 4)));
            }
        }
    }
};

// Writes the first `count` outputs of a panel.
inline void finish(const Linear& w, int64_t panel, const Vec (&acc)[HALF], float* y) {
    int64_t n = panel * PANEL;
    float out[PANEL];
    for (int h = 0; h < HALF; h++) store(out + h * LANES, acc[h]);
    int64_t count = std::min<int64_t>(PANEL, w.outputs - n);
    if (w.bias)
        for (int64_t i = 0; i < count; i++) out[i] += w.bias[n + i];
    std::memcpy(y + n, out, count * sizeof(float));
}

template <class Source>
void one_row(const Linear& w, const float* x, int64_t panel, float* y) {
    Vec acc[HALF] = {};
    Source(w, panel).widen_each(0, w.inputs, [&](int64_t k, Vec low, Vec high) {
        Vec xk = all(x[k]);
        acc[0] = fma(xk, low, acc[0]);
        acc[1] = fma(xk, high, acc[1]);
    });
    finish(w, panel, acc, y);
}

// Adds inputs [from, to) of N rows to their sums, which wait in `sums` [rows, PANEL] between blocks of inputs.
template <int N>
void few_rows(const float* scratch, const float* x, int64_t stride, int64_t count, float* sums) {
    Vec acc[N][HALF];
    for (int r = 0; r < N; r++)
        for (int h = 0; h < HALF; h++) acc[r][h] = load(sums + r * PANEL + h * LANES);
    for (int64_t k = 0; k < count; k++) {
        Vec low = load(scratch + k * PANEL), high = load(scratch + k * PANEL + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < N; r++) {
            Vec xk = all(x[r * stride + k]);
            acc[r][0] = fma(xk, low, acc[r][0]);
            acc[r][1] = fma(xk, high, acc[r][1]);
        }
    }
    for (int r = 0; r < N; r++)
        for (int h = 0; h < HALF; h++) store(sums + r * PANEL + h * LANES, acc[r][h]);
}

template <class Source>
void more_rows(const Linear& w, const float* x, int64_t rows, int64_t panel, float* y) {
    alignas(64) float scratch[DEPTH * PANEL];
    alignas(64) float sums[ROWS * PANEL] = {};
    Source source(w, panel);
    for (int64_t from = 0; from < w.inputs; from += DEPTH) {
        int64_t to = std::min(w.inputs, from + DEPTH), count = to - from;
        source.widen_each(from, to, [&](int64_t k, Vec low, Vec high) {
            store(scratch + (k - from) * PANEL, low);
            store(scratch + (k - from) * PANEL + LANES, high);
        });
        int64_t r = 0;
        for (; r + TALL <= rows; r += TALL) few_rows<TALL>(scratch, x + r * w.inputs + from, w.inputs, count, sums + r * PANEL);
        const float* rest = x + r * w.inputs + from;
        float* rest_sums = sums + r * PANEL;
        switch (rows - r) {
            case 1: few_rows<1>(scratch, rest, w.inputs, count, rest_sums); break;
            case 2: few_rows<2>(scratch, rest, w.inputs, count, rest_sums); break;
            case 3: few_rows<3>(scratch, rest, w.inputs, count, rest_sums); break;
            case 4: few_rows<4>(scratch, rest, w.inputs, count, rest_sums); break;
            case 5: few_rows<5>(scratch, rest, w.inputs, count, rest_sums); break;
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        Vec acc[HALF];
        for (int h = 0; h < HALF; h++) acc[h] = load(sums + r * PANEL + h * LANES);
        finish(w, panel, acc, y + r * w.outputs);
    }
}

template <class Source>
void linear_of(Pool& pool, const Linear& w, const float* x, int64_t rows, float* y) {
    int64_t panels = (w.outputs + PANEL - 1) / PANEL;
    int64_t blocks = (rows + ROWS - 1) / ROWS;
    // A unit is some panels of one block of rows: enough work to be worth a hand-over, enough units to balance.
    int64_t work = std::max<int64_t>(1, std::min(rows, ROWS)) * w.inputs * PANEL;
    int64_t each = std::clamp<int64_t>((1 << 18) / work, 1, std::max<int64_t>(1, panels / (2 * pool.threads())));
    int64_t groups = (panels + each - 1) / each;
    pool.run(static_cast<int>(groups * blocks), [&](int unit) {
        int64_t block = unit / groups, first = unit % groups * each, last = std::min(panels, first + each);
        int64_t row = block * ROWS, count = std::min(ROWS, rows - row);
        for (int64_t panel = first; panel < last; panel++) {
            if (rows == 1)
                one_row<Source>(w, x, panel, y);
            else
                more_rows<Source>(w, x + row * w.inputs, count, panel, y + row * w.outputs);
        }
    });
}

}  // namespace

void linear(Pool& pool, const Linear& w, const float* x, int64_t rows, float* y) {
    switch (w.form) {
        case Form::f32: return linear_of<Floats<float>>(pool, w, x, rows, y);
        case Form::bf16: return linear_of<Floats<BFloat>>(pool, w, x, rows, y);
        case Form::f16: return linear_of<Floats<Half>>(pool, w, x, rows, y);
        case Form::int8: return w.minimums ? linear_of<Int8<true>>(pool, w, x, rows, y) : linear_of<Int8<false>>(pool, w, x, rows, y);
        case Form::int4: return w.minimums ? linear_of<Int4<true>>(pool, w, x, rows, y) : linear_of<Int4<false>>(pool, w, x, rows, y);
    }
}

}  // namespace headrace::HEADRACE_ISA
