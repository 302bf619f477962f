"""The main job: flags → device → data → net → epochs → results.

    python train.py --epochs 40

Nothing but the net's own arithmetic should cost time: the data set lies on the device, batches are
indexed and augmented there, and the host reads figures once an epoch.
"""

import argparse
import importlib.metadata
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, StepLR
from tqdm import tqdm

import checkpoint
import data
import model
import rf
import step
from augment import BORDERS, Policy
from common import UserError, written_whole

HEADER = (
    f"{'epoch':>5} {'lr':>9} {'train loss':>10} {'train acc':>9} "
    f"{'test loss':>9} {'test acc':>8} {'seconds':>8} {'images/s':>9}"
)


# Flags


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Any:
    """An argparse type: an int or float from `low` (excluded if `above`) to `high`, finite."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or (above and value == low) or math.isinf(value):
            bounds = f"above {low}" if above else f"at least {low}"
            limit = "" if high == math.inf else f", at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}{limit}")
        return value

    parse.__name__ = kind.__name__
    return parse


def make_parser() -> Parser:
    parser = Parser(
        prog="train.py",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a CIFAR-10 net of fewer than 200,000 parameters.",
    )
    count, share = number(int, 1), number(float, 0, 1)
    flag = parser.add_argument_group("data").add_argument
    flag("--data", default="auto", help="auto, cifar10, synthetic, or a folder or archive")
    flag("--data-dir", default="data", help="where CIFAR-10 lies or is downloaded to")
    flag("--train-images", type=count, help="train on a class-balanced subset of so many")
    flag("--holdout", type=number(int, 0), default=0, help="test on so many training images")

    flag = parser.add_argument_group("net").add_argument
    flag("--net", default="atrous", help="a net of model.py")
    flag("--dropout", type=number(float, 0, 0.99), default=0.0)

    flag = parser.add_argument_group("training").add_argument
    flag("--epochs", type=count, default=40)
    flag("--batch-size", type=count, default=256)
    flag("--lr", type=number(float, 0, above=True), default=0.4, help="the largest rate")
    flag("--schedule", choices=("onecycle", "cyclic", "step"), default="onecycle")
    flag("--momentum", type=number(float, 0, 0.999), default=0.9, help="Nesterov's")
    flag("--weight-decay", type=number(float, 0), default=5e-4, help="on weights of ≥ 2 dimensions")
    flag("--label-smoothing", type=share, default=0.0)
    flag("--target", type=share, help="report when test accuracy reached this fraction")

    flag = parser.add_argument_group("augmentation").add_argument
    policy = Policy()
    flag("--augment", choices=("device", "albumentations", "none"), default="device")
    flag("--workers", type=number(int, 0), default=2, help="of --augment albumentations")
    flag("--flip-p", type=share, default=policy.flip_p)
    flag("--shift", type=share, default=policy.shift, help="limit, fraction of the width")
    flag("--scale", type=number(float, 0, 0.9), default=policy.scale, help="limit, x and y apart")
    flag("--rotate", type=number(float, 0, 180), default=policy.rotate, help="limit, degrees")
    flag("--affine-p", type=share, default=policy.affine_p)
    flag("--border", choices=BORDERS, default=policy.border)
    flag("--cutout", type=number(int, 0, data.SIZE), default=policy.cutout, help="side, pixels")
    flag("--cutout-p", type=share, default=policy.cutout_p)
    level = number(float, 0, 255)
    flag("--rgb-shift", type=level, nargs=3, default=list(policy.rgb_shift), help="limits, levels")
    flag("--rgb-shift-p", type=share, default=policy.rgb_shift_p)
    flag("--brightness", type=share, default=policy.brightness, help="limit, fraction of 255")
    flag("--contrast", type=share, default=policy.contrast, help="limit of the factor's change")
    flag("--brightness-contrast-p", type=share, default=policy.brightness_contrast_p)

    flag = parser.add_argument_group("run").add_argument
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    flag("--precision", choices=("auto", *step.DTYPES), default="auto")
    flag("--seed", type=number(int, 0, 2**31), default=0)
    flag("--repeat", type=count, default=1, help="so many seeds, in DIR/s0, DIR/s1, …")
    flag("--out", metavar="DIR", help="the run folder (default: runs/<net>-<data>-s<seed>)")
    flag("--resume", metavar="DIR", help="go on with the run in DIR, with its own flags")
    return parser


MAY_CHANGE = {"resume", "out", "data", "data_dir", "device", "workers", "target"}


def parse_flags(argv: list[str]) -> Namespace:
    """The flags; with --resume, the run's own, of which only MAY_CHANGE may be given anew."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume is None:
        return args
    path = Path(args.resume) / "config.json"
    try:
        flags = json.loads(path.read_text())["flags"]
    except FileNotFoundError as error:
        raise UserError(f"--resume {args.resume}: no run there, {path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume {args.resume}: {path} is damaged: {error}") from error
    parser.set_defaults(**flags)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if name not in MAY_CHANGE and value != flags.get(name):
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} {value}: the run in {args.resume} has {flags.get(name)}")
    return args


def policy_of(args: Namespace) -> Policy:
    values = {f.name: getattr(args, f.name) for f in fields(Policy)}
    return Policy(**values | {"rgb_shift": tuple(args.rgb_shift)})


# Device and precision


def choose_device(name: str) -> torch.device:
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: not available here; --device cpu always is")
    return torch.device(name)


def choose_precision(name: str, device: torch.device, layers: list[rf.Layer]) -> str:
    """bf16 on a GPU that has it, else fp16. On a CPU, where bf16 speeds up dense convolutions and
    slows down depthwise ones: bf16 if at least half of the multiply-adds are dense, else fp32. On
    MPS fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "mps":
        return "fp32"
    dense = sum(layer.multiply_adds for layer in layers if layer.groups == 1)
    return "bf16" if 2 * dense >= sum(layer.multiply_adds for layer in layers) else "fp32"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"CPU, {torch.get_num_threads()} threads, {capability}"
    return device.type


def versions() -> dict[str, str | None]:
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    packages = ("torch", "torchvision", "numpy", "Pillow", "albumentations")
    return {
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in packages},
        "commit": commit,
    }


# Training


@dataclass
class Training:
    """What a run changes as it goes, and what a checkpoint holds."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    history: list[dict[str, Any]]
    elapsed: float = 0.0  # seconds of epochs and evaluations
    reached: dict[str, float] | None = None  # epoch and seconds at which --target was

    def state(self) -> dict[str, Any]:
        return {
            name: value.state_dict() if hasattr(value, "state_dict") else value
            for name, value in vars(self).items()
        }

    def load_state(self, state: dict[str, Any]) -> None:
        for name, value in vars(self).items():
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])


def make_training(net: nn.Module, args: Namespace, device: torch.device, steps: int) -> Training:
    """`steps` is the number of optimiser steps in an epoch."""
    net.to(device, memory_format=torch.channels_last)
    weights = [p for p in net.parameters() if p.ndim >= 2]
    others = [p for p in net.parameters() if p.ndim < 2]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": args.weight_decay}, {"params": others}],
        lr=args.lr,
        momentum=args.momentum,
        nesterov=args.momentum > 0,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    return Training(net, optimizer, make_scheduler(optimizer, args, steps), scaler, [])


def make_scheduler(optimizer: torch.optim.Optimizer, args: Namespace, steps: int) -> LRScheduler:
    """Stepped once a batch: `onecycle` rises for a quarter of the run and falls to zero (Smith and
    Topin 2018); `cyclic` is triangles of about eight epochs (Smith 2017); `step` halves the rate
    every six epochs."""
    total = args.epochs * steps
    if args.schedule == "onecycle":
        return OneCycleLR(
            optimizer, args.lr, total_steps=total, pct_start=0.25, cycle_momentum=False
        )
    if args.schedule == "cyclic":
        half = max(1, total // (2 * max(1, args.epochs // 8)))
        return CyclicLR(optimizer, args.lr / 25, args.lr, step_size_up=half, cycle_momentum=False)
    return StepLR(optimizer, step_size=6 * steps, gamma=0.5)


def training_batches(
    dataset: data.Dataset, args: Namespace, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled epoch: augmented, normalised images float32 (B, 3, 32, 32) and labels (B,)."""
    if args.augment == "albumentations":
        import reference

        batches = reference.loader(
            dataset.train_images,
            dataset.train_labels,
            policy_of(args),
            dataset.mean,
            args.batch_size,
            args.workers,
            pin_memory=device.type == "cuda",
        )
        for images, labels in batches:
            images = images.to(device, non_blocking=True)
            yield data.normalize(images, dataset.mean, dataset.std), labels.to(device)
        return
    policy = policy_of(args)
    for index in data.epoch_batches(len(dataset.train_images), args.batch_size, device):
        images, labels = dataset.train_images[index], dataset.train_labels[index]
        if args.augment == "device":
            yield step.augmented(images, policy, dataset.mean, dataset.std), labels
        else:
            yield data.normalize(images, dataset.mean, dataset.std), labels


def train_epoch(
    training: Training, dataset: data.Dataset, args: Namespace, device: torch.device, bar: tqdm
) -> dict[str, float]:
    """One epoch of optimiser steps; its learning rate, loss, accuracy, seconds and images/s."""
    training.net.train()
    start = time.perf_counter()
    rates, losses, right = [], [], []
    for inputs, labels in training_batches(dataset, args, device):
        rates.append(training.scheduler.get_last_lr()[0])
        loss, correct = step.train_step(
            training.net,
            training.optimizer,
            training.scaler,
            inputs,
            labels,
            args.precision,
            args.label_smoothing,
        )
        training.scheduler.step()
        losses.append(loss)
        right.append(correct)
        bar.update()
    losses = torch.stack(losses).tolist()  # the epoch's first wait for the device
    seconds = time.perf_counter() - start
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            number = len(training.history) * len(losses) + index + 1
            raise UserError(
                f"the loss is {loss} at step {number}, learning rate {rates[index]:.4g}: "
                "try a lower --lr or --precision fp32"
            )
    images = len(losses) * args.batch_size
    return {
        "lr": rates[-1],
        "train_loss": statistics.fmean(losses),
        "train_accuracy": torch.stack(right).sum().item() / images,
        "seconds": seconds,
        "images_per_second": images / seconds,
    }


def run_epoch(
    training: Training, dataset: data.Dataset, args: Namespace, device: torch.device, bar: tqdm
) -> None:
    """Train and evaluate one epoch, seeded by run and epoch so that a resumed run needs no state of
    a generator, and add its line to the history."""
    start = time.perf_counter()
    epoch = len(training.history) + 1
    torch.manual_seed(args.seed * 1_000_003 + epoch)
    line = train_epoch(training, dataset, args, device, bar)
    logits = step.predict_logits(training.net, dataset, args.precision)
    line["test_loss"] = F.cross_entropy(logits, dataset.test_labels).item()
    line["test_accuracy"] = accuracy(logits, dataset.test_labels)
    line["epoch"] = epoch
    training.elapsed += time.perf_counter() - start
    training.history.append({key: line[key] for key in METRICS})
    if args.target and line["test_accuracy"] >= args.target and training.reached is None:
        training.reached = {"epoch": epoch, "seconds": training.elapsed}


METRICS = ("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
METRICS += ("seconds", "images_per_second")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def format_line(line: dict[str, float]) -> str:
    return (
        f"{line['epoch']:5d} {line['lr']:9.5f} {line['train_loss']:10.4f} "
        f"{line['train_accuracy']:9.2%} {line['test_loss']:9.4f} {line['test_accuracy']:8.2%} "
        f"{line['seconds']:8.2f} {line['images_per_second']:9,.0f}"
    )


# A run, from its folder to its results


def run(args: Namespace, argv: list[str], dataset: data.Dataset) -> dict[str, Any]:
    """Train one net from start or checkpoint to its results; the content of `summary.json`."""
    start = time.perf_counter()
    if args.batch_size > len(dataset.train_images):
        raise UserError(
            f"--batch-size {args.batch_size}: {dataset.name} has only "
            f"{len(dataset.train_images):,} training images"
        )
    device = dataset.train_images.device
    torch.manual_seed(args.seed)
    net = model.build(args.net, len(dataset.classes), args.dropout)
    trace = rf.trace(net)
    args.precision = choose_precision(args.precision, device, trace.layers)
    parameters = sum(p.numel() for p in net.parameters())
    facts = {
        "data": dataset.name,
        "tested_on": f"{args.holdout:,} held-out training images" if args.holdout else "test split",
        "net": args.net,
        "parameters": parameters,
        "receptive_field": max(trace.receptive_field),
        "multiply_adds": trace.multiply_adds,
        "precision": args.precision,
        "device": device_name(device),
        "command": shlex.join(["python", "train.py", *argv]),
        "versions": versions(),
    }
    steps = len(dataset.train_images) // args.batch_size
    training = make_training(net, args, device, steps)
    folder = Path(args.resume or run_folder(args, dataset.name))
    if args.resume:
        resume(training, folder, dataset.name)
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", {"flags": vars(args), **facts})
        except OSError as error:
            raise UserError(f"--out {folder} cannot be written: {error}") from error
    print(
        f"device     {facts['device']}, {args.precision}\n"
        f"data       {dataset.name}: {len(dataset.train_images):,} training images, "
        f"{len(dataset.test_images):,} to test on ({facts['tested_on']})\n"
        f"net        {args.net}: {parameters:,} parameters, receptive field "
        f"{facts['receptive_field']}, {trace.multiply_adds / 1e6:.1f} M multiply-adds\n"
        f"run        {folder}\n\n{HEADER}",
        flush=True,
    )
    done = len(training.history)
    total = {"total": args.epochs * steps, "initial": done * steps}
    with tqdm(**total, unit="step", leave=False, disable=None) as bar:
        while len(training.history) < args.epochs:
            run_epoch(training, dataset, args, device, bar)
            checkpoint.save(folder / "last.pt", {"data": dataset.name, **training.state()})
            write_history(folder, training.history)
            tqdm.write(format_line(training.history[-1]))
            sys.stdout.flush()
    return write_results(folder, training, dataset, args, facts, start)


def run_folder(args: Namespace, data_name: str) -> Path:
    return Path(args.out or f"runs/{args.net}-{data_name}-s{args.seed}")


def refuse_existing(folder: Path) -> None:
    if any((folder / name).exists() for name in ("config.json", "last.pt", "summary.json")):
        raise UserError(
            f"--out {folder}: a run is there already; --resume {folder} goes on with it"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is not a folder")


def resume(training: Training, folder: Path, data_name: str) -> None:
    if not (folder / "last.pt").exists():
        return  # ended before its first epoch did
    state = checkpoint.load(folder / "last.pt")
    if state.get("data") != data_name:
        raise UserError(
            f"--resume {folder}: that run trains on {state.get('data')}, not {data_name}"
        )
    try:
        training.load_state(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--resume {folder}: last.pt does not fit this run: {error}") from error
    write_history(folder, training.history)


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    with written_whole(folder / "metrics.jsonl") as file:
        file.writelines((json.dumps(line) + "\n").encode() for line in history)


def write_json(path: Path, content: dict[str, Any]) -> None:
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_results(
    folder: Path,
    training: Training,
    dataset: data.Dataset,
    args: Namespace,
    facts: dict[str, Any],
    start: float,
) -> dict[str, Any]:
    """The net, the predictions, the pictures, and last of all the summary."""
    net, history = training.net, training.history
    logits = step.predict_logits(net, dataset, args.precision)
    flipped = step.predict_logits(net, dataset, args.precision, flip=True)
    with written_whole(folder / "predictions.npy") as file:
        np.save(file, logits.cpu().numpy())
    checkpoint.save(
        folder / "model.pt",
        {
            "net": args.net,
            "num_classes": len(dataset.classes),
            "classes": dataset.classes,
            "mean": dataset.mean.tolist(),
            "std": dataset.std.tolist(),
            "state_dict": {k: v.cpu() for k, v in net.state_dict().items()},
        },
    )
    draw(folder, logits, dataset, args, history)
    best = max(history, key=lambda line: line["test_accuracy"])
    summary = {
        "final_accuracy": accuracy(logits, dataset.test_labels),
        "best_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "flip_accuracy": accuracy(flipped, dataset.test_labels),
        "target": args.target,
        "target_reached": training.reached,
        "training_seconds": training.elapsed,
        "total_seconds": time.perf_counter() - start,
        "seed": args.seed,
        "epochs": args.epochs,
        **facts,
    }
    write_json(folder / "summary.json", summary)
    print(
        f"\nfinal test accuracy   {summary['final_accuracy']:.2%} on {dataset.name}"
        f"\nwith flip averaging   {summary['flip_accuracy']:.2%}"
        f"\nbest, of epoch {best['epoch']:<6} {summary['best_accuracy']:.2%}"
        f"\ntotal                 {summary['total_seconds']:.1f} s"
    )
    if args.target:
        reached = training.reached
        when = f"epoch {reached['epoch']}, {reached['seconds']:.1f} s" if reached else "not reached"
        print(f"target {args.target:<14.2%} {when}")
    return summary


def draw(
    folder: Path,
    logits: Tensor,
    dataset: data.Dataset,
    args: Namespace,
    history: list[dict[str, Any]],
) -> None:
    import plots

    title = f"{args.net} on {dataset.name}, seed {args.seed}"
    plots.curves(folder / "curves.png", history, title)
    labels, scores = dataset.test_labels.cpu().numpy(), logits.cpu().numpy()
    plots.confusion(folder / "confusion.png", labels, scores, dataset.classes)
    test = dataset.test_images.permute(0, 2, 3, 1).cpu().numpy()
    plots.mistakes(folder / "mistakes.png", test, labels, scores, dataset.classes)
    device = dataset.train_images.device
    torch.manual_seed(args.seed)
    inputs, shown = next(training_batches(dataset, args, device))
    images = inputs[:32] * dataset.std.view(-1, 1, 1) + dataset.mean.view(-1, 1, 1)
    images = images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    captions = [dataset.classes[label] for label in shown[:32].tolist()]
    title = f"training images of {dataset.name} as the net sees them"
    plots.image_grid(folder / "augmented.png", images, captions, title)


def run_all(args: Namespace, argv: list[str]) -> None:
    device = choose_device(args.device)
    if args.out and not args.resume:
        refuse_existing(Path(args.out))
    start = time.perf_counter()
    dataset = data.load(args.data, Path(args.data_dir), device, args.train_images, args.holdout)
    print(f"data read in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    base = run_folder(args, dataset.name)
    if args.repeat == 1:
        if not args.resume:
            refuse_existing(base)
        run(args, argv, dataset)
    else:
        seeds = range(args.seed, args.seed + args.repeat)
        runs = [
            Namespace(**{**vars(args), "seed": seed, "repeat": 1, "out": str(base / f"s{seed}")})
            for seed in seeds
        ]
        for each in runs:
            refuse_existing(Path(each.out))
        summaries = [run(each, argv, dataset) for each in runs]
        report_repeats(base, summaries)
    if args.data == "auto" and dataset.name == "synthetic":
        print("warning: CIFAR-10 was out of reach; all of the above is on synthetic images")


def report_repeats(folder: Path, summaries: list[dict[str, Any]]) -> None:
    result = {"seeds": [summary["seed"] for summary in summaries]}
    for key in ("final_accuracy", "best_accuracy", "flip_accuracy", "total_seconds"):
        values = [summary[key] for summary in summaries]
        result[key] = {
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values),
            "values": values,
        }
    shared = ("data", "net", "parameters", "device", "precision", "epochs", "command", "versions")
    write_json(folder / "summary.json", result | {key: summaries[0][key] for key in shared})
    final = result["final_accuracy"]
    print(
        f"\n{len(summaries)} seeds: final test accuracy {final['mean']:.2%} "
        f"± {final['sd']:.2%} (standard deviation)"
    )


def main(argv: list[str]) -> int:
    """The exit status: 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C."""
    try:
        run_all(parse_flags(argv), argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: --resume DIR goes on from the last finished epoch", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
