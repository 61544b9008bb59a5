# %% [markdown]
# ## The question
#
# While a model writes, it keeps two vectors of every token it has seen, a **key** and a **value**, in every
# layer: the **KV cache** ([INF-10](INF-10.ipynb)). A server writes many answers at once
# ([INF-30](INF-30.ipynb)), so the cache is a large piece of memory that many requests share. Think of it as
# a row of numbered places, each large enough for the keys and values of one token in all layers. We call
# such a place a **slot**.
#
# When a request arrives, it must get slots. How many? Its prompt is known, but nobody knows how long the
# answer will be. The simple solution, which nearly all engines used until 2023, is to be safe: give each
# request as many slots as the longest request may have (`max_model_len`), side by side, and keep them for
# it until it is finished. This is the **contiguous** layout. It is simple and never runs out in the middle
# of an answer. But most requests are far shorter than the longest that is allowed, and their empty slots
# cannot be used by anybody else.
#
# **PagedAttention** (Kwon et al., 2023, the idea that vLLM was built on) does what operating systems do
# with the memory of programs. It cuts the cache into small **blocks** of a few slots, also called pages. A
# request gets a block when it needs one, from anywhere, and a list called the **block table** remembers
# which blocks it has, in the order of the text.
#
# Three numbers are quoted whenever PagedAttention is explained. Contiguous caches waste 60 to 80 % of their
# memory; paged ones waste less than 4 %; and with the memory that is saved, a server is 2 to 4 times as
# fast. We will measure all three, and the price, which is quoted less often: the attention kernel (the
# compiled routine that reads keys and values) has to look up where each block is.
#
# Your prediction first. Take traffic like that of a chat service: prompts of about 160 tokens, answers of
# about 340, and a limit of 2,048 tokens for both together. Which percentage of the reserved slots of a
# contiguous cache holds nothing?

# %%
from ridgeline import LLM, SamplingParams
from ridgeline.bench.drive import drive
from ridgeline.bench.simulate import simulate
from ridgeline.bench.throughput import samples_of
from ridgeline.bench.workload import LogNormal, Workload
from ridgeline.config import EngineConfig
from ridgeline.course import Lesson, figure, ratio
from ridgeline.kvcache.block_pool import BlockPool
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.kvcache.manager import BlockManager
from ridgeline.models.load import describe_model
from ridgeline.models.locate import locate_model
from ridgeline.models.synth import describe_preset
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.ops.program import StepShape
from ridgeline.profiling.machine import describe_device
from ridgeline.profiling.measured import measure_decode, measure_ops, measure_prefill
from ridgeline.profiling.roofline import Predictor

lesson = Lesson("INF-31")
lesson.predict("contiguous_waste", None, unit="%")
lesson.predict("more_requests", None, unit="x")

# %% [markdown]
# (The second prediction: how many times as many requests run at once when the same memory is paged?)
#
# ## The arithmetic
#
# ### What a slot costs
#
# A token leaves one key and one value in each layer, for each KV head, of `head_dim` numbers each:
#
# $$\text{bytes per slot} =
# 2 \cdot \text{layers} \cdot \text{KV heads} \cdot \text{head dim} \cdot \text{bytes per number}$$
#
# For our model, SmolLM2-135M with a float16 cache:

# %%
model = describe_model(locate_model("smollm2")).config
lesson.record("slot_bytes", CacheLayout.bytes_per_token(model, "float16"))
lesson.record("layers", model.num_layers)
lesson.record("kv_heads", model.num_kv_heads)
lesson.record("head_dim", model.head_dim)
lesson.record("request_mb", lesson.values["slot_bytes"] * 2048 / 1e6)
lesson.say("""
2 · {layers} layers · {kv_heads} KV heads · {head_dim} numbers · 2 bytes = **{slot_bytes:,} bytes a slot**.
A contiguous request with a limit of 2,048 tokens reserves 2,048 such slots: {request_mb:.0f} MB, for a
model whose weights take about 100 MB.
""")

# %% [markdown]
# ### How much of it is used
#
# We count slots in three ways:
#
# - **reserved**: slots that requests hold, so that nobody else can have them;
# - **stored**: slots in which there really is the key and the value of a token;
# - **waste**: the part of the reserved slots that stores nothing, $1 - \text{stored} / \text{reserved}$.
#
# Take a request with $P$ prompt tokens that writes $O$ tokens. In its first step it stores its prompt, $P$
# tokens; each step after that adds one. Over its $O$ steps it stores $P + (O-1)/2$ tokens on average.
#
# Now look into the server at some moment. Which requests will you find there? Not all kinds equally often:
# a request that writes 500 tokens is there for ten times as many steps as one that writes 50. So the mean
# over the requests *in the cache* must count each request as often as it has steps:
#
# $$L = \frac{\sum_i O_i \, \bigl(P_i + (O_i - 1)/2\bigr)}{\sum_i O_i}$$
#
# $L$ is all we need to know about the traffic. With a limit of $M$ tokens (`max_model_len`), the contiguous
# layout reserves $M$ slots a request and stores $L$:
#
# $$\text{waste}_\text{contiguous} = 1 - \frac{L}{M}$$
#
# In the paged layout a request holds whole blocks of $B$ slots. All of them are full but the last one,
# which has between 0 and $B-1$ empty slots. All of these are equally likely, so $(B-1)/2$ on average. So it
# reserves $L + (B-1)/2$ slots, and
#
# $$\text{waste}_\text{paged} = \frac{(B-1)/2}{L + (B-1)/2}$$
#
# Notice what is *not* in the second formula: the limit $M$. What a request might become no longer costs
# anything; only what it is.
#
# And a cache of $S$ slots has room for $S/M$ requests in one layout and for $S / (L + (B-1)/2)$ in the
# other.
#
# ### With numbers
#
# The paper measured with conversations from ShareGPT, whose prompts have 161 tokens on average and whose
# answers 338, and with short instructions from Alpaca, with 19 and 58. We do not have their texts, and do
# not need them, because only lengths matter here. Two workloads with lengths of a log-normal distribution
# (many short, few very long, as people write) come close to these means. `LogNormal(110, 0.875, 1, 1024)`
# says: half of the prompts have fewer than 110 tokens, 0.875 is how widely they are spread, and none has
# fewer than 1 or more than 1,024.

# %%
LIMIT, SLOTS = 2048, 16_384
chat = Workload(
    name="chat",
    num_requests=128,
    prompt_lens=LogNormal(110, 0.875, 1, 1024),
    output_lens=LogNormal(280, 0.6, 1, 1000),
    seed=1,
)
short = Workload(
    name="short",
    num_requests=128,
    prompt_lens=LogNormal(16, 0.6, 1, 256),
    output_lens=LogNormal(40, 0.85, 1, 512),
    seed=1,
)
lengths = {
    w.name: [(len(r.prompt_token_ids), r.max_tokens) for r in w.requests(vocab_size=model.vocab_size, seed=0)]
    for w in (chat, short)
}
stored = {
    name: sum(o * (p + (o - 1) / 2) for p, o in pairs) / sum(o for _, o in pairs)
    for name, pairs in lengths.items()
}
lesson.table(
    "traffic",
    [
        {
            "traffic": name,
            "mean prompt": sum(p for p, _ in pairs) / len(pairs),
            "mean answer": sum(o for _, o in pairs) / len(pairs),
            "L: stored by a request in the cache": stored[name],
        }
        for name, pairs in lengths.items()
    ],
    {"mean prompt": ".0f", "mean answer": ".0f", "L: stored by a request in the cache": ".0f"},
)


# %%
def paged_waste(mean_stored, block_size):
    return (block_size - 1) / 2 / (mean_stored + (block_size - 1) / 2)


predicted = {
    (name, block_size): 1 - mean / LIMIT if block_size == LIMIT else paged_waste(mean, block_size)
    for name, mean in stored.items()
    for block_size in (32, 64, 128, 256, 512, LIMIT)
}
lesson.record("predicted_contiguous", 100 * predicted["chat", LIMIT])
lesson.record("predicted_paged", 100 * predicted["chat", 32])
lesson.record("predicted_seats", SLOTS // LIMIT)
lesson.record("predicted_requests", SLOTS / (stored["chat"] + 15.5))
lesson.say("""
So the arithmetic says, for the chat traffic: contiguous wastes **{predicted_contiguous:.1f} %**, blocks of
32 waste **{predicted_paged:.1f} %**; a cache of 16,384 slots has room for {predicted_seats} contiguous
requests or for about {predicted_requests:.0f} paged ones. Nothing has run yet.
""")

# %% [markdown]
# ## The real thing
#
# ### Who owns the blocks
#
# Two small objects do all of it. `BlockPool` owns the blocks: it knows which are free. Here is how it gives
# some away:

# %%
lesson.source(BlockPool.allocate)

# %% [markdown]
# Read it once with the question "which block does a request get?". The answer is: whichever is first in the
# list of free ones. (A block that is given back goes to the front of this list, if nothing in it is kept for
# later, so it is the next to be used.) No search for a gap that is long enough, no moving of others to make
# one: every block is as good as every other. This is why paging has no *external* fragmentation (gaps between
# requests that are free but too small). What remains is *internal* fragmentation: the empty end of each
# request's last block. (`ref_count` says how many requests hold a block; here it is 0 or 1. It and the lines
# about `content` are for prefix caching, [INF-33](INF-33.ipynb), which is switched off in this notebook.)
#
# `BlockManager` owns the block tables. Before every **step** (one pass through the model, which computes
# the next token of every running request), the scheduler asks it for room for the tokens that the step will
# add:

# %%
lesson.source(BlockManager.allocate)

# %% [markdown]
# `num_missing` is nearly always 0: a request that writes one token a step needs a new block only in every
# $B$-th step. If there is no block, the answer is `False`, and the scheduler must do something about it; we
# come to that. (`_drop_behind_window` is for models whose attention sees only the newest tokens; for ours it
# does nothing.)
#
# How is the contiguous layout made in this engine? It is the same code with one setting:
# `kv_layout="contiguous"` means that a block has `max_model_len` slots, so that each request gets exactly
# one. Everything else is equal, which is what makes the comparison fair.
#
# ### Three requests, followed
#
# Three requests with prompts of 40 tokens. The first shall write 12 tokens, the others 60. We look at the
# block tables after every step and print them when they change.

# %%
rows, table = [], ()
with LLM(
    "smollm2", device=lesson.device, max_model_len=256, kv_cache_tokens=512, enable_prefix_caching=False
) as llm:
    for count in (12, 60, 60):
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        llm.engine.add_request({"prompt_token_ids": list(range(100, 140))}, params)
    while llm.engine.has_unfinished:
        llm.engine.step()
        held = llm.engine.scheduler.snapshot().tables
        shown = {f"request {i}": str(held.get(f"req-{i}", "finished")) for i in range(3)}
        if not rows or shown.items() - rows[-1].items():
            rows.append({"after step": str(llm.engine.stats.num_steps)} | shown)
        table = held.get("req-1", table)
lesson.table("tables", rows)

# %% [markdown]
# In the first step each request gets two blocks, because 40 tokens do not fit into one of 32. When the first
# request has written its 12 tokens, it is finished, and its blocks are free at once. When the other two have
# more than 64 tokens, they need a third block, and get those that the first request left: they are at the
# front of the list of free blocks, before those that were never used. Their tables are now out of order: the
# third block of the text lies *before* the first one in memory. In step 58 they need a fourth. Nobody minds
# the order.
#
# Where, then, is a token? The token at position $p$ of the text is in entry $\lfloor p/B \rfloor$ of the
# block table, at offset $p \bmod B$ inside that block:
#
# $$\text{slot} = \text{table}[\lfloor p / B \rfloor] \cdot B + p \bmod B$$
#
# The engine computes this for all tokens of a step at once and calls it the **slot mapping**. It is one array
# in the `ForwardBatch`, which is what an executor gets. Let us ask for the slots of the positions 60 to 67 of
# the second request (*request 1* in the table; the eight token ids do not matter), with the table that it had
# at the end:

# %%
batch = ForwardBatch.from_rows(
    [Row(token_ids=range(8), start=60, block_ids=table, num_logits=1)], block_size=32
)
lesson.table(
    "slots",
    [
        {"position": int(p), "entry of the table": int(p) // 32, "block": table[int(p) // 32], "slot": int(s)}
        for p, s in zip(batch.positions, batch.slot_mapping, strict=True)
    ],
)

# %% [markdown]
# Between position 63 and position 64 the slot jumps to another part of the memory. That jump, once in 32
# tokens, is the whole indirection. When the attention kernel reads the keys and values of this request, it
# follows the same table, one block after the other. On a CPU the kernel works on one **tile** at a time, the
# keys and values of 32 tokens ([INF-20](INF-20.ipynb)). A block must be one tile or several whole ones, which
# is why our block sizes are multiples of 32.
#
# ### The same tokens
#
# Where keys and values lie must not change what is computed. So both layouts have to write exactly the same
# tokens. We let both answer the same prompts, several at once, in a cache that is small enough that blocks
# are used again:

# %%
prompts = [{"prompt_token_ids": list(range(200 + 31 * i, 230 + 38 * i))} for i in range(12)]
params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
answers = {}
for layout in ("contiguous", "paged"):
    with LLM(
        "smollm2",
        device=lesson.device,
        kv_layout=layout,
        max_model_len=256,
        kv_cache_tokens=1024,
        max_num_seqs=6,
        enable_prefix_caching=False,
    ) as llm:
        answers[layout] = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
different = sum(a != b for a, b in zip(answers["contiguous"], answers["paged"], strict=True))
lesson.claim(
    "different-answers",
    "PagedAttention is exact: of 12 answers, the number that differ between the layouts",
    value=different,
    claimed=(0, 0),
    band=(0, 0),
)

# %% [markdown]
# ## Measurement
#
# ### Waste
#
# To measure waste we need to see every step of a long run. `simulate` gives us that in a second: it runs
# the engine's own scheduler and block manager, but puts a formula for the duration of a step in the place
# of the model ([INF-30](INF-30.ipynb)). All requests are there at the start (the default of `Workload`), so
# which request gets which slots does not depend on how fast the steps are. `clock` may therefore be any
# formula; ours, 4 ms a step and 0.5 ms a token, is invented. `on_step` sees the
# plan of each step: for each request, its place in the text, its new tokens, and its block table.


# %%
def clock(rows, num_logits, num_shared_keys):
    return 0.004 + 0.0005 * sum(num_new for num_new, seq_len in rows)


def options_of(block_size, *, slots=SLOTS, limit=LIMIT, seats=64, **more):
    layout = {"kv_layout": "contiguous"} if block_size == limit else {"block_size": block_size}
    common = {"max_model_len": limit, "kv_cache_tokens": slots, "max_num_seqs": seats}
    return {"executor": "native", "enable_prefix_caching": False} | common | layout | more


def follow(workload, block_size, on_step, step_s=clock, **more):
    config = EngineConfig.from_options("smollm2", **options_of(block_size, **more))
    requests = workload.requests(vocab_size=model.vocab_size, seed=0)
    return simulate(config, model, requests, step_s, on_step=on_step)


def used(plan):
    return sum(row.start + len(row.token_ids) for row in plan.rows)


def reserved(plan, block_size):
    return block_size * sum(len(row.block_ids) for row in plan.rows)


# %%
plans, runs, waste = {}, {}, {}
for workload in (chat, short):
    for block_size in (32, 64, 128, 256, 512, LIMIT):
        key = (workload.name, block_size)
        plans[key] = []
        runs[key] = follow(workload, block_size, plans[key].append)
        total = sum(reserved(plan, block_size) for plan in plans[key])
        waste[key] = 1 - sum(map(used, plans[key])) / total
lesson.table(
    "waste",
    [
        {
            "traffic": name,
            "slots in a block": f"{block_size} (contiguous)" if block_size == LIMIT else str(block_size),
            "predicted waste, %": 100 * predicted[name, block_size],
            "measured waste, %": 100 * value,
            "most requests at once": max(step.num_running for step in runs[name, block_size].steps),
        }
        for (name, block_size), value in waste.items()
    ],
    {"predicted waste, %": ".1f", "measured waste, %": ".1f"},
)

# %%
drawing, axes = figure("Waste of a KV cache by block size", x="slots in a block", y="reserved and empty, %")
sizes = range(8, LIMIT + 1, 8)
for name, color in (("chat", "C0"), ("short", "C1")):
    curve = [100 * paged_waste(stored[name], size) for size in sizes]
    axes.plot(sizes, curve, "--", color=color, linewidth=1.2, label=f"{name}: arithmetic")
    points = [(size, 100 * value) for (of, size), value in waste.items() if of == name]
    axes.plot(*zip(*points, strict=True), "o", color=color, markersize=7, label=f"{name}: measured")
axes.axhline(4, color="C5", linewidth=1)
axes.annotate("the famous 4 %", (600, 5.2), color="C5", fontsize=9)
axes.set_xscale("log", base=2)
ticks = (8, 32, 128, 512, LIMIT)
axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
axes.set_ylim(0, 100)
_ = axes.legend()

# %% [markdown]
# (*Most requests at once* is a peak, and bounded by our 64 seats too: at the start all requests are young and
# small, so more of them fit than the arithmetic says for the average. The average comes below.)
#
# The dashed lines are the paged formula for any block size. The points sit on it as long as a block is small
# beside a request. Where blocks get as long as whole requests, "every number of empty slots is equally
# likely" is no longer true: a request of 60 tokens in a block of 256 leaves 196 empty, never 3. So the
# points rise above the line, and at the right end, where a block is as long as the limit, they reach the
# contiguous formula. The two layouts are the two ends of one scale.

# %%
lesson.record("contiguous_waste", 100 * waste["chat", LIMIT])
lesson.record("long_limit_waste", 100 * (1 - stored["chat"] / 4096))
lesson.record("short_limit_waste", 100 * (1 - stored["chat"] / 1536))
lesson.claim(
    "waste-contiguous",
    "Contiguous caches waste 60 to 80 % of what they reserve (chat traffic, limit 2,048)",
    value=100 * waste["chat", LIMIT],
    claimed=(60, 80),
    band=(80, 82),
    unit="%",
    because="the figure is no constant: waste is 1 - L/M, so a limit of 1,536 tokens would give "
    "{short_limit_waste:.0f} % for the same traffic, one of 4,096 {long_limit_waste:.0f} %. The "
    "order of magnitude is right, and for long limits too kind",
)
lesson.claim(
    "waste-paged",
    "Paged caches waste less than 4 % (chat traffic, blocks of 32)",
    value=100 * waste["chat", 32],
    claimed=(0, 4),
    band=(3.6, 4.0),
    unit="%",
)
lesson.record("short_stored", stored["short"])
lesson.claim(
    "waste-paged-short",
    "Paged caches waste less than 4 %, for short requests as well (blocks of 32)",
    value=100 * waste["short", 32],
    claimed=(0, 4),
    band=(16, 18),
    unit="%",
    because="half a block is empty whatever the request, and a short one stores only {short_stored:.0f} "
    "tokens on average; by the same formula, blocks of 8 slots would still be above 4 %, and only blocks of "
    "4 or fewer below it",
)

# %% [markdown]
# The most instructive picture is the cache itself. Both halves show the same traffic in the same 16,384
# slots. Light is what was reserved, dark what was stored.

# %%
drawing, panels = figure(
    "Slots of the cache over the run, chat traffic", x="step", y="slots", panels=2, size=(10.4, 4.0)
)
for axes, (title, size) in zip(panels, (("contiguous", LIMIT), ("paged, blocks of 32", 32)), strict=True):
    steps = range(len(plans["chat", size]))
    axes.fill_between(
        steps, [reserved(p, size) for p in plans["chat", size]], color="#b6d4fe", label="reserved"
    )
    axes.fill_between(steps, [used(p) for p in plans["chat", size]], color="C0", label="stored")
    axes.set_title(title)
    axes.set_ylim(0, SLOTS * 1.05)
    axes.set_xlim(0, len(plans["chat", LIMIT]))
_ = panels[1].legend(loc="upper right")

# %% [markdown]
# Left, the cache is full nearly all the time, and four fifths of it are empty inside. Right, it is full and
# used, and all the work is done in a fraction of the steps. The paged run has a tail, as every run has: when
# no requests are waiting any more, the last long answers finish alone.
#
# ### More requests at once
#
# How many requests run at the same time? We average over the steps in which others were waiting for room,
# and leave out the tail.

# %%
full = {size: [s.num_running for s in runs["chat", size].steps if s.num_waiting] for size in (32, LIMIT)}
running = {size: sum(counts) / len(counts) for size, counts in full.items()}
lesson.record("running_paged", running[32])
lesson.record("running_contiguous", running[LIMIT])
lesson.claim(
    "more-requests",
    "The same memory holds 4 times as many requests, or more, when it is paged (chat traffic)",
    value=running[32] / running[LIMIT],
    claimed=(4, None),
    band=(4.7, 5.8),
    unit="x",
)
lesson.say("""
{running_paged:.1f} requests against {running_contiguous:.1f}; the arithmetic said {predicted_requests:.0f}
against {predicted_seats}. The paper reports 4.3 times as many as the contiguous cache of its time held, for
ShareGPT on a model of 13 billion parameters. (Why a little more than the arithmetic? Because the requests
that were let in together are young together: they store less than the average at first.)
""")

# %% [markdown]
# ### Does that make the server faster? On this machine
#
# More requests at once share one read of the weights ([INF-12](INF-12.ipynb)), so a step with many requests
# costs less *per request*. How much less depends on the machine, and it can be measured before any
# scheduling: the duration of a decode step (one in which every request writes one token) with 4 and with 16
# requests, $t_4$ and $t_{16}$. (Four is what the contiguous layout has room for below, and 16 is the number
# of seats.) A step with 16 requests writes 16 tokens in $t_{16}$ seconds, so
#
# $$\text{speed-up} \le \frac{16 / t_{16}}{4 / t_4}$$
#
# Now the real engine, both layouts in the same 2,048 slots with a limit of 512: 4 contiguous requests, or
# as many paged ones as fit. `drive` sends the requests and runs the engine to the end; the figure is output
# tokens a second. The layouts run in turn, so that a slow moment of the machine hits both. `step_line` is the
# model of the machine from [INF-30](INF-30.ipynb): a constant for each step, so much for each request that
# writes a token, so much for each token of a prompt.

# %%
small = Workload(
    name="small",
    num_requests=lesson.pick(24, 96),
    prompt_lens=LogNormal(40, 0.8, 1, 200),
    output_lens=LogNormal(70, 0.6, 1, 300),
    seed=3,
)
requests = small.requests(vocab_size=model.vocab_size, seed=0)
shared = {"slots": 2048, "limit": 512, "seats": 16, "executor": None, "device": lesson.device}
engines = {size: LLM("smollm2", **options_of(size, **shared)) for size in (512, 32)}


def tokens_per_s(size):
    return samples_of(drive(engines[size].engine, requests))["output_throughput"][0]


# %%
four_s, sixteen_s = (measure_decode(engines[32].engine, batch, 64) for batch in (4, 16))
row_s = (sixteen_s - four_s) / 12
prompt_token_s = measure_prefill(engines[32].engine, 256) / 256
lesson.record("bound", (16 / sixteen_s) / (4 / four_s))
lesson.record("ms_4", 1000 * four_s)
lesson.record("ms_16", 1000 * sixteen_s)


def step_line(rows, num_logits, num_shared_keys):
    decodes = sum(num_new == 1 for num_new, seq_len in rows)
    prompts = sum(num_new for num_new, seq_len in rows if num_new > 1)
    return four_s - 4 * row_s + decodes * row_s + prompts * prompt_token_s


foreseen = {size: follow(small, size, None, step_line, slots=2048, limit=512, seats=16) for size in engines}
lesson.record("foreseen", foreseen[512].duration_s / foreseen[32].duration_s)
lesson.say("""
A step with 4 requests takes {ms_4:.1f} ms, one with 16 requests {ms_16:.1f} ms. Four times as many requests
are worth **{bound:.2f} times** the tokens a second at most, here. The simulation with these step times,
which also knows of prompts, of the beginning and of the end of the run, says **{foreseen:.2f} times**. That
is the prediction.
""")

# %%
steps = {}
for size, llm in engines.items():
    before = llm.engine.stats.num_steps
    tokens_per_s(size)
    steps[size] = llm.engine.stats.num_steps - before
lesson.claim(
    "simulated-steps",
    "The simulation takes exactly the steps that the engine takes: difference, both layouts together",
    value=sum(abs(len(foreseen[size].steps) - steps[size]) for size in engines),
    claimed=(0, 0),
    band=(0, 0),
    unit="steps",
)
lesson.claim(
    "speedup-here",
    "Paging makes a server 2 to 4 times as fast (real engine, 2,048 slots, this machine)",
    value=lambda: ratio(
        lambda: tokens_per_s(32), lambda: tokens_per_s(512), repeats=lesson.pick(3, 7), warmups=0
    ),
    claimed=(2, 4),
    band=(1.05, 2.0),
    unit="x",
    because="the simulation said {foreseen:.2f}, and the step times allow {bound:.2f} at most: this "
    "processor has little arithmetic to spare, so a step with 16 requests takes much longer than "
    "one with 4",
)
for llm in engines.values():
    llm.close()

# %% [markdown]
# So the memory was used as promised, and the speed grew by much less. The reason is not in the cache.
# (Between the bound and what was measured are the prompts, which cost the same in both layouts, and the end
# of the run, when only a few long answers are left.) A larger batch only helps while reading the weights is
# what a step waits for. A CPU has few arithmetic units for the bandwidth of its memory, so the batch where
# arithmetic takes over comes early.
#
# ### Does that make the server faster? On a GPU, by arithmetic
#
# A GPU is the opposite: it can do a few hundred operations for each byte that it reads, so batches can grow
# to hundreds before arithmetic matters. The scheduler is the same, and so is `simulate`; what we change is
# the model (the shape of Llama 2 7B in BF16, a format of two bytes a number) and the machine: the data sheet
# of an NVIDIA A10 with 24 GB, of which a tenth is left free. The step times are a *bound*: bytes over
# bandwidth, or operations over the most that the GPU can do a second, whichever is longer. No GPU is needed.

# %%
llama, a10 = describe_preset("llama-7b", "BF16"), describe_device("a10")
weight_bytes = sum(weight.num_bytes for weight in llama.weights.values())
room = int(0.9 * a10.memory_bytes) - weight_bytes
gpu = {}
for size in (LIMIT, 32):
    options = options_of(size, slots=None, kv_cache_memory_bytes=room)
    config = EngineConfig.from_options("llama-7b", **options)
    predictor = Predictor.for_model(llama, config, a10)
    gpu[size] = simulate(config, llama.config, chat.requests(vocab_size=1000, seed=0), predictor.step_s)
lesson.record("gpu_weights_gb", weight_bytes / 1e9)
lesson.record("gpu_room_gb", room / 1e9)
lesson.record("gpu_slots", gpu[32].num_kv_tokens)
lesson.table(
    "gpu",
    [
        {
            "layout": "contiguous" if size == LIMIT else "paged",
            "most requests at once": max(step.num_running for step in found.steps),
            "output tok/s": found.num_output_tokens / found.duration_s,
            "preemptions": found.num_preemptions,
        }
        for size, found in gpu.items()
    ],
    {"output tok/s": ".0f"},
)
lesson.say("""
{gpu_weights_gb:.1f} GB of weights leave {gpu_room_gb:.1f} GB for the cache: {gpu_slots:,} slots of half a
megabyte each.
""")
lesson.claim(
    "speedup-gpu",
    "Paging makes a server 2 to 4 times as fast (simulated: shape of Llama 2 7B, data sheet of an A10)",
    value=gpu[LIMIT].duration_s / gpu[32].duration_s,
    claimed=(2, 4),
    band=(2.4, 3.4),
    unit="x",
)

# %% [markdown]
# (*Preemptions* are requests that lost their blocks to others and had to start again; they are the subject
# of a section below.) Here the popular figure holds, and we see where it comes from: all weights are read in
# each step, whether for the few requests of the contiguous layout or for the many of the paged one.
#
# ### The price of indirection
#
# The kernel looks up one number for each block of 32 tokens. What does it read for these tokens? Per layer,
# 32 tokens, 2 for key and value, 3 KV heads, 64 numbers, 2 bytes: $32 \cdot 2 \cdot 3 \cdot 64 \cdot 2$,
# about 25 KB. One look-up of 4 bytes against 25 KB is nothing, so the arithmetic says: no difference. The
# paper measured otherwise for its own GPU kernel: 20 to 26 % more time for attention than a contiguous
# kernel, from the look-ups, from extra tests (`if`) in the kernel and from requests of different lengths in
# one call.
#
# There is a second price that the arithmetic does not see: blocks from all over the memory are harder to
# fetch in advance than blocks side by side. So we measure attention with tables whose blocks are
# *scattered* over the whole cache, as after hours of service, against one contiguous block a request. Only
# the attention instructions count; `measure_ops` times each instruction of a step.

# %%
pair = {size: LLM("smollm2", **options_of(size, seats=8)) for size in (32, LIMIT)}


def attention_s(size, batch, context):
    ops = measure_ops(pair[size].engine, StepShape.decode(batch, context), scatter_seed=batch)
    return sum(seconds for name, seconds in ops.items() if name.startswith("attention"))


def price_of(batch, context):
    both = [lambda size=size: attention_s(size, batch, context) for size in (32, LIMIT)]
    return ratio(*both, repeats=lesson.pick(3, 9), warmups=0)


# %%
lesson.claim(
    "price",
    "Attention over blocks is 20 to 26 % slower than over contiguous memory (8 requests of 2,000 tokens)",
    value=lambda: 100 * price_of(8, 2000) - 100,
    claimed=(20, 26),
    band=(None, 30),
    unit="%",
    because="one look-up pays for 25 KB of keys and values, and the kernel asks for the next tile early, "
    "wherever it is; contiguous memory is no easier to read here",
)
price = {(1, 2000): price_of(1, 2000), (8, 500): price_of(8, 500)}
lesson.table(
    "price",
    [
        {
            "requests": batch,
            "tokens in each": context,
            "paged / contiguous, predicted": 1.0,
            "measured": float(value),
            "quartiles": f"{value.low:.2f} to {value.high:.2f}",
        }
        for (batch, context), value in price.items()
    ],
    {"paged / contiguous, predicted": ".2f", "measured": ".2f"},
)
for llm in pair.values():
    llm.close()

# %% [markdown]
# Nothing like a fifth. Scattered blocks may even be a little faster than contiguous memory; we have not
# looked for the reason, and the figures move from run to run. So take from the table only that we see no such
# price. On a CPU, with blocks as long as the kernel's tiles, indirection is as good as free. On GPUs, too,
# the price has fallen since the paper, because today's kernels are written for tables of pages.
#
# ## Where it does not help
#
# ### Where memory is not the limit
#
# Paging saves memory. If there is room for all requests that may run, nothing is gained. The same chat
# traffic on a server with 8 **seats** (`max_num_seqs`: requests that may run at once), and the 16,384 slots
# that are enough for 8 requests of any length:

# %%
few = {size: follow(chat, size, None, seats=8) for size in (32, LIMIT)}
lesson.claim(
    "no-gain",
    "Paging makes a server faster, also where the contiguous cache has room for every request (8 seats, "
    "simulated)",
    value=few[LIMIT].duration_s / few[32].duration_s,
    claimed=(1.05, None),
    band=(0.999, 1.001),
    unit="x",
    because="both layouts take the same steps: the seats are the limit, not the slots",
)

# %% [markdown]
# This is also the case of a laptop that serves one person. Then a contiguous cache is the simpler program,
# and it is what llama.cpp does.
#
# ### Where the promise was too large
#
# A contiguous request never runs out of room: everything it may ever need is reserved. A paged engine lets
# requests in by what they need *now*, and they grow. When all of them have grown and no block is free,
# `allocate` says `False`, and the scheduler must take the blocks of one request away: **preemption**. The
# request that would be served last (of the lowest priority, and the newest among those) loses its place, goes
# back to the queue, and later computes all of its tokens again. This work is done twice.
#
# The engine keeps a small reserve when it lets a request in (the **watermark**, 1 % of the blocks). Whether
# that is enough depends on how many seats it has. The chat traffic again, with 8,192 slots and more and
# more seats, simulated with `clock`, so compare the speeds only with each other:

# %%
useful = sum(p + o - 1 for p, o in lengths["chat"])  # the last token of an answer is never computed
crowded = {seats: follow(chat, 32, None, slots=8192, seats=seats) for seats in (8, 16, 24, 32, 64)}
lesson.table(
    "seats",
    [
        {
            "seats (max_num_seqs)": seats,
            "output tok/s (by clock)": found.num_output_tokens / found.duration_s,
            "preemptions": found.num_preemptions,
            "computed again, %": 100 * (sum(s.num_tokens for s in found.steps) / useful - 1),
        }
        for seats, found in crowded.items()
    ],
    {"output tok/s (by clock)": ".0f", "computed again, %": ".1f"},
)
again = 100 * (sum(s.num_tokens for s in crowded[64].steps) / useful - 1)
lesson.record("computed_again", again)
lesson.claim(
    "preemption",
    "Paging has no cost in work: tokens computed again with 64 seats in 8,192 slots, simulated",
    value=again,
    claimed=(0, 0),
    band=(10, 60),
    unit="%",
    because="requests are let in by what they hold now; they grow, blocks run out, and some must start over",
)

# %% [markdown]
# With few seats nothing is preempted, and slots stay empty. With many seats every slot is used, but a large
# part of the work is done twice. The best number is in between, near the one that the arithmetic gives for
# the requests that fit, $S / (L + (B-1)/2)$: 20 here, so the best of the five is 16, and 24 is already too
# many. More seats than that do not help; they hurt.
#
# ### Where requests are short
#
# We have seen it in the table of waste: for requests of some 80 tokens, half a block of 32 is a sixth of the
# memory. Smaller blocks would help, at the price of longer tables and shorter pieces for the kernel. Our
# kernel's tile is 32 tokens, so 32 is the smallest block here; vLLM's default is 16.
#
# ## Exercises

# %%
lesson.exercise("slot")

# %% [markdown]
# A request has the block table `(7, 3, 9)`, and a block has 32 slots. In which slot are the key and the
# value of its token at position 70 (the first token has position 0)?

# %%
slot = ...  # a whole number
lesson.check("slot", slot)

# %% tags=["solution"]
table, position, block_size = (7, 3, 9), 70, 32
slot = table[position // block_size] * block_size + position % block_size
lesson.check("slot", slot)

# %% tags=["wrong"]
lesson.refuses("slot", 70)
lesson.refuses("slot", 3 * 32 + 6)
lesson.refuses("slot", 9 + 6)

# %%
lesson.exercise("unused")

# %% [markdown]
# Write a function of a request's number of tokens and the block size that says how many of the slots it
# holds are empty. Try the edges: what if the tokens fill their blocks exactly?


# %%
def unused(num_tokens, block_size):
    return ...


lesson.check("unused", ... if unused(40, 32) is ... else unused)


# %% tags=["solution"]
def unused(num_tokens, block_size):
    return -num_tokens % block_size


lesson.check("unused", unused)

# %% tags=["wrong"]
lesson.refuses("unused", lambda num_tokens, block_size: block_size - num_tokens % block_size)
lesson.refuses("unused", lambda num_tokens, block_size: num_tokens % block_size)

# %%
lesson.exercise("requests-that-fit")

# %% [markdown]
# A GPU has 5 GB (5 · 10⁹ bytes) left for a float16 cache. The model has the shape of Llama 3.1 8B: 32
# layers, 32 query heads, 8 KV heads, 128 numbers a head. The limit is 4,096 tokens, blocks have 16 slots,
# and a request in the cache stores 800 tokens on average. How many requests fit, contiguous and paged?

# %%
requests_that_fit = ...  # (contiguous, paged), whole numbers
lesson.check("requests-that-fit", requests_that_fit)

# %% tags=["solution"]
slots = 5_000_000_000 // (2 * 32 * 8 * 128 * 2)
requests_that_fit = (slots // 4096, int(slots / (800 + 7.5)))
lesson.check("requests-that-fit", requests_that_fit)

# %% tags=["wrong"]
lesson.refuses("requests-that-fit", (2 * slots // 4096, int(2 * slots / 807.5)))
lesson.refuses("requests-that-fit", (slots // 4 // 4096, int(slots / 4 / 807.5)))
lesson.refuses("requests-that-fit", (slots // 4096, slots // 4096))

# %%
lesson.exercise("block-size")

# %% [markdown]
# Your traffic stores 1,500 tokens a request on average, and at most 2 % of the cache may be wasted. Larger
# blocks mean shorter tables. Which is the largest block size, as a power of two, that you can take?

# %%
block_size = ...  # a power of two
lesson.check("block-size", block_size)

# %% tags=["solution"]
block_size = max(size for size in (2**power for power in range(12)) if paged_waste(1500, size) <= 0.02)
lesson.check("block-size", block_size)

# %% tags=["wrong"]
lesson.refuses("block-size", 64)
lesson.refuses("block-size", 16)
lesson.refuses("block-size", 61)

# %% [markdown]
# ## The answer
#
# A contiguous cache reserves for what a request might become, a paged one for what it is. How much is saved
# depends on two numbers: $L$, which you can compute from the lengths of past requests before you run
# anything, and $M$, the limit that you set. Whether the saved memory becomes speed is a property of the
# machine.

# %%
lesson.answer()

# %% [markdown]
# ## In production
#
# - **vLLM** pages everything. `--block-size` (16 by default on most GPUs), `--gpu-memory-utilization` (how
#   much of the memory weights and cache may take; the cache gets the rest), `--max-num-seqs` (seats),
#   `--max-model-len`. Preemption is by computing again, as here; the metric `vllm:num_preemptions_total`
#   should stay near zero, and `vllm:kv_cache_usage_perc` says how full the cache is.
# - **SGLang** manages single slots by default (`--page-size 1`), so that its prefix tree may share any
#   number of tokens; larger pages suit some kernels better. `--mem-fraction-static` sizes the pool.
# - **llama.cpp** has no pages. `-c` is the size of the whole cache and `-np` the number of slots (its word
#   for seats) that share it, with one unified buffer (`-kvu`) or a fixed part for each.
# - **TensorRT-LLM** pages with `tokens_per_block` and sizes the pool by `free_gpu_memory_fraction` in its
#   `KvCacheConfig`.
# - **vAttention** (Prabhu et al., 2024) leaves the paging to the GPU's own virtual memory: the kernel sees
#   one contiguous range, and the driver puts pages under it. There are no tables in the kernel; the
#   driver's pages are larger, so more of the last one stays empty.
# - The paper's second promise is sharing: several answers to one prompt can hold the same blocks. That is
#   where [INF-33](INF-33.ipynb) goes on.
#
# ## Reading list
#
# - Kwon, Li, Zhuang and others, *Efficient Memory Management for Large Language Model Serving with
#   PagedAttention*, SOSP 2023, arXiv 2309.06180. Figure 2 has the waste (contiguous caches stored tokens in
#   20 to 38 % of their memory, vLLM in 96 %), section 7.1 the price of the indirection.
# - The vLLM team, *vLLM: Easy, Fast, and Cheap LLM Serving with PagedAttention*, 2023: the post that the
#   "60 to 80 %" and "under 4 %" are quoted from.
# - Prabhu, Nayak, Mohan, Ramjee and Panwar, *vAttention: Dynamic Memory Management for Serving LLMs without
#   PagedAttention*, arXiv 2405.04437.
# - Denning, *Virtual Memory*, ACM Computing Surveys, 1970: internal and external fragmentation, and why
#   pages of one size end the second.
# - In this repository: `ridgeline/kvcache/block_pool.py` and `ridgeline/kvcache/manager.py`, about 350
#   lines together.
