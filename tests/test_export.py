import importlib.util
import io
import json
import timeit
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoint import config_file, model_file
from torch import nn
from torch.nn.utils import parametrize

import checkpoint
import data
import export
import step
from model import build

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="pip install -r requirements-extra.txt")


def make_run(folder, name):
    """A run folder with a net whose BatchNorm has seen the images."""
    torch.manual_seed(0)
    dataset = data.load("synthetic", None, torch.device("cpu"), 200, 200)
    net = build(name, 10)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # a branch's last is 0 before training
    net(data.normalize(dataset.train_images, dataset.mean, dataset.std))
    statistics = {"mean": dataset.mean.tolist(), "std": dataset.std.tolist()}
    weights = {"state_dict": net.state_dict()}
    model_file(folder / "model.pt", name, dataset.classes, **statistics, **weights)
    config_file(folder, 200, 200)
    return folder


@pytest.fixture(scope="module", params=["net136k", pytest.param("atrous", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), request.param)


@pytest.fixture(scope="module")
def printed(run):
    """What a first export prints about the two files that it writes."""
    to_int8, session, calibrating = export.to_int8, export.session, checkpoint.load_data(run)
    timed = []

    def noting(model, images):
        assert (images == export.drawn(calibrating.train_images.numpy())).all()
        return to_int8(model, images)

    def noting_threads(model, threads=0):
        if threads == 1:
            timed.append(model)
        return session(model, threads)

    with redirect_stdout(io.StringIO()) as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "to_int8", noting)
        patch.setattr(export, "session", noting_threads)
        patch.setattr(export, "median_seconds", lambda _, images: len(images) ** 0.5 / 1000)
        assert export.main([str(run), "--int8"]) == 0
    assert timed == [(run / name).read_bytes() for name in ("model.onnx", "model.int8.onnx")]
    return said.getvalue()


@pytest.fixture
def exported(run, printed):
    return run


def test_probabilities_of_any_batch(exported):
    dataset = checkpoint.load_data(exported)
    net, _ = checkpoint.load_net(exported / "model.pt")
    expected = step.predict_logits(net, dataset, "fp32").softmax(1).numpy()
    classify = export.session((exported / "model.onnx").read_bytes())
    images = dataset.test_images.numpy()
    for some in (slice(0, 1), slice(1, 8), slice(0, 200)):
        np.testing.assert_allclose(classify(images[some]), expected[some], atol=1e-5)
    rough = export.session((exported / "model.int8.onnx").read_bytes())(images)
    assert rough.sum(1) == pytest.approx(np.ones(200), abs=0.02)
    assert np.abs(rough - expected).mean() < 0.05
    assert (rough.argmax(1) == expected.argmax(1)).mean() > 0.8


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx"])
def test_the_file_describes_itself(name, exported):
    import onnxruntime

    runtime = onnxruntime.InferenceSession(exported / name)
    (images,), (probabilities,) = runtime.get_inputs(), runtime.get_outputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(uint8)", [3, 32, 32])
    assert isinstance(images.shape[0], str)  # any batch
    assert probabilities.name == "probabilities"
    stored = runtime.get_modelmeta().custom_metadata_map
    assert len(json.loads(stored["classes"])) == 10
    assert json.loads(stored["data"]) == "synthetic"
    assert json.loads(stored["net"]) == checkpoint.load_net(exported / "model.pt")[1]["net"]


def test_a_file_is_little_more_than_the_parameters(exported):
    net, _ = checkpoint.load_net(exported / "model.pt")
    parameters = sum(parameter.numel() for parameter in net.parameters())
    for name, size in (("model.onnx", 4), ("model.int8.onnx", 1)):
        content = (exported / name).read_bytes()
        assert len(content) < size * parameters + 100_000
        assert b"export.py" not in content  # from a stack trace, with this machine's paths


def test_the_figures_it_prints(exported, printed):
    first, *lines = printed.splitlines()
    assert first.startswith("200 images: probabilities within ")
    dataset = checkpoint.load_data(exported)
    net, _ = checkpoint.load_net(exported / "model.pt")
    rough = exported / "model.int8.onnx"
    logits = (
        step.predict_logits(net, dataset, "fp32").numpy(),
        export.session(rough.read_bytes())(dataset.test_images.numpy()),
    )
    for file, found in zip((exported / "model.onnx", rough), logits, strict=True):
        size, accuracy, seconds, *lines = lines
        share = (found.argmax(1) == dataset.test_labels.numpy()).mean()
        assert size == f"{file}: {file.stat().st_size / 1000:.0f} kB"
        tested_on = "200 held-out training images of synthetic"
        assert accuracy == f"  {share:.2%} accuracy on the {tested_on}"
        assert seconds.startswith("  one CPU core: 1.0 ms for one image, 10,000 images/s in")


def test_the_time_of_one_call_is_the_median_without_the_first(monkeypatch):
    now, durations = 0, iter([99, 1, 1, 1, 1, 2, 3, 3, 3, 3])

    def classify(_):
        nonlocal now
        now += next(durations)

    monkeypatch.setattr(timeit, "repeat", partial(timeit.repeat, timer=lambda: now))
    assert export.median_seconds(classify, None) == 2


def test_what_calibrates_is_of_every_class_in_whatever_order():
    for labels in (np.arange(5000) % 10, np.arange(5000) // 500):
        drawn = export.drawn(labels)
        assert len(drawn) == 1000
        assert np.bincount(drawn, minlength=10).min() > 50
    assert (export.drawn(labels) == drawn).all()
    assert (export.in_batches(np.copy, labels) == labels).all()
    assert len(export.drawn(labels[:200])) == 200


def test_what_is_asked_for_is_written_unless_it_differs(exported, tmp_path, capsys, monkeypatch):
    for name in ("model.pt", "config.json"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    whole = (exported / "model.onnx").read_bytes()
    monkeypatch.setattr(export, "to_onnx", lambda *_: whole)
    assert export.main([str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.onnx")
    assert file.name == "model.onnx"
    file.unlink()
    batches = export.in_batches
    for shift in (2e-4 * np.eye(1000, 10), np.full((1000, 10), np.nan)):  # one value per image, all
        monkeypatch.setattr(
            export, "in_batches", lambda *of, by=shift: batches(*of) + by[: len(of[1])]
        )
        assert export.main([str(tmp_path)]) == 2
        assert "nothing written" in capsys.readouterr().err
        assert not list(tmp_path.glob("*.onnx"))


def test_mistakes_are_one_line(tmp_path, refused, monkeypatch):
    assert "model.pt does not exist" in refused(export.main, tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = "error: onnx is missing: pip install -r requirements-extra.txt"
    assert refused(export.main, tmp_path) == said


def test_onnxruntime_1_21_finds_the_zero_points_of_a_matrix(images):
    import onnx

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    blob = export.to_onnx(export.Classifier(net, [127.0] * 3, [64.0] * 3).eval(), {})
    nodes = onnx.load_from_string(export.to_int8(blob, images[:100].numpy())).graph.node
    for kind, points in (("Gemm", [True, True, True]), ("Conv", [True, False, False])):
        (layer,) = (node for node in nodes if node.op_type == kind)
        made = {node.output[0]: len(node.input) == 3 for node in nodes}
        assert [made[name] for name in layer.input] == points, kind


class Gated(nn.Module):
    """A net of one's own: a global maximum as a gate, and a bias made from a parameter."""

    def __init__(self, classes):
        super().__init__()
        convolution = nn.Conv2d(3, 4, 3)
        parametrize.register_parametrization(convolution, "bias", nn.Softplus())
        self.layers = nn.Sequential(convolution, nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.classify = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))

    def forward(self, x):
        x = self.layers(x)
        return self.classify(x * x.amax((2, 3), keepdim=True).sigmoid())


def test_a_net_of_ones_own_is_exported(images):
    classifier = export.Classifier(Gated(5), [127.0] * 3, [64.0] * 3).eval()
    images = images[:100]
    with torch.no_grad():
        expected = classifier(images).numpy()
    blob = export.to_onnx(classifier, {})
    for model, tolerance in ((blob, 1e-5), (export.to_int8(blob, images.numpy()), 0.05)):
        assert np.abs(export.session(model)(images.numpy()) - expected).max() < tolerance


def test_two_products_of_int8_fit_into_16_bits(exported):
    import onnx
    from onnx.numpy_helper import to_array

    for folder in (exported, Path(__file__).parents[1] / "trained"):
        weights = map(to_array, onnx.load(folder / "model.int8.onnx").graph.initializer)
        largest = max(np.abs(w.astype(int)).max() for w in weights if w.dtype == np.int8)
        assert 32 < largest <= 64


def test_the_trained_net_and_its_onnx_files_agree(images):
    root = Path(__file__).parents[1] / "trained"
    net, content = checkpoint.load_net(root / "model.pt")
    classifier = export.Classifier(net, content["mean"], content["std"])
    with torch.no_grad():
        expected = classifier(images[:300]).numpy()
    fp32, int8 = (
        export.session((root / f"model.{kind}").read_bytes()) for kind in ("onnx", "int8.onnx")
    )
    assert np.abs(fp32(images[:300].numpy()) - expected).max() <= export.TOLERANCE
    classes = expected.argmax(1)
    assert (int8(images[:300].numpy()).argmax(1) == classes).mean() > 0.9
    assert len(set(classes)) > 5
