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

// How a weight is stored: floats, integer codes of 8, at most 6, or 4 bits, or codes that are float8 (e4m3, without NaN).
enum class Form : int { f32 = 0, bf16 = 1, f16 = 2, int8 = 3, int6 = 4, int4 = 5, e4m3 = 6 };

// How the scales of codes are stored: as floats, as IEEE binary16, or as levels: a signed byte times a float that LEVELLED inputs share.
// Or as binary16 with zeros, signed bytes whose product with the scale, taken off, is the minimum; float32 holds it exactly.
enum class Scales : int { f32 = 0, f16 = 1, levels = 2, zeros = 3 };

constexpr int64_t LEVELLED = 256;

// What x is made before it is multiplied:
//   f32   nothing else
//   int8  codes, where weights are integer codes too: `inputs` and `group` are multiples of 32. Or int6 without minimums has a `group` of 16.
//   bf16  bfloat16, where weights are that or codes: `inputs` is a multiple of 32, and so is `group`, or it is 16
enum class Activations : int { f32 = 0, int8 = 1, bf16 = 2 };

// A weight [N, K] packed into panels, one after the other, from a 64-byte boundary on. N is rounded up to PANEL with zeros.
//
// Floats stand as [K][PANEL]. Codes stand in blocks along K, so that one row of x reads a single stream:
//
//   block   of a group of inputs: [scales PANEL] [minimums PANEL, if any] [codes]
//           of LEVELLED inputs where scales are levels: [factors PANEL floats] [factors of minimums, if any], for each group
//           [levels PANEL bytes] [levels of minimums, if any], then [codes] of all groups
//           or, in place of minimums, [zeros PANEL bytes]
//   codes   of 4 inputs: 4 bytes an output, one an input, outputs in order. With 4 bits, output 8 + i shares the bytes of output i:
//           that is the low nibble, this the high one. Float8 stands as [inputs][PANEL], as floats do.
//
// A code is its byte (signed in int8, unsigned in int6) or nibble, less `offset`, which is not 0 only without minimums. Inputs come in
// whole groups, and groups in multiples of 4. Floats are one group of K inputs.
struct Linear {
    Form form;
    Scales scales;
    bool minimums;
    Activations activations;
    int offset;
    int64_t outputs, inputs, group;
    const uint8_t* panels;
    const float* bias;   // [N] or null
    const Linear* next;  // the weight of the outputs that follow in the same rows of y, or null

    // Outputs of all weights from here on.
    int64_t width() const { return outputs + (next ? next->width() : 0); }

    bool floats() const { return form <= Form::f16; }
    // Inputs that share a sum in quantized rows.
    int64_t unit() const { return group < 32 ? group : 32; }

    int64_t span() const { return scales == Scales::levels ? LEVELLED : group; }
    int64_t header() const {
        const int64_t kinds = minimums ? 2 : 1;
        if (scales == Scales::zeros) return PANEL * 3;
        if (scales == Scales::levels) return kinds * PANEL * (4 + LEVELLED / group);
        return kinds * PANEL * (scales == Scales::f16 ? 2 : 4);
    }
    // Bytes of `count` inputs, of a block of codes, of a panel, of all.
    int64_t bytes(int64_t count) const {
        switch (form) {
            case Form::f32: return count * PANEL * 4;
            case Form::bf16:
            case Form::f16: return count * PANEL * 2;
            case Form::int4: return count * PANEL / 2;
            default: return count * PANEL;
        }
    }
    int64_t block() const { return header() + bytes(span()); }
    int64_t panel() const { return floats() ? bytes(inputs) : inputs / span() * block(); }
    int64_t size() const { return (outputs + PANEL - 1) / PANEL * panel(); }
};

// Rows of x as int8, for a quantized weight. Each 32 inputs are
//
//   [scale] [sums 32 / unit] floats, [codes 32] bytes     x[k] ~ scale * code[k]
//
// where scale = largest |x| / 127, and codes are x * (127 / largest |x|), rounded to even. A sum is that of the codes of a unit of
// inputs; times the scale, rounded, if the weight has minimums. Where x holds NaN or an infinity, scale is NaN and codes are 0; where
// no |x| reaches 2^-100, all is 0.
constexpr int64_t QUANTUM = 32;

constexpr int64_t quantized_step(int64_t unit) { return 4 + 4 * (QUANTUM / unit) + QUANTUM; }

inline int64_t quantized_bytes(const Linear& w) { return w.inputs / QUANTUM * quantized_step(w.unit()); }

// Rows of x as bfloat16, in blocks as tiles take them: [rows / NARROWED][inputs / 32][NARROWED][32], the last block as if it were whole.
constexpr int64_t NARROWED = 16;

inline int64_t narrowed_bytes(const Linear& w, int64_t rows) { return (rows + NARROWED - 1) / NARROWED * NARROWED * w.inputs * 2; }

// Rows `query_start[r] … query_start[r + 1] - 1` of the batch belong to request r, whose pages stand in row r of `pages`: the K and V of
// its i-th row at the place of its first row's position, plus i. Without `parents` that is each row's own position.
struct Batch {
    const int32_t* positions;    // [T]
    const int32_t* slots;        // [T]
    const int32_t* query_start;  // [R + 1]
    const int32_t* pages;        // [R, table_width]
    const int32_t* parents;      // [T] or null: the row of the same request that each follows, -1 for none
    int64_t tokens, requests, table_width;
};

struct Heads {
    int query, kv, dim;
};

// How keys and values are stored: as floats, as IEEE binary16, or as bytes that share a scale in each head of each position.
enum class KVForm : int { f32 = 0, f16 = 1, int8 = 2 };

// Pages of one layer. Keys lie transposed, values are padded with zeros to whole vectors. What is read together stands together:
//   numbers  [pages] of [Hkv] of keys [D][page_size], then values [page_size][value_width(D)]; pages stand `apart` numbers from each other
//   scales   [pages][Hkv][2][page_size], of keys, then of values; null unless they are int8
struct KV {
    void* numbers;
    float* scales;
    int64_t pages, apart, page_size;  // page_size is a multiple of 8
    KVForm form;

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

// Rates a second, of all threads together.
struct Peaks {
    double float_operations;  // multiplications and additions of float32
    double int8_operations;   // of 4-bit codes and int8, added up
    double bf16_operations;   // of bfloat16, added up as float32
    double bytes_read;        // from memory
};

struct Ops {
    const char* isa;
    // x [rows, K] to y, whose rows stand `stride` apart; rows > 0. For one weight, the next ones left out.
    void (*linear_floats)(Pool&, const Linear&, const float* x, int64_t rows, float* y, int64_t stride);
    // The same for x as `quantize` gives it for this weight.
    void (*linear_int8)(Pool&, const Linear&, const uint8_t* x, int64_t rows, float* y, int64_t stride);
    // x [rows, K] to rows of `quantized_bytes` each.
    void (*quantize)(Pool&, const Linear&, const float* x, int64_t rows, uint8_t* quantized);
    // The same two for bfloat16; x [rows, K] to `narrowed_bytes`.
    void (*linear_bf16)(Pool&, const Linear&, const uint8_t* x, int64_t rows, float* y, int64_t stride);
    void (*narrow)(Pool&, const Linear&, const float* x, int64_t rows, uint8_t* narrowed);
    // `linear_int8` by a weight of two halves, and at once what `gated` makes of it for a reader.
    void (*linear_gated)(Pool&, const Linear& gate_up, const uint8_t* x, int64_t rows, bool gelu, const Linear& reader, uint8_t* y);
    // y[i] = row ids[i] of the weight, times scale.
    void (*embed)(Pool&, const Linear&, const int32_t* ids, int64_t count, float scale, float* y);
    // q and out [T, Hq, D]. A window of 0 is none.
    void (*attention)(Pool&, const float* q, const Heads&, const KV&, const Batch&, float scale, int window, float* out);
    // qkv [T, Hq + 2 Hkv, D] to q [T, Hq, D] and the pages.
    void (*rope_write_kv)(Pool&, const float* qkv, const Heads&, const Rope&, const KV&, const Batch&, float* q);
    // Where these two have a `reader`, y is what `quantize` would make of their floats for that weight.
    // residual and its sum may be null together: then only x is normalized.
    void (*rmsnorm)(Pool&, const float* x, const float* residual, const float* weight, float eps, int64_t rows, int64_t width, float* sum,
                    const Linear* reader, void* y);
    // gate_up [rows, 2 width] to y [rows, width].
    void (*gated)(Pool&, const float* gate_up, int64_t rows, int64_t width, bool gelu, const Linear* reader, void* y);
    void (*add)(Pool&, const float* x, const float* residual, int64_t count, float* sum);
    // The `used` highest logits of each row [rows, experts], equal ones by number, and their weights: both [rows, used].
    void (*route)(Pool&, const float* logits, int64_t rows, int64_t experts, int64_t used, bool renormalize, int32_t* chosen, float* weights);
    // y [rows, width]: sums of rows `places` [rows, used] of x by their weights, in this order.
    void (*combine)(Pool&, const float* x, const int32_t* places, const float* weights, int64_t rows, int64_t used, int64_t width, float* y);
    // logits [rows, vocabulary], to one choice a row.
    void (*sample)(Pool&, const float* logits, int64_t rows, int64_t vocabulary, const Sampling*, Choice*);
    void (*score)(Pool&, const float* logits, int64_t rows, int64_t vocabulary, const int32_t* tokens, int64_t top, Choice*);
    // What the machine does at most; `bytes` are so many that no cache holds them.
    Peaks (*probe)(Pool&, const uint8_t* bytes, int64_t size);
};

// x [rows, K] to y [rows, width], rows > 0: a weight and those that follow it, each with x as it wants it.
void linear(Pool&, const Ops&, const Linear&, const float* x, int64_t rows, float* y);
// The same where all of them want the codes that x is.
void linear_codes(Pool&, const Ops&, const Linear&, const uint8_t* x, int64_t rows, float* y);

namespace portable {
extern const Ops ops;
}
namespace avx2 {
extern const Ops ops;
}
namespace avx512 {
extern const Ops ops;
}
// With instructions that multiply and add up bytes at once; all else is that of avx2, or avx512.
namespace avxvnni {
void linear_int8(Pool&, const Linear&, const uint8_t* x, int64_t rows, float* y, int64_t stride);
void linear_gated(Pool&, const Linear&, const uint8_t* x, int64_t rows, bool gelu, const Linear& reader, uint8_t* y);
Peaks probe(Pool&, const uint8_t* bytes, int64_t size);
}
namespace avx512vnni {
void linear_int8(Pool&, const Linear&, const uint8_t* x, int64_t rows, float* y, int64_t stride);
void linear_gated(Pool&, const Linear&, const uint8_t* x, int64_t rows, bool gelu, const Linear& reader, uint8_t* y);
Peaks probe(Pool&, const uint8_t* bytes, int64_t size);
}
// With tiles on top of those of avx512vnni.
namespace amx {
void linear_int8(Pool&, const Linear&, const uint8_t* x, int64_t rows, float* y, int64_t stride);
void linear_gated(Pool&, const Linear&, const uint8_t* x, int64_t rows, bool gelu, const Linear& reader, uint8_t* y);
void linear_bf16(Pool&, const Linear&, const uint8_t* x, int64_t rows, float* y, int64_t stride);
Peaks probe(Pool&, const uint8_t* bytes, int64_t size);
}

}  // namespace headrace
