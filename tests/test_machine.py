import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graph
import machine

ROOT = Path(__file__).parents[1]


def test_precision_on_a_cpu_follows_its_instructions_and_the_layers(monkeypatch):
    cpu = torch.device("cpu")
    dense, depthwise = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(3, 90, 9, groups=3)
    layers = [graph.trace(module).layers for module in (dense, depthwise)]
    found = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    for has_bf16, wanted in (True, ["bf16", "fp32"]), (False, ["fp32", "fp32"]):
        found["avx512_bf16"] = has_bf16
        assert [machine.choose_precision("auto", cpu, each) for each in layers] == wanted
    assert machine.choose_precision("fp16", cpu, layers[0]) == "fp16"


def test_a_cpu_is_named_by_what_its_speed_depends_on(monkeypatch):
    found = {"cpu_name": "Sample", "amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    for count, wanted in (1, "1 thread"), (2, "2 threads"):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        name = machine.device_name(torch.device("cpu"))
        assert name.startswith(f"CPU: Sample, {wanted}, ")
    assert name.endswith(" AMX")
    found["amx_bf16"] = False
    assert "AMX" not in machine.device_name(torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept():
    code = """if True:
        import resource, torch, machine
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(9):
                torch.ones(2**24).add(1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        faults(); plain = faults()
        machine.keep_freed_memory()
        faults(); kept = faults()
        print(plain, kept)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    plain, kept = map(int, run.stdout.split())
    assert kept < plain / 10
