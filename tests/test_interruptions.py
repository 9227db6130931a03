"""Runs that are killed, that lose a process, or that meet another run of the same command.

    SDPRUNE_KILLS=30 pytest -n 0 -s tests/test_interruptions.py -k kills

kills thirty times, at random moments, on one to three processes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_lines import differences, everything, predict, process, the_run

KILLS = int(os.environ.get("SDPRUNE_KILLS", "3"))
WANDA = ["--model.prune.unet.criterion=Wanda", "--model.prune.text_encoder.criterion=Wanda"]
SDPRUNE = Path(sys.executable).parent / "sdprune"


def start(arguments, **options) -> "subprocess.Popen[str]":
    """In a process group of its own, so that all of its processes can be killed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([SDPRUNE, *arguments], start_new_session=True, **(pipes | options))


@pytest.fixture(scope="module")
def whole(miniature, tmp_path_factory):
    """(What an uninterrupted run leaves, how long it takes.)"""
    output = tmp_path_factory.mktemp("whole")
    begun = time.monotonic()
    done = process(predict(output, *WANDA))
    assert done.returncode == 0, done.stderr
    return everything(output), time.monotonic() - begun


def test_kills_at_any_moment_change_nothing(whole, tmp_path):
    wanted, duration = whole
    chance = random.Random(0)
    killed = finished = 0
    output = tmp_path / "0"
    while killed < KILLS:
        processes = chance.choice([1, 2, 3])
        running = start(predict(output, *WANDA, f"--trainer.devices={processes}"))
        try:
            told, _ = running.communicate(timeout=chance.uniform(0.2, 2) * duration)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.communicate()
            killed += 1
            continue
        assert running.returncode == 0, told
        assert everything(output).keys() == wanted.keys()
        assert everything(output) == wanted
        finished += 1
        output = tmp_path / str(finished)
    done = process(predict(output, *WANDA))
    assert done.returncode == 0, done.stderr
    assert differences(everything(output), wanted) == []
    print(f"\n{killed} kills, {finished + 1} runs went on to the end")


@pytest.mark.parametrize("lost", ["first", "second"])
def test_a_process_that_dies_ends_the_others(miniature, tmp_path, lost):
    arguments = predict(tmp_path, "--trainer.devices=2", "--data.n=40", "--model.sampling.steps=30")
    running = start(arguments)
    for _ in range(1200):
        time.sleep(0.1)
        if list(tmp_path.glob("dense-*/images/*.png")) or running.poll() is not None:
            break
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    (child,) = [int(pid) for pid in children if b"sdprune" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(running.pid if lost == "first" else child, signal.SIGKILL)
    told, _ = running.communicate(timeout=60)  # the pipe is open as long as any of them lives
    assert running.returncode != 0
    assert ("a process of this run has died" if lost == "second" else "process that started this one") in told
    assert not list(tmp_path.glob("*/results.json"))


def test_two_runs_of_one_command_make_it_once(whole, tmp_path):
    wanted, _ = whole
    runs = [start(predict(tmp_path, *WANDA)) for _ in range(2)]
    told = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert differences(everything(tmp_path), wanted) == []
    generated = [line for text in told for line in text.splitlines() if "7 of 7 images" in line]
    assert len(generated) == 2  # the dense and the pruned ones, each by one of the two


def slowly_compared(output, *options):
    """The main job with one metric, whose comparison takes as long as SLOW_COMPARISON says."""
    metric = {"class_path": "slow_comparison.SlowComparison", "init_args": {"model": "miniature"}}
    config = output / "slow.yaml"
    config.write_text(json.dumps({"model": {"init_args": {"metrics": [metric]}}}))
    arguments = predict(output / "runs", *options)
    arguments[3:3] = ["--config", str(config)]
    return arguments


def in_tests(seconds):
    """Where processes find the metric, and how slow it is."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "SLOW_COMPARISON": str(seconds)}


def test_a_comparison_may_take_longer_than_processes_wait(miniature, tmp_path):
    running = start(slowly_compared(tmp_path, "--trainer.devices=2"), env=in_tests(12))
    told, _ = running.communicate(timeout=300)
    assert running.returncode == 0, told
    found = json.loads((the_run(tmp_path / "runs", "text_encoder") / "results.json").read_text())
    assert "clip_score_diff_low" in found["comparison"]
    assert found["verdicts"]["clip_score"]["tolerance"] == 0.002
    assert "clip_score (cosine" in told


def test_a_killed_comparison_is_picked_up_without_drawing(sdprune, miniature, tmp_path, monkeypatch):
    from sdprune.metrics import ClipImageFeatures
    from sdprune.pipelines import StableDiffusion

    running = start(slowly_compared(tmp_path), env=in_tests(1000))
    for _ in range(1200):
        time.sleep(0.1)
        if list(tmp_path.glob("runs/text_encoder*/results.json")) or running.poll() is not None:
            break
    time.sleep(0.5)
    assert running.poll() is None
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    run = the_run(tmp_path / "runs", "text_encoder")
    killed = json.loads((run / "results.json").read_text())
    assert (killed["comparison"], killed["verdicts"]) == ({}, {})
    monkeypatch.setattr(StableDiffusion, "load", lambda *args: pytest.fail("loaded"))
    monkeypatch.setattr(ClipImageFeatures, "extract", lambda *args: pytest.fail("run"))
    assert sdprune(*slowly_compared(tmp_path)).code == 0
    found = json.loads((run / "results.json").read_text())
    assert found["metrics"] == killed["metrics"]
    assert found["speed"] == killed["speed"]
    dense = json.loads((the_run(tmp_path / "runs", "dense") / "results.json").read_text())["metrics"]["clip_score"]
    assert found["comparison"]["clip_score_diff"] == pytest.approx(killed["metrics"]["clip_score"] - dense, abs=1e-12)


def test_a_run_waits_for_another_and_says_so(tmp_path, monkeypatch, capsys):
    from sdprune.locks import RunLock

    monkeypatch.setattr("sdprune.locks._POLL", 0.01)
    holder, waiting, late = (RunLock(tmp_path, "dense-0") for _ in range(3))
    assert holder.acquire(lambda: False)
    looks = iter([False, False, False, True])
    assert not waiting.acquire(lambda: next(looks))
    assert capsys.readouterr().out == "Another run is making dense-0: waiting for it.\n"
    holder.release()
    assert late.acquire(lambda: False)
    late.release()


def test_two_trials_share_the_dense_record(miniature, tmp_path):
    options = (["--model.prune.unet.sparsity=0.2"], ["--model.prune.unet.sparsity=0.3"])
    runs = [start(predict(tmp_path, *own)) for own in options]
    told = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert sum("dense: 7 of 7 images" in text for text in told) == 1
    dense = the_run(tmp_path, "dense").name
    for sparsity in ("0.2", "0.3"):
        results = json.loads(
            (
                the_run(tmp_path, f"text_encoder-magnitude-layer-0.475-unet-magnitude-layer-{sparsity}")
                / "results.json"
            ).read_text()
        )
        assert results["comparison"]["dense"] == dense


def test_a_full_disk_is_one_line_and_loses_nothing(sdprune, miniature, tmp_path, monkeypatch):
    import errno

    from sdprune.runs.png import save_png

    written = []

    def full(path, *arguments):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        save_png(path, *arguments)

    monkeypatch.setattr("sdprune.modules.generation.save_png", full)
    told = sdprune(*predict(tmp_path))
    assert told.code == 1
    assert told.err.splitlines()[-1].startswith("sdprune: failed: no space is left at ")
    assert "Traceback" not in told.err
    monkeypatch.undo()
    monkeypatch.setenv("SDPRUNE_MINIATURE", str(miniature))
    monkeypatch.setenv("SDPRUNE_CACHE", str(miniature / "cache"))
    assert len(list(tmp_path.glob("dense-*/images/*.png"))) == 3
    assert sdprune(*predict(tmp_path)).code == 0
    assert json.loads((the_run(tmp_path, "dense") / "results.json").read_text())["speed"]["generated"] == 4


def test_images_that_went_wrong_are_kept_counted_and_told(sdprune, tmp_path, monkeypatch):
    """Also when they are found finished by the next attempt."""
    from sdprune.pipelines import Drawn, StableDiffusion

    genuine = StableDiffusion.generate

    def broken(self, *arguments, **options):
        images, finite = genuine(self, *arguments, **options)
        images[0] = 0
        return Drawn(images, [False, *finite[1:]])

    monkeypatch.setattr(StableDiffusion, "generate", broken)
    told = sdprune(*predict(tmp_path))
    assert told.code == 0
    run = the_run(tmp_path, "text_encoder")
    first = json.loads((run / "results.json").read_text())["images"]
    assert (first["black"], first["not_finite"], len(first["invalid"])) == (4, 4, 4)  # one of each batch
    assert len(list((run / "images").glob("*.png"))) == 7
    assert "4 images are wholly black, 4 came out of numbers that are not finite" in told.out
    (run / "results.json").unlink()
    assert sdprune(*predict(tmp_path)).code == 0
    assert json.loads((run / "results.json").read_text())["images"] == first


def test_numbers_that_are_not_finite_are_seen(miniature):
    import torch

    from sdprune.pipelines import Sampling, StableDiffusion

    model = StableDiffusion("miniature")
    model.load(torch.float32, torch.device("cpu"))
    whole = model.generate(["a red star"] * 2, [1, 2], Sampling(steps=2))
    assert whole.finite == [True, True]

    def spoil(module, inputs, output):
        output[0][0] = torch.nan  # the first image's latents
        return output

    handle = model.components["unet"].register_forward_hook(spoil)
    spoiled = model.generate(["a red star"] * 2, [1, 2], Sampling(steps=2, guidance=1))
    handle.remove()
    assert spoiled.finite == [False, True]
    assert not spoiled.images[0].any()


def test_a_lost_dense_image_is_told_before_drawing_with_what_to_do(sdprune, miniature, tmp_path):
    assert sdprune(*predict(tmp_path)).code == 0
    dense = the_run(tmp_path, "dense")
    picture = sorted((dense / "images").glob("*.png"))[3]
    whole = picture.read_bytes()
    picture.unlink()
    told = sdprune(*predict(tmp_path, "--model.prune.unet.sparsity=0.2"))
    assert told.code == 2
    assert f"such as {picture}: delete {dense / 'results.json'}" in told.err
    assert not list(tmp_path.glob("*unet-magnitude-layer-0.2*/images/*.png"))
    (dense / "results.json").unlink()
    assert sdprune(*predict(tmp_path, "--model.prune.unet.sparsity=0.2")).code == 0
    assert picture.read_bytes() == whole


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    import errno

    from filelock import FileLock

    from sdprune.locks import RunLock

    def refuse(self, **_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert RunLock(tmp_path, "a").acquire()
    assert "on a file system without locks: start one run at a time" in capsys.readouterr().out
