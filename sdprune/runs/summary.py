"""What a finished run tells a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from sdprune.pruning import scopes
from sdprune.runs.record import Record

_ZEROS = 1e-3
"""Largest share of zeros in a model that was not pruned."""


def show(record: Record, console: Console | None = None, already: bool = False) -> None:
    """Print a finished run: scores, differences to the dense model, sparsities, where things lie.

    Args:
        record: of the run.
        console: where tables go.
        already: it was finished before, and nothing was done now.
    """
    console = console or Console(width=None if Console().is_terminal else 110)
    results = record.results
    if already:
        when = results.get("speed", {}).get("finished", "before")
        print(f"This run was finished already, {when}: nothing is drawn again.")
    if "infeasible" in results:
        print(f"Infeasible: {results['infeasible']}\nresults    {record.directory / 'results.json'}")
        return
    console.print(_scores(results))
    if results["pruning"] or results["sparsity"]["pipeline"]["zero_fraction"] > _ZEROS:
        console.print(_sparsities(results["sparsity"]))
    for name, found in results.get("narrowing", {}).items():
        print(f"{name} is narrowed: {narrowed_line(found)}")
    if "path" in (results.get("budget") or {}):
        print(path_table(results["budget"]))
    if distances := _distances(results):
        console.print(f"distance to the dense model's images: {distances}", highlight=False)
    for remark in (line for lines in results["remarks"].values() for line in lines):
        console.print(remark, style="bold red", highlight=False)
    images = results["images"]
    if images["invalid"]:
        console.print(
            f"{images['black']} images are wholly black, {images['not_finite']} came out of numbers that are not "
            f"finite; they count in every score. Ids: {', '.join(map(str, images['invalid'][:10]))}",
            style="bold red",
            highlight=False,
        )  # fmt: skip
    speed = results["speed"]
    rate = (
        f"{speed['generated']} drawn, {speed['images_per_second']:.1f} a second" if speed["generated"] else "none drawn"
    )
    console.print(
        f"{results['n']} images ({rate}), {speed['peak_memory_bytes'] / 2**30:.1f} GiB at most", highlight=False
    )
    if results["data"].get("truncated"):
        count = results["data"]["truncated"]
        console.print(f"{count} captions were longer than the pipeline's first tokenizer takes", highlight=False)
    print(f"pictures   {record.directory / 'grid.png'}")
    print(f"results    {record.directory / 'results.json'}")


def narrowed_line(found: Mapping[str, Any]) -> str:
    """What a component kept when it was narrowed."""
    kinds = [f"{one['kept']:,} of {one['units']:,} {kind}" for kind, one in found["kinds"].items()]
    after, before = found["parameters"], found["parameters_before"]
    return f"{', '.join(kinds)} stay; {after:,} of {before:,} parameters ({after / before:.1%})"


def _scores(results: dict[str, Any]) -> Table:
    metrics, against = results["metrics"], results["comparison"]
    table = Table(title=results["label"].rsplit("-", 1)[0])
    table.add_column("score")
    table.add_column("this run", justify="right")
    if against:
        table.add_column("dense", justify="right")
        table.add_column("difference", justify="right")
        table.add_column("95 % interval", justify="right")
        table.add_column("verdict")
    for name, value in metrics.items():
        if name.endswith("_se"):
            continue
        row = [_title(name), _number(value)]
        if f"{name}_diff" in against:
            difference = against[f"{name}_diff"]
            interval = [against.get(f"{name}_diff_{end}") for end in ("low", "high")]
            row += [_number(value - difference), f"{difference:+.4f}"]
            row.append("" if None in interval else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]".replace("[", r"\["))
            row.append(_verdict(results["verdicts"].get(name)))
        table.add_row(*row)
    return table


def path_table(budget: Mapping[str, Any]) -> str:
    """Plain lines: what measured errors say of each total; the budget's own one is marked."""
    rows = [["total", *budget["sparsities"], "error"]]
    for one in budget["path"]:
        shares = (one["total"], *one["sparsities"].values())
        rows.append([*(f"{100 * share:.2f} %" for share in shares), f"{one['error']:.3g}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    marks = [" ", *(">" if one["total"] == budget["total"] else " " for one in budget["path"])]
    lines = ["measured: the error of the denoiser's prediction, by total and sparsity of the targeted weights"]
    for mark, row in zip(marks, rows, strict=True):
        lines.append("  ".join([mark + " " + row[0].rjust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))
    return "\n".join(lines)


def _verdict(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    tolerated = f"{100 * found['tolerance']:g} %"
    return {
        "within": f"within {tolerated}", "beyond": f"worse by more than {tolerated}", "undecided": "undecided"
    }[found["verdict"]]  # fmt: skip


def _distances(results: dict[str, Any]) -> str:
    against = results["comparison"]
    names = [name for name in against if name != "dense" and "_diff" not in name]
    lines = []
    for name in names:
        if not name.endswith(("_low", "_high", "_se")):
            ends = [against.get(f"{name}_{end}") for end in ("low", "high")]
            interval = "" if None in ends else f" [{ends[0]:.4f}, {ends[1]:.4f}]"
            lines.append(f"{name} {against[name]:.4f}{interval}")
    return ", ".join(lines)


def _title(name: str) -> str:
    hints = {
        "fid": "lower is better",
        "clip_score": "cosine, higher is better",
        "clip_gap": "own minus other prompts",
        "fid_infinity": "lower is better",
        "kid": "lower is better",
        "mmd": "lower is better",
        "cmmd": "lower is better",
        "precision": "higher is better",
        "recall": "higher is better",
    }
    return f"{name} ({hints[name]})" if name in hints else name


def _number(value: float) -> str:
    return f"{value:.4f}"


def _sparsities(sparsity: dict[str, Any]) -> Table:
    table = Table(title=f"sparsity reached (nominal {sparsity['nominal']:.2%})")
    for column in ("of", "pruned", "zero", "weights"):
        table.add_column(column, justify="left" if column == "of" else "right")
    for name, whole in scopes(sparsity).items():
        shares = (f"{whole['pruned_fraction']:.2%}", f"{whole['zero_fraction']:.2%}", f"{whole['parameters']:,}")
        table.add_row(name, *shares)
    return table
