// A persistent pool: the caller is worker 0, the others spin briefly for work and then sleep on a futex.
// Work is a range of items, an equal share for each thread, taken in chunks; who has finished takes from the shares of
// the others. Which thread takes which chunk never changes a result. A counter that two cores fight over costs
// several hundred nanoseconds a time, so each share has its own. The caller waits only for workers that have begun: one that the system did not schedule in
// time finds the work closed, so a busy machine slows a step down but does not stall it.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "timeline.h"
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

class ThreadPool {
public:
    explicit ThreadPool(int num_threads) : shares_(num_threads > 1 ? num_threads : 1) {
        for (int i = 1; i < num_threads; i++) workers_.emplace_back([this, i] { work(i); });
    }
    ~ThreadPool() {
        stop_ = true;
        announce();
        for (auto &worker : workers_) worker.join();
    }
    int size() const { return (int)shares_.size(); }
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    Timeline timeline;  // off unless somebody starts it

    // fn(begin, end, thread) over 0..num_items in chunks of `chunk`; returns when all are done.
    template <class F> void run(int64_t num_items, int64_t chunk, const F &fn) {
        if (workers_.empty() || num_items <= chunk) {
            if (num_items > 0) fn(0, num_items, 0);
            return;
        }
        call_ = [](const void *f, int64_t begin, int64_t end, int thread) { (*(const F *)f)(begin, end, thread); };
        fn_ = &fn;
        chunk_ = chunk;
        const int64_t chunks = (num_items + chunk - 1) / chunk, n = size();
        for (int64_t i = 0; i < n; i++) {
            shares_[i].next.store(chunks * i / n * chunk, std::memory_order_relaxed);
            shares_[i].end = i + 1 == n ? num_items : chunks * (i + 1) / n * chunk;
        }
        open_.store(true);
        announce();
        take(0);
        // Either a worker that begins now is counted here, or it sees that the work is closed.
        open_.store(false);
        const int64_t waits = timeline.on() ? Timeline::now() : 0;
        for (int spin = 0; active_.load() > 0; spin++) spin < kSpins ? pause() : std::this_thread::yield();
        if (timeline.on()) timeline.add(0, RL_EVENT_WAIT, waits);
    }

private:
    static constexpr int kSpins = 20000;  // about 0.3 ms

    void announce() {
        epoch_.fetch_add(1);
#if defined(__linux__)
        if (sleepers_.load() > 0) syscall(SYS_futex, &epoch_, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#endif
    }
    bool take(int thread) {  // whether there was anything left to do
        bool any = false;
        for (int i = 0, n = size(); i < n; i++) {
            Share &share = shares_[(thread + i) % n];
            for (;;) {
                if (share.next.load(std::memory_order_relaxed) >= share.end) break;
                const int64_t begin = share.next.fetch_add(chunk_, std::memory_order_relaxed);
                if (begin >= share.end) break;
                call_(fn_, begin, begin + chunk_ < share.end ? begin + chunk_ : share.end, thread);
                any = true;
            }
        }
        return any;
    }
    void take_timed(int thread) {
        const int64_t begin = Timeline::now();
        if (take(thread)) timeline.add(thread, RL_EVENT_BUSY, begin);
    }
    void work(int thread) {
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
            if (open_.load()) timeline.on() ? take_timed(thread) : (void)take(thread);
            active_.fetch_sub(1);
        }
    }

    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    std::vector<Share> shares_;
    std::vector<std::thread> workers_;
    alignas(64) std::atomic<int32_t> epoch_{0};
    alignas(64) std::atomic<int> active_{0};
    std::atomic<bool> open_{false};
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    void (*call_)(const void *, int64_t, int64_t, int) = nullptr;
    const void *fn_ = nullptr;
    int64_t chunk_ = 1;
};
