"""SparseBERT's mask by distance against the same spelled out pair by pair."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from table import Shape, positions

import pyattn
from pyattn import arrays
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.features import sparsebert_loss, sparsebert_mask
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
SHAPES = [Shape((2,), 4, 2, 67, 67, 16, 16), Shape((2,), 2, 1, 70, 133, 5, 7),
          Shape((1,), 2, 2, 133, 70, 8, 8), Shape((), 2, 1, 1, 1, 4, 4)]
NOISY = {"temperature": 0.8}


def operands(s, dtype):
    rng = np.random.default_rng([s.n, s.m])
    return tuple(rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e)))


def drawn(s, dtype=np.float64, *, extra=3, alike=False):
    rng = np.random.default_rng(9)
    shape = (1 if alike else s.heads, max(s.n, s.m) + extra)
    return rng.standard_normal((*shape, 2)).astype(dtype), rng.logistic(size=shape)


def judge(s, dtype, backend, *, hard, additive=False, alike=False, allowed=True, **options):
    qkv = operands(s, dtype)
    alpha, noise = drawn(s, np.float64 if dtype == np.float64 else np.float32, alike=alike)
    with pyattn.use_backend(backend):
        (out, lse), saved = pyattn.sparsebert_attention.forward(
            *qkv, alpha, hard=hard, additive=additive, decisions={"noise": noise},
            return_lse=True, **NOISY, **options)
        rng = np.random.default_rng(1)
        dout = rng.standard_normal(out.shape).astype(dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        grads = saved.backward(dout, dlse)
    wide = alpha.astype(np.float64)
    soft = 1 / (1 + np.exp(-(wide[..., 1] - wide[..., 0] + noise) / 0.8))
    gates = (soft > 0.5).astype(float) if hard else soft
    i, j, inside = positions(s, "top_left" if options.get("causal") == "top_left" else
                             "bottom_right", options.get("q_lengths"), options.get("kv_lengths"))
    seen = inside & allowed & ((j <= i) if options.get("causal") else True)
    seen = seen & (i != j) if options.get("drop_diagonal") else seen
    full = (*s.batch, s.heads, s.n, s.m)
    distance = np.broadcast_to(abs(i - j), full)
    head = np.broadcast_to(np.arange(s.heads)[:, None, None] % alpha.shape[0], full)
    dense = gates[head, distance]
    term = {"bias": 1e4 * (dense - 1)} if additive else {"gate": dense}
    problem = oracle.Dense(*qkv, np.full(s.heads, s.d ** -0.5), seen,
                           softcap=options.get("softcap"), **term)
    found = []
    for r in (oracle.exact(dtype), oracle.plain(dtype)):
        want = oracle.backward(problem, dout, dlse, r)
        dgate = 1e4 * want.pop("bias") if additive else want.pop("gate")
        dgates = np.zeros(gates.shape, dgate.dtype)
        np.add.at(dgates, (head, distance), dgate)
        dsoft = dgates * soft * (1 - soft) / 0.8
        want["alpha"] = np.stack([-dsoft, dsoft], -1)
        found.append({"out": oracle.forward(problem, r)[0], "lse": oracle.forward(problem, r)[1],
                      **want})
    exact, rough = found
    for name, x in {"out": out, "lse": lse, **grads._asdict()}.items():
        if dtype == np.float64:
            wanted = exact[name].astype(dtype)
            finite = wanted[np.isfinite(wanted)]
            np.testing.assert_allclose(x, wanted, rtol=1e-11, err_msg=name,
                                       atol=1e-11 * max(1, abs(finite).max(initial=0)))
        else:
            oracle.assert_close(x, exact[name], rough[name], factor=2 if name in "out lse" else 3,
                                name=name)
    return saved


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_rule(shape, additive, hard, backend):
    judge(shape, np.float64, backend, hard=hard, additive=additive)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_mask_for_all_heads(backend):
    judge(SHAPES[0], np.float64, backend, hard=True, alike=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16],
                         ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dtypes(backend, dtype):
    judge(SHAPES[0], dtype, backend, hard=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_causal_lengths_masks_and_the_diagonal(causal, backend):
    s = SHAPES[1]
    lengths = {"q_lengths": np.array([70, 40]), "kv_lengths": np.array([133, 103])}
    mask = np.random.default_rng(0).random((s.n, s.m)) < 0.8
    judge(s, np.float64, backend, hard=True, causal=causal, mask=mask, allowed=mask, softcap=2.0,
          drop_diagonal=True, **lengths)


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_differences(backend):
    s = Shape((2,), 2, 1, 9, 11, 4, 3)
    with pyattn.use_backend(backend):
        gradcheck(pyattn.sparsebert_attention, *operands(s, np.float64), drawn(s)[0], hard=False,
                  rng=0, causal=True, return_lse=True)


def test_finite_differences_of_the_additive_form():
    s = Shape((2,), 2, 1, 9, 9, 4, 3)
    # near 1 the gates differ by little of 1e4
    alpha = drawn(s)[0] * 0.1 + np.array([0, 13.0])
    gradcheck(pyattn.sparsebert_attention, *operands(s, np.float64), alpha, hard=False,
              additive=True, decisions={"noise": np.zeros((2, 12))}, eps=1e-4)


@pytest.mark.parametrize("additive", [True, False])
def test_all_distances_open_is_attention(additive):
    s = SHAPES[0]
    qkv = operands(s, np.float64)
    alpha = np.broadcast_to([0.0, 50.0], (4, 67, 2))
    out = pyattn.sparsebert_attention(*qkv, alpha, additive=additive, rng=0)
    np.testing.assert_allclose(out, pyattn.attention(*qkv), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weights_are_a_toeplitz_matrix(backend):
    n = 90
    x = np.zeros((2, n, 4))
    alpha, noise = drawn(Shape((), 2, 2, n, n, 4, 4))
    with pyattn.use_backend(backend):
        weights = pyattn.sparsebert_attention.forward(
            x, x, x, alpha, hard=False, decisions={"noise": noise}, return_weights=True)[0][1]
    # of equal scores weights are gates up to a factor for each row
    shares = weights / weights[:, np.arange(n), np.arange(n)][..., None]
    for d in range(n):
        i = np.arange(n - d)
        np.testing.assert_allclose(shares[:, i, i + d], np.broadcast_to(
            shares[:, :1, d], (2, n - d)), rtol=1e-11)
        np.testing.assert_allclose(shares[:, i, i + d], shares[:, i + d, i], rtol=1e-11)


def test_a_closed_distance_can_open_again_only_if_it_multiplies():
    s = SHAPES[0]
    qkv = operands(s, np.float64)
    alpha = np.zeros((4, 67, 2))
    alpha[..., 1] = np.where(np.arange(67) % 3 == 1, -1, 1)
    options = {"decisions": {"noise": np.zeros((4, 67))}}
    for additive in (True, False):
        out, saved = pyattn.sparsebert_attention.forward(*qkv, alpha, additive=additive, **options)
        found = saved.backward(np.ones_like(out) + out).alpha
        assert ((found[:, 1::3] == 0) == additive).all()
        assert (found[:, ::3] != 0).all()
        np.testing.assert_allclose(found[..., 0], -found[..., 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drop_diagonal", [False, True])
def test_the_mask_that_was_learned(drop_diagonal, backend):
    s = Shape((2,), 2, 1, 300, 300, 8, 8)
    qkv = operands(s, np.float64)
    alpha = np.zeros((2, 300, 2))
    alpha[0, :70, 1], alpha[1, 200:230, 1] = 1, 1
    with pyattn.use_backend(backend):
        searched = pyattn.sparsebert_attention(
            *qkv, alpha, drop_diagonal=drop_diagonal, decisions={"noise": np.zeros((2, 300))})
        mask = sparsebert_mask(alpha, drop_diagonal=drop_diagonal)
        out, saved = pyattn.attention.forward(*qkv, mask=mask)
    np.testing.assert_allclose(out, searched, rtol=0, atol=1e-12)
    assert saved.stats["tiles"] < 2 * 2 * 25
    i, j = np.arange(300)[:, None], np.arange(300)
    wanted = (alpha[:, :, 1] > 0)[:, abs(i - j)] & ~((i == j) & drop_diagonal)
    assert saved.stats["pairs"] == 2 * wanted.sum()


def test_a_row_without_an_open_distance_is_0():
    x = np.ones((1, 5, 4))
    alpha = np.zeros((1, 5, 2))
    alpha[:, 3, 1] = 9
    out, saved = pyattn.sparsebert_attention.forward(x, x, x, alpha,
                                                     decisions={"noise": np.zeros((1, 5))})
    assert (out[0, 2] == 0).all()
    assert (out[0, [0, 1, 3, 4]] == 1).all()
    assert np.isfinite(saved.backward(out).alpha).all()


@pytest.mark.parametrize("hard", [True, False])
def test_decisions_give_the_same_mask_again(hard):
    s = SHAPES[0]
    given = (*operands(s, np.float32), drawn(s)[0])
    out, saved = pyattn.sparsebert_attention.forward(*given, hard=hard, rng=3, dropout=0.1)
    again = pyattn.sparsebert_attention(*given, hard=hard, decisions=saved.decisions, dropout=0.1)
    assert (out == again).all()
    assert set(saved.decisions) == {"noise", "dropout_seed"} | ({"gates"} if hard else set())


def test_what_comes_later_changes_nothing():
    s, rng = Shape((), 2, 2, 80, 80, 8, 8), np.random.default_rng(0)
    qkv, (alpha, noise) = operands(s, np.float64), drawn(s)
    options = {"hard": False, "causal": True, "decisions": {"noise": noise}}
    before = pyattn.sparsebert_attention(*qkv, alpha, **options)
    for x in qkv:
        x[:, 50:] = rng.standard_normal(x[:, 50:].shape)
    after = pyattn.sparsebert_attention(*qkv, alpha, **options)
    assert (before[:, :50] == after[:, :50]).all()


def test_arrays_of_other_libraries():
    s = SHAPES[0]
    given, found = (*operands(s, np.float64), drawn(s)[0]), []
    for xp in (np, array_api_strict):
        out, saved = pyattn.sparsebert_attention.forward(*map(xp.asarray, given), rng=0)
        grads = saved.backward(xp.asarray(np.ones(out.shape)))
        assert all(type(x) is type(out) for x in grads)
        found.append([arrays.to_host(x) for x in (out, *grads)])
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)


def test_the_loss_counts_what_is_open():
    s = Shape((), 2, 2, 9, 9, 4, 4)
    alpha, noise = drawn(s)
    loss, saved = sparsebert_loss.forward(alpha, strength=0.3, decisions={"noise": noise})
    wanted = alpha[..., 1] - alpha[..., 0] + noise > 0
    np.testing.assert_allclose(loss, 0.3 * wanted.sum())
    soft = 1 / (1 + np.exp(-(alpha[..., 1] - alpha[..., 0] + noise)))
    np.testing.assert_allclose(saved.backward().alpha[..., 1], 0.3 * soft * (1 - soft))
    gradcheck(sparsebert_loss, alpha, strength=0.3, hard=False, decisions={"noise": noise})


X, A = np.ones((2, 8, 4)), np.zeros((2, 8, 2))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: pyattn.sparsebert_attention(X, X, X, A[:, :7]), ShapeError, "alpha must be"),
    (lambda: pyattn.sparsebert_attention(X, X, X, A[..., :1]), ShapeError, "alpha must be"),
    (lambda: pyattn.sparsebert_attention(X, X, X, np.zeros((3, 8, 2))), ShapeError, "alpha"),
    (lambda: pyattn.sparsebert_attention(X, X, X, A > 0), DtypeError, "alpha"),
    (lambda: pyattn.sparsebert_attention(X, X, X, A, temperature=0.0), OptionError,
     "temperature must be positive"),
    (lambda: pyattn.sparsebert_attention(X, X, X, A, gate=X), OptionError, "gate"),
    (lambda: pyattn.sparsebert_attention(X, X, X, A, hard=False,
                                         decisions={"gates": A[..., 0]}), OptionError,
     "decisions may hold noise"),
    (lambda: sparsebert_mask(A[0]), ShapeError, "alpha must be"),
])
def test_what_does_not_fit_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
