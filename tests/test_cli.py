"""The command line: statuses, messages and progress."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyattn
from pyattn import cli
from pyattn.checks import OptionError, ShapeError
from pyattn.cli import bench as bench_command
from pyattn.cli import info
from pyattn.cli import progress as progress_module
from pyattn.cli.progress import progress

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments, **settings):
    return subprocess.run([sys.executable, "-m", "pyattn", *arguments], cwd=ROOT, text=True,
                          capture_output=True, check=False, **settings)


def test_help_names_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name):
    done = command(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: python -m" in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"pyattn {pyattn.__version__}\n"


def test_an_unknown_command_is_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["trian"])
    assert stopped.value.code == 2
    assert "trian" in capsys.readouterr().err


@pytest.mark.parametrize("error", [
    ShapeError("k has width 3 but q has width 4"), OptionError("window must be positive"),
    FileNotFoundError(2, "No such file or directory", "dump.npz")])
def test_a_users_error_is_one_line_and_status_2(monkeypatch, capsys, error):
    def fail(args):
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert cli.main(["info"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith(f"info: {error}\n")
    assert said.err.count("\n") == 1


def test_our_own_error_keeps_its_traceback(monkeypatch):
    def fail(args):
        raise ZeroDivisionError

    monkeypatch.setattr(info, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


def test_interrupt_is_status_130(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupt)
    assert cli.main(["info"]) == 130


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, "-m", "pyattn", "info"], cwd=ROOT, stdout=write,
                              stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


def test_info_prints_what_show_config_returns(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    config = pyattn.show_config(mode="dicts")
    assert config["versions"]["numpy"] in text
    assert config["cpu"]["name"] in text
    assert config["backends"]["softmax"] == {"cpu": "available", "array_api": "available"}


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pyattn.show_config(mode="dicts")


def test_show_config_refuses_another_mode():
    with pytest.raises(OptionError, match="mode must be one of"):
        pyattn.show_config(mode="xml")


def test_warmup_compiles(capsys):
    assert cli.main(["warmup", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.startswith("3 calls in ")


def test_bench_says_that_it_needs_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_command, "CHECKOUT", tmp_path)
    assert cli.main(["bench", "--quick"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_bench_passes_its_arguments_on(capfd):
    assert cli.main(["bench", "--list", "--rows", "padding, N=512, D=64, float64"]) == 0
    assert capfd.readouterr().out == "key padding, N=512, D=64, float64\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_short_work_is_quiet(capsys):
    with progress("checking", total=3) as bar:
        for _ in range(3):
            bar.advance()
    assert capsys.readouterr() == ("", "")


def test_long_work_is_told_in_lines_on_stderr(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 3.0, 3.0, 4.0, 9.0, 9.0, 9.5])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with progress("checking", total=4) as bar:
        bar.advance(text="one")         # at 1 s: too early
        bar.advance(text="two")         # at 3 s: told
        bar.advance(text="three")       # at 4 s: told a second ago
        bar.advance()                   # at 9 s: told
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "checking: 2/4 two", "checking: 4/4 three", "checking: 4/4 three"]


def test_a_terminal_gets_a_bar_and_stdout_stays_ours(monkeypatch, capsys):
    pytest.importorskip("rich", reason="the bar is rich's")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("checking [all]", total=2) as bar:
        bar.advance(text="first [one]")
        print("result")
        bar.advance()
    assert capsys.readouterr().out == "result\n"
    assert "checking [all]" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()


def test_a_terminal_without_rich_gets_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(progress_module, "FIRST_LINE", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("checking", total=1) as bar:
        bar.advance()
    assert terminal.getvalue().startswith("checking: 1/1\n")
