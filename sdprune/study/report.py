"""From records to tables and figures: CSV, Markdown and one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sdprune.errors import InputError
from sdprune.record import replacing, require_writable
from sdprune.study.figures import Figure, figures
from sdprune.study.records import Study, read
from sdprune.study.tables import Reference, published, tables
from sdprune.study.usage import REPORT as HELP


def run(arguments: Sequence[str]) -> int:
    """Write the report.

    Args:
        arguments: of `sdprune report`.

    Returns:
        The exit code.

    Raises:
        InputError: unknown options, directories without finished runs, a reference that cannot be read.
    """
    directories = [word for word in arguments if not word.startswith("-")]
    options = dict(word.lstrip("-").partition("=")[::2] for word in arguments if word.startswith("-"))
    if not directories or {"help", "h"} & set(options):
        print(HELP, end="")
        return 0
    for name, value in options.items():
        if name not in ("out", "reference"):
            raise InputError(f"Unknown option --{name} of sdprune report. Choices: --out=DIR, --reference=FILE.")
        if not value:
            raise InputError(f"--{name} wants a value, as in --{name}=PATH.")
    given = [Reference.load(Path(options["reference"]), "reference")] if "reference" in options else []
    out = Path(options.get("out") or Path(directories[0]) / "report")
    studies, infeasible = read(directories)
    require_writable(out, "--out")
    sections = []
    for number, study in enumerate(studies):
        beside = [*([published()] if study.is_sd2 else []), *given]
        sections.append(_section(study, beside, out, f"{number + 1}_" if number else ""))
    told = sorted({f"{one['label'].rsplit('-', 1)[0]}: {one['infeasible']}" for one in infeasible})
    _write(out / "report.md", _markdown(sections, told).encode())
    _write(out / "report.html", _html(sections, told).encode())
    runs = sum(len(study.runs) for study in studies)
    print(f"{runs} runs in {len(studies)} comparable group{'s' * (len(studies) > 1)}: {out / 'report.html'}")
    return 0


def _section(study: Study, references: Sequence[Reference], out: Path, prefix: str) -> dict[str, Any]:
    made = tables(study, references)
    drawn = figures(study)
    for table in made:
        _write(out / "tables" / f"{prefix}{table.name}.csv", table.csv().encode())
    for figure in drawn:
        figure.name = f"{prefix}{figure.name}"
        _write(out / "figures" / figure.name, figure.content)
    flawed = [(run.directory.name, run.results["images"]) for run in study.runs if run.results["images"]["flawed"]]
    return {"title": study.title, "runs": len(study.runs), "tables": made, "figures": drawn, "flawed": flawed}


def _markdown(sections: Sequence[dict[str, Any]], infeasible: Sequence[str]) -> str:
    lines = ["# Report", ""]
    for section in sections:
        lines += [f"## {section['title']}", "", f"{section['runs']} runs.", ""]
        lines += [table.markdown() for table in section["tables"] if table.name != "runs"]
        for figure in section["figures"]:
            lines += [f"### {figure.caption}", "", f"![{figure.caption}](figures/{figure.name})", ""]
    if infeasible:
        lines += ["## Infeasible budgets", "", *(f"- {line}" for line in infeasible), ""]
    return "\n".join(lines)


def _html(sections: Sequence[dict[str, Any]], infeasible: Sequence[str]) -> str:
    from jinja2 import Environment

    page = (files("sdprune.study") / "report.html").read_text()
    environment = Environment(autoescape=True)
    environment.filters["uri"] = _uri
    return environment.from_string(page).render(sections=sections, infeasible=infeasible)


def _uri(figure: Figure) -> str:
    kind = "image/svg+xml" if figure.name.endswith(".svg") else "image/png"
    return f"data:{kind};base64,{base64.b64encode(figure.content).decode()}"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
