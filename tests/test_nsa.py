"""Native sparse attention, paper mode, against its three branches spelled out densely."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from table import Shape
from test_importance import listed

import pyattn
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.layers import init_nsa_layer, nsa_layer
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
SMALL = {"block_size": 8, "stride": 4, "select_block": 16, "num_selected": 3, "num_local": 1,
         "window": 9}
SHAPES = [Shape((), 1, 1, 1, 1, 4, 4), Shape((), 2, 1, 7, 7, 4, 4),
          Shape((2,), 4, 2, 70, 70, 8, 6), Shape((1,), 6, 1, 133, 133, 16, 16),
          Shape((2,), 2, 2, 30, 75, 8, 8), Shape((1,), 2, 1, 75, 30, 8, 8)]
SEPARATE = ("k_compressed", "v_compressed", "k_window", "v_window")


def draw(s, dtype=np.float64, *, separate=False):
    rng = np.random.default_rng([s.n, s.m, s.heads])
    q, k, v = (rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e)))
    given = {"q": q, "k": k, "v": v,
             "gates": rng.uniform(0, 1, (*s.batch, s.heads, s.n, 3)).astype(dtype)}
    if separate:
        given |= {name: rng.standard_normal((k if name[0] == "k" else v).shape).astype(dtype)
                  for name in SEPARATE}
    return given


def means(m, size, stride):
    """(C, M): what each key adds to the mean of each block."""
    count = max((m - size) // stride + 1, 0)
    return np.array([[(c * stride <= j < c * stride + size) / size for j in range(m)]
                     for c in range(count)]).reshape(count, m)


def patterns(shape, lists, *, window, block_size, stride, select_block, causal=True,
             q_lengths=None, kv_lengths=None):
    """Who sees which key of which branch, pair by pair: three arrays (..., H, N, keys)."""
    count = means(shape.m, block_size, stride).shape[0]
    found = [np.zeros((*shape.batch, shape.heads, shape.n, keys), bool)
             for keys in (count, shape.m, shape.m)]
    for item in np.ndindex(shape.batch):
        nq = shape.n if q_lengths is None else np.broadcast_to(q_lengths, shape.batch)[item]
        nk = shape.m if kv_lengths is None else np.broadcast_to(kv_lengths, shape.batch)[item]
        for h in range(shape.heads):
            for i in range(nq):
                t = i if causal == "top_left" else i + nk - nq
                last = min(t, nk - 1) if causal else nk - 1
                for c in range(count):
                    found[0][(*item, h, i, c)] = c * stride + block_size - 1 <= last
                chosen = lists[(*item, h * shape.groups // shape.heads, i)].tolist()
                for j in range(last + 1):
                    found[1][(*item, h, i, j)] = j // select_block in chosen
                    found[2][(*item, h, i, j)] = abs(t - j) <= window
    return found


def wanted(given, shape, lists, dout, r, combine="gates", scale=None, **options):
    """Output and gradients with the lists frozen; keys and values are compressed by their mean."""
    mean = means(shape.m, options["block_size"], options["stride"])
    allowed = patterns(shape, lists, **options)
    scale = np.full(shape.heads, shape.d ** -0.5 if scale is None else scale)
    own = {name: given.get(name, given[name[0]]) for name in SEPARATE}
    keys = [r(mean @ r(own["k_compressed"])), given["k"], own["k_window"]]
    values = [r(mean @ r(own["v_compressed"])), given["v"], own["v_window"]]
    gates = r(np.broadcast_to(given["gates"], (*given["q"].shape[:-1], 3)))
    grads = {name: np.zeros(x.shape, r.work) for name, x in given.items()}
    pulls = []
    if combine == "gates":
        out = 0
        for c in range(3):
            dense = oracle.Dense(given["q"], keys[c], values[c], scale, allowed[c])
            part = oracle.forward(dense, r)[0]
            out = r(out + r(gates[..., c:c + 1] * part))
            pulls.append((r(dout) * part).sum(-1))
            branch = oracle.backward(dense, r(gates[..., c:c + 1] * r(dout)), None, r)
            add(grads, branch, c, mean, r)
        dgates = np.stack(pulls, axis=-1)
    else:
        # one softmax over all keys, where a gate multiplies the exponentials of its branch
        sizes = [x.shape[-2] for x in keys]
        gate = np.concatenate([np.broadcast_to(gates[..., c:c + 1], (*gates.shape[:-1], size))
                               for c, size in enumerate(sizes)], axis=-1)
        dense = oracle.Dense(given["q"], np.concatenate(keys, -2), np.concatenate(values, -2),
                             scale, np.concatenate(allowed, -1), gate=gate)
        out = oracle.forward(dense, r)[0]
        found = oracle.backward(dense, dout, None, r)
        cuts = np.cumsum(sizes)[:-1]
        dgates = np.stack([x.sum(-1) for x in np.split(found["gate"], cuts, -1)], -1)
        for c, (dk, dv) in enumerate(zip(*(np.split(found[name], cuts, -2) for name in "kv"),
                                         strict=True)):
            add(grads, {"q": found["q"] if c == 0 else 0, "k": dk, "v": dv}, c, mean, r)
    grads["gates"] = oracle.sum_to(dgates, given["gates"].shape)
    return out, grads


def add(grads, branch, c, mean, r):
    """Add a branch's gradients to where its keys and values come from."""
    grads["q"] += branch["q"]
    for name in "kv":
        grad = r(mean.T @ branch[name]) if c == 0 else branch[name]
        own = f"{name}_{('compressed', 'selected', 'window')[c]}"
        grads[own if own in grads else name] += grad


def lists_of(given, shape, **options):
    """Select by loops: (..., G, N, count)."""
    mean = means(shape.m, options["block_size"], options["stride"])
    keys = mean @ given.get("k_compressed", given["k"]).astype(np.float64)
    empty = np.zeros((*shape.batch, shape.groups, shape.n, 0), np.int32)
    allowed = patterns(shape, empty, **{name: options[name] for name in options if name not in (
        "num_selected", "num_initial", "num_local", "scale", "combine")})[0]
    scale = np.full(shape.heads, options.get("scale") or shape.d ** -0.5)
    lse = oracle.forward(oracle.Dense(given["q"], keys, keys, scale, allowed),
                         oracle.exact(np.float32))[1]
    options = {name: value for name, value in options.items() if name not in ("window", "combine")}
    return listed(given["q"], keys, lse, tokens=shape.m, **options)


def judge(shape, backend, dtype=np.float64, separate=False, frozen=None, **options):
    given = draw(shape, dtype, separate=separate)
    options = {**SMALL, **options}
    lists, gap = lists_of(given, shape, **options)
    plain = {name: value for name, value in options.items()
             if name not in ("num_selected", "num_initial", "num_local")}
    with pyattn.use_backend(backend):
        # rounding may decide near ties otherwise
        live = gap > 1e-9 and dtype == np.float64
        out, saved = pyattn.nsa_attention.forward(
            **given, **options, decisions=None if live else {"blocks": lists})
        dout = np.random.default_rng(5).standard_normal(out.shape).astype(dtype)
        grads = saved.backward(dout)
    np.testing.assert_array_equal(saved.decisions["blocks"], lists)
    exact, rough = (wanted(given, shape, lists, dout, r, **plain)
                    for r in (oracle.exact(dtype), oracle.plain(dtype)))
    assert grads._fields == tuple(given)
    if dtype == np.float64:
        for name, got, want in [("out", out, exact[0]),
                                *((name, getattr(grads, name), exact[1][name]) for name in given)]:
            np.testing.assert_allclose(got, want.astype("f8"), rtol=0, atol=1e-10, err_msg=name)
        return
    oracle.assert_close(out, exact[0], rough[0], factor=2, name="out", dtype=dtype)
    for name in given:
        oracle.assert_close(getattr(grads, name), exact[1][name], rough[1][name], factor=3,
                            name=f"d{name}", dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_against_the_rule(separate, shape, backend):
    judge(shape, backend, separate=separate)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [
    {"causal": False, "num_local": 1}, {"causal": False, "num_local": 2, "num_selected": 5},
    {"causal": "top_left"}, {"scale": 0.7}, {"combine": "single_softmax"},
    {"combine": "single_softmax", "causal": False}, {"block_size": 6, "stride": 5},
    {"block_size": 16, "stride": 16}, {"stride": 11}, {"window": 0}, {"num_initial": 0},
], ids=str)
def test_options(options, backend):
    judge(Shape((2,), 4, 2, 70, 70, 8, 6), backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("combine", ["gates", "single_softmax"])
@pytest.mark.parametrize("lengths", [
    {"q_lengths": [70, 33], "kv_lengths": [70, 33]}, {"kv_lengths": [70, 5]},
    {"q_lengths": [20, 70], "kv_lengths": [70, 70]}, {"q_lengths": [0, 9], "kv_lengths": [9, 0]},
    {"q_lengths": [70, 33], "kv_lengths": [70, 33], "causal": False}], ids=str)
def test_padding(lengths, combine, backend):
    judge(Shape((2,), 4, 2, 70, 70, 8, 6), backend, combine=combine, **lengths)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [{"kv_lengths": 33}, {"q_lengths": 20, "kv_lengths": 33}],
                         ids=str)
def test_one_length_without_leading_axes(lengths, backend):
    judge(Shape((), 4, 2, 70, 70, 8, 6), backend, **lengths)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_dtypes(backend, dtype):
    judge(Shape((2,), 4, 2, 70, 70, 16, 16), backend, dtype)


@pytest.mark.parametrize("shared", [1, 2, 3, 8, 16])
def test_any_group_size(shared):
    judge(Shape((1,), shared, 1, 70, 70, 8, 8), "cpu")
    judge(Shape((), 2 * shared, 2, 40, 40, 8, 8), "cpu")


WEIGHTS = {
    "mean": ("mean", {"pe": (8, 4)}),
    "mlp": ("mlp", {"pe": (8, 4), "w1": (32, 6), "b1": (6,), "w2": (6, 4), "b2": (4,)}),
    "mlp of each head": ("mlp", {"w1": (2, 32, 6), "w2": (2, 6, 4)}),
    "conv": ("conv", {"kernel": (8, 4), "pe": (8, 4)}),
    "conv of matrices": ("conv", {"kernel": (1, 8, 4, 4)}),
}


@pytest.mark.parametrize("combine", ["gates", "single_softmax"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_differences(case, combine):
    kind, shapes = WEIGHTS[case]
    given = draw(Shape((2,), 4, 2, 40, 40, 4, 4), separate=case == "mlp")
    rng = np.random.default_rng(0)
    weights = {f"{side}_weights": {name: rng.standard_normal(shape) / 2
                                   for name, shape in shapes.items()} for side in "kv"}
    result = gradcheck(pyattn.nsa_attention, **given, **weights, **SMALL, compression=kind,
                       combine=combine, activation="silu", n_projections=1)
    checked = {a.name for a in result.arguments}
    assert checked == {*given, *(f"{side}_weights.{name}" for side in "kv" for name in shapes)}


def only(branch, shape):
    gates = np.zeros((*shape[:-1], 3))
    gates[..., branch] = 1
    return gates


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("branch", "options"), [
    (0, {"block_size": 1, "stride": 1}), (1, {"select_block": 16, "num_selected": 7}),
    (2, {"window": 97})], ids=["each token", "all blocks", "wide window"])
def test_one_branch_that_sees_all_is_dense(branch, options, backend):
    given = draw(Shape((2,), 4, 2, 97, 97, 8, 8))
    given["gates"] = only(branch, given["q"].shape)
    with pyattn.use_backend(backend):
        out, saved = pyattn.nsa_attention.forward(**given, **{**SMALL, **options})
        want, dense = pyattn.attention.forward(*(given[x] for x in "qkv"), causal=True)
        grads, expected = saved.backward(out), dense.backward(want)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-13)
    for name in "qkv":
        np.testing.assert_allclose(getattr(grads, name), getattr(expected, name), rtol=0,
                                   atol=1e-12)
    # branches that are shut are computed all the same: their gates can open
    assert (np.abs(grads.gates).max(axis=(0, 1, 2)) > 0.01).all()


def test_heads_of_a_group_share_a_list():
    shape = Shape((2,), 6, 2, 70, 70, 8, 8)
    _, saved = pyattn.nsa_attention.forward(**draw(shape), **SMALL)
    blocks = saved.decisions["blocks"]
    assert blocks.shape == (2, 2, 70, 3)
    assert (blocks[:, 0] != blocks[:, 1]).any()
    # the first block, the query's own, and at most one more
    assert (blocks[..., 0] == 0).all()
    assert (blocks.max(-1) == np.arange(70) // 16).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("combine", ["gates", "single_softmax"])
def test_the_future_changes_nothing(backend, combine):
    shape = Shape((1,), 4, 2, 100, 100, 8, 8)
    given = draw(shape, separate=True)
    with pyattn.use_backend(backend):
        before, saved = pyattn.nsa_attention.forward(**given, **SMALL, combine=combine)
        for t in (5, 31, 64, 90):
            changed = {name: x.copy() for name, x in given.items()}
            for x in changed.values():
                x[..., t:, :] = np.random.default_rng(t).uniform(0, 1, x[..., t:, :].shape)
            after = pyattn.nsa_attention(**changed, **SMALL, combine=combine)
            np.testing.assert_array_equal(after[..., :t, :], before[..., :t, :])
            dout = np.zeros_like(before)
            dout[..., :t, :] = 1
            for name, grad in saved.backward(dout)._asdict().items():
                assert (grad[..., t:, :] == 0).all(), name


def test_of_the_compressed_branch_nothing_else_learns_the_selection():
    """What is selected is a constant: an untouched branch has no gradient through the lists."""
    given = draw(Shape((), 2, 1, 60, 60, 4, 4), separate=True)
    given["gates"] = only(1, given["q"].shape)
    _, saved = pyattn.nsa_attention.forward(**given, **SMALL)
    grads = saved.backward(np.ones_like(given["v"].repeat(2, 0)))
    for name in SEPARATE:
        assert (getattr(grads, name) == 0).all()


def test_frozen_lists_are_kept():
    given = draw(Shape((), 2, 1, 60, 60, 4, 4))
    out, saved = pyattn.nsa_attention.forward(**given, **SMALL)
    decisions = {"blocks": saved.decisions["blocks"][..., ::-1]}
    again, kept = pyattn.nsa_attention.forward(**given, **SMALL, decisions=decisions)
    np.testing.assert_array_equal(again, out)
    np.testing.assert_array_equal(kept.decisions["blocks"], decisions["blocks"])
    for first, second in zip(saved.backward(out), kept.backward(out), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("combine", ["gates", "single_softmax"])
def test_what_padding_holds_is_never_looked_at(backend, combine):
    given = draw(Shape((2,), 2, 1, 60, 60, 4, 4))
    lengths = {"q_lengths": [60, 21], "kv_lengths": [60, 21]}
    results = []
    with pyattn.use_backend(backend):
        for poison in (0.0, np.nan, np.inf):
            changed = {name: x.copy() for name, x in given.items()}
            for x in changed.values():
                x[1, :, 21:] = poison
            out, saved = pyattn.nsa_attention.forward(**changed, **SMALL, **lengths,
                                                      combine=combine)
            dout = np.ones_like(out)
            dout[1, :, 21:] = poison
            results.append((out, *saved.backward(dout)))
    assert (results[0][0][1, :, 21:] == 0).all()
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            # tiles that hold what is not finite are summed in another order
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_gates_broadcast():
    given = draw(Shape((2,), 4, 2, 40, 40, 4, 4))
    for shape in ((3,), (4, 1, 3), (1, 1, 40, 1), (1,)):
        few = np.random.default_rng(0).uniform(0, 1, shape)
        wide = np.broadcast_to(few, given["gates"].shape)
        out, saved = pyattn.nsa_attention.forward(**{**given, "gates": few}, **SMALL)
        want, expected = pyattn.nsa_attention.forward(**{**given, "gates": wide}, **SMALL)
        np.testing.assert_array_equal(out, want)
        grad, wide_grad = saved.backward(out).gates, expected.backward(want).gates
        assert grad.shape == shape
        np.testing.assert_allclose(grad, oracle.sum_to(wide_grad, shape), rtol=1e-12)


def test_shut_gates_of_a_single_softmax_can_open():
    given = draw(Shape((), 2, 1, 60, 60, 4, 4))
    given["gates"][..., 0] = 0
    given["gates"][:, 30:] = 0
    out, saved = pyattn.nsa_attention.forward(**given, **SMALL, combine="single_softmax")
    assert (out[:, 30:] == 0).all()
    grads = saved.backward(np.ones_like(out))
    assert all(np.isfinite(x).all() for x in grads)
    assert np.abs(grads.gates[:, 10:30, 0]).max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [
    Shape((0,), 2, 1, 5, 5, 4, 4), Shape((2,), 2, 1, 0, 5, 4, 4), Shape((2,), 2, 1, 5, 0, 4, 4),
    Shape((2,), 2, 1, 5, 5, 4, 4), Shape((1,), 0, 0, 5, 5, 4, 4)], ids=str)
def test_empty_and_tiny(shape, backend):
    given = draw(shape)
    with pyattn.use_backend(backend):
        out, saved = pyattn.nsa_attention.forward(**given)
        grads = saved.backward(out)
    assert out.shape == (*shape.batch, shape.heads, shape.n, shape.e)
    assert all(x.shape == given[name].shape for name, x in grads._asdict().items())


def test_counters():
    """Pairs are what is read, so with sizes fixed all but the compressed branch is linear."""
    pairs = {}
    for n in (512, 1024):
        given = draw(Shape((), 2, 1, n, n, 4, 4))
        _, saved = pyattn.nsa_attention.forward(**given, **SMALL)
        counted = saved.branch_stats
        assert saved.stats["pairs"] == sum(x["pairs"] for x in counted.values())
        pairs[n] = {name: x["pairs"] for name, x in counted.items()}
        assert pairs[n]["window"] == 2 * (10 * n - 45)
        assert pairs[n]["selected"] <= 2 * n * 3 * 16
        complete = sum(max((t - 8 + 1) // 4 + 1, 0) if t >= 7 else 0 for t in range(n))
        assert pairs[n]["compressed"] == 2 * complete
    assert pairs[1024]["selected"] < 2.1 * pairs[512]["selected"]


def test_threads_change_nothing():
    given = draw(Shape((2,), 4, 2, 300, 300, 16, 16), np.float32)
    usual, found = pyattn.get_num_threads(), []
    for threads in (1, 3):
        pyattn.set_num_threads(threads)
        try:
            out, saved = pyattn.nsa_attention.forward(**given, **SMALL)
            found.append((out, *saved.backward(out)))
        finally:
            pyattn.set_num_threads(usual)
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


def test_inputs_stay_as_they_are():
    given = draw(Shape((1,), 2, 1, 40, 40, 4, 4))
    for x in given.values():
        x.flags.writeable = False
    out, saved = pyattn.nsa_attention.forward(**given, **SMALL)
    out.flags.writeable = False
    for first, second in zip(saved.backward(out), saved.backward(out), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("error", "change"), [
    (OptionError, {"mode": "paper2"}), (OptionError, {"combine": "sum"}),
    (OptionError, {"num_selected": 1}), (OptionError, {"window": -1}),
    (OptionError, {"window": None}), (OptionError, {"stride": 0}),
    (OptionError, {"select_block": 0}), (OptionError, {"compression": "max"}),
    (OptionError, {"compression": "mlp"}), (OptionError, {"causal": 1}),
    (OptionError, {"k_window": np.ones((1, 20, 4))}),
    (OptionError, {"k_weights": {"w1": np.ones((32, 4))}}),
    (ShapeError, {"k_weights": {"pe": np.ones((7, 4))}}),
    (ShapeError, {"compression": "conv", "k_weights": {"kernel": np.ones((1, 8, 4, 5))},
                  "v_weights": {"kernel": np.ones((8, 4))}}),
    (ShapeError, {"gates": np.ones((2, 20, 2))}), (ShapeError, {"v": np.ones((1, 19, 4))}),
    (DtypeError, {"k": np.ones((1, 20, 4), "f4")}), (DtypeError, {"gates": np.ones(3, int)}),
    (OptionError, {"decisions": {"blocks": np.full((1, 20, 2), 9)}}),
    (ShapeError, {"decisions": {"blocks": np.zeros((3, 20, 2), int)}}),
], ids=str)
def test_errors(error, change):
    given = draw(Shape((), 2, 1, 20, 20, 4, 4))
    with pytest.raises(error, match=r"must|needs"):
        pyattn.nsa_attention(**{**given, **SMALL, **change})


CONTENT = {
    "kmeans": {"mode": "kmeans", "segment": 16, "num_clusters": 3, "num_selected": 9,
               "num_top_clusters": 2, "window": 5},
    "medoids": {"mode": "kmeans", "segment": 16, "num_clusters": 3, "num_selected": 9,
                "representative": "medoid", "metric": "cosine", "window": 5},
    "tree": {"mode": "kmeans", "segment": 4, "num_clusters": 2, "num_selected": 9, "tree": True,
             "window": 5},
    "no duplicates": {"mode": "kmeans", "segment": 16, "num_selected": 9, "threshold": -0.5,
                      "duplicate_threshold": 0.9, "window": 5},
    "lsh": {"mode": "lsh", "segment": 16, "num_buckets": 4, "num_rounds": 2, "rng": 0,
            "num_selected": 9, "window": 5},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CONTENT)
def test_other_modes_mix_their_branches(case, backend):
    """Gates that open one branch at a time add up to any mixture; so do the gradients."""
    given = draw(Shape((2,), 4, 2, 70, 70, 8, 6), separate=True)
    with pyattn.use_backend(backend):
        out, saved = pyattn.nsa_attention.forward(**given, **CONTENT[case])
        frozen = {name: x for name, x in CONTENT[case].items() if name != "rng"}
        total = 0
        for branch in range(3):
            gates = only(branch, given["q"].shape)
            part, kept = pyattn.nsa_attention.forward(**{**given, "gates": gates}, **frozen,
                                                      decisions=saved.decisions)
            assert kept.decisions.keys() == saved.decisions.keys()
            total = total + given["gates"][..., branch:branch + 1] * part
        near = pyattn.attention(given["q"], given["k_window"], given["v_window"], window=5,
                                causal=True)
    np.testing.assert_allclose(out, total, rtol=0, atol=1e-13)
    np.testing.assert_allclose(part, near, rtol=0, atol=1e-13)


@pytest.mark.parametrize("combine", ["gates", "single_softmax"])
@pytest.mark.parametrize("case", CONTENT)
def test_differences_of_other_modes(case, combine):
    given = draw(Shape((2,), 4, 2, 40, 40, 4, 4), separate=case == "kmeans")
    options = {**CONTENT[case], "combine": combine}
    _, saved = pyattn.nsa_attention.forward(**given, **options)
    options.pop("rng", None)
    result = gradcheck(pyattn.nsa_attention, **given, **options, decisions=saved.decisions,
                       n_projections=1)
    assert {a.name for a in result.arguments} == set(given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("combine", ["gates", "single_softmax"])
@pytest.mark.parametrize("case", CONTENT)
def test_in_other_modes_too_the_future_changes_nothing(case, combine, backend):
    given = draw(Shape((1,), 4, 2, 100, 100, 8, 8))
    options = {**CONTENT[case], "combine": combine}
    with pyattn.use_backend(backend):
        before = pyattn.nsa_attention(**given, **options)
        for t in (5, 31, 64, 90):
            changed = {name: x.copy() for name, x in given.items()}
            for x in changed.values():
                x[..., t:, :] = np.random.default_rng(t).uniform(0, 1, x[..., t:, :].shape)
            after = pyattn.nsa_attention(**changed, **options)
            np.testing.assert_allclose(after[..., :t, :], before[..., :t, :], rtol=0, atol=1e-13)


def test_article_mode_with_one_softmax_over_clusters_of_one():
    """Each key a cluster of its own: the compressed branch is dense but for the open segment."""
    given = draw(Shape((2,), 2, 1, 40, 40, 8, 8))
    given["gates"] = only(0, given["q"].shape)
    out = pyattn.nsa_attention(**given, mode="kmeans", segment=1, num_clusters=1,
                               combine="single_softmax")
    want = pyattn.attention(*(given[x] for x in "qkv"), causal=True)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("change", [
    {"mode": "kmeans", "block_size": 16}, {"mode": "lsh", "metric": "cosine"},
    {"segment": 16}, {"tree": True}, {"rng": 0}, {"mode": "kmeans", "rotations": np.ones(3)},
    {"mode": "kmeans", "k_weights": {"pe": np.ones((32, 4))}}], ids=str)
def test_options_of_another_mode_are_refused(change):
    given = draw(Shape((), 2, 1, 20, 20, 4, 4))
    with pytest.raises(OptionError, match="must be left out: it is of mode"):
        pyattn.nsa_attention(**given, **change)


def layer_of(x, params, **options):
    """The layer written with plain products around the attention."""
    heads, groups = options["num_heads"], options["num_kv_heads"]

    def split(y, parts):
        return np.swapaxes(y.reshape(*y.shape[:-1], parts, -1), -2, -3)

    given = {"q": split(x @ params["w_q"], heads)}
    for name, pair in {"w_kv": "kv", "w_kv_compressed": ("k_compressed", "v_compressed"),
                       "w_kv_window": ("k_window", "v_window")}.items():
        if name in params:
            halves = np.split(x @ params[name], 2, axis=-1)
            given |= {key: split(half, groups) for key, half in zip(pair, halves, strict=True)}
    gates = split(1 / (1 + np.exp(-(x @ params["w_gate"] + params["b_gate"]))), heads)
    weights = {f"{side}_weights": {name[2:]: w for name, w in params.items()
                                   if name.startswith(f"{side}_")} for side in "kv"}
    rest = {name: value for name, value in options.items() if "num_" not in name or
            name in ("num_selected", "num_local")}
    out = pyattn.nsa_attention(**given, gates=gates, **weights, **rest)
    return np.swapaxes(out, -2, -3).reshape(*x.shape[:-1], -1) @ params["w_o"]


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("compression", ["mean", "mlp", "conv"])
def test_layer(compression, separate):
    rng = np.random.default_rng(0)
    params = init_nsa_layer(rng, 12, num_heads=4, num_kv_heads=2, head_width=4, separate=separate,
                            block_size=8, compression=compression, dtype=np.float64)
    params |= {name: rng.standard_normal(w.shape) / 2 for name, w in params.items()
               if name in ("w_gate", "b_gate", "k_pe", "v_pe")}
    x = rng.standard_normal((2, 40, 12))
    options = {**SMALL, "num_heads": 4, "num_kv_heads": 2, "compression": compression,
               "activation": "silu"}
    y, saved = nsa_layer.forward(x, params, **options)
    np.testing.assert_allclose(y, layer_of(x, params, **options), rtol=0, atol=1e-12)
    assert saved.decisions["blocks"].shape == (2, 2, 40, 3)
    result = gradcheck(nsa_layer, x, params, **options, n_projections=1)
    assert {a.name for a in result.arguments} == {"x", *(f"params.{name}" for name in params)}


def test_layer_with_rotary_positions():
    params = init_nsa_layer(0, 16, num_heads=4, num_kv_heads=1, dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((40, 16))
    options = {**SMALL, "num_heads": 4, "num_kv_heads": 1, "rotary_base": 10000.0}
    gradcheck(nsa_layer, x, params, **options, n_projections=1)
    far, _ = nsa_layer.forward(x, params, **options, positions=np.arange(40) + 7)
    np.testing.assert_allclose(far, nsa_layer(x, params, **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("error", "change"), [
    (OptionError, {"num_heads": 3}), (OptionError, {"positions": np.arange(9)}),
    (OptionError, {"params": {"w_o": None}}), (OptionError, {"params": {"w_k": np.ones((8, 8))}}),
    (ShapeError, {"params": {"w_kv": np.ones((8, 9))}}),
    (ShapeError, {"params": {"w_o": np.ones((9, 8))}}),
    (ShapeError, {"params": {"w_kv_window": np.ones((7, 8))}}),
    (OptionError, {"compression": "mlp"}),
], ids=str)
def test_layer_errors(error, change):
    params = init_nsa_layer(0, 8, num_heads=2, num_kv_heads=2, separate=False)
    changed = {name: w for name, w in {**params, **change.get("params", {})}.items()
               if w is not None}
    options = {name: value for name, value in change.items() if name != "params"}
    with pytest.raises(error):
        nsa_layer(np.ones((9, 8), "f4"), changed, **{"num_heads": 2, "num_kv_heads": 2, **options})


@pytest.mark.parametrize("combine", ["gates", "single_softmax"])
def test_other_libraries(combine):
    given = draw(Shape((2,), 4, 2, 40, 40, 8, 6))
    options = {**SMALL, "combine": combine, "kv_lengths": [40, 23], "q_lengths": [40, 23]}
    want, saved = pyattn.nsa_attention.forward(**given, **options)
    wanted = saved.backward(want)
    held = {name: array_api_strict.asarray(x) for name, x in given.items()}
    out, saved = pyattn.nsa_attention.forward(**held, **options)
    assert type(saved.decisions["blocks"]) is np.ndarray
    np.testing.assert_allclose(np.asarray(out), want, rtol=0, atol=1e-12)
    for name, grad in saved.backward(out)._asdict().items():
        np.testing.assert_allclose(np.asarray(grad), getattr(wanted, name), rtol=0, atol=1e-12)
