"""Other ways to compute the convolutions that oneDNN, PyTorch's library for them on a CPU, does
badly. Milliseconds are of forward and backward of a batch of 256 in float32 on two cores of an AMD
EPYC with AVX2, torch 2.14, unless another machine is named."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Convolution = Callable[[Tensor], Tensor]


def take_over(net: nn.Module) -> None:
    """Have each of the net's convolutions computed in the best way known here."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.forward = partial(convolve, layer, layer.forward)


def convolve(layer: nn.Conv2d, own: Convolution, x: Tensor) -> Tensor:
    if is_product(layer):
        return as_product(layer, x)
    if has_grids(layer, x):
        return on_grids(layer, x)
    return precisely(layer, own, x, layer.stride, layer.dilation)


def is_product(layer: nn.Conv2d) -> bool:
    """Whether it is 1×1, with many weights, on a CPU with AVX2 at best: there the gradient of 208 ×
    208 weights or more takes two threads longer than one. A matrix product takes 40 ms, not 60."""
    one = layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
    many = layer.groups == 1 and layer.in_channels * layer.out_channels > 200 * 200
    return one and many and torch.backends.cpu.get_cpu_capability() == "AVX2"


def as_product(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return maps(F.linear(pixels(x), layer.weight.flatten(1), layer.bias))


def has_grids(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether `on_grids` applies: the dilation divides the padding, and equals the stride or, if
    that is 1, divides the map's sides too."""
    windows = (layer.dilation, layer.padding, layer.stride)
    if any(len(set(window)) > 1 for window in windows):
        return False
    d, padding, stride = (window[0] for window in windows)
    zeros = layer.padding_mode == "zeros"
    whole = stride == 1 and x.shape[2] % d == x.shape[3] % d == 0
    return d > 1 and zeros and padding % d == 0 and (stride == d or whole)


def on_grids(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of dilation d as plain ones on the d × d grids of every d-th row and column, as
    in TensorFlow's space_to_batch: no output sees more than one grid, and with a stride of d all
    see the first. A depthwise 3×3 of 96 channels at 16×16 takes 25 ms instead of 159."""
    d = layer.dilation[0]

    def plain(x: Tensor) -> Tensor:
        padding = layer.padding[0] // d
        return F.conv2d(x, layer.weight, layer.bias, 1, padding, 1, layer.groups)

    if layer.stride[0] == d:
        return precisely(layer, plain, maps(pixels(x)[:, ::d, ::d].contiguous()))
    grids = pixels(x).unflatten(2, (-1, d)).unflatten(1, (-1, d)).permute(2, 4, 0, 1, 3, 5)
    y = precisely(layer, plain, maps(grids.flatten(0, 2)))
    rows = pixels(y).unflatten(0, (d, d, -1)).permute(2, 3, 0, 4, 1, 5).flatten(3, 4)
    return maps(rows.flatten(1, 2))


def pixels(x: Tensor) -> Tensor:
    """Maps as they lie in memory, (N, H, W, C), so that views and copies of them, and of their
    gradients, are channels-last again."""
    return x.permute(0, 2, 3, 1)


def maps(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2)


def precisely(
    layer: nn.Conv2d,
    convolution: Convolution,
    x: Tensor,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """`convolution`, in float32 even under autocast where bfloat16 is slow or wrong. It is slow in
    depthwise ones with a stride or a kernel larger than 3×3: part of their backward takes many
    times as long (one core of an AMD EPYC with AVX512-BF16: 3×3, stride 2, 64 channels at 16×16,
    106 ms against 3.3 for the gradient of the input; 5×5, 208 channels at 8×8, 88 against 30 for
    that of the weight), while others take half as long. It is wrong in dilated ones of stride 1,
    where a group's inputs do not fill blocks of 16: on maps 32 wide the gradient of their weight is
    NaN or merely wrong there (torch 2.14 with oneDNN 3.12, AVX512-BF16 without AMX)."""
    inputs = layer.in_channels // layer.groups
    slow = inputs == 1 < layer.groups and (stride != (1, 1) or max(layer.kernel_size) > 3)
    wrong = dilation != (1, 1) and stride == (1, 1) and inputs % 16
    if not (slow or wrong):
        return convolution(x)
    with torch.autocast(x.device.type, enabled=False):
        return convolution(x.float()).to(x.dtype)
