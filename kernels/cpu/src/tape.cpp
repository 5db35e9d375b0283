#include "tape.h"

#include <chrono>
#include <new>

namespace headrace {
namespace {

constexpr std::align_val_t LINE{64};

int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Tape::~Tape() {
    for (float* arena : step_.arenas) operator delete(arena, LINE);
}

void Tape::record(const char* name, Arena arena, Op op, std::span<const uint8_t> reads) {
    ops[static_cast<int>(arena)].push_back({name, std::move(op), reads});
}

// The weights that are read next after an op: in its arena, in the other, in the next step.
std::span<const uint8_t> Tape::read_after(int which, size_t op) const {
    for (size_t i = op + 1; i < ops[which].size(); i++)
        if (!ops[which][i].reads.empty()) return ops[which][i].reads;
    for (const Recorded& recorded : ops[1 - which])
        if (!recorded.reads.empty()) return recorded.reads;
    return {};
}

void Tape::run(const Batch& batch, const int32_t* ids, const int32_t* picks, int64_t picked) {
    step_.batch = batch;
    step_.ids = ids;
    step_.rows[0] = batch.tokens;
    if (batch.tokens) replay(Arena::tokens);
    pick(picks, picked);
}

void Tape::pick(const int32_t* picks, int64_t picked) {
    step_.picks = picks;
    step_.rows[1] = picked;
    if (picked) replay(Arena::picks);
}

void Tape::replay(Arena arena) {
    const int which = static_cast<int>(arena);
    if (const size_t wanted = floats_[which] * step_.rows[which]; wanted > room_[which]) {
        operator delete(step_.arenas[which], LINE);
        step_.arenas[which] = nullptr;
        room_[which] = 0;
        step_.arenas[which] = static_cast<float*>(operator new(wanted * sizeof(float), LINE));
        room_[which] = wanted;
    }
    for (size_t i = 0; i < ops[which].size(); i++) {
        Recorded& recorded = ops[which][i];
        if (!recorded.reads.empty()) pool_.ahead(read_after(which, i));
        const int64_t begun = timed ? now() : 0;
        recorded.op(step_);
        if (timed) recorded.spent += now() - begun;
    }
}

}  // namespace headrace
