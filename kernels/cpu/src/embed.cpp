// Rows of a packed weight as floats, for embedding tables. A row is one lane of its panel, so that a table shares its storage with the
// output head where both are the same weight.
#include <algorithm>

#include "packed.h"

namespace headrace::HEADRACE_ISA {

void embed(Pool& pool, const Linear& w, const int32_t* ids, int64_t count, float scale, float* y) {
    constexpr int64_t DEPTH = 128, EACH = 4;
    with_source(w, [&](auto source) {
        pool.run((count + EACH - 1) / EACH, [&](int64_t unit) {
            alignas(64) float scratch[DEPTH * PANEL];
            for (int64_t i = unit * EACH; i < std::min(count, (unit + 1) * EACH); i++) {
                for (int64_t from = 0; from < w.inputs; from += DEPTH) {
                    int64_t to = std::min(w.inputs, from + DEPTH);
                    widen_panel(source, ids[i] / PANEL, from, to, scratch);
                    const float* lane = scratch + ids[i] % PANEL;
                    for (int64_t k = from; k < to; k++) y[i * w.inputs + k] = lane[(k - from) * PANEL] * scale;
                }
            }
        });
    });
}

}  // namespace headrace::HEADRACE_ISA
