"""Branches of native sparse attention by content, against dense formulas over what they name."""

from __future__ import annotations

import itertools

import array_api_strict
import numpy as np
import oracle
import pytest

import pyattn
from pyattn.checks import OptionError, ShapeError
from pyattn.testing import gradcheck
from pyattn.variants import nsa_clusters
from pyattn.variants.nsa_clusters import compressed, group, selected_tokens, spans

BACKENDS = ["cpu", "array_api"]


def draw(n=70, m=70, heads=4, groups=2, d=8, e=6, batch=(2,), dtype=np.float64, seed=0):
    rng = np.random.default_rng([seed, n, m])
    return tuple(rng.standard_normal((*batch, h, x, w)).astype(dtype) for h, x, w in (
        (heads, n, d), (groups, m, d), (groups, m, e)))


def summary(q, k, v, clusters, medoids, seen, counted):
    """Dense attention to what stands for groups, and the shares that keys have in it.

    ``clusters`` (B, G, levels, M) are numbers over all levels, ``seen(b, i, c)`` tells who sees
    group c, and `counted` how many groups there are.
    """
    batch, groups, _, m = clusters.shape
    heads, n = q.shape[1:3]
    share, weight = np.zeros((batch, groups, counted, m)), np.zeros((batch, groups, counted))
    for b, g, c in np.ndindex(batch, groups, counted):
        members = np.flatnonzero((clusters[b, g] == c).any(0))
        weight[b, g, c] = members.size
        if members.size and medoids is None:
            share[b, g, c, members] = 1 / members.size
        elif members.size:
            share[b, g, c, medoids[b, g, c]] = 1
    allowed = np.zeros((batch, heads, n, counted), bool)
    for b, h, i, c in np.ndindex(allowed.shape):
        allowed[b, h, i, c] = weight[b, h * groups // heads, c] > 0 and seen(b, i, c)
    clean = [np.nan_to_num(x.astype("f8")) for x in (k, v)]
    dense = oracle.Dense(q, share @ clean[0], share @ clean[1],
                         np.full(heads, q.shape[-1] ** -0.5), allowed,
                         bias=np.log(np.maximum(np.repeat(weight, heads // groups, 1), 1))[
                             :, :, None])
    return dense, share


def judge(found, saved, dense, share, arrays):
    rng, dtype = np.random.default_rng(7), arrays[0].dtype
    out, lse = found
    dout, dlse = rng.standard_normal(out.shape).astype(dtype), rng.standard_normal(lse.shape)
    dlse = dlse.astype(lse.dtype)
    grads, judged = saved.backward(dout, dlse), []
    for arithmetic in (oracle.exact(dtype), oracle.plain(dtype)):
        want = dict(zip(("out", "lse"), oracle.forward(dense, arithmetic), strict=True))
        want |= oracle.backward(dense, dout, dlse, arithmetic)
        if share is not None:
            want |= {name: np.swapaxes(share, -1, -2) @ want[name] for name in "kv"}
        judged.append(want)
    for name, factor, got in (("out", 2, out), ("lse", 2, lse), ("q", 3, grads.q),
                              ("k", 3, grads.k), ("v", 3, grads.v)):
        oracle.assert_close(got, judged[0][name], judged[1][name], factor=factor, name=name,
                            dtype=got.dtype)
    assert grads._fields == ("q", "k", "v")


def seen_flat(segment, each, offset=0):
    return lambda b, i, c: (c // each + 1) * segment <= i + offset + 1


def seen_tree(segment, each, nodes):
    """Nodes over all levels; those that are over, in one that is not."""
    starts = np.cumsum([0, *nodes])

    def seen(b, i, c):
        level = int(np.searchsorted(starts, c, "right")) - 1
        number, span = (c - starts[level]) // each, segment * 8**level
        if (number + 1) * span > i + 1:
            return False
        above = number // 8
        exists = level + 1 < len(nodes) and above < nodes[level + 1] // each
        return not exists or (above + 1) * span * 8 > i + 1

    return seen


def numbered(clusters, nodes):
    starts = np.cumsum([0, *nodes])[:-1]
    return np.where(clusters >= 0, clusters + starts[:, None], -1)


CASES = {
    "segments": {"segment": 8, "num_clusters": 2},
    "angles": {"segment": 16, "num_clusters": 3, "metric": "cosine"},
    "medoids": {"segment": 8, "num_clusters": 2, "representative": "medoid"},
    "tree": {"segment": 2, "num_clusters": 1, "tree": True},
    "tree of medoids": {"segment": 2, "num_clusters": 2, "tree": True,
                        "representative": "medoid"},
    "all": {"causal": False, "num_clusters": 9},
    "hashes": {"mode": "lsh", "segment": 16, "num_clusters": 4, "num_buckets": 8, "rng": 0},
    "all hashes": {"mode": "lsh", "causal": False, "num_clusters": 8, "num_buckets": (2, 8),
                   "rng": 0},
}


def rule(options, nodes):
    if options.get("causal") is False:
        return lambda *_: True
    each = options["num_clusters"]
    if options.get("tree"):
        return seen_tree(options["segment"], each, nodes)
    return seen_flat(options["segment"], each)


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_groups_against_dense_formulas(case, backend, dtype):
    arrays, options = draw(dtype=dtype), CASES[case]
    with pyattn.use_backend(backend):
        found, saved = compressed(*arrays, **options)
        groups, given = saved.grouping.groups, saved.decisions
        clusters = (given["clusters"] if "clusters" in given
                    else np.stack(groups.assignments, axis=-2))
        dense, share = summary(*arrays, numbered(clusters, groups.nodes), given.get("medoids"),
                               rule(options, groups.nodes), sum(groups.nodes))
        judge(found, saved, dense, share, arrays)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tree_of_all_keys_shows_one_level(backend):
    arrays = draw(n=20, m=600, batch=(1,))
    with pyattn.use_backend(backend):
        found, saved = compressed(*arrays, causal=False, tree=True, num_clusters=200)
        clusters = saved.decisions["clusters"]
        groups = saved.grouping.groups
        assert groups.nodes == (200, 64, 8)
        dense, share = summary(*arrays, clusters[:, :, 1:2], None, lambda *_: True, 64)
        judge(found, saved, dense, share, arrays)


def listed(q, k, v, indices):
    batch, heads, n = q.shape[:3]
    groups, m = k.shape[1:3]
    allowed = np.zeros((batch, heads, n, m), bool)
    for b, h, i in np.ndindex(batch, heads, n):
        own = indices[b, h * groups // heads, i]
        allowed[b, h, i, own[own >= 0]] = True
    return oracle.Dense(q, np.nan_to_num(k), np.nan_to_num(v),
                        np.full(heads, q.shape[-1] ** -0.5), allowed)


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [
    {"segment": 8, "num_clusters": 2}, {"segment": 2, "num_clusters": 1, "tree": True},
    {"causal": False, "num_clusters": 9, "threshold": 0.1}, {"mode": "lsh", "num_buckets": 4},
    {"segment": 4, "num_clusters": 1, "duplicate_threshold": 0.3}], ids=str)
def test_lists_against_dense_formulas(case, backend, dtype):
    arrays = draw(dtype=dtype)
    options = {"num_selected": 6, "rng": 0} | case
    if options.get("mode") != "lsh":
        options["num_top_clusters"] = 4
    with pyattn.use_backend(backend):
        found, saved = selected_tokens(*arrays, **options)
        indices = saved.decisions["indices"]
        judge(found, saved, listed(*arrays, indices), None, arrays)
    assert indices.shape == (2, 2, 70, 6)
    last = 69 if case.get("causal") is False else np.arange(70)[:, None]
    assert (indices <= last).all()
    assert (indices >= 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("branch", ["compressed", "selected_tokens"])
@pytest.mark.parametrize("lengths", [(70, 70), (20, 70), (70, 20)], ids=str)
@pytest.mark.parametrize("causal", [True, "top_left"])
def test_other_lengths_and_padding(causal, lengths, branch, backend):
    n, m = lengths
    q, k, v = draw(n, m)
    q_lengths, kv_lengths = np.array([n, n // 2]), np.array([m, m // 2 + 3])
    q[1, :, n // 2:] = np.nan
    k[1, :, m // 2 + 3:] = v[1, :, m // 2 + 3:] = np.nan
    options = {"segment": 4, "num_clusters": 2, "causal": causal, "q_lengths": q_lengths,
               "kv_lengths": kv_lengths}
    with pyattn.use_backend(backend):
        found, saved = getattr(nsa_clusters, branch)(q, k, v, **options)
        grads = saved.backward(found[0], np.ones_like(found[1]))
        for b in range(2):
            own_q, own_k = q[b, :, :q_lengths[b]], k[b, :, :kv_lengths[b]]
            alone, other = getattr(nsa_clusters, branch)(
                own_q, own_k, v[b, :, :kv_lengths[b]], segment=4, num_clusters=2, causal=causal)
            np.testing.assert_allclose(found[0][b, :, :q_lengths[b]], alone[0], atol=1e-12)
            assert not found[0][b, :, q_lengths[b]:].any()
            want = other.backward(alone[0], np.ones_like(alone[1]))
            np.testing.assert_allclose(grads.q[b, :, :q_lengths[b]], want.q, atol=1e-12)
            for name in "kv":
                got = getattr(grads, name)[b]
                np.testing.assert_allclose(got[:, :kv_lengths[b]], getattr(want, name), atol=1e-12)
                assert not got[:, kv_lengths[b]:].any()


class Operation:
    """A branch as an operation for `gradcheck`."""

    def __init__(self, branch):
        self.branch = branch

    def forward(self, q, k, v, *, decisions=None, **options):
        return self.branch(q, k, v, decisions=decisions, **options)

    def __call__(self, q, k, v, **options):
        return self.forward(q, k, v, **options)[0]


@pytest.mark.parametrize("options", [
    {"segment": 4, "num_clusters": 2}, {"segment": 1, "tree": True, "num_clusters": 1},
    {"segment": 4, "num_clusters": 2, "representative": "medoid"},
    {"mode": "lsh", "num_buckets": 2, "segment": 3, "rng": 0},
    {"causal": False, "num_clusters": 3}], ids=str)
@pytest.mark.parametrize("branch", [compressed, selected_tokens])
def test_gradients_are_derivatives(branch, options):
    arrays = draw(n=13, m=13, heads=2, groups=1, d=4, e=3, batch=(2,))
    if branch is selected_tokens:
        options = options | {"num_selected": 3}
    gradcheck(Operation(branch), *arrays, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tree", [False, True])
def test_segments_of_one_token_are_dense(tree, backend):
    arrays = draw()
    dense, want = pyattn.attention.forward(*arrays, causal=True)
    with pyattn.use_backend(backend):
        (out, _), saved = compressed(*arrays, segment=1)
        (chosen, _), lists = selected_tokens(*arrays, segment=1, num_selected=70, tree=tree,
                                             num_top_clusters=70)
        for got, by in ((out, saved), (chosen, lists)):
            np.testing.assert_allclose(got, dense, rtol=0, atol=1e-12)
            for one, other in zip(by.backward(dense), want.backward(dense), strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_clusters_as_keys_are_dense(backend):
    arrays = draw(n=30)
    with pyattn.use_backend(backend):
        (out, _), _ = compressed(*arrays, causal=False, num_clusters=70)
        (chosen, _), _ = selected_tokens(*arrays, causal=False, num_clusters=5, num_selected=99,
                                         num_top_clusters=99)
    for got in (out, chosen):
        np.testing.assert_allclose(got, pyattn.attention(*arrays), rtol=0, atol=1e-12)


def test_equal_keys_weigh_as_many_as_they_are():
    q, k, v = draw(n=30, m=8)
    k, v = np.repeat(k, 9, axis=2), np.repeat(v, 9, axis=2)
    (out, _), _ = compressed(q, k, v, causal=False, num_clusters=20)
    np.testing.assert_allclose(out, pyattn.attention(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"tree": True, "num_clusters": 1, "segment": 4},
                                     {"mode": "lsh", "rng": 0}], ids=str)
def test_longer_keys_change_no_choice(options):
    q, k, v = draw(n=150, m=150)
    found = [selected_tokens(q, f * k, v, num_selected=5, **options)[1].decisions["indices"]
             for f in (1, 3)]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("options", [
    {"segment": 8, "num_clusters": 2}, {"segment": 2, "num_clusters": 1, "tree": True},
    {"segment": 8, "num_clusters": 2, "representative": "medoid"},
    {"mode": "lsh", "segment": 8, "rng": 0, "num_buckets": 4}], ids=str)
@pytest.mark.parametrize("branch", [compressed, selected_tokens])
def test_later_tokens_change_nothing_earlier(branch, options):
    """With decisions made anew."""
    arrays = draw(n=150, m=150)
    (out, lse), _ = branch(*arrays, **options)
    for t in (0, 1, 63, 64, 127, 149):
        other = [x.copy() for x in arrays]
        for x, new in zip(other, draw(n=150, m=150, seed=t + 1), strict=True):
            x[..., t:, :] = new[..., t:, :]
        (got, new_lse), saved = branch(*other, **options)
        np.testing.assert_array_equal(got[..., :t, :], out[..., :t, :])
        np.testing.assert_array_equal(new_lse[..., :t], lse[..., :t])
        # and an early output has no gradient to what comes later
        dout = np.zeros_like(got)
        dout[..., :t, :] = 1
        for grad in saved.backward(dout):
            assert not grad[..., t:, :].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["constant", "zeros", "duplicates", "none", "one", "no batch"])
@pytest.mark.parametrize("options", [{}, {"tree": True, "segment": 2}, {"mode": "lsh", "rng": 0},
                                     {"representative": "medoid", "segment": 4}], ids=str)
def test_degenerate_keys_never_fail(options, name, backend):
    q, k, v = {"constant": draw(n=40, m=40), "zeros": draw(n=40, m=40),
               "duplicates": draw(n=40, m=2), "none": draw(n=0, m=0), "one": draw(n=1, m=1),
               "no batch": draw(n=20, m=20, batch=(0,))}[name]
    if name in ("constant", "zeros"):
        k[:] = 1.1 * (name == "constant")
    elif name == "duplicates":
        k, v = np.repeat(k, 20, axis=2), np.repeat(v, 20, axis=2)
    with pyattn.use_backend(backend):
        for branch in (compressed, selected_tokens):
            (out, _), saved = branch(q, k, v, **options)
            assert np.isfinite(out).all()
            for got, x in zip(saved.backward(out), (q, k, v), strict=True):
                assert got.shape == x.shape
                assert np.isfinite(got).all()
            assert saved.stats["pairs"] >= 0


@pytest.mark.parametrize("options", [
    {"segment": 8, "num_clusters": 2}, {"segment": 2, "num_clusters": 1, "tree": True},
    {"segment": 8, "num_clusters": 2, "representative": "medoid"},
    {"causal": False, "tree": True, "num_clusters": 20},
    {"mode": "lsh", "segment": 8, "rng": None}], ids=str)
@pytest.mark.parametrize("branch", [compressed, selected_tokens])
def test_decisions_can_be_given_back(branch, options):
    arrays = draw()
    found, saved = branch(*arrays, **options)
    again, other = branch(*arrays, decisions=saved.decisions, **options)
    for one, two in zip(found, again, strict=True):
        np.testing.assert_array_equal(one, two)
    for name, x in saved.decisions.items():
        assert name in ("clusters", "medoids", "buckets", "indices")
        if name in other.decisions:
            np.testing.assert_array_equal(x, other.decisions[name])


def test_branches_share_a_grouping():
    q, k, v = draw()
    grouping = group(q, k, segment=8, num_clusters=2)
    for branch in (compressed, selected_tokens):
        alone, _ = branch(q, k, v, segment=8, num_clusters=2)
        shared, _ = branch(q, k, v, grouping=grouping)
        np.testing.assert_array_equal(alone[0], shared[0])
    # the compressed branch may have keys of its own, grouped as the others are
    other = k + 1
    _, saved = compressed(q, other, v, grouping=grouping)
    np.testing.assert_array_equal(saved.decisions["clusters"], grouping.decisions["clusters"])


def test_work_of_a_tree_grows_as_n_log_n():
    """A doubling of the length adds a constant to the work of each token."""
    found = {}
    for tree in (False, True):
        per_token = []
        for n in (512, 1024, 2048, 4096):
            arrays = draw(n=n, m=n, heads=1, groups=1, d=4, e=4, batch=())
            options = {"segment": 8, "num_clusters": 2, "tree": tree, "iterations": 2}
            _, far = compressed(*arrays, **options)
            _, near = selected_tokens(*arrays, num_top_clusters=2, num_selected=8,
                                      grouping=far.grouping)
            work = far.stats["pairs"] + near.stats["pairs"] + near.stats["scores"]
            per_token.append((work + far.grouping.groups.pairs) / n)
        found[tree] = per_token
    assert all(b / a > 1.7 for a, b in itertools.pairwise(found[False][1:]))
    assert max(np.diff(found[True])) < 15
    assert found[True][-1] < found[False][-1] / 3


def test_spans_tell_boxes_as_they_tell_pairs():
    rng = np.random.default_rng(0)
    begins = rng.integers(0, 200, 150)
    mask = spans(begins, begins + rng.integers(1, 100, 150))
    np.testing.assert_array_equal(mask.compile(200, 150, offset=0).dense(), np.array(
        [[b <= i < e for b, e in zip(mask.begins, mask.ends, strict=True)] for i in range(200)]))
    low, high = np.sort(rng.integers(0, 200, (2, 500)), axis=0)
    left, right = np.sort(rng.integers(0, 150, (2, 500)), axis=0)
    told = mask.classify(low, high, left, right)
    for box, i0, i1, j0, j1 in zip(told, low, high, left, right, strict=True):
        pairs = mask.allowed(np.arange(i0, i1 + 1)[:, None], np.arange(j0, j1 + 1))
        assert box != 2 or pairs.all()
        assert box != 0 or not pairs.any()
    assert (told != 1).any()


def test_arrays_of_other_libraries():
    arrays = draw(n=40, m=40)
    for options in ({"segment": 4, "num_clusters": 2}, {"segment": 1, "tree": True},
                    {"segment": 4, "representative": "medoid"}):
        for branch in (compressed, selected_tokens):
            want, saved = branch(*arrays, **options)
            got, other = branch(*map(array_api_strict.asarray, arrays), **options)
            np.testing.assert_allclose(np.asarray(got[0]), want[0], atol=1e-12)
            grads = other.backward(got[0]), saved.backward(want[0])
            for one, two in zip(*grads, strict=True):
                np.testing.assert_allclose(np.asarray(one), two, atol=1e-12)


@pytest.mark.parametrize(("error", "options"), [
    (OptionError, {"mode": "paper"}), (OptionError, {"segment": 0}),
    (OptionError, {"segment": 4, "causal": False}), (OptionError, {"causal": "left"}),
    (OptionError, {"mode": "lsh", "tree": True}), (OptionError, {"mode": "lsh", "num_buckets": 3}),
    (OptionError, {"mode": "lsh", "representative": "medoid"}),
    (OptionError, {"representative": "mode"}), (OptionError, {"metric": "dot"}),
    (ShapeError, {"decisions": {"clusters": np.zeros((1, 2), int)}})], ids=str)
@pytest.mark.parametrize("branch", [compressed, selected_tokens])
def test_errors(branch, error, options):
    with pytest.raises(error):
        branch(*draw(), **options)


@pytest.mark.parametrize("branch", [compressed, selected_tokens])
def test_shapes_that_do_not_fit(branch):
    q, k, v = draw()
    with pytest.raises(ShapeError):
        branch(q[0], k, v)
    with pytest.raises(ShapeError):
        branch(q, k, v[:, :, 1:])
    with pytest.raises(ShapeError):
        branch(q, k[..., 1:], v)
    with pytest.raises(TypeError):
        branch(q, k, v, no_such_option=1)
