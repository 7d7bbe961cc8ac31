"""A step whose number lives on the device, against the step that is told it by the host.

CUDA's capture itself is tests/gpu's; here a recorded action is run again instead.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_resnet.base.errors import UserError
from dist_resnet.config.schema import Config
from dist_resnet.distributed import reduction
from dist_resnet.step import captured
from dist_resnet.step import train_step as step
from dist_resnet.step.captured import WARM_UP_STEPS, CapturedStep, as_configured
from dist_resnet.step.state import TrainState, build_state
from dist_resnet.step.train_step import TrainStep
from tests.helpers.training import (
    CLASSES,
    CPU,
    SIDE,
    batch_of,
    own_config,
    rates,
    small_config,
    train_step,
)

STEPS = WARM_UP_STEPS + 5


def _equal(one: TrainState, other: TrainState) -> bool:
    pairs = [(one.flat.values, other.flat.values), (one.flat.exchange, other.flat.exchange)]
    pairs.append((one.totals.sums, other.totals.sums))
    if one.ema is not None and other.ema is not None:
        pairs.append((one.ema, other.ema))
    return all(torch.equal(a, b) for a, b in pairs)


def _scaled(config: Config) -> TrainStep:
    """With a loss scale, as in fp16, in float32."""
    made = train_step(config, 1)
    state = build_state(config, CLASSES, torch.float16, CPU, (SIDE, SIDE))
    statistics = made.replica_pass.statistics
    return TrainStep(config, state, rates(STEPS), 1, torch.float32, statistics, (SIDE, SIDE), 3)


class Played:
    """In a graph's place: runs the action again."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.replay, self.resets = action, 0

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture(autouse=True)
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "warm_up", lambda action: action())


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Actions that were recorded; each is repeated by running it."""
    recorded: list[Callable[[], None]] = []

    def record(action: Callable[[], None]) -> Played:
        recorded.append(action)
        return Played(action)

    monkeypatch.setattr(captured, "capture", record)
    return recorded


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(
    "keys",
    [
        (), ("train.ema_decay=0.9", "augment.cutout=4"),
        ("augment.flip=alternating", "augment.trivial=true", "augment.mix=both"),
        ("optim.clip_norm=0.05",), ("optim.clip_norm=1e9",),
    ],
)  # fmt: skip
def test_it_follows_the_same_trajectory(
    captures: list[Callable[[], None]], keys: tuple[str, ...], replicas: int
) -> None:
    config = small_config(*keys)
    plain = train_step(config, replicas)
    graphed = CapturedStep(train_step(config, replicas), pytest.fail)
    for number in range(STEPS):
        plain(batch_of(number, replicas))
        graphed(batch_of(number, replicas))
        assert len(captures) == (number >= WARM_UP_STEPS)
        assert graphed.state.step == number + 1
        assert _equal(plain.state, graphed.state), number


def test_a_training_of_one_step() -> None:
    plain, one = (train_step(small_config(), 1, steps=1) for _ in range(2))
    plain(batch_of(0, 1))
    CapturedStep(one, pytest.fail)(batch_of(0, 1))
    assert _equal(plain.state, one.state)


@pytest.mark.parametrize(("net", "replicas"), [("Counting", 1), ("Averaging", 2), ("Unused", 1)])
def test_other_nets_draw_and_count_as_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, net: str, replicas: int
) -> None:
    """A graph draws from where the generators stand: they cannot be set within it."""
    recording = [False]

    def record(action: Callable[[], None]) -> Played:
        def play() -> None:
            recording[0] = True
            action()
            recording[0] = False

        return Played(play)

    monkeypatch.setattr(captured, "capture", record)
    monkeypatch.setattr(step, "capturing", lambda device: recording[0])
    config = own_config(net, "train.step_mode=eager", "train.ema_decay=0.9")
    plain = train_step(config, replicas)
    graphed = CapturedStep(train_step(config, replicas), pytest.fail)
    for number in range(STEPS):
        plain(batch_of(number, replicas))
        graphed(batch_of(number, replicas))
        assert _equal(plain.state, graphed.state), number
    for name, tensor in plain.state.flat.model.state_dict().items():
        assert torch.equal(graphed.state.flat.model.state_dict()[name], tensor), name


def test_a_net_that_draws_has_no_graph_of_several_replicas() -> None:
    told: list[str] = []
    several = train_step(own_config("Counting"), 2)
    several.config = small_config("train.step_mode=graph")
    assert as_configured(several, told.append) is several
    assert len(told) == 1
    assert "draws random numbers" in told[0]
    one = train_step(own_config("Counting"), 1)
    one.config = small_config("train.step_mode=graph")
    assert isinstance(as_configured(one, pytest.fail), CapturedStep)


def test_a_net_that_draws_on_the_cpu_has_no_graph_on_a_gpu() -> None:
    """Its numbers would be those of the capture in every step."""
    told: list[str] = []
    own = train_step(own_config("Counting"), 1)
    assert own.state.traits.draws_on_cpu
    assert not train_step(own_config("Plain"), 1).state.traits.draws_on_cpu
    own.config, own.device = small_config("train.step_mode=graph"), torch.device("cuda")
    assert as_configured(own, told.append) is own
    assert len(told) == 1
    assert "on the CPU" in told[0]


def test_it_starts_at_the_step_of_the_state(captures: list[Callable[[], None]]) -> None:
    first = train_step(small_config(), 1)
    for number in range(4):
        first(batch_of(number, 1))
    second = train_step(small_config(), 1)
    second.state.restore(first.state.snapshot())
    continued = CapturedStep(second, pytest.fail)
    for number in range(4, 4 + STEPS):
        first(batch_of(number, 1))
        continued(batch_of(number, 1))
    assert _equal(first.state, second.state)


@pytest.mark.parametrize(
    ("text", "line"),
    [("not permitted\nwhen stream is capturing", "not permitted"), ("", "RuntimeError")],
)
def test_a_failed_capture_is_told_and_training_goes_on(
    text: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(action: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError(text)

    monkeypatch.setattr(captured, "capture", refuse)
    told: list[str] = []
    plain, graphed = (
        train_step(small_config(), 1),
        CapturedStep(train_step(small_config(), 1), told.append),
    )
    for number in range(STEPS):
        plain(batch_of(number, 1))
        graphed(batch_of(number, 1))
    assert _equal(plain.state, graphed.state)
    assert told == [f"train.step_mode=graph: no graph, steps run one by one: {line}"]


@pytest.mark.parametrize("clipping", ["0", "0.05"])
@pytest.mark.parametrize("broken", ["gradient", "statistic", "loss", "norm"])
def test_a_graph_that_differs_from_pytorch_is_given_up(
    captures: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch, broken: str, clipping: str
) -> None:
    """As if a kernel were wrong on this card: the run goes on as PyTorch's operations would."""
    told: list[str] = []
    config = small_config("train.step_mode=eager", f"optim.clip_norm={clipping}")
    plain = train_step(config, 2)
    graphed = CapturedStep(train_step(config, 2), told.append)
    played: list[Played] = []

    def wrong(action: Callable[[], None]) -> Played:
        def spoiled() -> None:
            action()
            flat = graphed.state.flat
            {
                "gradient": flat.gradients,
                "statistic": flat.statistics,
                "loss": flat.loss,
                "norm": flat.norm,
            }[broken].mul_(1.5)

        played.append(Played(spoiled))
        return played[0]

    monkeypatch.setattr(captured, "capture", wrong)
    for number in range(STEPS):
        plain(batch_of(number, 2))
        graphed(batch_of(number, 2))
        assert _equal(plain.state, graphed.state), number
    assert len(told) == 1
    assert broken in told[0]
    assert played[0].resets == 1


def test_all_ranks_go_without_a_graph_if_one_cannot_capture(
    captures: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(captured, "gather_objects", lambda own: [own, "not enough memory"])
    plain = train_step(small_config(), 1)
    graphed = CapturedStep(train_step(small_config(), 1), told.append)
    for number in range(STEPS):
        plain(batch_of(number, 1))
        graphed(batch_of(number, 1))
    assert _equal(plain.state, graphed.state)
    assert told == ["train.step_mode=graph: no graph, steps run one by one: not enough memory"]
    assert len(captures) == 1


def test_all_ranks_give_the_graph_up_if_that_of_one_differs(
    captures: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    answers = iter([None, False, True])  # captured, compared, and another's differs
    monkeypatch.setattr(captured, "gather_objects", lambda own: [own, next(answers)])
    config = small_config("train.step_mode=eager")
    plain, graphed = train_step(config, 1), CapturedStep(train_step(config, 1), told.append)
    for number in range(STEPS):
        plain(batch_of(number, 1))
        graphed(batch_of(number, 1))
        assert _equal(plain.state, graphed.state), number
    assert len(told) == 1
    assert "another rank differs" in told[0]
    assert len(captures) == 1


@pytest.mark.parametrize("kind", ["fast", "exact"])
@pytest.mark.parametrize("own", [True, False])
def test_a_graph_that_leaves_no_memory_for_a_comparison_is_kept(
    captures: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch, kind: str, own: bool
) -> None:
    """A batch that fits is trained on, on all ranks alike, whichever is short."""
    told: list[str] = []
    config = small_config(f"parallel.reduction={kind}")
    plain, graphed = train_step(config, 2), CapturedStep(train_step(config, 2), told.append)
    if own:
        # Three steps before the capture, then one compared and one replayed.
        _fails_once(monkeypatch, graphed._step, "sum_over_local", WARM_UP_STEPS + 3)
    else:
        answers = iter([None, False, False, True])  # captured, compared, equal; now it is short
        monkeypatch.setattr(captured, "gather_objects", lambda own: [own, next(answers, None)])
    for number in range(STEPS):
        plain(batch_of(number, 2))
        graphed(batch_of(number, 2))
        assert _equal(plain.state, graphed.state), number
    assert len(told) == 1
    assert "no memory" in told[0]
    assert len(captures) == 1


def _fails_once(patch: pytest.MonkeyPatch, step: TrainStep, name: str, call: int) -> None:
    """The method's `call`-th call does its work and then finds no memory."""
    method, calls = getattr(step, name), count(1)

    def fails(*args: Any) -> None:
        method(*args)
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")

    patch.setattr(step, name, fails)


@pytest.mark.parametrize("overflows", [False, True])
def test_a_loss_scale_that_moves_in_a_compared_step_is_no_difference(
    captures: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch, overflows: bool
) -> None:
    """It grows after 2,000 steps; or our kernels overflow where PyTorch's operations do not."""
    config = small_config()
    plain, step = _scaled(config), _scaled(config)
    graphed = CapturedStep(step, pytest.fail)
    found = graphed._by_torch

    def finite() -> Tensor:
        expected = found()
        assert expected is not None
        return torch.where(expected.isfinite(), expected, 1.0)

    monkeypatch.setattr(graphed, "_by_torch", finite)
    for number in range(STEPS):
        if number == WARM_UP_STEPS + 1:
            for state in (plain.state, step.state):
                assert state.loss_scale is not None
                moved = state.loss_scale.scale if overflows else state.loss_scale.good_steps
                moved.fill_(torch.inf if overflows else 1999.0)
        before = plain.state.flat.values.clone()
        plain(batch_of(number, 1))
        graphed(batch_of(number, 1))
        assert torch.equal(plain.state.flat.values, step.state.flat.values), number
        skipped = torch.equal(before, plain.state.flat.values)
        assert skipped == (overflows and number > WARM_UP_STEPS)


def _trains_on_after_a_refusal(
    config: Config,
    replicas: int,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[pytest.MonkeyPatch, CapturedStep], None],
) -> None:
    """`capture` executes nothing of the action, which `spoil` makes fail: all steps are right."""
    told: list[str] = []
    plain = train_step(config, replicas)
    graphed = CapturedStep(train_step(config, replicas), told.append)

    def refuse(action: Callable[[], None]) -> Played:
        tensors = [*graphed.state.tensors(), graphed._position]
        before = [tensor.clone() for tensor in tensors]
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch, graphed)
            try:
                action()
            finally:
                for tensor, content in zip(tensors, before, strict=True):
                    tensor.copy_(content)
        raise AssertionError("the action was to fail")

    monkeypatch.setattr(captured, "capture", refuse)
    for number in range(STEPS):
        plain(batch_of(number, replicas))
        graphed(batch_of(number, replicas))
        assert _equal(plain.state, graphed.state), number
    assert len(told) == 1


@pytest.mark.parametrize("kind", ["fast", "exact"])
def test_a_failed_capture_leaves_nothing_to_be_summed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no collective in a capture")

    def spoil(patch: pytest.MonkeyPatch, graphed: CapturedStep) -> None:
        patch.setattr(reduction, "gather_rows", fail)
        patch.setattr(reduction.FastReduction, "finish", fail)

    config = small_config(f"parallel.reduction={kind}")
    _trains_on_after_a_refusal(config, 2, monkeypatch, spoil)


def test_a_failed_capture_leaves_no_buffer_of_a_net_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoil(patch: pytest.MonkeyPatch, graphed: CapturedStep) -> None:
        model: Any = graphed.state.flat.model

        def fail() -> None:  # what the forward pass made was recorded, not computed
            model.running = torch.full_like(model.running, torch.nan)
            raise RuntimeError("waits for the device")

        patch.setattr(graphed.state.flat, "hold_buffers", fail)

    config = own_config("Averaging", "train.step_mode=eager")
    _trains_on_after_a_refusal(config, 1, monkeypatch, spoil)


def test_closing_gives_the_graph_up(monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[Played] = []

    def record(action: Callable[[], None]) -> Played:
        played.append(Played(action))
        return played[0]

    monkeypatch.setattr(captured, "capture", record)
    graphed = CapturedStep(train_step(small_config(), 1), pytest.fail)
    graphed.close()  # before there is one
    graphed = CapturedStep(train_step(small_config(), 1), pytest.fail)
    for number in range(STEPS):
        graphed(batch_of(number, 1))
    graphed.close()
    graphed.close()
    assert played[0].resets == 1


def test_graph_is_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match=r"train\.step_mode=graph: only on GPUs"):
        train_step(small_config("train.step_mode=graph"), 1)
