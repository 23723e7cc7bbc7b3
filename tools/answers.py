"""Prints what two models answer to a few problems, side by side:
`python tools/answers.py BEFORE AFTER`.

BEFORE has heldout.jsonl beside its weights. Both answer greedily, so that the same models answer
the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

NUM_PROBLEMS = 4
NUM_CANDIDATES = 64


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} BEFORE AFTER")
    logging.disable_progress_bar()
    before, after = map(Path, sys.argv[1:])

    rows = [json.loads(line) for line in (before / "heldout.jsonl").read_text().splitlines()]
    rows = rows[:NUM_CANDIDATES]
    answers = [answers_of(path, [row["prompt"] for row in rows]) for path in (before, after)]
    right = [f"{{{row['reward_model']['ground_truth']}}}" for row in rows]
    learned = [
        i for i, box in enumerate(right) if box not in answers[0][i] and answers[1][i].endswith(box)
    ]

    print(f"{'held-out problem':<18}{'before':<16}{'after':<16}right answer")
    for i in (learned or list(range(len(rows))))[:NUM_PROBLEMS]:
        question = rows[i]["prompt"][0]["content"]
        print(
            f"{question:<18}{answers[0][i]:<16}{answers[1][i]:<16}{rows[i]['reward_model']['ground_truth']}"
        )


@torch.inference_mode()
def answers_of(path: Path, prompts: list[list[dict[str, str]]]) -> list[str]:
    """Returns the model's most likely answer to each prompt; prompts are of one length."""
    # Any: the annotations of transformers' classes depend on its version.
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    tokens = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    mask = torch.ones_like(tokens)

    out = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=8)
    answers: list[str] = tokenizer.batch_decode(out[:, tokens.shape[1] :], skip_special_tokens=True)
    return answers


if __name__ == "__main__":
    main()
