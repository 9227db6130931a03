"""The embedded world: deterministic, in COCO's layout, its evaluation split made of unseen combinations."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from geometry import classify
from PIL import Image

from sdprune.mini.captions import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES
from sdprune.mini.source import EmbeddedWorld
from sdprune.mini.tokenizer import MAX_LENGTH, train_tokenizer
from sdprune.mini.world import held_out, scenes, write_coco


def triples(split: str, n: int = 2_000) -> set[tuple[str, str, str]]:
    return {(*thing.kind[1:], scene.background) for scene in scenes(split, n) for thing in scene.things}


def test_the_world_is_large_enough() -> None:
    assert min(len(COLOURS), len(SHAPES)) >= 8
    assert len(SIZES) >= 3
    assert min(len(RELATIONS), len(BACKGROUNDS)) >= 4


def test_evaluation_shows_only_combinations_that_training_never_saw() -> None:
    train, val = triples("train"), triples("val")
    assert not train & val
    assert train | val == set(product(COLOURS, SHAPES, BACKGROUNDS))


def test_training_sees_every_pair_of_attributes() -> None:
    kept = [triple for triple in product(COLOURS, SHAPES, BACKGROUNDS) if not held_out(*triple)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        everything = {(t[first], t[second]) for t in product(COLOURS, SHAPES, BACKGROUNDS)}
        assert {(t[first], t[second]) for t in kept} == everything


def test_scenes_depend_on_split_and_seed_alone() -> None:
    first, again = list(scenes("val", 20, seed=3)), list(scenes("val", 30, seed=3))[:20]
    assert first == again
    assert all(np.array_equal(a.render(), b.render()) for a, b in zip(first, again, strict=True))
    assert first != list(scenes("val", 20, seed=4))
    assert first != list(scenes("test", 20, seed=3))


def test_captions_name_what_is_there() -> None:
    for scene in scenes("val", 200):
        assert len(scene.captions) == 3
        full = scene.captions[0]
        assert scene.background in full
        for thing in scene.things:
            assert " ".join(thing.kind[1:]) in full
            assert (thing.kind.size in full) or thing.kind.size == "medium"
        numbers = {1: "", 2: "two ", 3: "three ", 4: "four "}
        assert full.startswith(numbers[scene.content.count])
        assert len(scene.things) == len(scene.content.kinds) * scene.content.count
        assert (len(scene.content.kinds) == 2) == (scene.content.relation is not None)


def test_categories_are_drawn_often_and_pairs_are_alike_more_often_than_by_chance() -> None:
    drawn = list(scenes("val", 1_000))
    assert {"attribute", "relation", "count"} == {scene.category for scene in drawn}
    pairs = [scene.content.kinds for scene in drawn if scene.category == "relation"]
    assert len(pairs) > 400
    assert all(first[1:] != second[1:] for first, second in pairs)
    assert np.mean([first.colour == second.colour for first, second in pairs]) > 0.2  # 1/8 by chance
    assert np.mean([first.shape == second.shape for first, second in pairs]) > 0.2
    assert {2, 3, 4} <= {len(scene.things) for scene in drawn if scene.category == "count"}


def test_things_do_not_cover_each_other_nor_the_border() -> None:
    """Each thing drawn alone leaves as many pixels of its own as all of them together."""
    for scene in (scene for scene in scenes("train", 400) if scene.category == "count"):
        ground = np.array(BACKGROUNDS[scene.background])
        seen = [
            (replace(scene, things=things).render() != ground).any(-1)
            for things in (scene.things, *((t,) for t in scene.things))
        ]
        assert (np.sum(seen[1:], 0) <= 1).all()
        assert not any(edge.any() for one in seen for edge in (one[0], one[-1], one[:, 0], one[:, -1]))


def test_relations_hold_in_the_picture() -> None:
    for scene in scenes("train", 300):
        if scene.content.relation is None:
            continue
        first, second = scene.things
        across, down = RELATIONS[scene.content.relation]
        assert across * (first.x - second.x) + down * (first.y - second.y) > 20


def test_coco_layout(tmp_path) -> None:
    write_coco(tmp_path, "val", 5, seed=1)
    document = json.loads((tmp_path / "annotations" / "captions_val.json").read_text())
    assert [image["id"] for image in document["images"]] == [1, 2, 3, 4, 5]
    assert len(document["annotations"]) == 15
    for image, scene in zip(document["images"], scenes("val", 5, seed=1), strict=True):
        pixels = np.asarray(Image.open(tmp_path / "val" / image["file_name"]).convert("RGB"))
        assert pixels.shape == (64, 64, 3)
        assert np.abs(pixels.astype(int) - scene.render()).mean() < 3
        captions = [a["caption"] for a in document["annotations"] if a["image_id"] == image["id"]]
        assert captions == scene.captions


def test_the_source_draws_once_and_reads_back(tmp_path) -> None:
    source = EmbeddedWorld(images=4, cache=str(tmp_path))
    source.prepare()
    table = source.load()
    assert table["caption"] == [scene.captions[0] for scene in scenes("val", 4)]
    stamp = source.root.stat().st_mtime_ns
    EmbeddedWorld(images=4, cache=str(tmp_path)).prepare()
    assert source.root.stat().st_mtime_ns == stamp
    assert len(list(tmp_path.iterdir())) == 1


def test_the_geometric_oracle_reads_real_pictures() -> None:
    single = [scene for scene in scenes("val", 500) if len(scene.things) == 1]
    right = [
        (found.colour, found.shape, found.background) == (*scene.content.kinds[0][1:], scene.background)
        for scene in single
        for found in [classify(scene.render())]
    ]
    assert len(right) > 100
    assert np.mean(right) >= 0.98


def test_every_caption_fits_the_tokenizer_and_comes_back() -> None:
    tokenizer = train_tokenizer(captions=500)
    captions = [caption for scene in scenes("val", 200) for caption in scene.captions]
    ids = tokenizer(captions)["input_ids"]
    assert max(map(len, ids)) <= MAX_LENGTH
    assert [tokenizer.decode(i, skip_special_tokens=True) for i in ids] == captions


@pytest.mark.parametrize("text", ["An ocean sunset!", "Zürich, 3 €", "x"])
def test_any_text_has_tokens(text: str) -> None:
    tokenizer = train_tokenizer(captions=200)
    inner = tokenizer(text)["input_ids"][1:-1]
    assert inner
    assert tokenizer.eos_token_id not in inner
