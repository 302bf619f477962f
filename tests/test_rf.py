import json
import shutil
from functools import partial
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from test_checkpoint import config_file, model_file
from torch import nn

import checkpoint
import data
import plots
import rf


def test_json(capsys):
    assert rf.main(["--net", "net176k", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["net", "parameters", "multiply_adds", "receptive_field", "layers"]
    assert (printed["net"], printed["parameters"]) == ("net176k", 176_234)
    assert printed["receptive_field"] == 43
    assert printed["multiply_adds"] == sum(row["multiply_adds"] for row in printed["layers"])
    first, last = printed["layers"][0], printed["layers"][-1]
    assert (first["kernel"], first["jump"], first["receptive_field"]) == ([3, 3], [1, 1], [3, 3])
    assert (last["kind"], last["output"], last["receptive_field"]) == ("Linear", [10], None)


def test_table(capsys):
    assert rf.main([]) == 0
    *rows, _, totals = capsys.readouterr().out.splitlines()
    assert len({len(row) for row in rows}) == 1  # aligned
    assert len(rows[0]) <= 80
    row = "5.0 Conv2d 4 2 1 96 96×8×8 4 34 768 98,304"
    assert row.split() in [each.split() for each in rows]
    assert totals == "atrous: 186,858 parameters, 52,149,264 multiply-adds, receptive field 90"


def test_sides_that_differ(capsys, monkeypatch):
    monkeypatch.setattr(rf.model, "build", lambda *_: nn.Conv2d(3, 4, (3, 5), (2, 1)))
    assert rf.main([]) == 0
    _, row, _, totals = capsys.readouterr().out.splitlines()
    assert row.split()[2:9] == ["3×5", "2×1", "1", "1", "4×15×28", "2×1", "3×5"]
    assert totals.endswith("receptive field 5")


def test_effective_field_of_one_convolution():
    net = nn.Conv2d(3, 2, 5, padding=2, bias=False)
    heat = rf.effective_receptive_field(net, torch.randn(4, 3, 21, 15))
    expected = torch.zeros(21, 15)
    expected[8:13, 5:10] = net.weight.sum(0).abs().sum(0)
    torch.testing.assert_close(heat, expected)


def test_effective_field_is_the_mean_over_images():
    net = nn.ReLU()
    inputs = torch.ones(400, 1, 3, 3)  # more than are taken at once
    inputs[:100] = -1
    assert rf.effective_receptive_field(net, inputs)[1, 1] == 0.75


@pytest.fixture
def run(tmp_path):
    """A run folder with an untrained net."""
    model_file(tmp_path / "model.pt", "net136k", "abcdefghij")
    config_file(tmp_path, 100, 10)
    return tmp_path


@pytest.mark.parametrize(("stride", "margin", "start"), [(1, 6, 2), (4, 8, 4)])
def test_effective_field_of_a_known_net(stride, margin, start, run, capsys, monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 1, 41, stride, 20), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    rows = net[0].weight.data.fill_(1).squeeze(0)
    rows[:, 0], rows[:, 1] = 0.04, 0.5  # outside the image; the first is under 4.55 %
    monkeypatch.setattr(checkpoint, "load_net", lambda _: (net, {"net": "box"}))
    monkeypatch.setattr(plots, "effective_field", drawn := Mock(wraps=plots.effective_field))
    assert rf.main(["--effective", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "box on 10 of the 10 held-out training images of synthetic\n" in printed
    assert "theoretical receptive field  41 pixels" in printed
    assert f"effective receptive field    {(40 * 41) ** 0.5:.1f} pixels" in printed
    assert drawn.call_args.args[2:4] == (margin, [(start, start + 40)] * 2)
    assert (run / "effective_rf.png").read_bytes().startswith(b"\x89PNG")
    assert f"gradient mass inside 32×32   {32**2 / (41 * 39.54):.1%}" in printed


def test_images_are_mirrored_where_the_field_leaves_them(run, capsys, monkeypatch):
    seen = []

    def measured(features, inputs):
        seen.append(inputs)
        return torch.ones(inputs.shape[2:])

    monkeypatch.setattr(rf, "effective_receptive_field", measured)
    some = data.load("synthetic", None, torch.device("cpu"), 100, 3000)
    monkeypatch.setattr(checkpoint, "load_data", lambda _: some)
    assert rf.main(["--effective", str(run)]) == 0
    assert "net136k on 1,000 of the 3,000 held-out" in capsys.readouterr().out
    (inputs,) = seen
    margin = (inputs.shape[2] - 32) // 2
    image = inputs[:, :, margin : margin + 32, margin : margin + 32]
    assert torch.equal(image, data.normalize(some.test_images[::3], some.mean, some.std))
    around = inputs[:, :, margin - 20 : margin + 52, margin - 20 : margin + 52]
    assert torch.equal(around, F.pad(image, (20,) * 4, mode="reflect"))


def test_mistakes_are_one_line(run, tmp_path, refused):
    error = partial(refused, rf.main)
    assert "--net: invalid choice: 'resnet' (choose from" in error("--net", "resnet")
    assert "--jason" in error("--jason")
    assert "model.pt does not exist" in error("--effective", tmp_path / "nowhere")
    assert "not allowed with argument" in error("--effective", run, "--json")
    assert "--net net150k: the run in" in error("--effective", run, "--net", "net150k")
    shutil.move(run / "config.json", run / "config.bak")
    assert "holds only a net, for predict.py" in error("--effective", run)
    (run / "config.json").write_text('{"flags": {}}')
    assert "config.json is damaged" in error("--effective", run)
