"""Longformer: window and global tokens with six projections, against two dense attentions."""

from __future__ import annotations

import functools

import numpy as np
import oracle
import pytest

import pyattn
from pyattn import masks
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.features.rows import Rows
from pyattn.testing import gradcheck
from pyattn.variants.longformer import pattern

BACKENDS = ["cpu", "array_api"]
NAMES = ("q", "k", "v", "q_global", "k_global", "v_global")


def draw(n, heads=2, groups=2, batch=(2,), d=8, e=6, dtype=np.float64, seed=0):
    rng = np.random.default_rng([seed, n])
    sizes = 2 * [(heads, d), (groups, d), (groups, e)]
    return {name: rng.standard_normal((*batch, h, n, width)).astype(dtype)
            for name, (h, width) in zip(NAMES, sizes, strict=True)}


def held(global_index, n):
    """bool (..., N): is this token global?"""
    given = np.asarray(global_index)
    return given if given.dtype == bool else np.array([i in global_index for i in range(n)], bool)


def seen(n, heads, *, window, global_index, dilation=1, causal=False, kv_lengths=None, mask=None,
         **_):
    """The paper's rule, token by token: (..., H, N, N) for local rows and for global ones."""
    is_global = held(global_index, n)
    steps = np.broadcast_to(dilation, heads)
    near = np.array([[[abs(i - j) <= window * s and (i - j) % s == 0 for j in range(n)]
                      for i in range(n)] for s in steps]).reshape(heads, n, n)
    local = (near | is_global[..., None, None, :]) & ~is_global[..., None, :, None]
    overall = is_global[..., None, :, None] & np.ones((n, n), bool)
    for allowed in ([np.tri(n, dtype=bool)] if causal else []) + ([] if mask is None else [mask]):
        local, overall = local & allowed, overall & allowed
    if kv_lengths is not None:
        inside = np.arange(n) < np.asarray(kv_lengths)[..., None]
        pairs = inside[..., None, :, None] & inside[..., None, None, :]
        local, overall = local & pairs, overall & pairs
    return local, overall


def problems(arrays, **options):
    """The attention of local rows and that of global rows, each dense, the other's rows empty."""
    heads, n, d = arrays["q"].shape[-3:]
    scale = np.broadcast_to(options.get("scale", d**-0.5), heads).astype("f8")
    return [oracle.Dense(*(arrays[name] for name in names), scale, allowed,
                         softcap=options.get("softcap"))
            for names, allowed in zip((NAMES[:3], NAMES[3:]), seen(n, heads, **options),
                                      strict=True)]


def wanted(arrays, dout, dlse, arithmetic, **options):
    """Output, lse and the gradients by name."""
    found, grads = [], {}
    for suffix, dense in zip(("", "_global"), problems(arrays, **options), strict=True):
        found.append(oracle.forward(dense, arithmetic))
        part = oracle.backward(dense, dout, dlse, arithmetic)
        for name in "qkv":
            given = arrays[name + suffix]
            grads[name + suffix] = oracle.sum_to(part[name], given.shape)
        grads["scale"] = grads.get("scale", 0) + oracle.sum_to(part["scale"], part["scale"].shape)
    (out, lse), (far, far_lse) = found
    # the rows of one attention are empty where the other has its own
    return out + far, np.maximum(lse, far_lse), grads


def run(arrays, backend, **options):
    rng = np.random.default_rng(7)
    with pyattn.use_backend(backend):
        (out, lse), saved = pyattn.longformer_attention.forward(
            **arrays, **options, return_lse=True)
        dout = rng.standard_normal(out.shape).astype(out.dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        return out, lse, dout, dlse, saved.backward(dout, dlse)


BOTH = np.zeros((2, 70), bool)
BOTH[0, [0, 1, 65]] = True
BOTH[1, [69]] = True
MASK = np.random.default_rng(3).random((70, 70)) < 0.6

CASES = {
    "one token": (draw, 1, {"window": 0, "global_index": []}),
    "first token": (draw, 65, {"window": 5, "global_index": [0]}),
    "no global token": (draw, 70, {"window": 5, "global_index": []}),
    "scattered": (draw, 133, {"window": 3, "global_index": [0, 1, 66, 132]}),
    "on the tile": (draw, 64, {"window": 20, "global_index": [63]}),
    "window 0": (draw, 70, {"window": 0, "global_index": [3]}),
    "dilated": (draw, 70, {"window": 4, "global_index": [9], "dilation": 3}),
    "dilation by head": (draw, 70, {"window": 4, "global_index": [9], "dilation": [1, 5]}),
    "causal": (draw, 133, {"window": 9, "global_index": [0, 100], "causal": True}),
    "by item": (draw, 70, {"window": 2, "global_index": BOTH}),
    "by item, causal": (draw, 70, {"window": 2, "global_index": BOTH, "causal": True}),
    "boolean": (draw, 70, {"window": 2, "global_index": BOTH[0]}),
    "lengths": (draw, 70, {"window": 4, "global_index": [0, 30, 60], "kv_lengths": [66, 25]}),
    "lengths by item": (draw, 70, {"window": 4, "global_index": BOTH, "kv_lengths": [66, 70],
                                   "causal": True}),
    "mask": (draw, 70, {"window": 30, "global_index": [0, 5], "mask": MASK}),
    "mask, causal": (draw, 70, {"window": 30, "global_index": BOTH, "mask": MASK,
                                "causal": "top_left"}),
    "grouped queries": (functools.partial(draw, heads=4, groups=2), 70,
                        {"window": 3, "global_index": [2], "scale": 0.7, "softcap": 2.0}),
    "no batch": (functools.partial(draw, batch=()), 70, {"window": 3, "global_index": [2]}),
    "scale by head": (draw, 70, {"window": 3, "global_index": [2, 3],
                                 "scale": np.array([0.3, 0.1])}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_against_the_rule_of_the_paper(case, backend, dtype):
    make, n, options = CASES[case]
    arrays = make(n, dtype=dtype)
    if isinstance(options.get("scale"), np.ndarray):
        options = options | {"scale": options["scale"].astype(dtype)}
    out, lse, dout, dlse, grads = run(arrays, backend, **options)
    exact, rough = (wanted(arrays, dout, dlse, r, **options)
                    for r in (oracle.exact(dtype), oracle.plain(dtype)))
    for name, got, which in (("out", out, 0), ("lse", lse, 1)):
        oracle.assert_close(got, exact[which], rough[which], factor=2, name=name, dtype=dtype)
    extra = ("scale",) if "scale" in grads._fields else ()
    assert grads._fields == (*NAMES, *extra)
    assert bool(extra) == isinstance(options.get("scale"), np.ndarray)
    for name in grads._fields:
        oracle.assert_close(getattr(grads, name), exact[2][name], rough[2][name], factor=3,
                            name=f"d{name}", dtype=dtype)


@pytest.mark.parametrize("options", [
    {"global_index": [0, 3]}, {"global_index": [4], "causal": True, "dilation": 2},
    {"global_index": np.array([[True] + 8 * [False], 9 * [True]]), "kv_lengths": [9, 6]},
    {"global_index": [1, 8], "dropout": 0.3, "rng": 0}], ids=str)
def test_gradients_are_derivatives(options):
    gradcheck(pyattn.longformer_attention, **draw(9), window=2, return_lse=True, **options)
    scale = np.array([0.5, 0.2])
    gradcheck(pyattn.longformer_attention, *(draw(9)[name] for name in "qkv"), scale=scale,
              window=2, **options)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_global_with_copied_projections_is_dense(backend):
    arrays = draw(70)
    q, k, v = (arrays[name] for name in "qkv")
    dout = np.random.default_rng(1).standard_normal((2, 2, 70, 6))
    with pyattn.use_backend(backend):
        out, saved = pyattn.longformer_attention.forward(
            q, k, v, q, k, v, window=3, global_index=range(70))
        want, dense = pyattn.attention.forward(q, k, v)
        close(out, want)
        grads = saved.backward(dout)
        for name, gradient in zip("qkv", dense.backward(dout), strict=True):
            close(getattr(grads, f"{name}_global"), gradient)
            assert not getattr(grads, name).any()


def test_a_window_over_all_tokens_is_dense_for_local_rows():
    arrays = draw(70)
    out = pyattn.longformer_attention(**arrays, window=69, global_index=[7])
    want = pyattn.attention(*(arrays[name] for name in "qkv"))
    far = pyattn.attention(*(arrays[name] for name in NAMES[3:]))
    want[..., 7, :] = far[..., 7, :]
    close(out, want)


def test_without_global_arrays_the_local_ones_serve():
    q, k, v = (draw(70)[name] for name in "qkv")
    dout = np.random.default_rng(1).standard_normal((2, 2, 70, 6))
    options = {"window": 3, "global_index": [0, 40], "causal": True}
    out, saved = pyattn.longformer_attention.forward(q, k, v, **options)
    want, six = pyattn.longformer_attention.forward(q, k, v, q, k, v, **options)
    close(out, want)
    grads, parts = saved.backward(dout), six.backward(dout)
    assert grads._fields == ("q", "k", "v")
    for name, gradient in zip("qkv", grads, strict=True):
        close(gradient, getattr(parts, name) + getattr(parts, f"{name}_global"))


def test_a_global_key_inside_the_window_counts_once():
    q, k = np.zeros((2, 1, 5, 4))
    v = np.eye(5)[None]                # equal scores: out is the share of each key
    out = pyattn.longformer_attention(q, k, v, window=1, global_index=[2])
    close(out[0, 1], np.array([1, 1, 1, 0, 0]) / 3)
    close(out[0, 4], np.array([0, 0, 1, 1, 1]) / 3)
    close(out[0, 2], np.full(5, 1 / 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_rows_are_zero_and_padding_is_never_read(backend):
    arrays, dout = draw(70), np.random.default_rng(1).standard_normal((2, 2, 70, 6))
    options = {"window": 4, "global_index": [0, 50, 69], "q_lengths": [69, 40]}
    with pyattn.use_backend(backend):
        clean, saved = pyattn.longformer_attention.forward(**arrays, **options)
        grads = saved.backward(dout)
        padding = np.arange(70) >= np.array([69, 40])[:, None]
        for x in (*arrays.values(), dout):
            np.swapaxes(x, 1, 2)[padding] = np.nan
        out, saved = pyattn.longformer_attention.forward(**arrays, **options)
        assert not np.swapaxes(out, 1, 2)[padding].any()
        close(out, clean)
        for got, want in zip(saved.backward(dout), grads, strict=True):
            close(got, want)
            assert not np.swapaxes(got, 1, 2)[padding].any()


def test_local_arrays_learn_nothing_from_global_rows_nor_the_reverse():
    arrays = draw(70)
    out, saved = pyattn.longformer_attention.forward(**arrays, window=3, global_index=[5, 66])
    dout = np.zeros_like(out)
    dout[..., [5, 66], :] = 1
    grads = saved.backward(dout)
    assert not any(getattr(grads, name).any() for name in NAMES[:3])
    assert all(getattr(grads, name).any() for name in NAMES[3:])
    grads = saved.backward(np.ones_like(out) - dout)
    assert not any(getattr(grads, name).any() for name in NAMES[3:])
    assert not grads.q[..., [5, 66], :].any()


def test_causal_lets_nothing_of_the_future_through():
    arrays, t = draw(100), 37
    options = {"window": 5, "global_index": [0, 37, 60], "causal": True}
    before = pyattn.longformer_attention(**arrays, **options)
    after = pyattn.longformer_attention(
        **{name: np.where(np.arange(100)[:, None] == t, x + 1, x) for name, x in arrays.items()},
        **options)
    assert np.array_equal(before[..., :t, :], after[..., :t, :])
    assert (before[..., t, :] != after[..., t, :]).all()


def test_dropout_is_kept_by_its_decision_and_differs_between_local_and_global_rows():
    # all queries and keys alike and values one-hot: a row shows what it kept
    n = 64
    q = k = np.zeros((1, n, 4))
    options = {"window": n, "global_index": [n - 1], "dropout": 0.5}
    out, saved = pyattn.longformer_attention.forward(q, k, np.eye(n)[None], rng=1, **options)
    again = pyattn.longformer_attention(q, k, np.eye(n)[None], decisions=saved.decisions, **options)
    assert np.array_equal(out, again)
    plain = pyattn.attention(q, k, np.eye(n)[None], dropout=0.5, decisions=saved.decisions)
    assert np.array_equal(out[0, :-1] != 0, plain[0, :-1] != 0)
    assert not np.array_equal(out[0, -1] != 0, plain[0, -1] != 0)


def test_tiles_grow_with_the_length():
    def tiles(n):
        x = np.zeros((1, n, 4), np.float32)
        _, saved = pyattn.longformer_attention.forward(
            x, x, x, window=64, global_index=[0, n // 3, n - 1])
        return saved.stats["tiles"]

    counts = [tiles(n) for n in (1024, 2048, 4096)]
    assert counts[2] < 2.2 * counts[1] < 5 * counts[0]


def test_scattered_global_rows_share_a_tile():
    x = np.zeros((1, 2048, 4), np.float32)
    _, saved = pyattn.longformer_attention.forward(x, x, x, window=0,
                                                   global_index=range(0, 2048, 64))
    assert saved.overall.stats["tiles"] == 2048 // 64


def test_the_pattern_is_the_rule():
    options = {"window": 2, "global_index": [0, 66], "dilation": [1, 3]}
    local, overall = seen(70, 2, **options)
    assert np.array_equal(pattern(70, 70, **options).dense(70, 70), local | overall)
    options = {"window": 2, "global_index": BOTH}
    local, overall = seen(70, 1, **options)
    assert np.array_equal(pattern(70, 70, **options).dense(70, 70), local | overall)


def test_rows_are_taken_and_put_back_item_by_item():
    x = np.random.default_rng(0).standard_normal((2, 3, 70, 4))
    rows = Rows.of(BOTH)
    taken = rows.take(x)
    assert taken.shape == (2, 3, 3, 4)
    assert np.array_equal(taken[0], x[0][:, [0, 1, 65]])
    assert np.array_equal(taken[1, :, 0], x[1, :, 69])
    assert rows.counts.tolist() == [3, 1]
    back = rows.put(np.zeros_like(x), taken)
    assert np.array_equal(np.any(back, axis=(1, 3)), BOTH)
    assert np.array_equal(rows.put(x, taken), x)
    mask = rows.masked(masks.causal()).dense(3, 70)
    assert np.array_equal(mask[0, 0], np.tri(70, dtype=bool)[[0, 1, 65]])
    assert np.array_equal(rows.masked(masks.causal()).compile(3, 70).dense(), mask)


@pytest.mark.parametrize("index", [[0, 66], BOTH], ids=["list", "by item"])
def test_other_array_libraries(index):
    xp = pytest.importorskip("array_api_strict")
    arrays = draw(70)
    options = {"window": 3, "global_index": index, "causal": True, "kv_lengths": [70, 68]}
    want, saved = pyattn.longformer_attention.forward(**arrays, **options)
    out, theirs = pyattn.longformer_attention.forward(
        **{name: xp.asarray(x) for name, x in arrays.items()}, **options)
    close(np.asarray(out), want)
    for got, gradient in zip(theirs.backward(out), saved.backward(want), strict=True):
        close(np.asarray(got), gradient)
    moved = saved.to(xp)
    close(np.asarray(moved.backward(out).q_global), saved.backward(want).q_global)


X = np.ones((2, 2, 6, 4))
GIVEN = {"window": 1, "global_index": [0]}


@pytest.mark.parametrize(("arguments", "options", "error", "says"), [
    ((X, X, X, X), GIVEN, OptionError, "q_global, k_global and v_global must be given together"),
    ((X, X, X, X, X, X[..., :3]), GIVEN, ShapeError, "v_global must have the shape of v"),
    ((X[..., :3, :], X, X), GIVEN, ShapeError, "are the same tokens"),
    ((X, X, X), GIVEN | {"window": -1}, OptionError, "window must be at least 0; got -1"),
    ((X, X, X), GIVEN | {"dilation": 0}, OptionError, "dilation must be at least 1; got 0"),
    ((X, X, X), GIVEN | {"dilation": [1, 2, 3]}, ShapeError, "mask must broadcast"),
    ((X, X, X), GIVEN | {"global_index": [-1]}, OptionError, "at least 0; got"),
    ((X, X, X), GIVEN | {"global_index": [0.5]}, DtypeError, "positions or booleans; got float64"),
    ((X, X, X), GIVEN | {"global_index": np.ones((2, 5), bool)}, ShapeError, "with N = 6"),
    ((X, X, X), GIVEN | {"global_index": np.ones((3, 6), bool)}, ShapeError, "must broadcast"),
    ((X, X, X), GIVEN | {"q_lengths": [3, 4], "kv_lengths": 3}, OptionError, "must agree"),
    ((X, X, X), GIVEN | {"kv_lengths": 7}, ShapeError, "kv_lengths must lie in 0..6|q_lengths"),
    ((X, X, X), GIVEN | {"causal": "left"}, OptionError, "causal must be one of"),
])
def test_errors(arguments, options, error, says):
    with pytest.raises(error, match=says):
        pyattn.longformer_attention(*arguments, **options)
