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
    T* begin;
    float* scales_begin;
    int64_t keys_size, values_size, apart, scales_apart, stride, page_size;

    Pages(const KV& kv, const Heads& heads, int64_t head)
        : scales_begin(kv.scales + head * 2 * kv.page_size),
          keys_size(heads.dim * kv.page_size),
          values_size(kv.value_width(heads.dim) * kv.page_size),
          apart(kv.apart),
          scales_apart(heads.kv * 2 * kv.page_size),
          stride(kv.value_width(heads.dim)),
          page_size(kv.page_size) {
        begin = static_cast<T*>(kv.numbers) + head * size();
    }

    // Numbers of one head in a page: those of the next head follow.
    int64_t size() const { return keys_size + values_size; }

    // [D][page_size].
    T* keys(int64_t page) const { return begin + page * apart; }
    // [width] of the position at `offset` in the page.
    T* value(int64_t page, int64_t offset) const { return keys(page) + keys_size + offset * stride; }
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
