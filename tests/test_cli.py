"""The command line: what it answers at once, and one clear line for everything that is wrong."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command_lines import CONFIGS, CPU, fit, predict, process, the_run

from sdprune.__main__ import VERBS

YAML = (CONFIGS / "predict.yaml").read_text()


def test_version_and_help_import_nothing_heavy():
    code = """
import sys
from sdprune.__main__ import main
for arguments in (["--version"], ["--help"], [], ["predct"], ["sweep", "--help"], ["report", "-h"], ["report"],
                  ["inspect"], ["lossless"], ["pack", "--help"], ["unpack", "-h"], ["push"]):
    main(arguments)
heavy = {"torch", "lightning", "jsonargparse", "diffusers", "transformers", "numpy"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"sdprune \d+\.\d+", done.stdout)
    assert "predict  --config FILE" in done.stdout
    assert "usage: sdprune sweep FILE" in done.stdout
    assert done.stdout.count("usage: sdprune report DIR") == 2
    assert "usage: sdprune pack DIR --out DIR" in done.stdout
    assert "usage: sdprune unpack DIR --out DIR" in done.stdout
    assert (
        done.stderr == f"sdprune: error: Unknown verb 'predct'. Did you mean 'predict'? Choices: {', '.join(VERBS)}.\n"
    )


@pytest.mark.parametrize(("verb", "module"), [("fit", "PruningModule"), ("predict", "GenerationModule")])
def test_help_of_a_verb(sdprune, verb, module):
    told = sdprune(verb, "--help")
    assert (told.code, told.err) == (0, "")
    assert told.out.startswith(f"usage: sdprune {verb} --config FILE [options]\n")
    for words in (
        "--trainer.devices", "--wandb {off,offline,online}", f"{module}: ", "--model.prune.COMPONENT.criterion CLASS",
        "--model.budget.total", "share of the targeted weights to prune", "Magnitude", "SparseGPT", "Wanda",
        "--data.source CLASS", "--trainer.help", "--print_config", "a configuration file",
    ):  # fmt: skip
        assert words in told.out
    assert "trainer.reload_dataloaders" not in told.out
    assert max(map(len, told.out.splitlines())) <= 160
    offered = set(re.findall(r"--[\w.]+\.help\b", told.out))
    assert len(offered) > 6
    for word in offered:
        assert sdprune(verb, word).code == 0, word


HELP = {
    "class of the model": (["--model.help", "GenerationModule"], ["--model.sampling.steps INT", "denoising steps"]),
    "with equals": (["--model.help=PruningModule"], ["PruningModule: Prune", "--model.output TEXT"]),
    "classes of the model": (["--model.help"], ["GenerationModule", "PruningModule", "CalibrationModule"]),
    "nested class": (["--data.source.help", "CocoDirectory"], ["--data.source.root", "holds both parts", "train2017"]),
    "nested classes": (["--data.source.help"], ["CocoDirectory", "TextFile", "--data.source.path"]),
    "specs": (["--model.prune.help"], ["--model.prune.COMPONENT.sparsity FLOAT\n"]),
    "one component's": (["--model.prune.unet.help"], ["--model.prune.unet.sparsity FLOAT\n"]),
    "criteria": (["--model.prune.unet.criterion.help"], ["Magnitude: |W|", "damping FLOAT  (default: 0.01)"]),
    "a class of one's own": (
        ["--model.prune.unet.criterion.help", "shifted.Shifted"],
        ["Shifted: Magnitude after a shift", "--model.prune.unet.criterion.shift FLOAT  (default: 0.0)", "is added"],
    ),
    "metrics": (["--model.metrics.help"], ["KernelInceptionDistance", "--model.metrics.extractor CLASS"]),
    "an extractor": (["--model.metrics.extractor.help", "InceptionFeatures"], ["--model.metrics.extractor.protocol"]),
    "the trainer": (["--trainer.help"], ["--trainer.limit_predict_batches", "--trainer.strategy CLASS"]),
    "the class that is configured": (
        ["--config", str(CONFIGS / "prune.yaml"), "--model.prune.text_encoder.allocation=OWL", "--model.help"],
        ["PruningModule"],
    ),
}


@pytest.mark.parametrize("case", HELP)
def test_help_of_a_class(sdprune, prepared, case, monkeypatch):
    monkeypatch.chdir(prepared)
    arguments, words = HELP[case]
    told = sdprune("predict", *arguments)
    assert (told.code, told.err) == (0, "")
    for word in words:
        assert word in told.out
    assert "Criterion:" not in told.out, "an abstract class is no choice"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.sorce.help"], ["'data.sorce'", "Did you mean 'data.source'"]),
        (["--data.source.help", "CocoDirectry"], ["Did you mean 'CocoDirectory'"]),
        (["--data.n.help"], ["--data.n takes no class: it is INT", "Number of captions"]),
    ],
)
def test_help_of_what_there_is_not(sdprune, arguments, words):
    _is_one_line(sdprune("predict", *arguments), words)


def test_print_config(sdprune, tmp_path):
    told = sdprune(*predict(tmp_path, "--model.prune.unet.criterion=Wanda", "--print_config"))
    assert (told.code, told.err) == (0, "")
    (tmp_path / "printed.yaml").write_text(told.out)
    again = sdprune("predict", "--config", tmp_path / "printed.yaml", "--print_config")
    assert (again.code, again.out) == (0, told.out)
    assert "Wanda" in told.out
    assert "n: 7" in told.out
    assert not list(tmp_path.glob("dense-*"))


BAD_OPTIONS = {
    "negative sparsity": (
        ["--model.prune.unet.sparsity=-0.1"],
        ["--model.prune.unet.sparsity is -0.1", "between 0 and 1, as in 0.35."],
    ),
    "sparsity above 1": (["--model.prune.unet.sparsity=1.5"], ["sparsity is 1.5", "between 0 and 1"]),
    "sparsity of the other component": (
        ["--model.prune.text_encoder.sparsity=50"],
        ["--model.prune.text_encoder.sparsity is 50.0", "between 0 and 1; for 50 %, write 0.5."],
    ),
    "sparsity nan": (["--model.prune.unet.sparsity=nan"], ["prune.unet.sparsity is nan", "number"]),
    "sparsity no number": (["--model.prune.unet.sparsity=abc"], ["prune.unet.sparsity is abc", "number"]),
    "component": (["--model.prune.unett.sparsity=0.3"], ["'unett'", "Did you mean 'unet'", "text_encoder, unet"]),
    "component not pruned": (["--model.prune.vae.sparsity=0.3"], ["'vae'", "text_encoder, unet"]),
    "criterion": (["--model.prune.unet.criterion=Magnitud"], ["criterion 'Magnitud'", "Magnitude, ", "Wanda"]),
    "allocation": (["--model.prune.unet.allocation=Unform"], ["allocation 'Unform'", "Did you mean 'Uniform'"]),
    "granularity": (
        ["--model.prune.unet.granularity=rows"],
        ["'rows'", "column_block, module_block, N:M, row, layer, component"],
    ),
    "criterion without options": (
        ["--model.prune.unet.criterion.foo=3"],
        ["'model.prune.unet.criterion.foo' of Magnitude", "Magnitude has no options"],
    ),
    "criterion in small letters": (["--model.prune.unet.allocation=owl"], ["Did you mean 'OWL'"]),
    "criterion that is abstract": (
        ["--model.prune.unet.criterion=Criterion"],
        ["'Criterion'", "Choices: ", "Magnitude"],
    ),
    "option of the class that is named": (
        ["--model.prune.unet.allocation=PerLayer", "--model.prune.unet.allocation.sparsities.down*=0.5"],
        ["'model.prune.unet.allocation.sparsities.down*' of PerLayer", "Choices: layers."],
    ),
    "option of the class that is named in braces": (
        ["--model.prune.unet.allocation={{class_path: PerLayer, init_args: {{sparsities: {{a: 0.5, b: 0.5}}}}}}"],
        ["'model.prune.unet.allocation.sparsities' of PerLayer", "Choices: layers."],
    ),
    "option of a class that was named before": (
        ["--model.prune.unet.criterion=SparseGPT", "--model.prune.unet.criterion.damp=0.1"],
        ["'model.prune.unet.criterion.damp' of SparseGPT", "Choices: "],
    ),
    "option of a metric": (
        ["--model.metrics+=KernelInceptionDistance", "--model.metrics.subset=3"],
        ["'model.metrics.subset' of KernelInceptionDistance", "Choices: extractor, "],
    ),
    "a number in place of a spec": (["--model.prune.unet=0.3"], ["model.prune.unet is 0.3", "--model.prune.unet.help"]),
    "nothing to prune": (["--model.prune=null"], ["model.prune is empty", "--model.prune={{}} for none"]),
    "an empty value": (["--model.sampling.steps="], ["model.sampling.steps is empty"]),
    "what a class passes on": (
        ["--trainer.logger=WandbLogger", "--trainer.logger.grop=y"],
        ["Unknown option 'trainer.logger.grop'", "dict_kwargs"],
    ),
    "option beside the class": (
        ["--model.prune.unet.allocation={{class_path: OWL, lamda: 0.1}}"],
        ["model.prune.unet.allocation.lamda stands beside class_path", "init_args"],
    ),
    "module that is not there": (
        ["--model.prune.unet.criterion=nowhere.Shifted"],
        ["model.prune.unet.criterion is nowhere.Shifted", "there is no 'nowhere' in {tmp}"],
    ),
    "module that needs another": (
        ["--model.prune.unet.criterion=needing.Shifted"],
        ["'needing' cannot be imported", "it needs 'a_module_that_nobody_has'"],
    ),
    "module that is broken": (
        ["--model.prune.unet.criterion=broken.Shifted"],
        ["'broken' cannot be imported", "NameError", "'undefined'"],
    ),
    "class that a module lacks": (
        ["--model.prune.unet.criterion=shifted.Shiftd"],
        ["class of module 'shifted' 'Shiftd'", "Did you mean 'Shifted'"],
    ),
    "class of another kind": (
        ["--model.prune.unet.criterion=shifted.Other"],
        ["shifted.Other", "no Criterion", "from sdprune.pruning.Criterion."],
    ),
    "class that is no metric": (
        ["--model.metrics+=shifted.Other"],
        ["--model.metrics is shifted.Other", "from sdprune.metrics.Score."],
    ),
    **{
        f"class of one's own as {name}": (
            [f"--model.prune.unet.criterion={name}"],
            [f"--model.prune.unet.criterion is {name}", "MODULE.CLASS", "--model.prune.unet.criterion=shifted.Shifted"],
        )
        for name in ("Shifted", "shifted", "shifted.py", "./shifted.py")
    },
    "file in place of a class": (
        ["--data.calibration=file"],
        ["--data.calibration is file, a file", "--data.calibration=TextFile --data.calibration.path=file."],
    ),
    "directory in place of a class": (
        ["--data.source=pickled"],
        ["--data.source is pickled, a directory", "--data.source=CocoDirectory --data.source.root=pickled."],
    ),
    "name that no file can have": (["--data.source=" + 300 * "x"], ["Unknown source", "EmbeddedWorld"]),
    "option of another class": (
        ["--data.source.root=x"],
        ["'data.source.root' of EmbeddedWorld", "belongs to CocoDirectory", "--data.source=CocoDirectory"],
    ),
    "option of another allocation": (
        ["--model.prune.unet.allocation.lambda_=0.1"],
        ["of Uniform", "belongs to OWL", "--model.prune.unet.allocation=OWL"],
    ),
    "option that lacks": (
        ["--data.calibration=TextFile"],
        ["Missing: --data.calibration.path, which TextFile needs. See --data.calibration.help."],
    ),
    "several options that lack": (
        ["--data.source=HubDataset"],
        ["Missing: --data.source.dataset, --data.source.split, which HubDataset needs."],
    ),
    "option that one of two metrics lacks": (
        ["--model.metrics+=KernelInceptionDistance"],
        ["Missing: --model.metrics.extractor, which KernelInceptionDistance needs."],
    ),
    "class of another kind in the package": (
        ["--model.prune.unet.criterion=sdprune.pruning.OWL"],
        ["sdprune.pruning.OWL", "no Criterion"],
    ),
    "include": (["--model.prune.unet.include=[foo*]"], ["'foo*' matches none", "down_blocks"]),
    "include of one component": (["--model.prune.text_encoder.include=[down*]"], ["'down*' matches none"]),
    "include as text": (["--model.prune.unet.include=foo*"], ["unet.include is foo*", "a list"]),
    "layer kind": (["--model.prune.unet.layers=[Liner]"], ["'Liner'", "Did you mean 'Linear'"]),
    "SparseGPT by row": (
        ["--model.prune.unet.criterion=SparseGPT", "--model.prune.unet.granularity=row"],
        ["--model.prune.unet: SparseGPT is not defined for granularity row", "column_block"],
    ),
    "damping": (
        ["--model.prune.unet.criterion=SparseGPT", "--model.prune.unet.criterion.damping=-1"],
        ["--model.prune.unet.criterion.damping is -1.0"],
    ),
    "batch size": (["--data.batch_size=0"], ["--data.batch_size=0 is too small"]),
    "budget": (["--model.budget.total=30"], ["--model.budget.total is 30.0", "between 0 and 1"]),
    "band that is a number": (["--model.prune.unet.band=0.3"], ["--model.prune.unet.band is 0.3", "a list"]),
    "calibration": (["--model.calibration.hessian_gib=-1"], ["--model.calibration.hessian_gib is -1.0", "GiB"]),
    "typo in a spec": (
        ["--model.prune.unet.sparsty=0.3"],
        ["unet.sparsty'", "Did you mean 'model.prune.unet.sparsity'"],
    ),
    "typo at the root": (["--modle.x=1"], ["'modle.x'", "Did you mean 'model.x'"]),
    "typo in a group": (["--model.smapling.steps=2"], ["Did you mean 'model.sampling.steps'"]),
    "typo in a group's option": (["--model.sampling.stps=2"], ["Did you mean 'model.sampling.steps'"]),
    "typo in the trainer": (["--trianer.devices=2"], ["Did you mean 'trainer.devices'"]),
    "typo in the data": (["--data.batchsize=2"], ["Did you mean 'data.batch_size'"]),
    "no option": (["foo"], ["'foo'", "--help"]),
    "steps": (["--model.sampling.steps=0"], ["--model.sampling.steps is 0", "1 or more"]),
    "steps no number": (["--model.sampling.steps=x"], ["sampling.steps is x", "whole number"]),
    "size": (["--model.sampling.height=20"], ["height is 20", "multiple of 8"]),
    "scheduler": (["--model.sampling.scheduler=DDIMSchedule"], ["Did you mean 'DDIMScheduler'", "DDPMScheduler"]),
    "too few images": (["--data.n=41"], ["--data.n=41 is more", "at most 40"]),
    "too few to calibrate": (
        ["--data.calibration_n=21", "--model.prune.unet.criterion=Wanda"],
        ["--data.calibration_n=21 is more", "at most 20"],
    ),
    "too few to draw to calibrate": (
        ["--data.calibration_n=21", "--data.calibration_draw=random", "--model.prune.unet.criterion=Wanda"],
        ["--data.calibration_n=21 is more", "at most 20"],
    ),
    "reference": (["--data.reference=drwan"], ["--data.reference: ", "Did you mean 'drawn'"]),
    "reference file": (["--data.reference={tmp}/none.npz"], ["{tmp}/none.npz", "No such file"]),
    "no model directory": (["--model.pipeline.model={tmp}/none"], ["'{tmp}/none' does not exist", "hub id"]),
    "no pipeline in it": (["--model.pipeline.model={tmp}"], ["{tmp} is no diffusers directory", "model_index.json"]),
    "no safetensors in it": (["--model.pipeline.model={tmp}/pickled"], ["{tmp}/pickled/", "no safetensors"]),
    "a part is missing": (["--model.pipeline.model={tmp}/partial"], ["{tmp}/partial", "unet/"]),
    "damaged index": (["--model.pipeline.model={tmp}/damaged"], ["model_index.json is damaged"]),
    "hub out of reach": (
        ["--model.pipeline.model=nobody/nothing"],
        ["'nobody/nothing' at revision 'main' is not in the local cache", "HF_HUB_OFFLINE is set", "model=DIR"],
    ),
    "no COCO directory": (
        ["--data.source=CocoDirectory", "--data.source.root={tmp}/none", "--data.source.split=val2017"],
        ["{tmp}/none does not exist", "annotations/captions_<split>.json"],
    ),
    "COCO without annotations": (
        ["--data.source=CocoDirectory", "--data.source.root={tmp}", "--data.source.split=val2017"],
        ["{tmp} has no annotations/captions_val2017.json"],
    ),
    "unwritable output": (["--model.output={tmp}/file/runs"], ["Cannot write {tmp}/file/runs", "--model.output"]),
    "unwritable store": (
        ["--model.store={tmp}/file/store", "--model.prune.unet.criterion=Wanda"],
        ["Cannot write {tmp}/file/store", "--model.store"],
    ),
    "more processes than batches": (
        ["--trainer.devices=2", "--data.n=2"],
        ["n=2", "batch size 2", "2 processes", "batch size of at most 1"],
    ),
    "accelerator": (["--trainer.accelerator=abacus"], ["abacus", "cpu"]),
    "precision": (["--trainer.precision=17"], ["'17'", "16-true"]),
    "seed": (["--seed_everything=-5"], ["seed_everything is -5"]),
    "two metrics of one name": (["--model.metrics+=CLIPScore"], ["clip_score", "`name`"]),
    "W&B": (["--wandb=maybe"], ["'maybe'", "offline"]),
    "another module": (["--model=PruningModule"], ["GenerationModule", "PruningModule", "sdprune fit"]),
    "another data module": (["--data=WorldTrainingData"], ["CocoDataModule", "WorldTrainingData"]),
}


@pytest.fixture
def prepared(tmp_path, miniature):
    """Broken models and an ordinary file."""
    (tmp_path / "file").write_text("a file")
    pipeline = miniature / "pipeline"
    for name in ("pickled", "partial", "damaged"):
        shutil.copytree(pipeline, tmp_path / name)
    for weights in (tmp_path / "pickled").rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    shutil.rmtree(tmp_path / "partial" / "unet")
    (tmp_path / "damaged" / "model_index.json").write_text("{")
    (tmp_path / "needing.py").write_text("import a_module_that_nobody_has")
    (tmp_path / "broken.py").write_text("undefined")
    (tmp_path / "shifted.py").write_text(SHIFTED)
    yield tmp_path
    sys.modules.pop("shifted", None)
    gc.collect()  # its classes would still be found by name


SHIFTED = """
from sdprune.pruning.criteria.base import Ranking


class Shifted(Ranking):
    \"\"\"Magnitude after a shift of every weight.

    Args:
        shift: is added.
    \"\"\"

    def __init__(self, shift: float = 0.0):
        self.shift = shift

    def score(self, weight, statistics):
        return (weight + self.shift).abs()


class Other:
    pass
"""


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(sdprune, prepared, case, monkeypatch):
    options, words = BAD_OPTIONS[case]
    monkeypatch.chdir(prepared)
    told = sdprune(*predict(prepared / "runs", *(option.format(tmp=prepared) for option in options)))
    _is_one_line(told, [word.format(tmp=prepared) for word in words])
    assert not list((prepared / "runs").glob("*/images/*"))
    assert not list((prepared / "runs").glob("*/results.json"))


BAD_FILES = {
    "model class": (
        ("class_path: GenerationModule", "class_path: GeneratonModule"),
        ["Did you mean 'GenerationModule'"],
    ),
    "metric class": (
        ("class_path: CLIPScore", "class_path: ClipScor"),
        ["'ClipScor'", "CLIPScore, Dense"],
    ),
    "extractor class": (("ClipImageFeatures", "ClipImgFeatures"), ["extractor", "Did you mean 'ClipImageFeatures'"]),
    "source class": (("class_path: EmbeddedWorld}", "class_path: EmbededWorld}"), ["Did you mean 'EmbeddedWorld'"]),
    "family class": (
        ("class_path: StableDiffusion", "class_path: StabelDiffusion"),
        ["Did you mean 'StableDiffusion'"],
    ),
    "option of a spec": (
        ("unet: {sparsity", "unet: {sparsty"),
        ["'model.prune.unet.sparsty'", "Did you mean 'model.prune.unet.sparsity'"],
    ),
    "option of a group": (("sampling: {steps", "sampling: {stps"), ["Did you mean 'model.sampling.steps'"]),
    "option of the data": (("    batch_size:", "    batch_sise:"), ["Did you mean 'data.batch_size'"]),
    "option of a nested class": (
        ("class_path: EmbeddedWorld}", "class_path: CocoDirectory, init_args: {dir: x}}"),
        ["'data.source.dir' of CocoDirectory", "Choices: root, split."],
    ),
    "key at the root": (("model:\n  class", "modle:\n  class"), ["modle", "Did you mean 'model"]),
    "key at the root with nothing": (("data:\n", "trainr:\ndata:\n"), ["'trainr'", "Did you mean 'trainer'"]),
    "a spec with nothing": (("unet: {sparsity: 0.35}", "unet:"), ["model.prune.unet is empty"]),
    "a width of nothing": (
        ("unet: {sparsity: 0.35}", "unet: {block_width: }"),
        ["model.prune.unet.block_width is empty"],
    ),
    "a root of nothing": (("data:\n", "other:\ndata:\n"), ["Unknown option 'other'"]),
    "pattern without quotes": (("text_encoder: {", "text_encoder: {exclude: [*], "), ["valid YAML", "['*']"]),
    "YAML": (("prune:\n", "prune: [\n"), ["{file} is no valid YAML"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(sdprune, tmp_path, case):
    (old, new), words = BAD_FILES[case]
    file = tmp_path / "bad.yaml"
    assert old in YAML
    file.write_text(YAML.replace(old, new, 1))
    told = sdprune("predict", "--config", file)
    _is_one_line(told, [word.format(file=file) for word in words])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict"], ["Missing: --data, --model. Give a configuration", "--config"]),
        (["fit"], ["Missing: --data, --model. Give a configuration", "--config"]),
        (["predict", "--config"], ["--config", "expected one argument"]),
        (["predict", "--config", "{tmp}/none.yaml"], ["Unknown configuration", "{tmp}/none.yaml", "mini/predict"]),
        (["predict", "--config={tmp}"], ["{tmp}", "directory"]),
        (["predict", "-c", "{tmp}/text.yaml"], ["{tmp}/text.yaml holds no options"]),
        (["predict", "--config", "{tmp}/bytes.yaml"], ["{tmp}/bytes.yaml is no valid YAML"]),
        (["predict", "--model", "GeneratonModule"], ["Did you mean 'GenerationModule'"]),
        (["fit", "--config", str(CONFIGS / "predict.yaml"), CPU], ["GenerationModule", "sdprune predict"]),
        (["--verson"], ["'--verson'", "fit, predict"]),
    ],
)
def test_bad_calls(sdprune, tmp_path, arguments, words):
    (tmp_path / "text.yaml").write_text("just text")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    told = sdprune(*(argument.format(tmp=tmp_path) for argument in arguments))
    _is_one_line(told, [word.format(tmp=tmp_path) for word in words])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.prune.unet.include=[foo*]"], ["'foo*' matches none"]),
        (["--model.output={tmp}/file/runs"], ["Cannot write", "--model.output"]),
        (["--model.prune.unet.criterion=Wanda", "--data.calibration_n=21"], ["--data.calibration_n=21 is more"]),
        (["--model.prune.unet.criterion=Wanda", "--model.sampling.scheduler=Foo"], ["scheduler 'Foo'"]),
    ],
)
def test_bad_options_of_fit(sdprune, prepared, options, words):
    told = sdprune(*fit("prune", prepared / "runs", *(option.format(tmp=prepared) for option in options)))
    _is_one_line(told, words)
    assert not (prepared / "runs" / "statistics").exists()


def test_components_to_calibrate(sdprune, tmp_path):
    _is_one_line(sdprune(*fit("calibrate", tmp_path, "--model.components=[unett]")), ["Did you mean 'unet'"])
    _is_one_line(sdprune(*fit("calibrate", tmp_path, "--model.components=[]")), ["components is empty"])
    _is_one_line(sdprune(*fit("calibrate", tmp_path, "--model.statistics=[]")), ["statistics is empty", "hessian"])
    told = sdprune(*fit("calibrate", tmp_path, "--model.statistics=[hesian]"))
    _is_one_line(told, ["Did you mean 'hessian'"])


def test_other_ranks_are_silent(sdprune, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert sdprune(*predict(tmp_path, "--model.prune.unet.sparsity=2")) == (2, "", "")


def test_unexpected_failures_show_where(sdprune, tmp_path, monkeypatch):
    from sdprune.modules import GenerationModule

    monkeypatch.setattr(GenerationModule, "on_predict_start", lambda self: 1 / 0)
    told = sdprune(*predict(tmp_path))
    assert told.code == 1
    assert "ZeroDivisionError" in told.err.splitlines()[-1]
    assert "Traceback" in told.err


def test_interrupted(miniature, tmp_path):
    script = Path(sys.executable).parent / "sdprune"
    command = [script, *predict(tmp_path, "--data.n=40", "--model.sampling.steps=20")]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
    )  # fmt: skip
    images = 0
    for _ in range(1200):
        time.sleep(0.1)
        images = len(list(tmp_path.glob("dense-*/images/*.png")))
        if images or started.poll() is not None:
            break
    os.kill(started.pid, signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert err.strip() == "sdprune: interrupted; run the same command again to go on"
    assert images
    assert images <= len(list(tmp_path.glob("dense-*/images/*.png"))) < 40
    assert not list(tmp_path.glob("*/results.json"))


def test_damage_is_told_by_name(sdprune, tmp_path):
    """Whatever a file of an earlier run holds, nothing is drawn or overwritten before it is told."""
    arguments = predict(tmp_path, "--model.prune.unet.criterion=Wanda")
    assert sdprune(*arguments).code == 0
    dense, pruned = the_run(tmp_path, "dense"), the_run(tmp_path, "text_encoder")
    (reference,) = (tmp_path / "reference").glob("*.npz")
    picture = sorted((pruned / "images").iterdir())[2]
    others = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "logs" not in path.parts}

    def damaged(file: Path, words: list[str], unfinished: bool = False) -> None:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        results = pruned / "results.json"
        if unfinished:
            kept = results.read_bytes()
            results.unlink()
        _is_one_line(sdprune(*arguments), [str(file), *words])
        file.write_bytes(whole)
        if unfinished:
            results.write_bytes(kept)
        assert all(path.read_bytes() == content for path, content in others.items())

    damaged(pruned / "results.json", ["is damaged", "delete it"])
    damaged(dense / "results.json", ["is damaged", "delete it"])
    damaged(dense / "rows.npz", ["damaged", "delete results.json"])
    damaged(dense / "samples" / "1.png", ["damaged", "results.json"])
    damaged(picture, ["damaged", "delete it"], unfinished=True)
    damaged(reference, ["npz"])
    (pruned / "results.json").unlink()
    picture.unlink()
    assert sdprune(*arguments).code == 0
    assert picture.read_bytes() == others[picture]
    assert json.loads((pruned / "results.json").read_text())["speed"]["generated"] == 1


def test_damaged_report_of_a_saved_pipeline(sdprune, tmp_path):
    assert sdprune(*fit("prune", tmp_path)).code == 0
    (report,) = tmp_path.glob("pruned-*/pruning_report.json")
    report.write_text("{")
    _is_one_line(sdprune(*fit("prune", tmp_path)), [str(report), "is damaged", "delete it"])


def test_output_is_plain_where_it_is_no_terminal(miniature, tmp_path):
    done = process(predict(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout)
    assert "dense: 7 of 7 images" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) < 200


def _is_one_line(told, words):
    assert told.code == 2, told.err[-2000:]
    assert told.err.count("\n") == 1, told.err
    assert told.err.startswith("sdprune: error: ")
    assert len(told.err) < 700
    for word in words:
        assert word in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    "path", sorted((CONFIGS.parent).glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_shipped_configuration_parses_by_the_command_that_its_header_names(sdprune, path):
    verb, files = re.search(r"^# sdprune (\w+) --config (.*)$", path.read_text(), re.MULTILINE).groups()
    words = f"--config {files}".replace("configs/", f"{CONFIGS.parent}/").split()
    assert str(path) in words
    told = sdprune(verb, *words, "--print_config")
    assert told.code == 0, told.err
    assert yaml.safe_load(told.out)["model"]["class_path"]
