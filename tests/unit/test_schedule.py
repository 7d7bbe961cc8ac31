"""Learning rates against torch's own schedulers, and tables worked out by hand."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from dist_resnet.config.schedule import learning_rates, scale_factor
from dist_resnet.config.schema import OptimConfig, ScheduleConfig

PEAK = 0.7


def _torch_rates(make: Callable[[torch.optim.SGD], LRScheduler], steps: int) -> list[float]:
    """What torch's scheduler would have an optimizer use at every step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OneCycleLR's own step beyond its end
        for step in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if step < steps - 1:
                scheduler.step()
    return found


@pytest.mark.parametrize(("per_epoch", "epochs"), [(10, 3), (1, 150), (39, 4), (1, 1)])
def test_cosine_is_torchs(per_epoch: int, epochs: int) -> None:
    total = per_epoch * epochs
    expected = _torch_rates(lambda o: CosineAnnealingLR(o, T_max=total), total)
    found = learning_rates(ScheduleConfig("cosine"), PEAK, per_epoch, total)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_cosine_begins_at_the_peak_and_ends_near_zero() -> None:
    found = learning_rates(ScheduleConfig("cosine"), PEAK, 100, 1000)
    assert found[0] == PEAK
    assert found[500] == pytest.approx(PEAK / 2)
    assert 0 < found[-1] < 1e-5 * PEAK
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("milestones", [[80, 120], [1], [], [2, 3, 5, 400]])
def test_step_decay_is_torchs(milestones: list[int]) -> None:
    per_epoch, epochs = 3, 150
    total = per_epoch * epochs
    marks = [mark * per_epoch for mark in milestones]
    expected = _torch_rates(lambda o: MultiStepLR(o, marks, gamma=0.1), total)
    schedule = ScheduleConfig("step", milestones=milestones)
    assert learning_rates(schedule, PEAK, per_epoch, total) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("per_epoch", "epochs", "warmup"), [(10, 10, 0), (10, 10, 4), (20, 5, 1.5), (7, 10, 3)]
)
def test_onecycle_is_torchs(per_epoch: int, epochs: int, warmup: float) -> None:
    total = per_epoch * epochs
    rise = warmup / epochs if warmup else 0.3
    expected = _torch_rates(
        lambda o: OneCycleLR(
            o, PEAK, total_steps=total, pct_start=rise, anneal_strategy="linear",
            cycle_momentum=False,
        ),
        total,
    )  # fmt: skip
    schedule = ScheduleConfig("onecycle", warmup_epochs=warmup)
    found = learning_rates(schedule, PEAK, per_epoch, total)
    assert found == pytest.approx(expected, rel=1e-7)
    assert max(found) == pytest.approx(PEAK)


def test_warm_up_by_hand() -> None:
    # 1.5 epochs of 2 steps: three steps of warm-up, then the cosine over the other five.
    found = learning_rates(ScheduleConfig("cosine", warmup_epochs=1.5), 1.0, 2, 8)
    cosine = [1.0, 0.9045085, 0.6545085, 0.3454915, 0.0954915]  # (1 + cos(pi k / 5)) / 2
    assert found == pytest.approx([0.25, 0.5, 0.75, *cosine], abs=1e-7)


def test_step_decay_with_warm_up_by_hand() -> None:
    schedule = ScheduleConfig("step", warmup_epochs=1, milestones=[2, 3])
    found = learning_rates(schedule, 1.0, 3, 12)
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "step", "onecycle"])
@pytest.mark.parametrize("total", [1, 2, 3, 5, 17])
def test_rates_of_short_runs_are_positive_and_below_the_peak(name: str, total: int) -> None:
    for warmup in (0.0, 0.5, total - 1.0):
        schedule = ScheduleConfig(name, warmup_epochs=warmup)  # type: ignore[arg-type]
        found = learning_rates(schedule, PEAK, 1, total)
        assert len(found) == total
        assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in found), found


@pytest.mark.parametrize("name", ["cosine", "step", "onecycle"])
def test_rates_are_proportional_to_the_peak(name: str) -> None:
    schedule = ScheduleConfig(name, warmup_epochs=1)  # type: ignore[arg-type]
    one, three = (learning_rates(schedule, peak, 5, 50) for peak in (1.0, 3.0))
    assert three == pytest.approx([3 * rate for rate in one])


@pytest.mark.parametrize(
    ("rule", "batch", "reference", "factor"),
    [
        ("none", 1024, 32, 1.0),
        ("linear", 1024, 32, 32.0),
        ("linear", 16, 32, 0.5),
        ("sqrt", 1024, 64, 4.0),
        ("sqrt", 8, 32, 0.5),
        ("linear", 32, 32, 1.0),
    ],
)
def test_scaling_of_the_rate(rule: str, batch: int, reference: int, factor: float) -> None:
    optim = OptimConfig(lr_scaling=rule, reference_batch_size=reference)  # type: ignore[arg-type]
    assert scale_factor(optim, batch) == factor


@pytest.mark.parametrize("name", ["cosine", "step", "onecycle"])
@pytest.mark.parametrize("per_epoch", [1, 2, 44])
def test_a_warm_up_of_almost_the_whole_run_ends_before_it(name: Any, per_epoch: int) -> None:
    found = learning_rates(ScheduleConfig(name, warmup_epochs=0.99), PEAK, per_epoch, per_epoch)
    assert len(found) == per_epoch
    assert all(0 < rate <= PEAK * (1 + 1e-9) for rate in found)
    assert found[:-1] == sorted(found[:-1])
    if name == "cosine":
        assert found[-1] == pytest.approx(PEAK)
