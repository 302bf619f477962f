"""What a run runs on: device, memory, precision, kernels, versions."""

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from common import UserError, first_line, is_out_of_memory

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PACKAGES = ("torch", "torchvision", "numpy", "Pillow", "albumentations")
PACKAGES += ("opencv-python-headless", "kornia")


def choose_device(name: str) -> torch.device:
    """The device `name`; for "auto" a GPU with CUDA, else the CPU: on mps, the backward of
    channels-last BatchNorm fails or is wrong in PyTorch 2.11 and 2.12 (pytorch#175189, #188371).
    Raises UserError if it is not available."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available[name]:
        raise UserError(f"--device {name}: not available here; use --device cpu")
    if name != "cuda":
        return torch.device(name)
    number = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun: a GPU for each process
    if number >= torch.cuda.device_count():
        raise UserError(
            f"--device cuda: more processes than GPUs ({torch.cuda.device_count()}); start fewer"
        )
    torch.cuda.set_device(number)
    return torch.device(name, number)


def be_deterministic(wanted: bool) -> None:
    """Set PyTorch's switch only if it changes: that imports torch.compile, 150 MiB and 1 to 2 s."""
    if wanted != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(wanted)
        torch.utils.deterministic.fill_uninitialized_memory = False  # all of it is written anyway


def keep_freed_memory() -> None:
    """Have glibc keep the memory that tensors free, for the next ones. Left alone, it returns large
    blocks to the kernel, which maps and clears their pages anew in every step."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def choose_precision(name: str, device: torch.device) -> str:
    """For "auto" bf16 on a GPU that has it, else fp16; bf16 on a CPU that is fast at it, where
    onednn.py keeps slow layers in fp32; fp32 elsewhere. Steps in bf16 took an Intel Xeon with
    AVX512-BF16 but without AMX 1.2 to 1.4 times as long, for all six nets, and a CPU with neither
    (AVX2) eight times. Raises UserError for bf16 on a GPU that lacks it."""
    if device.type == "cuda":
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        if name == "bf16" and best == "fp16":
            raise UserError(
                "--precision bf16: this GPU does not support it; use fp16 or fp32, or, to resume, "
                "--device cpu"
            )
        return best if name == "auto" else name
    if name != "auto":
        return name
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    others = found.get("avx512_bf16") and not found.get("cpu_name", "").startswith("Intel")
    return "bf16" if found.get("amx_bf16") or others else "fp32"


def triton_kernels(x: Tensor) -> ModuleType | None:
    """The module kernels.py if `x` lies on a GPU that it works on, and can be addressed with its 32
    bits, else None."""
    usable = x.is_cuda and x.numel() < 2**31 and not torch.compiler.is_compiling()
    return _kernels_on(x.device) if usable else None


@cache
def _kernels_on(device: torch.device) -> ModuleType | None:
    """None, with a warning, if Triton lacks what it needs to compile, above all a C compiler."""
    if not find_spec("triton"):
        return None
    try:
        import kernels

        kernels.mirrored(torch.zeros(1, 1, 1, 1, device=device), None)
    except Exception as error:  # Triton can fail in any way
        if is_out_of_memory(error):
            raise
        print(
            f"warning: Triton cannot compile here: {first_line(error)}; "
            "training continues with PyTorch's own kernels, more slowly, until a C "
            "compiler and Python's headers are installed",
            file=sys.stderr,
        )
        return None
    return kernels


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        found, threads = torch.cpu.get_capabilities(), torch.get_num_threads()
        vectors = torch.backends.cpu.get_cpu_capability() + " AMX" * found.get("amx_bf16", False)
        plural = "s" * (threads > 1)
        return f"CPU: {found.get('cpu_name', 'unknown')}, {threads} thread{plural}, {vectors}"
    return device.type


@cache
def versions() -> dict[str, str | None]:
    """What a result depends on, as it was when first asked for: before a long run, not after it.
    The commit is "-dirty" if code has changed since, not figures."""
    here = str(Path(__file__).parent)
    git = ["git", "-C", here, "--git-dir=.git"]  # not a repository around this folder

    def output(*command: str) -> str:
        return subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout

    try:
        commit = output("describe", "--always", "--exclude=*").strip()
        commit += "-dirty" * bool(output("diff", "HEAD", "--name-only", "--", "*.py"))
    except (OSError, subprocess.CalledProcessError):
        commit = None
    libc = platform.libc_ver() if sys.platform == "linux" else ()  # it would read python.exe
    found = {
        "python": sys.version.split()[0],
        "libc": " ".join(libc).strip() or None,  # its malloc affects memory
        "commit": commit,
    }
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
