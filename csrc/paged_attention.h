// Attention of one step: which rows of which sequences share KV tiles, and which thread takes them. The kernels are in
// attention.h.
#pragma once
#include <algorithm>
#include <vector>

#include "attention.h"
#include "thread_pool.h"
#include "workspace.h"

constexpr int64_t kQueryRows = 48;  // query rows that share a KV tile
constexpr int64_t kMaxRows = 64;    // and query heads of one KV head, at most

// One attention instruction: rows [tokens, columns] of queries, rotated, and where the result goes.
struct attention_call {
    int64_t layer, head_dim, columns;
    int64_t window;  // -1: none
    int64_t num_sinks;
    float scale;
    const float *q, *q_sinks;
    float *output;
};

class PagedAttention {
public:
    PagedAttention(const rl_cache &c, ThreadPool &p, std::vector<Workspace> &w) : cache(c), pool(p), workspaces(w) {}
    void flash(const rl_batch &step, const attention_call &call) {
        batch = step;
        flash_attention(call);
    }
    void naive(const rl_batch &step, const attention_call &call) {
        batch = step;
        naive_attention(call);
    }
    int64_t scratch_bytes() const { return partials_.bytes(); }

private:
    struct QueryTile {
        int32_t sequence;
        int32_t first, count;  // tokens
    };
    const rl_cache &cache;
    ThreadPool &pool;
    std::vector<Workspace> &workspaces;
    rl_batch batch{};
    Scratch<float> partials_;
    std::vector<QueryTile> tiles_;  // of this step

    // The keys that a token sees: 0..sinks with the other rotation, then first..position.
    struct Visible {
        int64_t sinks_end, first, position;
    };
    Visible visible(const attention_call &in, int64_t t) const {
        const int64_t position = batch.positions[t];
        const int64_t sinks_end = std::min<int64_t>(in.num_sinks, position + 1);
        return {sinks_end, in.window < 0 ? sinks_end : std::max(sinks_end, position - in.window + 1), position};
    }

    // Query rows of one tile and KV head; views into a thread's workspace.
    struct Rows {
        int64_t count;
        const float *q[kMaxRows], *q_sinks[kMaxRows];
        Visible sees[kMaxRows];
        lanes in_tile[kMaxRows];
        row_state parts[kMaxRows], wholes[kMaxRows];
    };

    void flash_attention(const attention_call &in) {
        const int64_t columns = in.columns, head_dim = in.head_dim;
        const int64_t kv_heads = cache.num_kv_heads, group = columns / (kv_heads * head_dim);
        make_query_tiles_(group);
        const int64_t items = (int64_t)tiles_.size() * kv_heads;
        int64_t longest = 0;
        for (int32_t s = 0; s < batch.num_seqs; s++) longest = std::max<int64_t>(longest, batch.seq_lens[s]);
        const int64_t partitions = (longest + kPartition - 1) / kPartition;
        const auto output = [&](int64_t t, int64_t head) {
            return in.output + t * columns + head * head_dim;
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
                    const QueryTile &tile = tiles_[(items - 1 - i) / kv_heads];  // the longest first
                    const int64_t g = (items - 1 - i) % kv_heads;
                    Rows rows;
                    float *values = fill_rows(in, rows, tile, g, group, workspaces[thread], 2);
                    for (int64_t r = 0; r < rows.count; r++) {
                        rows.wholes[r].values = values + (rows.count + r) * head_dim;
                        clear(rows.wholes[r], head_dim);
                    }
                    for (int64_t p = 0; p * kPartition < batch.seq_lens[tile.sequence]; p++) {
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
        float *parts = partials_.get(items * partitions * most_rows * stride);
        pool.run(items * partitions, 1, [&](int64_t begin, int64_t end, int thread) {
            for (int64_t i = begin; i < end; i++) {
                const int64_t item = i / partitions, p = i % partitions;
                const QueryTile &tile = tiles_[item / kv_heads];
                Rows rows;
                fill_rows(in, rows, tile, item % kv_heads, group, workspaces[thread], 1);
                if (p * kPartition < batch.seq_lens[tile.sequence] &&
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
            const QueryTile &tile = tiles_[item / kv_heads];
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

    // Tokens of one sequence whose query rows share KV tiles_; a padding row of an empty sequence sees nothing.
    void make_query_tiles_(int64_t group) {
        const int32_t most = (int32_t)std::max<int64_t>(1, kQueryRows / group);
        tiles_.clear();
        for (int32_t s = 0; s < batch.num_seqs; s++)
            for (int32_t t = batch.query_start_loc[s]; t < batch.query_start_loc[s + 1]; t += most)
                tiles_.push_back({s, t, std::min(most, batch.query_start_loc[s + 1] - t)});
    }

    float *fill_rows(const attention_call &in, Rows &rows, const QueryTile &tile, int64_t g, int64_t group, Workspace &ws,
                     int64_t states) {
        const int64_t head_dim = in.head_dim, columns = in.columns;
        rows.count = tile.count * group;
        float *values = ws.values.get(states * rows.count * head_dim + kLanes);
        for (int64_t r = 0; r < rows.count; r++) {
            const int64_t t = tile.first + r / group, head = g * group + r % group;
            rows.q[r] = in.q + t * columns + head * head_dim;
            rows.q_sinks[r] = in.q_sinks + t * columns + head * head_dim;
            rows.sees[r] = visible(in, t);
            rows.parts[r].values = values + r * head_dim;
        }
        return values;
    }

    // Positions 256 p .. 256 p + 255 into rows.parts; false, with the states untouched, when no row sees any.
    bool attend_partition(const attention_call &in, Rows &rows, const QueryTile &tile, int64_t g, int64_t p,
                          Workspace &ws) {
        const int64_t begin = p * kPartition, end = begin + kPartition, head_dim = in.head_dim;
        int64_t first = INT64_MAX, last = -1, sinks = 0;
        for (int64_t r = 0; r < rows.count; r++) {
            first = std::min(first, rows.sees[r].first);
            last = std::max(last, rows.sees[r].position);
            sinks = std::max(sinks, rows.sees[r].sinks_end);
        }
        const bool sees_sinks = begin < sinks;
        if (batch.seq_lens[tile.sequence] == 0 || (!sees_sinks && (first >= end || last < begin))) return false;
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
    void attend_keys(const attention_call &in, Rows &rows, const float *const *q, const QueryTile &tile, int64_t g,
                     int64_t key, Workspace &ws, const F &lanes_seen) {
        const int64_t head_dim = in.head_dim;
        const int32_t *table = batch.block_tables + (int64_t)tile.sequence * batch.num_blocks_per_table;
        bool any = false;
        for (int64_t r = 0; r < rows.count; r++) {
            rows.in_tile[r] = lanes_seen(rows.sees[r]);
            any |= rows.in_tile[r].first < rows.in_tile[r].last;
        }
        if (!any) return;
        const int64_t slot = table[key / cache.block_size] * (int64_t)cache.block_size + key % cache.block_size;
        const kv_pages pages{cache};
        const uint8_t *k = pages.tile(in.layer, slot, 0, g), *v = pages.tile(in.layer, slot, 1, g);
        next_tile next_k{nullptr, 0}, next_v{nullptr, 0};
        const int64_t next = key + kTile;
        if (next < batch.seq_lens[tile.sequence] && table[next / cache.block_size] >= 0) {
            const int64_t next_slot = table[next / cache.block_size] * (int64_t)cache.block_size + next % cache.block_size;
            next_k = {pages.tile(in.layer, next_slot, 0, g), pages.tile_bytes()};
            next_v = {pages.tile(in.layer, next_slot, 1, g), pages.tile_bytes()};
        }
        float *scores = ws.scores.get((rows.count + kScoreRows) * kTile);
        const tile_rows some{rows.count, head_dim, q, rows.in_tile, rows.parts, scores, next_k, next_v};
        if (cache.dtype == RL_KV_F16 && rows.count <= 2 * kScoreRows) {  // converting twice is cheaper than storing
            attend_tile(some, (const uint16_t *)k, (const uint16_t *)v, in.scale);
        } else {
            float *wide = ws.tile.get(2 * kTile * head_dim);
            attend_tile(some, pages.floats(k, true, wide), pages.floats(v, false, wide + kTile * head_dim), in.scale);
        }
    }

    // All scores of a query head at once, [tokens of the sequence, keys]: what flash avoids.
    void naive_attention(const attention_call &in) {
        const int64_t columns = in.columns, head_dim = in.head_dim;
        const int64_t heads = columns / head_dim, group = heads / cache.num_kv_heads;
        const kv_pages pages{cache};
        pool.run(batch.num_seqs * heads, 1, [&](int64_t begin, int64_t end, int thread) {
            Workspace &ws = workspaces[thread];
            for (int64_t item = begin; item < end; item++) {
                const int64_t s = item / heads, head = item % heads, g = head / group;
                const int64_t first = batch.query_start_loc[s], tokens = batch.query_start_loc[s + 1] - first;
                const int64_t keys = (batch.seq_lens[s] + kTile - 1) / kTile * kTile;
                const int32_t *table = batch.block_tables + s * batch.num_blocks_per_table;
                float *scores = ws.scores.get(std::max<int64_t>(1, tokens * keys));
                float *wide = ws.tile.get(kTile * head_dim);
                const auto each_tile = [&](int which, const auto &fn) {
                    for (int64_t key = 0; key < keys; key += kTile) {
                        const int64_t block = table[key / cache.block_size];
                        if (block < 0) continue;  // freed behind the window
                        const int64_t slot = block * cache.block_size + key % cache.block_size;
                        fn(key, pages.floats(pages.tile(in.layer, slot, which, g), which == 0, wide));
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
                            score_rows<1>(&query, k, head_dim, in.scale, some, {nullptr, 0});
                            std::copy(some + l.first, some + l.last, scores + t * keys + key + l.first);
                        };
                        score(in.q_sinks, sinks);
                        score(in.q, near);
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
                        total = add(total, e);
                    }
                    const float whole = sum(total);
                    const vf inverse = splat(whole > 0.0f ? 1.0f / whole : 0.0f);
                    for (int64_t j = 0; j < keys; j += kLanes) store(p + j, mul(load(p + j), inverse));
                    std::fill_n(in.output + (first + t) * columns + head * head_dim, head_dim, 0.0f);
                }
                each_tile(1, [&](int64_t key, const float *v) {
                    for (int64_t t = 0; t < tokens; t++) {
                        const Visible sees = visible(in, first + t);
                        float *out = in.output + (first + t) * columns + head * head_dim;
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
};
