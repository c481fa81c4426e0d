"""LSH attention against loops over tokens: by the paper, and strictly causal."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import pyattn
from pyattn.features.hashing import lsh_hash
from pyattn.testing import gradcheck


def times_met(buckets, length, *, bucket_length, causal=False, reference=False, across=True,
              deduplicate=False):
    """How often each token (row) meets each other over the rounds (rounds, N), and itself alone."""
    _rounds, n = buckets.shape
    met = np.zeros((n, n), int)
    orders = [sorted(range(length), key=lambda t: (turn[t], t)) for turn in buckets]
    for turn, order in enumerate(orders):
        if causal and not reference:
            for i in order:
                members = [t for t in range(i + 1) if buckets[turn, t] == buckets[turn, i]]
                met[i, members[-bucket_length:]] += 1
            continue
        chunks = [order[at:at + bucket_length] for at in range(0, length, bucket_length)]
        before = [t for t in orders[turn - 1]]
        for number, chunk in enumerate(chunks):
            seen = [(t, turn) for t in chunk]
            if number > 0:
                seen += [(t, turn) for t in chunks[number - 1]]
            elif reference:
                last = before[(length - 1) // bucket_length * bucket_length:]
                seen += [(t, (turn - 1) % len(orders)) for t in last]
            elif len(chunks) > 2:
                seen += [(t, turn) for t in chunks[-1]]
            elif len(chunks) == 2:
                seen += [(t, turn) for t in chunks[1]]
            for i, (j, where) in itertools.product(chunk, seen):
                alike = where == turn and buckets[turn, i] == buckets[turn, j]
                met[i, j] += across or alike
    np.fill_diagonal(met, 0)
    if causal:
        met *= np.tri(n, k=-1, dtype=int)
    if deduplicate:
        met = np.minimum(met, 1)
    for i in range(length):
        met[i, i] = met[i].sum() == 0
    return met


def dense(qk, v, met, scale=1.0):
    """Output, and the gradients as a function of the output's, in float64."""
    length = np.linalg.norm(qk, axis=-1, keepdims=True)
    k = qk / length
    with np.errstate(divide="ignore"):
        scores = scale * qk @ np.swapaxes(k, -1, -2) + np.log(met)
    top = scores.max(-1, keepdims=True, initial=-1e300)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    p = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
    out = p @ v

    def backward(dout):
        dp = dout @ np.swapaxes(v, -1, -2)
        ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))
        dk = np.swapaxes(ds, -1, -2) @ qk
        dqk = ds @ k + (dk - k * (k * dk).sum(-1, keepdims=True)) / length
        return dqk, np.swapaxes(p, -1, -2) @ dout

    return out, backward


def draw(shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


OPTIONS = [
    {},
    {"causal": True},
    {"attend_across_buckets": False},
    {"deduplicate": True},
    {"causal": True, "deduplicate": True},
    {"reference": True},
    {"reference": True, "causal": True},
    {"reference": True, "deduplicate": True},
    {"reference": True, "attend_across_buckets": False},
    {"reference": True, "attend_across_buckets": False, "num_rounds": 1},
    {"scale": 0.25},
]


@pytest.mark.parametrize("backend", ["cpu", "array_api"])
@pytest.mark.parametrize(("n", "bucket_length"), [
    (1, 4), (7, 2), (40, 8), (150, 64), (150, 16), (16, 9)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_backward(options, n, bucket_length, backend):
    rng = np.random.default_rng(n)
    lengths = np.array([n, rng.integers(0, n + 1)])
    qk, v, dout = draw((2, 3, n, 6)), draw((2, 3, n, 5), 1), draw((2, 3, n, 5), 2)
    options = {"num_rounds": 3, **options}
    buckets = rng.integers(0, max(1, n // bucket_length) + 1, (2, 3, options["num_rounds"], n))
    with pyattn.use_backend(backend):
        out, saved = pyattn.lsh_attention.forward(
            qk, v, bucket_length=bucket_length, kv_lengths=lengths, decisions={"buckets": buckets},
            **options)
        found = saved.backward(dout)
    names = {"attend_across_buckets": "across"}
    rules = {names.get(name, name): x for name, x in options.items()
             if name not in ("scale", "num_rounds")}
    for b, h in np.ndindex(2, 3):
        met = times_met(buckets[b, h], lengths[b], bucket_length=bucket_length, **rules)
        want, backward = dense(qk[b, h], v[b, h], met, options.get("scale", 1.0))
        np.testing.assert_allclose(out[b, h], want, atol=1e-12)
        for got, exact in zip(found, backward(dout[b, h]), strict=True):
            np.testing.assert_allclose(got[b, h], exact, atol=1e-11)
    assert saved.stats["pairs"] == sum(
        times_met(buckets[b, h], lengths[b], bucket_length=bucket_length, **rules).sum()
        for b, h in np.ndindex(2, 3))


@pytest.mark.parametrize("options", [{"causal": True}, {}, {"reference": True}], ids=str)
def test_finite_differences(options):
    qk, v = draw((1, 2, 13, 5)), draw((1, 2, 13, 4), 1)
    _, saved = pyattn.lsh_attention.forward(qk, v, num_rounds=2, bucket_length=4, rng=0, **options)
    gradcheck(pyattn.lsh_attention, qk, v, num_rounds=2, bucket_length=4,
              decisions=saved.decisions, **options)


def test_one_chunk_is_dense_attention_but_for_the_token_itself():
    qk, v = draw((2, 10, 8)), draw((2, 10, 8), 1)
    for options in ({}, {"reference": True}):
        out = pyattn.lsh_attention(qk, v, num_rounds=2, bucket_length=10, rng=0, **options)
        k = qk / np.linalg.norm(qk, axis=-1, keepdims=True)
        want = pyattn.attention(qk, k, v, scale=1.0, mask=~np.eye(10, dtype=bool))
        np.testing.assert_allclose(out, want, atol=1e-12)


def test_equal_rounds_are_one():
    qk, v = draw((2, 50, 8)), draw((2, 50, 8), 1)
    buckets = np.random.default_rng(0).integers(0, 6, (2, 1, 50))
    once = pyattn.lsh_attention(qk, v, num_rounds=1, bucket_length=8, causal=True,
                                decisions={"buckets": buckets})
    thrice, lse = pyattn.lsh_attention(qk, v, num_rounds=3, bucket_length=8, causal=True,
                                       return_lse=True,
                                       decisions={"buckets": np.repeat(buckets, 3, axis=1)})
    np.testing.assert_allclose(once, thrice, atol=1e-12)
    assert lse.shape == (2, 50)


@pytest.mark.parametrize("backend", ["cpu", "array_api"])
@pytest.mark.parametrize("size", [1.0, 1e8, 1e25])
def test_rounds_add_up_to_one_however_large_scores_are(size, backend):
    rng = np.random.default_rng(0)
    qk, v = (rng.standard_normal((1, 2, 70, 8)).astype(np.float32) for _ in range(2))
    qk *= np.float32(size)
    found = []
    for rounds in (1, 3):
        buckets = np.zeros((1, 2, rounds, 70), int)
        with pyattn.use_backend(backend):
            found.append(pyattn.lsh_attention(qk, v, num_rounds=rounds, bucket_length=70,
                                              decisions={"buckets": buckets}))
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reference", [False, True])
def test_only_the_original_hears_of_later_tokens(reference):
    qk, v = draw((1, 96, 8)), draw((1, 96, 8), 1)
    options = {"causal": True, "num_rounds": 2, "bucket_length": 8, "reference": reference}
    before = pyattn.lsh_attention(qk, v, rng=0, **options)
    np.testing.assert_allclose(before[0, 0], v[0, 0], atol=1e-12)
    leaks = []
    for t in (20, 50, 90):
        other = qk.copy()
        other[0, t] = draw(8, t)
        after = pyattn.lsh_attention(other, v, rng=0, **options)
        leaks.append(not np.array_equal(before[0, :t], after[0, :t]))
    assert any(leaks) == reference


def test_what_points_alike_falls_into_one_bucket():
    """The chance that two tokens do rises with their cosine."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 400, 16))
    chances = []
    for angle in (0.1, 0.5, 1.0, 1.6):
        other = rng.standard_normal(x.shape)
        other -= x * (x * other).sum(-1, keepdims=True) / (x * x).sum(-1, keepdims=True)
        other *= np.linalg.norm(x, axis=-1, keepdims=True) / np.linalg.norm(other, axis=-1,
                                                                            keepdims=True)
        y = np.cos(angle) * x + np.sin(angle) * other
        first, second = (lsh_hash(z, num_buckets=8, num_rounds=16, rng=1) for z in (x, y))
        chances.append((first == second).mean())
    assert chances == sorted(chances, reverse=True)
    assert chances[0] > 0.8
    assert chances[-1] < 0.25


def test_hashing_by_the_definition():
    x = draw((2, 3, 20, 6))
    rotations = draw((3, 6, 4, 5), 1)
    found = lsh_hash(x, num_buckets=(4, 6), num_rounds=4, rotations=rotations)
    assert found.shape == (2, 3, 4, 20)
    assert found.dtype == np.int32
    for b, h, turn, t in np.ndindex(found.shape):
        rotated = x[b, h, t] @ rotations[h, :, turn]
        first = np.argmax(np.concatenate([rotated[:2], -rotated[:2]]))
        second = np.argmax(np.concatenate([rotated[2:], -rotated[2:]]))
        assert found[b, h, turn, t] == first + 4 * second


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_is_too_odd(causal):
    for shape, reference in itertools.product(((0, 2, 5, 4), (1, 2, 0, 4), (2, 1, 1, 4)),
                                              (False, True)):
        x = np.ones(shape)
        out, saved = pyattn.lsh_attention.forward(x, x, causal=causal, reference=reference,
                                                  bucket_length=10**12, rng=0)
        assert saved.backward(out).qk.shape == shape
    same = np.ones((1, 200, 4), np.float32)         # all in one bucket
    out, saved = pyattn.lsh_attention.forward(same, same, causal=causal, rng=0, bucket_length=16)
    np.testing.assert_allclose(out, 1, rtol=1e-6)
    x = draw((1, 100, 4))
    spoiled = x.copy()
    spoiled[:, 60:] = np.nan
    options = {"causal": causal, "kv_lengths": 60, "bucket_length": 8, "num_buckets": 8, "rng": 0}
    first = None
    for y in (x, spoiled):
        out, saved = pyattn.lsh_attention.forward(y, y, **options)
        results = out, *saved.backward(np.ones_like(out))
        assert all(np.isfinite(part).all() and not part[:, 60:].any() for part in results)
        first = first or results
    for one, other in zip(first, results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_dropout_draws_by_the_seed():
    qk, v = draw((2, 64, 8)), draw((2, 64, 8), 1)
    options = {"num_rounds": 2, "bucket_length": 16, "dropout": 0.5}
    out, saved = pyattn.lsh_attention.forward(qk, v, rng=3, **options)
    again = pyattn.lsh_attention(qk, v, decisions=saved.decisions, **options)
    np.testing.assert_array_equal(out, again)
    assert not np.allclose(out[0], pyattn.lsh_attention(qk, v, rng=4, **options)[0])
    gradcheck(pyattn.lsh_attention, qk[:, :20], v[:, :20], num_rounds=1, bucket_length=8,
              dropout=0.3, decisions={"buckets": np.zeros((2, 1, 20), int), "dropout_seed": 5})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_other_dtypes(dtype):
    import ml_dtypes  # noqa: F401

    qk, v = draw((2, 200, 16)), draw((2, 200, 16), 1)
    buckets = lsh_hash(qk, num_buckets=8, num_rounds=2, rng=0)
    options = {"num_rounds": 2, "bucket_length": 32, "decisions": {"buckets": buckets}}
    want = pyattn.lsh_attention(qk, v, **options)
    narrow = [x.astype(dtype) for x in (qk, v)]
    out, saved = pyattn.lsh_attention.forward(*narrow, **options)
    grads = saved.backward(out)
    assert out.dtype == dtype
    assert grads.qk.dtype == dtype
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}[dtype]
    np.testing.assert_allclose(out.astype(np.float64), want, atol=tolerance)


def test_pairs_grow_with_the_length():
    for n in (1024, 2048, 4096):
        x = draw((1, n, 16), dtype=np.float32)
        _, saved = pyattn.lsh_attention.forward(x, x, causal=True, num_rounds=2, rng=0)
        stats = saved.stats
        assert n < stats["pairs"] <= 2 * n * 64
        assert stats["tiles"] <= 2 * 2 * n // 64


@pytest.mark.parametrize(("options", "error", "says"), [
    ({"bucket_length": 0}, pyattn.OptionError, "bucket_length"),
    ({"num_rounds": 0}, pyattn.OptionError, "num_rounds"),
    ({"num_buckets": 3}, pyattn.OptionError, "num_buckets must be even"),
    ({"causal": "top_left"}, pyattn.OptionError, "causal"),
    ({"decisions": {"buckets": np.zeros((1, 1, 4), int)}}, pyattn.ShapeError, "buckets"),
    ({"num_rounds": 1, "decisions": {"buckets": np.full((1, 1, 8), -1)}}, pyattn.OptionError,
     "must lie in 0"),
    ({"num_rounds": 1, "decisions": {"buckets": np.full((1, 1, 8), 2**31)}}, pyattn.OptionError,
     "must lie in 0"),
    ({"num_rounds": 1, "decisions": {"buckets": np.zeros((1, 1, 8))}}, pyattn.DtypeError,
     "integers"),
    ({"reference": "yes"}, pyattn.OptionError, "reference"),
    ({"deduplicate": "yes"}, pyattn.OptionError, "deduplicate"),
    ({"attend_across_buckets": "no"}, pyattn.OptionError, "attend_across_buckets"),
    ({"kv_lengths": 9}, pyattn.ShapeError, "kv_lengths"),
    ({"decisions": {"clusters": 1}}, pyattn.OptionError, "decisions"),
], ids=str)
def test_errors(options, error, says):
    x = np.ones((1, 8, 4))
    with pytest.raises(error, match=says):
        pyattn.lsh_attention(x, x, **options)


def test_operands_must_agree():
    x = np.ones((1, 8, 4))
    for qk, v, error, says in (
            (x, x[:, :7], pyattn.ShapeError, "v must be"),
            (x[..., :0], x, pyattn.ShapeError, "qk must be"),
            (x, x[..., :0], pyattn.ShapeError, "v must be"),
            (x.astype(int), x, pyattn.DtypeError, "qk must be one of"),
            (x, x.astype("f"), pyattn.DtypeError, "qk and v must share"),
            (x.tolist(), x, pyattn.DtypeError, "an array is needed")):
        with pytest.raises(error, match=says):
            pyattn.lsh_attention(qk, v)


@pytest.mark.parametrize("library", ["torch", "array_api_strict"])
def test_other_libraries(library):
    xp = pytest.importorskip(library)
    qk, v = draw((2, 2, 50, 8)), draw((2, 2, 50, 8), 1)
    options = {"num_rounds": 2, "bucket_length": 8, "num_buckets": (2, 4), "causal": True}
    want, kept = pyattn.lsh_attention.forward(qk, v, rng=0, **options)
    out, saved = pyattn.lsh_attention.forward(xp.asarray(qk), xp.asarray(v), rng=0, **options)
    np.testing.assert_allclose(np.asarray(out), want, atol=1e-12)
    np.testing.assert_array_equal(saved.decisions["buckets"], kept.decisions["buckets"])
    moved = kept.to(xp)
    assert type(moved.decisions["buckets"]) is np.ndarray
    for own, other, exact in zip(saved.backward(out), moved.backward(out), kept.backward(want),
                                 strict=True):
        np.testing.assert_allclose(np.asarray(own), exact, atol=1e-12)
        np.testing.assert_allclose(np.asarray(other), exact, atol=1e-12)
