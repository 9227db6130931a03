"""`fit` and `predict` on LightningCLI."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

# Before transformers and diffusers are imported: their remarks on torchvision and accelerate are not the user's.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
warnings.filterwarnings("ignore", module=r"(lightning|torch|jsonargparse|diffusers|transformers|wandb)\b")

from lightning import LightningDataModule, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402

import sdprune.data.coco  # noqa: E402
import sdprune.mini.source  # noqa: E402
import sdprune.mini.training  # noqa: E402
import sdprune.modules  # noqa: E402, F401 (classes are found by name among those imported)
from sdprune.callbacks import ImageProgress  # noqa: E402
from sdprune.errors import InputError  # noqa: E402
from sdprune.modules import FrozenModule, GenerationModule  # noqa: E402
from sdprune.summary import show  # noqa: E402

TRAINER_DEFAULTS: dict[str, Any] = {
    "use_distributed_sampler": False,  # the data module deals whole batches to processes
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
    "logger": True,
}


class Parser(LightningArgumentParser):
    """Errors in one line, with the nearest option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise InputError."""
        cause: BaseException | None = ex
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        raise cause or InputError(self._short(message))

    def _short(self, message: str) -> str:
        lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
        text = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
        option = re.search(r"(?:[Uu]nrecognized arguments?|not accepted|does not exist).*?-*([\w.]*\w)", text)
        return f"{text[:400]}{self._nearest(option.group(1)) if option else ''}"

    def _nearest(self, option: str) -> str:
        known = [name.lstrip("-") for action in self._actions for name in action.option_strings]
        close = get_close_matches(option, known, n=1)
        return f" Did you mean --{close[0]}?" if close else " See --help, or --print_config for all options."


class SdpruneCLI(LightningCLI):
    """Adds the W&B flag, early checks, the dense run beside the pruned one, and the summary."""

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

    def before_fit(self) -> None:
        """Tell what can be told before anything costly starts."""
        if isinstance(self.model, FrozenModule):
            self._attach()
            self.model.check(self.datamodule)

    def before_predict(self) -> None:
        """Check, then make the dense record if the pruned run wants it and it is not there."""
        model = self.model
        if not isinstance(model, GenerationModule):
            raise InputError(f"predict runs GenerationModule, got {type(model).__name__}.")
        self._attach()
        runs = [model.dense(), model] if model.wants_dense else [model]
        precision = str(self.trainer.precision)
        records = [run.prepare_record(self.datamodule, precision) for run in runs]
        for run in runs:
            run.check(self.datamodule)
        if model.wants_dense:
            model.baseline = records[0]
            if not records[0].finished:
                self.trainer.predict(runs[0], datamodule=self.datamodule, return_predictions=False)
        if model.record.finished:
            self.trainer.limit_predict_batches = 0

    def after_predict(self) -> None:
        """Print what came out."""
        if self.trainer.is_global_zero:
            show(self.model.record)

    def _attach(self) -> None:
        self.datamodule.prepare_data()
        self.datamodule.trainer = self.trainer


def _class(path: str, **init_args: Any) -> Any:
    from jsonargparse import Namespace

    return Namespace(class_path=path, init_args=Namespace(**init_args))


def run(arguments: Sequence[str]) -> None:
    """Parse and run one verb."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("WANDB_SILENT", "true")
    sys.argv[0] = sys.argv[0] or "sdprune"
    SdpruneCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        seed_everything_default=0,
        trainer_class=Trainer,
        parser_class=Parser,
        trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [ImageProgress()]},
        args=list(arguments),
    )
