// The product of tiles.
#pragma once

#include <cstring>

// c [M][N] += a [M][K] b [K][N], each c a chain over K in order; floats, or int32 of int8 values.
//
// ROWS × COLUMNS vectors of c stay in registers while K passes. Vectors are of 32 bytes: GCC takes longer ones apart through memory.
template <int M, int N, int K, class T, class C>
static __attribute__((noinline)) void add_product(const T* __restrict a, const T* __restrict b, C* __restrict c) {
    constexpr int BYTES = N * sizeof(C) % 32 == 0 ? 32 : N * sizeof(C) % 16 == 0 ? 16 : sizeof(C), WIDTH = BYTES / sizeof(C);
    constexpr int COLUMNS = N / WIDTH % 2 == 0 ? 2 : 1, ROWS = M % 8 == 0 ? 8 : M % 4 == 0 ? 4 : M % 2 == 0 ? 2 : 1;
    typedef C Wide __attribute__((vector_size(BYTES)));
    typedef T Narrow __attribute__((vector_size(WIDTH * sizeof(T))));
    for (int n = 0; n < N; n += WIDTH * COLUMNS)
        for (int m = 0; m < M; m += ROWS) {
            Wide sums[ROWS][COLUMNS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int w = 0; w < COLUMNS; w++) std::memcpy(&sums[r][w], c + (m + r) * N + n + w * WIDTH, BYTES);
            for (int k = 0; k < K; k++) {
                Wide row[COLUMNS];
#pragma GCC unroll 2
                for (int w = 0; w < COLUMNS; w++) {
                    Narrow stored;
                    std::memcpy(&stored, b + k * N + n + w * WIDTH, sizeof stored);
                    row[w] = __builtin_convertvector(stored, Wide);
                }
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                    for (int w = 0; w < COLUMNS; w++) sums[r][w] += row[w] * static_cast<C>(a[(m + r) * K + k]);
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int w = 0; w < COLUMNS; w++) std::memcpy(c + (m + r) * N + n + w * WIDTH, &sums[r][w], BYTES);
        }
}
