"""FID and what all metrics share: statistics, the reference, ordering, processes, records."""

import sys
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import scipy.linalg
import torch
from scoring import FEATURES, D, PooledFeatures, pictures
from torchmetrics.image.fid import FrechetInceptionDistance as TorchmetricsFID

from sdprune.errors import InputError
from sdprune.metrics import (
    ClipImageFeatures,
    CLIPScore,
    FrechetInceptionDistance,
    ImageBatch,
    ImageScores,
    InceptionFeatures,
    Score,
    Statistics,
    feature_statistics,
    frechet_distance,
    reference_path,
    reference_statistics,
)
from sdprune.metrics.frechet import Moments
from sdprune.pipelines.resolve import resolve


def textbook_fid(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as it is printed, with scipy's square root of the plain product."""
    cross = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    shift = a.mean(0) - b.mean(0)
    return shift @ shift + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * cross)


def fid_with_reference(seed: int = 9, *others: Score) -> ImageScores:
    scores = ImageScores([FrechetInceptionDistance(PooledFeatures()), *others])
    scores.set_reference("fid", feature_statistics(PooledFeatures()(pictures(40, seed))))
    return scores


# --- the distance ---------------------------------------------------------------------------------------------


def test_frechet_distance_is_the_textbook_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, D)) @ rng.normal(size=(D, D)), rng.normal(1, 2, size=(30, D))
    one, two = feature_statistics(torch.from_numpy(a)), feature_statistics(torch.from_numpy(b))
    distance = frechet_distance(one.mu, one.sigma, two.mu, two.sigma)
    assert distance == pytest.approx(textbook_fid(a, b), rel=1e-10)
    assert distance == pytest.approx(frechet_distance(two.mu, two.sigma, one.mu, one.sigma), rel=1e-10)


def test_frechet_distance_by_hand():
    # Diagonal covariances: |mu|^2 = 9, then (1 - 2)^2 + (3 - 1)^2 of the deviations.
    mu, other = torch.zeros(2), torch.tensor([3.0, 0.0])
    assert frechet_distance(mu, torch.diag(torch.tensor([1.0, 9])), other, torch.diag(torch.tensor([4.0, 1]))) == (
        pytest.approx(14, rel=1e-12)
    )


def test_singular_covariances_are_measured_and_equal_ones_are_zero():
    few = feature_statistics(torch.randn(4, 20, generator=torch.Generator().manual_seed(0)))
    assert frechet_distance(few.mu, few.sigma, few.mu, few.sigma) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few.mu, few.sigma, few.mu, 4 * few.sigma) == pytest.approx(few.sigma.trace().item(), 1e-6)


def test_frechet_distance_names_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\[2\], \[2, 2\], \[3\], \[3, 3\]"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))


def test_moments_in_batches_are_those_of_all_rows():
    rows = torch.randn(23, D, generator=torch.Generator().manual_seed(0)) + 1000
    moments = Moments()
    for batch in rows.split([1, 9, 2, 11]):
        moments.add(batch)
    streamed = moments.statistics()
    np.testing.assert_allclose(streamed.mu, rows.double().mean(0), rtol=1e-13)
    np.testing.assert_allclose(streamed.sigma, np.cov(rows.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)
    assert streamed.n == 23


def test_fid_equals_torchmetrics():
    class Extractor(torch.nn.Module):
        num_features = D

        def forward(self, images):
            return PooledFeatures()(images)

    real, fake = pictures(40, 9), pictures(25, 1, 12, 10)
    theirs = TorchmetricsFID(feature=Extractor())
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = fid_with_reference(9)
    ours.update(ImageBatch(fake, None, range(25)))
    assert ours.compute()["fid"] == pytest.approx(theirs.compute().item(), rel=1e-5)


# --- statistics in files --------------------------------------------------------------------------------------


def test_statistics_survive_a_file_bit_for_bit(tmp_path):
    made = feature_statistics(torch.randn(9, D))
    made = Statistics(made.mu, made.sigma, 9, "pooled")
    made.save(tmp_path / "deep" / "real.npz")
    read = Statistics.load(tmp_path / "deep" / "real.npz")
    assert read.mu.equal(made.mu)
    assert read.sigma.equal(made.sigma)
    assert (read.n, read.extractor) == (9, "pooled")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["real.npz"]


def test_a_foreign_file_needs_only_mu_and_sigma(tmp_path):
    real = PooledFeatures()(pictures(40, 9)).double().numpy()
    np.savez(tmp_path / "foreign.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    assert Statistics.load(tmp_path / "foreign.npz").n is None
    metric = ImageScores([FrechetInceptionDistance(PooledFeatures())])
    metric.set_reference("fid", Statistics.load(tmp_path / "foreign.npz"))
    metric.prepare("cpu")
    metric.update(ImageBatch(pictures(25), None, range(25)))
    expected = textbook_fid(PooledFeatures()(pictures(25)).double().numpy(), real)
    assert metric.compute()["fid"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, r"no sigma.*found: mu"),
        ({"features": np.zeros(3)}, r"no mu and no sigma.*found: features"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu \[3\] and sigma \[4, 4\]"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, r"mu \[1, 3\]"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
    ],
)
def test_a_bad_statistics_file_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=rf"bad\.npz.*{message}"):
        Statistics.load(tmp_path / "bad.npz")


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04cut"])
def test_a_file_that_is_no_npz_is_named(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.npz is not a readable npz"):
        Statistics.load(tmp_path / "bad.npz")


def test_a_missing_statistics_file_is_named(tmp_path):
    with pytest.raises(InputError, match="No FID statistics at"):
        Statistics.load(tmp_path / "none.npz")


def test_a_reference_of_another_extractor_is_refused():
    metric = ImageScores([FrechetInceptionDistance(PooledFeatures())])
    with pytest.raises(InputError, match=r"'inception-2048/clean'.*'pooled'"):
        metric.set_reference("fid", Statistics(torch.zeros(D), torch.eye(D), extractor="inception-2048/clean"))
    with pytest.raises(InputError, match="has 3 features, 'pooled' has 6"):
        metric.set_reference("fid", Statistics(torch.zeros(3), torch.eye(3)))


# --- the reference cache --------------------------------------------------------------------------------------


def test_reference_of_mixed_sizes_is_computed_once_and_found_again(tmp_path):
    images = [*pictures(20, 1, 8, 8), *pictures(17, 2, 6, 10), *pictures(3, 3, 5, 5)]
    expected = feature_statistics(torch.cat([PooledFeatures()(image[None]) for image in images]))
    extractor, calls = PooledFeatures(), []

    def stream():
        calls.append(1)
        return iter(images)

    first = reference_statistics(stream, extractor, tmp_path, {"set": "a"})
    again = reference_statistics(stream, extractor, tmp_path, {"set": "a"})
    np.testing.assert_allclose(first.mu, expected.mu, rtol=1e-6)
    np.testing.assert_allclose(first.sigma, expected.sigma, rtol=1e-4, atol=1e-9)
    assert extractor.batches == [32, 8]
    assert calls == [1]
    assert again.sigma.equal(first.sigma)
    assert (again.n, again.extractor) == (40, "pooled")


def test_the_reference_path_depends_on_images_and_extractor(tmp_path):
    paths = [
        reference_path(PooledFeatures(), tmp_path, {"set": "a", "n": 1}),
        reference_path(PooledFeatures(), tmp_path, {"set": "b", "n": 1}),
        reference_path(PooledFeatures(2), tmp_path, {"set": "a", "n": 1}),
    ]
    assert len(set(paths)) == 3
    assert reference_path(PooledFeatures(), tmp_path, {"n": 1, "set": "a"}) == paths[0]


def test_one_real_image_is_too_few_and_leaves_no_cache(tmp_path):
    with pytest.raises(InputError, match="at least 2 images for a covariance, got 1"):
        reference_statistics(lambda: pictures(1), PooledFeatures(), tmp_path, {})
    assert not list(tmp_path.iterdir())


# --- rows, order, records -------------------------------------------------------------------------------------


def test_the_order_of_images_changes_no_bit():
    features, one, other = PooledFeatures()(pictures(11)), fid_with_reference(), fid_with_reference()
    one.append(range(11), {FEATURES: features})
    for batch in torch.randperm(11, generator=torch.Generator().manual_seed(0)).split(2):
        other.append(batch.tolist(), {FEATURES: features[batch]})
    assert other.rows()[FEATURES].equal(features)
    assert other.compute() == one.compute()


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([0, 1, 1], r"0 \.\. 2 once: got 3 rows, 2 distinct positions from 0 to 1"),
        ([0, 1, 3], r"3 rows, 3 distinct positions from 0 to 3"),
        ([1, 2, 3], r"3 rows, 3 distinct positions from 1 to 3"),
    ],
)
def test_duplicates_and_gaps_are_counted(positions, message):
    metric = fid_with_reference()
    metric.update(ImageBatch(pictures(3), None, positions))
    with pytest.raises(RuntimeError, match=message):
        metric.compute()


def test_no_images_one_image_and_no_reference_say_so():
    metric = fid_with_reference()
    with pytest.raises(RuntimeError, match="ImageScores has seen no images"):
        metric.rows()
    metric.update(ImageBatch(pictures(1), None, [0]))
    with pytest.raises(InputError, match="at least 2 images for a covariance, got 1"):
        metric.compute()
    bare = ImageScores([FrechetInceptionDistance(PooledFeatures())])
    bare.update(ImageBatch(pictures(2), None, [0, 1]))
    with pytest.raises(RuntimeError, match="fid has no reference"):
        bare.compute()


def test_positions_must_match_images():
    with pytest.raises(ValueError, match=rf"'positions': 2, '{FEATURES}': 3"):
        fid_with_reference().update(ImageBatch(pictures(3), None, [0, 1]))


@pytest.mark.parametrize("images", [pictures(2).float(), pictures(2)[0], pictures(2)[:, :1]])
def test_only_uint8_batches_are_images(images):
    with pytest.raises(ValueError, match=r"uint8 images \[b, 3, h, w\]"):
        fid_with_reference().update(ImageBatch(images, None, [0, 1]))


def test_rows_of_a_record_give_the_same_score_and_reset_forgets_them(tmp_path):
    metric, restored = fid_with_reference(), fid_with_reference()
    metric.update(ImageBatch(pictures(9), None, range(9)))
    np.savez(tmp_path / "rows.npz", **metric.rows())
    with np.load(tmp_path / "rows.npz") as record:
        restored.load_rows({name: torch.from_numpy(record[name]) for name in record.files})
    assert restored.compute() == metric.compute()
    restored.reset()
    with pytest.raises(RuntimeError, match="seen no images"):
        restored.rows()
    with pytest.raises(InputError, match=rf"wanted {FEATURES} of one length; got scores \[3\]"):
        restored.load_rows({"scores": torch.zeros(3)})


def test_an_update_after_compute_is_counted():
    metric, whole = fid_with_reference(), fid_with_reference()
    metric.update(ImageBatch(pictures(9)[:5], None, range(5)))
    early = metric.compute()
    metric.update(ImageBatch(pictures(9)[5:], None, range(5, 9)))
    whole.update(ImageBatch(pictures(9), None, range(9)))
    assert metric.compute()["fid"] == pytest.approx(whole.compute()["fid"], rel=1e-6)
    assert metric.compute() != early


def test_another_reference_after_compute_is_used():
    metric, other = fid_with_reference(9), fid_with_reference(8)
    for scores in (metric, other):
        scores.update(ImageBatch(pictures(9), None, range(9)))
    early = metric.compute()
    metric.set_reference("fid", other.references["fid"])
    assert metric.compute() == other.compute() != early


def test_a_comparison_with_itself_is_exactly_zero_and_resamples_can_be_chosen():
    score = FrechetInceptionDistance(PooledFeatures(), name="fid_pooled", resamples=20)
    metric, other = ImageScores([score]), fid_with_reference()
    metric.set_reference("fid_pooled", feature_statistics(torch.randn(40, D)))
    metric.update(ImageBatch(pictures(9), None, range(9)))
    names = ("fid_pooled_diff", "fid_pooled_diff_low", "fid_pooled_diff_high", "fid_pooled_diff_se")
    assert metric.compare(metric.rows()) == dict.fromkeys(names, 0.0) | {"fid_pooled_diff_resamples": 20.0}
    score.resamples = 0
    other.update(ImageBatch(pictures(9, 5), None, range(9)))
    other.set_reference("fid", metric.references["fid_pooled"])
    expected = metric.compute()["fid_pooled"] - other.compute()["fid"]
    assert metric.compare(other.rows()) == {"fid_pooled_diff": pytest.approx(expected, rel=1e-12)}
    with pytest.raises(InputError, match=rf"pair {FEATURES} \[9, 6\] with the dense record's \[8, 6\]"):
        metric.compare({FEATURES: torch.zeros(8, D)})


@pytest.mark.parametrize("resamples", [-1, 1])
def test_impossible_numbers_of_resamples_are_refused_at_once(resamples):
    with pytest.raises(InputError, match=f"resamples must be 0 or at least 2, got {resamples}"):
        FrechetInceptionDistance(PooledFeatures(), resamples=resamples)
    with pytest.raises(InputError, match=f"resamples must be at least 2, got {resamples}"):
        CLIPScore(resamples=resamples)


def test_metrics_work_inside_inference_mode():
    inside, outside = fid_with_reference(), fid_with_reference()
    with torch.inference_mode():
        inside.update(ImageBatch(pictures(9), None, torch.arange(9)))
        scores = inside.compute()
    outside.update(ImageBatch(pictures(9), None, torch.arange(9)))
    assert scores == outside.compute()
    assert inside.compare(outside.rows())["fid_diff"] == 0


# --- processes ------------------------------------------------------------------------------------------------


def score_share(rank: int, world: int, folder: str) -> None:
    """On each process: score the batches rank, rank + world, ... of 14 images, then of 2, and save every answer."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.save([answers(14, rank, world), answers(2, rank, world)], f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def answers(n: int, rank: int, world: int) -> dict:
    clip = CLIPScore()
    scores = fid_with_reference(9, clip)
    images, texts = pictures(n), torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    for batch in list(torch.arange(n).split(3))[rank::world]:
        features = PooledFeatures()(images[batch])[:, :4]
        known = {clip.extractor.features.key: features, clip.extractor.texts.key: texts[batch]}
        scores.update(ImageBatch(images[batch], [f"prompt {place % 4}" for place in batch.tolist()], batch), known)
    found = {"scores": scores.compute(), "rows": scores.rows()}
    found["diff"] = scores.compare({**found["rows"], FEATURES: found["rows"][FEATURES] + 1})
    scores.load_rows(found["rows"])
    return found | {"reloaded": scores.compute()}


def test_two_processes_give_the_bits_of_one(tmp_path):
    torch.multiprocessing.spawn(score_share, (2, str(tmp_path)), nprocs=2)
    threads = torch.get_num_threads()
    score_share(0, 1, str(tmp_path))
    torch.set_num_threads(threads)
    for rank in (0, 1):
        # The second set is one batch: process 1 has nothing to add to it.
        alone, shared = torch.load(tmp_path / "1-0.pt"), torch.load(tmp_path / f"2-{rank}.pt")
        for one, two in zip(alone, shared, strict=True):
            assert two["scores"] == one["scores"]
            assert two["reloaded"] == one["scores"]
            assert two["diff"] == one["diff"]
            assert all(two["rows"][name].equal(rows) for name, rows in one["rows"].items())


# --- extractors and construction ------------------------------------------------------------------------------


def test_inception_without_its_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    extractor = InceptionFeatures()
    assert (extractor.name, extractor.num_features) == ("inception-2048/clean", 2048)
    assert "weights" in extractor.describe()
    with pytest.raises(InputError, match=r'pip install "sdprune\[inception\]"'):
        extractor.load("cpu")


def test_inception_weights_must_exist(tmp_path):
    with pytest.raises(InputError, match="No Inception weights"):
        InceptionFeatures(weights=str(tmp_path / "none.pth"))


def test_inception_trunk_is_the_whole_network_without_its_resize(tmp_path, monkeypatch):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
    torch.save({}, tmp_path / "random.pth")
    torch.manual_seed(0)
    network = module.FeatureExtractorInceptionV3("inception", ["2048"], str(tmp_path / "random.pth"))
    torch.manual_seed(0)
    ours = InceptionFeatures(weights=str(tmp_path / "random.pth"))
    images = pictures(2, 0, 299, 299)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), network(images)[0], rtol=1e-5, atol=1e-6)
    assert ours(images).shape == (2, 2048)


def test_miniature_is_the_package_own_directory_and_the_rest_is_left_alone(monkeypatch):
    import sdprune

    monkeypatch.delenv("SDPRUNE_MINIATURE", raising=False)  # what other tests set
    root = Path(sdprune.__file__).parent
    assert Path(resolve("miniature", "evaluator")) == root / "mini" / "weights" / "evaluator"
    assert Path(resolve("miniature", "pipeline")) == root / "mini" / "weights" / "pipeline"
    assert resolve("openai/clip-vit-base-patch32", "evaluator") == "openai/clip-vit-base-patch32"


def test_metrics_are_built_from_configuration_without_reading_weights():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--metrics", type=list[Score])
    config = [
        {
            "class_path": "FrechetInceptionDistance",
            "init_args": {"extractor": {"class_path": "ClipImageFeatures", "init_args": {"model": "/no/such/model"}}},
        },
        {"class_path": "CLIPScore", "init_args": {"model": "/no/such/model", "name": "clip_l"}},
    ]
    fid, clip = parser.instantiate(parser.parse_object({"metrics": config})).metrics
    assert isinstance(fid.extractor, ClipImageFeatures)
    assert isinstance(clip, CLIPScore)
    assert clip.name == "clip_l"
    for score in (fid, clip):
        scores = ImageScores([score])
        assert not list(scores.children())  # nothing that a precision plugin would cast
        with pytest.raises(InputError, match="Cannot load the CLIP model '/no/such/model': no such directory"):
            scores.prepare("cpu")
