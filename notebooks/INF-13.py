# %% [markdown]
# ## The question
#
# PyTorch runs a model *eagerly*: Python calls one operation after the other, each finds its kernel, reads its
# inputs from memory, writes its output to memory. A decode step of our model is some five hundred such calls.
# `torch.compile` looks at all of them together, turns them into one graph, and generates new kernels for it.
# "Free" speed, people say: 1.2 to 1.5 times as fast with one line.
#
# What can a compiler save here, what can it not touch, and when have the seconds that it needs been earned
# back?
#
# Your prediction: how many times as fast as eager is one decode step when compiled, for a small model on this
# machine's CPU?

# %%
import math
import os
import tempfile
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's recorder is quiet
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # nothing compiled before may help
import torch
from torch._dynamo.utils import counters

from ridgeline import LLM, SamplingParams
from ridgeline.course import Lesson, figure, measure, ratio
from ridgeline.engine.executors.compiled import CompiledExecutor
from ridgeline.models.decoder import record_decoder
from ridgeline.models.synth import synthesize
from ridgeline.profiling.breakdown import break_down
from ridgeline.profiling.measured import measure_decode, measure_prefill
from ridgeline.profiling.trace import record_requests

lesson = Lesson("INF-13")

# %%
lesson.predict("compile_speedup", None, unit="x")

# %% [markdown]
# ## The arithmetic
#
# ### What a compiler can save
#
# Two things. The **calls**: Python, and torch's search for the right kernel, some microseconds an operation
# whatever its size. And **passes over memory**: operations on single elements (add, multiply, a norm's
# scaling) each read a whole vector and write a whole one. In one generated kernel, a chain of them reads once
# and writes once, and what lies between stays in registers. This is **fusion**.
#
# What it cannot save: the matrix products. They come from a library that is close to the limits of the
# machine, and a compiled graph on a CPU calls the same library.
#
# So let $f$ be the share of a step's time in what the compiler can improve, and $s$ the factor by which it
# does. Then (Amdahl's law) the step becomes
#
# $$ S = \frac{1}{(1 - f) + f/s} \;\le\; \frac{1}{1-f} $$
#
# times as fast. Let us measure $1-f$ for the real model: run it eagerly under the profiler, and add up the
# time in matrix products and attention.

# %%
with LLM(
    "smollm2", executor="eager", dtype="float32", num_threads=1, max_num_seqs=8, max_model_len=128
) as llm:
    recorded = record_requests(llm.engine, prompt_len=64, output_len=9, batch_size=1)
phases = {phase: break_down(recorded, phase, None) for phase in ("prefill", "decode")}


def fixed_share(phase):
    kept = (row for row in phases[phase].rows if "mm" in row.op or "dot_product" in row.op)
    return sum(row.seconds for row in kept) / phases[phase].wall_s


lesson.table(
    "eager, op by op",
    [
        {
            "phase": phase,
            "op": row.op,
            "calls a step": row.calls / phases[phase].num_steps,
            "ms a step": 1e3 * row.seconds / phases[phase].num_steps,
            "of the step [%]": 100 * row.seconds / phases[phase].wall_s,
        }
        for phase in phases
        for row in phases[phase].rows[:6]
    ],
    {"calls a step": ".0f", "ms a step": ".2f", "of the step [%]": ".1f"},
)
lesson.record("num_calls", sum(row.calls for row in phases["decode"].rows) / phases["decode"].num_steps)
for phase in phases:
    lesson.record(f"fixed_{phase}", 100 * fixed_share(phase))
    lesson.record(f"amdahl_{phase}", 1 / fixed_share(phase))
lesson.say("""
Matrix products and attention take {fixed_decode:.0f} % of a decode step and {fixed_prefill:.0f} % of prefill.
If a compiler made everything else vanish ({num_calls:,.0f} calls a step, counting those inside of others),
decode would be **{amdahl_decode:.2f} times** as fast at most, and prefill {amdahl_prefill:.2f} times. (The
profiler slows small operations down, so these limits are rather too high.)
""")

# %% [markdown]
# ### When it pays back
#
# Compiling takes $C$ seconds. If a step then takes $t_c$ instead of $t_e$, it has paid back after
#
# $$ N = \frac{C}{t_e - t_c} $$
#
# steps. With $t_e$ of 40 ms, a gain of 1.3 and $C$ of 50 s that is over 5,000 steps. If $t_c \ge t_e$, never.
#
# ### Passes over memory
#
# Take `((x * 2 + 1) * 3 - x) * x + 0.5` on a long vector. Eagerly these are six operations; four read one
# vector and two read two, and each writes one: 8 + 6 = 14 passes. Fused, it is one read and one write. If
# memory decides, fusion gains **7 times** here. Remember this number.
#
# ## The real thing
#
# ### Dynamo: from Python to a graph
#
# `torch.compile(f)` has two halves. **Dynamo** runs Python's bytecode of `f` with symbols instead of tensors
# and writes down which torch operations happen: a graph. With it go **guards**, everything that was assumed:
# types, shapes, the values of Python variables. **Inductor** turns the graph into C++ (or Triton) and
# compiles that. Later calls check the guards and run the result.
#
# Two things go wrong. If the code asks for a *value* ("is the sum positive?"), there is no way to know while
# tracing. The graph ends, Python decides, a second graph begins: a **graph break**. Nothing is fused across
# it.


# %%
def branch(x):
    return x * 2 if x.sum() > 0 else x - 1


explained = torch._dynamo.explain(branch)(torch.ones(3))
print(
    f"{explained.graph_count} graphs, {explained.graph_break_count} break: "
    f"{explained.break_reasons[0].reason}"
)

# %% [markdown]
# And if a guard fails, everything is compiled again: a **recompile**. Watch the number of graphs while a
# function sees one length after the other.

# %%
counters.clear()
total = torch.compile(
    lambda x: x.square().sum(), backend="eager"
)  # this backend skips Inductor: only Dynamo is shown
lengths, num_graphs = (5, 6, 7, 8, 1), []
for length in lengths:
    total(torch.ones(length, 4))
    num_graphs.append(counters["stats"]["unique_graphs"])
lesson.table(
    "recompiles",
    [{"length": n, "graphs so far": count} for n, count in zip(lengths, num_graphs, strict=True)],
)

# %% [markdown]
# The first length is taken for a constant. The second shows that it varies, and a graph for any length is
# made. All others reuse it, **except 1** (and 0): Dynamo always treats these as constants, because so much
# code behaves differently for them.
#
# An LLM engine has another number of tokens in every step, and 1 is the most frequent of them. This is how
# the engine keeps one graph: lengths that vary are *marked* as such from the beginning, everything else is
# padded to a fixed size, and one token is padded to two.

# %%
lesson.source(CompiledExecutor.forward)

# %% [markdown]
# Attention and the write to the KV cache are not in the graph: their loops depend on the values of tables
# (which blocks? how long?), which would break it. They are declared as **custom ops**, boxes that Dynamo does
# not open. (`fullgraph=True` makes any break an error.)
#
# ## Measurement
#
# Compiling the real model takes most of a minute, so we compile seeded models of the same architecture with a
# few small layers, and take the real one from a committed measurement. One thread throughout.

# %%
folder = Path(tempfile.mkdtemp())
options = {
    "num_threads": 1,
    "max_num_seqs": 8,
    "max_model_len": 256,
    "kv_cache_tokens": 2048,
    "enable_prefix_caching": False,
}
torch.compile(lambda x: x + 1)(torch.ones(8))  # the first one builds headers for all: not counted
compile_s = {}
for num_layers in lesson.pick((1, 2), (1, 4, 8, 2)):
    torch._dynamo.reset()
    path = synthesize("tiny-llama", "F32", path=folder / f"{num_layers}.gguf", num_layers=num_layers)
    compiled = LLM(str(path), executor="compiled", device=lesson.device, dtype="float32", **options)
    measure_decode(compiled.engine, 1, 16, steps=2)
    compile_s[num_layers] = compiled.engine.executor.compile_stats().compile_s
eager = LLM(str(path), executor="eager", device=lesson.device, dtype="float32", **options)
native = LLM(str(path), executor="native", kv_cache_dtype="float32", **options)
ladder = lesson.committed("docs/results/ladder.json")
steps = {step["rung"]["name"]: step for step in ladder["details"]["steps"]}
lesson.record("ladder_date", ladder["created"][:10])
lesson.record("ladder_warm_up_s", steps["torch.compile"]["measured"]["warm_up_s"])
lesson.table(
    "compile time",
    [{"model": f"{n} small layers", "seconds": s, "measured": "now"} for n, s in sorted(compile_s.items())]
    + [
        {
            "model": "SmolLM2, 30 layers",
            "seconds": lesson.values["ladder_warm_up_s"],
            "measured": lesson.values["ladder_date"],
        }
    ],
    {"seconds": ".1f"},
)
lesson.say(
    "The last line is the warm-up of `docs/results/ladder.json`, made by `ridgeline ladder -m smollm2` on "
    "two threads."
)

# %% [markdown]
# ### One graph, the same tokens
#
# Batches and prompts of many sizes through the compiled engine; then Dynamo's own counters, and the tokens
# beside eager's.

# %%
for num_requests in (1, 3, 8):
    measure_decode(compiled.engine, num_requests, 20 + 7 * num_requests, steps=3)
prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (2, 5, 40, 200)]
greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
tokens = {
    llm: [token for output in llm.generate(prompts, greedy) for token in output.outputs[0].token_ids]
    for llm in (eager, compiled)
}
stats = compiled.engine.executor.compile_stats()
lesson.claim(
    "one-graph",
    "The whole decoder step is one graph",
    value=stats.num_graphs,
    claimed=(1, 1),
    band=(1, 1),
    unit="graph",
)
lesson.claim(
    "no-recompiles",
    "No graph breaks and no recompiles over batches of 1 to 8 and prompts of 2 to 200 tokens",
    value=stats.num_graph_breaks + stats.num_recompiles,
    claimed=(0, 0),
    band=(0, 0),
)
same = sum(a == b for a, b in zip(tokens[eager], tokens[compiled], strict=True)) / len(tokens[eager])
lesson.claim(
    "same-tokens",
    "Compiled and eager give the same greedy tokens (share; rounding may differ)",
    value=same,
    claimed=(0.9, 1),
    band=(0.9, 1),
)

# %% [markdown]
# ### Speed


# %%
def decode(llm, num_requests=1):
    return lambda: measure_decode(llm.engine, num_requests, 32, steps=16)


def prefill(llm):
    return lambda: measure_prefill(llm.engine, 200, repeats=3)


repeats = lesson.pick(5, 15)
work = {
    "decode, 1 request": decode,
    "decode, 8 requests": lambda llm: decode(llm, 8),
    "prefill, 200 tokens": prefill,
}
seconds = {
    name: {
        n: measure(of(llm), repeats=3)
        for n, llm in (("eager", eager), ("compiled", compiled), ("native", native))
    }
    for name, of in work.items()
}


def shown(gain):
    return f"{gain:.2f} ({gain.low:.2f} to {gain.high:.2f})"


gains = {name: ratio(of(eager), of(compiled), repeats=repeats) for name, of in work.items()}
lesson.table(
    "two small layers",
    [
        {
            "work": name,
            **{f"{n} [ms]": 1e3 * s for n, s in seconds[name].items()},
            "compiled: times as fast as eager": shown(gains[name]),
        }
        for name in work
    ],
    {f"{n} [ms]": ".3f" for n in ("eager", "compiled", "native")},
)
lesson.claim(
    "compile-speedup",
    "torch.compile makes inference 1.2 to 1.5 times as fast (two small layers, decode of one request)",
    value=lambda: ratio(decode(eager), decode(compiled), repeats=repeats),
    claimed=(1.2, 1.5),
    band=(0.3, 2.5),
    unit="x",
    because="what a step spends its time on is outside of what is compiled: attention and the cache's "
    "bookkeeping are boxes that the compiler "
    "does not open, and one row is computed as two",
)
real = steps["torch.compile"]["speed_up"]
lesson.record(
    "real_ttft", steps["torch.compile"]["measured"]["ttft_s"] / steps["flash attention"]["measured"]["ttft_s"]
)
lesson.claim(
    "real-model",
    "torch.compile makes the real model 1.2 to 1.5 times as fast (committed: the ladder's workload, 30 "
    "layers)",
    value=real,
    claimed=(1.2, 1.5),
    band=(0.3, 1.1),
    unit="x",
    because="matrix products and attention are nearly all of its time, and the compiled graph runs the same "
    "products in shapes that the library is slower in; its time to the first token was {real_ttft:.1f} "
    "times eager's",
)

# %% [markdown]
# ### Does it pay back?
#
# Time until $N$ tokens are there, starting from a loaded model: a straight line for each executor, the
# compiled one beginning late.

# %%
one = {n: float(s) for n, s in seconds["decode, 1 request"].items()}
head_start = {"eager": 0.0, "compiled": compile_s[2], "native": 0.0}
ns = [1, 10, 100, 1000, 10_000, 100_000]
drawing, (payback_plot, layers_plot) = figure("What compiling costs", panels=2)
for name in one:
    payback_plot.loglog(ns, [head_start[name] + n * one[name] for n in ns], "o-", label=name)
payback_plot.set(
    title="time until N tokens are there (two small layers)", xlabel="tokens N", ylabel="seconds"
)
payback_plot.legend()
layers_plot.plot(
    sorted(compile_s), [compile_s[n] for n in sorted(compile_s)], "o-", label="small layers, now"
)
layers_plot.plot([30], [lesson.values["ladder_warm_up_s"]], "s", color="C5", label="SmolLM2, committed")
layers_plot.set(title="compile time", xlabel="layers", ylabel="seconds", ylim=(0, None))
_ = layers_plot.legend()

# %%
lesson.record("compile_seconds", compile_s[2])
lesson.claim(
    "payback",
    "Compiling pays back within the first hundred steps (eager steps that fit into the compile time)",
    value=compile_s[2] / one["eager"],
    claimed=(0, 100),
    band=(200, None) if lesson.device == "cpu" else (10, None),
    unit="steps",
    because="eager has done {payback:,.0f} steps by the time that the compiled model does its first, and "
    "gains on it, if at all, by a part of a step each",
)

# %% [markdown]
# ### Where the compiler is right: fusion
#
# The chain of the arithmetic above, on a vector that no cache holds. Prediction: at most 7 times.

# %%
torch.set_num_threads(1)
x = torch.rand(lesson.pick(8, 32) * 2**20)


def chain(x):
    return ((x * 2 + 1) * 3 - x) * x + 0.5


def running(function):
    def work():
        function(x)

    return work


fused = torch.compile(chain)
equal = torch.allclose(fused(x), chain(x))
lesson.record("equal", str(equal))
lesson.claim(
    "fusion",
    "Fusing a chain of elementwise operations saves passes over memory: 7 times by the count of passes",
    value=lambda: ratio(running(chain), running(fused), repeats=7),
    claimed=(2, 8),
    band=(1.5, 14),
    unit="x",
    because="new memory for every result costs more than a pass",
)

# %% [markdown]
# So the compiler does what it promises. The promise is about elementwise chains on large tensors. In a decode
# step, an elementwise operation touches one row of a few hundred numbers, which never leaves the nearest
# cache; and the big tensors, the weights, are each touched by exactly one operation.
#
# ### The other answer: record the program once
#
# The native executor has no compiler. It runs the *same* Python decoder once with symbols, as Dynamo does,
# but with the engine's own fifteen operations instead of torch's thousands, and gets a flat list of
# instructions: the **Program**. C++ kernels written by hand replay it, with one call from Python a step. Some
# neighbours are joined by hand-written rules (`ridgeline kernels explain` lists them).


# %%
def record():
    described = native.engine.model  # shapes and formats, no values
    record_decoder(described.config, described.weights, max_model_len=256)


record_s = measure(record)
program = native.engine.executor.program
print("\n".join(line[:120] for line in program.text().splitlines()[:8]))
lesson.record("record_ms", 1e3 * record_s)
lesson.record("num_instructions", len(program.instructions))
lesson.say("""
Recorded in **{record_ms:.2f} ms**; {num_instructions} instructions after fusion.
""")
lesson.claim(
    "native",
    "The recorded Program is faster than eager as well (two small layers, decode of one request)",
    value=lambda: ratio(decode(eager), decode(native), repeats=repeats),
    claimed=(1.2, None),
    band=(2, None),
    unit="x",
)
lesson.claim(
    "record-time",
    "Recording costs less than compiling (compile time over recording time)",
    value=compile_s[2] / record_s,
    claimed=(10, None),
    band=(100, None),
    unit="x",
)
for llm in (eager, compiled, native):
    llm.close()

# %% [markdown]
# For small models nearly all of a step is calls, and one call instead of hundreds is the whole gain. A
# compiler takes the same calls away in principle; what is left in its case are the boxes, which are Python.
# The price of the other answer is paid by people: each operation, format and instruction set has a kernel
# that somebody wrote and tested, and a new architecture may need a new one. A compiler asks for none of that.
#
# ## Where it does not help
#
# - **When the time is in libraries**: matrix products on a CPU. See $1/(1-f)$ above: measure $f$ before you
#   compile.
# - **When shapes change** and nobody marked them: every recompile is another wait, in the middle of serving.
# - **When the process is short**: a test, a script, a function that scales to zero. (Inductor keeps what it
#   compiled on disk; a second start is faster, not free. We switched that off.)
# - **When code asks for values**: each `.item()`, each `if` on a tensor is a graph break.
#
# ## Exercises

# %%
lesson.exercise("payback")

# %% [markdown]
# Write a function of the seconds that compiling takes, of an eager step and of a compiled step, which gives
# the number of steps after which compiling has paid back. Where it never does, give `math.inf`.

# %%
payback = ...  # for example: lambda compile_s, eager_s, compiled_s: ...
lesson.check("payback", payback)


# %% tags=["solution"]
def payback(compile_s, eager_s, compiled_s):
    saved_s = eager_s - compiled_s
    return math.ceil(compile_s / saved_s) if saved_s > 0 else math.inf


lesson.check("payback", payback)

# %% tags=["wrong"]
lesson.refuses("payback", lambda compile_s, eager_s, compiled_s: compile_s / eager_s)
lesson.refuses("payback", lambda compile_s, eager_s, compiled_s: compile_s / compiled_s)
lesson.refuses("payback", lambda compile_s, eager_s, compiled_s: compile_s / (eager_s - compiled_s + 1e-9))

# %%
lesson.exercise("limit")

# %% [markdown]
# A profile says that 30 % of a step are elementwise operations, the rest are matrix products. The compiler
# makes the elementwise part four times as fast. How many times as fast is the step?

# %%
limit = ...
lesson.check("limit", limit)

# %% tags=["solution"]
limit = 1 / (0.7 + 0.3 / 4)
lesson.check("limit", limit)

# %% tags=["wrong"]
lesson.refuses("limit", 1 / 0.7)
lesson.refuses("limit", 0.7 + 0.3 * 4)
lesson.refuses("limit", 0.7 + 0.3 / 4)

# %% [markdown]
# ## The answer

# %%
lesson.say("""
A compiler saves calls and passes over memory, and nothing in matrix products. Compiled without a single graph
break or recompile, a small model decodes **{compile_speedup:.2f} times** as fast as eager here, after
{compile_seconds:.0f} s of compiling; a fused elementwise chain gains {fusion:.1f} times; the recorded Program
{native:.1f} times, after {record_ms:.2f} ms.
""")
lesson.answer()

# %% [markdown]
# ## In production
#
# - On **GPUs** the balance is another one: a kernel takes microseconds to launch and a decode step may have
#   hundreds, so that calls alone can be half of the time. There `mode="reduce-overhead"` records the launches
#   as a *CUDA graph* and replays them with one call: our Program, by other means. That is where 1.2 to 1.5
#   times comes from.
# - **vLLM** compiles by default and cuts the graph at attention ("piecewise"), with CUDA graphs for each
#   piece and batch size: `-O0` to `-O3`, `--compilation-config`, `--enforce-eager` for none. Compiled code is
#   kept under `~/.cache/vllm`.
# - **SGLang**: `--enable-torch-compile`, `--torch-compile-max-bs`; CUDA graphs by default
#   (`--cuda-graph-max-bs`, `--disable-cuda-graph`).
# - **Transformers**: `model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)`
#   with a `StaticCache`.
# - **TensorRT-LLM** built an engine ahead of time for a range of shapes; **llama.cpp** builds its own graph
#   (`ggml_cgraph`) for each step and runs hand-written kernels, as we do.
# - **Ridgeline**: `executor="eager"`, `"compiled"`, `"native"`; `compile_stats()`; `fusion="none"` to see
#   what the fusion rules give.
#
# ## Reading list
#
# - Ansel et al. 2024, [PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and
#   Graph Compilation](https://doi.org/10.1145/3620665.3640366): Dynamo and Inductor by their authors.
# - [The documentation of torch.compile](https://docs.pytorch.org/docs/stable/torch.compiler.html): graph
#   breaks, guards, dynamic shapes.
# - PyTorch team 2023, [Accelerating Generative AI with PyTorch II: GPT,
#   Fast](https://pytorch.org/blog/accelerating-generative-ai-2/): where compile gains, on a GPU.
# - Amdahl 1967, [Validity of the single processor approach](https://doi.org/10.1145/1465482.1465560): the
#   formula.
