"""Some of the damage of mutations.py: eight cases of every kind."""

import os
import sys

import mutations
import pytest

CASES = 8


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.chdir(tmp_path_factory.mktemp("start"))
        for name in ("SDPRUNE_CACHE", "SDPRUNE_MINIATURE"):
            patch.setenv(name, os.environ.get(name, ""))
        yield mutations.Mutations(mutations.Bench(tmp_path_factory.mktemp("bench")), seed=0)


@pytest.mark.parametrize("kind", mutations.KINDS)
def test_damage_is_told_or_changes_nothing(cases, kind):
    wrong = [case for case in (cases.case(kind, number) for number in range(CASES)) if case[1] is not None]
    assert not wrong


def test_what_must_not_happen_is_seen(cases, monkeypatch):
    """A command line that crashes, says nothing, says too much or makes up numbers does not pass."""
    damaged = mutations.Mutations(cases.bench)
    damaged.expected = {"record": {"dense-1": {"fid": 1.0}}}

    def wrong(code, err, numbers=None):
        monkeypatch.setattr(damaged, "_numbers", lambda: {"dense-1": {"fid": numbers}})
        return damaged._wrong("record", mutations.Result(code, "", err), set(), unchanged=True) or ""

    assert wrong(1, "Traceback (most recent call last)\nKeyError: 'a'").startswith("traceback")
    assert wrong(1, "").startswith("exit code 1")
    assert wrong(2, "").startswith("0 lines")
    assert wrong(2, "sdprune: error: a\nand more").startswith("2 lines")
    assert "other numbers" in wrong(0, "", 2.0)
    assert not wrong(0, "", 1.0)
    assert not wrong(2, "sdprune: error: it is damaged")
