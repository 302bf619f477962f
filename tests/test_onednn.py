"""onednn.py's convolutions against PyTorch's own."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flags
import onednn
from model import NETS, build
from optimise import make_training

CPU = torch.device("cpu")


class Convolutions(TorchDispatchMode):
    """Records the precision and dilation of every convolution, forward and backward."""

    def __init__(self):
        super().__init__()
        self.precisions, self.dilations = set(), set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        aten = torch.ops.aten
        if function in (aten.convolution.default, aten.convolution_backward.default):
            forward = function is aten.convolution.default
            self.precisions.add(arguments[0].dtype)
            self.dilations.add(tuple(arguments[5 if forward else 6]))
        return function(*arguments, **options or {})


def gradients(layer, convolve, x):
    """The output, and the gradients of input and parameters for a random output gradient."""
    inputs = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = convolve(inputs)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y, *torch.autograd.grad(y, [inputs, *layer.parameters()], direction)


@pytest.mark.parametrize(
    ("options", "size", "plain"),
    [
        ({"dilation": 2, "padding": 2, "groups": 6}, 8, True),
        ({"dilation": 2, "padding": 2, "groups": 3, "bias": True}, 8, True),
        ({"dilation": 2, "padding": 2}, (6, 10), True),
        ({"dilation": 2}, 8, True),
        ({"dilation": 3, "padding": 3, "groups": 6}, 9, True),
        ({"dilation": 3, "padding": 6}, 9, True),
        ({"dilation": 2, "stride": 2, "padding": 2}, 8, True),
        ({"dilation": 2, "stride": 2, "padding": 2, "groups": 3}, (7, 9), True),
        ({"dilation": 2, "stride": 2}, 9, True),
        ({"dilation": 2, "padding": 2, "groups": 6}, (8, 9), False),
        ({"dilation": 2, "padding": 2, "groups": 6}, (9, 8), False),
        ({"dilation": 2, "padding": 1}, 8, False),
        ({"dilation": 2, "stride": 3, "padding": 2}, 8, False),
        ({"dilation": (1, 2), "padding": (1, 2)}, 8, False),
        ({"dilation": 2, "padding": (2, 4)}, 8, False),
        ({"dilation": 2, "padding": 2, "padding_mode": "reflect"}, 8, False),
        ({"padding": 1, "groups": 6}, 8, True),
    ],
)
def test_dilated_convolutions_as_plain_ones(options, size, plain):
    layer = nn.Conv2d(6, 12, 3, **{"bias": False} | options)
    x = torch.randn(2, 6, *(size if isinstance(size, tuple) else (size, size)))
    expected = gradients(layer, layer.forward, x)
    onednn.take_over(layer)
    with Convolutions() as convolutions:
        found = gradients(layer, layer, x)
    torch.testing.assert_close(found, expected)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in found[:2])
    assert (convolutions.dilations == {(1, 1)}) == plain


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"groups": 2}, {"stride": 2}, {"padding": 1}]
)
@pytest.mark.parametrize("inputs", [192, 208])
def test_large_1x1_convolutions_as_products(inputs, options, capability, monkeypatch):
    layer, x = nn.Conv2d(inputs, 208, 1, **options), torch.randn(2, inputs, 5, 5)
    expected = gradients(layer, layer.forward, x)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    onednn.take_over(layer)
    with Convolutions() as convolutions:
        found = gradients(layer, layer, x)
    torch.testing.assert_close(found, expected)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in found[:2])
    product = inputs == 208 and capability == "AVX2" and options in ({}, {"bias": False})
    assert bool(convolutions.dilations) != product


SIXTEEN = {"in_channels": 16, "out_channels": 16}


@pytest.mark.parametrize(
    ("options", "wide"),
    [
        ({"kernel_size": 5, "groups": 8}, True),
        ({"kernel_size": (1, 5), "groups": 8}, True),
        ({"kernel_size": 5, "groups": 8, "dilation": 2}, True),
        ({"kernel_size": 5, "groups": 8, "dilation": 2, "stride": 2}, True),
        ({"kernel_size": 3, "groups": 8, "stride": 2}, True),
        ({"kernel_size": 3, "groups": 8, "stride": 2, "dilation": 2, "padding": 1}, True),
        ({"kernel_size": 3, "groups": 8, "dilation": 2, "padding": 1}, True),
        ({"kernel_size": 3, "groups": 16, "dilation": 2, "padding": 1, **SIXTEEN}, True),
        ({"kernel_size": 3, "groups": 2, "dilation": 2, "padding": 1, **SIXTEEN}, True),
        ({"kernel_size": 3, "dilation": 2, "padding": 1}, True),
        ({"kernel_size": 3, "groups": 8, "dilation": 2}, False),
        ({"kernel_size": 3, "dilation": 2}, False),
        ({"kernel_size": 3, "dilation": 2, "padding": 1, **SIXTEEN}, False),
        ({"kernel_size": 3, "groups": 8}, False),
        ({"kernel_size": 3, "groups": 8, "stride": 2, "dilation": 2, "padding": 2}, False),
        ({"kernel_size": 5, "groups": 4}, False),
        ({"kernel_size": 3, "stride": 2}, False),
    ],
)
def test_what_is_bad_in_bf16_is_computed_in_float32(options, wide):
    net = nn.Conv2d(**{"in_channels": 8, "out_channels": 8} | options)
    images = torch.randn(2, net.in_channels, 12, 12).bfloat16().requires_grad_()
    expected = net(images.float())
    training = make_training(net, flags.parse_flags([]), CPU, 1)
    with Convolutions() as convolutions, torch.autocast("cpu", torch.bfloat16):
        output = training.net(images)
        output.sum().backward()
    assert convolutions.precisions == {torch.float32 if wide else torch.bfloat16}
    assert output.dtype == images.grad.dtype == torch.bfloat16
    if wide:  # rounded once
        torch.testing.assert_close(output.float(), expected, rtol=2**-8, atol=1e-6)
    assert net.weight.grad.abs().sum() > 0


def assert_gradients_agree(layer, in_float32, inputs):
    """Those of the weights, in bf16 and float32, for equal inputs and output gradients."""
    x = inputs.detach().bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    direction = torch.randn(output.shape).to(output)
    weights = list(layer.parameters())
    expected = torch.autograd.grad(in_float32(x.float()), weights, direction.float())
    found = torch.autograd.grad(output, weights, direction)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * other.abs().max().item())


@pytest.mark.parametrize("name", NETS)
def test_gradients_of_the_nets_in_bf16_are_those_in_float32(name):
    net = build(name, 10)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    in_float32 = [m.forward for m in convolutions]
    make_training(net, flags.parse_flags([]), CPU, 1)
    calls = []
    for module in convolutions:
        module.register_forward_hook(lambda module, inputs, _: calls.append((module, *inputs)))
    net(torch.randn(4, 3, 32, 32))
    assert [module for module, _ in calls] == convolutions
    for (module, inputs), forward in zip(tuple(calls), in_float32, strict=True):
        assert_gradients_agree(module, forward, inputs)


@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
@pytest.mark.parametrize("channels", [8, 16, 24, 32, 48, 96])
def test_gradients_in_bf16_are_those_in_float32(channels, dilation):
    for groups in {1, 2, 8, channels}:
        layer = nn.Conv2d(channels, channels, 3, 1, dilation, dilation, groups)
        in_float32 = layer.forward
        onednn.take_over(layer)
        assert_gradients_agree(layer, in_float32, torch.randn(2, channels, 32, 32))
