// What it takes to choose a token from a row of logits, and what comes of it. `kernels/reference/sampling.py` defines the rules.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace headrace {

// One row's parameters; `kernels.ops.SamplingBatch` says what they mean. Ids are within the vocabulary.
struct Sampling {
    float temperature;
    int64_t top_k;
    double top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    uint64_t seed, position;
    std::vector<std::pair<int32_t, float>> logit_bias;
    std::vector<int32_t> banned, prompt, output;
    int64_t logprobs;  // how many most likely tokens to report, negative for no report at all

    bool penalizes() const { return presence_penalty != 0 || frequency_penalty != 0; }
    bool adjusts() const { return repetition_penalty != 1 || penalizes() || !logit_bias.empty() || !banned.empty(); }
};

enum class Fault { none, nan, no_token };

struct Choice {
    Fault fault = Fault::none;
    int32_t token = 0;
    double logprob = 0;
    std::vector<std::pair<int32_t, double>> top;  // by falling probability
};

}  // namespace headrace
