# %% [markdown]
# ## The question
#
# A language model writes one token at a time. To choose the next token, it looks at all tokens before it: the
# prompt, and what it has written so far. So an answer of 100 tokens looks at the first word of the prompt 100
# times. Must it *compute* that word 100 times?
#
# The **KV cache** says no: what later tokens need of an earlier one is computed once and kept. It is the
# first optimisation that every inference engine has, and the one that all others in this course stand on:
# batching, paging, prefix caching and attention kernels are all ways to arrange, share or read this memory.
#
# Three words before we begin, from [INF-00](INF-00.ipynb) and [INF-02](INF-02.ipynb). A **step** is one run
# through the model. **Prefill** is the step that computes the prompt, many tokens at once. **Decode** is
# every step after it, and gives one new token.
#
# Take a text of 512 tokens, prompt and answer so far together. How many times faster is the next decode step
# with a KV cache than without? People say "5 to 10 times". Put your own number in place of `None`: what you
# believe before you know is what makes the result stick.

# %%
import numpy as np

from ridgeline import LLM, SamplingParams
from ridgeline.config import EngineConfig
from ridgeline.course import Lesson, figure, measure, ratio
from ridgeline.engine.scheduler import Scheduler
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.load import describe_model
from ridgeline.models.locate import locate_model
from ridgeline.models.synth import preset_config
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.program import StepShape
from ridgeline.ops.torch_ops import store_kv
from ridgeline.profiling.cuda import measure_cuda
from ridgeline.profiling.machine import machine_limits
from ridgeline.profiling.measured import measure_decode
from ridgeline.profiling.plan import measure_peak
from ridgeline.profiling.roofline import Predictor

lesson = Lesson("INF-10")

# %%
lesson.predict("kv_speedup", None, unit="x")

# %% [markdown]
# ## The arithmetic
#
# ### What an earlier token leaves behind
#
# A decoder is a stack of layers. A layer turns each token's vector $x_i$ (position $i$ of the text) into a
# new one. Most of a layer treats every token alone: norms, the MLP, the projections. Only **attention** mixes
# tokens. It makes three vectors of each token, by three matrices:
#
# $$ q_i = W_q\,x_i \;\text{(the query)} \qquad k_i = W_k\,x_i \;\text{(the key)} \qquad
# v_i = W_v\,x_i \;\text{(the value)} $$
#
# and gives token $t$ a weighted mean of the values of all tokens up to $t$:
#
# $$ o_t = \sum_{i \le t} p_{ti}\, v_i \qquad
# p_{ti} = \frac{e^{q_t \cdot k_i/\sqrt{d}}}{\sum_{j \le t} e^{q_t \cdot k_j/\sqrt{d}}} $$
#
# with $d$ the length of a key. (A layer does this several times side by side, with shorter vectors and
# matrices of their own; each of these is a **head**.) Two facts about these formulas are the whole idea.
#
# 1. **The sums stop at $t$.** A token sees those before it, never those after ("causal" attention). So
#    nothing in layer 1 changes at position $i$ when the text grows behind it; then nothing in layer 2 does,
#    and so on. $k_i$ and $v_i$ of every layer are final as soon as token $i$ has been computed once.
# 2. **Of an earlier token, only $k_i$ and $v_i$ appear.** Its query $q_i$ asked its question when it was its
#    turn, and nobody asks for it again. That is why there is a *KV* cache and no Q cache.
#
# So keep $k_i$ and $v_i$ of every token in every layer. A decode step then computes **one** token: its own q,
# k and v, then attention over the keys and values kept. Without the cache it has to compute **all** tokens of
# the text to have their keys and values, and throws them away afterwards.
#
# ### What that saves
#
# Let $n$ be the tokens in the text. Counting tokens, a step without cache does $n$ times the work of one with
# it. Counting *time*, the answer is another one, for the reason of [INF-02](INF-02.ipynb): a step takes as
# long as the slower of two things, reading its bytes from memory or doing its arithmetic.
#
# - **Recompute**: $n$ tokens share one read of the weights, so arithmetic decides. With $P$ weights, a token
#   costs $2P$ operations (a multiplication and an addition for each weight); at $R$ operations a second
#   $$ t_\text{recompute}(n) \approx n \cdot \frac{2P}{R} $$
#   (from about the $n^{*}$ tokens of [INF-02](INF-02.ipynb) on; for fewer, reading the weights still decides.
#   Attention is left out: its part grows with $n^2$ and is small for short texts.)
# - **With the cache**: one token, so reading decides. With $W$ bytes of weights, $b$ bytes of cache for a
#   token, and $B$ bytes a second from memory
#   $$ t_\text{cached}(n) \approx \frac{W + n\,b}{B} $$
#   (INF-02 used the letter $b$ for the bits of a weight, and $F$ for what is $R$ here.)
#
# Their ratio is the speed-up of a decode step:
#
# $$ S(n) = \frac{t_\text{recompute}(n)}{t_\text{cached}(n)} \approx n \cdot \frac{2P/R}{(W + n\,b)/B} $$
#
# No number such as "5 to 10" can be read from this formula: $S$ is a **line**. Between $n^{*}$ and the length
# where the cache itself is large beside the weights ($n\,b \approx W$) it grows in proportion to $n$, with
# the slope $(2P/R)\,/\,(W/B)$. The model gives $P$ and $W$, the machine gives $R$ and $B$.
#
# ### What it costs
#
# Memory. Each token keeps a key and a value, in each layer, for each head that has keys and values of its own
# (a **KV head**; several query heads may share one, see [INF-21](INF-21.ipynb)):
#
# $$ b = 2 \cdot \text{layers} \cdot \text{KV heads} \cdot \text{head size}
# \cdot \text{bytes of an element} $$
#
# All of these stand in the config of a model, so $b$ is known before anything is loaded. Here is ours,
# SmolLM2-135M, and the same formula on two others. The engine keeps K and V as `float16`, two bytes an
# element.

# %%
model = describe_model(locate_model("smollm2"))
kv_token_bytes = lesson.record("kv_token_bytes", CacheLayout.bytes_per_token(model.config, "float16"))
lesson.record("num_layers", model.config.num_layers)
shapes = {"SmolLM2-135M": model.config, "Llama 3.2 1B": preset_config("llama-1b")}
shapes |= {"Llama 2 7B": preset_config("llama-7b")}
lesson.table(
    "cache of one token",
    [
        {
            "model": name,
            "layers": shape.num_layers,
            "query heads": shape.num_heads,
            "KV heads": shape.num_kv_heads,
            "head size": shape.head_dim,
            "cache of one token [KiB]": CacheLayout.bytes_per_token(shape, "float16") / 1024,
            "of 4,096 tokens [MiB]": CacheLayout.bytes_per_token(shape, "float16") * 4096 / 2**20,
        }
        for name, shape in shapes.items()
    ],
    {"cache of one token [KiB]": ".1f", "of 4,096 tokens [MiB]": ",.0f"},
)

# %% [markdown]
# Check the first line by hand before you go on: twice the layers, times KV heads, times head size, times two
# bytes. And notice the last one: a conversation of 4,096 tokens with Llama 2 7B needs 2 GiB, for *one* user.
#
# ### The prediction for this machine
#
# The package writes a model down as a list of instructions (its *Program*), counts bytes and operations of
# each, and divides them by the limits that it has measured on this machine: GB/s from memory, operations a
# second. The sum is a **bound**: no program can be faster than that here. `step_s` takes one pair for each
# request, (tokens to compute, tokens in the text), and the number of positions whose next token is wanted. So
# `(n, n)` is a step without cache, and `(1, n)` is one with it.

# %%
limits = machine_limits() if lesson.device == "cpu" else measure_cuda()
config = EngineConfig.from_options("smollm2", device=lesson.device, max_num_seqs=1, max_model_len=8192)
predictor = Predictor.for_model(model, config, limits)
lengths = lesson.pick([16, 64, 128, 256, 512], [16, 32, 64, 128, 256, 512, 1024])
recompute_bound = {n: predictor.step_s([(n, n)], 1) for n in lengths}
cached_bound = {n: predictor.step_s([(1, n)], 1) for n in lengths}
bound = {n: recompute_bound[n] / cached_bound[n] for n in lengths}
lesson.record("weight_bytes", predictor.program.weight_bytes())
lesson.record("weight_mb", predictor.program.weight_bytes() / 1e6)
lesson.record("token_gflop", predictor.program.flops(StepShape.decode(1, 1)) / 1e9)
lesson.record("bandwidth", limits.read_gb_s(predictor.program.weight_bytes()))
lesson.record("bound_512", bound[512])
lesson.table(
    "bounds",
    [
        {
            "tokens in the text": n,
            "step without cache [ms]": 1e3 * recompute_bound[n],
            "step with cache [ms]": 1e3 * cached_bound[n],
            "speed-up by the bounds": bound[n],
        }
        for n in lengths
    ],
    {
        "step without cache [ms]": ".1f",
        "step with cache [ms]": ".2f",
        "speed-up by the bounds": ".1f",
    },
)
lesson.say("""
The model has W = {weight_mb:.0f} MB of weights, one token costs {token_gflop:.2f} GFLOP (billions of
operations), and this machine reads about {bandwidth:.0f} GB/s when it goes through that many bytes again and
again. With the cache, a step is almost all reading and hardly changes with the length; without it, each
further token adds about the same time again (a little more in longer texts, because of attention). At 512
tokens the arithmetic says **{bound_512:.0f} times**, as long as kernels get equally close to both limits.
""")

# %% [markdown]
# ## The real thing
#
# ### The whole switch
#
# How does an engine with so many parts turn its cache off? Each request has one number,
# `num_computed_tokens`: how many of its tokens have their K and V in the cache. A step computes all tokens
# from there to the end of the text. This is the function that records what a step has done; look at its last
# three lines.

# %%
lesson.source(Scheduler.update)

# %% [markdown]
# Without a cache the counter goes back to 0, and the next step finds a text of which nothing is known. That
# is the only difference between the two: same model, same kernels, same scheduler (the part that decides what
# the next step computes). It makes the comparison below fair.
#
# Let us watch it. The function here is the engine's own loop (`LLMEngine.step`) without text and statistics:
# decide the step (a **plan**), compute it, record it. A plan has one **row** for each request: the position
# it starts at and the tokens to compute. There is one request here, so we look at `plan.rows[0]`.


# %%
def next_plan(llm):
    plan = llm.engine.scheduler.schedule()
    llm.engine.scheduler.update(plan, llm.engine.executor.submit(plan).result())
    return plan


# %%
plans = {}
for kv_cache in (False, True):
    with LLM("smollm2", device=lesson.device, kv_cache=kv_cache, max_num_seqs=1, max_model_len=128) as llm:
        request = llm.engine.add_request(
            "The capital of France is", SamplingParams(temperature=0, max_tokens=8)
        )
        plans[kv_cache] = [next_plan(llm) for _ in range(4)]
        llm.engine.abort(request)

lesson.table(
    "steps",
    [
        {
            "cache": "on" if kv_cache else "off",
            "step": plan.step,
            "first position computed": plan.rows[0].start,
            "tokens computed": len(plan.rows[0].token_ids),
            "token ids": " ".join(map(str, plan.rows[0].token_ids)),
        }
        for kv_cache in (False, True)
        for plan in plans[kv_cache]
    ],
)

lesson.claim(
    "one-new-token",
    "With a cache, a step after the first computes one token (the largest number in the steps above)",
    value=max(len(plan.rows[0].token_ids) for plan in plans[True][1:]),
    claimed=(1, 1),
    band=(1, 1),
)

# %% [markdown]
# Step 0 is the same for both: prefill of the prompt. From then on, one recomputes a text that grows by a
# token a step; the other computes the newest token only, at its place in the text.
#
# ### Where K and V go
#
# The cache is memory for a fixed number of tokens, cut into **blocks** of 32 token places. A place is called
# a **slot**. A request has a *block table*, the list of its blocks in the order of the text; the slot of
# position $i$ is then
#
# $$ \text{slot}(i) = \text{block\_table}[\lfloor i / 32 \rfloor] \cdot 32 + i \bmod 32 $$
#
# An example: a request has the block table (3, 7). Position 40 is in its second block ($\lfloor 40/32 \rfloor
# = 1$), at place 8 (40 mod 32), so its slot is 7 · 32 + 8 = 232. Blocks are handed out when they are needed,
# and their order in memory does not matter. (Why not one piece for each request? [INF-31](INF-31.ipynb).)
#
# Here are the slots of the steps above, with the cache on. This text is short: one block, number 0, so slot
# and position are still the same number.

# %%
for plan in plans[True]:
    batch = ForwardBatch.from_rows(plan.rows, block_size=32)
    print(f"step {plan.step}: block table {plan.rows[0].block_ids}, K and V go to slots {batch.slot_mapping}")

# %% [markdown]
# And this writes them, in the eager executor of [INF-01](INF-01.ipynb) (PyTorch; the C++ kernels of the
# native one do the same). `k_pages` and `v_pages` are the memory of one layer: all its blocks, here called
# pages. `[T, G*D]` is T tokens, each with G KV heads of D numbers. The scales are there for 8-bit caches
# only. In words: skip padding (places in a batch that belong to no token), and write each token's K and V to
# its slot. It runs in every layer **before** attention reads the cache of that layer, so a token finds its
# own key there too.

# %%
lesson.source(store_kv)

# %% [markdown]
# ## Measurement
#
# ### Does it change the answer?
#
# By the argument above it must not: the same keys and values, remembered instead of computed again. We ask
# for more than the same words. The model gives each token that it chose a probability; its logarithm is the
# token's **log-probability**, and `cumulative_logprob` is their sum over the answer. It shows differences
# that are too small to change the choice of a token. The engine is *greedy* here (temperature 0): it always
# takes the most probable token.

# %%
prompts = ["The capital of France is", "1, 2, 3,", "A cache is a place where"]
greedy = SamplingParams(temperature=0, max_tokens=lesson.pick(24, 64), ignore_eos=True)
answers = {}
for kv_cache in (False, True):
    with LLM("smollm2", device=lesson.device, kv_cache=kv_cache, max_num_seqs=1, max_model_len=128) as llm:
        answers[kv_cache] = [output.outputs[0] for output in llm.generate(prompts, greedy)]

num_equal = sum(
    off == on
    for a, b in zip(answers[False], answers[True], strict=True)
    for off, on in zip(a.token_ids, b.token_ids, strict=True)
)
lesson.record("num_compared", sum(len(answer.token_ids) for answer in answers[True]))
lesson.record(
    "logprob_difference",
    max(
        abs(a.cumulative_logprob - b.cumulative_logprob)
        for a, b in zip(answers[False], answers[True], strict=True)
    ),
)
print("\n".join(prompt + answer.text[:60] for prompt, answer in zip(prompts, answers[True], strict=True)))
lesson.claim(
    "same-tokens",
    "The cache changes nothing in the answer: share of greedy tokens that are the same with and without it",
    value=num_equal / lesson.values["num_compared"],
    claimed=(1, 1),
    band=(1, 1) if lesson.device == "cpu" else (0.5, 1),
    because="matrix products of one row and of many round differently on this device",
)
lesson.say("""
{num_compared} tokens were compared. The log-probability of a whole answer differs by {logprob_difference:.1g}
at most with and without the cache.
This engine's CPU kernels promise bit for bit the same numbers for a token, whether it is computed alone or
among others.
""")

# %% [markdown]
# Not every engine does: where a matrix product of one row adds up in another order than one of many rows, the
# results differ in the last digits, and now and then a close call between two words falls the other way. That
# is rounding, not a wrong cache, and it is why tests of caches compare log-probabilities with a tolerance.
#
# ### Is a token as large as the formula says?
#
# The formula against the operating system. `measure_peak` starts a process, gives it a cache of a certain
# number of tokens, fills *all* of it, and reads the largest memory that the process had. Two sizes, so that
# weights, Python and everything else cancel in the difference.

# %%
small, large = 1024, lesson.pick(9216, 17408)
peaks = {}


def measured_bytes():
    for tokens in (small, large):
        sizes = {"kv_cache_tokens": tokens, "max_model_len": 512, "max_num_seqs": 8}
        peaks[tokens] = measure_peak("smollm2", sizes)
    return (peaks[large] - peaks[small]) / (large - small)


lesson.claim(
    "bytes-per-token",
    "Bytes a token measured in the process, as a share of 2 · layers · KV heads · head size · 2 bytes",
    value=lambda: measured_bytes() / kv_token_bytes,
    claimed=(0.93, 1.07),
    band=(0.93, 1.07),
)

# %%
lesson.record("peak_bytes", (peaks[large] - peaks[small]) / (large - small))
lesson.table(
    "memory",
    [
        {
            "cache [tokens]": tokens,
            "by the formula [MiB]": tokens * kv_token_bytes / 2**20,
            "peak of the process [MiB]": peaks[tokens] / 2**20,
        }
        for tokens in (small, large)
    ],
    {"by the formula [MiB]": ".1f", "peak of the process [MiB]": ".1f"},
)
lesson.say("""
Difference of the peaks over difference of the tokens: **{peak_bytes:,.0f} bytes a token**, by the formula
{kv_token_bytes:,}. (What else the process needs differs by some megabytes from one start to the next.)
""")

# %% [markdown]
# ### How much faster is a step?
#
# The bounds said: a line that grows with the text. Now the clock. `measure_decode`, known from
# [INF-02](INF-02.ipynb), is the median of a few decode steps around a length. Each ratio is taken in turns
# (some steps without cache, some with, and again), because a shared machine changes its speed from second to
# second and turns see the same machine. What stands in the table is the median and, in brackets, the
# quartiles: half of all samples lie between them. The column "without" is the product of the two beside it.

# %%
options = {"device": lesson.device, "max_num_seqs": 1, "max_model_len": 2048, "enable_prefix_caching": False}
without = LLM("smollm2", kv_cache=False, **options)
cached = LLM("smollm2", kv_cache=True, **options)


def steps_at(llm, length):
    return lambda: measure_decode(llm.engine, 1, length, steps=4)


def speedup_at(length, repeats):
    return ratio(steps_at(without, length), steps_at(cached, length), repeats=repeats)


# %%
speedups = {n: speedup_at(n, lesson.pick(3, 7)) for n in lengths}
step_s = {n: measure(steps_at(cached, n), repeats=3) for n in lengths}
lesson.table(
    "speed-up",
    [
        {
            "tokens in the text": n,
            "with cache [ms]": 1e3 * step_s[n],
            "without [ms]": 1e3 * step_s[n] * speedups[n],
            "speed-up": f"{speedups[n]:.1f} ({speedups[n].low:.1f} to {speedups[n].high:.1f})",
            "by the bounds": bound[n],
        }
        for n in lengths
    ],
    {"with cache [ms]": ".2f", "without [ms]": ".1f", "by the bounds": ".1f"},
)

# %%
drawing, (times, gains) = figure(
    "One decode step with and without a KV cache", panels=2, x="tokens in the text"
)
times.loglog(lengths, [1e3 * step_s[n] * speedups[n] for n in lengths], "o-", label="without cache")
times.loglog(lengths, [1e3 * step_s[n] for n in lengths], "o-", label="with cache")
times.loglog(lengths, [1e3 * recompute_bound[n] for n in lengths], "--", color="C5", label="bounds")
times.loglog(lengths, [1e3 * cached_bound[n] for n in lengths], "--", color="C5")
times.set(title="time of the step", ylabel="ms")
times.set_xticks(lengths, labels=lengths)
times.minorticks_off()
times.legend()
spread = [[speedups[n] - speedups[n].low for n in lengths], [speedups[n].high - speedups[n] for n in lengths]]
gains.errorbar(lengths, [speedups[n] for n in lengths], yerr=spread, fmt="o-", color="C2", label="measured")
gains.plot(lengths, [bound[n] for n in lengths], "--", color="C5", label="by the bounds")
gains.axhspan(5, 10, alpha=0.2, color="C1", label='"5 to 10 times"')
gains.set(title="speed-up", ylabel="times", xscale="log", yscale="log")
gains.set_xticks(lengths, labels=lengths)
gains.set_yticks([2, 5, 10, 20, 50], labels=[2, 5, 10, 20, 50])
gains.minorticks_off()
_ = gains.legend()
# %% [markdown]
# Read the left plot first. With the cache, the line is nearly flat beside the other: a step reads the weights
# once, whatever the text. Without, it rises nearly in proportion to the text once the text is long enough; at
# the left end a part that does not depend on the text still counts. (All axes are logarithmic.) Dashed are
# the bounds of the machine; both measured lines lie above theirs, as they must.
#
# Right: the ratio of the two. A ratio of two bounds is itself no bound: the measured speed-up may be on
# either side of the dashed line. It is above where the step with the cache comes closer to its bound than the
# step without. "5 to 10 times" (the shaded band) is one place on the line.

# %%
curve = [[speedups[n] for n in lengths], lengths]
for times_faster in (5, 10):
    lesson.record(f"length_of_{times_faster}", float(np.interp(times_faster, *curve)))
on_cpu = lesson.device == "cpu"
lesson.claim(
    "kv-speedup",
    "With a KV cache a decode step is 5 to 10 times faster than recomputing (here: 512 tokens in the text)",
    value=speedups[512],
    claimed=(5, 10),
    band=(15, None) if on_cpu else (0.5, None),
    unit="x",
    because="the speed-up is no number but a line: 5 to 10 times is what texts of about {length_of_5:.0f} to "
    "{length_of_10:.0f} tokens gain here, and longer ones gain more",
)
lesson.claim(
    "growth",
    "The longer the text the larger the gain: the speed-up at 512 tokens over that at 16",
    value=speedups[512] / speedups[16],
    claimed=(2, None),
    band=(4, None) if on_cpu else (0.5, None),
    unit="x",
    because="every step takes as long as its kernels take to start on this device",
)

# %% [markdown]
# ### How far each step is from its bound
#
# Both steps take longer than their bounds, so compare times before ratios. How far each is from its bound
# decides the speed-up: it is the speed-up by the bounds, times the second percentage below, divided by the
# first. If the two are about equal, they cancel, and the measured line lies on the dashed one. Two numbers
# tell: what one more token of text adds to a step without cache, and what a step with the cache costs for a
# short text.

# %%
low, high = lengths[1], lengths[-1]
recompute_s = {n: step_s[n] * speedups[n] for n in lengths}
token_s = lesson.record("token_s", (recompute_s[high] - recompute_s[low]) / (high - low))
bound_token_s = (recompute_bound[high] - recompute_bound[low]) / (high - low)
lesson.record("token_ms", 1e3 * token_s)
lesson.record("step_ms", 1e3 * step_s[low])
lesson.record("of_compute", 100 * bound_token_s / token_s)
lesson.record("of_memory", 100 * cached_bound[low] / step_s[low])
lesson.record("break_even", step_s[low] / token_s)
lesson.say("""
- One more token in a step without cache: **{token_ms:.2f} ms**. By the bounds it would add {of_compute:.0f} %
  of that.
- One step with the cache: **{step_ms:.2f} ms**. Reading its bytes at this machine's best would take
  {of_memory:.0f} % of that. The rest: kernels reach a part of that best, over a hundred of them wait for one
  another in each step, and there is some Python around it.

Their quotient is worth remembering: a decode step costs as much as recomputing **{break_even:.0f} tokens**.
That is why the speed-up is not *n* but *n* divided by about {break_even:.0f}: the work that the cache saves
is cheap work (many tokens share a read of the weights), and the work that remains is expensive (one token
pays for all weights alone). The next notebook but one, [INF-12](INF-12.ipynb), shares that read between
several requests.
""")

# %% [markdown]
# A second witness: `docs/results/ladder.json`, where the same switch was turned on in the eager executor,
# with float32 weights, and on a whole workload: twelve requests with prompts of 96 to 224 tokens, prefill
# included.

# %%
ladder = lesson.committed("docs/results/ladder.json")
rung = next(step for step in ladder["details"]["steps"] if step["rung"]["name"] == "KV cache")
lesson.record("ladder_date", ladder["created"][:10])
lesson.record("ladder_command", " ".join(ladder["command"][1:4]))
lesson.record("ladder_gain", rung["speed_up"])
lesson.say("""
There it was **{ladder_gain:.1f} times** the tokens a second (measured {ladder_date} by `ridgeline
{ladder_command}`). This is one number over texts of many lengths. It must be smaller than the speed-up of a
decode step, because it includes the prefill, which the cache does not make faster; and in this executor the
kernels are at another distance from the two limits, so the slope is another one. When you read "5 to 10
times" somewhere, ask for the length of the text and for the machine.
""")

# %% [markdown]
# ## Where it does not help
#
# ### One token
#
# A request for a single token (a classification, a score, an embedding) is prefill and nothing else. There is
# no later step that could use what was kept.


# %%
def one_token(llm):
    prompt = {"prompt_token_ids": list(range(100, 356))}
    # None, so that `ratio` takes the seconds of the call
    return lambda: llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1)) and None


lesson.claim(
    "one-token",
    "The cache speeds up requests for one token as well",
    value=lambda: ratio(one_token(without), one_token(cached), repeats=5),
    claimed=(2, None),
    band=(0.6, 1.6),
    unit="x",
    because="a single token needs prefill only, which computes every token of the prompt once in either case",
)

# %% [markdown]
# ### Long texts: now the cache must be read
#
# Look at $t_\text{cached}(n) = (W + n\,b)/B$ again. At some length, reading K and V takes as long as reading
# the weights. (It is an exercise below to say where.) Beyond it the cache is the larger part of what a step
# reads, and its time comes closer and closer to being proportional to the text. The cache is still worth it:
# without it, all tokens would be computed again. The bound and the clock, for one request whose text grows:

# %%
without.close()
cached.close()
contexts = lesson.pick([128, 1024, 2048, 4096], [128, 1024, 2048, 4096, 8000])
with LLM("smollm2", **(options | {"max_model_len": 8192})) as llm:
    long_s = {n: measure_decode(llm.engine, 1, n, steps=lesson.pick(12, 24)) for n in contexts}
lesson.table(
    "long texts",
    [
        {
            "tokens in the text": n,
            "cache [MB]": n * kv_token_bytes / 1e6,
            "step [ms]": 1e3 * long_s[n],
            "bound [ms]": 1e3 * predictor.decode_s(1, n),
        }
        for n in contexts
    ],
    {"cache [MB]": ".0f", "step [ms]": ".2f", "bound [ms]": ".2f"},
)
lesson.record("kv_gb_s", kv_token_bytes * (4096 - 128) / (long_s[4096] - long_s[128]) / 1e9)
lesson.claim(
    "flat",
    "With a cache, the time of a token does not depend on the length of the text (4,096 tokens over 128)",
    value=long_s[4096] / long_s[128],
    claimed=(0.9, 1.1),
    band=(1.3, None) if on_cpu else (0.5, None),
    unit="x",
    because="the keys and values of the whole text are read for every token, here at {kv_gb_s:.0f} GB/s",
)

# %% [markdown]
# The measured time grows faster than the bound: attention reads keys and values in small pieces (a *tile* of
# 32 tokens at a time) and has too few reads under way at once to get all the bandwidth of the memory
# (`docs/LOG.md` has the measurement). Better attention kernels are the topic of [INF-20](INF-20.ipynb); fewer
# KV heads, which make $b$ smaller, that of [INF-21](INF-21.ipynb).
#
# ### Many requests: now the cache must fit
#
# Weights are shared by all requests, the cache is not.

# %%
full_bytes = 32 * model.config.max_position * kv_token_bytes
lesson.record("full_gib", full_bytes / 2**30)
lesson.record("max_position", model.config.max_position)
lesson.record("times_weights", full_bytes / lesson.values["weight_bytes"])
lesson.say("""
32 requests, each with room for the {max_position:,} tokens that this model can take: **{full_gib:.1f} GiB**
of cache, {times_weights:.0f} times the weights. With many long requests it is the cache, not the weights,
that fills the memory. Most of this course's second half is about that: paging ([INF-31](INF-31.ipynb)) so
that nothing is reserved in vain, sharing ([INF-33](INF-33.ipynb)) so that nothing is kept twice.
""")

# %% [markdown]
# ## Exercises

# %%
lesson.exercise("kv-bytes")

# %% [markdown]
# Llama 3.1 8B has 32 layers, a hidden size of 4096, 32 query heads, 8 KV heads and a head size of 128. How
# many bytes does its cache keep for one token in `float16`?

# %%
kv_bytes = ...  # bytes of cache for one token
lesson.check("kv-bytes", kv_bytes)

# %% tags=["solution"]
kv_bytes = 2 * 32 * 8 * 128 * 2  # K and V, layers, KV heads, head size, bytes of a float16
lesson.check("kv-bytes", kv_bytes)

# %% tags=["wrong"]
lesson.refuses("kv-bytes", 32 * 8 * 128 * 2)
lesson.refuses("kv-bytes", 2 * 32 * 32 * 128 * 2)
lesson.refuses("kv-bytes", 2 * 32 * 8 * 128 * 16)

# %%
lesson.exercise("tokens-computed")

# %% [markdown]
# Write a function of the prompt's tokens `p` and the answer's tokens `n` which says how many tokens are
# computed in all **without** a cache, the prompt's first computation included. (The table of steps above
# shows the first four steps of one such request.) Then compare it with what a cache needs, `p + n - 1` (the
# last token of the answer is given out and never computed), for a prompt of 100 tokens and an answer of 400.

# %%
tokens_computed = ...  # for example: lambda p, n: ...
lesson.check("tokens-computed", tokens_computed)


# %% tags=["solution"]
def tokens_computed(p, n):
    return n * p + n * (n - 1) // 2  # p, then p + 1, ... up to p + n - 1


lesson.check("tokens-computed", tokens_computed)
lesson.record("work_ratio", tokens_computed(100, 400) / (100 + 400 - 1))
lesson.say("For 100 and 400 it is {work_ratio:.0f} times the tokens that a cache computes.")

# %% tags=["wrong"]
lesson.refuses("tokens-computed", lambda p, n: p + n - 1)
lesson.refuses("tokens-computed", lambda p, n: n * (p + n))
lesson.refuses("tokens-computed", lambda p, n: sum(range(p + 1, p + n + 1)))

# %%
lesson.exercise("requests-that-fit")

# %% [markdown]
# You can spare 256 MiB for the cache of SmolLM2. Every request has 300 tokens, prompt and answer together.
# How many requests can run at the same time? Blocks have 32 tokens and belong to one request each.
# (`kv_token_bytes` is in this notebook.)

# %%
requests_that_fit = ...
lesson.check("requests-that-fit", requests_that_fit)

# %% tags=["solution"]
with LLM("smollm2", device="cpu", kv_cache_memory_bytes=256 * 2**20, max_model_len=512) as llm:
    num_blocks = llm.engine.layout.num_blocks  # 256 MiB // (bytes of a token * 32)
blocks_of_a_request = -(-300 // 32)  # rounded up
requests_that_fit = num_blocks // blocks_of_a_request
lesson.check("requests-that-fit", requests_that_fit)

# %% tags=["wrong"]
lesson.refuses("requests-that-fit", 256 * 2**20 // (kv_token_bytes * 300))
lesson.refuses("requests-that-fit", 256 * 10**6 // (kv_token_bytes * 32) // 10)
lesson.refuses("requests-that-fit", 256 * 2**20 // (kv_token_bytes // 2 * 32) // 10)

# %%
lesson.exercise("equal-context")

# %% [markdown]
# At how many tokens in the text does a decode step of one request read as many bytes of cache as of weights?
# Use `lesson.values["weight_bytes"]` and `kv_token_bytes`. Then look at the table of long texts: at that
# length a step reads twice the bytes of a short text. Its *bound* may be more than twice as long: the more
# bytes a step reads, the less of them the processor's caches hold, and the slower they come
# ([INF-00](INF-00.ipynb)).

# %%
equal_context = ...  # tokens
lesson.check("equal-context", equal_context)

# %% tags=["solution"]
equal_context = lesson.values["weight_bytes"] / kv_token_bytes
lesson.record("equal_context", equal_context)
lesson.check("equal-context", equal_context)
lesson.say("At about {equal_context:,.0f} tokens.")

# %% tags=["wrong"]
lesson.refuses("equal-context", 2 * lesson.values["weight_bytes"] / kv_token_bytes)
lesson.refuses("equal-context", lesson.values["weight_bytes"] / (kv_token_bytes / 30))

# %% [markdown]
# ## The answer

# %%
lesson.say("""
A KV cache is correct because attention looks backwards only: keys and values of a token never change once
they are computed. It turns a step over *n* tokens (arithmetic decides) into a step over one (reading the
weights decides), and so it gains *n* divided by the number of tokens that could be computed again in the time
of one step with the cache, here about {break_even:.0f}. At 512 tokens that was **{kv_speedup:.0f} times**.
The price is {kv_token_bytes:,} bytes a token, known from the config in advance.
""")
lesson.answer()

# %% [markdown]
# ## In production
#
# - **Transformers** (Hugging Face) calls it `past_key_values`; `generate(..., use_cache=False)` is our
#   switch. A `DynamicCache` grows by copying, a `StaticCache` is allocated once, which `torch.compile` needs.
# - **vLLM** gives the cache what is left of `--gpu-memory-utilization` after the weights, in blocks of
#   `--block-size` tokens; `--kv-cache-dtype fp8` halves $b$, `--max-model-len` bounds $n$. Its log says at
#   start how many tokens fit: our `requests-that-fit`.
# - **SGLang**: `--mem-fraction-static`, `--kv-cache-dtype`; the cache is a tree of shared prefixes
#   (RadixAttention).
# - **llama.cpp**: `--ctx-size` is the whole cache for all slots together, `--cache-type-k` and
#   `--cache-type-v` quantize K and V apart from each other (`q8_0`, `q4_0`), `--no-kv-offload` leaves them in
#   host memory.
# - **TensorRT-LLM**: `KvCacheConfig(free_gpu_memory_fraction=…, enable_block_reuse=…, host_cache_size=…)`;
#   blocks that do not fit move to host memory.
# - **Ridgeline**: `kv_cache`, `kv_cache_tokens` or `kv_cache_memory_bytes`, `kv_cache_dtype` (`int8` pages
#   hold nearly twice the tokens), `kv_layout`. `ridgeline plan` prints what fits before anything is loaded.
#
# ## Reading list
#
# - Vaswani et al. 2017, [Attention Is All You Need](https://arxiv.org/abs/1706.03762): attention and its
#   causal mask.
# - Shazeer 2019, [Fast Transformer Decoding: One Write-Head is All You
#   Need](https://arxiv.org/abs/1911.02150): why decoding with a cache waits for memory, with the arithmetic,
#   and what fewer KV heads do about it.
# - Pope et al. 2022, [Efficiently Scaling Transformer Inference](https://arxiv.org/abs/2211.05102): the same
#   arithmetic over many chips.
# - Kwon et al. 2023, [PagedAttention](https://arxiv.org/abs/2309.06180): the cache in blocks.
# - Chen 2022, [Transformer Inference Arithmetic](https://kipp.ly/transformer-inference-arithmetic/): bytes
#   and FLOPs of a step, by hand.
