"""The playground's page in headless Chromium, against the real command line in a process of its own."""

import base64
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import numpy as np
import pytest
from command_lines import CPU, the_run
from PIL import Image

if find_spec("gradio") is None:  # the server alone imports it
    pytest.skip("there is no gradio: pip install '.[playground]'", allow_module_level=True)

EVIL = (
    "a <b>red</b> star <script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> ${window.hacked = 4}"
)
MODEL = "a`<img src=x onerror='window.hacked = 3'>"
"""The name of the model's directory, where a slash cannot be."""
EXAMPLE = "a large green circle on a black background"
PATIENCE = 240_000  # ms: machines that run the tests are busy


def options(tmp):
    small = ["--data.n=2", "--data.batch_size=2", "--data.source.images=40", "--model.sampling.steps=2", CPU]
    small += ["--data.calibration.images=20", "--data.calibration_n=5", "--data.calibration_batch_size=2"]
    return [*small, f"--model.output={tmp}/runs", f"--model.store={tmp}/statistics"]


class Outside:
    """A proxy that all requests to other machines would go through: counts those who knock."""

    def __init__(self):
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port, self.calls = self.listening.getsockname()[1], 0
        Thread(target=self._count, daemon=True).start()

    def _count(self):
        while True:
            connection, _ = self.listening.accept()
            self.calls += 1
            connection.close()


@contextmanager
def serving(words, **environment):
    """(process, its address) of `sdprune playground`, stopped at the end as by Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sdprune", "playground", *words, "--port=0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    for line in process.stdout:
        if found := re.search(r"http://\S+", line):
            break
    else:
        pytest.fail(process.stderr.read())
    yield process, found[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


@pytest.fixture(scope="module")
def started(miniature, tmp_path_factory):
    """(process, its address, its directory, the outside) of `sdprune playground`."""
    tmp, outside = tmp_path_factory.mktemp("playground"), Outside()
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), f"http://127.0.0.1:{outside.port}")
    (tmp / MODEL).symlink_to(miniature / "pipeline")
    words = ["--config", "mini/playground", *options(tmp), f"--model.pipeline.model={tmp / MODEL}"]
    words += [f"--model.samples={json.dumps(['a red star', EXAMPLE, EVIL])}"]
    with serving(words, **proxies, no_proxy="127.0.0.1,localhost", HF_HUB_OFFLINE="0") as (process, address):
        yield process, address, tmp, outside
    assert outside.calls == 0


@pytest.fixture(scope="module")
def visit(started, chromium):
    """Open the page; what it asks of other machines, and every error of it, fails the module at the end."""
    wrong, contexts, address = [], [], started[1]

    def visit():
        context = chromium.new_context(viewport={"width": 1280, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        places = ("", urlsplit(address).netloc)  # data: and blob: have no host
        page.on("request", lambda one: None if urlsplit(one.url).netloc in places else wrong.append(one.url))
        page.goto(address)
        page.wait_for_selector("#pair img")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def page(visit):
    """One visitor for most tests: to open the page is the slowest part of them."""
    return visit()


def pixels(page, where="#pair img"):
    """The pictures as they came, not as they are scaled."""
    found = [base64.b64decode(one.get_attribute("src").partition(",")[2]) for one in page.locator(where).all()]
    return [np.asarray(Image.open(io.BytesIO(one))) for one in found]


def type_in(page, where, text):
    """Type into a box, and press Enter."""
    box = page.locator(f"{where} textarea, {where} input:not([type=range])").first
    box.fill(text)
    box.press("Enter")


def pick(page, where, option):
    """Pick an option of a list."""
    page.locator(f"{where} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def choose(page, prompt, text_encoder, unet):
    """Choose, and wait until it is seen: (dense, pruned)."""
    type_in(page, "#text_encoder-sparsity", str(text_encoder))
    type_in(page, "#unet-sparsity", str(unet))
    type_in(page, "#prompt", prompt)
    page.wait_for_function(
        "([alt, text]) => [...document.querySelectorAll('#pair figure')].some("
        "one => one.querySelector('img').alt === alt && one.innerText.includes(text))",
        arg=[f"pruned: {prompt}", f"pruned: text_encoder {text_encoder:.0%}, unet {unet:.0%}"],
    )
    return pixels(page)


def test_the_page_draws_and_the_slider_changes_it(page):
    dense, pruned = choose(page, "a red star", 0.3, 0.5)
    assert [one.get_attribute("alt") for one in page.locator("#pair img").all()] == [
        "dense: a red star", "pruned: a red star"
    ]  # fmt: skip
    assert page.locator("#slider img").count() == 2
    assert {"CLIP score", "SSIM to dense"} <= set(page.locator("#scores td:first-child").all_inner_texts())
    assert not np.array_equal(dense, pruned)
    zeros = page.locator("#zeros").inner_text()
    page.locator("#unet-sparsity input[type=range]").focus()
    page.keyboard.press("End")
    page.get_by_text("pruned: text_encoder 30%, unet 100%").wait_for()
    assert page.locator("#zeros").inner_text() != zeros
    again, nothing = pixels(page)
    assert np.array_equal(again, dense)
    assert not np.array_equal(nothing, pruned)
    same = choose(page, "a red star", 0, 0)
    assert np.array_equal(same[0], dense)
    assert np.array_equal(same[1], dense)


def test_an_example_is_drawn(page):
    page.get_by_role("button", name=EXAMPLE).click()
    page.locator(f"#pair img[alt='pruned: {EXAMPLE}']").wait_for()
    assert page.locator("#prompt textarea").input_value() == EXAMPLE


def test_the_strip_has_the_sparsities(page):
    choose(page, "a red star", 0, 0.5)
    page.locator("#many").click()
    page.wait_for_function("document.querySelectorAll('#strip img').length === 7")
    labels = page.locator("#strip figcaption").all_inner_texts()
    assert labels == [f"unet {share}%" for share in (0, 15, 30, 45, 60, 75, 90)]
    pictures = pixels(page, "#strip img")
    assert np.array_equal(pictures[0], pixels(page)[0])
    assert not any(np.array_equal(pictures[0], other) for other in pictures[1:])
    places = [one.bounding_box()["y"] for one in page.locator("#strip img").all()]
    assert len(set(places)) == 1  # in one row


@pytest.mark.parametrize("width", [420, 1280, 1600])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 1280, "height": 900})


def test_pictures_stay_in_sight_on_a_phone(page):
    """While the last slider is moved, which is below them."""
    page.set_viewport_size({"width": 420, "height": 900})
    page.locator("#unet-sparsity input[type=range]").scroll_into_view_if_needed()
    page.locator("#unet-sparsity").evaluate("one => one.scrollIntoView({block: 'center'})")
    slider = page.locator("#unet-sparsity").bounding_box()
    boxes = [one.bounding_box() for one in page.locator("#pair img").all()]
    page.set_viewport_size({"width": 1280, "height": 900})
    assert all(box["y"] >= 0 and box["y"] + box["height"] <= slider["y"] for box in boxes)


def test_the_focus_is_seen_wherever_a_key_leads(page):
    page.locator("#prompt textarea").focus()
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        seen.append(page.evaluate(
            "(one => [one.id || one.getAttribute('aria-label') || one.innerText, getComputedStyle(one).outlineStyle, "
            "parseFloat(getComputedStyle(one).outlineWidth)])(document.activeElement)"
        ))  # fmt: skip
    assert {"draw", "many", "seed of the noise", "component"} <= {name for name, *_ in seen}
    assert [one for one in seen if one[1] != "solid" or one[2] < 2] == []


def test_a_refusal_is_in_sight_on_a_phone(page):
    choose(page, "a red star", 0.3, 0.5)
    page.set_viewport_size({"width": 420, "height": 900})
    page.locator("#unet-granularity").evaluate("one => one.scrollIntoView({block: 'center'})")
    type_in(page, "#unet-granularity", "9:4")
    page.get_by_role("alert").wait_for()
    box = page.get_by_role("alert").bounding_box()
    type_in(page, "#unet-granularity", "default")
    page.get_by_role("alert").wait_for(state="detached")
    page.set_viewport_size({"width": 1280, "height": 900})
    assert 0 <= box["y"] < 100


def test_nonsense_is_refused_in_a_line_and_the_pictures_stay(page):
    before = choose(page, "a red star", 0.3, 0.5)
    type_in(page, "#prompt", "  ")
    page.get_by_text("The prompt is empty: say what the picture shows").wait_for()
    assert page.get_by_role("alert").bounding_box()["height"] < 60
    choose(page, "a blue star", 0.3, 0.5)
    assert page.get_by_role("alert").count() == 0
    type_in(page, "#unet-granularity", "9:4")
    page.get_by_text("unet: granularity 9:4 prunes 9 of every 4: give 1 to 4 of 4.").wait_for()
    assert len(pixels(page)) == 2
    type_in(page, "#unet-granularity", "layer")
    page.get_by_role("alert").wait_for(state="detached")
    for one, other in zip(choose(page, "a red star", 0.3, 0.5), before, strict=True):
        assert np.array_equal(one, other)


def test_html_in_prompts_and_the_name_of_the_model_is_shown_and_never_run(page):
    assert MODEL in page.locator("#head p").inner_text()
    assert page.get_by_role("button", name="window.hacked").inner_text().strip().startswith(EVIL[:20])
    choose(page, EVIL, 0.3, 0.5)
    page.get_by_role("button", name="This as a command").click()
    page.wait_for_selector("#config .cm-line")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#pair b, #pair script").count() == 0
    page.get_by_role("button", name="This as a command").click()


def test_the_command_on_the_page_draws_the_same(visit, started, sdprune):
    page = visit()
    pick(page, "#unet-criterion", "Wanda")
    pick(page, "#unet-allocation", "OWL")
    dense, pruned = choose(page, "a blue ring", 0.3, 0.8)
    page.get_by_role("button", name="This as a command").click()
    page.wait_for_selector("#command .cm-line")
    command = "".join(page.locator("#command .cm-line").all_inner_texts())
    assert command.startswith("sdprune predict --config mini/playground ")
    lines = page.locator("#command .cm-content").bounding_box()["height"]
    assert page.locator("#command").bounding_box()["height"] < lines + 100
    assert re.search("unet: .*criterion: Wanda, allocation: OWL", command)
    runs = started[2] / "again"
    ran = sdprune(*shlex.split(command)[1:], "--model.metrics=[]", f"--model.output={runs}")
    assert (ran.code, ran.err) == (0, "")
    for prefix, picture in (("text_encoder", pruned), ("dense", dense)):
        found = np.asarray(Image.open(the_run(runs, prefix) / "samples" / "0.png"))
        assert np.array_equal(found, picture)


def test_visitors_do_not_mix(page, visit):
    """Two at once see what each of them sees alone."""
    other = visit()
    type_in(page, "#prompt", "a green cross")
    apart = choose(other, "three small moons", 0.2, 0.7)
    at_once = choose(page, "a green cross", 0.2, 0.7)
    assert not np.array_equal(apart[0], at_once[0])
    for one, alone in zip(at_once, choose(other, "a green cross", 0.2, 0.7), strict=True):
        assert np.array_equal(one, alone)


def test_only_this_machine_can_open_it(started):
    """The address that the socket is bound to, as the kernel has it."""
    port = urlsplit(started[1]).port
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    places = {line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")}
    assert places == {f"0100007F:{port:04X}"}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (lambda own: [f"--port={own}"], "cannot be used: Address already in use. Choose others"),
        (lambda own: ["--port=99999"], "--port=99999 cannot be used"),
        (lambda own: ["--port=0", "--host=none.invalid"], "--host=none.invalid --port=0 cannot be used"),
        (lambda own: ["--port=0", "--gather=some"], "Unknown gather 'some'. Choices: first, all."),
        (lambda own: ["--port=0", "--model.budget.total=0.3"], "--model.budget decides sparsities"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(sdprune, tmp_path, options, part):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = options(taken.getsockname()[1])
        told = sdprune("playground", "--config=mini/playground", f"--model.store={tmp_path}/statistics", *words)
    assert (told.code, told.out) == (2, "")
    assert part in told.err
    assert told.err.count("\n") == 1
