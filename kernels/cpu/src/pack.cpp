#include "pack.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>

namespace headrace {
namespace {

// Inputs of all rows taken at a time: what is written stays in the first-level cache until its lines are full.
constexpr int64_t STRIP = 64;

// The binary16 of this value, or -1 where there is none.
int32_t half_of(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude == 0x7f800000) return sign | 0x7c00;
    if (magnitude >= 0x38800000 && magnitude < 0x47800000) return magnitude & 0x1fff ? -1 : sign | ((magnitude - 0x38000000) >> 13);
    const float least = std::abs(value) * 0x1p24f;  // in units of the smallest subnormal number
    return least < 1024.0f && least == std::floor(least) ? sign | static_cast<int32_t>(least) : -1;
}

// A factor, and levels such that factor * level, rounded once, is each of these scales. False where there is none.
bool levels_of(const float* scales, int64_t count, float& factor, int8_t* levels) {
    float most = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!std::isfinite(scales[i])) return false;
        if (std::abs(scales[i]) > std::abs(most)) most = scales[i];
    }
    auto fits = [&](int highest) {
        factor = most / static_cast<float>(highest);
        for (int64_t i = 0; i < count; i++) {
            const float level = factor == 0.0f ? 0.0f : std::nearbyint(scales[i] / factor);
            if (level < -128.0f || level > 127.0f || factor * level != scales[i]) return false;
            levels[i] = static_cast<int8_t>(level);
        }
        return true;
    };
    // What Q4_K and Q6_K give to the largest group, as a rule, comes first.
    if (fits(63) || fits(-128)) return true;
    for (int highest = 127; highest > 0; highest--)
        if (fits(highest)) return true;
    return false;
}

// The rows of a panel; those past the end are null.
struct Panel {
    const uint8_t* values[PANEL] = {};
    const float* scales[PANEL] = {};
    const float* minimums[PANEL] = {};
    const int8_t* zeros[PANEL] = {};
};

Panel panel_of(const std::vector<Rows>& parts, const Linear& w, int64_t panel) {
    const int64_t size = w.form == Form::f32 ? 4 : w.form == Form::bf16 || w.form == Form::f16 ? 2 : 1, groups = w.inputs / w.group;
    Panel rows;
    auto part = parts.begin();
    int64_t before = 0;
    for (int64_t i = 0; i < PANEL; i++) {
        const int64_t n = panel * PANEL + i;
        while (part != parts.end() && n - before >= part->outputs) before += (part++)->outputs;
        if (part == parts.end()) break;
        rows.values[i] = static_cast<const uint8_t*>(part->values) + (n - before) * w.inputs * size;
        if (part->scales) rows.scales[i] = part->scales + (n - before) * groups;
        if (part->minimums) rows.minimums[i] = part->minimums + (n - before) * groups;
        if (part->zeros) rows.zeros[i] = part->zeros + (n - before) * groups;
    }
    return rows;
}

// Numbers of `inputs` inputs from input `first` on.
template <class T>
void pack_floats(const Panel& rows, int64_t first, int64_t inputs, uint8_t* to) {
    T* out = reinterpret_cast<T*>(to);
    for (int64_t strip = 0; strip < inputs; strip += STRIP)
        for (int64_t r = 0; r < PANEL; r++)
            for (int64_t k = strip; k < std::min(inputs, strip + STRIP); k++)
                out[k * PANEL + r] = rows.values[r] ? reinterpret_cast<const T*>(rows.values[r])[first + k] : T(0);
}

// Codes of `count` inputs from input k on. An offset is added by flipping the highest of the bits that a code has.
void pack_codes(const Linear& w, const Panel& rows, int64_t k, int64_t count, uint8_t* to) {
    const uint32_t each = 0x01010101, flip = each * w.offset;
    const uint32_t bits = w.form == Form::int4 ? each * 15 : w.offset ? each * (2 * w.offset - 1) : ~0u;
    auto four = [&](int64_t r, int64_t at) {
        uint32_t codes = 0;
        if (!rows.values[r]) return codes;
        std::memcpy(&codes, rows.values[r] + at, sizeof codes);
        return (codes ^ flip) & bits;
    };
    const int64_t lanes = w.form == Form::int4 ? PANEL / 2 : PANEL;
    for (int64_t lane = 0; lane < lanes; lane++)
        for (int64_t i = 0; i < count; i += 4) {
            uint32_t codes = four(lane, k + i);
            if (w.form == Form::int4) codes |= four(lane + lanes, k + i) << 4;
            std::memcpy(to + (i / 4 * lanes + lane) * sizeof codes, &codes, sizeof codes);
        }
}

void pack_block(const Linear& w, const Panel& rows, int64_t block, uint8_t* to) {
    const int64_t groups = w.span() / w.group, first = block * groups;
    const bool zeros = w.scales == Scales::zeros;
    for (int kind = 0, kinds = w.minimums && !zeros ? 2 : 1; kind < kinds; kind++)
        for (int64_t r = 0; r < PANEL; r++) {
            const float* scales = (kind ? rows.minimums : rows.scales)[r];
            if (w.scales == Scales::levels) {
                float factor = 0;
                int8_t levels[LEVELLED] = {};
                if (scales) levels_of(scales + first, groups, factor, levels);
                std::memcpy(to + (kind * PANEL + r) * sizeof factor, &factor, sizeof factor);
                for (int64_t g = 0; g < groups; g++) to[kinds * PANEL * sizeof factor + (g * kinds + kind) * PANEL + r] = levels[g];
            } else if (w.scales == Scales::f16 || zeros) {
                const uint16_t half = scales ? half_of(scales[first]) : 0;
                std::memcpy(to + (kind * PANEL + r) * sizeof half, &half, sizeof half);
            } else {
                const float scale = scales ? scales[first] : 0;
                std::memcpy(to + (kind * PANEL + r) * sizeof scale, &scale, sizeof scale);
            }
        }
    if (zeros)
        for (int64_t r = 0; r < PANEL; r++) to[PANEL * sizeof(uint16_t) + r] = rows.zeros[r] ? rows.zeros[r][first] : 0;
    if (w.form == Form::e4m3) return pack_floats<uint8_t>(rows, block * w.span(), w.span(), to + w.header());
    pack_codes(w, rows, block * w.span(), w.span(), to + w.header());
}

}  // namespace

void choose(Pool& pool, const std::vector<Rows>& parts, Linear& w) {
    const int64_t groups = w.inputs / w.group, together = w.group < LEVELLED && LEVELLED % w.group == 0 ? LEVELLED / w.group : 0;
    std::atomic<int> lowest{0}, highest{0};
    std::atomic<bool> halves{true}, levels{together && w.inputs % LEVELLED == 0};
    auto look = [&](const float* scales) {
        for (int64_t g = 0; g < groups && halves; g++)
            if (half_of(scales[g]) < 0) halves = false;
        float factor;
        int8_t found[LEVELLED];
        for (int64_t g = 0; g < groups && levels; g += together)
            if (!levels_of(scales + g, together, factor, found)) levels = false;
    };
    for (const Rows& part : parts)
        pool.run((part.outputs + PANEL - 1) / PANEL, [&](int64_t unit) {
            int low = 0, high = 0;
            for (int64_t n = unit * PANEL; n < std::min(part.outputs, (unit + 1) * PANEL); n++) {
                const int8_t* codes = static_cast<const int8_t*>(part.values) + n * w.inputs;
                int8_t least = 0, most = 0;
                for (int64_t k = 0; k < w.inputs; k++) least = std::min(least, codes[k]), most = std::max(most, codes[k]);
                low = std::min<int>(low, least), high = std::max<int>(high, most);
                look(part.scales + n * groups);
                if (part.minimums) look(part.minimums + n * groups);
            }
            for (int seen = lowest; low < seen && !lowest.compare_exchange_weak(seen, low);) {}
            for (int seen = highest; high > seen && !highest.compare_exchange_weak(seen, high);) {}
        });
    const bool zeros = parts[0].zeros != nullptr;
    w.minimums = zeros || parts[0].minimums;
    w.scales = zeros ? Scales::zeros : halves ? Scales::f16 : levels ? Scales::levels : Scales::f32;
    // An offset stands in for the minimum, so signed codes that also have minimums stay signed.
    auto within = [&](int offset, int bits) { return lowest + offset >= 0 && highest + offset < 1 << bits && !(offset && w.minimums); };
    w.form = Form::int8, w.offset = 0;
    for (int offset : {32, 16, 0})
        if (within(offset, offset == 16 ? 5 : 6)) w.form = Form::int6, w.offset = offset;
    for (int offset : {8, 0})
        if (within(offset, 4)) w.form = Form::int4, w.offset = offset;
}

void pack(Pool& pool, const std::vector<Rows>& parts, const Linear& w, uint8_t* to) {
    pool.run((w.outputs + PANEL - 1) / PANEL, [&](int64_t panel) {
        const Panel rows = panel_of(parts, w, panel);
        uint8_t* out = to + panel * w.panel();
        if (w.form == Form::f32) return pack_floats<uint32_t>(rows, 0, w.inputs, out);
        if (w.floats()) return pack_floats<uint16_t>(rows, 0, w.inputs, out);
        for (int64_t block = 0; block < w.inputs / w.span(); block++) pack_block(w, rows, block, out + block * w.block());
    });
}

}  // namespace headrace
