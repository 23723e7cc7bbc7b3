"""Pairs of answers that mean the same, and pairs that do not: each gold in twenty spellings of
either sort.

The golds are those of tests/samples and one or more of every kind that docs/labels.md lists. A
completion is a whole text, so that boxes and thinking vary too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

SAMPLES = Path(__file__).parents[1] / "samples"
NUM_SPELLINGS = 20


class Pair(NamedTuple):
    """A completion, the gold answer, and whether they agree."""

    kind: str
    completion: str
    gold: str
    agrees: bool


# By kind: golds, other spellings of each (the markup around it is varied for all kinds alike), and
# other answers.
TABLE: dict[str, list[tuple[str, list[str], list[str]]]] = {
    "fraction": [
        (
            "\\frac{3}{4}",
            ["3/4", "0.75", "\\dfrac34", "\\frac{6}{8}", "75\\%", "\u00be",
             "\\frac{3}{4} \\text{ cups}"],
            ["\\frac{4}{3}", "-\\frac{3}{4}", "0.7499", "3, 4", "(3, 4)", "\\frac{3}{4} x",
             "\\frac34 = \\frac12", "\\frac{3}{4}, \\frac{1}{4}", "\\sqrt{\\frac{3}{4}}",
             "\\frac{3}{4} \\text{ or more}", "7.5", "\\frac{3}{40}", "34", "\\frac{3}{4}i",
             "\\pm\\frac34", "[0, \\frac34]", "\\frac{3}{4} + 10^{-8}", "4/3", "0.075", "x > 3/4"],
        ),
        (
            "-\\frac{7}{2}",
            ["-3.5", "-7/2", "-3\\frac{1}{2}", "\\frac{-7}{2}", "\u22123.5", "-3 1/2",
             "\u2013 7/2"],
            ["3.5", "-\\frac{2}{7}", "-3.6", "-35", "-3, 5", "\\frac72", "-\\frac{7}{2} + x",
             "-7, 2", "(-7, 2)", "-3", "-4", "-0.35", "\\pm 3.5", "-\\frac{7}{2}, 1",
             "-3\\frac{1}{3}", "x = 3.5", "-\\frac{49}{4}", "|-3.5|", "\\text{not } -3.5",
             "-3.5 = 3.5"],
        ),
    ],
    "e-notation": [
        (
            "2.16e5",
            ["216000", "2.16 \\times 10^5", "2.16\\cdot10^{5}", "216{,}000", "216,000", "21.6e4",
             "2.16E5"],
            ["2.16", "216", "2.16e6", "2.16 \\times 10^{-5}", "21600", "2.16 e", "2.165",
             "2.16 \\times 10", "2.17e5", "-2.16e5", "216001", "2.16e5, 1", "(2, 16)", "2.16^5",
             "e", "2160000", "\\sqrt{216000}", "0.216e5", "2.16 \\times 5", "x < 216000"],
        ),
        (
            "4.2e-8",
            ["4.2 \\times 10^{-8}", "0.000000042", "42e-9", "42 \\times 10^{-9}", "4.20e-8",
             "\\frac{42}{10^9}", "4.2\\text{e}-8"],
            ["4.2e8", "4.3e-8", "0", "4.2e-9", "0.00000042", "-4.2e-8", "4.2", "4.2 - 8",
             "0.000000043", "0.0000000042", "8.4e-8", "4.2e-80", "\\frac{42}{10^8}",
             "4.1 \\times 10^{-8}", "10^{-8}", "0.000001", "4.2e-8 x", "4, 2", "4.2e-8, 0", "42"],
        ),
    ],
    "recurring": [
        (
            "\\frac{1}{3}",
            ["0.\\overline{3}", "0.\\dot{3}", "0.33333333", "\u2153", "1/3", "\\frac{2}{6}",
             "33\\frac{1}{3}\\%"],
            ["0.3", "0.33", "0.3333", "0.34", "3", "1, 3", "(1, 3)", "0.\\overline{31}",
             "0.\\dot{1}\\dot{3}", "\\frac23", "-\\frac13", "0.333334", "33",
             "\\frac{1}{3}, \\frac{2}{3}", "x = 3", "\\frac{1}{30}", "3^{1}", "1.3", "\\sqrt{3}",
             "\\frac{1}{3} \\pm 1"],
        ),
    ],
    "root": [
        (
            "5\\sqrt{2}",
            ["\\sqrt{50}", "\u221a50", "5\u221a2", "5 \\cdot \\sqrt{2}", "\\frac{10}{\\sqrt{2}}",
             "5\\cdot2^{1/2}", "\\sqrt{2} \\cdot 5"],
            ["\\sqrt{5}", "2\\sqrt{5}", "5", "\\sqrt{52}", "7.07", "-5\\sqrt{2}", "5\\sqrt{2} + 1",
             "5, \\sqrt{2}", "\\pm 5\\sqrt{2}", "\\sqrt[3]{50}", "10\\sqrt{2}", "5\\sqrt{3}", "50",
             "5\\sqrt{2}i", "\\frac{5}{\\sqrt{2}}", "52", "(5, \\sqrt{2})", "5 + \\sqrt{2}",
             "5\\sqrt{2}x", "5\\sqrt2 = 7"],
        ),
        (
            "1+\\sqrt{3}",
            ["\\sqrt{3}+1", "\\sqrt3 + 1", "1 + \u221a3", "\\frac{2 + 2\\sqrt{3}}{2}",
             "1+3^{\\frac12}", "1 + \\sqrt{3} \\text{ cm}", "2 + \\sqrt{3} - 1"],
            ["1-\\sqrt{3}", "1\\pm\\sqrt{3}", "\\sqrt{4}", "1, \\sqrt{3}", "2.73", "\\sqrt{3}",
             "1+\\sqrt{2}", "-1-\\sqrt{3}", "1 \\sqrt{3}", "1+\\sqrt{13}", "2+\\sqrt{3}",
             "1+\\sqrt{3}, 1-\\sqrt{3}", "\\sqrt{3}-1", "1+3", "1+\\sqrt[3]{3}", "(1, \\sqrt{3})",
             "1+\\sqrt{3}i", "1 = \\sqrt{3}", "x > 1+\\sqrt{3}", "(1+\\sqrt{3})^2"],
        ),
    ],
    "angle": [
        (
            "45^\\circ",
            ["45", "45\u00b0", "45^{\\circ}", "45 \\text{ degrees}", "\\frac{\\pi}{4}",
             "45\\degree", "\\angle ABC = 45^\\circ"],
            ["54^\\circ", "45 \\text{ radians}", "-45^\\circ", "135^\\circ", "4.5^\\circ",
             "\\frac{\\pi}{2}", "45, 135", "45^\\circ, 135^\\circ", "\\frac{\\pi}{45}", "450",
             "45 \\text{ minutes}", "46^\\circ", "\\pi", "0", "90^\\circ", "45x", "(4, 5)",
             "45^\\circ = 54^\\circ", "4^\\circ", "\\sqrt{45}"],
        ),
    ],
    "unit": [
        (
            "12 \\text{ cm}",
            ["12", "12 \\text{ centimeters}", "12\\mathrm{cm}", "12 cm", "12\\,\\text{cm}",
             "12.0 \\text{ cm}", "\\frac{24}{2} \\text{ cm}"],
            ["12 \\text{ m}", "12 \\text{ km}", "12 \\text{ cm}^2", "21 \\text{ cm}",
             "12 \\text{ mm}", "12 \\text{ is wrong}", "1.2 \\text{ cm}", "12 \\text{ inches}",
             "120", "-12 \\text{ cm}", "12 \\text{ or } 13 \\text{ cm}", "12 \\text{ cm}, 5",
             "12 \\text{ hours}", "12x", "144 \\text{ cm}", "\\text{12 cm or 13 cm}",
             "12_7 \\text{ or not}", "13 cm", "12 \\text{ kg}", "12 \\text{ dollars}"],
        ),
        (
            "\\$18",
            ["18", "18 \\text{ dollars}", "\\$18.00", "18.00", "\\text{\\$}18",
             "18 \\text{ dollar}", "\\frac{36}{2}"],
            ["\\text{\u00a3}18", "\u20ac18", "\\$81", "1.8", "\\$18.50", "18 \\text{ cents}", "-18",
             "\\$18, \\$19", "18 \\text{ euros}", "\\$19", "\\$180", "17", "18\\%  \\text{ or } 19",
             "18 x", "(1, 8)", "\\sqrt{18}", "18^2", "18 \\text{ km}", "19 = 18", "none"],
        ),
    ],
    "base": [
        (
            "1011_2",
            ["1011_{2}", "1011", "1011_{\\text{two}}", "(1011)_2", "1011_{ 2 }", "1011\u2082",
             "\\text{1011}_2"],
            ["1011_3", "1101_2", "1011_{10}", "11", "11_{10}", "1011_8", "10110_2", "101_2",
             "1011_2, 1", "1011_{16}", "-1011_2", "111_2", "1010_2", "1011.1", "1011_2 + 1_2", "2",
             "0", "1012", "1011x", "\\frac{1}{1011}"],
        ),
    ],
    "letters": [
        (
            "HHT",
            ["\\text{HHT}", "\\mathrm{HHT}", "\\textbf{HHT}", "H H T", "\\text{HHT.}", "$HHT$",
             "\\mathbf{HHT}"],
            ["THH", "HTH", "HH", "HHTT", "TTH", "H", "T", "HHH", "HT", "H, H, T", "HHT, THH", "2HT",
             "TTT", "H^2T", "HHT1", "(H, H)", "1", "HTT", "\\text{THH}", "no"],
        ),
    ],
    "words": [
        (
            "\\text{Monday}",
            ["Monday", "\\text{monday}", "\\textbf{Monday}", "\\mathrm{Monday}", "\\text{Monday.}",
             "MONDAY", "\\textit{Monday}"],
            ["Tuesday", "\\text{Sunday}", "M", "1", "\\text{not Monday}",
             "\\text{Monday or Tuesday}", "Mondays and Fridays", "day", "\\text{Friday}", "yadnoM",
             "\\text{no}", "\\text{yes}", "0", "\\text{Monday, Tuesday}", "x", "Mon", "\\emptyset",
             "\\text{Mon day}", "(1, 2)", "\\text{Saturday}"],
        ),
        (
            "\\emptyset",
            ["\\varnothing", "\\{\\}", "\u2205", "\\{ \\}", "\\text{\u2205}", "x \\in \\emptyset",
             "\\left\\{ \\right\\}"],
            ["0", "\\{0\\}", "\\infty", "\\mathbb{R}", "\\text{all}", "1", "\\{1\\}", "x", "()",
             "\\phi", "[0, 1]", "\\text{yes}", "-1", "\\{\\emptyset, 1\\}", "(0, 0)", "o",
             "\\{1, 2\\}", "\\text{one}", "\\pi", "i"],
        ),
    ],
    "choice": [
        (
            "C",
            ["(C)", "\\text{C}", "\\textbf{(C)}", "C.", "C: a triangle", "(C) 15", "\\mathrm{C}"],
            ["A", "B", "(D)", "D. 15", "AC", "C, D", "c_1", "CC", "3", "(C, D)", "\\text{B}", "C^2",
             "C \\text{ or } D", "2C", "E", "-C", "\\text{none}", "A: C", "(B) C", "C + 1"],
        ),
        (
            "\\textbf{(B)}\\ 5",
            ["B", "(B)", "5", "(B) 5", "\\text{B}", "B. 5", "B) 5"],
            ["A", "(C) 5", "6", "(B) 6", "5, 6", "C", "B + 5", "25", "5B", "-5", "\\frac{1}{5}",
             "0.5", "B, C", "A. 5", "(A) 6", "(5, 5)", "B \\text{ or } C", "BB", "5x", "x < 5"],
        ),
    ],
    "tuple": [
        (
            "(3,0)",
            ["(3, 0)", "\\left(3, 0\\right)", "\\langle 3, 0 \\rangle", "(3.0, 0)",
             "(\\frac{6}{2}, 0)", "\\left( 3 , 0 \\right)", "(x, y) = (3, 0)"],
            ["(0, 3)", "[3, 0]", "(3, 0, 0)", "\\{3, 0\\}", "(-3, 0)", "30", "(3, 1)", "3",
             "(3, 0]", "[3, 0)", "(30)", "(3, 0), (0, 3)", "0, 3", "(0, 0)", "(3; 1)",
             "(\\frac{1}{3}, 0)", "3 < x < 0.5", "(3, x)", "x = 3", "(3)(0)"],
        ),
    ],
    "interval": [
        (
            "[1,2)",
            ["1 \\le x < 2", "[1, 2)", "\\left[1, 2\\right)", "x \\in [1, 2)", "2 > x \\geq 1",
             "1 \u2264 x < 2", "\\{x \\mid 1 \\le x < 2\\}"],
            ["[1, 2]", "(1, 2)", "(1, 2]", "1 < x < 2", "1 \\le x \\le 2", "1, 2", "x < 2",
             "[1, 3)", "[0, 2)", "[2, 1)", "x \\ge 1", "\\{1, 2\\}", "[1, 2) \\cup (3, 4)", "12",
             "1", "1 \\le 2", "(-\\infty, 2)", "[1, \\infty)", "[-1, 2)", "x = 1"],
        ),
        (
            "(-\\infty,0)\\cup(1,\\infty)",
            ["x < 0 \\text{ or } x > 1", "(1, \\infty) \\cup (-\\infty, 0)",
             "x > 1 \\text{ or } x < 0", "(-\\infty, 0) \u222a (1, +\\infty)",
             "x \\in (-\\infty, 0) \\cup (1, \\infty)", "\\{x \\mid x < 0 \\text{ or } x > 1\\}",
             "0 > x \\text{ or } 1 < x"],
            ["(0, 1)", "[0, 1]", "(-\\infty, 0]\\cup[1, \\infty)", "x < 0", "x > 1",
             "(-\\infty, 1)\\cup(0, \\infty)", "(-\\infty, \\infty)", "x < 0 \\text{ and } x < 1",
             "(-\\infty, 0) \\cap (1, \\infty)", "0, 1", "(-\\infty, 0)", "\\emptyset",
             "\\mathbb{R}", "(-\\infty, 0) \\cup (2, \\infty)", "(-\\infty, 0), 1", "x \\ne 0",
             "x \\le 0 \\text{ or } x \\ge 1", "(1, \\infty)", "0 < x < 1", "\\{0, 1\\}"],
        ),
    ],
    "set": [
        (
            "2,3",
            ["3, 2", "\\{2, 3\\}", "2 \\text{ and } 3", "x = 2 \\text{ or } x = 3", "2; 3",
             "2\uff0c3", "x = 2, x = 3"],
            ["2", "3", "2, 4", "23", "2.3", "2, 3, 4", "(3, 2)", "-2, -3", "2, -3", "2 + 3",
             "\\{2\\}", "[2, 3]", "2, 2", "3, 3", "2 = 3", "\\frac23", "2 < x < 3", "x = 2",
             "\\pm 2", "2, 3, 3"],
        ),
        (
            "\\pm 4",
            ["4, -4", "-4, 4", "\\{4, -4\\}", "x = 4 \\text{ or } x = -4", "+4, -4", "x = \\pm 4",
             "4 \\text{ and } -4"],
            ["4", "-4", "\\pm 2", "16", "\\pm 5", "0, 4", "(4, 4)", "4, 4", "-4, -4", "\\pm 4, 0",
             "\\pm 4i", "\\sqrt{16}", "|4|", "[-4, 4]", "4 - 4", "-4 < x < 4", "x = 4", "\\mp",
             "44", "\\pm 40"],
        ),
    ],
    "expression": [
        (
            "x^2-3x-10",
            ["x^{2} - 3x - 10", "(x-5)(x+2)", "-10 - 3x + x^2", "x\u00b2 - 3x - 10", "(x+2)(x-5)",
             "x(x-3)-10", "x^2 - 3 \\cdot x - 10"],
            ["x^2+3x-10", "x^2-3x+10", "(x+5)(x-2)", "x^2-3x", "x^2", "-10", "x^2-3x-10, 1",
             "y^2-3y-10", "x^3-3x-10", "2x^2-6x-20", "x^2-3x-10 > 0", "x = 5", "(x-5), (x+2)",
             "x^2-3x-100", "x-3x-10", "X^2-3X-10", "\\sqrt{x^2-3x-10}", "x^2-3-10x", "0", "x"],
        ),
        (
            "y=2x+3",
            ["y = 3 + 2x", "f(x) = 2x + 3", "y=2x+3", "2x + 3", "y = 2(x + 1.5)", "y - 2x = 3",
             "y = 2 \\cdot x + 3"],
            ["y=2x-3", "y=3x+2", "x=2y+3", "y=2x", "y = 3", "2x+3 = 0", "y > 2x+3", "z = 2x+3",
             "y=2x+4", "2x", "3", "y = 2x+3, 1", "y=-2x+3", "y = 2x^2+3", "(2, 3)", "y \\ne 2x+3",
             "y = 23", "x + y = 3", "y = 2y + 3", "f(x) = 3x + 2"],
        ),
        (
            "\\frac{\\pi}{2}",
            ["\\pi/2", "pi/2", "90^\\circ", "\u03c0/2", "\\frac12\\pi", "0.5\\pi",
             "\\frac{1}{2} \\cdot \\pi"],
            ["\\pi", "2\\pi", "1.57", "\\frac{\\pi}{3}", "\\frac{2}{\\pi}", "-\\frac{\\pi}{2}",
             "180^\\circ", "\\frac{\\pi}{2}, \\pi", "1/2", "\\pi^2", "\\frac{\\pi}{2} + 1",
             "\\frac{x}{2}", "2", "\\pm\\frac{\\pi}{2}", "\\frac{\\pi}{20}", "45^\\circ",
             "\\frac{p}{2}", "(\\pi, 2)", "\\frac{\\pi^2}{2}", "\\frac{\\pi}{2} k"],
        ),
        (
            "14-i",
            ["14 - i", "-i + 14", "14.0 + -1.0i", "14 - 1i", "14-\\sqrt{-1}", "14 - \\mathrm{i}",
             "14 + (-1)i"],
            ["14+i", "14", "-14-i", "14-2i", "14-1", "13", "i", "-i", "14i", "14, -i", "14-j",
             "(14, -1)", "\\pm i", "14 - i, 14 + i", "1-14i", "15", "196", "14-i^2", "41-i",
             "14 - x"],
        ),
    ],
}  # fmt: skip

# Ways to write X in the same text; the first few carry other boxes and thinking.
WRAPPED = (
    "so \\boxed{X}", "$\\boxed {X}$", "\\fbox{X}", "<think>\\boxed{0}</think> \\boxed{X}",
    "\\boxed{X}. I put it in a box: \\boxed{}", "\\boxed{X} and again \\[\\boxed{X}\\]",
    "\\[ \\boxed{ X } \\]", "\\boxed{$X$}", "\\boxed{X.}", "\\boxed{\\text{Answer: } X}",
    "\\boxed{\\displaystyle X}", "\\boxed{{X}}", "\\boxed{\\color{red}{X}}", "\\boxed{X\\\\}",
    "\\boxed{**X**}", "[THINK]no[/THINK]\\boxed{X}", "\\boxed{\\boxed{X}}", "\\boxed{\\, X \\quad}",
    "\\boxed{\\textcolor{blue}{X}}", "\\boxed{The answer is X}",
)  # fmt: skip


def pairs() -> list[Pair]:
    """Returns every gold in `NUM_SPELLINGS` completions that agree and in as many that do not."""
    all_pairs = []
    for kind, entries in TABLE.items():
        for gold, spelled, others in entries:
            # Seven other spellings, and the gold's own text in thirteen of the wrappings.
            texts = ["so \\boxed{X}".replace("X", text) for text in spelled]
            texts += [
                wrapped.replace("X", gold) for wrapped in WRAPPED[: NUM_SPELLINGS - len(texts)]
            ]
            all_pairs += [Pair(kind, text, gold, True) for text in texts]
            all_pairs += [Pair(kind, f"so \\boxed{{{text}}}", gold, False) for text in others]
    for gold in sorted(set(sample_numbers())):
        all_pairs += _number_pairs(gold)
    return all_pairs


def sample_numbers() -> Iterator[str]:
    """Returns the golds of tests/samples that are plain numbers; the others are in the table."""
    for file in sorted(SAMPLES.glob("*.json*")):
        text = file.read_text(encoding="utf-8")
        if text.startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines()]
        for row in rows:
            gold = (
                row.get("answer")
                or row.get("Answer")
                or (row.get("reward_model") or {}).get("ground_truth")
            )
            if str(gold).replace(".", "").isdigit():
                yield str(gold)


def _number_pairs(gold: str) -> list[Pair]:
    value = Fraction(gold)
    n = gold
    double = str(2 * value)
    more = str(value + 1)
    if value.denominator == 1:
        fraction = f"\\frac{{{2 * value}}}{{2}}"
    else:
        fraction = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    more_digits = f"{n}0" if "." in n else f"{n}.000"

    same = [
        f"{n} \\text{{ units}}", fraction, f"x = {n}", f"+{n}", more_digits, f"\\text{{{n}}}",
        f"n = {n} = {double} / 2",
    ]  # fmt: skip
    other = [
        f"-{n}", more, double, f"{n}, {more}", f"{n} \\text{{ or }} {more}", f"\\pm {n}",
        f"{n} \\text{{ is not right}}", f"{more} = {n}", f"({n}, {n})", f"\\sqrt{{{n} + 1}}",
        f"{n}x", f"{n} + 10^{{-9}}", f"{n}i", f"\\{{{n}, {n}\\}}", f"{n} \\to {more}", "none",
        f"{more} \\\\ {n}", f"x < {n}", f"[0, {n}]", f"{n} | {more}",
    ]  # fmt: skip
    texts = [f"so \\boxed{{{text}}}" for text in same]
    texts += [wrapped.replace("X", gold) for wrapped in WRAPPED[: NUM_SPELLINGS - len(texts)]]
    agreeing = [Pair("number", text, gold, True) for text in texts]
    return agreeing + [Pair("number", f"so \\boxed{{{text}}}", gold, False) for text in other]
