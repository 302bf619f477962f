import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch

import reference
from augment import Policy
from synthetic import shapes

POLICY = Policy(flip_p=0.5, affine_p=0.5, cutout_p=0.5)


def loader(images, labels, workers=2, policy=POLICY):
    mean = torch.tensor([120.0, 130.0, 140.0])
    batches = [batch.tolist() for batch in torch.arange(len(images)).split(25)]
    return reference.loader(images, labels, batches, policy, mean, workers)


def numbered(count):
    """Identical images, labelled with their number."""
    return shapes(1, seed=0)[0].repeat(count, 1, 1, 1), torch.arange(count)


def epoch(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_batches():
    images = shapes(50, seed=3)[0]
    untouched = Policy(flip_p=0, affine_p=0, cutout_p=0)
    mean, order = torch.zeros(3), [[3, 1, 2], [40, 0, 7]]
    batches = reference.loader(images, torch.arange(50), order, untouched, mean, 0)
    for (batch, labels), expected in zip(batches, order, strict=True):
        assert batch.dtype == torch.uint8
        assert labels.tolist() == expected
        assert torch.equal(batch, images[expected])


def test_no_worker_and_no_epoch_repeats_another():
    batches = loader(*numbered(100))
    first, _ = epoch(batches)
    second, _ = epoch(batches)
    both = torch.cat([first, second]).flatten(1).numpy()
    # all 200 start from one image; those that draw an affine map or a hole are nearly all unique
    assert len(np.unique(both, axis=0)) > 0.6 * 200
    half = [first[i * 25 : (i + 1) * 25] for i in range(4)]  # workers take batches in turn
    assert not torch.equal(half[0], half[1])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("policy", [POLICY, Policy(flip_p=0, affine_p=0, cutout_p=1)])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_seed_decides(workers, policy):
    epochs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        epochs.append(epoch(loader(*numbered(50), workers, policy))[0])
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


def test_workers_leave_sigterm_to_the_run():
    """It goes to all processes of a job; the run first ends its epoch, for which it needs them."""
    others = multiprocessing.active_children()
    batches = iter(loader(*numbered(500)))
    next(batches), next(batches)  # one from each worker
    workers = [each for each in multiprocessing.active_children() if each not in others]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert sum(1 for _ in batches) == 18


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's own way")
def test_workers_are_forked():
    """From a fork server, Python 3.14's default, none would outlive SIGTERM to a whole job."""
    assert loader(*numbered(50)).multiprocessing_context.get_start_method() == "fork"


def test_workers_are_killed_where_there_is_no_sigchld(monkeypatch):
    """As on Windows."""
    monkeypatch.delattr(signal, "SIGCHLD")
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [worker])
    worker = Mock()
    reference.kill_workers()
    worker.kill.assert_called_once_with()


def test_albumentations_does_not_ask_the_network():
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"


@pytest.mark.parametrize(
    ("border", "mode"), [("reflect101", cv2.BORDER_REFLECT_101), ("constant", cv2.BORDER_CONSTANT)]
)
def test_transforms_are_those_of_the_policy(border, mode):
    colours = {"rgb_shift": (10, 5, 0.5), "rgb_shift_p": 0.6, "brightness": 0.2, "contrast": 0.3}
    policy = Policy(**colours, brightness_contrast_p=0.7, cutout=0, border=border)
    rgb, light, _, affine = reference.compose(policy, (1.0, 2.0, 3.0)).transforms
    limits = rgb.r_shift_limit, rgb.g_shift_limit, rgb.b_shift_limit
    assert limits == tuple((-x / 255, x / 255) for x in policy.rgb_shift)
    assert (light.brightness_limit, light.contrast_limit) == ((-0.2, 0.2), (-0.3, 0.3))
    assert (rgb.p, light.p) == (0.6, 0.7)
    assert (affine.border_mode, tuple(affine.fill)) == (mode, (1, 2, 3))


LEFT = """
import torch
import reference
from augment import Policy

images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
loader = reference.loader(images, torch.zeros(4), [[0, 1]] * 9, Policy(), torch.zeros(3), 2)
batches = iter(loader)
next(batches)
raise RuntimeError("left with two workers")
"""


@pytest.mark.slow
def test_no_process_waits_for_workers_left_by_an_error():
    root = Path(reference.__file__).parent
    command = [sys.executable, "-c", LEFT]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.endswith("RuntimeError: left with two workers\n")


def test_flip_and_hole_are_independent():
    """albumentations' own seeding would give every transform the same random stream."""
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[:, :, :, 0] = 255  # a bright first column: only a flip moves it
    policy = Policy(flip_p=0.5, affine_p=0, cutout_p=0.5)
    dataset = loader(image, torch.zeros(1), policy=policy).dataset
    seen = []
    for seed in range(400):
        torch.manual_seed(seed)
        reference.reseed(dataset.compose)
        result, _ = dataset[0]
        hole = (result == torch.tensor([120, 130, 140]).view(3, 1, 1)).all(0).any()
        seen.append((bool(hole), bool((result[:, :, 31] == 255).any())))
    holes, flips = np.array(seen).T
    assert abs(np.corrcoef(holes, flips)[0, 1]) < 0.2
    assert 0.4 < holes.mean() < 0.6
    assert 0.4 < flips.mean() < 0.6


def test_the_fill_is_the_grey_asked_for():
    images = torch.full((25, 3, 32, 32), 7, dtype=torch.uint8)
    policy = Policy(flip_p=0, affine_p=0, cutout_p=1, fill=120.7)
    result, _ = next(iter(loader(images, torch.arange(25), 0, policy)))
    assert set(result.unique().tolist()) == {7, 121}
