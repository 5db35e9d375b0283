// The threads that compute. A job is a number of independent units, of which every thread, the caller's included, has a share. Who is
// through with its own takes from the others' until none is left. Units are small, so a thread that the system takes off its core delays
// a job by one unit and not by a barrier.
//
// Waiting threads spin for some microseconds, since ops follow each other closely, and then sleep in the kernel. While they spin they
// ask the memory for what their share of the next job will read, where the caller has said what that is.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace headrace {

class Pool {
  public:
    // `threads` counts the caller's.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Calls work(unit) once for every unit in [0, units), from any thread, and returns when all are done. Callers take turns.
    template <class Work>
    void run(int64_t units, const Work& work) {
        if (units <= 1 || workers_.empty()) {
            for (int64_t unit = 0; unit < units; unit++) work(unit);
            return;
        }
        start([](const void* context, int64_t unit) { (*static_cast<const Work*>(context))(unit); }, &work, units);
    }

    // What a job to come reads, its first units the first bytes: only a hint.
    void ahead(std::span<const uint8_t> bytes);

    // Room for `floats` floats that belongs to the calling thread until it asks for the same slot (0 to 4) again. Grows, never shrinks.
    static float* scratch(int slot, size_t floats);

  private:
    using Call = void (*)(const void*, int64_t);

    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    // How far a waiting thread has asked for what comes next.
    struct Asked {
        const uint8_t* of = nullptr;
        const uint8_t* at = nullptr;
        const uint8_t* end = nullptr;
    };

    void start(Call call, const void* context, int64_t units);
    void work_off(int thread);
    void live(int thread);
    void wait(int thread, Asked& asked);

    Call call_ = nullptr;
    const void* context_ = nullptr;
    std::vector<Share> shares_;  // of each thread, the caller's first
    Asked asked_;                // by the caller
    std::mutex turn_;
    std::atomic<const uint8_t*> ahead_{nullptr};
    std::atomic<int64_t> ahead_bytes_{0};
    alignas(64) std::atomic<int> busy_{0};        // workers inside the job
    alignas(64) std::atomic<uint32_t> round_{0};  // odd while a job is open
    std::atomic<bool> stop_{false};
    std::vector<std::thread> workers_;
};

}  // namespace headrace
