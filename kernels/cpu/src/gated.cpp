// activation(gate) * up, with SiLU or the tanh form of GELU (arXiv:1606.08415). Tails run through the same vector code, padded.
#include <algorithm>

#include "ops.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {
namespace {

Vec sigmoid(Vec x) { return all(1.0f) / (all(1.0f) + exp(-x)); }

// 0.5 (1 + tanh(u)) is sigmoid(2 u).
Vec gelu(Vec x) {
    Vec u = all(0.7978845608028654f) * fma(all(0.044715f) * x * x, x, x);
    return x * sigmoid(u + u);
}

Vec silu(Vec x) { return x * sigmoid(x); }

template <Vec (*ACTIVATION)(Vec)>
void one_row(const float* gate, const float* up, int64_t width, float* y) {
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

}  // namespace

void gated(Pool& pool, const float* gate_up, int64_t rows, int64_t width, bool use_gelu, float* y) {
    const int64_t each = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, width));
    pool.run((rows + each - 1) / each, [&](int64_t unit) {
        for (int64_t row = unit * each; row < std::min(rows, (unit + 1) * each); row++) {
            const float* gate = gate_up + row * 2 * width;
            (use_gelu ? one_row<gelu> : one_row<silu>)(gate, gate + width, width, y + row * width);
        }
    });
}

}  // namespace headrace::HEADRACE_ISA
