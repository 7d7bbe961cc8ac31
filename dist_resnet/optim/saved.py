"""What an optimizer keeps from step to step, by the names of the parameters it is kept for."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dist_resnet.base.errors import UserError
from dist_resnet.distributed.flat import FlatModel
from dist_resnet.optim.plain_values import changed, copied, is_plain, plain, restored, tensors
from dist_resnet.optim.sgd import WithoutCompiler

# Of every `torch.optim.Optimizer`; whatever else one has as an attribute is its own.
_COMMON = frozenset(vars(WithoutCompiler([torch.zeros(1)], {})))


class OptimizerState:
    """Saves and restores an optimizer of any kind.

    Saved are, as plain numbers, texts and tensors on the CPU: the state of each parameter, by the
    parameter's name; state under keys of its own; and what it has changed, since it was made, in
    its groups and in its attributes. A group's rate is the schedule's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, flat: FlatModel, parted: bool) -> None:
        """Call this before the first step.

        Args:
            parted: whether its parameters may be parts of the flat values.

        Raises:
            UserError: it has parameters that are none of the model's.
        """
        self._optimizer = optimizer
        names = {id(p): name for name, p in flat.model.named_parameters()}
        self._named = [(names[id(p)], p) for p in flat.parameters]
        self._parted = parted
        self._parts = [self._parts_of(p) for p in self._parameters()]
        self._groups = [copied(_entries(group)) for group in optimizer.param_groups]
        self._own = copied(_own(optimizer))

    def tensors(self) -> list[Tensor]:
        """All tensors that a step may change, but parameters and gradients."""
        optimizer = self._optimizer
        kept = [self._live(), *map(_entries, optimizer.param_groups), _own(optimizer)]
        return list(tensors(kept))

    def state_dict(self) -> dict[str, Any]:
        """A copy of all of it.

        Raises:
            UserError: something in it is neither number, text, tensor nor a collection of these.
        """
        optimizer, parameters = self._optimizer, list(self._parameters())
        named: dict[str, dict[str, Any]] = {}
        others: dict[str, Any] = {}
        for index, kept in sorted(self._live().items(), key=lambda item: str(item[0])):
            if not isinstance(index, int) or index >= len(parameters):
                others[str(index)] = plain(kept)
                continue
            for name, place in self._parts[index]:
                named[name] = {
                    key: plain(_cut(value, parameters[index], place)) for key, value in kept.items()
                }
        return {
            "parameters": named,
            "others": others,
            "groups": [
                plain(changed(_entries(group), before))
                for group, before in zip(optimizer.param_groups, self._groups, strict=True)
            ],
            "own": plain(changed(_own(optimizer), self._own)),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """The inverse, of an optimizer that was made as this one was.

        Raises:
            UserError: saved from another one.
        """
        optimizer, parameters = self._optimizer, list(self._parameters())
        before, own = self._live(), parameters[0].device
        state: dict[Any, dict[str, Any]] = dict(saved["others"])
        for index, parts in enumerate(self._parts):
            found = [(saved["parameters"].get(name), place) for name, place in parts]
            if any(kept is not None for kept, _ in found):
                state[index] = _joined(parameters[index], found)
            elif before.get(index):  # a fork trains what was frozen until here
                state[index] = before[index]
        packed = optimizer.state_dict()
        groups = [_entries(group) for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(packed | {"state": state})
        except (ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"optim.name: the checkpoint is of another optimizer: {error}"
            ) from None
        for index, kept in self._live().items():
            if isinstance(index, int) and index < len(parameters):
                wanted, held = state[index], before.get(index, {})
                device = parameters[index].device
                for key, value in wanted.items():  # torch has cast them
                    kept[key] = restored(value, held.get(key), device, kept.get(key))
            else:
                optimizer.state[index] = restored(saved["others"][index], before.get(index), own)
        changed_groups = saved["groups"]
        if not any(changed_groups):  # a fork may part the parameters in other groups
            changed_groups = [{}] * len(groups)
        if len(changed_groups) != len(groups):
            raise UserError("optim.name: the checkpoint is of another optimizer, of other groups")
        for group, entries, changes in zip(
            optimizer.param_groups, groups, changed_groups, strict=True
        ):
            group.update(entries)
            for key, value in changes.items():
                group[key] = restored(value, entries.get(key), own)
        for name, value in saved["own"].items():
            setattr(optimizer, name, restored(value, vars(optimizer).get(name), own))

    def _parameters(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _live(self) -> dict[Any, dict[str, Any]]:
        """By the parameter's number; not a copy."""
        state: dict[Any, dict[str, Any]] = self._optimizer.state_dict()["state"]
        return state

    def _parts_of(self, parameter: Tensor) -> list[tuple[str, Tensor | None]]:
        """The names that stand for a parameter, each with the model's own where it is a part."""
        for name, own in self._named:
            if own is parameter:
                return [(name, None)]
        start = parameter.storage_offset()
        stop = start + parameter.numel()
        if not self._parted:
            raise UserError("optim.name: it holds a parameter that is none of the model's")
        return [(name, own) for name, own in self._named if start <= own.storage_offset() < stop]


def not_saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its own attributes that are no plain values."""
    own = {key: value for key, value in vars(optimizer).items() if key not in _COMMON}
    return {key: value for key, value in own.items() if not is_plain(value)}


def _entries(group: dict[str, Any]) -> dict[str, Any]:
    """Of a group, all that is neither the parameters nor the rate."""
    return {key: value for key, value in group.items() if key not in ("params", "lr")}


def _own(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's own attributes that hold nothing but plain values."""
    return {
        key: value
        for key, value in vars(optimizer).items()
        if key not in _COMMON and is_plain(value)
    }


def _cut(value: Any, parameter: Tensor, place: Tensor | None) -> Any:
    """What of a flat parameter's state belongs to the model's own at `place`."""
    if place is None or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    start = place.storage_offset() - parameter.storage_offset()
    return value[start : start + place.numel()].as_strided(place.shape, place.stride())


def _joined(
    parameter: Tensor, found: list[tuple[dict[str, Any] | None, Tensor | None]]
) -> dict[str, Any]:
    """The inverse of `_cut` over all parts of one parameter."""
    first, place = next((kept, place) for kept, place in found if kept is not None)
    if place is None:
        return dict(first)
    joined: dict[str, Any] = {}
    for key, value in first.items():
        joined[key] = value
        if not isinstance(value, Tensor) or value.shape != place.shape:
            continue
        joined[key] = torch.zeros(parameter.shape, dtype=value.dtype)
        for kept, own in found:
            if kept is not None and own is not None:
                start = own.storage_offset() - parameter.storage_offset()
                part = joined[key][start : start + own.numel()]
                part.as_strided(own.shape, own.stride()).copy_(kept[key])
    return joined
