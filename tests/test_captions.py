"""The grammar of the embedded world: captions are read back, and twins are captions of other pictures."""

import re

import pytest

from sdprune.mini.captions import OPPOSITE, Content, Kind, parse
from sdprune.mini.world import scenes

STAR, RING = Kind("medium", "red", "star"), Kind("small", "blue", "ring")


@pytest.mark.parametrize(
    ("caption", "content"),
    [
        ("a red star", Content((STAR,))),
        ("an orange moon on a sand background", Content((Kind("medium", "orange", "moon"),), "sand")),
        ("a grey background with a small blue ring", Content((RING,), "grey")),
        ("a red star left of a small blue ring on a white background", Content((STAR, RING), "white", "left of")),
        ("three small blue rings on a black background", Content((RING,), "black", count=3)),
        ("four pink crosses", Content((Kind("medium", "pink", "cross"),), count=4)),
    ],
)
def test_what_a_caption_says(caption: str, content: Content) -> None:
    assert parse(caption) == content
    assert caption in content.captions


@pytest.mark.parametrize(
    "caption",
    ["", "a cat on a mat", "a star", "two red star", "a red stars", "an red star", "a medium red star", "A red star",
     "a red star and a blue ring", "a red star above a blue ring above a pink moon", "five red stars",
     "two red stars above a blue ring", "a sand background with a red star on a grey background", " a red star"],
)  # fmt: skip
def test_other_texts_say_nothing(caption: str) -> None:
    assert parse(caption) is None


def test_the_worlds_captions_are_read_back() -> None:
    for scene in scenes("val", 500, seed=2):
        full, reworded, short = map(parse, scene.captions)
        assert full == reworded == scene.content
        assert short.background is None
        assert (short.kinds, short.relation, short.count) == (
            scene.content.kinds, scene.content.relation, scene.content.count,
        )  # fmt: skip


def facts(content: Content) -> tuple:
    """What the picture shows, by the caption's words alone: `A right of B` is `B left of A`."""
    text = content.captions[0]
    for relation in ("right of", "below"):
        if found := re.fullmatch(rf"(.*) {relation} (.*?)( on a \w+ background)?", text):
            return f"{found[2]} {OPPOSITE[relation]} {found[1]}{found[3] or ''}"
    return text


def test_twins_are_other_pictures_in_nearly_the_same_words() -> None:
    for scene in scenes("train", 200, seed=3):
        twins = scene.content.twins()
        assert twins
        assert len({facts(twin) for twin in twins} - {facts(scene.content)}) >= 1
        assert facts(scene.content) not in {facts(twin) for twin in twins}
        assert all(parse(text) == twin for twin in twins for text in twin.captions)
        assert all(twin.background == scene.background for twin in twins)


def test_twins_of_a_relation() -> None:
    twins = {twin.captions[0] for twin in Content((STAR, RING), None, "above").twins()}
    assert {
        "a small blue ring above a red star",  # objects
        "a red star below a small blue ring",  # relation
        "a red star left of a small blue ring",
        "a blue star above a small red ring",  # colours
        "a red ring above a small blue star",  # shapes
        "a small red star above a blue ring",  # sizes
        "a large red star above a small blue ring",
    } <= twins
    assert "a small blue ring below a red star" not in twins


def test_twins_of_a_count() -> None:
    twins = {twin.captions[0] for twin in Content((RING,), None, count=2).twins()}
    assert twins == {"a small blue ring", "three small blue rings", "two blue rings"}


def test_what_is_true_of_a_picture() -> None:
    picture = Content((STAR, RING), "sand", "above")
    for caption, true in {
        "a red star above a small blue ring": True,
        "a small blue ring below a red star on a sand background": True,
        "a small blue ring above a red star": False,
        "a red star above a small blue ring on a grey background": False,
        "a red star": False,
    }.items():
        assert picture.shows(parse(caption)) is true, caption
