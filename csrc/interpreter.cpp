// Replays a Program: one call runs every instruction of a step over float32 buffers.
// Each output element is computed by one thread in one order, whatever else is in the step: tokens do not depend
// on the batch, on chunking or on the number of threads. Letters as in ops/interface.py; what an instruction's
// numbers mean is written at its function.
#include <algorithm>
#include <vector>

#include "matmul.h"
#include "paged_attention.h"
#include "reductions.h"
#include "ridgeline.h"
#include "thread_pool.h"

namespace {
constexpr int64_t kSerialFloats = 4096;  // less work than this is not worth waking a thread for
constexpr int64_t kPanelTokens = 128;    // of quantized activations that a thread reads again for every row group
constexpr int64_t kMaxHeadDim = 1024;

void rms_norm_row(const float *x, const float *w, int64_t size, float eps, float offset, float *out) {
    vf squares = zero();
    for (int64_t i = 0; i < size; i += kLanes) {
        const vf v = load_n(x + i, size - i);
        squares = fma(v, v, squares);
    }
    const vf factor = splat(1.0f / std::sqrt(sum(squares) / (float)size + eps));
    for (int64_t i = 0; i < size; i += kLanes) {
        const vf gain = add(load_n(w + i, size - i), splat(offset));
        store_n(out + i, mul(mul(load_n(x + i, size - i), factor), gain), size - i);
    }
}

void rotate(const float *x, const float *cos, int64_t half, int64_t head_dim, float *out) {  // x may be out
    const float *sin = cos + half;
    for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t n = half - i;
        const vf c = load_n(cos + i, n), s = load_n(sin + i, n), a = load_n(x + i, n), b = load_n(x + half + i, n);
        store_n(out + i, sub(mul(a, c), mul(b, s)), n);
        store_n(out + half + i, fma(b, c, mul(a, s)), n);
    }
    if (x != out)
        for (int64_t i = 2 * half; i < head_dim; i++) out[i] = x[i];
}

vf activate(int kind, vf x) { return kind == 0 ? silu(x) : gelu_tanh(x); }
}  // namespace

struct rl_program {
    std::vector<rl_instruction> instructions;
    std::vector<rl_buffer> buffers;
    std::vector<rl_weight> weights;
    std::vector<const float *> constants;
    rl_cache cache;
    ThreadPool pool;
    std::vector<Workspace> workspaces;
    const rl_batch *batch = nullptr;
    rl_collectives collectives = {};
    int32_t status = RL_OK;  // of the last collective

    Scratch<act_block> blocks;  // the input of a linear: in integers, and where it is normed, reordered or rounded
    Scratch<wide_act_block> wide_blocks;
    Scratch<int32_t> outlier_columns;
    Scratch<float> changed_inputs, queries, sink_queries;
    PagedAttention attention_of;

    explicit rl_program(int num_threads)
        : pool(num_threads), workspaces(pool.size()), attention_of(cache, pool, workspaces) {}

    int64_t rows_of(int buffer) const { return buffers[buffer].rows_are_logits ? batch->num_logits : batch->num_tokens; }
    const float *vector(int weight) const { return weight < 0 ? nullptr : (const float *)weights[weight].address; }
    float *row(int buffer, int64_t r) const { return buffers[buffer].address + r * buffers[buffer].columns; }

    // fn(row) or fn(row, thread) for all rows, shared between threads if there is enough to do.
    template <class F> void for_rows(int64_t rows, int64_t floats_per_row, const F &fn) {
        const int64_t chunk =
            rows * floats_per_row < kSerialFloats ? rows : std::max<int64_t>(1, rows / (4 * pool.size()));
        pool.run(rows, chunk, [&](int64_t begin, int64_t end, int thread) {
            for (int64_t r = begin; r < end; r++)
                if constexpr (std::is_invocable_v<F, int64_t, int>)
                    fn(r, thread);
                else
                    fn(r);
        });
    }

    // weights: table; ints: first_row; floats: factor. Zeros for a token whose row is in the table of another rank.
    void embed(const rl_instruction &in) {
        const rl_weight &table = weights[in.weights[0]];
        for_rows(batch->num_tokens, table.columns, [&](int64_t t) {
            float *out = row(in.outputs[0], t);
            const int32_t table_row = batch->token_ids[t] - in.ints[0];
            if (table_row < 0 || table_row >= table.rows) {
                std::fill_n(out, table.columns, 0.0f);
                return;
            }
            with_format(table.format, [&](auto p) {
                unpack_row<decltype(p)>((const uint8_t *)table.address, table.order, table_row, table.columns, out);
            });
            if (in.floats[0] != 1.0f)
                for (int64_t i = 0; i < table.columns; i++) out[i] *= in.floats[0];
        });
    }

    void scale(const rl_instruction &in) {  // inputs: x; floats: factor
        const int64_t columns = buffers[in.outputs[0]].columns;
        for_rows(rows_of(in.outputs[0]), columns, [&](int64_t r) {
            for (int64_t i = 0; i < columns; i++) row(in.outputs[0], r)[i] = row(in.inputs[0], r)[i] * in.floats[0];
        });
    }

    void rms_norm(const rl_instruction &in) {  // inputs: x, residual or -1; weights: w; floats: eps, offset
        const rl_weight &weight = weights[in.weights[0]];
        const int64_t size = weight.rows, columns = buffers[in.outputs[0]].columns;
        for_rows(rows_of(in.outputs[0]), columns, [&](int64_t r) {
            float *out = row(in.outputs[0], r);
            for (int64_t start = 0; start < columns; start += size)
                rms_norm_row(row(in.inputs[0], r) + start, vector(in.weights[0]), size, in.floats[0], in.floats[1],
                             out + start);
            if (in.inputs[1] >= 0) add_row(row(in.inputs[1], r), out, columns, out);
        });
    }

    static void add_row(const float *x, const float *y, int64_t n, float *out) {
        for (int64_t i = 0; i < n; i += kLanes)
            store_n(out + i, ::add(load_n(x + i, n - i), load_n(y + i, n - i)), n - i);
    }

    // The input of a linear, which all of its matrices read in one order and with one rounding.
    activations prepare_input(const rl_instruction &in, int64_t rows, int64_t k) {
        const rl_weight &w = weights[in.weights[0]];
        const input_rounding how = rounding_of(w);
        bool any_float = false, any_narrow = false, any_wide = false;
        for (int i = 0; i < in.ints[0]; i++)
            with_kernel(weights[in.weights[i]].format, how.on, [&](auto p) {
                using P = decltype(p);
                (P::is_float ? any_float : P::wide ? any_wide : any_narrow) = true;
            });
        const float *x = buffers[in.inputs[0]].address, *norm = vector(in.weights[6]);
        const bool changes = norm || w.order || (how.on && any_float);
        float *changed = changes ? changed_inputs.get(rows * k) : nullptr;
        const int64_t row_blocks = k / kBlock;
        act_block *narrow = any_narrow ? blocks.get(rows * row_blocks) : nullptr;
        wide_act_block *wide = any_wide ? wide_blocks.get(rows * row_blocks) : nullptr;
        int32_t *outliers = how.outlier > 0 && (narrow || wide) ? outlier_columns.get(rows * (k + 1)) : nullptr;
        if (changes || narrow || wide)
            for_rows(rows, 4 * k, [&](int64_t r, int thread) {
                const float *from = x + r * k;
                float *own = changes ? changed + r * k : nullptr;
                if (norm) {
                    float *normed = w.order ? workspaces[thread].values.get(k) : own;
                    rms_norm_row(from, norm, k, in.floats[0], in.floats[1], normed);
                    from = normed;
                }
                if (w.order) {
                    for (int64_t i = 0; i < k; i++) own[i] = from[w.order[i]];
                    from = own;
                }
                if (how.on) {
                    const rounded_row row(from, k, how);
                    if (narrow) row.put(narrow + r * row_blocks);
                    if (wide) row.put(wide + r * row_blocks);
                    if (outliers) row.put_outliers(outliers + r * (k + 1));
                    if (any_float)
                        row.put(own);
                } else {
                    if (narrow) quantize_blocks(from, k, narrow + r * row_blocks);
                    if (wide) quantize_blocks(from, k, wide + r * row_blocks);
                }
            });
        return {changes ? changed : x, narrow, wide, outliers};
    }

    static input_rounding rounding_of(const rl_weight &w) {
        return {w.rounds_input != 0, w.input_scale, w.outlier};
    }

    // inputs: x, residual or -1; outputs: one a matrix, or one for the GLU of two; weights: three matrices, their
    // biases, the norm of x; ints: number of matrices, activation or -1; floats: eps, offset.
    void linear(const rl_instruction &in) {
        const int64_t rows = rows_of(in.inputs[0]), k = buffers[in.inputs[0]].columns;
        const int num_matrices = in.ints[0], activation = in.ints[1];
        const bool is_glu = activation >= 0;
        int64_t groups[4] = {0, 0, 0, 0};
        for (int i = 0; i < num_matrices; i++)
            groups[i + 1] = groups[i] + (is_glu && i == 1 ? 0 : groups_of(weights[in.weights[i]].rows));
        const int64_t total_groups = groups[num_matrices];
        const activations input = prepare_input(in, rows, k);

        const int64_t panels = (rows + kPanelTokens - 1) / kPanelTokens;
        const int64_t chunk = std::max<int64_t>(1, total_groups / (8 * pool.size()));
        for (int64_t panel = 0; panel < panels; panel++) {
            const int64_t first = panel * kPanelTokens, tokens = std::min(kPanelTokens, rows - first);
            pool.run(total_groups, chunk, [&](int64_t begin, int64_t end, int thread) {
                for (int64_t item = begin; item < end; item++) {
                    int i = 0;
                    while (item >= groups[i + 1]) i++;
                    if (is_glu)
                        glu_group(in, item, input, first, tokens, k, workspaces[thread]);
                    else
                        linear_group(in, i, item - groups[i], input, first, tokens, k, workspaces[thread]);
                }
            });
        }
    }

    template <class Done>
    void group_products(const rl_weight &w, int64_t group, activations input, int64_t first, int64_t tokens, int64_t k,
                        Workspace &ws, const Done &done) {
        with_kernel(w.format, w.rounds_input != 0, [&](auto p) {
            using P = decltype(p);
            multiply_group<P>((const uint8_t *)w.address + group * P::group_bytes(k), input.from(first, k), tokens, k,
                              ws.unpacked, done);
        });
    }

    void linear_group(const rl_instruction &in, int matrix, int64_t group, activations input, int64_t first, int64_t tokens,
                      int64_t k, Workspace &ws) {
        const rl_weight &w = weights[in.weights[matrix]];
        const int64_t column = group * kLanes, valid = std::min<int64_t>(kLanes, w.rows - column);
        const float *bias = vector(in.weights[3 + matrix]);
        const vf b = bias ? load_n(bias + column, valid) : zero();
        const int output = in.outputs[matrix], residual = in.inputs[1];
        group_products(w, group, input, first, tokens, k, ws, [&](int64_t t, int64_t count, const float *sums) {
            for (int64_t m = 0; m < count; m++) {
                vf y = load(sums + m * kLanes);
                if (bias) y = ::add(y, b);
                if (residual >= 0) y = ::add(load_n(row(residual, first + t + m) + column, valid), y);
                store_n(row(output, first + t + m) + column, y, valid);
            }
        });
    }

    void glu_group(const rl_instruction &in, int64_t group, activations input, int64_t first, int64_t tokens, int64_t k,
                   Workspace &ws) {
        const rl_weight &gate = weights[in.weights[0]], &up = weights[in.weights[1]];
        const int64_t column = group * kLanes, valid = std::min<int64_t>(kLanes, gate.rows - column);
        float *gates = ws.tile.get(kPanelTokens * kLanes);
        group_products(gate, group, input, first, tokens, k, ws, [&](int64_t t, int64_t count, const float *sums) {
            for (int64_t m = 0; m < count; m++)
                store(gates + (t + m) * kLanes, activate(in.ints[1], load(sums + m * kLanes)));
        });
        group_products(up, group, input, first, tokens, k, ws, [&](int64_t t, int64_t count, const float *sums) {
            for (int64_t m = 0; m < count; m++)
                store_n(row(in.outputs[0], first + t + m) + column,
                        mul(load(gates + (t + m) * kLanes), load(sums + m * kLanes)), valid);
        });
    }

    void rope_cos_sin(const rl_instruction &in) {  // ints: constant, max_position or -1; floats: attention_factor
        const int64_t half = buffers[in.outputs[0]].columns / 2;
        const float *inv_freq = constants[in.ints[0]];
        for_rows(batch->num_tokens, 64 * half, [&](int64_t t) {
            int32_t position = batch->positions[t];
            if (in.ints[1] >= 0) position = std::min(position, in.ints[1]);
            float *out = row(in.outputs[0], t);
            for (int64_t i = 0; i < half; i++) {
                const float angle = (float)position * inv_freq[i];
                out[i] = std::cos(angle) * in.floats[0];
                out[half + i] = std::sin(angle) * in.floats[0];
            }
        });
    }

    void rope(const rl_instruction &in) {  // inputs: x, cos_sin; ints: head_dim
        const int64_t columns = buffers[in.outputs[0]].columns, head_dim = in.ints[0];
        const int64_t half = buffers[in.inputs[1]].columns / 2;
        for_rows(batch->num_tokens, columns, [&](int64_t t) {
            for (int64_t head = 0; head < columns; head += head_dim)
                rotate(row(in.inputs[0], t) + head, row(in.inputs[1], t), half, head_dim, row(in.outputs[0], t) + head);
        });
    }

    void store_head(int64_t layer, int64_t slot, int64_t g, const float *k, const float *v) {
        const kv_pages pages{cache};
        pages.put_k(pages.tile(layer, slot, 0, g), slot % kTile, k);
        pages.put_v(pages.tile(layer, slot, 1, g), slot % kTile, v);
    }

    void store_kv(const rl_instruction &in) {  // inputs: k, v; ints: layer
        for_rows(batch->num_tokens, cache.num_kv_heads * cache.head_dim, [&](int64_t t) {
            const int64_t slot = batch->slot_mapping[t], head_dim = cache.head_dim;
            for (int64_t g = 0; slot >= 0 && g < cache.num_kv_heads; g++)
                store_head(in.ints[0], slot, g, row(in.inputs[0], t) + g * head_dim, row(in.inputs[1], t) + g * head_dim);
        });
    }

    // inputs: q, q_sinks or -1. With k (inputs 2) the instruction also does what comes before: inputs: q, cos_sin of
    // the sinks or -1, k, v, cos_sin; weights: q_norm, k_norm or -1; floats 1, 2: their eps and offset.
    // ints: layer, head_dim, window or -1, num_sinks, 0 flash or 1 naive; floats: scale.
    void attention(const rl_instruction &in) {
        const int64_t columns = buffers[in.outputs[0]].columns, head_dim = in.ints[1];
        const float *q = buffers[in.inputs[0]].address;
        const float *q_sinks = in.inputs[1] < 0 ? q : buffers[in.inputs[1]].address;
        if (in.inputs[2] >= 0) {
            float *rotated = queries.get(batch->num_tokens * columns);
            float *to_sinks = in.inputs[1] < 0 ? nullptr : sink_queries.get(batch->num_tokens * columns);
            prepare(in, columns, head_dim, rotated, to_sinks);
            q = rotated;
            q_sinks = to_sinks ? to_sinks : rotated;
        }
        const int64_t layer = in.ints[0], window = in.ints[2], num_sinks = in.ints[3];
        float *output = buffers[in.outputs[0]].address;
        const attention_call call{layer, head_dim, columns, window, num_sinks, in.floats[0], q, q_sinks, output};
        if (in.ints[4] == 1)
            attention_of.naive(*batch, call);
        else
            attention_of.flash(*batch, call);
    }

    // QK-norm, RoPE and the KV write, token by token.
    void prepare(const rl_instruction &in, int64_t columns, int64_t head_dim, float *rotated, float *to_sinks) {
        const int64_t kv_columns = cache.num_kv_heads * head_dim, half = buffers[in.inputs[4]].columns / 2;
        const float *q_norm = vector(in.weights[0]), *k_norm = vector(in.weights[1]);
        for_rows(batch->num_tokens, columns + 2 * kv_columns, [&](int64_t t) {
            alignas(64) float k[kMaxHeadDim];
            const float *cos_sin = row(in.inputs[4], t);
            for (int64_t head = 0; head < columns; head += head_dim) {
                const float *x = row(in.inputs[0], t) + head;
                float *out = rotated + t * columns + head;
                if (q_norm) {
                    rms_norm_row(x, q_norm, head_dim, in.floats[1], in.floats[2], k);
                    x = k;
                }
                if (to_sinks) rotate(x, row(in.inputs[1], t), half, head_dim, to_sinks + t * columns + head);
                rotate(x, cos_sin, half, head_dim, out);
            }
            const int64_t slot = batch->slot_mapping[t];
            for (int64_t g = 0; slot >= 0 && g < cache.num_kv_heads; g++) {
                const float *x = row(in.inputs[2], t) + g * head_dim;
                if (k_norm) {
                    rms_norm_row(x, k_norm, head_dim, in.floats[1], in.floats[2], k);
                    x = k;
                }
                rotate(x, cos_sin, half, head_dim, k);
                store_head(in.ints[0], slot, g, k, row(in.inputs[3], t) + g * head_dim);
            }
        });
    }

    void glu(const rl_instruction &in) {  // inputs: gate, up; ints: 0 silu, 1 gelu_tanh
        const int64_t columns = buffers[in.outputs[0]].columns;
        for_rows(rows_of(in.outputs[0]), 4 * columns, [&](int64_t r) {
            const float *gate = row(in.inputs[0], r), *up = row(in.inputs[1], r);
            for (int64_t i = 0; i < columns; i += kLanes) {
                const int64_t n = columns - i;
                store_n(row(in.outputs[0], r) + i, mul(activate(in.ints[0], load_n(gate + i, n)), load_n(up + i, n)), n);
            }
        });
    }

    void add(const rl_instruction &in) {  // inputs: x, y
        const int64_t columns = buffers[in.outputs[0]].columns;
        for_rows(rows_of(in.outputs[0]), columns, [&](int64_t r) {
            add_row(row(in.inputs[0], r), row(in.inputs[1], r), columns, row(in.outputs[0], r));
        });
    }

    void gather_rows(const rl_instruction &in) {  // inputs: x
        for (int64_t r = 0; r < batch->num_logits; r++)
            std::memcpy(row(in.outputs[0], r), row(in.inputs[0], batch->logit_rows[r]), 4 * buffers[in.outputs[0]].columns);
    }

    int64_t floats_of(int buffer) const { return rows_of(buffer) * buffers[buffer].columns; }

    void all_reduce(const rl_instruction &in) {  // inputs: x, residual or -1
        const float *residual = in.inputs[1] < 0 ? nullptr : buffers[in.inputs[1]].address;
        if (const int64_t count = floats_of(in.outputs[0]))
            status = collectives.all_reduce(collectives.context, buffers[in.inputs[0]].address, residual,
                                            buffers[in.outputs[0]].address, count);
    }

    void all_gather(const rl_instruction &in) {  // inputs: x
        const rl_buffer &x = buffers[in.inputs[0]], &out = buffers[in.outputs[0]];
        if (const int64_t rows = rows_of(in.outputs[0]))
            status = collectives.all_gather(collectives.context, x.address, rows, x.columns, out.address, out.columns);
    }

    void send(const rl_instruction &in) {  // inputs: x
        if (const int64_t count = floats_of(in.inputs[0]))
            status = collectives.send(collectives.context, buffers[in.inputs[0]].address, count);
    }

    void receive(const rl_instruction &in) {
        if (const int64_t count = floats_of(in.outputs[0]))
            status = collectives.receive(collectives.context, buffers[in.outputs[0]].address, count);
    }

    void run(const rl_instruction &in) {
        switch (in.opcode) {
            case RL_EMBED: return embed(in);
            case RL_SCALE: return scale(in);
            case RL_RMS_NORM: return rms_norm(in);
            case RL_LINEAR: return linear(in);
            case RL_ROPE_COS_SIN: return rope_cos_sin(in);
            case RL_ROPE: return rope(in);
            case RL_STORE_KV: return store_kv(in);
            case RL_ATTENTION: return attention(in);
            case RL_GLU: return glu(in);
            case RL_ADD: return add(in);
            case RL_GATHER_ROWS: return gather_rows(in);
            case RL_ALL_REDUCE: return all_reduce(in);
            case RL_ALL_GATHER: return all_gather(in);
            case RL_SEND: return send(in);
            case RL_RECEIVE: return receive(in);
        }
    }

    int32_t step(const rl_batch *step_batch) {
        batch = step_batch;
        status = RL_OK;
        Timeline &timeline = pool.timeline;
        if (!timeline.on()) {
            for (size_t i = 0; i < instructions.size() && status == RL_OK; i++) run(instructions[i]);
            return status;
        }
        for (size_t i = 0; i < instructions.size() && status == RL_OK; i++) {
            const int64_t begin = Timeline::now();
            timeline.instruction = (int32_t)i;
            run(instructions[i]);
            timeline.add(0, RL_EVENT_OP, begin);
        }
        timeline.instruction = -1;
        return status;
    }
};

extern "C" {

rl_program *rl_create(const rl_instruction *instructions, int32_t num_instructions, const rl_buffer *buffers,
                      int32_t num_buffers, const rl_weight *weights, int32_t num_weights,
                      const float *const *constants, int32_t num_constants, const rl_cache *cache,
                      int32_t num_threads) {
    for (int32_t i = 0; i < num_instructions; i++)
        if (instructions[i].opcode < 0 || instructions[i].opcode >= RL_NUM_OPCODES) return nullptr;
    for (int32_t i = 0; i < num_weights; i++)
        if (!with_format(weights[i].format, [](auto) {})) return nullptr;
    if (cache->head_dim > kMaxHeadDim || cache->dtype < RL_KV_F32 || cache->dtype > RL_KV_I8) return nullptr;
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

void rl_set_collectives(rl_program *program, const rl_collectives *collectives) {
    program->collectives = *collectives;
}

int32_t rl_step(rl_program *program, const rl_batch *batch) { return program->step(batch); }

void rl_timeline_start(rl_program *program, int64_t capacity) {
    program->pool.timeline.start(program->pool.size(), capacity);
}

int64_t rl_timeline_take(rl_program *program, rl_event *events) { return program->pool.timeline.take(events); }

int64_t rl_scratch_bytes(const rl_program *program) {
    int64_t bytes = program->blocks.bytes() + program->wide_blocks.bytes() + program->outlier_columns.bytes() +
                    program->changed_inputs.bytes() + program->queries.bytes() + program->sink_queries.bytes() + program->attention_of.scratch_bytes();
    for (const Workspace &ws : program->workspaces)
        bytes += (int64_t)ws.unpacked.size() + ws.tile.bytes() + ws.values.bytes() + ws.scores.bytes();
    return bytes;
}

void rl_greedy(rl_program *program, const float *logits, int32_t rows, int32_t columns, int32_t *best, float *largest,
               double *log_total) {
    greedy(program->pool, logits, rows, columns, best, largest, log_total);
}

int32_t rl_top_k(const float *logits, int32_t columns, int32_t count, int32_t *ids, float *values) {
    return top_k(logits, columns, count, ids, values);
}

int64_t rl_packed_bytes(int32_t format, int32_t rows, int32_t columns) {
    int64_t bytes = 0;
    with_format(format, [&](auto p) {
        using P = decltype(p);
        if (columns % P::columns_multiple == 0) bytes = groups_of(rows) * P::group_bytes(columns);
    });
    return bytes;
}

void rl_pack(int32_t format, int32_t group_size, int32_t has_zeros, const void *file_rows, int32_t begin, int32_t end,
             int32_t rows, int32_t columns, void *packed_rows) {
    end = std::min(end, rows);
    with_format(format, [&](auto p) {
        pack_rows<decltype(p)>((const uint8_t *)file_rows, {group_size, has_zeros != 0}, begin, end, columns,
                               (uint8_t *)packed_rows);
    });
}

int32_t rl_cpu_supports(const char *isa) {
    if (!std::strcmp(isa, "generic")) return 1;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!std::strcmp(isa, "avx2")) return avx2;
    if (!std::strcmp(isa, "avx512"))
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return 0;
}
}
