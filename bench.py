"""What is measured, against what, on which device.

    python bench.py nets --epochs 40 [--data …] [--repeat N] [--own-recipes]

Each prints a table and writes it, with device, versions and data set, to `results/`.
"""

import json
import re
import shlex
import statistics
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import flags
import model
import report
import train
import zoo
from common import Parser, exit_status
from machine import DEVICES


def bench_nets(args: Namespace, argv: list[str]) -> None:
    """Train every net in turn, under train.py's defaults or each under its own recipe.

    The runs lie in DIR/<net>/s<seed>; one that is there already is gone on with, not repeated.
    """
    rows = []
    for net in model.NETS:
        folders = [Path(args.out) / net / f"s{seed}" for seed in range(args.repeat)]
        for seed, folder in enumerate(folders):
            train_one(net, seed, folder, args)
        rows.append(row_of(folders))
    name = "nets-own-recipes" if args.own_recipes else "nets"
    recipe = "each net's own recipe" if args.own_recipes else "one recipe, train.py's defaults"
    first = rows[0]["runs"][0]
    seeds = f"{args.repeat} seeds" if args.repeat > 1 else "one seed"
    title = f"{args.epochs} epochs on {first['data']}, {seeds}, {recipe}"
    print(f"\n{title}; {first['device']}, {first['precision']}\n{format_nets(rows)}")
    command = shlex.join(["python", "bench.py", *argv])
    write(name, first["device"], {"title": title, "command": command, "nets": rows})


def train_one(net: str, seed: int, folder: Path, args: Namespace) -> None:
    argv = ["--net", net, "--seed", str(seed), "--epochs", str(args.epochs), "--data", args.data]
    argv += ["--device", args.device, "--out", str(folder)]
    if args.own_recipes and net in zoo.RECIPES:
        argv += ["--recipe", net]
    if (folder / "config.json").exists():
        argv += ["--resume", str(folder)]
    print(f"\n{net}, seed {seed}", flush=True)
    train.run_all(flags.parse_flags(argv), argv)


def row_of(folders: list[Path]) -> dict[str, Any]:
    """One net's runs as a row; accuracies are fractions, sd None for one seed."""
    runs = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    seconds = [
        json.loads(line)["seconds"]
        for folder in folders
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    row = {key: runs[0][key] for key in ("net", "parameters", "multiply_adds", "receptive_field")}
    for key in ("final_accuracy", "best_accuracy"):
        values = [run[key] for run in runs]
        sd = statistics.stdev(values) if len(values) > 1 else None
        row[key] = {"mean": statistics.fmean(values), "sd": sd}
    return row | {"median_epoch_seconds": statistics.median(seconds), "runs": runs}


def format_nets(rows: list[dict[str, Any]]) -> str:
    def percent(accuracy: dict[str, float | None]) -> str:
        spread = "" if accuracy["sd"] is None else f" ± {accuracy['sd']:.2%}"
        return f"{accuracy['mean']:.2%}{spread}"

    lines = [
        f"{'net':<8} {'parameters':>10} {'multiply-adds':>13} {'field':>5} "
        f"{'final accuracy':>15} {'best':>15} {'s/epoch':>7}"
    ]
    lines += [
        f"{row['net']:<8} {row['parameters']:10,d} {row['multiply_adds'] / 1e6:11.1f} M "
        f"{row['receptive_field']:5d} {percent(row['final_accuracy']):>15} "
        f"{percent(row['best_accuracy']):>15} {row['median_epoch_seconds']:7.2f}"
        for row in rows
    ]
    return "\n".join(lines)


def write(name: str, device: str, figures: dict[str, Any]) -> None:
    """As results/<name>-<device>.json."""
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    report.write_json(path, figures)
    print(f"written to {path}")


def main(argv: list[str]) -> int:
    """The exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""

    def job() -> None:
        parser = Parser(prog="bench.py", description=__doc__.partition("\n")[0])
        nets = parser.add_subparsers(required=True, metavar="WHAT").add_parser(
            "nets", help="train the default net and the published ones in turn"
        )
        count = flags.number(int, 1)
        nets.add_argument("--epochs", type=count, default=40)
        nets.add_argument("--repeat", type=count, default=1, help="so many seeds each")
        nets.add_argument("--data", default="auto", help="as for train.py")
        nets.add_argument("--device", choices=DEVICES, default="auto")
        nets.add_argument("--own-recipes", action="store_true", help="each net's, not train.py's")
        nets.add_argument("--out", metavar="DIR", default="runs/nets", help="where the runs lie")
        bench_nets(parser.parse_args(argv), argv)

    return exit_status(job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
