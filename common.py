"""What every room needs: a user's mistake, and files written whole or not at all."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NoReturn


class UserError(Exception):
    """A mistake of the user's: one line that names the flag or file and the way out."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def exit_status(job: Callable[[], None]) -> int:
    """Of a command: 0, or 2 for a user's mistake or a full disk, 130 for Ctrl-C: one line each."""
    try:
        job()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}".rstrip(": "), file=sys.stderr)
        return 130
    return 0


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it appears whole or, on any failure, stays as it was.

    A kill at any byte leaves the previous file, and at worst a `.tmp` beside it that the next
    writing replaces. Raises OSError where the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
