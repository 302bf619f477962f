"""Several processes that train one net, as torchrun starts them: what they share and exchange.

Each holds the whole data set and computes its share of every batch; the gradients are averaged.
BatchNorm normalises by each process's own share. With one process, all of this does nothing.
Processes on several machines need the run's folder in common. torchrun kills its processes 30 s
after SIGTERM, and an epoch that needs longer is trained again; it adds lines of its own to those of
a mistake, and exits with 1.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import UserError

S, T = TypeVar("S", range, Tensor), TypeVar("T")


def rank() -> int:
    """This process's number; only process 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """If torchrun started this process, be a member of its process group while this lasts, and let
    only process 0 print to stdout."""
    if not dist.is_torchelastic_launched():
        yield
        return
    backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    patience = timedelta(hours=1)  # for the others, while process 0 downloads and decodes
    dist.init_process_group(backend, timeout=patience, device_id=own)
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere if rank() else sys.stdout),
        ):
            yield
    except RuntimeError as error:
        refuse_lost(error, "start again, all of them")
        raise
    finally:  # after a mistake too: Gloo's threads, left running, may abort the process at its exit
        if backend == "gloo" or sys.exception() is None:
            dist.destroy_process_group()


def refuse_lost(error: RuntimeError | MemoryError, way_on: str) -> None:
    """Raise UserError if another process, or the connection to it, is gone: with the library's
    words, for NCCL's may tell of a wrong set-up instead."""
    if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
        said = str(error).partition("Exception raised from")[0].strip()  # then a C++ stack
        raise UserError(
            f"another process has ended or cannot be reached ({said}); {way_on}"
        ) from error


@contextmanager
def main_first() -> Iterator[None]:
    """Let process 0 through before the others: it alone downloads, decodes and fills the cache."""
    if rank() > 0:
        dist.barrier()
    try:
        yield
    finally:  # after a mistake too, so that each process ends with its own line
        if rank() == 0 and count() > 1:
            dist.barrier()


def by_main(job: Callable[[], object]) -> None:
    """Run `job` in process 0 only. If a user's mistake or the disk stops it, each process ends with
    an error line of its own."""
    failed = None
    try:
        if rank() == 0:
            job()
    except (UserError, OSError) as error:
        failed = error
    if any(gathered(failed is not None)):
        raise failed or UserError("process 0 failed")


def average_gradients(net: nn.Module) -> None:
    """Average gradients over the processes, in one piece. DistributedDataParallel reorders its
    buckets after its first step: three or more processes, if resumed, would add in a new order."""
    if count() > 1:
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        mean = total(torch.cat([g.flatten() for g in gradients])) / count()
        parts = mean.split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))


def share(items: S) -> S:
    """This process's share of a sequence."""
    return items[rank() :: count()]


def share_statistics(net: nn.Module) -> None:
    """Give every process the BatchNorm statistics of process 0, for evaluation."""
    if count() > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def total(tensor: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def gathered(own: T) -> list[T]:
    """Every process's `own`, in the order of their ranks."""
    found = [own] * count()
    if count() > 1:
        dist.all_gather_object(found, own)
    return found


def own_streams() -> None:
    """Give each process random streams of its own, derived from the seed that all share. Those
    of a run's epochs follow one another; a CPU's generator ignores all but the low 32 bits."""
    if rank() > 0:
        torch.manual_seed(torch.initial_seed() + rank() * 2**20)
