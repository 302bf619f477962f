"""A run killed at any moment and resumed ends like the uninterrupted one, bit for bit."""

import random
import signal
import time

import pytest
from processes import exit_codes, start
from test_data import files, write_tar
from test_main_job import timeless

import checkpoint

RUN = ["--device", "cpu", "--batch-size", "20", "--epochs", "4", "--lr", "0.1", "--dropout", "0.2"]
RUN += ["--net", "net136k", "--rgb-shift", "9", "9", "9", "--rgb-shift-p", "0.5"]
RUN += ["--eager", "--data-dir=-d"]  # change nothing here, but are hard to resume with
SLOW = pytest.mark.slow


def outcome(folder):
    """The trained weights' bytes, and the metrics other than times and speeds."""
    weights, history = checkpoint.load(folder / "model.pt")["state_dict"], timeless(folder)
    assert [line["epoch"] for line in history] == [1, 2, 3, 4]
    return {name: value.numpy().tobytes() for name, value in weights.items()}, history


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The flags of the run."""
    path = tmp_path_factory.mktemp("data") / "pets.tar"
    return [*RUN, "--data", write_tar(path, files(train=30, test=10))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run):
    """An uninterrupted run's outcome and its seconds, both from the second of two such runs."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("first", "second"):
        begin = time.monotonic()
        assert exit_codes([start([*run, "--out", folder / name])]) == [0]
    return outcome(folder / "second"), time.monotonic() - begin


def finish(run, folder):
    begun = (folder / "config.json").exists()
    assert exit_codes([start(["--resume", folder] if begun else [*run, "--out", folder])]) == [0]
    return outcome(folder)


@pytest.mark.parametrize("seed", [9, 5, *(pytest.param(s, marks=SLOW) for s in range(10, 24))])
def test_killed_at_a_random_moment(run, whole, tmp_path, seed):
    expected, seconds = whole
    process = start([*run, "--out", tmp_path / "run"])
    process.join(random.Random(seed).uniform(0, seconds))
    process.kill()
    process.join()
    assert finish(run, tmp_path / "run") == expected


@pytest.mark.parametrize("seed", [3, *(pytest.param(s, marks=SLOW) for s in range(30, 38))])
def test_killed_within_a_checkpoint(run, whole, tmp_path, seed):
    chance = random.Random(seed)
    torn = chance.randint(1, 5), chance.random()  # of four checkpoints, then the net
    killed = start([*run, "--out", tmp_path / "run"], torn_write=torn)
    assert exit_codes([killed]) == [-signal.SIGKILL]
    assert finish(run, tmp_path / "run") == whole[0]
