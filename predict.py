"""Classify image files with a trained net.

python predict.py RUN IMAGE… [--top 3] [--json]
"""

import json
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

import checkpoint
import data
import step
from common import SIZE, Parser, number, printable, with_exit_status
from image_files import is_hidden, to_rgb, why_unreadable
from machine import DEVICES, choose_device

BATCH = 256


def to_pixels(image: Image.Image) -> np.ndarray:
    """The central square of an image of any size and mode, converted to RGB as training images are
    and resized with anti-aliasing: uint8 (32, 32, 3)."""
    rgb = to_rgb(image)
    return np.asarray(ImageOps.fit(rgb, (SIZE, SIZE), Image.Resampling.LANCZOS))


def formats() -> list[str]:
    """Pillow's formats except EPS, for which it starts Ghostscript, which runs the image as a
    program, and IPTC, which may hold an EPS."""
    Image.init()
    return [name for name in Image.OPEN if name not in ("EPS", "IPTC")]


def named_files(arguments: list[str], failed: list[str]) -> Iterator[tuple[str, Path | BytesIO]]:
    """Every file that the arguments name: for a folder, all with an image's extension; for `-`,
    standard input."""
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            yield "-", BytesIO(sys.stdin.buffer.read() if sys.stdin else b"")  # None if closed
        elif os.path.isdir(argument):  # Path.is_dir() raises without permission
            kinds, known = Image.registered_extensions(), [*formats(), "MPO"]  # which JPEG's reads
            found = (f for f in path.rglob("*") if kinds.get(f.suffix.lower()) in known)
            shown = (f for f in found if not any(map(is_hidden, f.relative_to(path).parts)))
            files = sorted(filter(os.path.isfile, shown))
            if not files:
                skip(argument, "no images in that folder", failed)
            yield from ((str(file), file) for file in files)
        else:
            yield argument, path


def skip(name: str, why: str, failed: list[str]) -> None:
    print(f"skipped: {printable(name)}: {why}", file=sys.stderr)
    failed.append(name)


def readable(arguments: list[str], failed: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and pixels; files that cannot be read are reported and their names go to `failed`."""
    for name, file in named_files(arguments, failed):
        try:
            with Image.open(file, formats=formats()) as image:
                yield name, to_pixels(image)
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and others
            skip(name, why_unreadable(error), failed)


def probabilities(
    net: nn.Module, pixels: Sequence[np.ndarray], mean: Tensor, std: Tensor
) -> Tensor:
    """Class probabilities float32 (N, classes), on the CPU, of images uint8 (32, 32, 3)."""
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(mean.device)
    with torch.inference_mode():
        return step.forward(net, data.normalize(images, mean, std), "fp32").softmax(1).cpu()


def classify(args: Namespace) -> int:
    """Print the net's top classes for each image. Returns the exit status: 1 if one was skipped."""
    device = choose_device(args.device)
    path = args.run if args.run.suffix == ".pt" else args.run / "model.pt"
    net, content = checkpoint.load_net(path)
    net.to(device, memory_format=torch.channels_last)
    classes = content["classes"]
    mean, std = (torch.tensor(content[key], device=device) for key in ("mean", "std"))
    warnings.filterwarnings("ignore", module="PIL")  # a photo may be large, its EXIF damaged
    failed: list[str] = []
    images = readable(args.images, failed)
    widest, results = max(map(len, classes)), []
    while batch := list(islice(images, BATCH)):
        names, pixels = zip(*batch, strict=True)
        for name, shares in zip(names, probabilities(net, pixels, mean, std).tolist(), strict=True):
            best = sorted(zip(shares, classes, strict=True), reverse=True)[: args.top]
            if args.json:
                predictions = [{"class": c, "probability": p} for p, c in best]
                results.append({"image": name, "predictions": predictions})
            else:
                cells = (f"{c:>{widest}} {p:6.1%}" for p, c in best)
                print(*cells, printable(name), sep="  ", flush=True)
    if args.json:
        print(json.dumps(results))
    return int(bool(failed))


@with_exit_status
def main(argv: list[str]) -> int:
    parser = Parser(description="Classify images with a trained net.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or its model.pt")
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="image files, folders, or - for stdin"
    )
    parser.add_argument("--top", type=number(int, 1), default=3, help="classes per image")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    return classify(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
