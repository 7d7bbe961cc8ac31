"""ResNets: published sizes, a second implementation with the same weights, initialisation."""

import copy
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dist_resnet.config.builtins import MODELS
from dist_resnet.config.schema import ModelConfig
from dist_resnet.models.build import build_model
from dist_resnet.models.dropout import SampleDropout
from dist_resnet.models.norm_act import NormAct
from dist_resnet.models.resnet import BLOCKS_PER_STAGE, Pad, ResNet, resnet


def _model(name: str = "resnet20", seed: int = 0, classes: int = 10, **settings: object) -> ResNet:
    return resnet(ModelConfig(name=name, **settings), classes, seed)  # type: ignore[arg-type]


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Parameters, and parameters with BatchNorm's running statistics."""
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, parameters + sum(b.numel() for b in model.buffers())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
    ],
)
def test_parameters_with_padding_shortcuts(name: str, parameters: int) -> None:
    assert _sizes(_model(name, shortcut="pad"))[0] == parameters


def test_parameters_with_projections() -> None:
    assert _sizes(_model("resnet20"))[0] == 272_474
    assert _sizes(_model("resnet20", widths=[20, 40, 80])) == (424_910, 426_870)
    assert _sizes(_model("m6")) == (696_618, 698_858)
    assert _sizes(_model("m6", widths=[8, 16, 32]))[0] < 100_000  # m6 can be narrowed too


@pytest.mark.parametrize("name", list(BLOCKS_PER_STAGE))
def test_depth_is_what_the_name_says(name: str) -> None:
    model = _model(name, shortcut="pad")
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    assert layers == (14 if name == "m6" else int(name.removeprefix("resnet")))


@pytest.mark.parametrize("name", list(MODELS))
def test_built_in_nets_know_replicas_and_samples(name: str) -> None:
    """They are not tried at the start: their BatchNorm and dropout are those that a step knows."""
    for module in build_model(ModelConfig(name=name), 10).modules():
        assert not isinstance(module, _BatchNorm) or type(module) is NormAct
        assert not isinstance(module, _DropoutNd)


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
@pytest.mark.parametrize(("size", "classes"), [(32, 10), (32, 100), (33, 7), (8, 2)])
def test_shapes(shortcut: str, size: int, classes: int) -> None:
    model = _model(shortcut=shortcut, classes=classes)
    seen = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[1:])))
    assert model(torch.randn(3, 3, size, size)).shape == (3, classes)
    half, quarter = -(-size // 2), -(-size // 4)
    assert seen == [(16, size, size), (32, half, half), (64, quarter, quarter)]


@pytest.mark.parametrize(("new", "stride"), [(16, 2), (0, 2), (5, 1)])
def test_padding_shortcut_by_slices(new: int, stride: int) -> None:
    x = torch.randn(4, 16, 9, 10, generator=torch.Generator().manual_seed(0))
    found = Pad(new, stride)(x).numpy()
    picked = x.numpy()[:, :, 0::stride, 0::stride]
    expected = np.zeros((4, 16 + new, *picked.shape[2:]), np.float32)
    expected[:, :16] = picked
    assert np.array_equal(found, expected)


class Reference:
    """He et al. 2015, section 4.2, written again: functions of a dictionary of weights."""

    def __init__(self, weights: dict[str, Tensor], training: bool) -> None:
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.training = training

    def conv(self, name: str, x: Tensor, stride: int) -> Tensor:
        """Convolution as a matrix product of unfolded patches."""
        kernel = self.weights[f"{name}.weight"]
        side = kernel.shape[2]
        columns = F.unfold(x, side, padding=side // 2, stride=stride)
        height, width = ((n - 1) // stride + 1 for n in x.shape[2:])
        return (kernel.flatten(1) @ columns).view(len(x), -1, height, width)

    def norm(self, name: str, x: Tensor) -> Tensor:
        if self.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        else:
            mean, variance = (self.weights[f"{name}.running_{k}"] for k in ("mean", "var"))
        shape = (1, -1, 1, 1)
        scaled = (x - mean.view(shape)) / torch.sqrt(variance.view(shape) + 1e-5)
        gain, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return scaled * gain.view(shape) + shift.view(shape)

    def block(self, name: str, x: Tensor, stride: int) -> Tensor:
        y = self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x, stride)).clamp(min=0)
        y = self.norm(f"{name}.bn2", self.conv(f"{name}.conv2", y, 1))
        if f"{name}.shortcut.0.weight" in self.weights:
            x = self.norm(f"{name}.shortcut.1", self.conv(f"{name}.shortcut.0", x, stride))
        elif x.shape != y.shape:
            short = x[:, :, ::stride, ::stride]
            x = torch.zeros_like(y)
            x[:, : short.shape[1]] = short
        return (y + x).clamp(min=0)

    def __call__(self, x: Tensor, blocks: int = 3) -> Tensor:
        x = self.norm("bn", self.conv("stem", x.double(), 1)).clamp(min=0)
        for stage in range(3):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                x = self.block(f"stages.{stage}.{index}", x, stride)
        return x.mean((2, 3)) @ self.weights["head.weight"].T + self.weights["head.bias"]


@pytest.mark.parametrize("shortcut", ["projection", "pad"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_logits_of_a_second_implementation(
    shortcut: str, training: bool, channels_last: bool
) -> None:
    generator = torch.Generator().manual_seed(5)
    model = _model(shortcut=shortcut, seed=3, dropout=0)
    with torch.no_grad():  # leave no weight at a value that hides a mistake
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    weights = copy.deepcopy(model.state_dict())
    model.train(training)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 32, 32, generator=generator)
    expected = Reference(weights, training)(x)
    found = model(x.to(memory_format=torch.channels_last) if channels_last else x)
    assert float(expected.std()) > 0.05
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_running_statistics_move_as_documented() -> None:
    """0.9 * old + 0.1 * the batch's, its variance unbiased: torch's BatchNorm of the paper."""
    model = _model()
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    stem = F.conv2d(x, model.stem.weight, padding=1).detach()
    model(x)
    assert model.bn.running_mean is not None
    assert model.bn.running_var is not None
    torch.testing.assert_close(model.bn.running_mean, 0.1 * stem.mean((0, 2, 3)))
    torch.testing.assert_close(model.bn.running_var, 0.9 + 0.1 * stem.var((0, 2, 3)))
    assert not any("num_batches" in name for name in model.state_dict())


def test_dropout_scales_the_features_of_the_dense_layer() -> None:
    model = _model(dropout=0.5)
    model.stages.eval()
    model.bn.eval()
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    features: list[Tensor] = []
    model.stages.register_forward_hook(lambda _m, _i, out: features.append(out.mean((2, 3))))
    keep = torch.randint(0, 2, (5, 64), generator=torch.Generator().manual_seed(3)) * 2.0
    model.dropout.factors = keep
    found = model(x)
    expected = F.linear(features[0] * keep, model.head.weight, model.head.bias)
    torch.testing.assert_close(found, expected)
    model.dropout.factors = None
    ordinary, alone = model(x), model.eval()(x)
    assert not torch.equal(ordinary, alone)
    assert torch.equal(alone, F.linear(features[0], model.head.weight, model.head.bias))


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_is_rounded_once_to_the_type_of_what_it_drops(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    layer, factors = SampleDropout(7, 0.3), torch.tensor([0.0, 1 / 0.7]).repeat(4)[:7].expand(5, 7)
    layer.factors = factors.contiguous()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        slopes = torch.randn(5, 7, generator=torch.Generator().manual_seed(2)).to(dtype)
        found = layer(x)
        found.backward(slopes)
        assert found.dtype == dtype
        assert x.grad is not None
        assert torch.equal(found, (x.float() * factors).to(dtype))
        assert torch.equal(x.grad, (slopes.float() * factors).to(dtype))


def test_initial_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    first = _model(seed=4).state_dict()
    torch.manual_seed(2)  # torch's own generator must not matter
    second, other = _model(seed=4).state_dict(), _model(seed=5).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        if tensor.ndim > 1:
            assert not torch.equal(tensor, other[name]), name


def test_initial_weights_are_he_normal() -> None:
    model = _model("resnet56", seed=1)
    drawn = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d)]
    for weight in drawn:
        fan_in = weight[0].numel()
        expected = (2 / fan_in) ** 0.5
        tolerance = 5 / (2 * weight.numel()) ** 0.5  # five standard errors
        assert float(weight.std()) / expected == pytest.approx(1, abs=tolerance)
        assert abs(float(weight.mean())) < 5 * expected / weight.numel() ** 0.5
    for one, two in pairwise(drawn):
        if one.shape == two.shape:
            assert not torch.equal(one, two)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            one = name.endswith(("running_var", "weight"))
            assert torch.equal(tensor, torch.full_like(tensor, float(one))), name


NARROW = """
import torch
from dist_resnet.config.load import load_config
from dist_resnet.models.resnet import resnet

for widths in ([4, 4, 4], [4, 6, 8], [5, 7, 9]):
    model = resnet(load_config([f"model.widths={widths}"]).model, 10)
    model = model.to(memory_format=torch.channels_last)
    for images in (4, 33):
        for _ in range(4):
            model(torch.randn(images, 3, 32, 32)).sum().backward()
"""


def test_narrow_nets_do_not_crash_where_there_is_avx2_only() -> None:
    """oneDNN's kernel for their shortcuts writes where it may not: the process dies, mostly."""
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MALLOC_CHECK_": "3"}
    done = subprocess.run(
        [sys.executable, "-c", NARROW],
        env={**os.environ, **limits},
        capture_output=True,
        text=True,
        timeout=240,  # a corrupted heap may also hang
    )
    assert done.returncode == 0, done.stderr
