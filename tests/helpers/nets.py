"""Nets as users write them, for images of 16x16 pixels and up: good ones and bad ones."""

import os
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

OWN = np.random.default_rng(0)


class Base(nn.Module):
    """A convolution, a dense layer, and what a subclass puts between."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2)
        self.head = nn.Linear(width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.conv(images)).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Any:
        return self.head(self.between(self.features(images)))

    def between(self, x: Tensor) -> Any:
        return x


class Plain(Base):
    """Nothing but layers."""


class Grouped(Base):
    """Normalised without a batch's statistics."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.norm = nn.GroupNorm(2, 8)

    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(images))).mean(dim=(2, 3))


class Constant(Grouped):
    """A buffer that nothing changes."""

    factor: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("factor", torch.tensor(0.7))

    def between(self, x: Tensor) -> Tensor:
        return x * self.factor


class Counting(Base):
    """nn.Dropout, and an integer buffer that it replaces by another tensor."""

    steps: Tensor

    def __init__(self, num_classes: int, drop: float = 0.4) -> None:
        super().__init__(num_classes)
        self.drop = nn.Dropout(drop)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int32))

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps = self.steps + len(x)
        return self.drop(x)


class Depth(Base):
    """Stochastic depth, drawn by the function that everybody copies."""

    def between(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x + x * x.new_empty(len(x), 1).bernoulli_(0.5)


class Averaging(Base):
    """torch's BatchNorm with a cumulative mean, and a running mean of its own."""

    running: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.norm = nn.BatchNorm2d(8, momentum=None)
        self.register_buffer("running", torch.zeros(8))

    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(images))).mean(dim=(2, 3))

    def between(self, x: Tensor) -> Tensor:
        y = x - self.running
        if self.training:
            self.running = 0.9 * self.running + 0.1 * x.mean(dim=0)
        return y


class Tied(Base):
    """One matrix used twice, one Parameter under two names."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def between(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)))


class Unused(Base):
    """A branch that no forward pass takes, and one that some take."""

    calls: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.never, self.sometimes = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x + self.sometimes(x) if self.calls % 2 else x


class Odd(Base):
    """Parameters and buffers of unusual shapes, layouts and contents."""

    mask: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.expanded = nn.Parameter(torch.ones(1).expand(8))
        self.turned = nn.Parameter(torch.eye(8)[:, ::2])
        self.cube = nn.Parameter(torch.ones(1, 1, 1, 1, 8))
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]).expand(4, 2))
        self.register_buffer("exact", torch.ones(3, dtype=torch.float64))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("table", torch.arange(8), persistent=False)

    def between(self, x: Tensor) -> Tensor:
        y = x * self.expanded * self.scalar * self.cube.view(8)
        return y + torch.cat([x @ self.turned] * 2, dim=1)


class Mixing(Base):
    """Looks at the other images without any buffer."""

    def between(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


class Whole(Base):
    """Fixed to images of 16x16."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.dense = nn.Linear(3 * 16 * 16, 8)

    def features(self, images: Tensor) -> Tensor:
        return self.dense(images.flatten(1))


class Reparametrised(Base):
    """Weight normalisation and spectral normalisation, as torch has them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        nn.utils.parametrizations.weight_norm(self.conv)
        self.dense = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x))


class Attention(Base):
    """Patches, an embedding of places, torch's own encoder layer with its dropout."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.place = nn.Parameter(torch.zeros(1, 16, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def features(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.place
        return self.encoder(tokens).mean(dim=1)


# Bad ones.


class Tuple(Base):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images), images


class Narrow(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes + 1)


class Integers(Base):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images).long()


class Detached(Base):
    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        return super().forward(images)


class PythonDraws(Base):
    def between(self, x: Tensor) -> Tensor:
        return x * random.random()


class NumpyDraws(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.noise = Noise()

    def between(self, x: Tensor) -> Tensor:
        return self.noise(x)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + float(np.random.normal()) if self.training else x


class OwnDraws(Base):
    """From a generator of the module's."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.generator = torch.Generator()

    def between(self, x: Tensor) -> Tensor:
        return x * torch.rand(1, generator=self.generator)


class GlobalDraws(Base):
    """From a generator of the file's."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.noise = GlobalNoise()

    def between(self, x: Tensor) -> Tensor:
        return self.noise(x)


class GlobalNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(OWN.random()) if self.training else x


class Attribute(Base):
    calls = 0

    def between(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class NumpyCount(Attribute):
    calls = np.int64(0)  # type: ignore[assignment]


class Within(Base):
    """A counter within an object."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.kept = SimpleNamespace(calls=0, seen={1})

    def between(self, x: Tensor) -> Tensor:
        self.kept.calls += 1
        return x


class Minimum(Base):
    """A buffer that begins where there is no mean."""

    low: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("low", torch.tensor(torch.inf))

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.low.copy_(torch.minimum(self.low, x.detach().float().min()))
        return x


class Projected(Base):
    """Good: what is drawn when it is built, and not saved, follows from the seed."""

    seen: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("seen", torch.randn(8, 8), persistent=False)

    def between(self, x: Tensor) -> Tensor:
        return x @ self.seen.to(x.dtype)


class Resting(Base):
    """Good: its maker left a part in evaluation mode, which training ends."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.norm = nn.BatchNorm1d(8).eval()

    def train(self, mode: bool = True) -> Any:
        """Without its result, as many write it."""
        super().train(mode)

    def between(self, x: Tensor) -> Tensor:
        return self.norm(x)


class LateDraws(Base):
    """Good: draws from its seventh pass in training on, beyond any trial."""

    passes: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            if self.passes > 6:
                return F.dropout(x, 0.5)
        return x


class History(Base):
    """A running mean that is no buffer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.mean = torch.zeros(8)

    def between(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(dim=0).detach()
        return x - self.mean


class Cache(Base):
    """Good: an attribute that is the same after every pass over the same images."""

    last: Any = None

    def between(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        return x


class Unsaved(Counting):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)


class Double(Base):
    total: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def between(self, x: Tensor) -> Tensor:
        self.total += 1
        return x


class Growing(Base):
    bank: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("bank", torch.zeros(0, 8))

    def between(self, x: Tensor) -> Tensor:
        self.bank = torch.cat([self.bank, x.detach()])
        return x


class Attached(Base):
    running: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("running", torch.zeros(8))

    def between(self, x: Tensor) -> Tensor:
        self.running.mul_(0.9).add_(x.mean(dim=0))
        return x


class EvaluationDraws(Base):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x)


class EvaluationMoves(Counting):
    def between(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x


class Half(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.head.half()


class Lazy(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.late = nn.LazyLinear(8)


class Meta(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.late = nn.Linear(8, 8, device="meta")


class Frozen(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.requires_grad_(False)


class Empty(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


class Shared(Base):
    """One memory, two Parameters."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.copy = nn.Parameter(self.head.weight.data)


class Extra(Base):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Unseeded(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        nn.init.constant_(self.head.bias, float(np.random.rand()))


class Failing(Base):
    def between(self, x: Tensor) -> Tensor:
        raise ValueError("no luck\nwith this")


class NoBackward(Base):
    """In place, on what the backward pass needs."""

    def between(self, x: Tensor) -> Tensor:
        y = x.exp()
        y += y.square()
        return y


class Synchronised(Base):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.norm = nn.SyncBatchNorm(8)


class Viewing(Base):
    """Good where images are NCHW in memory."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.head = nn.Linear(8 * 7 * 7, num_classes)

    def features(self, images: Tensor) -> Tensor:
        return self.conv(images).view(len(images), -1)


class Rows(Base):
    """Good where images are NCHW in memory, of any size."""

    def features(self, images: Tensor) -> Tensor:
        return super().features(images.view(len(images), -1).view(images.shape))


_kept: dict[int, nn.Module] = {}


def kept(num_classes: int) -> nn.Module:
    return _kept.setdefault(num_classes, Plain(num_classes))


def not_a_module(num_classes: int) -> Any:
    return {"classes": num_classes}


def aborts(num_classes: int) -> nn.Module:
    """As a C++ exception that nobody catches."""
    os.write(2, b"terminate called after throwing\n  what():  out of luck\n\n")
    os.abort()


def by_n_classes(n_classes: int) -> nn.Module:
    return Plain(n_classes)


def by_classes(width: int, classes: int) -> nn.Module:
    return Plain(classes, width)


def by_num_labels(num_labels: int = 2) -> nn.Module:
    return Plain(num_labels)


def by_nclass(*, nclass: int) -> nn.Module:
    return Plain(nclass)


def by_keywords(**kwargs: int) -> nn.Module:
    return Plain(**kwargs)


def fixed() -> nn.Module:
    return Plain(5)
