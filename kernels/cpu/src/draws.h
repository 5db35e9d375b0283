// `sample` and `score` as Python calls them: columns of a `kernels.ops.SamplingBatch` in, tokens and log-probabilities out.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "ops.h"

namespace headrace {

using Logits = nanobind::ndarray<nanobind::ro, nanobind::c_contig, nanobind::device::cpu>;
template <class T>
using Column = std::vector<T>;
using Ids = std::vector<int32_t>;

// (tokens, logprobs). ValueError for columns of the wrong length and ids out of bounds, FloatingPointError for a row that has no answer.
nanobind::tuple sample(Pool&, const Ops&, const Logits&, const Column<double>& temperature, const Column<int64_t>& top_k,
                       const Column<double>& top_p, const Column<double>& min_p, const Column<double>& repetition_penalty,
                       const Column<double>& presence_penalty, const Column<double>& frequency_penalty,
                       const Column<nanobind::int_>& seed, const Column<int64_t>& position,
                       Column<std::vector<std::pair<int32_t, double>>> logit_bias, Column<Ids> banned, Column<Ids> prompt,
                       Column<Ids> output, const Column<std::optional<int64_t>>& logprobs);

// The number in [0, 1) that a row with this seed and position draws with.
double number(const nanobind::int_& seed, uint64_t position);

nanobind::list score(Pool&, const Ops&, const Logits&, const Ids& tokens, int64_t top);

}  // namespace headrace
