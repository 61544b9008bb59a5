# %% [markdown]
# ## The question
#
# In **multi-head attention** (MHA) every query head has keys and values of its own, and all of them are
# kept for every token in the **KV cache** (INF-10). Shazeer asked in 2019 whether they have to: in
# **multi-query attention** (MQA) all query heads share *one* head of keys and values. In between is
# **grouped-query attention** (GQA, Ainslie et al., 2023): $G$ KV heads, each shared by a group of query
# heads. Llama 2 has MHA in its 7B and GQA in its 70B model; nearly every model since has GQA.
#
# Our model, SmolLM2-135M, has 9 query heads and 3 KV heads. The engine can load it with another number:
# `LLM("smollm2", num_kv_heads=9)` is the same model as MHA, `num_kv_heads=1` makes it MQA. So we can ask: how
# many bytes does a head cost, how much time, and how much quality?
#
# Your prediction: if we average the three KV heads of each layer into one, and change nothing else, by what
# factor does the **perplexity** grow? (Perplexity is how many words the model hesitates between, on average;
# lower is better.)

# %%
import numpy as np

from ridgeline import LLM, SamplingParams
from ridgeline.course import Lesson, figure, ratio
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.load import describe_model
from ridgeline.models.locate import locate_model
from ridgeline.models.surgery import change_kv_heads, possible_kv_heads
from ridgeline.ops.program import StepShape
from ridgeline.profiling.machine import machine_limits
from ridgeline.profiling.measured import measure_decode, measure_prefill
from ridgeline.quality.divergence import divergences
from ridgeline.quality.text import load_text, tokenize

lesson = Lesson("INF-21")
lesson.predict("mqa_loss", None, unit="x")

# %% [markdown]
# ## The arithmetic
#
# ### Bytes
#
# For each token the cache holds a key and a value, in each layer, for each KV head: with $L$ layers, $G$ KV
# heads of $D$ numbers and $b$ bytes a number,
#
# $$\text{bytes per token} = 2 \cdot L \cdot G \cdot D \cdot b.$$
#
# The number of *query* heads $H$ is not in it. From MHA ($G = H$) to GQA the cache shrinks by the **group
# size** $H/G$, and to MQA by $H$. Some published models, in float16:

# %%
PUBLISHED = {  # layers, query heads, KV heads, head_dim: config.json of each
    "Llama 2 7B (MHA)": (32, 32, 32, 128),
    "Llama 2 70B (GQA)": (80, 64, 8, 128),
    "Llama 3.1 8B (GQA)": (32, 32, 8, 128),
    "Falcon 7B (MQA)": (32, 71, 1, 64),
    "SmolLM2 135M (GQA)": (30, 9, 3, 64),
}
gemma = describe_model(locate_model("gemma3-270m")).config
PUBLISHED["Gemma 3 270M (MQA)"] = (gemma.num_layers, gemma.num_heads, gemma.num_kv_heads, gemma.head_dim)
lesson.table(
    "published",
    [
        {
            "model": name,
            "query heads": heads,
            "KV heads": kv_heads,
            "group": heads // kv_heads,
            "KB a token": 2 * layers * kv_heads * head_dim * 2 / 1e3,
            "GB at 32,768 tokens": 2 * layers * kv_heads * head_dim * 2 * 32768 / 1e9,
            "as MHA it would be": 2 * layers * heads * head_dim * 2 * 32768 / 1e9,
        }
        for name, (layers, heads, kv_heads, head_dim) in PUBLISHED.items()
    ],
    {"KB a token": ",.1f", "GB at 32,768 tokens": ".1f", "as MHA it would be": ".1f"},
)

# %% [markdown]
# ### Time
#
# A decode step reads all weights $W$ once, and of each sequence the keys and values of its whole context.
# With $B$ sequences of $N$ tokens and $k$ cache bytes a token,
#
# $$t \approx \frac{W + B \cdot N \cdot k}{\text{bandwidth}}.$$
#
# Fewer KV heads shrink the second term only. It equals the first when $B \cdot N = W / k$: for our model
# and its 3 KV heads when the sequences of a batch have some 4,000 tokens in common count (98 MB over 23
# KB); with 9 heads at a third of that. Below it the number of KV heads hardly matters for speed; far above
# it is all that matters.
#
# There is a second effect. A key that was loaded serves every query head of its group, so the **arithmetic
# intensity** of decode attention (operations per byte) is the group size times that of MHA. MHA does 2
# operations for each number it loads, which no processor can keep busy with.
#
# ### Prefill
#
# Every query head still computes its scores with all keys, so the multiply-adds of attention, $H D N
# (N+1)$, do not contain $G$ either. Only the two matrices that make keys and values get smaller. Prefill
# should not notice.
#
# ### The surgery
#
# **More heads, exactly.** In GQA query heads 0, 1, 2 use KV head 0, and so on. Give each a copy of it, by
# repeating the rows of the matrices that make keys and values, and every query head finds the same numbers as
# before: MHA and GQA are then the same function. (The converse is not true; that is what GQA gives up.)
#
# **Fewer heads, by the mean.** Ainslie et al. made GQA models from MHA checkpoints by averaging the heads
# of a group, and then trained on for 5 % of the original training. We have the first half only: no
# training.
#
# ## The real thing

# %%
lesson.source(change_kv_heads)

# %% [markdown]
# `map_rows(..., np.repeat)` moves whole rows, so a quantized matrix stays in its format, bit for bit. For the
# mean there is no such luck: it is computed in float32. Where the keys get their position by rotation (RoPE,
# INF-23), all heads rotate alike, so the mean of rotated keys is the rotated mean.
#
# Which numbers are possible follows from the shape: divisors of the query heads that repeat, or pool, evenly.

# %%
with LLM("smollm2", max_model_len=256, max_num_seqs=1, device=lesson.device) as llm:
    print("possible for this model:", possible_kv_heads(llm.engine.model.config))
NAMES = {9: "MHA, 9 KV heads", 3: "GQA, 3 KV heads (as trained)", 1: "MQA, 1 KV head"}
EVAL = {"max_model_len": 512, "max_num_seqs": 1, "kv_cache_tokens": 1024, "device": lesson.device}
llms = {g: LLM("smollm2", num_kv_heads=g, **EVAL) for g in NAMES}

# %% [markdown]
# ## Measurement
#
# ### Bytes

# %%
configs = {g: llm.engine.model.config for g, llm in llms.items()}
token_bytes = {g: llm.engine.layout.num_bytes / llm.engine.layout.num_slots for g, llm in llms.items()}
predicted_bytes = {g: 2 * c.num_layers * g * c.head_dim * 2 for g, c in configs.items()}
weights = {g: sum(w.num_bytes for n, w in llm.engine.model.weights.items() if n != "lm_head")
           for g, llm in llms.items()}  # fmt: skip
lesson.table(
    "bytes",
    [
        {
            "model": NAMES[g],
            "predicted bytes a token": predicted_bytes[g],
            "allocated bytes a token": token_bytes[g],
            "weights MB": weights[g] / 1e6,
            "tokens in 256 MiB of cache": int(2**28 / token_bytes[g]),
        }
        for g in NAMES
    ],
    {"predicted bytes a token": ",d", "allocated bytes a token": ",.0f", "weights MB": ".1f",
     "tokens in 256 MiB of cache": ",d"},
)  # fmt: skip
lesson.claim(
    "kv-bytes",
    "The cache shrinks exactly with the KV heads: MHA takes $H/G$ times the bytes of GQA",
    value=token_bytes[9] / token_bytes[3],
    claimed=(3, 3),
    band=(3, 3),
    unit="x",
)
lesson.claim(
    "kv-bytes-predicted",
    "Bytes allocated for a token of cache are $2LGDb$ (allocated over predicted)",
    value=token_bytes[3] / predicted_bytes[3],
    claimed=(1, 1),
    band=(1, 1),
)

# %% [markdown]
# The weights of MHA are larger, since rows were copied, and those of MQA too: its averaged rows are
# float32. Keep this in mind when we compare times.
#
# ### Quality
#
# We compare with the model as trained, on the same text, token by token. **KL divergence** is the mean
# distance between the two predictions (in nats a token; 0 is identical).

# %%
tokens = tokenize(llms[3], load_text(), num_tokens=512 * lesson.pick(2, 16))
compared = dict(zip((9, 1), divergences(llms[3], [llms[9], llms[1]], tokens, context=512), strict=True))
lesson.table(
    "quality",
    [
        {
            "model": NAMES[g],
            "perplexity": c.perplexity,
            "times GQA's": c.perplexity_ratio,
            "KL": c.kl_mean,
            "largest KL of a token": c.kl_max,
            "same top token": c.top1_agreement,
        }
        for g, c in compared.items()
    ],
    {"perplexity": ",.1f", "times GQA's": ",.3f", "KL": ".2e", "largest KL of a token": ".2e",
     "same top token": ".1%"},
)  # fmt: skip
lesson.record("base_perplexity", compared[9].reference_perplexity)
lesson.record("mqa_kl", compared[1].kl_mean)
lesson.claim(
    "mha-exact",
    "A GQA model can be written as MHA without any change (mean KL divergence)",
    value=compared[9].kl_mean,
    claimed=(0, 1e-7),
    band=(0, 1e-7),
    unit="nats",
)
lesson.claim(
    "mqa-loss",
    "One KV head is enough: MQA is within a few percent of more heads (perplexity over that of GQA)",
    value=compared[1].perplexity_ratio,
    claimed=(1, 1.05),
    band=(3, None),
    unit="x",
    because="that is said of models that were *trained* so, or trained on after pooling. Three heads that "
    "learned different things have no useful mean: their keys point in different directions, and averages of "
    "them point nowhere. Pooling is a starting point for training, not a conversion",
)

# %%
prompt = "The capital of France is"
greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
written = {g: llms[g].generate(prompt, greedy)[0].outputs[0] for g in NAMES}
for g, output in written.items():
    print(f"{NAMES[g]:30} {prompt}{output.text!r}")
lesson.claim(
    "same-tokens",
    "And it writes the same tokens (share of tokens, MHA against GQA)",
    value=float(np.mean(np.array(written[9].token_ids) == np.array(written[3].token_ids))),
    claimed=(1, 1),
    band=(1, 1),
)
for llm in llms.values():
    llm.close()

# %% [markdown]
# ### Time
#
# First the prediction. The Program (the model as a list of instructions, INF-01) knows the bytes of a step;
# over the bandwidth for that many bytes this is the least time a step can take. Then the measurement:
# decode steps at three loads, one sequence with a short context, one with a long one, and a batch of eight.

# %%
SPEED = {"max_num_seqs": 8, "max_model_len": 8192, "kv_cache_tokens": lesson.pick(6144, 12288)}
SPEED |= {"executor": "native", "num_threads": 2}
llms = {g: LLM("smollm2", num_kv_heads=g, **SPEED) for g in NAMES}
LOADS = lesson.pick([(1, 128), (1, 2048), (8, 512)], [(1, 128), (1, 2048), (1, 8000), (8, 512), (8, 1024)])
limits = machine_limits()


def bound_ms(g, load):
    program, kv = llms[g].engine.executor.native.program, int(token_bytes[g]) // configs[g].num_layers
    num_bytes = program.bytes(StepShape.decode(*load), kv_token_bytes=kv)
    return 1e3 * num_bytes / (limits.read_gb_s(num_bytes) * 1e9)


def decode(g, load):
    return lambda: measure_decode(llms[g].engine, *load, steps=lesson.pick(12, 24))


measured = {(g, load): 1e3 * decode(g, load)() for load in LOADS for g in NAMES}
lesson.table(
    "decode",
    [
        {
            "sequences": load[0],
            "context": load[1],
            "cache MB read, GQA": load[0] * load[1] * token_bytes[3] / 1e6,
            **{f"{NAMES[g][:3]} ms": measured[g, load] for g in NAMES},
            "MHA/GQA": measured[9, load] / measured[3, load],
            "bound": bound_ms(9, load) / bound_ms(3, load),
            "MQA/GQA": measured[1, load] / measured[3, load],
        }
        for load in LOADS
    ],
    dict.fromkeys(("MHA ms", "GQA ms", "MQA ms", "MHA/GQA", "bound", "MQA/GQA"), ".2f")
    | {"cache MB read, GQA": ".1f", "context": ",d"},
)

# %%
drawing, axis = figure("A decode step by KV heads", x="cache bytes read for MHA, MB", y="ms")
for color, g in zip(("C1", "C0", "C2"), NAMES, strict=True):
    at = [load[0] * load[1] * token_bytes[9] / 1e6 for load in LOADS]
    order = np.argsort(at)
    axis.plot(np.array(at)[order], [measured[g, LOADS[i]] for i in order], "o-", color=color, label=NAMES[g])
    axis.plot(np.array(at)[order], [bound_ms(g, LOADS[i]) for i in order], "--", color=color, alpha=0.6)
axis.plot([], [], "--", color="#6e7781", label="bound: bytes over bandwidth")
axis.set_ylim(0)
legend = axis.legend()

# %%
extra_s = (measured[9, (1, 2048)] - measured[9, (1, 128)]) / 1e3
lesson.record("cache_rate", (2048 - 128) * token_bytes[9] / extra_s / 1e9)
lesson.record("read_rate", limits.read_gb_s(1920 * token_bytes[9]))
lesson.say("""
The measured lines are steeper than the bounds. From 128 to 2,048 tokens of MHA the step reads its additional
cache at {cache_rate:.0f} GB/s, where this machine can read {read_rate:.0f}: K and V lie in blocks, a tile is
asked for just before it is needed, and a core keeps only so many reads in flight (`docs/LOG.md`). Weights
are one long stream. So a KV head costs more milliseconds than its bytes alone would say; the *ratio* of two
steps stays near that of the bounds, since the rest of a step is above its bound as well.
""")

# %% [markdown]
# And the two ratios that matter, in turns, with their spread: at the long context and at the short one.

# %%
LONG, SHORT = (1, 2048), (1, 128)
REPEATS = lesson.pick(3, 7)
lesson.record("bound_ratio", bound_ms(9, LONG) / bound_ms(3, LONG))
lesson.claim(
    "long-context-speed",
    "With a third of the KV heads decode is three times as fast at long context (MHA over GQA, 2,048 tokens)",
    value=lambda: ratio(decode(9, LONG), decode(3, LONG), repeats=REPEATS, warmups=0),
    claimed=(2.5, 3.2),
    band=(1.1, 3),
    unit="x",
    because="the weights are read as before; only the cache's share of a step shrinks. At one sequence of "
    "2,048 tokens the arithmetic allows {bound_ratio:.2f}",
)
lesson.record("bound_short", bound_ms(9, SHORT) / bound_ms(3, SHORT))
lesson.claim(
    "short-context-speed",
    "Fewer KV heads make decode much faster at any context (MHA over GQA, context of 128)",
    value=lambda: ratio(decode(9, SHORT), decode(3, SHORT), repeats=lesson.pick(7, 11), warmups=1),
    claimed=(2, None),
    band=(0.9, 1.8),
    unit="x",
    because="at a short context nearly all bytes of a step are weights. The arithmetic allows "
    "{bound_short:.2f}, and more than half of that is not the cache but the larger key and value matrices",
)

# %% [markdown]
# ## Where it does not help
#
# **Prefill.** The number of multiply-adds does not contain $G$. A prompt of 1,024 tokens, MHA over GQA:


# %%
def prefill(g):
    return lambda: measure_prefill(llms[g].engine, 1024, repeats=1)


lesson.claim(
    "prefill-speed",
    "GQA speeds up prompts as well (time to first token of 1,024 tokens, MHA over GQA)",
    value=lambda: ratio(prefill(9), prefill(3), repeats=REPEATS, warmups=1),
    claimed=(1.2, None),
    band=(0.85, 1.3),
    unit="x",
    because="every query head still meets every key. What is left is the two smaller matrices: "
    "{prefill_speed:.2f}",
)
for llm in llms.values():
    llm.close()

# %% [markdown]
# **Quality bought back elsewhere.** If the cache is too large and you cannot train, change the bytes of a
# number before the number of heads. `kv_cache_dtype="int8"` keeps all heads and stores each number in one
# byte, with one scale for each token and head. Beside it the pooled MQA, which is smaller still:

# %%
reference = LLM("smollm2", **EVAL)
narrow = LLM(
    "smollm2", kv_cache_dtype="int8", executor="native", **{k: EVAL[k] for k in EVAL if k != "device"}
)
int8 = divergences(reference, [narrow], tokens, context=512)[0]
int8_bytes = CacheLayout.bytes_per_token(narrow.engine.model.config, "int8")
reference.close(), narrow.close()
lesson.table(
    "cheaper",
    [
        {"cache": "3 KV heads, float16", "bytes a token": int(token_bytes[3]), "KL": 0.0},
        {"cache": "3 KV heads, int8", "bytes a token": int8_bytes, "KL": int8.kl_mean},
        {
            "cache": "1 KV head by pooling, float16",
            "bytes a token": int(token_bytes[1]),
            "KL": compared[1].kl_mean,
        },
    ],
    {"bytes a token": ",d", "KL": ".4f"},
)
lesson.claim(
    "int8-cache",
    "A cache of half the bytes is nearly free with int8 (KL divergence)",
    value=int8.kl_mean,
    claimed=(0, 0.01),
    band=(0.0001, 0.008),
    unit="nats",
)

# %% [markdown]
# **Tensor parallelism.** MQA has one KV head, and $n$ devices cannot each have a part of it: each keeps a
# copy, and the memory is not divided. That, more than quality, is why large models have 8 KV heads: one for
# each GPU of a server.
#
# ## Exercises

# %%
lesson.exercise("kv-bytes-70b")

# %% [markdown]
# How many **bytes** of cache does one token of Llama 2 70B take in float16? It has 80 layers, 64 query
# heads, 8 KV heads, 128 numbers a head.

# %%
kv_bytes = ...
lesson.check("kv-bytes-70b", kv_bytes)

# %% tags=["solution"]
kv_bytes = 2 * 80 * 8 * 128 * 2
lesson.check("kv-bytes-70b", kv_bytes)

# %% tags=["wrong"]
lesson.refuses("kv-bytes-70b", 80 * 8 * 128 * 2)
lesson.refuses("kv-bytes-70b", 2 * 80 * 64 * 128 * 2)
lesson.refuses("kv-bytes-70b", 2 * 8 * 128 * 2)

# %%
lesson.exercise("break-even")

# %% [markdown]
# A decode step of 16 sequences of our model (98 MB of weights, 3 KV heads, 30 layers, 64 numbers a head,
# float16 cache). At which context, in tokens of **each** sequence, does the step read as many bytes of
# cache as of weights? (Within 5 %.)

# %%
context = ...
lesson.check("break-even", context)

# %% tags=["solution"]
context = 98e6 / (16 * 2 * 30 * 3 * 64 * 2)
lesson.check("break-even", context)

# %% tags=["wrong"]
lesson.refuses("break-even", 98e6 / (2 * 30 * 3 * 64 * 2))
lesson.refuses("break-even", 98e6 / (16 * 2 * 30 * 9 * 64 * 2))
lesson.refuses("break-even", 98e6 / (16 * 30 * 3 * 64 * 2))

# %%
lesson.exercise("choose-heads")

# %% [markdown]
# You design a model: 32 layers, 32 query heads of 128, 14 GB of weights. It shall serve 64 requests of
# 2,048 tokens at a time on a device with 24 GB, the cache in float16 and nothing else in memory. What is
# the largest number of KV heads (a divisor of 32) that fits?

# %%
num_kv_heads = ...
lesson.check("choose-heads", num_kv_heads)

# %% tags=["solution"]
per_head = 64 * 2048 * 2 * 32 * 128 * 2
num_kv_heads = max(g for g in (1, 2, 4, 8, 16, 32) if 14e9 + g * per_head <= 24e9)
lesson.check("choose-heads", num_kv_heads)

# %% tags=["wrong"]
lesson.refuses("choose-heads", 8)
lesson.refuses("choose-heads", 2)
lesson.refuses("choose-heads", 5)

# %% [markdown]
# ## The answer
#
# KV heads are a choice of memory, made when a model is trained. Their number sets how many tokens fit, and
# at long contexts or large batches how fast they are read. It does nothing for prompts and little for short
# chats.

# %%
lesson.answer()

# %% [markdown]
# ## In production
#
# - **vLLM**, **SGLang** and **TensorRT-LLM** read `num_key_value_heads` from the config; their decode
#   kernels put the query heads of a group into one tile of a tensor core, which is where a group of 8 pays
#   most.
# - With tensor parallelism beyond the KV heads (`--tensor-parallel-size 16` for 8 heads) vLLM replicates
#   them; **SGLang** has `--enable-dp-attention`, which splits requests instead of heads.
# - **Multi-head latent attention** (DeepSeek-V2, 2024) stores one short vector a token, from which all
#   heads are made: fewer bytes than GQA with 8 heads at the quality of MHA.
# - **llama.cpp** quantizes the cache with `--cache-type-k q8_0 --cache-type-v q8_0`; **vLLM** with
#   `--kv-cache-dtype fp8`.
#
# ## Reading list
#
# - N. Shazeer, *Fast Transformer Decoding: One Write-Head is All You Need*, 2019, arXiv:1911.02150.
# - J. Ainslie et al., *GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
#   Checkpoints*, 2023, arXiv:2305.13245. Its figure 4 compares mean, first and random pooling; table 1 has
#   speed and quality.
# - H. Touvron et al., *Llama 2*, 2023, arXiv:2307.09288, appendix A.2.1: MHA, GQA and MQA trained side by
#   side.
# - DeepSeek-AI, *DeepSeek-V2*, 2024, arXiv:2405.04434, section 2.1: latent attention.
