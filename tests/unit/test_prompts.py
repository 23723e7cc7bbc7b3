"""Rows of every schema, prompts, and an order that can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_real.prompts import PromptCursor, load_prompts, read_rows
from megatron_real.records import Prompt


class LetterTokenizer:
    """One token a letter; renders like a chat template when it has one."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens, "the template has written the special tokens"
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, chat: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        return "".join(f"[{m['role']}]{m['content']}" for m in chat) + "[assistant]" * add_generation_prompt


DEEPSCALER: dict[str, Any] = {
    "data_source": "aime",
    "prompt": [{"role": "user", "content": "2+3?"}],
    "reward_model": {"style": "rule", "ground_truth": 5},
    "extra_info": {"index": 3},
}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        (DEEPSCALER, ("5",)),
        ({**DEEPSCALER, "reward_model": {"ground_truth": 142.0}}, ("142",)),
        ({**DEEPSCALER, "reward_model": {"ground_truth": ["1/2", 0.5]}}, ("1/2", "0.5")),
        ({"problem": "2+3?", "answer": "5"}, ("5",)),
        ({"question": "2+3?", "answer": 0}, ("0",)),
    ],
    ids=["deepscaler", "float", "list", "problem", "zero"],
)
def test_schemas(tmp_path: Path, row: Any, answers: tuple[str, ...]) -> None:
    (found,) = read_rows(write(tmp_path / "d.jsonl", [row]))
    assert (found.uid, found.answers, found.messages[-1]["content"]) == ("d/0", answers, "2+3?")


def test_parquet_and_saved_datasets_read_like_jsonl(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([DEEPSCALER] * 3)
    pq.write_table(table, tmp_path / "d.parquet")
    (tmp_path / "saved").mkdir()
    with (
        pa.OSFile(str(tmp_path / "saved/data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table)
    expected = [(r.answers, r.messages, r.metadata) for r in read_rows(write(tmp_path / "d.jsonl", [DEEPSCALER] * 3))]
    for path in (tmp_path / "d.parquet", tmp_path / "saved"):
        assert [(r.answers, r.messages, dict(r.metadata)) for r in read_rows(path)] == expected


def test_rows_without_an_answer_are_counted_and_all_of_them_refused(tmp_path: Path, caplog: Any) -> None:
    rows = [{"problem": "a"}, {"problem": "b", "answer": "1"}, {"answer": "2"}]
    assert len(read_rows(write(tmp_path / "d.jsonl", rows))) == 1
    assert "skipped 2 of 3 rows" in caplog.text
    with pytest.raises(ValueError, match="none of the 1 rows"):
        read_rows(write(tmp_path / "d.jsonl", rows[:1]))


def test_broken_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"problem": "a", "answer": "1"}\n{"problem":\n')
    with pytest.raises(ValueError, match=r"d.jsonl:2 is no JSON"):
        read_rows(tmp_path / "d.jsonl")
    with pytest.raises(ValueError, match="there is no data file"):
        read_rows(tmp_path / "nothing.jsonl")


def test_rendering(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [DEEPSCALER])
    (chat,) = load_prompts(path, LetterTokenizer("yes"), suffix="Think.", max_tokens=99)
    assert chat.text == "[user]2+3? Think.[assistant]"
    assert chat.token_ids == tuple(map(ord, chat.text))
    (plain,) = load_prompts(path, LetterTokenizer(), max_tokens=99)
    assert plain.text == "2+3?"


def test_long_prompts_are_dropped_and_counted(tmp_path: Path, caplog: Any) -> None:
    path = write(tmp_path / "d.jsonl", [{"problem": "x" * n, "answer": "1"} for n in (3, 30)])
    assert len(load_prompts(path, LetterTokenizer(), max_tokens=10)) == 1
    assert "dropped 1 of 2 prompts longer than 10 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"exceed data.max_prompt_tokens = 2"):
        load_prompts(path, LetterTokenizer(), max_tokens=2)


PROMPTS = [Prompt(str(i), "", (i,), ("1",)) for i in range(10)]


def test_each_epoch_is_another_permutation() -> None:
    cursor = PromptCursor(PROMPTS, seed=1)
    epochs = [[p.uid for p in cursor.next_batch(10)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(p.uid for p in PROMPTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [p.uid for p in PromptCursor(PROMPTS, seed=1).next_batch(10)] == epochs[0]


def test_a_resumed_cursor_goes_on() -> None:
    straight, resumed = PromptCursor(PROMPTS, seed=1), PromptCursor(PROMPTS, seed=1)
    straight.next_batch(13)
    resumed.load_state_dict(straight.state_dict())
    assert [p.uid for p in resumed.next_batch(9)] == [p.uid for p in straight.next_batch(9)]
    with pytest.raises(ValueError, match="has seed 1, this run has 2"):
        PromptCursor(PROMPTS, seed=2).load_state_dict(straight.state_dict())
    with pytest.raises(ValueError, match="fingerprint"):
        PromptCursor(PROMPTS[:9], seed=1).load_state_dict(straight.state_dict())
