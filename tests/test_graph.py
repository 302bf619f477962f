"""A module's traced graph: its layers, its global pooling, and what is not supported."""

import pytest
import torch
import torch.nn.functional as F
from test_fields import Wrap, conv
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from common import UserError
from graph import trace
from model import build
from rf import receptive_field


def test_multiply_adds_of_a_linear_layer_for_every_row():
    behind = nn.Flatten(), nn.Unflatten(1, (2, 4)), nn.Linear(4, 5)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.AdaptiveAvgPool2d(1), *behind)
    assert [layer.multiply_adds for layer in trace(net).layers] == [8 * 48 * 64, 0, 2 * 4 * 5]


def test_multiply_adds_of_a_gate_over_channels():
    """Like ECA-Net's: a Conv1d over the channel means."""

    def gated(m, x):
        x = m.a(x)
        weights = m.b(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return x * weights.sigmoid().unsqueeze(2).unsqueeze(3)

    net = Wrap(gated, conv(3, 8, 3), nn.Conv1d(1, 1, 3, padding=1, bias=False))
    assert [layer.multiply_adds for layer in trace(net).layers] == [3 * 8 * 9 * 1024, 3 * 8]


def test_a_parametrized_layer():
    net = weight_norm(conv(3, 4, 3))
    assert receptive_field(net) == 3
    with pytest.raises(UserError, match="node conv2d"):
        receptive_field(Wrap(lambda m, x: F.conv2d(x, m.a.weight), net))


def test_a_layer_of_its_own_is_what_it_computes():
    class Blurred(nn.ReLU):
        def forward(self, x):
            return F.avg_pool2d(super().forward(x), 3, 1, 1)

    class BlurredNorm(nn.BatchNorm2d):
        def forward(self, x):
            return F.avg_pool2d(x, 3, 1, 1)

    assert receptive_field(nn.Sequential(Blurred(), BlurredNorm(3))) == 5


def test_what_changes_unseen_by_the_graph():
    def added(m, x):
        y = x = m.a(x)
        x += m.b(x)
        return m.c(y)

    with pytest.raises(UserError, match=r"computes something else, for example where `x \+="):
        receptive_field(Wrap(added, *(conv(3, 3, k) for k in (3, 5, 7))))


def test_what_draws_at_random():
    net, state = Wrap(lambda m, x: F.dropout(m.a(x)), conv(3, 4, 5)), torch.get_rng_state()
    assert receptive_field(net) == 5
    assert torch.equal(torch.get_rng_state(), state)


def test_values_may_be_no_numbers():
    assert receptive_field(Wrap(lambda m, x: m.a(x).sqrt(), conv(3, 4, 5))) == 5


def test_a_pooling_may_take_two_steps():
    for pool in (lambda x: x.flatten(2).mean(2), lambda x: x.mean(3).mean(2)):
        assert receptive_field(Wrap(lambda m, x, pool=pool: pool(m.a(x)), conv(3, 4, 5))) == 5


def test_a_convolution_of_the_whole_map_is_no_pooling():
    assert receptive_field(nn.Conv2d(3, 4, 32)) == 32
    assert receptive_field(nn.Sequential(conv(3, 4, 3), nn.AvgPool2d(32, padding=16))) == 34


def test_a_dilated_pooling():
    net = Wrap(lambda m, x: torch.max_pool2d(m.a(x), 3, 1, 1, 2), conv(3, 3, 3))
    assert receptive_field(net) == 7


def test_statistics_of_a_whole_map_are_left_out():
    assert receptive_field(nn.Sequential(conv(3, 4, 3), nn.GroupNorm(2, 4), conv(4, 4, 3))) == 5
    centred = Wrap(lambda m, x: (y := m.a(x)) - y.mean((0, 2, 3), True), conv(3, 4, 3))
    assert receptive_field(centred) == 32


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_several_poolings_that_with_the_largest_field_counts(order):
    def pooled(m, x):
        maps = m.a(x), m.b(m.a(x))
        return torch.cat([maps[i].mean((2, 3)) for i in order], 1)

    assert (
        receptive_field(Wrap(pooled, conv(3, 4, 3), nn.Conv2d(4, 4, (1, 5), padding=(0, 2)))) == 7
    )


def pooled_by(pool):
    return Wrap(lambda m, x: m.b(pool(m.a(x).relu())), conv(3, 4, 7), nn.Linear(4, 2))


@pytest.mark.parametrize("packed", [lambda y: (y, 2 * y), lambda y: {"logits": y}])
def test_a_net_may_return_more_than_a_tensor(packed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 5)

        def forward(self, x):
            return packed(self.convolution(x).mean((2, 3)))

    assert trace(Net()).receptive_field == (5, 5)


@pytest.mark.parametrize(
    "net",
    [
        pooled_by(lambda x: x.mean((2, 3))),
        pooled_by(lambda x: torch.mean(x, dim=[-1, -2])),
        pooled_by(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)),
        pooled_by(lambda x: F.avg_pool2d(x, 32).squeeze(3).squeeze(2)),
        pooled_by(lambda x: x.amax((2, 3), keepdim=True).view(x.size(0), -1)),
        nn.Sequential(conv(3, 4, 7), nn.ReLU(), nn.AvgPool2d(32), nn.BatchNorm2d(4), nn.Flatten()),
        nn.Sequential(conv(3, 1, 7), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 2)),
        nn.Sequential(
            conv(3, 1, 7), nn.ReLU(), nn.Flatten(), nn.Unflatten(1, (1024, 1, 1)), conv(1024, 2, 1)
        ),
    ],
)
def test_the_field_is_that_of_the_global_poolings_input(net):
    traced = trace(net)
    assert traced.receptive_field == (7, 7)
    images = torch.randn(2, 3, 32, 32)
    maps = traced.features(images)
    assert maps.shape[2:] == (32, 32)
    assert maps.min() == 0  # after the ReLU
    torch.testing.assert_close(traced.both(images), (maps, net.eval()(images)))
    assert traced.layers[0].receptive_field == (7, 7)
    assert traced.layers[-1].receptive_field is None


# Layers


def test_a_layer():
    convolution = nn.Conv2d(4, 8, (3, 1), (2, 1), (2, 0), (2, 1), groups=4)
    net = nn.Sequential(convolution, nn.BatchNorm2d(8))
    layer, norm = trace(net, (4, 32, 32)).layers
    assert (layer.name, layer.kind, norm.kind) == ("0", "Conv2d", "BatchNorm2d")
    assert (layer.kernel, layer.stride, layer.dilation, layer.groups) == ((3, 1), (2, 1), (2, 1), 4)
    assert (layer.input, norm.input) == ((4, 32, 32), (8, 16, 32))
    assert (layer.output, layer.jump, layer.receptive_field) == ((8, 16, 32), (2, 1), (5, 1))
    assert (layer.parameters, layer.multiply_adds) == (32, 24 * 16 * 32)
    assert (norm.parameters, norm.multiply_adds) == (16, 0)


def test_tracing_changes_nothing():
    net = build("atrous", 10).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trace(net)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# What is not supported


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


def part_added_in_place(m, x):
    x = m.a(x)
    x[:, :3].add_(m.b(x)[:, :3])
    return m.b(x)


def added_out_of_place(m, x):
    x = m.a(x)
    torch.add(x, m.b(x), out=x)
    return m.b(x)


UNACCOUNTED = {
    "roll": lambda m, x: torch.roll(m.a(x), 1, 3),
    "view": lambda m, x: m.b(shuffled(m.a(x))),
    "view.?": lambda m, x: m.b(m.a(x).flatten(1).view(1, 4, 32, 32)),
    "flatten": lambda m, x: m.a(x).flatten(2).softmax(2).mean(2),
    "interpolate": lambda m, x: F.interpolate(m.a(x), scale_factor=2),
    "transpose": lambda m, x: m.a(x).transpose(2, 3),
    "cat": lambda m, x: torch.cat([m.a(x), m.a(x)], 3),
    "truediv": lambda m, x: m.a(x) / m.a(x).max(),
    "truediv.?": lambda m, x: m.a(x) / m.a(x).sum(),
    "mean": lambda m, x: m.a(x) * m.a(x).mean(3, keepdim=True),
    "mul": lambda m, x: m.a(x) * m.b(m.a(x)[:, :, :1]),
    "adaptive_avg_pool2d": lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), (8, 5))),
    "softmax": lambda m, x: m.a(x).softmax(3),
    "getitem": lambda m, x: m.a(x)[:, :, -8:],
    "getitem.*": lambda m, x: m.a(x)[:, :, x.size(2) // 4 :],
    "avg_pool2d": lambda m, x: F.avg_pool2d(m.a(x), x.size(2)),
    "lp_pool2d": lambda m, x: m.b(F.lp_pool2d(m.a(x), 2, 2)),
    "mean.?": lambda m, x: F.conv1d(m.a(x).mean(2), m.b.weight[:, :, 0]),
    "getitem.?": lambda m, x: m.a(x)[:, :, [*range(31, -1, -1)]],
    "add.?": lambda m, x: torch.add(y := m.a(x), m.b(y), out=y) + m.b(y),
    "add_.*": added_in_place_and_used,
    "add_.?": lambda m, x: (y := m.a(x))[:, :4].add_(m.b(y)) + m.b(y),
}


@pytest.mark.parametrize(("named", "function"), UNACCOUNTED.items(), ids=UNACCOUNTED)
def test_an_operator_it_cannot_account_for_is_named(named, function):
    net = Wrap(function, conv(3, 4, 3), conv(4, 4, 3))
    with pytest.raises(UserError, match=f"node {named}"):
        receptive_field(net)


FLOAT = (torch.float32,)
VIEWS = {"contiguous": (), "detach": (), "float": (), "to": FLOAT, "type": FLOAT}
VIEWS |= {"flatten": (1,), "view": (1, -1), "reshape": (1, -1)}


@pytest.mark.parametrize(("view", "given"), VIEWS.items(), ids=VIEWS)
def test_a_change_through_a_view_is_named(view, given):
    def changed(m, x):
        y = m.a(x)
        added = getattr(m.b(y), view)(*given)
        return getattr(y, view)(*given).add_(added).flatten(1) + m.b(y).flatten(1)

    with pytest.raises(UserError, match="node add_"):
        receptive_field(Wrap(changed, conv(3, 4, 3), conv(4, 4, 3)))


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(32),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.MaxPool2d((2,)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_it_cannot_account_for_are_named(layer):
    with pytest.raises(UserError, match=type(layer).__name__):
        receptive_field(nn.Sequential(conv(3, 4, 3), layer, conv(4, 4, 3)))


def test_what_cannot_be_traced():
    keeping = conv(3, 3, 3)
    keeping.map = keeping(torch.ones(1, 3, 32, 32))  # a tensor that cannot be copied
    with pytest.raises(UserError, match="cannot be traced: Only Tensors"):
        receptive_field(nn.Sequential(keeping))
    branching = Wrap(lambda m, x: m.a(x) if x.sum() > 0 else x, conv(3, 3, 3))
    with pytest.raises(UserError, match="cannot be traced"):
        receptive_field(branching)
    with pytest.raises(UserError, match="cannot be traced"):
        receptive_field(nn.Conv2d(4, 4, 3))
    with pytest.raises(UserError, match="does not depend"):
        receptive_field(Wrap(lambda m, x: m.a.weight, conv(3, 3, 3)))


def relu_in_place(m, x):
    x = m.a(x)
    F.relu(x, inplace=True)
    return x


@pytest.mark.parametrize(
    "function", [relu_in_place, added_in_place, part_added_in_place, added_out_of_place]
)
def test_a_result_in_place_that_nobody_takes(function):
    with pytest.raises(UserError, match="its graph computes something else"):
        trace(Wrap(function, conv(3, 4, 3), conv(4, 4, 9)))


def test_a_branch_that_nobody_uses():
    def forward(module, x):
        x = module.a(x)
        module.b(x).mean((2, 3))
        return x.mean((2, 3))

    traced = trace(Wrap(forward, nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 9)))
    assert traced.receptive_field == (3, 3)
    assert [layer.name for layer in traced.layers] == ["a"]
