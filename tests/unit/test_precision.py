"""The type of the activations on each kind of GPU, and how CUDA is told to compute."""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

from dist_resnet.base.errors import UserError
from dist_resnet.config.load import load_config
from dist_resnet.step.precision import (
    choose_precision,
    make_deterministic,
    repeatable_convolutions,
    set_up_cuda,
)
from dist_resnet.training import run

GPU = torch.device("cuda", 0)


@pytest.fixture
def settings() -> Iterator[None]:
    """torch's, put back."""
    backends, fill = torch.backends, torch.utils.deterministic.fill_uninitialized_memory
    before = backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, backends.cudnn.benchmark
    with warnings.catch_warnings():
        yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = before[:2]
    backends.cudnn.benchmark = before[2]
    backends.cudnn.deterministic = False


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), "fp32"),
        ((7, 0), "fp16"),  # V100
        ((7, 5), "fp16"),  # T4
        ((8, 0), "bf16"),
        ((9, 0), "bf16"),
        ((12, 0), "bf16"),
    ],
)
def test_auto_is_what_the_gpu_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    chosen, reason = choose_precision("auto", GPU)
    assert chosen == dtype
    assert reason.startswith(dtype)
    assert ("has no bf16" in reason) == (dtype != "bf16")
    assert choose_precision("fp32", GPU)[0] == "fp32"


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0)])
def test_bf16_is_refused_where_a_gpu_has_none(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    """Neither cuDNN nor Triton has it: it would end in the first step."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    if capability >= (8, 0):
        assert choose_precision("bf16", GPU)[0] == "bf16"
        return
    place = ".".join(map(str, capability))
    with pytest.raises(UserError, match=rf"bf16: this GPU has none \(.*{place}.*use fp16 or fp32"):
        choose_precision("bf16", GPU)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("repeatable", [False, True])
def test_fp32_is_fp32_and_cudnn_tries_its_algorithms(repeatable: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    said = set_up_cuda(repeatable)
    assert said == f"TF32 off, cuDNN benchmark {'off' if repeatable else 'on'}"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.benchmark is not repeatable
    assert torch.backends.cudnn.deterministic is repeatable
    # As torch 2.9 and Inductor say it; here every warning is an error.
    warnings.warn("Please use the new API settings to control TF32 behavior", stacklevel=1)
    warnings.warn("TensorFloat32 tensor cores for float32 matrix ...", stacklevel=1)
    with pytest.raises(UserWarning, match="another"):
        warnings.warn("another", stacklevel=1)


@pytest.mark.usefixtures("settings")
def test_deterministic_fills_no_memory_for_nothing() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("wanted", [True, False])
def test_nccl_is_told_before_it_starts(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    """It reads the variable when the process group is made, and torch sets it then if asked."""
    monkeypatch.setenv("NCCL_ALGO", "")  # put back afterwards
    monkeypatch.delenv("NCCL_ALGO")
    found: list[tuple[bool, str | None]] = []

    def start(*args: object) -> None:
        found.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("NCCL_ALGO")))
        raise UserError("far enough")

    monkeypatch.setattr(run, "start", start)
    monkeypatch.setattr(run.signals, "install", lambda: None)
    with pytest.raises(UserError, match="far enough"):
        run.run(load_config([f"precision.deterministic={wanted}".lower()]))
    assert found == [(wanted, "^NVLS,NVLSTree" if wanted else None)]


@pytest.mark.usefixtures("settings")
def test_convolutions_are_repeatable_for_a_while() -> None:
    cudnn = torch.backends.cudnn
    cudnn.benchmark = True
    with repeatable_convolutions():
        assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
    assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
