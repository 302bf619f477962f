"""Checkpoints and nets, saved whole or not at all; a run's files, loaded without running any code
that they hold."""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from torch import nn

import data
from common import UserError, check_sums, first_line, going_on, written_whole
from model import build

T = TypeVar("T")
SUMMARY = {"data", "images", "tested_on", "net", "parameters", "multiply_adds", "receptive_field"}
SUMMARY |= {"device", "precision", "command", "versions", "seed", "epochs"}  # of a summary.json
FORMAT = 3  # of last.pt and model.pt; raise when keys change, nets' included


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, a dict of tensors, strings, numbers, lists and dicts, with FORMAT."""
    with written_whole(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU. Raises UserError if the file is no such checkpoint."""
    try:
        check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(path) from error
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(
            f"{path} is not a valid atrous checkpoint: {first_line(error)}; "
            "if it is a run's own, train that again in another --out"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise UserError(f"{path} is not an atrous checkpoint")
    if content["format"] != FORMAT:
        other = "a newer" if content["format"] > FORMAT else "an older"
        raise UserError(
            f"{path} has format {content['format']}, from {other} version of atrous: use that one"
        )
    return content


def load_net(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The trained net of a `model.pt`, in evaluation mode, and the file's content.

    Raises UserError if the file is not one.
    """
    content = load(path)
    try:
        names, statistics = content["classes"], torch.tensor([content["mean"], content["std"]])
        if statistics.shape != (2, 3) or not statistics.isfinite().all():
            raise ValueError("mean and std must be three numbers each")
        if not (statistics[1] > 0).all():
            raise ValueError("std must be above 0")
        if not names or not all(isinstance(name, str) and name.isprintable() for name in names):
            raise TypeError("classes must be printable names")
        net = build(content["net"], len(names), content.get("dropout", 0.0))
        net.load_state_dict(content["state_dict"])
    except (UserError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be loaded by this version of atrous: {first_line(error)}; "
            "use the version that wrote it"
        ) from error
    return net.eval(), content


def load_config(run: Path) -> dict[str, Any]:
    """The config of the run in a folder: its `flags` and facts. Raises UserError if it is missing
    or damaged."""

    def parse(file: BinaryIO) -> dict[str, Any]:
        config = dict(json.load(file))
        return config | {"flags": dict(config["flags"])}

    return _read(run / "config.json", parse)


def load_data(run: Path) -> data.Dataset:
    """The data set of the run in a folder, on the CPU. Raises UserError as `load_config` and
    `data.load` do, and if `--data` now means other images, as `auto` does when offline, say."""
    config = load_config(run)
    moved = f"if its images moved: python train.py --resume {shlex.quote(run.as_posix())} --data …"
    try:
        name, images, flags = config["data"], config["images"], config["flags"]
        source, folder, cpu = flags["data"], Path(flags["data_dir"]), torch.device("cpu")
        dataset = data.load(source, folder, cpu, flags["train_images"], flags["holdout"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{run / 'config.json'} is damaged: {error}") from error
    except UserError as error:
        raise UserError(f"{error}; {moved}") from error
    if dataset.name != name:
        raise UserError(f"{run}: --data {source} now means {dataset.name}, not {name}; {moved}")
    if images != dataset.checksum:
        raise UserError(f"{run}: the images or classes of {name} have changed; {moved}")
    return dataset


def load_summary(run: Path) -> dict[str, Any]:
    """The summary of the run in a folder. Raises UserError if it is missing or damaged."""

    def parse(file: BinaryIO) -> dict[str, Any]:
        summary = dict(json.load(file))
        if missing := SUMMARY - summary.keys():
            raise ValueError(f"{min(missing)} is missing")
        _check_numbers(summary, "final_accuracy", "best_accuracy", "flip_accuracy")
        _check_numbers(summary, "training_seconds", "total_seconds")
        return summary

    return _read(run / "summary.json", parse)


def load_history(run: Path) -> list[dict[str, Any]]:
    """The epochs of the run in a folder. Raises UserError if they are missing or damaged."""

    def parse(file: BinaryIO) -> list[dict[str, Any]]:
        history = [dict(json.loads(line)) for line in file]
        for line in history:
            _check_numbers(line, "epoch", "lr", "train_loss", "train_accuracy", "test_loss")
            _check_numbers(line, "test_accuracy", "seconds")
        if not history:
            raise ValueError("it is empty")
        return history

    return _read(run / "metrics.jsonl", parse)


def load_predictions(run: Path) -> np.ndarray:
    """The test logits float32 (N, classes) of the run in a folder. Raises UserError if they are
    missing or damaged."""

    def parse(file: BinaryIO) -> np.ndarray:
        logits = np.lib.format.read_array(file)
        if logits.dtype != np.float32 or not (logits < np.inf).all():
            raise ValueError("it must hold numbers, float32")
        return logits

    return _read(run / "predictions.npy", parse)


def runs_in(folder: Path) -> list[Path]:
    """A run's own folder, or the folders of --repeat's runs in it, in the order of their seeds."""
    seeds = [run for run in folder.glob("s*") if run.name[1:].isdecimal()]
    return sorted(seeds, key=lambda run: int(run.name[1:])) or [folder]


def _check_numbers(values: dict[str, Any], *names: str) -> None:
    for name in names:
        value = values.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}")


def _read(path: Path, parse: Callable[[BinaryIO], T]) -> T:
    try:
        with path.open("rb") as file:
            return parse(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(path) from error
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        run, way = path.parent, ""
        if path.name != "config.json":
            rest = going_on(run, "and writes it anew")
            way = f"; delete {run / 'summary.json'}, then train.py {rest}"
        raise UserError(f"{path} is damaged: {first_line(error)}{way}") from error


def _missing(path: Path) -> UserError:
    """The error for a missing file: the run may not have ended, or its folder hold several runs."""
    run = path.parent
    if run.is_file():
        return UserError(f"{run} is a file; give its run folder instead: {run.parent}")
    if (seed := runs_in(run)[0]) != run:
        return UserError(f"{path} does not exist; give one of --repeat's runs, such as {seed}")
    if (run / "config.json").exists() and not (run / "summary.json").exists():
        way = going_on(run, "it")
        return UserError(f"{path} does not exist because the run has not finished: train.py {way}")
    if path.suffix != ".pt" and (run / "model.pt").exists() and not (run / "config.json").exists():
        return UserError(f"{run} holds only a net, for predict.py; this needs a whole run's folder")
    return UserError(f"{path} does not exist")
