"""Fused SGD on two flat groups against torch's plain SGD, parameter by parameter; the average."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dist_resnet.config.schema import Config, ModelConfig, OptimConfig
from dist_resnet.distributed.flat import flatten_model
from dist_resnet.models.resnet import resnet
from dist_resnet.optim.build import RunOptimizer, build_optimizer
from dist_resnet.optim.sgd import LossScale, ema_weight

MODEL = ModelConfig(widths=[8, 10, 12])


def _plain_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.SGD:
    """One group a parameter, decay by the module's type."""
    groups: list[dict[str, Any]] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decays = name == "weight" and isinstance(module, nn.Conv2d | nn.Linear)
            decay = config.weight_decay if decays else 0.0
            groups.append({"params": [parameter], "weight_decay": decay})
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
        foreach=False, fused=False,
    )  # fmt: skip


def _momentum(optimizer: RunOptimizer) -> dict[str, torch.Tensor]:
    kept = optimizer.state.state_dict()["parameters"]
    return {name: entries["momentum_buffer"] for name, entries in kept.items()}


@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(),
        OptimConfig(nesterov=True, weight_decay=0.01),
        OptimConfig(momentum=0.0),
        OptimConfig(momentum=0.99, weight_decay=0.0, lr=1.0),
    ],
    ids=["recipe", "nesterov", "no momentum", "no decay"],
)
def test_twenty_steps_of_plain_sgd(config: OptimConfig) -> None:
    model = resnet(MODEL, 5, 1).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    flat = flatten_model(model)
    ours, theirs = build_optimizer(flat, Config(optim=config)), _plain_optimizer(plain, config)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        rate = config.lr / (1 + step)
        for group in theirs.param_groups:
            group["lr"] = rate
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            gradient = torch.randn(p.shape, generator=generator)
            assert p.grad is not None
            p.grad.copy_(gradient)
            q.grad = gradient.clone()
        ours.step(rate if step % 2 else torch.tensor(rate))
        theirs.step()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=f"{name}, step {step}")
    if config.momentum:
        for name, q in plain.named_parameters():
            found = _momentum(ours)[name]
            expected = theirs.state[q]["momentum_buffer"]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_decay_alone_moves_only_what_decays() -> None:
    flat = flatten_model(model := resnet(MODEL, 5, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    optimizer = build_optimizer(flat, Config(optim=OptimConfig(weight_decay=0.1, momentum=0.0)))
    flat.gradients.zero_()
    optimizer.step(0.5)
    for name, p in model.named_parameters():
        expected = 1 - 0.5 * 0.1 if p.ndim > 1 else 1.0
        assert torch.allclose(p, torch.full_like(p, expected)), name


def test_an_overflow_leaves_everything_as_it_is() -> None:
    flat = flatten_model(resnet(MODEL, 5, 1))
    optimizer = build_optimizer(flat, Config())
    flat.gradients.normal_(generator=torch.Generator().manual_seed(0))
    optimizer.step(0.1, torch.tensor(0.0))
    before = flat.values.clone(), _momentum(optimizer)
    flat.gradients.fill_(float("inf"))
    optimizer.step(0.1, torch.tensor(1.0))
    assert torch.equal(flat.values, before[0])
    for name, kept in _momentum(optimizer).items():
        assert torch.equal(kept, before[1][name]), name
    flat.gradients.fill_(1.0)
    optimizer.step(0.1, torch.tensor(0.0))
    assert not torch.equal(flat.values, before[0])


def test_the_loss_scale_is_that_of_torchs_scaler() -> None:
    """Overflows at once; then 2,000 good steps, 2,000 more, and another overflow."""
    ours, theirs = LossScale(torch.device("cpu")), torch.amp.GradScaler("cpu")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    theirs.scale(torch.zeros(1))  # it makes its tensors at the first use
    overflows = {0, 1, 5, 4020}
    for step in range(4030):
        overflow = step in overflows
        parameter.grad = torch.full((1,), float("inf") if overflow else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(overflow)))
        assert float(ours.scale) == theirs.get_scale(), step
        if step == 3000:  # a restart in the middle of the wait
            saved, ours = ours.state_dict(), LossScale(torch.device("cpu"))
            ours.load_state_dict(saved)
    assert theirs.get_scale() == 65536.0 / 8 * 4 / 2


def test_weight_of_the_moving_average() -> None:
    # min(decay, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage(num_updates)
    assert 1 - ema_weight(0.999, 0) == pytest.approx(1 / 10)
    assert 1 - ema_weight(0.999, 8) == pytest.approx(9 / 18)
    assert 1 - ema_weight(0.999, 10_000_000) == pytest.approx(0.999)
    assert 1 - ema_weight(0.5, 8) == pytest.approx(0.5)
    assert 1 - ema_weight(0.5, 100) == pytest.approx(0.5)
