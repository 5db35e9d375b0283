// The table of one instruction set.
#include "ops.h"

namespace headrace::HEADRACE_ISA {

void linear_floats(Pool&, const Linear&, const float*, int64_t, float*, int64_t);
void linear_int8(Pool&, const Linear&, const uint8_t*, int64_t, float*, int64_t);
void quantize(Pool&, const Linear&, const float*, int64_t, uint8_t*);
void linear_bf16(Pool&, const Linear&, const uint8_t*, int64_t, float*, int64_t);
void narrow(Pool&, const Linear&, const float*, int64_t, uint8_t*);
void linear_gated(Pool&, const Linear&, const uint8_t*, int64_t, bool, const Linear&, uint8_t*);
void embed(Pool&, const Linear&, const int32_t*, int64_t, float, float*);
void attention(Pool&, const float*, const Heads&, const KV&, const Batch&, float, int, float*);
void rope_write_kv(Pool&, const float*, const Heads&, const Rope&, const KV&, const Batch&, float*);
void rmsnorm(Pool&, const float*, const float*, const float*, float, int64_t, int64_t, float*, const Linear*, void*);
void gated(Pool&, const float*, int64_t, int64_t, bool, const Linear*, void*);
void add(Pool&, const float*, const float*, int64_t, float*);
void route(Pool&, const float*, int64_t, int64_t, int64_t, bool, int32_t*, float*);
void combine(Pool&, const float*, const int32_t*, const float*, int64_t, int64_t, int64_t, float*);
void sample(Pool&, const float*, int64_t, int64_t, const Sampling*, Choice*);
void score(Pool&, const float*, int64_t, int64_t, const int32_t*, int64_t, Choice*);
Peaks probe(Pool&, const uint8_t*, int64_t);

#define HEADRACE_NAME_OF(isa) #isa
#define HEADRACE_NAME(isa) HEADRACE_NAME_OF(isa)
extern const Ops ops = {
    HEADRACE_NAME(HEADRACE_ISA),
    linear_floats,
    linear_int8,
    quantize,
    linear_bf16,
    narrow,
    linear_gated,
    embed,
    attention,
    rope_write_kv,
    rmsnorm,
    gated,
    add,
    route,
    combine,
    sample,
    score,
    probe,
};

}  // namespace headrace::HEADRACE_ISA
