"""A rank process without a model, for tests of the launch: it does what the messages say."""

from __future__ import annotations

import os
import sys
import time
import traceback

from ridgeline import errors
from ridgeline.distributed.ranks import Seat


def main() -> None:
    seat = Seat.from_environment(os.environ)
    steps, pulse = seat.take()
    try:
        while True:
            order, *arguments = steps.receive()
            if order == "echo":
                steps.send((seat.rank, *arguments))
            elif order == "sleep":
                time.sleep(*arguments)
                steps.send("slept")
            elif order == "raise":
                name, message = arguments
                raise getattr(errors, name, RuntimeError)(message)
            elif order == "exit":
                print("leaving early", file=sys.stderr, flush=True)
                os._exit(*arguments)
    except ConnectionError:
        os._exit(0)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        pulse.fail(error)


if __name__ == "__main__":
    main()
