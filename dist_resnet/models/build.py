"""The one door to models: the built-in nets, and those that the configuration names otherwise."""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_resnet.base.errors import UserError
from dist_resnet.base.generators import seeded
from dist_resnet.base.randomness import Stream, stream_key
from dist_resnet.config.builtins import MODELS
from dist_resnet.config.keys import nearest
from dist_resnet.config.plugins import (
    calling,
    check_arguments,
    is_plugin,
    resolve,
    signature,
    takes_any,
)
from dist_resnet.config.schema import ModelConfig

# What libraries call the number of classes.
_CLASSES = ("num_classes", "n_classes", "classes", "num_labels", "nclass")


def build_model(config: ModelConfig, classes: int, seed: int = 0) -> nn.Module:
    """The configured net on the CPU, its weights a function of the configuration and `seed`.

    Raises:
        UserError: there is no such net, or it cannot be built with these arguments.
    """
    if is_plugin(config.name):
        model = _own(config, classes, seed)
    else:
        model = resolve("model.name", MODELS[config.name])(config, classes, seed)
    if config.bn_momentum is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = config.bn_momentum
    return model


def in_layout(model: nn.Module, channels_last: bool) -> nn.Module:
    """`model` with its 4-dimensional tensors in this memory layout, and all dense; in place.

    `Module.to` refuses channels_last for nets that have tensors of 5 dimensions, too.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)
        elif not torch.ops.aten.is_non_overlapping_and_dense(tensor):  # such as an expanded one
            tensor.data = tensor.data.contiguous()
    return model


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude the parameters whose names match one of `patterns` from the training.

    Raises:
        UserError: a pattern that matches none, or nothing is left.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        found = [name for name in parameters if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            hint = nearest(pattern, list(parameters)) or next(iter(parameters))
            raise UserError(f"optim.freeze={pattern}: matches no parameter; there is {hint}")
        for name in found:
            parameters[name].requires_grad_(False)
    if patterns and not any(p.requires_grad for p in parameters.values()):
        raise UserError(f"optim.freeze={','.join(patterns)}: no parameter is left to train")


def callable_of(config: ModelConfig) -> tuple[Callable[..., Any], str | None]:
    """What makes a net of the user's own, and the name by which it takes the number of classes.

    Raises:
        UserError: there is no such callable, or it does not take model.args.
    """
    function = resolve("model.name", config.name)
    parameters = signature(function)
    named = [name for name in _CLASSES if parameters is not None and name in parameters]
    if not named and (parameters is None or takes_any(parameters)):
        named = [_CLASSES[0]]
    check_arguments("model.args", function, config.args, named[:1])
    return function, named[0] if named else None


def _own(config: ModelConfig, classes: int, seed: int) -> nn.Module:
    function, name = callable_of(config)
    given = {} if name is None else {name: classes}
    key = int(stream_key(seed, Stream.INIT))
    with seeded(key), calling("model.name", config.name):
        model = function(**config.args, **given)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model.name={config.name}: gave a {type(model).__name__}; it must return a "
            "torch.nn.Module"
        )
    return model
