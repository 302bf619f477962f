"""Whole trainings compared: the nets, the recipe less one ingredient, other lengths."""

import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

import checkpoint
import flags
import model
import train
import zoo
from common import Terminated, UserError

History = list[dict[str, Any]]  # of a run: its epochs
INGREDIENTS = {  # the flags that leave each out of train.py's recipe
    "the default": [],
    "no flip": ["--flip-p", "0"],
    "no affine": ["--affine-p", "0"],
    "no cutout": ["--cutout-p", "0"],
    "no weight decay": ["--weight-decay", "0"],
    "no OneCycle": ["--schedule", "step"],
    "no Muon": ["--optimizer", "sgd"],
    "no SAM": ["--sam", "0"],
}


# What is compared: each variant's name, and its flags for train.py


def nets(args: Namespace) -> dict[str, list[str]]:
    """The default net and the published ones, under train.py's recipe."""
    return {net: ["--epochs", str(args.epochs), "--net", net] for net in model.NETS}


def recipes(args: Namespace) -> dict[str, list[str]]:
    """The same, each published net under its own recipe."""
    own = {net: ["--recipe", net] for net in zoo.RECIPES}
    return {net: [*given, *own.get(net, [])] for net, given in nets(args).items()}


def ingredients(args: Namespace) -> dict[str, list[str]]:
    """The default net under train.py's recipe, and with each ingredient left out in turn."""
    return {name: ["--epochs", str(args.epochs), *less] for name, less in INGREDIENTS.items()}


def lengths(args: Namespace) -> dict[str, list[str]]:
    """The default net, trained for each number of epochs."""
    return {f"{epochs} epochs": ["--epochs", str(epochs)] for epochs in args.epochs}


def train_all(
    variants: dict[str, list[str]], args: Namespace
) -> tuple[list[dict[str, Any]], dict[str, list[History]]]:
    """Train each variant with `--repeat` seeds. Returns a row for each, and its seeds' histories.

    The runs lie in DIR/<variant>/s<seed>; one that exists already is resumed, not repeated.
    """
    rows, histories = [], {}
    for name, given in variants.items():
        base = Path(args.out, name.replace(" ", "-"))
        folders = [base / f"s{seed}" for seed in range(args.repeat)]
        for seed, folder in enumerate(folders):
            print(f"\n{name}, seed {seed}", flush=True)
            train_one([*given, "--seed", str(seed)], folder, args)
        histories[name] = [*map(checkpoint.load_history, folders)]
        rows.append({"name": name} | row_of(folders, histories[name]))
    return rows, histories


def train_one(given: list[str], folder: Path, args: Namespace) -> None:
    argv, where = ["--data", args.data, "--device", args.device, *given], "--out"
    if (folder / "config.json").exists():
        refuse_another(folder, flags.parse_flags(argv))
        where = "--resume"
    try:
        train.run_all([*argv, where, str(folder)])
    except (KeyboardInterrupt, Terminated) as ended:
        raise type(ended)("the same command continues after the last finished epoch") from ended


def refuse_another(folder: Path, wanted: Namespace) -> None:
    """Raise UserError if the run in a folder has flags other than those wanted."""
    has = checkpoint.load_config(folder)["flags"]
    for name, value in flags.identity(wanted).items():
        if name != "precision" and has.get(name) != value:  # a run records the one chosen
            raise UserError(
                f"{folder} holds a run with {flags.option(name)} {has.get(name)}: "
                "remove it or choose another --out"
            )


def row_of(folders: list[Path], histories: list[History]) -> dict[str, Any]:
    """One variant's runs as a row; accuracies are fractions, sd None for one seed."""
    runs = [checkpoint.load_summary(folder) for folder in folders]
    seconds = [line["seconds"] for history in histories for line in history]
    shared = ("net", "parameters", "multiply_adds", "receptive_field", "epochs")
    row = {key: runs[0][key] for key in shared}
    for key in ("final_accuracy", "flip_accuracy", "best_accuracy", "training_seconds"):
        values = [run[key] for run in runs]
        sd = statistics.stdev(values) if len(values) > 1 else None
        row[key] = {"mean": statistics.fmean(values), "sd": sd}
    return row | {"median_epoch_seconds": statistics.median(seconds), "runs": runs}


def table(rows: list[dict[str, Any]]) -> str:
    def percent(accuracy: dict[str, float | None]) -> str:
        spread = "" if accuracy["sd"] is None else f" ± {accuracy['sd']:.2%}"
        return f"{accuracy['mean']:.2%}{spread}"

    width = max(len(row["name"]) for row in rows)
    lines = [
        f"{'':<{width}} {'weights':>7} {'epochs':>6} {'final accuracy':>15} "
        f"{'flip-averaged':>15} {'s/epoch':>7} {'train s':>8}"
    ]
    lines += [
        f"{row['name']:<{width}} {row['parameters']:7,d} {row['epochs']:6d} "
        f"{percent(row['final_accuracy']):>15} {percent(row['flip_accuracy']):>15} "
        f"{row['median_epoch_seconds']:7.2f} {row['training_seconds']['mean']:8,.1f}"
        for row in rows
    ]
    return "\n".join(lines)
