"""Which verifiers run text of a completion as code, how those are contained, and what a worker
leaves behind.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import pwd
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_real.doctor.containment import containment
from megatron_real.labels import Labeller, gym, verifiers
from megatron_real.labels.code.verifier import program_of, row_tests
from megatron_real.labels.pool import Check, VerifierPool
from megatron_real.labels.sandbox import Rung, this_node
from megatron_real.prompts import read_rows
from megatron_real.records import NEGATIVE, POSITIVE, Completion, Prompt

SAMPLES = Path(__file__).parents[1] / "samples" / "code"
NODE, WHY = this_node()
needs_walls = pytest.mark.skipif(not NODE.contains, reason=f"this kernel allows no sandbox: {WHY}")
OPTIONS: dict[str, Any] = {"workers": 1, "timeout_seconds": 60, "memory_mib": 1024}


def box(text: str) -> str:
    return f"\\boxed{{{text}}}"


# --- what never evaluates text --------------------------------------------------------------------

AUDITED = """
import ast, json, random, sys
from megatron_real.labels import verifiers
sys.path.insert(0, {tests!r})
verify = verifiers.load({verifier!r})
for warm in ("\\\\boxed{{1}}", "\\\\boxed{{\\\\frac{{\\\\sqrt{{2}}}}{{3}}}}", "\\\\boxed{{x=2}}"):
    verify(warm, ["2"], {{"source_dataset": "chain_sum"}})
seen = []
def is_code(source):
    # Numbers that a parser of mathematics reads by way of the compiler are no code.
    text = source.decode("utf-8", "replace") if isinstance(source, bytes) else str(source)
    try:
        ast.literal_eval(text.strip())
        return False
    except Exception:  # whatever is wrong with it, it is no literal
        return True
def hook(event, arguments):
    # ast.parse goes by this file name: it makes a tree and no code.
    parsed_only = event == "compile" and arguments[1] in ("<unknown>", b"<unknown>")
    compiled = event == "compile" and not parsed_only
    if compiled and "evil" in str(arguments[0]) and is_code(arguments[0]):
        seen.append([event, str(arguments[0])[:200]])
    if event == "exec" and "evil" in str(arguments[0].co_names) + str(arguments[0].co_consts):
        seen.append([event, str(arguments[0].co_names)[:200]])
    processes = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork")
    if event in processes or event == "socket.connect":
        seen.append([event, ""])
checks = json.load(sys.stdin)
sys.addaudithook(hook)
statuses = []
for text, golds, metadata in checks:
    try: statuses.append(verify(text, golds, metadata)[0])
    except Exception as error: statuses.append(type(error).__name__)
print(json.dumps([len(statuses), seen]))
"""

EVIL = [
    "__import__('os').system('evil')",
    "[evil := __import__('os').system('true')]",
    "evil().attribute",
    "(lambda evil: evil)(1)",
    "f'{evil()}'",
    "[evil for evil in [1]]",
    "exec('evil=1')",
    "evil",
    "1 + evil",
    "open('evil').read()",
    "{**evil}",
    "evil[0]",
    "sqrt(evil.x)",
    "\\text{evil}(2)",
    "\\operatorname{evil}(__import__('os'))",
    "Symbol('evil').func",
    "x.evil",
    "2 if evil else 3",
    "yield evil",
    "lambda: evil",
    "print(evil)",
    "\\begin{evil}1\\end{evil}",
    "5; import evil",
    "5 #evil",
    "evil=5",
    "\"\"\"evil\"\"\"",
]  # fmt: skip
PIECES = [
    "evil", "__import__('os')", "(", ")", "[", "]", "{", "}", ".", "'", '"', "\\", "$", ";", "=",
    ":=", "lambda", "\\frac", "\\sqrt", "^", "_", "1", "2.5", "x", "+", "-", "*", "/", ",", " ",
    "\n", "eval", "exec", "\\text{", "\\left(", "\\right)", "%", "!", "@", "f'{", "}'", "\0",
    "for evil in", "**",
]  # fmt: skip


def audited(verifier: str, checks: list[tuple[str, list[str], dict[str, Any]]]) -> list[Any]:
    """Returns [number of checks, events that ran text as code], recorded by an audit hook.

    It takes a process of its own, because a hook cannot be removed.
    """
    script = AUDITED.format(verifier=verifier, tests=str(Path(__file__).parent))
    completed = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(checks),
        capture_output=True,
        text=True,
        check=True,
    )
    answer: list[Any] = json.loads(completed.stdout.splitlines()[-1])
    return answer


def fuzzed(count: int) -> list[str]:
    import random

    draw = random.Random(7)
    return ["".join(draw.choices(PIECES, k=draw.randrange(1, 15))) for _ in range(count)]


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.grid)])
@pytest.mark.parametrize("verifier", ["math_verify", "exact"])
def test_mathematics_is_never_run_as_code(verifier: str, count: int) -> None:
    texts = [*EVIL, *fuzzed(count)]
    golds = ["5", "evil + 1"]
    assert audited(verifier, [(box(text), golds, {}) for text in texts]) == [len(texts), []]


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.grid)])
def test_no_scorer_of_reasoning_gym_evaluates_an_answer(few: bool) -> None:
    """Checks every task of reasoning_gym on evil answers: none compiles or runs any
    part of them.
    """
    from reasoning_gym.factory import DATASETS

    entries = {task: _entry(task) for task in sorted(DATASETS) if task != "composite"}
    checks: list[tuple[str, list[str], dict[str, Any]]] = []
    for task, entry in entries.items():
        # The scorers of READERS only compare, so one evil answer each will do by default.
        texts = EVIL[:1] if few and task in gym.READERS else EVIL
        golds = [entry["answer"] or ""]
        metadata = entry["metadata"] | {"source_dataset": task}
        checks += [(box(text), golds, metadata) for text in texts]
    assert audited("reasoning_gym", checks) == [len(checks), []]


def _entry(task: str) -> dict[str, Any]:
    """Returns a small row of a task: what its scorer reads, without the cost of generating a
    problem for most tasks.
    """
    import reasoning_gym

    slow = task not in gym.LISTS | gym.NUMBERS | gym.EXPRESSIONS
    if slow:
        return {"answer": "5", "metadata": {}}
    entry: dict[str, Any] = reasoning_gym.create_dataset(task, size=1, seed=1)[0]
    return {
        "answer": entry["answer"],
        "metadata": json.loads(json.dumps(entry["metadata"], default=str)),
    }


def test_every_task_of_reasoning_gym_is_classed() -> None:
    from reasoning_gym.factory import DATASETS

    classes = [gym.READERS, gym.LISTS, gym.NUMBERS, gym.EXPRESSIONS, {"composite"}]
    assert sum(map(len, classes)) == len(DATASETS)
    assert set().union(*classes) == set(DATASETS)


ARITHMETIC = {
    "1 + 2*(3 - 4)/5": (True, True),
    "-2**3": (True, True),
    "x**2 + 3*x": (False, True),
    "sin(x)*exp(-x) + C": (False, True),
    "pi*E": (False, True),
    "": (False, False),
    "x.y": (False, False),
    "'x'": (False, False),
    "eval(x)": (False, False),
    "__import__": (False, False),
    "sin(x, y)": (False, False),
    "sin(*x)": (False, False),
    "sin": (False, False),
    "x[0]": (False, False),
    "[1]": (False, False),
    "1 if 2 else 3": (False, False),
    "lambda: 1": (False, False),
    "(x := 1)": (False, False),
    "x == 1": (False, False),
    "24 # 6 4 1 1": (False, False),
    "2_4": (False, False),
    "1 +\n 2": (False, False),
    "1j": (False, False),
    "True": (False, False),
    "f'{x}'": (False, False),
    "(" * 10_000: (False, False),
}


def test_arithmetic_is_distinguished_from_code() -> None:
    outcome_of = {
        text: (gym.is_arithmetic(text, names=False), gym.is_arithmetic(text, names=True))
        for text in ARITHMETIC
    }
    assert outcome_of == ARITHMETIC


# What the library's own scorers pay in full whatever the question is, beside right answers:
# (answer, gold, extra_info).
PAID_ALWAYS: list[tuple[str, str, dict[str, Any]]] = [
    ("nan", "3.0 - 2.0i", {"source_dataset": "complex_arithmetic", "result": [3.0, -2.0]}),
    ("nan+nanj", "3.0 - 2.0i", {"source_dataset": "complex_arithmetic", "result": [3.0, -2.0]}),
    ("0", "0.171875", {"source_dataset": "coin_flip"}),
    ("anything", "False", {"source_dataset": "game_of_life_halting"}),
    ("False", "True", {"source_dataset": "game_of_life_halting"}),
    ("5*6*1 - 6", "4*8 - 6 - 2", {"source_dataset": "puzzle24", "numbers": [4, 8, 6, 2]}),
    ("8*6/2 + 4/9", "4*8 - 6 - 2", {"source_dataset": "puzzle24", "numbers": [4, 8, 6, 2]}),
    ("2.5*4*2.4", "5*5 - 1**4", {"source_dataset": "puzzle24", "numbers": [5, 5, 1, 4]}),
    ("6**2 - 4", "6*4 + 2", {"source_dataset": "countdown", "numbers": [6, 4, 2], "target": 32}),
]
RIGHT: list[tuple[str, str, dict[str, Any]]] = [
    ("3 - 2i", "3.0 - 2.0i", {"source_dataset": "complex_arithmetic", "result": [3.0, -2.0]}),
    ("11/64", "0.171875", {"source_dataset": "coin_flip"}),
    ("true", "True", {"source_dataset": "game_of_life_halting"}),
    ("(8*6)/(4 - 2)", "4*8 - 6 - 2", {"source_dataset": "puzzle24", "numbers": [4, 8, 6, 2]}),
    ("-(2 - 6*4)", "6*4 - 2", {"source_dataset": "countdown", "numbers": [6, 4, 2], "target": 22}),
]  # fmt: skip


def test_no_answer_is_right_for_every_question() -> None:
    from reasoning_gym import get_score_answer_fn

    def of_the_library(answer: str, gold: str, extra: dict[str, Any]) -> float:
        scorer = get_score_answer_fn(extra["source_dataset"])
        return float(scorer(answer, {"answer": gold, "metadata": extra}))

    assert [of_the_library(*row) >= 1.0 for row in PAID_ALWAYS[:6]] == [True] * 6
    assert [gym.score(*row) < 1.0 for row in PAID_ALWAYS] == [True] * len(PAID_ALWAYS)
    assert [gym.score(*row) for row in RIGHT] == [1.0] * len(RIGHT)


# Answers on which the library's own scorers raise: (answer, gold, task).
FAILED_ON = [
    ("2^3", "3 \u00d7 5", "prime_factorization"),
    ("nothing", "3 \u00d7 5", "prime_factorization"),
    ('{"a": 0}', "[[0, 1], [1, 0]]", "game_of_life"),
    ("1e400", "0.171875", "coin_flip"),
]


def test_an_answer_cannot_choose_to_fail_its_check() -> None:
    """A failed check excludes the rollout instead of making it a negative, and many of them end the
    run.

    An error in the row itself is still raised.
    """
    from reasoning_gym import get_score_answer_fn

    for answer, gold, task in FAILED_ON:
        with pytest.raises((ValueError, KeyError, OverflowError)):
            get_score_answer_fn(task)(answer, {"answer": gold, "metadata": {}})
        assert gym.score(answer, gold, {"source_dataset": task}) == 0.0

    with pytest.raises(ValueError, match="invalid literal"):
        gym.score("3", "no gold", {"source_dataset": "prime_factorization"})

    # A sum that diverges, and an integral that stays one: sympy raises on the value of either.
    verify = verifiers.load("math_verify")
    for answer in ("\\sum_{n=0}^{\\infty} 1", "\\int0\\overline{3}"):
        assert verify(box(answer), ["5"], {}) == ("wrong", 0.0)


# --- reasoning_gym's attack -----------------------------------------------------------------------

ATTACK = (
    "[__import__('os').system('touch {file}'), "
    "open('{file}.keys', 'w').write(__import__('os').environ['CANARY_API_KEY']), "
    "[setattr(c, 'score_answer', lambda *_: 1.0) "
    "for c in __import__('reasoning_gym').factory.DATASETS['spiral_matrix'][:1]]]"
)
REPRODUCED = """
import sys
import uuid
from reasoning_gym import get_score_answer_fn
def score(answer):
    entry = {"answer": "1 2", "metadata": {}}
    return get_score_answer_fn("spiral_matrix")(answer, entry)
before = score("7 7"); score(sys.argv[1]); print(before, score("7 7"))
"""


@needs_walls
def test_an_answer_that_reasoning_gym_would_run_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell command, a key from the environment, and a replaced scorer: all three succeed on the
    library by itself.
    """
    monkeypatch.setenv("CANARY_API_KEY", "secret")
    bare = ATTACK.format(file=tmp_path / "bare")
    completed = subprocess.run(
        [sys.executable, "-c", REPRODUCED, bare], capture_output=True, text=True, check=True
    )

    assert completed.stdout.split() == ["0.0", "1.0"], "the scorer is replaced"
    assert (tmp_path / "bare").exists(), "the shell command ran"
    assert (tmp_path / "bare.keys").read_text() == "secret"

    row = {"source_dataset": "spiral_matrix"}
    attack = box(ATTACK.format(file=tmp_path / "held"))
    texts = [box("7 7"), attack, box("7 7"), box("1 2"), box("[1, 2]")]
    checks = [Check(text, ["1 2"], row) for text in texts]
    held = tmp_path / "held"
    countdown = {"source_dataset": "countdown", "target": 24}
    games = [
        Check(box("(6*4)"), ["24"], countdown | {"numbers": [6, 4]}),
        Check(box(f"__import__('os').system('touch {held}')"), ["24"],
              countdown | {"numbers": [6, 4]}),
        Check(box("max(6, 4)*4"), ["24"], countdown | {"numbers": [6, 4, 4]}),
        Check(box("2*x + x"), ["3*x"], {"source_dataset": "polynomial_multiplication"}),
        Check(box("1"), ["1"], {"source_dataset": "composite"}),
        Check(box("1"), ["1"], {"source_dataset": "of_another_version"}),
    ]  # fmt: skip
    with VerifierPool("reasoning_gym", **(OPTIONS | {"memory_mib": 4096})) as pool:
        outcomes = pool.run([*checks, *games])

    assert [o.reward for o in outcomes] == [
        0.0, 0.0, 0.0, 1.0, 0.1, 1.0, 0.01, 0.01, 1.0, None, None,
    ]  # fmt: skip
    assert [o.reason for o in outcomes[-2:]] == [
        "ValueError: rows of composite are refused: give extra_info.source_dataset its own task",
        "ValueError: Dataset 'of_another_version' not registered",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "bare.keys"]


def test_another_version_of_reasoning_gym_is_checked_in_a_child_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scorers were not reviewed, so each check is in a child of a worker that has read no
    request.
    """
    metadata = tmp_path / "reasoning_gym-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: reasoning_gym\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = OPTIONS | {"memory_mib": 4096}
    with pytest.raises(ValueError, match=r"another version of reasoning_gym than 0\.1\.25 may"):
        VerifierPool("reasoning_gym", **options, highest=Rung.LIMITS)
    if NODE.contains:
        check = Check(box("4"), ["4"], {"source_dataset": "chain_sum"})
        with VerifierPool("reasoning_gym", **options) as pool:
            assert [o.reward for o in pool.run([check] * 2)] == [1.0, 1.0]


# --- verifiers of a user's own --------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., str]:
    """Writes a verifier with this body to a folder with other files, and returns its name."""

    def make(body: str, head: str = "", name: str = "judges") -> str:
        file = tmp_path / f"{name}.py"
        file.write_text(
            f"from __future__ import annotations\nimport os, sys, time\n{head}\n"
            f"def judge(text, answers, metadata):\n    {body}\n"
        )
        return f"{file}:judge"

    return make


EVALUATED = {
    "answers[0] == 'a'": ("ok", ""),
    "setattr(__import__('builtins'), 'planted', 1) or True": ("ok", ""),
    "planted": ("crashed", "NameError: name 'planted' is not defined"),
    "os._exit(0)": ("crashed", "the verifier process ended with code 0"),
    "sys.exit(3)": ("crashed", "the verifier process ended with code 3"),
    "os.write(0, b'x') and "
    "[os.write(n, b'{}') for n in range(3, 64) if os.path.exists('/dev/null')]": (
        "crashed", "OSError: [Errno 9] Bad file descriptor",
    ),
    "[os.close(n) for n in range(3, 5)]": ("crashed", "OSError: [Errno 9] Bad file descriptor"),
    "os.closerange(0, 64) or True": ("crashed", "the verifier process ended with code 1"),
    "os.kill(os.getppid(), 9)": ("crashed", "OSError: [Errno 38] Function not implemented"),
    "os.fork()": ("crashed", "OSError: [Errno 38] Function not implemented"),
    "os.environ['CANARY_API_KEY']": ("crashed", "KeyError: 'CANARY_API_KEY'"),
    "open('/etc/passwd')": (
        "crashed", "FileNotFoundError: [Errno 2] No such file or directory: '/etc/passwd'",
    ),
    "(_ for _ in ()).throw(ValueError(chr(27) + '[2J' + chr(10)))": (
        "crashed", "ValueError:  [2J ",
    ),
    "float('inf')": ("crashed", "the verifier gave the reward inf"),
    "(lambda f: f(f))(lambda f: f(f))": (
        "crashed", "RecursionError: maximum recursion depth exceeded",
    ),
    "0.5": ("score", ""),
    # Of all descriptors there is the pipe of its one answer.
    "[stat.S_ISFIFO(os.fstat(n).st_mode) for n in range(3, 64) if is_open(n)] == [True]": (
        "ok", "",
    ),
}  # fmt: skip
IS_OPEN = """
import stat
def is_open(number):
    try: os.fstat(number)
    except OSError: return False
    return True
"""


@needs_walls
def test_a_verifier_that_evaluates_is_contained(
    own: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY_API_KEY", "secret")
    name = own(
        "verdict = eval(text); return verdict if isinstance(verdict, (bool, float)) else False",
        IS_OPEN,
    )
    with VerifierPool(name, **OPTIONS) as pool:
        outcomes = pool.run([Check(text, ["a"]) for text in EVALUATED])
        rung = pool.rung
    outcome_of = {text: (o.status, o.reason) for text, o in zip(EVALUATED, outcomes, strict=True)}
    expected = dict(EVALUATED)
    if rung is Rung.LANDLOCK:
        expected["open('/etc/passwd')"] = (
            "crashed",
            "PermissionError: [Errno 13] Permission denied: '/etc/passwd'",
        )
    outcome_of = {
        text: (status, reason.partition(" while ")[0])
        for text, (status, reason) in outcome_of.items()
    }

    # Which descriptors are open differs, and who is first to end the child: what counts is that no
    # verdict gets out.
    for text in (
        "[os.close(n) for n in range(3, 5)]",
        "os.closerange(0, 64) or True",
        list(EVALUATED)[5],
    ):
        assert outcome_of.pop(text)[0] == expected.pop(text)[0]

    assert outcome_of == expected


def test_an_own_verifier_is_a_module_with_its_folder_on_the_path(
    own: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "beside.py").write_text("def right(text): return text == 'a'\n")
    head = (
        "TRUSTED = True\nimport dataclasses, pickle\nimport beside\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "@dataclasses.dataclass\nclass Row:\n    kept: dataclasses.InitVar[int]\n"
        "    name: str = ''\n"
    )
    body = (
        "assert pickle.loads(pickle.dumps(Row(1, 'a'))).name == 'a' and __name__ == 'judges'\n"
        "    with ProcessPoolExecutor(1) as pool: return pool.submit(beside.right, text).result()"
    )
    with VerifierPool(own(body, head), **OPTIONS) as pool:
        outcomes = pool.run([Check("a", []), Check("b", [])])

    assert [(o.status, o.reason) for o in outcomes] == [("ok", ""), ("wrong", "")]


def test_a_file_named_as_another_module_is_refused(own: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="there is another module statistics; rename the file"):
        VerifierPool(own("return True", name="statistics"), **OPTIONS)


@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "contained"])
def test_processes_that_a_verifier_started_end_with_it(
    own: Callable[..., str], tmp_path: Path, trusted: bool
) -> None:
    """The verifier starts a grandchild in a session of its own, which no signal to a process group
    reaches.
    """
    marker = f"grandchild-{uuid.uuid4().hex}"
    start = f"subprocess.Popen(['sh', '-c', 'sleep 600; echo {marker}'], start_new_session=True)"
    if trusted:
        head = "TRUSTED = True\nimport subprocess"
        body = f"{start}; time.sleep(text == 'slow' and 600 or 0); return True"
        expected = ["ok", "timeout", "ok"]
    else:
        # A contained verifier can start a process only while it is loaded.
        head = f"import subprocess\n{start}"
        body = "return True"
        expected = ["ok"] * 3

    def alive() -> list[int]:
        return [
            process.pid
            for process in psutil.process_iter(["cmdline"])
            if any(marker in word for word in process.info["cmdline"] or [])
        ]

    with VerifierPool(own(body, head), **(OPTIONS | {"timeout_seconds": 8})) as pool:
        statuses = [o.status for o in pool.run([Check("", []), Check("slow", []), Check("", [])])]
        assert statuses == expected
        # The shell's child has the shell's command line until it has become sleep.
        deadline = time.monotonic() + 60
        left = alive()
        while len(left) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
            left = alive()
        assert len(left) == 1, "those of the killed one are gone"

    assert alive() == []


@needs_walls
def test_a_verifier_in_the_home_directory_is_refused(
    own: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder would be visible to completions, and the home directory holds keys.

    In containers, HOME gives the home directory.
    """
    name = own("return True")
    for home in (tmp_path, tmp_path / "user"):
        monkeypatch.setenv("HOME", str(home))
        with pytest.raises(ValueError, match="completions could read the home directory; move it"):
            VerifierPool(name, **OPTIONS)
    with VerifierPool(name, **OPTIONS, sandbox="off") as pool:
        assert pool.run([Check("", [])])[0].status == "ok"


@needs_walls
def test_the_path_of_libraries_shows_no_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves out the working directory, the home directory, whatever contains one of them, and
    relative paths.
    """
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    canaries = [tmp_path / "canary", home / f"canary-{uuid.uuid4().hex}"]
    monkeypatch.chdir(tmp_path)
    program = (
        "for place in PLACES:\n"
        "    try: print(open(place).read())\n"
        "    except OSError: print('held')\n"
    ).replace("PLACES", str([*map(str, canaries), "/etc/hostname"]))
    check = Check(
        f"```python\n{program}\n```", [], {"tests": [{"stdin": "", "stdout": "held\n" * 3}]}
    )
    try:
        for canary in canaries:
            canary.write_text("canary")
        unreachable = (
            "/" + "x" * 300
        )  # as a folder that this user may not look at: an error, not an absence
        for path in (f"{tmp_path}:.:{home}:{unreachable}", "/"):
            monkeypatch.setenv("LD_LIBRARY_PATH", path)
            with VerifierPool("code", **OPTIONS) as pool:
                assert pool.run([check])[0].reason == "1 of 1 tests passed: ok"
    finally:
        canaries[1].unlink()

    assert not Path("/proc.").exists(), "what is relative would be mounted beside the new root"


@needs_walls
def test_a_worker_whose_launcher_was_killed_gives_no_verdict() -> None:
    """Otherwise a right program would be judged wrong, and all later ones too."""
    test = {"tests": [{"stdin": "", "stdout": "5"}]}
    right = Check("```python\nprint(5)\n```", [], test)
    with VerifierPool("code", **OPTIONS) as pool:
        assert [o.status for o in pool.run([right])] == ["ok"]
        (worker,) = pool._workers
        assert worker._process is not None
        *_, launcher = psutil.Process(worker._process.pid).children(recursive=True)
        assert launcher.children() == []
        launcher.kill()
        assert [o.status for o in pool.run([right] * 3)] == ["crashed", "ok", "ok"]


def test_a_verifier_larger_than_its_memory_is_refused_with_the_remedy(
    own: Callable[..., str],
) -> None:
    name = own("return True", "TRUSTED = True\nlarge = bytearray(600 << 20)")
    with pytest.raises(
        ValueError,
        match=r"takes \d{3} MiB before its first check, so labels.memory_mib = 512 leaves",
    ):
        VerifierPool(name, **(OPTIONS | {"memory_mib": 512}))


def test_a_worker_that_is_replaced_after_every_check_is_warned_of_once(
    own: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    name = own("kept.append(bytearray(400 << 20)); return True", "TRUSTED = True\nkept = []")
    with (
        caplog.at_level(logging.WARNING),
        VerifierPool(name, **(OPTIONS | {"memory_mib": 600})) as pool,
    ):
        assert [o.status for o in pool.run([Check("", [])] * 3)] == ["ok"] * 3

    warnings = [
        record.getMessage()
        for record in caplog.records
        if "replaced after one check" in record.getMessage()
    ]

    assert len(warnings) == 1 and warnings[0].endswith("labels.memory_mib = 600; raise it")


JUNK = [
    "nonsense",
    "{}",
    "[1]",
    '{"number": 7, "status": "ok", "reward": 1.0, "reason": "", "last": false}',
    "[" * 2000,
]


def test_a_junk_reply_fails_only_its_own_check(own: Callable[..., str]) -> None:
    """The reply comes from a trusted verifier, which alone has the worker's descriptors."""
    write = (
        "[os.write(n, text.encode() + b'\\n') for n in map(int, os.listdir('/proc/self/fd')) "
        "if n > 2 and os.path.realpath(f'/proc/self/fd/{n}').split('/')[-1].startswith('pipe')]"
    )
    name = own(f"text and {write}; return True", "TRUSTED = True")
    texts = [piece for junk in JUNK for piece in (junk, "")]
    with VerifierPool(name, **OPTIONS) as pool:
        outcomes = pool.run([Check(text, []) for text in texts])
    assert [o.status for o in outcomes] == ["crashed", "ok"] * len(JUNK)
    assert {o.reason for o in outcomes} == {"the worker's reply is none", ""}


def test_a_closed_pool_leaves_no_descriptor() -> None:
    def descriptors() -> int:
        return psutil.Process().num_fds()

    def run() -> None:
        with VerifierPool("exact", **(OPTIONS | {"workers": 2})) as pool:
            assert pool.run([Check(box("5"), ["5"])])[0].status == "ok"
        for thread in pool._threads:
            thread.join(30)

    run()
    before = descriptors()
    for _ in range(3):
        run()
    gc.collect()

    assert descriptors() <= before


# --- the ladder -----------------------------------------------------------------------------------


def test_the_lowest_rung_refuses_code_and_warns_of_own_verifiers(
    own: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """Code, tasks that evaluate answers and `require` are refused; mathematics goes on; a verifier
    of one's own is warned of.
    """
    lowest = OPTIONS | {"highest": Rung.LIMITS}
    with pytest.raises(ValueError, match="programs run in a sandbox only"):
        VerifierPool("code", **lowest)
    with pytest.raises(ValueError, match=r"labels.sandbox = require, and .*; install libseccomp2"):
        VerifierPool("exact", sandbox="require", **lowest)
    with caplog.at_level(logging.WARNING), VerifierPool(own("return True"), **lowest) as pool:
        assert pool.run([Check("", [])])[0].status == "ok"
    assert "is not contained on this node" in caplog.text
    with VerifierPool("exact", **lowest) as pool:
        assert pool.run([Check(box("5"), ["5"])])[0].status == "ok"
    with VerifierPool("reasoning_gym", **(lowest | {"memory_mib": 4096})) as pool:
        countdown = Check(
            box("24"), ["24"], {"source_dataset": "countdown", "numbers": [24], "target": 24}
        )
        spiral = Check(box("1 2"), ["1 2"], {"source_dataset": "spiral_matrix"})
        refused, read = pool.run([countdown, spiral])

    assert refused.status == "crashed" and refused.reason.startswith(
        "the scorer of countdown evaluates answers"
    )
    assert (read.status, read.reward) == ("score", 1.0)


def test_the_doctor_says_which_rung_this_node_stands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = containment()
    assert finding.name == "sandbox"
    assert finding.verdict == ("ok" if NODE.contains else "warn")
    assert finding.found.startswith(f"{NODE.value}: verifiers ")
    monkeypatch.setattr(
        "megatron_real.doctor.containment.this_node", lambda: (Rung.LIMITS, "no Landlock")
    )
    lowest = containment()
    assert lowest.verdict == "warn" and "are refused (no Landlock)" in lowest.found
    assert "install libseccomp2" in lowest.remedy


def test_containment_off_still_gives_each_check_a_clean_child(own: Callable[..., str]) -> None:
    name = own("kept.append(1); return float(len(kept))", "kept = []")
    with VerifierPool(name, sandbox="off", **OPTIONS) as pool:
        assert [o.reward for o in pool.run([Check("", [])] * 3)] == [1.0] * 3


# --- code as an answer ----------------------------------------------------------------------------

SOLUTIONS = {
    "humaneval": [
        "from typing import List\ndef running_total(numbers: List[int]) -> List[int]:\n"
        "    total, out = 0, []\n"
        "    for n in numbers:\n        total += n\n        out.append(total)\n    return out",
        "def near_pair(values, gap):\n    v = sorted(values)\n"
        "    return any(b - a < gap for a, b in zip(v, v[1:]))",
    ],
    "mbpp": [
        "def longest_word(text):\n    return max(text.split(), key=len)",
        "def area(radius):\n    import math\n    return math.pi * radius ** 2",
        "def sort_in_place(items):\n    items.sort()",
    ],
    "stdin": ["n = int(input())\nprint(sum(int(input()) for _ in range(n)))"],
}


@needs_walls
@pytest.mark.parametrize("shape", SOLUTIONS)
def test_rows_of_every_known_shape_are_judged(shape: str) -> None:
    """Rows go through the prompts' reader and the labeller: the right program is positive, one that
    passes a part of the tests is not.
    """
    rows = read_rows(SAMPLES / f"{shape}.jsonl")
    assert len(rows) == len(SOLUTIONS[shape])

    right = [f"<think>```python\nwrong\n```</think>```python\n{s}\n```" for s in SOLUTIONS[shape]]
    texts = [*right, *["```python\ndef f(): pass\n```"] * len(rows)]
    items = [
        (
            Prompt("p", "", (1,), row.answers, metadata=row.metadata),
            Completion((1,), (0.0,), text, True),
        )
        for row, text in zip([*rows, *rows], texts, strict=True)
    ]
    with Labeller("code", **OPTIONS) as label:
        verdicts = label(items)

    assert [v.reason.partition(":")[0] for v in verdicts[: len(rows)]] == [
        f"{n} of {n} tests passed" for n in (len(row_tests(row.metadata)) for row in rows)
    ]
    assert [v.label for v in verdicts] == [POSITIVE] * len(rows) + [NEGATIVE] * len(rows)


@needs_walls
def test_a_program_cannot_replace_the_helpers_of_its_tests() -> None:
    """HumanEval's find_zero is judged by poly, which its prompt defines: a program's own poly could
    be 0 everywhere.
    """
    test = "def check(candidate):\n    assert abs(poly([1, 2], candidate([1, 2]))) < 1e-4\n"
    poly = "def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))"
    row = {"test": test, "entry_point": "find_zero"}
    wrong = "```python\ndef poly(xs, x): return 0\ndef find_zero(xs): return 7\n```"
    right = f"```python\n{poly}\ndef find_zero(xs): return -xs[0] / xs[1]\n```"
    checks = [Check(t, [], r) for r in (row, row | {"setup": poly}) for t in (wrong, right)]
    with VerifierPool("code", **OPTIONS) as pool:
        outcomes = pool.run(checks)
    assert [o.status for o in outcomes] == ["crashed", "crashed", "wrong", "ok"]
    assert "extra_info.test uses poly, which is neither defined in it nor" in outcomes[0].reason


@needs_walls
def test_names_that_a_test_binds_are_not_taken_from_the_program() -> None:
    test = (
        "def check(candidate):\n    try:\n        candidate(-1)\n    except ValueError as error:\n"
        "        assert 'negative' in str(error)\n    match candidate(4):\n        case [*roots]:\n"
        "            assert roots == [-2, 2]\n        case other:\n            assert not other\n"
    )
    program = (
        "def roots_of(n):\n    if n < 0: raise ValueError('negative')\n"
        "    return [-(n**0.5), n**0.5]"
    )
    row = {"test": test, "entry_point": "roots_of"}
    with VerifierPool("code", **OPTIONS) as pool:
        (outcome,) = pool.run([Check(f"```python\n{program}\n```", [], row)])

    assert outcome.reason == "1 of 1 tests passed: ok"


@needs_walls
def test_a_threshold_is_a_share_of_the_tests() -> None:
    tests = {"tests": [{"assert": f"f({n}) == {n}"} for n in range(4)]}
    text = "```python\ndef f(n): return min(n, 2)\n```"
    item = (Prompt("p", "", (1,), (), metadata=tests), Completion((1,), (0.0,), text, True))
    for threshold, label_expected in ((0.75, POSITIVE), (0.8, NEGATIVE), (None, NEGATIVE)):
        with Labeller("code", **OPTIONS, threshold=threshold) as label:
            (verdict,) = label([item])
        assert verdict.label == label_expected
        assert verdict.reward == (0.0 if threshold is None else 0.75)
        assert verdict.reason == "3 of 4 tests passed: ok ok ok wrong"


PROGRAMS = {
    "```python\na\n```": "a\n",
    "```\na\n```\n```py\nb\n```  \n": "b\n",
    "```python\na\n```\n```python\nunfinished": "a\n",
    "<think>```python\na\n```</think>": None,
    "[THINK]\n```python\na\n```": None,
    "[THINK]\n```python\na\n```\n[/THINK]\n```python\nb\n```": "b\n",
    "```python\na\n```<think>": "a\n",
    "text": None,
    "```rust\na\n```": None,
    "```python3\r\na\r\n```": "a\r\n",
    "```python\n" + "x" * 100_001 + "\n```": None,
    "```python\n" * 100_000: None,
}


def test_the_program_is_read_from_the_last_code_block() -> None:
    assert {text: program_of(text) for text in PROGRAMS} == PROGRAMS
    assert program_of("```python\na\n```", require_think=True) is None


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"tests": []},
        {"tests": [{"stdin": "1"}]},
        {"inputs": ["1"], "outputs": []},
        {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"},
        {"test": " ", "entry_point": "f"},
        {"test_list": ["assert f(1) == 1", "\n"]},
    ],
    ids=str,
)
def test_rows_without_tests_are_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="extra_info"):
        row_tests(extra)
