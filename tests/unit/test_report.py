"""The report: its curves, variants and tables, the rollouts it carries, and hostile texts in a
browser.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from numpy.typing import NDArray

from megatron_real import cli
from megatron_real.records import NEGATIVE, POSITIVE, Completion, Prompt, Rollout, Status, Verdict
from megatron_real.report import charts
from megatron_real.report.browser import MAX_TEXT, sample_of, spaced, visible
from megatron_real.report.charts import band_columns, curve_columns, stage_seconds, thinned
from megatron_real.report.tables import benchmarks, differences, events, rank_times
from megatron_real.report.variants import read_run, variants_of
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rollouts import write_rollouts

SCRIPT = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)
HOSTILE = (
    SCRIPT,
    "NUL \0 and \u202e turned",
    "x" * 100_000,
    "half \ud83d pair",
    "<b>bold</b> & 'q'",
)

RIGHT = Verdict(Status.OK, POSITIVE, 1.0)
WRONG = Verdict(Status.WRONG, NEGATIVE, 0.0)


def make_run(
    path: Path,
    *,
    steps: int = 4,
    seed: int = 0,
    lr: float = 1e-6,
    texts: tuple[str, ...] = (),
    weights: tuple[float, float] | None = None,
    state: str = "finished",
) -> str:
    """Writes a run directory with figures that are easy to compute by head; returns its path.

    Args:
        path, steps, seed, lr: of the run.
        texts: the answers of each group; by default 5, which is right, and 6.
        weights: of the two tokens of every answer, where they are kept:
            the model then has a tokenizer as well.
        state: of status.json.
    """
    run = RunDirectory(path)
    path.mkdir(parents=True)
    config = {
        "trainer": {"steps": steps, "seed": seed, "run_dir": str(path)},
        "objective": {"name": "real"},
        "optimizer": {"lr": lr},
        "model": {"path": "base" if weights is None else str(make_tokenizer(path))},
    }
    run.config.write_text(yaml.safe_dump(config))
    run.status.write_text(json.dumps({"state": state, "reason": "", "time": "noon"}))
    run.lives.mkdir()
    life = {"time": "dawn", "processes": 2, "from": "the start", "changed": []}
    run.life(1).write_text(json.dumps(life))
    rows = [
        {
            "step": step,
            "reward_mean": 0.1 * step + seed,
            "loss": None,
            "response_tokens_mean": 10.0,
            "status/ok": 3.0,
            "status/timeout": float(step == 2),
            "seconds/rollout": 1800.0,
            "seconds/update": 1800.0,
            "rank_seconds/rollout_min": 1.0,
            "rank_seconds/rollout_mean": 2.0,
            "rank_seconds/rollout_max": 3.0,
            "rank_seconds/rollout_slowest": 1.0,
            "skipped_updates": float(step == 3),
            "mismatch_mean_abs": 0.01,
        }
        for step in range(1, steps + 1)
    ]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [
        {"step": s, "heldout/pass_at_1": 0.5, "heldout/standard_error": 0.1} for s in (0, steps)
    ]
    run.evaluations.write_text("".join(json.dumps(row) + "\n" for row in held))
    for step in range(1, steps + 1):
        answers = texts or ("5", "6")
        rollouts = [
            Rollout(
                Prompt(f"train/{group}", f"2+3= {text[:200]}", (5, 9), ("5",)),
                group,
                sample,
                Completion((8, 2), (-0.5, -3.0), text, True),
                RIGHT if sample == 0 else WRONG,
            )
            for group in range(2)
            for sample, text in enumerate(answers)
        ]
        figures = [0.25] * len(rollouts)
        of_tokens: dict[str, list[NDArray[Any] | None]] = {}
        if weights is not None:
            ratios = numpy.array([0.1, -0.7], numpy.float32)
            of_tokens["log_ratios"] = [ratios] * len(rollouts)
            of_tokens["token_weights"] = [numpy.array(weights, numpy.float32)] * len(rollouts)
        write_rollouts(
            run.rollouts(step),
            rollouts,
            step=step,
            scores=figures,
            weights=figures,
            token_figures=of_tokens,
        )
    return str(path)


def make_tokenizer(path: Path) -> Path:
    """Writes the tokenizer of a model whose token 8 is a five, and whose token 2 is the text of a
    script.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"[{i}]": i for i in range(10)}
    del words["[8]"], words["[2]"]
    Tokenizer(WordLevel({**words, "5": 8, SCRIPT: 2}, unk_token="[0]")).save(
        str(path / "tokenizer.json")
    )
    return path


def test_curves_run_over_steps_tokens_and_hours(tmp_path: Path) -> None:
    columns = curve_columns(read_run(make_run(tmp_path / "run")))
    assert columns["step"].tolist() == [1, 2, 3, 4]
    assert columns["tokens"].tolist() == [30, 70, 100, 130]  # the second step has a fourth rollout
    assert columns["hours"].tolist() == [1, 2, 3, 4]
    assert numpy.isnan(columns["loss"]).all()


def test_runs_of_several_seeds_are_a_mean_and_a_band_over_their_common_steps(
    tmp_path: Path,
) -> None:
    runs = [read_run(make_run(tmp_path / f"real-{seed}", seed=seed, steps=4)) for seed in (0, 1)]
    other = read_run(make_run(tmp_path / "other", lr=1e-5))
    variants = variants_of([*runs, other])
    assert [variant.name for variant in variants] == ["real (2 runs)", "other"]
    bands = band_columns(variants[0])
    numpy.testing.assert_allclose(bands["reward_mean"], [0.6, 0.7, 0.8, 0.9], rtol=1e-6)
    numpy.testing.assert_allclose(bands["reward_mean_low"], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    numpy.testing.assert_allclose(bands["reward_mean_high"], [1.1, 1.2, 1.3, 1.4], rtol=1e-6)
    assert "step_low" not in bands


def test_runs_of_a_sweep_are_called_by_their_variant(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / variant / f"seed-{seed}", seed=seed, lr=lr))
        for variant, lr in (("real", 1e-6), ("grpo", 1e-5))
        for seed in (1, 2)
    ]

    assert [run.name for run in runs] == [
        "real/seed-1",
        "real/seed-2",
        "grpo/seed-1",
        "grpo/seed-2",
    ]
    assert [variant.name for variant in variants_of(runs)] == ["real (2 runs)", "grpo (2 runs)"]


def test_a_step_that_one_seed_lacks_is_in_no_band(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / f"real-{seed}", seed=seed)) for seed in (0, 1)]
    metrics = runs[1].records.directory.metrics
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    variant = variants_of([runs[0], read_run(str(tmp_path / "real-1"))])[0]
    assert band_columns(variant)["step"].tolist() == [1, 2]


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    columns = {"step": numpy.arange(1, 5001, dtype=numpy.float32)}
    steps = thinned(columns, 100)["step"]
    assert len(steps) == 100
    assert (steps[0], steps[-1]) == (1, 5000)


def test_tables_say_what_differs_what_failed_and_who_was_slow(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / "one")),
        read_run(make_run(tmp_path / "two", lr=1e-5, seed=3)),
    ]
    named = {row[0]: row[1:] for row in differences(runs).rows}

    assert named["optimizer.lr"] == ["1e-06", "1e-05"]
    assert set(named) == {"optimizer.lr", "trainer.seed", "trainer.run_dir"}

    event_rows = [row[1:] for row in events(runs[:1]).rows]
    assert event_rows == [
        ["dawn", "start 1: 2 processes, from the start"],
        ["step 2", "rollouts without a verdict: 1 timeout"],
        ["step 3", "1 updates skipped: loss or gradient not finite"],
        ["noon", "finished"],
    ]
    assert rank_times(runs[:1]).rows == [
        ["one", "rollout", "1", "2", "3", "rank 1 (100% of the steps)"]
    ]
    assert stage_seconds(runs) == {"rollout": 1800.0, "update": 1800.0}


def test_results_of_eval_are_shown_with_their_errors_and_refused_where_there_are_none(
    tmp_path: Path,
) -> None:
    row = {
        "pass_at_1": 0.25,
        "standard_error": 0.05,
        "majority": None,
        "problems": 30,
        "samples": 4,
    }
    results = {"model": "base", "benchmarks": {"aime24": row}, "average": row}
    (tmp_path / "results.json").write_text(json.dumps(results))
    first = benchmarks([str(tmp_path)]).rows[0]

    assert first == ["base", "aime24", "0.2500 \N{PLUS-MINUS SIGN} 0.0500", "-", "30", "4"]
    with pytest.raises(ValueError, match=r"holds no results.*give the --out of a finished"):
        benchmarks([str(tmp_path / "none")])


def test_rollouts_are_whole_groups_within_the_limit_and_the_same_every_time(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", steps=8))
    everything = sample_of(run, max_bytes=10**6)
    assert (everything.num_rollouts, everything.num_read, everything.num_steps) == (32, 32, 8)

    one = everything.groups[0]["rollouts"][0]
    assert (one["score"], one["weight"], one["length"]) == (0.25, 0.25, 2)

    limit = len(json.dumps(everything.groups)) // 2
    part = sample_of(run, max_bytes=limit)
    assert 0 < len(json.dumps(part.groups)) <= limit
    assert {group["step"] for group in part.groups} == set(range(1, 9))  # each has its share
    assert all(len(group["rollouts"]) == 2 for group in part.groups)
    assert part == sample_of(run, max_bytes=limit)

    asked = sample_of(run, max_bytes=10**6, steps=[3])
    assert {group["step"] for group in asked.groups} == {3}
    with pytest.raises(ValueError, match="no rollouts of step 99 on disk; it has steps 1 to 8"):
        sample_of(run, max_bytes=10**6, steps=[99])


def test_tokens_are_carried_with_what_they_got(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", steps=1, weights=(-0.012345, 0.5)))
    rollout = sample_of(run, max_bytes=10**6).groups[0]["rollouts"][0]
    assert rollout["tokens"] == ["5", SCRIPT]
    assert rollout["logprobs"] == [-0.5, -3.0]
    assert rollout["ratios"] == [0.1, -0.7]
    assert rollout["weights"] == [-0.0123, 0.5]
    without = read_run(make_run(tmp_path / "without", steps=1))
    assert "weights" not in sample_of(without, max_bytes=10**6).groups[0]["rollouts"][0]


def test_steps_are_spaced_evenly() -> None:
    assert spaced([1, 2, 3], 40) == [1, 2, 3]
    steps = spaced(range(1, 1401), 40)
    assert (len(set(steps)), steps[0], steps[-1]) == (40, 1, 1400)


def test_invisible_characters_are_shown_and_long_texts_are_cut_in_the_middle() -> None:
    assert visible("a\0b\x1b[31m\n\t\u202e") == "a\u2400b\u241b[31m\n\t<U+202E>"
    assert visible("half \ud83d pair, whole \U0001f600") == "half \ufffd pair, whole \U0001f600"
    cut = visible("a" * 50_000 + "z" * 50_000)
    assert len(cut) < MAX_TEXT + 100
    assert "96,000 characters are left out" in cut
    assert cut.startswith("aaa") and cut.endswith("zzz")


def page_of(tmp_path: Path, **options: Any) -> Path:
    """Runs the command on a run and returns the page."""
    pytest.importorskip("bokeh")
    out = tmp_path / "report.html"
    assert cli.main(["report", make_run(tmp_path / "run", **options), "--out", str(out)]) == 0
    return out


def test_the_page_needs_nothing_from_outside_and_carries_hostile_texts_as_data(
    tmp_path: Path,
) -> None:
    page = page_of(tmp_path, texts=HOSTILE).read_text(encoding="utf-8")
    assert len(page) < 5_000_000
    assert "owned" in page
    assert "<img src=x" not in page and "<script>document" not in page
    assert "\0" not in page
    assert not re.search(r"<(script|link|img)[^>]*\b(src|href)=", page.split("<main>")[1][:50_000])
    # A page without this may run what slips through.
    nonce = re.search(r"script-src 'nonce-([0-9a-f]{32})'", page)
    assert nonce is not None
    scripts = re.findall(r"<script ([^>]*)>", page)
    assert all(f'nonce="{nonce[1]}"' in words or "application/json" in words for words in scripts)


def test_a_run_of_no_step_has_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, steps=0)
    assert "heldout/pass_at_1" in page.read_text(
        encoding="utf-8"
    )  # evaluated before the first step
    (tmp_path / "run" / "evaluations.jsonl").unlink()
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(page)]) == 0
    assert "No step is finished yet." in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["nowhere"], "is not the directory of a run"),
        (["RUN", "--out", "."], "a directory; give a file"),
        (["RUN", "--megabytes", "0"], "must be above 0"),
        (["RUN", "--steps", "77"], "no rollouts of step 77"),
        (["RUN", "--eval", "nowhere"], "holds no results"),
    ],
)
def test_a_wrong_request_is_refused_in_a_sentence_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    pytest.importorskip("bokeh")
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "RUN")
    assert cli.main(["report", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_legends_are_below_the_charts_and_cover_no_curve(tmp_path: Path) -> None:
    pytest.importorskip("bokeh")
    paths = [make_run(tmp_path / f"run-{i}", lr=1e-6 * (i + 1)) for i in range(3)]
    variants = variants_of([read_run(path) for path in paths])
    curves = charts._curves(variants)
    assert len(curves) >= 5
    for curve in curves:
        (legend,) = curve.legend
        assert legend in curve.below
        assert len(legend.items) == 3


@pytest.mark.grid
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_tokens_are_shaded_by_what_they_got(tmp_path: Path) -> None:
    page = page_of(tmp_path, steps=2, weights=(-0.25, 0.5))
    page_state = in_browser(page, SHADING)
    assert page_state["errors"] == []
    assert page_state["tokens"] == ["5", SCRIPT]

    up = (0, 114, 178)
    down = (213, 94, 0)
    # The first token's weight is half of the group's largest and negative: the loss falls as it
    # gets likelier.
    assert colours(page_state["weights"]) == [(up, 0.38), (down, 0.75)]
    assert colours(page_state["ratios"]) == [(up, 0.11), (down, 0.75)]
    assert colours(page_state["logprobs"]) == [(down, 0.07), (down, 0.45)]
    assert page_state["title"] == "0.5 = dL / d log-prob"
    assert page_state["off"] == 0


def colours(words: list[str]) -> list[tuple[tuple[int, ...], float]]:
    """Returns the parts of rgba(...), with the opacity as precisely as a browser keeps it."""
    numbers = [[float(number) for number in re.findall(r"[\d.]+", word)] for word in words]
    return [((int(r), int(g), int(b)), round(opacity, 2)) for r, g, b, opacity in numbers]


SHADING = """
  const choose = (value) => {
    const select = document.getElementById("shade");
    select.value = value;
    select.dispatchEvent(new Event("input", { bubbles: true }));
    return [...document.querySelector(".answer pre").querySelectorAll(".token")];
  };
  const colours = (tokens) => tokens.map((one) => getComputedStyle(one).backgroundColor);
  seen.logprobs = colours(choose("logprobs"));
  seen.ratios = colours(choose("ratios"));
  const tokens = choose("weights");
  seen.weights = colours(tokens);
  seen.tokens = tokens.map((one) => one.textContent);
  seen.title = tokens[1].title;
  seen.off = choose("").length;
"""


def test_watching_writes_the_page_again_until_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run finishes a step whenever the command sleeps, and then ends."""
    pytest.importorskip("bokeh")
    run = RunDirectory(make_run(tmp_path / "run", state="running"))
    rows = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(rows[:2]))
    out = tmp_path / "report.html"
    pages = []

    def goes_on(seconds: float) -> None:
        assert seconds == 30
        pages.append(out.read_text(encoding="utf-8"))
        run.metrics.write_text("".join(rows[: 2 + len(pages)]))
        if len(pages) == 2:
            run.status.write_text(json.dumps({"state": "finished", "reason": "", "time": "noon"}))

    monkeypatch.setattr("time.sleep", goes_on)
    assert cli.main(["report", str(run.path), "--out", str(out), "--watch", "30"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3

    pages.append(out.read_text(encoding="utf-8"))
    done = [re.search(r"\d of 4", page) for page in pages]
    assert [match and match[0] for match in done] == ["2 of 4", "3 of 4", "4 of 4"]


@pytest.mark.grid
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_hostile_texts_are_text_and_every_control_works(tmp_path: Path) -> None:
    page = page_of(tmp_path, texts=HOSTILE, steps=12)
    page_state = in_browser(page, CLICKS)
    assert page_state["errors"] == []
    assert page_state["title"] == "run - megatron_real"
    assert page_state["injected"] == 0
    assert page_state["charts"] >= 5
    assert page_state["shown"] == ["120 rollouts in 24 groups, page 1 of 3", "page 2 of 3"]
    assert page_state["wrong"] == "96 rollouts in 24 groups, page 1 of 3"
    assert page_state["step"] == "10 rollouts in 2 groups, page 1 of 1"
    assert SCRIPT in page_state["texts"]
    assert any("\u2400" in text and "<U+202E>" in text for text in page_state["texts"])
    assert page_state["axis"] == ["hours", 12.0]


CLICKS = """
  const set = (id, value) => {
    const input = document.getElementById(id);
    input.value = value;
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const place = () => document.getElementById("place").textContent;
  seen.title = document.title;
  seen.charts = document.querySelectorAll(".grid .card").length;
  seen.injected = document.querySelectorAll("#list img, #list script, #list b").length;
  seen.shown = [place()];
  document.getElementById("next").click();
  seen.shown.push(place().split(", ")[1]);
  set("label", "0");
  seen.wrong = place();
  set("label", "");
  set("step", "3");
  seen.step = place();
  seen.texts = [...document.querySelectorAll(".answer pre")].map((one) => one.textContent);
  document.querySelector("input[value=hours]").click();
  const models = [...Bokeh.documents[0]._all_models.values()];
  const source = models.find((one) => one.name === "curves" && "reward_mean" in one.data);
  const plot = models.find((one) => one.name === "curve");
  seen.axis = [plot.below[0].axis_label, source.data.x[source.data.x.length - 1]];
"""


def in_browser(page: Path, clicks: str) -> dict[str, Any]:
    """Opens a page from disk in a headless browser, runs `clicks` a second later,
    and returns what they saw.
    """
    text = page.read_text(encoding="utf-8")
    nonce = re.search(r"nonce-([0-9a-f]{32})", text)
    assert nonce is not None

    first = (
        f'<script nonce="{nonce[1]}">window.faults = [];'
        'addEventListener("error", (event) => faults.push(String(event.message)));'
        'addEventListener("securitypolicyviolation", (event) => '
        "faults.push(event.violatedDirective));"
        "</script>"
    )
    last = (
        f'<script nonce="{nonce[1]}">setTimeout(() => {{ const seen = {{}};'
        f"try {{ {clicks} }} catch (error) {{ faults.push(String(error)); }}"
        'const box = document.createElement("pre"); box.id = "seen"; seen.errors = faults;'
        "box.textContent = JSON.stringify(seen); document.body.append(box); }, 1000);</script>"
    )
    probe = page.with_name("probe.html")
    text = text.replace("<title>", f"{first}<title>", 1)
    probe.write_text(text.replace("</body>\n</html>", f"{last}</body></html>"), encoding="utf-8")
    assert CHROMIUM is not None

    words = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    words += ["--virtual-time-budget=10000", f"--user-data-dir={page.parent / 'profile'}"]
    completed = subprocess.run(
        [CHROMIUM, *words, probe.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    seen = re.search(r'<pre id="seen">(.*?)</pre>', completed.stdout, re.DOTALL)
    assert seen is not None, completed.stderr[-2000:]

    return dict(json.loads(html.unescape(seen[1])))
