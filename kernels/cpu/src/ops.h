// The native ops of one instruction set, as a table of functions. Arguments are raw pointers to contiguous float32 and int32 arrays;
// `kernels/cpu/__init__.py` has checked shapes and types, `module.cpp` that indices stay within bounds.
#pragma once

#include <cstdint>

#include "pool.h"

namespace headrace {

// Every instruction set compiles these again, with instructions that others may lack: none may end up as a function that all share.
#define HEADRACE_INLINE [[gnu::always_inline]]

// Outputs that are computed side by side: a panel holds this many rows of a weight, interleaved by input.
constexpr int PANEL = 16;

enum class Form : int { f32 = 0, bf16 = 1, f16 = 2, int8 = 3, int4 = 4 };

// A weight [N, K] packed into panels:
//   values    [N / PANEL][K][PANEL]            f32, bf16, f16 or int8
//             [N / PANEL][K / 2][PANEL] bytes  int4: input 2i in the low nibble, 2i + 1 in the high one
//   scales    [N / PANEL][K / group][PANEL]    float, or IEEE binary16 where `halves`; integers only
//   minimums  the same, or null
// N is rounded up to PANEL with zeros. A code is its nibble or byte minus `offset`, which is not 0 only without minimums.
// Floats are one group of K inputs.
struct Linear {
    Form form;
    int64_t outputs, inputs, group;
    int offset;
    bool halves;
    const void* values;
    const void* scales;
    const void* minimums;
    const float* bias;  // [N] or null
};

// Rows `query_start[r] … query_start[r + 1] - 1` of the batch belong to request r, whose pages stand in row r of `pages`.
struct Batch {
    const int32_t* positions;    // [T]
    const int32_t* slots;        // [T]
    const int32_t* query_start;  // [R + 1]
    const int32_t* pages;        // [R, table_width]
    int64_t tokens, requests, table_width;
};

struct Heads {
    int query, kv, dim;
};

// Pages of one layer, in float or, where `halves`, IEEE binary16. Keys lie transposed, values are padded with zeros to whole vectors:
//   keys    [pages][Hkv][D][page_size]
//   values  [pages][Hkv][page_size][value_width(D)]
struct KV {
    void* keys;
    void* values;
    int64_t pages, page_size;  // page_size is a multiple of 8
    bool halves;

    HEADRACE_INLINE int64_t value_width(int64_t dim) const { return (dim + 7) / 8 * 8; }
};

struct Rope {
    const float* cos;
    const float* sin;  // [positions, half]
    int64_t positions, half;
    bool interleaved;
    const float* q_norm;  // [D] or null
    const float* k_norm;
    float eps;
};

struct Sampling;  // sampling.h
struct Choice;

struct Ops {
    const char* isa;
    // x [rows, K] to y [rows, N], rows > 0.
    void (*linear)(Pool&, const Linear&, const float* x, int64_t rows, float* y);
    // y[i] = row ids[i] of the weight, times scale.
    void (*embed)(Pool&, const Linear&, const int32_t* ids, int64_t count, float scale, float* y);
    // q and out [T, Hq, D]. A window of 0 is none.
    void (*attention)(Pool&, const float* q, const Heads&, const KV&, const Batch&, float scale, int window, float* out);
    // qkv [T, Hq + 2 Hkv, D] to q [T, Hq, D] and the pages.
    void (*rope_write_kv)(Pool&, const float* qkv, const Heads&, const Rope&, const KV&, const Batch&, float* q);
    // residual and its sum may be null together: then only x is normalized.
    void (*rmsnorm)(Pool&, const float* x, const float* residual, const float* weight, float eps, int64_t rows, int64_t width, float* sum,
                    float* y);
    void (*gated)(Pool&, const float* gate_up, int64_t rows, int64_t width, bool gelu, float* y);
    void (*add)(Pool&, const float* x, const float* residual, int64_t count, float* sum);
    // logits [rows, vocabulary], to one choice a row.
    void (*sample)(Pool&, const float* logits, int64_t rows, int64_t vocabulary, const Sampling*, Choice*);
    void (*score)(Pool&, const float* logits, int64_t rows, int64_t vocabulary, const int32_t* tokens, int64_t top, Choice*);
};

namespace portable {
extern const Ops ops;
}
namespace avx2 {
extern const Ops ops;
}
namespace avx512 {
extern const Ops ops;
}

}  // namespace headrace
