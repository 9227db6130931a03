"""`fit` and `predict` on LightningCLI."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Before transformers and diffusers are imported: their remarks on torchvision and accelerate are not the user's.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
for _message in (  # Lightning's talk with its own developers, and advice on training loops
    "LightningCLI's args parameter is intended",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "`LightningModule.configure_optimizers` returned `None`",
    r"The number of training batches \(",
    r"The '\w+' does not have many workers",
    "`torch_dtype` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
warnings.filterwarnings("ignore", module=r"jsonargparse\b|lightning\.pytorch\.cli")

import yaml  # noqa: E402
from lightning import LightningDataModule, LightningModule, Trainer  # noqa: E402
from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402

import sdprune.mini.source  # noqa: E402
import sdprune.modules  # noqa: E402, F401 (classes are found by name among those imported)
from sdprune.callbacks import ImageProgress  # noqa: E402
from sdprune.data import CocoDataModule  # noqa: E402
from sdprune.errors import InputError, cause  # noqa: E402
from sdprune.locks import release_all  # noqa: E402
from sdprune.mini.training import Stage  # noqa: E402
from sdprune.modules import FrozenModule, GenerationModule  # noqa: E402
from sdprune.options import Names, explain  # noqa: E402
from sdprune.summary import show  # noqa: E402

TRAINER_DEFAULTS: dict[str, Any] = {
    "use_distributed_sampler": False,  # the data module deals whole batches to processes
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
    "logger": True,
}


_CLASSES = """The options of a class: --model.help {classes}, --data.help CocoDataModule,
--data.source.help CocoDirectory, ... The whole configuration, with values: --config FILE --print_config."""
DESCRIPTIONS = {
    "fit": "Prune a model and save it as a diffusers directory (PruningModule), or gather calibration statistics "
    "(CalibrationModule). " + _CLASSES.format(classes="PruningModule"),
    "predict": "Prune in memory, draw images from captions, score them, write the record; the same command again goes "
    "on where it stopped. " + _CLASSES.format(classes="GenerationModule"),
}


class ParseError(InputError):
    """The parser's own message, many lines long."""


class Parser(LightningArgumentParser):
    """Raises its errors, so that they can be told in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise InputError: what a constructor said of its arguments, or else what the parser says."""
        cause: BaseException | None = ex
        while cause is not None and (isinstance(cause, ParseError) or not isinstance(cause, InputError)):
            cause = cause.__cause__ or cause.__context__
        raise cause or ParseError(message)


class SdpruneCLI(LightningCLI):
    """Adds the W&B flag, early checks, the dense run beside the pruned one, and the summary."""

    summary = True
    """Whether a finished run is printed in full."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs."""
        taken = {"model", "datamodule"}
        return {
            "fit": {*taken, "train_dataloaders", "val_dataloaders", "weights_only"},
            "predict": {*taken, "dataloaders", "return_predictions", "ckpt_path", "weights_only"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The W&B flag."""
        parser.add_argument("--wandb", choices=["off", "offline", "online"], default="off", help="log to W&B")
        parser.add_argument("--wandb_project", default="sdprune", help="its project")

    def before_instantiate_classes(self) -> None:
        """Choose the logger, unless the configuration names its own."""
        config = self.config[self.subcommand]
        if config.trainer.logger is not True:
            return
        output = getattr(config.model.get("init_args"), "output", "runs") if config.get("model") else "runs"
        if config.wandb == "off":
            config.trainer.logger = _class("lightning.pytorch.loggers.CSVLogger", save_dir=output, name="logs")
        else:
            config.trainer.logger = _class(
                "lightning.pytorch.loggers.WandbLogger",
                project=config.wandb_project, save_dir=output, offline=config.wandb == "offline",
            )  # fmt: skip

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with errors of one line."""
        try:
            super().parse_arguments(parser, args)
        except ParseError as error:
            verb = self._subcommand_parsers.get(args[0], parser)
            own = [name.lstrip("-") for action in verb._actions for name in action.option_strings]
            names = Names()
            for option, base in (("model", LightningModule), ("data", LightningDataModule)):
                names.add(option, base)
            raise InputError(explain(str(error), names, own)) from error
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise InputError(f"seed_everything is {seed}: choose from 0 to {2**32 - 1}.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning says of its own options what is wrong with them."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise InputError(f"The trainer cannot be made: {error} See --trainer options in --help.") from error

    def before_fit(self) -> None:
        """Tell what can be told before anything costly starts."""
        if isinstance(self.model, GenerationModule):
            raise InputError("fit runs PruningModule or CalibrationModule, got GenerationModule: use sdprune predict.")
        if isinstance(self.model, FrozenModule):
            self._attach()
            self.model.check(self.datamodule, str(self.trainer.precision))
        elif isinstance(self.model, Stage):
            self.model.keep_checkpoints(self.trainer)

    def before_predict(self) -> None:
        """Check, then make the dense record if the pruned run wants it and it is not there."""
        model = self.model
        if not isinstance(model, GenerationModule):
            raise InputError(f"predict runs GenerationModule, got {type(model).__name__}: use sdprune fit.")
        self._attach()
        if model.plan.infeasible is not None:
            model.record_infeasible(model.plan.infeasible)
            return
        runs = [model.dense(), model] if model.wants_dense else [model]
        precision = str(self.trainer.precision)
        records = [run.prepare_record(self.datamodule, precision) for run in runs]
        if model.wants_dense:
            model.baseline = records[0]
        for run in runs:
            run.check(self.datamodule, precision)
        for record in records:
            if not record.finished:
                record.start()
        if model.wants_dense:
            self.trainer.predict(runs[0], datamodule=self.datamodule, return_predictions=False)

    def after_predict(self) -> None:
        """Compare, log and print what came out, on the first process alone: none waits for it."""
        _part()
        if self.trainer.is_global_zero:
            self.model.compare()
            self.model.log_record()
            if self.summary:
                show(self.model.record)

    def _attach(self) -> None:
        if not isinstance(self.datamodule, CocoDataModule):
            told = f"{type(self.model).__name__} needs --data CocoDataModule, got {type(self.datamodule).__name__}."
            raise InputError(told)
        self.datamodule.calibrates = self.model.calibrates
        self.datamodule.prepare_data()
        self.datamodule.trainer = self.trainer


def _class(path: str, **init_args: Any) -> Any:
    from jsonargparse import Namespace

    return Namespace(class_path=path, init_args=Namespace(**init_args))


def _check_files(arguments: Sequence[str]) -> None:
    """Tell of configuration files that cannot be read by their names, which the parser does not."""
    for path in _config_files(arguments):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"Cannot read the configuration {path}: {error.strerror}. Give a YAML file.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"The configuration {path} is no valid YAML: {reason}") from error
        if not isinstance(content, dict):
            raise InputError(f"The configuration {path} holds no options: expected YAML with model: and data:.")


def _config_files(arguments: Sequence[str]) -> Iterator[Path]:
    for name, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, given, value = name.partition("=")
        if option in ("-c", "--config") and (given or following):
            yield Path(value if given else following)


def _tell_of_lost_processes() -> None:
    """Lightning's watch over the processes that it started stops all when one dies, and says so to its log alone."""

    class Tell(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "terminated with code" in record.getMessage():
                line = "a process of this run has died, the others are stopped; run the same command again to go on"
                print(f"sdprune: failed: {line}", file=sys.stderr, flush=True)

    logger = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    logger.handlers, logger.propagate = [Tell()], False
    logger.setLevel(logging.INFO)


def _part() -> None:
    """Take leave of the run's other processes; torch may abort a process that leaves without."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def run(arguments: Sequence[str], summary: bool = True) -> dict[str, Any]:
    """Parse and run one verb.

    Args:
        arguments: the verb and its options.
        summary: whether a finished run is printed in full.

    Returns:
        The results of `predict`; nothing of other verbs.
    """
    _check_files(arguments)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _tell_of_lost_processes()
    os.environ.setdefault("WANDB_SILENT", "true")
    sys.argv[0] = sys.argv[0] or "sdprune"
    SdpruneCLI.summary = summary
    try:
        cli = SdpruneCLI(**_cli_options(), args=list(arguments))
    finally:
        release_all()
    _part()
    done = isinstance(cli.model, GenerationModule) and cli.model.record.finished
    return cli.model.record.results if done else {}


def _cli_options() -> dict[str, Any]:
    return {
        "model_class": LightningModule,
        "datamodule_class": LightningDataModule,
        "subclass_mode_model": True,
        "subclass_mode_data": True,
        "auto_configure_optimizers": False,
        "save_config_callback": None,
        "seed_everything_default": 0,
        "trainer_class": Trainer,
        "parser_class": Parser,
        "parser_kwargs": {
            verb: {"description": told, "usage": f"sdprune {verb} --config FILE [options]"}
            for verb, told in DESCRIPTIONS.items()
        },
        "trainer_defaults": {**TRAINER_DEFAULTS, "callbacks": [ImageProgress()]},
    }


class _Checked(Exception):  # noqa: N818 (no error: it leaves LightningCLI's constructor before anything is run)
    def __init__(self, faults: list[str | None]) -> None:
        self.faults = faults


class _Checker(SdpruneCLI):
    """Parses many commands with one parser, constructs what they name, and runs none of them."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.known: set[str] = set()
        raise _Checked([self._fault(parser, words) for words in args])

    def _fault(self, parser: LightningArgumentParser, words: Sequence[str]) -> str | None:
        try:
            _check_files(words)
            super().parse_arguments(parser, words)
            made = parser.instantiate_classes(self.config)[words[0]]
            plan = getattr(made.model, "plan", None)
            pipeline = str(self.config[words[0]].model.init_args.get("pipeline"))
            if plan is not None and (names := f"{pipeline} {sorted(plan.asked)}") not in self.known:
                plan.pipeline.require(list(plan.asked))  # may ask the hub
                self.known.add(names)
            return None
        except SystemExit:
            return "--help and --print_config cannot be given to a sweep"
        except Exception as error:
            return " ".join(str(cause(error, InputError) or error).split()) or type(error).__name__


def check(commands: Sequence[Sequence[str]]) -> list[str | None]:
    """Find what is wrong with commands before any of them runs: options, values, classes, components.

    Args:
        commands: each a verb and its options.

    Returns:
        One line for each command; None where nothing was found.
    """
    sys.argv[0] = sys.argv[0] or "sdprune"
    try:
        _Checker(**_cli_options(), args=commands)  # type: ignore[arg-type]
    except _Checked as checked:
        return checked.faults
    raise AssertionError("LightningCLI parses its arguments in its constructor")
