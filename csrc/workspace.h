// Memory that kernels need for a while and keep between steps.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

static inline int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Memory that grows and is never zeroed.
template <class T> class Scratch {
public:
    T *get(int64_t count) {
        if (count > size_) {
            memory_.reset((T *)std::aligned_alloc(64, align64(count * (int64_t)sizeof(T))));
            size_ = count;
        }
        return memory_.get();
    }
    int64_t bytes() const { return size_ * (int64_t)sizeof(T); }

private:
    struct Free {
        void operator()(T *p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> memory_;
    int64_t size_ = 0;
};

struct Workspace {  // of one thread
    std::vector<uint8_t> unpacked;
    Scratch<float> tile, values, scores;
};
