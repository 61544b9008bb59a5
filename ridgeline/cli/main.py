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
app.command("ridgeline.cli.generate:generate")
app.command("ridgeline.cli.chat:chat")
app.command("ridgeline.cli.inspect:inspect")
app.command("ridgeline.cli.synth:synth")
app.command("ridgeline.cli.serve:serve")


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
