"""ResNets for CIFAR: He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2.

Three stages of n basic blocks at 32x32, 16x16 and 8x8 pixels: 6n + 2 weighted layers.

    depth            20       32       44       56       110        (m6: n = 2, widths 32/64/128)
    n                 3        5        7        9        18
    shortcut=pad 269,722  464,154  658,586  853,018  1,727,962

Shapes: N images, C channels, H W pixels, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_resnet.base.randomness import Stream, stream_key
from dist_resnet.config.schema import ModelConfig
from dist_resnet.models.dropout import SampleDropout
from dist_resnet.models.norm_act import NormAct, conv_norm_act

BLOCKS_PER_STAGE = {
    "resnet20": 3,
    "resnet32": 5,
    "resnet44": 7,
    "resnet56": 9,
    "resnet110": 18,
    "m6": 2,
}
_DEFAULT_WIDTHS = (16, 32, 64)
_M6_WIDTHS = (32, 64, 128)


def _conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class Pad(nn.Module):
    """Shortcut without parameters: every `stride`-th pixel, new channels zero (option A)."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + new_channels, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class Projection(nn.Sequential):
    """Shortcut by a 1x1 convolution and BatchNorm (option B)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        conv, norm = self
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, NormAct)
        return conv_norm_act(conv, norm, x)[0]


def _shortcut(kind: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "pad":
        return Pad(out_channels - in_channels, stride)
    projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
    return Projection(projection, NormAct(out_channels, relu=False))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = NormAct(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels, 1)
        self.bn2 = NormAct(out_channels)
        self.shortcut = _shortcut(shortcut, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        y, x = conv_norm_act(self.conv1, self.bn1, x)
        return conv_norm_act(self.conv2, self.bn2, y, self.shortcut(x))[0]


class ResNet(nn.Module):
    """Stem, three stages, global average pooling, dropout, dense layer."""

    def __init__(
        self,
        blocks: int,
        widths: Sequence[int],
        classes: int,
        shortcut: str,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = _conv3x3(3, widths[0], 1)
        self.bn = NormAct(widths[0])
        stages, channels = [], widths[0]
        for index, width in enumerate(widths):
            strides = [2 if index else 1] + [1] * (blocks - 1)
            layers = []
            for stride in strides:
                layers.append(BasicBlock(channels, width, stride, shortcut))
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.dropout = SampleDropout(widths[-1], dropout)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, K), of normalised images, (N, 3, H, W)."""
        x, _ = conv_norm_act(self.stem, self.bn, images)
        return self.head(self.dropout(self.stages(x).mean(dim=(2, 3))))


def resnet(config: ModelConfig, classes: int, seed: int = 0) -> ResNet:
    """The configured model, its weights a function of `seed` (He et al. 2015b: normal, fan-in)."""
    widths = tuple(config.widths)
    if config.name == "m6" and widths == _DEFAULT_WIDTHS:
        widths = _M6_WIDTHS
    blocks = BLOCKS_PER_STAGE[config.name]
    model = ResNet(blocks, widths, classes, config.shortcut, config.dropout)
    generator = torch.Generator().manual_seed(int(stream_key(seed, Stream.INIT)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model
