import numpy as np
import pytest
from PIL import Image

import plots

LINE = {"lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5, "test_loss": 0.9, "test_accuracy": 0.6}


def is_picture(path):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    return pixels.shape[0] > 100 and pixels.shape[1] > 300 and pixels.std() > 5


@pytest.mark.parametrize("epochs", [1, 5])
def test_curves(tmp_path, epochs):
    history = [{"epoch": i + 1, **LINE} for i in range(epochs)]
    plots.curves(tmp_path / "curves.png", history, "a net")
    assert is_picture(tmp_path / "curves.png")


def test_confusion_counts_true_classes_in_rows(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "matplotlib.axes.Axes.imshow", lambda self, share, **_: seen.update(share=share)
    )
    labels = np.array([0, 0, 0, 0, 1])
    logits = np.eye(2)[[0, 0, 0, 1, 1]]
    plots.confusion(tmp_path / "confusion.png", labels, logits, ["cat", "dog"])
    assert seen["share"].tolist() == [[75, 25], [0, 100]]
    assert is_picture(tmp_path / "confusion.png")


@pytest.mark.parametrize("wrong", [0, 3, 40])
def test_mistakes(tmp_path, monkeypatch, wrong):
    images = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    labels = np.zeros(50, dtype=int)
    logits = np.zeros((50, 2))
    logits[:, 0] = 1
    logits[:wrong, 1] = 2 + 0.1 * np.arange(wrong)  # the later, the surer
    seen = {}
    grid = plots.image_grid

    def spy(path, shown, captions, title):
        seen.update(images=shown, captions=captions, title=title)
        grid(path, shown, captions, title)

    monkeypatch.setattr(plots, "image_grid", spy)
    plots.mistakes(tmp_path / "mistakes.png", images, labels, logits, ["cat", "dog"])
    assert len(seen["images"]) == len(seen["captions"]) == min(wrong, 32)
    assert seen["title"].startswith(f"{wrong} of 50")
    if wrong:
        assert (seen["images"][0] == images[wrong - 1]).all()
        assert seen["captions"][0].startswith("cat\nas dog (")
    assert (tmp_path / "mistakes.png").exists()
