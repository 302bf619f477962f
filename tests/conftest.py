import functools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import data
import plots
import synthetic

# Ctrl-C is tested, but a shell starts background jobs with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
cache = tempfile.TemporaryDirectory()  # for fixtures and processes that outlive a test
os.environ["XDG_CACHE_HOME"] = cache.name
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on a CPU, slowly; read when imported


def pytest_addoption(parser):
    parser.addoption("--images", help="compare augmentations on this folder's or archive's images")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def images(request):
    """1,000 images uint8 (N, 3, 32, 32): generated, or those of --images."""
    source = request.config.getoption("--images")
    if source is None:
        return synthetic.shapes(1000, seed=7)[0]
    return data.load(source, Path(), torch.device("cpu"), train_images=1000).train_images


@pytest.fixture(scope="session", autouse=True)
def _generated_once():
    """Generate the synthetic images only once: most tests train on the same ones."""
    synthetic.shapes = functools.cache(synthetic.shapes)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run's folder and its stdout. A file beside the folder has its stderr, in which
    Python names every module that the run imported."""
    from test_main_job import SMALL

    folder = tmp_path_factory.mktemp("finished") / "run"
    command = [sys.executable, "train.py", *SMALL, "--out", str(folder), "--target", "0.01"]
    place = {"cwd": Path(__file__).parents[1], "env": os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}}
    result = subprocess.run(command, capture_output=True, text=True, **place)
    assert result.returncode == 0, result.stderr
    (folder.parent / "stderr").write_text(result.stderr)
    return folder, result.stdout


@pytest.fixture
def no_pictures(monkeypatch):
    """Skip drawing, which takes longer than the tests' small runs."""
    monkeypatch.setattr(plots, "draw_run", lambda *_: None)
    monkeypatch.setattr(plots, "examples", lambda *_: None)


@pytest.fixture
def refused(capsys):
    """A function that has a command refuse its arguments, and returns the one line that it says."""

    def said(main, *arguments):
        assert main([*map(str, arguments)]) == 2
        lines = capsys.readouterr().err.splitlines()
        (line,) = (line for line in lines if not line.startswith("data read"))
        assert line.startswith("error: ")
        return line

    return said


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Seed each test's random numbers, and keep tests away from the user's cache."""
    torch.manual_seed(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
