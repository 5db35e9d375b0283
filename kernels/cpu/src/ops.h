// The native ops of one instruction set, as a table of functions. Arguments are raw pointers to contiguous float32 and int32 arrays;
// `kernels/cpu/__init__.py` has checked them.
#pragma once

#include <cstdint>

#include "pool.h"

namespace headrace {

// Outputs that are computed side by side: a panel holds this many rows of a weight, interleaved by input.
constexpr int PANEL = 16;

enum class Form : int { f32 = 0, bf16 = 1, f16 = 2, int8 = 3, int4 = 4 };

// A weight [N, K] packed into panels:
//   values    [N / PANEL][K][PANEL]            f32, bf16, f16 or int8
//             [N / PANEL][K / 2][PANEL] bytes  int4: input 2i in the low nibble, 2i + 1 in the high one
//   scales    [N / PANEL][K / group][PANEL]    float, integers only
//   minimums  the same, or null
// N is rounded up to PANEL with zeros. A code is its nibble or byte minus `offset`.
struct Linear {
    Form form;
    int64_t outputs, inputs;
    int group, offset;
    const void* values;
    const float* scales;
    const float* minimums;
    const float* bias;  // [N] or null
};

struct Attention {
    const float* q;  // [T, Hq, D]
    const float* keys;
    const float* values;  // [pages, Hkv, page_size, D]
    const int32_t* positions;    // [T]
    const int32_t* query_start;  // [R + 1]
    const int32_t* pages;        // [R, table_width]
    float* out;                  // [T, Hq, D]
    int requests, table_width, query_heads, kv_heads, dim, page_size, window;  // window 0: none
    float scale;
};

struct Rope {
    const float* qkv;  // [T, Hq + 2 Hkv, D]
    const float* cos;
    const float* sin;     // [positions, half]
    const float* q_norm;  // [D] or null
    const float* k_norm;
    const int32_t* positions;
    const int32_t* slots;
    float* keys;
    float* values;
    float* q;  // [T, Hq, D]
    int tokens, query_heads, kv_heads, dim, half, page_size;
    bool interleaved;
    float eps;
};

struct Ops {
    const char* isa;
    void (*linear)(Pool&, const Linear&, const float* x, int64_t rows, float* y);
    void (*attention)(Pool&, const Attention&);
    void (*rope_write_kv)(Pool&, const Rope&);
    // residual and its sum may be null together: then only x is normalized.
    void (*rmsnorm)(Pool&, const float* x, const float* residual, const float* weight, float eps, int64_t rows, int64_t width, float* sum,
                    float* y);
    void (*gated)(Pool&, const float* gate_up, int64_t rows, int64_t width, bool gelu, float* y);
};

namespace portable {
extern const Ops ops;
}
namespace avx2 {
extern const Ops ops;
}

}  // namespace headrace
