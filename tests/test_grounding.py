"""What the heads of the recipe are trained to say of a scene, against loops over its pixels and its words."""

import numpy as np
import pytest
import torch

from sdprune.mini.captions import Content, Kind, parse
from sdprune.mini.examiner import Examiner, disturbed, examiner_loss
from sdprune.mini.grounding import layout, said_objects
from sdprune.mini.training import WorldTrainingData, some_twins
from sdprune.mini.training.unet import astray, places
from sdprune.mini.world import scenes


def real(chosen) -> torch.Tensor:
    return torch.stack([torch.tensor(scene.render()).permute(2, 0, 1) for scene in chosen])


def test_a_layout_is_the_picture_in_16_by_16_pixels_without_its_background() -> None:
    (scene,) = scenes("val", 1, seed=3)
    picture = scene.render().astype(float)
    (found,) = layout(real([scene]).double())
    for row in range(8):
        for column in range(8):
            for colour in range(3):
                for down in range(2):
                    for across in range(2):
                        top, left = 8 * row + 4 * down, 8 * column + 4 * across
                        part = picture[top : top + 4, left : left + 4, colour] - picture[0, 0, colour]
                        value = found[8 * row + column, 4 * colour + 2 * down + across]
                        assert value == torch.tensor(part.mean())


def test_what_a_caption_says_of_its_objects() -> None:
    star, ring = Kind("medium", "red", "star"), Kind("small", "blue", "ring")
    nothing = [0, 0, -1, -1, -1, -1]
    assert said_objects(Content((star, ring), "sand", "left of")) == [[-1, 0, 0, 3, 1, 0], [1, 0, 5, 4, 0, 0]]
    assert said_objects(Content((star, ring), None, "below")) == [[0, 1, 0, 3, 1, 0], [0, -1, 5, 4, 0, 0]]
    assert said_objects(Content((ring,), "grey", count=3)) == [[0, 0, 5, 4, 0, 2], nothing]


def test_twins_keep_the_wording() -> None:
    for scene in scenes("train", 30, seed=4):
        for caption in scene.captions:
            for twin in some_twins(caption, 3):
                assert not scene.content.shows(parse(twin))
                assert (" background with " in twin) == (" background with " in caption)
                assert (" on a " in twin) == (" on a " in caption)


def answers(chosen, distance: float) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The logits of an examiner that sees cells whose middle is nearer than this to an object's centre."""
    from sdprune.mini.captions import BACKGROUNDS, COLOURS, SHAPES, SIZES

    choices = (list(COLOURS), list(SHAPES), list(SIZES))
    centres = torch.full((len(chosen), 16, 16), -4.0)
    kinds = [torch.zeros(len(chosen), len(names), 16, 16) for names in choices]
    for picture, scene in enumerate(chosen):
        for thing in scene.things:
            for row in range(16):
                for column in range(16):
                    away = np.hypot(4 * column + 2 - thing.x, 4 * row + 2 - thing.y)
                    if away < distance:
                        centres[picture, row, column] = max(centres[picture, row, column], 4 - away)
                        values = (thing.kind.colour, thing.kind.shape, thing.kind.size)
                        for logits, names, value in zip(kinds, choices, values, strict=True):
                            logits[picture, names.index(value), row, column] = 9
    grounds = torch.eye(4)[[list(BACKGROUNDS).index(scene.background) for scene in chosen]]
    return centres, kinds, 9 * grounds


def test_right_answers_are_read_as_the_scene_and_cost_less_than_those_of_another_scene(monkeypatch) -> None:
    chosen = list(scenes("val", 60, seed=6))
    monkeypatch.setattr(Examiner, "forward", lambda self, pixels: answers(chosen, 6.0))
    for scene, reading in zip(chosen, Examiner().read(real(chosen)), strict=True):
        assert reading.background == scene.background
        assert sorted(thing.kind for thing in reading.things) == sorted(thing.kind for thing in scene.things)
        for thing in scene.things:
            near = [other for other in reading.things if np.hypot(thing.x - other.x, thing.y - other.y) < 3]
            assert [other.kind for other in near] == [thing.kind]
    others = [*chosen[1:], chosen[0]]
    assert examiner_loss(answers(chosen, 6.0), chosen) < 0.5 * examiner_loss(answers(others, 6.0), chosen)


def test_disturbed_pictures_are_still_like_the_pictures() -> None:
    torch.manual_seed(0)
    pictures = real(scenes("train", 64)).float() / 127.5 - 1
    found = disturbed(pictures)
    assert found.shape == pictures.shape
    assert found.abs().max() <= 1
    errors = (found - pictures).square().mean((1, 2, 3)).sqrt()
    assert errors.max() < 0.25
    assert errors.min() > 0.005


def test_objects_stand_where_their_squares_reach() -> None:
    for scene in scenes("train", 40, seed=8):
        expected = torch.zeros(2, 8, 8)
        for number, thing in enumerate(scene.things):
            reach = {"small": 10.0, "medium": 13.5, "large": 17.0}[thing.kind.size]
            for row in range(8):
                for column in range(8):
                    if abs(8 * column + 4 - thing.x) <= reach and abs(8 * row + 4 - thing.y) <= reach:
                        expected[number if len(scene.content.kinds) == 2 else 0, row, column] = 1
        assert torch.equal(places(scene), expected)


@pytest.mark.parametrize("side", [8, 4])
def test_attention_that_goes_astray(side: int) -> None:
    chosen = list(scenes("train", 12, seed=9))
    attended = torch.rand(12, side * side, 24, generator=torch.Generator().manual_seed(0))
    shares = []
    for scene, picture in zip(chosen, attended, strict=True):
        stand = places(scene)
        for token in range(2):
            if not stand[token].any():
                continue
            there = elsewhere = 0.0
            for row in range(side):
                for column in range(side):
                    covered = any(
                        stand[token, y, x]
                        for y in range(row * 8 // side, (row + 1) * 8 // side)
                        for x in range(column * 8 // side, (column + 1) * 8 // side)
                    )
                    value = float(picture[row * side + column, 22 + token])
                    there, elsewhere = there + covered * value, elsewhere + (not covered) * value
            shares.append((elsewhere / (there + elsewhere)) ** 2)
    found = astray(attended, torch.stack([places(scene) for scene in chosen]))
    assert float(found) == pytest.approx(sum(shares) / len(shares), rel=1e-5)
    assert len(shares) > 12


def test_a_category_may_be_drawn_more_often() -> None:
    data = WorldTrainingData(n=200, batch_size=500, seed=2, steps=4, often={"count": 3.0})
    data.setup("fit")
    drawn = [data.scenes[i].category for _, _, index in data.train_dataloader() for i in index.tolist()]
    there = [scene.category for scene in data.scenes]
    expected = 3 * there.count("count") / (3 * there.count("count") + len(there) - there.count("count"))
    assert drawn.count("count") / len(drawn) == pytest.approx(expected, abs=0.05)
    assert there.count("count") / len(there) < expected - 0.1
