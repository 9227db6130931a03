"""From records to tables and figures: CSV, Markdown and one self-contained HTML page."""

from __future__ import annotations

import base64
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from sdprune.files import replacing, require_writable
from sdprune.study.figures import Figure
from sdprune.study.group import Study
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
    groups = [Study(runs) for _, runs in found.runs.groupby("group")]
    groups.sort(key=lambda study: -len(study.runs))
    sections = [
        _section(study, references, out, f"{number}_" if number > 1 else "") for number, study in enumerate(groups, 1)
    ]
    environment = Environment()
    environment.filters |= {"uri": _uri, "escaped": escape}
    for page in ("report.md", "report.html"):
        environment.autoescape = page == "report.html"
        template = environment.from_string((files("sdprune.study") / page).read_text())
        _write(out / page, template.render(sections=sections, found=found).encode())
    notes = [line for section in sections for line in section["notes"]]
    for line in [*(f"left out: {one}" for one in found.left_out), *notes]:
        print(f"sdprune: {line}", file=sys.stderr)
    groups_of = f"{len(groups)} comparable group{'s' * (len(groups) > 1)}"
    print(f"{len(found.runs)} runs in {groups_of}: {out / 'report.html'}")
    return 0


def _section(study: Study, references: Mapping[str, Scores], out: Path, prefix: str) -> dict[str, Any]:
    """Write a group's tables and figures, and return what the pages show of it."""
    tables = report_tables(study, {**published(study), **references})
    figures = [figure._replace(name=f"{prefix}{figure.name}") for figure in report_figures(study)]
    for table in tables:
        _write(
            out / "tables" / f"{prefix}{table.name}.csv", table.cells.to_csv(index=False, lineterminator="\n").encode()
        )
    for figure in figures:
        _write(out / "figures" / figure.name, figure.content)
    return {
        "title": study.runs["title"].iloc[0], "runs": len(study.runs), "tables": tables, "figures": figures,
        "invalid": study.runs[study.runs["invalid"] > 0].to_dict("records"), "notes": list(dict.fromkeys(study.notes)),
        "prefix": prefix,
    }  # fmt: skip


def _uri(figure: Figure) -> str:
    kind = "image/svg+xml" if figure.name.endswith(".svg") else "image/png"
    return f"data:{kind};base64,{base64.b64encode(figure.content).decode()}"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
