// Rows of a product, a few at a time: as many as keep their sums in registers.
#pragma once

#include <cstdint>

namespace headrace::HEADRACE_ISA {

// Calls use(n) for an n known at compile time, at most MOST, as use.operator()<n>().
template <int MOST, class Use>
inline void with_height(int64_t n, const Use& use) {
    if constexpr (MOST > 1)
        if (n < MOST) return with_height<MOST - 1>(n, use);
    use.template operator()<MOST>();
}

// Calls use.operator()<n>(first) for groups of at most MOST rows and about equal height.
template <int MOST, class Use>
inline void by_heights(int64_t rows, const Use& use) {
    if (rows == 0) return;
    const int64_t count = (rows + MOST - 1) / MOST, height = rows / count, taller = rows % count;
    for (int64_t group = 0, r = 0; group < count; group++) {
        const int64_t n = height + (group < taller);
        with_height<MOST>(n, [&]<int N>() { use.template operator()<N>(r); });
        r += n;
    }
}

// The same for groups of MOST rows, and one of what is left.
template <int MOST, class Use>
inline void by_most(int64_t rows, const Use& use) {
    int64_t r = 0;
    for (; rows - r >= MOST; r += MOST) use.template operator()<MOST>(r);
    if (r < rows) with_height<MOST>(rows - r, [&]<int N>() { use.template operator()<N>(r); });
}

}  // namespace headrace::HEADRACE_ISA
