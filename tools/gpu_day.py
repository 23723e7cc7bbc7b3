"""Everything that needs a GPU to be known, on one GPU, in a given time: checks,
benchmarks and a short training.

    # one GPU
    python tools/gpu_day.py --minutes 8 --out gpu-day
    # a machine without megatron-core: see below
    python tools/gpu_day.py --minutes 8 --wheels wheels/
    # no GPU: tiny sizes on the CPU, to see that it runs
    python tools/gpu_day.py --rehearse
    megatron-real plan my.yaml --gpus 8 --rates gpu-day/gpu-day.json

    stage     what it shows
    kernels   the log-prob head's Triton kernels and fp32 sums against torch's operators and float64
    parity    loss and gradients of a minibatch against the equation in float64, by local layers and
              TransformerEngine's
    head      time and memory of log-probs at the shapes of the 7B and 1.5B models, against naive,
              megatron-core's, Liger's
    step-1.5b seconds and MFU of an update at the shape of the 1.5B model; its peak of memory beside
              the plan's
    step-7b   the same with as many layers of the 7B model as fit
    training  a short run, interrupted and resumed: it must end as one that was not
    save      how long a save keeps the training waiting
    sync      weight sync to vLLM, where it is installed

Each stage is a process of its own, so that an error in one (which may end the GPU's context) costs
no other. They run in this order, as far as the time goes; what was left out is said. gpu-day.json
is written anew after each stage, gpu-day.md at the end, in the form of docs/benchmarks.md.

Nothing is downloaded. It needs torch, triton, transformers and safetensors from the machine;
`--wheels DIR` unpacks the wheels that were carried along (megatron-core, omegaconf,
antlr4-python3-runtime and what else is missing) into a temporary folder that only these processes
see.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

STAGES = {
    "kernels": 60,
    "parity": 60,
    "head": 90,
    "step-1.5b": 90,
    "step-7b": 90,
    "training": 60,
    "save": 45,
    "sync": 60,
}
"""Stages in their order, and the seconds without which one is not begun: a guess,
never measured.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all stages")
    parser.add_argument("--out", type=Path, default=Path("gpu-day"), help="folder of the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this machine lacks")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="these stages alone")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, without a GPU")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes:g}; it must be above 0")
    if options.wheels and not list(options.wheels.glob("*.whl")):
        parser.error(f"--wheels {options.wheels} has no .whl file")

    ends = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"rehearsed_on_a_cpu": options.rehearse, "stages": {}}
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environment = _environment(options.wheels, scratch / "packages")
        for name, seconds in STAGES.items():
            if options.only and name not in options.only:
                continue
            results["stages"][name] = _run(
                name, seconds, ends, options.rehearse, scratch, environment
            )
            # After each: a machine may be taken away at any time, and what was measured counts.
            _write(options.out / "gpu-day.json", results)
    (options.out / "gpu-day.md").write_text(markdown(results), encoding="utf-8")
    print(f"gpu_day: {options.out / 'gpu-day.md'}")
    return int(any(stage["status"] == "failed" for stage in results["stages"].values()))


def _environment(wheels: Path | None, packages: Path) -> dict[str, str]:
    """The stages' environment: this checkout and the unpacked wheels, and no network."""
    # This checkout before what is installed: it is what the day is about.
    paths = [str(ROOT)]
    if wheels:
        # Unpacked rather than installed: the machine's own packages must stay as they are.
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(packages)
        paths.append(str(packages))
    if before := os.environ.get("PYTHONPATH"):
        paths.append(before)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _run(
    name: str,
    needed: float,
    ends: float,
    rehearse: bool,
    scratch: Path,
    environment: dict[str, str],
) -> dict[str, Any]:
    """Runs a stage and returns its status, seconds and figures."""
    left = ends - time.monotonic()
    if rehearse:
        needed = 1  # the sizes are tiny
    if left < needed:
        print(f"gpu_day: {name}: left out, {left:.0f} s are left", flush=True)
        return {"status": "left out", "reason": f"{left:.0f} s were left of --minutes"}

    print(f"gpu_day: {name} ...", flush=True)
    out = scratch / f"{name}.json"
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/gpu_stages.py"), name, str(out)]
    if rehearse:
        command.append("--rehearse")
        # The interpreter is slow: it runs the kernels' own stage, and torch's operators the others.
        environment = {**environment, "TRITON_INTERPRET": str(int(name == "kernels"))}

    began = time.monotonic()
    with (scratch / f"{name}.log").open("w+") as log:
        try:
            code = subprocess.run(
                command, env=environment, cwd=ROOT, stdout=log, stderr=log, timeout=left
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        log.seek(0)
        text = log.read()

    record: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
    if out.exists():  # a stage writes after each figure: what it had counts
        record |= json.loads(out.read_text(encoding="utf-8"))
    if code is None:
        record |= {"status": "failed", "reason": "the time was over before it ended"}
    elif code:
        record |= {"status": "failed", "reason": text.strip()[-3000:]}
    elif record.get("skipped"):
        record["status"] = "skipped"
    else:
        record["status"] = "done"
    print(f"gpu_day: {name}: {record['status']} in {record['seconds']} s", flush=True)
    return record


def _write(file: Path, results: dict[str, Any]) -> None:
    """Whole or not at all: a machine may be taken away at any time."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def markdown(results: dict[str, Any]) -> str:
    """Returns the results as a section of docs/benchmarks.md."""
    lines = ["## On a GPU", ""]
    if results["rehearsed_on_a_cpu"]:
        lines += ["**Rehearsed on a CPU with tiny sizes: no figure here says anything.**", ""]
    for name, stage in results["stages"].items():
        lines += [f"### {name}: {stage['status']}", ""]
        for key in ("skipped", "reason", "machine"):
            if text := stage.get(key):
                # The last line of a traceback is the error.
                lines += [str(text).splitlines()[-1], ""]
        if rows := stage.get("rows"):
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += [
                "| " + " | ".join(_cell(row.get(c, "")) for c in columns) + " |" for row in rows
            ]
            lines += [""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
