"""Damages one file at a time, runs the command line on it, and looks for what must not happen.

python tests/mutations.py --n 1600 --seed 0      all kinds, some 20 minutes on one core
python tests/mutations.py --kind model --only 17 one case again

What must not happen: a traceback, a hang, more than one line of error, a file that is executed, files that are lost, or
numbers that are neither those of the undamaged input nor marked as those of another one.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coco_files import write_coco

CONFIG = Path(__file__).parents[1] / "configs" / "mini" / "predict.yaml"
SECONDS = 300  # by the clock: far more than a slow machine takes
CANARY = "import pathlib\npathlib.Path({!r}).touch()\n"


# --- damage ----------------------------------------------------------------------------------------------------


def _flip(data: bytes, dice: random.Random) -> bytes:
    if not data:
        return b"\0"
    # Half of the flips go where formats keep their structure: the first kilobyte.
    place = dice.randrange(min(len(data), 1024) if dice.random() < 0.5 else len(data))
    return data[:place] + bytes([data[place] ^ (1 << dice.randrange(8))]) + data[place + 1 :]


def _zero(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data) + 1)
    size = min(len(data) - start, dice.choice([1, 8, 64, 1024]))
    return data[:start] + bytes(size) + data[start + size :]


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": lambda data, dice: data[: dice.randrange(len(data) + 1)],
    "flipped": _flip,
    "zeroed": _zero,
    "empty": lambda data, dice: b"",
    "longer": lambda data, dice: data + dice.randbytes(dice.choice([1, 100])),
    "noise": lambda data, dice: dice.randbytes(dice.choice([1, 100, 5000])),
}
PLACES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: None,
    "a directory": lambda path: path.mkdir(),
    "a loop": lambda path: path.symlink_to(path),
    "a dangling link": lambda path: path.symlink_to(path.with_name("nowhere")),
}
VALUES = [
    None, True, 0, -1, 1, 2**31, 2**63, 2**70, 10**300, 1e308, -0.5, "", "x", "canary", "\ud800", "a\0b", "../../x",
    "\n", [], {}, [[]], [None], {"a": 1}, "x" * 300, ["canary", "Canary"], "canary.Canary",
]  # fmt: skip


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _nodes(value[key])


def _change_json(path: Path, dice: random.Random) -> str:
    content = json.loads(path.read_text())
    container, key = dice.choice(list(_nodes(content)))
    how = dice.choice(["value", "value", "value", "removed", "nested", "NaN", "renamed"])
    if how == "removed":
        del container[key]
    elif how == "renamed" and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    else:
        container[key] = "<here>" if how in ("nested", "NaN") else dice.choice(VALUES)
    depth = dice.choice([50, 900, 50_000])
    written = {"nested": "[" * depth + "]" * depth, "NaN": dice.choice(["NaN", "-Infinity", "1e999"])}.get(how, "")
    path.write_text(json.dumps(content).replace('"<here>"', written))
    return f"{how} at {key!r:.40}"


def mutate(path: Path, dice: random.Random) -> str:
    """Damage a file in place.

    Returns:
        What was done.
    """
    if path.suffix == ".json" and dice.random() < 0.6:
        return _change_json(path, dice)
    if dice.random() < 0.2:
        name = dice.choice(list(PLACES))
        path.unlink()
        PLACES[name](path)
        return name
    name = dice.choice(list(BYTES))
    data = path.read_bytes()
    path.write_bytes(BYTES[name](data, dice))
    return name


# --- what is damaged -------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a command line came to."""

    code: int
    out: str
    err: str
    hung: bool = False


class Bench:
    """Whole inputs, and a copy of them that is damaged again and again.

    Args:
        root: an empty directory.
    """

    def __init__(self, root: Path) -> None:
        from sdprune.mini.models import save_random

        self.whole, self.copy, self.executed = root / "whole", root / "copy", root / "executed"
        os.environ["SDPRUNE_CACHE"] = str(root / "cache")
        models = root / "models"
        save_random(models)
        os.environ["SDPRUNE_MINIATURE"] = str(models)
        self.whole.mkdir()
        shutil.copytree(models / "pipeline", self.whole / "model")
        shutil.copytree(models / "evaluator", self.whole / "evaluator")
        write_coco(self.whole / "coco", n=4, split="val2017")
        (self.whole / "prompts.txt").write_text("a red star\na blue ring\na cat\n")
        (self.whole / "config.yaml").write_text(CONFIG.read_text())
        (self.whole / "sweep.yaml").write_text(self._sweep())
        shutil.copytree(self.whole, self.copy)
        for place in (root, self.whole):
            (place / "canary.py").write_text(CANARY.format(str(self.executed)))
        sys.path.insert(0, str(root))
        os.chdir(root)
        self._make_outputs()

    def _make_outputs(self) -> None:
        assert self.run(*self.predict("runs", "--model.prune.unet.sparsity=0.3")).code == 0
        assert self.run(*self.predict("gathered", *WANDA)).code == 0
        (reference,) = (self.copy / "runs" / "reference").glob("*.npz")
        shutil.copy(reference, self.copy / "reference.npz")
        shutil.move(self.copy / "gathered" / "statistics", self.copy / "statistics")
        for name in ("runs", "statistics", "reference.npz"):
            (shutil.copytree if (self.copy / name).is_dir() else shutil.copy)(self.copy / name, self.whole / name)

    def predict(self, output: str, *options: str) -> list[str]:
        """A run of two images with one step each, on the copies."""
        small = ["--data.n=2", "--data.batch_size=2", "--model.sampling.steps=1", "--model.samples=[a red star]"]
        small += ["--trainer.accelerator=cpu", "--data.calibration=null", "--data.calibration_n=2"]
        small += ["--model.prune.unet.sparsity=0", "--model.prune.text_encoder.sparsity=0", f"--data.source={COCO}"]
        small += [f"--data.source.root={self.copy}/coco", "--data.source.split=val2017"]
        small += [f"--model.pipeline.model={self.copy}/model"]
        where = [f"--model.output={self.copy}/{output}", f"--model.store={self.copy}/{output}/statistics"]
        return ["predict", "--config", str(CONFIG), *small, *where, *options]

    def _sweep(self) -> str:
        command = ["sdprune", *self.predict("swept"), "${args}"]
        parameters = {"model.seed": {"values": [0]}, "model.prune.unet.sparsity": {"values": [0.0, 0.3]}}
        return json.dumps({"method": "grid", "command": command, "parameters": parameters}, indent=1)

    def run(self, *arguments: str) -> Result:
        """Run a command line in this process, for SECONDS at most."""
        from sdprune.__main__ import main

        out, err = io.StringIO(), io.StringIO()
        signal.signal(signal.SIGALRM, _hang)
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(list(arguments))
        except _HangError:
            return Result(-1, out.getvalue(), err.getvalue(), hung=True)
        except BaseException:
            return Result(-1, out.getvalue(), err.getvalue() + traceback.format_exc())
        finally:
            signal.alarm(0)
        return Result(code, out.getvalue(), err.getvalue())

    def restore(self) -> None:
        """Make the copy whole again."""
        shutil.rmtree(self.copy)
        shutil.copytree(self.whole, self.copy)
        self.executed.unlink(missing_ok=True)


class _HangError(BaseException):
    pass


def _hang(*_: object) -> None:
    raise _HangError


COCO = "CocoDirectory"
WANDA = ["--model.prune.text_encoder.sparsity=0.5", "--model.prune.text_encoder.criterion=Wanda"]


@dataclass(frozen=True)
class Kind:
    """Files that are damaged alike.

    Args:
        pattern: which files of the copy.
        command: the command line that reads them.
        same: whether the numbers must be those of the undamaged files, because the damaged ones are results.
        prepare: what is removed first, so that the damaged files are read.
    """

    pattern: str
    command: Callable[[Bench], list[str]]
    same: bool = False
    prepare: Callable[[Path], object] = lambda copy: None


def _unfinish(copy: Path) -> None:
    for path in copy.glob("runs/*/results.json"):
        path.unlink()


KINDS = {
    "model": Kind("model/**/*", lambda b: b.predict("new")),
    "evaluator": Kind("evaluator/*", lambda b: b.predict("new", f"--model.metrics={_clip(b)}")),
    "annotations": Kind("coco/annotations/*.json", lambda b: b.predict("new")),
    "pictures": Kind("coco/val2017/*.jpg", lambda b: b.predict("new")),
    "prompts": Kind("prompts.txt", lambda b: b.predict("new", *_text(b))),
    "reference": Kind("reference.npz", lambda b: b.predict("new", f"--data.reference={b.copy}/reference.npz")),
    "configuration": Kind("config.yaml", lambda b: [
        f"{b.copy}/config.yaml" if word == str(CONFIG) else word for word in b.predict("new")]),
    "sweep": Kind("sweep.yaml", lambda b: ["sweep", f"{b.copy}/sweep.yaml", "--jobs=1"]),
    "record": Kind("runs/*/*.*", lambda b: b.predict("runs", "--model.prune.unet.sparsity=0.3"), same=True),
    "images": Kind("runs/*/images/*", lambda b: b.predict("runs", "--model.prune.unet.sparsity=0.3"), same=True,
                   prepare=_unfinish),
    "cache": Kind("runs/reference/*", lambda b: b.predict("runs", "--model.prune.unet.sparsity=0.3"), same=True,
                  prepare=_unfinish),
    "report": Kind("runs/*/*.*", lambda b: ["report", f"{b.copy}/runs"]),
    "statistics": Kind("statistics/*/*", lambda b: b.predict("new", *WANDA, f"--model.store={b.copy}/statistics"),
                       same=True),
}  # fmt: skip


def _clip(bench: Bench) -> str:
    return json.dumps([{"class_path": "CLIPScore", "init_args": {"model": f"{bench.copy}/evaluator"}}])


def _text(bench: Bench) -> list[str]:
    score = json.dumps([{"class_path": "CLIPScore", "init_args": {"model": "miniature"}}])
    return ["--data.source=TextFile", f"--data.source.path={bench.copy}/prompts.txt", f"--model.metrics={score}"]


# --- what must not happen --------------------------------------------------------------------------------------


class Mutations:
    """Cases, each told by its kind and number alone.

    Args:
        bench: where.
        seed: of all cases.
    """

    def __init__(self, bench: Bench, seed: int = 0) -> None:
        self.bench, self.seed = bench, seed
        self.expected: dict[str, dict[str, Any]] = {}

    def case(self, kind: str, number: int) -> tuple[str, str | None]:
        """Run one.

        Returns:
            (what was damaged how, what went wrong or None).
        """
        bench, what = self.bench, KINDS[kind]
        if kind not in self.expected:
            self.expected[kind] = self._undamaged(kind)
        bench.restore()
        what.prepare(bench.copy)
        dice = random.Random(f"{self.seed}:{kind}:{number}")
        files = sorted(path for path in bench.copy.glob(what.pattern) if path.is_file())
        path = dice.choice(files)
        whole = path.read_bytes()
        how = mutate(path, dice)
        unchanged = path.is_file() and path.read_bytes() == whole
        before = {file for file in bench.copy.rglob("*") if not file.is_dir()}
        result = bench.run(*what.command(bench))
        lost = {file for file in before - {path} if not (file.exists() or file.is_symlink())}
        label = f"{kind} {number}: {path.relative_to(bench.copy)} {how}"
        return label, self._wrong(kind, result, lost, unchanged)

    def _undamaged(self, kind: str) -> dict[str, Any]:
        self.bench.restore()
        KINDS[kind].prepare(self.bench.copy)
        result = self.bench.run(*KINDS[kind].command(self.bench))
        assert result.code == 0, (kind, result)
        return self._numbers()

    def _numbers(self) -> dict[str, Any]:
        """By the name of each record, its scores."""
        found = {}
        for path in sorted(self.bench.copy.glob("*/*/results.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found[path.parent.name] = json.loads(path.read_text())["metrics"]
        return found

    def _wrong(self, kind: str, result: Result, lost: set[Path], unchanged: bool) -> str | None:
        if result.hung:
            return "hangs"
        if "Traceback" in result.err:
            return "traceback: " + result.err.strip().splitlines()[-1][:200]
        if self.bench.executed.exists():
            return "executed a file"
        if lost:
            return f"lost {sorted(map(str, lost))[:3]}"
        lines = result.err.strip().splitlines()
        if kind == "sweep":
            return None if result.code in (0, 1, 2) else f"exit code {result.code}"
        if result.code == 2:
            return (
                None if len(lines) == 1 and lines[0].startswith("sdprune: error: ") else f"{len(lines)} lines: {lines}"
            )
        if result.code != 0:
            return f"exit code {result.code}: {lines}"
        return self._wrong_numbers(kind, unchanged)

    def _wrong_numbers(self, kind: str, unchanged: bool) -> str | None:
        """Numbers of the undamaged input must be its own; damaged input is another record."""
        expected, found = self.expected[kind], self._numbers()
        for name in expected.keys() & found.keys():
            if found[name] != expected[name]:
                return f"other numbers in silence: {name}: {found[name]} instead of {expected[name]}"
        if KINDS[kind].same or unchanged:
            missing = expected.keys() - found.keys()
            return f"no numbers for {sorted(missing)}" if missing and kind != "record" else None
        return None


def main() -> int:
    """Run cases of all kinds in turn and print those that went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--only", type=int)
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    import tempfile

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as root:
        mutations = Mutations(Bench(Path(root)), given.seed)
        kinds = given.kind or list(KINDS)
        wrong = 0
        for step in range(given.n if given.only is None else len(kinds)):
            number = step // len(kinds) if given.only is None else given.only
            label, problem = mutations.case(kinds[step % len(kinds)], number)
            wrong += problem is not None
            if problem or given.verbose:
                print(f"{label}: {problem or 'right'}", flush=True)
        print(f"{wrong} went wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
