"""`ridgeline chat`: a conversation in the terminal; the prefix cache makes a turn cost its own tokens."""

from __future__ import annotations

import sys

from ridgeline.cli.generate import run
from ridgeline.cli.options import ChatParams
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import RequestError


def chat(
    *,
    engine: EngineConfig,
    sampling: ChatParams = ChatParams(),
    system: str | None = None,
) -> None:
    """Talk with a model. /clear forgets the conversation, /exit or Ctrl-D ends it.

    Examples:

        ridgeline chat -m smollm2

        ridgeline chat -m smollm2 --system "Answer in one sentence." --temperature 0

    Parameters
    ----------
    engine
        How to run the model.
    system
        A system message before the conversation.
    """
    llm = LLMEngine.from_config(engine)
    if llm.tokenizer is None:
        raise RequestError(
            "chat: this model has no tokenizer and no chat template; use generate with token ids"
        )
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    interactive = sys.stdin.isatty()
    try:
        while True:
            line = _read_line("> " if interactive else "")
            if line is None or line == "/exit":
                break
            if line == "/clear":
                messages = list(beginning)
                continue
            if not line:
                continue
            messages.append({"role": "user", "content": line})
            text = llm.tokenizer.apply_chat_template(messages)
            prompt = {"prompt_token_ids": llm.tokenizer.encode(text, add_special_tokens=False)}
            try:
                output = run(llm, prompt, sampling, on_text=_write)
            except RequestError as error:
                sys.stdout.write(
                    f"{error}\nThe conversation is too long for the model; /clear starts anew.\n"
                )
                messages.pop()
                continue
            sys.stdout.write("\n")
            messages.append({"role": "assistant", "content": output.outputs[0].text})
    finally:
        llm.close()


def _read_line(prompt: str) -> str | None:
    try:
        return input(prompt).strip()
    except EOFError:
        return None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
