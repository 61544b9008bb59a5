// Sixteen lanes, whatever the processor: the only vector width that the kernels know. One header for each
// instruction set defines `vf` (16 floats), `codes` (16 rows x 4 unsigned bytes) and `idot` (16 integer dot
// products) with the same functions; results differ between instruction sets only in rounding.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

constexpr int kLanes = 16;

#if defined(RL_AVX512)
#include "simd_avx512.h"
#elif defined(RL_AVX2)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

static inline vf zero() { return splat(0.0f); }
static inline vf load_n(const float *p, int64_t n) {  // the first n lanes, 0 elsewhere
    if (n >= kLanes) return load(p);
    alignas(64) float lanes[kLanes] = {};
    std::memcpy(lanes, p, 4 * n);
    return load(lanes);
}
static inline void store_n(float *p, vf v, int64_t n) {
    if (n >= kLanes) return store(p, v);
    alignas(64) float lanes[kLanes];
    store(lanes, v);
    std::memcpy(p, lanes, 4 * n);
}

// fn(integral_constant<N>) for N = min(count, Largest), count >= 1.
template <int Largest, class F> static inline void with_count(int64_t count, const F &fn) {
    if constexpr (Largest > 1)
        if (count < Largest) return with_count<Largest - 1>(count, fn);
    fn(std::integral_constant<int, Largest>{});
}

// exp for x <= 0, relative error below 2e-7: 2^n · e^r with |r| <= ln2/2 and a degree-6 polynomial (Cephes expf).
static inline vf exp_nonpositive(vf x) {
    const vf lowest = splat(-87.0f);
    const vf clamped = max(x, lowest);
    const vf n = round_even(mul(clamped, splat(1.44269504f)));
    const vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), clamped));
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = add(fma(mul(p, r), r, r), splat(1.0f));
    return select_less(x, lowest, zero(), mul(p, power_of_two(n)));
}
static inline vf sigmoid(vf x) {
    const vf e = exp_nonpositive(negative_magnitude(x));
    const vf positive = div(splat(1.0f), add(splat(1.0f), e));
    return select_less(x, zero(), mul(e, positive), positive);
}
static inline vf silu(vf x) { return mul(x, sigmoid(x)); }
static inline vf gelu_tanh(vf x) {  // x * sigmoid(2y) = x/2 * (1 + tanh(y)), y = sqrt(2/pi) (x + 0.044715 x³)
    return mul(x, sigmoid(mul(splat(1.5957691216f), fma(mul(mul(splat(0.044715f), x), x), x, x))));
}

static inline float half_to_float(uint16_t h) {
    alignas(64) uint16_t halves[kLanes] = {h};
    return first(load(halves));
}
static inline float first_float(const float *p) { return *p; }
static inline float first_float(const uint16_t *p) { return half_to_float(*p); }
static inline float bfloat_to_float(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
static inline uint16_t float_to_half(float x) {  // round to nearest even
    uint32_t u;
    std::memcpy(&u, &x, 4);
    uint32_t sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return sign | 0x7e00u;
    if (u >= 0x477ff000u) return sign | 0x7c00u;
    if (u < 0x38800000u) {  // subnormal: let the float adder round at the right place
        float magnitude;
        std::memcpy(&magnitude, &u, 4);
        magnitude += 0.5f;
        std::memcpy(&u, &magnitude, 4);
        return sign | (uint16_t)(u - 0x3f000000u);
    }
    u += 0xfffu + ((u >> 13) & 1u);
    return sign | (uint16_t)((u - 0x38000000u) >> 13);
}
