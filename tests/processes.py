"""Runs of train.py in separate processes, which can be killed or train one net together."""

import io
import multiprocessing
import os
import signal
import socket
import sys
import time
from unittest import mock

import torch

import checkpoint
import epochs
import plots
import ranks
import train

# forks from a process that has imported everything and computed nothing
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["processes", "torch._inductor"])  # which PyTorch imports late


def start(argv, **options):
    process = CONTEXT.Process(target=_run, args=(argv,), kwargs=options)
    # the only place where Python 3.11's forkserver looks for modules to preload (cpython#117378)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        process.start()
    return process


def _run(argv, torn_write=None, rank=None, record=None):
    torch.set_num_threads(1)
    plots.draw_run = plots.examples = lambda *_: None
    if torn_write is not None:
        _kill_within_write(*torn_write)
    if rank is not None:
        os.environ |= {key: str(value) for key, value in rank.items()}
    if record is not None:
        _record(record)
    raise SystemExit(train.main([str(argument) for argument in argv]))


def _kill_within_write(number, share):
    """Die by SIGKILL while writing the `number`th checkpoint, after this share of its bytes."""
    save, calls = torch.save, []

    def torn(content, file):
        calls.append(1)
        if len(calls) < number:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: int(share * whole.tell())])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.torch.save = torn


def _record(path):
    """Save which images this process drew in each epoch, and its net after each."""
    share, run_epoch = ranks.share, epochs.run_epoch
    seen, nets = [], []

    def noted_share(items):
        mine = share(items)
        if isinstance(items, torch.Tensor):
            seen.append(mine.clone())
        return mine

    def noted_epoch(training, *rest):
        run_epoch(training, *rest)
        nets.append({k: v.clone() for k, v in training.net.state_dict().items()})
        torch.save({"seen": seen, "nets": nets}, path)

    ranks.share, epochs.run_epoch = noted_share, noted_epoch


def joined(count, argv, folder, own=None):
    """`count` processes that train one net, each with its `own` additional flags."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"TORCHELASTIC_RUN_ID": "test"}
    places = [{"RANK": r, "LOCAL_RANK": r, **shared} for r in range(count)]
    return [
        start([*argv, *flags], rank=place, record=folder / f"rank{place['RANK']}.pt")
        for place, flags in zip(places, own or [[]] * count, strict=True)
    ]


def wait_for(path, is_alive):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def exit_codes(processes):
    for process in processes:
        process.join(180)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # one that hangs would be waited for when pytest ends
    return codes


def together(count, argv, folder):
    return exit_codes(joined(count, argv, folder))
