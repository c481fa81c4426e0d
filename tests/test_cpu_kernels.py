"""The CPU kernels against dense formulas in plain NumPy; the oracle imports nothing of pyattn."""

from __future__ import annotations

import itertools
import math
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numba
import numpy as np
import pytest
from oracle import Arithmetic, exact, plain, ulp
from pyattn.kernels.cpu import compile, job, ownership, softmax
from pyattn.kernels.cpu.jit.philox import philox

from pyattn.engines.problem import Problem, Term
from pyattn.threads import get_num_threads, set_num_threads

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.float32, np.float64)
DTYPES = [pytest.param(dtype, id=np.dtype(dtype).name)
          for dtype in (*FLOATS, BFLOAT16, np.float16)]
KINDS = DTYPES[:3]
"""One dtype for each kind of kernel."""
EXACT = exact(np.float32)
EVERY_TERM = "softcap bias gate offsets sinks dropout"


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
    return Blocks(n=n, m=m, rows=runs(kinds), columns=runs(kinds.swapaxes(1, 2)),
                  bits=words(tiles))


class Blocks(SimpleNamespace):
    """Hashed by identity, as a BlockMask is."""

    __hash__ = object.__hash__


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

    def given(x: np.ndarray) -> np.ndarray:
        """Return numbers as a caller gives them, in his dtype, and the kernel takes them."""
        return x.astype(dtype).astype(acc)

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
        bias = given(rng.standard_normal(shapes["bias"]))
        bias[rng.random(bias.shape) < 0.1] = -np.inf
        options["bias"] = Term(bias, item if len(bias) > 1 else 0 * item)
    if "gate" in terms:
        gate = given(rng.random(shapes["gate"]))
        gate[rng.random(gate.shape) < 0.1] = 0
        options["gate"] = Term(gate, item if len(gate) > 1 else 0 * item)
    if "offsets" in terms or "dropout" in terms:
        options["q_positions"] = rng.integers(-3, 50, (b, n)).astype(np.int32)
        options["k_positions"] = positions
    if "offsets" in terms:
        rows = 1 if "offsets1" in terms else h
        options["offsets"] = given(rng.standard_normal((rows, m + 70)))
        options["offset_origin"] = -55
    if "softcap" in terms:
        options["softcap"] = 1.5
    if "sinks" in terms:
        options["sinks"] = given(rng.standard_normal(h))
    if "dropout" in terms:
        options |= {"dropout": 0.3, "dropout_seed": 2**40 + 17,
                    "streams": rng.integers(0, 3, (1, n)).astype(np.int32)}
    scale = given(0.3 + rng.random(h))
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


def dense_results(c: SimpleNamespace, r: Arithmetic) -> dict[str, np.ndarray]:
    """All results by the dense formulas; "mass" holds sums of absolute terms."""
    p, real = c.problem, r.work
    b, h, n, _ = p.q.shape
    m, times = p.k.shape[2], h // max(1, p.k.shape[1])
    q, k, v, dout, scale = map(r, (p.q, p.k, p.v, c.dout, p.scale))
    dlse = c.dlse.astype(real)
    k, v = (np.repeat(x, times, axis=1) for x in (k, v))
    allowed = c.dense[p.layout].copy()
    allowed &= (np.arange(n) < p.q_lengths[:, None])[:, None, :, None]
    allowed &= (np.arange(m) < p.kv_lengths[:, None])[:, None, None, :]
    products = r(q @ k.swapaxes(2, 3))
    scores = r(products * scale[:, None, None])
    slope = real(1)
    if p.softcap:
        capped = r(np.tanh(scores / real(p.softcap)))
        scores, slope = r(capped * real(p.softcap)), r(1 - capped * capped)
    if p.bias is not None:
        bias = r(np.broadcast_to(p.bias.array[p.bias.item], allowed.shape))
        allowed &= bias > -np.inf
        scores = r(scores + np.where(allowed, bias, 0))
    if p.offsets is not None:
        column = (p.k_positions[:, None, None, :] - p.q_positions[:, None, :, None]
                  - p.offset_origin)
        column = np.broadcast_to(column, allowed.shape)
        head = np.broadcast_to((np.arange(h) % len(p.offsets))[:, None, None], allowed.shape)
        scores = r(scores + r(p.offsets)[head, column])
    gate = np.ones(allowed.shape, real)
    if p.gate is not None:
        gate = r(np.broadcast_to(p.gate.array[p.gate.item], allowed.shape))
    z = r(dense_dropout(p)) if p.dropout else real(1)
    sees = allowed & (gate > 0)
    top = np.max(np.where(sees, scores, -np.inf), axis=-1, initial=-np.inf)
    if p.sinks is not None:
        top = np.maximum(top, r(p.sinks)[:, None])
    top = np.where(top == -np.inf, 0, top)
    total = r(gate * r(np.exp(np.where(sees, scores, -np.inf) - top[..., None]))).sum(-1)
    if p.sinks is not None:
        total = total + np.exp(r(p.sinks)[:, None] - top)
    total = r(total)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    alive = np.where(lse == -np.inf, 0, lse)[..., None]
    u = np.exp(np.where(allowed, scores, -np.inf) - alive)
    u = np.where((lse > -np.inf)[..., None], u, 0)
    weights = r(gate * u)
    out = r(r(weights * z) @ v)
    delta = r(np.where(lse == -np.inf, 0, (dout * out).sum(-1) - dlse))
    difference = r(r(r(dout @ v.swapaxes(2, 3)) * z) - delta[..., None])
    dbias = r(weights * difference)
    dscores = r(dbias * slope)
    draw = r(scale[:, None, None] * dscores)
    groups = (b, h // times, times)
    result = {
        "out": out, "lse": lse, "delta": delta,
        "q": r(draw @ k), "k": r(draw.swapaxes(2, 3) @ q),
        "v": r(r(weights * z).swapaxes(2, 3) @ dout),
        "scale": (dscores * products).sum((0, 2, 3))}
    mass = {"scale": np.abs(dscores * products).sum((0, 2, 3))}
    for name in ("k", "v"):
        x = result[name]
        result[name] = x.reshape(*groups, *x.shape[2:]).sum(2)
    for name, term, x in (("bias", p.bias, dbias), ("gate", p.gate, r(u * difference))):
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
    delta = softmax.delta(c.dout, out, lse, c.dlse)
    return {"out": out, "lse": lse, "delta": delta,
            **softmax.backward(c.problem, c.dout, lse, delta)}


def agree(got: dict[str, np.ndarray], c: SimpleNamespace) -> None:
    """At most 2 (gradients: 3) times the error of the plain formulas in the same dtype, + 2 ulp.

    Plain formulas in 16 bits round every intermediate array. They can be right by luck where a
    gradient is a few sums, so for those their error is the largest for several other cotangents.
    """
    p = c.problem
    given = p.q.dtype.newbyteorder("=")
    truth, rough = dense_results(c, exact(given)), dense_results(c, plain(given))
    for name, x in got.items():
        right = truth[name]
        wide = name not in ("out", "q", "k", "v") or name in p.summed
        assert x.dtype == (c.acc if wide else given), name
        assert x.shape == right.shape, name
        dtype, x = x.dtype, x.astype(right.dtype)
        assert np.array_equal(np.isfinite(x), np.isfinite(right)), f"{name}: other inf or NaN"
        fine = np.isfinite(right)
        if not fine.any():
            continue
        largest = float(np.abs(np.where(fine, truth["mass"].get(name, right), 0)).max())
        times = 2 if name in ("out", "lse") else 3
        allowance = times * np.abs(rough[name][fine] - right[fine]).max() + 2 * ulp(dtype, largest)
        error = np.abs(x[fine] - right[fine]).max()
        if error > allowance and name in truth["mass"]:
            allowance += times * largest * max(plain_errors(c, name))
        assert error <= allowance, f"{name}: error {error}, allowed {allowance}"


def plain_errors(c: SimpleNamespace, name: str) -> Iterator[float]:
    """Yield errors of the plain formulas relative to the sum of the absolute terms."""
    given = c.problem.q.dtype.newbyteorder("=")
    for seed in range(4):
        rng = np.random.default_rng(seed)
        other = SimpleNamespace(problem=c.problem, dense=c.dense,
                                dout=rng.permuted(c.dout.astype(c.acc), axis=2).astype(given),
                                dlse=rng.permuted(c.dlse, axis=2))
        truth, rough = dense_results(other, exact(given)), dense_results(other, plain(given))
        mass = np.abs(truth["mass"][name]).max()
        yield float(np.abs(rough[name] - truth[name]).max() / mass) if mass else 0


@pytest.fixture
def launched(monkeypatch) -> list[tuple[str, str, int]]:
    """Which kernels have run, of which kind, and over how many units."""
    seen = []
    launch = job.Job.run

    def note(self: Any, kernel: str, units: int, *arguments: Any, **options: Any) -> None:
        seen.append((kernel, self.kind, units))
        launch(self, kernel, units, *arguments, **options)

    monkeypatch.setattr(job.Job, "run", note)
    return seen


def units_of(launched: list[tuple[str, str, int]], name: str) -> list[int]:
    return [units for kernel, _, units in launched if kernel == name]


# Forward and backward


SIZES = (1, 3, 63, 64, 65, 133)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("n", "m"), [*zip(SIZES, SIZES, strict=True), (65, 3), (1, 133), (133, 64),
                                      (3, 300)])
def test_lengths(dtype, n, m):
    c = call(n=n, m=m, dtype=dtype)
    agree(run(c), c)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("d", "e"), [(1, 1), (5, 80), (80, 100), (20, 16), (64, 64), (128, 128)])
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


@pytest.mark.parametrize("n", [3, 70])
def test_float16_is_exact_in_float32(n):
    c = call(n=n, m=90, dtype=np.float16)
    wide = replaced(c, **{name: getattr(c.problem, name).astype(np.float32) for name in "qkv"})
    (out, lse), (wide_out, wide_lse) = softmax.forward(c.problem), softmax.forward(wide)
    np.testing.assert_array_equal(out, wide_out.astype(np.float16), strict=True)
    np.testing.assert_array_equal(lse, wide_lse, strict=True)
    got = softmax.backward(c.problem, c.dout, lse, c.dlse)
    again = softmax.backward(wide, c.dout.astype(np.float32), lse, c.dlse)
    for name, x in got.items():
        dtype = np.float16 if name in "qkv" else np.float32
        np.testing.assert_array_equal(x, again[name].astype(dtype), err_msg=name, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 90), (70, 90), (520, 530)])
def test_dtypes_of_results(dtype, n, m, launched):
    """Those in the dtype of q are the others, which are to be added up, rounded once."""
    c = call(b=1, h=1, g=1, n=n, m=m, d=8, e=8, dtype=dtype)
    given = np.dtype(dtype)
    out, lse = softmax.forward(c.problem)
    delta = softmax.delta(c.dout, out, lse, c.dlse)
    assert (out.dtype, lse.dtype, delta.dtype) == (given, c.acc, c.acc)
    plainly = softmax.backward(c.problem, c.dout, lse, delta)
    assert plainly["scale"].dtype == c.acc
    for summed in ((), ("k",), ("q", "v")):
        got = softmax.backward(replaced(c, summed=summed), c.dout, lse, delta)
        for name in "qkv":
            assert got[name].dtype == (c.acc if name in summed else given), name
            assert plainly[name].dtype == given
            assert np.array_equal(got[name].astype(given), plainly[name]), name


@pytest.mark.parametrize("n", [3, 70])
@pytest.mark.parametrize("layout", ["swapped", "negative", "broadcast", "bytes", "other endian"])
def test_strided_and_read_only_inputs(layout, n):
    c = call(n=n, m=90)

    def view(x: np.ndarray) -> np.ndarray:
        if layout == "swapped":
            x = np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
        elif layout == "negative":
            x = np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
        elif layout == "bytes":                         # not aligned
            memory = np.zeros(x.nbytes + 1, np.uint8)
            memory[1:] = np.frombuffer(x.tobytes(), np.uint8)
            x = memory[1:].view(x.dtype).reshape(x.shape)
        elif layout == "other endian":
            x = x.astype(x.dtype.newbyteorder())
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
    *copies, c.dout = (np.array(x, np.float32, order="C") for x in (p.q, p.k, p.v, c.dout))
    c.problem = replaced(c, **dict(zip("qkv", copies, strict=True)))
    for name, x in run(c).items():
        # few queries read keys of unusual strides in another order
        assert layout == "negative" or np.array_equal(x, got[name]), name


@pytest.mark.parametrize("axes", [{"n": 0}, {"m": 0}, {"b": 0}, {"n": 0, "m": 0}, {"d": 0},
                                  {"e": 0}], ids=str)
def test_zero_lengths(axes):
    c = call(terms="bias gate offsets sinks", **axes)
    got = run(c)
    right = dense_results(c, EXACT)
    for name, x in got.items():
        assert x.shape == right[name].shape, name
        np.testing.assert_allclose(x, right[name], rtol=1e-4, atol=1e-4, err_msg=name)


# Score terms


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("terms", [
    "bias", "gate", "offsets", "offsets1", "softcap", "sinks", "dropout",
    EVERY_TERM, "softcap bias offsets1 dropout", "gate sinks dropout"])
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
    halves = []
    for first in (0, 64):
        dense = c.dense.copy()
        dense[..., :first] = dense[..., first + 64:] = False
        half = SimpleNamespace(**vars(c) | {"problem": replaced(c, blocks=block_mask(dense))})
        halves.append(softmax.backward(half.problem, c.dout, whole["lse"],
                                       whole["delta"]))
    for name in ("q", "k", "v", "scale"):
        np.testing.assert_allclose(halves[0][name] + halves[1][name], whole[name], rtol=1e-4,
                                   atol=1e-4, err_msg=name)


# Tokens that an index lists


class Listing(NamedTuple):
    """A call's tokens in other places: item b of the call takes those of source ``b // items``."""

    problem: Problem
    dout: np.ndarray
    dlse: np.ndarray
    q_index: np.ndarray
    k_index: np.ndarray
    items: int

    def gathered(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Take tokens of (sources, heads, T, ...) as the index has them; 0 where it has none."""
        item, head, _ = np.indices((len(index), x.shape[1], index.shape[2]), sparse=True)
        place = np.broadcast_to(index, (len(index), x.shape[1], index.shape[2]))
        found = x[item // self.items, head, np.maximum(place, 0)]
        found[place < 0] = 0
        return found


def listing(c: SimpleNamespace, *, items: int, by_head: bool) -> Listing:
    """Scatter a call's tokens; some slots are empty, all other tokens are NaN."""
    rng, p = np.random.default_rng(5), c.problem
    sources = len(p.q) // items

    def index_of(heads: int, slots: int) -> np.ndarray:
        tokens = items * slots + 7
        index = np.stack([rng.permutation(tokens)[:items * slots].reshape(items, slots)
                          for _ in range(sources * (heads if by_head else 1))])
        index = index.reshape(sources, -1, items, slots).swapaxes(1, 2)
        index = index.reshape(sources * items, -1, slots).astype(np.int32)
        index[:, :, 2:slots:9] = -1
        # neighbours, and some that are evenly spaced, are copied together
        index[..., slots // 2:] = np.sort(index[..., slots // 2:])
        return index

    def scattered(x: np.ndarray, index: np.ndarray) -> np.ndarray:
        heads, slots = x.shape[1:3]
        found = np.full((sources, heads, items * slots + 7, *x.shape[3:]), np.nan, x.dtype)
        for b, h in np.ndindex(*x.shape[:2]):
            place = index[b, h if by_head else 0]
            x[b, h, place < 0] = 0
            found[b // items, h, place[place >= 0]] = x[b, h, place >= 0]
        return found

    q_index, k_index = (index_of(x.shape[1], x.shape[2]) for x in (p.q, p.k))
    q, dout, dlse = (scattered(x, q_index) for x in (p.q, c.dout, c.dlse))
    k, v = (scattered(x, k_index) for x in (p.k, p.v))
    problem = replaced(c, q=q, k=k, v=v, q_index=q_index, k_index=k_index)
    return Listing(problem, dout, dlse, q_index, k_index, items)


LISTED = {
    "small items": ({"b": 6, "n": 40, "m": 40}, 3),
    "small items with terms": ({"b": 6, "n": 40, "m": 70, "terms": EVERY_TERM}, 3),
    "ragged": ({"b": 6, "n": 70, "m": 40, "lengths": True, "lead": "bh"}, 2),
    "one large item": ({"b": 1, "h": 2, "g": 1, "n": 530, "m": 590, "density": 0.8}, 1),
    "single keys": ({"b": 4, "n": 65, "m": 1}, 4),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_head", [False, True], ids=["shared", "by head"])
@pytest.mark.parametrize("name", LISTED)
def test_listed_tokens_give_what_gathered_ones_do(name, by_head, dtype):
    options, items = LISTED[name]
    c = call(dtype=dtype, **options)
    found = listing(c, items=items, by_head=by_head)
    lists = {"q": found.q_index, "k": found.k_index, "v": found.k_index, "out": found.q_index,
             "lse": found.q_index, "delta": found.q_index}
    right = run(c)
    for threads in (1, 2):
        set_num_threads(threads)
        got = run(SimpleNamespace(problem=found.problem, dout=found.dout, dlse=found.dlse))
        for key, x in got.items():
            if key in lists:
                listed = np.zeros(x.shape[:3], bool)
                ones = np.ones(x.shape[:3])
                kept = found.gathered(ones, lists[key]) > 0
                x, y = found.gathered(x, lists[key])[kept], right[key][kept]
                for b, h in np.ndindex(*kept.shape[:2]):
                    place = lists[key][b, h if by_head else 0]
                    listed[b // items, h, place[place >= 0]] = True
                nowhere = -np.inf if key == "lse" else 0
                assert (got[key][~listed] == nowhere).all(), key
            else:
                y = right[key]
            np.testing.assert_array_equal(x, y, err_msg=key)


def test_the_judge_of_listed_tokens_notices():
    c = call(b=6, n=40, m=40)
    found = listing(c, items=3, by_head=False)
    found.problem.k_index[0, 0, [0, 1]] = found.problem.k_index[0, 0, [1, 0]]
    out, _ = softmax.forward(found.problem)
    kept = found.gathered(np.ones(out.shape[:3]), found.q_index) > 0
    assert (found.gathered(out, found.q_index)[kept] != run(c)["out"][kept]).any()


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("listed", [False, True], ids=["in place", "listed"])
@pytest.mark.parametrize("name", ["small items", "one large item", "ragged"])
def test_results_on_top_of_others(name, listed, dtype):
    options, items = LISTED[name]
    c = call(dtype=dtype, **options)
    p, dout, dlse = c.problem, c.dout, c.dlse
    if listed:
        p, dout, dlse, *_ = listing(c, items=items, by_head=False)
        dout, dlse = np.nan_to_num(dout), np.nan_to_num(dlse)
    p = Problem(**vars(p) | {"summed": ("out", "q", "k", "v")})
    out, lse = softmax.forward(p)
    delta = softmax.delta(dout, out.astype(dout.dtype), lse, dlse)
    grads = softmax.backward(p, dout, lse, delta)

    rng = np.random.default_rng(3)
    # views of larger arrays, as where only some heads have such a part
    wider = [(len(x), x.shape[1] + 2, *x.shape[2:]) for x in (out, lse)]
    out_before, lse_before = (rng.standard_normal(shape).astype(c.acc) for shape in wider)
    lse_before[:, 1, ::2] = -np.inf
    out_before[:, 1, ::2] = 0
    onto = out_before.copy()[:, 1:-1], lse_before.copy()[:, 1:-1]
    assert softmax.forward(p, onto) == onto
    before = lse_before[:, 1:-1].astype(np.float64)
    joint = np.logaddexp(lse.astype(np.float64), before)
    with np.errstate(invalid="ignore"):
        shares = [np.nan_to_num(np.exp(x - joint))[..., None] for x in (lse, before)]
    tolerance = 1e-12 if c.acc == np.float64 else 1e-5
    np.testing.assert_allclose(onto[1], joint, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(onto[0], shares[0] * out + shares[1] * out_before[:, 1:-1],
                               rtol=tolerance, atol=tolerance)

    base = {name: rng.standard_normal(grads[name].shape).astype(c.acc) for name in ("q", "k", "v")}
    found = softmax.backward(p, dout, lse, delta, {name: x.copy() for name, x in base.items()})
    for name in ("q", "k", "v"):
        np.testing.assert_allclose(found[name], base[name] + grads[name], rtol=tolerance,
                                   atol=10 * tolerance, err_msg=name)
    np.testing.assert_array_equal(found["scale"], grads["scale"])


# NaN and infinity


def replaced(c: SimpleNamespace, **changes: Any) -> Problem:
    return Problem(**vars(c.problem) | changes)


@pytest.mark.parametrize(("poison", "dtype"), [
    pytest.param(poison, dtype, id=f"{poison}-{np.dtype(dtype).name}") for poison, dtype in
    [(np.nan, np.float32), (np.inf, np.float32), (np.nan, np.float64), (np.nan, BFLOAT16)]])
@pytest.mark.parametrize("terms", ["", "bias gate", "softcap offsets sinks dropout"])
@pytest.mark.parametrize("n", [3, 150])
def test_poison_in_masked_slots_reaches_nothing(poison, dtype, terms, n):
    c = call(b=3, n=n, m=200, terms=terms, dtype=dtype, lengths=True, density=0.7,
             shapes={"bias": (1, 1, 1, 200), "gate": (1, 1, 1, 200)})
    p = c.problem
    p.q_lengths[:2], p.kv_lengths[0] = (n, n - 1), 200
    hidden, blind = [0, 5, 70, 199], [i for i in (2, 66, 149) if i < n]
    c.dense[..., hidden] = False                        # keys that nobody sees, in partial tiles
    c.dense[..., blind, :] = False                      # and queries that see nothing
    p = c.problem = replaced(c, blocks=block_mask(c.dense))
    k, v, q, dout = p.k.copy(), p.v.copy(), p.q.copy(), c.dout.copy()
    if terms == "bias gate":
        p.bias.array[..., 20] = -np.inf
        p.gate.array[..., 130] = 0
        hidden += [20]
        v[:, :, 130] = poison                           # a closed gate lets no value through
    k[:, :, hidden] = v[:, :, hidden] = poison
    for item in range(3):
        k[item, :, p.kv_lengths[item]:] = v[item, :, p.kv_lengths[item]:] = poison
        q[item, :, p.q_lengths[item]:] = dout[item, :, p.q_lengths[item]:] = poison
    if "sinks" not in terms:
        q[..., blind, :] = dout[..., blind, :] = poison
    dirty = replaced(c, q=q, k=k, v=v)
    got_out, got_lse = softmax.forward(dirty)
    delta = softmax.delta(dout, got_out, got_lse, c.dlse)
    if "sinks" in terms:
        # with a sink a row has an lse even beyond the length, where its gradient is of no account
        beyond = np.broadcast_to((np.arange(n) >= p.q_lengths[:, None])[:, None], delta.shape)
        delta = np.where(beyond, 0, delta)
    got = softmax.backward(dirty, dout, got_lse, delta)
    if "gate" in got:
        # the gate itself still has its gradient, and that one meets the values behind it
        assert not np.isfinite(got["gate"][..., 130]).any()
        right = dense_results(c, EXACT)["gate"]
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


# Few queries


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "g", "n", "m"), [(4, 2, 1, 300), (8, 1, 1, 70), (4, 2, 3, 133),
                                                (3, 3, 8, 200), (4, 4, 2, 1), (6, 2, 2, 64)])
def test_few_queries(h, g, n, m, dtype, launched):
    c = call(b=4, h=h, g=g, n=n, m=m, d=20, e=35, dtype=dtype, density=0.6,
             lead="bh" if h == g else "")
    c.problem.q_lengths[:] = 0, n, n - 1, n
    c.problem.kv_lengths[:] = m, m // 2 + 1, m, 0
    agree(run(c), c)
    assert units_of(launched, "decode.decode") == [4 * g]
    assert not units_of(launched, "forward.forward")


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("terms", ["bias", "gate", "offsets", "softcap", "sinks", "dropout",
                                   EVERY_TERM])
def test_few_queries_with_terms(terms, dtype, launched):
    c = call(b=3, n=2, m=200, terms=terms, dtype=dtype, lengths=True, density=0.8)
    c.problem.q_lengths[0], c.problem.kv_lengths[0] = 2, 200
    agree(run(c), c)
    assert units_of(launched, "decode.decode")


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("terms", ["", EVERY_TERM])
def test_few_queries_against_many_keys(terms, dtype, launched):
    """Keys are split among units; some of these see nothing, or full tiles alone."""
    m = 5000
    c = call(h=2, g=1, n=3, m=m, dtype=dtype, terms=terms, density=0.9)
    c.dense[..., 2000:3000] = True
    c.dense[..., :1300] = False
    c.dense[:, 1, 1400:4700] = False
    c.problem.kv_lengths[1] = 3100
    c.problem = replaced(c, blocks=block_mask(c.dense),
                         q=(c.problem.q * np.array(3, dtype)).astype(dtype))
    agree(run(c), c)
    assert units_of(launched, "decode.decode") == [2 * 8]
    assert units_of(launched, "decode.join") == [2]


def test_few_queries_that_read_nothing(launched):
    c = call(b=2, n=2, m=200, dtype=np.float32)
    for lengths in (c.problem.q_lengths, c.problem.kv_lengths):
        lengths[:] = 0
        agree(run(c), c)
        lengths[:] = 2
    c.dense[:] = False
    c.problem = replaced(c, blocks=block_mask(c.dense))
    agree(run(c), c)
    assert len(units_of(launched, "decode.decode")) == 3


# Units of the backward, and the same bits whatever the threads


class Division(NamedTuple):
    """A call, and into how many chunks and slices its backward is cut."""

    arguments: dict[str, Any]
    chunks: int
    pieces: int
    dtypes: tuple[Any, ...] = (np.float32,)


def square(b: int, n: int, m: int, terms: str, bias: str = "", gate: str = "", h: int = 2,
           g: int = 1) -> dict[str, Any]:
    """Return arguments of `call`; axes of bias and gate are named by a letter or 1."""
    sizes = {"B": b, "H": h, "N": n, "M": m, "1": 1}
    shapes = {name: tuple(sizes[axis] for axis in axes)
              for name, axes in (("bias", bias), ("gate", gate))}
    return dict(b=b, h=h, g=g, n=n, m=m, terms=terms, shapes=shapes, density=0.8)


ALL_KINDS = (*FLOATS, BFLOAT16)
DIVISIONS = {
    "one group": Division(square(1, 790, 780, ""), 3, 1, ALL_KINDS),
    "every term": Division(square(1, 520, 600, EVERY_TERM, "11NM", "1H1M"), 2, 1, ALL_KINDS),
    "a table for all": Division(square(2, 520, 530, "softcap bias offsets1 dropout", "B11M"), 2, 2),
    "sums over keys": Division(square(1, 530, 520, "bias gate", "1HN1", "BHN1"), 2, 1),
    "one number": Division(square(1, 530, 520, "bias gate", "1111", "1111"), 2, 1),
    "slices": Division(square(6, 70, 133, "bias gate offsets1", "11NM", "111M"), 1, 6, ALL_KINDS),
    "slices of groups": Division(square(5, 70, 90, "bias offsets", "1H1M", h=4, g=2), 1, 10),
    "slices and chunks": Division(
        square(2, 530, 520, EVERY_TERM, "11NM", "111M", g=2), 2, 4, (np.float32, BFLOAT16)),
}


@pytest.fixture
def any_threads(monkeypatch):
    """Let threads help however little there is to do."""
    monkeypatch.setattr(job, "HELPER_FLOPS", 1)
    monkeypatch.setattr(softmax, "HELPER_FLOPS", 1)
    before = get_num_threads()
    yield
    set_num_threads(before)


def scattered(self: job.Job, kernel: str, units: int, scratch_bytes: int = 0, flops: float = 0,
              at: str = "size") -> None:
    """Run a kernel's units in any order, as threads might, in memory full of NaN."""
    function = compile.native(kernel, self.kind)
    queue = np.zeros(1, np.int64)
    scratch = job.aligned((scratch_bytes + 1,), np.uint8)
    if kernel == "forward.forward":                     # which counts from the end
        scratch[:] = 0xFF
        function(self.place, queue.ctypes.data, units, scratch.ctypes.data)
        return
    for unit in np.random.default_rng(units).permutation(units):
        queue[0], scratch[:] = unit, 0xFF
        function(self.place + job.OFFSETS[at], queue.ctypes.data, int(unit) + 1,
                 scratch.ctypes.data)


def full_of_nan(self: job.Job, *shape: int, dtype: Any = None) -> int:
    x = job.aligned(shape, self.dtype if dtype is None else dtype)
    x.view(np.uint8)[:] = 0xFF
    self.alive.append(x)
    return x.ctypes.data


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(name, dtype, id=f"{name}-{np.dtype(dtype).name}")
    for name, division in DIVISIONS.items() for dtype in division.dtypes])
def test_divisions(name, dtype, launched, monkeypatch):
    """Chunks, and slices of what shares a term: right, and the same bits in any order."""
    arguments, chunks, pieces, _ = DIVISIONS[name]
    c = call(dtype=dtype, **arguments)
    set_num_threads(1)
    right = run(c)
    assert units_of(launched, "backward.backward") == [pieces * chunks] * chunks
    agree(right, c)
    others = []
    for count in (2, 3, 5):
        set_num_threads(count)
        others.append(run(c))
    monkeypatch.setattr(job.Job, "run", scattered)
    monkeypatch.setattr(job.Job, "empty", full_of_nan)
    others.append(run(c))
    for other in others:
        for name, x in right.items():
            assert x.tobytes() == other[name].tobytes(), name


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("dtype", KINDS)
def test_few_queries_in_any_order(dtype, monkeypatch):
    c = call(h=2, g=1, n=3, m=2000, dtype=dtype, terms=EVERY_TERM)
    set_num_threads(1)
    right, others = run(c), []
    for count in (2, 3, 5):
        set_num_threads(count)
        others.append(run(c))
    monkeypatch.setattr(job.Job, "run", scattered)
    monkeypatch.setattr(job.Job, "empty", full_of_nan)
    others.append(run(c))
    for other in others:
        for name, x in right.items():
            assert x.tobytes() == other[name].tobytes(), name


# rowsum(dout * out) - dlse


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "e"), [(1, 1), (65, 77), (200, 16), (3, 130), (0, 4), (4, 0)])
def test_delta(dtype, n, e):
    """Small integers: every sum is exact, in any order."""
    rng = np.random.default_rng(0)
    acc = np.float64 if dtype == np.float64 else np.float32
    dout, out = (rng.integers(-9, 9, (2, n, 3, 2 * e)).astype(dtype) for _ in range(2))
    lse, dlse = rng.standard_normal((2, 3, n)).astype(acc), rng.integers(-9, 9, (2, 3, n))
    for turn, step in itertools.product((0, 1), (1, 2, -1)):
        views = [x.swapaxes(1, 2)[..., ::by][..., :e] for x, by in ((dout, step), (out, 1), )]
        views = views[::-1] if turn else views
        right = np.einsum("bhne,bhne->bhn", *(x.astype(acc) for x in views))
        set_num_threads(1 + turn)
        got = softmax.delta(*views, lse, None)
        assert got.dtype == acc
        assert np.array_equal(got, right)
        assert np.array_equal(softmax.delta(*views, lse.swapaxes(0, 1).copy().swapaxes(0, 1),
                                            dlse.astype(acc)), right - dlse)
    if n > 3 and e:
        lse[:, 1, 2] = -np.inf
        dirty, gradient = views[0].copy(), dlse.astype(acc)
        dirty[:, 1, 2] = gradient[:, 1, 2] = np.nan
        dirty[0, 0, 3, 0] = np.nan
        got = softmax.delta(dirty, views[1], lse, gradient)
        assert (got[:, 1, 2] == 0).all()
        assert np.argwhere(np.isnan(got)).tolist() == [[0, 0, 3]]


# Threads and processes


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


NO_NUMBA = """
import sys
import ml_dtypes, numpy as np
import pyattn

for dtype in (np.float32, ml_dtypes.bfloat16):
    for tokens in (1, 70):
        q, k = (np.ones((1, 4, count, 16), dtype) for count in (tokens, 70))
        out, saved = pyattn.attention.forward(q, k, k, causal=True)
        saved.backward(out)
assert sys.argv[1] == "cold" or "numba" not in sys.modules
"""


def test_a_warm_cache_needs_no_numba():
    for cache in ("cold", "warm"):
        subprocess.run([sys.executable, "-c", NO_NUMBA, cache], check=True, timeout=120)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other CPUs than x86")
@pytest.mark.parametrize(("name", "features", "nbytes"), [
    pytest.param("generic", "", 16, id="plain"),
    # each width has its tests in test_micro_kernels; kernels know no more than how many lanes
    pytest.param("haswell", "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+popcnt,+lzcnt", 32, id="avx2",
                 marks=pytest.mark.slow)])
def test_other_hosts(name, features, nbytes):
    """The same tests in a process for which the CPU is a smaller one, which has no bfloat16."""
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    code = ("import ml_dtypes, numpy as np; from pyattn.kernels.cpu import host, job\n"
            f"assert host.vector_bytes() == {nbytes}\n"
            "assert job.kind_of(np.dtype(ml_dtypes.bfloat16))[0] == 'float32'")
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    chosen = ("bfloat16 and (lengths or terms or poison or few) "
              "or float32 and (divisions or many_keys)")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
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
    right = dense_results(c, EXACT)
    rng = np.random.default_rng(1)
    seen = np.isfinite(right["lse"])

    def loss(**changes: Any) -> float:
        moved = SimpleNamespace(**vars(c) | {"problem": replaced(c, **changes)})
        x = dense_results(moved, exact(np.float64))
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
