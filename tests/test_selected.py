"""Attention to listed blocks of keys, against dense formulas with the lists spelled out."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import oracle
import pytest
from table import Shape

import pyattn
from pyattn.checks import BackendError, DtypeError, OptionError, ShapeError
from pyattn.engines import selected
from pyattn.testing import gradcheck
from pyattn.threads import get_num_threads, set_num_threads

BACKENDS = ["cpu", "array_api"]
BFLOAT16 = ml_dtypes.bfloat16
DTYPES = [pytest.param(dtype, id=np.dtype(dtype).name)
          for dtype in (np.float32, np.float64, BFLOAT16, np.float16)]
SHAPES = [Shape((), 1, 1, 1, 1, 4, 4), Shape((2,), 2, 1, 64, 64, 8, 6),
          Shape((2,), 8, 2, 70, 70, 8, 8), Shape((1,), 16, 1, 150, 150, 16, 16),
          Shape((1,), 16, 2, 100, 200, 40, 24), Shape((2, 1), 2, 2, 200, 130, 8, 8),
          Shape((1,), 80, 1, 33, 129, 8, 16)]


def draw(s, dtype=np.float64):
    rng = np.random.default_rng([s.n, s.m])
    return tuple(rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e)))


def lists(s, block_size, count=3, seed=0):
    """Some blocks of those there are, or none, in any order, some twice."""
    rng = np.random.default_rng([seed, s.n, s.m, block_size])
    return rng.integers(-1, -(-s.m // block_size), (*s.batch, s.groups, s.n, count))


def allowed(blocks, m, block_size, causal=False, q_lengths=None, kv_lengths=None):
    """(..., G, N, M), pair by pair."""
    *batch, groups, n, _ = blocks.shape
    found = np.zeros((*batch, groups, n, m), bool)
    nq = np.broadcast_to(n if q_lengths is None else q_lengths, batch)
    kv = np.broadcast_to(m if kv_lengths is None else kv_lengths, batch)
    for item in np.ndindex(*batch):
        start = 0 if causal == "top_left" else kv[item] - nq[item]
        for g in range(groups):
            for i in range(nq[item]):
                for c in blocks[(*item, g, i)]:
                    if c >= 0:
                        first, end = c * block_size, min((c + 1) * block_size, kv[item])
                        if causal:
                            end = min(end, start + i + 1)
                        found[(*item, g, i)][first:max(first, end)] = True
    return found


def problem(q, k, v, blocks, block_size, scale=None, softcap=None, **options):
    heads = q.shape[-3]
    blocks = np.broadcast_to(blocks, (*k.shape[:-2], q.shape[-2], blocks.shape[-1]))
    pairs = allowed(blocks, k.shape[-2], block_size, **options)
    scale = np.full(heads, q.shape[-1] ** -0.5 if scale is None else scale)
    return oracle.Dense(q, k, v, scale, np.repeat(pairs, heads // k.shape[-3], axis=-3),
                        softcap=softcap)


def judge(arrays, blocks, backend, return_lse=True, **options):
    rng, dtype = np.random.default_rng(7), arrays[0].dtype
    with pyattn.use_backend(backend):
        (out, lse), saved = selected.forward(*arrays, blocks, return_lse=True, **options)
        dout = rng.standard_normal(out.shape).astype(dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        grads = saved.backward(dout, dlse)
    dense = problem(*arrays, blocks, **options)
    exact, rough = ((*oracle.forward(dense, r), oracle.backward(dense, dout, dlse, r))
                    for r in (oracle.exact(dtype), oracle.plain(dtype)))
    oracle.assert_close(out, exact[0], rough[0], factor=2, name="out", dtype=dtype)
    oracle.assert_close(lse, exact[1], rough[1], factor=2, name="lse", dtype=lse.dtype)
    assert grads._fields == ("q", "k", "v")
    for name in "qkv":
        oracle.assert_close(getattr(grads, name), exact[2][name], rough[2][name], factor=3,
                            name=f"d{name}", dtype=dtype)
    pairs = int(np.broadcast_to(dense.allowed, (*out.shape[:-1], arrays[1].shape[-2])).sum())
    assert saved.stats["pairs"] == pairs
    return out, lse, saved, grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_rule(shape, backend, dtype):
    causals = (False, True, "top_left") if dtype == np.float32 else (True,)
    for causal in causals:
        judge(draw(shape, dtype), lists(shape, 64), backend, block_size=64, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 48, 65, 96, 128, 1000])
def test_blocks_of_any_size(block_size, backend, dtype):
    shape = Shape((), 6, 2, 70, 150, 8, 24)
    arrays, blocks = draw(shape, dtype), lists(shape, block_size, 4)
    if backend == "cpu" and block_size < 8:
        with pyattn.use_backend("cpu"), pytest.raises(BackendError, match="at least 8 keys"):
            selected.forward(*arrays, blocks, block_size=block_size)
        return
    for causal in (False, True):
        judge(arrays, blocks, backend, block_size=block_size, causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [64, 40])
@pytest.mark.parametrize("options", [
    {"kv_lengths": [130, 33]}, {"kv_lengths": [0, 129]}, {"kv_lengths": 65, "causal": True},
    {"kv_lengths": [130, 33], "q_lengths": [10, 70], "causal": True},
    {"kv_lengths": [130, 33], "q_lengths": [10, 70], "causal": "top_left"},
    {"q_lengths": [0, 70]}, {"scale": 0.7, "softcap": 1.5, "causal": True}], ids=str)
def test_lengths_and_softcap(options, block_size, backend):
    shape = Shape((2,), 4, 2, 70, 130, 8, 8)
    judge(draw(shape), lists(shape, block_size), backend, block_size=block_size, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [
    Shape((2,), 2, 1, 0, 5, 4, 4), Shape((2,), 2, 1, 5, 0, 4, 4), Shape((0,), 2, 2, 3, 3, 4, 4),
    Shape((1,), 0, 0, 3, 3, 4, 4)], ids=str)
def test_nothing_at_all(shape, backend):
    for count in (0, 2):
        blocks = np.full((*shape.batch, shape.groups, shape.n, count), -1)
        with pyattn.use_backend(backend):
            out, saved = selected.forward(*draw(shape), blocks, block_size=64)
            grads = saved.backward(out)
        assert not out.any()
        assert not any(x.any() for x in grads)
        assert saved.stats["pairs"] == saved.stats["flops"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_lists_nothing(backend):
    shape = Shape((2,), 4, 1, 70, 70, 8, 8)
    blocks = lists(shape, 64)
    blocks[:, :, ::3] = -1
    out, lse, _, grads = judge(draw(shape), blocks, backend, block_size=64)
    assert not out[:, :, ::3].any()
    assert (lse[:, :, ::3] == -np.inf).all()
    assert not grads.q[:, :, ::3].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("lengths", [(200, 200), (70, 200), (200, 70)], ids=str)
def test_all_blocks_are_dense(lengths, causal, backend):
    shape = Shape((2,), 6, 2, *lengths, 16, 16)
    arrays = draw(shape)
    want, dense = pyattn.attention.forward(*arrays, causal=causal)
    blocks = np.random.default_rng(0).permuted(np.broadcast_to(
        np.arange(-(-shape.m // 64)), (2, 2, shape.n, -(-shape.m // 64))), axis=-1)
    with pyattn.use_backend(backend):
        out, saved = selected.forward(*arrays, blocks, block_size=64, causal=causal)
        found = saved.backward(want)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
    assert saved.stats["pairs"] == dense.stats["pairs"]
    for x, y in zip(found, dense.backward(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)


def test_order_and_repetition_change_nothing():
    shape = Shape((2,), 4, 2, 130, 200, 8, 8)
    arrays, blocks = draw(shape, np.float32), lists(shape, 64)
    out, saved = selected.forward(*arrays, blocks, block_size=64)
    other = np.concatenate([blocks[..., ::-1], blocks, np.full_like(blocks, -1)], axis=-1)
    again, other_saved = selected.forward(*arrays, other, block_size=64)
    assert np.array_equal(out, again)
    assert saved.stats == other_saved.stats
    for x, y in zip(saved.backward(out), other_saved.backward(out), strict=True):
        assert np.array_equal(x, y)


def test_one_list_for_all():
    shape = Shape((2,), 4, 2, 70, 130, 8, 8)
    arrays, blocks = draw(shape), lists(shape, 64)[0, 0]
    judge(arrays, blocks, "cpu", block_size=64)
    out, saved = selected.forward(*arrays, blocks, block_size=64)
    assert saved.decisions["blocks"].shape == (2, 2, 70, 3)
    again = selected.forward(*arrays, saved.decisions["blocks"], block_size=64)[0]
    assert np.array_equal(out, again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_axes_broadcast(backend):
    shape = Shape((3, 2), 4, 2, 70, 70, 8, 8)
    q, k, v = draw(shape)
    k, v = k[:1], v[0]
    whole = tuple(np.ascontiguousarray(np.broadcast_to(x, (3, 2, *x.shape[-3:])))
                  for x in (q, k, v))
    blocks = lists(shape, 64)
    with pyattn.use_backend(backend):
        out, saved = selected.forward(q, k, v, blocks, block_size=64)
        want, wanted = selected.forward(*whole, blocks, block_size=64)
        found, full = saved.backward(out), wanted.backward(out)
    assert np.array_equal(out, want)
    np.testing.assert_allclose(found.q, full.q, atol=1e-14)
    np.testing.assert_allclose(found.k, full.k.sum(0, keepdims=True), atol=1e-14)
    np.testing.assert_allclose(found.v, full.v.sum(0), atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [64, 24])
def test_what_is_not_seen_is_never_read(block_size, backend, dtype):
    shape = Shape((1,), 4, 2, 130, 130, 8, 8)
    q, k, v = draw(shape, dtype)
    blocks = lists(shape, block_size, 2)
    options = {"block_size": block_size, "causal": True}
    blocks[..., 100:, :] = -1
    blocks[blocks == 1] = 0                        # so block 1 is listed by nobody
    with pyattn.use_backend(backend):
        want = selected.forward(q, k, v, blocks, **options)[0]
        dout = np.ones_like(want)
        for x in (k, v):
            x[..., block_size:2 * block_size, :] = np.nan
            x[..., 99:, :] = np.inf                # behind every token that lists anything
        for x in (q, dout):
            x[..., 100:, :] = np.nan
        blocks[..., 99, :] = -1
        want[..., 99, :] = 0
        out, saved = selected.forward(q, k, v, blocks, **options)
        dout[..., 99, :] = np.nan
        finite = selected.forward(
            q[..., :99, :], *(np.where(np.isfinite(x), x, 0) for x in (k, v)),
            blocks[..., :99, :], block_size=block_size, causal="top_left")[1]
        wanted, grads = finite.backward(dout[..., :99, :]), saved.backward(dout)
    assert not grads.q[..., 99:, :].any()
    for x, y in ((out, want), (grads.q[..., :99, :], wanted.q), (grads.k, wanted.k),
                 (grads.v, wanted.v)):
        x, y = x.astype("f8"), y.astype("f8")
        np.testing.assert_allclose(
            x, y, rtol=0, atol=8 * float(ml_dtypes.finfo(dtype).eps) * (1 + abs(y).max()))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_goes_where_it_is_seen_and_nowhere_else(backend, dtype):
    shape = Shape((1,), 4, 2, 100, 100, 8, 8)
    for name in ("q", "k", "v", "dout"):
        q, k, v = draw(shape, dtype)
        dout = np.ones((1, 4, 100, 8), dtype)
        blocks = np.broadcast_to(np.arange(2), (1, 2, 100, 2))
        {"q": q, "k": k, "v": v, "dout": dout}[name][:, :, 40] = np.nan
        with pyattn.use_backend(backend):
            out, saved = selected.forward(q, k, v, blocks, block_size=64, causal=True)
            grads = saved.backward(dout)
        rows = np.isnan(np.asarray(out, "f4")).any(axis=(0, 1, 3))
        assert np.array_equal(np.flatnonzero(rows), {
            "q": [40], "k": np.arange(40, 100), "v": np.arange(40, 100), "dout": []}[name])
        for gradient in (grads.k, grads.v) if name in ("q", "dout") else ():
            rows = np.isnan(np.asarray(gradient, "f4")).any(axis=(0, 1, 3))
            assert rows[:41].all()
            assert not rows[41:].any()
        rows = np.isnan(np.asarray(grads.q, "f4")).any(axis=(0, 1, 3))
        assert not rows[:40].any()
        assert rows[40]


@pytest.mark.parametrize("block_size", [64, 9])
def test_causal_lets_nothing_of_the_future_through(block_size):
    shape = Shape((1,), 4, 2, 150, 150, 8, 8)
    arrays, blocks = draw(shape), lists(shape, block_size)
    blocks[..., 0] = np.arange(150) // block_size      # each sees itself
    before, _ = selected.forward(*arrays, blocks, block_size=block_size, causal=True)
    for t in (0, 37, 64, 149):
        changed = (np.where(np.arange(150)[:, None] == t, x + 1, x) for x in arrays)
        after, _ = selected.forward(*changed, blocks, block_size=block_size, causal=True)
        assert np.array_equal(before[..., :t, :], after[..., :t, :])
        assert (before[..., t, :] != after[..., t, :]).any()


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("groups", [1, 4])
def test_threads_change_no_bit(groups, dtype):
    shape = Shape((1,), 16, groups, 700, 700, 16, 16)
    arrays, blocks = draw(shape, dtype), lists(shape, 64, 4)
    usual, found = get_num_threads(), []
    try:
        for threads in (1, 2, 2, 5):
            set_num_threads(threads)
            out, saved = selected.forward(*arrays, blocks, block_size=64, causal=True)
            found.append((out, saved.lse, *saved.backward(out)))
    finally:
        set_num_threads(usual)
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            assert np.array_equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_rounds_and_chunks(monkeypatch, dtype):
    from pyattn.kernels.cpu import selected as kernel

    monkeypatch.setattr(kernel, "ROUND_BYTES", (1, 1))
    monkeypatch.setattr(kernel, "CHUNK_ROWS", (1, 70))
    for heads in (1, 3, 16):
        shape = Shape((), heads, 1, 330, 330, 4, 4)
        judge(draw(shape, dtype), lists(shape, 64), "cpu", block_size=64, causal=True)


@pytest.mark.parametrize("options", [
    {"block_size": 3}, {"block_size": 4, "causal": True, "softcap": 2.0},
    {"block_size": 8, "kv_lengths": [10, 5], "q_lengths": [10, 5], "return_lse": True}], ids=str)
def test_gradients_are_derivatives(options):
    shape = Shape((2,), 4, 2, 10, 10, 4, 3)
    blocks = lists(shape, options["block_size"], 2)

    class Op:
        @staticmethod
        def forward(q, k, v, decisions=None, **options):
            return selected.forward(q, k, v, blocks, **options)

    gradcheck(Op, *draw(shape), **options)


def test_other_libraries():
    shape = Shape((2,), 4, 2, 70, 130, 8, 8)
    arrays, blocks = draw(shape), lists(shape, 64)
    want, wanted = selected.forward(*arrays, blocks, block_size=64, causal=True)
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x) for x in arrays]
    out, saved = selected.forward(*tensors, torch.from_numpy(blocks), block_size=64, causal=True)
    np.testing.assert_allclose(out.numpy(), want, atol=1e-14)
    for x, y in zip(saved.backward(out), wanted.to(torch).backward(out), strict=True):
        np.testing.assert_allclose(x.numpy(), y.numpy(), atol=1e-13)
    moved = saved.to(np).backward(want)
    for x, y in zip(moved, wanted.backward(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-13)


def test_strict_arrays():
    xp = pytest.importorskip("array_api_strict")
    shape = Shape((1,), 4, 2, 70, 70, 8, 8)
    arrays, blocks = draw(shape), lists(shape, 64)
    want, wanted = selected.forward(*arrays, blocks, block_size=64, causal=True, softcap=2.0)
    out, saved = selected.forward(*map(xp.asarray, arrays), blocks, block_size=64, causal=True,
                                  softcap=2.0)
    np.testing.assert_allclose(np.asarray(out), want, atol=1e-14)
    for x, y in zip(saved.backward(out), wanted.backward(want), strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-13)


def test_strided_and_read_only_arguments():
    shape = Shape((2,), 8, 2, 70, 130, 8, 8)
    arrays, blocks = draw(shape, np.float32), lists(shape, 64)
    want, wanted = selected.forward(*arrays, blocks, block_size=64)
    turned = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in arrays]
    for x in (*turned, blocks):
        x.flags.writeable = False
    out, saved = selected.forward(*turned, blocks, block_size=64)
    assert np.array_equal(out, want)
    dout = np.broadcast_to(np.float32(1), out.shape)
    for x, y in zip(saved.backward(dout), wanted.backward(np.ones_like(out)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def test_work_is_what_was_listed():
    def stats(n, count):
        shape = Shape((1,), 4, 1, n, n, 8, 8)
        blocks = np.argsort(np.random.default_rng(0).random((1, 1, n, n // 64)))[..., :count]
        return selected.forward(*draw(shape, np.float32), blocks, block_size=64)[1].stats

    for n in (512, 1024):
        found = stats(n, 4)
        assert found["pairs"] == 4 * n * 4 * 64
        assert found["flops"] == 2 * found["pairs"] * 16
        assert found["tiles"] == found["pairs"] // 64**2


X = np.ones((2, 2, 6, 4))
B = np.zeros((6, 1), int)


@pytest.mark.parametrize(("blocks", "options", "error", "says"), [
    (B, {"block_size": 0}, OptionError, "block_size must be at least 1; got 0"),
    (B, {"causal": "left"}, OptionError, "causal must be one of"),
    (B, {"softcap": -1}, OptionError, "softcap must be positive; got -1"),
    (B, {"kv_lengths": [1, 7]}, ShapeError, r"must lie in 0\.\.6; got 1\.\.7"),
    (B + 3, {}, OptionError, r"blocks must lie in -1\.\.2, where -1 is none; got 3\.\.3"),
    (B - 2, {}, OptionError, r"blocks must lie in -1\.\.2, where -1 is none; got -2\.\.-2"),
    (B + 0.0, {}, OptionError, "blocks must be integers; got float64"),
    (B[:, 0], {}, ShapeError, "blocks must have at least 2 axes"),
    (B[:5], {}, ShapeError, r"blocks must broadcast to \(..., G, N, count\) = \(2, 2, 6, 1\)"),
])
def test_errors(blocks, options, error, says):
    with pytest.raises(error, match=says):
        selected.forward(X, X, X, blocks, **({"block_size": 2} | options))


def test_operands_must_fit():
    with pytest.raises(ShapeError, match="v has 5 tokens but k has 6"):
        selected.forward(X, X, X[..., :5, :], B, block_size=2)
    with pytest.raises(DtypeError, match="share one dtype"):
        selected.forward(X, X, X.astype("f4"), B, block_size=2)
    out, saved = selected.forward(X, X, X, B, block_size=2)
    with pytest.raises(ShapeError, match="dout must have the shape"):
        saved.backward(out[0])
