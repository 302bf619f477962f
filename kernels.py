"""Triton kernels for the parts of mirrored layers where a GPU's time went: BatchNorm with the skip
and ReLU after it, and the weights of convolutions.

Maps are channels-last: matrices with a row for each half of a pixel's channels. No sum depends on
the order in which programs end: the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from triton.language import constexpr

LAST = torch.channels_last
PROGRAMS = constexpr(128)  # at most so many share the rows of a sum


def norm(layer: nn.BatchNorm2d, x: Tensor, skip: Tensor | None) -> Tensor:
    """What mirror.MirrorNorm does in training."""
    running = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    running = running if layer.track_running_stats else None
    return _Norm.apply(x, skip, layer.weight, layer.bias, running, layer.momentum, layer.eps)


def mirrored(alike: Tensor, differing: Tensor | None) -> Tensor:
    """The weight that mirror.Mixed makes, or mirror.Paired if `differing` is None, in the dtype
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
    ) -> Tensor:
        x = x.contiguous(memory_format=LAST)
        skip = None if skip is None else skip.contiguous(memory_format=LAST)
        shape = _Shape(x, len(weight))
        partial = x.new_empty(2, shape.channels, shape.programs, dtype=torch.float32)
        _moments[shape.programs,](x, partial, shape.rows, **shape.tile)
        saved = partial.new_empty(2, shape.channels)
        blocks = triton.cdiv(shape.channels, 16)
        counts = shape.channels, shape.programs, shape.rows
        _settle[blocks,](x, partial, saved, *(running or [None] * 3), *counts, momentum, eps)
        y = torch.empty_like(x)
        _normalize[shape.tiles,](x, skip, saved, weight, bias, y, shape.rows, **shape.tile)
        ctx.save_for_backward(x, saved, weight, y)
        ctx.skips = skip is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, saved, weight, y = ctx.saved_tensors
        dy = dy.contiguous(memory_format=LAST)
        shape = _Shape(x, len(weight))
        partial = x.new_empty(2, shape.channels, shape.programs, dtype=torch.float32)
        cut = torch.empty_like(x) if ctx.skips else None
        _gradient_sums[shape.programs,](dy, y, cut, x, saved, partial, shape.rows, **shape.tile)
        if ctx.skips:
            dy, y = cut, None
        sums = partial.sum(2)
        dx = torch.empty_like(x)
        _gradient[shape.tiles,](dy, y, x, saved, sums, weight, dx, shape.rows, **shape.tile)
        return dx, dy if ctx.skips else None, sums[1], sums[0], None, None, None


class _Shape:
    """The shape of x (N, multiple of C, H, W) as a matrix (rows, C), and how programs share it."""

    def __init__(self, x: Tensor, channels: int) -> None:
        self.channels, self.rows = channels, x.numel() // channels
        block = triton.next_power_of_2(channels)
        rows = 16384 // block
        self.tile = {"C": channels, "ROWS": rows, "BLOCK": block, "num_warps": 16}
        self.tiles = triton.cdiv(self.rows, rows)
        self.programs = min(PROGRAMS.value, self.tiles)


@triton.jit
def load_row(base, column, C: constexpr):
    """One float32 for each channel, 0 beyond the last."""
    return tl.load(base + column, mask=column < C, other=0).to(tl.float32)


@triton.jit
def load(base, at, there):
    """Values as float32, 0 where not `there`."""
    return tl.load(base + at, mask=there, other=0).to(tl.float32)


@triton.jit
def _let_through(dy, y, at, there):
    """dy passed back through the ReLU whose output is y; if y is None, that is done already."""
    gradient = load(dy, at, there)
    return gradient if y is None else tl.where(load(y, at, there) > 0, gradient, 0)


@triton.jit
def _moments(x, partial, rows, C: constexpr, ROWS: constexpr, BLOCK: constexpr):
    """Sums of x (rows, C) minus its first row, and of that squared: partial (2, C, programs)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    first = load_row(x, column, C)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(program * ROWS, rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (column < C)
        value = load(x, row[:, None] * C + column, there)
        value = tl.where(there, value - first, 0)
        sums += value
        squares += value * value
    partial += column * programs + program
    tl.store(partial, tl.sum(sums, 0), mask=column < C)
    tl.store(partial + C * programs, tl.sum(squares, 0), mask=column < C)


@triton.jit(do_not_specialize=["C", "programs", "rows"])
def _settle(x, partial, saved, running_mean, running_var, count, C, programs, rows, momentum, eps):
    """From the sums, `saved` (2, C): the mean, and one over the standard deviation. Running
    statistics, if given, are updated."""
    column = tl.program_id(0) * 16 + tl.arange(0, 16)
    program = tl.arange(0, PROGRAMS)
    there = column < C
    known = (program < programs)[:, None] & there
    at = column * programs + program[:, None]
    shift = tl.sum(load(partial, at, known), 0) / rows
    mean = load(x, column, there) + shift
    var = tl.sum(load(partial + C * programs, at, known), 0) / rows - shift * shift
    tl.store(saved + column, mean, mask=there)
    tl.store(saved + C + column, 1 / tl.sqrt(var + eps), mask=there)
    if running_mean is not None:
        before = load(running_mean, column, there)
        tl.store(running_mean + column, before + momentum * (mean - before), mask=there)
        before, unbiased = load(running_var, column, there), var * (rows / (rows - 1))
        tl.store(running_var + column, before + momentum * (unbiased - before), mask=there)
        if tl.program_id(0) == 0:
            tl.store(count, tl.load(count) + 1)


@triton.jit
def _normalize(
    x, skip, saved, weight, bias, y, rows, C: constexpr, ROWS: constexpr, BLOCK: constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < C)
    at = row[:, None] * C + column
    scale = load_row(saved + C, column, C) * load_row(weight, column, C)
    value = (load(x, at, there) - load_row(saved, column, C)) * scale + load_row(bias, column, C)
    if skip is not None:
        value += load(skip, at, there)
    value = tl.where(value < 0, 0, value)  # keeps NaN, which tl.maximum would turn into 0
    tl.store(y + at, value, mask=there)


@triton.jit
def _gradient_sums(
    dy, y, cut, x, saved, partial, rows, C: constexpr, ROWS: constexpr, BLOCK: constexpr
):
    """Sums of dy, passed back through the ReLU whose output is y, and of its products with
    normalised x: partial (2, C, programs). That dy is stored in `cut`, if given."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    mean, scale = load_row(saved, column, C), load_row(saved + C, column, C)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(program * ROWS, rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (column < C)
        at = row[:, None] * C + column
        gradient = _let_through(dy, y, at, there)
        if cut is not None:
            tl.store(cut + at, gradient, mask=there)
        sums += gradient
        products += gradient * (load(x, at, there) - mean) * scale
    partial += column * programs + program
    tl.store(partial, tl.sum(sums, 0), mask=column < C)
    tl.store(partial + C * programs, tl.sum(products, 0), mask=column < C)


@triton.jit
def _gradient(
    dy, y, x, saved, sums, weight, dx, rows, C: constexpr, ROWS: constexpr, BLOCK: constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < C)
    at = row[:, None] * C + column
    scale = load_row(saved + C, column, C)
    average, slope = load_row(sums, column, C) / rows, load_row(sums + C, column, C) / rows
    value = (load(x, at, there) - load_row(saved, column, C)) * scale
    gradient = _let_through(dy, y, at, there) - average - value * slope
    tl.store(dx + at, gradient * scale * load_row(weight, column, C), mask=there)


class _Mirrored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, alike: Tensor, differing: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        outputs, inputs, kernel, _ = alike.shape
        shape = 2 * outputs, inputs * (1 if differing is None else 2), kernel, kernel
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
    """The gradients of `alike` and `differing` from the weight's, dw, with strides to_o … to_x."""
    number = tl.program_id(0) * 256 + tl.arange(0, 256)
    column, rest = number % inputs, number // inputs
    at_x, rest = rest % kernel, rest // kernel
    at_y, row = rest % kernel, rest // kernel
    there = row < outputs
    at = row * o + column * i + at_y * y + at_x * x
    plain = dw + row * to_o + column * to_i + at_y * to_y + at_x * to_x
    turned = plain + (kernel - 1 - 2 * at_x) * to_x
    own = tl.load(plain, mask=there).to(tl.float32)
    if differing is None:
        tl.store(alike + at, own + tl.load(turned + outputs * to_o, mask=there), mask=there)
    else:
        own += tl.load(turned + outputs * to_o + inputs * to_i, mask=there)
        other = tl.load(plain + outputs * to_o, mask=there).to(tl.float32)
        other += tl.load(turned + inputs * to_i, mask=there)
        tl.store(alike + at, 0.5 * (own + other), mask=there)
        tl.store(differing + at, 0.5 * (own - other), mask=there)
