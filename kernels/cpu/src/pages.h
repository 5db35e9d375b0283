// The keys and values of one KV head in the pages of a layer, in the type in which they are stored.
#pragma once

#include "ops.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {

template <class T>
struct Pages {
    T* keys_begin;
    T* values_begin;
    int64_t keys_apart, values_apart, stride;

    Pages(const KV& kv, const Heads& heads, int64_t head)
        : keys_begin(static_cast<T*>(kv.keys) + head * heads.dim * kv.page_size),
          values_begin(static_cast<T*>(kv.values) + head * kv.value_width(heads.dim) * kv.page_size),
          keys_apart(heads.kv * heads.dim * kv.page_size),
          values_apart(heads.kv * kv.value_width(heads.dim) * kv.page_size),
          stride(kv.value_width(heads.dim)) {}

    // [D][page_size].
    T* keys(int64_t page) const { return keys_begin + page * keys_apart; }
    // [width] of the position at `offset` in the page.
    T* value(int64_t page, int64_t offset) const { return values_begin + page * values_apart + offset * stride; }
};

}  // namespace headrace::HEADRACE_ISA
