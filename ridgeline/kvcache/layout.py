"""Shape and bytes of the KV cache. Each executor owns its buffers; this says how large they are."""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.config import KVCacheDType, ModelConfig

ELEMENT_BYTES: dict[KVCacheDType, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 4
"""int8 pages carry one float32 scale per token and KV head, for K and for V."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheLayout:
    """The cache of all layers: `num_blocks` blocks of `block_size` token slots."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: KVCacheDType
    block_size: int
    num_blocks: int

    @staticmethod
    def bytes_per_token(model: ModelConfig, dtype: KVCacheDType) -> int:
        """K and V of one token in all layers: 2 · layers · KV heads · (head_dim · element + scale)."""
        head_bytes = model.head_dim * ELEMENT_BYTES[dtype] + (SCALE_BYTES if dtype == "int8" else 0)
        return 2 * model.num_layers * model.num_kv_heads * head_bytes

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def num_bytes(self) -> int:
        """All pages of all layers."""
        head_bytes = self.head_dim * ELEMENT_BYTES[self.dtype] + (SCALE_BYTES if self.dtype == "int8" else 0)
        return 2 * self.num_layers * self.num_slots * self.num_kv_heads * head_bytes
