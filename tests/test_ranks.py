"""Two processes train one net as a single one would, with gloo on the CPU."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import exit_codes, joined, start, together, wait_for
from test_data import files, write_tar
from test_main_job import SMALL, lines

import checkpoint
import data
import flags
import ranks
import report
import run_folders
import step
import train
from common import UserError

CPU = torch.device("cpu")
RUN = ["--device", "cpu", "--batch-size", "40", "--epochs", "4", "--lr", "0.1"]
RUN += ["--net", "net136k", "--precision", "fp32"]
CPP_STACK = "Exception raised from createNCCLComm at NCCLUtils.cpp:94:\nframe #0: c10::Error"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The flags of the run, on 124 training images; each process evaluates one batch."""
    path = tmp_path_factory.mktemp("data") / "pets.tar"
    return [*RUN, "--data", str(write_tar(path, files(train=62, test=270)))]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, run):
    folder = tmp_path_factory.mktemp("pair")
    assert together(2, [*run, "--out", folder / "run"], folder) == [0, 0]
    return folder, [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]


def test_every_image_is_seen_once_an_epoch(pair):
    for first in range(0, 12, 3):  # three batches an epoch; the last epoch is sharpness-aware
        batches = slice(first, first + 3)
        seen = torch.cat([batch for rank in pair[1] for batch in rank["seen"][batches]])
        assert len(seen) == 120
        assert len(seen.unique()) == 120


def test_no_two_processes_draw_the_same_in_any_epochs(monkeypatch):
    drawn = []
    for rank in range(4):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        for seed in range(1, 5):  # as consecutive epochs have
            torch.manual_seed(seed)
            ranks.own_streams()
            drawn.append(torch.rand(4))
    assert len(torch.stack(drawn).unique(dim=0)) == 16


def test_what_has_no_gradient_is_left_alone(monkeypatch):
    net = torch.nn.ModuleList([torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)])
    for parameter in net[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "total", lambda tensor: 6 * tensor)
    ranks.average_gradients(net)
    assert all((parameter.grad == 3).all() for parameter in net[0].parameters())
    assert all(parameter.grad is None for parameter in net[1].parameters())


def test_the_processes_have_the_same_net_after_each_epoch(pair):
    for one, other in zip(*(rank["nets"] for rank in pair[1]), strict=True):
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
    saved = checkpoint.load(pair[0] / "run/model.pt")["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in one.items())


def test_two_processes_learn_what_one_does(tmp_path):
    """The images are all the same, so any share of a batch has the batch's statistics."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(file := io.BytesIO(), "PNG")
    archive = write_tar(tmp_path / "noise.tar", dict.fromkeys(files(train=40), file.getvalue()))
    run = [*RUN, "--epochs", "2", "--optimizer", "sgd", "--augment", "none", "--data", archive]
    assert together(2, [*run, "--repeat", "2", "--out", tmp_path / "two"], tmp_path) == [0, 0]
    assert json.loads((tmp_path / "two/summary.json").read_text())["seeds"] == [0, 1]
    assert exit_codes([start([*run, "--out", tmp_path / "one"])]) == [0]
    folders = tmp_path / "two/s0", tmp_path / "one"
    nets = (checkpoint.load(folder / "model.pt")["state_dict"] for folder in folders)
    torch.testing.assert_close(*nets, rtol=1e-3, atol=1e-5)
    for two, one in zip(*map(lines, folders), strict=True):
        for figure in ("train_loss", "train_accuracy"):
            assert two[figure] == pytest.approx(one[figure], rel=1e-3)


def test_the_accuracy_is_that_of_one_process(pair, run, capsys):
    net, _ = checkpoint.load_net(pair[0] / "run/model.pt")
    dataset = data.load(run[-1], None, CPU)
    net.to(memory_format=torch.channels_last)
    logits = step.predict_logits(net, dataset, "fp32")
    written = torch.from_numpy(np.load(pair[0] / "run/predictions.npy"))
    torch.testing.assert_close(written, logits)
    expected = report.accuracy(logits, dataset.test_labels)
    last, loss = lines(pair[0] / "run")[-1], F.cross_entropy(logits, dataset.test_labels).item()
    assert last["test_accuracy"] == expected
    assert last["test_loss"] == pytest.approx(loss, rel=1e-4)
    summary = json.loads((pair[0] / "run/summary.json").read_text())
    assert (summary["final_accuracy"], summary["processes"]) == (expected, 2)
    assert summary["command"].startswith("torchrun --nproc-per-node=2 train.py --device cpu")
    assert ", 2 processes, " in (pair[0] / "run/card.md").read_text()
    report.announce(summary, dataset, pair[0])
    assert capsys.readouterr().out.startswith(
        f"device     {summary['device']}, fp32, 2 processes\n"
    )


def test_a_batch_that_cannot_be_shared_says_what_can_be_changed(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 3)
    for argv, way in ([], "use a multiple"), (["--resume", "run"], "resume with another number"):
        args = flags.make_parser().parse_args(argv)
        with pytest.raises(UserError, match=f"--batch-size 256: .* by 3 processes; {way}"):
            train.refuse_batch_size(args, None)


@pytest.mark.parametrize(
    "wrong",  # the same in both; met first by process 0, twice; met by it alone
    ["--batch-size=41", "--data=missing.tar", "--out=there", "--out=there/config.json/run"],
)
def test_a_mistake_ends_both(wrong, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/config.json").touch()
    assert together(2, [*run, "--out", "run", wrong], tmp_path) == [2, 2]
    assert not (tmp_path / "run").exists()


def test_processes_that_read_different_images(tmp_path, run):
    other = write_tar(tmp_path / "other.tar", files(train=62, test=271))
    processes = joined(2, [*run, "--out", tmp_path / "run"], tmp_path, [[], ["--data", other]])
    assert exit_codes(processes) == [2, 2]
    assert not (tmp_path / "run").exists()


def test_a_run_that_only_another_process_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "gathered", lambda found: [found, True])
    with pytest.raises(UserError, match=f"--out {tmp_path}: a run already exists"):
        run_folders.refuse_existing(tmp_path)


def test_process_0_goes_first(monkeypatch):
    def read(*_):
        seen.append("read")
        raise UserError("no image")

    seen = []
    monkeypatch.setattr(data, "load", read)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks.dist, "barrier", lambda: seen.append("barrier"))
    for rank, expected in ((0, ["read", "barrier"]), (1, ["barrier", "read"])):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        assert train.main(["--device", "cpu"]) == 2
        assert seen == expected
        seen.clear()


@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 1)])
@pytest.mark.parametrize("mistake", [None, UserError])
def test_how_processes_join_and_part(device, mistake, monkeypatch):
    for name in ("is_torchelastic_launched", "init_process_group", "destroy_process_group"):
        monkeypatch.setattr(ranks.dist, name, Mock())
    with suppress(UserError), ranks.joined(device):
        if mistake:
            raise mistake
    (backend,), settings = ranks.dist.init_process_group.call_args
    assert (backend, settings["device_id"]) == (
        ("gloo", None) if device == CPU else ("nccl", device)
    )
    assert settings["timeout"] >= timedelta(minutes=30)  # for process 0 to download and decode
    parted = ranks.dist.destroy_process_group.called
    assert parted == (device == CPU or mistake is None)


@pytest.mark.parametrize(
    ("error", "ends_as"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer"), UserError),
        (torch.distributed.DistBackendError(f"NCCL error: Duplicate GPU\n{CPP_STACK}"), UserError),
        (RuntimeError("an error of our own"), RuntimeError),
    ],
)
def test_a_process_lost_before_the_first_epoch(error, ends_as, monkeypatch):
    """Such as one killed while another decodes the images."""
    monkeypatch.setattr(ranks.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(ends_as) as ended, ranks.joined(CPU):
        raise error
    assert str(error).partition("\n")[0] in str(ended.value)
    assert "frame #0" not in str(ended.value)


def test_a_process_lost_within_an_epoch(tmp_path, monkeypatch, capsys):
    def gone(*_):
        monkeypatch.setattr(ranks, "count", lambda: 2)
        raise RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer")

    monkeypatch.setattr(step, "train_step", gone)
    assert train.main([*SMALL, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: another process has ended or cannot be reached ([../gloo/")
    assert f" closed by peer); --resume {tmp_path}/run continues" in error


def test_the_others_hear_of_a_full_disk(monkeypatch):
    monkeypatch.setattr(ranks, "gathered", told := Mock(return_value=[True]))
    with pytest.raises(OSError, match="full"):
        ranks.by_main(Mock(side_effect=OSError("full")))
    told.assert_called_once_with(True)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    with pytest.raises(UserError, match="process 0 failed"):
        ranks.by_main(job := Mock())
    job.assert_not_called()


@pytest.mark.slow
def test_three_processes_resumed_end_with_the_same_bits(tmp_path, run):
    """With only two, any order of summation gives the same result."""
    flags = [*run, "--batch-size", "60", "--epochs", "12", "--out"]
    assert together(3, [*flags, tmp_path / "whole"], tmp_path) == [0] * 3
    processes = joined(3, [*flags, tmp_path / "ended"], tmp_path)
    wait_for(tmp_path / "ended/metrics.jsonl", processes[0].is_alive)
    processes[1].terminate()
    assert exit_codes(processes) == [143] * 3
    assert together(3, ["--resume", tmp_path / "ended"], tmp_path) == [0] * 3
    nets = [checkpoint.load(tmp_path / n / "model.pt")["state_dict"] for n in ("whole", "ended")]
    assert all(torch.equal(value, nets[1][name]) for name, value in nets[0].items())


def test_resumed_by_another_number_of_processes(tmp_path, run):
    folder = tmp_path / "run"
    start([*run, "--epochs", "3", "--out", folder], torn_write=(2, 0.5)).join()
    before = lines(folder)
    assert len(before) == 1
    assert together(2, ["--resume", folder], tmp_path) == [0, 0]
    assert lines(folder)[:1] == before
    assert [line["epoch"] for line in lines(folder)] == [1, 2, 3]


def test_sigterm_to_one_process_ends_both(tmp_path, run):
    folder = tmp_path / "run"
    processes = joined(2, [*run, "--epochs", "400", "--out", folder], tmp_path)
    wait_for(folder / "metrics.jsonl", processes[0].is_alive)
    processes[1].terminate()
    assert exit_codes(processes) == [143, 143]


def test_a_killed_process_is_a_mistake_to_the_other(tmp_path, run):
    folder = tmp_path / "run"
    processes = joined(2, [*run, "--epochs", "400", "--out", folder], tmp_path)
    wait_for(folder / "metrics.jsonl", processes[0].is_alive)
    processes[1].kill()
    assert exit_codes(processes) == [2, -9]  # an uncaught error would be 1
    assert checkpoint.load(folder / "last.pt")["history"]


@pytest.mark.slow
def test_torchrun_and_a_process_that_dies(tmp_path, run):
    """torchrun ends the job with an error, and a single process resumes it."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "train.py", *run, "--epochs", "12", "--out", str(folder)]
    job = subprocess.Popen(
        command,
        cwd=train.__file__.rpartition("/")[0],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(folder / "metrics.jsonl", lambda: job.poll() is None)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    printed, error = job.communicate(timeout=120)
    assert printed.count(report.HEADER) == error.count("data read in") == 1
    assert job.returncode != 0
    assert "Signal 9" in error
    assert train.main(["--resume", str(folder)]) == 0
    assert [line["epoch"] for line in lines(folder)] == list(range(1, 13))


@pytest.mark.gpu
def test_a_process_for_each_gpu(tmp_path, run):
    count = torch.cuda.device_count()
    argv = [*run, "--device", "cuda", "--epochs", "2", "--batch-size", str(10 * count)]
    assert together(count, [*argv, "--out", tmp_path / "run"], tmp_path) == [0] * count
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["processes"] == count
    nets = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True)["nets"] for r in range(count)]
    for name, value in nets[0][-1].items():
        assert all(torch.equal(value.cpu(), net[-1][name].cpu()) for net in nets)
