"""What a run has written, read back from Python: status, metrics, evaluations and rollouts.

The module loads without torch. A run that is still going may be read: rows are whole or not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_real.records import Rollout
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rollouts import read_rollouts
from megatron_real.runs.rows import read_rows
from megatron_real.runs.status import read_status


class RunRecords:
    """The records of one run directory.

    Example:
        run = RunRecords("runs/first")
        metrics = pandas.DataFrame(run.metrics()).set_index("step")
        rollouts = pandas.DataFrame(run.rollout_rows(step=1))
    """

    def __init__(self, run_dir: str | Path) -> None:
        """Opens the records of a run.

        Raises:
            ValueError: no run has written to `run_dir`.
        """
        self.directory = RunDirectory(run_dir)
        # Every run writes it before anything else.
        if not self.status():
            raise ValueError(
                f"{run_dir} is not the directory of a run: it has no status.json; "
                "give the trainer.run_dir of a run"
            )

    def __repr__(self) -> str:
        return f"RunRecords({str(self.directory.path)!r}, state={self.status().get('state')!r})"

    def status(self) -> dict[str, Any]:
        """Returns status.json: `state`, `reason`, `time` and `life`."""
        return read_status(self.directory.status)

    def metrics(self) -> list[dict[str, Any]]:
        """Returns one row for each step, in order.

        docs/metrics.md explains each figure. A figure of nothing, such as a mean over no rollouts,
        is None.
        """
        return read_rows(self.directory.metrics)[0]

    def evaluations(self) -> list[dict[str, Any]]:
        """Returns one row for each evaluation on the held-out problems, in order."""
        return read_rows(self.directory.evaluations)[0]

    def steps(self) -> list[int]:
        """Returns the steps whose rollouts are on disk, in order."""
        return self.directory.saved_steps()

    def rollouts(self, step: int) -> list[Rollout]:
        """Returns the rollouts of a step, with their tokens.

        Raises:
            ValueError: that step has no rollouts on disk, or its file is broken.
        """
        return read_rollouts(self.directory.saved_rollouts(step))

    def rollout_rows(self, step: int) -> list[dict[str, Any]]:
        """Returns the rollouts of a step as plain values, for a data frame.

        They are texts and numbers, without tokens.

        Raises:
            ValueError: as `rollouts`.
        """
        return [
            {
                "step": step,
                "group": rollout.group,
                "sample": rollout.sample,
                "prompt": rollout.prompt.text,
                "completion": rollout.completion.text,
                "answers": list(rollout.prompt.answers),
                "status": str(rollout.verdict.status),
                "label": int(rollout.label),
                "reward": rollout.verdict.reward,
                "finished": rollout.completion.finished,
                "response_tokens": rollout.completion.num_trained,
                "uid": rollout.prompt.uid,
                "source": rollout.prompt.source,
            }
            for rollout in self.rollouts(step)
        ]
