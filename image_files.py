"""A folder or archive of train/<class>/* and test/<class>/* as uint8 tensors, decoded once."""

import hashlib
import io
import os
import sys
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from common import SIZE, UserError, check_sums, first_line, written_whole

MAX_FILE_BYTES = 1 << 20  # a 32×32 image has a few kilobytes; a larger file is not one
MAX_HEADER_BYTES = 1 << 13  # of a long name, say: tarfile's time can be quadratic in it
MAX_ARCHIVE_BYTES = 2 << 30  # unpacked
MAX_IMAGES = 1_000_000  # 3 GB of pixels
CACHE_FORMAT = 5  # raise when what is cached changes

# "train" and "test": images uint8 (N, 3, 32, 32), labels int64 (N,)
Splits = dict[str, tuple[Tensor, Tensor]]


def read(path: Path) -> tuple[str, list[str], Splits]:
    """Name, classes and images of a folder or archive, from the cache if it is unchanged. Raises
    UserError if anything is wrong with it."""
    name = os.path.basename(os.path.abspath(path))  # of "..", too
    name = name.removesuffix(".xz").removesuffix(".gz").removesuffix(".tar")
    if not name.isprintable():  # "." may be such a folder
        raise UserError(f"its name, {name!a}, is unprintable; rename it")
    try:
        key = _fingerprint(path)
    except OSError as error:
        raise UserError(f"cannot be read: {error}") from error
    cache = _cache_home() / "atrous" / f"{name}-{key}.pt"
    try:
        check_sums(cache)
        stored = torch.load(cache, weights_only=True)
        return name, stored["classes"], stored["splits"]
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # whatever is wrong with it, the source is at hand
        why = first_line(error)
        print(f"warning: {cache} cannot be read, decoding again ({why})", file=sys.stderr)
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of damaged EXIF, name no file
        classes, splits = _decode(path)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(cache, f".{os.getpid()}.tmp") as file:  # two runs may decode at once
            torch.save({"classes": classes, "splits": splits}, file)
    except OSError as error:
        print(f"warning: decoded images are not cached: {error}", file=sys.stderr)
    return name, classes, splits


def _cache_home() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user without a name, as in a container
        raise UserError("no home folder to cache decoded images in: set XDG_CACHE_HOME") from error


def _fingerprint(path: Path) -> str:
    """A hash of an archive's bytes, or of the names, sizes and times of a folder's files."""
    digest = hashlib.sha256(str(CACHE_FORMAT).encode())
    if path.is_dir():
        for file in _files(path):
            stat = file.stat()
            facts = f"{file.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0"
            digest.update(os.fsencode(facts))
    else:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]


def _decode(path: Path) -> tuple[list[str], Splits]:
    members = _folder_members(path) if path.is_dir() else _archive_members(path)
    decoded: dict[str, dict[tuple[str, str], np.ndarray]] = {"train": {}, "test": {}}
    for name, blob in tqdm(members, desc=f"decoding {path.name}", unit=" images", disable=None):
        split, *inner = PurePosixPath(name).parts
        if len(inner) != 2 or ".." in inner:
            raise UserError(f"{name} is not of the form {split}/<class>/<image>")
        if not inner[0].isprintable():
            raise UserError(f"{name!a} has an unprintable class name; rename it")
        if tuple(inner) in decoded[split]:
            raise UserError(f"{name} appears twice")
        decoded[split][tuple(inner)] = _pixels(name, blob)
        if sum(map(len, decoded.values())) > MAX_IMAGES:
            raise UserError(f"more than {MAX_IMAGES:,} images")
    for split, images in decoded.items():
        if not images:
            way = f"CIFAR-10's own files are read by --data cifar10 --data-dir {path.parent}"
            if not path.name.startswith("cifar-10"):
                way = "it must hold train/<class>/ and test/<class>/"
            raise UserError(f"no images in {split}/<class>/ at its top level: {way}")
    classes, test_classes = (sorted({c for c, _ in decoded[s]}) for s in ("train", "test"))
    if classes != test_classes:
        missing = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise UserError(f"classes missing from train/ or test/: {missing}")
    if len(classes) < 2:
        raise UserError(f"only one class, {classes[0]}; at least two are needed")
    number, splits = {name: index for index, name in enumerate(classes)}, {}
    for split, images in decoded.items():
        names = sorted(images)
        stacked = torch.from_numpy(np.stack([images[n] for n in names]))
        labels = torch.tensor([number[c] for c, _ in names])
        splits[split] = stacked.permute(0, 3, 1, 2).contiguous(), labels
    return classes, splits


def _pixels(name: str, blob: bytes) -> np.ndarray:
    """The RGB pixels uint8 (32, 32, 3) of a PNG or JPEG file."""
    try:
        with Image.open(io.BytesIO(blob), formats=("PNG", "JPEG")) as image:
            if image.size != (SIZE, SIZE):  # known from the header: nothing large is decoded
                size = f"{image.width}×{image.height}"
                raise UserError(f"{name} is {size}: resize your images to {SIZE}×{SIZE}")
            if image.format == "PNG":  # check its checksums, which Pillow ignores when decoding
                with Image.open(io.BytesIO(blob), formats=("PNG",)) as whole:
                    whole.verify()
            return np.asarray(to_rgb(image))
    except UserError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and others
        why = why_unreadable(error)
        raise UserError(f"{name} is not a valid PNG or JPEG image: {why}") from error


def why_unreadable(error: Exception) -> str:
    """Pillow's reason, on one line; for an unknown format its own would name a memory address."""
    unknown = isinstance(error, UnidentifiedImageError)
    return "unknown image format" if unknown else " ".join(str(error).split())


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: oriented as its EXIF says, on white where it is transparent."""
    image.load()
    with suppress(Exception):  # EXIF may be damaged: in place, it turns before it rewrites that
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        image = _in_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """An 8-bit copy of a grey image of more bits or floats, which Pillow would clip at 255. 16-bit
    images, and any that exceed 255, are taken to end at 65,535; floats up to 1 are fractions."""
    values = np.array(image)
    levels = np.nan_to_num(values.astype(np.float32), posinf=0).clip(0)
    if image.mode.startswith("I;16") or levels.max() > 255:
        levels /= 257
    elif image.mode == "F" and levels.max() <= 1:
        levels *= 255
    grey = Image.fromarray(levels.clip(max=255).round().astype(np.uint8))
    if "transparency" in image.info:
        opaque = values != image.info["transparency"]
        grey.putalpha(Image.fromarray(np.uint8(255) * opaque))
    return grey


def _files(path: Path) -> Iterator[Path]:
    """Every file in a folder's train/ and test/, and anything in them too deep to be an image."""
    for folder in (path / "train", path / "test"):
        folders = [folder] if folder.is_dir() else []
        for depth in range(3):
            entries = [entry for each in folders for entry in sorted(each.iterdir())]
            entries = [entry for entry in entries if not is_hidden(entry.name)]
            folders = [entry for entry in entries if entry.is_dir()]
            yield from (entry for entry in entries if depth == 2 or not entry.is_dir())


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that file managers or editors make, such as .DS_Store."""
    return (name.startswith(".") and name != "..") or name in ("Thumbs.db", "desktop.ini")


def _folder_members(path: Path) -> Iterator[tuple[str, bytes]]:
    for file in _files(path):
        name = file.relative_to(path).as_posix()
        try:
            if not file.is_file():
                raise UserError(f"{name} is not a regular file")
            if file.stat().st_size > MAX_FILE_BYTES:
                raise UserError(f"{name} is too large: resize your images to {SIZE}×{SIZE}")
            yield name, file.read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error}") from error


class _StrictTarInfo(tarfile.TarInfo):
    """Refuses a damaged header, which tarfile takes for the archive's end, losing every image after
    it; and an overlong name or a sparse file's map, which it reads into memory at any claimed size.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or cut off: {error}") from error

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in tarfile.REGULAR_TYPES and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"{self.name} claims {self.size:,} bytes")
        return super()._proc_member(archive)

    def _refuse(self, *_: object) -> NoReturn:
        raise tarfile.ReadError("sparse files are not supported")

    _proc_sparse = _proc_gnusparse_10 = _refuse


def _archive_members(path: Path) -> Iterator[tuple[str, bytes]]:
    last = "nothing"
    try:
        with tarfile.open(path, tarinfo=_StrictTarInfo) as archive:
            for member in archive:
                archive.members, archive.pax_headers = [], {}  # or it keeps them all
                if archive.offset < member.offset_data:  # a negative size: it would seek back
                    raise tarfile.ReadError(f"{member.name} claims {member.size:,} bytes")
                if member.offset_data + member.size > MAX_ARCHIVE_BYTES:
                    raise UserError(f"unpacks to over {MAX_ARCHIVE_BYTES >> 30} GiB")
                parts = PurePosixPath(member.name).parts
                if not parts or parts[0] not in ("train", "test"):
                    continue
                if member.isdir() or any(map(is_hidden, parts)):
                    continue
                last = "/".join(parts)
                if not member.isreg():
                    raise UserError(f"{last} is a link or device, not an image")
                if member.size > MAX_FILE_BYTES:
                    raise UserError(f"{last} is too large: resize your images to {SIZE}×{SIZE}")
                yield last, archive.extractfile(member).read()
            while rest := archive.fileobj.read(1 << 20):  # up to the checksums of gzip and xz
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("there is data after its end")
                if archive.fileobj.tell() > MAX_ARCHIVE_BYTES:
                    raise UserError(f"unpacks to over {MAX_ARCHIVE_BYTES >> 30} GiB")
    except UserError:
        raise
    except Exception as error:  # tarfile, gzip, zlib and lzma each have errors of their own
        raise UserError(
            f"this is not a valid .tar, .tar.gz or .tar.xz archive (last read: {last}): "
            f"{first_line(error)}"
        ) from error
