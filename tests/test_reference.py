"""The judge against independent code: torch, loops of plain Python, finite differences."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from pyattn import reference


def arrays(rng, lead=(), h=4, g=2, n=7, m=9, d=5, e=3):
    return (rng.standard_normal((*lead, h, n, d)), rng.standard_normal((*lead, g, m, d)),
            rng.standard_normal((*lead, g, m, e)))


def loops(q, k, v, allowed, *, scale, softcap=None, bias=None, gate=None, sinks=None):
    """One head group after the other in plain Python floats: (H, N, D), (G, M, D), (G, M, E)."""
    (h, n, d), (g, m, e) = q.shape, v.shape
    out, lse = np.zeros((h, n, e)), np.full((h, n), -np.inf)
    for head, i in itertools.product(range(h), range(n)):
        group, terms = head // (h // g), {}
        for j in range(m):
            if not allowed(head, i, j):
                continue
            s = scale * math.fsum(q[head, i, c] * k[group, j, c] for c in range(d))
            s = s if softcap is None else softcap * math.tanh(s / softcap)
            s += 0 if bias is None else bias[head, i, j]
            terms[j] = math.exp(s) * (1 if gate is None else gate[head, i, j])
        total = math.fsum(terms.values()) + (0 if sinks is None else math.exp(sinks[head]))
        if total:
            lse[head, i] = math.log(total)
            for c in range(e):
                out[head, i, c] = math.fsum(t * v[group, j, c] for j, t in terms.items()) / total
    return out, lse


OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 1.5, "scale": 2.0},
    "causal": {"causal": True},
    "top_left": {"causal": "top_left"},
    "window": {"window": 2},
    "causal window": {"window": 2, "causal": True},
    "one-sided window": {"window": (None, 1)},
    "lopsided window": {"window": (0, 3)},
    "bias": {"bias": (4, 7, 9)},
    "bias of one row": {"bias": (4, 1, 9)},
    "gate": {"gate": (4, 7, 9)},
    "sinks": {"sinks": (4,)},
    "alibi": {"alibi_slopes": (4,), "causal": True},
    "scale per head": {"scale": (4,)},
    "lengths": {"q_lengths": 5, "kv_lengths": 6, "causal": True},
    "no keys": {"kv_lengths": 0, "sinks": (4,)},
    "segments": {"segments": ([2, 0, 4], [3, 1, 5]), "causal": True},
    "everything": {"scale": (4,), "softcap": 2.0, "bias": (1, 7, 9), "gate": (4, 1, 9),
                   "sinks": (4,), "alibi_slopes": (4,), "causal": True, "window": 4},
}


def drawn(rng, options):
    """The table's shapes made arrays; gates in [0, 1] with closed ones, biases with -inf."""
    made = {}
    for name, value in options.items():
        if name in ("bias", "gate", "sinks", "alibi_slopes", "scale") and isinstance(value, tuple):
            made[name] = rng.uniform(0.1, 1, value)
            if name == "gate":
                made[name][rng.random(value) < 0.2] = 0
            if name == "bias":
                made[name][rng.random(value) < 0.2] = -np.inf
        else:
            made[name] = value
    return made


def allows(options, n, m):
    """The rule of the options, pair by pair, written for one batch item."""
    causal, window = options.get("causal"), options.get("window")
    rows, keys = options.get("q_lengths", n), options.get("kv_lengths", m)
    left, right = window if isinstance(window, tuple) else (window, window)

    def rule(_, i, j):
        shift = keys - rows
        if "segments" in options:
            ends = [np.cumsum(lengths) for lengths in options["segments"]]
            a, b = (int(np.searchsorted(end, x, side="right")) for end, x in
                    zip(ends, (i, j), strict=True))
            if a != b or a >= len(ends[0]):
                return False
            lengths = [part[a] for part in options["segments"]]
            i, j = i - (ends[0][a] - lengths[0]), j - (ends[1][a] - lengths[1])
            shift = lengths[1] - lengths[0]
        elif i >= rows or j >= keys:
            return False
        ahead = i + (0 if causal == "top_left" else shift) - j
        return ((not causal or ahead >= 0) and (left is None or ahead <= left)
                and (right is None or ahead >= -right))
    return rule


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_is_what_plain_loops_give(name):
    rng = np.random.default_rng(1)
    q, k, v = arrays(rng)
    options = drawn(rng, OPTIONS[name])
    rule = allows(options, 7, 9)
    bias = np.broadcast_to(options.get("bias", 0.0), (4, 7, 9)).copy()
    scale = np.broadcast_to(options.get("scale", 5 ** -0.5), (4,))
    slopes = options.get("alibi_slopes")
    if slopes is not None:
        bias -= slopes[:, None, None] * abs(np.arange(7)[:, None] + 2 - np.arange(9))
    gate = options.get("gate")
    out, lse = loops(q * scale[:, None, None], k, v, rule, scale=1.0, bias=bias,
                     softcap=options.get("softcap"), sinks=options.get("sinks"),
                     gate=None if gate is None else np.broadcast_to(gate, (4, 7, 9)))
    got = reference.attention(q, k, v, **options)
    np.testing.assert_allclose(got[0], out, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(got[1], lse, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_gradient_by_central_differences(name):
    rng = np.random.default_rng(2)
    q, k, v = arrays(rng, lead=(2,))
    options = drawn(rng, OPTIONS[name])
    dout, dlse = rng.standard_normal((2, 4, 7, 3)), rng.standard_normal((2, 4, 7))

    def loss(changed):
        x = {"q": q, "k": k, "v": v, **options, **changed}
        out, lse = reference.attention(**x)
        return (dout * out).sum() + (dlse * np.where(np.isfinite(lse), lse, 0)).sum()

    grads = reference.attention_backward(q, k, v, dout, dlse, **options)
    given = {"q": q, "k": k, "v": v} | {x: y for x, y in options.items() if np.ndim(y) and x in
                                       ("bias", "gate", "scale", "sinks", "alibi_slopes")}
    assert set(grads) == set(given)
    for argument, x in given.items():
        assert grads[argument].shape == x.shape
        for _ in range(3):
            # a closed gate stays in [0, inf): only one-sided there, so it is left where it is
            toward = rng.standard_normal(x.shape) * (x != 0 if argument == "gate" else 1)
            step = 1e-5
            numeric = (loss({argument: x + step * toward})
                       - loss({argument: x - step * toward})) / (2 * step)
            analytic = (grads[argument] * toward).sum()
            assert abs(analytic - numeric) < 1e-7 * (1 + abs(numeric)), argument


def test_gradient_of_a_closed_gate_lets_it_reopen():
    rng = np.random.default_rng(3)
    q, k, v = arrays(rng)
    gate = rng.uniform(0.2, 1, (4, 7, 9))
    gate[:, :, 4] = 0
    dout = rng.standard_normal((4, 7, 3))
    grads = reference.attention_backward(q, k, v, dout, gate=gate)
    opened = gate.copy()
    opened[1, 2, 4] = 1e-6
    change = (dout * (reference.attention(q, k, v, gate=opened)[0]
                      - reference.attention(q, k, v, gate=gate)[0])).sum() / 1e-6
    assert grads["gate"][1, 2, 4] == pytest.approx(change, rel=1e-4)


def test_leading_axes_broadcast_and_their_gradients_are_summed():
    rng = np.random.default_rng(4)
    q, k, v = arrays(rng, lead=(3, 2))
    k, v, bias = k[:1], v[0], rng.standard_normal((2, 1, 7, 1))
    dout = rng.standard_normal((3, 2, 4, 7, 3))
    got = reference.attention(q, k, v, bias=bias)[0]
    grads = reference.attention_backward(q, k, v, dout, bias=bias)
    total = {name: 0 for name in grads}
    for a, b in itertools.product(range(3), range(2)):
        one = (q[a, b], k[0, b], v[b])
        np.testing.assert_allclose(got[a, b], reference.attention(*one, bias=bias[b])[0])
        part = reference.attention_backward(*one, dout[a, b], bias=bias[b])
        place = {"q": (a, b), "k": (0, b), "v": (b,), "bias": (b,)}
        for name, gradient in part.items():
            spread = np.zeros(grads[name].shape)
            spread[place[name]] = gradient
            total[name] = total[name] + spread
    for name, gradient in grads.items():
        np.testing.assert_allclose(gradient, total[name], atol=1e-13)


@pytest.mark.parametrize("causal", [False, "top_left", True])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_agrees_with_torch_forward_and_backward(causal, group):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(5)
    q, k, v = arrays(rng, lead=(2,), g=group, n=6, m=11)
    dout = rng.standard_normal((2, 4, 6, 3))
    tq, tk, tv = (torch.tensor(x, requires_grad=True) for x in (q, k, v))
    mask = None if not causal else torch.ones(6, 11, dtype=torch.bool).tril(
        0 if causal == "top_left" else 5)
    tout = torch.nn.functional.scaled_dot_product_attention(
        tq, tk, tv, attn_mask=mask, enable_gqa=group != 4)
    tout.backward(torch.tensor(dout))
    np.testing.assert_allclose(reference.attention(q, k, v, causal=causal)[0],
                               tout.detach().numpy(), rtol=1e-12, atol=1e-14)
    grads = reference.attention_backward(q, k, v, dout, causal=causal)
    for name, x in (("q", tq), ("k", tk), ("v", tv)):
        np.testing.assert_allclose(grads[name], x.grad.numpy(), rtol=1e-11, atol=1e-13)


def test_dropout_is_a_keep_array():
    rng = np.random.default_rng(6)
    q, k, v = arrays(rng, g=4)
    keep = rng.random((4, 7, 9)) > 0.3
    p = reference.weights(q, k)
    np.testing.assert_allclose(reference.attention(q, k, v, keep=keep, dropout=0.3)[0],
                               (p * keep / 0.7) @ v)
    dout = rng.standard_normal((4, 7, 3))
    grads = reference.attention_backward(q, k, v, dout, keep=keep, dropout=0.3)
    toward, step = rng.standard_normal(k.shape), 1e-5
    numeric = sum(sign * (dout * reference.attention(
        q, k + sign * step * toward, v, keep=keep, dropout=0.3)[0]).sum()
        for sign in (1, -1)) / (2 * step)
    assert (grads["k"] * toward).sum() == pytest.approx(numeric, rel=1e-7)


def test_poison_reaches_allowed_pairs_only():
    rng = np.random.default_rng(7)
    q, k, v = arrays(rng, h=2, g=1, n=6, m=6)
    dout = rng.standard_normal((2, 6, 3))
    clean = reference.attention(q, k, v, causal=True, kv_lengths=4, q_lengths=5)
    clean_grads = reference.attention_backward(q, k, v, dout, causal=True, kv_lengths=4,
                                               q_lengths=5)
    for x in (k, v):
        x[:, 4], x[:, 5] = np.nan, np.inf
    q[:, 5] = dout[:, 5] = np.nan
    q[:, 0] = dout[:, 0] = np.nan       # of 5 queries and 4 keys, the first sees nothing
    got = reference.attention(q, k, v, causal=True, kv_lengths=4, q_lengths=5)
    grads = reference.attention_backward(q, k, v, dout, causal=True, kv_lengths=4, q_lengths=5)
    np.testing.assert_array_equal(got[0], clean[0])
    np.testing.assert_array_equal(got[1], clean[1])
    assert (got[0][:, [0, 5]] == 0).all()
    assert (got[1][:, [0, 5]] == -np.inf).all()
    for name, gradient in grads.items():
        np.testing.assert_array_equal(gradient, clean_grads[name])


def test_allowed_poison_propagates():
    rng = np.random.default_rng(8)
    q, k, v = arrays(rng, h=1, g=1, n=6, m=6)
    k[0, 3], v[0, 4, 1] = np.nan, np.inf
    out, lse = reference.attention(q, k, v, causal=True)
    assert np.isfinite(out[:, :3]).all()
    assert np.isnan(out[:, 3:]).all()
    assert np.isnan(lse[:, 3:]).all()
    k[0, 3] = 0
    out, lse = reference.attention(q, k, v, causal=True)
    assert np.isfinite(lse).all()
    assert np.isfinite(out[:, :4]).all()
    assert (out[:, 4:, 1] == np.inf).all()
    assert np.isfinite(out[..., [0, 2]]).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_zero_lengths(shape):
    n, m = shape
    q, k, v = np.ones((2, n, 3)), np.ones((1, m, 3)), np.ones((1, m, 4))
    out, lse = reference.attention(q, k, v, causal=True)
    assert out.shape == (2, n, 4)
    assert (out == 0).all()
    assert (lse == -np.inf).all()
    grads = reference.attention_backward(q, k, v, np.ones((2, n, 4)))
    assert [grads[x].shape for x in "qkv"] == [q.shape, k.shape, v.shape]
    assert not any(g.any() for g in grads.values())


def test_merge_is_attention_over_the_union_and_its_gradient():
    rng = np.random.default_rng(9)
    q, k, v = arrays(rng, n=5, m=9)
    first = np.arange(9) < 3
    first_rows = first & (np.arange(5) != 2)[:, None]       # row 2 sees nothing in part a
    parts = [reference.attention(q, k, v, mask=mask) for mask in (first_rows, ~first_rows)]
    out, lse = reference.merge(*parts[0], *parts[1])
    whole = reference.attention(q, k, v)
    np.testing.assert_allclose(out, whole[0], atol=1e-14)
    np.testing.assert_allclose(lse, whole[1], atol=1e-14)

    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    given = dict(zip(("out_a", "lse_a", "out_b", "lse_b"), (*parts[0], *parts[1]), strict=True))
    grads = reference.merge_backward(*given.values(), dout, dlse)
    for name, x in given.items():
        toward, step = rng.standard_normal(x.shape), 1e-6
        losses = []
        for sign in (1, -1):
            o, s = reference.merge(**{**given, name: x + sign * step * toward})
            losses.append((dout * o).sum() + (dlse * s).sum())
        assert (grads[name] * toward).sum() == pytest.approx(
            (losses[0] - losses[1]) / (2 * step), rel=1e-6), name

    given["out_a"][:, 2] = np.nan       # an empty part is not looked at
    np.testing.assert_array_equal(reference.merge(**given)[0], out)
    both = reference.merge(np.full((1, 1), np.nan), [-np.inf], np.ones((1, 1)), [-np.inf])
    assert both[0] == 0
    assert both[1] == -np.inf


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_plain_is_the_same_formulas_less_exactly(dtype):
    rng = np.random.default_rng(10)
    q, k, v = (x.astype(dtype) for x in arrays(rng, n=40, m=50, d=16, e=16))
    dout, precision = rng.standard_normal((4, 40, 16)).astype(dtype), reference.plain(dtype)
    bias = rng.standard_normal((4, 1, 50)).astype(np.float32)
    exact = reference.attention(q, k, v, bias=bias, precision=reference.LONGDOUBLE)
    got = reference.attention(q, k, v, bias=bias, precision=precision)
    grads = reference.attention_backward(q, k, v, dout, bias=bias, precision=precision)
    assert got[0].dtype == dtype
    assert got[1].dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert {x: g.dtype for x, g in grads.items()} == {
        "q": dtype, "k": dtype, "v": dtype, "bias": np.float32}
    eps = float(ml_dtypes.finfo(dtype).eps)
    error = abs(got[0].astype(np.longdouble) - exact[0]).max() / abs(exact[0]).max()
    assert 0.05 * eps < error < 8 * eps


def test_longdouble_judges_float64():
    if np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps:
        pytest.skip("long double is double on this machine")
    rng = np.random.default_rng(11)
    q, k, v = arrays(rng, n=30, m=30)
    exact = reference.attention(q, k, v, precision=reference.LONGDOUBLE)
    double = reference.attention(q, k, v)
    assert exact[0].dtype == np.longdouble
    assert 0 < abs(exact[0] - double[0]).max() < 1e-14


def test_bad_calls_are_refused():
    q, k, v = arrays(np.random.default_rng(12))
    with pytest.raises(TypeError, match="unknown option tepid"):
        reference.attention(q, k, v, tepid=1)
    with pytest.raises(ValueError, match="multiple of G"):
        reference.attention(q[:3], k, v)
    with pytest.raises(ValueError, match="do not fit"):
        reference.attention(q, k, v, kv_lengths=10)
    with pytest.raises(ValueError, match="exclude"):
        reference.attention(q, k, v, kv_lengths=3, segments=[7])


def test_it_stands_alone():
    """The judge must not share code with what it judges."""
    import ast
    import pathlib

    for path in pathlib.Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2, path
                assert node.level == 1 or (node.module or "").partition(".")[0] in (
                    "__future__", "collections", "typing", "numpy", "scipy"), (path, node.module)
            if isinstance(node, ast.Import):
                assert {a.name for a in node.names} <= {"numpy", "dataclasses"}, path
