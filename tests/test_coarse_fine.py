"""Coarse-fine attention: exact in the block, means of the others, against dense formulas."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import oracle
import pytest
from table import Shape

import pyattn
from pyattn.checks import OptionError, ShapeError
from pyattn.features.pooling import mean_pool
from pyattn.testing import gradcheck
from pyattn.variants.coarse_fine import pattern, pooled_blocks

BACKENDS = ["cpu", "array_api"]
SHAPES = [Shape((), 1, 1, 1, 1, 4, 4), Shape((2,), 2, 2, 64, 64, 8, 6),
          Shape((2,), 4, 2, 70, 70, 8, 8), Shape((1,), 2, 1, 130, 130, 16, 5)]


def draw(s, dtype=np.float64):
    rng = np.random.default_rng([s.n, s.m])
    return tuple(rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e)))


def members(m, size, lengths):
    """(..., C, M): is key j in block c, and no padding?"""
    blocks = np.array([[j // size == c for j in range(m)] for c in range(-(-m // size))], bool)
    return blocks & (np.arange(m) < np.asarray(lengths)[..., None, None])


def problem(q, k, v, block_size, causal=False, q_lengths=None, kv_lengths=None, **options):
    """Every key, then every mean, and who sees which, pair by pair."""
    n, m = q.shape[-2], k.shape[-2]
    kv = np.broadcast_to(m if kv_lengths is None else kv_lengths, q.shape[:-3])
    nq = np.broadcast_to(n if q_lengths is None else q_lengths, q.shape[:-3])
    inside = members(m, block_size, kv)
    count = inside.sum(-1)
    share = inside / np.maximum(count, 1)[..., None]
    keys, values = (np.concatenate([x, share[..., None, :, :] @ x.astype("f8")], axis=-2)
                    for x in (k, v))
    allowed = np.zeros((*q.shape[:-3], 1, n, keys.shape[-2]), bool)
    for item in np.ndindex(q.shape[:-3]):
        start = 0 if causal == "top_left" else kv[item] - nq[item]
        for i in range(nq[item]):
            own = (start + i) // block_size
            for j in range(kv[item]):
                allowed[(*item, 0, i, j)] = j // block_size == own and (
                    not causal or j <= start + i)
            for c in range(count.shape[-1]):
                allowed[(*item, 0, i, m + c)] = count[(*item, c)] > 0 and (
                    c < own if causal else c != own)
    weight = np.concatenate([np.ones((*count.shape[:-1], m)), np.maximum(count, 1)], axis=-1)
    scale = np.broadcast_to(options.get("scale", q.shape[-1] ** -0.5), q.shape[-3]).astype("f8")
    dense = oracle.Dense(q, keys, values, scale, allowed, bias=np.log(weight)[..., None, None, :],
                         softcap=options.get("softcap"), sinks=options.get("sinks"))
    return dense, share


def wanted(q, k, v, dout, dlse, arithmetic, **options):
    dense, share = problem(q, k, v, **options)
    grads = oracle.backward(dense, dout, dlse, arithmetic)
    for name in "kv":
        m = k.shape[-2]
        exact, means = grads[name][..., :m, :], grads[name][..., m:, :]
        grads[name] = exact + np.swapaxes(share, -1, -2)[..., None, :, :] @ means
    return *oracle.forward(dense, arithmetic), grads


CASES = {
    "blocks": {"block_size": 8},
    "blocks of one": {"block_size": 1},
    "odd blocks": {"block_size": 7},
    "blocks beyond a tile": {"block_size": 67},
    "one block": {"block_size": 500},
    "causal": {"block_size": 9, "causal": True},
    "causal, one tile": {"block_size": 64, "causal": True},
    "sinks and softcap": {"block_size": 9, "causal": True, "softcap": 2.0, "sinks": "draw"},
    "scale": {"block_size": 16, "scale": "draw"},
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16],
                         ids=["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_the_rule(case, shape, backend, dtype):
    judge(draw(shape, dtype), backend, CASES[case])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [
    {"block_size": 8, "kv_lengths": [70, 33]}, {"block_size": 8, "kv_lengths": [0, 69]},
    {"block_size": 8, "kv_lengths": [70, 33], "q_lengths": [70, 33], "causal": True},
    {"block_size": 8, "kv_lengths": [70, 33], "q_lengths": [10, 50], "causal": True}], ids=str)
def test_padding(backend, options):
    judge(draw(Shape((2,), 4, 2, 70, 70, 8, 8)), backend, options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(20, 70), (1, 70), (70, 20)], ids=str)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_queries_and_keys_of_other_lengths(backend, lengths, causal):
    n, m = lengths
    judge(draw(Shape((2,), 2, 2, n, m, 8, 8)), backend, {"block_size": 8, "causal": causal})


def judge(arrays, backend, options):
    rng, dtype, heads = np.random.default_rng(7), arrays[0].dtype, arrays[0].shape[-3]
    drawn = {name: rng.standard_normal(heads).astype(dtype)
             for name, value in options.items() if isinstance(value, str) and value == "draw"}
    options = options | drawn
    with pyattn.use_backend(backend):
        (out, lse), saved = pyattn.coarse_fine_attention.forward(
            *arrays, **options, return_lse=True)
        dout = rng.standard_normal(out.shape).astype(dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        grads = saved.backward(dout, dlse)
    exact, rough = (wanted(*arrays, dout, dlse, r, **options)
                    for r in (oracle.exact(dtype), oracle.plain(dtype)))
    oracle.assert_close(out, exact[0], rough[0], factor=2, name="out", dtype=dtype)
    oracle.assert_close(lse, exact[1], rough[1], factor=2, name="lse", dtype=lse.dtype)
    assert set(grads._fields) == {"q", "k", "v", *drawn}
    for name in ("q", "k", "v"):
        oracle.assert_close(getattr(grads, name), exact[2][name], rough[2][name], factor=3,
                            name=f"d{name}", dtype=dtype)
    for name in drawn:
        # a few numbers, on which plain arithmetic may be right by luck; they are summed in wide
        # numbers, so that 16 bits cost only the rounding of arguments and result
        times = 3 if dtype.itemsize == 2 else 16
        np.testing.assert_allclose(
            np.asarray(getattr(grads, name), "f8"), np.asarray(exact[2][name], "f8"), rtol=0,
            atol=times * float(ml_dtypes.finfo(dtype).eps) * (1 + abs(exact[2][name]).max()))


@pytest.mark.parametrize("options", [
    {"block_size": 3}, {"block_size": 4, "causal": True, "return_lse": True},
    {"block_size": 4, "kv_lengths": [10, 5], "q_lengths": [10, 5]},
    {"block_size": 3, "dropout": 0.3, "rng": 0}], ids=str)
def test_gradients_are_derivatives(options):
    gradcheck(pyattn.coarse_fine_attention, *draw(Shape((2,), 2, 1, 10, 10, 4, 3)), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [1, 8, 9, 100])
def test_equal_keys_inside_each_block_are_dense(backend, block_size):
    q, k, v = draw(Shape((2,), 2, 2, 70, 70, 8, 8))
    k = np.repeat(k[..., ::block_size, :], block_size, axis=-2)[..., :70, :]
    with pyattn.use_backend(backend):
        out, lse = pyattn.coarse_fine_attention(q, k, v, block_size=block_size, return_lse=True)
        want, dense = pyattn.attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(out, want, rtol=0, atol=3e-15)
    np.testing.assert_allclose(lse, dense, rtol=0, atol=1e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_one_block_and_blocks_of_one_are_dense(causal):
    q, k, v = draw(Shape((2,), 2, 2, 70, 70, 8, 8))
    want = pyattn.attention(q, k, v, causal=causal)
    for block_size in (1, 70, 999):
        out = pyattn.coarse_fine_attention(q, k, v, block_size=block_size, causal=causal)
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("block_size", [5, 16, 64])
def test_causal_lets_nothing_of_the_future_through(block_size):
    arrays = draw(Shape((1,), 2, 2, 100, 100, 8, 8))
    options = {"block_size": block_size, "causal": True}
    before = pyattn.coarse_fine_attention(*arrays, **options)
    for t in (0, 37, 64, 99):
        changed = (np.where(np.arange(100)[:, None] == t, x + 1, x) for x in arrays)
        after = pyattn.coarse_fine_attention(*changed, **options)
        assert np.array_equal(before[..., :t, :], after[..., :t, :])
        assert (before[..., t:, :] != after[..., t:, :]).any(axis=-1).all()


def test_padding_is_never_read():
    arrays = draw(Shape((2,), 2, 2, 70, 70, 8, 8))
    options = {"block_size": 8, "kv_lengths": [70, 33], "q_lengths": [70, 33]}
    want, saved = pyattn.coarse_fine_attention.forward(*arrays, **options)
    dout = np.ones_like(want)
    grads = saved.backward(dout)
    for x in (*arrays, dout):
        x[1, :, 33:] = np.nan
    out, saved = pyattn.coarse_fine_attention.forward(*arrays, **options)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
    assert not out[1, :, 33:].any()
    for got, gradient in zip(saved.backward(dout), grads, strict=True):
        np.testing.assert_allclose(got, gradient, rtol=0, atol=1e-13)
        assert not got[1, :, 33:].any()


def test_tiles_grow_like_n_to_three_halves():
    def tiles(n, causal):
        x = np.zeros((1, n, 4), np.float32)
        _, saved = pyattn.coarse_fine_attention.forward(
            x, x, x, block_size=round(n**0.5), causal=causal)
        return saved.stats["tiles"]

    for causal in (False, True):
        assert tiles(16384, causal) < 9 * tiles(4096, causal)
        assert tiles(16384, causal) < 0.05 * (16384 / 64) ** 2


def test_the_pattern_is_the_rule():
    for causal in (False, True):
        q, k, v = draw(Shape((), 1, 1, 70, 70, 4, 4))
        allowed = problem(q, k, v, 9, causal)[0].allowed[0]
        found = pattern(70, 70, block_size=9, causal=causal)
        assert (found.n, found.m) == allowed.shape
        assert np.array_equal(found.dense(*allowed.shape), allowed)
        assert np.array_equal(found.compile(*allowed.shape).dense(), allowed)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_size", [1, 9, 37, 64, 100])
def test_tiles_of_many_blocks_are_told_apart(block_size, causal):
    whole = pattern(400, 410, block_size=block_size, causal=causal)
    for found in (whole, pooled_blocks(block_size, 30, causal)):
        blocks = found.compile(whole.n, whole.m)
        assert np.array_equal(blocks.dense(), found.dense(whole.n, whole.m))


@pytest.mark.parametrize("lengths", [None, [5, 0], 6])
def test_mean_pool(lengths):
    x = np.random.default_rng(0).standard_normal((2, 3, 7, 4))
    y = mean_pool(x, block_size=3, lengths=lengths)
    for item, length in enumerate(np.broadcast_to(7 if lengths is None else lengths, 2)):
        for c in range(3):
            block = x[item, :, 3 * c:max(min(3 * c + 3, length), 3 * c)]
            want = block.mean(axis=1) if block.shape[1] else 0
            np.testing.assert_allclose(y[item, :, c], want, atol=1e-15)
    gradcheck(mean_pool, x, block_size=3, lengths=lengths)


X = np.ones((2, 2, 6, 4))


@pytest.mark.parametrize(("options", "error", "says"), [
    ({"block_size": 0}, OptionError, "block_size must be at least 1; got 0"),
    ({"block_size": 2, "causal": "left"}, OptionError, "causal must be one of"),
    ({"block_size": 2, "kv_lengths": [1, 2, 3]}, ShapeError, "lengths must broadcast"),
    ({"block_size": 2, "kv_lengths": [1, 7]}, ShapeError, r"must lie in 0\.\.6; got 1\.\.7"),
])
def test_errors(options, error, says):
    with pytest.raises(error, match=says):
        pyattn.coarse_fine_attention(X, X, X, **options)


def test_keys_and_values_must_match():
    with pytest.raises(ShapeError, match="k and v must have equally many tokens"):
        pyattn.coarse_fine_attention(X, X, X[..., :5, :], block_size=2)


def test_a_mask_has_no_place():
    with pytest.raises(TypeError, match="mask"):
        pyattn.coarse_fine_attention(X, X, X, block_size=2, mask=np.ones((6, 6), bool))
