#include "pack.h"

#include <algorithm>

#include "ops.h"

namespace headrace {
namespace {

// Inputs of all rows taken at a time: what is written stays in the first-level cache until its lines are full.
constexpr int64_t STRIP = 64;

template <class T>
void pack_panel(const T* rows, int64_t count, int64_t inputs, T* out) {
    for (int64_t strip = 0; strip < inputs; strip += STRIP)
        for (int64_t r = 0; r < PANEL; r++)
            for (int64_t k = strip; k < std::min(inputs, strip + STRIP); k++) out[k * PANEL + r] = r < count ? rows[r * inputs + k] : T(0);
}

template <class T>
void pack_all(Pool& pool, const void* from, int64_t outputs, int64_t inputs, void* to) {
    pool.run((outputs + PANEL - 1) / PANEL, [&](int64_t panel) {
        int64_t start = panel * PANEL * inputs;
        pack_panel(static_cast<const T*>(from) + start, std::min<int64_t>(PANEL, outputs - panel * PANEL), inputs, static_cast<T*>(to) + start);
    });
}

}  // namespace

void pack(Pool& pool, const void* from, int64_t outputs, int64_t inputs, int size, void* to) {
    if (size == 1) pack_all<uint8_t>(pool, from, outputs, inputs, to);
    if (size == 2) pack_all<uint16_t>(pool, from, outputs, inputs, to);
    if (size == 4) pack_all<uint32_t>(pool, from, outputs, inputs, to);
}

void pack_nibbles(Pool& pool, const int8_t* from, int64_t outputs, int64_t inputs, int offset, uint8_t* to) {
    pool.run((outputs + PANEL - 1) / PANEL, [&](int64_t panel) {
        const int64_t count = std::min<int64_t>(PANEL, outputs - panel * PANEL), start = panel * PANEL * inputs;
        uint8_t* out = to + start / 2;
        for (int64_t strip = 0; strip < inputs / 2; strip += STRIP)
            for (int64_t r = 0; r < PANEL; r++) {
                const int8_t* row = from + start + r * inputs;
                for (int64_t pair = strip; pair < std::min(inputs / 2, strip + STRIP); pair++)
                    out[pair * PANEL + r] =
                        r < count ? static_cast<uint8_t>((row[2 * pair] + offset) | (row[2 * pair + 1] + offset) << 4) : 0;
            }
    });
}

}  // namespace headrace
