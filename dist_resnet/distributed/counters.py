"""Integer buffers of a model, such as BatchNorm's counter: what its replicas add to them, averaged.

Every replica of a step starts from the same values. Afterwards each is the value it had, and the
mean over the replicas of what was added, rounded: a counter that all of them move alike is exact,
up to 2^24 in a step.
"""

import torch
from torch import Tensor, nn

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Counters:
    """One tensor for each integer type, of which the model's buffers are made views."""

    def __init__(self, model: nn.Module) -> None:
        self.values: list[Tensor] = []
        """The flat tensors."""
        for dtype in INTEGERS:
            buffers = [b for b in model.buffers() if b.dtype == dtype]
            if not buffers:
                continue
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            parts = flat.split([buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.data = part.view(buffer.shape)
            self.values.append(flat)
        self._starts = [flat.clone() for flat in self.values]
        self.size = sum(flat.numel() for flat in self.values)

    def note(self) -> None:
        """Remember the values at a step's start."""
        for start, flat in zip(self._starts, self.values, strict=True):
            start.copy_(flat)

    def restart(self) -> None:
        """Return to them, before each further replica."""
        for start, flat in zip(self._starts, self.values, strict=True):
            flat.copy_(start)

    def put(self, moved: Tensor) -> None:
        """Write what a replica added to `moved`, float32 (C,)."""
        if self.size:
            pairs = zip(self._starts, self.values, strict=True)
            moved.copy_(torch.cat([flat.long() - start.long() for start, flat in pairs]))

    def finish(self, moved: Tensor) -> None:
        """Set the values that follow from the mean of what the replicas added."""
        offset = 0
        for start, flat in zip(self._starts, self.values, strict=True):
            mean = moved[offset : offset + flat.numel()].round().long()
            flat.copy_(start.long() + mean)
            offset += flat.numel()
