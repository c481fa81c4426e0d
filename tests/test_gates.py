"""Gates between blocks of tokens, and the samplers that gates come from."""

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
from pyattn.features import (
    bernoulli_gates,
    binary_concrete,
    gate_mask,
    hard_concrete,
    l0_penalty,
    policy_gradient,
    straight_through,
    update_baseline,
)
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
KINDS = ["straight_through", "concrete", "hard_concrete", "policy"]
SHAPES = [Shape((2,), 4, 2, 67, 67, 16, 16), Shape((2,), 2, 1, 70, 133, 5, 7),
          Shape((1,), 2, 2, 133, 70, 8, 8), Shape((), 2, 1, 1, 1, 4, 4)]


def operands(s, dtype):
    rng = np.random.default_rng([s.n, s.m])
    return tuple(rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e)))


def own_blocks(s, size, top_left=False):
    """Blocks that hold a query's own position, query by query."""
    own = np.zeros((-(-s.n // size), -(-s.m // size)), bool)
    for i in range(s.n):
        j = i + (0 if top_left else s.m - s.n)
        if 0 <= j < s.m:
            own[i // size, j // size] = True
    return own


def logits_of(s, size, relative, dtype=np.float64):
    rows, columns = -(-s.n // size), -(-s.m // size)
    shape = (s.heads, rows + columns - 1) if relative else (s.heads, rows, columns)
    return np.random.default_rng([7, size]).standard_normal(shape).astype(dtype)


def gates_by_the_book(kind, a, decisions):
    """Gates and their slopes; a policy's has none."""
    a = a.astype(np.float64)
    logistic = lambda x: 1 / (1 + np.exp(-x))       # noqa: E731
    if kind == "straight_through":
        return (a > 0).astype(float), logistic(a) * logistic(-a)
    if kind == "policy":
        return decisions["gates"].astype(float), np.zeros(a.shape)
    s = logistic((a + decisions["noise"]) / (2 / 3 if kind == "hard_concrete" else 1))
    if kind == "concrete":
        return s, s * (1 - s)
    wide = 1.2 * s - 0.1
    return np.clip(wide, 0, 1), np.where((wide > 0) & (wide < 1), 1.2 * s * (1 - s) * 1.5, 0)


def spread(table, size, s):
    return table.repeat(size, axis=-2).repeat(size, axis=-1)[..., :s.n, :s.m]


def judge(kind, s, size, dtype, backend, *, relative=False, allowed=True, **options):
    qkv = operands(s, dtype)
    logits = logits_of(s, size, relative, np.float64 if dtype == np.float64 else np.float32)
    with pyattn.use_backend(backend):
        (out, lse), saved = pyattn.gated_attention.forward(
            *qkv, logits, block_size=size, kind=kind, rng=5, return_lse=True, **options)
        rng = np.random.default_rng(1)
        dout = rng.standard_normal(out.shape).astype(dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        grads = saved.backward(dout, dlse)
    gates, slopes = gates_by_the_book(kind, logits, saved.decisions)
    own = own_blocks(s, size, options.get("causal") == "top_left")
    rows, columns = own.shape
    number = np.arange(logits.size).reshape(logits.shape)
    if relative:
        number = np.stack([[[number[h, c - r + rows - 1] for c in range(columns)]
                            for r in range(rows)] for h in range(s.heads)])
    table = np.where(own, 1, gates.ravel()[number])
    dense = np.broadcast_to(spread(table, size, s), (*s.batch, s.heads, s.n, s.m))
    i, j, inside = positions(s, "top_left" if options.get("causal") == "top_left" else
                             "bottom_right", options.get("q_lengths"), options.get("kv_lengths"))
    seen = inside & allowed & ((j <= i) if options.get("causal") else True)
    problem = oracle.Dense(*qkv, np.full(s.heads, s.d ** -0.5), seen, gate=dense,
                           softcap=options.get("softcap"))
    found = []
    for r in (oracle.exact(dtype), oracle.plain(dtype)):
        want = oracle.backward(problem, dout, dlse, r)
        dgate = oracle.sum_to(want.pop("gate"), (s.heads, s.n, s.m))
        dlogits = np.zeros(logits.size, dgate.dtype)
        for h, x, y in np.ndindex(s.heads, rows, columns):
            if not own[x, y]:
                at = number[h, x, y]
                block = dgate[h, x * size:(x + 1) * size, y * size:(y + 1) * size]
                dlogits[at] += block.sum() * slopes.ravel()[at]
        want["gate_logits"] = dlogits.reshape(logits.shape)
        found.append({"out": oracle.forward(problem, r)[0], "lse": oracle.forward(problem, r)[1],
                      **want})
    exact, rough = found
    for name, x in {"out": out, "lse": lse, **grads._asdict()}.items():
        if dtype == np.float64:
            np.testing.assert_allclose(x, exact[name].astype(dtype), rtol=1e-11, atol=1e-11,
                                       err_msg=name)
        else:
            oracle.assert_close(x, exact[name], rough[name], factor=2 if name in "out lse" else 3,
                                name=name)
    return saved


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_rule(shape, kind, relative, backend):
    judge(kind, shape, 16, np.float64, backend, relative=relative)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_blocks_of_any_size(size, backend):
    judge("concrete", SHAPES[1], size, np.float64, backend)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16],
                         ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dtypes(backend, dtype):
    judge("hard_concrete", SHAPES[0], 16, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_causal_lengths_and_masks(causal, backend):
    s = SHAPES[1]
    lengths = {"q_lengths": np.array([70, 40]), "kv_lengths": np.array([133, 103])}
    mask = np.random.default_rng(0).random((s.n, s.m)) < 0.8
    judge("straight_through", s, 16, np.float64, backend, causal=causal, mask=mask, allowed=mask,
          softcap=2.0, **lengths)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["concrete", "hard_concrete"])
@pytest.mark.parametrize("relative", [False, True])
def test_finite_differences(relative, kind, backend):
    s = Shape((2,), 2, 1, 9, 9, 4, 3)
    with pyattn.use_backend(backend):
        gradcheck(pyattn.gated_attention, *operands(s, np.float64), logits_of(s, 2, relative),
                  block_size=2, kind=kind, rng=0, causal=True, return_lse=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_gate_has_the_gradient_of_opening_it(backend):
    """By one-sided differences of attention with the gate spelled out."""
    s, size, step = Shape((), 2, 2, 8, 8, 4, 4), 2, 1e-6
    qkv, rng = operands(s, np.float64), np.random.default_rng(0)
    logits = np.full((2, 4, 4), -0.7)
    with pyattn.use_backend(backend):
        out, saved = pyattn.gated_attention.forward(*qkv, logits, block_size=size)
        dout = rng.standard_normal(out.shape)
        found = saved.backward(dout).gate_logits
    slope = 1 / (1 + np.exp(0.7)) / (1 + np.exp(-0.7))
    closed = np.broadcast_to(np.eye(4), (2, 4, 4))
    for h, r, c in np.ndindex(2, 4, 4):
        if r == c:
            assert found[h, r, c] == 0
            continue
        values = []
        for opened in (step, 2 * step):
            gate = closed.copy()
            gate[h, r, c] = opened
            moved = pyattn.attention(*qkv, gate=spread(gate, size, s))
            values.append((dout * (moved - out)).sum() / opened)
        wanted = 2 * values[0] - values[1]
        assert abs(found[h, r, c]) > 1e-3
        np.testing.assert_allclose(found[h, r, c], slope * wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_all_gates_open_is_attention(kind, causal):
    s = SHAPES[0]
    qkv, logits = operands(s, np.float64), np.full((s.heads, 5, 5), 60.0)
    out, saved = pyattn.gated_attention.forward(*qkv, logits, block_size=16, kind=kind, rng=0,
                                                causal=causal)
    wanted, dense = pyattn.attention.forward(*qkv, causal=causal)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-12)
    for name, x in dense.backward(out)._asdict().items():
        np.testing.assert_allclose(getattr(saved.backward(out), name), x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relative", [False, True])
def test_frozen_gates_are_a_mask_of_blocks(relative, backend):
    s = Shape((2,), 2, 1, 300, 300, 8, 8)
    qkv, logits = operands(s, np.float64), logits_of(s, 64, relative)
    with pyattn.use_backend(backend):
        out, saved = pyattn.gated_attention.forward(*qkv, logits, block_size=64, frozen=True)
        learning, explored = pyattn.gated_attention.forward(*qkv, logits, block_size=64)
        grads = saved.backward(out)
        mask = gate_mask(logits, 300, 300, block_size=64)
        wanted, masked = pyattn.attention.forward(*qkv, mask=mask)
        dense = masked.backward(out)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-13)
    np.testing.assert_allclose(out, learning, rtol=0, atol=1e-12)
    for name in ("q", "k", "v"):
        np.testing.assert_allclose(getattr(grads, name), getattr(dense, name), rtol=0, atol=1e-12)
    assert (grads.gate_logits == 0).all()
    own = np.eye(5, dtype=bool)
    table = logits[:, np.arange(5) - np.arange(5)[:, None] + 4] if relative else logits
    table = own | (table > 0)
    assert saved.stats["tiles"] == 2 * table.sum()
    assert explored.stats["tiles"] == 2 * 2 * 25


def test_decisions_of_frozen_gates():
    s = SHAPES[0]
    qkv, logits = operands(s, np.float64), logits_of(s, 16, relative=False)
    drawn = np.random.default_rng(0).random(logits.shape) < 0.5
    out, saved = pyattn.gated_attention.forward(*qkv, logits, block_size=16, frozen=True,
                                                decisions={"gates": drawn})
    own = np.eye(5, dtype=bool)
    wanted = pyattn.attention(*qkv, mask=spread(drawn | own, 16, s))
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-12)
    assert (saved.decisions["gates"] == drawn).all()


def test_costs_of_frozen_gates_follow_the_open_blocks():
    found = []
    for n in (1024, 2048, 4096):
        x = np.zeros((1, n, 4), np.float32)
        offset = np.arange(2 * n // 64 - 1) - (n // 64 - 1)
        logits = np.where(abs(offset) <= 1, 1.0, -1.0)[None]
        saved = pyattn.gated_attention.forward(x, x, x, logits, block_size=64, frozen=True)[1]
        found.append(saved.stats["tiles"])
    assert found == [3 * n // 64 - 2 for n in (1024, 2048, 4096)]


@pytest.mark.parametrize("kind", KINDS)
def test_decisions_give_the_same_gates_again(kind):
    s = SHAPES[0]
    given = (*operands(s, np.float32), logits_of(s, 16, relative=False))
    out, saved = pyattn.gated_attention.forward(*given, block_size=16, kind=kind, rng=3,
                                                dropout=0.1)
    again = pyattn.gated_attention(*given, block_size=16, kind=kind, dropout=0.1,
                                   decisions=saved.decisions)
    same = pyattn.gated_attention(*given, block_size=16, kind=kind, rng=3, dropout=0.1)
    assert (out == again).all()
    assert (out == same).all()


def test_what_comes_later_changes_nothing():
    s, rng = Shape((), 2, 2, 80, 80, 8, 8), np.random.default_rng(0)
    qkv, logits = operands(s, np.float64), logits_of(s, 16, relative=False)
    options = {"block_size": 16, "kind": "concrete", "causal": True,
               "decisions": {"noise": rng.logistic(size=logits.shape)}}
    before = pyattn.gated_attention(*qkv, logits, **options)
    for x in qkv:
        x[:, 50:] = rng.standard_normal(x[:, 50:].shape)
    after = pyattn.gated_attention(*qkv, logits, **options)
    assert (before[:, :50] == after[:, :50]).all()


@pytest.mark.parametrize("relative", [False, True])
def test_arrays_of_other_libraries(relative):
    s = SHAPES[0]
    given = (*operands(s, np.float64), logits_of(s, 16, relative))
    found = []
    for xp in (np, array_api_strict):
        out, saved = pyattn.gated_attention.forward(*map(xp.asarray, given), block_size=16,
                                                    kind="concrete", rng=0)
        grads = saved.backward(xp.asarray(np.ones(out.shape)))
        assert all(type(x) is type(out) for x in grads)
        found.append([arrays.to_host(x) for x in (out, *grads)])
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens(n):
    q = np.ones((2, n, 4))
    out, saved = pyattn.gated_attention.forward(q, q, q, np.full((2, n, n), -1.0), block_size=4)
    assert (out == 1).all()
    assert saved.backward(out).gate_logits.shape == (2, n, n)


def test_a_policy_learns_from_a_reward():
    s = SHAPES[0]
    qkv, logits = operands(s, np.float64), logits_of(s, 16, relative=False)
    out, saved = pyattn.gated_attention.forward(*qkv, logits, block_size=16, kind="policy", rng=0)
    assert (saved.backward(out).gate_logits == 0).all()
    found = saved.backward(out, reward=3.0, baseline=1.0).gate_logits
    wanted = -policy_gradient(logits, saved.decisions["gates"], 3.0, baseline=1.0)
    assert (found == wanted).all()
    sampled = pyattn.gated_attention.forward(*qkv, logits, block_size=16)[1]
    with pytest.raises(OptionError, match="reward"):
        sampled.backward(out, reward=1.0)


def test_the_mean_of_a_policys_estimates_is_the_gradient():
    """A reward that counts open gates has the expectation sum s, with the gradient s (1 - s)."""
    logits = np.array([-1.0, 0.0, 2.0])
    s = 1 / (1 + np.exp(-logits))
    rng, found = np.random.default_rng(0), []
    for _ in range(4000):
        gates, saved = bernoulli_gates.forward(logits, rng=rng)
        found.append(policy_gradient(logits, saved.decisions["gates"], gates.sum(), baseline=1.5))
    error = np.std(found, axis=0) / np.sqrt(len(found))
    assert (abs(np.mean(found, axis=0) - s * (1 - s)) < 4 * error).all()
    assert (error < 0.02).all()


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_samplers(shape):
    rng = np.random.default_rng(0)
    logits, noise = rng.standard_normal(shape), rng.logistic(size=shape)
    gradcheck(binary_concrete, logits, temperature=0.7, decisions={"noise": noise})
    gradcheck(hard_concrete, logits, decisions={"noise": noise / 2})
    gradcheck(l0_penalty, logits)
    dout = rng.standard_normal(shape)
    gates, saved = binary_concrete.forward(logits, hard=True, decisions={"noise": noise})
    assert (gates == (logits + noise > 0)).all()
    soft = binary_concrete.forward(logits, decisions={"noise": noise})[1]
    assert (saved.backward(dout).logits == soft.backward(dout).logits).all()
    gates, saved = straight_through.forward(logits, temperature=0.5)
    assert (gates == (logits > 0)).all()
    s = 1 / (1 + np.exp(-logits / 0.5))
    np.testing.assert_allclose(saved.backward(dout).logits, dout * s * (1 - s) / 0.5)
    for sampler in (binary_concrete, hard_concrete, bernoulli_gates):
        first, second = sampler(logits, rng=1), sampler(logits, rng=1)
        assert (first == second).all()
        assert first.dtype == logits.dtype
        assert ((first >= 0) & (first <= 1)).all()


def test_how_often_hard_concrete_gates_are_not_0():
    logits = np.full(20000, -0.5)
    penalty = l0_penalty(logits)
    found = np.count_nonzero(hard_concrete(logits, rng=0))
    assert abs(found - penalty) < 4 * np.sqrt(20000) / 2


def test_baseline():
    assert update_baseline(2.0, np.array([1.0, 3.0, 5.0]), decay=0.9) == pytest.approx(2.1)
    with pytest.raises(OptionError, match="decay"):
        update_baseline(0.0, 1.0, decay=1.5)


X = np.ones((2, 8, 4))
A = np.zeros((2, 4, 4))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: pyattn.gated_attention(X, X, X, A[:, :3], block_size=2), ShapeError, "gate_logits"),
    (lambda: pyattn.gated_attention(X, X, X, A[0], block_size=2), ShapeError, "gate_logits"),
    (lambda: pyattn.gated_attention(X, X, X, A, block_size=0), OptionError, "block_size"),
    (lambda: pyattn.gated_attention(X, X, X, A > 0, block_size=2), DtypeError, "gate_logits"),
    (lambda: pyattn.gated_attention(X, X, X, A, block_size=2, kind="soft"), OptionError, "kind"),
    (lambda: pyattn.gated_attention(X, X, X, A, block_size=2, temperature=0), OptionError,
     "temperature must be positive"),
    (lambda: pyattn.gated_attention(X, X, X, A, block_size=2, kind="policy", temperature=1.0),
     OptionError, "no temperature"),
    (lambda: pyattn.gated_attention(X, X, X, A, block_size=2, gate=X), OptionError, "gate"),
    (lambda: pyattn.gated_attention(X, X, X, A, block_size=2, segments=[8]), OptionError,
     "segments"),
    (lambda: pyattn.gated_attention(X, X, X, A, block_size=2, decisions={"noise": A}),
     OptionError, "decisions may hold gates"),
    (lambda: pyattn.gated_attention(X, X, X, A, block_size=2, kind="concrete",
                                    decisions={"noise": A[:, :3]}), ShapeError, "noise"),
    (lambda: pyattn.gated_attention(X, X, X, A, block_size=2, frozen=True,
                                    decisions={"noise": A}), OptionError, "may hold gates"),
    (lambda: policy_gradient(A, A[0], 1.0), ShapeError, "gates"),
    (lambda: policy_gradient(A, A, np.ones(3)), ShapeError, "reward"),
])
def test_what_does_not_fit_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
