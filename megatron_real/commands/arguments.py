"""Arguments that several commands have in common."""

from __future__ import annotations

import argparse

from megatron_real.plan.devices import DEVICES


def add_overrides(parser: argparse.ArgumentParser, *, of: str = "of the file") -> None:
    """Adds the words that replace settings."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help=f"replaces a value {of}"
    )


def add_gpu(parser: argparse.ArgumentParser) -> None:
    """Adds --gpu, a kind of GPU that plans know."""
    kinds = sorted(DEVICES)
    parser.add_argument(
        "--gpu",
        choices=kinds,
        default="h100-80g",
        metavar="KIND",
        help=f"kind of GPU: {', '.join(kinds)}; default: h100-80g",
    )


def add_evaluations(parser: argparse.ArgumentParser, purpose: str = "") -> None:
    """Adds --eval, directories of benchmark results."""
    parser.add_argument(
        "--eval",
        action="append",
        # A list as default is safe: argparse copies it before it appends.
        default=[],
        dest="evaluations",
        metavar="DIR",
        help=f"results of `megatron-real eval`{purpose}; may be given many times",
    )
