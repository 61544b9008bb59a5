// What sampling needs of logits: the largest, the sum of the exponentials, the k largest.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "thread_pool.h"

// Fixed chunks of columns, merged in order: the same sum whatever the number of threads.
// See rl_greedy.
inline void greedy(ThreadPool &pool, const float *logits, int64_t rows, int64_t columns, int32_t *best, float *most,
                   double *log_total) {
    constexpr int64_t chunk = 4096, block = 512;
    const int64_t chunks = (columns + chunk - 1) / chunk;
    struct Part {
        float most;
        int32_t best;
        double total;
    };
    std::vector<Part> parts(rows * chunks);
    pool.run(rows * chunks, std::max<int64_t>(1, chunks / (2 * pool.size())), [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t start = i % chunks * chunk, n = std::min(chunk, columns - start);
            const float *x = logits + i / chunks * columns + start;
            float here = -INFINITY;
            int64_t near = 0;  // where the largest is: the search for its place begins there
            for (int64_t j = 0; j < n; j += block) {
                const int64_t stop = std::min(n, j + block);
                vf peaks[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
                int64_t c = j;
                for (; c + 4 * kLanes <= stop; c += 4 * kLanes)
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) peaks[i] = max(peaks[i], load(x + c + i * kLanes));
                float most_here = largest(max(max(peaks[0], peaks[1]), max(peaks[2], peaks[3])));
                for (; c < stop; c++) most_here = x[c] > most_here ? x[c] : most_here;
                if (most_here > here) here = most_here, near = j;
            }
            Part &part = parts[i];
            part = {here, -1, 0.0};
            for (int64_t j = near; j < n && part.best < 0; j++)
                if (x[j] == here) part.best = (int32_t)(start + j);
            if (here == -INFINITY) continue;
            for (int64_t j = 0; j < n; j += block) {  // float sums of a block, then double
                vf total = zero(), raw = zero();  // a NaN would vanish in max and exp, but not in a plain sum
                const int64_t stop = std::min(n, j + block);
                int64_t c = j;
                for (; c + kLanes <= stop; c += kLanes) {
                    raw = add(raw, load(x + c));
                    total = add(total, exp_nonpositive(sub(load(x + c), splat(here))));
                }
                double rest = sum(total);
                for (; c < stop; c++) rest += std::exp((double)x[c] - here);
                part.total += std::isnan(sum(raw)) ? NAN : rest;
            }
        }
    });
    for (int64_t r = 0; r < rows; r++) {
        Part whole = parts[r * chunks];
        for (int64_t c = 1; c < chunks; c++)
            if (parts[r * chunks + c].most > whole.most) {
                whole.most = parts[r * chunks + c].most;
                whole.best = parts[r * chunks + c].best;
            }
        double total = 0;
        for (int64_t c = 0; c < chunks; c++)
            total += parts[r * chunks + c].total * std::exp((double)parts[r * chunks + c].most - whole.most);
        bool finite = std::isfinite(total);
        for (int64_t c = 0; c < chunks; c++) finite &= parts[r * chunks + c].best >= 0;  // -1: a chunk of NaN
        best[r] = finite ? whole.best : -1;
        most[r] = whole.most;
        log_total[r] = whole.most + std::log(total);
    }
}

// See rl_top_k.
inline int32_t top_k(const float *logits, int32_t columns, int32_t count, int32_t *ids, float *values) {
    count = std::min(count, columns);
    if (count <= 0) return 0;
    // A heap of the best so far, the worst of them on top; most logits lose against it at once, sixteen at a time.
    const auto better = [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    for (int32_t i = 0; i < count; i++) ids[i] = i;
    std::make_heap(ids, ids + count, better);
    const auto offer = [&](int32_t i) {
        if (!better(i, ids[0])) return;
        std::pop_heap(ids, ids + count, better);
        ids[count - 1] = i;
        std::push_heap(ids, ids + count, better);
    };
    int32_t i = count;
    for (; i + kLanes <= columns; i += kLanes) {
        if (largest(load(logits + i)) <= logits[ids[0]]) continue;
        for (int32_t j = i; j < i + kLanes; j++) offer(j);
    }
    for (; i < columns; i++) offer(i);
    std::sort_heap(ids, ids + count, better);
    for (int32_t j = 0; j < count; j++) values[j] = logits[ids[j]];
    return count;
}
