"""A trial step of an optimizer that a user brings, before a run depends on it."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_resnet.base.errors import UserError
from dist_resnet.base.generators import all_states
from dist_resnet.config.plugins import calling, signature
from dist_resnet.models.noted import digest
from dist_resnet.optim.plain_values import plain
from dist_resnet.optim.saved import not_saved

KEY = "optim.name"


def try_out(
    name: str,
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    groups: list[dict[str, Any]],
) -> None:
    """One step on copies of the parameters, so that what cannot work is refused at the start.

    Raises:
        UserError: it raises, draws random numbers, puts other tensors in place of parameters or
            gradients, or keeps what no checkpoint can hold.
    """
    copies = [group | {"params": [_copy(p) for p in group["params"]]} for group in groups]
    parameters = [p for group in copies for p in group["params"]]
    stood = all_states(parameters[0].device)
    optimizer = make(copies)
    refuse_closure(name, optimizer)
    known = _known(optimizer)
    before = {key: digest(value, known) for key, value in not_saved(optimizer).items()}
    places = [_place(p) for p in parameters]
    with calling(KEY, name):
        optimizer.step()
    if fault := _moved(places, [_place(p) for p in parameters]):
        raise UserError(f"{KEY}={name}: {fault}")
    for generator, state in all_states(parameters[0].device).items():
        if state != stood[generator]:
            raise UserError(
                f"{KEY}={name}: draws from {generator}, which no checkpoint holds; an update must "
                "follow from the gradients and the optimizer's state alone"
            )
    kept = optimizer.state_dict()
    plain([kept["state"], kept["param_groups"]])
    for key, value in not_saved(optimizer).items():
        if key not in before or digest(value, known) != before[key]:
            kind = type(value).__name__
            raise UserError(
                f"{KEY}={name}: its step changes its attribute {key} ({kind}), which "
                "no checkpoint can hold; keep numbers, texts, tensors, and lists or dicts of these"
            )


def refuse_closure(name: str, optimizer: Any) -> None:
    """`optimizer`: one, its class, or whatever else makes one."""
    step = signature(optimizer.step) if hasattr(optimizer, "step") else None
    closure = (step or {}).get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"{KEY}={name}: its step() needs a closure, which computes the loss again; choose one "
            "that does without"
        )


def _copy(parameter: Tensor) -> torch.nn.Parameter:
    copy = torch.nn.Parameter(parameter.detach().clone())
    copy.grad = copy.detach().clone()
    return copy


def _place(parameter: Tensor) -> tuple[int, int | None]:
    """The addresses of the values and of the gradient."""
    gradient = parameter.grad
    return parameter.data_ptr(), None if gradient is None else gradient.data_ptr()


def _moved(before: list[tuple[int, int | None]], after: list[tuple[int, int | None]]) -> str | None:
    """What is wrong with where parameters and gradients lie after a step, for the reader."""
    for (values, gradient), (new_values, new_gradient) in zip(before, after, strict=True):
        if new_values != values:
            return "puts another tensor in a parameter's place; write into it, as by p.add_(...)"
        if new_gradient != gradient:
            return "puts another tensor, or None, in the place of a p.grad; leave p.grad as it is"
    return None


def _known(optimizer: torch.optim.Optimizer) -> set[int]:
    """Of what is saved or set by the training anyway, wherever else it is held."""
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    return {*map(id, (optimizer, optimizer.state, groups, *groups, *parameters, *gradients))}
