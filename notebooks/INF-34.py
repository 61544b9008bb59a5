# %% [markdown]
# ## The question
#
# One device is too small, or too slow. You buy a second one. What do you do with it?
#
# - **Copy** the model: each device serves half of the requests. Nothing needs to be said between them. Each
#   copy is called a **replica**.
# - **Tensor parallelism** (TP) splits every matrix: each device has half of the rows or columns, and both
#   work on the same token at the same time. They must add up their halves several times in each layer.
# - **Pipeline parallelism** (PP) splits the layers: the first device has the first half, hands its result
#   to the second, and turns to the next request meanwhile. Each part of the pipeline is called a **stage**.
#
# What works on a part of the model is called a **rank**: one process with one device. What ranks tell each
# other is the price of splitting, and the subject of this notebook: count it, predict what it costs,
# measure it, and then decide.
#
# We have no two GPUs here, but we have two CPU cores. A rank can be a process with one core. That is a real
# parallel engine: the same cuts, the same sums over ranks, the same tokens. The link between the ranks is
# memory that both processes see. For GPUs we calculate.
#
# Your predictions: one user, one answer being written. How many times as fast is the model on two ranks of
# one core each as on one core, with TP, and with PP?

# %%
from ridgeline import LLM, SamplingParams
from ridgeline.bench.drive import drive
from ridgeline.bench.simulate import simulate
from ridgeline.bench.throughput import samples_of
from ridgeline.bench.workload import AtOnce, Fixed, Gamma, LogNormal, Uniform, Workload
from ridgeline.config import EngineConfig, ParallelConfig
from ridgeline.course import Lesson, figure, measure, ratio
from ridgeline.models.decoder import decoder
from ridgeline.models.load import describe_model
from ridgeline.models.locate import locate_model
from ridgeline.models.shard import plan_cuts
from ridgeline.models.synth import describe_preset
from ridgeline.profiling.links import LINKS, Link, describe_link, measure_link
from ridgeline.profiling.machine import describe_device
from ridgeline.profiling.parallel import ParallelPredictor
from ridgeline.profiling.roofline import Predictor

lesson = Lesson("INF-34")
lesson.predict("tp_one_stream", None, unit="x")
lesson.predict("pp_one_stream", None, unit="x")

# %% [markdown]
# ## The arithmetic
#
# ### Tensor parallelism: two sums a layer
#
# A matrix product can be split in two ways. Let $y = W x$.
#
# - By **rows** of $W$ (numbers of $y$): each rank computes its own part of $y$ from all of $x$. Nothing is
#   exchanged. (Megatron calls this *column-parallel*, because it writes $xW$.)
# - By **columns** of $W$ (numbers of $x$): each rank has a part of $x$ and computes a $y$ of full length,
#   which is only a part of the sum. The parts must be added over the ranks. This is an **all-reduce**:
#   everybody gets the sum.
#
# The trick is to do the first and then the second. Attention: the matrices of queries, keys and values are
# split by rows, so each rank has some of the heads and computes their attention alone; the output matrix is
# split by columns; then one all-reduce. MLP: gate and up by rows, down by columns, one all-reduce. So a
# layer needs **two** all-reduces of one activation, $C$ numbers for each token, where $C$ is the
# `hidden_size`. Two more exchanges come from splitting the vocabulary: one all-reduce after the embedding
# (a token's row is on one rank), and one **all-gather** of the logits (each rank computes some of the $V$
# logits; now all are put side by side). With $n$ layers and $b$ bytes a number:
#
# $$\text{bytes per token (TP)} = (2 n + 1) \, C \, b + V b$$
#
# ### Pipeline parallelism: one message a stage
#
# Between two stages goes one activation for each token: $C\,b$ bytes. That is hundreds of times less. But a
# single token must pass the stages one after the other: while stage 2 works, stage 1 has nothing to do for
# this request. With one stream two stages are as fast as one device, at best. Only several requests keep
# all stages busy.
#
# ### What an exchange takes
#
# A message of $m$ bytes over a link takes $\lambda + m / w$: a **latency** $\lambda$, however short it is,
# and its bytes over the bandwidth $w$. In decode the messages are short (a few KB), and there are many, so
# latency decides. In prefill there are as many messages, each longer by the number of tokens, so bandwidth
# decides.
#
# For $N$ ranks in a **ring**, where everybody passes pieces to a neighbour, an all-reduce takes $2(N-1)$
# messages of $m/N$ bytes:

# %%
lesson.source(Link.seconds)

# %% [markdown]
# The data sheets that we calculate with (the latencies are typical values for a small message with its
# software, assumed and not measured here):

# %%
lesson.table(
    "links",
    [
        {"link": link.name, "latency, µs": 1e6 * link.latency_s, "GB/s, one way": link.gb_s}
        for link in LINKS.values()
    ],
    {"latency, µs": ".0f", "GB/s, one way": ".4g"},
)

# %% [markdown]
# ### With numbers
#
# Our model: 30 layers, $C$ = 576, $V$ = 49,152, and activations in float32, $b$ = 4.

# %%
model = describe_model(locate_model("smollm2"))
shape = model.config
per_token = (2 * shape.num_layers + 1) * shape.hidden_size * 4
per_logits = shape.vocab_size * 4
lesson.record("tp_activations", per_token)
lesson.record("tp_logits", per_logits)
lesson.record("pp_bytes", shape.hidden_size * 4)
lesson.record("pp_less", (per_token + per_logits) / (shape.hidden_size * 4))
lesson.say("""
TP: 61 · 576 · 4 = {tp_activations:,} bytes a token, and {tp_logits:,} more for each token whose logits are
wanted. PP over two stages: {pp_bytes:,} bytes a token, {pp_less:.0f} times less.
""")

# %% [markdown]
# And the time? With TP each rank reads half of the weights, so a step takes half as long, plus its
# exchanges:
#
# $$t_\text{TP} = \frac{t_1}{2} + 61\,(\lambda + m/w) + \text{logits}$$
#
# We can measure the link before we run any model: two processes that add up vectors in shared memory. And
# $t_1$, the step of one core. That gives the prediction.

# %%
link = measure_link(2)
limits = {"max_model_len": 512, "max_num_seqs": 16, "kv_cache_tokens": 8192, "enable_prefix_caching": False}
settings = {
    "1 core": {"num_threads": 1},
    "2 cores, 1 process": {"num_threads": 2},
    "TP=2": {"num_threads": 1, "tp_size": 2},
    "PP=2": {"num_threads": 1, "pp_size": 2},
}
engines = {name: LLM("smollm2", executor="native", **limits, **more) for name, more in settings.items()}
prompt = {"prompt_token_ids": list(range(1000, 1032))}
stream_params = SamplingParams(temperature=0, max_tokens=lesson.pick(40, 128), ignore_eos=True)


def stream(name):
    metrics = engines[name].generate([prompt], stream_params)[0].metrics
    return (stream_params.max_tokens - 1) / (metrics.finished_time - metrics.first_token_time)


one_core_s = 1 / measure(lambda: stream("1 core"), repeats=3)
exchange_s = 61 * (link.latency_s + 576 * 4 / link.gb_s / 1e9) + link.latency_s + per_logits / link.gb_s / 1e9
lesson.record("latency_us", 1e6 * link.latency_s)
lesson.record("link_gb_s", link.gb_s)
lesson.record("one_core_ms", 1000 * one_core_s)
lesson.record("exchange_ms", 1000 * exchange_s)
lesson.record("tp_predicted", one_core_s / (one_core_s / 2 + exchange_s))
lesson.say("""
Shared memory here: {latency_us:.1f} µs and {link_gb_s:.1f} GB/s. A token on one core takes
{one_core_ms:.2f} ms; the exchanges of a token {exchange_ms:.2f} ms. So TP=2 should be **{tp_predicted:.2f}
times** as fast as one core, if the two cores do not disturb each other. PP=2, with a single stream: 1.0
times, at best.
""")

# %% [markdown]
# ## The real thing
#
# ### Where the exchanges are
#
# There is one description of the model in this engine, and it is the same for one device and for many. A
# rank runs it on its own part (`shard`) of the weights:

# %%
lesson.source(decoder)

# %% [markdown]
# `_sum_over_ranks` is an all-reduce where there are several TP ranks, and nothing otherwise; you find it
# twice in the loop. A stage that is not the last has no `lm_head`: it sends its activation and is done. A
# stage that is not the first gets its input in `_stage_input` by receiving.
#
# Because this description is recorded as a list of instructions (a *Program*, [INF-13](INF-13.ipynb)), the
# exchanges are instructions too, and their bytes are known before anything runs.
#
# ### Where the model is cut

# %%
cuts = plan_cuts(model, ParallelConfig(tp_size=2))
lesson.table(
    "cuts",
    [
        {
            "rank": rank,
            "query heads": len(cuts.heads[rank]),
            "KV heads": len(cuts.kv_heads[rank]),
            "columns of the MLP": len(cuts.mlp_columns[rank]),
            "rows of the vocabulary": len(cuts.vocabulary[rank]),
        }
        for rank in range(2)
    ],
)

# %% [markdown]
# Three KV heads cannot be halved: one rank gets two of them (with their six query heads), the other one.
# The second rank will wait for the first in every layer. Real models have 8 KV heads for this reason, and
# are served on 2, 4 or 8 devices.
#
# ### The same tokens
#
# A sum over two ranks adds the same numbers in another order, and rounding depends on the order. In float32
# the difference is in the last digits; a token changes only if two of them were equally likely to that
# precision. So we compare: eight prompts, one process against TP=2 and PP=2, everything in float32.

# %%
questions = [{"prompt_token_ids": list(range(2000 + 40 * i, 2020 + 43 * i))} for i in range(8)]
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def tokens_of(llm):
    return [output.outputs[0].token_ids for output in llm.generate(questions, params)]


exact = {}
for name in ("1 core", "TP=2", "PP=2"):
    options = {"dtype": "float32", "kv_cache_dtype": "float32"} | limits | settings[name]
    with LLM("smollm2", executor="native", **options) as llm:
        exact[name] = tokens_of(llm)
packed = {name: tokens_of(engines[name]) for name in ("1 core", "TP=2", "PP=2")}


def num_different(found, name):
    return sum(a != b for a, b in zip(found["1 core"], found[name], strict=True))


# %%
lesson.claim(
    "tokens-float32",
    "Splitting a model changes no token: of 8 float32 answers, those that differ, TP=2 and PP=2 together",
    value=num_different(exact, "TP=2") + num_different(exact, "PP=2"),
    claimed=(0, 0),
    band=(0, 0),
)
lesson.claim(
    "tokens-pp",
    "PP changes no token, whatever the format: of 8 answers with quantized inputs, those that differ",
    value=num_different(packed, "PP=2"),
    claimed=(0, 0),
    band=(0, 0),
)
lesson.claim(
    "tokens-tp-quantized",
    "TP changes no token, whatever the format: of 8 answers with quantized inputs, those that differ",
    value=num_different(packed, "TP=2"),
    claimed=(0, 0),
    band=(0, 8),
    because="the inputs of matrices are rounded to 8 bits here; a sum whose last digit differs rounds to "
    "another code now and then, which is a far larger difference than the one it came from, and it "
    "spreads",
)

# %% [markdown]
# PP never adds in another order, so it is exact. TP in float32 gives the same tokens in practice. With
# quantized inputs an answer may part at a place where the model hesitates between two words;
# docs/parallel.md lists the margins of such places for twenty prompts. Neither answer is worse than the
# other.
#
# ## Measurement
#
# ### Bytes
#
# One prompt of 32 tokens, and an answer. The engine computes all prompt tokens and all but the last token
# of the answer, and wants logits once for each token of the answer. What do the counters of rank 0 say?


# %%
def traffic(name):
    return engines[name].engine.executor.communication()[0]


def sent_by(name):
    before = {op: t.num_bytes for op, t in traffic(name).items()}
    stream(name)
    return {op: t.num_bytes - before.get(op, 0) for op, t in traffic(name).items()}


counted = {name: sum(sent_by(name).values()) for name in ("TP=2", "PP=2")}
computed = 32 + stream_params.max_tokens - 1
foretold = {
    "TP=2": computed * per_token + stream_params.max_tokens * per_logits,
    "PP=2": computed * shape.hidden_size * 4,
}
lesson.table(
    "bytes",
    [
        {"ranks": name, "predicted, bytes": f"{foretold[name]:,}", "counted, bytes": f"{counted[name]:,}"}
        for name in counted
    ],
)
lesson.claim(
    "bytes",
    "The bytes that ranks exchange follow from the config: counted minus predicted, TP=2 and PP=2 together",
    value=sum(abs(counted[name] - foretold[name]) for name in counted),
    claimed=(0, 0),
    band=(0, 0),
    unit="bytes",
)

# %% [markdown]
# ### Speed of one stream
#
# In turns, as always: each ratio compares runs that were made one after the other.

# %%
repeats = lesson.pick(4, 10)
lesson.claim(
    "tp-one-stream",
    "With TP two devices write one answer nearly twice as fast as one (one core each)",
    value=lambda: ratio(lambda: stream("TP=2"), lambda: stream("1 core"), repeats=repeats),
    claimed=(1.7, 2.0),
    band=(0.4, 2.3),
    unit="x",
    because="the arithmetic said {tp_predicted:.2f} for cores that do not disturb each other; these share "
    "one memory, and one rank has two of the three KV heads while the other waits",
)
lesson.claim(
    "pp-one-stream",
    "With PP two devices write one answer faster than one",
    value=lambda: ratio(lambda: stream("PP=2"), lambda: stream("1 core"), repeats=repeats),
    claimed=(1.2, 2.0),
    band=(0.3, 1.25),
    unit="x",
    because="a token passes the stages one after the other, and at each moment one of them waits",
)

# %% [markdown]
# ### Throughput of many
#
# Now sixteen requests at once. PP can deal them out to two plans, one in each stage.

# %%
many = Workload(
    name="many", num_requests=16, prompt_lens=Uniform(16, 64), output_lens=Fixed(lesson.pick(24, 64))
)
requests = many.requests(vocab_size=shape.vocab_size, seed=0)


def tokens_per_s(name):
    return samples_of(drive(engines[name].engine, requests))["output_throughput"][0]


rounds = lesson.pick(3, 7)
figures = {name: measure(lambda name=name: stream(name), repeats=rounds) for name in engines}
loads = {name: measure(lambda name=name: tokens_per_s(name), repeats=rounds) for name in engines}
lesson.table(
    "speed",
    [
        {
            "engine": name,
            "one stream, tok/s": figures[name],
            "16 requests, tok/s": loads[name],
            "spread": f"{loads[name].low:.0f} to {loads[name].high:.0f}",
        }
        for name in engines
    ],
    {"one stream, tok/s": ".0f", "16 requests, tok/s": ".0f"},
)

# %%
drawing, panels = figure("Two cores, four ways", y="tok/s", panels=2, size=(10.4, 3.6))
for axes, (title, of) in zip(panels, (("one stream", figures), ("16 requests", loads)), strict=True):
    errors = [[v - v.low for v in of.values()], [v.high - v for v in of.values()]]
    axes.bar(list(of), list(of.values()), yerr=errors, color=["C5", "C2", "C0", "C1"], width=0.6)
    axes.axhline(2 * of["1 core"], color="C5", linestyle="--", linewidth=1.2)
    axes.annotate("twice one core", (-0.4, 2 * of["1 core"]), va="bottom", fontsize=8, color="C5")
    axes.set_title(title)
    axes.tick_params(axis="x", labelsize=8)

# %%
lesson.claim(
    "split-one-machine",
    "Splitting a model is faster, also where it fits one machine: TP=2 against two threads, 16 requests",
    value=lambda: ratio(
        lambda: tokens_per_s("TP=2"), lambda: tokens_per_s("2 cores, 1 process"), repeats=rounds
    ),
    claimed=(1.1, 2.0),
    band=(0.4, 1.5),
    unit="x",
    because="two threads of one process share the work of each instruction and exchange nothing; two ranks "
    "do the same work and talk as well",
)
for llm in engines.values():
    llm.close()
committed = lesson.committed("docs/results/parallel.json")["speed"]["ratios"]
lesson.record("kept_w3", committed["TP=2 w3"]["ratio"])
lesson.record("kept_pp", committed["PP=2 w3"]["ratio"])
lesson.say("""
The committed measurement with longer runs (docs/results/parallel.json, made by `scripts/check_parallel.py`
on 2026-11-25) says the same: {kept_w3:.2f} of two threads' throughput for TP=2 and {kept_pp:.2f} for PP=2.
""")

# %% [markdown]
# So on one CPU splitting is for learning, and for nothing else. It becomes useful when the second rank
# brings what the first one lacks: memory of its own, and bandwidth of its own.
#
# ### GPUs, by arithmetic
#
# `ParallelPredictor` does the arithmetic of the beginning for every instruction: bytes over bandwidth,
# operations over peak, and the exchanges over the link. The model: the shape of Llama 3.1 70B in BF16, 141
# GB of weights, on H100s with 80 GB. One device cannot hold it; we calculate it nevertheless, as the base
# line.

# %%
h100 = describe_device("h100")
llama_8b = describe_preset("llama-8b", "BF16")
sizes = {"num_layers": 80, "hidden_size": 8192, "intermediate_size": 28_672, "num_heads": 64}
llama_70b = describe_preset("llama-8b", "BF16", **sizes)
room = {"executor": "native", "max_model_len": 4096, "kv_cache_tokens": 400_000, "max_num_seqs": 128}
room |= {"max_num_batched_tokens": 2048, "enable_prefix_caching": False}


def predictor_of(model, tp_size, link, pp_size=1):
    config = EngineConfig.from_options("described", tp_size=tp_size, pp_size=pp_size, **room)
    if tp_size * pp_size == 1:
        return Predictor.for_model(model, config, h100)
    return ParallelPredictor(model, config, h100, None, describe_link(link))


ranks = (1, 2, 4, 8)
gpu = {
    link: [predictor_of(llama_70b, n, link).decode_s(1, 1024) for n in ranks]
    for link in ("nvlink", "pcie5", "ethernet100", "ethernet10")
}
lesson.table(
    "gpu",
    [
        {"link": LINKS[link].name} | {f"{n} H100": 1000 * s for n, s in zip(ranks, seconds, strict=True)}
        for link, seconds in gpu.items()
    ],
    {f"{n} H100": ".1f" for n in ranks},
)

# %% [markdown]
# (Milliseconds for one token of one stream, context 1,024.)

# %%
drawing, axes = figure("One token of a 70B model, tensor parallel", x="H100s", y="ms a token")
for link, seconds in gpu.items():
    axes.plot(ranks, [1000 * s for s in seconds], "o-", label=LINKS[link].name)
axes.plot(ranks, [1000 * gpu["nvlink"][0] / n for n in ranks], "--", color="C5", label="perfect")
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(ranks, [str(n) for n in ranks])
_ = axes.legend()

# %%
lesson.record("messages", 161 * 14)
lesson.claim(
    "tp8",
    "Eight GPUs with TP are nearly eight times as fast as one (70B, one stream, NVLink, calculated)",
    value=gpu["nvlink"][0] / gpu["nvlink"][3],
    claimed=(6, 8),
    band=(2.6, 3.2),
    unit="x",
    because="an all-reduce over a ring of 8 is 14 messages, so a token needs {messages:,} of them one "
    "after the other; at 4 µs each they take longer than reading an eighth of the weights",
)
lesson.claim(
    "slow-link",
    "TP over a network makes one answer faster (70B on 8 H100s, Ethernet with 10 Gbit/s)",
    value=gpu["ethernet10"][0] / gpu["ethernet10"][3],
    claimed=(1.1, 8),
    band=(0.3, 0.8),
    unit="x",
    because="over this link the messages alone take longer than one device takes for everything",
)

# %% [markdown]
# A ring is what a bandwidth-bound sum wants. For the short messages of decode, real libraries leave the
# ring: with NVLink every GPU can read all others at once, and one exchange takes some 10 µs whatever the
# number (`custom all-reduce` in vLLM, one-shot kernels in TensorRT-LLM). This is how eight GPUs get to five
# or six times in practice. It is the same arithmetic with $\lambda$ paid once instead of fourteen times.
#
# And pipelines? Two machines with one H100 each, connected by Ethernet with 10 Gbit/s, the same 70B model:

# %%
two = {"TP=2": predictor_of(llama_70b, 2, "ethernet10"), "PP=2": predictor_of(llama_70b, 1, "ethernet10", 2)}
lesson.table(
    "two-machines",
    [
        {"two H100s as": name}
        | {f"{streams} streams, tok/s": streams / way.decode_s(streams, 512) for streams in (1, 16, 64)}
        for name, way in two.items()
    ],
    {f"{streams} streams, tok/s": ".0f" for streams in (1, 16, 64)},
)
lesson.claim(
    "pp-network",
    "Across a slow link PP has the throughput that TP has not (70B, 2 H100s, 10 Gbit/s, 64 streams)",
    value=two["TP=2"].decode_s(64, 512) / two["PP=2"].decode_s(64, 512),
    claimed=(2, None),
    band=(6, 8.5),
    unit="x",
)

# %% [markdown]
# For one stream the two are not far apart: TP halves the reading and pays in latency, PP halves nothing and
# pays nothing. With many streams the messages of TP get long, and the link's bandwidth decides; PP sends
# one activation a token, and both stages are busy.
#
# ### Split or copy?
#
# A model of 8 billion parameters in BF16 fits one H100. With two of them: two replicas, each with every
# second request, or one TP=2 engine with all requests? We let the real scheduler decide, in `simulate`
# ([INF-30](INF-30.ipynb)), with the step times of the predictor.

# %%
one = predictor_of(llama_8b, 1, "nvlink")
pairs = {link: predictor_of(llama_8b, 2, link) for link in ("nvlink", "pcie4")}
config = EngineConfig.from_options("described", **room)


def split(link, requests):
    steps = pairs[link].step_s
    found = simulate(config, llama_8b.config, requests, lambda rows, logits, shared: steps(rows, logits))
    return list(found.requests)


def copied(requests):
    halves = [simulate(config, llama_8b.config, requests[first::2], one.step_s) for first in (0, 1)]
    return [request for half in halves for request in half.requests]


def chat_load(arrivals, number):
    prompts, outputs = LogNormal(400, 0.8, 1, 2000), LogNormal(200, 0.3, 1, 1000)
    traffic = {"prompt_lens": prompts, "output_lens": outputs, "arrivals": arrivals, "seed": 2}
    return Workload(name="chat", num_requests=number, **traffic).requests(vocab_size=1000, seed=0)


# %%
full_load = chat_load(AtOnce(), lesson.pick(400, 800))
light_load = chat_load(Gamma(2.0), 30)
ways = {
    "2 replicas": copied,
    "TP=2, NVLink": lambda r: split("nvlink", r),
    "TP=2, PCIe 4.0": lambda r: split("pcie4", r),
}
light = {name: samples_of(way(light_load)) for name, way in ways.items()}
heavy = {name: samples_of(way(full_load)) for name, way in ways.items()}


def mean(values):
    return sum(values) / len(values)


lesson.table(
    "split-or-copy",
    [
        {
            "two H100s as": name,
            "light load: TTFT, ms": mean(light[name]["ttft_ms"]),
            "light load: TPOT, ms": mean(light[name]["tpot_ms"]),
            "full load: tok/s": heavy[name]["output_throughput"][0],
        }
        for name in ways
    ],
    {"light load: TTFT, ms": ".1f", "light load: TPOT, ms": ".2f", "full load: tok/s": ",.0f"},
)
lesson.claim(
    "latency",
    "TP makes each answer faster than replicas do, at light load (8B, 2 H100s, NVLink, simulated: TPOT)",
    value=mean(light["2 replicas"]["tpot_ms"]) / mean(light["TP=2, NVLink"]["tpot_ms"]),
    claimed=(1.3, 2.0),
    band=(1.5, 1.7),
    unit="x",
)
lesson.claim(
    "replicas",
    "For a model that fits, replicas have at least the throughput of TP at full load (NVLink, simulated)",
    value=heavy["2 replicas"]["output_throughput"][0] / heavy["TP=2, NVLink"]["output_throughput"][0],
    claimed=(1.0, None),
    band=(0.95, 1.35),
    unit="x",
    because="on NVLink the two are equal within the shape of this traffic",
)
lesson.claim(
    "replicas-pcie",
    "The same over PCIe 4.0",
    value=heavy["2 replicas"]["output_throughput"][0] / heavy["TP=2, PCIe 4.0"]["output_throughput"][0],
    claimed=(1.0, None),
    band=(1.8, 3.6),
    unit="x",
)

# %% [markdown]
# **TPOT** is the time between two tokens of an answer, **TTFT** the time to the first one. At light load
# nobody shares a step, so halving the weights that a device reads nearly halves the time of a token: TP
# wins for the one who waits. At full load every device is busy, and every exchange is lost time: a prefill
# of thousands of tokens exchanges megabytes in each layer. Over NVLink that nearly vanishes; over PCIe it
# decides.
#
# In between it is less clear than the rule "replicas for throughput" sounds. As long as there are fewer
# requests than seats, TP over NVLink is ahead in throughput, too: one engine with all requests reads half
# of the weights on each device for all of them, two replicas read all of the weights for half of them. Try
# `chat_load(AtOnce(), 160)`.
#
# ## Where it does not help
#
# - **One stream with PP**: measured above. PP is for throughput, and for models that do not fit.
# - **Slow links with TP**: calculated above. Rule of thumb: TP inside a machine, PP between machines.
# - **Small models**: half of a small matrix takes no longer to start than the whole. Our 135M model has
#   exchanges of 2,304 bytes; there latency is everything.
# - **Fewer KV heads than ranks**: KV heads are repeated, so the cache no longer gets smaller with each
#   rank.
# - **More ranks, more to lose**: when one of them is gone, the others cannot go on. Here a lost rank ends
#   what was running with an error, and a new group serves what waits (docs/adr/0009).
#
# ## Exercises

# %%
lesson.exercise("bytes-per-token")

# %% [markdown]
# The shape of Llama 3.1 8B: 32 layers, `hidden_size` 4,096, a vocabulary of 128,256. Activations and logits
# are exchanged in BF16. How many bytes does a rank get from all-reduces and the all-gather, for one decoded
# token?

# %%
bytes_per_token = ...
lesson.check("bytes-per-token", bytes_per_token)

# %% tags=["solution"]
bytes_per_token = ((2 * 32 + 1) * 4096 + 128_256) * 2
lesson.check("bytes-per-token", bytes_per_token)

# %% tags=["wrong"]
lesson.refuses("bytes-per-token", 2 * bytes_per_token)
lesson.refuses("bytes-per-token", (2 * 32 + 1) * 4096 * 2)
lesson.refuses("bytes-per-token", (33 * 4096 + 128_256) * 2)

# %%
lesson.exercise("useful-links")

# %% [markdown]
# Which links make TP=2 worth it for one stream of the 8B model on H100s: over which of `LINKS` is a token
# (context 1,024) faster on two H100s than on one? Give the set of names. (`predictor_of` and `decode_s` are
# all you need.)

# %%
useful_links = ...  # such as {"nvlink", "pcie5"}
lesson.check("useful-links", useful_links)

# %% tags=["solution"]
alone_s = predictor_of(llama_8b, 1, "nvlink").decode_s(1, 1024)
useful_links = {name for name in LINKS if predictor_of(llama_8b, 2, name).decode_s(1, 1024) < alone_s}
lesson.check("useful-links", useful_links)

# %% tags=["wrong"]
lesson.refuses("useful-links", {"nvlink"})
lesson.refuses("useful-links", set(LINKS))
lesson.refuses("useful-links", {"nvlink", "nvlink3", "pcie5", "pcie4", "ethernet100"})

# %%
lesson.exercise("what-to-do")

# %% [markdown]
# Choose "copy", "tp" or "pp" for each: (a) 8B, two H100s with NVLink, a nightly job over a million
# documents, no one waits; (b) 8B, two H100s with NVLink, a voice assistant with one user at a time; (c) 70B
# in BF16 on two machines with one 80 GB GPU each, connected with 10 Gbit/s Ethernet, many requests at once.

# %%
what_to_do = ...  # such as {"a": "copy", "b": "copy", "c": "copy"}
lesson.check("what-to-do", what_to_do)

# %% tags=["solution"]
what_to_do = {"a": "copy", "b": "tp", "c": "pp"}
lesson.check("what-to-do", what_to_do)

# %% tags=["wrong"]
lesson.refuses("what-to-do", {"a": "tp", "b": "tp", "c": "pp"})
lesson.refuses("what-to-do", {"a": "copy", "b": "copy", "c": "pp"})
lesson.refuses("what-to-do", {"a": "copy", "b": "tp", "c": "tp"})
lesson.refuses("what-to-do", {"a": "copy", "b": "tp", "c": "copy"})

# %% [markdown]
# ## The answer
#
# Copy what fits. Split what does not, or what must answer sooner: inside a fast link by tensor, across a
# slow one by layers. And count before you buy: $(2n+1)$ sums a token, each with its latency.

# %%
lesson.answer()

# %% [markdown]
# ## In production
#
# - **vLLM**: `--tensor-parallel-size`, `--pipeline-parallel-size`, `--data-parallel-size` (replicas behind
#   one endpoint), `--distributed-executor-backend mp|ray`; for mixtures of experts
#   `--enable-expert-parallel`.
# - **SGLang**: `--tp-size`, `--pp-size`, `--dp-size`, `--enable-dp-attention`; several hosts with
#   `--nnodes`, `--node-rank`, `--dist-init-addr`.
# - **llama.cpp**: `-sm layer` splits by layers (the default with several GPUs), `-sm row` by rows; other
#   machines over RPC.
# - **TensorRT-LLM**: `tensor_parallel_size`, `pipeline_parallel_size`, and all-reduce kernels of its own
#   that are fused with the norm that follows.
# - **Ridgeline**: `--tp`, `--pp`, and `torchrun` over hosts; `ridgeline plan --tp 4 --pp 2 --link
#   ethernet100` does the arithmetic of this notebook for any config.
# - Replicas need a **router** in front. One that knows which replica has which prefix cached keeps the hit
#   rate of [INF-33](INF-33.ipynb); one that deals out at random divides it by the number of replicas.
#
# ## Reading list
#
# - Shoeybi and others, *Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
#   Parallelism*, 2019, arXiv 1909.08053: the two cuts and the two sums.
# - Pope and others, *Efficiently Scaling Transformer Inference*, 2022, arXiv 2211.05102: which split for
#   which batch and which link.
# - Huang and others, *GPipe*, 2018, arXiv 1811.06965, and Narayanan and others, *PipeDream*, SOSP 2019:
#   pipelines and their bubbles.
# - Patarasuk and Yuan, *Bandwidth optimal all-reduce algorithms for clusters of workstations*, 2009: the
#   ring.
# - Austin and others, *How to Scale Your Model*, 2025: the same arithmetic for TPUs, with exercises.
# - In this repository: docs/adr/0009, docs/parallel.md, `ridgeline/models/shard.py`,
#   `ridgeline/distributed`.
