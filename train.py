"""The main job: flags → device → data → net → epochs → results.

    python train.py --epochs 40

Nothing but the net's own arithmetic should cost time: the data set lies on the device, batches are
indexed and augmented there, and the host reads figures once an epoch.
"""

import math
import os
import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
import graph
import model
import ranks
import report
import step
from augment import Policy
from common import (
    Terminated,
    UserError,
    exit_status,
    first_line,
    is_out_of_memory,
    noting_sigterm,
)
from flags import describe_recipe, parse_flags, policy_of
from machine import (
    choose_device,
    choose_precision,
    device_name,
    keep_freed_memory,
    make_deterministic,
    versions,
)
from optimise import Training, make_training


def training_batches(dataset: data.Dataset, args: Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled epoch: images uint8 (B, 3, 32, 32), augmented already where that is done on the
    host, and labels (B,); of each batch, this process's share."""
    device = dataset.train_images.device
    batches = data.epoch_batches(len(dataset.train_images), args.batch_size, device)
    batches = [ranks.share(index) for index in batches]
    ranks.own_streams()
    if args.augment == "albumentations":
        import reference

        loader = reference.loader(
            dataset.train_images,
            dataset.train_labels,
            [index.tolist() for index in batches],
            policy_of(args),
            dataset.mean,
            args.workers,
            pin_memory=device.type == "cuda",
        )
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device)
        return
    for index in batches:  # index_select: on a CPU ten times as fast as images[index]
        yield dataset.train_images.index_select(0, index), dataset.train_labels[index]


def train_epoch(
    training: Training, take_step: step.Step, dataset: data.Dataset, args: Namespace, bar: tqdm
) -> dict[str, float]:
    """One epoch of optimiser steps; its learning rate, loss, accuracy, seconds and images/s."""
    training.net.train()
    start = time.perf_counter()
    rates, figures = [], []
    for images, labels in training_batches(dataset, args):
        rates.append(training.scheduler.get_last_lr()[0])
        figures.append(take_step(images, labels))
        training.scheduler.step()
        bar.update()
    figures = ranks.total(torch.stack(figures)).cpu()  # the epoch's first wait for the device
    seconds = time.perf_counter() - start
    losses, right, skipped = figures.unbind(1)
    losses = (losses / ranks.count()).tolist()
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            number = len(training.history) * len(losses) + index + 1
            raise UserError(
                f"the loss is {loss} at step {number}, learning rate {rates[index]:.4g}: "
                "try a lower --lr or --precision fp32"
            )
    count = len(losses) * args.batch_size
    return {
        "lr": float(rates[-1]),
        "train_loss": statistics.fmean(losses),
        "train_accuracy": right.sum().item() / count,
        "seconds": seconds,
        "images_per_second": count / seconds,
        "skipped_steps": int(skipped.sum().item()) // ranks.count(),
    }


def run_epoch(
    training: Training, take_step: step.Step, dataset: data.Dataset, args: Namespace, bar: tqdm
) -> None:
    """Train and evaluate one epoch, seeded by run and epoch so that a resumed run needs no state of
    a generator, and add its line to the history."""
    start = time.perf_counter()
    epoch = len(training.history) + 1
    torch.manual_seed(args.seed * 1_000_003 + epoch)
    line = train_epoch(training, take_step, dataset, args, bar)
    ranks.share_statistics(training.net)
    logits = step.predict_logits(training.net, dataset, args.precision)
    line["test_loss"] = F.cross_entropy(logits, dataset.test_labels).item()
    line["test_accuracy"] = report.accuracy(logits, dataset.test_labels)
    line["epoch"] = epoch
    training.elapsed += time.perf_counter() - start
    training.history.append({key: line[key] for key in METRICS})
    if args.target and line["test_accuracy"] >= args.target and training.reached is None:
        training.reached = {"epoch": epoch, "seconds": training.elapsed}


def run_epochs(
    training: Training,
    dataset: data.Dataset,
    policy: Policy | None,
    args: Namespace,
    folder: Path,
) -> None:
    """Those that are left, each with its checkpoint, its metrics and its printed line. Raises
    Terminated after the epoch in which SIGTERM came to one of the processes."""
    steps = len(dataset.train_images) // args.batch_size
    done = {"total": args.epochs * steps, "initial": len(training.history) * steps}
    quiet = True if ranks.rank() else None  # None: only where stderr is no terminal
    with (
        tqdm(**done, unit="step", leave=False, disable=quiet) as bar,
        noting_sigterm() as asked_to_end,
    ):
        take_step, radius = None, None
        while len(training.history) < args.epochs:
            wanted = sam_radius(args, len(training.history) + 1)
            if radius != wanted:
                radius, begun = wanted, time.perf_counter()
                take_step = step.make_step(training, dataset, policy, args, radius)
                training.elapsed += time.perf_counter() - begun
            run_epoch(training, take_step, dataset, args, bar)
            if ranks.rank() == 0:
                state = {"data": images_of(dataset), **training.state()}
                checkpoint.save(folder / "last.pt", state)
                report.write_history(folder, training.history)
                tqdm.write(report.format_line(training.history[-1]))
                sys.stdout.flush()
            if ranks.any_says(asked_to_end.is_set(), dataset.train_images.device):
                raise Terminated(f"--resume {folder} goes on after the last line")


def sam_radius(args: Namespace, epoch: int) -> float:
    """That of sharpness-aware steps: late in a run they do what they do throughout (Zhou et al.
    2024, arxiv.org/abs/2410.10373), at a quarter of the cost."""
    return args.sam if epoch > args.epochs - args.epochs // 4 else 0.0


METRICS = ("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
METRICS += ("seconds", "images_per_second", "skipped_steps")


# A run, from its folder to its results


def run(args: Namespace, argv: list[str], dataset: data.Dataset, start: float) -> dict[str, Any]:
    """Train one net from its start or checkpoint to its results: the content of `summary.json`.

    `start` is the reading of `time.perf_counter` that total_seconds counts from.
    """
    if args.batch_size % ranks.count():
        raise UserError(
            f"--batch-size {args.batch_size}: {ranks.count()} processes cannot share it evenly"
        )
    if args.batch_size > len(dataset.train_images):
        raise UserError(
            f"--batch-size {args.batch_size}: {dataset.name} has only "
            f"{len(dataset.train_images):,} training images"
        )
    device = dataset.train_images.device
    torch.manual_seed(args.seed)
    net = model.build(args.net, len(dataset.classes), args.dropout)
    trace = graph.trace(net)
    args.precision = choose_precision(args.precision, device, trace.layers)
    steps = len(dataset.train_images) // args.batch_size
    training = make_training(net, args, device, steps)
    facts = {
        "data": dataset.name,
        "tested_on": f"{args.holdout:,} held-out training images" if args.holdout else "test split",
        "net": args.net,
        "recipe": args.recipe,
        "parameters": sum(p.numel() for p in net.parameters()),
        "receptive_field": max(trace.receptive_field),
        "multiply_adds": trace.multiply_adds,
        "precision": args.precision,
        "device": device_name(device),
        "processes": ranks.count(),
        "command": shlex.join(["python", "train.py", *argv]),
        "versions": versions(),
    }
    folder = Path(args.resume or run_folder(args, dataset.name))
    if args.resume and (folder / "last.pt").exists():
        resume(training, folder, dataset, args)
        if len(training.history) == args.epochs and (folder / "summary.json").exists():
            print(f"{folder} has all its {args.epochs} epochs")
            return checkpoint.load_summary(folder)
        start -= training.elapsed
    else:
        write_config(folder, {"flags": vars(args), **facts})
    report.announce(facts, dataset, folder)
    if args.recipe is not None:
        print(describe_recipe(args))
    print(f"\n{report.HEADER}", flush=True)
    policy = policy_of(args) if args.augment == "device" else None
    try:
        run_epochs(training, dataset, policy, args, folder)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"--resume {folder} goes on after the last line") from interrupt
    except OSError as error:  # a full disk, say
        raise UserError(f"{error}; --resume {folder} goes on after the last line") from error
    except (RuntimeError, MemoryError) as error:
        if args.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"--compile: {first_line(error)}; train without it") from error
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"--batch-size {args.batch_size}: {device} is out of memory; try a smaller one"
        ) from error
    logits = [step.predict_logits(net, dataset, args.precision, flip) for flip in (False, True)]
    if ranks.rank() > 0:
        return facts
    torch.manual_seed(args.seed)
    images, labels = next(training_batches(dataset, args))
    examples = step.prepared(images, policy, dataset.mean, dataset.std), labels
    summary = {
        **report.write_outcome(folder, net, dataset, args, training.history, logits, examples),
        "target": args.target,
        "target_reached": training.reached,
        "training_seconds": training.elapsed,
        "total_seconds": time.perf_counter() - start,
        "seed": args.seed,
        "epochs": args.epochs,
        **facts,
    }
    report.write_card(folder, summary, vars(args))
    report.write_json(folder / "summary.json", summary)
    report.show(summary)
    return summary


def run_folder(args: Namespace, data_name: str) -> Path:
    return Path(args.out or f"runs/{args.net}-{data_name}-s{args.seed}")


def refuse_existing(folder: Path, device: torch.device) -> None:
    files = [folder / name for name in ("config.json", "last.pt", "summary.json")]
    if ranks.any_says(any(file.exists() for file in files), device):
        way = f"--resume {folder} goes on with it" if files[0].exists() else "give another --out"
        raise UserError(f"--out {folder}: a run is there already; {way}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is not a folder")


def images_of(dataset: data.Dataset) -> str:
    return f"{len(dataset.train_images):,} images of {dataset.name}"


def write_config(folder: Path, config: dict[str, Any]) -> None:
    if ranks.rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            report.write_json(folder / "config.json", config)
        except OSError as error:
            raise UserError(f"--out {folder} cannot be written: {error}") from error


def resume(training: Training, folder: Path, dataset: data.Dataset, args: Namespace) -> None:
    """Have `training` where the run in `folder` stopped; the run notes where its images lie now."""
    state = checkpoint.load(folder / "last.pt")
    if state.get("data") != images_of(dataset):
        raise UserError(
            f"--resume {folder}: that run trains on {state.get('data')}, not {images_of(dataset)}"
        )
    try:
        training.load_state(state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"--resume {folder}: last.pt does not fit this run: {first_line(error)}"
        ) from error
    config = checkpoint.load_config(folder)
    config["flags"] |= {"data": args.data, "data_dir": args.data_dir}
    write_config(folder, config)
    if ranks.rank() == 0:
        report.write_history(folder, training.history)


def run_all(args: Namespace, argv: list[str]) -> None:
    """All that the flags ask for, as one of torchrun's processes where it started this one."""
    device = choose_device(args.device)
    with ranks.joined(device):
        if ranks.rank() > 0:
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
                run_seeds(args, argv, device)
        else:
            run_seeds(args, argv, device)


def run_seeds(args: Namespace, argv: list[str], device: torch.device) -> None:
    if args.out and not args.resume:
        refuse_existing(Path(args.out), device)
    make_deterministic(args.deterministic)
    keep_freed_memory()
    start = time.perf_counter()
    with ranks.main_first():
        dataset = data.load(args.data, Path(args.data_dir), device, args.train_images, args.holdout)
    if ranks.rank() == 0:
        print(f"data read in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    if not args.resume:
        refuse_existing(run_folder(args, dataset.name), device)
    if args.repeat == 1:
        run(args, argv, dataset, start)
    else:
        repeat(args, argv, dataset)
    if args.data == "auto" and dataset.name == "synthetic":
        print("warning: CIFAR-10 was out of reach; all of the above is on synthetic images")


def repeat(args: Namespace, argv: list[str], dataset: data.Dataset) -> None:
    """A run for each seed, in folders of their own, and their mean. With --resume, those that are
    there already are gone on with."""
    base = Path(args.resume or run_folder(args, dataset.name))
    folders = {seed: base / f"s{seed}" for seed in range(args.seed, args.seed + args.repeat)}
    if not args.resume:
        for folder in folders.values():
            refuse_existing(folder, dataset.train_images.device)
        write_config(base, {"flags": vars(args), "data": dataset.name})
    summaries = []
    for seed, folder in folders.items():
        begun = str(folder) if (folder / "last.pt").exists() else None
        own = {"seed": seed, "repeat": 1, "out": str(folder), "resume": begun}
        each = Namespace(**vars(args) | own)
        summaries.append(run(each, argv, dataset, time.perf_counter()))
    if ranks.rank() == 0:
        report.write_repeats(base, summaries)


def main(argv: list[str]) -> int:
    """The exit status: 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C, 143 for
    SIGTERM, which ends the run after the epoch and its checkpoint."""
    return exit_status(lambda: run_all(parse_flags(argv), argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
