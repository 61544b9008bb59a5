// The input of a linear as its matrices want it: float32, or integers with a scale. Integer inputs are a choice of the
// kernels (blocks of 32 columns, as fine as possible) or of the model (one scale a token, `input_rounding`).
#pragma once
#include <cfloat>

#include "simd.h"

constexpr int kBlock = 32;  // columns

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
    float sum;  // d times the sum of q
};

// What the weights of a linear ask for (ActivationQuant in quant/weight.py): int8, one scale a token.
struct input_rounding {
    bool on;
    float scale;    // of every token; 0: each token's own, max|x| / 127
    float outlier;  // magnitudes from here on are left out, and multiplied as floats; 0: none are
};

// What a row or block is multiplied with to become integers, and what they are to be multiplied with.
struct rounding {
    float d;
    vf inverse;
};
static inline rounding rounding_for(float most, float levels) {  // else the quotient is infinite
    return {most / levels, splat(most > levels / FLT_MAX ? levels / most : 0.0f)};
}

static inline void put_integers(act_block &block, vf low, vf high, float d) {
    store_rounded(block.q, low);
    store_rounded(block.q + kLanes, high);
    int32_t totals[2];
    activation_sums(block.q, totals, block.corrections, &block.correction);
    block.d = d;
    for (int h = 0; h < 2; h++) block.sums[h] = d * (float)totals[h];
    block.sum = d * (float)(totals[0] + totals[1]);
}
static inline void put_integers(wide_act_block &block, vf low, vf high, float d) {
    store_rounded(block.q, low);
    store_rounded(block.q + kLanes, high);
    int32_t total = 0;
    for (int i = 0; i < kBlock; i++) total += block.q[i];
    block.d = d;
    block.sum = d * (float)total;
}

// A row of k floats to k/32 blocks: d = max|x| / levels, q = x / d rounded to even.
template <class Block> static inline void quantize_blocks(const float *x, int64_t k, Block *out) {
    constexpr float levels = std::is_same_v<Block, act_block> ? 127.0f : 32767.0f;
    for (int64_t b = 0; b < k / kBlock; b++, x += kBlock) {
        const vf low = load(x), high = load(x + kLanes);
        const rounding r = rounding_for(largest(max(magnitude(low), magnitude(high))), levels);
        put_integers(out[b], mul(low, r.inverse), mul(high, r.inverse), r.d);
    }
}

// One token's row by one scale.
class rounded_row {
public:
    rounded_row(const float *x, int64_t k, input_rounding how)
        : x_(x), k_(k), outlier_(splat(how.outlier > 0 ? how.outlier : INFINITY)) {
        if (how.scale > 0) {
            rounding_ = {how.scale, splat(1.0f / how.scale)};
            return;
        }
        vf most = zero();
        for (int64_t i = 0; i < k; i += kLanes) {
            const vf m = magnitude(load_n(x + i, k - i));
            most = max(most, select_less(m, outlier_, m, zero()));
        }
        rounding_ = rounding_for(largest(most), 127.0f);
    }
    template <class Block> void put(Block *out) const {
        for (int64_t b = 0; b < k_ / kBlock; b++)
            put_integers(out[b], scaled(load(x_ + b * kBlock)), scaled(load(x_ + b * kBlock + kLanes)), rounding_.d);
    }
    void put(float *out) const {  // as floats, outliers as they are; out may be the row itself
        for (int64_t i = 0; i < k_; i += kLanes) {
            const vf x = load_n(x_ + i, k_ - i), y = mul(round_even(scaled(x)), splat(rounding_.d));
            store_n(out + i, select_less(magnitude(x), outlier_, y, x), k_ - i);
        }
    }
    void put_outliers(int32_t *out) const {  // how many, and their columns
        const float least = first(outlier_);
        int32_t count = 0;
        for (int64_t i = 0; i < k_; i += kLanes) {
            if (largest(magnitude(load_n(x_ + i, k_ - i))) < least) continue;
            for (int64_t j = i; j < i + kLanes && j < k_; j++)
                if (std::fabs(x_[j]) >= least) out[++count] = (int32_t)j;
        }
        out[0] = count;
    }

private:
    vf scaled(vf x) const {
        const vf most = splat(127.0f), least = splat(-127.0f), v = max(least, mul(x, rounding_.inverse));
        return select_less(magnitude(x), outlier_, select_less(v, most, v, most), zero());
    }
    const float *x_;
    int64_t k_;
    vf outlier_;
    rounding rounding_;
};

// The input of a linear in the forms that its matrices ask for, k columns a token; nullptr: none does.
struct activations {
    const float *x;
    const act_block *blocks;
    const wide_act_block *wide;
    const int32_t *outliers;  // 1 + k a token: how many, and their columns in ascending order
    activations from(int64_t token, int64_t k) const {
        const int64_t block = token * (k / kBlock);
        return {x + token * k, blocks ? blocks + block : nullptr, wide ? wide + block : nullptr,
                outliers ? outliers + token * (k + 1) : nullptr};
    }
};
