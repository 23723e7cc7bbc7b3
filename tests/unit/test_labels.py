"""Labels of honest and of hostile completions, each with its exact status."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_real.labels import Labeller, RewardNeedsThreshold, TooManyFailedChecks
from megatron_real.labels.answers import final_answer
from megatron_real.labels.pool import Check, VerifierPool, _Clock, _Worker
from megatron_real.labels.verifiers import load
from megatron_real.prompts import read_rows
from megatron_real.records import EXCLUDED, NEGATIVE, POSITIVE, Completion, Prompt

TIMEOUT = 3.0


def box(text: str) -> str:
    return f"\\boxed{{{text}}}"


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(
        "math_verify", workers=2, timeout_seconds=TIMEOUT, memory_mib=1024
    ) as verifiers:
        yield verifiers


@pytest.fixture
def fresh_pool() -> Iterator[VerifierPool]:
    """Makes a pool whose two processes run and have checked nothing yet."""
    with VerifierPool(
        "math_verify", workers=2, timeout_seconds=TIMEOUT, memory_mib=1024
    ) as verifiers:
        yield verifiers


def statuses(pool: VerifierPool, *texts: str, golds: tuple[str, ...] = ("5",)) -> list[str]:
    return [outcome.status for outcome in pool.run([Check(text, golds) for text in texts])]


SLOW = box("\\sin(10^{10^{9}})")
"""An answer that no comparison ends on: a value of it takes a thousand million digits."""
# Gold answer is 5 throughout. Numbers of this size take minutes and gigabytes: the wall clock ends
# them.
HOSTILE = {
    # arithmetic that never ends
    box("9^9^9^9"): "wrong",
    box("100000000!"): "wrong",
    box("\\binom{10^7}{5\\cdot10^6}"): "wrong",
    SLOW: "timeout",
    box("\\lfloor 10^{10^{8}}\\sqrt{2} \\rfloor"): "timeout",
    # size and shape
    box("{" * 500_000 + "}" * 500_000): "unparsable",
    box("1" * 10_000): "unparsable",
    box("1" * 999): "wrong",
    "\\boxed{" * 100_000: "unparsable",
    box("5") + "{" * 100_000: "ok",
    box("5") + "{" * 1_000_000: "unparsable",
    "\\boxed{" * 7 + box("5"): "ok",
    # NUL bytes, half a surrogate pair, digits of other scripts
    box("5\0"): "unparsable",
    box("\0"): "unparsable",
    f"\0\0{box('5')}\0": "ok",
    box("\ud835"): "unparsable",
    box("\N{ARABIC-INDIC DIGIT FIVE}"): "unparsable",
    box("\N{FULLWIDTH DIGIT FIVE}"): "unparsable",
    box("\N{CIRCLED DIGIT FIVE}"): "wrong",
    box("5\N{SUPERSCRIPT TWO}"): "wrong",
    # LaTeX that is not balanced
    "\\boxed{\\frac{1}": "unparsable",
    box("5") + " \\boxed{": "ok",
    box("\\left( 5"): "ok",
    box("\\frac{5"): "unparsable",
    box("\\}5\\{"): "unparsable",
    # thinking is no answer
    f"<think>{box('5')}</think> done": "unparsable",
    f"<think>{box('5')}": "unparsable",
    f"<think>{box('6')}</think> so {box('5')}": "ok",
    f"<think>a</think>{box('6')}</think>{box('5')}": "ok",
    f"<think>a</think>{box('5')}</think>{box('6')}": "wrong",
    f"<think>a</think>{box('5')}</think>": "unparsable",
    f"<think>a</think>{box('5')}<think>{box('6')}": "ok",
    # two answers are none
    box("5, 6"): "wrong",
    box("5 \\text{ or } 6"): "wrong",
    box("\\pm 5"): "wrong",
    # code is not run
    box("__import__('os').kill(0, 9)"): "wrong",
    # nothing there
    "the answer is 5": "unparsable",
    box(""): "unparsable",
    "": "unparsable",
}
HONEST = {
    box("5"): "ok",
    box("5.0"): "ok",
    box("5."): "ok",
    box("\\frac{10}{2}"): "ok",
    box("x = 5"): "ok",
    box("\\sqrt{25}"): "ok",
    box("5 \\text{ cm}"): "ok",
    box("6"): "wrong",
    box("-5"): "wrong",
}


@pytest.mark.parametrize("table", [HOSTILE, HONEST], ids=["hostile", "honest"])
def test_every_completion_of_the_table_has_its_status(
    pool: VerifierPool, table: dict[str, str]
) -> None:
    started = time.monotonic()
    status_of = dict(zip(table, statuses(pool, *table), strict=True))
    assert {text[:60]: status for text, status in status_of.items()} == {
        t[:60]: status for t, status in table.items()
    }
    assert status_of == table
    assert time.monotonic() - started < 40 * TIMEOUT


@pytest.mark.parametrize(
    "gold", ["1" * 10_000, "100000000!", "{" * 1000, "\0", "\\frac{"], ids=lambda gold: gold[:9]
)
def test_gold_answers_may_be_hostile_too(pool: VerifierPool, gold: str) -> None:
    assert statuses(pool, box("5"), golds=(gold,))[0] in ("wrong", "timeout")
    assert statuses(pool, box("5"), golds=("5", gold)) == ["ok"]


GOLDS = {
    "5": 5,
    "142.0": 142.0,
    "0.5": 0.5,
    "\\frac{1}{2}": "\\frac{1}{2}",
    "2": ["1", 2, 3.0],
    "1,000": "1000",
    "7": "$7$",
}


def test_gold_is_text_a_number_or_a_list_of_them(pool: VerifierPool, tmp_path: Path) -> None:
    """Golds as the columns of datasets hold them are read by the prompts and judged by the
    verifier.
    """
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "\n".join(json.dumps({"problem": "?", "answer": gold}) for gold in GOLDS.values())
    )
    rows = read_rows(file)

    assert [row.answers for row in rows] == [
        ("5",), ("142",), ("0.5",), ("\\frac{1}{2}",), ("1", "2", "3"), ("1000",), ("$7$",),
    ]  # fmt: skip

    outcomes = pool.run(
        [Check(box(text), row.answers) for text, row in zip(GOLDS, rows, strict=True)]
    )
    assert [outcome.status for outcome in outcomes] == ["ok"] * len(GOLDS)
    assert statuses(pool, box("4"), golds=("1", "2", "3")) == ["wrong"]


READING = {
    "": ["ok", "ok", "unparsable", "unparsable"],
    "require_think": ["unparsable", "ok", "unparsable", "unparsable"],
    "no box": ["ok", "ok", "ok", "unparsable"],
}


@pytest.mark.parametrize("options", READING)
def test_the_answer_is_read_outside_of_the_thinking(options: str) -> None:
    texts = [
        box("5"),
        f"thinking</think>{box('5')}",
        "<think>6</think> The answer is 5.",
        "<think>5",
    ]
    verify = load(
        "math_verify", require_think=options == "require_think", require_boxed=options != "no box"
    )
    assert [verify(text, ["5"], {})[0] for text in texts] == READING[options]


def test_the_exact_verifier_compares_letter_by_letter() -> None:
    boxed = load("exact")
    free = load("exact", require_boxed=False)
    assert boxed(box(" five "), ["5", " five"], {}) == ("ok", 1.0)
    assert boxed(box("5.0"), ["5", "five"], {}) == ("wrong", 0.0)
    assert boxed("five", ["five"], {}) == ("unparsable", None)
    assert free(" five\n", ["five"], {}) == ("ok", 1.0)
    assert free("x" * 5000, ["x" * 1000], {}) == ("ok", 1.0), (
        "the end of the text, no more of it than of a box"
    )


def hostile_batch() -> tuple[list[tuple[Prompt, Completion]], list[int | None]]:
    """Returns 64 prompts x 8 rollouts with the honest labels.

    8 % of the rollouts are hostile, and a fifth of these would take for ever.
    """
    draw = random.Random(5)
    slow = [text for text, status in HOSTILE.items() if status == "timeout"]
    texts = [*HOSTILE, *slow * 3]
    items: list[tuple[Prompt, Completion]] = []
    labels: list[int | None] = []
    hostile = dict(zip(draw.sample(range(64 * 8), len(texts)), texts, strict=True))
    for i in range(64 * 8):
        right = draw.random() < 0.5
        text = f"<think>{'so on ' * 200}</think>{box(str(i + (not right)))}"
        items.append(completion(hostile.get(i, text), gold=str(i)))
        if i in hostile:
            labels.append(None)
        else:
            labels.append(POSITIVE if right else NEGATIVE)
    return items, labels


def processor_seconds_lost(reasons: Iterable[str]) -> float:
    """Returns the processor time that was granted to the checks which used it up.

    On a busy machine the wall clock ends some of them earlier; those say nothing about the grant.
    """
    matches = [re.match(r"no answer within (\S+) s of processor time", r) for r in reasons]
    return sum(float(match[1]) for match in matches if match)


def test_each_timeout_among_the_last_checks_cuts_the_next_ones_processor_time() -> None:
    clock = _Clock(6.0)
    grants = []
    for _ in range(7):
        grants.append(clock.processor_seconds())
        clock.count(timeout=True)
    assert grants == [6.0, 3.0, 2.0, 1.5, 1.2, 1.0, 1.0]
    for _ in range(99):
        clock.count(timeout=False)
    assert clock.processor_seconds() == 3.0, "one of the last hundred"


def test_a_batch_with_hostile_answers_ends_in_time_and_every_honest_one_is_right() -> None:
    """Eight checks would never end. For them two workers lose less than three times the time limit
    of one check each.
    """
    items, expected = hostile_batch()
    memory = 1024
    timeout = 3.0
    trainer = psutil.Process()
    with Labeller("math_verify", workers=2, timeout_seconds=timeout, memory_mib=memory) as label:
        label(items[:100])
        before = trainer.memory_info().rss
        started = time.monotonic()
        verdicts = label(items)
        seconds = time.monotonic() - started
        (pool,) = label._pools.values()
        workers = [worker_process(w).memory_info() for w in pool._workers if w._process]

    assert sum(v.status == "timeout" for v in verdicts) >= 8
    assert processor_seconds_lost(v.reason for v in verdicts) / 2 < 3 * timeout
    assert seconds < 60 * timeout, "however busy the machine is"

    wrong = [
        i for i, label in enumerate(expected) if label is not None and verdicts[i].label != label
    ]
    assert not wrong
    assert {v.status for v in verdicts} == {"ok", "wrong", "unparsable", "timeout"}
    assert trainer.memory_info().rss - before < 64 << 20
    assert all(m.vms <= memory << 20 for m in workers)


def test_a_policy_that_writes_nothing_but_factorials_cannot_freeze_a_step() -> None:
    """If each check were given its whole time, they would take 5 x 4 s on one worker."""
    checks = [Check(SLOW, ["5"]), Check(box("5"), ["5"])] * 5
    with VerifierPool("math_verify", workers=1, timeout_seconds=4, memory_mib=1024) as pool:
        outcomes = pool.run(checks)
    assert [o.status for o in outcomes] == ["timeout", "ok"] * 5
    assert outcomes[0].reason.startswith("no answer within 4 s")
    assert outcomes[-2].reason in (
        "no answer within 1 s of processor time",
        "no answer within 4 s",  # the machine was too busy to spend that second
    )
    assert processor_seconds_lost(o.reason for o in outcomes) < 10


def test_a_worker_that_died_while_idle_costs_nothing(fresh_pool: VerifierPool) -> None:
    for worker in fresh_pool._workers:
        assert worker._process is not None
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
    assert statuses(fresh_pool, *[box("5")] * 20) == ["ok"] * 20


def test_signals_to_the_whole_tree_leave_the_verifiers_alive(fresh_pool: VerifierPool) -> None:
    """Slurm's scancel and a terminal's Ctrl-C reach every process of a job, and the run needs
    verdicts until it can stop.
    """
    started = [worker._process for worker in fresh_pool._workers]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for worker in fresh_pool._workers:
            assert worker._process is not None
            supervisor = psutil.Process(worker._process.pid)
            for process in [supervisor, *supervisor.children(recursive=True)]:
                process.send_signal(number)
    assert statuses(fresh_pool, *[box("5")] * 4) == ["ok"] * 4
    assert [worker._process for worker in fresh_pool._workers] == started


def test_the_clock_also_runs_while_a_worker_does_not_read(fresh_pool: VerifierPool) -> None:
    """The text is longer than a pipe holds, and the worker is suspended."""
    for worker in fresh_pool._workers:
        worker_process(worker).suspend()
    started = time.monotonic()
    assert statuses(fresh_pool, *["x" * 1_000_000] * 2) == ["timeout"] * 2
    assert time.monotonic() - started < 30 * TIMEOUT
    assert statuses(fresh_pool, box("5")) == ["ok"]


def worker_process(worker: _Worker) -> psutil.Process:
    """Returns the process that checks: the last one below the supervisor, which the pool starts."""
    assert worker._process is not None
    return psutil.Process(worker._process.pid).children(recursive=True)[-1]


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., str]:
    """Writes a trusted verifier with this body and returns its name.

    Verifiers that are not trusted are tested in tests/unit/test_sandbox.py.
    """

    def make(body: str, head: str = "") -> str:
        file = tmp_path / "own.py"
        file.write_text(
            f"import os, sys, time\nTRUSTED = True\nkept = []\n{head}\n"
            f"def judge(text, answers, metadata):\n    {body}\n"
        )
        return f"{file}:judge"

    return make


OPTIONS: dict[str, Any] = {"workers": 1, "timeout_seconds": 20, "memory_mib": 512}

OWN = {
    "return text == answers[0]": ("ok", 1.0, ""),
    "return metadata['level'] / 4": ("score", 0.5, ""),
    "print('[1.0]'); return 0.25": ("score", 0.25, ""),
    "return float('nan')": ("crashed", None, "the verifier gave the reward nan"),
    "return answers[7]": ("crashed", None, "IndexError: list index out of range"),
    "return None": (
        "crashed",
        None,
        "TypeError: float() argument must be a string or a real number, not 'NoneType'",
    ),
    "sys.exit(3)": ("crashed", None, "the verifier process ended with code 3"),
    "os.abort()": ("crashed", None, "the verifier process ended with code -6"),
    "return len('x' * (2 << 30)) == 1": ("crashed", None, "MemoryError: "),
    "def deep(): return deep()\n    return deep()": (
        "crashed",
        None,
        "RecursionError: maximum recursion depth exceeded",
    ),
}


@pytest.mark.parametrize("body", OWN)
def test_a_verifier_of_ones_own_gives_statuses_and_rewards(
    own: Callable[[str], str], body: str
) -> None:
    with VerifierPool(own(body), **OPTIONS) as pool:
        for outcome in pool.run([Check("a", ["a"], {"level": 2})] * 2):
            assert (outcome.status, outcome.reward, outcome.reason) == OWN[body]


def test_a_worker_killed_in_the_middle_of_a_check_fails_only_that_check(
    own: Callable[[str], str], tmp_path: Path
) -> None:
    body = (
        "text == 'slow' and (open('PID', 'w').write(str(os.getpid())), time.sleep(60)); return True"
    )
    pid = tmp_path / "pid"
    with VerifierPool(own(body.replace("PID", str(pid))), **(OPTIONS | {"workers": 2})) as pool:
        futures = [pool.submit(Check(text, []), lambda o: o) for text in ["slow"] + ["fast"] * 20]
        others = [future.result() for future in futures[1:]]
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        os.kill(int(pid.read_text()), signal.SIGKILL)
        killed = futures[0].result()

    assert (killed.status, killed.reason) == ("crashed", "the verifier process ended with code -9")
    assert [o.status for o in others] == ["ok"] * 20


def test_a_worker_whose_memory_grows_is_replaced_before_it_meets_its_limit(
    own: Callable[[str], str],
) -> None:
    with VerifierPool(
        own("kept.append(bytearray(64 << 20)); return os.getpid()"), **OPTIONS
    ) as pool:
        outcomes = pool.run([Check("", [])] * 20)
    assert {o.status for o in outcomes} == {"score"}
    assert 3 <= len({o.reward for o in outcomes}) <= 10, "not one process, nor one a check"


def test_workers_check_at_the_same_time(own: Callable[[str], str], tmp_path: Path) -> None:
    """Each check waits until as many are in progress as there are workers; tools/bench_labels.py
    measures the gain.
    """
    arrived = f"{str(tmp_path)!r} + '/arrived'"
    body = (
        f"open({arrived} + text, 'w').close()\n"
        f"    while sum(name.startswith('arrived') for name in os.listdir({str(tmp_path)!r})) < 4: "
        "time.sleep(0.01)\n"
        "    return True"
    )
    with VerifierPool(own(body), **(OPTIONS | {"workers": 4, "timeout_seconds": 120})) as pool:
        assert [o.status for o in pool.run([Check(str(i), []) for i in range(4)])] == ["ok"] * 4


def test_outcomes_are_in_order(own: Callable[[str], str]) -> None:
    with VerifierPool(
        own("time.sleep(0.02 if float(text) % 3 else 0); return float(text)"), **OPTIONS
    ) as pool:
        assert [o.reward for o in pool.run([Check(str(i), []) for i in range(30)])] == list(
            range(30)
        )


BROKEN = {
    "own.py:nothing": "has no function 'nothing'",
    "broken.py:judge": "SyntaxError",
    "missing.py:judge": "which is no file",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_verifier_that_cannot_be_loaded_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "own.py").write_text("def judge(text, answers, metadata): return True\n")
    (tmp_path / "broken.py").write_text("def judge(:\n")
    with pytest.raises(ValueError, match=BROKEN[name]):
        VerifierPool(f"{tmp_path}/{name}", **OPTIONS)


def test_unknown_verifier_is_refused() -> None:
    with pytest.raises(
        ValueError, match="'magic'; it takes one of math_verify, exact, reasoning_gym"
    ):
        load("magic")


def test_reasoning_gym_scores_its_own_tasks() -> None:
    import reasoning_gym

    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)[0]
    right = Check(box(entry["answer"]), ["-1", entry["answer"]], {"source_dataset": "chain_sum"})
    with VerifierPool("reasoning_gym", workers=1, timeout_seconds=20, memory_mib=4096) as pool:
        first, nothing, unknown = pool.run([right, Check("", ["1"]), Check(box("1"), ["1"])])
    assert (first.status, first.reward) == ("score", 1.0)
    assert nothing.status == "unparsable"
    assert (unknown.status, unknown.reason) == ("crashed", "KeyError: 'source_dataset'")


def completion(
    text: str, *, finished: bool = True, tokens: int = 3, gold: str = "5"
) -> tuple[Prompt, Completion]:
    return Prompt("p", "", (1,), (gold, "five")), Completion(
        (7,) * tokens, (0.0,) * tokens, text, finished
    )


EACH = {
    "ok": completion(box("five")),
    "wrong": completion(box("6")),
    "unparsable": completion("?"),
    "timeout": completion(SLOW),
    "crashed": completion("crash"),
    "overlong": completion(box("5"), finished=False),
    "empty": completion("", tokens=0),
}
DEFAULT = [POSITIVE, NEGATIVE, NEGATIVE, EXCLUDED, EXCLUDED, NEGATIVE, EXCLUDED]
CONFIGURED: list[tuple[dict[str, Any], Sequence[int]]] = [
    ({}, DEFAULT),
    ({"excluded": []}, [POSITIVE, *[NEGATIVE] * 5, EXCLUDED]),
    (
        {"excluded": ["wrong", "unparsable"]},
        [POSITIVE, EXCLUDED, EXCLUDED, NEGATIVE, NEGATIVE, NEGATIVE, EXCLUDED],
    ),
    ({"overlong": "excluded"}, [*DEFAULT[:5], EXCLUDED, EXCLUDED]),
]


@pytest.mark.parametrize(("options", "labels"), CONFIGURED, ids=str)
def test_statuses_become_labels_by_the_configuration(
    own: Callable[..., str], options: dict[str, Any], labels: list[int]
) -> None:
    """A verifier of one's own calls `math_verify`, and crashes where the text says so."""
    # What math_verify imports takes seconds on a busy machine, and no check's time.
    head = (
        "from megatron_real.labels import verifiers\n"
        "verify = verifiers.load('math_verify')\n"
        "verify(verifiers.WARM_UP, [r'\\sqrt{x + 1}'], {})\n"
    )
    body = "text == 'crash' and os.abort(); return verify(text, answers, metadata)[0] == 'ok'"
    settings = (
        OPTIONS | {"timeout_seconds": 1.5, "memory_mib": 1024, "max_failed_share": 1.0} | options
    )
    with Labeller(own(body, head), **settings) as label:
        verdicts = label(list(EACH.values()))

    # A verifier of one's own gives a verdict or none: what it could not read is wrong.
    expected = ["wrong" if status == "unparsable" else status for status in EACH]

    assert [v.status for v in verdicts] == expected
    assert [v.label for v in verdicts] == [labels[list(EACH).index(status)] for status in expected]


def test_an_unparsable_answer_has_a_status_of_its_own() -> None:
    with Labeller("exact", **OPTIONS, excluded=["unparsable"]) as label:
        assert [v.label for v in label([EACH["unparsable"], EACH["wrong"]])] == [EXCLUDED, NEGATIVE]


def test_failed_checks_are_excluded_and_too_many_stop_the_run(own: Callable[[str], str]) -> None:
    items = [completion("crash")] + [completion("fine")] * 4 + [completion("", finished=False)] * 9
    with Labeller(own("return {'fine': True}[text]"), **OPTIONS, max_failed_share=0.2) as label:
        assert [v.label for v in label(items)[:5]] == [EXCLUDED] + [POSITIVE] * 4
        with pytest.raises(
            TooManyFailedChecks,
            match=r"1 of 4 checks failed \(1 crashed\), more than labels.max_failed_share = 0.2; "
            "most often: KeyError: 'crash'",
        ):
            label(
                items[:4] + items[5:]
            )  # the truncated ones were not checked and do not dilute the share


def test_scores_without_a_threshold_are_refused(own: Callable[[str], str]) -> None:
    name = own("return float(text)")
    items = [completion("0.75"), completion("0.25")]
    with Labeller(name, **OPTIONS, threshold=0.5) as label:
        assert [v.label for v in label(items)] == [POSITIVE, NEGATIVE]
    with Labeller(name, **OPTIONS) as label:
        with pytest.raises(RewardNeedsThreshold, match=r"reward 0.75; set labels.threshold"):
            label(items)
        assert [v.label for v in label([completion("1"), completion("0")])] == [POSITIVE, NEGATIVE]


PIECES = [
    "\\boxed{", "{", "}", "\\", "</think>", "<think>", "$", "\\frac", "\\sqrt", "\\left(",
    "\\right)", "\\text{", "|", "\\begin{pmatrix}", "\\end{pmatrix}", "^", "_", "!", "\\%", "&",
    "=", "<", ",", ".", ";", "1", "23", "0.5", "x", "i", "\\pi", "\\infty", "\\int_0^1",
    "\\sum_{n=1}^{3}", "\\cup", "[", ")", "\0", "\u0665", "\u00b2", "\ud800", "\n", " ", "\\binom",
    "\\pm", "\\degree", "\\circ",
]  # fmt: skip


@given(
    st.lists(st.sampled_from(PIECES), max_size=25).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=8),
)
@settings(max_examples=300)
@example("\\boxed{\\begin{pmatrix}1", ["\\end{pmatrix}"])
def test_fuzzed_answers_end_in_a_status(pool: VerifierPool, text: str, gold: list[str]) -> None:
    """A timeout is a status (2!!!!!! takes for ever); an exception that leaves the
    parser is not.
    """
    for answer in (text, box(text.replace("\\boxed{", ""))):
        (outcome,) = pool.run([Check(answer, ["5", "".join(gold)])])
        assert outcome.status in ("ok", "wrong", "unparsable", "timeout"), outcome.reason


@given(st.text(st.characters(), max_size=200), st.booleans(), st.booleans())
@settings(max_examples=300)
def test_reading_never_raises(text: str, think: bool, boxed: bool) -> None:
    assert load("exact", require_think=think, require_boxed=boxed)(text, ["5"], {})[0] in (
        "ok",
        "wrong",
        "unparsable",
    )


@given(st.text(alphabet="{}\\ab 5", max_size=60))
def test_final_answer_is_the_last_balanced_box(text: str) -> None:
    answer = final_answer(text + box("7"))
    assert answer is not None and answer.text == "7"
    inside = final_answer(text)
    if inside is not None:
        assert inside.text in text and inside.boxed
