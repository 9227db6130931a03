"""`fit`, `predict`, `search` and `playground` on LightningCLI."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import yaml
from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import sdprune.mini.score
import sdprune.mini.source
import sdprune.modules  # noqa: F401 (classes are found by name among those imported)
from sdprune.configuration.manual import manual_of, manual_of_verb
from sdprune.configuration.options import Configuration, explain
from sdprune.configuration.parser import ParseError, Parser, root_options
from sdprune.configuration.shipped import with_shipped
from sdprune.configuration.words import given, help_wanted, quoted
from sdprune.data import CocoDataModule
from sdprune.errors import InputError
from sdprune.files import replacing
from sdprune.locks import release_all
from sdprune.mini.training import Stage
from sdprune.modules import FrozenModule, GenerationModule
from sdprune.playground.core import Playground
from sdprune.playground.view import Origin, without
from sdprune.processes import announce_machines, leave_group, report_lost_processes
from sdprune.progress import CalibrationProgress, ImageProgress, SearchProgress
from sdprune.pruning import InfeasibleError
from sdprune.runs.infeasible import write_infeasible
from sdprune.runs.record import Record
from sdprune.runs.summary import show
from sdprune.runs.tracking import PROMPTS, connect, finish_all, log_record, log_search, wandb_logger
from sdprune.schema import bases_of, class_named
from sdprune.search.answer import show as show_search
from sdprune.search.answer import write_configurations
from sdprune.search.module import SearchModule

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
    "playground": "Show in a browser what pruning does to a prompt: dense and pruned from the same noise. Without a "
    "configuration it shows the miniature, whose statistics are all gathered first.",
    "search": "Find the sparsest model whose images are still as good as the dense model's, and certify it; the same "
    "command again goes on where it stopped.",
}
MAIN = {
    "fit": {"model": "PruningModule", "data": "CocoDataModule"},
    "predict": {"model": "GenerationModule", "data": "CocoDataModule"},
    "playground": {"model": "GenerationModule", "data": "CocoDataModule"},
    "search": {"model": "SearchModule", "data": "CocoDataModule"},
}
"""The classes whose options the help of a verb shows."""
ONLY: dict[str, type[LightningModule]] = {
    "predict": GenerationModule,
    "search": SearchModule,
    "playground": GenerationModule,
}
"""Verbs that run one class; fit runs all others."""
PLAYGROUND = ("host", "port", "share", "gather")
"""Options that no other verb has."""


class StudyTrainer(Trainer):
    """The trainer, with the study's own verb."""

    def search(self, model: SearchModule, datamodule: CocoDataModule) -> None:
        """Search in the predict loop, where what is drawn next depends on what was drawn before."""
        self.predict(model, datamodule=datamodule, return_predictions=False)

    def playground(
        self,
        model: GenerationModule,
        datamodule: CocoDataModule,
        host: str = "127.0.0.1",
        port: int = 7860,
        share: bool = False,
        gather: Literal["first", "all"] = "first",
    ) -> None:
        """Show a page.

        Args:
            model: what is drawn and how.
            datamodule: has the captions of calibration.
            host: address that the page is bound to; 0.0.0.0 lets other machines open it.
            port: of the page; 0 takes a free one.
            share: whether Gradio makes a link through its servers that anybody can open.
            gather: the statistics that are gathered before the page opens: those of what it shows first, or of all
                criteria and allocations; others are gathered when they are chosen.
        """
        raise NotImplementedError("The command line runs it.")


class SdpruneCLI(LightningCLI):
    """LightningCLI with the W&B flag, early checks, the dense run beside the pruned one, and the summary.

    Args:
        args: the verb and its options.
        summary: whether a finished run is printed in full.
    """

    already = False
    """Whether the run was finished before."""
    runs: Sequence[GenerationModule] = ()
    """What `predict` draws."""

    def __init__(self, args: Any, summary: bool = True) -> None:
        self.summary = summary
        super().__init__(
            LightningModule,
            LightningDataModule,
            args=args,
            trainer_class=StudyTrainer,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={
                **TRAINER_DEFAULTS,
                "callbacks": [CalibrationProgress(), ImageProgress(), SearchProgress()],
            },
            parser_class=Parser,
            parser_kwargs={verb: {"usage": f"sdprune {verb} --config FILE [options]"} for verb in MAIN},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # it wants to make the model and the data itself
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs."""
        taken = {"model", "datamodule"}
        return {
            "fit": {*taken, "train_dataloaders", "val_dataloaders", "weights_only"},
            "predict": {*taken, "dataloaders", "return_predictions", "ckpt_path", "weights_only"},
            "search": taken,
            "playground": taken,
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The W&B flag."""
        parser.add_argument(
            "--wandb", choices=["off", "offline", "online"], default="off",
            help="log to W&B: progress, all numbers, a chart of each score against sparsity, the sample grid, and the "
            f"{PROMPTS} prompts that lost most, with both pictures",
        )  # fmt: skip
        parser.add_argument("--wandb_project", type=Optional[str], help="its project; WANDB_PROJECT, or else sdprune")
        parser.add_argument(
            "--wandb_group", type=Optional[str], help="its group of runs; by default those with one dense record"
        )

    def before_instantiate_classes(self) -> None:
        """Choose the logger, unless the configuration names its own."""
        config = self.config[self.subcommand]
        if self.subcommand == "playground":
            config.trainer.logger = False
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
        if args[0] == "playground":
            args = [*args, *_playground_defaults(args[1:])]
            self.words = without(args[1:], PLAYGROUND)
        try:
            args = [args[0], *with_shipped(args[1:])]
            wanted, words = help_wanted(args[1:])
            configuration.read(words)
            for place in configuration.started:  # the parser adds parts to a dict that it has, and makes none
                first = next(number for number, word in enumerate(args) if word.startswith(f"--{place}."))
                args.insert(first, f"--{place}={{}}")
            if wanted is not None:
                print(self._manual(args[0], *wanted, configuration))
                raise SystemExit(0)
            super().parse_arguments(parser, args)
            self.given = self.config[self.config.subcommand].clone()  # later LightningCLI makes objects of it
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

    def _require(self, verb: str) -> None:
        """Raise InputError for a model that another verb runs."""
        wanted = [own for own, kind in ONLY.items() if isinstance(self.model, kind)] or ["fit"]
        if verb not in wanted:
            runs = ONLY[verb].__name__ if verb in ONLY else "PruningModule or CalibrationModule"
            raise InputError(f"{verb} runs {runs}, got {type(self.model).__name__}: use sdprune {wanted[0]}.")

    def before_fit(self) -> None:
        """Find what can be found wrong before anything costly starts."""
        self._require("fit")
        if isinstance(self.model, FrozenModule):
            self._attach()
            self.model.resolve(self.datamodule, str(self.trainer.precision))
        elif isinstance(self.model, Stage):
            self.model.keep_checkpoints(self.trainer)
        self._track()
        announce_machines(self.trainer)

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Train a stage of the miniature; calibration and pruning are inference."""
        if isinstance(model, FrozenModule):
            self.trainer.predict(model, datamodule=self.datamodule, return_predictions=False)
        else:
            self.trainer.fit(model, **kwargs)

    def before_predict(self) -> None:
        """Check, then make the dense record if the pruned run wants it and it is not there."""
        self._require("predict")
        model = self.model
        self._attach()
        precision = str(self.trainer.precision)
        try:
            model.resolve(self.datamodule, precision)
        except InfeasibleError as error:
            model.record = model.infeasible_record()
            write_infeasible(model.record, error.reason)
            return self._track(model.record)
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
        announce_machines(self.trainer)

    def predict(self, model: GenerationModule, **kwargs: Any) -> None:
        """Draw the run that this one is compared with, where it is missing, and then this one."""
        for run in self.runs:
            self.trainer.predict(run, datamodule=self.datamodule, return_predictions=False)

    def after_predict(self) -> None:
        """Compare, log and print what came out, on the first process alone: none waits for it."""
        leave_group()
        if self.trainer.is_global_zero:
            if self.runs:
                self.model.compare()
                self._write_configurations()
            log_record(self.trainer.loggers, self.model.record, self.model.baseline, self.model.pipeline.name)
            if self.summary:
                show(self.model.record, already=self.already)

    def playground(self, model: GenerationModule, host: str, port: int, share: bool, gather: str, **_: Any) -> None:
        """Load the model and show the page, until it is interrupted."""
        from sdprune.playground.page import build, listen, serve

        self._require("playground")
        self._require_data()
        listening = listen(host, port)  # before anything costly starts
        progress = CalibrationProgress()
        progress.trainer = self.trainer
        playground = Playground(model, self.datamodule, self.trainer, progress.show)
        playground.load(everything=gather == "all")
        dumped = self._subcommand_parsers["predict"].dump(self.given, skip_validation=True, skip_default=True)
        serve(build(playground, Origin(yaml.safe_load(dumped), self.words)), listening, share)

    def before_search(self) -> None:
        """Find what can be found wrong before anything costly starts."""
        self._require("search")
        model = self.model
        self._attach()
        model.resolve(self.datamodule, str(self.trainer.precision))
        self.already = model.record.finished
        self._track()
        if not self.already:
            model.record.start()
        announce_machines(self.trainer)

    def after_search(self) -> None:
        """Write the answer's configurations, log and print, on the first process alone."""
        leave_group()
        if self.trainer.is_global_zero:
            record = self.model.record
            write_configurations(record, self._subcommand_parsers["search"].dump(self.given, skip_validation=True))
            log_search(self.trainer.loggers, record)
            if self.summary:
                show_search(record, already=self.already)

    def _write_configurations(self) -> None:
        """Keep the configuration in the records: `sdprune predict --config RUN/config.yaml` is the run again."""
        for run in self.runs:
            config = self.given.clone()
            if run is not self.model:
                unpruned: dict[str, Any] = {"prune": {}, "narrow": {}, "budget": None, "baseline": None}
                for option, value in unpruned.items():
                    config[f"model.init_args.{option}"] = value
                config["model.init_args.pipeline.init_args.model"] = run.pipeline.model
            text = self._subcommand_parsers["predict"].dump(config, skip_validation=True)
            path = run.record.directory / "config.yaml"
            if not path.exists() or path.read_text() != text:
                with replacing(path) as temporary:
                    temporary.write_text(text)

    def _require_data(self) -> None:
        if not isinstance(self.datamodule, CocoDataModule):
            raise InputError(
                f"{type(self.model).__name__} needs --data CocoDataModule, got {type(self.datamodule).__name__}."
            )

    def _attach(self) -> None:
        self._require_data()
        self.model.pipeline.placement.check(self.trainer.strategy.root_device)
        self.datamodule.calibrates = self.model.calibrates
        self.datamodule.prepare_data()
        self.datamodule.trainer = self.trainer


def _playground_defaults(words: Sequence[str]) -> list[str]:
    """What is shown where no configuration is given."""
    named = any(name in ("c", "config") or name.startswith("model") for name, _ in given(words))
    return [] if named else ["--config=mini/playground", "--gather=all"]


def _class(path: str, **init_args: Any) -> Any:
    return Namespace(class_path=path, init_args=Namespace(**init_args))


def run(arguments: Sequence[str], summary: bool = True) -> dict[str, Any]:
    """Parse and run one verb.

    Args:
        arguments: the verb and its options.
        summary: whether a finished run is printed in full.

    Returns:
        The results of `predict` and `search`; nothing of other verbs.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    report_lost_processes()
    os.environ.setdefault("WANDB_SILENT", "true")
    sys.argv[0] = sys.argv[0] or "sdprune"
    try:
        cli = SdpruneCLI(quoted(arguments), summary)
    except BaseException:
        finish_all(failed=True)
        raise
    finally:
        release_all()
    for line in finish_all(failed=False):
        if summary:
            print(f"W&B        {line}")
    leave_group()
    record = getattr(cli.model, "record", None)
    return record.results if record is not None and record.finished else {}
