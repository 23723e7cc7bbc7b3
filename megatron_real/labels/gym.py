"""reasoning_gym's scorers, with what some of them evaluate replaced.

So no answer is run as Python. Classed by reading every `score_answer` of reasoning_gym 0.1.25 and
what it calls:

    READERS      96 of 106 tasks compare text, numbers or JSON: their scorers are called as they
                 are.
    LISTS        eval() of the answer, to read a Python list; here ast.literal_eval reads it.
    NUMBERS      sympy.parse_expr of the answer, which is eval(); here the answer has to be
                 arithmetic first, and the check runs in a clean child all the same.
    EXPRESSIONS  the same with variables and elementary functions.
    composite    is refused: its rows name further tasks.

Some scorers pay wrong answers in full, the same one for every question: `_is_right` checks theirs
once more.

Golds and metadata are the dataset's own and trusted: number_sorting and bitwise_arithmetic evaluate
those. A task that is not in the table runs in a clean child behind the sandbox. So does every task
of another version, in a child of a worker that has read no request: nothing of other checks is in
its memory.
"""

from __future__ import annotations

import ast
import functools
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from importlib import metadata as packages
from typing import Any

VERSION = "0.1.25"
"""The version whose scorers were read."""

LISTS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
NUMBERS = frozenset({"countdown", "puzzle24"})
EXPRESSIONS = frozenset(
    {"intermediate_integration", "polynomial_multiplication", "simple_integration"}
)
_READERS = """
    ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf
    binary_alternation bitwise_arithmetic boxnet caesar_cipher calendar_arithmetic chain_sum
    circuit_logic codeio coin_flip color_cube_rotation complex_arithmetic count_bits count_primes
    course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery
    family_relationships figlet_font fraction_simplification futoshiki game_of_life
    game_of_life_halting gcd graph_color group_anagrams gsm_symbolic isomorphic_strings jugs
    kakurasu knight_swap knights_knaves largest_island lcm leg_counting letter_counting
    letter_jumble list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku modulo_grid
    needle_haystack number_filtering number_format number_sequence number_sorting
    palindrome_generation palindrome_partitioning path_star polynomial_equations pool_matrix
    power_function prime_factorization products propositional_logic quantum_lock ransom_note rearc
    rectangle_count rotate_matrix rotten_oranges rubiks_cube rush_hour self_reference
    sentence_reordering shortest_path simple_equations simple_geometry sokoban spell_backward
    string_manipulation string_splitting string_synthesis sudoku survo syllogism time_intervals
    tower_of_hanoi tsumego word_ladder word_sequence_reversal word_sorting zebra_puzzles
"""
READERS = frozenset(_READERS.split())
"""Tasks whose scorers compare text, numbers or JSON."""

_FUNCTIONS = frozenset([
    "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt",
    "Abs",
])  # fmt: skip
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.UAdd, ast.USub)
_EXACT_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_CHARACTERS = re.compile(r"[0-9A-Za-z.+\-*/() ]+")
_UNREADABLE = ")"
"""Stands in for an answer that is no arithmetic: no parser reads it, so the scorer gives what it
gives for those."""


def runs_text(metadata: Mapping[str, Any]) -> bool:
    """Returns whether the scorer of this row's task may run the answer.

    Its check then needs a child of its own.
    """
    task = metadata.get("source_dataset")
    return task not in READERS | LISTS or not is_read_version()


def score(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """Returns the reward of the row's task for the answer.

    It is 0 where the scorer fails on the answer and not on the gold answer.

    Raises:
        KeyError: the row's extra_info has no `source_dataset`.
        ValueError: reasoning_gym has no such task, or the task is refused.
        Exception: the scorer fails on the gold answer too.
    """
    task = metadata["source_dataset"]
    if task == "composite":
        raise ValueError(
            "rows of composite are refused: give extra_info.source_dataset its own task"
        )
    scorer = _scorer(task)

    # These scorers evaluate what they are given.
    if task in NUMBERS and not is_arithmetic(answer, names=False):
        answer = _UNREADABLE
    if task in EXPRESSIONS and not is_arithmetic(answer, names=True):
        answer = _UNREADABLE

    row = {"answer": gold, "metadata": dict(metadata)}
    try:
        reward = float(scorer(answer, row))
        # Only full pay is checked once more: some scorers give it to wrong answers.
        is_paid = reward < 1.0 or _is_right(answer, gold, metadata)
    except MemoryError:
        raise
    except Exception:  # a scorer that does not know what it was given raises whatever it likes
        # A failed check is no negative, and many of them end the run: an answer must not be able to
        # choose that. Where the gold answer fails as well, the row is at fault, and its failure is
        # raised.
        scorer(gold, row)
        return 0.0

    if not is_paid:
        return 0.0
    return reward


def _is_right(answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
    """Returns whether an answer that its task's scorer pays in full is right.

    Of the tasks that are not named here, every one is.
    """
    match metadata["source_dataset"]:
        case "complex_arithmetic":
            # Its distance to anything is NaN, and min(1.0, NaN) is 1.0.
            return "nan" not in answer.lower()
        case "coin_flip":
            # A prefix of the shorter number counts as all of it: 0 would be every probability.
            return abs(Fraction(answer.replace(",", "")) - Fraction(gold)) <= Fraction(1, 10_000)
        case "game_of_life_halting":
            # bool() of every text is True.
            return answer.strip().lower() == gold.strip().lower()
        case "puzzle24":
            # The numbers of another puzzle would do, and what is rounded down to 24.
            return _solves(answer, metadata["numbers"], 24)
        case "countdown":
            return _solves(answer, metadata["numbers"], metadata["target"])
    return True


def _solves(answer: str, numbers: Sequence[int], target: int) -> bool:
    """Returns whether `answer` makes exactly `target` of these whole numbers.

    Each is used once, by + - * / and parentheses.
    """
    used: list[int] = []

    def value(node: ast.AST) -> Fraction:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.Constant(value=int(number)):
                used.append(number)
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return value(operand)
            case ast.BinOp(left=left, op=operation, right=right) if (
                type(operation) in _EXACT_OPERATORS
            ):
                return _EXACT_OPERATORS[type(operation)](value(left), value(right))
        raise ValueError("no arithmetic of whole numbers")

    try:
        result = value(ast.parse(answer.strip(), mode="eval"))
    # Brackets may nest as deep as the answer is long: parsing and `value` recurse into them.
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return result == target and sorted(used) == sorted(numbers)


def is_arithmetic(text: str, *, names: bool) -> bool:
    """Returns whether `text` is numbers, + - * / **, and parentheses.

    It is parsed as Python and not run. A variable is one letter, or pi. Anything else could be read
    differently by a scorer that looks for numbers in the text: a comment full of them, an
    underscore within one.

    Args:
        text: an answer.
        names: variables and elementary functions are arithmetic too.
    """
    if not _CHARACTERS.fullmatch(text.strip()):
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False

    # A name that is called must be a function; elsewhere it is a variable.
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return all(_is_arithmetic_node(node, names, id(node) in called) for node in ast.walk(tree))


def _is_arithmetic_node(node: ast.AST, names: bool, is_called: bool) -> bool:
    match node:
        case ast.Expression() | ast.BinOp() | ast.UnaryOp() | ast.Load():
            return True
        case ast.operator() | ast.unaryop():
            return isinstance(node, _OPERATORS)
        case ast.Constant(value=value):
            # Not isinstance: True is an int.
            return type(value) in (int, float)
        case ast.Name(id=name) if is_called:
            return names and name in _FUNCTIONS
        case ast.Name(id=name):
            return names and (len(name) == 1 or name == "pi")
        case ast.Call(func=ast.Name(), args=[argument], keywords=[]):
            return names and not isinstance(argument, ast.Starred)
    return False


@functools.cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym import get_score_answer_fn

    scorer: Any = get_score_answer_fn(task)
    if task in LISTS:
        # A global of the scorer's module hides the builtin of that name from it.
        vars(sys.modules[scorer.__func__.__module__])["eval"] = ast.literal_eval
    score_answer: Callable[[str, dict[str, Any]], float] = scorer
    return score_answer


@functools.cache
def is_read_version() -> bool:
    """Returns whether the library is the one whose scorers were read.

    First asked while its files are in sight.
    """
    return packages.version("reasoning_gym") == VERSION
