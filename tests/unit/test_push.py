"""The model card of an export and its upload to the hub: what a dry run lists, what is refused, and
what is sent.
"""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from megatron_real.cli import main
from megatron_real.runs.card import CARD, model_card, versions
from megatron_real.runs.directory import RunDirectory

TOKEN = "hf_" + "s3cretS3cret" * 3
SNAPSHOT = "/home/somebody/.cache/huggingface/hub/models--Qwen--Qwen2.5-1.5B/snapshots/abc"


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[..., Path]) -> RunDirectory:
    """Makes a finished run of a base model in the hub's cache and a file of a private folder."""
    run = RunDirectory(tmp_path / "sums-1")
    run.path.mkdir()
    config = {
        "trainer": {"run_dir": str(run.path), "steps": 2, "seed": 7, "wandb": False},
        "model": {"path": SNAPSHOT, "dtype": "bf16"},
        "data": {"train": "/home/somebody/private/train.jsonl", "heldout": "/x/heldout.jsonl"},
        "labels": {"verifier": "/home/somebody/private/sums.py:check"},
        "objective": {"name": "real", "tau": 0.5, "kl": {"to": "none", "coefficient": 0.0}},
        "rollout": {"num_prompts": 64, "vllm": {"hf_token": TOKEN}},
    }
    run.config.write_text(yaml.safe_dump(config))
    run.status.write_text(json.dumps({"state": "finished", "reason": "", "time": "noon"}))
    steps = [{"step": step, "reward_mean": 0.25 * step} for step in (1, 2)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in steps))
    held = [
        {
            "step": step,
            "heldout/pass_at_1": 0.5 + step / 8,
            "heldout/standard_error": 0.0625,
            "heldout/problems": 40.0,
            "heldout/samples": 2.0,
        }
        for step in (0, 2)
    ]
    run.evaluations.write_text("".join(json.dumps(row) + "\n" for row in held))
    shutil.copytree(tiny_model("qwen2", dtype="bfloat16", num_hidden_layers=2), run.weights)
    (run.weights / CARD).write_text(model_card(run, versions()))
    return run


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Writes what an evaluation leaves in --out."""
    row = {"pass_at_1": 0.125, "standard_error": 0.03, "problems": 30, "samples": 4}
    out = tmp_path / "aime"
    out.mkdir()
    whole = {"model": "sums-1", "benchmarks": {"aime24": row}, "average": row}
    (out / "results.json").write_text(json.dumps(whole))
    return out


def test_a_card_says_what_the_hub_asks_for(run: RunDirectory) -> None:
    card = ModelCard((run.weights / CARD).read_text())
    fields = card.data.to_dict()
    assert fields["base_model"] == "Qwen/Qwen2.5-1.5B"
    assert fields["library_name"] == "transformers"
    assert {"megatron_real", "real", "reinforcement-learning"} <= set(fields["tags"])

    (result,) = fields["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.75, "name": "pass@1"}]
    assert "Mean reward of training rollouts: 0.2500 in the first 1 steps, 0.5000" in card.text
    assert "after 0 steps: 0.5000 (standard error 0.0625), 40 problems, 2 samples each" in card.text
    assert "| objective.tau | 0.5 |" in card.text
    assert "| objective.kl.coefficient | 0.0 |" in card.text
    assert f"| torch | {torch.__version__} |" in card.text


def test_the_card_of_a_checkpoint_ends_with_its_step(run: RunDirectory) -> None:
    whole = ModelCard(model_card(run))
    early = ModelCard(model_card(run, last_step=1))
    assert "* 2 steps." in whole.text and "after 2 steps" in whole.text
    assert "* 1 steps." in early.text and "after 2 steps" not in early.text


def test_a_card_tells_no_path_and_no_secret(run: RunDirectory) -> None:
    card = (run.weights / CARD).read_text()
    assert "somebody" not in card and str(run.path.parent) not in card
    assert TOKEN not in card
    assert "`train.jsonl`" in card and "| sums.py:check |" in card


def test_licence_and_base_model_come_from_the_card_of_the_starting_weights(
    run: RunDirectory, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    start.mkdir()
    config = yaml.safe_load(run.config.read_text())
    config["model"]["path"] = str(start)
    run.config.write_text(yaml.safe_dump(config))

    assert "license" not in ModelCard(model_card(run)).data.to_dict()

    (start / CARD).write_text("---\nlicense: apache-2.0\nbase_model: a/b\nsecret: 1\n---\nWords")
    fields = ModelCard(model_card(run)).data.to_dict()
    assert (fields["license"], fields["base_model"]) == ("apache-2.0", "a/b")
    assert "secret" not in fields

    (start / CARD).write_text("---\n: : [broken\n---\n")
    assert "license" not in ModelCard(model_card(run)).data.to_dict()


def test_a_dry_run_lists_what_would_go_and_sends_nothing(
    run: RunDirectory,
    results: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (run.weights / ".env").write_text(f"HF_TOKEN={TOKEN}")
    (run.weights / "notes").mkdir()
    (run.weights / "notes/diary.txt").write_text("mine")
    words = ["push", str(run.path), "me/sums", "--dry-run", "--eval", str(results)]

    assert main(words) == 0

    out = capsys.readouterr().out
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert {"README.md", "config.json", "model.safetensors"} <= listed
    assert "left out, as no part of an export: .env, notes/diary.txt" in out
    assert out.splitlines()[-1] == "dry run: nothing was sent"
    assert TOKEN not in out
    assert "aime24" not in (run.weights / CARD).read_text()  # the run's own files stay as they are


def test_an_export_of_an_earlier_version_gets_a_card(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.weights / CARD).unlink()
    assert main(["push", str(run.weights), "me/sums", "--dry-run"]) == 0
    assert "README.md" in capsys.readouterr().out


def spoil(run: RunDirectory) -> None:
    """Puts a NaN into the weights."""
    tensors = load_file(run.weights / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, run.weights / "model.safetensors", metadata={"format": "pt"})


def link_out(run: RunDirectory) -> None:
    """Replaces a file of the export by a link to a file elsewhere."""
    (run.path.parent / "passwords.txt").write_text("secret")
    (run.weights / "vocab.txt").symlink_to(run.path.parent / "passwords.txt")


REFUSALS: dict[str, tuple[Callable[[RunDirectory], object], list[str], str]] = {
    "no run": (lambda run: run.status.unlink(), [], "is neither a run's directory nor the hf/"),
    "no export": (lambda run: shutil.rmtree(run.weights), [], "has exported no weights"),
    "a cut export": (
        lambda run: (run.weights / "model.safetensors").unlink(),
        [],
        "has no model.safetensors",
    ),
    "NaN": (spoil, [], "model.norm.weight has 1 NaN values; nothing is sent"),
    "a link": (link_out, [], "an export would publish that file"),
    "no results": (lambda run: None, ["--eval", "nowhere"], "holds no results"),
    "no name": (lambda run: None, ["REPO", "sums"], "give it with your name or organization"),
    "a wrong name": (lambda run: None, ["REPO", "me/a b"], "which the hub does not take"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_an_incomplete_export_is_refused_in_one_sentence(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    change, words, sentence = REFUSALS[case]
    change(run)
    repo = "me/sums"
    if words[:1] == ["REPO"]:
        repo = words[1]
        words = []
    assert main(["push", str(run.path), repo, "--dry-run", *words]) == 2
    output = capsys.readouterr()
    assert sentence in output.err and len(output.err.splitlines()) == 1
    assert "Traceback" not in output.err


class Hub(BaseHTTPRequestHandler):
    """Answers the calls that an upload makes to the hub, and records them.

    The client is huggingface_hub itself.
    """

    present = ("README.md", "model-00001-of-00002.safetensors", "runs/old.bin")
    calls: ClassVar[list[tuple[str, str, bytes]]]
    refuses = False

    def log_message(self, *words: object) -> None:
        """Logs nothing."""

    def _answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        """Answers who the token belongs to, and serves the files of the repository."""
        self.calls.append(("GET", self.path, b""))
        if "whoami" in self.path:
            self._answer({"type": "user", "name": "me", "auth": {}})
        elif "/tree/" in self.path:
            self._answer([{"type": "file", "path": p, "oid": "0", "size": 1} for p in self.present])
        else:
            siblings = [{"rfilename": name} for name in self.present]
            self._answer({"id": "me/sums", "sha": "0" * 40, "siblings": siblings})

    def do_POST(self) -> None:
        """Answers the creation of a repository, how each file is to be sent, and the commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.calls.append(("POST", self.path, body))
        if self.path.endswith("/repos/create"):
            self._answer({"url": "http://127.0.0.1/me/sums", "id": "me/sums"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            regular = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]
            self._answer({"files": regular})
        elif self.refuses:
            self._answer({"error": f"no space left for {TOKEN}"}, status=507)
        else:
            self._answer({"commitUrl": "http://127.0.0.1/me/sums/commit/1", "commitOid": "1" * 40})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """Starts a server for each test, which the client takes for the hub."""

    class Own(Hub):
        calls: ClassVar[list[tuple[str, str, bytes]]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    # The client has read its environment when it was imported.
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield Own
    server.shutdown()
    server.server_close()


def test_an_upload_is_one_commit_without_the_weights_of_another_model(
    run: RunDirectory, results: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["push", str(run.path), "me/sums", "--eval", str(results)])
    output = capsys.readouterr()
    assert code == 0, output.err
    assert output.out.splitlines()[-1] == "http://127.0.0.1/me/sums/commit/1"
    assert TOKEN not in output.out + output.err

    (made,) = [json.loads(body) for _, path, body in hub.calls if path.endswith("/create")]
    assert made.get("private") or made.get("visibility") == "private"

    (commit,) = [body for _, path, body in hub.calls if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]

    assert deleted == ["model-00001-of-00002.safetensors"]

    weights = run.weights / "model.safetensors"
    assert sent["model.safetensors"] == weights.read_bytes()

    names = [one["dataset"]["name"] for one in _results(sent[CARD].decode())]
    assert names == ["held-out problems (heldout.jsonl)", "aime24"]


def _results(card: str) -> list[dict[str, Any]]:
    return list(ModelCard(card).data.to_dict()["model-index"][0]["results"])


@pytest.mark.parametrize("trouble", ["no token", "refused"])
def test_an_upload_that_fails_is_reported_in_one_sentence_without_the_token(
    run: RunDirectory,
    hub: type[Hub],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    monkeypatch.setattr(hub, "refuses", trouble == "refused")
    if trouble == "no token":
        monkeypatch.setenv("HF_TOKEN", "")
    code = main(["push", str(run.path), "me/sums"])
    output = capsys.readouterr()

    assert TOKEN not in output.out + output.err

    if trouble == "no token":
        assert code == 2
        assert "has no token of the hub; `hf auth login`, or set HF_TOKEN" in output.err
        assert not hub.calls
    else:
        assert code == 1
        assert "the upload failed, and no file of it is in the repository" in output.err
        assert "no space left for [token]" in output.err
