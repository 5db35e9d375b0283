#include "pool.h"

#include <algorithm>
#include <chrono>
#include <new>

namespace headrace {
namespace {

constexpr auto SPIN = std::chrono::microseconds(100);
constexpr int PATIENCE = 2000;             // waits before the caller lets another thread have its core
constexpr int64_t KEPT = 384 << 10;        // bytes that a thread asks for ahead: they stay in its second-level cache
constexpr int64_t ASKED = 8 * 64;          // bytes asked for at once

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
    thread_local Room rooms[5];
    return rooms[slot].of(floats);
}

Pool::Pool(int threads) : shares_(threads) {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { live(i); });
}

Pool::~Pool() {
    stop_ = true;
    round_ += 2;
    round_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::ahead(std::span<const uint8_t> bytes) {
    ahead_bytes_.store(static_cast<int64_t>(bytes.size()), std::memory_order_relaxed);
    ahead_.store(bytes.data(), std::memory_order_relaxed);
}

void Pool::work_off(int thread) {
    const int threads = static_cast<int>(shares_.size());
    for (int i = 0; i < threads; i++) {
        Share& share = shares_[(thread + i) % threads];
        for (int64_t unit; (unit = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) call_(context_, unit);
    }
}

void Pool::start(Call call, const void* context, int64_t units) {
    std::lock_guard turn(turn_);
    call_ = call;
    context_ = context;
    const auto threads = static_cast<int64_t>(shares_.size());
    for (int64_t i = 0; i < threads; i++) {
        shares_[i].next.store(units * i / threads, std::memory_order_relaxed);
        shares_[i].end = units * (i + 1) / threads;
    }
    round_ += 1;  // open: whoever counts itself busy from now on sees the job above
    round_.notify_all();
    work_off(0);
    round_ += 1;  // closed: a worker that comes now leaves again without looking at the job
    // A worker may have lost its core within its last unit: then spinning here would only keep it away.
    for (int waited = 0; busy_ != 0; waited++) waited < PATIENCE ? wait(0, asked_) : std::this_thread::yield();
}

// A moment, with something to do in it: an address that is not there does no harm.
void Pool::wait(int thread, Asked& asked) {
    if (const uint8_t* bytes = ahead_.load(std::memory_order_relaxed); bytes != asked.of) {
        const int64_t size = ahead_bytes_.load(std::memory_order_relaxed), threads = static_cast<int64_t>(shares_.size());
        asked = {bytes, bytes + size * thread / threads, bytes + size * (thread + 1) / threads};
        asked.end = std::min(asked.end, asked.at + KEPT);
    }
    if (asked.at >= asked.end) return pause();
    for (const uint8_t* stop = std::min(asked.end, asked.at + ASKED); asked.at < stop; asked.at += 64) __builtin_prefetch(asked.at, 0, 2);
}

void Pool::live(int thread) {
    uint32_t seen = 0;
    Asked asked;
    while (!stop_) {
        uint32_t round = round_;
        if (round == seen || !(round & 1)) {
            auto until = std::chrono::steady_clock::now() + SPIN;
            while ((round = round_) == seen || !(round & 1)) {
                if (stop_) return;
                wait(thread, asked);
                if (std::chrono::steady_clock::now() > until) {
                    round_.wait(round);
                    until = std::chrono::steady_clock::now() + SPIN;
                }
            }
        }
        seen = round;
        busy_ += 1;
        if (round_ == round) work_off(thread);
        busy_ -= 1;
    }
}

}  // namespace headrace
