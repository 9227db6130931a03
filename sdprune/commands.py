"""`fit` and `predict` on LightningCLI."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Optional, Union

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
    "The `local_dir_use_symlinks` argument is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
warnings.filterwarnings("ignore", module=r"jsonargparse\b|lightning\.pytorch\.cli")

from jsonargparse import Namespace  # noqa: E402
from lightning import LightningDataModule, LightningModule, Trainer  # noqa: E402
from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402

import sdprune.mini.source  # noqa: E402
import sdprune.modules  # noqa: E402, F401 (classes are found by name among those imported)
from sdprune.callbacks import CalibrationProgress, ImageProgress  # noqa: E402
from sdprune.data import CocoDataModule  # noqa: E402
from sdprune.errors import InputError, cause  # noqa: E402
from sdprune.hub import offline  # noqa: E402
from sdprune.locks import release_all  # noqa: E402
from sdprune.manual import manual_of, manual_of_verb  # noqa: E402
from sdprune.mini.training import Stage  # noqa: E402
from sdprune.modules import FrozenModule, GenerationModule  # noqa: E402
from sdprune.options import Configuration, explain, help_wanted, placed, quoted  # noqa: E402
from sdprune.pruning import InfeasibleError  # noqa: E402
from sdprune.record import Record, replacing  # noqa: E402
from sdprune.schema import Option, bases_of, class_named  # noqa: E402
from sdprune.shipped import with_shipped  # noqa: E402
from sdprune.study.runner import Checked  # noqa: E402
from sdprune.summary import show  # noqa: E402
from sdprune.tracking import connect, finish_all, log_record, wandb_logger  # noqa: E402

TRAINER_DEFAULTS: dict[str, Any] = {
    "use_distributed_sampler": False,  # the data module deals whole batches to processes
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
    "logger": True,
}
GROUPS = {"trainer": Trainer}
"""Options whose class is fixed."""

DESCRIPTIONS = {
    "fit": "Prune a model and save it as a diffusers directory (PruningModule), or gather calibration statistics "
    "(CalibrationModule: --model.help CalibrationModule).",
    "predict": "Prune in memory, draw images from captions, score them, write the record; the same command again goes "
    "on where it stopped.",
}
MAIN = {
    "fit": {"model": "PruningModule", "data": "CocoDataModule"},
    "predict": {"model": "GenerationModule", "data": "CocoDataModule"},
}
"""The classes whose options the help of a verb shows."""


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

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        """Make the objects; what a constructor says of its arguments is told with their place."""

        def make(cls: Any, *args: Any, **arguments: Any) -> Any:
            try:
                return cls(*args, **arguments)
            except InputError as error:
                raise placed(error, cfg[cfg.subcommand], cls, arguments) from error

        self.add_instantiator(make, object)
        return super().instantiate_classes(cfg, **kwargs)


class SdpruneCLI(LightningCLI):
    """Adds the W&B flag, early checks, the dense run beside the pruned one, and the summary."""

    already = False
    """Whether the run was finished before."""
    summary = True
    """Whether a finished run is printed in full."""
    runs: Sequence[GenerationModule] = ()
    """What `predict` draws."""

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
        parser.add_argument("--wandb_project", type=Optional[str], help="its project; WANDB_PROJECT, or else sdprune")
        parser.add_argument(
            "--wandb_group", type=Optional[str], help="its group of runs; by default those with one dense record"
        )

    def before_instantiate_classes(self) -> None:
        """Choose the logger, unless the configuration names its own."""
        config = self.config[self.subcommand]
        if config.trainer.logger is not True:
            return
        if config.wandb == "off":
            config.trainer.logger = _class("lightning.pytorch.loggers.CSVLogger", save_dir=self._output(), name="logs")
        else:
            config.trainer.logger = False  # until the record is known

    def _output(self) -> str:
        """The directory of all runs."""
        model = self.config[self.subcommand].model
        return getattr(model.get("init_args"), "output", "runs") if model else "runs"

    def _track(self, dense: Record | None = None) -> None:
        """Begin to log to W&B, if that is wanted."""
        config, model = self.config[self.subcommand], self.model
        if config.wandb != "off" and not self.trainer.loggers:
            directory = model.directory() if isinstance(model, FrozenModule) else None
            group = config.wandb_group or (dense.directory.name if dense else None)
            self.trainer.logger = wandb_logger(
                Path(self._output()), config.wandb == "offline", config.wandb_project, group, directory
            )
        connect(self.trainer.loggers)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with errors of one line."""
        configuration = Configuration(root_options(self._subcommand_parsers[args[0]]), GROUPS)
        try:
            args = [args[0], *with_shipped(args[1:])]
            wanted, words = help_wanted(args[1:])
            configuration.read(words)
            if wanted is not None:
                print(self._manual(args[0], *wanted, configuration))
                raise SystemExit(0)
            super().parse_arguments(parser, args)
            self.asked = self.config[self.config.subcommand].clone()
        except ParseError as error:
            raise InputError(explain(str(error), configuration)) from error
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise InputError(f"seed_everything is {seed}: choose from 0 to {2**32 - 1}.")

    @staticmethod
    def _manual(verb: str, place: str, name: str | None, configuration: Configuration) -> str:
        if place:
            for option, main in MAIN[verb].items():
                if option != place and option not in configuration.classes:
                    configuration.classes[option] = class_named(
                        option, main, bases_of(configuration.root[option].annotation)
                    )
            return manual_of(place, name, configuration)
        text = f"{DESCRIPTIONS[verb]} The options of a class: --data.source.help, --data.source.help CocoDirectory, ..."
        return manual_of_verb(verb, text, configuration, MAIN[verb])

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
            self.model.resolve(self.datamodule, str(self.trainer.precision))
        elif isinstance(self.model, Stage):
            self.model.keep_checkpoints(self.trainer)
        self._track()
        self._tell_of_machines()

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Train a stage of the miniature; calibration and pruning are inference."""
        if isinstance(model, FrozenModule):
            self.trainer.predict(model, datamodule=self.datamodule, return_predictions=False)
        else:
            self.trainer.fit(model, **kwargs)

    def before_predict(self) -> None:
        """Check, then make the dense record if the pruned run wants it and it is not there."""
        model = self.model
        if not isinstance(model, GenerationModule):
            raise InputError(f"predict runs GenerationModule, got {type(model).__name__}: use sdprune fit.")
        self._attach()
        precision = str(self.trainer.precision)
        try:
            model.resolve(self.datamodule, precision)
        except InfeasibleError as error:
            self._track(model.infeasible_record(error.reason, write=True))
            return
        self.runs = [model]
        other = model.find_baseline()
        if isinstance(other, GenerationModule):
            other.resolve(self.datamodule, precision)
            self.runs = [other, model]
        model.baseline = other.record if isinstance(other, GenerationModule) else other
        for run in self.runs:
            run.check(self.datamodule)
        self.already = model.record.finished
        self._track(model.baseline or model.record)
        for run in self.runs:
            if not run.record.finished:
                run.record.start()
        self._tell_of_machines()

    def predict(self, model: GenerationModule, **kwargs: Any) -> None:
        """Draw the run that this one is compared with, where it is missing, and then this one."""
        for run in self.runs:
            self.trainer.predict(run, datamodule=self.datamodule, return_predictions=False)

    def after_predict(self) -> None:
        """Compare, log and print what came out, on the first process alone: none waits for it."""
        _part()
        if self.trainer.is_global_zero:
            if self.runs:
                self.model.compare()
                self._write_configurations()
            log_record(self.trainer.loggers, self.model.record, self.model.baseline, self.model.pipeline.name)
            if self.summary:
                show(self.model.record, already=self.already)

    def _write_configurations(self) -> None:
        """Keep what was asked for in the records: `sdprune predict --config RUN/config.yaml` is a run again."""
        for run in self.runs:
            asked = self.asked.clone()
            if run is not self.model:
                unpruned: dict[str, Any] = {"prune": {}, "budget": None, "baseline": None}
                for option, value in unpruned.items():
                    asked[f"model.init_args.{option}"] = value
                asked["model.init_args.pipeline.init_args.model"] = run.pipeline.model
            text = self._subcommand_parsers["predict"].dump(asked, skip_validation=True)
            path = run.record.directory / "config.yaml"
            if not path.exists() or path.read_text() != text:
                with replacing(path) as temporary:
                    temporary.write_text(text)

    def _tell_of_machines(self) -> None:
        """Say what a run on several machines waits for: it is silent until all of its processes have met."""
        environment = getattr(self.trainer.strategy, "cluster_environment", None)
        if environment is None or self.trainer.num_nodes < 2 or environment.local_rank() != 0:
            return
        where = f"{environment.main_address}:{environment.main_port}"
        number = environment.node_rank()
        line = (
            f"Waiting for {self.trainer.world_size} processes on {self.trainer.num_nodes} machines to meet at {where}."
        )
        if not environment.creates_processes_externally and number == 0:
            line += (
                " Start the same command on each other machine with MASTER_ADDR=(this machine) "
                f"MASTER_PORT={environment.main_port} NODE_RANK=1 and so on, or use torchrun or srun on all of them."
            )
        print(line, flush=True)

    def _attach(self) -> None:
        if not isinstance(self.datamodule, CocoDataModule):
            told = f"{type(self.model).__name__} needs --data CocoDataModule, got {type(self.datamodule).__name__}."
            raise InputError(told)
        self.datamodule.calibrates = self.model.calibrates
        self.datamodule.prepare_data()
        self.datamodule.trainer = self.trainer


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


def _class(path: str, **init_args: Any) -> Any:
    return Namespace(class_path=path, init_args=Namespace(**init_args))


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
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _tell_of_lost_processes()
    os.environ.setdefault("WANDB_SILENT", "true")
    sys.argv[0] = sys.argv[0] or "sdprune"
    SdpruneCLI.summary = summary
    try:
        cli = SdpruneCLI(**_cli_options(), args=quoted(arguments))
    except BaseException:
        finish_all(failed=True)
        raise
    finally:
        release_all()
    for line in finish_all(failed=False):
        if summary:
            print(f"W&B        {line}")
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
        "load_from_checkpoint_support": False,  # it wants to make the model and the data itself
        "save_config_callback": None,
        "seed_everything_default": 0,
        "trainer_class": Trainer,
        "parser_class": Parser,
        "parser_kwargs": {verb: {"usage": f"sdprune {verb} --config FILE [options]"} for verb in MAIN},
        "trainer_defaults": {**TRAINER_DEFAULTS, "callbacks": [CalibrationProgress(), ImageProgress()]},
    }


class _AllChecked(Exception):  # noqa: N818 (no error: it leaves LightningCLI's constructor before anything is run)
    def __init__(self, found: list[Checked]) -> None:
        self.found = found


class _Checker(SdpruneCLI):
    """Parses many commands with one parser, constructs what they name, and runs none of them; asks no hub."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.known: dict[str, Any] = {}
        with offline():
            raise _AllChecked([self._check(parser, words) for words in args])

    def _check(self, parser: LightningArgumentParser, words: Sequence[str]) -> Checked:
        try:
            super().parse_arguments(parser, words)
            made, config = parser.instantiate_classes(self.config)[words[0]], self.config[words[0]]
            model = made.model
            if not isinstance(model, GenerationModule):
                return Checked()
            model.pipeline = self.known.setdefault(str(config.model.init_args.pipeline), model.pipeline)
            model.pipeline.require(list(model.options.prune))
            data = self.known.setdefault(str(config.data), made.data)  # hashes the same files once
            return Checked(None, self._finished(model, data, str(config.trainer.precision or "32-true")), model.numbers)
        except SystemExit:
            return Checked("--help and --print_config cannot be given to a sweep")
        except Exception as error:
            return Checked(" ".join(str(cause(error, InputError) or error).split()) or type(error).__name__)

    @staticmethod
    def _finished(model: GenerationModule, data: Any, precision: str) -> bool:
        """Whether the record is there; not when that cannot be known without the hub or with files that are missing."""
        if not any(Path(model.output).glob("*/results.json")):
            return False
        try:
            model.resolve(data, precision)
            return model.record.finished
        except InfeasibleError as error:
            return model.infeasible_record(error.reason, write=False).finished
        except InputError:
            return False


def check(commands: Sequence[Sequence[str]]) -> list[Checked]:
    """Find what can be told of commands before any of them runs: faults of options, values, classes, components.

    Args:
        commands: each a verb and its options.
    """
    sys.argv[0] = sys.argv[0] or "sdprune"
    try:
        _Checker(**_cli_options(), args=[quoted(words) for words in commands])  # type: ignore[misc]
    except _AllChecked as checked:
        return checked.found
    raise AssertionError("LightningCLI parses its arguments in its constructor")
