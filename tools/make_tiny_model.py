"""Makes the quickstart's base model and its data: a tiny Qwen2 that adds two numbers,
and mostly forgets the carry.

    python tools/make_tiny_model.py --out runs/quickstart/base

Shaped like DeepSeek-R1-Distill-Qwen (biases on q, k and v, grouped queries, untied embeddings), 0.3
M parameters, with a tokenizer of its own: one token a digit. The task is the sum of two two-digit
numbers; 400 pairs of them, with their mirrors, are held out: neither this warm-up nor training ever
sees them.

The weights after the warm-up come with this file (tiny_model.safetensors), so that the model is
there in seconds; `--warm-up` makes them again from nothing, in minutes of one core.

The warm-up is a thousand steps of supervised learning from a sloppy teacher, who drops every carry
in 70 % of the sums: 58+67 is then 15, and 125 otherwise. So the base model knows both ways of
adding and prefers the wrong one: it is right where there is nothing to carry, and sometimes
elsewhere. Which way is right, only the verifier's labels tell.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
WORDS = [*SPECIAL, *"0123456789", "+", "=", "\\boxed{", "}"]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELD_OUT = 400
SLOPPY_SHARE = 0.7
BATCH = 256

SHIPPED = Path(__file__).with_name("tiny_model.safetensors")
"""The weights after a warm-up of 1000 steps with seed 0."""

Pair = tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the quickstart's base model and data.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the split, the weights and the warm-up"
    )
    parser.add_argument("--steps", type=int, default=1000, help="warm-up steps")
    parser.add_argument(
        "--warm-up", action="store_true", help="make the weights again instead of reading them"
    )
    options = parser.parse_args()
    shipped = not options.warm_up
    if shipped and (options.seed, options.steps) != (0, 1000):
        parser.error("the weights that are shipped are of seed 0 and 1000 steps; add --warm-up")
    torch.set_num_threads(1)  # the matrices are too small to share
    torch.manual_seed(options.seed)
    draw = random.Random(options.seed)

    heldout, train = split_pairs(draw)
    tokenizer = new_tokenizer()
    model = new_model()
    num_parameters = sum(p.numel() for p in model.parameters())
    if shipped:
        model.load_state_dict(load_file(SHIPPED))
    else:
        print(f"base model: {num_parameters:,} parameters; warm-up of {options.steps} steps")
        warm_up(model, tokenizer, train, draw, options.steps)
    accuracy = greedy_accuracy(model, tokenizer, heldout)
    print(
        f"base model: {num_parameters:,} parameters, "
        f"right on {accuracy:.1%} of {len(heldout)} held-out sums"
    )
    # Below, hardly a group has a right answer to learn from; above, little is left to learn.
    if not 0.1 < accuracy < 0.5:
        sys.exit(
            f"the warm-up ended at {accuracy:.3f}, outside 0.1 to 0.5; take another --seed or "
            "--steps"
        )

    save(
        options.out,
        model,
        tokenizer,
        train=rows_of(train, "train"),
        heldout=rows_of(heldout, "heldout"),
    )


def split_pairs(draw: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Held-out and training pairs.

    A pair and its mirror, 58+67 and 67+58, are never on both sides.
    """
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    # 58+67 is 67+58: who has seen the one knows the other.
    draw.shuffle(pairs)
    heldout = pairs[:HELD_OUT]
    seen = {frozenset(pair) for pair in heldout}
    return heldout, [pair for pair in pairs if frozenset(pair) not in seen]


def new_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token a digit; `\\boxed{` and the chat roles are tokens too.

    transformers 5 loads every qwen2 directory as byte-level BPE with Qwen2's own pre-tokenizer,
    whatever the saved tokenizer says. So this is a byte-level BPE without merges, and what is
    longer than a character is an added token: those are found before any pre-tokenizer runs.
    """
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in SPECIAL]
    )
    tokenizer.add_tokens([AddedToken("\\boxed{", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|pad|>",  # unset, Qwen2's default would be appended to the vocabulary
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
    )


def new_model(words: Sequence[str] = WORDS) -> Qwen2ForCausalLM:
    """Two layers of width 128: 4 query heads, 2 key-value heads of size 32."""
    # A dict: transformers annotates other arguments in each version.
    settings: dict[str, Any] = dict(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=WORDS.index("<|end|>"),
        pad_token_id=WORDS.index("<|pad|>"),
    )
    return Qwen2ForCausalLM(Qwen2Config(**settings))


def question(pair: Pair) -> str:
    return f"{pair[0]}+{pair[1]}="


def true_sum(pair: Pair) -> int:
    return pair[0] + pair[1]


def sum_without_carry(pair: Pair) -> int:
    tens, units = (sum(digits) % 10 for digits in zip(*(divmod(n, 10) for n in pair), strict=True))
    return 10 * tens + units


def warm_up(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[Pair],
    draw: random.Random,
    steps: int,
) -> None:
    """Supervised learning of the teacher's answers; the prompt has no loss."""

    def texts_of_step(_step: int) -> list[str]:
        texts = []
        for pair in draw.choices(pairs, k=BATCH):
            answer = true_sum(pair)
            if draw.random() < SLOPPY_SHARE:
                answer = sum_without_carry(pair)
            texts.append(f"<|user|>{question(pair)}<|assistant|>\\boxed{{{answer}}}<|end|>")
        return texts

    learn(model, tokenizer, texts_of_step, steps=steps, learning_rate=2e-3, betas=(0.9, 0.999))


def learn(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts_of_step: Callable[[int], list[str]],
    *,
    steps: int,
    learning_rate: float,
    betas: tuple[float, float],
) -> None:
    """Supervised learning of rendered chats; only what follows <|assistant|> has a loss.

    Args:
        texts_of_step: returns the batch of a step, which counts from 1.
        learning_rate: of the peak.
        betas: of Adam.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=0.01, betas=betas
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1
    )
    started = time.monotonic()
    for step in range(1, steps + 1):
        texts = texts_of_step(step)
        tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")[
            "input_ids"
        ]
        loss = answer_loss(model(tokens[:, :-1]).logits, tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"  step {step}/{steps}  loss {loss.item():.3f}  "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of what follows <|assistant|>."""
    # Up to and with the mark: the first token that counts is the answer's own.
    asked = (targets == WORDS.index("<|assistant|>")).cumsum(1) == 0
    ignored = (
        asked | (targets == WORDS.index("<|assistant|>")) | (targets == WORDS.index("<|pad|>"))
    )
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.masked_fill(ignored, -100).flatten()
    )


@torch.inference_mode()
def greedy_accuracy(model: Any, tokenizer: Any, pairs: list[Pair]) -> float:
    """Returns the share of sums whose most likely answer is right."""
    prompts = tokenizer(
        [f"<|user|>{question(p)}<|assistant|>" for p in pairs], return_tensors="pt"
    )["input_ids"]
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=8
    )
    answers = tokenizer.batch_decode(out[:, prompts.shape[1] :], skip_special_tokens=True)
    right = [
        answer == f"\\boxed{{{true_sum(p)}}}" for answer, p in zip(answers, pairs, strict=True)
    ]
    return sum(right) / len(right)


def rows_of(pairs: Sequence[Pair], split: str) -> list[dict[str, Any]]:
    """The problems in the DeepScaleR schema."""
    return [
        {
            "data_source": "two_digit_sums",
            "prompt": [{"role": "user", "content": question(pair)}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(true_sum(pair))},
            "extra_info": {"split": split, "index": i},
        }
        for i, pair in enumerate(pairs)
    ]


def save(
    out: Path,
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    **splits: Sequence[dict[str, Any]],
) -> None:
    """Writes the model, its tokenizer, and a file of rows for each split.

    The directory gets its name at the end: one that is there is whole.
    """
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for split, rows in splits.items():
        write_rows(partial / f"{split}.jsonl", rows)
    partial.rename(out)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes one row a line."""
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
