"""`megatron-real convert`: HF weights to a Megatron checkpoint and back, comparing and describing them.

    megatron-real convert to-megatron HF_DIR OUT          megatron-real convert verify A [B] [--logits]
    megatron-real convert to-hf CKPT OUT                  megatron-real convert inspect DIR

Only the command line is here: arguments, progress, summary. The work is in megatron_real/weights/.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_real.weights import WeightsError
from megatron_real.weights.stored import stored_dtype
from megatron_real.weights.transfer import Limits

_DTYPES = ("keep", "bf16", "fp16", "fp32")


def add_commands(commands: Any) -> None:
    """Adds `convert` and its commands to an argparse subparsers object."""
    convert = commands.add_parser("convert", help="HF weights <-> Megatron checkpoints", description=__doc__)
    convert.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = convert.add_subparsers(dest="conversion", required=True)

    forth = kinds.add_parser("to-megatron", help="HF directory -> Megatron checkpoint")
    forth.add_argument("source", metavar="HF_DIR", type=Path, help="safetensors or pytorch_model.bin, with config.json")
    forth.add_argument("--tp-chunks", type=int, default=1, metavar="N", help="chunks a split tensor is cut into")
    forth.add_argument("--format", choices=("torch_dist", "torch"), default="torch_dist", help="torch fixes a layout")
    forth.add_argument("--tp", type=int, default=1, help="tensor parallel size, of format torch")
    forth.add_argument("--pp", type=int, default=1, help="pipeline stages, of format torch")
    forth.add_argument("--layers", choices=("te", "local"), default="te", help="parameter names, of format torch")
    _add_writing(forth)

    back = kinds.add_parser("to-hf", help="Megatron checkpoint -> HF directory")
    back.add_argument("source", metavar="CKPT", type=Path, help="checkpoint, or directory with one; any layout")
    back.add_argument("--hf-config", type=Path, metavar="DIR", help="config.json and tokenizer; default: recorded ones")
    back.add_argument("--max-shard-size", type=size_of, metavar="SIZE", help="default: the source's files, else 5GB")
    _add_writing(back)

    verify = kinds.add_parser("verify", help="check one directory, or compare two")
    verify.add_argument("a", metavar="A", type=Path, help="HF directory or Megatron checkpoint")
    verify.add_argument("b", metavar="B", type=Path, nargs="?", help="another one")
    verify.add_argument("--hf-config", type=Path, metavar="DIR", help="config.json of Megatron checkpoints")
    verify.add_argument("--atol", type=float, default=0.0, help="difference that is allowed; 0 asks for equal bits")
    verify.add_argument("--logits", action="store_true", help="our fp32 logits of A against transformers' of B (or A)")
    _add_output(verify)

    inspect = kinds.add_parser("inspect", help="say what a directory of weights is")
    inspect.add_argument("directory", metavar="DIR", type=Path, help="HF directory or Megatron checkpoint")
    inspect.add_argument("--hf-config", type=Path, metavar="DIR", help="config.json of a Megatron checkpoint")
    _add_output(inspect)


def run(chosen: argparse.Namespace) -> int:
    """Runs one command; returns the exit code: 0 done, 1 verify found a problem, 2 the input was refused."""
    commands = {"to-megatron": _to_megatron, "to-hf": _to_hf, "verify": _verify, "inspect": _inspect}
    try:
        return commands[chosen.conversion](chosen)
    except WeightsError as error:
        print(f"megatron-real: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("megatron-real: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130


def size_of(text: str) -> int:
    """`5GB` or `1GiB` in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB or 512MiB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to make")
    parser.add_argument("--dtype", choices=_DTYPES, default="keep", help="of all tensors; keep: as they are")
    parser.add_argument("--workers", type=int, default=2, help="threads that copy")
    parser.add_argument("--max-memory", type=size_of, default="1GiB", metavar="SIZE", help="limit of all buffers")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on standard output")


def _to_megatron(chosen: argparse.Namespace) -> int:
    from megatron_real.weights.conversion import LegacyLayout, hf_to_megatron

    if chosen.format == "torch_dist" and (chosen.tp, chosen.pp) != (1, 1):
        raise WeightsError("--tp and --pp are of --format torch; torch_dist loads into any layout without them")
    if chosen.format == "torch_dist" and chosen.layers != "te":
        raise WeightsError("--layers is of --format torch; torch_dist has one set of names")
    if chosen.format == "torch" and chosen.tp_chunks != 1:
        raise WeightsError("--tp-chunks is of --format torch_dist; torch cuts its tensors by --tp")
    layout = LegacyLayout(chosen.tp, chosen.pp, chosen.layers) if chosen.format == "torch" else None
    return _convert(chosen, hf_to_megatron, tp_chunks=chosen.tp_chunks, layout=layout)


def _to_hf(chosen: argparse.Namespace) -> int:
    from megatron_real.weights.conversion import megatron_to_hf

    return _convert(chosen, megatron_to_hf, hf_config=chosen.hf_config, max_shard_bytes=chosen.max_shard_size)


def _convert(chosen: argparse.Namespace, conversion: Any, **options: Any) -> int:
    if chosen.workers < 1:
        raise WeightsError(f"--workers is {chosen.workers}; it must be at least 1")
    if chosen.dtype != "keep" or chosen.conversion == "to-megatron":
        import torch

        torch.set_num_threads(1)  # the copying threads are the parallelism
    started = time.perf_counter()
    with progress_bar(f"{chosen.source} -> {chosen.out}") as progress:
        done = conversion(
            chosen.source,
            chosen.out,
            dtype=None if chosen.dtype == "keep" else stored_dtype(chosen.dtype),
            limits=Limits(chosen.workers, chosen.max_memory),
            overwrite=chosen.overwrite,
            progress=progress,
            **options,
        )
    seconds = time.perf_counter() - started
    summary = {
        "out": str(done.out),
        "bytes": done.num_bytes,
        "resumed_bytes": done.resumed_bytes,
        "tensors": done.tensors,
        "dtype": done.dtype,
        "seconds": round(seconds, 3),
        "bytes_per_second": round((done.num_bytes - done.resumed_bytes) / seconds),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    resumed = f", {done.resumed_bytes / 1e9:.2f} GB of them already there" if done.resumed_bytes else ""
    _say(
        chosen,
        summary,
        f"{done.out}: {done.num_bytes / 1e9:.2f} GB of {done.dtype} weights in {seconds:.1f} s{resumed} "
        f"({summary['bytes_per_second'] / 1e9:.2f} GB/s), peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB",
    )
    return 0


def _verify(chosen: argparse.Namespace) -> int:
    from megatron_real.weights.verify import open_as_hf, verify

    a = open_as_hf(chosen.a, chosen.hf_config)
    b = open_as_hf(chosen.b, chosen.hf_config) if chosen.b else None
    with progress_bar(f"verifying {chosen.a}") as progress:
        report = verify(a, b, atol=chosen.atol, progress=progress)
    summary = dict(vars(report))
    compared = f"{report.identical} equal bit by bit, " if b else ""
    text = f"{report.tensors} tensors, {report.num_bytes / 1e9:.2f} GB: {compared}{report.nans} NaN values"
    if report.max_abs_difference:
        text += f"; largest difference {report.max_abs_difference:.3g} at {report.worst}"
    if chosen.logits and not report.problems:
        parity = _logits(chosen, a.config, b.directory if b and b.kind == "HF" else None)
        summary["logits"] = vars(parity)
        text += (
            f"; logits of {parity.tokens} tokens differ by at most {parity.max_abs_difference:.2g}, "
            f"{parity.equal_argmax} of {parity.tokens} with the same argmax"
        )
        if not parity.same_model:
            report.problems.append("the logits differ: this is not the same model")
    _say(chosen, summary, text)
    for problem in report.problems[:20]:
        print(f"megatron-real: {problem}", file=sys.stderr)
    return 1 if report.problems else 0


def _logits(chosen: argparse.Namespace, config: Path, other: Path | None) -> Any:
    from megatron_real.policy.parity import compare_logits
    from megatron_real.weights.architecture import Architecture
    from megatron_real.weights.conversion import open_megatron
    from megatron_real.weights.hf import HfWeights
    from megatron_real.weights.verify import is_hf

    reference = other or (chosen.a if is_hf(chosen.a) else None)
    if reference is None:
        raise WeightsError("--logits needs an HF directory to compare with; give it as B")
    weights = HfWeights(chosen.a) if is_hf(chosen.a) else open_megatron(chosen.a, Architecture.read(config))
    return compare_logits(reference, weights)


def _inspect(chosen: argparse.Namespace) -> int:
    from megatron_real.weights.inspection import describe

    found = describe(chosen.directory, chosen.hf_config)
    _say(chosen, found, "\n".join(f"{key:<14} {_words(value)}" for key, value in found.items()))
    return 0


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _say(chosen: argparse.Namespace, summary: dict[str, Any], text: str) -> None:
    print(json.dumps(summary) if chosen.json else text)


@contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A bar with bytes, rate and time left on a terminal; elsewhere a line every ten seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    said = time.monotonic()
    done = 0
    with Progress(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def advance(num_bytes: int, total: int) -> None:
            nonlocal said, done
            done += num_bytes
            bar.update(task, advance=num_bytes, total=total)
            if not console.is_terminal and time.monotonic() - said > 10:
                said = time.monotonic()
                print(f"{title}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr)

        yield advance
