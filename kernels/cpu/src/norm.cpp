// RMS normalization, with or without a residual to add first, and the addition alone. A row's squares are summed in eight chains over
// its width, which are then added as vec.h's `sum` does; what is left beyond a multiple of eight is summed after them, one by one.
#include <algorithm>

#include "ops.h"
#include "quantize.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {

constexpr int64_t WORTH = 16384;  // elements that are worth handing to a thread

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
    for (int64_t i = 0; i < width; i++) y[i] = x[i] * factor * weight[i];
}

void rmsnorm(Pool& pool, const float* x, const float* residual, const float* weight, float eps, int64_t rows, int64_t width, float* sum,
             const Linear* reader, void* y) {
    const int64_t each = std::max<int64_t>(1, WORTH / std::max<int64_t>(1, width));
    pool.run((rows + each - 1) / each, [&](int64_t unit) {
        for (int64_t row = unit * each; row < std::min(rows, (unit + 1) * each); row++) {
            const float* from = x + row * width;
            if (residual) {
                float* total = sum + row * width;
                for (int64_t i = 0; i < width; i++) total[i] = residual[row * width + i] + from[i];
                from = total;
            }
            give_row(reader, width, row, y, [&](float* to) { normalize(from, weight, eps, width, to); });
        }
    });
}

void add(Pool& pool, const float* x, const float* residual, int64_t count, float* sum) {
    pool.run((count + WORTH - 1) / WORTH, [&](int64_t unit) {
        for (int64_t i = unit * WORTH; i < std::min(count, (unit + 1) * WORTH); i++) sum[i] = residual[i] + x[i];
    });
}

}  // namespace headrace::HEADRACE_ISA
