"""Layers equivariant to mirroring the image left to right (Cohen and Welling 2016, "Group
Equivariant Convolutional Networks", arxiv.org/abs/1602.07576, here with a group of two elements).

Channels come in two halves. Mirroring the image mirrors every map and swaps the halves: each kernel
is used twice, once mirrored. Layers have half the parameters of plain ones of the same width, and
the same arithmetic. The mean over pixels and halves is the same for an image and its mirror image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from machine import triton_kernels


class Paired(nn.Module):
    """The weight (C, 1 or 3, k, k) of a depthwise convolution, or of one on the RGB image: kernels
    (C/2, 1 or 3, k, k) for half of the outputs, their mirror images for the other half."""

    def forward(self, kernels: Tensor) -> Tensor:
        if self.training and (gpu := triton_kernels(kernels)):
            return gpu.mirrored(kernels, None)
        return torch.cat([kernels, kernels.flip(3)])

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight[: len(weight) // 2].clone()  # with a view, a file would hold the whole weight


class Mixed(nn.Module):
    """The weight (C, D, k, k) of a convolution that mixes D channels, from kernels (C/2, D/2, k, k)
    for what both halves have in common and for what differs. As a matrix with a row for each output
    it has the singular values and the norm of those two together, so the optimiser works as on a
    plain convolution's weight."""

    def forward(self, alike: Tensor, differing: Tensor) -> Tensor:
        if self.training and (gpu := triton_kernels(alike)):
            return gpu.mirrored(alike, differing)
        own = alike.lerp(differing, 0.5)  # from each half of the inputs to its own of the outputs
        other = own - differing  # to the other half
        return torch.cat([torch.cat([own, other.flip(3)], 1), torch.cat([other, own.flip(3)], 1)])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        own, other = weight[: len(weight) // 2].chunk(2, 1)
        return own + other.flip(3), own - other.flip(3)


def mirrored(convolution: nn.Conv2d) -> nn.Conv2d:
    """`convolution`, its weight made from kernels that serve both halves."""
    mixes = convolution.groups == 1 and convolution.in_channels != 3
    halves = Mixed() if mixes else Paired()
    return parametrize.register_parametrization(convolution, "weight", halves)


class MirrorNorm(nn.BatchNorm2d):
    """BatchNorm of maps (N, 2 × num_features, H, W) whose halves share scale, shift and statistics,
    as if they were one map of twice the width. Then `skip`, if given, is added and ReLU applied."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.training:
            gpu = triton_kernels(x)
            return gpu.norm(self, x, skip) if gpu else self.by_pytorch(x, skip)
        # A plain batch norm, which other programs can fold into the convolution.
        halves = (self.running_mean, self.running_var, self.weight, self.bias)
        x = F.batch_norm(x, *(each.repeat(2) for each in halves), eps=self.eps)
        return F.relu(x if skip is None else skip + x)

    def by_pytorch(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """The training forward, on views: for channels-last maps none of this copies a map."""
        n, channels, height, width = x.shape

        def widened(x: Tensor) -> Tensor:
            x = x.permute(0, 2, 3, 1).reshape(n, height, 2 * width, channels // 2)
            return x.permute(0, 3, 1, 2)

        y = super().forward(widened(x))
        y = F.relu(y if skip is None else y + widened(skip))
        return y.permute(0, 2, 3, 1).reshape(n, height, width, channels).permute(0, 3, 1, 2)


class MirrorPool(nn.Module):
    """The mean (N, C) of maps (N, 2C, H, W) over their pixels and both halves."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).unflatten(1, (2, -1)).mean(1)
