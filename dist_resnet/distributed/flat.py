"""A model's parameters, and all that its replicas average, each in one contiguous buffer.

One flat buffer turns the all-reduce of 65 gradients and 42 BatchNorm statistics into one collective
without buckets to fill or to rebuild (DDP makes two of this model's, and reorders them after the
first step, which breaks bitwise resume on three ranks and more), and the optimizer's loop over the
parameters into two fused updates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_resnet.distributed.counters import Counters

# Values: 64 bytes of float32, 32 of bfloat16. cuDNN's BatchNorm fails where weights or statistics
# do not begin at a multiple of 16 bytes.
_ALIGNED = 16
_LARGEST = 1e30  # a buffer that holds more, such as a mask of -inf, has no mean: a constant


@dataclass
class FlatModel:
    """Buffers that a model's tensors are views of; all float32."""

    model: nn.Module
    values: Tensor
    """(P,): parameters, the decayed ones first."""
    exchange: Tensor
    """(P + S + C + M + 2,): gradients, statistics, counts, loss, M measures, stop requests."""
    gradients: Tensor
    """(P,) of `exchange`."""
    statistics: Tensor
    """(S,) of `exchange`: the model's float32 buffers."""
    counts: Tensor
    """(C,) of `exchange`: what a replica adds to the model's integer buffers."""
    row: Tensor
    """(M + 4,): loss, measures and stop requests of `exchange`; then the gradient's norm, and 1."""
    num_decayed: int
    parameters: list[Tensor]
    """In the order of `values`; views of it, their .grad of `gradients`."""
    fillers: list[Tensor]
    """Zeros that follow each parameter, up to where the next begins; none on a CPU."""
    gradient_views: list[Tensor]
    """The parameters' .grad: views of `gradients`."""
    counters: Counters
    places: list[tuple[dict[str, Tensor | None], str, Tensor]]
    """Buffers that a forward pass may replace by other tensors: where they stand, and which."""

    loss: Tensor = field(init=False)
    stop: Tensor = field(init=False)
    norm: Tensor = field(init=False)
    """0-dimensional, of `row`. Kept, as a view costs a microsecond wherever it is made."""

    def __post_init__(self) -> None:
        self.loss, *_, self.stop, self.norm, _ = self.row.unbind()

    @property
    def num_parameters(self) -> int:
        """Of the model, frozen ones too; `values` has fillers beside those that are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that are trained."""
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def hold_buffers(self) -> None:
        """Take over what a forward pass has put in the place of a buffer."""
        for holder, name, kept in self.places:
            found = holder[name]
            if found is not kept and found is not None:
                kept.copy_(found.detach())
                holder[name] = kept

    def restore_buffers(self) -> None:
        """Put the buffers back that a forward pass, which was not to count, has replaced."""
        for holder, name, kept in self.places:
            holder[name] = kept

    def collect(self, gradients: Sequence[Tensor]) -> None:
        """Copy the parameters' gradients, given in the order of `parameters`, to `self.gradients`.

        Those of the decayed parameters may be of a lower type. On a GPU as one concatenation, or
        two: a copy for each parameter would be 65 launches.
        """
        if self.values.device.type == "cpu":
            torch._foreach_copy_(self.gradient_views, list(gradients))
            return
        rows: list[Tensor] = []
        for gradient, parameter, filler in zip(
            gradients, self.parameters, self.fillers, strict=True
        ):
            rows.append(_in_memory_order(gradient, parameter))
            if filler.numel():
                rows.append(filler.to(gradient.dtype))
        if rows[0].dtype == self.gradients.dtype:
            torch.cat(rows, out=self.gradients)
            return
        count = sum(row.dtype == rows[0].dtype for row in rows)
        self.gradients[: self.num_decayed].copy_(torch.cat(rows[:count]))
        torch.cat(rows[count:], out=self.gradients[self.num_decayed :])


def flatten_model(model: nn.Module, measures: int = 1) -> FlatModel:
    """Move `model`'s trained parameters, their gradients and its buffers into flat buffers.

    Memory layout is kept, which must be dense. Weight decay is for parameters of two dimensions and
    more: weights of convolutions and dense layers, not biases and what normalisation scales by.

    Args:
        measures: numbers beside the loss, M, that are averaged over the replicas.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2]
    counters, places = Counters(model), _places(model)
    constants = {id(buffer) for *_, buffer in places if not has_mean(buffer)}
    statistics = [
        buffer
        for buffer in model.buffers()
        if buffer.dtype == torch.float32 and id(buffer) not in constants
    ]

    parameters: list[Tensor] = [*decayed, *(p for p in trained if p.ndim < 2)]
    device = parameters[0].device
    gap = _ALIGNED if device.type == "cuda" else 1
    num_values = sum(_room(p, gap) for p in parameters)
    num_statistics = sum(_room(b, gap) for b in statistics)
    values = torch.zeros(num_values, device=device)
    size = num_values + num_statistics
    whole = torch.zeros(size + counters.size + measures + 4, device=device)
    whole[-1] = 1
    exchange = whole[:-2]

    gradients = _views(exchange, parameters, gap)
    for parameter, view, gradient in zip(
        parameters, _views(values, parameters, gap), gradients, strict=True
    ):
        parameter.data = view.copy_(parameter.data)
        parameter.grad = gradient
    for buffer, view in zip(
        statistics, _views(exchange[num_values:], statistics, gap), strict=True
    ):
        buffer.data = view.copy_(buffer)
    return FlatModel(
        model=model,
        values=values,
        exchange=exchange,
        gradients=exchange[:num_values],
        statistics=exchange[num_values:size],
        counts=exchange[size : size + counters.size],
        row=whole[size + counters.size :],
        num_decayed=sum(_room(p, gap) for p in decayed),
        fillers=[torch.zeros(_room(p, gap) - p.numel(), device=device) for p in parameters],
        parameters=parameters,
        gradient_views=gradients,
        counters=counters,
        places=places,
    )


def has_mean(buffer: Tensor) -> bool:
    """Whether the replicas average it with their gradients."""
    if buffer.dtype != torch.float32:
        return False
    return not buffer.numel() or bool(buffer.abs().max() < _LARGEST)  # false of NaN, too


def _places(model: nn.Module) -> list[tuple[dict[str, Tensor | None], str, Tensor]]:
    """Buffers of other modules than BatchNorm, which changes its own in place."""
    return [
        (module._buffers, name, buffer)
        for module in model.modules()
        if not isinstance(module, _BatchNorm)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _in_memory_order(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The values of a gradient, 1-dimensional, in the order in which its parameter's lie."""
    if gradient.stride() != parameter.stride():
        gradient = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
    return gradient.as_strided((gradient.numel(),), (1,))


def _room(tensor: Tensor, gap: int) -> int:
    """Values from where `tensor` begins to where the next one may: a multiple of `gap`."""
    return -(-tensor.numel() // gap) * gap


def _views(flat: Tensor, tensors: list[Tensor], gap: int) -> list[Tensor]:
    """One view of `flat` for each tensor, in order, with the tensor's shape and strides."""
    views, offset = [], 0
    for tensor in tensors:
        part = flat[offset : offset + tensor.numel()]
        views.append(part.as_strided(tensor.shape, tensor.stride()))
        offset += _room(tensor, gap)
    return views
