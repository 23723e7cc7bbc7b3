"""Starts the process that rehearses, and reads what it finds. Needs no torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence

from megatron_real.rehearsal.device import NoDevice, check_machine
from megatron_real.rehearsal.report import RankReport, Request


def rehearse(requests: Sequence[Request]) -> list[RankReport]:
    """Rehearses ranks, one after the other, in a process of their own.

    Raises:
        NoDevice: this machine cannot.
    """
    check_machine()
    words = [sys.executable, "-m", "megatron_real.rehearsal.worker"]
    text = json.dumps([dataclasses.asdict(request) for request in requests])
    process = subprocess.run(words, input=text, text=True, capture_output=True, check=False)
    lines = process.stdout.splitlines()
    if process.returncode or len(lines) != len(requests):
        last = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise NoDevice(last.removeprefix("megatron-real: "))
    return [RankReport.from_json(json.loads(line)) for line in lines]
