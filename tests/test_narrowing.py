"""Narrowing by the command line: records, files and errors."""

import json

import pytest
import yaml
from command_lines import CONFIGS, fit, predict, the_run
from narrowing import ALL, pictures
from safetensors.torch import load_file


def test_predict_and_fit_make_the_same_model(sdprune, miniature, tmp_path):
    """Narrowed in memory, and saved and loaded: the same pictures; the record says what it has become."""
    where = ["--model.prune={}", ALL]
    told = sdprune(*predict(tmp_path / "memory", *where))
    assert (told.code, told.err) == (0, "")
    assert "unet is narrowed: " in told.out
    saved = tmp_path / "saved"
    told = sdprune(*fit("prune", tmp_path, *where, f"--model.directory={saved}", "--data.source.split=train"))
    assert (told.code, told.err) == (0, "")
    report = json.loads((saved / "pruning_report.json").read_text())["narrowing"]
    for name, found in report.items():
        (file,) = (saved / name).glob("*.safetensors")
        assert found["parameters"] == sum(one.numel() for one in load_file(file).values())
        assert found["parameters"] < found["parameters_before"]
    record = the_run(tmp_path / "memory", "text_encoder-narrow-heads0.4-neurons0.3-sparsegpt-unet-narrow-heads0.4")
    results = json.loads((record / "results.json").read_text())
    assert results["sparsity"]["components"]["unet"]["parameters"] == report["unet"]["parameters"]
    again = ["--model.prune={}", f"--model.pipeline.model={saved}", "--model.baseline=miniature"]
    told = sdprune(*predict(tmp_path / "again", *again))
    assert (told.code, told.err) == (0, "")
    assert pictures(the_run(tmp_path / "again", "saved")) == pictures(record)
    assert len(pictures(record)) == 7


def test_what_is_left_is_pruned(sdprune, miniature, tmp_path):
    """Sparsities are shares of the narrowed layers, whose inputs are those of the narrowed model."""
    where = ["--model.narrow={unet: {heads: 0.4, channels: 0.4}}", "--model.prune={unet: {sparsity: 0.5}}"]
    where += ["--model.prune.unet.criterion=Wanda", f"--model.directory={tmp_path / 'saved'}"]
    told = sdprune(*fit("prune", tmp_path, *where))
    assert (told.code, told.err) == (0, "")
    report = json.loads((tmp_path / "saved" / "pruning_report.json").read_text())
    (file,) = (tmp_path / "saved" / "unet").glob("*.safetensors")
    weights = load_file(file)
    for layer in report["layers"]["unet"]:
        weight = weights[f"{layer['name']}.weight"]
        assert layer["weights"] == weight.numel()
        assert (
            layer["zeros"] == int((weight == 0).sum()) >= layer["pruned"] == weight.shape[0] * int(weight.shape[1] / 2)
        )
    found = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "statistics").glob("unet-*"))
    assert found == ["unet-hessian", "unet-hessian", "unet-input_norm"]  # choice, refit, and the narrowed model
    told = sdprune(*fit("prune", tmp_path, *where[1:3]))  # those of the dense model are others
    assert told.code == 0
    assert len(list((tmp_path / "statistics").glob("unet-input_norm-*"))) == 2


def test_another_narrowing_is_another_run(sdprune, miniature, tmp_path):
    plain = [
        "--model.narrow.unet.criterion=Magnitude",
        "--model.narrow.unet.refit=false",
        "--model.compare_dense=false",
    ]
    names = set()
    for share in ("channels=0.4", "channels=0.3", "neurons=0.4"):
        command = predict(tmp_path, "--model.prune={}", f"--model.narrow.unet.{share}", *plain)
        assert sdprune(*command).code == 0
        names = {path.name for path in tmp_path.iterdir() if (path / "results.json").exists()}
    assert len(names) == 3
    assert {name.rpartition("-")[0] for name in names} == {
        f"unet-narrow-{one}-magnitude-plain" for one in ("channels0.4", "channels0.3", "neurons0.4")
    }
    told = sdprune(*command)
    assert "This run was finished already" in told.out
    assert sdprune("report", tmp_path, "--out", tmp_path / "report").code == 0
    rows = [line for line in (tmp_path / "report" / "report.md").read_text().splitlines() if "| unet-narrow" in line]
    assert len(rows) == 3
    assert all(line.split("|")[2].strip() == "dense" for line in rows)
    assert sum("narrowed, unet narrow channels 0.4" in line.split("|")[3] for line in rows) == 1
    assert not any("dense" in line.split("|")[3] for line in rows)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--model.narrow.unet.channels=1.5"], "--model.narrow.unet.channels is 1.5: give a share between 0 and 1"),
        (["--model.narrow.unet.chanels=0.5"], "Did you mean 'model.narrow.unet.channels'?"),
        (["--model.narrow.nuet.channels=0.5"], "Unknown component 'nuet'. Did you mean 'unet'?"),
        (
            ["--model.narrow.text_encoder.channels=0.5"],
            "--model.narrow.text_encoder.channels is 0.5, and a CLIPTextModel has no channels: it has heads, layers, "
            "neurons.",
        ),
        (["--model.narrow.unet.damping=0"], "--model.narrow.unet.damping is 0"),
        (["--model.narrow.unet.flops=-1"], "--model.narrow.unet.flops is -1"),
        (
            ["--model.narrow.unet={flops: 0.2, heads: 0.4}"],
            "--model.narrow.unet.flops is 0.2, which decides the shares of all kinds, and heads is 0.4: give one.",
        ),
        (
            ["--model.narrow.unet.flops=0.2", "--model.budget.total=0.3", "--model.prune={}"],
            "--model.narrow.unet.flops leaves the number of weights to measurement",
        ),
    ],
)
def test_what_cannot_be_narrowed_is_explained(sdprune, miniature, tmp_path, options, line):
    told = sdprune(*predict(tmp_path, *options))
    assert told.code == 2
    assert line in told.err
    assert told.err.count("\n") == 1


def test_options_need_no_entry_in_the_configuration(sdprune, miniature, tmp_path):
    """A configuration of one's own that does not mention narrowing takes its options too."""
    config = yaml.safe_load((CONFIGS / "predict.yaml").read_text())
    del config["model"]["init_args"]["narrow"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    told = sdprune(
        "predict", f"--config={tmp_path / 'own.yaml'}", "--model.narrow.unet.heads=0.2",
        "--model.narrow.unet.neurons=0.3", "--print_config",
    )  # fmt: skip
    assert (told.code, told.err) == (0, "")
    assert yaml.safe_load(told.out)["model"]["init_args"]["narrow"]["unet"]["neurons"] == 0.3
