"""The embedded world as a caption source."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from sdprune.data import CocoDirectory
from sdprune.errors import InputError
from sdprune.mini.world import write_coco

VERSION = 2  # raise it when the world's pictures or captions change


class EmbeddedWorld(CocoDirectory):
    """Captioned 64 x 64 scenes, drawn on first use into a cache in COCO's own layout.

    Args:
        split: `val` holds only combinations of attributes that training never saw, `train` only others.
        images: number of scenes.
        seed: of the scenes.
        cache: directory for the pictures; by default $SDPRUNE_CACHE or ~/.cache/sdprune.
    """

    def __init__(self, split: str = "val", images: int = 1_000, seed: int = 0, cache: str | None = None) -> None:
        if images < 1:
            raise InputError(f"images is {images}: give 1 or more.")
        home = cache or os.environ.get("SDPRUNE_CACHE") or Path.home() / ".cache" / "sdprune"
        super().__init__(Path(home) / f"world-{VERSION}-{split}-{images}-{seed}", split)
        self.images, self.seed = images, seed

    def prepare(self) -> None:
        """Draw the pictures unless they are there; whole or not at all, also when several processes do it at once."""
        if self.root.exists():
            return
        try:
            self.root.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=self.root.parent))
        except OSError as error:
            raise InputError(
                f"Cannot write the world's cache {self.root.parent}: {error.strerror}. Set SDPRUNE_CACHE."
            ) from error
        try:
            write_coco(temporary, self.split, self.images, self.seed)
            os.replace(temporary, self.root)
        except OSError:
            if not self.root.exists():  # somebody else was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
