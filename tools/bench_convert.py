"""Conversion beside `cp` of the same bytes, in one run: seconds of work and of the whole process,
memory, ratios.

    python tools/bench_convert.py --shape 1.5b
    # the source is a hole, so that only the copies take disk
    python tools/bench_convert.py --shape 7b --sparse
    python tools/bench_convert.py --peer "bridge=python their_script.py {hf} {out}"

Makes a synthetic model of the shape, then repeats cp, both conversions, both with a cast, and any
peers, each in a process of its own, and takes medians. `work` begins when Python and torch are
loaded and includes bringing the files to disk, so ratios are to a cp that does that too. Memory is
the anonymous memory of the process and its children, the most seen at 20 ms intervals.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from bench_machine import add_result_options, show

from megatron_real.weights.architecture import Architecture
from megatron_real.weights.hf import hf_files
from megatron_real.weights.mapping import hf_shapes

QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "tie_word_embeddings": False, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "num_hidden_layers": 28,
}  # fmt: skip
SHAPES = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
VOCABULARY = {"tiny": 1024, "1.5b": 151936, "7b": 152064}
BLOCK = 2**25
REFERENCE = "cp, to disk"


def main() -> None:
    parser = argparse.ArgumentParser(description="Times conversions beside cp.")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument(
        "--sparse", action="store_true", help="the source holds no data, only its length"
    )
    parser.add_argument(
        "--dir", type=Path, default=None, help="where to write; default: a temporary directory"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=COMMAND", help="with {hf} and {out}"
    )
    add_result_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        size = make_model(Path(name) / "hf", options.shape, sparse=options.sparse)
        rounds = measure(
            Path(name), options.rounds, dict(peer.split("=", 1) for peer in options.peer)
        )
    show(
        f"shape {options.shape}, {size / 1e9:.2f} GB bf16, medians of {options.rounds}",
        rows_of(rounds),
        options,
    )


def make_model(directory: Path, shape: str, *, sparse: bool) -> int:
    """Writes an HF directory of random bf16 weights; returns its bytes."""
    directory.mkdir()
    config = {**QWEN, **SHAPES[shape], "vocab_size": VOCABULARY[shape]}
    (directory / "config.json").write_text(json.dumps(config))
    architecture = Architecture.read(directory)
    files, index = hf_files(
        {name: ("BF16", shape) for name, shape in hf_shapes(architecture).items()}
    )
    if index is not None:
        (directory / "model.safetensors.index.json").write_bytes(index)
    for file in files:
        with open(directory / file.name, "wb") as stream:
            stream.write(file.header)
            if sparse:
                stream.truncate(file.size)
            else:
                _fill(stream, file.size - len(file.header))
    return sum(file.size for file in files)


def _fill(stream: BinaryIO, size: int) -> None:
    """Writes random numbers around 0, as weights are: the same block again and again."""
    import torch

    # Drawn once: a generator is slower than the disk, and no step looks at the values.
    block = (torch.randn(BLOCK // 2) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    for begin in range(0, size, len(block)):
        stream.write(block[: size - begin])


def measure(
    root: Path, rounds: int, peers: dict[str, str]
) -> dict[str, list[tuple[float, float, float]]]:
    """Name -> (work s, process s, GiB) of each round."""
    hf = root / "hf"
    megatron = root / "megatron"
    out = root / "out"
    convert = f"{sys.executable} -m megatron_real convert"
    commands = {
        "cp": f"cp -r --sparse=never {hf} {out}",
        REFERENCE: f"sh -c 'cp -r --sparse=never {hf} {out} && sync -f {out}'",
        "HF to Megatron": f"{convert} to-megatron {hf} {out} --json",
        "HF to Megatron, cast": f"{convert} to-megatron {hf} {out} --dtype fp16 --json",
        "Megatron to HF": f"{convert} to-hf {megatron} {out} --json",
        "Megatron to HF, cast": f"{convert} to-hf {megatron} {out} --dtype fp16 --json",
        **{name: command.format(hf=hf, out=out) for name, command in peers.items()},
    }
    run(f"{convert} to-megatron {hf} {megatron} --json")

    rounds_of: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            os.sync()  # what earlier commands left to be written, and blocks that they freed
            time.sleep(2)
            rounds_of[name].append(run(command))
            if name == "Megatron to HF":
                same = all(
                    filecmp.cmp(hf / file.name, file, shallow=False)
                    for file in out.glob("*.safetensors")
                )
                assert same, "the round trip must give the source's bytes"
            shutil.rmtree(out)
    return rounds_of


def run(command: str) -> tuple[float, float, float]:
    """Work s (the program's own word, else the process's), process s,
    and peak anonymous memory (GiB).
    """
    started = time.perf_counter()
    process = subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, text=True)
    # Seen from outside, since a peer is any program. Pages of files are not counted: the kernel
    # gives them up whenever somebody else needs the memory.
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    output = process.stdout.read()
    # A command that prints its own seconds leaves its imports out of them.
    work = seconds
    if output.startswith("{"):
        work = json.loads(output)["seconds"]
    return work, seconds, peak / 2**30


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process and its children."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0  # it ended meanwhile
    own = next(
        (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")),
        0,
    )
    return own + sum(anonymous_bytes(int(child)) for child in children)


def rows_of(rounds_of: dict[str, list[tuple[float, float, float]]]) -> list[dict[str, object]]:
    """A row for each program."""
    median = {
        name: [statistics.median(column) for column in zip(*rounds, strict=True)]
        for name, rounds in rounds_of.items()
    }
    reference = median[REFERENCE][0]
    return [
        {
            "program": name,
            "work s": round(work, 2),
            "process s": round(process, 2),
            "x cp": round(work / reference, 2),
            "process s over cp": round(process - reference, 2),
            "GiB": round(memory, 2),
        }
        for name, (work, process, memory) in median.items()
    ]


if __name__ == "__main__":
    main()
