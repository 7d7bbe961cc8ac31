"""Whether a net of the user's own keeps the contract of a model: tried out once, before training.

The contract: `forward(images)`, float32 (N, 3, H, W), gives logits, floating (N, K); what a forward
pass changes is in the state_dict, and its random choices are of torch's default generators.

Everything is tried on a second net, built alike and then thrown away: the first one stays as it is.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_resnet.config.plugins import is_plugin
from dist_resnet.config.schema import Config
from dist_resnet.models.build import build_model, freeze, in_layout
from dist_resnet.models.noted import same_bits
from dist_resnet.models.trial import Trial, broken

_IMAGES = 4  # of a replica in the trial, or as many as it has


@dataclass(frozen=True)
class Traits:
    """What a step must know of a net."""

    draws: bool = False
    """Whether training draws from torch's default generators."""
    alone: str = ""
    """Why replicas cannot be side by side in one batch; empty: they can."""
    draws_on_cpu: bool = False
    """Whether it draws from the CPU's generator, wherever it runs."""


def checked_model(
    config: Config,
    classes: int,
    image_size: tuple[int, int] | None,
    precision: torch.dtype,
    device: torch.device,
) -> tuple[nn.Module, Traits]:
    """The configured net on `device`, with its frozen parameters, and what it was found to do.

    Args:
        image_size: (height, width); needed for nets of the user's own only.

    Raises:
        UserError: one line that says what breaks the contract, and what to change.
    """
    channels_last = config.precision.channels_last

    def build() -> nn.Module:
        return build_model(config.model, classes, config.seed)

    model, traits, name = build(), Traits(), config.model.name
    if is_plugin(name):
        assert image_size is not None
        check_tensors(name, model)
        twin = build()
        _check_twin(name, model, twin)
        count = min(_IMAGES, config.data.batch_size_per_replica)
        height, width = image_size
        images = torch.randn(
            2 * count, 3, height, width, generator=torch.Generator().manual_seed(0)
        )
        layout = torch.channels_last if channels_last else torch.contiguous_format
        images = images.to(device).contiguous(memory_format=layout)
        trial = Trial(name, in_layout(twin.to(device), channels_last), images, classes, precision)
        traits = Traits(*trial.run())
    freeze(model, config.optim.freeze)
    # A part that its maker left in evaluation mode would leave it at the first evaluation.
    model.train()
    return in_layout(model.to(device), channels_last), traits


def check_tensors(name: str, model: nn.Module) -> None:
    """Parameters and buffers that a training can change, average and save.

    Raises:
        UserError: naming the first that is not.
    """
    for key, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise broken(
                name,
                f"{key} is a SyncBatchNorm; statistics are those of a replica, whatever the number "
                "of processes: use BatchNorm2d and a larger data.batch_size_per_replica",
            )
    for key, tensor in _tensors(model).items():
        if nn.parameter.is_lazy(tensor):
            raise broken(name, f"{key} is not initialised; give its module its sizes")
        if tensor.is_meta:
            raise broken(name, f"{key} is on the device meta, without values; build it whole")
    for key, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise broken(
                name,
                f"{key} is of type {kind}; parameters must be float32: "
                "precision.dtype decides what is computed in",
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        has = "no parameter that requires a gradient" if [*model.parameters()] else "no parameters"
        raise broken(name, f"has {has}; there is nothing to train")
    _check_sharing(name, model)
    _check_saved(name, model)


def _check_sharing(name: str, model: nn.Module) -> None:
    """Tied weights are one Parameter under two names; two in one memory would be torn apart."""
    places: list[tuple[int, int, str]] = []
    for key, tensor in _tensors(model).items():
        if tensor.numel():
            start = tensor.data_ptr()
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            places.append((start, start + (reach + 1) * tensor.element_size(), key))
    places.sort()
    for (_, end, one), (start, _, other) in itertools.pairwise(places):
        if start < end:
            raise broken(
                name,
                f"{one} and {other} share memory but are two tensors; to tie weights, "
                "make both names the same Parameter",
            )


def _check_saved(name: str, model: nn.Module) -> None:
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for key, value in model.state_dict().items():
        own = tensors.get(key)
        if own is None or not isinstance(value, Tensor) or value.data_ptr() != own.data_ptr():
            raise broken(
                name,
                f"{key} of its state_dict is neither a parameter nor a buffer; keep what "
                "training changes in these",
            )


def _check_twin(name: str, model: nn.Module, twin: nn.Module) -> None:
    """Built again, the net has the same values in other memory."""
    one, two = _tensors(model), _tensors(twin)
    if {k: t.shape for k, t in one.items()} != {k: t.shape for k, t in two.items()}:
        raise broken(name, "built twice, it has other parameters; it must not change")
    for key, tensor in one.items():
        other = two[key]
        if tensor.numel() and tensor.data_ptr() == other.data_ptr():
            raise broken(name, f"gave the same {key} twice; it must build a new net each time")
        if not same_bits(tensor, other):
            raise broken(
                name,
                f"{key} starts otherwise when built again; draw initial values from "
                "torch's default generator, which is set from the seed",
            )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
