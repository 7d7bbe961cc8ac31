"""A net of your own: a callable that takes the number of classes and gives an nn.Module.

python -m dist_resnet.train configs/digits.yaml model.name=examples.own_net:small
"""

import itertools

from torch import Tensor, nn


class Small(nn.Module):
    """Three convolutions, ordinary dropout, a dense layer."""

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, num_classes)."""
        return self.head(self.dropout(self.features(images).mean(dim=(2, 3))))


def small(num_classes: int, width: int = 16, dropout: float = 0.1) -> nn.Module:
    """What model.name names; model.args are its other arguments."""
    return Small(num_classes, width, dropout)
