"""A verifier process: one JSON request per line in, one JSON reply per line out. Started by pool.py.

    python -m megatron_real.labels.worker '{"verifier": "math_verify", "memory_mib": 1024, "require_think": false, ...}'

Whatever a completion makes the verifier do stays in here: the memory limit is this process's, the wall clock is the
parent's, the limit of processor time the kernel's, and the protocol has no pickle. Imports neither torch nor megatron.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_real.labels import verifiers

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MAX_REASON_CHARS = 200


def main() -> None:
    options = json.loads(sys.argv[1])
    name, limit = options["verifier"], options["memory_mib"] << 20
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a terminal and Slurm signal whole trees
        signal.signal(number, signal.SIG_IGN)  # it is the parent's to handle
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a verifier prints must not end up in the protocol
    logging.disable(logging.WARNING)  # math-verify warns at each call that its own timeouts are off
    try:
        verify = _load(name, options)
    except Exception as error:  # a user's file may raise anything
        _send(replies, error=_reason(error))
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    full = (limit + _address_space()) / 2
    _send(replies, error=None)
    for line in sys.stdin:
        request = json.loads(line)
        # Its signal, left at the default, ends this process, also in the middle of a C function.
        signal.setitimer(signal.ITIMER_PROF, request["processor_seconds"])
        reply = _reply(verify, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        # Caches of parsers grow: a fresh process must take over before an honest check meets the limit.
        last = _address_space() > full
        _send(replies, **reply, last=last)
        if last:
            return


def _load(name: str, options: dict[str, Any]) -> verifiers.Verifier:
    verify = verifiers.load(name, require_think=options["require_think"], require_boxed=options["require_boxed"])
    if name in verifiers.NAMES:
        # Imports what it needs, and builds the parsers' tables, before any clock runs.
        verify("</think>\\boxed{1}", ["2"], {"source_dataset": "chain_sum"})
    return verify


def _reply(verify: verifiers.Verifier, request: dict[str, Any]) -> dict[str, Any]:
    try:
        status, reward = verify(request["text"], request["answers"], request["metadata"])
    except Exception as error:  # whatever a verifier raises is one failed check
        return {"status": "crashed", "reward": None, "reason": _reason(error)}
    if reward is not None and not math.isfinite(reward):
        return {"status": "crashed", "reward": None, "reason": f"the verifier gave the reward {reward}"}
    return {"status": status, "reward": reward, "reason": ""}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:_MAX_REASON_CHARS]


def _address_space() -> int:
    """Bytes that count against RLIMIT_AS; 0 where the system does not tell, and does not enforce it either."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0


def _send(replies: Any, **fields: Any) -> None:
    print(json.dumps(fields), file=replies, flush=True)


if __name__ == "__main__":
    main()
