#include "draws.h"

#include <string>

#include "philox.h"
#include "sampling.h"

namespace nb = nanobind;

namespace headrace {
namespace {

struct Matrix {
    const float* values;
    int64_t rows, vocabulary;
};

Matrix matrix(const Logits& logits) {
    if (logits.dtype() != nb::dtype<float>() || logits.ndim() != 2 || logits.shape(1) == 0)
        throw nb::value_error("logits must be a contiguous float32 matrix with at least one column");
    return {static_cast<const float*>(logits.data()), static_cast<int64_t>(logits.shape(0)), static_cast<int64_t>(logits.shape(1))};
}

template <class T>
void one_a_row(const char* name, const Column<T>& column, const Matrix& of) {
    if (static_cast<int64_t>(column.size()) != of.rows)
        throw nb::value_error(
            (std::string(name) + " has " + std::to_string(column.size()) + " entries for " + std::to_string(of.rows) + " rows").c_str());
}

void within(const char* name, int32_t id, const Matrix& of) {
    if (id < 0 || id >= of.vocabulary)
        throw nb::value_error((std::string(name) + " holds " + std::to_string(id) + ", it must stay within 0 … " +
                               std::to_string(of.vocabulary - 1)).c_str());
}

void within(const char* name, const Column<Ids>& column, const Matrix& of) {
    one_a_row(name, column, of);
    for (const Ids& ids : column)
        for (int32_t id : ids) within(name, id, of);
}

void raise_faults(const std::vector<Choice>& choices) {
    for (size_t row = 0; row < choices.size(); row++) {
        if (choices[row].fault == Fault::none) continue;
        const std::string begin = "row " + std::to_string(row) + " of the logits ";
        const bool nan = choices[row].fault == Fault::nan;
        PyErr_SetString(PyExc_FloatingPointError,
                        (begin + (nan ? "contains NaN" : "leaves no token to choose: all are minus infinity")).c_str());
        throw nb::python_error();
    }
}

// Of a seed, the lowest 64 bits count, of a negative one too.
uint64_t lowest_bits(const nb::int_& seed) { return PyLong_AsUnsignedLongLongMask(seed.ptr()); }

nb::tuple report(const Choice& choice) {
    nb::list ids, logprobs;
    for (auto [id, logprob] : choice.top) {
        ids.append(id);
        logprobs.append(logprob);
    }
    return nb::make_tuple(choice.logprob, ids, logprobs);
}

}  // namespace

double number(const nb::int_& seed, uint64_t position) { return static_cast<double>(uniform(lowest_bits(seed), position)) * 0x1p-53; }

nb::tuple sample(Pool& pool, const Ops& ops, const Logits& logits, const Column<double>& temperature, const Column<int64_t>& top_k,
                 const Column<double>& top_p, const Column<double>& min_p, const Column<double>& repetition_penalty,
                 const Column<double>& presence_penalty, const Column<double>& frequency_penalty, const Column<nb::int_>& seed,
                 const Column<int64_t>& position, Column<std::vector<std::pair<int32_t, double>>> logit_bias, Column<Ids> banned,
                 Column<Ids> prompt, Column<Ids> output, const Column<std::optional<int64_t>>& logprobs) {
    const Matrix of = matrix(logits);
    one_a_row("temperature", temperature, of);
    one_a_row("top_k", top_k, of);
    one_a_row("top_p", top_p, of);
    one_a_row("min_p", min_p, of);
    one_a_row("repetition_penalty", repetition_penalty, of);
    one_a_row("presence_penalty", presence_penalty, of);
    one_a_row("frequency_penalty", frequency_penalty, of);
    one_a_row("seed", seed, of);
    one_a_row("position", position, of);
    one_a_row("logit_bias", logit_bias, of);
    one_a_row("logprobs", logprobs, of);
    within("banned", banned, of);
    within("prompt", prompt, of);
    within("output", output, of);
    std::vector<Sampling> parameters(of.rows);
    std::vector<Choice> choices(of.rows);
    for (int64_t row = 0; row < of.rows; row++) {
        std::vector<std::pair<int32_t, float>> bias;
        for (auto [id, value] : logit_bias[row]) {
            within("logit_bias", id, of);
            bias.emplace_back(id, static_cast<float>(value));
        }
        parameters[row] = {static_cast<float>(temperature[row]), top_k[row], top_p[row], min_p[row], repetition_penalty[row],
                           presence_penalty[row], frequency_penalty[row], lowest_bits(seed[row]),
                           static_cast<uint64_t>(position[row]), std::move(bias), std::move(banned[row]), std::move(prompt[row]),
                           std::move(output[row]), logprobs[row].value_or(-1)};
    }
    {
        nb::gil_scoped_release release;
        ops.sample(pool, of.values, of.rows, of.vocabulary, parameters.data(), choices.data());
    }
    raise_faults(choices);
    nb::list tokens, reports;
    for (int64_t row = 0; row < of.rows; row++) {
        tokens.append(choices[row].token);
        reports.append(logprobs[row] ? nb::object(report(choices[row])) : nb::none());
    }
    return nb::make_tuple(tokens, reports);
}

nb::list score(Pool& pool, const Ops& ops, const Logits& logits, const Ids& tokens, int64_t top) {
    const Matrix of = matrix(logits);
    one_a_row("tokens", tokens, of);
    for (int32_t id : tokens) within("tokens", id, of);
    std::vector<Choice> choices(of.rows);
    {
        nb::gil_scoped_release release;
        ops.score(pool, of.values, of.rows, of.vocabulary, tokens.data(), top, choices.data());
    }
    raise_faults(choices);
    nb::list reports;
    for (const Choice& choice : choices) reports.append(report(choice));
    return reports;
}

}  // namespace headrace
