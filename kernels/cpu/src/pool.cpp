#include "pool.h"

#include <chrono>

namespace headrace {
namespace {

constexpr auto SPIN = std::chrono::microseconds(100);

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

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
    for (int unit; (unit = next_.fetch_add(1)) < units_;) call_(context_, unit);
}

void Pool::start(Call call, const void* context, int units) {
    call_ = call;
    context_ = context;
    units_ = units;
    next_ = 0;
    round_ += 1;  // open: whoever counts itself busy from now on sees the job above
    round_.notify_all();
    work_off();
    round_ += 1;  // closed: a worker that comes now leaves again without looking at the job
    while (busy_ != 0) pause();
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
