"""The whole step as one CUDA graph: captured once, replayed with one launch instead of hundreds."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from dist_resnet.data.stream import Batch
from dist_resnet.state import TrainState
from dist_resnet.step import TrainStep

# Compilation, cuDNN's choice of algorithms and NCCL's connections happen in steps before the
# capture, which may contain none of them. They are steps of the training like any other.
WARM_UP_STEPS = 3


class CapturedStep:
    """Does what a `TrainStep` does; the step's number is a tensor on the device.

    Its learning rate, random choices and weight of the moving average are looked up there, so that
    nothing differs between two replays but the contents of buffers.
    """

    def __init__(self, step: TrainStep, report: Callable[[str], None]) -> None:
        """`report` is told if the capture fails; the steps then run without a graph."""
        self._step = step
        self._report = report
        device = step.device
        self._position = torch.tensor([step.state.step], device=device)
        self._rates = torch.tensor(step.rates, dtype=torch.float32, device=device)
        weights = [step.ema_weight(number) for number in range(len(step.rates))]
        self._ema_weights = torch.tensor(weights, dtype=torch.float32, device=device)
        self._batch: Batch | None = None
        self._calls = 0
        self._run: Callable[[], None] | None = None

    @property
    def state(self) -> TrainState:
        return self._step.state

    @property
    def rates(self) -> Sequence[float]:
        return self._step.rates

    def __call__(self, batch: Batch) -> None:
        """Train on `batch`, which must be that of step `state.step`."""
        self._step.pass_on_signals()
        self._hold(batch)
        self._calls += 1
        if self._calls <= WARM_UP_STEPS:
            warm_up(self._launch)
        else:
            self._run = self._run or self._captured()
            self._run()
        self.state.step += 1

    def _hold(self, batch: Batch) -> None:
        """Copy the batch to where the graph reads it."""
        if self._batch is None:
            self._batch = Batch(*(torch.empty_like(t) for t in _tensors(batch)))
        for held, new in zip(_tensors(self._batch), _tensors(batch), strict=True):
            held.copy_(new, non_blocking=True)

    def _launch(self) -> None:
        assert self._batch is not None
        key, lr, weight = (
            table.index_select(0, self._position).squeeze(0)
            for table in (self._step.keys, self._rates, self._ema_weights)
        )
        self._step.advance(self._batch, key, lr, weight)
        self._position += 1

    def _captured(self) -> Callable[[], None]:
        """What replays the step, or runs it operation by operation where a capture fails."""
        try:
            return capture(self._launch)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            self._report(f"train.step_mode=graph: no graph, steps run one by one: {reason}")
            return self._launch


def as_configured(step: TrainStep, report: Callable[[str], None]) -> TrainStep | CapturedStep:
    """`step`, captured if its train.step_mode says graph; `report` as for `CapturedStep`."""
    return CapturedStep(step, report) if step.config.train.step_mode == "graph" else step


def warm_up(action: Callable[[], None]) -> None:
    """Run `action` on the stream that is captured later: autograd remembers where it was used."""
    current, side = torch.cuda.current_stream(), side_stream(torch.cuda.current_device())
    side.wait_stream(current)
    with torch.cuda.stream(side):
        action()
    current.wait_stream(side)


@cache
def side_stream(device: int) -> torch.cuda.Stream:
    """One for all: memory that a stream has freed is kept for that stream."""
    return torch.cuda.Stream(device)


def capture(action: Callable[[], None]) -> Callable[[], None]:
    """What repeats the device work of `action`, which is recorded and not executed.

    Raises:
        RuntimeError: it does something that a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    current, side = torch.cuda.current_stream(), side_stream(torch.cuda.current_device())
    try:
        # The loader's thread goes on allocating and copying: only this thread is watched for misuse.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            action()
    except RuntimeError:
        torch.cuda.set_stream(current)  # an invalidated capture leaves the side stream current
        raise
    return graph.replay


def _tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.images, batch.labels, batch.samples
