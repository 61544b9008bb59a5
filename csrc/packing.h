// From a file's rows to a packed matrix and back: what the interpreter does with a format known only at run time.
#pragma once
#include "packed_groups.h"

// fn(packed<Format>{}) for a format known only at run time; false: there is no such kernel.
template <class F> static inline bool with_format(int32_t format, const F &fn) {
    switch (format) {
        case RL_F32: fn(packed<RL_F32>{}); return true;
        case RL_F16: fn(packed<RL_F16>{}); return true;
        case RL_BF16: fn(packed<RL_BF16>{}); return true;
        case RL_Q4_0: fn(packed<RL_Q4_0>{}); return true;
        case RL_Q4_1: fn(packed<RL_Q4_1>{}); return true;
        case RL_Q5_0: fn(packed<RL_Q5_0>{}); return true;
        case RL_Q5_1: fn(packed<RL_Q5_1>{}); return true;
        case RL_Q8_0: fn(packed<RL_Q8_0>{}); return true;
        case RL_Q2_K: fn(packed<RL_Q2_K>{}); return true;
        case RL_Q3_K: fn(packed<RL_Q3_K>{}); return true;
        case RL_Q4_K: fn(packed<RL_Q4_K>{}); return true;
        case RL_Q5_K: fn(packed<RL_Q5_K>{}); return true;
        case RL_Q6_K: fn(packed<RL_Q6_K>{}); return true;
        default: return with_group_format(format, fn);
    }
}

// Rows begin..end of [rows, k] from the file's layout; rows past the end are zero. `groups`: of a group format.
template <class P>
void pack_rows(const uint8_t *file_rows, file_groups groups, int64_t begin, int64_t end, int64_t k, uint8_t *out) {
    for (int64_t g = begin / kLanes; g < groups_of(end); g++) {
        uint8_t *group = out + g * P::group_bytes(k);
        const int valid = (int)(end - g * kLanes < kLanes ? end - g * kLanes : kLanes);
        if constexpr (P::is_float) {
            using T = typename P::element;
            for (int64_t i = 0; i < k; i++)
                for (int r = 0; r < kLanes; r++)
                    ((T *)group)[i * kLanes + r] = r < valid ? ((const T *)file_rows)[(g * kLanes + r) * k + i] : T{};
        } else {
            std::memset(group, 0, P::group_bytes(k));
            for (int r = 0; r < valid; r++)
                for (int64_t b = 0; b < k / kBlock; b++) {
                    row_block block;
                    if constexpr (P::is_grouped)
                        P::read(file_rows + (g * kLanes + r) * P::row_bytes(k, groups), b, block, groups);
                    else
                        P::read(file_rows + (g * kLanes + r) * (k / P::columns_multiple * P::file_bytes), b, block);
                    P::put((uint8_t *)P::codes_at(group, b), r, block.codes);
                    P::put_scales(group, b, r, block);
                }
        }
    }
}

// One row of a packed matrix as floats: the embedding gather of a tied head. `order`: of its columns, or nullptr.
template <class P> void unpack_row(const uint8_t *matrix, const int32_t *order, int64_t row, int64_t k, float *out) {
    const auto at = [&](int64_t column) -> float & { return out[order ? order[column] : column]; };
    const uint8_t *group = matrix + row / kLanes * P::group_bytes(k);
    const int r = (int)(row % kLanes);
    alignas(64) float lanes[kLanes], mins[kLanes];
    if constexpr (P::is_float) {
        for (int64_t i = 0; i < k; i++) {
            store(lanes, P::column(group, i));
            at(i) = lanes[r];
        }
    } else {
        for (int64_t b = 0; b < k / kBlock; b++)
            for (int g = 0; g < P::groups; g++) {
                store(lanes, P::scale(group, b, g));
                if constexpr (P::mins) store(mins, P::min(group, b, g));
                for (int i = g * kBlock / P::groups; i < (g + 1) * kBlock / P::groups; i++) {
                    int code = P::get(P::codes_at(group, b), r, i);
                    if constexpr (P::zero_shift >= 0) code -= 1 << P::zero_shift;
                    at(b * kBlock + i) = lanes[r] * (float)code + (P::mins ? mins[r] : 0.0f);
                }
            }
    }
}

// Column j of sixteen rows of a quantized matrix as floats.
template <class P> static inline vf unpack_column(const uint8_t *group, int64_t j) {
    const int64_t block = j / kBlock;
    const int place = (int)(j % kBlock), g = place / (kBlock / P::groups);
    const vf code = lane_byte(P::code(P::codes_at(group, block), place / 4), place % 4);
    const vf value = mul(P::scale(group, block, g), sub(code, splat((float)P::code_middle)));
    if constexpr (P::mins)
        return add(value, P::min(group, block, g));
    else
        return value;
}
