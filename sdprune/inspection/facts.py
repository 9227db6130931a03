"""What a model is made of, and what pruning it would cost and leave, as JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Optional

from torch import nn

from sdprune.calibration.execution import Flow, following
from sdprune.calibration.passes import plan_passes
from sdprune.calibration.replay import most_kept
from sdprune.errors import InputError, unknown
from sdprune.inspection.model import modules_of, stored_of
from sdprune.pipelines import DiffusersFamily, Sampling
from sdprune.pipelines.reduced import outermost
from sdprune.pipelines.trace import LATENTS, TEXT, TIMESTEP, Trace, targets_of, trace
from sdprune.pruning import Criterion, PruneSpec, Target, statistic
from sdprune.pruning.memory import named_tensors, region
from sdprune.pruning.selection import count
from sdprune.pruning.statistics import InputStatistic
from sdprune.pruning.targets import LAYER_KINDS, by_block, layer_kind
from sdprune.schema import choices_of, is_packaged


def inspect(
    family: DiffusersFamily,
    sparsities: Mapping[str, float],
    layers: Sequence[str],
    steps: int,
    memory: int,
    captions: int,
    bytes_per_number: int,
) -> dict[str, Any]:
    """Look at a model without its weights.

    Args:
        family: the model; nothing of it is loaded.
        sparsities: by component, or by role (`text`, `denoiser`); a component's own goes first.
        layers: kinds of layers that are pruned.
        steps: denoising steps that statistics are kept of.
        memory: bytes that the sums of one pass may take.
        captions: how many the model is calibrated on.
        bytes_per_number: of what layers give: 2 in half precision, 4 in float32.

    Returns:
        JSON values.

    Raises:
        InputError: a configuration that is damaged, parts that do not fit each other, unknown names.
    """
    roles = {name: component.role for name, component in family.prunable.items()}
    for name in sparsities:
        if name not in roles and name not in roles.values():
            raise unknown("component or role", name, dict.fromkeys([*roles, *roles.values()]))
    modules = modules_of(family)
    found, flows = _traced(family, modules, steps)
    components: dict[str, Any] = {}
    chosen: dict[str, list[Target]] = {}
    for name, module in modules.items():
        components[name] = {
            "class": type(module).__name__, "role": roles.get(name),
            "parameters": _size(module.parameters()), "stored": stored_of(family, name),
        }  # fmt: skip
        if name not in roles:
            continue
        denoises, flow = name == family.denoiser, flows[name]
        useful = _useful(module, targets_of(module, layers), found.unread[name])
        patterns = family.prunable[name].idle(layers, module)
        targets = [one for one in useful if not any(fnmatchcase(one.name, pattern) for pattern in patterns)]
        calls = found.calls if denoises else 1
        kept = (captions * calls + 1) * bytes_per_number // 4  # the trace is one of float32
        chosen[name] = targets
        components[name] |= {
            "kinds": _kinds(module), "tied": _tied(module), "blocks": _blocks(targets, flow.order),
            "unread": _unread(module, found.unread[name]),
            "inputs": _inputs(targets, {one: found.inputs[name, one] for one in flow.order}, denoises),
            "idle": _idle(useful, targets),
            "criteria": _costs(targets, flow, steps if denoises else 1, memory, kept),
        }  # fmt: skip
    wanted = {name: sparsities.get(name, sparsities.get(role, 0.0)) for name, role in roles.items()}
    return {
        "family": type(family).__name__, "parameters": sum(one["parameters"] for one in components.values()),
        "layers": list(layers), "steps": steps, "memory": memory, "captions": captions,
        "bytes_per_number": bytes_per_number, "components": components,
        "pruned": _pruned(chosen, {name: components[name]["parameters"] for name in roles}, wanted),
    }  # fmt: skip


def _traced(family: DiffusersFamily, modules: Mapping[str, nn.Module], steps: int) -> tuple[Trace, dict[str, Flow]]:
    """One picture drawn without numbers, and how its values go through the blocks of each prunable component."""
    targets = {name: targets_of(modules[name], LAYER_KINDS) for name in family.prunable}
    flows: dict[str, Flow] = {}

    @contextmanager
    def followed() -> Iterator[None]:
        with ExitStack() as stack:
            flows.update({name: stack.enter_context(following(modules[name], own)) for name, own in targets.items()})
            yield

    return trace(family, modules, targets, Sampling(steps), followed), flows


def _useful(module: nn.Module, targets: Sequence[Target], unread: Sequence[str]) -> list[Target]:
    """The layers that are worth to be pruned: some output depends on them, and their weight is no embedding too."""
    tied = {name: set(names) for names in _tied(module) for name in names}
    weights = {target.name: {f"{name}.weight" for name in target.names} for target in targets}
    return [
        target for target in targets
        if not weights[target.name] & set(unread)
        and tied.get(f"{target.name}.weight", set()) <= weights[target.name]
    ]  # fmt: skip


def _size(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _kinds(module: nn.Module) -> dict[str, dict[str, int]]:
    """Tensors and parameters by kind: weights of LAYER_KINDS, which can be pruned, and everything else."""
    found: dict[str, dict[str, int]] = {}
    counted: set[int] = set()
    for one in module.modules():
        for name, parameter in one.named_parameters(recurse=False):
            if id(parameter) in counted:
                continue
            counted.add(id(parameter))
            kind = _kind(one, name)
            entry = found.setdefault(kind, {"tensors": 0, "parameters": 0})
            entry["tensors"] += 1
            entry["parameters"] += parameter.numel()
    return found


def _kind(module: nn.Module, parameter: str) -> str:
    kind = layer_kind(module)
    if kind is not None and parameter == "weight":
        return kind
    if "norm" in type(module).__name__.lower():
        return "norm"
    return "Embedding" if isinstance(module, nn.Embedding) else "bias" if parameter == "bias" else "other"


def _tied(module: nn.Module) -> list[list[str]]:
    """Names of tensors that lie in the very same memory."""
    places: dict[Any, list[str]] = {}
    for name, tensor in named_tensors(module):
        places.setdefault(region(tensor), []).append(name)
    return [names for place, names in places.items() if place is not None and len(names) > 1]


def _blocks(targets: Sequence[Target], order: Sequence[str]) -> list[dict[str, Any]]:
    """The blocks in the order in which they first run."""
    place = {name: number for number, name in enumerate(order)}
    targets = sorted(targets, key=lambda target: place.get(target.name, len(place)))
    return [
        {
            "name": name,
            "layers": len(members),
            "weights": _size(target.weight for target in members),
            "runs": any(target.name in place for target in members),
        }
        for name, members in by_block(targets).items()
    ]


def _inputs(targets: Sequence[Target], marks: Mapping[str, int], denoises: bool) -> dict[str, Any]:
    """A denoiser's layers that see at most one input a step, or the same one in all steps; and layers that never run.

    Args:
        targets: the layers.
        marks: what the inputs depend on, of the layers that run, in that order.
        denoises: whether this is the denoiser.
    """
    weights = {target.name: target.weight.numel() for target in targets}

    def those(names: list[str]) -> dict[str, Any]:
        return {"layers": names, "weights": sum(weights[one] for one in names)}

    seen = {name: mark for name, mark in marks.items() if name in weights and denoises}
    return {
        "timestep_alone": those([name for name, mark in seen.items() if not mark & (LATENTS | TEXT)]),
        "text_alone": those([name for name, mark in seen.items() if mark & (LATENTS | TEXT | TIMESTEP) == TEXT]),
        "never_called": those([name for name in weights if name not in marks]),
    }


def _unread(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    parameters = dict(module.named_parameters())
    return {"modules": outermost(module, names), "parameters": _size(parameters[one] for one in names)}


def _idle(useful: Sequence[Target], chosen: Sequence[Target]) -> dict[str, Any]:
    """The layers that the family knows to be without effect, beside those of which that is shown here."""
    pruned = {one.name for one in chosen}
    idle = [one for one in useful if one.name not in pruned]
    return {"layers": [one.name for one in idle], "weights": _size(one.weight for one in idle)}


def _costs(targets: Sequence[Target], flow: Flow, steps: int, memory: int, kept: int) -> dict[str, Any]:
    """By criterion, the statistics that it reads, their bytes in the store, and what each order takes.

    Args:
        targets: the layers.
        flow: how values go through the component's blocks.
        steps: denoising steps that statistics are kept of.
        memory: bytes that the sums of one pass may take.
        kept: how many calls are kept.
    """
    found: dict[str, Any] = {}
    for name, cls in choices_of([Criterion]).items():
        if not is_packaged(cls):
            continue
        criterion: Criterion = cls()
        statistics = [statistic(one, steps) for one in sorted(criterion.statistics)] if targets else []
        found[name] = {
            "statistics": [one.name for one in statistics],
            "bytes": sum(one.bytes_of(target) for one in statistics for target in targets),
            "one_pass": _passes(targets, statistics, memory, None, flow, kept),
            "sequential": _passes(targets, statistics, memory, PruneSpec(0.5, criterion=criterion), flow, kept),
        }
    return found


def _passes(
    targets: Sequence[Target], statistics: Sequence[InputStatistic], memory: int, spec: Optional[PruneSpec],
    flow: Flow, kept: int,
) -> Optional[dict[str, int]]:  # fmt: skip
    """How many passes gather the statistics, the bytes of the largest, and those of a file that saves all but one run
    of the pipeline; None where a layer exceeds the memory."""
    try:
        passes = plan_passes(targets, statistics, memory, spec, flow.order) if statistics else []
    except InputError:
        return None
    several = len(passes) > 1 and flow.blocks
    return {
        "passes": len(passes),
        "memory": max((one.memory for one in passes), default=0),
        "kept": most_kept(flow, passes) * kept if several else 0,
    }


def _pruned(
    targets: Mapping[str, Sequence[Target]], parameters: Mapping[str, int], sparsities: Mapping[str, float]
) -> dict[str, Any]:
    """What these sparsities leave, layer by layer to the weight; sparsities are counted as `account` does."""
    components = {}
    for name, sparsity in sparsities.items():
        zeros = sum(count(target.weight.numel(), sparsity) for target in targets[name])
        weights = _size(target.weight for target in targets[name])
        components[name] = {
            "sparsity": sparsity, "weights": weights, "pruned": zeros, "left": parameters[name] - zeros,
            "actual": zeros / parameters[name],
        }  # fmt: skip
    whole = sum(parameters.values())
    pruned = sum(one["pruned"] for one in components.values())
    nominal = sum(sparsities[name] * size for name, size in parameters.items()) / whole
    return {
        "components": components, "parameters": whole, "pruned": pruned, "left": whole - pruned, "nominal": nominal,
        "actual": pruned / whole,
    }  # fmt: skip
