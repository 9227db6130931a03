"""What can be found wrong with a model before its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from sdprune.errors import InputError
from sdprune.outside import reading

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sdprune.pipelines.base import DiffusersFamily
    from sdprune.pipelines.sampling import Sampling


def check_size(family: DiffusersFamily, sampling: Sampling, native: int | Sequence[int], scale: int) -> tuple[int, int]:
    """Height and width in pixels.

    Args:
        family: the pipeline.
        sampling: has them, unless they are the model's own.
        native: height and width of the model's own pictures in latents; one number where they are equal.
        scale: pixels of a latent along a side.

    Raises:
        InputError: no multiples of what the pipeline draws.
    """
    multiple = scale * family.patch
    for name, side in zip(("height", "width"), sampling.size, strict=True):
        if side is not None and side % multiple:
            raise InputError(
                f"{sampling.option.format(name)} is {side}: {family.files.path} draws multiples of {multiple} pixels, "
                f"such as {max(1, round(side / multiple)) * multiple}."
            )
    own = (native, native) if isinstance(native, int) else native
    height, width = (side or latents * scale for side, latents in zip(sampling.size, own, strict=True))
    return height, width


class DryRun(NamedTuple):
    """What came of a dry run."""

    picture: Tensor
    """Zeros, [1, 3, height, width]."""
    calls: int
    """How often the denoiser was called."""


def dry_run(
    family: DiffusersFamily, sampling: Sampling, module: Optional[Callable[[str], nn.Module]] = None,
    watching: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
) -> DryRun:  # fmt: skip
    """Draw one picture by the pipeline itself, whose parts compute the shapes of their outputs and nothing else.

    Parts that do not fit each other, a scheduler that cannot take so many steps and a size that cannot be drawn are
    found without any weights.

    Args:
        family: the pipeline.
        sampling: how it draws.
        module: makes the module of a name on the meta device; by default as the family does.
        watching: gets the pipeline, and is entered while it draws.

    Raises:
        InputError: what does not fit.
    """
    import torch

    cpu, path = torch.device("cpu"), family.files.path
    calls = 0

    def called(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with reading(f"The parts of {path} do not fit each other"):
        pipe = family.assembled(module or family.meta_module, device=cpu, _execution_device=cpu)
        _check_channels(family, pipe)
        for name, component in family.prunable.items():
            if component.role == "text":
                _check_tokens(getattr(pipe, name), pipe.components[name.replace("text_encoder", "tokenizer")])
            _compute_shapes(getattr(pipe, name), "forward")
        _compute_shapes(pipe.vae, "decode")
        scheduler = family.new_scheduler(pipe.scheduler, sampling, lambda *_: None)
        problem = f"Scheduler {type(scheduler).__name__} of {path} cannot take {sampling.steps} steps"
        _blame(scheduler, "set_timesteps", problem)
        _blame(scheduler, "step", problem)
        hook = getattr(pipe, family.denoiser).register_forward_pre_hook(called)
        with torch.no_grad(), watching(pipe):
            picture = family.draw(
                pipe, scheduler, [" "], [0], sampling, "pt"
            )  # as blank as what guidance compares it with
        hook.remove()
        if picture.shape[:2] != (1, 3):
            raise ValueError(f"images of shape {list(picture.shape)}")
    return DryRun(picture, calls)


def _check_channels(family: DiffusersFamily, pipe: Any) -> None:
    takes = getattr(pipe, family.denoiser).config.in_channels
    makes = pipe.vae.config.get("latent_channels") or pipe.vae.config.z_dim
    makes *= 4 if hasattr(pipe, "_pack_latents") else 1
    if takes != makes:
        raise InputError(
            f"The denoiser of {family.files.path} takes {takes} channels and the VAE makes {makes}: this is a model "
            "for inpainting or editing, which needs a picture. Give the text-to-image model that it was made from."
        )


def _check_tokens(text: Any, tokenizer: Any) -> None:
    """See that a text encoder can read what its tokenizer writes: no shape shows it."""
    largest, known = max(tokenizer.get_vocab().values()), text.get_input_embeddings().num_embeddings
    learned = [one.num_embeddings for name, one in text.named_modules() if name.endswith("position_embedding")]
    if largest >= known or tokenizer.model_max_length < 2 or any(tokenizer.model_max_length > one for one in learned):
        raise ValueError(
            f"the tokenizer cuts at {tokenizer.model_max_length} tokens, numbered up to {largest}; the text "
            f"encoder takes {min(learned, default='any number')}, numbered below {known}"
        )


def _compute_shapes(module: nn.Module, method: str) -> None:
    """Make a method of a module on the meta device return zeros of the right shapes on the CPU."""
    import torch
    from torch.utils._pytree import tree_flatten, tree_map_only

    run, found = getattr(module, method), {}

    @wraps(run)
    def shapes(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("attention_mask", None)  # its values decide which way is taken, and on the meta device it has none
        args, kwargs = tree_map_only(torch.Tensor, lambda one: one.to("meta"), (args, kwargs))
        key = tuple(one.shape for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor))
        if key not in found:  # all steps are alike
            with torch.device("meta"):
                found[key] = run(*args, **kwargs)
        return tree_map_only(torch.Tensor, lambda one: torch.zeros_like(one, device="cpu"), found[key])

    setattr(module, method, shapes)


def _blame(scheduler: Any, method: str, problem: str) -> None:
    """Blame a scheduler for what goes wrong in one of its methods, unless it is given a prediction of another shape."""
    run = getattr(scheduler, method)

    @wraps(run)  # pipelines look at its signature
    def blamed(*args: Any, **kwargs: Any) -> Any:
        if method == "step" and args[0].shape != args[2].shape:
            raise ValueError(f"latents {list(args[2].shape)}, prediction {list(args[0].shape)}")
        with reading(problem, "Choose another scheduler or number of steps."):
            return run(*args, **kwargs)

    setattr(scheduler, method, blamed)
