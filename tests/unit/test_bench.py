"""The benchmarks' arithmetic, and that the loops they compare train alike."""

import json
import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dist_resnet.base.errors import UserError
from dist_resnet.bench import load
from dist_resnet.bench.__main__ import main
from dist_resnet.bench.gate import in_turns
from dist_resnet.bench.load import LoadMeter, check_idle
from dist_resnet.bench.measure import (
    Candidate,
    Timing,
    calibrate,
    fastest,
    measure,
    paired_ratio,
    speed_row,
    spread,
)
from dist_resnet.bench.network import NETWORKS, Network, as_measured, predict
from dist_resnet.bench.our_loop import MemoryFedStep
from dist_resnet.bench.parts import operators_of_step, parts_of_step
from dist_resnet.bench.plot import bar_chart
from dist_resnet.bench.reference_loop import ReferenceLoop
from dist_resnet.bench.report import Report, number, write_json
from dist_resnet.bench.roofline import count_work, measure_ceilings
from dist_resnet.bench.scaling import jitter
from dist_resnet.config.load import load_config
from dist_resnet.distributed.group import World
from dist_resnet.models.dropout import dropouts
from dist_resnet.models.resnet import resnet
from dist_resnet.step.state import build_state
from dist_resnet.step.totals import Totals
from tests.helpers.training import (
    BATCH,
    CLASSES,
    CPU,
    SIDE,
    STATISTICS,
    batch_of,
    rates,
    small_config,
    train_step,
)

ALONE = World(0, 1, 0, 1, CPU)


# --- arithmetic


def test_ratios_are_paired_by_round() -> None:
    ours = Timing("ours", 100, [1.0, 2.0, 4.0])  # 100, 50, 25 images/s
    theirs = Timing("theirs", 50, [1.0, 1.0, 2.5])  # 50, 50, 20
    found = paired_ratio(ours, theirs)
    assert found is not None
    # Ratios 2, 1, 1.25; the ratio of the medians would be 1.
    assert found.median == pytest.approx(1.25)
    assert found.lower == pytest.approx(1.125)
    assert found.upper == pytest.approx(1.625)
    assert found.count == 3


def test_quartiles_by_hand() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0])
    assert found is not None
    assert (found.lower, found.median, found.upper) == (1.75, 2.5, 3.25)
    assert spread([]) is None
    only = spread([7.0])
    assert only is not None
    assert (only.lower, only.median, only.upper, only.count) == (7.0, 7.0, 7.0, 1)


def test_candidates_take_turns_forth_and_back() -> None:
    calls: list[str] = []
    candidates = [Candidate(name, 10, lambda name=name: calls.append(name)) for name in "abc"]
    times = iter(float(n * n) for n in range(100))
    timings = measure(candidates, rounds=3, warm_up=1, clock=lambda: next(times))
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert all(len(timing.seconds) == 3 for timing in timings.values())
    # Warm-up took the clock's first six values; the first round's first turn is from 6 to 7.
    assert timings["a"].seconds[0] == 7**2 - 6**2


def test_a_candidate_that_fails_is_given_up_and_the_others_go_on() -> None:
    turns = iter(range(10))

    def fail() -> None:
        if next(turns) == 2:
            raise RuntimeError("out of\nsomething")

    timings = measure([Candidate("bad", 1, fail), Candidate("good", 1, lambda: None)], rounds=4)
    assert timings["bad"].failure == "RuntimeError: out of something"
    assert len(timings["good"].seconds) == 4
    assert speed_row(timings["bad"])["failure"] == "RuntimeError: out of something"
    assert paired_ratio(timings["bad"], timings["good"]) is None
    assert fastest([timings["bad"], timings["good"]]).name == "good"


def test_a_row_holds_medians_quartiles_and_the_reference() -> None:
    row = speed_row(Timing("a", 6, [1.0, 2.0, 3.0]), Timing("b", 3, [1.0, 1.0, 1.0]), batch=32)
    assert row["images_per_second"] == 3.0
    assert row["ratio"] == 1.0
    assert row["ratio_quartiles"] == pytest.approx([(2 / 3 + 1) / 2, 1.5])
    assert row["ratio_to"] == "b"
    assert row["batch"] == 32


def test_calibration_fills_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work(count: int) -> None:
        now[0] += 0.01 * count

    assert calibrate(work, seconds=1.0) == 100
    assert calibrate(work, seconds=0.0, least=3) == 3


def test_batches_come_in_turns() -> None:
    answers = iter([True, True, False])
    heard: list[dict[str, Any]] = []

    def gate(**facts: Any) -> bool:
        heard.append(facts)
        return next(answers)

    numbers: Iterator[int] = iter(range(100))
    assert list(in_turns(lambda: next(numbers), 3, gate)) == [0, 1, 2, 3, 4, 5]
    assert len(heard) == 3


# --- scaling


@pytest.mark.parametrize(
    ("t1", "sigma", "replicas", "efficiency", "speed"),
    [
        # sqrt(2 ln 8) = 2.0393: 3000 + 25 + 305.9 = 3330.9 us
        (3000.0, 150.0, 8, 0.9007, 76_856),
        # 640 + 25 + 16.3 = 681.3 us
        (640.0, 8.0, 8, 0.9394, 375_752),
        # sqrt(2 ln 64) = 2.8840: 640 + 96.5 + 23.1 = 759.6 us
        (640.0, 8.0, 64, 0.8426, 2_696_238),
        # sqrt(2 ln 1024) = 3.7233: 640 + 164.5 + 29.8 = 834.3 us
        (640.0, 8.0, 1024, 0.7671, 39_276_567),
    ],
)
def test_prediction_by_hand(
    t1: float, sigma: float, replicas: int, efficiency: float, speed: float
) -> None:
    found = predict(replicas, t1, sigma, NETWORKS[0].all_reduce(replicas), 32)
    assert found.efficiency == pytest.approx(efficiency, abs=2e-4)
    assert found.images_per_second == pytest.approx(speed, rel=1e-3)


def test_one_replica_is_itself() -> None:
    found = predict(1, 500.0, 50.0, NETWORKS[0].all_reduce(1), 32)
    assert found.efficiency == 1.0
    assert found.images_per_second == pytest.approx(64_000)


def test_networks_by_hand() -> None:
    ib, tcp = NETWORKS[:2]
    assert [ib.all_reduce(n) for n in (4, 8)] == [23, 25]  # measured
    # 14 + 2 (7 x 1.25 + log2(nodes) x 8.5) + 14
    assert [ib.all_reduce(n) for n in (16, 64, 1024)] == [62.5, 96.5, 164.5]
    assert tcp.all_reduce(16) == 203
    assert tcp.all_reduce(64) == 237
    assert [as_measured(7.0, 50.0).all_reduce(n) for n in (1, 2, 8, 1024)] == [0, 7, 150, 500]
    assert Network("plain", "").all_reduce(8) == 45.5


def test_batches_past_the_recipe_are_warned_of() -> None:
    def warning(replicas: int) -> str:
        return predict(replicas, 1000.0, 0.0, 10.0, 32).warning

    assert warning(8) == warning(31) == ""
    assert "costs accuracy" in warning(32)
    assert "costs accuracy" in warning(64)
    assert "32,768 > 2,048" in warning(1024)


def test_jitter_ignores_hiccups() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = (20 + 2 * torch.randn(5000, generator=generator)).tolist()
    assert jitter(steps) == pytest.approx(2, rel=0.05)
    assert jitter([*steps, *[900.0] * 25]) == pytest.approx(2, rel=0.06)
    assert jitter([]) == 0


# --- the machine


def test_a_loaded_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 3.0, 3.0))
    monkeypatch.setattr(LoadMeter, "others", lambda self: 1.8)
    with pytest.raises(UserError, match=r"1\.8 cores are busy .*--force"):
        check_idle(force=False, sample_seconds=0)
    assert check_idle(force=True, sample_seconds=0) == 1.8
    # The average still remembers what has ended.
    monkeypatch.setattr(LoadMeter, "others", lambda self: 0.1)
    assert check_idle(force=False, sample_seconds=0) == 0.1
    monkeypatch.setattr(os, "getloadavg", lambda: (0.2, 3.0, 3.0))
    monkeypatch.setattr(LoadMeter, "others", lambda self: 1.8)
    assert check_idle(force=False, sample_seconds=0) == 0.2


def test_our_own_work_is_no_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores busy for 10 s: 12 s by us and a child that has ended, 5 s by others."""
    hertz = os.sysconf("SC_CLK_TCK")

    def write(busy: float, own: float) -> None:
        fields = [busy * hertz, 0, 0, 1e6, 1e6, 0, 0, 0]
        (tmp_path / "stat").write_text("cpu " + " ".join(str(int(f)) for f in fields) + "\n")
        for pid, parent, seconds in ((os.getpid(), 1, own), (77, os.getpid(), 2.0), (88, 1, 50)):
            folder = tmp_path / str(pid)
            folder.mkdir(exist_ok=True)
            times = ["0"] * 10 + [str(int(seconds * hertz)), "0", "0", "0"]
            (folder / "stat").write_text(f"{pid} (a) b) S {parent} " + " ".join(times[1:]) + " 0")

    monkeypatch.setattr(load, "_PROC", tmp_path)
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    write(busy=1000, own=30)
    meter = LoadMeter()
    write(busy=1017, own=42)
    assert meter.others() == pytest.approx(0.5)


# --- reports


def _report() -> Report:
    report = Report("loader", plot=("speeds", "images_per_second"))
    report.add("speeds", speed_row(Timing("ours <fast>", 9, [1.0, 2.0])))
    report.add("speeds", {"name": "theirs", "failure": "not installed"})
    report.facts = {"hardware": {"cpu": "a & b", "cores": 2}, "commit": None}
    report.notes.append("a note")
    return report


def test_report_as_table_json_and_plot(tmp_path: Path) -> None:
    report = _report()
    text = report.tables()
    assert "6.75 [5.625, 7.875]" in text
    assert "not installed" in text
    assert text.endswith("- a note")
    write_json(tmp_path / "a.json", report)
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found) == {"kind", "schema", "facts", "settings", "rows", "notes"}
    assert found["kind"] == "bench/loader"
    drawn = ET.fromstring(bar_chart(report))
    bars = [e for e in drawn.iter() if e.tag.endswith("rect") and e.get("x")]
    assert len(bars) == 1  # no bar for what was not measured
    with pytest.raises(UserError, match="cannot be written"):
        write_json(tmp_path / "no" / "a.json", report)


def test_numbers_read_well() -> None:
    assert [number(v) for v in (0, 1234567.8, 12.3456, 0.012345)] == [
        "0",
        "1,234,568",
        "12.35",
        "0.01235",
    ]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["speed"], "none of loader, step"),
        ([], "required"),
        (["loader", "--fast"], "--fast"),
        (["loader", "--rounds", "0"], "at least 1"),
        (["loader", "optim.lrr=1"], "did you mean optim.lr?"),
    ],
)
def test_a_mistyped_command_is_one_line(arguments: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# --- what is compared trains alike


def test_the_reference_loop_computes_our_losses() -> None:
    """The same batches, nothing random: ten losses agree to 1e-4 in fp32."""
    config = small_config(
        "augment.mixup_alpha=0", "augment.flip=false", "augment.crop_padding=0",
        "model.dropout=0", "optim.weight_decay=0", "precision.channels_last=false",
    )  # fmt: skip
    steady = replace(config, optim=replace(config.optim, lr=rates()[0]))
    ours = train_step(config, 1)
    ours.rates = [rates()[0]] * 30
    plain = ReferenceLoop(steady, CLASSES, ALONE)
    for number_ in range(10):
        batch = batch_of(number_, 1)
        ours(batch)
        images, _ = ours.replica_pass.inputs(batch.images, batch.samples, ours.keys[number_])
        images = images.contiguous()
        loss = plain.step(images, batch.labels)
        assert ours.state.totals.take(Totals.LOG).loss == pytest.approx(loss, abs=1e-4)
    assert plain.seen == 10 * BATCH


def test_the_reference_loop_mixes_up_and_drops_out() -> None:
    plain = ReferenceLoop(small_config("precision.channels_last=false"), CLASSES, ALONE)
    assert plain.alpha == 0.2
    drops = dropouts(plain.model)
    assert [(module.probability, module.factors) for module in drops] == [(0.3, None)]
    names = dict(plain.model.named_buffers())
    assert any(name.endswith("num_batches_tracked") for name in names)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    labels = torch.arange(BATCH) % CLASSES
    losses = [plain.step(images, labels) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert plain.running_loss == pytest.approx(sum(losses))


def test_the_step_fed_from_memory_is_the_step() -> None:
    config = small_config()
    whole = train_step(config, 1)
    fed = MemoryFedStep(
        config,
        build_state(config, CLASSES, torch.float32, CPU),
        rates(),
        1,
        torch.float32,
        STATISTICS,
        (SIDE, SIDE),
        steps_per_epoch=1,
    )
    batch = batch_of(0, 1)
    images, choices = whole.replica_pass.inputs(batch.images, batch.samples, whole.keys[0])
    fed.hold(choices)
    whole(batch)
    fed(replace(batch, images=images))
    assert torch.equal(whole.state.flat.values, fed.state.flat.values)


# --- counting and timing parts


def test_resnet20_takes_244_megaflop_an_image() -> None:
    """Forward 81.6, backward 162.4 without the images' gradient: counted by hand."""
    config = load_config([])
    model = resnet(config.model, 10)
    images = torch.randn(2, 3, 32, 32)
    labels = torch.zeros(2, dtype=torch.int64)
    work = count_work(lambda: F.cross_entropy(model(images), labels).backward(), model)
    assert work.flops / 2 == pytest.approx(244.0e6, rel=2e-3)
    # 188,416 outputs of the 3x3 convolutions and 12,288 of the projections, in float32
    assert work.saved_bytes / 2 == 4 * 200_704
    # More than every convolution's output, written and read in both directions.
    assert 4 * work.saved_bytes < work.bytes_moved < 40 * work.saved_bytes


def test_ceilings_are_positive() -> None:
    model = resnet(small_config().model, CLASSES)
    images = torch.randn(2, 3, SIDE, SIDE)
    work = count_work(lambda: model(images).sum().backward(), model)
    found = measure_ceilings(model, images, torch.float32, work, seconds=0.0)
    assert min(found.matmul_flops, found.conv_flops, found.bytes_per_second) > 1e6
    assert 0 < found.model_convs_seconds < 5


def test_the_parts_of_a_step_add_up_and_the_timers_are_taken_away() -> None:
    step, reference = train_step(small_config(), 1), train_step(small_config(), 1)
    numbers = iter(range(100))
    rows = parts_of_step(step, lambda: batch_of(next(numbers), 1), steps=3)
    *parts, whole = rows
    assert whole["name"] == "whole step"
    assert sum(row["percent"] for row in parts) == pytest.approx(100)
    assert all(row["ms_per_step"] >= 0 for row in parts)
    named = {row["name"] for row in parts}
    assert {"forward", "backward", "loss", "choices and augmentation", "reduction"} <= named
    operators = operators_of_step(step, lambda: batch_of(next(numbers), 1), steps=2)
    assert sum(row["percent"] for row in operators) == pytest.approx(100)
    shares = {row["name"]: row["calls_per_step"] for row in operators}
    assert shares["convolution"] >= 2 * 21
    for number_ in range(4):
        reference(batch_of(number_, 1))
    again = train_step(small_config(), 1)
    for number_ in range(4):
        again(batch_of(number_, 1))
    assert torch.equal(reference.state.flat.values, again.state.flat.values)
    assert "timed" not in repr(torch.Tensor.backward)
