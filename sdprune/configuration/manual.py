"""The text of --help: the options of a verb or of a class, from signatures and docstrings."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from sdprune.configuration.options import Configuration, unknown_option
from sdprune.errors import InputError
from sdprune.schema import REQUIRED, Option, bases_of, choices_of, class_named, elements_of, options_of, summary_of

_TRAINER = {
    "accelerator": "cpu, gpu or auto",
    "devices": "processes on each machine, one a GPU",
    "num_nodes": "machines",
    "precision": "16-true holds the weights in fp16, bf16-true in bf16, 32-true in fp32",
}
_NAMED = {"prune": "COMPONENT", "narrow": "COMPONENT"}
"""What the keys of a dict are, by the option that holds it."""


def manual_of_verb(verb: str, description: str, configuration: Configuration, main: dict[str, str]) -> str:
    """The help of a verb.

    Args:
        verb: its name.
        description: what it does.
        configuration: what was given beside --help.
        main: by option, the class that is shown where none was given.
    """
    root = configuration.root
    own = {name: one for name, one in root.items() if name not in ("help", "model", "data", "trainer")}
    parts = [f"usage: sdprune {verb} --config FILE [options]", _wrapped(description, "")]
    parts.append("options:\n" + _lines("", own))
    for place, name in main.items():
        cls = configuration.classes.get(place) or class_named(place, name, bases_of(root[place].annotation))
        parts.append(_page(place, cls, configuration))
    trainer = options_of(configuration.groups["trainer"]) or {}
    shown = {name: dataclasses.replace(trainer[name], annotation=str, doc=doc) for name, doc in _TRAINER.items()}
    parts.append("the trainer (all of its options: --trainer.help):\n" + _lines("trainer.", shown))
    return "\n\n".join(parts)


def manual_of(place: str, name: str | None, configuration: Configuration) -> str:
    """The help of an option that takes a class: `--data.source.help`, `--data.source.help CocoDirectory`.

    Raises:
        InputError: no such option, or no such class.
    """
    option, place = _found(place, configuration)
    bases = bases_of(option.annotation) or bases_of(elements_of(option.annotation, "list"))
    bases = bases or bases_of(elements_of(option.annotation, "dict"))
    if not bases:
        raise InputError(f"--{place} takes no class: it is {_kind(option.annotation)}. {option.doc}")
    if place in configuration.groups:
        return _page(place, configuration.groups[place], configuration)
    if name is not None:
        return _page(place, class_named(place, name, bases), configuration)
    chosen, choices = configuration.classes.get(place), choices_of(bases)
    if chosen is None and len(choices) == 1:
        (chosen,) = choices.values()
    if chosen is not None and len(choices) == 1:
        return _page(_prefix(place, option), chosen, configuration)
    head = f"--{place}=CLASS{_default(option)}: {option.doc}" if option.doc else f"--{place}=CLASS{_default(option)}"
    pages = [_page(place, cls, configuration, short=True) for cls in choices.values()]
    return "\n\n".join([_wrapped(head, ""), *pages, f"One of them in full: --{place}.help CLASS"])


def _found(place: str, configuration: Configuration) -> tuple[Option, str]:
    """The option at a place, and the place; through the classes that were named, else those that could be."""
    options: dict[str, Option] = dict(configuration.root)
    here, owner = "", ""
    option = Option(Any)
    parts = place.split(".")
    while parts:
        name = parts.pop(0)
        here = f"{here}.{name}".lstrip(".")
        if name not in options:
            raise unknown_option(here, None, list(options), owner)
        option = options[name]
        if (inner := elements_of(option.annotation, "dict")) and parts:
            here = f"{here}.{parts.pop(0)}"  # the name of a component
            option = Option(inner)
        if not parts:
            break
        bases = bases_of(option.annotation) or bases_of(elements_of(option.annotation, "list"))
        cls = configuration.class_at(here, option)
        candidates = [cls] if cls is not None else list(choices_of(bases).values())
        options = {key: one for cls in candidates for key, one in (options_of(cls) or {}).items()}
        owner = candidates[0].__name__ if len(candidates) == 1 else ""
    return option, here


def _prefix(place: str, option: Option) -> str:
    """The place of a class's options, with a word for the name of a component."""
    named = elements_of(option.annotation, "dict") is not None
    return f"{place}.{_NAMED.get(place.rpartition('.')[2], 'NAME')}" if named else place


def _page(place: str, cls: Any, configuration: Configuration, short: bool = False) -> str:
    options = options_of(cls) or {}
    if not place.startswith("trainer"):
        options = _expanded(options)
    head = _wrapped(f"{cls.__name__}: {summary_of(cls)}", "")
    lines = _lines(f"{place}.", options)
    return f"{head}\n{lines}" if lines else head + ("" if short else "\n  It has no options.")


def _expanded(options: dict[str, Option]) -> dict[str, Option]:
    """Dataclasses replaced by their fields."""
    found: dict[str, Option] = {}
    for name, option in options.items():
        inner = elements_of(option.annotation, "dict")
        bases = bases_of(option.annotation) or bases_of(inner)
        if len(bases) == 1 and dataclasses.is_dataclass(bases[0]):
            prefix = _prefix(name, option)
            fields = options_of(bases[0]) or {}
            found |= {f"{prefix}.{key}": _with_value(one, key, option.default) for key, one in fields.items()}
        else:
            found[name] = option
    return found


def _with_value(option: Option, name: str, owner: Any) -> Option:
    """A field's default is its value in the default of what holds it; where that is None nothing is required."""
    default = None if owner is None and option.default is REQUIRED else option.default
    return dataclasses.replace(option, default=getattr(owner, name, default))


def _lines(prefix: str, options: dict[str, Option]) -> str:
    return "\n".join(line for name, option in options.items() for line in _line(f"--{prefix}{name}", option))


def _line(name: str, option: Option) -> Iterator[str]:
    classes = choices_of(bases_of(option.annotation) or bases_of(elements_of(option.annotation, "list")))
    text = option.doc.rstrip(".") + ("." if option.doc else "")
    if classes and len(classes) <= 12:
        text += f" Classes: {', '.join(classes)} ({name}.help)."
    elif classes:
        text += f" Classes: see {name}.help."
    yield f"  {name} {_kind(option.annotation)}".rstrip() + _default(option)
    if text.strip():
        yield _wrapped(" ".join(text.split()), "      ")


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, get_args(annotation))) + "}"
    for kind, word in {bool: "{true,false}", int: "INT", float: "FLOAT", str: "TEXT"}.items():
        if annotation is kind:
            return word
    if inner := elements_of(annotation, "list"):
        return f"[{_kind(inner)}, ...]"
    if inner := elements_of(annotation, "dict"):
        return f"{{NAME: {_kind(inner)}, ...}}"
    if get_origin(annotation) is tuple:
        return f"[{', '.join(map(_kind, get_args(annotation)))}]"
    if bases_of(annotation):
        return "CLASS"
    if annotation is Any:
        return "VALUE"
    if annotation is Path:
        return "PATH"
    if annotation is None:
        return ""
    words = [_kind(one) for one in get_args(annotation) if one is not type(None)]
    return " | ".join(dict.fromkeys(words)) or "VALUE"


def _default(option: Option) -> str:
    default = option.default
    if default is REQUIRED:
        return "  (required)"
    if default is None or type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS" or default == "==SUPPRESS==":
        return ""
    if isinstance(default, Sequence) and not isinstance(default, str):
        return f"  (default: [{', '.join(map(str, default))}])"
    plain = isinstance(default, (bool, int, float, str))
    text = str(default).lower() if isinstance(default, bool) else str(default) if plain else type(default).__name__
    return f"  (default: {text})"


def _wrapped(text: str, indent: str) -> str:
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
