"""Configurations and sweeps that come with the package, by short names that work in any directory."""

from pathlib import Path

from sdprune.errors import InputError, unknown

_PACKAGE = Path(__file__).parents[1]


def located(kind: str, folder: str, given: str) -> Path:
    """The file that a path or the name of a shipped file stands for; a path that exists comes first.

    Args:
        kind: `configuration` or `sweep`, for messages.
        folder: `configs` or `wandb_sweeps`; a name may begin with it, as the paths in a clone do.
        given: a path, or a name such as `mini/predict`, `mini/predict.yaml` or `configs/mini/predict.yaml`.

    Raises:
        InputError: there is no such file.
    """
    if Path(given).exists():
        return Path(given)
    shipped = {
        path.relative_to(_PACKAGE / folder).with_suffix("").as_posix(): path
        for path in sorted((_PACKAGE / folder).rglob("*.yaml"))
    }
    name = given.removeprefix(f"{folder}/").removesuffix(".yaml")
    if name not in shipped:
        raise InputError(f"{unknown(kind, given, shipped)} Or give the path of a YAML file that exists.")
    return shipped[name]


def with_shipped(words: list[str]) -> list[str]:
    """The words of a command line, with the paths of its configurations in place of their names."""
    found = list(words)
    for number, word in enumerate(found):
        option, equals, value = word.partition("=")
        if option not in ("-c", "--config"):
            continue
        if equals:
            found[number] = f"{option}={located('configuration', 'configs', value)}"
        elif number + 1 < len(found) and not found[number + 1].startswith("-"):
            found[number + 1] = str(located("configuration", "configs", found[number + 1]))
    return found
