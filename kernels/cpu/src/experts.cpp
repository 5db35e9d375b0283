// Products with the weights of several experts (`experts.h`): all of a layer's are one job of the pool, cut into panels of an expert's
// weight. Each cut is a weight of its own for the kernels of `linear`, so that a row gets the bits that `linear` would give it.
#include "experts.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace headrace {
namespace {

constexpr int64_t WORTH = 1 << 19;       // multiply-adds that are worth handing to a thread
constexpr int64_t SIDE = 4;              // panels that the kernels like to have side by side
constexpr int64_t COPIED = 1 << 15;      // bytes that are worth handing to a thread

// The product of an expert's rows with one part of its weight: units `first` … of the pool's job, of `each` panels.
struct Product {
    Linear w;
    const uint8_t* x;
    int64_t rows;
    float* y;
    int64_t first, each;
};

void multiply(const Ops& ops, const Linear& w, const uint8_t* x, int64_t rows, float* y, int64_t stride) {
    static Pool here(1);  // Has no threads but the one that calls.
    switch (w.activations) {
        case Activations::f32: return ops.linear_floats(here, w, reinterpret_cast<const float*>(x), rows, y, stride);
        case Activations::int8: return ops.linear_int8(here, w, x, rows, y, stride);
        case Activations::bf16: return ops.linear_bf16(here, w, x, rows, y, stride);
    }
}

// Panels [panel, panel + each) of a product.
void multiply_panels(const Ops& ops, const Product& product, int64_t panel, int64_t stride) {
    Linear w = product.w;
    w.panels += panel * w.panel();
    w.outputs = std::min(product.each * PANEL, w.outputs - panel * PANEL);
    multiply(ops, w, product.x, product.rows, product.y + panel * PANEL, stride);
}

// Rows of x for a part's kernels, by expert.
class Inputs {
  public:
    Inputs(Pool& pool, const Ops& ops, const Routing& routing, const float* x, bool sorted)
        : pool_(pool), ops_(ops), routing_(routing), x_(x), sorted_(sorted) {}

    // Makes x what this part wants, unless it is. What was made before is lost.
    bool suit(const Linear& w) const {
        return made_ && made_->activations == w.activations &&
               (w.activations != Activations::int8 || (made_->unit() == w.unit() && made_->minimums == w.minimums));
    }

    void make(const Linear& w) {
        made_ = &w;
        const auto* floats = reinterpret_cast<const uint8_t*>(x_);
        const int64_t pairs = routing_.pairs(), rows = sorted_ ? pairs : pairs / routing_.used;
        bytes_ = w.inputs * static_cast<int64_t>(sizeof(float));
        if (w.activations == Activations::int8) {
            uint8_t* quantized = scratch(0, rows * quantized_bytes(w));
            ops_.quantize(pool_, w, x_, rows, quantized);
            bytes_ = quantized_bytes(w);
            rows_ = gathered(quantized);
        } else {
            rows_ = gathered(floats);
            if (w.activations == Activations::bf16) narrow(w);
        }
    }

    // The rows of an expert, if those of all experts before it have been asked for.
    const uint8_t* next(int64_t expert) {
        const int64_t begin = routing_.starts[expert], count = routing_.starts[expert + 1] - begin;
        if (made_->activations != Activations::bf16) return rows_ + begin * bytes_;
        const uint8_t* rows = rows_ + narrowed_;
        narrowed_ = routing_.experts == expert + 1 ? 0 : narrowed_ + narrowed_bytes(*made_, count);
        return rows;
    }

  private:
    static uint8_t* scratch(int slot, int64_t bytes) { return reinterpret_cast<uint8_t*>(Pool::scratch(slot, (bytes + 3) / 4)); }

    // Rows of `bytes_` each, one for every sorted pair.
    const uint8_t* gathered(const uint8_t* from) {
        if (sorted_) return from;
        uint8_t* to = scratch(1, routing_.pairs() * bytes_);
        const int64_t each = std::max<int64_t>(1, COPIED / bytes_), pairs = routing_.pairs();
        pool_.run((pairs + each - 1) / each, [&](int64_t unit) {
            for (int64_t i = unit * each; i < std::min(pairs, (unit + 1) * each); i++)
                std::memcpy(to + i * bytes_, from + routing_.sorted[i] / routing_.used * bytes_, bytes_);
        });
        return to;
    }

    // Every expert's rows begin a block of NARROWED.
    void narrow(const Linear& w) {
        int64_t size = 0;
        for (int64_t e = 0; e < routing_.experts; e++) size += narrowed_bytes(w, routing_.starts[e + 1] - routing_.starts[e]);
        uint8_t* to = scratch(2, size);
        for (int64_t e = 0; e < routing_.experts; e++) {
            const int64_t begin = routing_.starts[e], count = routing_.starts[e + 1] - begin;
            if (count) ops_.narrow(pool_, w, reinterpret_cast<const float*>(rows_) + begin * w.inputs, count, to);
            to += narrowed_bytes(w, count);
        }
        rows_ = to - size;
        narrowed_ = 0;
    }

    Pool& pool_;
    const Ops& ops_;
    const Routing& routing_;
    const float* x_;
    const bool sorted_;
    const Linear* made_ = nullptr;  // for which x was made what stands in rows_
    const uint8_t* rows_ = nullptr;
    int64_t bytes_ = 0, narrowed_ = 0;
};

}  // namespace

void Routing::resize(int64_t rows) {
    chosen.resize(rows * used);
    sorted.resize(rows * used);
    places.resize(rows * used);
    starts.resize(experts + 1);
}

void Routing::sort() {
    std::fill(starts.begin(), starts.end(), 0);
    for (const int32_t expert : chosen) starts[expert + 1]++;
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    // Each start moves to its expert's end, and back.
    for (int64_t pair = 0; pair < pairs(); pair++) {
        places[pair] = starts[chosen[pair]]++;
        sorted[places[pair]] = static_cast<int32_t>(pair);
    }
    std::rotate(starts.begin(), starts.end() - 1, starts.end());
    starts[0] = 0;
}

void experts_linear(Pool& pool, const Ops& ops, const Linear& w, const Routing& routing, const float* x, bool sorted, float* y) {
    thread_local std::vector<Product> products;
    const int64_t width = w.width();
    Inputs inputs(pool, ops, routing, x, sorted);
    int64_t units = 0;
    const auto run = [&] {
        const auto& all = products;  // The name of a thread's own variable is another one in another thread.
        pool.run(units, [&](int64_t unit) {
            const auto after = std::upper_bound(all.begin(), all.end(), unit, [](int64_t u, const Product& one) { return u < one.first; });
            const Product& product = *(after - 1);
            multiply_panels(ops, product, (unit - product.first) * product.each, width);
        });
        products.clear();
        units = 0;
    };
    products.clear();
    int64_t used = 0;
    for (int64_t e = 0; e < routing.experts; e++) used += routing.starts[e + 1] > routing.starts[e];
    for (const Linear* part = &w; part; y += part->outputs, part = part->next) {
        if (!inputs.suit(*part)) {
            run();
            inputs.make(*part);
        }
        const int64_t panels = (part->outputs + PANEL - 1) / PANEL;
        const int64_t most = std::max<int64_t>(1, used * panels / (4 * pool.threads()));
        for (int64_t e = 0; e < routing.experts; e++) {
            const int64_t begin = routing.starts[e], count = routing.starts[e + 1] - begin;
            const uint8_t* of_expert = inputs.next(e);
            if (!count) continue;
            const int64_t wanted = std::max<int64_t>(1, WORTH / (count * part->inputs * PANEL));
            const int64_t each = (std::min(wanted, most) + SIDE - 1) / SIDE * SIDE;
            Linear own = *part;
            own.panels += e * part->size();
            own.next = nullptr;
            products.push_back({own, of_expert, count, y + begin * width, units, each});
            units += (panels + each - 1) / each;
        }
    }
    run();
}

}  // namespace headrace
