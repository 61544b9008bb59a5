// Packed matrices: the layout in which kernels read weights, and how a file's rows are rearranged into it.
//
// Sixteen rows form a group; a group is a run of blocks of 32 columns, each followed by its scales (a K-quant's eight
// blocks by theirs), so that a matrix is read as one stream. In a block, `codes` of step s hold columns 4s..4s+3 of
// all sixteen rows, four bytes a row. Codes of fewer than 8 bits are split into
// planes: four bits (low nibble: steps 0..3, high nibble: 4..7), two bits (four steps a byte), one bit (eight).
// A packed matrix is about as large as the file's and holds the same numbers: value = scale · (code - zero) + min.
// Float formats are stored column by column, sixteen rows at a time. Group formats are in packed_groups.h.
#pragma once
#include "activations.h"
#include "ridgeline.h"
#include "simd.h"
#include "workspace.h"

constexpr int kSteps = 8;    // of four columns in a block
constexpr int kSuper = 256;  // columns of a K-quant's super-block

static inline int64_t groups_of(int64_t rows) { return (rows + kLanes - 1) / kLanes; }

// One row of a file's block: what dequantization needs, before it is rearranged.
struct row_block {
    uint8_t codes[kBlock];
    uint16_t d, m;          // half: scale and min of the block, or of the super-block
    int8_t sub_scale[2];    // K-quants: of each group of the block
    uint8_t sub_min[2];
    uint8_t scale[4], zero;  // group formats: the scale in the bytes of its type
};

template <int Format> struct packed;

// Plane access shared by all quantized formats: Bits of a code, Groups scaled on their own in a block.
template <int Bits, int Groups, int Zero, bool Mins> struct quantized {
    static constexpr bool is_float = false, is_grouped = false, mins = Mins;
    static constexpr int bits = Bits, groups = Groups;
    static constexpr int zero_shift = Zero;  // codes are centred on 2^zero_shift; -1: on 0
    static constexpr bool wide = Bits == 8;  // signed bytes, which are multiplied with 16-bit activations
    static constexpr int block_bytes = 64 * Bits;
    static constexpr int run = 1;  // blocks that share their scales
    static constexpr bool has_packed_tiles = true;  // else only single tokens are multiplied straight from it
    static constexpr int code_middle = Bits == 8 ? 128 : Zero < 0 ? 0 : 1 << Zero;  // what `code` has too much

    static codes code(const uint8_t *block, int step) {  // unsigned
        if constexpr (Bits == 8) return codes_flip(load_codes(block + 64 * step));
        if constexpr (Bits == 4) return nibble(block, step);
        if constexpr (Bits == 5) return codes_or(nibble(block, step), bit(block + 256, step, 4));
        if constexpr (Bits == 6) return codes_or(nibble(block, step), codes_left(two(block + 256, step), 4));
        if constexpr (Bits == 3) return codes_or(two(block, step), bit(block + 128, step, 2));
        if constexpr (Bits == 2) return two(block, step);
    }
    static codes nibble(const uint8_t *plane, int step) {
        const codes c = load_codes(plane + 64 * (step % 4));
        return codes_and(step < 4 ? c : codes_right(c, 4), 15);
    }
    static codes two(const uint8_t *plane, int step) {
        return codes_and(codes_right(load_codes(plane + 64 * (step / 4)), 2 * (step % 4)), 3);
    }
    static codes bit(const uint8_t *plane, int step, int place) {  // already moved to its place
        const codes c = load_codes(plane);
        return codes_and(step <= place ? codes_left(c, place - step) : codes_right(c, step - place), 1 << place);
    }

    // Four codes at a time, in the bytes of a word.
    static void put(uint8_t *block, int row, const uint8_t *row_codes) {
        uint32_t words[kSteps];
        std::memcpy(words, row_codes, kBlock);
        const auto write = [&](int place, uint32_t word) { std::memcpy(block + 64 * place + 4 * row, &word, 4); };
        const auto high_bits = [&](int shift, uint32_t mask, int first, int count, int width) {
            uint32_t word = 0;
            for (int i = 0; i < count; i++) word |= (words[first + i] >> shift & mask) << (width * i);
            return word;
        };
        if constexpr (Bits == 8)
            for (int s = 0; s < kSteps; s++) write(s, words[s]);
        if constexpr (Bits >= 4 && Bits < 8)
            for (int s = 0; s < 4; s++)
                write(s, (words[s] & 0x0f0f0f0fu) | (words[s + 4] & 0x0f0f0f0fu) << 4);
        if constexpr (Bits == 5) write(4, high_bits(4, 0x01010101u, 0, 8, 1));
        if constexpr (Bits == 6)
            for (int half = 0; half < 2; half++) write(4 + half, high_bits(4, 0x03030303u, 4 * half, 4, 2));
        if constexpr (Bits < 4)
            for (int half = 0; half < 2; half++) write(half, high_bits(0, 0x03030303u, 4 * half, 4, 2));
        if constexpr (Bits == 3) write(2, high_bits(2, 0x01010101u, 0, 8, 1));
    }
    static int get(const uint8_t *block, int row, int k) {
        const int step = k / 4, byte = 4 * row + k % 4;
        int c = 0;
        if constexpr (Bits == 8) c = (int8_t)block[64 * step + byte];
        if constexpr (Bits >= 4 && Bits < 8) c = block[64 * (step % 4) + byte] >> (step < 4 ? 0 : 4) & 15;
        if constexpr (Bits == 5) c |= (block[256 + byte] >> step & 1) << 4;
        if constexpr (Bits == 6) c |= (block[256 + 64 * (step / 4) + byte] >> (2 * (step % 4)) & 3) << 4;
        if constexpr (Bits < 4) c = block[64 * (step / 4) + byte] >> (2 * (step % 4)) & 3;
        if constexpr (Bits == 3) c |= (block[128 + byte] >> step & 1) << 2;
        return c;
    }
};

// A half-precision scale, and perhaps a min, for every block.
template <int Bits, int Zero, bool Mins> struct block_scaled : quantized<Bits, 1, Zero, Mins> {
    using base = quantized<Bits, 1, Zero, Mins>;
    static constexpr int scale_bytes = Mins ? 64 : 32, stride = base::block_bytes + scale_bytes;
    static constexpr int columns_multiple = kBlock;
    static int64_t group_bytes(int64_t k) { return align64(k / kBlock * stride); }
    static const uint8_t *codes_at(const uint8_t *group, int64_t block) { return group + block * stride; }
    static const uint16_t *scales(const uint8_t *group, int64_t block) {
        return (const uint16_t *)(codes_at(group, block) + base::block_bytes);
    }
    static vf scale(const uint8_t *group, int64_t block, int) { return load(scales(group, block)); }
    // value = d · code + m = d · (code - 2^z) + (m + 2^z · d)
    static vf min(const uint8_t *group, int64_t block, int) {
        const vf m = load(scales(group, block) + kLanes);
        if constexpr (Zero < 0)
            return m;
        else
            return fma(splat((float)(1 << Zero)), load(scales(group, block)), m);
    }
    static void put_scales(uint8_t *group, int64_t block, int row, const row_block &b) {
        uint16_t *s = (uint16_t *)scales(group, block);
        s[row] = b.d;
        if constexpr (Mins) s[kLanes + row] = b.m;
    }
};

// Half-precision scale and min for 256 columns, times a small integer for every group.
template <int Bits, int Groups, int Zero, bool Mins> struct super_scaled : quantized<Bits, Groups, Zero, Mins> {
    using base = quantized<Bits, Groups, Zero, Mins>;
    static constexpr int sub_bytes = Mins ? 32 : 16;
    static constexpr int super_bytes = (Mins ? 64 : 32) + kSuper / kBlock * Groups * sub_bytes;
    static constexpr int blocks_per_super = kSuper / kBlock;
    static constexpr int super_stride = blocks_per_super * base::block_bytes + super_bytes;
    static constexpr int stride = super_stride / blocks_per_super;
    static constexpr int columns_multiple = kSuper;
    static int64_t group_bytes(int64_t k) { return align64(k / kSuper * super_stride); }
    static const uint8_t *codes_at(const uint8_t *group, int64_t block) {
        return group + block / blocks_per_super * super_stride + block % blocks_per_super * base::block_bytes;
    }
    static const uint8_t *super_scales(const uint8_t *group, int64_t block) {
        return group + block / blocks_per_super * super_stride + blocks_per_super * base::block_bytes;
    }
    static const uint8_t *sub_scales(const uint8_t *super, int64_t block, int g) {
        return super + (Mins ? 64 : 32) + (block % blocks_per_super * Groups + g) * sub_bytes;
    }
    static vf scale(const uint8_t *group, int64_t block, int g) {
        const uint8_t *super = super_scales(group, block);
        return mul(load((const uint16_t *)super), load((const int8_t *)sub_scales(super, block, g)));
    }
    static vf min(const uint8_t *group, int64_t block, int g) {  // w = d · sc · q - dmin · m
        const uint8_t *super = super_scales(group, block);
        const vf m = load(sub_scales(super, block, g) + 16);
        const vf lowest = sub(zero(), mul(load((const uint16_t *)super + kLanes), m));
        if constexpr (Zero < 0)
            return lowest;
        else
            return fma(splat((float)(1 << Zero)), scale(group, block, g), lowest);
    }
    static void put_scales(uint8_t *group, int64_t block, int row, const row_block &b) {
        uint8_t *super = (uint8_t *)super_scales(group, block);
        ((uint16_t *)super)[row] = b.d;
        if constexpr (Mins) ((uint16_t *)super)[kLanes + row] = b.m;
        for (int g = 0; g < Groups; g++) {
            uint8_t *sub = (uint8_t *)sub_scales(super, block, g);
            sub[row] = (uint8_t)b.sub_scale[g];
            if constexpr (Mins) sub[16 + row] = b.sub_min[g];
        }
    }
};

// The files' layouts (ggml-common.h; spelled out in quant/gguf_blocks.py): `read` gives block b of a row.
static inline uint16_t half_at(const uint8_t *p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    return h;
}
static inline void split_nibbles(const uint8_t *q, uint8_t *codes) {
    for (int i = 0; i < 16; i++) {
        codes[i] = q[i] & 15;
        codes[16 + i] = q[i] >> 4;
    }
}
static inline void add_fifth_bits(const uint8_t *high, uint8_t *codes) {
    uint32_t fifth;
    std::memcpy(&fifth, high, 4);
    for (int i = 0; i < kBlock; i++) codes[i] |= (uint8_t)((fifth >> i & 1) << 4);
}
// Scales and mins of Q4_K and Q5_K: eight of 6 bits each in 12 bytes.
static inline void six_bit_pair(const uint8_t *s, int j, int8_t *scale, uint8_t *min) {
    if (j < 4) {
        *scale = (int8_t)(s[j] & 63);
        *min = s[j + 4] & 63;
    } else {
        *scale = (int8_t)((s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
        *min = (uint8_t)((s[j + 4] >> 4) | (s[j] >> 6) << 4);
    }
}

template <> struct packed<RL_Q4_0> : block_scaled<4, 3, false> {
    static constexpr int file_bytes = 18;
    static void read(const uint8_t *row, int64_t b, row_block &out) {
        out.d = half_at(row + 18 * b);
        split_nibbles(row + 18 * b + 2, out.codes);
    }
};
template <> struct packed<RL_Q4_1> : block_scaled<4, -1, true> {
    static constexpr int file_bytes = 20;
    static void read(const uint8_t *row, int64_t b, row_block &out) {
        out.d = half_at(row + 20 * b);
        out.m = half_at(row + 20 * b + 2);
        split_nibbles(row + 20 * b + 4, out.codes);
    }
};
template <> struct packed<RL_Q5_0> : block_scaled<5, 4, false> {
    static constexpr int file_bytes = 22;
    static void read(const uint8_t *row, int64_t b, row_block &out) {
        out.d = half_at(row + 22 * b);
        split_nibbles(row + 22 * b + 6, out.codes);
        add_fifth_bits(row + 22 * b + 2, out.codes);
    }
};
template <> struct packed<RL_Q5_1> : block_scaled<5, 4, true> {
    static constexpr int file_bytes = 24;
    static void read(const uint8_t *row, int64_t b, row_block &out) {
        out.d = half_at(row + 24 * b);
        out.m = half_at(row + 24 * b + 2);
        split_nibbles(row + 24 * b + 8, out.codes);
        add_fifth_bits(row + 24 * b + 4, out.codes);
    }
};
template <> struct packed<RL_Q8_0> : block_scaled<8, -1, false> {
    static constexpr int file_bytes = 34;
    static void read(const uint8_t *row, int64_t b, row_block &out) {
        out.d = half_at(row + 34 * b);
        std::memcpy(out.codes, row + 34 * b + 2, kBlock);
    }
};
template <> struct packed<RL_Q2_K> : super_scaled<2, 2, -1, true> {
    static constexpr int file_bytes = 84;  // scales[16] q[64] d dmin
    static void read(const uint8_t *row, int64_t b, row_block &out) {
        const uint8_t *super = row + b / 8 * 84, *q = super + 16 + b % 8 / 4 * 32;
        for (int i = 0; i < kBlock; i++) out.codes[i] = q[i] >> (2 * (b % 4)) & 3;
        for (int g = 0; g < 2; g++) {
            out.sub_scale[g] = super[2 * (b % 8) + g] & 15;
            out.sub_min[g] = super[2 * (b % 8) + g] >> 4;
        }
        out.d = half_at(super + 80);
        out.m = half_at(super + 82);
    }
};
template <> struct packed<RL_Q3_K> : super_scaled<3, 2, 2, false> {
    static constexpr int file_bytes = 110;  // high[32] q[64] scales[12] d
    static void read(const uint8_t *row, int64_t b, row_block &out) {
        const uint8_t *super = row + b / 8 * 110, *q = super + 32 + b % 8 / 4 * 32, *s = super + 96;
        for (int i = 0; i < kBlock; i++)
            out.codes[i] = (uint8_t)((q[i] >> (2 * (b % 4)) & 3) | (super[i] >> (b % 8) & 1) << 2);
        for (int g = 0; g < 2; g++) {
            const int j = (int)(2 * (b % 8)) + g;
            const int low = j < 8 ? s[j] & 15 : s[j - 8] >> 4;
            out.sub_scale[g] = (int8_t)((low | (s[8 + j % 4] >> (2 * (j / 4)) & 3) << 4) - 32);
        }
        out.d = half_at(super + 108);
    }
};
template <> struct packed<RL_Q4_K> : super_scaled<4, 1, -1, true> {
    static constexpr int file_bytes = 144;  // d dmin scales[12] q[128]
    static void read(const uint8_t *row, int64_t b, row_block &out) {
        const uint8_t *super = row + b / 8 * 144, *q = super + 16 + b % 8 / 2 * 32;
        for (int i = 0; i < kBlock; i++) out.codes[i] = q[i] >> (4 * (b % 2)) & 15;
        six_bit_pair(super + 4, (int)(b % 8), out.sub_scale, out.sub_min);
        out.d = half_at(super);
        out.m = half_at(super + 2);
    }
};
template <> struct packed<RL_Q5_K> : super_scaled<5, 1, 4, true> {
    static constexpr int file_bytes = 176;  // d dmin scales[12] high[32] q[128]
    static void read(const uint8_t *row, int64_t b, row_block &out) {
        const uint8_t *super = row + b / 8 * 176, *q = super + 48 + b % 8 / 2 * 32;
        for (int i = 0; i < kBlock; i++)
            out.codes[i] = (uint8_t)((q[i] >> (4 * (b % 2)) & 15) | (super[16 + i] >> (b % 8) & 1) << 4);
        six_bit_pair(super + 4, (int)(b % 8), out.sub_scale, out.sub_min);
        out.d = half_at(super);
        out.m = half_at(super + 2);
    }
};
template <> struct packed<RL_Q6_K> : super_scaled<6, 2, 5, false> {
    static constexpr int file_bytes = 210;  // low[128] high[64] scales[16] d
    static void read(const uint8_t *row, int64_t b, row_block &out) {
        const uint8_t *super = row + b / 8 * 210;
        const int64_t half = b % 8 / 4, quarter = b % 4;
        const uint8_t *low = super + 64 * half + 32 * (quarter % 2), *high = super + 128 + 32 * half;
        for (int i = 0; i < kBlock; i++)
            out.codes[i] = (uint8_t)((low[i] >> (4 * (quarter / 2)) & 15) | (high[i] >> (2 * quarter) & 3) << 4);
        for (int g = 0; g < 2; g++) out.sub_scale[g] = (int8_t)super[192 + 2 * (b % 8) + g];
        out.d = half_at(super + 208);
    }
};

template <class T> struct float_columns {
    static constexpr bool is_float = true, wide = false;
    static constexpr int columns_multiple = 1;
    using element = T;
    static int64_t group_bytes(int64_t k) { return k * kLanes * (int64_t)sizeof(T); }
};
template <> struct packed<RL_F32> : float_columns<float> {
    static vf column(const uint8_t *group, int64_t k) { return load((const float *)group + kLanes * k); }
};
template <> struct packed<RL_F16> : float_columns<uint16_t> {
    static vf column(const uint8_t *group, int64_t k) { return load((const uint16_t *)group + kLanes * k); }
};
template <> struct packed<RL_BF16> : float_columns<uint16_t> {
    static vf column(const uint8_t *group, int64_t k) { return load_bfloat((const uint16_t *)group + kLanes * k); }
};
