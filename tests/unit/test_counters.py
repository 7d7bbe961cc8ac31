"""Integer buffers of several replicas: all start alike, and the mean of what they add counts."""

import pytest
import torch
from torch import nn

from dist_resnet.distributed.counters import INTEGERS, Counters


def model_of(*buffers: torch.Tensor) -> nn.Module:
    model = nn.Module()
    for number, buffer in enumerate(buffers):
        model.register_buffer(f"b{number}", buffer)
    return model


@pytest.mark.parametrize("dtype", INTEGERS)
def test_the_rounded_mean_of_what_replicas_add(dtype: torch.dtype) -> None:
    model = model_of(torch.tensor(100, dtype=dtype), torch.tensor([[7, 3]], dtype=dtype))
    counters = Counters(model)
    one, two = model.get_buffer("b0"), model.get_buffer("b1")
    counters.note()
    rows = []
    for added in (1, 2, 2):
        counters.restart()
        assert int(one) == 100
        one += added
        two[0, 1] -= added
        rows.append(torch.empty(counters.size))
        counters.put(rows[-1])
    counters.finish(torch.stack(rows).mean(dim=0))
    assert int(one) == 102
    assert two.tolist() == [[7, 1]]
    assert (one.dtype, two.dtype) == (dtype, dtype)


def test_large_counts_stay_exact() -> None:
    model = model_of(torch.tensor(2**53 + 1), torch.tensor(5, dtype=torch.int32))
    counters = Counters(model)
    counters.note()
    model.get_buffer("b0").add_(1)
    moved = torch.empty(2)
    counters.put(moved)
    counters.finish(moved)
    assert int(model.get_buffer("b0")) == 2**53 + 2
    assert int(model.get_buffer("b1")) == 5


def test_a_model_without_any_costs_nothing() -> None:
    counters = Counters(model_of(torch.ones(3), torch.tensor([True])))
    assert counters.size == 0
    assert counters.values == []
    counters.note()
    counters.put(torch.empty(0))
    counters.finish(torch.empty(0))
