"""kernels.py and depthwise.py against PyTorch; on a CPU Triton interprets them."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mirror
import model

triton = pytest.importorskip("triton")
depthwise, kernels = (pytest.importorskip(name) for name in ("depthwise", "kernels"))

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
LAYOUTS = (torch.contiguous_format, torch.channels_last)
found = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, np)]
apart = DEVICE.type == "cpu" and found[0] < (3, 7) and found[1] >= (2, 4)
loops = pytest.mark.skipif(apart, reason="this Triton's interpreter needs numpy < 2.4 for loops")


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def maps(*shape, layout=torch.channels_last):
    return torch.randn(shape, device=DEVICE).to(memory_format=layout).requires_grad_()


def assert_same(found, expected, inputs):
    """Values, and gradients with respect to every input."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad(each, inputs, weights) for each in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "kernel", "size", "options"),
    [
        (8, 3, 8, {"padding": 2, "dilation": 2}),
        (40, 4, 8, {"padding": 1, "stride": 2}),
        (8, 3, 7, {"padding": 0, "stride": 3, "dilation": 2}),
        (8, 5, 6, {"padding": 2}),
    ],
)
def test_depthwise(channels, kernel, size, options):
    layout = LAYOUTS[size % 2]
    x = maps(2, channels, size, size, layout=layout)
    weight = maps(channels, 1, kernel, kernel, layout=layout)
    found = depthwise.depthwise(x, weight, **{"stride": 1, "dilation": 1} | options)
    assert_same(found, F.conv2d(x, weight, groups=channels, **options), (x, weight))


@loops
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm(skips, layout):
    x = (3 + 2 * maps(3, 40, 5, 5, layout=layout)).detach().requires_grad_()
    skip = maps(3, 40, 5, 5, layout=layout) if skips else None
    layer = mirror.MirrorNorm(20).to(DEVICE)
    nn.init.uniform_(layer.weight), nn.init.normal_(layer.bias)
    plain = copy.deepcopy(layer)
    plain.weight, plain.bias = layer.weight, layer.bias
    inputs = (x, layer.weight, layer.bias) + ((skip,) if skips else ())
    assert_same(kernels.norm(layer, x, skip), plain.by_pytorch(x, skip), inputs)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    layer.track_running_stats = False
    kernels.norm(layer, x, skip)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())


@loops
def test_programs_share_rows_that_they_cannot_take_at_once(monkeypatch):
    if DEVICE.type == "cpu":  # where 128 would take seconds
        monkeypatch.setattr(kernels, "PROGRAMS", triton.language.constexpr(4))
    programs = kernels.PROGRAMS.value
    x, layer = maps(1, 208, 2 * programs + 1, 32), mirror.MirrorNorm(104).to(DEVICE)
    nn.init.constant_(layer.bias, 9)  # ReLU passes everything: equally many terms in each sum
    assert kernels._Shape(x, 104).tiles > programs
    assert_same(kernels.norm(layer, x, None), layer.by_pytorch(x), (x, layer.weight, layer.bias))


@loops
def test_maps_in_bfloat16_are_computed_in_float32():
    """Only the two functions' outcomes are rounded, by up to 2⁻⁸ each."""
    norm, inputs = mirror.MirrorNorm(20).to(DEVICE), [maps(2, 40, 8, 8), maps(2, 40, 8, 8)]
    nn.init.uniform_(norm.weight), nn.init.normal_(norm.bias)
    inputs = [each.detach().bfloat16() for each in (*inputs, maps(40, 1, 4, 4))]

    def ours(x, skip, weight):
        return depthwise.depthwise(kernels.norm(norm, x, skip), weight, 2, 1, 1)

    def pytorchs(x, skip, weight):
        return F.conv2d(norm.by_pytorch(x, skip), weight, None, 2, 1, groups=40)

    def outcomes(function, inputs):
        given = [*(each.requires_grad_() for each in inputs), *norm.parameters()]
        y = function(*inputs)
        return [y, *torch.autograd.grad(y.sum(), given)]

    found, expected = (
        outcomes(ours, inputs),
        outcomes(pytorchs, [x.detach().float() for x in inputs]),
    )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


@loops
def test_what_is_no_number_stays_none():
    x, layer = maps(2, 6, 4, 4).detach(), mirror.MirrorNorm(3).to(DEVICE)
    x[0, 0] = torch.nan
    found, expected = kernels.norm(layer, x, None), layer.by_pytorch(x)
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(4, 1, 3, 3), (4, 6, 3, 3), (4, 6, 1, 1), (5, 3, 3, 3), (5, 1, 4, 4)]
)
def test_mirrored_weights(shape, layout):
    sources = [maps(*shape, layout=layout) for _ in range(2 if shape[0] == 4 else 1)]
    plain = (mirror.Mixed() if len(sources) == 2 else mirror.Paired()).eval()
    assert_same(kernels.mirrored(*sources, *[None][len(sources) - 1 :]), plain(*sources), sources)


def test_slow_convolutions_alone_are_taken_over(monkeypatch):
    options = (
        {"groups": 4, "dilation": 2},
        {"groups": 4, "stride": 2},
        {"groups": 4},
        {"groups": 4, "stride": 2, "bias": True},
        {"groups": 4, "stride": (2, 1)},
        {"groups": 4, "stride": 2, "padding": 1, "padding_mode": "reflect"},
        {"groups": 2, "stride": 2},
        {"stride": 2},
    )
    net = nn.ModuleList(nn.Conv2d(4, 4, 3, **{"bias": False} | each) for each in options)
    net.append(nn.Conv2d(4, 8, 3, groups=4, stride=2, bias=False))
    depthwise.take_over(net)
    assert ["forward" in vars(layer) for layer in net] == [True, True, *[False] * 7]
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(net[0](x), F.conv2d(x, net[0].weight, dilation=2, groups=4))
    monkeypatch.setattr(depthwise, "triton_kernels", lambda _: kernels)
    oblong = x[..., :5]
    assert torch.equal(net[1](oblong), F.conv2d(oblong, net[1].weight, stride=2, groups=4))


@loops
def test_a_net_learns_the_same(monkeypatch):
    images, labels = torch.randn(4, 3, 8, 8, device=DEVICE), torch.arange(4, device=DEVICE)
    plain = nn.Sequential(
        model.dense(3, 8),
        model.Residual(*model.dense(8, 8), *model.dense(8, 8)),
        model.separable(8, 12, 4, stride=2),
        model.Residual(*model.separable(12, 12), *model.separable(12, 12, dilation=2)),
        mirror.MirrorPool(),
        nn.Linear(6, 4),
    ).to(DEVICE, memory_format=torch.channels_last)
    for layer in plain.modules():
        if isinstance(layer, mirror.MirrorNorm):
            nn.init.uniform_(layer.weight)  # the last of a branch is 0 before training
    net = copy.deepcopy(plain)
    gradients = {}
    for each, chosen in ((plain, None), (net, kernels)):
        for module in (mirror, depthwise):
            monkeypatch.setattr(module, "triton_kernels", lambda _, chosen=chosen: chosen)
        if chosen:
            depthwise.take_over(each)
        F.cross_entropy(each(images), labels).backward()
        gradients[each] = [parameter.grad for parameter in each.parameters()]
    for found, expected in zip(gradients[net], gradients[plain], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

import depthwise, kernels, mirror, model

class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

run = JITFunction.run

def compiling(self, *args, grid, warmup, **options):
    assert run(self, *args, grid=grid, warmup=True, **options).asm["cubin"]
    print(self.__name__)

driver.set_active(Hopper())
JITFunction.run = compiling
for module in (depthwise, mirror):
    module.triton_kernels = lambda _: kernels
net = model.build("atrous", 10).to(memory_format=torch.channels_last)
depthwise.take_over(net)
torch.is_autocast_enabled, torch.get_autocast_dtype = lambda _: True, lambda _: torch.bfloat16
net[:-1](torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).sum().backward()
"""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU compiles and runs them")
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """Interpreted kernels are never compiled: here Triton compiles them for an H100, in bf16, and
    runs nothing."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    root = Path(__file__).parents[1]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert child.returncode == 0, child.stderr
    expected = "_collect _gradient _gradient_sums _moments _normalize _settle _spread _taps _window"
    assert set(child.stdout.split()) == set(expected.split())
