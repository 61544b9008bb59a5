// The C ABI between ops/native.py and the interpreter of Programs. Plain structs, no torch, no exceptions.
// Python fills the same layouts through ctypes; tests compare the numbers on both sides.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// Operands of each are listed in interpreter.cpp; the names match Opcode in ops/program.py.
enum rl_opcode : int32_t {
    RL_EMBED = 0,
    RL_SCALE = 1,
    RL_RMS_NORM = 2,
    RL_LINEAR = 3,
    RL_ROPE_COS_SIN = 4,
    RL_ROPE = 5,
    RL_STORE_KV = 6,
    RL_ATTENTION = 7,
    RL_GLU = 8,
    RL_ADD = 9,
    RL_GATHER_ROWS = 10,
    RL_ALL_REDUCE = 11,
    RL_ALL_GATHER = 12,
    RL_SEND = 13,
    RL_RECEIVE = 14,
    RL_NUM_OPCODES
};

// Formats are numbered as in ggml; F32 = 0 and so on.
enum rl_format : int32_t {
    RL_F32 = 0,
    RL_F16 = 1,
    RL_Q4_0 = 2,
    RL_Q4_1 = 3,
    RL_Q5_0 = 6,
    RL_Q5_1 = 7,
    RL_Q8_0 = 8,
    RL_Q2_K = 10,
    RL_Q3_K = 11,
    RL_Q4_K = 12,
    RL_Q5_K = 13,
    RL_Q6_K = 14,
    RL_BF16 = 30,
    // Codes of 2, 3, 4 or 8 bits with a scale and a zero point for every 16, 32 or 64 columns (packed_groups.h):
    // RL_GROUPS + 16 · bits + 8 if scales are float32 + 1 if a scale has 64 columns.
    RL_GROUPS = 256,
};

enum rl_kv_dtype : int32_t { RL_KV_F32 = 0, RL_KV_F16 = 1, RL_KV_I8 = 2 };

struct rl_instruction {
    int32_t opcode;
    int32_t outputs[3];  // buffers, or -1
    int32_t inputs[5];   // buffers, or -1
    int32_t weights[7];  // weights, or -1
    int32_t ints[6];
    float floats[4];
};

struct rl_buffer {
    float *address;
    int32_t rows_are_logits;  // 0: T tokens, 1: L logit rows
    int32_t columns;
};

// A matrix [rows, columns] is packed (rl_pack), a vector is float32 as it is.
struct rl_weight {
    const void *address;
    const int32_t *order;  // column j is input feature order[j]; nullptr: it is j
    int32_t format;
    int32_t rows;     // N; the length of a vector
    int32_t columns;  // K; 1 for a vector
    // How a linear rounds its input to int8 first (ActivationQuant in quant/weight.py).
    int32_t rounds_input;
    float input_scale;  // of every token; 0: each token's own, max|x| / 127
    float outlier;      // magnitudes from here on stay floats; 0: none do
};

struct rl_cache {
    // [layer][(block + layer) % num_blocks][K then V][kv head][tile]; a tile holds 32 tokens: K [head_dim][32], V [32][head_dim]
    void *pages;
    int32_t dtype;  // int8 tiles are followed by 32 float32 scales, one a token
    int32_t num_layers, num_blocks, block_size, num_kv_heads, head_dim;
};

// One step: the arrays of ops/batch.py.
struct rl_batch {
    const int32_t *token_ids, *positions, *slot_mapping, *query_start_loc, *seq_lens, *block_tables, *logit_rows;
    int32_t num_tokens, num_seqs, num_blocks_per_table, num_logits;
};

enum rl_event_kind : int16_t {
    RL_EVENT_OP = 0,    // a whole instruction, seen from the caller, thread 0
    RL_EVENT_BUSY = 1,  // another thread at work
    RL_EVENT_WAIT = 2,  // thread 0 waiting for the others
};

// One range of one thread, in nanoseconds of the steady clock (CLOCK_MONOTONIC).
struct rl_event {
    int64_t begin_ns, end_ns;
    int32_t instruction;  // -1: between steps (sampling)
    int16_t thread, kind;
};

// Why a collective failed, and with it the step.
enum rl_status : int32_t {
    RL_OK = 0,
    RL_ABORTED = 1,   // a peer is gone, or the ranks were told to stop
    RL_MISMATCH = 2,  // the ranks do not agree on what they do
    RL_RAISED = 3,    // a callback into Python raised
};

// How the ranks of a model exchange numbers: functions that return rl_status. out = residual + sum of x over the tp
// ranks, added in their order; residual may be nullptr. all_gather: x [rows, columns] of all of them side by side.
struct rl_collectives {
    void *context;
    int32_t (*all_reduce)(void *context, const float *x, const float *residual, float *out, int64_t count);
    int32_t (*all_gather)(void *context, const float *x, int64_t rows, int64_t columns, float *out, int64_t out_columns);
    int32_t (*send)(void *context, const float *x, int64_t count);
    int32_t (*receive)(void *context, float *x, int64_t count);
};

struct rl_program;

// Copies the descriptions, not what they point to. nullptr when an opcode or format is unknown.
rl_program *rl_create(const rl_instruction *instructions, int32_t num_instructions, const rl_buffer *buffers,
                      int32_t num_buffers, const rl_weight *weights, int32_t num_weights,
                      const float *const *constants, int32_t num_constants, const rl_cache *cache,
                      int32_t num_threads);
void rl_destroy(rl_program *program);

// Other addresses for the same buffers, between steps.
void rl_set_buffers(rl_program *program, const rl_buffer *buffers);

// What the instructions of collectives call; a Program that has any needs it before its first step. Copied.
void rl_set_collectives(rl_program *program, const rl_collectives *collectives);

// Run every instruction for one step. The caller is worker 0 of the pool and returns when all is done: RL_OK, or the
// status of the collective that failed, where the step ends.
int32_t rl_step(rl_program *program, const rl_batch *batch);

// Between steps: record what every thread does, with room for `capacity` events of each; 0 stops recording.
void rl_timeline_start(rl_program *program, int64_t capacity);

// Write the events since the last call, thread by thread, and forget them; room for threads * capacity. Returns how many,
// or -1 if a thread had no room for all of its own.
int64_t rl_timeline_take(rl_program *program, rl_event *events);

// Bytes that the program allocated itself and keeps between steps: quantized activations, attention's partial results.
int64_t rl_scratch_bytes(const rl_program *program);

// For rows of logits [rows, columns]: the first largest one's column, its value, and log(sum(exp(logits))).
void rl_greedy(rl_program *program, const float *logits, int32_t rows, int32_t columns, int32_t *best, float *largest,
               double *log_total);

// The `count` largest of one row, largest first, ties by column. Returns how many were written: min(count, columns).
int32_t rl_top_k(const float *logits, int32_t columns, int32_t count, int32_t *ids, float *values);

// Bytes of a packed matrix; 0: the format has no kernel, or `columns` is no multiple of its block.
int64_t rl_packed_bytes(int32_t format, int32_t rows, int32_t columns);

// Rearrange rows begin..end of a matrix in the file's layout into groups of 16 rows; `begin` is a multiple of 16.
// `packed` is the start of the whole matrix, 64-byte aligned. `group_size`, `has_zeros`: of the file's blocks of a group
// format, 0 for others; group_size is a multiple of the packed one's.
void rl_pack(int32_t format, int32_t group_size, int32_t has_zeros, const void *file_rows, int32_t begin, int32_t end,
             int32_t rows, int32_t columns, void *packed);

// Limits of the machine (limits.cpp), each on a pool of its own: seconds[0..repeats).
// Read `bytes`, an equal part for each thread, `passes` times.
void rl_limit_read(int32_t num_threads, int64_t bytes, int32_t passes, int32_t repeats, double *seconds);
// Multiply-adds from registers, kind 0 float32, 1 int8 and 2 int16 as the kernels use them. Returns how many were done.
int64_t rl_limit_compute(int32_t kind, int32_t num_threads, int64_t rounds, int32_t repeats, double *seconds);
// Starting and joining all threads with nothing to do: seconds are of one round.
void rl_limit_barrier(int32_t num_threads, int32_t rounds, int32_t repeats, double *seconds);

// Whether this processor can run the library built for `isa` ("generic", "avx2", "avx512").
int32_t rl_cpu_supports(const char *isa);
}
#pragma GCC visibility pop
