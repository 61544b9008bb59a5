"""Every setting of a model and of the engine, as frozen dataclasses.

`ModelConfig` says what the file says: every field is a number or a name, nothing is derived later.
`EngineConfig` says how to run it. `None` means "choose for me"; `EngineConfig.resolve` replaces every
`None` once and logs what it chose. `EngineConfig.from_options(max_num_seqs=4, block_size=64)` takes the
fields of the nested groups by their own names, which are unique.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_args

from ridgeline.errors import ConfigError
from ridgeline.logs import logger

Executor = Literal["native", "eager", "compiled"]
Device = Literal["cpu", "cuda"]
DType = Literal["float64", "float32", "bfloat16", "float16"]
KVCacheDType = Literal["float64", "float32", "bfloat16", "float16", "int8"]
AttentionImpl = Literal["naive", "flash", "sdpa"]
Batching = Literal["none", "static", "continuous"]
KVLayout = Literal["paged", "contiguous"]
Activation = Literal["silu", "gelu_tanh"]
RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]

TILE_TOKENS = 32
"""A cache block is a multiple of this many tokens: the tile the attention kernels work on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer. `models.rope` turns it into frequencies."""

    theta: float
    rotary_dim: int
    """Leading features of each head that are rotated; the rest pass through."""
    rope_type: RopeType = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    """Context length the model was trained with; None: `ModelConfig.max_position`."""
    low_freq_factor: float = 1.0
    """llama3 only."""
    high_freq_factor: float = 4.0
    """llama3 only."""
    beta_fast: float = 32.0
    """yarn only."""
    beta_slow: float = 1.0
    """yarn only."""
    attention_factor: float | None = None
    """yarn only: multiplies cos and sin; None: computed from `factor` and the two mscales."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """yarn only: round the correction range to whole dimensions."""
    freq_divisors: tuple[float, ...] | None = None
    """A baked `rope_freqs.weight` of a GGUF file: frequency i is divided by entry i."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape and features of a decoder. `models.decoder` reads nothing else."""

    arch: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: Activation
    tie_embeddings: bool
    rope: RopeConfig
    rope_local: RopeConfig | None = None
    """RoPE of the sliding-window layers where it differs (Gemma 3)."""
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    """A second norm after attention and after the MLP, before the residual add (Gemma)."""
    norm_offset: float = 0.0
    """RMSNorm multiplies by (offset + weight): 1.0 for Gemma from Hugging Face, 0.0 from GGUF."""
    embed_scale: float = 1.0
    attn_scale: float | None = None
    """Multiplies q·k; None: head_dim ** -0.5."""
    sliding_window: int | None = None
    """Tokens a windowed layer sees, itself included."""
    window_layers: tuple[int, ...] = ()
    """Indices of the layers with a sliding window."""
    num_sinks: int = 0
    """First tokens that windowed layers keep seeing (StreamingLLM); their distance to the query is
    counted inside the cache, not in the text."""
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_q_per_kv(self) -> int:
        """GQA group size."""
        return self.num_heads // self.num_kv_heads

    @property
    def window_is_global(self) -> bool:
        """True when every layer is windowed, so that old blocks can be freed."""
        return self.sliding_window is not None and len(self.window_layers) == self.num_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadConfig:
    """Changes made to the model while it is loaded."""

    rope_scaling: dict[str, float | bool | str] | None = None
    """Hugging Face form, e.g. {"rope_type": "yarn", "factor": 4.0}; replaces what the file says."""
    num_kv_heads: int | None = None
    """Another number of KV heads: more (up to num_heads) repeats them, exactly; fewer averages them."""
    sliding_window: int | None = None
    """Make every layer see only this many tokens, itself included."""
    num_sinks: int = 0
    """With a sliding window: this many first tokens stay visible (StreamingLLM)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The KV cache: whether, how laid out, how large."""

    kv_cache: bool = True
    """Off: nothing is remembered between steps and every step computes all tokens again."""
    kv_layout: KVLayout = "paged"
    """paged: blocks of block_size tokens; contiguous: one block of max_model_len per request."""
    block_size: int | None = None
    """Tokens per block, a multiple of 32; None: 32 when paged."""
    kv_cache_dtype: KVCacheDType | None = None
    """Element type of the pages; None: float16 on native, that of the arithmetic on torch."""
    kv_cache_memory_bytes: int | None = None
    """Size of the cache in bytes, on each rank; None: from the memory that is free."""
    kv_cache_tokens: int | None = None
    """Size of the cache in tokens; at most one of the two sizes may be given."""
    enable_prefix_caching: bool | None = None
    """Reuse full blocks whose tokens are the same; None: where the other settings allow it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Which tokens of which requests are computed in one step."""

    batching: Batching = "continuous"
    """none: one request at a time; static: a batch, padded, until all have finished; continuous:
    requests come and go every step."""
    max_num_seqs: int = 32
    """Requests that run at the same time."""
    max_num_batched_tokens: int | None = None
    """Tokens computed in one step; None: 512, or max_model_len where prompts are not chunked."""
    enable_chunked_prefill: bool | None = None
    """Split long prompts over several steps; None: where the other settings allow it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Over how many ranks a model is spread: tp_size * pp_size processes."""

    tp_size: int = 1
    """Tensor parallel: every matrix and all heads are split over so many ranks."""
    pp_size: int = 1
    """Pipeline parallel: the layers are split over so many stages."""

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """All settings of one engine."""

    model: str
    """A .gguf file, a Hugging Face directory, or the alias of an installed model package."""
    executor: Executor | None = None
    """native: C++ kernels, one call per step; eager: torch; compiled: torch.compile."""
    device: Device | None = None
    dtype: DType | None = None
    """torch: arithmetic and weight storage. native: storage of matrices (arithmetic is float32, or integer
    for quantized ones); None: as in the file."""
    attention: AttentionImpl | None = None
    """naive: all scores in memory; flash: tiles and online softmax; sdpa: torch's own kernel (not native)."""
    max_model_len: int | None = None
    """Longest prompt plus output; None: what the model was trained for."""
    num_threads: int | None = None
    fusion: str | None = None
    """Fusion rules of native, by name with commas between, or "none"; None: all. `ridgeline kernels explain`
    lists them."""
    packed_cache: bool = False
    """native: keep the packed weights in a file under ~/.cache/ridgeline that the next start maps."""
    seed: int = 0
    """Seed of requests that bring none."""
    load: LoadConfig = field(default_factory=LoadConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @classmethod
    def from_options(cls, model: str, **options: Any) -> EngineConfig:
        """Build from flat options: `EngineConfig.from_options("smollm2", max_num_seqs=4, block_size=64)`.

        Raises ConfigError for an unknown name, a value of the wrong kind, or an impossible value.
        """
        return cls(model=model).with_options(**options)

    def with_options(self, **options: Any) -> EngineConfig:
        """A copy with some fields, of this group or a nested one, replaced."""
        groups = {f.name: getattr(self, f.name) for f in fields(self) if is_dataclass(getattr(self, f.name))}
        owners = {f.name: name for name, group in groups.items() for f in fields(group)}
        own = {f.name for f in fields(self)} - set(groups)
        unknown = sorted(set(options) - own - set(owners))
        if unknown:
            known = ", ".join(sorted((own - {"model"}) | set(owners)))
            raise ConfigError(f"unknown engine option {', '.join(map(repr, unknown))}; options: {known}")
        changes: dict[str, Any] = {name: value for name, value in options.items() if name in own}
        for name, group in groups.items():
            inside = {k: v for k, v in options.items() if owners.get(k) == name}
            if inside:
                changes[name] = replace(group, **inside)
        return replace(self, **changes)

    def flat(self) -> dict[str, Any]:
        """Every setting by its name, as `from_options` takes them, the model included."""
        groups = (self, self.load, self.cache, self.scheduler, self.parallel)
        return {
            f.name: getattr(g, f.name)
            for g in groups
            for f in fields(g)
            if not is_dataclass(getattr(g, f.name))
        }

    def resolve(self, model: ModelConfig, *, unavailable: Mapping[Executor, str]) -> EngineConfig:
        """Replace every None by a choice, once, and say so in the log.

        `unavailable` gives, for each executor that cannot run here, the reason. Raises ConfigError for
        settings that contradict each other or that the executor cannot honour. The size of the cache is
        decided later, by `engine.memory`, when the weights are in memory.
        """
        _check(self)
        executor = self._resolve_executor(unavailable)
        device: Device = self.device or "cpu"
        dtype = self.dtype
        if dtype is None and executor != "native":
            dtype = "bfloat16" if device == "cuda" else "float32"
        max_model_len = self.max_model_len or _default_max_model_len(model, self.load)
        if (
            max_model_len > model.max_position
            and self.load.rope_scaling is None
            and not model.window_is_global
        ):
            logger.warning(
                "max_model_len=%d is beyond the %d positions the model was trained for; expect poor text",
                max_model_len,
                model.max_position,
            )
        if self.fusion is not None and executor != "native":
            raise ConfigError(
                f"fusion={self.fusion!r} is a setting of executor='native'; this is {executor!r}"
            )
        cache = self._resolve_cache(max_model_len, "float16" if executor == "native" else dtype or "float32")
        resolved = replace(
            self,
            executor=executor,
            device=device,
            dtype=dtype,
            attention=self.attention or ("flash" if executor == "native" else "sdpa"),
            max_model_len=max_model_len,
            cache=cache,
            scheduler=self._resolve_scheduler(max_model_len, cache),
        )
        for name, value in _choices(self, resolved):
            logger.info("%s: chose %s", name, value)
        return resolved

    def _resolve_executor(self, unavailable: Mapping[Executor, str]) -> Executor:
        """native where it can serve these settings, else eager; a named executor is never replaced."""
        values = self.flat()
        obstacles = [
            f"{name}={values[name]!r} (it takes {', '.join(map(repr, choices))})"
            for name, choices in _NATIVE_CHOICES.items()
            if values[name] not in (None, *choices)
        ]
        reasons = dict(unavailable)
        if obstacles and "native" not in reasons:
            reasons["native"] = f"it cannot honour {', '.join(obstacles)}; use executor='eager' for these"
        if self.executor is not None:
            if self.executor in reasons:
                raise ConfigError(f"executor={self.executor!r} cannot be used: {reasons[self.executor]}")
            return self.executor
        for executor in ("native", "eager"):
            if executor not in reasons:
                if executor != "native":
                    logger.info("executor: eager, since native cannot be used: %s", reasons["native"])
                return executor
        raise ConfigError(
            "no executor can be used here. "
            + " ".join(f"{name}: {reason}." for name, reason in reasons.items() if name != "compiled")
        )

    def _resolve_cache(self, max_model_len: int, dtype: KVCacheDType) -> CacheConfig:
        cache = self.cache
        whole = -(-max_model_len // TILE_TOKENS) * TILE_TOKENS
        if cache.kv_layout == "contiguous":
            if cache.block_size not in (None, whole):
                raise ConfigError(
                    f"block_size={cache.block_size} with kv_layout='contiguous': there a block is one "
                    f"request's {whole} tokens (max_model_len rounded up to {TILE_TOKENS}); "
                    "leave block_size out"
                )
            block_size = whole
        else:
            block_size = cache.block_size or TILE_TOKENS
        reusable = cache.kv_layout == "paged" and cache.kv_cache and self.scheduler.batching == "continuous"
        if cache.enable_prefix_caching and not reusable:
            raise ConfigError(
                "enable_prefix_caching needs kv_cache=True, kv_layout='paged' and batching='continuous'; "
                f"given kv_cache={cache.kv_cache}, kv_layout={cache.kv_layout!r}, "
                f"batching={self.scheduler.batching!r}"
            )
        return replace(
            cache,
            block_size=block_size,
            kv_cache_dtype=cache.kv_cache_dtype or dtype,
            enable_prefix_caching=reusable
            if cache.enable_prefix_caching is None
            else cache.enable_prefix_caching,
        )

    def _resolve_scheduler(self, max_model_len: int, cache: CacheConfig) -> SchedulerConfig:
        scheduler = self.scheduler
        can_chunk = cache.kv_cache and scheduler.batching != "static"
        if scheduler.enable_chunked_prefill and not can_chunk:
            raise ConfigError(
                "enable_chunked_prefill needs kv_cache=True and batching other than 'static'; given "
                f"kv_cache={cache.kv_cache}, batching={scheduler.batching!r}"
            )
        chunked = can_chunk if scheduler.enable_chunked_prefill is None else scheduler.enable_chunked_prefill
        budget = scheduler.max_num_batched_tokens or (512 if chunked else max_model_len)
        if not chunked and budget < max_model_len:
            raise ConfigError(
                f"max_num_batched_tokens={budget} is below max_model_len={max_model_len}, and prompts are "
                "not chunked: a long prompt could never run. Raise the one or lower the other"
            )
        num_seqs = 1 if scheduler.batching == "none" else scheduler.max_num_seqs
        return replace(
            scheduler,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max(budget, num_seqs),
            enable_chunked_prefill=chunked,
        )


def _default_max_model_len(model: ModelConfig, load: LoadConfig) -> int:
    """What the model was trained for, stretched by a RoPE scaling that was asked for."""
    if load.rope_scaling is None:
        return model.max_position
    original = model.rope.original_max_position or model.max_position
    return max(model.max_position, int(original * model.rope.factor))


_CHOICES: dict[str, Any] = {
    "executor": Executor,
    "device": Device,
    "dtype": DType,
    "attention": AttentionImpl,
    "kv_layout": KVLayout,
    "kv_cache_dtype": KVCacheDType,
    "batching": Batching,
}
_NATIVE_CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("cpu",),
    "dtype": ("float32", "float16", "bfloat16"),
    "attention": ("flash", "naive"),
    "kv_cache_dtype": ("float32", "float16", "int8"),
}
"""What the native executor can do."""
_POSITIVE = (
    "tp_size",
    "pp_size",
    "max_model_len",
    "num_threads",
    "block_size",
    "kv_cache_memory_bytes",
    "kv_cache_tokens",
    "max_num_seqs",
    "max_num_batched_tokens",
)
_FLAGS = ("packed_cache", "kv_cache", "enable_prefix_caching", "enable_chunked_prefill")
_OPTIONAL = frozenset(
    {"executor", "device", "dtype", "attention", "kv_cache_dtype", *_POSITIVE, *_FLAGS}
    - {"max_num_seqs", "kv_cache", "packed_cache", "tp_size", "pp_size"}
)


def _check(config: EngineConfig) -> None:
    """Each value alone: one of its choices, positive, of the right type."""
    values = config.flat()

    def refuse(name: str, expected: str) -> ConfigError:
        return ConfigError(f"{name}={values[name]!r}: expected {expected}")

    for name, value in values.items():
        if value is None and name in _OPTIONAL:
            continue
        if name in _CHOICES and value not in get_args(_CHOICES[name]):
            raise refuse(name, f"one of {', '.join(map(repr, get_args(_CHOICES[name])))}")
        if name in _POSITIVE and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise refuse(name, "a whole number of at least 1")
        if name in _FLAGS and not isinstance(value, bool):
            raise refuse(name, "True or False")
    if not isinstance(config.seed, int) or not 0 <= config.seed < 2**64:
        raise refuse("seed", "a whole number from 0 to 2**64 - 1")
    if config.cache.block_size is not None and config.cache.block_size % TILE_TOKENS:
        raise refuse("block_size", f"a multiple of {TILE_TOKENS}")
    if config.cache.kv_cache_memory_bytes is not None and config.cache.kv_cache_tokens is not None:
        raise ConfigError(
            "kv_cache_memory_bytes and kv_cache_tokens both say how large the cache is; give one"
        )


def _choices(before: EngineConfig, after: EngineConfig) -> list[tuple[str, Any]]:
    old, new = before.flat(), after.flat()
    return [(name, new[name]) for name in new if old[name] is None and new[name] is not None]
