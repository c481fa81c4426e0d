"""Attention, forward and backward, on every backend, from the one table of cases."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import pickle

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table import BFLOAT16, CASES, EMPTY, SHAPES, Case, Drawn, Shape

import pyattn

BACKENDS = ["cpu", "array_api"]
BY_NAME = {case.name: case for case in CASES}


def run(drawn: Drawn, backend, dlse=True, **extra):
    """Output, lse and gradients of one case on one backend."""
    rng = np.random.default_rng(7)
    with pyattn.use_backend(backend):
        (out, lse), saved = getattr(pyattn, drawn.function).forward(
            **drawn.arrays, **drawn.options, **extra, return_lse=True
        )
        dout = rng.standard_normal(out.shape).astype(out.dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype) if dlse else None
        return out, lse, dout, dlse, saved.backward(dout, dlse)


def forwards(drawn: Drawn, part):
    """Exact and plain outputs (part 0) or log-sum-exps (1) of other draws of the same case."""
    dtype = drawn.arrays["q"].dtype
    for seed in range(1, 9):
        dense = drawn.again(seed).dense
        pair = [oracle.forward(dense, r)[part] for r in (oracle.exact(dtype), oracle.plain(dtype))]
        yield tuple(np.where(np.isfinite(pair[0]), x, 0) for x in pair)


def backwards(drawn: Drawn, name, dout, dlse):
    """Exact and plain gradients of other draws of the same case."""
    for seed in range(1, 9):
        dense = drawn.again(seed).dense
        rng = np.random.default_rng(seed)
        shuffled = (
            rng.permuted(dout.astype("f8"), axis=-2),
            None if dlse is None else rng.permuted(dlse, axis=-1),
        )
        yield tuple(
            sum_to_given(oracle.backward(dense, *shuffled, r)[name], drawn.arrays[name].shape)
            for r in (oracle.exact(dout.dtype), oracle.plain(dout.dtype))
        )


def judge(drawn: Drawn, out, lse, dout, dlse, grads):
    def again(function, *args):
        return functools.partial(function, drawn, *args) if drawn.again else None

    dtype = drawn.arrays["q"].dtype
    exact, plain = oracle.exact(dtype), oracle.plain(dtype)
    dense = drawn.dense
    wanted, rough = oracle.forward(dense, exact), oracle.forward(dense, plain)
    oracle.assert_close(
        out, wanted[0], rough[0], factor=2, name="out", dtype=dtype, again=again(forwards, 0)
    )
    wide = np.float64 if dtype == np.float64 else np.float32
    oracle.assert_close(
        lse, wanted[1], rough[1], factor=2, name="lse", dtype=wide, again=again(forwards, 1)
    )
    wanted = oracle.backward(dense, dout, dlse, exact)
    rough = oracle.backward(dense, dout, dlse, plain)
    assert set(grads._fields) == set(drawn.arrays)
    assert list(grads._fields[:3]) == ["q", "k", "v"]
    for name in grads._fields:
        given_ = drawn.arrays[name]
        want, near = (sum_to_given(x[name], given_.shape) for x in (wanted, rough))
        oracle.assert_close(
            getattr(grads, name),
            want,
            near,
            factor=3,
            name=f"d{name}",
            dtype=given_.dtype,
            again=again(backwards, name, dout, dlse),
        )


def sum_to_given(x, shape):
    return oracle.sum_to(x, (1,) * (x.ndim - len(shape)) + tuple(shape)).reshape(shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(case, shape, backend):
    drawn = case.make(shape, np.float32)
    judge(drawn, *run(drawn, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[7]], ids=str)
@pytest.mark.parametrize(
    "dtype", [np.float64, np.float16, BFLOAT16], ids=["float64", "float16", "bfloat16"]
)
def test_other_dtypes(case, shape, dtype, backend):
    drawn = case.make(shape, dtype)
    judge(drawn, *run(drawn, backend))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize(
    "dtype",
    [np.float32, np.float64, np.float16, BFLOAT16],
    ids=["float32", "float64", "float16", "bfloat16"],
)
@pytest.mark.parametrize(
    "shape",
    [
        Shape((2,), 6, 3, 257, 321, 72, 40),
        Shape((3, 1), 2, 2, 200, 200, 128, 128),
        Shape((1,), 1, 1, 129, 640, 256, 64),
    ],
    ids=str,
)
def test_wide_sweep(case, shape, dtype, backend):
    drawn = case.make(shape, dtype, seed=1)
    judge(drawn, *run(drawn, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_axes(case, shape, backend):
    drawn = case.make(shape, np.float32)
    judge(drawn, *run(drawn, backend))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_one_backends_saved_in_anothers_backward(case):
    shape = SHAPES[5]
    drawn = case.make(shape, np.float32)
    with pyattn.use_backend("array_api"):
        (out, lse), saved = pyattn.attention.forward(
            **drawn.arrays, **drawn.options, return_lse=True
        )
    rng = np.random.default_rng(7)
    dout = rng.standard_normal(out.shape).astype(out.dtype)
    with pyattn.use_backend("cpu"):
        grads = saved.backward(dout)
    judge(drawn, out, lse, dout, None, grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "lead", [((2, 1), (1, 3), (2, 3)), ((3,), (2, 1), ()), ((), (4,), (1,))], ids=str
)
def test_leading_axes_broadcast(lead, backend):
    rng = np.random.default_rng(0)
    batch = np.broadcast_shapes(*lead)
    q, k, v = (
        rng.standard_normal((*b, h, n, 8)).astype("f")
        for b, h, n in zip(lead, (4, 2, 2), (9, 11, 11), strict=True)
    )
    bias = rng.standard_normal((*batch[:1], *(1,) * (len(batch) - 1), 4, 9, 1)).astype("f")
    drawn = Drawn(
        {"q": q, "k": k, "v": v, "bias": bias},
        {},
        oracle.Dense(q, k, v, np.full(4, 8**-0.5), np.ones((9, 11), bool), bias=bias),
    )
    judge(drawn, *run(drawn, backend))


def poisoned(drawn: Drawn):
    """NaN in keys and values that no query sees, and in queries that see no key."""
    arrays = {name: x.copy() for name, x in drawn.arrays.items()}
    heads, groups = arrays["q"].shape[-3], arrays["k"].shape[-3]
    shape = (*arrays["q"].shape[:-2], arrays["q"].shape[-2], arrays["k"].shape[-2])
    allowed = np.broadcast_to(drawn.dense.allowed, shape)
    if drawn.dense.bias is not None:
        allowed = allowed & (np.broadcast_to(drawn.dense.bias, shape) != -np.inf)
    seen = (
        allowed.any(axis=-2).reshape(*shape[:-3], groups, heads // groups, shape[-1]).any(axis=-2)
    )
    arrays["k"][~seen], arrays["v"][~seen] = np.nan, np.inf
    arrays["q"][~allowed.any(axis=-1)] = np.nan
    return dataclasses.replace(drawn, arrays=arrays), ~allowed.any(axis=-1)


MASKED = [
    c
    for c in CASES
    if c.rule
    or {"mask", "kv_lengths", "segments"} & set(c.draw(np.random.default_rng(0), SHAPES[5]))
    or c.name == "bias_masks"
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", MASKED, ids=lambda c: c.name)
@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[6]], ids=str)
def test_what_is_masked_is_never_read(case, shape, backend):
    clean = case.make(shape, np.float32)
    dirty, blind = poisoned(clean)
    _, _, dout, dlse, _ = run(clean, backend)
    with pyattn.use_backend(backend):
        (out2, lse2), saved = pyattn.attention.forward(
            **dirty.arrays, **dirty.options, return_lse=True
        )
        dout2 = dout.copy()
        dout2[blind] = np.nan
        dlse2 = dlse if clean.dense.sinks is not None else np.where(blind, np.nan, dlse).astype("f")
        judge(clean, out2, lse2, dout, dlse, saved.backward(dout2, dlse2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [Shape((1,), 2, 1, 130, 130, 8, 8)], ids=str)
def test_nan_reaches_those_who_see_it_and_no_one_else(shape, backend):
    """Poison in one token of one array; a partial tile must not smear it over its rows."""
    drawn = BY_NAME["causal_window"].make(shape, np.float32)
    for token in (0, 63, 64, 100, 129):
        for name in ("q", "k", "v"):
            for value in (np.nan, np.inf, -np.inf):
                arrays = {key: x.copy() for key, x in drawn.arrays.items()}
                arrays[name][..., token, :] = value
                case = dataclasses.replace(
                    drawn,
                    arrays=arrays,
                    dense=dataclasses.replace(drawn.dense, **{name: arrays[name]}),
                )
                out, *_, grads = run(case, backend)
                want, _ = oracle.forward(case.dense, oracle.exact("f4"))
                np.testing.assert_array_equal(
                    np.isfinite(out), np.isfinite(want), err_msg=f"{name} {value} {token}"
                )
                reach = np.abs(np.arange(130)[:, None] - token) > 3
                for gradient in grads:
                    assert np.isfinite(gradient[..., reach[:, 0], :]).all(), (name, value, token)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, BFLOAT16], ids=lambda d: np.dtype(d).name
)
def test_huge_logits(backend, dtype):
    """Scores of thousands: the maximum is subtracted before anything is exponentiated."""
    shape = Shape((1,), 2, 2, 70, 90, 16, 16)
    drawn = BY_NAME["causal"].make(shape, dtype)
    for name in ("q", "k"):
        drawn.arrays[name] *= np.asarray(30, dtype)
    judge(drawn, *run(drawn, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_read_only_views(backend):
    rng = np.random.default_rng(0)
    base = [rng.standard_normal((2, 70, 4, 48)).astype("f") for _ in range(3)]
    for x in base:
        x.flags.writeable = False
    views = [np.swapaxes(x, 1, 2)[..., ::3] for x in base]
    copies = [np.ascontiguousarray(x) for x in views]
    results = []
    with pyattn.use_backend(backend):
        for q, k, v in (views, copies, [x[..., ::-1, :][..., ::-1, :] for x in copies]):
            out, saved = pyattn.attention.forward(q, k, v, causal=True)
            dout = np.ones_like(out)
            dout.flags.writeable = False
            results.append((out, *saved.backward(dout), *saved.backward(dout)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    first = results[0]
    for a, b in zip(first[1:4], first[4:], strict=True):
        np.testing.assert_array_equal(a, b)


@given(
    batch=st.lists(st.integers(0, 2), max_size=2),
    groups=st.integers(1, 2),
    repeat=st.integers(1, 3),
    n=st.integers(0, 140),
    m=st.integers(0, 140),
    d=st.integers(1, 20),
    e=st.integers(1, 20),
    case=st.sampled_from(CASES),
    backend=st.sampled_from(BACKENDS),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(batch, groups, repeat, n, m, d, e, case, backend):
    shape = Shape(tuple(batch), groups * repeat, groups, n, m, d, e)
    drawn = case.make(shape, np.float32)
    judge(drawn, *run(drawn, backend))


# invariants that need no oracle


def draw(*shape, dtype="f4", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_gives_its_value(backend):
    q, k, v = draw(2, 3, 5, 4), draw(2, 3, 1, 4), draw(2, 3, 1, 6)
    with pyattn.use_backend(backend):
        np.testing.assert_array_equal(pyattn.attention(q, k, v), np.broadcast_to(v, (2, 3, 5, 6)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pooling_by_one_query(backend):
    """A context vector is attention with one query."""
    q, k, v = (
        draw(1, 1, 8, dtype="f8"),
        draw(1, 40, 8, dtype="f8", seed=1),
        draw(1, 40, 8, dtype="f8", seed=2),
    )
    score = np.exp(k[0] @ q[0, 0] * 8**-0.5)
    with pyattn.use_backend(backend):
        np.testing.assert_allclose(
            pyattn.attention(q, k, v)[0, 0], score / score.sum() @ v[0], rtol=1e-13
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_keys_changes_nothing_but_rounding(backend):
    q, k, v = (
        draw(2, 2, 50, 8, dtype="f8"),
        draw(2, 2, 90, 8, dtype="f8", seed=1),
        draw(2, 2, 90, 8, dtype="f8", seed=2),
    )
    order = np.random.default_rng(0).permutation(90)
    mask = np.random.default_rng(1).random((50, 90)) < 0.5
    with pyattn.use_backend(backend):
        a = pyattn.attention(q, k, v, mask=mask)
        b = pyattn.attention(q, k[..., order, :], v[..., order, :], mask=mask[:, order])
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_output_ignores_the_future(backend):
    q, k, v = draw(1, 2, 130, 16), draw(1, 2, 130, 16, seed=1), draw(1, 2, 130, 16, seed=2)
    with pyattn.use_backend(backend):
        before = pyattn.attention(q, k, v, causal=True)
        for t in (1, 64, 100):
            later = [x.copy() for x in (q, k, v)]
            for x in later:
                x[..., t:, :] += 1
            np.testing.assert_array_equal(
                before[..., :t, :], pyattn.attention(*later, causal=True)[..., :t, :]
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_equals_attention_over_the_sliced_keys(backend):
    q, k, v = (draw(1, 2, 200, 8, dtype="f8", seed=s) for s in range(3))
    with pyattn.use_backend(backend):
        out = pyattn.attention(q, k, v, causal=True, window=30)
        for i in (0, 10, 63, 64, 150, 199):
            near = slice(max(i - 30, 0), i + 1)
            alone = pyattn.attention(q[:, :, i : i + 1], k[:, :, near], v[:, :, near])
            np.testing.assert_allclose(out[:, :, i : i + 1], alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_item_alone_equals_the_item_in_its_batch(backend):
    q, k, v = draw(3, 2, 70, 8), draw(3, 2, 80, 8, seed=1), draw(3, 2, 80, 8, seed=2)
    lengths = [80, 33, 64]
    with pyattn.use_backend("cpu"):
        together = pyattn.attention(q, k, v, kv_lengths=lengths)
        for b, length in enumerate(lengths):
            alone = pyattn.attention(
                q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length]
            )
            np.testing.assert_array_equal(together[b : b + 1], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_equal_separate_ones(backend):
    pieces = [5, 0, 70, 1, 40]
    q, k, v = (draw(1, 2, sum(pieces), 8, seed=s) for s in range(3))
    ends = np.cumsum(pieces)
    with pyattn.use_backend(backend):
        for segments in (pieces, np.asarray(pieces), (pieces, pieces), [0, *ends.tolist()]):
            out, saved = pyattn.attention.forward(q, k, v, segments=segments, causal=True)
            grads = saved.backward(out)
            for a, b in zip(ends - pieces, ends, strict=True):
                alone, own = pyattn.attention.forward(
                    q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], causal=True
                )
                np.testing.assert_allclose(out[:, :, a:b], alone, rtol=0, atol=2e-6)
                for got, want in zip(grads, own.backward(alone), strict=True):
                    np.testing.assert_allclose(got[:, :, a:b], want, rtol=0, atol=4e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_merge_of_disjoint_keys_is_the_whole(backend):
    q, k, v = (
        draw(2, 4, 60, 8, dtype="f8"),
        draw(2, 2, 90, 8, dtype="f8", seed=1),
        draw(2, 2, 90, 8, dtype="f8", seed=2),
    )
    mask = np.random.default_rng(0).random((60, 90)) < 0.03
    with pyattn.use_backend(backend):
        (whole, lse), saved = pyattn.attention.forward(q, k, v, mask=mask, return_lse=True)
        parts = [
            pyattn.attention.forward(q, k[:, :, c], v[:, :, c], mask=mask[:, c], return_lse=True)
            for c in (slice(0, 31), slice(31, 90))
        ]
        (out, total), joined = pyattn.merge.forward(*parts[0][0], *parts[1][0])
        np.testing.assert_allclose(out, whole, rtol=0, atol=1e-14)
        np.testing.assert_allclose(total, lse, rtol=1e-14)
        dout = draw(*out.shape, dtype="f8", seed=3)
        dlse = np.where(np.isfinite(lse), draw(*lse.shape, dtype="f8", seed=4), 0)
        d = joined.backward(dout, dlse)
        near, far = parts[0][1].backward(d.out_a, d.lse_a), parts[1][1].backward(d.out_b, d.lse_b)
        want = saved.backward(dout, dlse)
        np.testing.assert_allclose(near.q + far.q, want.q, rtol=0, atol=1e-13)
        for name in ("k", "v"):
            got = np.concatenate([getattr(near, name), getattr(far, name)], axis=-2)
            np.testing.assert_allclose(got, getattr(want, name), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_added_to_a_row_of_scores_changes_nothing(backend):
    q, k, v = (draw(1, 2, 70, 8, dtype="f8", seed=s) for s in range(3))
    row = draw(1, 2, 70, 1, dtype="f8", seed=3)
    with pyattn.use_backend(backend):
        np.testing.assert_allclose(
            pyattn.attention(q, k, v, bias=row), pyattn.attention(q, k, v), rtol=0, atol=1e-14
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_shared_keys_equal_copied_keys(groups, backend):
    """dK of shared keys is the sum of the copies' gradients; only bytes are saved, not pairs."""
    q = draw(2, 6, 70, 8, dtype="f8")
    k, v = draw(2, groups, 70, 8, dtype="f8", seed=1), draw(2, groups, 70, 8, dtype="f8", seed=2)
    copies = [np.repeat(x, 6 // groups, axis=1) for x in (k, v)]
    with pyattn.use_backend(backend):
        out, saved = pyattn.attention.forward(q, k, v, causal=True)
        want, full = pyattn.attention.forward(q, *copies, causal=True)
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-14)
        got, wanted = saved.backward(out), full.backward(want)
    np.testing.assert_allclose(got.q, wanted.q, rtol=0, atol=1e-13)
    for name in "kv":
        summed = getattr(wanted, name).reshape(2, groups, 6 // groups, 70, 8).sum(axis=2)
        np.testing.assert_allclose(getattr(got, name), summed, rtol=0, atol=1e-13)
    assert saved.stats["pairs"] == full.stats["pairs"]
    shared = 2 * (copies[0].nbytes - k.nbytes)
    assert full.stats["bytes"] - saved.stats["bytes"] == shared


def test_merged_shares_add_up_to_one_however_large_they_are():
    out = np.random.default_rng(0).standard_normal((1, 3, 4), np.float32)
    lse = np.full((1, 3), 1e8, np.float32)
    (merged, _), saved = pyattn.merge.forward(out, lse, -out, lse)
    np.testing.assert_allclose(merged, 0, atol=1e-7)
    grads = saved.backward(np.ones_like(out))
    np.testing.assert_array_equal(grads.out_a + grads.out_b, np.ones_like(out))


def test_merge_with_an_empty_part_and_poison():
    out = draw(1, 4, 3)
    nothing = np.full((1, 4), -np.inf, "f")
    merged, lse = pyattn.merge(out, np.zeros((1, 4), "f"), np.full_like(out, np.nan), nothing)
    np.testing.assert_array_equal(merged, out)
    np.testing.assert_array_equal(lse, 0)
    merged, lse = pyattn.merge(out, nothing, out, nothing)
    assert (merged == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name != "everything"][::3], ids=lambda c: c.name
)
def test_weights_are_the_probabilities(case, backend):
    drawn = case.make(SHAPES[5], np.float64)
    with pyattn.use_backend(backend):
        out, weights = pyattn.attention(**drawn.arrays, **drawn.options, return_weights=True)
        v = np.repeat(drawn.arrays["v"], 4, axis=1)
        np.testing.assert_allclose(weights @ v, out, rtol=0, atol=1e-13)
        out, lse, weights = pyattn.attention(
            **drawn.arrays, **drawn.options, return_weights=True, return_lse=True
        )
    if drawn.dense.sinks is None:
        np.testing.assert_allclose(weights.sum(-1), np.isfinite(lse), rtol=1e-13)


# dropout


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_forward_and_backward_with_its_decisions(backend):
    """The factor is read off with one-hot values, then the oracle uses it."""
    shape = Shape((2,), 4, 2, 70, 90, 8, 90)
    drawn = BY_NAME["causal"].make(shape, np.float64)
    arrays = drawn.arrays | {"v": np.broadcast_to(np.eye(90), (2, 2, 90, 90))}
    with pyattn.use_backend(backend):
        (dropped, weights), saved = pyattn.attention.forward(
            **arrays, causal=True, dropout=0.3, rng=5, return_weights=True
        )
        with np.errstate(invalid="ignore"):
            factor = np.nan_to_num(dropped / weights)
        values = np.unique(np.round(factor, 9))
        np.testing.assert_allclose(values, [0, 1 / 0.7], rtol=1e-8)
        seen = np.broadcast_to(drawn.dense.allowed, factor.shape)
        assert abs((factor[seen] > 0).mean() - 0.7) < 0.01
        case = dataclasses.replace(
            drawn,
            dense=dataclasses.replace(drawn.dense, factor=np.where(factor > 0, 1 / 0.7, 0)),
            options={"causal": True, "dropout": 0.3, "decisions": saved.decisions},
        )
        judge(case, *run(case, backend))


def test_backends_draw_the_same_dropout():
    drawn = BY_NAME["lengths_causal"].make(SHAPES[5], np.float64)
    results = [run(drawn, backend, dropout=0.5, rng=3) for backend in BACKENDS]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=0, atol=1e-13)
    for a, b in zip(results[0][4], results[1][4], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_packed_sequences_differs_between_them(backend):
    q = np.zeros((1, 1, 64, 4))
    v = np.eye(64)[None, None]
    with pyattn.use_backend(backend):
        out = pyattn.attention(q, q, v, segments=[32, 32], dropout=0.5, rng=1)[0, 0]
    assert (out[:32, 32:] == 0).all()
    assert ((out[:32, :32] > 0) != (out[32:, 32:] > 0)).any()


def test_seeds_repeat_and_differ():
    x = draw(1, 2, 20, 8)
    a, b, c = (pyattn.attention(x, x, x, dropout=0.5, rng=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


# what is saved


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_saved_is_data(case):
    drawn = case.make(SHAPES[4], np.float32)
    out, saved = pyattn.attention.forward(**drawn.arrays, **drawn.options)
    again = pickle.loads(pickle.dumps(saved))
    for a, b in zip(saved.backward(out), again.backward(out), strict=True):
        np.testing.assert_array_equal(a, b)
    biggest = max([x.size for x in drawn.arrays.values()] + [out.size])
    kept = [getattr(x, "size", 0) for x in vars(saved).values()]
    assert max(kept) <= biggest
    assert saved.nbytes > out.nbytes


def test_stats_count_what_is_executed():
    q = draw(1, 4, 256, 8)
    k = draw(1, 2, 256, 8)
    _, saved = pyattn.attention.forward(q, k, k, causal=True)
    assert saved.stats["tiles"] == 4 * 10
    assert saved.stats["pairs"] == 4 * 256 * 257 // 2
    _, narrow = pyattn.attention.forward(q, k, k, causal=True, window=10)
    assert narrow.stats["tiles"] == 4 * 7
    _, padded = pyattn.attention.forward(q, k, k, kv_lengths=[65])
    assert padded.stats["tiles"] == 4 * 8
    assert padded.stats["pairs"] == 4 * 256 * 65
    assert saved.stats["bytes"] == 4 * (4 * 256 * 8 * 2 + 2 * 2 * 256 * 8 + 4 * 256)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 16}], ids=str)
def test_work_grows_as_the_pattern(options):
    tiles = []
    for n in (1024, 2048, 4096):
        x = draw(1, 1, n, 4)
        tiles.append(pyattn.attention.forward(x, x, x, **options)[1].stats["tiles"])
    growth = [b / a for a, b in itertools.pairwise(tiles)]
    expected = 2 if "window" in options else 4
    assert all(abs(g / expected - 1) < 0.1 for g in growth), tiles


# other array libraries


def test_array_api_strict():
    xp = pytest.importorskip("array_api_strict")
    for case in CASES:
        drawn = case.make(SHAPES[7], np.float64)
        want = run(drawn, "array_api")
        arrays = {name: xp.asarray(x) for name, x in drawn.arrays.items()}
        options = dict(drawn.options)
        (out, lse), saved = pyattn.attention.forward(**arrays, **options, return_lse=True)
        grads = saved.backward(xp.asarray(want[2]), xp.asarray(want[3]))
        assert type(out) is type(arrays["q"])
        for got, expected in zip((out, lse, *grads), (*want[:2], *want[4]), strict=True):
            np.testing.assert_allclose(
                np.asarray(got), expected, rtol=0, atol=1e-11, err_msg=case.name
            )


def torch_arrays(drawn):
    torch = pytest.importorskip("torch")
    return torch.asarray, {name: torch.asarray(x) for name, x in drawn.arrays.items()}


def jax_arrays(drawn):
    jax = pytest.importorskip("jax")
    return jax.numpy.asarray, {name: jax.numpy.asarray(x) for name, x in drawn.arrays.items()}


@pytest.mark.peers
@pytest.mark.parametrize("convert", [torch_arrays, jax_arrays])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_framework_arrays(case, convert):
    drawn = case.make(SHAPES[7], np.float32)
    if case.name == "bias_pairs_float64" and convert is jax_arrays:
        drawn.arrays["bias"] = drawn.arrays["bias"].astype("f")
        drawn = dataclasses.replace(
            drawn, dense=dataclasses.replace(drawn.dense, bias=drawn.arrays["bias"])
        )
    asarray, arrays = convert(drawn)
    (out, lse), saved = pyattn.attention.forward(**arrays, **drawn.options, return_lse=True)
    dout = draw(*out.shape, seed=9)
    grads = saved.backward(asarray(dout))
    assert type(out) is type(arrays["q"])
    grads = type(grads)(*(np.asarray(x) for x in grads))
    judge(drawn, np.asarray(out), np.asarray(lse), dout, None, grads)


def test_saved_moves_to_another_library():
    torch = pytest.importorskip("torch")
    q = draw(1, 2, 20, 8).astype(ml_dtypes.bfloat16)
    out, saved = pyattn.attention.forward(q, q, q, causal=True)
    want = saved.backward(out)
    moved = saved.to(torch)
    assert moved.q.dtype == torch.bfloat16
    got = moved.backward(moved.out)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.to(torch.float32).numpy(), b.astype("f"), rtol=0.02, atol=0.02)


# bad input

X = draw(2, 4, 6, 8)
BAD = [
    (dict(k=draw(2, 4, 6, 7)), pyattn.ShapeError, "k has width 7 but q has width 8"),
    (dict(v=draw(2, 4, 5, 8)), pyattn.ShapeError, "v has 5 tokens but k has 6"),
    (
        dict(k=draw(2, 3, 6, 8), v=draw(2, 3, 6, 8)),
        pyattn.ShapeError,
        "q has 4 heads, which must be a multiple of the 3",
    ),
    (dict(v=draw(2, 2, 6, 8)), pyattn.ShapeError, "v has 2 heads but k has 4"),
    (
        dict(k=draw(3, 4, 6, 8), v=draw(3, 4, 6, 8)),
        pyattn.ShapeError,
        "leading axes of q, k and v must broadcast",
    ),
    (dict(q=draw(6, 8)), pyattn.ShapeError, "q must have at least 3 axes"),
    (
        dict(q=draw(2, 4, 6, 0), k=draw(2, 4, 6, 0)),
        pyattn.ShapeError,
        "q must have a width of at least 1",
    ),
    (
        dict(q=X.astype(int)),
        pyattn.DtypeError,
        "q must be one of float16, bfloat16, float32, float64; got int64",
    ),
    (
        dict(q=X.astype("f8")),
        pyattn.DtypeError,
        "q, k and v must share one dtype; got q float64, k float32",
    ),
    (dict(q=X.tolist()), pyattn.DtypeError, "an array is needed; got builtins.list"),
    (dict(q=np.ma.masked_array(X)), pyattn.DtypeError, "arrays must be plain"),
    (dict(mask=np.ones((6, 5), bool)), pyattn.ShapeError, "mask"),
    (dict(mask=np.ones((3, 4, 6, 6), bool)), pyattn.ShapeError, "mask"),
    (dict(mask=np.ones((6, 6))), pyattn.DtypeError, "bool"),
    (
        dict(bias=draw(3, 6, 6)),
        pyattn.ShapeError,
        r"bias must broadcast to \(..., H, N, M\) = \(2, 4, 6, 6\); got \(3, 6, 6\)",
    ),
    (dict(bias=np.ones((6, 6), int)), pyattn.DtypeError, "bias must be one of"),
    (dict(gate=draw(2, 1, 1, 1, 6, 6)), pyattn.ShapeError, "gate must broadcast"),
    (
        dict(sinks=draw(3)),
        pyattn.ShapeError,
        r"sinks must broadcast to \(H,\) = \(4,\); got \(3,\)",
    ),
    (dict(alibi_slopes=draw(5)), pyattn.ShapeError, "alibi_slopes must broadcast"),
    (dict(scale=draw(2)), pyattn.ShapeError, "scale must broadcast"),
    (dict(scale="big"), pyattn.OptionError, "scale must be a real number; got 'big'"),
    (dict(scale=float("nan")), pyattn.OptionError, "scale must be finite"),
    (dict(softcap=0.0), pyattn.OptionError, "softcap must be positive; got 0.0"),
    (dict(dropout=1.0), pyattn.OptionError, "dropout must be at least 0 and below 1; got 1.0"),
    (
        dict(causal="bottom"),
        pyattn.OptionError,
        "causal must be one of False, True, 'top_left'; got 'bottom'",
    ),
    (dict(causal=1), pyattn.OptionError, "causal must be one of"),
    (dict(window=-1), pyattn.OptionError, "window must be at least 0; got -1"),
    (dict(window=1.5), pyattn.OptionError, "window must be an integer; got 1.5"),
    (dict(window=(1, 2, 3)), pyattn.OptionError, "window"),
    (
        dict(causal=True, window=(1, 2)),
        pyattn.OptionError,
        "a causal window reaches to the left only",
    ),
    (dict(kv_lengths=[7, 2]), pyattn.ShapeError, r"kv_lengths must lie in 0..6; got 2..7"),
    (dict(kv_lengths=[1, 2, 3]), pyattn.ShapeError, "kv_lengths must broadcast"),
    (dict(kv_lengths=[1.5, 2]), pyattn.OptionError, "kv_lengths must be integers"),
    (
        dict(segments=[3, 4]),
        pyattn.ShapeError,
        "segments must be lengths that sum to the 6 queries",
    ),
    (dict(segments=[3, 3], kv_lengths=[2, 2]), pyattn.OptionError, "segments cannot be combined"),
    (dict(segments=([3, 3], [6])), pyattn.ShapeError, "segments must pair"),
    (dict(decisions={"seed": 1}), pyattn.OptionError, "decisions may hold dropout_seed; got seed"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD, ids=lambda x: str(x)[:40] if isinstance(x, str) else None
)
def test_bad_input_is_named(change, error, message):
    arrays = {name: X.copy() for name in "qkv"} | change
    before = {name: x.copy() for name, x in arrays.items() if isinstance(x, np.ndarray)}
    with pytest.raises(error, match=message):
        pyattn.attention(**arrays)
    for name, x in before.items():
        np.testing.assert_array_equal(arrays[name], x)


def test_numpy_scalars_and_lists_are_options_too():
    for causal in (np.True_, np.False_):
        want = pyattn.attention(X, X, X, causal=bool(causal), window=(1, None))
        got = pyattn.attention(X, X, X, causal=causal, window=[np.int64(1), None])
        np.testing.assert_array_equal(got, want)


def test_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="is_causal"):
        pyattn.attention(X, X, X, is_causal=True)


def test_mixed_libraries_and_devices():
    xp = pytest.importorskip("array_api_strict")
    with pytest.raises(pyattn.BackendError, match="one library; got array_api_strict, numpy"):
        pyattn.attention(X, xp.asarray(X), X)
    elsewhere = xp.asarray(X, device=xp.Device("device1"))
    with pytest.raises(pyattn.BackendError, match="one device"):
        pyattn.attention(xp.asarray(X), elsewhere, elsewhere)


def test_bad_gradients_are_named():
    out, saved = pyattn.attention.forward(X, X, X)
    with pytest.raises(pyattn.ShapeError, match="dout must have the shape of the output"):
        saved.backward(out[..., :3])
    with pytest.raises(
        pyattn.DtypeError, match="dout must have the dtype of the output, float32; got float64"
    ):
        saved.backward(out.astype("f8"))
    with pytest.raises(pyattn.ShapeError, match="dlse must have the shape of lse"):
        saved.backward(out, out)


# what calls share


def test_a_refusal_is_not_forgotten():
    """Checks that were passed, or failed, once are made again for what looks alike."""
    for _ in range(2):
        with pytest.raises(pyattn.ShapeError, match="k has width 7"):
            pyattn.attention(X, X[..., :7], X)
    pyattn.attention(X, X, X, window=1, softcap=1, scale=1)
    with pytest.raises(pyattn.OptionError, match=r"window must be an integer; got 1\.0"):
        pyattn.attention(X, X, X, window=1.0)
    with pytest.raises(pyattn.OptionError, match="causal must be one of"):
        pyattn.attention(X, X, X, causal=0)
    with pytest.raises(pyattn.DtypeError, match=r"q must be one of .* got >f4"):
        pyattn.attention(X.astype(">f4"), X, X)


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_of_one_shape_do_not_mix_up_their_options(backend):
    k = draw(2, 4, 9, 8)
    options = [
        {},
        {"causal": True},
        {"causal": "top_left"},
        {"causal": True, "window": 2},
        {"window": 2},
        {"scale": 0.5},
        {"kv_lengths": 7},
        {"kv_lengths": [5, 9]},
        {"kv_lengths": [5, 9], "causal": True},
        {"segments": ([2, 4], [3, 6])},
    ]
    alone = []
    with pyattn.use_backend(backend):
        for option in options:
            pyattn.engines.placement._unpadded.cache_clear()
            pyattn.engines.softmax._filled.cache_clear()
            alone.append(pyattn.attention(X, k, k, **option))
        together = [pyattn.attention(X, k, k, **option) for option in options]
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({x.tobytes() for x in alone}) == len(options)


def test_what_calls_share_is_read_only():
    problems = []
    for x in (X, X[0], np.broadcast_to(X, (3, *X.shape))):
        _, saved = pyattn.attention.forward(x, x, x)
        problems.append(pyattn.engines.softmax._problem(saved))
        again = pyattn.engines.softmax._problem(saved)
        assert again.scale is problems[-1].scale
        assert again.q_lengths is problems[-1].q_lengths
    for problem in problems:
        for shared in (problem.scale, problem.q_lengths, problem.kv_lengths):
            assert not shared.flags.writeable
        with pytest.raises(dataclasses.FrozenInstanceError):
            problem.softcap = 1.0


def test_saved_holds_no_compiled_mask():
    out, saved = pyattn.attention.forward(X, X, X, causal=True)
    saved.backward(out)
    text = pickle.dumps(saved)
    assert b"BlockMask" not in text
    assert b"Problem" not in text
    names = {field.name for field in dataclasses.fields(saved)}
    assert set(vars(saved)) == names
    again = dataclasses.replace(saved, softcap=1.0)
    assert again.softcap == 1.0
    assert again.q is saved.q


# what an engine asks of a kernel module


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, BFLOAT16], ids=lambda d: np.dtype(d).name
)
def test_delta(backend, dtype):
    delta = importlib.import_module(f"pyattn.kernels.{backend}.softmax").delta
    acc = np.float64 if dtype == np.float64 else np.float32
    for n, width in ((1, 1), (16, 64), (70, 33)):
        dout, out = (draw(2, 3, n, 2 * width, seed=seed).astype(dtype) for seed in (1, 2))
        lse, dlse = (draw(2, 3, n, seed=seed).astype(acc) for seed in (3, 4))
        dout = dout[..., ::2]
        out = np.swapaxes(np.swapaxes(out, 1, 2).copy(), 1, 2)[..., 1::2]
        blind = draw(2, 3, n, seed=5) > 0.5
        dout[blind], dlse[blind], lse[blind] = np.nan, np.nan, -np.inf
        exact = (dout.astype("f8") * out.astype("f8")).sum(-1)
        for given_, want in ((None, exact), (dlse, exact - dlse)):
            got = delta(dout, out, lse, given_)
            assert got.dtype == acc
            assert got.shape == lse.shape
            np.testing.assert_array_equal(got[blind], 0)
            np.testing.assert_allclose(
                got, np.where(blind, 0, want), rtol=0, atol=64 * width * np.finfo(acc).eps
            )


def test_results_in_the_dtype_of_the_argument_are_passed_on(monkeypatch):
    """A kernel may round by itself; then nothing is copied. Gradients to be summed are not."""
    from pyattn.kernels.array_api import softmax

    made, sums = {}, []
    forward, backward = softmax.forward, softmax.backward

    def rounded_forward(problem):
        out, lse = forward(problem)
        made["out"] = out.astype(problem.q.dtype)
        return made["out"], lse

    def rounded_backward(problem, *args):
        sums.append(problem.summed)
        grads = backward(problem, *args)
        for name in {"q", "k", "v"} - set(problem.summed):
            grads[name] = made[name] = grads[name].astype(problem.q.dtype)
        return grads

    q, k, v = (draw(2, 3, 5, 8, seed=seed).astype(BFLOAT16) for seed in range(3))
    results = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(softmax, "forward", rounded_forward)
            monkeypatch.setattr(softmax, "backward", rounded_backward)
        with pyattn.use_backend("array_api"):
            for keys in (k, k[0], k[:1]):
                out, saved = pyattn.attention.forward(q, keys, v)
                grads = saved.backward(v)
                results.append((out, *grads))
                if patched:
                    assert np.shares_memory(out, made["out"])
                    assert np.shares_memory(grads.q, made["q"])
                    assert np.shares_memory(grads.v, made["v"])
    assert sums == [(), ("k",), ("k",)]
    for plain, rounded in zip(results[:3], results[3:], strict=True):
        for a, b in zip(plain, rounded, strict=True):
            assert a.dtype == b.dtype == BFLOAT16
            np.testing.assert_array_equal(a, b)


# which backend


def test_explain_and_use_backend():
    assert str(pyattn.explain(pyattn.attention, X, X, X)) == "softmax on numpy arrays: cpu"
    with pyattn.use_backend("array_api"):
        assert "not cpu: array_api is forced" in str(pyattn.explain(pyattn.attention, X, X, X))
    with pytest.raises(pyattn.OptionError, match="backend must be one of"):
        with pyattn.use_backend("gpu"):
            pass
    xp = pytest.importorskip("array_api_strict")
    x = xp.asarray(X)
    with (
        pyattn.use_backend("cpu"),
        pytest.raises(pyattn.BackendError, match="backend cpu does not take array_api_strict"),
    ):
        pyattn.attention(x, x, x)


def test_case_names_are_unique():
    assert len(BY_NAME) == len(CASES)
    assert isinstance(CASES[0], Case)
