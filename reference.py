"""The reference: the augmentation of augment.py in albumentations, and a DataLoader around it."""

import atexit
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import data
from augment import Policy

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it goes online
import albumentations as A
import cv2

BORDER_MODES = {"reflect101": cv2.BORDER_REFLECT_101, "constant": cv2.BORDER_CONSTANT}


def compose(policy: Policy, fill: tuple[float, ...]) -> A.Compose:
    """`policy` as transforms of one image (H, W, 3) in 0–255 units; `fill` a level per channel.

    albumentations truncates `fill` to whole levels on uint8 images.
    """
    transforms = []
    if p := policy.rgb_shift_p:
        limits = (limit / 255 for limit in policy.rgb_shift)  # it reads up to ±1 as fractions
        transforms.append(A.RGBShift(*limits, p=p))
    if p := policy.brightness_contrast_p:
        transforms.append(A.RandomBrightnessContrast(policy.brightness, policy.contrast, p=p))
    transforms += [
        A.HorizontalFlip(p=policy.flip_p),
        A.Affine(
            scale=dict.fromkeys("xy", (1 - policy.scale, 1 + policy.scale)),
            translate_percent=dict.fromkeys("xy", (-policy.shift, policy.shift)),
            rotate=(-policy.rotate, policy.rotate),
            border_mode=BORDER_MODES[policy.border],
            fill=fill,
            p=policy.affine_p,
        ),
    ]
    if policy.cutout:
        side = (policy.cutout_min or policy.cutout, policy.cutout)
        transforms.append(A.CoarseDropout((1, 1), side, side, fill=fill, p=policy.cutout_p))
    return A.Compose(transforms)


class AugmentedImages(Dataset):
    """Images uint8 (N, 3, H, W), each augmented on its own when it is fetched, with its label."""

    def __init__(self, images: Tensor, labels: Tensor, compose: A.Compose) -> None:
        self.images = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        self.labels = labels
        self.compose = compose

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.compose(image=self.images[index])["image"]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), self.labels[index]


def loader(
    images: Tensor,
    labels: Tensor,
    batches: list[list[int]],
    policy: Policy,
    mean: Tensor,
    workers: int,
) -> DataLoader:
    """Augmented images of each of `batches`: uint8 (B, 3, H, W), with labels (B,), on the host."""
    fill = mean if policy.fill is None else torch.full_like(mean, policy.fill)
    transforms = compose(policy, tuple(fill.round().tolist()))
    reseed(transforms)
    return DataLoader(
        AugmentedImages(images.cpu(), labels.cpu(), transforms),
        batch_sampler=batches,
        num_workers=workers,
        # Python 3.14's fork server would not survive SIGTERM, sent to a whole job, nor its workers.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=images.is_cuda,
        worker_init_fn=start_worker,
    )


def augmented(
    dataset: data.Dataset, batches: Iterable[Tensor], policy: Policy, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The data set's training images at each index of `batches`, augmented, normalised and on its
    device, with their labels."""
    pinned = dataset.device.type == "cuda"  # from other memory, mps would copy after it was freed
    given = dataset.train_images, dataset.train_labels, [index.tolist() for index in batches]
    for batch in loader(*given, policy, dataset.mean, workers):
        images, labels = (each.to(dataset.device, non_blocking=pinned) for each in batch)
        yield data.normalize(images, dataset.mean, dataset.std), labels


def reseed(transforms: A.Compose) -> None:
    """Give `transforms` a random stream of its own, from this process's torch seed.

    `Compose.set_random_seed` would give each transform the same stream, correlating flip and hole.
    """
    seed = torch.initial_seed() % 2**63
    transforms.set_random_state(np.random.default_rng(seed), random.Random(seed))


def start_worker(_number: int) -> None:
    """Reseed a worker's transforms from torch's seed, new in every epoch; otherwise workers draw
    identical parameters, and every epoch repeats them."""
    reseed(torch.utils.data.get_worker_info().dataset.compose)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to a whole job, which ends its epoch first
    cv2.setNumThreads(0)


@atexit.register
def kill_workers() -> None:
    """Kill workers that an error left behind: multiprocessing would send them SIGTERM, which they
    ignore, and wait for ever."""
    if workers := multiprocessing.active_children():
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again
        for worker in workers:
            worker.kill()
