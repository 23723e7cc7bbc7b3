"""Plain Python values as JSON and back: what may pass between judged code and its judge.

Numbers, text, bytes, None, and lists, tuples, dicts and sets of those. An object of judged code
never gets to the judge: its __eq__ could say that it equals anything.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

_MAX_MEMBERS = 10_000  # of a set or dict
# Numbers can be picked so that all have one hash, and a set of them takes quadratic time. Honest
# ones hardly have: -1 and -2, 1 and 1.0.
_MAX_OF_ONE_HASH = 20


class NotPlain(TypeError):
    """A value of another type."""


def encode(value: Any) -> Any:
    """Returns the value as JSON. Subclasses become their plain base.

    Raises:
        NotPlain: it holds something else.
        RecursionError: it is nested too deeply, or holds itself.
    """
    # What JSON has. Booleans first: they are integers too.
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list):
        return [encode(item) for item in value]

    # What it has not is an object with the type's name.
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).decode("latin-1")}
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {"set": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    raise NotPlain(f"{type(value).__name__} is no plain value")


def decode(encoded: Any) -> Any:
    """Returns the value that `encode` made this of.

    Raises:
        ValueError: it is no such value, or a set or dict has more than 10,000 members or many of
            one hash.
        TypeError: a key or a member of a set cannot be one.
    """
    if encoded is None or isinstance(encoded, (bool, int, float, str)):
        return encoded
    if isinstance(encoded, list):
        return [decode(item) for item in encoded]
    match encoded:
        case {"complex": [float(real), float(imaginary)]}:
            return complex(real, imaginary)
        case {"bytes": str(text)}:
            return text.encode("latin-1")
        case {"tuple": list(items)}:
            return tuple(decode(item) for item in items)
        case {"set": list(items)} if len(items) <= _MAX_MEMBERS:
            return set(_hashing_well([decode(item) for item in items]))
        case {"dict": list(pairs)} if len(pairs) <= _MAX_MEMBERS:
            keys = _hashing_well([decode(key) for key, _ in pairs])
            return dict(zip(keys, [decode(item) for _, item in pairs], strict=True))
    raise ValueError("no plain value")


def _hashing_well(members: list[Any]) -> list[Any]:
    """Returns the members of a set, or keys of a dict, if few of them have the same hash.

    Raises:
        ValueError: many have.
        TypeError: one of them cannot be a member.
    """
    if members and max(Counter(map(hash, members)).values()) > _MAX_OF_ONE_HASH:
        raise ValueError("many members of a set or dict have one hash")
    return members
