"""The report: made from records that are written here by hand, so that every number in it is known."""

import base64
import csv
import io
import json
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from sdprune.runs.record import Record

CAPTIONS = ("a dog on a red bench", "two cats", "a man riding a horse", "a bowl of soup")
SIZES = {"text_encoder": 340_387_840, "unet": 865_910_724, "vae": 83_653_863}


def spec(sparsity, criterion="Magnitude", allocation="Uniform", granularity=None):
    return {
        "sparsity": sparsity, "band": None, "criterion": {"class": criterion, "options": {}},
        "allocation": {"class": allocation, "options": {}},
        "granularity": granularity or {"Magnitude": "layer", "Wanda": "row"}[criterion],
    }  # fmt: skip


def write(root: Path, prune, fid, clip, n=40, images=None, sizes=SIZES, seed=0, rows=None):
    """A record as `sdprune predict` leaves it, with the scores given."""
    name = "-".join(
        f"{c}-{s['criterion']['class']}-{s['allocation']['class']}-{s['sparsity']}" for c, s in prune.items()
    )
    run = root / f"{name or 'dense'}-{seed}"
    (run / "samples").mkdir(parents=True)
    facts = {
        "version": "0", "pipeline": {"model": "a/model"}, "dtype": "32-true", "data": {"n": n}, "seed": seed,
        "sampling": {"steps": 20, "guidance": 7.5}, "prune": prune,
    }  # fmt: skip
    zeros = {c: int(s["sparsity"] * sizes[c]) for c, s in prune.items()}
    whole = {"parameters": 1, "pruned": 0, "zeros": 0, "pruned_fraction": 0.0}
    share = sum(zeros.values()) / (sizes["text_encoder"] + sizes["unet"])
    difference = {} if not prune else {
        "dense": "dense-0", "fid_diff": fid - 18.07, "fid_diff_low": fid - 19.07, "fid_diff_high": fid - 17.07,
        "clip_score_diff": clip - 0.314, "clip_score_diff_low": clip - 0.316, "clip_score_diff_high": clip - 0.312,
    }  # fmt: skip
    results = {
        "label": run.name, "n": n, "metrics": {"fid": fid, "clip_score": clip}, "comparison": difference,
        "images": images or {"black": 0, "not_finite": 0, "invalid": []},
        "sparsity": {
            "nominal": share, "components": {c: {**whole, "parameters": size} for c, size in sizes.items()},
            **{w: {**whole, "zero_fraction": share} for w in ("targets", "prunable", "pipeline")},
        },
        "protocols": {"fid": {"protocol": STUDY}}, "scored": {"fid": {"class": "FID"}},
        "roles": {name: "text" if "text" in name else "denoiser" for name in sizes if name != "vae"},
        "samples": ["a dog", "a cat"],
    }  # fmt: skip
    finish(run, facts, results)
    noise = np.random.default_rng(0).normal(0, 0.01, n)
    angles = np.arccos(np.clip(clip + noise, -1, 1))
    texts = np.tile([1.0, 0.0], (n, 1))
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    np.savez(run / "rows.npz", **{"clip:x-0.texts": texts, "clip:x-0.features": features})
    for number in range(2):
        Image.new("RGB", (32, 32), (int(255 * share), 0, 99)).save(run / "samples" / f"{number}.png")
    with (run / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("id", "file_name", "caption"), *((i, f"{i}.jpg", CAPTIONS[i % 4]) for i in range(n))]
        )
    return run


def finish(run: Path, facts, results) -> None:
    """Write facts and results as a finished run has them, in a directory of any name."""
    record = Record(run.parent, run.name, facts)
    record.directory = run
    record.start()
    record.finish(results | {"fingerprint": record.fingerprint})


@pytest.fixture
def study(tmp_path):
    root = tmp_path / "runs"
    write(root, {}, 18.07, 0.314)
    for sparsity, fid, clip in ((0.3, 17.15, 0.313), (0.5, 18.06, 0.311), (0.6, 27.2, 0.268)):
        write(root, {"text_encoder": spec(sparsity)}, fid, clip)
        write(root, {"text_encoder": spec(sparsity, "Wanda")}, fid + 2, clip - 0.02)
    write(root, {"unet": spec(0.4)}, 25.0, 0.31)
    write(root, {"text_encoder": spec(0.475), "unet": spec(0.35)}, 18.5, 0.3105)
    write(root, {"text_encoder": spec(0.18), "unet": spec(0.21)}, 17.0, 0.317)
    write(root, {"text_encoder": spec(0.53), "unet": spec(0.07)}, 21.0, 0.307)
    return root


STUDY = "inception-2048/study"
CLAIM = "With 95 % confidence the loss in clip_score is at most 2 % at sparsity unet 42.5 % (n = 99)."


def table(out: Path, name: str) -> list[dict[str, str]]:
    with (out / "tables" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_tables_hold_the_scores_of_the_right_runs(study, sdprune):
    told = sdprune("report", study)
    assert (told.code, told.err) == (0, "")
    out = study / "report"
    six = {row["text"]: row for row in table(out, "table6")}
    row = six["47.5 %"]
    assert (row["image"], row["FID"], row["CLIP score"]) == ("35.0 %", "18.50", "0.310")
    assert row["FID - dense"] == "+0.430 [-0.570, +1.430]"
    assert (row["FID published"], row["FID - published"]) == ("18.15", "+0.35")
    assert (row["CLIP score published"], row["CLIP score - published"]) == ("0.311", "-0.001")
    assert six["62.5 %"]["FID"] == "missing"
    assert six["62.5 %"]["FID published"] == "264.87"
    assert six["0.0 %"]["FID"] == six["0.0 %"]["FID published"] == "18.07"
    three = {row["total"]: row for row in table(out, "table3")}
    assert (three["20%"]["25:75"], three["20%"]["75:25"], three["20%"]["50:50"]) == ("17.00", "21.00", "missing")
    assert [three[total]["75:25"] for total in ("40%", "50%", "60%")] == ["N/A"] * 3
    assert [row["text"] for row in table(out, "table1")][:3] == ["53%", "35%", "18%"]
    assert len(table(out, "table5")) == 11
    assert [row["FID"] for row in table(out, "table2")] == ["missing", "25.00"]
    assert len(table(out, "runs")) == 11


def test_drop_offs_and_findings_follow_from_the_scores(study, sdprune):
    assert sdprune("report", study).code == 0
    drops = {(row["component"], row["method"]): row for row in table(study / "report", "dropoffs")}
    # 0.311 - 0.314 - 0.002 is -1.6 % of 0.314; 0.313 loses 0.96 % at worst.
    assert [drops["text encoder", "magnitude"][share] for share in ("1 %", "2 %", "5 %")] == [
        "30.0 %",
        "50.0 %",
        "50.0 %",
    ]
    assert drops["text encoder", "wanda"]["2 %"] == "below all"
    claims = {row["the study says"]: row for row in table(study / "report", "findings")}
    better = claims["Text encoder: magnitude is better than Wanda"]
    assert (better["pairs"], better["for it"], better["against it"]) == ("3", "3", "0")
    assert float(better["mean difference"]) == pytest.approx(0.02, abs=0.001)
    assert claims["A total is better spent 25:75 than 75:25"]["for it"] == "1"
    assert claims["Text encoder: OWL improves Wanda"]["pairs"] == "0"


def test_the_report_leads_to_nothing_outside_itself_and_the_runs(study, sdprune):
    write(study, {"unet": spec(0.6)}, 300, 0.2, images={"black": 3, "not_finite": 2, "invalid": [1, 2, 3]})
    assert sdprune("report", study).code == 0
    out = study / "report"
    page = (out / "report.html").read_text()
    links = re.findall(r'(?:src|href)="(?!#)([^"]*)"', without_scripts(page))
    assert sorted(links) == sorted(f"figures/{path.name}" for path in (out / "figures").iterdir())
    assert len(links) >= 8
    runs = page_data(page)["groups"][0]["runs"]
    assert len(runs) == 12
    for run in runs:
        assert (out / run["link"] / "results.json").exists()
        assert all((out / address).exists() and (out / run["link"] / file).exists() for address, file in run["samples"])
    assert "3 images are wholly black, 2 came out of numbers that are not finite" in page
    markdown = (out / "report.md").read_text()
    for link in re.findall(r"\]\((figures/[^)]*)\)", markdown):
        assert (out / link).exists()
    curve = next((out / "figures").glob("figure_9*.svg")).read_text()
    assert "magnitude" in curve
    assert "Wanda" in curve
    strip = np.asarray(Image.open(next((out / "figures").glob("figure_11*.png"))))
    assert strip.shape[1] > strip.shape[0]  # dense, 40 %, 60 % across; two prompts down


def without_scripts(page: str) -> str:
    """The page's own elements."""
    return re.sub("<script.*?</script>", "", page, flags=re.DOTALL)


def page_data(page: str):
    """What the page's script reads."""
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1])


def test_a_single_file_holds_figures_and_sample_pictures_in_itself(study, sdprune):
    assert sdprune("report", study, "--single-file").code == 0
    page = (study / "report" / "report.html").read_text()
    assert not (study / "report" / "pictures").exists()
    assert not re.search(r'(src|href)="(?!data:|#)', without_scripts(page))
    runs = page_data(page)["groups"][0]["runs"]
    assert {address[:22] for run in runs for address, _ in run["samples"]} == {"data:image/webp;base64"}
    assert {run["link"] for run in runs} == {None}


def test_sample_pictures_of_a_single_file_shrink_until_all_have_room(study, sdprune, monkeypatch):
    noise = np.random.default_rng(0)
    paths = sorted(study.glob("*/samples/*.png"))
    for path in paths:
        pixels = noise.integers(0, 128, (300, 300, 3), np.uint8) + noise.integers(0, 127, 3, np.uint8)
        Image.fromarray(pixels).save(path)
    monkeypatch.setattr("sdprune.study.page.pictures.EMBEDDED", 4000 * len(paths))
    assert sdprune("report", study, "--single-file").code == 0
    runs = page_data((study / "report" / "report.html").read_text())["groups"][0]["runs"]
    for run in runs:
        for address, name in run["samples"]:
            content = base64.b64decode(address.partition(",")[2])
            assert len(content) <= 4000
            shown, drawn = Image.open(io.BytesIO(content)), Image.open(study / run["run"] / name)
            assert 32 <= shown.width < 300
            means = [np.asarray(one.convert("RGB"), float).mean((0, 1)) for one in (shown, drawn)]
            assert np.abs(means[0] - means[1]).max() < 4
    assert len([one for run in runs for one in run["samples"]]) == len(paths)


def test_pages_leave_out_what_of_the_study_was_not_run(study, sdprune):
    """Tables without a run are folded in the page and named in report.md; their CSV files have all cells."""
    assert sdprune("report", study).code == 0
    page, markdown = ((study / "report" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert not any(
        "missing" in row for row in re.findall(r"^\|.*", markdown.split("### Table 6")[1].split("###")[0], re.M)
    )
    folded = re.findall(r"<details><summary>(Table \d+)", page)
    assert folded == ["Table 7", "Table 8", "Table 9", "Table 10"]
    assert re.findall(r"<details open><summary>(Table \d+)", page) == [f"Table {n}" for n in range(1, 7)]
    assert re.findall(r"^### (Table \d+)", markdown, re.M) == [f"Table {n}" for n in range(1, 7)]
    assert re.findall(r"^- (Table \d+)", markdown, re.M) == folded
    assert {row["FID"] for row in table(study / "report", "table10")[1:]} == {"missing"}


def test_losses_are_counted_by_what_captions_name(tmp_path, sdprune):
    """COCO's captions have no grammar: words stand for categories, and those of one prompt in four are ten of forty."""
    write(tmp_path, {}, 18.0, 0.314)
    run = write(tmp_path, {"unet": spec(0.4)}, 20.0, 0.3)
    assert sdprune("report", tmp_path).code == 0
    rows = {(row["about"], row["value"]): row for row in table(tmp_path / "report", "categories")}
    named = {  # by the number of the caption in CAPTIONS
        ("object", "animal"): [0, 1, 2], ("object", "outdoor"): [0], ("object", "person"): [2],
        ("object", "kitchen"): [3],
        ("colour", "red"): [0], ("count", "two"): [1], ("relation", "on"): [0], ("relation", "riding"): [2],
        ("kinds of objects named", "1"): [1, 3], ("kinds of objects named", "2"): [0, 2],
    }  # fmt: skip
    assert rows.keys() == named.keys()
    scores = [np.load(one / "rows.npz")["clip:x-0.features"][:, 0] for one in (tmp_path / "dense-0", run)]
    for label, of in named.items():
        losses = [a - b for i, (a, b) in enumerate(zip(*scores, strict=True)) if i % 4 in of]
        mean = sum(losses) / len(losses)
        half = 1.96 * (sum((one - mean) ** 2 for one in losses) / (len(losses) - 1) / len(losses)) ** 0.5
        row = rows[label]
        assert int(row["n"]) == len(losses)
        assert [float(row[name]) for name in ("mean loss", "low", "high")] == pytest.approx(
            [mean, mean - half, mean + half], abs=1e-5
        )


def test_names_of_files_that_cannot_be(study, sdprune):
    """The page has no pictures of these captions, all else is there."""
    path = study / "dense-0" / "images.csv"
    path.write_text(path.read_text().replace("3.jpg", "\0.jpg").replace("5.jpg", "../" * 9 + "x" * 500 + ".jpg"))
    assert sdprune("report", study).code == 0
    runs = page_data((study / "report" / "report.html").read_text())["groups"][0]["runs"]
    assert all(run["prompts"] and run["sheet"] is None for run in runs)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_so_few_prompts_that_no_category_counts(tmp_path, sdprune, n):
    for prune, fid in (({}, 18.0), ({"unet": spec(0.4)}, 20.0)):
        write(tmp_path, prune, fid, 0.3, n=n)
    told = sdprune("report", tmp_path)
    assert (told.code, told.err) == (0, "")
    assert table(tmp_path / "report", "categories") == []
    (shown,) = page_data((tmp_path / "report" / "report.html").read_text())["groups"]
    assert shown["prompts"]["captions"] == list(CAPTIONS[:n])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (Path.unlink, "No such file or directory"),
        (lambda path: path.write_text("id,file_name,caption\n1,1.jpg,a\n"), "1 rows for 40 images"),
        (lambda path: path.write_bytes(b"\xff\x00"), "utf-8"),
        (lambda path: path.write_text(path.read_text().replace("two cats", "two dogs")), "other captions"),
    ],
)
def test_a_run_without_its_captions_is_shown_without_prompts(study, sdprune, how, words):
    run = next(study.glob("unet-*"))
    how(run / "images.csv")
    told = sdprune("report", study)
    assert told.code == 0
    assert told.err.startswith(f"sdprune: {run.name}: images.csv ")
    assert told.err.endswith("its prompts are not shown\n")
    assert words in told.err
    runs = page_data((study / "report" / "report.html").read_text())["groups"][0]["runs"]
    assert [one["run"] for one in runs if one["prompts"] is None] == [run.name]


def test_runs_are_ranked_by_what_they_surely_kept(study, sdprune):
    """0.314 less 2 % is 0.30772; each interval's lower end is 0.002 below."""
    assert sdprune("report", study).code == 0
    runs = page_data((study / "report" / "report.html").read_text())["groups"][0]["runs"]
    ranked = [run["name"] for run in sorted(runs, key=lambda run: run["rank"]) if run["rank"]]
    kept = [
        "text_encoder magnitude 47.5 % + unet magnitude 35 %",
        "unet magnitude 40 %",
        "text_encoder magnitude 18 % + unet magnitude 21 %",
        "text_encoder magnitude 50 %",
        "text_encoder magnitude 30 %",
    ]
    assert ranked[:5] == kept
    assert ranked[5] == "text_encoder magnitude 53 % + unet magnitude 7 %"  # 0.307
    assert ranked[-1] == "text_encoder wanda 60 %"  # 0.248
    assert [run["name"] for run in runs if run["rank"] == 0] == ["dense"]


def test_the_same_records_give_the_same_files(study, sdprune, tmp_path):
    contents = []
    for name in ("one", "two"):
        assert sdprune("report", study, f"--out={tmp_path / name}").code == 0
        contents.append(
            {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        )
    assert contents[0] == contents[1]


def test_unlike_runs_are_reported_apart(study, sdprune):
    write(study, {}, 30.0, 0.2, seed=1)
    told = sdprune("report", study)
    assert "12 runs in 2 comparable groups" in told.out
    assert table(study / "report", "2_table6")[0]["FID"] == "30.00"
    assert table(study / "report", "table6")[0]["FID"] == "18.07"


def test_titles_say_what_differs_between_groups(study, sdprune):
    """Draws of captions under one noise seed would have the same title otherwise; prompts have theirs in it."""
    for seed in (1, 2):
        for prune, fid in (({}, 30.0), ({"unet": spec(0.4)}, 31.0)):
            run = write(study / str(seed), prune, fid, 0.2)
            facts, results = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "results"))
            finish(run, facts | {"data": {"n": 40, "seed": seed}}, results)
    told = sdprune("report", study / "1", study / "2", f"--out={study / 'out'}")
    assert "4 runs in 2 comparable groups" in told.out
    groups = page_data((study / "out" / "report.html").read_text())["groups"]
    titles = [group["title"] for group in groups]
    assert titles == [
        f"data seed {seed}: a/model, 40 prompts, 20 steps, guidance 7.5, seed 0, {STUDY}" for seed in (1, 2)
    ]
    assert "## data seed 2: a/model" in (study / "out" / "report.md").read_text()
    assert sdprune("report", study / "1", f"--out={study / 'out'}").code == 0
    (alone,) = page_data((study / "out" / "report.html").read_text())["groups"]
    assert alone["title"].startswith("a/model, 40 prompts")


@pytest.mark.parametrize(("answer", "words"), [({"n": 99}, CLAIM), (None, "No pruned model could be certified.")])
def test_a_search_among_the_runs_is_named(study, sdprune, answer, words):
    """It is no run; the page shows its figure."""
    search = study / "search-unet-<b>"
    search.mkdir()
    (search / "search.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    finish(search, {}, {"search": {"answer": answer, "claims": ["With 95 % confidence another.", CLAIM]}})
    told = sdprune("report", study)
    assert (told.code, told.err) == (0, "")
    assert "11 runs in 1 comparable group" in told.out
    page = (study / "report" / "report.html").read_text()
    assert f"<summary>search-unet-&lt;b&gt;: {words}</summary>" in page
    (figure,) = re.findall(r'src="([^"]*search.svg)"', without_scripts(page))
    assert (study / "report" / unquote(figure)).resolve() == search / "search.svg"
    assert f"- search-unet-&lt;b&gt;: {words}".replace("_", r"\_") in (study / "report" / "report.md").read_text()
    assert sdprune("report", study, "--single-file").code == 0
    assert not re.search(r'(src|href)="(?!data:|#)', without_scripts((study / "report" / "report.html").read_text()))


def test_published_values_stand_beside_sd2_only_and_a_reference_beside_any(study, sdprune, tmp_path):
    root = tmp_path / "small"
    write(root, {}, 1.0, 0.9, sizes={"text_encoder": 10, "unet": 30, "vae": 5})
    (tmp_path / "theirs.csv").write_text(
        "run,text_method,unet_method,text_sparsity,unet_sparsity,fid,clip_score\n0,magnitude,magnitude,0.0,0.0,1.5,0.8\n"
    )
    assert sdprune("report", root, f"--reference={tmp_path / 'theirs.csv'}").code == 0
    row = table(root / "report", "table6")[0]
    assert not any("published" in name for name in row)
    assert (row["FID reference"], row["FID - reference"]) == ("1.50", "-0.50")


def test_bad_input_is_one_line(study, sdprune, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    cases = {
        ("report", tmp_path / "none"): "No directory",
        ("report", tmp_path / "empty"): "No finished run below",
        (
            "report",
            study,
            "--outt=x",
        ): "Unknown option of sdprune report '--outt'. Did you mean '--out'?",
        ("report", study, "--out"): "sdprune report: --out: expected one argument. See sdprune report --help.",
        ("report", study, "--out="): "--out: the path is empty",
        ("report", "--out=x"): "sdprune report: the following arguments are required: DIR. See sdprune report --help.",
        ("report", study, f"--reference={tmp_path / 'bad.csv'}"): "bad.csv is no file of results",
    }
    for arguments, words in cases.items():
        told = sdprune(*arguments)
        assert told.code == 2
        assert told.err.startswith("sdprune: error: ")
        assert told.err.count("\n") == 1
        assert words in told.err


def test_runs_that_are_no_cells_of_the_study_have_a_table(study, sdprune, tmp_path):
    """With what was pruned, how, and the scores with intervals; the flags take a space."""
    other = write(study, {"unet": spec(0.33, "Wanda")}, 21.5, 0.305)
    assert sdprune("report", study, "--out", tmp_path / "out").code == 0
    rows = {row["run"]: row for row in table(tmp_path / "out", "others")}
    row = rows[other.name]
    assert (row["text encoder"], row["image"], row["fid"]) == ("dense", "wanda 33.0 %", "21.500")
    assert row["fid - dense"] == "+3.430 [+2.430, +4.430]"
    assert row["clip_score - dense"] == "-0.009 [-0.011, -0.007]"
    assert len(rows) == 12 - 5  # dense, 40 % of the U-Net, one of both, two splits are cells of the tables
    assert not any("text_encoder" in name and "unet" in name for name in rows)
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert markdown.index("### Runs that are no cells of the study") < markdown.index("### Table")
    assert "tables/runs.csv" in markdown


def test_a_model_without_a_hub_id_has_its_name(study, sdprune, tmp_path):
    for number, (name, title) in enumerate({"miniature": "the miniature, ", "my-model": "my-model, "}.items()):
        root = tmp_path / str(number)
        run = write(root, {}, 1.0, 0.9)
        facts, results = (json.loads((run / f"{file}.json").read_text()) for file in ("config", "results"))
        finish(run, facts | {"pipeline": {"files": "0123"}}, results | {"model": name})
        assert sdprune("report", root).code == 0
        assert f"## {title}40 prompts" in (root / "report" / "report.md").read_text()
