"""`megatron-real push RUN_DIR REPO`: uploads a run's export and model card to the Hugging Face hub.

Everything is checked before anything is sent, and all files go in one commit: a repository never
holds half a model. The token is the hub's own (`hf auth login`, or HF_TOKEN), and is never shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_real.commands.arguments import add_evaluations
from megatron_real.commands.convert import amount, progress_bar
from megatron_real.commands.terminal import input_checks, say, table
from megatron_real.config.locate import is_run_directory
from megatron_real.errors import Refused
from megatron_real.runs.card import CARD, model_card, with_benchmarks
from megatron_real.runs.directory import RunDirectory
from megatron_real.weights.hf import BIN_INDEX, INDEX, HfWeights, side_files

SUMMARY = "upload a run's export, with its model card, to the Hugging Face hub"
EXAMPLES = """\
examples:
  megatron-real push runs/first NAME/MODEL --dry-run  what would go; no network
  megatron-real push runs/first NAME/MODEL            into a private repository
  megatron-real push runs/first NAME/MODEL --public --eval runs/eval/first

the token is that of `hf auth login` or HF_TOKEN
exit codes: 0 uploaded, 1 the upload failed, 2 the input was refused and nothing
was sent
"""

_WEIGHTS = (".safetensors", ".bin", INDEX, BIN_INDEX)
"""How the names of files of weights end."""


@dataclass(frozen=True)
class Upload:
    """What is sent."""

    export: Path
    """Directory of the weights."""
    files: Mapping[str, bytes | Path]
    """Name in the repository -> its bytes, or the file."""
    left_out: Sequence[str]
    """Names in the export's directory that are no part of it."""

    def size(self, name: str) -> int:
        """Returns the bytes of a file."""
        content = self.files[name]
        if isinstance(content, bytes):
            return len(content)
        return content.stat().st_size


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's directory, or its hf/")
    parser.add_argument("repo", metavar="REPO", help="repository in the hub, as NAME/MODEL")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and list what would go"
    )
    parser.add_argument(
        "--public", action="store_true", help="make a new repository public; default: private"
    )
    add_evaluations(parser, purpose=", for the card")
    parser.add_argument(
        "--message", default="Upload by megatron_real", metavar="TEXT", help="of the commit"
    )


def run(options: argparse.Namespace) -> int:
    """Uploads the export; returns the exit code."""
    with input_checks():
        _check_name(options.repo)
        upload = _gather(Path(options.run_dir), options.evaluations)

        from megatron_real.conversion.verify import open_as_hf, verify

        # Every tensor is read once: what is published must be whole and without NaN.
        with progress_bar(f"checking {upload.export}") as progress:
            report = verify(open_as_hf(upload.export), None, progress=progress)
        if report.problems:
            raise ValueError(f"{upload.export}: {report.problems[0]}; nothing is sent")

    names = sorted(upload.files)
    print(f"{upload.export} -> {options.repo}")
    print(table([[f"  {name}", amount(upload.size(name))] for name in names]))
    if upload.left_out:
        print(f"  left out, as no part of an export: {', '.join(upload.left_out)}")
    print(f"{len(names)} files, {amount(sum(map(upload.size, names)))}; no tensor has a NaN")

    if options.dry_run:
        print("dry run: nothing was sent")
        return 0
    return _guarded(
        lambda: _send(upload, options.repo, private=not options.public, message=options.message)
    )


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(
            f"REPO is {repo!r}, which the hub does not take; give NAME/MODEL"
        ) from error
    if repo.count("/") != 1:
        raise ValueError(f"REPO is {repo!r}; give it with your name or organization, as NAME/MODEL")


def _gather(path: Path, evaluations: Sequence[str]) -> Upload:
    """Finds the files of a run's export.

    Raises:
        ValueError: there is no export, a file of it must not be published, or an evaluation has no
            results.
    """
    # The run's hf/ stands for the run. absolute, because `.` within hf/ has no parent by name.
    owner = path
    if not is_run_directory(path):
        owner = path.absolute().parent
    directory = RunDirectory(owner)
    export = directory.weights
    is_export = is_run_directory(owner) and (path == owner or path.absolute() == export.absolute())
    if not is_export:
        raise ValueError(
            f"{path} is neither a run's directory nor the hf/ in one; give trainer.run_dir of a "
            "run that has ended (`hf upload` sends any other directory)"
        )

    if not (export / "config.json").is_file():
        raise ValueError(
            f"{path} has exported no weights: {export} is written when a run ends, unless "
            "trainer.export=false; let the run end"
        )

    # What belongs to an export, and nothing else that may lie there, is sent.
    weights = HfWeights(export)
    files: dict[str, bytes | Path] = {file.name: file for file in weights.files}
    for file in side_files(export):
        files[str(file.relative_to(export))] = file
    if (export / INDEX).is_file():
        files[INDEX] = export / INDEX

    # A card that somebody has edited is kept; an export of an earlier version has none.
    card = export / CARD
    if card.is_file():
        text = card.read_text(encoding="utf-8")
    else:
        text = model_card(directory)
    if evaluations:
        text = with_benchmarks(text, evaluations)
    files[CARD] = text.encode()

    present = {str(file.relative_to(export)) for file in export.rglob("*") if not file.is_dir()}
    return Upload(export, files, sorted(present - files.keys()))


def _guarded(send: Callable[[], str]) -> int:
    """Sends, and says in one sentence what went wrong, without the token."""
    from huggingface_hub import get_token

    # Known here, so that it can be struck out of whatever the library says.
    token = get_token()
    if not token:
        raise Refused("this machine has no token of the hub; `hf auth login`, or set HF_TOKEN")

    try:
        url = send()
    except Exception as error:  # of a service and its library, which raise what they like
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        reason = f"{type(error).__name__}: {' '.join(lines)}".replace(token, "[token]")
        say(f"the upload failed, and no file of it is in the repository ({reason})")
        say("the same command tries again")
        return 1

    print(url)
    return 0


def _send(upload: Upload, repo: str, *, private: bool, message: str) -> str:
    """Makes the repository where there is none, and one commit with everything.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="megatron_real")
    api.whoami()  # a token that has expired is said before a byte is sent
    api.create_repo(repo, private=private, exist_ok=True)

    # Shards of a model that was there before would be loaded beside the new ones, or instead of
    # them.
    stale = [
        name
        for name in api.list_repo_files(repo)
        # Those in folders stay: a model is loaded from the files beside its config.json.
        if name.endswith(_WEIGHTS) and name not in upload.files and "/" not in name
    ]
    if stale:
        print(f"  deleted in the same commit, as weights of another upload: {', '.join(stale)}")

    # One commit: a reader of the repository sees the old model or the new one.
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content) for name, content in sorted(upload.files.items())
    ]
    operations += [CommitOperationDelete(name) for name in stale]

    commit = api.create_commit(repo, operations, commit_message=message)
    return str(commit.commit_url)
