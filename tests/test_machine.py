import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import machine

ROOT = Path(__file__).parents[1]


def test_precision_on_a_cpu_follows_its_instructions(monkeypatch):
    cpu = torch.device("cpu")
    amd, intel = {"cpu_name": "AMD EPYC"}, {"cpu_name": "Intel Xeon"}
    instructions = {"avx512_bf16": True}
    fast = [amd | instructions, intel | instructions | {"amx_bf16": True}, instructions]
    slow = [amd, intel | instructions | {"amx_bf16": False}, {}]
    for found in fast + slow:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert machine.choose_precision("auto", cpu) == ("bf16" if found in fast else "fp32")
    assert machine.choose_precision("fp16", cpu) == "fp16"


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


def test_there_need_not_be_a_glibc(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: pytest.fail("loaded"))
    machine.keep_freed_memory()
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: pytest.fail("read"))
    assert machine.versions.__wrapped__()["libc"] is None


def test_freed_memory_is_kept():
    code = """if True:
        import resource, torch, machine
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(3):
                torch.ones(2**24).add(1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        faults(); plain = faults()
        machine.keep_freed_memory()
        kept = min(faults() for _ in range(5))  # once the heap has grown
        print(plain, kept)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    plain, kept = map(int, run.stdout.split())
    assert kept < plain / 10


def test_the_best_device_and_its_precision(monkeypatch):
    gpu = torch.device("cuda", 0)
    there = {"is_available": True, "device_count": 2}
    for name, answer in there.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_device", taken := Mock())
    assert machine.choose_device("auto") == gpu
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")  # a second process
        assert machine.choose_device("cuda") == torch.device("cuda", 1)
        taken.assert_called_with(1)
        patch.setenv("LOCAL_RANK", "2")
        with pytest.raises(machine.UserError, match="more processes than GPUs"):
            machine.choose_device("cuda")
    for has_bf16, chosen in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, has=has_bf16: has or including_emulation,
        )
        assert machine.choose_precision("auto", gpu) == chosen
        assert machine.choose_precision("fp32", gpu) == "fp32"
    with pytest.raises(machine.UserError, match="--precision bf16: this GPU does not support it"):
        machine.choose_precision("bf16", gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has_mps in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda has=has_mps: has)
        assert machine.choose_device("auto") == torch.device("cpu")
    with pytest.raises(machine.UserError, match="--device mps: not available here"):
        machine.choose_device("mps")
    assert machine.choose_precision("auto", torch.device("mps")) == "fp32"


def test_a_repository_around_the_files_is_not_theirs(monkeypatch):
    monkeypatch.setattr(machine, "__file__", __file__)
    assert machine.versions.__wrapped__()["commit"] is None


def test_the_commit_is_dirty_where_code_changed_but_not_where_figures_did(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    code, figures = tmp_path / "machine.py", tmp_path / "epoch.json"
    for path in (code, figures):
        path.write_text("1\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    figures.write_text("2\n")
    commit = machine.versions.__wrapped__()["commit"]
    assert re.fullmatch("[0-9a-f]{7,}", commit)
    code.write_text("2\n")
    for _ in range(2):  # not added, added
        assert machine.versions.__wrapped__()["commit"] == f"{commit}-dirty"
        subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="no glibc")
def test_versions_name_the_libc():
    assert machine.versions()["libc"] == os.confstr("CS_GNU_LIBC_VERSION")


@pytest.fixture
def kernels_anew():
    machine._kernels_on.cache_clear()
    yield
    machine._kernels_on.cache_clear()


def test_without_a_compiler_for_kernels_pytorchs_own_are_taken(monkeypatch, capsys, kernels_anew):
    kernels = pytest.importorskip("kernels")
    where = {"is_cuda": True, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    x, huge = (Mock(numel=lambda n=n: n, **where) for n in (2**31 - 1, 2**31))
    assert machine.triton_kernels(torch.ones(1)) is machine.triton_kernels(huge) is None
    with monkeypatch.context() as patch:
        patch.setattr(machine, "find_spec", lambda _: None)
        assert machine.triton_kernels(x) is None
    assert capsys.readouterr().err == ""
    machine._kernels_on.cache_clear()
    assert machine.triton_kernels(x) is kernels
    monkeypatch.setattr(kernels, "mirrored", Mock(side_effect=RuntimeError("no C compiler\nTry")))
    machine._kernels_on.cache_clear()
    assert [machine.triton_kernels(x) for _ in range(2)] == [None, None]
    assert capsys.readouterr().err.count("no C compiler; training continues") == 1
    monkeypatch.setattr(kernels, "mirrored", Mock(side_effect=RuntimeError("CUDA out of memory")))
    machine._kernels_on.cache_clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        machine.triton_kernels(x)
