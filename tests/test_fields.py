"""The pixels that a map depends on: as traced, and as measured by gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graph import trace
from model import NETS, build
from rf import receptive_field

NONLINEAR = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.SiLU, nn.Dropout)


class Sum(nn.Module):
    """A linear stand-in for a norm that adds a skip, or for any other pointwise layer."""

    def forward(self, *maps):
        return sum(maps)


def measured(features, size):
    """Height and width of the receptive field, from the gradient of one central output.

    The module is linearised in place, with positive weights, so that no path cancels or is cut off.
    """
    for module in list(features.modules()):
        for name, child in module.named_children():
            if isinstance(child, NONLINEAR):
                setattr(module, name, Sum())
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    for parameter in features.parameters():
        nn.init.ones_(parameter)
    features.double()
    image = torch.ones(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    output = features(image)
    output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum().backward()
    rows, columns = image.grad.abs().sum((0, 1)).nonzero().unbind(1)
    return int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1)


def assert_true(net, expected=None, size=96):
    """The traced field equals the measured one, on an image too large for borders to matter."""
    traced = trace(net, (3, size, size))
    assert measured(traced.features, size) == traced.receptive_field
    if expected is not None:
        assert traced.receptive_field == (expected, expected)


@pytest.mark.parametrize("name", NETS)
def test_every_net_by_gradient(name):
    traced = trace(build(name, 10))
    assert measured(traced.features, max(traced.receptive_field) + 48) == traced.receptive_field


class Wrap(nn.Module):
    """A module that computes a function of itself, with layers `a`, `b`, …, and the image."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function = function
        for name, layer in zip("abc", layers, strict=False):
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs, outputs, kernel, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def widened(x):
    """With two more channels, of zeros, as in ResNet's parameter-free shortcut."""
    return F.pad(x, (0, 0, 0, 0, 1, 1))


def gated(m, x):
    value, gate = m.a(x).chunk(2, 1)
    return value * torch.sigmoid(gate)


def shifted_skip(m, x):
    return m.a(F.pad(x, (4, 0, 4, 0)))[:, :, :-4, :-4] + x


def strided_skip(m, x):
    return m.a(x) + widened(x[..., ::2, ::2])


MODULES = {
    "one": (nn.Conv2d(3, 4, 3, padding=1), 3),
    "strided": (nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2)), 7),
    "dilated stride": (nn.Sequential(nn.Conv2d(3, 4, 3, 2, 2, 2), nn.Conv2d(4, 2, 3, 1, 2, 2)), 13),
    "even kernel": (nn.Sequential(nn.Conv2d(3, 4, 2, 2, 1), nn.Conv2d(4, 4, 4, 1, 1)), 8),
    "same padding": (nn.Sequential(nn.Conv2d(3, 4, 4, padding="same"), nn.Conv2d(4, 4, 3)), 6),
    "dilated same padding": (
        Wrap(lambda m, x: m.a(x) + m.b(x), nn.Conv2d(3, 3, 4, 1, "same", 2), conv(3, 3, 7)),
        7,
    ),
    "pooled": (nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 3, padding=1)), 6),
    "maximum": (nn.Sequential(conv(3, 4, 3), nn.MaxPool2d(3, 2, 1, ceil_mode=True)), 5),
    "adaptive": (nn.Sequential(nn.AdaptiveAvgPool2d(48), conv(3, 4, 3)), 6),
    "functional pooling": (
        Wrap(lambda m, x: F.avg_pool2d(m.a(F.avg_pool2d(x, 2)), 3, 2), conv(3, 3, 3)),
        10,
    ),
    "asymmetric padding": (nn.Sequential(nn.ZeroPad2d((0, 3, 3, 0)), nn.Conv2d(3, 3, 4)), 4),
    "padding of a line": (Wrap(lambda m, x: m.a(F.pad(x, (1, 1))), nn.Conv2d(3, 3, 3)), 3),
    "skip": (Wrap(lambda m, x: m.b((m.a(x) + x).relu_()), conv(3, 3, 5), conv(3, 3, 3)), 7),
    "wider skip": (Wrap(lambda m, x: m.a(x) + m.b(x), conv(3, 3, 3), conv(3, 3, 7)), 7),
    "shifted skip": (Wrap(shifted_skip, conv(3, 3, 3)), 6),  # −5 … −3, and 0
    "cropped": (Wrap(lambda m, x: m.a(x)[:, :, 2:, 2:] + x[:, :, :-4, :-4], nn.Conv2d(3, 3, 3)), 5),
    "last channel": (Wrap(lambda m, x: m.a(x[:, -1:]), conv(1, 3, 3)), 3),
    "strided skip": (Wrap(strided_skip, conv(3, 5, 3, stride=2)), 3),
    "concatenated": (Wrap(lambda m, x: torch.cat([m.a(x), x], -3), conv(3, 3, 3)), 3),
    "split": (Wrap(lambda m, x: m.a(x).split(2, 1)[1], conv(3, 4, 5)), 5),
    "gated": (Wrap(gated, conv(3, 4, 5)), 5),
    "spatial gate": (Wrap(lambda m, x: x * m.a(x.mean(1, keepdim=True)), conv(1, 1, 5)), 5),
    "scaled": (Wrap(lambda m, x: m.a(x * m.b.weight + 1) / 2, conv(3, 3, 3), conv(1, 3, 1)), 3),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("net", "expected"), MODULES.values(), ids=MODULES)
def test_modules(net, expected):
    assert_true(net, expected)


def test_axes_that_differ():
    net = nn.Sequential(nn.Conv2d(3, 4, (3, 5), padding=(1, 2)), nn.Conv2d(4, 4, (1, 3)))
    assert_true(net)
    assert trace(net).receptive_field == (3, 7)
    assert_true(Wrap(lambda m, x: m.a(F.pad(x, (4, 0, 0, 0)))[..., :-4] + x, conv(3, 3, 3)))
    assert receptive_field(net) == 7


class SqueezeExcitation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(self.pool(x))


def test_a_gate_sees_the_whole_image():
    for kernel in (3, 9):
        net = nn.Sequential(conv(3, 3, kernel), SqueezeExcitation(3), conv(3, 3, 3))
        assert receptive_field(net) == 32
        assert measured(trace(net).features, 32) == (32, 32)
        for shape in ((32, 48), (48, 32)):
            assert trace(net, (3, *shape)).receptive_field == shape
    assert receptive_field(nn.Sequential(nn.Conv2d(3, 3, 3, 3), SqueezeExcitation(3))) == 30
    wide = nn.Sequential(conv(3, 3, 41), SqueezeExcitation(3), conv(3, 3, 3))
    assert receptive_field(wide) == 43  # here the central output's own window is larger


def test_torchvisions_nets():
    """ResNet-18 and VGG-16 are known to have 435 and 212 (the latter: Araujo et al. 2019)."""
    from torchvision import models, ops

    branch = nn.Sequential(conv(3, 3, 3), ops.StochasticDepth(0.5, "row"), conv(3, 3, 3))
    assert receptive_field(branch) == 5
    assert receptive_field(models.resnet18(), (3, 224, 224)) == 435
    assert receptive_field(models.vgg.make_layers(models.vgg.cfgs["D"]), (3, 224, 224)) == 212
    assert_true(models.mobilenet_v2(num_classes=2).features[:7], size=192)
    assert_true(models.squeezenet1_1(num_classes=2).features[:6], size=128)


def test_generated_stacks():
    hypothesis = pytest.importorskip("hypothesis", reason="pip install -r requirements-extra.txt")
    st = hypothesis.strategies
    side = st.integers(1, 4)

    @st.composite
    def windows(draw):
        padding = [draw(st.integers(0, 3)) for _ in range(4)]
        kernel, dilation = ((draw(side), draw(side)) for _ in range(2))
        stride = draw(st.sampled_from([(1, 1), (1, 2), (2, 2), (3, 2)]))
        kind = draw(st.sampled_from(["conv", "average", "depthwise"]))
        if kind == "average":
            layer = nn.AvgPool2d(kernel, stride)
        else:
            groups = 3 if kind == "depthwise" else 1
            layer = nn.Conv2d(3, 3, kernel, stride, 0, dilation, groups)
        return nn.Sequential(nn.ZeroPad2d(padding), layer)

    @st.composite
    def residuals(draw):
        kernels = draw(st.lists(st.sampled_from([1, 3, 5]), min_size=1, max_size=3))
        branch = nn.Sequential(*(conv(3, 3, kernel) for kernel in kernels))
        shift = draw(st.integers(-2, 2)), draw(st.integers(-2, 2))
        moved = nn.ZeroPad2d((shift[0], -shift[0], shift[1], -shift[1]))
        return Wrap(lambda m, x: m.a(x) + m.b(x), branch, moved)

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
    @hypothesis.given(st.lists(windows() | residuals(), min_size=1, max_size=4))
    def check(layers):
        net = nn.Sequential(*layers)
        try:
            sides = net(torch.zeros(1, 3, 128, 128)).shape[2:]
        except RuntimeError:  # a window larger than its map
            hypothesis.reject()
        hypothesis.assume(min(sides) > 1)
        traced = trace(net, (3, 128, 128))
        hypothesis.assume(max(traced.receptive_field) < 50)
        assert measured(traced.features, 128) == traced.receptive_field

    check()
