"""README and docs: links lead somewhere, commands parse, snippets run, and the folder picture shows what there is."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command_lines import ROOT

import sdprune as package
from sdprune.__main__ import VERBS
from sdprune.configuration.shipped import located
from sdprune.inspection.usage import INSPECT
from sdprune.lossless.usage import LOSSLESS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
PLACES = {name: page.parent for name, page in zip(TEXTS, PAGES, strict=True)}


def blocks(text, kind):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def commands(text):
    """Words of every `sdprune VERB ...` in the shell blocks and in the inline code of a page."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines += [" ".join(code.split()) for code in inline]
    found = [re.search(rf"\bsdprune (?:{'|'.join(VERBS)}) .*", line) for line in lines]
    return [shlex.split(one[0], comments=True)[1:] for one in found if one]


SNIPPETS = [snippet for text in TEXTS.values() for snippet in blocks(text, "python")]
FILES = {snippet.split()[1]: snippet for snippet in SNIPPETS if snippet.startswith("# ")}
COMMANDS = [(page, words) for page, text in TEXTS.items() for words in commands(text)]


@pytest.fixture
def here(miniature, tmp_path, monkeypatch):
    """A working directory with the files that the pages name."""
    for name, snippet in FILES.items():
        (tmp_path / name).write_text(snippet)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "config.yaml").write_text((ROOT / "configs/mini/predict.yaml").read_text())
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


def anchors(text):
    """Of the headings of a page, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXTS[page]) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (PLACES[page] / path).resolve()
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(TEXTS[target.relative_to(ROOT).as_posix()]), link


def test_every_page_and_picture_is_linked():
    """Each page from the README, each picture from some page."""
    linked = {
        (PLACES[page] / link.partition("#")[0]).resolve(): page
        for page in reversed(TEXTS)  # the README last, so that it counts
        for link in re.findall(r"\]\(([^)]+)\)", TEXTS[page])
    }
    for path in (ROOT / "docs").iterdir():
        assert path in linked, path
        assert path.suffix != ".md" or linked[path] == "README.md", path


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda one: one if isinstance(one, str) else " ".join(one))
def test_every_command_parses(sdprune, here, page, words):
    verb, *rest = words
    if verb == "report":
        told = sdprune(*words)
        assert (told.code, "No finished run below" in told.err) == (2, True), told.err
    elif verb in ("pack", "unpack"):
        told = sdprune(*words)
        assert (told.code, f"{rest[0]} is no directory" in told.err) == (2, True), told.err
    elif verb == "push":
        told = sdprune(*words)
        assert (told.code, f"{rest[0]} has no model_index.json" in told.err) == (2, True), told.err
    elif verb == "inspect":
        assert vars(INSPECT.parse(rest))["model"]
    elif verb == "lossless":
        assert vars(LOSSLESS.parse(rest))["out"]
    elif verb == "sweep":
        told = sdprune(verb, *(one for word in rest for one in smaller(word, here)), "--dry-run")
        assert (told.code, told.err) == (0, "")
    else:
        told = sdprune(*words, *([] if "--help" in words else ["--print_config"]))
        assert (told.code, told.err) == (0, "")


def smaller(word, directory):
    """A sweep of one cell in place of a shipped one, so that its command is checked once; other words as they are."""
    if word.startswith("-"):
        return [word]
    paths = sorted(ROOT.glob(word)) if "*" in word else [located("sweep", "wandb_sweeps", word)]
    assert paths, word
    for path in paths:
        sweep = yaml.safe_load(path.read_text())
        for values in sweep["parameters"].values():
            values["values"] = values.pop("values", [values.pop("value", None)])[-1:]
        (directory / path.name).write_text(yaml.safe_dump(sweep))
    return [str(directory / path.name) for path in paths]


def test_the_commands_are_found():
    assert len(COMMANDS) > 30
    assert {words[0] for _, words in COMMANDS} == set(VERBS)
    assert {"shifted.py", "brightness.py"} <= FILES.keys()


def test_the_python_runs(capsys):
    (text,) = (snippet for snippet in SNIPPETS if "inputs=" in snippet)
    exec(text, {})
    assert capsys.readouterr().out == "16384 of 32768\n"


def test_the_criterion_prunes_what_it_says(here):
    from shifted import Shifted

    layer = torch.nn.Linear(8, 6)
    dense = layer.weight.detach().clone()
    package.prune(layer, sparsity=0.5, criterion=Shifted(shift=0.2), granularity="layer")
    lowest = sorted((abs(weight + 0.2), place) for place, weight in enumerate(dense.flatten().tolist()))[:24]
    assert sorted(place for _, place in lowest) == (layer.weight == 0).flatten().nonzero().flatten().tolist()


def test_the_folder_picture_shows_what_there_is():
    page = TEXTS["docs/architecture.md"]
    (picture,) = (block for block in blocks(page, "") if "sdprune/\n" in block)
    shown, parents = set(), {}
    for line in picture.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        parents = {depth: parent for depth, parent in parents.items() if depth < indent}
        path = ROOT.joinpath(*parents.values(), name)
        assert path.is_dir() if name.endswith("/") else path.is_file(), name
        parents[indent] = name
        shown.add(path)
    folders = {path.parent for path in (ROOT / "sdprune").glob("*/__init__.py")} | {ROOT / "sdprune/calibration"}
    assert folders <= shown
    for name in re.findall(r"`((?:sdprune|tests|configs|docs)/[\w./]+)`", " ".join(TEXTS.values())):
        assert (ROOT / name).exists(), name
