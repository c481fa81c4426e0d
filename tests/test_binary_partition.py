"""BP-Transformer: partitions of a sequence, and attention over them against dense formulas."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from table import Shape

import pyattn
from pyattn.checks import OptionError, ShapeError
from pyattn.features.partition import node_counts, partition, span_means
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
STEPS = (1, 2, 3, 4, 8)
SHAPES = [Shape((2,), 4, 2, 37, 37, 20, 13), Shape((), 2, 2, 16, 16, 8, 8),
          Shape((2, 2), 3, 1, 11, 21, 16, 16), Shape((1,), 1, 1, 1, 1, 4, 4)]


def spans(n):
    """First and last token of every node, level by level."""
    found, size, wide = [], n, 1
    while n:
        found += [(c * wide, min((c + 1) * wide, n) - 1) for c in range(size)]
        if size == 1:
            break
        size, wide = (size + 1) // 2, 2 * wide
    return found


def walk(i, n, step, causal):
    """The nodes of token i as (first, last, kind), by what is covered and not by pointers."""
    found = [(i, i, 0)]
    low = high = i                              # what is covered so far
    level = 0
    while low > 0 or high < n - 1:
        wide = 2**level
        for s in range(step):
            for side in (1, 2):
                edge = low - 1 if side == 1 else high + 1
                if not 0 <= edge < n or (side == 2 and causal):
                    continue
                first = edge // wide * wide     # the node of this level that holds the next token
                last = min(first + wide, n) - 1
                # what of it is not yet covered is the whole of it, or its outer half
                if side == 1:
                    last = min(last, low - 1)
                    low = first
                else:
                    first = max(first, high + 1)
                    high = last
                found.append((first, last, (2 * step + 1) * level + 2 * s + side))
        level += 1
        if causal and low == 0:
            break
    return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_the_nodes_of_a_token_partition_the_sequence(step, causal):
    for n in range(70):
        found, where = partition(n, step, causal), spans(n)
        assert np.array_equal(found.counts, [b - a + 1 for a, b in where])
        for i in range(n):
            own = slice(found.start[i], found.start[i + 1])
            held = [t for node in found.node[own] for t in range(where[node][0],
                                                                 where[node][1] + 1)]
            assert sorted(held) == list(range(i + 1 if causal else n))
            assert (np.diff(found.node[own]) > 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_nodes_and_kinds_are_those_of_the_walk(step, causal):
    for n in (1, 2, 3, 8, 13, 31, 32, 33, 69):
        found, where = partition(n, step, causal), spans(n)
        for i in range(n):
            own = slice(found.start[i], found.start[i + 1])
            mine = sorted((*where[node], int(kind)) for node, kind in zip(
                found.node[own], found.kind[own], strict=True))
            assert mine == sorted(walk(i, n, step, causal)), (n, i)


def test_no_kind_twice():
    found = partition(100, 3, False)
    for i in range(100):
        kinds = found.kind[found.start[i]:found.start[i + 1]]
        assert len(set(kinds.tolist())) == len(kinds)


def draw(s, dtype=np.float64):
    rng = np.random.default_rng([s.n, s.m])
    return tuple(rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e)))


def wanted(q, k, v, table, dout, dlse, r, *, step, causal, log_size, scale):
    n, m = q.shape[-2], k.shape[-2]
    nodes = sorted(set(spans(m)))
    share = np.zeros((len(nodes), m))
    for c, (a, b) in enumerate(nodes):
        share[c, a:b + 1] = 1 / (b - a + 1)
    allowed, kind = np.zeros((n, len(nodes)), bool), np.zeros((n, len(nodes)), int)
    for i in range(n):
        for a, b, t in walk(i + m - n, m, step, causal):
            at = nodes.index((a, b))
            allowed[i, at], kind[i, at] = True, t
    bias = np.zeros((*q.shape[:-1], len(nodes)))
    if log_size:
        bias = bias + np.log([b - a + 1 for a, b in nodes])
    if table is not None:
        level, place = np.divmod(kind, 2 * step + 1)
        row = (2 * step + 1) * np.minimum(level, len(table) // (2 * step + 1) - 1) + place
        emb = table.astype("f8")[row]                                   # (N, nodes, D)
        bias = bias + scale * np.einsum("...nd,ncd->...nc", q.astype("f8"), emb)
    dense = oracle.Dense(q, share @ k.astype("f8"), share @ v.astype("f8"),
                         np.full(q.shape[-3], scale), allowed, bias=bias)
    grads = oracle.backward(dense, dout, dlse, r)
    ds = grads.pop("bias")
    for name in "kv":
        grads[name] = share.T @ grads[name]
    if table is not None:
        grads["q"] = grads["q"] + scale * np.einsum("...nc,ncd->...nd", ds, emb)
        grads["edge_bias"] = np.zeros(table.shape, ds.dtype)
        each = scale * ds[..., None] * q.astype("f8")[..., :, None, :]
        np.add.at(grads["edge_bias"], row, np.where(
            allowed[..., None], each.reshape(-1, n, len(nodes), q.shape[-1]).sum(0), 0))
    return *oracle.forward(dense, r), grads


def judge(q, k, v, backend, step, *, causal=False, log_size=True, levels=None, factor=4):
    dtype, rng = q.dtype, np.random.default_rng(7)
    table = None
    if levels is not None:
        table = rng.standard_normal((levels * (2 * step + 1), q.shape[-1])).astype(dtype)
    with pyattn.use_backend(backend):
        (out, lse), saved = pyattn.bp_attention.forward(
            q, k, v, table, step=step, causal=causal, log_size=log_size, scale=0.4,
            return_lse=True)
        dout = rng.standard_normal(out.shape).astype(dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        grads = saved.backward(dout, dlse)
    exact, rough = (wanted(q, k, v, table, dout, dlse, r, step=step, causal=causal,
                           log_size=log_size, scale=0.4)
                    for r in (oracle.exact(dtype), oracle.plain(dtype)))
    oracle.assert_close(out, exact[0], rough[0], factor=factor, name="out", dtype=dtype)
    oracle.assert_close(lse, exact[1], rough[1], factor=factor, name="lse", dtype=lse.dtype)
    assert set(grads._fields) == {"q", "k", "v"} | ({"edge_bias"} if levels else set())
    for name, x in grads._asdict().items():
        oracle.assert_close(x, exact[2][name], rough[2][name], factor=factor, name=name)
    return saved


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"log_size": False}, {"levels": 7}, {"levels": 2}, {"levels": 1, "log_size": False},
], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_rule(shape, options, causal, backend, dtype):
    judge(*draw(shape, dtype), backend, 2, causal=causal, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [1, 3, 8, 100])
def test_steps(step, backend):
    judge(*draw(SHAPES[0]), backend, step, levels=2)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=lambda x: np.dtype(x).name)
def test_half_precision(dtype):
    q, k, v = draw(SHAPES[0], dtype)
    table = np.random.default_rng(0).standard_normal((15, 20)).astype(dtype)
    out, saved = pyattn.bp_attention.forward(q, k, v, table, step=2)
    grads = saved.backward(out)
    wide = [x.astype("f4") for x in (q, k, v, table)]
    want, more = pyattn.bp_attention.forward(*wide, step=2)
    unit = 2 * float(ml_dtypes.finfo(dtype).eps)
    assert abs(out.astype("f4") - want).max() < 4 * unit
    for x, y in zip(grads, more.backward(out.astype("f4")), strict=True):
        assert x.dtype == dtype
        assert abs(x.astype("f4") - y).max() < 4 * unit * abs(y).max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_so_many_steps_that_no_span_is_needed_is_dense_attention(causal, backend):
    q, k, v = draw(SHAPES[0])
    with pyattn.use_backend(backend):
        out, saved = pyattn.bp_attention.forward(q, k, v, step=37, causal=causal)
        want, dense = pyattn.attention.forward(q, k, v, causal=causal)
        np.testing.assert_allclose(out, want, atol=1e-13)
        for x, y in zip(saved.backward(out), dense.backward(out), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-13)


def test_equal_keys_in_each_span_are_dense_attention():
    """With all keys equal a mean weighs as much as its tokens, thanks to the logarithm."""
    q, k, v = draw(SHAPES[0])
    k[...] = k[..., :1, :]
    np.testing.assert_allclose(pyattn.bp_attention(q, k, v, step=1), pyattn.attention(q, k, v),
                               atol=1e-13)
    apart = pyattn.bp_attention(q, k, v, step=1, log_size=False)
    assert abs(apart - pyattn.attention(q, k, v)).max() > 0.01


def test_future_tokens_change_nothing():
    q, k, v = draw(SHAPES[0])
    table = np.random.default_rng(0).standard_normal((5, 20))
    for t in (1, 8, 20, 36):
        before, saved = pyattn.bp_attention.forward(q, k, v, table, step=2, causal=True)
        changed = [x.copy() for x in (q, k, v)]
        for x in changed:
            x[..., t:, :] += 2
        after = pyattn.bp_attention(*changed, table, step=2, causal=True)
        assert np.array_equal(before[..., :t, :], after[..., :t, :])
        dout = np.zeros_like(before)
        dout[..., t - 1, :] = 1
        grads = saved.backward(dout)
        assert not any(x[..., t:, :].any() for x in (grads.q, grads.k, grads.v))


def test_decoding_is_the_last_row():
    q, k, v = draw(SHAPES[0])
    whole = pyattn.bp_attention(q, k, v, step=2, causal=True)
    for n in (1, 5):
        last = pyattn.bp_attention(q[..., -n:, :], k, v, step=2, causal=True)
        np.testing.assert_allclose(last, whole[..., -n:, :], atol=1e-14)


def test_finite_differences():
    rng = np.random.default_rng(0)
    q, k, v = draw(SHAPES[1])
    gradcheck(pyattn.bp_attention, q, k, v, rng.standard_normal((6, 8)), step=1, return_lse=True)
    gradcheck(pyattn.bp_attention, q, k, v, step=2, causal=True)
    gradcheck(span_means, rng.standard_normal((2, 3, 11, 4)))


def test_leading_axes_broadcast():
    q, k, v = draw(SHAPES[2])
    table = np.random.default_rng(0).standard_normal((3, 16))
    given = q[0, 0], k, v[:, :1]
    out, saved = pyattn.bp_attention.forward(*given, table, step=1)
    full = [np.broadcast_to(x, (2, 2, *x.shape[-3:])).copy() for x in given]
    want, same = pyattn.bp_attention.forward(*full, table, step=1)
    assert np.array_equal(out, want)
    grads, whole = saved.backward(out), same.backward(out)
    np.testing.assert_allclose(grads.q, whole.q.sum((0, 1)), atol=1e-13)
    np.testing.assert_allclose(grads.v, whole.v.sum(1, keepdims=True), atol=1e-13)
    np.testing.assert_allclose(grads.edge_bias, whole.edge_bias, atol=1e-13)


def test_means_of_spans():
    x = np.random.default_rng(0).standard_normal((2, 3, 13, 4))
    want = np.stack([x[..., a:b + 1, :].mean(-2) for a, b in spans(13)], axis=-2)
    np.testing.assert_allclose(span_means(x), want, atol=1e-15)
    for n in (0, 1):
        y, saved = span_means.forward(x[..., :n, :])
        assert np.array_equal(y, x[..., :n, :])
        assert np.array_equal(saved.backward(y).x, y)


def test_arrays_of_another_library():
    q, k, v = draw(SHAPES[0])
    table = np.random.default_rng(0).standard_normal((10, 20))
    out, saved = pyattn.bp_attention.forward(q, k, v, table, step=2)
    strict = [array_api_strict.asarray(x) for x in (q, k, v, table)]
    got, same = pyattn.bp_attention.forward(*strict, step=2)
    np.testing.assert_allclose(np.asarray(got), out, atol=1e-13)
    for x, y in zip(same.backward(got), saved.backward(out), strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [
    Shape((2,), 2, 1, 0, 5, 4, 4), Shape((2,), 2, 1, 0, 0, 4, 4), Shape((0,), 2, 2, 3, 3, 4, 4),
    Shape((1,), 0, 0, 3, 3, 4, 4)], ids=str)
def test_nothing_to_do(shape, backend):
    q, k, v = draw(shape)
    table = np.ones((6, shape.d))
    with pyattn.use_backend(backend):
        out, saved = pyattn.bp_attention.forward(q, k, v, table, step=1)
        grads = saved.backward(out)
    assert not out.any()
    assert grads.k.shape == k.shape
    assert not grads.edge_bias.any()


def test_work_grows_as_n_log_n():
    work = {}
    for n in (1024, 2048, 4096):
        x = np.ones((1, n, 2), np.float32)
        work[n] = pyattn.bp_attention.forward(x, x, x, step=4)[1].stats["pairs"]
    # a token sees at most `step` nodes on either side of each level
    assert all(pairs <= n * (1 + 8 * np.log2(n)) for n, pairs in work.items())
    assert work[4096] < 2.3 * work[2048] < 2.3**2 * work[1024]


def test_arguments_that_do_not_fit():
    q, k, v = draw(SHAPES[0])
    with pytest.raises(OptionError, match="step"):
        pyattn.bp_attention(q, k, v, step=0)
    with pytest.raises(OptionError, match="causal"):
        pyattn.bp_attention(q, k, v, step=1, causal="top_left")
    with pytest.raises(ShapeError, match="as many tokens as q"):
        pyattn.bp_attention(q, k[..., 1:, :], v[..., 1:, :], step=1)
    with pytest.raises(ShapeError, match="multiple of 2 step"):
        pyattn.bp_attention(q, k, v, np.zeros((7, 20)), step=2)
    with pytest.raises(ShapeError, match="edge_bias"):
        pyattn.bp_attention(q, k, v, np.zeros((5, 19)), step=2)


def test_nodes_hold_every_token_once_on_each_level():
    for n in range(1, 40):
        levels = n.bit_length() + 1 if n & (n - 1) else n.bit_length()
        assert node_counts(n).sum() == n * levels
