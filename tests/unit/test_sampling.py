"""The settings that rollouts on disk must share with the run that reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_real import config as configuration
from megatron_real.runs.chunks import _WITHOUT_EFFECT_ON_ROLLOUTS, settings_of_rollouts


def settings(path: Path, *words: str) -> dict[str, object]:
    return settings_of_rollouts(configuration.load(path, ["rollout.engine=transformers", *words]))


@pytest.fixture
def file(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    path = tmp_path / "run.yaml"
    lengths = "data:\n  max_prompt_tokens: 16\nrollout:\n  max_response_tokens: 16\n"
    path.write_text(f"model:\n  path: {tiny_model()}\n{lengths}")
    return path


def test_settings_without_effect_exist_and_do_not_count(file: Path) -> None:
    plain = configuration.to_plain(configuration.Config())
    for name in _WITHOUT_EFFECT_ON_ROLLOUTS:
        section, key = name.split(".")
        assert key in plain[section], f"{name} is no setting (any more)"
    assert settings(file) == settings(file, "rollout.chunk_prompts=3", "labels.workers=5")


@pytest.mark.parametrize(
    "word",
    ["rollout.temperature=0.3", "rollout.group_size=4", "rollout.exclude_mismatch=0.1",
     "labels.require_think=true", "labels.overlong=excluded", "labels.threshold=0.5"],
)  # fmt: skip
def test_settings_with_an_effect_count(file: Path, word: str) -> None:
    name = word.partition("=")[0]
    before = settings(file)
    now = settings(file, word)
    assert {n for n in now if now[n] != before[n]} == {name}


def test_an_own_verifier_counts_by_its_file(file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def judge(text, answers, metadata):\n    return True\n")
    before = settings(file, f"labels.verifier={own}:judge")
    own.write_text("def judge(text, answers, metadata):\n    return False\n")
    now = settings(file, f"labels.verifier={own}:judge")
    assert {n for n in now if now[n] != before[n]} == {"the file of labels.verifier"}


def test_what_comes_from_the_environment_counts_and_is_not_written(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with file.open("a") as more:
        more.write("  temperature: ${oc.decode:${oc.env:HEAT}}\n")
    temperatures = []
    for heat in ("0.71", "0.72"):
        monkeypatch.setenv("HEAT", heat)
        temperatures.append(settings(file)["rollout.temperature"])
    assert temperatures[0] != temperatures[1]
    assert not any("0.7" in str(value) for value in temperatures)
