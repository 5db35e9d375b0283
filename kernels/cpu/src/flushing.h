// Arithmetic as tiles do it: numbers too small for full precision count as 0, as operands and as results.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace headrace {
namespace {

// On the calling thread, while it lives.
class Flushing {
  public:
    Flushing() : before(read()) { write(before | BOTH); }
    Flushing(const Flushing&) = delete;
    ~Flushing() { write(before); }

  private:
#if defined(__SSE2__)
    using Control = unsigned;
    static constexpr Control BOTH = 0x8040;  // FTZ and DAZ of MXCSR (Intel SDM, volume 1, 10.2.3)
    static Control read() { return _mm_getcsr(); }
    static void write(Control control) { _mm_setcsr(control); }
#elif defined(__aarch64__)
    using Control = uint64_t;
    static constexpr Control BOTH = 1 << 24;  // FZ of FPCR (Arm ARM, C5.2.8)
    static Control read() { return __builtin_aarch64_get_fpcr64(); }
    static void write(Control control) { __builtin_aarch64_set_fpcr64(control); }
#else
    using Control = unsigned;
    static constexpr Control BOTH = 0;
    static Control read() { return 0; }
    static void write(Control) {}
#endif

    Control before;
};

}  // namespace
}  // namespace headrace
