// How GGUF's encoders choose scales: each group of 16 or 32 weights tries some tens of scales near max/levels and keeps
// the one of least weighted error after a least-squares refit (Kawrakow, llama.cpp PR 1684 and later). A super-block of
// 256 then rounds the scales of its groups to 4, 6 or 8 bits and takes the codes once more with what was stored.
//
// Eight groups are searched at once, one in each lane, so a lane adds in the same order as a scalar loop would: bytes
// equal ggml's on every instruction set (no contraction to fma, no reassociation: CMakeLists.txt).
#pragma once
#include "simd.h"

namespace {


constexpr int kAtOnce = 8;  // groups
constexpr int kSuperBlock = 256;
constexpr float kTiny = 1e-15f;  // a group below this is all zero

typedef float floats __attribute__((vector_size(4 * kAtOnce)));
typedef int32_t ints __attribute__((vector_size(4 * kAtOnce)));

inline floats all(float x) { return x - floats{}; }
inline floats to_floats(ints q) { return __builtin_convertvector(q, floats); }
inline floats absolute(floats x) { return (floats)((ints)x & 0x7fffffff); }
inline ints clamp(ints q, int low, int high) {
    q = q < low ? low - ints{} : q;
    return q > high ? high - ints{} : q;
}
// Round half to even by adding 1.5 · 2^23. Beyond 2^22 this wraps, as ggml's does.
inline ints nearest(floats x) { return ((ints)(x + 12582912.0f) & 0x007fffff) - 0x00400000; }
inline floats square_root(floats x) {
    for (int lane = 0; lane < kAtOnce; lane++) x[lane] = std::sqrt(x[lane]);
    return x;
}
inline bool any(ints mask) {
    int32_t found = 0;
    for (int lane = 0; lane < kAtOnce; lane++) found |= mask[lane];
    return found != 0;
}
inline floats stored(floats x) {  // what is left of it in float16
    for (int lane = 0; lane < kAtOnce; lane++) x[lane] = half_to_float(float_to_half(x[lane]));
    return x;
}
inline void store_half(uint8_t *to, float x) {
    const uint16_t half = float_to_half(x);
    std::memcpy(to, &half, 2);
}

// Element i of eight groups of N in the lanes of x[i].
template <int N> inline void load_groups(const float *values, floats *x) {
    for (int lane = 0; lane < kAtOnce; lane++)
        for (int i = 0; i < N; i++) x[i][lane] = values[lane * N + i];
}
template <int N> inline void store_codes(const ints *q, uint8_t *codes) {
    for (int lane = 0; lane < kAtOnce; lane++)
        for (int i = 0; i < N; i++) codes[lane * N + i] = (uint8_t)q[i][lane];
}

// The element of largest magnitude in each lane, the first of a tie.
template <int N> inline floats signed_peak(const floats *x, floats *magnitude) {
    floats peak{}, largest{};
    for (int i = 0; i < N; i++) {
        const ints higher = absolute(x[i]) > largest;
        largest = higher ? absolute(x[i]) : largest;
        peak = higher ? x[i] : peak;
    }
    *magnitude = largest;
    return peak;
}

// w ≈ scale · (q - half), q in 0 .. 2·half - 1: the peak lies near the end that has one more code. Returns scale.
template <int N> floats fit_symmetric(const floats *x, const floats *weight, int half, ints *q) {
    floats largest;
    const floats peak = signed_peak<N>(x, &largest);
    const ints is_zero = largest < kTiny;
    floats scale{}, best{};
    for (int attempt = 0; attempt < 19; attempt++) {
        const int step = attempt == 0 ? 0 : attempt <= 9 ? attempt - 10 : attempt - 9;  // 0, -9 .. -1, 1 .. 9
        const floats inverse = (step == 0 ? (float)-half : -(half + 0.1f * step)) / peak;
        floats sum_qx{}, sum_qq{};
        ints tried[N];
        for (int i = 0; i < N; i++) {
            tried[i] = clamp(nearest(inverse * x[i]), -half, half - 1);
            const floats code = to_floats(tried[i]);
            sum_qx += weight[i] * x[i] * code;
            sum_qq += weight[i] * code * code;
        }
        ints better = (sum_qq > 0.0f) & (sum_qx * sum_qx > best * sum_qq);
        if (step == 0) better = ~ints{};
        const floats refit = sum_qq != 0.0f ? sum_qx / sum_qq : floats{};
        scale = better ? refit : scale;
        best = better ? refit * sum_qx : best;
        for (int i = 0; i < N; i++) q[i] = better ? tried[i] + half : q[i];
    }
    for (int i = 0; i < N; i++) q[i] = is_zero ? ints{} : q[i];
    return is_zero ? floats{} : scale;
}

// Improve one code at a time at the best scale for all others, five rounds. q may be of either sign.
template <int N, class Wrap>
inline floats refine_codes(const floats *x, const floats *weight, int low, int high, ints *q, floats sum_qx,
                           floats sum_qq, bool needs_others, const Wrap &wrap) {
    for (int round = 0; round < 5; round++) {
        ints changed{};
        for (int i = 0; i < N; i++) {
            const floats w = weight[i], old = to_floats(q[i]);
            floats qx = sum_qx - w * x[i] * old, qq = sum_qq - w * old * old;
            ints better = qx > 0.0f;
            if (needs_others) better &= qq > 0.0f;
            const ints code = clamp(nearest(x[i] * qq / qx), low, high);
            better &= code != q[i];
            const floats c = to_floats(code);
            qx += w * x[i] * c;
            qq += w * c * c;
            better &= (qq > 0.0f) & (qx * qx * sum_qq > sum_qx * sum_qx * qq);
            q[i] = better ? wrap(code) : q[i];
            sum_qx = better ? qx : sum_qx;
            sum_qq = better ? qq : sum_qq;
            changed |= better;
        }
        if (!any(changed)) break;
    }
    return sum_qq > 0.0f ? sum_qx / sum_qq : floats{};
}

// Q3_K's own fit, without importance: codes -4 .. 3 (plus 4), error weighted by x².
floats fit_three_bits(const floats *x, ints *q) {
    constexpr int N = 16, half = 4;
    floats largest, weight[N], sum_qx{}, sum_qq{};
    const floats peak = signed_peak<N>(x, &largest);
    const ints is_zero = largest < kTiny;
    const floats inverse = (float)-half / peak;
    for (int i = 0; i < N; i++) {
        weight[i] = x[i] * x[i];
        q[i] = clamp(nearest(inverse * x[i]), -half, half - 1);
        const floats code = to_floats(q[i]);
        sum_qx += weight[i] * x[i] * code;
        sum_qq += weight[i] * code * code;
    }
    const floats scale =
        refine_codes<N>(x, weight, -half, half - 1, q, sum_qx, sum_qq, false, [](ints code) { return code; });
    for (int i = 0; i < N; i++) q[i] = is_zero ? ints{} : q[i] + half;
    return is_zero ? floats{} : scale;
}

// w ≈ scale · q for values that are not negative (scales, minima), q in 0 .. max_code.
template <int N> floats fit_positive(const floats *x, const floats *weight, int max_code, ints *q) {
    floats largest{};
    for (int i = 0; i < N; i++) largest = largest > x[i] ? largest : x[i];
    const ints is_zero = largest < kTiny;
    floats inverse = (float)max_code / largest, best{};
    for (int attempt = 0; attempt < 9; attempt++) {
        const int step = attempt == 0 ? 0 : attempt <= 4 ? attempt - 5 : attempt - 4;  // 0, -4 .. -1, 1 .. 4
        const floats tried = (step == 0 ? (float)max_code : 0.1f * step + max_code) / largest;
        floats error{};
        for (int i = 0; i < N; i++) {
            ints code = nearest(tried * x[i]);
            code = step == 0 ? code & 0xff : clamp(code, INT32_MIN, max_code);
            const floats off = x[i] - 1.0f / tried * to_floats(code);
            error += weight[i] * off * off;
        }
        const ints better = step == 0 ? ~ints{} : error < best;
        best = better ? error : best;
        inverse = better ? tried : inverse;
    }
    floats sum_qx{}, sum_qq{};
    for (int i = 0; i < N; i++) {
        const ints code = clamp(nearest(inverse * x[i]), INT32_MIN, max_code);
        q[i] = code & 0xff;
        sum_qx += weight[i] * x[i] * to_floats(code);
        sum_qq += weight[i] * to_floats(code) * to_floats(code);
    }
    const floats scale = refine_codes<N>(x, weight, INT32_MIN, max_code, q, sum_qx, sum_qq, true,
                                         [](ints code) { return code & 0xff; });
    for (int i = 0; i < N; i++) q[i] = is_zero ? ints{} : q[i];
    return is_zero ? floats{} : scale;
}

struct search {
    float first, step;  // tries the inverse scales (max_code + first + step · i) / (max - min), i = 0 .. steps
    int steps;
    bool absolute_error, guarded;  // guarded: a range that shrank to nothing gives codes of 0
};
constexpr search kByImportance = {-0.9f, 0.05f, 36, false, true};

// w ≈ scale · q - min with min >= 0, q in 0 .. max_code. Returns scale.
template <int N>
floats fit_affine(const floats *x, const floats *weight, int max_code, const search &s, ints *q, floats *min_found) {
    floats low = x[0], high = x[0], sum_w = weight[0], sum_x = sum_w * x[0];
    for (int i = 1; i < N; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        sum_w += weight[i];
        sum_x += weight[i] * x[i];
    }
    low = low > 0.0f ? floats{} : low;
    const ints is_constant = high <= low;
    const floats first_low = low;

    floats scale = 1.0f / ((float)max_code / (high - low)), best{};
    const auto error_of = [&](floats d, floats offset, ints code, int i) {
        const floats off = d * to_floats(code) + offset - x[i];
        return weight[i] * (s.absolute_error ? absolute(off) : off * off);
    };
    const floats inverse = (float)max_code / (high - low);
    for (int i = 0; i < N; i++) {
        q[i] = clamp(nearest(inverse * (x[i] - low)), 0, max_code);
        best += error_of(scale, low, q[i], i);
    }
    for (int attempt = 0; attempt <= s.steps; attempt++) {
        const floats tried = (s.first + s.step * attempt + max_code) / (high - low);
        floats sum_q{}, sum_qq{}, sum_qx{};
        ints code[N];
        for (int i = 0; i < N; i++) {
            const floats v = tried * (x[i] - low);
            if (s.guarded)
                code[i] = v > 0.0f ? nearest(v < (float)max_code ? v : all((float)max_code)) : ints{};
            else
                code[i] = clamp(nearest(v), 0, max_code);
            const floats c = to_floats(code[i]), wc = weight[i] * c;
            sum_q += wc;
            sum_qq += wc * c;
            sum_qx += wc * x[i];
        }
        const floats determinant = sum_w * sum_qq - sum_q * sum_q;
        floats new_scale = (sum_w * sum_qx - sum_x * sum_q) / determinant;
        floats new_low = (sum_qq * sum_x - sum_q * sum_qx) / determinant;
        const ints above = new_low > 0.0f;
        new_scale = above ? sum_qx / sum_qq : new_scale;
        new_low = above ? floats{} : new_low;

        floats error{};
        for (int i = 0; i < N; i++) error += error_of(new_scale, new_low, code[i], i);
        const ints better = (determinant > 0.0f) & (error < best);
        best = better ? error : best;
        scale = better ? new_scale : scale;
        low = better ? new_low : low;
        for (int i = 0; i < N; i++) q[i] = better ? code[i] : q[i];
    }
    for (int i = 0; i < N; i++) q[i] = is_constant ? ints{} : q[i];
    *min_found = -(is_constant ? first_low : low);
    return is_constant ? floats{} : scale;
}

}  // namespace
