// From logits to tokens and log-probabilities, a row a unit of work. The rules, and the numbers to the last bit, are those of
// `kernels/reference/sampling.py`:
//
//     logits ─▶ repetition ─▶ presence, frequency ─▶ bias ─▶ bans ─▶ temperature ─▶ top k ─▶ top p ─▶ min p ─▶ draw
//       └─────▶ log-softmax ─▶ logprobs of the chosen token and of the most likely ones
//
// Each filter keeps a prefix of the order of tokens, so that all that must be known of a prefix is its sum of weights.
#include "sampling.h"

#include "ops.h"
#include "order.h"
#include "philox.h"

namespace headrace::HEADRACE_ISA {
namespace {

// Scratch of a thread: slot 0 holds a row's adjusted logits, slot 1 its logits without infinities.
constexpr int ADJUSTED = 0, BOUNDED = 1;

Fault fault_of(const Extent& extent) { return extent.nan ? Fault::nan : extent.largest == -INF ? Fault::no_token : Fault::none; }

// How often each id stands in a list. Zeros between uses, so that a row pays for its own ids and not for the vocabulary.
std::vector<int32_t>& tally(int64_t vocabulary) {
    thread_local std::vector<int32_t> counts;
    if (static_cast<int64_t>(counts.size()) < vocabulary) counts.resize(vocabulary);
    return counts;
}

// Applies penalties, bias and bans to a copy of the logits.
const float* adjusted(const float* logits, int64_t vocabulary, const Sampling& s) {
    float* values = Pool::scratch(ADJUSTED, vocabulary);
    std::copy_n(logits, vocabulary, values);
    auto& counts = tally(vocabulary);
    if (s.repetition_penalty != 1) {
        for (const auto* ids : {&s.prompt, &s.output})
            for (int32_t id : *ids) {
                if (counts[id]++) continue;
                const double value = values[id];
                values[id] = static_cast<float>(value > 0 ? value / s.repetition_penalty : value * s.repetition_penalty);
            }
        for (const auto* ids : {&s.prompt, &s.output})
            for (int32_t id : *ids) counts[id] = 0;
    }
    if (s.penalizes()) {
        for (int32_t id : s.output) counts[id]++;
        for (int32_t id : s.output) {
            if (counts[id]) values[id] -= static_cast<float>(s.presence_penalty + s.frequency_penalty * counts[id]);
            counts[id] = 0;
        }
    }
    for (auto [id, bias] : s.logit_bias) values[id] += bias;
    for (int32_t id : s.banned) values[id] = -INF;
    return values;
}

// Logits whose largest is finite. Infinite ones share the whole probability between them.
const float* bounded(const float* values, int64_t vocabulary, Extent& extent) {
    if (extent.largest != INF) return values;
    float* shared = Pool::scratch(BOUNDED, vocabulary);
    for (int64_t i = 0; i < vocabulary; i++) shared[i] = values[i] == INF ? 0.0f : -INF;
    extent = {0.0f, extent.smallest == INF ? 0.0f : -INF, false};
    return shared;
}

int32_t draw(const float* values, int64_t vocabulary, Extent extent, const Sampling& s) {
    values = bounded(values, vocabulary, extent);
    Walk walk(values, vocabulary, extent, s.temperature, s.top_k, s.min_p > 0 ? static_cast<float>(std::log(s.min_p)) : -INF);
    int64_t mass = walk.mass;
    if (s.top_p < 1) {
        const int64_t reach = std::min(static_cast<int64_t>(std::ceil(s.top_p * static_cast<double>(mass))), mass);
        mass = walk.past(std::max<int64_t>(reach, 1) - 1).after;
    }
    mass = std::min(mass, walk.likely);
    // The product of integers is exact, so that it stays below the mass.
    const auto product = static_cast<unsigned __int128>(uniform(s.seed, s.position)) * static_cast<uint64_t>(mass);
    return walk.past(static_cast<int64_t>(product >> 53)).id;
}

void choose(const float* logits, int64_t vocabulary, const Extent& raw, const Sampling& s, Choice& choice) {
    const float* values = logits;
    Extent extent = raw;
    if (s.adjusts()) {
        values = adjusted(logits, vocabulary, s);
        extent = HEADRACE_ISA::extent(values, vocabulary);
        if ((choice.fault = fault_of(extent)) != Fault::none) return;
    }
    const bool greedy = s.temperature == 0 || s.top_k == 1;
    choice.token = greedy ? static_cast<int32_t>(find(values, vocabulary, extent.largest)) : draw(values, vocabulary, extent, s);
}

// Log-probabilities of the chosen token and of the `top` most likely ones.
void report(const float* logits, int64_t vocabulary, Extent extent, int64_t top, Choice& choice) {
    thread_local std::vector<int64_t> keys;
    head(logits, vocabulary, std::min(top, vocabulary), keys);
    const float* values = bounded(logits, vocabulary, extent);
    const double total = std::log(static_cast<double>(mass(values, vocabulary, extent.largest, 1.0f, -INF)) / UNIT);
    auto logprob = [&](int32_t id) { return static_cast<double>(values[id]) - static_cast<double>(extent.largest) - total; };
    choice.logprob = logprob(choice.token);
    choice.top.reserve(keys.size());
    for (int64_t key : keys) choice.top.emplace_back(id_of(key), logprob(id_of(key)));
}

}  // namespace

void sample(Pool& pool, const float* logits, int64_t rows, int64_t vocabulary, const Sampling* parameters, Choice* choices) {
    pool.run(rows, [=](int64_t row) {
        const float* values = logits + row * vocabulary;
        const Sampling& s = parameters[row];
        Choice& choice = choices[row];
        const Extent raw = extent(values, vocabulary);
        if ((choice.fault = fault_of(raw)) != Fault::none) return;
        choose(values, vocabulary, raw, s, choice);
        if (choice.fault == Fault::none && s.logprobs >= 0) report(values, vocabulary, raw, s.logprobs, choice);
    });
}

void score(Pool& pool, const float* logits, int64_t rows, int64_t vocabulary, const int32_t* tokens, int64_t top, Choice* choices) {
    pool.run(rows, [=](int64_t row) {
        const float* values = logits + row * vocabulary;
        const Extent raw = extent(values, vocabulary);
        choices[row].token = tokens[row];
        if ((choices[row].fault = fault_of(raw)) == Fault::none) report(values, vocabulary, raw, top, choices[row]);
    });
}

}  // namespace headrace::HEADRACE_ISA
