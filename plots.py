"""Every picture of a run."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from common import written_whole

# The colour-blind-safe colours of Okabe and Ito.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
matplotlib.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


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
    middle.plot(epochs, column("train_accuracy", 100), color=ORANGE, label="training, augmented")
    middle.plot(epochs, column("test_accuracy", 100), color=BLUE, label="test")
    middle.set_ylabel("accuracy, %")
    right.plot(epochs, column("lr"), color=GREEN)
    right.set_ylabel("learning rate at the epoch's end")
    for axes in (left, middle, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(epochs) == 1:
            for line in axes.lines:
                line.set_marker("o")
    left.legend(loc="upper right")
    middle.legend(loc="lower right")
    figure.suptitle(title)
    _save(figure, path)


def image_grid(path: Path, images: np.ndarray, captions: list[str], title: str) -> None:
    """Images uint8 (N, H, W, 3), eight in a row, each under its caption."""
    rows = max(1, -(-len(images) // 8))
    figure = Figure(figsize=(10, 1.45 * rows + 0.4), layout="constrained")
    for axes in figure.subplots(rows, 8, squeeze=False).flat:
        axes.axis("off")
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(caption, fontsize=7)
    figure.suptitle(title)
    _save(figure, path)


def mistakes(
    path: Path, images: np.ndarray, labels: np.ndarray, logits: np.ndarray, classes: list[str]
) -> None:
    """The 32 misclassified test images uint8 (N, H, W, 3) of which the net was surest."""
    shifted = logits - logits.max(1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    predicted = logits.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")]
    captions = [
        f"{classes[labels[i]]}\nas {classes[predicted[i]]} ({probabilities[i].max():.0%})"
        for i in wrong[:32]
    ]
    title = f"{len(wrong):,} of {len(labels):,} test images are misclassified; the surest of them:"
    title += " true class, as predicted (probability)"
    image_grid(path, images[wrong[:32]], captions, title)


def confusion(path: Path, labels: np.ndarray, logits: np.ndarray, classes: list[str]) -> None:
    """Percentages of each true class's test images that got each predicted class."""
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (labels, logits.argmax(1)), 1)
    share = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    side = 2 + 0.5 * len(classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.grid(False)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    if len(classes) <= 20:
        for (row, column), value in np.ndenumerate(share):
            colour = "white" if value > 50 else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, size=7)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title("% of the true class's test images")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=120)
