"""Statistics of the real images, computed once and kept under a fingerprint of what they depend on."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdprune.identity import facts_of
from sdprune.metrics.features.base import FeatureExtractor
from sdprune.metrics.frechet import Moments, Statistics

BATCH_SIZE = 32


def reference_path(extractor: FeatureExtractor, cache_dir: str | Path, key: Mapping[str, Any]) -> Path:
    """Where the cache keeps the statistics of `key` under `extractor`: `<cache_dir>/fid-<fingerprint>.npz`."""
    facts = {"images": dict(key), "extractor": facts_of(extractor)}
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return Path(cache_dir) / f"fid-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}.npz"


def reference_statistics(
    images: Callable[[], Iterable[Tensor]],
    extractor: FeatureExtractor,
    cache_dir: str | Path,
    key: Mapping[str, Any],
    keep_features: bool = False,
) -> Statistics:
    """Feature statistics of the real images, from the cache or computed and cached.

    Two processes that compute the same entry at once write equal files, each whole; with many processes it saves
    work to let one go first.

    Args:
        images: called only when the cache has no entry; yields uint8 images [3, h, w] of any sizes.
        extractor: the protocol that the generated images are measured with.
        cache_dir: created when missing.
        key: JSON-able facts that tell this set of images from any other.
        keep_features: keep the features themselves too; a cached file without them is made anew.

    Raises:
        InputError: fewer than two images, or a cached file that cannot be read.
    """
    path = reference_path(extractor, cache_dir, key)
    if path.exists():
        cached = Statistics.load(path)
        if cached.features is not None or not keep_features:
            return cached
    moments, kept = Moments(), []
    for features in _feature_batches(images(), extractor):
        features = features.cpu()
        moments.add(features)
        if keep_features:
            kept.append(features)
    statistics = moments.statistics(extractor.name)
    if kept:
        statistics = replace(statistics, features=torch.cat(kept))
    statistics.save(path)
    return statistics


def _feature_batches(images: Iterable[Tensor], extractor: FeatureExtractor) -> Iterator[Tensor]:
    # Real images differ in size, so each is preprocessed alone; the network sees batches.
    pixels = (extractor.preprocess(image[None], generated=False) for image in images)
    while batch := list(islice(pixels, BATCH_SIZE)):
        yield extractor.extract(torch.cat(batch))
