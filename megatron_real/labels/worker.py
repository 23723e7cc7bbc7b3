"""A verifier process: one JSON request per line in, one JSON answer per line out. Started by pool.py.

    python -m megatron_real.labels.worker VERIFIER MEMORY_MIB

Whatever a completion makes the verifier do stays in here: the memory limit is this process's, the wall clock is the
parent's, and the protocol has no pickle. Imports neither torch nor megatron.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import sys

from megatron_real.labels import verifiers

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    name, memory_mib = sys.argv[1], int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a terminal and Slurm signal whole trees
        signal.signal(number, signal.SIG_IGN)  # it is the parent's to handle
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a verifier prints must not end up in the protocol
    logging.disable(logging.WARNING)  # math-verify warns at each call that its own timeouts are off
    verify = verifiers.load(name)
    if name in verifiers.NAMES:
        verify("\\boxed{1}", ["1"], {"source_dataset": "chain_sum"})  # imports what it needs before the clock runs
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        status, reward = verify(request["text"], request["answers"], request["metadata"])
        print(json.dumps([status, reward]), file=answers, flush=True)


if __name__ == "__main__":
    main()
