"""Image preprocessing in torch alone, equal to what the reference implementations do with PIL."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdprune.errors import InputError

# PIL's resampling codes, as preprocessor_config.json stores them; torch's antialiased kernels are PIL's.
RESAMPLING = {2: "bilinear", 3: "bicubic"}
INCEPTION_SIZE = 299


def check_images(images: Tensor) -> None:
    """Raise ValueError unless `images` is a uint8 batch [b, 3, h, w]."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Expected uint8 images [b, 3, h, w], got {images.dtype} {list(images.shape)}.")


def resize(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Antialiased resize of [b, 3, h, w] to `size` (height, width), clipped to grey levels 0..255, not rounded."""
    pixels = images.float()
    if tuple(pixels.shape[-2:]) != size:
        pixels = F.interpolate(pixels, size=size, mode=mode, align_corners=False, antialias=True)
    return pixels.clamp(0, 255)


def clean(images: Tensor, generated: bool) -> Tensor:
    """Protocol `clean`: PIL's bicubic kernel on float channels, aspect ratio not kept, rounded to whole grey levels."""
    return (resize(images, (INCEPTION_SIZE, INCEPTION_SIZE)).round() - 128) / 128


def pytorch_fid(images: Tensor, generated: bool) -> Tensor:
    """Protocol `pytorch-fid`: to 0..1, bilinear without antialiasing, to -1..1."""
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    pixels = F.interpolate(images.float() / 255, size=size, mode="bilinear", align_corners=False)
    return 2 * pixels - 1


def study(images: Tensor, generated: bool) -> Tensor:
    """Protocol `study`: generated images through JPEG; both sides resized by PIL and through JPEG; as in pytorch-fid.

    JPEG is what PIL saves by default (quality 75, chroma at half resolution).
    """
    return pytorch_fid(torch.stack([_as_in_the_study(image, generated) for image in images.cpu()]), generated).to(
        images.device
    )


def _as_in_the_study(image: Tensor, generated: bool) -> Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if generated:
        picture = _through_jpeg(picture)
    resized = picture.resize((INCEPTION_SIZE, INCEPTION_SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(_through_jpeg(resized))).permute(2, 0, 1)


def _through_jpeg(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG")
    return Image.open(buffer).convert("RGB")


PROTOCOLS: dict[str, Callable[[Tensor, bool], Tensor]] = {"clean": clean, "study": study, "pytorch-fid": pytorch_fid}
"""By name: (uint8 [b, 3, h, w], whether they are generated) -> what Inception sees, float32 [b, 3, 299, 299]."""


def center_crop(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the middle `size` (height, width) out of [b, 3, h, w]; what is missing is filled with zeros."""
    height, width = size
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    bottom, right = pixels.shape[-2] - height - top, pixels.shape[-1] - width - left
    return F.pad(pixels, (-left, -right, -top, -bottom))


@dataclass(frozen=True)
class ClipPreprocessing:
    """The steps of a `preprocessor_config.json` of CLIP: resize, centre crop, rescale, normalise."""

    shortest_edge: int | None
    size: tuple[int, int] | None
    crop: tuple[int, int] | None
    mode: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ClipPreprocessing":
        """Read a preprocessor config; sizes may be an int or a mapping, as older and newer files write them.

        Raises:
            InputError: a resampling other than bilinear or bicubic.
        """
        code = config.get("resample", 3)
        if code not in RESAMPLING:
            raise InputError(f"Unknown resample {code!r} in the CLIP preprocessor config. Choices: 2 (bilinear), 3.")
        edge, size = _edge_or_size(config.get("size", 224)) if config.get("do_resize", True) else (None, None)
        return cls(
            shortest_edge=edge,
            size=size,
            crop=_square(config.get("crop_size", 224)) if config.get("do_center_crop", True) else None,
            mode=RESAMPLING[code],
            scale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
            mean=tuple(config["image_mean"]) if config.get("do_normalize", True) else (0.0, 0.0, 0.0),
            std=tuple(config["image_std"]) if config.get("do_normalize", True) else (1.0, 1.0, 1.0),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Pixel values [b, 3, H, W] float32 of uint8 images [b, 3, h, w], on the same device."""
        check_images(images)
        pixels = images.float()
        target = self._target(images.shape[-2], images.shape[-1])
        if target is not None:
            # PIL resizes across, then down, and clips and rounds to whole grey levels (halves up) after each.
            pixels = (resize(pixels, (images.shape[-2], target[1]), self.mode) + 0.5).floor()
            pixels = (resize(pixels, target, self.mode) + 0.5).floor()
        if self.crop is not None:
            pixels = center_crop(pixels, self.crop)
        # In float32: within a trainer of half precision, torch's default dtype is half.
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (pixels * self.scale - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int] | None:
        if self.shortest_edge is None:
            return self.size
        edge = self.shortest_edge
        return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)


def _square(size: int | Mapping[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def _edge_or_size(size: int | Mapping[str, int]) -> tuple[int | None, tuple[int, int] | None]:
    if isinstance(size, int):
        return size, None
    return (size["shortest_edge"], None) if "shortest_edge" in size else (None, _square(size))
