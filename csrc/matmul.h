// Matrix kernels: tiles of a few tokens by sixteen rows. One token or five hundred, a tile's sums are formed by the
// same expression in the same ascending order of columns, so a row of activations always gives the same bits.
#pragma once
#include <vector>

#include "packing.h"

constexpr int64_t kPrefetchBytes = 2048;  // ahead of the weights that are being multiplied

// Signed bytes as unsigned codes, for the kernel of narrow ones: where the input has 8 bits and the processor can.
template <class P> struct byte_codes : P {
    static constexpr int zero_shift = 7;
    static constexpr bool wide = false;
};

// Sixteen rows of a quantized matrix in their packed form.
template <class P> struct packed_group {
    static constexpr int groups = P::groups, zero_shift = P::zero_shift, run = P::run;
    static constexpr bool mins = P::mins;
    const uint8_t *group;
    int64_t k;
    const uint8_t *bytes_at(int64_t block) const { return P::codes_at(group, block); }
    codes code(int64_t block, int step) const { return P::code(P::codes_at(group, block), step); }
    vf scale(int64_t block, int g) const { return P::scale(group, block, g); }
    vf min(int64_t block, int g) const { return P::min(group, block, g); }
    // A few rows of activations use a matrix faster than the processor fetches it by itself. Groups follow each other,
    // so what is asked for may be of the next one.
    void prefetch(int64_t block) const {
        const uint8_t *ahead = P::codes_at(group, block) + kPrefetchBytes;
#pragma GCC unroll 16
        for (int i = 0; i < P::stride * run; i += 64) __builtin_prefetch(ahead + i, 0, 3);
    }
};

// The same with codes unpacked to bytes and scales to floats: worth it for more than one tile of tokens.
template <int Groups, int ZeroShift, bool Mins, int Run> struct unpacked_group {
    static constexpr int groups = Groups, zero_shift = ZeroShift, run = Run, floats = kLanes * (Mins ? 2 : 1);
    static constexpr bool mins = Mins;
    const uint8_t *bytes;
    const float *scales;
    static int64_t bytes_for(int64_t k) { return k / kBlock * (64 * kSteps + 4 * floats * Groups); }

    template <class P> static unpacked_group make(const packed_group<P> &from, uint8_t *scratch) {
        const int64_t blocks = from.k / kBlock;
        float *scales = (float *)(scratch + blocks * 64 * kSteps);
        for (int64_t b = 0; b < blocks; b++) {
#pragma GCC unroll 8
            for (int s = 0; s < kSteps; s++) 
                store_codes(scratch + (b * kSteps + s) * 64,
                            P::wide ? load_codes(from.bytes_at(b) + 64 * s) : from.code(b, s));
            for (int g = 0; g < Groups; g++) {
                float *out = scales + (b * Groups + g) * floats;
                store(out, from.scale(b, g));
                if constexpr (Mins) store(out + kLanes, from.min(b, g));
            }
        }
        return {scratch, scales};
    }
    void prefetch(int64_t) const {}
    const uint8_t *bytes_at(int64_t block) const { return bytes + block * kSteps * 64; }
    codes code(int64_t block, int step) const { return load_codes(bytes + (block * kSteps + step) * 64); }
    vf scale(int64_t block, int g) const { return load(scales + (block * Groups + g) * floats); }
    vf min(int64_t block, int g) const { return load(scales + (block * Groups + g) * floats + kLanes); }
};

// M tokens x 16 rows: out[m] = 16 dot products of length k. `x` has k / 32 blocks a token.
template <int M, class Group> __attribute__((noinline)) void quantized_tile(const Group &w, const act_block *x, int64_t k, float *out) {
    constexpr int steps = kSteps / Group::groups;
    const int64_t blocks = k / kBlock;
    vf totals[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) totals[m] = zero();
    for (int64_t first = 0; first < blocks; first += Group::run) {
        w.prefetch(first);
#pragma GCC unroll 2
        for (int g = 0; g < Group::groups; g++) {
            const vf scale = w.scale(first, g), min = Group::mins ? w.min(first, g) : zero();
#pragma GCC unroll 2
            for (int64_t b = first; b < first + Group::run; b++) {
                idot dots[M];
#pragma GCC unroll 16
                for (int m = 0; m < M; m++) {
                    const act_block &a = x[m * blocks + b];
                    dots[m] = Group::zero_shift < 0
                                  ? dot_zero()
                                  : dot_start(Group::groups == 1 ? &a.correction : &a.corrections[g], Group::zero_shift);
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
                if constexpr (Group::mins && Group::run == 1) {
#pragma GCC unroll 16
                    for (int m = 0; m < M; m++) {
                        const act_block &a = x[m * blocks + b];
                        totals[m] = fma(min, splat(Group::groups == 1 ? a.sum : a.sums[g]), totals[m]);
                    }
                }
            }
            if constexpr (Group::mins && Group::run == 2) {
#pragma GCC unroll 16
                for (int m = 0; m < M; m++) {
                    const act_block *a = x + m * blocks + first;
                    totals[m] = fma(min, splat(a[0].sum + a[1].sum), totals[m]);
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) store(out + m * kLanes, totals[m]);
}

// The same for signed bytes and 16-bit activations.
template <int M, class Group>
__attribute__((noinline)) void wide_tile(const Group &w, const wide_act_block *x, int64_t k, float *out) {
    constexpr int steps = kSteps / Group::groups;
    const int64_t blocks = k / kBlock;
    vf totals[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) totals[m] = zero();
    for (int64_t first = 0; first < blocks; first += Group::run) {
        w.prefetch(first);
#pragma GCC unroll 2
        for (int g = 0; g < Group::groups; g++) {
            const vf scale = w.scale(first, g), min = Group::mins ? w.min(first, g) : zero();
#pragma GCC unroll 2
            for (int64_t b = first; b < first + Group::run; b++) {
                const uint8_t *bytes = w.bytes_at(b);
                wide_dot dots[M];
#pragma GCC unroll 16
                for (int m = 0; m < M; m++) dots[m] = wide_zero();
#pragma GCC unroll 8
                for (int s = g * steps; s < (g + 1) * steps; s++) {
                    const int16_t *four[M];
#pragma GCC unroll 16
                    for (int m = 0; m < M; m++) four[m] = x[m * blocks + b].q + 4 * s;
                    wide_step<M>(dots, (const int8_t *)bytes + 64 * s, four);
                }
#pragma GCC unroll 16
                for (int m = 0; m < M; m++)
                    totals[m] = fma(wide_finish(dots[m]), mul(scale, splat(x[m * blocks + b].d)), totals[m]);
                if constexpr (Group::mins && Group::run == 1) {
#pragma GCC unroll 16
                    for (int m = 0; m < M; m++) totals[m] = fma(min, splat(x[m * blocks + b].sum), totals[m]);
                }
            }
            if constexpr (Group::mins && Group::run == 2) {
#pragma GCC unroll 16
                for (int m = 0; m < M; m++) {
                    const wide_act_block *a = x + m * blocks + first;
                    totals[m] = fma(min, splat(a[0].sum + a[1].sum), totals[m]);
                }
            }
        }
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

// fn of how a format is multiplied: as it is, or its bytes as codes where the input is rounded to bytes as well.
template <class F> static inline bool with_kernel(int32_t format, bool byte_input, const F &fn) {
    return with_format(format, [&](auto p) {
        using P = decltype(p);
        if constexpr (P::wide && kByteDots)
            if (byte_input) return fn(byte_codes<P>{});
        fn(p);
    });
}

template <class P> constexpr int tile_of() {
    if constexpr (P::is_float)
        return kFloatTile;
    else
        return P::wide ? kWideTile : kIntTile;
}

// sums[count][16] and what the outliers of each token add to them.
template <class P> void add_outliers(const uint8_t *group, activations in, int64_t count, int64_t k, float *sums) {
    for (int64_t m = 0; m < count; m++) {
        const activations token = in.from(m, k);
        if (token.outliers[0] == 0) continue;
        vf y = load(sums + m * kLanes);
        for (int32_t i = 1; i <= token.outliers[0]; i++) {
            const int32_t column = token.outliers[i];
            y = fma(unpack_column<P>(group, column), splat(token.x[column]), y);
        }
        store(sums + m * kLanes, y);
    }
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
            if constexpr (!P::is_float)
                if (in.outliers) add_outliers<P>(group, in.from(t, k), count, k, sums);
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
    } else {
        const auto multiply = [&](auto m, const auto &w, activations a) {
            if constexpr (P::wide)
                wide_tile<m>(w, a.wide, k, sums);
            else
                quantized_tile<m>(w, a.blocks, k, sums);
        };
        const packed_group<P> as_packed{group, k};
        if constexpr (!P::has_packed_tiles)
            if (tokens == 1) {
                multiply(std::integral_constant<int, 1>{}, as_packed, in);
                if (in.outliers) add_outliers<P>(group, in, 1, k, sums);
                return done(0, 1, sums);
            }
        // Unpacking bytes to bytes is not worth it, nor others for a few tokens.
        if constexpr (P::has_packed_tiles)
            if (P::bits == 8 || tokens <= 4 * tile)
                return each_tile([&](auto m, activations a) { multiply(m, as_packed, a); });
        if constexpr (P::bits < 8 || !P::has_packed_tiles) {
            using unpacked = unpacked_group<P::groups, P::zero_shift, P::mins, P::run>;
            scratch.resize(unpacked::bytes_for(k) + 64);
            const auto as_bytes = unpacked::make(as_packed, (uint8_t *)align64((int64_t)scratch.data()));
            each_tile([&](auto m, activations a) { multiply(m, as_bytes, a); });
        }
    }
}
