"""A source of images (CIFAR-10, folder, archive, synthetic) as uint8 tensors on the device."""

import http.client
import socket
import sys
import urllib.error
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import image_files
import synthetic
from common import UserError
from image_files import Splits

SUBSET_SEED = 20_210_626  # for --train-images and --holdout only: every run draws the same subset
NETWORK_TIMEOUT = 10  # seconds


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, 3, 32, 32), labels int64 (N,); mean and std float32 (3,) in 0–255 units,
    per channel, of the training images; `tested_on` says what the test images are."""

    name: str
    classes: list[str]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    tested_on: str

    @property
    def device(self) -> torch.device:
        return self.train_images.device

    @cached_property
    def checksum(self) -> str:
        """A checksum of images, labels and classes that a run records and later compares."""
        check = zlib.crc32("\0".join(self.classes).encode())
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            check = zlib.crc32(tensor.cpu().numpy(), check)
        return f"{len(self.train_images):,} images (CRC {check:08x})"


def load(
    source: str,
    data_dir: Path,
    device: torch.device,
    train_images: int | None = None,
    holdout: int = 0,
) -> Dataset:
    """The data set of `--data source`, on `device`.

    `train_images` keeps that many training images, `holdout` sets that many aside and tests on
    them instead of the test split; both are class-balanced. Raises UserError if anything is wrong
    with the source.
    """
    name, classes, splits = _read(source, data_dir)
    images, labels = splits["train"]
    if train_images is not None or holdout:
        order = _balanced_order(labels)
        kept = len(order) - holdout if train_images is None else train_images
        if kept < 1 or kept + holdout > len(order):
            raise UserError(
                f"--train-images and --holdout ask for {holdout + max(kept, 1):,} images: "
                f"{name} has {len(order):,} for training"
            )
        held, chosen = order[:holdout], order[holdout : holdout + kept]
        if holdout:
            splits["test"] = images[held], labels[held]
        images, labels = images[chosen], labels[chosen]
        if len(left := labels.unique()) < len(classes):
            lost = next(name for k, name in enumerate(classes) if k not in left)
            raise UserError(f"--train-images and --holdout leave no training image of {lost}")
    mean, std = _channel_statistics(images)
    if not (std > 0).all():
        raise UserError(f"--data {source}: a colour channel is constant; use other images")
    tensors = [t.to(device) for t in (images, labels, *splits["test"], mean, std)]
    kind = "held-out training images" if holdout else "test images"
    return Dataset(name, classes, *tensors, f"{len(splits['test'][1]):,} {kind}")


def epoch_batches(count: int, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Index batches int64 (batch_size,) of one shuffled epoch on `device`, without a last short
    one; drawn from the device's default generator."""
    order = torch.randperm(count, device=device)
    return order[: count - count % batch_size].split(batch_size)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images (N, 3, H, W) in 0–255 units, uint8 or float, as float32 of mean 0 and deviation 1."""
    return (images - mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def _read(source: str, data_dir: Path) -> tuple[str, list[str], Splits]:
    if source in ("auto", "cifar10"):
        try:
            return _cifar10(data_dir)
        except NETWORK_ERRORS as error:
            if source == "cifar10" or any(data_dir.glob("cifar-10-*")):  # a damaged copy
                raise UserError(
                    f"--data {source}: no whole copy in {data_dir}, and the download failed "
                    f"({error}); try again with a network, or another --data"
                ) from error
            print(
                f"warning: CIFAR-10 could not be downloaded ({error}): generated images instead; "
                "--data takes a folder or archive of images",
                file=sys.stderr,
            )
    if source in ("auto", "synthetic"):
        splits = {"train": synthetic.shapes(5000, seed=0), "test": synthetic.shapes(1000, seed=1)}
        return "synthetic", list(synthetic.SHAPES), splits
    path = Path(source)
    if not (path.is_dir() or path.is_file()):  # not a pipe, say, which may never end
        raise UserError(
            f"--data {source}: no such folder or archive, and not auto, cifar10 or synthetic"
        )
    try:
        return image_files.read(path)
    except UserError as error:
        raise UserError(f"--data {source}: {error}") from error


def _balanced_order(labels: Tensor) -> Tensor:
    """A fixed random order (N,), every prefix of which is as class-balanced as possible."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SUBSET_SEED))
    rank = torch.empty_like(shuffled)
    for label in labels.unique():
        of_class = shuffled[labels[shuffled] == label]
        rank[of_class] = torch.arange(len(of_class))
    return shuffled[rank[shuffled].argsort(stable=True)]


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) of images uint8 (N, 3, H, W), exact: from histograms."""
    counts = torch.stack(
        [channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]
    )
    levels = torch.arange(256, dtype=torch.float64)
    share = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = share @ levels
    variance = (share * (levels - mean.view(-1, 1)) ** 2).sum(1)
    return mean.float(), variance.sqrt().float()


# CIFAR-10, through torchvision

NETWORK_ERRORS = (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException)


def _cifar10(data_dir: Path) -> tuple[str, list[str], Splits]:
    """Torchvision checks MD5 sums, and downloads or unpacks what is missing or damaged, except the
    names of the classes. Raises one of NETWORK_ERRORS if it cannot download."""
    from torchvision.datasets import CIFAR10

    folder, timeout = data_dir.absolute(), socket.getdefaulttimeout()  # it would expand a tilde
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        parts = [CIFAR10(folder, train=train, download=train) for train in (True, False)]
    except RuntimeError as error:  # what torchvision raises for a wrong MD5 sum
        raise UserError(
            f"CIFAR-10 in {data_dir} or its download is damaged ({error}): try again; if that does "
            f"not help, delete {data_dir / CIFAR10.base_folder}"
        ) from error
    except NETWORK_ERRORS:
        raise
    except OSError as error:
        raise UserError(f"--data-dir {data_dir} cannot be used: {error}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    train, test = zip(images, labels, strict=True)
    return "cifar10", parts[0].classes, {"train": train, "test": test}
