// AVX-512 F, BW, DQ, VL and VNNI: one register for sixteen lanes; u8 x s8 dot products in one instruction.
#pragma once
#include <immintrin.h>

typedef __m512 vf;

static inline vf load(const float *p) { return _mm512_loadu_ps(p); }
static inline vf load(const uint16_t *halves) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves)); }
static inline vf load_bfloat(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline vf load(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline vf load(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline void store(float *p, vf v) { _mm512_storeu_ps(p, v); }
static inline void store(uint16_t *halves, vf v) {
    _mm256_storeu_si256((__m256i *)halves, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void store_rounded(int8_t *p, vf v) {  // to nearest even
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
static inline void store_rounded(int16_t *p, vf v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v)));
}
static inline vf splat(float x) { return _mm512_set1_ps(x); }
static inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf magnitude(vf a) { return _mm512_abs_ps(a); }
static inline vf negative_magnitude(vf a) { return _mm512_or_ps(a, splat(-0.0f)); }
static inline vf select_less(vf x, vf y, vf then, vf otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), otherwise, then);
}
static inline vf round_even(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf power_of_two(vf n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
static inline float first(vf a) { return _mm512_cvtss_f32(a); }
static inline float sum(vf a) { return _mm512_reduce_add_ps(a); }
static inline float largest(vf a) { return _mm512_reduce_max_ps(a); }

typedef __m512i codes;
typedef __m512i idot;

static inline codes load_codes(const uint8_t *p) { return _mm512_loadu_si512(p); }
static inline void store_codes(uint8_t *p, codes c) { _mm512_storeu_si512(p, c); }
static inline codes codes_and(codes c, int byte) { return _mm512_and_si512(c, _mm512_set1_epi8((char)byte)); }
static inline codes codes_or(codes a, codes b) { return _mm512_or_si512(a, b); }
static inline codes codes_right(codes c, int bits) { return _mm512_srli_epi16(c, bits); }  // bits cross bytes: mask
static inline codes codes_left(codes c, int bits) { return _mm512_slli_epi16(c, bits); }
static inline codes codes_flip(codes c) {  // signed to unsigned bytes
    return _mm512_xor_si512(c, _mm512_set1_epi8((char)128));
}
static inline vf lane_byte(codes c, int byte) {  // one of the four of every row
    const __m512i moved = _mm512_srl_epi32(c, _mm_cvtsi32_si128(8 * byte));
    return _mm512_cvtepi32_ps(_mm512_and_si512(moved, _mm512_set1_epi32(255)));
}

// `correction` as activation_sums made it: the dot product of codes - 2^shift.
static inline idot dot_start(const int32_t *correction, int shift) {
    return _mm512_slli_epi32(_mm512_set1_epi32(*correction), shift);
}
static inline idot dot_zero() { return _mm512_setzero_si512(); }
static inline idot dot_step(idot sums, codes c, const int8_t *four) {
    int32_t dword;
    std::memcpy(&dword, four, 4);
    return _mm512_dpbusd_epi32(sums, c, _mm512_set1_epi32(dword));
}
static inline vf dot_finish(idot sums) { return _mm512_cvtepi32_ps(sums); }
// The sums of the first and the last sixteen of 32 values; what dot_start takes for each and for all.
static inline void activation_sums(const int8_t *x, int32_t totals[2], int32_t corrections[2], int32_t *correction) {
    auto total = [](const int8_t *p) {
        __m128i s = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), _mm_loadu_si128((const __m128i *)p));
        s = _mm_add_epi32(s, _mm_srli_si128(s, 8));
        return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_srli_si128(s, 4)));
    };
    for (int h = 0; h < 2; h++) {
        totals[h] = total(x + 16 * h);
        corrections[h] = -totals[h];
    }
    *correction = -totals[0] - totals[1];
}

struct wide_dot {  // eight rows a register, two 32-bit sums a row
    __m512i low, high;
};
static inline wide_dot wide_zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
// 16 rows x 4 signed bytes against four 16-bit values of each of M tokens.
template <int M> static inline void wide_step(wide_dot *sums, const int8_t *bytes, const int16_t *const *four) {
    const __m512i low = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)bytes));
    const __m512i high = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(bytes + 32)));
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
        int64_t words;
        std::memcpy(&words, four[m], 8);
        const __m512i x = _mm512_set1_epi64(words);
        sums[m].low = _mm512_dpwssd_epi32(sums[m].low, low, x);
        sums[m].high = _mm512_dpwssd_epi32(sums[m].high, high, x);
    }
}
static inline vf wide_finish(const wide_dot &sums) {
    const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(1));
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_permutex2var_epi32(sums.low, first, sums.high),
                                               _mm512_permutex2var_epi32(sums.low, second, sums.high)));
}
constexpr int kWideTile = 8;    // tokens of a tile of signed bytes: 16 sums of integers and 8 of floats in 32 registers
constexpr int kIntTile = 12;    // tokens of a tile of the quantized kernel: 12 sums of each kind
constexpr int kFloatTile = 12;  // and of the float kernel
constexpr int kScoreRows = 12;  // query rows of the attention kernels
constexpr bool kByteDots = true;  // dot_step multiplies bytes of 8 bits too
