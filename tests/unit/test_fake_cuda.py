"""The step's parts on cards that are not there: a wait of the host, or mixed devices, raise."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_resnet.augment import Augmenter, ChoiceDrawer, Normalisation
from dist_resnet.augment.trivial import BINS
from dist_resnet.base.randomness import step_keys, turn_keys
from dist_resnet.config.load import load_config
from dist_resnet.distributed.flat import flatten_model
from dist_resnet.models.dropout import dropouts, set_factors
from dist_resnet.models.resnet import ResNet, resnet
from dist_resnet.optim.build import build_optimizer
from dist_resnet.optim.muon import FlatMuon
from dist_resnet.optim.sgd import LossScale
from dist_resnet.step.loss import mixed_cross_entropy
from dist_resnet.step.measures import weighted_top1
from dist_resnet.step.mode import forward_function
from dist_resnet.step.totals import Totals

CUDA = torch.device("cuda", 0)
SIDE, COUNT, CLASSES = 16, 8, 10


def _no_sources(height: int, width: int) -> Tensor:
    return torch.empty(1 + 5 * 2 * BINS, height * width, dtype=torch.int32)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Tensors without contents, on any device; reading one raises."""
    # Which NumPy makes, before the first step.
    table = "dist_resnet.augment.choices.beta_quantiles"
    monkeypatch.setattr(table, lambda alpha: torch.empty(1 << 16))
    monkeypatch.setattr("dist_resnet.augment.trivial._source_table", _no_sources)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


def _model() -> ResNet:
    model = resnet(load_config([]).model, CLASSES)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = torch.empty_like(parameter, device=CUDA)
                module._parameters[name] = torch.nn.Parameter(own)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(CUDA)
    return model


def _choices(*pairs: str) -> tuple[Tensor, object, object, Normalisation]:
    config = load_config(["augment.cutout=4", *pairs])
    draw = ChoiceDrawer(config.augment, (SIDE, SIDE), 0.3, 64, CUDA)
    turn = turn_keys(0, 4, 2).to(CUDA)[2]
    key, samples = step_keys(0, 4).to(CUDA)[2], torch.empty(COUNT, dtype=torch.int64, device=CUDA)
    statistics = Normalisation(
        torch.empty(3 * SIDE, device=CUDA), torch.empty(3 * SIDE, device=CUDA)
    )
    return samples, draw.by_torch(key, samples, turn), config, statistics


def _augmentation(*pairs: str) -> Tensor:
    _, choices, config, statistics = _choices(*pairs)
    pixels = torch.empty(COUNT, SIDE, SIDE, 3, dtype=torch.uint8, device=CUDA)
    images = Augmenter(config.augment, statistics).by_torch(pixels, choices)  # type: ignore
    assert images.is_contiguous(memory_format=torch.channels_last)
    return images


def _everything() -> Tensor:
    return _augmentation(
        "augment.padding_mode=reflect", "augment.flip=alternating", "augment.trivial=true",
        "augment.jitter=0.3", "augment.erasing=0.5", "augment.mix=both", "augment.extra=[jitter]",
    )  # fmt: skip


def _loss() -> Tensor:
    samples, choices, _, _ = _choices()
    logits = torch.empty(COUNT, CLASSES, dtype=torch.bfloat16, device=CUDA)
    loss = mixed_cross_entropy(logits, samples, choices, 0.1)  # type: ignore[arg-type]
    return loss + weighted_top1(logits, samples, choices)  # type: ignore[arg-type]


def _forward() -> Tensor:
    model = _model()
    set_factors(dropouts(model), torch.empty(COUNT, 64, device=CUDA))
    run = forward_function("eager", model, 2)
    return run(torch.empty(COUNT, 3, SIDE, SIDE, device=CUDA))


def _totals() -> Tensor:
    totals = Totals(CUDA)
    totals.add(torch.empty(5, device=CUDA))
    return totals.sums


def _loss_scale() -> Tensor:
    scaling = LossScale(CUDA)
    scaling.update(torch.empty((), device=CUDA))
    return scaling.scale


PARTS = {
    part.__name__: part
    for part in (_augmentation, _everything, _loss, _forward, _totals, _loss_scale)
}


@pytest.mark.parametrize("name", list(PARTS))
def test_nothing_waits_or_mixes_devices(name: str) -> None:
    assert PARTS[name]().device == CUDA


def test_muon_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the fused update of what is no convolution, which these tensors do not know."""
    config = load_config(["optim.name=muon"])
    flat = flatten_model(_model())
    monkeypatch.setattr("dist_resnet.optim.sgd.FlatSGD.step", lambda *arguments: None)
    optimizer = build_optimizer(flat, config)
    for rate in (0.1, torch.empty((), device=CUDA)):
        optimizer.step(rate)
    assert {tensor.device for tensor in optimizer.state.tensors()} == {CUDA}
    assert isinstance(optimizer.optimizer, FlatMuon)
    assert len(optimizer.optimizer._stacks) == 1


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(), lambda x: bool(x.sum() > 0), lambda x: x.nonzero(),
        lambda x: x + torch.empty(3), lambda x: x[torch.empty(3, dtype=torch.bool, device=CUDA)],
    ],
)  # fmt: skip
def test_these_tensors_would_show_it(wait: Callable[[Tensor], object]) -> None:
    with pytest.raises(Exception, match=r"aten\.(nonzero|_local_scalar_dense)|[Dd]evice"):
        wait(torch.empty(3, device=CUDA))
