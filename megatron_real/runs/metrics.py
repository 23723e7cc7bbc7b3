"""The metrics of a step, each computed in one place from the whole step, and where they are written.

Nothing here is an average of averages: every rank knows all rollouts, scores and weights, so each figure is computed
once from all of them.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_real.records import EXCLUDED, NEGATIVE, POSITIVE, Rollout

# Dense bf16 peak (TFLOP/s) by a part of the device's name, from the vendor's data sheets.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Shares and lengths of a step's rollouts.

    reward_mean: correct share of the labelled rollouts. solved_share, one_class_share: of the groups that have a
    labelled rollout, those all correct, and those of a single label. excluded_share, truncated_share: of rollouts.
    status/NAME: how many checks ended so. response_tokens_*: mean and maximum length.
    """
    labels: dict[int, set[int]] = defaultdict(set)
    for r in rollouts:
        if r.label != EXCLUDED:
            labels[r.group].add(r.label)
    labelled = [r.label for r in rollouts if r.label != EXCLUDED]
    lengths = [len(r.completion.token_ids) for r in rollouts]
    statuses = Counter(r.verdict.status for r in rollouts)
    return {
        "reward_mean": _mean(labelled),
        "solved_share": _mean([found == {POSITIVE} for found in labels.values()]),
        "one_class_share": _mean([len(found) == 1 for found in labels.values()]),
        "excluded_share": _mean([r.label == EXCLUDED for r in rollouts]),
        "truncated_share": _mean([not r.completion.finished for r in rollouts]),
        "response_tokens_mean": _mean(lengths),
        "response_tokens_max": float(max(lengths)),
        **{f"status/{name}": float(count) for name, count in sorted(statuses.items())},
    }


def score_metrics(rollouts: Sequence[Rollout], scores: Sequence[float], weights: Sequence[float]) -> dict[str, float]:
    """Mean, 5th and 95th percentile of the scores of rollouts that had a weight, by label."""
    metrics = {}
    for name, label in (("positive", POSITIVE), ("negative", NEGATIVE)):
        chosen = sorted(s for r, s, w in zip(rollouts, scores, weights, strict=True) if r.label == label and w != 0)
        metrics[f"score_{name}_mean"] = _mean(chosen)
        metrics[f"score_{name}_p5"] = _quantile(chosen, 0.05)
        metrics[f"score_{name}_p95"] = _quantile(chosen, 0.95)
    return metrics


def peak_tflops(device_name: str, configured: float) -> float | None:
    """Peak bf16 TFLOP/s of a device, None where it is not known."""
    return configured or next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))] if ordered else math.nan


class MetricsWriter:
    """Appends metrics to a JSONL file, and to TensorBoard and W&B where asked."""

    def __init__(self, jsonl: Path, *, tensorboard: Path | None, wandb: Mapping[str, Any] | None) -> None:
        """`wandb`: the run's configuration, or None to leave W&B out.

        Raises:
            ValueError: W&B is asked for but not installed.
        """
        self._jsonl = jsonl
        self._sinks: list[Callable[[str, float, int], None]] = []
        self._closers: list[Callable[[], None]] = []
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            events = SummaryWriter(str(tensorboard))
            self._sinks.append(events.add_scalar)
            self._closers.append(events.close)
        if wandb is not None:
            try:
                import wandb as client
            except ImportError as error:
                raise ValueError("trainer.wandb=true, but wandb is not installed; pip install wandb") from error
            run = client.init(config=dict(wandb), dir=str(jsonl.parent))
            self._sinks.append(lambda name, value, step: run.log({name: value}, step=step))
            self._closers.append(run.finish)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row. A value that is not a number becomes null."""
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self._jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in metrics.items():
            if math.isfinite(value):
                for sink in self._sinks:
                    sink(name, value, step)

    def close(self) -> None:
        """Flushes and ends TensorBoard and W&B."""
        for close in self._closers:
            close()

