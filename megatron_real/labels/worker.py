"""A verifier process: one JSON request per line in, one JSON reply per line out.

Started by pool.py:

    python -m megatron_real.labels.worker '{"verifier": "math_verify", "replies": 5, ...}'

Whatever a completion makes the verifier do stays in here: the memory limit is this process's, the
wall clock is the parent's, the limit of processor time the kernel's, the walls are those of
`labels.sandbox`, and the protocol has no pickle. Replies have a descriptor and numbers of their
own. Imports neither torch nor megatron.

Where text of a completion may run, each check has a child of its own, forked from a worker that has
read no request. For the tasks of reasoning_gym that evaluate arithmetic and nothing else, it has
read others. Such a child has no descriptor but the pipe of its one answer.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megatron_real.labels import gym, own, verifiers
from megatron_real.labels.code import CodeVerifier
from megatron_real.labels.sandbox import kernel
from megatron_real.labels.sandbox.rung import REMEDY, Rung
from megatron_real.labels.sandbox.supervisor import end_like, supervise
from megatron_real.labels.sandbox.walls import (
    NO_WALLS,
    Outside,
    Walls,
    confine_judged_code,
    enclose,
    home_directories,
)

Verify = Callable[[str, list[str], dict[str, Any]], tuple[Any, ...]]
"""A verifier as called here; it may add a reason to its status and reward."""

_MAX_REASON_CHARS = 200
_MAX_ANSWER_BYTES = 1 << 14  # of a child; a status, a number and a reason are less
_LEAST_ROOM = 32 << 20  # address space that a check may need beyond what the loaded verifier takes


def main() -> None:
    options = json.loads(sys.argv[1])
    # A terminal and Slurm signal whole trees; these are the trainer's to handle.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    options["trusted"] = own.is_own(options["verifier"]) and own.is_trusted(options["verifier"])

    is_walled = options["sandbox"] != "off" and not options["trusted"]
    namespaces = is_walled and options["highest"] == Rung.NAMESPACES.value
    end_like(supervise(lambda outside: _work(options, outside, is_walled), namespaces=namespaces))


def _work(options: Mapping[str, Any], outside: Outside, is_walled: bool) -> int:
    """Runs as the worker, below its supervisor, and returns its exit code.

    It loads the verifier, goes behind the walls and serves. The order must not change: what the
    verifier imports is read before the walls, and no check is seen before they stand.
    """
    replies = os.fdopen(options["replies"], "w", encoding="ascii")
    os.dup2(2, 1)  # what a verifier prints must not end up in the protocol
    logging.disable(logging.WARNING)  # math-verify warns at each call that its own timeouts are off

    memory = options["memory_mib"] << 20
    try:
        verify = _load(options)
        runs_any_text = _may_run_any_text(options)
        room = AddressSpace(memory)

        readable: list[str] = []
        if is_walled and own.is_own(options["verifier"]):
            # Completions may read what lies there.
            folder = own.folder(options["verifier"])
            for home in home_directories():
                if Path(folder) == home or Path(folder) in home.parents:
                    raise ValueError(
                        f"it lies in {folder}, so completions could read the home directory; move "
                        "it to a folder of its own, or say TRUSTED = True in it if it never runs "
                        "what a completion says"
                    )
            readable = [folder]

        if is_walled:
            walls = enclose(outside, readable, landlock=options["highest"] != Rung.LIMITS.value)
        else:
            walls = NO_WALLS
        _check_rung(options, walls, runs_any_text)

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        if isinstance(verify, CodeVerifier):
            verify.start(walls)
    except Exception as error:  # a user's file may raise anything
        _send(replies, error=_reason(error))
        return 0

    gc.collect()
    gc.freeze()  # children share these pages with the worker as long as no collection touches them
    _send(
        replies,
        error=None,
        rung=walls.rung.value,
        why=walls.why,
        threads=walls.max_threads > 0 or not walls.rung.contains,
    )
    _serve(options, verify, walls, room, replies)
    return 0


def _may_run_any_text(options: Mapping[str, Any]) -> bool:
    """Returns whether the verifier may run whatever a completion says."""
    name = options["verifier"]
    if name == "reasoning_gym":
        return not gym.is_read_version()
    return name == "code" or (own.is_own(name) and not options["trusted"])


def _serve(
    options: Mapping[str, Any], verify: Verify, walls: Walls, room: AddressSpace, replies: Any
) -> None:
    """Answers requests, numbered as they come.

    Returns when the trainer has closed the pipe or the memory is half used.
    """
    is_gym = options["verifier"] == "reasoning_gym"
    always_in_child = _may_run_any_text(options)
    # Unbuffered: what this process read ahead would be lost to a child that reads the request.
    requests = os.fdopen(0, "rb", buffering=0, closefd=False)
    poller = select.poll()
    poller.register(requests, select.POLLIN)
    number = 0
    while True:
        ((_, events),) = poller.poll()
        if not events & select.POLLIN:
            return  # the trainer has closed the pipe

        if always_in_child:
            # The child reads the request: nothing of it is ever in this process's memory.
            reply = _in_child(verify, walls, replies, room, read=lambda: _read(requests))
            if isinstance(verify, CodeVerifier) and not verify.is_usable():
                return  # the check has crashed, whatever its verdict, and a fresh worker takes over
        else:
            request = _read(requests)
            if is_gym and gym.runs_text(request["metadata"]):
                reply = _of_gym(verify, walls, replies, room, request)
            else:
                # Its signal, left at the default, ends this process, also in the middle of a C
                # function.
                signal.setitimer(signal.ITIMER_PROF, request["processor_seconds"])
                reply = _reply(verify, request)
                signal.setitimer(signal.ITIMER_PROF, 0)

        number += 1
        # Caches of parsers grow: a fresh process must take over before an honest check meets the
        # limit.
        is_last = room.is_half_used()
        _send(replies, number=number, **reply, last=is_last)
        if is_last:
            return


def _load(options: Mapping[str, Any]) -> Verify:
    """Returns the verifier that the options name, ready to judge without importing anything.

    Raises:
        ValueError: there is no such verifier.
        Exception: whatever a user's file raises.
    """
    name = options["verifier"]
    if name == "code":
        return CodeVerifier(
            require_think=options["require_think"],
            partial=options["partial"],
            seconds=options["timeout_seconds"],
            memory=options["memory_mib"] << 20,
        )
    verify = verifiers.load(
        name, require_think=options["require_think"], require_boxed=options["require_boxed"]
    )
    if name in verifiers.NAMES:
        # Imports what it needs, and builds the parsers' tables, before any clock runs.
        verify(verifiers.WARM_UP, ["\\sqrt{x + 1}"], {"source_dataset": "chain_sum"})
    return verify


def _check_rung(options: Mapping[str, Any], walls: Walls, runs_any_text: bool) -> None:
    """Checks that the walls are as high as the verifier and the configuration ask for.

    Raises:
        ValueError: they are lower.
    """
    if options["sandbox"] == "off" or walls.rung.contains or options["trusted"]:
        return
    if options["sandbox"] == "require":
        raise ValueError(f"labels.sandbox = require, and {walls.why}; {REMEDY}")
    if options["verifier"] == "code":
        raise ValueError(f"programs run in a sandbox only, and {walls.why}; {REMEDY}")
    if options["verifier"] == "reasoning_gym" and runs_any_text:
        raise ValueError(
            f"another version of reasoning_gym than {gym.VERSION} may evaluate answers, and "
            f"{walls.why}; install that version, or {REMEDY}"
        )


def _of_gym(
    verify: Verify, walls: Walls, replies: Any, room: AddressSpace, request: dict[str, Any]
) -> dict[str, Any]:
    """Returns the reply to a request whose scorer evaluates the answer: from a child, or none."""
    if not walls.rung.contains and walls is not NO_WALLS:
        task = request["metadata"].get("source_dataset")
        return _crashed(f"the scorer of {task} evaluates answers, and {walls.why}: docs/sandbox.md")
    return _in_child(verify, walls, replies, room, read=lambda: request)


def _in_child(
    verify: Verify,
    walls: Walls,
    replies: Any,
    room: AddressSpace,
    read: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Runs one check in a copy of this process that ends with it.

    Args:
        verify: the verifier.
        walls: what this process is behind; the copy goes behind stricter ones.
        replies: this process's own, which the copy closes.
        room: this process's own, which the copy closes.
        read: returns the request; called in the child, so that this process need not know it.

    Returns:
        Status, reward and reason.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            # First of all: a worker that is killed from here on takes the child with it.
            kernel.die_with_parent(signal.SIGKILL)
            request = read()
            replies.close()
            room.close()
            # Requests come in by standard input: the child must not read the next one.
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(nothing, descriptor)
            os.close(nothing)

            seconds = math.ceil(request["processor_seconds"])
            confine_judged_code(walls, processor_seconds=seconds, memory=None)
            os.write(writer, json.dumps(_reply(verify, request)).encode())
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except Exception as error:  # a wall that could not be built: the verifier has not run
            os.write(writer, json.dumps(_crashed(_reason(error))).encode())
        finally:
            # _exit, because what the worker cleans up at its end is not the child's.
            os._exit(code)

    # The child has the only writing end now: the pipe ends with it.
    os.close(writer)
    answer = b""
    with open(reader, "rb", buffering=0) as pipe:
        while len(answer) <= _MAX_ANSWER_BYTES and (piece := pipe.read(_MAX_ANSWER_BYTES)):
            answer += piece
    os.kill(child, signal.SIGKILL)  # what closes its pipe and goes on has nothing more to say
    _, status, usage = os.wait4(child, 0)

    return _answer(answer, os.waitstatus_to_exitcode(status), usage)


def _answer(answer: bytes, code: int, usage: resource.struct_rusage) -> dict[str, Any]:
    """Returns the reply that a child's answer stands for.

    The answer is checked field by field: whatever the child ran may have written it.

    Args:
        answer: what came through the child's pipe.
        code: the child's exit code.
        usage: what the child used.
    """
    try:
        match json.loads(answer):
            case {
                "status": ("ok" | "wrong" | "unparsable" | "score" | "crashed") as status,
                "reward": (None | int() | float()) as reward,
                "reason": str(reason),
            } if len(answer) <= _MAX_ANSWER_BYTES and not isinstance(reward, bool):
                return _checked(status, reward, reason)
        return _crashed("the check's answer is of another form")
    except (ValueError, OverflowError, RecursionError):  # no JSON, or a number beyond all floats
        pass

    spent = usage.ru_utime + usage.ru_stime
    if code == -signal.SIGKILL and spent >= 1:  # only the kernel's clock kills in there
        reason = f"no answer within {spent:.0f} s of processor time"
        return {"status": "timeout", "reward": None, "reason": reason}
    if answer:
        return _crashed("the check's answer is of another form")
    return _crashed(f"the verifier process ended with code {code}")


def _reply(verify: Verify, request: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a check in this process and returns the reply to its request."""
    try:
        status, reward, *reasons = verify(request["text"], request["answers"], request["metadata"])
    except Exception as error:  # whatever a verifier raises is one failed check
        return _crashed(_reason(error))
    return _checked(status, reward, reasons[0] if reasons else "")


def _checked(status: str, reward: float | None, reason: str) -> dict[str, Any]:
    """Returns the reply of a verdict; a reward that is no finite number makes it a crash."""
    if reward is not None and not math.isfinite(reward):
        return _crashed(f"the verifier gave the reward {reward}")
    return {"status": status, "reward": reward, "reason": _printable(reason)}


def _crashed(reason: str) -> dict[str, Any]:
    return {"status": "crashed", "reward": None, "reason": _printable(reason)}


def _reason(error: Exception) -> str:
    return _printable(f"{type(error).__name__}: {error}")


def _printable(text: str) -> str:
    """Returns the beginning of the text without control characters.

    It is shown on terminals, and judged code may have written it.
    """
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_REASON_CHARS])


def _read(requests: BinaryIO) -> dict[str, Any]:
    """Returns the next request.

    The trainer sends no other before it has the reply, so nothing is read beyond the line.

    Raises:
        EOFError: the trainer closed the pipe in the middle of a request.
    """
    pieces: list[bytes] = []
    while not pieces or not pieces[-1].endswith(b"\n"):
        piece = requests.read(1 << 16)
        if not piece:
            raise EOFError("the trainer closed the pipe in the middle of a request")
        pieces.append(piece)
    request: dict[str, Any] = json.loads(b"".join(pieces))
    return request


class AddressSpace:
    """How much of its memory limit this process has used, as RLIMIT_AS counts it."""

    def __init__(self, limit: int) -> None:
        """Opens the kernel's figures while /proc is in sight.

        Raises:
            ValueError: the verifier alone does not fit the limit.
        """
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        used = self._used()
        if used + _LEAST_ROOM > limit:
            raise ValueError(
                f"it takes {used >> 20} MiB before its first check, so labels.memory_mib = "
                f"{limit >> 20} leaves it no room; set it to {2 * used >> 20} or more"
            )
        self._half = (limit + used) / 2

    def close(self) -> None:
        """Lets go of the figures: a child that kept them could read this process's."""
        os.close(self._statm)

    def is_half_used(self) -> bool:
        """Returns whether half of what the loaded verifier left is used."""
        return self._used() > self._half

    def _used(self) -> int:
        """Returns bytes of address space."""
        # The first figure is the whole address space, in pages.
        pages = os.pread(self._statm, 1 << 10, 0).split()[0]
        return int(pages) * resource.getpagesize()


def _send(replies: Any, **fields: Any) -> None:
    print(json.dumps(fields), file=replies, flush=True)


if __name__ == "__main__":
    main()
