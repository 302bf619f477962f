import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from test_main_job import SMALL
from torch import nn

import measure
import step
from common import UserError
from graph import trace

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def test_ways_take_turns_and_warm_up_uncounted(monkeypatch):
    seen = []
    monkeypatch.setattr(measure, "_synchronize", lambda _: seen.append("|"))

    def way(name):
        def batches():
            while True:
                seen.append(name)
                yield

        return batches

    ways = {name: way(name) for name in "ab"}
    reached = measure.rates(ways, CPU, warm_up=2, count=3, rounds=2)
    assert "".join(seen) == 2 * "aa|aaa|bb|bbb|"  # at both ends of what is timed
    assert list(reached) == ["a", "b"]


def test_rates_and_phases_are_medians_of_what_the_clock_says(monkeypatch):
    now = 0.0
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)

    def passing(*durations):
        while True:
            for duration in durations:
                nonlocal now
                now += duration
                yield

    ways = {"quick": lambda: passing(0.25), "slow": lambda: passing(0.75)}
    expected = {"quick": 4.0, "slow": 3 / 2.25}  # three of 100 begin within two seconds
    assert measure.rates(ways, CPU, warm_up=1, count=100) == expected
    uneven = passing(9.0, 0.5, 0.5, 9.0, 0.25, 0.25, 9.0, 0.125, 0.125)
    assert measure.rates({"a": lambda: uneven}, CPU, warm_up=1, count=2, rounds=3) == {"a": 4.0}
    clocks = {"first": passing(9.0, 1.0, 1.0, 5.0), "second": passing(9.0, 2.0, 3.0, 3.0)}
    jobs = {name: lambda clock=clock: next(clock) for name, clock in clocks.items()}
    phases = {"first": (jobs["first"], 4), "second": (jobs["second"], 2)}
    assert measure.phase_seconds(phases, CPU, rounds=3) == {"first": 0.25, "second": 1.5}


def test_kernels_are_counted_and_timed_per_job(monkeypatch):
    event = Mock(device_type=measure.DeviceType.CPU, self_cpu_time_total=8e6)  # microseconds
    event.name = "mm"
    six = Mock(events=lambda: [event] * 6)
    monkeypatch.setattr(measure, "profile", lambda **_: nullcontext(six))
    expected = [{"name": "mm", "count": 2, "seconds": 16}]
    assert measure.kernels(job := Mock(), CPU, rounds=3) == expected
    assert job.call_count == 4  # the first, which allocates, is not counted


def test_the_floor_by_hand():
    first, second = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 5, 1, bias=False)
    layers = trace(nn.Sequential(first, nn.ReLU(), nn.BatchNorm2d(8), second)).layers
    moved = 10 * (3 + 8) * 1024 + 216, 10 * (8 + 5) * 1024 + 40  # values, at batch 10
    around = 10 * 3 * 1024 * 3 + 5 * 4 * (216 + 16 + 40)  # bytes of augmentation and optimiser
    passes = 2, 3  # forward, weights' gradient and, except for images, input's gradient
    for rate, each in ((1e30, [2 * m for m in moved]), (1.0, [10 * 216 * 1024, 10 * 40 * 1024])):
        expected = sum(p * e for p, e in zip(passes, each, strict=True))
        ceilings = measure.Ceilings(1.0, rate)
        floor = measure.floor_seconds(layers, 10, torch.bfloat16, ceilings)
        assert floor == pytest.approx(around + expected)


def test_ceilings_count_what_is_read_and_written_and_multiply_adds(monkeypatch):
    monkeypatch.setattr(measure, "rates", lambda ways, *_, **__: dict.fromkeys(ways, 10.0))
    monkeypatch.setattr(torch, "randn", made := Mock(wraps=torch.randn))
    ceilings = measure.measure_ceilings(CPU, torch.bfloat16)
    assert made.call_args.kwargs["dtype"] == torch.bfloat16
    assert ceilings == measure.Ceilings(10 * 2 * 4 * 2**26, 10 * 2048**3)


def test_a_run_notes_when_its_first_step_ended(tmp_path, monkeypatch, capsys, no_pictures):
    monkeypatch.setattr(step, "train_step", taken := Mock(wraps=step.train_step))
    monkeypatch.setattr(step, "make_step", step.make_step)  # puts it back behind the run
    monkeypatch.setattr(measure, "time", Mock(time=lambda: taken.call_count))
    monkeypatch.setattr(measure, "peak_memory", lambda _: 5)
    run = [*SMALL, "--net", "net136k", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert measure.noted_run(run) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"first_step_at": 1, "peak_memory_bytes": 5}
    assert measure.noted_run(["--epochs", "0"]) == 2


def test_a_whole_run_has_caches_of_its_own(monkeypatch):
    child = Mock(returncode=0, stdout='said\n{"first_step_at": 7, "peak_memory_bytes": 5}\n')
    monkeypatch.setattr(measure.subprocess, "run", begun := Mock(return_value=child))
    monkeypatch.setattr(measure.time, "time", Mock(side_effect=[4, 9, 0, 0]))
    expected = {"first_step_seconds": 3, "total_seconds": 5, "peak_memory_bytes": 5}
    assert measure.whole_run(["--epochs", "1"], "caches") == expected
    environment = begun.call_args.kwargs["env"]
    assert environment["XDG_CACHE_HOME"] == "caches"
    assert environment["TRITON_CACHE_DIR"] == str(Path("caches/triton"))
    child.returncode, child.stderr = 2, "data read in 1.0 s\nerror: no disk\n"
    with pytest.raises(UserError, match="ended with status 2: no disk"):
        measure.whole_run([], "caches")


def test_peak_memory():
    code = """if True:
        import torch, measure
        cpu = torch.device("cpu")
        measure.reset_peak_memory(cpu)
        before = measure.peak_memory(cpu)
        torch.ones(2**26)
        print(before, measure.peak_memory(cpu))
        measure.reset_peak_memory(cpu)
        print(measure.peak_memory(cpu))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    before, peak, after = map(int, run.stdout.split())
    assert 2**28 * 0.9 < peak - before < 2**28 * 1.5
    assert after - before < 2**27
