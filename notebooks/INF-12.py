# %% [markdown]
# ## The question
#
# With a KV cache ([INF-10](INF-10.ipynb)), a decode step computes one token, and to do so reads every weight
# of the model from memory. For one token! The arithmetic on each weight is a multiplication and an addition;
# then the next weight has to come. The processor spends most of the step waiting.
#
# Now let eight people ask at the same time. Each of the eight needs the same weights. If one step computes a
# token for all eight, the weights are read once and used eight times. That is **batching**, and it is why
# serving a model to many is so much cheaper than serving it to one.
#
# The oldest way to do it is **static batching**: collect some requests, put them into one rectangle of
# tokens, run the rectangle until its last answer is finished, then collect the next ones. What do you think:
# how many times as many tokens a second does decode give with eight requests in the batch, compared with one?

# %%
import numpy as np

from ridgeline import LLM
from ridgeline.bench.drive import drive
from ridgeline.bench.simulate import simulate
from ridgeline.bench.workload import Fixed, Uniform, Workload
from ridgeline.config import EngineConfig
from ridgeline.course import Figure, Lesson, figure, measure, ratio
from ridgeline.engine.scheduler import Scheduler
from ridgeline.models.load import describe_model
from ridgeline.models.locate import locate_model
from ridgeline.profiling.cuda import measure_cuda
from ridgeline.profiling.machine import describe_device, machine_limits
from ridgeline.profiling.measured import measure_decode
from ridgeline.profiling.roofline import Predictor

lesson = Lesson("INF-12")

# %%
lesson.predict("batch_gain", None, unit="x")

# %% [markdown]
# ## The arithmetic
#
# ### One read, many uses
#
# As in INF-10: $P$ weights of together $W$ bytes; a machine that reads $B$ bytes a second from memory and
# does $R$ operations a second. A decode step for $N$ requests reads the weights once and does $2P$ operations
# for each of the $N$ tokens. Both happen at the same time, so the slower one decides:
#
# $$ t(N) \approx \max\left(\frac{W}{B},\; N\cdot\frac{2P}{R}\right) \qquad
# \text{throughput} = \frac{N}{t(N)} $$
#
# - While reading is slower, $t$ does not depend on $N$: more requests cost *nothing*, throughput rises in
#   proportion to the batch. This is the **bandwidth bound** side.
# - Once arithmetic is slower, $t$ grows with $N$, and throughput stays at $R/2P$ however large the batch. The
#   **compute bound** side.
#
# They meet where both take equally long:
#
# $$ N^* = \frac{W}{2P}\cdot\frac{R}{B} = \frac{\text{bytes of a weight}}{2}\cdot
# \frac{\text{operations per second}}{\text{bytes per second}} $$
#
# The size of the model has cancelled. What is left is the format of its weights and a ratio that belongs to
# the machine: the operations that it can do while one byte arrives (its *ridge point*). Larger weights and
# slower memory make batching *more* worthwhile.
#
# What is not shared is the KV cache. Each request reads its own keys and values, $n\,b$ bytes at $n$ tokens,
# so to either side a part $N\,n\,b/B$ is added. It is small for short texts, and batching does nothing for
# it.
#
# ### The prediction
#
# `Predictor` divides bytes and operations of each instruction by the limits of this machine: a bound, which
# no kernel can beat. We take the model twice, as its file has it (4-bit weights, about 5 bits with their
# scales) and in `float32`.

# %%
limits = machine_limits() if lesson.device == "cpu" else measure_cuda()
on_cpu = lesson.device == "cpu"
model = describe_model(locate_model("smollm2"))
options = {"device": lesson.device, "max_num_seqs": 32, "max_model_len": 512, "enable_prefix_caching": False}
formats = {"4 bits": {}, "float32": {"dtype": "float32"}}
context = 32
batches = (1, 2, 4, 8, 16, 32)
predictors = {
    name: Predictor.for_model(model, EngineConfig.from_options("smollm2", **options, **extra), limits)
    for name, extra in formats.items()
}
bound = {name: {n: predictors[name].decode_s(n, context) for n in batches} for name in formats}


def crossing(name, peak):
    weight_bytes = predictors[name].program.weight_bytes()
    num_weights = sum(weight.num_elements for weight in predictors[name].program.weights)
    return weight_bytes / (2 * num_weights) * peak / limits.read_gb_s(weight_bytes)


lesson.record("turn_4_bits", crossing("4 bits", limits.int8_gop_s))
lesson.record("turn_float32", crossing("float32", limits.fp32_gflop_s))
lesson.record("bound_gain", 8 * bound["4 bits"][1] / bound["4 bits"][8])
lesson.table(
    "bounds",
    [
        {
            "requests": n,
            **{f"step, {name} [ms]": 1e3 * bound[name][n] for name in formats},
            **{f"throughput, {name} [tok/s]": n / bound[name][n] for name in formats},
        }
        for n in batches
    ],
    {
        **{f"step, {name} [ms]": ".2f" for name in formats},
        **{f"throughput, {name} [tok/s]": ",.0f" for name in formats},
    },
)
lesson.say("""
From the formula, decode turns compute bound at **{turn_4_bits:.0f} requests** with 4-bit weights (their
products are integer arithmetic, which this machine does faster) and at **{turn_float32:.0f}** in float32.
Eight requests should give {bound_gain:.1f} times the tokens of one.
""")

# %% [markdown]
# ### The price of a rectangle
#
# Requests are not equally long. In a rectangle, every row is as long as the longest one; the rest of it is
# **padding**, tokens that are computed and thrown away. With lengths $\ell_1 \dots \ell_N$, the useful share
# is
#
# $$ \frac{\sum_i \ell_i}{N\cdot\max_i \ell_i} = \frac{\text{mean}}{\text{max}} $$
#
# It is paid twice. Prompts are padded to the longest prompt, in prefill. And the batch goes on until its
# longest *answer* is complete, so rows that are finished earlier are computed for nothing, step after step.
# For lengths that are spread evenly from almost 0 to a maximum, mean over max is one half.
#
# ## The real thing
#
# This is all of static batching in the engine's scheduler. `_batch` are the members; a new batch is formed
# only when **none** of them is running any more. Each row of the step's plan gets padding up to the longest
# one.

# %%
lesson.source(Scheduler._schedule_static)

# %% [markdown]
# And this decides who is in a batch. It takes waiting requests in order while there are seats
# (`max_num_seqs`), while the padded rectangle stays below the limit of tokens in a step, and while the cache
# has room for *all the tokens that they may ever have*: a member cannot be sent away later.

# %%
lesson.source(Scheduler._form_batch)

# %% [markdown]
# Let us run this very scheduler on four requests and read its plans. `simulate` is the engine's scheduler
# with a clock instead of a model: it takes a function that says how long a step takes (here: one second
# each), and shows us every plan.

# %%
settings = EngineConfig.from_options(
    "smollm2", batching="static", max_num_seqs=8, max_model_len=512, max_num_batched_tokens=4096
)
few = Workload(name="few", num_requests=4, prompt_lens=Uniform(3, 9), output_lens=Uniform(1, 4), seed=4)
plans = []
simulate(
    settings, model.config, few.requests(vocab_size=1000, seed=0), lambda *step: 1.0, on_step=plans.append
)
lesson.table(
    "a static batch",
    [
        {
            "step": plan.step,
            "what": "prefill" if plan.step == 0 else "decode",
            **{f"request {row.request_id}": f"{len(row.token_ids)} + {row.num_padding}" for row in plan.rows},
        }
        for plan in plans
    ],
)

# %% [markdown]
# Read "3 + 3" as three tokens computed and three places of padding. In step 0 all prompts are filled up to
# the longest. Later, each running request computes one token, and a finished one (0 + 1) goes on taking its
# place.
#
# ## Measurement
#
# ### Throughput by batch size
#
# `measure_decode` runs a batch of requests with texts of about the same length, so nothing is padded, and
# gives the median time of a decode step.

# %%
llms = {name: LLM("smollm2", **options, **extra) for name, extra in formats.items()}


def steps_of(name, num_requests):
    return lambda: measure_decode(llms[name].engine, num_requests, context, steps=8)


measured_batches = {"4 bits": batches, "float32": lesson.pick((1, 8, 16), batches)}
repeats = lesson.pick(3, 7)
alone_s = {name: measure(steps_of(name, 1), repeats=7) for name in formats}
growth = {
    name: {
        n: ratio(steps_of(name, n), steps_of(name, 1), repeats=repeats, warmups=0) if n > 1 else Figure([1.0])
        for n in measured_batches[name]
    }
    for name in formats
}
step_s = {name: {n: alone_s[name] * growth[name][n] for n in growth[name]} for name in formats}


def shown(figure):
    return f"{figure:.2f} ({figure.low:.2f} to {figure.high:.2f})"


lesson.table(
    "decode by batch",
    [
        {
            "weights": name,
            "requests": n,
            "step [ms]": 1e3 * step_s[name][n],
            "times that of one request": shown(growth[name][n]),
            "throughput [tok/s]": n / step_s[name][n],
            "bound [tok/s]": n / bound[name][n],
            "of the bound [%]": 100 * bound[name][n] / step_s[name][n],
        }
        for name in formats
        for n in measured_batches[name]
    ],
    {"step [ms]": ".2f", "throughput [tok/s]": ",.0f", "bound [tok/s]": ",.0f", "of the bound [%]": ".0f"},
)

# %%
drawing, (rate, time) = figure("Decode by batch size, without padding", panels=2, x="requests in the batch")
for color, name in enumerate(formats):
    ns = measured_batches[name]
    rate.plot(ns, [n / step_s[name][n] for n in ns], "o-", color=f"C{color}", label=name)
    rate.plot(batches, [n / bound[name][n] for n in batches], "--", color=f"C{color}", alpha=0.6)
    time.plot(ns, [1e3 * step_s[name][n] for n in ns], "o-", color=f"C{color}", label=name)
    time.plot(batches, [1e3 * bound[name][n] for n in batches], "--", color=f"C{color}", alpha=0.6)
rate.set(title="tokens a second (dashed: bound)", ylabel="tok/s", xscale="log", yscale="log")
time.set(title="time of a step (dashed: bound)", ylabel="ms", xscale="log", yscale="log")
rate.legend()
_ = time.legend()


# %%
def gain(name, num_requests, repeats):
    alone, together = steps_of(name, 1), steps_of(name, num_requests)
    return ratio(lambda: num_requests * alone(), together, repeats=repeats)


lesson.claim(
    "batch-gain",
    "Batching gives 2 to 8 times the decode throughput (here: 8 requests, 4-bit weights)",
    value=lambda: gain("4 bits", 8, lesson.pick(5, 9)),
    claimed=(2, 8),
    band=(1.4, 8) if on_cpu else (1, 8.8),
    unit="x",
    because="at this batch the kernels are compute bound already",
)
lesson.claim(
    "gain-float32",
    "The same with float32 weights, which are more than five times as many bytes to share",
    value=Figure([8 / times for times in growth["float32"][8].samples]),
    claimed=(2, 8.4),
    band=(1.8, 8.8) if on_cpu else (1, 8.8),
    unit="x",
    because="at this batch the kernels are compute bound already",
)

# %% [markdown]
# ### Where does decode turn compute bound?
#
# Look at the step's time. If batching were free the curve would be flat; where it rises in proportion to the
# batch, arithmetic decides. The place between the two: the batch whose step takes **twice** as long as the
# step of one request. Up to there, the shared read is the larger part.


# %%
def doubling(growth):
    rising = np.maximum.accumulate([growth[n] for n in growth])
    return float(np.interp(2, rising, list(growth)))


for name in formats:
    lesson.record(f"double_{name.replace(' ', '_')}", doubling(growth[name]))
    lesson.record(
        f"bound_double_{name.replace(' ', '_')}",
        doubling({n: bound[name][n] / bound[name][1] for n in batches}),
    )
h100 = describe_device("h100")
lesson.record("h100_ridge", h100.fp32_gflop_s / h100.dram_gb_s)
lesson.record("ridge", limits.fp32_ridge)
lesson.say("""
| weights | formula: $N^*$ | step doubles, by the bounds | step doubles, measured |
| --- | ---: | ---: | ---: |
| 4 bits | {turn_4_bits:.0f} | {bound_double_4_bits:.0f} | {double_4_bits:.1f} |
| float32 | {turn_float32:.0f} | {bound_double_float32:.0f} | {double_float32:.1f} |
""")
lesson.claim(
    "turns-compute-bound",
    "Decode stays bandwidth bound up to batches of hundreds (here: the batch whose step takes twice as long "
    "as "
    "that of one)",
    value=lesson.values["double_4_bits"],
    claimed=(100, None),
    band=(1.5, 24) if on_cpu else (1, None),
    unit="requests",
    because="that is said of GPUs with 16-bit weights: an H100 can do {h100_ridge:.0f} operations while one "
    "byte arrives, two cores of this machine {ridge:.0f} in float32; and 4-bit weights take less time to be "
    "read, but need the same operations",
)

# %% [markdown]
# Measured, the step doubles earlier than by the bounds, and throughput stays below its bound by more and
# more. Three reasons, each of which a profile shows ([INF-01](INF-01.ipynb)): integer kernels reach a part of
# the best arithmetic when a batch has few rows; each request reads a KV cache of its own, in small pieces;
# and each request brings some work that nothing shares (choosing its token among all the vocabulary, its
# place in the plan).
#
# The lesson of the formula holds: float32 weights, more than five times as many bytes, gain more from a batch
# than 4-bit weights do. **Quantization and batching compete for the same waiting time.** One makes the read
# shorter, the other shares it.
#
# ### Padding
#
# Back to requests as they really come, of different lengths. First the arithmetic: sums over the lengths of a
# workload, in batches of eight, in order. Then the engine's own plans, counted.

# %%
llms["float32"].close()
num_requests, size = lesson.pick(8, 32), 8
mixed = Workload(
    name="mixed", num_requests=num_requests, prompt_lens=Uniform(16, 96), output_lens=Uniform(8, 64), seed=10
)
requests = mixed.requests(vocab_size=model.config.vocab_size, seed=0)
groups = [requests[i : i + size] for i in range(0, num_requests, size)]
rectangle = useful = 0
for group in groups:
    prompts = [len(request.prompt_token_ids) for request in group]
    decodes = [request.max_tokens - 1 for request in group]  # the first token comes out of prefill
    useful += sum(prompts) + sum(decodes)
    rectangle += size * (max(prompts) + max(decodes))

plans = []
simulate(settings, model.config, requests, lambda *step: 1.0, on_step=plans.append)
computed = sum(len(row.token_ids) for plan in plans for row in plan.rows)
padded = sum(row.num_padding for plan in plans for row in plan.rows)
lesson.record("num_computed", computed)
lesson.record("num_padded", padded)
lesson.record("useful", 100 * computed / (computed + padded))
lesson.say("""
The engine computes {num_computed:,} tokens that somebody wants, and {num_padded:,} that nobody wants. If
every token cost the same, batches of these lengths would keep {useful:.0f} % of what batches of equal lengths
gain.
""")
lesson.claim(
    "padding-counted",
    "The padding that the engine computes is N · max − sum of prompts and of answers (counted over "
    "predicted)",
    value=padded / (rectangle - useful),
    claimed=(1, 1),
    band=(1, 1),
)
lesson.claim(
    "padding-waste",
    "Padding is a detail: under 10 % of what is computed",
    value=100 * padded / (padded + computed),
    claimed=(0, 10),
    band=(25, 65),
    unit="%",
    because="a batch is as long as its longest member, twice: once for prompts and once for answers, and "
    "mean "
    "over max of even spreads is not much over one half",
)

# %% [markdown]
# ### What is left of the gain
#
# The same eight-request batches in real time: all requests at once, static batches against one request after
# the other. Once with these mixed lengths, and once with as many tokens in all, but the same for every
# request.

# %%
llms["4 bits"].close()
shared = {
    "device": lesson.device,
    "max_model_len": 512,
    "max_num_batched_tokens": 4096,
    "kv_cache_tokens": 8192,
}
one_by_one = LLM("smollm2", batching="none", **shared)
static = LLM("smollm2", batching="static", max_num_seqs=size, **shared)
equal = Workload(
    name="equal",
    num_requests=num_requests,
    prompt_lens=Fixed(sum(len(r.prompt_token_ids) for r in requests) // num_requests),
    output_lens=Fixed(sum(r.max_tokens for r in requests) // num_requests),
)


def seconds(llm, workload):
    asked = workload.requests(vocab_size=model.config.vocab_size, seed=1)
    return lambda: max(times.e2el_s for times in drive(llm.engine, asked))


gains = {}
for name, workload in (("equal lengths", equal), ("mixed lengths", mixed)):
    gains[name] = ratio(seconds(one_by_one, workload), seconds(static, workload), repeats=3, warmups=0)
lesson.table(
    "static against one by one",
    [
        {"workload": name, "throughput gain": f"{gain:.2f} ({gain.low:.2f} to {gain.high:.2f})"}
        for name, gain in gains.items()
    ],
)
lesson.claim(
    "mixed-gain",
    "With mixed lengths the gain is as large as with equal ones (gain with mixed over gain with equal "
    "lengths)",
    value=gains["mixed lengths"] / gains["equal lengths"],
    claimed=(0.95, None),
    band=(0.3, 0.92),
    unit="x",
    because="padding is computed, too: what the shared read gives, the rectangle takes",
)

# %% [markdown]
# ## Where it does not help
#
# **Whoever is short, waits.** In a static batch nobody new begins before everybody has finished, and every
# step is as slow as a step of the whole batch. Here is the shortest answer of the workload: alone on the
# machine, and as a member of its batch.

# %%
shortest = min(requests, key=lambda request: request.max_tokens)
alone = drive(one_by_one.engine, [shortest])[0]
member = min(drive(static.engine, requests), key=lambda times: times.request.max_tokens)
lesson.table(
    "the shortest request",
    [
        {
            "served": name,
            "first token after [ms]": 1e3 * times.ttft_s,
            "between tokens [ms]": 1e3 * (times.tpot_s or 0),
            "complete after [ms]": 1e3 * times.e2el_s,
        }
        for name, times in (("alone", alone), ("in its batch", member))
    ],
    dict.fromkeys(("first token after [ms]", "between tokens [ms]", "complete after [ms]"), ".1f"),
)
lesson.claim(
    "latency",
    "Batching is free for the members of a batch: time to the first token in a batch over alone",
    value=member.ttft_s / alone.ttft_s,
    claimed=(0.9, 1.1),
    band=(1.5, None) if on_cpu else (0.5, None),
    unit="x",
    because="prefill is compute bound, so the prompts of a batch cost as much as one after the other, and "
    "padding "
    "on top; nobody has a token before all of them are done",
)
one_by_one.close()
static.close()

# %% [markdown]
# **Prefill gains nothing.** One prompt of a hundred tokens is a batch of a hundred already. Batches of
# prompts only add padding.
#
# **Past the turning point, size is only waiting.** Twice the batch is then twice the time of each step at the
# same tokens a second.
#
# All three have the same cure: let requests join and leave at every step instead of at every batch, without a
# rectangle. That is *continuous batching*, [INF-30](INF-30.ipynb).
#
# ## Exercises

# %%
lesson.exercise("turning-point")

# %% [markdown]
# An H100 does 989 · 10¹² operations a second on 16-bit numbers and reads 3.35 · 10¹² bytes a second (data
# sheet). At which batch size does decode of a model with 16-bit weights turn compute bound there?

# %%
turning_point = ...  # requests
lesson.check("turning-point", turning_point)

# %% tags=["solution"]
turning_point = (2 / 2) * 989e12 / 3.35e12  # 2 bytes a weight, 2 operations a weight
lesson.check("turning-point", turning_point)

# %% tags=["wrong"]
lesson.refuses("turning-point", 2 * 989e12 / 3.35e12)
lesson.refuses("turning-point", 989e12 / 3.35e12 / 2)
lesson.refuses("turning-point", 3.35e12 / 989e12)

# %%
lesson.exercise("padding-share")

# %% [markdown]
# Write a function that takes the lengths of the members of one batch and gives the share of the rectangle
# that is padding, 0 to 1.

# %%
padding_share = ...  # for example: lambda lengths: ...
lesson.check("padding-share", padding_share)


# %% tags=["solution"]
def padding_share(lengths):
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


lesson.check("padding-share", padding_share)

# %% tags=["wrong"]
lesson.refuses("padding-share", lambda lengths: sum(lengths) / (len(lengths) * max(lengths)))
lesson.refuses("padding-share", lambda lengths: len(lengths) * max(lengths) / sum(lengths) - 1)
lesson.refuses("padding-share", lambda lengths: 1 - min(lengths) / max(lengths))

# %%
lesson.exercise("order")

# %% [markdown]
# Twelve requests wait, with answers of these lengths, and the static batch has four seats. You may choose the
# order in which they are taken. Which one needs the fewest decode steps in all? Give the lengths in your
# order. (Then think about what you would need to know to do this in a server, and who would have to wait.)
#
#     12, 90, 15, 88, 14, 96, 10, 85, 11, 92, 13, 94

# %%
order = ...  # a list of the twelve lengths
lesson.check("order", order)

# %% tags=["solution"]
order = sorted([12, 90, 15, 88, 14, 96, 10, 85, 11, 92, 13, 94])  # like with like
lesson.check("order", order)

# %% tags=["wrong"]
lesson.refuses("order", [12, 90, 15, 88, 14, 96, 10, 85, 11, 92, 13, 94])
lesson.refuses("order", [10, 94, 11, 92, 12, 90, 13, 88, 14, 85, 15, 96])
lesson.refuses("order", [10, 11, 12, 13])

# %% [markdown]
# ## The answer

# %%
lesson.say("""
Requests in a batch share one read of the weights, so decode throughput grows with the batch until arithmetic
takes as long as the read: here the step has doubled at {double_4_bits:.1f} requests with 4-bit weights, and
eight requests give **{batch_gain:.1f} times** the tokens of one (float32: {gain_float32:.1f}). The rectangle
of static batching takes much of that back: {padding_waste:.0f} % of what it computes is padding.
""")
lesson.answer()

# %% [markdown]
# ## In production
#
# - **vLLM**, **SGLang** and **TensorRT-LLM** have no static batching: requests join and leave at every step
#   (`--max-num-seqs` and `--max-num-batched-tokens` in vLLM, `--max-running-requests` in SGLang,
#   `max_batch_size` in TensorRT-LLM) and rows of different lengths lie one after the other without padding
#   ("packed", "ragged", "remove input padding").
# - Static batches live on where all is known in advance: **Transformers** `generate` with a list of prompts
#   (`padding_side="left"`, attention mask), offline jobs sorted by length, encoders and embedding models, and
#   CUDA graphs, which pad the batch to the next captured size.
# - **llama.cpp**: `--parallel` (slots) and `--cont-batching`; `llama-batched-bench` measures the curve of
#   this notebook.
# - **Ridgeline**: `batching="none"`, `"static"`, `"continuous"`; `max_num_seqs`.
#
# ## Reading list
#
# - Pope et al. 2022, [Efficiently Scaling Transformer Inference](https://arxiv.org/abs/2211.05102): batch
#   size, latency and cost on one plot.
# - Williams, Waterman, Patterson 2009, [Roofline](https://doi.org/10.1145/1498765.1498785): the two sides of
#   $\max$, drawn.
# - Yu et al. 2022, [Orca](https://www.usenix.org/conference/osdi22/presentation/yu): what is wrong with
#   batches of requests, and what to do instead.
# - Chen 2022, [Transformer Inference Arithmetic](https://kipp.ly/transformer-inference-arithmetic/): the same
#   formulas for GPUs.
