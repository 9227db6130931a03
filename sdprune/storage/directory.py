"""Directories of models: packed, unpacked, and unpacked for the moment in which they are loaded."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sdprune.errors import InputError
from sdprune.files import require_writable
from sdprune.outside import reading
from sdprune.storage.compact import SUFFIX, CompactFile, pack_file
from sdprune.storage.usage import PACK, UNPACK
from sdprune.verb import Verb

_PLAIN = ".safetensors"


def run_pack(arguments: Sequence[str]) -> int:
    """Do what these arguments of `sdprune pack` say, and return the exit code."""
    options = _parsed(PACK, arguments)
    pack(Path(options.directory), Path(options.out), options.compression == "zstd", report=print)
    return 0


def run_unpack(arguments: Sequence[str]) -> int:
    """Do what these arguments of `sdprune unpack` say, and return the exit code."""
    options = _parsed(UNPACK, arguments)
    unpack(Path(options.directory), Path(options.out), report=print)
    return 0


def _parsed(verb: Verb, arguments: Sequence[str]) -> Namespace:
    options = verb.parse(arguments)
    if options.out is None:  # argparse itself would say so even where --out is misspelt
        verb.error("--out is missing: give a new directory")
    return options


def pack(directory: Path, out: Path, compress: bool = True, report: Callable[[str], None] = lambda _: None) -> None:
    """Copy a directory, with its safetensors as compact files where these are smaller.

    Args:
        directory: of a model or a pipeline.
        out: a new or empty directory.
        compress: masks and values too.
        report: takes a line for each file.

    Raises:
        InputError: no such files, damage, an `out` that is in use or too small a disk.
    """
    tree = Tree(directory)
    if any(path.name.endswith(SUFFIX) for path in tree.files):
        raise InputError(f"{directory} is packed already: give a plain one, or unpack it first.")
    if not any(path.suffix == _PLAIN for path in tree.files):
        raise InputError(f"{directory} has no safetensors to pack: give the directory of a model or a pipeline.")
    with making(tree, out, sum(path.stat().st_size for path in tree.files)) as part:
        for path in tree.files:
            target = tree.inside(path, part)
            if path.suffix == _PLAIN:
                compact = target.with_name(path.name.removesuffix(_PLAIN) + SUFFIX)
                pack_file(path, compact, compress)
                before, after = path.stat().st_size, compact.stat().st_size
                if after < before:
                    report(f"{path.relative_to(directory)}: {_ratio(before, after)}")
                    continue
                compact.unlink()
                report(f"{path.relative_to(directory)}: {before / 1e6:,.1f} MB, kept plain: packed it is no smaller")
            copy(path, target)
        whole = _ratio(*(sum(one.stat().st_size for one in files) for files in (tree.files, Tree(part).files)))
    report(f"Packed: {out}, {whole}")


def _ratio(before: int, after: int) -> str:
    return f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({after / before:.3f})"


def unpack(directory: Path, out: Path, report: Callable[[str], None] = lambda _: None) -> None:
    """Copy a packed directory, with its compact files as the safetensors that they were, equal byte for byte.

    Raises:
        InputError: no such files, damage, an `out` that is in use or too small a disk.
    """
    tree = Tree(directory)
    compact = {path: CompactFile(path) for path in tree.files if path.name.endswith(SUFFIX)}
    if not compact:
        raise InputError(f"{directory} has no compact files (*{SUFFIX}): there is nothing to unpack.")
    sizes = sum(compact[path].size if path in compact else path.stat().st_size for path in tree.files)
    with making(tree, out, sizes) as part:
        for path in tree.files:
            target = tree.inside(path, part)
            if path in compact:
                compact[path].write(_plain(path, target))
                report(f"{path.relative_to(directory)}: {compact[path].size / 1e6:,.1f} MB")
            else:
                copy(path, target)
    report(f"Unpacked: {out}, {sizes / 1e6:,.1f} MB")


def _plain(path: Path, target: Path) -> Path:
    """Where the safetensors of a compact file go.

    Raises:
        InputError: they lie beside it too.
    """
    name = path.name.removesuffix(SUFFIX) + _PLAIN
    if path.with_name(name).exists():
        raise InputError(f"{path.parent} has both {path.name} and {name}: remove one of them.")
    return target.with_name(name)


@contextmanager
def unpacked(directory: Path) -> Iterator[Path]:
    """A component's directory with plain safetensors, for the length of a block.

    It is the directory itself where nothing is packed, otherwise a temporary one, so that packed and plain models are
    loaded by the same code.

    Raises:
        InputError: a compact file is damaged, or there is no space for its content.
    """
    compact = {path: CompactFile(path) for path in sorted(directory.glob(f"*{SUFFIX}"))}
    if not compact:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="sdprune-") as name:
        temporary = Path(name)
        _require_space(temporary, sum(one.size for one in compact.values()), "Set TMPDIR to another directory.")
        for path in directory.iterdir():
            if path in compact:
                compact[path].write(_plain(path, temporary / path.name))
            else:
                (temporary / path.name).symlink_to(path.absolute())
        yield temporary


class Tree:
    """The folders and files of a directory.

    Raises:
        InputError: it is none, or something in it cannot be copied.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise InputError(f"{directory} is no directory: give the directory of a model or a pipeline.")
        self.directory = directory
        self.folders: list[Path] = []
        self.files: list[Path] = []
        for root, folders, files in os.walk(directory, onerror=_raise):
            self.folders += (Path(root, name) for name in sorted(folders))
            self.files += (Path(root, name) for name in sorted(files))
        for path in (*self.folders, *self.files):
            if (path.is_symlink() and path.is_dir()) or not (path.is_dir() or path.is_file()):
                raise InputError(f"{path} is no file and no directory of its own: replace it by what it stands for.")

    def inside(self, path: Path, other: Path) -> Path:
        """Where a path of this directory lies in a copy of it."""
        return other / path.relative_to(self.directory)


def _raise(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read ({error.strerror}).") from error


def copy(path: Path, target: Path) -> None:
    """Copy a file. Raises InputError for one that cannot be read."""
    with reading(f"{path} cannot be copied", "Make it readable, or remove it."):
        shutil.copyfile(path, target)


@contextmanager
def making(tree: Tree, out: Path, size: int) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block ends well, with the folders of a tree in it."""
    out = out.absolute()
    if out.resolve().is_relative_to(tree.directory.resolve()):
        raise InputError(f"--out is {out}, inside of {tree.directory}: choose another --out.")
    _require_new(out)
    require_writable(out.parent, "--out")
    _require_space(out.parent, size, "Choose another --out.")
    part = out.with_name(f".{out.name}.part")
    part.mkdir(exist_ok=True)
    with _locked(part, out):
        try:
            _require_new(out)  # another run may have filled it before the lock was free
            for path in part.iterdir():  # what a killed attempt left
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for folder in tree.folders:
                tree.inside(folder, part).mkdir()
            yield part
            os.replace(part, out)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


@contextmanager
def _locked(part: Path, out: Path) -> Iterator[None]:
    """Hold a directory that is being filled; the lock of a process that is killed is free at once."""
    lock = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = not part.exists() or part.stat().st_ino != os.fstat(lock).st_ino  # another run has just finished
    except BlockingIOError:
        taken = True
    try:
        if taken:
            raise InputError(f"Another run is writing {out}: wait for it, or choose another --out.")
        yield
    finally:
        os.close(lock)


def _require_new(out: Path) -> None:
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise InputError(f"--out is {out}, which holds something: choose a new directory.")


def _require_space(directory: Path, size: int, then: str) -> None:
    free = shutil.disk_usage(directory).free
    if free < size:
        raise InputError(f"{directory} has {free / 1e9:,.2f} GB free, and {size / 1e9:,.2f} GB may be needed. {then}")
