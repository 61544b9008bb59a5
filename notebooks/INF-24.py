# %% [markdown]
# ## The question
#
# Does the model fit? It is the first question about any machine, and the only one whose answer can be
# computed before anything is loaded. The second: *in which format* should the weights be, if several fit?
# Fewer bits are smaller and faster and worse, so that there is no best one, only a best one **under a
# limit**.
#
# This notebook puts the formats of the course on one table: FP32, FP16, BF16, INT8 and INT4, with their
# bytes, their quality and their speed, on one model. What each format is was explained before: floats in
# [INF-11](INF-11.ipynb), 8 bits and scales in [INF-14](INF-14.ipynb). For 4 bits only this: sixteen values
# instead of 255, with a scale and a *zero point* (the code that means 0) for every **group** of 64 weights.
#
# Quality is measured as distance from the base, the model in float32: *KL*, in nats a token; 0 means that
# the probabilities of the next token are the same. (The file of our model was published in 4 bits, in a
# format called Q4_1. Base means those numbers as floats, so all below is the cost of rounding once more.)
#
# Your predictions: how many times smaller than in FP32 are the *weights* in INT4? And how many times
# smaller is the *peak memory* of the process that runs it?

# %%
import tempfile
from pathlib import Path

from ridgeline.compress.judge import JudgeOptions, judge
from ridgeline.compress.pareto import Limits, best, front, points_of
from ridgeline.compress.quantize import quantize_model
from ridgeline.compress.recipe import recipe_named
from ridgeline.compress.sizes import sizes_of
from ridgeline.config import EngineConfig
from ridgeline.course import Lesson, figure
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.load import load_model
from ridgeline.models.locate import locate_model
from ridgeline.models.save import save_model
from ridgeline.profiling.plan import measure_peak, measure_process, plan_memory
from ridgeline.quant.groups import pack_groups
from ridgeline.tokenizer import load_tokenizer

lesson = Lesson("INF-24")

# %%
lesson.predict("int4_smaller", None, unit="x")
lesson.predict("peak_smaller", None, unit="x")

# %% [markdown]
# ## The arithmetic
#
# ### Four parts
#
# The memory of a running engine has four parts:
#
# $$ \text{peak} = \underbrace{\sum_\text{tensors} \frac{n \cdot b}{8}}_\text{weights}
#    + \underbrace{T \cdot 2\, L\, G\, D\, c}_\text{KV cache}
#    + \underbrace{A}_\text{activations} + \underbrace{P}_\text{process} $$
#
# - **Weights**: $n$ numbers of $b$ bits each, scales included.
# - **KV cache**: for each of $T$ tokens, a key and a value (2) in $L$ layers, with $G$ KV heads of $D$
#   numbers of $c$ bytes ([INF-10](INF-10.ipynb)).
# - **Activations**: the vectors on their way through the layers. An engine reuses their memory from layer
#   to layer, so this grows with the tokens of one step, not with the depth.
# - **Process**: Python, the package, the tokenizer. A constant.
#
# A format changes the first part only. That is already an answer: *how much smaller the process gets
# depends on what else is in it.*
#
# ### Bits of a weight
#
# | format | bits | why |
# |---|---:|---|
# | FP32 | 32 | |
# | FP16, BF16 | 16 | |
# | INT8, a scale a row | $8 + 16/K$ | one 16-bit scale for $K$ weights |
# | INT4, groups of 64 | $4 + (16 + 8)/64 = 4.375$ | a 16-bit scale and an 8-bit zero point for 64 weights |
#
# Is INT4 then $32 / 4.375 = 7.3$ times smaller? Only where everything is INT4. All recipes here keep the
# embedding (the table of all tokens, which is also the head) in 8 bits, because the head's errors reach the
# probabilities directly. It has 21 % of our weights:
#
# $$ \frac{32}{0.79 \cdot 4.375 + 0.21 \cdot 8.2} \approx 6.2 . $$
#
# ### Speed
#
# To decode one token, every weight is read once ([INF-02](INF-02.ipynb)). So decode should be faster by the
# same factor as the weights are smaller, as far as reading weights is what takes the time.
#
# ## The real thing
#
# A group of weights in memory: a scale, a zero point, then the codes, packed. `pack_groups` writes exactly
# that, and every format of the integer kind goes through it.

# %%
lesson.source(pack_groups)

# %% [markdown]
# And this is the plan of the four parts. It reads no weights: shapes and formats are enough, so it also
# works for a model that is not here yet (`ridgeline plan -m config.json`).

# %%
lesson.source(plan_memory)

# %% [markdown]
# ## Measurement
#
# ### Bytes, predicted and counted

# %%
model = load_model(locate_model("smollm2"))
tokenizer = load_tokenizer(model.checkpoint)
recipes = {"FP32": "F32", "FP16": "F16", "BF16": "BF16", "INT8": "int8", "INT4": "rtn-int4-g64"}
made = {label: quantize_model(model, recipe_named(name)).model for label, name in recipes.items()}
sizes = {label: sizes_of(one) for label, one in made.items()}
fp32 = sizes["FP32"].num_bytes

lesson.table(
    "sizes",
    [
        {
            "format": label,
            "bits a weight, linears": found.linear_bits,
            "bits, all": found.bits,
            "MiB": found.num_bytes / 2**20,
            "× smaller": fp32 / found.num_bytes,
        }
        for label, found in sizes.items()
    ],
    {"bits a weight, linears": ".3f", "bits, all": ".3f", "MiB": ".1f", "× smaller": ".2f"},
)
lesson.claim(
    "fp16-smaller",
    "FP16 halves the weights",
    value=fp32 / sizes["FP16"].num_bytes,
    claimed=(1.99, 2.01),
    band=(1.99, 2.0),
    unit="x",
)
lesson.claim(
    "int8-smaller",
    "INT8 makes them four times smaller",
    value=fp32 / sizes["INT8"].num_bytes,
    claimed=(3.9, 4.1),
    band=(3.95, 3.99),
    unit="x",
)
lesson.claim(
    "int4-smaller",
    "INT4 makes them eight times smaller",
    value=fp32 / sizes["INT4"].num_bytes,
    claimed=(7.5, 8.5),
    band=(6.1, 6.25),
    unit="x",
    because="scales and zero points take 0.375 bits of every weight, and the table of tokens keeps 8 bits",
)

# %% [markdown]
# ### Memory of the process, planned and measured
#
# Now processes of their own, with room for 1,024 tokens of KV cache, all of it used. The operating system
# says what each needed at its peak. Beside it stands the plan, made from shapes. The models are GGUF files
# here, which the engine maps into memory and gives back piece by piece while it packs the weights for its
# kernels; their 8 and 4 bits are called `Q8_0` and `Q4_0` ([INF-43](INF-43.ipynb)): 8.5 and 4.5 bits a
# weight.

# %%
limits = {"max_model_len": 1024, "max_num_seqs": 1, "kv_cache_tokens": 1024, "kv_cache_dtype": "float16"}
process_bytes = measure_process("smollm2")
rows = []
with tempfile.TemporaryDirectory() as folder:
    for label in lesson.pick(("F32", "Q4_0"), ("F32", "F16", "Q8_0", "Q4_0")):
        converted = quantize_model(model, recipe_named(label)).model
        path = str(save_model(converted, Path(folder) / f"{label}.gguf", kind="gguf"))
        plan = plan_memory(
            load_model(path), EngineConfig.from_options(path, **limits), process_bytes=process_bytes
        )
        rows.append({"file": label, "weights": plan.weight_bytes, "KV cache": plan.cache_bytes})
        rows[-1] |= {"activations": plan.activation_bytes, "process": plan.process_bytes}
        rows[-1] |= {"planned": plan.total_bytes, "measured": measure_peak(path, limits)}

mib = [{key: v if key == "file" else v / 2**20 for key, v in row.items()} for row in rows]
parts = ("weights", "KV cache", "activations", "process")
lesson.table("peaks", mib, dict.fromkeys((*parts, "planned", "measured"), ".1f"))

_, axes = figure("Where the memory goes", y="MiB")
bottom = [0.0] * len(mib)
for part in parts:
    axes.bar([row["file"] for row in mib], [row[part] for row in mib], 0.5, bottom=bottom, label=part)
    bottom = [b + row[part] for b, row in zip(bottom, mib, strict=True)]
axes.plot([row["file"] for row in mib], [row["measured"] for row in mib], "k_", ms=40, label="measured peak")
_ = axes.legend()

# %%
lesson.claim(
    "planned-over-measured",
    "The plan is within 5 % of the measured peak; of all files the one that is furthest off",
    value=max((row["planned"] / row["measured"] for row in rows), key=lambda quotient: abs(quotient - 1)),
    claimed=(0.95, 1.05),
    band=(0.88, 1.12),
    because="allocators round up, and the process differs a little from run to run",
)
lesson.claim(
    "peak-smaller",
    "With 4 bits the process needs six times less memory, as the weights do",
    value=rows[0]["measured"] / rows[-1]["measured"],
    claimed=(6, None),
    band=(2, 5),
    unit="x",
    because="cache, activations and the process itself stay as they are. The smaller the model, the more "
    "they count",
)

# %% [markdown]
# ### Quality and speed, live
#
# All formats beside the base on the same text, and in turns for speed.

# %%
context = lesson.pick(256, 1024)
options = JudgeOptions(eval_tokens=4 * context, eval_context=context, speed_rounds=lesson.pick(3, 7))
live = judge(model, {label: made[label] for label in recipes if label != "FP32"}, tokenizer, options)
lesson.table(
    "live",
    [
        {
            "format": label,
            "× smaller": fp32 / sizes[label].num_bytes,
            "KL": live[label].quality.kl_mean,
            "same likeliest token": live[label].quality.top1_agreement,
            "decode, × FP32": live[label].speed_ratios["decode_tok_s"],
            "prefill, × FP32": live[label].speed_ratios["prefill_tok_s"],
        }
        for label in recipes
        if label != "FP32"
    ],
    {"× smaller": ".2f", "KL": ".5f", "same likeliest token": ".1%"}
    | {"decode, × FP32": ".2f", "prefill, × FP32": ".2f"},
)
lesson.claim(
    "sixteen-bits",
    "16 bits lose nothing that one could notice: the larger KL of FP16 and BF16",
    value=max(live[label].quality.kl_mean for label in ("FP16", "BF16")),
    claimed=(None, 0.001),
    band=(None, 0.001),
    unit="nats",
)
lesson.claim(
    "int8-kl",
    "INT8 keeps the likeliest token in at least 95 % of all places",
    value=100 * live["INT8"].quality.top1_agreement,
    claimed=(95, None),
    band=(93, 99.5),
    unit="%",
    because="some of the base's decisions are close, and any rounding turns a few of them",
)
lesson.claim(
    "speed-follows-bytes",
    "Decode gets faster by the factor by which the weights get smaller: share of it that INT4 reaches",
    value=live["INT4"].speed_ratios["decode_tok_s"] / (fp32 / sizes["INT4"].num_bytes),
    claimed=(0.9, 1.2),
    band=(0.3, 1.2),
    because="a step has parts that do not read weights (attention, the work between steps), and codes "
    "have to be turned into numbers. With small weights these parts are a larger share of a "
    "shorter step",
)

# %%
lesson.record("shrink_last", 1 - sizes["INT4"].num_bytes / sizes["INT8"].num_bytes)
lesson.record("kl_growth", live["INT4"].quality.kl_mean / live["INT8"].quality.kl_mean)
lesson.say(
    """
    Read the table from top to bottom. Down to INT8, size is nearly free. INT4 by rounding to nearest is
    not: in the last step the weights shrink by {shrink_last:.0%}, and KL grows {kl_growth:.0f} times.
    Prefill gains less than decode, since a prompt is limited by arithmetic and not by bytes.
    """
)

# %% [markdown]
# ### The front
#
# Between 8 and 4 bits there is much room, and at *one* size there are many ways to choose the codes
# ([INF-41](INF-41.ipynb), [INF-42](INF-42.ipynb)). The next plot has all recipes of
# `docs/results/pareto.json` (command: `ridgeline pareto`; whole model, 16 windows of 1,024 tokens). A
# recipe is on the **Pareto front** if no other is both at most as large and closer to the base. All others
# can be forgotten: whatever limit you have, something on the front is better. Our live points are drawn
# into the same plot. They come from less text and should lie near the committed ones of the same recipe.

# %%
pareto = lesson.committed("docs/results/pareto.json")
points = points_of(pareto["details"]["rows"])
leading = front(points)
lesson.record("pareto_date", pareto["created"][:10])
lesson.record("num_recipes", len(points))
lesson.record("num_leading", len(leading))

_, axes = figure("Divergence over size", x="MiB of weights", y="KL, nats a token", size=(9, 5.5))
for point in points:
    x, color = point.num_bytes / 2**20, "#2da44e" if point.name in leading else "#6e7781"
    axes.plot(x, point.kl, "o", color=color)
    axes.annotate(point.name, (x, point.kl), (5, 4), textcoords="offset points", fontsize=7, color=color)
line = sorted((p.num_bytes / 2**20, p.kl) for p in points if p.name in leading)
axes.plot(*zip(*line, strict=True), "-", color="#2da44e", lw=1, drawstyle="steps-post", label="front")
for label in ("INT8", "INT4"):
    axes.plot(sizes[label].num_bytes / 2**20, live[label].quality.kl_mean, "x", ms=10, color="#cf222e")
axes.plot([], [], "x", color="#cf222e", label="live: int8, rtn-int4-g64")
axes.set_yscale("log")
_ = axes.legend()

lesson.say("{num_leading} of {num_recipes} recipes are on the front (measured {pareto_date}).")

# %%
named = {point.name: point for point in points}
lesson.claim(
    "method-matters",
    "The size decides the quality: KL of rounding to nearest over KL of GPTQ, at the same size to the byte",
    value=named["rtn-int4-g64"].kl / named["gptq-int4-g64"].kl,
    claimed=(0.9, 1.1),
    band=(2, 3.3),
    unit="x",
    because="the format only says which codes are possible; which of them are chosen is up to the method",
)
lesson.claim(
    "more-bits-are-better",
    "More bits are better: KL of Q5_K_M over KL of the smaller Q4_K_M",
    value=named["Q5_K_M"].kl / named["Q4_K_M"].kl,
    claimed=(None, 1),
    band=(1.2, 2),
    unit="x",
    because="its blocks of 256 do not fit rows of 576, so most tensors fall back to other formats; and "
    "our base, which came from a Q4_1 file, lies closer to some grids than to others. It is a "
    "verdict on this file, not on the format",
)

# %% [markdown]
# ### Choosing
#
# `best` returns the best recipe under a limit: with a limit of size, the closest to the base; with a limit
# of divergence, the smallest.

# %%
choices = [Limits(max_size=size) for size in (75, 90, 100, 135)] + [
    Limits(max_kl=kl) for kl in (0.1, 0.03, 0.005)
]
rows = []
for limit in choices:
    found = best(points, limit)
    size = limit.max_size is not None
    rows.append({"limit": f"{limit.max_size} MiB" if size else f"KL {limit.max_kl}", "best": found.name})
    rows[-1] |= {"MiB": found.num_bytes / 2**20, "KL": found.kl}

lesson.table("choices", rows, {"MiB": ".1f", "KL": ".4f"})

# %% [markdown]
# ## Where it does not help
#
# Smaller weights leave the KV cache as it is. With long contexts and many requests, it is the larger part,
# and a smaller format for weights saves little. The cache has formats of its own: float16, or int8 with one
# scale for each token and head.

# %%
token_bytes = {kind: CacheLayout.bytes_per_token(model.config, kind) for kind in ("float16", "int8")}
lesson.record("break_even_tokens", sizes["INT4"].num_bytes / token_bytes["float16"])
tokens = (128, 1024, 8192, 65536)
rows = []
for count in tokens:
    totals = [sizes[f].num_bytes + count * token_bytes["float16"] for f in ("FP32", "INT8", "INT4")]
    rows.append({"tokens in cache": count, "FP32, MiB": totals[0] / 2**20, "INT8, MiB": totals[1] / 2**20})
    rows[-1]["INT4, MiB"] = totals[2] / 2**20
    rows[-1]["INT4, int8 cache"] = (sizes["INT4"].num_bytes + count * token_bytes["int8"]) / 2**20
    rows[-1]["FP32 over INT4"] = totals[0] / totals[2]

lesson.table("contexts", rows, dict.fromkeys(tuple(rows[0])[1:-1], ".0f") | {"FP32 over INT4": ".2f"})

_, axes = figure("What INT4 saves, with a growing cache", x="tokens in the cache", y="FP32 over INT4, times")
axes.plot(tokens, [row["FP32 over INT4"] for row in rows], "o-")
axes.axhline(1, ls="--", color="#6e7781")
axes.set_xscale("log", base=2)
_ = axes.set_ylim(0)

lesson.say(
    """
    From {break_even_tokens:,.0f} tokens on, the cache (float16) is larger than all INT4 weights. That is
    one long conversation, or a few dozen short ones.
    """
)
lesson.claim(
    "long-context",
    "INT4 still makes an engine six times smaller with 65,536 tokens in its cache (weights and cache)",
    value=rows[-1]["FP32 over INT4"],
    claimed=(6, None),
    band=(1.2, 1.35),
    unit="x",
    because="by then nearly all memory is cache",
)

# %% [markdown]
# ## Exercises

# %%
lesson.exercise("fits-in-16-gib")

# %% [markdown]
# Llama 3.1 8B has 8.03 billion weights. A token of its KV cache takes 131,072 bytes in float16. The machine
# has 16 GiB ($16 \cdot 2^{30}$ bytes) for weights and cache, and must hold 16 requests of 4,096 tokens.
# What is the **largest** number of bits a weight that fits: 16, 8 or 4? (Count scales as nothing.)

# %%
bits = ...
lesson.check("fits-in-16-gib", bits)

# %% tags=["solution"]
room = 16 * 2**30 - 16 * 4096 * 131072
bits = max(b for b in (16, 8, 4) if 8.03e9 * b / 8 <= room)
lesson.check("fits-in-16-gib", bits)

# %% tags=["wrong"]
lesson.refuses("fits-in-16-gib", 16)
lesson.refuses("fits-in-16-gib", 4)
lesson.refuses("fits-in-16-gib", 6)

# %%
lesson.exercise("dominated")

# %% [markdown]
# Write a function `dominated(p, points)` that is true if some other point is at most as large as `p` *and*
# at most as far from the base, and is not the same in both. Points have `.num_bytes` and `.kl`. The checker
# compares it with the front.

# %%
is_dominated = ...  # def is_dominated(p, points): ...
lesson.check("dominated", is_dominated)


# %% tags=["solution"]
def is_dominated(p, points):
    same = (p.num_bytes, p.kl)
    others = [q for q in points if (q.num_bytes, q.kl) != same]
    return any(q.num_bytes <= p.num_bytes and q.kl <= p.kl for q in others)


lesson.check("dominated", is_dominated)

# %% tags=["wrong"]
lesson.refuses("dominated", lambda p, points: any(q.num_bytes < p.num_bytes or q.kl < p.kl for q in points))
lesson.refuses(
    "dominated", lambda p, points: any(q.num_bytes <= p.num_bytes and q.kl <= p.kl for q in points)
)
lesson.refuses("dominated", lambda p, points: any(q.kl < p.kl for q in points))

# %%
lesson.exercise("choose-format")

# %% [markdown]
# 100 MiB for the weights, not a byte more. Which recipe of `points` is closest to the base? Answer with its
# name.

# %%
choice = ...  # "a-recipe"
lesson.check("choose-format", choice)

# %% tags=["solution"]
choice = min((p for p in points if p.num_bytes <= 100 * 2**20), key=lambda p: p.kl).name
lesson.check("choose-format", choice)

# %% tags=["wrong"]
lesson.refuses("choose-format", "best-6.0bpw")
lesson.refuses("choose-format", "Q4_K_M")
lesson.refuses("choose-format", "rtn-int4-g64")

# %% [markdown]
# ## The answer

# %%
lesson.say(
    """
    16 bits are free, 8 bits nearly so ({int8_smaller:.2f} times smaller), 4 bits make the weights
    {int4_smaller:.1f} times smaller at a price that the method decides. The whole process got
    {peak_smaller:.1f} times smaller, because weights are only one of its four parts.
    """
)
lesson.answer()

# %% [markdown]
# ## In production
#
# - **vLLM**: `--gpu-memory-utilization 0.9` gives the engine that share of the GPU; after weights and a
#   measured peak of activations, all the rest becomes KV cache. `--kv-cache-dtype fp8` halves the cache,
#   `--max-model-len` bounds it. The log says how many tokens fit.
# - **SGLang**: `--mem-fraction-static`, `--kv-cache-dtype`. **TensorRT-LLM**: `free_gpu_memory_fraction` of
#   its KV cache config.
# - **llama.cpp**: `llama-quantize` has a table of formats with bits and perplexity; `-ctk q8_0 -ctv q8_0`
#   is the cache's format, `-c` its length; weights are memory-mapped, so that a file larger than memory
#   runs, slowly.
# - **Ridgeline**: `ridgeline plan -m model --memory 16GiB --context 4096` before loading; `ridgeline pareto
#   -m model --max-kl 0.05` to choose a format on your own text.
# - All of them have the four parts of the formula above. When an engine dies for want of memory under load
#   and not at start, look at activations (the tokens of one step: `--max-num-batched-tokens`) first.
#
# ## Reading list
#
# - Dettmers, Zettlemoyer, *The case for 4-bit precision* (2022), arXiv:2212.09720: at a fixed number of
#   bits in total, more weights of 4 bits beat fewer of 8.
# - Pope et al., *Efficiently scaling transformer inference* (2022), arXiv:2211.05102: memory and time as
#   arithmetic.
# - Kwon et al., *PagedAttention* (2023), arXiv:2309.06180: what the cache wastes, [INF-31](INF-31.ipynb).
# - [docs/quantization.md](../docs/quantization.md): all recipes with errors; `docs/predictions.md`: plans
#   beside measurements for five models.
