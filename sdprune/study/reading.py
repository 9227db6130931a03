"""Find the records below some directories; what cannot be used is left out, with the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdprune.errors import InputError
from sdprune.files import read_json
from sdprune.identity import fingerprint
from sdprune.pipelines.resolve import MINIATURE
from sdprune.runs.comparison import COMPARED, protocol
from sdprune.runs.record import is_whole
from sdprune.study.group import Study
from sdprune.study.records import Run, component
from sdprune.study.values import DamagedError, Value, printable


class LeftOut(NamedTuple):
    """A directory that is not reported."""

    directory: Path
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.directory}: {self.reason}")


@dataclass
class Found:
    """What lies below some directories.

    Args:
        studies: runs that may be compared with each other, the largest group first.
        infeasible: what records say of budgets that cannot be met.
        left_out: damaged or unfinished records.
    """

    studies: list[Study] = field(default_factory=list)
    infeasible: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def read(directories: Iterable[str | Path]) -> Found:
    """Read every record below these directories.

    Raises:
        InputError: a directory that is not there, or no finished record at all.
    """
    found, roots = Found(), [Path(directory) for directory in directories]
    groups: dict[str, list[tuple[dict[str, Any], list[Run]]]] = {}
    for root in roots:
        if not root.is_dir():
            raise InputError(f"No directory {str(root)!r}: give one that `sdprune predict` wrote runs to.")
    for place in _walk(roots):
        if isinstance(place, LeftOut):
            found.left_out.append(place)
            continue
        try:
            results = read_json(place / "results.json")
            if "digest" in results and not is_whole(results):
                raise InputError("results.json is damaged, its digest is another")
            if "infeasible" in results:
                found.infeasible.append(_infeasible(Value(results, "results.json")))
                continue
            run = read_run(place, read_json(place / "config.json"), results)
            _join(groups.setdefault(fingerprint(run.shared), []), run)
        except (InputError, RecursionError, ValueError) as error:  # json: too deep; a fingerprint: NaN
            found.left_out.append(LeftOut(place, str(error)))
    if not groups:
        reason = "".join(f"; left out: {one}" for one in found.left_out[:1])
        raise InputError(
            f"No finished run below {', '.join(map(str, roots))}: run sdprune predict or sweep first{reason}."
        )
    runs = [found_runs for alike in groups.values() for _, found_runs in alike]
    found.studies = sorted(map(Study, runs), key=lambda study: -len(study.runs))
    found.infeasible = sorted(set(found.infeasible))
    return found


def _join(groups: list[tuple[dict[str, Any], list[Run]]], run: Run) -> None:
    """Put a run into the first group whose scores were measured as its own, whichever more either of them has."""
    for protocols, runs in groups:
        if all(protocols.get(name, facts) == facts for name, facts in run.protocols.items()):
            protocols |= run.protocols
            runs.append(run)
            return
    groups.append((dict(run.protocols), [run]))


def _walk(roots: Iterable[Path]) -> Iterator[Path | LeftOut]:
    """Directories with results.json, each once, also behind symbolic links; and what is in the way."""
    todo, seen = sorted(roots, reverse=True), set()
    while todo:
        directory = todo.pop()
        try:
            real = os.path.realpath(directory)
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            yield LeftOut(directory, error.strerror or str(error))
            continue
        names = {entry.name for entry in entries}
        if real in seen or "model_index.json" in names:
            continue
        seen.add(real)
        if "results.json" in names:
            yield directory
            continue
        if "config.json" in names and _is_run(directory / "config.json"):
            yield LeftOut(directory, "not finished, give its command again")
            continue
        for entry in reversed(entries):
            try:
                if entry.is_dir():
                    todo.append(directory / entry.name)
            except OSError as error:
                yield LeftOut(directory / entry.name, error.strerror or str(error))


def _is_run(path: Path) -> bool:
    try:
        return {"version", "prune"} <= set(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _infeasible(results: Value) -> str:
    return f"{results['label'].text().rsplit('-', 1)[0]}: {results['infeasible'].text()}"


def read_run(directory: Path, facts: dict[str, Any], results: dict[str, Any]) -> Run:
    """A record, every part of it checked.

    Raises:
        DamagedError: a part that is missing or of another type, by name.
    """
    config, result = Value(facts, "config.json"), Value(results, "results.json")
    scored = {name: facts.mapping() for name, facts in result["scored"].items()}
    shared = {name: config[name].content for name in COMPARED}
    kept = {"prune": config["prune"].content, "calibration": config.get("calibration", [])}
    calibration = Value(kept["calibration"], "config.json: calibration")
    pruning = result["pruning"] if "pruning" in results else None
    roles = {name: role.text() for name, role in result["roles"].items()}
    kinds = [[name for name in roles if (roles[name] == "text") == text] for text in (True, False)]
    if not all(kinds):
        raise result["roles"].wrong("a text encoder and a denoiser")
    text, image = (component(config["prune"], calibration, pruning, names) for names in kinds)
    sparsity, n = result["sparsity"], result["n"].whole(1)
    sizes = {name: sparsity["components"][name]["parameters"].whole(1) for name in roles}
    metrics, unusable = result["metrics"].numbers()
    comparison, more = result["comparison"].numbers(without="dense")
    return Run(
        directory=directory,
        identity=fingerprint(kept),
        shared=shared,
        protocols=protocol({"scored": scored}),
        title=_title(config, result),
        text=text,
        image=image,
        samples=tuple(prompt.text() for prompt in result["samples"].elements()),
        n=n,
        nominal=sparsity["nominal"].number(0, 10),  # the study's counting can ask for more than there is
        zeros={scope: sparsity[scope]["zero_fraction"].number(0, 1) for scope in ("targets", "prunable", "pipeline")},
        sizes=sizes,
        text_encoders=tuple(kinds[0]),
        metrics=metrics,
        comparison=comparison,
        images={
            "black": result["images"]["black"].whole(),
            "not_finite": result["images"]["not_finite"].whole(),
            "invalid": len(result["images"]["invalid"].elements()),
        },
        clip_scores=_clip_scores(directory / "rows.npz", n, metrics.get("clip_score")),
        notes=tuple(f"{name} is not a finite number, it counts as missing" for name in [*unusable, *more]),
    )


def _title(config: Value, result: Value) -> str:
    sampling = config["sampling"]
    networks = {part["protocol"].text() for _, part in result["protocols"].items() if "protocol" in part.mapping()}
    parts = [
        _model(config["pipeline"], result),
        f"{config['data']['n'].whole(1)} prompts",
        f"{sampling['steps'].whole(1)} steps",
        f"guidance {sampling['guidance'].number():g}",
        f"seed {config['seed'].number():g}",
        *sorted(networks),
    ]
    return ", ".join(parts)


def _model(pipeline: Value, result: Value) -> str:
    """The hub id; of a local model, which its files identify, the name that it had in the configuration."""
    if pipeline.get("model") is not None:
        return pipeline["model"].text()
    name = result["model"].text() if result.get("model") is not None else "a local model"
    return "the miniature" if name == MINIATURE else name


def _cosines(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        units = [part.astype(float) / np.linalg.norm(part, axis=1, keepdims=True) for part in (texts, images)]
        return np.asarray((units[0] * units[1]).sum(1))


def _clip_scores(path: Path, n: int, score: float | None) -> np.ndarray | None:
    """Cosines [n] of each image and its prompt, by the network whose mean cosine the score is."""
    try:
        with np.load(path, allow_pickle=False) as rows:
            names = [name.removesuffix(".texts") for name in rows if name.endswith(".texts")]
            found = [_cosines(rows[f"{name}.texts"], rows[f"{name}.features"]) for name in names]
        if not found or score is None:
            return None
        cosines = min(found, key=lambda one: abs(one.mean() - score))
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise DamagedError(f"rows.npz is missing or damaged ({printable(str(error))[:80]})") from error
    if cosines.shape != (n,) or not np.isfinite(cosines).all():
        raise DamagedError(f"rows.npz is damaged: its CLIP rows do not give {n} finite cosines")
    return cosines
