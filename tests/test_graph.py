import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from common import UserError
from graph import trace
from model import NETS, build
from rf import receptive_field

NONLINEAR = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.SiLU, nn.Dropout)


class Sum(nn.Module):
    """What is left of a norm that adds a skip, or of anything else pointwise."""

    def forward(self, *maps):
        return sum(maps)


def measured(features, size):
    """Height and width of the receptive field, from the gradient of one central output.

    The module is linearised in place, its weights positive, so that no path cancels or is cut off.
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
    """The traced field is the measured one, on an image that borders play no part in."""
    traced = trace(net, (3, size, size))
    assert measured(traced.features, size) == traced.receptive_field
    if expected is not None:
        assert traced.receptive_field == (expected, expected)


@pytest.mark.parametrize("name", NETS)
def test_every_net_by_gradient(name):
    traced = trace(build(name, 10))
    assert measured(traced.features, max(traced.receptive_field) + 48) == traced.receptive_field


class Wrap(nn.Module):
    """A module of one function of the image and the layers `a`, `b`, …"""

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
    """Two channels of zeros more, as ResNet's parameter-free shortcut."""
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
        Wrap(lambda m, x: m.a(x) + m.b(x), nn.Conv2d(3, 3, 3, 1, "same", 3), conv(3, 3, 5)),
        7,
    ),
    "pooled": (nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 3, padding=1)), 6),
    "maximum": (nn.Sequential(conv(3, 4, 3), nn.MaxPool2d(3, 2, 1, ceil_mode=True)), 5),
    "adaptive": (nn.Sequential(nn.AdaptiveAvgPool2d(48), conv(3, 4, 3)), 6),
    "functional pooling": (Wrap(lambda m, x: F.avg_pool2d(m.a(x), 3, stride=2), conv(3, 3, 3)), 5),
    "asymmetric padding": (nn.Sequential(nn.ZeroPad2d((0, 3, 3, 0)), nn.Conv2d(3, 3, 4)), 4),
    "padding of a line": (Wrap(lambda m, x: m.a(F.pad(x, (1, 1))), nn.Conv2d(3, 3, 3)), 3),
    "skip": (Wrap(lambda m, x: m.b(F.relu(m.a(x) + x)), conv(3, 3, 5), conv(3, 3, 3)), 7),
    "wider skip": (Wrap(lambda m, x: m.a(x) + m.b(x), conv(3, 3, 3), conv(3, 3, 7)), 7),
    "shifted skip": (Wrap(shifted_skip, conv(3, 3, 3)), 6),  # −5 … −3, and 0
    "strided skip": (Wrap(strided_skip, conv(3, 5, 3, stride=2)), 3),
    "concatenated": (Wrap(lambda m, x: torch.cat([m.a(x), x], 1), conv(3, 3, 3)), 3),
    "gated": (Wrap(gated, conv(3, 4, 5)), 5),
    "spatial gate": (Wrap(lambda m, x: x * m.a(x.mean(1, keepdim=True)), conv(1, 1, 5)), 5),
    "scaled": (Wrap(lambda m, x: m.a(x * m.b.weight + 1) / 2, conv(3, 3, 3), conv(1, 3, 1)), 3),
}


@pytest.mark.parametrize(("net", "expected"), MODULES.values(), ids=MODULES)
def test_modules(net, expected):
    assert_true(net, expected)


def test_multiply_adds_of_a_linear_layer_for_every_row():
    behind = nn.Flatten(), nn.Unflatten(1, (2, 4)), nn.Linear(4, 5)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.AdaptiveAvgPool2d(1), *behind)
    assert [layer.multiply_adds for layer in trace(net).layers] == [8 * 48 * 64, 0, 2 * 4 * 5]


def test_a_parametrized_layer():
    net = weight_norm(conv(3, 4, 3))
    assert receptive_field(net) == 3
    with pytest.raises(UserError, match="node conv2d"):
        receptive_field(Wrap(lambda m, x: F.conv2d(x, m.a.weight), net))


def test_a_layer_of_its_own_is_what_it_computes():
    class Blurred(nn.ReLU):
        def forward(self, x):
            return F.avg_pool2d(super().forward(x), 3, 1, 1)

    assert receptive_field(Blurred()) == 3


def test_a_pooling_may_take_two_steps():
    for pool in (lambda x: x.flatten(2).mean(2), lambda x: x.mean(3).mean(2)):
        assert receptive_field(Wrap(lambda m, x, pool=pool: pool(m.a(x)), conv(3, 4, 5))) == 5


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_several_poolings_that_with_the_largest_field_counts(order):
    def pooled(m, x):
        maps = m.a(x), m.b(m.a(x))
        return torch.cat([maps[i].mean((2, 3)) for i in order], 1)

    assert receptive_field(Wrap(pooled, conv(3, 4, 3), conv(4, 4, 5))) == 7


def test_axes_that_differ():
    net = nn.Sequential(nn.Conv2d(3, 4, (3, 5), padding=(1, 2)), nn.Conv2d(4, 4, (1, 3)))
    assert_true(net)
    assert trace(net).receptive_field == (3, 7)
    assert receptive_field(net) == 7


def pooled_by(pool):
    return Wrap(lambda m, x: m.b(pool(m.a(x))), conv(3, 4, 7), nn.Linear(4, 2))


@pytest.mark.parametrize(
    "net",
    [
        pooled_by(lambda x: x.mean((2, 3))),
        pooled_by(lambda x: torch.mean(x, dim=[-1, -2])),
        pooled_by(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)),
        pooled_by(lambda x: F.avg_pool2d(x, 32).squeeze(3).squeeze(2)),
        pooled_by(lambda x: x.amax((2, 3), keepdim=True).view(x.size(0), -1)),
        nn.Sequential(conv(3, 4, 7), nn.AvgPool2d(32), nn.Conv2d(4, 9, 1), nn.Flatten()),
        nn.Sequential(conv(3, 1, 7), nn.Flatten(), nn.Linear(1024, 2)),
    ],
)
def test_the_field_is_that_of_the_global_poolings_input(net):
    traced = trace(net)
    assert traced.receptive_field == (7, 7)
    images = torch.randn(2, 3, 32, 32)
    maps = traced.features(images)
    assert maps.shape[2:] == (32, 32)
    torch.testing.assert_close(traced.head(maps), net.eval()(images))
    assert traced.layers[0].receptive_field == (7, 7)
    assert traced.layers[-1].receptive_field is None


class SqueezeExcitation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(self.pool(x))


@pytest.mark.parametrize(("kernel", "expected"), [(3, 32), (9, 32)])
def test_a_gate_sees_the_whole_image(kernel, expected):
    net = nn.Sequential(conv(3, 3, kernel), SqueezeExcitation(3), conv(3, 3, 3))
    assert receptive_field(net) == expected
    assert measured(trace(net).features, 32) == (expected, expected)
    wide = nn.Sequential(conv(3, 3, 41), SqueezeExcitation(3), conv(3, 3, 3))
    assert receptive_field(wide) == 43  # the window of the central output is the larger one


def test_torchvisions_nets():
    """435 and 212 are known of ResNet-18 and VGG-16 (Araujo et al. 2019)."""
    from torchvision import models, ops

    branch = nn.Sequential(conv(3, 3, 3), ops.StochasticDepth(0.5, "row"), conv(3, 3, 3))
    assert receptive_field(branch) == 5
    assert receptive_field(models.resnet18(), (3, 224, 224)) == 435
    assert receptive_field(models.vgg16().features, (3, 224, 224)) == 212
    assert_true(models.mobilenet_v2(num_classes=2).features[:7], size=192)
    assert_true(models.squeezenet1_1(num_classes=2).features[:6], size=128)


# Layers


@pytest.mark.parametrize("name", NETS)
def test_layers_add_up(name):
    net = build(name, 10)
    traced = trace(net)
    assert sum(row.parameters for row in traced.layers) == sum(p.numel() for p in net.parameters())
    counted = []

    def count(module, inputs, output):
        fan_in = module.weight[0].numel()
        counted.append(fan_in * output[0].numel())

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    net.eval()(torch.zeros(1, 3, 32, 32))
    assert traced.multiply_adds == sum(counted)
    assert traced.layers[-1].output[0] == 10


def test_a_layer():
    convolution = nn.Conv2d(4, 8, (3, 1), (2, 1), (2, 0), (2, 1), groups=4)
    net = nn.Sequential(convolution, nn.BatchNorm2d(8))
    layer, norm = trace(net, (4, 32, 32)).layers
    assert (layer.name, layer.kind, norm.kind) == ("0", "Conv2d", "BatchNorm2d")
    assert (layer.kernel, layer.stride, layer.dilation, layer.groups) == ((3, 1), (2, 1), (2, 1), 4)
    assert (layer.output, layer.jump, layer.receptive_field) == ((8, 16, 32), (2, 1), (5, 1))
    assert (layer.parameters, layer.multiply_adds) == (32, 24 * 16 * 32)
    assert (norm.parameters, norm.multiply_adds) == (16, 0)


def test_tracing_changes_nothing():
    net = build("atrous", 10).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trace(net)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# What it cannot account for


def shuffled(x):
    return x.view(x.size(0), 2, 2, 32, 32).transpose(1, 2).reshape(x.size(0), 4, 32, 32)


def added_in_place(m, x):
    x = m.a(x)
    x.add_(m.b(x))
    return m.b(x)


def added_in_place_and_used(m, x):
    x = m.a(x)
    y = x.add_(m.b(x))
    return m.b(x) + y


UNACCOUNTED = {
    "roll": lambda m, x: torch.roll(m.a(x), 1, 3),
    "view": lambda m, x: m.b(shuffled(m.a(x))),
    "flatten": lambda m, x: m.a(x).flatten(2).softmax(2).mean(2),
    "interpolate": lambda m, x: F.interpolate(m.a(x), scale_factor=2),
    "transpose": lambda m, x: m.a(x).transpose(2, 3),
    "cat": lambda m, x: torch.cat([m.a(x), m.a(x)], 3),
    "truediv": lambda m, x: m.a(x) / m.a(x).max(),
    "mean": lambda m, x: m.a(x) * m.a(x).mean(3, keepdim=True),
    "mul": lambda m, x: m.a(x) * m.b(m.a(x)[:, :, :1]),
    "adaptive_avg_pool2d": lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 5)),
    "softmax": lambda m, x: m.a(x).softmax(3),
    "getitem": lambda m, x: m.a(x)[:, :, -8:],
    "getitem.*": lambda m, x: m.a(x)[:, :, x.size(2) // 4 :],
    "avg_pool2d": lambda m, x: F.avg_pool2d(m.a(x), x.size(2)),
    "lp_pool2d": lambda m, x: m.b(F.lp_pool2d(m.a(x), 2, 2)),
    "mean.?": lambda m, x: F.conv1d(m.a(x).mean(2), m.b.weight[:, :, 0]),
    "add_": added_in_place,
    "add_.*": added_in_place_and_used,
}


@pytest.mark.parametrize(("named", "function"), UNACCOUNTED.items(), ids=UNACCOUNTED)
def test_an_operator_it_cannot_account_for_is_named(named, function):
    net = Wrap(function, conv(3, 4, 3), conv(4, 4, 3))
    with pytest.raises(UserError, match=f"node {named}"):
        receptive_field(net)


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.MaxPool2d((2,)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_it_cannot_account_for_are_named(layer):
    with pytest.raises(UserError, match=type(layer).__name__):
        receptive_field(nn.Sequential(conv(3, 4, 3), layer, conv(4, 4, 3)))


def test_what_cannot_be_traced():
    branching = Wrap(lambda m, x: m.a(x) if x.sum() > 0 else x, conv(3, 3, 3))
    with pytest.raises(UserError, match="cannot be traced"):
        receptive_field(branching)
    with pytest.raises(UserError, match="cannot be traced"):
        receptive_field(nn.Conv2d(4, 4, 3))
    with pytest.raises(UserError, match="does not depend"):
        receptive_field(Wrap(lambda m, x: m.a.weight, conv(3, 3, 3)))


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
        with torch.no_grad():
            hypothesis.assume(min(net(torch.zeros(1, 3, 128, 128)).shape[2:]) > 1)
        traced = trace(net, (3, 128, 128))
        hypothesis.assume(max(traced.receptive_field) < 50)
        assert measured(traced.features, 128) == traced.receptive_field

    check()
