// The tile instructions in plain C++, for machines without them: included before the kernel's sources, whose intrinsics it replaces.
// What the hardware would fault on ends the program.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
    int rows = 0, bytes = 0;
    uint8_t data[16][64] = {};
};

inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void demand(bool held, const char* what) {
    if (held) return;
    std::fprintf(stderr, "tiles: %s\n", what);
    std::abort();
}

inline Tile& at(int number) {
    demand(configured, "used before ldtilecfg, or after tilerelease");
    demand(tiles[number].rows > 0, "a tile without a shape");
    return tiles[number];
}

inline void configure(const void* from) {
    uint8_t bytes[64];
    std::memcpy(bytes, from, sizeof bytes);
    demand(bytes[0] == 1 && bytes[1] == 0, "palette 1 from row 0");
    for (int i = 2; i < 16; i++) demand(bytes[i] == 0, "reserved bytes are 0");
    for (int i = 0; i < 8; i++) {
        uint16_t wide;
        std::memcpy(&wide, bytes + 16 + 2 * i, sizeof wide);
        demand(bytes[48 + i] <= 16 && wide <= 64 && (bytes[48 + i] == 0) == (wide == 0), "at most 16 rows of 64 bytes");
        tiles[i] = Tile{bytes[48 + i], wide, {}};
    }
    configured = true;
}

inline void release() { configured = false; }

inline void zero(int number) { std::memset(at(number).data, 0, sizeof at(number).data); }

inline void load(int number, const void* from, int64_t stride) {
    Tile& tile = at(number);
    std::memset(tile.data, 0, sizeof tile.data);
    for (int r = 0; r < tile.rows; r++) std::memcpy(tile.data[r], static_cast<const uint8_t*>(from) + r * stride, tile.bytes);
}

inline void store(int number, void* to, int64_t stride) {
    const Tile& tile = at(number);
    for (int r = 0; r < tile.rows; r++) std::memcpy(static_cast<uint8_t*>(to) + r * stride, tile.data[r], tile.bytes);
}

// a of int8; b of B.
template <class B>
void multiply(int sums, int a, int b) {
    Tile &c = at(sums), &x = at(a), &y = at(b);
    demand(c.rows == x.rows && c.bytes == y.bytes && x.bytes == 4 * y.rows, "tiles of shapes that fit");
    for (int m = 0; m < c.rows; m++)
        for (int n = 0; n < c.bytes / 4; n++) {
            int32_t sum;
            std::memcpy(&sum, c.data[m] + 4 * n, sizeof sum);
            for (int k = 0; k < x.bytes; k++)
                sum += static_cast<int8_t>(x.data[m][k]) * static_cast<int>(static_cast<B>(y.data[k / 4][4 * n + k % 4]));
            std::memcpy(c.data[m] + 4 * n, &sum, sizeof sum);
        }
}

inline float upper(const uint8_t* word) {
    uint32_t bits = static_cast<uint32_t>(word[1]) << 24 | static_cast<uint32_t>(word[0]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Of bfloat16. Numbers that are too small are 0 only where the caller has asked its own arithmetic for that.
inline void multiply_pairs(int sums, int a, int b) {
    Tile &c = at(sums), &x = at(a), &y = at(b);
    demand(c.rows == x.rows && c.bytes == y.bytes && x.bytes == 4 * y.rows, "tiles of shapes that fit");
    for (int m = 0; m < c.rows; m++)
        for (int n = 0; n < c.bytes / 4; n++) {
            float sum, even = 0, odd = 0;
            std::memcpy(&sum, c.data[m] + 4 * n, sizeof sum);
            for (int k = 0; k < y.rows; k++) {
                even = __builtin_fmaf(upper(x.data[m] + 4 * k), upper(y.data[k] + 4 * n), even);
                odd = __builtin_fmaf(upper(x.data[m] + 4 * k + 2), upper(y.data[k] + 4 * n + 2), odd);
            }
            sum += even + odd;
            std::memcpy(c.data[m] + 4 * n, &sum, sizeof sum);
        }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated::configure(from)
#define _tile_release() emulated::release()
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbssd(sums, a, b) emulated::multiply<int8_t>(sums, a, b)
#define _tile_dpbsud(sums, a, b) emulated::multiply<uint8_t>(sums, a, b)
#define _tile_dpbf16ps(sums, a, b) emulated::multiply_pairs(sums, a, b)
