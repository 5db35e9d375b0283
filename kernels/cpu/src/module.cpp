// The Python module: binds the ops of the best instruction set that this machine has, as things to record on a tape. Pointers come as
// integers: `kernels/cpu`, the only caller, has checked type and shape of what they point to. What the arrays of a step say is checked
// here, before every run, so that no op reads or writes out of bounds. The GIL is released while anything computes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "draws.h"
#include "experts.h"
#include "ops.h"
#include "pack.h"
#include "tape.h"

namespace nb = nanobind;
using namespace headrace;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

const float* floats(Address address) { return at<const float>(address); }

#ifdef HEADRACE_X86
Ops with(const char* isa, Ops table, decltype(Ops::linear_int8) linear_int8, decltype(Ops::linear_gated) linear_gated, decltype(Ops::probe) probe) {
    table.isa = isa;
    table.linear_int8 = linear_int8;
    table.linear_gated = linear_gated;
    table.probe = probe;
    return table;
}
#endif

#ifdef HEADRACE_X86
// Whether there are tiles for int8 and bfloat16, and the system lends a process their registers, for which it must be asked (the kernel's
// Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
    if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-int8") ||
        !__builtin_cpu_supports("amx-bf16"))
        return false;
#ifdef __linux__
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

// The instruction sets that this machine has, best first.
std::vector<const Ops*> tables() {
    std::vector<const Ops*> found;
#ifdef HEADRACE_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    static const Ops amx = [] {
        Ops table = with("amx", avx512::ops, amx::linear_int8, amx::linear_gated, amx::probe);
        table.linear_bf16 = amx::linear_bf16;
        return table;
    }();
    static const Ops avx512vnni = with("avx512vnni", avx512::ops, avx512vnni::linear_int8, avx512vnni::linear_gated, avx512vnni::probe);
    static const Ops avxvnni = with("avxvnni", avx2::ops, avxvnni::linear_int8, avxvnni::linear_gated, avxvnni::probe);
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (vnni && may_use_tiles()) found.push_back(&amx);
    if (vnni) found.push_back(&avx512vnni);
    if (avx512) found.push_back(&avx512::ops);
    if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&avxvnni);
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

using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

// The int32 array `name` of so many dimensions, and of `size` entries unless that is negative.
const int32_t* indices(const char* name, const Array& array, size_t dimensions, int64_t size = -1) {
    if (array.dtype() != nb::dtype<int32_t>() || array.ndim() != dimensions)
        refuse(std::string(name) + " must be a contiguous int32 array of " + std::to_string(dimensions) + " dimensions");
    if (size >= 0 && static_cast<int64_t>(array.size()) != size)
        refuse(std::string(name) + " must have " + std::to_string(size) + " entries, it has " + std::to_string(array.size()));
    return static_cast<const int32_t*>(array.data());
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
    Pool& pool() { return pool_; }
    const Ops& ops() const { return *ops_; }

    using Parts = std::vector<std::tuple<int64_t, Address, Address, Address, Address>>;

    // How to store codes: form, scales, offset.
    std::tuple<int, int, int> choose(const Parts& parts, int64_t inputs, int64_t group) {
        nb::gil_scoped_release release;
        Linear w{};
        w.inputs = inputs, w.group = group;
        headrace::choose(pool_, rows_of(parts), w);
        return {static_cast<int>(w.form), static_cast<int>(w.scales), w.offset};
    }

    // Operations on floats, on int8, on bfloat16, and bytes read a second, of all threads together.
    std::tuple<double, double, double, double> probe() {
        nb::gil_scoped_release release;
        const std::vector<uint8_t> bytes(256 << 20, 1);
        const Peaks peaks = ops_->probe(pool_, bytes.data(), bytes.size());
        return {peaks.float_operations, peaks.int8_operations, peaks.bf16_operations, peaks.bytes_read};
    }

    void pack(const Parts& parts, const Linear& w, Address to) {
        nb::gil_scoped_release release;
        headrace::pack(pool_, rows_of(parts), w, at<uint8_t>(to));
    }

  private:
    static std::vector<Rows> rows_of(const Parts& parts) {
        std::vector<Rows> all;
        for (const auto& [outputs, values, scales, minimums, zeros] : parts)
            all.push_back({outputs, at<const void>(values), floats(scales), floats(minimums), at<const int8_t>(zeros)});
        return all;
    }

    Pool pool_;
    const Ops* ops_ = nullptr;
};

// A function of an engine's threads and ops, as a method.
template <class Result, class... Args>
auto on_engine(Result (*function)(Pool&, const Ops&, Args...)) {
    return [function](Engine& self, Args... args) { return function(self.pool(), self.ops(), std::forward<Args>(args)...); };
}

// A tape, and what the arrays of a step must keep to for the ops that stand on it.
class Program {
  public:
    // A weight whose codes are to be written, if any.
    using Reader = std::optional<Linear>;

    explicit Program(Engine& engine) : tape_(engine.pool(), engine.ops()) {}

    void reserve(Arena arena, int64_t floats) { tape_.reserve(arena, floats); }

    void input(int64_t width, Place y) {
        const size_t number = inputs_.size();
        inputs_.push_back({nullptr, width});
        tape_.record("input", y.arena, [=, this](const Step& step) {
            std::copy_n(inputs_[number].first, step.rows_of(y) * width, step.at(y));
        });
    }

    void embed(const Linear& table, float scale, Place y) {
        vocabulary_ = std::min(vocabulary_, table.outputs);
        tape_.record("embed", y.arena, [=](const Step& step) { step.ops.embed(step.pool, table, step.ids, step.rows_of(y), scale, step.at(y)); });
    }

    void linear(const Linear& weight, Place x, Place y) {
        tape_.record("linear", y.arena,
                     [=](const Step& step) { headrace::linear(step.pool, step.ops, weight, step.at(x), step.rows_of(y), step.at(y)); },
                     streamed(weight));
    }

    void quantize(const Linear& reader, Place x, Place codes) {
        tape_.record("quantize", codes.arena,
                     [=](const Step& step) { step.ops.quantize(step.pool, reader, step.at(x), step.rows_of(codes), step.codes_at(codes)); });
    }

    void linear_codes(const Linear& weight, Place codes, Place y) {
        tape_.record("linear", y.arena,
                     [=](const Step& step) { headrace::linear_codes(step.pool, step.ops, weight, step.codes_at(codes), step.rows_of(y), step.at(y)); },
                     streamed(weight));
    }

    void linear_gated(const Linear& gate_up, Place codes, bool gelu, const Linear& reader, Place y) {
        tape_.record("linear_gated", y.arena, [=](const Step& step) {
            step.ops.linear_gated(step.pool, gate_up, step.codes_at(codes), step.rows_of(y), gelu, reader, step.codes_at(y));
        }, streamed(gate_up));
    }

    void rmsnorm(Place x, Address weight, float eps, int64_t width, const Reader& reader, Place y) {
        tape_.record("rmsnorm", y.arena, [=](const Step& step) {
            step.ops.rmsnorm(step.pool, step.at(x), nullptr, floats(weight), eps, step.rows_of(y), width, nullptr, of(reader), step.at(y));
        });
    }

    void add_rmsnorm(Place x, Place residual, Address weight, float eps, int64_t width, Place sum, const Reader& reader, Place y) {
        tape_.record("add_rmsnorm", y.arena, [=](const Step& step) {
            step.ops.rmsnorm(step.pool, step.at(x), step.at(residual), floats(weight), eps, step.rows_of(y), width, step.at(sum), of(reader),
                             step.at(y));
        });
    }

    // Of `each` pairs of halves in a row.
    void gated(Place gate_up, int64_t width, bool gelu, int64_t each, const Reader& reader, Place y) {
        tape_.record("gated", y.arena, [=](const Step& step) {
            step.ops.gated(step.pool, step.at(gate_up), step.rows_of(y) * each, width, gelu, of(reader), step.at(y));
        });
    }

    void route(Routing& routing, Place logits, Place weights) {
        tape_.record("route", weights.arena, [=, &routing](const Step& step) {
            routing.resize(step.rows_of(weights));
            step.ops.route(step.pool, step.at(logits), step.rows_of(weights), routing.experts, routing.used, routing.renormalize,
                           routing.chosen.data(), step.at(weights));
            routing.sort();
        });
    }

    void experts(Routing& routing, const Linear& weight, Place x, bool sorted, Place y) {
        tape_.record("experts", y.arena, [=, &routing](const Step& step) {
            experts_linear(step.pool, step.ops, weight, routing, step.at(x), sorted, step.at(y));
        });
    }

    void combine(Routing& routing, Place x, Place weights, int64_t width, Place y) {
        tape_.record("combine", y.arena, [=, &routing](const Step& step) {
            step.ops.combine(step.pool, step.at(x), routing.places.data(), step.at(weights), step.rows_of(y), routing.used, width, step.at(y));
        });
    }

    void add(Place x, Place residual, int64_t width, Place sum) {
        tape_.record("add", sum.arena, [=](const Step& step) {
            step.ops.add(step.pool, step.at(x), step.at(residual), step.rows_of(sum) * width, step.at(sum));
        });
    }

    void rope_write_kv(Place qkv, const Heads& heads, const Rope& rope, const KV& kv, Place q) {
        positions_ = std::min(positions_, rope.positions);
        bound(kv);
        tape_.record("rope_write_kv", q.arena, [=](const Step& step) {
            step.ops.rope_write_kv(step.pool, step.at(qkv), heads, rope, kv, step.batch, step.at(q));
        });
    }

    void attention(Place q, const Heads& heads, const KV& kv, float scale, int window, Place out) {
        bound(kv);
        tape_.record("attention", out.arena, [=](const Step& step) {
            step.ops.attention(step.pool, step.at(q), heads, kv, step.batch, scale, window, step.at(out));
        });
    }

    void rows(Place x, int64_t width, Place y) {
        tape_.record("rows", y.arena, [=](const Step& step) {
            for (int64_t i = 0; i < step.rows_of(y); i++) std::copy_n(step.at(x) + step.picks[i] * width, width, step.at(y) + i * width);
        });
    }

    void run(const Array& ids, const Array& positions, const Array& slots, const Array& query_start, const Array& pages,
             const std::optional<Array>& parents, const Array& picks, const std::vector<Array>& inputs) {
        const int64_t tokens = ids.size(), requests = pages.ndim() == 2 ? pages.shape(0) : 0, width = requests ? pages.shape(1) : 0;
        const int32_t* table = indices("pages", pages, 2);
        const Batch batch{indices("positions", positions, 1, tokens), indices("slots", slots, 1, tokens),
                          indices("query_start", query_start, 1, requests + 1), table, parents ? indices("parents", *parents, 1, tokens) : nullptr,
                          tokens, requests, width};
        if (batch.query_start[0] != 0 || batch.query_start[requests] != tokens)
            refuse("query_start must run from 0 to the " + std::to_string(tokens) + " tokens of the batch");
        for (int64_t r = 0; r < requests; r++)
            if (batch.query_start[r] > batch.query_start[r + 1]) refuse("query_start must not fall, it does at request " + std::to_string(r));
        within("ids", indices("ids", ids, 1), tokens, vocabulary_);
        within("positions", batch.positions, tokens, std::min(positions_, width * page_size_));
        if (batch.parents)
            for (int64_t r = 0; r < requests; r++) check_tree(batch, r, width * page_size_);
        within("slots", batch.slots, tokens, pages_ * page_size_);
        within("pages", batch.pages, requests * width, pages_);
        within("picks", indices("picks", picks, 1), picks.size(), tokens);
        if (inputs.size() != inputs_.size()) refuse("there must be " + std::to_string(inputs_.size()) + " inputs");
        for (size_t i = 0; i < inputs.size(); i++) {
            if (inputs[i].dtype() != nb::dtype<float>() || static_cast<int64_t>(inputs[i].size()) != tokens * inputs_[i].second)
                refuse("input " + std::to_string(i) + " must be float32 of " + std::to_string(inputs_[i].second) + " columns");
            inputs_[i].first = static_cast<const float*>(inputs[i].data());
        }
        nb::gil_scoped_release release;
        tape_.run(batch, static_cast<const int32_t*>(ids.data()), static_cast<const int32_t*>(picks.data()), picks.size());
    }

    void pick(const Array& picks) {
        within("picks", indices("picks", picks, 1), picks.size(), tape_.tokens());
        nb::gil_scoped_release release;
        tape_.pick(static_cast<const int32_t*>(picks.data()), picks.size());
    }

    // Where a value of the last step stands, and the value there.
    Address address(Place place) { return reinterpret_cast<Address>(tape_.at(place)); }

    nb::ndarray<nb::numpy, float> view(Place place, int64_t width) {
        return {tape_.at(place), {static_cast<size_t>(tape_.rows_of(place)), static_cast<size_t>(width)}, nb::find(this)};
    }

    // Switches timing on, and tells what each op took since it was.
    std::vector<std::pair<std::string, int64_t>> times() {
        std::vector<std::pair<std::string, int64_t>> all;
        for (auto& ops : tape_.ops)
            for (auto& op : ops) all.emplace_back(op.name, std::exchange(op.spent, 0));
        tape_.timed = true;
        return all;
    }

  private:
    using Step = Tape::Step;

    static const Linear* of(const Reader& reader) { return reader ? &*reader : nullptr; }
    static std::span<const uint8_t> streamed(const Linear& weight) { return {weight.panels, static_cast<size_t>(weight.size())}; }

    static void check_tree(const Batch& batch, int64_t request, int64_t room) {
        const int64_t first = batch.query_start[request], count = batch.query_start[request + 1] - first;
        const int32_t *parents = batch.parents + first, *positions = batch.positions + first;
        if (count && positions[0] + count > room)
            refuse("request " + std::to_string(request) + " has " + std::to_string(count) + " rows from position " +
                   std::to_string(positions[0]) + " on: its pages end at " + std::to_string(room));
        for (int64_t i = 0; i < count; i++) {
            if (parents[i] < -1 || parents[i] >= i)
                refuse("row " + std::to_string(i) + " of request " + std::to_string(request) + " cannot follow row " + std::to_string(parents[i]));
            if (positions[i] != (parents[i] < 0 ? positions[0] : positions[parents[i]] + 1))
                refuse("row " + std::to_string(i) + " of request " + std::to_string(request) + " must stand behind the row it follows");
        }
    }

    void bound(const KV& kv) {
        pages_ = std::min(pages_, kv.pages);
        page_size_ = kv.page_size;
    }

    static constexpr int64_t ANY = 1 << 30;

    Tape tape_;
    std::vector<std::pair<const float*, int64_t>> inputs_;  // where each stands, and its columns
    int64_t vocabulary_ = ANY, positions_ = ANY, pages_ = ANY, page_size_ = 1;
};

}  // namespace

NB_MODULE(_native, m) {
    m.attr("PANEL") = PANEL;
    m.attr("ALIGN") = Tape::ALIGN;
    m.attr("SOURCES") = HEADRACE_SOURCES;
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Ops* table : tables()) names.push_back(table->isa);
        return names;
    });
    m.def("number", number);
    nb::class_<Linear>(m, "Linear")
        .def("__init__", [](Linear* self, int form, int scales, bool minimums, int activations, int offset, int64_t outputs, int64_t inputs,
                            int64_t group, Address panels, Address bias, const Linear* next) {
            new (self) Linear{static_cast<Form>(form), static_cast<Scales>(scales), minimums, static_cast<Activations>(activations), offset, outputs, inputs, group,
                              at<const uint8_t>(panels), floats(bias), next};
        }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none())
        .def_prop_ro("size", &Linear::size)
        .def_prop_ro("codes_size", quantized_bytes);
    nb::class_<Heads>(m, "Heads").def("__init__", [](Heads* self, int query, int kv, int dim) { new (self) Heads{query, kv, dim}; });
    nb::class_<Rope>(m, "Rope")
        .def("__init__", [](Rope* self, Address cos, Address sin, int64_t positions, int64_t half, bool interleaved, Address q_norm,
                            Address k_norm, float eps) {
            new (self) Rope{floats(cos), floats(sin), positions, half, interleaved, floats(q_norm), floats(k_norm), eps};
        });
    nb::class_<KV>(m, "KV").def("__init__", [](KV* self, Address numbers, Address scales, int64_t pages, int64_t apart, int64_t page_size, int form) {
        new (self) KV{at<void>(numbers), at<float>(scales), pages, apart, page_size, static_cast<KVForm>(form)};
    });
    nb::class_<Routing>(m, "Routing").def("__init__", [](Routing* self, int64_t experts, int64_t used, bool renormalize) {
        new (self) Routing{experts, used, renormalize, {}, {}, {}, {}};
    });
    nb::class_<Place>(m, "Place").def("__init__", [](Place* self, int arena, int64_t start) {
        new (self) Place{static_cast<Arena>(arena), start};
    });
    nb::class_<Engine>(m, "Engine")
        .def(nb::init<int, const std::string&>())
        .def_prop_ro("isa", &Engine::isa)
        .def_prop_ro("threads", &Engine::threads)
        .def("pack", &Engine::pack)
        .def("choose", &Engine::choose)
        .def("probe", &Engine::probe)
        .def("sample", on_engine(sample))
        .def("score", on_engine(score));
    nb::class_<Program>(m, "Program")
        .def(nb::init<Engine&>(), nb::keep_alive<1, 2>())
        .def("reserve", [](Program& self, int arena, int64_t floats) { self.reserve(static_cast<Arena>(arena), floats); })
        .def("input", &Program::input)
        .def("embed", &Program::embed)
        .def("linear", &Program::linear)
        .def("quantize", &Program::quantize)
        .def("linear_codes", &Program::linear_codes)
        .def("linear_gated", &Program::linear_gated)
        .def("rmsnorm", &Program::rmsnorm, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
        .def("add_rmsnorm", &Program::add_rmsnorm, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
        .def("gated", &Program::gated, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
        .def("add", &Program::add)
        .def("route", &Program::route, nb::keep_alive<1, 2>())
        .def("experts", &Program::experts, nb::keep_alive<1, 2>())
        .def("combine", &Program::combine, nb::keep_alive<1, 2>())
        .def("rope_write_kv", &Program::rope_write_kv)
        .def("attention", &Program::attention)
        .def("rows", &Program::rows)
        .def("run", &Program::run)
        .def("pick", &Program::pick)
        .def("address", &Program::address)
        .def("view", &Program::view)
        .def("times", &Program::times);
}
