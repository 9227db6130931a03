"""The main job, from captions to a record, on an untrained miniature."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_lines import CONFIGS, predict, process, runs, the_run
from PIL import Image
from safetensors.torch import load_file

WANDA = ["--model.prune.unet.criterion=Wanda", "--model.prune.text_encoder.criterion=Wanda"]
DENSE = ["--model.prune.unet.sparsity=0", "--model.prune.text_encoder.sparsity=0"]


@pytest.fixture(scope="module")
def output(miniature, tmp_path_factory):
    """The main job's output, which no test changes."""
    from sdprune.__main__ import main

    directory = tmp_path_factory.mktemp("predict")
    assert main(predict(directory)) == 0
    return directory


def results(run):
    return json.loads((run / "results.json").read_text())


def pictures(run):
    return {path.name: path.read_bytes() for path in sorted((run / "images").iterdir())}


def fingerprints(output, *options):
    """Of the run directory that these options lead to; nothing is drawn."""
    from lightning import Trainer

    from sdprune.__main__ import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "predict", lambda *args, **kwargs: pytest.skip.Exception("drawn"))
        patch.setattr("sdprune.cli.SdpruneCLI.after_predict", lambda self: None)
        assert main(predict(output, *options)) == 0
    return {run.name.rpartition("-")[2] for run in output.iterdir() if (run / "config.json").exists()}


def test_files_of_a_record(output):
    dense, pruned = (
        the_run(output, "dense"),
        the_run(output, "text_encoder-magnitude-layer-0.475-unet-magnitude-layer-0.35"),
    )
    for run in (dense, pruned):
        assert {path.name for path in run.iterdir()} == {
            "config.json", "config.yaml", "grid.png", "images", "images.csv", "results.json", "rows.npz", "samples"
        }  # fmt: skip
        assert len(pictures(run)) == 7
        assert all(Image.open(path).size == (64, 64) for path in (run / "images").iterdir())
        assert [path.name for path in sorted((run / "samples").iterdir())] == ["0.png", "1.png"]
        config = json.loads((run / "config.json").read_text())
        assert (config["data"]["n"], config["sampling"]["steps"], config["seed"]) == (7, 2, 0)
    assert pictures(dense).keys() == pictures(pruned).keys()
    assert all(pictures(dense)[name] != content for name, content in pictures(pruned).items())


def test_results(output):
    from importlib.metadata import version

    dense, pruned = (results(the_run(output, name)) for name in ("dense", "text_encoder"))
    for found in (dense, pruned):
        assert {"fid", "clip_score", "clip_score_se", "clip_gap"} <= set(found["metrics"])
        assert all(np.isfinite(value) for value in found["metrics"].values())
        assert (found["n"], found["speed"]["generated"], found["speed"]["processes"]) == (7, 7, 1)
        assert found["speed"]["images_per_second"] > 0
        assert 2**26 < found["speed"]["peak_memory_bytes"] < 2**36
        assert found["versions"]["torch"] == version("torch")
        assert found["versions"]["sdprune"] == version("sdprune")
    assert (dense["comparison"], dense["pruning"]) == ({}, {})
    against = pruned["comparison"]
    assert against["dense"] == the_run(output, "dense").name
    for name in ("fid", "clip_score"):
        assert against[f"{name}_diff"] == pytest.approx(pruned["metrics"][name] - dense["metrics"][name], abs=1e-6)
        assert against[f"{name}_diff_low"] <= against[f"{name}_diff"] <= against[f"{name}_diff_high"]


def naive(weights, sparsity):
    """Linear weights of a state dict, how many of them pruning takes, and the zeros of everything afterwards."""
    targets = pruned = zeros = 0
    for name, weight in weights.items():
        linear = weight.ndim == 2 and "embedding" not in name.replace("time_embedding", "")
        count = int(np.floor(weight.numel() * sparsity + 0.5)) if linear else 0
        targets += weight.numel() if linear else 0
        pruned += count
        zeros += max(count, int((weight == 0).sum()))
    return targets, pruned, zeros


def test_sparsities_are_counts_of_zeros(output, miniature):
    found = results(the_run(output, "text_encoder"))["sparsity"]
    asked = {"text_encoder": 0.475, "unet": 0.35, "vae": 0.0}
    counts = {}
    for name, sparsity in asked.items():
        (file,) = (miniature / "pipeline" / name).glob("*.safetensors")
        weights = load_file(file)
        size = sum(weight.numel() for weight in weights.values())
        targets, pruned, zeros = naive(weights, sparsity)
        pruned = pruned if sparsity else 0
        counts[name] = (targets if sparsity else 0, pruned, zeros, size)
        whole = found["components"][name]
        assert (whole["parameters"], whole["pruned"], whole["zeros"]) == (size, pruned, zeros), name
        assert whole["pruned_fraction"] == pruned / size
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    assert (found["targets"]["parameters"], found["targets"]["pruned"]) == (total[0], total[1])
    assert (found["pipeline"]["parameters"], found["pipeline"]["zeros"]) == (total[3], total[2])
    sizes = {name: counts[name][3] for name in ("text_encoder", "unet")}
    nominal = sum(asked[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert found["nominal"] == pytest.approx(nominal, rel=1e-12)


def test_metrics_saw_the_pixels_of_the_files(output, miniature):
    from sdprune.metrics import CLIPScore, ImageBatch, ImageScores
    from sdprune.mini.world import scenes

    run = the_run(output, "text_encoder")
    captions = [scene.captions[0] for scene in scenes("val", 40)]
    ids = np.load(run / "rows.npz")["ids"].tolist()
    assert len(set(ids)) == 7
    metric = ImageScores([CLIPScore("miniature")])
    metric.prepare("cpu")
    for position, image_id in enumerate(ids):
        pixels = np.array(Image.open(run / "images" / f"{image_id:012d}.png"))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        metric.update(ImageBatch(image, [captions[image_id - 1]], [position]))
    found = results(run)["metrics"]
    assert metric.compute()["clip_score"] == pytest.approx(found["clip_score"], abs=1e-6)


def test_the_same_command_again_draws_nothing(output, sdprune, monkeypatch):
    from sdprune.pipelines import StableDiffusion

    files = [path for path in output.rglob("*") if path.is_file() and "logs" not in path.parts]
    before = {path: path.stat().st_mtime_ns for path in files}
    monkeypatch.setattr(StableDiffusion, "load", lambda *args: pytest.fail("loaded"))
    told = sdprune(*predict(output))
    assert (told.code, told.err) == (0, "")
    assert "clip_score" in told.out
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_resume(output, sdprune, tmp_path):
    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    run = the_run(tmp_path, "text_encoder")
    whole, before, rows = pictures(run), results(run), dict(np.load(run / "rows.npz"))
    (run / "results.json").unlink()
    (run / "rows.npz").unlink()
    ids = rows["ids"].tolist()
    for image_id in (ids[1], ids[6]):  # one of the first batch, the only one of the last
        (run / "images" / f"{image_id:012d}.png").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (run / "images").iterdir()}
    (run / "images" / ".000000000005.png.x1y2").write_bytes(b"half")  # a kill while it was written
    told = sdprune(*predict(tmp_path))
    assert (told.code, told.err) == (0, "")
    after = results(run)
    assert pictures(run) == whole
    assert after["metrics"] == before["metrics"]
    assert after["comparison"] == before["comparison"]
    assert after["sparsity"] == before["sparsity"]
    assert all(np.array_equal(value, rows[name]) for name, value in np.load(run / "rows.npz").items())
    assert after["speed"]["generated"] == 2
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert results(the_run(tmp_path, "dense"))["speed"]["generated"] == 7


def test_pruning_nothing_is_dense(output, sdprune, tmp_path):
    assert sdprune(*predict(tmp_path, *DENSE)).code == 0
    here, there = the_run(tmp_path, "dense"), the_run(output, "dense")
    assert here.name == there.name
    assert len(runs(tmp_path, "")) == 1
    assert pictures(here) == pictures(there)
    assert results(here)["metrics"] == results(there)["metrics"]


@pytest.mark.parametrize(("processes", "options"), [(2, []), (2, WANDA), (3, [])], ids=["2", "2-wanda", "3"])
def test_several_processes(output, sdprune, tmp_path, processes, options):
    one, two = tmp_path / "one", tmp_path / "two"
    if options:
        assert sdprune(*predict(one, *options)).code == 0
    else:
        one = output
    done = process(predict(two, f"--trainer.devices={processes}", *options))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
    assert "error" not in done.stdout
    for prefix in ("dense", "text_encoder"):
        here, there = the_run(one, prefix), the_run(two, prefix)
        assert here.name == there.name
        assert pictures(here) == pictures(there)
        rows, others = np.load(here / "rows.npz"), np.load(there / "rows.npz")
        assert set(rows) == set(others)
        assert all(rows[name].tobytes() == others[name].tobytes() for name in rows)
        own, other = results(here), results(there)
        assert all(own[key] == other[key] for key in ("metrics", "comparison", "sparsity", "pruning", "n"))
        assert (own["speed"]["processes"], other["speed"]["processes"]) == (1, processes)
        assert other["speed"]["generated"] == 7
    if options:
        (here,), (there,) = ((path / "statistics").glob("unet-*/*.safetensors") for path in (one, two))
        assert here.read_bytes() == there.read_bytes()


def test_two_nodes_by_torchrun(output, tmp_path):
    """Two launchers of one process each, which find each other over the network as on a cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scripts = Path(sys.executable).parent
    arguments = predict(tmp_path, "--trainer.num_nodes=2", "--trainer.devices=1")
    launch = [scripts / "torchrun", "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    launch += [f"--master-port={port}", "--no-python"]
    nodes = [
        subprocess.Popen(
            [*launch[:3], f"--node-rank={rank}", *launch[3:], scripts / "sdprune", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    for prefix in ("dense", "text_encoder"):
        here, there = the_run(output, prefix), the_run(tmp_path, prefix)
        assert pictures(here) == pictures(there)
        assert results(here)["metrics"] == results(there)["metrics"]
        assert results(there)["speed"]["processes"] == 2


def test_every_metric_from_one_pass(miniature, sdprune, tmp_path, monkeypatch):
    """All metrics of the overlay, with their intervals; the network sees each generated and each real image once."""
    from sdprune.metrics import ClipImageFeatures

    seen = []
    genuine = ClipImageFeatures.extract
    monkeypatch.setattr(
        ClipImageFeatures, "extract", lambda self, pixels: seen.append(len(pixels)) or genuine(self, pixels)
    )
    arguments = predict(tmp_path)
    arguments[3:3] = ["--config", str(CONFIGS / "metrics.yaml")]
    assert sdprune(*arguments).code == 0
    assert sum(seen) == 3 * 7  # real, dense, pruned
    run = the_run(tmp_path, "text_encoder")
    found = results(run)
    names = {"fid", "fid_infinity", "kid", "mmd", "precision", "recall", "clip_score"}
    assert names <= set(found["metrics"])
    against = found["comparison"]
    for name in ("fid", "kid", "mmd", "precision", "clip_score"):
        assert against[f"{name}_diff_low"] <= against[f"{name}_diff"] <= against[f"{name}_diff_high"]
    assert {"dense_psnr", "dense_ssim", "dense_feature_distance"} <= set(against)
    assert {"fid", "clip_score"} == set(found["verdicts"])
    assert found["protocols"]["kid"]["reference"]["n"] == found["protocols"]["kid"]["n"] == 7
    assert len(found["protocols"]["fid"]["reference"]["hash"]) == 12
    features = [key for key in np.load(run / "rows.npz") if key.endswith(".features")]
    assert len(features) == 1  # kept once
    dense = results(the_run(tmp_path, "dense"))
    for name in names:
        assert found["metrics"][name] == pytest.approx(dense["metrics"][name] + against[f"{name}_diff"], abs=1e-5)


def test_without_a_dense_model_distances_to_it_are_left_out(miniature, sdprune, tmp_path):
    assert sdprune(*predict(tmp_path, "--model.compare_dense=false")).code == 0
    assert runs(tmp_path, "dense") == []
    run = the_run(tmp_path, "text_encoder")
    assert set(results(run)["protocols"]) == {"fid", "clip_score"}
    assert results(run)["comparison"] == {}


def test_a_finished_run_is_compared_anew_when_asked_otherwise(miniature, sdprune, tmp_path, monkeypatch):
    """Without drawing or running a network: from the rows that were kept."""
    from sdprune.metrics import ClipImageFeatures
    from sdprune.pipelines import StableDiffusion

    metrics = [
        {"class_path": "CLIPScore", "init_args": {"model": "miniature", "tolerance": 0.002}},
        {"class_path": "FrechetInceptionDistance", "init_args": {"extractor": {
            "class_path": "ClipImageFeatures", "init_args": {"model": "miniature"}}}},
    ]  # fmt: skip
    (tmp_path / "own.yaml").write_text(json.dumps({"model": {"init_args": {"metrics": metrics}}}))
    arguments = predict(tmp_path / "out")
    arguments[3:3] = ["--config", str(tmp_path / "own.yaml")]
    assert sdprune(*arguments, "--model.compare_dense=false").code == 0
    run = the_run(tmp_path / "out", "text_encoder")
    alone = results(run)
    assert (alone["comparison"], alone["verdicts"]) == ({}, {})
    assert sdprune(*arguments[:-1], arguments[-1], *DENSE).code == 0
    monkeypatch.setattr(StableDiffusion, "load", lambda *args: pytest.fail("loaded"))
    monkeypatch.setattr(ClipImageFeatures, "extract", lambda *args: pytest.fail("run"))
    assert sdprune(*arguments).code == 0
    compared = results(run)
    assert compared["metrics"] == alone["metrics"]
    assert {"fid_diff", "clip_score_diff"} <= set(compared["comparison"])
    metrics[0]["init_args"]["tolerance"] = 0.99
    (tmp_path / "own.yaml").write_text(json.dumps({"model": {"init_args": {"metrics": metrics}}}))
    assert sdprune(*arguments).code == 0
    low, high = (compared["comparison"][f"clip_score_diff_{end}"] for end in ("low", "high"))
    # Of an untrained model it may be any of the three.
    allowed = -0.99 * abs(compared["metrics"]["clip_score"] - compared["comparison"]["clip_score_diff"])
    wanted = "within" if low >= allowed else "beyond" if high < allowed else "undecided"
    assert results(run)["verdicts"]["clip_score"] == {"tolerance": 0.99, "verdict": wanted}
    assert results(run)["comparison"] == compared["comparison"]


def test_fid_at_infinity_below_0_is_told_and_recorded(miniature, sdprune, tmp_path, monkeypatch):
    from sdprune.metrics import FrechetDistanceAtInfinity

    monkeypatch.setattr(FrechetDistanceAtInfinity, "_at_infinity", lambda self, rows, reference: -0.25)
    arguments = predict(tmp_path, *DENSE)
    arguments[3:3] = ["--config", str(CONFIGS / "metrics.yaml")]
    told = sdprune(*arguments)
    assert told.code == 0
    ((remark,),) = results(the_run(tmp_path, "dense"))["remarks"].values()
    assert remark.startswith("fid_infinity is -0.2500, and no distance is below 0")
    assert remark in " ".join(told.out.split())


@pytest.mark.parametrize("n", [1, 3])
def test_too_few_images_for_a_metric_are_told_before_drawing(miniature, sdprune, tmp_path, n):
    arguments = predict(tmp_path, f"--data.n={n}")
    arguments[3:3] = ["--config", str(CONFIGS / "metrics.yaml")]
    told = sdprune(*arguments)
    assert told.code == 2
    assert re.search(rf"needs at least \d images, and n is {n}: leave it out", told.err)
    assert not list(tmp_path.glob("*/images/*.png"))


def test_records_of_other_protocols_or_prompts_are_not_compared(output):
    from sdprune.errors import InputError
    from sdprune.runs.comparison import require_comparable
    from sdprune.runs.record import Record

    def record(name, facts=None, scored=None):
        found = Record.at(the_run(output, name))
        kept = {**found.results["scored"], **(scored or {})}
        return SimpleNamespace(facts={**found.facts, **(facts or {})}, results={**found.results, "scored": kept})

    dense = record("dense")
    data = dense.facts["data"]
    require_comparable(record("text_encoder"), dense)
    with pytest.raises(InputError, match=r"cannot be compared: data\.n is 8 in one and 7 in the other"):
        require_comparable(record("text_encoder", {"data": data | {"n": 8}}), dense)
    fid = json.loads(json.dumps(dense.results["scored"]["fid"]))
    fid["extractor"]["name"] = "inception-2048/study"
    with pytest.raises(InputError, match=r"fid\.extractor\.name is 'inception-2048/study' in one and None in the"):
        require_comparable(record("text_encoder", scored={"fid": fid}), dense, scores=["fid"])
    with pytest.raises(InputError, match="seed is 1 in one and 0 in the other"):
        require_comparable(record("text_encoder", {"seed": 1}), dense)
    with pytest.raises(InputError, match="pipeline"):
        require_comparable(record("text_encoder", {"pipeline": {"files": "others"}}), dense)
    require_comparable(record("text_encoder", {"pipeline": {"files": "others"}}), dense, same_model=False)


def test_wanda_differs_from_magnitude_and_gathers_once(output, sdprune, tmp_path, monkeypatch):
    from sdprune.calibration.collect import Collector

    assert sdprune(*predict(tmp_path, *WANDA)).code == 0
    wanda = the_run(tmp_path, "text_encoder-wanda")
    magnitude = the_run(output, "text_encoder-magnitude")
    assert results(wanda)["sparsity"] == results(magnitude)["sparsity"]
    assert results(wanda)["pruning"]["unet"]["mask_hash"] != results(magnitude)["pruning"]["unet"]["mask_hash"]
    assert pictures(the_run(tmp_path, "dense")) == pictures(the_run(output, "dense"))
    assert pictures(wanda) != pictures(magnitude)
    monkeypatch.setattr(Collector, "_visit", lambda *args: pytest.fail("gathered again"))
    assert sdprune(*predict(tmp_path, *WANDA, "--model.prune.unet.sparsity=0.4")).code == 0


@pytest.mark.parametrize(
    "option",
    [
        "--model.seed=1", "--data.seed=1", "--data.n=6", "--data.batch_size=3", "--model.sampling.steps=3",
        "--model.sampling.guidance=2", "--model.prune.unet.sparsity=0.36", "--model.prune.unet.granularity=row",
        "--model.prune.unet.criterion=Wanda", "--trainer.precision=bf16-true", "--data.reference=split",
        "--data.source.seed=1",
    ],
)  # fmt: skip
def test_what_counts_changes_the_fingerprint(output, tmp_path, option):
    pruned = the_run(output, "text_encoder").name.rpartition("-")[2]
    assert pruned in fingerprints(tmp_path / "same")
    assert pruned not in fingerprints(tmp_path / "other", option)


def test_where_and_how_fast_does_not(output, tmp_path):
    pruned = the_run(output, "text_encoder").name.rpartition("-")[2]
    options = ["--data.workers=1", f"--model.store={tmp_path}/elsewhere", "--data.calibration_n=3"]
    options += ["--seed_everything=3", "--model.prune.unet.block_width=64", "--trainer.num_nodes=1"]
    assert pruned in fingerprints(tmp_path / "same", *options)


def test_noise_belongs_to_the_image(output, miniature, tmp_path):
    """An image is the same whatever the draw it is in, so long as the batch size is."""
    from sdprune.__main__ import main

    other = ["--data.n=11", "--data.seed=3", *DENSE]
    assert main(predict(tmp_path, *other)) == 0
    first, second = pictures(the_run(output, "dense")), pictures(the_run(tmp_path, "dense"))
    common = first.keys() & second.keys()
    assert common
    assert list(first) != list(second)
    assert all(first[name] == second[name] for name in common)
    assert len(set(second.values())) == 11


def test_statistics_of_real_images_from_a_file(output, sdprune, tmp_path):
    (file,) = (output / "reference").glob("fid-*.npz")
    assert sdprune(*predict(tmp_path, f"--data.reference={file}", *DENSE)).code == 0
    found = results(the_run(tmp_path, "dense"))
    assert found["metrics"] == results(the_run(output, "dense"))["metrics"]
    assert not list((tmp_path / "reference").iterdir())


def test_statistics_of_another_extractor_are_told_before_drawing(sdprune, tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    told = sdprune(*predict(tmp_path, f"--data.reference={tmp_path}/other.npz"))
    assert told.code == 2
    assert "5 features" in told.err
    assert not list(tmp_path.glob("*/images/*"))
