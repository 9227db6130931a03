"""What a caption speaks of: read by the embedded world's grammar, or found in all other captions by a list of words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sdprune.mini.captions import Content, parse

Label = tuple[str, str]
"""What a category is about, and its value: `("colour", "red")`."""

# The 80 categories of COCO under its own 12 headings, with common other words for them.
_OBJECTS = {
    "person": "person|people|man|men|woman|women|boy|girl|child|children|kid|baby|player|skier|surfer",
    "vehicle": "bicycle|bike|car|motorcycle|motorbike|airplane|plane|jet|bus|train|truck|boat",
    "outdoor": "traffic light|fire hydrant|stop sign|parking meter|bench",
    "animal": "bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|puppy|kitten",
    "accessory": "backpack|umbrella|handbag|tie|suitcase|luggage",
    "sports": "frisbee|ski|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket",
    "kitchen": "bottle|wine glass|cup|fork|knife|knives|spoon|bowl",
    "food": "banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|doughnut|cake",
    "furniture": "chair|couch|sofa|potted plant|bed|dining table|table|toilet",
    "electronic": "tv|television|laptop|mouse|remote|keyboard|cell phone|phone",
    "appliance": "microwave|oven|toaster|sink|refrigerator|fridge",
    "indoor": "book|clock|vase|scissors|teddy bear|hair drier|toothbrush",
}
_WORDS = {
    "colour": "red|orange|yellow|green|blue|purple|pink|brown|black|white|grey|gray",
    "relation": "on top of|in front of|next to|on|in|under|above|below|behind|beside|near|between|over|inside|"
    "holding|riding|wearing|eating|with",
    "count": "two|three|four|five|six|several|many|group|bunch|pair",
}
_HEADINGS = {word: name for name, words in _OBJECTS.items() for word in words.split("|")}
_FIND_OBJECT = re.compile(
    rf"\b({'|'.join(sorted(_HEADINGS, key=len, reverse=True))})(?:e?s)?\b"
)  # `hot dog` before `dog`
_FIND_WORD = {name: re.compile(rf"\b(?:{words})\b") for name, words in _WORDS.items()}


def categories(caption: str) -> set[Label]:
    """Return what a caption speaks of; of captions that are not the embedded world's by words alone, so roughly."""
    said = parse(caption)
    return _by_words(caption.lower()) if said is None else _by_grammar(said)


def all_by_grammar(captions: Iterable[str]) -> bool:
    """Whether all of these are captions of the embedded world."""
    return all(map(parse, captions))


def _by_grammar(said: Content) -> set[Label]:
    scene = "two objects" if said.relation else "one object" if said.count == 1 else "several of a kind"
    found = {("scene", scene), ("background", said.background or "none said")}
    found |= {("relation", said.relation)} if said.relation else set()
    found |= {("count", str(said.count))} if said.count > 1 else set()
    for kind in said.kinds:
        found |= {("size", kind.size), ("colour", kind.colour), ("shape", kind.shape)}
    return found


def _by_words(caption: str) -> set[Label]:
    objects = set(_FIND_OBJECT.findall(caption))
    count = str(len(objects)) if len(objects) < 4 else "4 or more"
    found = {("kinds of objects named", count)} | {("object", _HEADINGS[word]) for word in objects}
    return found | {(name, word) for name, pattern in _FIND_WORD.items() for word in pattern.findall(caption)}
