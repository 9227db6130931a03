"""The embedded world's vocabulary and grammar: what a caption says, in which words, and its swapped twins."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

COLOURS = {
    "red": (215, 35, 40),
    "orange": (245, 135, 25),
    "yellow": (250, 225, 50),
    "green": (35, 150, 60),
    "cyan": (60, 205, 215),
    "blue": (35, 75, 215),
    "purple": (125, 50, 175),
    "pink": (250, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "moon")
SIZES = {"small": 8.0, "medium": 11.5, "large": 15.0}  # radius in pixels
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {"two": 2, "three": 3, "four": 4}
BACKGROUNDS = {"sand": (228, 208, 160), "white": (245, 245, 245), "grey": (128, 130, 134), "black": (22, 22, 26)}


class Kind(NamedTuple):
    """What an object is."""

    size: str
    colour: str
    shape: str

    def phrase(self, count: int = 1) -> str:
        """`a small red star`, `two small red stars`; medium goes unsaid."""
        words = [self.colour, self.shape] if self.size == "medium" else [self.size, self.colour, self.shape]
        if count == 1:
            return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"
        number = next(word for word, value in NUMBERS.items() if value == count)
        return f"{number} {' '.join(words)}{'es' if self.shape == 'cross' else 's'}"


@dataclass(frozen=True)
class Content:
    """What a caption says.

    Args:
        kinds: of the one or two objects named.
        background: None where the caption says nothing of it.
        relation: of the first of two objects to the second.
        count: how many there are of a single kind.
    """

    kinds: tuple[Kind, ...]
    background: str | None = None
    relation: str | None = None
    count: int = 1

    @property
    def captions(self) -> list[str]:
        """With a background two wordings, without it one."""
        body = f" {self.relation} ".join(kind.phrase(self.count) for kind in self.kinds)
        if self.background is None:
            return [body]
        return [f"{body} on a {self.background} background", f"a {self.background} background with {body}"]

    @property
    def picture(self) -> Content:
        """The same for all contents that the same pictures show: `right of` and `below` turned round."""
        if self.relation not in ("right of", "below"):
            return self
        return replace(self, kinds=self.kinds[::-1], relation=OPPOSITE[self.relation])

    def shows(self, said: Content) -> bool:
        """Whether a caption is true of a picture of this content."""
        picture = self.picture if said.background else replace(self.picture, background=None)
        return said.picture == picture

    def twins(self) -> list[Content]:
        """All contents that differ in one thing that a bag of words misses, or in a count or a size."""
        found = [
            replace(self, kinds=(*self.kinds[:i], kind._replace(size=size), *self.kinds[i + 1 :]))
            for i, kind in enumerate(self.kinds)
            for size in SIZES
            if self.count == 1 or size != "large"
        ]
        if self.relation:
            first, second = self.kinds
            found += [replace(self, relation=relation) for relation in RELATIONS]
            found.append(replace(self, kinds=(second, first)))
            for field in Kind._fields:
                kinds = (
                    first._replace(**{field: getattr(second, field)}),
                    second._replace(**{field: getattr(first, field)}),
                )
                found.append(replace(self, kinds=kinds))
        elif self.kinds[0].size != "large":
            found += [replace(self, count=count) for count in (self.count - 1, self.count + 1) if 1 <= count <= 4]
        return [twin for twin in dict.fromkeys(found) if twin.picture != self.picture]


_SIZE, _COLOUR, _SHAPE = "|".join(SIZES), "|".join(COLOURS), "|".join(SHAPES)
_BACKGROUND = "|".join(BACKGROUNDS)
_KIND = re.compile(rf"(an?|{'|'.join(NUMBERS)}) (?:({_SIZE}) )?({_COLOUR}) ({_SHAPE})(?:e?s)?")
_SENTENCE = re.compile(rf"(?:a ({_BACKGROUND}) background with )?(.+?)(?: on a ({_BACKGROUND}) background)?")


def parse(caption: str) -> Content | None:
    """What a caption says; None where it is no caption of the world."""
    sentence = _SENTENCE.fullmatch(caption)
    if not sentence:
        return None
    before, body, after = sentence.groups()
    first, *rest = re.split(rf" ({'|'.join(RELATIONS)}) ", body)
    matches = [_KIND.fullmatch(phrase) for phrase in (first, *rest[1::2])]
    if not all(matches) or len(matches) > 2:
        return None
    number = matches[0][1]  # type: ignore[index]
    kinds = tuple(Kind(match[2] or "medium", match[3], match[4]) for match in matches if match)
    content = Content(kinds, before or after, rest[0] if rest else None, NUMBERS.get(number, 1))
    return content if caption in content.captions else None
