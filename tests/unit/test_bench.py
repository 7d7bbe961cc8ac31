"""The benchmarks' arithmetic, and that the loops they compare train alike."""

import json
import math
import os
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import DeviceType

from dist_resnet.base.errors import UserError
from dist_resnet.base.tables import number, quartiles
from dist_resnet.bench import load, parts, roofline, startup
from dist_resnet.bench.__main__ import NAMES, main, not_taken
from dist_resnet.bench.load import LoadMeter, check_idle
from dist_resnet.bench.measure import (
    Candidate,
    Run,
    Timing,
    calibrate,
    fastest,
    figure,
    measure,
    speed_row,
)
from dist_resnet.bench.parts import profiled
from dist_resnet.bench.reference_loop import ReferenceLoop
from dist_resnet.bench.report import Report
from dist_resnet.bench.roofline import count_work, limits
from dist_resnet.bench.workers import Finished, in_turns
from dist_resnet.config.load import load_config
from dist_resnet.distributed.group import World
from dist_resnet.models.dropout import dropouts
from dist_resnet.models.resnet import resnet
from dist_resnet.step.totals import Totals
from tests.helpers.training import (
    BATCH,
    CLASSES,
    CPU,
    SIDE,
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
    # The ratio of the medians would be 1.
    assert ours.ratios(theirs) == pytest.approx([2, 1, 1.25])
    found = figure("ratio", ours.ratios(theirs))
    assert found == {"ratio": 1.25, "ratio_quartiles": pytest.approx([1.125, 1.625])}


def test_quartiles_by_hand() -> None:
    assert quartiles([4.0, 1.0, 3.0, 2.0]) == (1.75, 2.5, 3.25)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
    assert figure("ratio", []) == {"failure": "not measured"}


def test_candidates_take_turns_forth_and_back() -> None:
    calls: list[str] = []
    candidates: dict[str, Candidate] = {
        name: lambda name=name: (10, lambda: calls.append(name)) for name in "abc"
    }
    times = iter(float(n * n) for n in range(100))
    timings = measure(candidates, rounds=3, clock=lambda: next(times))
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert all(len(timing.seconds) == 3 for timing in timings.values())
    assert timings["a"].seconds[0] == 1**2 - 0**2  # the warm-up is not timed
    assert timings["a"].images == 10


def test_a_turn_may_know_better_what_it_took() -> None:
    timings = measure({"a": lambda: (1, lambda: 7.0)}, rounds=2)
    assert timings["a"].seconds == [7.0, 7.0]


def test_a_candidate_that_fails_is_given_up_and_the_others_go_on() -> None:
    turns = iter(range(10))

    def fail() -> None:
        if next(turns) == 2:
            raise RuntimeError("out of\nsomething")

    def missing() -> tuple[int, Run]:
        raise UserError("no such mode; use another")

    timings = measure(
        {"bad": lambda: (1, fail), "missing": missing, "good": lambda: (1, lambda: None)}, rounds=4
    )
    assert timings["bad"].failure == "RuntimeError: out of something"
    assert timings["missing"].failure == "no such mode; use another"
    assert len(timings["good"].seconds) == 4
    assert speed_row(timings["bad"])["failure"] == "RuntimeError: out of something"
    assert timings["bad"].ratios(timings["good"]) == []
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
    answers, numbers, drawn = iter([True, True, False]), iter(range(100)), []
    batches = in_turns(numbers.__next__, 3, answers.__next__)
    with pytest.raises(Finished):
        drawn.extend(batches)
    assert drawn == [0, 1, 2, 3, 4, 5]


# --- the machine


def test_a_loaded_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadMeter, "others", lambda self: 1.8)
    with pytest.raises(UserError, match=r"1\.8 cores are busy .*--force"):
        check_idle(force=False, sample_seconds=0)
    assert check_idle(force=True, sample_seconds=0) == 1.8
    monkeypatch.setattr(LoadMeter, "others", lambda self: 0.1)
    assert check_idle(force=False, sample_seconds=0) == 0.1


def test_our_own_work_is_no_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores busy for 10 s: 12 s by us and by children that have ended, 5 s by others."""
    stat, hertz = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(load, "_STAT", stat)
    monkeypatch.setattr("time.monotonic", iter([100.0, 110.0]).__next__)
    own = iter([(30.0, 1.0, 7.0, 0.5, 9e9), (38.0, 2.0, 9.0, 1.5, 9e9)])
    monkeypatch.setattr(os, "times", own.__next__)
    stat.write_text(f"cpu {1000 * hertz} 0 0 900 900 0 0 0 0 0\ncpu0 1 2 3 4\n")
    meter = LoadMeter()
    stat.write_text(f"cpu {1010 * hertz} 0 {7 * hertz} 999 999 0 0 0 0 0\ncpu0 1 2 3 4\n")
    assert meter.others() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("prints", "told"),
    [
        ("print('dist_resnet: no data'); print('root cause'); print('====')", "no data"),
        ("print('something'); raise SystemExit('broken')", "broken"),
        ("raise SystemExit(3)", "ended with exit code 3"),
    ],
)
def test_a_command_that_ends_before_its_first_step_says_why(prints: str, told: str) -> None:
    with pytest.raises(UserError, match=f"^{told}$"):
        startup._until_first_step([sys.executable, "-c", prints])


# --- reports


def _report() -> Report:
    report = Report("loader", plot=("speeds", "images_per_second"))
    report.add("speeds", speed_row(Timing("ours <fast>", 9, [1.0, 2.0])))
    report.add("speeds", {"name": "theirs", "failure": "not installed"})
    report.facts = {"hardware": {"cpu": "a & b", "cores": 2}, "commit": None}
    report.notes.append("a note")
    return report


def test_report_as_table_json_and_plot() -> None:
    report = _report()
    text = report.tables()
    assert "6.75 [5.625, 7.875]" in text
    assert "not installed" in text
    assert text.endswith("- a note")
    found = json.loads(json.dumps(report.as_dict()))
    assert set(found) == {"kind", "schema", "facts", "settings", "rows", "notes"}
    assert found["kind"] == "bench/loader"
    drawn = ET.fromstring(report.drawn())
    bars = [e for e in drawn.iter() if e.tag.endswith("rect") and e.get("x")]
    assert len(bars) == 1  # no bar for what was not measured


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
        (["speed"], "choose from"),
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


def test_a_key_that_a_benchmark_sets_itself_is_told() -> None:
    given = ["data.root=x", "data.loader=resident", "augment.flip=false", "run.name=a", "seed=1"]
    told = {name: " ".join(not_taken(name, given)).partition(": ")[0] for name in NAMES}
    assert told == {
        "loader": "data.loader", "startup": "run.name", "step": "", "train": "", "scaling": "",
        "peers": "augment.flip, data.loader, data.root",
    }  # fmt: skip
    assert not_taken("step", ["eval.every_epochs=1"])[0].startswith("eval.every_epochs: set by")


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
        ours.state.totals.begin(Totals.LOG)
        ours(batch)
        images, _ = ours.replica_pass.inputs(batch.images, batch.samples, ours.keys[number_])
        images = images.contiguous()
        loss = plain.step(images, batch.labels)
        assert ours.state.totals.means(Totals.LOG).loss == pytest.approx(loss, abs=1e-4)
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


# --- counting and timing parts


def test_resnet20_takes_244_megaflop_an_image() -> None:
    """Forward 81.6, backward 162.4 without the images' gradient: counted by hand."""
    config = load_config([])
    model = resnet(config.model, 10)
    images = torch.randn(2, 3, 32, 32)
    labels = torch.zeros(2, dtype=torch.int64)
    work = count_work(lambda: F.cross_entropy(model(images), labels).backward())
    assert work.flops / 2 == pytest.approx(244.0e6, rel=2e-3)
    # 188,416 outputs of the 3x3 convolutions and 12,288 of the projections, in float32
    assert work.saved_bytes / 2 == 4 * 200_704
    # More than every convolution's output, written and read in both directions.
    assert 4 * work.saved_bytes < work.bytes_moved < 40 * work.saved_bytes
    # 19 of 3x3 and two projections, in both directions; what they give again is the same.
    assert len(work.convolutions) == 2 * 21
    first = work.convolutions[0]()
    assert torch.equal(first, F.conv2d(images, model.stem.weight, padding=1))


def test_limits_are_positive() -> None:
    model, images = resnet(small_config().model, CLASSES), torch.randn(2, 3, SIDE, SIDE)
    work = count_work(lambda: model(images).sum().backward())
    found = limits(work, len(images), torch.float32, CPU, seconds=0.0)
    assert found["mflop_per_image"] == work.flops / 2e6
    assert min(found["matmul_gflops"], found["conv_gflops"], found["gb_per_second"]) > 1e-3
    assert 0 < found["convolutions_ms"] < 5000


def test_the_parts_of_a_step_add_up_and_the_names_are_taken_away() -> None:
    step, reference = train_step(small_config(), 1), train_step(small_config(), 1)
    numbers = iter(range(100))
    rows, operators = profiled(step, lambda: batch_of(next(numbers), 1), steps=3)
    *parts, whole = rows
    assert whole["name"] == "whole step"
    assert sum(row["percent"] for row in parts) == pytest.approx(100)
    assert all(row["ms_per_step"] >= 0 for row in parts)
    named = {row["name"] for row in parts}
    assert {"data", "forward", "backward", "loss", "reduction"} <= named
    assert {"choices and augmentation", "optimizer and totals"} <= named
    assert sum(row["percent"] for row in operators) == pytest.approx(100)
    shares = {row["name"]: row["calls_per_step"] for row in operators}
    assert shares["convolution"] >= 2 * 21
    for number_ in range(4):
        reference(batch_of(number_, 1))
    again = train_step(small_config(), 1)
    for number_ in range(4):
        again(batch_of(number_, 1))
    assert torch.equal(reference.state.flat.values, again.state.flat.values)
    assert torch.autograd.grad.__name__ == "grad"


def test_a_gpus_time_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler gives it to a kernel and again to the operator that launched it."""

    def event(name: str, kind: DeviceType, time: float, count: int) -> SimpleNamespace:
        return SimpleNamespace(
            key=name, device_type=kind, self_device_time_total=time, self_cpu_time_total=9.0,
            cpu_time_total=1000.0, count=count,
        )  # fmt: skip

    class Profiled(nullcontext[Any]):
        def __enter__(self) -> Any:
            return self

        def key_averages(self) -> list[SimpleNamespace]:
            return [
                event("aten::convolution", DeviceType.CPU, 30.0, 2),
                event("sm90_xmma_conv", DeviceType.CUDA, 30.0, 4),
                event("fused_sgd", DeviceType.CUDA, 10.0, 2),
                event("cudaLaunchKernel", DeviceType.CPU, 0.0, 6),
                event("forward", DeviceType.CPU, 0.0, 2),
                event("forward", DeviceType.CUDA, 30.0, 2),  # a name, over the kernels
            ]

    step: Any = MagicMock(device=torch.device("cuda"))
    monkeypatch.setattr(parts, "profile", lambda **options: Profiled())
    named, rows = profiled(step, lambda: batch_of(0, 1), steps=2)
    assert [row["ms_per_step"] for row in named if row["name"] == "forward"] == [0.5]
    assert rows == [
        {"name": "convolution", "percent": 75.0, "calls_per_step": 2.0},
        {"name": "optimizer", "percent": 25.0, "calls_per_step": 1.0},
    ]


def test_small_calls_on_a_gpu_are_timed_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 calls: one alone would measure how long a launch takes."""
    clock, calls = [0.0], [0]

    def call() -> None:
        calls[0] += 1

    class Graph:
        def __init__(self, action: Callable[[], object]) -> None:
            action()

        def replay(self) -> None:
            clock[0] += 5.0 + 20 * 0.25  # the launch, and what is recorded

    monkeypatch.setattr(roofline, "warm_up", lambda action: action())
    monkeypatch.setattr(roofline, "capture", Graph)
    monkeypatch.setattr(roofline, "now", lambda: clock[0])
    assert roofline._best(call, 1.0, torch.device("cuda")) == 0.5
    assert calls == [1 + 20]
