"""Decisions by content on a device: what crosses to the host, how often, and that it is the same.

The stand-in for CuPy (strict_cupy.py) counts copies between host and device. A forward may bring
home what it decided, as int32, at one place, `pyattn.arrays.decided`; nothing of the size of the
operands crosses, and a backward asks for nothing. (The engines of `array_api` ask whether their
inputs are finite, in one bit.) What is decided is what the CPU's kernels decide for NumPy's arrays,
where a rule says which of equals is taken.
"""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
import strict_cupy
from emulator.build import compiler
from pyattn.kernels.cuda import device
from test_cuda_arrays import StrictDevice, real_cupy

import pyattn
from pyattn import arrays, dispatch
from pyattn.checks import DtypeError
from pyattn.features import hashing, important_blocks, kmeans, lsh_hash
from pyattn.features.retrieval import group_keys, select_tokens
from pyattn.testing import examples

B, H, G, D = 2, 4, 2, 8
QUESTIONS = {"sums.py", "edges.py", "selected.py"}
"""Files of engines that ask whether inputs are finite."""


@pytest.fixture(scope="module")
def cupy():
    preference = dispatch.PREFERENCE["cupy"]
    with strict_cupy.standing_in() as module:
        dispatch.PREFERENCE["cupy"] = ("array_api",)
        yield module
        dispatch.PREFERENCE["cupy"] = preference


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def whole(*shape, high=3, seed=0):
    """Small integers, whose products are exact and often equal."""
    return np.random.default_rng([seed, *shape]).integers(-high, high + 1, shape).astype(float)


def qkv(n):
    return [draw(B, heads, n, D, seed=seed) for seed, heads in enumerate((H, G, G))]


def shared(n):
    return [draw(B, H, n, D, seed=seed) for seed in range(2)]


NSA = {"num_selected": 6, "window": 8}
CENTROIDS = draw(H, 5, D, seed=9)
SEGMENTS = {"segment": 16, "num_clusters": 2}

# name: (operation, arguments of N tokens, options, copies, numbers that they hold for N tokens)
CROSSING = {
    "lsh": (pyattn.lsh_attention, shared, {"num_rounds": 3, "num_buckets": 6, "rng": 0},
            1, lambda n: 2 * B * H * 3 * n),
    "lsh_causal": (pyattn.lsh_attention, shared,
                   {"num_rounds": 2, "num_buckets": (4, 6), "rng": 0, "causal": True,
                    "kv_lengths": np.array([50, 64])}, 1, lambda n: 2 * B * H * 2 * n),
    "routing": (pyattn.routing_attention, lambda n: (*qkv(n), CENTROIDS),
                {"cluster_size": 9, "causal": True}, 1, lambda n: 4 * B * H * n),
    "routing_top": (pyattn.routing_attention, lambda n: (*qkv(n), CENTROIDS),
                    {"cluster_size": 9}, 1, lambda n: 2 * B * H * 5 * 9),
    "top_k": (pyattn.top_k_attention, qkv, {"top": 7, "causal": True}, 1, lambda n: B * H * n * 7),
    "nsa_paper": (pyattn.nsa_attention, lambda n: (*qkv(n), np.ones((B, H, n, 3))),
                  {"block_size": 8, "stride": 4, "select_block": 8, "num_selected": 4, "window": 8},
                  1, lambda n: B * G * n * 4),
    # clusters, and how often centroids moved; then lists, and how many scores these took
    "nsa_kmeans": (pyattn.nsa_attention, lambda n: (*qkv(n), np.ones((B, H, n, 3))),
                   {"mode": "kmeans", **NSA, **SEGMENTS}, 2,
                   lambda n: B * G * (n + n // 16 + n * 6 + n)),
    "nsa_tree": (pyattn.nsa_attention, lambda n: (*qkv(n), np.ones((B, H, n, 3))),
                 {"mode": "kmeans", **NSA, **SEGMENTS, "tree": True}, 2,
                 lambda n: B * G * ((1 + (n >= 128)) * n + n // 16 + n // 128 + n * 6 + n)),
    "nsa_medoids": (pyattn.nsa_attention, lambda n: (*qkv(n), np.ones((B, H, n, 3))),
                    {"mode": "kmeans", **NSA, "num_clusters": 6, "causal": False,
                     "representative": "medoid"}, 3, lambda n: B * G * (n + 1 + 6 + n * 6 + n)),
    # buckets of queries and keys, and groups; then lists and scores
    "nsa_lsh": (pyattn.nsa_attention, lambda n: (*qkv(n), np.ones((B, H, n, 3))),
                {"mode": "lsh", **NSA, **SEGMENTS, "rng": 0, "num_rounds": 2}, 2,
                lambda n: B * G * (2 * 2 * n + n + n * 6 + n)),
    "kmeans": (kmeans, lambda n: (draw(B, G, n, D),), {"num_clusters": 6}, 1,
               lambda n: B * G * (n + 1)),
    "kmeans_tree": (kmeans, lambda n: (draw(B, G, n, D),),
                    {"num_clusters": 12, "tree": True, "branching": 3, "representative": "medoid"},
                    1, lambda n: B * G * (n + 1 + 3 + 9 + 12)),
    "lsh_hash": (lsh_hash, lambda n: (draw(B, G, n, D),),
                 {"num_buckets": 6, "num_rounds": 2, "rng": 0}, 1, lambda n: B * G * 2 * n),
}


def on_device(args):
    return [strict_cupy.asarray(x) for x in args]


def watched(operation, *args, **options):
    """The result of a call, and what crossed in it."""
    strict_cupy.crossings.clear()
    strict_cupy.synchronisations.clear()
    found = operation(*args, **options)
    return found, list(strict_cupy.crossings), set(strict_cupy.synchronisations)


def judge_copies(crossings, waits, tokens, copies, numbers):
    """Raise AssertionError unless what came home is `copies` of `numbers` int32 in all."""
    home = [copy for copy in crossings if copy.way == "get"]
    assert waits <= {"get", "bool"}
    assert {copy.by[0] for copy in crossings if copy.way == "bool"} <= QUESTIONS
    assert {copy.by[1:] for copy in home} <= {("to_host", "decided")}
    assert {copy.dtype for copy in home} <= {np.dtype(np.int32)}
    assert [len(home), sum(copy.nbytes for copy in home)] == [copies, 4 * numbers]
    # rotations are drawn on the host, and some sizes are numbers of scores
    floats = [copy for copy in crossings if copy.dtype.kind == "f"]
    assert all(copy.nbytes < tokens * D * copy.dtype.itemsize for copy in floats)


@pytest.mark.parametrize("n", [64, 130])
@pytest.mark.parametrize("name", CROSSING)
def test_what_is_decided_crosses_once_as_integers(cupy, name, n):
    operation, make, options, copies, numbers = CROSSING[name]
    args = on_device(make(n))
    forward = getattr(operation, "forward", operation)
    found, crossings, waits = watched(forward, *args, **options)
    judge_copies(crossings, waits, B * G * n, copies, numbers(n))
    if forward is not operation:
        out, saved = found
        _, crossings, waits = watched(saved.backward, out)
        judge_copies(crossings, waits, B * G * n, 0, 0)


@pytest.mark.parametrize("name", CROSSING)
def test_decisions_are_those_of_the_host(cupy, name):
    operation, make, options, _, _ = CROSSING[name]
    args = make(130)
    if operation in (kmeans, lsh_hash):
        want, got = (operation(*given, **options) for given in (args, on_device(args)))
        pairs = [(want, got)] if operation is lsh_hash else [
            (getattr(want, field), getattr(got, field))
            # rounding tells which of two members is nearer to their mean
            for field in ("assignment", "counts", "iterations", "pairs")]
    else:
        (want_out, want), (got_out, got) = (
            operation.forward(*given, **options) for given in (args, on_device(args)))
        np.testing.assert_allclose(got_out.get(), want_out, rtol=1e-10, atol=1e-10)
        assert [*want.decisions] == [*got.decisions]
        pairs = [(want.decisions[key], got.decisions[key]) for key in want.decisions]
        pairs.append((want.stats, got.stats))
    for theirs, ours in pairs:
        assert type(theirs) is type(ours)
        np.testing.assert_array_equal(theirs, ours)


# of equals the first: numbers whose products are exact


def libraries(x):
    """The same numbers on the device, and in a library without any path of its own."""
    return strict_cupy.asarray(x), array_api_strict.asarray(x)


def test_buckets_of_equal_products(cupy):
    x, rotations = whole(2, 3, 90, 4), whole(3, 4, 2, 5)
    want = lsh_hash(x, num_buckets=(4, 6), num_rounds=2, rotations=rotations)
    assert len(np.unique(want)) > 20
    for given, drawn in zip(libraries(x), libraries(rotations), strict=True):
        np.testing.assert_array_equal(
            want, lsh_hash(given, num_buckets=(4, 6), num_rounds=2, rotations=drawn))


@pytest.mark.parametrize("tree", [False, True])
def test_clusters_at_equal_distances(cupy, tree):
    """Means of up to 16 tokens are whole numbers: so are all distances."""
    x = 720720 * whole(60, 16, 2, high=2)
    x[::2, :, 1] = 0        # five places for six clusters
    options = {"num_clusters": 6, "tree": tree, "branching": 2, "representative": "medoid",
               "iterations": 2}
    want = kmeans(x, **options)
    # some are empty, some settle, some would go on
    assert (want.counts == 0).any()
    assert {*want.iterations.tolist()} == {1, 2}
    for given in libraries(x):
        got = kmeans(given, **options)
        for field in ("assignment", "counts", "iterations", "medoids"):
            np.testing.assert_array_equal(getattr(want, field), getattr(got, field))
        assert want.pairs == got.pairs


def test_empty_clusters_take_the_same_tokens(cupy):
    x, start = 720720 * whole(60, 16, 2, high=4), 720720 * whole(60, 7, 2, high=1)
    start[:, 4:] = start[:, :1]
    want = kmeans(x, num_clusters=7, iterations=1, start=start)
    assert (want.centroids != kmeans(x, num_clusters=7, iterations=0, start=start).centroids).any()
    for given, first in zip(libraries(x), libraries(start), strict=True):
        got = kmeans(given, num_clusters=7, iterations=1, start=first)
        np.testing.assert_array_equal(want.assignment, got.assignment)
        np.testing.assert_array_equal(want.centroids, arrays.to_host(got.centroids))


@pytest.mark.parametrize("options", [{}, {"threshold": 0.0}, {"causal": True},
                                     {"causal": True, "kv_lengths": np.array([40, 90])}], ids=str)
def test_keys_of_equal_scores(cupy, options):
    q, k = whole(2, 4, 90, 3, high=1), whole(2, 2, 90, 3, high=1)
    for top in (1, 5, 100):
        want = pyattn.top_k_attention.forward(q, k, k, top=top, scale=1.0, **options)[1]
        for given in zip(libraries(q), libraries(k), libraries(k), strict=True):
            got = pyattn.top_k_attention.forward(*given, top=top, scale=1.0, **options)[1]
            np.testing.assert_array_equal(want.decisions["indices"], got.decisions["indices"])


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_equal_importance(cupy, causal):
    q, k = whole(2, 2, 70, 2, high=1), whole(2, 2, 35, 2, high=1)
    lse = np.full(q.shape[:-1], 3.0)
    options = {"tokens": 70, "block_size": 2, "stride": 2, "select_block": 2, "num_selected": 6,
               "causal": causal, "kv_lengths": np.array([70, 51]), "scale": 1.0}
    want = important_blocks(q, k, lse, **options)
    for given in zip(libraries(q), libraries(k), libraries(lse), strict=True):
        np.testing.assert_array_equal(want, important_blocks(*given, **options))


@pytest.mark.parametrize("options", [
    {}, {"threshold": 0.2}, {"duplicate_threshold": 0.7},
    {"threshold": 0.0, "duplicate_threshold": 0.9}], ids=str)
def test_tokens_of_equal_cosines(cupy, options):
    """Lengths are 4 and cosines whole sixteenths."""
    q, k = (np.sign(draw(2, 1, 50, 16, seed=seed)) for seed in range(2))
    last = np.arange(50)
    for segment in (None, 10):
        want = select_tokens(q, k, group_keys(k, num_clusters=1, segment=segment), last,
                             num_top_clusters=3, num_selected=5, **options)
        for query, key in zip(libraries(q), libraries(k), strict=True):
            got = select_tokens(query, key, group_keys(key, num_clusters=1, segment=segment), last,
                                num_top_clusters=3, num_selected=5, **options)
            np.testing.assert_array_equal(want.indices, got.indices)
            assert want.scored == got.scored


def test_clusters_that_take_equal_tokens(cupy):
    """Tokens that occur several times; a centroid of zeros, for which all are equal."""
    x = np.tile(draw(1, 4, 8, D), (2, 1, 9, 1))
    centroids = np.concatenate([draw(4, 3, D, seed=1), np.zeros((4, 2, D))], axis=1)
    for options in ({"cluster_size": 9, "mode": "top"}, {"cluster_size": 9, "mode": "assign"},
                    {"cluster_size": 80, "mode": "top", "q_lengths": np.array([30, 72])}):
        want = pyattn.routing_attention.forward(x, x, x, centroids, **options)[1].decisions
        for given, nodes in zip(libraries(x), libraries(centroids), strict=True):
            got = pyattn.routing_attention.forward(given, given, given, nodes, **options)[1]
            for name, lists in got.decisions.items():
                np.testing.assert_array_equal(lists, want[name])


@pytest.mark.skipif(real_cupy is None, reason="CuPy is not installed")
def test_functions_are_called_as_cupy_has_them(cupy):
    """After the tests above, and by some of them here."""
    for name in ("nsa_tree", "nsa_lsh", "kmeans_tree"):
        test_what_is_decided_crosses_once_as_integers(cupy, name, 64)
    assert {"argsort", "searchsorted", "argmax", "take_along_axis"} <= {*strict_cupy.calls}
    strict_cupy.require_signatures(real_cupy)


# judges are shown to fail


def test_a_float_that_crosses_is_noticed(cupy, monkeypatch):
    kept = hashing._nearest_on_device

    def nearest(kernel, x, nodes):
        return kept(kernel, strict_cupy.asarray(arrays.to_host(x)), nodes)

    monkeypatch.setattr(hashing, "_nearest_on_device", nearest)
    with pytest.raises(AssertionError):
        test_what_is_decided_crosses_once_as_integers(cupy, "lsh", 64)


def test_a_second_copy_is_noticed(cupy, monkeypatch):
    def one_by_one(*found):
        return tuple(decided(x)[0] for x in found)

    decided = arrays.decided
    monkeypatch.setattr(arrays, "decided", one_by_one)
    with pytest.raises(AssertionError):
        test_what_is_decided_crosses_once_as_integers(cupy, "lsh", 64)


def test_a_question_is_noticed(cupy, monkeypatch):
    kept = hashing._nearest_on_device

    def nearest(kernel, x, nodes):
        return kept(kernel, x, nodes) if bool((x == x).any()) else None

    monkeypatch.setattr(hashing, "_nearest_on_device", nearest)
    monkeypatch.setattr(strict_cupy.ndarray, "any", lambda x: strict_cupy.wrapped(
        x._memory.any()), raising=False)
    with pytest.raises(AssertionError):
        test_what_is_decided_crosses_once_as_integers(cupy, "lsh", 64)


def test_shapes_that_depend_on_numbers_are_noticed(cupy):
    x = strict_cupy.asarray(np.arange(3))
    for ask in (lambda: x[x > 1], lambda: cupy.nonzero(x), lambda: cupy.unique(x)):
        assert watched(ask)[2]
    assert not watched(lambda: cupy.argsort(x[1:]))[2]


def test_what_comes_home_must_be_int32(cupy):
    with pytest.raises(DtypeError, match="decisions must be int32; got float64"):
        arrays.decided(strict_cupy.asarray(np.ones(3)))
    given = np.arange(6, dtype=np.int32).reshape(2, 3), np.zeros((0, 2), np.int32)
    assert arrays.decided(*given)[0] is given[0]
    for want, got in zip(given, arrays.decided(*on_device(given)), strict=True):
        np.testing.assert_array_equal(want, got)
        assert want.shape == got.shape


# with kernels, nothing else is asked


@pytest.mark.parametrize("name", ["lsh_attention", "routing_attention"])
def test_kernels_wait_for_what_is_decided_alone(cupy, name, monkeypatch):
    if compiler() is None:
        pytest.skip("a C++ compiler builds the kernels for the emulator; there is none")
    emulator = StrictDevice()
    monkeypatch.setitem(device._factories, "cupy", lambda array: emulator)
    monkeypatch.setattr(device, "_missing", lambda number: None)
    monkeypatch.setitem(dispatch.PREFERENCE, "cupy", ("cuda", "array_api"))
    args, options = examples.VARIANTS[name](lambda *shape: draw(*shape).astype(np.float32))
    operation = getattr(pyattn, name)
    want, saved = operation.forward(*args, **options)
    (out, there), _, _ = watched(operation.forward, *on_device(args), **options)
    assert dict(strict_cupy.synchronisations) == {"get": 1}
    np.testing.assert_allclose(out.get(), want, rtol=1e-4, atol=1e-5)
    grads, _, waits = watched(there.backward, out)
    assert not waits
    for got, exact in zip(grads, saved.backward(want), strict=True):
        np.testing.assert_allclose(got.get(), exact, rtol=1e-3, atol=1e-4)
    assert emulator.launches
