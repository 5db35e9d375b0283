// The op of its own; products have the same in `integers.cpp`.
#include "gated.h"

namespace headrace::HEADRACE_ISA {

void gated(Pool& pool, const float* gate_up, int64_t rows, int64_t width, bool gelu, const Linear* reader, void* y) {
    gate_rows(pool, gate_up, rows, width, gelu, reader, y);
}

}  // namespace headrace::HEADRACE_ISA
