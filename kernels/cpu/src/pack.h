// From a weight [N, K] as loaders give it to panels (`ops.h` has the layout). Runs once, when a model is loaded.
#pragma once

#include <cstdint>

#include "pool.h"

namespace headrace {

// Values of `size` 1, 2 or 4 bytes: [N, K] to [N / PANEL][K][PANEL], zeros from N on.
void pack(Pool& pool, const void* from, int64_t outputs, int64_t inputs, int size, void* to);

// Codes int8 [N, K], each plus `offset` within 0 … 15, two to a byte: [N / PANEL][K / 2][PANEL].
void pack_nibbles(Pool& pool, const int8_t* from, int64_t outputs, int64_t inputs, int offset, uint8_t* to);

}  // namespace headrace
