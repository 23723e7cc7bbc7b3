"""Several training sets with their shares, verifiers and settings, and prompts filtered by how
often they were solved.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_real.config import Config, DataConfig
from megatron_real.labels import Labeller
from megatron_real.prompts import PromptCursor
from megatron_real.prompts.mixture import mixed
from megatron_real.prompts.training import training_prompts
from megatron_real.records import Completion, Prompt


class Tokenizer:
    """Makes one token of each letter, and has no chat template."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def prompts(name: str, count: int) -> list[Prompt]:
    return [Prompt(f"{name}/{i}", "", (i,), ("5",)) for i in range(count)]


def test_each_set_has_its_share_and_no_prompt_is_left_out() -> None:
    """8 and 3 prompts are mixed at 2 : 1.

    The first set is there once, so the epoch has 12 prompts: 4 of the second set, one of its 3
    twice.
    """
    sets = {"a": prompts("x", 8), "b": prompts("x", 3)}
    epoch = mixed(sets, {"a": 2.0, "b": 1.0}, seed=1)
    counts = Counter(prompt.uid for prompt in epoch)
    assert Counter(uid.partition("/")[0] for uid in counts.elements()) == {"a": 8, "b": 4}
    assert sorted(counts.values()) == [1] * 10 + [2]
    assert epoch == mixed(sets, {"a": 2.0, "b": 1.0}, seed=1)


def test_a_mixture_resumes_in_the_middle() -> None:
    epoch = mixed({"a": prompts("x", 8), "b": prompts("x", 3)}, {"a": 2.0, "b": 1.0}, seed=1)
    cursor = PromptCursor(epoch, seed=1)
    resumed = PromptCursor(epoch, seed=1)
    cursor.next_batch(7)
    resumed.load_state_dict(json.loads(json.dumps(cursor.state_dict())))
    assert [p.uid for p in resumed.next_batch(9)] == [p.uid for p in cursor.next_batch(9)]


def write(path: Path, golds: list[str]) -> str:
    rows = [{"problem": f"q{i}", "answer": gold} for i, gold in enumerate(golds)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_sets_have_their_own_suffix_and_verifier(tmp_path: Path) -> None:
    sources = {
        "a": {"path": write(tmp_path / "a.jsonl", ["1", "2"])},
        "b": {
            "path": write(tmp_path / "b.jsonl", ["x", "y"]),
            "suffix": "Now!",
            "verifier": "exact",
        },
    }
    config = Config(data=DataConfig(sources=sources, suffix="Think."))
    prompts = {prompt.uid: prompt for prompt in training_prompts(config, Tokenizer())}

    assert (prompts["a/a/0"].text, prompts["a/a/0"].verifier) == ("q0 Think.", "")
    assert (prompts["b/b/1"].text, prompts["b/b/1"].verifier) == ("q1 Now!", "exact")

    completion = Completion((7,), (0.0,), "\\boxed{1.0}", True)
    with Labeller(
        "math_verify", workers=1, timeout_seconds=60, memory_mib=1024, others=["exact"]
    ) as label:
        asked = [Prompt("p", "", (1,), ("1",), verifier=name) for name in ("", "exact")]
        statuses = [verdict.status for verdict in label([(one, completion) for one in asked])]

    assert statuses == ["ok", "wrong"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two ways": ({"train": "x.jsonl", "sources": {"a": {"path": "y"}}},
                 "data.sources are both given"),
    "no path": ({"sources": {"a": {"weight": 1}}}, "data.sources.a has no path"),
    "unknown": ({"sources": {"a": {"path": "x", "wieght": 1}}},
                "unknown key data.sources.a.wieght"),
    "weight": ({"sources": {"a": {"path": "x", "weight": 0}}},
               "data.sources.a.weight = 0; give a number above 0"),
    "text": ({"sources": {"a": {"path": "x", "suffix": 3}}},
             "data.sources.a.suffix = 3; give text"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_source_is_refused(name: str) -> None:
    values, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        Config(data=DataConfig(**values))


def evaluated(folder: Path, solved: dict[str, list[bool]]) -> str:
    folder.mkdir()
    rows = [{"problem": uid, "correct": each} for uid, every in solved.items() for each in every]
    (folder / "chunk-0000.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_prompts_that_were_always_or_never_solved_are_left_out(tmp_path: Path) -> None:
    solved = {"a/0": [True, True], "a/1": [True, False], "a/2": [False, False]}
    rates = evaluated(tmp_path / "train", solved)
    train = write(tmp_path / "a.jsonl", ["1", "2", "3", "4"])
    config = Config(data=DataConfig(train=train, pass_rates=rates))
    assert [prompt.uid for prompt in training_prompts(config, Tokenizer())] == ["a/1", "a/3"]


@pytest.mark.parametrize(
    ("solved", "sentence"),
    [
        ({"b/0": [True]}, "knows none of the training prompts"),
        ({"a/0": [True]}, "leaves no prompt"),
    ],
)
def test_an_invalid_file_of_pass_rates_is_refused(
    tmp_path: Path, solved: dict[str, list[bool]], sentence: str
) -> None:
    train = write(tmp_path / "a.jsonl", ["1"])
    data = DataConfig(train=train, pass_rates=evaluated(tmp_path / "train", solved))
    with pytest.raises(ValueError, match=sentence):
        training_prompts(Config(data=data), Tokenizer())
