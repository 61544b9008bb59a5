"""How large the KV cache is: from what was asked for, else from the memory that is free."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from ridgeline.config import EngineConfig, ModelConfig
from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.logs import logger

FREE_MEMORY_SHARE = 0.5
"""Of the free memory, for the cache when no size was given: the rest is for activations and others."""


def free_memory_bytes() -> int:
    """Memory that can be had without swapping: MemAvailable of Linux, or less under a cgroup limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo") as meminfo:
            fields = dict(line.split(":") for line in meminfo)
        free = int(fields["MemAvailable"].split()[0]) * 1024
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            allowed = limit.read().strip()
            if allowed != "max":
                free = min(free, int(allowed) - int(used.read()))
    except (OSError, KeyError, ValueError):
        pass
    return max(free, 0)


def plan_cache(config: EngineConfig, model: ModelConfig, *, ranks: Sequence[ModelConfig] = ()) -> CacheLayout:
    """Layout of the cache of a resolved config: of the whole model, also where `ranks` share it.

    All ranks have the same blocks, each for its own heads and layers (`cache_of_rank`): the largest of them
    may use kv_cache_memory_bytes, and the free memory is that of all of them together, on CUDA that of one
    GPU for each. Without a size: as many tokens as max_num_seqs requests of max_model_len need, within half
    of the free memory. Raises ConfigError with the numbers when not even one block fits.
    """
    cache = config.cache
    dtype = cache.kv_cache_dtype
    assert dtype and cache.block_size and config.max_model_len
    rank_bytes = [CacheLayout.bytes_per_token(rank, dtype) for rank in ranks or (model,)]
    token_bytes = sum(rank_bytes)
    per_request = -(-config.max_model_len // cache.block_size)
    wanted = config.scheduler.max_num_seqs * per_request
    if cache.kv_cache_tokens is not None:
        num_blocks, limit = cache.kv_cache_tokens // cache.block_size, f"{cache.kv_cache_tokens} tokens"
    elif cache.kv_cache_memory_bytes is not None:
        token_bytes = max(rank_bytes)
        num_blocks = cache.kv_cache_memory_bytes // (token_bytes * cache.block_size)
        limit = f"{cache.kv_cache_memory_bytes:,} bytes{' a rank' if ranks else ''}"
    else:
        if config.device == "cuda":
            from ridgeline.engine.executors.eager import free_cuda_bytes

            token_bytes, free = max(rank_bytes), free_cuda_bytes()
        else:
            free = free_memory_bytes()
        free = int(free * FREE_MEMORY_SHARE)
        num_blocks = min(wanted, free // (token_bytes * cache.block_size))
        limit = f"{free:,} bytes, half of the free memory"
    if num_blocks < 1:
        raise ConfigError(
            f"the KV cache of {limit} does not hold one block of {cache.block_size} tokens "
            f"({token_bytes * cache.block_size:,} bytes); give it more, or lower block_size or max_model_len"
        )
    logger.info(
        "KV cache: %d blocks of %d tokens, %s bytes (%s), %s bytes per token",
        num_blocks,
        cache.block_size,
        f"{num_blocks * cache.block_size * sum(rank_bytes):,}",
        dtype,
        f"{sum(rank_bytes):,}",
    )
    return CacheLayout(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=dtype,
        block_size=cache.block_size,
        num_blocks=num_blocks,
    )


def cache_of_rank(layout: CacheLayout, rank: ModelConfig) -> CacheLayout:
    """The same blocks for the heads and layers of one rank."""
    return replace(layout, num_layers=rank.num_layers, num_kv_heads=rank.num_kv_heads)
