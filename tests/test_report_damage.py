"""The report against records alike in part, of others' text, or damaged: each is told apart, shown or named."""

import copy
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from test_report import finish, spec, table, write

PLAIN = {
    "block_width": None, "layers": ["Linear"], "include": ["*"], "exclude": [], "order": "one_pass", "timesteps": None,
    "blocks": "module", "mode": "exact",
}  # fmt: skip


def pruned(sparsity: float, *arguments: str, **choices: object) -> dict:
    return spec(sparsity, *arguments) | PLAIN | choices


def one(root: Path, prune: dict, fid: float, clip: float = 0.3, calibration=(), **options) -> Path:
    """A record in a directory of its own, with calibration facts."""
    number = len(list(root.glob("*")))
    run = write(root / str(number), prune, fid, clip, **options)
    change(run, "config.json", lambda facts: facts.update(calibration=list(calibration)))
    return run


def change(run: Path, name: str, how) -> None:
    """Make another finished run of it."""
    parts = {file: json.loads((run / file).read_text()) for file in ("config.json", "results.json")}
    how(parts[name])
    finish(run, *parts.values())


def damage(run: Path, name: str, how) -> None:
    """Change a file of a finished run."""
    values = json.loads((run / name).read_text())
    how(values)
    (run / name).write_text(json.dumps(values))


OWL = {"class": "OWL", "options": {"m": 5.0, "lambda_": 0.08}}
NEED = {"component": "unet", "statistic": "input_norm", "prompts": {"n": 128, "draw": "first"}}
DIFFERENT = {
    "mode": ({"mode": "original"}, [], "mode original"),
    "order": ({"order": "sequential"}, [], "order sequential"),
    "timesteps": ({"timesteps": "log_decrease"}, [], "timesteps log_decrease"),
    "layers": ({"layers": ["Conv2d", "Linear"]}, [], "layers Conv2d+Linear"),
    "include": ({"include": ["*attn*"]}, [], "include *attn*"),
    "option": ({"allocation": OWL | {"options": {"m": 7.0, "lambda_": 0.08}}}, [], "allocation m 7.0"),
    "calibration": ({}, [NEED | {"prompts": {"n": 64, "draw": "first"}}], "calibration n 64"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_runs_that_differ_in_one_choice_are_two_runs(sdprune, tmp_path, name):
    """Each has a row, a line and a drop-off of its own, under a name that says what differs, and only that."""
    choices, calibration, words = DIFFERENT[name]
    root = tmp_path / "runs"
    base = {"allocation": OWL}
    one(root, {}, 18.0, 0.314)
    one(root, {"unet": pruned(0.4, "Wanda", **base)}, 25.0, 0.31, [NEED])
    one(root, {"unet": pruned(0.4, "Wanda", **base | choices)}, 26.0, 0.25, calibration or [NEED])
    told = sdprune("report", root, f"--out={tmp_path / 'out'}")
    assert told.code == 0
    rows = {row["image method"]: row for row in table(tmp_path / "out", "runs") if row["image method"]}
    assert sorted(row["fid"] for row in rows.values()) == ["25", "26"]
    (other,) = (method for method in rows if words in method)
    assert rows[other]["fid"] == "26"
    assert other == f"owl_wanda, {words}"
    assert [row["method"] for row in table(tmp_path / "out", "dropoffs")] == sorted(rows)
    curve = next((tmp_path / "out" / "figures").glob("figure_10*.svg")).read_text()
    assert words in curve


def test_choices_that_do_not_vary_are_not_shown(sdprune, tmp_path):
    root = tmp_path / "runs"
    one(root, {}, 18.0)
    for sparsity in (0.3, 0.4):
        one(root, {"unet": pruned(sparsity, order="sequential", mode="original")}, 20.0)
    assert sdprune("report", root).code == 0
    assert {row["image method"] for row in table(root / "report", "runs")} == {"", "magnitude"}
    assert "choices" not in table(root / "report", "table2")[0]


def test_a_cell_with_several_runs_shows_the_published_count_or_says_how_many(sdprune, tmp_path):
    root = tmp_path / "runs"
    pair = {"text_encoder": pruned(0.475, mode="original"), "unet": pruned(0.35, mode="original")}
    exact = {"text_encoder": pruned(0.475), "unet": pruned(0.35)}
    one(root, {}, 18.0)
    one(root, pair, 19.0)
    one(root, exact, 20.0)
    told = sdprune("report", root)
    assert "2 runs have the methods and sparsities of one cell" in told.err
    assert "which counts as published (mode original)" in told.err
    row = next(row for row in table(root / "report", "table6") if row["text"] == "47.5 %")
    assert (row["FID"], row["choices"]) == ("19.00", "text: mode original; image: mode original")
    one(root, pair | {"unet": pruned(0.35, mode="original", include=["*attn*"])}, 21.0)
    told = sdprune("report", root)
    assert "3 runs have the methods and sparsities of one cell" in told.err
    assert "none is shown" in told.err
    row = next(row for row in table(root / "report", "table6") if row["text"] == "47.5 %")
    assert (row["FID"], row["CLIP score"]) == ("3 runs", "3 runs")
    for page in ("report.md", "report.html"):
        assert "3 runs have the methods" in (root / "report" / page).read_text()


def test_runs_without_samples_are_reported(sdprune, tmp_path):
    root = tmp_path / "runs"
    for prune, fid in (({}, 18.0), ({"unet": pruned(0.4)}, 20.0), ({"unet": pruned(0.5, "Wanda")}, 21.0)):
        change(one(root, prune, fid), "results.json", lambda results: results.update(samples=[]))
    told = sdprune("report", root)
    assert (told.code, told.err) == (0, "")
    assert len(table(root / "report", "runs")) == 3
    assert not list((root / "report" / "figures").glob("*.png"))


def test_pictures_stand_beside_their_own_prompt(sdprune, tmp_path):
    """A run with other samples has none for these."""
    root = tmp_path / "runs"
    one(root, {}, 18.0)
    run = one(root, {"unet": pruned(0.4)}, 20.0)
    change(run, "results.json", lambda results: results.update(samples=["a cat", "a dog"]))
    assert sdprune("report", root).code == 0
    from PIL import Image

    for file, colour in (("0.png", (255, 0, 0)), ("1.png", (0, 255, 0))):
        Image.new("RGB", (32, 32), colour).save(run / "samples" / file)
    assert sdprune("report", root).code == 0
    strip = np.asarray(Image.open(next((root / "report" / "figures").glob("figure_11*.png"))))
    red, green = ((strip == colour).all(2) for colour in ((255, 0, 0), (0, 255, 0)))
    assert np.argwhere(green)[:, 0].max() < np.argwhere(red)[:, 0].min()  # the dog first, as the dense run has it


EVIL = [
    "a | b", "![x](http://evil.example/a.png)", "<img src=x onerror=alert(1)>", "line\nbreak\r\n# head", "`code`",
    "[link](javascript:alert(1))", "a_b_ *c* **d** ~~e~~", "\\| \\[", "<script>alert(1)</script>", "&lt;b&gt; &amp;",
    "1. item", "- item", "# head", "\u202e\u0000\ud800 end", "$x^2$", "</title>",
]  # fmt: skip


@pytest.mark.parametrize("text", EVIL)
def test_text_of_others_shows_as_it_is(sdprune, tmp_path, text):
    """Captions, patterns, model names and reasons, read by a Markdown parser that is not ours."""
    root = tmp_path / "runs"
    for prune in ({}, {"unet": pruned(0.4, include=[text])}, {"unet": pruned(0.5, "Wanda")}, {"unet": pruned(0.4)}):
        run = one(root, prune, 20.0)
        change(run, "results.json", lambda results: results.update(samples=[text, "a cat"]))
        change(run, "config.json", lambda facts: facts.update(pipeline={"model": text}))
        change(run, "results.json", lambda results: results["protocols"]["fid"].update(protocol=text))
    infeasible = root / "infeasible"
    infeasible.mkdir()
    finish(infeasible, {}, {"label": "x-1", "infeasible": text})
    told = sdprune("report", root)
    assert told.code == 0, told.err
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    tokens = (
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse((root / "report" / "report.md").read_text())
    )
    inline = [token for block in tokens for token in block.children or []]
    allowed = {"text", "image", "softbreak", "text_special"}
    assert {token.type for token in inline} <= allowed
    assert all(token.attrs["src"].startswith("figures/") for token in inline if token.type == "image")
    assert "html_block" not in {token.type for token in tokens}
    lines = [
        "".join(t.content for t in block.children) for block in tokens if block.type == "inline" and block.children
    ]
    assert any(line.startswith(f"{plain}, 40 prompts") for line in lines), lines[:3]
    assert f"x: {plain}" in lines
    assert any(line.endswith(f"the same noise: {plain}") for line in lines)
    if len(plain) <= 24:  # longer ones show as a hash; the line below is a table's cell
        assert f"magnitude, include {plain}" in lines
    page = (root / "report" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert page.count("</title>") == 1


def test_what_is_left_out_is_named(sdprune, tmp_path):
    root, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    one(root, {}, 18.0)
    linked = one(elsewhere, {"unet": pruned(0.4)}, 20.0)
    (root / "linked").symlink_to(linked)
    (root / "again").symlink_to(root)
    (root / "loop").symlink_to(root / "loop")
    (root / "record").mkdir()
    (root / "record" / "results.json").symlink_to(root / "record" / "results.json")
    unfinished = one(root, {"unet": pruned(0.5)}, 20.0)
    (unfinished / "results.json").unlink()
    (root / "pruned-x" / "unet").mkdir(parents=True)
    (root / "pruned-x" / "model_index.json").write_text("{}")
    (root / "pruned-x" / "unet" / "config.json").write_text("{}")
    told = sdprune("report", root)
    assert told.code == 0
    assert "2 runs in 1 comparable group" in told.out
    lines = told.err.splitlines()
    assert len(lines) == 2, lines
    assert any(line.startswith(f"sdprune: left out: {root / 'record'}: ") for line in lines)
    assert f"sdprune: left out: {unfinished}: not finished, give its command again" in lines
    for page in ("report.md", "report.html"):
        assert "not finished, give its command again" in (root / "report" / page).read_text()


@pytest.mark.parametrize(
    ("file", "how", "words"),
    [
        ("results.json", lambda v: v["metrics"].update(fid=19.0), "results.json is damaged or of another version"),
        ("results.json", lambda v: v.pop("digest"), "results.json is damaged or of another version"),
        ("config.json", lambda v: v["prune"]["unet"].update(sparsity=0.5), "config.json is damaged or of another run"),
        ("config.json", lambda v: v.update(seed=1), "config.json is damaged or of another run"),
    ],
)
def test_a_damaged_record_is_named_and_the_others_are_reported(sdprune, tmp_path, file, how, words):
    """Also where every value is one that a run could have."""
    assert_left_out(sdprune, tmp_path / "runs", lambda run: damage(run, file, how), words)


@pytest.mark.parametrize(
    ("file", "how", "words"),
    [
        ("results.json", lambda v: v.pop("roles"), "KeyError: 'roles'"),
        ("results.json", lambda v: v["sparsity"].update(nominal=None), "TypeError"),
        ("config.json", lambda v: v.update(prune=["unet"]), "AttributeError"),
    ],
)
def test_a_record_of_another_version_is_named_and_the_others_are_reported(sdprune, tmp_path, file, how, words):
    line = assert_left_out(sdprune, tmp_path / "runs", lambda run: change(run, file, how), words)
    assert "not as this version of sdprune writes it" in line


def assert_left_out(sdprune, root: Path, how, words: str) -> str:
    """Of two runs the second is left out, by one line with these words."""
    one(root, {}, 18.0)
    run = one(root, {"unet": pruned(0.4)}, 20.0)
    how(run)
    told = sdprune("report", root)
    assert told.code == 0
    assert "1 runs in 1 comparable group" in told.out
    assert told.err.startswith(f"sdprune: left out: {run}: ")
    assert words in told.err
    assert told.err.count("\n") == 1
    return told.err


def test_a_score_that_is_no_number_is_missing_and_noted(sdprune, tmp_path):
    root = tmp_path / "runs"
    one(root, {}, 18.0)
    run = one(root, {"unet": pruned(0.4)}, 20.0)
    change(run, "results.json", lambda v: v["metrics"].update(fid=float("nan")))
    told = sdprune("report", root)
    assert told.err == f"sdprune: {run.name}: fid is not a finite number, it counts as missing\n"
    assert [row["FID"] for row in table(root / "report", "table2")] == ["missing", "missing"]


# --- any damage -----------------------------------------------------------------------------------------------

JUNK = [
    None, True, -1, 0, 1e308, -1e308, 10**400, float("nan"), float("inf"), "", "text", "\ud800\n|<b>", [], [[]], {},
    [None], {"a": {}}, {"class": "$\\frac{"}, "x" * 5000, 0.5, 3,
]  # fmt: skip


def places(values, path=()):
    """Every place in nested JSON."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutate(values, chance: random.Random):
    """One place gets another value, goes, or gets a neighbour."""
    values = copy.deepcopy(values)
    path = chance.choice(list(places(values)))
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    kind = chance.random()
    if kind < 0.2:
        del parent[path[-1]]
    elif kind < 0.3 and isinstance(parent, dict):
        parent[chance.choice(["\ud800|", "<script>", "text_encoder_2", "unet"])] = chance.choice(JUNK)
    else:
        parent[path[-1]] = chance.choice(JUNK)
    return values


def damage_files(run: Path, chance: random.Random) -> None:
    kind = chance.choice(["rows", "no rows", "other rows", "picture", "no picture", "tiny", "cut", "loop", "bytes"])
    rows, picture = run / "rows.npz", run / "samples" / f"{chance.randrange(2)}.png"
    if kind in ("rows", "picture"):
        path = rows if kind == "rows" else picture
        content = bytearray(path.read_bytes())
        for _ in range(8):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
    elif kind in ("no rows", "no picture"):
        (rows if kind == "no rows" else picture).unlink()
    elif kind == "other rows":
        shapes = [(), (3,), (40, 0), (40, 3), (0, 2), (40, 2, 2)]
        np.savez(rows, **{f"clip.{part}": np.zeros(chance.choice(shapes)) for part in ("texts", "features")})
    elif kind == "tiny":
        picture.write_bytes(b"")
    elif kind == "cut":
        path = run / chance.choice(["results.json", "config.json", "rows.npz"])
        path.write_bytes(path.read_bytes()[: chance.randrange(200)])
    elif kind == "loop":
        path = run / chance.choice(["results.json", "config.json", "rows.npz", "samples"])
        os.rename(path, path.with_suffix(".away"))
        path.symlink_to(path)
    else:
        (run / chance.choice(["results.json", "config.json"])).write_bytes(
            chance.choice([b"\xff\xfe", b"[" * 100_000, b"{}", b"null", b'{"a": ' + b"9" * 5000 + b"}"])
        )


def test_no_damage_stops_the_report(sdprune, tmp_path):
    """A hundred and fifty damaged records, in fifteen reports of ten beside two good ones; each is used or named."""
    chance = random.Random(7)
    named = 0
    for number in range(15):
        root = tmp_path / str(number)
        one(root, {}, 18.0, 0.314)
        one(root, {"text_encoder": pruned(0.475, mode="original"), "unet": pruned(0.35, mode="original")}, 19.0)
        bad = []
        for position in range(10):
            prune = {"unet": pruned(0.4 + position / 100, include=["a", "b"], allocation=OWL)}
            prune |= {"text_encoder": pruned(0.3, "Wanda", order="sequential")} if position % 2 else {}
            run = one(root, prune, 20.0, calibration=[NEED])
            bad.append(run)
            if chance.random() < 0.3:
                damage_files(run, chance)
                continue
            file = chance.choice(["results.json", "config.json"])
            values = json.loads((run / file).read_text())
            for _ in range(chance.choice([1, 1, 3])):
                values = mutate(values, chance)
            (run / file).write_text(json.dumps(values))
        told = sdprune("report", root)
        assert told.code == 0, told.err
        reported = int(told.out.split(" runs in ")[0])
        left = sum(f"left out: {run}: " in told.err for run in bad)
        assert reported >= 2
        assert reported + left == 12
        assert told.err.count("\n") == len(told.err.splitlines())
        assert "Traceback" not in told.err
        named += left
        assert any(row["FID"] == "19.00" for row in table(root / "report", "table6"))
        assert {row["fid"] for row in table(root / "report", "runs")} <= {"18", "19", "20"}
    assert named > 120
