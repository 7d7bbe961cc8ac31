"""Faults that only a GPU meets, shown by stubs: order of closing, streams, whose error it is."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_resnet.base.errors import Diverged, OutOfMemory, PeerLost, Preempted, StepError, UserError
from dist_resnet.distributed import group
from dist_resnet.distributed.group import CUDA_ERRORS, World, collective, stop
from dist_resnet.step import cuda_graph
from dist_resnet.step.cuda_graph import capture
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
    """NCCL's teardown waits for graphs that refer to it: every ending would hang."""

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
    outputs = SimpleNamespace(close=lambda *a: None)

    def run_in(config: Any, named: Any, world: World, folder: Any) -> None:
        run._fit_and_close(trainer, session, folder, outputs, {})  # type: ignore[arg-type]

    stubs = {
        "start": lambda *a: world, "stop": lambda orderly: calls.append(f"stop {orderly}"),
        "RunFolder": lambda path: SimpleNamespace(
            path=tmp_path, metrics=None, status=dict, set_status=lambda *a: None,
            write_json=lambda *a: None, begun=True, close=lambda: None,
        ),
        "run_name": lambda config: "run", "open_folder": lambda *a: None, "_run_in": run_in,
        "read_rows": lambda path: [], "_facts": lambda *a: {}, "conclusion": lambda *a: [],
        "summarise": lambda *a: {},
    }  # fmt: skip
    for name, stub in stubs.items():
        monkeypatch.setattr(run, name, stub)
    config = SimpleNamespace(
        parallel=SimpleNamespace(device="cpu", timeout_seconds=5),
        run=SimpleNamespace(dir=str(tmp_path)),
    )
    with contextlib.nullcontext() if ending is None else pytest.raises(type(ending)):
        run.run(config)  # type: ignore[arg-type]
    assert calls == ["loader", "graph", f"stop {orderly}"]


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
    devices = gpu and kind is not dist.DistBackendError and (kind in CUDA_ERRORS or capturing)
    with pytest.raises(kind if devices else PeerLost), collective():
        raise kind("out of memory")
