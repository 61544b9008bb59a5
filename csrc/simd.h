// Eight floats at a time in the compiler's portable vector extensions: SSE2 pairs in the generic build, one AVX
// register in the avx2 build. Every reduction over K keeps eight running sums and joins them in one fixed order,
// so that a result does not depend on how many rows are computed together.
#pragma once
#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float v8f __attribute__((vector_size(32), aligned(4)));
typedef int32_t v8i __attribute__((vector_size(32), aligned(4)));
typedef uint32_t v8u __attribute__((vector_size(32), aligned(4)));
typedef uint8_t v8u8 __attribute__((vector_size(8), aligned(1)));
typedef int8_t v8s8 __attribute__((vector_size(8), aligned(1)));
typedef uint16_t v8u16 __attribute__((vector_size(16), aligned(2)));

template <class V> static inline V load(const void *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float *p, v8f v) { std::memcpy(p, &v, sizeof v); }
static inline v8f splat(float x) { return v8f{x, x, x, x, x, x, x, x}; }

// Eight bytes to float. gcc 12 turns the vector conversion of 8-byte vectors into scalar code, hence intrinsics.
static inline v8f to_float(v8u8 bytes) {
#if defined(__AVX2__)
    int64_t bits;
    std::memcpy(&bits, &bytes, 8);
    return (v8f)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits)));
#else
    return __builtin_convertvector(__builtin_convertvector(bytes, v8i), v8f);
#endif
}
static inline v8f to_float(v8s8 bytes) {
#if defined(__AVX2__)
    int64_t bits;
    std::memcpy(&bits, &bytes, 8);
    return (v8f)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits)));
#else
    return __builtin_convertvector(__builtin_convertvector(bytes, v8i), v8f);
#endif
}

static inline float sum(v8f v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
static inline float max(v8f v) {
    float m = v[0];
    for (int i = 1; i < 8; i++) m = v[i] > m ? v[i] : m;
    return m;
}

// IEEE half to single, all values. Without F16C: the multiplication renormalises subnormals.
static inline v8f half_to_float(v8u16 h) {
#if defined(__F16C__)
    return (v8f)_mm256_cvtph_ps((__m128i)h);
#else
    v8u u = __builtin_convertvector(h, v8u);
    v8u sign = (u & 0x8000u) << 16;
    v8u magnitude = (u & 0x7fffu) << 13;
    v8f scaled = (v8f)magnitude * splat(0x1p112f);
    v8u special = (v8u)((v8i)(u & 0x7c00u) == 0x7c00);
    v8u bits = ((v8u)scaled & ~special) | ((magnitude | 0x7f800000u) & special);
    return (v8f)(bits | sign);
#endif
}
static inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    v8u16 v = {h};
    return half_to_float(v)[0];
#endif
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

// exp for x <= 0, relative error below 2e-7: 2^n · e^r with |r| <= ln2/2 and a degree-6 polynomial (Cephes expf).
static inline v8f exp_nonpositive(v8f x) {
    v8f clamped = x < splat(-87.0f) ? splat(-87.0f) : x;
    v8f n = clamped * splat(1.44269504f);
    v8i k = __builtin_convertvector(n - splat(0.5f), v8i);  // n <= 0: truncation rounds to nearest
    v8f kf = __builtin_convertvector(k, v8f);
    v8f r = clamped - kf * splat(0.693359375f) + kf * splat(2.12194440e-4f);
    v8f p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    v8f result = p * (v8f)((k + 127) << 23);
    return x < splat(-87.0f) ? splat(0.0f) : result;
}
