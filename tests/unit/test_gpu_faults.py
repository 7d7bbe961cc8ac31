"""Faults that only a GPU meets, shown by stubs: order of closing, streams, whose error it is."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from dist_resnet.base.errors import Diverged, OutOfMemory, PeerLost, Preempted, StepError, UserError
from dist_resnet.distributed import group
from dist_resnet.distributed.group import (
    CUDA_ERRORS,
    World,
    broadcast_object,
    collective,
    gather_objects,
    on_every_rank,
    on_rank_zero,
    stop,
)
from dist_resnet.step import cuda_graph
from dist_resnet.step.cuda_graph import capture, free, side_stream, warm_up
from dist_resnet.training import run

CPU = torch.device("cpu")


class Calls(list[str]):
    def to(self, name: str) -> Any:
        """A function that only notes that it was called."""
        return lambda *arguments, **keys: self.append(name)


@pytest.fixture
def calls() -> Calls:
    return Calls()


ENDINGS = [
    (None, True),
    (Preempted("stopped by SIGTERM"), True),
    (Diverged("loss is not finite"), True),
    (UserError("no space left"), True),
    (PeerLost("lost contact"), False),
    (StepError("optim.name=own:Adam: raised ValueError"), False),
    (OutOfMemory("GPU 1 is out of memory"), False),
    (RuntimeError("CUDA error: an illegal memory access"), False),
    (KeyboardInterrupt(), False),
]


@pytest.mark.parametrize(("ending", "orderly"), ENDINGS, ids=lambda value: type(value).__name__)
def test_the_graph_is_given_up_before_the_process_group(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Any,
    ending: BaseException | None, orderly: bool,
) -> None:  # fmt: skip
    """NCCL's teardown waits for graphs that refer to it: every ending would hang.

    Closing a graph may wait for ever for a rank that has gone, so the watchdog still watches; and
    so may the teardown, which it watches again; the status tells the ending before.
    """

    def fit() -> None:
        if ending is not None:
            raise ending

    trainer = SimpleNamespace(
        state=SimpleNamespace(step=3, best={}), fit=fit, last_evaluation=object(),
        batches=SimpleNamespace(close=calls.to("loader")),
        train_step=SimpleNamespace(close=calls.to("graph")),
    )  # fmt: skip
    world = World(0, 1, 0, 1, CPU)
    session = SimpleNamespace(world=world)
    outputs = SimpleNamespace(close=lambda *a: None, fail=lambda *a: None)

    def run_in(config: Any, named: Any, world: World, folder: Any) -> None:
        run._fit_and_close(trainer, session, folder, outputs, {})  # type: ignore[arg-type]

    stubs = {
        "start": lambda *a: world, "stop": lambda orderly: calls.append(f"stop {orderly}"),
        "RunFolder": lambda path: SimpleNamespace(
            path=tmp_path, metrics=None, status=dict, set_status=calls.to("status"),
            write_json=lambda *a: None, begun=True, close=lambda: None,
        ),
        "run_name": lambda config: "run", "open_folder": lambda *a: None, "_run_in": run_in,
        "read_rows": lambda path: [], "write_summary": lambda *a: {}, "conclusion": lambda *a: [],
    }  # fmt: skip
    for name, stub in stubs.items():
        monkeypatch.setattr(run, name, stub)
    for name in ("disarm", "rearm"):
        monkeypatch.setattr(run.watchdog, name, calls.to(name))
    config = SimpleNamespace(
        parallel=SimpleNamespace(device="cpu", timeout_seconds=5),
        run=SimpleNamespace(dir=str(tmp_path)),
        precision=SimpleNamespace(deterministic=False),
    )
    with contextlib.nullcontext() if ending is None else pytest.raises(type(ending)):
        run.run(config)  # type: ignore[arg-type]
    told = ["status"] * (ending is not None)
    assert calls == ["loader", "graph", "disarm", *told, "rearm", f"stop {orderly}", "disarm"]


@pytest.mark.parametrize("failed", [False, True])
def test_a_graph_is_freed_when_the_device_is_done_with_it(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, failed: bool
) -> None:
    def wait() -> None:
        calls.append("wait")
        if failed:
            raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    recorded: Any = SimpleNamespace(replay=calls.to("replay"), reset=calls.to("free"))
    free(recorded)
    assert calls == ["wait", "free"]


@pytest.mark.parametrize(
    ("backend", "orderly", "destroyed"),
    [("nccl", True, True), ("nccl", False, False), ("gloo", True, True), ("gloo", False, True)],
)
def test_a_rank_that_fails_alone_does_not_wait_for_nccl(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, backend: str, orderly: bool, destroyed: bool
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "destroy_process_group", calls.to("destroyed"))
    stop(orderly)
    assert calls == ["destroyed"] * destroyed


def test_ranks_on_gpus_agree_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's own exchanges would stand in one queue with what a failed capture left on a GPU."""
    backends: list[str] = []
    used: list[Any] = []

    def join(backend: str, **options: Any) -> str:
        backends.append(backend)
        return f"the group of {backend}"

    def gather(found: list[Any], value: object, group: Any = None) -> None:
        found[:] = [value]
        used.append(group)

    monkeypatch.setattr(group, "_choose_device", lambda *a: torch.device("cuda", 0))
    monkeypatch.setattr(group, "under_torchrun", lambda: False)
    monkeypatch.setattr(group, "_patient", None)
    monkeypatch.setattr(group, "_timeout", group._timeout)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(dist, "new_group", join)
    group.start("cuda", 5)
    assert backends == ["nccl", "gloo"]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(
        dist, "broadcast_object_list", lambda box, src, group=None: used.append(group)
    )
    assert gather_objects("why") == ["why"]
    assert on_every_rank(lambda: 3) == 3
    assert broadcast_object(3) == 3
    on_rank_zero(lambda: None)
    assert used == ["the group of gloo"] * 4


class Streams:
    """torch.cuda's, as far as `capture` uses them; a capture ends as torch's does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, invalid: bool) -> None:
        self.current, self.invalid = "main", invalid
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_stream", self.set)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(cuda_graph, "side_stream", lambda device: "side")

    def set(self, stream: str) -> None:
        self.current = stream

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: str, capture_error_mode: str) -> Iterator[None]:
        before, self.current = self.current, stream
        with contextlib.suppress(RuntimeError):  # that of the action; the exit's own comes first
            yield
        if self.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.current = before


@pytest.mark.parametrize("invalid", [False, True])
def test_a_failed_capture_leaves_the_stream_as_it_was(
    monkeypatch: pytest.MonkeyPatch, invalid: bool
) -> None:
    """Or the loader's copies would no longer be ordered with the steps that read them."""
    streams, seen = Streams(monkeypatch, invalid), []
    with (
        pytest.raises(RuntimeError, match="previous error")
        if invalid
        else (contextlib.nullcontext())
    ):
        capture(lambda: seen.append(streams.current))
    assert seen == ["side"]
    assert streams.current == "main"


class Stream:
    """As torch.cuda.Stream; says whom it waits for."""

    made: ClassVar[list["Stream"]]

    def __init__(self, device: int | None = None) -> None:
        self.made.append(self)
        self.waits: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waits.append(other)


def test_the_steps_before_a_capture_use_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream keeps what it has freed: one for each step would take that much more memory."""
    streams, seen, Stream.made = Streams(monkeypatch, invalid=False), [], []

    @contextlib.contextmanager
    def on(stream: Any) -> Iterator[None]:
        before, streams.current = streams.current, stream
        yield
        streams.current = before

    main = Stream()
    streams.set(main)  # type: ignore[arg-type]
    monkeypatch.setattr(cuda_graph, "side_stream", side_stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 99)  # it is kept for each
    for action in (warm_up, warm_up, warm_up, capture):
        action(lambda: seen.append(streams.current))
    _, side = Stream.made
    assert seen == [side] * 4
    assert (side.waits, main.waits) == ([main] * 3, [side] * 3)
    assert streams.current is main


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("kind", [RuntimeError, *dict.fromkeys(CUDA_ERRORS), dist.DistBackendError])
def test_whose_error_it_is(
    kind: type[RuntimeError], gpu: bool, capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU anything surfaces at the next call: only an exchange's own error is a lost peer."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(group.signals, "received", lambda: False)
    devices = gpu and (capturing or kind in CUDA_ERRORS)
    with pytest.raises(kind if devices else PeerLost), collective():
        raise kind("out of memory")
    with pytest.raises(RuntimeError if gpu else PeerLost), collective():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
