"""Attention to mixtures of tokens, against dense formulas."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from table import Shape

import pyattn
from pyattn import linformer_attention
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
SHAPES = [Shape((2,), 4, 2, 33, 47, 20, 13), Shape((), 3, 3, 70, 40, 8, 8),
          Shape((2, 2), 2, 1, 5, 150, 16, 16), Shape((1,), 1, 1, 1, 1, 4, 4)]
RANK = 6

SHARING = {"none": ("H", "H"), "groups": ("G", "G"), "headwise": ("", ""),
           "key-value": ("", None), "key-value by head": ("H", None), "mixed": ("", "H"),
           "mixed the other way": ("H", "G"), "one": ("1", "1")}


def draw(s, dtype=np.float64, sharing="headwise", longest=None, seed=0):
    """Draw q, k, v and the one or two arrays that mix."""
    rng = np.random.default_rng([s.n, s.m, seed])
    made = [rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e))]
    leads = {"": (), "1": (1,), "H": (s.heads,), "G": (s.groups,)}
    for lead in SHARING[sharing]:
        if lead is not None:
            shape = (*leads[lead], RANK, longest or s.m)
            made.append((rng.standard_normal(shape) / np.sqrt(max(1, s.m))).astype(dtype))
    return made


def spread(w, heads):
    """What mixes, for each of `heads`."""
    w = w if w.ndim == 3 else w[None]
    return np.repeat(w, heads // len(w), axis=0)


def dense(q, k, v, e, f, lengths, r, scale):
    """The problem over mixtures, and what is needed to go back from it."""
    heads = q.shape[-3]
    end = k.shape[-2] if lengths is None else np.reshape(lengths, (-1, 1, 1, 1))
    inside = np.arange(k.shape[-2])[:, None] < end
    k, v = (r(np.where(inside, oracle.repeat_heads(x, heads), 0)) for x in (k, v))
    e, f = (r(spread(w, heads))[..., :k.shape[-2]] for w in (e, f))
    problem = oracle.Dense(r(q), r(e @ k), r(f @ v), np.full(heads, scale), np.any(
        inside, axis=-2, keepdims=True) | np.zeros((1, 1), bool))
    return problem, (k, v, e, f)


def wanted(q, k, v, e, f, dout, dlse, lengths, r, scale):
    shared, f = f is None, e if f is None else f
    problem, (kk, vv, ee, ff) = dense(q, k, v, e, f, lengths, r, scale)
    out, lse = oracle.forward(problem, r)
    inner = oracle.backward(problem, dout, dlse, r)
    grads = {"q": inner["q"]}
    end = k.shape[-2] if lengths is None else np.reshape(lengths, (-1, 1, 1, 1))
    inside = np.arange(k.shape[-2])[:, None] < end
    found = {}
    for name, x, wide, w, weights in (("k", k, kk, ee, e), ("v", v, vv, ff, f)):
        dmixed = inner[name]
        dx = np.where(inside, np.swapaxes(w, -1, -2) @ dmixed, 0)
        dx = dx.reshape(*dx.shape[:-3], x.shape[-3], -1, *dx.shape[-2:]).sum(axis=-3)
        grads[name] = r(oracle.sum_to(dx, x.shape))
        dw = oracle.sum_to(dmixed @ np.swapaxes(wide, -1, -2), (len(w), *w.shape[-2:]))
        lead = weights.shape[0] if weights.ndim == 3 else 1
        dw = dw.reshape(lead, -1, *dw.shape[-2:]).sum(axis=1)
        whole = np.zeros((lead, *weights.shape[-2:]), dw.dtype)
        whole[..., :dw.shape[-1]] = dw
        found[name] = r(whole.reshape(weights.shape))
    if shared:
        grads["e"] = found["k"] + found["v"]
    else:
        grads |= {"e": found["k"], "f": found["v"]}
    return out, lse, grads


def judge(given, backend, *, lengths=None, scale=None, **options):
    q, k, v, e, f = given if len(given) == 5 else (*given, None)
    dtype, rng = q.dtype, np.random.default_rng(5)
    if lengths is not None:
        options["kv_lengths"] = lengths
    with pyattn.use_backend(backend):
        (out, lse), saved = linformer_attention.forward(*given, scale=scale, return_lse=True,
                                                        **options)
        dout = rng.standard_normal(out.shape).astype(dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        grads = saved.backward(dout, dlse)._asdict()
    assert list(grads) == ["q", "k", "v", "e", "f"][:len(given)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact, rough = (wanted(q, k, v, e, f, dout, dlse, lengths, r, scale)
                    for r in (oracle.exact(dtype), oracle.plain(dtype)))
    for name, got, index in (("out", out, 0), ("lse", lse, 1)):
        oracle.assert_close(got, exact[index], rough[index], factor=2, name=name, dtype=got.dtype)
    for name, got in grads.items():
        oracle.assert_close(got, exact[2][name], rough[2][name], factor=3, name=name)
    return saved


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16, np.float16],
                         ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_rule(shape, sharing, backend, dtype):
    judge(draw(shape, dtype, sharing), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sharing", SHARING)
def test_shorter_sequences_take_the_first_columns(sharing, backend):
    given = draw(SHAPES[0], sharing=sharing, longest=SHAPES[0].m + 9)
    saved = judge(given, backend)
    again = [w[..., :SHAPES[0].m] for w in given[3:]]
    out, short = linformer_attention.forward(*given[:3], *again)
    grads, cut = saved.backward(out), short.backward(out)
    for name in ("e", "f")[:len(given) - 3]:
        whole = getattr(grads, name)
        assert not whole[..., SHAPES[0].m:].any()
        np.testing.assert_allclose(whole[..., :SHAPES[0].m], getattr(cut, name), atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("lengths", [(47, 20), (0, 1)])
def test_padded_keys_are_not_mixed_in(lengths, sharing, backend, dtype):
    given = draw(SHAPES[0], dtype, sharing)
    for x in given[1:3]:
        for item, end in enumerate(lengths):
            x[item, :, end:] = np.nan
    saved = judge(given, backend, lengths=np.array(lengths))
    grads = saved.backward(np.ones_like(saved.attended.out))
    for x in (grads.k, grads.v):
        for item, end in enumerate(lengths):
            assert not x[item, :, end:].any()
    for item, end in enumerate(lengths):
        if end:
            q, k, v = (x[item:item + 1] for x in given[:3])
            alone = linformer_attention(q, k[..., :end, :], v[..., :end, :], *given[3:])
            np.testing.assert_allclose(saved.attended.out[item:item + 1], alone, rtol=1e-5,
                                       atol=1e-6 if dtype == np.float32 else 1e-12)
        else:
            assert not saved.attended.out[item].any()
            assert (saved.attended.lse[item] == -np.inf).all()


def test_lengths_of_batch_axes_that_keys_do_not_have():
    """Keys shared by all items, each of which has another number of them."""
    q = draw(SHAPES[0])[0]
    _, k, v, e, f = draw(SHAPES[0])
    k, v = k[:1], v[:1]
    out, saved = linformer_attention.forward(q, k, v, e, f, kv_lengths=[30, 9])
    grads = saved.backward(out)
    parts = [linformer_attention.forward(q[i:i + 1], k, v, e, f, kv_lengths=end)
             for i, end in enumerate((30, 9))]
    np.testing.assert_allclose(out, np.concatenate([x for x, _ in parts]), atol=1e-12)
    backward = [kept.backward(x) for x, kept in parts]
    for name in ("k", "v", "e", "f"):
        np.testing.assert_allclose(getattr(grads, name), sum(getattr(g, name) for g in backward),
                                   atol=1e-12)
    lengths = np.array([[30, 9], [47, 0]])
    q, k, v = (np.stack([x, x]) for x in (q, *draw(SHAPES[0])[1:3]))
    whole = linformer_attention(q, k, v, e, f, kv_lengths=lengths)
    np.testing.assert_allclose(
        whole[1, 0], linformer_attention(q[0, 0], k[0, 0], v[0, 0], e, f), atol=1e-12)
    assert not whole[1, 1].any()


def test_padded_queries_get_nothing():
    q, *rest = draw(SHAPES[0])
    q[1, :, 10:] = np.nan
    out, saved = linformer_attention.forward(q, *rest, q_lengths=[33, 10])
    assert not out[1, :, 10:].any()
    dout = np.ones_like(out)
    dout[1, :, 10:] = np.nan
    assert all(np.isfinite(x).all() for x in saved.backward(dout))


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("lengths", [None, [4, 9]])
def test_gradients_by_differences(sharing, lengths):
    given = draw(Shape((2,), 4, 2, 5, 9, 4, 3), sharing=sharing, longest=11)
    gradcheck(linformer_attention, *given, kv_lengths=lengths)


def test_gradients_of_an_array_scale_and_with_dropout():
    given = draw(Shape((2,), 4, 2, 5, 9, 4, 3), sharing="none")
    gradcheck(linformer_attention, *given, scale=np.linspace(0.2, 1, 4), softcap=3.0)
    out, saved = linformer_attention.forward(*given, dropout=0.4, rng=0)
    assert np.array_equal(out, linformer_attention(*given, dropout=0.4,
                                                   decisions=saved.decisions))
    assert not np.array_equal(out, linformer_attention(*given))
    gradcheck(linformer_attention, *given, dropout=0.4, rng=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixing_by_the_identity_is_attention(backend):
    shape = Shape((2,), 4, 2, 33, 20, 16, 12)
    q, k, v, _, _ = draw(shape)
    one = np.eye(20)
    with pyattn.use_backend(backend):
        out, saved = linformer_attention.forward(q, k, v, one)
        want, dense = pyattn.attention.forward(q, k, v)
        np.testing.assert_allclose(out, want, atol=1e-13)
        for x, y in zip(saved.backward(out)[:3], dense.backward(want), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-12)


def test_keys_may_be_permuted_with_the_columns():
    q, k, v, e, f = draw(SHAPES[0], sharing="none")
    order = np.random.default_rng(0).permutation(k.shape[-2])
    again = linformer_attention(q, k[..., order, :], v[..., order, :], e[..., order],
                                f[..., order])
    np.testing.assert_allclose(again, linformer_attention(q, k, v, e, f), atol=1e-13)


@pytest.mark.parametrize(("first", "second"), [("cpu", "array_api"), ("array_api", "cpu")])
def test_backward_of_the_other_backend(first, second):
    given = draw(SHAPES[0])
    with pyattn.use_backend(first):
        out, saved = linformer_attention.forward(*given)
        want = saved.backward(out)
    with pyattn.use_backend(second):
        for x, y in zip(saved.backward(out), want, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-12)


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
@pytest.mark.parametrize("sharing", ["none", "key-value", "mixed"])
def test_other_array_libraries(library, sharing):
    xp = array_api_strict if library == "array_api_strict" else pytest.importorskip(library)
    given = draw(SHAPES[0], sharing=sharing, longest=60)
    out, saved = linformer_attention.forward(*given, kv_lengths=[47, 20])
    moved = [xp.asarray(x) for x in given]
    got, kept = linformer_attention.forward(*moved, kv_lengths=[47, 20])
    np.testing.assert_allclose(np.asarray(got), out, atol=1e-12)
    for x, y in zip(kept.backward(got), saved.backward(out), strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-11)


@pytest.mark.parametrize("shape", [
    Shape((2,), 2, 1, 0, 5, 4, 4), Shape((2,), 2, 1, 5, 0, 4, 4), Shape((0,), 2, 2, 3, 3, 4, 4),
    Shape((1,), 0, 0, 3, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sharing", ["none", "headwise", "key-value"])
def test_nothing_to_do(shape, backend, sharing):
    given = draw(shape, sharing=sharing, longest=5)
    with pyattn.use_backend(backend):
        out, saved = linformer_attention.forward(*given)
        assert out.shape == (*shape.batch, shape.heads, shape.n, shape.e)
        assert not out.any()
        grads = saved.backward(out)
    for x, given_x in zip(grads, given, strict=True):
        assert x.shape == given_x.shape
        assert not x.any()


def test_the_dtypes_of_what_mixes_are_its_own():
    q, k, v, e, f = draw(SHAPES[0], np.float32)
    want = linformer_attention(q, k, v, e, f)
    got, saved = linformer_attention.forward(q, k, v, e.astype(np.float64), f)
    assert got.dtype == np.float32
    grads = saved.backward(got)
    assert (grads.e.dtype, grads.f.dtype, grads.k.dtype) == (np.float64, np.float32, np.float32)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_views_are_read_in_place_and_nothing_is_written_to():
    given = draw(SHAPES[0])
    views = [np.ascontiguousarray(np.swapaxes(x, 1, 2)).swapaxes(1, 2) for x in given[:3]]
    for x in (*given, *views):
        x.flags.writeable = False
    out, saved = linformer_attention.forward(*views, *given[3:])
    np.testing.assert_allclose(out, linformer_attention(*given), atol=1e-13)
    out.flags.writeable = False
    first, second = saved.backward(out), saved.backward(out)
    assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def test_what_it_costs_grows_with_the_tokens():
    def stats(n):
        given = draw(Shape((2,), 4, 2, n, n, 16, 8))
        return linformer_attention.forward(*given)[1].stats

    found = [stats(n) for n in (1024, 2048, 4096)]
    for name in ("pairs", "tiles", "flops"):
        assert found[2][name] - found[1][name] == 2 * (found[1][name] - found[0][name])
    assert found[0]["pairs"] == 2 * 4 * 1024 * RANK
    # mixing, and attention by tiles of 64 mixtures
    assert found[0]["flops"] == 2 * RANK * 1024 * 2 * 2 * 24 + 2 * 1024 * 64 * 2 * 4 * 24
    assert found[2]["bytes"] < 4.1 * found[0]["bytes"]
    kept = linformer_attention.forward(*draw(Shape((1,), 2, 2, 2048, 2048, 8, 8)))[1]
    # the arguments, their mixtures, the output and the log-sum-exps; and no N x R
    assert kept.nbytes < 8 * (4 * 2 * 2048 * 8 + 2 * RANK * 2048 + 2 * 2 * RANK * 8 + 2 * 2048) + 99


@pytest.mark.parametrize(("error", "change", "match"), [
    (OptionError, {"causal": True}, "causal must be False"),
    (OptionError, {"causal": "top_left"}, "causal must be False"),
    (OptionError, {"mask": np.ones((33, 47), bool)}, "mask must be None"),
    (OptionError, {"mask": pyattn.masks.causal()}, "mask must be None"),
    (ShapeError, {"e": np.ones((3, 6, 47))}, r"e must be \(R, L\)"),
    (ShapeError, {"f": np.ones((2, 2, 6, 47))}, r"f must be \(R, L\)"),
    (ShapeError, {"e": np.ones((6, 46))}, "a column for each of the 47 keys"),
    (ShapeError, {"e": np.ones((0, 47))}, "e must be"),
    (ShapeError, {"f": np.ones((5, 47))}, "as many rows as e, 6"),
    (ShapeError, {"kv_lengths": [48, 2]}, r"kv_lengths must lie in 0\.\.47"),
    (ShapeError, {"kv_lengths": [1, 2, 3]}, "kv_lengths must broadcast"),
    (OptionError, {"kv_lengths": [1.5, 2.0]}, "integers"),
    (DtypeError, {"e": np.ones((6, 47), int)}, "e must be"),
    (DtypeError, {"k": np.ones((2, 2, 47, 20), np.float32)}, "share one dtype"),
    (OptionError, {"decisions": {"projection": np.ones(3)}}, "decisions may hold"),
])
def test_arguments_that_do_not_fit(error, change, match):
    named = dict(zip("qkvef", draw(SHAPES[0]), strict=True)) | change
    with pytest.raises(error, match=match):
        linformer_attention(*[named.pop(x) for x in "qkvef"], **named)
