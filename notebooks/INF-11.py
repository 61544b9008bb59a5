# %% [markdown]
# ## The question
#
# A weight of a model is a number. Training writes it in 32 bits (`float32`), but nobody serves models like
# that: they are served in 16 bits. Two kinds of 16-bit numbers compete, `float16` and `bfloat16`. Half the
# bytes, so half the memory; that much is certain. Two other things are not:
#
# - is it also half the *time*?
# - what is *lost*?
#
# What "32 bits" means here needs a word. The model of this course ships as 4-bit numbers (INF-00 says why);
# "float32" is what these stand for, written out in full. So we do not ask how good the original was, but what
# rounding to 16 bits changes.
#
# Your prediction: how many times as fast as with float32 weights is a decode step with float16 weights, on
# this machine's CPU?

# %%
import numpy as np

from ridgeline import LLM
from ridgeline.bench.environment import environment
from ridgeline.config import LoadConfig
from ridgeline.course import Lesson, figure, measure, ratio
from ridgeline.engine.executors.native import stored_weights
from ridgeline.models.load import load_model
from ridgeline.models.locate import locate_model
from ridgeline.ops.torch_ops import TorchOps
from ridgeline.profiling.machine import machine_limits
from ridgeline.profiling.measured import measure_decode, measure_prefill
from ridgeline.quality.divergence import divergences
from ridgeline.quality.text import load_text, tokenize
from ridgeline.quant.formats import FORMATS

lesson = Lesson("INF-11")

# %%
lesson.predict("decode_float16", None, unit="x")

# %% [markdown]
# ## The arithmetic
#
# ### Range and grain
#
# A floating point number is a sign, an exponent $e$ and a fraction of $m$ bits:
#
# $$ \pm\, 1.\text{fraction} \times 2^{\,e} $$
#
# The bits of the exponent decide the **range**: how large and how small a number can be. The bits of the
# fraction decide the **grain**: how far a number is from the next one, relative to its size. Rounding to the
# nearest is wrong by at most half a grain, $u = 2^{-(m+1)}$ of the number.
#
# | type | bytes | exponent bits | fraction bits $m$ | largest | worst rounding $u$ |
# | --- | ---: | ---: | ---: | ---: | ---: |
# | `float32` | 4 | 8 | 23 | $3.4\cdot10^{38}$ | $2^{-24}$ |
# | `float16` | 2 | 5 | 10 | 65,504 | $2^{-11}$ |
# | `bfloat16` | 2 | 8 | 7 | $3.4\cdot10^{38}$ | $2^{-8}$ |
#
# `bfloat16` is `float32` with the last 16 bits cut off: the same range, a coarse grain. `float16` spends
# three of the exponent's bits on the fraction: eight times finer, and too small a range for some of what goes
# on inside of a model.
#
# ### What rounding should cost
#
# If every weight is off by a small random fraction, so is every output of a matrix product, and the
# probabilities of the next token move a little. How far, we measure as the **KL divergence** of the rounded
# model's probabilities $q$ from the exact ones $p$, in nats per token:
#
# $$ \mathrm{KL}(p\,\|\,q) = \sum_v p_v\,(\ln p_v - \ln q_v) $$
#
# It is zero only where both are equal, and it cannot hide a change as an average can. Near zero it grows with
# the **square** of the error. bfloat16's grain is 8 times that of float16, so expect about $8^2 = 64$ times
# its KL.
#
# The other measure is **perplexity**: $e$ to the mean of $-\ln p$ over the tokens of a text, how many tokens
# the model hesitates between. Its change has a sign: rounding can make a text likelier by luck.
#
# ### What it should gain
#
# A decode step reads all weights and does little with each ([INF-02](INF-02.ipynb)): it is bandwidth bound,
# and half the bytes should take half the time. Prefill is compute bound: its time is arithmetic, and bytes
# hardly matter. There, 16 bits help only where the processor *computes* on 16-bit numbers. So the prediction
# is
#
# | | bytes decide | arithmetic decides |
# | --- | --- | --- |
# | decode | × 2 | |
# | prefill | | × 1 without 16-bit instructions; × 2 and more with them |
#
# Which instructions has this machine?

# %%
cpu = environment()["cpu"]
lesson.record("cpu", cpu["model"])
lesson.record("flags", ", ".join(cpu["flags"]))
limits = machine_limits()
lesson.say("""
{cpu}: {flags}. AVX2 computes on float32 (and on integers) only; F16C converts between float16 and float32 and
computes nothing. Arithmetic on 16-bit numbers would be `avx512_bf16`, `amx_bf16` or `avx512_fp16` in this
list.
""")

# %% [markdown]
# ## The real thing
#
# ### Rounding real weights
#
# Take some matrices of the model as float32, round them to each 16-bit type with the package's own formats,
# and compare. The worst case should be the $u$ of the table above.

# %%
model = load_model(locate_model("smollm2"), LoadConfig())
rows = []
for name in ("layers.0.q_proj", "layers.14.up_proj", "layers.29.down_proj", "embed_tokens"):
    exact = model.weights[name].dequantize().astype(np.float64)
    for dtype, format in (("float16", "F16"), ("bfloat16", "BF16")):
        error = model.weights[name].converted(FORMATS[format]).dequantize() - exact
        worst = np.abs(error[exact != 0] / exact[exact != 0]).max()
        rows.append(
            {
                "matrix": name,
                "type": dtype,
                "worst rounding": f"2^{np.log2(worst):.2f}",
                "rms error [%]": 100 * float(np.sqrt((error**2).mean() / (exact**2).mean())),
                "exact [%]": 100 * float((error == 0).mean()),
            }
        )
lesson.record("rms_squared", (rows[1]["rms error [%]"] / rows[0]["rms error [%]"]) ** 2)
lesson.table("rounding", rows, {"rms error [%]": ".3f", "exact [%]": ".0f"})

# %% [markdown]
# The worst case is as predicted. But many weights are *exact*: a 4-bit number times a scale has few
# significant bits, and in float16 most of them find a place. A model that was trained in bfloat16, as most
# are, would be exact in bfloat16 and would lose nothing at all there.
#
# ### The switch
#
# With the C++ kernels (`executor="native"`) 16 bits are a matter of **storage**. This function is all of it:
# matrices are put into the type, vectors (norms) stay float32.

# %%
lesson.source(stored_weights)

# %% [markdown]
# A kernel reads 16-bit weights, widens each to float32 in a register, and multiplies and adds in float32.
# That is **mixed precision**: narrow where numbers are many and lie still, wide where they are added up. Why
# not add up in 16 bits as well? Add 1 to a sum, again and again, in float16:

# %%
print(np.add.accumulate(np.ones(4096, np.float16))[[10, 100, 1000, 2000, 3000, 4095]])

# %% [markdown]
# The sum stops at 2,048. From there on neighbouring numbers are 2 apart, and 2,048 + 1 rounds back to 2,048.
# A dot product of a model has hundreds to thousands of terms.
#
# The torch executor, in contrast, keeps *activations* (the vectors between operations) in 16 bits too, as a
# GPU does: every vector between two operations is rounded. Still, its norms add up in float32:

# %%
lesson.source(TorchOps.rms_norm)

# %% [markdown]
# ## Measurement
#
# ### Memory

# %%
options = {"executor": "native", "max_num_seqs": 1, "max_model_len": 512, "kv_cache_dtype": "float32"}
llms = {dtype: LLM("smollm2", dtype=dtype, **options) for dtype in ("float32", "float16", "bfloat16")}
weight_bytes = {dtype: llm.engine.executor.native.packed_bytes for dtype, llm in llms.items()}
file_bytes = sum({id(weight): weight.num_bytes for weight in model.weights.values()}.values())
lesson.table(
    "memory of the weights",
    [
        {
            "weights": dtype,
            "MB": weight_bytes[dtype] / 1e6,
            "of float32 [%]": 100 * weight_bytes[dtype] / weight_bytes["float32"],
        }
        for dtype in llms
    ]
    + [
        {
            "weights": "as in the file",
            "MB": file_bytes / 1e6,
            "of float32 [%]": 100 * file_bytes / weight_bytes["float32"],
        }
    ],
    {"MB": ".1f", "of float32 [%]": ".1f"},
)
lesson.claim(
    "memory",
    "16-bit weights take half the memory of 32-bit weights (float32 over float16)",
    value=weight_bytes["float32"] / weight_bytes["float16"],
    claimed=(1.98, 2.02),
    band=(1.99, 2.0),
    unit="x",
)

# %% [markdown]
# Not exactly 2: the norms stay float32, a few thousand numbers. And look at the last line: the file that all
# of this was written out from is smaller by far.
#
# ### Quality: storage
#
# The same text (State of the Union addresses) through the same kernels, with float32 weights as the
# reference.

# %%
num_tokens, context = lesson.pick((1024, 256), (8192, 512))
token_ids = tokenize(llms["float32"], load_text(), num_tokens=num_tokens)
found = divergences(llms["float32"], [llms["float16"], llms["bfloat16"]], token_ids, context=context)
stored = dict(zip(("float16", "bfloat16"), found, strict=True))
lesson.record("perplexity", stored["float16"].reference_perplexity)
for dtype, result in stored.items():
    lesson.record(f"kl_{dtype}", result.kl_mean)
    lesson.record(f"ppl_{dtype}", 100 * (result.perplexity_ratio - 1))


def error_of(result):
    return result.log_likelihood_difference_error


lesson.table(
    "quality",
    [
        {
            "weights stored in": dtype,
            "KL [nats/token]": f"{result.kl_mean:.2g} ± {result.kl_error:.1g}",
            "perplexity [%]": f"{100 * (result.perplexity_ratio - 1):+.3f} ± {100 * error_of(result):.3f}",
            "same most likely token [%]": 100 * result.top1_agreement,
        }
        for dtype, result in stored.items()
    ],
    {"same most likely token [%]": ".2f"},
)
lesson.say("Perplexity with float32 weights: {perplexity:.2f}; ± is one standard error.")

# %%
lesson.claim(
    "loss-float16",
    "float16 weights lose next to nothing: change of perplexity",
    value=abs(lesson.values["ppl_float16"]),
    claimed=(0, 0.1),
    band=(0, 0.1),
    unit="%",
)
lesson.claim(
    "loss-bfloat16",
    "bfloat16 weights lose next to nothing: change of perplexity",
    value=abs(lesson.values["ppl_bfloat16"]),
    claimed=(0, 0.5),
    band=(0, 0.5),
    unit="%",
)
lesson.claim(
    "kl-of-float16",
    "KL of float16 storage (in millionths of a nat)",
    value=1e6 * lesson.values["kl_float16"],
    claimed=(0, 100),
    band=(0.05, 20),
    unit="µnat",
)
lesson.claim(
    "kl-ratio",
    "bfloat16 has an eight times coarser grain, so about 64 times the KL (half to twice of that)",
    value=lesson.values["kl_bfloat16"] / lesson.values["kl_float16"],
    claimed=(32, 128),
    band=(10, 128),
    unit="x",
    because="the worst cases are 8 times apart, the errors of real weights less (squared, {rms_squared:.0f} "
    "times in the "
    "first matrix of the table); what remains between that and the measured number we cannot explain yet",
)

# %% [markdown]
# ### Quality: arithmetic
#
# Now everything in bfloat16: torch, with activations rounded after every operation. The reference is the
# same.

# %%
torch_options = {"executor": "eager", "max_num_seqs": 1, "max_model_len": 512, "num_threads": 1}
torch_llms = {dtype: LLM("smollm2", dtype=dtype, **torch_options) for dtype in ("float32", "bfloat16")}
short = token_ids[: lesson.pick(256, 2048)]
computed = divergences(llms["float32"], list(torch_llms.values()), short, context=128)
kl = {dtype: result.kl_mean for dtype, result in zip(torch_llms, computed, strict=True)}
lesson.record("kl_torch_float32", kl["float32"])
lesson.record("kl_torch_bfloat16", kl["bfloat16"])
lesson.say("""
KL from the same reference: torch in float32 {kl_torch_float32:.1g} (another order of sums, nothing else),
torch in bfloat16 **{kl_torch_bfloat16:.2g}**, against {kl_bfloat16:.2g} where only the storage is bfloat16.
""")
lesson.claim(
    "activations",
    "It does not matter whether only weights are bfloat16 or the arithmetic too (KL of arithmetic over "
    "storage)",
    value=kl["bfloat16"] / lesson.values["kl_bfloat16"],
    claimed=(0.5, 2),
    band=(3, 200),
    unit="x",
    because="weights are rounded once, activations after each of the hundreds of operations of a step",
)

# %% [markdown]
# ### Speed
#
# Four questions: decode and prefill, with C++ kernels (which convert) and with torch (which may have 16-bit
# arithmetic). Every figure is a ratio to float32, taken in turns. torch runs on one thread: its threads wait
# for each other so often that a busy neighbour on this machine would decide the result.


# %%
def decode(llm):
    return lambda: measure_decode(llm.engine, 1, 64, steps=8)


def prefill(llm, num_tokens=128):
    return lambda: measure_prefill(llm.engine, num_tokens, repeats=1)


repeats = lesson.pick(5, 11)
gains = {}
for dtype in ("float16", "bfloat16"):
    gains["native", "decode", dtype] = ratio(decode(llms["float32"]), decode(llms[dtype]), repeats=repeats)
    gains["native", "prefill", dtype] = ratio(prefill(llms["float32"]), prefill(llms[dtype]), repeats=repeats)
for name, work in (("decode", decode), ("prefill", prefill)):
    gains["torch", name, "bfloat16"] = ratio(
        work(torch_llms["float32"]), work(torch_llms["bfloat16"]), repeats=3
    )
lesson.table(
    "speed beside float32",
    [
        {
            "executor": executor,
            "phase": phase,
            "type": dtype,
            "times as fast as float32": f"{gain:.2f} ({gain.low:.2f} to {gain.high:.2f})",
        }
        for (executor, phase, dtype), gain in gains.items()
    ],
)
step_s = {dtype: measure(decode(llm), repeats=3) for dtype, llm in llms.items()}
lesson.table(
    "decode and the memory",
    [
        {
            "weights": dtype,
            "step [ms]": 1e3 * step_s[dtype],
            "reads [GB/s]": weight_bytes[dtype] / step_s[dtype] / 1e9,
            "limit at this size [GB/s]": limits.read_gb_s(weight_bytes[dtype]),
        }
        for dtype in llms
    ],
    {"step [ms]": ".1f", "reads [GB/s]": ".1f", "limit at this size [GB/s]": ".1f"},
)

# %%
drawing, axes = figure("16-bit weights beside float32", y="times as fast", size=(7.6, 3.6))
names = [f"{executor}\n{phase}\n{dtype}" for executor, phase, dtype in gains]
heights = list(gains.values())
spread = [[gain - gain.low for gain in heights], [gain.high - gain for gain in heights]]
axes.bar(names, heights, yerr=spread, color=["C0" if "decode" in name else "C1" for name in names], width=0.6)
axes.axhline(1, color="C5", linestyle="--")
axes.axhline(2, color="C5", linestyle=":")
_ = axes.text(-0.4, 2.03, "half the bytes")

# %%
lesson.claim(
    "decode-float16",
    "Half the bytes, twice the speed: decode with float16 weights (C++ kernels)",
    value=lambda: ratio(decode(llms["float32"]), decode(llms["float16"]), repeats=repeats),
    claimed=(1.8, 2.2),
    band=(1.1, 2.6),
    unit="x",
    because="each weight must be widened to float32 before it is used, and the step has parts that read no "
    "weights",
)
lesson.claim(
    "prefill-float16",
    "Prefill is twice as fast as well (C++ kernels, 128 tokens)",
    value=lambda: ratio(prefill(llms["float32"]), prefill(llms["float16"]), repeats=repeats),
    claimed=(1.8, None),
    band=(0.5, 1.7),
    unit="x",
    because="these kernels store 16 bits and compute in float32: the arithmetic, which decides prefill, is "
    "the same",
)
lesson.claim(
    "torch-bfloat16",
    "In torch, bfloat16 decodes faster than float32",
    value=gains["torch", "decode", "bfloat16"],
    claimed=(1.05, None),
    band=(0.02, 4),
    unit="x",
    because="its products of one row in bfloat16 are not made for this processor; it converts, and rounds "
    "every result",
)
for llm in (*llms.values(), *torch_llms.values()):
    llm.close()

# %% [markdown]
# Compare with the prediction. Decode with the C++ kernels gains most of the factor of two, not all of it. The
# second table shows where the rest is: with 16-bit weights the kernels read fewer bytes a second, further
# from the limit of the memory, because each weight has to be widened before it can be used; and a step has
# parts that read no weights. Prefill gains little, as predicted for storage alone: its weights are read once
# for all tokens, which is a small part of its time.
#
# torch is another matter, and depends on the processor more than on the type. Where it has bfloat16
# arithmetic, large products can be several times as fast as in float32; with one row there is nothing to
# compute, and the rounding of every result remains. Without such instructions all of it is slower than
# float32. **The type of a number is a promise about bytes. About time it promises nothing.**

# %%
ladder = lesson.committed("docs/results/ladder.json")
rung = next(step for step in ladder["details"]["steps"] if step["rung"]["name"] == "bfloat16")
lesson.record("ladder_date", ladder["created"][:10])
lesson.record("ladder_gain", rung["speed_up"])
lesson.record("ladder_kl", rung["measured"]["kl_mean"])
lesson.record("torch_prefill", gains["torch", "prefill", "bfloat16"])
lesson.say("""
Here torch's prefill in bfloat16 was **{torch_prefill:.2f} times** as fast as in float32, with one thread and
the same length again and again. The committed ladder (`docs/results/ladder.json`, {ladder_date}, made by
`ridgeline ladder -m smollm2`) ran whole requests of many lengths on two threads, and there bfloat16 was
**{ladder_gain:.2f} times** as fast altogether, at a KL of {ladder_kl:.1g}: a loss, and the climb went on
without it. Measure the workload that you have.
""")

# %% [markdown]
# ## Where it does not help
#
# - **Compute bound work without 16-bit instructions**: prefill above, and large batches
#   ([INF-12](INF-12.ipynb)).
# - **Where fewer bits do**: 4-bit weights read a third of the bytes of 16-bit ones and are faster still
#   ([INF-24](INF-24.ipynb)). 16 bits are the format of quality, not of speed.
# - **Long sums**: the running total above. Attention's softmax, norms and the final logits stay in float32 in
#   every serious engine.
# - **Large values in float16**: an activation beyond 65,504 becomes infinite, and the next softmax turns it
#   into "not a number". Some models (T5, Gemma) are known for it; they need bfloat16 or float32.
#
# ## Exercises

# %%
lesson.exercise("largest")

# %% [markdown]
# What is the largest finite number in `float16`? Its largest exponent is 15 and its fraction has ten bits.
# (Do not look at the table; compute it.)

# %%
largest = ...
lesson.check("largest", largest)

# %% tags=["solution"]
largest = (2 - 2**-10) * 2**15  # 1.1111111111 in binary, times 2 to the 15
lesson.check("largest", largest)

# %% tags=["wrong"]
lesson.refuses("largest", 2**16)
lesson.refuses("largest", 2**15)
lesson.refuses("largest", 3.4e38)

# %%
lesson.exercise("stalls")

# %% [markdown]
# The sum of ones in `float16` stops at 2,048. Where would it stop in `bfloat16`?

# %%
stalls = ...
lesson.check("stalls", stalls)

# %% tags=["solution"]
stalls = 2 ** (7 + 1)  # from here on neighbours are 2 apart, and a half rounds to the even one
lesson.check("stalls", stalls)

# %% tags=["wrong"]
lesson.refuses("stalls", 2048)
lesson.refuses("stalls", 128)
lesson.refuses("stalls", 512)

# %%
lesson.exercise("decode-bound")

# %% [markdown]
# Llama 3.1 8B has 8.03 · 10⁹ weights, an H100 reads 3.35 · 10¹² bytes a second. At most how many tokens a
# second can one request get with weights in `bfloat16`?

# %%
decode_bound = ...  # tokens a second
lesson.check("decode-bound", decode_bound)

# %% tags=["solution"]
decode_bound = 3.35e12 / (2 * 8.03e9)
lesson.check("decode-bound", decode_bound)

# %% tags=["wrong"]
lesson.refuses("decode-bound", 3.35e12 / (4 * 8.03e9))
lesson.refuses("decode-bound", 3.35e12 / 8.03e9)
lesson.refuses("decode-bound", 2 * 8.03e9 / 3.35e12)

# %% [markdown]
# ## The answer

# %%
lesson.say("""
Sixteen bits halve the memory and cost next to nothing in quality: KL {kl_float16:.1g} for float16 and
{kl_bfloat16:.1g} for bfloat16 storage, perplexity {ppl_float16:+.3f} % and {ppl_bfloat16:+.3f} %. Decode gets
**{decode_float16:.2f} times** as fast, because it waits for bytes; prefill does not ({prefill_float16:.2f}
times), because it waits for arithmetic, which here is float32 in either case.
""")
lesson.answer()

# %% [markdown]
# ## In production
#
# - **vLLM**: `--dtype auto|half|bfloat16|float`; auto takes what the checkpoint was trained in.
#   `--kv-cache-dtype fp8` goes below 16 bits for the cache.
# - **SGLang**: `--dtype`; `--enable-fp32-lm-head` computes logits in float32.
# - **TensorRT-LLM**: the type of the checkpoint; FP8 and FP4 on tensor cores, with float32 accumulators.
# - **llama.cpp**: `llama-quantize model.gguf out.gguf F16` (or `BF16`); the KV cache is `f16` unless
#   `--cache-type-k`/`-v` say otherwise.
# - **Transformers**: `from_pretrained(..., dtype=torch.bfloat16)`; `torch.autocast` mixes by operation.
# - GPUs: a tensor core multiplies 16-bit numbers and adds in float32, at many times the rate of float32.
#   There bfloat16 wins twice, in bytes and in arithmetic, and nobody asks.
# - **Ridgeline**: `dtype="float16"` stores so on `native`, computes so on `eager` and `compiled`;
#   `kv_cache_dtype` for the cache.
#
# ## Reading list
#
# - Micikevicius et al. 2017, [Mixed Precision Training](https://arxiv.org/abs/1710.03740): which numbers may
#   be narrow.
# - Kalamkar et al. 2019, [A Study of BFLOAT16 for Deep Learning Training](https://arxiv.org/abs/1905.12322):
#   why range beats grain.
# - Goldberg 1991, [What Every Computer Scientist Should Know About Floating-Point
#   Arithmetic](https://doi.org/10.1145/103162.103163).
# - Dutta et al. 2024, [Accuracy is Not All You Need](https://arxiv.org/abs/2407.09141): why KL and not
#   accuracy.
