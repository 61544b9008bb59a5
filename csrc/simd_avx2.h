// AVX2, FMA and F16C: two registers for sixteen lanes; u8 x s8 products are summed in 16 bits.
#pragma once
#include <immintrin.h>

struct vf {
    __m256 a, b;
};

static inline vf load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline vf load(const uint16_t *halves) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)halves)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + 8)))};
}
static inline vf load_bfloat(const uint16_t *p) {
    auto half = [](const uint16_t *q) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)q));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    };
    return {half(p), half(p + 8)};
}
static inline vf load(const int8_t *p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))))};
}
static inline vf load(const uint8_t *p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))))};
}
static inline void store(float *p, vf v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
static inline void store(uint16_t *halves, vf v) {
    _mm_storeu_si128((__m128i *)halves, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(halves + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store_rounded(int8_t *p, vf v) {  // to nearest even
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
static inline void store_rounded(int16_t *p, vf v) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(words, 0xd8));
}
static inline vf splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline vf add(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline vf sub(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline vf mul(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline vf div(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline vf fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline vf max(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline vf magnitude(vf x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline vf negative_magnitude(vf x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(sign, x.a), _mm256_or_ps(sign, x.b)};
}
static inline vf select_less(vf x, vf y, vf then, vf otherwise) {
    return {_mm256_blendv_ps(otherwise.a, then.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(otherwise.b, then.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
static inline vf round_even(vf x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline vf power_of_two(vf n) {
    auto half = [](__m256 x) {
        __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    };
    return {half(n.a), half(n.b)};
}
static inline float first(vf x) { return _mm256_cvtss_f32(x.a); }
static inline float sum(vf x) {
    __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
static inline float largest(vf x) {
    __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

struct codes {
    __m256i a, b;
};
struct idot {  // 16-bit sums, two a row
    __m256i a, b;
};

static inline codes load_codes(const uint8_t *p) {
    return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))};
}
static inline void store_codes(uint8_t *p, codes c) {
    _mm256_storeu_si256((__m256i *)p, c.a);
    _mm256_storeu_si256((__m256i *)(p + 32), c.b);
}
static inline codes codes_and(codes c, int byte) {
    const __m256i mask = _mm256_set1_epi8((char)byte);
    return {_mm256_and_si256(c.a, mask), _mm256_and_si256(c.b, mask)};
}
static inline codes codes_or(codes x, codes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
static inline codes codes_right(codes c, int bits) {  // bits cross bytes: mask
    return {_mm256_srli_epi16(c.a, bits), _mm256_srli_epi16(c.b, bits)};
}
static inline codes codes_left(codes c, int bits) {
    return {_mm256_slli_epi16(c.a, bits), _mm256_slli_epi16(c.b, bits)};
}
static inline codes codes_flip(codes c) {  // signed to unsigned bytes
    const __m256i high = _mm256_set1_epi8((char)128);
    return {_mm256_xor_si256(c.a, high), _mm256_xor_si256(c.b, high)};
}
static inline vf lane_byte(codes c, int byte) {  // one of the four of every row
    const __m128i bits = _mm_cvtsi32_si128(8 * byte);
    const __m256i mask = _mm256_set1_epi32(255);
    return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(c.a, bits), mask)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(c.b, bits), mask))};
}

// Sixteen-bit sums of up to 16 products each: codes - 2^shift stays within |16 · 16 · 127| or |8 · 32 · 127|, so the
// running sums may wrap around as long as the correction is in them from the start.
static inline idot dot_start(const int32_t *correction, int shift) {
    __m256i c = _mm256_slli_epi16(_mm256_set1_epi32(*correction), shift);
    return {c, c};
}
static inline idot dot_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
// Assembly, because gcc moves the additions of several steps together and spills the products in between.
static inline void multiply_add(__m256i &sums, __m256i c, __m256i x) {
    __m256i products;
    asm volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(c), "x"(x));
}
static inline idot dot_step(idot sums, codes c, const int8_t *four) {
    int32_t dword;
    std::memcpy(&dword, four, 4);
    const __m256i x = _mm256_set1_epi32(dword);
    multiply_add(sums.a, c.a, x);
    multiply_add(sums.b, c.b, x);
    return sums;
}
static inline vf dot_finish(idot sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_cvtepi32_ps(_mm256_madd_epi16(sums.a, ones)), _mm256_cvtepi32_ps(_mm256_madd_epi16(sums.b, ones))};
}
// The sums of the first and the last sixteen of 32 values; what dot_start takes for each and for all:
// minus the sums of the first and of the second two of every four values, as two 16-bit numbers.
static inline void activation_sums(const int8_t *x, int32_t totals[2], int32_t corrections[2], int32_t *correction) {
    const __m128i ones = _mm_set1_epi8(1);
    auto pairs = [&](const int8_t *p) {  // two 16-bit sums in the lowest dword
        __m128i s = _mm_maddubs_epi16(ones, _mm_loadu_si128((const __m128i *)p));
        s = _mm_add_epi16(s, _mm_srli_si128(s, 8));
        return _mm_add_epi16(s, _mm_srli_si128(s, 4));
    };
    const __m128i none = _mm_setzero_si128(), a = pairs(x), b = pairs(x + 16);
    corrections[0] = _mm_cvtsi128_si32(_mm_sub_epi16(none, a));
    corrections[1] = _mm_cvtsi128_si32(_mm_sub_epi16(none, b));
    *correction = _mm_cvtsi128_si32(_mm_sub_epi16(none, _mm_add_epi16(a, b)));
    auto total = [](int32_t both) { return -((int32_t)(int16_t)(both & 0xffff) + (int32_t)(int16_t)(both >> 16)); };
    totals[0] = total(corrections[0]);
    totals[1] = total(corrections[1]);
}

struct wide_dot {  // four rows a register, two 32-bit sums a row
    __m256i q[4];
};
static inline wide_dot wide_zero() {
    const __m256i z = _mm256_setzero_si256();
    return {{z, z, z, z}};
}
// 16 rows x 4 signed bytes against four 16-bit values of each of M tokens.
template <int M> static inline void wide_step(wide_dot *sums, const int8_t *bytes, const int16_t *const *four) {
    __m256i x[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
        int64_t words;
        std::memcpy(&words, four[m], 8);
        x[m] = _mm256_set1_epi64x(words);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(bytes + 16 * i)));
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            __m256i products;
            asm volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums[m].q[i]), "=&x"(products) : "x"(w), "x"(x[m]));
        }
    }
}
static inline vf wide_finish(const wide_dot &sums) {
    auto rows = [](__m256i low, __m256i high) {
        return _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8));
    };
    return {rows(sums.q[0], sums.q[1]), rows(sums.q[2], sums.q[3])};
}
constexpr int kWideTile = 2;   // tokens of a tile of signed bytes: 8 sums
constexpr int kIntTile = 4;    // tokens of a tile of the quantized kernel: 8 sums in 16 registers
constexpr int kFloatTile = 6;  // and of the float kernel: 12
constexpr int kScoreRows = 6;  // query rows of the attention kernels
constexpr bool kByteDots = false;  // 16-bit sums cannot hold products of bytes
