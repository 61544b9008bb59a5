# %% [markdown]
# ## The question
#
# Many prompts begin alike. A chat service puts the same **system prompt** (instructions for the model,
# often longer than the question) in front of every conversation. A program that works on a long document
# asks ten questions about it. And each turn of a conversation repeats all turns before it.
#
# Before the first token of an answer can be written, the keys and values of all prompt tokens must be
# computed: the prefill ([INF-02](INF-02.ipynb)). The key and the value of a token depend on this token and
# on all before it, and on nothing that comes after. So if two prompts begin with the same 500 tokens, then
# the first 500 keys and values are the same numbers. Why compute them twice?
#
# **Prefix caching** keeps the blocks of finished requests ([INF-31](INF-31.ipynb)) as long as nobody needs
# the room, and lets a new request begin with those that fit. How much sooner does its first token come?
# Anthropic, who sell this as a feature, say "up to 85 %" less latency for long prompts.
#
# Your prediction: a system prompt of 1,024 tokens, followed by a question of 32. How many times as fast is
# the first token when the system prompt is in the cache?

# %%
from itertools import count

from ridgeline import LLM, SamplingParams
from ridgeline.bench.drive import drive
from ridgeline.bench.simulate import simulate
from ridgeline.bench.throughput import samples_of
from ridgeline.bench.workload import Fixed, Workload
from ridgeline.config import EngineConfig
from ridgeline.course import Figure, Lesson, figure, ratio
from ridgeline.kvcache.block_pool import BlockPool, chain_hash
from ridgeline.kvcache.manager import BlockManager
from ridgeline.models.load import describe_model
from ridgeline.models.locate import locate_model
from ridgeline.profiling.measured import measure_prefill

lesson = Lesson("INF-33")
lesson.predict("warm_1024", None, unit="x")

# %% [markdown]
# ## The arithmetic
#
# ### How much is found again
#
# Say that all prompts begin with the same $S$ tokens, that each goes on with $Q$ tokens of its own, and
# that blocks have $B$ slots. Only whole blocks are kept (we will see why), so a request finds
#
# $$\text{hit} = \lfloor S / B \rfloor \cdot B \quad \text{tokens}$$
#
# (A **hit** is a token whose key and value are taken over instead of computed.) The first request finds
# nothing. Of $R$ requests, all others find the prefix, so over all prompt tokens
#
# $$\text{hit rate} = \frac{(R-1) \, \lfloor S/B \rfloor B}{R \, (S + Q)}$$
#
# Two details belong to it. The last token of a prompt is always computed, even if all of it is in the
# cache: its logits decide the first token of the answer, and logits are not kept. And a prefix is only the
# same from the *beginning*: a single different token at the start, say the date, makes everything after it
# different, because every later key and value depends on it.
#
# ### How much time that saves
#
# A prefill of $n$ tokens takes about $t_0 + c\,n$: a constant and so much a token. With the prefix in the
# cache only $Q$ tokens (and the rest of the last block) are left:
#
# $$\frac{\text{TTFT cold}}{\text{TTFT warm}} \approx \frac{t_0 + c\,(S + Q)}{t_0 + c\,(S + Q - \text{hit})}$$
#
# So the gain grows with $S/Q$. It is not a property of the cache but of the traffic: long shared beginning,
# short own end. **TTFT** is the time to the first token; *cold* and *warm* say whether the prefix was
# computed before.
#
# ### With numbers

# %%
BLOCK = 32
model = describe_model(locate_model("smollm2")).config
cached = {"max_model_len": 2304, "kv_cache_tokens": 16_384, "max_num_seqs": 16}
llm = LLM("smollm2", device=lesson.device, **cached)
short_s, long_s = (measure_prefill(llm.engine, n) for n in (32, 544))
token_s = (long_s - short_s) / (544 - 32)
lesson.record("short_ms", 1000 * short_s)
lesson.record("token_ms", 1000 * token_s)


def expected_s(computed):
    return short_s + (computed - 32) * token_s


lesson.record("expected_1024", expected_s(1056) / expected_s(32))
lesson.say("""
Two prefills, of 32 and of 544 tokens, give the line: {short_ms:.1f} ms for 32 tokens, and {token_ms:.2f} ms
for each one more. With 1,024 shared and 32 own tokens the arithmetic says: **{expected_1024:.0f} times** as
fast.
""")

# %% [markdown]
# ## The real thing
#
# ### Finding a block by what it holds
#
# How does a new request know that its first 32 tokens are in block 417? Every full block gets a name that
# is computed from its tokens and from the name of the block before it:

# %%
lesson.source(chain_hash)

# %% [markdown]
# A **hash** is a short number that stands for long content; equal content has equal hashes. Because the
# hash of the block before goes in, two blocks with the same 32 tokens but different beginnings have
# different names, which is right: their keys and values differ. This is why only whole blocks are kept: a
# block gets its name when it is full, and never changes afterwards. A block with a name is called
# **published**.
#
# Matching a prompt is then a walk along its blocks, until one is not found:

# %%
lesson.source(BlockManager.match_prefix)
lesson.source(BlockPool.lookup)

# %% [markdown]
# `lookup` does not trust the hash. It compares the tokens themselves, and that the block before is the same
# one. If it did not, somebody who finds two texts with one hash could make a server answer with keys and
# values of a stranger's prompt.
#
# ### Free, but not forgotten
#
# When a request is finished, its blocks are free. But a free block still holds what it held, and
# `BlockPool` gives away empty blocks first, then published ones, the longest unused first (**LRU**, least
# recently used). A published block that is given away is **evicted**: its name is taken from the index. So
# the cache takes no memory from anybody: it lives in the blocks that are free at the moment.
#
# And in which order are the blocks of one request given back?

# %%
lesson.source(BlockManager.free)

# %% [markdown]
# From the tail. The end of a prompt is its own question, which nobody will ask again; the beginning is what
# others share, so it shall be evicted last.
#
# ### Watch it
#
# Three requests, one after the other: a prompt of 100 tokens, one that shares 70 of them, and the first one
# again.

# %%
base = list(range(500, 600))
turns = {"first": base, "shares 70 tokens": base[:70] + list(range(900, 930)), "the first again": base}
one_token = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
rows = []
for name, ids in turns.items():
    output = llm.generate([{"prompt_token_ids": ids}], one_token)[0]
    counts = llm.engine.scheduler.snapshot().blocks
    rows.append(
        {
            "request": name,
            "prompt": len(ids),
            "hit": output.metrics.num_cached_tokens,
            "blocks free and empty": counts["free"],
            "free with content": counts["cached"],
        }
    )
lesson.table("watch", rows)

# %% [markdown]
# (The two prefills that we measured before are still in the cache as well: nothing needed their blocks.) 70
# shared tokens are two whole blocks and 6 tokens; 64 are found. The third request is all there, and still
# only three blocks of it are found: the fourth is not full.
#
# ### The same tokens
#
# Keys and values that were computed for somebody else must give the same answer. Twelve prompts that share
# their first 96 tokens, with and without the cache, several at once:

# %%
shared = Workload(
    name="same", num_requests=12, shared_prefix_len=96, prompt_lens=Fixed(20), output_lens=Fixed(24)
).requests(vocab_size=model.vocab_size, seed=1)
params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
answers = {}
for enabled in (True, False):
    with LLM(
        "smollm2",
        device=lesson.device,
        max_model_len=256,
        kv_cache_tokens=2048,
        enable_prefix_caching=enabled,
    ) as other:
        found = other.generate([{"prompt_token_ids": list(r.prompt_token_ids)} for r in shared], params)
        answers[enabled] = [output.outputs[0].token_ids for output in found]
lesson.claim(
    "different-answers",
    "Prefix caching changes no answer: of 12, the number that differ",
    value=sum(a != b for a, b in zip(answers[True], answers[False], strict=True)),
    claimed=(0, 0),
    band=(0, 0),
)

# %% [markdown]
# ## Measurement
#
# ### Time to the first token
#
# For each length of the shared beginning we send two requests: the first finds nothing (cold), the second
# finds the prefix (warm). Every pair has tokens that no pair had before.

# %%
fresh = count(1000)


def ttft(request):
    output = llm.generate([{"prompt_token_ids": list(request.prompt_token_ids)}], one_token)[0]
    return output.metrics.first_token_time - output.metrics.arrival_time


def cold_and_warm(prefix_len):
    pair = Workload(
        name="pair", num_requests=2, shared_prefix_len=prefix_len, prompt_lens=Fixed(32), output_lens=Fixed(1)
    )
    return [ttft(request) for request in pair.requests(vocab_size=model.vocab_size, seed=next(fresh))]


# %%
lengths = (128, 512, 1024, 2048)
pairs = {n: [cold_and_warm(n) for _ in range(lesson.pick(3, 9))] for n in lengths}
cold = {n: Figure([c for c, _ in found]) for n, found in pairs.items()}
warm = {n: Figure([w for _, w in found]) for n, found in pairs.items()}
lesson.table(
    "ttft",
    [
        {
            "shared tokens": n,
            "cold, ms: predicted": 1000 * expected_s(n + 32),
            "measured": 1000 * cold[n],
            "warm, ms: predicted": 1000 * expected_s(32),
            "measured, ms": 1000 * warm[n],
            "times as fast": cold[n] / warm[n],
        }
        for n in lengths
    ],
    dict.fromkeys(
        ("cold, ms: predicted", "measured", "warm, ms: predicted", "measured, ms", "times as fast"), ".1f"
    ),
)

# %%
drawing, axes = figure("Time to the first token", x="shared tokens, before 32 own ones", y="TTFT, ms")
axes.plot(lengths, [1000 * expected_s(n + 32) for n in lengths], "--", color="C5", label="arithmetic")
axes.plot(lengths, [1000 * expected_s(32)] * len(lengths), "--", color="C5")
axes.plot(lengths, [1000 * cold[n] for n in lengths], "o-", color="C1", label="cold")
axes.plot(lengths, [1000 * warm[n] for n in lengths], "o-", color="C0", label="warm")
axes.set_ylim(0, None)
_ = axes.legend()

# %%
lesson.record("warm_1024", cold[1024] / warm[1024])
lesson.claim(
    "saved",
    "A cached system prompt makes the first token come up to 85 % sooner (1,024 shared, 32 own tokens)",
    value=lambda: Figure(
        [100 * (1 - w / c) for c, w in (cold_and_warm(1024) for _ in range(lesson.pick(3, 9)))]
    ),
    claimed=(80, 100),
    band=(75, 100),
    unit="%",
)

# %% [markdown]
# Cold, the curve bends upwards where the arithmetic is straight: in a long prompt every token looks back at
# more tokens. Warm, it is nearly flat, and lies a little higher than the arithmetic for the same reason: 32
# new tokens look back at all of the prefix, cached or not. The cache saves computing keys and values. It
# does not save reading them.
#
# ### Throughput of a service
#
# Sixteen requests with a common beginning of 512 tokens, 32 own ones and 16 tokens of answer, all at once,
# 16 seats. By the arithmetic the engine has to compute 544 tokens once and 32 fifteen times, instead of 544
# sixteen times.
#
# There is a trap in "all at once": the prefix is in nobody's cache yet when all sixteen are admitted, so a
# simple engine would compute it sixteen times. Ours lets a request wait while another one is just computing
# the block that it needs next (`Scheduler._is_being_computed`).

# %%
service = Workload(
    name="service",
    num_requests=lesson.pick(16, 64),
    shared_prefix_len=512,
    prompt_lens=Fixed(32),
    output_lens=Fixed(16),
)
without = LLM("smollm2", device=lesson.device, enable_prefix_caching=False, **cached)


def tokens_per_s(engine, workload):
    requests = workload.requests(vocab_size=model.vocab_size, seed=next(fresh))
    return samples_of(drive(engine, requests))["output_throughput"][0]


def hit_rate(workload, **options):
    config = EngineConfig.from_options("smollm2", executor="native", **cached | options)
    requests = workload.requests(vocab_size=model.vocab_size, seed=0)
    found = simulate(config, model, requests, lambda rows, logits, shared: 0.01, max_concurrency=1)
    return found.num_prefix_hits / found.num_prefix_queries


# %%
number, before = service.num_requests, dict(llm.engine.stats.snapshot())
tokens_per_s(llm.engine, service)
after = llm.engine.stats.snapshot()
hits = after["prefix_cache_hits_total"] - before["prefix_cache_hits_total"]
queries = after["prefix_cache_queries_total"] - before["prefix_cache_queries_total"]
lesson.record("rate_predicted", 100 * (number - 1) * 512 / (number * 544))
lesson.claim(
    "hit-rate",
    "The hit rate follows from lengths alone: measured minus predicted, in points",
    value=100 * hits / queries - lesson.values["rate_predicted"],
    claimed=(-0.01, 0.01),
    band=(-0.01, 0.01),
    unit="%",
)
lesson.say("""
Predicted {rate_predicted:.1f} % of all prompt tokens. This is what vLLM's dashboards show as the prefix
cache hit rate.
""")
lesson.claim(
    "throughput",
    "Sharing prefixes multiplies throughput, up to 5 times (16 requests, 512 of 544 prompt tokens shared)",
    value=lambda: ratio(
        lambda: tokens_per_s(llm.engine, service),
        lambda: tokens_per_s(without.engine, service),
        repeats=lesson.pick(3, 5),
        warmups=0,
    ),
    claimed=(1.5, 5),
    band=(1.5, 8),
    unit="x",
    because="this traffic shares more of its prompts than the workloads behind that figure",
)

# %% [markdown]
# ### Hit rate by traffic
#
# What matters is who comes back, and when. In `simulate` ([INF-30](INF-30.ipynb)) the block pool is the
# real one, so hit rates are exact, and cost no model. First conversations: each turn repeats the history,
# question and answer.

# %%
rates = [
    {
        "turns of a conversation": turns,
        "hit rate, %": 100
        * hit_rate(
            Workload(
                name="talk",
                num_requests=12 * turns,
                turns=turns,
                prompt_lens=Fixed(50),
                output_lens=Fixed(100),
            )
        ),
    }
    for turns in (1, 2, 4, 8)
]
lesson.table("talk", rates, {"hit rate, %": ".1f"})

# %% [markdown]
# The answers of the model are found too, since the blocks of an answer are published like those of a
# prompt.
#
# Now the limit. A service for $K$ customers has $K$ system prompts of 512 tokens, and the requests take
# turns: customer 1, 2, …, $K$, 1, 2, … The cache has 4,096 slots. When customer 1 comes again, $K - 1$
# others were here meanwhile. By LRU their 512 tokens, and the 64 tokens that each of their requests had of
# its own, are younger than customer 1's. So the prefix of customer 1 is still there if all of it fits:
#
# $$K \cdot (512 + 64) \le 4096 \quad\Rightarrow\quad K \le 7$$
#
# And if not? Then the block that is evicted is always the one that will be needed next: the least recently
# used customer is the one whose turn it is. The hit rate does not become a little smaller with each
# customer. With the eighth, about half of every prefix is gone when it is needed; with the ninth, all of
# it.

# %%
customers = range(1, 15)
by_customers = [
    100
    * hit_rate(
        Workload(
            name="customers",
            num_requests=20 * number,
            num_prefixes=number,
            shared_prefix_len=512,
            prompt_lens=Fixed(32),
            output_lens=Fixed(32),
        ),
        kv_cache_tokens=4096,
    )
    for number in customers
]
lesson.record("last_good", max(n for n, rate in zip(customers, by_customers, strict=True) if rate > 50))
lesson.record("rate_after", by_customers[lesson.values["last_good"] + 1])

# %%
drawing, axes = figure(
    "Prefixes in turn, a cache of 4,096 slots", x="different system prompts", y="hit rate, %"
)
axes.plot(customers, by_customers, "o-", color="C0", label="measured (simulate)")
axes.axvline(7.11, color="C5", linestyle="--", linewidth=1.2, label="arithmetic: all that fit")
axes.set_ylim(0, 100)
_ = axes.legend()

# %%
lesson.claim(
    "cliff",
    "A cache that is a little too small loses a little: hit rate two customers beyond the last that fits",
    value=lesson.values["rate_after"],
    claimed=(40, 95),
    band=(0, 10),
    unit="%",
    because="when prefixes come in turn, the least recently used one is the one that is needed next",
)

# %% [markdown]
# ## Where it does not help
#
# ### Nothing shared
#
# Prompts of 128 tokens that nobody has sent before. Each is hashed, looked up and published, all for
# nothing. What does that cost?

# %%
strangers = Workload(
    name="strangers", num_requests=lesson.pick(16, 64), prompt_lens=Fixed(128), output_lens=Fixed(16)
)
lesson.claim(
    "overhead",
    "Prefix caching costs (almost) nothing where nothing is shared: throughput with it over without",
    value=lambda: ratio(
        lambda: tokens_per_s(llm.engine, strangers),
        lambda: tokens_per_s(without.engine, strangers),
        repeats=lesson.pick(4, 9),
        warmups=0,
    ),
    claimed=(0.95, 1.1),
    band=(0.75, 1.35),
    unit="x",
    because="runs of this machine differ by more than the difference that we look for",
)
for engine in (llm, without):
    engine.close()

# %% [markdown]
# The team of vLLM reports a loss below 1 % at a hit rate of 0, and has it on by default. A hash of 32
# numbers takes about a microsecond; computing the same 32 tokens takes thousands.
#
# ### Decoding
#
# A prefix hit makes the *first* token come sooner. All later ones take exactly as long as before: each of
# them reads the keys and values of the whole prompt, whoever computed them. A service whose answers are
# long and whose prompts are short gains nothing that anybody could notice.
#
# ### One token too early
#
# "Today is Thursday. You are a helpful assistant. [900 more tokens]" has a new first block every day. With
# the time of day in it, no request ever finds anything. What changes belongs at the end of a prompt. This
# is the most frequent reason for a hit rate of zero in practice, and no engine can mend it.
#
# ## Exercises

# %%
lesson.exercise("hits")

# %% [markdown]
# Blocks of 32 slots, nothing is evicted. The first request has a system prompt of 500 tokens and a question
# of 40. (a) The second has the same system prompt and another question of 40 tokens: how many of its tokens
# are hits? (b) Then somebody sends a prompt of exactly 512 tokens, and then sends it again: how many hits
# has the second of these?

# %%
hits_found = ...  # (a, b)
lesson.check("hits", hits_found)

# %% tags=["solution"]
# (a) 500 // 32 = 15 whole blocks. (b) 16 whole blocks are there, but the last token must be computed.
hits_found = (500 // 32 * 32, 511 // 32 * 32)
lesson.check("hits", hits_found)

# %% tags=["wrong"]
lesson.refuses("hits", (500, 512))
lesson.refuses("hits", (512, 480))
lesson.refuses("hits", (480, 512))

# %%
lesson.exercise("talk-rate")

# %% [markdown]
# A conversation of four turns: each question has 50 tokens, each answer 100, blocks have 32 slots, nothing
# is evicted. What is the hit rate over the four prompts, in per cent? (The last token of an answer is
# written but never computed: nobody asked for the token after it.)

# %%
talk_rate = ...  # per cent, to one point
lesson.check("talk-rate", talk_rate)

# %% tags=["solution"]
prompts = [50 + 150 * turn for turn in range(4)]
found = [(earlier + 100 - 1) // 32 * 32 for earlier in prompts[:-1]]
talk_rate = 100 * sum(found) / sum(prompts)
lesson.check("talk-rate", talk_rate)

# %% tags=["wrong"]
lesson.refuses("talk-rate", 100 * (150 + 300 + 450) / 1100)
lesson.refuses("talk-rate", 100 * (32 + 192 + 320) / 1100)
lesson.refuses("talk-rate", 0.785)

# %%
lesson.exercise("cache-size")

# %% [markdown]
# Six customers take turns, with system prompts of 1,024 tokens, 64 tokens of their own and 32 tokens of
# answer. Which of 4,096, 6,144, 7,168 and 12,288 slots is the smallest cache in which their prefixes stay?

# %%
cache_size = ...  # slots
lesson.check("cache-size", cache_size)

# %% tags=["solution"]
# 6 · 1,024 = 6,144 slots hold the prefixes alone. Each request also needs 96 of its own: 6,720.
cache_size = min(size for size in (4096, 6144, 7168, 12_288) if size >= 6 * (1024 + 96))
lesson.check("cache-size", cache_size)

# %% tags=["wrong"]
lesson.refuses("cache-size", 6144)
lesson.refuses("cache-size", 12_288)

# %% [markdown]
# ## The answer
#
# A prefix cache gives back what traffic repeats, no more. How much that is can be computed from lengths: of
# the shared beginning, of the own end, and of what comes in between two visits.

# %%
lesson.answer()

# %% [markdown]
# ## In production
#
# - **vLLM**: on by default (`--enable-prefix-caching`, `--no-enable-prefix-caching`); blocks found by hash,
#   as here, with `--prefix-caching-hash-algo` (`sha256` by default, after collisions of the older hash were
#   shown to leak between users). The request field `cache_salt` keeps tenants apart, since the time to a
#   first token tells whether somebody else has sent the same prompt. Metrics:
#   `vllm:prefix_cache_queries_total` and `vllm:prefix_cache_hits_total`, in tokens.
# - **SGLang** keeps prefixes in a tree of tokens (*RadixAttention*) instead of a table of hashes, so that
#   any number of tokens can be shared; `--schedule-policy lpm` serves requests with the longest match
#   first, which softens the cliff that we saw. `--radix-eviction-policy lru|lfu`;
#   `--enable-hierarchical-cache` moves what is evicted to the memory of the host.
# - **llama.cpp** keeps the last prompt of each seat and reuses its beginning (`-sps`), shifts pieces
#   (`--cache-reuse`), and keeps whole states in host memory (`--cache-ram`).
# - **TensorRT-LLM**: block reuse with priorities, so that a system prompt can be pinned for a time.
# - Behind a **router** with several replicas each has a cache of its own. A router that sends equal
#   prefixes to equal replicas keeps the hit rate; one that deals them out at random divides it
#   ([INF-34](INF-34.ipynb)).
#
# ## Reading list
#
# - Zheng and others, *SGLang: Efficient Execution of Structured Language Model Programs*, 2023, arXiv
#   2312.07104 (RadixAttention, and scheduling by longest prefix).
# - Kwon and others, *PagedAttention*, SOSP 2023, arXiv 2309.06180, section 4.4: shared prefixes.
# - Juravsky and others, *Hydragen: High-Throughput LLM Inference with Shared Prefixes*, 2024, arXiv
#   2402.05099: not only keeping, but reading a shared prefix once for many requests.
# - Anthropic, *Prompt caching with Claude*, 2024: the "85 %", and what it costs per token.
# - In this repository: `ridgeline/kvcache/block_pool.py`, `ridgeline/kvcache/manager.py`.
