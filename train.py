"""The main job: flags → device → data → net → epochs → results.

    python train.py --epochs 40

Only the net's own arithmetic should cost time: the data set lies on the device, batches are indexed
and augmented there, and the host reads the figures back once an epoch.
"""

import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import checkpoint
import data
import epochs
import graph
import model
import ranks
import report
import step
from common import (
    SIZE,
    Terminated,
    UserError,
    first_line,
    going_on,
    is_out_of_memory,
    with_exit_status,
)
from flags import identity, parse_flags
from machine import (
    be_deterministic,
    choose_device,
    choose_precision,
    device_name,
    keep_freed_memory,
    versions,
)
from optimise import Training, make_training
from run_folders import (
    alone_in,
    note_source,
    refuse_existing,
    refuse_other_images,
    run_folder,
    write_config,
)


def run_all(argv: list[str]) -> None:
    """Do all that the flags ask for. SIGTERM takes effect after the current epoch, whose checkpoint
    is written first."""
    args = parse_flags(argv)
    device = choose_device(args.device)
    with ranks.joined(device):
        run_seeds(args, argv, device)


def run_seeds(args: Namespace, argv: list[str], device: torch.device) -> None:
    """Load the images, then train on them: one seed, or several with --repeat."""
    if args.out and not args.resume:
        refuse_existing(Path(args.out))
    args.precision = choose_precision(args.precision, device)
    be_deterministic(args.deterministic)
    keep_freed_memory()
    start = time.perf_counter()
    with ranks.main_first():
        dataset = load_data(args, device)
    if len(set(ranks.gathered(dataset.checksum))) > 1:
        raise UserError(f"--data {args.data}: the processes read different images; try again")
    seconds = time.perf_counter() - start
    refuse_batch_size(args, dataset)
    program = ["torchrun", f"--nproc-per-node={ranks.count()}"] if ranks.count() > 1 else ["python"]
    command = shlex.join([*program, "train.py", *argv])
    if args.resume:
        config = checkpoint.load_config(Path(args.resume))
        refuse_other_images(config, dataset, args)
        command = config.get("command", command)  # the one that began the run
    else:
        refuse_existing(run_folder(args, dataset.name))
    if ranks.rank() == 0:
        print(f"data read in {seconds:.1f} s", file=sys.stderr)
    if args.repeat == 1:
        run(args, command, dataset, start)
    else:
        repeat(args, command, dataset)
    if args.data == "auto" and dataset.name == "synthetic":
        print("warning: CIFAR-10 was not available; all results above are on synthetic images")


def load_data(args: Namespace, device: torch.device) -> data.Dataset:
    try:
        return data.load(args.data, Path(args.data_dir), device, args.train_images, args.holdout)
    except UserError as error:
        if args.resume is None:
            raise
        raise UserError(f"{error}; if the run's images have moved, say where: --data") from error


def refuse_batch_size(args: Namespace, dataset: data.Dataset) -> None:
    if args.batch_size % ranks.count():
        way = "use a multiple" if args.resume is None else "resume with another number of them"
        shared = f"cannot be shared by {ranks.count()} processes"
        raise UserError(f"--batch-size {args.batch_size}: {shared}; {way}")
    if args.batch_size > len(dataset.train_images):
        raise UserError(
            f"--batch-size {args.batch_size}: {dataset.name} has only "
            f"{len(dataset.train_images):,} training images; use a smaller one"
        )


def repeat(args: Namespace, command: str, dataset: data.Dataset) -> None:
    """Train one run per seed, each in its own folder, and report their mean. With --resume, runs
    that exist already are resumed."""
    base = run_folder(args, dataset.name)
    folders = {seed: base / f"s{seed}" for seed in range(args.seed, args.seed + args.repeat)}
    if not args.resume:
        for folder in folders.values():
            refuse_existing(folder)
    with alone_in(base):
        if args.resume:
            note_source(base, dataset, args)
        else:
            facts = {"data": dataset.name, "images": dataset.checksum, "command": command}
            write_config(base, {"flags": vars(args), **facts})
        summaries, way_on = [], going_on(base, "this seed and the rest")
        for seed, folder in folders.items():
            own = {"seed": seed, "repeat": 1, "out": str(folder), "resume": None}
            each = Namespace(**vars(args) | own)
            summaries.append(run(each, command, dataset, time.perf_counter(), way_on))
        if ranks.rank() == 0:
            report.write_repeats(base, summaries)


def run(
    args: Namespace, command: str, dataset: data.Dataset, start: float, way_on: str | None = None
) -> dict[str, Any]:
    """Train one net, from scratch or its checkpoint, and write its results. Returns the content of
    `summary.json`, or, in processes other than the first, only the run's facts.

    `start` is the `time.perf_counter()` reading that total_seconds counts from; `way_on` is what to
    say about continuing if something stops the run (default: resume this run).
    """
    torch.manual_seed(args.seed)
    net = model.build(args.net, len(dataset.classes), args.dropout)
    facts = facts_of(net, dataset, args, command)
    steps = len(dataset.train_images) // args.batch_size
    training = make_training(net, args, dataset.device, steps)
    folder = run_folder(args, dataset.name)
    way_on = way_on or going_on(folder)
    with alone_in(folder), ending_in_one_line(args, dataset.device, way_on):
        if (folder / "summary.json").exists():
            note_source(folder, dataset, args)
            print(f"{folder} has already finished, after epoch {args.epochs}")
            return checkpoint.load_summary(folder)
        if (folder / "last.pt").exists():
            resume(training, folder, dataset, args)
            start -= training.elapsed
        else:
            write_config(folder, {"flags": vars(args) | {"resume": None}, **facts})
        report.announce(facts, dataset, folder)
        if steps < 10:
            print(f"warning    steps in an epoch: {steps}; a smaller --batch-size takes more")
        if args.recipe is not None:
            print(report.describe_recipe(args))
        print(f"\n{report.HEADER}", flush=True)
        epochs.run_epochs(training, dataset, args, folder)
        logits = [step.predict_logits(net, dataset, args.precision, flip) for flip in (False, True)]
        if ranks.rank() > 0:
            return facts
        torch.manual_seed(args.seed)
        examples = next(epochs.training_batches(dataset, args))
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
        report.write_card(folder, summary, vars(args) | {"resume": None})
        report.write_json(folder / "summary.json", summary)
        report.show(summary)
        return summary


def facts_of(
    net: nn.Module, dataset: data.Dataset, args: Namespace, command: str
) -> dict[str, Any]:
    """What is known about a run before its first step, for its config and summary."""
    try:
        trace = graph.trace(net)
    except UserError as error:
        raise UserError(f"--net {args.net}: {error}") from error
    with torch.no_grad():
        logits = net.eval()(torch.zeros(1, 3, SIZE, SIZE))
    if getattr(logits, "shape", None) != (1, len(dataset.classes)):
        raise UserError(
            f"--net {args.net}: must return logits (N, {len(dataset.classes)}), one per class"
        )
    return {
        "data": dataset.name,
        "images": dataset.checksum,
        "tested_on": dataset.tested_on,
        "net": args.net,
        "recipe": args.recipe,
        "parameters": sum(p.numel() for p in net.parameters()),
        "receptive_field": max(trace.receptive_field),
        "multiply_adds": trace.multiply_adds,
        "precision": args.precision,
        "device": device_name(dataset.device),
        "processes": ranks.count(),
        "command": command,
        "versions": versions(),
    }


def resume(training: Training, folder: Path, dataset: data.Dataset, args: Namespace) -> None:
    """Restore `training` to where the run in `folder` stopped; record where its images lie now."""
    state = checkpoint.load(folder / "last.pt")
    if state.get("run") != identity(args):
        raise UserError(f"--resume {folder}: last.pt and config.json are from different runs")
    try:
        training.load_state(state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{folder}/last.pt does not fit this version of atrous: {first_line(error)}; "
            "use the version that wrote it"
        ) from error
    note_source(folder, dataset, args)
    if ranks.rank() == 0:
        report.write_history(folder, training.history)


@contextmanager
def ending_in_one_line(args: Namespace, device: torch.device, way_on: str) -> Iterator[None]:
    """Turn whatever stops a run into one line that says how to go on."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as ended:
        raise type(ended)(way_on) from ended
    except BrokenPipeError:  # stdout's reader is gone: exit_status ends the run
        raise
    except OSError as error:  # a full disk, say
        raise UserError(f"{error}; {way_on}") from error
    except (RuntimeError, MemoryError) as error:
        if args.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"--compile: {first_line(error)}; train without it") from error
        if "DataLoader worker" in str(error):  # killed, say, or out of shared memory
            said = str(error).strip().rpartition("\n")[2]
            raise UserError(
                f"--workers {args.workers}: {said}; resume with --workers 0: {way_on}"
            ) from error
        ranks.refuse_lost(error, way_on)
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"--batch-size {args.batch_size}: {device} is out of memory; start a new run with "
            f"a smaller one, or free memory: {way_on}"
        ) from error


main = with_exit_status(run_all)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
