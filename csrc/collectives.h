// Collectives of the ranks on one host, through memory that they all map (distributed/collectives.py). The functions
// that return int32_t return rl_status.
#pragma once
#include <cstdint>

#include "ridgeline.h"

#pragma GCC visibility push(default)
extern "C" {

struct rl_rank;  // what one rank knows of the region

// What one op has done; in the order all_reduce, all_gather, send, receive.
struct rl_traffic {
    int64_t calls, bytes, ns, wait_ns;
};

// Bytes of the region of tp_size * pp_size ranks. `message_bytes`: the largest message between stages; a mailbox holds
// two of them, or more smaller ones.
int64_t rl_region_bytes(int32_t tp_size, int32_t pp_size, int64_t message_bytes);
// Prepare memory of zeros, once, before any rank joins.
void rl_region_init(void *region, int32_t tp_size, int32_t pp_size, int64_t message_bytes);
// Make every wait fail, now and from now on.
void rl_region_abort(void *region);

// nullptr: the memory was not prepared by this version for so many ranks.
rl_rank *rl_join(void *region, int64_t bytes, int32_t tp_size, int32_t pp_size, int32_t tp_rank, int32_t pp_rank);
void rl_leave(rl_rank *rank);

// out = residual + (x of tp rank 0 + x of rank 1 + ...); `residual` may be nullptr. element_size: 4 float, 8 double.
int32_t rl_all_reduce(rl_rank *rank, const void *x, const void *residual, void *out, int64_t count, int32_t element_size);
// x [rows, columns] of all tp ranks side by side into out [rows, out_columns].
int32_t rl_all_gather(rl_rank *rank, const void *x, int64_t rows, int64_t columns, void *out, int64_t out_columns,
                      int32_t element_size);
// To the next stage, from the one before: the same tp rank there.
int32_t rl_send(rl_rank *rank, const void *x, int64_t bytes);
int32_t rl_receive(rl_rank *rank, void *x, int64_t bytes);

void rl_pointers(rl_rank *rank, rl_collectives *out);  // for rl_set_collectives
void rl_traffic_of(const rl_rank *rank, rl_traffic *out);  // of the four ops
}
#pragma GCC visibility pop
