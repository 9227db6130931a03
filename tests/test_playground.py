"""The playground without its page: pictures, numbers, what it refuses, and the command that draws the same."""

import os
import re
import shlex
import signal
from dataclasses import replace
from threading import Thread
from urllib.request import ProxyHandler, build_opener

import numpy as np
import pytest
import torch
import yaml
from command_lines import CONFIGS, CPU, fit, the_run
from lightning import Trainer
from PIL import Image

from sdprune.data import CocoDataModule
from sdprune.errors import InputError
from sdprune.metrics import CLIPScore
from sdprune.mini.score import ExaminerScore
from sdprune.mini.source import EmbeddedWorld
from sdprune.modules import GenerationModule
from sdprune.pipelines import Sampling
from sdprune.pipelines.stable_diffusion import StableDiffusion
from sdprune.playground.core import Playground
from sdprune.playground.view import Choice, Origin, View
from sdprune.pruning import Budget, PruneSpec
from sdprune.pruning.granularity import Granularity
from sdprune.pruning.narrowing import NarrowSpec

STEPS = 2
EVIL = "say \"*x\" & 'y' [a, b] {c: d} \\ $HOME <b>\u00fc \U0001f642"


@pytest.fixture
def make(miniature, tmp_path):
    """Make a playground of the configuration mini/playground, made small; loaded."""

    def make(prune=None, model="miniature", loaded=True, **options):
        module = GenerationModule(
            StableDiffusion(str(model)), prune or {}, [CLIPScore("miniature"), ExaminerScore()], Sampling(STEPS, 2.5),
            samples=["a red star"], output=str(tmp_path / "runs"), store=str(tmp_path / "statistics"), **options,
        )  # fmt: skip
        data = CocoDataModule(
            EmbeddedWorld(images=40), n=2, batch_size=2, calibration=EmbeddedWorld("train", 20), calibration_n=5,
            calibration_batch_size=2,
        )  # fmt: skip
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        playground = Playground(module, data, trainer)
        if loaded:
            playground.load()
        return playground

    return make


def words(tmp_path):
    """The command line that `make` stands for."""
    small = ["--data.n=2", "--data.batch_size=2", "--data.source.images=40", "--model.sampling.steps=2", CPU]
    small += ["--data.calibration.images=20", "--data.calibration_n=5", "--data.calibration_batch_size=2"]
    where = [f"--model.output={tmp_path}/runs", f"--model.store={tmp_path}/statistics", "--model.metrics=[]"]
    return ["--config", "mini/playground", *small, *where]


def view(prompt="a red star", seed=0, text_encoder=None, unet=None):
    return View(prompt, seed, {"text_encoder": text_encoder or Choice(), "unet": unet or Choice()})


SEEN = {
    "magnitude": view("a blue ring", 3, Choice(0.4), Choice(0.6)),
    "statistics": view(EVIL, 0, Choice(0.5, "Wanda", "OWL"), Choice(0.5, "SparseGPT", "Uniform", "2:4")),
}


@pytest.mark.parametrize("seen", SEEN)
def test_the_command_draws_what_is_seen(make, sdprune, tmp_path, seen):
    """To the bit, by a process that prunes from the start, and the dense model's picture with it."""
    configured = yaml.safe_load((CONFIGS / "playground.yaml").read_text())
    playground = make({name: PruneSpec(**one) for name, one in configured["model"]["init_args"]["prune"].items()})
    shown = playground.show(SEEN[seen])
    command = Origin(configured, [*words(tmp_path), "--model.prune.unet.sparsity=0.1"]).command(shown.view)
    assert command.startswith("sdprune predict --config mini/playground ")
    ran = sdprune(*shlex.split(command)[1:])
    assert (ran.code, ran.err) == (0, "")
    run = the_run(tmp_path / "runs", "text_encoder")
    assert np.array_equal(shown.pruned, np.asarray(Image.open(run / "samples" / "0.png")))
    dense = the_run(tmp_path / "runs", "dense")
    assert np.array_equal(shown.dense, np.asarray(Image.open(dense / "samples" / "0.png")))
    assert not np.array_equal(shown.dense, shown.pruned)


def test_the_configuration_is_that_of_the_command(sdprune, tmp_path):
    configured = yaml.safe_load((CONFIGS / "playground.yaml").read_text())
    configured["model"]["init_args"]["prune"]["unet"] |= {
        "criterion": "sdprune.pruning.criteria.wanda.Wanda",
        "allocation": {"class_path": "OWL", "init_args": {"m": 7.0}},
        "exclude": ["*conv*"],
    }
    base, seen = tmp_path / "base.yaml", tmp_path / "seen.yaml"
    base.write_text(yaml.safe_dump(configured))
    origin = Origin(configured, ["--config", str(base), "--trainer.accelerator=cpu"])
    chosen = view(EVIL, 7, Choice(0.25, "SparseGPT"), Choice(0.75, "Wanda", "OWL"))
    seen.write_text(origin.yaml(chosen))
    by_file = sdprune("predict", "--config", seen, "--trainer.accelerator=cpu", "--print_config")
    by_words = sdprune(*shlex.split(origin.command(chosen))[1:], "--print_config")
    assert (by_file.code, by_file.err) == (0, "")
    assert yaml.safe_load(by_file.out) == yaml.safe_load(by_words.out)
    model = yaml.safe_load(by_file.out)["model"]["init_args"]
    assert (model["samples"], model["seed"]) == ([EVIL], 7)
    unet = model["prune"]["unet"]
    assert (unet["sparsity"], unet["allocation"]["init_args"]["m"], unet["exclude"]) == (0.75, 7.0, ["*conv*"])


def test_a_pruning_leaves_nothing_behind(make):
    """Statistics are gathered once, and what was seen before is seen again, whatever came between."""
    playground, passes = make(), []
    first = view(unet=Choice(0.5, "Wanda"))
    playground.module.on_calibration = passes.append
    before = playground.show(first)
    assert passes
    gathered = len(passes)
    with pytest.raises(InputError):
        playground.show(view(unet=Choice(0.5, "Wanda", granularity="2:3:4")))
    between = playground.show(view("a blue ring", 1, Choice(0.9), Choice(0.8, "Magnitude", "GlobalRanking")))
    nothing = playground.show(view())
    again = playground.show(first)
    assert np.array_equal(nothing.dense, nothing.pruned)
    assert nothing.sparsity["targets"]["zeros"] == 0
    assert np.array_equal(before.pruned, again.pruned)
    assert np.array_equal(before.dense, again.dense)
    assert not np.array_equal(before.pruned, between.pruned)
    assert (before.sparsity, before.scores) == (again.sparsity, again.scores)
    assert len(passes) == gathered


def test_a_change_draws_one_picture_and_a_new_prompt_two(make):
    """The dense picture of a prompt and seed is drawn once: passes of the U-Net, counted by a hook."""
    playground, passes = make(), []
    playground.module.pipeline.components["unet"].register_forward_hook(lambda *_: passes.append(1))

    def spent(seen):
        passes.clear()
        playground.show(seen)
        return len(passes) / STEPS

    assert spent(view(unet=Choice(0.2))) == 2
    assert spent(view(unet=Choice(0.4))) == 1
    assert spent(view("a blue ring", unet=Choice(0.4))) == 2
    assert spent(view(seed=1, unet=Choice(0.4))) == 2
    assert spent(view(unet=Choice(0.2))) == 1


def test_all_statistics_can_be_gathered_at_the_start(make):
    playground, passes = make(loaded=False), []
    playground.load(everything=True)
    playground.module.on_calibration = passes.append
    for criterion in playground.criteria:
        playground.show(view(text_encoder=Choice(0.5, criterion), unet=Choice(0.5, criterion)))
    for allocation in playground.allocations:
        choice = Choice(0.5, "Magnitude", allocation)
        playground.show(view(text_encoder=choice, unet=choice))
    assert not passes


def test_classes_from_elsewhere_are_offered_where_the_configuration_has_them(make):
    class Elsewhere(Granularity):
        """Ranks as `layer` does."""

    assert "Elsewhere" not in make(loaded=False).granularities
    spec = PruneSpec(0.5, granularity="Elsewhere")
    playground = make({"unet": spec}, loaded=False)
    assert "Elsewhere" in playground.granularities
    assert playground.start.choices["unet"].granularity == "Elsewhere"


def test_zeros_are_those_of_the_weights(make):
    playground = make()
    shown = playground.show(view(text_encoder=Choice(0.3), unet=Choice(0.5)))
    for name, component in playground.module.pipeline.components.items():
        distinct = {id(one): one for one in component.parameters()}.values()
        zeros = sum(int((one == 0).sum()) for one in distinct)
        assert shown.sparsity["components"][name]["zeros"] == zeros


def test_scores_are_those_of_the_pictures(make):
    playground = make()
    shown = playground.show(view("a red star on a black background", unet=Choice(0.9)))
    clip = CLIPScore("miniature").extractor
    text = clip.text_embeddings([shown.view.prompt])[0]
    for said, pixels in zip(shown.scores["clip_score"], (shown.dense, shown.pruned), strict=True):
        image = clip(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])[0]
        assert said == pytest.approx(float(torch.cosine_similarity(image, text, dim=0)), abs=1e-6)
    assert {type(one) for one in shown.scores["correct"]} == {bool}
    assert "correct_relation" not in shown.scores
    other = playground.show(view("an elephant"))
    assert list(other.scores) == ["clip_score"]
    assert other.remarks == ["ExaminerScore cannot judge this prompt."]
    cut = playground.show(view("star " * 100))
    assert any("tokens" in one for one in cut.remarks)


def test_a_strip_is_what_each_sparsity_shows(make):
    playground = make()
    base = view(text_encoder=Choice(0.4), unet=Choice(0.1))
    found = dict(playground.strip(base, "unet", [0.0, 0.7]))
    for sparsity, pixels in found.items():
        other = replace(base, choices={**base.choices, "unet": Choice(sparsity)})
        assert np.array_equal(pixels, playground.show(other).pruned)
    assert not np.array_equal(found[0.0], found[0.7])


def test_a_saved_model_beside_its_original(make, sdprune, tmp_path):
    """A pruned directory at sparsity 0 shows what the original shows when it is pruned so."""
    saved = tmp_path / "saved"
    assert sdprune(*fit("prune", tmp_path / "runs", f"--model.directory={saved}")).code == 0
    original = make().show(view(text_encoder=Choice(0.475), unet=Choice(0.35)))
    shown = make(model=saved, baseline="miniature").show(view())
    assert np.array_equal(shown.pruned, original.pruned)
    assert np.array_equal(shown.dense, original.dense)


@pytest.mark.parametrize(
    ("seen", "parts"),
    [
        (view(" \n"), ["The prompt is empty"]),
        (view("x" * 1001), ["1001 characters", "at most 1000"]),
        (view(seed=-1), ["seed is -1", "from 0 to 4294967295"]),
        (view(seed=0.5), ["seed is 0.5"]),
        (view(seed=None), ["seed is None"]),
        (view(unet=Choice(1.5)), ["unet: sparsity is 1.5", "between 0 and 1"]),
        (view(unet=Choice(None)), ["unet: sparsity is None"]),
        (view(text_encoder=Choice(float("nan"))), ["text_encoder: sparsity is nan"]),
        (view(unet=Choice(0.5, "Magnitud")), ["unet: Unknown criterion 'Magnitud'. Did you mean 'Magnitude'?"]),
        (view(unet=Choice(0.5, None)), ["unet: Unknown criterion"]),
        (view(unet=Choice(0.5, "SparseGPT", granularity="layer")), ["unet: SparseGPT is not defined", "column_block"]),
        (view(unet=Choice(0.3, granularity="2:4")), ["unet: granularity 2:4 prunes 0.5, not 0.3"]),
        (view(unet=Choice(0.3, "Magnitude", "OWL", "component")), ["unet: Allocation OWL has no effect"]),
    ],
)
def test_nonsense_is_refused_in_a_line(make, seen, parts):
    with pytest.raises(InputError) as raised:
        make(loaded=False).show(seen)
    assert "\n" not in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"budget": Budget(0.3)}, "--model.budget"),
        ({"prune": {"unet": PruneSpec(band=(0.1, 0.2))}}, "--model.prune.unet.band"),
        ({"narrow": {"unet": NarrowSpec(neurons=0.3)}}, "--model.narrow"),
        ({"narrow": {"unet": NarrowSpec(flops=0.3)}}, "--model.narrow"),
        ({"prune": {"unte": PruneSpec(sparsity=0.1)}}, "Did you mean 'unet'?"),
    ],
)
def test_what_the_page_cannot_show_is_refused_at_the_start(make, options, part):
    with pytest.raises(InputError, match=part):
        make(loaded=False, **options)


@pytest.fixture
def gradio():
    """The playground's page needs it."""
    pytest.importorskip("gradio", reason="there is no gradio: pip install '.[playground]'")


def test_a_link_for_everybody_is_made_where_it_is_wanted(gradio, sdprune, tmp_path, monkeypatch):
    """The call to Gradio's servers is replaced: it finds the page where it would lead others, and ends it."""
    found = []

    def read(host, port):
        with build_opener(ProxyHandler({})).open(f"http://{host}:{port}") as answer:  # the socket listens already
            found.append(answer.read().decode())
        os.kill(os.getpid(), signal.SIGINT)

    def setup_tunnel(host, port, *_):
        Thread(target=read, args=(host, port)).start()
        return "https://example.gradio.live"

    monkeypatch.setattr("sdprune.playground.page.setup_tunnel", setup_tunnel)
    told = sdprune("playground", "--config=mini/playground", *words(tmp_path)[2:], "--port=0", "--share=true")
    assert (told.code, told.err) == (0, "")
    assert "playground https://example.gradio.live " in told.out
    assert "sdprune playground" in found[0]


def test_no_link_is_a_line(gradio, sdprune, tmp_path, monkeypatch):
    monkeypatch.setattr("gradio.networking.GRADIO_SHARE_SERVER_ADDRESS", None)
    monkeypatch.setattr("gradio.networking.GRADIO_API_SERVER", "http://127.0.0.1:1")
    told = sdprune("playground", "--config=mini/playground", *words(tmp_path)[2:], "--port=0", "--share=true")
    assert told.code == 2
    assert told.err.count("\n") == 1
    assert re.search(r"--share=true: Gradio gives no link .* forward the port: ssh -L (\d+):127.0.0.1:\1 ", told.err)
