"""The examiner: what counts as right, the score over captions of every category, and the command that measures."""

import itertools
import json

import numpy as np
import pytest
import torch
from command_lines import predict, runs
from geometry import classify

from sdprune.errors import InputError
from sdprune.metrics import ImageBatch, ImageScores
from sdprune.mini import examine
from sdprune.mini.captions import Kind, parse
from sdprune.mini.examiner import Examiner, Reading, judge
from sdprune.mini.score import ExaminerScore
from sdprune.mini.world import Thing, scenes

CAPTIONS = {
    "attribute": "a small red star on a sand background",
    "relation": "a red star left of a blue ring on a black background",
    "count": "three red stars",
}


STAR, SMALL_STAR, MOON = Kind("large", "red", "star"), Kind("small", "red", "star"), Kind("large", "red", "moon")
RING, RED_RING, BLUE_STAR = Kind("small", "blue", "ring"), Kind("small", "red", "ring"), Kind("small", "blue", "star")
LEFT, RIGHT, LOWER = (10, 30), (50, 40), (20, 60)


@pytest.mark.parametrize(
    ("caption", "shown", "expected"),
    [
        ("a small red star on a grey background", [(SMALL_STAR, LEFT)], {"attribute": 1, "background": 1}),
        ("a small red star on a sand background", [(STAR, LEFT)], {"attribute": 0, "background": 0}),
        ("a red star", [(STAR, LEFT)], {"attribute": 1}),  # medium goes unsaid, so no size is asked for
        ("a red star", [(MOON, LEFT)], {"attribute": 0}),
        ("a red star", [], {"attribute": 0}),
        ("a red star", [(STAR, LEFT), (STAR, RIGHT)], {"attribute": 0}),
        ("a red star left of a blue ring", [(STAR, LEFT), (RING, RIGHT)], {"object": 1, "relation": 1}),
        ("a red star left of a blue ring", [(RING, RIGHT), (STAR, LEFT)], {"object": 1, "relation": 1}),
        ("a red star left of a blue ring", [(STAR, RIGHT), (RING, LEFT)], {"object": 1, "relation": 0}),
        ("a red star left of a blue ring", [(STAR, LEFT), (RING, LOWER)], {"object": 1, "relation": 0}),
        ("a red star above a blue ring", [(STAR, LEFT), (RING, LOWER)], {"object": 1, "relation": 1}),
        ("a red star below a blue ring", [(STAR, LEFT), (RING, LOWER)], {"object": 1, "relation": 0}),
        ("a red star left of a blue ring", [(RED_RING, LEFT), (BLUE_STAR, RIGHT)], {"object": 0, "relation": 0}),
        ("a red star left of a large red star", [(STAR, RIGHT), (SMALL_STAR, LEFT)], {"object": 1, "relation": 1}),
        ("two red stars", [(STAR, LEFT), (STAR, RIGHT)], {"count": 1}),
        ("two red stars", [(STAR, LEFT), (RED_RING, RIGHT)], {"count": 0}),
        ("three red stars", [(STAR, LEFT), (STAR, RIGHT)], {"count": 0}),
    ],
)
def test_what_is_right(caption, shown, expected) -> None:
    assert judge(parse(caption), Reading("grey", [Thing(kind, *place) for kind, place in shown])) == expected


class Templates(Examiner):
    """Reads what it is given."""

    def __init__(self, readings: list[Reading]) -> None:
        super().__init__()
        self.readings = iter(readings)

    def read(self, pictures: torch.Tensor) -> list[Reading]:
        return list(itertools.islice(self.readings, len(pictures)))


def scored(monkeypatch, miniature, right: list[bool], captions: list[str]) -> ImageScores:
    """Scores of images that show what their captions say or, where not right, nothing at all."""
    readings = []
    for caption, good in zip(captions, right, strict=True):
        said = parse(caption)
        places = [(10, 30), (50, 30), (10, 55), (50, 55)]
        things = [Thing(kind, *place) for kind, place in zip(said.kinds * said.count, places, strict=False)]
        readings.append(Reading(said.background or "grey", things) if good else Reading("white", []))
    scores = ImageScores([ExaminerScore()])
    monkeypatch.setattr(Examiner, "load", classmethod(lambda cls, directory: Templates(readings)))
    images = torch.zeros(len(captions), 3, 64, 64, dtype=torch.uint8)
    for places in torch.arange(len(captions)).split(2):
        scores.update(ImageBatch(images[places], [captions[i] for i in places], places))
    return scores


def test_shares_are_over_the_captions_that_say_something(monkeypatch, miniature) -> None:
    captions = [CAPTIONS["attribute"], CAPTIONS["relation"], CAPTIONS["count"], CAPTIONS["count"], "two red stars"]
    dense = scored(monkeypatch, miniature, [True, True, True, False, False], captions)
    found = dense.compute()
    assert found == pytest.approx(
        {
            "correct": 3 / 5, "correct_attribute": 1, "correct_object": 1, "correct_relation": 1,
            "correct_count": 1 / 3, "correct_background": 1, "correct_se": np.std([1, 1, 1, 0, 0], ddof=1) / 5**0.5,
        }
    )  # fmt: skip
    pruned = scored(monkeypatch, miniature, [False, True, False, False, True], captions)
    differences = pruned.compare(dense.rows())
    assert differences["correct_diff"] == pytest.approx(2 / 5 - 3 / 5)
    assert differences["correct_count_diff"] == pytest.approx(0)
    assert differences["correct_background_diff"] == pytest.approx(-1 / 2)
    assert "correct_relation_diff" not in differences  # one image has no interval
    draws = np.random.default_rng(0).integers(0, 3, (1000, 3))  # the resampled images of the three counts
    shares = (np.array([0, 0, 1]) - np.array([1, 0, 0]))[draws].mean(1)
    assert differences["correct_count_diff_low"] == pytest.approx(np.quantile(shares, 0.025))
    assert differences["correct_count_diff_high"] == pytest.approx(np.quantile(shares, 0.975))
    per_image = pruned.per_image(pruned.rows())
    assert per_image["correct_count"][2:] == [0, 0, 1]
    assert np.isnan(per_image["correct_count"][:2]).all()


def test_a_category_that_no_caption_has_is_left_out(monkeypatch, miniature) -> None:
    found = scored(monkeypatch, miniature, [True, False], ["a red star", "a blue ring"]).compute()
    assert found.keys() == {"correct", "correct_se", "correct_attribute"}


def test_other_captions_are_refused(miniature) -> None:
    scores = ImageScores([ExaminerScore()])
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"'a cat on a mat'.*embedded world.*--model.metrics"):
        scores.update(ImageBatch(images, ["a red star", "a cat on a mat"], range(2)))


def test_a_directory_without_an_examiner_is_refused(sdprune, tmp_path) -> None:
    options = ["--model.metrics=[{class_path: ExaminerScore, init_args: {examiner: /nowhere}}]"]
    told = sdprune(*predict(tmp_path, *options))
    assert told.code == 2
    assert "/nowhere" in told.err
    assert "Traceback" not in told.err


def test_the_score_flows_into_records_comparison_and_report(sdprune, tmp_path) -> None:
    assert sdprune(*predict(tmp_path, "--model.metrics+=ExaminerScore")).code == 0
    dense, pruned = runs(tmp_path, "dense")[0], runs(tmp_path, "text_encoder")[0]
    for run in (dense, pruned):
        record = json.loads((run / "results.json").read_text())
        assert 0 <= record["metrics"]["correct"] <= 1
        assert "correct_background" in record["metrics"]
        assert "correct_relation" in (run / "images.csv").read_text().splitlines()[0]
    assert {"correct_diff", "correct_diff_low", "correct_diff_high"} <= record["comparison"].keys()
    assert sdprune("report", tmp_path, f"--out={tmp_path / 'report'}").code == 0
    header = (tmp_path / "report" / "tables" / "runs.csv").read_text().splitlines()[0]
    assert {"correct", "correct_background", "correct_diff_low"} <= set(header.split(","))


def test_the_command_measures_a_miniature(miniature, capsys) -> None:
    assert examine.main([str(miniature), "--n=70", "--steps=2", "--seed=1"]) == 0
    table = capsys.readouterr().out
    assert set(examine.GOALS) - {"two objects: relation"} <= {line[:40].strip() for line in table.splitlines()}


@pytest.mark.parametrize("arguments", [["/nowhere"], [".", "--n=0"]])
def test_the_command_refuses_what_it_cannot_measure(arguments, capsys) -> None:
    assert examine.main(arguments) == 2
    assert "sdprune: error: " in capsys.readouterr().err


def test_real_pictures_are_measured_as_an_independent_oracle_reads_them(monkeypatch) -> None:
    """With readings by geometry in place of the network's, single real objects are right in nearly all cases."""
    chosen = [scene for scene in scenes("val", 200, seed=5) if scene.category == "attribute"]
    found = [classify(scene.render()) for scene in chosen]
    readings = [Reading(one.background, [Thing(Kind(one.size, one.colour, one.shape), 32, 32)]) for one in found]
    right = [good for name, good in examine.judged(chosen, readings) if name == "one object: colour and shape"]
    assert len(right) == len(chosen) > 30
    assert np.mean(right) >= 0.98


def test_captions_of_another_world_are_refused_before_anything_is_drawn(sdprune, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a red star\na cat on a mat\n")
    options = ["--data.n=2", "--data.source=TextFile", f"--data.source.path={tmp_path / 'prompts.txt'}"]
    options = ["predict", "--config", "configs/mini/predict.yaml", *options, "--model.metrics=[ExaminerScore]"]
    told = sdprune(*options, f"--model.output={tmp_path}")
    assert told.code == 2
    assert "'a cat on a mat'" in told.err
    assert not list(tmp_path.glob("*/images/*.png"))
