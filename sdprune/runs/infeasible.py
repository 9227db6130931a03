"""The record of a budget that cannot be met."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sdprune.identity import facts_of, package_code
from sdprune.runs.record import Record, clock

if TYPE_CHECKING:
    from sdprune.modules import GenerationModule


def infeasible_record(module: GenerationModule) -> Record:
    """The record that says why the budget of a module cannot be met: so a sweep knows of this point."""
    budget = module.options.budget
    assert budget is not None
    specs = {name: spec.describe() for name, spec in module.options.prune.items()}
    facts = {
        "version": package_code(), "pipeline": facts_of(module.pipeline), "budget": budget.describe(), "prune": specs
    }  # fmt: skip
    return Record(module.output, f"infeasible-{budget.total:g}-{budget.text_share:g}", facts)


def write_infeasible(record: Record, reason: str) -> None:
    """Finish the record, unless that is done; nothing is drawn."""
    if not record.finished:
        record.start()
        content = {"label": record.directory.name, "n": 0, "infeasible": reason, "budget": record.facts["budget"]}
        record.finish({**content, "speed": {"finished": clock(time.time())}})
