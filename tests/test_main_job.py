"""The main job from outside: flags in, a run folder, lines and an exit status out."""

import json
import math
import re
import signal
import sys
import time
import weakref
from itertools import chain, count, repeat
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_data import files, write_tar

import checkpoint
import data
import plots
import report
import step
import train

SMALL = ["--data", "synthetic", "--train-images", "60", "--holdout", "50", "--device", "cpu"]
SMALL += ["--batch-size", "20", "--epochs", "2", "--lr", "0.1"]
FILES = set(report.FILES)
METRICS = "epoch lr train_loss train_accuracy test_loss test_accuracy seconds images_per_second"
METRICS += " skipped_steps"
ROOT = Path(__file__).parents[1]
lines = checkpoint.load_history


def timeless(folder):
    """The metrics other than times and speeds."""
    clock = ("seconds", "images_per_second")
    return [{key: line[key] for key in line if key not in clock} for line in lines(folder)]


def test_every_promised_file(finished):
    folder, _ = finished
    assert {file.name for file in folder.iterdir()} == FILES


def test_metrics(finished):
    history = lines(finished[0])
    assert [line["epoch"] for line in history] == [1, 2]
    for line in history:
        assert set(line) == set(METRICS.split())
        assert 0 <= line["train_accuracy"] <= 1
        assert 0 <= line["test_accuracy"] <= 1
        assert line["images_per_second"] == pytest.approx(60 / line["seconds"])
    assert history[1]["lr"] < 1e-3 < history[0]["lr"]  # OneCycle ends near zero


def test_summary_agrees_with_the_predictions(finished):
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    logits = np.load(folder / "predictions.npy")
    assert logits.shape == (50, 10)
    dataset = checkpoint.load_data(folder)
    right = (logits.argmax(1) == dataset.test_labels.numpy()).mean()
    assert summary["final_accuracy"] == pytest.approx(right)
    assert summary["final_accuracy"] == lines(folder)[-1]["test_accuracy"]
    assert summary["best_accuracy"] >= summary["final_accuracy"]
    assert (summary["parameters"], summary["receptive_field"]) == (186_858, 90)
    assert (summary["data"], summary["tested_on"]) == ("synthetic", "50 held-out training images")
    assert summary["target_reached"]["epoch"] == 1
    assert lines(folder)[0]["seconds"] <= summary["target_reached"]["seconds"]
    assert summary["target_reached"]["seconds"] < summary["training_seconds"]
    assert summary["training_seconds"] < summary["total_seconds"]
    assert summary["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert summary["device"].startswith("CPU")


@pytest.mark.parametrize(
    ("target", "epoch", "said"),
    [("0.2", 1, "epoch 1"), ("0.7", 7, "epoch 7"), ("0.9", None, "not reached")],
)
def test_when_the_target_is_reached(
    target, epoch, said, tmp_path, monkeypatch, no_pictures, capsys
):
    accuracies, make_step = chain([0.2, *[0.4] * 5, 0.8, 0.8], repeat(0.4)), step.make_step
    monkeypatch.setattr(step, "make_step", lambda *of: time.sleep(0.3) or make_step(*of))
    monkeypatch.setattr(report, "accuracy", lambda *_: next(accuracies))
    predict = step.predict_logits
    monkeypatch.setattr(step, "predict_logits", lambda *of: time.sleep(0.01) or predict(*of))
    out = ["--epochs", "8", "--net", "net136k", "--out", str(tmp_path), "--target", target]
    assert train.main([*SMALL, *out]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    reached, seconds = summary["target_reached"], [line["seconds"] for line in lines(tmp_path)]
    assert summary["training_seconds"] > sum(seconds) + 2 * 0.3  # with both steps' preparation
    assert (reached and reached["epoch"]) == epoch
    if reached:
        assert reached["seconds"] + 0.3 <= summary["training_seconds"]  # counted from a first step
        assert reached["seconds"] > sum(seconds[:epoch]) + 0.01 * epoch  # with their evaluations
    assert (summary["best_epoch"], summary["best_accuracy"]) == (7, 0.8)
    printed = capsys.readouterr().out
    assert "best, in epoch 7      80.00%" in printed
    (line,) = [x for x in printed.splitlines() if x.startswith("target")]
    assert said in line


def test_the_card(finished, tmp_path):
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    card = (folder / "card.md").read_text()
    assert card.startswith("# atrous on synthetic\n")
    for fact in ("final_accuracy", "flip_accuracy", "best_accuracy"):
        assert f"| {summary[fact]:.2%} |" in card
    for fact in ("parameters", "multiply_adds"):
        assert f"| {summary[fact]:,} |" in card
    assert summary["command"] in card
    assert "| epochs, seed | 2, 0 |" in card
    assert "| recipe | train.py's own |" in card
    assert f"| device | {summary['device']}, {summary['precision']}, " in card
    assert f"torch {summary['versions']['torch']}, " in card
    assert "| trained on | 60 images (CRC " in card
    assert "| accuracy on 50 held-out training images, last epoch |" in card
    assert f"| {summary['receptive_field']} pixels |" in card
    logits = np.load(folder / "predictions.npy").argmax(1)
    dataset = checkpoint.load_data(folder)
    for index, name in enumerate(dataset.classes):
        share = (logits == index)[dataset.test_labels.numpy() == index].mean()
        assert f"| {name} | {share:.1%} |" in card
    other = {"total_seconds": 99, "best_epoch": 7, "best_accuracy": 0.9, "final_accuracy": 0.8}
    report.write_card(tmp_path, summary | other, {"seed": 0})
    card = (tmp_path / "card.md").read_text()
    assert ", 99 s |\n" in card
    assert "last epoch | 80.00% |" in card
    assert "| … best epoch (7) | 90.00% |" in card
    assert card.endswith("All flags that have a value: `seed 0`.\n")


def test_the_saved_net_predicts_what_the_run_did(finished):
    folder, _ = finished
    net, content = checkpoint.load_net(folder / "model.pt")
    dataset = checkpoint.load_data(folder)
    assert content["mean"] == pytest.approx(dataset.mean.tolist())
    assert content["std"] == pytest.approx(dataset.std.tolist())
    assert content["classes"] == dataset.classes
    seen = {int(v) for k, v in content["state_dict"].items() if k.endswith("batches_tracked")}
    assert seen == {6}  # of two epochs, and nothing else
    precision = json.loads((folder / "summary.json").read_text())["precision"]
    net.to(memory_format=torch.channels_last)
    logits = step.predict_logits(net, dataset, precision).numpy()
    np.testing.assert_allclose(logits, np.load(folder / "predictions.npy"), atol=0.05)


def test_the_accuracy_averaged_over_mirror_images(tmp_path, monkeypatch, no_pictures, capsys):
    def logits(net, dataset, precision, flip=False):  # wrong; with flip right, by more or by less
        right = F.one_hot(dataset.test_labels, 10).float()
        return right * torch.tensor([2.0, 0.5]).repeat(25).view(-1, 1) if flip else -right

    monkeypatch.setattr(step, "predict_logits", logits)
    monkeypatch.setattr(plots, "examples", lambda *of: drawn.append(of[2]))
    monkeypatch.setattr(plots, "draw_run", lambda *of: shown.extend(of))
    monkeypatch.setattr(train, "time", Mock(perf_counter=count().__next__))
    drawn, shown, run = [], [], [*SMALL, "--net", "net136k", "--cutout-p", "1", "--out"]
    assert train.main([*run, str(tmp_path)]) == 0
    assert (shown[3] == np.load(tmp_path / "predictions.npy")).all()
    assert shown[4] == lines(tmp_path)
    assert ((drawn[0] == 0).all(1).sum((1, 2)) >= 16 * 16).all()  # augmented
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["final_accuracy"], summary["flip_accuracy"]) == (0, 0.5)
    assert summary["total_seconds"] == 2  # from before the images are read, the clock's first tick
    assert "flip averaging   50.00%" in capsys.readouterr().out
    assert "mirror image | 50.00% |" in (tmp_path / "card.md").read_text()
    assert lines(tmp_path)[-1]["test_loss"] == pytest.approx(1 + math.log(9 + math.exp(-1)))
    (tmp_path / "summary.json").unlink()
    assert train.main(["--resume", str(tmp_path)]) == 0
    assert torch.equal(*drawn)  # resumed at its very end, a run draws the same picture


def test_what_is_printed_when_piped(finished):
    folder, printed = finished
    rows = printed.splitlines()
    assert "\x1b" not in printed
    assert "step/s" not in printed + (folder.parent / "stderr").read_text()  # no progress bar
    assert max(len(row) for row in rows if str(folder) not in row) <= 100
    summary = checkpoint.load_summary(folder)
    for line in (
        f"device     {summary['device']}, {summary['precision']}\n",
        "data       synthetic: 60 training images, 50 held-out training images\n",
        "net        atrous: 186,858 parameters, receptive field 90, 52.1 M multiply-adds\n",
    ):
        assert line in printed
    table = rows[next(i for i, row in enumerate(rows) if row.startswith("epoch")) :][:3]
    assert len({len(row) for row in table}) == 1  # aligned
    form = "{epoch} {lr:.5f} {train_loss:.4f} {train_accuracy:.2%} {test_loss:.4f} "
    form += "{test_accuracy:.2%} {seconds:.2f} {images_per_second:,.0f}"
    for line, row in zip(lines(folder), table[1:], strict=True):
        assert row.split() == form.format(**line).split()
    assert f"final test accuracy   {line['test_accuracy']:.2%} on synthetic, 50 held" in printed
    assert f"\ntotal                 {summary['total_seconds']:.1f} s\n" in printed
    reached = f"in epoch 1, {summary['target_reached']['seconds']:.1f} s from the first step"
    assert f"\ntarget 1.00%          {reached}\n" in printed


def test_another_seed_has_other_weights_and_another_order(tmp_path, no_pictures, monkeypatch):
    """That the same seed gives the same run is shown by the tests of --resume."""
    orders, epoch_batches = [], data.epoch_batches

    def noting(*args):
        batches = epoch_batches(*args)
        orders.append(torch.cat(batches).tolist())
        return batches

    monkeypatch.setattr(data, "epoch_batches", noting)
    still = ["--net", "net136k", "--lr", "1e-30", "--weight-decay", "0"]
    for seed in ("0", "1"):
        assert train.main([*SMALL, *still, "--seed", seed, "--out", str(tmp_path / seed)]) == 0
    first, later, _, other, *_ = orders
    assert sorted(first) == sorted(later) == list(range(60))
    assert len({tuple(order) for order in (first, later, other)}) == 3
    nets = [checkpoint.load_net(tmp_path / seed / "model.pt")[0] for seed in ("0", "1")]
    weights = [next(net.parameters()) for net in nets]
    assert not torch.allclose(*weights)


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_without_an_output(closed, tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr(sys, closed, None)  # as `>&-` and `2>&-` do
    archive = write_tar(tmp_path / "pets.tar", files())
    out = ["--net", "net136k", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert train.main(["--data", str(archive), "--batch-size", "4", "--device", "cpu", *out]) == 0
    assert len(lines(tmp_path / "run")) == 1


def test_a_class_that_no_test_image_has(tmp_path, no_pictures):
    out = ["--holdout", "4", "--net", "net136k", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert train.main([*SMALL, *out]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert len(summary["class_accuracy"]) < 10
    assert set(summary["class_accuracy"].values()) <= {0.0, 0.5, 1.0}


def test_a_class_whose_name_would_break_a_table(tmp_path, no_pictures):
    members = {name.replace("cat", "a|b"): blob for name, blob in files(train=8).items()}
    run = ["--data", str(write_tar(tmp_path / "pets.tar", members)), "--batch-size", "8"]
    run += ["--net", "net136k", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert train.main(run) == 0
    assert "\n| a\\|b | " in (tmp_path / "run/card.md").read_text()


def test_without_a_network_it_says_so_twice(tmp_path, monkeypatch, capsys, no_pictures):
    offline = Mock(side_effect=TimeoutError("timed out"))
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", offline)
    arguments = [*SMALL[2:], "--data-dir", str(tmp_path / "data"), "--epochs", "1", "--seed", "3"]
    monkeypatch.chdir(tmp_path)
    assert train.main(arguments) == 0
    printed = capsys.readouterr()
    assert "warning" in printed.err
    assert "synthetic" in printed.out.splitlines()[-1]
    for name in ("config.json", "summary.json"):
        facts = json.loads((tmp_path / "runs/atrous-synthetic-s3" / name).read_text())
        assert facts["data"] == "synthetic"
    assert train.main(arguments) == 2  # a run in the default folder is as safe as any other
    assert "runs/atrous-synthetic-s3: a run already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "radii"), [([], [0.0, 0.1]), (["--sam", "0.3"], [0.0, 0.3]), (["--sam", "0"], [0.0])]
)
def test_the_last_quarter_is_sharpness_aware(flag, radii, tmp_path, no_pictures, monkeypatch):
    prepared, before, make_step = [], [], step.make_step

    def noting(training, *settings):
        assert not any(each() for each in before)  # a CUDA graph's memory is freed by then
        prepared.append((len(training.history), settings[-1]))
        made = make_step(training, *settings)
        before.append(weakref.ref(made))
        return made

    monkeypatch.setattr(step, "make_step", noting)
    out = ["--epochs", "6", "--out", str(tmp_path / "run"), "--net", "net136k", *flag]
    assert train.main([*SMALL, *out]) == 0
    assert prepared == list(zip([0, 5], radii, strict=False))


def test_few_steps_are_warned_of(finished, capsys, tmp_path, no_pictures):
    assert "\nwarning    steps in an epoch: 3; a smaller --batch-size takes more\n" in finished[1]
    short = ["--net", "net136k", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert train.main([*SMALL, *short, "--batch-size", "6", "--train-images", "65"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert lines(tmp_path / "run")[-1]["lr"] < 1e-5  # the schedule counts no last, short batch


def test_what_a_run_does_not_need_is_not_imported(finished):
    """matplotlib is imported after the data is read; albumentations, onnx, torch._dynamo never."""
    said = (finished[0].parent / "stderr").read_text()
    first, then = (set(re.findall(r"\| +(\S+)$", part, re.M)) for part in said.split("data read"))
    assert "torch" in first
    assert "matplotlib" in then
    assert not {"albumentations", "onnx", "torch._dynamo"} & (first | then)


def test_what_a_process_is_set_to(tmp_path, no_pictures, monkeypatch):
    monkeypatch.setattr(train, "keep_freed_memory", kept := Mock())
    for extra, expected in (["--deterministic"], True), ([], False):
        short = ["--net", "net136k", "--epochs", "1", "--out", str(tmp_path / str(expected))]
        assert train.main([*SMALL, *extra, *short]) == 0
        assert torch.are_deterministic_algorithms_enabled() is expected
        assert kept.called
        kept.reset_mock()


@pytest.mark.gpu
def test_the_same_bits_again_on_a_gpu(tmp_path, monkeypatch, no_pictures):
    folders = [tmp_path / name for name in ("one", "two", "resumed")]
    arguments = [*SMALL, "--epochs", "8", "--device", "cuda", "--deterministic", "--out"]
    for folder in folders[:2]:
        assert train.main([*arguments, str(folder)]) == 0
    save = checkpoint.save

    def terminated(path, state):
        save(path, state)
        if len(state.get("history", "")) in (1, 7):  # 7: between sharpness-aware epochs
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", terminated)
        assert train.main([*arguments, str(folders[2])]) == 143
    for status in (143, 0):
        with monkeypatch.context() as patch:
            if status:
                patch.setattr(checkpoint, "save", terminated)
            assert train.main(["--resume", str(folders[2])]) == status
    assert timeless(folders[0]) == timeless(folders[1]) == timeless(folders[2])
    first, *others = [checkpoint.load(each / "model.pt")["state_dict"] for each in folders]
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    arguments = [*SMALL, "--device", "cuda"]
    for precision in ("bf16", "fp16", "fp32"):
        out = ["--precision", precision, "--out", str(tmp_path / precision)]
        assert train.main([*arguments, *out]) == 0
        assert {file.name for file in (tmp_path / precision).iterdir()} == FILES
