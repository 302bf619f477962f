"""Triton kernels for the depthwise convolutions of channels-last maps that cuDNN is slow at."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from triton.language import constexpr

from kernels import LAST, load, load_row
from machine import triton_kernels


def take_over(net: nn.Module) -> None:
    """Have this file compute the net's depthwise convolutions with a stride or dilation. Forward
    plus backward of two of them, for a batch of 256 in bf16 on an H100, took cuDNN 481 and 637 µs;
    here they take 74 and 77."""

    def forward(layer: nn.Conv2d, x: Tensor) -> Tensor:
        if x.shape[2] != x.shape[3] or not triton_kernels(x):
            return type(layer).forward(layer, x)
        return depthwise(x, layer.weight, layer.stride[0], layer.padding[0], layer.dilation[0])

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels:
            windows = layer.kernel_size, layer.stride, layer.padding, layer.dilation
            square = all(len(set(window)) == 1 for window in windows)
            slow = layer.stride != (1, 1) or layer.dilation != (1, 1)
            plain = layer.bias is None and layer.padding_mode == "zeros"
            if slow and square and plain and layer.out_channels == layer.groups:
                layer.forward = partial(forward, layer)


def depthwise(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """`conv2d(x, weight, None, stride, padding, dilation, C)` of square maps (N, C, W, W), weight
    (C, 1, K, K); sums in float32."""
    return _Depthwise.apply(x, weight, stride, padding, dilation)


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
            sums = x.new_empty(n, *weight.shape, dtype=torch.float32)
            pixels = triton.next_power_of_2(out * out)
            grid = n, triton.cdiv(ctx.window["C"], 32)
            _taps[grid](x, dy, sums, x.shape[-1], out, **ctx.window, PIXELS=pixels)
            dw = sums.sum(0).T.unflatten(1, (1, ctx.window["K"], -1)).to(weight.dtype)
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
    TRANSPOSED: constexpr,
    C: constexpr,
    K: constexpr,
    S: constexpr,
    P: constexpr,
    D: constexpr,
):
    """y (N, out, out, C) from x (N, size, size, C) and kernels (K × K, C) with stride S, padding P
    and dilation D; or, if TRANSPOSED, y as the input's gradient from x, the output's gradient."""
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
        place = ((image * size + at_y) * size + at_x)[:, None] * C + channel
        value = load(x, place, inside[:, None] & (channel < C))
        total += value * load_row(weight + tap * C, channel, C)
    there = (row < rows)[:, None] & (channel < C)
    tl.store(y + row[:, None] * C + channel, total, mask=there)


@triton.jit
def _taps(
    x,
    dy,
    partial,
    size,
    out,
    C: constexpr,
    K: constexpr,
    S: constexpr,
    P: constexpr,
    D: constexpr,
    PIXELS: constexpr,
):
    """For each image and tap, the sum of dy × the x under that tap: partial (N, K × K, C)."""
    image = tl.program_id(0)
    channel = tl.program_id(1) * 32 + tl.arange(0, 32)
    pixel = tl.arange(0, PIXELS)
    out_y, out_x = pixel // out, pixel % out
    there = (pixel < out * out)[:, None] & (channel < C)
    gradient = load(dy, (image * out * out + pixel)[:, None] * C + channel, there)
    for tap in tl.static_range(K * K):
        at_y, at_x = out_y * S - P + tap // K * D, out_x * S - P + tap % K * D
        inside = (at_y >= 0) & (at_x >= 0) & (at_y < size) & (at_x < size)
        place = ((image * size + at_y) * size + at_x)[:, None] * C + channel
        products = load(x, place, inside[:, None] & there) * gradient
        address = partial + (image * K * K + tap) * C + channel
        tl.store(address, tl.sum(products, 0), mask=channel < C)
