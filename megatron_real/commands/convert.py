"""`megatron-real convert`: HF weights to a Megatron checkpoint and back, comparing and describing them.

    megatron-real convert to-megatron HF_DIR OUT          megatron-real convert verify A [B] [--logits]
    megatron-real convert to-hf CKPT OUT                  megatron-real convert inspect DIR

Only the command line is here: arguments, progress, summary. The work is in megatron_real/weights/.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_real.commands.subject import checkpoint_of_run, hf_config_of
from megatron_real.commands.terminal import INTERRUPTED, REFUSED, hanging, refuse, say
from megatron_real.config.locate import is_run_directory, weights_directory
from megatron_real.runs.directory import RunDirectory
from megatron_real.weights import WeightsError
from megatron_real.weights.stored import stored_dtype
from megatron_real.weights.transfer import Limits

if TYPE_CHECKING:
    from megatron_real.policy.parity import LogitParity
    from megatron_real.weights.verify import Opened

SUMMARY = "convert, compare and describe weights: HF directories and Megatron checkpoints"
EXAMPLES = """\
examples:
  megatron-real convert to-megatron HF_DIR OUT
  megatron-real convert to-hf CHECKPOINT OUT
  megatron-real convert verify HF_DIR OUT --logits
  megatron-real convert inspect DIR

exit codes: 0 done, 1 verify found a problem, 2 the input was refused
"""

_DTYPES = ("keep", "bf16", "fp16", "fp32")


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    kinds = parser.add_subparsers(dest="conversion", required=True)

    forth = kinds.add_parser("to-megatron", help="HF directory -> Megatron checkpoint")
    forth.add_argument(
        "source",
        metavar="HF_DIR",
        type=Path,
        help="safetensors or pytorch_model.bin, with config.json",
    )
    forth.add_argument(
        "--tp-chunks", type=int, default=1, metavar="N", help="chunks a split tensor is cut into"
    )
    forth.add_argument(
        "--format",
        choices=("torch_dist", "torch"),
        default="torch_dist",
        help="torch fixes a layout",
    )
    forth.add_argument("--tp", type=int, default=1, help="tensor parallel size, of format torch")
    forth.add_argument("--pp", type=int, default=1, help="pipeline stages, of format torch")
    forth.add_argument(
        "--layers", choices=("te", "local"), default="te", help="parameter names, of format torch"
    )
    _add_writing(forth)

    back = kinds.add_parser("to-hf", help="Megatron checkpoint -> HF directory")
    back.add_argument(
        "source", metavar="CKPT", type=Path, help="checkpoint, or directory with one; any layout"
    )
    back.add_argument(
        "--hf-config",
        type=Path,
        metavar="DIR",
        help="config.json and tokenizer; default: recorded ones",
    )
    back.add_argument(
        "--max-shard-size",
        type=size_of,
        metavar="SIZE",
        help="default: the source's files, else 5GB",
    )
    _add_writing(back)

    verify = kinds.add_parser("verify", help="check one directory, or compare two")
    verify.add_argument("a", metavar="A", type=Path, help="HF directory or Megatron checkpoint")
    verify.add_argument("b", metavar="B", type=Path, nargs="?", help="another one")
    verify.add_argument(
        "--hf-config", type=Path, metavar="DIR", help="config.json of Megatron checkpoints"
    )
    verify.add_argument(
        "--atol", type=float, default=0.0, help="difference that is allowed; 0 asks for equal bits"
    )
    verify.add_argument(
        "--logits",
        action="store_true",
        help="our fp32 logits of one side against transformers' of the other",
    )
    _add_output(verify)

    inspect = kinds.add_parser("inspect", help="say what a directory of weights is")
    inspect.add_argument(
        "directory", metavar="DIR", type=Path, help="HF directory or Megatron checkpoint"
    )
    inspect.add_argument(
        "--hf-config", type=Path, metavar="DIR", help="config.json of a Megatron checkpoint"
    )
    _add_output(inspect)


def run(options: argparse.Namespace) -> int:
    """Runs one command; returns the exit code: 0 done, 1 verify found a problem, 2 the input was refused."""
    commands = {
        "to-megatron": _to_megatron,
        "to-hf": _to_hf,
        "verify": _verify,
        "inspect": _inspect,
    }
    try:
        return commands[options.conversion](options)
    except ValueError as error:
        return refuse(error)
    except BrokenPipeError:
        raise
    except OSError as error:  # a directory or file that this user may not read
        say(f"{error.filename}: {error.strerror}")
        return REFUSED
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where this one stopped")
        return INTERRUPTED


def size_of(text: str) -> int:
    """`5GB` or `1GiB` in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB or 512MiB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def peak_memory_bytes() -> int:
    """Most memory that this program has had resident.

    Of Linux's two figures this is the one of the address space. getrusage's ru_maxrss is passed on
    by exec, so that a large shell or launcher would be counted as ours.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to make")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="keep", help="of all tensors; keep: as they are"
    )
    parser.add_argument("--workers", type=int, default=2, help="threads that copy")
    parser.add_argument(
        "--max-memory", type=size_of, default="1GiB", metavar="SIZE", help="limit of all buffers"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print the summary as JSON on standard output"
    )


def _to_megatron(options: argparse.Namespace) -> int:
    from megatron_real.weights.conversion import LegacyLayout, hf_to_megatron

    options.source = Path(weights_directory(str(options.source), "HF_DIR"))
    if options.format == "torch_dist" and (options.tp, options.pp) != (1, 1):
        raise WeightsError(
            "--tp and --pp are of --format torch; torch_dist loads into any layout without them"
        )
    if options.format == "torch_dist" and options.layers != "te":
        raise WeightsError("--layers is of --format torch; torch_dist has one set of names")
    if options.format == "torch" and options.tp_chunks != 1:
        raise WeightsError("--tp-chunks is of --format torch_dist; torch cuts its tensors by --tp")
    layout = (
        LegacyLayout(options.tp, options.pp, options.layers) if options.format == "torch" else None
    )
    return _convert(options, hf_to_megatron, tp_chunks=options.tp_chunks, layout=layout)


def _to_hf(options: argparse.Namespace) -> int:
    from megatron_real.weights.conversion import megatron_to_hf

    options.source = checkpoint_of_run(options.source)
    hf_config = options.hf_config or hf_config_of(options.source)
    return _convert(
        options, megatron_to_hf, hf_config=hf_config, max_shard_bytes=options.max_shard_size
    )


def _convert(options: argparse.Namespace, conversion: Any, **keywords: Any) -> int:
    if options.workers < 1:
        raise WeightsError(f"--workers is {options.workers}; it must be at least 1")
    if options.dtype != "keep" or options.conversion == "to-megatron":
        import torch

        torch.set_num_threads(1)  # the copying threads are the parallelism
    started = time.perf_counter()
    with progress_bar(f"{options.source} -> {options.out}") as progress:
        done = conversion(
            options.source,
            options.out,
            dtype=None if options.dtype == "keep" else stored_dtype(options.dtype),
            limits=Limits(options.workers, options.max_memory),
            overwrite=options.overwrite,
            progress=progress,
            **keywords,
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
        "peak_memory_bytes": peak_memory_bytes(),
    }
    resumed = f", {amount(done.resumed_bytes)} of them already there" if done.resumed_bytes else ""
    # The seconds of a small input are those of the start.
    rate = f" ({amount(summary['bytes_per_second'])}/s)" if done.num_bytes >= 1e9 else ""
    _say(
        options,
        summary,
        f"{done.out}: {amount(done.num_bytes)} of {done.dtype} weights in {seconds:.1f} s{resumed}{rate}, "
        f"peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB",
    )
    return 0


def _verify(options: argparse.Namespace) -> int:
    from megatron_real.weights.verify import open_as_hf, verify

    a = open_as_hf(*_weights_named(options.a, options.hf_config))
    b = open_as_hf(*_weights_named(options.b, options.hf_config)) if options.b else None
    with progress_bar(f"verifying {options.a}") as progress:
        report = verify(a, b, atol=options.atol, progress=progress)
    summary = dict(vars(report))
    compared = f"{report.identical} equal bit by bit, " if b else ""
    text = (
        f"{report.tensors} tensors, {amount(report.num_bytes)}: {compared}{report.nans} NaN values"
    )
    if report.max_abs_difference:
        text += f"; largest difference {report.max_abs_difference:.3g} at {report.worst}"
    if options.logits and report.problems == report.descriptions:
        parity = _logits(a, b)
        summary["logits"] = vars(parity)
        text += (
            f"; logits of {parity.tokens} tokens differ by at most {parity.max_abs_difference:.2g}, "
            f"{parity.equal_argmax} of {parity.tokens} with the same argmax"
        )
        if not parity.same_model:
            report.problems.append("the logits differ: this is not the same model")
    _say(options, summary, text)
    for problem in report.problems[:20]:
        say(problem)
    return 1 if report.problems else 0


def _weights_named(path: Path, hf_config: Path | None) -> tuple[Path, Path | None]:
    """The weights of a word, and the config of those that are a run's checkpoint.

    A run stands for its export, else for its newest checkpoint.
    """
    if is_run_directory(path):
        export = RunDirectory(path).weights
        path = export if export.is_dir() else checkpoint_of_run(path)
    path = Path(weights_directory(str(path), "the directory"))
    return path, hf_config or hf_config_of(path)


def _logits(a: Opened, b: Opened | None) -> LogitParity:
    """Our logits of one side against transformers' of the other, each built by its own config.json."""
    from megatron_real.policy.parity import compare_logits

    if b is not None and b.kind == "HF":
        ours, theirs = a, b
    else:
        ours, theirs = b or a, a
    if theirs.kind != "HF":
        raise WeightsError("--logits needs an HF directory to compare with; give it as B")
    return compare_logits(theirs.directory, ours.weights, ours.architecture)


def _inspect(options: argparse.Namespace) -> int:
    from megatron_real.weights.inspection import describe

    found = describe(*_weights_named(options.directory, options.hf_config))
    _say(
        options,
        found,
        "\n".join(hanging(f"{key:<14} {_words(value)}", 15) for key, value in found.items()),
    )
    return 0


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _say(options: argparse.Namespace, summary: dict[str, Any], text: str) -> None:
    print(json.dumps(summary) if options.json else text)


def amount(num_bytes: float) -> str:
    """Returns bytes in the unit that suits them, 1.25 MB for example."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"


@contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A bar with bytes, rate and time left on a terminal; elsewhere a line every ten seconds."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    said = time.monotonic()
    done = 0
    with Progress(
        TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=None, visible=False)  # until the first byte has moved

        def advance(num_bytes: int, total: int) -> None:
            nonlocal said, done
            done += num_bytes
            bar.update(task, advance=num_bytes, total=total, visible=True)
            if not console.is_terminal and time.monotonic() - said > 10:
                said = time.monotonic()
                print(f"{title}: {amount(done)} of {amount(total)}", file=sys.stderr)

        yield advance
