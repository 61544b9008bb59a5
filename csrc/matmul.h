// Matrix kernels: tiles of a few tokens by sixteen rows. One token or five hundred, a tile's sums are formed by the
// same expression in the same ascending order of columns, so a row of activations always gives the same bits.
#pragma once
#include <cfloat>
#include <vector>

#include "packed.h"

constexpr int64_t kPrefetchBytes = 2048;  // ahead of the weights that are being multiplied

// 32 activations of one token for codes of up to 6 bits: x ≈ d · q. One cache line.
struct alignas(64) act_block {
    int8_t q[kBlock];
    float d;
    float sums[2], sum;                  // d times the sum of q over each half, and over all
    int32_t corrections[2], correction;  // see dot_start
};
static_assert(sizeof(act_block) == 64, "one cache line");

// The same for 8-bit codes, whose products need 32-bit sums anyway: twice the bits cost nothing there.
struct wide_act_block {
    int16_t q[kBlock];
    float d;
};

// One row's quotient of its largest magnitude by the largest integer, and what to multiply with to get there.
static inline vf quantization(vf low, vf high, float levels, float *d) {
    const float most = largest(max(magnitude(low), magnitude(high)));
    *d = most / levels;
    return splat(most > levels / FLT_MAX ? levels / most : 0.0f);  // else the quotient is infinite
}

// A row of k floats to k/32 blocks: d = max|x| / 127, q = x / d rounded to even.
static inline void quantize_row(const float *x, int64_t k, act_block *out) {
    for (int64_t b = 0; b < k / kBlock; b++, x += kBlock) {
        act_block &block = out[b];
        const vf low = load(x), high = load(x + kLanes);
        const vf inverse = quantization(low, high, 127.0f, &block.d);
        store_rounded(block.q, mul(low, inverse));
        store_rounded(block.q + kLanes, mul(high, inverse));
        int32_t totals[2];
        activation_sums(block.q, totals, block.corrections, &block.correction);
        for (int h = 0; h < 2; h++) block.sums[h] = block.d * (float)totals[h];
        block.sum = block.d * (float)(totals[0] + totals[1]);
    }
}
static inline void quantize_row(const float *x, int64_t k, wide_act_block *out) {  // d = max|x| / 32767
    for (int64_t b = 0; b < k / kBlock; b++, x += kBlock) {
        const vf low = load(x), high = load(x + kLanes);
        const vf inverse = quantization(low, high, 32767.0f, &out[b].d);
        store_rounded(out[b].q, mul(low, inverse));
        store_rounded(out[b].q + kLanes, mul(high, inverse));
    }
}

// The input of a linear in the forms that its matrices ask for, k columns a token; nullptr: none does.
struct activations {
    const float *x;
    const act_block *blocks;
    const wide_act_block *wide;
    activations from(int64_t token, int64_t k) const {
        const int64_t block = token * (k / kBlock);
        return {x + token * k, blocks ? blocks + block : nullptr, wide ? wide + block : nullptr};
    }
};

// Sixteen rows of a quantized matrix in their packed form.
template <class P> struct packed_group {
    using format = P;
    const uint8_t *group;
    int64_t k;
    codes code(int64_t block, int step) const { return P::code(P::codes_at(group, block), step); }
    vf scale(int64_t block, int g) const { return P::scale(group, block, g); }
    vf min(int64_t block, int g) const { return P::min(group, block, g); }
    // A few rows of activations use a matrix faster than the processor fetches it by itself. Groups follow each other,
    // so what is asked for may be of the next one.
    void prefetch(int64_t block) const {
        const uint8_t *ahead = P::codes_at(group, block) + kPrefetchBytes;
#pragma GCC unroll 16
        for (int i = 0; i < P::stride; i += 64) __builtin_prefetch(ahead + i, 0, 3);
    }
};

// The same with codes unpacked to bytes and scales to floats: worth it for more than one tile of tokens.
template <class P> struct unpacked_group {
    using format = P;
    const uint8_t *bytes;
    const float *scales;
    static int64_t bytes_for(int64_t k) { return k / kBlock * (512 + 64 * P::groups * (P::mins ? 2 : 1)); }

    static unpacked_group make(const packed_group<P> &from, uint8_t *scratch) {
        const int64_t blocks = from.k / kBlock;
        float *scales = (float *)(scratch + blocks * 512);
        for (int64_t b = 0; b < blocks; b++) {
#pragma GCC unroll 8
            for (int s = 0; s < kSteps; s++) store_codes(scratch + (b * kSteps + s) * 64, from.code(b, s));
            for (int g = 0; g < P::groups; g++) {
                float *out = scales + (b * P::groups + g) * kLanes * (P::mins ? 2 : 1);
                store(out, from.scale(b, g));
                if constexpr (P::mins) store(out + kLanes, from.min(b, g));
            }
        }
        return {scratch, scales};
    }
    void prefetch(int64_t) const {}
    codes code(int64_t block, int step) const { return load_codes(bytes + (block * kSteps + step) * 64); }
    vf scale(int64_t block, int g) const { return load(scales + (block * P::groups + g) * kLanes * (P::mins ? 2 : 1)); }
    vf min(int64_t block, int g) const {
        return load(scales + (block * P::groups + g) * kLanes * (P::mins ? 2 : 1) + kLanes);
    }
};

// M tokens x 16 rows: out[m] = 16 dot products of length k. `x` has k / 32 blocks a token.
template <int M, class Group> __attribute__((noinline)) void quantized_tile(const Group &w, const act_block *x, int64_t k, float *out) {
    using P = typename Group::format;
    constexpr int steps = kSteps / P::groups;
    const int64_t blocks = k / kBlock;
    vf totals[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) totals[m] = zero();
    for (int64_t b = 0; b < blocks; b++) {
        w.prefetch(b);
        if constexpr (M > 1)  // the tile of tokens that comes next
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) __builtin_prefetch(&x[(m + M) * blocks + b], 0, 3);
#pragma GCC unroll 2
        for (int g = 0; g < P::groups; g++) {
            const vf scale = w.scale(b, g);
            idot dots[M];
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) {
                const act_block &a = x[m * blocks + b];
                dots[m] = P::zero_shift < 0
                              ? dot_zero()
                              : dot_start(P::groups == 1 ? &a.correction : &a.corrections[g], P::zero_shift);
            }
#pragma GCC unroll 8
            for (int s = 0; s < steps; s++) {
                const codes c = w.code(b, g * steps + s);
#pragma GCC unroll 16
                for (int m = 0; m < M; m++)
                    dots[m] = dot_step(dots[m], c, x[m * blocks + b].q + 4 * (g * steps + s));
            }
#pragma GCC unroll 16
            for (int m = 0; m < M; m++)
                totals[m] = fma(dot_finish(dots[m]), mul(scale, splat(x[m * blocks + b].d)), totals[m]);
            if constexpr (P::mins) {
                const vf min = w.min(b, g);
#pragma GCC unroll 16
                for (int m = 0; m < M; m++) {
                    const act_block &a = x[m * blocks + b];
                    totals[m] = fma(min, splat(P::groups == 1 ? a.sum : a.sums[g]), totals[m]);
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) store(out + m * kLanes, totals[m]);
}

// The same for signed bytes and 16-bit activations, straight from the packed form.
template <int M, class P>
__attribute__((noinline)) void wide_tile(const uint8_t *group, const wide_act_block *x, int64_t k, float *out) {
    const int64_t blocks = k / kBlock;
    const packed_group<P> w{group, k};
    vf totals[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) totals[m] = zero();
    for (int64_t b = 0; b < blocks; b++) {
        w.prefetch(b);
        const uint8_t *bytes = P::codes_at(group, b);
        wide_dot dots[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) dots[m] = wide_zero();
#pragma GCC unroll 8
        for (int s = 0; s < kSteps; s++) {
            const int16_t *four[M];
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) four[m] = x[m * blocks + b].q + 4 * s;
            wide_step<M>(dots, (const int8_t *)bytes + 64 * s, four);
        }
        const vf scale = w.scale(b, 0);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
            totals[m] = fma(wide_finish(dots[m]), mul(scale, splat(x[m * blocks + b].d)), totals[m]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) store(out + m * kLanes, totals[m]);
}

// The same for a float matrix and float activations, k a token.
template <int M, class P> __attribute__((noinline)) void float_tile(const uint8_t *group, const float *x, int64_t k, float *out) {
    vf totals[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) totals[m] = zero();
    for (int64_t i = 0; i < k; i++) {
        const vf w = P::column(group, i);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) totals[m] = fma(w, splat(x[m * k + i]), totals[m]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) store(out + m * kLanes, totals[m]);
}

template <class P> constexpr int tile_of() {
    if constexpr (P::is_float)
        return kFloatTile;
    else
        return P::wide ? kWideTile : kIntTile;
}

// One group of rows against `tokens` rows of activations, in tiles: done(first token, count, sums [count][16]).
template <class P, class Done>
void multiply_group(const uint8_t *group, activations in, int64_t tokens, int64_t k, std::vector<uint8_t> &scratch,
                    const Done &done) {
    constexpr int tile = tile_of<P>();
    alignas(64) float sums[tile * kLanes];
    const auto each_tile = [&](const auto &run) {
        for (int64_t t = 0; t < tokens; t += tile) {
            const int64_t count = tokens - t < tile ? tokens - t : tile;
            with_count<tile>(count, [&](auto m) { run(m, in.from(t, k)); });
            done(t, count, sums);
        }
    };
    if constexpr (P::is_float) {
        if (sizeof(typename P::element) == 4 || tokens <= tile)
            return each_tile([&](auto m, activations a) { float_tile<m, P>(group, a.x, k, sums); });
        scratch.resize(k * kLanes * 4 + 64);
        float *wide = (float *)align64((int64_t)scratch.data());
        for (int64_t i = 0; i < k; i++) store(wide + i * kLanes, P::column(group, i));
        each_tile([&](auto m, activations a) { float_tile<m, packed<RL_F32>>((uint8_t *)wide, a.x, k, sums); });
    } else if constexpr (P::wide) {
        each_tile([&](auto m, activations a) { wide_tile<m, P>(group, a.wide, k, sums); });
    } else {
        const packed_group<P> as_packed{group, k};
        if (tokens <= 4 * tile)  // unpacking to memory is not worth it
            return each_tile([&](auto m, activations a) { quantized_tile<m>(as_packed, a.blocks, k, sums); });
        scratch.resize(unpacked_group<P>::bytes_for(k) + 64);
        const auto bytes = unpacked_group<P>::make(as_packed, (uint8_t *)align64((int64_t)scratch.data()));
        each_tile([&](auto m, activations a) { quantized_tile<m>(bytes, a.blocks, k, sums); });
    }
}
