"""What holds for every score, the shipped ones and any file that is added to `sdprune/metrics/scores`."""

import doctest
import inspect
import json
import pickle

import lightning
import pytest
import torch
from scoring import PooledFeatures, pictures
from tiny_clip import save_tiny_clip

from sdprune.metrics import (
    CLIPScore,
    FrechetInceptionDistance,
    ImageBatch,
    ImageScores,
    Score,
    Statistics,
    feature_statistics,
    image_scores,
)
from sdprune.mini.examiner import Examiner

N = 12
PROMPTS = ["a red star", "two blue rings", "a red moon above a pink cross on a sand background"] * (N // 3)


def every_score() -> list[type[Score]]:
    found, waiting = [], [Score]
    while waiting:
        for one in type.__subclasses__(waiting.pop()):
            waiting.append(one)
            if one.__module__.startswith("sdprune.metrics.scores.") and not inspect.isabstract(one):
                found.append(one)
    return sorted(found, key=lambda one: one.__name__)


SCORES = pytest.mark.parametrize("kind", every_score(), ids=lambda one: one.__name__)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))


@pytest.fixture
def make(tiny, tmp_path):
    """Scores with their defaults, but with small networks."""
    options = {"extractor": PooledFeatures(), "model": tiny, "examiner": str(tmp_path)}
    torch.manual_seed(0)
    Examiner().save(tmp_path)

    def made(kind: type[Score]) -> Score:
        return kind(**{name: options[name] for name in inspect.signature(kind).parameters if name in options})

    return made


def scores_of(score: Score, images: torch.Tensor, order: list[list[int]], dense: torch.Tensor | None) -> ImageScores:
    scores = ImageScores([score])
    scores.prepare("cpu")
    if score.needs_reference:
        real = score.extractor(pictures(30, 7, 40, 40))
        made = feature_statistics(real)
        scores.set_reference(score.name, Statistics(made.mu, made.sigma, len(real), None, real))
    for places in order:
        prompts = [PROMPTS[place] for place in places]
        scores.update(ImageBatch(images[places], prompts, places, None if dense is None else dense[places]))
    return scores


def halves(permuted: bool = False) -> list[list[int]]:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)) if permuted else torch.arange(N)
    return [half.tolist() for half in order.split(N // 2)]


def test_the_shipped_scores_are_found():
    assert {"FrechetInceptionDistance", "CLIPScore", "DenseDistance"} <= {kind.__name__ for kind in every_score()}


@SCORES
def test_scores_are_finite_and_come_from_their_rows_alone(kind, make):
    dense, images = pictures(N, 1, 40, 40), (pictures(N, 1, 40, 40).float() * 0.8).to(torch.uint8)
    score = make(kind)
    one = scores_of(score, images, halves(), dense)
    baseline = scores_of(score, dense, halves(), None)
    found, differences = one.compute(), one.compare(baseline.rows())
    assert all(isinstance(value, float) and abs(value) < float("inf") for value in (found | differences).values())
    assert found or differences
    for name in found:
        if f"{name}_diff" in differences:
            expected = found[name] - baseline.compute()[name]
            assert differences[f"{name}_diff"] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    restored = ImageScores([make(kind)])
    restored.references = one.references
    restored.load_rows(one.rows())
    assert restored.compute() == found
    assert restored.compare(baseline.rows()) == differences
    assert pickle.loads(pickle.dumps(one)).compute() == found  # as processes that are spawned get it
    reference = one.references.get(score.name)  # without what is remembered between the two
    assert score.compute(one.rows(), reference) == found
    assert score.compare(one.rows(), baseline.rows(), reference) == differences


@SCORES
def test_the_order_of_images_changes_no_score(kind, make):
    images, dense = pictures(N, 1, 40, 40), pictures(N, 2, 40, 40)
    found = []
    for permuted in (False, True):
        one = scores_of(make(kind), images, halves(permuted), dense)
        found.append((one.compute(), one.compare(scores_of(make(kind), dense, halves(permuted), None).rows())))
    for (name, value), other in zip(
        (found[0][0] | found[0][1]).items(), (found[1][0] | found[1][1]).values(), strict=True
    ):
        assert other == pytest.approx(value, rel=1e-5, abs=1e-6), name  # networks see other batches


@SCORES
def test_computing_changes_no_rows(kind, make):
    images, dense = pictures(N, 1, 40, 40), pictures(N, 2, 40, 40)
    one, baseline = scores_of(make(kind), images, halves(), dense), scores_of(make(kind), dense, halves(), None)
    before = {key: values.clone() for key, values in one.rows().items()}
    dense_rows = {key: values.clone() for key, values in baseline.rows().items()}
    one.compute()
    one.compare(baseline.rows())
    assert all(values.equal(before[key]) for key, values in one.rows().items())
    assert all(values.equal(dense_rows[key]) for key, values in baseline.rows().items())


@SCORES
def test_descriptions_are_json_and_columns_have_keys(kind, make):
    score, twin = make(kind), make(kind)
    described = score.describe()
    assert json.loads(json.dumps(described, allow_nan=False)) == described == twin.describe()
    keys = [column.key for column in score.columns]
    assert len(set(keys)) == len(keys) > 0
    assert keys == [column.key for column in twin.columns]
    assert all(json.loads(json.dumps(dict(column.facts))) == column.facts for column in score.columns)
    assert score.minimum >= 1


def test_all_scores_together_say_what_each_says_alone(make):
    images, dense = pictures(N, 1, 40, 40), pictures(N, 2, 40, 40)
    alone: dict[str, float] = {}
    references = {}
    for kind in every_score():
        one = scores_of(make(kind), images, halves(), dense)
        alone |= one.compute()
        references |= one.references
    together = ImageScores([make(kind) for kind in every_score()])
    for name, reference in references.items():
        together.set_reference(name, reference)
    for places in halves():
        together.update(ImageBatch(images[places], [PROMPTS[i] for i in places], places, dense[places]))
    assert together.compute() == alone


def test_the_example_in_the_documentation_runs():
    (example,) = doctest.DocTestFinder(recurse=False).find(image_scores.ImageScores, "ImageScores")
    assert len(example.examples) > 5
    assert doctest.DocTestRunner().run(example).failed == 0


class Scoring(lightning.LightningModule):
    """Scores the images that it gets, as a user's module would."""

    def __init__(self, scores: ImageScores) -> None:
        super().__init__()
        self.scores = scores

    def predict_step(self, batch):
        images, places = batch
        self.scores.update(ImageBatch(images, [PROMPTS[place] for place in places.tolist()], places))

    def on_predict_epoch_end(self):
        self.found = self.scores.compute()


def test_scores_work_under_a_plain_trainer_in_half_precision(tiny):
    images, extractor = pictures(N, 1, 40, 40), PooledFeatures()
    reference = feature_statistics(extractor(pictures(30, 7, 40, 40)))
    wanted = ImageScores([FrechetInceptionDistance(extractor), CLIPScore(tiny)])
    wanted.set_reference("fid", reference)
    for places in torch.arange(N).split(4):
        wanted.update(ImageBatch(images[places], [PROMPTS[place] for place in places.tolist()], places))
    module = Scoring(ImageScores([FrechetInceptionDistance(PooledFeatures()), CLIPScore(tiny)]))
    module.scores.set_reference("fid", reference)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(N)), batch_size=4)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, precision="bf16-true", logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.predict(module, loader)
    assert module.found == wanted.compute()
