// From weights [N, K] as loaders give them to panels (`ops.h` has the layout). Runs once, when a model is loaded.
#pragma once

#include <cstdint>
#include <vector>

#include "ops.h"

namespace headrace {

// Some outputs of a weight: floats, or codes with their scales and perhaps minimums, as in `kernels/weights.py`.
struct Rows {
    int64_t outputs;
    const void* values;      // [outputs, K] float32, bfloat16, binary16, int8 or float8
    const float* scales;     // [outputs, K / group]
    const float* minimums;   // the same, or null
    const int8_t* zeros;     // the same, or null; beside scales that are all exact in binary16
};

// How to store integer codes: sets form, scales, minimums and offset of a Linear whose inputs and group are known.
void choose(Pool& pool, const std::vector<Rows>& parts, Linear& w);

// Parts stacked along N into w.size() bytes; w.outputs is their sum.
void pack(Pool& pool, const std::vector<Rows>& parts, const Linear& w, uint8_t* to);

}  // namespace headrace
