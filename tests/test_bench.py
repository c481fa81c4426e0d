"""The benchmark's arithmetic: a wrong rival is not timed, and drift does not look like speed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest

import pyattn
from bench import content_peers, harness, linear_peers, rivals
from bench.content import CONTENT, CONTENT_ROWS, DECIDED, LONGEST, ContentRow, content_row
from bench.harness import Spread
from bench.linear import LENGTHS as LINEAR_LENGTHS
from bench.linear import LINEAR, LINEAR_ROWS, LinearRow, linear_row
from bench.report import markdown, plot, target_table
from bench.rows import PATTERN_LENGTHS, PATTERNS, ROWS, PatternRow, Row, pattern_row
from bench.targets import (
    BACKWARD,
    CONTENT_TARGETS,
    DECIDING,
    FORWARD,
    GROWTH,
    LINEAR_TARGETS,
    MACHINE,
    MEGABYTES,
    MEMORY,
    MICROSECONDS,
    PATTERN_TARGETS,
    TARGETS,
    Target,
    reached,
)

BENCH = Path(rivals.__file__).parent


def require_not_installed(absent):
    """Raise an ImportError again unless all it says is that a rival's package is not there.

    One from inside a package, or of a name that a package lacks, says that the rival is broken.
    """
    if not isinstance(absent, ImportError):
        return
    places = [Path(frame.filename) for frame in traceback.extract_tb(absent.__traceback__)
              if "importlib" not in frame.filename]
    package = (absent.name or "").partition(".")[0]
    own = not places or places[-1].parent in (BENCH, Path(__file__).parent)
    if not (own and package and importlib.util.find_spec(package) is None):
        raise absent


def test_a_rival_is_skipped_only_where_its_package_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "broken_rival.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, broken in (("no_such_package_anywhere", False),
                         ("no_such_package_anywhere.inside", False), ("broken_rival", True),
                         ("broken_rival.inside", True), ("json.no_such_module", True)):
        with pytest.raises(ImportError) as found:
            importlib.import_module(name)
        if broken:
            with pytest.raises(ImportError):
                require_not_installed(found.value)
        else:
            require_not_installed(found.value)
    with pytest.raises(ImportError):
        require_not_installed(ImportError("cannot import name", name="json"))
    require_not_installed(rivals.Unsupported("it has no causal mask"))


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


def test_a_slow_call_is_timed_in_one_turn(monkeypatch):
    monkeypatch.setattr(harness, "PATIENCE", 0.02)
    made = []
    calls = {name: lambda name=name, seconds=seconds: (made.append(name), time.sleep(seconds))
             for name, seconds in {"first": 0.001, "slow": 0.03}.items()}
    times = harness.alternate(calls, 0.0, least=3)
    assert len(times["first"]) == 3
    assert len(times["slow"]) == 1
    # to see how long it takes, to wake it, and the turn
    assert made.count("slow") == 3
    assert harness.ratios([8.0], [2.0, 1.0, 1.0]) == Spread(4.0, 4.0, 4.0)


def test_a_call_that_takes_very_long_is_made_once(monkeypatch):
    monkeypatch.setattr(harness, "PATIENCE", 0.02)
    monkeypatch.setattr(harness, "ENOUGH", 0.04)
    made = []
    calls = {name: lambda name=name, seconds=seconds: (made.append(name), time.sleep(seconds))
             for name, seconds in {"first": 0.001, "endless": 0.05}.items()}
    times = harness.alternate(calls, 0.0, least=3)
    assert [len(values) for values in times.values()] == [3, 1]
    assert times["endless"][0] >= 0.05
    assert made.count("endless") == 1


def test_beyond_the_machines_own_product_is_questioned(monkeypatch):
    """More than 100% of GEMM means that GEMM was held back, not that attention is that fast."""
    found = measured(monkeypatch, planted(lambda result: result))
    for share, questioned in ((0.5, False), (2.0, True)):
        found.share = Spread.of([share])
        assert ("Above 100%" in markdown([found], threads=1)) == questioned


def test_variables_that_were_taken_away_are_told(monkeypatch):
    found = measured(monkeypatch, planted(lambda result: result))
    table = markdown([found], threads=1, dropped={"OPENBLAS_CORETYPE": "Haswell"})
    assert "OPENBLAS_CORETYPE=Haswell" in table


def test_flops_count_allowed_pairs():
    dense = Row("dense", 2, 100, 16, "float32")
    assert dense.work(backward=False) == 2 * 2 * 16 * 2 * 100 * 100
    assert dense.work(backward=True) == 3.5 * dense.work(backward=False)
    causal = dataclasses.replace(dense, options={"causal": True})
    assert causal.work(False) / dense.work(False) == 101 / 200
    window = dataclasses.replace(dense, options={"causal": True, "window": 1})
    assert window.work(False) / dense.work(False) == 199 / 10000
    padded = dataclasses.replace(dense, batch=2, options={"kv_lengths": (100, 50)})
    assert padded.work(False) / dense.work(False) == 1.5


@pytest.mark.parametrize("options", [
    {"causal": True}, {"window": 3}, {"causal": True, "window": 3}, {"kv_lengths": (21, 9)}])
def test_pairs_and_parts_of_the_mask_agree_with_the_mask(options):
    row = Row("any", 1, 7, 8, "float32", options, batch=2, keys=21)
    allowed = row.allowed()
    i = np.arange(7)[:, None] + np.reshape(options.get("kv_lengths", 21), (-1, 1, 1, 1)) - 7
    j = np.arange(21)
    predicate = j < i + 7 - np.arange(7)[:, None]
    if "causal" in options:
        predicate = predicate & (j <= i)
    if "window" in options:
        predicate = predicate & (abs(i - j) <= options["window"])
    assert np.array_equal(allowed, predicate)
    assert row.pairs() == allowed.sum() / len(allowed)
    assert np.array_equal(row.allowed(slice(2, 5), slice(4, 20)), allowed[..., 2:5, 4:20])


def test_a_boolean_mask_counts_its_pairs():
    row = Row("boolean mask", 1, 64, 8, "float32", density=0.5)
    assert 0.4 < row.pairs() / 64**2 < 0.6
    assert row.pairs() == row.mask().sum()


def small(row):
    """The same kind of problem in a size for tests, with a window that still matters."""
    short = row.shortened(70)
    options = short.options | ({"window": 20} if "window" in short.options else {})
    return dataclasses.replace(short, options=options, batch=min(row.batch, 2))


def kind(row):
    """What makes two rows different problems, but for their size."""
    return (tuple(row.options), row.kv_heads is None, row.keys is None, row.density, row.bias,
            row.batch > 1, row.dtype)


KINDS = list({kind(row): small(row) for row in reversed(ROWS) if row.function == "attention"
              if (row.dtype == "float32" and not row.forward_only) or row.pattern == "causal"
              or (row.forward_only and row.kv_heads and row.dtype == "bfloat16")
              or (row.dtype == "bfloat16" and row.bias)}.values())


@pytest.mark.parametrize("row", KINDS, ids=lambda row: row.name)
def test_the_judge_by_blocks_is_the_formulas_at_once(row):
    inputs = row.inputs()
    *arguments, dout = (x.astype(np.float64) for x in inputs.values())
    whole = rivals.dense(*arguments, dout=dout, allowed=row.allowed())
    assert harness.difference(rivals.judge(row, inputs, True, block=32), whole) < 1e-13
    assert harness.difference(rivals.judge(row, inputs, False, block=32), whole[:1]) < 1e-13


@pytest.mark.parametrize(("rival", "row"), [
    pytest.param(rival, row, id=f"{rival}-{row.name}")
    for rival in ("pyattn", "torch", "jax", "numpy") for row in KINDS
    if rival != "jax" or row.dtype == "float32" or row.forward_only])
@pytest.mark.filterwarnings("ignore")
def test_every_rival_computes_every_row(rival, row):
    backward = not row.forward_only
    right = rivals.judge(row, row.inputs(), backward)
    try:
        call, host = rivals.RIVALS["attention"][rival](row, row.inputs(), backward)
    except (ImportError, rivals.Unsupported) as absent:
        require_not_installed(absent)
        pytest.skip(str(absent))
    assert harness.difference(host(call()), right) <= harness.TOLERANCE[row.dtype]


BIASED = dataclasses.replace(ROW, pattern="bias", options={}, bias=True, batch=2)


def test_a_wrong_gradient_of_the_bias_is_not_timed(monkeypatch):
    table = rivals.RIVALS["attention"]
    monkeypatch.setitem(table, "planted", planted(wrong_gradient))
    found = harness.measure(BIASED, True, seconds=0.0, memory=False)
    assert "planted" not in found.seconds
    assert found.errors["planted"] == pytest.approx(1e-3, rel=0.1)
    assert found.errors["pyattn"] < 1e-5
    monkeypatch.setitem(table, "planted", planted(lambda result: result))
    assert "planted" in harness.measure(BIASED, True, seconds=0.0, memory=False).seconds


def test_a_rival_that_returns_no_gradient_of_the_bias_is_an_error(monkeypatch):
    monkeypatch.setitem(rivals.RIVALS["attention"], "planted", planted(lambda result: result[:-1]))
    with pytest.raises(ValueError, match="zip"):
        harness.measure(BIASED, True, seconds=0.0, memory=False)


def test_a_rival_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setitem(rivals.RIVALS["attention"], "planted", None)   # would fail if called
    row = dataclasses.replace(ROW, without={"planted": "it takes minutes"})
    found = harness.measure(row, False, seconds=0.0, memory=False)
    assert found.absent == {"planted": "it takes minutes"}


@pytest.mark.parametrize(("gigabytes", "absent"), [(15.9, False), (16.1, True)])
def test_a_rival_that_needs_most_of_the_memory_is_left_out(monkeypatch, gigabytes, absent):
    monkeypatch.setattr(harness, "machine_gigabytes", lambda: 32.0)
    monkeypatch.setitem(rivals.RIVALS["attention"], "planted", planted(lambda result: result))
    row = dataclasses.replace(ROW, gigabytes={"planted": gigabytes})
    found = harness.measure(row, False, seconds=0.0, memory=False)
    assert ("planted" in found.absent) == absent
    assert ("planted" in found.seconds) != absent


def test_memory_of_the_machine():
    assert 0.1 < harness.machine_gigabytes()


def timed_as(monkeypatch, **seconds):
    """Let every turn of `measure` take these times, whatever it really takes."""
    monkeypatch.setattr(harness, "alternate", lambda calls, *_, **__: {
        name: [seconds[name], 2 * seconds[name]] for name in calls})


def test_the_share_of_the_machines_own_product(monkeypatch):
    timed_as(monkeypatch, pyattn=1e-6, machine=1.0)
    row = Row("dense", 1, 10, 5, "float32", rivals=("pyattn",))
    found = harness.measure(row, False, memory=False)
    assert found.rate("pyattn") == pytest.approx(2 * 2 * 5 * 100 / 1.5e-6)
    assert found.machine == pytest.approx(2 * 1024**3 / 1.5)
    assert found.share.median == pytest.approx(found.rate("pyattn") / found.machine)


def test_decoding_is_compared_with_a_read_of_the_cache(monkeypatch):
    timed_as(monkeypatch, pyattn=4.0, machine=3.0)
    row = Row("decode", 4, 1, 16, "float32", kv_heads=2, keys=512, forward_only=True,
              limit="read", rivals=("pyattn",))
    assert row.work(False) == 2 * 2 * 512 * 16 * 4
    found = harness.measure(row, False, memory=False)
    assert found.share == Spread(0.75, 0.75, 0.75)
    assert found.machine == row.work(False) / 4.5
    line = next(line for line in markdown([found], threads=1).splitlines() if "M=512" in line)
    assert "GB/s | 75% |" in line
    assert "GFLOP/s" not in line


def test_reads_read_every_byte():
    calls = rivals.reads(4096)
    assert {name: float(call()) for name, call in calls.items()} == dict.fromkeys(calls, 1024.0)


def test_the_fastest_is_chosen():
    made = []
    calls = {name: lambda name=name, seconds=seconds: (made.append(name), time.sleep(seconds))
             for name, seconds in {"slow": 0.02, "fast": 0.01, "hopeless": 0.5}.items()}
    assert harness.fastest(calls) is calls["fast"]
    assert made.count("hopeless") == 1, "what is slower by far is not worth another call"
    assert made.count("slow") == made.count("fast") > 1


def test_a_gemm_that_a_library_lacks_is_left_out(monkeypatch):
    def lacking(dtype, x):
        raise rivals.Unsupported("no such product")

    monkeypatch.setitem(rivals.GEMMS, "ours", lacking)
    assert "ours" not in rivals.gemms("bfloat16", 8)
    monkeypatch.setitem(rivals.GEMMS, "ours", lambda dtype, x: lambda: x @ x)
    assert "ours" in rivals.gemms("bfloat16", 8)


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_says_why_it_cannot(monkeypatch):
    torch = pytest.importorskip("torch")
    prepare = rivals.RIVALS["attention"]["flex"]
    # refused before anything is compiled, so this is quick
    with pytest.raises(rivals.Unsupported, match=r"backward on CPU$"):
        prepare(ROW, ROW.inputs(), True)

    def uncompiled(function, **settings):
        def call(*arguments, **options):
            raise RuntimeError("\nNo working C++ compiler found. Install one.\nTraceback: ...")
        return call

    monkeypatch.setattr(torch, "compile", uncompiled)
    found = harness.measure(dataclasses.replace(ROW, rivals=("numpy", "flex")), False,
                            seconds=0.0, memory=False)
    assert found.absent == {"flex": "No working C++ compiler found"}
    assert "flex: No working" in markdown([found], threads=1)


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_computes_what_is_asked(monkeypatch):
    """Not compiled, which is slow and warns, but the same function."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    row = dataclasses.replace(ROW, options={"causal": True, "window": 5}, bias=True)
    call, host = rivals.RIVALS["attention"]["flex"](row, row.inputs(), False)
    error = harness.difference(host(call()), rivals.judge(row, row.inputs(), False))
    assert error <= harness.TOLERANCE["float32"]


@pytest.mark.parametrize("options", [{"causal": True, "window": 5}, {"kv_lengths": (40, 13)}])
def test_the_mask_that_flex_attention_is_given(options):
    torch = pytest.importorskip("torch")
    row = dataclasses.replace(ROW, options=options, batch=2, density=0.7)
    predicate = rivals._flex_mask(row)
    b, i, j = torch.meshgrid(torch.arange(2), torch.arange(40), torch.arange(40), indexing="ij")
    allowed = np.broadcast_to(row.allowed(), (2, 1, 40, 40))[:, 0]
    assert np.array_equal(predicate(b, 0, i, j).numpy(), allowed)


def measurement(row, backward, first, share=None, **others):
    """What `measure` might have found: times of one call, by rival."""
    times = {"pyattn": first, **others}
    return harness.Measurement(
        row, backward, seconds={name: Spread.of([value]) for name, value in times.items()},
        ratios={name: Spread.of([value / first]) for name, value in others.items()},
        machine=1e9, share=None if share is None else Spread.of([share]))


def test_the_worst_row_decides_whether_a_target_is_reached():
    rows = [Row(f"dense {n}", 1, n, 8, "float32") for n in (10, 20)]
    found = [measurement(rows[0], False, 1.0, torch=1.5),
             measurement(rows[1], False, 1.0, torch=1.0),
             measurement(rows[1], True, 1.0, torch=0.1)]
    target = Target("torch", "dense.*", FORWARD, 1.2, 1.4)
    assert [spread.median for spread in reached(target, found).values()] == [1.5, 1.0]
    table = target_table([target], found, threads=1)
    assert "| short | 2 | dense 20, N=20, D=8, float32 |" in table
    assert "| met | 1 |" in target_table([target], found[:1], threads=1)
    assert "not measured" in target_table([target], [], threads=1)


def test_targets_of_which_less_is_better():
    rows = [Row("window", 1, n, 8, "float32") for n in (100, 400)]
    found = [measurement(rows[0], False, 1e-6), measurement(rows[1], False, 8e-6)]
    growth = Target("growth", "window.*", FORWARD, 1.1, 1.0, GROWTH)
    assert [spread.median for spread in reached(growth, found).values()] == [pytest.approx(2)]
    assert "| short |" in target_table([growth], found, threads=1)
    assert reached(growth, found[:1]) == {}
    time_of_a_call = Target("call", "window.*", FORWARD, 10, 5, MICROSECONDS)
    assert "8.0 | met | 2 | window, N=400" in target_table([time_of_a_call], found, threads=1)


def test_the_backward_alone_is_the_difference_of_the_passes():
    row = Row("dense", 1, 1000, 50, "float32")      # 0.2 GFLOP forward, 0.5 backward
    found = [measurement(row, False, 0.4, share=0.5), measurement(row, True, 1.0, share=0.7)]
    target = Target("GEMM", "dense.*", BACKWARD, 0.85, 0.9, MACHINE)
    [value] = reached(target, found).values()
    assert value.median == pytest.approx(0.5 / 0.6)     # the machine does 1 GFLOP/s
    assert reached(target, found[1:]) == {}
    [value] = reached(dataclasses.replace(target, steps=FORWARD), found).values()
    assert value.median == 0.5


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.text}, {target.steps}")
def test_the_short_set_has_a_row_for_each_target(target):
    rows = [row for row in ROWS if row.quick and target.speaks_of(row)
            and target.backward in row.passes]
    assert len(rows) >= (2 if target.against == GROWTH else 1)
    if target.against not in (GROWTH, MACHINE, MICROSECONDS):
        assert any(target.against in row.rivals and target.against not in row.without
                   for row in rows)


@pytest.mark.parametrize("target", PATTERN_TARGETS,
                         ids=lambda target: f"{target.text}, {target.steps}")
def test_there_is_a_pattern_for_each_of_their_targets(target):
    rows = [row for row in ROWS if target.speaks_of(row)]
    assert rows
    assert all(isinstance(row, PatternRow) for row in rows)
    if target.against == MEMORY:
        assert any(row.memory and len(row.rivals) > 2 for row in rows)
    else:
        assert any(target.against in row.rivals for row in rows)


def test_every_pattern_has_a_target_at_both_ends():
    for name in PATTERNS:
        for length in (PATTERN_LENGTHS[0], PATTERN_LENGTHS[-1]):
            row = pattern_row(name, length)
            against = {target.against for target in PATTERN_TARGETS if target.speaks_of(row)}
            assert set(row.rivals[1:]) <= against


def test_names_tell_rows_apart():
    names = [row.name for row in (*ROWS, *CONTENT_ROWS)]
    assert len(set(names)) == len(names)


def narrow(name):
    """A pattern at its shortest length, in a size for tests."""
    return dataclasses.replace(pattern_row(name, PATTERN_LENGTHS[0]), heads=4, width=16)


SEEN = {
    "sliding window 256": lambda i, j: abs(i - j) <= 256,
    "sliding window 256, causal": lambda i, j: (j <= i) & (i - j <= 256),
    "window 64, dilation 16": lambda i, j: (abs(i - j) <= 1024) & ((i - j) % 16 == 0),
    "Longformer, window 256, 16 global":
        lambda i, j: (abs(i - j) <= 256) | (i % 64 == 0) | (j % 64 == 0),
    "Sparse Transformer, strided 128":
        lambda i, j: (j <= i) & ((i - j < 128) | ((i - j) % 128 == 0)),
    "Sparse Transformer, fixed 128":
        lambda i, j: (j <= i) & ((i // 128 == j // 128) | (j % 128 == 127)),
    "block diagonal 256": lambda i, j: i // 256 == j // 256,
    "temporal, 16 frames": lambda i, j: i % 64 == j % 64,
    "local 2-D, window 8":
        lambda i, j: (abs(i // 32 - j // 32) <= 8) & (abs(i % 32 - j % 32) <= 8),
    "Swin, window 8":
        lambda i, j: (i // 256 == j // 256) & (i % 32 // 8 == j % 32 // 8),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_a_pattern_is_judged_by(name):
    """The formulas with the pattern spelled out give what every rival is held against."""
    row = narrow(name)
    inputs = row.inputs()
    table = inputs.pop("bias_table", None)
    if table is not None:
        inputs["bias_table"] = np.zeros_like(table)
    dout = inputs.pop("dout")
    exact = {x: inputs[x].astype(np.float64) for x in "qkv"}
    i, j = np.ogrid[:row.length, :row.length]
    allowed = SEEN[name](i, j)
    right = rivals.dense(**exact, dout=dout.astype(np.float64), allowed=allowed)
    judged = rivals.JUDGES[row.function](row, {**inputs, "dout": dout}, True)
    assert harness.difference(judged[:4], right) < 1e-12
    assert row.pairs() == allowed.sum()
    assert row.work(True) == 2 * 7 * 16 * 4 * allowed.sum()


def test_pairs_of_the_other_patterns():
    pairs = {name: narrow(name).pairs() for name in PATTERNS if name not in SEEN}
    blocks = 16
    assert pairs == {
        # two global rows, and 14 that see 3 + 3 + 2 blocks, but for two next to a global one
        "BigBird, block 64, 3 random": 64**2 * (2 * blocks + 14 * 8 - 2),
        "BlockBERT, 4 blocks": 1024 * 256,
        "coarse and fine, block 128": 1024 * (128 + 7),
        "axial": 1024 * (32 + 32),
        "random, block 64, 3 random": 64**2 * blocks * 4,
    }


@pytest.mark.parametrize(("name", "rival"), [
    pytest.param(name, rival, id=f"{name}-{rival}") for name in PATTERNS
    for rival in pattern_row(name, PATTERN_LENGTHS[0]).rivals])
@pytest.mark.filterwarnings("ignore")
def test_every_rival_computes_every_pattern(name, rival):
    row = narrow(name)
    inputs = row.inputs()
    try:
        call, host = rivals.RIVALS[row.function][rival](row, inputs, True)
    except (ImportError, rivals.Unsupported) as absent:
        require_not_installed(absent)
        pytest.skip(str(absent))
    result = call()
    if host is None:
        causal = np.tri(row.length, dtype=bool) if row.options.get("causal") else None
        everything = rivals.dense(*(inputs[x] for x in "qkv"), dout=inputs["dout"], allowed=causal)
        assert harness.difference([np.asarray(result[0].detach() if "torch" in rival
                                              else result[0])], everything[:1]) < 1e-5
        return
    right = rivals.judge_variant(row, inputs, True)
    assert len(right) == (5 if name.startswith("Swin") else 4)
    assert harness.difference(host(result), right) <= harness.TOLERANCE["float32"]
    call, host = rivals.RIVALS[row.function][rival](row, inputs, False)
    assert harness.difference(host(call()), right[:1]) <= harness.TOLERANCE["float32"]


@pytest.mark.filterwarnings("ignore")
def test_a_rival_that_computes_something_else_is_timed_and_told(monkeypatch):
    row = narrow("block diagonal 256")
    timed_as(monkeypatch, **{"pyattn": 1.0, "pyattn dense": 5.0, "machine": 1.0})
    monkeypatch.setattr(harness, "peak_megabytes", lambda row, backward, rival: 1.0)
    row = dataclasses.replace(row, rivals=("pyattn", "pyattn dense"), memory=True)
    found = harness.measure(row, True)
    assert found.different == ["pyattn dense"]
    assert set(found.errors) == set(found.megabytes) == {"pyattn"}
    assert found.ratios["pyattn dense"].median == 5.0
    assert "not compared: pyattn dense" in markdown([found], threads=1)
    assert "not compared" not in markdown([measurement(ROW, False, 1.0)], threads=1)


def test_the_longest_pattern_keeps_its_kind_when_shortened():
    row = pattern_row("axial", 16384)
    assert row.options == {"shape": (128, 128)}
    assert row.shortened(128) == pattern_row("axial", 1024)
    assert row.shortened(128).options == {"shape": (32, 32)}


@pytest.mark.parametrize("name", ["random, block 64, 3 random", "BigBird, block 64, 3 random"])
def test_every_process_has_the_same_random_blocks(name):
    row = narrow(name)
    again = dataclasses.replace(row)
    assert row.blocks() is not None
    assert np.array_equal(row.blocks(), again.blocks())


def test_memory_is_compared_with_the_least_of_those_that_compute_the_same():
    row = pattern_row("sliding window 256", 16384)
    found = measurement(row, True, 1.0)
    target = next(target for target in PATTERN_TARGETS
                  if target.against == MEMORY and target.backward)
    assert reached(target, [found]) == {}
    found.megabytes = {"pyattn": 5.0}
    assert reached(target, [found]) == {}
    found.megabytes = {"pyattn": 5.0, "lucidrains": 25.0, "transformers": 100.0}
    [value] = reached(target, [found]).values()
    assert value.median == 0.2
    assert "| short |" in target_table([target], [found], threads=1)
    found.megabytes["pyattn"] = 1.0
    assert "| met |" in target_table([target], [found], threads=1)


def test_peak_memory_of_a_pattern():
    row = pattern_row("temporal, 16 frames", 1024)
    peak = harness.peak_megabytes(row, True, "pyattn")
    if peak is None:
        pytest.skip("this system does not tell peak memory: no /proc/self/clear_refs")
    result = 8 * 1024 * 64 * 4 / 2**20
    assert 3 * result <= peak < 8 * result              # there are four of them


def tiny(name):
    """A row of a variant that chooses keys, in a size for tests."""
    row = content_row(name, 2048)
    return dataclasses.replace(row, length=256, heads=2, width=16)


@pytest.mark.parametrize(("name", "rival"), [
    pytest.param(name, rival, id=f"{name}-{rival}") for name in CONTENT
    for rival in content_row(name, 2048).rivals])
@pytest.mark.filterwarnings("ignore")
def test_every_rival_computes_every_choice_of_keys(name, rival):
    row = tiny(name)
    inputs = row.inputs()
    try:
        call, host = rivals.RIVALS[row.function][rival](row, inputs, True)
    except (ImportError, rivals.Unsupported) as absent:
        require_not_installed(absent)
        pytest.skip(str(absent))
    result = call()
    gradients = len(inputs) - 1
    if rival == "pyattn dense":
        q, k, v = (inputs.get(x, inputs.get("qk")) for x in "qkv")
        causal = np.tri(256, dtype=bool) if name != "routing, top 128" and (
            row.function != "graph_attention") else None
        right = rivals.dense(q, k, v, dout=inputs["dout"], allowed=causal)
        assert host is None
        assert harness.difference(result, right) < 1e-5
        return
    if host is None:
        # of rules of their own
        assert rival in ("lucidrains", "transformers")
        assert all(np.isfinite(x.detach().numpy()).all() for x in result)
        assert result[0].numel() == inputs["dout"].size
        return
    right = rivals.JUDGES[row.function](row, inputs, True)
    assert len(right) == 1 + gradients
    assert harness.difference(host(result), right) <= harness.TOLERANCE["float32"]
    call, host = rivals.RIVALS[row.function][rival](row, inputs, False)
    assert harness.difference(host(call()), right[:1]) <= harness.TOLERANCE["float32"]


def test_there_are_peers_that_attend_to_the_same_pairs():
    """Or no other package would hold what is timed to account."""
    for name, peers in (("LSH, 8 rounds, as the original", ("lucidrains", "transformers")),
                        ("routing, top 128", ("lucidrains",))):
        row = tiny(name)
        for peer in peers:
            try:
                host = rivals.RIVALS[row.function][peer](row, row.inputs(), False)[1]
            except ImportError as absent:
                require_not_installed(absent)
                continue
            assert host is not None


def chosen(row):
    """The pairs that a row's decisions let see each other, (H, N, N), told apart from its code."""
    i, j = np.ogrid[:row.length, :row.length]
    if row.function == "top_k_attention":
        seen = np.zeros((row.heads, row.length, row.length + 1), bool)
        np.put_along_axis(seen, row.decisions["indices"][0], values=True, axis=-1)
        return seen[..., :-1]
    if row.function == "graph_attention":
        edges = row.arguments()["graph"].toarray() != 0
        return np.broadcast_to(edges | (i == j), (row.heads, row.length, row.length))
    clusters, keys = (row.decisions[name][0] for name in ("clusters", "key_clusters"))
    alike = (clusters[:, :, None] == keys[:, None, :]) & (j <= i)
    # the last of them alone
    return alike & (alike[..., ::-1].cumsum(axis=-1)[..., ::-1] <= row.options["cluster_size"])


@pytest.mark.parametrize("name", ["top 64 of all keys", "graph, 64 random edges",
                                  "routing, clusters of 128"])
def test_what_a_choice_of_keys_is_judged_by(name):
    row = tiny(name)
    exact = {name: x.astype(np.float64) for name, x in row.inputs().items()}
    [judged] = rivals.JUDGES[row.function](row, exact, False)
    if name.startswith("routing"):
        exact |= {x: pyattn.features.standardise(exact[x]) for x in "qk"}
    del exact["dout"]
    allowed = chosen(row)
    none = ~allowed.any(axis=-1)
    assert not judged[0, none].any()
    right = rivals.dense(**exact, allowed=allowed | none[..., None])[0]
    right[0, none] = 0
    assert harness.difference([judged], [right]) < 1e-12
    assert row.pairs() == allowed.sum() / 2
    assert row.work(True) == 2 * 7 * 16 * allowed.sum()


@pytest.mark.parametrize(("name", "deciding"), [
    ("LSH, 8 rounds", ["lsh.hashed"]),
    ("routing, clusters of 128", ["routing._decide"]),
    ("routing, top 128", ["routing._decide"]),
    ("NSA, 8 heads to a key", ["nsa_blocks.important_blocks"]),
    ("NSA by clusters", ["nsa_clusters.group_keys", "nsa_clusters.select_tokens"]),
    ("NSA by trees of clusters", ["nsa_clusters.group_keys", "nsa_clusters.select_tokens"]),
    ("NSA by hashes", ["nsa_clusters.hashed_tokens", "nsa_clusters.hashed",
                       "nsa_clusters.select_from_buckets"]),
    ("top 64 of all keys", ["top_k.select_keys"]),
])
def test_what_is_told_is_not_decided_again(name, deciding, monkeypatch):
    """So that the time it saves is that of deciding."""
    row = tiny(name)
    told = rivals.RIVALS[row.function][DECIDED](row, row.inputs(), True)[0]
    called = []
    for name in deciding:
        module, _, function = name.partition(".")
        module = importlib.import_module(f"pyattn.variants.{module}")
        monkeypatch.setattr(module, function, told_of(getattr(module, function), name, called))
    told()
    assert called == []
    rivals.RIVALS[row.function]["pyattn"](row, row.inputs(), False)[0]()
    assert set(called) == set(deciding)


def told_of(function, name, called):
    """The function, which writes down that it is called."""

    def told(*args, **options):
        called.append(name)
        return function(*args, **options)

    return told


def test_a_peer_decides_before_it_is_told():
    called = []
    decided = content_peers._then(lambda *args, **options: called.append((args, options)),
                                  lambda: "given")
    assert decided(1, two=3) == "given"
    assert called == [((1,), {"two": 3})]


@pytest.mark.parametrize("target", CONTENT_TARGETS,
                         ids=lambda target: f"{target.text}, {target.steps}")
def test_there_is_a_choice_of_keys_for_each_of_their_targets(target):
    rows = [row for row in CONTENT_ROWS if target.speaks_of(row)]
    assert rows
    assert not any(target.speaks_of(row) for row in ROWS)
    if target.against == MEGABYTES:
        assert all(row.memory for row in rows)
    else:
        wanted = DECIDED if target.against == DECIDING else target.against
        assert any(wanted in row.rivals for row in rows)


def test_targets_of_deciding_and_of_memory():
    row = content_row("LSH, 8 rounds", LONGEST)
    near = content_row("LSH, 8 rounds", 16384)
    found = measurement(row, True, 1.0, **{DECIDED: 0.6}), measurement(near, True, 1.0)
    found[0].megabytes = {"pyattn": 1500.0}
    found[1].ratios[DECIDED] = Spread(0.6, 0.5, 0.7)
    deciding = next(target for target in CONTENT_TARGETS if target.against == DECIDING)
    [value] = reached(deciding, found).values()
    assert dataclasses.astuple(value) == pytest.approx((0.4, 0.3, 0.5))
    assert "40% (30%-50%) | short" in target_table([deciding], found, threads=1)
    megabytes = next(target for target in CONTENT_TARGETS if target.against == MEGABYTES)
    assert [value.median for value in reached(megabytes, found).values()] == [1500.0]
    assert "| 2000 | 1000 | 1500 | met |" in target_table([megabytes], found, threads=1)
    found[0].megabytes = {"pyattn": None}
    assert reached(megabytes, found) == reached(deciding, found[:1]) == {}


def test_rules_of_their_own_are_told():
    row = content_row("LSH, 8 rounds", 2048)
    found = measurement(row, True, 1.0, lucidrains=5.0, **{"pyattn dense": 4.0, DECIDED: 0.9})
    found.different = ["pyattn dense", "lucidrains"]
    table = markdown([found], threads=1)
    assert "compared: pyattn dense attend over all pairs" in table
    assert f"- lucidrains ({row.name}, forward + backward)" in table
    assert "what its ratio lacks to 1" in table
    assert "what its ratio lacks to 1" not in markdown([measurement(ROW, False, 1.0)], threads=1)


def test_every_process_decides_alike():
    for name in CONTENT:
        row = tiny(name)
        again = dataclasses.replace(row).decisions
        assert row.decisions.keys() == again.keys()
        for x, decided in row.decisions.items():
            assert np.array_equal(decided, again[x])


def test_a_choice_of_keys_keeps_its_kind_when_shortened():
    row = content_row("NSA by trees of clusters", 16384)
    assert row.shortened(128) == content_row("NSA by trees of clusters", 2048)
    assert isinstance(row.shortened(128), ContentRow)


def test_peak_memory_of_a_choice_of_keys():
    row = content_row("routing, clusters of 128", 2048)
    peak = harness.peak_megabytes(row, True, "pyattn")
    if peak is None:
        pytest.skip("this system does not tell peak memory: no /proc/self/clear_refs")
    result = 8 * 2048 * 64 * 4 / 2**20
    assert 3 * result <= peak < 20 * result     # there are four of them, and operands made anew


def few(name):
    """A row of a variant that sums over keys, in a size for tests."""
    return dataclasses.replace(linear_row(name, 2048), length=256, heads=2, width=16)


@pytest.mark.parametrize(("name", "rival"), [
    pytest.param(name, rival, id=f"{name}-{rival}") for name in LINEAR
    for rival in linear_row(name, 2048).rivals])
@pytest.mark.filterwarnings("ignore")
def test_every_rival_computes_every_sum_over_keys(name, rival):
    row = few(name)
    inputs = row.inputs()
    try:
        call, host = rivals.RIVALS[row.function][rival](row, inputs, True)
    except (ImportError, rivals.Unsupported) as absent:
        pytest.skip(str(absent))
    result = call()
    if rival == "pyattn dense":
        causal = np.tri(256, dtype=bool) if row.options.get("causal") else None
        right = rivals.dense(*(inputs[x] for x in "qkv"), dout=inputs["dout"], allowed=causal)
        assert host is None
        assert harness.difference(result, right) < 1e-5
        return
    if host is None:
        # of features of their own
        assert (row.function, rival) == ("linear_attention", "lucidrains")
        assert all(np.isfinite(x.detach().numpy()).all() for x in result)
        return
    right = rivals.JUDGES[row.function](row, inputs, True)
    assert len(right) == len(inputs)
    assert harness.difference(host(result), right) <= harness.TOLERANCE["float32"]
    call, host = rivals.RIVALS[row.function][rival](row, inputs, False)
    assert harness.difference(host(call()), right[:1]) <= harness.TOLERANCE["float32"]


def summed(row, inputs):
    """The output, from N x M weights; told apart from the variant's code."""
    q, k, v = (inputs[x].astype(np.float64) for x in "qkv")
    root = row.width**-0.25
    if row.function == "linformer_attention":
        k, v = (inputs[name].astype(np.float64) @ x for name, x in (("e", k), ("f", v)))
        return rivals.dense(q, k, v)[0]
    if row.function == "efficient_attention":
        a, b = (np.exp(x) for x in (q, k))
        return a / a.sum(-1, keepdims=True) @ ((b / b.sum(-2, keepdims=True)).mT @ v)
    if row.function == "linear_attention":
        a, b = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k))
    elif row.options.get("kernel") == "relu":
        a, b = (np.maximum(root * x @ row.projection().T, 0) + 1e-3 for x in (q, k))
    else:
        a, b = (np.exp(root * x @ row.projection().T.astype(np.float64)
                       - (x * x).sum(-1, keepdims=True) * root**2 / 2) for x in (q, k))
    weights = a @ b.mT
    if row.options.get("causal"):
        weights = np.tril(weights)
    return weights @ v / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", LINEAR)
def test_what_a_sum_over_keys_is_judged_by(name):
    row = few(name)
    inputs = row.inputs()
    [judged] = rivals.JUDGES[row.function](row, inputs, False)
    assert harness.difference([judged], [summed(row, inputs)]) < 1e-6


@pytest.mark.parametrize("name", LINEAR)
def test_work_is_linear_in_the_tokens(name):
    rows = [linear_row(name, length) for length in LINEAR_LENGTHS if length >= 4096]
    per_token = [row.work(True) / row.length for row in rows]
    assert per_token == [per_token[0]] * len(rows)
    assert rows[0].work(True) == 3 * rows[0].work(False)
    assert rows[0].pairs() * rows[1].length == rows[1].pairs() * rows[0].length


@pytest.mark.parametrize("target", LINEAR_TARGETS,
                         ids=lambda target: f"{target.text}, {target.steps}")
def test_there_is_a_sum_over_keys_for_each_of_their_targets(target):
    rows = [row for row in LINEAR_ROWS if target.speaks_of(row)]
    assert rows
    assert not any(target.speaks_of(row) for row in (*ROWS, *CONTENT_ROWS))
    if target.against == GROWTH:
        assert [row.length for row in rows] == [x for x in LINEAR_LENGTHS if x >= 4096]
    elif target.against == MEMORY:
        assert all(row.memory for row in rows)
    else:
        assert any(target.against in row.rivals for row in rows)


def test_how_sums_over_keys_are_counted_is_told():
    row = few("linear, causal")
    table = markdown([measurement(row, True, 1.0)], threads=1)
    assert "a backward as two" in table
    assert "a backward as two" not in markdown([measurement(ROW, False, 1.0)], threads=1)


def test_a_peer_that_needs_too_much_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(harness, "machine_gigabytes", lambda: 16.0)
    row = dataclasses.replace(few("Performer, softmax, causal"),
                              gigabytes=linear_row("Performer, softmax, causal", 4096).gigabytes)
    found = harness.measure(row, False, seconds=0.0, memory=False)
    assert "more than half" in found.absent["lucidrains"]


def test_a_sum_over_keys_keeps_its_kind_when_shortened():
    row = linear_row("Linformer, 256 mixtures", 16384)
    assert row.shortened(128) == linear_row("Linformer, 256 mixtures", 2048)
    assert isinstance(row.shortened(128), LinearRow)
    assert row.inputs()["e"].shape == (256, 16384)


def test_peak_memory_of_a_sum_over_keys():
    row = linear_row("linear, causal", 2048)
    peak = harness.peak_megabytes(row, True, "pyattn")
    if peak is None:
        pytest.skip("this system does not tell peak memory: no /proc/self/clear_refs")
    result = 8 * 2048 * 64 * 4 / 2**20
    assert 3 * result <= peak < 20 * result


def test_performers_say_nothing_of_the_cuda_code_they_lack(capsys):
    row = few("Performer, ReLU, causal")
    try:
        linear_peers.performer(row, row.inputs(), False)
    except ImportError as absent:
        pytest.skip(str(absent))
    assert capsys.readouterr().out == ""


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


def test_no_feature_of_relu_is_near_its_kink():
    """Where float32 and float64 might tell its sign apart, and so its gradient."""
    row = linear_row("Performer, ReLU", 2048)
    inputs, directions = row.inputs(), row.projection().astype(np.float64)
    for name in "qk":
        products = inputs[name].astype(np.float64) @ directions.T
        assert abs(products).min() >= 2.0**-8
    assert inputs["v"].std() == pytest.approx(1, abs=0.01)
