"""KID, MMD, precision and recall, FID at infinity, distances to the dense image, verdicts: against nested loops."""

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scoring import D, Measured, PooledFeatures, pictures, reference
from test_metrics import textbook_fid
from tiny_clip import save_tiny_clip
from torch import Tensor

from sdprune.errors import InputError
from sdprune.metrics import (
    ClipImageFeatures,
    CLIPScore,
    Column,
    DenseDistance,
    FrechetDistanceAtInfinity,
    FrechetInceptionDistance,
    ImageBatch,
    ImageScores,
    InceptionFeatures,
    KernelInceptionDistance,
    MaximumMeanDiscrepancy,
    PrecisionRecall,
    Score,
    Statistics,
    feature_statistics,
    frechet_distance,
    verdict,
)
from sdprune.metrics.features.preprocess import PROTOCOLS
from sdprune.metrics.scores.clip_score import cosine_scores


def numbers(n: int, seed: int, shift: float = 0.0, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


# --- kernels --------------------------------------------------------------------------------------------------


def naive_mmd(own, real, kernel) -> float:
    """The U-statistic in loops over pairs."""
    own, real = own.double().tolist(), real.double().tolist()
    within = [
        sum(kernel(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j) / (len(a) * (len(a) - 1))
        for a in (own, real)
    ]
    between = sum(kernel(x, y) for x in own for y in real) / (len(own) * len(real))
    return within[0] + within[1] - 2 * between


def cubic(x, y):
    return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3


def gaussian(x, y, sigma=10.0):
    x, y = ([a / math.sqrt(sum(b * b for b in v)) for a in v] for v in (x, y))
    return math.exp(-sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (2 * sigma**2))


@pytest.mark.parametrize(("n", "m"), [(9, 13), (13, 9), (2, 2)])
def test_kid_and_mmd_are_their_sums_over_pairs(n, m):
    own, real = numbers(n, 0, 0.3), numbers(m, 1)
    kid = Measured(KernelInceptionDistance(PooledFeatures()), own, real)
    assert kid.compute() == {"kid": pytest.approx(naive_mmd(own, real, cubic), rel=1e-10, abs=1e-12)}
    mmd = Measured(MaximumMeanDiscrepancy(PooledFeatures()), own, real)
    assert mmd.compute() == {"mmd": pytest.approx(1000 * naive_mmd(own, real, gaussian), rel=1e-8, abs=1e-8)}


def test_kernels_in_parts_are_kernels_at_once(monkeypatch):
    metrics = [Measured(KernelInceptionDistance(PooledFeatures()), numbers(23, 0), numbers(17, 1)) for _ in range(2)]
    one = metrics[0].compute()
    monkeypatch.setattr("sdprune.metrics.scores.kernel._CHUNK", 5)
    assert metrics[1].compute()["kid"] == pytest.approx(one["kid"], rel=1e-12)


def test_kid_is_unbiased_where_fid_is_not():
    """Means over many small samples of the very distribution that the reference is of."""
    real = numbers(400, 10_000)
    kid, fid = [], []
    for seed in range(300):
        rows = numbers(10, seed)
        kid.append(Measured(KernelInceptionDistance(PooledFeatures()), rows, real).compute()["kid"])
        fid.append(Measured(FrechetInceptionDistance(PooledFeatures()), rows, real).compute()["fid"])
    assert abs(np.mean(kid)) < 4 * np.std(kid) / math.sqrt(300)
    assert np.mean(fid) > 1


def test_the_interval_of_a_kid_difference_covers_it():
    """Of 200 pairs of 60 images whose expected difference is known from a large sample, about 95 % are covered."""
    real = numbers(200, 10_000)

    def pair(n, seed):
        noise = numbers(n, seed)
        return noise + 0.05, noise * 1.2 + 0.2

    kid = [Measured(KernelInceptionDistance(PooledFeatures()), rows, real) for rows in pair(4000, 99)]
    truth = kid[1].compute()["kid"] - kid[0].compute()["kid"]
    covered = 0
    for seed in range(200):
        dense, pruned = pair(60, seed)
        found = Measured(KernelInceptionDistance(PooledFeatures()), pruned, real).compare(dense)
        covered += found["kid_diff_low"] <= truth <= found["kid_diff_high"]
    assert 175 <= covered <= 199


def test_a_kernel_difference_is_that_of_the_values():
    real, own, dense = numbers(20, 1), numbers(15, 2, 0.5), numbers(15, 3)
    for metric in (KernelInceptionDistance, MaximumMeanDiscrepancy):
        one, other = (Measured(metric(PooledFeatures()), rows, real) for rows in (own, dense))
        found = one.compare(dense)
        name = one.score.name
        expected = one.compute()[name] - other.compute()[name]
        assert found[f"{name}_diff"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert one.compare(own)[f"{name}_diff_se"] == 0


def test_a_comparison_takes_what_the_score_worked_out(monkeypatch):
    """Of the images among each other and with the real ones, and of the real ones, once each."""
    calls, kernel = [], KernelInceptionDistance.kernel
    monkeypatch.setattr(
        KernelInceptionDistance, "kernel", lambda self, a, b: calls.append((len(a), len(b))) or kernel(self, a, b)
    )
    scores, other = (ImageScores([KernelInceptionDistance(PooledFeatures())]) for _ in range(2))
    for one, seed in ((scores, 1), (other, 2)):
        one.update(ImageBatch(pictures(9, seed), None, range(9)))
    scores.set_reference("kid", reference(numbers(20, 1)))
    scores.compute()
    assert sorted(calls) == [(9, 9), (9, 20), (20, 20)]
    scores.compare(other.rows())
    assert sorted(calls) == [(9, 9), (9, 9), (9, 20), (9, 20), (20, 20)]


def test_only_cmmd_is_called_so():
    genuine = ClipImageFeatures("openai/clip-vit-large-patch14-336")
    assert MaximumMeanDiscrepancy(genuine).name == "cmmd"
    assert MaximumMeanDiscrepancy(genuine, sigma=5).name == "mmd"
    assert MaximumMeanDiscrepancy(PooledFeatures()).name == "mmd"
    with pytest.raises(InputError, match=r"clip-vit-large-patch14-336 with sigma 10 make a CMMD.*'pooled'"):
        MaximumMeanDiscrepancy(PooledFeatures(), name="cmmd")
    with pytest.raises(InputError, match="sigma must be above 0, got 0"):
        MaximumMeanDiscrepancy(PooledFeatures(), sigma=0)


@pytest.mark.parametrize("metric", [KernelInceptionDistance, MaximumMeanDiscrepancy, PrecisionRecall])
def test_a_file_of_mu_and_sigma_is_not_enough(metric):
    with pytest.raises(InputError, match=r"needs the features of every real image.*choose the reference `drawn`"):
        ImageScores([metric(PooledFeatures(), name="score")]).set_reference(
            "score", reference(numbers(9, 0), features=False)
        )


# --- precision and recall -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [4, 1024])
def test_precision_and_recall_are_their_definition(k, chunk, monkeypatch):
    monkeypatch.setattr("sdprune.metrics.scores.precision_recall._CHUNK", chunk)
    own, real = numbers(15, 0, 0.8), numbers(21, 1)

    def share(points, others):
        inside = 0
        for x in points.tolist():
            near = False
            for i, y in enumerate(others.tolist()):
                radius = sorted(math.dist(y, z) for j, z in enumerate(others.tolist()) if j != i)[k - 1]
                near |= math.dist(x, y) <= radius
            inside += near
        return inside / len(points)

    metric = Measured(PrecisionRecall(PooledFeatures(), neighbours=k), own, real)
    expected = {"precision": share(own.double(), real.double()), "recall": share(real.double(), own.double())}
    assert metric.compute() == pytest.approx(expected)
    assert 0 < expected["precision"] < 1
    assert 0 < expected["recall"] < 1


@pytest.mark.parametrize("shift", [0.0, 1e4], ids=["centred", "far from 0"])
def test_ties_are_decided_as_exact_distances_decide_them(shift):
    """On a grid most distances are equal to others; so are a generated image and its real twin."""
    generator = torch.Generator().manual_seed(0)
    real, own = (torch.randint(0, 3, (n, 4), generator=generator).double() + shift for n in (60, 50))
    own[:10] = real[:10]

    def members(points, others, k=3):
        squares = ((others[:, None] - others[None]) ** 2).sum(-1)
        reach = np.sort(squares + np.diag([np.inf] * len(others)), 1)[:, k - 1]
        return (((points[:, None] - others[None]) ** 2).sum(-1) <= reach).any(1)

    metric = Measured(PrecisionRecall(PooledFeatures()), own[:, [0, 1, 2, 3, 0, 1]], real[:, [0, 1, 2, 3, 0, 1]])
    a, b = (rows[:, [0, 1, 2, 3, 0, 1]].numpy() for rows in (own, real))
    assert metric.compute() == {"precision": members(a, b).mean(), "recall": members(b, a).mean()}


def test_near_ties_of_rounding_are_decided_exactly():
    """A real image with real ones on a circle around it, and generated ones on another circle, all far from 0.

    The one in the middle reaches as far as the circles, to nine digits; products of numbers so large keep only six.
    """
    generator = torch.Generator().manual_seed(0)
    angles = 2 * math.pi * torch.rand(2, 100, generator=generator, dtype=torch.float64)
    radii = 1 + 1e-9 * torch.rand(2, 100, generator=generator, dtype=torch.float64)
    real, own = torch.zeros(101, 6, dtype=torch.float64), torch.zeros(100, 6, dtype=torch.float64)
    real[1:, 2], real[1:, 3] = radii[0] * angles[0].cos(), radii[0] * angles[0].sin()
    own[:, 4], own[:, 5] = radii[1] * angles[1].cos(), radii[1] * angles[1].sin()
    real[:, :2] += 1e5
    own[:, :2] += 1e5
    reach = ((real[:, None] - real[None]) ** 2).sum(-1).sort(1).values[:, 3]
    near = (((own[:, None] - real[None]) ** 2).sum(-1) <= reach).any(1)
    metric = Measured(PrecisionRecall(PooledFeatures()), own, real)
    assert 0 < near.sum() < 100
    assert metric.compute()["precision"] == near.double().mean().item()


def test_precision_differences_are_paired():
    real, own, dense = numbers(30, 1), numbers(20, 2, 1.0), numbers(20, 3)
    metric, other = (Measured(PrecisionRecall(PooledFeatures(), "clip"), rows, real) for rows in (own, dense))
    found = metric.compare(dense)
    for name in ("clip_precision", "clip_recall"):
        assert found[f"{name}_diff"] == pytest.approx(metric.compute()[name] - other.compute()[name])
    assert found["clip_precision_diff_low"] <= found["clip_precision_diff"] <= found["clip_precision_diff_high"]
    with pytest.raises(InputError, match="3 neighbours need more images than that, got 3"):
        Measured(PrecisionRecall(PooledFeatures()), own[:3], real).compute()


# --- FID ------------------------------------------------------------------------------------------------------


def test_fid_at_infinity_takes_the_excess_of_a_finite_sample_off():
    real = numbers(20_000, 1)
    limit = frechet_distance(*(feature_statistics(real).mu, feature_statistics(real).sigma) * 2)
    plain, at_infinity = [], []
    for seed in range(10, 25):
        rows = numbers(300, seed)
        plain.append(Measured(FrechetInceptionDistance(PooledFeatures()), rows, real).compute()["fid"] - limit)
        metric = Measured(FrechetDistanceAtInfinity(PooledFeatures()), rows, real)
        at_infinity.append(metric.compute()["fid_infinity"] - limit)
    assert abs(np.mean(at_infinity)) < 0.4 * np.mean(plain)
    assert metric.compare(rows) == {"fid_infinity_diff": 0}
    with pytest.raises(InputError, match="at least 4 images"):
        Measured(FrechetDistanceAtInfinity(PooledFeatures()), real[:3], real).compute()
    with pytest.raises(InputError, match="subsets must be at least 2"):
        FrechetDistanceAtInfinity(PooledFeatures(), subsets=1)


def test_fid_at_infinity_below_0_is_remarked():
    real, score = numbers(2000, 1), FrechetDistanceAtInfinity(PooledFeatures())
    for seed in range(2, 40):
        metric = Measured(score, numbers(40, seed), real)
        scores = metric.compute()
        remarks = score.remarks(scores, metric.rows)
        assert bool(remarks) == (scores["fid_infinity"] < 0)
        if remarks:
            break
    (remark,) = remarks
    assert remark.startswith(f"fid_infinity is {scores['fid_infinity']:.4f}, and no distance is below 0")
    assert "40 images with 6 features" in remark


@pytest.mark.parametrize("package", ["pytorch_fid.fid_score", "torch_fidelity.metric_fid"])
def test_fid_equals_the_packages_own_function(package):
    module = pytest.importorskip(package, exc_type=ImportError)
    a, b = numbers(80, 0, 0.2, 16).double(), numbers(90, 1, 0, 16).double()
    one, two = feature_statistics(a), feature_statistics(b)
    ours = frechet_distance(one.mu, one.sigma, two.mu, two.sigma)
    statistics = [value.numpy() for value in (one.mu, one.sigma, two.mu, two.sigma)]
    if package.startswith("pytorch_fid"):
        theirs = module.calculate_frechet_distance(*statistics)
    else:
        names = ("mu", "sigma")
        pair = [dict(zip(names, statistics[i : i + 2], strict=True)) for i in (0, 2)]
        theirs = module.fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert ours == pytest.approx(textbook_fid(a.numpy(), b.numpy()), rel=1e-6)


def test_kid_equals_torch_fidelity():
    module = pytest.importorskip("torch_fidelity.metric_kid", exc_type=ImportError)
    a, b = numbers(40, 0, 0.2).double(), numbers(40, 1).double()
    theirs = module.kid_features_to_metric(
        a, b, kid_subsets=1, kid_subset_size=40, rng_seed=0, verbose=False
    )["kernel_inception_distance_mean"]  # fmt: skip
    ours = Measured(KernelInceptionDistance(PooledFeatures()), a, b).compute()["kid"]
    assert ours == pytest.approx(theirs, rel=1e-6)


# --- protocols ------------------------------------------------------------------------------------------------


def structured(height: int, width: int) -> Tensor:
    image = pictures(1, 0, height, width)
    image[0, :, : height // 2, : width // 2] = 255  # an edge, where bicubic overshoots and is clipped
    return image


@pytest.mark.parametrize(("height", "width"), [(64, 64), (512, 640), (299, 299), (37, 801)])
def test_clean_is_pil_bicubic_on_float_channels_rounded(height, width):
    image = structured(height, width)
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in image[0]]
    wanted = [np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for channel in channels]
    found = PROTOCOLS["clean"](image, True) * 128 + 128
    assert found.equal(found.round())
    assert np.abs(found[0].numpy() - np.stack(wanted)).max() < 0.51


@pytest.mark.parametrize(("height", "width"), [(64, 64), (512, 640), (299, 299)])
def test_pytorch_fid_is_a_bilinear_resize_without_antialiasing(height, width):
    import torch.nn.functional as F

    image = structured(height, width)
    unit = torch.from_numpy(np.array(image[0].permute(1, 2, 0)) / 255).permute(2, 0, 1)[None].float()
    wanted = 2 * F.interpolate(unit, size=(299, 299), mode="bilinear", align_corners=False) - 1
    torch.testing.assert_close(PROTOCOLS["pytorch-fid"](image, False), wanted)


@pytest.mark.parametrize("generated", [True, False])
def test_study_is_its_scripts_with_files(generated, tmp_path):
    image = structured(80, 64)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    if generated:
        picture.save(tmp_path / "generated.jpg")
        picture = Image.open(tmp_path / "generated.jpg")
    picture.resize((299, 299), Image.BICUBIC).save(tmp_path / "resized.jpg")
    pixels = np.array(Image.open(tmp_path / "resized.jpg").convert("RGB"))
    found = PROTOCOLS["study"](image, generated)
    wanted = 2 * (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255) - 1
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(found, PROTOCOLS["study"](image, not generated))


def test_protocols_have_names_and_their_numbers_do_not_mix():
    made = Statistics(torch.zeros(2048), torch.eye(2048), 9, "inception-2048/study")
    with pytest.raises(InputError, match=r"made with 'inception-2048/study', the metric uses 'inception-2048/clean'"):
        FrechetInceptionDistance(InceptionFeatures()).check_reference(made)
    FrechetInceptionDistance(InceptionFeatures("study")).check_reference(made)
    assert len({InceptionFeatures(protocol).key for protocol in PROTOCOLS}) == 3
    with pytest.raises(InputError, match=r"Unknown protocol 'cleen'. Did you mean 'clean'"):
        InceptionFeatures("cleen")


# --- distances to the dense image -----------------------------------------------------------------------------


def naive_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al., 2004, eq. 13, a window of 11 x 11 (sigma 1.5) around every pixel, borders mirrored, as loops."""
    a, b = (np.pad(p, ((0, 0), (5, 5), (5, 5)), mode="reflect") for p in (a, b))
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(3):
        for top in range(a.shape[1] - 10):
            for left in range(a.shape[2] - 10):
                x, y = (p[channel, top : top + 11, left : left + 11].astype(float) for p in (a, b))
                mx, my = (window * x).sum(), (window * y).sum()
                sx, sy = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2
                cov = (window * x * y).sum() - mx * my
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2)))
    return float(np.mean(values))


def test_distances_are_their_definitions():
    dense = pictures(3, 5, 16, 18)
    own = (dense.float() * 0.8 + 10).to(torch.uint8)
    own[2] = dense[2]
    metric, other = (ImageScores([DenseDistance(PooledFeatures())]) for _ in range(2))
    metric.update(ImageBatch(own, None, range(3), dense))
    other.update(ImageBatch(dense, None, range(3)))
    assert metric.compute() == {}
    found = metric.compare(other.rows())
    error = (own.double() - dense.double()).square().mean()
    assert found["dense_psnr"] == pytest.approx(10 * math.log10(255**2 / error), rel=1e-12)
    assert found["dense_ssim"] == pytest.approx(
        np.mean([naive_ssim(a.numpy(), b.numpy()) for a, b in zip(own, dense, strict=True)]), rel=1e-5
    )  # computed in float32
    a, b = (PooledFeatures()(images).double().numpy() for images in (own, dense))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert found["dense_feature_distance"] == pytest.approx((1 - cosine).mean(), rel=1e-9)
    assert found["dense_ssim_low"] < found["dense_ssim"] < found["dense_ssim_high"]


def test_the_dense_model_is_at_no_distance_of_itself():
    metric = ImageScores([DenseDistance(PooledFeatures())])
    metric.update(ImageBatch(pictures(3, 0, 16, 16), None, range(3)))
    found = metric.compare(metric.rows())
    assert "dense_psnr" not in found  # it would be infinite
    assert found["dense_ssim"] == 1
    assert found["dense_feature_distance"] == pytest.approx(0, abs=1e-12)


def test_lpips_is_asked_of_its_network_and_kept(monkeypatch):
    """The pretrained network is no part of the tests: a stand-in of the same signature."""
    monkeypatch.setattr(
        "sdprune.metrics.scores.dense_distance._load_lpips",
        lambda device: lambda a, b: (a - b).abs().mean((1, 2, 3), keepdim=True),
    )
    metric = ImageScores([DenseDistance(PooledFeatures(), lpips=True)])
    metric.prepare("cpu")
    own, dense = pictures(3, 0, 16, 16), pictures(3, 1, 16, 16)
    metric.update(ImageBatch(own, None, range(3), dense))
    expected = (own.double() - dense.double()).abs().mean().item() / 127.5
    assert metric.compare(metric.rows())["dense_lpips"] == pytest.approx(expected, rel=1e-6)
    assert metric.scores[0].describe()["lpips"] == "alex"


def test_lpips_without_its_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(InputError, match=r'pip install "sdprune\[lpips\]"'):
        ImageScores([DenseDistance(PooledFeatures(), lpips=True)]).prepare("cpu")


# --- verdicts and sharing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "higher", "expected"),
    [
        (-0.3, 0.15, False, "within"),  # FID 10: 0.2 is allowed
        (0.1, 0.3, False, "undecided"),
        (0.21, 0.4, False, "beyond"),
        (-0.4, -0.21, False, "within"),  # better
        (-0.15, 0.3, True, "within"),
        (-0.3, -0.1, True, "undecided"),
        (-0.4, -0.21, True, "beyond"),
        (0.21, 0.4, True, "within"),
    ],
)
def test_a_verdict_is_about_the_worse_end(low, high, higher, expected):
    assert verdict(10, low, high, 0.02, higher) == expected


@pytest.mark.parametrize("tolerance", [0, 1, -0.1])
def test_impossible_tolerances_are_refused(tolerance):
    with pytest.raises(InputError, match="tolerance must lie between 0 and 1"):
        FrechetInceptionDistance(PooledFeatures(), tolerance=tolerance)


def test_scores_share_one_pass_and_one_place_in_the_record(tmp_path):
    tiny = str(save_tiny_clip(tmp_path / "tiny"))
    fid, kid = FrechetInceptionDistance(ClipImageFeatures(tiny)), KernelInceptionDistance(ClipImageFeatures(tiny))
    pooled = PooledFeatures()
    clip, other = CLIPScore(tiny), FrechetInceptionDistance(pooled, "fid_pooled")
    scores = ImageScores([fid, kid, clip, other])
    assert fid.extractor is kid.extractor is clip.extractor
    key, texts = fid.extractor.key, clip.extractor.texts.key
    assert list(scores.columns) == [f"{key}.features", texts, "prompts", f"{pooled.key}.features"]
    assert PooledFeatures(1).key != PooledFeatures(2).key
    images, prompts = pictures(3, 0, 40, 40), ["a", "b", "red"]
    scores.update(ImageBatch(images, prompts, range(3)))
    assert pooled.batches == [3]
    assert list(scores.rows()) == list(scores.columns)
    assert scores.rows()[f"{key}.features"].equal(ClipImageFeatures(tiny)(images))


def test_only_columns_that_a_record_lacks_are_computed(tmp_path):
    """As when one more score is wanted of pictures that were scored before."""
    tiny = str(save_tiny_clip(tmp_path / "tiny"))
    before = ImageScores([FrechetInceptionDistance(PooledFeatures())])
    images, prompts = pictures(5, 0, 40, 40), ["a", "b", "red", "a", "c"]
    before.update(ImageBatch(images, prompts, range(5)))
    record, pooled = before.rows(), PooledFeatures()
    after, whole = (
        ImageScores([FrechetInceptionDistance(extractor), CLIPScore(tiny)]) for extractor in (pooled, PooledFeatures())
    )
    missing = [key for key in after.columns if key not in record]
    assert len(missing) == 3
    after.prepare("cpu", missing)
    for places in ([3, 4], [0, 1, 2]):
        known = {key: values[places] for key, values in record.items()}
        after.update(ImageBatch(images[places], [prompts[i] for i in places], places), known)
        whole.update(ImageBatch(images[places], [prompts[i] for i in places], places))
    assert pooled.batches == []
    assert after.rows()[pooled.features.key].equal(record[pooled.features.key])
    for key, values in whole.rows().items():
        torch.testing.assert_close(after.rows()[key], values)


def test_two_columns_under_one_key_are_refused():
    class Pale(Score):
        name = "pale"
        columns = (Column(PooledFeatures().features.key, lambda batch: batch.images.float().mean((1, 2, 3))),)

        def compute(self, rows, reference=None):
            return {}

        compare = compute

    with pytest.raises(InputError, match=r"different columns are kept under the key 'pooled-"):
        ImageScores([FrechetInceptionDistance(PooledFeatures()), Pale()])


def test_a_model_may_borrow_another_ones_processor(tmp_path):
    """As PickScore does: weights of one repository, tokenizer and preprocessing of another."""
    whole = save_tiny_clip(tmp_path / "whole")
    bare = save_tiny_clip(tmp_path / "bare")
    for file in bare.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    images, prompts = pictures(3, 0, 40, 53), ["a red cat", "a dog", "red"]
    scores = []
    for options in ({"model": str(whole)}, {"model": str(bare), "processor": str(whole), "name": "pick_score"}):
        metric = ImageScores([CLIPScore(**options)])
        metric.update(ImageBatch(images, prompts, range(3)))
        scores.append(cosine_scores(*metric.scores[0].read(metric.rows())[:2]))
    assert scores[0].equal(scores[1])
    assert CLIPScore(str(bare)).describe() != CLIPScore(str(bare), processor=str(whole)).describe()
