"""`megatron-real convert`: HF weights to a Megatron checkpoint and back, compared and described.

    megatron-real convert to-megatron HF_DIR OUT
    megatron-real convert to-hf CKPT OUT
    megatron-real convert verify A [B] [--logits]
    megatron-real convert inspect DIR

Only the command line is here: arguments, progress, summary. The work is in the package conversion.
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
from megatron_real.commands.terminal import hanging, input_checks, say
from megatron_real.config.locate import is_run_directory, weights_directory
from megatron_real.errors import INTERRUPTED, Refused
from megatron_real.runs.card import CARD, model_card
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.saved import saved
from megatron_real.weights import WeightsError
from megatron_real.weights.stored import stored_dtype
from megatron_real.weights.transfer import Limits

if TYPE_CHECKING:
    from megatron_real.conversion.verify import Opened
    from megatron_real.policy.parity import LogitParity

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

    # torch_dist loads into any layout. --tp, --pp and --layers are for torch, whose files fit one.
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
    """Runs one of the conversions.

    Returns:
        The exit code: 0 done, 1 verify found a problem, 2 the input was refused.
    """
    commands = {
        "to-megatron": _to_megatron,
        "to-hf": _to_hf,
        "verify": _verify,
        "inspect": _inspect,
    }

    try:
        with input_checks():
            return commands[options.conversion](options)
    # Before OSError, whose subclass it is.
    except BrokenPipeError:
        raise  # the reader of our output has left, which the command line knows how to end
    except OSError as error:  # a directory or file that this user may not read
        raise Refused(f"{error.filename}: {error.strerror}") from error
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where this one stopped")
        return INTERRUPTED


def size_of(text: str) -> int:
    """Returns `5GB` or `1GiB` in bytes.

    Raises:
        argparse.ArgumentTypeError: the text is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB or 512MiB")
    # No letter: the blank, whose power is 0.
    power = " KMGT".index(match[2].upper() or " ")
    base = 1000
    if match[3]:  # the i of GiB
        base = 1024
    return int(float(match[1]) * base**power)


def peak_memory_bytes() -> int:
    """Returns the most memory that this program has had resident.

    Of Linux's two figures this is the one of the address space. getrusage's ru_maxrss is passed on
    by exec, so that a large shell or launcher would be counted as ours.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            # The kernel counts in KiB here, although it writes kB.
            return int(line.split()[1]) * 1024
    return 0


def _add_writing(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of both conversions that write."""
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
    """Adds the argument that all of them have."""
    parser.add_argument(
        "--json", action="store_true", help="print the summary as JSON on standard output"
    )


def _to_megatron(options: argparse.Namespace) -> int:
    from megatron_real.conversion.convert import LegacyLayout, hf_to_megatron

    # A hub id that is in the cache stands for its directory.
    options.source = Path(weights_directory(str(options.source), "HF_DIR"))

    # Refused rather than ignored: whoever gives --tp expects that it matters.
    if options.format == "torch_dist" and (options.tp, options.pp) != (1, 1):
        raise WeightsError(
            "--tp and --pp are of --format torch; torch_dist loads into any layout without them"
        )
    if options.format == "torch_dist" and options.layers != "te":
        raise WeightsError("--layers is of --format torch; torch_dist has one set of names")
    if options.format == "torch" and options.tp_chunks != 1:
        raise WeightsError("--tp-chunks is of --format torch_dist; torch cuts its tensors by --tp")

    layout = None
    if options.format == "torch":
        layout = LegacyLayout(options.tp, options.pp, options.layers)
    return _convert(options, hf_to_megatron, tp_chunks=options.tp_chunks, layout=layout)


def _to_hf(options: argparse.Namespace) -> int:
    from megatron_real.conversion.convert import megatron_to_hf

    options.source = checkpoint_of_run(options.source)
    hf_config = options.hf_config or hf_config_of(options.source)

    # A run's checkpoint gets a model card, as the run's own export has one; which packages trained
    # is not recorded. A checkpoint without a run has none.
    texts = {}
    # RUN/checkpoints/step_N: the run is two levels up.
    owner = RunDirectory(options.source.parent.parent)
    if is_run_directory(owner.path):
        for checkpoint in saved(owner.checkpoints):
            if checkpoint.path.name == options.source.name:
                texts[CARD] = model_card(owner, last_step=checkpoint.position.step)

    return _convert(
        options,
        megatron_to_hf,
        hf_config=hf_config,
        max_shard_bytes=options.max_shard_size,
        texts=texts,
    )


def _convert(options: argparse.Namespace, conversion: Any, **keywords: Any) -> int:
    """Runs a conversion with the arguments that both have, and prints what it did."""
    if options.workers < 1:
        raise WeightsError(f"--workers is {options.workers}; it must be at least 1")

    # A conversion that keeps dtypes reads back no tensor and needs no torch.
    if options.dtype != "keep" or options.conversion == "to-megatron":
        import torch

        torch.set_num_threads(1)  # the copying threads are the parallelism

    dtype = None
    if options.dtype != "keep":
        dtype = stored_dtype(options.dtype)

    started = time.perf_counter()
    with progress_bar(f"{options.source} -> {options.out}") as progress:
        done = conversion(
            options.source,
            options.out,
            dtype=dtype,
            limits=Limits(options.workers, options.max_memory),
            overwrite=options.overwrite,
            progress=progress,
            **keywords,
        )
    seconds = time.perf_counter() - started

    # Of what this run has copied: what was there already took no time.
    bytes_per_second = round((done.num_bytes - done.resumed_bytes) / seconds)
    peak_memory = peak_memory_bytes()
    if options.json:
        summary = {
            "out": str(done.out),
            "bytes": done.num_bytes,
            "resumed_bytes": done.resumed_bytes,
            "tensors": done.tensors,
            "dtype": done.dtype,
            "seconds": round(seconds, 3),
            "bytes_per_second": bytes_per_second,
            "peak_memory_bytes": peak_memory,
        }
        print(json.dumps(summary))
        return 0

    text = f"{done.out}: {amount(done.num_bytes)} of {done.dtype} weights in {seconds:.1f} s"
    if done.resumed_bytes:
        text += f", {amount(done.resumed_bytes)} of them already there"
    # The seconds of a small input are those of the start.
    if done.num_bytes >= 1e9:
        text += f" ({amount(bytes_per_second)}/s)"
    print(f"{text}, peak memory {peak_memory / 2**30:.2f} GiB")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from megatron_real.conversion.verify import open_as_hf, verify

    a = open_as_hf(*_weights_named(options.a, options.hf_config))
    b = None
    if options.b:
        b = open_as_hf(*_weights_named(options.b, options.hf_config))

    with progress_bar(f"verifying {options.a}") as progress:
        report = verify(a, b, atol=options.atol, progress=progress)

    summary = dict(vars(report))
    text = f"{report.tensors} tensors, {amount(report.num_bytes)}: "
    if b is not None:
        text += f"{report.identical} equal bit by bit, "
    text += f"{report.nans} NaN values"
    if report.max_abs_difference:
        text += f"; largest difference {report.max_abs_difference:.3g} at {report.worst}"

    # Only of tensors without a problem: logits of wrong weights say nothing more. Where the
    # descriptions differ, the logits show whether it matters.
    if options.logits and report.problems == report.descriptions:
        parity = _logits(a, b)
        summary["logits"] = vars(parity)
        text += (
            f"; logits of {parity.tokens} tokens differ by at most "
            f"{parity.max_abs_difference:.2g}, {parity.equal_argmax} of {parity.tokens} with the "
            f"same argmax"
        )
        if not parity.same_model:
            # Beside the bytes: equal tensors under another config.json are another model.
            report.problems.append("the logits differ: this is not the same model")

    if options.json:
        text = json.dumps(summary)
    print(text)
    # Twenty are enough: a wrong config.json may make one of every tensor.
    for problem in report.problems[:20]:
        say(problem)

    if report.problems:
        return 1
    return 0


def _weights_named(path: Path, hf_config: Path | None) -> tuple[Path, Path | None]:
    """Returns the weights that a word names, and the config of those that are a run's checkpoint.

    A run stands for its export, else for its newest checkpoint.
    """
    if is_run_directory(path):
        export = RunDirectory(path).weights
        if export.is_dir():
            path = export
        else:
            path = checkpoint_of_run(path)
    path = Path(weights_directory(str(path), "the directory"))
    return path, hf_config or hf_config_of(path)


def _logits(a: Opened, b: Opened | None) -> LogitParity:
    """Compares our logits of one side with transformers' of the other.

    Each model is built by its own config.json.
    """
    from megatron_real.policy.parity import compare_logits

    # transformers reads HF directories alone; our model reads both kinds.
    if b is not None and b.kind == "HF":
        ours = a
        theirs = b
    else:
        ours = b or a
        theirs = a

    if theirs.kind != "HF":
        raise WeightsError("--logits needs an HF directory to compare with; give it as B")
    return compare_logits(theirs.directory, ours.weights, ours.architecture)


def _inspect(options: argparse.Namespace) -> int:
    from megatron_real.conversion.inspection import describe

    description = describe(*_weights_named(options.directory, options.hf_config))
    if options.json:
        print(json.dumps(description))
        return 0
    for key, value in description.items():
        # 15: the key's 14 columns and a blank, below which later lines begin.
        print(hanging(f"{key:<14} {_readable(value)}", 15))
    return 0


def _readable(value: Any) -> str:
    """Returns a value of a description for people: numbers with commas, tables as lists."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(item)}" for key, item in value.items())
    # For Python a bool is an int, which would be shown as 1 or 0.
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def amount(num_bytes: float) -> str:
    """Returns bytes in the unit that suits them, 1.25 MB for example."""
    # Powers of ten, as disks and networks are sold.
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"


@contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """Yields a function that is called with (bytes done since the last call, bytes in all).

    It shows a bar with bytes, rate and time left on a terminal; elsewhere a line every ten seconds.
    """
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
    last_line = time.monotonic()
    done = 0

    with Progress(
        TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal
    ) as bar:
        # Not seen until the first byte has moved: a refusal comes before that.
        task = bar.add_task(title, total=None, visible=False)

        def advance(num_bytes: int, total: int) -> None:
            nonlocal last_line, done
            done += num_bytes
            bar.update(task, advance=num_bytes, total=total, visible=True)
            if not console.is_terminal and time.monotonic() - last_line > 10:
                last_line = time.monotonic()
                print(f"{title}: {amount(done)} of {amount(total)}", file=sys.stderr)

        yield advance
