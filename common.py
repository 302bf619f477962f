"""What every command shares: how it ends, its flags' types, files written whole or not at all."""

import argparse
import importlib.util
import io
import math
import os
import shlex
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

SIZE = 32  # side of every image, pixels


class UserError(Exception):
    """A user's mistake; the message is one line that names the flag or file and what to do."""


class Terminated(BaseException):
    """SIGTERM came. A BaseException, as KeyboardInterrupt is: no `except Exception` catches it."""


def going_on(folder: Path, how: str = "after the last finished epoch") -> str:
    """How to continue an interrupted run. Windows takes slashes too; backslashes would be quoted,
    which its cmd.exe does not understand."""
    return f"--resume {shlex.quote(folder.as_posix())} continues {how}"


def require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is missing: pip install -r requirements-extra.txt")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Any:
    """An argparse type: an int or float from `low` (excluded if `above`) to `high`, finite."""

    def parse(text: str) -> float:
        value = kind(text)
        if abs(value) == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if not low <= value <= high or (above and value == low):
            bounds = f"above {low}" if above else f"at least {low}"
            limit = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}{limit}")
        return value

    parse.__name__ = kind.__name__
    return parse


def exit_status(job: Callable[[], int | None]) -> int:
    """Run `job`; its status: its own, or 0; 2 for a user's mistake, a full disk or full memory,
    130 for Ctrl-C, 143 for SIGTERM, each with a line on stderr; 141 if nobody reads on, as in
    `| head`."""

    def end(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the ending short
        raise Terminated

    # They are None if closed, as by `2>&-`, and libraries fail on that.
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names and terminals need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    previous = signal.signal(signal.SIGTERM, end)
    # Each line below is a single write: torchrun's processes may end at the same time.
    try:
        status = job() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except (UserError, OSError) as error:
        line = " ".join(str(error).split())  # a library's message may have several
        sys.stderr.write(f"error: {printable(line)}\n")
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sys.stderr.write("error: out of memory: free some memory or use another device\n")
        return 2
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"interrupted: {interrupt}".rstrip(": ") + "\n")
        return 130
    except Terminated as terminated:
        sys.stderr.write(f"terminated: {terminated}".rstrip(": ") + "\n")
        return 143
    finally:
        signal.signal(signal.SIGTERM, previous)
    return status


def with_exit_status(main: Callable[[list[str]], int | None]) -> Callable[[list[str]], int]:
    """A file's `main` as its command, which ends as `exit_status` says."""
    return lambda argv: exit_status(lambda: main(argv))


def printable(text: str) -> str:
    """`text`, such as a file's name, with escapes for characters that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


OUT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory", "ALLOC_FAILED")
OUT_OF_MEMORY += ("STATUS_NOT_INITIALIZED",)  # what cuBLAS and cuDNN call it


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether PyTorch or NumPy ran out of memory, on a GPU or the host."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def first_line(error: Exception) -> str:
    """What a library's error says, without the lines that only its developers read."""
    return str(error).strip().partition("\n")[0].rstrip(":")


@contextmanager
def noting_sigterm() -> Iterator[threading.Event]:
    """While this lasts, SIGTERM only sets the event, however often it comes: `timeout`, say, sends
    it to a process and again to its group."""
    asked = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def written_whole(path: Path, ending: str = ".tmp") -> Iterator[BinaryIO]:
    """Open `path` for writing so that it appears whole or, on any failure, stays as it was.

    A kill at any byte leaves the previous file, and at worst a partial one with `ending` beside it,
    which the next write with that ending replaces. Raises OSError if the folder is not writable.
    """
    temporary = path.with_name(path.name + ending)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        stops = (OSError, KeyboardInterrupt, Terminated)  # such as a full disk
        if isinstance(error, RuntimeError) and isinstance(error.__context__, stops):
            error = error.__context__  # on which torch.save fails a second time
        if isinstance(error, OSError) and error.errno:
            error.filename = str(path)
        raise error


def check_sums(path: Path) -> None:
    """Verify the checksums of a file saved by torch, a zip of uncompressed members: `torch.load`
    reads damaged tensors without complaint. Raises ValueError, and whatever `zipfile` raises."""
    with zipfile.ZipFile(path) as file:
        if any(member.compress_type for member in file.infolist()):
            raise ValueError("a member is compressed")
        if damaged := file.testzip():
            raise ValueError(f"{damaged} is damaged")
