r"""An answer's text as tokens in one spelling, without what only changes its looks.

    characters      signs of other scripts, fractions, roots, exponents and dashes become LaTeX
    presentation    goes: \left, \dfrac, \color{red}, \quad, dollar signs, idle braces
    words           what stands in \text{...} is text, and so are other scripts
    arguments       get their braces: \frac12 is \frac{1}{2}, x^10 is x^{10}

Each step looks at a token a bounded number of times.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence, Set
from typing import NamedTuple


class Token(NamedTuple):
    """One piece of an answer."""

    text: str
    """As it is written in the normal form."""
    kind: str
    """`number`, `letters`, `word` (text that is no mathematics), `unit`, `command`, `space` or
    `sign`."""


# Signs of other scripts, and of people who write without LaTeX. Digits of other scripts are left
# alone: they are no digits, so that an answer in them is wrong rather than guessed at.
_SIGNS = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u2010": "-", "\u2011": "-", "\ufe63": "-",
    "\uff0d": "-", "\uff0b": "+", "\uff1d": "=", "\uff1c": "<", "\uff1e": ">", "\uff0c": ",",
    "\u3001": ",", "\uff1b": ";", "\uff1a": ":", "\uff08": "(", "\uff09": ")", "\uff3b": "[",
    "\uff3d": "]", "\uff5b": "\\{", "\uff5d": "\\}", "\u3002": ".", "\uff05": "\\%", "\uff0f": "/",
    "\u2044": "/", "\u00f7": "/", "\u2215": "/", "\u00d7": "\\times ", "\u00b7": "\\cdot ",
    "\u22c5": "\\cdot ", "\u2219": "\\cdot ", "\u2217": "\\cdot ", "\u00b0": "^\\circ ",
    "\u00ba": "^\\circ ", "\u02da": "^\\circ ", "\u00b1": "\\pm ", "\u2213": "\\mp ",
    "\u2264": "\\le ", "\u2265": "\\ge ", "\u2a7d": "\\le ", "\u2a7e": "\\ge ", "\u2260": "\\ne ",
    "\u2248": "\\approx ", "\u2245": "\\cong ", "\u2261": "\\equiv ", "\u2192": "\\to ",
    "\u21d2": "\\Rightarrow ", "\u221e": "\\infty ", "\u2205": "\\emptyset ", "\u2208": "\\in ",
    "\u222a": "\\cup ", "\u2229": "\\cap ", "\u2216": "\\setminus ", "\u2227": "\\land ",
    "\u2228": "\\lor ", "\u2220": "\\angle ", "\u2032": "'", "\u2019": "'", "\u201c": "",
    "\u201d": "", "\u2026": "\\ldots ", "\u22ef": "\\ldots ", "\u27e8": "\\langle ",
    "\u27e9": "\\rangle ", "\u211d": "\\mathbb{R}", "\u2124": "\\mathbb{Z}",
    "\u2115": "\\mathbb{N}", "\u211a": "\\mathbb{Q}", "\u2102": "\\mathbb{C}", "\u03c0": "\\pi ",
    "\u03b1": "\\alpha ", "\u03b2": "\\beta ", "\u03b3": "\\gamma ", "\u03b8": "\\theta ",
    "\u03bb": "\\lambda ", "\u03bc": "\\mu ", "\u03c6": "\\phi ", "\u03c9": "\\omega ",
    "\u00a3": "\\pounds ", "\u20ac": "\\euro ", "\u00a5": "\\yen ", "\u20b9": "\\rupee ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\u3000": " ", "\ufeff": "",
    "\u00bd": "\\frac{1}{2}", "\u2153": "\\frac{1}{3}", "\u2154": "\\frac{2}{3}",
    "\u00bc": "\\frac{1}{4}", "\u00be": "\\frac{3}{4}", "\u2155": "\\frac{1}{5}",
    "\u2156": "\\frac{2}{5}", "\u2157": "\\frac{3}{5}", "\u2158": "\\frac{4}{5}",
    "\u2159": "\\frac{1}{6}", "\u215a": "\\frac{5}{6}", "\u215b": "\\frac{1}{8}",
    "\u215c": "\\frac{3}{8}", "\u215d": "\\frac{5}{8}", "\u215e": "\\frac{7}{8}",
}  # fmt: skip
_TRANSLATION = str.maketrans(_SIGNS)
_SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
_SUBSCRIPTS = "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089"
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_LOWERED = re.compile(f"[{_SUBSCRIPTS}]+")
_TO_DIGITS = str.maketrans(_SUPERSCRIPTS + _SUBSCRIPTS, "0123456789-" + "0123456789")
_ROOT = re.compile("([\u221a\u221b])\\s*([0-9]+(?:\\.[0-9]+)?|[A-Za-z])?")

_NEGATIVE_SPACE = re.compile(r"\\!\s*")
_COMMA_GROUP = re.compile(r"\{\s*,\s*\}")
# Commands that somebody has escaped twice.
_DOUBLED = re.compile(
    r"\\\\(?=(?:[dt]?frac|sqrt|leq?|geq?|left|right|text|pi|infty|cup|cdot|times|begin|end)"
    r"(?![A-Za-z]))"
)
_TOKEN = re.compile(
    r"(?P<space>(?:\s|~|\\[,;:! >]"
    r"|\\(?:quad|qquad|enspace|thinspace|medspace|thickspace|hfill)(?![A-Za-z]))+)"
    r"|(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"|(?P<command>\\[A-Za-z]+\*?|\\.)"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<word>[^\W\d_]+)"
    r"|(?P<sign>.)",
    re.DOTALL,
)

# Commands that only change the looks: they go, and their argument stays.
_LOOKS = frozenset([
    "left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "biggl", "biggr",
    "displaystyle", "textstyle", "scriptstyle", "limits", "nolimits", "mathbf", "mathit", "mathsf",
    "mathtt", "mathcal", "boldsymbol", "bm", "bold", "bf", "it", "sf", "tt", "em", "underline",
    "emph", "boxed", "fbox", "framebox", "ensuremath", "mathord", "mathop", "normalsize", "large",
    "Large", "small", "middle",
])  # fmt: skip
# Commands whose argument is text.
_TEXT = frozenset([
    "text", "textbf", "textit", "textrm", "textsf", "texttt", "textnormal", "textsc", "mbox",
    "hbox", "mathrm", "operatorname", "rm",
])  # fmt: skip
# Commands that go together with their argument.
_DROPPED = frozenset(
    ["color", "textcolor", "hspace", "vspace", "phantom", "hphantom", "label", "tag", "mspace"]
)
_SYNONYMS = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\leq": "\\le",
    "\\leqslant": "\\le", "\\geq": "\\ge", "\\geqslant": "\\ge", "\\neq": "\\ne", "\\lt": "<",
    "\\gt": ">", "\\varnothing": "\\emptyset", "\\rightarrow": "\\to", "\\longrightarrow": "\\to",
    "\\implies": "\\Rightarrow", "\\dots": "\\ldots", "\\cdots": "\\ldots", "\\dotsc": "\\ldots",
    "\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]", "\\lparen": "(",
    "\\rparen": ")", "\\vert": "|", "\\lvert": "|", "\\rvert": "|", "\\wedge": "\\land",
    "\\vee": "\\lor", "\\times": "\\cdot", "\\ast": "\\cdot", "\\div": "/", "\\colon": ":",
    "\\dbinom": "\\binom", "\\tbinom": "\\binom", "\\bigcup": "\\cup", "\\varphi": "\\phi",
    "\\varepsilon": "\\epsilon", "\\backslash": "\\setminus", "\\gets": "=", "\\bar": "\\overline",
    "\\langle": "(", "\\rangle": ")", "\\imath": "i", "\\tan ": "\\tan", "\\tg": "\\tan",
    "\\mod": "\\pmod", "\\bmod": "\\pmod", "\\&": "and", "\\pounds": "\\pounds",
    "\\textdollar": "\\$", "\\lnot": "\\neg",
}  # fmt: skip
# Commands that are units, after their synonyms are replaced.
_UNIT_COMMANDS = {
    "\\dollar": "dollar", "\\pounds": "pound", "\\euro": "euro", "\\yen": "yen",
    "\\rupee": "rupee", "\\%": "percent", "\\degree": "degree",
}  # fmt: skip
# Commands that take no argument, so that a brace after them only groups.
_SYMBOLS = frozenset([
    "\\pi", "\\alpha", "\\beta", "\\gamma", "\\delta", "\\theta", "\\lambda", "\\mu", "\\phi",
    "\\omega", "\\infty", "\\cdot", "\\pm", "\\mp", "\\circ", "\\emptyset", "\\cup", "\\cap",
    "\\in", "\\ldots", "\\le", "\\ge", "\\ne",
])  # fmt: skip
# How many arguments follow; a root may have a degree in brackets before its own.
_ARGUMENTS = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1, "^": 1, "_": 1}
_MAX_NESTED_ARGUMENTS = 40
# A matrix is the same in whatever brackets it stands; a vmatrix is its determinant.
_ENVIRONMENTS = dict.fromkeys(("array", "matrix", "bmatrix", "Bmatrix", "smallmatrix"), "pmatrix")
# Names that are mathematics when they are written without a backslash.
_FUNCTIONS = frozenset([
    "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "arcsin", "arccos",
    "arctan", "sinh", "cosh", "tanh", "pi", "infty", "gcd", "lcm", "max", "min", "det", "alpha",
    "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega",
])  # fmt: skip

REMARKS = frozenset(["since", "because"])
"""Words that begin an explanation, which is no part of the answer."""
# What people say before an answer.
_LEAD_IN = frozenset([
    "the", "final", "correct", "answer", "answers", "result", "solution", "solutions", "is", "are",
    "approximately", "approx", "about", "around", "roughly", "exactly", "option", "choice", "so",
    "thus", "hence", "therefore", "=", ":", ",", ".",
])  # fmt: skip
_TRAILING = frozenset((".", ",", ";", ":", "!?", "\\\\", "?"))

OPENING = frozenset(("(", "[", "\\{", "{"))
"""What opens a bracket."""
CLOSING = frozenset((")", "]", "\\}", "}"))
"""What closes one; an interval may close with another kind than it opens with."""


def tokens_of(text: str) -> list[Token]:
    """Returns the tokens without presentation. Braces are left where they hold an argument only."""
    raw = [Token(match[0], match.lastgroup or "sign") for match in _TOKEN.finditer(_in_latex(text))]
    tokens: list[Token] = []
    # What each open brace is: "argument" (kept), "group" (dropped), or "text" (dropped; what it
    # holds are words).
    braces: list[str] = []
    expects_text = False

    i = 0
    while i < len(raw):
        token = raw[i]
        i += 1

        if token.kind == "command":
            name = token.text[1:]
            if name in ("left", "right", "middle") and i < len(raw) and raw[i].text == ".":
                i += 1  # \left. is a bracket that is not there
            if name in _DROPPED:
                i = _after_group(raw, i)
            elif name in ("begin", "end"):
                end = _after_group(raw, i)
                environment = "".join(t.text for t in raw[i:end]).strip("{} ")
                if environment == "array" and name == "begin":
                    end = _after_group(raw, end)  # the alignment of its columns
                environment = _ENVIRONMENTS.get(environment, environment)
                tokens.append(Token(f"\\{name}{{{environment}}}", "command"))
                i = end
            elif name in _TEXT:
                expects_text = True
            elif name not in _LOOKS:
                spelled = _SYNONYMS.get(token.text, token.text)
                if spelled in _UNIT_COMMANDS:
                    tokens.append(Token(_UNIT_COMMANDS[spelled], "unit"))
                elif spelled.startswith("\\"):
                    tokens.append(Token(spelled, "command"))
                else:
                    tokens.append(Token(spelled, "sign"))

        elif token.text == "{":
            if expects_text:
                braces.append("text")
            elif _takes_argument(tokens):
                braces.append("argument")
                tokens.append(Token("{", "sign"))
            else:
                braces.append("group")
            expects_text = False

        elif token.text == "}":
            # A closing brace without its opening one is dropped.
            if braces and braces.pop() == "argument":
                tokens.append(Token("}", "sign"))

        elif token.kind == "letters":
            tokens.append(_letters(token.text, is_text="text" in braces or expects_text))
            expects_text = False

        elif token.kind == "space":
            if tokens and tokens[-1].kind != "space":
                tokens.append(Token(" ", "space"))

        else:
            tokens.append(token)

    queue = deque(_with_symbols_as_units(tokens))
    result: list[Token] = []
    while queue:
        _move_with_arguments(queue, result, 0)
    return result


def _in_latex(text: str) -> str:
    """Returns the text with the signs of other scripts as LaTeX, and without markup around it."""
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_TO_DIGITS)}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{match[0].translate(_TO_DIGITS)}}}", text)
    text = _ROOT.sub(_root_in_latex, text)
    text = text.translate(_TRANSLATION)

    # An escaped dollar is money; the others are LaTeX's, and stars and backticks Markdown's.
    text = text.replace("\\$", "\\dollar ").replace("$", " ").replace("**", " ").replace("`", " ")
    text = _DOUBLED.sub(r"\\", text)
    text = _COMMA_GROUP.sub(",", text)
    text = _NEGATIVE_SPACE.sub("", text)

    text = text.replace("\\(", " ").replace("\\)", " ")
    return text.replace(">=", "\\ge ").replace("<=", "\\le ").replace("!=", "\\ne ")


def _root_in_latex(match: re.Match[str]) -> str:
    command = "\\sqrt"
    if match[1] == "\u221b":
        command = "\\sqrt[3]"
    if not match[2]:
        return command
    return f"{command}{{{match[2]}}}"


def _after_group(raw: Sequence[Token], i: int) -> int:
    """Returns where the brace group at or after i ends; i itself where there is none."""
    start = i
    if i < len(raw) and raw[i].kind == "space":
        start = i + 1
    if start >= len(raw) or raw[start].text != "{":
        return i

    depth = 0
    for j in range(start, len(raw)):
        if raw[j].text == "{":
            depth += 1
        elif raw[j].text == "}":
            depth -= 1
        if depth == 0:
            return j + 1
    return len(raw)


def _takes_argument(tokens: Sequence[Token]) -> bool:
    """Returns whether a brace after these tokens holds an argument."""
    last = next((token for token in reversed(tokens) if token.kind != "space"), None)
    if last is None:
        return False
    if last.kind == "command":
        return last.text[1:2].isalpha() and last.text not in _SYMBOLS
    return last.text in ("^", "_", "}", "]")


def _letters(run: str, *, is_text: bool) -> Token:
    """Returns a run of letters as a function, a word or variables.

    Args:
        run: letters without anything between them.
        is_text: they stand in \\text{...}.
    """
    lower = run.lower()
    if lower in ("infinity", "inf"):
        return Token("\\infty", "command")
    if run in _FUNCTIONS:
        return Token(f"\\{run}", "command")
    if is_text and run in ("e", "i"):
        return Token(run, "letters")  # 4.2\text{e}-8: these two are numbers, however they are set
    if is_text or lower in ("and", "or", "percent") or lower in _LEAD_IN or lower in REMARKS:
        return Token(run, "word")
    return Token(run, "letters")


def _with_symbols_as_units(tokens: Sequence[Token]) -> list[Token]:
    """Returns the tokens with ^\\circ, ^{\\circ} and a percent sign as one token of a unit each."""
    result: list[Token] = []
    texts = [token.text for token in tokens]
    i = 0
    while i < len(tokens):
        if texts[i : i + 2] == ["^", "\\circ"]:
            result.append(Token("degree", "unit"))
            i += 2
        elif texts[i : i + 4] == ["^", "{", "\\circ", "}"]:
            result.append(Token("degree", "unit"))
            i += 4
        elif texts[i] == "%":
            result.append(Token("percent", "unit"))
            i += 1
        else:
            result.append(tokens[i])
            i += 1
    return result


def _move_with_arguments(queue: deque[Token], result: list[Token], depth: int) -> None:
    """Moves one token to the result, and after it its arguments, each in braces.

    Beyond a depth that no honest answer has, tokens are moved as they are.
    """
    token = queue.popleft()
    result.append(token)
    if depth > _MAX_NESTED_ARGUMENTS:
        return
    # The degree of a root keeps its brackets.
    if token.text == "\\sqrt" and queue and queue[0].text == "[":
        while queue and result[-1].text != "]":
            result.append(queue.popleft())

    for _ in range(_ARGUMENTS.get(token.text, 0)):
        while queue and queue[0].kind == "space":
            queue.popleft()
        if not queue:
            continue

        result.append(Token("{", "sign"))
        first = queue[0]
        if first.text == "{" or (first.text == "(" and token.text in ("^", "\\sqrt")):
            queue.popleft()
            closing = "}" if first.text == "{" else ")"
            while queue and queue[0].text != closing:
                _move_with_arguments(queue, result, depth + 1)
            if queue:
                queue.popleft()
        elif first.kind == "number" and token.text not in ("^", "_"):
            # LaTeX takes one digit: \frac12 is a half. In an exponent or index people mean the
            # whole number.
            queue.popleft()
            result.append(Token(first.text[0], "number"))
            if len(first.text) > 1:
                queue.appendleft(Token(first.text[1:], "number"))
        else:
            if first.text == "-":
                result.append(queue.popleft())
            if queue:
                _move_with_arguments(queue, result, depth + 1)
        result.append(Token("}", "sign"))


def trim(tokens: Sequence[Token]) -> list[Token]:
    """Returns the tokens without lead-in, spaces and punctuation around them."""
    start = 0
    end = len(tokens)
    while start < end and (tokens[start].kind == "space" or tokens[start].text.lower() in _LEAD_IN):
        start += 1
    while end > start and (tokens[end - 1].kind == "space" or tokens[end - 1].text in _TRAILING):
        end -= 1
    if start == end:  # nothing but such words: they are the answer
        return [token for token in tokens if token.kind in ("word", "letters")]
    return list(tokens[start:end])


def joined(tokens: Sequence[Token]) -> str:
    """Returns the tokens as text, with single spaces between them and no others."""
    return " ".join(token.text for token in tokens if token.kind != "space")


def bracket_levels(tokens: Sequence[Token]) -> list[int] | None:
    """Returns [tokens] how many brackets are open after each; None where they do not match.

    [ and ( may close each other.
    """
    levels: list[int] = []
    depth = 0
    is_reversed_interval = len(tokens) > 1 and tokens[0].text == "]"  # ]1, 2[
    for i, token in enumerate(tokens):
        if token.text.startswith("\\begin") or token.text in OPENING:
            depth += 1
        elif token.text.startswith("\\end{") or token.text in CLOSING:
            depth -= 1

        # The outer brackets of a reversed interval stand the wrong way round.
        if is_reversed_interval and i == 0:
            depth = 1
        elif is_reversed_interval and i == len(tokens) - 1:
            depth = 0

        if depth < 0:
            return None
        levels.append(depth)

    if depth > 0:
        return None
    return levels


def without_stray_bracket(tokens: Sequence[Token]) -> list[Token] | None:
    """Returns the tokens without one bracket at either end that has no other: \\left( 5.

    None where that does not help.
    """
    for kept in (tokens[1:], tokens[:-1]):
        if kept and bracket_levels(kept) is not None:
            return list(kept)
    return None


def split(
    tokens: Sequence[Token], levels: Sequence[int], separators: Set[str]
) -> tuple[list[list[Token]], list[str]]:
    """Splits tokens outside of all brackets.

    Args:
        tokens: to be split.
        levels: [tokens] what `bracket_levels` gave for them.
        separators: texts of the tokens at which to split.

    Returns:
        The parts, and the text of each separator between them.
    """
    parts: list[list[Token]] = [[]]
    between: list[str] = []
    for token, level in zip(tokens, levels, strict=False):
        if level == 0 and token.text in separators:
            between.append(token.text)
            parts.append([])
        else:
            parts[-1].append(token)
    return parts, between


def lone_bar(tokens: Sequence[Token], levels: Sequence[int]) -> set[str]:
    """Returns the bar as a separator where it is a single one, "divides".

    Two are an absolute value.
    """
    num_bars = 0
    for token, level in zip(tokens, levels, strict=True):
        if token.text == "|" and level == 0:
            num_bars += 1
    if num_bars != 1:
        return set()
    return {"|"}
