# %%
import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is loaded: its recorder writes to stderr

from ridgeline import LLM
from ridgeline.course import Lesson, figure, ratio
from ridgeline.profiling import trace as tracing
from ridgeline.profiling.breakdown import break_down
from ridgeline.profiling.findings import find
from ridgeline.profiling.machine import machine_limits
from ridgeline.profiling.measured import measure_decode
from ridgeline.profiling.trace import record_requests, trace

lesson = Lesson("INF-01")

# %% [markdown]
# ## The question
#
# INF-00 found that a decode step takes longer than the memory needs to deliver the weights. Where does the
# rest go? Nearly everybody has an answer ready before looking. "Python is slow." "Attention is quadratic."
# "The sampling." To *profile* is to look: to write down, while the program runs, which part of it runs
# when, and for how long.
#
# A few words. An **op** (operation) is one piece of work on whole arrays, such as a matrix product. A
# **trace** is the list of ops with their beginnings and ends. The **forward pass** is the part of a step
# that evaluates the model; before and after it the engine decides what to compute, chooses the token from
# the scores (*sampling*) and turns it into text. An **executor** is the part of the engine that runs the
# forward pass, and this notebook compares two of them: **eager** calls PyTorch op by op; **native** hands
# the whole recorded list of ops to C++ in one call.
#
# Bet on a suspect before you look. Which share of a decode step, from 0 to 1, does attention take in the
# native executor, for a text of about a hundred tokens? And which share passes outside the forward pass, in
# the Python parts of the engine?

# %%
lesson.predict("attention_share", None)
lesson.predict("outside_share", None)

# %% [markdown]
# ## The arithmetic
#
# What *should* take the time? In a decode step of one request each matrix is multiplied with one vector:
# every weight is read, and used for one multiplication and one addition. (The parts of a layer, *attention*
# with its queries, keys, values and heads, and the *MLP*, are explained in INF-00.) So count the bytes of
# each kind of op and divide by the bandwidth. For a layer with $C$ numbers per token (the hidden size), $F$
# in the middle of the MLP, $H$ query heads and $G$ key/value heads of $D$ numbers:
#
# - attention's own matrices: $2 \cdot C H D + 2 \cdot C G D$ weights;
# - the MLP: $3 \cdot C F$ weights;
# - attention itself: it reads the keys and values of $t$ tokens, $2 \cdot G D\, t$ numbers;
# - norms, additions, activations: a few times $C$ or $F$ numbers, thousands against millions.
#
# And once for the whole model, the *head*: one row of $C$ weights for each token of the vocabulary.

# %%
native = LLM("smollm2", max_num_seqs=2, max_model_len=2200)
limits = machine_limits()
c = native.engine.model.config
program = native.engine.executor.program
kv_token_bytes = native.engine.layout.num_bytes // (
    native.engine.layout.num_layers * native.engine.layout.num_slots
)
context = 100
linears = [program.weights[w] for i in program.instructions for w in i.matrices]
mlp = ("gate_proj", "up_proj", "down_proj")
mlp_bytes = sum(w.num_bytes for w in linears if any(part in w.name for part in mlp))
head_bytes = sum(w.num_bytes for w in linears if w.shape[0] == c.vocab_size)
linear_bytes = sum(w.num_bytes for w in linears)
cache_bytes = kv_token_bytes * c.num_layers * context
counted = {
    "matrices of attention": linear_bytes - mlp_bytes - head_bytes,
    "matrices of the MLP": mlp_bytes,
    "the head": head_bytes,
    "attention itself, 100 tokens": cache_bytes,
}
gb_s = lesson.record("gb_s", limits.read_gb_s(linear_bytes))
lesson.table(
    "expected",
    [
        {"part": part, "MB": size / 1e6, "least ms": size / gb_s / 1e6, "share": size / sum(counted.values())}
        for part, size in counted.items()
    ],
    {"MB": ".2f", "least ms": ".3f", "share": ".1%"},
)
lesson.record("expected_attention", cache_bytes / sum(counted.values()))
lesson.record("expected_ms", sum(counted.values()) / gb_s / 1e6)
lesson.record("wide_ms", 4 * sum(w.num_elements for w in linears) / limits.dram_gb_s / 1e6)
lesson.say(
    """Memory delivers {gb_s:.1f} GB/s for so many bytes, so a step takes {expected_ms:.2f} ms at
    least, and attention itself should be {expected_attention:.1%} of it. The eager executor has the
    same weights as 32-bit numbers: {wide_ms:.1f} ms at least."""
)

# %% [markdown]
# ## The real thing
#
# A profiler must not change what it measures, and code that is full of timers is hard to read. So the
# engine has none. `trace` wraps the methods of *one* engine while it records, and takes the wrappers away
# afterwards:

# %%
lesson.source(tracing.trace)

# %% [markdown]
# For the eager executor it switches on **torch.profiler**, PyTorch's own recorder of ops, which you would
# use on any PyTorch program:

# %%
lesson.source(tracing._torch_profiler)

# %% [markdown]
# In the native executor the C++ side writes down the beginning and the end of each instruction for each
# thread. In both cases the result is the same `Trace`, and `Trace.save` writes a file that
# https://ui.perfetto.dev shows as a timeline.
#
# ## Measurement
#
# ### First look: eager
#
# `record_requests` serves a request of random tokens, once to warm up and once for the record; `break_down`
# adds the ops up by name. For each op it takes its *self time*: without the time of ops that it called
# itself, otherwise much would count twice.

# %%
eager = LLM("smollm2", executor="eager", device=lesson.device, max_num_seqs=2, max_model_len=512)
recorded = record_requests(eager.engine, prompt_len=96, output_len=lesson.pick(6, 24))
slow = break_down(recorded, "decode", None)
lesson.table(
    "eager",
    [
        {
            "op": row.op,
            "calls a step": row.calls / slow.num_steps,
            "ms a step": 1e3 * row.seconds / slow.num_steps,
            "share": row.share,
        }
        for row in slow.rows[:10]
    ],
    {"calls a step": ".0f", "ms a step": ".3f", "share": ".1%"},
)

# %%
products = sum(row.seconds for row in slow.rows if "mm" in row.op)
num_calls = sum(row.calls for row in slow.rows)
lesson.record("eager_calls", num_calls / slow.num_steps)
lesson.record("eager_ms", 1e3 * slow.wall_s / slow.num_steps)
lesson.record("eager_products", products / slow.wall_s)
lesson.record("eager_products_ms", 1e3 * products / slow.num_steps)
lesson.record("eager_gb_s", 4 * sum(w.num_elements for w in linears) * slow.num_steps / products / 1e9)
lesson.record("dram_gb_s", limits.dram_gb_s)
lesson.say(
    """A step makes {eager_calls:,.0f} calls and took {eager_ms:.1f} ms while it was recorded;
    {eager_products_ms:.1f} ms of that, {eager_products:.0%}, are matrix products. Their weights are
    4 bytes each, so they came at {eager_gb_s:.1f} GB/s, where this machine can read
    {dram_gb_s:.1f}."""
)
lesson.claim(
    "eager-overhead",
    "In eager mode most of a decode step is overhead of Python and the framework, not matrix products.",
    value=1 - products / slow.wall_s,
    claimed=(0.5, 1),
    band=(0.03, 0.97),
    unit="of the step",
    because="on a CPU the products of one step read half a gigabyte as FP32 and take "
    "{eager_products_ms:.0f} ms, so there is much to hide the calls behind. The sentence is "
    "true of GPUs, where the same products take well under a millisecond",
)

# %% [markdown]
# ### A profiler is part of the experiment
#
# Before you believe that table: recording costs time too, and it costs it *for each call*. So the many
# small calls look worse than they are. We measure decode steps recorded and not recorded, in turns, for
# both executors.


# %%
def recorded_decode(engine):
    with trace(engine):
        return measure_decode(engine, 1, 96, steps=2)


lesson.claim(
    "profiling-is-free",
    "Profiling hardly changes what it measures (time of an eager step with torch.profiler over without).",
    value=lambda: ratio(
        lambda: recorded_decode(eager.engine),
        lambda: measure_decode(eager.engine, 1, 96, steps=2),
        repeats=lesson.pick(2, 7),
        warmups=0,
    ),
    claimed=(0.97, 1.05),
    band=(0.8, 4),
    unit="x",
    because="every one of {eager_calls:,.0f} calls a step is written down with its name, its times and "
    "its parent",
)
lesson.claim(
    "native-profiling",
    "The timeline of the native executor costs at most a tenth of a step.",
    value=lambda: ratio(
        lambda: recorded_decode(native.engine),
        lambda: measure_decode(native.engine, 1, 96, steps=2),
        repeats=lesson.pick(9, 21),
    ),
    claimed=(0.9, 1.1),
    band=(0.6, 1.8),
    unit="x",
    because="steps as short as these differ by as much from one moment to the next on a machine that "
    "others use too",
)

# %% [markdown]
# ### Second look: native
#
# One line for each kind of op. *MB* and *FLOPs* are counted by the Program for the steps that were
# recorded, the time is measured, and *of the limit* is the larger of two shares: of the bandwidth of this
# machine for as many bytes, or of its arithmetic peak for that format.

# %%
recorded = record_requests(native.engine, prompt_len=96, output_len=lesson.pick(24, 64))
decode, prefill = break_down(recorded, "decode", limits), break_down(recorded, "prefill", limits)
rows = [
    {
        "op": row.op,
        "calls a step": row.calls // decode.num_steps,
        "MB": row.num_bytes / decode.num_steps / 1e6,
        "ms": 1e3 * row.seconds / decode.num_steps,
        "share": row.share,
        "GB/s": row.gb_s,
        "GFLOP/s": row.gflop_s,
        "of the limit": row.limit_share or 0.0,
        "bound by": row.bound or "-",
    }
    for row in decode.rows
]
formats = {"MB": ".2f", "ms": ".3f", "share": ".1%", "GB/s": ".1f", "GFLOP/s": ".1f", "of the limit": ".0%"}
lesson.table("native", rows, formats)

# %% [markdown]
# Does the table account for everything? Its bytes must add up to what the Program counts for the same steps
# as a whole, exactly. (If they did not, an op would have been lost or counted twice, and every share would
# be wrong.)

# %%
steps = [step for step in recorded.steps if step.phase == "decode"]
whole = sum(program.bytes(step.shape, kv_token_bytes=kv_token_bytes) for step in steps)
lesson.claim(
    "accounting",
    "The breakdown accounts for every byte: its rows add up to the Program's own count.",
    value=decode.num_bytes / whole,
    claimed=(1, 1),
    band=(1, 1),
    unit="x",
)
attention_s = sum(row.seconds for row in decode.rows if row.op == "attention")
linears_s = sum(row.seconds for row in decode.rows if row.op.startswith("linear"))
lesson.claim(
    "attention-share",
    "Attention is what a decode step spends its time on.",
    value=attention_s / decode.wall_s,
    claimed=(0.5, 1),
    band=(0.005, 0.4),
    unit="of the step",
    because="at a hundred tokens its keys and values are {expected_attention:.1%} of the bytes; nearly "
    "all of the rest are weights of matrices",
)
lesson.claim(
    "outside-share",
    "An engine written in Python loses most of its time in Python (time outside the forward pass).",
    value=decode.outside_s / decode.wall_s,
    claimed=(0.5, 1),
    band=(0.005, 0.45),
    unit="of the step",
    because="Python makes one call for the whole forward pass, and what it does around it does not grow"
    " with the model",
)
lesson.claim(
    "matrix-share",
    "Multiplying matrices with a vector is what a decode step spends its time on.",
    value=linears_s / decode.wall_s,
    claimed=(0.6, 1),
    band=(0.4, 0.99),
    unit="of the step",
)

# %%
lesson.record(
    "linear_gb_s", sum(r.num_bytes for r in decode.rows if r.op.startswith("linear")) / linears_s / 1e9
)
lesson.record("limit_gb_s", limits.read_gb_s(decode.num_bytes / decode.num_steps))
lesson.record("ms_step", 1e3 * decode.wall_s / decode.num_steps)
lesson.record("ms_outside", 1e3 * decode.outside_s / decode.num_steps)
lesson.record("ms_attention", 1e3 * attention_s / decode.num_steps)
lesson.say(
    """So the guess "attention" is wrong here, and so is "Python". The bottleneck is plain reading:
    matrices, at {linear_gb_s:.1f} GB/s where the machine reads as many bytes at {limit_gb_s:.1f}.
    Of {ms_step:.2f} ms, {ms_attention:.2f} are attention and {ms_outside:.2f} are spent outside the
    forward pass.

    Attention takes more than its bytes would say ({expected_attention:.1%} expected,
    {attention_share:.1%} measured): it is many small pieces of work for every head, with an
    exponential for each score, and starting both threads costs the same for a small op as for a
    large one."""
)
for finding in find(decode, limits) + find(prefill, limits):
    print("-", finding.text)

# %% [markdown]
# The lines above are the engine's own findings (`ridgeline profile` prints them too): a handful of rules
# over the same numbers.
#
# ### Busy is not the same as useful
#
# `top` shows a process with two busy threads as 200 %. Here is the time that the threads were busy, beside
# the share of the arithmetic peak that they reached (people call that **MFU**, model FLOPs utilization):

# %%
peak = limits.int8_gop_s
lesson.table(
    "utilization",
    [
        {
            "phase": b.phase,
            "threads busy": sum(t.busy_s for t in b.threads) / len(b.threads) / b.forward_s,
            "of the bandwidth": b.num_bytes / b.ops_s / 1e9 / limits.read_gb_s(b.num_bytes / b.num_steps),
            "of the arithmetic peak": b.flops / b.ops_s / 1e9 / peak,
        }
        for b in (decode, prefill)
    ],
    {"threads busy": ".0%", "of the bandwidth": ".0%", "of the arithmetic peak": ".1%"},
)
lesson.record("busy", sum(t.busy_s for t in decode.threads) / len(decode.threads) / decode.forward_s)
lesson.claim(
    "busy-is-computing",
    "A processor that is fully busy is computing near its peak (MFU of decode).",
    value=decode.flops / decode.ops_s / 1e9 / peak,
    claimed=(0.5, 1),
    band=(0.005, 0.4),
    unit="of the peak",
    because="a thread that waits for a byte from memory counts as busy ({busy:.0%} here): the operating"
    " system sees only that it has not given the core back",
)

# %% [markdown]
# ### When attention does become the bottleneck
#
# The same profile with more and more text. By bytes, attention's share is $t \cdot k / (t \cdot k + W)$
# with $k$ bytes of cache per token and $W$ bytes of weights.

# %%
lengths = lesson.pick((64, 512, 1500), (64, 256, 512, 1000, 1500, 2100))
rows, breakdowns = [], {}
for length in lengths:
    b = breakdowns[length] = break_down(
        record_requests(native.engine, prompt_len=length, output_len=10), "decode", limits
    )
    read = kv_token_bytes * c.num_layers * length
    seconds = sum(row.seconds for row in b.rows if row.op == "attention")
    rows.append(
        {
            "context": length,
            "share by bytes": read / (read + linear_bytes),
            "share measured": seconds / b.wall_s,
            "attention ms": 1e3 * seconds / b.num_steps,
            "GB/s of the cache": read * b.num_steps / seconds / 1e9,
            "step ms": 1e3 * b.wall_s / b.num_steps,
        }
    )
formats = {
    "share by bytes": ".1%",
    "share measured": ".1%",
    "attention ms": ".2f",
    "GB/s of the cache": ".1f",
    "step ms": ".2f",
}
lesson.table("contexts", rows, formats)
lesson.record("long_share", rows[-1]["share measured"])
lesson.record("long_context", lengths[-1])
lesson.say(
    """At {long_context:,} tokens attention is {long_share:.0%} of the step: the suspect was not
    innocent, only early. A profile is true of the workload that was profiled, and of no other."""
)

# %%
drawing, (left, right) = figure("Where the time of a decode step goes", panels=2, size=(12, 4.2))
bottom = [0.0] * len(lengths)
parts = {
    "matrices": [
        sum(r.seconds for r in b.rows if r.op.startswith("linear")) / b.num_steps for b in breakdowns.values()
    ],
    "attention": [
        sum(r.seconds for r in b.rows if r.op == "attention") / b.num_steps for b in breakdowns.values()
    ],
    "other ops": [
        sum(r.seconds for r in b.rows if r.op != "attention" and not r.op.startswith("linear")) / b.num_steps
        for b in breakdowns.values()
    ],
    "between ops": [(b.forward_s - b.ops_s) / b.num_steps for b in breakdowns.values()],
    "outside the forward pass": [b.outside_s / b.num_steps for b in breakdowns.values()],
}
for part, heights in parts.items():
    left.bar([f"{n:,}" for n in lengths], [1e3 * h for h in heights], bottom=bottom, label=part, width=0.6)
    bottom = [low + 1e3 * h for low, h in zip(bottom, heights, strict=True)]
left.set(title="native, by context", xlabel="tokens in the cache", ylabel="ms a step")
left.set_ylim(0, 1.3 * max(bottom))
_ = left.legend()
largest = [row for row in lesson.tables["native"] if row["share"] > 0.01][::-1]
right.barh([row["op"] for row in largest], [row["GB/s"] for row in largest], color="C0")
_ = right.axvline(lesson.values["limit_gb_s"], color="#6e7781", ls="--", lw=1)
_ = right.set(title="bytes a second of each op (dashed: the machine's limit)", xlabel="GB/s")

# %% [markdown]
# ### Act on it, and check
#
# A profile is a hypothesis: *the time is in reading the weights*. Then fewer bytes must help, and a faster
# language must not help much. Two changes, one at a time, measured in turns: from PyTorch to C++ with the
# *same* 4 bytes for a weight; then from 4 bytes to the file's format with the same C++.

# %%
wide = LLM("smollm2", dtype="float32", max_num_seqs=2, max_model_len=256)
language = ratio(
    lambda: measure_decode(eager.engine, 1, 64, steps=8),
    lambda: measure_decode(wide.engine, 1, 64),
    repeats=lesson.pick(3, 9),
)
fewer_bytes = ratio(
    lambda: measure_decode(wide.engine, 1, 64),
    lambda: measure_decode(native.engine, 1, 64),
    repeats=lesson.pick(5, 9),
)
lesson.record("language", language)
lesson.record("fewer_bytes", fewer_bytes)
lesson.record("bytes_ratio", 4 * sum(w.num_elements for w in linears) / linear_bytes)
lesson.record("amdahl", 1 / lesson.values["eager_products"])
lesson.say(
    """- From eager to native with the same bytes: **{language:.1f} times** as fast. By the recorded
      step it could be at most {amdahl:.1f} times if only the products were left and they stayed as
      they are (and the record makes small calls look longer than they are). C++ takes away the
      calls, not the reading.
    - From 4 bytes to the file's format: **{fewer_bytes:.1f} times** as fast, with {bytes_ratio:.1f}
      times fewer bytes. It is more than the bytes alone, because so many bytes come at
      {dram_gb_s:.1f} GB/s and the fewer ones at {gb_s:.1f}: caches hold a part of them."""
)
lesson.claim(
    "bytes-beat-language",
    "Once the forward pass is one call, what is left to win is bytes: fewer of them make decode"
    " more than twice as fast.",
    value=fewer_bytes,
    claimed=(2, None),
    band=(1.3, None),
    unit="x",
    because="a machine with fast memory and slow arithmetic does not wait for the bytes as long",
)
eager.close()
wide.close()

# %% [markdown]
# ## Where it does not help
#
# - **A profile by op cannot see what is missing.** Time *between* ops and outside the forward pass has no
#   row of its own; it shows only if you subtract. The bars above do that.
# - **Shares say where time goes, not what can be won.** If an op takes the share $a$ and is made $s$ times
#   as fast, the whole becomes $1 / (1 - a + a / s)$ times as fast (*Amdahl's law*): for a small $a$ next to
#   nothing, even if $s$ is infinite. And an op at its limit cannot be made faster at all, however large its
#   share: the largest bar is not always the one to work on.
# - **A recorded program is a slower program**, as measured above for torch.profiler. Record to find
#   *where*, measure without recording to say *how much*.
# - **One step is not a distribution.** Rare slow steps (a prompt of somebody else, a page fault, another
#   process) vanish in sums; for those look at percentiles (INF-03) and at the timeline.
#
# ## Exercises

# %%
lesson.exercise("amdahl")

# %% [markdown]
# Somebody offers you an attention kernel that takes no time at all. By what factor would a decode step at
# about a hundred tokens become faster? The share of attention is `lesson.values["attention_share"]`.

# %%
amdahl = ...
lesson.check("amdahl", amdahl)

# %% tags=["solution"]
amdahl = 1 / (1 - lesson.values["attention_share"])
lesson.check("amdahl", amdahl)

# %% tags=["wrong"]
lesson.refuses("amdahl", 1 / lesson.values["attention_share"])
lesson.refuses("amdahl", lesson.values["attention_share"])
lesson.refuses("amdahl", 10 * amdahl)

# %%
lesson.exercise("achieved")

# %% [markdown]
# At how many GB/s did the matrices come, all together? Use the rows of `lesson.tables["native"]` whose `op`
# begins with `linear`: they have `MB` and `ms`, both for one step.

# %%
achieved = ...
lesson.check("achieved", achieved)

# %% tags=["solution"]
matrices = [row for row in lesson.tables["native"] if row["op"].startswith("linear")]
achieved = sum(row["MB"] for row in matrices) / sum(row["ms"] for row in matrices)
lesson.check("achieved", achieved)

# %% tags=["wrong"]
lesson.refuses("achieved", 1000 * achieved)
lesson.refuses("achieved", achieved / 8)
lesson.refuses("achieved", sum(row["GB/s"] for row in matrices))

# %%
lesson.exercise("work-on")

# %% [markdown]
# Which op of `lesson.tables["native"]` would you work on? The one where the most time could be saved: if an
# op reached its limit fully it would take `ms` × `of the limit`, so it has `ms` × (1 − `of the limit`) to
# give. Answer with the text in its column `op`.

# %%
work_on = ...
lesson.check("work-on", work_on)

# %% tags=["solution"]
work_on = max(lesson.tables["native"], key=lambda row: row["ms"] * (1 - row["of the limit"]))["op"]
print(work_on)
lesson.check("work-on", work_on)

# %% tags=["wrong"]
lesson.refuses("work-on", "python")
lesson.refuses(
    "work-on", min(lesson.tables["native"], key=lambda row: row["ms"] * (1 - row["of the limit"]))["op"]
)

# %%
native.close()

# %% [markdown]
# ## The answer
#
# The time of a token goes where its bytes are: to the matrices. Attention and Python are small at a hundred
# tokens, and you know that because you looked, with shares, rates and limits beside each other. A wrong
# guess costs nothing if it is tested by a measurement, and weeks if it is not.

# %%
lesson.answer()

# %% [markdown]
# ## In production
#
# - **vLLM**: `vllm serve --profiler-config '{"profiler": "torch", "torch_profiler_dir": "..."}'` (older:
#   `VLLM_TORCH_PROFILER_DIR`), then `/start_profile` and `/stop_profile`; `vllm bench latency --profile`.
#   CUDA graphs replay a recorded step in one launch: the GPU's answer to the overhead that the first table
#   showed.
# - **SGLang**: `/start_profile`, `SGLANG_TORCH_PROFILER_DIR`, `python -m sglang.profiler`.
# - **llama.cpp**: `--perf` prints times of prefill and decode; `llama-bench` without a profiler; Linux
#   `perf record` for kernels.
# - **TensorRT-LLM**: Nsight Systems (`nsys profile`), with `TLLM_PROFILE_START_STOP` to record some
#   iterations only.
# - On GPUs *Nsight Systems* shows the timeline (is the GPU waiting for the host?), *Nsight Compute* the
#   roofline of one kernel. `nvidia-smi`'s utilization is like `top`: it says that some kernel was running,
#   not that it did anything useful.

# %% [markdown]
# ## Reading list
#
# - Williams, Waterman, Patterson, *Roofline: An Insightful Visual Performance Model* (2009).
# - Horace He, *Making Deep Learning Go Brrrr From First Principles* (2022): compute, memory, overhead.
# - Brendan Gregg, *Systems Performance* (2nd ed., 2020), chapter 6: what CPU utilization does not say.
# - Mytkowicz et al., *Producing Wrong Data Without Doing Anything Obviously Wrong!* (ASPLOS 2009).
# - PyTorch, *torch.profiler* (docs.pytorch.org), and https://ui.perfetto.dev for the timeline.
