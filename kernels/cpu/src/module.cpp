// The Python module: binds the ops of the best instruction set that this machine has. Pointers come as integers:
// `kernels/cpu/__init__.py`, the only caller, has checked type and shape of what they point to. What the arrays of indices say is
// checked here, before every call, so that no op reads or writes out of bounds. The GIL is released while anything computes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>
#include <vector>

#include "ops.h"
#include "pack.h"

namespace nb = nanobind;
using namespace headrace;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

const float* floats(Address address) { return at<const float>(address); }

const int32_t* indices(Address address) { return at<const int32_t>(address); }

// The instruction sets that this machine has, best first.
std::vector<const Ops*> tables() {
    std::vector<const Ops*> found;
#ifdef HEADRACE_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512) found.push_back(&avx512::ops);
    if (avx2) found.push_back(&avx2::ops);
#endif
    found.push_back(&portable::ops);
    return found;
}

[[noreturn]] void refuse(const std::string& text) { throw nb::value_error(text.c_str()); }

void within(const char* name, const int32_t* values, int64_t count, int64_t limit) {
    uint32_t highest = 0;  // a negative number is a high one
    for (int64_t i = 0; i < count; i++) highest = std::max(highest, static_cast<uint32_t>(values[i]));
    if (count && highest >= limit)
        refuse(std::string(name) + " holds " + std::to_string(static_cast<int32_t>(highest)) + ", it must stay within 0 … " +
               std::to_string(limit - 1));
}

// Every request's rows and pages lie within what there is.
void check_batch(const Batch& batch, const KV& kv) {
    if (batch.query_start[0] != 0 || batch.query_start[batch.requests] != batch.tokens)
        refuse("query_start must run from 0 to the " + std::to_string(batch.tokens) + " tokens of the batch");
    for (int64_t r = 0; r < batch.requests; r++)
        if (batch.query_start[r] > batch.query_start[r + 1]) refuse("query_start must not fall, it does at request " + std::to_string(r));
    within("positions", batch.positions, batch.tokens, batch.table_width * kv.page_size);
    within("pages", batch.pages, batch.requests * batch.table_width, kv.pages);
}

class Engine {
  public:
    Engine(int threads, const std::string& isa) : pool_(threads) {
        for (const Ops* table : tables())
            if (isa.empty() || isa == table->isa) {
                ops_ = table;
                return;
            }
        refuse("this machine has no instruction set \"" + isa + "\"");
    }

    std::string isa() const { return ops_->isa; }
    int threads() const { return pool_.threads(); }

    void pack(Address from, int64_t outputs, int64_t inputs, int size, Address to) {
        nb::gil_scoped_release release;
        headrace::pack(pool_, at<const void>(from), outputs, inputs, size, at<void>(to));
    }

    void pack_nibbles(Address from, int64_t outputs, int64_t inputs, int offset, Address to) {
        nb::gil_scoped_release release;
        headrace::pack_nibbles(pool_, at<const int8_t>(from), outputs, inputs, offset, at<uint8_t>(to));
    }

    void linear(const Linear& weight, Address x, int64_t rows, Address y) {
        if (rows == 0) return;
        nb::gil_scoped_release release;
        ops_->linear(pool_, weight, floats(x), rows, at<float>(y));
    }

    void embed(const Linear& table, Address ids, int64_t count, float scale, Address y) {
        within("ids", indices(ids), count, table.outputs);
        nb::gil_scoped_release release;
        ops_->embed(pool_, table, indices(ids), count, scale, at<float>(y));
    }

    void rows(Address x, Address index, int64_t count, int64_t all, int64_t width, Address y) {
        within("index", indices(index), count, all);
        nb::gil_scoped_release release;
        for (int64_t i = 0; i < count; i++) std::copy_n(floats(x) + indices(index)[i] * width, width, at<float>(y) + i * width);
    }

    void attention(Address q, const Heads& heads, const KV& kv, const Batch& batch, float scale, int window, Address out) {
        check_batch(batch, kv);
        nb::gil_scoped_release release;
        ops_->attention(pool_, floats(q), heads, kv, batch, scale, window, at<float>(out));
    }

    void rope_write_kv(Address qkv, const Heads& heads, Address cos, Address sin, int64_t positions, int64_t half, bool interleaved,
                       Address q_norm, Address k_norm, float eps, const KV& kv, const Batch& batch, Address q) {
        within("positions", batch.positions, batch.tokens, positions);
        within("slots", batch.slots, batch.tokens, kv.pages * kv.page_size);
        nb::gil_scoped_release release;
        const Rope rope{floats(cos), floats(sin), positions, half, interleaved, floats(q_norm), floats(k_norm), eps};
        ops_->rope_write_kv(pool_, floats(qkv), heads, rope, kv, batch, at<float>(q));
    }

    void rmsnorm(Address x, Address residual, Address weight, float eps, int64_t rows, int64_t width, Address sum, Address y) {
        nb::gil_scoped_release release;
        ops_->rmsnorm(pool_, floats(x), floats(residual), floats(weight), eps, rows, width, at<float>(sum), at<float>(y));
    }

    void gated(Address gate_up, int64_t rows, int64_t width, bool gelu, Address y) {
        nb::gil_scoped_release release;
        ops_->gated(pool_, floats(gate_up), rows, width, gelu, at<float>(y));
    }

    void add(Address x, Address residual, int64_t count, Address sum) {
        nb::gil_scoped_release release;
        ops_->add(pool_, floats(x), floats(residual), count, at<float>(sum));
    }

  private:
    Pool pool_;
    const Ops* ops_ = nullptr;
};

}  // namespace

NB_MODULE(_native, m) {
    m.attr("PANEL") = PANEL;
    m.attr("SOURCES") = HEADRACE_SOURCES;
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Ops* table : tables()) names.push_back(table->isa);
        return names;
    });
    nb::class_<Linear>(m, "Linear")
        .def("__init__", [](Linear* self, int form, int64_t outputs, int64_t inputs, int64_t group, int offset, bool halves, Address values,
                            Address scales, Address minimums, Address bias) {
            new (self) Linear{static_cast<Form>(form), outputs, inputs, group, offset, halves, at<const void>(values),
                              at<const void>(scales), at<const void>(minimums), floats(bias)};
        });
    nb::class_<Heads>(m, "Heads").def("__init__", [](Heads* self, int query, int kv, int dim) { new (self) Heads{query, kv, dim}; });
    nb::class_<KV>(m, "KV").def("__init__", [](KV* self, Address keys, Address values, int64_t pages, int64_t page_size) {
        new (self) KV{at<float>(keys), at<float>(values), pages, page_size};
    });
    nb::class_<Batch>(m, "Batch")
        .def("__init__", [](Batch* self, Address positions, Address slots, Address query_start, Address pages, int64_t tokens,
                            int64_t requests, int64_t table_width) {
            new (self) Batch{indices(positions), indices(slots), indices(query_start), indices(pages), tokens, requests, table_width};
        });
    nb::class_<Engine>(m, "Engine")
        .def(nb::init<int, const std::string&>())
        .def_prop_ro("isa", &Engine::isa)
        .def_prop_ro("threads", &Engine::threads)
        .def("pack", &Engine::pack)
        .def("pack_nibbles", &Engine::pack_nibbles)
        .def("linear", &Engine::linear)
        .def("embed", &Engine::embed)
        .def("rows", &Engine::rows)
        .def("attention", &Engine::attention)
        .def("rope_write_kv", &Engine::rope_write_kv)
        .def("rmsnorm", &Engine::rmsnorm)
        .def("gated", &Engine::gated)
        .def("add", &Engine::add);
}
