"""The study's tables, from records."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from io import StringIO
from itertools import product
from pathlib import Path

import torch

from sdprune.errors import InputError
from sdprune.metrics.paired import normal_interval
from sdprune.study.group import Study
from sdprune.study.markdown import escape
from sdprune.study.records import DENSE, Pruned, Run

TOTALS, SHARES = (0.2, 0.3, 0.4, 0.5, 0.6), (0.75, 0.5, 0.25)
STEPS = tuple((round(0.625 - i * 0.025, 4), round(0.5 - i * 0.025, 4)) for i in range(9))
MISSING = "missing"


@dataclass
class Table:
    """A title and rows of text.

    Args:
        name: for file names and links.
        title: for people.
        columns: heads.
        rows: cells, one for each column.
        note: a line below.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """As GitHub reads it."""
        head, *rows = [f"| {' | '.join(map(escape, row))} |" for row in (self.columns, *self.rows)]
        lines = [f"### {escape(self.title)}", "", head, f"|{' --- |' * len(self.columns)}", *rows]
        return "\n".join([*lines, "", *([escape(self.note), ""] if self.note else [])])

    def csv(self) -> str:
        """With a head."""
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return text.getvalue()


@dataclass(frozen=True)
class Reference:
    """Results of others, in the authors' own format: by methods and sparsities, the FID and the CLIP score.

    Args:
        name: head of its columns.
        values: (text method, U-Net method, text sparsity, U-Net sparsity) -> (FID, CLIP score).
    """

    name: str
    values: dict[tuple[str, str, float, float], tuple[float, float]]

    @classmethod
    def load(cls, path: Path, name: str) -> Reference:
        """Read a CSV with text_method, unet_method, text_sparsity, unet_sparsity, fid and clip_score.

        Raises:
            InputError: it cannot be read, or has not these columns.
        """
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            values = {}
            for row in rows:
                text, unet = (round(float(row[f"{part}_sparsity"]), 4) for part in ("text", "unet"))
                values[row["text_method"], row["unet_method"], text, unet] = (
                    float(row["fid"]),
                    float(row["clip_score"]),
                )
        except (OSError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} is no file of results ({type(error).__name__}: {error}): expected a CSV with text_method, "
                "unet_method, text_sparsity, unet_sparsity, fid and clip_score."
            ) from error
        return cls(name, values)

    def find(self, text: Pruned, image: Pruned) -> tuple[float, float] | None:
        """(FID, CLIP score); the method of a component that is left dense does not matter."""
        for (text_method, image_method, *amounts), found in self.values.items():
            if (
                amounts == [round(text.sparsity, 4), round(image.sparsity, 4)]
                and (not text.sparsity or text_method == text.method)
                and (not image.sparsity or image_method == image.method)
            ):
                return found
        return None


def published() -> Reference:
    """The study's Tables 2, 5, 6, 9 and 10."""
    return Reference.load(Path(str(files("sdprune.study") / "published_tables.csv")), "published")


def tables(study: Study, references: Sequence[Reference]) -> list[Table]:
    """Tables 1 to 10, then what else is known of every run."""
    lists = _Lists(study, references)
    made = [_budgets(study), lists.rows("2", "The best models with one component pruned", [
        (Pruned("owl_magnitude", 0.6), Pruned("magnitude", 0.0)), (Pruned("magnitude", 0.0), Pruned("magnitude", 0.4)),
    ])]  # fmt: skip
    for method, numbers, told in (
        ("magnitude", ("3", "4", "5", "6"), "magnitude"),
        ("owl_magnitude", ("7", "8", "9", "10"), "magnitude, with OWL on the text encoder"),
    ):
        pairs = {(total, share): study.split(total, share) for total, share in product(TOTALS, SHARES)}
        for number, metric, name in zip(numbers, ("fid", "clip_score"), ("FID", "CLIP score"), strict=False):
            title = f"{name} by total and text : image share, {told}"
            made.append(_matrix(study, number, title, metric, pairs, method))
        splits = [(Pruned(method, p[0]), Pruned("magnitude", p[1])) for p in pairs.values() if p is not None]
        made.append(lists.rows(numbers[2], f"A total shared out in three ways, {told}", splits))
        steps = [(Pruned(method, t), Pruned("magnitude", u)) for t, u in STEPS]
        dense = (Pruned(method, 0.0), Pruned("magnitude", 0.0))
        made.append(lists.rows(numbers[3], f"Both components, down from the drop-off points, {told}", [dense, *steps]))
    others = [run for run in study.runs if run.directory not in study.shown]  # before the claims look for pairs
    return [
        *made,
        *([_others(study, others)] if others else []),
        _drop_offs(study),
        _findings(study),
        lists.everything(),
    ]


def _number(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _cell(study: Study, pair: tuple[Pruned, Pruned], metric: str, digits: int) -> str:
    """The score of a pair's run; where several runs answer, how many."""
    run = study.find(*pair)
    if run is None:
        return f"{count} runs" if (count := len(study.candidates(*pair))) else MISSING
    return _number(run.metrics.get(metric), digits)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _change(run: Run | None, metric: str) -> str:
    found = run.difference(metric) if run is not None else None
    if found is None:
        return ""
    interval = "" if found.low is None else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.value:+.3f}{interval}"


def _budgets(study: Study) -> Table:
    rows = []
    for total, share in product(TOTALS, SHARES):
        found = study.split(total, share)
        ratio = f"{share * 100:.0f}:{100 - share * 100:.0f}"
        rows.append([f"{total:.0%}", ratio, *(["infeasible"] * 2 if found is None else [f"{s:.0%}" for s in found])])
    note = "By the parameters of this model's components: s_text = total * share * (P_text + P_unet) / P_text."
    return Table(
        "table1", "Table 1. Sparsities by total and share", ["total", "text : image", "text", "image"], rows, note
    )


def _matrix(
    study: Study, number: str, title: str, metric: str, pairs: dict[tuple[float, float], tuple[float, float] | None],
    method: str,
) -> Table:  # fmt: skip
    rows = []
    for total in TOTALS:
        row = [f"{total:.0%}"]
        for share in SHARES:
            amounts = pairs[total, share]
            if amounts is None:
                row.append("N/A")
                continue
            pair = Pruned(method, amounts[0]), Pruned("magnitude", amounts[1])
            row.append(_cell(study, pair, metric, 3 if metric != "fid" else 2))
        rows.append(row)
    return Table(f"table{number}", f"Table {number}. {title}", ["total", "75:25", "50:50", "25:75"], rows)


class _Lists:
    """Tables with a row for each run.

    Args:
        study: the runs.
        references: what stands beside.
    """

    def __init__(self, study: Study, references: Sequence[Reference]) -> None:
        self.study, self.references = study, references

    def rows(self, number: str, title: str, wanted: Sequence[tuple[Pruned, Pruned]]) -> Table:
        columns = ["nominal", "zeros", "text", "image", "FID", "CLIP score", "FID - dense", "CLIP score - dense"]
        for reference in self.references:
            columns += [f"{name} {reference.name}" for name in ("FID", "CLIP score")]
            columns += [f"{name} - {reference.name}" for name in ("FID", "CLIP score")]
        rows = [self._row(*pair) for pair in wanted]
        found = [self.study.find(*pair) for pair in wanted]
        choices = ["" if run is None else self._choices(run) for run in found]
        if any(choices):
            columns.append("choices")
            rows = [[*row, words] for row, words in zip(rows, choices, strict=True)]
        return Table(f"table{number}", f"Table {number}. {title}", columns, rows)

    def _choices(self, run: Run) -> str:
        """The pruning's choices that vary among the runs of its methods, where they do."""
        told = [
            (kind, self.study.name(run, text).partition(", ")[2]) for kind, text in (("text", True), ("image", False))
        ]
        return "; ".join(f"{kind}: {words}" for kind, words in told if words)

    def _row(self, text: Pruned, image: Pruned) -> list[str]:
        run = self.study.find(text, image)
        row = [_percent(run.nominal) if run else MISSING, _percent(run.zeros["prunable"]) if run else MISSING]
        row += [_percent(text.sparsity), _percent(image.sparsity)]
        scores = [run.metrics.get(metric) if run else None for metric in ("fid", "clip_score")]
        row += [_cell(self.study, (text, image), metric, digits) for metric, digits in (("fid", 2), ("clip_score", 3))]
        row += [_change(run, metric) for metric in ("fid", "clip_score")]
        for reference in self.references:
            found = reference.find(text, image) or (None, None)
            row += [_number(found[0], 2), _number(found[1])]
            row += [
                "" if own is None or other is None else f"{own - other:+.{digits}f}"
                for own, other, digits in zip(scores, found, (2, 3), strict=True)
            ]
        return row

    def everything(self) -> Table:
        """One row a run, with all that was counted and measured."""
        metrics = sorted({name for run in self.study.runs for name in run.metrics})
        changes = sorted({name for run in self.study.runs for name in run.comparison})
        columns = ["run", "text method", "text", "image method", "image", "nominal", "zeros of targets"]
        columns += ["zeros of components", "zeros of pipeline", "n", *metrics, *changes]
        rows = []
        for run in self.study.runs:
            row = [run.name]
            for text in (True, False):
                row += [self.study.name(run, text), f"{run.component(text).pruned.sparsity:g}"]
            row += [f"{share:.6f}" for share in (run.nominal, *run.zeros.values())]
            values = [run.metrics.get(name) for name in metrics]
            values += [run.comparison.get(name) for name in changes]
            rows.append([*row, str(run.n), *("" if value is None else f"{value:.6g}" for value in values)])
        return Table("runs", "All runs", columns, rows)


def _others(study: Study, runs: Sequence[Run]) -> Table:
    """The runs that are in none of the study's tables, each with its scores."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics if not name.endswith("_se")))
    compared = [name for name in metrics if any(run.difference(name) for run in runs)]
    columns = ["run", "text encoder", "image", "zeros", *metrics, *(f"{name} - dense" for name in compared)]
    rows = []
    for run in runs:
        row = [run.name]
        for text in (True, False):
            amount = run.component(text).pruned.sparsity
            row.append(f"{study.name(run, text)} {_percent(amount)}".lstrip() if amount else "dense")
        row += [_percent(run.zeros["prunable"]), *(_number(run.metrics.get(name)) for name in metrics)]
        rows.append([*row, *(_change(run, name) for name in compared)])
    return Table("others", "All other runs", columns, rows, "Differences are to the dense model, with 95 % intervals.")


def _drop_offs(study: Study) -> Table:
    """The highest sparsity up to which the CLIP score, by its interval, surely lost no more than a share."""
    rows = []
    for text in (True, False):
        for line in study.alone(text):
            row = ["text encoder" if text else "image", line.name]
            for tolerated in (0.01, 0.02, 0.05):
                row.append(_last_within(study, line.runs, tolerated))
            rows.append(row)
    note = (
        "The highest measured sparsity at which, as at every lower one, the worse end of the CLIP score's interval "
        "lost at most this share of the dense score: what may be pruned safely, one component at a time."
    )
    return Table("dropoffs", "Drop-off points", ["component", "method", "1 %", "2 %", "5 %"], rows, note)


def _last_within(study: Study, runs: Sequence[Run], tolerated: float) -> str:
    dense = study.dense.metrics.get("clip_score") if study.dense else None
    last = None
    for run in runs:
        found = run.difference("clip_score")
        if dense is None or found is None or found.low is None:
            return MISSING
        if found.low < -tolerated * dense:
            break
        last = max(run.text.pruned.sparsity, run.image.pruned.sparsity)
    return "below all" if last is None else _percent(last)


def _findings(study: Study) -> Table:
    """The study's claims, each as paired comparisons of two models' CLIP scores over the same images."""
    amounts_of = {run.text.pruned for run in study.runs if run.image.pruned == DENSE}
    splits = {pair: study.split(*pair) for pair in product(TOTALS, SHARES)}

    def same_sparsity(one: str, other: str) -> list[tuple[Run, Run]]:
        amounts = sorted(pruned.sparsity for pruned in amounts_of if pruned.method == one)
        pairs = [tuple(study.find(Pruned(method, amount), DENSE) for method in (one, other)) for amount in amounts]
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    def shared(method: str, share: float) -> list[tuple[Run, Run]]:
        pairs = []
        for total in TOTALS:
            amounts = [splits[total, 0.25], splits[total, share]]
            if None in amounts:
                continue
            runs = [study.find(Pruned(method, a[0]), Pruned("magnitude", a[1])) for a in amounts if a is not None]
            pairs += [(runs[0], runs[1])] if runs[0] is not None and runs[1] is not None else []
        return pairs

    def both(take: Callable[[float, float], tuple[Pruned, Pruned]]) -> list[tuple[Run, Run]]:
        pairs = []
        for text, image in STEPS:
            joint = study.find(Pruned("magnitude", text), Pruned("magnitude", image))
            single = study.find(*take(text, image))
            pairs += [(single, joint)] if single is not None and joint is not None else []
        return pairs

    claims = [
        ("Text encoder: magnitude is better than Wanda", same_sparsity("magnitude", "wanda")),
        ("Text encoder: OWL improves magnitude", same_sparsity("owl_magnitude", "magnitude")),
        ("Text encoder: OWL improves Wanda", same_sparsity("owl_wanda", "wanda")),
        ("A total is better spent 25:75 than 50:50", shared("magnitude", 0.5)),
        ("A total is better spent 25:75 than 75:25", shared("magnitude", 0.75)),
        (
            "Pruning both loses more than the text encoder alone",
            both(lambda t, u: (Pruned("magnitude", t), DENSE)),
        ),
        ("Pruning both loses more than the U-Net alone", both(lambda t, u: (DENSE, Pruned("magnitude", u)))),
    ]
    rows = [[claim, *_outcome(pairs)] for claim, pairs in claims]
    note = (
        "Each pair is two models drawn from the same prompts and noise; a pair decides when the 95 % interval of the "
        "difference of their CLIP scores leaves 0 out. With so many pairs one in twenty decides by chance."
    )
    columns = ["the study says", "pairs", "for it", "against it", "undecided", "mean difference"]
    return Table("findings", "What of the study holds here", columns, rows, note)


def _outcome(pairs: Sequence[tuple[Run, Run]]) -> list[str]:
    counts = {"for": 0, "against": 0, "open": 0}
    means = []
    for better, worse in pairs:
        one, other = better.clip_scores, worse.clip_scores
        if one is None or other is None or len(one) < 2:
            continue
        shares = torch.from_numpy(one - other)
        found = normal_interval(float(shares.mean()), shares)
        counts["for" if found.low > 0 else "against" if found.high < 0 else "open"] += 1
        means.append(found.estimate)
    told = f"{sum(means) / len(means):+.4f}" if means else MISSING
    return [str(sum(counts.values())), *(str(count) for count in counts.values()), told]
