"""Convolution, BatchNorm, addition and ReLU of a ResNet's layer, for replicas side by side too."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_resnet.kernels import support
from dist_resnet.native import norm_act as native


class NormAct(nn.BatchNorm2d):
    """BatchNorm, then the addition of a shortcut if there is one, then ReLU where wanted.

    In training a batch may hold the images of several replicas, one replica's after the other's.
    Each is normalised by its own statistics, and the running ones become the sum, over the
    replicas, of what each alone would leave.
    """

    fused = False
    """In training, as our kernel where it is made for the tensor."""
    replicas = 1
    """Of how many replicas a batch in training holds the images."""

    def __init__(self, channels: int, relu: bool = True) -> None:
        super().__init__(channels)
        # Only momentum=None reads this counter; counting costs one kernel a layer a step.
        self.num_batches_tracked = None
        self.relu = relu

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """(N, C, H, W), and a shortcut like it, to the same shape."""
        if self.fused and self.training:
            if native.accepts(x, shortcut, self.replicas):
                return native.norm_act(self, x, shortcut, self.relu, self.replicas)
            if support.usable(x.device):
                from dist_resnet.kernels import norm_act as triton  # Triton is not everywhere

                if triton.accepts(x, shortcut, self.replicas):
                    return triton.norm_act(self, x, shortcut, self.relu, self.replicas)
        y = super().forward(x) if self.replicas == 1 or not self.training else self._side_by_side(x)
        if shortcut is not None:
            y = y + shortcut
        return F.relu(y, inplace=True) if self.relu else y

    def _side_by_side(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        results, means, variances = [], [], []
        for part in x.chunk(self.replicas):
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            results.append(
                F.batch_norm(
                    part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps
                )
            )
            means.append(mean)
            variances.append(variance)
        with torch.no_grad():
            self.running_mean.copy_(torch.stack(means).sum(dim=0))
            self.running_var.copy_(torch.stack(variances).sum(dim=0))
        return torch.cat(results)


def conv_norm_act(
    conv: nn.Conv2d, norm: NormAct, x: Tensor, shortcut: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """norm(conv(x), shortcut), as one operation where our kernels are made for it; and x.

    Whoever else uses x takes the one returned: where both gradients meet, they are then added
    within our kernel.
    """
    if norm.fused and norm.training and support.usable(x.device):
        from dist_resnet.kernels import conv as triton  # Triton is not everywhere

        if triton.accepts(conv, x, shortcut, norm.replicas):
            return triton.conv_norm_act(conv, norm, x, shortcut, norm.relu, norm.replicas)
    return norm(_convolved(conv, x), shortcut), x


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x), a narrow 1x1 one with a stride on the pixels that it reads only.

    Of fewer than 8 channels, oneDNN's AVX2 kernel for the weight's gradient corrupts memory
    (https://github.com/uxlfoundation/oneDNN/issues/6035, in torch 2.14).
    """
    down, across = conv.stride
    if conv.kernel_size == (1, 1) and (down, across) != (1, 1) and conv.in_channels < 8:
        return F.conv2d(x[:, :, ::down, ::across], conv.weight, conv.bias)
    return conv(x)
