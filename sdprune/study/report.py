"""From records to a page to explore, and to the study's tables and figures: HTML, Markdown, SVG, PNG and CSV."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import vl_convert
from jinja2 import Environment
from PIL import Image

from sdprune.files import replacing, require_writable
from sdprune.study.figures import Figure
from sdprune.study.group import Study
from sdprune.study.page.data import address, as_script, by_category, group
from sdprune.study.page.pictures import Pictures
from sdprune.study.ramesh_zhao import Scores, load_reference, published, report_figures, report_tables
from sdprune.study.records import read
from sdprune.study.text import escape
from sdprune.study.usage import REPORT


def run(arguments: Sequence[str]) -> int:
    """Write the report that these arguments of `sdprune report` name, and return the exit code.

    Raises:
        InputError: unknown options, directories without finished runs, a reference that cannot be read.
    """
    options = REPORT.parse(arguments)
    references = {"reference": load_reference(Path(options.reference))} if options.reference else {}
    out = Path(options.out or Path(options.directories[0]) / "report")
    found = read(options.directories)
    require_writable(out, "--out")
    folder = None if options.single_file else out / "pictures"
    if folder:
        require_writable(folder, "--out")
    pictures = Pictures(folder, found.runs["samples"].map(len).sum())
    groups = [Study(runs) for _, runs in found.runs.groupby("group")]
    groups.sort(key=lambda study: -len(study.runs))
    sections = [
        _section(study, references, out, f"{number}_" if number > 1 else "") for number, study in enumerate(groups, 1)
    ]
    data = {"groups": [group(study, out, pictures) for study in groups]}
    for study, section, shown in zip(groups, sections, data["groups"], strict=True):
        section["notes"] = list(dict.fromkeys(study.notes))
        _write_table(out, f"{section['prefix']}categories", by_category(shown))
    _write(out / "report.md", _render("report.md", escape, sections=sections, found=found))
    searches = [
        (one, None if options.single_file else address(Path(one.directory) / "search.svg", out))
        for one in found.searches
    ]
    figures = _address if options.single_file else lambda figure: f"figures/{figure.name}"
    _write(
        out / "report.html",
        _render(
            "page.html", None, sections=sections, found=found, data=as_script(data), address=figures, searches=searches,
            style=_shipped("page.css"), script=_shipped("page.js"), charts=_charts(),
        ),
    )  # fmt: skip
    notes = [line for section in sections for line in section["notes"]]
    for line in [*(f"left out: {one}" for one in found.left_out), *notes]:
        print(f"sdprune: {line}", file=sys.stderr)
    groups_of = f"{len(groups)} comparable group{'s' * (len(groups) > 1)}"
    print(f"{len(found.runs)} runs in {groups_of}: {out / 'report.html'}")
    return 0


@cache
def _charts() -> str:
    """Vega-Embed with Vega-Lite and Vega, as one script without imports."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _shipped(name: str) -> str:
    return (files("sdprune.study.page") / name).read_text(encoding="utf-8")


def _render(name: str, escaped: Callable[[str], str] | None, **values: Any) -> bytes:
    """Fill a template; HTML escapes all texts by itself, Markdown those that pass through the filter `escaped`."""
    environment = Environment(autoescape=escaped is None)
    if escaped is not None:
        environment.filters["escaped"] = escaped
    return environment.from_string(_shipped(name)).render(values).encode()


def _section(study: Study, references: Mapping[str, Scores], out: Path, prefix: str) -> dict[str, Any]:
    """Write a group's tables and figures, and return what the pages show of it."""
    tables = report_tables(study, {**published(study), **references})
    figures = [figure._replace(name=f"{prefix}{figure.name}") for figure in report_figures(study)]
    for table in tables:
        _write_table(out, f"{prefix}{table.name}", table.cells)
    for figure in figures:
        _write(out / "figures" / figure.name, figure.content)
    return {
        "title": study.runs["title"].iloc[0], "runs": len(study.runs), "tables": tables, "figures": figures,
        "invalid": study.runs[study.runs["invalid"] > 0].to_dict("records"), "prefix": prefix,
    }  # fmt: skip


def _address(figure: Figure) -> str:
    """The figure itself as an address; sheets of pictures as JPEG, a fifth of their size in PNG."""
    kind, content = "svg+xml", figure.content
    if figure.name.endswith(".png"):
        kind, file = "jpeg", io.BytesIO()
        Image.open(io.BytesIO(figure.content)).convert("RGB").save(file, "JPEG", quality=88)
        content = file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _write_table(out: Path, name: str, cells: pd.DataFrame) -> None:
    _write(out / "tables" / f"{name}.csv", cells.to_csv(index=False, lineterminator="\n").encode())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
