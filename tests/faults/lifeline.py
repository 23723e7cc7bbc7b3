"""Ranks that have a lifeline and nothing else: no collectives, no torch.

They are connected in a chain, so that the one in the middle is the others' only way to each other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RANK = """
import json, sys, time
from pathlib import Path
from megatron_real.supervision import lifeline
lifeline.FAN_OUT = 1
rank, world, what, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
rounds = 0

def gathered(value):
    global rounds
    rounds += 1
    own = folder / f"{rounds}-{rank}"
    own.with_suffix(".new").write_text(json.dumps(value))
    own.with_suffix(".new").rename(own)
    files = [folder / f"{rounds}-{other}" for other in range(world)]
    while not all(file.exists() for file in files):
        time.sleep(0.01)
    return [json.loads(file.read_text()) for file in files]

began = time.monotonic()
def stage():
    if what == "hang" and rank == 1:
        return 3, "rollout", time.monotonic() - began
    return 4, "label", time.monotonic() - began

limits = {
    "hang_seconds": 1.0 if what == "hang" else 600.0,
    "silent_seconds": 4.0 if what == "silence" else 600.0,
}
line = lifeline.Lifeline(rank, world, gathered=gathered, stage=stage, beat_seconds=0.1, **limits)
print("ready", flush=True)
if what == "raise" and rank == 1:
    time.sleep(0.5)
    line.say_end("ValueError: no good")
    sys.exit(1)
if what == "leave" and rank == 1:
    line.close("the engine is lost")
    sys.exit(3)
if what == "good":
    time.sleep(0.3 * rank)
    line.close()
    sys.exit(0)
time.sleep(600)
"""


def start(
    rank: int, case: str, folder: Path, *wrapper: str, host: str = "127.0.0.1", world: int = 3
) -> subprocess.Popen[str]:
    """One of the ranks that do what the case says, started by a wrapping command;
    `host` is the first rank's.
    """
    script = RANK
    if case == "leave":
        script = RANK.replace("rank, world", "lifeline._LEAVE_SECONDS = 1.0\nrank, world", 1)
    return subprocess.Popen(
        [*wrapper, sys.executable, "-c", script, str(rank), str(world), case, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MASTER_ADDR": host},
    )


def wait_until_ready(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
