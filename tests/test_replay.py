"""Statistics that take several passes: one run of the pipeline gives the bits that a run for each pass gives."""

import os
import re
import shutil
import tempfile
from functools import partial

import pytest
import tiny_families
import torch
from command_lines import CONFIGS, CPU, process
from safetensors.torch import load_file

import sdprune.pipelines
from sdprune.calibration.collect import Collector
from sdprune.pipelines import DiffusersFamily, Sampling
from sdprune.pipelines.sampling import image_seed

BATCHES = 2
GUIDANCE = 2.5  # of the configuration


@pytest.fixture(scope="module", params=["StableDiffusion", "PixArtSigma", "QwenImage", "ZImage"])
def family(request, tmp_path_factory):
    """(name, directory); skip connections, a chain, two calls a step, blocks beside the chain"""
    return request.param, tiny_families.save(request.param, tmp_path_factory.mktemp(request.param))


def fit(family, output, *options, order="one_pass"):
    name, directory = family
    denoiser = "unet" if "unet" in getattr(sdprune.pipelines, name).parts else "transformer"
    prune = f"--model.prune={{{denoiser}: {{sparsity: 0.5, criterion: SparseGPT, order: {order}}}}}"
    pipeline = [f"--model.pipeline={name}", f"--model.pipeline.model={directory}", "--model.sampling.steps=2"]
    pipeline += ["--model.sampling.height=32", "--model.sampling.width=32"]
    data = ["--data.source.images=20", "--data.calibration_n=3", "--data.calibration_batch_size=2", CPU]
    where = [f"--model.store={output}/statistics", f"--model.output={output}"]
    return ["fit", "--config", CONFIGS / "prune.yaml", *pipeline, *data, *where, prune, *options]


def hessians(output):
    files = list((output / "statistics").glob("*-hessian-*/*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}, len(files)


def same(one, two):
    return one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


@pytest.fixture
def drawn(monkeypatch):
    """Counts the runs of the pipeline."""
    generate, count = DiffusersFamily.generate, []

    def counting(self, *args, **kwargs):
        count.append(1)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(DiffusersFamily, "generate", counting)
    return count


@pytest.fixture
def temporary(monkeypatch):
    """Gives the size of the largest temporary file so far."""
    make, files = tempfile.TemporaryFile, []

    def made(*args, **kwargs):
        found = make(*args, **kwargs)
        files.append(os.dup(found.fileno()))  # it is there as long as it is open
        return found

    monkeypatch.setattr("tempfile.TemporaryFile", made)
    yield lambda: max(os.fstat(file).st_size for file in files)
    for file in files:
        os.close(file)


def test_any_number_of_passes_takes_one_run_of_the_pipeline(family, sdprune, tmp_path, drawn, temporary):
    name, _ = family
    told = sdprune(*fit(family, tmp_path / "whole"))
    assert (told.code, told.err, len(drawn)) == (0, "", BATCHES), told.err
    whole, passes = hessians(tmp_path / "whole")
    assert passes == 1
    small = f"--model.calibration.hessian_gib={2.01 * max(value.nbytes for value in whole.values()) / 2**30}"
    drawn.clear()
    told = sdprune(*fit(family, tmp_path / "parts", small))
    assert (told.code, told.err) == (0, ""), told.err
    parts, passes = hessians(tmp_path / "parts")
    assert passes > 2
    announced = rf"\(hessian\): {passes} passes, one of them with its pipeline; keeps up to ([\d.]+) MiB in a file"
    most = float(re.search(announced, told.out)[1]) * 2**20
    assert most / 2 < temporary() <= most + 2**20 / 20
    assert len(drawn) == BATCHES + 1  # and once to see how values go through the blocks
    assert same(whole, parts)
    if name == "PixArtSigma":
        drawn.clear()
        told = sdprune(*fit(family, tmp_path / "many", small, "--model.calibration.kept_gib=0"))
        assert (told.code, told.err) == (0, ""), told.err
        many, passes = hessians(tmp_path / "many")
        assert f"(hessian): {passes} passes, each with its pipeline. It would run once if" in told.out
        assert len(drawn) == passes * BATCHES + 1
        assert same(whole, many)


def test_what_finds_no_room_on_the_disk_is_refused_before_it_is_gathered(chain, sdprune, tmp_path, drawn, monkeypatch):
    usage = shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage(path)._replace(free=100 << 10))
        told = sdprune(*fit(chain, tmp_path))
        several = sdprune(*fit(chain, tmp_path, "--model.calibration.hessian_gib=0.0005"))
    assert (told.code, several.code, told.err.count("\n"), several.err.count("\n")) == (2, 2, 1, 1)
    needed = re.search(rf"([\d.]+) MiB in {tmp_path}/statistics for statistics. Put --model.store where", told.err)
    assert "of disk space, and 0.1 MiB are free: " in told.err
    assert f"MiB in {tempfile.gettempdir()} for what blocks give and " in several.err
    for option in ("--data.calibration_n", "TMPDIR", "--model.calibration.kept_gib=0", "--model.store"):
        assert option in several.err
    assert len(drawn) == 1  # to see how values go through the blocks
    assert sdprune(*fit(chain, tmp_path)).code == 0
    (file,) = tmp_path.glob("statistics/*-hessian-*/*.safetensors")
    assert float(needed[1]) * 2**20 == pytest.approx(3 * file.stat().st_size, rel=0.1)  # twice while it is summed up


# --- sequential order on the latents of the dense model ---------------------------------------------------------

DENSE = "--model.calibration.latents=dense"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return "PixArtSigma", tiny_families.save("PixArtSigma", tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def sequential(chain, miniature, tmp_path_factory):
    """What an undisturbed run comes to."""
    from sdprune.__main__ import main

    output = tmp_path_factory.mktemp("sequential")
    assert main([str(word) for word in fit(chain, output, DENSE, order="sequential")]) == 0
    return output


def pruned(output):
    (file,) = output.glob("pruned-*/transformer/*.safetensors")
    return load_file(file)


def loaded(directory):
    model = sdprune.pipelines.PixArtSigma(str(directory))
    model.load(torch.float32, torch.device("cpu"))
    return model


@torch.no_grad()
def test_each_block_sees_what_the_pruned_ones_before_it_make_of_dense_latents(chain, sequential):
    """The finished model on calls of the dense one, by plain hooks; in each block the layer that runs first."""
    from sdprune.mini.source import EmbeddedWorld

    source = EmbeddedWorld(split="train", images=20)
    source.prepare()
    prompts = list(source.load()["caption"])[:3]
    seeds = [image_seed(0, f"calibration:{position}") for position in range(3)]
    dense, calls = loaded(chain[1]), []
    denoiser = dense.components["transformer"]
    hook = denoiser.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    sampling = Sampling(steps=2, guidance=GUIDANCE, height=32, width=32)
    for one, seed in zip(prompts, seeds, strict=True):
        dense.generate([one], [seed], sampling, decode=False)
    hook.remove()
    (saved,) = sequential.glob("pruned-*")
    denoiser = loaded(saved).components["transformer"]
    found = {f"transformer_blocks.{number}.attn1.to_q": 0 for number in range(len(denoiser.transformer_blocks))}

    def add(_, args, name):
        rows = args[0].flatten(0, -2).double()
        found[name] = found[name] + rows.T @ rows

    for name in found:
        denoiser.get_submodule(name).register_forward_pre_hook(partial(add, name=name))
    for args, kwargs in calls:
        denoiser(*args, **kwargs)
    stored, _ = hessians(sequential)
    for name, total in found.items():
        torch.testing.assert_close(stored[name][0].double(), total * 2 / (3 * 2), rtol=1e-3, atol=1e-5)
    assert (denoiser.proj_out.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_interrupted_anywhere_it_comes_to_the_same(chain, sequential, sdprune, tmp_path, monkeypatch):
    """What was kept is lost with the process: the dense model makes its calls again."""
    visit, left = Collector._visit, [3]

    def stopping(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("stopped")
        return visit(self, *arguments)

    monkeypatch.setattr(Collector, "_visit", stopping)
    monkeypatch.setattr("sdprune.calibration.collect._SAVING", 1e9)  # after every batch, whatever it costs
    assert sdprune(*fit(chain, tmp_path, DENSE, order="sequential")).code == 1
    left[0] = 4
    assert sdprune(*fit(chain, tmp_path, DENSE, order="sequential")).code == 1
    left[0] = 1000
    assert sdprune(*fit(chain, tmp_path, DENSE, order="sequential")).code == 0
    assert same(hessians(tmp_path)[0], hessians(sequential)[0])
    assert same(pruned(tmp_path), pruned(sequential))


def test_two_processes_come_to_the_same(chain, sequential, tmp_path):
    words = [str(word) for word in fit(chain, tmp_path, DENSE, "--trainer.devices=2", order="sequential")]
    done = process(words)
    assert (done.returncode, done.stderr) == (0, "")
    assert same(hessians(tmp_path)[0], hessians(sequential)[0])
    assert same(pruned(tmp_path), pruned(sequential))


def test_latents_that_are_neither_are_one_line(chain, sdprune, tmp_path):
    told = sdprune(*fit(chain, tmp_path, "--model.calibration.latents=noisy"))
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "noisy" in told.err
