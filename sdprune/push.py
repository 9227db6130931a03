"""Send a directory to the model hub."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from sdprune.errors import InputError
from sdprune.verb import Verb, path

PUSH = Verb(
    "sdprune push", "sdprune push DIR USER/NAME [--public]", allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter, description="""\
Send a pruned, narrowed or packed model with its card to the model hub, in one commit. A repository that is new is
private, unless --public. The card must name the licence: it is that of the base model. Log in with `hf auth login`
first, or set HF_TOKEN.

  sdprune push runs/pruned me/stable-diffusion-2-pruned""",
)  # fmt: skip
PUSH.add_argument("directory", type=path, metavar="DIR", help="a diffusers directory with its README.md")
PUSH.add_argument("repository", type=path, metavar="USER/NAME", help="of the hub")
PUSH.add_argument("--public", action="store_true", help="let everybody read a repository that is new")

_DATA = {".safetensors", ".json", ".txt", ".model", ".md", ".png"}


def run(arguments: Sequence[str]) -> int:
    """Do what these arguments of `sdprune push` say, and return the exit code."""
    options = PUSH.parse(arguments)
    print(f"Sent: {push(Path(options.directory), options.repository, options.public)}")
    return 0


def push(directory: Path, repository: str, public: bool = False) -> str:
    """Send a directory to the hub in one commit, and return its address there.

    Args:
        directory: a diffusers directory with its card.
        repository: `USER/NAME`; its other files stay.
        public: of a repository that is new.

    Raises:
        InputError: the directory is not to be shared as it is, or what the hub answered.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from sdprune.hub import require_hub
    from sdprune.outside import reading

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise InputError(f"{repository!r} is no repository of the hub: give USER/NAME, such as me/sd2-pruned.")
    files = _files(directory)
    card = _card(directory, repository)
    size = sum(one.stat().st_size for one in files)
    print(f"{len(files)} files, {size / 1e6:,.1f} MB: {directory} -> {repository}", flush=True)
    require_hub("Nothing was sent.")
    hub = HfApi()
    content = {one: card.encode() if one == directory / "README.md" else one for one in files}
    then = "Log in with `hf auth login`, or set HF_TOKEN, as somebody who may write there, and give the command again."
    with reading(f"{repository} cannot be written on the hub", then):
        hub.create_repo(repository, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(one.relative_to(directory).as_posix(), data) for one, data in content.items()]
        return hub.create_commit(repository, operations, commit_message="Add the model pruned by sdprune").repo_url


def _files(directory: Path) -> list[Path]:
    """The files to send.

    Raises:
        InputError: the directory is no pipeline, or holds what is not data.
    """
    if not (directory / "model_index.json").is_file():
        raise InputError(f"{directory} has no model_index.json: give a directory that sdprune fit or pack wrote.")
    files = sorted(one for one in directory.rglob("*") if one.is_file() and not one.name.startswith("."))
    for one in files:
        if one.suffix not in _DATA:
            raise InputError(f"{one} is no file of a model's data ({', '.join(sorted(_DATA))}): remove it first.")
    return files


def _card(directory: Path, repository: str) -> str:
    """The text of the model card, which names the repository.

    Raises:
        InputError: it is missing, or does not name the licence.
    """
    from sdprune.modules.card import PLACE, front_matter

    file = directory / "README.md"
    if not file.is_file():
        raise InputError(f"{directory} has no model card, README.md: give a directory that sdprune fit or pack wrote.")
    if not front_matter(file).get("license"):
        raise InputError(f"{file} names no licence: add the base model's to its head, as in `license: openrail++`.")
    return file.read_text(encoding="utf-8").replace(PLACE, repository)
