// A model's ops, recorded once and replayed in one call a step.
//
// A value of the model is a place: so many floats a row in one of two arenas, that of the step's tokens or that of the rows that were
// picked from them. How many rows there are differs from step to step, so a place is counted in floats a row, and values lie as close
// together in a step of one row as in one of hundreds.
//
//     tokens  ids ─▶ embed ─▶ … ─▶ hidden       [ value: rows × width ][ value ][ value ] …
//                                    │ pick
//     picks                          └▶ … ─▶ logits
//
// Who records decides which values share a place (`kernels/cpu/recorder.py`). Nothing is allocated in a step that is no larger than one before.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "ops.h"

namespace headrace {

enum class Arena : int { tokens = 0, picks = 1 };

struct Place {
    Arena arena;
    int64_t start;  // floats a row before it; a multiple of ALIGN
};

class Tape {
  public:
    static constexpr int64_t ALIGN = 16;  // floats: a cache line

    Tape(Pool& pool, const Ops& ops) : pool_(pool), ops_(ops) {}
    ~Tape();
    Tape(const Tape&) = delete;

    // What one recorded op sees of the step.
    struct Step {
        Pool& pool;
        const Ops& ops;
        Batch batch;
        const int32_t* ids;
        const int32_t* picks;
        int64_t rows[2];
        float* arenas[2];

        float* at(Place place) const { return arenas[static_cast<int>(place.arena)] + place.start * rows_of(place); }
        // A value of quantized rows: as many floats as hold their bytes.
        uint8_t* codes_at(Place place) const { return reinterpret_cast<uint8_t*>(at(place)); }
        int64_t rows_of(Place place) const { return rows[static_cast<int>(place.arena)]; }
    };

    using Op = std::function<void(const Step&)>;

    // Ops run in the order in which they were recorded; those that write to the arena of picks run when rows are picked.
    // `reads` are the weights of an op that streams them.
    void record(const char* name, Arena arena, Op op, std::span<const uint8_t> reads = {});
    // An arena's values take so many floats a row together.
    void reserve(Arena arena, int64_t floats) { floats_[static_cast<int>(arena)] = floats; }

    // One step: the tokens' ops, and the picks' where there are any. The caller has checked every index.
    void run(const Batch& batch, const int32_t* ids, const int32_t* picks, int64_t picked);
    // The picks' ops once more, for other rows of the same step.
    void pick(const int32_t* picks, int64_t picked);

    int64_t tokens() const { return step_.rows[0]; }
    // Where a value of the last step stands.
    float* at(Place place) const { return step_.at(place); }
    int64_t rows_of(Place place) const { return step_.rows_of(place); }

    struct Recorded {
        std::string name;
        Op op;
        std::span<const uint8_t> reads;
        int64_t spent = 0;  // nanoseconds in all runs while `timed`
    };
    std::vector<Recorded> ops[2];
    bool timed = false;

  private:
    void replay(Arena arena);
    std::span<const uint8_t> read_after(int which, size_t op) const;

    Pool& pool_;
    const Ops& ops_;
    int64_t floats_[2] = {0, 0};
    size_t room_[2] = {0, 0};
    Step step_{pool_, ops_, {}, nullptr, nullptr, {0, 0}, {nullptr, nullptr}};
};

}  // namespace headrace
