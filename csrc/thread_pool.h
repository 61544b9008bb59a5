// A persistent pool: the caller is worker 0, the others spin briefly for work and then sleep on a futex.
// Work is a range of items, handed out in chunks by an atomic counter; which thread takes which chunk never
// changes a result. The caller waits only for workers that have begun: one that the system did not schedule in
// time finds the work closed, so a busy machine slows a step down but does not stall it.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

class ThreadPool {
public:
    explicit ThreadPool(int num_threads) {
        for (int i = 1; i < num_threads; i++) workers_.emplace_back([this] { work(); });
    }
    ~ThreadPool() {
        stop_ = true;
        announce();
        for (auto &worker : workers_) worker.join();
    }
    int size() const { return (int)workers_.size() + 1; }

    // fn(begin, end) over 0..num_items in chunks of `chunk`; returns when all are done.
    template <class F> void run(int64_t num_items, int64_t chunk, const F &fn) {
        if (workers_.empty() || num_items <= chunk) {
            if (num_items > 0) fn(0, num_items);
            return;
        }
        call_ = [](const void *f, int64_t begin, int64_t end) { (*(const F *)f)(begin, end); };
        fn_ = &fn;
        num_items_ = num_items;
        chunk_ = chunk;
        next_.store(0, std::memory_order_relaxed);
        open_.store(true);
        announce();
        take();
        // Either a worker that begins now is counted here, or it sees that the work is closed.
        open_.store(false);
        for (int spin = 0; active_.load() > 0; spin++) spin < kSpins ? pause() : std::this_thread::yield();
    }

private:
    static constexpr int kSpins = 20000;  // about 0.3 ms

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    void announce() {
        epoch_.fetch_add(1);
#if defined(__linux__)
        if (sleepers_.load() > 0) syscall(SYS_futex, &epoch_, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#endif
    }
    void take() {
        for (;;) {
            int64_t begin = next_.fetch_add(chunk_, std::memory_order_relaxed);
            if (begin >= num_items_) return;
            int64_t end = begin + chunk_ < num_items_ ? begin + chunk_ : num_items_;
            call_(fn_, begin, end);
        }
    }
    void work() {
        int32_t seen = 0;
        for (;;) {
            for (int spin = 0; epoch_.load(std::memory_order_acquire) == seen; spin++) {
                if (spin < kSpins) {
                    pause();
                } else {
#if defined(__linux__)
                    sleepers_.fetch_add(1);
                    syscall(SYS_futex, &epoch_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
                    sleepers_.fetch_sub(1);
#else
                    std::this_thread::yield();
#endif
                }
            }
            seen = epoch_.load();
            if (stop_) return;
            active_.fetch_add(1);
            if (open_.load()) take();
            active_.fetch_sub(1);
        }
    }

    std::vector<std::thread> workers_;
    alignas(64) std::atomic<int32_t> epoch_{0};
    alignas(64) std::atomic<int> active_{0};
    std::atomic<bool> open_{false};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    void (*call_)(const void *, int64_t, int64_t) = nullptr;
    const void *fn_ = nullptr;
    int64_t num_items_ = 0, chunk_ = 1;
};
