// What this processor can do at best, measured with the same vectors and the same pool as the kernels: reading
// memory of a given size, float and integer multiply-adds from registers, and starting and joining the threads.
// profiling/machine.py turns the seconds into GB/s and operations a second.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "ridgeline.h"
#include "simd.h"
#include "thread_pool.h"
#include "workspace.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {
constexpr int kStreams = 4;                    // running sums of the reader
constexpr int64_t kReadStep = kStreams * 64;   // bytes
constexpr int kOrders = 8;                     // multiply-adds a round of the integer loops, on each sum

volatile float sink;  // results end here, so that nothing is optimised away

void read_bytes(const uint8_t *p, int64_t bytes) {
    codes seen[kStreams];
    for (int i = 0; i < kStreams; i++) seen[i] = load_codes(p + 64 * i);
    for (int64_t at = 0; at + kReadStep <= bytes; at += kReadStep)
#pragma GCC unroll 8
        for (int i = 0; i < kStreams; i++) seen[i] = codes_or(seen[i], load_codes(p + at + 64 * i));
    alignas(64) uint8_t out[64];
    for (int i = 1; i < kStreams; i++) seen[0] = codes_or(seen[0], seen[i]);
    store_codes(out, seen[0]);
    sink = out[0];
}

int64_t float_rounds(int64_t rounds) {  // multiply-adds done
    constexpr int count = kFloatTile;
    alignas(64) float starts[count * kLanes];  // all different, so that every sum must be formed
    for (int i = 0; i < count * kLanes; i++) starts[i] = 0.01f * (float)i;
    vf sums[count];
    for (int i = 0; i < count; i++) sums[i] = load(starts + i * kLanes);
    const vf x = splat(0.9999f), y = splat(1e-6f);
    for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 16
        for (int i = 0; i < count; i++) sums[i] = fma(sums[i], x, y);
    for (int i = 1; i < count; i++) sums[0] = add(sums[0], sums[i]);
    sink = sum(sums[0]);
    return rounds * count * kLanes;
}

int64_t int8_rounds(int64_t rounds) {
    alignas(64) uint8_t bytes[64];
    alignas(64) int8_t x[4 * kOrders + kIntTile];
    std::memset(bytes, 3, sizeof bytes);
    std::memset(x, -2, sizeof x);
    x[kIntTile] = 1;
    idot sums[kIntTile];
    for (auto &s : sums) s = dot_zero();
    const codes c = load_codes(bytes);
    for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 8
        for (int step = 0; step < kOrders; step++)
#pragma GCC unroll 16
            for (int i = 0; i < kIntTile; i++) sums[i] = dot_step(sums[i], c, x + 4 * step + i);
    vf total = zero();
    for (auto &s : sums) total = add(total, dot_finish(s));
    sink = sum(total);
    return rounds * kOrders * kIntTile * kLanes * 4;
}

int64_t int16_rounds(int64_t rounds) {
    alignas(64) int8_t bytes[64];
    alignas(64) int16_t x[4 + kWideTile];
    std::memset(bytes, 3, sizeof bytes);
    for (int i = 0; i < 4 + kWideTile; i++) x[i] = (int16_t)(i - 2);
    wide_dot sums[kWideTile];
    const int16_t *four[kWideTile];
    for (int i = 0; i < kWideTile; i++) sums[i] = wide_zero(), four[i] = x + i;
    for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 8
        for (int step = 0; step < kOrders; step++) wide_step<kWideTile>(sums, bytes, four);
    vf total = zero();
    for (auto &s : sums) total = add(total, wide_finish(s));
    sink = sum(total);
    return rounds * kOrders * kWideTile * kLanes * 4;
}

void use_huge_pages(uint8_t *p, int64_t bytes) {  // as the packed weights are kept
#if defined(__linux__)
    const int64_t page = 4096, begin = ((int64_t)p + page - 1) / page * page;
    if ((int64_t)p + bytes > begin) madvise((void *)begin, (int64_t)p + bytes - begin, MADV_HUGEPAGE);
#endif
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Seconds of each of `repeats` calls of fn(thread), one on every thread.
template <class F> void time_on_all(ThreadPool &pool, int32_t repeats, double *seconds, const F &fn) {
    for (int32_t r = 0; r < repeats; r++) {
        const double started = now();
        pool.run(pool.size(), 1, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; i++) fn(i);
        });
        seconds[r] = now() - started;
    }
}
}  // namespace

extern "C" {
void rl_limit_read(int32_t num_threads, int64_t bytes, int32_t passes, int32_t repeats, double *seconds) {
    ThreadPool pool(num_threads);
    const int64_t share = std::max<int64_t>(bytes / pool.size() / kReadStep, 1) * kReadStep;
    Scratch<uint8_t> memory;
    uint8_t *p = memory.get(share * pool.size());
    use_huge_pages(p, share * pool.size());
    double ignored;
    time_on_all(pool, 1, &ignored, [&](int64_t i) { std::memset(p + i * share, 1, share); });
    time_on_all(pool, 1, &ignored, [&](int64_t i) { read_bytes(p + i * share, share); });
    time_on_all(pool, repeats, seconds, [&](int64_t i) {
        for (int32_t pass = 0; pass < passes; pass++) read_bytes(p + i * share, share);
    });
}

int64_t rl_limit_compute(int32_t kind, int32_t num_threads, int64_t rounds, int32_t repeats, double *seconds) {
    ThreadPool pool(num_threads);
    const auto run = [&](int64_t n) { return kind == 0 ? float_rounds(n) : kind == 1 ? int8_rounds(n) : int16_rounds(n); };
    double ignored;
    time_on_all(pool, 1, &ignored, [&](int64_t) { run(rounds / 4 + 1); });
    time_on_all(pool, repeats, seconds, [&](int64_t) { run(rounds); });
    return run(1) * rounds * pool.size();
}

void rl_limit_barrier(int32_t num_threads, int32_t rounds, int32_t repeats, double *seconds) {
    ThreadPool pool(num_threads);
    std::atomic<int64_t> arrived{0};
    int64_t expected = 0;
    for (int32_t r = 0; r < repeats; r++) {
        const double started = now();
        for (int32_t i = 0; i < rounds; i++) {
            expected += pool.size();
            pool.run(pool.size(), 1, [&](int64_t, int64_t, int) {  // nobody does another's part: all must have come
                for (arrived.fetch_add(1); arrived.load() < expected;) ThreadPool::pause();
            });
        }
        seconds[r] = (now() - started) / rounds;
    }
}
}
