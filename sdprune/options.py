"""What a configuration may name, and what is wrong with one, in a line: the parser's own messages take fifty."""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import signature
from typing import Any, get_args, get_type_hints

from sdprune.errors import unknown
from sdprune.pruning.spec import subclasses

_KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "list": "a list, as in [a, b]",
          "str": "text, in quotes where YAML takes it for a number, as in '2:4'"}  # fmt: skip
_NEXT = "See --help, or --print_config for all options."


@dataclass
class Names:
    """The options of every class that can be reached from some options, and the classes that each option takes."""

    options: dict[str, list[str]] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)

    def add(self, option: str, annotation: Any) -> None:
        """Follow an option's type annotation."""
        for base in _classes(annotation):
            known = {**subclasses(base), base.__name__: base}
            concrete = {name: cls for name, cls in known.items() if _is_choice(cls)}
            self.classes[option] = sorted({*self.classes.get(option, []), *concrete})
            for name, cls in concrete.items():
                if name not in self.options:
                    self.options[name] = list(signature(cls).parameters)
                    for parameter, inner in get_type_hints(cls.__init__).items():  # type: ignore[misc]
                        self.add(parameter, inner)

    def unknown_option(self, option: str, parser: list[str]) -> str:
        """`Unknown option 'model.prune.unet.sparsty'. Did you mean ...`; `parser` has those outside of classes."""
        groups = list(self.options.values())
        every = {name for group in groups for name in group} | {part for name in parser for part in name.split(".")}
        first, *_ = parts = option.split(".")
        roots = sorted({name.split(".")[0] for name in parser})
        for part in [first, *reversed(parts)]:
            known = roots if part == first and close_to(part, roots) else every
            if part not in known and (close := close_to(part, sorted(known))):
                break
        else:
            return f"Unknown option {option!r}. {_NEXT}"
        near = [group for group in groups if close[0] in group]
        choices = f"Choices: {', '.join(near[0])}." if len(near) == 1 else _NEXT
        return f"Unknown option {option!r}. Did you mean {option.replace(part, close[0])!r}? {choices}"

    def unknown_class(self, option: str, name: str) -> str:
        """`Unknown criterion 'Magnitud'. Did you mean 'Magnitude'? Choices: ...`."""
        return str(unknown(option.rpartition(".")[2], name, self.classes.get(option.rpartition(".")[2], [])))


def close_to(name: str, names: list[str]) -> list[str]:
    """The one name that may have been meant, if any."""
    return get_close_matches(name, names, n=1, cutoff=0.7)


def explain(message: str, names: Names, parser: list[str]) -> str:
    """The parser's message in one line: the option, the value, the choices, the next step."""
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    nested = re.search(r"NestedArg\(key='([\w.+]+)', val=(.*)\)", message)
    place = f"{keys[0]}.{nested[1]}" if keys and nested else ".".join(dict.fromkeys(keys))
    if found := re.search(r"[Oo]ption '([\w.]+)'|unrecognized arguments: -*([\w.]+)", message):
        return names.unknown_option(place if nested else found[1] or found[2], parser)
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        key = re.findall(r'Parser key "([\w.]+)"', message[: found.start()])
        return names.unknown_class(key[-1] if key else place, found[1])
    if found := re.search(r"following arguments are required: (.*)", message):
        return f"Missing: {found[1]}. Give a configuration (--config FILE, as those in configs/), or options."
    value = re.search(r"Got value: (.*)", message) or re.search(r"Given value: (.*)", message)
    if value and (literals := re.findall(r"Expected a typing\.Literal(\[.*?\])", message)):
        choices = dict.fromkeys(str(choice) for literal in literals for choice in literal_eval(literal))
        return str(unknown(place, value[1], choices))
    kinds = [kind for kind in re.findall(r"Expected a <class '([\w.]+)'>", message) if kind != "NoneType"]
    if value and kinds:
        wanted = " or ".join(dict.fromkeys(_KINDS.get(kind, kind) for kind in kinds))
        return f"{place} is {value[1][:100]}: give {wanted}."
    first, *rest = [line.strip(" -") for line in message.splitlines() if line.strip()] or ["bad input"]
    return f"{first[:300]} {rest[-1][:100] if rest else ''}".rstrip()


def _classes(annotation: Any) -> Iterator[type]:
    """The classes in an annotation, but for those of the language."""
    if isinstance(annotation, type) and annotation.__module__ not in ("builtins", "pathlib"):
        yield annotation
    for argument in get_args(annotation):
        yield from _classes(argument)


def _is_choice(cls: type) -> bool:
    return not getattr(cls, "__abstractmethods__", None) and not cls.__module__.startswith(("lightning", "torch"))
