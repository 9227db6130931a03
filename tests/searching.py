"""Searches on scores that are known for every prompt: what `sdprune search` does, without pictures."""

import numpy as np

from sdprune.search.certificate import FIRST
from sdprune.search.search import CERTIFICATE, SCALE, SEARCH, Model, Search


def run(search, scores_of, order, chunk=64):
    """Let a search go on to its end.

    Args:
        search: from its beginning.
        scores_of: the scores of a model for all prompts [m].
        order: places of the prompts that are drawn, [2 * n_max + FIRST].
        chunk: how many scores come at once.
    """
    n = search.n_max
    starts = {SEARCH: 0, CERTIFICATE: n, SCALE: 2 * n}
    ends = {SEARCH: n, CERTIFICATE: 2 * n, SCALE: 2 * n + FIRST}
    for wanted in search.work():
        start = starts[wanted.part] + len(search.scores.get((wanted.model.name, wanted.part), ()))
        places = order[start : min(start + chunk, ends[wanted.part])]
        search.add(wanted.model, wanted.part, scores_of(wanted.model)[places].tolist())
    return search


def simulate(tolerance, names, levels, scores_of, population, searches, seed=0, n_max=256, chunk=64):
    """Searches of single components, or of several and then all together, on prompts drawn anew with replacement.

    Args:
        tolerance: of the loss.
        names: of the components.
        levels: their sparsities, ascending.
        scores_of: as for `run`.
        population: how many prompts there are to draw from.
        searches: how many searches.
        seed: of the draws.
        n_max: images that a test may have.
        chunk: how many scores come at once.
    """
    chance = np.random.default_rng(seed)
    for _ in range(searches):
        paths = {name: [Model({name: level}) for level in levels] for name in names}
        order = chance.integers(0, population, 2 * n_max + FIRST)
        yield run(Search(tolerance, paths, n_max), scores_of, order, chunk)
