"""User's code that fails in the middle of a training: one line, said by the rank that met it."""

import pytest
import torch

from dist_resnet.base.errors import StepError
from dist_resnet.step.train_step import TrainStep
from tests.helpers.late_failures import errors
from tests.helpers.training import batch_of, own_config, small_config, train_step

HERE = "tests.helpers.late_failures"
STEPS = {
    "optim.name": lambda: small_config(f"optim.name={HERE}:LateOptimizer"),
    "augment.extra": lambda: small_config(f"augment.extra=[{HERE}:late_augmentation]"),
    "model.name": lambda: own_config(f"{HERE}:LateNet"),
}


@pytest.fixture(params=list(STEPS))
def begun(request: pytest.FixtureRequest) -> tuple[str, TrainStep]:
    """After its trial and one step."""
    step = train_step(STEPS[request.param](), 1)
    step(batch_of(0, 1))
    return request.param, step


def test_it_is_one_line_of_this_rank_alone(begun: tuple[str, TrainStep]) -> None:
    key, step = begun
    errors.append(KeyError("no\nluck"))
    with pytest.raises(StepError, match=rf"^{key}={HERE}:.*raised KeyError: .*:\d+") as caught:
        step(batch_of(1, 1))
    assert "\n" not in str(caught.value)
    assert caught.value.of_one_rank


FULL = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_lack_of_memory_is_told_as_such(begun: tuple[str, TrainStep], error: Exception) -> None:
    errors.append(error)
    with pytest.raises(type(error)) as caught:
        begun[1](batch_of(1, 1))
    assert caught.value is error
