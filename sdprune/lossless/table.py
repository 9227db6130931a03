"""What was left out, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdprune.calibration.progress import size_shown
from sdprune.inspection.table import aligned, number_shown
from sdprune.pipelines.trace import DECLARED, TRACED

_PROOFS = {
    TRACED: "no path leads from it to a picture",
    DECLARED: "its outputs are cut off; NaN in its place changes no bit",
}


def lines_of(facts: Mapping[str, Any]) -> list[str]:
    """The facts that `lossless` gives, as lines."""
    rows = [("what", "how it is known", "parameters", "bytes")]
    for one in facts["removed"]:
        name = f"{one['component']}.{one['module']}"
        rows.append((name, _PROOFS[one["proof"]], number_shown(one["parameters"]), size_shown(one["bytes"])))
    tables, once = facts["tables"], facts["text_once"]
    if tables:
        what = f"{len(tables['layers'])} layers of the {tables['component']}, now tables"
        proof = f"they see the timestep alone: {tables['timesteps']} rows"
        rows.append((what, proof, number_shown(tables["parameters"]), size_shown(tables["bytes"])))
    before, after = facts["parameters"]["before"], facts["parameters"]["after"]
    bytes_before, bytes_after = facts["bytes"]["before"], facts["bytes"]["after"]
    share = f"{1 - after / before:.1%} of the parameters, {1 - bytes_after / bytes_before:.1%} of the bytes"
    rows.append((share, "", number_shown(before - after), size_shown(bytes_before - bytes_after)))
    check = facts["check"]
    found = [
        *aligned(rows, left=(0, 1)),
        f"  {check['pictures']} pictures of {check['steps']} steps by both, {check['dtype']} on {check['device']}: "
        + ("the same bits" if not tables else "the same bits in calls as large as those that made the tables"),
    ]
    if tables:
        found.append(
            f"  the copy draws in {tables['steps']} steps of {tables['scheduler']}; in calls of another size pictures "
            f"differ by up to {tables['rounding']:.2g}, where white is 1"
        )
    if once:
        bits = "the same bits" if once["same_bits"] else "NOT the same bits"
        found.append(
            f"  {once['layers']} layers see the text alone: sdprune.load(DIR, text_once=True) computes them once a "
            f"prompt, {bits}, {once['speed']:.2f} times as fast in {once['steps']} steps"
        )
    found.append(f"  {_opens(facts)}")
    return found


def _opens(facts: Mapping[str, Any]) -> str:
    if facts["tables"]:
        return "sdprune.load opens the copy; plain diffusers refuses the tables"
    return (
        "diffusers opens the copy too: it fills in what is missing with random numbers, warns of them, and draws the "
        "same pictures"
    )
