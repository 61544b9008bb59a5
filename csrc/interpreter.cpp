// Replays a Program: one call runs every instruction of a step over float32 buffers.
// Each output element is computed by one thread in one order, whatever else is in the step: tokens do not depend
// on the batch, on chunking or on the number of threads. Letters as in ops/interface.py; what an instruction's
// numbers mean is written at its function.
#include <algorithm>
#include <chrono>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "ridgeline.h"
#include "thread_pool.h"

namespace {
constexpr int64_t kSerialFloats = 4096;  // less work than this is not worth waking a thread for
constexpr int64_t kPanelTokens = 128;    // of quantized activations that a thread reads again for every row group
constexpr int64_t kQueryRows = 48;       // query rows that share a KV tile
constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kMaxRows = 64;         // and query heads of one KV head, at most

// Memory that grows and is never zeroed.
template <class T> class Scratch {
public:
    T *get(int64_t count) {
        if (count > size_) {
            memory_.reset((T *)std::aligned_alloc(64, align64(count * (int64_t)sizeof(T))));
            size_ = count;
        }
        return memory_.get();
    }
    int64_t bytes() const { return size_ * (int64_t)sizeof(T); }

private:
    struct Free {
        void operator()(T *p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> memory_;
    int64_t size_ = 0;
};

struct Workspace {  // of one thread
    std::vector<uint8_t> unpacked;
    Scratch<float> tile, values, scores;
};

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
    std::vector<double> seconds;  // empty until somebody asks

    Scratch<act_block> blocks;                    // the quantized input of a linear
    Scratch<float> normed, queries, sink_queries, partials;
    struct QueryTile {
        int32_t sequence;
        int32_t first, count;  // tokens
    };
    std::vector<QueryTile> tiles;  // of this step

    explicit rl_program(int num_threads) : pool(num_threads), workspaces(pool.size()) {}

    int64_t rows_of(int buffer) const { return buffers[buffer].rows_are_logits ? batch->num_logits : batch->num_tokens; }
    const float *vector(int weight) const { return weight < 0 ? nullptr : (const float *)weights[weight].address; }
    float *row(int buffer, int64_t r) const { return buffers[buffer].address + r * buffers[buffer].columns; }

    // fn(row) for all rows, shared between threads if there is enough to do.
    template <class F> void for_rows(int64_t rows, int64_t floats_per_row, const F &fn) {
        const int64_t chunk =
            rows * floats_per_row < kSerialFloats ? rows : std::max<int64_t>(1, rows / (4 * pool.size()));
        pool.run(rows, chunk, [&](int64_t begin, int64_t end, int) {
            for (int64_t r = begin; r < end; r++) fn(r);
        });
    }

    void embed(const rl_instruction &in) {  // weights: table; floats: factor
        const rl_weight &table = weights[in.weights[0]];
        for_rows(batch->num_tokens, table.columns, [&](int64_t t) {
            float *out = row(in.outputs[0], t);
            with_format(table.format, [&](auto p) {
                unpack_row<decltype(p)>((const uint8_t *)table.address, batch->token_ids[t], table.columns, out);
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

    // inputs: x, residual or -1; outputs: one a matrix, or one for the GLU of two; weights: three matrices, their
    // biases, the norm of x; ints: number of matrices, activation or -1; floats: eps, offset.
    void linear(const rl_instruction &in) {
        const int64_t rows = rows_of(in.inputs[0]), k = buffers[in.inputs[0]].columns;
        const int num_matrices = in.ints[0], activation = in.ints[1];
        const bool is_glu = activation >= 0;
        bool any_quantized = false;
        int64_t groups[4] = {0, 0, 0, 0};
        for (int i = 0; i < num_matrices; i++) {
            const rl_weight &w = weights[in.weights[i]];
            any_quantized |= !is_float_format(w.format);
            groups[i + 1] = groups[i] + (is_glu && i == 1 ? 0 : groups_of(w.rows));
        }
        const int64_t total_groups = groups[num_matrices];
        const float *x = buffers[in.inputs[0]].address, *norm = vector(in.weights[6]);
        float *normed_x = norm ? normed.get(rows * k) : nullptr;
        act_block *quantized_x = any_quantized ? blocks.get(rows * (k / kBlock)) : nullptr;
        if (norm || any_quantized) {
            for_rows(rows, 4 * k, [&](int64_t r) {
                const float *from = x + r * k;
                if (norm) {
                    rms_norm_row(from, norm, k, in.floats[0], in.floats[1], normed_x + r * k);
                    from = normed_x + r * k;
                }
                if (any_quantized) quantize_row(from, k, quantized_x + r * (k / kBlock));
            });
            if (norm) x = normed_x;
        }

        const int64_t panels = (rows + kPanelTokens - 1) / kPanelTokens;
        const int64_t chunk = std::max<int64_t>(1, total_groups / (8 * pool.size()));
        for (int64_t panel = 0; panel < panels; panel++) {
            const int64_t first = panel * kPanelTokens, tokens = std::min(kPanelTokens, rows - first);
            pool.run(total_groups, chunk, [&](int64_t begin, int64_t end, int thread) {
                for (int64_t item = begin; item < end; item++) {
                    int i = 0;
                    while (item >= groups[i + 1]) i++;
                    if (is_glu)
                        glu_group(in, item, x, quantized_x, first, tokens, k, workspaces[thread]);
                    else
                        linear_group(in, i, item - groups[i], x, quantized_x, first, tokens, k, workspaces[thread]);
                }
            });
        }
    }

    template <class Done>
    void group_products(const rl_weight &w, int64_t group, const float *x, const act_block *q, int64_t first,
                        int64_t tokens, int64_t k, Workspace &ws, const Done &done) {
        with_format(w.format, [&](auto p) {
            using P = decltype(p);
            multiply_group<P>((const uint8_t *)w.address + group * P::group_bytes(k),
                              q ? q + first * (k / kBlock) : nullptr, x + first * k, tokens, k, ws.unpacked, done);
        });
    }

    void linear_group(const rl_instruction &in, int matrix, int64_t group, const float *x, const act_block *q,
                      int64_t first, int64_t tokens, int64_t k, Workspace &ws) {
        const rl_weight &w = weights[in.weights[matrix]];
        const int64_t column = group * kLanes, valid = std::min<int64_t>(kLanes, w.rows - column);
        const float *bias = vector(in.weights[3 + matrix]);
        const vf b = bias ? load_n(bias + column, valid) : zero();
        const int output = in.outputs[matrix], residual = in.inputs[1];
        group_products(w, group, x, q, first, tokens, k, ws, [&](int64_t t, int64_t count, const float *sums) {
            for (int64_t m = 0; m < count; m++) {
                vf y = load(sums + m * kLanes);
                if (bias) y = ::add(y, b);
                if (residual >= 0) y = ::add(load_n(row(residual, first + t + m) + column, valid), y);
                store_n(row(output, first + t + m) + column, y, valid);
            }
        });
    }

    void glu_group(const rl_instruction &in, int64_t group, const float *x, const act_block *q, int64_t first,
                   int64_t tokens, int64_t k, Workspace &ws) {
        const rl_weight &gate = weights[in.weights[0]], &up = weights[in.weights[1]];
        const int64_t column = group * kLanes, valid = std::min<int64_t>(kLanes, gate.rows - column);
        float *gates = ws.tile.get(kPanelTokens * kLanes);
        group_products(gate, group, x, q, first, tokens, k, ws, [&](int64_t t, int64_t count, const float *sums) {
            for (int64_t m = 0; m < count; m++)
                store(gates + (t + m) * kLanes, activate(in.ints[1], load(sums + m * kLanes)));
        });
        group_products(up, group, x, q, first, tokens, k, ws, [&](int64_t t, int64_t count, const float *sums) {
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

    void store_token(int64_t layer, int64_t t, const float *k, const float *v) {
        const int64_t slot = batch->slot_mapping[t];
        if (slot < 0) return;
        const kv_pages pages{cache};
        for (int64_t g = 0; g < cache.num_kv_heads; g++) {
            pages.put_k(pages.tile(layer, slot, 0, g), slot % kTile, k + g * cache.head_dim);
            pages.put_v(pages.tile(layer, slot, 1, g), slot % kTile, v + g * cache.head_dim);
        }
    }

    void store_kv(const rl_instruction &in) {  // inputs: k, v; ints: layer
        for_rows(batch->num_tokens, cache.num_kv_heads * cache.head_dim,
                 [&](int64_t t) { store_token(in.ints[0], t, row(in.inputs[0], t), row(in.inputs[1], t)); });
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
        if (in.ints[4] == 1)
            naive_attention(in, q, q_sinks);
        else
            flash_attention(in, q, q_sinks);
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
            if (slot < 0) return;
            const kv_pages pages{cache};
            for (int64_t g = 0; g < cache.num_kv_heads; g++) {
                const float *x = row(in.inputs[2], t) + g * head_dim;
                if (k_norm) {
                    rms_norm_row(x, k_norm, head_dim, in.floats[1], in.floats[2], k);
                    rotate(k, cos_sin, half, head_dim, k);
                } else {
                    rotate(x, cos_sin, half, head_dim, k);
                }
                pages.put_k(pages.tile(in.ints[0], slot, 0, g), slot % kTile, k);
                pages.put_v(pages.tile(in.ints[0], slot, 1, g), slot % kTile, row(in.inputs[3], t) + g * head_dim);
            }
        });
    }

    // The keys that a token sees: 0..sinks with the other rotation, then first..position.
    struct Visible {
        int64_t sinks_end, first, position;
    };
    Visible visible(const rl_instruction &in, int64_t t) const {
        const int64_t position = batch->positions[t], window = in.ints[2], num_sinks = in.ints[3];
        const int64_t sinks_end = std::min(num_sinks, position + 1);
        return {sinks_end, window < 0 ? sinks_end : std::max(sinks_end, position - window + 1), position};
    }

    // Query rows of one tile and KV head; views into a thread's workspace.
    struct Rows {
        int64_t count;
        const float *q[kMaxRows], *q_sinks[kMaxRows];
        Visible sees[kMaxRows];
        lanes in_tile[kMaxRows];
        row_state parts[kMaxRows], wholes[kMaxRows];
    };

    void flash_attention(const rl_instruction &in, const float *q, const float *q_sinks) {
        const int64_t columns = buffers[in.outputs[0]].columns, head_dim = in.ints[1];
        const int64_t kv_heads = cache.num_kv_heads, group = columns / (kv_heads * head_dim);
        make_query_tiles(group);
        const int64_t items = (int64_t)tiles.size() * kv_heads;
        int64_t longest = 0;
        for (int32_t s = 0; s < batch->num_seqs; s++) longest = std::max<int64_t>(longest, batch->seq_lens[s]);
        const int64_t partitions = (longest + kPartition - 1) / kPartition;
        const auto output = [&](int64_t t, int64_t head) {
            return buffers[in.outputs[0]].address + t * columns + head * head_dim;
        };
        const auto finish = [&](const QueryTile &tile, int64_t g, int64_t r, const row_state &whole) {
            float *out = output(tile.first + r / group, g * group + r % group);
            const vf inverse = splat(whole.total > 0.0f ? 1.0f / whole.total : 0.0f);
            for (int64_t d = 0; d < head_dim; d += kLanes)
                store_n(out + d, mul(load_n(whole.values + d, head_dim - d), inverse), head_dim - d);
        };
        const bool split = pool.size() > 1 && partitions > 1 && items < 4 * pool.size();
        if (!split) {
            pool.run(items, 1, [&](int64_t begin, int64_t end, int thread) {
                for (int64_t i = begin; i < end; i++) {
                    const QueryTile &tile = tiles[(items - 1 - i) / kv_heads];  // the longest first
                    const int64_t g = (items - 1 - i) % kv_heads;
                    Rows rows;
                    float *values = fill_rows(in, rows, tile, g, group, q, q_sinks, workspaces[thread], 2);
                    for (int64_t r = 0; r < rows.count; r++) {
                        rows.wholes[r].values = values + (rows.count + r) * head_dim;
                        clear(rows.wholes[r], head_dim);
                    }
                    for (int64_t p = 0; p * kPartition < batch->seq_lens[tile.sequence]; p++) {
                        if (!attend_partition(in, rows, tile, g, p, workspaces[thread])) continue;
                        for (int64_t r = 0; r < rows.count; r++) merge(rows.wholes[r], rows.parts[r], head_dim);
                    }
                    for (int64_t r = 0; r < rows.count; r++) finish(tile, g, r, rows.wholes[r]);
                }
            });
            return;
        }
        // Few rows, long texts: threads share the partitions, whose results are then merged in order.
        const int64_t most_rows = std::max<int64_t>(group, kQueryRows), stride = head_dim + 2;
        float *parts = partials.get(items * partitions * most_rows * stride);
        pool.run(items * partitions, 1, [&](int64_t begin, int64_t end, int thread) {
            for (int64_t i = begin; i < end; i++) {
                const int64_t item = i / partitions, p = i % partitions;
                const QueryTile &tile = tiles[item / kv_heads];
                Rows rows;
                fill_rows(in, rows, tile, item % kv_heads, group, q, q_sinks, workspaces[thread], 1);
                if (p * kPartition < batch->seq_lens[tile.sequence] &&
                    attend_partition(in, rows, tile, item % kv_heads, p, workspaces[thread])) {
                } else {
                    for (int64_t r = 0; r < rows.count; r++) clear(rows.parts[r], head_dim);
                }
                for (int64_t r = 0; r < rows.count; r++) {
                    float *part = parts + (i * most_rows + r) * stride;
                    part[0] = rows.parts[r].most;
                    part[1] = rows.parts[r].total;
                    std::memcpy(part + 2, rows.parts[r].values, 4 * head_dim);
                }
            }
        });
        float *values = workspaces[0].values.get(head_dim);
        for (int64_t item = 0; item < items; item++) {
            const QueryTile &tile = tiles[item / kv_heads];
            for (int64_t r = 0; r < tile.count * group; r++) {
                row_state whole{0, 0, values};
                clear(whole, head_dim);
                for (int64_t p = 0; p < partitions; p++) {
                    float *part = parts + ((item * partitions + p) * most_rows + r) * stride;
                    merge(whole, row_state{part[0], part[1], part + 2}, head_dim);
                }
                finish(tile, item % kv_heads, r, whole);
            }
        }
    }

    // Tokens of one sequence whose query rows share KV tiles; a padding row of an empty sequence sees nothing.
    void make_query_tiles(int64_t group) {
        const int32_t most = (int32_t)std::max<int64_t>(1, kQueryRows / group);
        tiles.clear();
        for (int32_t s = 0; s < batch->num_seqs; s++)
            for (int32_t t = batch->query_start_loc[s]; t < batch->query_start_loc[s + 1]; t += most)
                tiles.push_back({s, t, std::min(most, batch->query_start_loc[s + 1] - t)});
    }

    float *fill_rows(const rl_instruction &in, Rows &rows, const QueryTile &tile, int64_t g, int64_t group, const float *q,
                     const float *q_sinks, Workspace &ws, int64_t states) {
        const int64_t head_dim = in.ints[1], columns = buffers[in.outputs[0]].columns;
        rows.count = tile.count * group;
        float *values = ws.values.get(states * rows.count * head_dim + kLanes);
        for (int64_t r = 0; r < rows.count; r++) {
            const int64_t t = tile.first + r / group, head = g * group + r % group;
            rows.q[r] = q + t * columns + head * head_dim;
            rows.q_sinks[r] = q_sinks + t * columns + head * head_dim;
            rows.sees[r] = visible(in, t);
            rows.parts[r].values = values + r * head_dim;
        }
        return values;
    }

    // Positions 256 p .. 256 p + 255 into rows.parts; false, with the states untouched, when no row sees any.
    bool attend_partition(const rl_instruction &in, Rows &rows, const QueryTile &tile, int64_t g, int64_t p,
                          Workspace &ws) {
        const int64_t begin = p * kPartition, end = begin + kPartition, head_dim = in.ints[1];
        int64_t first = INT64_MAX, last = -1, sinks = 0;
        for (int64_t r = 0; r < rows.count; r++) {
            first = std::min(first, rows.sees[r].first);
            last = std::max(last, rows.sees[r].position);
            sinks = std::max(sinks, rows.sees[r].sinks_end);
        }
        const bool sees_sinks = begin < sinks;
        if (batch->seq_lens[tile.sequence] == 0 || (!sees_sinks && (first >= end || last < begin))) return false;
        for (int64_t r = 0; r < rows.count; r++) clear(rows.parts[r], head_dim);
        if (sees_sinks)
            for (int64_t key = begin; key < std::min(sinks, end); key += kTile)
                attend_keys(in, rows, rows.q_sinks, tile, g, key, ws, [&](const Visible &v) { return lanes_of(key, 0, v.sinks_end); });
        for (int64_t key = std::max(begin, first / kTile * kTile); key < std::min(end, last + 1); key += kTile)
            attend_keys(in, rows, rows.q, tile, g, key, ws,
                        [&](const Visible &v) { return lanes_of(key, v.first, v.position + 1); });
        return true;
    }

    static lanes lanes_of(int64_t key, int64_t begin, int64_t end) {
        return {(int)std::clamp<int64_t>(begin - key, 0, kTile), (int)std::clamp<int64_t>(end - key, 0, kTile)};
    }

    template <class F>
    void attend_keys(const rl_instruction &in, Rows &rows, const float *const *q, const QueryTile &tile, int64_t g,
                     int64_t key, Workspace &ws, const F &lanes_seen) {
        const int64_t head_dim = in.ints[1];
        const int32_t *table = batch->block_tables + (int64_t)tile.sequence * batch->num_blocks_per_table;
        bool any = false;
        for (int64_t r = 0; r < rows.count; r++) {
            rows.in_tile[r] = lanes_seen(rows.sees[r]);
            any |= rows.in_tile[r].first < rows.in_tile[r].last;
        }
        if (!any) return;
        const int64_t slot = table[key / cache.block_size] * (int64_t)cache.block_size + key % cache.block_size;
        const kv_pages pages{cache};
        const uint8_t *k = pages.tile(in.ints[0], slot, 0, g), *v = pages.tile(in.ints[0], slot, 1, g);
        next_tile next_k{nullptr, 0}, next_v{nullptr, 0};
        const int64_t next = key + kTile;
        if (next < batch->seq_lens[tile.sequence] && table[next / cache.block_size] >= 0) {
            const int64_t next_slot = table[next / cache.block_size] * (int64_t)cache.block_size + next % cache.block_size;
            next_k = {pages.tile(in.ints[0], next_slot, 0, g), pages.tile_bytes()};
            next_v = {pages.tile(in.ints[0], next_slot, 1, g), pages.tile_bytes()};
        }
        float *scores = ws.scores.get((rows.count + kScoreRows) * kTile);
        const tile_rows some{rows.count, head_dim, q, rows.in_tile, rows.parts, scores, next_k, next_v};
        if (cache.dtype == RL_KV_F16 && rows.count <= 2 * kScoreRows) {  // converting twice is cheaper than storing
            attend_tile(some, (const uint16_t *)k, (const uint16_t *)v, in.floats[0]);
        } else {
            float *wide = ws.tile.get(2 * kTile * head_dim);
            attend_tile(some, pages.floats(k, true, wide), pages.floats(v, false, wide + kTile * head_dim), in.floats[0]);
        }
    }

    // All scores of a query head at once, [tokens of the sequence, keys]: what flash avoids.
    void naive_attention(const rl_instruction &in, const float *q, const float *q_sinks) {
        const int64_t columns = buffers[in.outputs[0]].columns, head_dim = in.ints[1];
        const int64_t heads = columns / head_dim, group = heads / cache.num_kv_heads;
        const kv_pages pages{cache};
        pool.run(batch->num_seqs * heads, 1, [&](int64_t begin, int64_t end, int thread) {
            Workspace &ws = workspaces[thread];
            for (int64_t item = begin; item < end; item++) {
                const int64_t s = item / heads, head = item % heads, g = head / group;
                const int64_t first = batch->query_start_loc[s], tokens = batch->query_start_loc[s + 1] - first;
                const int64_t keys = (batch->seq_lens[s] + kTile - 1) / kTile * kTile;
                const int32_t *table = batch->block_tables + s * batch->num_blocks_per_table;
                float *scores = ws.scores.get(std::max<int64_t>(1, tokens * keys));
                float *wide = ws.tile.get(kTile * head_dim);
                const auto each_tile = [&](int which, const auto &fn) {
                    for (int64_t key = 0; key < keys; key += kTile) {
                        const int64_t block = table[key / cache.block_size];
                        if (block < 0) continue;  // freed behind the window
                        const int64_t slot = block * cache.block_size + key % cache.block_size;
                        fn(key, pages.floats(pages.tile(in.ints[0], slot, which, g), which == 0, wide));
                    }
                };
                std::fill(scores, scores + tokens * keys, -INFINITY);
                each_tile(0, [&](int64_t key, const float *k) {
                    for (int64_t t = 0; t < tokens; t++) {
                        const Visible sees = visible(in, first + t);
                        const lanes sinks = lanes_of(key, 0, sees.sinks_end);
                        const lanes near = lanes_of(key, sees.first, sees.position + 1);
                        alignas(64) float some[kTile];
                        const auto score = [&](const float *query, lanes l) {
                            if (l.first >= l.last) return;
                            query += (first + t) * columns + head * head_dim;
                            score_rows<1>(&query, k, head_dim, in.floats[0], some, {nullptr, 0});
                            std::copy(some + l.first, some + l.last, scores + t * keys + key + l.first);
                        };
                        score(q_sinks, sinks);
                        score(q, near);
                    }
                });
                for (int64_t t = 0; t < tokens; t++) {
                    float *p = scores + t * keys, most = -INFINITY;
                    for (int64_t j = 0; j < keys; j++) most = std::max(most, p[j]);
                    if (most == -INFINITY) most = 0.0f;
                    vf total = zero();
                    for (int64_t j = 0; j < keys; j += kLanes) {
                        const vf e = exp_nonpositive(sub(load(p + j), splat(most)));
                        store(p + j, e);
                        total = ::add(total, e);
                    }
                    const float whole = sum(total);
                    const vf inverse = splat(whole > 0.0f ? 1.0f / whole : 0.0f);
                    for (int64_t j = 0; j < keys; j += kLanes) store(p + j, mul(load(p + j), inverse));
                    std::fill_n(row(in.outputs[0], first + t) + head * head_dim, head_dim, 0.0f);
                }
                each_tile(1, [&](int64_t key, const float *v) {
                    for (int64_t t = 0; t < tokens; t++) {
                        const Visible sees = visible(in, first + t);
                        float *out = row(in.outputs[0], first + t) + head * head_dim;
                        const auto weigh = [&](lanes l) {
                            if (l.first < l.last)
                                weigh_rows<1>(scores + t * keys + key, v, head_dim, l.first, l.last, &out, {nullptr, 0});
                        };
                        weigh(lanes_of(key, 0, sees.sinks_end));
                        weigh(lanes_of(key, sees.first, sees.position + 1));
                    }
                });
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
        }
    }

    void step(const rl_batch *step_batch) {
        batch = step_batch;
        if (seconds.empty()) {
            for (const rl_instruction &in : instructions) run(in);
            return;
        }
        for (size_t i = 0; i < instructions.size(); i++) {
            const auto start = std::chrono::steady_clock::now();
            run(instructions[i]);
            seconds[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        }
    }

    // Fixed chunks of columns, merged in order: the same sum whatever the number of threads.
    void greedy(const float *logits, int64_t rows, int64_t columns, int32_t *best, float *most, double *log_total) {
        constexpr int64_t chunk = 4096;
        const int64_t chunks = (columns + chunk - 1) / chunk;
        struct Part {
            float most;
            int32_t best;
            double total;
        };
        std::vector<Part> parts(rows * chunks);
        pool.run(rows * chunks, std::max<int64_t>(1, chunks / (2 * pool.size())), [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; i++) {
                const int64_t start = i % chunks * chunk, n = std::min(chunk, columns - start);
                const float *x = logits + i / chunks * columns + start;
                vf peak = splat(-INFINITY);
                int64_t j = 0;
                for (; j + kLanes <= n; j += kLanes) peak = max(peak, load(x + j));
                float here = largest(peak);
                for (; j < n; j++) here = x[j] > here ? x[j] : here;
                Part &part = parts[i];
                part = {here, -1, 0.0};
                for (j = 0; j < n && part.best < 0; j++)
                    if (x[j] == here) part.best = (int32_t)(start + j);
                if (here == -INFINITY) continue;
                for (j = 0; j < n; j += 512) {  // float sums of at most 512, then double
                    vf total = zero();
                    const int64_t stop = std::min<int64_t>(n, j + 512);
                    int64_t c = j;
                    for (; c + kLanes <= stop; c += kLanes)
                        total = ::add(total, exp_nonpositive(sub(load(x + c), splat(here))));
                    double rest = sum(total);
                    for (; c < stop; c++) rest += std::exp((double)x[c] - here);
                    part.total += rest;
                }
            }
        });
        for (int64_t r = 0; r < rows; r++) {
            Part whole = parts[r * chunks];
            for (int64_t c = 1; c < chunks; c++)
                if (parts[r * chunks + c].most > whole.most) {
                    whole.most = parts[r * chunks + c].most;
                    whole.best = parts[r * chunks + c].best;
                }
            double total = 0;
            for (int64_t c = 0; c < chunks; c++)
                total += parts[r * chunks + c].total * std::exp((double)parts[r * chunks + c].most - whole.most);
            bool finite = std::isfinite(total) && whole.best >= 0;
            for (int64_t c = 0; c < chunks; c++) finite &= parts[r * chunks + c].best >= 0;
            best[r] = finite ? whole.best : -1;
            most[r] = whole.most;
            log_total[r] = whole.most + std::log(total);
        }
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

void rl_step(rl_program *program, const rl_batch *batch) { program->step(batch); }

void rl_take_times(rl_program *program, double *seconds) {
    program->seconds.resize(program->instructions.size());
    std::copy(program->seconds.begin(), program->seconds.end(), seconds);
    std::fill(program->seconds.begin(), program->seconds.end(), 0.0);
}

int64_t rl_scratch_bytes(const rl_program *program) {
    int64_t bytes = program->blocks.bytes() + program->normed.bytes() + program->queries.bytes() +
                    program->sink_queries.bytes() + program->partials.bytes();
    for (const Workspace &ws : program->workspaces)
        bytes += (int64_t)ws.unpacked.size() + ws.tile.bytes() + ws.values.bytes() + ws.scores.bytes();
    return bytes;
}

void rl_greedy(rl_program *program, const float *logits, int32_t rows, int32_t columns, int32_t *best, float *largest,
               double *log_total) {
    program->greedy(logits, rows, columns, best, largest, log_total);
}

int32_t rl_top_k(const float *logits, int32_t columns, int32_t count, int32_t *ids, float *values) {
    count = std::min(count, columns);
    if (count <= 0) return 0;
    // A heap of the best so far, the worst of them on top; most logits lose against it at once, sixteen at a time.
    const auto better = [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    for (int32_t i = 0; i < count; i++) ids[i] = i;
    std::make_heap(ids, ids + count, better);
    const auto offer = [&](int32_t i) {
        if (!better(i, ids[0])) return;
        std::pop_heap(ids, ids + count, better);
        ids[count - 1] = i;
        std::push_heap(ids, ids + count, better);
    };
    int32_t i = count;
    for (; i + kLanes <= columns; i += kLanes) {
        if (largest(load(logits + i)) <= logits[ids[0]]) continue;
        for (int32_t j = i; j < i + kLanes; j++) offer(j);
    }
    for (; i < columns; i++) offer(i);
    std::sort_heap(ids, ids + count, better);
    for (int32_t j = 0; j < count; j++) values[j] = logits[ids[j]];
    return count;
}

int64_t rl_packed_bytes(int32_t format, int32_t rows, int32_t columns) {
    int64_t bytes = 0;
    with_format(format, [&](auto p) {
        using P = decltype(p);
        if (columns % P::columns_multiple == 0) bytes = groups_of(rows) * P::group_bytes(columns);
    });
    return bytes;
}

void rl_pack(int32_t format, const void *file_rows, int32_t begin, int32_t end, int32_t rows, int32_t columns,
             void *packed_rows) {
    end = std::min(end, rows);
    with_format(format, [&](auto p) {
        pack_rows<decltype(p)>((const uint8_t *)file_rows, begin, end, columns, (uint8_t *)packed_rows);
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
