"""Sums on the device against sums by hand."""

import pytest
import torch

from dist_resnet.step.totals import Means, Totals

CPU = torch.device("cpu")
ROWS = [(2.0, 0.25, 1.5), (1.0, 0.5, 0.5), (0.25, 0.75, 4.0), (8.0, 1.0, 0.125)]


def _add(totals: Totals, number: int, bad: bool = False) -> None:
    loss, top1, norm = ROWS[number % 4]
    totals.add(torch.tensor([loss, top1, 9.0, float("inf") if bad else norm, 1.0]))


def _mean(numbers: range, column: int) -> float:
    values = [ROWS[n % 4][column] for n in numbers]
    return sum(values) / len(values)


def test_two_windows_are_read_independently() -> None:
    totals = Totals(CPU)
    for number in range(10):
        _add(totals, number)
        if number == 5:
            log = totals.means(Totals.LOG)
            assert totals.means(Totals.LOG) == log  # reading changes nothing
            totals.begin(Totals.LOG)
            assert log.steps == 6
            assert (log.loss, log.measures["top1"], log.grad_norm) == tuple(
                pytest.approx(_mean(range(6), column)) for column in range(3)
            )
    log, epoch = totals.means(Totals.LOG), totals.means(Totals.EPOCH)
    assert (log.steps, epoch.steps) == (4, 10)
    assert log.loss == pytest.approx(_mean(range(6, 10), 0))
    assert epoch.measures["top1"] == pytest.approx(_mean(range(10), 1))
    assert epoch.grad_norm == pytest.approx(_mean(range(10), 2))


def test_an_empty_window_divides_by_nothing() -> None:
    means = Totals(CPU).means(Totals.LOG)
    assert means == Means(0, {"top1": 0}, 0, 0)


@pytest.mark.parametrize("column", [0, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [0, 3])
def test_the_first_bad_step_stays(first: int, value: float, column: int) -> None:
    totals = Totals(CPU)
    assert totals.bad_step() is None
    for number in range(6):
        row = torch.tensor([2.0, 0.5, 0.0, 1.0, 1.0])
        if number in (first, 5):
            row[column] = value
        totals.add(row)
        assert totals.bad_step() == (first if number >= first else None)
    totals.begin(Totals.LOG)
    assert totals.bad_step() == first


def test_stop_requests_are_no_divergence() -> None:
    totals = Totals(CPU)
    totals.add(torch.tensor([2.0, 0.5, 1.0, 1.0, 1.0]))
    assert totals.bad_step() is None


def test_sums_are_float64() -> None:
    totals = Totals(CPU)
    for loss in (2.0**24, 1.0, 1.0):
        totals.add(torch.tensor([loss, 1.0, 0.0, 1.0, 1.0]))
    assert totals.means(Totals.LOG).loss == (2.0**24 + 2) / 3


def test_round_trip_in_the_middle_of_a_window() -> None:
    first = Totals(CPU)
    for number in range(3):
        _add(first, number, bad=number == 2)
    first.begin(Totals.LOG)
    _add(first, 3)
    saved = first.state_dict()
    second = Totals(CPU)
    second.load_state_dict(saved)
    _add(second, 4)  # must not write through to what was saved
    assert second.bad_step() == 2
    assert second.means(Totals.EPOCH).steps == 5
    third = Totals(CPU)
    third.load_state_dict(saved)
    assert third.means(Totals.EPOCH) == first.means(Totals.EPOCH)
    assert third.means(Totals.LOG) == first.means(Totals.LOG)
    assert third.means(Totals.LOG).steps == 1


def test_another_versions_measures_begin_anew() -> None:
    old = Totals(CPU)
    _add(old, 0)
    _add(old, 1, bad=True)
    for names in (["top1", "confidence"], ["confidence"]):
        new = Totals(CPU, names)
        new.load_state_dict(old.state_dict())
        assert new.means(Totals.EPOCH) == Means(0, dict.fromkeys(names, 0), 0, 0)
        assert new.bad_step() == 1


def test_checkpoints_from_before_the_names_are_of_top1() -> None:
    old, new = Totals(CPU), Totals(CPU)
    _add(old, 0)
    saved = old.state_dict()
    del saved["measures"]
    new.load_state_dict(saved)
    assert new.means(Totals.EPOCH) == Means(2.0, {"top1": 0.25}, 1.5, 1)
