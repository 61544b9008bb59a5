# %% [markdown]
# ## The question
#
# Most people who run a language model at home run a **GGUF** file with llama.cpp on whatever processor they
# have. The file is one piece: tokenizer, sizes, and every matrix in one of some twenty number formats with
# names like `Q4_0` or `Q4_K_M`. What is in it? Which format should you choose? How fast can a CPU run it,
# and what would a model of 7 billion weights need on *your* machine?
#
# We take the file apart byte by byte, make others from it, and run the same file in the same minutes with
# this engine and with llama.cpp (the `xllamacpp` wheel), so that neither has a better machine than the
# other.
#
# Your prediction first: how many times faster (or, below 1, slower) than llama.cpp does this engine decode
# our model in `Q4_0`? Both use two threads and AVX2 instructions.

# %%
import os
import struct
import tempfile
from pathlib import Path

import numpy as np

from ridgeline import LLM
from ridgeline.compress.gguf import gguf_formats, quantize_to_mix
from ridgeline.config import EngineConfig
from ridgeline.course import Figure, Lesson, figure, ratio
from ridgeline.course.llama_cpp import LlamaCpp
from ridgeline.models.load import describe_model, load_model, open_checkpoint
from ridgeline.models.locate import locate_model
from ridgeline.models.save_gguf import save_gguf
from ridgeline.models.synth import describe_preset, synthesize
from ridgeline.profiling.machine import machine_limits
from ridgeline.profiling.measured import measure_decode, measure_prefill
from ridgeline.profiling.plan import alternatives, measure_peak, measure_process, plan_memory
from ridgeline.quality.divergence import divergences
from ridgeline.quality.text import load_text, tokenize
from ridgeline.quant import gguf_blocks
from ridgeline.quant.formats import FORMATS

lesson = Lesson("INF-43")
lesson.predict("decode_vs_llama_cpp", None, unit="x")

# %% [markdown]
# ## The arithmetic
#
# ### Bits for a weight
#
# A GGUF format cuts each row of a matrix into **quant blocks** of 32 weights, or **super-blocks** of 256, and
# stores each block by itself: small integers $q$ (the *codes*) and the numbers that turn them back into
# weights. Three families cover nearly all files:
#
# | family | a weight is | stored for a block |
# |---|---|---|
# | `Q4_0`, `Q5_0`, `Q8_0` | $w = d\,(q - z)$, $z$ fixed | one float16 scale $d$, the codes |
# | `Q4_1`, `Q5_1` | $w = d\,q + m$ | float16 $d$ and minimum $m$, the codes |
# | K-quants, `Q2_K` … `Q6_K` | $w = d\,s_g\,q - d_{min}\,m_g$ | $d$, $d_{min}$, $s_g$, $m_g$, the codes |
#
# ($d$ and $d_{min}$ belong to a super-block of 256 weights, the small integers $s_g$ and $m_g$ to each of its
# groups of 16 or 32. `Q3_K` and `Q6_K` do without the minimum.)
#
# So the bits for a weight are $8 \times$ the bytes of a block over its weights. For `Q4_0` that is
# $8 \cdot (2 + 16)/32 = 4.5$, not 4: the scale costs half a bit. A K-quant has a scale and a minimum for each
# group *and* still 4.5 bits, because its scales are integers of 6 bits which one float16 scales in turn.
#
# ### Speed
#
# To write a token each weight is used once, in one multiply-add, so decode reads the whole file from memory
# for every token:
#
# $$\text{tokens/s} \le \frac{\text{memory bandwidth}}{\text{bytes of the weights}}.$$
#
# That bound has no opinion about kernels. An engine can lose to it (by unpacking codes too slowly, or waiting
# for its threads); it cannot beat it, unless a cache holds the weights. Prefill uses each weight for many
# tokens, and there the arithmetic decides.
#
# ### A model of 7 billion weights
#
# Llama 2 7B has 32 layers of $4 \cdot 4096^2$ weights for attention and $3 \cdot 4096 \cdot 11008$ for the
# MLP, and two tables of $32000 \cdot 4096$: $6.74 \cdot 10^9$. At 4.5 bits that is 3.8 GB, at 16 bits 13.5
# GB. Its KV cache (keys and values of past tokens) takes $2 \cdot 32 \cdot 32 \cdot 128$ numbers of 2 bytes
# for a token: half a megabyte, and 2 GiB at 4,096 tokens.
#
# ## The real thing
#
# ### The file, byte by byte
#
# A GGUF file is `"GGUF"`, a version, two counts; then that many *key-values* (the metadata), then one entry
# for each tensor (name, sizes, format, where its bytes begin); then the bytes of the tensors, each starting
# at a multiple of 32. All numbers are little-endian. Here is the beginning of ours.

# %%
path = locate_model("smollm2")
raw = path.read_bytes()
for start in range(0, 96, 16):
    line = raw[start : start + 16]
    print(f"{start:4d}  {line.hex(' ')}  {''.join(chr(b) if 32 <= b < 127 else '.' for b in line)}")

# %% [markdown]
# Read it with `struct`: four bytes, an unsigned 32-bit number, two of 64 bits. Then the first key: its
# length, its letters, the number of its type (8 is *string*), and the value.

# %%
magic, version, num_tensors, num_pairs = struct.unpack_from("<4sIQQ", raw)
(length,) = struct.unpack_from("<Q", raw, 24)
key = raw[32 : 32 + length].decode()
(kind,) = struct.unpack_from("<I", raw, 32 + length)
print(magic, "version", version, "|", num_tensors, "tensors |", num_pairs, "key-values")
print(f"first key: {key!r}, type {kind}")

# %% [markdown]
# The engine's reader walks on in the same way, and trusts nothing: every length is compared with what is left
# of the file. What it finds, and whether all bytes of the file are accounted for:

# %%
checkpoint = open_checkpoint(path)
shown = ("general.architecture", "llama.block_count", "llama.embedding_length", "llama.attention.head_count",
         "llama.attention.head_count_kv", "llama.context_length", "tokenizer.ggml.model")  # fmt: skip
for key in shown:
    print(f"{key:32}", checkpoint.metadata[key])
entries = sorted(checkpoint.tensors.values(), key=lambda entry: entry.offset)
lesson.table(
    "tensors",
    [
        {
            "tensor": e.name,
            "format": e.format.name,
            "shape": "x".join(map(str, e.shape)),
            "begins at": e.offset,
            "bytes": e.num_bytes,
        }
        for e in entries[:8]
    ],
    {"begins at": ",d", "bytes": ",d"},
)

# %%
header_bytes = entries[0].offset
ends = [later.offset for later in entries[1:]] + [len(raw)]
padding = sum(end - entry.offset - entry.num_bytes for entry, end in zip(entries, ends, strict=True))
lesson.record("header_mb", header_bytes / 1e6)
lesson.record("weights_mb", sum(entry.num_bytes for entry in entries) / 1e6)
lesson.claim(
    "accounted",
    "A GGUF file is its header, its tensors and padding, and nothing else (share of the file accounted for)",
    value=(header_bytes + padding + sum(e.format.num_bytes(e.shape) for e in entries)) / len(raw),
    claimed=(1, 1),
    band=(1, 1),
)
lesson.say(
    "The header has {header_mb:.1f} MB, nearly all of it the vocabulary; the tensors {weights_mb:.1f} MB."
)

# %% [markdown]
# ### A quant block by hand
#
# These are the layouts of all block formats, as NumPy records with ggml's names for the fields (`<f2` is a
# float16, `u1` a byte). Next to it the code that turns a `Q4_1` block into numbers.

# %%
for name, layout in gguf_blocks.LAYOUTS.items():
    bits = 8 * layout.itemsize / FORMATS[name].block_size
    fields = ", ".join(f"{field}: {layout[field].str or layout[field]}" for field in layout.names)
    print(
        f"{name}  {FORMATS[name].block_size:3d} weights in {layout.itemsize:3d} bytes"
        f" = {bits:.4f} bits   {fields}"
    )
lesson.source(gguf_blocks._decode_q4_1)

# %% [markdown]
# Now the first block of one of our matrices, with nothing but `struct` and shifts: the low four bits of byte
# $j$ are the code of weight $j$, the high four bits that of weight $j + 16$.

# %%
entry = checkpoint.tensors["blk.0.ffn_down.weight"]
block = raw[entry.offset : entry.offset + entry.format.block_bytes]
d, m = struct.unpack_from("<ee", block)
codes = [b & 15 for b in block[4:]] + [b >> 4 for b in block[4:]]
by_hand = np.array([np.float32(d) * np.float32(q) + np.float32(m) for q in codes])
by_engine = checkpoint.weight(entry.name).dequantize()[0, :32]
print(f"{entry.name}, {entry.format.name}: d = {d:.6f}, m = {m:.6f}")
print("codes  ", codes)
print("weights", by_hand[:6].round(4), "...")
lesson.claim(
    "block-by-hand",
    "The weights of a block, computed by hand, are the engine's (largest difference)",
    value=float(np.abs(by_hand - by_engine).max()),
    claimed=(0, 0),
    band=(0, 0),
)

# %% [markdown]
# ### Making other files
#
# `quantize_to_mix` gives each tensor the format that llama.cpp's `llama-quantize` would give it. A name
# like `Q4_K_M` is not a format but a **mix**: mostly `Q4_K`, and `Q6_K` where errors hurt most. Our model
# has a trap for K-quants: they need rows of whole super-blocks of 256, and most of our matrices have 576
# columns. Those *fall back* to formats of 32 with more bits. `gguf_formats` says what each tensor would
# get.

# %%
model = load_model(path)
MIXES = lesson.pick(("Q4_0", "Q4_K_M", "Q8_0"), ("Q4_0", "Q4_1", "Q4_K_M", "Q5_0", "Q5_K_M", "Q6_K", "Q8_0"))
folder = tempfile.TemporaryDirectory()
files = {mix: Path(folder.name) / f"smollm2-{mix}.gguf" for mix in MIXES}
for mix, file in files.items():
    save_gguf(quantize_to_mix(model, mix), file)
names = [name for name, weight in model.weights.items() if len(weight.shape) == 2 and name != "lm_head"]
mixed = gguf_formats(model, "Q4_K_M")
counts = {}
for name in names:
    counts[mixed[name].name] = counts.get(mixed[name].name, 0) + 1
print("matrices of Q4_K_M:", counts)
num_weights = sum(model.weights[name].num_elements for name in names)
bits = {mix: 8 * sum(mix_bytes[n].num_bytes(model.weights[n].shape) for n in names) / num_weights
        for mix in MIXES for mix_bytes in [gguf_formats(model, mix)]}  # fmt: skip

# %%
lesson.record("q4_k_m_formats", ", ".join(f"{count} × {name}" for name, count in counts.items()))
lesson.claim(
    "q4-k-m-bits",
    "Q4_K_M takes about 4.8 bits for a weight",
    value=bits["Q4_K_M"],
    claimed=(4.5, 5),
    band=(6.1, 6.25),
    unit="bits",
    because="that is a figure of large models. Here rows of 576 are no whole super-blocks, so the mix "
    "becomes {q4_k_m_formats}, and the table of tokens, a fifth of all weights, has 8.5 bits",
)

# %% [markdown]
# Are these files what llama.cpp would have made? `scripts/compare_gguf.py` let both tools quantize the same
# models and compared the files byte by byte (`docs/results/gguf.json`, committed; it takes minutes).

# %%
compared = lesson.committed("docs/results/gguf.json")
lesson.record("num_compared", len(compared))
lesson.claim(
    "same-files",
    "Tensors that this package quantizes are llama-quantize's, byte for byte (least share of a file's bytes)",
    value=min(c["equal_bytes"] for c in compared.values()),
    claimed=(1, 1),
    band=(1, 1),
)
lesson.record("num_with_importance", sum("imatrix" in name for name in compared))
lesson.say(
    "{num_compared} files of two models were compared, {num_with_importance} with an importance matrix."
)

# %% [markdown]
# ## Measurement
#
# ### Size against quality
#
# How much of the model survives? The **KL divergence** of a quantized model from the original is the mean
# difference of their predictions in nats per token: for each token of a text, $\sum_v p_v \ln(p_v/q_v)$
# over all words $v$ that could follow, with $p$ of the original. Zero means the same predictions, 0.01 is
# hard to notice, 0.3 is another model. **Perplexity** is the exponential of the mean surprise about the
# text itself; we give its change. The original here is the file as shipped, which is `Q4_1` itself, so
# `Q4_1` would be a perfect copy and says nothing. The text is State of the Union addresses.

# %%
EVAL = {"max_model_len": 512, "max_num_seqs": 1, "kv_cache_tokens": 512, "executor": "native"}
reference = LLM("smollm2", **EVAL)
others = {mix: LLM(str(file), **EVAL) for mix, file in files.items()}
tokens = tokenize(reference, load_text(), num_tokens=512 * lesson.pick(2, 8))
quality = dict(zip(MIXES, divergences(reference, list(others.values()), tokens, context=512), strict=True))
for llm in (reference, *others.values()):
    llm.close()
kept = {row["name"]: row for row in lesson.committed("docs/results/pareto.json")["details"]["rows"]}
lesson.table(
    "quality",
    [
        {
            "mix": mix,
            "bits a weight": bits[mix],
            "MB": files[mix].stat().st_size / 1e6,
            "KL now": quality[mix].kl_mean,
            "same top token": quality[mix].top1_agreement,
            "KL, 16,384 tokens": kept[mix]["quality"]["kl_mean"] if mix in kept else "",
            "perplexity, 16,384 tokens": (
                f"{kept[mix]['quality']['perplexity_change']:+.2%}" if mix in kept else ""
            ),
        }
        for mix in MIXES
    ],
    {
        "bits a weight": ".2f",
        "MB": ".1f",
        "KL now": ".4f",
        "same top token": ".1%",
        "KL, 16,384 tokens": ".4f",
    },
)
lesson.record("tokens", len(tokens))
lesson.say("""
*KL now* is of {tokens:,d} tokens in this run. The last two columns are of `docs/results/pareto.json`
(2026-11-25; `ridgeline pareto` with 16,384 tokens of the same text).
""")

# %%
lesson.claim(
    "q8-lossless",
    "Q8_0 is practically lossless (KL divergence)",
    value=quality["Q8_0"].kl_mean,
    claimed=(0, 0.01),
    band=(0.0002, 0.006),
    unit="nats",
)
lesson.claim(
    "k-quants-better",
    "Q4_K_M loses clearly less than Q4_0 (ratio of KL divergences)",
    value=quality["Q4_0"].kl_mean / quality["Q4_K_M"].kl_mean,
    claimed=(2, None),
    band=(2.5, 12),
    unit="x",
)
lesson.claim(
    "q4-k-m-perplexity",
    "Q4_K_M costs about 3 % of perplexity",
    value=100 * kept["Q4_K_M"]["quality"]["perplexity_change"],
    claimed=(0, 3.5),
    band=(5, 7),
    unit="%",
    because="llama.cpp's table says +2.8 % for Llama 3 8B. A model with 60 times fewer weights has less to "
    "spare, although it got more bits here; and our original was quantized once before, so this is a second "
    "rounding",
)

# %% [markdown]
# ### Speed against llama.cpp
#
# Both engines get the same file. llama.cpp runs in a process of its own; it sleeps while we measure ours,
# and ours while it runs. The calls go in turns, and the ratio of each pair is one sample, so that a machine
# that changes its speed changes both. The wheel is built for AVX2, so we tell our engine to use its AVX2
# kernels too, even if this processor has more (`RIDGELINE_ISA`).
#
# What is timed: *decode*, the median time between two tokens at a context of 128; *prefill*, a prompt of
# 512 tokens to its first token. Ours includes scheduling and sampling; llama.cpp's are its own `timings`,
# which leave its HTTP side out. (Threads of llama.cpp wait for one another in a busy loop. Where other
# programs want the cores too, it loses more by that than we do: wide quartiles mean that this machine was
# not idle.)

# %%
limits = machine_limits()
os.environ["RIDGELINE_ISA"] = "avx2"
SPEED = {"max_model_len": 1024, "max_num_seqs": 1, "num_threads": 2, "executor": "native"}
TIMED = lesson.pick(("Q4_0", "Q8_0"), ("Q4_0", "Q4_K_M", "Q6_K", "Q8_0"))
ours = {mix: LLM(str(files[mix]), **SPEED) for mix in TIMED}
theirs = {mix: LlamaCpp(files[mix], num_threads=2) for mix in TIMED}


def our_decode(mix):
    return lambda: measure_decode(ours[mix].engine, 1, 128)


def our_prefill(mix, n):
    return lambda: measure_prefill(ours[mix].engine, n, repeats=1)


def their_decode(mix):
    return lambda: theirs[mix].decode_s(1, context=128)


def their_prefill(mix, n):
    return lambda: theirs[mix].prefill_s(n)


REPEATS = lesson.pick(5, 9)
ROUNDS = lesson.pick(3, 4)
LENGTHS = lesson.pick((512,), (128, 512))
decode = {mix: ratio(their_decode(mix), our_decode(mix), repeats=REPEATS) for mix in TIMED}
prefill = {
    (mix, n): ratio(their_prefill(mix, n), our_prefill(mix, n), repeats=ROUNDS, warmups=0)
    for mix in TIMED
    for n in LENGTHS
}
step_s = {mix: our_decode(mix)() for mix in TIMED}
their_step_s = {mix: their_decode(mix)() for mix in TIMED}
weight_bytes = {mix: sum(e.num_bytes for e in open_checkpoint(files[mix]).tensors.values()) for mix in TIMED}
limit_s = {mix: weight_bytes[mix] / (limits.read_gb_s(weight_bytes[mix]) * 1e9) for mix in TIMED}
lesson.table(
    "speed",
    [
        {
            "mix": mix,
            "decode tok/s, limit": 1 / limit_s[mix],
            "ours": 1 / step_s[mix],
            "llama.cpp": 1 / their_step_s[mix],
            "decode, ours/llama.cpp": decode[mix],
            "quartiles": f"{decode[mix].low:.2f} to {decode[mix].high:.2f}",
            **{f"prefill {n}": prefill[mix, n] for n in LENGTHS},
        }
        for mix in TIMED
    ],
    dict.fromkeys(("decode tok/s, limit", "ours", "llama.cpp"), ".0f")
    | dict.fromkeys(("decode, ours/llama.cpp", "prefill 128", "prefill 512"), ".2f"),
)

# %%
drawing, axis = figure("This engine over llama.cpp, same file, same run", y="times as fast")
for shift, (label, values) in enumerate(
    (
        ("decode", decode),
        *((f"prefill {n}", {m: prefill[m, n] for m in TIMED}) for n in LENGTHS),
    )
):
    at = np.arange(len(TIMED)) + 0.27 * (shift - 1)
    middle = np.array([float(values[mix]) for mix in TIMED])
    spread = np.array([[values[m] - values[m].low, values[m].high - values[m]] for m in TIMED]).T
    axis.bar(at, middle, 0.25, yerr=np.maximum(spread, 0), capsize=3, label=label)
axis.axhline(1, ls="--", color="#6e7781", lw=1)
axis.set_xticks(range(len(TIMED)), TIMED)
legend = axis.legend()

# %% [markdown]
# The committed comparison (`docs/peers.md`, another machine, five rounds of fresh processes, llama.cpp's
# own command-line tools) is our second witness. Now the claims. The first is what most people believe, and
# the ratio decides.

# %%
peers = lesson.committed("docs/results/peers.json")
row = peers["rows"]["decode-q4_0"]["samples"]
lesson.record("peers_date", peers["date"][:10])
lesson.record("peers_ratio", float(np.median(row["ridgeline"]) / np.median(row["llama.cpp"])))
first = iter([decode["Q4_0"]])
lesson.claim(
    "decode-vs-llama-cpp",
    "Nothing runs a GGUF file faster on a CPU than llama.cpp (decode, Q4_0: ours over theirs)",
    value=lambda: next(first, None) or ratio(their_decode("Q4_0"), our_decode("Q4_0"), repeats=REPEATS),
    claimed=(None, 1),
    band=(0.9, None),
    unit="x",
    because="on this small model decode waits for memory and for threads to meet, and our engine reads each "
    "weight as one packed stream, in one call a token. On {peers_date} the committed run found "
    "{peers_ratio:.2f}, with a llama.cpp compiled for that machine",
)
lesson.claim(
    "prefill-vs-llama-cpp",
    "Nor does anything read a prompt faster (512 tokens, Q4_0: ours over theirs)",
    value=prefill["Q4_0", 512],
    claimed=(None, 1),
    band=(0.9, None),
    unit="x",
    because="a prompt is matrix products of small integers, and our kernels keep a tile of them in "
    "registers. The wheel is one build for all processors with AVX2; a llama.cpp that was compiled for one "
    "machine is faster than this",
)
lesson.claim(
    "decode-bandwidth",
    "Decode runs at the memory bandwidth (share of the limit, Q8_0)",
    value=lambda: limit_s["Q8_0"] / our_decode("Q8_0")(),
    claimed=(0.7, 1.1),
    band=(0.3, 1.6),
    because="a file this small lies in the last cache in part, which hands it over faster than our kernels "
    "multiply: {decode_bandwidth:.2f}. The 7B shape below is read from DRAM",
)
for mix in TIMED:
    ours[mix].close()
    theirs[mix].close()
del os.environ["RIDGELINE_ISA"]

# %% [markdown]
# ### What would a 7B model need here?
#
# First what the planner says, from the shapes alone: `plan` needs no file, only a config. The memory is
# that of a laptop with 8 GB; the speed is the bound of this machine's bandwidth.

# %%
seven = describe_preset("llama-7b", "Q4_0")
settings = EngineConfig.from_options(
    "llama-7b", executor="native", max_model_len=2048, max_num_seqs=1, kv_cache_tokens=2048
)
rows = alternatives(seven, settings, limits, None, memory_bytes=8 * 10**9, context=512)
lesson.table(
    "seven",
    [
        {
            "format": a.format,
            "weights GB": a.weight_bytes / 1e9,
            "tokens of cache in 8 GB": a.num_tokens,
            "decode tok/s at most": a.decode_tok_s,
        }
        for a in rows
    ],
    {"weights GB": ".2f", "tokens of cache in 8 GB": ",d", "decode tok/s at most": ".1f"},
)
lesson.claim(
    "seven-size",
    "A 7B model is below 4 GB in 4 bits",
    value=sum(weight.num_bytes for weight in seven.weights.values()) / 1e9,
    claimed=(None, 4),
    band=(3.75, 3.83),
    unit="GB",
)

# %% [markdown]
# Now a measurement. Nobody has to download 4 GB to learn the speed of a shape: time depends on the sizes,
# not on the values. `synthesize` writes a file with the layers of Llama 2 7B and random codes; with fewer
# layers it is small. Two files with $a$ and $b$ layers give the time of one layer, and 32 layers follow:
#
# $$t_{32} = t_a + (32 - a)\,\frac{t_b - t_a}{b - a}.$$

# %%
FEW, MORE = lesson.pick((1, 3), (2, 8))
RUN = {
    "max_model_len": 512,
    "kv_cache_tokens": 512,
    "max_num_seqs": 1,
    "num_threads": 2,
    "executor": "native",
}
few, more = (
    synthesize("llama-7b", "Q4_0", path=Path(folder.name) / f"seven-{n}.gguf", num_layers=n)
    for n in (FEW, MORE)
)
with LLM(str(few), **RUN) as small, LLM(str(more), **RUN) as large:
    pairs = [(measure_decode(small.engine, 1, 64), measure_decode(large.engine, 1, 64)) for _ in range(3)]
per_layer = float(np.median([(b - a) / (MORE - FEW) for a, b in pairs]))
whole_s = float(np.median([a for a, _ in pairs])) + (32 - FEW) * per_layer
bound_s = 1 / next(a.decode_tok_s for a in rows if a.format == "Q4_0")
lesson.record("layer_ms", 1e3 * per_layer)
lesson.record("bound_tok_s", 1 / bound_s)
lesson.claim(
    "seven-speed",
    "A 7B model in 4 bits writes 5 to 10 tokens a second on an ordinary CPU",
    value=1 / whole_s,
    claimed=(5, 10),
    band=(1.5, 60),
    unit="tok/s",
    because="it is a matter of bandwidth alone, which this machine has more or less of: the bound is "
    "{bound_tok_s:.1f}",
)
lesson.claim(
    "seven-share",
    "The bound from bytes and bandwidth predicts it (bound over measured time)",
    value=bound_s / whole_s,
    claimed=(0.75, 1.05),
    band=(0.35, 1.5),
    because="{seven_share:.2f}: above 1, since a few layers lie in a large last cache in part, as 3.8 GB "
    "would not (`--full` takes more layers); and the bandwidth of a shared machine changes from minute to "
    "minute",
)
lesson.say("One layer takes {layer_ms:.1f} ms for a token.")

# %% [markdown]
# And its memory: the plan for the larger of the two files, and the peak of a process that runs it with its
# cache full. The plan counts packed weights, cache, buffers, and Python itself.

# %%
planned = plan_memory(
    describe_model(more),
    EngineConfig.from_options(str(more), **RUN),
    process_bytes=measure_process(str(more)),
)
peak = measure_peak(str(more), RUN)
parts = ("weight_bytes", "cache_bytes", "activation_bytes", "process_bytes", "total_bytes")
lesson.table(
    "memory",
    [{"part": part.removesuffix("_bytes"), "planned MB": getattr(planned, part) / 1e6} for part in parts]
    + [{"part": "measured peak", "planned MB": peak / 1e6}],
    {"planned MB": ",.0f"},
)
lesson.claim(
    "planned-memory",
    "Memory can be predicted within 5 % from the header of a file (measured peak over plan)",
    value=peak / planned.total_bytes,
    claimed=(0.95, 1.05),
    band=(0.88, 1.12),
    because="the peak also counts what loading takes for a moment",
)

# %% [markdown]
# ## Where it does not help
#
# **Fewer bits do not make prompts faster.** Prefill computes, and each multiply-add is as much work for a
# code of eight bits as for a float of 32, if the codes have to be widened to 16 bits first. The committed
# run has both.

# %%
prompts = {f: np.median(peers["rows"][f"prefill512-{f}"]["samples"]["ridgeline"]) for f in ("f32", "q8_0")}
lesson.claim(
    "prompt-bits",
    "A quarter of the bytes reads a prompt at least twice as fast (Q8_0 over F32, 512 tokens; docs/peers.md)",
    value=float(prompts["q8_0"] / prompts["f32"]),
    claimed=(2, None),
    band=(1, 1.2),
    unit="x",
    because="a prompt of 512 tokens uses each weight 512 times; reading it once costs nearly nothing, "
    "whatever its size",
)

# %% [markdown]
# **A faster engine does not help against memory.** On a model that no cache holds, two engines that both
# read at the memory's speed must meet. Do they? The 7B-shaped file, in turns, and beside it what share of
# the bandwidth each of them reaches:

# %%
os.environ["RIDGELINE_ISA"] = "avx2"
with LlamaCpp(more, num_threads=1, max_model_len=512) as alone:
    alone_s = alone.decode_s(1, context=64, num_tokens=12)
with LLM(str(more), **RUN) as large, LlamaCpp(more, num_threads=2, max_model_len=512) as peer:
    pairs = [
        (peer.decode_s(1, context=64, num_tokens=12), measure_decode(large.engine, 1, 64))
        for _ in range(lesson.pick(4, 8))
    ]
del os.environ["RIDGELINE_ISA"]
large_bytes = sum(e.num_bytes for e in open_checkpoint(more).tensors.values())
large_limit_s = large_bytes / (limits.read_gb_s(large_bytes) * 1e9)
lesson.record("peer_share", large_limit_s / float(np.median([theirs_s for theirs_s, _ in pairs])))
lesson.record("peer_alone", alone_s / float(np.median([theirs_s for theirs_s, _ in pairs])))
lesson.record("our_share", large_limit_s / float(np.median([ours_s for _, ours_s in pairs])))
one_b = peers["rows"]["decode-llama1b"]["samples"]
lesson.record("peers_1b", float(np.median(one_b["ridgeline"]) / np.median(one_b["llama.cpp"])))
folder.cleanup()
lesson.claim(
    "large-model",
    "On a large model engines do not differ, as all wait for the same memory (7B-shaped, ours over theirs)",
    value=Figure([theirs_s / ours_s for theirs_s, ours_s in pairs]),
    claimed=(0.8, 1.3),
    band=(0.6, None),
    unit="x",
    because="only an engine that is fast enough waits for memory. Ours reaches {our_share:.0%} of the "
    "bandwidth here, this build of llama.cpp {peer_share:.0%}, and with one thread it takes "
    "{peer_alone:.1f} times as long: it is busy unpacking codes. A llama.cpp that was compiled for its "
    "machine keeps up: the committed run (another processor, a 1B shape) found {peers_1b:.2f}",
)

# %% [markdown]
# **K-quants on narrow models** lose their advantage in size: on ours `Q4_K_M` is larger than `Q5_0` would
# be in the linear layers, because the fall-back decides. Look at the shapes before the name.
#
# ## Exercises

# %%
lesson.exercise("matrix-bytes")

# %% [markdown]
# How many bytes does a matrix of 11008 × 4096 weights take in `Q4_K`? (The layout is printed above.)

# %%
matrix_bytes = ...
lesson.check("matrix-bytes", matrix_bytes)

# %% tags=["solution"]
matrix_bytes = 11008 * 4096 // 256 * 144
lesson.check("matrix-bytes", matrix_bytes)

# %% tags=["wrong"]
lesson.refuses("matrix-bytes", 11008 * 4096 // 2)
lesson.refuses("matrix-bytes", 11008 * 4096 * 4.5)
lesson.refuses("matrix-bytes", 11008 * 4096 // 32 * 144)

# %%
lesson.exercise("nibble")

# %% [markdown]
# Write `weight(block, j)`: weight number `j` (0 to 31) of a `Q4_0` block, given as 18 `bytes`. There is no
# minimum; the scale is a float16 (`struct.unpack_from("<e", block)[0]`), and a code of 8 means zero.

# %%
weight = ...
lesson.check("nibble", weight)


# %% tags=["solution"]
def weight(block, j):
    code = block[2 + j] & 15 if j < 16 else block[2 + j - 16] >> 4
    return struct.unpack_from("<e", block)[0] * (code - 8)


lesson.check("nibble", weight)

# %% tags=["wrong"]
lesson.refuses(
    "nibble", lambda b, j: struct.unpack_from("<e", b)[0] * ((b[2 + j // 2] >> 4 * (j % 2) & 15) - 8)
)
lesson.refuses(
    "nibble",
    lambda b, j: struct.unpack_from("<e", b)[0] * (b[2 + j] & 15 if j < 16 else b[j - 14] >> 4),
)

# %%
lesson.exercise("choose-format")

# %% [markdown]
# You have 6 GiB for Llama 2 7B: weights, the cache of one request of 4,096 tokens in float16, and 0.3 GiB
# for everything else. Which of `Q8_0`, `Q6_K`, `Q5_0`, `Q4_K`, `Q3_K` has the most bits and still fits?
# (6.74 · 10⁹ weights, all in the same format.)

# %%
choice = ...
lesson.check("choose-format", choice)

# %% tags=["solution"]
room = 6 * 2**30 - 4096 * 2 * 32 * 32 * 128 * 2 - 0.3 * 2**30
fitting = [
    f for f in ("Q8_0", "Q6_K", "Q5_0", "Q4_K", "Q3_K") if 6.74e9 / 8 * FORMATS[f].bits_per_weight <= room
]
choice = fitting[0]
lesson.check("choose-format", choice)

# %% tags=["wrong"]
lesson.refuses("choose-format", "Q6_K")
lesson.refuses("choose-format", "Q5_0")
lesson.refuses("choose-format", "Q3_K")

# %% [markdown]
# ## The answer

# %%
lesson.answer()

# %% [markdown]
# ## In production
#
# - **llama.cpp**: `llama-quantize model-f16.gguf out.gguf Q4_K_M`, with `--imatrix` (importance of each
#   column, from `llama-imatrix`) worth having below 5 bits; `IQ` formats go lower with codebooks. `-t` sets
#   threads, and more than the physical cores makes decode slower. `-ngl` puts layers on a GPU,
#   `--n-cpu-moe` keeps experts in main memory.
# - It **repacks** `Q4_0` and some others when it loads them, into rows interleaved for AVX2, AVX-512, AMX or
#   NEON: the same idea as our packed layout.
# - **Ollama** and **LM Studio** are llama.cpp with a file chooser; the tag `:latest` of a 7B model is usually
#   `Q4_K_M`.
# - **vLLM** and **SGLang** read GGUF too (`--load-format gguf`), for convenience rather than speed: on a GPU
#   GPTQ, AWQ or FP8 kernels are better.
#
# ## Reading list
#
# - ggml, *GGUF*: `docs/gguf.md` in the ggml repository, the specification; `ggml-common.h` for the blocks.
# - llama.cpp, `tools/quantize/README.md` and pull request 1684 (*k-quants*, I. Kawrakow, 2023).
# - llama.cpp, `tools/perplexity/README.md`: KL divergence and perplexity of all formats for Llama 3 8B.
# - S. Williams, A. Waterman, D. Patterson, *Roofline*, CACM 2009: why bytes decide decode.
