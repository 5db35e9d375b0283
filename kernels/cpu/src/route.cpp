// Which experts a row goes to, and what each counts: the highest logits, and their shares of a softmax.
#include <algorithm>
#include <limits>

#include "ops.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {
namespace {

constexpr int64_t WORTH = 1 << 13;  // comparisons that are worth handing to a thread

// Ordered as the numbers are: both zeros are one, and what is not a number is above all.
int32_t key_of(float x) {
    const int32_t bits = std::bit_cast<int32_t>(x + 0.0f), magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return std::numeric_limits<int32_t>::max();
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// Calls use(i, e^(logit - largest)) for the logits at(0) … at(count - 1), in order.
template <class At, class Use>
void shares(int64_t count, float largest, const At& at, const Use& use) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t lanes = std::min<int64_t>(LANES, count - i);
        float values[LANES] = {};
        for (int64_t lane = 0; lane < lanes; lane++) values[lane] = at(i + lane) - largest;
        store(values, exp(load(values)));
        for (int64_t lane = 0; lane < lanes; lane++) use(i + lane, values[lane]);
    }
}

void one_row(const float* logits, int64_t experts, int64_t used, bool renormalize, int32_t* chosen, float* weights) {
    int32_t* keys = reinterpret_cast<int32_t*>(Pool::scratch(2, experts));
    for (int64_t e = 0; e < experts; e++) keys[e] = key_of(logits[e]);
    for (int64_t place = 0; place < used; place++) {
        // The highest of those that come after the one before: lower, or equal and further on.
        const int64_t before = place ? chosen[place - 1] : -1;
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++) {
            const bool after = before < 0 || keys[e] < keys[before] || (keys[e] == keys[before] && e > before);
            if (after && (best < 0 || keys[e] > keys[best])) best = e;
        }
        chosen[place] = static_cast<int32_t>(best);
    }
    const float largest = logits[chosen[0]];
    float total = 0.0f;
    const auto add = [&](int64_t, float share) { total += share; };
    const auto of_chosen = [&](int64_t place) { return logits[chosen[place]]; };
    if (renormalize)
        shares(used, largest, of_chosen, add);
    else
        shares(experts, largest, [&](int64_t e) { return logits[e]; }, add);
    shares(used, largest, of_chosen, [&](int64_t place, float share) { weights[place] = share / total; });
}

}  // namespace

void route(Pool& pool, const float* logits, int64_t rows, int64_t experts, int64_t used, bool renormalize, int32_t* chosen, float* weights) {
    const int64_t each = std::max<int64_t>(1, WORTH / (experts * used));
    pool.run((rows + each - 1) / each, [&](int64_t unit) {
        for (int64_t row = unit * each; row < std::min(rows, (unit + 1) * each); row++)
            one_row(logits + row * experts, experts, used, renormalize, chosen + row * used, weights + row * used);
    });
}

}  // namespace headrace::HEADRACE_ISA
