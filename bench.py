"""Measure speed on a device, or train and compare nets, recipes and run lengths.

    python bench.py epoch | layers | kernels | startup | augment | all [--data …]
    python bench.py nets | recipes | ingredients | lengths [--epochs …] [--repeat N]

Each prints a table and writes it, with device, versions and data set, to `results/`; `all` runs
everything in the first line.
"""

import argparse
import os
import re
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import checkpoint
import data
import graph
import measure
import model
import report
import trials
import ways
from common import Parser, UserError, first_line, number, require, with_exit_status
from machine import (
    DEVICES,
    DTYPES,
    choose_device,
    choose_precision,
    device_name,
    keep_freed_memory,
    versions,
)

EPOCH = 50_000  # images
CORES = len(os.sched_getaffinity(0))
RESULTS = Path(__file__).parent / "results"


def bench_epoch(args: Namespace) -> None:
    """Time an epoch and its phases at several batch sizes, beside the epoch's floor; then the same
    epoch in other ways, including per-image transforms in a DataLoader."""
    device = choose_device(args.device)
    usual = [256, 512, 1024] if device.type == "cuda" else [128, 256, 512]
    sizes = sorted(args.batch_size or usual)  # smallest first: on a CPU, a process keeps its memory
    dataset, layers, precision = prepared(args, max(ways.BATCH, *sizes))
    ceilings = measure.measure_ceilings(device, DTYPES[precision])
    rows = []
    for batch in sizes:
        row = epoch_row(dataset, ways.settings(args.net, batch, precision))
        floor = measure.floor_seconds(layers, batch, DTYPES[precision], ceilings)
        rows.append(row | {"floor_seconds": EPOCH / batch * floor})
    title = f"seconds for 50,000 images, {args.net} on {dataset.name}, {precision}"
    print(f"\n{title}; {device_name(device)}\n{format_rows(rows)}\n", flush=True)
    figures = {"title": title, "data": dataset.name, "ceilings": vars(ceilings)}
    figures |= {"batch_sizes": rows}
    keep = partial(write, f"epoch-{args.net}", device_name(device), args.command)
    keep(figures)  # should one of the ways fail
    figures["ways_epoch_seconds"] = epoch_ways(dataset, args.net, precision)
    print(format_ways(figures["ways_epoch_seconds"]))
    keep(figures)


def bench_layers(args: Namespace) -> None:
    """Time each layer's forward and backward beside its floor: where an epoch's time goes."""
    batch, (dataset, layers, precision) = ways.BATCH, prepared(args, ways.BATCH)
    layers = [layer for layer in layers if not layer.kind.endswith("pool2d")]  # not functions
    device, dtype = dataset.device, DTYPES[precision]
    ceilings = measure.measure_ceilings(device, dtype)
    settings = ways.settings(args.net, batch, precision)
    phases = ways.layers(dataset, settings, [layer.name for layer in layers])
    seconds = measure.phase_seconds(phases, device, steps_to_time(device))
    rows = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "groups": layer.groups,
            "output": layer.output,
            "forward_seconds": batch * seconds[f"{layer.name} forward"],
            "backward_seconds": batch * seconds[f"{layer.name} backward"],
            "floor_seconds": measure.layer_floor_seconds(layer, batch, dtype, ceilings),
        }
        for layer in layers
    ]
    title = f"ms per layer, batches of {batch}, {args.net} on {dataset.name}, {precision}"
    print(f"\n{title}; {device_name(device)}\n{format_layers(rows)}")
    figures = {"title": title, "data": dataset.name, "ceilings": vars(ceilings), "layers": rows}
    write(f"layers-{args.net}", device_name(device), args.command, figures)


def format_layers(rows: list[dict[str, Any]]) -> str:
    """In milliseconds; the last column is forward plus backward, relative to their floor."""
    width = max(len(row["name"]) for row in rows)
    lines = [
        f"{'layer':<{width}} {'kind':<11} {'output':>9} {'groups':>6} "
        f"{'forward':>8} {'backward':>8} {'floor':>8}  × floor"
    ]
    for row in rows:
        *taken, floor = (1000 * row[f"{part}_seconds"] for part in ("forward", "backward", "floor"))
        ratio = f"{sum(taken) / floor:6.1f} ×" if floor else ""
        lines.append(
            f"{row['name']:<{width}} {row['kind']:<11} {'×'.join(map(str, row['output'])):>9} "
            f"{row['groups']:6d} {taken[0]:8.3f} {taken[1]:8.3f} {floor:8.3f} {ratio}"
        )
    return "\n".join(lines)


def bench_kernels(args: Namespace) -> None:
    """What one training step is made of: a GPU's kernels, or PyTorch's operations on a CPU. For the
    rest of the time that a step takes, a GPU is idle."""
    batch, (dataset, _, precision) = ways.BATCH, prepared(args, ways.BATCH)
    device = dataset.device
    way = ways.training(dataset, ways.settings(args.net, batch, precision))
    count = steps_to_time(device)
    seconds = 1 / measure.rates({"ours": way}, device, warm_up=2, count=count)["ours"]
    rows = measure.kernels(partial(next, way()), device, rounds=16)
    title = f"kernels of one step, batch of {batch}, {args.net} on {dataset.name}, {precision}"
    print(f"\n{title}; {device_name(device)}\n       µs  count")
    for row in rows[:40]:
        print(f"{1e6 * row['seconds']:9.1f} {row['count']:6.1f}  {row['name'][:62]}")
    total = sum(row["seconds"] for row in rows)
    print(f"{1e6 * total:9.1f}         in total; a step takes {1e6 * seconds:.1f} µs")
    figures = {"title": title, "data": dataset.name, "step_seconds": seconds, "kernels": rows}
    write(f"kernels-{args.net}", device_name(device), args.command, figures)


def prepared(args: Namespace, batch: int) -> tuple[data.Dataset, list[graph.Layer], str]:
    """Data for batches of size `batch`, the net's layers, and the precision it is trained in."""
    dataset = load(args.data, choose_device(args.device), batch)
    layers = graph.trace(model.build(args.net, len(dataset.classes))).layers
    return dataset, layers, choose_precision("auto", dataset.device)


def load(source: str, device: torch.device, batch: int) -> data.Dataset:
    dataset = data.load(source, Path("data"), device)
    if batch > len(dataset.train_images):
        raise UserError(f"--data {source}: fewer training images than a batch of {batch}")
    return dataset


def steps_to_time(device: torch.device) -> int:
    """How many steps to time; a CPU's take long."""
    return 100 if device.type == "cuda" else 6


def epoch_row(dataset: data.Dataset, settings: Namespace) -> dict[str, Any]:
    """The time of an epoch and of its phases; on a GPU the rest of the epoch is spent waiting."""
    device, batch = dataset.device, settings.batch_size
    steps = steps_to_time(device)
    measure.reset_peak_memory(device)
    way = {"ours": ways.training(dataset, settings)}
    rate = measure.rates(way, device, warm_up=2, count=steps)["ours"]
    memory = measure.peak_memory(device)
    phases = measure.phase_seconds(ways.phases(dataset, settings), device, 2 * steps)
    return {
        "batch_size": batch,
        "epoch_seconds": EPOCH / batch / rate,
        "phases_seconds": {name: EPOCH * each for name, each in phases.items()},
        "peak_memory_bytes": memory,
    }


def epoch_ways(dataset: data.Dataset, net: str, precision: str) -> dict[str, float]:
    """Seconds of an epoch in each way, in batches of `ways.BATCH`; a loader's start, before its
    first batches, is usually not counted."""
    device = dataset.device
    flags_of: dict[str, list[str]] = {"ours": []}
    if device.type == "cuda":
        for flag in ("--eager", "--compile", "--deterministic"):
            flags_of[f"ours, {flag}"] = [flag]
    for workers in sorted({2, CORES}):
        reference = ["--augment", "albumentations", "--workers", str(workers)]
        flags_of[f"albumentations, {workers} workers"] = reference
    every = {}
    for name, given in flags_of.items():
        settings = ways.settings(net, ways.BATCH, precision, *given)
        try:
            every[name] = ways.training(dataset, settings)
        except RuntimeError as error:
            if not settings.compile:
                raise
            print(f"{name}: left out: {first_line(error)}", file=sys.stderr)  # no compiler, say
    settings = ways.settings(net, ways.BATCH, precision)
    every["ours, sharpness-aware"] = ways.training(dataset, settings, settings.sam)
    for plain in dict.fromkeys((precision, "fp32")):
        settings = ways.settings(net, ways.BATCH, plain)
        every[f"plain loop, {plain}"] = ways.plain_loop(dataset, settings)
    rates = measure.rates(every, device, warm_up=2 * CORES + 2, count=steps_to_time(device))
    return {name: EPOCH / ways.BATCH / rate for name, rate in rates.items()}


def format_rows(rows: list[dict[str, Any]]) -> str:
    """In seconds an epoch, and relative to the floor."""
    names = ["epoch", *rows[0]["phases_seconds"], "floor"]
    lines = ["batch " + " ".join(f"{name:>7}" for name in names) + " × floor    memory"]
    for row in rows:
        epoch, phases, floor = (row[f"{n}_seconds"] for n in ("epoch", "phases", "floor"))
        columns = zip(names, [epoch, *phases.values(), floor], strict=True)
        figures = " ".join(f"{each:{max(len(name), 7)}.3f}" for name, each in columns)
        lines.append(
            f"{row['batch_size']:5d} {figures} {epoch / floor:5.1f} × "
            f"{row['peak_memory_bytes'] / 2**20:5,.0f} MiB"
        )
    return "\n".join(lines)


def format_ways(seconds: dict[str, float]) -> str:
    """Seconds of an epoch in each way, and multiples of the first way's."""
    first = next(iter(seconds.values()))
    width = max(map(len, seconds))
    return "\n".join(
        f"{name:<{width}} {each:8.2f} s {each / first:6.2f} ×" for name, each in seconds.items()
    )


def bench_augment(args: Namespace) -> None:
    """Measure images augmented a second: uint8 in, normalised batches of `ways.BATCH` out."""
    require("kornia")
    device = choose_device(args.device)
    dataset = load(args.data, device, ways.BATCH)
    count = 180 if device.type == "cuda" else 80
    every = ways.augmentations(dataset, CORES)
    rates = measure.rates(every, device, warm_up=2 * CORES + 2, count=count)
    rates = {name: rate * ways.BATCH for name, rate in rates.items()}
    title = f"images augmented per second, {dataset.name}, batches of {ways.BATCH}"
    width, first = max(map(len, rates)), next(iter(rates.values()))
    print(f"\n{title}; {device_name(device)}")
    for name, rate in rates.items():
        print(f"{name:<{width}} {rate:12,.0f} images/s {first / rate:6.1f} × our time")
    figures = {"title": title, "data": dataset.name, "images_per_second": rates}
    write("augment", device_name(device), args.command, figures)


def bench_startup(args: Namespace) -> None:
    """Seconds from a process's start to its first step and to its end, pictures included: cold,
    with no images decoded and no kernels compiled before, then warm."""
    device = choose_device(args.device)
    epochs = args.epochs or (40 if device.type == "cuda" else 1)
    command = ["--data", args.data, "--net", args.net, "--device", args.device]
    command += ["--epochs", str(epochs)]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            out = Path(folder) / cache
            rows[cache] = measure.whole_run([*command, "--out", str(out)], cache_home=folder)
            summary = checkpoint.load_summary(out)
            rows[cache]["epochs_seconds"] = summary["training_seconds"]
    title = f"a run of {epochs} epochs, {args.net} on {summary['data']}"
    print(f"\n{title}; {summary['device']}")
    print(f"cache first step      epochs       total {'host memory':>12}")
    for cache, row in rows.items():
        parts = ("first_step", "epochs", "total")
        figures = " ".join(f"{row[f'{part}_seconds']:9.2f} s" for part in parts)
        print(f"{cache:<4} {figures} {row['peak_memory_bytes'] / 2**20:8,.0f} MiB")
    figures = {"title": title, "data": summary["data"], "epochs": epochs, "cache": rows}
    write(f"startup-{args.net}", summary["device"], args.command, figures)


def bench_trainings(args: Namespace) -> None:
    """Train each variant in turn; report their accuracies and seconds, and draw both."""
    import plots

    rows, histories = trials.train_all(args.variants(args), args)
    first, name = rows[0]["runs"][0], args.variants.__name__
    seeds = f"{args.repeat} seeds" if args.repeat > 1 else "one seed"
    title = f"{name} on {first['data']}, {seeds}"
    print(f"\n{title}; {first['device']}, {first['precision']}\n{trials.table(rows)}")
    figures = {"title": title, "data": first["data"], name: rows}
    path = write(name, first["device"], args.command, figures)
    plots.comparison(path.with_suffix(".png"), histories)


def write(name: str, device: str, command: str, figures: dict[str, Any]) -> Path:
    """Write results/<name>-<device>.json, its name without that of the default net."""
    RESULTS.mkdir(exist_ok=True)
    name = name.removesuffix("-atrous")
    path = RESULTS / f"{name}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    facts = {"command": command, "device": device, "versions": versions()}
    report.write_json(path, facts | figures)
    print(f"written to {path}")
    return path


def bench_all(args: Namespace) -> None:
    require("kornia")  # rather than after all else has been measured
    for job in (bench_epoch, bench_layers, bench_kernels, bench_startup, bench_augment):
        job(args)


@with_exit_status
def main(argv: list[str]) -> None:
    versions()  # as they are now: cached
    parser = Parser(description=__doc__.partition("\n")[0])
    what = parser.add_subparsers(required=True)
    count = number(int, 1)

    def add(name: str, bench: Callable[[Namespace], None], text: str) -> Parser:
        defaults = argparse.ArgumentDefaultsHelpFormatter
        each = what.add_parser(name, help=text, formatter_class=defaults)
        each.set_defaults(bench=bench)
        each.add_argument("--data", default="auto", help="as for train.py")
        each.add_argument("--device", choices=DEVICES, default="auto", help="as for train.py")
        return each

    epoch = add("epoch", bench_epoch, "time an epoch, its phases and the alternatives")
    layers = add("layers", bench_layers, "time each layer against its floor")
    kernels = add("kernels", bench_kernels, "list a step's kernels by time")
    startup = add("startup", bench_startup, "time from process start to first step and end")
    add("augment", bench_augment, "images augmented per second, by ours and other libraries")
    everything = add("all", bench_all, "all of the above")
    for each in (epoch, layers, kernels, startup, everything):
        each.add_argument("--net", choices=model.NETS, default="atrous", help="as for train.py")
    for each in (epoch, everything):
        each.add_argument("--batch-size", type=count, nargs="+", help="None: three usual ones")
    for each in (startup, everything):
        each.add_argument("--epochs", type=count, help="None: 40 on a GPU, else 1")
    several: dict[str, Any] = {"nargs": "+", "default": [8, 15, 40, 100]}
    for variants, epochs, text in (
        (trials.nets, {"default": 40}, "train the default net and the published ones"),
        (trials.recipes, {"default": 40}, "the same, each with its own recipe"),
        (trials.ingredients, {"default": 40}, "leave out one part of the recipe at a time"),
        (trials.lengths, several, "train for each number of --epochs"),
    ):
        name = variants.__name__
        each = add(name, bench_trainings, text)
        each.set_defaults(variants=variants)
        each.add_argument("--epochs", type=count, help="length of each run", **epochs)
        each.add_argument("--repeat", type=count, default=1, help="seeds for each")
        each.add_argument(
            "--out", metavar="DIR", default=f"runs/{name}", help="folder for the runs"
        )
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "bench.py", *argv])
    keep_freed_memory()
    args.bench(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
