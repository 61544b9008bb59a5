"""Weight names as data: canonical <-> Hugging Face <-> GGUF, one table for each family.

`{}` stands for the layer number. A table maps the canonical stem to the stems of the two kinds of file;
weights and biases follow by suffix: canonical "layers.3.q_proj" and "layers.3.q_proj.bias".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_COMMON = {
    "embed_tokens": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "lm_head": ("lm_head", "output"),
    "layers.{}.input_norm": ("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    "layers.{}.q_proj": ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    "layers.{}.k_proj": ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    "layers.{}.v_proj": ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    "layers.{}.o_proj": ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    "layers.{}.gate_proj": ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    "layers.{}.up_proj": ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    "layers.{}.down_proj": ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
}


@dataclass(frozen=True, slots=True)
class NameTable:
    """Names of one family. Canonical stems -> (Hugging Face stem, GGUF stem)."""

    stems: dict[str, tuple[str, str]]

    def to_hf(self, canonical: str) -> str:
        return self._to_file(canonical, 0)

    def to_gguf(self, canonical: str) -> str:
        return self._to_file(canonical, 1)

    def from_hf(self, name: str) -> str | None:
        """Canonical name, or None for a tensor that the family does not know."""
        return self._from_file(name, 0)

    def from_gguf(self, name: str) -> str | None:
        return self._from_file(name, 1)

    def _to_file(self, canonical: str, column: int) -> str:
        stem, suffix = (canonical[:-5], "bias") if canonical.endswith(".bias") else (canonical, "weight")
        pattern, layer = _generalise(stem)
        return f"{self.stems[pattern][column].format(layer)}.{suffix}"

    def _from_file(self, name: str, column: int) -> str | None:
        stem, _, suffix = name.rpartition(".")
        pattern, layer = _generalise(stem)
        for canonical, stems in self.stems.items():
            if stems[column] == pattern and suffix in ("weight", "bias"):
                return canonical.format(layer) + (".bias" if suffix == "bias" else "")
        return None


def _generalise(stem: str) -> tuple[str, str]:
    """The stem with its first number replaced by {}, and that number."""
    found = re.search(r"(?<=\.)\d+(?=\.)", stem)
    if found is None:
        return stem, ""
    return f"{stem[: found.start()]}{{}}{stem[found.end() :]}", found.group()


LLAMA = NameTable(
    _COMMON | {"layers.{}.mlp_norm": ("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm")}
)
GEMMA3 = NameTable(
    _COMMON
    | {
        "layers.{}.q_norm": ("model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
        "layers.{}.k_norm": ("model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
        "layers.{}.post_attn_norm": (
            "model.layers.{}.post_attention_layernorm",
            "blk.{}.post_attention_norm",
        ),
        "layers.{}.mlp_norm": ("model.layers.{}.pre_feedforward_layernorm", "blk.{}.ffn_norm"),
        "layers.{}.post_mlp_norm": ("model.layers.{}.post_feedforward_layernorm", "blk.{}.post_ffw_norm"),
    }
)
