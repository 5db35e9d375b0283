// The table of one instruction set.
#include "ops.h"

namespace headrace::HEADRACE_ISA {

void attention(Pool&, const Attention&);
void linear(Pool&, const Linear&, const float*, int64_t, float*);
void rope_write_kv(Pool&, const Rope&);
void rmsnorm(Pool&, const float*, const float*, const float*, float, int64_t, int64_t, float*, float*);
void gated(Pool&, const float*, int64_t, int64_t, bool, float*);

#define HEADRACE_NAME_OF(isa) #isa
#define HEADRACE_NAME(isa) HEADRACE_NAME_OF(isa)
extern const Ops ops = {HEADRACE_NAME(HEADRACE_ISA), linear, attention, rope_write_kv, rmsnorm, gated};

}  // namespace headrace::HEADRACE_ISA
