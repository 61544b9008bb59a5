# %%
import itertools
import random
import statistics
import subprocess
import sys

from ridgeline import LLM, SamplingParams
from ridgeline.bench.compare import compare
from ridgeline.bench.drive import drive
from ridgeline.bench.environment import environment
from ridgeline.bench.intervals import PROCESS_SPREAD, bootstrap_interval, difference, percentile
from ridgeline.bench.latency import LatencyOptions, measure_latency, time_batch
from ridgeline.bench.repeat import RepeatOptions, repeat
from ridgeline.bench.result import Metric
from ridgeline.bench.workload import Fixed, Uniform, Workload
from ridgeline.config import EngineConfig
from ridgeline.course import Figure, Lesson, figure, ratio

lesson = Lesson("INF-03")

# %% [markdown]
# ## The question
#
# Somebody changes a kernel, runs a benchmark before and after, reads "361 tok/s" and "347 tok/s", and
# writes that the change made it 4 % slower. Was it slower? Run the first version again and you may read
# 340. One number is not a measurement: it has no idea how far it would be off the next time.
#
# The words. A **sample** is one number from one repetition, such as one TTFT. A **metric** is what the
# samples are of. The **median** is the middle one when they are sorted: half are below. **P95** (the 95th
# *percentile*) is the value that 95 % of the samples do not exceed; P50 is the median, P99 is the tail that
# your most unlucky customers see. **Noise** is whatever changes from one repetition to the next though you
# changed nothing. An **interval** is what we say instead of one number: from here to there, made so that it
# holds the true value in 95 of 100 such measurements.
#
# Guess two things. Two runs of *the same* benchmark on this machine, one right after the other: by how many
# percent do their medians of TPOT differ? And if you take P99 from only 20 samples: in which share of such
# attempts is it within 10 % of the truth?

# %%
lesson.predict("same_percent", None, unit="%")
lesson.predict("lucky_p99", None)

# %% [markdown]
# ## The arithmetic
#
# **How much the median knows.** If samples scatter by a standard deviation $s$ and do not depend on each
# other, the mean of $n$ of them scatters by $s / \sqrt{n}$, the median by about $1.25\, s / \sqrt{n}$. Four
# times the samples, half the interval. But samples of a shared machine *do* depend on each other: it is
# slow for seconds, then fast for seconds. Then $n$ is not the number of samples but about the number of
# such stretches, and a thousand samples from one slow second are worth one.
#
# **How much a percentile knows.** P99 lies beyond 99 % of all samples. The chance that none of $n$ samples
# lies beyond it is $0.99^n$: for 20 samples 0.82, for 100 still 0.37, for 300 0.05. With 20 samples your
# "P99" is the largest number or a little less, and in four of five cases that is below the real P99.
#
# **How often chance wins.** If each of $m$ metrics is compared so that chance alone gives a false alarm in
# 5 of 100 cases, some false alarm comes with probability $1 - 0.95^m$ (if they are independent): for five
# metrics 23 %. Whoever compares many things must ask for more from each one. *Holm's method* does: the
# smallest p-value must be below $0.05 / m$, the next below $0.05 / (m - 1)$, and so on. (A *p-value* is the
# probability of a difference at least as large as the one measured if there were none.)
#
# ## The real thing
#
# `ridgeline bench` is made of these functions. `repeat` calls a measurement again and again: warm-ups until
# they stop getting faster, then at least `num_iters`, then more until each interval is within 5 % of its
# median or the time is over. It says which of the two ended it. Each repetition gets a seed of its own, so
# that no prompt is seen twice.

# %%
lesson.source(repeat)

# %% [markdown]
# An interval comes from *resampling* (the **bootstrap**): draw $n$ samples with replacement from those you
# have, take the median, do it 2,000 times, and see how far these medians scatter. To respect that
# neighbours in time depend on each other, whole stretches are drawn, not single samples; and because few
# stretches are too sure of themselves, the interval is widened.

# %%
lesson.source(bootstrap_interval)

# %% [markdown]
# And this is the rule about percentiles. What the samples do not carry is not stated; instead it says how
# many are missing.

# %%
lesson.source(Metric.summary)

# %% [markdown]
# ## Measurement
#
# ### First: what exactly is "tokens per second"?
#
# One request, 256 tokens of prompt and 32 of output. From the same run come three numbers that people call
# tokens per second: output tokens over the time of *decode*; output tokens over the time of the *whole*
# request; all tokens, prompt included, over that same time.

# %%
llm = LLM("smollm2", device=lesson.device, max_num_seqs=8, max_model_len=512)
engine = llm.engine
seeds = itertools.count(1000)
one = LatencyOptions(input_len=256, output_len=32, batch_size=1).workload()
runs = [time_batch(engine, one, next(seeds)) for _ in range(lesson.pick(8, 20))][1:]
decode = Figure([run["decode_tok_s"][0] for run in runs])
output = Figure([32e3 / run["e2el_ms"][0] for run in runs])
total = Figure([288e3 / run["e2el_ms"][0] for run in runs])
lesson.table(
    "tokens_per_second",
    [
        {"called tok/s": name, "median": value, "low": value.low, "high": value.high}
        for name, value in (
            ("decode", decode),
            ("output, whole request", output),
            ("total, prompt included", total),
        )
    ],
    {"median": ".0f", "low": ".0f", "high": ".0f"},
)
lesson.claim(
    "one-tokens-per-second",
    "Tokens per second are tokens per second (total over decode, from the same runs).",
    value=Figure([t / d for t, d in zip(total.samples, decode.samples, strict=True)]),
    claimed=(0.9, 1.1),
    band=(1.3, None),
    unit="x",
    because="the prompt's tokens are many and cheap, and counted in one number only. Say which tokens, "
    "over which time",
)

# %% [markdown]
# ### Same seed, same tokens
#
# A benchmark that repeats must first repeat its *work*. Prompts come from seeds, and so do the random
# choices of sampling. Not only greedy decoding must give the same tokens twice, also sampling at
# temperature 1.


# %%
def tokens_of(seed):
    params = SamplingParams(temperature=1.0, max_tokens=24, seed=seed, ignore_eos=True)
    return llm.generate("A benchmark is", params)[0].outputs[0].token_ids


again, other = [tokens_of(7) for _ in range(2)], tokens_of(8)
lesson.claim(
    "same-tokens",
    "With the same seed a run repeats token by token, also when it samples at random.",
    value=sum(a == b for a, b in zip(*again, strict=True)) / len(again[0]),
    claimed=(1, 1),
    band=(1, 1),
    unit="of the tokens",
)
lesson.record("other_seed", sum(a == b for a, b in zip(again[0], other, strict=True)) / len(other))
lesson.say("With another seed {other_seed:.0%} of the tokens happen to be the same, so the seed does matter.")

# %% [markdown]
# ### Trap 1: measuring a cache
#
# The natural thing is to send the same prompt in every repetition. But this engine, like all serving
# engines, keeps what it computed for a prompt and uses it again when the same beginning comes (*prefix
# caching*: INF-33).

# %%
lesson.claim(
    "same-prompt",
    "Repeating the same prompt repeats the same measurement (TTFT of new prompts over that of a"
    " repeated one).",
    value=lambda: ratio(
        lambda: time_batch(engine, one, next(seeds))["ttft_ms"][0],
        lambda: time_batch(engine, one, 1)["ttft_ms"][0],
        repeats=lesson.pick(5, 15),
    ),
    claimed=(0.9, 1.1),
    band=(1.5, None) if lesson.device == "cpu" else (0.8, None),
    unit="x",
    because="from the second time on nearly the whole prompt comes from the cache, and what is measured"
    " is a lookup",
)

# %% [markdown]
# ### Trap 2: the first time
#
# Memory that was never touched must be given by the operating system, caches and branch predictors know
# nothing yet, clocks are low. We start fresh engines and time repetitions from the very first.

# %%
short = LatencyOptions(input_len=64, output_len=9, batch_size=1).workload()
series = []
for _ in range(lesson.pick(3, 8)):
    with LLM("smollm2", device=lesson.device, max_num_seqs=8, max_model_len=512) as fresh:
        series.append([time_batch(fresh.engine, short, next(seeds))["e2el_ms"][0] for _ in range(10)])
lesson.claim(
    "first-is-slow",
    "The first repetition of a fresh engine is slower than the later ones, so warm-ups must not count.",
    value=Figure([s[0] / statistics.median(s[3:]) for s in series]),
    claimed=(1.1, None),
    band=(0.6, None),
    unit="x",
    because="the weights were just packed, so they and the engine's objects are in the caches already; "
    "the system gives new memory in large pages, and what is left of a first time is less than "
    "the noise. Warm up nevertheless: torch.compile, CUDA graphs and cold files do need it",
)

# %% [markdown]
# ### Trap 3: one after the other
#
# We compare an engine *with itself*: A and B are two engines with the same settings. While B is measured
# somebody else uses the machine, here two processes that do nothing but count. First as most people do it,
# all of A and then all of B; then in turns, A B B A, with the same disturbance all the time.

# %%
pair = [LLM("smollm2", device=lesson.device, max_num_seqs=8, max_model_len=512) for _ in range(2)]
first, second = (lambda e=each.engine: time_batch(e, short, next(seeds))["e2el_ms"][0] for each in pair)
quiet = [first() for _ in range(lesson.pick(12, 30))][2:]
count_up = "import time; end = time.time() + 90\nwhile time.time() < end: pass"
others = [subprocess.Popen([sys.executable, "-c", count_up]) for _ in range(2)]
disturbed = [second() for _ in range(lesson.pick(10, 28))]
in_turns = ratio(second, first, repeats=lesson.pick(25, 41), warmups=2)
for process in others:
    process.kill()
    process.wait()
lesson.claim(
    "one-after-the-other",
    "Measuring A and then B is a fair comparison (the same engine twice; somebody came during the second).",
    value=statistics.median(disturbed) / statistics.median(quiet),
    claimed=(0.95, 1.05),
    band=(1.03, None) if lesson.device == "cpu" else (0.7, None),
    unit="x",
    because="the machine was another one when B had its turn. No number of samples would have shown it:"
    " all of B's agree with each other",
)
lesson.claim(
    "in-turns",
    "In turns the same engine is as fast as itself, on the same disturbed machine.",
    value=in_turns,
    claimed=(0.9, 1.1),
    band=(0.4, 2.5),
    unit="x",
    because="the disturbance is as large as the thing that is measured, and few pairs were taken",
)

# %% [markdown]
# ### Two honest runs
#
# Now by the rules: warm-ups, seeds, at least 20 repetitions, and *interleaving* where two things are
# compared. The result is not two numbers but a ratio with an interval, and the question is whether the
# interval contains 1.

# %%
first(), second()
count = lesson.pick(24, 80)
pairs = [(first(), second()) if k % 2 else (second(), first())[::-1] for k in range(count)]
a, b = ([p[i] for p in pairs] for i in range(2))
for each in pair:
    each.close()
same = difference(a, b, in_turns=True, process_spread=PROCESS_SPREAD)
for name, in_turns_too in (("half_width", False), ("half_width_in_turns", True)):
    interval = bootstrap_interval(a, in_turns=in_turns_too, process_spread=PROCESS_SPREAD)
    lesson.record(name, 100 * (interval[1] - interval[0]) / 2 / statistics.median(a))
lesson.record("same_ratio", same.ratio)
lesson.record("same_low", same.low)
lesson.record("same_high", same.high)
lesson.record("same_p", same.p_value)
lesson.record("num_pairs", count)
lesson.say(
    """After {num_pairs} repetitions each: one engine's median is known to ± {half_width:.1f} %, the
    drift of the machine included, and to ± {half_width_in_turns:.1f} % for a comparison with what took
    turns with it, because both saw the same drift. The second engine takes {same_ratio:.3f} times as
    long as the first, interval {same_low:.3f} to {same_high:.3f} (p = {same_p:.2f})."""
)
lesson.claim(
    "aa-test",
    "An honest comparison of a thing with itself finds no difference (distance of the ratio "
    "from 1, in half-widths of its interval).",
    value=abs(same.ratio - 1) / ((same.high - same.low) / 2),
    claimed=(0, 1),
    band=(0, 2.5),
    unit="half-widths",
    because="in about one of twenty such comparisons chance wins; this was one",
)

# %%
drawing, (left, right) = figure("The same engine, measured twice", panels=2, size=(12, 4))
left.plot(range(len(quiet)), quiet, "o", label="A, first")
left.plot(
    range(len(quiet), len(quiet) + len(disturbed)), disturbed, "o", label="B, afterwards, machine disturbed"
)
left.set(title="one after the other", xlabel="repetition", ylabel="ms of a request")
left.set_ylim(0, 1.2 * max(disturbed))
left.legend()
right.plot(range(0, 2 * count, 2), a, "o", label="A")
right.plot(range(1, 2 * count, 2), b, "o", label="B")
right.set(title="in turns", xlabel="repetition", ylabel="ms of a request")
right.set_ylim(0, 1.2 * max(a + b))
_ = right.legend()

# %% [markdown]
# ### The whole tool, twice
#
# `measure_latency` is what `ridgeline bench latency` calls: it makes a *result document* with every sample,
# seeds, settings and the environment. `compare` takes two of them and says for each metric whether a
# difference is shown, with Holm's method over all metrics. These two runs are *not* interleaved: each is
# done in one go.

# %%
options = LatencyOptions(input_len=64, output_len=17, batch_size=1)
repeats = RepeatOptions(num_iters=20, num_iters_warmup=2, max_time=lesson.pick(3, 20))
config = EngineConfig.from_options("smollm2", device=lesson.device)
documents = [measure_latency(config, options, repeats) for _ in range(2)]
found = compare(*documents)
lesson.table(
    "two_runs",
    [
        {
            "metric": m.name,
            "first": m.median_a,
            "second": m.median_b,
            "ratio": m.ratio,
            "low": m.low,
            "high": m.high,
            "p (Holm)": m.p_value,
            "verdict": m.verdict,
        }
        for m in found.metrics
    ],
    {"first": ".4g", "second": ".4g", "ratio": ".3f", "low": ".3f", "high": ".3f", "p (Holm)": ".2f"},
)
tpot = next(m for m in found.metrics if m.name == "tpot_ms")
lesson.record("same_percent", 100 * abs(tpot.ratio - 1))
lesson.record("stopped", documents[0]["details"]["stopped"])
lesson.record("num_iters", documents[0]["details"]["num_iters"])
lesson.record("num_changed", len(found.changed))
lesson.claim(
    "two-runs-agree",
    "Two runs of the same benchmark agree: the medians of TPOT are within 5 %.",
    value=100 * abs(tpot.ratio - 1),
    claimed=(0, 5),
    band=(0, 60),
    unit="%",
    because="the machine is shared and changed between the two runs; the table says for each metric "
    "whether its interval noticed",
)
lesson.say(
    """The first run stopped after {num_iters} repetitions because of "{stopped}" (*precise*: every
    interval is narrow enough; *time*: the time was over first, and then the numbers are not to be
    trusted to 5 %). The environments and settings of the two differ in {num_changed} entries."""
)

# %% [markdown]
# A few lines of what a document records about where it was measured. Without them no two numbers can be
# compared:

# %%
place = environment()
lesson.table(
    "environment",
    [
        {"what": "processor", "value": str(place["cpu"]["model"])},
        {"what": "cores", "value": str(place["cpu"]["cores_usable"])},
        {"what": "instructions", "value": ", ".join(place["cpu"]["flags"])},
        {"what": "system", "value": f"{place['os']}, kernel {place['kernel']}"},
        {"what": "Python, Ridgeline", "value": f"{place['python']}, {place['ridgeline']}"},
        {"what": "variables", "value": ", ".join(place["variables"]) or "none that matter"},
    ],
)
committed = lesson.committed("docs/results/repeatability.json")["summary"]
lesson.record("trials", committed["trials"])
lesson.record("all_overlap", committed["all_overlap"])
lesson.record("worst_percent", 100 * max(committed["largest_difference"].values()))
lesson.record("widest", 100 * max(committed["largest_half_width"].values()))
lesson.record("widest_drift", 100 * committed["with_drift"]["largest_half_width"])
lesson.say(
    """Such a pair was measured {trials} times for a committed file (`docs/results/repeatability.json`,
    made by `scripts/check_repeatability.py`): processes that take turns, 120 repetitions each. In
    {all_overlap} of {trials} pairs the intervals in turns of all five metrics overlapped, none of them
    wider than ± {widest:.1f} %; the medians of a pair differed by at most {worst_percent:.1f} %. With the
    drift of the machine, the same medians were known to ± {widest_drift:.0f} % in the worst case."""
)

# %% [markdown]
# ### Percentiles need samples
#
# Now the tail. A small mixed load: requests come and go, eight at a time, and each new prompt makes the
# others wait for a moment. We collect every gap between two tokens (*ITL*) of every request, call what all
# of them together say the truth, and then see what somebody with fewer samples would have reported: many
# random draws of $n$ of them.

# %%
load = Workload(
    name="mixed",
    num_requests=lesson.pick(32, 120),
    prompt_lens=Uniform(16, 192),
    output_lens=Fixed(33),
    max_concurrency=8,
)
requests = load.requests(vocab_size=engine.model.config.vocab_size, seed=5)
gaps = [1e3 * gap for record in drive(engine, requests, max_concurrency=8) for gap in record.itl_s]
truth = {q: percentile(gaps, q) for q in (50, 95, 99)}
draws = random.Random(9)
sizes, rows, estimates = (10, 20, 50, 100, 300, 1000), [], {}
for n in sizes:
    chosen = [draws.choices(gaps, k=n) for _ in range(400)]
    for q in truth:
        estimates[q, n] = [percentile(draw, q) for draw in chosen]
    near = {q: sum(abs(e / truth[q] - 1) <= 0.1 for e in estimates[q, n]) / 400 for q in truth}
    missed = sum(max(draw) <= truth[99] for draw in chosen) / 400
    rows.append(
        {
            "samples": n,
            **{f"P{q} within 10 %": near[q] for q in truth},
            "none beyond P99": missed,
            "0.99^n": 0.99**n,
        }
    )
lesson.table("percentiles", rows, {key: ".0%" for key in rows[0] if key != "samples"})

# %%
lesson.record("num_gaps", len(gaps))
lesson.record("p50", truth[50])
lesson.record("p99", truth[99])
lesson.record("tail", truth[99] / truth[50])
lesson.record("lucky_p99", rows[1]["P99 within 10 %"])
lesson.say("""From {num_gaps:,} gaps: median {p50:.1f} ms, P99 {p99:.1f} ms, {tail:.1f} times as much.""")
beyond = [max(draws.choices(gaps, k=20)) <= truth[99] for _ in range(4000)]
lesson.claim(
    "p99-of-twenty",
    "P99 can be read off twenty samples (share of attempts within 10 % of the truth).",
    value=rows[1]["P99 within 10 %"],
    claimed=(0.9, 1),
    band=(0, 0.85),
    because="in most draws of twenty not one sample lies beyond the real P99, so nothing in them knows of it",
)
lesson.claim(
    "p99-unseen",
    "Of twenty samples, none lies beyond the real P99 in 82 of 100 cases (0.99 to the power of 20).",
    value=sum(beyond) / len(beyond),
    claimed=(0.77, 0.87),
    band=(0.77, 0.87),
)

# %%
drawing, axes = figure(
    "What you would report from n samples (middle 90 % of attempts)", x="samples", y="ms between tokens"
)
for number, q in enumerate(truth):
    ordered = [sorted(estimates[q, n]) for n in sizes]
    axes.fill_between(
        sizes,
        [o[20] for o in ordered],
        [o[-21] for o in ordered],
        color=f"C{number}",
        alpha=0.3,
        label=f"P{q}",
    )
    axes.axhline(truth[q], color=f"C{number}", ls="--", lw=1)
axes.set(xscale="log", ylim=(0, None))
_ = axes.legend()

# %% [markdown]
# The dashed lines are the truth. P50 is found with a few dozen samples; P99 comes from *below* and needs
# hundreds. So `ridgeline bench` does not state a P95 below 20 samples or a P99 below 100, and even those
# are the least that can be defended.
#
# ## Where it does not help
#
# - **An interval knows only the noise that it saw.** It is about repeating *this* run in *this* process.
#   Where memory happened to be placed, how the library was linked, what the neighbour on the host does
#   tomorrow: all of that stays the same within a run and differs between runs. That is why the intervals of
#   `ridgeline bench` are widened by half a percent for each process, a number found by a pilot, and why a
#   claim between machines needs several machines.
# - **More samples do not mend a wrong question.** Prompts of 512 random tokens say nothing about a chat
#   with a system prompt; the third trap above stays a trap with a million samples.
# - **A small difference may be real and not worth it.** With enough samples 0.3 % becomes "significant".
#   Decide before you measure which difference would matter.
#
# ## Exercises

# %%
lesson.exercise("samples-for-p99")

# %% [markdown]
# How many samples do you need so that with a probability of at least 95 % at least one of them lies beyond
# the true P99? (The smallest such number.)

# %%
samples_for_p99 = ...
lesson.check("samples-for-p99", samples_for_p99)

# %% tags=["solution"]
samples_for_p99 = next(n for n in range(1, 1000) if 1 - 0.99**n >= 0.95)
print(samples_for_p99)
lesson.check("samples-for-p99", samples_for_p99)

# %% tags=["wrong"]
lesson.refuses("samples-for-p99", 100)
lesson.refuses("samples-for-p99", 95)
lesson.refuses("samples-for-p99", 298)
lesson.refuses("samples-for-p99", 59)

# %%
lesson.exercise("false-alarm")

# %% [markdown]
# You compare seven independent metrics of two versions that do not differ at all, each so that chance gives
# a false alarm in 5 of 100 cases, and you do not correct for their number. With which probability do you
# report at least one difference?

# %%
false_alarm = ...
lesson.check("false-alarm", false_alarm)

# %% tags=["solution"]
false_alarm = 1 - 0.95**7
lesson.check("false-alarm", false_alarm)

# %% tags=["wrong"]
lesson.refuses("false-alarm", 7 * 0.05)
lesson.refuses("false-alarm", 0.05)
lesson.refuses("false-alarm", 0.95**7)

# %%
lesson.exercise("speedup-to-claim")

# %% [markdown]
# Twelve TTFTs of the old version and twelve of the new one, in ms:

# %%
old = [52.1, 49.8, 55.3, 50.6, 51.9, 58.8, 50.2, 53.4, 49.9, 51.2, 54.7, 50.8]
new = [48.9, 47.5, 53.0, 49.6, 48.1, 50.3, 47.2, 55.9, 48.4, 47.9, 50.7, 48.8]

# %% [markdown]
# By the medians the new version looks faster. Which factor may you *claim*, "at least so many times as
# fast", with 95 % confidence? Use `difference(new, old)` (the ratio of old to new, with its interval), and
# answer with the number that belongs into that sentence.

# %%
speedup_to_claim = ...
lesson.check("speedup-to-claim", speedup_to_claim)

# %% tags=["solution"]
result = difference(new, old)
speedup_to_claim = result.low
print(f"medians {result.ratio:.3f}, interval {result.low:.3f} to {result.high:.3f}, p {result.p_value:.3f}")
lesson.check("speedup-to-claim", speedup_to_claim)

# %% tags=["wrong"]
lesson.refuses("speedup-to-claim", result.ratio)
lesson.refuses("speedup-to-claim", result.high)
lesson.refuses("speedup-to-claim", 1 / result.ratio)

# %%
llm.close()

# %% [markdown]
# ## The answer
#
# One number is larger than another if the interval of their ratio does not contain 1, taken from
# repetitions that were warm, new, interleaved, and many enough; and it is a fact about *that* machine, load
# and version, which is why they are written down beside it. Everything else is an anecdote.

# %%
lesson.answer()

# %% [markdown]
# ## In production
#
# - **vLLM**: `vllm bench serve` and `vllm bench latency` (`--num-warmups`, `--seed`, `--percentile-metrics
#   ttft,tpot,itl --metric-percentiles 50,95,99`); `--ignore-eos` fixes the work; mind that prefix caching
#   is on by default.
# - **SGLang**: `python -m sglang.bench_serving` (`--flush-cache` clears the prefix cache before a run),
#   `bench_one_batch`.
# - **llama.cpp**: `llama-bench -r 5` prints mean ± standard deviation of its repetitions, back to back,
#   which see only the noise of those seconds.
# - **TensorRT-LLM**: `trtllm-bench throughput|latency` with `--warmup`.
# - On your own hardware: fix clocks (`nvidia-smi -lgc`, the `performance` governor), pin threads, leave one
#   core to the system. On a cloud machine you cannot: interleave.
# - Here: `ridgeline bench latency -m smollm2 --save-result a.json`, and `ridgeline bench compare a.json
#   b.json`. Two of them started at the same time take turns by themselves.
#
# ## Reading list
#
# - Mytkowicz et al., *Producing Wrong Data Without Doing Anything Obviously Wrong!* (ASPLOS 2009): the size
#   of the environment changes the speed.
# - Georges, Buytaert, Eeckhout, *Statistically Rigorous Java Performance Evaluation* (OOPSLA 2007).
# - Hesterberg, *What Teachers Should Know About the Bootstrap* (2015), arXiv 1411.5279: when intervals are
#   too narrow.
# - Politis, Romano, *A Circular Block-Resampling Procedure for Stationary Data* (1992).
# - Dean, Barroso, *The Tail at Scale* (2013): why P99 matters.
# - `docs/results-schema.md` and `ridgeline/bench/` in this repository.
