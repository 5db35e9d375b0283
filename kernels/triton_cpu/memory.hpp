// Loads, stores and atomics of one element. What a checked launch does not allow is not done.
#pragma once

#include <type_traits>

#include "checks.hpp"
#include "numbers.hpp"

#define INLINE static inline __attribute__((always_inline))

template <class T> INLINE auto load(Checks& checks, const T* p, int line, int argument) {
    return checks.allow(p, sizeof(T), line, argument, How::LOAD) ? get(p) : decltype(get(p)){};
}
template <class T, class V> INLINE void store(Checks& checks, T* p, V v, int line, int argument) {
    if (checks.allow(p, sizeof(T), line, argument, How::STORE)) put(p, v);
}

template <class T>
using Word __attribute__((may_alias)) = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>>;

// A load that the compiler leaves where it is, as often as it is done: others may be writing.
template <class T> INLINE auto watch(Checks& checks, const T* p, int line, int argument) {
    if (!checks.allow(p, sizeof(T), line, argument, How::WATCH)) return decltype(get(p)){};
    const Word<T> word = __atomic_load_n(reinterpret_cast<const Word<T>*>(p), __ATOMIC_RELAXED);
    return get(reinterpret_cast<const T*>(&word));
}

constexpr bool acquires(int order) { return order == __ATOMIC_ACQUIRE || order == __ATOMIC_ACQ_REL; }
constexpr bool releases(int order) { return order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL; }

// The element becomes next(element); returned is what it was. In a checked launch an atomic that `orders` nothing beyond its own block (scope
// "cta") counts as a plain store.
template <int ORDER, bool AMONG_PROGRAMS, class T, class F> INLINE auto update(Checks& checks, T* p, int line, int argument, F next) {
    const bool allowed = AMONG_PROGRAMS ? checks.allow(p, sizeof(T), line, argument, How::ATOMIC, acquires(ORDER), releases(ORDER))
                                        : checks.allow(p, sizeof(T), line, argument, How::STORE);
    if (!allowed) return decltype(get(p)){};
    Word<T>* const word = reinterpret_cast<Word<T>*>(p);
    Word<T> before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
    do put(reinterpret_cast<T*>(&after), rounded<T>(next(get(reinterpret_cast<T*>(&before)))));
    while (!__atomic_compare_exchange_n(word, &before, after, true, ORDER, __ATOMIC_RELAXED));
    return get(reinterpret_cast<T*>(&before));
}

// Where the element has the bits of `expected` it becomes `value`; returned is what it was.
template <int ORDER, bool AMONG_PROGRAMS, class T, class V> INLINE auto exchange_if(Checks& checks, T* p, V expected, V value, int line, int argument) {
    T old, wanted;
    put(&wanted, expected);
    return update<ORDER, AMONG_PROGRAMS>(checks, p, line, argument, [&](auto before) {
        put(&old, before);
        return std::memcmp(&old, &wanted, sizeof(T)) == 0 ? value : before;
    });
}
