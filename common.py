"""What every room needs: a user's mistake, and files written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class UserError(Exception):
    """A mistake of the user's: one line that names the flag or file and the way out."""


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
