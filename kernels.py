"""Triton kernels for where a GPU's time went: BatchNorm with what comes behind it, depthwise
convolutions with a stride or dilation, and the weights of mirrored layers.

Maps are channels-last: matrices with a row for each pixel. No sum depends on which program ends
first: the same inputs give the same bits.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from machine import triton_kernels

LAST = torch.channels_last
PROGRAMS = tl.constexpr(128)  # at most, that share the rows of a sum


def take_over(net: nn.Module) -> None:
    """Has this file compute the depthwise convolutions that cuDNN is slow at in channels-last, with
    a stride or dilation: on an H100 in bf16 it took 481 and 637 µs for a batch of 256, forward and
    backward, where this takes 74 and 77."""

    def forward(layer: nn.Conv2d, x: Tensor) -> Tensor:
        if not triton_kernels(x):
            return type(layer).forward(layer, x)
        return depthwise(x, layer.weight, layer.stride[0], layer.padding[0], layer.dilation[0])

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels:
            windows = layer.kernel_size, layer.stride, layer.padding, layer.dilation
            square = all(len(set(window)) == 1 for window in windows)
            slow = layer.stride != (1, 1) or layer.dilation != (1, 1)
            if slow and square and layer.out_channels == layer.groups and layer.bias is None:
                layer.forward = partial(forward, layer)


def depthwise(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """`conv2d(x, weight, None, stride, padding, dilation, C)` of square maps (N, C, W, W), weight
    (C, 1, K, K); sums in float32."""
    return _Depthwise.apply(x, weight, stride, padding, dilation)


def norm(layer: nn.BatchNorm2d, x: Tensor, skip: Tensor | None) -> Tensor:
    """What mirror.MirrorNorm does in training."""
    running = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    running = running if layer.track_running_stats else None
    return _Norm.apply(
        x, skip, layer.weight, layer.bias, running, layer.momentum, layer.eps, layer.relu
    )


def mirrored(alike: Tensor, differing: Tensor | None) -> Tensor:
    """The weight of mirror.Mixed, or of mirror.Paired where nothing is `differing`, in the dtype
    that convolutions are computed in."""
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else alike.dtype
    return _Mirrored.apply(alike, differing, dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        skip: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor, Tensor, Tensor] | None,
        momentum: float,
        eps: float,
        relu: bool,
    ) -> Tensor:
        x = x.contiguous(memory_format=LAST)
        skip = None if skip is None else skip.contiguous(memory_format=LAST)
        shape = _Shape(x, len(weight))
        partial = x.new_empty(shape.programs, 2, shape.channels, dtype=torch.float32)
        _moments[shape.programs,](x, partial, shape.rows, **shape.tile)
        saved = torch.empty_like(partial[0])
        blocks = triton.cdiv(shape.channels, 16)
        counts = shape.channels, shape.programs, shape.rows
        _settle[blocks,](x, partial, saved, *(running or [None] * 3), *counts, momentum, eps)
        y = torch.empty_like(x)
        _normalize[shape.tiles,](x, skip, saved, weight, bias, y, shape.rows, relu, **shape.tile)
        ctx.save_for_backward(x, saved, weight, y if relu else None)
        ctx.skips = skip is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, saved, weight, y = ctx.saved_tensors
        dy = dy.contiguous(memory_format=LAST)
        shape = _Shape(x, len(weight))
        partial = x.new_empty(shape.programs, 2, shape.channels, dtype=torch.float32)
        cut = torch.empty_like(x) if ctx.skips and y is not None else None
        _gradient_sums[shape.programs,](dy, y, cut, x, saved, partial, shape.rows, **shape.tile)
        if cut is not None:
            dy, y = cut, None
        sums = partial.sum(0)
        dx = torch.empty_like(x)
        _gradient[shape.tiles,](dy, y, x, saved, sums, weight, dx, shape.rows, **shape.tile)
        return dx, dy if ctx.skips else None, sums[1], sums[0], None, None, None, None


class _Shape:
    """Of x (N, C × some, H, W) as a matrix (rows, C), and how programs share it."""

    def __init__(self, x: Tensor, channels: int) -> None:
        self.channels, self.rows = channels, x.numel() // channels
        block = triton.next_power_of_2(channels)
        rows = max(1, 16384 // block)
        self.tile = {"C": channels, "ROWS": rows, "BLOCK": block, "num_warps": 16}
        self.tiles = triton.cdiv(self.rows, rows)
        self.programs = min(PROGRAMS.value, self.tiles)


@triton.jit
def _moments(x, partial, rows, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of x (rows, C) less its first row, and of the squares: partial (programs, 2, C)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    first = tl.load(x + column, mask=column < C, other=0).to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(program * ROWS, rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (column < C)
        value = tl.load(x + row[:, None] * C + column, mask=there, other=0).to(tl.float32)
        value = tl.where(there, value - first, 0)
        sums += value
        squares += value * value
    partial += program * 2 * C + column
    tl.store(partial, tl.sum(sums, 0), mask=column < C)
    tl.store(partial + C, tl.sum(squares, 0), mask=column < C)


@triton.jit(do_not_specialize=["channels", "programs", "rows"])
def _settle(
    x, partial, saved, running_mean, running_var, count, channels, programs, rows, momentum, eps
):
    """From the sums, `saved` (2, channels): mean, and one over the standard deviation. The running
    ones move towards them, if they are given."""
    column = tl.program_id(0) * 16 + tl.arange(0, 16)
    program = tl.arange(0, PROGRAMS)
    there = column < channels
    known = (program < programs)[:, None] & there
    address = partial + program[:, None] * 2 * channels + column
    shift = tl.sum(tl.load(address, mask=known, other=0), 0) / rows
    square = tl.sum(tl.load(address + channels, mask=known, other=0), 0) / rows
    mean = tl.load(x + column, mask=there, other=0).to(tl.float32) + shift
    var = square - shift * shift
    tl.store(saved + column, mean, mask=there)
    tl.store(saved + channels + column, 1 / tl.sqrt(var + eps), mask=there)
    if running_mean is not None:
        before = tl.load(running_mean + column, mask=there)
        tl.store(running_mean + column, before + momentum * (mean - before), mask=there)
        before = tl.load(running_var + column, mask=there)
        unbiased = var * (rows / (rows - 1))
        tl.store(running_var + column, before + momentum * (unbiased - before), mask=there)
        if tl.program_id(0) == 0:
            tl.store(count, tl.load(count) + 1)


@triton.jit
def _normalize(
    x,
    skip,
    saved,
    weight,
    bias,
    y,
    rows,
    RELU: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < C)
    at = row[:, None] * C + column
    mean = tl.load(saved + column, mask=column < C, other=0)
    scale = tl.load(saved + C + column, mask=column < C, other=0)
    scale *= tl.load(weight + column, mask=column < C, other=0)
    offset = tl.load(bias + column, mask=column < C, other=0)
    value = tl.load(x + at, mask=there, other=0).to(tl.float32)
    value = (value - mean) * scale + offset
    if skip is not None:
        value += tl.load(skip + at, mask=there, other=0).to(tl.float32)
    if RELU:
        value = tl.maximum(value, 0)
    tl.store(y + at, value, mask=there)


@triton.jit
def _gradient_sums(
    dy,
    y,
    cut,
    x,
    saved,
    partial,
    rows,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of dy, where the ReLU's output y let it through, and of its products with normalised x:
    partial (programs, 2, C). Such a dy is kept in `cut`, if that is given."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    mean = tl.load(saved + column, mask=column < C, other=0)
    scale = tl.load(saved + C + column, mask=column < C, other=0)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(program * ROWS, rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (column < C)
        at = row[:, None] * C + column
        gradient = tl.load(dy + at, mask=there, other=0).to(tl.float32)
        if y is not None:
            gradient = tl.where(tl.load(y + at, mask=there, other=0) > 0, gradient, 0)
        if cut is not None:
            tl.store(cut + at, gradient, mask=there)
        value = tl.load(x + at, mask=there, other=0).to(tl.float32)
        sums += gradient
        products += gradient * (value - mean) * scale
    partial += program * 2 * C + column
    tl.store(partial, tl.sum(sums, 0), mask=column < C)
    tl.store(partial + C, tl.sum(products, 0), mask=column < C)


@triton.jit
def _gradient(
    dy,
    y,
    x,
    saved,
    sums,
    weight,
    dx,
    rows,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < C)
    at = row[:, None] * C + column
    mean = tl.load(saved + column, mask=column < C, other=0)
    scale = tl.load(saved + C + column, mask=column < C, other=0)
    average = tl.load(sums + column, mask=column < C, other=0) / rows
    slope = tl.load(sums + C + column, mask=column < C, other=0) / rows
    factor = scale * tl.load(weight + column, mask=column < C, other=0)
    gradient = tl.load(dy + at, mask=there, other=0).to(tl.float32)
    if y is not None:
        gradient = tl.where(tl.load(y + at, mask=there, other=0) > 0, gradient, 0)
    value = (tl.load(x + at, mask=there, other=0).to(tl.float32) - mean) * scale
    tl.store(dx + at, (gradient - average - value * slope) * factor, mask=there)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int
    ) -> Tensor:
        n, channels, size, _ = x.shape
        kernel = weight.shape[-1]
        x, weight = x.contiguous(memory_format=LAST), weight.flatten(1).T.contiguous()
        out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        y = torch.empty(n, channels, out, out, dtype=x.dtype, device=x.device, memory_format=LAST)
        ctx.window = {"C": channels, "K": kernel, "S": stride, "P": padding, "D": dilation}
        _slide(x, weight, y, ctx.window, transposed=False)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy, dx, dw = dy.contiguous(memory_format=LAST), None, None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            _slide(dy, weight, dx, ctx.window, transposed=True)
        if ctx.needs_input_grad[1]:
            n, out = len(x), dy.shape[-1]
            partial = x.new_empty(n, *weight.shape, dtype=torch.float32)
            pixels = triton.next_power_of_2(out * out)
            grid = n, triton.cdiv(ctx.window["C"], 32)
            _taps[grid](x, dy, partial, x.shape[-1], out, **ctx.window, PIXELS=pixels)
            dw = partial.sum(0).T.unflatten(1, (1, ctx.window["K"], -1)).to(weight.dtype)
        return dx, dw, None, None, None


def _slide(x: Tensor, weight: Tensor, y: Tensor, window: dict[str, int], transposed: bool) -> None:
    rows = y.numel() // window["C"]
    grid = triton.cdiv(rows, 64), triton.cdiv(window["C"], 32)
    _window[grid](x, weight, y, rows, x.shape[-1], y.shape[-1], transposed, **window)


@triton.jit
def _window(
    x,
    weight,
    y,
    rows,
    size,
    out,
    TRANSPOSED: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
):
    """y (N, out, out, C) from x (N, size, size, C) and kernels (K × K, C) with stride S, padding P
    and dilation D; or, transposed, x from y: the gradient of the one from that of the other."""
    row = tl.program_id(0) * 64 + tl.arange(0, 64)
    channel = tl.program_id(1) * 32 + tl.arange(0, 32)
    image, pixel = row // (out * out), row % (out * out)
    out_y, out_x = pixel // out, pixel % out
    total = tl.zeros([64, 32], tl.float32)
    for tap in tl.static_range(K * K):
        if TRANSPOSED:
            at_y, at_x = out_y + P - tap // K * D, out_x + P - tap % K * D
            inside = (at_y % S == 0) & (at_x % S == 0) & (at_y >= 0) & (at_x >= 0)
            at_y, at_x = at_y // S, at_x // S
        else:
            at_y, at_x = out_y * S - P + tap // K * D, out_x * S - P + tap % K * D
            inside = (at_y >= 0) & (at_x >= 0)
        inside = inside & (at_y < size) & (at_x < size) & (row < rows)
        place = (image * size + at_y) * size + at_x
        there = inside[:, None] & (channel < C)
        value = tl.load(x + place[:, None] * C + channel, mask=there, other=0)
        factor = tl.load(weight + tap * C + channel, mask=channel < C, other=0)
        total += value.to(tl.float32) * factor.to(tl.float32)
    there = (row < rows)[:, None] & (channel < C)
    tl.store(y + row[:, None] * C + channel, total, mask=there)


@triton.jit
def _taps(
    x,
    dy,
    partial,
    size,
    out,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """For one image and each tap the sum of dy × x where the tap lies: partial (N, K × K, C)."""
    image = tl.program_id(0)
    channel = tl.program_id(1) * 32 + tl.arange(0, 32)
    pixel = tl.arange(0, PIXELS)
    out_y, out_x = pixel // out, pixel % out
    there = (pixel < out * out)[:, None] & (channel < C)
    place = (image * out * out + pixel)[:, None] * C + channel
    gradient = tl.load(dy + place, mask=there, other=0).to(tl.float32)
    for tap in tl.static_range(K * K):
        at_y, at_x = out_y * S - P + tap // K * D, out_x * S - P + tap % K * D
        inside = (at_y >= 0) & (at_x >= 0) & (at_y < size) & (at_x < size)
        place = ((image * size + at_y) * size + at_x)[:, None] * C + channel
        value = tl.load(x + place, mask=inside[:, None] & (channel < C), other=0).to(tl.float32)
        products = tl.where(there, value * gradient, 0)
        address = partial + (image * K * K + tap) * C + channel
        tl.store(address, tl.sum(products, 0), mask=channel < C)


class _Mirrored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, alike: Tensor, differing: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        outputs, inputs, kernel, _ = alike.shape
        shape = 2 * outputs, inputs * (1 if differing is None else 2), kernel, kernel
        if inputs == 1:  # depthwise: channels next to each other, as _window reads them
            weight = alike.new_empty(kernel, kernel, 1, shape[0], dtype=dtype).permute(3, 2, 0, 1)
        else:
            weight = torch.empty(shape, dtype=dtype, device=alike.device, memory_format=LAST)
        grid = (triton.cdiv(weight.numel(), 256),)
        _spread[grid](alike, differing, weight, *alike.shape[:3], *alike.stride(), *weight.stride())
        ctx.save_for_backward(alike)
        ctx.mixed = differing is not None
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dw: Tensor) -> tuple[Tensor | None, ...]:
        (alike,) = ctx.saved_tensors
        d_alike = torch.empty_like(alike)
        d_differing = torch.empty_like(alike) if ctx.mixed else None
        grid = (triton.cdiv(alike.numel(), 256),)
        _collect[grid](dw, d_alike, d_differing, *alike.shape[:3], *alike.stride(), *dw.stride())
        return d_alike, d_differing, None


STRIDES = ["outputs", "inputs", "kernel", "o", "i", "y", "x", "to_o", "to_i", "to_y", "to_x"]


@triton.jit(do_not_specialize=STRIDES)
def _spread(alike, differing, weight, outputs, inputs, kernel, o, i, y, x, to_o, to_i, to_y, to_x):
    """weight (2 × outputs, inputs or 2 × inputs, kernel, kernel) from `alike` and `differing`
    (outputs, inputs, kernel, kernel), whose strides are o, i, y, x."""
    number = tl.program_id(0) * 256 + tl.arange(0, 256)
    columns = inputs if differing is None else 2 * inputs
    column, rest = number % columns, number // columns
    at_x, rest = rest % kernel, rest // kernel
    at_y, row = rest % kernel, rest // kernel
    there = row < 2 * outputs
    turned = row >= outputs if differing is None else column >= inputs
    from_x = tl.where(turned, kernel - 1 - at_x, at_x)
    at = row % outputs * o + column % inputs * i + at_y * y + from_x * x
    value = tl.load(alike + at, mask=there)
    if differing is not None:
        other = tl.load(differing + at, mask=there)
        value = 0.5 * tl.where(turned == (row >= outputs), value + other, value - other)
    tl.store(weight + row * to_o + column * to_i + at_y * to_y + at_x * to_x, value, mask=there)


@triton.jit(do_not_specialize=STRIDES)
def _collect(dw, alike, differing, outputs, inputs, kernel, o, i, y, x, to_o, to_i, to_y, to_x):
    """The gradients of `alike` and `differing` from that of the weight, whose strides are to_…"""
    number = tl.program_id(0) * 256 + tl.arange(0, 256)
    column, rest = number % inputs, number // inputs
    at_x, rest = rest % kernel, rest // kernel
    at_y, row = rest % kernel, rest // kernel
    there = row < outputs
    at = row * o + column * i + at_y * y + at_x * x
    plain = dw + row * to_o + column * to_i + at_y * to_y + at_x * to_x
    turned = plain + (kernel - 1 - 2 * at_x) * to_x
    if differing is None:
        own = tl.load(plain, mask=there).to(tl.float32)
        tl.store(alike + at, own + tl.load(turned + outputs * to_o, mask=there), mask=there)
    else:
        own = tl.load(plain, mask=there).to(tl.float32)
        own += tl.load(turned + outputs * to_o + inputs * to_i, mask=there)
        other = tl.load(plain + outputs * to_o, mask=there).to(tl.float32)
        other += tl.load(turned + inputs * to_i, mask=there)
        tl.store(alike + at, 0.5 * (own + other), mask=there)
        tl.store(differing + at, 0.5 * (own - other), mask=there)
