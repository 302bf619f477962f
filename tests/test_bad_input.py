"""A user error is one line on stderr and exit status 2; nothing is half-written or lost."""

import resource
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch
from test_data import files, write_tar
from test_main_job import FILES, SMALL

import checkpoint
import data
import reference
import report
import step
import train

BAD_FLAGS = [
    (["--data", "missing.tar"], "missing.tar"),
    (["--epochs", "0"], "--epochs"),
    (["--epochs", "1.5"], "--epochs: invalid int value: '1.5'"),
    (["--batch-size", "0"], "--batch-size"),
    (["--batch-size", "61"], "--batch-size 61"),
    (["--batch-size", "61", "--repeat", "2"], "--batch-size 61"),
    (["--lr", "0"], "--lr"),
    (["--lr", "1e39"], "--lr: 1e39 must be above 0 and at most 1e+30"),
    (["--repeat", "0"], "--repeat"),
    (["--target", "0"], "--target"),
    (["--weight-decay", "1e39"], "--weight-decay"),
    (["--cutout", "33"], "--cutout"),
    (["--cutout-min", "17"], "--cutout-min 17"),
    (["--augment", "none", "--flip-p", "1"], "--flip-p does nothing with --augment none"),
    (["--brightness", "1"], "--brightness does nothing alone: set --brightness-contrast-p too"),
    (["--contrast", "0.3"], "--contrast does nothing alone: set --brightness-contrast-p too"),
    (["--rgb-shift", "9", "0", "0"], "--rgb-shift does nothing alone: set --rgb-shift-p too"),
    (["--rgb-shift-p", "0.5"], "--rgb-shift-p does nothing alone: set --rgb-shift too"),
    (["--fill", "256"], "--fill"),
    (["--scale", "1"], "--scale"),
    (["--momentum", "1"], "--momentum"),
    (["--cutout-min", "0"], "--cutout-min"),
    (["--seed", "2147483649"], "--seed"),
    (["--dropout", "1"], "--dropout"),
    (["--holdout", "5000"], "--holdout"),
    (["--resume", "nowhere"], "nowhere/config.json"),
    (["--epochs", "1" + 400 * "0"], "--epochs"),
    (["--epoch", "3"], "--epoch"),
    (["--out", "file/run"], "--out file/run cannot be written to: "),
    (["--out", "file"], "--out file"),
    (["--data", "cifar10", "--data-dir", "file"], "--data-dir file cannot be used"),
    (["--out", "r\udcff"], "r\\udcff"),
    (["--data", "two\nlines.tar"], "two\\nlines"),
]
LIMITED = "target flip-p label-smoothing shift rotate affine-p cutout-p rgb-shift-p"
LIMITED += " brightness contrast brightness-contrast-p workers repeat"
BAD_FLAGS += [([f"--{name}", "9999"], f"--{name}: 9999 must be") for name in LIMITED.split()]
if not torch.cuda.is_available():
    BAD_FLAGS.append((["--device", "cuda"], "--device cuda: not available"))


@pytest.mark.parametrize(("arguments", "named"), BAD_FLAGS, ids=lambda value: str(value))
def test_bad_flags(tmp_path, monkeypatch, refused, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    assert named in refused(train.main, *SMALL, *arguments)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["file"]


@pytest.mark.parametrize("name", sorted(FILES - {"config.json"}))
def test_a_file_of_the_users_is_not_overwritten(name, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(data, "load", Mock(side_effect=AssertionError))  # it would take minutes
    (tmp_path / name).write_text("kept")
    said = f"{name} already exists; choose another --out"
    assert said in refused(train.main, *SMALL, "--out", tmp_path)
    assert (tmp_path / name).read_text() == "kept"


def test_a_run_that_nobody_reads(tmp_path, monkeypatch):
    def closed(line):
        raise BrokenPipeError

    monkeypatch.setattr(report, "format_line", closed)
    with pytest.raises(BrokenPipeError):  # which common.exit_status turns into 141
        train.run_all([*SMALL, "--out", str(tmp_path)])


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, refused):
    folder = tmp_path / "run"
    extra = ["--lr", "1e30", "--epochs", "1", "--precision", "fp32", "--out", folder]
    error = refused(train.main, *SMALL, *extra)
    assert "at step " in error
    assert "learning rate" in error
    assert not (folder / "last.pt").exists()


def test_weights_that_are_no_numbers_are_not_kept(tmp_path, refused, no_pictures):
    """Epoch 7's only step, the first with --sam, ruins them; the loss before it is finite."""
    folder = tmp_path / "run"
    one_step = ["--epochs", "8", "--batch-size", "60", "--net", "net136k", "--sam", "1e30"]
    said = "error: the test loss is nan after epoch 7: start again in another --out, "
    said += "with a lower --lr or --precision fp32"
    assert refused(train.main, *SMALL, *one_step, "--out", folder) == said
    content = checkpoint.load(folder / "last.pt")
    assert len(content["history"]) == 6
    assert all(value.isfinite().all() for value in content["net"].values())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        MemoryError("Unable to allocate 9.00 GiB for an array"),
    ],
)
def test_out_of_memory_is_one_line(tmp_path, monkeypatch, refused, error):
    def exhausted(*_):
        raise error

    monkeypatch.setattr(step, "train_step", exhausted)
    assert refused(train.main, *SMALL, "--out", tmp_path / "run") == (
        "error: --batch-size 20: cpu is out of memory; start a new run with a smaller one, "
        f"or free memory: --resume {tmp_path}/run continues after the last finished epoch"
    )
    monkeypatch.setattr(data, "load", exhausted)
    said = "error: out of memory: free some memory or use another device"
    assert refused(train.main, *SMALL, "--out", tmp_path / "other") == said


def test_a_mistake_of_ours_is_no_lack_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "train_step", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train.main([*SMALL, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("module", ["torch._inductor.exc", "torch._dynamo.exc"])
def test_a_missing_compiler_is_one_line(module, tmp_path, monkeypatch, refused):
    class InvalidCxxCompiler(RuntimeError):
        __module__ = module

    def compiled(net, dynamic):
        def failing(*_):
            raise InvalidCxxCompiler("No working C++ compiler found\nin all of these places")

        return failing

    monkeypatch.setattr(torch, "compile", compiled)
    said = "error: --compile: No working C++ compiler found; train without it"
    assert refused(train.main, *SMALL, "--compile", "--out", tmp_path / "run") == said


@pytest.mark.parametrize("before", ["", "Caught RuntimeError in DataLoader worker process 0.\n"])
def test_a_worker_that_fails_is_one_line(tmp_path, monkeypatch, refused, before):
    said = "DataLoader worker (pid 7) is killed by signal: Bus error."

    def failing(*settings):
        assert settings[-1] == 3
        raise RuntimeError(f"{before}{said}\n")

    monkeypatch.setattr(reference, "loader", failing)
    run = ["--augment", "albumentations", "--workers", "3", "--out", tmp_path / "run"]
    line = refused(train.main, *SMALL, *run)
    assert line.startswith(f"error: --workers 3: {said}; resume with --workers 0: --resume ")


@contextmanager
def a_full_disk():
    """A limit on file size, which a checkpoint exceeds, stands in for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_line_that_names_the_way_on(tmp_path, refused, no_pictures):
    folder = tmp_path / "run"
    with a_full_disk():
        error = refused(train.main, *SMALL, "--net", "net136k", "--out", folder)
    assert f"File too large: '{folder}/last.pt'; --resume {folder}" in error
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert train.main(["--resume", str(folder)]) == 0


def test_a_decoded_archive_that_the_disk_has_no_room_for(tmp_path, capsys):
    path = write_tar(tmp_path / "pets.tar", files(train=200))
    with a_full_disk():
        dataset = data.load(str(path), tmp_path, torch.device("cpu"))
    assert len(dataset.train_images) == 400
    assert "decoded images are not cached: " in capsys.readouterr().err


def test_a_folder_without_a_run_is_none_to_resume(tmp_path, monkeypatch, refused):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(report, "write_json", full)
    for more in ([], ["--repeat", "2"]):
        said = refused(train.main, *SMALL, "--out", tmp_path, *more)
        assert said.startswith(f"error: --out {tmp_path} cannot be written to: ")
        assert "--resume" not in said
