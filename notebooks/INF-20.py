# %% [markdown]
# ## The question
#
# A decoder's attention compares every token of a prompt with every token before it. A prompt of $N$ tokens
# therefore has about $N^2/2$ **scores**, one number for each pair, and the textbook keeps them all: first a
# matrix of scores, then the softmax of its rows, then a product with the values. FlashAttention (Dao et al.,
# 2022) computes the same numbers and never stores that matrix. Its paper reports 2 to 4 times the speed, and
# memory that grows with $N$ instead of $N^2$.
#
# We have both forms in one engine, as one switch: `LLM(..., attention="naive")` and `attention="flash"`. So
# we can ask: is the result really the same? Where did the memory go? Is the time saved because *less is
# computed*, or because *less is moved*? And when does none of it matter?
#
# Before you read on: one attention layer of our model (SmolLM2-135M: 9 query heads of 64 numbers each, 3 KV
# heads), a prompt of 2,048 tokens, one CPU thread. How many times faster is `flash` than `naive`?

# %%
import numpy as np
import torch

from ridgeline import LLM, SamplingParams
from ridgeline.course import Lesson, figure, measure, ratio
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.ops.flash import flash_attention
from ridgeline.ops.program import Opcode, StepShape
from ridgeline.ops.torch_ops import naive_attention, sdpa_attention
from ridgeline.profiling.kernel_times import measure_attention, measure_fma
from ridgeline.profiling.machine import measure_read
from ridgeline.profiling.measured import measure_decode, measure_prefill
from ridgeline.profiling.plan import measure_peak

lesson = Lesson("INF-20")
lesson.predict("speedup_long", None, unit="x")

# %% [markdown]
# ## The arithmetic
#
# ### What must be computed, and what must be moved
#
# Write $H$ for the query heads, $G$ for the **KV heads** (the heads of keys and values; several query heads
# share one), $D$ for the numbers in a head, $N$ for the tokens of the prompt. For each query $q_i$, with the
# keys $k_j$ and values $v_j$ of the tokens $j \le i$:
#
# $$s_{ij} = \frac{q_i \cdot k_j}{\sqrt D}, \qquad p_{ij} = \frac{e^{s_{ij}}}{\sum_{j' \le i} e^{s_{ij'}}},
# \qquad o_i = \sum_{j \le i} p_{ij}\, v_j .$$
#
# **Compute.** A score takes $D$ multiply-adds and its use another $D$, so a prompt takes
# $2 H D \cdot N(N+1)/2$ multiply-adds, whatever the algorithm. FlashAttention saves none of them.
#
# **Bytes.** Queries, output, keys and values are read or written once: $4 N D\,(2H + 2G)$ bytes in float32.
# That grows with $N$. The textbook's matrix has $H N^2$ scores of 4 bytes, and each crosses the memory bus
# about four times: written by the first product, read and written again by the softmax, read by the second
# product. That is $16 H N^2$ bytes, and it grows with $N^2$.
#
# | | multiply-adds | bytes of Q, K, V, O | bytes of scores | kept beside them |
# |---|---|---|---|---|
# | naive | $H D N(N+1)$ | $8 N D (H+G)$ | $16 H N^2$ | the scores of a head: $4 N^2$ for each thread |
# | flash | $H D N(N+1)$ | $8 N D (H+G)$ | none | one tile: constant |
#
# The scores are $16HN^2 / 8ND(H+G) = 2HN / D(H+G)$ times the rest. For our heads the two are equal at a
# prompt of some 43 tokens; at ten times that length nine tenths of all traffic are scores.
#
# ### Why the matrix can go: the online softmax
#
# The obstacle is the sum under the fraction: $p_{ij}$ cannot be known before the last key was seen. But it
# need not be known. Keep three things for each query while keys go by: the largest score so far $m$, the sum
# $l = \sum_j e^{s_j - m}$, and the unfinished output $a = \sum_j e^{s_j - m} v_j$. (Subtracting $m$ changes
# no quotient, and keeps $e^{s}$ from overflowing.) When the next group of keys, a **tile**, has a larger
# maximum $m'$, everything so far was measured from the wrong $m$, by a factor that is the same for all of it:
#
# $$l \leftarrow l \, e^{m - m'} + \sum_{j \in \text{tile}} e^{s_j - m'}, \qquad
#   a \leftarrow a \, e^{m - m'} + \sum_{j \in \text{tile}} e^{s_j - m'} v_j, \qquad m \leftarrow m'.$$
#
# At the end $o = a / l$. Nothing was approximated: this is the same sum in another order (Milakov and
# Gimelshein, 2018). A tile of scores is used as soon as it exists and then forgotten. The paper speaks of
# **HBM**, the large memory of a GPU, and **SRAM**, the small one beside its arithmetic units; on a CPU those
# are DRAM and the caches of a core. Choosing the tile so that it stays in the small one is what the paper
# calls *IO-aware*.
#
# ## The real thing
#
# First the textbook, as the engine's torch executor has it. Shapes: `G` KV heads, `Q` query heads for each,
# `M` queries, `N` keys, `D` numbers a head. `scores` is the matrix.

# %%
lesson.source(naive_attention)

# %% [markdown]
# Now the same with tiles. The names are those of the derivation: `row_max` is $m$, `row_sum` is $l$, `summed`
# is $a$, and `decay` is $e^{m - m'}$. The outer loop takes 64 queries, the inner one 256 keys; a tile in the
# future of all its queries is skipped, which is how half of the work of a causal model is saved.

# %%
lesson.source(flash_attention)

# %% [markdown]
# The native kernels (`csrc/paged_attention.h`) do the same with tiles of 32 keys, the state in registers and
# in a scratch buffer of each thread, and the K and V of a tile read from the pages of the KV cache.
#
# ### Is it the same?
#
# We give both functions the same random queries, keys and values. In float64 rounding is at $10^{-16}$, so an
# approximation would show at once. In float32 we look at the largest difference of any output number.

# %%
generator = torch.Generator().manual_seed(20)
N_SAME = 700  # no multiple of a tile
q, k, v = (
    torch.randn(*s, N_SAME, 64, dtype=torch.float64, generator=generator) for s in ((3, 3), (3,), (3,))
)
at = torch.arange(N_SAME, device=lesson.device)
rules = {"scale": 64**-0.5, "window": None, "num_sinks": 0}


def attend(function, dtype):
    given = [x.to(lesson.device, dtype) for x in (q, k, v)]
    return function(*given, at, at, **rules)


def largest_difference(dtype):
    return float((attend(naive_attention, dtype) - attend(flash_attention, dtype)).abs().max())


lesson.claim(
    "exact-in-float64",
    "FlashAttention is exact attention, not an approximation: float64 outputs differ by rounding only",
    value=largest_difference(torch.float64),
    claimed=(0, 1e-13),
    band=(0, 1e-13),
)

# %%
lesson.claim(
    "same-bits",
    "Exact means the same bits, in float32 too (largest difference of an output)",
    value=largest_difference(torch.float32),
    claimed=(0, 0),
    band=(1e-9, 5e-6),
    because="a sum in another order rounds otherwise; float32 keeps 24 bits, so results of size 1 differ in "
    "the last few of them. Exact means the same formula, not the same bits",
)

# %% [markdown]
# And in the engine, through all 30 layers? We load the model twice with float32 weights and float32 pages, so
# that nothing but the order of sums differs, and let both write a continuation greedily (always the likeliest
# token).

# %%
SETTINGS = {
    "dtype": "float32",
    "kv_cache_dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 1,
    "device": lesson.device,
    "executor": "native" if lesson.device == "cpu" else "eager",
}
PROMPT = "The history of the steam engine began when"
greedy = SamplingParams(temperature=0, max_tokens=lesson.pick(48, 256), ignore_eos=True)
texts = {}
for name in ("naive", "flash"):
    with LLM("smollm2", attention=name, **SETTINGS) as llm:
        texts[name] = llm.generate(PROMPT, greedy)[0].outputs[0]
pairs = list(zip(texts["naive"].token_ids, texts["flash"].token_ids, strict=True))
lesson.record("num_tokens", len(pairs))
lesson.claim(
    "same-tokens",
    "The engine writes the same tokens with either attention (share of tokens)",
    value=sum(a == b for a, b in pairs) / len(pairs),
    claimed=(1, 1),
    band=(1, 1),
)
lesson.say("All {num_tokens} tokens compared. They begin:")
print(texts["flash"].text[:160])

# %% [markdown]
# ## Measurement
#
# ### Bytes, counted from the Program
#
# The engine records a model as a list of instructions, its *Program*, and knows for each how many bytes it
# must read and write for a given step. For an attention instruction it counts the least: Q, K, V and the
# output, each once. That is flash's traffic if the K and V of a head stay in the cache while the queries go
# by (2,048 tokens of one KV head are half a megabyte in float16: they do, in an L2 cache). To it we add the
# scores' $16 H N^2$ for the naive form. K and V are float16 here, as they are by default.

# %%
with LLM("smollm2", max_model_len=512, max_num_seqs=1, executor="native") as llm:
    program, config = llm.engine.executor.native.program, llm.engine.model.config
kv_token_bytes = CacheLayout.bytes_per_token(config, "float16") // config.num_layers
attention = [i for i in program.instructions if i.opcode is Opcode.ATTENTION]


def attention_bytes(n):
    shape = StepShape.prefill(n)
    return sum(program.instruction_bytes(i, shape, kv_token_bytes=kv_token_bytes) for i in attention)


rows = []
for n in (64, 256, 1024, 4096):
    shape, least = StepShape.prefill(n), attention_bytes(n)
    scores = 16 * config.num_heads * n * n * config.num_layers
    rest = program.bytes(shape, kv_token_bytes=kv_token_bytes) - least
    rows.append(
        {
            "tokens": n,
            "flash MB": least / 1e6,
            "naive MB": (least + scores) / 1e6,
            "ratio": (least + scores) / least,
            "all other instructions MB": rest / 1e6,
            "attention's share of the arithmetic": sum(program.instruction_flops(i, shape) for i in attention)
            / program.flops(shape),
        }
    )
lesson.table("bytes", rows, {"flash MB": ",.1f", "naive MB": ",.1f", "ratio": ".1f",
                             "all other instructions MB": ",.0f",
                             "attention's share of the arithmetic": ".1%"})  # fmt: skip

# %% [markdown]
# The paper counts 40.3 GB against 4.4 GB of HBM traffic for GPT-2 medium on an A100 (its figure 2: 1,024
# tokens, $D = 64$), a ratio of 9. What does our count say at the same length?

# %%
lesson.claim(
    "fewer-bytes",
    "FlashAttention moves about 9 times fewer bytes at 1,024 tokens",
    value=rows[2]["ratio"],
    claimed=(7, 11),
    band=(19.4, 19.8),
    unit="x",
    because="ours is a count of the least: K and V once, since a whole head of them stays in a core's L2 "
    "cache. The paper measured a GPU, whose SRAM holds a tile only, so that every tile of queries reads all "
    "K and V again, and a backward pass is in it too",
)

# %% [markdown]
# ### Time and scratch memory of one layer
#
# Now one attention instruction alone, one thread, float32 pages, over growing prompts. `scratch` is what the
# kernel allocates beside Q, K, V and the output.
#
# The prediction for **flash** is arithmetic only: multiply-adds over the rate that the engine's float32
# matrix kernel reaches on data in the cache (measured here, `measure_fma`). For **naive** we need two parts.
# Its inner loops compute one query at a time, so each key that is loaded serves one multiply-add instead of
# several: the rate at a short prompt, where all scores are in the cache, shows what that costs. To it we add
# the scores' bytes over the bandwidth at which one thread reads a block of that size (`measure_read`).

# %%
LENGTHS = lesson.pick((128, 256, 512, 1024, 2048), (128, 256, 512, 1024, 2048, 4096))
LONG = LENGTHS[-1]
heads, head_dim = config.num_heads, config.head_dim
fma = measure_fma()
found = {(a, n): measure_attention(a, n, seconds=0.2) for a in ("naive", "flash") for n in LENGTHS}
short_rate = found["naive", 256].gmacs


def predicted_ms(name, n):
    macs, score_bytes = heads * head_dim * n * (n + 1), 16 * heads * n * n
    if name == "flash":
        return 1e3 * macs / (fma * 1e9)
    return 1e3 * (macs / (short_rate * 1e9) + (4 * n * n > 2**21) * score_bytes / (bandwidth[n] * 1e9))


bandwidth = {n: measure_read(1, 4 * n * n) for n in LENGTHS}
rows = [
    {
        "tokens": n,
        **{f"{a} ms": found[a, n].milliseconds for a in ("naive", "flash")},
        **{f"{a} predicted": predicted_ms(a, n) for a in ("naive", "flash")},
        "faster": found["naive", n].milliseconds / found["flash", n].milliseconds,
        **{f"{a} scratch KiB": found[a, n].scratch_bytes / 1024 for a in ("naive", "flash")},
    }
    for n in LENGTHS
]
forms = {k: (",.0f" if "KiB" in k else ".2f") for k in rows[0]} | {"tokens": ",d", "faster": ".1f"}
lesson.table("one-layer", rows, forms)

# %%
drawing, (left, right) = figure("One attention layer, one thread", x="prompt tokens", panels=2)
for color, name in zip(("C1", "C0"), ("naive", "flash"), strict=True):
    left.plot(LENGTHS, [found[name, n].milliseconds for n in LENGTHS], "o-", color=color, label=name)
    left.plot(LENGTHS, [predicted_ms(name, n) for n in LENGTHS], "--", color=color, alpha=0.6)
    right.plot(LENGTHS, [found[name, n].scratch_bytes / 1024 for n in LENGTHS], "o-", color=color, label=name)
left.plot([], [], "--", color="grey", label="predicted")
left.set(xscale="log", yscale="log", ylabel="ms", title="time")
right.set(xscale="log", yscale="log", ylabel="KiB", title="scratch memory")
for axis in (left, right):
    axis.set_xticks(LENGTHS, [f"{n:,d}" for n in LENGTHS])
    axis.minorticks_off()
    axis.legend()

# %%
lesson.record("fma", fma)
lesson.record("flash_share", found["flash", LONG].gmacs / fma)
lesson.record("naive_share", short_rate / fma)
lesson.record("faster_short", rows[1]["faster"])
lesson.record("faster_long", rows[-1]["faster"])
lesson.record("length", LONG)
lesson.say("""
Flash runs at {flash_share:.0%} of the {fma:.0f} billion multiply-adds a second that this core does on cached
data; the exponentials take most of the rest. Naive reaches {naive_share:.0%} even on short prompts.

So the gain has **two** sources. At 256 tokens, where all scores of a head fit in the cache and no byte of
them reaches DRAM, flash is already {faster_short:.1f} times faster: a tile lets one loaded key serve several
queries, and saves the passes of the softmax over the matrix. From there to {length:,d} tokens the ratio grows
to {faster_long:.1f}, and this growth is the traffic that the paper is about. On a GPU, with far more
arithmetic for each byte of bandwidth, the second source is the larger one.
""")

# %% [markdown]
# One number deserves its spread, the speed-up at the longest prompt. The two kernels run in turns and what is
# stated is the median of the pairs' ratios with their quartiles.

# %%
SIZES = {"length": 2048, "seconds": 0.05}
lesson.claim(
    "speedup-long",
    "FlashAttention is 2 to 4 times faster than standard attention (2,048 tokens, one layer)",
    value=lambda: ratio(
        lambda: measure_attention("naive", **SIZES).milliseconds,
        lambda: measure_attention("flash", **SIZES).milliseconds,
        repeats=lesson.pick(3, 7),
        warmups=0,
    ),
    claimed=(2, 4.5),
    band=(1.5, None),
    unit="x",
    because="this processor's caches or vector units differ from those of the paper's GPUs; it is "
    "{speedup_long:.1f} here",
)

# %% [markdown]
# The memory needs no stopwatch. If it grows with $N^2$, doubling the prompt multiplies it by four; if it does
# not depend on $N$, by one.

# %%
lesson.claim(
    "naive-growth",
    "Naive attention's memory grows with the square: twice the prompt, four times the scratch",
    value=found["naive", 2048].scratch_bytes / found["naive", 1024].scratch_bytes,
    claimed=(3.9, 4.1),
    band=(3.9, 4.1),
    unit="x",
)
lesson.claim(
    "flash-growth",
    "FlashAttention's memory grows with the prompt, not with its square: twice the prompt, twice the scratch",
    value=found["flash", 2048].scratch_bytes / found["flash", 1024].scratch_bytes,
    claimed=(2, 2),
    band=(1, 1),
    unit="x",
    because="it does not grow at all. The $O(N)$ of the paper is the output and the row statistics that its "
    "backward pass needs; inference has no backward pass, and what the kernel itself keeps is one tile",
)

# %% [markdown]
# ### Peak memory of the whole engine
#
# Does the process feel it? We run the engine in a process of its own with a prompt that fills its cache, and
# read the process' peak from the operating system. The arithmetic says: two threads, each with the scores of
# one head, $2 \cdot 4 N^2$ bytes more for naive. (Layers follow one another, so they share that memory.)

# %%
N_PEAK = lesson.pick(2048, 4096)
ENGINE = {"max_model_len": N_PEAK, "kv_cache_tokens": N_PEAK, "max_num_seqs": 1, "num_threads": 2}
WHOLE = ENGINE | {"max_num_batched_tokens": N_PEAK, "executor": "native"}
peaks = {
    "flash": measure_peak("smollm2", WHOLE | {"attention": "flash"}),
    "naive": measure_peak("smollm2", WHOLE | {"attention": "naive"}),
    "naive, chunks of 256": measure_peak(
        "smollm2", WHOLE | {"attention": "naive", "max_num_batched_tokens": 256}
    ),
}
predicted = {"flash": 0, "naive": 8 * N_PEAK**2, "naive, chunks of 256": 8 * 256 * N_PEAK}
lesson.table(
    "peaks",
    [
        {
            "attention": name,
            "predicted scores MiB": predicted.get(name, 0) / 2**20,
            "peak of the process MiB": peak / 2**20,
        }
        for name, peak in peaks.items()
    ],
    {"predicted scores MiB": ".1f", "peak of the process MiB": ".1f"},
)
lesson.record("peak_length", N_PEAK)
lesson.claim(
    "peak-memory",
    "What naive takes more at its peak is the scores: measured difference over $8 N^2$",
    value=(peaks["naive"] - peaks["flash"]) / predicted["naive"],
    claimed=(0.9, 1.1),
    band=(0.75, 1.25),
    because="the process keeps other memory that was counted for one of the two",
)

# %% [markdown]
# ## Where it does not help
#
# **Chunked prefill** already tames the matrix. The last row of the table computed the prompt in chunks of
# 256 tokens (what the scheduler does by default with 512, so that a long prompt does not block others). The
# scores of a chunk are $256 \times N$, no longer $N \times N$, and the peak is below that of flash on the
# whole prompt, since the other buffers of a step are smaller too. An engine that chunks never sees the
# $N^2$ memory, with any attention. It still sees the traffic.
#
# **Short prompts** have little attention in them: the table of bytes says that at 64 tokens attention is a
# small part of the arithmetic, and all of it is in the cache. We measure the time to the first token of the
# whole model with both.
#
# **Decode** computes one query. Its scores are one row: $N$ numbers for each head, where K and V are $2 D N$
# for each KV head. There is no matrix to avoid. (There is another problem, one row for many cores, and
# *flash decoding* answers it: cut the keys in parts, give each to a core, and merge the states $(m, l, a)$ by
# the rule above. The first exercise is that merge.)

# %%
TTFT = {"max_model_len": 2048, "max_num_seqs": 1, "executor": "native", "max_num_batched_tokens": 2048}
llms = {a: LLM("smollm2", attention=a, **TTFT) for a in ("naive", "flash")}
engines = {a: llm.engine for a, llm in llms.items()}


def first_token(name, n):
    return lambda: measure_prefill(engines[name], n, repeats=1)


def step(name, context):
    return lambda: measure_decode(engines[name], 1, context)


rows = []
for n, repeats in ((32, 9), (256, 3), (1024, lesson.pick(2, 5))):
    r = ratio(first_token("naive", n), first_token("flash", n), repeats=repeats)
    rows.append({"what": f"first token, prompt of {n}", "naive/flash": r, "from": r.low, "to": r.high})
for n in (64, 1024):
    r = ratio(step("naive", n), step("flash", n), repeats=lesson.pick(2, 7), warmups=0)
    rows.append({"what": f"one decode step, context {n}", "naive/flash": r, "from": r.low, "to": r.high})
for llm in llms.values():
    llm.close()
lesson.table("end-to-end", rows, {"naive/flash": ".2f", "from": ".2f", "to": ".2f"})

# %%
for name, row in zip(("first_32", "first_256", "first_1024", "decode_64", "decode_1024"), rows, strict=True):
    lesson.record(name, row["naive/flash"])
lesson.claim(
    "speedup-short",
    "Switching to FlashAttention makes a model noticeably faster, whatever the prompt (32 tokens)",
    value=rows[0]["naive/flash"],
    claimed=(1.3, None),
    band=(0.7, 1.3),
    unit="x",
    because="attention is a few percent of the work of a short prompt, and nothing that is done to a few "
    "percent is noticed. At 1,024 tokens it is {first_1024:.1f}",
)
lesson.say("""
In decode the ratio is {decode_64:.2f} at 64 tokens of context and {decode_1024:.2f} at 1,024: what naive
loses there is not traffic of scores but that it reads K and V once for every query head, where flash reads
them once for the group that shares them, which is the subject of INF-21.
""")

# %% [markdown]
# And **the algorithm without its kernel** is not the optimisation. The torch function above has flash's
# tiles, but each of its lines is an operation of its own that writes its result to memory and reads it again.
# `sdpa` is torch's own fused kernel: on a CPU or a GPU it is a flash attention in compiled code.

# %%
n = 1024
q, k, v = (torch.randn(*s, n, 64, generator=generator) for s in ((3, 3), (3,), (3,)))
at = torch.arange(n, device=lesson.device)
functions = {"naive": naive_attention, "flash, line by line": flash_attention, "sdpa, fused": sdpa_attention}


def seconds(function):
    return measure(lambda: (attend(function, torch.float32).cpu(), None)[1], repeats=7)


milliseconds = {name: 1e3 * seconds(f) for name, f in functions.items()}
lesson.record("tiles_only", milliseconds["naive"] / milliseconds["flash, line by line"])
lesson.record("fused", milliseconds["naive"] / milliseconds["sdpa, fused"])
lesson.table("torch", [{"torch, 1,024 tokens": n, "ms": t} for n, t in milliseconds.items()], {"ms": ".1f"})
lesson.say(
    "Tiles alone gain a factor of {tiles_only:.1f}, and that for skipping the future; fused, {fused:.1f}."
)

# %% [markdown]
# ## Exercises

# %%
lesson.exercise("merge")

# %% [markdown]
# Two cores have each seen half of the keys for one query. Each has its state: `m` the largest score, `l` the
# sum of $e^{s - m}$, `a` the unfinished output (a NumPy array). Write `merge(m1, l1, a1, m2, l2, a2)` that
# returns the **finished output** for all keys. It has to work for scores as large as 900, where $e^{s}$ alone
# overflows. Put your function in place of `...`.

# %%
merge = ...
lesson.check("merge", merge)


# %% tags=["solution"]
def merge(m1, l1, a1, m2, l2, a2):
    m = max(m1, m2)
    w1, w2 = np.exp(m1 - m), np.exp(m2 - m)
    return (a1 * w1 + a2 * w2) / (l1 * w1 + l2 * w2)


lesson.check("merge", merge)

# %% tags=["wrong"]
lesson.refuses("merge", lambda m1, l1, a1, m2, l2, a2: (a1 + a2) / (l1 + l2))
lesson.refuses("merge", lambda m1, l1, a1, m2, l2, a2: (a1 / l1 + a2 / l2) / 2)
lesson.refuses(
    "merge",
    lambda m1, l1, a1, m2, l2, a2: (a1 * np.exp(m1) + a2 * np.exp(m2)) / (l1 * np.exp(m1) + l2 * np.exp(m2)),
)

# %%
lesson.exercise("score-bytes")

# %% [markdown]
# A server on a GPU computes a prompt of 8,192 tokens in one step with naive attention: 32 query heads, 8 KV
# heads, all scores of a layer at once, in float16. How many **bytes** is the matrix of scores of one layer?
# (Compare it with the 16 GB of weights of a model of that shape.)

# %%
score_bytes = ...
lesson.check("score-bytes", score_bytes)

# %% tags=["solution"]
score_bytes = 32 * 8192**2 * 2
lesson.check("score-bytes", score_bytes)

# %% tags=["wrong"]
lesson.refuses("score-bytes", 8 * 8192**2 * 2)
lesson.refuses("score-bytes", 8192**2 * 2)
lesson.refuses("score-bytes", 32 * 8192 * 2)

# %%
lesson.exercise("largest-chunk")

# %% [markdown]
# You are stuck with the naive kernel of this engine (float32 scores, one head for each of **two** threads)
# and a context of 8,192 tokens. Its scratch may take 32 MiB at most. What is the largest chunk of a prompt, a
# power of two (`max_num_batched_tokens`), that you may allow?

# %%
chunk = ...
lesson.check("largest-chunk", chunk)

# %% tags=["solution"]
chunk = 32 * 2**20 // (2 * 4 * 8192)
lesson.check("largest-chunk", chunk)

# %% tags=["wrong"]
lesson.refuses("largest-chunk", 1024)
lesson.refuses("largest-chunk", 256)
lesson.refuses("largest-chunk", 2048)

# %% [markdown]
# ## The answer
#
# FlashAttention is the same sum in another order. It computes as much and moves less: the scores never leave
# the small memory. That is worth a factor at long prompts, nothing at short ones and little in decode.

# %%
lesson.answer()

# %% [markdown]
# ## In production
#
# - **FlashAttention 2 and 3** (Dao 2023; Shah et al. 2024) keep the algorithm and change the schedule: fewer
#   operations that are not matrix products, parallel over the query tiles, and on Hopper GPUs copies, matrix
#   products and exponentials that overlap, with FP8.
# - **vLLM** chooses a kernel with `--attention-backend` (`FLASH_ATTN`, `FLASHINFER`, `TRITON_ATTN`);
#   **SGLang** has the same flag (`fa3`, `flashinfer`, `triton`). Both read K and V from pages, as ours does.
# - **FlashInfer** plans a step over requests of very different lengths, and cuts long ones in parts, so that
#   no multiprocessor waits; the merge is the exercise above.
# - **llama.cpp** has `-fa on|off|auto`; its quantized V cache (`--cache-type-v q8_0`) works only with it on.
# - **TensorRT-LLM** fuses "context FMHA" for prefill and "multi-block mode" for decode of few long sequences.
#
# ## Reading list
#
# - T. Dao, D. Fu, S. Ermon, A. Rudra, C. Ré, *FlashAttention: Fast and Memory-Efficient Exact Attention with
#   IO-Awareness*, 2022, arXiv:2205.14135. Section 3.1 is the algorithm, theorem 2 the count of accesses.
# - M. Milakov, N. Gimelshein, *Online normalizer calculation for softmax*, 2018, arXiv:1805.02867.
# - M. Rabe, C. Staats, *Self-attention Does Not Need O(n²) Memory*, 2021, arXiv:2112.05682.
# - T. Dao, *FlashAttention-2*, 2023, arXiv:2307.08691; J. Shah et al., *FlashAttention-3*, 2024,
#   arXiv:2407.08608.
# - T. Dao, D. Haziza, F. Massa, G. Sizov, *Flash-Decoding for long-context inference*, 2023 (blog).
