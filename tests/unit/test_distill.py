"""The teachers' part of the loss, against torch's own operations and derivatives."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_resnet.augment import Normalisation
from dist_resnet.step.distill import Distillation, Teacher
from dist_resnet.step.replica_pass import Objective

REPLICAS, SIZE, CLASSES = 2, 3, 5
CPU = torch.device("cpu")
ONE = Normalisation.of((0, 0, 0), (1, 1, 1), 4, CPU)


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Fixed(nn.Module):
    """Logits that depend on nothing."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize("by_kernels", [False, True])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_loss_and_gradient(by_kernels: bool, scale: float | None) -> None:
    """Both ways in which an objective comes: a loss of torch's, or logits and a gradient."""
    count = REPLICAS * SIZE
    logits = _numbers(0, count, CLASSES).requires_grad_()
    labels = torch.arange(count) % CLASSES
    theirs = [_numbers(seed, count, CLASSES) for seed in (1, 2)]
    teachers = [Teacher(Fixed(t), ONE, ONE) for t in theirs]
    distillation = Distillation(teachers, temperature=3.0, weight=0.7)

    own = sum(
        F.cross_entropy(part, own)
        for part, own in zip(logits.chunk(2), labels.chunk(2), strict=True)
    )
    target = torch.stack([(t / 3).softmax(1) for t in theirs]).mean(0)
    divergence = sum(
        F.kl_div((part / 3).log_softmax(1), p, reduction="batchmean") * 9
        for part, p in zip(logits.chunk(2), target.chunk(2), strict=True)
    )
    expected = 0.3 * own + 0.7 * divergence
    (gradient,) = torch.autograd.grad(expected, logits, retain_graph=True)

    factor = None if scale is None else torch.tensor(scale)
    row = torch.stack([own.detach(), torch.tensor(1.5)])
    times = 1.0 if scale is None else scale
    if by_kernels:
        (of_labels,) = torch.autograd.grad(own, logits, retain_graph=True)
        start = Objective(logits, of_labels * times, row)
    else:
        start = Objective(own * times, None, row)
    targets = distillation.targets(torch.zeros(count, 3, 4, 4))
    found = distillation.objective(start, logits, targets, REPLICAS, factor)
    (again,) = torch.autograd.grad(found.output, logits, found.gradient)
    torch.testing.assert_close(again, gradient * times)
    torch.testing.assert_close(found.row, torch.stack([expected.detach(), torch.tensor(1.5)]))


def test_a_teacher_sees_the_images_as_it_was_trained_to() -> None:
    own = Normalisation.of((100.0, 110.0, 120.0), (50.0, 60.0, 70.0), 4, CPU)
    students = Normalisation.of((130.0, 120.0, 90.0), (40.0, 65.0, 80.0), 4, CPU)
    pixels = torch.randint(256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()

    def normalised(mean: list[float], std: list[float]) -> Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    seen = Teacher(nn.Identity(), own, students)(normalised([130, 120, 90], [40, 65, 80]))
    torch.testing.assert_close(seen, normalised([100, 110, 120], [50, 60, 70]))
