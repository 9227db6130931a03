"""A user's own classes: found by dotted path in the current directory, for what a configuration names alone."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from command_lines import predict, process, the_run
from PIL import Image
from test_cli import SHIFTED


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a criterion in it."""
    (tmp_path / "shifted.py").write_text(SHIFTED)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("shifted", None)


def test_a_class_of_the_working_directory(miniature, here):
    """By the console script, which by itself does not search the working directory."""
    options = ["--model.prune.unet.criterion=shifted.Shifted", "--model.prune.unet.criterion.shift=0.5"]
    done = process(predict(here / "runs", *options))
    assert done.returncode == 0, done.stderr
    prune = json.loads((the_run(here / "runs", "text_encoder") / "config.json").read_text())["prune"]
    criterion = prune["unet"]["criterion"]
    assert (criterion["class"], criterion["options"]) == ("Shifted", {"shift": 0.5})
    assert len(criterion["code"]) == 12  # of shifted.py


PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
BRIGHTNESS = re.search(r"# brightness.py\n(.*?)```", PAGE, re.DOTALL)[1]


def test_a_metric_of_the_working_directory(sdprune, here):
    (here / "brightness.py").write_text(BRIGHTNESS)
    told = sdprune(*predict(here / "runs", "--model.metrics=[{class_path: brightness.Brightness}]"))
    sys.modules.pop("brightness", None)
    assert told.code == 0, told.err
    means = {}
    for name in ("dense", "text_encoder"):
        run = the_run(here / "runs", name)
        pictures = [np.asarray(Image.open(path).convert("RGB")) for path in (run / "images").iterdir()]
        means[name] = np.mean([picture.mean() / 255 for picture in pictures])
        results = json.loads((run / "results.json").read_text())
        assert results["metrics"]["brightness"] == pytest.approx(means[name], abs=1e-6)
    assert results["comparison"]["brightness_diff"] == pytest.approx(means["text_encoder"] - means["dense"], abs=1e-6)


def test_nothing_else_is_searched_in_the_working_directory(sdprune, here):
    """What a model directory names is code of strangers: naming a class here must not open the directory to it."""
    before = list(sys.path)
    options = ["--model.prune.unet.criterion=shifted.Shifted", "--print_config"]
    told = sdprune(*predict(here / "runs", *options))
    assert told.code == 0, told.err
    assert "class_path: shifted.Shifted" in told.out
    assert sys.path == before


def test_a_class_here_does_not_take_the_name_of_one_of_the_package(miniature, here):
    (here / "mine.py").write_text(SHIFTED.replace("class Shifted", "class Magnitude"))
    options = ["--model.prune.unet.criterion=mine.Magnitude", "--model.prune.unet.criterion.shift=0.5"]
    done = process(predict(here / "runs", *options, "--model.compare_dense=false"))
    assert done.returncode == 0, done.stderr
    prune = json.loads((the_run(here / "runs", "text_encoder") / "config.json").read_text())["prune"]
    assert prune["unet"]["criterion"]["options"] == {"shift": 0.5}
    assert prune["text_encoder"]["criterion"] == {"class": "Magnitude", "options": {}}


def test_a_pattern_of_all_layers_needs_no_quotes(sdprune, tmp_path):
    for word in ("[*]", "[*attn*, foo]", "['*', \"a *b\"]"):
        told = sdprune(*predict(tmp_path, f"--model.prune.unet.exclude={word}", "--print_config"))
        assert told.code == 0, told.err
        assert ("- '*attn*'" if "attn" in word else "- '*'") in told.out
    assert "- a *b" in told.out
    for words in (["--model.prune.unet.exclude", "[*]"], ["--model.prune.unet={sparsity: 0.1, exclude: [*]}"]):
        told = sdprune(*predict(tmp_path, *words, "--print_config"))
        assert "- '*'" in told.out, told.err


def test_options_before_their_class_say_so(sdprune, tmp_path: Path):
    arguments = [word for word in predict(tmp_path) if "calibration" not in word]
    told = sdprune("predict", "--data=CocoDataModule", "--data.calibration.split=train", *arguments[3:])
    assert told.code == 2
    assert "data.calibration has no class yet" in told.err
    assert told.err.count("\n") == 1


FAULTS = {
    "statistic that is not declared": (
        "weight.abs() * statistics['input_norm']",
        2,
        "sdprune: error: Shifted reads the statistic input_norm, which its class does not name: ",
    ),
    "statistic that there is not": (
        "weight * statistics['shift']",
        1,
        "sdprune: failed: shifted.py:16 in score: KeyError: 'shift'",
    ),
    "exception": (
        "weight / (1 // 0)",
        1,
        "sdprune: failed: shifted.py:16 in score: ZeroDivisionError: integer",
    ),
    "no scores": ("1.0", 2, "sdprune: error: Shifted scores layer '' with float"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_a_class_of_ones_own_are_told_before_anything_is_drawn(sdprune, here, case):
    wrong, code, last = FAULTS[case]
    (here / "shifted.py").write_text(SHIFTED.replace("(weight + self.shift).abs()", wrong))
    told = sdprune(*predict(here / "runs", "--model.prune.unet.criterion=shifted.Shifted"))
    assert (told.code, told.err.splitlines()[-1][: len(last)]) == (code, last)
    assert not list((here / "runs").glob("*/images"))
    files = [line for line in told.err.splitlines() if line.startswith("  File ")]
    assert len(files) == code % 2, "the traceback begins in the file of one's own"


def test_a_fault_of_a_constructor_of_ones_own(sdprune, here):
    (here / "shifted.py").write_text(SHIFTED.replace("self.shift = shift", "raise ValueError('no\\nshift')"))
    told = sdprune(*predict(here / "runs", "--model.prune.unet.criterion=shifted.Shifted"))
    assert told.err.splitlines()[-1] == "sdprune: failed: shifted.py:13 in __init__: ValueError: no shift"
    assert (told.code, told.err.count("  File ")) == (1, 1)


def test_a_fault_of_a_metric_of_ones_own(sdprune, here):
    (here / "brightness.py").write_text(BRIGHTNESS.replace("images.float()", "images.brightness()"))
    told = sdprune(*predict(here / "runs", "--model.metrics=[{class_path: brightness.Brightness}]"))
    sys.modules.pop("brightness", None)
    assert told.code == 1
    assert "sdprune: failed: brightness.py:8 in <lambda>: AttributeError: " in told.err.splitlines()[-1]
    assert told.err.count("  File ") == 1


def test_options_of_a_criterion_that_is_tried_out(sdprune, here):
    """It is tried as it will be used: by its own granularity, with the statistics that it names."""
    patterned = "granularities = ('N:M',)\n    statistics = frozenset({'input_norm'})\n\n    def score"
    (here / "shifted.py").write_text(SHIFTED.replace("def score", patterned))
    options = ["--model.prune.unet.criterion=shifted.Shifted", "--model.prune.unet.sparsity=0.5"]
    told = sdprune(*predict(here / "runs", *options, "--model.prune.unet.granularity=2:4"))
    assert told.code == 0, told.err
