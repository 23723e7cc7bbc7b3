"""`megatron-real eval` by the command line: its figures against ours, killed in the middle,
on two processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests import zygote
from tests.integration.conftest import ROOT, launcher
from tests.integration.test_vllm import _missing


@pytest.fixture(scope="session")
def benches(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two benchmarks of sums, of 40 and 25 problems."""
    folder = tmp_path_factory.mktemp("benches")
    lines = (base / "heldout.jsonl").read_text().splitlines(keepends=True)
    benches = {}
    for name, problems in (("sums", lines[:40]), ("more", lines[-25:])):
        benches[name] = folder / f"{name}.jsonl"
        benches[name].write_text("".join(problems))
    return benches


def command(
    base: Path, benches: dict[str, Path], out: Path, *words: str, processes: int = 1
) -> list[str]:
    asked = [word for name, path in benches.items() for word in ("--bench", f"{name}={path}")]
    # Words after these replace them.
    options = ["--samples", "8", "--temperature", "1.0", "--max-tokens", "8", "--out", str(out)]
    keys = [
        "data.max_prompt_tokens=16",
        "model.dtype=fp32",
        "evaluation.chunk_problems=8",
        "labels.workers=1",
        # It starts in half of vLLM's time; the six benchmarks below have vLLM.
        "rollout.engine=transformers",
    ]
    start = [sys.executable, *launcher(processes), "-m", "megatron_real", "eval", str(base)]
    return [*start, *asked, *options, *keys, *words]


def evaluate(
    base: Path, benches: dict[str, Path], out: Path, *words: str, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    run = command(base, benches, out, *words, processes=processes)
    return zygote.run(run, cwd=ROOT, capture_output=True, text=True, timeout=600)


def completions(out: Path, name: str) -> list[dict[str, Any]]:
    files = sorted((out / "samples" / name).glob("chunk-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def straight(
    base: Path, benches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An evaluation that nothing disturbed."""
    out = tmp_path_factory.mktemp("eval") / "straight"
    done = evaluate(base, benches, out)
    assert done.returncode == 0, done.stderr
    assert "average" in done.stdout and "pass@8" in done.stdout and "maj@8" in done.stdout
    return out


def test_figures_follow_from_the_completions(straight: Path) -> None:
    """Every figure is computed again from the texts: right is the sum itself in a box."""
    published = json.loads((straight / "results.json").read_text())

    for name, num_problems in (("sums", 40), ("more", 25)):
        texts: dict[str, list[str]] = defaultdict(list)
        right_text: dict[str, str] = {}
        for row in completions(straight, name):
            texts[row["problem"]].append(row["completion"])
            (gold,) = row["golds"]
            right_text[row["problem"]] = f"\\boxed{{{gold}}}"
        assert len(texts) == num_problems and {len(t) for t in texts.values()} == {8}

        num_right = [answers.count(right_text[problem]) for problem, answers in texts.items()]
        won = [share_of_majority(answers, right_text[p]) for p, answers in texts.items()]

        figures = published["benchmarks"][name]
        assert figures["pass_at_1"] == pytest.approx(sum(num_right) / 8 / num_problems)
        solved = sum(number > 0 for number in num_right)
        assert figures["pass_at_8"] == pytest.approx(solved / num_problems)
        assert figures["majority"] == pytest.approx(sum(won) / num_problems)
    assert 0.1 < published["average"]["pass_at_1"] < 0.9, "the base model knows it by half"


def share_of_majority(answers: list[str], right: str) -> float:
    """1 where the right answer has most votes, its share where it has them with others.

    A text that does not end its box has no answer, and no vote.
    """
    votes = Counter(answer for answer in answers if answer.endswith("}"))
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    if right not in winners:
        return 0.0
    return 1 / len(winners)


def test_a_killed_evaluation_ends_with_the_same_figures(
    straight: Path, base: Path, benches: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = command(base, benches, out)
    for stop in ("SIGKILL", "SIGINT"):
        num_before = len(list(out.glob("samples/*/*.jsonl")))
        stopped = [sys.executable, "-m", "tests.integration.stopped_eval", stop, "3"]
        stopped += run[run.index("eval") :]
        done = zygote.run(stopped, cwd=ROOT, capture_output=True, text=True, timeout=600)

        kept = {path: path.read_bytes() for path in out.glob("samples/*/*.jsonl")}
        assert len(kept) == num_before + 2 < 9, done.stderr
        assert not (out / "results.json").exists()

    # The second stop was Ctrl-C.
    assert done.returncode == 130
    assert "the same command goes on" in done.stderr and "Traceback" not in done.stderr

    done = evaluate(base, benches, out)

    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} of 9 chunks are there already" in done.stdout
    assert {path: path.read_bytes() for path in kept} == kept, "finished chunks are not made anew"
    for name in ("results.json", "results.csv"):
        assert (out / name).read_bytes() == (straight / name).read_bytes()


def test_a_finished_evaluation_only_shows_its_figures(
    straight: Path, base: Path, benches: dict[str, Path]
) -> None:
    before = (straight / "results.json").read_bytes()
    done = evaluate(base, benches, straight)
    assert done.returncode == 0 and "chunk" not in done.stdout and "average" in done.stdout
    assert (straight / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "0.7"], "begun with evaluation.temperature = 1.0, and now it is 0.7"),
        (["--seed", "7"], "begun with trainer.seed = 1234, and now it is 7"),
        (
            ["labels.verifier=exact"],
            "begun with labels.verifier = 'math_verify', and now it is 'exact'",
        ),
        (
            ["--suffix", "Think: \\boxed{}."],
            "begun with data.suffix = '', and now it is 'Think: \\\\boxed{}.'",
        ),
    ],
    ids=["temperature", "seed", "verifier", "suffix"],
)
def test_other_settings_are_refused(
    straight: Path, base: Path, benches: dict[str, Path], words: list[str], message: str
) -> None:
    done = evaluate(base, benches, straight, *words)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert message in done.stderr


def test_other_weights_are_refused(
    straight: Path, base: Path, benches: dict[str, Path], tmp_path: Path
) -> None:
    """One element in the last bit of the last tensor."""
    other = tmp_path / "other"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-4] ^= 1  # the lowest bit of the last fp32 number
    (other / "model.safetensors").write_bytes(weights)
    done = evaluate(other, benches, straight)
    assert done.returncode == 2 and "was begun with weights = " in done.stderr


def test_two_processes(base: Path, benches: dict[str, Path], tmp_path: Path) -> None:
    """The same command twice gives the same completions; another seed gives
    others of the same kind.
    """
    outs = [tmp_path / name for name in ("one", "same", "other")]
    for out, seed in zip(outs, ("1", "1", "2"), strict=True):
        words = ["--seed", seed, "--samples", "4"]
        done = evaluate(base, benches, out, *words, processes=2)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("average") == 1, "one process speaks"

    one, same, other = (completions(out, "sums") for out in outs)
    assert one == same
    assert [row["completion"] for row in one] != [row["completion"] for row in other]

    # Two seeds differ by chance: less than four standard errors of the difference.
    figures = [json.loads((out / "results.json").read_text())["average"] for out in outs]
    error = (figures[0]["standard_error"] ** 2 + figures[2]["standard_error"] ** 2) ** 0.5
    assert abs(figures[0]["pass_at_1"] - figures[2]["pass_at_1"]) < 4 * error


def test_a_configuration_gives_the_settings(
    base: Path, benches: dict[str, Path], tmp_path: Path
) -> None:
    run = [
        sys.executable, "-m", "megatron_real", "eval", "examples/configs/quickstart.yaml",
        f"model.path={base}", "--bench", f"sums={benches['sums']}", "--samples", "1", "--out",
        str(tmp_path), "evaluation.max_problems=5",
    ]  # fmt: skip
    done = zygote.run(run, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    # One sample of one benchmark: there is no majority and no average.
    assert done.stdout.count("pass@") == 1
    assert "maj@" not in done.stdout and "average" not in done.stdout

    published = json.loads((tmp_path / "results.json").read_text())
    settings = published["settings"]
    assert settings["evaluation.samples"] == 1
    assert settings["trainer.seed"] == 1
    assert settings["rollout.max_response_tokens"] == 8
    assert published["benchmarks"]["sums"]["problems"] == 5


def test_figures_are_not_trusted_where_the_checks_failed(
    base: Path, benches: dict[str, Path], tmp_path: Path
) -> None:
    """A verifier that dies on every sum: all files are written, and the exit code is 1."""
    (tmp_path / "own.py").write_text(
        "import os\n\ndef judge(text, answers, metadata):\n    os._exit(3)\n"
    )
    verifier = f"labels.verifier={tmp_path / 'own.py'}:judge"
    words = [verifier, "evaluation.max_problems=2", "--samples", "2"]

    done = evaluate(base, {"sums": benches["sums"]}, tmp_path / "out", *words)

    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "100% of the checks of sums failed and count as wrong" in done.stderr
    published = json.loads((tmp_path / "out/results.json").read_text())
    assert published["benchmarks"]["sums"]["failed_checks"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bench", "aime24"], "--bench 'aime24' is not understood; write NAME=FILE"),
        (["--bench", "sums=nowhere.jsonl"], "each name once"),
        (
            ["--bench", "other=nowhere.jsonl"],
            "there is no data file 'nowhere.jsonl'; tools/prepare_data.py makes",
        ),
        (["--bench", "../up=README.md"], "is not understood"),
        (["--samples", "0"], "evaluation.samples is 0; it must be above 0"),
        (["--top-p", "2"], "evaluation.top_p is 2.0; it must lie in (0, 1]"),
        (["--max-tokens", "9999"], "exceeds the model's max_position_embeddings"),
        (
            ["model.weights=checkpoints/7"],
            "checkpoints/7 has neither .metadata nor latest_checkpointed_iteration.txt",
        ),
        (["evaluation.sample=3"], "unknown key evaluation.sample; did you mean samples?"),
    ],
    ids=["no file", "twice", "missing", "path", "samples", "top_p", "long", "megatron", "key"],
)
def test_bad_input_is_refused_in_one_sentence(
    base: Path, benches: dict[str, Path], tmp_path: Path, words: list[str], message: str
) -> None:
    done = evaluate(base, benches, tmp_path / "out", *words)
    assert (done.returncode, "Traceback" in done.stderr, done.stderr.count("\n")) == (2, False, 1)
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.xdist_group("vllm")
def test_the_example_of_the_six_benchmarks(base: Path, tmp_path: Path) -> None:
    """examples/eval.sh as it is, on prepared files of sums,
    with the paper's sampling but shorter.
    """
    names = ["aime24", "aime25", "math500", "amc23", "minerva", "olympiadbench"]
    lines = (base / "heldout.jsonl").read_text().splitlines(keepends=True)
    for i, name in enumerate(names):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[3 * i : 3 * i + 3]))
    environment = os.environ | {"DATA": str(tmp_path), "PROCESSES": "2"}
    engine = "vllm"
    kind = "vllm"
    if _missing():
        engine = "transformers"
        kind = "plain"
    interpreter = tmp_path / "bin"
    interpreter.mkdir()
    environment["PATH"] = zygote.add_interpreter(interpreter, kind)
    words = ["--max-tokens", "8", "--suffix", "", "--out", str(tmp_path / "out")]
    words += ["data.max_prompt_tokens=16", f"rollout.engine={engine}"]

    done = zygote.run(
        ["bash", "examples/eval.sh", str(base), *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr.decode()
    published = json.loads((tmp_path / "out/results.json").read_text())
    assert list(published["benchmarks"]) == names
    settings = published["settings"]
    assert settings["evaluation.samples"] == 16
    assert settings["evaluation.temperature"] == 0.6
    assert settings["evaluation.top_p"] == 0.95
