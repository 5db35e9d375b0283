// Products by AMX: matrices in tile registers, of which one instruction multiplies two and adds the product to a third.
//
//           of codes with int8                                         of bfloat16
//   x       a tile of up to 16 rows, 4 * FOURS inputs each             up to 16 rows, 32 inputs each, as they lie
//   codes   a tile of FOURS rows, 4 inputs of 16 outputs each          pairs: 16 rows, 2 inputs of 16 outputs each, as unpacked
//   sums    a tile of up to 16 rows, 16 outputs each, exact in 32 bits as float32
//
// A group of codes has a scale of its own, so no tile takes more than one group: half of what the hardware could hold, and its product is
// read back to be scaled. Weights of bfloat16 are scaled before, and their sums stay in tiles for all inputs.
#pragma once

#if defined(HEADRACE_AMX)

#include <immintrin.h>

#include <cstring>

#include "ops.h"

namespace headrace::HEADRACE_ISA::tiles {

constexpr int ROWS = 16;

// The shape of all registers, as `ldtilecfg` reads it (Intel SDM, volume 1, 18.3).
struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int of_rows, int of_bytes) {
        rows[tile] = static_cast<uint8_t>(of_rows);
        row_bytes[tile] = static_cast<uint16_t>(of_bytes);
    }
};
static_assert(sizeof(Shapes) == 64);

// What is in memory and what the tiles are told, in the order written: the compiler's intrinsics do not tell it that they read memory,
// so that it drops or moves the stores they depend on (GCC 12's `_tile_loadconfig` names 8 bytes of the 64).
inline void settle() { asm volatile("" ::: "memory"); }

inline void configure(const Shapes& shapes) {
    asm volatile("" : : "m"(shapes));
    _tile_loadconfig(&shapes);
}

// The calling thread's tiles while this lives, for FOURS * 4 inputs at a time. To be told their shape costs as much as some products
// (about 80 ns), so that it is done only when it changes.
template <int FOURS>
class Configured {
  public:
    Configured() = default;
    Configured(const Configured&) = delete;
    ~Configured() {
        if (count) _tile_release();
    }

    // For this many rows of x.
    void rows(int wanted) {
        if (wanted == count) return;
        count = wanted;
        Shapes shapes;
        shapes.set(0, count, 4 * PANEL);
        shapes.set(1, count, 4 * FOURS);
        shapes.set(2, FOURS, 4 * PANEL);
        configure(shapes);
    }

  private:
    int count = 0;
};

// sums [rows][PANEL] of codes times x. Registers (the compiler wants their numbers as digits): 0 sums, 1 x, 2 codes.
template <Form F>
inline void multiply(const uint8_t* codes, const uint8_t* x, int64_t stride, int32_t* sums) {
    settle();
    _tile_zero(0);
    _tile_loadd(1, x, stride);
    _tile_loadd(2, codes, 4 * PANEL);
    if constexpr (F == Form::int8)
        _tile_dpbssd(0, 1, 2);
    else
        _tile_dpbsud(0, 1, 2);
    _tile_stored(0, sums, 4 * PANEL);
    settle();
}

// The calling thread's tiles while this lives, for products of bfloat16 with up to 32 rows.
class Paired {
  public:
    Paired() = default;
    Paired(const Paired&) = delete;
    ~Paired() {
        if (count) _tile_release();
    }

    // For this many rows of x, the first 16 of them in tiles of their own.
    void rows(int wanted) {
        if (wanted == count) return;
        count = wanted;
        const int first = wanted < ROWS ? wanted : ROWS, second = wanted - first;
        Shapes shapes;
        for (int tile : {0, 1, 4}) shapes.set(tile, first, 64);
        if (second)
            for (int tile : {2, 3, 5}) shapes.set(tile, second, 64);
        for (int tile : {6, 7}) shapes.set(tile, ROWS, 64);
        configure(shapes);
    }

  private:
    int count = 0;
};

// Adds the products of up to 16 rows of narrowed x, or of up to 32 where there are MORE, with PANELS panels' pairs to sums [rows][PANEL] of
// each. Blocks of x are `block` bytes apart. Registers: 0 and 1 sums of the first rows with both panels, 2 and 3 those of the other rows, 4
// and 5 x, 6 and 7 pairs.
template <bool MORE, int PANELS>
inline void add_pairs(const uint32_t* const* pairs, const uint8_t* x, int64_t block, int64_t inputs, float* const* sums) {
    constexpr bool TWO = PANELS > 1;
    const uint8_t* others = x + block;
    settle();
    _tile_loadd(0, sums[0], 4 * PANEL);
    if constexpr (TWO) _tile_loadd(1, sums[1], 4 * PANEL);
    if constexpr (MORE) _tile_loadd(2, sums[0] + ROWS * PANEL, 4 * PANEL);
    if constexpr (MORE && TWO) _tile_loadd(3, sums[1] + ROWS * PANEL, 4 * PANEL);
    for (int64_t k = 0; k < inputs; k += 32) {
        _tile_loadd(4, x + 32 * k, 64);
        _tile_loadd(6, pairs[0] + k / 2 * PANEL, 4 * PANEL);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (TWO) {
            _tile_loadd(7, pairs[1] + k / 2 * PANEL, 4 * PANEL);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (MORE) {
            _tile_loadd(5, others + 32 * k, 64);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (TWO) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], 4 * PANEL);
    if constexpr (TWO) _tile_stored(1, sums[1], 4 * PANEL);
    if constexpr (MORE) _tile_stored(2, sums[0] + ROWS * PANEL, 4 * PANEL);
    if constexpr (MORE && TWO) _tile_stored(3, sums[1] + ROWS * PANEL, 4 * PANEL);
    settle();
}

}  // namespace headrace::HEADRACE_ISA::tiles

#endif
