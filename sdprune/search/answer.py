"""What a search came to: results.json, the summary, the figure, and the configurations that make the model again."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from sdprune.files import replacing
from sdprune.metrics import mean, paired_bootstrap
from sdprune.runs.record import Record, clock, versions
from sdprune.search.certificate import ALPHA, CAP, Tolerance
from sdprune.search.figure import draw
from sdprune.search.search import CERTIFICATE, DENSE, VERDICTS, Model, Probe, Search

if TYPE_CHECKING:
    from sdprune.search.module import SearchModule


def write_answer(module: SearchModule, generated: int) -> None:
    """Write the figure and results.json, which finishes the search.

    Args:
        module: whose search is over.
        generated: pictures that were drawn now.
    """
    search, record = module.search, module.record
    assert search is not None
    scored, facts = module.scored, module.facts_of_models
    content = {
        "scored": scored,
        "tolerance": search.tolerance.value,
        "relative": search.tolerance.relative,
        "confidence": 1 - ALPHA,
        "cap": search.cap,
        "answer": None if search.answer is None else _described(search, search.answer, scored, facts),
        "also": None if search.reference is None else _described(search, search.reference, scored, facts),
        "thresholds": {name: dict(one.sparsities) or one.total for name, one in search.thresholds.items()},
        "claims": [_claim(search, probe, scored) for probe in _certified(search)],
        "shapes": {name: search.shape(name) for name in search.paths},
        "probes": [_probe(search, probe) for probe in search.probes],
        "images": search.images(),
        "remarks": _remarks(search),
    }
    path = record.directory / "search.svg"
    with replacing(path) as temporary:
        temporary.write_bytes(draw(search, scored, facts))
    name = {"label": record.directory.name, "fingerprint": record.fingerprint, "model": module.pipeline.name}
    speed = {"finished": clock(time.time()), "generated": generated, **module.seconds}
    record.finish({**name, "search": content, "versions": versions(), "speed": speed})


def _certified(search: Search) -> list[Probe]:
    """The tests that a claim rests on: those of the paths' thresholds, and last the answer's."""
    found = [
        one
        for one in search.probes
        if one.model == search.thresholds.get(one.path) and not search.falls(one.path) and one is not search.answer
    ]
    return found if search.answer is None else [*found, search.answer]


def _probe(search: Search, probe: Probe) -> dict[str, Any]:
    numbers = {name: None if math.isnan(one := getattr(probe, name)) else one for name in ("loss", "low", "high")}
    return {
        "path": probe.path, "model": probe.model.name, "sparsities": dict(probe.model.sparsities),
        "total": probe.model.total, "prompts": probe.part, "alpha": probe.alpha, "n": probe.n, **numbers,
        "bound": search.bound(probe), "verdict": probe.verdict,
        "e_value": probe.decision.e_value if probe.decision else None,
    }  # fmt: skip


def _described(search: Search, probe: Probe, scored: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A test with what else can be said of its model."""
    dense, pruned = search.pairs(probe)
    whole = np.isfinite(dense) & np.isfinite(pruned)
    rows = [torch.from_numpy(scores[whole]) for scores in (pruned, dense)]
    difference = paired_bootstrap(rows[0], rows[1], mean).as_dict(f"{scored}_diff") if whole.sum() > 1 else {}
    return {
        **_probe(search, probe),
        "beyond": search.beyond(probe),
        "comparison": {"dense": float(dense[whole].mean()) if whole.any() else None, **difference},
        "without_score": int((~whole).sum()),
        **facts.get(probe.model.name, {}),
    }


def _claim(search: Search, probe: Probe, scored: str) -> str:
    amount = f"{100 * search.tolerance.value:g} %" if search.tolerance.relative else f"{search.tolerance.value:g}"
    return (
        f"With {100 * (1 - ALPHA):g} % confidence the loss in {scored} is at most {amount} at sparsity {probe.model} "
        f"(n = {probe.n})."
    )


def _remarks(search: Search) -> list[str]:
    found = []
    for name, models in search.paths.items():
        reached = search.thresholds.get(name, DENSE)
        if reached is DENSE:
            found.append(
                f"{name}: no level was certified; the lowest is {models[0]}. Give lower --model.levels, a larger "
                "--model.tolerance or a larger --data.n."
            )
        elif reached == models[-1]:
            found.append(f"{name}: the highest level was certified; the limit may lie above {models[-1]}.")
        if search.falls(name):
            found.append(
                f"{name}: the loss is seen to fall from one level to a sparser one, so nothing is claimed of its "
                "threshold; only a certificate on fresh prompts holds."
            )
    failed = sum(one.part == CERTIFICATE and one is not search.answer and one.path != "also" for one in search.probes)
    if failed:
        found.append(f"{failed} certificates on fresh prompts failed, and the search stepped back as often.")
    return found


# --- for people ----------------------------------------------------------------------------------------------------


def show(record: Record, already: bool = False) -> None:
    """Print a finished search.

    Args:
        record: of the search.
        already: it was finished before, and nothing was done now.
    """
    console = Console(width=None if Console().is_terminal else 110)
    results = record.results
    search = results["search"]
    if already:
        print(f"This search was finished already, {results['speed']['finished']}: nothing is drawn again.")
    console.print(_table(search))
    for claim in search["claims"][:-1] if search["answer"] else search["claims"]:
        console.print(claim, highlight=False)
    if search["answer"]:
        console.print(search["claims"][-1], style="bold green", highlight=False)
        _show_model(console, search, "answer")
    else:
        console.print("No pruned model could be certified.", style="bold red", highlight=False)
    if search["also"]:
        _show_model(console, search, "also")
    for name, shape in search["shapes"].items():
        if shape:
            console.print(
                f"{name}: the drop is {shape['shape']} (estimate: one tolerance is lost at "
                f"{shape['one_tolerance']:.0%}, five at {shape['five_tolerances']:.0%}; loss ~ (s / (1 - s))^"
                f"{shape['b']:g})",
                highlight=False,
            )
    for remark in search["remarks"]:
        console.print(remark, style="bold red", highlight=False)
    images = search["images"]
    console.print(
        f"{images['pruned']} images of pruned models and {images['dense']} of the dense one were looked at, where a "
        f"grid has {images['grid']}",
        highlight=False,
    )
    where = record.directory
    print(f"figure     {where / 'search.svg'}\nresults    {where / 'results.json'}")
    if search["answer"]:
        print(f"the model  sdprune predict --config {where / 'config.yaml'}")
        print(f"           sdprune fit --config {where / 'config_fit.yaml'}     saves it")


def _table(search: Mapping[str, Any]) -> Table:
    tolerance = Tolerance(search["tolerance"], search["relative"])
    table = Table(title=f"loss in {search['scored']}, tolerated {tolerance.written(tolerance.value, '')}")
    for column in ("path", "model", "images", "loss", "95 % interval", "at most", "verdict"):
        table.add_column(column, justify="left" if column in ("path", "model", "verdict") else "right")
    for one in search["probes"]:
        loss, low, high, bound = (
            "" if one[name] is None else tolerance.written(one[name], "" if name == "bound" else "+")
            for name in ("loss", "low", "high", "bound")
        )
        model, verdict = Model(one["sparsities"], one["total"]), VERDICTS[one["verdict"]]
        table.add_row(one["path"], str(model), str(one["n"]), loss, f"{low}, {high}", bound, verdict)
    return table


def _show_model(console: Console, search: Mapping[str, Any], which: str) -> None:
    one, scored = search[which], search["scored"]
    beyond, against = one["beyond"], one["comparison"]
    if which == "also":
        verdict = "is certified too" if one["verdict"] == "certified" else "is not certified"
        model = Model(one["sparsities"], one["total"])
        console.print(f"{model}, tested on the same prompts, {verdict} (n = {one['n']}):", highlight=False)
    if f"{scored}_diff" in against:
        ends = ", ".join(f"{against[f'{scored}_diff_{end}']:+.4f}" for end in ("low", "high"))
        console.print(
            rf"  plain paired difference in {scored} {against[f'{scored}_diff']:+.4f} \[{ends}], dense "
            f"{against['dense']:.4f}",
            highlight=False,
        )
    console.print(
        f"  {beyond['count']} of {beyond['n']} pictures lost {CAP} tolerances or more, which the claim counts as "
        f"{CAP}: at most {beyond['bound']:.1%} of all do (95 % confidence)",
        highlight=False,
    )
    if "sparsity" in one:
        zeros = one["sparsity"]["prunable"]["zero_fraction"]
        console.print(f"  zeros among all parameters of the prunable components: {zeros:.2%}", highlight=False)


def write_configurations(record: Record, given: str) -> None:
    """Write config.yaml and config_fit.yaml: `sdprune predict` and `sdprune fit` of the answer.

    Args:
        record: of a finished search.
        given: the configuration of the search, as YAML.
    """
    answer = record.results["search"]["answer"]
    if answer is None:
        return
    for verb, path in (("predict", record.directory / "config.yaml"), ("fit", record.directory / "config_fit.yaml")):
        text = yaml.safe_dump(_configuration(yaml.safe_load(given), answer, verb), sort_keys=False)
        if not path.exists() or path.read_text() != text:
            with replacing(path) as temporary:
                temporary.write_text(text)


def _configuration(config: dict[str, Any], answer: Mapping[str, Any], verb: str) -> dict[str, Any]:
    old = config["model"]["init_args"]
    new = {name: old[name] for name in ("pipeline", "prune", "sampling", "calibration", "seed", "output", "store")}
    new["prune"] = {
        name: {**(spec or {}), "sparsity": answer["sparsities"].get(name, 0.0)} for name, spec in new["prune"].items()
    }
    if old.get("budget"):
        new["budget"] = {**old["budget"], "total": answer["total"]}
    if verb == "predict":
        new["metrics"] = [old["score"]]
    kind = {"predict": "sdprune.modules.GenerationModule", "fit": "sdprune.modules.PruningModule"}[verb]
    return {**config, "model": {"class_path": kind, "init_args": new}}
