from dataclasses import replace

import torch
from torch import nn

import data
import step
from augment import Policy
from model import build

CPU = torch.device("cpu")
NOTHING = Policy(flip_p=0, affine_p=0, cutout_p=0)


def test_what_the_net_sees():
    dataset = data.load("synthetic", None, CPU, train_images=50)
    plain = step.augmented(dataset.train_images, NOTHING, dataset.mean, dataset.std)
    normal = data.normalize(dataset.train_images, dataset.mean, dataset.std)
    assert torch.equal(plain, normal)
    hole = Policy(flip_p=0, affine_p=0, cutout_p=1)
    cut = step.augmented(dataset.train_images, hole, dataset.mean, dataset.std)
    assert ((cut == 0).all(1).flatten(1).sum(1) >= 16 * 16).all()  # the mean's colour
    grey = Policy(flip_p=0, affine_p=0, cutout_p=1, fill=100)
    cut = step.augmented(dataset.train_images, grey, dataset.mean, dataset.std)
    level = cut * dataset.std.view(-1, 1, 1) + dataset.mean.view(-1, 1, 1)
    assert ((level - 100).abs() < 1e-3).all(1).flatten(1).sum(1).min() >= 16 * 16
    bright = Policy(**vars(NOTHING) | {"brightness": 0.5, "brightness_contrast_p": 1})
    lit = step.augmented(dataset.train_images, bright, dataset.mean, dataset.std)
    assert (lit != normal).flatten(1).any(1).float().mean() > 0.9
    one, other = (
        step.augmented(dataset.train_images, Policy(), dataset.mean, dataset.std) for _ in range(2)
    )
    assert not torch.equal(one, other)


def train(precision, smoothing=0.0, steps=12):
    torch.manual_seed(0)
    dataset = data.load("synthetic", None, CPU, train_images=64)
    net = build("net136k", 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    inputs = data.normalize(dataset.train_images, dataset.mean, dataset.std)
    labels = dataset.train_labels
    return [
        step.train_step(net, optimizer, scaler, inputs, labels, precision, smoothing)
        for _ in range(steps)
    ]


def test_steps_lower_the_loss_in_either_precision():
    for precision in ("fp32", "bf16"):
        losses, right, skipped = zip(*train(precision), strict=True)
        assert not any(skipped)
        assert losses[-1] < 0.7 * losses[0]
        assert right[-1] > right[0]
        assert losses[0].dtype == torch.float32


def test_label_smoothing_counts():
    plain, smooth = (train("fp32", smoothing, steps=12)[-1][0] for smoothing in (0.0, 0.2))
    assert smooth > plain + 0.2


class Mirror(nn.Module):
    """Logits that tell the left half's brightness from the right half's."""

    def forward(self, x):
        return torch.stack([x[..., :16].mean((1, 2, 3)), x[..., 16:].mean((1, 2, 3))], dim=1)


def test_flip_averaging():
    dataset = replace(data.load("synthetic", None, CPU), classes=["left", "right"])
    plain = step.predict_logits(Mirror(), dataset, "fp32")
    averaged = step.predict_logits(Mirror(), dataset, "fp32", flip=True)
    assert plain.shape == (1000, 2)
    torch.testing.assert_close(averaged, (plain + plain.flip(1)) / 2)


def test_an_fp16_overflow_is_skipped_and_counted():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    before = net[1].weight.clone()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    loss, _, skipped = step.train_step(net, optimizer, scaler, images, labels, "fp16", 0.0)
    assert skipped == 1
    assert loss.isfinite()
    assert torch.equal(net[1].weight, before)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    _, _, skipped = step.train_step(net, optimizer, scaler, images, labels, "fp16", 0.0)
    assert skipped == 0
    assert not torch.equal(net[1].weight, before)
