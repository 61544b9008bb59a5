"""Greedy answers of Ridgeline's executors and of transformers to three prompts, as a Markdown table.

.venv/bin/python scripts/compare_greedy.py > docs/results/greedy.md
"""

from __future__ import annotations

import torch
import transformers

from ridgeline import LLM, SamplingParams
from ridgeline.models.locate import locate_model

PROMPTS = ("The capital of France is", "1, 2, 3, 4,", "Once upon a time there was a")
NUM_TOKENS = 24


def of_transformers(token_ids: list[int]) -> list[int]:
    generated = MODEL.generate(
        torch.tensor([token_ids]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    return generated[0, len(token_ids) :].tolist()


if __name__ == "__main__":
    path = locate_model("smollm2")
    MODEL = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    answers = {}
    for executor in ("native", "eager"):
        with LLM("smollm2", executor=executor, max_model_len=256, max_num_seqs=4) as llm:
            answers[executor] = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, params)]
            tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    answers["transformers"] = [of_transformers(tokenizer.encode(p)) for p in PROMPTS]
    print(f"SmolLM2-135M-Instruct (Q4_1 file, float32), {NUM_TOKENS} greedy tokens.")
    print("Made by `.venv/bin/python scripts/compare_greedy.py > docs/results/greedy.md`.\n")
    print("| prompt | engine | answer | tokens equal to transformers |\n|---|---|---|---|")
    for i, prompt in enumerate(PROMPTS):
        for engine, tokens in answers.items():
            same = sum(a == b for a, b in zip(tokens[i], answers["transformers"][i], strict=True))
            text = tokenizer.decode(tokens[i]).replace("\n", "\\n").replace("|", "\\|")
            print(f"| {prompt} | {engine} | {text} | {same} of {NUM_TOKENS} |")
