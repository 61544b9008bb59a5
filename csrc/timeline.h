// When each thread was busy, and for which instruction. Every thread writes to a list of its own that was allocated
// before, so recording takes no lock; while it is off nothing is written and no clock is read. Times are nanoseconds of
// the steady clock, which on Linux is the one of Python's time.perf_counter_ns.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "ridgeline.h"

class Timeline {
public:
    int32_t instruction = -1;  // what runs now; -1: work between steps

    bool on() const { return capacity_ > 0; }
    static int64_t now() {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count();
    }

    // Between steps. Room for `capacity` events of each thread; 0 switches recording off.
    void start(int num_threads, int64_t capacity) {
        capacity_ = capacity;
        threads_.assign(num_threads, {});
        for (List &list : threads_) list.events.resize(capacity);
    }

    void add(int thread, rl_event_kind kind, int64_t begin) {
        List &list = threads_[thread];
        if (list.count < capacity_) list.events[list.count] = {begin, now(), instruction, (int16_t)thread, (int16_t)kind};
        list.count++;
    }

    // Copies all events, thread by thread in the order of their ends, and forgets them. Returns how many, or -1 if a
    // thread had no room for all of its own.
    int64_t take(rl_event *out) {
        int64_t total = 0;
        bool fits = true;
        for (List &list : threads_) {
            fits &= list.count <= capacity_;
            total += std::min(list.count, capacity_);
            out = std::copy_n(list.events.begin(), std::min(list.count, capacity_), out);
            list.count = 0;
        }
        return fits ? total : -1;
    }

private:
    struct alignas(64) List {
        std::vector<rl_event> events;
        int64_t count = 0;
    };
    int64_t capacity_ = 0;
    std::vector<List> threads_;
};
