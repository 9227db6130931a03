"""The playground's page in headless Chromium, against the real command line in a process of its own."""

import base64
import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import numpy as np
import pytest
from command_lines import CPU, the_run
from PIL import Image

pytest.importorskip("gradio", reason="there is no gradio: pip install '.[playground]'")

EVIL = "a <b>red</b> star <script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
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


@pytest.fixture(scope="module")
def started(miniature, tmp_path_factory):
    """(process, its address, its directory, the outside) of `sdprune playground`."""
    tmp, outside = tmp_path_factory.mktemp("playground"), Outside()
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), f"http://127.0.0.1:{outside.port}")
    words = ["playground", "--config", "mini/playground", *options(tmp), "--port=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sdprune", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **proxies, "no_proxy": "127.0.0.1,localhost", "HF_HUB_OFFLINE": "0"},
    )  # fmt: skip
    for line in process.stdout:
        if found := re.search(r"http://\S+", line):
            break
    else:
        pytest.fail(process.stderr.read())
    yield process, found[0], tmp, outside
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert process.stderr.read() == ""
    assert outside.calls == 0


@pytest.fixture
def visit(started, chromium):
    """Open the page; what it asks of other machines, and every error of it, fails the test at the end."""
    wrong, contexts, address = [], [], started[1]

    def visit(drawn=True, **settings):
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        own = urlsplit(address).netloc
        page.on(
            "request", lambda one: None if urlsplit(one.url).netloc in ("", own) else wrong.append(one.url)
        )  # data: and blob: have no host
        page.goto(address)
        if drawn:
            page.wait_for_selector("#pair img")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def pixels(page, where="#pair img"):
    """The pictures as they came, not as they are scaled."""
    found = [base64.b64decode(one.get_attribute("src").partition(",")[2]) for one in page.locator(where).all()]
    return [np.asarray(Image.open(io.BytesIO(one))) for one in found]


def changed(page, act, where="#pair"):
    """Do something, and wait until a part of the page is another one."""
    before = page.locator(where).inner_html()
    act()
    page.wait_for_function(
        "([where, before]) => document.querySelector(where).innerHTML !== before", arg=[where, before]
    )


def type_in(page, where, text):
    """Type into a box, and press Enter."""
    box = page.locator(f"{where} textarea, {where} input[type=number]").first
    box.fill(text)
    box.press("Enter")


def shown_code(page, where):
    """The text of a box of code."""
    return "\n".join(page.locator(f"{where} .cm-line").all_inner_texts())


def test_the_page_draws_and_the_slider_changes_it(visit):
    page = visit()
    assert [one.get_attribute("alt").partition(":")[0] for one in page.locator("#pair img").all()] == [
        "dense",
        "pruned",
    ]
    assert page.locator("#slider img").count() == 2
    assert "clip score" in page.locator("#scores").inner_text()
    dense, pruned = pixels(page)
    assert not np.array_equal(dense, pruned)
    zeros = page.locator("#zeros").inner_text()
    slider = page.locator("#unet-sparsity input[type=range]")
    slider.focus()
    changed(page, lambda: page.keyboard.press("End"), "#zeros")  # everything goes
    nothing = pixels(page)
    assert np.array_equal(nothing[0], dense)
    assert not np.array_equal(nothing[1], pruned)
    assert page.locator("#zeros").inner_text() != zeros

    changed(page, lambda: page.keyboard.press("Home"), "#zeros")
    page.locator("#text_encoder-sparsity input[type=range]").focus()
    changed(page, lambda: page.keyboard.press("Home"), "#zeros")
    same = pixels(page)
    assert np.array_equal(same[0], same[1])


def test_the_strip_has_the_sparsities(visit):
    page = visit()
    page.locator("#many").click()
    page.wait_for_function("document.querySelectorAll('#strip img').length === 7")
    labels = page.locator("#strip figcaption").all_inner_texts()
    assert labels == [f"unet {share}%" for share in (0, 15, 30, 45, 60, 75, 90)]
    pictures = pixels(page, "#strip img")
    assert not any(np.array_equal(pictures[0], other) for other in pictures[1:])


def test_nonsense_is_refused_in_a_line_and_the_pictures_stay(visit):
    page = visit()
    before = pixels(page)
    type_in(page, "#prompt", "  ")
    page.wait_for_selector("#notice .bad")
    assert page.get_by_role("alert").inner_text().startswith("The prompt is empty: say what the picture shows")
    assert page.locator("#notice .bad").bounding_box()["height"] < 60
    type_in(page, "#prompt", "a red star")
    page.wait_for_selector("#notice .bad", state="detached")
    box = page.locator("#unet-granularity input")
    box.fill("9:4")
    changed(page, lambda: box.press("Enter"), "#notice")
    assert page.get_by_role("alert").inner_text() == "unet: granularity 9:4 prunes 9 of every 4: give 1 to 4 of 4."
    assert len(pixels(page)) == len(before)


def test_html_in_a_prompt_is_shown_and_never_run(visit):
    page = visit()
    changed(page, lambda: type_in(page, "#prompt", EVIL))
    assert page.locator("#pair img").first.get_attribute("alt") == f"dense: {EVIL}"
    page.get_by_role("button", name="This as a command").click()
    page.wait_for_selector("#config .cm-line")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#pair b, #pair script").count() == 0


def test_the_command_on_the_page_draws_the_same(visit, started, sdprune):
    page, tmp = visit(), started[2]
    changed(page, lambda: type_in(page, "#prompt", "a blue ring"))
    changed(page, lambda: type_in(page, "#unet-sparsity", "0.8"))
    dense, pruned = pixels(page)
    page.get_by_role("button", name="This as a command").click()
    page.wait_for_selector("#command .cm-line")
    command = shown_code(page, "#command").replace("\n", "")
    runs = f"{tmp}/again"
    ran = sdprune(*shlex.split(command)[1:], "--model.metrics=[]", f"--model.output={runs}")
    assert (ran.code, ran.err) == (0, "")
    for prefix, picture in (("text_encoder", pruned), ("dense", dense)):
        found = np.asarray(Image.open(the_run(Path(runs), prefix) / "samples" / "0.png"))
        assert np.array_equal(found, picture)


def test_visitors_do_not_mix(visit):
    pages = [visit(), visit()]
    prompts = ["a green cross", "three small moons"]
    for page, prompt in zip(pages, prompts, strict=True):
        type_in(page, "#prompt", prompt)
    for page, prompt in zip(pages, prompts, strict=True):
        page.wait_for_selector(f"#pair img[alt='pruned: {prompt}']")
    one, other = pixels(pages[0]), pixels(pages[1])
    assert not np.array_equal(one[0], other[0])
    changed(pages[1], lambda: type_in(pages[1], "#prompt", prompts[0]))
    for first, second in zip(one, pixels(pages[1]), strict=True):
        assert np.array_equal(first, second)


def test_only_this_machine_can_open_it(started):
    """The address that the socket is bound to, as the kernel has it."""
    port = urlsplit(started[1]).port
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    places = {line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")}
    assert places == {f"0100007F:{port:04X}"}


def test_a_port_that_is_taken(sdprune, started):
    port = urlsplit(started[1]).port
    told = sdprune("playground", *options(started[2]), "--config=mini/playground", f"--port={port}")
    assert told.code == 2
    assert f"--port={port} cannot be used: Address already in use. Choose others" in told.err
    assert told.err.count("\n") == 1
