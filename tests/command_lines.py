"""Command lines that the tests run: the real configurations, made small."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "mini"
CPU = "--trainer.accelerator=cpu"


def predict(output: Path, *options: str) -> list[str]:
    """The main job: 7 images in batches of 2, 2 steps, 2 pictures of real ones to draw from a world of 40."""
    small = ["--data.n=7", "--data.batch_size=2", "--data.source.images=40", "--model.sampling.steps=2", CPU]
    small += ["--data.calibration.images=20", "--data.calibration_n=5", "--data.calibration_batch_size=2"]
    small += ["--model.samples=[a red star, a blue ring]"]
    where = [f"--model.output={output}", f"--model.store={output}/statistics"]
    return ["predict", "--config", str(CONFIGS / "predict.yaml"), *small, *where, *options]


def fit(config: str, output: Path, *options: str) -> list[str]:
    """`prune` or `calibrate`, on 5 captions in batches of 2."""
    small = ["--data.source.images=20", "--data.calibration_n=5", "--data.calibration_batch_size=2", CPU]
    small += ["--model.sampling.steps=2", f"--model.store={output}/statistics"]
    where = [f"--model.output={output}"] if config == "prune" else []
    return ["fit", "--config", str(CONFIGS / f"{config}.yaml"), *small, *where, *options]


def process(
    arguments: list[str], timeout: float = 300, interpreter: tuple[str, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    """Run the console script, or the interpreter with these arguments, such as `-m sdprune`."""
    script = [sys.executable, *interpreter] if interpreter else [str(Path(sys.executable).parent / "sdprune")]
    return subprocess.run([*script, *arguments], capture_output=True, text=True, timeout=timeout)


def runs(output: Path, prefix: str) -> list[Path]:
    """The run directories of an output whose names begin so."""
    return sorted(path for path in output.glob(f"{prefix}*") if (path / "config.json").exists())


def the_run(output: Path, prefix: str) -> Path:
    """The one run directory whose name begins so."""
    (found,) = runs(output, prefix)
    return found


def everything(output):
    """What a run leaves that must not depend on how it came about: every image, row, statistic and result."""
    found = {}
    for path in sorted(output.rglob("*")):
        inside = path.relative_to(output).parts
        if path.is_dir() or inside[0] in ("logs", ".locks") or inside[-2:-1] == (".locks",):
            continue
        if path.name == "config.yaml":  # has the command's own directories
            continue
        if path.name == "results.json":
            results = json.loads(path.read_text())
            del results["speed"], results["digest"]
            found[path.relative_to(output)] = json.dumps(results)
        elif path.name == "rows.npz":
            with np.load(path) as rows:
                found |= {path.relative_to(output) / key: rows[key].tobytes() for key in rows}
        else:
            found[path.relative_to(output)] = path.read_bytes()
    return found


def differences(one, other):
    return sorted(str(path) for path in {*one, *other} if one.get(path) != other.get(path))
