"""Resuming a run, from outside: its flags, its data, its seeds."""

import errno
import json
import re
import shutil
import signal
from itertools import count
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from test_data import files, png, write_folder, write_tar
from test_main_job import SMALL, lines, timeless

import checkpoint
import epochs
import plots
import report
import run_folders
import step
import train


@pytest.mark.parametrize(
    ("number", "status", "word", "moment"),
    [
        (signal.SIGINT, 130, "interrupted", (report, "write_history")),
        (signal.SIGTERM, 143, "terminated", (step, "predict_logits")),  # the epoch still finishes
    ],
)
def test_ended_and_resumed_is_as_if_nothing_had_been(
    finished, tmp_path, monkeypatch, capsys, no_pictures, number, status, word, moment
):
    folder = tmp_path / "run"
    job, once = getattr(*moment), [number]

    def end(*args):
        result = job(*args)
        while once:
            signal.raise_signal(once.pop())
        return result

    with monkeypatch.context() as patch:
        patch.setattr(*moment, end)
        assert train.main([*SMALL, "--target", "0.01", "--out", str(folder)]) == status
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{word}: --resume {folder}")
    before = lines(folder)
    assert len(before) == 1
    assert not list(folder.glob("*.tmp"))
    assert train.main(["--resume", str(folder)]) == 0
    assert lines(folder)[:1] == before  # its seconds too: it was not trained again
    assert timeless(folder) == timeless(finished[0])
    nets = [checkpoint.load(path / "model.pt")["state_dict"] for path in (folder, finished[0])]
    assert all(torch.equal(value, nets[1][name]) for name, value in nets[0].items())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["final_accuracy"] == lines(finished[0])[-1]["test_accuracy"]
    assert summary["total_seconds"] >= summary["training_seconds"]  # of both parts
    assert summary["target_reached"]["epoch"] == 1
    assert summary["command"].endswith(f"--out {folder}")
    assert "`resume " not in (folder / "card.md").read_text()


def test_resumed_with_albumentations_in_a_loader(tmp_path, monkeypatch, no_pictures):
    run = [*SMALL, "--net", "net136k", "--augment", "albumentations", "--out"]
    assert train.main([*run, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(report, "format_line", Mock(side_effect=KeyboardInterrupt))
        assert train.main([*run, str(tmp_path / "ended")]) == 130
    assert len(lines(tmp_path / "ended")) == 1
    assert train.main(["--resume", str(tmp_path / "ended")]) == 0
    assert timeless(tmp_path / "ended") == timeless(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_behind_its_last_epoch(finished, tmp_path, monkeypatch, capsys, no_pictures, number):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    before = (folder / "summary.json").read_text()
    for name in ("summary.json", "card.md"):
        (folder / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(train.report, "write_card", lambda *_: signal.raise_signal(number))
        assert train.main(["--resume", str(folder)]) == 128 + number
    assert f": --resume {folder} continues" in capsys.readouterr().err
    assert train.main(["--resume", str(folder)]) == 0
    after = (json.loads(text) for text in (before, (folder / "summary.json").read_text()))
    assert len({each["final_accuracy"] for each in after}) == 1
    assert (folder / "card.md").exists()


def test_a_resumed_run_keeps_its_flags(finished, refused):
    folder, _ = finished
    for option, value, had in (
        ("--lr", "0.2", "0.1"),
        ("--target", "0.9", "0.01"),
        ("--out", "elsewhere", folder),
    ):
        error = f"error: {option} {value}: the run in {folder} has {had} and keeps it; "
        error += "start a new run in another --out"
        assert refused(train.main, "--resume", folder, option, value) == error


def test_a_run_from_before_a_flag(finished, tmp_path, refused):
    config = json.loads((finished[0] / "config.json").read_text())
    del config["flags"]["sam"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = "config.json is from another version of atrous (flags differ: sam): use that"
    assert said in refused(train.main, "--resume", tmp_path)


def test_a_recipe_is_recorded_and_resumed(tmp_path, capsys, refused, no_pictures):
    folder = tmp_path / "run"
    arguments = [*SMALL, "--net", "net136k", "--recipe", "net136k", "--epochs", "1"]
    assert train.main([*arguments, "--out", str(folder)]) == 0
    assert "not published: batch size 20" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    assert (config["recipe"], config["flags"]["recipe"]) == ("net136k", "net136k")
    assert config["flags"]["dropout"] == 0.1
    assert "| recipe | net136k |" in (folder / "card.md").read_text()
    before = lines(folder)
    assert train.main(["--resume", str(folder)]) == 0
    assert lines(folder) == before
    assert "--dropout 0.0: the run in" in refused(train.main, "--resume", folder, "--dropout", "0")


def test_a_resumed_run_keeps_its_data(finished, tmp_path, refused, no_pictures):
    folder = shutil.copytree(finished[0], tmp_path / "run", ignore=lambda *_: ["summary.json"])
    path = write_tar(tmp_path / "pets.tar", files(train=60))
    error = refused(train.main, "--resume", folder, "--data", path)
    assert re.search(r"on 60 images \(CRC \w+\), not pets's 60 images \(CRC", error)
    error = refused(train.main, "--resume", folder, "--data", tmp_path / "gone")
    assert error.endswith("; if the run's images have moved, say where: --data")
    assert "moved" not in refused(train.main, "--data", tmp_path / "gone")
    anew = ["--data-dir", str(tmp_path), "--workers", "0", "--device", "auto"]
    assert train.main(["--resume", str(folder), *anew]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["data_dir"] == str(tmp_path)  # where export.py, say, will look for it


def test_a_resumed_run_keeps_its_images_and_labels(tmp_path, no_pictures, capsys):
    members = files(train=30)
    white = png((255, 255, 255))
    renamed = {  # the last cat becomes the first dog, and the order of images stays
        "other training labels": ("train/cat/9.png", "train/dog/-.png"),
        "other test labels": ("test/cat/1.png", "test/dog/-.png"),
        "other classes": ("cat", "bat"),
    }
    others = {
        "the same": members,
        "other training images": members | {"train/cat/0.png": white},
        "other test images": members | {"test/cat/0.png": white},
        **{
            what: {name.replace(*names): blob for name, blob in members.items()}
            for what, names in renamed.items()
        },
    }
    folders = [tmp_path / name for name in others]
    for folder, images in zip(folders, others.values(), strict=True):
        write_folder(folder / "pets", images)
    run = ["--net", "net136k", "--batch-size", "30", "--epochs", "1", "--device", "cpu"]
    out = tmp_path / "run"
    assert train.main([*run, "--data", str(folders[0] / "pets"), "--out", str(out)]) == 0
    for folder, status in zip(folders, (0, 2, 2, 2, 2, 2), strict=True):
        assert train.main(["--resume", str(out), "--data", str(folder / "pets")]) == status
    assert capsys.readouterr().err.count(", not pets's 60 images") == 5


def test_the_checkpoint_of_another_run(finished, tmp_path, refused):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "summary.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for flag, value in {"epochs": 4, "seed": 7, "lr": 0.3}.items():
        other = config | {"flags": config["flags"] | {flag: value}}
        (folder / "config.json").write_text(json.dumps(other))
        error = refused(train.main, "--resume", folder)
        assert "last.pt and config.json are from different runs" in error
    assert (folder / "last.pt").read_bytes() == (finished[0] / "last.pt").read_bytes()
    (folder / "config.json").write_text(json.dumps(config))
    whole = checkpoint.load(folder / "last.pt")
    wrong = {"net": {}}, {"net": 5}, {"optimizer": 5}, {"optimizer": {"param_groups": []}}
    for content in *(whole | w for w in wrong), {k: v for k, v in whole.items() if k != "elapsed"}:
        checkpoint.save(folder / "last.pt", content)
        error = refused(train.main, "--resume", folder)
        assert "last.pt does not fit this version of atrous: " in error


def test_before_its_first_checkpoint_too(finished, tmp_path, refused, no_pictures):
    config = (finished[0] / "config.json").read_text()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(config)
    other = write_tar(tmp_path / "pets.tar", files(train=60))
    error = refused(train.main, "--resume", tmp_path / "run", "--data", other)
    assert f"--resume {tmp_path}/run: that run trains on 60 images" in error
    name = json.loads(config)["data"]
    assert error.endswith(f"; it can only continue on {name} as it was then")
    assert (tmp_path / "run/config.json").read_text() == config
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert checkpoint.load_config(tmp_path / "run")["flags"] == json.loads(config)["flags"]
    assert timeless(tmp_path / "run") == timeless(finished[0])


def test_another_process_at_the_same_run(finished, refused, monkeypatch):
    with run_folders.alone_in(finished[0]):
        error = refused(train.main, "--resume", finished[0])
        assert f"{finished[0]}: in use by another process" in error
        monkeypatch.setattr(run_folders, "fcntl", None)  # as on Windows, which has no such locks
        assert train.main(["--resume", str(finished[0])]) == 0
    monkeypatch.undo()
    assert train.main(["--resume", str(finished[0])]) == 0
    no_locks = OSError(errno.ENOLCK, "No locks available")  # as on some network file systems
    monkeypatch.setattr(run_folders.fcntl, "flock", Mock(side_effect=no_locks))
    assert train.main(["--resume", str(finished[0])]) == 0


def test_the_images_of_a_run_may_move(tmp_path, no_pictures, refused):
    here, there, out = (tmp_path / name for name in ("pets", "moved", "a run"))
    write_folder(here, files(train=30))
    run = ["--net", "net136k", "--batch-size", "30", "--epochs", "1", "--device", "cpu"]
    assert train.main([*run, "--data", str(here), "--out", str(out)]) == 0
    here.rename(there)
    assert f"images moved: python train.py --resume '{out}' --data" in refused(plots.main, out)
    (out / "summary.json").unlink()  # as if it had still to go on
    assert train.main(["--resume", str(out), "--data", str(there)]) == 0
    assert checkpoint.load_data(out).name == "moved"
    assert checkpoint.load_config(out)["command"].endswith(f"--out '{out}'")


@pytest.mark.parametrize("without", [[], ["last.pt"]])
def test_a_run_that_has_ended_stays_as_it_is(without, finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    for name in without:
        (folder / name).unlink()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert train.main(["--resume", str(folder)]) == 0
    assert f"{folder} has already finished, after epoch 2" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert train.main(["--resume", str(folder), "--data-dir", "elsewhere"]) == 0
    assert checkpoint.load_config(folder)["flags"]["data_dir"] == "elsewhere"


def test_killed_between_its_last_checkpoint_and_its_metrics(finished, tmp_path, no_pictures):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "summary.json").unlink()
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    checkpoint.save(folder / "last.pt", checkpoint.load(folder / "last.pt") | {"elapsed": 1e6})
    assert train.main(["--resume", str(folder)]) == 0
    assert metrics.read_text() == whole
    assert 1e6 < checkpoint.load_summary(folder)["total_seconds"] < 2e6  # with what came before


def test_repeats(tmp_path, monkeypatch, capsys, no_pictures):
    folder = tmp_path / "runs"
    arguments = [*SMALL, "--epochs", "1", "--repeat", "2", "--seed", "3", "--out", str(folder)]
    monkeypatch.setattr(train, "time", Mock(perf_counter=count().__next__))
    assert train.main(arguments) == 0
    names = {"s3", "s4", "config.json", "summary.json"}
    assert {path.name for path in folder.iterdir()} == names
    summary = json.loads((folder / "summary.json").read_text())
    each = [json.loads((folder / s / "summary.json").read_text()) for s in ("s3", "s4")]
    values = [one["final_accuracy"] for one in each]
    assert summary["final_accuracy"]["values"] == values
    assert summary["final_accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert summary["final_accuracy"]["sd"] == pytest.approx(np.std(values, ddof=1))
    for key in ("best_accuracy", "flip_accuracy", "total_seconds"):
        assert summary[key]["values"] == [one[key] for one in each]
    shared = "data images tested_on net parameters device precision epochs command versions"
    assert all(summary[key] == each[1][key] for key in shared.split())
    assert summary["total_seconds"]["values"] == [1, 1]  # ticks: each seed's own
    assert [one["seed"] for one in each] == [3, 4]
    (said,) = re.findall("\n2 seeds: (.*)\n", capsys.readouterr().out)
    assert said.endswith("(standard deviation) on synthetic, 50 held-out training images")
    assert train.main([*arguments, "--seed", "9"]) == 2
    assert train.main([*SMALL, "--out", str(folder)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert sum(f"--resume {folder} continues it" in line for line in errors) == 2
    assert not (folder / "s9").exists()
    before = (folder / "config.json").read_text()
    with run_folders.alone_in(folder):
        assert train.main(["--resume", str(folder)]) == 2
    assert f"{folder}: in use by another process" in capsys.readouterr().err
    other = write_tar(tmp_path / "pets.tar", files(train=60))
    assert train.main(["--resume", str(folder), "--data", str(other)]) == 2
    assert (folder / "config.json").read_text() == before
    assert train.main(["--resume", str(folder), "--data-dir", str(tmp_path)]) == 0
    for config in map(checkpoint.load_config, (folder, folder / "s3", folder / "s4")):
        assert (config["flags"]["data_dir"], config["flags"]["resume"]) == (str(tmp_path), None)
    assert checkpoint.load_config(folder / "s3")["flags"]["repeat"] == 1
    assert train.main(["--resume", str(folder.rename(tmp_path / "moved"))]) == 0


def test_the_mean_is_that_of_the_last_epochs(finished, tmp_path, capsys):
    one = checkpoint.load_summary(finished[0]) | {"best_accuracy": 0.9}
    report.write_repeats(tmp_path, [one | {"final_accuracy": each} for each in (0.5, 0.6)])
    assert "2 seeds: final test accuracy 55.00% ± 7.07% (standard" in capsys.readouterr().out


def test_repeats_go_on_with_no_run_that_is_another(finished, tmp_path, refused):
    shutil.copytree(finished[0], tmp_path / "s1")
    error = refused(train.main, *SMALL, "--repeat", "2", "--out", tmp_path)
    assert f"--out {tmp_path}/s1: a run already exists" in error
    assert [path.name for path in tmp_path.iterdir()] == ["s1"]


def test_seeds_that_were_interrupted(tmp_path, monkeypatch, capsys, no_pictures):
    whole, folder = tmp_path / "whole", tmp_path / "interrupted"
    arguments = [*SMALL, "--net", "net136k", "--repeat", "3", "--out"]
    assert train.main([*arguments, str(whole)]) == 0
    run_epoch, begun = epochs.run_epoch, []

    def interrupted(*given):
        begun.append(1)
        if len(begun) == 4:  # the second epoch of the second seed
            raise KeyboardInterrupt
        run_epoch(*given)

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "run_epoch", interrupted)
        assert train.main([*arguments, str(folder)]) == 130
    assert f"--resume {folder} continues" in capsys.readouterr().err.splitlines()[-1]
    with monkeypatch.context() as patch:
        patch.setattr(epochs, "run_epoch", Mock(side_effect=OSError("the disk is full")))
        assert train.main(["--resume", str(folder)]) == 2
    assert f"the disk is full; --resume {folder} continues" in capsys.readouterr().err
    assert train.main([*arguments, str(folder)]) == 2
    moved = folder.rename(tmp_path / "moved")
    before = (moved / "s0/metrics.jsonl").read_text()
    monkeypatch.setattr(train, "choose_precision", asked := Mock(wraps=train.choose_precision))
    assert train.main(["--resume", str(moved)]) == 0
    chosen = checkpoint.load_config(whole / "s0")["flags"]["precision"]
    (call,) = asked.call_args_list
    assert call.args[0] == chosen  # all seeds have the same, on another device too
    assert (moved / "s0/metrics.jsonl").read_text() == before
    both = [json.loads((each / "summary.json").read_text()) for each in (whole, moved)]
    assert both[0]["final_accuracy"] == both[1]["final_accuracy"]
    assert both[1]["seeds"] == [0, 1, 2]
    commands = {checkpoint.load_summary(moved / seed)["command"] for seed in ("s0", "s1", "s2")}
    assert commands == {both[1]["command"]}
    assert both[1]["command"].endswith(f"--out {folder}")
