"""What only a GPU can show: capture, precision, waits, launches. `python -m tests.gpu` runs all."""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dist_resnet.captured import WARM_UP_STEPS, CapturedStep
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.ffcv_loader import FfcvLoader
from dist_resnet.data.resident_loader import ResidentLoader
from dist_resnet.data.stream import Batch
from dist_resnet.metrics import Totals
from dist_resnet.state import TrainState
from dist_resnet.step import TrainStep
from tests.training import batch_of, small_config, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 100


def _batch(number: int, replicas: int = 1) -> Batch:
    batch = batch_of(number, replicas)
    return Batch(batch.images.cuda(), batch.labels.cuda(), batch.samples.cuda())


def _step(*keys: str, dtype: torch.dtype = torch.float32, replicas: int = 1) -> TrainStep:
    config = small_config("model.widths=[16,32,64]", *keys)
    return train_step(config, replicas, dtype, torch.device("cuda"), STEPS + 10)


def _graph(*keys: str, dtype: torch.dtype = torch.float32, replicas: int = 1) -> CapturedStep:
    step = _step("train.step_mode=graph", *keys, dtype=dtype, replicas=replicas)
    return CapturedStep(step, pytest.fail)


def _train(step: TrainStep | CapturedStep, start: int, stop: int, replicas: int = 1) -> TrainState:
    for number in range(start, stop):
        step(_batch(number, replicas))
    torch.cuda.synchronize()
    return step.state


def _distance(one: TrainState, other: TrainState) -> float:
    difference = (one.flat.values - other.flat.values).norm() / one.flat.values.norm()
    return float(difference)


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("mode", ["compile", "graph"])
@pytest.mark.parametrize("keys", [(), ("train.ema_decay=0.9", "augment.cutout=4")])
def test_modes_agree_step_by_step(mode: str, keys: tuple[str, ...]) -> None:
    """From equal states, one step each: rounding only. A drift of many steps would hide more."""
    eager = _step(*keys)
    other = _graph(*keys) if mode == "graph" else _step("train.step_mode=compile", *keys)
    for number in range(20):
        saved = copy.deepcopy(eager.state.state_dict())
        _train(eager, number, number + 1)
        if number > 0:
            assert _distance(eager.state, other.state) < 2  # both are numbers
        other.state.load_state_dict(saved)
        _train(other, number, number + 1)
        assert _distance(eager.state, other.state) < 1e-5, number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_graph_trains_like_eager(dtype: torch.dtype, replicas: int) -> None:
    losses = []
    for step in (_step(dtype=dtype, replicas=replicas), _graph(dtype=dtype, replicas=replicas)):
        state = _train(step, 0, STEPS, replicas)
        assert state.totals.bad_step() is None
        assert state.step == STEPS
        losses.append(state.totals.take(Totals.EPOCH).loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_a_graph_is_continued_from_any_step() -> None:
    whole = _train(_graph(), 0, 40)
    first = _graph()
    _train(first, 0, 25)
    second = _graph()
    second.state.load_state_dict(first.state.state_dict())
    resumed = CapturedStep(second._step, pytest.fail)
    _train(resumed, 25, 40)
    assert _distance(whole, resumed.state) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_step_waits_for_the_device(dtype: torch.dtype) -> None:
    for step in (_step(dtype=dtype), _graph(dtype=dtype)):
        _train(step, 0, WARM_UP_STEPS + 2)
        batch = _batch(WARM_UP_STEPS + 2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def launches(step: TrainStep | CapturedStep, start: int) -> dict[str, float]:
    """Kernels and graphs that the host launches, and kernels that run, in a step."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        _train(step, start, start + 10)
    counts = {"cudaLaunchKernel": 0.0, "cudaGraphLaunch": 0.0, "kernels": 0.0}
    for event in profiler.key_averages():
        if event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")):
            counts["cudaLaunchKernel"] += event.count / 10
        elif event.key == "cudaGraphLaunch":
            counts["cudaGraphLaunch"] += event.count / 10
        elif event.self_device_time_total > 0:
            counts["kernels"] += event.count / 10
    return counts


def test_a_graph_is_launched_once_a_step(record_property) -> None:  # type: ignore[no-untyped-def]
    eager, graph = _step(dtype=torch.bfloat16), _graph(dtype=torch.bfloat16)
    for name, step in (("eager", eager), ("graph", graph)):
        _train(step, 0, 10)
        found = launches(step, 10)
        record_property(name, found)
        assert found["cudaGraphLaunch"] == (1 if name == "graph" else 0)
        if name == "graph":
            assert found["cudaLaunchKernel"] < 5


def test_overflow_under_fp16_is_skipped_on_the_device() -> None:
    step = _step(dtype=torch.float16)
    _train(step, 0, 3)
    assert step.state.loss_scale is not None
    step.state.loss_scale.scale.fill_(2.0**40)
    before = step.state.flat.values.clone()
    _train(step, 3, 4)
    assert torch.equal(step.state.flat.values, before)
    assert float(step.state.loss_scale.scale) == 2.0**39
    assert step.state.totals.bad_step() is None


@pytest.mark.parametrize("kind", [FfcvLoader, ResidentLoader])
def test_batches_on_the_device_are_those_of_the_host(
    kind: type[FfcvLoader] | type[ResidentLoader], tiny: Dataset
) -> None:
    import numpy as np

    order = np.random.default_rng(0).permutation(tiny.num_train)[:48].reshape(6, 8)
    host = FfcvLoader(tiny.train_path, 8, torch.device("cpu"))
    device = kind(tiny.train_path, 8, torch.device("cuda"))
    expected = [(i.clone(), t.clone()) for i, t in host.batches(order)]
    found = [(i.cpu().clone(), t.cpu().clone()) for i, t in device.batches(order)]
    for (i, t), (j, u) in zip(expected, found, strict=True):
        assert torch.equal(i, j)
        assert torch.equal(t, u)
