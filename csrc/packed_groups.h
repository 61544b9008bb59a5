// Group formats (quant/groups.py): codes with a scale and a zero point for every Span columns, value = scale · (code -
// zero). Longer groups of the file repeat theirs; symmetric ones get the middle as zero point, so that there is one form.
// Codes and zero points of 8 bits are centred: signed bytes.
#pragma once
#include <type_traits>

#include "packed.h"

struct file_groups {
    int64_t size;  // columns of a group; 0: no group format
    bool has_zeros;
};

template <int Bits, class Scale, int Span>
struct group_scaled : quantized<Bits, 1, -1, true> {
    using base = quantized<Bits, 1, -1, true>;
    using zero_point = std::conditional_t<Bits == 8, int8_t, uint8_t>;
    static constexpr bool is_grouped = true;
    // The rest is rare: compiling tiles of every size for it too would take longer than all else.
    static constexpr bool has_packed_tiles = (Bits == 4 || Bits == 8) && sizeof(Scale) == 2;
    static constexpr int run = Span / kBlock;
    static constexpr int columns_multiple = run * kBlock;
    static constexpr int scales_bytes = kLanes * (int)sizeof(Scale);
    static constexpr int run_stride = run * base::block_bytes + scales_bytes + kLanes;
    static constexpr int stride = run_stride / run;
    static int64_t group_bytes(int64_t k) { return align64(k / columns_multiple * run_stride); }
    static const uint8_t *codes_at(const uint8_t *group, int64_t block) {
        return group + block / run * run_stride + block % run * base::block_bytes;
    }
    static const Scale *scales(const uint8_t *group, int64_t block) {
        return (const Scale *)(group + block / run * run_stride + run * base::block_bytes);
    }
    static const zero_point *zeros(const uint8_t *group, int64_t block) {
        return (const zero_point *)((const uint8_t *)scales(group, block) + scales_bytes);
    }
    static vf scale(const uint8_t *group, int64_t block, int) { return load(scales(group, block)); }
    static vf min(const uint8_t *group, int64_t block, int g) {
        return sub(::zero(), mul(scale(group, block, g), load(zeros(group, block))));
    }
    static void put_scales(uint8_t *group, int64_t block, int row, const row_block &b) {
        std::memcpy((Scale *)scales(group, block) + row, b.scale, sizeof(Scale));
        ((uint8_t *)zeros(group, block))[row] = b.zero;
    }

    // A block of the file: scale, zero point unless symmetric, codes packed densely from the lowest bit.
    static int64_t block_bytes_of(file_groups file) { return (int64_t)sizeof(Scale) + file.has_zeros + file.size * Bits / 8; }
    static int64_t row_bytes(int64_t k, file_groups file) { return k / file.size * block_bytes_of(file); }
    static void read(const uint8_t *row, int64_t b, row_block &out, file_groups file) {
        constexpr uint8_t centre = Bits == 8 ? 128 : 0;
        const int64_t column = b * kBlock;
        const uint8_t *block = row + column / file.size * block_bytes_of(file), *at = block + sizeof(Scale);
        std::memcpy(out.scale, block, sizeof(Scale));
        out.zero = (file.has_zeros ? *at++ : 1 << (Bits - 1)) ^ centre;
        at += column % file.size * Bits / 8;
        if constexpr (Bits == 3)
            for (int i = 0; i < kBlock; i += 8, at += 3)
                for (int j = 0; j < 8; j++) out.codes[i + j] = (at[0] | at[1] << 8 | at[2] << 16) >> (3 * j) & 7;
        else
            for (int i = 0; i < kBlock; i++)
                out.codes[i] = (at[i * Bits / 8] >> (i * Bits % 8) & ((1 << Bits) - 1)) ^ centre;
    }
};

template <int Bits, class F> static inline bool with_group_format_of(int32_t variant, const F &fn) {
    switch (variant) {
        case 0: fn(group_scaled<Bits, uint16_t, 32>{}); return true;
        case 1: fn(group_scaled<Bits, uint16_t, 64>{}); return true;
        case 8: fn(group_scaled<Bits, float, 32>{}); return true;
        case 9:
            if constexpr (Bits >= 4) fn(group_scaled<Bits, float, 64>{});
            return Bits >= 4;
        default: return false;
    }
}

template <class F> static inline bool with_group_format(int32_t format, const F &fn) {
    const int32_t variant = format & 15;
    switch (format & ~15) {
        case RL_GROUPS + 16 * 2: return with_group_format_of<2>(variant, fn);
        case RL_GROUPS + 16 * 3: return with_group_format_of<3>(variant, fn);
        case RL_GROUPS + 16 * 4: return with_group_format_of<4>(variant, fn);
        case RL_GROUPS + 16 * 8: return with_group_format_of<8>(variant, fn);
        default: return false;
    }
}
