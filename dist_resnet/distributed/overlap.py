"""The sum of a large model's gradients over the ranks, in chunks, while the backward pass goes on.

Chunks are whole parameters under weight decay: nearly all of a model, and the ones whose gradients
arrive from the last layer to the first. They are sent in that order, the same on every rank,
each when it and all before it are complete. The rest follows after the backward pass.
"""

from collections.abc import Callable

from torch import Tensor

from dist_resnet.base.errors import UserError
from dist_resnet.distributed.flat import FlatModel
from dist_resnet.distributed.group import start_sum

# Bytes. Below, one sum is cheaper than what it would take to hide it.
LARGE = 4 * 2**20
CHUNK = 4 * 2**20


class OverlappedSum:
    """Sums a buffer laid out as `FlatModel.exchange`, float32 or float64, over the ranks."""

    def __init__(self, flat: FlatModel) -> None:
        self._chunks = _chunks(flat)
        self._of = {
            parameter: number
            for number, (_, parameters) in enumerate(self._chunks)
            for parameter in parameters
        }
        self._missing: list[set[Tensor]] = []
        self._sent = len(self._chunks)
        self._ready: Callable[[slice], Tensor] | None = None
        self._waits: list[Callable[[], None]] = []
        for parameter in self._of:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def __len__(self) -> int:
        """The number of chunks, the rest included."""
        return len(self._chunks) + 1

    @property
    def expecting(self) -> bool:
        """Whether the last pass's gradients are on their way."""
        return self._ready is not None

    def expect(self, ready: Callable[[slice], Tensor]) -> None:
        """The next backward pass leaves gradients that are final.

        Args:
            ready: gives what is to be summed of a part whose gradients have arrived.
        """
        self._missing = [set(parameters) for _, parameters in self._chunks]
        self._sent, self._ready = 0, ready

    def finish(self, size: int) -> None:
        """Send what is left, up to `size`, and wait for all of it."""
        assert self._ready is not None
        while self._sent < len(self._chunks):
            self._send(self._chunks[self._sent][0])
        rest = max((part.stop for part, _ in self._chunks), default=0)
        self._waits.append(start_sum(self._ready(slice(rest, size))))
        self._ready = None
        for wait in self._waits:
            wait()
        self._waits.clear()

    def _arrived(self, parameter: Tensor) -> None:
        if self._ready is None:
            return
        missing = self._missing[self._of[parameter]]
        if parameter not in missing:
            raise UserError(
                f"a parameter of shape {list(parameter.shape)} gets its gradient in parts, as from "
                "checkpoint(use_reentrant=True); use use_reentrant=False"
            )
        missing.remove(parameter)
        while self._sent < len(self._chunks) and not self._missing[self._sent]:
            self._send(self._chunks[self._sent][0])

    def _send(self, part: slice) -> None:
        assert self._ready is not None
        self._sent += 1
        self._waits.append(start_sum(self._ready(part)))


def _chunks(flat: FlatModel) -> list[tuple[slice, list[Tensor]]]:
    """Parts of the decayed gradients and their parameters, the last ones first."""
    decayed = [p for p in flat.parameters if p.storage_offset() < flat.num_decayed]
    found: list[tuple[slice, list[Tensor]]] = []
    stop, members = flat.num_decayed, []
    for parameter in reversed(decayed):
        members.append(parameter)
        start = int(parameter.storage_offset())
        if (stop - start) * flat.exchange.itemsize >= CHUNK or parameter is decayed[0]:
            found.append((slice(start, stop), members))
            stop, members = start, []
    return found
