"""The modules run under Lightning's own trainer in Python, and give what the command line gives."""

import json
import shutil

import numpy as np
import pytest
import torch
from command_lines import fit, predict, the_run
from lightning import Trainer
from PIL import Image

from sdprune.calibration.settings import Calibration
from sdprune.data import CocoDataModule
from sdprune.errors import InputError
from sdprune.metrics import ClipImageFeatures, CLIPScore, DenseDistance, FrechetInceptionDistance
from sdprune.mini.source import EmbeddedWorld
from sdprune.modules import CalibrationModule, GenerationModule, PruningModule
from sdprune.pipelines import Sampling
from sdprune.pipelines.sampling import image_seed
from sdprune.pipelines.stable_diffusion import StableDiffusion
from sdprune.pruning import PruneSpec

SAMPLING = Sampling(steps=2, guidance=2.5)
WANDA = [f"--model.prune.{component}.criterion=Wanda" for component in ("text_encoder", "unet")]


def run(module, **options):
    """Run a module on the data of the command lines."""
    defaults = {"calibration": EmbeddedWorld("train", 20), "calibration_n": 5, "calibration_batch_size": 2}
    source = options.pop("source", None) or EmbeddedWorld(images=40)
    given = options.pop("trainer", {})
    data = CocoDataModule(source, **{**defaults, "n": 4, "batch_size": 2, **options})
    trainer = Trainer(
        accelerator="cpu", logger=False, use_distributed_sampler=False, enable_progress_bar=False, **given,
    )  # fmt: skip
    trainer.predict(module, datamodule=data, return_predictions=False)


def pruned(sparsities=(0.475, 0.35)):
    text, unet = sparsities
    return {
        "text_encoder": PruneSpec(sparsity=text, criterion="Wanda"),
        "unet": PruneSpec(sparsity=unet, criterion="Wanda"),
    }


def generation(output, **options):
    clip = ClipImageFeatures("miniature")
    metrics = [FrechetInceptionDistance(clip), CLIPScore("miniature"), DenseDistance(clip)]
    return GenerationModule(
        StableDiffusion("miniature"), pruned(), metrics, SAMPLING, samples=["a red star", "a blue ring"],
        output=str(output), store=f"{output}/statistics", **options,
    )  # fmt: skip


def test_generation(sdprune, tmp_path):
    module = generation(tmp_path / "python")
    run(module.find_baseline())
    run(module)
    told = sdprune(*predict(tmp_path / "shell", "--data.n=4", *WANDA))
    assert (told.code, told.err) == (0, "")
    for prefix in ("dense", "text_encoder"):
        ours, theirs = the_run(tmp_path / "python", prefix), the_run(tmp_path / "shell", prefix)
        assert ours.name == theirs.name  # the identity is of all options
        files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.png"))
        assert len(files) == 4 + 2 + 1
        for file in files:
            assert np.array_equal(np.asarray(Image.open(ours / file)), np.asarray(Image.open(theirs / file))), file
        found, wanted = (json.loads((run / "results.json").read_text()) for run in (ours, theirs))
        for section in ("metrics", "comparison", "pruning", "sparsity", "data", "images", "scored"):
            assert found[section] == wanted[section], section
    assert wanted["pruning"]["unet"]["mask_hash"]
    assert wanted["comparison"]["dense"] == the_run(tmp_path / "shell", "dense").name
    assert len(wanted["metrics"]) > 2


def test_nothing_is_asked_of_a_source_of_calibration_that_is_not_needed(miniature, tmp_path):
    class Unwanted(EmbeddedWorld):
        def prepare(self):
            raise AssertionError("nothing is calibrated")

    module = GenerationModule(
        StableDiffusion("miniature"), {"unet": PruneSpec(sparsity=0.5)}, [], SAMPLING, samples=[], compare_dense=False,
        output=str(tmp_path),
    )  # fmt: skip
    run(module, calibration=Unwanted("train", 20))
    assert len(list(tmp_path.glob("unet-*/images/*.png"))) == 4
    with pytest.raises(AssertionError, match="nothing is calibrated"):
        run(generation(tmp_path, compare_dense=False), calibration=Unwanted("train", 20))


def test_a_part_of_the_batches_is_refused(miniature, tmp_path):
    for limit in ({"limit_predict_batches": 1}, {"limit_predict_batches": 0.5}, {"fast_dev_run": True}):
        with pytest.raises(InputError, match=r"The trainer takes (1|0\.5) of the batches: leave out"):
            run(generation(tmp_path, compare_dense=False), trainer=limit)
    assert not list(tmp_path.glob("*/images/*.png"))


def test_mixed_precision_draws_what_autocast_draws(miniature, tmp_path):
    module = GenerationModule(StableDiffusion("miniature"), {}, [], SAMPLING, samples=[], output=str(tmp_path))
    run(module, trainer={"precision": "bf16-mixed"})
    drawn = [np.asarray(Image.open(module.record.image_path(name))) for name in module.data.examples["file_name"]]
    pipeline, found = StableDiffusion("miniature"), {}
    pipeline.load(torch.float32, torch.device("cpu"))
    captions, ids = (module.data.examples[column] for column in ("caption", "id"))
    for mixed in (True, False):
        images = []
        for first in (0, 2):
            seeds = [image_seed(0, one) for one in ids[first : first + 2]]
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                images.extend(pipeline.generate(captions[first : first + 2], seeds, SAMPLING).images)
        found[mixed] = [image.permute(1, 2, 0).numpy() for image in images]
    assert all(np.array_equal(one, other) for one, other in zip(drawn, found[True], strict=True))
    assert any(not np.array_equal(one, other) for one, other in zip(drawn, found[False], strict=True))


def test_a_baseline_that_is_not_drawn(miniature, tmp_path):
    """Without one the pictures would be compared with themselves."""
    with pytest.raises(InputError, match=r"dense-\w+, which this run is compared with, is not drawn yet"):
        run(generation(tmp_path))
    assert not list(tmp_path.glob("*/images"))


def test_faults_are_found_before_anything_is_drawn(miniature, tmp_path):
    world = EmbeddedWorld(images=40, cache=str(tmp_path / "cache"))
    world.prepare()
    for path in (world.root / "val").glob("*.jpg"):
        path.unlink()
    with pytest.raises(InputError, match="4 real images cannot be used"):
        run(generation(tmp_path, compare_dense=False), source=world)
    assert not list(tmp_path.glob("*/images/*.png"))


def test_pruning(sdprune, tmp_path):
    for sparsity in (0.475, 0.3):  # the second finds its statistics in the store
        module = PruningModule(
            StableDiffusion("miniature"), pruned((sparsity, 0.35)), SAMPLING, output=str(tmp_path / "python"),
            store=str(tmp_path / "statistics"),
        )  # fmt: skip
        run(module, source=EmbeddedWorld("train", 20), calibration=None)
        ours = module.directory()
        told = sdprune(*fit("prune", tmp_path / "shell", *WANDA, f"--model.prune.text_encoder.sparsity={sparsity}"))
        assert (told.code, told.err) == (0, "")
        theirs = tmp_path / "shell" / ours.name
        files = [path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()]
        assert len(files) > 8
        assert all((ours / file).read_bytes() == (theirs / file).read_bytes() for file in files)
        shutil.rmtree(theirs)


def test_calibration(sdprune, tmp_path):
    module = CalibrationModule(
        StableDiffusion("miniature"), ["text_encoder", "unet"], ["input_norm", "hessian"], sampling=SAMPLING,
        calibration=Calibration(), store=str(tmp_path / "python" / "statistics"),
    )  # fmt: skip
    run(module, source=EmbeddedWorld("train", 20), calibration=None)
    told = sdprune(*fit("calibrate", tmp_path / "shell"))
    assert (told.code, told.err) == (0, "")
    ours, theirs = (
        {file.relative_to(store): file.read_bytes() for file in store.rglob("*") if file.is_file()}
        for store in (tmp_path / "python" / "statistics", tmp_path / "shell" / "statistics")
    )
    assert len([file for file in theirs if file.suffix == ".safetensors"]) == 4
    assert ours == theirs


def test_a_pipeline_that_was_pruned_is_dense_again_for_the_next_run(tmp_path):
    def scores(pipeline, name):
        output = tmp_path / name
        run(GenerationModule(pipeline, {}, [CLIPScore("miniature")], SAMPLING, samples=[], output=str(output)))
        return json.loads((the_run(output, "dense") / "results.json").read_text())

    used = StableDiffusion("miniature")
    run(PruningModule(used, pruned((0.9, 0.9)), SAMPLING, output=str(tmp_path), store=f"{tmp_path}/statistics"))
    assert sum(int((p == 0).sum()) for p in used.components["unet"].parameters()) > 100_000
    ours, theirs = scores(used, "used"), scores(StableDiffusion("miniature"), "fresh")
    for section in ("metrics", "sparsity"):
        assert ours[section] == theirs[section]
