// Any processor: four registers of four lanes in the compiler's portable vector extensions (SSE2, NEON).
// No fused multiply-add: fma rounds twice here.
#pragma once

typedef float v4f __attribute__((vector_size(16), aligned(4)));
typedef int32_t v4i __attribute__((vector_size(16), aligned(4)));
typedef uint32_t v4u __attribute__((vector_size(16), aligned(4)));

struct vf {
    v4f q[4];
};

template <class F> static inline vf map(const F &f) { return {{f(0), f(1), f(2), f(3)}}; }
static inline vf splat(float x) {
    return map([&](int) { return v4f{x, x, x, x}; });
}
static inline vf load(const float *p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float *p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf load(const uint16_t *halves) {  // the multiplication renormalises subnormals
    return map([&](int i) {
        v4u u;
        for (int j = 0; j < 4; j++) u[j] = halves[4 * i + j];
        const v4u sign = (u & 0x8000u) << 16, bits = (u & 0x7fffu) << 13;
        const v4f scaled = (v4f)bits * v4f{0x1p112f, 0x1p112f, 0x1p112f, 0x1p112f};
        const v4u special = (v4u)((v4i)(u & 0x7c00u) == 0x7c00);
        return (v4f)((((v4u)scaled & ~special) | ((bits | 0x7f800000u) & special)) | sign);
    });
}
static inline vf load_bfloat(const uint16_t *p) {
    return map([&](int i) {
        return (v4f)(v4u{(uint32_t)p[4 * i] << 16, (uint32_t)p[4 * i + 1] << 16, (uint32_t)p[4 * i + 2] << 16,
                         (uint32_t)p[4 * i + 3] << 16});
    });
}
template <class T> static inline vf load_bytes(const T *p) {
    return map([&](int i) {
        return v4f{(float)p[4 * i], (float)p[4 * i + 1], (float)p[4 * i + 2], (float)p[4 * i + 3]};
    });
}
static inline vf load(const int8_t *p) { return load_bytes(p); }
static inline vf load(const uint8_t *p) { return load_bytes(p); }
static inline uint16_t float_to_half(float x);
static inline void store(uint16_t *halves, vf v) {
    for (int i = 0; i < 16; i++) halves[i] = float_to_half(v.q[i / 4][i % 4]);
}
static inline vf round_even(vf x) {  // |x| < 2^22: adding 1.5 · 2^23 leaves no bits below the point
    const float magic = 12582912.0f;
    return map([&](int i) { return (x.q[i] + v4f{magic, magic, magic, magic}) - v4f{magic, magic, magic, magic}; });
}
static inline void store_rounded(int8_t *p, vf v) {
    const vf r = round_even(v);
    for (int i = 0; i < 16; i++) p[i] = (int8_t)r.q[i / 4][i % 4];
}
static inline void store_rounded(int16_t *p, vf v) {
    const vf r = round_even(v);
    for (int i = 0; i < 16; i++) p[i] = (int16_t)r.q[i / 4][i % 4];
}
static inline vf add(vf x, vf y) {
    return map([&](int i) { return x.q[i] + y.q[i]; });
}
static inline vf sub(vf x, vf y) {
    return map([&](int i) { return x.q[i] - y.q[i]; });
}
static inline vf mul(vf x, vf y) {
    return map([&](int i) { return x.q[i] * y.q[i]; });
}
static inline vf div(vf x, vf y) {
    return map([&](int i) { return x.q[i] / y.q[i]; });
}
static inline vf fma(vf x, vf y, vf z) {
    return map([&](int i) { return x.q[i] * y.q[i] + z.q[i]; });
}
static inline vf max(vf x, vf y) {
    return map([&](int i) { return x.q[i] > y.q[i] ? x.q[i] : y.q[i]; });
}
static inline vf magnitude(vf x) {
    return map([&](int i) { return (v4f)((v4u)x.q[i] & 0x7fffffffu); });
}
static inline vf negative_magnitude(vf x) {
    return map([&](int i) { return (v4f)((v4u)x.q[i] | 0x80000000u); });
}
static inline vf select_less(vf x, vf y, vf then, vf otherwise) {
    return map([&](int i) { return x.q[i] < y.q[i] ? then.q[i] : otherwise.q[i]; });
}
static inline vf power_of_two(vf n) {
    return map([&](int i) { return (v4f)((__builtin_convertvector(n.q[i], v4i) + 127) << 23); });
}
static inline float first(vf x) { return x.q[0][0]; }
static inline float sum(vf x) {
    const v4f four = (x.q[0] + x.q[2]) + (x.q[1] + x.q[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
}
static inline float largest(vf x) {
    float m = x.q[0][0];
    for (int i = 1; i < 16; i++) m = x.q[i / 4][i % 4] > m ? x.q[i / 4][i % 4] : m;
    return m;
}

struct codes {
    uint64_t q[8];
};
struct idot {
    int32_t s[16];
};

static inline codes load_codes(const uint8_t *p) {
    codes c;
    std::memcpy(&c, p, sizeof c);
    return c;
}
static inline void store_codes(uint8_t *p, codes c) { std::memcpy(p, &c, sizeof c); }
static inline codes codes_and(codes c, int byte) {
    for (uint64_t &q : c.q) q &= 0x0101010101010101ull * (uint64_t)byte;
    return c;
}
static inline codes codes_or(codes x, codes y) {
    for (int i = 0; i < 8; i++) x.q[i] |= y.q[i];
    return x;
}
static inline codes codes_right(codes c, int bits) {  // bits cross bytes: mask
    for (uint64_t &q : c.q) q >>= bits;
    return c;
}
static inline codes codes_left(codes c, int bits) {
    for (uint64_t &q : c.q) q <<= bits;
    return c;
}
static inline codes codes_flip(codes c) {  // signed to unsigned bytes
    for (uint64_t &q : c.q) q ^= 0x8080808080808080ull;
    return c;
}
static inline vf lane_byte(codes c, int byte) {  // one of the four of every row
    uint8_t bytes[64];
    std::memcpy(bytes, &c, 64);
    return map([&](int i) {
        const uint8_t *four = bytes + 16 * i + byte;
        return v4f{(float)four[0], (float)four[4], (float)four[8], (float)four[12]};
    });
}
static inline idot dot_zero() { return {}; }
static inline idot dot_start(const int32_t *correction, int shift) {
    idot d;
    for (int32_t &s : d.s) s = *correction * (1 << shift);
    return d;
}
static inline idot dot_step(idot sums, codes c, const int8_t *four) {
    uint8_t bytes[64];
    std::memcpy(bytes, &c, 64);
    for (int r = 0; r < 16; r++)
        for (int j = 0; j < 4; j++) sums.s[r] += bytes[4 * r + j] * four[j];
    return sums;
}
static inline vf dot_finish(idot sums) {
    return map([&](int i) {
        return v4f{(float)sums.s[4 * i], (float)sums.s[4 * i + 1], (float)sums.s[4 * i + 2], (float)sums.s[4 * i + 3]};
    });
}
// The sums of the first and the last sixteen of 32 values; what dot_start takes for each and for all.
static inline void activation_sums(const int8_t *x, int32_t totals[2], int32_t corrections[2], int32_t *correction) {
    for (int h = 0; h < 2; h++) {
        totals[h] = 0;
        for (int i = 0; i < 16; i++) totals[h] += x[16 * h + i];
        corrections[h] = -totals[h];
    }
    *correction = -totals[0] - totals[1];
}

typedef idot wide_dot;
static inline wide_dot wide_zero() { return {}; }
// 16 rows x 4 signed bytes against four 16-bit values of each of M tokens.
template <int M> static inline void wide_step(wide_dot *sums, const int8_t *bytes, const int16_t *const *four) {
    for (int m = 0; m < M; m++)
        for (int r = 0; r < 16; r++)
            for (int j = 0; j < 4; j++) sums[m].s[r] += bytes[4 * r + j] * four[m][j];
}
static inline vf wide_finish(const wide_dot &sums) { return dot_finish(sums); }
constexpr int kIntTile = 2, kWideTile = 2, kFloatTile = 4, kScoreRows = 4;
constexpr bool kByteDots = true;
