"""The words of a command line, and the files that they name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from sdprune.errors import InputError


def given(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Options and their values; None where there is no value. `+=`, which appends, counts as `=`."""
    for number, word in enumerate(words):
        if not word.startswith("--") and word.partition("=")[0] != "-c":
            continue
        name, equals, value = word.partition("=")
        following = words[number + 1] if number + 1 < len(words) else "--"
        if not equals and following.startswith("--"):
            yield name.strip("-"), None
        else:
            yield name.lstrip("-").rstrip("+"), value if equals else following


def help_wanted(words: Sequence[str]) -> tuple[tuple[str, str | None] | None, list[str]]:
    """What a command line wants explained, if anything, and its other words.

    The first is (place, class); the place is empty for the verb. It stands for
    `--help`, `--data.source.help`, `--data.source.help CocoDirectory`, `--data.source.help=CocoDirectory`.
    """
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if word in ("-h", "--help") or (name.startswith("--") and name.endswith(".help")):
            following = words[number + 1 : number + 2]
            takes = bool(name.startswith("--") and not equals and following and not following[0].startswith("-"))
            rest = [*words[:number], *words[number + 1 + takes :]]
            place = name.lstrip("-").removesuffix("help").rstrip(".") if name != "-h" else ""
            return (place, value or (following[0] if takes else None)), rest
    return None, list(words)


def parsed(value: str | None) -> Any:
    """The value that a word of the command line holds; text that is no YAML as it is."""
    try:
        return None if value in (None, "None") else yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def quoted(words: Sequence[str]) -> list[str]:
    """Quote patterns such as `*` in the lists of a command line: YAML takes them for references to something before."""
    pattern = r""""[^"]*"|'[^']*'|(?<=[\[,\s:{])\*[^,\]}\s]*"""
    return [
        re.sub(pattern, lambda found: f'"{found[0]}"' if found[0].startswith("*") else found[0], word)
        if re.match(r"(--[\w.]+\+?=)?[\[{]", word) and "&" not in word
        else word
        for word in words
    ]


def read_file(path: Path) -> dict[str, Any]:
    """The content of a configuration file.

    Raises:
        InputError: it cannot be read, or holds no options.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read the configuration {path}: {error.strerror}. Give a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        hint = " Quote a pattern that begins with *, as in ['*']." if "alias" in reason else ""
        raise InputError(f"The configuration {path} is no valid YAML: {reason}.{hint}") from error
    if not isinstance(content, dict):
        raise InputError(f"The configuration {path} holds no options: expected YAML with model: and data:.")
    return content


def content_of(value: str) -> dict[str, Any] | None:
    """The content of a file that an option names in place of a class."""
    is_file = value.endswith((".yaml", ".yml", ".json")) and Path(value).is_file()
    return read_file(Path(value)) if is_file else None
