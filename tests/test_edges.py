"""The engine of listed keys, against dense formulas; its kernels and its lists."""

from __future__ import annotations

import dataclasses

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from pyattn.kernels.array_api.edges import GATHERED, chunks
from table import Shape
from test_micro_kernels import CODES, WIDTHS, at, micro_kernel

import pyattn
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.engines import edges as engine
from pyattn.engines.edges import Edges

BACKENDS = ["cpu", "array_api"]
SHAPES = [Shape((), 1, 1, 1, 1, 1, 1), Shape((2,), 4, 2, 33, 47, 20, 13),
          Shape((1,), 3, 1, 70, 40, 64, 64), Shape((2, 2), 2, 2, 9, 150, 8, 8)]
EMPTY = [Shape((2,), 2, 1, 0, 5, 4, 4), Shape((2,), 2, 1, 5, 0, 4, 4),
         Shape((0,), 2, 2, 3, 3, 4, 4), Shape((1,), 0, 0, 3, 3, 4, 4)]


def draw(s, dtype=np.float64, seed=0):
    rng = np.random.default_rng([s.n, s.m, seed])
    return tuple(rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e)))


def lists(s, kind, seed=0):
    """Random lists, with queries that have none and a query that has all keys."""
    rng = np.random.default_rng([7, s.n, s.m, seed])
    batch = int(np.prod(s.batch, dtype=int))
    shape = {"one": (1,), "item": (batch, 1), "group": (batch, s.groups),
             "head": (batch, s.heads)}[kind]
    index = rng.integers(-1, s.m, (*shape, s.n, s.m))
    index[rng.random(index.shape) < 0.6] = -1
    index[..., ::5, :] = -1
    index[..., 3::20, :] = np.arange(s.m)
    return Edges.from_lists(index, batch=batch, heads=s.heads, tokens=s.m)


def listed(edges):
    """bool (B, H, N, M), and the number of each edge there."""
    batch, heads = edges.owner.shape
    n = edges.start.shape[1] - 1
    number = np.full((batch, heads, n, edges.tokens), -1)
    for b, h, i in np.ndindex(batch, heads, n):
        l = edges.owner[b, h]
        for e in range(edges.start[l, i], edges.start[l, i + 1]):
            number[b, h, i, edges.key[e]] = e
    return number >= 0, number


def dense(q, k, v, edges, bias, softcap, scale):
    lead = v.shape[:-3]
    allowed, number = listed(edges)
    spread = None
    if bias is not None:
        whole = np.broadcast_to(bias, (*edges.owner.shape, len(edges.key)))
        whole = np.concatenate([whole, np.zeros((*whole.shape[:2], 1))], axis=-1)
        b, h = np.ogrid[:whole.shape[0], :whole.shape[1]]
        spread = whole[b[..., None, None], h[..., None, None], number]
        spread = spread.reshape(*lead, *spread.shape[1:])
    return oracle.Dense(q, k, v, np.full(q.shape[-3], scale), allowed.reshape(
        *lead, *allowed.shape[1:]), bias=spread, softcap=softcap), number


def by_edge(ds, number, edges):
    """The gradient of a dense bias as that of the edges, (B, H, edges)."""
    found = np.zeros((*edges.owner.shape, len(edges.key)), np.longdouble)
    ds = ds.reshape(number.shape)
    for b, h in np.ndindex(edges.owner.shape):
        there = number[b, h] >= 0
        found[b, h, number[b, h][there]] = ds[b, h][there]
    return found


def judge(q, k, v, edges, backend, *, bias=None, softcap=None, scale=0.3, factor=3):
    dtype, rng = v.dtype, np.random.default_rng(5)
    with pyattn.use_backend(backend):
        (out, lse), saved = engine.forward(q, k, v, edges, bias=bias, softcap=softcap,
                                           scale=scale, return_lse=True)
        dout = rng.standard_normal(out.shape).astype(dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        grads = saved.backward(dout, dlse)._asdict()
    if q is None:
        q, k = (np.zeros((*v.shape[:-3], h, n, 1), dtype) for h, n in (
            (edges.owner.shape[1], lse.shape[-1]), (v.shape[-3], v.shape[-2])))
    problem, number = dense(q, k, v, edges, bias, softcap, scale)
    found = []
    for r in (oracle.exact(dtype), oracle.plain(dtype)):
        want = oracle.backward(problem, dout, dlse, r)
        if bias is not None:
            want["bias"] = oracle.sum_to(by_edge(want["bias"], number, edges), bias.shape)
        found.append((*oracle.forward(problem, r), want))
    exact, rough = found
    oracle.assert_close(out, exact[0], rough[0], factor=2, name="out", dtype=dtype)
    oracle.assert_close(lse, exact[1], rough[1], factor=2, name="lse", dtype=lse.dtype)
    for name, x in grads.items():
        kept = bias.dtype if name == "bias" else dtype
        oracle.assert_close(x, exact[2][name], rough[2][name], factor=factor, name=name,
                            dtype=kept)
    return saved


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16, np.float16],
                         ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["one", "item", "group", "head"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_rule(shape, kind, backend, dtype):
    judge(*draw(shape, dtype), lists(shape, kind), backend)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("wide", [(False, False), (True, False), (False, True), (True, True)])
def test_bias(wide, softcap, backend, dtype):
    shape, rng = SHAPES[1], np.random.default_rng(3)
    edges = lists(shape, "group")
    size = [full if given else 1 for full, given in zip(edges.owner.shape, wide, strict=True)]
    bias = rng.standard_normal((*size, len(edges.key))).astype(dtype)
    bias[..., rng.random(len(edges.key)) < 0.1] = -np.inf
    judge(*draw(shape, dtype), edges, backend, bias=bias, softcap=softcap)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_may_be_the_bias_alone(backend, dtype):
    shape, rng = SHAPES[1], np.random.default_rng(3)
    edges = lists(shape, "head")
    bias = rng.standard_normal((*edges.owner.shape, len(edges.key))).astype(dtype)
    saved = judge(None, None, draw(shape, dtype)[2], edges, backend, bias=bias, scale=1.0)
    assert set(saved.backward(saved.out)._fields) == {"v", "bias"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_a_group_may_have_other_lists(backend):
    """Runs of heads, some of them broken inside a group; a list that nobody reads."""
    shape = Shape((2,), 6, 2, 12, 20, 8, 8)
    made = lists(dataclasses.replace(shape, batch=(2,), groups=2), "head")
    owner = np.array([[0, 0, 1, 1, 1, 1], [5, 4, 4, 3, 3, 3]], np.int32)
    edges = Edges(made.start, made.key, owner, made.tokens)
    rng = np.random.default_rng(0)
    saved = judge(*draw(shape), edges, backend, bias=rng.standard_normal((2, 6, len(edges.key))))
    assert saved.stats["pairs"] == listed(edges)[0].sum()
    assert saved.stats["flops"] == 2 * saved.stats["pairs"] * 16


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_no_list_names_has_no_say(backend):
    shape = SHAPES[1]
    q, k, v = draw(shape)
    index = np.full((1, shape.n, 3), -1)
    index[:, :, 0] = np.arange(shape.n) % 7
    edges = Edges.from_lists(index, batch=2, heads=4, tokens=shape.m)
    want, saved = engine.forward(q, k, v, edges)
    grads = saved.backward(want)
    for x in (k, v):
        x[..., 7:, :] = np.nan
    with pyattn.use_backend(backend):
        out, saved = engine.forward(q, k, v, edges)
        again = saved.backward(out)
    np.testing.assert_allclose(out, want, atol=1e-14)
    for name in ("q", "k", "v"):
        np.testing.assert_allclose(getattr(again, name), getattr(grads, name), atol=1e-14)
    assert not again.k[..., 7:, :].any()
    assert not again.v[..., 7:, :].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_behind_a_bias_of_minus_infinity_have_no_say(backend):
    shape = SHAPES[1]
    q, k, v = draw(shape)
    k[..., 5, :] = v[..., 5, :] = np.nan
    edges = lists(shape, "group")
    bias = np.where(edges.key == 5, -np.inf, 0.0)[None, None]
    saved = judge(q, k, v, edges, backend, bias=bias)
    assert np.isfinite(saved.out).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")   # the oracle's
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_listed_keys_that_are_not_finite_follow_the_formula(bad, backend):
    q, k, v = draw(SHAPES[1])
    v[..., 5, 2] = bad
    judge(q, k, v, lists(SHAPES[1], "group"), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_queries_without_keys_hold_has_no_say(backend):
    shape = SHAPES[1]
    q, k, v = draw(shape)
    edges = lists(shape, "item")
    with pyattn.use_backend(backend):
        out, saved = engine.forward(q, k, v, edges)
        grads = saved.backward(out)
        q[..., ::5, :] = np.nan
        again, saved = engine.forward(q, k, v, edges)
        dout = out.copy()
        dout[..., ::5, :] = np.nan
        more = saved.backward(dout)
    assert np.array_equal(out, again)
    assert not out[..., ::5, :].any()
    assert np.isneginf(saved.lse[..., ::5]).all()
    assert all(np.array_equal(x, y) for x, y in zip(grads, more, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_keys_listed_is_dense_attention(backend):
    q, k, v = draw(Shape((2,), 4, 2, 70, 90, 16, 16), np.float32)
    edges = Edges.from_lists(np.tile(np.arange(90), (1, 70, 1)), batch=2, heads=4, tokens=90)
    with pyattn.use_backend(backend):
        out, saved = engine.forward(q, k, v, edges)
        want, dense_saved = pyattn.attention.forward(q, k, v)
        np.testing.assert_allclose(out, want, atol=2e-6)
        for x, y in zip(saved.backward(out), dense_saved.backward(out), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_to_do(shape, backend):
    q, k, v = draw(shape)
    batch = int(np.prod(shape.batch, dtype=int))
    edges = Edges.from_lists(np.full((1, shape.n, 2), -1), batch=batch, heads=shape.heads,
                             tokens=shape.m)
    with pyattn.use_backend(backend):
        out, saved = engine.forward(q, k, v, edges)
        grads = saved.backward(out)
    assert not out.any()
    assert out.shape == (*q.shape[:-1], v.shape[-1])
    for x, given in zip(grads, (q, k, v), strict=True):
        assert x.shape == given.shape
        assert not x.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_read_only_arguments(backend):
    shape = SHAPES[1]
    plain = draw(shape)
    views = []
    for x in plain:
        wide = np.zeros((*x.shape[:-3], x.shape[-2], x.shape[-3], 2 * x.shape[-1]))
        view = np.swapaxes(wide, -3, -2)[..., ::2]
        view[...] = x
        view.flags.writeable = False
        views.append(view)
    edges = lists(shape, "group")
    with pyattn.use_backend(backend):
        out, saved = engine.forward(*plain, edges)
        again, same = engine.forward(*views, edges)
        assert np.array_equal(out, again)
        for x, y in zip(saved.backward(out), same.backward(out), strict=True):
            assert np.array_equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("longest", [0, 1, 2])
def test_lists_of_items_may_have_very_different_lengths(longest, backend):
    index = np.full((3, 1, 40, 30), -1)
    index[:, 0, 7:9, :2] = [[4, 29], [4, -1]]
    # key 0 is listed late: its edge has a number that the other lists do not reach
    index[longest, 0, :11] = np.arange(30)
    index[longest, 0, :10, 0] = -1
    edges = Edges.from_lists(index, batch=3, heads=2, tokens=30)
    q, k, v = draw(Shape((3,), 2, 1, 40, 30, 8, 5))
    judge(q, k, v, edges, backend)


def test_leading_axes_broadcast():
    shape = SHAPES[3]
    q, k, v = draw(shape)
    edges = lists(shape, "item")
    _, want = engine.forward(q, np.broadcast_to(k[0], k.shape).copy(), v, edges)
    out, saved = engine.forward(q, k[0], v, edges)
    assert np.array_equal(out, want.out)
    np.testing.assert_allclose(saved.backward(out).k, want.backward(out).k.sum(axis=0))


def test_results_do_not_depend_on_the_number_of_threads():
    shape = Shape((1,), 4, 2, 700, 700, 32, 32)
    q, k, v = draw(shape, np.float32)
    rng = np.random.default_rng(0)
    edges = Edges.from_lists(rng.integers(0, 700, (2, 700, 60)), batch=1, heads=4, tokens=700)
    bias = rng.standard_normal((1, 1, len(edges.key)), dtype=np.float32)
    before, results = pyattn.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            pyattn.set_num_threads(threads)
            out, saved = engine.forward(q, k, v, edges, bias=bias)
            results.append((out, *saved.backward(out)))
    finally:
        pyattn.set_num_threads(before)
    assert all(np.array_equal(x, y) for other in results[1:]
               for x, y in zip(results[0], other, strict=True))


def test_one_backend_can_undo_the_other():
    shape = SHAPES[1]
    q, k, v = draw(shape)
    edges = lists(shape, "group")
    with pyattn.use_backend("cpu"):
        out, saved = engine.forward(q, k, v, edges)
        want = saved.backward(out)
    with pyattn.use_backend("array_api"):
        for x, y in zip(saved.backward(out), want, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-13)


def test_arrays_of_another_library():
    shape, rng = SHAPES[1], np.random.default_rng(1)
    q, k, v = draw(shape)
    edges = lists(shape, "group")
    bias = rng.standard_normal((1, 4, len(edges.key)))
    out, saved = engine.forward(q, k, v, edges, bias=bias, softcap=2.0)
    want = saved.backward(out)
    strict = [array_api_strict.asarray(x) for x in (q, k, v)]
    got, saved = engine.forward(*strict, edges, bias=array_api_strict.asarray(bias), softcap=2.0)
    np.testing.assert_allclose(np.asarray(got), out, atol=1e-13)
    for x, y in zip(saved.backward(got), want, strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-13)


def test_lists_by_key():
    shape = SHAPES[3]
    edges = lists(shape, "head")
    by_key = edges.by_key
    for l, start in enumerate(edges.start):
        own = slice(start[0], start[-1])
        key, query = edges.key[own], edges.query[own]
        order = np.lexsort((query, key))
        mine = slice(by_key.start[l, 0], by_key.start[l, -1])
        assert np.array_equal(by_key.query[mine], query[order])
        assert np.array_equal(by_key.edge[mine], order)
        assert np.array_equal(np.diff(by_key.start[l]), np.bincount(key, minlength=shape.m))


def test_chunks_of_the_portable_backend_are_small():
    """One query that lists all keys does not have the others padded to its length."""
    start = np.concatenate([[0, 0], np.cumsum(np.full(5000, 3)), [15000 + 5000]])
    seen = []
    for chunk in chunks(start, 64):
        assert chunk.entry.size * 64 <= GATHERED
        assert np.array_equal(chunk.there.sum(axis=1), np.diff(start)[chunk.rows])
        seen += [chunk.entry[chunk.there]]
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(start[-1]))
    assert sum(chunk.entry.size for chunk in chunks(start, 64)) < 2 * start[-1]


def test_arguments_that_do_not_fit():
    shape = SHAPES[1]
    q, k, v = draw(shape)
    edges = lists(shape, "group")
    with pytest.raises(ShapeError, match="lists are for"):
        engine.forward(q[..., 1:, :], k, v, edges)
    with pytest.raises(ShapeError, match="lists are for"):
        engine.forward(q, k[..., 1:, :], v[..., 1:, :], edges)
    with pytest.raises(ShapeError, match="bias must"):
        engine.forward(q, k, v, edges, bias=np.zeros((1, 1, 3)))
    with pytest.raises(OptionError, match="both or neither"):
        engine.forward(None, k, v, edges, bias=np.zeros((1, 1, len(edges.key))))
    with pytest.raises(OptionError, match="softcap"):
        engine.forward(q, k, v, edges, softcap=0.0)
    with pytest.raises(ShapeError, match="lists of keys"):
        Edges.from_lists(np.zeros((3, 5, 1), int), batch=2, heads=4, tokens=3)
    with pytest.raises(OptionError, match=r"must lie in -1\.\.2"):
        Edges.from_lists(np.full((1, 5, 1), 3), batch=2, heads=4, tokens=3)
    out, saved = engine.forward(q, k, v, edges)
    with pytest.raises(ShapeError, match="dout"):
        saved.backward(out[..., 1:])
    with pytest.raises(DtypeError, match="dout"):
        saved.backward(out.astype(np.float32))


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("nbytes", WIDTHS)
@pytest.mark.parametrize("source", CODES, ids=str)
def test_products_with_listed_rows(source, nbytes, rows):
    unit = np.float64 if source == np.float64 else np.float32
    rng = np.random.default_rng(rows)
    for count, depth in ((1, 5), (17, 16), (64, 67), (33, 0)):
        a = rng.standard_normal((rows, max(depth, 1) + 64)).astype(unit)
        b = rng.standard_normal((40, depth + 3)).astype(source)
        index = np.zeros(count + 64, np.int32)
        index[:count] = rng.integers(0, 40, count)
        c = np.full((rows, 64 + 16), 7, unit)
        micro_kernel("dots_listed", nbytes)(
            rows, count, depth, at(a, 0, 0), a.shape[1], b.ctypes.data, b.strides[0],
            at(index, 0), CODES[source], at(c, 0, 0), c.shape[1], unit(1))
        listed_rows = b[index[:count], :depth].astype(unit)
        want = a[:, :depth].astype("f8") @ listed_rows.T.astype("f8")
        np.testing.assert_allclose(c[:, :count], want, rtol=0, atol=300 * np.finfo(unit).eps)
        lanes = nbytes // c.itemsize
        assert (c[:, -(-count // lanes) * lanes:] == 7).all()

        p = rng.standard_normal((rows, 64)).astype(unit)
        acc = np.ones((rows, depth + 2), unit)
        micro_kernel("accumulate_listed", nbytes)(
            rows, count, depth, at(p, 0, 0), 64, b.ctypes.data, b.strides[0], at(index, 0),
            CODES[source], at(acc, 0, 0), acc.shape[1], unit(1))
        want = 1 + p[:, :count].astype("f8") @ listed_rows.astype("f8")
        np.testing.assert_allclose(acc[:, :depth], want, rtol=0, atol=300 * np.finfo(unit).eps)
        assert (acc[:, depth:] == 1).all()
