"""Checks a configuration against the signatures of its classes, and says in a line what is wrong with it.

The parser checks the types of values. Its messages on names take fifty lines, and list the choices of other classes.
"""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sdprune.configuration.words import content_of, given, parsed, read_file
from sdprune.errors import InputError, unknown
from sdprune.schema import REQUIRED, Option, bases_of, choices_of, class_named, elements_of, options_of, takes

_KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "list": "a list, as in [a, b]"}
_KINDS |= {"tuple": _KINDS["list"]}
_KINDS |= {
    "dict": "options by name, as in {a: 1}",
    "str": "text, in quotes where YAML takes it for a number, as in '2:4'",
}
_NEXT = "See --help, or --print_config for all options."
_CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}


class Configuration:
    """What files and options have named so far: the classes, by place.

    Args:
        root: the options of the verb.
        groups: the classes of those options that take no other class, by name: the trainer.
    """

    def __init__(self, root: Mapping[str, Option], groups: Mapping[str, type]) -> None:
        self.root, self.groups = root, groups
        self.classes: dict[str, Any] = {}
        self.places: set[str] = set()
        self._dicts: set[str] = set()
        """The options that were given, by place."""
        self.started: list[str] = []
        """Places of dicts that nothing was given for before an option of a part of them."""

    def read(self, words: Sequence[str]) -> None:
        """Check the words of a command line in their order.

        Raises:
            InputError: an option or a class that there is not, a file that cannot be read.
        """
        for name, value in given(words):
            if name in ("c", "config"):
                if value is None:  # the parser says so
                    continue
                self._options("", self.root, read_file(Path(value)))
            else:
                nested: Any = parsed(value)
                for part in reversed(name.split(".")):
                    nested = {part: nested}
                before, self._dicts = set(self.places), set[str]()
                self._options("", self.root, nested)
                self.started += sorted(self._dicts - before - {name})

    def class_at(self, place: str, option: Option) -> Any:
        """The class at a place: as named, else the default, else the only one that there can be."""
        if place in self.groups or place in self.classes:
            return self.groups.get(place) or self.classes[place]
        choices, default = choices_of(bases_of(option.annotation)), option.default
        if isinstance(default, str):
            return choices.get(default)
        if type(default) in choices.values():
            return type(default)
        return next(iter(choices.values())) if len(choices) == 1 else None

    def missing(self, names: Sequence[str]) -> str:
        """What options lack without which a class cannot be made: `--data.calibration.path, which TextFile needs`."""
        for place, cls in sorted(self.classes.items(), key=lambda one: f"{one[0]}.{names[0]}" in self.places):
            options = options_of(cls) or {}
            if all(name in options and options[name].default is REQUIRED for name in names):
                lacking = ", ".join(f"--{place}.{name}" for name in names)
                return f"Missing: {lacking}, which {cls.__name__} needs. See --{place}.help."
        lacking = ", ".join(f"--{name}" for name in names)
        return f"Missing: {lacking}. Give a configuration (--config mini/predict, or a YAML file), or options."

    def _options(
        self, place: str, known: Mapping[str, Option] | None, values: Mapping[str, Any], owner: str = "",
        bases: list[type] | None = None,
    ) -> None:  # fmt: skip
        for name, value in values.items():
            here = f"{place}.{name}".lstrip(".")
            self.places.add(here)
            if known is not None and name not in known:
                others = [other for other, cls in choices_of(bases or []).items() if name in (options_of(cls) or {})]
                raise unknown_option(here, value, list(known), owner, others)
            if known is not None:
                self._value(here, known[name], value)

    def _value(self, place: str, option: Option, value: Any) -> None:
        annotation = option.annotation
        if value is None:
            if option.default is not None and not takes(annotation, type(None)):
                none = f"--{place}={{}} for none" if elements_of(annotation, "dict") else "leave it out"
                raise InputError(f"--{place} is empty: give it a value, or {none}.")
        elif isinstance(value, list):
            for item in value:
                self._value(place, Option(elements_of(annotation, "list") or Any, None), item)
        elif isinstance(value, Mapping):
            if place in self.groups or bases_of(annotation):
                self._instance(place, option, value)
            elif inner := elements_of(annotation, "dict"):
                self._dicts.add(place)
                for name, item in value.items():
                    self._value(f"{place}.{name}", Option(inner), item)
            elif inner := elements_of(annotation, "list"):  # options of the last item
                self._instance(place, Option(inner, None), value)
        elif isinstance(value, str):
            bases = bases_of(annotation) or bases_of(elements_of(annotation, "list"))
            if bases and (content := content_of(value)) is not None:
                self._value(place, option, content)
            elif bases and (value in choices_of(bases) or not takes(annotation, str)):
                self.classes[place] = class_named(place, value, bases)
        elif bases_of(annotation) and not takes(annotation, type(value)):
            raise InputError(f"--{place} is {value}: give its options, as in --{place}.NAME=VALUE. See --{place}.help.")

    def _instance(self, place: str, option: Option, value: Mapping[str, Any]) -> None:
        bases = bases_of(option.annotation)
        if isinstance(name := value.get("class_path"), str):
            self.classes[place] = class_named(place, name, bases)
        cls = self.class_at(place, option)
        options: Any = value.get("init_args") or {} if _CLASS_KEYS & set(value) else value
        if beside := [key for key in value if options is not value and key not in _CLASS_KEYS]:
            raise InputError(f"--{place}.{beside[0]} stands beside class_path: put it under init_args.")
        if cls is None and options:
            choices = list(choices_of(bases)) or ["CLASS"]
            message = f"--{place} has no class yet: name it before its options, as in --{place}={choices[0]}."
            raise InputError(f"{message} Choices: {', '.join(choices[:12])}.")
        if isinstance(options, Mapping) and cls is not None:
            self._options(place, options_of(cls), options, cls.__name__, bases)


def unknown_option(place: str, value: Any, choices: list[str], owner: str, others: Sequence[str] = ()) -> InputError:
    """`Unknown option 'model.prune.unet.sparsty' of PruneSpec. Did you mean ...? Choices: ...`, to be raised.

    Args:
        place: the option.
        value: what was given for it.
        choices: the options that there are.
        owner: the class whose options they are.
        others: classes that could stand in its place and have the option.
    """
    before, _, name = place.rpartition(".")
    rest = ""
    while isinstance(value, Mapping) and len(value) == 1 and not _CLASS_KEYS & set(value):
        key, value = next(iter(value.items()))
        rest += f".{key}"
    if len(others) == 1:
        return InputError(
            f"Unknown option {place + rest!r} of {owner}: it belongs to {others[0]}. Name that class first, as in "
            f"--{before}={others[0]}, or see --{before}.help."
        )
    close = get_close_matches(str(name), choices, n=1, cutoff=0.7)
    hint = f" Did you mean {f'{before}.{close[0]}{rest}'.lstrip('.')!r}?" if close else ""
    shown = ", ".join(choices[:12]) + (f", ... ({len(choices)} in all)" if len(choices) > 12 else "")
    help_of = f"--{before}.help" if before else "--help"
    return InputError(
        f"Unknown option {place + rest!r}{f' of {owner}' if owner else ''}.{hint} "
        + (f"Choices: {shown}. See {help_of}." if choices else f"{owner} has no options.")
    )


def placed(error: InputError, configuration: Any, made: Any, arguments: Mapping[str, Any]) -> InputError:
    """What a constructor said of its arguments, with the option's whole name.

    Args:
        error: what it raised.
        configuration: the parser's namespaces.
        made: the class.
        arguments: what it was called with.
    """
    found = next((place for place, one in _objects("", configuration) if _is_of(one, made, arguments)), None)
    message = str(error)
    if found is None or message.startswith("--"):  # it names the whole option
        return InputError(message)  # another one: an error that is its own cause has no end
    name = re.match(r"(?:Unknown )?([\w.]*)", message)[1]  # type: ignore[index]
    option = name.removeprefix(f"{found.rpartition('.')[2]}.")
    if option not in arguments:
        return InputError(f"--{found}: {message}")
    if message.startswith("Unknown"):
        return InputError(f"--{found}.{option}: {message}")
    return InputError(f"--{found}.{option}{message.removeprefix(name)}")


def _objects(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every namespace of a parsed configuration, with its place."""
    if isinstance(value, list):
        for item in value:
            yield from _objects(place, item)
    elif content := _fields(value):
        yield place, value
        for name, item in content.items():
            yield from _objects(f"{place}.{name}".lstrip("."), item)


def _fields(value: Any) -> dict[str, Any]:
    """What a namespace or a dict holds; of a class its options."""
    content = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return _fields(content.get("init_args")) if "class_path" in content else content


def _is_of(value: Any, cls: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a namespace names a class, or is of a fixed class, with these arguments."""
    path = getattr(value, "class_path", None)
    fields = _fields(value)
    return (
        (path is None or path.rpartition(".")[2] == cls.__name__)
        and fields.keys() == arguments.keys()
        and all(_became(one, arguments[name]) for name, one in fields.items())
    )


def _became(value: Any, made: Any) -> bool:
    """Whether a value of the configuration may have become an argument."""
    if path := getattr(value, "class_path", None):
        return path.rpartition(".")[2] == type(made).__name__
    return hasattr(value, "__dict__") or isinstance(value, (list, dict)) or repr(value) == repr(made)


def explain(message: str, configuration: Configuration) -> str:
    """The parser's message on a value in one line: the option, the value, the choices, the next step."""
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    nested = re.search(r"NestedArg\(key='([\w.+]+)', val=(.*)\)", message)
    place = f"{keys[0]}.{nested[1]}" if keys and nested else ".".join(dict.fromkeys(keys))
    if found := re.search(r"unrecognized arguments: (\S+)", message):
        return f"Unknown option {found[1]!r}. {_NEXT}"
    if found := re.search(r"following arguments are required: (.*)", message):
        return configuration.missing([name.rpartition(".")[2] for name in found[1].split(", ")])
    value = re.search(r"Got value: (.*)", message) or re.search(r"Given value: (.*)", message)
    if value and (literals := re.findall(r"Expected a typing\.Literal(\[.*?\])", message)):
        choices = dict.fromkeys(str(choice) for literal in literals for choice in literal_eval(literal))
        return str(unknown(place, value[1], choices))
    kinds = [kind for kind in re.findall(r"Expected a <class '([\w.]+)'>", message) if kind != "NoneType"]
    if value and value[1].startswith("NestedArg"):
        return f"Unknown option {place!r}. What a class passes on to others goes under dict_kwargs. {_NEXT}"
    if value and kinds:
        wanted = " or ".join(dict.fromkeys(_KINDS.get(kind, kind) for kind in kinds))
        return f"--{place} is {value[1][:100]}: give {wanted}."
    lines = [line.strip(" -") for line in message.splitlines() if line.strip() and "NestedArg" not in line]
    first, *rest = lines or ["bad input"]
    return f"{first[:300]} {rest[-1][:100] if rest else ''}".rstrip()
