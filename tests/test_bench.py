"""The benchmark's arithmetic: a wrong rival is not timed, and drift does not look like speed."""

from __future__ import annotations

import dataclasses
import sys
import time

import numpy as np
import pytest

from bench import harness, rivals
from bench.harness import Spread
from bench.report import markdown, plot
from bench.rows import ROWS, Row


@pytest.fixture(autouse=True)
def jax_as_it_was():
    """JAX's rival turns 64-bit types on for the whole process; the next test file has its own."""
    before = sys.modules["jax"].config.jax_enable_x64 if "jax" in sys.modules else False
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_enable_x64", before)


ROW = Row("causal", 2, 40, 8, "float32", {"causal": True}, kv_heads=1,
          rivals=("pyattn", "planted"))


def planted(spoil):
    """NumPy's rival with `spoil` done to its result."""

    def rival(row, inputs, backward):
        call, host = rivals.RIVALS["attention"]["numpy"](row, inputs, backward)
        return call, lambda result: spoil(host(result))

    return rival


def measured(monkeypatch, rival, backward=True):
    table = rivals.RIVALS["attention"]
    monkeypatch.setitem(table, "planted", rival)
    return harness.measure(ROW, backward, seconds=0.0, memory=False)


def test_rivals_that_agree_are_timed(monkeypatch):
    found = measured(monkeypatch, planted(lambda result: result))
    assert set(found.seconds) == {"pyattn", "planted"}
    assert set(found.ratios) == {"planted"}
    assert found.absent == {}


def one_row_later(result):
    return (np.roll(result[0], 1, axis=-2), *result[1:])


def wrong_gradient(result):
    return (*result[:-1], 1.001 * result[-1])


def one_nan(result):
    out = result[0].copy()
    out[0, 0, 0, 0] = np.nan
    return (out, *result[1:])


@pytest.mark.parametrize("spoil", [one_row_later, wrong_gradient, one_nan])
def test_a_wrong_rival_is_not_timed(monkeypatch, spoil):
    found = measured(monkeypatch, planted(spoil))
    assert "planted" not in found.seconds
    assert "wrong by" in found.absent["planted"]
    assert "wrong by" in markdown([found], threads=1)


@pytest.mark.parametrize("error", [ImportError("No module named 'flash'"),
                                   rivals.Unsupported("it has no causal mask")])
def test_a_rival_that_cannot_is_told_with_its_reason(monkeypatch, error):
    def rival(row, inputs, backward):
        raise error

    found = measured(monkeypatch, rival, backward=False)
    assert found.absent == {"planted": str(error)}
    assert str(error) in markdown([found], threads=1)


def test_ratios_are_taken_within_a_turn():
    """A machine that slows down fourfold midway: the pairs still say 2, the medians do not."""
    first = [1.0, 1.0, 4.0, 4.0, 4.0]
    rival = [2.0, 2.0, 2.0, 8.0, 8.0]      # the slowdown came between the two of turn 3
    assert harness.ratios(rival, first) == Spread(2.0, 2.0, 2.0)
    assert np.median(rival) / np.median(first) == 0.5


def test_spread():
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)


def test_turns_alternate_and_their_order_rotates():
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(0.03)) for name in "ab"}
    times = harness.alternate(calls, 0.0, least=3)
    assert [len(values) for values in times.values()] == [3, 3]
    # once to see how long it takes; then 3 turns, each call woken before it is timed
    assert "".join(order) == "ab" "aabb" "bbaa" "aabb"
    assert all(value >= 0.03 for values in times.values() for value in values)


def test_beyond_the_machines_own_product_is_questioned(monkeypatch):
    """More than 100% of GEMM means that GEMM was held back, not that attention is that fast."""
    found = measured(monkeypatch, planted(lambda result: result))
    rate = found.gflops("pyattn")
    assert "Above 100%" not in markdown([dataclasses.replace(found, gemm=2 * rate)], threads=1)
    assert "Above 100%" in markdown([dataclasses.replace(found, gemm=rate / 2)], threads=1)


def test_variables_that_were_taken_away_are_told(monkeypatch):
    found = measured(monkeypatch, planted(lambda result: result))
    table = markdown([found], threads=1, dropped={"OPENBLAS_CORETYPE": "Haswell"})
    assert "OPENBLAS_CORETYPE=Haswell" in table


def test_flops_count_allowed_pairs():
    dense = Row("dense", 2, 100, 16, "float32")
    assert dense.flops(backward=False) == 2 * 2 * 16 * 2 * 100 * 100
    assert dense.flops(backward=True) == 3.5 * dense.flops(backward=False)
    causal = dataclasses.replace(dense, options={"causal": True})
    assert causal.flops(False) / dense.flops(False) == 101 / 200
    window = dataclasses.replace(dense, options={"causal": True, "window": 1})
    assert window.flops(False) / dense.flops(False) == 199 / 10000
    padded = dataclasses.replace(dense, batch=2, options={"kv_lengths": (100, 50)})
    assert padded.flops(False) / dense.flops(False) == 1.5


@pytest.mark.parametrize("row", [
    dataclasses.replace(row, length=130, options=row.options | (
        {"kv_lengths": (130, 65)} if "kv_lengths" in row.options else {}))
    for row in ROWS if row.length == 512 and row.width == 64
    and (row.dtype == "float32" or row.pattern == "causal")], ids=lambda row: row.name)
@pytest.mark.parametrize("rival", rivals.RIVALS["attention"])
@pytest.mark.filterwarnings("ignore")
def test_every_rival_computes_every_row(row, rival):
    q, k, v, dout = (x.astype(np.float64) for x in row.inputs().values())
    right = rivals.dense(q, k, v, dout, row.allowed())
    try:
        call, host = rivals.RIVALS["attention"][rival](row, row.inputs(), True)
    except ImportError as missing:
        pytest.skip(str(missing))
    # JAX's attention takes the softmax of float64 in float32: reported, and not timed
    tolerance = 1e-5 if rival == "jax" else 0
    error = harness.difference(host(call()), right)
    assert error <= max(harness.TOLERANCE[row.dtype], tolerance)


def test_peak_memory_counts_what_numpy_allocates():
    row = Row("dense", 4, 1024, 16, "float32")
    peak = harness.peak_megabytes(row, False, "numpy")
    if peak is None:
        pytest.skip("this system does not tell peak memory: no /proc/self/clear_refs")
    scores = 4 * 1024 * 1024 * 4 / 2**20
    assert scores <= peak < 4 * scores


def test_the_table_and_the_plot(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot is matplotlib's")
    found = measured(monkeypatch, planted(lambda result: result))
    table = markdown([found], threads=1).splitlines()
    header = next(line for line in table if line.startswith("| problem"))
    line = next(line for line in table if line.startswith("| causal, N=40"))
    assert line.count("|") == header.count("|")
    assert "planted / pyattn" in header
    plot([found], tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
