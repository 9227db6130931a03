"""What is added to a finished run costs itself alone: scores, more images, other samples, another baseline."""

import csv
import json

import numpy as np
import pytest
from command_lines import CONFIGS, predict, runs, the_run
from diffusers import UNet2DConditionModel
from PIL import Image

DENSE = ["--model.prune.text_encoder.sparsity=0", "--model.prune.unet.sparsity=0"]
PRUNED = "text_encoder-magnitude-layer-0.475"


def results(run):
    return json.loads((run / "results.json").read_text())


def files(run):
    return {path.name: path.read_bytes() for path in sorted((run / "images").iterdir())}


@pytest.fixture
def calls(monkeypatch):
    """Items that the U-Net has seen with weights, call by call: a look at the model's sizes has none."""
    seen, forward = [], UNet2DConditionModel.forward

    def counting(self, sample, *args, **kwargs):
        if sample.device.type != "meta":
            seen.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counting)
    return seen


def with_metrics(arguments, config=CONFIGS / "metrics.yaml"):
    arguments[3:3] = ["--config", str(config)]
    return arguments


def test_a_metric_that_is_added_scores_the_pictures_that_lie_there(sdprune, tmp_path, calls):
    assert sdprune(*predict(tmp_path / "some")).code == 0
    before = {run.name: (files(run), results(run)) for run in runs(tmp_path / "some", "")}
    calls.clear()
    assert sdprune(*with_metrics(predict(tmp_path / "some"))).code == 0
    assert calls == []
    assert sdprune(*with_metrics(predict(tmp_path / "all"))).code == 0
    for run in runs(tmp_path / "all", ""):
        added, whole = results(tmp_path / "some" / run.name), results(run)
        assert files(tmp_path / "some" / run.name) == before[run.name][0]
        assert len(whole["metrics"]) > len(before[run.name][1]["metrics"])
        for part in ("metrics", "verdicts", "scored", "remarks", "images", "sparsity"):
            assert added[part] == whole[part], part
        assert added["comparison"] == whole["comparison"]
        assert added["speed"] == before[run.name][1]["speed"]  # of the drawing
        own, other = (dict(np.load(one / "rows.npz")) for one in (tmp_path / "some" / run.name, run))
        assert own.keys() == other.keys()
        assert [key for key in own if not np.array_equal(own[key], other[key])] == []


def test_a_metric_that_is_left_out_stays_in_the_record(sdprune, tmp_path, calls):
    assert sdprune(*with_metrics(predict(tmp_path, *DENSE))).code == 0
    before = results(the_run(tmp_path, "dense"))
    calls.clear()
    assert sdprune(*predict(tmp_path, *DENSE)).code == 0
    assert calls == []
    assert results(the_run(tmp_path, "dense")) == before


CLIP = "{class_path: ClipImageFeatures, init_args: {model: miniature}}"


def test_scores_of_single_images_stay_in_the_table(sdprune, tmp_path):
    def table():
        return list(csv.DictReader((the_run(tmp_path, "dense") / "images.csv").open(newline="")))

    assert sdprune(*predict(tmp_path, *DENSE)).code == 0
    before = table()
    mmd = f"[{{class_path: MaximumMeanDiscrepancy, init_args: {{extractor: {CLIP}}}}}]"
    assert sdprune(*predict(tmp_path, *DENSE, f"--model.metrics={mmd}")).code == 0
    assert "mmd" in results(the_run(tmp_path, "dense"))["metrics"]
    assert table() == before
    assert float(before[0]["clip_score"])


def test_rows_of_a_killed_scoring_are_not_taken_for_others(sdprune, tmp_path, monkeypatch):
    """They are written before the results, by code that is another one here."""
    from sdprune.metrics import CLIPScore
    from sdprune.metrics.rows import Column
    from sdprune.runs.record import Record

    assert sdprune(*predict(tmp_path, *DENSE)).code == 0
    run = the_run(tmp_path, "dense")
    wanted, rows = results(run), dict(np.load(run / "rows.npz"))

    def die(record, values):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        made = CLIPScore.columns.fget

        def columns(score):
            return tuple(
                Column(one.key, lambda batch, one=one: 0 * one.values(batch), one.prepare, one.facts)
                for one in made(score)
            )

        patch.setattr(CLIPScore, "columns", property(columns))
        patch.setattr("sdprune.runs.scoring.package_code", lambda *folders: "another")
        patch.setattr(Record, "finish", die)
        assert sdprune(*predict(tmp_path, *DENSE)).code == 1
    assert any(not np.array_equal(value, rows[key]) for key, value in np.load(run / "rows.npz").items())
    assert sdprune(*predict(tmp_path, *DENSE)).code == 0
    assert results(run) == wanted
    assert all(np.array_equal(value, rows[key]) for key, value in np.load(run / "rows.npz").items())


def test_differences_of_other_metrics_stay_and_those_of_a_new_baseline_do_not(sdprune, tmp_path, calls):
    assert sdprune(*with_metrics(predict(tmp_path))).code == 0
    run = the_run(tmp_path, PRUNED)
    whole = results(run)
    assert {"kid_diff", "fid_diff"} <= whole["comparison"].keys()
    assert sdprune(*predict(tmp_path)).code == 0
    assert results(run) == whole
    assert sdprune(*predict(tmp_path, *DENSE, "--model.seed=0", f"--model.output={tmp_path / 'other'}")).code == 0
    other = the_run(tmp_path / "other", "dense")
    other = other.rename(other.with_name("another-0"))
    assert sdprune(*predict(tmp_path, f"--model.baseline={other}")).code == 0
    found = results(run)["comparison"]
    assert found["dense"] == "another-0"
    assert "fid_diff" in found
    assert "kid_diff" not in found


def test_a_metric_that_one_run_alone_has_moves_no_run_to_another_group(sdprune, tmp_path):
    assert sdprune(*predict(tmp_path)).code == 0
    assert sdprune(*with_metrics(predict(tmp_path, *DENSE))).code == 0
    told = sdprune("report", tmp_path, f"--out={tmp_path / 'report'}")
    assert "2 runs in 1 comparable group" in told.out


def test_more_images_draw_the_difference(sdprune, tmp_path, calls):
    """The draw of a smaller n is no prefix of a larger one's: pictures are found by their ids."""
    one = ["--data.batch_size=1", *DENSE]
    assert sdprune(*predict(tmp_path / "more", *one)).code == 0
    (small,) = runs(tmp_path / "more", "dense")
    calls.clear()
    assert sdprune(*predict(tmp_path / "more", *one, "--data.n=11")).code == 0
    (large,) = set(runs(tmp_path / "more", "dense")) - {small}
    common = files(small).keys() & files(large).keys()
    assert common
    samples = 2 * 2  # calls of two steps; guidance doubles the two sample prompts
    assert sum(calls) == 2 * 2 * (11 - len(common)) + samples * 2
    assert results(large)["speed"]["generated"] == 11 - len(common)
    assert sdprune(*predict(tmp_path / "anew", *one, "--data.n=11")).code == 0
    anew = the_run(tmp_path / "anew", "dense")
    assert anew.name == large.name
    assert files(large) == files(anew)
    assert results(large)["metrics"] == results(anew)["metrics"]


def test_pictures_of_another_model_are_not_taken_over(sdprune, tmp_path):
    assert sdprune(*predict(tmp_path, *DENSE, "--model.sampling.guidance=1")).code == 0
    assert sdprune(*predict(tmp_path, *DENSE)).code == 0
    one, two = runs(tmp_path, "dense")
    assert files(one).keys() == files(two).keys()
    assert files(one) != files(two)


def test_other_samples_draw_only_these(sdprune, tmp_path, calls):
    assert sdprune(*predict(tmp_path, *DENSE)).code == 0
    run = the_run(tmp_path, "dense")
    before, grid = results(run), (run / "grid.png").read_bytes()
    calls.clear()
    assert sdprune(*predict(tmp_path, *DENSE, "--model.samples=[a green cross]")).code == 0
    assert calls == [2, 2]
    after = results(run)
    assert after["samples"] == ["a green cross"]
    assert (run / "grid.png").read_bytes() != grid
    assert {**after, "samples": 0, "digest": 0} == {**before, "samples": 0, "digest": 0}


# --- baselines ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(sdprune, tmp_path):
    """The miniature, its U-Net pruned, as a diffusers directory."""
    from command_lines import fit

    options = ["--model.prune.text_encoder.sparsity=0", f"--model.directory={tmp_path / 'saved'}"]
    assert sdprune(*fit("prune", tmp_path / "fit", *options)).code == 0
    return tmp_path / "saved"


NOTHING = "--model.prune={}"


def test_a_saved_model_is_judged_against_its_original(sdprune, tmp_path, saved):
    """By one command; its zeros are counted, and the numbers are those of pruning in memory."""
    memory = predict(tmp_path / "memory", "--model.prune.text_encoder.sparsity=0")
    assert sdprune(*memory).code == 0
    wanted = results(the_run(tmp_path / "memory", "unet"))
    command = predict(tmp_path / "out", f"--model.pipeline.model={saved}", NOTHING, "--model.baseline=miniature")
    told = sdprune(*command)
    assert (told.code, told.err) == (0, "")
    found = results(the_run(tmp_path / "out", "saved"))
    assert found["metrics"] == wanted["metrics"]
    assert {key: value for key, value in found["comparison"].items() if key != "dense"} == {
        key: value for key, value in wanted["comparison"].items() if key != "dense"
    }
    assert found["sparsity"]["pipeline"]["zeros"] == wanted["sparsity"]["pipeline"]["zeros"] > 1000
    assert found["sparsity"]["pipeline"]["pruned"] == 0
    assert f"{found['sparsity']['components']['unet']['zero_fraction']:.2%}" in told.out


def test_a_finished_run_is_a_baseline(sdprune, tmp_path, calls):
    assert sdprune(*predict(tmp_path, *DENSE)).code == 0
    dense = the_run(tmp_path, "dense")
    assert sdprune(*predict(tmp_path / "other", f"--model.baseline={dense}")).code == 0
    assert not runs(tmp_path / "other", "dense")
    assert sdprune(*predict(tmp_path)).code == 0
    own, usual = (results(the_run(output, PRUNED)) for output in (tmp_path / "other", tmp_path))
    assert own["comparison"] == usual["comparison"]
    told = sdprune(*predict(tmp_path / "other", f"--model.baseline={dense}", "--model.seed=1"))
    assert told.code == 2
    assert "cannot be compared: seed is 1 in one and 0 in the other" in told.err


# --- a record a person can read -------------------------------------------------------------------------------


def test_a_record_has_captions_scores_and_a_configuration_that_reruns_it(sdprune, tmp_path):
    assert sdprune(*predict(tmp_path)).code == 0
    for run in runs(tmp_path, ""):
        rows = list(csv.DictReader((run / "images.csv").open(newline="")))
        ids = np.load(run / "rows.npz")["ids"].tolist()
        assert [int(row["id"]) for row in rows] == ids
        assert all(row["caption"] and row["file_name"] for row in rows)
        mean = sum(float(row["clip_score"]) for row in rows) / len(rows)
        assert mean == pytest.approx(results(run)["metrics"]["clip_score"], abs=1e-5)
        assert results(run)["model"] == "miniature"
        stamp = (run / "results.json").stat().st_mtime_ns
        told = sdprune("predict", "--config", run / "config.yaml")
        assert (told.code, told.err) == (0, "")
        assert "finished already" in told.out
        assert (run / "results.json").stat().st_mtime_ns == stamp
    pruned, dense = the_run(tmp_path, PRUNED), the_run(tmp_path, "dense")
    row = next(csv.DictReader((pruned / "images.csv").open(newline="")))
    name = f"{int(row['id']):012d}.png"
    a, b = (np.array(Image.open(one / "images" / name)).astype(float) for one in (pruned, dense))
    assert float(row["dense_mse"]) == pytest.approx(((a - b) ** 2).mean(), rel=1e-4)
