"""A trained classifier as others use it: pixels in, logits out, its classes beside it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import user_path
from dist_resnet.config.load import stored_config
from dist_resnet.data.decoding import Reading, stored_reading
from dist_resnet.runs.checkpoint import Checkpoint
from dist_resnet.runs.exported import description
from dist_resnet.runs.weights import find_weights, trained_model


class Classifier(nn.Module):
    """A net with its normalisation in front.

    Attributes:
        classes: names, by the index of their logit.
        image_size: (height, width) of the images it was trained on.
        step: training step of its weights.
        reading: how the image files that it was trained on became pixels.
        description: what a file of its weights says of itself.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, saved: Checkpoint, reading: Reading) -> None:
        super().__init__()
        self.network = network
        self._in_rows = not stored_config(saved.config).precision.channels_last
        self.classes = tuple(saved.classes)
        height, width = saved.image_size
        self.image_size = height, width
        self.step = saved.state.step
        self.reading = reading
        self.description = description(saved)
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(saved.mean).view(shape) / 255)
        inverse = torch.tensor([255 / (value or 1.0) for value in saved.std])
        self.register_buffer("scale", inverse.view(shape))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 (N, K), of RGB images, float32 (N, 3, H, W) in [0, 1]."""
        inputs = (images - self.mean) * self.scale
        # A net that was trained so may take its images' memory to be in this order.
        return self.network(inputs.contiguous() if self._in_rows else inputs)


def load(path: str | Path, checkpoint: str = "newest") -> Classifier:
    """The classifier of a run folder, a checkpoint or an exported file, on the CPU, to evaluate.

        model = dist_resnet.load("runs/NAME")
        names = [model.classes[i] for i in model(images).argmax(1)]

    Args:
        checkpoint: of a run folder, newest or best.

    Raises:
        UserError: no valid checkpoint there.
    """
    file, saved = find_weights(user_path(str(path)), checkpoint)
    try:
        reading = stored_reading(saved.reading)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: damaged: {error}") from None
    network = trained_model(saved, stored_config(saved.config))
    return Classifier(network, saved, reading).eval()
