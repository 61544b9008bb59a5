"""The twenty notebooks, in teaching order: what each is called, how long it takes, what it is for."""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Notebook:
    """One entry; its source is notebooks/{code}.py."""

    code: str
    minutes: int
    title: str
    section: str
    tags: tuple[str, ...]
    sentence: str
    """For its card: the question it answers."""
    able: tuple[str, ...]
    """What the reader can do afterwards, each finishing "you will be able to"."""
    before: tuple[str, ...] = ()
    """Codes of the notebooks to read first."""


FUNDAMENTALS = "Fundamentals"
CORE = "Core optimizations"
MEMORY = "Attention and memory"
SERVING = "Serving"
QUANTIZATION = "Quantization in depth"

NOTEBOOKS = (
    Notebook(
        "INF-00",
        30,
        "Inference Basics",
        FUNDAMENTALS,
        ("prefill", "decode", "throughput", "latency", "landscape"),
        "Why do tokens leave one at a time, and what does each of them cost?",
        (
            "say what prefill and decode do, and what each costs",
            "predict the decode speed of a model from its size and the memory bandwidth",
            "place an engine on the plane of latency and throughput",
        ),
    ),
    Notebook(
        "INF-01",
        35,
        "Profiling Inference",
        FUNDAMENTALS,
        ("torch.profiler", "utilization", "memory bandwidth", "compute"),
        "Where does the time of one token go, and how do you know?",
        (
            "profile an engine op by op and read its trace",
            "turn a time into GB/s and GFLOP/s beside the machine's limit",
            "correct a wrong guess about the bottleneck",
        ),
        ("INF-00",),
    ),
    Notebook(
        "INF-02",
        35,
        "Prefill vs Decode",
        FUNDAMENTALS,
        ("prefill latency", "decode throughput", "TTFT", "TBT"),
        "Why is reading a prompt a different problem from writing an answer?",
        (
            "tell a compute bound phase from a bandwidth bound one",
            "predict TTFT from the prompt and TBT from context and batch",
            "choose which phase to optimise for a workload",
        ),
        ("INF-01",),
    ),
    Notebook(
        "INF-03",
        30,
        "Baseline Benchmarking",
        FUNDAMENTALS,
        ("tokens/sec", "P50/P95/P99", "reproducibility"),
        "When is one measured number really larger than another?",
        (
            "make a benchmark that repeats, and say how well",
            "state a percentile only where there are samples for it",
            "compare two engines without fooling yourself",
        ),
        ("INF-00",),
    ),
    Notebook(
        "INF-10",
        40,
        "KV Cache Implementation",
        CORE,
        ("past key values", "cache management", "memory"),
        "What does remembering keys and values save, and what does it cost?",
        (
            "compute the bytes of cache per token from a config",
            "predict what the cache saves at any length",
            "find the cache in the engine's code, and its limits",
        ),
        ("INF-02",),
    ),
    Notebook(
        "INF-11",
        35,
        "Mixed Precision Inference",
        CORE,
        ("FP16", "BF16"),
        "Half the bytes: is it also half the time, and what is lost?",
        (
            "say what FP16 and BF16 keep and what they drop",
            "measure the loss as perplexity and as KL divergence",
            "say which of them is faster on your machine, and why",
        ),
        ("INF-02",),
    ),
    Notebook(
        "INF-12",
        30,
        "Static Batching",
        CORE,
        ("throughput", "padding", "batch size"),
        "How many requests can share one read of the weights?",
        (
            "predict throughput by batch size",
            "compute what padding and waiting waste",
            "find the batch size where decode turns compute bound",
        ),
        ("INF-10",),
    ),
    Notebook(
        "INF-13",
        35,
        "torch.compile",
        CORE,
        ("Dynamo", "Inductor", "graph optimization"),
        "What can a compiler save, and when does it pay back?",
        (
            "compile a model without graph breaks and prove it",
            "compute when compile time is paid back",
            "say what a recorded program does otherwise",
        ),
        ("INF-01",),
    ),
    Notebook(
        "INF-14",
        40,
        "INT8 Quantization",
        CORE,
        ("PTQ", "dynamic", "LLM.int8()"),
        "Four times smaller at no loss: for weights, for activations, for both?",
        (
            "quantize weights and activations to 8 bits, statically and dynamically",
            "find outliers and say what they do",
            "choose between LLM.int8() and SmoothQuant",
        ),
        ("INF-11",),
    ),
    Notebook(
        "INF-20",
        45,
        "Flash Attention Explained",
        MEMORY,
        ("IO-aware", "tiling", "HBM bandwidth"),
        "The same result with a fraction of the memory: where did the traffic go?",
        (
            "derive the online softmax and tile it",
            "count the bytes that attention moves, with and without tiles",
            "say when flash attention does not matter",
        ),
        ("INF-10",),
    ),
    Notebook(
        "INF-21",
        40,
        "MQA & GQA",
        MEMORY,
        ("KV heads", "LLaMA-2", "quality"),
        "How many key and value heads does a model need?",
        (
            "compute cache size and decode speed from the number of KV heads",
            "turn a GQA model into MHA exactly, and into MQA at a measured loss",
            "say at which context the difference matters",
        ),
        ("INF-10",),
    ),
    Notebook(
        "INF-23",
        45,
        "Long Context Inference",
        MEMORY,
        ("RoPE scaling", "YaRN", "sliding window", "attention sinks"),
        "What happens beyond the length a model was trained on?",
        (
            "read perplexity by position and see where a model breaks",
            "choose between linear, NTK and YaRN scaling",
            "say what a sliding window with sinks keeps and what it loses",
        ),
        ("INF-20",),
    ),
    Notebook(
        "INF-24",
        40,
        "Memory Optimization",
        MEMORY,
        ("FP32", "FP16", "BF16", "INT8", "INT4", "model size"),
        "Which format gives the most quality for a byte?",
        (
            "predict the memory of a model in any format, and check it",
            "read a Pareto front of size, quality and speed",
            "choose a format for a machine",
        ),
        ("INF-14",),
    ),
    Notebook(
        "INF-30",
        40,
        "Continuous Batching",
        SERVING,
        ("Orca", "request scheduling", "serving"),
        "What is gained when requests join and leave at every step?",
        (
            "read the scheduler's plan of a step",
            "predict throughput and tail latency of a workload by simulation",
            "say when static batching is as good",
        ),
        ("INF-12",),
    ),
    Notebook(
        "INF-31",
        45,
        "PagedAttention",
        SERVING,
        ("vLLM", "memory pages", "KV blocks"),
        "How much of a KV cache is used, and what does paging change?",
        (
            "compute reserved, used and wasted cache of a workload",
            "follow a request through block table and slot mapping",
            "measure what the indirection costs",
        ),
        ("INF-30",),
    ),
    Notebook(
        "INF-33",
        35,
        "Prefix Caching",
        SERVING,
        ("system prompt", "hit rate", "reuse"),
        "What if the beginning of the prompt was computed before?",
        (
            "predict the hit rate and the TTFT of a traffic",
            "say how blocks are hashed, shared and evicted",
            "recognise traffic that gains nothing",
        ),
        ("INF-31",),
    ),
    Notebook(
        "INF-34",
        50,
        "Multi-GPU Serving",
        SERVING,
        ("tensor parallel", "pipeline parallel"),
        "When is a second device worth what it must be told?",
        (
            "count the bytes that each token sends between ranks",
            "predict the speed of tensor and pipeline parallelism on given links",
            "choose between splitting a model and copying it",
        ),
        ("INF-30",),
    ),
    Notebook(
        "INF-41",
        50,
        "GPTQ Quantization",
        QUANTIZATION,
        ("INT4", "Hessian", "AutoGPTQ"),
        "How can a rounding error be paid back by the weights that come after?",
        (
            "derive GPTQ's update and read it in the code",
            "judge a 4-bit model with an honest interval",
            "say what closes the gap to the base model",
        ),
        ("INF-14",),
    ),
    Notebook(
        "INF-42",
        50,
        "AWQ Quantization",
        QUANTIZATION,
        ("activation-aware", "weight scaling", "AutoAWQ"),
        "Which weights matter, and how do you protect them without keeping them?",
        (
            "find salient channels from activations",
            "derive and search the scales",
            "choose between RTN, AWQ and GPTQ at equal bits",
        ),
        ("INF-41",),
    ),
    Notebook(
        "INF-43",
        45,
        "GGUF & CPU Inference",
        QUANTIZATION,
        ("llama.cpp", "Q4_0", "K-quants", "CPU"),
        "What is in a GGUF file, and how fast can a CPU run it?",
        (
            "read a GGUF file byte by byte",
            "choose a GGUF type by size, quality and speed",
            "predict what a 7B model needs on your machine",
        ),
        ("INF-24",),
    ),
)
SECTIONS = (FUNDAMENTALS, CORE, MEMORY, SERVING, QUANTIZATION)


def notebook(code: str) -> Notebook:
    """By its code, in either case. Raises ConfigError."""
    for entry in NOTEBOOKS:
        if entry.code == code.upper():
            return entry
    raise ConfigError(f"{code!r} is no notebook; there are {', '.join(n.code for n in NOTEBOOKS)}")
