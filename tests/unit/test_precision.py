"""The type of the activations on each kind of GPU, and how CUDA is told to compute."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from dist_resnet.step.precision import choose_precision, make_deterministic, set_up_cuda

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


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("repeatable", [False, True])
def test_fp32_is_fp32_and_cudnn_tries_its_algorithms(repeatable: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    said = set_up_cuda(repeatable)
    assert said == f"TF32 off, cuDNN benchmark {'off' if repeatable else 'on'}"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.benchmark is not repeatable
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
