"""The study's own numbers: its budgets, and the cells of its sweeps."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from command_lines import ROOT, fit, predict, runs, the_run
from lightning import Trainer

import sdprune.study
from sdprune.data import CocoDataModule
from sdprune.errors import InputError
from sdprune.mini.source import EmbeddedWorld
from sdprune.modules import PruningModule
from sdprune.pipelines import StableDiffusion
from sdprune.pruning import Budget, InfeasibleError, Size
from sdprune.study.grid import Grid

SWEEPS = ROOT / "wandb_sweeps"
SD2 = {"text_encoder": Size(340_387_840, 289_406_976), "unet": Size(865_910_724, 301_219_840)}
with (Path(sdprune.study.__file__).parent / "published_tables.csv").open() as file:
    PUBLISHED = list(csv.DictReader(file))
METHODS = {("Magnitude", "Uniform"): "magnitude", ("Magnitude", "OWL"): "owl_magnitude"}


def sparsities(row):
    return float(row["text_sparsity"]), float(row["unet_sparsity"])


# --- budgets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in PUBLISHED if row["table"] in "59"], ids=str)
def test_a_budget_gives_table_1(row):
    share = float(row["text_to_image_ratio"].split(":")[0]) / 100
    found = Budget(float(row["nominal_total_sparsity"]), share).sparsities(SD2, ["text_encoder"])
    assert (found["text_encoder"], found["unet"]) == sparsities(row)


@pytest.mark.parametrize(("total", "share"), [(0.4, 0.75), (0.5, 0.75), (0.6, 0.75), (0.6, 0.5)])
def test_what_table_1_leaves_out_is_infeasible(total, share):
    with pytest.raises(InfeasibleError, match=f"a total of {total} with {share:.0%} of it in text_encoder"):
        Budget(total, share).sparsities(SD2, ["text_encoder"])


def test_the_actual_reading_reaches_its_total():
    budget = Budget(0.2, 0.6, counting="actual", decimals=6)
    found = budget.sparsities(SD2, ["text_encoder"])
    zeros = {name: found[name] * SD2[name].targets for name in SD2}
    assert sum(zeros.values()) == pytest.approx(0.2 * sum(size.parameters for size in SD2.values()), rel=1e-5)
    assert zeros["text_encoder"] / sum(zeros.values()) == pytest.approx(0.6, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total": 1.5}, "budget.total is 1.5"),
        ({"total": 0.3, "text_share": -0.1}, "budget.text_share is -0.1"),
        ({"total": 0.3, "counting": "nominell"}, "Unknown counting 'nominell'. Did you mean 'nominal'"),
        ({"total": 0.3, "decimals": -1}, "budget.decimals is -1"),
        ({"total": 0.3, "shares": {"unet": 0.5}}, "budget.shares is {'unet': 0.5}: give shares whose sum is 1."),
        ({"total": 0.3, "shares": {"unet": 1.5}}, "budget.shares.unet is 1.5"),
        ({"total": 0.3, "text_share": 0.4, "shares": {"unet": 1}}, "budget.text_share is 0.4: it has no effect with"),
        ({"total": 0.3, "shares": {"unet": 1}, "split": "sensitivity"}, "budget.shares is {'unet': 1}, which has no"),
    ],
)
def test_impossible_budgets_are_refused(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Budget(**options)


def test_shares_by_component():
    """What each component loses is its share of the total of all; one that is left out stays dense."""
    sizes = {"one": Size(100, 80), "two": Size(300, 200), "three": Size(600, 500)}
    found = Budget(0.1, shares={"one": 0.25, "three": 0.75}, decimals=6).sparsities(sizes, ["one", "two"])
    assert found == {"one": 0.25, "two": 0.0, "three": 0.125}
    with pytest.raises(InfeasibleError, match="with 90% of it in one would prune 180 of 100 weights there"):
        Budget(0.2, shares={"one": 0.9, "two": 0.1}).sparsities(sizes, ["one", "two"])
    with pytest.raises(InputError, match="Unknown component 'onne'"):
        Budget(0.2, shares={"onne": 1.0}).sparsities(sizes, ["one"])


def test_a_budget_decides_sparsities_and_shares_records(sdprune, tmp_path):
    """The same sparsities by budget and by hand are one run."""
    base = ["--model.prune.text_encoder.sparsity=0", "--model.prune.unet.sparsity=0"]
    assert sdprune(*predict(tmp_path, *base, "--model.budget.total=0.2", "--model.budget.text_share=0.5")).code == 0
    run = the_run(tmp_path, "text_encoder")
    config = json.loads((run / "config.json").read_text())
    found = {name: spec["sparsity"] for name, spec in config["prune"].items()}
    results = json.loads((run / "results.json").read_text())
    sizes = {name: results["sparsity"]["components"][name]["parameters"] for name in found}
    for name, size in sizes.items():
        assert found[name] == round(0.2 * 0.5 * sum(sizes.values()) / size, 2)
    assert results["budget"] == {
        "total": 0.2, "text_share": 0.5, "counting": "nominal", "decimals": 2, "split": "share"
    }  # fmt: skip
    by_hand = [f"--model.prune.{name}.sparsity={sparsity}" for name, sparsity in found.items()]
    assert sdprune(*predict(tmp_path, *by_hand)).code == 0
    assert runs(tmp_path, "text_encoder") == [run]


def test_an_infeasible_budget_ends_well_with_a_record(sdprune, tmp_path):
    for _ in range(2):
        told = sdprune(*predict(tmp_path, "--model.budget.total=0.6", "--model.budget.text_share=0.75"))
        assert (told.code, told.err) == (0, "")
        assert told.out.startswith("Infeasible: a total of 0.6 with 75% of it in text_encoder would prune")
        run = the_run(tmp_path, "infeasible-0.6-0.75")
        assert json.loads((run / "results.json").read_text())["infeasible"] in told.out
    assert not list(tmp_path.rglob("*.png"))


def test_fit_refuses_an_infeasible_budget(sdprune, tmp_path):
    nothing = ["--model.prune.text_encoder.sparsity=0", "--model.prune.unet.sparsity=0"]
    told = sdprune(*fit("prune", tmp_path, *nothing, "--model.budget.total=0.6", "--model.budget.text_share=0.75"))
    assert told.code == 2
    assert told.err.startswith(
        "sdprune: error: The budget is infeasible: a total of 0.6 with 75% of it in text_encoder"
    )
    assert told.err.count("\n") == 1
    assert not list(tmp_path.glob("pruned-*"))


def test_an_infeasible_budget_is_an_error_without_the_command_line_too(miniature, tmp_path):
    module = PruningModule(
        StableDiffusion(model="miniature"),
        {},
        budget=Budget(0.6, 0.75),
        output=str(tmp_path),
        store=str(tmp_path / "s"),
    )
    data = CocoDataModule(source=EmbeddedWorld(images=20), calibration_n=5)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(InfeasibleError, match=r"a total of 0\.6 with 75% of it in text_encoder"):
        trainer.predict(module, datamodule=data)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("given", "amounts", "free"),
    [
        (["text_encoder.sparsity=0", "unet.sparsity=0.35"], {"unet": ("0.11", "0.35")}, ["unet.sparsity=0"]),
        (
            ["text_encoder.sparsity=0.475", "unet.sparsity=0.35"],
            {"text_encoder": ("0.82", "0.475"), "unet": ("0.11", "0.35")},
            ["text_encoder.sparsity=0", "unet.sparsity=0"],
        ),
        (
            ["text_encoder.sparsity=0", "unet.sparsity=0.5", "unet.granularity=2:4"],
            {"unet": ("0.11", "0.5")},
            ["unet.granularity=null"],
        ),
    ],
)
def test_a_budget_and_a_components_other_sparsity_exclude_each_other(sdprune, tmp_path, given, amounts, free):
    """The line names every such component, and the options that leave it to the budget."""
    options = [f"--model.prune.{option}" for option in given]
    for line in (predict(tmp_path, *options), fit("prune", tmp_path, *options)):
        told = sdprune(*line, "--model.budget.total=0.2", "--model.budget.text_share=0.5")
        assert told.code == 2
        assert told.err.count("\n") == 1
        for name, (budgeted, own) in amounts.items():
            assert f"{name} a sparsity of {budgeted}, where --model.prune.{name} has {own}" in told.err
        ways = told.err.strip().partition("Leave it to the budget: ")[2].split()
        assert ways == [f"--model.prune.{option}" for option in free]
    assert not list(tmp_path.glob("*-*"))


# --- sweeps ---------------------------------------------------------------------------------------------------


def study_cells(scale):
    """(text method, text sparsity, U-Net sparsity) of every cell, budgets resolved with SD2's counts."""
    found = []
    for path in sorted(SWEEPS.glob(f"{scale}_*.yaml")):
        for cell in Grid(path).points:
            if "model.prune" in cell:
                prune = yaml.safe_load(cell["model.prune"])
                text, unet = prune["text_encoder"], prune["unet"]
                assert (text["order"], text["mode"], unet["mode"]) == ("sequential", "original", "original")
                found.append(("Magnitude", text["allocation"], text["sparsity"], unet["sparsity"]))
                continue
            text = {key.rsplit(".", 1)[1]: value for key, value in cell.items() if ".text_encoder." in key}
            amounts = (text.get("sparsity", 0.0), cell.get("model.prune.unet.sparsity", 0.0))
            if "model.budget.total" in cell:
                budget = Budget(cell["model.budget.total"], cell["model.budget.text_share"])
                try:
                    amounts = tuple(budget.sparsities(SD2, ["text_encoder"]).values())
                except InfeasibleError:
                    amounts = ("infeasible", "infeasible")
            found.append((text.get("criterion", "Magnitude"), text.get("allocation", "Uniform"), *amounts))
    return found


@pytest.mark.parametrize("scale", ["study", "mini_study"])
def test_the_sweeps_are_the_studys_models(scale):
    found = study_cells(scale)
    infeasible = [cell for cell in found if cell[2] == "infeasible"]
    feasible = [cell for cell in found if cell[2] != "infeasible"]
    assert len(infeasible) == 8
    assert len(feasible) == len(set(feasible)) == 99  # and the dense one
    eleven = {0.3, 0.4, 0.5, 0.55, 0.575, 0.6, 0.625, 0.65, 0.675, 0.7, 0.8}
    alone = {}
    for criterion, allocation, text, unet in feasible:
        if not unet:
            alone.setdefault((criterion, allocation), set()).add(text)
    assert alone == {
        ("Magnitude", "Uniform"): eleven, ("Magnitude", "OWL"): eleven, ("Wanda", "OWL"): eleven,
        ("Wanda", "Uniform"): eleven | {0.525},
    }  # fmt: skip
    unet_alone = [cell[3] for cell in feasible if not cell[2]]
    assert unet_alone == [0.1, 0.2, 0.3, 0.35, 0.375, 0.4, 0.425, 0.45, 0.475, 0.5, 0.525, 0.55, 0.575, 0.6]
    joint = Counter((METHODS[cell[0], cell[1]], cell[2], cell[3]) for cell in feasible if cell[2] and cell[3])
    published = [row for row in PUBLISHED if row["table"] != "2" and row["text_sparsity"] != "0.0"]
    assert joint == Counter((row["text_method"], *sparsities(row)) for row in published)
    assert sum(joint.values()) == 40
    for row in (row for row in PUBLISHED if row["table"] == "2"):
        assert any(
            (METHODS[c[0], c[1]], c[2], c[3]) == (row["text_method"], *sparsities(row))
            for c in feasible
            if c[0] != "Wanda"
        )


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*study*.yaml")), ids=lambda path: path.stem)
def test_every_cell_parses(path, sdprune, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = Grid(path)
    for cell in grid.points[:: max(1, len(grid.points) // 3)]:
        told = sdprune(*grid.command(cell), "--print_config")
        assert told.code == 0, told.err
        config = yaml.safe_load(told.out)["model"]["init_args"]
        if "model.budget.total" in cell:
            assert config["budget"]["total"] == cell["model.budget.total"]
        if "model.prune" in cell:
            asked = yaml.safe_load(cell["model.prune"])
            assert {name: spec["sparsity"] for name, spec in config["prune"].items()} == {
                name: spec["sparsity"] for name, spec in asked.items()
            }
