"""Writes the pages of the documentation that are made of the code:
`python tools/reference.py [--check]`.

docs/metrics.md: every metric. docs/settings.md: every setting. docs/commands.md: every command,
with its help. docs/statuses.md: statuses of rollouts, states of runs, exit codes. docs/api.md:
every public function, with its docstring. `--check` writes nothing and fails where a page is not
what it would write.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import os
import re
import sys
import textwrap
from enum import Enum
from pathlib import Path

import megatron_real
from megatron_real.cli import build_parser
from megatron_real.config.describe import Setting, every_setting
from megatron_real.errors import EXIT_CODES, STATES
from megatron_real.objective.registry import OBJECTIVES
from megatron_real.records import Label, Status
from megatron_real.runs.metric_table import METRICS

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- Written by tools/reference.py; edit the code instead. -->\n"


def metrics_page() -> str:
    """Every metric, by the groups of the trackers."""
    lines = [
        "# Metrics\n",
        NOTE,
        "`metrics.jsonl` of a run directory has a row for each step, and `evaluations.jsonl` one "
        "for each evaluation.",
        "Trackers (TensorBoard, Weights & Biases, MLflow, Trackio) show the same figures in "
        "groups. A figure of nothing, such as the",
        "mean score of right answers where there were none, is null in the files and left out "
        "elsewhere.",
    ]
    group = ""
    for metric in METRICS:
        if metric.tracked.partition("/")[0] != group:
            group = metric.tracked.partition("/")[0]
            lines += [
                f"\n## {group}/\n",
                "| in the files | in trackers | unit | reduction | meaning |",
            ]
            lines.append("| --- | --- | --- | --- | --- |")
        meaning = metric.meaning.replace("|", r"\|")
        lines.append(
            f"| `{metric.name}` | `{metric.tracked}` | {metric.unit} | {metric.reduction} | "
            f"{meaning} |"
        )
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Every setting, by section."""
    lines = [
        "# Settings\n",
        NOTE,
        "`megatron-real config [PREFIX ...]` prints the same, and `megatron-real config --schema` "
        "a JSON schema for editors.",
        "[Configuration](configuration.md) says how files, bases and words of the command line "
        "come together.",
    ]
    section = ""
    for setting in every_setting():
        if setting.path.partition(".")[0] != section:
            section = setting.path.partition(".")[0]
            lines += [f"\n## {section}\n", "| setting | takes | default | meaning |"]
            lines.append("| --- | --- | --- | --- |")
        lines.append(_row(setting))
    return "\n".join(lines) + "\n"


def _row(setting: Setting) -> str:
    meaning = setting.meaning
    # Of no objective in particular, or of every one: nothing to say.
    if len(setting.objectives) not in (0, len(OBJECTIVES)):
        meaning += f" Of {', '.join(setting.objectives)}."
    cells = (f"`{setting.path}`", setting.kind, f"`{setting.default}`", meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def commands_page() -> str:
    """Every command's own help."""
    # argparse wraps at the terminal's width: without this the page would depend on whose it is.
    os.environ["COLUMNS"] = "80"
    lines = [
        "# Commands\n",
        NOTE,
        "Words complete in bash and zsh where `argcomplete` is installed (`pip install "
        "'megatron_real[completion]'`) and the shell",
        'was told: `eval "$(register-python-argcomplete megatron-real)"`.',
    ]
    parser = build_parser()
    (commands,) = [
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ]
    for name, command in commands.choices.items():
        text = re.sub(r"[ \t]+$", "", command.format_help(), flags=re.MULTILINE)
        lines += [f"\n## {name}\n", "```text", text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def statuses_page() -> str:
    """What rollouts, runs and commands say of their end."""
    lines = [
        "# Statuses and exit codes\n",
        NOTE,
        "## Rollouts\n",
        "Each rollout has one status. `status/NAME` in the metrics counts them; "
        "[Labels](labels.md) says which label each",
        "leads to.\n",
        "| status | meaning |",
        "| --- | --- |",
        *(f"| `{name}` | {meaning} |" for name, meaning in member_docs(Status).items()),
        "\n| label | in files | meaning |",
        "| --- | --- | --- |",
    ]
    for name, meaning in member_docs(Label).items():
        lines.append(f"| {name} | {Label[name.upper()].value} | {meaning} |")
    lines += [
        "\n## Runs\n",
        "`status.json` of a run directory has the state of its last start, with the reason and the "
        "time. `before` is the",
        "run's own state where the last start was refused.\n",
        "| state | meaning |",
        "| --- | --- |",
        *(f"| `{state}` | {meaning} |" for state, meaning in STATES.items()),
        "\n## Exit codes\n",
        "torchrun turns every code but 0 into 1; `megatron-real train --nproc N` does not.\n",
        "| code | meaning |",
        "| --- | --- |",
        *(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()),
    ]
    return "\n".join(lines) + "\n"


def member_docs(members: type[Enum]) -> dict[str, str]:
    """Name in lower case -> the docstring under each member of an enum."""
    (body,) = ast.parse(inspect.getsource(members)).body
    assert isinstance(body, ast.ClassDef)
    # Python drops a string under a member: it is read from the source.
    docs = {}
    for assigned, doc in itertools.pairwise(body.body):
        if isinstance(assigned, ast.Assign) and isinstance(doc, ast.Expr):
            (target,) = assigned.targets
            docs[ast.unparse(target).lower()] = ast.literal_eval(doc.value)
    return docs


def api_page() -> str:
    """Every public name, with its signature and its docstring."""
    lines = [
        "# Public functions\n",
        NOTE,
        "`from megatron_real import NAME`. Shapes are in square brackets: R rollouts, T packed "
        "tokens, H the model's width, V",
        "this rank's part of the vocabulary.",
    ]
    for name in megatron_real.__all__:
        public = getattr(megatron_real, name)
        lines += [f"\n## {name}\n", *_described(name, public)]
        if name in CLASSES_WITH_METHODS:
            for method_name, method in inspect.getmembers(public, inspect.isfunction):
                if not method_name.startswith("_"):
                    lines += [f"\n### {name}.{method_name}\n", *_described(method_name, method)]
    return "\n".join(lines) + "\n"


CLASSES_WITH_METHODS = ("RunRecords",)
"""The others are records: their fields are in the page of the settings."""


def _described(name: str, public: object) -> list[str]:
    keyword = "def"
    signature = ""
    if callable(public):
        # Defaults of objects would show their address or their whole contents.
        signature = re.sub(r"=<[^>]*>", "=...", str(inspect.signature(public))).replace("'", "")
    if inspect.isclass(public):
        keyword = "class"
        if name not in CLASSES_WITH_METHODS:
            signature = ""
    code = textwrap.fill(f"{keyword} {name}{signature}", 92, subsequent_indent="    ")
    return ["```python", code, "```\n", "```text", inspect.cleandoc(public.__doc__ or ""), "```"]


PAGES = {
    "metrics.md": metrics_page,
    "settings.md": settings_page,
    "commands.md": commands_page,
    "statuses.md": statuses_page,
    "api.md": api_page,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the generated pages of the documentation.")
    parser.add_argument("--check", action="store_true", help="fail where a page has changed")
    options = parser.parse_args()
    for name, page in PAGES.items():
        file = DOCS / name
        text = page()
        if not options.check:
            file.write_text(text, encoding="utf-8")
        elif not file.exists() or file.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/{name} is not what the code says; run: python tools/reference.py")


if __name__ == "__main__":
    main()
