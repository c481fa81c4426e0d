"""The CPU kernels against dense formulas in plain NumPy; the oracle imports nothing of pyattn."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numba
import numpy as np
import pytest
from pyattn.kernels.cpu import compile, ownership, softmax, threads
from pyattn.kernels.cpu.jit import forward, vector
from pyattn.kernels.cpu.jit.philox import philox

from pyattn.checks import OptionError
from pyattn.engines.problem import Problem, Term
from pyattn.threads import get_num_threads, set_num_threads

FLOATS = (np.float32, np.float64)


# The BlockMask that kernels read, from a dense array, by looking at every pair


class Runs(NamedTuple):
    start: np.ndarray
    first: np.ndarray
    count: np.ndarray
    tile: np.ndarray
    names: np.ndarray


def block_mask(dense: np.ndarray) -> SimpleNamespace:
    """Compile a boolean array (layouts, N, M)."""
    layouts, n, m = dense.shape
    rows, columns = -(-n // 64), -(-m // 64)
    pairs = np.zeros((layouts, rows * 64, columns * 64), bool)
    pairs[:, :n, :m] = dense
    stored: dict[bytes, int] = {}
    kinds = np.full((layouts, rows, columns), -2)       # empty
    for place in np.ndindex(kinds.shape):
        layout, t, u = place
        tile = pairs[layout, t * 64:t * 64 + 64, u * 64:u * 64 + 64]
        if tile[:n - t * 64, :m - u * 64].all():
            kinds[place] = -1                           # full
        elif tile.any():
            kinds[place] = stored.setdefault(tile.tobytes(), len(stored))
    tiles = np.array([np.frombuffer(tile, bool).reshape(64, 64) for tile in stored], bool)
    tiles = tiles.reshape(-1, 64, 64)
    return SimpleNamespace(n=n, m=m, rows=runs(kinds), columns=runs(kinds.swapaxes(1, 2)),
                           layout=np.arange(layouts, dtype=np.int32),
                           bits=words(tiles), bits_t=words(tiles.swapaxes(1, 2)))


def runs(kinds: np.ndarray) -> Runs:
    start, first, count, tile, names = [], [], [], [], []
    for layout in kinds:
        start.append([0] * (len(layout) + 1))
        for t, row in enumerate(layout):
            start[-1][t] = len(first)
            for partial, group in itertools.groupby(enumerate(row), lambda x: min(x[1], 0)):
                members = list(group)
                if partial != -2:
                    first.append(members[0][0])
                    count.append(len(members))
                    tile.append(len(names) if partial == 0 else -1)
                    names += [kind for _, kind in members if partial == 0]
        start[-1][-1] = len(first)
    return Runs(np.array(start, np.int64),
                *(np.array(x, np.int32) for x in (first, count, tile, names)))


def words(tiles: np.ndarray) -> np.ndarray:
    return (tiles.astype(np.uint64) << np.arange(64, dtype=np.uint64)).sum(-1, dtype=np.uint64)


# A call, and the dense formulas for it


def call(*, b: int = 2, h: int = 4, g: int = 2, n: int = 65, m: int = 133, d: int = 16, e: int = 24,
         dtype: Any = np.float32, density: float = 0.5, lead: str = "", terms: str = "",
         lengths: bool = False, seed: int = 0, shapes: dict[str, tuple[int, ...]] | None = None,
         ) -> SimpleNamespace:
    """Draw a problem; `lead` says which axes of "bh" have masks of their own."""
    rng = np.random.default_rng([seed, n, m, d])
    acc = np.float64 if dtype == np.float64 else np.float32
    q, k, v, dout = (rng.standard_normal(shape).astype(dtype) for shape in
                     ((b, h, n, d), (b, g, m, d), (b, g, m, e), (b, h, n, e)))
    layout = np.arange(b * h, dtype=np.int32).reshape(b, h) if lead == "bh" else np.broadcast_to(
        np.arange(h, dtype=np.int32) if lead == "h" else np.int32(0), (b, h))
    dense = rng.random((max(1, int(layout.max(initial=-1)) + 1), n, m)) < density
    if n > 3:
        dense[:, 3] = False                             # a query that sees nothing
    q_lengths = np.full(b, n, np.int32)
    kv_lengths = np.full(b, m, np.int32)
    if lengths:
        q_lengths[:] = rng.integers(0, n + 1, b)
        kv_lengths[:] = rng.integers(0, m + 1, b)
    options: dict[str, Any] = {}
    item = np.arange(b, dtype=np.int32) // 2            # items 0 and 1 share a row
    shapes = shapes or {"bias": (b, 1, n, m), "gate": (1, h, 1, m)}
    positions = rng.permutation(m + 5)[:m].astype(np.int32)[None] - 2
    if "bias" in terms:
        bias = rng.standard_normal(shapes["bias"]).astype(acc)
        bias[rng.random(bias.shape) < 0.1] = -np.inf
        options["bias"] = Term(bias, item if len(bias) > 1 else 0 * item)
    if "gate" in terms:
        gate = rng.random(shapes["gate"]).astype(acc)
        gate[rng.random(gate.shape) < 0.1] = 0
        options["gate"] = Term(gate, item if len(gate) > 1 else 0 * item)
    if "offsets" in terms or "dropout" in terms:
        options["q_positions"] = rng.integers(-3, 50, (b, n)).astype(np.int32)
        options["k_positions"] = positions
    if "offsets" in terms:
        rows = 1 if "offsets1" in terms else h
        options["offsets"] = rng.standard_normal((rows, m + 70)).astype(acc)
        options["offset_origin"] = -55
    if "softcap" in terms:
        options["softcap"] = 1.5
    if "sinks" in terms:
        options["sinks"] = rng.standard_normal(h).astype(acc)
    if "dropout" in terms:
        options |= {"dropout": 0.3, "dropout_seed": 2**40 + 17,
                    "streams": rng.integers(0, 3, (1, n)).astype(np.int32)}
    scale = (0.3 + rng.random(h)).astype(acc)
    scale[0] *= -1
    problem = Problem(q, k, v, scale, block_mask(dense), layout, q_lengths, kv_lengths, **options)
    dlse = rng.standard_normal((b, h, n)).astype(acc)
    return SimpleNamespace(problem=problem, dense=dense, dout=dout, dlse=dlse, acc=acc)


def dense_dropout(p: Problem) -> np.ndarray:
    """z = keep / (1 - dropout), (B, H, N, M)."""
    b, h, n, _ = p.q.shape
    m = p.k.shape[2]
    key = np.broadcast_to(p.k_positions.astype(np.uint32)[:, None, None, :], (b, h, n, m))
    query = p.q_positions.astype(np.uint32)[:, None, :, None]
    head = np.arange(h, dtype=np.uint32)[:, None, None]
    stream = p.streams.astype(np.uint32)[:, None, :, None]
    counter = np.broadcast_arrays(key // 4, query, head, stream)
    word = np.choose(key % 4, numpy_philox(counter, (p.dropout_seed % 2**32, p.dropout_seed >> 32)))
    return (word >= math.floor(p.dropout * 2**32)) / (1 - p.dropout)


def numpy_philox(counter: Any, key: tuple[int, int]) -> list[np.ndarray]:
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = key
    low = np.uint64(2**32 - 1)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c2 = (b >> 32) ^ c1 ^ np.uint64(k0), (a >> 32) ^ c3 ^ np.uint64(k1)
        c1, c3 = b & low, a & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def oracle(c: SimpleNamespace, real: Any) -> dict[str, np.ndarray]:
    """All results by the dense formulas in dtype `real`; "mass" holds sums of absolute terms."""
    p = c.problem
    b, h, n, _ = p.q.shape
    m, times = p.k.shape[2], h // p.k.shape[1]
    q, k, v, dout, dlse, scale = (x.astype(real) for x in
                                  (p.q, p.k, p.v, c.dout, c.dlse, p.scale))
    k, v = (np.repeat(x, times, axis=1) for x in (k, v))
    allowed = c.dense[p.layout].copy()
    allowed &= (np.arange(n) < p.q_lengths[:, None])[:, None, :, None]
    allowed &= (np.arange(m) < p.kv_lengths[:, None])[:, None, None, :]
    products = q @ k.swapaxes(2, 3)
    scores = products * scale[:, None, None]
    slope = real(1)
    if p.softcap:
        capped = np.tanh(scores / real(p.softcap))
        scores, slope = capped * real(p.softcap), 1 - capped * capped
    if p.bias is not None:
        bias = np.broadcast_to(p.bias.array[p.bias.item], allowed.shape).astype(real)
        allowed &= bias > -np.inf
        scores = scores + np.where(allowed, bias, 0)
    if p.offsets is not None:
        column = (p.k_positions[:, None, None, :] - p.q_positions[:, None, :, None]
                  - p.offset_origin)
        column = np.broadcast_to(column, allowed.shape)
        head = np.broadcast_to((np.arange(h) % len(p.offsets))[:, None, None], allowed.shape)
        scores = scores + p.offsets.astype(real)[head, column]
    gate = np.ones(allowed.shape, real)
    if p.gate is not None:
        gate = np.broadcast_to(p.gate.array[p.gate.item], allowed.shape).astype(real)
    z = dense_dropout(p).astype(real) if p.dropout else real(1)
    sees = allowed & (gate > 0)
    top = np.max(np.where(sees, scores, -np.inf), axis=-1, initial=-np.inf)
    if p.sinks is not None:
        top = np.maximum(top, p.sinks.astype(real)[:, None])
    top = np.where(top == -np.inf, 0, top)
    total = (gate * np.exp(np.where(sees, scores, -np.inf) - top[..., None])).sum(-1)
    if p.sinks is not None:
        total = total + np.exp(p.sinks.astype(real)[:, None] - top)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    alive = np.where(lse == -np.inf, 0, lse)[..., None]
    u = np.exp(np.where(allowed, scores, -np.inf) - alive)
    u = np.where((lse > -np.inf)[..., None], u, 0)
    weights = gate * u
    out = (weights * z) @ v
    delta = np.where(lse == -np.inf, 0, (dout * out).sum(-1) - dlse)
    difference = (dout @ v.swapaxes(2, 3)) * z - delta[..., None]
    dbias = weights * difference
    dscores = dbias * slope
    groups = (b, h // times, times)
    result = {
        "out": out, "lse": lse, "delta": delta,
        "q": scale[:, None, None] * (dscores @ k),
        "k": (scale[:, None, None] * dscores.swapaxes(2, 3) @ q),
        "v": (weights * z).swapaxes(2, 3) @ dout,
        "scale": (dscores * products).sum((0, 2, 3))}
    mass = {"scale": np.abs(dscores * products).sum((0, 2, 3))}
    for name in ("k", "v"):
        x = result[name]
        result[name] = x.reshape(*groups, *x.shape[2:]).sum(2)
    for name, term, x in (("bias", p.bias, dbias), ("gate", p.gate, u * difference)):
        if term is not None:
            result[name], mass[name] = (own_sum(y, term) for y in (x, np.abs(x)))
    if p.offsets is not None:
        result["offsets"], mass["offsets"] = (np.zeros(p.offsets.shape, real) for _ in range(2))
        np.add.at(result["offsets"], (head, column), dbias)
        np.add.at(mass["offsets"], (head, column), np.abs(dbias))
    return result | {"mass": mass}


def own_sum(x: np.ndarray, term: Term) -> np.ndarray:
    """Sum (B, H, N, M) to the term's own shape."""
    axes = tuple(axis for axis in (1, 2, 3) if term.array.shape[axis] == 1)
    x = x.sum(axes, keepdims=True)
    total = np.zeros(term.array.shape, x.dtype)
    np.add.at(total, term.item, x)
    return total


def run(c: SimpleNamespace) -> dict[str, np.ndarray]:
    out, lse = softmax.forward(c.problem)
    delta = (c.dout.astype(c.acc) * out).sum(-1) - c.dlse
    delta = np.where(lse == -np.inf, 0, delta).astype(c.acc)
    return {"out": out, "lse": lse, **softmax.backward(c.problem, c.dout, lse, delta)}


def agree(got: dict[str, np.ndarray], c: SimpleNamespace) -> None:
    """At most 2 (gradients: 3) times the error of the plain formulas in the same dtype, + 2 ulp."""
    truth = oracle(c, np.longdouble if c.acc == np.float64 else np.float64)
    plain = oracle(c, c.acc)
    for name, x in got.items():
        right = truth[name]
        assert x.dtype == c.acc, name
        assert x.shape == right.shape, name
        assert np.array_equal(np.isfinite(x), np.isfinite(right)), f"{name}: other inf or NaN"
        fine = np.isfinite(right)
        if not fine.any():
            continue
        largest = np.abs(np.where(fine, truth["mass"].get(name, right), 0)).max()
        ulp = np.spacing(c.acc(max(largest, np.finfo(c.acc).tiny)))
        times = 2 if name in ("out", "lse") else 3
        allowance = times * np.abs(plain[name][fine] - right[fine]).max()
        error = np.abs(x[fine] - right[fine]).max()
        assert error <= allowance + 2 * ulp, f"{name}: error {error}, allowed {allowance} + 2 {ulp}"


# Forward and backward


SIZES = (1, 3, 63, 64, 65, 133)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "m"), [*zip(SIZES, SIZES, strict=True), (65, 3), (1, 133), (133, 64),
                                      (3, 300)])
def test_lengths(dtype, n, m):
    c = call(n=n, m=m, dtype=dtype)
    agree(run(c), c)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("d", "e"), [(1, 1), (5, 80), (80, 100), (100, 5), (64, 64), (128, 3)])
def test_widths(dtype, d, e):
    c = call(d=d, e=e, dtype=dtype, density=0.9)
    agree(run(c), c)


@pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 1), (6, 2), (1, 1)])
def test_groups(h, g):
    c = call(h=h, g=g, n=70, m=70)
    agree(run(c), c)


@pytest.mark.parametrize("lead", ["", "h", "bh"])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.9, 1.0])
def test_layouts_and_ragged_lengths(lead, lengths, density):
    c = call(b=3, n=140, m=200, lead=lead, lengths=lengths, density=density)
    agree(run(c), c)


def test_dense_full_and_empty_tiles():
    """Runs of full tiles, longer than the kernel takes at a time, with gaps and a ragged end."""
    c = call(n=200, m=64 * 11 + 9, b=1)
    dense = np.ones((1, 200, 64 * 11 + 9), bool)
    dense[:, :, 64:128] = False
    dense[:, 64:128] &= np.arange(dense.shape[2]) % 3 > 0
    dense[:, 128:] = False
    c.dense = dense
    c.problem = replaced(c, blocks=block_mask(dense))
    agree(run(c), c)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_inputs_are_exact_in_float32(dtype):
    c = call(n=70, m=90, dtype=dtype)
    wide = replaced(c, **{name: getattr(c.problem, name).astype(np.float32) for name in "qkv"})
    got = run(c)
    assert got["out"].dtype == np.float32
    dout = c.dout.astype(np.float32)
    again = run(SimpleNamespace(problem=wide, dout=dout, dlse=c.dlse, acc=np.float32))
    for name, x in got.items():
        assert np.array_equal(x, again[name]), name


@pytest.mark.parametrize("layout", ["swapped", "negative", "broadcast", "bytes"])
def test_strided_and_read_only_inputs(layout):
    c = call(n=70, m=90)

    def view(x: np.ndarray) -> np.ndarray:
        if layout == "swapped":
            x = np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
        elif layout == "negative":
            x = np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
        elif layout == "bytes":                         # not aligned
            memory = np.zeros(x.nbytes + 1, np.uint8)
            memory[1:] = np.frombuffer(x.tobytes(), np.uint8)
            x = memory[1:].view(x.dtype).reshape(x.shape)
        else:
            x = np.broadcast_to(x[:1], x.shape)
        x.flags.writeable = False
        return x

    p = c.problem
    c.problem = replaced(c, q=view(p.q), k=view(p.k), v=view(p.v))
    c.dout = view(c.dout)
    got = run(c)
    agree(got, c)
    p = c.problem
    c.problem = replaced(c, q=p.q.copy(), k=p.k.copy(), v=p.v.copy())
    c.dout = c.dout.copy()
    for name, x in run(c).items():
        assert np.array_equal(x, got[name]), name


@pytest.mark.parametrize("axes", [{"n": 0}, {"m": 0}, {"b": 0}, {"n": 0, "m": 0}, {"d": 0},
                                  {"e": 0}], ids=str)
def test_zero_lengths(axes):
    c = call(terms="bias gate offsets sinks", **axes)
    got = run(c)
    right = oracle(c, np.float64)
    for name, x in got.items():
        assert x.shape == right[name].shape, name
        np.testing.assert_allclose(x, right[name], rtol=1e-4, atol=1e-4, err_msg=name)


# Score terms


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("terms", [
    "bias", "gate", "offsets", "offsets1", "softcap", "sinks", "dropout",
    "softcap bias gate offsets sinks dropout", "softcap bias offsets1 dropout",
    "gate sinks dropout"])
def test_terms(terms, dtype):
    c = call(n=133, m=200, b=3, terms=terms, dtype=dtype, lengths="bias" in terms, lead="h")
    agree(run(c), c)


@pytest.mark.parametrize("term", ["bias", "gate"])
@pytest.mark.parametrize("own", list(itertools.product("B1", "H1", "N1", "M1")), ids="".join)
def test_broadcast_terms(term, own):
    b, h, n, m = (size if letter in "BHNM" else 1 for letter, size in zip(own, (2, 4, 70, 133),
                                                                          strict=True))
    c = call(b=3, n=70, m=133, terms=term, shapes={term: (b, h, n, m)}, density=0.8)
    agree(run(c), c)


@pytest.mark.parametrize("shapes", [
    {"bias": (3, 1, 70, 133), "gate": (1, 4, 70, 1)},
    {"bias": (1, 1, 1, 133), "gate": (2, 4, 1, 133)},
    {"bias": (1, 1, 1, 1), "gate": (1, 1, 70, 133)}], ids=str)
@pytest.mark.parametrize("table", ["offsets", "offsets1"])
def test_terms_that_share_owners(shapes, table):
    c = call(b=3, n=70, m=133, terms=f"bias gate {table}", shapes=shapes)
    agree(run(c), c)


def test_terms_by_strides_and_other_dtypes():
    c = call(n=70, m=90, terms="bias gate")
    expected = run(c)
    p = c.problem
    bias = Term(np.asfortranarray(p.bias.array).astype(np.float64), p.bias.item)
    wide = np.repeat(p.gate.array, 2, axis=3)[..., ::2]
    c.problem = replaced(c, bias=bias, gate=Term(np.broadcast_to(wide, wide.shape), p.gate.item))
    for name, x in run(c).items():
        assert np.array_equal(x, expected[name]), name


def test_global_lse_makes_partials_add_up():
    """Two halves of the keys, each with the lse and delta of the whole, give the whole's dq."""
    c = call(n=70, m=128, density=0.6)
    whole = run(c)
    out = whole["out"]
    delta = np.where(whole["lse"] == -np.inf, 0, (c.dout * out).sum(-1) - c.dlse)
    halves = []
    for first in (0, 64):
        dense = c.dense.copy()
        dense[..., :first] = dense[..., first + 64:] = False
        half = SimpleNamespace(**vars(c) | {"problem": replaced(c, blocks=block_mask(dense))})
        halves.append(softmax.backward(half.problem, c.dout, whole["lse"], delta))
    for name in ("q", "k", "v", "scale"):
        np.testing.assert_allclose(halves[0][name] + halves[1][name], whole[name], rtol=1e-4,
                                   atol=1e-4, err_msg=name)


# NaN and infinity


def replaced(c: SimpleNamespace, **changes: Any) -> Problem:
    return Problem(**vars(c.problem) | changes)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("terms", ["", "bias gate", "softcap offsets sinks dropout"])
def test_poison_in_masked_slots_reaches_nothing(poison, dtype, terms):
    c = call(b=3, n=150, m=200, terms=terms, dtype=dtype, lengths=True, density=0.7,
             shapes={"bias": (1, 1, 1, 200), "gate": (1, 1, 1, 200)})
    p = c.problem
    c.dense[..., [0, 5, 70, 199]] = False               # keys that nobody sees, in partial tiles
    c.dense[..., [2, 66, 149], :] = False               # and queries that see nothing
    p = c.problem = replaced(c, blocks=block_mask(c.dense))
    k, v, q, dout = p.k.copy(), p.v.copy(), p.q.copy(), c.dout.copy()
    hidden = [0, 5, 70, 199]
    if terms == "bias gate":
        p.bias.array[..., 20] = -np.inf
        p.gate.array[..., 130] = 0
        hidden += [20]
        v[:, :, 130] = poison                           # a closed gate lets no value through
    k[:, :, hidden] = v[:, :, hidden] = poison
    for item in range(3):
        k[item, :, p.kv_lengths[item]:] = v[item, :, p.kv_lengths[item]:] = poison
        q[item, :, p.q_lengths[item]:] = dout[item, :, p.q_lengths[item]:] = poison
    if not terms.endswith("sinks dropout"):
        q[..., [2, 66, 149], :] = dout[..., [2, 66, 149], :] = poison
    dirty = replaced(c, q=q, k=k, v=v)
    got_out, got_lse = softmax.forward(dirty)
    delta = np.where(got_lse == -np.inf, 0, (c.dout * got_out).sum(-1) - c.dlse).astype(c.acc)
    got = softmax.backward(dirty, dout, got_lse, delta)
    if "gate" in got:
        # the gate itself still has its gradient, and that one meets the values behind it
        assert not np.isfinite(got["gate"][..., 130]).any()
        right = oracle(c, np.float64)["gate"]
        got["gate"][..., 130] = right[..., 130]
    agree({"out": got_out, "lse": got_lse, **got}, c)


@pytest.mark.parametrize("place", ["q", "k", "v", "dout"])
def test_nan_that_is_allowed_stays_with_the_pairs_that_meet_it(place):
    c = call(b=1, n=150, m=200, density=0.7)
    p = c.problem
    row = 70
    if place == "dout":
        c.dout[0, 1, row, 3] = np.nan
    else:
        getattr(p, place)[0, 1, row, 3] = np.nan
    got = run(c)
    head = 1 if place in ("q", "dout") else slice(2, 4)  # two heads read group 1
    sees = c.dense[0]
    touched = {"q": sees[row], "dout": sees[row]}.get(place)
    if touched is None:
        rows = sees[:, row]
        assert np.isnan(got["out"][0, head][:, rows]).any(-1).all()
        assert np.isfinite(got["out"][0, head][:, ~rows]).all()
        assert np.isfinite(got["out"][0, :2]).all()
        assert np.isnan(got["q"][0, head][:, rows]).any(-1).all()
        assert np.isfinite(got["q"][0, head][:, ~rows]).all()
        met = sees[rows].any(0)
        assert np.isfinite(got["k"][0, 1][~met]).all()
        assert np.isfinite(got["v"][0, 0]).all()
    else:
        assert np.isnan(got["q"][0, head, row]).any()
        others = np.delete(np.arange(150), row)
        assert np.isfinite(got["q"][0, head, others]).all()
        assert np.isnan(got["v"][0, 0][touched]).any(-1).all()
        assert np.isfinite(got["v"][0, 0][~touched]).all()
        assert np.isfinite(got["k"][0, 0][~touched]).all()
        assert np.isfinite(got["k"][0, 1]).all()


def test_large_scores_and_small_ones():
    """Nothing overflows, and weights below the normal range are zeros, not denormal numbers."""
    c = call(n=70, m=90, density=0.8)
    c.problem = replaced(c, q=(c.problem.q * 60).astype(np.float32))
    agree(run(c), c)


# The same bits whatever the threads


@pytest.fixture
def any_threads():
    before = get_num_threads()
    yield
    set_num_threads(before)


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("terms", ["", "softcap bias gate offsets sinks dropout"])
def test_same_bits_for_any_thread_count(terms):
    c = call(n=400, m=500, terms=terms, shapes={"bias": (1, 1, 400, 500), "gate": (2, 4, 1, 1)})
    results = []
    for count in (1, 2, 3):
        set_num_threads(count)
        results.append(run(c))
    for other in results[1:]:
        for name, x in results[0].items():
            assert x.tobytes() == other[name].tobytes(), name


@pytest.mark.usefixtures("any_threads")
def test_four_python_threads_at_once():
    set_num_threads(2)
    calls = [call(n=200 + 10 * i, m=300, seed=i) for i in range(4)]
    expected = [run(c) for c in calls]
    found: list[list[dict]] = [[] for _ in calls]

    def work(i: int) -> None:
        for _ in range(5):
            found[i].append(run(calls[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for right, results in zip(expected, found, strict=True):
        assert len(results) == 5
        for result in results:
            for name, x in right.items():
                assert np.array_equal(x, result[name]), name


FORK = """
import os, sys, warnings
import numpy as np
import pyattn

pyattn.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((2, 300, 16), dtype=np.float32)

def run():
    out, saved = pyattn.attention.forward(x, x, x, causal=True)
    return (out, *saved.backward(out))

expected = run()
warnings.simplefilter("ignore", DeprecationWarning)
child = os.fork()
same = all(np.array_equal(a, b) for a, b in zip(run(), expected))
if child == 0:
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not same)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_fork():
    """In a process of its own: other libraries in this one may not like forks."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


@pytest.mark.usefixtures("any_threads")
def test_a_call_from_inside_the_pool_runs_inline():
    set_num_threads(2)
    seen = set()

    def inner(first: int, last: int, memory: None) -> None:
        seen.add((threading.get_ident(), first, last))

    def outer(first: int, last: int, memory: None) -> None:
        time.sleep(0.01)
        threads.run(inner, 3, 1)

    threads.run(outer, 8, 1)
    assert {(first, last) for _, first, last in seen} == {(0, 1), (1, 2), (2, 3)}


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("bad", [0, 5])
def test_an_exception_in_a_worker_is_raised_in_the_caller(bad):
    set_num_threads(3)

    def work(first: int, last: int, memory: None) -> None:
        time.sleep(0.005)
        if first == bad:
            raise ZeroDivisionError(f"chunk {first}")

    with pytest.raises(ZeroDivisionError, match=f"chunk {bad}"):
        threads.run(work, 8, 1)


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("count", [0, 1, 7, 8])
@pytest.mark.parametrize("size", [1, 3])
def test_chunks_cover_the_range(count, size):
    set_num_threads(2)
    taken = []
    threads.run(lambda first, last, memory: taken.extend(range(first, last)), count, size)
    assert sorted(taken) == list(range(count))


@pytest.mark.usefixtures("any_threads")
def test_thread_count_setting():
    with pytest.raises(OptionError, match="number of threads must be at least 1; got 0"):
        set_num_threads(0)
    with pytest.raises(OptionError, match="number of threads must be an integer"):
        set_num_threads(1.5)


@pytest.mark.parametrize(("environment", "count"), [
    ({"PYATTN_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, "3"), ({"OMP_NUM_THREADS": "5,2"}, "5"),
    ({"OMP_NUM_THREADS": "many", "NUMBA_NUM_THREADS": "4"}, "4"),
    ({"PYATTN_NUM_THREADS": "0"}, "OptionError")], ids=str)
def test_thread_count_from_the_environment_and_no_numba_for_it(environment, count):
    clean = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    code = ("import sys, pyattn.threads\n"
            "try: print(pyattn.threads.get_num_threads())\n"
            "except pyattn.OptionError as error: print(type(error).__name__)\n"
            "assert 'numba' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], env=clean | environment, check=True,
                          capture_output=True, text=True)
    assert done.stdout.strip() == count


# Micro-kernels


WIDTHS = (16, 32, 64)


def micro_kernel(nbytes: int, name: str) -> Callable:
    """Make a micro-kernel callable from Python."""
    kernel = getattr(vector.micro_kernels(nbytes), name)
    if name == "gemm":
        return numba.njit(lambda r, n, k, a, ar, ak, b, br, c, cr, add, unit:
                          kernel(r, n, k, a, ar, ak, b, br, c, cr, add, unit))
    return numba.njit(lambda row, count, x, unit: kernel(row, count, x, unit))


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm(nbytes, dtype):
    gemm = micro_kernel(nbytes, "gemm")
    rng = np.random.default_rng(0)
    lanes = nbytes // np.dtype(dtype).itemsize
    for rows, vectors, depth in itertools.product((1, 3, 11, 64), (1, 3, 7), (0, 1, 64)):
        columns = vectors * lanes
        a, b = rng.integers(-9, 9, (rows, depth)), rng.integers(-9, 9, (depth, columns))
        for transposed, add in itertools.product((False, True), (0, 1)):
            x = np.asarray(a, dtype, order="F" if transposed else "C")
            y = np.zeros((depth, columns + lanes), dtype)
            y[:, :columns] = b
            c = rng.integers(-9, 9, (rows, columns + 3)).astype(dtype)
            right = c.copy()
            right[:, :columns] = a @ b + add * c[:, :columns]
            steps = (1, rows) if transposed else (depth, 1)
            gemm(rows, columns, depth, x.ctypes.data, *steps, y.ctypes.data, columns + lanes,
                 c.ctypes.data, columns + 3, add, dtype(1))
            assert np.array_equal(c, right)             # integers: exact in any order


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_exp(nbytes, dtype):
    exp_sum = micro_kernel(nbytes, "exp_sum")
    info = np.finfo(dtype)
    low, high = (bits * np.log(2) for bits in (info.minexp, info.maxexp))
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(low, high, 20000), rng.uniform(-1, 1, 20000),
                        np.arange(np.ceil(low), high),
                        np.arange(info.minexp, info.maxexp) * np.log(2)])
    x = np.concatenate([x, np.zeros(-len(x) % 64)]).astype(dtype)
    x[(x >= high - 1) | (x <= low + 1)] = 0
    right = np.exp(x.astype(np.longdouble))
    got = x.copy()
    exp_sum(got.ctypes.data, got.size, 0.0, dtype(1))
    assert (np.abs(got - right) / np.spacing(right.astype(dtype))).max() < 1.5
    odd = np.zeros(64, dtype)
    odd[:8] = np.nan, -np.nan, np.inf, -np.inf, high + 1, low - 1, info.smallest_subnormal, info.min
    exp_sum(odd.ctypes.data, 64, 0.0, dtype(1))
    assert np.isnan(odd[:2]).all()
    assert odd[2:8].tolist() == [np.inf, 0, np.inf, 0, 1, 0]
    edges = np.zeros(64, dtype)
    edges[:3] = np.nextafter(dtype(high), dtype(0)), dtype(high) + 1, np.nextafter(dtype(low), 0)
    right = np.exp(edges.astype(np.longdouble))
    exp_sum(edges.ctypes.data, 64, 0.0, dtype(1))
    assert edges[1] == np.inf
    np.testing.assert_allclose(edges[[0, 2]], right[[0, 2]].astype(dtype), rtol=4 * info.eps)


@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_row_kernels(nbytes, dtype):
    rng = np.random.default_rng(0)
    unit = dtype(1)
    x = rng.standard_normal(192).astype(dtype)
    x[[3, 100]] = np.nan
    row_max = micro_kernel(nbytes, "row_max")
    assert row_max(x.ctypes.data, 192, -np.inf, unit) == np.nanmax(x)
    assert row_max(x.ctypes.data, 192, 9.0, unit) == 9
    assert row_max(x.ctypes.data, 0, -np.inf, unit) == -np.inf

    word = int(rng.integers(0, 2**63)) * 2 + 1
    kept = x[:64].copy()
    micro_kernel(nbytes, "select")(kept.ctypes.data, np.uint64(word), -np.inf, unit)
    bits = np.array([word >> j & 1 for j in range(64)], bool)
    assert np.array_equal(kept, np.where(bits, x[:64], -np.inf), equal_nan=True)

    x = np.concatenate([rng.uniform(-40, 40, 640), rng.uniform(-1e-3, 1e-3, 640)]).astype(dtype)
    x[:5] = np.inf, -np.inf, np.nan, 0, 1e30
    right = 3 * np.tanh(x.astype(np.longdouble) / 3)
    micro_kernel(nbytes, "soft_cap")(x.ctypes.data, x.size, 3.0, unit)
    assert np.array_equal(np.isnan(x), np.isnan(right))
    size = np.maximum(np.abs(right), np.finfo(dtype).tiny).astype(dtype)
    assert np.nanmax(np.abs(x - right) / np.spacing(size)) < 4

    s = rng.standard_normal(128).astype(dtype)
    p = s.copy()
    total = micro_kernel(nbytes, "exp_sum")(p.ctypes.data, 128, 0.25, unit)
    np.testing.assert_allclose(p, np.exp(s.astype(np.float64) - 0.25), rtol=1e-6)
    assert abs(total - p.astype(np.longdouble).sum()) < 64 * np.spacing(dtype(total))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other CPUs than x86")
@pytest.mark.parametrize(("name", "features", "nbytes"), [
    ("haswell", "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+popcnt,+lzcnt", 32), ("generic", "", 16)],
    ids=["avx2", "plain"])
def test_other_hosts(name, features, nbytes):
    """The same tests in a process for which Numba is told that the CPU is a smaller one."""
    code = f"from pyattn.kernels.cpu.jit import vector; assert vector.vector_bytes() == {nbytes}"
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k",
         "(test_lengths or test_terms or test_poison) and float32"],
        env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


# Philox and the bookkeeping


@numba.njit
def philox_words(c0, c1, c2, c3, k0, k1):
    return philox(c0, c1, c2, c3, k0, k1)


@pytest.mark.parametrize(("counter", "key", "right"), [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1")])
def test_philox_against_the_known_answers_of_random123(counter, key, right):
    counter, key, right = ([int(word, 16) for word in x.split()] for x in (counter, key, right))
    assert list(philox_words(*map(np.uint64, counter + key))) == right
    assert [int(x) for x in numpy_philox(counter, key)] == right


def test_a_kernel_needs_no_place_for_a_cache(monkeypatch):
    def refuse(self: Any) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(numba.core.dispatcher.Dispatcher, "enable_caching", refuse)
    twice = compile.kernel(lambda x: 2 * x)
    assert twice(21) == 42


def test_the_sources_are_part_of_a_kernels_name():
    """An edited helper in another file must not meet a stale cache."""
    digest = hashlib.sha256()
    for path in sorted(Path(compile.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    assert forward.forward.py_func.__qualname__ == f"forward_{digest.hexdigest()[:12]}"


def test_components():
    members, start = ownership.components([], 3)
    assert members.tolist() == [0, 1, 2]
    assert start.tolist() == [0, 1, 2, 3]
    members, start = ownership.components([np.array([0, 1, 0, 2]), np.array([7, 7, 8, 9])], 4)
    assert members.tolist() == [0, 1, 2, 3]
    assert start.tolist() == [0, 3, 4]
    members, start = ownership.components([np.zeros(0, np.int64)], 0)
    assert members.size == 0
    assert start.tolist() == [0]


def test_the_judge_notices():
    """A result that is off in one number, in its dtype or by a NaN is not let through."""
    c = call(n=65, m=65)
    for spoil in ("value", "nan", "dtype"):
        got = run(c)
        if spoil == "dtype":
            got["q"] = got["q"].astype(np.float64)
        else:
            got["q"][0, 0, 5, 3] = np.nan if spoil == "nan" else got["q"][0, 0, 5, 3] * 1.001 + 1e-5
        with pytest.raises(AssertionError, match="q"):
            agree(got, c)


def test_oracle_by_finite_differences():
    """The oracle's own gradients, along a random direction of each argument."""
    c = call(b=2, h=2, g=1, n=5, m=6, d=3, e=2, dtype=np.float64, density=0.8,
             terms="softcap bias gate offsets sinks dropout",
             shapes={"bias": (2, 1, 5, 6), "gate": (1, 2, 1, 6)})
    right = oracle(c, np.float64)
    rng = np.random.default_rng(1)
    seen = np.isfinite(right["lse"])

    def loss(**changes: Any) -> float:
        moved = SimpleNamespace(**vars(c) | {"problem": replaced(c, **changes)})
        x = oracle(moved, np.longdouble)
        return (c.dout * x["out"]).sum() + (c.dlse * np.where(seen, x["lse"], 0)).sum()

    for name in ("q", "k", "v", "scale", "bias", "gate", "offsets"):
        argument = getattr(c.problem, name)
        x = argument.array if isinstance(argument, Term) else argument
        way = rng.standard_normal(x.shape) * (x != 0)
        step = 1e-6
        plus, minus = (x + sign * step * way for sign in (1, -1))
        if isinstance(argument, Term):
            plus, minus = Term(plus, argument.item), Term(minus, argument.item)
        slope = (loss(**{name: plus}) - loss(**{name: minus})) / (2 * step)
        expected = (right[name] * np.where(np.isfinite(way), way, 0)).sum()
        assert abs(slope - expected) < 1e-6 * max(1, abs(expected)), name
