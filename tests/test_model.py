import math

import pytest
import torch
from test_main_job import SMALL
from torch import nn

import checkpoint
import model
import rf
import train
from common import UserError
from graph import trace
from mirror import MirrorPool
from model import Residual, build


def test_the_default_net_is_what_it_promises():
    net = build("atrous", 10)
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert sum(p.numel() for p in net.parameters()) == 186_858 < 200_000
    assert rf.receptive_field(net) == 90 > 44
    assert round(trace(net).multiply_adds / 1e6, 1) == 52.1
    assert any(c.groups == c.in_channels > 1 for c in convs)  # depthwise
    assert any(max(c.dilation) > 1 for c in convs)
    assert all(max(c.dilation) == 1 for c in convs if max(c.stride) > 1)  # else pixels are lost
    assert math.prod(max(c.stride) for c in convs) == 4
    assert not any("Max" in type(module).__name__ for module in net.modules())
    assert any(isinstance(module, MirrorPool) for module in net.modules())
    assert build("atrous", 10, dropout=0.9)(torch.randn(8, 3, 32, 32)).all()  # drops no logit


def test_every_weight_gets_a_gradient_after_one_step():
    net = build("atrous", 10)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):  # the branches' last norms start at zero, which blocks the gradient once
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_blocks_start_as_the_identity():
    blocks = [module for module in build("atrous", 10) if isinstance(module, Residual)]
    assert len(blocks) == 6
    for block in blocks:
        x = torch.randn(2, block.layers[0].in_channels, 8, 8)
        assert torch.equal(block(x), x.relu())


def test_a_net_of_ones_own(tmp_path, monkeypatch, refused, no_pictures):
    def own(num_classes, dropout):
        layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), MirrorPool()]
        layers += [nn.Dropout(dropout)] if dropout else []  # renumbers what follows
        return nn.Sequential(*layers, nn.Linear(4, num_classes))

    run = [*SMALL, "--net", "mine", "--dropout", "0.5", "--out", str(tmp_path / "run")]
    monkeypatch.setitem(model.NETS, "mine", lambda *_: own(3, 0))
    assert "--net mine: must return logits (N, 10)" in refused(train.main, *run)
    monkeypatch.setitem(model.NETS, "mine", lambda classes: own(classes, 0))
    assert "NETS must hold a function of (num_classes, dropout)" in refused(train.main, *run)
    monkeypatch.setitem(model.NETS, "mine", lambda *of: own(*of).insert(1, nn.LayerNorm(15)))
    assert "--net mine: receptive field: node _1 (call_module" in refused(train.main, *run)
    monkeypatch.setitem(model.NETS, "mine", own)
    assert train.main(run) == 0
    net, _ = checkpoint.load_net(tmp_path / "run/model.pt")
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    monkeypatch.delitem(model.NETS, "mine")
    with pytest.raises(UserError, match="--net mine: not in NETS"):
        checkpoint.load_net(tmp_path / "run/model.pt")
