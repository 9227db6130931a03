"""What results depend on, and what notices that it changed: real pictures, kept files, a user's own code."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import picture, write_coco
from command_lines import CONFIGS, CPU, fit, predict, process, runs, the_run
from PIL import Image

DENSE = ["--model.prune.unet.sparsity=0", "--model.prune.text_encoder.sparsity=0"]
UNET = ["--model.prune.unet.sparsity=0.35", "--model.prune.text_encoder.sparsity=0"]


def results(run):
    return json.loads((run / "results.json").read_text())


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def flip(path: Path, place: float) -> None:
    """Change one byte, at this share of the file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(bytes(content))


def test_real_pictures_belong_to_how_a_run_was_scored(sdprune, tmp_path):
    """Other pictures under the same annotations: FID is measured again, nothing is drawn again, and a run that was
    measured against the old ones is another group of the report."""
    world = f"--data.source.cache={tmp_path}/cache"
    out = tmp_path / "out"
    text = ["--model.prune.text_encoder.sparsity=0.3", "--model.prune.unet.sparsity=0"]
    assert sdprune(*predict(out, world, *text)).code == 0
    dense = the_run(out, "dense")
    before, stamps = results(dense), [path.stat().st_mtime_ns for path in sorted(dense.glob("images/*"))]
    for path in (tmp_path / "cache").glob("world-*/val/*"):
        Image.fromarray(255 - np.array(Image.open(path))).save(path)
    assert sdprune(*predict(out, world, *UNET)).code == 0
    after = results(the_run(out, "dense"))
    assert after["metrics"]["fid"] != before["metrics"]["fid"]
    assert after["metrics"]["clip_score"] == before["metrics"]["clip_score"]
    assert [path.stat().st_mtime_ns for path in sorted(dense.glob("images/*"))] == stamps
    told = sdprune("report", out)
    assert (told.code, told.err) == (0, "")
    assert "3 runs in 2 comparable groups" in told.out


def test_real_pictures_that_nothing_is_compared_with_need_not_be_there(sdprune, tmp_path):
    arguments = predict(tmp_path / "out", f"--data.source.cache={tmp_path}/cache", *DENSE)
    only = {"model": {"init_args": {"metrics": [{"class_path": "CLIPScore", "init_args": {"model": "miniature"}}]}}}
    (tmp_path / "clip.yaml").write_text(json.dumps(only))
    arguments[3:3] = ["--config", str(tmp_path / "clip.yaml")]
    assert sdprune(*arguments).code == 0
    for path in (tmp_path / "cache").glob("world-*/val/*"):
        path.unlink()
    assert sdprune(*arguments).code == 0
    told = sdprune(*predict(tmp_path / "out", f"--data.source.cache={tmp_path}/cache", *DENSE))
    assert told.code == 2
    assert "7 real images cannot be used" in told.err
    assert "is missing" in told.err


def test_a_digest_follows_the_contents_and_reads_an_unchanged_file_once(tmp_path, monkeypatch):
    import hashlib

    from sdprune.identity import FileDigests

    monkeypatch.setenv("SDPRUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jpg"
    path.write_bytes(b"one")
    os.utime(path, ns=(1, 1))
    assert FileDigests("here").of([path]) == [hashlib.sha256(b"one").hexdigest()]
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda *args: pytest.fail("read again"))
        assert FileDigests("here").of([path]) == [hashlib.sha256(b"one").hexdigest()]
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))  # as if it had not changed
    (found,) = FileDigests("here").of([path])
    assert found == hashlib.sha256(b"two").hexdigest()
    missing, still = FileDigests("here").of([tmp_path / "b.jpg", path])
    assert isinstance(missing, FileNotFoundError)
    assert still == found


def test_a_digest_of_hub_pictures_follows_their_contents(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as Pictures

    from sdprune.data import HubDataset

    def digest(name, levels):
        features = Features({"caption": Value("string"), "image": Pictures()})
        rows = {"caption": ["a", "b"], "image": [picture(level) for level in levels]}
        (tmp_path / name).mkdir()
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / name / "train.parquet")
        source = HubDataset(str(tmp_path / name), "train")
        return source.digest(source.load())

    first = digest("one", [7, 14])
    assert digest("two", [7, 14]) == first
    assert len({first, digest("three", [7, 15]), digest("four", [14, 7])}) == 3


def coco_run(root, output, *options):
    config = ["predict", "--config", str(CONFIGS / "predict.yaml"), "--data.source=CocoDirectory"]
    config += [f"--data.source.root={root}", "--model.sampling.steps=1", "--model.samples=[]", CPU]
    return [*config, f"--model.output={output}", f"--model.store={output}/statistics", *DENSE, *options]


def rename(root, names):
    """Give the images of a COCO directory other file names."""
    file = root / "annotations" / "captions_train2017.json"
    content = json.loads(file.read_text())
    for image, name in zip(content["images"], names, strict=True):
        path = root / "train2017" / image["file_name"]
        target = root / "train2017" / name
        target.parent.mkdir(exist_ok=True)
        Image.open(path).save(target, format="PNG")
        path.unlink()
        image["file_name"] = name
    file.write_text(json.dumps(content))


def test_every_image_has_a_drawn_picture_of_its_own(sdprune, tmp_path):
    names = ["same.jpg", "same.png", "img.1", "img.2", "noend", "deep/same.jpg"]
    root = write_coco(tmp_path / "coco", n=len(names))
    rename(root, names)
    assert sdprune(*coco_run(root, tmp_path / "out", "--data.n=6", "--data.batch_size=2")).code == 0
    images = the_run(tmp_path / "out", "dense") / "images"
    drawn = {str(path.relative_to(images)): path.read_bytes() for path in images.rglob("*.png")}
    assert set(drawn) == {"same.png", "same.png.png", "img.1.png", "img.2.png", "noend.png", "deep/same.png"}
    assert len(set(drawn.values())) == 6


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a.png", "a.png.jpg"], "a.png and a.png.jpg would both be drawn into a.png.png: rename one"),
        (["b/a.jpg", "b//a.jpg"], "b/a.jpg and b//a.jpg would both be drawn into b/a.png"),
        (["a.jpg", "a.png/b.jpg"], "a.jpg would be drawn into a.png, the folder of a.png/b.jpg"),
    ],
)
def test_names_that_would_still_meet_are_refused(tmp_path, names, told):
    from sdprune.data.sources import caption_table
    from sdprune.errors import InputError

    with pytest.raises(InputError, match=told):
        caption_table("captions.json", [1, 2], names, ["one", "two"], ["", ""])


def test_ids_that_are_listed_twice_are_named(tmp_path):
    from sdprune.data import CocoDirectory
    from sdprune.errors import InputError

    root = write_coco(tmp_path)
    file = root / "annotations" / "captions_train2017.json"
    content = json.loads(file.read_text())
    content["images"].append({"id": 21, "file_name": "another.jpg"})
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="lists ids of images twice: 21"):
        CocoDirectory(root).load()


@pytest.fixture(scope="module")
def gathered(miniature, tmp_path_factory):
    """A store of statistics, which no test changes."""
    from sdprune.__main__ import main

    directory = tmp_path_factory.mktemp("gathered")
    assert main(fit("calibrate", directory)) == 0
    return directory


@pytest.mark.parametrize("damage", ["header", "middle", "end", "half", "empty", "lost", "facts"])
def test_damaged_statistics_are_gathered_again(gathered, sdprune, tmp_path, damage):
    shutil.copytree(gathered, tmp_path, dirs_exist_ok=True)
    whole = {path: path.read_bytes() for path in (tmp_path / "statistics").glob("*-*/*")}
    (file,) = (tmp_path / "statistics").glob("unet-input_norm-*/*.safetensors")
    if damage in ("header", "middle", "end"):
        flip(file, {"header": 0.005, "middle": 0.5, "end": 1.0}[damage])
    elif damage in ("half", "empty"):
        file.write_bytes(whole[file][: len(whole[file]) // 2 if damage == "half" else 0])
    elif damage == "lost":
        file.unlink()
    else:
        (file.parent / "facts.json").write_text('{"files": 3')
    told = sdprune(*fit("calibrate", tmp_path))
    assert (told.code, told.err) == (0, "")
    again = [line for line in told.out.splitlines() if "is damaged" in line]
    assert again == ([] if damage in ("lost", "facts") else [f"{file} is damaged: its statistics are gathered again."])
    assert {path: path.read_bytes() for path in whole} == whole
    assert "unet input_norm: gathered" in told.out
    assert "unet hessian: already in the store" in told.out


def test_pruning_does_not_use_damaged_statistics(sdprune, tmp_path):
    wanda = [*UNET, "--model.prune.unet.criterion=Wanda"]
    assert sdprune(*predict(tmp_path, *wanda)).code == 0
    first = results(the_run(tmp_path, "unet"))["pruning"]["unet"]["mask_hash"]
    (file,) = (tmp_path / "statistics").glob("unet-*/*.safetensors")
    flip(file, 0.7)
    shutil.rmtree(the_run(tmp_path, "unet"))
    told = sdprune(*predict(tmp_path, *wanda))
    assert told.code == 0
    assert told.out.count("is damaged") == 1
    assert results(the_run(tmp_path, "unet"))["pruning"]["unet"]["mask_hash"] == first


@pytest.mark.parametrize("place", [0.01, 0.3, 0.99])
def test_the_sums_of_an_interrupted_pass_are_checked(tmp_path, place):
    from sdprune.calibration.store import StatisticsStore

    progress = StatisticsStore(tmp_path).progress({"of": "a pass"})
    sums = {"input_norm/layer": torch.arange(300.0, dtype=torch.float64)}
    progress.save(3, 6, sums)
    batches, samples, kept = progress.load()
    assert (batches, samples) == (3, 6)
    assert torch.equal(kept["input_norm/layer"], sums["input_norm/layer"])
    flip(progress.path, place)
    assert progress.load() is None


def test_a_full_disk_while_statistics_are_written_is_one_line(sdprune, tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    assert os.strerror(errno.ENOSPC) == "No space left on device"
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    told = sdprune(*fit("calibrate", tmp_path))
    assert told.code == 1
    (line,) = told.err.splitlines()
    assert line.startswith("sdprune: failed: no space is left at ")


@pytest.fixture(scope="module")
def drawn(miniature, tmp_path_factory):
    """Two finished runs, which no test changes."""
    from sdprune.__main__ import main

    directory = tmp_path_factory.mktemp("drawn")
    assert main(predict(directory, *UNET)) == 0
    return directory


@pytest.mark.parametrize("prefix", ["unet", "dense"])
@pytest.mark.parametrize("damage", ["lost", "flipped", "replaced"])
def test_a_finished_run_notices_its_pictures(drawn, sdprune, tmp_path, damage, prefix):
    """With the command that made it, and before anything is compared with it."""
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    run = the_run(tmp_path, prefix)
    picture, other = sorted((run / "images").iterdir())[:2]
    whole = picture.read_bytes()
    if damage == "lost":
        picture.unlink()
    elif damage == "flipped":
        flip(picture, 0.6)
    else:
        shutil.copy(other, picture)
    told = sdprune(*predict(tmp_path, *UNET))
    assert told.code == 2
    (line,) = told.err.splitlines()
    assert f"1 of 7 pictures of a finished run are missing or are not those that were scored, such as {picture}" in line
    assert f"delete {run / 'results.json'}" in line
    if prefix == "dense":
        assert sdprune(*predict(tmp_path, *UNET, "--model.prune.unet.sparsity=0.2")).code == 2
        assert not list(tmp_path.glob("unet-*0.2*/images/*.png"))
    (run / "results.json").unlink()
    picture.unlink(missing_ok=True)
    assert sdprune(*predict(tmp_path, *UNET)).code == 0
    assert picture.read_bytes() == whole


def test_a_flipped_byte_of_a_picture_is_found_when_it_is_read(drawn, sdprune, tmp_path):
    """The pixels of a PNG can be read without looking at its checksums."""
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    run = the_run(tmp_path, "unet")
    (run / "results.json").unlink()
    picture = sorted((run / "images").iterdir())[3]
    flip(picture, 0.6)
    told = sdprune(*predict(tmp_path, *UNET))
    assert told.code == 2
    assert f"{picture} is missing or damaged: delete it and run again" in told.err


OWN = """
from sdprune.pruning.criteria.base import Ranking

class Shifted(Ranking):
    def score(self, weight, statistics):
        return (weight + SHIFT).abs()
"""


def test_a_criterion_whose_code_changed_is_another_criterion(miniature, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    own = tmp_path / "own_criteria.py"
    arguments = predict(
        tmp_path / "out", *UNET, "--model.prune.unet.criterion=own_criteria.Shifted", "--model.compare_dense=false"
    )
    hashes = []
    for shift in ("0.0", "0.5", "0.5"):
        own.write_text(OWN.replace("SHIFT", shift))
        done = process(arguments)
        assert done.returncode == 0, done.stderr
        found = runs(tmp_path / "out", "unet")
        hashes.append(sorted(results(run)["pruning"]["unet"]["mask_hash"] for run in found))
    assert [len(one) for one in hashes] == [1, 2, 2]
    assert len(set(hashes[-1])) == 2


def test_the_code_of_the_package_belongs_to_identity(tmp_path, monkeypatch):
    import sdprune.identity as identity

    copy = tmp_path / "sdprune"
    shutil.copytree(Path(identity.__file__).parent, copy, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    monkeypatch.setattr(identity, "_PACKAGE", copy)

    def code():
        identity.package_code.cache_clear()
        return identity.package_code()

    before = code()
    assert before.startswith(f"{identity.own_version()}+")
    (copy / "cli.py").write_text("# what is printed decides no number")
    assert code() == before
    (copy / "pruning" / "criteria" / "magnitude.py").write_text("# but this does")
    assert code() != before
    identity.package_code.cache_clear()
