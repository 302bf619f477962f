from itertools import islice
from unittest.mock import Mock

import pytest
import torch

import data
import model
import ways
from augment import Policy
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


def test_a_hole_has_the_same_area_everywhere():
    pytest.importorskip("kornia", reason="pip install -r requirements-extra.txt")
    policy = Policy(flip_p=0, affine_p=0, cutout_p=1)
    for make in (ways._kornia, ways._torchvision):
        assert (make(policy)(torch.ones(1, 3, 32, 32)) == 0).sum() == 3 * 16 * 16


def test_each_way_is_as_deterministic_as_asked(dataset):
    for given in (["--deterministic"], []):
        way = ways.training(dataset, ways.settings("net136k", 16, "fp32", *given))
        assert torch.are_deterministic_algorithms_enabled() is bool(given)
        torch.use_deterministic_algorithms(not given)
        next(way())
        assert torch.are_deterministic_algorithms_enabled() is bool(given)


def test_a_plain_loop_learns():
    dataset = data.load("synthetic", None, CPU, train_images=40)
    settings = ways.settings("net136k", 16, "fp32")
    losses = list(islice(ways.plain_loop(dataset, settings)(), 20))
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plain_loop_has_its_precision(dataset, precision, monkeypatch):
    monkeypatch.setattr(ways.F, "cross_entropy", spy := Mock(wraps=ways.F.cross_entropy))
    next(ways.plain_loop(dataset, ways.settings("net136k", 8, precision))())
    assert spy.call_args.args[0].dtype == ways.machine.DTYPES[precision]


def test_phases_of_several_batches_count_their_images(dataset, monkeypatch):
    monkeypatch.setattr(ways.epochs, "batches_at_once", lambda *_: 3)
    monkeypatch.setattr(ways.step, "prepared", prepared := Mock(wraps=ways.step.prepared))
    learner = ways._learner(dataset, settings := ways.settings("net136k", 16, "fp32"))
    monkeypatch.setattr(ways, "_learner", lambda *_: learner)
    phases, head = ways.phases(dataset, settings), list(learner.net.parameters())[-1]
    before = head.detach().clone()
    for job, _ in phases.values():
        job()
    assert not torch.equal(head, before)
    assert len(prepared.call_args.args[0]) == 48
    assert [images for _, images in phases.values()] == [48, 48, 16, 16, 16]


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
    monkeypatch.setattr(torch.autograd, "grad", spy := Mock(wraps=torch.autograd.grad))
    phases = ways.layers(dataset, settings, names)
    assert list(phases) == [f"{name} {way}" for name in names for way in ("forward", "backward")]
    for job, images in phases.values():
        job()
        assert images == 16
    seen = [
        (tuple(wanted[0].shape), y.dtype, len(wanted)) for (y, wanted, _), _ in spy.call_args_list
    ]
    assert seen[0] == ((32, 3, 3, 3), torch.bfloat16, 1)  # the images themselves need no gradient
    assert seen[1] == ((16, 32, 32, 32), torch.bfloat16, 3)
    assert len(seen) == len(names)
