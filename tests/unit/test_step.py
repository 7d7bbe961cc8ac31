"""One step of training against the same step in plain PyTorch."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_resnet.distributed.reduction import FastReduction
from dist_resnet.step.measures import MEASURES
from dist_resnet.step.totals import Totals
from tests.helpers.training import (
    PlainLoop,
    assert_same_step,
    batch_of,
    own_config,
    part_of,
    rates,
    small_config,
    train_step,
)

STEPS = 20


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        ["optim.label_smoothing=0.1", "optim.nesterov=true", "augment.cutout=4"],
        # Fewer values: with more of them, one comes to lie on the other side of a ReLU.
        [
            "augment.mixup_alpha=0", "model.dropout=0", "precision.channels_last=false",
            "model.widths=[4,6,8]", "model.shortcut=pad",
        ],
        ["model.shortcut=pad", "optim.momentum=0", "augment.flip=false", "seed=3"],
        ["augment.mix=both", "augment.mixup_alpha=1", "augment.erasing=0.5", "seed=2"],
        ["parallel.reduction=exact"],
        ["optim.class_weights=[3.0,0.5,1.0,2.0,0.25]"],
        ["optim.class_weights=[3.0,0.5,1.0,2.0,0.25]", "augment.mixup_alpha=0", "model.dropout=0"],
    ],
    ids=["recipe", "smoothing cutout", "no mixup no dropout nchw", "pad", "cutmix", "exact",
         "class weights", "class weights no mixup"],
)  # fmt: skip
def test_one_replica_is_a_plain_loop(pairs: list[str]) -> None:
    config = small_config(*pairs)
    step, plain = train_step(config, 1), PlainLoop(config)
    for number in range(STEPS):
        batch = batch_of(number, 1)
        step(batch)
        plain.step(number, batch)
        assert_same_step(step.state, plain)
    assert step.state.step == STEPS
    means = step.state.totals.means(Totals.EPOCH)
    assert means.steps == STEPS
    assert means.loss == pytest.approx(sum(plain.losses) / STEPS, rel=1e-5)
    assert means.measures["top1"] == pytest.approx(sum(plain.top1) / STEPS, abs=1e-6)
    assert means.grad_norm == pytest.approx(sum(plain.norms) / STEPS, rel=1e-4)


@pytest.mark.parametrize("reduction", ["fast", "exact"])
@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_on_one_rank_are_averaged(replicas: int, reduction: str) -> None:
    config = small_config(f"parallel.reduction={reduction}")
    step, plain = train_step(config, replicas), PlainLoop(config)
    for number in range(6):
        batch = batch_of(number, replicas)
        step(batch)
        plain.step(number, batch)
        assert_same_step(step.state, plain)
    means = step.state.totals.means(Totals.LOG)
    assert means.loss == pytest.approx(sum(plain.losses) / 6, rel=1e-5)
    assert means.measures["top1"] == pytest.approx(sum(plain.top1) / 6, abs=1e-6)
    assert means.grad_norm == pytest.approx(sum(plain.norms) / 6, rel=1e-4)


@pytest.mark.parametrize("reduction", ["fast", "exact"])
def test_a_further_measure_is_a_line(monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    config = small_config(f"parallel.reduction={reduction}")
    plain = train_step(config, 2)
    monkeypatch.setitem(MEASURES, "labels", lambda logits, labels, choices: labels.float().mean())
    more, labels = train_step(config, 2), []
    for number in range(4):
        batch = batch_of(number, 2)
        labels.append(batch.labels.double().mean().item())
        plain(batch)
        more(batch)
    found, expected = (step.state.totals.means(Totals.LOG) for step in (more, plain))
    assert found.measures.pop("labels") == pytest.approx(sum(labels) / 4)
    assert found == expected
    for own, other in zip(
        more.state.optimizer.state.tensors(), plain.state.optimizer.state.tensors(), strict=True
    ):
        assert torch.equal(own, other)


@pytest.mark.parametrize("replicas", [4, 6, 7])
def test_replicas_side_by_side_are_those_one_after_the_other(replicas: int) -> None:
    """One step; `parallel.reduction=exact` runs them one after the other."""
    states = []
    for reduction in ("fast", "exact"):
        step = train_step(small_config(f"parallel.reduction={reduction}"), replicas)
        assert step.group == ({4: 4, 6: 3, 7: 1}[replicas] if reduction == "fast" else 1)
        step(batch_of(0, replicas))
        states.append(step.state)
    one, other = (state.flat for state in states)
    for found, expected in ((one.values, other.values), (one.statistics, other.statistics)):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    torch.testing.assert_close(one.row, other.row, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("replicas", [1, 2])
def test_one_cast_of_all_weights_is_autocasts_many(
    monkeypatch: pytest.MonkeyPatch, replicas: int
) -> None:
    """The same bits; whoever looks at the net between steps finds its own parameters."""
    states = []
    for at_once in (True, False):
        # One that sums during the backward pass wants each gradient in its place.
        monkeypatch.setattr(FastReduction, "in_chunks", not at_once)
        step = train_step(small_config(), replicas, torch.bfloat16)
        assert (step.shadow is not None) == at_once
        before = [id(parameter) for parameter in step.state.flat.model.parameters()]
        for number in range(4):
            step(batch_of(number, replicas))
        model = step.state.flat.model
        assert [id(parameter) for parameter in model.parameters()] == before
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    untrained = train_step(small_config(), replicas).state.flat.model.named_parameters()
    assert not any(torch.equal(states[0][name], parameter) for name, parameter in untrained)


def test_a_forward_pass_that_fails_leaves_the_net_its_parameters() -> None:
    step = train_step(small_config(), 1, torch.bfloat16)
    model = step.state.flat.model
    before = [id(parameter) for parameter in model.parameters()]

    def fail(*_: object) -> None:
        raise ZeroDivisionError("on purpose")

    model.get_submodule("head").register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        step(batch_of(0, 1))
    assert [id(parameter) for parameter in model.parameters()] == before


def test_a_net_of_ones_own_has_its_own_weights_in_a_step() -> None:
    """It may use them outside of autocast."""
    step = train_step(own_config("Plain"), 1, torch.bfloat16)
    types = []
    conv = next(m for m in step.state.flat.model.modules() if isinstance(m, torch.nn.Conv2d))
    conv.register_forward_pre_hook(lambda module, _: types.append(module.weight.dtype))
    step(batch_of(0, 1))
    assert types == [torch.float32]
    assert step.shadow is None


def test_two_replicas_are_not_one_of_twice_the_size() -> None:
    """BatchNorm statistics are the replica's own: 2 x 8 images and 1 x 16 must differ."""
    two = train_step(small_config(), 2)
    one = train_step(small_config("data.batch_size_per_replica=16"), 1)
    batch = batch_of(0, 2)
    two(batch)
    one(batch)
    difference = (two.state.flat.values - one.state.flat.values).abs().max()
    assert float(difference) > 1e-4


def test_the_order_of_replicas_in_a_batch_does_not_matter_to_the_mean() -> None:
    first, second = train_step(small_config(), 2), train_step(small_config(), 2)
    batch = batch_of(0, 2)
    a, b = part_of(batch, 0, 2), part_of(batch, 1, 2)
    first(batch)
    second(type(batch)(*(torch.cat([getattr(x, n) for x in (b, a)])
                         for n in ("images", "labels", "samples"))))  # fmt: skip
    torch.testing.assert_close(
        first.state.flat.values, second.state.flat.values, rtol=1e-6, atol=1e-6
    )


def test_moving_average_of_weights_and_statistics() -> None:
    config = small_config("train.ema_decay=0.9")
    step, plain = train_step(config, 1), PlainLoop(config)
    average = copy.deepcopy(plain.model.state_dict())
    for number in range(STEPS):
        batch = batch_of(number, 1)
        step(batch)
        plain.step(number, batch)
        assert_same_step(step.state, plain)
        decay = min(0.9, (1 + number) / (10 + number))
        for name, tensor in plain.model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * tensor
    now = copy.deepcopy(step.state.flat.model.state_dict())
    with step.state.evaluated_weights():
        for name, tensor in step.state.flat.model.state_dict().items():
            torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-5)
        used = step.state.flat.model.state_dict()["head.weight"]
        assert not torch.equal(used, now["head.weight"])
    for name, tensor in step.state.flat.model.state_dict().items():
        assert torch.equal(tensor, now[name]), name


def test_the_weights_come_back_when_evaluation_fails() -> None:
    step = train_step(small_config("train.ema_decay=0.9"), 1)
    step(batch_of(0, 1))
    before = step.state.flat.exchange.clone(), step.state.flat.values.clone()
    with pytest.raises(KeyError), step.state.evaluated_weights():
        raise KeyError
    assert torch.equal(step.state.flat.values, before[1])
    size = len(before[1])
    assert torch.equal(step.state.flat.statistics, before[0][size:-3])


def test_without_an_average_the_weights_themselves_are_evaluated() -> None:
    step = train_step(small_config(), 1)
    before = step.state.flat.values.clone()
    with step.state.evaluated_weights():
        assert torch.equal(step.state.flat.values, before)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_step_is_a_function_of_step_and_batch_alone(replicas: int) -> None:
    """From a state in the middle, whatever was drawn before, bit for bit."""
    config = small_config("train.ema_decay=0.99")
    first = train_step(config, replicas)
    for number in range(6):
        first(batch_of(number, replicas))
        if number == 2:
            saved = first.state.snapshot()
    second = train_step(config, replicas)
    torch.manual_seed(99)
    second.state.restore(saved)
    assert second.state.step == 3
    for number in range(3, 6):
        second(batch_of(number, replicas))
    one, other = first.state, second.state
    assert torch.equal(one.flat.values, other.flat.values)
    assert torch.equal(one.flat.statistics, other.flat.statistics)
    assert one.ema is not None
    assert other.ema is not None
    assert torch.equal(one.ema, other.ema)
    assert torch.equal(one.totals.sums, other.totals.sums)


def test_steps_draw_different_choices() -> None:
    """The same images at step 0 and at step 1 are augmented differently."""
    step = train_step(small_config("optim.momentum=0"), 1)
    start, batch, moved = step.state.flat.values.clone(), batch_of(0, 1), []
    for number in (0, 1):
        step.state.flat.values.copy_(start)
        step.state.step = number
        step(batch)
        moved.append((step.state.flat.values - start) / rates()[number])
    assert float((moved[0] - moved[1]).abs().max()) > 1e-3


def test_the_rate_of_the_step_is_used() -> None:
    step = train_step(small_config("optim.momentum=0", "optim.weight_decay=0"), 1)
    start, moved = step.state.flat.values.clone(), []
    step.rates = [0.0, 0.01, 0.02]
    step.keys = step.keys[:1].expand(3)
    for number in range(3):
        step.state.flat.values.copy_(start)
        step.state.step = number
        step(batch_of(0, 1))
        moved.append(step.state.flat.values - start)
    assert torch.equal(moved[0], torch.zeros_like(start))
    torch.testing.assert_close(moved[2], 2 * moved[1], rtol=1e-3, atol=1e-6)


def test_the_first_step_that_is_not_finite_is_remembered() -> None:
    step = train_step(small_config(), 1)
    for number in range(5):
        if number == 3:
            with torch.no_grad():
                step.state.flat.values[0] = float("nan")
        step(batch_of(number, 1))
        assert step.state.totals.bad_step() == (None if number < 3 else 3)


def test_bf16_follows_fp32_and_keeps_its_weights_in_float32() -> None:
    half, full = train_step(small_config(), 1, torch.bfloat16), train_step(small_config(), 1)
    for number in range(5):
        half(batch_of(number, 1))
        full(batch_of(number, 1))
    means = [step.state.totals.means(Totals.LOG).loss for step in (half, full)]
    assert means[0] == pytest.approx(means[1], rel=0.02)
    assert means[0] != means[1]
    assert all(t.dtype == torch.float32 for t in half.state.flat.model.state_dict().values())


class _NoWaits(TorchDispatchMode):
    """Refuses the operations that a host must wait for on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func)
        assert "_local_scalar_dense" not in name, "something like .item()"
        assert "nonzero" not in name, "something like indexing by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keys", [(), ("train.ema_decay=0.9", "parallel.reduction=exact")])
def test_nothing_in_a_step_waits_for_the_device(keys: tuple[str, ...]) -> None:
    step = train_step(small_config("augment.cutout=4", *keys), replicas=2)
    step(batch_of(0, 2))
    with _NoWaits():
        step(batch_of(1, 2))
    with pytest.raises(AssertionError, match="item"), _NoWaits():
        float(step.state.flat.values[0])
