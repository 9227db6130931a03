"""The parser of LightningCLI, with errors that can be printed in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NoReturn, Union

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from sdprune.configuration.options import placed
from sdprune.errors import InputError
from sdprune.schema import Option


class ParseError(InputError):
    """The parser's own message, many lines long."""


class Parser(LightningArgumentParser):
    """Raises its errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise InputError: what a constructor said of its arguments, or else what the parser says."""
        cause: BaseException | None = ex
        while cause is not None and (isinstance(cause, ParseError) or not isinstance(cause, InputError)):
            cause = cause.__cause__ or cause.__context__
        raise cause or ParseError(message)

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        """Make the objects; an error about a constructor's arguments names the option."""

        def make(cls: Any, *args: Any, **arguments: Any) -> Any:
            try:
                return cls(*args, **arguments)
            except InputError as error:
                raise placed(error, cfg[cfg.subcommand], cls, arguments) from error

        self.add_instantiator(make, object)
        return super().instantiate_classes(cfg, **kwargs)


_PARSERS: dict[str, tuple[Any, str]] = {
    "config": (
        Path,
        "a configuration file, or a shipped one by name, as in mini/predict; of several the later add to the earlier",
    ),
    "print_config": (None, "print the whole configuration, with values, and exit"),
    "seed_everything": (Union[bool, int], "seed of whatever is random and has no seed of its own"),
}


def _type(action: Any) -> Any:
    return Literal[tuple(action.choices)] if action.choices else Any


def root_options(parser: LightningArgumentParser) -> dict[str, Option]:
    """The options of a verb: those of the parser itself, and the classes below them."""
    own = {one.dest: Option(_type(one), one.default, one.help or "") for one in parser._actions}
    own |= {name: Option(kind, None, doc) for name, (kind, doc) in _PARSERS.items()}
    classes = {"trainer": Trainer, "model": LightningModule, "data": LightningDataModule}
    return {name: one for name, one in own.items() if "." not in name} | {
        name: Option(cls) for name, cls in classes.items()
    }
