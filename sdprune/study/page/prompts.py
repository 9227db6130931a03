"""Which prompts break: what each prompt lost to pruning, and which kinds of prompts lost most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sdprune.runs.record import read_captions
from sdprune.study.group import Study
from sdprune.study.page.categories import Label, all_by_grammar, categories
from sdprune.study.text import printable

SHOWN = 512
"""Prompts that the page lists with pictures, the first that were drawn; categories count all of them."""
FEWEST = 5
"""Prompts that a category needs to be listed."""


class Prompts:
    """What the runs of a group say of each prompt, read from their `images.csv` and CLIP rows.

    Notes on what cannot be used go to the study.

    Attributes:
        captions: in drawn order; none without a dense run whose images.csv can be read.
        files: of the real images.
        labels: names of categories, each as (what it is about, its value).
    """

    def __init__(self, study: Study) -> None:
        self.study, self.captions, self.files = study, list[str](), list[str]()
        self._dense: tuple[np.ndarray | None, np.ndarray] = None, np.empty(0)
        if study.dense is not None and (table := self._table(study.dense)) is not None:
            self.captions, self.files = list(table["caption"]), list(table["file_name"])
            self._dense = study.dense.get("clip_scores"), table["correct"].to_numpy()
        found = [categories(caption) for caption in self.captions]
        counted = pd.Series([label for labels in found for label in set(labels)], dtype=object).value_counts()
        self.labels: list[Label] = sorted(label for label, n in counted.items() if n >= FEWEST)
        belongs = [label in labels for label in self.labels for labels in found]
        self._belongs = np.array(belongs, dtype=bool).reshape(len(self.labels), len(found))

    def _table(self, run: pd.Series) -> pd.DataFrame | None:
        try:
            table = read_captions(Path(run["directory"]))
            if len(table) != run["n"]:
                raise ValueError(f"{len(table)} rows for {run['n']} images")
            return table[["file_name", "caption"]].assign(correct=table.get("correct", np.nan))
        except (OSError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            self.study.notes.append(
                printable(f"{run['run']}: images.csv is missing or damaged ({reason}), its prompts are not shown")
            )
            return None

    def describe(self) -> dict[str, Any] | None:
        """Return what all runs share: captions, and categories with their numbers of prompts."""
        if not self.captions:
            return None
        labels = [[*label, int(n)] for label, n in zip(self.labels, self._belongs.sum(-1), strict=True)]
        return {
            "captions": [printable(one) for one in self.captions[:SHOWN]],
            "how": self._how(),
            "labels": labels,
            "of": [np.flatnonzero(column).tolist() for column in self._belongs[:, :SHOWN].T],
        }

    def _how(self) -> str:
        """Say what the numbers are."""
        n = len(self.captions)
        listed = f"the {n} prompts" if n <= SHOWN else f"the first {SHOWN} of {n} prompts; categories count all {n}"
        source = (
            "the embedded world's grammar" if all_by_grammar(self.captions) else "a list of words, so they are rough"
        )
        return (
            f"Losses are dense minus pruned, on the same prompt and noise, of {listed}. The 95 % intervals are of the "
            f"mean over a category's prompts. Categories were found in the captions by {source}."
        )

    def of(self, run: pd.Series) -> dict[str, Any] | None:
        """Return what a run did to each prompt: its CLIP score, whether it is right, and losses by category.

        A loss is dense minus pruned, with the 95 % interval of its mean over the prompts of a category.
        """
        table = self._table(run) if self.captions else None
        if table is None:
            return None
        if list(table["caption"]) != self.captions:
            self.study.notes.append(f"{run['run']}: images.csv has other captions, its prompts are not shown")
            return None
        scores, right = run.get("clip_scores"), table["correct"].to_numpy()
        dense_scores, dense_right = self._dense
        found: dict[str, Any] = {}
        if scores is not None and dense_scores is not None:
            found["scores"] = [round(float(one), 4) for one in scores[:SHOWN]]
            found["lost"] = self._means(dense_scores - scores)
        if np.isfinite(right + dense_right).all():
            found["right"] = "".join("1" if one else "0" for one in right[:SHOWN])
            found["broke"] = self._means(dense_right - right)
        return found or None

    def _means(self, losses: np.ndarray) -> list[list[float]]:
        """Return the mean loss of each category with its 95 % interval."""
        found = []
        for belongs in self._belongs:
            of_them = losses[belongs]
            half = 1.96 * of_them.std(ddof=1) / len(of_them) ** 0.5
            found.append(
                [round(float(one), 5) for one in (of_them.mean(), of_them.mean() - half, of_them.mean() + half)]
            )
        return found
