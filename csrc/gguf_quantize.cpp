// GGUF's blocks from float32: scales from gguf_search.h, codes, and how both are packed (quant/gguf_blocks.py).
#include "gguf_quantize.h"

#include <algorithm>

#include "gguf_search.h"
#include "ridgeline.h"

namespace {

// A run of bytes takes `bits` bits (from `shift` on) of its first `run` codes, then the next higher bits of the next.
void pack(const uint8_t *codes, int count, int shift, int bits, int run, uint8_t *bytes) {
    const int mask = (1 << bits) - 1, each = 8 / bits;
    for (int start = 0; start < count; start += each * run, bytes += run)
        for (int i = 0; i < run; i++) {
            int byte = 0;
            for (int j = 0; j < each; j++) byte |= (codes[start + j * run + i] >> shift & mask) << (j * bits);
            bytes[i] = (uint8_t)byte;
        }
}

// Eight 6-bit scales and minima in 12 bytes; the layout is told in quant/gguf_blocks.py.
void pack_scales_and_mins(const uint8_t *scales, const uint8_t *mins, uint8_t *bytes) {
    for (int j = 0; j < 4; j++) {
        bytes[j] = scales[j] | scales[j + 4] >> 4 << 6;
        bytes[j + 4] = mins[j] | mins[j + 4] >> 4 << 6;
        bytes[j + 8] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4;
    }
}

float sum_of_squares(const float *x, int count) {
    float sum = 0.0f;
    for (int i = 0; i < count; i++) sum += x[i] * x[i];
    return sum;
}

// The 256 codes of a super-block and the codes of its groups' scales and minima, before they are packed.
struct super_block {
    uint8_t codes[kSuperBlock], scales[16], mins[16];
    float d, dmin;
};

// The weights of a group's squared errors by importance; `variance` is about twice or once that of the surroundings.
template <int N> void weigh(const floats *x, const float *importance, float variance, floats *weight) {
    load_groups<N>(importance, weight);
    for (int i = 0; i < N; i++) weight[i] = weight[i] * square_root(variance + x[i] * x[i]);
}
template <int N> floats total(const floats *weight) {
    floats sum{};
    for (int i = 0; i < N; i++) sum += weight[i];
    return sum;
}

// Codes once more, for the scale and minimum that were stored; a group whose scale became 0 keeps what it has.
template <int N> void take_codes(const floats *x, floats scale, floats min, int low, int high, ints *q) {
    for (int i = 0; i < N; i++) {
        const ints code = clamp(nearest((x[i] + min) / scale), low, high) - low;
        q[i] = scale == 0.0f ? q[i] : code;
    }
}

// Q2_K, Q4_K, Q5_K.
template <int N>
void encode_affine(const float *values, const float *importance, int max_code, int max_scale, const search &plain,
                   super_block *out) {
    constexpr int kGroups = kSuperBlock / N, kParts = kGroups / kAtOnce;
    floats x[kParts][N], weight[N], sum_w[kParts], scale[kParts], min[kParts];
    ints q[kParts][N];
    const float squares = importance ? sum_of_squares(values, kSuperBlock) : 0.0f;
    const float variance = (N == 16 ? squares : 2 * squares) / kSuperBlock;
    for (int part = 0; part < kParts; part++) {
        const int start = part * kAtOnce * N;
        load_groups<N>(values + start, x[part]);
        if (importance) {
            weigh<N>(x[part], importance + start, variance, weight);
        } else {
            floats sum{};
            for (int i = 0; i < N; i++) sum += x[part][i] * x[part][i];
            const floats mean = N == 16 ? floats{} : square_root(sum / (float)N);
            for (int i = 0; i < N; i++) weight[i] = mean + absolute(x[part][i]);
        }
        sum_w[part] = total<N>(weight);
        scale[part] = fit_affine<N>(x[part], weight, max_code, importance ? kByImportance : plain, q[part], &min[part]);
    }

    // Lane 0 holds the scales, lane 1 the minima.
    floats both[kGroups], weights[kGroups], top{};
    ints found[kGroups];
    for (int j = 0; j < kGroups; j++) {
        both[j] = floats{scale[j / kAtOnce][j % kAtOnce], min[j / kAtOnce][j % kAtOnce]};
        weights[j] = all(sum_w[j / kAtOnce][j % kAtOnce]);
        top = both[j] > top ? both[j] : top;
    }
    floats d = top / (float)max_scale;
    if (importance) {
        d = fit_positive<kGroups>(both, weights, max_scale, found);
    } else {
        const floats inverse = top > 0.0f ? (float)max_scale / top : floats{};
        for (int j = 0; j < kGroups; j++) found[j] = nearest(inverse * both[j]);
    }
    out->d = d[0];
    out->dmin = d[1];
    for (int j = 0; j < kGroups; j++) {
        if (N == 16 && found[j][0] > max_scale) {  // negative, in a group of one sign: ggml lets it wrap in its byte
            found[j][1] |= found[j][0] >> 4;
            found[j][0] &= max_scale;
        }
        const ints code = clamp(found[j], 0, max_scale);
        out->scales[j] = (uint8_t)code[0];
        out->mins[j] = (uint8_t)code[1];
    }

    d = stored(d);
    for (int part = 0; part < kParts; part++) {
        floats group_scale, group_min;
        for (int lane = 0; lane < kAtOnce; lane++) {
            group_scale[lane] = d[0] * out->scales[part * kAtOnce + lane];
            group_min[lane] = d[1] * out->mins[part * kAtOnce + lane];
        }
        take_codes<N>(x[part], group_scale, group_min, 0, max_code, q[part]);
        store_codes<N>(q[part], out->codes + part * kAtOnce * N);
    }
}

// Q3_K and Q6_K: groups of 16, codes -half .. half - 1 (stored plus half), signed scales likewise.
void encode_symmetric(const float *values, const float *importance, bool three_bits, super_block *out) {
    constexpr int N = 16, kGroups = kSuperBlock / N, kParts = kGroups / kAtOnce;
    const int half = three_bits ? 4 : 32, half_scales = three_bits ? 32 : 128;
    floats x[kParts][N], weight[N], scale[kParts], peak_of[kGroups], weights[kGroups];
    ints q[kParts][N];
    const float variance = importance ? 2 * sum_of_squares(values, kSuperBlock) / kSuperBlock : 0.0f;
    for (int part = 0; part < kParts; part++) {
        const int start = part * kAtOnce * N;
        load_groups<N>(values + start, x[part]);
        if (three_bits && !importance) {
            scale[part] = fit_three_bits(x[part], q[part]);
        } else {
            if (three_bits)
                weigh<N>(x[part], importance + start, variance, weight);
            else if (importance)
                load_groups<N>(importance + start, weight);
            else
                for (int i = 0; i < N; i++) weight[i] = x[part][i] * x[part][i];
            scale[part] = fit_symmetric<N>(x[part], weight, half, q[part]);
        }
        const floats sum_w = total<N>(weight);
        for (int lane = 0; lane < kAtOnce; lane++) {
            peak_of[part * kAtOnce + lane] = all(scale[part][lane]);
            weights[part * kAtOnce + lane] = all(sum_w[lane]);
        }
    }

    floats largest, d{};
    const floats peak = signed_peak<kGroups>(peak_of, &largest);
    ints found[kGroups] = {};
    if (three_bits && importance) {
        d = fit_symmetric<kGroups>(peak_of, weights, half_scales, found);
    } else if (three_bits ? largest[0] > 0.0f : largest[0] >= kTiny) {
        const floats inverse = (float)-half_scales / peak;
        d = 1.0f / inverse;
        for (int j = 0; j < kGroups; j++)
            found[j] = clamp(nearest(inverse * peak_of[j]), -half_scales, half_scales - 1) + half_scales;
    } else if (!three_bits) {  // as ggml has it: a block of zero bytes
        *out = {};
        std::fill_n(out->scales, kGroups, (uint8_t)half_scales);
        return;
    }
    out->d = d[0];
    for (int j = 0; j < kGroups; j++) out->scales[j] = (uint8_t)found[j][0];

    d = stored(d);
    for (int part = 0; part < kParts; part++) {
        floats group_scale;
        for (int lane = 0; lane < kAtOnce; lane++)
            group_scale[lane] = d[0] * (out->scales[part * kAtOnce + lane] - half_scales);
        take_codes<N>(x[part], group_scale, floats{}, -half, half - 1, q[part]);
        store_codes<N>(q[part], out->codes + part * kAtOnce * N);
    }
}

void encode_super_block(rl_format format, const float *values, const float *importance, uint8_t *bytes) {
    super_block b;
    switch (format) {
    case RL_Q2_K:
        encode_affine<16>(values, importance, 3, 15, {-0.5f, 0.1f, 15, true, false}, &b);
        for (int j = 0; j < 16; j++) bytes[j] = b.scales[j] | b.mins[j] << 4;
        pack(b.codes, 256, 0, 2, 32, bytes + 16);
        store_half(bytes + 80, b.d);
        store_half(bytes + 82, b.dmin);
        return;
    case RL_Q3_K:
        encode_symmetric(values, importance, true, &b);
        pack(b.codes, 256, 2, 1, 32, bytes);
        pack(b.codes, 256, 0, 2, 32, bytes + 32);
        pack(b.scales, 16, 0, 4, 8, bytes + 96);
        pack(b.scales, 16, 4, 2, 4, bytes + 104);
        store_half(bytes + 108, b.d);
        return;
    case RL_Q4_K:
    case RL_Q5_K: {
        const bool five = format == RL_Q5_K;
        const search plain = five ? search{-0.5f, 0.1f, 15, false, false} : search{-1.0f, 0.1f, 20, false, false};
        encode_affine<32>(values, importance, five ? 31 : 15, 63, plain, &b);
        store_half(bytes, b.d);
        store_half(bytes + 2, b.dmin);
        pack_scales_and_mins(b.scales, b.mins, bytes + 4);
        if (five) pack(b.codes, 256, 4, 1, 32, bytes + 16);
        pack(b.codes, 256, 0, 4, 32, bytes + (five ? 48 : 16));
        return;
    }
    default:
        encode_symmetric(values, importance, false, &b);
        pack(b.codes, 256, 0, 4, 64, bytes);
        pack(b.codes, 256, 4, 2, 32, bytes + 128);
        for (int j = 0; j < 16; j++) bytes[192 + j] = (uint8_t)(b.scales[j] - 128);
        store_half(bytes + 208, b.d);
    }
}

// Eight blocks of Q4_0, Q4_1, Q5_0 or Q5_1, of which `count` are written.
void encode_blocks(rl_format format, const float *values, const float *importance, float variance, int count,
                   uint8_t *bytes) {
    constexpr int N = 32;
    const bool affine = format == RL_Q4_1 || format == RL_Q5_1, five = format == RL_Q5_0 || format == RL_Q5_1;
    const int max_code = five ? 31 : 15;
    floats x[N], weight[N], min{}, d;
    ints q[N];
    load_groups<N>(values, x);
    weigh<N>(x, importance, variance, weight);
    d = affine ? fit_affine<N>(x, weight, max_code, kByImportance, q, &min)
               : fit_symmetric<N>(x, weight, (max_code + 1) / 2, q);
    uint8_t codes[kAtOnce * N];
    store_codes<N>(q, codes);
    for (int block = 0; block < count; block++) {
        store_half(bytes, d[block]);
        bytes += 2;
        if (affine) {
            store_half(bytes, -min[block]);
            bytes += 2;
        }
        if (five) {
            pack(codes + block * N, N, 4, 1, 1, bytes);
            bytes += 4;
        }
        pack(codes + block * N, N, 0, 4, 16, bytes);
        bytes += 16;
    }
}

// Bytes of a block; 0: no encoder.
int block_bytes(rl_format format) {
    switch (format) {
    case RL_Q4_0: return 18;
    case RL_Q4_1: return 20;
    case RL_Q5_0: return 22;
    case RL_Q5_1: return 24;
    case RL_Q2_K: return 84;
    case RL_Q3_K: return 110;
    case RL_Q4_K: return 144;
    case RL_Q5_K: return 176;
    case RL_Q6_K: return 210;
    default: return 0;
    }
}

}  // namespace

int32_t rl_gguf_quantize(int32_t format_number, const float *values, int64_t rows, int32_t columns,
                         const float *importance, uint8_t *blocks) {
    const rl_format format = (rl_format)format_number;
    const int num_bytes = block_bytes(format);
    const bool super = format >= RL_Q2_K;
    if (num_bytes == 0 || (!super && !importance)) return -1;

    if (super) {
        for (int64_t row = 0; row < rows; row++)
            for (int start = 0; start < columns; start += kSuperBlock, values += kSuperBlock, blocks += num_bytes)
                encode_super_block(format, values, importance ? importance + start : nullptr, blocks);
        return 0;
    }
    constexpr int kStride = 32 * kAtOnce;
    for (int64_t row = 0; row < rows; row++, values += columns) {
        const float variance = sum_of_squares(values, columns) / columns;
        for (int start = 0; start < columns; start += kStride) {
            const int count = std::min(kAtOnce, (columns - start) / 32);
            float x[kStride] = {}, weight[kStride] = {};
            std::copy_n(values + start, 32 * count, x);
            std::copy_n(importance + start, 32 * count, weight);
            encode_blocks(format, x, weight, variance, count, blocks);
            blocks += (int64_t)count * num_bytes;
        }
    }
    return 0;
}
