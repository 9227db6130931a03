"""What a visitor has chosen: a prompt, a seed and a pruning; as a configuration and as a command."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import yaml

from sdprune.configuration.words import given
from sdprune.errors import InputError, as_share
from sdprune.pruning import PruneSpec

PUBLISHED = "default"
"""The granularity that a criterion was published with."""
_PROMPT = 1000  # characters; text encoders read some 77 to 512 words of them
_REPLACED = ("model.prune", "model.samples", "model.seed")


@dataclass(frozen=True)
class Choice:
    """How a component is pruned.

    Args:
        sparsity: share of its weights.
        criterion: name of the class.
        allocation: name of the class.
        granularity: as in PruneSpec, or PUBLISHED.
    """

    sparsity: float = 0.0
    criterion: str = "Magnitude"
    allocation: str = "Uniform"
    granularity: str = PUBLISHED

    def spec(self, configured: PruneSpec) -> PruneSpec:
        """The specification, with everything that is not chosen as it was configured.

        Raises:
            InputError: for choices that make no sense.
        """
        return replace(
            configured,
            sparsity=as_share("sparsity", self.sparsity),
            criterion=_kept(configured.criterion, self.criterion),
            allocation=_kept(configured.allocation, self.allocation),
            granularity=None if self.granularity == PUBLISHED else self.granularity,
        )

    def written(self, configured: Mapping[str, Any]) -> dict[str, Any]:
        """The same as YAML has it."""
        found = dict(configured) | {"sparsity": float(self.sparsity)}
        for option, name in (("criterion", self.criterion), ("allocation", self.allocation)):
            if _class(found.get(option)) != name:
                found[option] = name
        found.pop("granularity", None)
        return found if self.granularity == PUBLISHED else found | {"granularity": self.granularity}


@dataclass(frozen=True)
class View:
    """What is seen.

    Args:
        prompt: of the picture.
        seed: of its noise, and of the noise of calibration.
        choices: by component; those at sparsity 0 are dense.
    """

    prompt: str
    seed: int
    choices: Mapping[str, Choice]

    def checked(self) -> View:
        """The same, without space around the prompt.

        Raises:
            InputError: no prompt, one that is too long, a seed that is none.
        """
        prompt = " ".join(self.prompt.split())
        if not prompt:
            raise InputError("The prompt is empty: say what the picture shows, as in 'a red star'.")
        if len(prompt) > _PROMPT:
            raise InputError(f"The prompt has {len(prompt)} characters: give at most {_PROMPT}.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**32:
            raise InputError(f"The seed is {self.seed!r}: give a whole number from 0 to {2**32 - 1}.")
        return replace(self, prompt=prompt)

    def prune(self, configured: Mapping[str, Any]) -> dict[str, Any]:
        """The option `prune`."""
        return {name: one.written(configured.get(name) or {}) for name, one in self.choices.items()}


@dataclass(frozen=True)
class Origin:
    """The configuration that the playground was started with.

    Args:
        config: as YAML has it; of `sdprune predict`.
        words: of the command line, without the verb and without options of the playground.
    """

    config: Mapping[str, Any]
    words: Sequence[str]

    def yaml(self, view: View) -> str:
        """The configuration of what is seen: `sdprune predict --config FILE` draws it as its sample."""
        model = self.config["model"]
        shown = {"prune": view.prune(self._prune), "samples": [view.prompt], "seed": view.seed}
        config = {**self.config, "model": {**model, "init_args": {**model["init_args"], **shown}}}
        return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)

    def command(self, view: View) -> str:
        """The same as a command."""
        kept = without(self.words, _REPLACED)
        prune = ", ".join(f"{name}: {_flow(one)}" for name, one in view.prune(self._prune).items())
        options = [f"--model.prune={{{prune}}}", f"--model.samples=[{_scalar(view.prompt)}]"]
        return shlex.join(["sdprune", "predict", *kept, *options, f"--model.seed={view.seed}"])

    @property
    def _prune(self) -> Mapping[str, Any]:
        return self.config["model"]["init_args"].get("prune") or {}


def without(words: Sequence[str], options: Iterable[str]) -> list[str]:
    """The words of a command line without some options and those below them."""
    found, skip = [], False
    for number, word in enumerate(words):
        if skip:
            skip = False
            continue
        name = next((name for name, _ in given(words[number : number + 1])), None)
        if name is not None and any(name == one or name.startswith(f"{one}.") for one in options):
            following = words[number + 1 : number + 2]
            skip = "=" not in word and bool(following) and not following[0].startswith("--")
            continue
        found.append(word)
    return found


def _class(value: Any) -> Optional[str]:
    """The name of a class as YAML has it."""
    path = value.get("class_path") if isinstance(value, Mapping) else value
    return None if path is None else str(path).rpartition(".")[2]


def _kept(configured: Any, name: str) -> Any:
    """What was configured, with its options, where that is what is chosen; else the name."""
    return configured if type(configured).__name__ == name else name


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        return value if value.isidentifier() and yaml.safe_load(value) == value else _scalar(value)
    return yaml.safe_dump(value, width=float("inf")).split("\n")[0]


def _scalar(text: str) -> str:
    """Text in quotes, where nothing that a shell, a parser or YAML could take for its own stands as it is."""
    plain = (one if one.isprintable() and one not in '"\\*&' else f"\\U{ord(one):08x}" for one in text)
    return f'"{"".join(plain)}"'
