"""The cost of one new thing: one file, and at most one line of configuration."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import ROOT, fit, predict, the_run
from PIL import Image
from safetensors.numpy import load_file

CRITERION = """
from sdprune.pruning import Ranking

class Largest(Ranking):
    def score(self, weight, statistics):
        return 1 / (weight.abs() + 1)
"""
ALLOCATION = """
from sdprune.pruning import Allocation

class OnlyFirst(Allocation):
    explicit = True

    def sparsities(self, targets, sparsity, statistics):
        return {target.name: sparsity if target is targets[0] else 0 for target in targets}
"""
STATISTIC = """
from sdprune.pruning.statistics.input_norm import InputNorm

class FirstStep(InputNorm):
    name = "first_step"

    def add(self, total, term, step):
        if step == 0:
            total[step] += term
"""
CRITERION_THAT_READS_IT = """
import first_step
from sdprune.pruning import Ranking

class ByFirstStep(Ranking):
    statistics = frozenset({"first_step"})

    def score(self, weight, statistics):
        return weight.abs() * statistics["first_step"].sqrt()
"""
METRIC = """
from sdprune.metrics import Column, Score

class Redness(Score):
    name = "redness"
    columns = (Column("redness", lambda batch: batch.images[:, 0].float().mean((1, 2))),)

    def compute(self, rows, reference=None):
        return {self.name: float(rows["redness"].mean())}

    def compare(self, rows, dense_rows, reference=None):
        return {f"{self.name}_diff": self.compute(rows)[self.name] - self.compute(dense_rows)[self.name]}
"""
SOURCE = """
from PIL import Image
from sdprune.data.sources import CaptionSource, caption_table

class Colours(CaptionSource):
    captions = ("a red star", "a blue ring", "a green moon", "a white square", "a pink cross")

    def load(self):
        names = [f"{caption[2:]}.jpg" for caption in self.captions]
        return caption_table("Colours", list(range(5)), names, list(self.captions), [""] * 5)

    def image(self, row):
        return Image.new("RGB", (64, 64), row["caption"].split()[1])

    def describe(self):
        return {"class": "Colours"}
"""
FAMILY = """
from sdprune.pipelines.stable_diffusion import StableDiffusion

class Shouting(StableDiffusion):
    def generate(self, prompts, *args, **kwargs):
        return super().generate([prompt.upper() for prompt in prompts], *args, **kwargs)
"""
FILES = {
    "largest": CRITERION, "only_first": ALLOCATION, "first_step": STATISTIC, "by_first_step": CRITERION_THAT_READS_IT,
    "redness": METRIC, "colours": SOURCE, "shouting": FAMILY,
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the new things in it."""
    for name, text in FILES.items():
        assert len(text.strip().splitlines()) <= 15
        (tmp_path / f"{name}.py").write_text(text.lstrip())
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name, None)


def weights(directory):
    """The U-Net's and the text encoder's weights, by component, then by layer."""
    found = {}
    for component in ("text_encoder", "unet"):
        (file,) = (directory / component).glob("*.safetensors")
        found[component] = {
            name.removesuffix(".weight"): value for name, value in load_file(file).items() if name.endswith(".weight")
        }
    return found


def saved(sdprune, here, *options):
    """The weights of a pruned pipeline, its report, and the layers that were pruned, by component."""
    told = sdprune(*fit("prune", here / "runs", *options))
    assert (told.code, told.err) == (0, "")
    (directory,) = (here / "runs").glob("pruned-*")
    report = json.loads((directory / "pruning_report.json").read_text())
    layers = {component: [one["name"] for one in found] for component, found in report["layers"].items()}
    return weights(directory), layers


def pictures(run):
    """All drawn pictures, by name."""
    return {path.name: np.asarray(Image.open(path)) for path in (run / "images").iterdir()}


def test_a_criterion(sdprune, here, miniature):
    dense = weights(miniature / "pipeline")
    pruned, layers = saved(sdprune, here, "--model.prune.unet.criterion=largest.Largest")
    assert len(layers["unet"]) > 10
    for name in layers["unet"]:
        before, after = dense["unet"][name], pruned["unet"][name]
        count = int(0.35 * before.size + 0.5)
        largest = np.argsort(-np.abs(before), axis=None, kind="stable")
        size = np.abs(before).ravel()[largest]
        zero = ((after == 0) & (before != 0)).ravel()
        assert zero.sum() == count
        assert size[:count].min() >= np.abs(before).ravel()[zero].min() == size[count - 1]
        assert np.array_equal(before.ravel()[~zero], after.ravel()[~zero])


def test_an_allocation(sdprune, here, miniature):
    dense = weights(miniature / "pipeline")
    pruned, layers = saved(sdprune, here, "--model.prune.unet.allocation=only_first.OnlyFirst")
    shares = {name: np.mean(pruned["unet"][name] == 0) for name in layers["unet"]}
    first, *others = shares
    assert shares[first] == pytest.approx(0.35, abs=0.01)
    assert all(np.array_equal(pruned["unet"][name], dense["unet"][name]) for name in others)


def test_a_statistic(sdprune, here):
    """Gathered by itself, and then read by a criterion: of one step it is that step's share of Wanda's statistic."""
    told = sdprune(*fit("calibrate", here / "runs", "--model.statistics=[input_norm, first_step.FirstStep]"))
    assert (told.code, told.err) == (0, "")
    found = {}
    for name in ("input_norm", "first_step"):
        (directory,) = (here / "runs" / "statistics").glob(f"unet-{name}-*")
        found[name] = load_file(next(directory.glob("*.safetensors")))
    for layer, norms in found["input_norm"].items():
        assert norms.shape[0] == 2
        assert np.array_equal(found["first_step"][layer][0], norms[0])
        assert not found["first_step"][layer][1].any()
        assert norms[1].any()
    before = set((here / "runs" / "statistics").glob("unet-*"))
    pruned, layers = saved(sdprune, here, "--model.prune.unet.criterion=by_first_step.ByFirstStep")
    assert set((here / "runs" / "statistics").glob("unet-*")) == before  # the store had it
    dense = weights(Path(os.environ["SDPRUNE_MINIATURE"]) / "pipeline")["unet"]
    for name in layers["unet"]:
        scores = np.abs(dense[name]) * np.sqrt(found["first_step"][name][0, 0] / 2)  # the mean over two steps
        zero = pruned["unet"][name] == 0
        assert zero.sum() == int(0.35 * zero.size + 0.5)
        assert scores[zero].max() <= scores[~zero].min()


def test_a_statistic_that_is_edited_is_gathered_anew(sdprune, here):
    gather = fit(
        "calibrate", here / "runs", "--model.components=[text_encoder]", "--model.statistics=[first_step.FirstStep]"
    )
    for count in (1, 1, 2):
        told = sdprune(*gather)
        assert (told.code, told.err) == (0, "")
        assert len(list((here / "runs" / "statistics").glob("text_encoder-first_step-*"))) == count
        if "already" in told.out:
            del sys.modules["first_step"]
            (here / "first_step.py").write_text(STATISTIC.replace("+= term", "+= 2 * term"))


def test_a_statistic_by_the_name_of_another(sdprune, here):
    (here / "first_step.py").write_text(STATISTIC.replace('name = "first_step"', "pass"))
    told = sdprune(*fit("calibrate", here / "runs", "--model.statistics=[first_step.FirstStep]"))
    assert (told.code, told.err) == (
        2,
        "sdprune: error: --model.statistics is first_step.FirstStep, whose name 'input_norm' is another one's: give it "
        "its own.\n",
    )


def test_a_metric(sdprune, here):
    told = sdprune(*predict(here / "runs", "--model.metrics=[redness.Redness]"))
    assert (told.code, told.err) == (0, "")
    means = {
        name: np.mean([picture[:, :, 0].mean() for picture in pictures(the_run(here / "runs", name)).values()])
        for name in ("dense", "text_encoder")
    }
    results = json.loads((the_run(here / "runs", "text_encoder") / "results.json").read_text())
    assert results["metrics"]["redness"] == pytest.approx(means["text_encoder"], abs=1e-4)
    assert results["comparison"]["redness_diff"] == pytest.approx(means["text_encoder"] - means["dense"], abs=1e-4)


def test_a_caption_source(sdprune, here):
    options = [word for word in predict(here / "runs", "--data.n=3") if "--data.source" not in word]
    told = sdprune(*options, "--data.source=colours.Colours", "--model.prune={}")
    assert (told.code, told.err) == (0, "")
    run = the_run(here / "runs", "dense")
    names = ["red star", "blue ring", "green moon", "white square", "pink cross"]
    chosen = np.random.RandomState(0).choice(5, 3, replace=False)
    assert pictures(run).keys() == {f"{names[index]}.png" for index in chosen}
    results = json.loads((run / "results.json").read_text())
    assert results["data"]["images"] == 5
    assert results["protocols"]["fid"]["reference"]["n"] == 3


def test_a_family(sdprune, here):
    """Its pictures are those that plain Stable Diffusion draws of shouted captions."""
    options = [*predict(here / "runs", "--data.n=3"), "--model.metrics=[]", "--model.prune={}"]
    options += ["--model.pipeline=shouting.Shouting", "--model.pipeline.model=miniature"]
    told = sdprune(*options)
    assert (told.code, told.err) == (0, "")
    (run,) = (path.parent for path in (here / "runs").glob("*/results.json"))
    from sdprune.mini.source import EmbeddedWorld
    from sdprune.pipelines import Sampling
    from sdprune.pipelines.sampling import image_seed
    from sdprune.pipelines.stable_diffusion import StableDiffusion

    rows = {row["file_name"].replace(".jpg", ".png"): row for row in EmbeddedWorld(images=40).load()}
    plain = StableDiffusion("miniature")
    plain.load(torch.float32, torch.device("cpu"))
    found = pictures(run)
    assert len(found) == 3
    for name, picture in found.items():
        prompts, seeds = [rows[name]["caption"].upper()] * 2, [image_seed(0, rows[name]["id"])] * 2
        wanted = plain.generate(prompts, seeds, Sampling(2, 2.5)).images[0].permute(1, 2, 0).numpy()
        assert np.abs(picture.astype(int) - wanted).max() <= 1


FOLDERS = {
    "largest": "pruning/criteria", "only_first": "pruning/allocation", "first_step": "pruning/statistics",
    "redness": "metrics/scores", "colours": "data/sources", "shouting": "pipelines",
}  # fmt: skip
LISTED = """
import sdprune.cli
from sdprune.data import CaptionSource
from sdprune.metrics import Score
from sdprune.pipelines import DiffusersFamily
from sdprune.pruning import Allocation, Criterion, statistic_names
from sdprune.schema import choices_of

print(sdprune.__file__)
print(*choices_of([Criterion, Allocation, Score, CaptionSource, DiffusersFamily]), *statistic_names())
"""


def test_files_in_the_packages_own_folders(tmp_path):
    """They are found by the name of the class alone."""
    package, weights = tmp_path / "sdprune", ROOT / "sdprune" / "mini" / "weights"
    shutil.copytree(ROOT / "sdprune", package, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    (package / "mini" / "weights").symlink_to(weights)
    for name, folder in FOLDERS.items():
        (package / folder / f"{name}.py").write_text(FILES[name].lstrip())
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LISTED], capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    file, names = done.stdout.splitlines()[-2:]
    assert file == str(package / "__init__.py")
    assert {"Largest", "OnlyFirst", "Redness", "Colours", "Shouting", "first_step", "Magnitude"} <= set(names.split())
