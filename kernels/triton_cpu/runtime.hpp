// What the C++ of a lowered kernel is written in, and the loop over a grid's programs.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "memory.hpp"
#include "product.hpp"

using Program = void(char* scratch, const int64_t* slots, int p0, int p1, int p2, int g0, int g1, int g2, Checks& checks);

// Scratch of SIZE bytes a thread; in a checked launch it is NaN (or -1) where a program has not written. Programs begin in order, so one may
// wait for those before it and never for those behind it.
template <Program PROGRAM, int64_t SIZE>
static void run(const int64_t* slots, int g0, int g1, int g2, int threads, Extent* extents, int count, const int* granules, Found* found) {
    const int64_t all = static_cast<int64_t>(g0) * g1 * g2;
#ifdef HEADRACE_TRITON_CHECKED
    threads = 1;
#endif
#pragma omp parallel num_threads(all < threads ? static_cast<int>(all) : threads)
    {
        char* const scratch = static_cast<char*>(std::aligned_alloc(64, SIZE));
        Checks checks(extents, count, granules, found, all);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < all; i++) {
            if (!found->empty()) continue;
#ifdef HEADRACE_TRITON_CHECKED
            std::memset(scratch, 255, SIZE);
#endif
            checks.begin(static_cast<int>(i));
            PROGRAM(scratch, slots, i % g0, i / g0 % g1, i / g0 / g1, g0, g1, g2, checks);
        }
        std::free(scratch);
    }
}
