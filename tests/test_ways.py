from itertools import islice

import pytest
import torch

import data
import model
import ways
from graph import trace

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset():
    return data.load("synthetic", None, CPU, train_images=600)


def test_every_augmentation_touches_as_many_images(dataset, monkeypatch):
    pytest.importorskip("kornia", reason="pip install -r requirements-extra.txt")
    monkeypatch.setattr(ways, "BATCH", 200)
    normal = data.normalize(dataset.train_images, dataset.mean, dataset.std)
    originals = {image.numpy().tobytes() for image in normal}
    every = ways.augmentations(dataset, cores=1)
    assert len(every) == 6
    for name, way in every.items():
        batches = list(islice(way(), 4))
        assert all(batch.shape == (200, 3, 32, 32) for batch in batches)
        assert all(batch.dtype == torch.float32 for batch in batches)
        untouched = [
            sum(image.numpy().tobytes() in originals for image in batch) / 200 for batch in batches
        ]
        if "a draw a batch" in name:
            assert set(untouched) in ({0}, {0, 1})
        else:
            share = sum(untouched) / 4
            assert abs(share - 0.5 * 0.5 * 0.75) < 0.06, name


def test_a_plain_loop_learns():
    dataset = data.load("synthetic", None, CPU, train_images=40)
    settings = ways.settings("net136k", 16, "fp32")
    losses = list(islice(ways.plain_loop(dataset, settings)(), 20))
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plain_loop_has_its_precision(dataset, precision, monkeypatch):
    cross_entropy, seen = ways.F.cross_entropy, []

    def noting(logits, labels):
        seen.append(logits.dtype)
        return cross_entropy(logits, labels)

    monkeypatch.setattr(ways.F, "cross_entropy", noting)
    next(ways.plain_loop(dataset, ways.settings("net136k", 8, precision))())
    assert seen == [ways.step.DTYPES[precision]]


def test_training_goes_on_epoch_after_epoch():
    dataset = data.load("synthetic", None, CPU, train_images=80)
    high = ["--optimizer", "sgd", "--lr", "3"]  # OneCycle starts at a 25th
    for argv in ([], ["--augment", "albumentations", "--workers", "1"]):
        settings = ways.settings("net136k", 16, "fp32", *high, *argv)
        losses = torch.stack(list(islice(ways.training(dataset, settings)(), 24)))[:, 0]
        assert losses[-6:].mean() < 0.97 * losses[:6].mean()


def test_a_layer_by_itself_does_what_it_does_in_the_net(dataset, monkeypatch):
    """Each forward and backward runs, on the input and dtype that the layer has in the net."""
    settings = ways.settings("net176k", 16, "bf16", "--dropout", "0")
    names = [layer.name for layer in trace(model.build("net176k", 10)).layers]
    seen = []
    grad = torch.autograd.grad

    def spy(outputs, wanted, gradient):
        seen.append((tuple(wanted[0].shape), outputs.dtype))
        return grad(outputs, wanted, gradient)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    phases = ways.layers(dataset, settings, names)
    assert list(phases) == [f"{name} {way}" for name in names for way in ("forward", "backward")]
    for job, images in phases.values():
        job()
        assert images == 16
    assert seen[0] == ((32, 3, 3, 3), torch.bfloat16)  # the images themselves need no gradient
    assert seen[1] == ((16, 32, 32, 32), torch.bfloat16)
    assert len(seen) == len(names)
