"""Every expected end of a command has its exit code, its state and one speaker."""

from __future__ import annotations

import errno

import pytest

from megatron_real import cli
from megatron_real.checkpoint.saver import CheckpointFailed
from megatron_real.commands import config as config_command
from megatron_real.commands.terminal import input_checks
from megatron_real.errors import (
    EXIT_CODES,
    DiskFull,
    ExpectedEnd,
    Interrupted,
    NothingToDo,
    Refused,
    Stopped,
    state_and_reason,
)
from megatron_real.evaluation.benchmark import UntrustedFigures
from megatron_real.labels import RewardNeedsThreshold, TooManyFailedChecks
from megatron_real.rollout.engines.engine import EngineFailed
from megatron_real.rollout.sync import SyncError
from megatron_real.supervision.ruin import NonFinite
from megatron_real.weights import WeightsError

ENDS: list[tuple[type[ExpectedEnd], type[Exception], int, str]] = [
    (NothingToDo, Exception, 0, "finished"),
    (Stopped, Exception, 75, "stopped"),
    (Interrupted, Stopped, 130, "stopped"),
    (Refused, ValueError, 2, "failed"),
    (RewardNeedsThreshold, ValueError, 2, "failed"),
    (TooManyFailedChecks, RuntimeError, 1, "failed"),
    (NonFinite, RuntimeError, 1, "failed"),
    (CheckpointFailed, RuntimeError, 1, "failed"),
    (UntrustedFigures, RuntimeError, 1, "failed"),
    (EngineFailed, RuntimeError, 1, "crashed"),
    (SyncError, RuntimeError, 1, "crashed"),
    (DiskFull, Exception, 1, "failed"),
]
"""(class, what a user's script catches it by, exit code, state of the run)."""


@pytest.mark.parametrize(
    ("kind", "base", "code", "state"), ENDS, ids=[end[0].__name__ for end in ENDS]
)
def test_the_command_line_says_an_end_and_exits_with_its_code(
    kind: type[ExpectedEnd],
    base: type[Exception],
    code: int,
    state: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    end = kind("a sentence")
    assert isinstance(end, base)
    assert code in EXIT_CODES
    assert state_and_reason(end) == (state, "a sentence")
    assert end.diverged == (kind is NonFinite)

    def run(_options: object) -> int:
        raise end

    monkeypatch.setattr(config_command, "run", run)
    assert cli.main(["config"]) == code
    assert capsys.readouterr().err == "megatron-real: a sentence\n"

    # Another rank says only what it may be alone to know.
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["config"]) == code
    alone: dict[type[ExpectedEnd], str] = {DiskFull: "megatron-real: a sentence\n"}
    assert capsys.readouterr().err == alone.get(kind, "")


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_options: object) -> int:
        raise ValueError("a defect, not an input")

    monkeypatch.setattr(config_command, "run", run)
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["config"])


def test_a_value_error_refuses_the_input_only_where_input_is_checked() -> None:
    with pytest.raises(Refused, match="no such layer") as refusal, input_checks():
        raise WeightsError("no such layer")
    assert refusal.value.on_every_rank

    # An error that has a code already keeps it, and others are nobody's input.
    with pytest.raises(RewardNeedsThreshold), input_checks():
        raise RewardNeedsThreshold("a reward is 0.75")
    with pytest.raises(TypeError), input_checks():
        raise TypeError("a defect")


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (KeyboardInterrupt(), "stopped", "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), "failed", "[Errno 28] No space left"),
        (RuntimeError("write failed: No space left on device"), "failed", "write failed"),
        (KeyError("layer"), "crashed", "KeyError: 'layer'"),
    ],
)
def test_the_state_that_other_errors_leave(error: BaseException, state: str, reason: str) -> None:
    its_state, its_reason = state_and_reason(error)
    assert its_state == state
    assert its_reason.startswith(reason)
