// The keys and values of one KV head in the pages of a layer, in the type in which they are stored.
#pragma once

#include <type_traits>

#include "ops.h"
#include "vec.h"

namespace headrace::HEADRACE_ISA {

template <class T>
constexpr bool SCALED = std::is_same_v<T, int8_t>;

template <class T>
struct Pages {
    T* keys_begin;
    T* values_begin;
    float* scales_begin;
    int64_t keys_size, keys_apart, values_apart, scales_apart, stride, page_size;

    Pages(const KV& kv, const Heads& heads, int64_t head)
        : keys_begin(static_cast<T*>(kv.keys) + head * heads.dim * kv.page_size),
          values_begin(static_cast<T*>(kv.values) + head * kv.value_width(heads.dim) * kv.page_size),
          scales_begin(kv.scales + head * 2 * kv.page_size),
          keys_size(heads.dim * kv.page_size),
          keys_apart(heads.kv * keys_size),
          values_apart(heads.kv * kv.value_width(heads.dim) * kv.page_size),
          scales_apart(heads.kv * 2 * kv.page_size),
          stride(kv.value_width(heads.dim)),
          page_size(kv.page_size) {}

    // [D][page_size].
    T* keys(int64_t page) const { return keys_begin + page * keys_apart; }
    // [width] of the position at `offset` in the page.
    T* value(int64_t page, int64_t offset) const { return values_begin + page * values_apart + offset * stride; }
    // [page_size] each, where they are SCALED.
    float* key_scales(int64_t page) const { return scales_begin + page * scales_apart; }
    float* value_scales(int64_t page) const { return key_scales(page) + page_size; }
};

// Calls work.operator()<T>() with the type in which these pages are stored.
template <class Work>
void with_type(const KV& kv, const Work& work) {
    switch (kv.form) {
        case KVForm::f32: return work.template operator()<float>();
        case KVForm::f16: return work.template operator()<Half>();
        case KVForm::int8: return work.template operator()<int8_t>();
    }
}

}  // namespace headrace::HEADRACE_ISA
