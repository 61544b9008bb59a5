# %%
import itertools
import math

from ridgeline import LLM
from ridgeline.bench.latency import LatencyOptions, time_batch
from ridgeline.course import Figure, Lesson, figure, measure, ratio
from ridgeline.engine.scheduler import Scheduler
from ridgeline.ops.program import Program, StepShape
from ridgeline.profiling.cuda import measure_cuda
from ridgeline.profiling.machine import machine_limits
from ridgeline.profiling.measured import measure_decode, measure_prefill
from ridgeline.profiling.roofline import Predictor, peak_of

lesson = Lesson("INF-02")
on_cpu = lesson.device == "cpu"

# %% [markdown]
# ## The question
#
# INF-00 showed the two phases of a request. **Prefill** computes all tokens of a prompt in one step (or a
# few), **decode** computes one new token in each step. The model and its weights are the same, and so is
# the code. Why then does every serving system treat the two as different problems, with different settings,
# and some even with different machines?
#
# This notebook measures both alone. It needs four words of INF-00: *TTFT*, the time to the first token;
# *TPOT*, the time for each further one; *step*, one evaluation of the model; and the *KV cache*, which
# keeps two vectors for every token and every layer, a key and a value, so that earlier tokens need not be
# computed again. **TBT** (time between tokens) is what others call a single gap between two tokens; our
# word for it is **ITL** (inter-token latency), and TPOT is its mean over one request.
#
# Guess before you measure. A prompt becomes eight times as long, from 128 to 1,024 tokens: how many times
# as long is TTFT? And eight requests decode together instead of one: how many times the TPOT?

# %%
lesson.predict("ttft_growth", None, unit="x")
lesson.predict("tpot_growth", None, unit="x")

# %% [markdown]
# ## The arithmetic
#
# A step does two things at once: it moves bytes and it computes. With $P$ weights of $b$ bits and $n$ new
# tokens in the step (of one prompt, or of $n$ decoding requests with one each):
#
# - it reads the weights once: $P b / 8$ bytes, whatever $n$ is;
# - it multiplies each weight with a number of each token and adds: $2 P n$ FLOPs.
#
# Their quotient is the **arithmetic intensity** of the step, in FLOPs per byte:
#
# $$I(n) = \frac{2 P n}{P b / 8} = \frac{16\, n}{b}$$
#
# The number of weights has gone. Intensity depends on how many tokens share a read and on the bits of a
# weight, on nothing else. A machine has such a quotient too: what it computes in a second over what it
# reads in a second, $F / B$. That is its **ridge point**. Work with less intensity than the ridge waits for
# memory (it is *memory bound* or *bandwidth bound*), work with more waits for arithmetic (*compute bound*).
# The two meet at
#
# $$n^{*} = \frac{b}{16} \cdot \frac{F}{B}$$
#
# tokens in a step. That single number decides which of the two problems you have.
#
# Attention adds its own part. Each new token is compared with every token before it, in each layer: with
# $H$ heads of $D$ numbers each, $L$ layers and $t$ tokens so far, $4 L H D\, t$ FLOPs (two products, two
# FLOPs for a multiply-add). For a prompt of $T$ tokens these add up to $2 L H D\, T^2$, so TTFT has a part
# that grows with the square. And decode must read the keys and values of the $t$ tokens: $t$ times the
# bytes that the cache keeps for a token.

# %%
llm = LLM("smollm2", device=lesson.device, max_num_seqs=16, max_model_len=lesson.pick(2200, 4200))
engine, config = llm.engine, llm.engine.model.config
limits = machine_limits() if on_cpu else measure_cuda()
predictor = Predictor.for_model(engine.model, engine.config, limits)
program = predictor.program
kv_token_bytes = engine.layout.num_bytes // (engine.layout.num_layers * engine.layout.num_slots)
cache_token_bytes = lesson.record("cache_token_bytes", kv_token_bytes * engine.layout.num_layers)
num_matrix_weights = sum(program.weights[w].num_elements for i in program.instructions for w in i.matrices)
weight_bytes = lesson.record("weight_bytes", program.weight_bytes())
lesson.record("weight_mb", weight_bytes / 1e6)
lesson.record("bits", 8 * weight_bytes / num_matrix_weights)
lesson.record("gb_s", limits.read_gb_s(weight_bytes))
lesson.record("int_gop_s", peak_of("Q4_1", limits))
lesson.record("fp32_gflop_s", limits.fp32_gflop_s)
lesson.record("ridge", lesson.values["int_gop_s"] / lesson.values["gb_s"])
lesson.record("critical", lesson.values["bits"] / 16 * lesson.values["ridge"])
lesson.record("same_flops_at", num_matrix_weights / (config.num_layers * config.num_heads * config.head_dim))
lesson.record("same_bytes_at", weight_bytes / cache_token_bytes)
lesson.say(
    """Put in numbers: {bits:.2f} bits for a weight; {gb_s:.1f} GB/s when as many bytes as the model
    has are read over and over; {int_gop_s:,.0f} GOP/s for the integer products that these weights
    are multiplied with (32-bit floating point: {fp32_gflop_s:,.0f}). So the ridge point is at
    {ridge:.0f} operations a byte, and

    - decode of one request ($n = 1$) has to wait for **memory**,
    - a prompt of more than about **{critical:.0f} tokens**, or as many requests together, has to
      wait for **arithmetic**;
    - attention's FLOPs of a prompt equal those of the weights at about {same_flops_at:,.0f} tokens;
      far below, TTFT is a straight line;
    - the cache keeps {cache_token_bytes:,} bytes for a token, so it is as large as the weights at
      {same_bytes_at:,.0f} tokens: only there does decode have twice the bytes to read."""
)

# %% [markdown]
# ## The real thing
#
# Where are the two phases in the engine? Nowhere. The scheduler knows only how many tokens of a request are
# computed, and how many it has; each step lets a request catch up. A prompt that has just arrived wants
# many tokens, a decoding request wants one. Requests that want one are served first, and prompts get what
# is left of the step's *budget* of tokens:

# %%
lesson.source(Scheduler._schedule_continuous)

# %% [markdown]
# So a phase is nothing but a *shape* of a step. The Program counts FLOPs and bytes for any shape,
# instruction by instruction:

# %%
lesson.source(Program.instruction_flops)

# %%
shapes = {
    "decode of 1, context 128": StepShape.decode(1, 128),
    "decode of 8, context 128": StepShape.decode(8, 128),
    "decode of 1, context 2,048": StepShape.decode(1, 2048),
    "prefill of 32": StepShape.prefill(32),
    "prefill of 512": StepShape.prefill(512),
}
rows = []
for name, shape in shapes.items():
    num_bytes, flops = program.bytes(shape, kv_token_bytes=kv_token_bytes), program.flops(shape)
    memory_s, compute_s = num_bytes / lesson.values["gb_s"] / 1e9, flops / lesson.values["int_gop_s"] / 1e9
    rows.append(
        {
            "step": name,
            "MB": num_bytes / 1e6,
            "GFLOP": flops / 1e9,
            "FLOPs a byte": flops / num_bytes,
            "memory ms": 1e3 * memory_s,
            "arithmetic ms": 1e3 * compute_s,
            "bound by": "memory" if memory_s > compute_s else "arithmetic",
        }
    )
lesson.table("shapes", rows, dict.fromkeys(rows[0], ".2f"))

# %% [markdown]
# Is the Program's count the formula? Exactly, with one thing that a formula with a single $P$ hides: the
# head, which gives the scores of all tokens of the vocabulary, is needed only where a token will be chosen,
# so a prompt needs it once. With $P_h$ weights in the head and $P_r$ in the rest, a prompt of $T$ tokens
# takes $2 P_r T + 2 P_h + 4 L H D\, T (T + 1) / 2$ FLOPs: token number $t$ sees $t$ tokens, itself
# included.

# %%
head = config.vocab_size * config.hidden_size
formula = 2 * (num_matrix_weights - head) * 512 + 2 * head
formula += 4 * config.num_layers * config.num_heads * config.head_dim * 512 * 513 // 2
lesson.claim(
    "flops-formula",
    "The FLOPs of a prompt are what the formula says (Program over formula, 512 tokens).",
    value=program.flops(StepShape.prefill(512)) / formula,
    claimed=(1, 1),
    band=(1, 1),
    unit="x",
)
lesson.claim(
    "cache-bytes",
    "The cache keeps two vectors for each key/value head and layer, in 16 bits (bytes per token"
    " over that formula).",
    value=cache_token_bytes / (2 * config.num_layers * config.num_kv_heads * config.head_dim * 2),
    claimed=(1, 1),
    band=(1, 1) if on_cpu else (0.5, 4),
    unit="x",
    because="this executor keeps them in another type",
)

# %%
lesson.record("prefill_tilt", rows[4]["arithmetic ms"] / rows[4]["memory ms"])
lesson.record("decode_tilt", rows[0]["memory ms"] / rows[0]["arithmetic ms"])
lesson.say(
    """(*MB* counts what goes through memory in the worst case: numbers between two instructions too,
    which the caches mostly hold. That is why long prompts have so many.) The prediction: prefill of
    512 needs {prefill_tilt:.1f} times as long for its arithmetic as for its bytes; decode of one
    needs {decode_tilt:.1f} times as long for its bytes as for its arithmetic."""
)
lesson.claim(
    "prefill-compute-bound",
    "Prefill is compute bound: at 512 tokens the arithmetic takes longer than the bytes.",
    value=lesson.values["prefill_tilt"],
    claimed=(1, None),
    band=(1, None) if on_cpu else (0.2, None),
    unit="x",
    because="counted as if no cache held anything between two instructions, the bytes take longer on "
    "this machine",
)
lesson.claim(
    "decode-bandwidth-bound",
    "Decode of one request is bandwidth bound: its bytes take longer than its arithmetic.",
    value=lesson.values["decode_tilt"],
    claimed=(1, None),
    band=(1.5, None),
    unit="x",
)

# %% [markdown]
# This is arithmetic about limits, and it could be wrong about an engine that reaches neither. So the claims
# need a test by experiment, and there is a simple one. *Change only the bytes*, or *only the tokens that
# share them*, and see which phase notices.
#
# ## Measurement
#
# ### TTFT against the length of the prompt
#
# `measure_prefill` sends a prompt of new random tokens to the idle engine and takes the time to the first
# output token.

# %%
prompts = lesson.pick((16, 64, 128, 256, 512, 1024), (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096))
repeats = lesson.pick(3, 7)
measure_prefill(engine, 512, repeats=2)  # warm up
ttft = {
    n: measure(lambda n=n: measure_prefill(engine, n, repeats=1), repeats=repeats, warmups=0) for n in prompts
}
rows = [
    {
        "prompt": n,
        "least ms": 1e3 * predictor.prefill_s(n),
        "TTFT ms": 1e3 * t,
        "low": 1e3 * t.low,
        "high": 1e3 * t.high,
        "ms a token": 1e3 * t / n,
        "GFLOP/s": program.flops(StepShape.prefill(n)) / t / 1e9,
        "weights GB/s": weight_bytes * math.ceil(n / 512) / t / 1e9,
    }
    for n, t in ttft.items()
]
lesson.table(
    "ttft",
    rows,
    {key: ".2f" for key in rows[0] if key != "prompt"} | {"GFLOP/s": ".0f", "weights GB/s": ".1f"},
)

# %% [markdown]
# Compare the last two columns with the limits above. Going down, GFLOP/s rises to its plateau: that is
# where the prompt is long enough to be compute bound. GB/s does the opposite: the same weights are read in
# more and more time.
# (At the bottom GFLOP/s falls again: attention's share of the FLOPs grows with the length, and it is done in
# floating point, slower than the matrices' integers.)
#
# ### TPOT against context and against the batch
#
# `measure_decode` lets some requests decode together and takes the median step. First one request with more
# and more context (tokens in its cache), then more and more requests.

# %%
contexts = lesson.pick((64, 512, 1024, 2048), (64, 256, 512, 1024, 2048, 4096))
batches = (1, 2, 4, 8, 16)
by_context = {
    c: measure(lambda c=c: measure_decode(engine, 1, c), repeats=repeats, warmups=0) for c in contexts
}
by_batch = {
    b: measure(lambda b=b: measure_decode(engine, b, 64), repeats=repeats, warmups=0) for b in batches
}
measured = [(1, c, t) for c, t in by_context.items()] + [(b, 64, t) for b, t in by_batch.items()]
rows = [
    {
        "requests": b,
        "context": c,
        "MB": program.bytes(StepShape.decode(b, c), kv_token_bytes=kv_token_bytes) / 1e6,
        "least ms": 1e3 * predictor.decode_s(b, c),
        "TPOT ms": 1e3 * t,
        "low": 1e3 * t.low,
        "high": 1e3 * t.high,
        "tok/s together": b / t,
        "GFLOP/s": program.flops(StepShape.decode(b, c)) / t / 1e9,
    }
    for b, c, t in measured
]
formats = {
    "MB": ".1f",
    "least ms": ".2f",
    "TPOT ms": ".2f",
    "low": ".2f",
    "high": ".2f",
    "tok/s together": ".0f",
    "GFLOP/s": ".0f",
}
lesson.table("tpot", rows, formats)

# %%
drawing, (left, middle, right) = figure("Two phases of one model", panels=3, size=(13.5, 4.2))
left.errorbar(
    list(ttft),
    [1e3 * t for t in ttft.values()],
    yerr=[[1e3 * (t - t.low) for t in ttft.values()], [1e3 * (t.high - t) for t in ttft.values()]],
    fmt="o-",
    label="measured",
)
left.plot(
    list(ttft), [1e3 * predictor.prefill_s(n) for n in ttft], "--", color="#6e7781", label="machine's limit"
)
left.set(title="TTFT", xlabel="tokens of the prompt", ylabel="ms", xscale="log", yscale="log")
middle.plot(list(by_context), [1e3 * t for t in by_context.values()], "o-", label="one request, by context")
middle.plot(
    list(by_context),
    [1e3 * predictor.decode_s(1, c) for c in by_context],
    "--",
    color="#6e7781",
    label="machine's limit",
)
middle.set(title="TPOT", xlabel="tokens of context", ylabel="ms", ylim=(0, None))
right.plot(
    list(by_batch), [1e3 * t for t in by_batch.values()], "o-", color="C1", label="context 64, by requests"
)
right.plot(
    list(by_batch),
    [1e3 * predictor.decode_s(b, 64) for b in by_batch],
    "--",
    color="#6e7781",
    label="machine's limit",
)
right.set(title="TPOT", xlabel="requests that decode together", ylabel="ms", ylim=(0, None))
for axes in (left, middle, right):
    _ = axes.legend()

# %%
lesson.record("ttft_growth", ttft[1024] / ttft[128])
lesson.record("tpot_growth", by_batch[8] / by_batch[1])
lesson.record("context_growth", by_context[2048] / by_context[64])
lesson.record("context_bytes_growth", 1 + (2048 - 64) * cache_token_bytes / weight_bytes)
lesson.record("batch_throughput", 8 / lesson.values["tpot_growth"])
lesson.say(
    """- Eight times the prompt took {ttft_growth:.1f} times as long.
    - Eight requests together instead of one: {tpot_growth:.1f} times the TPOT, so
      {batch_throughput:.1f} times the throughput.
    - A context of 2,048 instead of 64 tokens: {context_growth:.2f} times the TPOT; by bytes alone
      it would be {context_bytes_growth:.2f} times. What is more than that has one cause: keys and
      values come in small pieces from all over the cache, which memory does not give as fast as one
      long row of weights."""
)
lesson.claim(
    "ttft-exponent",
    "Attention makes the time of a prompt grow with the square of its length (exponent 2).",
    value=lambda: Figure(
        [
            math.log(growth, 4)
            for growth in ratio(
                lambda: measure_prefill(engine, 1024, repeats=1),
                lambda: measure_prefill(engine, 256, repeats=1),
                repeats=lesson.pick(5, 9),
            ).samples
        ]
    ),
    claimed=(1.8, 2.2),
    band=(0.7, 1.6) if on_cpu else (0, 2),
    because="up to about {same_flops_at:,.0f} tokens the matrices need more arithmetic than attention, "
    "and they grow with the length itself; the square is there, but it does not rule yet",
)
lesson.claim(
    "tpot-flat-in-context",
    "The time of an output token hardly depends on the context, because reading the weights is "
    "all that counts.",
    value=lambda: ratio(
        lambda: measure_decode(engine, 1, 2048),
        lambda: measure_decode(engine, 1, 64),
        repeats=lesson.pick(5, 9),
    ),
    claimed=(0.95, 1.1),
    band=(1.05, 5) if on_cpu else (0.8, 3),
    unit="x",
    because="at 2,048 tokens the cache is nearly half as large as the weights of so small a model, and "
    "it comes from memory more slowly than they do; for a model of 7 billion weights the same "
    "context would be a few percent of the bytes",
)

# %% [markdown]
# ### Both on one picture: the roofline
#
# A *roofline* plot has intensity to the right and speed upwards, both in logarithms. The roof is the
# machine: a slope where memory is the limit (speed = intensity × bandwidth), then flat at the arithmetic
# peak, with the ridge point between. Every step that we measured is a point below it.

# %%
drawing, axes = figure(
    "Roofline: steps that were measured", x="FLOPs per byte (weights and cache)", y="GFLOP/s"
)
grid = [2 ** (k / 8) for k in range(97)]
axes.plot(
    grid,
    [min(x * lesson.values["gb_s"], lesson.values["int_gop_s"]) for x in grid],
    "--",
    color="#6e7781",
    label="limit: integer products",
)
axes.plot(
    grid,
    [min(x * lesson.values["gb_s"], limits.fp32_gflop_s) for x in grid],
    ":",
    color="#6e7781",
    label="limit: 32-bit floating point",
)
read = lambda sequences: weight_bytes + cache_token_bytes * sum(c for _, c in sequences)  # noqa: E731
for label, color, steps in (
    ("prefill", "C0", [(StepShape.prefill(n), t) for n, t in ttft.items() if n <= 512]),
    ("decode, one request", "C2", [(StepShape.decode(1, c), t) for c, t in by_context.items()]),
    ("decode, 1 to 16 requests", "C1", [(StepShape.decode(b, 64), t) for b, t in by_batch.items()]),
):
    at = [
        (program.flops(shape) / read(shape.sequences), program.flops(shape) / t / 1e9) for shape, t in steps
    ]
    axes.plot(*zip(*at, strict=True), "o-", color=color, label=label)
axes.set(xscale="log", yscale="log")
_ = axes.legend(loc="lower right")

# %% [markdown]
# Decode with more requests and prefill with more tokens walk up the same slope: for the matrices there is
# no difference between sixteen tokens of one prompt and one token of sixteen requests. Only attention knows
# which tokens belong together.
#
# ### Optimise each alone
#
# **Experiment 1: change only the bytes.** The same values in 32-bit floating point are several times as
# many bytes. (They are also multiplied with another instruction, so prefill does notice; the question is
# who notices more.)

# %%
with LLM("smollm2", device=lesson.device, dtype="float32", max_num_seqs=2, max_model_len=600) as wide:
    decode_cost = ratio(
        lambda: measure_decode(wide.engine, 1, 64),
        lambda: measure_decode(engine, 1, 64),
        repeats=lesson.pick(5, 11),
    )
    prefill_cost = ratio(
        lambda: measure_prefill(wide.engine, 512, repeats=1),
        lambda: measure_prefill(engine, 512, repeats=1),
        repeats=lesson.pick(3, 7),
    )
lesson.record("decode_cost", decode_cost)
lesson.record("prefill_cost", prefill_cost)
lesson.record("bytes_ratio", 4 * num_matrix_weights / weight_bytes)
lesson.record("peak_ratio", lesson.values["int_gop_s"] / limits.fp32_gflop_s)
lesson.say(
    """With {bytes_ratio:.1f} times the bytes decode takes {decode_cost:.1f} times as long, prefill of
    512 tokens {prefill_cost:.1f} times. Decode follows the bytes; prefill follows the arithmetic,
    whose peak is {peak_ratio:.1f} times as high for integers."""
)
lesson.claim(
    "bytes-hurt-decode",
    "Fewer bytes per weight make decode faster, and do more for it than for prefill (cost of "
    "FP32 in decode over that in prefill).",
    value=decode_cost / prefill_cost,
    claimed=(1.2, None),
    band=(1.05, None) if on_cpu else (0.2, None),
    unit="x",
    because="on a GPU with a model as small as this neither phase waits for memory",
)

# %% [markdown]
# **Experiment 2: change only how many tokens of a prompt share a read.** `max_num_batched_tokens` is the
# budget of a step. With 16 instead of 512 a prompt is cut into chunks of 16, each with its own read of the
# weights. Decode does not notice: its steps had one token before and have one now.

# %%
with LLM(
    "smollm2", device=lesson.device, max_num_batched_tokens=16, max_num_seqs=2, max_model_len=600
) as small:
    prefill_chunked = ratio(
        lambda: measure_prefill(small.engine, 512, repeats=1),
        lambda: measure_prefill(engine, 512, repeats=1),
        repeats=lesson.pick(3, 7),
    )
    decode_chunked = ratio(
        lambda: measure_decode(small.engine, 1, 64),
        lambda: measure_decode(engine, 1, 64),
        repeats=lesson.pick(5, 11),
    )
lesson.record("prefill_chunked", prefill_chunked)
lesson.record("decode_chunked", decode_chunked)
lesson.record("side", "above" if lesson.values["critical"] < 16 else "below")
lesson.say(
    """Chunks of 16: TTFT of 512 tokens is {prefill_chunked:.2f} times as long, TPOT
    {decode_chunked:.2f} times. By the formula 16 tokens are {side} the {critical:.0f} at which
    arithmetic takes over, so a small chunk wastes little here; on a GPU, whose ridge is ten times
    as far to the right, the same budget would be a disaster for TTFT."""
)
lesson.claim(
    "chunk-leaves-decode",
    "The budget of a step changes prefill and leaves the decode of a single request as it is.",
    value=decode_chunked,
    claimed=(0.9, 1.1),
    band=(0.6, 1.6),
    unit="x",
    because="the two were measured on a machine that was not quiet; nothing in the steps differs",
)

# %% [markdown]
# ## Where it does not help
#
# Batching is the great lever of decode. It is none for prefill: prompts that are compute bound gain nothing
# from being computed together. Eight prompts of 128 tokens at once, against the same eight one after the
# other:

# %%
seeds = itertools.count()
eight = LatencyOptions(input_len=128, output_len=1, batch_size=8).workload()
alone = LatencyOptions(input_len=128, output_len=1, batch_size=1).workload()
lesson.claim(
    "prefill-batch-gain",
    "Batching makes prefill faster as it makes decode faster: eight prompts together have "
    "several times the throughput of one.",
    value=lambda: ratio(
        lambda: time_batch(engine, eight, next(seeds))["prefill_tok_s"][0],
        lambda: time_batch(engine, alone, next(seeds))["prefill_tok_s"][0],
        repeats=lesson.pick(5, 9),
    ),
    claimed=(3, 8),
    band=(0.5, 2) if on_cpu else (0.5, 9),
    unit="x",
    because="a single prompt of 128 tokens already has more tokens in a step than the {critical:.0f} at"
    " which arithmetic is the limit; seven more prompts add work and share nothing that was "
    "scarce",
)

# %% [markdown]
# And the lever of prefill is none for decode: faster arithmetic (more cores, wider vectors, a lower
# precision of activations) leaves a phase that waits for memory where it is. That is why "optimise
# inference" is not one task. Ask first which phase your requests spend their time in; the second exercise
# does that.
#
# The two also disturb each other. A step that computes 512 tokens of somebody's prompt takes many times as
# long as a decode step, and everybody who decodes in the same step waits for it: a gap in the middle of a
# sentence. The budget of a step is the compromise (*chunked prefill*): a smaller one means shorter gaps and
# a later first token. INF-30 measures it.
#
# ## Exercises

# %%
lesson.exercise("critical-tokens")

# %% [markdown]
# The same model, but its weights are stored in 16 bits and multiplied in 32-bit floating point. Use the
# limits of this machine: `lesson.values["gb_s"]` and `lesson.values["fp32_gflop_s"]`. With how many tokens
# in a step does it turn compute bound?

# %%
critical_tokens = ...
lesson.check("critical-tokens", critical_tokens)

# %% tags=["solution"]
# 2 FLOPs for each weight and token, 2 bytes for each weight: the intensity is the number of tokens itself.
critical_tokens = lesson.values["fp32_gflop_s"] / lesson.values["gb_s"]
lesson.check("critical-tokens", critical_tokens)

# %% tags=["wrong"]
lesson.refuses("critical-tokens", critical_tokens / 8)
lesson.refuses("critical-tokens", critical_tokens * 2)
lesson.refuses("critical-tokens", critical_tokens / 2)

# %%
lesson.exercise("prefill-share")

# %% [markdown]
# Two kinds of requests: a *summary* has a prompt of 1,024 tokens and an answer of 30, a *story* has a
# prompt of 64 and an answer of
# 600. Take TTFT from the first table (`lesson.tables["ttft"]`) and TPOT from the second
#      (`lesson.tables["tpot"]`: one request, context 512). Which share of its time does each spend in
#      prefill? Answer with a pair, `(summary, story)`, of numbers from 0 to 1.

# %%
prefill_share = ...
lesson.check("prefill-share", prefill_share)

# %% tags=["solution"]
first = {row["prompt"]: row["TTFT ms"] for row in lesson.tables["ttft"]}
gap = next(row["TPOT ms"] for row in lesson.tables["tpot"] if (row["requests"], row["context"]) == (1, 512))
prefill_share = (first[1024] / (first[1024] + 29 * gap), first[64] / (first[64] + 599 * gap))
print(f"summary {prefill_share[0]:.0%}, story {prefill_share[1]:.0%}")
lesson.check("prefill-share", prefill_share)

# %% tags=["wrong"]
lesson.refuses("prefill-share", (1 - prefill_share[0], 1 - prefill_share[1]))
lesson.refuses("prefill-share", (1024 / 1054, 64 / 664))
lesson.refuses("prefill-share", prefill_share[::-1])

# %%
lesson.exercise("half-more")

# %% [markdown]
# At which context does a decode step of one request read one and a half times the bytes of the weights? You
# know `lesson.values["weight_bytes"]`, and the shape of the model: 30 layers, 3 key/value heads of 64
# numbers each; a cached number takes two bytes.

# %%
half_more = ...
lesson.check("half-more", half_more)

# %% tags=["solution"]
bytes_per_token = 30 * 2 * 3 * 64 * 2  # layers, keys and values, heads, numbers of a head, bytes
half_more = 0.5 * lesson.values["weight_bytes"] / bytes_per_token
lesson.check("half-more", half_more)

# %% tags=["wrong"]
lesson.refuses("half-more", 2 * half_more)
lesson.refuses("half-more", 3 * half_more)
lesson.refuses("half-more", 30 * half_more)
lesson.refuses("half-more", half_more / 3)

# %%
llm.close()

# %% [markdown]
# ## The answer
#
# There is one formula and two ends of it. A step reads the weights once and computes as often as it has
# tokens. With one token it waits for memory: decode gets faster with fewer bytes and with more requests
# that share them. With many tokens it waits for arithmetic: prefill gets faster with faster arithmetic and
# with fewer tokens to compute, that is, with a prompt that was seen before (INF-33). Where the border lies
# is a property of the machine, and on two CPU cores it lies at far fewer tokens than on a GPU.

# %%
lesson.answer()

# %% [markdown]
# ## In production
#
# - **vLLM**: `--max-num-batched-tokens` is the budget of a step, chunked prefill is on by default;
#   `--max-num-seqs` bounds the requests that share a read. Large budgets favour TTFT and throughput, small
#   ones ITL.
# - **SGLang**: `--chunked-prefill-size`, and `--max-prefill-tokens`; `--disaggregation-mode prefill|decode`
#   runs the phases on different machines and sends the cache over the network.
# - **TensorRT-LLM**: context phase and generation phase have different attention kernels;
#   `--max_num_tokens` is the budget, and disaggregated serving is an option of `trtllm-serve`.
# - **llama.cpp**: `-b` and `-ub` (logical and physical batch) are the budget of prefill, 512 tokens in a
#   physical batch by default; `-t` and `-tb` set threads for decode and for prefill apart, since the two
#   saturate at different numbers.
# - Hardware is sold by the same two numbers: HBM bandwidth decides decode, TFLOP/s decide prefill.

# %% [markdown]
# ## Reading list
#
# - Agrawal et al., *Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve* (OSDI 2024):
#   chunked prefill, and TBT.
# - Zhong et al., *DistServe* (OSDI 2024), and Patel et al., *Splitwise* (ISCA 2024): one phase a machine.
# - Williams, Waterman, Patterson, *Roofline* (2009).
# - Yuan et al., *LLM Inference Unveiled: Survey and Roofline Model Insights* (2024), arXiv 2402.16363.
# - `docs/predictions.md` in this repository: how well such arithmetic predicts this engine, model by model.
