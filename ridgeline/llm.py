"""`LLM`: the offline interface for scripts and notebooks, in the shape of vLLM's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine, Prompt
from ridgeline.errors import RankError, RequestError
from ridgeline.request import RequestOutput
from ridgeline.sampling_params import SamplingParams

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."} as in the OpenAI API."""


class LLM:
    """A model in this process: `LLM("smollm2", max_num_seqs=4).generate(["Hello"])`.

    Options are the fields of `EngineConfig` and its groups, by name.
    """

    def __init__(self, model: str, **options: Any) -> None:
        """Load `model`: a .gguf file, a Hugging Face directory or an alias. Raises RidgelineError."""
        self.engine = LLMEngine.from_config(EngineConfig.from_options(str(model), **options))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Finish all prompts -> one output each, in their order.

        One SamplingParams for all, or one for each. A prompt that cannot be served raises RequestError
        before anything runs; RankError says that a rank of a parallel engine was lost meanwhile, and the
        next call is served again.
        """
        prompts = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts but {len(sampling_params)} sampling_params; give one or as many"
            )
        request_ids: list[str] = []
        finished: dict[str, RequestOutput] = {}
        try:
            for prompt, params in zip(prompts, sampling_params, strict=True):
                request_ids.append(self.engine.add_request(prompt, params))
            while len(finished) < len(prompts):
                for output in self.engine.step():
                    if output.error is not None:
                        raise RankError(output.error)
                    if output.finished:
                        finished[output.request_id] = output
        finally:
            for request_id in request_ids:
                self.engine.abort(request_id)
        return [finished[request_id] for request_id in request_ids]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """The same, one prompt, yielding the cumulative output after every token.

        Leaving the iterator early aborts the request.
        """
        request_id = self.engine.add_request(prompt, sampling_params)
        finished = False
        try:
            while not finished:
                for output in self.engine.step():
                    if output.request_id == request_id:
                        if output.error is not None:
                            raise RankError(output.error)
                        finished = output.finished
                        yield output
        finally:
            self.engine.abort(request_id)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template."""
        if not messages:
            raise RequestError("chat: expected at least one message, given none")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        return self.generate(
            [self.chat_prompt(conversation, **template_options) for conversation in conversations],  # type: ignore[arg-type]
            sampling_params,
        )

    def chat_prompt(self, messages: Sequence[Message], **template_options: Any) -> Prompt:
        """The prompt of a conversation: the template's text and its token ids."""
        if self.engine.tokenizer is None:
            raise RequestError(
                "this model has no tokenizer, so no chat template; use generate with token ids"
            )
        text = self.engine.tokenizer.apply_chat_template(messages, **template_options)
        return {"prompt_token_ids": self.engine.tokenizer.encode(text, add_special_tokens=False)}

    def close(self) -> None:
        """Give back threads and memory; also at the end of a `with` block."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
