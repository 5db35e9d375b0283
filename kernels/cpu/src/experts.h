// The linear layers of several experts: each row of x is multiplied with the weights of those that it was sent to.
//
//     rows      t0: 2 0   t1: 2 1   t2: 0 2          chosen, each row's in the order of their logits
//     pairs     0  1      2  3      4  5             row * used + place
//     sorted    [0: 1 4] [1: 3] [2: 0 2 5]           by expert, then by number: an expert's rows are one product
#pragma once

#include <vector>

#include "ops.h"

namespace headrace {

// Filled by the op `route` of every step, read by those behind it.
struct Routing {
    const int64_t experts, used;
    const bool renormalize;
    std::vector<int32_t> chosen;  // [rows, used]
    std::vector<int32_t> starts;  // [experts + 1]: where each expert's pairs begin among the sorted ones
    std::vector<int32_t> sorted;  // [rows * used]: pairs
    std::vector<int32_t> places;  // [rows * used]: where each pair stands among the sorted ones

    int64_t pairs() const { return static_cast<int64_t>(chosen.size()); }
    // Room for so many rows; nothing is allocated that was there before.
    void resize(int64_t rows);
    // Sorts the pairs of `chosen`.
    void sort();
};

// y [pairs, width], sorted, is x times each pair's expert's weight; rows > 0. The panels of w are those of expert 0, those of the others
// follow. x is [pairs, K], sorted, or [rows, K] of which each is meant for all its pairs.
void experts_linear(Pool&, const Ops&, const Linear& w, const Routing&, const float* x, bool sorted, float* y);

}  // namespace headrace
