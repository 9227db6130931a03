"""The report's page in a real browser: headless Chromium, opened from disk."""

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from test_report import spec, write
from test_report_damage import change

from sdprune.__main__ import main

N = 24
WORLD = [
    f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("star", "ring", "moon", "cross")
] * 2
EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
# By what is pruned: the FID, the CLIP score, the colour of its pictures.
RUNS = {
    "dense": ({}, 18.07, 0.314, (10, 10, 10)),
    "magnitude 30": ({"text_encoder": spec(0.3)}, 17.15, 0.313, (200, 0, 0)),
    "magnitude 60": ({"text_encoder": spec(0.6)}, 27.2, 0.268, (0, 200, 0)),
    "wanda 60": ({"text_encoder": spec(0.6, "Wanda")}, 29.2, 0.248, (0, 0, 200)),
    "unet 40": ({"unet": spec(0.4)}, 9.5, 0.31, (200, 200, 0)),
}


def record(root, prune, fid, clip, colour, captions=WORLD, side=32):
    """A record with pictures of one colour; its clip scores fall with the number of the caption."""
    run = write(root, prune, fid, clip, n=len(captions))
    for path in [run / "samples" / f"{i}.png" for i in range(2)] + [run / "images" / f"{i}.png" for i in range(N)]:
        Image.new("RGB", (side, side), colour).save(path)
    lost = np.linspace(0, 0.2, len(captions)) if prune else np.zeros(len(captions))
    angles = np.arccos(0.9 - lost + 0.0 * clip)
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    np.savez(
        run / "rows.npz", **{"clip:x-0.texts": np.tile([1.0, 0.0], (len(captions), 1)), "clip:x-0.features": features}
    )
    with (run / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("id", "file_name", "caption"), *((i, f"{i}.jpg", c) for i, c in enumerate(captions))]
        )
    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("page") / "runs"
    for run in RUNS.values():
        record(root, *run)
    assert main(["report", str(root)]) == 0
    return root / "report" / "report.html"


@pytest.fixture
def visit(chromium):
    """Open a page from disk; whatever it asks the network for, and every error of it, fails the test at the end."""
    wrong, contexts = [], []

    def visit(path, width=1280, **options):
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda one: None if one.url.startswith(("file:", "data:", "blob:")) else wrong.append(one.url)
        )
        page.route(re.compile("^https?:|^wss?:"), lambda route: route.abort())
        page.goto(f"file://{path}")
        page.wait_for_selector("#chart[data-drawn]")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def colours(locator):
    """Of the middle of each of these elements, as they are on the screen."""
    locator.first.evaluate("one => one.scrollIntoView({block: 'center'})")
    boxes = [one.bounding_box() for one in locator.all()]
    picture = Image.open(io.BytesIO(locator.page.screenshot())).convert("RGB")
    return [picture.getpixel((int(box["x"] + box["width"] / 2), int(box["y"] + box["height"] / 2))) for box in boxes]


def point(page, name):
    """A run's mark in the chart."""
    return page.locator(f"{POINTS}[aria-label='{name}']")


def close(one, other):
    """Whether two colours differ by no more than JPEG does."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) < 12


POINTS = "#chart .mark-symbol path"


def test_the_chart_shows_each_run_and_reacts(report, visit):
    page = visit(report)
    assert page.locator(POINTS).count() == len(RUNS)
    point(page, "unet magnitude 40 %").hover()
    tip = page.locator("#tip").inner_text()
    assert tip.startswith("unet magnitude 40 %")
    assert "FID 9.50 (difference to dense \u22128.57 [\u22129.57, \u22127.57])" in tip  # 9.5 - 18.07, +- 1
    assert f"n\u00a0=\u00a0{N}" in tip
    page.get_by_role("button", name="text_encoder magnitude", exact=True).click()
    page.wait_for_selector("#chart[data-drawn$=' 2']")
    assert page.locator(POINTS).count() == len(RUNS) - 2
    page.get_by_role("button", name="text_encoder magnitude", exact=True).click()
    page.locator("#measure").select_option("fid")
    page.locator("#axis").select_option("nominal")
    page.wait_for_selector("#chart[data-drawn='fid nominal 3']")
    words = page.locator("#chart").inner_text()
    assert "FID (lower is better)" in words
    assert "nominal sparsity, %" in words
    assert "FID (lower is better) against nominal sparsity" in page.locator("#chart").get_attribute("aria-label")


def test_more_methods_than_colours_are_told_apart(tmp_path, visit):
    """Of eleven methods no two lines have the same colour and dashes, and no two points the same colour and filling."""
    criteria, allocations = ("Magnitude", "Wanda", "SparseGPT"), ("Uniform", "OWL", "GlobalRanking", "PerLayer")
    pairs = [(criterion, allocation) for criterion in criteria for allocation in allocations][:11]
    for number, (criterion, allocation) in enumerate(pairs):
        for share in (0.2, 0.4):
            prune = {"unet": spec(share, criterion, allocation, "row")}
            record(tmp_path, prune, 10 + number + share, 0.3, (number, 0, 0))
    record(tmp_path, *RUNS["dense"])
    assert main(["report", str(tmp_path)]) == 0
    page = visit(tmp_path / "report" / "report.html")
    lines = page.locator("#chart .mark-line path").evaluate_all(
        "all => all.map(one => one.getAttribute('stroke') + ' ' + one.getAttribute('stroke-dasharray'))"
    )
    assert (len(lines), len(set(lines))) == (12, 12)  # with the dense model's
    points = page.locator(POINTS).evaluate_all(
        "all => all.map(one => one.getAttribute('stroke') + ' ' + one.getAttribute('fill-opacity'))"
    )
    assert (len(points), len(set(points))) == (23, 12)


def test_a_point_opens_its_run_by_mouse_and_by_keyboard(report, visit):
    page = visit(report)
    point(page, "text_encoder wanda 60 %").click()
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("heading").inner_text() == "text_encoder wanda 60 %"
    link = dialog.get_by_role("link", name="results.json").get_attribute("href")
    assert (report.parent / link).resolve().parent.name == "text_encoder-Wanda-Uniform-0.6-0"
    pictures = dialog.locator("figure", has_text="a dog").get_by_role("img")
    assert [one.get_attribute("alt") for one in pictures.all()] == ["dense: a dog", "text_encoder wanda 60 %: a dog"]
    assert colours(pictures) == [RUNS["dense"][3], RUNS["wanda 60"][3]]
    page.keyboard.press("Escape")
    assert dialog.count() == 0
    assert page.locator("tr.chosen").inner_text().split("\t")[1] == "text_encoder wanda 60 %"
    point(page, "unet magnitude 40 %").focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog").get_by_role("heading").inner_text() == "unet magnitude 40 %"
    page.get_by_role("button", name="which prompts it broke").click()
    assert page.evaluate("document.activeElement.id") == "broken"
    assert page.locator("#broken option:checked").inner_text() == "unet magnitude 40 %"
    assert not page.locator("#tip").is_visible()  # it was of the point that had the focus


def test_all_that_a_key_reaches_has_a_name_and_shows_the_focus(report, visit):
    """As the browser computes both."""
    page = visit(report)
    focused, seen = "document.activeElement", []
    style = f"getComputedStyle({focused})"
    for _ in range(90):
        page.keyboard.press("Tab")
        if page.evaluate(f"{focused} === document.body"):
            break
        name = f"{focused}.id || {focused}.getAttribute('class') || {focused}.tagName"
        seen.append(page.evaluate(f"[{name}, {style}.outlineStyle, parseFloat({style}.outlineWidth)]"))
    assert {name for name, *_ in seen} >= {"theme", "link", "measure", "filter", "copy", "slider", "hold", "broken"}
    assert [one for one in seen if one[1] != "solid" or one[2] < 2] == []
    tree = page.locator("body").aria_snapshot()
    nameless = re.findall(r"^ *- (?:slider|combobox|searchbox|button|link|img)(?= *(?:\[.*\])?:? *$)", tree, re.M)
    assert nameless == []


def test_colours_of_the_chart_are_seen_on_either_ground(report, visit):
    """Contrast of at least 3:1, as WCAG 2.2 (1.4.11) defines it."""
    page = visit(report)
    for theme in ("light", "dark"):
        page.locator("#theme").select_option(theme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        shown = page.evaluate(
            "[...document.querySelectorAll('script[type=module]')].at(-1).textContent.match(/COLOURS = (.*?);/)[1]"
        )
        for colour in json.loads(shown):
            page.evaluate("one => { document.getElementById('copied').style.color = one }", colour)
            found = page.evaluate("getComputedStyle(document.getElementById('copied')).color")
            assert contrast(found, ground) >= 3, (theme, colour)


def contrast(*colours):
    """Of two colours that a browser computed, rgb(r, g, b)."""
    bright = []
    for colour in colours:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        bright.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(bright) / min(bright)


def test_the_slider_changes_the_pictures(report, visit):
    """Each method shows its sparsest run up to the slider, or the dense model; held ones show the dense model's."""
    page = visit(report)
    slider, cards = page.locator("#slider"), page.locator("#cards .picture")
    names = page.locator("#cards figcaption b").all_inner_texts()
    assert names == ["dense", "unet magnitude", "text_encoder magnitude", "text_encoder wanda"]

    dense = RUNS["dense"][3]
    slider.fill("0")
    assert colours(cards) == [dense] * 4
    slider.fill("1")  # 30 %
    assert page.get_by_role("slider", name="sparsity").get_attribute("aria-valuetext") == "30.0\u00a0%"
    assert page.locator("#at").inner_text() == "30.0\u00a0%"
    assert colours(cards) == [dense, dense, RUNS["magnitude 30"][3], dense]
    slider.focus()
    page.keyboard.press("End")  # 60 %
    assert colours(cards) == [dense, *(RUNS[name][3] for name in ("unet 40", "magnitude 60", "wanda 60"))]
    page.locator("#cards button").nth(3).focus()
    page.keyboard.down(" ")
    assert colours(cards)[3] == dense
    page.keyboard.up(" ")
    assert colours(cards)[3] == RUNS["wanda 60"][3]
    page.locator("#prompt").select_option(label=WORLD[5])  # of the captions, which lie in sheets
    assert close(colours(cards)[3], RUNS["wanda 60"][3])
    assert cards.nth(3).get_attribute("aria-label") == f"text_encoder wanda 60 %: {WORLD[5]}"


def test_the_table_sorts_filters_and_is_copied(report, visit):
    page = visit(report, permissions=["clipboard-read", "clipboard-write"])
    head = page.locator("#table th", has_text=re.compile("^FID$"))

    def fids():
        place = page.locator("#table th").all_inner_texts().index("FID")
        return [float(row.locator("td").nth(place).inner_text()) for row in page.locator("#table tbody tr").all()]

    ranks = [row.split("\t")[0] for row in page.locator("#table tbody tr").all_inner_texts()]
    assert ranks == ["", "1", "2", "3", "4"]
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert fids() == [9.5, 17.15, 18.07, 27.2, 29.2]
    page.keyboard.press("Enter")  # the focus stays on the head
    assert fids() == [29.2, 27.2, 18.07, 17.15, 9.5]
    page.locator("#filter").fill("text_encoder 60")
    assert fids() == [29.2, 27.2]
    page.get_by_text("columns").click()
    page.get_by_label("n", exact=True).check()
    page.get_by_role("button", name="copy table").click()
    page.wait_for_function("document.getElementById('copied').textContent === '2 rows copied'")
    lines = [line.split("\t") for line in page.evaluate("navigator.clipboard.readText()").splitlines()]
    assert [line[lines[0].index("n")] for line in lines] == ["n", str(N), str(N)]
    assert [line[1] for line in lines] == ["run", "text_encoder wanda 60 %", "text_encoder magnitude 60 %"]
    losses = [line[lines[0].index("CLIP score \u2212 dense".replace("\u2212", "-"))] for line in lines[1:]]
    assert losses == [
        "-0.0660 [-0.0680, -0.0640]",
        "-0.0460 [-0.0480, -0.0440]",
    ]  # 0.248 and 0.268 less 0.314, +- 0.002
    page.keyboard.press("Tab")  # out of the list of columns, which closes
    assert not page.get_by_label("n", exact=True).is_visible()
    page.locator("#filter").fill("sparsegpt")
    assert page.locator("#copied").inner_text() == "no run has these words"


def test_prompts_are_ordered_by_what_they_lost(report, visit):
    """The later a caption, the more it lost: 0 to 0.2 in equal steps."""
    page = visit(report)
    pairs = page.locator("#pairs figure")
    page.locator("#broken").select_option(label="text_encoder wanda 60 %")
    captions = pairs.locator("b").all_inner_texts()
    assert captions == WORLD[::-1][: len(captions)]
    assert "CLIP score 0.9000 \u2192 0.7000" in pairs.first.inner_text()
    assert all(map(close, colours(pairs.first.locator(".picture")), (RUNS["dense"][3], RUNS["wanda 60"][3])))
    page.get_by_role("button", name="show more").click()
    assert pairs.locator("b").all_inner_texts() == WORLD[::-1]
    rows = {row[0]: row[1:] for row in (one.split("\t") for one in page.locator("#categories tr").all_inner_texts())}
    losses = {shape: [0.2 * i / (N - 1) for i, text in enumerate(WORLD) if shape in text] for shape in ("moon", "star")}
    for shape, found in losses.items():
        mean, half = np.mean(found), 1.96 * np.std(found, ddof=1) / len(found) ** 0.5
        assert rows[f"shape: {shape}"][:3] == ["6", f"{mean:.4f}", f"[{mean - half:.4f}, {mean + half:.4f}]"]
    page.locator("#categories").get_by_role("button", name="moon").click()
    assert pairs.locator("b").all_inner_texts() == [text for text in WORLD[::-1] if "moon" in text]


@pytest.mark.parametrize("width", [420, 1280, 1600])
def test_nothing_is_wider_than_the_window_light_and_dark(report, visit, width):
    page = visit(report, width, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = "getComputedStyle(document.body).backgroundColor"
    light = {"light": "rgb(255, 255, 255)", "dark": page.evaluate(back)}
    assert light["dark"] != light["light"]
    for theme in ("light", "dark"):
        page.locator("#theme").select_option(theme)
        assert page.evaluate(back) == light[theme]
    page.get_by_text("columns", exact=True).click()
    assert page.get_by_label("n", exact=True).is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    point(page, "unet magnitude 40 %").click()
    box = page.get_by_role("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_on_paper_tables_are_whole_and_controls_are_left_out(report, visit):
    page = visit(report, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#table th").first.inner_text() == "rank"
    assert [page.locator(one).is_visible() for one in ("nav", "#copy", "#filter", "#theme", "#menu")] == [False] * 5
    assert page.locator("#runs .wide").evaluate("one => one.scrollHeight - one.clientHeight") <= 0


def test_html_of_others_is_shown_and_never_run(tmp_path, visit):
    """In captions, prompts, names of models and runs, reasons, references; also what would end the data's script."""
    for prune, *rest in list(RUNS.values())[:3]:
        run = record(tmp_path, {c: {**one, "include": [EVIL[:24]]} for c, one in prune.items()}, *rest, [EVIL] * N)
        change(run, "results.json", lambda results: results.update(samples=[EVIL, "</script>" + EVIL]))
        change(run, "config.json", lambda facts: facts.update(pipeline={"model": EVIL}))
        run.rename(tmp_path / f"{run.name}<script>window.hacked = 3<")
    damaged = tmp_path / "<script>window.hacked = 4<"
    damaged.mkdir()
    (damaged / "results.json").write_text("{")
    reference = tmp_path / "theirs.csv"
    with reference.open("w", newline="") as file:
        heads = ("text_method", "unet_method", "text_sparsity", "unet_sparsity", "fid", "clip_score", EVIL)
        csv.writer(file).writerows([heads, (EVIL, EVIL, 0.3, 0, 1.5, 0.8, EVIL)])
    assert main(["report", str(tmp_path), f"--reference={reference}", "--out", str(tmp_path / "out")]) == 0
    page = visit(tmp_path / "out" / "report.html")
    assert EVIL in page.locator("#best").inner_text()
    assert EVIL in page.locator("#pairs").inner_text()
    assert EVIL in page.locator("#title").inner_text()
    assert "window.hacked = 4" in page.locator("#study").inner_text()
    page.locator(POINTS).last.click()
    assert "window.hacked = 3" in page.get_by_role("dialog").inner_text()
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 3
    assert json.loads(page.locator("#data").text_content())["groups"][0]["samples"][0] == EVIL


def test_large_pictures_are_the_files_of_the_runs(tmp_path, visit):
    """They are not read one by one for small copies; those of sample prompts are."""
    for name in ("dense", "wanda 60"):
        record(tmp_path, *RUNS[name], side=300)
    assert main(["report", str(tmp_path)]) == 0
    page = visit(tmp_path / "report" / "report.html")
    pictures = page.locator("#pairs figure").first.get_by_role("img")
    sources = [(tmp_path / "report" / one.get_attribute("src")).resolve() for one in pictures.all()]
    assert [path.relative_to(tmp_path).parts for path in sources] == [
        ("dense-0", "images", f"{N - 1}.png"), ("text_encoder-Wanda-Uniform-0.6-0", "images", f"{N - 1}.png"),
    ]  # fmt: skip
    assert colours(pictures) == [RUNS["dense"][3], RUNS["wanda 60"][3]]
    assert len(list((tmp_path / "report" / "pictures").iterdir())) == 2 * 2


def no_samples(results):
    results["samples"] = []


def no_clip_score(results):
    for part in ("metrics", "comparison"):
        results[part] = {name: value for name, value in results[part].items() if "clip" not in name}


@pytest.mark.filterwarnings("error:No artists")
@pytest.mark.parametrize(
    ("names", "how", "words"),
    [
        (["dense"], None, "Only the dense model was run"),
        (
            ["wanda 60", "unet 40"],
            None,
            "The run with the lowest FID: unet magnitude 40 %",
        ),  # no dense one to compare with
        (["dense", "unet 40"], no_samples, "The sparsest run that surely lost at most 2\u00a0%"),
        (["dense", "wanda 60"], no_clip_score, "The run with the lowest FID: text_encoder wanda 60 %"),
    ],
)
def test_a_page_of_little_draws_what_there_is(tmp_path, visit, names, how, words):
    for name in names:
        run = record(tmp_path, *RUNS[name])
        if how:
            change(run, "results.json", how)
    assert main(["report", str(tmp_path)]) == 0
    page = visit(tmp_path / "report" / "report.html")
    assert page.locator("#best").inner_text().startswith(words)
    assert page.locator("#table tbody tr").count() == page.locator(POINTS).count() == len(names)
    point(
        page, {"dense": "dense", "wanda 60": "text_encoder wanda 60 %", "unet 40": "unet magnitude 40 %"}[names[0]]
    ).click()
    assert page.get_by_role("dialog").count() == 1


def test_a_single_file_opens_alone(report, tmp_path, visit):
    assert main(["report", str(report.parents[1]), "--single-file", "--out", str(tmp_path / "out")]) == 0
    alone = shutil.copy(tmp_path / "out" / "report.html", tmp_path / "alone.html")
    shutil.rmtree(tmp_path / "out")
    page = visit(alone)
    page.locator("#slider").fill("2")
    assert colours(page.locator("#cards .picture"))[1] == RUNS["unet 40"][3]
    assert page.locator("#pairs figure").count() > 0
    point(page, "unet magnitude 40 %").click()
    assert page.get_by_role("dialog").get_by_role("link").count() == 0
