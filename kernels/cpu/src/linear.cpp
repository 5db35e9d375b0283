// y = x W^T + b: each weight of a layer gets x as it wants it (`floats.cpp`, `integers.cpp`, `bfloats.cpp`).
#include "ops.h"

namespace headrace {

void linear(Pool& pool, const Ops& ops, const Linear& w, const float* x, int64_t rows, float* y) {
    const int64_t width = w.width();
    const Linear* made = nullptr;  // for which x was made something else last
    uint8_t* remade = nullptr;
    for (const Linear* part = &w; part; y += part->outputs, part = part->next) {
        if (part->activations == Activations::f32) {
            ops.linear_floats(pool, *part, x, rows, y, width);
            continue;
        }
        const bool narrowed = part->activations == Activations::bf16;
        if (!made || made->activations != part->activations || (!narrowed && (made->unit() != part->unit() || made->minimums != part->minimums))) {
            remade = reinterpret_cast<uint8_t*>(Pool::scratch(2, ((narrowed ? narrowed_bytes(*part, rows) : rows * quantized_bytes(*part)) + 3) / 4));
            (narrowed ? ops.narrow : ops.quantize)(pool, *part, x, rows, remade);
            made = part;
        }
        (narrowed ? ops.linear_bf16 : ops.linear_int8)(pool, *part, remade, rows, y, width);
    }
}

void linear_codes(Pool& pool, const Ops& ops, const Linear& w, const uint8_t* x, int64_t rows, float* y) {
    const int64_t width = w.width();
    for (const Linear* part = &w; part; y += part->outputs, part = part->next) ops.linear_int8(pool, *part, x, rows, y, width);
}

}  // namespace headrace
