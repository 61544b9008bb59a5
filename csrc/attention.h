// Attention over paged KV: all query heads of a KV head share each load of its tiles.
//
// flash (Dao 2022, arXiv:2205.14135): online softmax over tiles of 32 tokens. Keys are reduced in partitions of 256
// positions whose results are merged in ascending order, so that it does not matter which thread took which, nor which
// other rows were computed beside. naive: all scores of a head in memory, then softmax, then the values.
#pragma once
#include <cfloat>
#include <vector>

#include "ridgeline.h"
#include "simd.h"

constexpr int kTile = 32;  // tokens
constexpr int kPartition = 256;

// Where the tiles of one layer and KV head lie.
struct kv_pages {
    const rl_cache &cache;

    static int64_t element_bytes(const rl_cache &c) { return c.dtype == RL_KV_F32 ? 4 : c.dtype == RL_KV_F16 ? 2 : 1; }
    int64_t tile_bytes() const {
        return kTile * cache.head_dim * element_bytes(cache) + (cache.dtype == RL_KV_I8 ? 4 * kTile : 0);
    }
    // which: 0 K, 1 V
    uint8_t *tile(int64_t layer, int64_t slot, int which, int64_t kv_head) const {
        const int64_t tiles = cache.block_size / kTile;
        // Each layer begins at another block: or all come to a new huge page in the same step, which waits for the system.
        const int64_t block = (slot / cache.block_size + layer) % cache.num_blocks;
        const int64_t head = ((layer * cache.num_blocks + block) * 2 + which) * cache.num_kv_heads + kv_head;
        return (uint8_t *)cache.pages + (head * tiles + slot % cache.block_size / kTile) * tile_bytes();
    }
    // One token's K and V of one head: element d of lane `slot % 32`.
    void put(uint8_t *tile, int64_t first, int64_t stride, int64_t lane, const float *x) const {
        const int64_t n = cache.head_dim;
        if (cache.dtype == RL_KV_F32) {
            for (int64_t d = 0; d < n; d++) ((float *)tile)[first + d * stride] = x[d];
        } else if (cache.dtype == RL_KV_F16) {
            alignas(64) uint16_t halves[kLanes];
            for (int64_t d = 0; d < n; d += kLanes) {
                store(halves, load_n(x + d, n - d));
                for (int64_t i = 0; i < kLanes && d + i < n; i++) ((uint16_t *)tile)[first + (d + i) * stride] = halves[i];
            }
        } else {
            vf most = zero();
            for (int64_t d = 0; d < n; d += kLanes) most = max(most, magnitude(load_n(x + d, n - d)));
            const float amax = largest(most), inverse = amax > 127.0f / FLT_MAX ? 127.0f / amax : 0.0f;
            ((float *)(tile + kTile * n))[lane] = amax / 127.0f;
            alignas(64) int8_t bytes[kLanes];
            for (int64_t d = 0; d < n; d += kLanes) {
                store_rounded(bytes, mul(load_n(x + d, n - d), splat(inverse)));
                for (int64_t i = 0; i < kLanes && d + i < n; i++) ((int8_t *)tile)[first + (d + i) * stride] = bytes[i];
            }
        }
    }
    void put_k(uint8_t *tile, int64_t lane, const float *k) const { put(tile, lane, kTile, lane, k); }
    void put_v(uint8_t *tile, int64_t lane, const float *v) const { put(tile, lane * cache.head_dim, 1, lane, v); }

    // A tile as floats: float tiles in place, others converted into scratch.
    const float *floats(const uint8_t *tile, bool is_k, float *scratch) const {
        const int64_t n = cache.head_dim;
        if (cache.dtype == RL_KV_F32) return (const float *)tile;
        if (cache.dtype == RL_KV_F16) {
            for (int64_t i = 0; i < kTile * n; i += kLanes) store(scratch + i, load((const uint16_t *)tile + i));
            return scratch;
        }
        const float *scales = (const float *)(tile + kTile * n);
        const int8_t *q = (const int8_t *)tile;
        if (is_k) {
            const vf low = load(scales), high = load(scales + kLanes);
            for (int64_t d = 0; d < n; d++) {
                store(scratch + d * kTile, mul(load(q + d * kTile), low));
                store(scratch + d * kTile + kLanes, mul(load(q + d * kTile + kLanes), high));
            }
        } else {
            for (int64_t j = 0; j < kTile; j++)
                for (int64_t d = 0; d < n; d++) scratch[j * n + d] = (float)q[j * n + d] * scales[j];
        }
        return scratch;
    }
};

// What is read next: tiles lie anywhere, where no processor looks by itself. One of its lines is asked for with every
// feature or key of the tile at hand.
struct next_tile {
    const uint8_t *address;  // nullptr: none
    int64_t bytes;
    void prefetch(int64_t i, int64_t count) const {
        if (address) __builtin_prefetch(address + i * (bytes / count), 0, 3);
    }
};

// scores[r][32] = scale * q[r] · k for R rows; k [head_dim][32]. Few rows take all keys at once, to have enough sums
// in flight, many take sixteen at a time.
template <int R, class T>
static inline void score_rows(const float *const *q, const T *k, int64_t head_dim, float scale, float *scores,
                              next_tile next) {
    constexpr int vectors = 2 * R <= kScoreRows ? 2 : 1;
    for (int first = 0; first < kTile; first += vectors * kLanes) {
        vf sums[R][vectors];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            for (int v = 0; v < vectors; v++) sums[r][v] = zero();
        for (int64_t d = 0; d < head_dim; d++) {
            if (first == 0) next.prefetch(d, head_dim);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                const vf keys = load(k + d * kTile + first + v * kLanes);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) sums[r][v] = fma(splat(q[r][d]), keys, sums[r][v]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            for (int v = 0; v < vectors; v++)
                store(scores + r * kTile + first + v * kLanes, mul(sums[r][v], splat(scale)));
    }
}

// out[r] += sum over keys begin..end of weights[r][key] * v[key], for R rows and some features; v [32][head_dim].
template <int R, int Vectors, class T>
static inline void weigh_features(const float *weights, const T *v, int64_t head_dim, int begin, int end, int64_t d,
                                  float *const *out, next_tile next) {
    vf sums[R][Vectors];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int i = 0; i < Vectors; i++) sums[r][i] = load(out[r] + d + i * kLanes);
    for (int key = begin; key < end; key++) {
        if (d < 2 * kLanes) next.prefetch(key + (d > 0 ? kTile : 0), 2 * kTile);
#pragma GCC unroll 2
        for (int i = 0; i < Vectors; i++) {
            const vf values = load(v + key * head_dim + d + i * kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) sums[r][i] = fma(splat(weights[r * kTile + key]), values, sums[r][i]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        for (int i = 0; i < Vectors; i++) store(out[r] + d + i * kLanes, sums[r][i]);
}
template <int R, class T>
static inline void weigh_rows(const float *weights, const T *v, int64_t head_dim, int begin, int end, float *const *out,
                              next_tile next) {
    int64_t d = 0;
    if constexpr (2 * R <= kScoreRows)
        for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes)
            weigh_features<R, 2>(weights, v, head_dim, begin, end, d, out, next);
    for (; d + kLanes <= head_dim; d += kLanes) weigh_features<R, 1>(weights, v, head_dim, begin, end, d, out, next);
    for (; d < head_dim; d++)
        for (int r = 0; r < R; r++) {
            float total = out[r][d];
            for (int key = begin; key < end; key++) total += weights[r * kTile + key] * first_float(v + key * head_dim + d);
            out[r][d] = total;
        }
}

// A query row's state: largest score, sum of exp(score - largest), and the weighted values.
struct row_state {
    float most, total;
    float *values;
};
static inline void clear(row_state &s, int64_t head_dim) {
    s.most = -INFINITY;
    s.total = 0;
    std::memset(s.values, 0, 4 * head_dim);
}
// into = into merged with a later partition.
static inline void merge(row_state &into, const row_state &part, int64_t head_dim) {
    if (part.most == -INFINITY) return;
    const float most = into.most > part.most ? into.most : part.most;
    const float a = into.most == -INFINITY ? 0.0f : first(exp_nonpositive(splat(into.most - most)));
    const float b = first(exp_nonpositive(splat(part.most - most)));
    into.most = most;
    into.total = into.total * a + part.total * b;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        const int64_t n = head_dim - d;
        const vf old = mul(load_n(into.values + d, n), splat(a));
        store_n(into.values + d, fma(load_n(part.values + d, n), splat(b), old), n);
    }
}

// Keys that a row sees in a tile, as lanes first..last-1; the others get weight 0.
struct lanes {
    int first, last;
};

// Scores of a row -> weights, in place; the state's sums move to the new maximum.
static inline void soften(float *scores, lanes visible, row_state &state, int64_t head_dim) {
    if (visible.first >= visible.last) {
        std::memset(scores, 0, 4 * kTile);
        return;
    }
    for (int i = 0; i < visible.first; i++) scores[i] = -INFINITY;
    for (int i = visible.last; i < kTile; i++) scores[i] = -INFINITY;
    const vf low = load(scores), high = load(scores + kLanes);
    const float here = largest(max(low, high));
    if (here > state.most) {
        if (state.most != -INFINITY) {
            const float factor = first(exp_nonpositive(splat(state.most - here)));
            state.total *= factor;
            for (int64_t d = 0; d < head_dim; d += kLanes)
                store_n(state.values + d, mul(load_n(state.values + d, head_dim - d), splat(factor)), head_dim - d);
        }
        state.most = here;
    }
    const vf p = exp_nonpositive(sub(low, splat(state.most))), q = exp_nonpositive(sub(high, splat(state.most)));
    store(scores, p);
    store(scores + kLanes, q);
    state.total += sum(add(p, q));
}

// Rows of one KV head against one tile of keys.
struct tile_rows {
    int64_t count, head_dim;
    const float *const *q;
    const lanes *visible;
    row_state *states;
    float *scores;  // [count][32]
    next_tile next_k, next_v;
};
template <class T> static inline void attend_tile(const tile_rows &rows, const T *k, const T *v, float scale) {
    float *values[kScoreRows];
    for (int64_t r = 0; r < rows.count; r += kScoreRows) {
        const int64_t count = rows.count - r < kScoreRows ? rows.count - r : kScoreRows;
        int begin = kTile, end = 0;
        for (int64_t i = 0; i < count; i++) {
            const lanes l = rows.visible[r + i];
            if (l.first >= l.last) continue;
            begin = l.first < begin ? l.first : begin;
            end = l.last > end ? l.last : end;
        }
        if (begin >= end) continue;
        const next_tile none{nullptr, 0}, next_k = r == 0 ? rows.next_k : none, next_v = r == 0 ? rows.next_v : none;
        float *scores = rows.scores + r * kTile;
        with_count<kScoreRows>(count, [&](auto n) { score_rows<n>(rows.q + r, k, rows.head_dim, scale, scores, next_k); });
        for (int64_t i = 0; i < count; i++) {
            soften(scores + i * kTile, rows.visible[r + i], rows.states[r + i], rows.head_dim);
            values[i] = rows.states[r + i].values;
        }
        with_count<kScoreRows>(count,
                               [&](auto n) { weigh_rows<n>(scores, v, rows.head_dim, begin, end, values, next_v); });
    }
}
