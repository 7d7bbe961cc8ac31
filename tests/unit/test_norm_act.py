"""The fused kernel against BatchNorm, addition and ReLU in float64, and how it is compiled."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_resnet.base.errors import UserError
from dist_resnet.config.load import load_config
from dist_resnet.kernels import support
from dist_resnet.models.resnet import NormAct, resnet
from dist_resnet.native import build
from dist_resnet.native.norm_act import CHANNELS, accepts, norm_act
from dist_resnet.step.mode import choose_step_mode, forward_function

pytestmark = pytest.mark.usefixtures("compiler")
CPU = torch.device("cpu")
# Relative to the largest value: a few roundings of the type that results are stored in.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}


def _batch(
    channels: int, dtype: torch.dtype, side: int = 8, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, shortcut and the gradient of the result, of 6 images."""
    generator = torch.Generator().manual_seed(channels)
    shape = (6, channels, side, side)
    x, shortcut, dy = (torch.randn(shape, generator=generator) for _ in range(3))
    return tuple(
        t.to(dtype).contiguous(memory_format=torch.channels_last)
        for t in (x + offset, shortcut, dy)
    )  # type: ignore[return-value]


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = NormAct(channels)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert tensor is not None
            tensor.copy_(torch.rand(channels, generator=generator) + 0.5)
        norm.weight[0] = -0.7  # a negative gain reverses which side the ReLU cuts
    return norm


def _reference(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None, relu: bool, dy: Tensor):
    """Result, gradients and running statistics in float64, by PyTorch's separate operations."""
    x, dy = x.double().requires_grad_(), dy.double()
    weight, bias = (t.detach().double().requires_grad_() for t in (norm.weight, norm.bias))
    mean, var = (t.double() for t in (norm.running_mean, norm.running_var))
    y = F.batch_norm(x, mean, var, weight, bias, True, norm.momentum, norm.eps)
    inputs = [x, weight, bias]
    if shortcut is not None:
        shortcut = shortcut.double().requires_grad_()
        inputs.append(shortcut)
        y = y + shortcut
    y = F.relu(y) if relu else y
    return [y, *torch.autograd.grad(y, inputs, dy), mean, var]


def _fused(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None, relu: bool, dy: Tensor):
    inputs = [x.requires_grad_(), norm.weight, norm.bias]
    if shortcut is not None:
        inputs.append(shortcut.requires_grad_())
    y = norm_act(norm, x, shortcut, relu)
    return [y, *torch.autograd.grad(y, inputs, dy), norm.running_mean, norm.running_var]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("relu", "with_shortcut"), [(True, False), (True, True), (False, False)])
def test_against_separate_operations_in_float64(
    channels: int, dtype: torch.dtype, relu: bool, with_shortcut: bool
) -> None:
    x, shortcut, dy = _batch(channels, dtype)
    norm, given = _norm(channels), shortcut if with_shortcut else None
    expected = _reference(norm, x, given, relu, dy)
    found = _fused(norm, x, given, relu, dy)
    for want, have in zip(expected, found, strict=True):
        assert have.shape == want.shape
        torch.testing.assert_close(
            have.double() / want.abs().max(), want / want.abs().max(), rtol=0, atol=TOLERANCE[dtype]
        )


def test_variance_beside_a_large_mean() -> None:
    x, _, dy = _batch(16, torch.float32, offset=3000.0)
    norm = _norm(16)
    want, have = _reference(norm, x, None, True, dy)[0], _fused(norm, x, None, True, dy)[0]
    torch.testing.assert_close(have.double(), want, rtol=0, atol=2e-3)  # eps of 3000 is 2.4e-4


@pytest.mark.parametrize("side", [1, 2, 5, 32])
def test_any_number_of_rows(side: int) -> None:
    x, shortcut, dy = _batch(32, torch.float32, side)
    norm = _norm(32)
    expected = _reference(norm, x, shortcut, True, dy)
    for want, have in zip(expected, _fused(norm, x, shortcut, True, dy), strict=True):
        torch.testing.assert_close(have.double(), want, rtol=1e-4, atol=1e-4)


def test_layout_of_the_arguments_plays_no_part() -> None:
    x, shortcut, dy = _batch(16, torch.float32)
    first = _fused(_norm(16), x.detach(), shortcut.detach(), True, dy)
    nchw = [t.detach().contiguous() for t in (x, shortcut, dy)]
    second = _fused(_norm(16), nchw[0], nchw[1], True, nchw[2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    spread = torch.ones(6, 16, 1, 1).expand(6, 16, 8, 8)  # what the mean's gradient looks like
    a = _fused(_norm(16), x.detach(), None, True, spread)
    b = _fused(_norm(16), x.detach(), None, True, spread.contiguous())
    assert torch.equal(a[1], b[1])


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        x, shortcut, dy = _batch(32, torch.bfloat16, 16)
        results.append(_fused(_norm(32), x, shortcut, True, dy))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(dtype: torch.dtype, bad: float) -> None:
    x, shortcut, dy = _batch(16, dtype)
    x[2, 3, 4, 5] = bad
    y = norm_act(_norm(16), x, shortcut, True)
    assert y[:, 3].isnan().all()
    assert y[:, :3].isfinite().all()
    x, shortcut, dy = _batch(16, dtype)
    dy[2, 3, 4, 5] = bad
    x.requires_grad_()
    shortcut[2, 3, 4, 5] = 9.0  # behind the ReLU's open side
    (dx,) = torch.autograd.grad(norm_act(_norm(16), x, shortcut, True), [x], dy)
    assert not dx[:, 3].isfinite().any()


def test_bfloat16_results_are_the_float32_ones_rounded_to_nearest() -> None:
    x, shortcut, dy = _batch(16, torch.bfloat16)
    half = _fused(_norm(16), x.detach(), shortcut.detach(), True, dy)
    full = _fused(_norm(16), x.detach().float(), shortcut.detach().float(), True, dy.float())
    assert torch.equal(half[0], full[0].bfloat16())
    # Not its input's gradient: that starts from a result that was rounded.
    plain = [_fused(_norm(16), x.detach().to(d), None, False, dy.to(d)) for d in TOLERANCE]
    assert torch.equal(plain[1][1], plain[0][1].bfloat16())


def test_every_nan_stays_one_in_bfloat16() -> None:
    x, _, _ = _batch(16, torch.bfloat16)
    norm = _norm(16)
    with torch.no_grad():  # adding to all of its bits would carry into the sign
        norm.bias[5] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    y = norm_act(norm, x, None, True)
    assert y[:, 5].isnan().all()
    assert y[:, :5].isfinite().all()


def test_what_it_is_not_made_for() -> None:
    x = torch.zeros(2, 16, 8, 8)
    assert accepts(x)
    assert accepts(x, x)
    assert not accepts(torch.zeros(2, 24, 8, 8))
    assert not accepts(x.half())
    assert not accepts(torch.zeros(1, 16, 1, 1))
    assert not accepts(torch.zeros(1, 64, 1, 1))
    assert not accepts(x, x.bfloat16())
    assert not accepts(x, x[:1])


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
@pytest.mark.parametrize("widths", [[16, 32, 64], [8, 16, 48]])
def test_a_model_with_it_is_the_same_function(shortcut: str, widths: list[int]) -> None:
    config = load_config(
        [f"model.shortcut={shortcut}", f"model.widths={widths}", "model.dropout=0"]
    )
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 1, 2, 3])
    results = []
    for mode in ("eager", "fused"):
        model = resnet(config.model, 10).to(memory_format=torch.channels_last)
        loss = F.cross_entropy(forward_function(mode, model)(images), labels)
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}, model))
    (loss, gradients, eager), (fused_loss, fused_gradients, fused) = results
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        distance = (fused_gradients[name] - gradient).norm() / gradient.norm()
        assert distance < 1e-3, name
    for (name, a), (_, b) in zip(eager.named_buffers(), fused.named_buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=name)
    model_in_use = fused.eval()
    assert torch.equal(model_in_use(images), forward_function("eager", model_in_use)(images))


def test_auto_is_fused_on_a_cpu_graph_on_a_gpu_and_eager_where_neither_can_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = load_config([])
    assert choose_step_mode("auto", config, CPU)[0] == "fused"
    assert choose_step_mode("eager", config, CPU)[0] == "eager"
    gpu = torch.device("cuda")
    for lacking in ("", "Triton is missing"):
        monkeypatch.setattr(support, "lacking", lambda device, lacking=lacking: lacking)
        mode, reason = choose_step_mode("auto", config, gpu)
        assert mode == "graph"
        assert ("our kernels" in reason) == (not lacking)
    nchw = load_config(["precision.channels_last=false"])
    assert choose_step_mode("auto", nchw, CPU)[0] == "eager"
    with pytest.raises(UserError, match=r"train\.step_mode=fused: needs precision\.channels_last"):
        choose_step_mode("fused", nchw, CPU)
    with pytest.raises(UserError, match="Triton is missing"):
        choose_step_mode("fused", config, gpu)
    build.load.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        mode, reason = choose_step_mode("auto", config, CPU)
        assert mode == "eager"
        assert "no C++ compiler" in reason
        with pytest.raises(UserError, match="no C"):
            choose_step_mode("fused", config, CPU)
    finally:
        build.load.cache_clear()


def test_triton_that_cannot_run_is_as_one_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as without a compiler: found once, before the first step."""
    pytest.importorskip("triton")
    nowhere = torch.device("cuda", 63)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert support.lacking(nowhere).startswith("Triton cannot run: ")
    assert not support.usable(nowhere)
    _, reason = choose_step_mode("graph", load_config([]), nowhere)
    assert "no kernels of ours: Triton cannot run" in reason
    support.lacking.cache_clear()


@pytest.mark.parametrize("mode", ["eager", "fused", "graph"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_our_kernels_are_for_channels_last(mode: str, channels_last: bool) -> None:
    model = resnet(load_config([]).model, 10)
    forward_function(mode, model, 1, channels_last)
    fused = {module.fused for module in model.modules() if isinstance(module, NormAct)}
    assert fused == {channels_last and mode != "eager"}


def test_compiled_once_and_kept(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load("norm_act")
    (kept,) = fresh_cache.iterdir()
    assert kept.suffix == ".so"
    build.load.cache_clear()

    def refuse(command: list[str]) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(build, "_compile", refuse)
    build.load("norm_act")


def test_a_compiler_that_fails_is_named(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'no such option: -march' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(UserError, match=r"broken-c\+\+ cannot compile.*no such option: -march"):
        build.load("norm_act")
    assert not list(fresh_cache.glob("*"))
