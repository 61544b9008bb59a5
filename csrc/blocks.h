// Rows of every weight format the interpreter reads, unpacked to float. Layouts: ridgeline/quant/gguf_blocks.py.
#pragma once
#include "ridgeline.h"
#include "simd.h"

struct block_q4_0 { uint16_t d; uint8_t q[16]; };
struct block_q4_1 { uint16_t d, m; uint8_t q[16]; };
struct block_q5_0 { uint16_t d; uint8_t high[4]; uint8_t q[16]; };
struct block_q5_1 { uint16_t d, m; uint8_t high[4]; uint8_t q[16]; };
struct block_q8_0 { uint16_t d; int8_t q[32]; };
static_assert(sizeof(block_q4_0) == 18 && sizeof(block_q4_1) == 20, "Q4 block");
static_assert(sizeof(block_q5_0) == 22 && sizeof(block_q5_1) == 24, "Q5 block");
static_assert(sizeof(block_q8_0) == 34, "Q8_0 block");

// Bytes of a row of K elements; 0: not a format we read.
static inline int64_t row_bytes(int32_t format, int64_t k) {
    switch (format) {
        case RL_F32: return 4 * k;
        case RL_F16: case RL_BF16: return 2 * k;
        case RL_Q4_0: return k / 32 * (int64_t)sizeof(block_q4_0);
        case RL_Q4_1: return k / 32 * (int64_t)sizeof(block_q4_1);
        case RL_Q5_0: return k / 32 * (int64_t)sizeof(block_q5_0);
        case RL_Q5_1: return k / 32 * (int64_t)sizeof(block_q5_1);
        case RL_Q8_0: return k / 32 * (int64_t)sizeof(block_q8_0);
        default: return 0;
    }
}

// 32 elements: low nibbles are elements 0..15, high ones 16..31; w = d * (q + shift) + m.
static inline void unpack_nibbles(const uint8_t *q, float d, float shift, float m, float *out) {
    for (int i = 0; i < 16; i += 8) {
        uint64_t packed = load<uint64_t>(q + i), nibbles = 0x0f0f0f0f0f0f0f0full;
        v8f low = to_float((v8u8)(packed & nibbles));
        v8f high = to_float((v8u8)(packed >> 4 & nibbles));
        store(out + i, (low + splat(shift)) * splat(d) + splat(m));
        store(out + 16 + i, (high + splat(shift)) * splat(d) + splat(m));
    }
}

static inline void unpack_nibbles_5(const uint8_t *q, const uint8_t *high, float d, float shift, float m, float *out) {
    uint32_t fifth;
    std::memcpy(&fifth, high, 4);
    for (int j = 0; j < 16; j++) {
        int low_bits = (q[j] & 15) | ((fifth >> j & 1) << 4);
        int high_bits = (q[j] >> 4) | ((fifth >> (j + 16) & 1) << 4);
        out[j] = (low_bits + shift) * d + m;
        out[j + 16] = (high_bits + shift) * d + m;
    }
}

// k elements of one row, as float.
static inline void unpack_row(int32_t format, const void *row, int64_t k, float *out) {
    switch (format) {
        case RL_F32: std::memcpy(out, row, 4 * k); break;
        case RL_F16: {
            const uint16_t *h = (const uint16_t *)row;
            int64_t i = 0;
            for (; i + 8 <= k; i += 8) store(out + i, half_to_float(load<v8u16>(h + i)));
            for (; i < k; i++) out[i] = half_to_float(h[i]);
            break;
        }
        case RL_BF16: {
            const uint16_t *h = (const uint16_t *)row;
            for (int64_t i = 0; i < k; i++) {
                uint32_t u = (uint32_t)h[i] << 16;
                std::memcpy(out + i, &u, 4);
            }
            break;
        }
        case RL_Q4_0: {
            const block_q4_0 *b = (const block_q4_0 *)row;
            for (int64_t i = 0; i < k / 32; i++) unpack_nibbles(b[i].q, half_to_float(b[i].d), -8, 0, out + 32 * i);
            break;
        }
        case RL_Q4_1: {
            const block_q4_1 *b = (const block_q4_1 *)row;
            for (int64_t i = 0; i < k / 32; i++)
                unpack_nibbles(b[i].q, half_to_float(b[i].d), 0, half_to_float(b[i].m), out + 32 * i);
            break;
        }
        case RL_Q5_0: {
            const block_q5_0 *b = (const block_q5_0 *)row;
            for (int64_t i = 0; i < k / 32; i++)
                unpack_nibbles_5(b[i].q, b[i].high, half_to_float(b[i].d), -16, 0, out + 32 * i);
            break;
        }
        case RL_Q5_1: {
            const block_q5_1 *b = (const block_q5_1 *)row;
            for (int64_t i = 0; i < k / 32; i++)
                unpack_nibbles_5(b[i].q, b[i].high, half_to_float(b[i].d), 0, half_to_float(b[i].m), out + 32 * i);
            break;
        }
        case RL_Q8_0: {
            const block_q8_0 *b = (const block_q8_0 *)row;
            for (int64_t i = 0; i < k / 32; i++) {
                v8f d = splat(half_to_float(b[i].d));
                for (int j = 0; j < 32; j += 8)
                    store(out + 32 * i + j, to_float(load<v8s8>(b[i].q + j)) * d);
            }
            break;
        }
    }
}
