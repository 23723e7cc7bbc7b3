"""A run directory, its export, its checkpoints and cached hub models stand for weights wherever a
command takes them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_real import cli, config
from megatron_real.config.locate import weights_directory
from tests.integration.test_starts import finished, untrained

__all__ = ["finished", "untrained"]


def evaluate(model: Path, problems: Path, out: Path, *words: str) -> int:
    bench = ["--bench", f"sums={problems}", "--samples", "1", "--out", str(out)]
    return cli.main(["eval", str(model), *bench, *words])


@pytest.mark.parametrize("part", ["", "hf", "checkpoints/step_3"])
def test_eval_takes_the_run_s_own_settings(
    finished: Path, untrained: Path, tmp_path: Path, part: str
) -> None:
    assert evaluate(finished / part, untrained / "train.jsonl", tmp_path) == 0
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert settings["model.dtype"] == "fp32"
    assert settings["data.max_prompt_tokens"] == 16
    assert settings["rollout.max_response_tokens"] == 8


def test_export_and_last_checkpoint_have_the_same_figures(
    finished: Path, untrained: Path, tmp_path: Path
) -> None:
    rows = []
    for part in ("hf", "checkpoints/step_3"):
        assert evaluate(finished / part, untrained / "train.jsonl", tmp_path / part) == 0
        file = next((tmp_path / part / "samples").rglob("*.jsonl"))
        rows.append([json.loads(line)["completion"] for line in file.read_text().splitlines()])
    assert rows[0] == rows[1]


def test_eval_of_other_weights_clamps_what_the_model_cannot_hold(
    untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rollout.engine=transformers", "model.dtype=fp32"]
    assert evaluate(untrained, untrained / "train.jsonl", tmp_path, *words) == 0
    assert (
        "the model holds 128 tokens, so data.max_prompt_tokens=64 and "
        "rollout.max_response_tokens=64" in capsys.readouterr().err
    )


def test_convert_takes_a_run(finished: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", "to-hf", str(finished), str(tmp_path / "out")]) == 0
    assert cli.main(["convert", "verify", str(finished), str(tmp_path / "out")]) == 0

    # Its card is that of the run's own export, but for the packages, which the run does not record.
    card = (tmp_path / "out/README.md").read_text()
    exported = (finished / "hf/README.md").read_text()
    assert exported.startswith(card.rstrip())
    assert "## Versions" in exported


def test_a_run_without_weights_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("hf", "checkpoints"))
    assert cli.main(["eval", str(run), "--bench", f"a={__file__}"]) == 2
    assert "has no whole checkpoint yet" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has exported no weights yet"):
        weights_directory(str(run))


def test_a_cached_hub_model_is_found_by_its_name(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="neither a directory nor a model in the hub's cache"):
        weights_directory("someone/tiny")
    folder = tmp_path / "models--someone--tiny"
    shutil.copytree(untrained, folder / "snapshots/0123abcd")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0123abcd")
    located = weights_directory("someone/tiny")
    assert Path(located) == folder / "snapshots/0123abcd"
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: someone/tiny}\nrollout: {engine: transformers}\n")
    small = ["data.max_prompt_tokens=16", "rollout.max_response_tokens=8"]
    assert config.load(file, small).model.path == located
