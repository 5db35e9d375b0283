// The products that use tiles, emulated, against those of the same source that do not: to the last bit, for every form of weights and
// numbers of rows on both sides of 16. Ends with 0 when all are equal.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "ops.h"
#include "pool.h"

namespace headrace {
namespace portable {
void quantize(Pool&, const Linear&, const float* x, int64_t rows, uint8_t* quantized);
void linear_int8(Pool&, const Linear&, const uint8_t* x, int64_t rows, float* y, int64_t stride);
void narrow(Pool&, const Linear&, const float* x, int64_t rows, uint8_t* narrowed);
void linear_bf16(Pool&, const Linear&, const uint8_t* x, int64_t rows, float* y, int64_t stride);
}
namespace amx {
void linear_int8(Pool&, const Linear&, const uint8_t* x, int64_t rows, float* y, int64_t stride);
void linear_bf16(Pool&, const Linear&, const uint8_t* x, int64_t rows, float* y, int64_t stride);
}
}

using namespace headrace;

namespace {

constexpr int64_t OUTPUTS = 40;
Pool pool(2);

bool equal(const Linear& w, const std::vector<float>& x, int64_t rows) {
    const bool narrowed = w.activations == Activations::bf16;
    std::vector<float> expected(rows * OUTPUTS), got(rows * OUTPUTS);
    std::vector<uint8_t> made(narrowed ? narrowed_bytes(w, rows) : rows * quantized_bytes(w));
    (narrowed ? portable::narrow : portable::quantize)(pool, w, x.data(), rows, made.data());
    (narrowed ? portable::linear_bf16 : portable::linear_int8)(pool, w, made.data(), rows, expected.data(), OUTPUTS);
    (narrowed ? amx::linear_bf16 : amx::linear_int8)(pool, w, made.data(), rows, got.data(), OUTPUTS);
    return std::memcmp(expected.data(), got.data(), expected.size() * sizeof(float)) == 0;
}

}  // namespace

int main() {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    struct Kind {
        Form form;
        bool minimums;
        int64_t group;
        int offset;
    };
    const Kind kinds[] = {{Form::int4, true, 32, 0}, {Form::int4, false, 32, 8},  {Form::int8, false, 32, 0}, {Form::int8, false, 96, 0},
                          {Form::int6, false, 16, 32}, {Form::int6, true, 32, 0}, {Form::int6, false, 32, 16}};
    int compared = 0;
    for (const Kind& kind : kinds)
        for (int64_t inputs : {96, 1536}) {
            Linear w{kind.form, Scales::f32, kind.minimums, Activations::f32, kind.offset, OUTPUTS, inputs, kind.group, nullptr, nullptr, nullptr};
            std::vector<float> room(w.size() / 4 + 16);
            uint8_t* panels = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
            for (int64_t at = 0; at < w.size(); at += w.block()) {
                for (int64_t i = 0; i < w.header(); i += 4) {
                    const float scale = normal(random);
                    std::memcpy(panels + at + i, &scale, sizeof scale);
                }
                for (int64_t i = w.header(); i < w.block(); i++) panels[at + i] = static_cast<uint8_t>(random() & (kind.form == Form::int6 ? 63 : 255));
            }
            w.panels = panels;
            for (int64_t rows : {1, 8, 9, 15, 16, 17, 31, 33, 100, 200}) {
                std::vector<float> x(rows * inputs);
                for (float& one : x) one = normal(random);
                for (Activations activations : {Activations::int8, Activations::bf16}) {
                    w.activations = activations;
                    if (!equal(w, x, rows)) {
                        std::printf("form %d by activations %d, %ld inputs, %ld rows: not equal\n", static_cast<int>(kind.form),
                                    static_cast<int>(activations), static_cast<long>(inputs), static_cast<long>(rows));
                        return 1;
                    }
                    compared++;
                }
            }
        }
    std::printf("%d products are equal\n", compared);
    return 0;
}
