import pytest
import torch
from torch import nn

from mirror import MirrorNorm, MirrorPool, Mixed, Paired, mirrored
from model import build


def test_mirrored_images_have_the_same_logits():
    net, images = build("atrous", 10).double(), torch.randn(8, 3, 32, 32).double()
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # the last of a branch is 0 before training
        nn.init.normal_(norm.bias)
        norm.momentum = 1.0
    for _ in ("trained", "evaluated"):
        logits = net(images)
        torch.testing.assert_close(net(images.flip(3)), logits, rtol=0, atol=1e-10)
        assert (net(images.flip(2)) - logits).abs().max() > 0.01  # turned upside down
        net.eval()


def swapped(maps):
    """Maps of an image → those of its mirror image."""
    return maps.flip(3).roll(maps.shape[1] // 2, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 8},
        {"kernel_size": 4, "padding": 1, "stride": 2, "groups": 8},
        {"kernel_size": 2, "stride": 2},
    ],
)
def test_a_convolution_of_the_mirror_image_is_the_mirror_image(options):
    plain = nn.Conv2d(8, 16 if "groups" not in options else 8, bias=False, **options)
    weights = plain.weight.numel()
    convolution, maps = mirrored(plain), torch.randn(2, 8, 6, 6)
    expected = swapped(convolution(maps))
    torch.testing.assert_close(convolution(swapped(maps)), expected, rtol=0, atol=1e-5)
    assert 2 * sum(p.numel() for p in convolution.parameters()) == weights
    assert convolution.weight.numel() == weights
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in convolution.parameters())


def test_a_weight_has_the_singular_values_of_its_kernels():
    kernels = torch.randn(2, 4, 6, 3, 3).unbind()
    weight = Mixed()(*kernels)
    found = torch.linalg.svdvals(weight.flatten(1))
    expected = torch.cat([torch.linalg.svdvals(each.flatten(1)) for each in kernels])
    torch.testing.assert_close(found, expected.sort(descending=True).values)


def test_kernels_come_back_from_the_weight():
    kernels = torch.randn(2, 4, 6, 3, 3).unbind()
    torch.testing.assert_close(Mixed().right_inverse(Mixed()(*kernels)), kernels)
    assert torch.equal(Paired().right_inverse(Paired()(kernels[0])), kernels[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("skips", [False, True])
def test_both_halves_are_normalised_alike(skips, memory_format):
    maps, other = torch.randn(2, 5, 6, 4, 4).unbind()
    maps = maps.to(memory_format=memory_format)
    norm, plain = MirrorNorm(3), nn.BatchNorm2d(3)
    for each in (norm, plain):
        nn.init.constant_(each.weight, 2.0)
    for _ in ("trained", "evaluated"):
        expected = torch.cat(plain(torch.cat(maps.chunk(2, 1))).chunk(2), 1)
        expected = expected + other if skips else expected
        found = norm(maps, other if skips else None)
        torch.testing.assert_close(found, expected.relu())
        torch.testing.assert_close(norm.state_dict(), plain.state_dict())
        norm.eval(), plain.eval()


def test_pooling():
    maps = torch.randn(2, 10, 8, 8)
    torch.testing.assert_close(MirrorPool()(maps), MirrorPool()(swapped(maps)))
    expected = nn.functional.adaptive_avg_pool2d(maps, 1).flatten(1).view(2, 2, 5).mean(1)
    torch.testing.assert_close(MirrorPool()(maps), expected)
