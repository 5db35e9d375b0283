// The threads that compute. A job is a number of independent units; every thread, the caller's included, takes the next unit until
// none is left. Units are small, so a thread that the system takes off its core delays a job by one unit and not by a barrier.
//
// Waiting threads spin for some microseconds, since ops follow each other closely, and then sleep in the kernel.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
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

    // Room for `floats` floats that belongs to the calling thread until it asks for the same slot (0, 1 or 2) again. Grows, never shrinks.
    static float* scratch(int slot, size_t floats);

  private:
    using Call = void (*)(const void*, int64_t);

    void start(Call call, const void* context, int64_t units);
    void work_off();
    void live();

    Call call_ = nullptr;
    const void* context_ = nullptr;
    int64_t units_ = 0;
    std::mutex turn_;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> busy_{0};        // workers inside the job
    alignas(64) std::atomic<uint32_t> round_{0};  // odd while a job is open
    std::atomic<bool> stop_{false};
    std::vector<std::thread> workers_;
};

}  // namespace headrace
