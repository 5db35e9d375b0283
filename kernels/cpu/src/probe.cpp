// What this machine does at most, by the instructions that the kernels are made of: against it `headrace bench kernels` holds them.
#include <chrono>

#include "dots.h"
#include "ops.h"
#include "tiles.h"

namespace headrace::HEADRACE_ISA {
namespace {

constexpr int CHAINS = 10;  // sums at once: enough to hide the latency of one
constexpr int64_t TURNS = 200'000, SHARES = 8;

// Seconds that `work` takes when every thread does SHARES parts of it, the best of some tries.
template <class Work>
double seconds(Pool& pool, const Work& work) {
    double best = 1e9;
    for (int tries = 0; tries < 5; tries++) {
        const auto begin = std::chrono::steady_clock::now();
        pool.run(pool.threads() * SHARES, work);
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    return best;
}

// Keeps the compiler from seeing that this is what it was before.
template <class V>
inline void disguise(V& v) {
#if defined(__AVX512F__)
    asm volatile("" : "+v"(v));
#elif defined(__x86_64__) && defined(__AVX2__)
    asm volatile("" : "+x"(v));
#else
    asm volatile("" : "+m"(v));
#endif
}

// Calls step on each of CHAINS sums, TURNS times.
template <class V, class Step>
void turn(V x, V y, const Step& step) {
    V a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{};
    auto next = [&](V& sum) {
        disguise(x);
        sum = step(sum, x, y);
        disguise(sum);
    };
    for (int64_t turns = 0; turns < TURNS; turns++) next(a), next(b), next(c), next(d), next(e), next(f), next(g), next(h), next(i), next(j);
}

#if defined(HEADRACE_AMX)

constexpr int INT8_OPERATIONS = 2 * tiles::ROWS * 16 * 64;  // a product of whole tiles
constexpr int INT8_CHAINS = 4;

void multiply_int8() {
    tiles::Shapes shapes;
    for (int tile = 0; tile < 6; tile++) shapes.set(tile, 16, 64);
    tiles::configure(shapes);
    for (int64_t turns = 0; turns < TURNS; turns++) {
        _tile_dpbsud(0, 4, 5);
        _tile_dpbsud(1, 4, 5);
        _tile_dpbsud(2, 4, 5);
        _tile_dpbsud(3, 4, 5);
    }
    _tile_release();
}

constexpr int BF16_OPERATIONS = 2 * tiles::ROWS * 16 * 32;

void multiply_bf16() {
    tiles::Shapes shapes;
    for (int tile = 0; tile < 6; tile++) shapes.set(tile, 16, 64);
    tiles::configure(shapes);
    for (int64_t turns = 0; turns < TURNS; turns++) {
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 5);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_release();
}

#else

constexpr int INT8_OPERATIONS = 8 * wide::WIDTH;
constexpr int INT8_CHAINS = CHAINS;

// One product of codes of 4 bits with int8, as `sum_unit` adds it up.
inline wide::Ints add_product(wide::Ints sum, wide::Ints codes, wide::Ints x) {
#if defined(HEADRACE_DOT)
    return dots::dot<Form::int4, true>(sum, codes, x);
#else
    return dots::add(sum, dots::multiply(codes, x));
#endif
}

void multiply_int8() {
    turn(wide::Ints{} + 0x01020304, wide::Ints{} + 0x02010201, [](wide::Ints sum, wide::Ints x, wide::Ints y) { return add_product(sum, x, y); });
}

#endif

}  // namespace

Peaks probe(Pool& pool, const uint8_t* bytes, int64_t size) {
    Peaks peaks;
    const double turns = static_cast<double>(pool.threads() * SHARES) * TURNS;
    peaks.float_operations = turns * CHAINS * 2 * wide::WIDTH / seconds(pool, [](int64_t) {
        turn(wide::all(0.5f), wide::all(0.25f), [](wide::Floats sum, wide::Floats x, wide::Floats y) { return wide::fma(x, y, sum); });
    });
#if defined(HEADRACE_AMX)
    peaks.bf16_operations = turns * INT8_CHAINS * BF16_OPERATIONS / seconds(pool, [](int64_t) { multiply_bf16(); });
#else
    peaks.bf16_operations = peaks.float_operations;  // by the same instructions
#endif
    peaks.int8_operations = turns * INT8_CHAINS * INT8_OPERATIONS / seconds(pool, [](int64_t) { multiply_int8(); });
    const int64_t shares = pool.threads() * SHARES, share = size / shares / 256 * 256;
    peaks.bytes_read = static_cast<double>(shares * share) / seconds(pool, [&](int64_t unit) {
        wide::Ints sums[4] = {};
        for (const uint8_t *at = bytes + unit * share, *end = at + share; at < end; at += 16 * wide::WIDTH)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                if (i * 4 * wide::WIDTH % 64 == 0) __builtin_prefetch(at + i * 4 * wide::WIDTH + AHEAD, 0, 2);
                sums[i] += wide::ints(at + i * 4 * wide::WIDTH);
            }
        wide::Ints sum = sums[0] + sums[1] + sums[2] + sums[3];
        disguise(sum);
    });
    return peaks;
}

}  // namespace headrace::HEADRACE_ISA
