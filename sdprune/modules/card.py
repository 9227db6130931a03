"""The model card of a pruned pipeline: where it comes from, what was pruned, and how good it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdprune.errors import InputError
from sdprune.files import read_json
from sdprune.pipelines.resolve import MINIATURE

SAME = ("version", "pipeline", "dtype", "prune", "calibration", "narrow", "narrow_calibration")
"""The facts that a record and a saved pipeline share when they are the same weights."""


PLACE = "<this directory>"
"""What a card calls its model before that has a name on the hub."""
_CITATION = """\
@article{ramesh2024efficient,
  title = {Efficient Pruning of Text-to-Image Models: Insights from Pruning Stable Diffusion},
  author = {Ramesh, Samarth N and Zhao, Zhixue},
  year = {2024}
}""".splitlines()


class Origin(NamedTuple):
    """Where a dense model comes from."""

    base_model: str | None
    """Its id on the hub."""
    license: str | None
    """As the hub names it; None where the model does not say."""


def origin(model: str, directory: Path | None) -> Origin:
    """What a hub id, or the card of a local model, says of itself.

    Args:
        model: as in the configuration.
        directory: where its files lie, if that is known.
    """
    if model == MINIATURE:
        return Origin(None, "apache-2.0")
    own = {} if directory is None else front_matter(directory / "README.md")
    local = not model or Path(model).is_dir()
    return Origin(own.get("base_model") if local else model, own.get("license"))


def front_matter(card: Path) -> dict[str, str]:
    """The texts in a model card's head; none where it has none or is damaged."""
    import yaml

    try:
        found = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
        values = yaml.safe_load(found[1]) if found else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return {k: v for k, v in values.items() if isinstance(v, str)} if isinstance(values, dict) else {}


class Measured(NamedTuple):
    """A finished record of the same weights."""

    directory: Path
    facts: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its directory."""
        return self.directory.name

    @property
    def grid(self) -> Path:
        """Its sample prompts, drawn by the dense and the pruned model; may be missing."""
        return self.directory / "grid.png"


def records_of(output: Path, facts: Mapping[str, Any]) -> Iterator[Measured]:
    """Finished records in `output` that measured the weights which these facts decide."""
    for path in sorted(output.glob("*/results.json")):
        try:
            measured = Measured(path.parent, read_json(path.parent / "config.json"), read_json(path))
        except InputError:
            continue  # a damaged record is for `sdprune report` to name
        if all(measured.facts.get(name) == facts.get(name) for name in SAME):
            yield measured


def model_card(
    source: Origin, sparsity: str, specs: Mapping[str, Any], records: Sequence[Measured], unused: Sequence[str] = (),
    narrowed: Mapping[str, str] | None = None, stock: bool = True,
) -> str:  # fmt: skip
    """A model card for the hub; it shows `grid.png` where a record has one.

    Args:
        source: of the dense model.
        sparsity: a plain table of the nominal and the achieved sparsities.
        specs: by component, how it was pruned.
        records: that measured this pruning.
        unused: components of the original that the copy lacks.
        narrowed: by component, what of it is gone, where anything is.
        stock: whether diffusers alone opens it.
    """
    header = ["---", "library_name: diffusers", "pipeline_tag: text-to-image", "tags: [sdprune, pruned]"]
    header += [f"{key}: {json.dumps(value)}" for key, value in source._asdict().items() if value]
    licence = "" if source.license else " Its licence is not known here: see the base model."
    lacks = ", ".join(f"`{name}`" for name in unused)
    left_out = [f"The original's {lacks} is not part of this copy: filter what it draws by other means.", ""]
    lines = [f"- `{name}`, narrowed: {line}" for name, line in (narrowed or {}).items()]
    lines += [f"- `{name}`: `{json.dumps(spec)}`" for name, spec in specs.items()]
    size = "Zeros are stored as zeros: the files are as large\nand the model is as fast as before"
    use = [
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{PLACE}")',
    ]
    if narrowed:
        size = "Whole heads, neurons, channels or layers are\ngone: the files are smaller and the model is faster"
    if not stock:
        use = ["import sdprune  # diffusers alone refuses the shapes", "", f'pipe = sdprune.load("{PLACE}")']
    return "\n".join(
        [
            *header, "---", "", "# A pruned text-to-image pipeline", "",
            f"Base model: {source.base_model or 'not on the hub'}.{licence}", "",
            f"Pruned after training, without retraining, by sdprune. {size}; `pruning_report.json` has every layer's",
            "counts.", "",
            *(left_out if unused else ()),
            "## What was pruned", "", *(lines or ["Nothing."]), "", "## Sparsity", "", "```", sparsity, "```", "",
            "## Scores", "", *_scores(records), "", *_pictures(records), "## Use", "", "```python",
            *use, "```", "",
            f'A copy that `sdprune pack` made is opened by `sdprune.load("{PLACE}")` alone.', "",
            "## Citation", "", "```bibtex", *_CITATION, "```", "",
        ]
    )  # fmt: skip


def _pictures(records: Sequence[Measured]) -> list[str]:
    for measured in records:
        if measured.grid.is_file():
            caption = f"The same prompts and noise, dense above and pruned below (record `{measured.name}`)."
            return ["## Pictures", "", f"![{caption}]({measured.grid.name})", "", caption, ""]
    return []


def _scores(records: Sequence[Measured]) -> list[str]:
    lines = [line for measured in records for line in _table(measured)]
    return lines[:-1] or [
        "Not measured yet. To have them here, run `sdprune predict` with the same pruning options, calibration and",
        "`--model.output` first, and then `sdprune fit` into a new directory. This directory by itself:", "",
        "```bash", f"sdprune predict --config CONFIG --model.pipeline.model={PLACE} '--model.prune={{}}'", "```",
    ]  # fmt: skip


def _table(measured: Measured) -> list[str]:
    facts, results = measured.facts, measured.results
    try:
        sampling = facts["sampling"]
        lines = [
            f"Record `{measured.name}`: n = {results['n']}, {sampling['steps']} steps, "
            f"guidance {sampling['guidance']:g}, seed {facts['seed']}.", "",
            "| score | value | difference to dense, 95 % interval | protocol |", "| --- | --- | --- | --- |",
        ]  # fmt: skip
        for metric, value in results["metrics"].items():
            if not metric.endswith("_se"):
                cells = (metric, f"{value:.4f}", _difference(results, metric), _protocol(results, metric))
                lines.append(f"| {' | '.join(cells)} |")
        return [*lines, ""]
    except (KeyError, TypeError, ValueError, AttributeError):  # damaged: for `sdprune report` to name
        return []


def _difference(results: Mapping[str, Any], metric: str) -> str:
    value, low, high = (results["comparison"].get(f"{metric}_diff{end}") for end in ("", "_low", "_high"))
    interval = "" if low is None or high is None else f" [{low:+.4f}, {high:+.4f}]"
    return "" if value is None else f"{value:+.4f}{interval}"


def _protocol(results: Mapping[str, Any], metric: str) -> str:
    """The network and the reference of a score; `clip_gap` is measured as `clip_score` is."""
    protocols = results["protocols"]
    found = protocols.get(metric) or protocols.get("clip_score" if metric == "clip_gap" else "") or {}
    reference = found.get("reference", {})
    parts = [found.get("class"), found.get("protocol")]
    parts += [f"reference of {reference['n']} images" if "n" in reference else None]
    return ", ".join(str(part) for part in parts if part)
