"""How every command prints, and how it ends."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from unittest.mock import Mock

import pytest
import torch

import common

ROOT = Path(common.__file__).parent
COMMANDS = sorted(path for path in ROOT.glob("*.py") if '"__main__"' in path.read_text())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.name)
def test_each_command_exits_with_its_status(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command.name, "--unknown"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(command), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_an_output_that_knows_no_unicode(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert common.exit_status(lambda: print("2 × 2")) == 0
    assert output.buffer.getvalue() == b"2 \\xd7 2\n"


def test_an_output_that_nobody_reads():
    job = "print('x' * 99)"
    code = f"import common, sys; sys.exit(common.exit_status(lambda: {job}))"
    command = [sys.executable, "-c", f"input(); {code}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(command, cwd=Path(common.__file__).parent, env=buffered, **pipes)
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""


def test_what_is_for_a_closed_stderr_goes_nowhere(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert common.exit_status(lambda: print("skipped: a.png", file=sys.stderr)) == 0
    assert capsys.readouterr().out == ""


def test_an_error_is_a_line_of_readable_characters(capsys):
    def job():
        raise common.UserError("first\nsecond \x1b[2J\u202e")

    assert common.exit_status(job) == 2
    assert capsys.readouterr().err == "error: first second \\x1b[2J\\u202e\n"


def test_an_error_is_written_at_once(monkeypatch):
    """Else processes sharing an unbuffered stderr, as torchrun's do, would mix their lines."""

    def job():
        raise common.UserError("no")

    monkeypatch.setattr(sys, "stderr", stderr := Mock())
    assert common.exit_status(job) == 2
    stderr.write.assert_called_once_with("error: no\n")


def test_sigterm_is_no_error_that_one_could_pass_over(capsys):
    def job():
        with contextlib.suppress(Exception):
            signal.raise_signal(signal.SIGTERM)
        raise AssertionError

    before = signal.getsignal(signal.SIGTERM)
    assert common.exit_status(job) == 143
    assert capsys.readouterr().err == "terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_where_nothing_can_go_on(capsys):
    assert common.exit_status(Mock(side_effect=KeyboardInterrupt)) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_sigterm_is_noted_however_often_it_comes():
    with common.noting_sigterm() as asked:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            assert asked.is_set()


def test_a_second_sigterm_does_not_disturb_the_ending(capsys):
    def job():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            print("ended")

    assert common.exit_status(job) == 143
    assert capsys.readouterr() == ("ended\n", "terminated\n")


@pytest.mark.parametrize("cause", [common.Terminated, KeyboardInterrupt])
def test_a_signal_within_a_write_is_no_error_of_the_file(cause, tmp_path):
    class Interrupted(io.BytesIO):
        def write(self, data):
            if self.tell() > 1000:
                raise cause
            return super().write(data)

    with pytest.raises(cause), common.written_whole(tmp_path / "net.pt"):
        torch.save(torch.zeros(1000), Interrupted())
    assert not list(tmp_path.iterdir())


def test_out_of_memory_by_any_name():
    for said in (
        *("not enough memory: you tried", "can't allocate memory: you tried"),
        *("CUBLAS_STATUS_ALLOC_FAILED when", "CUBLAS_STATUS_NOT_INITIALIZED when"),
    ):
        assert common.is_out_of_memory(RuntimeError(said))


def test_what_a_library_says_first():
    said = "\nError(s) in loading state_dict for Linear:\n\tMissing key(s)"
    assert common.first_line(RuntimeError(said)) == "Error(s) in loading state_dict for Linear"


def test_the_way_on_can_be_pasted():
    assert common.going_on(Path("my run")).startswith("--resume 'my run' continues")
    assert common.going_on(PureWindowsPath("runs", "s0")).startswith("--resume runs/s0 continues")
