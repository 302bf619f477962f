"""How speed is measured: ways that take turns, the phases of a step, memory, and the floor that a
device's own ceilings set."""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import graph
import step
from common import SIZE, UserError

Way = Callable[[], Iterator[object]]  # does one batch after another, endlessly
Job = Callable[[], object]
Phases = dict[str, tuple[Job, int]]  # each phase's job, and its number of images


@dataclass(frozen=True)
class Ceilings:
    """What a device reached, as medians of some rounds."""

    bytes_per_second: float  # read plus written, of a large copy
    multiply_adds_per_second: float  # of a large matrix product


def rates(
    ways: dict[str, Way], device: torch.device, warm_up: int, count: int, rounds: int = 5
) -> dict[str, float]:
    """Batches a second of each way: the median of `rounds` rounds of `count` batches, or as many as
    begin within two seconds, each round after `warm_up` uncounted ones. The ways take turns, so
    that a machine's changes of speed affect all alike."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            batches = way()
            for _ in islice(batches, warm_up):
                pass
            _synchronize(device)
            start, done = time.perf_counter(), 0
            while done < count and time.perf_counter() < start + 2:
                next(batches)
                done += 1
            _synchronize(device)
            taken[name].append(done / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def phase_seconds(phases: Phases, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds per image of each phase of a step, run in turn; on a GPU, where launching its
    kernels one by one would take longer, each as a CUDA graph, launched before its turn comes."""
    jobs = [job for job, _ in phases.values()]
    if device.type == "cuda":
        jobs = _captured(jobs)
    for job in jobs:
        job()
    every = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda._sleep(10**7)  # cycles: some milliseconds, in which all jobs are launched
        marks = [_mark(device)]
        for job in jobs:
            job()
            marks.append(_mark(device))
        every.append(marks)
    _synchronize(device)
    taken = zip(*([_between(*pair) for pair in pairwise(marks)] for marks in every), strict=True)
    return {
        name: statistics.median(seconds) / images
        for (name, (_, images)), seconds in zip(phases.items(), taken, strict=True)
    }


def kernels(job: Job, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """The kernels that `job` runs on a GPU, or PyTorch's operations on a CPU: name, and count and
    seconds per job, means of `rounds`, the longest first."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    job()
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(rounds):
            job()
        _synchronize(device)
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        taken = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        if on_gpu == (event.device_type != DeviceType.CPU):
            found[event.name].append(taken / 1e6)
    rows = [
        {"name": name, "count": len(taken) / rounds, "seconds": sum(taken) / rounds}
        for name, taken in found.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    large = device.type == "cuda"
    source = torch.rand(2**28 if large else 2**26, device=device)
    target = torch.empty_like(source)
    side = 8192 if large else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    works: dict[str, Way] = {
        "copies": lambda: (target.copy_(source) for _ in repeat(None)),
        "products": lambda: (left @ right for _ in repeat(None)),
    }
    reached = rates(works, device, warm_up=1, count=20 if large else 3)
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(reached["copies"] * moved, reached["products"] * side**3)


def floor_seconds(
    layers: list[graph.Layer], batch: int, dtype: torch.dtype, ceilings: Ceilings
) -> float:
    """The least seconds of a step (the roofline model, Williams et al. 2009) that computes layer by
    layer on maps too large for a cache; those of a batch of 256 fit into an H100's 50 MB. Counted:
    for each convolution, the larger of its traffic – input, output and weights once forward, twice
    backward – and its multiply-adds, with norms and activations free; the augmentation's uint8
    read and output written; 5 × 4 bytes per parameter for the optimiser."""
    parameters = sum(layer.parameters for layer in layers)
    moved = batch * 3 * SIZE * SIZE * (1 + dtype.itemsize) + 5 * 4 * parameters
    each = (layer_floor_seconds(layer, batch, dtype, ceilings) for layer in layers)
    return moved / ceilings.bytes_per_second + sum(each)


def layer_floor_seconds(
    layer: graph.Layer, batch: int, dtype: torch.dtype, ceilings: Ceilings
) -> float:
    """One layer's part of `floor_seconds`, forward and backward; images need no gradient."""
    if not layer.multiply_adds:
        return 0.0
    passes = 2 if layer.input == (3, SIZE, SIZE) else 3
    values = batch * (math.prod(layer.input) + math.prod(layer.output)) + layer.parameters
    traffic = values * dtype.itemsize / ceilings.bytes_per_second
    arithmetic = batch * layer.multiply_adds / ceilings.multiply_adds_per_second
    return passes * max(traffic, arithmetic)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Peak bytes since the reset: of tensors on a GPU, otherwise (Linux) of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def noted_run(argv: list[str]) -> int:
    """train.py as a user starts it; its last line on stdout is JSON: when its first step ended, and
    its peak memory."""
    import train

    make_step, noted = step.make_step, {}

    def noting(*args: object) -> step.Step:
        take_step = make_step(*args)

        def noting_the_first(*batch: Tensor) -> Tensor:
            figures = take_step(*batch)
            if not noted:
                figures.cpu()
                noted["first_step_at"] = time.time()
            return figures

        return noting_the_first

    step.make_step = noting
    status = train.main(argv)
    noted["peak_memory_bytes"] = peak_memory(torch.device("cpu"))
    print(json.dumps(noted))
    return status


def whole_run(argv: list[str], cache_home: str) -> dict[str, float]:
    """Seconds from the start of a process that runs train.py to the end of its first step and to
    its own end, and its peak memory. Raises UserError if it fails."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"XDG_CACHE_HOME": cache_home, "PYTHONPATH": path}
    environment["TRITON_CACHE_DIR"] = str(Path(cache_home, "triton"))
    program = "import sys, measure; sys.exit(measure.noted_run(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", program, *argv]  # -P: no modules of the current folder
    start = time.time()
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    total = time.time() - start
    if child.returncode:
        said = child.stderr.rpartition("error: ")[2]
        raise UserError(f"train.py ended with status {child.returncode}: {said}")
    noted = json.loads(child.stdout.splitlines()[-1])
    return {
        "first_step_seconds": noted["first_step_at"] - start,
        "total_seconds": total,
        "peak_memory_bytes": noted["peak_memory_bytes"],
    }


def _captured(jobs: list[Job]) -> list[Job]:
    stream = step.warmed_up(lambda: [job() for job in jobs])
    captures = [torch.cuda.CUDAGraph() for _ in jobs]
    pool = torch.cuda.graph_pool_handle()
    for capture, job in zip(captures, jobs, strict=True):
        with torch.cuda.graph(capture, pool=pool, stream=stream):
            job()
    return [capture.replay for capture in captures]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _mark(device: torch.device) -> "torch.cuda.Event | float":
    if device.type != "cuda":
        _synchronize(device)
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: "torch.cuda.Event | float", end: "torch.cuda.Event | float") -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
