"""Distillation: a net learns the softened predictions of others beside the labels.

G. Hinton, O. Vinyals and J. Dean 2015, "Distilling the knowledge in a neural network".

Shapes: N images, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_resnet.augment import Normalisation
from dist_resnet.config.plugins import within_step
from dist_resnet.step.replica_pass import Objective


class Teacher:
    """A trained net, which takes images from the student's normalisation to its own first.

    Args:
        name: what a line about it calls it.
    """

    def __init__(
        self,
        model: nn.Module,
        own: Normalisation,
        students: Normalisation,
        channels_last: bool = True,
        name: str = "",
    ) -> None:
        """With the normalisations that each was trained under, and the teacher's own order."""
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model, self.name = model.eval().requires_grad_(False), name
        rows = own.mean, own.scale, students.mean, students.scale
        mean, scale, other_mean, other_scale = (row[:3].view(1, 3, 1, 1) for row in rows)
        self.factor, self.offset = scale / other_scale, (other_mean - mean) * scale

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, float32 (N, K), of images that are normalised for the student.

        Raises:
            StepError: its net raised.
        """
        images = (images * self.factor + self.offset).contiguous(memory_format=self.layout)
        with within_step("distill.teachers", self.name):
            logits: Tensor = self.model(images)
        return logits.float()


@dataclass(frozen=True)
class Distillation:
    """(1 - weight) times the loss of the labels, and weight T^2 times KL(teachers, student) at T.

    The teachers' prediction is the mean of theirs at that temperature. T^2 keeps the size of the
    gradient where the temperature changes (section 2.1 there).
    """

    teachers: Sequence[Teacher]
    temperature: float
    weight: float

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """The teachers' mean prediction, float32 (N, K), of images as the student sees them."""
        found = [F.softmax(teacher(images) / self.temperature, dim=1) for teacher in self.teachers]
        return torch.stack(found).mean(dim=0)

    def objective(
        self,
        labels: Objective,
        logits: Tensor,
        targets: Tensor,
        replicas: int,
        scale: Tensor | None,
    ) -> Objective:
        """`labels`, the objective of the labels alone, with the teachers' part.

        Args:
            logits: (R N, K), of R replicas side by side, each with a mean of its own.
            scale: as for `ReplicaPass.objective`.
        """
        rest, size = 1 - self.weight, len(logits) // replicas
        student = F.log_softmax(logits.float() / self.temperature, dim=1)
        factor = self.weight * self.temperature**2 / size
        loss = factor * F.kl_div(student, targets, reduction="sum")
        row = labels.row.clone()
        row[0] = rest * row[0] + loss.detach()
        if labels.gradient is None:
            return Objective(
                rest * labels.output + (loss if scale is None else loss * scale), None, row
            )
        # Of the teachers' part by the logits, in closed form.
        own = (student.detach().exp() - targets) * (factor / self.temperature)
        gradient = rest * labels.gradient + (own if scale is None else own * scale)
        return Objective(labels.output, gradient.to(labels.gradient.dtype), row)
