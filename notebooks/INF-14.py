# %% [markdown]
# ## The question
#
# A **quantized** number is a small whole number, its **code**, times a **scale** that many numbers share:
# $\hat w = d \cdot q$. With 8 bits there are codes from $-127$ to $127$, one byte each. A float32 takes
# four bytes. So people say: "INT8 makes a model four times smaller, and it loses less than 1 % of its
# quality."
#
# Which numbers, though? A linear layer multiplies **weights** by **activations** (its input). Weights are
# known beforehand. Activations are different for every token. Three ways to use 8 bits are common, and they
# are not equally good:
#
# | name | weights | activations | the product is of |
# |---|---|---|---|
# | **weight-only** (W8A16) | 8 bits | floats | floats, made from the codes on the way |
# | **W8A8 dynamic** | 8 bits | 8 bits, scale found for each token | integers: faster arithmetic |
# | **W8A8 static** | 8 bits | 8 bits, one scale fixed beforehand | integers, nothing to find at run time |
#
# All are **PTQ**, post-training quantization: the trained model is rounded, not trained again. To fix
# scales beforehand one runs some text through the model and looks at the activations; that is
# **calibration**.
#
# Quality is measured as in [INF-11](INF-11.ipynb): *perplexity* (how surprised the model is by a text;
# lower is better) and *KL* (how far the probabilities are from those of the base model, in nats; 0 is
# equal). The base is our model in float32. (Its file was published in 4 bits; float32 here means those
# numbers as floats.)
#
# Your prediction: how many times smaller is the whole model with 8-bit weights? By how many percent does
# perplexity rise with W8A8 dynamic?

# %%
import math
import statistics

from ridgeline.compress.calibration import calibration_tokens
from ridgeline.compress.grids import Grid
from ridgeline.compress.inputs import inputs_of
from ridgeline.compress.judge import JudgeOptions, judge
from ridgeline.compress.pareto import points_of
from ridgeline.compress.passes import float_values
from ridgeline.compress.quantize import quantize_model
from ridgeline.compress.recipe import recipe_named
from ridgeline.compress.scaling import fake_quantize, producer_of, search_smooth, smooth_scales
from ridgeline.compress.sizes import sizes_of
from ridgeline.course import Lesson, figure
from ridgeline.course.figures import Figure
from ridgeline.models.load import load_model
from ridgeline.models.locate import locate_model
from ridgeline.ops.torch_ops import round_input
from ridgeline.quant.weight import ActivationQuant
from ridgeline.tokenizer import load_tokenizer

lesson = Lesson("INF-14")

# %%
lesson.predict("times_smaller", None, unit="x")
lesson.predict("w8a8_loss", None, unit="%")

# %% [markdown]
# ## The arithmetic
#
# ### Bytes
#
# A weight of one byte instead of four is four times smaller. Two things are in the way. First, scales: one
# of 16 bits for each row of $K$ weights costs $16/K$ bits a weight, 0.03 bits for $K$ = 576. That is
# nothing. Second, tensors that are *not* quantized. If a share $s$ of all weights stays in float32, the
# model shrinks by
#
# $$ \frac{4}{(1 - s) \cdot 1 + s \cdot 4} . $$
#
# Many tools leave the embedding and the head (the table of all tokens) in floats. In a large model that is
# a few percent of the weights. In ours it is $s \approx 0.21$, and the formula gives 2.45, not 4.
#
# ### Rounding error
#
# The largest number of a row, $m$, must get code 127, so $d = m / 127$. A number is off by at most $d/2$,
# and all errors between $-d/2$ and $d/2$ are equally likely. Their mean square is $d^2/12$ (the integral of
# $e^2$ over that interval). Compare it with the numbers themselves. With $r$ the root of their mean square,
#
# $$ \text{relative error} \approx \frac{d}{\sqrt{12}\; r}
#    = \frac{1}{127\sqrt{12}} \cdot \frac{m}{r} \approx \frac{1}{440} \cdot \frac{m}{r} . $$
#
# Everything depends on $m / r$, the largest number over the typical one. It is called the **crest factor**.
# Bell-shaped numbers, a few hundred of them, have a crest factor of 3 to 4, and so an error below 1 %. A
# row with one number that is a hundred times the typical one has a crest factor near 20 or more, and loses
# several percent: *one large number makes the steps coarse for all others*.
#
# So before measuring anything about quality, we can ask: what are the crest factors of weights, and of
# activations?
#
# ## The real thing
#
# This is how the engine rounds an input of a linear for W8A8. `x` has one row a token. Find the three
# variants in it: *dynamic* takes the largest of each row, *static* is given its scale, and with a
# threshold, large values (outliers) are taken out first and returned as floats. More about those below.

# %%
lesson.source(round_input)

# %% [markdown]
# We run 2,048 tokens of text through the model and look at what its linears read, in a few layers. A
# linear's input is one of four kinds: `q_proj` (shared with k and v) and `gate_proj` (shared with up) read
# the output of a norm; `o_proj` reads the output of attention; `down_proj` reads a product of two vectors.

# %%
model = load_model(locate_model("smollm2"))
tokenizer = load_tokenizer(model.checkpoint)
calibration = calibration_tokens(tokenizer, num_samples=4, length=512, seed=0)
layers = lesson.pick((0, 6, 12), (0, 6, 12, 18, 24, 29))
kinds = ("q_proj", "o_proj", "gate_proj", "down_proj")
names = [f"layers.{layer}.{kind}" for layer in layers for kind in kinds]
inputs = inputs_of(model, calibration, names)

grid = Grid(8, group_size=None, symmetric=True)  # one scale for each row of a weight


def relative_error(rounded, exact):
    return float((rounded - exact).norm() / exact.norm())


def crest(rows):
    return float(rows.abs().amax(1).norm() / rows.norm() * math.sqrt(rows.shape[1]))


rows = []
for name in names:
    weight, x = float_values(model.weights[name]), inputs[name].sample
    codes, d, _ = round_input(x, ActivationQuant())
    rows.append({"linear": name, "weights: crest": crest(weight), "inputs: crest": crest(x)})
    rows[-1]["weights: error"] = relative_error(fake_quantize(weight, grid), weight)
    rows[-1]["inputs: predicted"] = crest(x) / (127 * math.sqrt(12))
    rows[-1]["inputs: error"] = relative_error(codes * d, x)

forms = {"weights: crest": ".1f", "inputs: crest": ".1f", "weights: error": ".2%"}
lesson.table("crests", rows, forms | {"inputs: predicted": ".2%", "inputs: error": ".2%"})

# %%
lesson.record("crest_of_weights", Figure([row["weights: crest"] for row in rows]))
lesson.record("crest_of_inputs", Figure([row["inputs: crest"] for row in rows]))
worst = max(rows, key=lambda row: row["inputs: crest"])
lesson.record("worst_input", worst["linear"])
lesson.record("worst_crest", worst["inputs: crest"])
lesson.claim(
    "error-from-crest",
    "The crest factor alone predicts the rounding error of an input: measured over predicted, median",
    value=statistics.median(row["inputs: error"] / row["inputs: predicted"] for row in rows),
    claimed=(0.9, 1.1),
    band=(0.9, 1.1),
)
lesson.say(
    """
    The crest factor of weights is {crest_of_weights:.1f} (half of the matrices between
    {crest_of_weights.low:.1f} and {crest_of_weights.high:.1f}), that of inputs {crest_of_inputs:.1f}
    ({crest_of_inputs.low:.1f} to {crest_of_inputs.high:.1f}), with {worst_crest:.0f} in `{worst_input}`.
    **Weights are easy, activations are hard.**
    """
)

# %% [markdown]
# Where the error is smaller than predicted, most inputs of a token are close to zero: they are rounded to
# zero exactly, with an error smaller than half a step. The formula assumed that numbers are spread over
# many steps.
#
# Which activations are large? Always the same ones. The plot sorts the input **features** (the columns of
# `x`) by their largest value over all tokens.

# %%
some = [f"layers.12.{kind}" for kind in ("q_proj", "down_proj")]
_, panels = figure("A few features are far larger than all others", y="largest |x| of a feature", panels=2)
for axes, name in zip(panels, some, strict=True):
    axes.plot(inputs[name].max_abs.sort(descending=True).values)
    axes.set_title(name)
    axes.set_xlabel("feature, largest first")
    axes.axhline(6, ls="--", color="#6e7781", label="6.0, the threshold of LLM.int8()")
    axes.set_yscale("log")
    axes.legend()

spikes = [float(inputs[n].max_abs.max() / inputs[n].max_abs.median()) for n in names]
lesson.record("largest_over_median", Figure(spikes))
lesson.record("num_inputs", len(names))
lesson.record("num_reaching", sum(float(inputs[n].max_abs.max()) >= 6 for n in names))
lesson.say(
    """
    The largest feature of an input is {largest_over_median:.0f} times as large as the median feature
    (median of the inputs; {largest_over_median.high:.0f} at the upper quartile). The dashed line is the
    threshold of LLM.int8(), explained next: {num_reaching} of our {num_inputs} inputs reach it at all.
    """
)

# %% [markdown]
# ### Two answers to outliers
#
# **LLM.int8()** (Dettmers et al. 2022): leave the outliers out. Values of 6.0 and more are multiplied in
# floats, all others are rounded with a scale that no longer has to reach so far. They are few, so the float
# part is small.
#
# **SmoothQuant** (Xiao et al. 2022): move the difficulty. Dividing feature $j$ of the input by $s_j$, and
# multiplying column $j$ of the weight by $s_j$, changes nothing in the product:
#
# $$ x_j w_j = \frac{x_j}{s_j} \cdot (w_j s_j), \qquad
#    s_j = \frac{(\max |x_j|)^\alpha}{(\max |w_j|)^{1-\alpha}} . $$
#
# With $\alpha = 0$ inputs keep their outliers, with $\alpha = 1$ the weights get all of them. In between,
# both become moderately hard, and both can be rounded. The division is free: the layer before (a norm, say)
# produces $x_j$, and its own weight is divided once, on disk. The engine tries eleven values of $\alpha$
# and keeps the best.

# %%
lesson.source(smooth_scales)

# %% [markdown]
# ## Measurement
#
# ### One linear at a time
#
# The relative error of the output $x W^\top$, for each way. The static scale is the simplest one that
# calibration can choose: the largest value that these tokens have, over 127. (The recipe `w8a8-static`
# looks for a smaller one that clips a few values and rounds the others more finely.)


# %%
def output(x, weight, how):
    codes, d, outliers = round_input(x, how)
    return (codes * d + (0 if outliers is None else outliers)) @ fake_quantize(weight, grid).T


rows = []
for name in names:
    weight, x = float_values(model.weights[name]), inputs[name].sample
    exact, producer = x @ weight.T, producer_of(model.config, [name])
    s = search_smooth(inputs[name], [weight], [grid], producer, is_static=False).scales[producer.rows]
    static = ActivationQuant(static_scale=float(x.abs().max()) / 127)
    found = {
        "weight-only": x @ fake_quantize(weight, grid).T,
        "W8A8 dynamic": output(x, weight, ActivationQuant()),
        "W8A8 static": output(x, weight, static),
        "LLM.int8()": output(x, weight, ActivationQuant(outlier_threshold=6.0)),
        "SmoothQuant": output(x / s, weight * s, ActivationQuant()),
    }
    rows.append({"linear": name} | {way: relative_error(y, exact) for way, y in found.items()})

ways = list(found)
lesson.table("outputs", rows, dict.fromkeys(ways, ".2%"))

_, axes = figure("Error of the output, by what is rounded and how", y="relative error, %")
axes.boxplot([[100 * row[way] for row in rows] for way in ways], tick_labels=ways, showfliers=True)
axes.set_yscale("log")
_ = axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])

# %%
lesson.claim(
    "static-over-dynamic",
    "Static scales are as good as dynamic ones: error of W8A8 static over W8A8 dynamic, median",
    value=statistics.median(row["W8A8 static"] / row["W8A8 dynamic"] for row in rows),
    claimed=(None, 1.1),
    band=(1.2, 4),
    unit="x",
    because="one scale for all tokens has to reach the largest value of *any* token: the crest factor is "
    "that of the whole text instead of that of one token, {static_over_dynamic:.1f} times as "
    "much error",
)

# %% [markdown]
# ### The whole model: bytes, quality, speed
#
# Now everything at once. `quantize_model` rounds the model, `judge` runs it beside the base on the same
# text, and takes speeds in turns (base, candidates, base, candidates, ...), so that a change of the
# machine's own speed hits all alike. The embedding and head get 8 bits too. The arithmetic of speed: to
# decode one token, every weight is read once, so **decode speed should follow bytes**; a prompt shares one
# read between many tokens, so **prefill speed should follow arithmetic**, where products of integers can
# win.

# %%
chosen = ("int8", "w8a8", "llm-int8")
made = {name: quantize_model(model, recipe_named(name)).model for name in chosen}
context, windows = lesson.pick((512, 4), (1024, 8))
options = JudgeOptions(eval_tokens=context * windows, eval_context=context, speed_rounds=lesson.pick(3, 7))
live = judge(model, made, tokenizer, options)

lesson.table(
    "live",
    [
        {
            "recipe": name,
            "MiB": live[name].sizes.num_bytes / 2**20,
            "KL": live[name].quality.kl_mean,
            "perplexity": live[name].quality.perplexity_ratio - 1,
            "decode, × base": live[name].speed_ratios["decode_tok_s"],
            "prefill, × base": live[name].speed_ratios["prefill_tok_s"],
        }
        for name in chosen
    ],
    {"MiB": ".1f", "KL": ".4f", "perplexity": "+.2%", "decode, × base": ".2f", "prefill, × base": ".2f"},
)

# %%
sizes = sizes_of(made["int8"])
tables_in_floats = 4 * sum(w.num_elements for w in [model.weights["embed_tokens"]])
lesson.record("share_of_tables", tables_in_floats / sizes.float32_bytes)
lesson.claim(
    "times-smaller",
    "8-bit weights make the model four times smaller than float32",
    value=sizes.ratio,
    claimed=(3.9, 4.1),
    band=(3.95, 3.99),
    unit="x",
)
lesson.claim(
    "times-smaller-linears-only",
    "The same if only the linears of the layers are quantized, and the table of tokens stays in float32",
    value=sizes.float32_bytes / (sizes.num_bytes - sizes.by_class["embedding"] + tables_in_floats),
    claimed=(3.9, 4.1),
    band=(2.4, 2.5),
    unit="x",
    because="that table is {share_of_tables:.0%} of this model",
)
lesson.claim(
    "live-int8-loss",
    "8-bit weights lose less than 1 % of perplexity, measured now on a little text",
    value=100 * (live["int8"].quality.perplexity_ratio - 1),
    claimed=(None, 1),
    band=(-1.5, 1),
    unit="%",
)
lesson.claim(
    "kl-of-inputs",
    "Rounding the inputs too costs nothing more: KL of W8A8 over KL of weight-only",
    value=live["w8a8"].quality.kl_mean / live["int8"].quality.kl_mean,
    claimed=(None, 1.5),
    band=(4, 15),
    unit="x",
    because="inputs have outliers and weights do not: see the crest factors",
)
lesson.claim(
    "decode-speed",
    "One request decodes faster with 8-bit weights than in float32",
    value=live["int8"].speed_ratios["decode_tok_s"],
    claimed=(1.5, None),
    band=(1.5, None),
    unit="x",
)
lesson.claim(
    "prefill-of-integers",
    "A prompt is read faster with W8A8 than with 8-bit weights alone",
    value=live["w8a8"].speed_ratios["prefill_tok_s"] / live["int8"].speed_ratios["prefill_tok_s"],
    claimed=(1, None),
    band=(0.8, None),
    unit="x",
    because="this processor multiplies narrow integers no faster than wide ones",
)
lesson.say(
    """
    By bytes, decode could be {times_smaller:.1f} times as fast as float32; it is {decode_speed:.1f} times.
    What is missing is time that does not depend on the weights: attention, the cache, the work between
    steps.
    """
)

# %% [markdown]
# A verdict about 1 % needs more text. These come from result files in the repository:
# `docs/results/pareto.json` (16 windows of 1,024 tokens, all through the engine's fast executor; `ridgeline
# pareto`) and, for SmoothQuant over three calibrations, `docs/results/quantizers.json`
# (`scripts/compare_quantizers.py`). In the second, bitsandbytes, the library of LLM.int8()'s author, ran on
# the same text.

# %%
pareto = lesson.committed("docs/results/pareto.json")
points = {point.name: point for point in points_of(pareto["details"]["rows"])}
committed = lesson.committed("docs/results/quantizers.json")


def losses(name, count=None):
    runs = [r["windows"] for key, r in committed["runs"].items() if key.rpartition("-")[0] == name]
    means = [[statistics.fmean(run[key][:count]) for key in ("base", "model")] for run in runs]
    return Figure([100 * math.expm1(base - ours) for base, ours in means])


lesson.record("pareto_date", pareto["created"][:10])
lesson.say("Measured {pareto_date}:")
lesson.table(
    "whole_model",
    [
        {
            "recipe": name,
            "bits a weight": points[name].bits,
            "perplexity": points[name].change,
            "± (standard error)": points[name].change_error,
            "KL": points[name].kl,
        }
        for name in ("int8-g96", "int8", "w8a8-smooth", "llm-int8", "w8a8", "int8-tensor")
    ],
    {"bits a weight": ".2f", "perplexity": "+.2%", "± (standard error)": ".2%", "KL": ".4f"},
)

# %%
lesson.claim(
    "int8-loss",
    "8-bit weights lose less than 1 % of perplexity",
    value=100 * points["int8"].change,
    claimed=(None, 1),
    band=(0, 0.6),
    unit="%",
)
lesson.claim(
    "w8a8-loss",
    "8-bit weights and activations lose less than 1 % of perplexity",
    value=100 * points["w8a8"].change,
    claimed=(None, 1),
    band=(2.3, 3.8),
    unit="%",
    because="the outliers of the inputs make the steps of a token's scale coarse",
)
lesson.claim(
    "llm-int8-loss",
    "LLM.int8() keeps the loss below 1 %",
    value=100 * points["llm-int8"].change,
    claimed=(None, 1),
    band=(1.4, 2.7),
    unit="%",
    because="its threshold of 6.0 was found on models of billions of weights. Here most inputs never "
    "reach it (of those above, {num_reaching} of {num_inputs} do), and where nothing is taken "
    "out it is W8A8 dynamic",
)
lesson.claim(
    "smooth-loss",
    "SmoothQuant keeps the loss of W8A8 below 1 %, mean of three calibrations",
    value=statistics.fmean(losses("w8a8-smooth").samples),
    claimed=(None, 1),
    band=(0.2, 0.95),
    unit="%",
)
lesson.claim(
    "against-bitsandbytes",
    "Ridgeline's LLM.int8() loses as much as bitsandbytes': difference in points, on the same four windows",
    value=float(losses("llm-int8", 4)) - float(losses("bitsandbytes", 4)),
    claimed=(-1, 1),
    band=(-1, 1),
    unit="points",
)

# %% [markdown]
# The order is that of the crest factors: weight-only is nearly free; W8A8 loses most; leaving outliers out
# helps; moving them helps more. The LLM.int8() paper found the same at our size: on a model of 125 million
# weights, scales a row lost +40 % of perplexity with activations rounded, and LLM.int8() +0.7 % (C4, 35.84
# and 25.83 against 25.65).
#
# ## Where it does not help
#
# **One scale for a whole matrix** (`int8-tensor` in the table). Some tools call this INT8 as well. The
# largest weight of the matrix sets the step for all rows: the crest factor of a matrix instead of that of a
# row.

# %%
lesson.claim(
    "one-scale",
    "One scale for a whole matrix is enough: loss of perplexity",
    value=100 * points["int8-tensor"].change,
    claimed=(None, 1),
    band=(6, 9.5),
    unit="%",
    because="one large row makes all others coarse; a scale a row costs 0.03 bits a weight and takes "
    "nearly all of that back",
)

# %%
speed = {name: live[name].speed_ratios["decode_tok_s"] for name in chosen}
lesson.record("decode_w8a8", speed["w8a8"] / speed["int8"])
lesson.record("decode_llm_int8", speed["llm-int8"] / speed["int8"])
lesson.say(
    """
    **Decode.** W8A8 reads the same bytes as weight-only, so for one request it should be as fast: it is
    {decode_w8a8:.2f} times as fast. Where that differs from 1, one token's arithmetic is not quite hidden
    behind reading: our weight-only kernel multiplies codes by 16-bit inputs. The large gain of integer
    products is for prompts and batches.

    **LLM.int8() on a processor.** It keeps a float product beside the integer one for the few features it
    takes out. Decode is {decode_llm_int8:.2f} times as fast as weight-only, which loses less: for a small
    model on a processor there is little reason for it.

    **Static scales.** They save finding the largest value of each row, which costs a processor little. They
    were made for hardware that has no time for it, and they lose most.
    """
)

# %% [markdown]
# ## Exercises

# %%
lesson.exercise("memory-ratio")

# %% [markdown]
# Write a function of $s$, the share of the weights that stays in **float16** (2 bytes), while the others
# take 1 byte: how many times smaller is the model than in float32?

# %%
memory_ratio = ...  # def memory_ratio(s): ...
lesson.check("memory-ratio", memory_ratio)


# %% tags=["solution"]
def memory_ratio(s):
    return 4 / ((1 - s) * 1 + s * 2)


lesson.check("memory-ratio", memory_ratio)

# %% tags=["wrong"]
lesson.refuses("memory-ratio", lambda s: 4 / ((1 - s) + 4 * s))
lesson.refuses("memory-ratio", lambda s: 4 * (1 - s) + 2 * s)
lesson.refuses("memory-ratio", lambda s: ((1 - s) + 2 * s) / 4)

# %%
lesson.exercise("outlier-damage")

# %% [markdown]
# A token's input has a typical size (root mean square) of 0.5; its largest feature is 40. By how many
# **percent** of its size is the input off after rounding to codes from $-127$ to $127$ with one scale?

# %%
damage_percent = ...
lesson.check("outlier-damage", damage_percent)

# %% tags=["solution"]
damage_percent = 100 * 40 / 0.5 / (127 * math.sqrt(12))
lesson.check("outlier-damage", damage_percent)

# %% tags=["wrong"]
lesson.refuses("outlier-damage", 100 * 40 / 0.5 / 127)
lesson.refuses("outlier-damage", 40 / 0.5 / (127 * math.sqrt(12)))
lesson.refuses("outlier-damage", 100 * 40 / (127 * math.sqrt(12)))

# %%
lesson.exercise("smooth-scale")

# %% [markdown]
# SmoothQuant with $\alpha = 0.5$. A feature's largest input is 64, the largest weight of its column 0.25.
# Which $s$ does it get? (Check: input and weight are equally large afterwards.)

# %%
scale = ...
lesson.check("smooth-scale", scale)

# %% tags=["solution"]
scale = 64**0.5 / 0.25**0.5
lesson.check("smooth-scale", scale)
assert 64 / scale == 0.25 * scale

# %% tags=["wrong"]
lesson.refuses("smooth-scale", 256)
lesson.refuses("smooth-scale", 4)
lesson.refuses("smooth-scale", 1 / 16)

# %% [markdown]
# ## The answer

# %%
lesson.say(
    """
    "Four times smaller, less than 1 % lost" is true of 8-bit **weights**, if the table of tokens is among
    them: {times_smaller:.2f} times, {int8_loss:.2f} %. With activations in 8 bits as well it is false for
    this model ({w8a8_loss:.1f} %), until outliers are moved into the weights (SmoothQuant:
    {smooth_loss:.1f} %).
    """
)
lesson.answer()

# %% [markdown]
# ## In production
#
# - **vLLM**: W8A8 checkpoints from llm-compressor (`SmoothQuantModifier` followed by
#   `GPTQModifier(scheme="W8A8")`) are recognised by themselves; on newer GPUs the 8 bits are a float,
#   `--quantization fp8`, which has a wide range and so less trouble with outliers. `--quantization
#   bitsandbytes` runs LLM.int8().
# - **SGLang**: `--quantization w8a8_int8` or `w8a8_fp8`. **TensorRT-LLM**: `int8_sq` (SmoothQuant) and
#   `fp8` by ModelOpt.
# - **llama.cpp**: `Q8_0`, a scale for each block of 32 weights; activations are rounded to 8 bits in blocks
#   of 32 at run time, so that an outlier spoils 31 neighbours instead of a whole row. So does this engine's
#   executor for GGUF files.
# - **torchao**: `Int8DynamicActivationInt8WeightConfig`, `Int8WeightOnlyConfig`.
# - **Ridgeline**: `ridgeline quantize -m smollm2 --recipe int8` (or `w8a8`, `w8a8-static`, `llm-int8`,
#   `w8a8-smooth`), then `ridgeline chat -m` with the directory that it wrote.
#
# ## Reading list
#
# - Dettmers et al., *LLM.int8()* (2022), arXiv:2208.07339; and the author's account of [emergent
#   features](https://timdettmers.com/2022/08/17/llm-int8-and-emergent-features/).
# - Xiao et al., *SmoothQuant* (2022), arXiv:2211.10438.
# - Gholami et al., *A survey of quantization methods* (2021), arXiv:2103.13630: the vocabulary.
# - Sun et al., *Massive activations in large language models* (2024), arXiv:2402.17762: why the same
#   features are large every time.
# - `ridgeline/compress/scaling.py`, `ridgeline/ops/torch_ops.py`;
#   [docs/quantization.md](../docs/quantization.md).
