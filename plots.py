"""The pictures of a run, and of runs compared.

python plots.py RUN [RUN…] [--images 3 17 …]
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import checkpoint
import data
import graph
from common import SIZE, Parser, UserError, with_exit_status, written_whole
from fields import Fields

Panel = tuple[str, np.ndarray, np.ndarray, np.ndarray]

KINDS = (".png", ".jpg", ".pdf", ".svg")
# The colour-blind-safe colours of Okabe and Ito.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, ORANGE, GREEN = OKABE_ITO[:3]
matplotlib.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
matplotlib.rcParams["text.parse_math"] = False  # a class may be named $_$


def curves(path: Path, history: list[dict[str, Any]], title: str) -> None:
    """Loss, accuracy and learning rate of each epoch, from the lines of `metrics.jsonl`."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    epochs = [line["epoch"] for line in history]

    def column(key: str, factor: float = 1) -> list[float]:
        return [factor * line[key] for line in history]

    left.plot(epochs, column("train_loss"), color=ORANGE, label="training")
    left.plot(epochs, column("test_loss"), color=BLUE, label="test")
    left.set_ylabel("cross-entropy, nats")
    seen = "training, as the net sees it"
    middle.plot(epochs, column("train_accuracy", 100), color=ORANGE, label=seen)
    middle.plot(epochs, column("test_accuracy", 100), color=BLUE, label="test")
    middle.set_ylabel("accuracy, %")
    right.plot(epochs, column("lr"), color=GREEN)
    right.set_ylabel("learning rate at the epoch's end")
    for axes in (left, middle, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(epochs) == 1:
            axes.set_xticks(epochs)
            for line in axes.lines:
                line.set_marker("o")
    left.legend()
    middle.legend()
    figure.suptitle(title)
    _save(figure, path)


def image_grid(path: Path, images: np.ndarray, captions: list[str], title: str) -> None:
    """Images uint8 (N, H, W, 3), eight in a row, each under its caption."""
    rows = max(1, -(-len(images) // 8))
    width, height = 1.25, 1.45  # inches per image, itself one inch wide
    figure = Figure(figsize=(8 * width, height * rows + 0.4))
    axes = figure.add_axes((0, 0, 1, 1))  # one for all images: 32 axes take five times as long
    axes.axis("off")
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = number % 8 * width + 0.125, number // 8 * height + 0.75
        axes.imshow(image, interpolation="nearest", extent=(left, left + 1, top + 1, top))
        axes.text(left + 0.5, top - 0.05, caption, fontsize=7, ha="center", va="bottom")
    axes.set(xlim=(0, 8 * width), ylim=(height * rows + 0.4, 0))
    figure.suptitle(title, y=1 - 0.12 / figure.get_figheight(), va="top")
    _save(figure, path)


def shortened(names: list[str], length: int) -> list[str]:
    return [name if len(name) <= length else name[: length - 1] + "…" for name in names]


def examples(path: Path, dataset: data.Dataset, inputs: Tensor, labels: Tensor) -> None:
    """The first 32 training images of a batch as the net gets them: normalised, (N, 3, H, W)."""
    images = inputs[:32] * dataset.std.view(-1, 1, 1) + dataset.mean.view(-1, 1, 1)
    images = images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    names = shortened(dataset.classes, 20)
    captions = [names[label] for label in labels[:32].tolist()]
    image_grid(path, images, captions, f"training images of {dataset.name} as the net sees them")


def mistakes(
    path: Path, images: np.ndarray, labels: np.ndarray, logits: np.ndarray, classes: list[str]
) -> None:
    """The 32 misclassified test images uint8 (N, H, W, 3) that the net was surest of; labels int64
    (N,), logits float32 (N, classes), here and below."""
    predicted, confidence = logits.argmax(1), torch.from_numpy(logits).softmax(1).amax(1).numpy()
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    names = shortened(classes, 12)
    captions = [
        f"{i}: {names[labels[i]]}\nas {names[predicted[i]]} ({confidence[i]:.0%})"
        for i in wrong[:32]
    ]
    title = f"{len(wrong):,} of {len(labels):,} images misclassified"
    if len(wrong):
        title += "; the most confident ones: number, true class, predicted class (probability)"
    image_grid(path, images[wrong[:32]], captions, title)


def confusion(path: Path, labels: np.ndarray, logits: np.ndarray, classes: list[str]) -> None:
    """Percentages of each true class's test images that got each predicted class."""
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (labels, logits.argmax(1)), 1)
    share = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    side = max(4.5, 2 + 0.5 * min(len(classes), 60))  # inches
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.grid(False)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    if len(classes) <= 20:
        for (row, column), value in np.ndenumerate(share):
            colour = "white" if value > 50 else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, size=7)
    names = shortened(classes, 20)
    axes.set_xticks(range(len(classes)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title("% of the true class's images")
    _save(figure, path)


def per_class(path: Path, labels: np.ndarray, logits: np.ndarray, classes: list[str]) -> None:
    """Accuracy of each class, and of each tenth of confidence (Guo et al. 2017, "On Calibration of
    Modern Neural Networks")."""
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    right = predicted == labels
    tested = np.unique(labels)  # --holdout may leave a class out
    height = min(max(3.6, 0.16 * len(tested)), 100)  # inches: a line for each name
    figure = Figure(figsize=(10, height), layout="constrained")
    by_class, calibration = figure.subplots(1, 2)
    accuracies = np.array([right[labels == k].mean() for k in tested])
    order = accuracies.argsort()
    bars = by_class.barh(range(len(tested)), 100 * accuracies[order], color=BLUE)
    names = shortened(classes, 20)
    by_class.set_yticks(range(len(tested)), [names[k] for k in tested[order]])
    by_class.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    by_class.set_xlim(0, 110)
    by_class.set_xlabel("test accuracy, %")
    tenths = np.minimum((10 * confidence).astype(int), 9)
    bins = [tenths == k for k in np.unique(tenths)]
    means = [(100 * confidence[b].mean(), 100 * right[b].mean()) for b in bins]
    error = sum(b.mean() * abs(c - a) for b, (c, a) in zip(bins, means, strict=True))
    calibration.plot([0, 100], [0, 100], color="grey", linestyle=":", label="perfect")
    by_tenths = zip(*means, strict=True)
    calibration.plot(*by_tenths, color=ORANGE, marker="o", label="the net, by tenths")
    calibration.set_xlabel("mean confidence, %")
    calibration.set_ylabel("accuracy, %")
    calibration.set_title(f"expected calibration error {error:.1f} points")
    calibration.legend(loc="upper left")
    _save(figure, path)


def comparison(path: Path, histories: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Test accuracy of several trainings, each several seeds' lines of `metrics.jsonl`: its mean
    and range over epochs and seconds, and each seed's in the last epoch."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for index, seeds in enumerate(histories.values()):
        epochs = list(zip(*seeds, strict=False))
        accuracies = np.array([[100 * line["test_accuracy"] for line in each] for each in epochs])
        seconds = np.cumsum([np.mean([line["seconds"] for line in each]) for each in epochs])
        colour = OKABE_ITO[index % 7]
        style = {"color": colour, "linestyle": ("-", "--", ":")[index // 7 % 3]}
        marker = "o" if len(epochs) == 1 else None
        for axes, places in ((left, [line["epoch"] for line, *_ in epochs]), (middle, seconds)):
            axes.plot(places, accuracies.mean(1), marker=marker, **style)
            ends = accuracies.min(1), accuracies.max(1)
            axes.fill_between(places, *ends, color=colour, alpha=0.2, linewidth=0)
        right.axhline(index, **style, alpha=0.4)  # the curves' legend
        right.plot(accuracies[-1], [index] * len(seeds), "o", color=colour, alpha=0.6)
        right.plot(accuracies[-1].mean(), index, "|", color=colour, markersize=16)
    left.set_xlabel("epoch")
    left.set_ylabel("test accuracy, %")
    left.xaxis.get_major_locator().set_params(integer=True)
    middle.set_xlabel("seconds of training, without evaluation")
    right.set_xlabel("test accuracy in the last epoch, %")
    names = [name if len(name) <= 30 else "…" + name[-29:] for name in histories]
    right.set_yticks(range(len(histories)), names)
    right.grid(axis="y", visible=False)
    right.set_ylim(len(histories) - 0.5, -0.5)
    _save(figure, path)


def grad_cam(path: Path, panels: list[Panel]) -> None:
    """For each test image, side by side: the image uint8 (H, W, 3) under its caption, its Grad-CAM
    and its effective receptive field, both (H, W) from 0 to 1."""
    figure = Figure(figsize=(6.4, 2.1 * len(panels) + 0.5), layout="constrained")
    grid = figure.subplots(len(panels), 3, squeeze=False)
    for row, (caption, image, cam, field) in zip(grid, panels, strict=True):
        titles = caption, "Grad-CAM", "effective field, central unit"
        for axes, over, title in zip(row, (None, cam, field), titles, strict=True):
            axes.axis("off")
            axes.imshow(image if over is None else image.mean(2), cmap="gray")
            if over is not None:
                axes.imshow(over, cmap="viridis", alpha=0.6, vmin=0, vmax=1)
            axes.set_title(title, fontsize=8)
    _save(figure, path)


def effective_field(
    path: Path, heat: np.ndarray, margin: int, square: list[tuple[int, int]], title: str
) -> None:
    """Gradient (H, W) of a central unit with respect to the pixels of an image and of a `margin`
    around it; `square` is the unit's theoretical field, its first and last row and column."""
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    axes.grid(False)
    low, high = -margin - 0.5, len(heat) - margin - 0.5
    picture = axes.imshow(heat / heat.max(), cmap="viridis", extent=(low, high, high, low))
    (top, bottom), (left, right) = ((a - margin, b - margin) for a, b in square)
    for x, y, width, height, colour, label in (
        (left, top, right - left + 1, bottom - top + 1, ORANGE, "theoretical field"),
        (0, 0, SIZE, SIZE, "white", "the image itself"),
    ):
        corner, style = (x - 0.5, y - 0.5), {"fill": False, "color": colour, "linewidth": 1.5}
        axes.add_patch(Rectangle(corner, width, height, label=label, **style))
    axes.set_xlabel("x, pixels of the image")
    axes.set_ylabel("y, pixels of the image")
    axes.set_title(title)
    axes.legend(loc="upper right", fontsize=8, facecolor="#333333", labelcolor="white")
    figure.colorbar(picture, label="mean |gradient|, relative to its maximum")
    _save(figure, path)


def draw_run(
    folder: Path,
    flags: dict[str, Any],
    dataset: data.Dataset,
    logits: np.ndarray,
    history: list[dict[str, Any]],
) -> None:
    """Draw what a run's metrics and test logits (N, classes) show."""
    title = f"{flags.get('net')} on {dataset.name}, seed {flags.get('seed')}"
    if flags.get("holdout"):
        title += f"; test: {flags['holdout']:,} held-out training images"
    labels = dataset.test_labels.cpu().numpy()
    images = dataset.test_images.permute(0, 2, 3, 1).cpu().numpy()
    curves(folder / "curves.png", history, title)
    confusion(folder / "confusion.png", labels, logits, dataset.classes)
    mistakes(folder / "mistakes.png", images, labels, logits, dataset.classes)
    per_class(folder / "classes.png", labels, logits, dataset.classes)


def grad_cam_panels(run: Path, dataset: data.Dataset, numbers: list[int]) -> list[Panel]:
    """For the test images with these numbers: Grad-CAM of the predicted class (Selvaraju et al.
    2017) and the central unit's effective receptive field, both before the global pooling."""
    net, _ = checkpoint.load_net(run / "model.pt")
    traced = graph.trace(net)
    inputs = data.normalize(dataset.test_images[numbers], dataset.mean, dataset.std)
    maps, logits = traced.both(inputs.requires_grad_())
    predicted = logits.argmax(1)
    (gradient,) = torch.autograd.grad(logits.gather(1, predicted.unsqueeze(1)).sum(), maps)
    cams = (gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu().detach()
    cams = over_image(cams, traced.fields)
    panels, names = [], shortened(dataset.classes, 12)
    for position, number in enumerate(numbers):
        heat = graph.effective_receptive_field(traced.features, inputs[position : position + 1])
        true, taken = names[dataset.test_labels[number]], names[predicted[position]]
        overlays = [(x / x.max().clamp(min=1e-12)).numpy() for x in (cams[position], heat)]
        image = dataset.test_images[number].permute(1, 2, 0).numpy()
        panels.append((f"{number}: {true} as {taken}", image, *overlays))
    return panels


def over_image(maps: Tensor, fields: Fields) -> Tensor:
    """Maps (N, 1, h, w) resampled to the image's size, (N, 32, 32): bilinear between the centres of
    their units' receptive fields, which need not tile the image."""
    places = []  # pixels' positions among the units, from -1 to 1
    for field, units in zip(fields, maps.shape[2:], strict=True):
        first = sum(field.spans[field.jump]) / 2
        places.append((2 * (torch.arange(SIZE) - first) / field.jump + 1) / units - 1)
    grid = torch.stack(torch.meshgrid(*places, indexing="ij")[::-1], 2)
    grid = grid.expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=False).squeeze(1)


def redraw(run: Path, numbers: list[int] | None) -> None:
    """Draw a run's pictures again from its files."""
    dataset = checkpoint.load_data(run)
    count = len(dataset.test_images)
    numbers = list(range(0, count, -(-count // 6))) if numbers is None else numbers
    if len(numbers) > 100:
        raise UserError(f"--images: {len(numbers):,} given; one picture shows 100 at most")
    for number in numbers:
        if not 0 <= number < count:
            raise UserError(
                f"--images {number}: {dataset.name} has {dataset.tested_on}, numbered from 0"
            )
    history, logits = checkpoint.load_history(run), checkpoint.load_predictions(run)
    if logits.shape != (count, len(dataset.classes)):
        raise UserError(
            f"{run / 'predictions.npy'} does not match {dataset.name}'s {dataset.tested_on}"
        )
    draw_run(run, checkpoint.load_config(run)["flags"], dataset, logits, history)
    grad_cam(run / "grad_cam.png", grad_cam_panels(run, dataset, numbers))


@with_exit_status
def main(argv: list[str]) -> None:
    parser = Parser(description="Draw runs' pictures again.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--images", type=int, nargs="+", help="test image numbers for Grad-CAM; after RUN"
    )
    args = parser.parse_args(argv)
    for run in args.runs:
        redraw(run, args.images)
        print(f"drawn: {run}/*.png")


def _save(figure: Figure, path: Path) -> None:
    with written_whole(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a class may be named 日本
        figure.savefig(file, format=path.suffix[1:], dpi=120)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
