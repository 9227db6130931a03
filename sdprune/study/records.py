"""Finished runs, read from their directories into one table; what cannot be used is left out, with the reason."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from sdprune.errors import InputError
from sdprune.files import read_json
from sdprune.identity import fingerprint
from sdprune.pipelines.resolve import MINIATURE
from sdprune.runs.comparison import COMPARED, protocol
from sdprune.runs.png import read_png
from sdprune.runs.record import is_whole
from sdprune.study.methods import KINDS, flat_words, pruned
from sdprune.study.text import printable


class Found(NamedTuple):
    """What lies below some directories."""

    runs: pd.DataFrame
    """A row for each run; runs of the same `group` may be compared with each other."""
    infeasible: list[str]
    """Budgets that cannot be met, with the reasons that their records give."""
    left_out: list[str]
    """Damaged or unfinished records, each with the reason."""
    searches: list[SearchFound]
    """Finished searches, which are no runs."""


class SearchFound(NamedTuple):
    """A finished search: its name, its directory, and what it came to in a line."""

    name: str
    directory: str
    answer: str


def read(directories: Iterable[str | Path]) -> Found:
    """Read every record below these directories.

    Raises:
        InputError: a directory that is not there, or no finished record at all.
    """
    roots = [Path(directory) for directory in directories]
    rows: list[dict[str, Any]] = []
    infeasible: set[str] = set()
    left_out: list[str] = []
    searches: list[SearchFound] = []
    groups: list[tuple[str, dict[str, Any]]] = []
    facts: dict[int, dict[str, str]] = {}
    for root in roots:
        if not root.is_dir():
            raise InputError(f"No directory {str(root)!r}: give one that `sdprune predict` wrote runs to.")
    for directory in _walk(roots, left_out):
        try:
            results = read_json(directory / "results.json")
            if not is_whole(results):
                raise InputError("results.json is damaged or of another version: delete it and run again")
            if "search" in results:
                search = results["search"]
                answer = search["claims"][-1] if search["answer"] else "No pruned model could be certified."
                searches.append(SearchFound(printable(directory.name), str(directory), printable(answer)))
                continue
            if "infeasible" in results:
                infeasible.add(printable(f"{results['label'].rpartition('-')[0]}: {results['infeasible']}"))
                continue
            config = read_json(directory / "config.json")
            if fingerprint(config) != results["fingerprint"]:
                raise InputError("config.json is damaged or of another run: delete results.json and run again")
            row = _row(directory, config, results)
            shared = {name: config[name] for name in COMPARED}
            words = flat_words({**shared, "protocol": protocol(results)}, "")
            number = _group(groups, fingerprint(shared), protocol(results))
            facts.setdefault(number, words)
            rows.append({"group": number, **row})
        except InputError as error:
            left_out.append(printable(f"{directory}: {error}"))
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = f"not as this version of sdprune writes it ({type(error).__name__}: {error}): run again"
            left_out.append(printable(f"{directory}: {reason}"))
    if not rows:
        reason = "".join(f"; left out: {one}" for one in left_out[:1])
        raise InputError(
            f"No finished run below {', '.join(map(str, roots))}: run sdprune predict or sweep first{reason}."
        )
    _tell_apart(rows, facts)
    return Found(pd.DataFrame(rows), sorted(infeasible), left_out, searches)


def _group(groups: list[tuple[str, dict[str, Any]]], shared: str, protocols: Mapping[str, Any]) -> int:
    """Return the number of the first group with these facts whose protocols agree; further scores do not matter."""
    for number, (facts, known) in enumerate(groups):
        if facts == shared and all(known.get(name, one) == one for name, one in protocols.items()):
            known |= protocols
            return number
    groups.append((shared, dict(protocols)))
    return len(groups) - 1


def _tell_apart(rows: list[dict[str, Any]], facts: Mapping[int, Mapping[str, str]]) -> None:
    """Begin the titles of groups that are alike with what differs between them: `data seed 1: the miniature, ...`."""
    titles = {row["group"]: row["title"] for row in reversed(rows)}
    words = {}
    for title in set(titles.values()):
        alike = [facts[group] for group in titles if titles[group] == title]
        common = set.intersection(*(set(one) for one in alike))
        differ = [name for name in alike[0] if name in common and len({one[name] for one in alike}) > 1]
        own = [name for name in differ if not name.startswith("protocol ")]  # real images differ with their prompts
        words[title] = (own or differ)[:3]
    for row in rows:
        group = row["group"]
        start = ", ".join(f"{name} {facts[group][name]}" for name in words[titles[group]])
        row["title"] = f"{start}: {row['title']}" if start else row["title"]


def _walk(roots: Iterable[Path], left_out: list[str]) -> Iterator[Path]:
    """Yield each directory with results.json once, also behind symbolic links; add unusable ones to `left_out`."""

    def unreadable(error: OSError) -> None:
        left_out.append(printable(f"{error.filename}: {error.strerror}"))

    seen = set()
    for root in sorted(roots):
        for directory, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
            folders.sort()
            real = os.path.realpath(directory)
            if real in seen or "model_index.json" in files:
                folders.clear()
                continue
            seen.add(real)
            if "results.json" in files:
                folders.clear()
                yield Path(directory)
            elif "config.json" in files and "images" in folders:
                folders.clear()
                left_out.append(printable(f"{directory}: not finished, give its command again"))


def _row(directory: Path, config: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of one run."""
    roles, sparsity, images = results["roles"], results["sparsity"], results["images"]
    names = {kind: [name for name in roles if (roles[name] == "text") == (kind == "text")] for kind in KINDS}
    if not all(names.values()):
        raise InputError(f"its components are {', '.join(roles)}: a report needs a text encoder and a denoiser")
    numbers = {f"{part}/{name}": one for part in ("metrics", "comparison") for name, one in results[part].items()}
    numbers.pop("comparison/dense", None)
    missing = [name for name, number in numbers.items() if not math.isfinite(number)]
    row = {
        "run": printable(directory.name),
        "directory": str(directory),
        "title": _title(config, results),
        "masks": fingerprint(
            {key: config.get(key) for key in ("prune", "calibration", "narrow", "narrow_calibration")}
        ),
        **{column: value for kind in KINDS for column, value in pruned(kind, config, results, names[kind]).items()},
        "n": int(results["n"]),
        "nominal": float(sparsity["nominal"]),
        **{f"zeros of {name}": float(sparsity[name]["zero_fraction"]) for name in ("targets", "prunable", "pipeline")},
        **numbers | dict.fromkeys(missing, math.nan),
        "missing": [name.partition("/")[2] for name in missing],
        "black": images["black"],
        "not_finite": images["not_finite"],
        "invalid": len(images["invalid"]),
        "samples": [printable(prompt) for prompt in results["samples"]],
        "clip_scores": _clip_scores(directory / "rows.npz", results["n"], results["metrics"].get("clip_score")),
        "sizes": {name: sparsity["components"][name]["parameters"] for name in roles},
        "text_encoders": names["text"],
        "sensitivity": _sensitivity(results.get("pruning") or {}),
    }
    shares = [
        row[name] for name in row if name == "nominal" or name.startswith("zeros of") or name.endswith("_sparsity")
    ]
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"its sparsities are {shares}")
    return row


def _title(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Write in one line what runs that may be compared have in common."""
    model = config["pipeline"].get("model")  # a hub id; a local model has the name that its configuration gave it
    name = results.get("model") or "a local model"
    sampling = config["sampling"]
    parts = [
        model if model is not None else "the miniature" if name == MINIATURE else name,
        f"{config['data']['n']} prompts",
        f"{sampling['steps']} steps",
        f"guidance {sampling['guidance']:g}",
        f"seed {config['seed']:g}",
        *sorted({part["protocol"] for part in results["protocols"].values() if "protocol" in part}),
    ]
    return ", ".join(map(printable, parts))


def _sensitivity(pruning: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what was measured of each component, with its criterion; None where nothing was."""
    found = {}
    for name, one in pruning.items():
        if "sensitivity" in one:
            measured, criterion = one["sensitivity"], one["spec"]["criterion"]["class"]
            levels = [float(level) for level in measured["levels"]]
            words = {"criterion": criterion, "unit": measured["unit"], "read_at": measured["read_at"]}
            units = [_unit(unit, len(levels)) for unit in measured["units"]]
            if not levels or not units:
                raise ValueError("nothing was measured")
            found[printable(name)] = {key: printable(word) for key, word in words.items()} | {
                "levels": levels, "units": units,
            }  # fmt: skip
    return found or None


def _unit(unit: Mapping[str, Any], levels: int) -> dict[str, Any]:
    errors = [float(error) for error in unit["errors"]]
    if len(errors) != levels:
        raise ValueError(f"{len(errors)} errors at {levels} levels")
    names = {key: printable(unit[key]) for key in ("name", "block")}
    return {**names, "weights": int(unit["weights"]), "errors": errors}


def _clip_scores(path: Path, n: int, score: float | None) -> np.ndarray | None:
    """Return the cosines [n] of each image and its prompt, by the network whose mean cosine the score is."""
    try:
        with np.load(path, allow_pickle=False) as rows:
            names = [name.removesuffix(".texts") for name in rows if name.endswith(".texts")]
            found = [_cosines(rows[f"{name}.texts"], rows[f"{name}.features"]) for name in names]
        if not found or score is None:
            return None
        cosines = min(found, key=lambda one: abs(one.mean() - score))
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise InputError(f"rows.npz is missing or damaged ({printable(str(error))[:80]})") from error
    if cosines.shape != (n,) or not np.isfinite(cosines).all():
        raise InputError(f"rows.npz is damaged: its CLIP rows do not give {n} finite cosines")
    return cosines


def _cosines(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        units = [part.astype(float) / np.linalg.norm(part, axis=1, keepdims=True) for part in (texts, images)]
        return np.asarray((units[0] * units[1]).sum(1))


def sample(run: Any, number: int, side: int) -> np.ndarray | None:
    """Read one of a run's sample pictures, uint8 [side, side, 3]; None where it is missing or damaged."""
    try:
        pixels = read_png(Path(run["directory"]) / "samples" / f"{number}.png").pixels
        how = Image.Resampling.NEAREST if min(pixels.shape[:2]) < side else Image.Resampling.LANCZOS
        return np.asarray(Image.fromarray(pixels).resize((side, side), how))
    except (InputError, ValueError, Image.DecompressionBombError):
        return None
