"""From records to tables and figures: CSV, Markdown and one self-contained HTML page."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sdprune.errors import InputError
from sdprune.files import replacing, require_writable
from sdprune.study.figures import Figure, figures
from sdprune.study.group import Study
from sdprune.study.markdown import escape
from sdprune.study.reading import Found, read
from sdprune.study.tables import Reference, published, tables
from sdprune.study.usage import Flags, path


def run(arguments: Sequence[str]) -> int:
    """Write the report.

    Args:
        arguments: of `sdprune report`.

    Returns:
        The exit code.

    Raises:
        InputError: unknown options, directories without finished runs, a reference that cannot be read.
    """
    flags = Flags("report")
    flags.add_argument("--out", type=path)
    flags.add_argument("--reference", type=path)
    options, directories = flags.read(arguments)
    if not directories:
        raise InputError("sdprune report wants a directory of runs, as in: sdprune report runs.")
    given = [Reference.load(Path(options.reference), "reference")] if options.reference else []
    out = Path(options.out or Path(directories[0]) / "report")
    found = read(directories)
    require_writable(out, "--out")
    sections = []
    for number, study in enumerate(found.studies):
        beside = [*([published()] if study.is_sd2 else []), *given]
        sections.append(_section(study, beside, out, f"{number + 1}_" if number else ""))
    _write(out / "report.md", _markdown(sections, found).encode())
    _write(out / "report.html", _html(sections, found).encode())
    runs, groups = sum(len(study.runs) for study in found.studies), len(found.studies)
    for line in [f"left out: {one}" for one in found.left_out] + [line for one in found.studies for line in one.notes]:
        print(f"sdprune: {line}", file=sys.stderr)
    print(f"{runs} runs in {groups} comparable group{'s' * (groups > 1)}: {out / 'report.html'}")
    return 0


def _section(study: Study, references: Sequence[Reference], out: Path, prefix: str) -> dict[str, Any]:
    made = tables(study, references)
    drawn = figures(study)
    for table in made:
        _write(out / "tables" / f"{prefix}{table.name}.csv", table.csv().encode())
    for figure in drawn:
        figure.name = f"{prefix}{figure.name}"
        _write(out / "figures" / figure.name, figure.content)
    invalid = [(run.name, run.images) for run in study.runs if run.images["invalid"]]
    return {
        "title": study.title, "runs": len(study.runs), "tables": made, "figures": drawn, "invalid": invalid,
        "notes": study.notes, "prefix": prefix,
    }  # fmt: skip


def _markdown(sections: Sequence[dict[str, Any]], found: Found) -> str:
    lines = ["# Report", ""]
    for section in sections:
        everything = f"All that was counted and measured of each is in tables/{section['prefix']}runs.csv."
        lines += [f"## {escape(section['title'])}", "", f"{section['runs']} runs. {everything}", ""]
        lines += [table.markdown() for table in section["tables"] if table.name != "runs"]
        for figure in section["figures"]:
            caption = escape(figure.caption)
            lines += [f"### {caption}", "", f"![{caption}](figures/{figure.name})", ""]
        lines += _list("### Notes", section["notes"])
    lines += _list("## Infeasible budgets", found.infeasible)
    lines += _list("## Left out", map(str, found.left_out))
    return "\n".join(lines)


def _list(title: str, items: Iterable[str]) -> list[str]:
    lines = [f"- {escape(item)}" for item in items]
    return [title, "", *lines, ""] if lines else []


def _html(sections: Sequence[dict[str, Any]], found: Found) -> str:
    from jinja2 import Environment

    page = (files("sdprune.study") / "report.html").read_text()
    environment = Environment(autoescape=True)
    environment.filters["uri"] = _uri
    return environment.from_string(page).render(sections=sections, found=found)


def _uri(figure: Figure) -> str:
    kind = "image/svg+xml" if figure.name.endswith(".svg") else "image/png"
    return f"data:{kind};base64,{base64.b64encode(figure.content).decode()}"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
