import pytest
import torch
from torch import nn

from common import UserError
from model import build
from rf import receptive_field, trace


def measured(net, size):
    """Side of the receptive field, from the gradient of one central output with positive weights.

    Norms and ReLUs become the identity, so that no path can cancel or be cut off.
    """
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d | nn.ReLU | nn.Dropout):
                setattr(module, name, nn.Identity())
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    net.double()
    image = torch.ones(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    output = net(image)
    output[0, 0, output.shape[2] // 2, output.shape[3] // 2].backward()
    rows, columns = image.grad.abs().sum((0, 1)).nonzero().unbind(1)
    return int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1)


STACKS = {
    "one": (nn.Conv2d(3, 4, 3, padding=1), 3),
    "strided": (nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2)), 7),
    "dilated stride": (
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 2, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, 1, 2, 2)),
        13,
    ),
    "even kernel": (nn.Sequential(nn.Conv2d(3, 4, 2, 2, 1), nn.Conv2d(4, 4, 4, 1, 1)), 8),
    "pooled": (nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 3, padding=1)), 6),
}


@pytest.mark.parametrize(("net", "expected"), STACKS.values(), ids=STACKS)
def test_plain_stacks(net, expected):
    assert receptive_field(net) == expected
    assert measured(net, 64) == (expected, expected)


def test_the_default_net_by_gradient():
    net = build("atrous", 10)
    expected = receptive_field(net)
    maps = nn.Sequential(*list(net.children())[:-4])  # up to the pooling
    assert measured(maps, 4 * expected) == (expected, expected)


def test_axes_that_differ():
    net = nn.Sequential(nn.Conv2d(3, 4, (3, 5), padding=(1, 2)), nn.Conv2d(4, 4, (1, 3)))
    assert trace(net).receptive_field == (3, 7)
    assert receptive_field(net) == 7
    assert measured(net, 32) == (3, 7)


def test_layers_of_the_default_net():
    net = build("atrous", 10)
    layers = trace(net).layers
    convs = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    rows = {layer.name: layer for layer in layers}
    assert set(convs) <= set(rows)
    for name, module in convs.items():
        assert rows[name].parameters == sum(p.numel() for p in module.parameters())
    first, last = layers[0], layers[-1]
    assert (first.output, first.multiply_adds) == ((32, 32, 32), 27 * 32 * 32 * 32)
    assert last.output == (10,)
    assert last.multiply_adds == convs[last.name].weight.numel()


def test_tracing_changes_nothing():
    net = build("atrous", 10).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trace(net)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_an_operator_it_cannot_account_for_is_named():
    class Shuffle(nn.Module):
        def forward(self, x):
            return torch.roll(x, 1, 3)

    with pytest.raises(UserError, match="roll"):
        receptive_field(nn.Sequential(nn.Conv2d(3, 4, 3), Shuffle()))
