"""TrivialAugment (Müller and Hutter 2021), wide, of whole batches: one operation an image.

Operations and magnitudes are torchvision's TrivialAugmentWide on uint8 tensors, level for level;
only a pixel that a shear or a rotation takes from the very border between two pixels may come from
the other one.

Shapes: N images, H W pixels, uint8 (N, H, W, 3).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_resnet.augment.colour import GREY
from dist_resnet.base.randomness import whole_below

OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
    "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
BINS = 31
_MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


class TrivialAugment:
    """Holds its tables on the device of the first batch; images are all of one size."""

    lanes = 3

    def __init__(self) -> None:
        self._tables: _Tables | None = None

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Apply an operation to each image.

        Args:
            draws: float32 (N, 3) in [0, 1): of the operation, its magnitude and its sign.
        """
        operation, magnitude, sign = (
            whole_below(draws[:, lane], bound)
            for lane, bound in enumerate((len(OPERATIONS), BINS, 2))
        )
        return self.apply(images, operation, magnitude, sign)

    def apply(self, images: Tensor, operation: Tensor, magnitude: Tensor, sign: Tensor) -> Tensor:
        """Each image's own operation, all of them int64 (N,), without a wait for the device.

        Args:
            magnitude: its number, from 0 to 30.
            sign: 0, or 1 where the magnitude is negative.
        """
        if self._tables is None:
            self._tables = _Tables.of(images.shape[1], images.shape[2], images.device)
        tables = self._tables
        move = operation - OPERATIONS.index(_MOVES[0])
        row = 1 + (move * 2 + sign) * BINS + magnitude
        row = torch.where((move >= 0) & (move < len(_MOVES)), row, 0)
        pixels, grey = images.float(), _grey(images)
        mean = grey.long().sum(dim=(1, 2, 3), keepdim=True).float() / grey[0].numel()
        others = {
            "Brightness": torch.zeros_like(pixels),
            "Color": grey.expand_as(pixels),
            "Contrast": mean.expand_as(pixels),
            "Sharpness": _blurred(images),
        }
        blend = (operation - OPERATIONS.index(next(iter(others)))).clamp(0, len(others) - 1)
        factor = tables.factors[sign, magnitude].view(-1, 1, 1, 1, 2)
        other = _each(list(others.values()), blend)
        bits, threshold = (t.view(-1, 1, 1, 1) for t in tables.limits[magnitude].unbind(1))
        results = [
            _moved(images, tables.sources.index_select(0, row)),
            (factor[..., 0] * pixels + factor[..., 1] * other).clamp(0, 255).byte(),
            images & bits.byte(),
            torch.where(pixels >= threshold, 255 - images, images),
            _stretched(pixels),
            _equalized(images),
        ]
        return _each(results, tables.kinds.index_select(0, operation))


@dataclass(frozen=True)
class _Tables:
    """What the operations look up."""

    sources: Tensor
    """Of `_source_table`."""
    factors: Tensor
    """float32 (2, 31, 2): of blends, by sign and magnitude: f and 1 - f."""
    limits: Tensor
    """float32 (31, 2): the mask of the bits that posterising keeps, and solarising's threshold."""
    kinds: Tensor
    """int64 (14,): how each operation computes: moves, blends, and four that do neither."""

    @staticmethod
    def of(height: int, width: int, device: torch.device) -> "_Tables":
        magnitudes = torch.linspace(0.0, 0.99, BINS).double()
        factors = torch.stack([1 + magnitudes, 1 - magnitudes])
        bits = 8 - (torch.arange(BINS) / ((BINS - 1) / 6)).round().int()
        limits = torch.stack([256.0 - 2.0 ** (8 - bits), torch.linspace(255.0, 0.0, BINS)], dim=1)
        # torchvision sharpens nothing that is all border.
        kinds = torch.tensor([0] * 6 + [1] * 3 + [int(min(height, width) > 2), 2, 3, 4, 5])
        return _Tables(
            _source_table(height, width).to(device),
            torch.stack([factors, 1 - factors], dim=2).float().to(device),
            limits.to(device),
            kinds.to(device),
        )


def _each(candidates: list[Tensor], which: Tensor) -> Tensor:
    """Image i of candidate which[i], int64 (N,): copied whole, as masks took half of all time."""
    count = len(which)
    position = which * count + torch.arange(count, device=which.device)
    return torch.cat(candidates).index_select(0, position)


def _source_table(height: int, width: int) -> Tensor:
    """int32 (1 + 5 * 2 * 31, H W): which pixel each takes, H W where none; the first: its own."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    y, x = rows - (height - 1) / 2, columns - (width - 1) / 2
    tables = [np.arange(height * width)]
    for name in _MOVES:
        largest = {"S": 0.99, "T": 32.0, "R": 135.0}[name[0]]
        magnitudes = torch.linspace(0.0, largest, BINS).double().numpy()
        for magnitude in (*magnitudes, *-magnitudes):
            turn = math.radians(magnitude)
            # Sheared from the upper left corner, turned around the centre.
            from_x, from_y = {
                "ShearX": (x + magnitude * (y + height / 2), y),
                "ShearY": (x, y + magnitude * (x + width / 2)),
                "TranslateX": (x - int(magnitude), y),
                "TranslateY": (x, y - int(magnitude)),
                "Rotate": (
                    math.cos(turn) * x - math.sin(turn) * y,
                    math.sin(turn) * x + math.cos(turn) * y,
                ),
            }[name]
            # To the millionth first: no sine's last bit decides between two pixels.
            row = np.rint(np.round(from_y + (height - 1) / 2, 6)).astype(np.int64)
            column = np.rint(np.round(from_x + (width - 1) / 2, 6)).astype(np.int64)
            there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            tables.append(np.where(there, row * width + column, height * width).ravel())
    return torch.from_numpy(np.stack(tables).astype(np.int32))


def _moved(images: Tensor, sources: Tensor) -> Tensor:
    """Each pixel from the place, int (N, H W), that it is taken from; black where that is none."""
    padded = F.pad(images.flatten(1, 2), (0, 0, 0, 1))
    return padded.gather(1, sources.long().unsqueeze(2).expand(-1, -1, 3)).view(images.shape)


def _grey(images: Tensor) -> Tensor:
    """float32 (N, H, W, 1), whole numbers."""
    red, green, blue = images.unbind(3)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue).floor().unsqueeze(3)


def _blurred(images: Tensor) -> Tensor:
    """float32: means of 3x3 pixels, the middle one five times; the border as it is."""
    whole = images.int()
    height, width = images.shape[1:3]
    if min(height, width) <= 2:
        return images.float()
    rows = whole[:, :-2] + whole[:, 1:-1] + whole[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * whole[:, 1:-1, 1:-1]
    blurred = whole.clone()
    blurred[:, 1:-1, 1:-1] = (2 * sums + 13) // 26  # rounded: there are no halves of thirteenths
    return blurred.float()


def _stretched(pixels: Tensor) -> Tensor:
    """Each channel's darkest pixel to 0 and its lightest to 255; a uniform one stays."""
    lowest, highest = pixels.amin(dim=(1, 2), keepdim=True), pixels.amax(dim=(1, 2), keepdim=True)
    uniform = lowest == highest
    scale = torch.where(uniform, 1.0, 255 / (highest - lowest))
    return ((pixels - torch.where(uniform, 0.0, lowest)) * scale).clamp(0, 255).byte()


def _equalized(images: Tensor) -> Tensor:
    """Each channel with a histogram as flat as can be."""
    count, height, width, _ = images.shape
    values = images.permute(0, 3, 1, 2).reshape(count * 3, -1).long()
    places = values + 256 * torch.arange(count * 3, device=images.device).unsqueeze(1)
    histogram = torch.zeros(count * 3 * 256, dtype=torch.int64, device=images.device)
    histogram = histogram.scatter_add(0, places.flatten(), torch.ones_like(places).flatten())
    histogram = histogram.view(count * 3, 256)
    of_lightest = histogram.gather(1, values.amax(dim=1, keepdim=True))
    step = (height * width - of_lightest) // 255
    divisor = step.clamp(min=1)
    table = F.pad((histogram.cumsum(1) + step // 2) // divisor, (1, 0))[:, :-1].clamp(0, 255)
    equalized = torch.where(step > 0, table.gather(1, values), values)
    return equalized.byte().view(count, 3, height, width).permute(0, 2, 3, 1)
