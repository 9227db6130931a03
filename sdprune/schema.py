"""What a configuration may hold: the options of classes, read from signatures and docstrings; classes by name."""

from __future__ import annotations

import inspect
import os
import re
import sys
from abc import ABC
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Union, get_args, get_origin, get_type_hints

from sdprune.errors import InputError, unknown

REQUIRED = inspect.Parameter.empty
"""The default of an option that has none."""
_PLAIN = ("builtins", "pathlib", "datetime", "types", "typing", "collections.abc", "os")


@dataclass(frozen=True)
class Option:
    """One option: its type annotation, default and text of help."""

    annotation: Any
    default: Any = REQUIRED
    doc: str = ""


def options_of(target: Any) -> dict[str, Option] | None:
    """Options by name of a class, or of a function that returns an object; None if it takes any name.

    A class that passes `**kwargs` on has the options of its bases too.
    """
    found: dict[str, Option] = {}
    for init, docstring in _constructors(target):
        parameters = list(inspect.signature(init).parameters.values())
        hints, docs = _hints(init), _docs(docstring) | _docs(init.__doc__)
        for one in parameters[isinstance(target, type) :]:
            if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
                annotation = hints.get(one.name, Any)
                found.setdefault(one.name, Option(annotation, one.default, docs.get(one.name, "")))
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            return found
    return None


def _constructors(target: Any) -> Iterator[tuple[Any, str | None]]:
    if not isinstance(target, type):
        yield target, None
        return
    for base in target.__mro__:
        if base is object:
            if target.__init__ is object.__init__:  # type: ignore[misc]
                yield lambda self: None, None
        elif "__init__" in vars(base):
            yield vars(base)["__init__"], base.__doc__


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, TypeError):  # names that are imported for type checkers alone
        return {}


def _docs(docstring: str | None) -> dict[str, str]:
    from docstring_parser import parse

    found = parse(docstring or "").params
    return {one.arg_name: " ".join((one.description or "").split()) for one in found}


def summary_of(target: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(target) or "").partition("\n\n")[0].split())


def bases_of(annotation: Any) -> list[type]:
    """The classes that an annotation names, those of the language left out."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [] if annotation.__module__ in _PLAIN or issubclass(annotation, Enum) else [annotation]
    return [base for one in get_args(annotation) for base in bases_of(one)] if _is_union(annotation) else []


def takes(annotation: Any, kind: type) -> bool:
    """Whether any value of a kind is one of the annotation's; text then need not be the name of a class."""
    return annotation in (kind, Any) or (
        _is_union(annotation) and any(takes(one, kind) for one in get_args(annotation))
    )


def elements_of(annotation: Any, container: str) -> Any:
    """What a "list" or a "dict" in an annotation holds; None if it holds none."""
    if _is_union(annotation):
        return next((found for one in get_args(annotation) if (found := elements_of(one, container))), None)
    origin, inner = get_origin(annotation), get_args(annotation)
    if not isinstance(origin, type) or not inner or origin is tuple:
        return None
    return inner[-1] if ("dict" if issubclass(origin, Mapping) else "list") == container else None


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) is Union or type(annotation).__name__ == "UnionType"


def discover(folder: ModuleType) -> None:
    """Import every file of a folder of this package, so that the classes in it are found by name.

    Called at the end of the package that the folder lies in: by then its files can import from there, as those of users
    do.
    """
    for file in iter_modules(folder.__path__):
        import_module(f"{folder.__name__}.{file.name}")


def choices_of(bases: list[type]) -> dict[str, type]:
    """The classes by name that can stand for one of `bases`; a name of this package means its own class."""
    found: dict[str, type] = {}
    for base in bases:
        for cls in [base, *descendants(base)]:
            known = found.get(cls.__name__)
            is_frame = cls is base and base.__module__.startswith("lightning")  # LightningModule, Callback
            if _is_choice(cls) and not is_frame and (known is None or not is_packaged(known)):
                found[cls.__name__] = cls
    return dict(sorted(found.items()))


def is_packaged(cls: type) -> bool:
    """Whether a class is one of this package, and not a user's own, which may need arguments."""
    return cls.__module__.startswith("sdprune.")


def descendants(base: type) -> Iterator[type]:
    """All subclasses that are known by now, abstract ones too."""
    cls: type
    for cls in type.__subclasses__(base):
        yield cls
        yield from descendants(cls)


def _is_choice(cls: type) -> bool:
    """Neither private nor abstract, by its methods or because it says so."""
    return not (cls.__name__.startswith("_") or ABC in cls.__bases__ or inspect.isabstract(cls))


def class_named(place: str, name: str, bases: list[type]) -> Any:
    """The class that a configuration names, short or by dotted path; the current directory is searched too.

    Raises:
        InputError: there is none, its module cannot be imported, or it is of another kind.
    """
    kind = place.rpartition(".")[2]
    choices = choices_of(bases)
    if name in choices and "." not in name:
        return choices[name]
    if meant := _own_classes(name):
        raise InputError(
            f"--{place} is {name}: a class of your own is named MODULE.CLASS, as in --{place}={meant[0]} for the one "
            f"in {meant[0].partition('.')[0]}.py of the current directory."
        )
    if os.path.exists(name):
        raise _is_path(place, name, choices)
    if "." not in name:
        raise unknown(kind, name, choices)
    found = _imported(place, name)
    kinds = " or ".join(base.__name__ for base in bases)
    if isinstance(found, type) and not any(issubclass(found, base) for base in bases):
        raise InputError(
            f"--{place} is {name}, which is no {kinds}: derive the class from {' or '.join(map(_public, bases))}."
        )
    if isinstance(found, type) and not _is_choice(found):
        raise InputError(f"--{place} is {name}, which is abstract: name a class derived from it.")
    if not callable(found):
        raise InputError(f"--{place} is {name}, which is no class: give a {kinds}.")
    return found


def _own_classes(name: str) -> list[str]:
    """The classes of modules in the current directory that a class alone, a module alone or its file stands for."""
    found = []
    for path in sorted(path for path in Path.cwd().glob("*.py") if path.is_file()):
        classes = re.findall(r"^class (\w+)", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        whole = name == path.stem or Path(name).absolute() == path
        found += [f"{path.stem}.{cls}" for cls in classes if whole or name == cls]
    return found


def _is_path(place: str, name: str, choices: Mapping[str, type]) -> InputError:
    """A file or a directory in place of a class, with the classes that read one."""
    is_directory = os.path.isdir(name)
    reading = [
        f"--{place}={cls} --{place}.{option}={name}"
        for cls, target in choices.items()
        for option, one in (options_of(target) or {}).items()
        if one.default is REQUIRED and takes(one.annotation, Path) and (option != "path") == is_directory
    ]
    kind = "directory" if is_directory else "file"
    hint = f", as in {reading[0]}" if reading else f". Choices: {', '.join(choices)}"
    return InputError(f"--{place} is {name}, a {kind}: name the class that reads it{hint}.")


def _public(cls: type) -> str:
    """The shortest dotted path by which a class can be imported."""
    parts = cls.__module__.split(".")
    modules = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return next(f"{one}.{cls.__name__}" for one in modules if getattr(sys.modules[one], cls.__name__, None) is cls)


def _imported(place: str, path: str) -> Any:
    module, _, name = path.rpartition(".")
    failed = f"--{place} is {path}: module {module!r} cannot be imported"
    with _searching_here():
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise InputError(f"{failed}: it needs {error.name!r}, which is not installed.") from error
            raise InputError(
                f"{failed}: there is no {error.name!r} in {Path.cwd()} or among the installed packages."
            ) from error
        except Exception as error:
            raise InputError(f"{failed}: {type(error).__name__}: {' '.join(str(error).split())}.") from error
    if not hasattr(found, name):
        names = [key for key, value in vars(found).items() if isinstance(value, type) and value.__module__ == module]
        raise unknown(f"class of module {module!r}", name, names)
    return getattr(found, name)


@contextmanager
def _searching_here() -> Iterator[None]:
    """Import from the current directory too, after all else: for what a configuration names, and for nothing later."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(here)]  # the last one is ours
