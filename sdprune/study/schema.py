"""JSON that may be anything, checked against what it should be."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from sdprune.errors import InputError


class DamagedError(InputError):
    """A record's file does not hold what it should; the message names the place."""


class Number(NamedTuple):
    """A finite number between two others.

    Args:
        low: the least.
        high: the most.
        whole: whether it has to be an integer.
        missing: whether NaN and the infinities count as a missing number, NaN.
    """

    low: float = -1e15
    high: float = 1e15
    whole: bool = False
    missing: bool = False


def printable(text: str) -> str:
    """The text on one line, with a space for what cannot be printed or written to a file."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def checked(value: Any, schema: Any, place: str) -> Any:
    """The value, with all texts and keys that the schema covers on one line.

    Args:
        value: JSON.
        schema: `object` for anything, `str`, a Number, [one schema] for a list, [two of them, or more] for a list of as
            many, {key: schema} for an object; there `key?` may be absent or null, and `*` stands for all other keys.
        place: for messages, such as `results.json: metrics.fid`.

    Raises:
        DamagedError: what is wrong, and where.
    """
    if isinstance(schema, dict):
        return _object(value, schema, place)
    if isinstance(schema, list):
        if not isinstance(value, list) or len(schema) not in (1, len(value)):
            raise _wrong(value, "a list" if len(schema) == 1 else f"a list of {len(schema)}", place)
        schemas = schema * len(value) if len(schema) == 1 else schema
        return [checked(one, inner, f"{place}.{n}") for n, (one, inner) in enumerate(zip(value, schemas, strict=True))]
    if isinstance(schema, Number):
        return _number(value, schema, place)
    if schema is str:
        if not isinstance(value, str):
            raise _wrong(value, "a text", place)
        return printable(value)
    return value


def _object(value: Any, schema: dict[str, Any], place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(value, "an object", place)
    for key in schema:
        if key[-1] not in "?*" and key not in value:
            raise DamagedError(f"{place} has no {key}")
    found = {}
    for key, one in value.items():
        optional = one is None and f"{key}?" in schema
        inner = object if optional else schema.get(key, schema.get(f"{key}?", schema.get("*", object)))
        name = printable(key)
        found[name] = checked(one, inner, f"{place}{'.' if ': ' in place else ': '}{name}")
    return found


def _number(value: Any, schema: Number, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(value, "a number", place)
    if schema.missing and isinstance(value, float) and not math.isfinite(value):
        return math.nan
    if not schema.low <= value <= schema.high:  # also catches NaN
        raise _wrong(value, f"a number from {schema.low:g} to {schema.high:g}", place)
    if schema.whole and not isinstance(value, int):
        raise _wrong(value, "a whole number", place)
    return value


def _wrong(value: Any, expected: str, place: str) -> DamagedError:
    return DamagedError(f"{place} is {printable(repr(value)[:60])}: expected {expected}")
