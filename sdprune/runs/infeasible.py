"""The record of a budget that cannot be met."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from sdprune.identity import facts_of, package_code
from sdprune.pruning import Budget, PruneSpec
from sdprune.runs.record import Record, clock


def infeasible_record(output: str, pipeline: Any, budget: Budget, prune: Mapping[str, PruneSpec]) -> Record:
    """The record that says why a budget cannot be met, so that a sweep knows of this point.

    Args:
        output: directory of all runs.
        pipeline: the model.
        budget: that cannot be met.
        prune: specifications by component.
    """
    specs = {name: spec.describe() for name, spec in prune.items()}
    facts = {"version": package_code(), "pipeline": facts_of(pipeline), "budget": budget.describe(), "prune": specs}
    split = budget.split if budget.measured else "shares" if budget.shares else f"{budget.text_share:g}"
    return Record(output, f"infeasible-{budget.total:g}-{split}", facts)


def write_infeasible(record: Record, reason: str) -> None:
    """Finish the record, unless that is done; nothing is drawn."""
    if not record.finished:
        record.start()
        content = {"label": record.directory.name, "n": 0, "infeasible": reason, "budget": record.facts["budget"]}
        record.finish({**content, "speed": {"finished": clock(time.time())}})
