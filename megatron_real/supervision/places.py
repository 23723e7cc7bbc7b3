"""Where a thread of this process stands: the line of code, and whether it waits for other ranks."""

from __future__ import annotations

import linecache
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_COLLECTIVES = "/torch/distributed/"
# A collective that was begun earlier, or work of the GPU, which may be one: Python stands at the
# call that waits for it.
_WAITS = re.compile(r"\.(wait|synchronize|item|tolist|cpu|numpy)\(|\b(float|int|bool)\(")
_PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Place:
    """A line that a thread executes."""

    where: str = "an unknown place"
    """The line, such as "train_step.py:213 in _reduce"."""
    waits: bool = False
    """Whether it probably waits for other ranks there, in a collective or for a GPU."""

    def __str__(self) -> str:
        return self.where + (", in a collective" if self.waits else "")


def place_of(thread: int) -> Place:
    """Returns where a thread stands now.

    Args:
        thread: its identifier.

    Returns:
        Its innermost line, and the line of this project that led there.
    """
    frame = sys._current_frames().get(thread)
    if frame is None:
        return Place()

    stack = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    innermost = stack[0]

    where = _line(innermost)
    for frame in stack:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            if frame is not innermost:
                where += f", from {_line(frame)}"
            break

    # Python code of torch.distributed below: a collective, or a wait for one.
    waits = any(_COLLECTIVES in frame.f_code.co_filename for frame in stack)
    # A frame that another thread is just leaving may have no line number.
    number: int | None = innermost.f_lineno
    if not waits and number is not None:
        line = linecache.getline(innermost.f_code.co_filename, number)
        waits = _WAITS.search(line) is not None

    return Place(where, waits)


def _line(frame: FrameType) -> str:
    name = Path(frame.f_code.co_filename).name
    return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
