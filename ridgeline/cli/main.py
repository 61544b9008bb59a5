"""The `ridgeline` command: its subcommands, each imported when it is called, and how errors are shown."""

from __future__ import annotations

import sys

import ridgeline
from ridgeline.cli.options import make_app
from ridgeline.errors import RidgelineError

app = make_app(
    name="ridgeline",
    version=ridgeline.__version__,
    help="""LLM inference whose every optimisation is a setting that can be measured alone.

    Examples:

        ridgeline generate -m smollm2 "The capital of France is"

        ridgeline chat -m smollm2

        ridgeline serve -m smollm2 --max-num-seqs 16

        ridgeline inspect smollm2
    """,
)
COMMANDS = {
    "generate": "Continue a prompt, or answer it; tokens appear as they are made.",
    "chat": "Talk with a model in the terminal.",
    "serve": "Serve a model over the OpenAI API.",
    "inspect": "What is in a GGUF file or Hugging Face directory.",
    "synth": "Write a seeded model file of any shape, for tests and measurements.",
    "bench": "Measure latency, throughput, startup or a server, with intervals; compare results.",
    "profile": "Where the time goes, op by op and thread by thread, and what that says.",
    "machine": "The limits of this machine, or of a described one.",
    "roofline": "Bytes, FLOPs and predicted time of every op; the measured time beside it.",
    "plan": "What fits in memory and how fast it will be, before anything is loaded.",
    "quantize": "Make a model smaller by a recipe, write it, and say what it cost.",
    "pareto": "Quality against size and speed over recipes; the best under a limit.",
    "eval": "Perplexity, divergence from a reference, needle in a context.",
    "simulate": "A workload through the real scheduler with predicted step times, without tensors.",
    "ladder": "Climb from the naive loop to the full engine, one switch at a time.",
    "course": "The twenty notebooks: list, open, run, and what they claim.",
    "kernels": "Test, time and explain the native kernels on this machine.",
}
for _name, _summary in COMMANDS.items():
    app.command(f"ridgeline.cli.{_name}:{_name}", help=_summary if "--help" not in sys.argv[2:] else None)


def main(tokens: list[str] | None = None) -> None:
    """Run one command. A user's mistake is one line on stderr and exit status 1; Ctrl-C is 130."""
    try:
        app(tokens)
    except RidgelineError as error:
        sys.exit(f"ridgeline: {error}")
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
