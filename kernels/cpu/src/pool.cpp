#include "pool.h"

#include <chrono>
#include <new>

namespace headrace {
namespace {

constexpr auto SPIN = std::chrono::microseconds(100);
constexpr int PATIENCE = 2000;  // pauses before the caller lets another thread have its core

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

struct Room {
    static constexpr std::align_val_t LINE{64};
    float* floats = nullptr;
    size_t size = 0;

    ~Room() { operator delete(floats, LINE); }

    float* of(size_t wanted) {
        if (wanted > size) {
            operator delete(floats, LINE);
            floats = nullptr;
            size = 0;
            floats = static_cast<float*>(operator new(wanted * sizeof(float), LINE));
            size = wanted;
        }
        return floats;
    }
};

}  // namespace

float* Pool::scratch(int slot, size_t floats) {
    thread_local Room rooms[3];
    return rooms[slot].of(floats);
}

Pool::Pool(int threads) {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this] { live(); });
}

Pool::~Pool() {
    stop_ = true;
    round_ += 2;
    round_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::work_off() {
    for (int64_t unit; (unit = next_.fetch_add(1)) < units_;) call_(context_, unit);
}

void Pool::start(Call call, const void* context, int64_t units) {
    std::lock_guard turn(turn_);
    call_ = call;
    context_ = context;
    units_ = units;
    next_ = 0;
    round_ += 1;  // open: whoever counts itself busy from now on sees the job above
    round_.notify_all();
    work_off();
    round_ += 1;  // closed: a worker that comes now leaves again without looking at the job
    // A worker may have lost its core within its last unit: then spinning here would only keep it away.
    for (int waited = 0; busy_ != 0; waited++) waited < PATIENCE ? pause() : std::this_thread::yield();
}

void Pool::live() {
    uint32_t seen = 0;
    while (!stop_) {
        uint32_t round = round_;
        if (round == seen || !(round & 1)) {
            auto until = std::chrono::steady_clock::now() + SPIN;
            while ((round = round_) == seen || !(round & 1)) {
                if (stop_) return;
                pause();
                if (std::chrono::steady_clock::now() > until) {
                    round_.wait(round);
                    until = std::chrono::steady_clock::now() + SPIN;
                }
            }
        }
        seen = round;
        busy_ += 1;
        if (round_ == round) work_off();
        busy_ -= 1;
    }
}

}  // namespace headrace
