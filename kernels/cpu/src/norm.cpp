// RMS normalization, with or without a residual to add first. A row's squares are summed in eight chains over its width, which are
// then added as vec.h's `sum` does; the rest beyond a multiple of eight is summed after them, one by one.
#include <algorithm>

#include "ops.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {

// Also used for the heads of q and k. x and y may be the same.
void normalize(const float* x, const float* weight, float eps, int64_t width, float* y) {
    int64_t whole = width / LANES * LANES;
    Vec squares = {};
    for (int64_t i = 0; i < whole; i += LANES) {
        Vec v = load(x + i);
        squares = fma(v, v, squares);
    }
    float total = sum(squares);
    for (int64_t i = whole; i < width; i++) total += x[i] * x[i];
    float factor = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
    for (int64_t i = 0; i < whole; i += LANES) store(y + i, load(x + i) * all(factor) * load(weight + i));
    for (int64_t i = whole; i < width; i++) y[i] = x[i] * factor * weight[i];
}

void rmsnorm(Pool& pool, const float* x, const float* residual, const float* weight, float eps, int64_t rows, int64_t width, float* sum,
             float* y) {
    int64_t each = std::max<int64_t>(1, 16384 / width), units = (rows + each - 1) / each;
    pool.run(static_cast<int>(units), [&](int unit) {
        for (int64_t row = unit * each; row < std::min(rows, (unit + 1) * each); row++) {
            const float* from = x + row * width;
            if (residual) {
                float* total = sum + row * width;
                for (int64_t i = 0; i < width; i++) total[i] = residual[row * width + i] + from[i];
                from = total;
            }
            normalize(from, weight, eps, width, y + row * width);
        }
    });
}

}  // namespace headrace::HEADRACE_ISA
