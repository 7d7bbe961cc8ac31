"""Muon against torch's own Newton-Schulz iterations, singular values, and SGD for the rest."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from dist_resnet.base.errors import UserError
from dist_resnet.config.load import load_config
from dist_resnet.config.schema import Config, ModelConfig, OptimConfig
from dist_resnet.distributed.flat import flatten_model
from dist_resnet.models.build import freeze
from dist_resnet.models.resnet import resnet
from dist_resnet.optim.build import build_optimizer
from dist_resnet.optim.muon import orthogonalise
from dist_resnet.optim.sgd import FlatSGD

MODEL = ModelConfig(widths=[8, 10, 12])
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(16, 27), (6, 6), (40, 9)])
def test_orthogonalise_is_torchs(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(matrices)
    for ours, matrix in zip(found, matrices, strict=True):
        theirs = _zeropower_via_newtonschulz(matrix, COEFFICIENTS, 5, 1e-7)  # in bfloat16
        assert (ours - theirs.float()).norm() / ours.norm() < 0.05


def test_singular_values_are_about_one_and_vectors_are_kept() -> None:
    matrix = torch.randn(8, 50, generator=torch.Generator().manual_seed(1)) * 1e-3
    found = orthogonalise(matrix.unsqueeze(0))[0]
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    nearest = u @ v
    assert (found * nearest).sum() / (found.norm() * nearest.norm()) > 0.98


def test_nothing_to_go_by_is_no_step() -> None:
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def _svd_update(gradient: Tensor) -> Tensor:
    """As the iterations would give, but by singular values: (filters, ...)."""
    u, s, v = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = COEFFICIENTS[0] * s + COEFFICIENTS[1] * s**3 + COEFFICIENTS[2] * s**5
    return (u * s @ v).view(gradient.shape)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("nesterov", [False, True])
def test_five_steps_written_out(layout: torch.memory_format, nesterov: bool) -> None:
    config = OptimConfig(
        name="muon", lr=0.2, muon_lr=0.05, momentum=0.8, nesterov=nesterov, weight_decay=0.01
    )
    model = resnet(MODEL, 5, 1).to(memory_format=layout)
    plain = copy.deepcopy(model).double()
    ours = build_optimizer(flatten_model(model), Config(optim=config))
    others = [p for name, p in plain.named_parameters() if p.ndim != 4 and name != "head.weight"]
    theirs = torch.optim.SGD(
        [
            {"params": others, "weight_decay": 0.0},
            {"params": [plain.head.weight], "weight_decay": config.weight_decay},
        ],
        lr=config.lr, momentum=config.momentum, nesterov=nesterov,
    )  # fmt: skip
    buffers: dict[nn.Parameter, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        rate = config.lr / (1 + step)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            gradient = torch.randn(p.shape, generator=generator)
            assert p.grad is not None
            p.grad.copy_(gradient)
            q.grad = gradient.double()
        ours.step(rate if step % 2 else torch.tensor(rate))
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        with torch.no_grad():
            for q in plain.parameters():
                if q.ndim == 4:
                    assert q.grad is not None
                    buffers[q] = config.momentum * buffers.get(q, torch.zeros_like(q)) + q.grad
                    go = q.grad + config.momentum * buffers[q] if nesterov else buffers[q]
                    q *= q.shape[0] ** 0.5 / q.norm()
                    q -= 0.25 * rate * _svd_update(go)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=1e-3, msg=name)


def test_sgd_is_what_is_built_otherwise() -> None:
    flat = flatten_model(resnet(MODEL, 5, 1))
    assert type(build_optimizer(flat, Config()).optimizer) is FlatSGD
    with pytest.raises(UserError, match=r"optim\.name=muon: must be sgd with fp16"):
        load_config(["optim.name=muon", "precision.dtype=fp16"])


class _Ordered(nn.Module):
    """The same layers, in one order of registration or another."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        layers: dict[str, nn.Module] = {
            "first": nn.Conv2d(3, 8, 3), "second": nn.Conv2d(8, 5, 1), "dense": nn.Linear(5, 4)
        }  # fmt: skip
        for layer in layers.values():
            for parameter in layer.parameters():
                nn.init.normal_(parameter, generator=generator)
        for name in names:
            self.add_module(name, layers[name])


@pytest.mark.parametrize("factor", [1, 3])
def test_a_dense_layer_may_come_before_a_convolution(factor: int) -> None:
    config = Config(optim=OptimConfig(name="muon", nesterov=True, bias_lr_factor=factor))
    models = _Ordered("first", "second", "dense"), _Ordered("first", "dense", "second")
    saved = []
    for model in models:
        optimizer = build_optimizer(flatten_model(model), config)
        for step in range(3):
            for name, p in sorted(model.named_parameters()):
                generator = torch.Generator().manual_seed(step + len(name) + p.numel())
                assert p.grad is not None
                p.grad.copy_(torch.randn(p.shape, generator=generator))
            optimizer.step(0.1)
        saved.append(optimizer.state.state_dict()["parameters"])
    first, other = (dict(model.named_parameters()) for model in models)
    for name, p in first.items():
        torch.testing.assert_close(p, other[name], msg=name)
        kept = (state[name]["momentum_buffer"] for state in saved)
        torch.testing.assert_close(*kept, msg=name)


def test_a_weight_of_two_convolutions_moves_once() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    optimizer = build_optimizer(flatten_model(model), Config(optim=OptimConfig(name="muon")))
    weight = model[0].weight
    assert weight.grad is not None
    weight.grad.normal_(generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of a parameter in a group twice
        optimizer.step(0.1)
    kept = optimizer.state.state_dict()["parameters"]
    buffers = [entry["momentum_buffer"] for name, entry in kept.items() if "0.weight" in name]
    assert torch.equal(buffers[0], weight.grad)


def test_without_a_convolution_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.name=muon: the model has no convolution"):
        build_optimizer(flatten_model(_Ordered("dense")), Config(optim=OptimConfig(name="muon")))


def test_with_all_convolutions_frozen_the_reason_is_that() -> None:
    model = _Ordered("first", "dense")
    freeze(model, ["first.*"])
    with pytest.raises(UserError, match=r"no convolution that is trained \(optim\.freeze\)"):
        build_optimizer(flatten_model(model), Config(optim=OptimConfig(name="muon")))
