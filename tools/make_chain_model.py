"""Makes the base model and the data of the chain sums in docs/results.md: a tiny Qwen2 that writes
every running total out, and now and then forgets to carry.

    python tools/make_chain_model.py --out runs/results/chain

The problems are those of reasoning_gym's `chain_sum` (eight terms of one digit, + and -) whose
running totals stay between 0 and 99. An answer goes from total to total, 26 tokens long:

    0;+4;+8;-7;+6;+4;-7;+5=      04;12;05;11;15;08;13;\\boxed{13}

The model is make_tiny_model.py's with two more words. Its weights come with this file
(chain_model.safetensors); `--warm-up` makes them again from nothing, in minutes of one core.

The warm-up is supervised learning from a teacher who becomes sloppy. In a quarter of the steps that
carry or borrow he then forgets to: 7;+8 is 05. And a fifth of his answers are a box without any
working, with what comes out if every carry is forgotten. So the base model has bad habits of two
kinds, one of a token and one of a whole answer; which way is right, only the verifier's labels
tell.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_tiny_model import SPECIAL, learn, new_model, new_tokenizer, save
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

WORDS = [*SPECIAL, *"0123456789", "+", "-", "=", ";", "\\boxed{", "}"]
TRAIN = 4000
HELD_OUT = 400
TERMS = 8

CLEAN_SHARE = 0.7
"""Share of the warm-up in which the teacher is not sloppy yet."""
SLOPPY_SHARE = 0.25
DIRECT_SHARE = 0.2
BATCH = 16
STEPS = 1200
LEARNING_RATE = 3e-3

SHIPPED = Path(__file__).with_name("chain_model.safetensors")
"""The weights after this file's warm-up."""


@dataclass(frozen=True)
class Problem:
    """A chain sum: `7 + 8 - 3` is Problem(7, (("+", 8), ("-", 3)), ...)."""

    first: int

    rest: tuple[tuple[str, int], ...]

    entry: dict[str, Any]
    """What reasoning_gym gives: question, answer, metadata."""

    @property
    def question(self) -> str:
        # As far from term to term as from total to total in the answer.
        return f"{self.first}" + "".join(f";{sign}{term}" for sign, term in self.rest) + "="

    @property
    def result(self) -> int:
        return int(self.entry["answer"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the chain sums' base model and data.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--warm-up", action="store_true", help="make the weights again instead of reading them"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are too small to share
    torch.manual_seed(0)

    heldout, train = split_problems()
    tokenizer = new_tokenizer(WORDS)
    model = new_model(WORDS)
    if options.warm_up:
        warm_up(model, tokenizer, train)
    else:
        model.load_state_dict(load_file(SHIPPED))
    accuracy, tokens = sampled_accuracy(model, tokenizer, heldout)
    print(
        f"base model: right on {accuracy:.1%} of {len(heldout)} held-out chain sums, "
        f"one sample each; {tokens:.0f} tokens an answer"
    )
    save(options.out, model, tokenizer, train=rows_of(train), heldout=rows_of(heldout))


def split_problems() -> tuple[list[Problem], list[Problem]]:
    """Held-out and training problems, none twice."""
    problems: dict[str, Problem] = {}
    for problem in chain_sums():
        problems.setdefault(problem.question, problem)
        if len(problems) == HELD_OUT + TRAIN:
            break
    # The first ones are held out, whatever the size of the training set.
    listed = list(problems.values())
    return listed[:HELD_OUT], listed[HELD_OUT:]


def chain_sums() -> Iterator[Problem]:
    """The problems of reasoning_gym whose running totals fit two digits."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(
        "chain_sum",
        min_terms=TERMS,
        max_terms=TERMS,
        min_digits=1,
        max_digits=1,
        size=10**6,
        seed=0,
    )
    for index in range(len(dataset)):
        entry = dataset[index]
        first, *signs_and_terms = entry["metadata"]["expression"].split()
        pairs = zip(signs_and_terms[::2], signs_and_terms[1::2], strict=True)
        rest = tuple((sign, int(term)) for sign, term in pairs)
        problem = Problem(int(first), rest, entry)
        if all(0 <= total <= 99 for total in totals(problem)):
            yield problem


def totals(problem: Problem) -> Iterator[int]:
    total = problem.first
    for sign, term in problem.rest:
        total = added(total, sign, term)
        yield total


def added(total: int, sign: str, term: int) -> int:
    if sign == "+":
        return total + term
    return total - term


def added_without_carry(total: int, sign: str, term: int) -> int:
    # The tens stay as they are; Python's remainder is never negative, as after a borrow.
    return 10 * (total // 10) + added(total, sign, term) % 10


def teacher_answer(problem: Problem, draw: random.Random, sloppiness: float) -> str:
    """What the teacher writes; `sloppiness` scales the shares of both bad habits."""
    is_direct = draw.random() < sloppiness * DIRECT_SHARE
    total = problem.first
    working = ""
    for sign, term in problem.rest:
        if is_direct or draw.random() < sloppiness * SLOPPY_SHARE:
            total = added_without_carry(total, sign, term)
        else:
            # After a slip the running total may leave the two digits.
            total = added(total, sign, term) % 100
        working += f"{total:02};"
    boxed = f"\\boxed{{{total:02}}}"
    if is_direct:
        return boxed
    return working + boxed


def warm_up(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
) -> None:
    """Supervised learning of the teacher's answers; the prompt has no loss."""
    draw = random.Random(0)

    def texts_of_step(step: int) -> list[str]:
        # How to add is learned sooner from a teacher who makes no slips.
        sloppiness = 0.0
        if step >= CLEAN_SHARE * STEPS:
            sloppiness = 1.0
        batch = draw.choices(problems, k=BATCH)
        return [
            f"<|user|>{p.question}<|assistant|>{teacher_answer(p, draw, sloppiness)}<|end|>"
            for p in batch
        ]

    learn(
        model,
        tokenizer,
        texts_of_step,
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        betas=(0.9, 0.98),
    )


@torch.inference_mode()
def sampled_accuracy(
    model: Any, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]
) -> tuple[float, float]:
    """Returns the share of right answers at temperature 1, and the mean number of tokens."""
    prompts = tokenizer(
        [f"<|user|>{p.question}<|assistant|>" for p in problems],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    out = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=48)
    answers = out[:, prompts["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    num_right = 0
    for text, problem in zip(texts, problems, strict=True):
        boxed = re.findall(r"\\boxed\{(\d+)\}", text)
        num_right += boxed[-1:] == [f"{problem.result:02}"]
    num_tokens = (answers != tokenizer.pad_token_id).sum().item()
    return num_right / len(problems), num_tokens / len(problems)


def rows_of(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """The problems in the DeepScaleR schema, with what reasoning_gym says of them beside."""
    return [
        {
            "data_source": "reasoning_gym",
            "prompt": [{"role": "user", "content": problem.question}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": f"{problem.result:02}"},
            "extra_info": problem.entry["metadata"],
        }
        for problem in problems
    ]


if __name__ == "__main__":
    main()
