"""Code as an answer: programs of completions against tests that they cannot see.

verifier.py   a row's tests, and the label that comes of them
programs.py   one process a program, with nothing in reach
plain.py      the values that may pass between program and tests
"""

from megatron_real.labels.code.verifier import CodeVerifier

__all__ = ["CodeVerifier"]
