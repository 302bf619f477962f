import json
from functools import partial
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import nn

import checkpoint
import data
import graph
import model
import plots

LINE = {"lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5, "test_loss": 0.9, "test_accuracy": 0.6}


def spy_on(monkeypatch, owner, name):
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, spy := create_autospec(real, side_effect=real))
    return spy


def is_picture(path):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    return pixels.shape[0] > 100 and pixels.shape[1] > 300 and pixels.std() > 5


@pytest.mark.parametrize("epochs", [1, 5])
def test_curves(tmp_path, epochs, monkeypatch):
    history = [{"epoch": i + 1, **LINE} for i in range(epochs)]
    plot = spy_on(monkeypatch, Axes, "plot")
    plots.curves(tmp_path / "curves.png", history, "a net")
    assert is_picture(tmp_path / "curves.png")
    losses, accuracies = ("training", 1.0), ("training, as the net sees it", 50)
    seen = [(style.get("label"), y[0]) for (_, _, y), style in plot.call_args_list]
    assert seen == [losses, ("test", 0.9), accuracies, ("test", 60), (None, 0.1)]
    units = [axes.get_ylabel() for (axes, *_), _ in plot.call_args_list[::2]]
    assert units == ["cross-entropy, nats", "accuracy, %", "learning rate at the epoch's end"]
    assert all(x == [*range(1, epochs + 1)] for (_, x, _), _ in plot.call_args_list)


def test_each_image_of_a_grid_is_upright_and_in_its_place(tmp_path):
    images = np.zeros((9, 32, 32, 3), np.uint8)
    images[:, :16] = np.arange(100, 190, 10).reshape(-1, 1, 1, 1)  # the upper half
    plots.image_grid(tmp_path / "grid.png", images, ["a"] * 9, "nine")
    with Image.open(tmp_path / "grid.png") as picture:
        for number, image in enumerate(images):
            x, y = number % 8 * 150 + 75, number // 8 * 174 + 90  # its centre's and top's
            assert picture.getpixel((x, y + 30))[:3] == tuple(image[0, 0])
            assert picture.getpixel((x, y + 90))[:3] == (0, 0, 0)


def test_the_examples_are_shown_in_their_colours(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "image_grid", lambda path, *of: shown.extend(of))
    dataset = data.load("synthetic", None, torch.device("cpu"), train_images=40)
    inputs = data.normalize(dataset.train_images, dataset.mean, dataset.std)
    plots.examples(None, dataset, inputs, dataset.train_labels)
    assert shown[1] == [dataset.classes[k] for k in dataset.train_labels[:32]]
    assert (shown[0] == dataset.train_images[:32].permute(0, 2, 3, 1).numpy()).all()


def test_confusion_counts_true_classes_in_rows(tmp_path, monkeypatch):
    shown, written = (spy_on(monkeypatch, Axes, name) for name in ("imshow", "text"))
    labels = np.array([0, 0, 0, 0, 1])
    logits = np.eye(3)[[0, 0, 0, 1, 1]]
    plots.confusion(tmp_path / "confusion.png", labels, logits, ["cat", "dog", "untested"])
    axes, share = shown.call_args.args
    assert share.tolist() == [[75, 25, 0], [0, 100, 0], [0, 0, 0]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    for axis in (axes.xaxis, axes.yaxis):
        assert [tick.get_text() for tick in axis.get_ticklabels()] == ["cat", "dog", "untested"]
    texts = [(*call.args[1:], call.kwargs["color"]) for call in written.call_args_list]  # x, y
    assert texts[:2] == [(0, 0, "75.0", "white"), (1, 0, "25.0", "black")]
    assert texts[3:5] == [(0, 1, "0.0", "black"), (1, 1, "100.0", "white")]
    assert is_picture(tmp_path / "confusion.png")


@pytest.mark.parametrize("wrong", [0, 3, 40])
def test_mistakes(tmp_path, monkeypatch, wrong):
    images = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    labels = np.zeros(50, dtype=int)
    logits = np.zeros((50, 2))
    logits[:, 0] = 1
    logits[:wrong, 1] = 2 + 0.1 * np.arange(wrong)  # later ones are more confident
    grid = spy_on(monkeypatch, plots, "image_grid")
    plots.mistakes(tmp_path / "mistakes.png", images, labels, logits, ["cat", "dog"])
    _, shown, captions, title = grid.call_args.args
    assert len(shown) == len(captions) == min(wrong, 32)
    assert title.startswith(f"{wrong} of 50")
    assert ("the most confident ones" in title) == (wrong > 0)
    if wrong:
        assert (shown[0] == images[wrong - 1]).all()
        share = 1 / (1 + np.exp(-1 - 0.1 * (wrong - 1)))
        assert captions[0] == f"{wrong - 1}: cat\nas dog ({share:.0%})"
    assert (tmp_path / "mistakes.png").exists()


def test_per_class_accuracy_and_calibration(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "matplotlib.axes.Axes.set_title", lambda self, text, **_: seen.update(t=text)
    )
    labels = np.array([0] * 8 + [1] * 2)
    logits = np.log([[0.8, 0.2]] * 10)  # 80 % confident, 80 % correct
    plots.per_class(tmp_path / "classes.png", labels, logits, ["cat", "dog"])
    assert seen["t"] == "expected calibration error 0.0 points"
    plot = spy_on(monkeypatch, Axes, "plot")
    logits = np.log([[0.95, 0.05]] * 6 + [[0.65, 0.35]] * 4)  # of these, half are correct
    plots.per_class(tmp_path / "classes.png", labels, logits, ["cat", "dog"])
    assert seen["t"] == "expected calibration error 9.0 points"  # 0.6 · 5 + 0.4 · 15
    axes, *points = plot.call_args.args
    assert np.round(points, 6).tolist() == [[65, 95], [50, 100]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("mean confidence, %", "accuracy, %")
    assert is_picture(tmp_path / "classes.png")


def test_a_class_that_was_not_tested_has_no_bar(tmp_path, monkeypatch):
    barh, set_yticks = (spy_on(monkeypatch, Axes, name) for name in ("barh", "set_yticks"))
    labels, logits = np.array([0, 2, 2]), np.eye(3)[[0, 2, 0]]
    plots.per_class(tmp_path / "classes.png", labels, logits, ["cat", "dog", "$_$"])
    (_, places, shares), (_, marked, names) = barh.call_args.args, set_yticks.call_args.args
    assert (places, dict(zip(names, shares, strict=True))) == (marked, {"cat": 100, "$_$": 50})
    assert is_picture(tmp_path / "classes.png")
    monkeypatch.undo()
    labels, logits = np.arange(100), np.eye(100)
    many = [f"class {k}" for k in range(100)]
    plots.per_class(tmp_path / "classes.png", labels, logits, many)
    with Image.open(tmp_path / "classes.png") as image:
        assert image.height >= 100 * 0.15 * 120  # inches a name, at 120 dots an inch


def test_names_of_any_length_and_script(tmp_path, recwarn):
    names = ["日本", *("a long name " * 20 + end for end in "ab")]
    assert plots.shortened(names, 5) == ["日本", "a lo…", "a lo…"]
    labels, logits = np.array([0, 1, 2]), np.eye(3)
    plots.confusion(tmp_path / "confusion.png", labels, logits, names)
    plots.per_class(tmp_path / "classes.png", labels, logits, names)
    assert is_picture(tmp_path / "confusion.png")
    assert not [each for each in recwarn if "Glyph" in str(each.message)]


class Brightest(nn.Module):
    """Two maps, the image's red and green; their means are the logits."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.conv.weight.data = torch.eye(3)[:2].view(2, 3, 1, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder; test image 1 is green in its lower right corner."""
    dataset = data.load("synthetic", None, torch.device("cpu"), 100, 59)
    dataset.test_images[1] = 0
    dataset.test_images[1, 1, 20:, 20:] = 255
    monkeypatch.setattr(checkpoint, "load_data", lambda *_: dataset)
    monkeypatch.setattr(checkpoint, "load_net", lambda _: (Brightest(), {}))
    (tmp_path / "config.json").write_text('{"flags": {"net": "atrous", "seed": 3}}')
    np.save(tmp_path / "predictions.npy", np.eye(10, dtype=np.float32)[np.arange(59) % 10])
    line = json.dumps({"epoch": 1, "seconds": 2.0, **LINE})
    (tmp_path / "metrics.jsonl").write_text(line + "\n" + line + "\n")
    return tmp_path


def test_grad_cam_lights_up_what_was_predicted(run, monkeypatch):
    dataset = checkpoint.load_data(run)
    dataset.classes[1] = "golden_retriever_dog"
    fields = spy_on(monkeypatch, graph, "effective_receptive_field")
    (caption, image, cam, field), other = plots.grad_cam_panels(run, dataset, [1, 0])
    inputs = torch.cat([call.args[1] for call in fields.call_args_list])
    assert inputs.equal(data.normalize(dataset.test_images[[1, 0]], dataset.mean, dataset.std))
    assert (image == dataset.test_images[1].permute(1, 2, 0).numpy()).all()
    assert (other[2] != cam).any()
    assert dataset.test_labels[0] != dataset.test_labels[1]
    assert caption == f"1: {dataset.classes[dataset.test_labels[1]]} as golden_retr…"
    assert cam[24:, 24:].min() > 0.9
    assert cam[:16].max() == cam[:, :16].max() == cam[0, 0]  # evenly dark elsewhere
    assert 0 <= cam[0, 0] < 0.5
    assert np.argwhere(field).tolist() == [[16, 16]]


def test_each_overlay_is_under_its_title(tmp_path, monkeypatch):
    shown, titled = (spy_on(monkeypatch, Axes, name) for name in ("imshow", "set_title"))
    image, cam, field = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32)), np.ones((32, 32))
    plots.grad_cam(tmp_path / "grad_cam.png", [("cat", image, cam, field)])
    over = {call.args[0]: call.args[1] for call in shown.call_args_list}  # the last on each
    under = {call.args[1]: over[call.args[0]] for call in titled.call_args_list}
    assert under["Grad-CAM"] is cam
    assert under["effective field, central unit"] is field


def test_the_theoretical_field_is_where_it_lies(tmp_path, monkeypatch):
    patches, shown = (spy_on(monkeypatch, Axes, name) for name in ("add_patch", "imshow"))
    square = [(2, 42), (3, 41)]  # rows, columns
    plots.effective_field(tmp_path / "field.png", 2 * np.eye(44), 6, square, "")
    assert shown.call_args.args[1].tolist() == np.eye(44).tolist()
    assert shown.call_args.kwargs["extent"] == (-6.5, 37.5, 37.5, -6.5)  # y points down
    theory, image = (call.args[1] for call in patches.call_args_list)
    assert (theory.get_xy(), theory.get_width(), theory.get_height()) == ((-3.5, -4.5), 39, 41)
    assert (image.get_xy(), image.get_width(), image.get_height()) == ((-0.5, -0.5), 32, 32)


def test_grad_cam_of_a_net_that_first_pools(run, monkeypatch):
    net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
    monkeypatch.setattr(checkpoint, "load_net", lambda _: (net, {}))
    (panel,) = plots.grad_cam_panels(run, checkpoint.load_data(run), [1])
    assert panel[2].shape == (32, 32)


@pytest.mark.parametrize(
    ("net", "first", "last"),  # of the centres of its units' fields
    [("atrous", 1.5, 29.5), ("net176k", 8, 20), ("net190k", 7, 23), ("net134k", -5.5, 34.5)],
)
def test_units_lie_over_what_they_see(net, first, last):
    traced = graph.trace(model.build(net, 10))
    _, _, height, width = traced.features(torch.zeros(1, 3, 32, 32)).shape
    centres = torch.linspace(first, last, width)
    laid = plots.over_image(centres.expand(1, 1, height, width), traced.fields)
    expected = torch.arange(32.0).clamp(first, last).expand(1, 32, 32)
    torch.testing.assert_close(laid, expected)
    turned = plots.over_image(centres.view(1, 1, -1, 1).expand(1, 1, height, width), traced.fields)
    torch.testing.assert_close(turned, expected.mT)


def test_a_run_is_drawn_again(run, monkeypatch):
    titles, curves, shown, panels = [], plots.curves, [], plots.grad_cam_panels
    monkeypatch.setattr(plots, "grad_cam_panels", lambda *of: shown.append(of[2]) or panels(*of))
    monkeypatch.setattr(plots, "curves", lambda *args: titles.append(args[2]) or curves(*args))
    mistakes = spy_on(monkeypatch, plots, "mistakes")
    assert plots.main([str(run)]) == 0
    images = checkpoint.load_data(run).test_images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(mistakes.call_args.args[1], images)
    (run / "config.json").write_text('{"flags": {"net": "atrous", "seed": 3, "holdout": 5000}}')
    for slow in ("confusion", "mistakes", "per_class"):
        monkeypatch.setattr(plots, slow, lambda *_: None)
    assert plots.main([str(run), "--images", "5"]) == 0
    assert shown == [[0, 10, 20, 30, 40, 50], [5]]
    plain = "atrous on synthetic, seed 3"
    assert titles == [plain, f"{plain}; test: 5,000 held-out training images"]
    for name in ("curves", "confusion", "mistakes", "classes", "grad_cam"):
        assert is_picture(run / f"{name}.png"), name


def test_runs_compared(tmp_path, monkeypatch):
    plot, fill, set_yticks = (
        spy_on(monkeypatch, Axes, name) for name in ("plot", "fill_between", "set_yticks")
    )
    line = LINE | {"epoch": 1, "seconds": 2.0}
    first = [line, line | {"epoch": 2, "seconds": 4.0, "test_accuracy": 0.8}]
    other = [line, line | {"epoch": 2, "test_accuracy": 0.9}, line | {"epoch": 3}]  # goes on
    plots.comparison(tmp_path / "c.png", {"two": [first, other], "one": [[line]]})

    def given(call):
        return [
            np.atleast_1d(x).round(9).tolist() for x in call.args[1:4] if not isinstance(x, str)
        ]

    mean, low, high = [60, 85], [60, 80], [60, 90]
    of_two = [[[1, 2], mean], [[2, 5], mean], [[80, 90], [0, 0]], [[85], [0]]]
    of_one = [[[1], [60]], [[2], [60]], [[60], [1]], [[60], [1]]]
    assert [given(call) for call in plot.call_args_list] == of_two + of_one
    assert [given(call) for call in fill.call_args_list[:2]] == [
        [[1, 2], low, high],
        [[2, 5], low, high],
    ]
    labels = [call.args[0].get_xlabel().split(",")[0] for call in plot.call_args_list[:3]]
    assert labels == ["epoch", "seconds of training", "test accuracy in the last epoch"]
    assert list(set_yticks.call_args.args[2]) == ["two", "one"]
    assert is_picture(tmp_path / "c.png")


def test_mistakes_of_the_user_are_one_line(run, refused):
    error = partial(refused, plots.main)
    for number in (59, -1):
        said = f"--images {number}: synthetic has 59 held-out training images, numbered from 0"
        assert said in error(run, "--images", number)
    assert "one picture shows 100 at most" in error(run, "--images", *range(50), *range(51))
    metrics = (run / "metrics.jsonl").read_text()
    for text in ("{}\n", metrics.replace("test_accuracy", "accuracy"), '{"epoch": "x"}\n'):
        (run / "metrics.jsonl").write_text(text)
        assert "metrics.jsonl is damaged" in error(run)
    (run / "metrics.jsonl").write_text(metrics)
    for shape in ((3, 10), (59,), (59, 9), ()):
        np.save(run / "predictions.npy", np.zeros(shape, np.float32))
        assert "predictions.npy does not match" in error(run)
    (run / "predictions.npy").write_bytes(b"no array")
    assert "predictions.npy is damaged" in error(run)
    (run / "metrics.jsonl").write_text("{")
    assert "metrics.jsonl is damaged" in error(run)
