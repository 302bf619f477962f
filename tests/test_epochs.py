"""The batches of an epoch, augmented one by one or several at once."""

import io
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from test_main_job import SMALL
from torch import nn
from torch._subclasses import FakeTensorMode

import checkpoint
import data
import epochs
import flags
import mirror
import model
import report
import step
import train
from common import UserError
from optimise import make_training

DRAW_NOTHING = ["--flip-p", "0", "--affine-p", "0", "--cutout-p", "0"]


@pytest.fixture(scope="module")
def dataset():
    return data.load("synthetic", None, torch.device("cpu"), train_images=60)


def epoch(dataset, *argv):
    torch.manual_seed(0)
    args = flags.parse_flags(["--batch-size", "8", *argv])
    return list(epochs.training_batches(dataset, args))


@pytest.mark.parametrize(
    ("unchanged", "several"),
    [
        *((["--augment", "none"], several) for several in (1, 3, 100)),
        *((DRAW_NOTHING, several) for several in (1, 3, 100)),
        ([*DRAW_NOTHING, "--augment", "albumentations", "--workers", "0"], 1),
    ],
)
def test_every_image_comes_once_with_its_label(unchanged, several, dataset, monkeypatch):
    monkeypatch.setattr(epochs, "batches_at_once", lambda *_: several)
    batches = epoch(dataset, *unchanged)
    assert [inputs.shape for inputs, _ in batches] == [(8, 3, 32, 32)] * 7
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    normal = data.normalize(dataset.train_images, dataset.mean, dataset.std)
    number = torch.cdist(inputs.flatten(1), normal.flatten(1)).argmin(1)
    assert len(number.unique()) == 56
    assert torch.equal(inputs, normal[number])
    assert torch.equal(labels, dataset.train_labels[number])


@pytest.mark.parametrize(
    ("way", "several"),
    [([], 1), ([], 3), (["--augment", "albumentations", "--workers", "0"], 1)],
)
def test_every_image_draws_for_itself(way, several, dataset, monkeypatch):
    """In whichever of four processes."""
    monkeypatch.setattr(epochs, "batches_at_once", lambda *_: several)
    monkeypatch.setattr(epochs.ranks, "count", lambda: 4)
    same = replace(dataset, train_images=dataset.train_images[:1].expand(60, -1, -1, -1))
    batches = []
    for rank in range(4):
        monkeypatch.setattr(epochs.ranks, "rank", lambda rank=rank: rank)
        batches += epoch(same, "--affine-p", "1", *way)
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert len(inputs.flatten(1).unique(dim=0)) == 56


def test_some_thousand_images_are_augmented_at_once_on_a_gpu():
    for size, several in ((256, 16), (3000, 1), (10_000, 1)):
        assert epochs.batches_at_once(size, torch.device("cuda")) == several
    assert epochs.batches_at_once(256, torch.device("cpu")) == 1


def test_how_many_at_once_follows_from_a_process_own_share(dataset, monkeypatch):
    monkeypatch.setattr(epochs.ranks, "count", lambda: 4)
    monkeypatch.setattr(epochs, "batches_at_once", several := Mock(return_value=3))
    assert [len(labels) for _, labels in epoch(dataset)] == [2] * 7
    several.assert_called_once_with(2, torch.device("cpu"))


COLOURS = ["--rgb-shift", "9", "9", "9", "--rgb-shift-p", "1", "--fill", "9"]
COLOURS += ["--contrast", "0.2", "--brightness-contrast-p", "1"]


@pytest.mark.parametrize("colours", [[], COLOURS])
def test_no_value_is_asked_of_a_gpu_for_batches_and_logits(colours, dataset, monkeypatch):
    monkeypatch.setattr(mirror, "triton_kernels", lambda _: None)  # which cannot take fake tensors
    tensors = {key: each for key, each in vars(dataset).items() if torch.is_tensor(each)}
    with FakeTensorMode():  # GPU tensors without a GPU and without values
        with torch.device("cuda"):
            net = model.build("atrous", 10)
            there = {key: torch.empty(t.shape, dtype=t.dtype) for key, t in tensors.items()}
        on_gpu = replace(dataset, **there)
        batches = epoch(on_gpu, *colours)
        logits = step.predict_logits(net, on_gpu, "fp32")
    assert len(batches) == 7
    assert all(tensor.is_cuda for batch in batches for tensor in batch)
    assert logits.is_cuda


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epochs_figures_are_those_of_its_steps(processes, dataset, monkeypatch):
    monkeypatch.setattr(epochs.ranks, "count", lambda: processes)
    monkeypatch.setattr(epochs.ranks, "total", lambda figures: processes * figures)
    args = flags.parse_flags(["--batch-size", "8"])
    training = make_training(nn.Conv2d(3, 4, 3), args, torch.device("cpu"), 7)
    training.optimizer.step()
    training.net.eval()  # as every evaluation leaves it
    right = 4 / processes
    figures = iter(torch.tensor([[loss, right, loss == 3] for loss in range(1, 8)]))
    line = epochs.train_epoch(training, lambda *_: next(figures), dataset, args, bar := Mock())
    assert bar.update.call_count == 7
    assert training.net.training
    assert (line["train_loss"], line["train_accuracy"], line["skipped_steps"]) == (4, 0.5, 1)
    assert line["images_per_second"] == pytest.approx(56 / line["seconds"])
    training.history, losses, before = [{}], iter([1.0, 2.0, torch.inf, *[3.0] * 4]), []
    rates = Mock(side_effect=[[k, k / 10] for k in range(7)])  # SGD's, which --lr is, and Muon's
    training.scheduler = Mock(get_last_lr=rates)

    def take_step(*_):
        before.append(training.scheduler.step.call_count)
        return torch.full((3,), next(losses))

    with pytest.raises(UserError, match="inf at step 10, learning rate 2:"):
        epochs.train_epoch(training, take_step, dataset, args, bar)
    assert before == list(range(7))


@pytest.mark.parametrize(("rank", "shown"), [(0, True), (1, False)])
def test_the_bar_of_a_resumed_run_on_a_terminal(rank, shown, dataset, monkeypatch):
    args = flags.parse_flags(["--batch-size", "8", "--epochs", "5"])
    training = make_training(nn.Conv2d(3, 4, 3), args, torch.device("cpu"), 7)
    training.history = [{}, {}]
    monkeypatch.setattr(epochs, "run_epoch", lambda training, *_: training.history.append({}))
    for module, name in (checkpoint, "save"), (report, "write_history"):
        monkeypatch.setattr(module, name, Mock())
    monkeypatch.setattr(report, "format_line", lambda _: "a line")
    monkeypatch.setattr(epochs.ranks, "rank", lambda: rank)
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    monkeypatch.setattr(sys, "stdout", terminal)
    terminal.isatty = lambda: True
    epochs.run_epochs(training, dataset, args, Path())
    assert ("| 14/35 [" in terminal.getvalue()) is shown
    assert ("\ra line\n" in terminal.getvalue()) is shown  # not behind the bar


def test_every_line_is_written_at_once(tmp_path, monkeypatch, no_pictures):
    """Though Python collects what is printed into a file or pipe."""
    run_epoch, seen = epochs.run_epoch, []
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file := io.BytesIO(), encoding="utf-8"))
    monkeypatch.setattr(
        epochs, "run_epoch", lambda *of: seen.append(file.getvalue().decode()) or run_epoch(*of)
    )
    assert train.main([*SMALL, "--net", "net136k", "--out", str(tmp_path)]) == 0
    line = report.format_line(checkpoint.load_history(tmp_path)[0])
    assert [text.splitlines()[-1] for text in seen] == [report.HEADER, line]
