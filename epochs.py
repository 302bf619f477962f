"""The epochs of a run: batches, steps, figures, a checkpoint after each."""

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
import ranks
import report
import step
from common import Terminated, UserError, noting_sigterm
from flags import identity, policy_of
from optimise import Training

CALMER = "start again in another --out, with a lower --lr or --precision fp32"


def training_batches(dataset: data.Dataset, args: Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of each batch of one shuffled epoch: inputs float32 (B, 3, 32, 32),
    augmented and normalised, and labels (B,)."""
    batches = data.epoch_batches(len(dataset.train_images), args.batch_size, dataset.device)
    batches = [ranks.share(index) for index in batches]
    ranks.own_streams()
    if args.augment == "albumentations":
        import reference

        yield from reference.augmented(dataset, batches, policy_of(args), args.workers)
        return
    policy = policy_of(args) if args.augment == "device" else None
    size = len(batches[0])
    several = batches_at_once(size, dataset.device)
    for first in range(0, len(batches), several):
        index = torch.cat(batches[first : first + several])
        images = dataset.train_images.index_select(0, index)  # faster than images[index] on a CPU
        inputs = step.prepared(images, policy, dataset.mean, dataset.std)
        labels = dataset.train_labels[index]
        yield from zip(inputs.split(size), labels.split(size), strict=True)


def batches_at_once(batch_size: int, device: torch.device) -> int:
    """How many batches to augment at once: on a GPU some 4,096 images' worth, since many small
    operations take as long for fewer images; on a CPU one, which stays in its caches."""
    return 1 if device.type == "cpu" else max(1, 4096 // batch_size)


def train_epoch(
    training: Training, take_step: step.Step, dataset: data.Dataset, args: Namespace, bar: tqdm
) -> dict[str, float]:
    """Take one epoch of optimiser steps. Returns its learning rate, loss, accuracy, seconds,
    images/s and number of steps that the loss scaler skipped. Raises UserError if a loss is not
    finite."""
    training.net.train()
    start = time.perf_counter()
    rates, figures = [], []
    for images, labels in training_batches(dataset, args):
        rates.append(training.scheduler.get_last_lr()[0])
        figures.append(take_step(images, labels))
        training.scheduler.step()
        bar.update()
    figures = ranks.total(torch.stack(figures)).cpu()  # the first wait for the device, save in fp16
    seconds = time.perf_counter() - start
    losses, right, skipped = figures.unbind(1)
    losses = (losses / ranks.count()).tolist()
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            number = len(training.history) * len(losses) + index + 1
            raise UserError(
                f"the loss is {loss} at step {number}, learning rate {rates[index]:.4g}: {CALMER}"
            )
    count = len(losses) * args.batch_size
    return {
        "lr": float(rates[-1]),
        "train_loss": statistics.fmean(losses),
        "train_accuracy": right.sum().item() / count,
        "seconds": seconds,
        "images_per_second": count / seconds,
        "skipped_steps": int(skipped.sum()) // ranks.count(),
    }


def run_epoch(
    training: Training, take_step: step.Step, dataset: data.Dataset, args: Namespace, bar: tqdm
) -> None:
    """Train and evaluate one epoch, seeded by run and epoch so that resuming needs no generator
    state, and add its line to the history. Raises UserError if a loss is not finite."""
    start = time.perf_counter()
    epoch = len(training.history) + 1
    torch.manual_seed(args.seed * 1_000_003 + epoch)
    trained = train_epoch(training, take_step, dataset, args, bar)
    ranks.share_statistics(training.net)
    logits = step.predict_logits(training.net, dataset, args.precision)
    loss = F.cross_entropy(logits, dataset.test_labels).item()
    if not math.isfinite(loss):  # the last update, made after its step's loss, may ruin the net
        raise UserError(f"the test loss is {loss} after epoch {epoch}: {CALMER}")
    accuracy = report.accuracy(logits, dataset.test_labels)
    training.elapsed += time.perf_counter() - start
    tested = {"test_loss": loss, "test_accuracy": accuracy}
    training.history.append({"epoch": epoch, **trained, **tested})
    if args.target and accuracy >= args.target and training.reached is None:
        training.reached = {"epoch": epoch, "seconds": training.elapsed - training.prepared}


def run_epochs(training: Training, dataset: data.Dataset, args: Namespace, folder: Path) -> None:
    """Run the remaining epochs, each with its checkpoint, metrics and printed line. Raises
    Terminated after the epoch in which any of the processes received SIGTERM."""
    steps = len(dataset.train_images) // args.batch_size
    span = {"total": args.epochs * steps, "initial": len(training.history) * steps}
    quiet = True if ranks.rank() else None  # None: off without a terminal
    with (
        tqdm(**span, unit="step", leave=False, disable=quiet) as bar,
        noting_sigterm() as asked_to_end,
    ):
        ahead = range(len(training.history) + 1, args.epochs + 1)
        for radius, stage in groupby(ahead, partial(sam_radius, args)):
            begun = time.perf_counter()
            take_step = None  # frees a CUDA graph's memory before the next is captured
            take_step = step.make_step(training, dataset, args, radius)
            training.elapsed += time.perf_counter() - begun
            if not training.history:
                training.prepared = training.elapsed
            for _ in stage:
                run_epoch(training, take_step, dataset, args, bar)
                ranks.by_main(partial(keep, training, args, folder))
                if any(ranks.gathered(asked_to_end.is_set())):
                    raise Terminated


def keep(training: Training, args: Namespace, folder: Path) -> None:
    """Write the checkpoint and metrics after an epoch, and print its line."""
    checkpoint.save(folder / "last.pt", training.state() | {"run": identity(args)})
    report.write_history(folder, training.history)
    with tqdm.external_write_mode():
        print(report.format_line(training.history[-1]), flush=True)


def sam_radius(args: Namespace, epoch: int) -> float:
    """The radius of sharpness-aware steps, 0 before a run's last quarter: confined to it they help
    nearly as much as throughout (Zhou et al. 2024, arxiv.org/abs/2410.10373), at a quarter of the
    cost."""
    return args.sam if epoch > args.epochs - args.epochs // 4 else 0.0
