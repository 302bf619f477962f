import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from test_hostile import Hostile

import checkpoint
import data
import plots
import train
from common import UserError, written_whole
from model import build


def model_file(path, name="atrous", classes="abcd", **changes):
    net = build(name, len(classes))
    content = {"net": name, "state_dict": net.state_dict(), "classes": list(classes)}
    content |= {"mean": [0.0] * 3, "std": [1.0] * 3} | changes
    checkpoint.save(path, {key: value for key, value in content.items() if value is not None})
    return net.eval()


def config_file(folder, train_images, holdout, **changes):
    dataset = data.load("synthetic", None, torch.device("cpu"), train_images, holdout)
    flags = {"data": "synthetic", "data_dir": "there"}
    flags |= {"train_images": train_images, "holdout": holdout}
    config = {"data": "synthetic", "images": dataset.checksum, "flags": flags} | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_net_comes_back_as_it_was(tmp_path):
    net = model_file(tmp_path / "model.pt")
    loaded, content = checkpoint.load_net(tmp_path / "model.pt")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), net(images))
    assert not loaded.training
    assert content["classes"] == list("abcd")
    with pytest.raises(UserError, match=r"other\.pt does not exist$"):  # but model.pt does
        checkpoint.load_net(tmp_path / "other.pt")


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path):
    def half_written(path):
        with written_whole(path) as file:
            file.write(b"half")
            file.flush()
            raise ZeroDivisionError

    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})
    with pytest.raises(ZeroDivisionError):
        half_written(path)
    assert checkpoint.load(path)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match=r"^encoder error -2$"), written_whole(path):
        raise OSError("encoder error -2")  # as Pillow says it, without a number


def test_a_file_takes_its_name_only_once_it_is_on_the_disk(tmp_path, monkeypatch):
    path, seen = tmp_path / "last.pt", []
    monkeypatch.setattr(os, "fsync", lambda file: seen.append((os.stat(file), path.exists())))
    with written_whole(path) as file:
        file.write(b"whole")
    assert [(stat.st_size, there) for stat, there in seen] == [(5, False)]


def test_the_previous_file_stays_until_the_new_one_takes_its_name(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", Mock(side_effect=PermissionError))
        with pytest.raises(PermissionError):
            checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path)["epoch"] == 1


def test_a_data_set_that_is_another_by_now(tmp_path, monkeypatch):
    config_file(tmp_path, 50, 20, images="70 images (CRC 00000000)")
    with pytest.raises(UserError, match="images or classes of synthetic have changed"):
        checkpoint.load_data(tmp_path)
    config_file(tmp_path, 50, 20)
    assert len(checkpoint.load_data(tmp_path).test_labels) == 20
    config_file(tmp_path, 50, 20, data="cifar10")
    with pytest.raises(UserError, match="--data synthetic now means synthetic, not cifar10"):
        checkpoint.load_data(tmp_path)
    config_file(tmp_path, 50, 20, flags={"data": "synthetic", "data_dir": 5})
    with pytest.raises(UserError, match=r"config\.json is damaged: "):
        checkpoint.load_data(tmp_path)
    config_file(tmp_path, 50, 20)
    monkeypatch.setattr(data, "load", asked := Mock(side_effect=UserError("no")))
    with pytest.raises(UserError, match=f"^no; if its images moved: .* --resume {tmp_path} --data"):
        checkpoint.load_data(tmp_path)
    assert asked.call_args.args[:2] == ("synthetic", Path("there"))


def test_a_folder_of_several_runs_names_one(tmp_path):
    for name in ("s3", "sgd"):
        (tmp_path / name).mkdir()
    with pytest.raises(
        UserError, match=f"does not exist; give one of --repeat's runs, such as {tmp_path}/s3"
    ):
        checkpoint.load_net(tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"give one of --repeat's runs, such as {tmp_path}/s3"):
        checkpoint.load_history(tmp_path)


def test_a_file_for_a_run_names_its_folder(tmp_path):
    model_file(tmp_path / "model.pt")
    for load in (lambda run: checkpoint.load_net(run / "model.pt"), checkpoint.load_config):
        with pytest.raises(
            UserError, match=f"model.pt is a file; give its run folder instead: {tmp_path}$"
        ):
            load(tmp_path / "model.pt")


def test_a_run_that_has_not_ended_is_to_go_on(tmp_path):
    with pytest.raises(UserError, match=r"model\.pt does not exist$"):
        checkpoint.load_net(tmp_path / "model.pt")
    (tmp_path / "config.json").write_text("{}")
    for load in (checkpoint.load_predictions, lambda run: checkpoint.load_net(run / "model.pt")):
        with pytest.raises(
            UserError, match=f"not finished: train.py --resume {tmp_path} continues"
        ):
            load(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"predictions\.npy does not exist$"):
        checkpoint.load_predictions(tmp_path)


WITHOUT_ITS_LAST = dict([*build("atrous", 4).state_dict().items()][:-1])
BAD = {
    "not ours": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "a format of another's": lambda path: torch.save({"format": "pt"}, path),
    "no dict": lambda path: torch.save(torch.zeros(3), path),
    "another net": lambda path: model_file(path, net="resnet"),
    "other classes": lambda path: model_file(path, state_dict=build("atrous", 5).state_dict()),
    "a layer too few": lambda path: model_file(path, state_dict=WITHOUT_ITS_LAST),
    "numbered classes": lambda path: model_file(path, classes=range(4)),
    "no classes": lambda path: model_file(path, classes=[]),
    "a terminal's commands": lambda path: model_file(path, classes=["\x1b[2J", "b"]),
    "no deviation": lambda path: model_file(path, std=[0.0] * 3),
    "two channels": lambda path: model_file(path, mean=[0.0] * 2, std=[1.0] * 2),
    "a text for a mean": lambda path: model_file(path, mean="abc"),
    "an infinite mean": lambda path: model_file(path, mean=[0.0, 0.0, float("inf")]),
    "no mean": lambda path: model_file(path, mean=None),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_bad_files_are_one_line(tmp_path, spoil):
    path = tmp_path / "model.pt"
    spoil(path)
    with pytest.raises(UserError, match=r"model\.pt") as error:
        checkpoint.load_net(path)
    assert "\n" not in str(error.value)


def test_predictions_run_no_code(tmp_path, capsys):
    np.save(tmp_path / "predictions.npy", np.array([Hostile()], dtype=object))
    with pytest.raises(UserError, match=r"predictions\.npy is damaged: "):
        checkpoint.load_predictions(tmp_path)
    assert not capsys.readouterr().out


def test_what_is_damaged_and_can_be_made_anew(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is damaged: 'flags'$"):  # this cannot
        checkpoint.load_config(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    way = f"delete {tmp_path}/summary.json, then train.py --resume {tmp_path} continues"
    with pytest.raises(UserError, match=f"is damaged: command is missing; {way}"):
        checkpoint.load_summary(tmp_path)


def test_a_finished_seed_that_lacks_a_figure(finished, tmp_path, capsys):
    """The mean over --repeat's seeds needs it."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    whole = json.loads((folder / "summary.json").read_text())
    numbers = "final_accuracy best_accuracy flip_accuracy training_seconds total_seconds"
    for name in (*numbers.split(), "images", "tested_on", "versions", "seed", "parameters"):
        rest = {key: value for key, value in whole.items() if key != name}
        (folder / "summary.json").write_text(json.dumps(rest))
        assert train.main(["--resume", str(folder)]) == 2
        said = capsys.readouterr().err
        assert f"is damaged: {name} is " in said
        assert f"delete {folder}/summary.json" in said


@pytest.mark.parametrize("kind", ["U8", "complex64", ">f4", "nan", "inf"])
def test_predictions_that_are_no_numbers_of_ours(kind, finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    logits = np.load(folder / "predictions.npy")
    numbers = kind in ("nan", "inf")
    logits = logits * np.float32(kind) if numbers else logits.astype(kind)
    np.save(folder / "predictions.npy", logits)
    assert plots.main([str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}/predictions.npy is damaged: ")


@pytest.mark.parametrize(("ahead", "other"), [(1, "a newer"), (-1, "an older")])
def test_another_format_is_said_to_be_newer_or_older(tmp_path, monkeypatch, ahead, other):
    path = tmp_path / "model.pt"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + ahead)
        model_file(path)
    with pytest.raises(UserError, match=f"from {other} version of atrous: use that one"):
        checkpoint.load_net(path)


def test_a_file_without_permission_is_not_called_damaged(tmp_path, monkeypatch):
    denied = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(checkpoint, "check_sums", denied)
    monkeypatch.setattr(Path, "open", denied)
    for load, name in ((checkpoint.load, "last.pt"), (checkpoint.load_history, "")):
        with pytest.raises(PermissionError):  # which every command says as it is
            load(tmp_path / name)
