"""A trial of the augmentations that a user brings, before a run depends on them."""

import inspect

import torch
from torch import Tensor

from dist_resnet.augment.named import KEY, Named, extras
from dist_resnet.augment.normalisation import Normalisation
from dist_resnet.base.errors import UserError
from dist_resnet.base.generators import all_states
from dist_resnet.config.plugins import calling, check_arguments, signature
from dist_resnet.config.schema import AugmentConfig

_IMAGES = 8


def try_extras(
    config: AugmentConfig, image_size: tuple[int, int], statistics: Normalisation
) -> None:
    """Call each of augment.extra, which `check_signatures` has found, twice on a small batch.

    Raises:
        UserError: one cannot be called, alters its images' shape or type, or is not a pure
            function of images and draws.
    """
    for named in extras(config):
        fault = _fault(named, image_size, statistics)
        if fault is not None:
            raise UserError(f"{KEY}={named.name}: {fault}")


def check_signatures(config: AugmentConfig) -> None:
    """Hold the arguments of augment.extra against what each takes.

    Raises:
        UserError: one cannot be found, or does not take its arguments.
    """
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for named in extras(config):
        what, lanes = f"{KEY}={named.name}", named.lanes
        if not isinstance(lanes, int) or isinstance(lanes, bool) or not 0 <= lanes <= 4096:
            raise UserError(f"{what}: its lanes={lanes!r} must be 0 to 4096")
        parameters = signature(named.function)
        if parameters is None:
            continue
        positional = [name for name, p in parameters.items() if p.kind in by_place]
        spread = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
        if len(positional) < 2 and not spread:
            raise UserError(f"{what}: must take (images, draws), then arguments of its own")
        given = (*positional[:2], "statistics")
        check_arguments(f"{KEY}.args", named.function, named.args, given)


def _fault(named: Named, size: tuple[int, int], statistics: Normalisation) -> str | None:
    """What is wrong with a result, for the reader."""
    device = statistics.mean.device
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, 3, *size, generator=generator).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    draws = torch.rand(_IMAGES, named.lanes, generator=generator).to(device)
    function = named.bound(statistics)

    def call() -> object:
        with calling(KEY, named.name):
            return function(images.clone(), draws.clone())  # which it may write into

    before, first = all_states(device), call()
    for name, state in all_states(device).items():
        if state != before[name]:
            return f"draws from {name}; use its second argument, draws, instead"
    if not isinstance(first, Tensor):
        return f"returned a {type(first).__name__}, must return a tensor of images"
    for what, found, wanted in (
        ("shape", tuple(first.shape), tuple(images.shape)),
        ("type", first.dtype, images.dtype),
        ("device", first.device, images.device),
    ):
        if found != wanted:
            return f"returned images of {what} {found} for {wanted}; must keep it"
    if not bool(torch.isfinite(first).all()):
        return "returned values that are not finite"
    second = call()
    if not (isinstance(second, Tensor) and torch.equal(first, second)):
        return "returned other images for the same images and draws; must depend on nothing else"
    return None
