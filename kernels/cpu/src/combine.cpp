// What a row's experts gave, added up by their weights in the order of its choice: sum = fma(weight, value, sum) from 0.
#include <algorithm>

#include "ops.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {
namespace {

constexpr int64_t WORTH = 1 << 14;  // values that are worth handing to a thread

// LANES columns, or the first `count` of them.
void some_columns(const float* x, const int32_t* places, const float* weights, int64_t used, int64_t width, int64_t count, float* y) {
    Vec sum = all(0.0f);
    for (int64_t i = 0; i < used; i++) {
        const float* from = x + places[i] * width;
        float padded[LANES] = {};
        if (count < LANES) from = std::copy_n(from, count, padded) - count;
        sum = fma(all(weights[i]), load(from), sum);
    }
    if (count == LANES) return store(y, sum);
    float values[LANES];
    store(values, sum);
    std::copy_n(values, count, y);
}

}  // namespace

void combine(Pool& pool, const float* x, const int32_t* places, const float* weights, int64_t rows, int64_t used, int64_t width, float* y) {
    const int64_t each = std::max<int64_t>(1, WORTH / (used * width));
    pool.run((rows + each - 1) / each, [&](int64_t unit) {
        for (int64_t row = unit * each; row < std::min(rows, (unit + 1) * each); row++)
            for (int64_t i = 0; i < width; i += LANES)
                some_columns(x + i, places + row * used, weights + row * used, used, width, std::min<int64_t>(LANES, width - i), y + row * width + i);
    });
}

}  // namespace headrace::HEADRACE_ISA
