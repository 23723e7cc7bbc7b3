"""Starts the processes that rehearse, and reads what they find. This module needs no torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence

from megatron_real import config as configuration
from megatron_real.rehearsal import transformer_engine
from megatron_real.rehearsal.device import NoDevice, check_machine
from megatron_real.rehearsal.report import RankReport, Request


def rehearse(requests: Sequence[Request]) -> list[RankReport]:
    """Rehearses ranks, one after the other, in a process of their own for each kind of layers.

    Raises:
        NoDevice: this machine cannot rehearse.
        ValueError: the configuration asks for TransformerEngine's layers, and its Python part is
            not here.
    """
    check_machine()
    kinds = [_layers(request) for request in requests]
    reports: dict[int, RankReport] = {}

    # megatron-core asks once, when it is imported, whether TransformerEngine is there.
    for kind in sorted(set(kinds)):
        numbers = [i for i, other in enumerate(kinds) if other == kind]
        explicit = [
            dataclasses.replace(
                requests[i], overrides=(*requests[i].overrides, f"model.layers={kind}")
            )
            for i in numbers
        ]
        command = [sys.executable, "-m", "megatron_real.rehearsal.worker", kind]
        text = json.dumps([dataclasses.asdict(request) for request in explicit])
        process = subprocess.run(command, input=text, text=True, capture_output=True, check=False)

        # A line for each request, or a sentence on the error stream.
        lines = process.stdout.splitlines()
        if process.returncode or len(lines) != len(explicit):
            last = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise NoDevice(last.removeprefix("megatron-real: "))
        for i, line in zip(numbers, lines, strict=True):
            reports[i] = RankReport.from_json(json.loads(line))

    # In the order of the requests, whichever process had them.
    return [reports[i] for i in range(len(requests))]


def _layers(request: Request) -> str:
    """Returns what model.layers means on a GPU: `te` or `local`.

    Raises:
        ValueError: it asks for `te`, and TransformerEngine's Python part is not here.
    """
    choice = configuration.load(request.config, request.overrides).model.layers
    has_te = transformer_engine.root() is not None
    if choice == "te" and not has_te:
        raise ValueError(
            "model.layers=te is rehearsed with TransformerEngine's Python part, which is not here; "
            "run `bash tools/te_python.sh`, or name its folder in TE_PYTHON, or set "
            "model.layers=local"
        )
    if choice == "auto" and has_te:
        return "te"
    if choice == "auto":
        return "local"
    return choice
