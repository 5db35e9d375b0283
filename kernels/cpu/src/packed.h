// Packed weights, widened to floats: what `embed` reads, and `linear` where x stays float. A source calls use(step, part, value) for
// each of STEP inputs that stand at a place, and each part of a panel; value is scale * code + minimum in one rounding for codes, and
// the number itself for floats.
#pragma once

#include "blocks.h"

namespace headrace::HEADRACE_ISA {

// Floats as stored: one group of all inputs.
template <class T>
struct FloatSource {
    static constexpr int STEP = 1;      // inputs a call of `each` takes
    static constexpr int NEXT = PANEL;  // from their place to the next
    static constexpr int PANELS = 4;    // panels side by side when there is one row
    struct Group {};

    const Linear& w;
    int64_t apart;  // places from a panel to the next

    explicit FloatSource(const Linear& w) : w(w), apart(w.inputs * PANEL) {}

    Group group(int64_t, int64_t) const { return {}; }
    // Where the first input of a group stands.
    const T* at(int64_t panel, int64_t) const { return reinterpret_cast<const T*>(w.panels) + panel * apart; }

    template <class Use>
    static void each(const Group&, const T* values, const Use& use) {
        for (int part = 0; part < PARTS; part++) use(0, part, wide::widen(values + part * wide::WIDTH));
    }
};

struct Scaled {
    Scale scale;

    wide::Floats operator()(int part, wide::Ints code) const {
        return wide::fma(scale.factor[part], wide::floats(code), scale.minimum[part]);
    }
};

// Codes: the bytes of a lane are shifted down in turn.
template <Form F>
struct CodeSource {
    static constexpr int STEP = 4;
    static constexpr int NEXT = F == Form::int4 ? 2 * PANEL : 4 * PANEL;
    static constexpr int PANELS = F == Form::int4 || wide::WIDTH > LANES ? 4 : 2;
    using Group = Scaled;

    const Linear& w;
    Blocks blocks;
    int64_t apart;

    explicit CodeSource(const Linear& w) : w(w), blocks(w), apart(blocks.panel_bytes) {}

    // Without minimums, an offset of the codes is one: scale * (code - offset) = scale * code - scale * offset, which is the same
    // number after one rounding, as offsets are powers of two.
    Group group(int64_t panel, int64_t g) const {
        Group group{blocks.scale(panel, g)};
        if (!w.minimums)
            for (int part = 0; part < PARTS; part++) group.scale.minimum[part] = group.scale.factor[part] * wide::all(-static_cast<float>(w.offset));
        return group;
    }
    const uint8_t* at(int64_t panel, int64_t g) const { return blocks.codes(panel, g); }

    template <class Use>
    static void each(const Group& value, const uint8_t* codes, const Use& use) {
        for (int part = 0; part < PARTS; part++) {
            const wide::Ints four = F == Form::int4 ? wide::nibbles(codes, part) : wide::ints(codes + part * 4 * wide::WIDTH);
#pragma GCC unroll 4
            for (int step = 0; step < STEP; step++) {
                if constexpr (F == Form::int8) use(step, part, value(part, (four << (24 - 8 * step)) >> 24));
                if constexpr (F == Form::int6) use(step, part, value(part, (four >> 8 * step) & 255));
                if constexpr (F == Form::int4) use(step, part, value(part, (four >> 8 * step) & 15));
            }
        }
    }
};

// Float8 in groups.
struct Float8Source {
    static constexpr int STEP = 1;
    static constexpr int NEXT = PANEL;
    static constexpr int PANELS = 4;
    struct Group {
        wide::Floats factor[PARTS];
    };

    const Linear& w;
    Blocks blocks;
    int64_t apart;

    explicit Float8Source(const Linear& w) : w(w), blocks(w), apart(blocks.panel_bytes) {}

    Group group(int64_t panel, int64_t g) const {
        const Scale scale = blocks.scale(panel, g);
        Group group;
        for (int part = 0; part < PARTS; part++) group.factor[part] = scale.factor[part] * wide::all(wide::FLOAT8);
        return group;
    }
    const wide::Float8* at(int64_t panel, int64_t g) const { return reinterpret_cast<const wide::Float8*>(blocks.codes(panel, g)); }

    template <class Use>
    static void each(const Group& group, const wide::Float8* codes, const Use& use) {
        for (int part = 0; part < PARTS; part++) use(0, part, wide::widen(codes + part * wide::WIDTH) * group.factor[part]);
    }
};

// Calls work(source) with the source of this weight's form.
template <class Work>
void with_source(const Linear& w, const Work& work) {
    switch (w.form) {
        case Form::f32: return work(FloatSource<float>{w});
        case Form::bf16: return work(FloatSource<wide::BFloat>{w});
        case Form::f16: return work(FloatSource<wide::Half>{w});
        case Form::int8: return work(CodeSource<Form::int8>{w});
        case Form::int6: return work(CodeSource<Form::int6>{w});
        case Form::int4: return work(CodeSource<Form::int4>{w});
        case Form::e4m3: return work(Float8Source{w});
    }
}

// Inputs [from, to) of a panel as floats: out[k - from][PANEL]. Groups, `from` and `to` are multiples of the source's step.
template <class Source>
void widen_panel(const Source& source, int64_t panel, int64_t from, int64_t to, float* out) {
    const int64_t size = source.w.group;
    for (int64_t k = from; k < to;) {
        const int64_t g = k / size, end = (g + 1) * size < to ? (g + 1) * size : to;
        const auto group = source.group(panel, g);
        auto place = source.at(panel, g) + (k - g * size) / Source::STEP * Source::NEXT;
        for (; k < end; k += Source::STEP, place += Source::NEXT, out += Source::STEP * PANEL)
            Source::each(group, place, [&](int step, int part, wide::Floats value) {
                wide::store(out + step * PANEL + part * wide::WIDTH, value);
            });
    }
}

}  // namespace headrace::HEADRACE_ISA
