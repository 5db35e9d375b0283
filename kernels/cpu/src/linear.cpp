// y = x W^T + b: each weight of a layer gets x as it wants it (`floats.cpp`, `integers.cpp`).
#include "ops.h"

namespace headrace {

void linear(Pool& pool, const Ops& ops, const Linear& w, const float* x, int64_t rows, float* y) {
    const int64_t width = w.width();
    const Linear* made = nullptr;  // for which x was quantized last
    uint8_t* quantized = nullptr;
    for (const Linear* part = &w; part; y += part->outputs, part = part->next) {
        if (!part->quantized) {
            ops.linear_floats(pool, *part, x, rows, y, width);
            continue;
        }
        if (!made || made->unit() != part->unit() || made->minimums != part->minimums) {
            quantized = reinterpret_cast<uint8_t*>(Pool::scratch(2, (rows * quantized_bytes(*part) + 3) / 4));
            ops.quantize(pool, *part, x, rows, quantized);
            made = part;
        }
        ops.linear_int8(pool, *part, quantized, rows, y, width);
    }
}

}  // namespace headrace
