// Encoders of GGUF's block formats that search for the best scales (quant/gguf_native.py).
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// Rows of float32 [rows, columns] -> blocks in the file's layout, byte for byte what ggml writes. `format` is ggml's
// number, `columns` a multiple of its block, all values finite. `importance` [columns] weighs the squared error of each
// column; nullptr: ggml's own weights for K-quants, while Q4_0 to Q5_1 have no search without it.
// Returns 0, or -1 where there is no such encoder.
int32_t rl_gguf_quantize(int32_t format, const float *values, int64_t rows, int32_t columns, const float *importance,
                         uint8_t *blocks);
}
#pragma GCC visibility pop
