"""The command line: statuses, messages and progress."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pyattn
from pyattn import cli
from pyattn.checks import OptionError, ShapeError
from pyattn.cli import bench as bench_command
from pyattn.cli import catalogue, content, info
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
    backends = config["backends"]["softmax"]
    assert backends["cpu"] == backends["array_api"] == "available"
    assert next(iter(config["gpu"])) in ("device 0", "none")
    assert (backends["cuda"] == "no GPU, see there") == ("none" in config["gpu"])


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pyattn.show_config(mode="dicts")


def test_show_config_refuses_another_mode():
    with pytest.raises(OptionError, match="mode must be one of"):
        pyattn.show_config(mode="xml")


def test_warmup_compiles(capsys):
    assert cli.main(["warmup", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.startswith("10 calls in ")


def picture(text):
    return [line for line in text.splitlines() if line and not line.strip("█·")]


def test_show_draws_what_a_variant_computes(capsys):
    assert cli.main(["show", "longformer", "--n", "6", "--option", "window=1", "--option",
                     "causal=True", "--option", "global_index=[3]"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("longformer_attention(q, k, v, window=1, causal=True, global_index=[3])")
    assert "pairs  14 of 36 allowed" in text
    assert picture(text) == ["█·····", "██····", "·██···", "████··", "···██·", "···███"]
    assert cli.main(["show", "coarse_fine_attention", "--n", "4", "--option", "block_size=2"]) == 0
    text = capsys.readouterr().out
    assert "4 queries, 6 keys" in text
    assert picture(text) == ["██···█", "██···█", "··███·", "··███·"]


@pytest.mark.parametrize("name", sorted(
    {*catalogue.EXAMPLES, *catalogue.GRIDS}.difference(content.NAMES)))
def test_show_draws_each_variant(name, capsys):
    short = name.replace("_attention", "")
    assert cli.main(["show", short, "--n", "64"]) == 0
    text = capsys.readouterr().out
    assert len(picture(text)) == 64
    # with values one-hot and no weight 0, the output tells who sees whom
    x, v = np.zeros((4, 64, 1)), np.broadcast_to(np.eye(64), (4, 64, 64))
    table = [np.zeros((49, 4))] if name == "swin_attention" else []
    out = getattr(pyattn, name)(x, x, v, *table, **catalogue.completed(name, {}, 64))[0]
    drawn = np.array([[cell == "█" for cell in line] for line in picture(text)])
    if name == "coarse_fine_attention":
        # eight tokens see by one mean
        drawn = drawn[:, :64] | np.repeat(drawn[:, 64:], 8, axis=1)
    assert np.array_equal(drawn, out != 0)


def drawn_for(capsys, name, *options):
    assert cli.main(["show", name, "--n", "64", *(
        part for option in options for part in ("--option", option))]) == 0
    text = capsys.readouterr().out
    return np.array([[cell == "█" for cell in line] for line in picture(text)]), text


def test_show_draws_the_soft_edge_of_a_span(capsys):
    drawn, text = drawn_for(capsys, "adaptive_span", "ramp=5")
    i, j = np.arange(64)[:, None], np.arange(64)
    assert np.array_equal(drawn, (j <= i) & (i - j < 5))
    assert "the soft edge alone" in text


@pytest.mark.parametrize(("name", "options"), [
    ("lsh", ()), ("lsh", ("causal=True", "num_rounds=1", "rng=3", "num_buckets=4")),
    ("routing", ()), ("routing", ("causal=True", "cluster_size=3")),
    ("routing", ("causal=True", "cluster_size=9", "mode=top")),
    ("top_k", ()), ("top_k", ("top=3", "causal=True")), ("graph", ()),
    ("graph", ("self_loops=False",))])
def test_show_draws_who_attends_to_whom_by_content(name, options, capsys):
    drawn, text = drawn_for(capsys, name, *options)
    full = catalogue.full_name(name)
    arguments = list(content.example(full, 64, 64, 4))
    # with values one-hot, the output tells who sees whom
    place = 1 if name == "lsh" else 2
    arguments[place] = np.broadcast_to(np.eye(64, dtype=np.float32), (4, 64, 64))
    given = catalogue.completed(full, catalogue.parse_options(list(options)), 64)
    out = getattr(pyattn, full)(*arguments, **given)
    assert np.array_equal(drawn, out[0] != 0)
    assert f"pairs  {np.count_nonzero(out):,} of" in text


@pytest.mark.parametrize("options", [
    (), ("causal=False", "window=3", "block_size=8", "stride=4", "select_block=4"),
    ("mode=kmeans", "window=3", "segment=16", "num_selected=4"),
    ("mode=kmeans", "window=3", "causal=False", "num_selected=4", "representative=medoid"),
    ("mode=lsh", "window=3", "segment=16", "num_selected=4", "rng=0", "num_clusters=2")])
def test_show_draws_the_branches_of_nsa(options, capsys):
    drawn, text = drawn_for(capsys, "nsa", *options)
    q, k = content.example("nsa_attention", 64, 64, 4)[:2]
    given = catalogue.completed("nsa_attention", catalogue.parse_options(list(options)), 64)
    eye = np.broadcast_to(np.eye(64, dtype=np.float32), (4, 64, 64))
    near = pyattn.nsa_attention(q, k, eye, np.array([0.0, 1, 1]), **given)[0]
    far, saved = pyattn.nsa_attention.forward(q, k, eye, np.array([1.0, 0, 0]), **given)
    assert np.array_equal(drawn[:, :64], near != 0)
    # each key that sums up others has the mean of their values
    values = saved.branches[0].saved.attended.v[0]
    assert f"after them {len(values)} keys" in text
    assert drawn.shape == (64, 64 + len(values))
    assert np.array_equal(drawn[:, 64:] @ (values != 0), far[0] != 0)
    assert drawn[:, 64:].any()


@pytest.mark.parametrize("options", [(), ("step=1", "causal=True"), ("step=64",)])
def test_show_draws_spans_at_their_first_tokens(options, capsys):
    drawn, _ = drawn_for(capsys, "bp", *options)
    given = catalogue.completed("bp_attention", catalogue.parse_options(list(options)), 64)
    zeros, eye = np.zeros((1, 64, 4)), np.eye(64)[None]
    out = pyattn.bp_attention(zeros, zeros, eye, log_size=False, **given)[0]
    # all spans weigh alike, and a token has its share of one
    for i, line in enumerate(drawn):
        first = np.flatnonzero(line)
        size = np.diff(np.append(first, i + 1 if "causal=True" in options else 64))
        np.testing.assert_allclose(out[i, :size.sum()], np.repeat(1 / (len(first) * size), size))
        assert not out[i, size.sum():].any()


def test_show_draws_the_graph_of_gat(capsys):
    drawn, text = drawn_for(capsys, "gat")
    graph = content.example("gat_attention", 64, 64, 4)[-1]
    assert np.array_equal(drawn, (graph.toarray() != 0) | np.eye(64, dtype=bool))
    assert text.startswith("gat_attention(h, a_query, a_key, graph)")


@pytest.mark.parametrize("name", content.NAMES)
@pytest.mark.parametrize("n", ["0", "1", "130"])
def test_show_draws_variants_by_content_at_any_length(name, n, capsys):
    assert cli.main(["show", name, "--n", n, "--heads", "2"]) == 0
    assert f"{int(n):,} queries" in capsys.readouterr().out


def test_show_counts_the_tiles_that_a_variant_executes(capsys):
    assert cli.main(["show", "sliding_window", "--n", "1024", "--heads", "2", "--option",
                     "window=0"]) == 0
    assert "run    16 tiles by each head" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "says"), [
    (["axial", "--option", "shape=(8, 8)", "--n", "65"], "with 64 tokens, the cells of shape"),
    (["swin", "--option", "shape=8", "--option", "window=4"], "it needs arrays, bias_table"),
    (["cross_modal"], "cross_modal_attention needs --option modality_lengths=..."),
    (["longformer", "--option", "windw=3"], "--option of longformer_attention must be one of"),
    (["lsh", "--n", "64", "--m", "65"], "--m must be left out for lsh_attention"),
    (["top_k", "--option", "tpo=3"], "--option of top_k_attention must be one of top"),
    (["top_k", "--heads", "0"], "--heads must be at least 1; got 0"),
    (["nsa", "--n", "-1"], "--n must be at least 0; got -1"),
    (["causal", "--option", "window=3"], "--option is for variants; 'causal' is none"),
    (["longformer", "--heads", "0"], "--heads must be at least 1; got 0"),
    (["longformer", "--n", "-1"], "--n must be at least 0; got -1"),
    (["longformers"], "there is no mask 'longformers'"),
])
def test_show_says_what_cannot_be_drawn(arguments, says, capsys):
    assert cli.main(["show", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


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
