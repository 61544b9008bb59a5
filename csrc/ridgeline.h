// The C ABI between ops/native.py and the interpreter of Programs. Plain structs, no torch, no exceptions.
// Python fills the same layouts through ctypes; tests compare the numbers on both sides.
#pragma once
#include <cstdint>

extern "C" {

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
};

// Formats are numbered as in ggml; F32 = 0 and so on. Others are refused when a program is created.
enum rl_format : int32_t {
    RL_F32 = 0,
    RL_F16 = 1,
    RL_Q4_0 = 2,
    RL_Q4_1 = 3,
    RL_Q5_0 = 6,
    RL_Q5_1 = 7,
    RL_Q8_0 = 8,
    RL_BF16 = 30,
};

enum rl_kv_dtype : int32_t { RL_KV_F32 = 0, RL_KV_F16 = 1 };

struct rl_instruction {
    int32_t opcode;
    int32_t output;      // buffer, or -1
    int32_t inputs[2];   // buffers, or -1
    int32_t weights[2];  // weights, or -1
    int32_t ints[4];     // see interpreter.cpp, one comment per opcode
    float floats[2];
};

struct rl_buffer {
    float *address;
    int32_t rows_are_logits;  // 0: T tokens, 1: L logit rows
    int32_t columns;
};

struct rl_weight {
    const void *address;
    int32_t format;
    int32_t rows;     // N; the length of a vector
    int32_t columns;  // K; 1 for a vector
};

struct rl_cache {
    void *pages;  // [layer][block][K then V][kv head][tile]: K tiles [head_dim][32], V tiles [32][head_dim]
    int32_t dtype;
    int32_t num_layers, num_blocks, block_size, num_kv_heads, head_dim;
};

// One step: the arrays of ops/batch.py.
struct rl_batch {
    const int32_t *token_ids, *positions, *slot_mapping, *query_start_loc, *seq_lens, *block_tables, *logit_rows;
    int32_t num_tokens, num_seqs, num_blocks_per_table, num_logits;
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

// Run every instruction for one step. The caller is worker 0 of the pool and returns when all is done.
void rl_step(rl_program *program, const rl_batch *batch);

// Whether this processor can run the library built for `isa` ("generic", "avx2").
int32_t rl_cpu_supports(const char *isa);
}
