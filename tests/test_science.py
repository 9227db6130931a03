"""Masks, statistics, pictures and scores are those that were recorded, to the bit, whatever was rebuilt since."""

import json

import pytest
import science

RECORDED = json.loads(science.DATA.read_text())


@pytest.fixture(autouse=True)
def same_machine(monkeypatch):
    monkeypatch.delenv("SDPRUNE_MINIATURE", raising=False)
    if science.machine() != RECORDED["machine"]:
        pytest.skip("this machine rounds otherwise than the one that science.json was recorded on")


def test_masks_and_statistics():
    assert dict(science.masks()) == RECORDED["masks"]


def test_pictures_and_scores():
    found = json.loads(json.dumps(dict(science.pictures())))
    for name, recorded in RECORDED["pictures"].items():
        assert found[name] == recorded, name
    assert found.keys() == RECORDED["pictures"].keys()
