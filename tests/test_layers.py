"""Imports run one way: pruning <- calibration; storage <- pipelines, data, metrics <- runs <- modules <- search,
playground <- configuration, cli."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "sdprune"
HEAVY = {"lightning", "diffusers", "transformers", "wandb", "datasets", "torchmetrics", "jsonargparse"}
BELOW_ALL = {"errors", "files", "hub", "identity", "locks", "outside", "processes", "schema", "verb"}
ALLOWED = {
    "pruning": {"pruning"},
    "calibration": {"calibration", "pruning"},
    "storage": {"storage"},
    "pipelines": {"pipelines", "pruning", "storage"},
    "data": {"data"},
    "metrics": {"metrics", "pipelines"},  # of pipelines only `resolve`
    "runs": {"runs", "data", "metrics", "pictures", "pruning"},
    "modules": {"modules", "api", "calibration", "data", "metrics", "pipelines", "pruning", "runs"},
    "inspection": {"inspection", "calibration", "pipelines", "pruning"},
    "lossless": {"lossless", "calibration", "inspection", "pipelines", "storage"},
    "search": {"search", "calibration", "data", "metrics", "modules", "pipelines", "pruning", "runs"},
    "playground": {"playground", "calibration", "configuration", "data", "metrics", "modules", "pruning"},
    # It reads records, and runs commands; of pipelines only `resolve`, for the name of the miniature, of mini only the
    # grammar of its captions.
    "study": {"study", "mini", "cli", "configuration", "metrics", "pipelines", "pruning", "runs", "pictures"},
    "mini": {"mini", "data", "metrics", "pipelines"},
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_lies_below_them(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        used = {name.split(".")[1] for name in imports(path) if name.startswith("sdprune.")}
        more = used - ALLOWED[package] - BELOW_ALL
        assert not more, f"{path.relative_to(ROOT)} imports {more}"


def test_what_lies_below_all_imports_nothing_else() -> None:
    for name in BELOW_ALL:
        used = {name.split(".")[1] for name in imports(ROOT / f"{name}.py") if name.startswith("sdprune.")}
        assert used <= BELOW_ALL


def test_the_science_sees_tensors_only() -> None:
    for path in (ROOT / "pruning").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)}
        assert not outside & HEAVY, f"{path.relative_to(ROOT)} imports {outside & HEAVY}"


def test_only_the_command_line_and_what_reads_captions_import_the_miniature() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if "mini" not in path.relative_to(ROOT).parts and any(n.startswith("sdprune.mini") for n in imports(path))
    }
    assert users == {"cli.py", "study/page/categories.py"}
