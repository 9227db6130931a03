"""Configurations and sweeps that come with the package work in any directory."""

import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from command_lines import ROOT

FOLDERS = ("configs", "wandb_sweeps")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.yaml"))]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory that is no clone."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["mini/predict", "mini/predict.yaml", "configs/mini/predict.yaml"])
@pytest.mark.parametrize("before", [["--config"], ["--config="], ["-c"]], ids=str)
def test_a_name_is_the_file_that_comes_with_the_package(sdprune, elsewhere, name, before):
    option = [f"{before[0]}{name}"] if before[0].endswith("=") else [*before, name]
    by_name = sdprune("predict", *option, "--data.n=5", "--print_config")
    by_path = sdprune("predict", "--config", ROOT / "configs/mini/predict.yaml", "--data.n=5", "--print_config")
    assert (by_name.code, by_name.err) == (0, "")
    assert by_name.out == by_path.out


def test_a_name_and_a_name_that_adds_to_it(sdprune, elsewhere):
    told = sdprune("predict", "--config", "mini/predict", "--config=mini/metrics", "--print_config")
    assert told.code == 0, told.err
    metrics = [
        one["class_path"].rpartition(".")[2] for one in yaml.safe_load(told.out)["model"]["init_args"]["metrics"]
    ]
    assert "PrecisionRecall" in metrics


def test_a_file_of_the_working_directory_comes_first(sdprune, elsewhere):
    own = yaml.safe_load((ROOT / "configs/mini/predict.yaml").read_text())
    own["data"]["init_args"]["n"] = 77
    (elsewhere / "mini").mkdir()
    (elsewhere / "mini" / "predict").write_text(yaml.safe_dump(own))
    assert "n: 77\n" in sdprune("predict", "--config", "mini/predict", "--print_config").out
    assert "n: 77\n" not in sdprune("predict", "--config", "mini/predict.yaml", "--print_config").out


def test_a_sweep_and_the_configuration_that_it_names(sdprune, miniature, elsewhere):
    names = ["mini_sparsity", "mini_sparsity.yaml", "wandb_sweeps/mini_sparsity.yaml"]
    told = [sdprune("sweep", name, "--dry-run") for name in names]
    assert [(one.code, one.err) for one in told] == [(0, "")] * 3
    assert told[0].out.count("sdprune predict") == 16
    assert told[1].out == told[2].out == told[0].out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["predict", "--config", "mini/predct"],
            ["Unknown configuration 'mini/predct'. Did you mean 'mini/predict'?", "mini/calibrate", "a YAML file"],
        ),
        (["fit", "--config=none.yaml"], ["Unknown configuration 'none.yaml'.", "mini/prune"]),
        (["sweep", "mini_sparsty"], ["Unknown sweep 'mini_sparsty'. Did you mean 'mini_sparsity'?"]),
        (["predict", "--config=../configs/mini/predict"], ["Unknown configuration '../configs/mini/predict'."]),
    ],
)
def test_a_name_that_there_is_not(sdprune, elsewhere, words, parts):
    told = sdprune(*words)
    assert (told.code, told.out) == (2, "")
    assert told.err.startswith("sdprune: error: ")
    assert told.err.count("\n") == 1
    for part in parts:
        assert part in told.err


def test_the_wheel_holds_them_as_files(tmp_path):
    """What is installed elsewhere has no folders beside it that the links in the repository lead to."""
    tree = tmp_path / "tree"
    for folder in ("sdprune", *FOLDERS):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("weights", "__py*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        for path in FILES:
            assert wheel.read(f"sdprune/{path.relative_to(ROOT)}") == path.read_bytes()
        for name in ("page.html", "page.css", "page.js", "report.md"):
            assert wheel.read(f"sdprune/study/page/{name}") == (ROOT / "sdprune/study/page" / name).read_bytes()
