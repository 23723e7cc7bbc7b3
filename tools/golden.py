"""The golden curves: figures of small fixed runs that a change of structure must
not move by one bit.

    # `replay` and `tiny`, about half a minute; exit code 1 if one differs
    python tools/golden.py compare
    # the first 20 of its 60 steps
    python tools/golden.py compare tiny --steps 20
    # the quickstart's 60 steps, several minutes
    python tools/golden.py compare quickstart
    # writes tests/golden/NAME.jsonl anew, after a wanted change
    python tools/golden.py make [NAME ...]

    replay      10 steps of fixed rollouts in float64, two minibatches each, for every variant of
                the objective, by Policy.prepare and Policy.gradient. megatron-core's optimizers
                know no float64, so the weights move by a plain gradient step of this file's own.
                Scores of the second minibatch are far from 0.
    tiny        60 steps of `megatron-real train` in float32 on one process: sampling by
                transformers, an own verifier, chunks, refilled groups, several micro-batches, Adam.
                Weights and prompts come from Python's random numbers, so every machine begins with
                the same bits.
    quickstart  60 steps of examples/configs/quickstart.yaml on two processes, as
                examples/quickstart.sh runs them, from a shipped base model. All 60 rows are those
                of the code from before the objectives (0048429).

The first line of a file names the processor and the packages that it was made with. On the same
ones the comparison is byte for byte: threads, instruction set and MKL's code path are fixed below.
Elsewhere

    replay      agrees to a relative 1e-9. A change of 1e-13 in the step size moved no figure by
                more than 1e-13, so that rounding (1e-16) stays far below it, and any mistake far
                above;
    the others  agree in their first step to a relative 1e-4, and in the mean reward of the last ten
                steps to 0.15. A draw that rounding moves to another token changes all later
                figures, so no more can be asked.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

# One thread, and the arithmetic that every x86-64 machine with AVX2 has: sums are formed in the
# same order everywhere.
FIXED = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

Row = dict[str, Any]
"""One line of a golden file: the step, and loss, grad_norm and what else there is,
as JSON's exact floats.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes and compares the golden curves.")
    parser.add_argument("action", choices=("make", "compare"))
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="replay, tiny, quickstart; the first two by default",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="compare no more than the first N steps of a training run",
    )
    options = parser.parse_args()
    unknown = set(options.names) - {"replay", "tiny", "quickstart"}
    if unknown:
        parser.error(f"no curve is named {', '.join(sorted(unknown))}")
    if options.steps is not None and (options.action == "make" or not 10 <= options.steps <= 60):
        parser.error(f"--steps is {options.steps}; it is for compare, and must lie in 10 to 60")

    names = options.names or ("replay", "tiny")
    missing = [name for name in names if not (GOLDEN / f"{name}.jsonl").is_file()]
    if options.action == "compare" and missing:
        parser.error(
            f"tests/golden has no {', '.join(missing)}; make it with the code before the change"
        )

    with tempfile.TemporaryDirectory() as folder:
        curves = figures(names, Path(folder), options.steps or 60)

    failures = 0
    for name, rows in curves.items():
        golden = GOLDEN / f"{name}.jsonl"
        if options.action == "make":
            golden.parent.mkdir(exist_ok=True)
            golden.write_text("".join(json.dumps(row) + "\n" for row in [machine(), *rows]))
            print(f"{golden.relative_to(ROOT)}: {len(rows)} rows")
            continue
        made_by, *expected = [json.loads(line) for line in golden.read_text().splitlines()]
        # The learning rate is constant, so that a shorter run is a longer one's beginning.
        if options.steps and name != "replay":
            expected = expected[: options.steps]

        exact = made_by == machine()
        difference = compare(name, rows, expected, exact=exact)
        exactness = "byte for byte"
        if not exact:
            exactness = f"loosely, made by {made_by}"
        print(f"{name}: {difference or f'{len(rows)} rows agree ({exactness})'}")
        failures += bool(difference)
    return int(failures > 0)


def machine() -> Row:
    """What the last bits of the figures depend on."""
    facts = {"cpu": _cpu()}
    for package in ("torch", "megatron-core", "transformers"):
        facts[package] = "none"
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    return facts


def _cpu() -> str:
    """Vendor, family and model number of the processor."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return "unknown"
    # The first paragraph is of the first core.
    first, *_ = file.read_text().split("\n\n")
    values = dict(line.split("\t", 1) for line in first.splitlines() if "\t" in line)
    # Not its name and speed: machines of one model compute alike.
    names = ("vendor_id", "cpu family", "model")
    return " ".join(values[n].split(": ")[-1].strip() for n in names if n in values) or "unknown"


def compare(name: str, rows: Sequence[Row], expected: Sequence[Row], *, exact: bool) -> str:
    """What differs first, or "" if the rows agree as far as the module's docstring asks."""
    if len(rows) != len(expected):
        return f"{len(rows)} rows instead of {len(expected)}"

    # On another machine rounding differs. Fixed rollouts in float64 stay close; a run in fp32 draws
    # other answers after its first step.
    num_strict = len(rows)
    relative = 0.0
    if not exact:
        relative = 1e-9
        if name != "replay":
            num_strict = 1
            relative = 1e-4

    for row, wanted in list(zip(rows, expected, strict=True))[:num_strict]:
        if row.keys() != wanted.keys():
            return f"columns {', '.join(row)} instead of {', '.join(wanted)}"
        for column, value in wanted.items():
            same = row[column] == value
            if relative > 0 and isinstance(value, float):
                same = math.isclose(row[column], value, rel_tol=relative, abs_tol=relative * 1e-3)
            if not same:
                return f"{column} is {row[column]!r} instead of {value!r} in {json.dumps(wanted)}"

    if not exact and name != "replay":
        reward, wanted_reward = (
            math.fsum(row["reward"] for row in curve[-10:]) / 10 for curve in (rows, expected)
        )
        if not abs(reward - wanted_reward) <= 0.15:
            return f"the last ten rewards have the mean {reward} instead of {wanted_reward}"
    return ""


def figures(names: Sequence[str], folder: Path, steps: int) -> dict[str, list[Row]]:
    """The rows of each curve, computed now by child processes with the fixed arithmetic.

    `steps` is the length of a training run. Its learning rate is constant: a shorter run is a
    longer one's beginning.
    """
    curves: dict[str, list[Row]] = {}
    in_one_process = [name for name in names if name != "quickstart"]
    if in_one_process:
        _python(__file__, "_compute", folder, steps, *in_one_process)
        for name in in_one_process:
            curves[name] = _read_rows(folder / f"{name}.jsonl")

    if "quickstart" in names:
        base = folder / "base"
        _python(ROOT / "tools/make_tiny_model.py", "--out", base)
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
        overrides = {"data.heldout": f"{base}/heldout.jsonl", "data.train": f"{base}/train.jsonl"}
        run_dir = folder / "quickstart"
        _python(*launcher, *_train_command(run_dir, base, steps, overrides))
        curves["quickstart"] = _trained_rows(run_dir)
    return {name: curves[name] for name in names}


def _compute(folder: Path, steps: int, names: Sequence[str]) -> None:
    """Writes the rows of `replay` and `tiny`, each from a fork of this process.

    A fork begins where a new interpreter would be after seconds of imports: nothing of one curve
    is left when the next one begins.
    """
    import megatron_real.job  # noqa: F401

    for name in names:
        process = multiprocessing.get_context("fork").Process(
            target={"replay": _compute_replay, "tiny": _compute_tiny}[name], args=(folder, steps)
        )
        process.start()
        process.join()
        if process.exitcode != 0:
            sys.exit(f"{name} ended with {process.exitcode}")


def _compute_replay(folder: Path, _: int) -> None:
    _write_rows(folder / "replay.jsonl", replay(folder / "replay"))


def _compute_tiny(folder: Path, steps: int) -> None:
    from megatron_real import cli

    base = folder / "tiny-base"
    tiny_base(base)
    run_dir = folder / "tiny"
    overrides = {name: str(value).replace("BASE", str(base)) for name, value in TINY.items()}
    code = cli.main(_train_command(run_dir, base, steps, overrides)[2:])
    if code != 0:
        sys.exit(code)
    _write_rows(folder / "tiny.jsonl", _trained_rows(run_dir))


def _write_rows(file: Path, rows: Iterable[Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _train_command(
    run_dir: Path, base: Path, steps: int, overrides: Mapping[str, Any]
) -> list[str]:
    """The command line of a training by the quickstart's configuration with some overrides."""
    settings = {
        "trainer.run_dir": run_dir,
        "model.path": base,
        "trainer.steps": steps,
        "trainer.tensorboard": "false",
        "trainer.export": "false",
        "checkpoint.every": 0,
    }
    command = ["-m", "megatron_real", "train", str(ROOT / "examples/configs/quickstart.yaml")]
    return [*command, *(f"{name}={value}" for name, value in {**settings, **overrides}.items())]


def _trained_rows(run_dir: Path) -> list[Row]:
    return [
        {
            "step": row["step"],
            "loss": row["loss"],
            "grad_norm": row["grad_norm"],
            "reward": row["reward_mean"],
        }
        for row in _read_rows(run_dir / "metrics.jsonl")
    ]


def _python(*arguments: object) -> None:
    """Runs a Python command line in the fixed arithmetic; it must succeed."""
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    environment = os.environ | FIXED | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-5000:]}")


# ---- tiny: a random model learns to end its answer in time and to begin it with a high digit ----

TINY = {
    "data.train": "BASE/train.jsonl",
    "data.heldout": "",
    "labels.verifier": "BASE/verifier.py:judge",
    "rollout.num_prompts": 16,
    "rollout.chunk_prompts": 12,  # a second chunk that is smaller than the first
    "rollout.refill_rounds": 1,
    "batch.minibatch_prompts": 8,
    "batch.max_tokens": 512,  # several micro-batches
    "optimizer.lr": 4e-4,
}

VERIFIER = """
def judge(text, answers, metadata):
    return text[:1] in tuple("56789")
"""

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def tiny_base(path: Path) -> None:
    """The random model, its tokenizer, prompts and verifier."""
    import make_tiny_model

    vocabulary = make_tiny_model.WORDS
    end = vocabulary.index("<|end|>")
    random_model(path, "float32", vocab_size=len(vocabulary), eos_token_id=end, **SIZES)
    make_tiny_model.new_tokenizer().save_pretrained(path)
    draw = random.Random(2)
    pairs = [(draw.randrange(10, 100), draw.randrange(10, 100)) for _ in range(200)]
    make_tiny_model.write_rows(path / "train.jsonl", make_tiny_model.rows_of(pairs, "train"))
    (path / "verifier.py").write_text(VERIFIER)


def random_model(path: Path, dtype: str, **sizes: Any) -> None:
    """A Qwen2 whose every weight is a multiple of 2^-20 drawn by Python's generator:
    exact in every dtype used here.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(bos_token_id=None, **({"eos_token_id": None} | sizes))
    model = Qwen2ForCausalLM(config).to(getattr(torch, dtype))
    draw = random.Random(1)
    # By name: the order of the modules is transformers' own, and may change with its version.
    for name, parameter in sorted(model.named_parameters()):
        values = [draw.randrange(-(2**18), 2**18) / 2**20 for _ in range(parameter.numel())]
        parameter.data = torch.tensor(values, dtype=parameter.dtype).view_as(parameter)
        # A norm's scale around 1, as trained ones are: around 0 it would silence its layer.
        if "norm" in name:
            parameter.data += 1.0
    model.save_pretrained(path)


# ---- replay: fixed rollouts through the policy in float64 ----

STEPS = 10
GROUPS = 6
SAMPLES = 4
VOCABULARY = 41
LEARNING_RATE = 0.01

VARIANTS: tuple[dict[str, str], ...] = (
    {"variant": "anchored", "one_class_groups": "skip"},
    {"variant": "anchored", "one_class_groups": "keep"},
    {"variant": "vanilla", "one_class_groups": "skip"},
    {"variant": "bce", "one_class_groups": "skip"},
)


def replay(folder: Path) -> Iterator[Row]:
    """Loss and gradient norm of every minibatch, for each variant from the same weights."""
    from megatron_real.parallel.groups import join_world
    from megatron_real.runs.rollouts import read_rollouts, write_rollouts

    join_world(timeout_minutes=5.0)
    base = folder / "base"
    random_model(base, "float64", vocab_size=VOCABULARY, **SIZES)
    # By way of the files that rollout.replay reads: what they lose would be lost here.
    for step in range(1, STEPS + 1):
        write_rollouts(folder / f"step-{step}.parquet", fixed_rollouts(step), step=step)
    steps = [read_rollouts(folder / f"step-{step}.parquet") for step in range(1, STEPS + 1)]
    for objective in VARIANTS:
        for step, minibatch, loss, grad_norm in _passes(base, objective, steps):
            place = {"step": step, "minibatch": minibatch}
            yield {**objective, **place, "loss": loss, "grad_norm": grad_norm}


def _passes(
    base: Path, objective: dict[str, str], steps: Sequence[Any]
) -> Iterator[tuple[int, int, float, float]]:
    """(step, minibatch, loss, gradient norm) of every minibatch."""
    from megatron_real import config as configuration
    from megatron_real.objective import make_objective
    from megatron_real.parallel.groups import set_up
    from megatron_real.policy.policy import Policy, PolicySettings
    from megatron_real.weights.architecture import Architecture
    from megatron_real.weights.hf import HfWeights

    config = configuration.Config(
        model=configuration.ModelConfig(path=str(base), dtype="fp64"),
        data=configuration.DataConfig(max_prompt_tokens=16),
        rollout=configuration.RolloutConfig(
            num_prompts=GROUPS, group_size=SAMPLES, temperature=0.7, max_response_tokens=24
        ),
        batch=configuration.BatchConfig(minibatch_prompts=GROUPS // 2, max_tokens=64),
        objective=make_objective("real", tau=0.5, **objective),
    )
    groups = set_up(config.parallel)
    policy = Policy(
        PolicySettings.of(config),
        Architecture.read(base),
        HfWeights(base),
        groups,
        num_updates=2 * STEPS,
    )
    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    for step, rollouts in enumerate(steps, 1):
        for number, batch in enumerate(policy.prepare(rollouts), 1):
            loss = policy.gradient(batch).loss
            # Exactly rounded, in whatever order the parameters come.
            squares = math.fsum(float((p.main_grad**2).sum()) for p in parameters)
            yield step, number, loss, math.sqrt(squares)
            for parameter in parameters:
                parameter.data -= LEARNING_RATE * parameter.main_grad


def fixed_rollouts(step: int) -> list[Any]:
    """Groups of unequal lengths: mixed, of one class, with excluded rollouts, wholly excluded,
    with an empty one.
    """
    from megatron_real.records import Completion, Label, Prompt, Rollout, Status, Verdict

    draw = random.Random(step)
    labels = [
        (1, 0, 1, 0),
        (1, 1, 1, 1),
        (1, -1, 0, 0),
        (0, 0, 1, 0),
        (-1, -1, -1, -1),
        (0, 1, 1, 1),
    ]
    rollouts = []
    for group in range(GROUPS):
        prompt_ids = tuple(draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 16)))
        prompt = Prompt(f"fixed/{group}", "", prompt_ids, ("",))
        for sample, label in enumerate(labels[(group + step) % GROUPS]):
            # One completion of each step is empty.
            length = 0
            if not (group == step % GROUPS and sample == 3):
                length = draw.randrange(1, 24)
            ids = tuple(draw.randrange(VOCABULARY) for _ in range(length))
            completion = Completion(ids, (-3.0,) * length, "", finished=True)
            status = Status.WRONG
            if label == 1:
                status = Status.OK
            verdict = Verdict(status, Label(label), float(label == 1))
            rollouts.append(Rollout(prompt, group, sample, completion, verdict))
    return rollouts


if __name__ == "__main__":
    if sys.argv[1:2] == ["_compute"]:
        _compute(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(main())
