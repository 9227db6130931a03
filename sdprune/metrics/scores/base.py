"""What every score is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from sdprune.errors import InputError
from sdprune.identity import facts_of
from sdprune.metrics.features.base import FeatureExtractor
from sdprune.metrics.frechet import Statistics
from sdprune.metrics.rows import Column, Rows


class Score(ABC):
    """Says how good images are, from their columns alone: a pure function, which keeps nothing of the images.

    To add one, give it a `name` and its `columns`, and implement `compute` and `compare`; if it compares features with
    those of real images, it is a `FeatureScore`. Its options are arguments of `__init__`.

    Rows are columns [n, ...] by key, in drawn order, all on one device.
    """

    name: str
    """Key of the score in the results and of its reference; no other score of a run has it."""
    higher_is_better: ClassVar[bool] = False
    judges: ClassVar[bool] = False
    """Whether it says yes (1) or no (0) of an image."""
    minimum: int = 1
    """Number of images that it needs."""
    tolerance: float | None = None
    """How much worse than the dense model's the score may be, relative, for the verdict; None gives none."""
    extractor: FeatureExtractor | None = None
    """The network whose features it reads. Scores may share one."""
    needs_reference: ClassVar[bool] = False
    """Whether it compares with the features of real images by `extractor`."""
    reference_features: ClassVar[bool] = False
    """Whether it reads every real image's features; else their mean and covariance alone."""

    @property
    @abstractmethod
    def columns(self) -> Sequence[Column]:
        """What it reads of every image."""

    @property
    def titles(self) -> tuple[list[str], list[str]]:
        """Names of what `compute` and `compare` give, without the ends and errors of intervals."""
        return [self.name], [f"{self.name}_diff"]

    @abstractmethod
    def compute(self, rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """Scores by name; `reference` is of the real images, where the score needs it."""

    @abstractmethod
    def compare(self, rows: Rows, dense_rows: Rows, reference: Statistics | None = None) -> dict[str, float]:
        """Differences to the dense model's images of the same prompts and noise by name, `<name>_diff`.

        With 95 % intervals over images where there can be: `<name>_diff_low`, `<name>_diff_high`, `<name>_diff_se`.
        """

    def check_prompts(self, prompts: Sequence[str]) -> None:  # noqa: B027 (most scores take any)
        """Raise InputError for a prompt whose image it cannot judge; called before any image is drawn."""

    def remarks(self, scores: Mapping[str, float], rows: Rows) -> list[str]:
        """What a reader should know of these scores, which `compute` gave: one sentence or two each."""
        return []

    def per_image(self, rows: Rows) -> dict[str, Tensor]:
        """Scores of single images by name, [n] each, where there are any: for people who look at pictures."""
        return {}

    @property
    def paired(self) -> dict[str, bool]:
        """Names of what `per_image` gives that depends on no other image than the dense model's of the same prompt, and
        whether more of it is better."""
        has = type(self).per_image is not Score.per_image
        return {self.name: bool(self.higher_is_better)} if has else {}

    def describe(self) -> dict[str, Any]:
        """JSON-able facts that the score depends on, for identities; needs no loaded weights."""
        columns = {column.key: dict(column.facts) for column in self.columns}
        return {"class": type(self).__name__, "name": self.name, "columns": columns}

    def read(self, rows: Rows) -> list[Tensor]:
        """Its columns of the rows, in the order of `columns`."""
        return [rows[column.key] for column in self.columns]

    def check_reference(self, reference: Statistics) -> None:
        """Raise InputError for statistics of another extractor, of another length, or without what it needs."""
        assert self.extractor is not None
        made_by, size = reference.extractor, len(reference.mu)
        if made_by is not None and made_by != self.extractor.name:
            raise InputError(f"The reference was made with {made_by!r}, the metric uses {self.extractor.name!r}.")
        if size != self.extractor.num_features:
            raise InputError(
                f"The reference has {size} features, {self.extractor.name!r} has {self.extractor.num_features}."
            )
        if self.reference_features and reference.features is None:
            raise InputError(
                f"{self.name} needs the features of every real image, and the reference has mu and sigma alone: choose "
                "the reference `drawn` or `split`, or leave the metric out."
            )


class FeatureScore(Score):
    """Compares the features of generated images with those of real ones, in float64 on the rows' device.

    Args:
        extractor: the network and its protocol, e.g. `InceptionFeatures` (the literature's) or `ClipImageFeatures`.
        name: key of the score in the results.
    """

    needs_reference = True
    extractor: FeatureExtractor

    def __init__(self, extractor: FeatureExtractor, name: str) -> None:
        self.extractor = extractor
        self.name = name

    @property
    def columns(self) -> Sequence[Column]:
        """The extractor's features."""
        return (self.extractor.features,)

    def describe(self) -> dict[str, Any]:
        """Name and extractor; the reference is a fact of the data."""
        return {"class": type(self).__name__, "name": self.name, "extractor": facts_of(self.extractor)}

    def features(self, rows: Rows) -> Tensor:
        """Features [n, d] of the generated images, float64."""
        return self.read(rows)[0].double()

    def require(self, reference: Statistics | None) -> Statistics:
        """The reference. Raises RuntimeError where there is none."""
        if reference is None:
            raise RuntimeError(f"{self.name} has no reference: call set_reference.")
        return reference

    def real_features(self, reference: Statistics | None, like: Tensor) -> Tensor:
        """Features [m, d] of the real images, of the dtype and on the device of `like`."""
        features = self.require(reference).features
        assert features is not None
        return features.to(like)
