"""Every Triton kernel compiled for cards of four generations, none of which need be here."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_resnet.augment import ChoiceDrawer, Normalisation
from dist_resnet.base.randomness import step_keys
from dist_resnet.config.schema import AugmentConfig
from dist_resnet.step.replica_pass import KernelPass

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
META = torch.device("meta")
# Bytes of shared memory that a program may have (CUDA C++ Programming Guide, table "Technical
# Specifications per Compute Capability"); 8.6, 8.9 and 12.0 have less than 8.0.
LIMITS = {75: 64 << 10, 80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip
KERNELS = {
    "convolve", "conv_gradients", "add_up", "moments", "normalise", "gradient_sums", "gradients",
    "sum_rows", "_draw", "_augment", "_loss", "_update", "_account",
}  # fmt: skip

# Products of matrices, whose instructions are others in each generation.
PRODUCTS = {"convolve", "conv_gradients"}


def _source(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What Triton would compile for a launch with these arguments."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    values = {**dict(zip(kernel.arg_names, arguments, strict=False)), **options}
    for place, parameter in enumerate(kernel.params):
        value, name = values[parameter.name], parameter.name
        one = type(value) is int and value == 1
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[(place,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def _image(dtype: torch.dtype, *shape: int) -> Tensor:
    image = torch.empty(shape, dtype=dtype, device=META)
    return image.to(memory_format=torch.channels_last).requires_grad_()


def _layer(
    dtype: torch.dtype, count: int, channels: int, filters: int, side: int, stride: int,
    replicas: int, add: bool,
) -> None:  # fmt: skip
    from dist_resnet.kernels import conv

    layer = nn.Conv2d(channels, filters, 3, stride, 1, bias=False, device=META).to(dtype)
    x, out = _image(dtype, count, channels, side, side), side // stride
    shortcut = _image(dtype, count, filters, out, out) if add else None
    assert conv.accepts(layer, x, shortcut, replicas)
    norm = nn.BatchNorm2d(filters, device=META)
    y, passed = conv.conv_norm_act(layer, norm, x, shortcut, True, replicas)
    (y.sum() + passed.sum()).backward()


def _launch_all(half: torch.dtype, widest: int) -> None:
    """Each kernel as the training launches it, where tiles are largest; nothing is computed."""
    from dist_resnet.kernels import norm_act, update
    from dist_resnet.kernels.loss import loss_and_gradient

    _layer(half, 32, 3, 16, 32, 1, 1, False)
    _layer(half, 32, 16, 32, 32, 2, 1, False)
    for count, replicas in ((32, 1), (256, 8), (1024, 8)):
        _layer(half, count, widest, widest, 8, 1, replicas, True)
    x = _image(torch.float32, 256, 1024, 8, 8)
    norm = nn.BatchNorm2d(1024, device=META)
    norm_act.norm_act(norm, x, _image(torch.float32, 256, 1024, 8, 8), True, 1).sum().backward()
    statistics = Normalisation.of((120.0,) * 3, (70.0,) * 3, 32, META)
    draw = ChoiceDrawer(AugmentConfig(cutout=8), (32, 32), 0.3, 64, META)
    own = KernelPass(draw.config, 0.1, draw, statistics, 8, half)
    pixels = torch.empty(256, 32, 32, 3, dtype=torch.uint8, device=META)
    samples = torch.empty(256, dtype=torch.int64, device=META)
    own.inputs(pixels, samples, step_keys(0, 1, META)[0])
    rate = torch.empty((), device=META)
    for classes in (10, 1000):
        logits = torch.empty(256, classes, dtype=half, device=META)
        loss_and_gradient(logits, samples, (samples, rate.expand(8)), 0.1, rate, 8)
        weights = torch.empty(classes, device=META)
        for mixup in (None, (samples, rate.expand(8))):
            loss_and_gradient(logits, samples, mixup, 0.1, rate, 8, weights)
    values, exchange = (torch.empty(n, device=META) for n in (270_000, 272_000))
    squares = update.update(
        values, exchange, values, exchange, 260_000, rate, rate, 0.9, 5e-4, True
    )
    row, sums = torch.empty(5, device=META), torch.empty(2, 5, dtype=torch.float64, device=META)
    update.account(squares, row, sums, rate, samples[0])


def _registers(cubin: bytes) -> int:
    """Of a thread: EIATTR_REGCOUNT of .nv.info."""
    return _attribute(cubin, 0x2F)


def _spilled(cubin: bytes) -> int:
    """Bytes of a thread that found no register: EIATTR_FRAME_SIZE of .nv.info."""
    return _attribute(cubin, 0x11)


def _attribute(cubin: bytes, number: int) -> int:
    """Of .nv.info: format, number, length, then a symbol and the value."""
    at = cubin.index(bytes([4, number, 8, 0]))
    return int.from_bytes(cubin[at + 8 : at + 12], "little")


@pytest.mark.slow
@pytest.mark.parametrize("capability", list(LIMITS))
def test_kernels_compile_and_fit(
    capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """bfloat16 is there from 8.0 on; the widest layer takes half a minute for 7.5, whose registers
    the products of matrices overflow."""
    import triton
    from triton.backends.compiler import GPUTarget

    launches: list[Any] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(_source(kernel, arguments, options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.JITFunction, "run", run)
    old = capability < 80
    _launch_all(torch.float16 if old else torch.bfloat16, 32 if old else 128)
    assert {source.fn.__name__ for source in launches} == KERNELS
    for source in {source.hash(): source for source in launches}.values():
        if capability > 80 and source.fn.__name__ not in PRODUCTS:
            continue  # compiled for 7.5 and 8.0, in either of the two types
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        name, cubin = source.fn.__name__, compiled.asm["cubin"]
        shared, spilled = compiled.metadata.shared, _spilled(cubin)
        print(f"sm_{capability} {name}: {_registers(cubin)} registers, {spilled=}, {shared=}")
        assert shared <= LIMITS[capability], name
        assert old or spilled <= 1024, (name, source.constants)
