# %% [markdown]
# ## The question
#
# A model is trained on texts of some length; ours, SmolLM2-135M, on up to 8,192 tokens. Nothing in the engine
# stops you from giving it 12,000. What happens then?
#
# Two things can go wrong, and they have different remedies. The **positions** beyond the trained length are
# ones that the model never saw, and its attention may make no sense of them: that is what *RoPE scaling*
# (linear, NTK, YaRN) mends. And the **memory** of the KV cache grows with every token, until there is none
# left: that is what a *sliding window* mends, with *attention sinks* so that it does not break the model.
# Each has a price, and we want to see it.
#
# Your prediction: take the tokens at one and a half times the trained length (positions 11,264 to 12,288).
# By what factor is the **perplexity** of the unchanged model higher than that of the same model with YaRN,
# the best known scaling? (Perplexity: how many words the model hesitates between; lower is better.)

# %%
import numpy as np

from ridgeline import LLM, SamplingParams
from ridgeline.course import Lesson, figure
from ridgeline.kvcache.manager import BlockManager
from ridgeline.models.load import describe_model
from ridgeline.models.locate import locate_model
from ridgeline.models.rope import rope_frequencies, rope_from_hf
from ridgeline.quality.needle import needle
from ridgeline.quality.perplexity import perplexity
from ridgeline.quality.text import load_text, tokenize

lesson = Lesson("INF-23")
lesson.predict("beyond_none", None, unit="x")

# %% [markdown]
# ## The arithmetic
#
# ### How a model knows where a token is
#
# **RoPE** (rotary position embedding, Su et al., 2021) turns each query and key by an angle before they meet.
# The $D$ numbers of a head are taken as $D/2$ pairs, and pair $i$ of a token at position $p$ is rotated by
#
# $$p \cdot \omega_i, \qquad \omega_i = \theta^{-2i/D}.$$
#
# The product of a query at $p$ and a key at $p'$ then depends on the angles' difference $(p - p')\,\omega_i$
# only: on the *distance* of the two tokens. Pair 0 turns once every $2\pi$ tokens, the last pair once in
# $2\pi\,\theta^{(D-2)/D}$ tokens. For our model $\theta = 100000$ and $D = 64$, so the slow pairs need many
# times the trained length $L = 8192$ for one turn. How often did each pair turn in training?

# %%
config = describe_model(locate_model("smollm2")).config
LENGTH, L = 12288, config.max_position
plain, _ = rope_frequencies(config.rope, max_position=L, max_model_len=L)
turns = L * plain / (2 * np.pi)
lesson.record("num_pairs", len(plain))
lesson.record("num_unfinished", int((turns < 1).sum()))
lesson.record("num_fast", int((turns > 32).sum()))
lesson.say("""
Of {num_pairs} pairs {num_fast} turned more than 32 times: they have seen every angle, many times over, and
one more position brings nothing new. But {num_unfinished} pairs never finished a single turn. Beyond position
8,192 those take **angles that no training token ever had**, and what the model makes of them is luck.
""")

# %% [markdown]
# ### Four ways to stretch
#
# To serve $s$ times the length, all four choose other frequencies $\omega_i'$ and train nothing:
#
# | | $\omega_i'$ | what it costs |
# |---|---|---|
# | none | $\omega_i$ | unseen angles of the slow pairs |
# | linear (Chen et al., 2023) | $\omega_i / s$ | fast pairs too: neighbours look closer than ever |
# | NTK-aware (bloc97, 2023) | base $\theta\, s^{D/(D-2)}$ | pairs between are stretched by less than $s$ |
# | YaRN (Peng et al., 2023) | $\omega_i$ above 32 turns, $\omega_i/s$ below 1, a ramp between | the ramp |
#
# *Linear* squeezes all positions into the trained range. *NTK* stretches the slowest pair by $s$ and the
# fastest not at all. *YaRN* looks at the turns and squeezes only what is unseen.
#
# YaRN also multiplies the rotated numbers by $0.1 \ln s + 1$, since a softmax over more keys is flatter.
# Why the exponent of NTK: the last pair has $\omega = \theta^{-(D-2)/D}$, and with the new base it becomes
# $\omega \cdot s^{-1}$, exactly what linear does to it.
#
# ## The real thing
#
# All of this is one short function, called when the model is loaded. (`dynamic` is what Hugging Face calls
# NTK. Its stretch follows from the longest text that the engine will see, `max_model_len` or the size of
# the cache if that is smaller, so a short limit means no stretch at all.)

# %%
lesson.source(rope_frequencies)

# %%
SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "NTK": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0},
}
COLORS = dict(zip(SCALINGS, ("#6e7781", "#e16f24", "#a475f9", "#1f6feb"), strict=True))
ropes = {name: rope_from_hf(s, config.rope) if s else config.rope for name, s in SCALINGS.items()}
stretched = {n: rope_frequencies(r, max_position=L, max_model_len=LENGTH)[0] for n, r in ropes.items()}
drawing, axis = figure("Frequency of each pair, over the trained one", x="pair (fast to slow)", y="ratio")
for name, frequencies in stretched.items():
    axis.plot(frequencies / plain, "o-", ms=3, label=name, color=COLORS[name])
axis.axvline(int((turns > 1).sum()) - 0.5, ls="--", color="#6e7781", lw=1)
axis.text(int((turns > 1).sum()), 0.97, "less than one turn\nin training", va="top", fontsize=9)
axis.set_ylim(0.4, 1.05)
legend = axis.legend(loc="lower left")

# %%
lesson.claim(
    "ntk-slowest",
    "NTK stretches the slowest pair by exactly $s$, here 2 (trained over new frequency)",
    value=float(plain[-1] / stretched["NTK"][-1]),
    claimed=(1.999999, 2.000001),
    band=(1.999999, 2.000001),
    unit="x",
)
lesson.claim(
    "yarn-untouched",
    "YaRN leaves the pairs alone that turned more than 32 times (their share that is unchanged)",
    value=float(np.mean(stretched["yarn"][turns > 32] == plain[turns > 32])),
    claimed=(1, 1),
    band=(1, 1),
)

# %% [markdown]
# ### A window, and sinks
#
# With a **sliding window** of $w$ each token sees only the last $w$ tokens. The cache of older ones can be
# freed, so memory stays the same however long the text, and distances never exceed $w$, so positions are no
# problem either. What is lost is plain: what was said before.
#
# There is a catch. Xiao et al. (*StreamingLLM*, 2023) found that models collapse the moment the **first**
# tokens leave the window. A softmax must put its weight somewhere, even if a head finds nothing of
# interest, and models learn to put it on the first tokens, which every later token sees. Those are
# **attention sinks**. The remedy: keep the first four tokens for ever, and a window behind them.
#
# One detail has to be right. In StreamingLLM distances are counted *inside the cache*: to a query far down
# the text the sinks appear just behind the window, not thousands of tokens away. This engine keeps keys
# rotated at their place in the text, where distances inside the window are right anyhow, and rotates the
# *query* a second time, as if it stood at `num_sinks + window - 1`, for the sinks alone (`docs/adr/0002`).
# No key is ever rotated again. Blocks of the cache between sinks and window are freed by these lines:

# %%
lesson.source(BlockManager._drop_behind_window)

# %% [markdown]
# ## Measurement
#
# ### Perplexity by position, beyond the trained length
#
# A window of 12,288 tokens takes most of a minute on two cores, and there are six settings. So these were
# measured once, by `scripts/measure_long_context.py`, and kept in `docs/results/long_context.json`. All six
# read the same 12,288 tokens of State of the Union addresses, so that a hard passage is hard for all of them.
# The curve shows perplexity by thousands of positions.

# %%
kept = lesson.committed("docs/results/long_context.json")
curves = {name: np.array(s["nll"]) for name, s in kept["settings"].items()}
at = 1024 * (np.arange(len(curves["none"])) + 0.5)
lesson.record("kept_date", kept["date"][:10])
drawing, (left, right) = figure("Perplexity by position", x="position in the text", y="perplexity", panels=2)
for name in SCALINGS:
    left.plot(at, np.exp(curves[name]), "o-", ms=3, label=name, color=COLORS[name])
left.set(ylim=(0, 90), title="RoPE scaling, s = 2")
for name, color in (("none", "#6e7781"), ("window", "#cf222e"), ("window and sinks", "#2da44e")):
    right.plot(at, np.exp(curves[name]), "o-", ms=3, label=name, color=color)
right.set(ylim=(0, 90), title="window of 1,024")
for axis in (left, right):
    axis.axvline(L, ls="--", color="#6e7781", lw=1)
    axis.legend(loc="lower left", ncol=2)


# %%
def mean_ppl(name, first, last):
    return float(np.exp(curves[name][first // 1024 : last // 1024].mean()))


RANGES = {"0 to 2,048": (0, 2048), "4,096 to 8,192": (4096, 8192), "8,192 to 10,240": (8192, 10240)}
RANGES |= {"11,264 to 12,288": (11264, 12288)}
ppl = {name: {label: mean_ppl(name, *ends) for label, ends in RANGES.items()} for name in curves}
lesson.table("beyond", [{"setting": n, **row} for n, row in ppl.items()], dict.fromkeys(RANGES, ",.1f"))
lesson.say(
    "Measured on {kept_date}. Compare settings down a column: the passages differ from column to column."
)

# %% [markdown]
# Read the last two columns. For some two thousand tokens beyond the dashed line nothing happens: the slow
# pairs have moved only a little past the angles they know. Then the unchanged model falls apart. NTK and
# YaRN go on as if nothing were there. Linear is bad everywhere, in the first column as in the last. And the
# window with sinks, whose distances never exceed 1,024, does as well as the best of them; what it cannot do
# is not to be seen here.

# %%
AT_ONCE, LATE = "8,192 to 10,240", "11,264 to 12,288"
lesson.claim(
    "beyond-at-once",
    "An unchanged model breaks as soon as the trained length is passed (perplexity over YaRN's, next 2,048)",
    value=ppl["none"][AT_ONCE] / ppl["yarn"][AT_ONCE],
    claimed=(1.5, None),
    band=(0.9, 1.1),
    unit="x",
    because="the angles that no training token had come slowly: after 2,048 more tokens the slow pairs have "
    "turned by a quarter more than in all of training",
)
lesson.claim(
    "beyond-none",
    "But it does break (perplexity over YaRN's at one and a half times the trained length)",
    value=ppl["none"][LATE] / ppl["yarn"][LATE],
    claimed=(1.5, None),
    band=(1.5, 3),
    unit="x",
)
lesson.claim(
    "beyond-yarn",
    "YaRN extends the context without training (its perplexity there over a window with sinks, which has no "
    "position beyond 1,024)",
    value=ppl["yarn"][LATE] / ppl["window and sinks"][LATE],
    claimed=(None, 1.1),
    band=(0.9, 1.1),
    unit="x",
)

# %% [markdown]
# ### What it costs inside the trained length
#
# A scaling is chosen when the model is loaded and holds for short texts too. So what does each cost there?
# This we measure now: the first 2,048 tokens of the same text, with the same settings. It is also a check
# on the committed curve, whose first two points come from the same tokens.

# %%
NEAR = 2048
ENGINE = {"max_num_seqs": 1, "device": lesson.device}
RUN = ENGINE | {"max_model_len": LENGTH, "kv_cache_tokens": LENGTH}


def score(context=NEAR, num_windows=1, score_from=1, **options):
    with LLM("smollm2", **RUN | options) as llm:
        tokens = tokenize(llm, load_text(), num_tokens=context * num_windows)
        return perplexity(llm, tokens, context=context, score_from=score_from)


WINDOWS = lesson.pick(1, 6)
inside = {"none": score(num_windows=WINDOWS, max_model_len=L)}
inside |= {name: score(num_windows=WINDOWS, rope_scaling=s) for name, s in SCALINGS.items() if s}
ratios = {name: r.perplexity / inside["none"].perplexity for name, r in inside.items()}
lesson.table(
    "inside",
    [
        {
            "setting": name,
            "perplexity": r.perplexity,
            "over none": ratios[name],
            **{f"from {b.start}": b.perplexity for b in r.buckets if b.start in (64, 256, 1024)},
        }
        for name, r in inside.items()
    ],
    {"perplexity": ".1f", "over none": ".3f"} | {f"from {start}": ".1f" for start in (64, 256, 1024)},
)
for name, value in ratios.items():
    lesson.record(f"inside_{name.lower()}", value)

# %% [markdown]
# The last columns are *by position*: tokens with 64 to 127 others before them, 256 to 511, 1,024 to 2,047.

# %%
windows = kept["settings"]["none"]["nll_of_windows"]
first_two = np.exp((windows[0][0] * 1023 + windows[1][0] * 1024) / 2047)
live = score(max_model_len=L) if lesson.full else inside["none"]
lesson.claim(
    "reproduced",
    "The committed curve is this engine's: its first 2,048 positions, measured again (live over committed)",
    value=live.perplexity / float(first_two),
    claimed=(0.99, 1.01),
    band=(0.98, 1.02),
)
lesson.claim(
    "yarn-inside",
    "YaRN costs next to nothing inside the trained length (perplexity over none)",
    value=ratios["yarn"],
    claimed=(None, 1.02),
    band=(0.95, 1.15),
    unit="x",
    because="it is close ({yarn_inside:.3f}), but the pairs of the ramp are blended, the softmax is sharper, "
    "and this model was not trained on for some hundred steps, as those of the paper were",
)
lesson.claim(
    "linear-inside",
    "Linear interpolation works at every length, with no training (perplexity over none, 2,048 tokens)",
    value=ratios["linear"],
    claimed=(None, 1.05),
    band=(1.05, None),
    unit="x",
    because="it halves the angle between neighbours too. Chen et al. train for 1,000 steps after it; as a "
    "switch it is the worst of the three",
)

# %% [markdown]
# ### A window, with and without the first tokens
#
# Now the other problem. We give the model a window of 256 and score only tokens from position 512 on, when
# the beginning of the text has long left the window. What is measured is what a *stream* costs.

# %%
W = 256
STREAM = {"score_from": 512, "context": lesson.pick(2048, 8192), "max_model_len": L, "kv_cache_tokens": L}
kinds = {
    "all tokens": {},
    f"window of {W}": {"sliding_window": W},
    "with 1 sink": {"sliding_window": W, "num_sinks": 1},
    "with 4 sinks": {"sliding_window": W, "num_sinks": 4},
    "with 16 sinks": {"sliding_window": W, "num_sinks": 16},
}
streams = {name: score(**STREAM, **options).perplexity for name, options in kinds.items()}
full = streams["all tokens"]
lesson.table(
    "streams",
    [{"each token sees": n, "perplexity": p, "over all": p / full} for n, p in streams.items()],
    {"perplexity": ",.1f", "over all": ".2f"},
)
lesson.record("one_sink", streams["with 1 sink"] / full)
lesson.claim(
    "no-sinks",
    "A window without the first tokens breaks a model (perplexity over full attention)",
    value=streams[f"window of {W}"] / full,
    claimed=(2, None),
    band=(1.2, None),
    unit="x",
    because="{no_sinks:.2f}: clearly worse, but no collapse. This model leans less on its first tokens than "
    "the Llama 2 13B of the paper, whose perplexity was 5,158 instead of 5.4",
)
lesson.claim(
    "four-sinks",
    "Four sinks restore it (perplexity over full attention)",
    value=streams["with 4 sinks"] / full,
    claimed=(None, 1.15),
    band=(None, 1.35),
    unit="x",
    because="a window of 256 tokens also lacks what stands before it; sinks cannot bring that back",
)

# %% [markdown]
# ### Memory that does not grow
#
# With a window in every layer the engine frees blocks as the text goes on. We serve a prompt, then one of
# twice the length, watch how many blocks of 32 tokens are held at most, and compare with the arithmetic:
# the window, the chunk of the prompt that is computed in one step (128 here), one block for the sinks and
# one because windows do not begin at a block's edge.

# %%
SMALL = {"sliding_window": W, "num_sinks": 4, "max_num_batched_tokens": 128, "kv_cache_tokens": 1024}
SMALL |= {"max_model_len": 32768, "enable_prefix_caching": False, "max_num_seqs": 1}
LENGTHS = lesson.pick((1536, 3072), (4096, 16384))
stop = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
held = {}
with LLM("smollm2", **ENGINE | SMALL) as llm:
    pool, engine = llm.engine.scheduler.manager.pool, llm.engine
    for n in LENGTHS:
        engine.add_request({"prompt_token_ids": tokenize(llm, load_text(), num_tokens=n)}, stop)
        used = []
        while engine.has_unfinished:
            engine.step()
            used.append(pool.num_blocks - pool.num_free)
        held[n] = used
expected = -(-(W + 128) // 32) + 2
lesson.table(
    "held",
    [
        {
            "prompt": n,
            "blocks without a window": -(-n // 32),
            "held at most": max(used),
            "expected at most": expected,
        }
        for n, used in held.items()
    ],
    {"prompt": ",d"},
)
lesson.claim(
    "flat-memory",
    "With a window in every layer memory does not grow with the text (blocks at twice the length over once)",
    value=max(held[LENGTHS[1]]) / max(held[LENGTHS[0]]),
    claimed=(1, 1),
    band=(1, 1),
)
lesson.claim(
    "held-as-computed",
    "And it is what the arithmetic says (blocks held at most over expected at most)",
    value=max(held[LENGTHS[1]]) / expected,
    claimed=(0.9, 1),
    band=(0.85, 1),
)

# %%
drawing, axis = figure(
    "Cache blocks in use", x="step (a chunk of 128 prompt tokens)", y="blocks of 32 tokens"
)
longest = held[LENGTHS[1]]
axis.plot(longest, "o-", ms=3, label=f"window {W} and 4 sinks")
axis.plot(
    [min(128 * (i + 1), LENGTHS[1]) / 32 for i in range(len(longest))], "--", color="C1", label="no window"
)
legend = axis.legend()

# %% [markdown]
# ## Where it does not help
#
# Perplexity flatters a window: most words follow from the last few sentences. The **needle test** asks for
# what does not. A sentence with a five-digit number is hidden in filler; at the end the model is asked for
# the number, and its probability is compared with that of nine other numbers. Guessing is right once in
# ten.

# %%
N_NEEDLE, DEPTHS = 768, (0.3, 1.0)
TRIALS = lesson.pick(5, 15)
found = {}
for name, options in {"all tokens": {}, "window and sinks": {"sliding_window": W, "num_sinks": 4}}.items():
    with LLM("smollm2", **ENGINE, max_model_len=1024, **options) as llm:
        found[name] = needle(llm, [N_NEEDLE], DEPTHS, num_trials=TRIALS).cells
lesson.record("needle_full", found["all tokens"][0].accuracy)
lesson.table(
    "needle",
    [
        {
            "each token sees": name,
            "needle": f"{round((1 - cell.depth) * N_NEEDLE):d} tokens back"
            if cell.depth < 1
            else "just before",
            "found": cell.accuracy,
            "ln of its odds over the best other": cell.margin,
        }
        for name, cells in found.items()
        for cell in cells
    ],
    {"found": ".0%", "ln of its odds over the best other": ".1f"},
)
lesson.claim(
    "needle-inside",
    "What is inside the window is found as with full attention (share of trials)",
    value=found["window and sinks"][1].accuracy,
    claimed=(0.8, 1),
    band=(0.6, 1),
    because="the model is small",
)
lesson.claim(
    "needle-outside",
    "Sinks and a window give a model unlimited context (share of needles found outside of the window)",
    value=found["window and sinks"][0].accuracy,
    claimed=(0.8, 1),
    band=(0, 0.45),
    because="unlimited *text*, not context: what left the window is gone, and the answers are guesses, one "
    "in ten. Full attention found {needle_full:.0%} of the same needles",
)

# %% [markdown]
# **Models that have both.** Gemma 3 has a window of 512 in most of its layers and full attention in every
# sixth: the few full layers carry what is far back, the many windowed ones keep the cache small. That is
# trained in, and it is the reason why the engine refuses `--sliding-window` for such a model: its layers
# have windows already.

# %%
gemma = describe_model(locate_model("gemma3-270m")).config
lesson.record("gemma_windowed", len(gemma.window_layers))
lesson.record("gemma_layers", gemma.num_layers)
lesson.record("gemma_window", gemma.sliding_window)
lesson.say("Gemma 3 270M: {gemma_windowed} of {gemma_layers} layers see {gemma_window} tokens.")

# %% [markdown]
# ## Exercises

# %%
lesson.exercise("unfinished-pairs")

# %% [markdown]
# A model with $\theta = 10000$, 64 rotated numbers a head (so 32 pairs) and a trained length of 2,048: how
# many pairs never finish one turn in training? (`numpy` is loaded as `np`.)

# %%
unfinished = ...
lesson.check("unfinished-pairs", unfinished)

# %% tags=["solution"]
omega = 10000.0 ** (-2 * np.arange(32) / 64)
unfinished = int((2048 * omega < 2 * np.pi).sum())
lesson.check("unfinished-pairs", unfinished)

# %% tags=["wrong"]
lesson.refuses("unfinished-pairs", int((2048 * omega < 1).sum()))
lesson.refuses("unfinished-pairs", int((2048 * omega >= 2 * np.pi).sum()))
lesson.refuses("unfinished-pairs", int((2048 * 10000.0 ** (-np.arange(32) / 64) < 2 * np.pi).sum()))

# %%
lesson.exercise("choose-scaling")

# %% [markdown]
# You serve SmolLM2 (trained length 8,192) with `max_model_len=32768`, without training, and most of your
# requests are short. Write the `rope_scaling` dictionary for the engine.

# %%
rope_scaling = ...
lesson.check("choose-scaling", rope_scaling)

# %% tags=["solution"]
rope_scaling = {"rope_type": "yarn", "factor": 4.0}
lesson.check("choose-scaling", rope_scaling)

# %% tags=["wrong"]
lesson.refuses("choose-scaling", {"rope_type": "yarn", "factor": 2.0})
lesson.refuses("choose-scaling", {"rope_type": "linear", "factor": 4.0})
lesson.refuses("choose-scaling", {"rope_type": "yarn", "factor": 16.0})
lesson.refuses("choose-scaling", {"rope_type": "yarn"})

# %%
lesson.exercise("window-blocks")

# %% [markdown]
# A request decodes one token a step with a window of 1,024 tokens and 4 sinks, in blocks of 32. How many
# blocks can it hold **at most**, once the text is long?

# %%
num_blocks = ...
lesson.check("window-blocks", num_blocks)

# %% tags=["solution"]
num_blocks = 1 + 1024 // 32 + 1
lesson.check("window-blocks", num_blocks)

# %% tags=["wrong"]
lesson.refuses("window-blocks", 32)
lesson.refuses("window-blocks", 33)
lesson.refuses("window-blocks", 4 + 32)

# %% [markdown]
# ## The answer

# %%
lesson.answer()

# %% [markdown]
# ## In production
#
# - **vLLM**: `--hf-overrides '{"rope_scaling": {"rope_type": "yarn", "factor": 4.0, ...}}'` with
#   `--max-model-len`; Qwen's model cards say the same, and warn that it costs quality on short texts.
#   **SGLang**: `--json-model-override-args`. **llama.cpp**: `--rope-scaling yarn --rope-scale 4
#   --yarn-orig-ctx`.
# - Models that are sold as long-context were *trained* on after scaling: Llama 3.1 has frequencies of its own
#   (`rope_type: llama3`), DeepSeek and Qwen use YaRN.
# - Windows: vLLM's hybrid cache manager frees blocks of windowed layers while full layers keep theirs
#   (Gemma 3, gpt-oss, whose sinks are trained numbers). **llama.cpp** has `--context-shift`, which drops
#   the oldest half and moves positions, and `--keep N` for the sinks. **TensorRT-LLM**:
#   `max_attention_window` and `sink_token_length`.
# - What is lost by a window is brought back by *retrieval*, or by caches that keep what was attended to (H2O,
#   SnapKV) instead of what was recent.
#
# ## Reading list
#
# - J. Su et al., *RoFormer*, 2021, arXiv:2104.09864: RoPE.
# - S. Chen et al., *Extending Context Window of Large Language Models via Positional Interpolation*, 2023,
#   arXiv:2306.15595: linear. bloc97, *NTK-Aware Scaled RoPE*, 2023 (r/LocalLLaMA).
# - B. Peng, J. Quesnelle, H. Fan, E. Shippole, *YaRN*, 2023, arXiv:2309.00071.
# - G. Xiao et al., *Efficient Streaming Language Models with Attention Sinks*, 2023, arXiv:2309.17453.
# - A. Mohtashami, M. Jaggi, *Landmark Attention*, 2023, arXiv:2305.16300: the passkey test.
