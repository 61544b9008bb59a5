// Replays a Program: one call runs every instruction of a step over float32 buffers.
// Each output element is computed by one thread in one order, whatever else is in the step: tokens do not depend
// on the batch, on chunking or on the number of threads. Letters as in ops/interface.py.
#include <algorithm>
#include <vector>

#include "blocks.h"
#include "ridgeline.h"
#include "simd.h"
#include "thread_pool.h"

namespace {
constexpr int kTile = 32;          // tokens of a KV tile
constexpr int kRowGroup = 4;       // weight rows of the matrix kernel
constexpr int kTokenGroup = 3;     // tokens of the matrix kernel: 12 sums fit the 16 AVX registers
constexpr int kRowsPerChunk = 16;  // weight rows unpacked at a time
constexpr int kTokensPerPanel = 96;

// R x M dot products of length k: out[m][r] at out + m * out_stride + r.
template <int R, int M>
void dots(const float *w, const float *x, int64_t k, const float *bias, float *out, int64_t out_stride) {
    v8f sums[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r][m] = splat(0);
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        v8f xs[M];
        for (int m = 0; m < M; m++) xs[m] = load<v8f>(x + m * k + i);
        for (int r = 0; r < R; r++) {
            v8f ws = load<v8f>(w + r * k + i);
            for (int m = 0; m < M; m++) sums[r][m] += ws * xs[m];
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) {
            float total = sum(sums[r][m]);
            for (int64_t j = i; j < k; j++) total += w[r * k + j] * x[m * k + j];
            out[m * out_stride + r] = bias ? total + bias[r] : total;
        }
}

template <int R>
void dots_for_tokens(const float *w, const float *x, int64_t k, int64_t num_tokens, const float *bias, float *out,
                     int64_t n) {
    int64_t t = 0;
    for (; t + kTokenGroup <= num_tokens; t += kTokenGroup)
        dots<R, kTokenGroup>(w, x + t * k, k, bias, out + t * n, n);
    for (; t < num_tokens; t++) dots<R, 1>(w, x + t * k, k, bias, out + t * n, n);
}

v8f sigmoid(v8f x) {
    v8f magnitude = x < splat(0) ? x : -x;
    v8f e = exp_nonpositive(magnitude);
    v8f positive = splat(1) / (splat(1) + e);
    return x < splat(0) ? e * positive : positive;
}
v8f gelu_tanh(v8f x) {  // x * sigmoid(2y) = x/2 * (1 + tanh(y)), y = sqrt(2/pi) (x + 0.044715 x³)
    return x * sigmoid(splat(1.5957691216f) * (x + splat(0.044715f) * x * x * x));
}
}  // namespace

struct rl_program {
    std::vector<rl_instruction> instructions;
    std::vector<rl_buffer> buffers;
    std::vector<rl_weight> weights;
    std::vector<const float *> constants;
    rl_cache cache;
    ThreadPool pool;
    const rl_batch *batch = nullptr;
    std::vector<int32_t> sequence_of;  // [T]

    explicit rl_program(int num_threads) : pool(num_threads) {}

    int64_t rows_of(int buffer) const { return buffers[buffer].rows_are_logits ? batch->num_logits : batch->num_tokens; }

    // Rows a thread takes at a time when all rows cost the same: about four turns each.
    int64_t rows_per_turn(int64_t rows) const { return std::max<int64_t>(1, rows / (4 * pool.size())); }

    template <class F> void for_rows(int64_t rows, const F &fn) {
        pool.run(rows, rows_per_turn(rows), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; row++) fn(row);
        });
    }

    void embed(const rl_instruction &in) {
        const rl_weight &table = weights[in.weights[0]];
        const int64_t bytes = row_bytes(table.format, table.columns);
        float *out = buffers[in.output].address;
        for_rows(batch->num_tokens, [&](int64_t t) {
            unpack_row(table.format, (const char *)table.address + batch->token_ids[t] * bytes, table.columns,
                       out + t * table.columns);
        });
    }

    void scale(const rl_instruction &in) {  // floats: factor
        const int64_t count = rows_of(in.output) * buffers[in.output].columns;
        const float *x = buffers[in.inputs[0]].address;
        float *out = buffers[in.output].address;
        for (int64_t i = 0; i < count; i++) out[i] = x[i] * in.floats[0];
    }

    void rms_norm(const rl_instruction &in) {  // floats: eps, offset
        const rl_weight &weight = weights[in.weights[0]];
        const float *w = (const float *)weight.address;
        const int64_t size = weight.rows, columns = buffers[in.output].columns;
        for_rows(rows_of(in.output), [&](int64_t row) {
            for (int64_t start = 0; start < columns; start += size) {
                const float *x = buffers[in.inputs[0]].address + row * columns + start;
                float *out = buffers[in.output].address + row * columns + start;
                v8f squares = splat(0);
                int64_t i = 0;
                for (; i + 8 <= size; i += 8) squares += load<v8f>(x + i) * load<v8f>(x + i);
                float total = sum(squares);
                for (; i < size; i++) total += x[i] * x[i];
                const float factor = 1.0f / std::sqrt(total / size + in.floats[0]);
                for (i = 0; i < size; i++) out[i] = x[i] * factor * (w[i] + in.floats[1]);
            }
        });
    }

    void linear(const rl_instruction &in) {
        const rl_weight &weight = weights[in.weights[0]];
        const float *x = buffers[in.inputs[0]].address;
        const float *bias = in.weights[1] < 0 ? nullptr : (const float *)weights[in.weights[1]].address;
        float *out = buffers[in.output].address;
        const int64_t n = weight.rows, k = weight.columns, rows = rows_of(in.output);
        const int64_t bytes = row_bytes(weight.format, k);
        pool.run(n, kRowsPerChunk, [&](int64_t chunk_begin, int64_t chunk_end) {
            static thread_local std::vector<float> scratch;
            if ((int64_t)scratch.size() < kRowsPerChunk * k) scratch.resize(kRowsPerChunk * k);
            for (int64_t begin = chunk_begin; begin < chunk_end; begin += kRowsPerChunk) {
                const int64_t end = std::min<int64_t>(begin + kRowsPerChunk, chunk_end);
                const float *w = (const float *)((const char *)weight.address + begin * bytes);
                if (weight.format != RL_F32) {
                    for (int64_t r = begin; r < end; r++)
                        unpack_row(weight.format, (const char *)weight.address + r * bytes, k, &scratch[(r - begin) * k]);
                    w = scratch.data();
                }
                for (int64_t t = 0; t < rows; t += kTokensPerPanel) {
                    const int64_t tokens = std::min<int64_t>(kTokensPerPanel, rows - t);
                    int64_t r = begin;
                    for (; r + kRowGroup <= end; r += kRowGroup)
                        dots_for_tokens<kRowGroup>(w + (r - begin) * k, x + t * k, k, tokens,
                                                   bias ? bias + r : nullptr, out + t * n + r, n);
                    for (; r < end; r++)
                        dots_for_tokens<1>(w + (r - begin) * k, x + t * k, k, tokens, bias ? bias + r : nullptr,
                                           out + t * n + r, n);
                }
            }
        });
    }

    void rope_cos_sin(const rl_instruction &in) {  // ints: constant, max_position or -1; floats: attention_factor
        const int64_t half = buffers[in.output].columns / 2;
        const float *inv_freq = constants[in.ints[0]];
        for_rows(batch->num_tokens, [&](int64_t t) {
            int32_t position = batch->positions[t];
            if (in.ints[1] >= 0) position = std::min(position, in.ints[1]);
            float *out = buffers[in.output].address + t * 2 * half;
            for (int64_t i = 0; i < half; i++) {
                const float angle = (float)position * inv_freq[i];
                out[i] = std::cos(angle) * in.floats[0];
                out[half + i] = std::sin(angle) * in.floats[0];
            }
        });
    }

    void rope(const rl_instruction &in) {  // ints: head_dim
        const int64_t columns = buffers[in.output].columns, head_dim = in.ints[0];
        const int64_t rotary = buffers[in.inputs[1]].columns, half = rotary / 2;
        for_rows(batch->num_tokens, [&](int64_t t) {
            const float *cos = buffers[in.inputs[1]].address + t * rotary, *sin = cos + half;
            for (int64_t head = 0; head < columns; head += head_dim) {
                const float *x = buffers[in.inputs[0]].address + t * columns + head;
                float *out = buffers[in.output].address + t * columns + head;
                for (int64_t i = 0; i < half; i++) {
                    out[i] = x[i] * cos[i] - x[half + i] * sin[i];
                    out[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
                }
                for (int64_t i = rotary; i < head_dim; i++) out[i] = x[i];
            }
        });
    }

    // Element offset of the tile that holds `slot`; which: 0 K, 1 V.
    int64_t tile_offset(int layer, int64_t slot, int which, int64_t kv_head) const {
        const int64_t tiles = cache.block_size / kTile, block = slot / cache.block_size;
        const int64_t head = ((layer * (int64_t)cache.num_blocks + block) * 2 + which) * cache.num_kv_heads + kv_head;
        return (head * tiles + slot % cache.block_size / kTile) * kTile * cache.head_dim;
    }

    void put(int64_t index, float value) {
        if (cache.dtype == RL_KV_F16)
            ((uint16_t *)cache.pages)[index] = float_to_half(value);
        else
            ((float *)cache.pages)[index] = value;
    }

    void store_kv(const rl_instruction &in) {  // ints: layer
        const int64_t head_dim = cache.head_dim, columns = cache.num_kv_heads * head_dim;
        for_rows(batch->num_tokens, [&](int64_t t) {
            const int64_t slot = batch->slot_mapping[t], lane = slot % kTile;
            if (slot < 0) return;
            for (int64_t g = 0; g < cache.num_kv_heads; g++) {
                const float *k = buffers[in.inputs[0]].address + t * columns + g * head_dim;
                const float *v = buffers[in.inputs[1]].address + t * columns + g * head_dim;
                const int64_t k_tile = tile_offset(in.ints[0], slot, 0, g);
                const int64_t v_tile = tile_offset(in.ints[0], slot, 1, g);
                for (int64_t d = 0; d < head_dim; d++) put(k_tile + d * kTile + lane, k[d]);
                for (int64_t d = 0; d < head_dim; d++) put(v_tile + lane * head_dim + d, v[d]);
            }
        });
    }

    // The tile as float: in place for float pages, converted into scratch for half ones.
    const float *read_tile(int64_t offset, float *scratch) const {
        if (cache.dtype == RL_KV_F32) return (const float *)cache.pages + offset;
        const uint16_t *half = (const uint16_t *)cache.pages + offset;
        for (int64_t i = 0; i < kTile * cache.head_dim; i += 8) store(scratch + i, half_to_float(load<v8u16>(half + i)));
        return scratch;
    }

    // q · K of one tile -> scores[32].
    static void score_tile(const float *q, const float *k_tile, int64_t head_dim, float scale, float *scores) {
        v8f sums[4] = {splat(0), splat(0), splat(0), splat(0)};
        for (int64_t d = 0; d < head_dim; d++)
            for (int i = 0; i < 4; i++) sums[i] += splat(q[d]) * load<v8f>(k_tile + d * kTile + 8 * i);
        for (int i = 0; i < 4; i++) store(scores + 8 * i, sums[i] * splat(scale));
    }

    // Online softmax of one tile into (row_max, row_sum, out); keys first..last of the tile are visible.
    static void accumulate_tile(const float *scores, int first, int last, const float *v_tile, int64_t head_dim,
                                float &row_max, float &row_sum, float *out) {
        alignas(32) float weights[kTile];
        for (int i = 0; i < kTile; i++) weights[i] = i < first || i > last ? -INFINITY : scores[i];
        v8f best = load<v8f>(weights);
        for (int i = 8; i < kTile; i += 8) {
            v8f next = load<v8f>(weights + i);
            best = next > best ? next : best;
        }
        const float new_max = std::max(row_max, max(best));
        v8f total = splat(0);
        for (int i = 0; i < kTile; i += 8) {
            v8f e = exp_nonpositive(load<v8f>(weights + i) - splat(new_max));
            store(weights + i, e);
            total += e;
        }
        const float decay = row_max == -INFINITY ? 0.0f : std::exp(row_max - new_max);
        row_sum = row_sum * decay + sum(total);
        row_max = new_max;
        for (int64_t d = 0; d < head_dim; d++) out[d] *= decay;
        for (int n = first; n <= last; n++) {
            const float weight = weights[n];
            const float *v = v_tile + n * head_dim;
            for (int64_t d = 0; d < head_dim; d++) out[d] += weight * v[d];
        }
    }

    void attention(const rl_instruction &in) {  // ints: layer, head_dim, window or -1, num_sinks; floats: scale
        const int64_t layer = in.ints[0], head_dim = in.ints[1], window = in.ints[2], num_sinks = in.ints[3];
        const int64_t columns = buffers[in.output].columns, kv_heads = cache.num_kv_heads;
        const int64_t group = columns / (kv_heads * head_dim);
        const float *q_all = buffers[in.inputs[0]].address;
        const float *q_sinks_all = in.inputs[1] < 0 ? q_all : buffers[in.inputs[1]].address;
        const int64_t items = batch->num_tokens * kv_heads;
        pool.run(items, std::max<int64_t>(1, items / (8 * pool.size())), [&](int64_t begin, int64_t end) {
            static thread_local std::vector<float> scratch;
            scratch.resize(2 * kTile * head_dim);
            for (int64_t item = begin; item < end; item++) {
                const int64_t t = item / kv_heads, g = item % kv_heads, s = sequence_of[t];
                float *out = buffers[in.output].address + t * columns + g * group * head_dim;
                std::fill(out, out + group * head_dim, 0.0f);
                if (batch->seq_lens[s] == 0) continue;
                const int64_t position = batch->positions[t];
                const int64_t sinks_end = std::min(num_sinks, position + 1);
                const int64_t first_key = window < 0 ? 0 : std::max(sinks_end, position - window + 1);
                const float *q = q_all + t * columns + g * group * head_dim;
                const float *q_sinks = q_sinks_all + t * columns + g * group * head_dim;
                const int32_t *table = batch->block_tables + s * batch->num_blocks_per_table;
                std::vector<float> &row_state = row_states();
                row_state.assign(2 * group, 0.0f);
                for (int64_t r = 0; r < group; r++) row_state[2 * r] = -INFINITY;

                auto attend = [&](int64_t begin_key, int64_t end_key, const float *query) {
                    for (int64_t tile = begin_key / kTile; tile * kTile < end_key; tile++) {
                        const int64_t key = tile * kTile;
                        const int64_t slot =
                            table[key / cache.block_size] * (int64_t)cache.block_size + key % cache.block_size;
                        const int first = (int)std::max<int64_t>(0, begin_key - key);
                        const int last = (int)std::min<int64_t>(kTile, end_key - key) - 1;
                        const float *k = read_tile(tile_offset(layer, slot, 0, g), scratch.data());
                        const float *v = read_tile(tile_offset(layer, slot, 1, g), scratch.data() + kTile * head_dim);
                        for (int64_t r = 0; r < group; r++) {
                            alignas(32) float scores[kTile];
                            score_tile(query + r * head_dim, k, head_dim, in.floats[0], scores);
                            accumulate_tile(scores, first, last, v, head_dim, row_state[2 * r], row_state[2 * r + 1],
                                            out + r * head_dim);
                        }
                    }
                };
                attend(0, sinks_end, q_sinks);
                attend(first_key, position + 1, q);
                for (int64_t r = 0; r < group; r++)
                    for (int64_t d = 0; d < head_dim; d++) out[r * head_dim + d] /= row_state[2 * r + 1];
            }
        });
    }

    static std::vector<float> &row_states() {
        static thread_local std::vector<float> states;
        return states;
    }

    void glu(const rl_instruction &in) {  // ints: 0 silu, 1 gelu_tanh
        const int64_t columns = buffers[in.output].columns;
        for_rows(rows_of(in.output), [&](int64_t row) {
            const float *gate = buffers[in.inputs[0]].address + row * columns;
            const float *up = buffers[in.inputs[1]].address + row * columns;
            float *out = buffers[in.output].address + row * columns;
            for (int64_t i = 0; i < columns; i += 8) {
                const int64_t count = std::min<int64_t>(8, columns - i);
                v8f g = splat(0);
                std::memcpy(&g, gate + i, 4 * count);
                v8f activated = in.ints[0] == 0 ? g * sigmoid(g) : gelu_tanh(g);
                for (int64_t j = 0; j < count; j++) out[i + j] = activated[j] * up[i + j];
            }
        });
    }

    void add(const rl_instruction &in) {
        const int64_t count = rows_of(in.output) * buffers[in.output].columns;
        const float *x = buffers[in.inputs[0]].address, *y = buffers[in.inputs[1]].address;
        float *out = buffers[in.output].address;
        for (int64_t i = 0; i < count; i++) out[i] = x[i] + y[i];
    }

    void gather_rows(const rl_instruction &in) {
        const int64_t columns = buffers[in.output].columns;
        for (int64_t row = 0; row < batch->num_logits; row++)
            std::memcpy(buffers[in.output].address + row * columns,
                        buffers[in.inputs[0]].address + batch->logit_rows[row] * columns, 4 * columns);
    }

    void step(const rl_batch *step_batch) {
        batch = step_batch;
        sequence_of.resize(batch->num_tokens);
        for (int32_t s = 0; s < batch->num_seqs; s++)
            for (int32_t t = batch->query_start_loc[s]; t < batch->query_start_loc[s + 1]; t++) sequence_of[t] = s;
        for (const rl_instruction &in : instructions) switch (in.opcode) {
                case RL_EMBED: embed(in); break;
                case RL_SCALE: scale(in); break;
                case RL_RMS_NORM: rms_norm(in); break;
                case RL_LINEAR: linear(in); break;
                case RL_ROPE_COS_SIN: rope_cos_sin(in); break;
                case RL_ROPE: rope(in); break;
                case RL_STORE_KV: store_kv(in); break;
                case RL_ATTENTION: attention(in); break;
                case RL_GLU: glu(in); break;
                case RL_ADD: add(in); break;
                case RL_GATHER_ROWS: gather_rows(in); break;
            }
    }
};

extern "C" {

rl_program *rl_create(const rl_instruction *instructions, int32_t num_instructions, const rl_buffer *buffers,
                      int32_t num_buffers, const rl_weight *weights, int32_t num_weights,
                      const float *const *constants, int32_t num_constants, const rl_cache *cache,
                      int32_t num_threads) {
    for (int32_t i = 0; i < num_instructions; i++)
        if (instructions[i].opcode < 0 || instructions[i].opcode > RL_GATHER_ROWS) return nullptr;
    for (int32_t i = 0; i < num_weights; i++)
        if (row_bytes(weights[i].format, 32) == 0) return nullptr;
    auto *program = new rl_program(num_threads);
    program->instructions.assign(instructions, instructions + num_instructions);
    program->buffers.assign(buffers, buffers + num_buffers);
    program->weights.assign(weights, weights + num_weights);
    program->constants.assign(constants, constants + num_constants);
    program->cache = *cache;
    return program;
}

void rl_destroy(rl_program *program) { delete program; }

void rl_set_buffers(rl_program *program, const rl_buffer *buffers) {
    program->buffers.assign(buffers, buffers + program->buffers.size());
}

void rl_step(rl_program *program, const rl_batch *batch) { program->step(batch); }

int32_t rl_cpu_supports(const char *isa) {
    if (!std::strcmp(isa, "generic")) return 1;
#if defined(__x86_64__)
    if (!std::strcmp(isa, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return 0;
}
}
