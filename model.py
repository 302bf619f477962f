"""The default net, `atrous`, and `build(name, num_classes)` for every net there is."""

from torch import Tensor, nn

import zoo
from common import UserError
from mirror import MirrorNorm, MirrorPool, mirrored


def conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution without bias, padded equally on each side so that only a stride changes the
    map's size. A stride of 2 needs an even kernel: an odd one is centred on every other pixel, and
    mirroring the map would move its centres to the pixels in between."""
    padding = (dilation * (kernel - 1) + 2 - stride) // 2
    window = kernel, stride, padding, dilation
    return mirrored(nn.Conv2d(inputs, outputs, *window, groups, bias=False))


def dense(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Sequential:
    """A convolution, BatchNorm and ReLU."""
    return nn.Sequential(conv(inputs, outputs, kernel, **options), MirrorNorm(outputs // 2))


def separable(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Sequential:
    """A depthwise convolution, then a 1×1 that mixes channels, BatchNorm and ReLU."""
    depthwise = conv(inputs, inputs, kernel, groups=inputs, **options)
    return nn.Sequential(depthwise, *dense(inputs, outputs, 1))


class Residual(nn.Module):
    """Layers with a shortcut: the last one, a MirrorNorm, adds the block's input before its ReLU.
    Its scale starts at zero, so that the block starts as the identity."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        *layers, norm = self.layers
        y = x
        for layer in layers:
            y = layer(y)
        return norm(y, x)


def atrous(num_classes: int, dropout: float) -> nn.Sequential:
    """Residual blocks (He et al. 2016): a dense 3×3 one where the map is large and channels are
    few, then separable ones. An image and its mirror image have the same logits (mirror.py). No
    layer with a stride is dilated: with stride 2 and dilation 2 all taps fall on rows and columns
    of one parity, and three quarters of the map are computed for nothing.
    """
    return nn.Sequential(
        dense(3, 32),  # 32×32
        Residual(*dense(32, 32), *dense(32, 32)),
        dense(32, 96, 2, stride=2),  # 16×16
        Residual(*separable(96, 96), *separable(96, 96)),
        Residual(*separable(96, 96), *separable(96, 96, dilation=2)),
        separable(96, 208, 4, stride=2),  # 8×8
        Residual(*separable(208, 208, 5), *separable(208, 208)),
        Residual(*separable(208, 208), *separable(208, 208)),
        Residual(*separable(208, 208), *separable(208, 208)),
        MirrorPool(),
        nn.Dropout(dropout),
        nn.Linear(104, num_classes),
    )


NETS = {"atrous": atrous, **zoo.NETS}


def build(name: str, num_classes: int, dropout: float = 0.0) -> nn.Module:
    """The net `name`, giving logits (N, num_classes) for images (N, 3, 32, 32).

    Raises UserError for a name that is not in NETS, or what is no function of these arguments.
    """
    if name not in NETS:
        raise UserError(f"--net {name}: not in NETS of model.py")
    try:
        return NETS[name](num_classes, dropout)
    except TypeError as error:
        raise UserError(
            f"--net {name}: NETS must hold a function of (num_classes, dropout): {error}"
        ) from error
