"""What the page's script knows of a group of runs, as JSON values."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd

from sdprune.runs.record import Record
from sdprune.study.figures import damaged_sample
from sdprune.study.group import Study, number
from sdprune.study.methods import KINDS
from sdprune.study.page.pictures import COLUMNS, Pictures, all_of
from sdprune.study.page.prompts import SHOWN, Prompts

SAFE = 0.02
"""Share of the dense model's score; runs that surely lost no more of it come first."""
_LOWER = ("fid", "fid_infinity", "kid", "mmd", "cmmd", "dense_feature_distance")
_HIGHER = ("clip_score", "clip_gap", "correct", "precision", "recall", "dense_ssim", "dense_psnr")
_WORDS = {
    "fid": "FID",
    "fid_infinity": "FID at infinity",
    "clip_score": "CLIP score",
    "clip_gap": "CLIP gap",
    "kid": "KID",
    "mmd": "MMD",
    "cmmd": "CMMD",
}
_COMPARED = {"dense_ssim": "SSIM to the dense model's images", "dense_psnr": "PSNR to the dense model's images, dB",
             "dense_feature_distance": "feature distance to the dense model's images"}  # fmt: skip


def as_script(values: Any) -> str:
    """Write values as JSON that may stand in an HTML script element: nothing in it ends that element."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class Measure(NamedTuple):
    """A number that runs have, as the page draws and lists it."""

    key: str
    label: str
    better: str
    """`higher`, `lower`, or empty where this is not known."""
    compared: bool
    """Whether it is a distance to the dense model, and no score of one model alone."""


def measures(study: Study) -> list[Measure]:
    """Return the scores that some run has, the CLIP score and FID first, and then the distances to the dense model."""
    names = [name.removeprefix("metrics/") for name in study.runs if name.startswith("metrics/")]
    names = [name for name in names if not name.endswith("_se")]
    names.sort(key=lambda name: (name != "clip_score", name != "fid"))
    distances = [name for name in _COMPARED if f"comparison/{name}" in study.runs]
    return [
        *(Measure(name, _label(name), _better(name), False) for name in names),
        *(Measure(name, _COMPARED[name], _better(name), True) for name in distances),
    ]


def _label(name: str) -> str:
    return _WORDS.get(name) or name.replace("correct", "share correct", 1).replace("_", " ")


def _better(name: str) -> str:
    if name in _LOWER:
        return "lower"
    return "higher" if name in _HIGHER or name.startswith("correct_") else ""


def group(study: Study, out: Path, pictures: Pictures) -> dict[str, Any]:
    """Return what the script shows of these runs.

    Args:
        study: the runs. Notes on what is damaged are added to its own.
        out: directory of the page, which links start from.
        pictures: where small pictures go. In a page of a single file there are none of captions, and no links to runs.
    """
    shown, ranks, prompts = measures(study), ranking(study), Prompts(study)
    runs = [
        {
            "run": run["run"],
            "name": words(run),
            "series": _series(run),
            "kind": _kind(run),
            "link": address(run["directory"], out) if pictures.folder else None,
            "n": run["n"],
            "rank": ranks[place],
            "lost": _lost(study, run),
            "bad": run["invalid"],
            "axes": _axes(run),
            "values": {one.key: found for one in shown if (found := _value(run, one)) is not None},
            "prompts": prompts.of(run),
        }
        for place, run in study.runs.iterrows()
    ]
    samples = list(dict.fromkeys(prompt for own in study.runs["samples"] for prompt in own))
    directories = [Path(directory) for directory in study.runs["directory"]]

    def add_pictures(run: dict[str, Any], directory: Path, own: list[str]) -> list[str]:
        """Add addresses of pictures to a run; return notes."""
        run["samples"], notes = [None] * len(samples), []
        for place, (prompt, address) in enumerate(zip(own, pictures.samples(directory, len(own)), strict=True)):
            if address is None:
                notes.append(damaged_sample(run["run"], place))
            else:
                run["samples"][samples.index(prompt)] = [address, f"samples/{place}.png"]
        has_sheet = pictures.folder and run["prompts"]
        run["sheet"] = pictures.sheet(directory, _drawn(directory, prompts)) if has_sheet else None
        return notes

    jobs = [partial(add_pictures, *one) for one in zip(runs, directories, study.runs["samples"], strict=True)]
    study.notes += [line for notes in all_of(jobs) for line in notes]
    return {
        "title": study.runs["title"].iloc[0],
        "measures": [one._asdict() for one in shown],
        "axes": _AXES,
        "runs": runs,
        "dense": None if study.dense is None else study.dense.name,
        "safe": SAFE,
        "samples": samples,
        "prompts": prompts.describe(),
        "files": [quote(str(path), errors="replace") for path in _drawn(Path(), prompts)],
        "columns": COLUMNS,
    }


def by_category(shown: Mapping[str, Any]) -> pd.DataFrame:
    """Return what each run of a described group lost by category of prompts, for papers."""
    labels = (shown["prompts"] or {"labels": []})["labels"]
    rows = [
        [run["run"], about, value, n, measure, *means[place]]
        for run in shown["runs"]
        for measure, means in (
            ("clip_score", (run["prompts"] or {}).get("lost", ())),
            ("correct", (run["prompts"] or {}).get("broke", ())),
        )
        for place, (about, value, n) in enumerate(labels)
        if run["kind"] != "dense" and means
    ]
    return pd.DataFrame(rows, columns=["run", "about", "value", "n", "measure", "mean loss", "low", "high"])


def address(path: str | Path, out: Path) -> str:
    """Write a path as an address from the page's directory; what the file system cannot write leads nowhere."""
    return quote(os.path.relpath(path, out), errors="replace")


def _drawn(directory: Path, prompts: Prompts) -> list[Path]:
    """Return where a run keeps the pictures of the first prompts."""
    record = Record(directory, "", {})
    record.directory = directory
    return [record.image_path(name) for name in prompts.files[:SHOWN]]


_AXES = {
    "zeros": "zeros in all prunable components",
    "nominal": "nominal sparsity",
    "own": "requested sparsity",
    "pipeline": "zeros in the whole pipeline",
}


def _axes(run: pd.Series) -> dict[str, float]:
    shares = {
        "zeros": run["zeros of prunable"], "nominal": run["nominal"], "pipeline": run["zeros of pipeline"],
        "own": max(run["text_sparsity"], run["image_sparsity"]),
    }  # fmt: skip
    return {name: round(100 * share, 3) for name, share in shares.items()}


def _value(run: pd.Series, one: Measure) -> list[float | None] | None:
    """Return the number of a run, the ends of its interval, and, of a score, the difference to the dense model."""
    where = "comparison" if one.compared else "metrics"
    value = number(run, f"{where}/{one.key}")
    if value is None:
        return None
    stem = f"comparison/{one.key}" + ("" if one.compared else "_diff")
    low, high = (number(run, f"{stem}_{end}") for end in ("low", "high"))
    if one.compared:
        found = [value, low, high]
    else:
        change = number(run, stem)
        shift = None if change is None else value - change
        found = [value, *(None if shift is None or end is None else shift + end for end in (low, high))]
        found += [change, low, high]
    return [None if one is None else float(f"{one:.6g}") for one in found]


def _parts(run: pd.Series) -> Iterator[tuple[str, str, float]]:
    """Yield the components of each kind that was pruned, their method and their sparsity."""
    texts = list(run["text_encoders"])
    names = {"text": texts, "image": [name for name in run["sizes"] if name not in texts]}
    for kind in KINDS:
        if run[f"{kind}_method"]:
            yield " + ".join(names[kind]), run[f"{kind}_name"], run[f"{kind}_sparsity"]


def words(run: pd.Series) -> str:
    """Name what was pruned, how and how far; `dense` for the dense model."""
    return " + ".join(f"{name} {method} {100 * share:.4g} %" for name, method, share in _parts(run)) or "dense"


def _series(run: pd.Series) -> str:
    return " + ".join(f"{name} {method}" for name, method, _ in _parts(run)) or "dense"


def _kind(run: pd.Series) -> str:
    kinds = [kind for kind in KINDS if run[f"{kind}_method"]]
    return "both" if len(kinds) > 1 else kinds[0] if kinds else "dense"


def _lost(study: Study, run: pd.Series) -> float | None:
    """Return the share of the dense CLIP score that a run lost at most, by the worse end of its interval."""
    dense, low = number(study.dense, "metrics/clip_score"), number(run, "comparison/clip_score_diff_low")
    return None if not dense or low is None else round(max(0.0, -low / abs(dense)), 6)


def ranking(study: Study) -> dict[Any, int]:
    """Rank runs from 1: those that surely lost little, the sparsest first; then the others, what lost least first.

    The dense model has rank 0.
    """

    def key(place: Any) -> tuple[int, float]:
        run = study.runs.loc[place]
        lost = _lost(study, run)
        if lost is None:
            return 2, number(run, "metrics/fid") or 0.0
        return (0, -run["zeros of prunable"]) if lost <= SAFE else (1, lost)

    pruned = [place for place, run in study.runs.iterrows() if _kind(run) != "dense"]
    ranks = {place: rank for rank, place in enumerate(sorted(pruned, key=key), 1)}
    return dict.fromkeys(study.runs.index, 0) | ranks
