"""A source of images (CIFAR-10, folder, archive, synthetic) as uint8 tensors on the device."""

import hashlib
import http.client
import io
import os
import socket
import sys
import tarfile
import tempfile
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common import UserError, written_whole

SIZE = 32  # pixels, of every image
SUBSET_SEED = 20_210_626  # of --train-images and --holdout alone: every run draws the same subset
NETWORK_TIMEOUT = 10  # seconds
MAX_FILE_BYTES = 1 << 20  # a 32×32 image has a few kilobytes; what claims more is none
MAX_ARCHIVE_BYTES = 2 << 30  # unpacked: half a million images
CACHE_FORMAT = 1  # raise when what is cached changes


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, 3, 32, 32), labels int64 (N,); mean and std float32 (3,) in 0–255 units,
    per channel, of the training images."""

    name: str
    classes: list[str]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor


Splits = dict[str, tuple[Tensor, Tensor]]  # "train" and "test": images, labels


def load(
    source: str,
    data_dir: Path,
    device: torch.device,
    train_images: int | None = None,
    holdout: int = 0,
) -> Dataset:
    """The data set of `--data source`, on `device`.

    `train_images` keeps that many training images, `holdout` sets that many aside and tests on
    them instead of the test split; both are class-balanced. Raises UserError for whatever is wrong
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
    mean, std = _channel_statistics(images)
    if not bool((std > 0).all()):
        raise UserError(f"{name}: a colour channel has one value in all training images")
    tensors = [t.to(device) for t in (images, labels, *splits["test"], mean, std)]
    return Dataset(name, classes, *tensors)


def epoch_batches(count: int, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Index batches int64 (batch_size,) of one shuffled epoch on `device`, the last short one
    dropped; drawn from the device's default generator."""
    order = torch.randperm(count, device=device)
    return order[: count - count % batch_size].split(batch_size)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images (N, 3, H, W) in 0–255 units, uint8 or float, as float32 of mean 0 and deviation 1."""
    return (images.float() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def _read(source: str, data_dir: Path) -> tuple[str, list[str], Splits]:
    if source == "synthetic":
        return _synthetic()
    if source == "cifar10":
        try:
            return _cifar10(data_dir)
        except NETWORK_ERRORS as error:
            raise UserError(
                f"--data cifar10: no copy in {data_dir}, and the download failed ({error}); "
                "try --data synthetic, or a folder or archive of images"
            ) from error
    if source == "auto":
        try:
            return _cifar10(data_dir)
        except NETWORK_ERRORS as error:
            print(f"warning: CIFAR-10 could not be downloaded: {error}", file=sys.stderr)
            return _synthetic()
    path = Path(source)
    if not path.exists():
        raise UserError(
            f"--data {source}: neither auto, cifar10 or synthetic nor a folder or archive"
        )
    return _image_files(path)


def _balanced_order(labels: Tensor) -> Tensor:
    """A fixed random order (N,) of which every prefix is as class-balanced as the classes allow."""
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


def _synthetic() -> tuple[str, list[str], Splits]:
    from synthetic import SHAPES, shapes

    splits = {"train": shapes(5000, seed=0), "test": shapes(1000, seed=1)}
    return "synthetic", list(SHAPES), splits


# CIFAR-10, through torchvision

NETWORK_ERRORS = (
    urllib.error.URLError,
    TimeoutError,
    ConnectionError,
    http.client.HTTPException,
)


def _cifar10(data_dir: Path) -> tuple[str, list[str], Splits]:
    """Raises one of NETWORK_ERRORS where there is no local copy and the download fails."""
    from torchvision.datasets import CIFAR10

    if not (data_dir / CIFAR10.base_folder).exists():
        _fetch_cifar10(data_dir)
    splits = {}
    for split in ("train", "test"):
        try:
            part = CIFAR10(data_dir, train=split == "train", download=False)
        except Exception as error:  # a pickle can fail in any way
            raise UserError(
                f"{data_dir / CIFAR10.base_folder} is not a whole CIFAR-10 ({error}): "
                "delete that folder to download it again"
            ) from error
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        splits[split] = images, torch.tensor(part.targets)
    return "cifar10", part.classes, splits


def _fetch_cifar10(data_dir: Path) -> None:
    """Unpack the archive in `data_dir`, or a download, into `data_dir`, whole or not at all."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    archive = data_dir / CIFAR10.filename
    if archive.exists() and not check_integrity(archive, CIFAR10.tgz_md5):
        raise UserError(f"{archive} has a wrong MD5 sum: delete it to download it again")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as folder:
            if archive.exists():
                extract_archive(archive, folder)
            else:
                CIFAR10(folder, download=True)
            (Path(folder) / CIFAR10.base_folder).replace(data_dir / CIFAR10.base_folder)
    except RuntimeError as error:  # torchvision's word for a wrong MD5 sum
        raise UserError(f"the download of CIFAR-10 is damaged ({error}): try again") from error
    except NETWORK_ERRORS:
        raise
    except OSError as error:
        raise UserError(f"--data-dir {data_dir} cannot be written: {error}") from error
    finally:
        socket.setdefaulttimeout(timeout)


# Folders and archives of train/<class>/* and test/<class>/*


def _image_files(path: Path) -> tuple[str, list[str], Splits]:
    name = path.name.removesuffix(".xz").removesuffix(".gz").removesuffix(".tar")
    name = name or path.resolve().name
    try:
        key = _fingerprint(path)
    except OSError as error:
        raise UserError(f"--data {path} cannot be read: {error}") from error
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = cache_home / "atrous" / f"{name}-{key}.pt"
    if cache.exists():
        try:
            stored = torch.load(cache, weights_only=True)
            return name, stored["classes"], stored["splits"]
        except Exception as error:  # whatever is wrong with it, the source is at hand
            print(f"warning: {cache} is damaged, decoding again ({error})", file=sys.stderr)
    classes, splits = _decode(path)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(cache) as file:
            torch.save({"classes": classes, "splits": splits}, file)
    except OSError as error:
        print(f"warning: decoded images are not cached: {error}", file=sys.stderr)
    return name, classes, splits


def _fingerprint(path: Path) -> str:
    """Of an archive's bytes, or of the names, sizes and times of a folder's files."""
    digest = hashlib.sha256(str(CACHE_FORMAT).encode())
    if path.is_dir():
        for file in sorted(f for split in ("train", "test") for f in (path / split).rglob("*")):
            stat = file.stat()
            digest.update(
                f"{file.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode()
            )
    else:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def _decode(path: Path) -> tuple[list[str], Splits]:
    members = _folder_members(path) if path.is_dir() else _archive_members(path)
    decoded: dict[str, dict[tuple[str, str], np.ndarray]] = {"train": {}, "test": {}}
    for name, blob in tqdm(members, desc=f"decoding {path.name}", unit=" images", disable=None):
        split, *inner = PurePosixPath(name).parts
        if len(inner) != 2 or ".." in inner:
            raise UserError(f"--data {path}: {name} is not of the form {split}/<class>/<image>")
        if tuple(inner) in decoded[split]:
            raise UserError(f"--data {path}: {name} is there twice")
        decoded[split][tuple(inner)] = _pixels(path, name, blob)
    for split, images in decoded.items():
        if not images:
            raise UserError(f"--data {path}: no images in {split}/<class>/")
    classes, test_classes = (sorted({c for c, _ in decoded[s]}) for s in ("train", "test"))
    if classes != test_classes:
        raise UserError(
            f"--data {path}: train/ and test/ differ in the classes "
            f"{', '.join(sorted(set(classes) ^ set(test_classes)))}"
        )
    if len(classes) < 2:
        raise UserError(f"--data {path}: only the class {classes[0]}; at least two are needed")
    splits = {}
    for split, images in decoded.items():
        names = sorted(images)
        stacked = torch.from_numpy(np.stack([images[n] for n in names]))
        labels = torch.tensor([classes.index(c) for c, _ in names])
        splits[split] = stacked.permute(0, 3, 1, 2).contiguous(), labels
    return classes, splits


def _pixels(path: Path, name: str, blob: bytes) -> np.ndarray:
    """The RGB pixels uint8 (32, 32, 3) of a PNG or JPEG file."""
    try:
        with Image.open(io.BytesIO(blob), formats=("PNG", "JPEG")) as image:
            if image.size != (SIZE, SIZE):  # known from the header: nothing large is decoded
                raise UserError(
                    f"--data {path}: {name} is {image.width}×{image.height}, not {SIZE}×{SIZE}"
                )
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and others
        raise UserError(f"--data {path}: {name} is no whole PNG or JPEG image: {error}") from error


def _folder_members(path: Path) -> Iterator[tuple[str, bytes]]:
    for split in ("train", "test"):
        for file in sorted((path / split).rglob("*")):
            if file.is_dir():
                continue
            name = file.relative_to(path).as_posix()
            try:
                if file.stat().st_size > MAX_FILE_BYTES:
                    raise UserError(f"--data {path}: {name} is too large for a {SIZE}×{SIZE} image")
                yield name, file.read_bytes()
            except OSError as error:
                raise UserError(f"--data {path}: {name} cannot be read: {error}") from error


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header for the archive's end: every image after it would be lost. And
    it reads a long name into memory however long it claims to be."""

    @classmethod
    def frombuf(cls, buffer: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        info = super().frombuf(buffer, encoding, errors)
        if info.type not in tarfile.REGULAR_TYPES and info.size > MAX_FILE_BYTES:
            raise tarfile.ReadError(f"{info.name} claims {info.size:,} bytes")
        return info

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or cut off: {error}") from error


def _archive_members(path: Path) -> Iterator[tuple[str, bytes]]:
    last = "its beginning"
    try:
        with tarfile.open(path, tarinfo=_StrictTarInfo) as archive:
            for member in archive:
                archive.members = []  # or it keeps each
                if member.offset_data + member.size > MAX_ARCHIVE_BYTES:
                    raise UserError(f"--data {path}: unpacks to over {MAX_ARCHIVE_BYTES >> 30} GiB")
                parts = PurePosixPath(member.name).parts
                if not parts or parts[0] not in ("train", "test") or member.isdir():
                    continue
                last = "/".join(parts)
                if not member.isreg():
                    raise UserError(f"--data {path}: {last} is a link or device, not an image")
                if member.size > MAX_FILE_BYTES:
                    raise UserError(f"--data {path}: {last} is too large for a {SIZE}×{SIZE} image")
                blob = archive.extractfile(member).read()
                if len(blob) < member.size:
                    raise UserError(f"--data {path}: cut off within {last}")
                yield last, blob
            while archive.fileobj.read(1 << 20):  # to the end, where gzip and xz keep their sums
                if archive.fileobj.tell() > MAX_ARCHIVE_BYTES:
                    raise UserError(f"--data {path}: unpacks to over {MAX_ARCHIVE_BYTES >> 30} GiB")
    except UserError:
        raise
    except Exception as error:  # tarfile, gzip, zlib and lzma each have errors of their own
        raise UserError(
            f"--data {path} is no whole .tar, .tar.gz or .tar.xz archive "
            f"(last read: {last}): {error}"
        ) from error
