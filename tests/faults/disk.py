"""A file system that delays, fails or lies, for processes that a test starts; see disk.c."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("disk.c")


def missing() -> str:
    """Returns why such a file system cannot be made here, or an empty string where it can."""
    if shutil.which("gcc"):
        return ""
    return "gcc is not installed, which compiles tests/faults/disk.c"


class Disk:
    """The rules that hold at present, and the environment in which they hold."""

    def __init__(self, folder: Path) -> None:
        library = folder / "disk.so"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, SOURCE, "-ldl"],
            check=True,
            timeout=240,
        )
        self._rules = folder / "rules"
        self.environment = {"LD_PRELOAD": str(library), "FAULTS": str(self._rules)}
        self.rules()

    def rules(self, *lines: str) -> None:
        """Replaces all rules, for processes that run already too."""
        # Renamed into its place: a process never reads half of the rules.
        new = self._rules.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in lines))
        new.replace(self._rules)
