"""A run's folder: which it is, that nobody else writes there, and the run's config in it."""

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import checkpoint
import data
import ranks
import report
from common import UserError, going_on

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None


def run_folder(args: Namespace, data_name: str) -> Path:
    return Path(args.resume or args.out or f"runs/{args.net}-{data_name}-s{args.seed}")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a run's folder, created if missing, against other processes that would write there.
    Raises UserError if one has locked it; the DataLoader workers of a killed run keep its lock for
    another five seconds. Windows and some network file systems have no such locks."""
    with ExitStack() as held:

        def hold() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if fcntl is None:
                    return
                handle = os.open(folder, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"--out {folder} cannot be written to: {error}") from error
            held.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{folder}: in use by another process; wait or stop it") from error
            except OSError:
                pass

        ranks.by_main(hold)
        yield


def refuse_existing(folder: Path) -> None:
    there = [name for name in report.FILES if (folder / name).exists()]
    if any(ranks.gathered(bool(there))):
        way = f"{going_on(folder, 'it')}, or " if "config.json" in there else ""
        found = there[0] if there and not way else "a run"
        raise UserError(f"--out {folder}: {found} already exists; {way}choose another --out")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is not a folder")


def refuse_other_images(config: dict[str, Any], dataset: data.Dataset, args: Namespace) -> None:
    if config.get("images") != dataset.checksum:
        raise UserError(
            f"--resume {args.resume}: that run trains on {config.get('images')}, "
            f"not {dataset.name}'s {dataset.checksum}; "
            f"it can only continue on {config.get('data')} as it was then"
        )


def write_config(folder: Path, config: dict[str, Any]) -> None:
    try:
        ranks.by_main(partial(report.write_json, folder / "config.json", config))
    except OSError as error:  # there may be no run yet to continue
        raise UserError(f"--out {folder} cannot be written to: {error}") from error


def note_source(folder: Path, dataset: data.Dataset, args: Namespace) -> None:
    """Record in a run's config where its images lie now, and the data set's name there."""
    config = checkpoint.load_config(folder) | {"data": dataset.name}
    config["flags"] |= {"data": args.data, "data_dir": args.data_dir}
    write_config(folder, config)
