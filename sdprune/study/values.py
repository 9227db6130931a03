"""JSON values that may be anything: what a record's files hold, checked where it is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdprune.errors import InputError


class DamagedError(InputError):
    """A record's file does not hold what it should; the message names the place."""


def printable(text: str) -> str:
    """The text on one line, with a space for what cannot be printed or written to a file."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


@dataclass(frozen=True)
class Value:
    """A JSON value and its place.

    Args:
        content: the value.
        place: for messages, such as `results.json: metrics.fid`.
    """

    content: Any
    place: str

    def __getitem__(self, key: str) -> Value:
        """What lies under a key of an object."""
        if key not in self.mapping():
            raise DamagedError(f"{self.place} has no {key}")
        return self._inner(key)

    def get(self, key: str, default: Any = None) -> Any:
        """What lies under a key, as it is."""
        return self.mapping().get(key, default)

    def items(self) -> Iterator[tuple[str, Value]]:
        """An object's keys and values."""
        return ((key, self._inner(key)) for key in self.mapping())

    def mapping(self) -> Mapping[str, Any]:
        """An object."""
        if not isinstance(self.content, Mapping):
            raise self.wrong("an object")
        return self.content

    def elements(self, count: int | None = None) -> list[Value]:
        """A list's elements, `count` of them if that is given."""
        if not isinstance(self.content, list) or count not in (None, len(self.content)):
            raise self.wrong("a list" if count is None else f"a list of {count}")
        return [Value(value, f"{self.place}.{number}") for number, value in enumerate(self.content)]

    def text(self) -> str:
        """A text, on one line."""
        if not isinstance(self.content, str):
            raise self.wrong("a text")
        return printable(self.content)

    def identifier(self) -> str:
        """A class name."""
        if not isinstance(self.content, str) or not self.content.isidentifier():
            raise self.wrong("a name")
        return self.content

    def number(self, low: float = -1e15, high: float = 1e15) -> float:
        """A finite number between two others."""
        if isinstance(self.content, bool) or not isinstance(self.content, (int, float)):
            raise self.wrong("a number")
        if not low <= self.content <= high:  # also catches NaN
            raise self.wrong(f"a number from {low:g} to {high:g}")
        return self.content

    def whole(self, low: int = 0) -> int:
        """A whole number."""
        number = self.number(low)
        if not isinstance(number, int):
            raise self.wrong("a whole number")
        return number

    def numbers(self, without: str = "") -> tuple[dict[str, float], list[str]]:
        """An object's numbers, but for one key; and the names of those that are NaN or infinite."""
        found, unusable = {}, []
        for key, value in self.items():
            if key == without:
                continue
            if isinstance(value.content, float) and not math.isfinite(value.content):
                unusable.append(printable(key))
            else:
                found[printable(key)] = value.number()
        return found, unusable

    def wrong(self, expected: str) -> DamagedError:
        """What to raise when the value is something else."""
        shown = printable(repr(self.content)[:60])
        return DamagedError(f"{self.place} is {shown}: expected {expected}")

    def _inner(self, key: str) -> Value:
        return Value(self.content[key], f"{self.place}{'.' if ': ' in self.place else ': '}{printable(key)}")
