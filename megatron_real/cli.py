"""The command line: `megatron-real COMMAND ...`. The commands are in megatron_real/commands/.

A wrong configuration is refused before anything heavy is imported, in one sentence.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from megatron_real.errors import DONE, INTERRUPTED, ExpectedEnd
from megatron_real.runs.quiet import quiet_libraries

logger = logging.getLogger("megatron_real")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code, one of errors.EXIT_CODES.
    """
    try:
        code = _run_command(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does when it has enough. Python would flush
        # once more at its exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("megatron-real: interrupted before anything was begun", file=sys.stderr)
            print("megatron-real: the same command starts again", file=sys.stderr)
        return INTERRUPTED


def _run_command(arguments: Sequence[str] | None) -> int:
    """Parses the words, sets up logging and runs the command; returns its exit code."""
    # Not at the top: Ctrl-C is heard as such from the first import on.
    from megatron_real.commands import COMMANDS
    from megatron_real.commands.terminal import is_first_rank, say

    parser = build_parser()
    options, later = parser.parse_known_args(arguments)
    takes_overrides = hasattr(options, "overrides")
    # What argparse leaves over are overrides behind an option, or words that nobody knows.
    if later and (not takes_overrides or any(word.startswith("-") for word in later)):
        parser.error(f"unrecognized arguments: {' '.join(later)}")
    if later:
        options.overrides += later  # argparse itself takes them only before the options

    # Our own messages come once, from the first rank; of the libraries below only what is serious.
    console_level = logging.ERROR
    own_level = logging.ERROR
    if is_first_rank():
        console_level = logging.WARNING
        own_level = logging.INFO
    logging.basicConfig(level=console_level, format="%(levelname)s %(name)s: %(message)s")
    logger.setLevel(own_level)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    quiet_libraries()

    try:
        return int(COMMANDS[options.command].run(options))
    except ExpectedEnd as end:
        say(end, on_every_rank=end.on_every_rank)
        return end.exit_code


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    import megatron_real
    from megatron_real.commands import COMMANDS

    parser = _Parser(
        prog="megatron-real",
        description="Trains language models by REAL (Rewards as Labels) on Megatron-LM.",
        epilog="`megatron-real COMMAND --help` has examples of each command.",
    )
    parser.add_argument(
        "--version", action="version", version=f"megatron_real {megatron_real.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = command.SUMMARY
        command_parser = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=command.EXAMPLES,
            # The examples keep their lines.
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add(command_parser)

    # A shell asks for the words that may follow, where argcomplete is installed (docs/commands.md).
    if "_ARGCOMPLETE" in os.environ:
        with suppress(ImportError):
            import argcomplete

            argcomplete.autocomplete(parser)

    return parser


class _Parser(argparse.ArgumentParser):
    """A parser that answers a mistyped word with the word that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2 and a sentence."""
        # argparse's own message is the only place that has the choices.
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong is not None:
            # Whatever quotes this version of Python puts around them.
            known = re.findall(r"[\w.-]+", wrong[2])
            close = difflib.get_close_matches(wrong[1], known, n=1)
            hint = f"known are {', '.join(known)}"
            if close:
                hint = f"did you mean {close[0]}?"
            message = f"there is no {wrong[1]!r}; {hint}"
        self.exit(2, f"megatron-real: {message}\n")
