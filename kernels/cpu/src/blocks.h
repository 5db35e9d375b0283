// Where the codes and the scales of a group stand in packed weights (`ops.h` has the layout).
#pragma once

#include <bit>

#include "ops.h"
#include "wide.h"

namespace headrace::HEADRACE_ISA {

constexpr int PARTS = PANEL / wide::WIDTH;  // vectors a panel

// Bytes by which what streams a weight asks for it ahead of its use. The machine sees streams by itself, but loses each at the end of a
// page of 4 KiB, huge ones too.
constexpr int64_t AHEAD = 2048;

struct Scale {
    wide::Floats factor[PARTS], minimum[PARTS];
};

struct Blocks {
    const uint8_t* panels;
    int64_t panel_bytes, block_bytes, header, group_bytes;
    int shift;  // log2 of the groups a block
    int64_t mask;
    Scales scales;
    bool minimums;

    explicit Blocks(const Linear& w)
        : panels(w.panels),
          panel_bytes(w.panel()),
          block_bytes(w.block()),
          header(w.header()),
          group_bytes(w.bytes(w.group)),
          shift(std::countr_zero(static_cast<uint64_t>(w.span() / w.group))),
          mask(w.span() / w.group - 1),
          scales(w.scales),
          minimums(w.minimums) {}

    const uint8_t* block(int64_t panel, int64_t g) const { return panels + panel * panel_bytes + (g >> shift) * block_bytes; }

    const uint8_t* codes(int64_t panel, int64_t g) const { return block(panel, g) + header + (g & mask) * group_bytes; }

    // Without minimums, those are left as they are.
    Scale scale(int64_t panel, int64_t g) const {
        Scale scale;
        const uint8_t* at = block(panel, g);
        if (scales == Scales::levels) {
            const float* factors = reinterpret_cast<const float*>(at);
            const int kinds = minimums ? 2 : 1;
            const int8_t* levels = reinterpret_cast<const int8_t*>(factors + kinds * PANEL) + (g & mask) * kinds * PANEL;
            read(scale.factor, [&](int i) { return wide::load(factors + i) * wide::widen(levels + i); });
            if (minimums) read(scale.minimum, [&](int i) { return wide::load(factors + PANEL + i) * wide::widen(levels + PANEL + i); });
        } else if (scales == Scales::zeros) {
            const wide::Half* halves = reinterpret_cast<const wide::Half*>(at);
            const int8_t* zeros = reinterpret_cast<const int8_t*>(halves + PANEL);
            read(scale.factor, [&](int i) { return wide::widen(halves + i); });
            read(scale.minimum, [&](int i) { return -(wide::widen(halves + i) * wide::widen(zeros + i)); });
        } else if (scales == Scales::f16) {
            const wide::Half* halves = reinterpret_cast<const wide::Half*>(at);
            read(scale.factor, [&](int i) { return wide::widen(halves + i); });
            if (minimums) read(scale.minimum, [&](int i) { return wide::widen(halves + PANEL + i); });
        } else {
            const float* floats = reinterpret_cast<const float*>(at);
            read(scale.factor, [&](int i) { return wide::load(floats + i); });
            if (minimums) read(scale.minimum, [&](int i) { return wide::load(floats + PANEL + i); });
        }
        return scale;
    }

  private:
    template <class Read>
    static void read(wide::Floats (&to)[PARTS], const Read& of) {
        for (int part = 0; part < PARTS; part++) to[part] = of(part * wide::WIDTH);
    }
};

// The sums [rows][PANEL] of a panel, with their bias, to rows of y that stand `stride` apart. What is past the last output is left out.
inline void finish(const Linear& w, int64_t panel, const float* sums, int64_t rows, float* y, int64_t stride) {
    const int64_t n = panel * PANEL, count = w.outputs - n;
    y += n;
    if (count < PANEL) [[unlikely]] {
        for (int64_t r = 0; r < rows; r++, sums += PANEL, y += stride)
            for (int64_t i = 0; i < count; i++) y[i] = w.bias ? sums[i] + w.bias[n + i] : sums[i];
        return;
    }
    wide::Floats bias[PARTS];
    for (int part = 0; part < PARTS; part++) bias[part] = w.bias ? wide::load(w.bias + n + part * wide::WIDTH) : wide::all(0.0f);
    for (int64_t r = 0; r < rows; r++, sums += PANEL, y += stride)
        for (int part = 0; part < PARTS; part++) {
            const wide::Floats sum = wide::load(sums + part * wide::WIDTH);
            wide::store(y + part * wide::WIDTH, w.bias ? sum + bias[part] : sum);
        }
}

}  // namespace headrace::HEADRACE_ISA
