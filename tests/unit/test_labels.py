"""Labels under honest and hostile completions: each with its exact status."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_real.labels import Labeller, TooManyFailedChecks
from megatron_real.labels.pool import Check, VerifierPool
from megatron_real.labels.verifiers import exact, final_answer, load
from megatron_real.records import EXCLUDED, NEGATIVE, POSITIVE, Completion, Prompt

TIMEOUT = 2.0


def box(text: str) -> str:
    return f"\\boxed{{{text}}}"


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool("math_verify", workers=2, timeout_seconds=TIMEOUT, memory_mib=1024) as verifiers:
        yield verifiers


# Gold answer is 5 throughout. Factorials of this size take minutes and gigabytes: the wall clock ends them.
HOSTILE = {
    box("5"): "ok",
    box("5.0"): "ok",
    box("\\frac{10}{2}"): "ok",
    f"<think>{box('6')}</think> so {box('5')}": "ok",
    f"<think>a</think>{box('6')}</think>{box('5')}": "ok",
    f"{box('5')} \\boxed{{": "ok",
    box("6"): "wrong",
    box("\N{ARABIC-INDIC DIGIT FIVE}"): "wrong",
    box("9^9^9^9"): "wrong",
    "the answer is 5": "unparsable",
    f"<think>{box('5')}</think> done": "unparsable",
    box(""): "unparsable",
    "\\boxed{\\frac{1}": "unparsable",
    box("1" * 10_000): "unparsable",
    box("{" * 500_000 + "}" * 500_000): "unparsable",
    "\\boxed{" * 100_000: "unparsable",
    box("100000000!"): "timeout",
    box("\\binom{10^7}{5\\cdot10^6}"): "timeout",
}


def test_hostile_table(pool: VerifierPool) -> None:
    started = time.monotonic()
    results = pool.run([Check(text, ["5"]) for text in HOSTILE])
    assert [status for (status, _), _ in results] == list(HOSTILE.values())
    assert time.monotonic() - started < 10 * TIMEOUT
    honest = pool.run([Check(box(str(n)), [str(n)]) for n in range(100)])
    assert all(result == ("ok", 1.0) for result, _ in honest)


def test_a_killed_worker_costs_its_own_check_only(pool: VerifierPool) -> None:
    victim = pool._workers[0]._process
    assert victim is not None
    os.kill(victim.pid, signal.SIGKILL)
    results = [status for (status, _), _ in pool.run([Check(box("5"), ["5"])] * 20)]
    assert results.count("crashed") <= 1 and results.count("ok") >= 19
    assert [status for (status, _), _ in pool.run([Check(box("5"), ["5"])] * 4)] == ["ok"] * 4


def test_memory_is_limited(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "def judge(text, answers, metadata):\n    return len('x' * (2 << 30 if 'big' in text else 1)) == 1\n"
    )
    with VerifierPool(f"{own}:judge", workers=1, timeout_seconds=20, memory_mib=512) as pool:
        assert [s for (s, _), _ in pool.run([Check("big", []), Check("small", [])])] == ["crashed", "ok"]


def test_workers_print_what_they_like(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def judge(text, answers, metadata):\n    print('[\"ok\", 1.0]')\n    return 0.25\n")
    with VerifierPool(f"{own}:judge", workers=1, timeout_seconds=20, memory_mib=512) as pool:
        assert [result for result, _ in pool.run([Check("", [])] * 3)] == [("score", 0.25)] * 3


def completion(text: str, *, finished: bool = True, tokens: int = 3) -> tuple[Prompt, Completion]:
    return Prompt("p", "", (1,), ("5", "five")), Completion((7,) * tokens, (0.0,) * tokens, text, finished)


def test_labels_of_each_kind() -> None:
    items = [completion(box("5")), completion(box("five")), completion("?"), completion(box("6"))]
    items += [completion(box("5"), finished=False), completion("", tokens=0)]
    with Labeller("exact", workers=1, timeout_seconds=5, memory_mib=512) as label:
        verdicts = label(items)
    assert [v.status for v in verdicts] == ["ok", "ok", "unparsable", "wrong", "overlong", "empty"]
    assert [v.label for v in verdicts] == [POSITIVE, POSITIVE, NEGATIVE, NEGATIVE, NEGATIVE, EXCLUDED]


def test_failed_checks_are_excluded_and_too_many_stop_the_run() -> None:
    options = {"workers": 1, "timeout_seconds": 0.5, "memory_mib": 1024}
    items = [completion(box("100000000!"))] + [completion(box("5"))] * 4
    with Labeller("math_verify", **options, max_failed_share=0.2) as label:  # type: ignore[arg-type]
        assert [v.label for v in label(items)] == [EXCLUDED] + [POSITIVE] * 4
        with pytest.raises(TooManyFailedChecks, match=r"1 of 4 checks timed out or crashed"):
            label(items[:4])


def test_scores_need_a_threshold(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def judge(text, answers, metadata):\n    return float(text)\n")
    options = {"workers": 1, "timeout_seconds": 5, "memory_mib": 512}
    items = [completion("0.75"), completion("0.25")]
    with Labeller(f"{own}:judge", **options, threshold=0.5) as label:  # type: ignore[arg-type]
        assert [v.label for v in label(items)] == [POSITIVE, NEGATIVE]
    with (
        Labeller(f"{own}:judge", **options) as label,  # type: ignore[arg-type]
        pytest.raises(ValueError, match=r"reward 0.75; set labels.threshold"),
    ):
        label(items)


def test_reasoning_gym_scores_its_own_tasks() -> None:
    import reasoning_gym

    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)[0]
    check = Check(box(entry["answer"]), [entry["answer"]], {"source_dataset": "chain_sum"})
    with VerifierPool("reasoning_gym", workers=1, timeout_seconds=20, memory_mib=4096) as pool:
        assert pool.run([check])[0][0] == ("score", 1.0)


def test_unknown_verifier_is_refused() -> None:
    with pytest.raises(ValueError, match="'magic'; it takes one of math_verify, exact, reasoning_gym"):
        load("magic")


@given(st.text(alphabet="{}\\ab 5", max_size=60))
def test_final_answer_is_balanced(text: str) -> None:
    answer = final_answer(text + box("7"))
    assert answer == "7"
    inside = final_answer(text)
    if inside is not None:
        assert inside in text


@given(st.text(max_size=200))
@settings(max_examples=200)
def test_exact_never_raises(text: str) -> None:
    assert exact(text, ["5"], {})[0] in ("ok", "wrong", "unparsable")
