// The product of tiles.
#pragma once

#include <cstring>

// c [M][N] += a [M][K] b [K][N], each c a chain over K in order; floats, or int32 of int8 values.
template <int M, int N, int K, class T, class C>
static __attribute__((noinline)) void add_product(const T* __restrict a, const T* __restrict b, C* __restrict c) {
    constexpr int WIDTH = N % 16 == 0 ? 16 : N % 8 == 0 ? 8 : N % 4 == 0 ? 4 : 1, ROWS = M % 8 == 0 ? 8 : M % 4 == 0 ? 4 : M % 2 == 0 ? 2 : 1;
    typedef C Wide __attribute__((vector_size(WIDTH * sizeof(C))));
    typedef T Narrow __attribute__((vector_size(WIDTH * sizeof(T))));
    for (int n = 0; n < N; n += WIDTH)
        for (int m = 0; m < M; m += ROWS) {
            Wide acc[ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) std::memcpy(&acc[r], c + (m + r) * N + n, sizeof(Wide));
            for (int k = 0; k < K; k++) {
                Narrow stored;
                std::memcpy(&stored, b + k * N + n, sizeof stored);
                const Wide column = __builtin_convertvector(stored, Wide);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) acc[r] += column * static_cast<C>(a[(m + r) * K + k]);
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) std::memcpy(c + (m + r) * N + n, &acc[r], sizeof(Wide));
        }
}
