"""Rows of every schema, prompts, and an order that can be resumed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_real.prompts import PromptCursor, load_prompts, read_rows
from megatron_real.records import Prompt


class LetterTokenizer:
    """Makes one token of each letter, and renders like a chat template when it has one."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens, "the template has written the special tokens"
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(
        self, chat: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool, **_: Any
    ) -> str:
        return (
            "".join(f"[{m['role']}]{m['content']}" for m in chat)
            + "[assistant]" * add_generation_prompt
        )


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
def test_rows_of_every_schema_are_read(tmp_path: Path, row: Any, answers: tuple[str, ...]) -> None:
    (parsed,) = read_rows(write(tmp_path / "d.jsonl", [row]))
    assert (parsed.uid, parsed.answers, parsed.messages[-1]["content"]) == ("d/0", answers, "2+3?")


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
    expected = [
        (r.answers, r.messages, r.metadata)
        for r in read_rows(write(tmp_path / "d.jsonl", [DEEPSCALER] * 3))
    ]

    for path in (tmp_path / "d.parquet", tmp_path / "saved"):
        assert [(r.answers, r.messages, dict(r.metadata)) for r in read_rows(path)] == expected


def test_rows_without_an_answer_are_counted_and_all_of_them_refused(
    tmp_path: Path, caplog: Any
) -> None:
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


def test_a_prompt_is_rendered_by_the_chat_template(tmp_path: Path) -> None:
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
    straight = PromptCursor(PROMPTS, seed=1)
    resumed = PromptCursor(PROMPTS, seed=1)
    # 13 of 10 prompts: the state is in the middle of the second epoch.
    straight.next_batch(13)
    resumed.load_state_dict(straight.state_dict())
    assert [p.uid for p in resumed.next_batch(9)] == [p.uid for p in straight.next_batch(9)]
    with pytest.raises(ValueError, match="has seed 1, this run has 2"):
        PromptCursor(PROMPTS, seed=2).load_state_dict(straight.state_dict())


def test_a_resumed_cursor_says_what_is_different_about_the_prompts() -> None:
    saved = PromptCursor(PROMPTS, seed=1).state_dict()

    def changed(*numbers: int, **values: Any) -> PromptCursor:
        prompts = [
            dataclasses.replace(p, **values) if int(p.uid) in numbers else p for p in PROMPTS
        ]
        return PromptCursor(prompts, seed=1)

    moved = [dataclasses.replace(p, uid=f"elsewhere/{p.uid}") for p in PROMPTS]
    assert PromptCursor(moved, seed=1).load_state_dict(saved) == [], (
        "what a file is called is no matter"
    )
    assert changed(4, answers=("2",)).load_state_dict(saved) == [
        "the gold answers of 4 have changed"
    ]
    assert changed(2, 4, 9, answers=("2", "3")).load_state_dict(saved) == [
        "the gold answers of 3 of 10 prompts (the first of them is 2) have changed"
    ]
    with pytest.raises(ValueError, match=r"of 10 prompts, and data.train now has 9"):
        PromptCursor(PROMPTS[:9], seed=1).load_state_dict(saved)
    with pytest.raises(
        ValueError, match=r"2 of 10 prompts \(the first of them is 3\) have changed"
    ):
        changed(3, 5, token_ids=(77,)).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"10 of 10 prompts \(the first of them is 9\) have"):
        PromptCursor(PROMPTS[::-1], seed=1).load_state_dict(saved)
    with pytest.raises(ValueError, match="of an earlier version"):
        changed().load_state_dict({"epoch": 0, "position": 0, "seed": 1, "fingerprint": "a"})


def dataset(folder: Path, *names: str) -> Path:
    """Writes parquet or arrow files by name below a folder, each with one row that is named like
    its file.
    """
    import pyarrow
    import pyarrow.parquet

    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = pyarrow.table({"problem": [name], "answer": ["5"]})
        if file.suffix == ".parquet":
            pyarrow.parquet.write_table(rows, file)
        else:
            with pyarrow.ipc.new_stream(str(file), rows.schema) as stream:
                stream.write_table(rows)
    return folder


# Files of a folder, and the splits that they are of.
SPLITS = {
    "parquet of the hub": (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
         "data/test-00000-of-00001.parquet"],
        {"train": 2, "test": 1},
    ),
    "DatasetDict": (
        ["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow",
         "train/cache-1f.arrow"],
        {"train": 1, "test": 1},
    ),
    "plain names": (["train.parquet", "validation.parquet"], {"train": 1, "validation": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_a_folder_with_several_splits_is_read_by_the_name_of_one(tmp_path: Path, name: str) -> None:
    files, counts = SPLITS[name]
    folder = dataset(tmp_path / "d", *files)
    with pytest.raises(
        ValueError, match=r"has several splits \(.*train.*name one, as data.train_split"
    ):
        read_rows(folder)
    with pytest.raises(ValueError, match="has no split 'other'; it has"):
        read_rows(folder, split="other")
    assert {split: len(read_rows(folder, split=split)) for split in counts} == counts


def test_caches_of_map_are_no_rows(tmp_path: Path) -> None:
    files = ["data-00000-of-00001.arrow", "cache-00ff.arrow", "cache-00ff_00001_of_00002.arrow"]
    (row,) = read_rows(dataset(tmp_path / "d", *files))
    assert row.messages[0]["content"] == files[0]


def test_golds_that_are_no_text_or_number_are_no_answers(tmp_path: Path) -> None:
    """A NaN of a parquet column, bytes and objects are no golds; their rows are skipped and
    counted.
    """
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "d.parquet"
    rows = pyarrow.table({"problem": ["a", "b"], "answer": [float("nan"), 3.0]})
    pyarrow.parquet.write_table(rows, file)
    assert [row.answers for row in read_rows(file)] == [("3",)]
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["a"], "answer": [b"5"]}), file)
    with pytest.raises(ValueError, match=r"\(1 have no answer\)"):
        read_rows(file)


LINES = {
    "null": r"d.jsonl:2 is no object but null",
    "[1]": r"d.jsonl:2 is no object but \[1\]",
    '"x"': r'd.jsonl:2 is no object but "x"',
}


@pytest.mark.parametrize("line", LINES)
def test_lines_that_are_no_object_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "d.jsonl").write_text(f'{{"problem": "?", "answer": 5}}\n{line}\n')
    with pytest.raises(ValueError, match=LINES[line]):
        read_rows(tmp_path / "d.jsonl")


def test_odd_columns_are_read_or_counted(tmp_path: Path, caplog: Any) -> None:
    """Tries extra_info and reward_model as JSON text, a blank line, half a surrogate pair, an
    image, and a message that is none.
    """
    rows = [
        {"problem": "?", "reward_model": '{"ground_truth": "7"}', "extra_info": '{"level": 2}'},
        {"problem": "\ud835", "answer": "5"},
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "5"},
        {"prompt": ["what?"], "answer": "5"},
        {"problem": "?", "answer": {"value": 5}, "reward_model": "a text"},
    ]
    (tmp_path / "d.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (row,) = read_rows(tmp_path / "d.jsonl")

    assert (row.answers, row.metadata) == (("7",), {"level": 2})
    assert "skipped 4 of 5 rows" in caplog.text
    assert "half a surrogate" in caplog.text and "1 have no answer" in caplog.text


def test_times_of_extra_info_are_text(tmp_path: Path) -> None:
    import datetime

    import pyarrow
    import pyarrow.parquet

    info = {"when": datetime.datetime(2026, 1, 2), "level": [1, 2]}
    table = pyarrow.table({"problem": ["?"], "answer": ["5"], "extra_info": [info]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    (row,) = read_rows(tmp_path / "d.parquet")
    assert row.metadata == {"when": "2026-01-02T00:00:00", "level": [1, 2]}
    assert json.dumps(row.metadata)


class Template:
    """A tokenizer with one of jinja's chat templates, which transformers renders."""

    chat_template = "there is one"

    def __init__(self, source: str) -> None:
        import jinja2

        def refuse(message: str) -> None:
            raise jinja2.exceptions.TemplateError(message)

        environment = jinja2.Environment()
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "today"}
        self._template = environment.from_string(source)

    def apply_chat_template(self, chat: Any, **named: Any) -> str:
        return str(self._template.render(messages=chat, **named))

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_the_date_of_a_template_does_not_move(tmp_path: Path) -> None:
    """transformers itself renders; its templates know strftime_now, which gives today's date."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "d.jsonl").write_text('{"problem": "?", "answer": 5}\n')
    model = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}"
    (prompt,) = load_prompts(tmp_path / "d.jsonl", tokenizer, max_tokens=100)
    assert prompt.text == "26 Jul 2024: ?"


def test_a_template_that_refuses_a_role_is_one_sentence(tmp_path: Path) -> None:
    rows = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "?"}],
        "answer": 5,
    }
    (tmp_path / "d.jsonl").write_text(json.dumps(rows))
    tokenizer = Template("{{ raise_exception('no system role') }}")
    with pytest.raises(
        ValueError, match=r"refuses the row d/0 with the roles system, user \(no system role\)"
    ):
        load_prompts(tmp_path / "d.jsonl", tokenizer, max_tokens=100)


def test_a_suffix_joins_the_parts_of_a_content(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "3?"}]
    row = {"prompt": [{"role": "user", "content": parts}], "answer": 5}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    tokenizer = Template("{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}")
    (prompt,) = load_prompts(tmp_path / "d.jsonl", tokenizer, suffix="Think.", max_tokens=100)
    assert prompt.text == "2+3? Think."
    tokenizer.chat_template = ""
    (bare,) = load_prompts(tmp_path / "d.jsonl", tokenizer, suffix="Think.", max_tokens=100)
    assert bare.text == "2+3? Think."


def test_golds_that_nobody_can_match_are_counted(tmp_path: Path, caplog: Any) -> None:
    golds = ["5", "9. Anya climbs one floor; Vanya five floors."]
    rows = [{"problem": "?", "answer": gold} for gold in golds]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    load_prompts(tmp_path / "d.jsonl", Template("x"), max_tokens=100)
    assert (
        "1 of 2 problems have a gold answer that no completion is likely to match, the first d/1"
        in caplog.text
    )


def test_brackets_tell_questions_apart_and_braces_around_nothing_do_not() -> None:
    from megatron_real.prompts.overlap import identity

    assert identity("\\sqrt{16}+9") != identity("\\sqrt{16+9}")
    assert identity("2(3+4)") != identity("2 * 3 + 4")
    assert identity("x^{2} \\text{ if } n") == identity("x^2 if n")
