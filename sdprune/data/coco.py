"""The data of a run: which captions become images, which calibrate, and which real images they are compared with."""

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, cast

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from sdprune.data.batches import Batch, Batches, BatchSampler, draw, require_images
from sdprune.data.sources import CaptionSource
from sdprune.errors import InputError, unknown
from sdprune.identity import facts_of
from sdprune.locks import release_all
from sdprune.outside import read_npz

if TYPE_CHECKING:
    from datasets import Dataset


class CocoDataModule(LightningDataModule):
    """Prompts drawn as in the study, calibration prompts, and the real images of the reference.

    Run the trainer with `use_distributed_sampler: false`: batches are dealt to processes here.

    Args:
        source: Captions to generate from, with their real images.
        n: Number of captions drawn.
        seed: Seed of the draw.
        batch_size: Prompts generated together. Another value changes the last bits of images.
        reference: Real images to compare with: `drawn` (those of the drawn captions), `split` (all of the source), or
            the path of an .npz of statistics with `mu` and `sigma`.
        calibration: Captions to calibrate on; by default those of `source`, where they may be among the drawn ones.
        calibration_n: Number of calibration captions.
        calibration_batch_size: Calibration prompts that go through the model together.
        calibration_draw: `first` takes the first ones of the calibration source, `random` draws them with seed + 1.
            Neither depends on which captions are drawn for generation.
        workers: Worker processes that load batches.
    """

    def __init__(
        self,
        source: CaptionSource,
        n: int = 10_000,
        seed: int = 0,
        batch_size: int = 8,
        reference: str = "drawn",
        calibration: Optional[CaptionSource] = None,
        calibration_n: int = 128,
        calibration_batch_size: int = 16,
        calibration_draw: Literal["first", "random"] = "first",
        workers: int = 0,
    ) -> None:
        super().__init__()
        counts = {"n": n, "batch_size": batch_size}
        counts |= {"calibration_n": calibration_n, "calibration_batch_size": calibration_batch_size}
        _require_positive(counts)
        if not 0 <= seed < 2**32 - 1:
            raise InputError(f"seed={seed} is out of range: choose from 0 to {2**32 - 2}.")
        if reference not in ("drawn", "split") and not reference.endswith(".npz"):
            raise unknown("reference", reference, ["drawn", "split", "<path to statistics>.npz"])
        self.source = source
        self.n = n
        self.seed = seed
        self.batch_size = batch_size
        self.reference = reference
        self.calibration = calibration or source
        self.calibration_n = calibration_n
        self.calibration_batch_size = calibration_batch_size
        self.calibration_draw = calibration_draw
        self.workers = workers
        self.calibrates = True
        """Whether the run needs calibration captions; without, their source is left alone."""
        self.passes: Optional[int] = None
        """Over the calibration captions, for a module that calibrates in the predict loop; others draw images."""
        self.work: Optional[Iterable[Any]] = None
        """Deals the batches of a module that decides by itself what is drawn next."""

    def on_exception(self, exception: BaseException) -> None:
        """Let go of what the run had locked, so that it can be tried again in the same process."""
        release_all()

    def prepare_data(self) -> None:
        """Let the sources make what they read; the trainer calls this on one process a node."""
        self.source.prepare()
        module = self.trainer.lightning_module if self.trainer else None
        if getattr(module, "calibrates", self.calibrates) and self.calibration is not self.source:
            self.calibration.prepare()

    @cached_property
    def examples(self) -> "Dataset":
        """The drawn rows (`id`, `file_name`, `caption`, `path`), in drawn order."""
        require_images(len(self._table), self.n, "--data.n")
        return self.drawn(self.n)

    def drawn(self, n: int) -> "Dataset":
        """Return the rows of a draw of n, in drawn order; a draw of more begins with those of a draw of less."""
        return self._table.select(draw(len(self._table), n, self.seed))

    @property
    def captions(self) -> int:
        """Number of captions that the source has."""
        return len(self._table)

    @cached_property
    def calibration_examples(self) -> "Dataset":
        """The calibration rows, with the columns of `examples`."""
        table = self._table if self.calibration is self.source else self._prepared(self.calibration).load()
        require_images(len(table), self.calibration_n, "--data.calibration_n")
        if self.calibration_draw == "random":
            return table.select(draw(len(table), self.calibration_n, self.seed + 1))
        return table.select(range(self.calibration_n))

    def predict_dataloader(self) -> "Iterable[Any]":
        """Return this process's batches of drawn prompts, each a `Batch` of `batch_size`; or, for a module that
        calibrates, a loader of calibration batches for each of its passes, at least one; or the work of a module that
        deals it.

        Raises:
            InputError: More processes than batches.
        """
        if self.work is not None:
            return self.work
        if self.passes is not None:
            return [self.calibration_loader() for _ in range(self.passes)] or [self.calibration_loader(empty=True)]
        sampler = BatchSampler(self.n, self.batch_size, *self._place())
        return self._loader(Batches(self.examples, self.batch_size), sampler)

    def calibration_loader(self, empty: bool = False) -> "DataLoader[Batch]":
        """Return this process's calibration batches, as many as every other process has: fillers even them out.

        Args:
            empty: A filler is all there is; captions need not be there.
        """
        from datasets import Dataset

        rows = Dataset.from_dict({}) if empty else self.calibration_examples
        sampler = BatchSampler(len(rows), self.calibration_batch_size, *self._place(), fill=True)
        return self._loader(Batches(rows, self.calibration_batch_size), sampler)

    def calibration_batch(self, n: int) -> Batch:
        """Return the first n calibration prompts, or all if there are less, the same on every process."""
        rows = self.calibration_examples
        return Batches(rows, min(n, len(rows)))[0]

    @property
    def reference_rows(self) -> "Dataset":
        """The rows of the reference's images.

        Raises:
            InputError: The reference is a file of statistics.
        """
        if self.reference_file is not None:
            raise InputError(f"reference={self.reference} is a file of statistics and has no images.")
        return self.examples if self.reference == "drawn" else self._table

    def reference_images(self) -> Iterator[torch.Tensor]:
        """Yield the real images of the reference one by one: uint8 [3, height, width], each in its own size."""
        import numpy as np

        for row in self.reference_rows:
            yield torch.from_numpy(np.array(self.source.image(row))).permute(2, 0, 1).contiguous()

    def describe(self) -> dict[str, Any]:
        """Return what generated images depend on, which there are and what they are compared with, as JSON.

        The contents of real images are in `reference_digest`: only scores that look at them depend on it.
        """
        file = self.reference_file
        return {
            "source": facts_of(self._prepared(self.source)),
            "n": self.n,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "reference": self.reference if file is None else f"file {self.reference_digest}",
        }

    @property
    def reference_digest(self) -> str:
        """SHA-256 of the real images of the reference, or of the file of statistics.

        Raises:
            InputError: Naming what is missing or damaged.
        """
        if self.reference_file is not None:
            return hashlib.sha256(_read_statistics(self.reference_file)).hexdigest()
        return self._image_digest

    @cached_property
    def _image_digest(self) -> str:
        return self._prepared(self.source).digest(self.reference_rows)

    def describe_calibration(self) -> dict[str, Any]:
        """Return what calibration statistics depend on, as JSON."""
        facts = {
            "source": facts_of(self._prepared(self.calibration)),
            "n": self.calibration_n,
            "batch_size": self.calibration_batch_size,
            "draw": self.calibration_draw,
        }
        return facts | ({"seed": self.seed + 1} if self.calibration_draw == "random" else {})

    def check(self, tokenizer: Optional[Any] = None, calibration: bool = False, images: bool = True) -> dict[str, int]:
        """Report everything that would stop the run, before anything is generated.

        Args:
            tokenizer: Hugging Face tokenizer, to count captions that it cuts.
            calibration: The run calibrates, so its captions are needed too.
            images: Read every image of the reference; not needed once its statistics are known.

        Returns:
            Facts: `images` of the source, `prompts` drawn, `reference_images` unless the reference is a file, and where
            they were looked at `calibration_prompts` and `truncated`.

        Raises:
            InputError: Too few captions, more processes than batches, images or statistics missing or damaged.
        """
        BatchSampler(self.n, self.batch_size, *self._place())
        facts = {"images": len(self._table), "prompts": len(self.examples)}
        if calibration:
            facts["calibration_prompts"] = len(self.calibration_examples)
        if self.reference_file is not None:
            _check_statistics(self.reference_file)
        else:
            if images:
                self.source.check(self.reference_rows)
            facts["reference_images"] = len(self.reference_rows)
        return facts if tokenizer is None else facts | {"truncated": self.count_truncated(tokenizer)}

    def count_truncated(self, tokenizer: Any) -> int:
        """Return how many drawn captions have more tokens, special ones included, than `tokenizer.model_max_length`."""
        tokens = tokenizer(list(self.examples["caption"]), truncation=False, verbose=False)["input_ids"]
        return sum(len(caption) > tokenizer.model_max_length for caption in tokens)

    @cached_property
    def _table(self) -> "Dataset":
        return self._prepared(self.source).load()

    @property
    def reference_file(self) -> Optional[Path]:
        """The file of statistics that `reference` names, if it does."""
        return None if self.reference in ("drawn", "split") else Path(self.reference)

    def _prepared(self, source: CaptionSource) -> CaptionSource:
        if self.trainer is None:  # with a trainer, prepare_data has run on one process a node
            source.prepare()
        return source

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes: those of the trainer, if there is one."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, batches: Batches, sampler: BatchSampler) -> "DataLoader[Batch]":
        # A plain sampler of whole batches, not a batch_sampler: Lightning rebuilds a batch_sampler for predict.
        dataset = cast("TorchDataset[Batch]", batches)
        return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=self.workers)


def _require_positive(counts: dict[str, int]) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name}={count} is too small: choose 1 or more.")


def _read_statistics(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"--data.reference is {path}, which cannot be read: {error.strerror}. Give `drawn`, `split` or an .npz."
        ) from error


def _check_statistics(path: Path) -> None:
    _read_statistics(path)
    if missing := {"mu", "sigma"} - set(read_npz(path)):
        lacks = " and no ".join(sorted(missing))
        raise InputError(f"--data.reference is {path}, which has no {lacks}: give an .npz with mu and sigma.")
