// activation(gate) * up, with SiLU or the tanh form of GELU (arXiv:1606.08415). Tails run through the same vector code, padded.
#pragma once

#include <algorithm>

#include "quantize.h"

namespace headrace::HEADRACE_ISA {

inline Vec sigmoid(Vec x) { return all(1.0f) / (all(1.0f) + exp(-x)); }

// 0.5 (1 + tanh(u)) is sigmoid(2 u).
inline Vec gelu(Vec x) {
    Vec u = all(0.7978845608028654f) * fma(all(0.044715f) * x * x, x, x);
    return x * sigmoid(u + u);
}

inline Vec silu(Vec x) { return x * sigmoid(x); }

template <Vec (*ACTIVATION)(Vec)>
inline void gate_with(const float* gate, const float* up, int64_t width, float* y) {
    int64_t whole = width / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(y + i, ACTIVATION(load(gate + i)) * load(up + i));
    if (whole < width) {
        float g[LANES] = {}, u[LANES] = {}, out[LANES];
        std::copy(gate + whole, gate + width, g);
        std::copy(up + whole, up + width, u);
        store(out, ACTIVATION(load(g)) * load(u));
        std::copy(out, out + (width - whole), y + whole);
    }
}

inline void gate(bool use_gelu, const float* gate, const float* up, int64_t width, float* y) {
    use_gelu ? gate_with<gelu>(gate, up, width, y) : gate_with<silu>(gate, up, width, y);
}

// Some rows a unit of work: as floats, or as codes for the product that follows.
inline void gate_rows(Pool& pool, const float* gate_up, int64_t rows, int64_t width, bool use_gelu, const Linear* reader, void* y) {
    const int64_t each = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, width));
    pool.run((rows + each - 1) / each, [&](int64_t unit) {
        for (int64_t row = unit * each; row < std::min(rows, (unit + 1) * each); row++) {
            const float* halves = gate_up + row * 2 * width;
            give_row(reader, width, row, y, [&](float* to) { gate(use_gelu, halves, halves + width, width, to); });
        }
    });
}

}  // namespace headrace::HEADRACE_ISA
