// Packed weights, widened: what `linear` and `embed` read. A source calls use(step, part, value) for each of STEP inputs that stand at
// a place, and each part of a panel; value is scale * code + minimum in one rounding for integers, and the number itself for floats.
#pragma once

#include "ops.h"
#include "wide.h"

namespace headrace::HEADRACE_ISA {

constexpr int PARTS = PANEL / wide::WIDTH;  // vectors a panel

// Floats as stored: one group of all inputs.
template <class T>
struct FloatSource {
    static constexpr int STEP = 1;    // inputs a call of `each` takes
    static constexpr int PANELS = 4;  // panels side by side when there is one row
    struct Group {};

    const Linear& w;

    Group group(int64_t, int64_t) const { return {}; }
    // Where input k of a panel stands; STEP inputs on, it is PANEL further.
    const T* at(int64_t panel, int64_t k) const { return static_cast<const T*>(w.values) + (panel * w.inputs + k) * PANEL; }

    template <class Use>
    static void each(const Group&, const T* values, const Use& use) {
        for (int part = 0; part < PARTS; part++) use(0, part, wide::widen(values + part * wide::WIDTH));
    }
};

struct Scaled {
    wide::Floats scale[PARTS], minimum[PARTS];

    wide::Floats operator()(int part, wide::Ints code) const { return wide::fma(scale[part], wide::floats(code), minimum[part]); }
};

// Without minimums, an offset of the codes is one: scale * (code - offset) = scale * code - scale * offset, which is the same number
// after one rounding, as offsets are powers of two.
inline Scaled group_of(const Linear& w, int64_t panel, int64_t g) {
    Scaled group;
    int64_t at = (panel * (w.inputs / w.group) + g) * PANEL;
    auto read = [&](const void* values, int part) {
        int64_t place = at + part * wide::WIDTH;
        return w.halves ? wide::widen(static_cast<const wide::Half*>(values) + place) : wide::load(static_cast<const float*>(values) + place);
    };
    for (int part = 0; part < PARTS; part++) {
        group.scale[part] = read(w.scales, part);
        group.minimum[part] = w.minimums ? read(w.minimums, part) : group.scale[part] * wide::all(-static_cast<float>(w.offset));
    }
    return group;
}

struct ByteSource {
    static constexpr int STEP = 1;
    static constexpr int PANELS = wide::WIDTH == LANES ? 2 : 4;
    using Group = Scaled;

    const Linear& w;

    Group group(int64_t panel, int64_t g) const { return group_of(w, panel, g); }
    const int8_t* at(int64_t panel, int64_t k) const { return static_cast<const int8_t*>(w.values) + (panel * w.inputs + k) * PANEL; }

    template <class Use>
    static void each(const Group& value, const int8_t* codes, const Use& use) {
        for (int part = 0; part < PARTS; part++) use(0, part, value(part, wide::ints(codes + part * wide::WIDTH)));
    }
};

struct NibbleSource {
    static constexpr int STEP = 2;
    static constexpr int PANELS = 4;
    using Group = Scaled;

    const Linear& w;

    Group group(int64_t panel, int64_t g) const { return group_of(w, panel, g); }
    const uint8_t* at(int64_t panel, int64_t k) const { return static_cast<const uint8_t*>(w.values) + (panel * w.inputs + k) / 2 * PANEL; }

    template <class Use>
    static void each(const Group& value, const uint8_t* codes, const Use& use) {
        for (int part = 0; part < PARTS; part++) {
            wide::Ints pair = wide::ints(codes + part * wide::WIDTH);
            use(0, part, value(part, pair & 15));
            use(1, part, value(part, pair >> 4));
        }
    }
};

// Calls work(source) with the source of this weight's form.
template <class Work>
void with_source(const Linear& w, const Work& work) {
    switch (w.form) {
        case Form::f32: return work(FloatSource<float>{w});
        case Form::bf16: return work(FloatSource<wide::BFloat>{w});
        case Form::f16: return work(FloatSource<wide::Half>{w});
        case Form::int8: return work(ByteSource{w});
        case Form::int4: return work(NibbleSource{w});
    }
}

// Inputs [from, to) of a panel as floats: out[k - from][PANEL]. Groups and `from` are multiples of the source's step.
template <class Source>
void widen_panel(const Source& source, int64_t panel, int64_t from, int64_t to, float* out) {
    const int64_t size = source.w.group;
    for (int64_t k = from; k < to;) {
        const int64_t g = k / size, end = (g + 1) * size < to ? (g + 1) * size : to;
        const auto group = source.group(panel, g);
        for (auto place = source.at(panel, k); k < end; k += Source::STEP, place += PANEL, out += Source::STEP * PANEL)
            Source::each(group, place, [&](int step, int part, wide::Floats value) {
                wide::store(out + step * PANEL + part * wide::WIDTH, value);
            });
    }
}

}  // namespace headrace::HEADRACE_ISA
