"""What only a GPU can show: capture, precision, waits, launches. `python -m tests.gpu` runs all."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dist_resnet.augment import ChoiceDrawer, Normalisation
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.stream import Batch
from dist_resnet.models.norm_act import NormAct
from dist_resnet.step.captured import WARM_UP_STEPS, CapturedStep
from dist_resnet.step.replica_pass import KernelPass, TorchPass
from dist_resnet.step.state import TrainState
from dist_resnet.step.totals import Totals
from dist_resnet.step.train_step import TrainStep
from tests.helpers.training import batch_of, own_config, small_config, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # torch's own, under newer versions of Python
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
def exact_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def _reference(*keys: str, replicas: int = 1) -> TrainStep:
    """By torch's operations alone, one replica after the other, in float32."""
    step = _step("train.step_mode=eager", *keys, replicas=replicas)
    kernels = step.replica_pass
    assert isinstance(kernels, KernelPass)
    step.replica_pass = kernels.by_torch()
    return step


MODES = ("graph", "fused", "compile")
RECIPES = {
    "recipe": (),
    "average": ("train.ema_decay=0.9", "augment.cutout=4", "optim.label_smoothing=0.1"),
    "no mixup": ("augment.mixup_alpha=0", "model.dropout=0", "optim.nesterov=true"),
    "muon": ("optim.name=muon",),
}


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_modes_agree_step_by_step(mode: str, recipe: str, replicas: int) -> None:
    """From equal states, one step each: rounding only. A drift of many steps would hide more."""
    keys = RECIPES[recipe]
    if mode == "compile" and recipe != "recipe":
        pytest.skip("compiled once is enough: it takes a minute")
    reference = _reference(*keys, replicas=replicas)
    other = (
        _graph(*keys, replicas=replicas)
        if mode == "graph"
        else _step(f"train.step_mode={mode}", *keys, replicas=replicas)
    )
    for number in range(8):
        saved = reference.state.snapshot()
        _train(reference, number, number + 1, replicas)
        other.state.restore(saved)
        _train(other, number, number + 1, replicas)
        assert _distance(reference.state, other.state) < 2e-5, number
        for name in ("statistics", "row"):
            expected = getattr(reference.state.flat, name)
            found = getattr(other.state.flat, name)
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [16, 24, 64])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("replicas", [1, 4])
def test_norm_act(dtype: torch.dtype, channels: int, add: bool, replicas: int) -> None:
    """The kernels against torch's operations in float32, forward and backward."""
    from dist_resnet.kernels.norm_act import norm_act

    torch.manual_seed(0)
    shape = (16, channels, 32, 32)
    tensors = [3 * torch.randn(shape, device="cuda") + 5 for _ in range(2 + add)]
    x, dy, *rest = [t.to(dtype).to(memory_format=torch.channels_last) for t in tensors]
    results = []
    for kernel in (True, False):
        norm = NormAct(channels).cuda()
        norm.replicas = replicas
        own, *shortcuts = [
            (t if kernel else t.float()).clone().requires_grad_() for t in (x, *rest)
        ]
        shortcut = shortcuts[0] if add else None
        y = norm_act(norm, own, shortcut, True, replicas) if kernel else norm(own, shortcut)
        y.backward(dy.to(y.dtype))
        leaves = [own, *shortcuts, norm.weight, norm.bias]
        results.append([y, *[leaf.grad for leaf in leaves], norm.running_mean, norm.running_var])
    limit = 2e-5 if dtype == torch.float32 else 6e-3
    for found, expected in zip(*results, strict=True):
        distance = (found.float() - expected.float()).norm() / expected.float().norm()
        assert distance < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("count", "channels", "filters", "side", "stride"),
    [
        (32, 3, 16, 32, 1), (32, 16, 16, 32, 1), (32, 16, 32, 32, 2), (32, 64, 64, 8, 1),
        (256, 64, 64, 8, 1), (1024, 16, 16, 32, 1), (32, 128, 128, 8, 1),
    ],
)  # fmt: skip
def test_gradients_of_a_convolution(
    dtype: torch.dtype, count: int, channels: int, filters: int, side: int, stride: int
) -> None:
    """One launch and two, one tile a program and several, against torch in float32."""
    from dist_resnet.kernels import conv

    torch.manual_seed(0)
    shapes = (count, channels, side, side), (count, filters, side // stride, side // stride)
    tensors = [torch.randn(s, device="cuda") for s in (*shapes, (filters, channels, 3, 3))]
    x, dz, weight = (t.to(dtype).to(memory_format=torch.channels_last) for t in tensors)
    added = torch.randn_like(x)
    found = conv.gradients(dz, weight, x, stride, added, True)
    leaves = [t.float().requires_grad_() for t in (x, weight)]
    y = torch.nn.functional.conv2d(*leaves, stride=stride, padding=1)
    dx, dw = torch.autograd.grad(y, leaves, dz.float())
    for one, other in zip(found, (dx + added.float(), dw), strict=True):
        assert one is not None
        assert (one.float() - other).norm() / other.norm() < 6e-3


@pytest.mark.parametrize("replicas", [1, 3])
def test_choices_and_images_are_the_cpus(replicas: int) -> None:
    step = _step("augment.cutout=5", replicas=replicas)
    batch = _batch(3, replicas)
    kernels = step.replica_pass
    assert isinstance(kernels, KernelPass)
    host = TorchPass(
        kernels.config, 0.0, replace_device(kernels.draw), on_cpu(kernels.statistics), replicas,
        kernels.precision,
    )  # fmt: skip
    made, choices = kernels.inputs(batch.images, batch.samples, step.keys[3])
    expected, chosen = host.inputs(batch.images.cpu(), batch.samples.cpu(), step.keys[3].cpu())
    torch.testing.assert_close(made.cpu(), expected, rtol=1e-6, atol=1e-6)
    assert choices.keep is not None
    assert chosen.keep is not None
    assert torch.equal(choices.keep.cpu(), chosen.keep)


EVERYTHING = (
    "augment.padding_mode=reflect", "augment.flip=alternating", "augment.trivial=true",
    "augment.jitter=0.3", "augment.erasing=0.5", "augment.mix=both", "augment.cutout=4",
)  # fmt: skip


def test_all_other_augmentations_are_the_cpus() -> None:
    ours, theirs = _step(*EVERYTHING, replicas=2), train_step(small_config(*EVERYTHING), 2)
    for number in range(11, 15):  # two epochs
        batch, same = _batch(number, 2), batch_of(number, 2)
        key, turn = ours.keys[number], ours.turn(number)
        made, _ = ours.replica_pass.inputs(batch.images, batch.samples, key, turn)
        key, turn = theirs.keys[number], theirs.turn(number)
        expected, _ = theirs.replica_pass.inputs(same.images, same.samples, key, turn)
        torch.testing.assert_close(made.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_all_other_augmentations_are_captured() -> None:
    states = [_train(make(*EVERYTHING), 0, 20) for make in (_step, _graph)]
    assert _distance(*states) < 0.01


def test_an_augmentation_that_waits_runs_without_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_waits.py").write_text(
        "def wait(images, draws):\n    return images * float(draws.mean())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    told: list[str] = []
    step = _step("train.step_mode=graph", "augment.extra=['own_waits:wait']")
    state = _train(CapturedStep(step, told.append), 0, 10)
    assert "no graph" in told[0]
    assert bool(torch.isfinite(state.flat.values).all())


def replace_device(draw: ChoiceDrawer) -> ChoiceDrawer:
    """The same drawer on the CPU."""
    own = copy.copy(draw)
    own.lam_table = None if draw.lam_table is None else draw.lam_table.cpu()
    return own


def on_cpu(statistics: Normalisation) -> Normalisation:
    return replace(statistics, mean=statistics.mean.cpu(), scale=statistics.scale.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_graph_trains_like_eager(dtype: torch.dtype, replicas: int) -> None:
    losses = []
    for step in (_step(dtype=dtype, replicas=replicas), _graph(dtype=dtype, replicas=replicas)):
        state = _train(step, 0, STEPS, replicas)
        assert state.totals.bad_step() is None
        assert state.step == STEPS
        losses.append(state.totals.means(Totals.EPOCH).loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_a_graph_is_continued_from_any_step() -> None:
    whole = _train(_graph(), 0, 40)
    first = _graph()
    _train(first, 0, 25)
    second = _graph()
    second.state.restore(first.state.snapshot())
    resumed = CapturedStep(second._step, pytest.fail)
    _train(resumed, 25, 40)
    assert _distance(whole, resumed.state) < 1e-4


@pytest.mark.parametrize(
    ("net", "dtype"),
    [
        ("Counting", torch.float32),
        ("Attention", torch.float32),
        ("Averaging", torch.float32),
        ("Plain", torch.bfloat16),  # its weights are cast by autocast within the graph
    ],
)
def test_a_net_of_ones_own_under_a_graph(net: str, dtype: torch.dtype) -> None:
    """Draws as without one, counts, and goes on from a checkpoint with the same draws."""
    config = own_config(net, "train.step_mode=graph")
    device = torch.device("cuda")
    plain, first, second = (train_step(config, 1, dtype, device) for _ in range(3))
    _train(plain, 0, 20)
    graphed = CapturedStep(first, pytest.fail)
    _train(graphed, 0, 12)
    second.state.restore(first.state.snapshot())
    _train(graphed, 12, 20)
    assert _distance(plain.state, first.state) < 1e-5
    resumed = _train(CapturedStep(second, pytest.fail), 12, 20)
    assert _distance(first.state, resumed) < 1e-5
    for state in (first.state, resumed):
        for name, buffer in plain.state.flat.model.named_buffers():
            torch.testing.assert_close(state.flat.model.get_buffer(name), buffer, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_step_waits_for_the_device(dtype: torch.dtype) -> None:
    for step in (_step(dtype=dtype), _graph(dtype=dtype)):
        _train(step, 0, WARM_UP_STEPS + 2)
        batch = _batch(WARM_UP_STEPS + 2)
        try:
            torch.cuda.set_sync_debug_mode("error")
            step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def launches(step: TrainStep | CapturedStep, start: int) -> dict[str, float]:
    """Kernels and graphs that the host launches, and kernels that run, in a step."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        _train(step, start, start + 10)
    counts = {"cudaLaunchKernel": 0.0, "cudaGraphLaunch": 0.0, "kernels": 0.0}
    for event in profiler.events():
        if event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")):
            counts["cudaLaunchKernel"] += 1 / 10
        elif event.name == "cudaGraphLaunch":
            counts["cudaGraphLaunch"] += 1 / 10
        elif event.device_type == DeviceType.CUDA:
            counts["kernels"] += 1 / 10
    return counts


def test_a_graph_is_launched_once_a_step(record_property) -> None:  # type: ignore[no-untyped-def]
    eager, graph = _step(dtype=torch.bfloat16), _graph(dtype=torch.bfloat16)
    for name, step in (("eager", eager), ("graph", graph)):
        _train(step, 0, 10)
        found = launches(step, 10)
        record_property(name, found)
        assert found["cudaGraphLaunch"] == pytest.approx(1 if name == "graph" else 0)
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


@pytest.mark.parametrize("kind", ["ffcv", "resident"])
def test_batches_on_the_device_are_those_of_the_host(kind: str, tiny: Dataset) -> None:
    import numpy as np

    from dist_resnet.data.stream import open_loader

    order = np.random.default_rng(0).permutation(tiny.num_train)[:48].reshape(6, 8)
    host = open_loader("ffcv", tiny.train_path, 8, torch.device("cpu"))
    device = open_loader(kind, tiny.train_path, 8, torch.device("cuda"))
    expected = [(i.clone(), t.clone()) for i, t in host.batches(order)]
    found = [(i.cpu().clone(), t.cpu().clone()) for i, t in device.batches(order)]
    for (i, t), (j, u) in zip(expected, found, strict=True):
        assert torch.equal(i, j)
        assert torch.equal(t, u)


def test_deterministic_runs_are_equal_bit_for_bit() -> None:
    states = []
    for _ in range(2):
        states.append(_train(_graph(dtype=torch.bfloat16), 0, 30).flat.values.clone())
    assert torch.equal(*states)
