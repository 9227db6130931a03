"""The CLIP model's embeddings, the CLIP score and its gap, against transformers and against nested loops."""

import json
import logging

import numpy as np
import pytest
import torch
from tiny_clip import LENGTH, SIZE, WIDTH, save_tiny_clip
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from sdprune.errors import InputError
from sdprune.metrics import ClipImageFeatures, CLIPScore, ImageBatch, ImageScores
from sdprune.metrics.features.preprocess import ClipPreprocessing
from sdprune.metrics.scores.clip_score import cosine_scores, prompt_gaps, prompt_ids

PROMPTS = ["a red cat", "a dog", "red", "a dog", "two cats on a very long red sofa in the sun"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


def pictures(n: int, height: int = 40, width: int = 53) -> Tensor:
    images = torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    images[:, :, : height // 2] //= 3  # an edge, so that the resize has something to round and clip
    return images


# --- preprocessing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 53), (91, 30), (30, 30), (17, 23)])
@pytest.mark.parametrize("resample", [2, 3])
def test_preprocessing_is_that_of_transformers(tmp_path, height, width, resample):
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    folder = save_tiny_clip(tmp_path, resample)
    images = pictures(2, height, width)
    reference = pil.CLIPImageProcessorPil.from_pretrained(folder)
    wanted = reference(list(images.numpy()), return_tensors="pt", input_data_format="channels_first").pixel_values
    ours = ClipPreprocessing.from_config(json.loads((folder / "preprocessor_config.json").read_text()))(images)
    assert ours.shape == wanted.shape == (2, 3, SIZE, SIZE)
    levels = (ours - wanted).abs() * 0.26 * 255
    assert levels.max() < 1.1
    # PIL's fixed-point weights fall just short of a half where ours meet it: often with bilinear's round weights.
    assert levels.mean() < {2: 0.1, 3: 0.002}[resample]


def test_old_and_new_preprocessor_files_mean_the_same():
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    old = ClipPreprocessing.from_config({"size": 30, "crop_size": 30, **normal})
    new = {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}, "rescale_factor": 1 / 255, **normal}
    assert ClipPreprocessing.from_config(new) == old


def test_switched_off_steps_and_fixed_sizes_are_obeyed():
    off = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), False)
    assert ClipPreprocessing.from_config(off)(pictures(1)).equal(pictures(1).float())
    fixed = ClipPreprocessing.from_config(off | {"do_resize": True, "size": {"height": 8, "width": 6}})
    assert fixed(pictures(1)).shape == (1, 3, 8, 6)
    padded = ClipPreprocessing.from_config(off | {"do_center_crop": True, "crop_size": 42})(pictures(1, 40, 46))
    assert padded[:, :, 1:41].equal(pictures(1, 40, 46).float()[..., 2:44])
    assert not padded[:, :, [0, 41]].any()


def test_an_unknown_resampling_is_named():
    with pytest.raises(InputError, match="Unknown resample 1"):
        ClipPreprocessing.from_config({"resample": 1})


# --- embeddings -----------------------------------------------------------------------------------------------


def oracle_embeddings(directory, images: Tensor, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Projections of the two towers, called by hand, one text at a time and unpadded."""
    network, tokenizer = CLIPModel.from_pretrained(directory).eval(), CLIPTokenizer.from_pretrained(directory)
    pixels = ClipPreprocessing.from_config(json.loads((directory / "preprocessor_config.json").read_text()))(images)
    texts = []
    with torch.no_grad():
        pooled = network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)
        for prompt in prompts:
            tokens = tokenizer(prompt, truncation=True, max_length=LENGTH, return_tensors="pt")
            texts.append(network.text_projection(network.text_model(**tokens).pooler_output)[0].numpy())
    return pooled.numpy(), np.stack(texts)


def test_embeddings_are_the_projections_of_the_two_towers(directory):
    clip = ClipImageFeatures(str(directory))
    images, texts = oracle_embeddings(directory, pictures(5), PROMPTS)
    np.testing.assert_allclose(clip(pictures(5)), images, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(clip.text_embeddings(PROMPTS), texts, rtol=1e-4, atol=1e-5)
    assert not np.allclose(np.linalg.norm(images, axis=1), 1)  # not normalised


def test_a_text_does_not_hang_on_its_neighbours(directory):
    clip = ClipImageFeatures(str(directory))
    np.testing.assert_allclose(clip.text_embeddings(["red"]), clip.text_embeddings(PROMPTS)[2:3], rtol=1e-5, atol=1e-6)


def test_measuring_ignores_autocast_and_keeps_no_gradient(directory):
    clip = ClipImageFeatures(str(directory))
    plain = clip(pictures(2)), clip.text_embeddings(PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = clip(pictures(2)), clip.text_embeddings(PROMPTS)
    for one, other in zip(plain, cast, strict=True):
        assert one.dtype == torch.float32
        assert one.equal(other)
        assert not one.requires_grad


def test_loading_shows_users_nothing(directory, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        ClipImageFeatures(str(directory)).load("cpu")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_clip_features_are_the_image_embeddings_under_a_protocol_name(directory):
    extractor = ClipImageFeatures(str(directory))
    assert extractor.name == "clip:tiny"
    assert extractor.num_features == WIDTH
    assert extractor.features.key == f"{extractor.key}.features"
    assert ClipImageFeatures().name == "clip:openai/clip-vit-base-patch32"


def test_descriptions_follow_the_weights_and_not_the_path(directory, tmp_path):
    copy = save_tiny_clip(tmp_path / "copy")
    described = ClipImageFeatures(str(directory)).describe()
    assert ClipImageFeatures(str(copy)).describe() == described
    assert json.loads(json.dumps(described)) == described
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert ClipImageFeatures(str(copy)).describe() != described
    hub = CLIPScore("openai/clip-vit-base-patch32", "abc").describe()
    assert hub == {
        "class": "CLIPScore",
        "name": "clip_score",
        "model": "openai/clip-vit-base-patch32",
        "revision": "abc",
    }


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "model.safetensors", "config.json"])
def test_an_incomplete_directory_is_one_line(tmp_path, missing):
    (save_tiny_clip(tmp_path / "broken") / missing).unlink()
    with pytest.raises(InputError, match=r"Cannot load the CLIP model '.*broken'") as caught:
        ClipImageFeatures(str(tmp_path / "broken")).load("cpu")
    assert "\n" not in str(caught.value)
    assert "Give a directory" in str(caught.value)


def test_pickled_weights_are_not_read(tmp_path):
    folder = save_tiny_clip(tmp_path / "pickled")
    torch.save(CLIPModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="Cannot load the CLIP model"):
        ClipImageFeatures(str(folder)).load("cpu")


# --- score and gap --------------------------------------------------------------------------------------------


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.astype(float) @ b.astype(float) / np.linalg.norm(a.astype(float)) / np.linalg.norm(b.astype(float)))


def test_score_and_gap_are_the_nested_loops(directory):
    images, texts = oracle_embeddings(directory, pictures(5), PROMPTS)
    own = [cosine(images[i], texts[i]) for i in range(5)]
    gaps = []
    for i in range(5):
        others = [cosine(images[i], texts[j]) for j in range(5) if PROMPTS[j] != PROMPTS[i]]
        gaps.append(own[i] - sum(others) / len(others))
    metric = ImageScores([CLIPScore(str(directory))])
    metric.prepare("cpu")
    metric.update(ImageBatch(pictures(5)[3:], PROMPTS[3:], [3, 4]))
    metric.update(ImageBatch(pictures(5)[:3], PROMPTS[:3], [0, 1, 2]))
    columns = metric.scores[0].read(metric.rows())
    np.testing.assert_allclose(cosine_scores(*columns[:2]), own, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(prompt_gaps(*columns), gaps, rtol=1e-3, atol=1e-6)
    expected = {"clip_score": np.mean(own), "clip_score_se": np.std(own, ddof=1) / 5**0.5, "clip_gap": np.mean(gaps)}
    assert metric.compute() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def columns(images: Tensor, texts: Tensor, prompts: list[str]) -> list[Tensor]:
    return [images, texts, prompt_ids(ImageBatch(images, prompts, range(len(prompts))))]


def rows(images: Tensor, texts: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    values = columns(images, texts, prompts)
    return {column.key: value for column, value in zip(CLIPScore().columns, values, strict=True)}


def test_images_that_ignore_their_prompts_have_no_gap():
    texts = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    prompts = [str(i) for i in range(8)]
    assert prompt_gaps(*columns(torch.ones(8, 5), texts, prompts)).mean() == pytest.approx(0, abs=1e-12)
    assert prompt_gaps(*columns(texts, texts, prompts)).mean() > 0.5


def test_one_prompt_has_no_gap_and_one_image_no_error():
    score = CLIPScore()
    found = score.compute(rows(torch.eye(3), torch.ones(3, 3), ["same"] * 3))
    assert set(found) == {"clip_score", "clip_score_se"}
    found = score.compute(rows(torch.ones(1, 2), torch.tensor([[1.0, 0]]), ["p"]))
    assert found == {"clip_score": pytest.approx(0.5**0.5)}


def test_comparison_pairs_the_images():
    generator = torch.Generator().manual_seed(0)
    texts, dense = torch.randn(2, 60, 5, generator=generator)
    prompts = [str(i % 50) for i in range(60)]
    one, two = columns(dense - 0.3 * texts, texts, prompts), columns(dense, texts, prompts)
    found = CLIPScore().compare(rows(dense - 0.3 * texts, texts, prompts), rows(dense, texts, prompts))
    scores, gaps = ([function(*args).mean() for args in pair] for function, pair in (
        (cosine_scores, (one[:2], two[:2])), (prompt_gaps, (one, two))))  # fmt: skip
    assert found["clip_score_diff"] == pytest.approx((scores[0] - scores[1]).item(), rel=1e-9)
    assert found["clip_gap_diff"] == pytest.approx((gaps[0] - gaps[1]).item(), rel=1e-9)
    for name in ("clip_score_diff", "clip_gap_diff"):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"] < 0
        assert found[f"{name}_se"] > 0


def test_other_prompts_cannot_be_paired():
    one, two = (rows(torch.ones(3, 2), torch.eye(3)[:, :2], prompts) for prompts in (["a", "b", "c"], ["a", "b", "d"]))
    with pytest.raises(InputError, match="other prompts at 1 of 3 positions"):
        CLIPScore().compare(one, two)


@pytest.mark.parametrize("prompts", [None, ["one"]])
def test_each_image_needs_its_prompt(directory, prompts):
    with pytest.raises(ValueError, match="one prompt: 2 images"):
        ImageScores([CLIPScore(str(directory))]).update(ImageBatch(pictures(2), prompts, [0, 1]))


def test_rows_of_a_record_give_the_same_score_without_weights(directory):
    metric = ImageScores([CLIPScore(str(directory))])
    metric.update(ImageBatch(pictures(5), PROMPTS, range(5)))
    other, renamed = CLIPScore("/not/loaded"), dict(zip(metric.columns, metric.rows().values(), strict=True))
    kept = {column.key: value for column, value in zip(other.columns, renamed.values(), strict=True)}
    restored = ImageScores([other])
    restored.load_rows(kept)
    assert restored.compute() == metric.compute()
