// The Python module: binds the ops of the best instruction set that this machine has, and packs weights. Pointers come as integers:
// `kernels/cpu/__init__.py`, the only caller, has checked what they point to. The GIL is released while anything computes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "ops.h"

namespace nb = nanobind;
using namespace headrace;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

std::vector<const Ops*> tables() {
    std::vector<const Ops*> found;
#ifdef HEADRACE_HAS_AVX2
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) found.push_back(&avx2::ops);
#endif
    found.push_back(&portable::ops);
    return found;
}

// Rows [first, last) of a weight [N, K] of `size`-byte values into panels: out[panel][k][PANEL]. Rows from N on are zero.
template <class T>
void pack_panel(const T* rows, int64_t inputs, int64_t count, T* out) {
    for (int64_t k = 0; k < inputs; k++)
        for (int64_t r = 0; r < PANEL; r++) out[k * PANEL + r] = r < count ? rows[r * inputs + k] : T(0);
}

class Engine {
  public:
    Engine(int threads, const std::string& isa) : pool_(threads) {
        for (const Ops* table : tables())
            if (isa.empty() || isa == table->isa) {
                ops_ = table;
                return;
            }
        throw nb::value_error(("this machine cannot run kernels for " + isa).c_str());
    }

    std::string isa() const { return ops_->isa; }
    int threads() const { return pool_.threads(); }

    // Packs values [N, K] of 1, 2 or 4 bytes into panels.
    void pack(Address from, int64_t outputs, int64_t inputs, int size, Address to) {
        nb::gil_scoped_release release;
        int64_t panels = (outputs + PANEL - 1) / PANEL;
        pool_.run(static_cast<int>(panels), [&](int panel) {
            int64_t count = std::min<int64_t>(PANEL, outputs - static_cast<int64_t>(panel) * PANEL), start = panel * PANEL * inputs;
            if (size == 1) pack_panel(at<const int8_t>(from) + start, inputs, count, at<int8_t>(to) + start);
            if (size == 2) pack_panel(at<const uint16_t>(from) + start, inputs, count, at<uint16_t>(to) + start);
            if (size == 4) pack_panel(at<const uint32_t>(from) + start, inputs, count, at<uint32_t>(to) + start);
        });
    }

    // Packs codes int8 [N, K], each plus `offset` within 0 … 15, two to a byte.
    void pack_nibbles(Address from, int64_t outputs, int64_t inputs, int offset, Address to) {
        nb::gil_scoped_release release;
        int64_t panels = (outputs + PANEL - 1) / PANEL;
        pool_.run(static_cast<int>(panels), [&](int panel) {
            int64_t count = std::min<int64_t>(PANEL, outputs - static_cast<int64_t>(panel) * PANEL), start = panel * PANEL * inputs;
            const int8_t* rows = at<const int8_t>(from) + start;
            uint8_t* out = at<uint8_t>(to) + start / 2;
            for (int64_t r = 0; r < PANEL; r++) {
                uint8_t nothing = static_cast<uint8_t>(offset | offset << 4);
                const int8_t* row = rows + r * inputs;
                for (int64_t pair = 0; pair < inputs / 2; pair++)
                    out[pair * PANEL + r] =
                        r < count ? static_cast<uint8_t>((row[2 * pair] + offset) | (row[2 * pair + 1] + offset) << 4) : nothing;
            }
        });
    }

    void linear(int form, int64_t outputs, int64_t inputs, int group, int offset, Address values, Address scales, Address minimums,
                Address bias, Address x, int64_t rows, Address y) {
        nb::gil_scoped_release release;
        Linear weight{static_cast<Form>(form), outputs,
                      inputs,                  group,
                      offset,                  at<const void>(values),
                      at<const float>(scales), at<const float>(minimums),
                      at<const float>(bias)};
        ops_->linear(pool_, weight, at<const float>(x), rows, at<float>(y));
    }

    void attention(Address q, Address keys, Address values, Address positions, Address query_start, Address pages, Address out, int requests,
                   int table_width, int query_heads, int kv_heads, int dim, int page_size, int window, float scale) {
        nb::gil_scoped_release release;
        ops_->attention(pool_, {at<const float>(q), at<const float>(keys), at<const float>(values), at<const int32_t>(positions),
                                at<const int32_t>(query_start), at<const int32_t>(pages), at<float>(out), requests, table_width, query_heads,
                                kv_heads, dim, page_size, window, scale});
    }

    void rope_write_kv(Address qkv, Address cos, Address sin, Address q_norm, Address k_norm, Address positions, Address slots, Address keys,
                       Address values, Address q, int tokens, int query_heads, int kv_heads, int dim, int half, int page_size,
                       bool interleaved, float eps) {
        nb::gil_scoped_release release;
        ops_->rope_write_kv(pool_, {at<const float>(qkv), at<const float>(cos), at<const float>(sin), at<const float>(q_norm),
                                    at<const float>(k_norm), at<const int32_t>(positions), at<const int32_t>(slots), at<float>(keys),
                                    at<float>(values), at<float>(q), tokens, query_heads, kv_heads, dim, half, page_size, interleaved, eps});
    }

    void rmsnorm(Address x, Address residual, Address weight, float eps, int64_t rows, int64_t width, Address sum, Address y) {
        nb::gil_scoped_release release;
        ops_->rmsnorm(pool_, at<const float>(x), at<const float>(residual), at<const float>(weight), eps, rows, width, at<float>(sum),
                      at<float>(y));
    }

    void gated(Address gate_up, int64_t rows, int64_t width, bool gelu, Address y) {
        nb::gil_scoped_release release;
        ops_->gated(pool_, at<const float>(gate_up), rows, width, gelu, at<float>(y));
    }

  private:
    Pool pool_;
    const Ops* ops_ = nullptr;
};

}  // namespace

NB_MODULE(_native, m) {
    m.attr("PANEL") = PANEL;
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Ops* table : tables()) names.push_back(table->isa);
        return names;
    });
    nb::class_<Engine>(m, "Engine")
        .def(nb::init<int, const std::string&>())
        .def_prop_ro("isa", &Engine::isa)
        .def_prop_ro("threads", &Engine::threads)
        .def("pack", &Engine::pack)
        .def("pack_nibbles", &Engine::pack_nibbles)
        .def("linear", &Engine::linear)
        .def("attention", &Engine::attention)
        .def("rope_write_kv", &Engine::rope_write_kv)
        .def("rmsnorm", &Engine::rmsnorm)
        .def("gated", &Engine::gated);
}
