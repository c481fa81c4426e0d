"""The tuning table: where it comes from, what it may change, and how it is measured."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from pyattn.kernels.cpu import softmax, tuning
from pyattn.kernels.cpu.tuning import CANDIDATES, DEFAULT, Table

import pyattn
from pyattn import cli
from pyattn.cli import tune

OTHER = Table(chunk={"float32": 2, "float64": 16, "bfloat16": 4},
              short={"float32": 1, "float64": 64, "bfloat16": 32})


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No table has been read yet, and none is at its usual place."""
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path / "cache")
    tuning._kept.cache_clear()
    yield
    tuning._kept.cache_clear()


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_built_in_figures_until_there_are_others():
    assert tuning.table() == DEFAULT
    assert tuning.source() is None


def test_a_saved_table_is_the_hosts():
    path = tuning.save(OTHER)
    assert path == tuning.host_file() == tuning.source()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert tuning.table() == OTHER


def test_another_host_has_another_file(monkeypatch):
    mine = tuning.host_file()
    target = tuning.host.target()
    monkeypatch.setattr(tuning.host, "target", lambda: target._replace(cpu="other"))
    assert tuning.host_file() != mine


def test_the_variable_names_a_file_or_the_built_in_figures(monkeypatch, tmp_path):
    tuning.save(dataclasses.replace(DEFAULT, chunk=OTHER.chunk))
    monkeypatch.setenv(tuning.VARIABLE, str(write(tmp_path / "t", dataclasses.asdict(OTHER))))
    assert tuning.table() == OTHER
    tuning._kept.cache_clear()
    monkeypatch.setenv(tuning.VARIABLE, "default")
    assert tuning.table() == DEFAULT


@pytest.mark.parametrize("content", [
    None, "", "{", "[]", {"chunk": DEFAULT.chunk}, {"chunk": {}, "short": {}},
    *(dataclasses.asdict(DEFAULT) | {"short": DEFAULT.short | {"float64": figure}}
      for figure in ("8", 8.5, 0, 65, None))])
def test_a_table_that_cannot_be_used_is_refused(content, monkeypatch, tmp_path):
    path = tmp_path / "table"
    if content is not None:
        write(path, content)
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    x = np.ones((1, 1, 2, 4), np.float32)
    with pytest.raises(pyattn.OptionError, match=f"the tuning table {path}"):
        pyattn.attention(x, x, x)


def test_nowhere_to_keep_a_table(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "cache_folder", lambda: None)
    assert tuning.save(OTHER) is None
    (tmp_path / "file").touch()
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path / "file" / "folder")
    assert tuning.save(OTHER) is None


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("n", [6, 200])
def test_a_table_changes_results_by_rounding_alone(dtype, n, monkeypatch):
    """A chunk is a step of the running softmax; few queries are taken row by row."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((2, 2, length, 64)).astype(dtype)
                     for length in (n, 1100, 1100, n))
    kind = "float32" if dtype == "float16" else dtype
    chunks, plan = set(), softmax.forward_plan

    def noted(*arguments, **options):
        chunks.add(options["chunk"])
        return plan(*arguments, **options)

    monkeypatch.setattr(softmax, "forward_plan", noted)

    def results(chunk, short):
        table = Table(chunk=DEFAULT.chunk | {kind: chunk}, short=DEFAULT.short | {kind: short})
        with tuning.trial(table):
            out, saved = pyattn.attention.forward(q, k, v, causal=True, window=700)
            return (out, *saved.backward(dout))

    first = results(DEFAULT.chunk[kind], DEFAULT.short[kind])
    for chunk, short in itertools.product((2, 16), (1, 64)):
        for x, right in zip(results(chunk, short), first, strict=True):
            right = right.astype(np.float64)
            allowed = 8 * float(ml_dtypes.finfo(dtype).eps) * np.abs(right).max()
            np.testing.assert_allclose(x.astype(np.float64), right, rtol=0, atol=allowed)
    assert chunks == {2, 16, DEFAULT.chunk[kind]}


def test_measured_figures_are_the_fastest(monkeypatch):
    """With times that are known: chunks of 4 are fastest, and up to 16 queries are short."""
    def times(call, tables):
        first = {figure: abs(figure - 4) for figure in tables}
        return first if set(tables) == set(CANDIDATES["chunk"]) else {
            figure: 1 + (figure > 16) - (1 < figure <= 16) for figure in tables}

    told = []
    monkeypatch.setattr(tune, "_alternate", times)
    assert tune.measure(told.append) == Table(chunk=dict.fromkeys(DEFAULT.chunk, 4),
                                              short=dict.fromkeys(DEFAULT.short, 16))
    assert len(told) == 6


def test_times_are_of_the_table_they_are_named_for(monkeypatch):
    clock = iter(itertools.accumulate(itertools.cycle([0, 1, 0, 2])))
    used = []
    monkeypatch.setattr(tune.time, "perf_counter", lambda: next(clock))
    tables = {1: DEFAULT, 2: OTHER}
    found = tune._alternate(lambda: used.append(tuning.table()), tables, turns=2)
    assert used == [DEFAULT, DEFAULT, OTHER, OTHER] * 2
    assert found == {1: 1, 2: 2}
    assert tuning.table() == DEFAULT


def test_warmup_keeps_what_it_measures(monkeypatch, capsys):
    monkeypatch.setattr(tune, "measure", lambda advance: OTHER)
    threads = pyattn.get_num_threads()
    assert cli.main(["warmup", "--dtype", "float32", "--tune"]) == 0
    assert f"kept in {tuning.host_file()}" in capsys.readouterr().out
    assert tuning.table() == DEFAULT, "the figures of a process are fixed"
    tuning._kept.cache_clear()
    assert tuning.table() == OTHER
    assert pyattn.get_num_threads() == threads
