"""A buffer for all parameters, one for all that replicas average: views, and nothing moved."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dist_resnet.config.schema import ModelConfig
from dist_resnet.distributed.flat import FlatModel, flatten_model
from dist_resnet.models.resnet import ResNet, resnet

LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


def _model(layout: str = "nhwc") -> ResNet:
    config = ModelConfig(widths=[8, 10, 12], dropout=0)
    return resnet(config, 5, 1).to(memory_format=LAYOUTS[layout])


def _inside(view: Tensor, buffer: Tensor) -> range:
    """Positions in `buffer` that `view`, which must be dense, occupies."""
    assert view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    start = view.storage_offset()
    return range(start, start + view.numel())


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_flattening_changes_no_value_and_no_layout(layout: str) -> None:
    before, model = _model(layout), _model(layout)
    flat = flatten_model(model)
    assert flat.model is model
    for (name, old), (_, new) in zip(
        before.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert torch.equal(old, new), name
        assert old.stride() == new.stride(), name
    x = torch.randn(4, 3, 16, 16).to(memory_format=LAYOUTS[layout])
    assert torch.equal(before(x), model(x))
    for (name, old), (_, new) in zip(
        before.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert torch.equal(old, new), name  # running statistics, after a batch


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_parameters_gradients_and_statistics_tile_the_buffers(layout: str) -> None:
    flat = flatten_model(model := _model(layout))
    parameters, statistics = list(model.parameters()), list(model.buffers())
    size, held = sum(p.numel() for p in parameters), sum(b.numel() for b in statistics)
    assert flat.values.shape == (size,)
    assert flat.exchange.shape == (size + held + 3,)
    assert flat.gradients.shape == (size,)
    assert flat.statistics.shape == (held,)

    values = sorted(i for p in parameters for i in _inside(p, flat.values))
    assert values == list(range(size))
    gradients: list[int] = []
    for p in parameters:
        assert p.grad is not None
        assert p.grad.stride() == p.stride()
        place = _inside(p.grad, flat.exchange)
        assert place == _inside(p, flat.values)  # at the place of its parameter
        gradients += place
    assert sorted(gradients) == list(range(size))
    moved = sorted(i for b in statistics for i in _inside(b, flat.exchange))
    assert moved == list(range(size, size + held))
    assert _inside(flat.row, flat.exchange) == range(size + held, size + held + 5)
    for index, view in zip((0, 2, 3), (flat.loss, flat.stop, flat.norm), strict=True):
        assert _inside(view, flat.exchange) == range(size + held + index, size + held + index + 1)
    assert flat.row[4] == 1


def test_views_are_live_in_both_directions() -> None:
    flat = flatten_model(model := _model())
    flat.values.fill_(2.0)
    assert all(bool((p == 2).all()) for p in model.parameters())
    with torch.no_grad():
        model.head.bias.fill_(7.0)
    assert int((flat.values == 7).sum()) == 5
    flat.statistics.fill_(3.0)
    assert all(bool((b == 3).all()) for b in model.buffers())


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_backward_accumulates_into_the_buffer(layout: str) -> None:
    plain = _model(layout)
    flat = flatten_model(model := copy.deepcopy(plain))
    for seed in (0, 1):  # twice: torch must not put another tensor in the place of .grad
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        plain(x).square().sum().backward()
        model(x).square().sum().backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(q.grad, p.grad)
        _inside(q.grad, flat.exchange)
    norm = sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None)
    assert float(flat.gradients.square().sum()) == pytest.approx(norm, rel=1e-5)


class Odd(nn.Module):
    """Names that say one thing and types that say another."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_bias = nn.Conv2d(3, 4, 1, bias=True)
        self.conv_weight = nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.free_weight = nn.Parameter(torch.ones(7))
        self.norm = nn.Linear(4, 2)


def _decayed(flat: FlatModel) -> set[str]:
    return {
        name for name, p in flat.model.named_parameters() if p.storage_offset() < flat.num_decayed
    }


def test_decay_is_told_by_the_type_of_the_module() -> None:
    flat = flatten_model(Odd())
    assert _decayed(flat) == {"bn_bias.weight", "norm.weight"}
    assert flat.num_decayed == 12 + 8


def test_decay_of_the_resnet_is_for_convolutions_and_the_dense_layer() -> None:
    flat = flatten_model(resnet(ModelConfig(), 10))
    decayed = _decayed(flat)
    assert decayed == {n for n, p in flat.model.named_parameters() if p.ndim in (2, 4)}
    assert len(decayed) == 19 + 2 + 1
    # 272,474 parameters: 10 biases, and two for each channel of 21 BatchNorms
    assert flat.num_decayed == 272_474 - 10 - 2 * (7 * 16 + 7 * 32 + 7 * 64)
    assert flat.statistics.numel() == 2 * (7 * 16 + 7 * 32 + 7 * 64)
