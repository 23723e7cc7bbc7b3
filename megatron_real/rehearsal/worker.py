"""The process that rehearses: reads requests, forks once for each, writes reports.

    python -m megatron_real.rehearsal.worker te|local < requests.json > reports.jsonl

A JSON list of requests comes on standard input; for each of them, in order, one line with its
report goes to standard output. Libraries are imported once (7 s); a fork has a fresh megatron-core,
whose parallel state can be set up only once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from megatron_real.rehearsal.report import RankReport, Request


def main() -> int:
    """Rehearses what standard input asks for, and writes the reports.

    Returns:
        The exit code: 0, whatever the rehearsals find; 2 where the device cannot be made.
    """
    from megatron_real.rehearsal import device

    requests = json.loads(sys.stdin.read())

    # Libraries print; the reports have the stream to themselves.
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    # Before the first import of torch.
    try:
        device.load()
    except device.NoDevice as error:
        print(f"megatron-real: {error}", file=sys.stderr)
        return 2

    import logging
    import warnings

    import torch

    # Forks follow, and a fork has none of its parent's pool of threads.
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)

    # Before megatron: it keeps functions of torch.distributed and asks torch.cuda when it is
    # imported.
    device.install(requests[0]["gpu"] if requests else "h100-80g")
    from megatron_real.rehearsal.world import World

    world = World()
    world.install()
    if sys.argv[1] == "te":
        from megatron_real.rehearsal import te_kernels

        te_kernels.install()
    from megatron_real.rehearsal.rank import rehearse

    for values in requests:
        request = Request(**{**values, "overrides": tuple(values["overrides"])})
        reports.write(_in_a_fork(rehearse, request, world) + "\n")
        # Before the next fork, which would get a copy of what is in the buffer.
        reports.flush()
    return 0


def _in_a_fork(rehearse: Any, request: Request, world: Any) -> str:
    """Rehearses in a fork and returns the report as a line of JSON.

    There is a report also of a rehearsal that ends its process.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            report = rehearse(request, world)
        # Of whatever kind: the parent waits for a line.
        except BaseException:
            report = RankReport(request.rank, {}, {}, fault=traceback.format_exc())
        with os.fdopen(write, "w", encoding="utf-8") as pipe:
            pipe.write(json.dumps(report.to_json()))
        # Not sys.exit: buffers and exit handlers are the parent's.
        os._exit(0)

    # With this end open in the parent, the read below would never end.
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        # Before waitpid: a child waits while its line is longer than the pipe's buffer.
        line = pipe.read()
    _, status = os.waitpid(child, 0)
    if line:
        return line
    fault = f"the process of rank {request.rank} ended by itself, status {status}"
    return json.dumps(RankReport(request.rank, {}, {}, fault=fault).to_json())


if __name__ == "__main__":
    sys.exit(main())
