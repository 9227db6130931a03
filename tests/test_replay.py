"""Statistics that take several passes: one run of the pipeline gives the bits that a run for each pass gives."""

import pytest
import tiny_families
from command_lines import CONFIGS, CPU
from safetensors.torch import load_file

import sdprune.pipelines
from sdprune.pipelines import DiffusersFamily

BATCHES = 2


@pytest.fixture(scope="module", params=["StableDiffusion", "Flux", "QwenImage", "ZImage"])
def family(request, tmp_path_factory):
    """(name, directory); skip connections, two lists of blocks, two calls a step, blocks beside the chain"""
    return request.param, tiny_families.save(request.param, tmp_path_factory.mktemp(request.param))


def fit(family, output, *options, order="one_pass"):
    name, directory = family
    denoiser = "unet" if "unet" in getattr(sdprune.pipelines, name).parts else "transformer"
    prune = f"--model.prune={{{denoiser}: {{sparsity: 0.5, criterion: SparseGPT, order: {order}}}}}"
    pipeline = [f"--model.pipeline={name}", f"--model.pipeline.model={directory}", "--model.sampling.steps=2"]
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


def test_any_number_of_passes_takes_one_run_of_the_pipeline(family, sdprune, tmp_path, drawn):
    told = sdprune(*fit(family, tmp_path / "whole"))
    assert (told.code, told.err, len(drawn)) == (0, "", BATCHES), told.err
    whole, passes = hessians(tmp_path / "whole")
    assert passes == 1
    small = f"--model.calibration.hessian_gib={2.01 * max(value.nbytes for value in whole.values()) / 2**30}"
    drawn.clear()
    told = sdprune(*fit(family, tmp_path / "parts", small))
    assert (told.code, told.err) == (0, ""), told.err
    parts, passes = hessians(tmp_path / "parts")
    assert passes > 3
    assert f"(hessian): {passes} passes, one of them with its pipeline; keeps up to" in told.out
    assert len(drawn) == BATCHES + 1  # and once to see how values go through the blocks
    drawn.clear()
    told = sdprune(*fit(family, tmp_path / "many", small, "--model.calibration.kept_gib=0"))
    assert (told.code, told.err) == (0, ""), told.err
    many, passes = hessians(tmp_path / "many")
    assert f"(hessian): {passes} passes, each with its pipeline." in told.out
    assert len(drawn) == passes * BATCHES + 1
    assert same(whole, many)
    assert same(whole, parts)
