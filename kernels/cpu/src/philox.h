// Random numbers that are a pure function of seed and position: the bits of `kernels/philox.py`, which says why and gives the source.
#pragma once

#include <cstdint>

namespace headrace {

// The number in [0, 1) at `position`, in units of 2^-53.
inline uint64_t uniform(uint64_t seed, uint64_t position) {
    uint32_t a = static_cast<uint32_t>(position), b = static_cast<uint32_t>(position >> 32), c = 0, d = 0;
    uint32_t left = static_cast<uint32_t>(seed), right = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t first = a * UINT64_C(0xD2511F53), second = c * UINT64_C(0xCD9E8D57);
        a = static_cast<uint32_t>(second >> 32) ^ b ^ left;
        b = static_cast<uint32_t>(second);
        c = static_cast<uint32_t>(first >> 32) ^ d ^ right;
        d = static_cast<uint32_t>(first);
        left += 0x9E3779B9;
        right += 0xBB67AE85;
    }
    return (static_cast<uint64_t>(a >> 5) << 26) + (b >> 6);
}

}  // namespace headrace
