"""The whole step as one CUDA graph: captured once, replayed with one launch instead of hundreds."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dist_resnet.base.errors import first_line, is_of_gpu_memory
from dist_resnet.data.stream import Batch
from dist_resnet.distributed.group import gather_objects
from dist_resnet.step.cuda_graph import capture, free, warm_up
from dist_resnet.step.train_step import TrainStep
from dist_resnet.step.update import clip

# Compilation, cuDNN's choice of algorithms and NCCL's connections happen in steps before the
# capture, which may contain none of them. They are steps of the training like any other.
WARM_UP_STEPS = 3
# Replays that are compared with PyTorch's operations before the graph is trusted.
CHECKED_STEPS = 3
# Largest relative differences of gradient, statistics and loss. Two right ways to compute in
# bfloat16 differ by 0.26 in the gradient of 8 random images and by 0.20 in that of 32, in float32
# by up to 0.005 (measured on a CPU).
_LIMITS = {torch.float32: 0.05, torch.bfloat16: 0.6, torch.float16: 0.6}


class CapturedStep:
    """Does what a `TrainStep` does; the step's number is a tensor on the device.

    Its learning rate, random choices and weight of the moving average are looked up there, so that
    nothing differs between two replays but the contents of buffers. The first replays are compared
    with PyTorch's operations on the same batch; if they differ, or if any rank cannot capture its
    step, all ranks go on without a graph.
    """

    def __init__(self, step: TrainStep, report: Callable[[str], None]) -> None:
        """`report` is told if the steps run without a graph, and why."""
        self._step = step
        self._report = report
        self.state, self.rates = step.state, step.rates
        device = step.device
        self._position = torch.tensor([step.state.step], device=device)
        self._steps = _table(step)
        self._batch: Batch | None = None
        self._calls = 0
        self._run: Callable[[], None] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> None:
        """Train on `batch`, which must be that of step `state.step`."""
        self._step.pass_on_signals()
        self._hold(batch)
        self._calls += 1
        if self._calls <= WARM_UP_STEPS:
            warm_up(self._launch)
        elif self._run is not None:
            self._step.set_generators(0)
            self._run()
        else:
            self._replay_checked()
        self.state.step += 1

    def close(self) -> None:
        """Give the graph up, before the process group: NCCL waits for graphs that refer to it."""
        if self._graph is not None:
            free(self._graph)
        self._graph, self._run = None, self._launch

    def _hold(self, batch: Batch) -> None:
        """Copy the batch to where the graph reads it."""
        if self._batch is None:
            self._batch = Batch(*(torch.empty_like(t) for t in _tensors(batch)))
        for held, new in zip(_tensors(self._batch), _tensors(batch), strict=True):
            held.copy_(new, non_blocking=True)

    def _launch(self) -> None:
        assert self._batch is not None
        key, turn, lr, ema_weight = self._now()
        self._step.advance(self._batch, key, lr, ema_weight, turn)
        self._position += 1

    def _now(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Key, turn, learning rate and weight of the average of this step."""
        row = self._steps.index_select(0, self._position)[0]
        key, turn = row[:2].unbind()
        lr, ema_weight = row[2:].view(torch.float32).unbind()
        return key, None if self._step.turns is None else turn, lr, ema_weight

    def _replay_checked(self) -> None:
        """One step by the graph, captured now if there is none, and by PyTorch's operations."""
        if self._graph is None and not self._capture():
            return
        assert self._graph is not None
        assert self._batch is not None
        tensors = [*self.state.tensors(), self._position]
        before = [tensor.clone() for tensor in tensors]
        expected = self._by_torch()
        _restore(tensors, before)
        self._step.set_generators(0)
        self._graph.replay()
        wrong = self._differs(expected) if expected is not None else None
        if not any(gather_objects(wrong is not None)):
            if expected is None or self._calls == WARM_UP_STEPS + CHECKED_STEPS:
                self._run = self._graph.replay
                torch.cuda.empty_cache()  # PyTorch's operations come no more
            return
        _restore(tensors, before)
        self.close()
        self._report(
            f"train.step_mode=graph: {wrong or 'another rank'} differs from PyTorch's operations;"
            " steps run one by one by these"
        )
        self._run = self._launch_by_torch
        self._run()

    def _by_torch(self) -> Tensor | None:
        """The means of this step as PyTorch's operations find them.

        None on all ranks where one has no memory for them beside the graph, which keeps its own.
        """
        step, scaling, batch = self._step, self.state.loss_scale, self._batch
        assert batch is not None
        key, turn, *_ = self._now()
        short = False
        with step.by_torch():
            try:
                warm_up(lambda: step.sum_over_local(batch, key, turn))
            except RuntimeError as error:
                if not is_of_gpu_memory(error):
                    raise
                short = True
            if any(gather_objects(short)):
                step.forget()
                self._report(
                    "train.step_mode=graph: not compared with PyTorch's operations, for which"
                    " there is no memory beside it"
                )
                return None
            warm_up(step.finish_average)
        expected = self.state.flat.exchange.clone()
        if scaling is not None:
            expected[: self.state.flat.gradients.numel()] /= scaling.scale
        return expected

    def _launch_by_torch(self) -> None:
        with self._step.by_torch():
            self._launch()

    def _differs(self, expected: Tensor) -> str | None:
        """What of the last step's means is not what PyTorch found. Waits for the device."""
        flat, limit = self.state.flat, _LIMITS[self._step.precision]
        size = flat.gradients.numel()
        end = size + flat.statistics.numel()
        if self.state.loss_scale is not None and not bool(flat.gradients.isfinite().all()):
            return None  # an overflow, which need not be one of PyTorch's: a skipped step
        norm = torch.linalg.vector_norm(expected[:size])
        clip(expected[:size], norm, self._step.config.optim.clip_norm)
        parts = {
            "the gradient": (flat.gradients, expected[:size]),
            "the gradient's norm": (flat.norm, norm),  # of which clipping leaves no trace
            "a BatchNorm statistic": (flat.statistics, expected[size:end]),
            "the loss": (flat.loss, expected[end + flat.counts.numel()]),
        }
        for name, (found, wanted) in parts.items():
            error, scale = (found - wanted).norm(), wanted.norm()
            if bool(torch.isfinite(scale)) and not bool(error <= limit * scale + 1e-6):
                return name
        return None

    def _capture(self) -> bool:
        """Capture the step on all ranks; if one cannot, run this and all further ones without."""
        reason = None
        try:
            self._graph = capture(self._launch)
        except RuntimeError as error:
            reason = first_line(error)
        reasons = [text for text in gather_objects(reason) if text]
        if not reasons:
            return True
        self.close()
        self._step.forget()
        self._report(f"train.step_mode=graph: no graph, steps run one by one: {reasons[0]}")
        self._launch()
        return False


def as_configured(step: TrainStep, report: Callable[[str], None]) -> TrainStep | CapturedStep:
    """`step`, captured if its train.step_mode says graph; `report` as for `CapturedStep`.

    A graph draws from where the GPU's generator stands when it is replayed: for one replica.
    """
    if step.reduction.remark:
        report(step.reduction.remark)
    if step.config.train.step_mode != "graph":
        return step
    optimizer = step.state.optimizer
    reason = ""
    if not optimizer.capturable:
        reason = f"optim.name={optimizer.name} has no argument capturable"
    if step.state.traits.draws and step.local > 1:
        reason = f"the net draws random numbers and there are {step.local} replicas on a rank"
    if step.state.traits.draws_on_cpu and step.device.type == "cuda":
        reason = "the net draws random numbers on the CPU, which a graph would repeat"
    if reason:
        report(f"train.step_mode=graph: no graph, steps run one by one: {reason}")
        return step
    return CapturedStep(step, report)


def _table(step: TrainStep) -> Tensor:
    """int64 (steps, 3): key, turn, and learning rate and weight of the average as 2 float32.

    One table, since each look-up is a kernel of the graph.
    """
    weights = map(step.ema_weight, range(len(step.rates)))
    pairs = [*zip(step.rates, weights, strict=True)]
    numbers = torch.tensor(pairs, dtype=torch.float32, device=step.device)
    turns = torch.zeros_like(step.keys) if step.turns is None else step.turns
    return torch.stack([step.keys, turns, numbers.view(torch.int64)[:, 0]], dim=1)


def _restore(tensors: Sequence[Tensor], contents: Sequence[Tensor]) -> None:
    for tensor, content in zip(tensors, contents, strict=True):
        tensor.copy_(content)


def _tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.images, batch.labels, batch.samples
