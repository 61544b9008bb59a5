"""compressed-tensors checkpoints (llm-compressor), integer formats, read and written.

    pack-quantized   weight_packed int32 [N, K * bits / 32] along K, weight_shape int64 [2],
                     weight_zero_point int32 [N * bits / 32, R] along N, weight_g_idx int32 [K] (act-order)
    int-quantized    weight int8 [N, K], weight_zero_point int8 [N, R]; naive-quantized is the same
    both             weight_scale [N, R], [N, 1] for a channel, [1] for a tensor; input_scale [1] if static

Codes and zero points are signed, w = scale * (q - z); packed ones have 2^(bits - 1) added, which makes them
our unsigned ones. `config_groups` says which modules are stored how: by name, by an expression ("re:...")
or by class. Inputs of 8 bits make the linear a W8A8 one.
Source: the compressed-tensors package, 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ridgeline.checkpoint.stored import (
    Parts,
    Settings,
    StoredLinear,
    even_groups,
    group_sizes,
    grouped_order,
    stored_scales,
)
from ridgeline.checkpoint.words import WORD_BITS, bytes_of_words, num_words, pack_words, unpack_words
from ridgeline.errors import CheckpointError
from ridgeline.logs import logger
from ridgeline.quant.formats import Array
from ridgeline.quant.groups import Bytes, Floats, Groups, pack_bits
from ridgeline.quant.weight import ActivationQuant

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")


@dataclass(frozen=True, slots=True)
class CTGroup:
    """One entry of config_groups: how the linears that match `targets` are stored."""

    targets: tuple[str, ...]
    bits: int
    strategy: Literal["group", "channel", "tensor"]
    group_size: int | None
    """None: the whole row"""
    symmetric: bool
    inputs: Literal["float", "dynamic", "static"] = "float"
    packed: bool = True
    """For writing. transformers takes an embedding in bytes only."""


@dataclass(frozen=True, slots=True)
class CTScheme:
    """What a quantization_config of compressed-tensors says."""

    groups: tuple[CTGroup, ...]
    ignore: tuple[str, ...]

    def read(self, parts: Parts) -> StoredLinear | None:
        group = self._group_of(parts.module)
        if group is None:
            return None
        if "weight_packed" in parts:
            return _read_packed(parts, group)
        return _read_int8(parts, group)

    def _group_of(self, module: str) -> CTGroup | None:
        """The group with the most specific target: a name before an expression before a class."""
        if any(_matches(module, target) for target in self.ignore):
            return None
        found = [(_rank(t), t, g) for g in self.groups for t in g.targets if _matches(module, t)]
        return min(found, key=lambda match: match[:2])[2] if found else None


def _rank(target: str) -> int:
    return 2 if target in ("Linear", "Embedding") else 1 if target.startswith("re:") else 0


def _matches(module: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in (module, "Embedding" if module.endswith("embed_tokens") else "Linear")


def ct_scheme(settings: Settings) -> CTScheme:
    """From quantization_config. Raises CheckpointError for what is not stored in integers."""
    settings.one_of("format", FORMATS)
    settings.one_of("quantization_status", ("compressed",), "compressed")
    transform, sparsity = settings.inner("transform_config"), settings.inner("sparsity_config")
    if transform is not None and transform.values:
        raise settings.wrong("transform_config", "nothing: rotations at run time are not supported")
    if sparsity is not None and sparsity.get("format", "dense") != "dense":
        raise sparsity.wrong("format", "'dense': sparse weights are not supported")
    if settings.values.get("kv_cache_scheme") is not None:
        logger.warning(
            "%s: kv_cache_scheme is not used; cache_dtype says how K and V are kept", settings.where
        )
    groups = settings.inner("config_groups")
    if groups is None or not groups.values:
        raise settings.wrong("config_groups", "an object with at least one group")
    found = []
    for name in groups.values:
        group = groups.inner(name)
        if group is not None:
            found.append(_group(group))
    return CTScheme(tuple(found), _strings(settings, "ignore", []))


def _group(group: Settings) -> CTGroup:
    if group.get("format", None) is not None:
        group.one_of("format", FORMATS)
    if group.values.get("output_activations") is not None:
        raise group.wrong("output_activations", "null: rounded outputs are not supported")
    weights = group.inner("weights")
    if weights is None:
        raise group.wrong("weights", "an object")
    weights.one_of("type", ("int",), "int")
    if weights.get("dynamic", False) is not False:
        raise weights.wrong("dynamic", "false")
    strategies: tuple[Literal["group", "channel", "tensor"], ...] = ("group", "channel", "tensor")
    size = weights.group_size(-1)
    stated = weights.one_of("strategy", strategies, "channel" if size is None else "group")
    strategy = strategies[strategies.index(stated)]
    if strategy == "group" and size is None:
        raise weights.wrong("group_size", "a whole number of at least 1 for the strategy 'group'")
    return CTGroup(
        targets=_strings(group, "targets"),
        bits=weights.bits("num_bits"),
        strategy=strategy,
        group_size=size if strategy == "group" else None,
        symmetric=weights.flag("symmetric", True),
        inputs=_inputs(group.inner("input_activations")),
    )


def _inputs(inputs: Settings | None) -> Literal["float", "dynamic", "static"]:
    if inputs is None:
        return "float"
    inputs.one_of("type", ("int",), "int")
    inputs.bits("num_bits", possible=(8,))
    if not inputs.flag("symmetric", True):
        raise inputs.wrong("symmetric", "true: inputs with a zero point are not supported")
    if inputs.flag("dynamic", False):
        inputs.one_of("strategy", ("token",))
        return "dynamic"
    inputs.one_of("strategy", ("tensor",), "tensor")
    return "static"


def _strings(settings: Settings, key: str, default: Any = None) -> tuple[str, ...]:
    value = settings.values.get(key)
    value = default if value is None else value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise settings.wrong(key, "a list of strings")
    for item in value:
        if item.startswith("re:"):
            try:
                re.compile(item.removeprefix("re:"))
            except re.error as error:
                raise CheckpointError(
                    f"{settings.where}: {key}: {item!r:.80} is no regular expression: {error}"
                ) from None
    return tuple(value)


def _read_packed(parts: Parts, group: CTGroup) -> StoredLinear:
    stated = parts.array("weight_shape", ("I64", "I32"), (2,)).tolist()
    if not all(0 < size < 2**31 for size in stated):
        raise parts.error("weight_shape", f"says {stated}; the file is damaged: fetch it again")
    n, k = stated
    older = _words(k, group.bits, is_dense=False)
    is_dense = older == num_words(k, group.bits) or parts.shape("weight_packed") != (n, older)
    words = parts.array("weight_packed", ("I32",), (n, _words(k, group.bits, is_dense=is_dense)))
    scales, sizes = _scales(parts, group, n, k)
    zeros = None
    if not group.symmetric:
        width = _words(n, group.bits, is_dense=is_dense)
        stored = parts.array("weight_zero_point", ("I32",), (width, scales.shape[1]))
        zeros = np.ascontiguousarray(_unpack(stored.T, group.bits, n, is_dense=is_dense).T)
    order = None
    if "weight_g_idx" in parts:
        g_idx = parts.array("weight_g_idx", ("I32",), (k,))
        if not (g_idx == -1).all():
            order, sizes = grouped_order(parts, "weight_g_idx", g_idx, scales.shape[1])

    def packed() -> Bytes:
        if is_dense and order is None:
            return bytes_of_words(words, group.bits, k)
        codes = _unpack(words, group.bits, k, is_dense=is_dense)
        return pack_bits(codes if order is None else codes[:, order], group.bits)

    repeats = even_groups(parts, "weight_scale", sizes, group.bits)
    return StoredLinear(
        shape=(n, k),
        bits=group.bits,
        scales=np.repeat(scales, repeats, axis=1),
        zeros=None if zeros is None else np.repeat(zeros, repeats, axis=1),
        packed=packed,
        order=order,
        activation=_activation(parts, group),
    )


def _words(count: int, bits: int, *, is_dense: bool) -> int:
    """Words of `count` codes. In older versions no code crossed words: ten of 3 bits in each."""
    return num_words(count, bits) if is_dense else -(-count // (WORD_BITS // bits))


def _unpack(words: Array, bits: int, count: int, *, is_dense: bool) -> Bytes:
    """Codes of rows of words of either layout."""
    if is_dense:
        return unpack_words(words, bits, count)
    each = unpack_words(words.reshape(-1, 1), bits, WORD_BITS // bits)
    return np.ascontiguousarray(each.reshape(len(words), -1)[:, :count])


def _read_int8(parts: Parts, group: CTGroup) -> StoredLinear:
    weight = parts.array("weight", ("I8",), (None, None))
    n, k = weight.shape
    if n == 0 or k == 0:
        raise parts.error("weight", f"has shape {weight.shape}: it holds no weights")
    scales, sizes = _scales(parts, group, n, k)
    repeats = even_groups(parts, "weight_scale", sizes, group.bits)

    def unsigned(suffix: str, values: Array) -> Bytes:
        moved = values.view(np.uint8) + np.uint8(1 << (group.bits - 1))
        if moved.size and int(moved.max()) >> group.bits:
            raise parts.error(suffix, f"holds numbers outside of {group.bits} bits; the config says so many")
        return moved

    zeros = None
    if not group.symmetric:
        stored = parts.array("weight_zero_point", ("I8",), scales.shape)
        zeros = np.repeat(unsigned("weight_zero_point", stored), repeats, axis=1)
    return StoredLinear(
        shape=(n, k),
        bits=group.bits,
        scales=np.repeat(scales, repeats, axis=1),
        zeros=zeros,
        packed=lambda: pack_bits(unsigned("weight", weight), group.bits),
        activation=_activation(parts, group),
    )


def _scales(parts: Parts, group: CTGroup, n: int, k: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Scales [N, R] and the columns of each group."""
    sizes = group_sizes(k, group.group_size)
    if group.strategy == "tensor":
        return np.broadcast_to(parts.scales("weight_scale", (1,)).reshape(1, 1), (n, 1)).copy(), sizes
    return parts.scales("weight_scale", (n, len(sizes))), sizes


def _activation(parts: Parts, group: CTGroup) -> ActivationQuant | None:
    if group.inputs == "float" or parts.module.endswith("embed_tokens"):
        return None
    if group.inputs == "dynamic":
        return ActivationQuant()
    scale = float(parts.scales("input_scale", (1,))[0])
    if scale <= 0:
        raise parts.error("input_scale", f"is {scale}; expected a number above 0")
    return ActivationQuant(static_scale=scale)


def group_for(groups: Groups, activation: ActivationQuant | None, *, is_embedding: bool) -> CTGroup:
    """How a matrix is written, without targets. Those of the same kind share an entry of config_groups."""
    per_row = groups.scales.shape[1] == 1
    inputs: Literal["float", "dynamic", "static"] = "float"
    if activation is not None:
        inputs = "dynamic" if activation.static_scale is None else "static"
    return CTGroup(
        targets=(),
        bits=groups.bits,
        strategy="channel" if per_row else "group",
        group_size=None if per_row else groups.group_size,
        symmetric=groups.zeros is None,
        inputs=inputs,
        packed=not is_embedding and (groups.bits != 8 or activation is None),
    )


def _format(group: CTGroup) -> str:
    return (
        "pack-quantized"
        if group.packed
        else "int-quantized"
        if group.inputs != "float"
        else "naive-quantized"
    )


def ct_tensors(groups: Groups, activation: ActivationQuant | None, group: CTGroup) -> dict[str, Array]:
    """The parts of one matrix by suffix, `group` being its `group_for`."""
    middle = np.uint8(1 << (groups.bits - 1))
    tensors: dict[str, Array] = {"weight_scale": stored_scales(groups)}
    if not group.packed:
        tensors["weight"] = (groups.q - middle).view(np.int8)
        if groups.zeros is not None:
            tensors["weight_zero_point"] = (groups.zeros - middle).view(np.int8)
    else:
        tensors["weight_packed"] = pack_words(groups.q, groups.bits)
        tensors["weight_shape"] = np.array(groups.q.shape, np.int64)
        if groups.zeros is not None:
            packed = pack_words(np.ascontiguousarray(groups.zeros.T), groups.bits)
            tensors["weight_zero_point"] = np.ascontiguousarray(packed.T)
    if activation is not None and activation.static_scale is not None:
        tensors["input_scale"] = np.array([activation.static_scale], np.float32)
    return tensors


def ct_config(groups: Mapping[CTGroup, Sequence[str]], ignore: Iterable[str]) -> dict[str, Any]:
    """quantization_config of modules by kind, the names of a projection's layers put into one expression."""
    formats = sorted({_format(group) for group in groups})
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{i}": {
                "targets": targets_of(modules),
                "format": _format(group),
                "weights": {
                    "num_bits": group.bits,
                    "type": "int",
                    "symmetric": group.symmetric,
                    "strategy": group.strategy,
                    "group_size": group.group_size,
                    "dynamic": False,
                },
                "input_activations": _inputs_config(group),
                "output_activations": None,
            }
            for i, (group, modules) in enumerate(groups.items())
        },
    }


def _inputs_config(group: CTGroup) -> dict[str, Any] | None:
    if group.inputs == "float":
        return None
    dynamic = group.inputs == "dynamic"
    strategy = "token" if dynamic else "tensor"
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}


def targets_of(modules: Iterable[str]) -> list[str]:
    """Expressions that match exactly these modules: one for all layers of a projection."""
    layers: dict[tuple[str, str], list[int]] = {}
    for module in modules:
        found = re.fullmatch(r"(.*\.layers\.)(\d+)(\..*)", module)
        head, number, tail = found.groups() if found else (module, "", "")
        layers.setdefault((head, tail), []).extend([int(number)] if number else [])
    return [
        f"re:^{re.escape(head)}({'|'.join(map(str, sorted(numbers)))}){re.escape(tail)}$" if numbers else head
        for (head, tail), numbers in layers.items()
    ]
