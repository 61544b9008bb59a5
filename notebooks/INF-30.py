# %% [markdown]
# ## The question
#
# [INF-12](INF-12.ipynb) put several requests into one **batch**, so that they share each read of the
# weights. It was a **static** batch: the requests start together, and the next batch starts when the last
# of them has finished. Two things go wrong with that as soon as the batch is made of real requests.
#
# - Some answers are short and some are long. A request that has finished keeps its seat until the longest
#   one is done, and the machine computes its row for nothing.
# - Requests come when they like. One that arrives just after a batch has started must wait until all of
#   that batch has ended, even if seats are empty.
#
# **Continuous batching**, published in 2022 with a system called Orca, forms the batch anew in every
# **step** (Orca says *iteration*; a step computes one more token of every running request). A request that
# has finished leaves at once, and one that waits takes its seat in the next step. Nothing about the model
# changes. The gains that are quoted are large: "up to 23 times the throughput" is the title of a well-known
# article.
#
# How much do you expect from our engine, for the same requests, the same model and as many seats? Give the
# throughput with continuous batching divided by that with static batching.

# %%
from dataclasses import replace
from statistics import quantiles

from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from ridgeline import LLM, SamplingParams
from ridgeline.bench.drive import drive
from ridgeline.bench.simulate import simulate
from ridgeline.bench.throughput import samples_of
from ridgeline.bench.workload import AtOnce, Fixed, Gamma, Listed, LogNormal, Uniform, Workload
from ridgeline.config import EngineConfig
from ridgeline.course import Lesson, figure, ratio
from ridgeline.engine.engine import LLMEngine
from ridgeline.engine.scheduler import Scheduler
from ridgeline.models.load import describe_model
from ridgeline.models.locate import locate_model
from ridgeline.profiling.measured import measure_decode, measure_prefill

lesson = Lesson("INF-30")
lesson.predict("speedup", None, unit="x")
lesson.predict("wait_ratio", None, unit="x")

# %% [markdown]
# (The second prediction: the same ratio for waiting. When requests arrive at random, how many times as long
# does the slowest twentieth of them wait for a first token under static batching?)
#
# ## The arithmetic
#
# ### What a static batch wastes
#
# Let $N$ be the number of **seats**, the requests that may run at once (`max_num_seqs`), and $O_i$ the
# number of tokens that request $i$ writes. A static batch takes as many steps as its longest answer,
# $\max_i O_i$, and in each of them computes $N$ rows. Of these $N \max_i O_i$ rows, $\sum_i O_i$ are
# wanted:
#
# $$\text{useful share of a static batch} = \frac{\sum_i O_i}{N \max_i O_i} = \frac{\text{mean}}{\text{max}}$$
#
# With continuous batching every seat is taken as long as anybody waits, and every row is wanted. If a step
# takes the same time either way, the gain is the reciprocal:
#
# $$\text{gain} = \frac{\max_i O_i}{\text{mean}_i\, O_i}, \qquad \text{averaged over the batches}$$
#
# So the gain is a property of the *traffic*: of how unequal the answers are. If all are equally long there
# is none (the ratio is one). If lengths are spread as those of people's conversations, the longest of 16 is
# about three times the mean. No engine can make more of it than this ratio, unless it changes something
# else as well.
#
# ### What a static batch makes others wait
#
# A request that arrives at a random moment finds a batch under way. On average it waits for the rest of it,
# half a batch if the server is not too busy, before its own batch even starts; under load it waits for
# whole batches. With continuous batching it waits for a seat, and then for one step. Queues have no simple
# formula when requests and batches have all lengths, so for this part we *simulate*: below.
#
# ### With numbers
#
# Our requests: prompts of 16 to 64 tokens, answers of log-normal lengths, 16 seats.

# %%
SEATS = 16
model = describe_model(locate_model("smollm2")).config
crowd = Workload(
    name="crowd",
    num_requests=lesson.pick(32, 96),
    prompt_lens=Uniform(16, 64),
    output_lens=LogNormal(36, 0.8, 4, 120),
    arrivals=AtOnce(),
    seed=4,
)
requests = crowd.requests(vocab_size=model.vocab_size, seed=0)
outputs = [request.max_tokens for request in requests]
batches = [outputs[first : first + SEATS] for first in range(0, len(outputs), SEATS)]
lesson.table(
    "batches",
    [
        {
            "batch": number,
            "longest answer = steps": max(batch),
            "mean answer": sum(batch) / len(batch),
            "longest / mean": max(batch) * len(batch) / sum(batch),
        }
        for number, batch in enumerate(batches)
    ],
    {"mean answer": ".1f", "longest / mean": ".2f"},
)
lesson.record("static_steps", sum(map(max, batches)))
lesson.record("least_steps", max(-(-sum(outputs) // SEATS), max(outputs)))
lesson.record("by_steps", lesson.values["static_steps"] / lesson.values["least_steps"])
lesson.record("by_rows", lesson.values["static_steps"] * SEATS / sum(outputs))
lesson.say("""
Static batches need {static_steps} steps. With all seats taken all the time, {least_steps} steps would be
enough. So if a step takes the same time however many rows it has (that is so while reading the weights is
what takes the time), the gain is **{by_steps:.2f} times** at most. If a step takes as long as it has rows
(that is so when arithmetic takes the time), then what counts is rows and not steps, and the gain is
**{by_rows:.2f} times** at most: static batches compute that many rows for each one that is wanted. A real
machine is in between.
""")

# %% [markdown]
# ## The real thing
#
# ### One loop
#
# The engine knows nothing of batches. This is all it does:

# %%
lesson.source(LLMEngine.step)
lesson.source(LLMEngine._next_result)

# %% [markdown]
# `schedule` decides which tokens of which requests are computed now (the **plan** of the step), the
# executor computes them, `update` writes down what came out. (More than one plan in flight is for
# pipelines, [INF-34](INF-34.ipynb); here `pp_size` is 1, and the loop runs once.) Because the plan is made
# anew each time, continuous batching is not a feature that somebody added. It is what is left when nobody
# says that a batch must stay together.
#
# How does a request get in?

# %%
lesson.source(Scheduler._admit)

# %% [markdown]
# It goes through the waiting requests in order and stops when there is no **budget** (tokens that one step
# may compute, `max_num_batched_tokens`), no seat, or no memory. What it looks for first (`match_prefix`) is
# the subject of [INF-33](INF-33.ipynb), and blocks that of [INF-31](INF-31.ipynb). `_grant` gives a long
# prompt the part that the budget allows: a **chunk**. The rest follows in the next steps, while the others
# go on writing.
#
# And static batching? It is the same scheduler with another rule for admission: nobody, until all have
# finished.

# %%
lesson.source(Scheduler._schedule_static)

# %% [markdown]
# Look at the last branch: a request of the batch that is no longer running still gets a row. It has no
# tokens (`()`), only `num_padding`: work for nothing. A real static batch cannot leave it out, because its
# tensors have a fixed number of rows. Ours computes the padding as well, so that the comparison is honest.
#
# ### The plans, seen
#
# A plan is plain data, so we can draw it. Eight requests, four seats: each line is a request, each column a
# step. `simulate` runs the real scheduler without a model; `on_step` hands us each plan.


# %%
def clock(rows, num_logits, num_shared_keys):
    return 0.003 + 0.0008 * sum(num_new for num_new, _ in rows)


def options_of(batching, **more):
    limits = {"max_model_len": 512, "max_num_batched_tokens": 2048, "kv_cache_tokens": 16 * 512}
    fixed = {"executor": "native", "enable_prefix_caching": False}
    return limits | fixed | {"batching": batching, "max_num_seqs": SEATS} | more


def plans_of(batching, requests, seats):
    config, plans = EngineConfig.from_options("smollm2", **options_of(batching, max_num_seqs=seats)), []
    simulate(config, model, requests, clock, on_step=plans.append)
    return plans


# %%
drawn = (8, 2, 3, 2, 7, 2, 2, 3)
few = Workload(name="few", num_requests=8, prompt_lens=Fixed(8), output_lens=Listed(drawn)).requests(
    vocab_size=model.vocab_size, seed=0
)
SHADES = {"waiting": 0, "prompt": 1, "one token": 2, "padding": 3}


def shade_of(row):
    return "padding" if not row.token_ids else "prompt" if row.start == 0 else "one token"


def shades_of(plans):
    grid = [[0] * len(plans) for _ in drawn]
    for step, row in ((step, row) for step, plan in enumerate(plans) for row in plan.rows):
        grid[int(row.request_id)][step] = SHADES[shade_of(row)]
    return grid


# %%
drawing, panels = figure("Eight requests on four seats", x="step", y="request", panels=2, size=(10.4, 3.6))
colors = ["#ffffff", "#2da44e", "#1f6feb", "#ffb3a7"]
for axes, batching in zip(panels, ("static", "continuous"), strict=True):
    plans = plans_of(batching, few, 4)
    axes.grid(False)
    axes.pcolormesh(shades_of(plans), cmap=ListedColormap(colors), vmin=0, vmax=3, edgecolors="#d0d7de")
    axes.set_xlim(0, 15)
    axes.invert_yaxis()
    axes.set_title(f"{batching}: {len(plans)} steps")
names = [
    Patch(color=color, label=name) for name, color in zip(SHADES, colors, strict=True) if name != "waiting"
]
_ = panels[1].legend(handles=names, loc="lower right", fontsize=8)

# %% [markdown]
# Green is the step that reads the prompt (and writes the first token), blue is one more token, red is
# padding. On the left, three of four seats are red for most of the time, and the second four wait for the
# first. On the right, request 4 takes the seat of request 1 in the very step after it has finished.
#
# ### The same tokens
#
# Who sits beside a request must not change its answer. We let the model answer twelve prompts with answers
# of different lengths, under both rules:

# %%
prompts = [{"prompt_token_ids": list(range(300 + 17 * i, 320 + 20 * i))} for i in range(12)]
params = [SamplingParams(temperature=0, max_tokens=6 + 5 * (i % 4), ignore_eos=True) for i in range(12)]
answers = {}
for batching in ("static", "continuous"):
    with LLM("smollm2", **options_of(batching, max_num_seqs=4, executor=None, device=lesson.device)) as llm:
        answers[batching] = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
lesson.claim(
    "different-answers",
    "Continuous batching changes no answer: of 12, the number that differ from static batching",
    value=sum(a != b for a, b in zip(answers["static"], answers["continuous"], strict=True)),
    claimed=(0, 0),
    band=(0, 0),
)

# %% [markdown]
# ## Measurement
#
# ### How long is a step?
#
# To predict seconds and not only steps, we need the duration of a step. Two short measurements give a
# straight line for each kind of work: decode steps with 1 and with 16 requests, and a prefill of 256
# tokens.

# %%
engines = {
    batching: LLM("smollm2", **options_of(batching, executor=None, device=lesson.device))
    for batching in ("static", "continuous")
}
engine = engines["continuous"].engine
one, all_seats = (measure_decode(engine, batch, 64) for batch in (1, SEATS))
prompt_token_s = (measure_prefill(engine, 256) - one) / 255
decode_row_s = (all_seats - one) / (SEATS - 1)
lesson.record("step_1_ms", 1000 * one)
lesson.record("step_16_ms", 1000 * all_seats)
lesson.record("row_ms", 1000 * decode_row_s)
lesson.record("prompt_token_ms", 1000 * prompt_token_s)
lesson.say("""
A step with one request takes {step_1_ms:.1f} ms, one with 16 requests {step_16_ms:.1f} ms: each further
request adds {row_ms:.2f} ms. A token of a prompt adds {prompt_token_ms:.2f} ms.
""")


# %%
def step_line(rows, num_logits, num_shared_keys):
    decodes = sum(num_new == 1 for num_new, seq_len in rows)
    prompts = sum(num_new for num_new, seq_len in rows if num_new > 1)
    return one - decode_row_s + decodes * decode_row_s + prompts * prompt_token_s


def simulated(batching, workload, seed=0, **more):
    config = EngineConfig.from_options("smollm2", **options_of(batching, **more))
    return simulate(config, model, workload.requests(vocab_size=model.vocab_size, seed=seed), step_line)


def speed(batching):
    return samples_of(drive(engines[batching].engine, requests))["output_throughput"][0]


# %% [markdown]
# `step_line` is the whole model of the machine: a constant, plus so much for each request that writes one
# token, plus so much for each token of a prompt.
#
# ### Throughput: everything is there at the start

# %%
foreseen = {batching: simulated(batching, crowd) for batching in engines}
steps = {}
for batching, llm in engines.items():
    before = llm.engine.stats.num_steps
    lesson.record(f"speed_{batching}", speed(batching))
    steps[batching] = llm.engine.stats.num_steps - before
lesson.table(
    "throughput",
    [
        {
            "batching": batching,
            "steps, simulated": len(found.steps),
            "steps, engine": steps[batching],
            "tok/s, predicted": found.num_output_tokens / found.duration_s,
            "tok/s, measured": lesson.values[f"speed_{batching}"],
        }
        for batching, found in foreseen.items()
    ],
    {"tok/s, predicted": ".0f", "tok/s, measured": ".0f"},
)
lesson.record("foreseen", foreseen["static"].duration_s / foreseen["continuous"].duration_s)
lesson.claim(
    "same-steps",
    "`simulate` and the engine agree: steps that differ, both kinds of batching together",
    value=sum(abs(len(foreseen[batching].steps) - steps[batching]) for batching in engines),
    claimed=(0, 0),
    band=(0, 0),
    unit="steps",
)
predicted_speed = foreseen["continuous"].num_output_tokens / foreseen["continuous"].duration_s
lesson.claim(
    "simulate-agrees",
    "`simulate` with three measured step times predicts the engine's throughput: predicted / measured",
    value=lambda: predicted_speed / speed("continuous"),
    claimed=(0.85, 1.15),
    band=(0.5, 2.0),
    unit="x",
    because="the machine changed its speed between the measurement of the steps and that of the run",
)
lesson.claim(
    "speedup",
    "Continuous batching has up to 23 times the throughput of static batching",
    value=lambda: ratio(
        lambda: speed("continuous"), lambda: speed("static"), repeats=lesson.pick(3, 7), warmups=0
    ),
    claimed=(8, 23),
    band=(1.3, 3.5),
    unit="x",
    because="these answers allow {by_steps:.1f} to {by_rows:.1f} times, and the simulation said "
    "{foreseen:.1f}; the famous figure also contains paging, faster kernels and answers that are "
    "far more unequal",
)

# %% [markdown]
# The simulation needs no model and takes a fraction of a second, and it knows the answer, because
# scheduling is plain arithmetic on lengths. Where does the famous 23 come from, then? The article
# (Anyscale, 2023) compares whole servers. In its own figures continuous batching alone is worth about 8
# times over static batching in the naive form; the rest is memory ([INF-31](INF-31.ipynb)). And its answers
# vary between 1 token and 1,536, so that the longest of a large batch is many times the mean: the same
# formula, other traffic.
#
# How does the gain depend on how unequal the answers are? One parameter of the log-normal distribution, its
# $\sigma$, sets that. We keep everything else:

# %%
sigmas = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
spread = [replace(crowd, output_lens=LogNormal(36, sigma, 4, 120)) for sigma in sigmas]
gains, allowed = [], []
for workload in spread:
    found = {batching: simulated(batching, workload) for batching in engines}
    gains.append(found["static"].duration_s / found["continuous"].duration_s)
    lengths = [r.request.max_tokens for r in found["static"].requests]
    longest = sum(max(lengths[first : first + SEATS]) for first in range(0, len(lengths), SEATS))
    allowed.append(longest * SEATS / sum(lengths))

# %%
drawing, axes = figure(
    "Gain of continuous batching by traffic", x="σ of the answers' lengths", y="times static"
)
axes.plot(sigmas, allowed, "--", color="C5", label="longest / mean (arithmetic)")
axes.plot(sigmas, gains, "o-", color="C0", label="simulated, this machine's step times")
axes.plot([0.8], [lesson.values["speedup"]], "D", color="C1", markersize=9, label="engine, measured")
axes.set_ylim(0, None)
_ = axes.legend()

# %% [markdown]
# At $\sigma = 0$ all answers are equally long, and there is nothing to gain but the prompts' padding. Then
# both curves rise. They part because the last answers of a run are finished alone, under either rule; a
# server whose queue never ends would follow the dashed line more closely.
#
# ### Waiting: requests arrive at random
#
# Now the same kind of requests arrive one by one, at random moments (a **Poisson process**: the gaps
# between them are exponentially distributed). We choose the rate so that it is 40 % of what continuous
# batching can serve. For each request we look at **TTFT**, the time from its arrival to its first token. An
# average hides what annoys people, so we take the 95th percentile, P95: one request in twenty waits longer
# than that.

# %%
capacity = crowd.num_requests / foreseen["continuous"].duration_s
lesson.record("capacity", capacity)


def arriving(share, count):
    lengths = {"prompt_lens": crowd.prompt_lens, "output_lens": crowd.output_lens}
    rate = Gamma(share * lesson.values["capacity"])
    return Workload(name="arriving", num_requests=count, arrivals=rate, **lengths)


def p95(times):
    return quantiles([r.ttft_s for r in times], n=20, method="inclusive")[-1]


# %%
shares = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
live = arriving(0.4, lesson.pick(24, 150))
waits = {
    batching: [p95(simulated(batching, arriving(share, live.num_requests)).requests) for share in shares]
    for batching in engines
}
live_requests = live.requests(vocab_size=model.vocab_size, seed=0)
seen = {batching: drive(llm.engine, live_requests) for batching, llm in engines.items()}
predicted = {batching: simulated(batching, live).requests for batching in engines}
lesson.table(
    "waiting",
    [
        {
            "batching": batching,
            "P95 of TTFT, ms: predicted": 1000 * p95(predicted[batching]),
            "measured": 1000 * p95(seen[batching]),
            "tok/s: predicted": samples_of(predicted[batching])["output_throughput"][0],
            "tok/s measured": samples_of(seen[batching])["output_throughput"][0],
        }
        for batching in engines
    ],
    {
        "P95 of TTFT, ms: predicted": ".0f",
        "measured": ".0f",
        "tok/s: predicted": ".0f",
        "tok/s measured": ".0f",
    },
)

# %%
drawing, axes = figure(
    "Waiting for the first token",
    x="requests a second, share of the continuous engine's capacity",
    y="P95 of TTFT, s",
)
for batching, color in (("static", "C1"), ("continuous", "C0")):
    axes.plot(shares, waits[batching], "o-", color=color, label=f"{batching}, simulated")
    axes.plot(
        [0.4],
        [p95(seen[batching])],
        "D",
        color=color,
        markersize=10,
        mec="black",
        label=f"{batching}, engine",
    )
axes.set_yscale("log")
_ = axes.legend()

# %%
lesson.record("wait_ratio", p95(seen["static"]) / p95(seen["continuous"]))
lesson.claim(
    "tail",
    "The first token comes sooner: P95 of TTFT, static over continuous batching, at 40 % load",
    value=lesson.values["wait_ratio"],
    claimed=(2, None),
    band=(2, None),
    unit="x",
)

# %% [markdown]
# At every rate the static batches make people wait many times as long, because a request that comes at the
# wrong moment waits for a whole batch of strangers. These runs are short: in a long one, the queue of a
# server that gets more than it can serve grows for as long as the requests keep coming, and static batching
# gets there at about half of the rate (try `arriving(share, 300)`). This, and not the throughput of a
# closed run, is what users notice.
#
# ## Where it does not help
#
# ### Equal lengths, all at once
#
# A job over a file of questions with a fixed answer length has nothing to join and nothing to leave.
# Prompts of 32 tokens, answers of 32:

# %%
equal = Workload(name="equal", num_requests=48, prompt_lens=Fixed(32), output_lens=Fixed(32))
level = {batching: simulated(batching, equal) for batching in engines}
lesson.claim(
    "no-gain",
    "Continuous batching is faster, also where all requests are alike (simulated)",
    value=level["static"].duration_s / level["continuous"].duration_s,
    claimed=(1.05, None),
    band=(0.98, 1.02),
    unit="x",
    because="nothing finishes early and nothing arrives late, so both rules make the same plans",
)

# %% [markdown]
# ### Prompts that interrupt
#
# In a static batch all prompts are read first and then everybody writes at an even pace. In a continuous
# one a new prompt may come into any step, and the step then takes longer: everybody who is writing waits
# for it. With long prompts that is seen in the gaps between tokens (**ITL**, inter-token latency). The
# answer to it is to read a long prompt in chunks: the budget `max_num_batched_tokens` bounds the length of
# a step. Short answers being written while prompts of 400 tokens arrive:

# %%
interrupted = Workload(
    name="interrupted",
    num_requests=48,
    prompt_lens=Fixed(400),
    output_lens=Uniform(20, 60),
    arrivals=Gamma(0.12 * lesson.values["capacity"]),
    seed=2,
)


def gaps(batching, **more):
    found = simulated(batching, interrupted, **more)
    return quantiles([gap for r in found.requests for gap in r.itl_s], n=100)


settings = {
    "static": gaps("static", max_num_batched_tokens=8192),
    "continuous, prompts whole": gaps("continuous", max_num_batched_tokens=8192),
    "continuous, 128 tokens a step": gaps("continuous", max_num_batched_tokens=128),
    "continuous, 32 tokens a step": gaps("continuous", max_num_batched_tokens=32),
}
lesson.table(
    "gaps",
    [
        {"batching": name, "ITL P50, ms": 1000 * cuts[49], "P99, ms": 1000 * cuts[98]}
        for name, cuts in settings.items()
    ],
    {"ITL P50, ms": ".1f", "P99, ms": ".1f"},
)
lesson.claim(
    "interruptions",
    "The tokens of a running answer come more evenly: P99 of ITL, static over continuous batching",
    value=settings["static"][98] / settings["continuous, prompts whole"][98],
    claimed=(1, None),
    band=(None, 0.8),
    unit="x",
    because="a prompt that joins makes everybody wait; a static batch reads prompts when nobody is writing",
)

# %% [markdown]
# So this optimisation has a loser: the one who is already writing. Chunks make the interruptions shorter
# and more frequent, and the prompts take longer to be read. Sarathi-Serve (Agrawal et al., 2024) is about
# this trade, and about choosing the budget so that decode steps are filled up with pieces of prompts.
#
# ## Exercises

# %%
lesson.exercise("steps")

# %% [markdown]
# Six requests with answers of 9, 1, 1, 5, 4 and 2 tokens are there at the start, in this order. There are
# two seats, and the step that reads a prompt also writes the first token. How many steps does static
# batching take, and how many continuous batching?

# %%
six = Workload(
    name="six", num_requests=6, prompt_lens=Fixed(8), output_lens=Listed((9, 1, 1, 5, 4, 2))
).requests(vocab_size=model.vocab_size, seed=0)
steps_needed = ...  # (static, continuous)
lesson.check("steps", steps_needed)

# %% tags=["solution"]
# Static: (9, 1), (1, 5), (4, 2) take 9 + 5 + 4. Continuous: beside the 9, the second seat serves 1, 1, 5 in 7
# steps and then the 4, in steps 8 to 11; the 2 takes the first seat when the 9 is done, in steps 10 and 11.
steps_needed = tuple(len(plans_of(batching, six, 2)) for batching in ("static", "continuous"))
lesson.check("steps", steps_needed)

# %% tags=["wrong"]
lesson.refuses("steps", (22, 22))
lesson.refuses("steps", (18, 18))
lesson.refuses("steps", (9, 9))

# %%
lesson.exercise("gain")

# %% [markdown]
# A service answers nine of ten questions with 20 tokens and one of ten with 400, at random. What is the
# most that continuous batching can gain over static batches of 16? (How likely is it that a batch holds
# none of the long ones?)

# %%
gain = ...  # times, within 3 %
lesson.check("gain", gain)

# %% tags=["solution"]
none_long = 0.9**16
longest = none_long * 20 + (1 - none_long) * 400
gain = longest / (0.9 * 20 + 0.1 * 400)
lesson.check("gain", gain)

# %% tags=["wrong"]
lesson.refuses("gain", 400 / 58)
lesson.refuses("gain", 20.0)
lesson.refuses("gain", 58 / 20)

# %%
lesson.exercise("seats")

# %% [markdown]
# On the machine whose step takes 3 ms and 0.8 ms for each token (`clock`), requests arrive as in the cell
# below. What is the smallest number of seats with which the P95 of TTFT stays below 250 ms? `simulate`
# tells you in a second: try 2, 4, 8, 16, 32.

# %%
service = Workload(
    name="service",
    num_requests=300,
    prompt_lens=Uniform(16, 64),
    output_lens=LogNormal(36, 0.8, 4, 200),
    arrivals=Gamma(9.0),
    seed=6,
)
service_requests = service.requests(vocab_size=model.vocab_size, seed=0)


def p95_with(seats):
    config = EngineConfig.from_options("smollm2", **options_of("continuous", max_num_seqs=seats))
    return p95(simulate(config, model, service_requests, clock).requests)


# %%
seats = ...  # one of 2, 4, 8, 16, 32
lesson.check("seats", seats)

# %% tags=["solution"]
seats = min(number for number in (2, 4, 8, 16, 32) if p95_with(number) < 0.25)
lesson.check("seats", seats)

# %% tags=["wrong"]
lesson.refuses("seats", 2)
lesson.refuses("seats", 32)

# %%
for llm in engines.values():
    llm.close()

# %% [markdown]
# ## The answer
#
# Continuous batching wins exactly what static batching wastes: the empty end of each batch, and the waiting
# for the next. Both can be computed from the lengths and the arrivals of the traffic before anything is
# run.

# %%
lesson.answer()

# %% [markdown]
# ## In production
#
# - **Orca** also introduced *selective batching*: matrices see the tokens of all requests as one list,
#   attention sees each request alone. Every engine works like that now, ours too (`ForwardBatch` has one
#   list of tokens).
# - **vLLM** has no static mode. `--max-num-seqs` is the number of seats, `--max-num-batched-tokens` the
#   budget of a step, chunked prefill is on by default, `--scheduling-policy fcfs|priority` orders the
#   queue, and asynchronous scheduling prepares the next plan while the GPU computes.
# - **SGLang**: `--chunked-prefill-size`, `--max-running-requests`, `--schedule-policy lpm` (longest shared
#   prefix first).
# - **TensorRT-LLM** says *in-flight batching*; its capacity policy `GUARANTEED_NO_EVICT` admits only what
#   can finish, `MAX_UTILIZATION` admits more and preempts.
# - **llama.cpp** server: `-np` seats, continuous batching on by default, `-b` and `-ub` bound a step.
# - Some services separate the two kinds of work altogether: one group of machines reads prompts, another
#   writes answers (DistServe, Splitwise; `disaggregated prefill` in vLLM and SGLang), so that prompts
#   interrupt nobody.
#
# ## Reading list
#
# - Yu, Jeong, Kim, Kim and Chun, *Orca: A Distributed Serving System for Transformer-Based Generative
#   Models*, OSDI 2022.
# - Daniel, Shen, Liang and Liaw, *How continuous batching enables 23x throughput in LLM inference while
#   reducing p50 latency*, Anyscale, 2023.
# - Agrawal and others, *Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve*, OSDI 2024,
#   arXiv 2403.02310.
# - Zhong and others, *DistServe: Disaggregating Prefill and Decoding for Goodput-optimized LLM Serving*,
#   OSDI 2024, arXiv 2401.09670.
# - In this repository: `ridgeline/engine/scheduler.py`, and docs/request.md, the life of a request in eight
#   steps.
