"""The inputs that a module is run on, one call after another."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from sdprune.errors import InputError


class Call(NamedTuple):
    """The input of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def samples(self) -> int:
        """How many items it holds: the length of the first tensor in it."""
        first = next(tensors((self.args, self.kwargs)), None)
        return len(first) if first is not None and first.dim() else 1


def calls_of(module: nn.Module, inputs: Iterable[Any]) -> list[Call]:
    """Inputs as users write them, checked against the module's `forward`.

    Args:
        module: is to be called.
        inputs: each element is a tensor, a tuple or list of arguments, a dict of keyword arguments, or both as a pair
            (tuple of arguments, dict of keyword arguments).

    Raises:
        InputError: no inputs, or one that `forward` does not take.
    """
    calls = [_call_of(one) for one in listed(inputs)]
    signature = inspect.signature(module.forward)
    for i, call in enumerate(calls):
        try:
            signature.bind(*call.args, **call.kwargs)
        except TypeError as error:
            raise InputError(
                f"inputs[{i}] does not fit {type(module).__name__}.forward{signature}: {error}. Give a tensor, a tuple "
                "of arguments, a dict of keyword arguments, or both as (tuple, dict)."
            ) from error
    return calls


def listed(inputs: Iterable[Any]) -> list[Any]:
    """The inputs, to be gone through several times.

    Raises:
        InputError: there are none, or they are no series of inputs.
    """
    if isinstance(inputs, (str, Mapping)) or not isinstance(inputs, Iterable):
        raise InputError(
            f"inputs is a {type(inputs).__name__}: give a list with the input of each call, as in [batch, batch]."
        )
    batches = list(inputs)
    if not batches:
        raise InputError("inputs is empty: give the input of at least one call.")
    return batches


def _call_of(one: Any) -> Call:
    if isinstance(one, Mapping):
        return Call((), dict(one))
    if not isinstance(one, (tuple, list)):
        return Call((one,), {})
    if isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], tuple) and isinstance(one[1], Mapping):
        return Call(one[0], dict(one[1]))
    return Call(tuple(one), {})


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors(one)
