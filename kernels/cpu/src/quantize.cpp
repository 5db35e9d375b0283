// Rows of x as int8 (`quantize.h`), some a unit of work.
#include "quantize.h"

namespace headrace::HEADRACE_ISA {

constexpr int64_t WORTH = 1 << 15;  // values that are worth handing to a thread

void quantize(Pool& pool, const Linear& w, const float* x, int64_t rows, uint8_t* quantized) {
    const int64_t each = std::max<int64_t>(1, WORTH / w.inputs);
    pool.run((rows + each - 1) / each, [&](int64_t unit) {
        const int64_t first = unit * each, count = std::min(rows - first, each);
        quantize_steps(w, x + first * w.inputs, count * (w.inputs / QUANTUM), quantized + first * quantized_bytes(w));
    });
}

}  // namespace headrace::HEADRACE_ISA
