"""What a data set comes to: its fingerprint, its mean and standard deviation."""

import hashlib
import json
import math

import numpy as np

from dist_resnet.data.images import Images, ImageSet, blocks

Channels = tuple[float, float, float]


def fingerprint(image_set: ImageSet) -> str:
    """SHA-256 over class names, shapes, labels and pixels of both splits, in their order."""
    digest = hashlib.sha256(json.dumps(image_set.classes).encode())
    for split in (image_set.train, image_set.test):
        digest.update(json.dumps(split.images.shape).encode())
        digest.update(np.ascontiguousarray(split.labels, "<i8").data)
        for block in blocks(split.images):
            digest.update(block.data)
    return digest.hexdigest()


def channel_statistics(images: Images) -> tuple[Channels, Channels]:
    """Mean and standard deviation (population) of each channel of (N, H, W, 3) uint8 images.

    Sums are exact integers, so that neither order nor machine shows in the last digit.
    """
    counts = np.zeros((3, 256), np.int64)
    for block in blocks(images):
        for channel in range(3):
            part = block[..., channel].reshape(-1)
            counts[channel] += np.bincount(part, minlength=256)
    mean, std = [], []
    for histogram in counts.tolist():  # Python's integers do not overflow
        number = sum(histogram)
        total = sum(value * n for value, n in enumerate(histogram))
        squares = sum(value * value * n for value, n in enumerate(histogram))
        mean.append(total / number)
        std.append(math.sqrt(number * squares - total * total) / number)
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
