"""k-means against loops and scikit-learn, means with gradients, moving averages in closed form."""

from __future__ import annotations

import itertools

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from sklearn.cluster import KMeans

import pyattn
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.features import commitment_loss, kmeans, segment_means, update_centroids
from pyattn.features.clustering import Centroids, split_counts
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]


def unit(x):
    norm = np.sqrt((x * x).sum(-1, keepdims=True))
    return x / np.where(norm > 0, norm, 1)


def lloyd(x, count, iterations, cosine, seeds=None):
    """One head by loops over tokens: centroids, assignment, how often they moved."""
    n = len(x)
    x = unit(x) if cosine else x
    places = [c * n // count for c in range(count)]
    c = np.array([x[p] if n else np.zeros(x.shape[1]) for p in places])
    if seeds is not None:
        c = unit(seeds) if cosine else np.array(seeds)

    def nearest():
        found = []
        for t in x:
            apart = [-t @ m if cosine else ((t - m) ** 2).sum() for m in c]
            found.append(int(np.argmin(apart)))
        return found

    old, moved = None, 0
    for _ in range(iterations):
        own = nearest()
        far = sorted(range(n), key=lambda t: (-((x[t] - c[own[t]]) ** 2).sum(), t))
        apart = {t: ((x[t] - c[own[t]]) ** 2).sum() for t in range(n)}
        for cluster in range(count):
            if cluster in own:
                continue
            spare = [t for t in far if own.count(own[t]) > 1 and apart[t] > 0]
            if spare:
                own[spare[0]] = cluster
                far.remove(spare[0])
        if own == old or not n:
            return c, own, moved
        old = own
        for cluster in range(count):
            mine = [t for t in range(n) if own[t] == cluster]
            if mine:
                mean = x[mine].mean(0)
                c[cluster] = unit(mean) if cosine else mean
        moved += 1
    return c, nearest(), moved


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("n", "width", "count"), [
    (1, 3, 1), (7, 1, 3), (65, 5, 4), (130, 17, 9), (300, 8, 70)])
def test_lloyd_by_loops(n, width, count, metric, backend):
    x = draw(2, n, width) + (metric == "l2") * 3
    with pyattn.use_backend(backend):
        found = kmeans(x, num_clusters=count, iterations=6, metric=metric, representative="medoid")
    for h in range(2):
        centroids, own, moved = lloyd(x[h], count, 6, metric == "cosine")
        np.testing.assert_array_equal(found.assignment[h], own)
        np.testing.assert_allclose(found.centroids[h], centroids, rtol=0, atol=1e-12)
        assert found.iterations[h] == moved
        np.testing.assert_array_equal(found.counts[h], np.bincount(own, minlength=count))
        points = unit(x[h]) if metric == "cosine" else x[h]
        apart = ((points - centroids[own]) ** 2).sum(1)
        np.testing.assert_allclose(found.inertia[h], apart.sum(), rtol=1e-12, atol=1e-13)
        for c in range(count):
            mine = [t for t in range(n) if own[t] == c]
            # rounding decides between members at equal distance
            if not mine:
                assert found.medoids[h, c] == -1
            else:
                assert found.medoids[h, c] in mine
                assert apart[found.medoids[h, c]] <= apart[mine].min() + 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_scikit_learn_agrees(dtype, backend):
    x, count = draw(2, 500, 6, dtype=dtype) + 10, 12
    start = x[:, ::40][:, :count]
    with pyattn.use_backend(backend):
        found = kmeans(x, num_clusters=count, iterations=100, start=start)
    for h in range(2):
        judge = KMeans(count, init=start[h], n_init=1, max_iter=100, tol=0,
                       algorithm="lloyd").fit(x[h])
        np.testing.assert_array_equal(found.assignment[h], judge.labels_)
        close = 1e-12 if dtype == np.float64 else 1e-5
        np.testing.assert_allclose(found.centroids[h], judge.cluster_centers_, rtol=close)
        np.testing.assert_allclose(found.inertia[h], judge.inertia_, rtol=close)
        assert found.iterations[h] == judge.n_iter_ - 1     # that counts the round of no change


def test_scikit_learn_agrees_step_by_step_on_angles():
    x, count = draw(400, 5), 7
    start = unit(x[::57][:count])
    for _ in range(4):
        found = kmeans(x, num_clusters=count, iterations=1, metric="cosine", start=start)
        judge = KMeans(count, init=start, n_init=1, max_iter=1, tol=0, algorithm="lloyd")
        judge.fit(unit(x))
        start = unit(judge.cluster_centers_)
        np.testing.assert_allclose(found.centroids, start, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_cluster_takes_the_farthest_token(backend):
    x = np.array([0.0, 1, 2, 3, 50, 30])[:, None]
    with pyattn.use_backend(backend):
        found = kmeans(x, num_clusters=4, iterations=1,
                       start=np.array([[1.5], [400.0], [500.0], [600.0]]))
    # 50 and 30 are farthest from 1.5; the third, 0 (as far as 3, but first), is moved too
    np.testing.assert_allclose(found.centroids.ravel(), [2, 50, 30, 0])
    np.testing.assert_array_equal(found.assignment, [3, 0, 0, 0, 1, 2])


DEGENERATE = {
    "fewer tokens than clusters": draw(2, 3, 4),
    "constant": np.full((2, 40, 4), 1.1),
    "zeros": np.zeros((2, 40, 4)),
    "duplicates": np.repeat(draw(2, 3, 4), 20, axis=1),
    "no tokens": np.zeros((2, 0, 4)),
    "no heads": np.zeros((0, 40, 4)),
    "huge": 1e150 * draw(2, 40, 4),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}, {"tree": True, "branching": 2},
                                     {"representative": "medoid"}], ids=str)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_tokens_never_fail(name, options, backend):
    x = DEGENERATE[name]
    with pyattn.use_backend(backend):
        found = kmeans(x, num_clusters=8, **options)
    heads, n, _ = x.shape
    assert found.centroids.shape == (heads, 8, 4)
    assert np.isfinite(found.centroids).all()
    assert found.assignment.shape == (heads, n)
    assert ((found.assignment >= 0) & (found.assignment < 8)).all()
    assert (found.counts.sum(-1) == n).all()
    if name in ("fewer tokens than clusters", "duplicates") and not options:
        assert ((found.counts > 0).sum(-1) == 3).all()
        np.testing.assert_allclose(found.inertia, 0, atol=1e-25)
    if found.medoids is not None:
        np.testing.assert_array_equal(found.medoids >= 0, found.counts > 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}, {"tree": True, "branching": 3},
                                     {"representative": "medoid"}], ids=str)
def test_padding_has_no_say(options, backend):
    x, lengths = draw(2, 3, 70, 5), np.array([[70, 33, 0], [1, 5, 64]])
    for b, h in np.ndindex(2, 3):
        x[b, h, lengths[b, h]:] = np.nan
    with pyattn.use_backend(backend):
        found = kmeans(x, num_clusters=6, lengths=lengths, **options)
        for b, h in np.ndindex(2, 3):
            n = lengths[b, h]
            alone = kmeans(x[b, h, :n], num_clusters=6, **options)
            np.testing.assert_array_equal(found.assignment[b, h, :n], alone.assignment)
            assert (found.assignment[b, h, n:] == -1).all()
            np.testing.assert_allclose(found.centroids[b, h], alone.centroids, rtol=0, atol=1e-13)
            if found.medoids is not None:
                np.testing.assert_array_equal(found.medoids[b, h], alone.medoids)


def test_as_many_clusters_as_tokens_leave_each_alone():
    found = kmeans(draw(2, 90, 6), num_clusters=90)
    np.testing.assert_array_equal(found.assignment, np.tile(np.arange(90), (2, 1)))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_common_factor_changes_no_cluster(metric):
    x = draw(3, 200, 6)
    found = [kmeans(f * x, num_clusters=9, metric=metric).assignment for f in (1, 3)]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes_are_computed_in_single(dtype):
    x = draw(2, 100, 8).astype(dtype if dtype == "float16" else ml_dtypes.bfloat16)
    found, wide = (kmeans(y, num_clusters=5) for y in (x, x.astype(np.float32)))
    assert found.centroids.dtype == np.float32
    np.testing.assert_array_equal(found.assignment, wide.assignment)


def test_threads_change_nothing():
    x, found = draw(3, 3000, 8, dtype=np.float32), []
    usual = pyattn.get_num_threads()
    for count in (1, 2):
        pyattn.set_num_threads(count)
        found.append(kmeans(x, num_clusters=40))
    pyattn.set_num_threads(usual)
    np.testing.assert_array_equal(found[0].centroids, found[1].centroids)
    np.testing.assert_array_equal(found[0].assignment, found[1].assignment)


def test_arrays_of_other_libraries():
    x, lengths = draw(2, 60, 5), [60, 41]
    for options in ({}, {"tree": True, "branching": 3}, {"metric": "cosine"}):
        want = kmeans(x, num_clusters=7, lengths=lengths, **options)
        got = kmeans(array_api_strict.asarray(x), num_clusters=7, lengths=lengths, **options)
        assert isinstance(got.assignment, np.ndarray)
        assert isinstance(got.centroids, type(array_api_strict.asarray(x)))
        np.testing.assert_array_equal(got.assignment, want.assignment)
        np.testing.assert_allclose(np.asarray(got.centroids), want.centroids, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 63, 64, 65, 100, 512])
@pytest.mark.parametrize("branching", [2, 8])
def test_the_children_of_a_tree(count, branching):
    levels = split_counts(count, branching)
    nodes = 1
    for children in levels:
        assert children.size == nodes + 1
        assert children[0] == 0
        assert (np.diff(children) >= 1).all()
        assert (np.diff(children) <= branching).all()
        nodes = children[-1]
    assert nodes == count
    assert branching ** len(levels) >= count


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_tree_is_lloyd_in_each_node(metric, backend):
    x, iterations = draw(200, 5), 5
    with pyattn.use_backend(backend):
        found = kmeans(x, num_clusters=20, branching=3, tree=True, metric=metric,
                       iterations=iterations)
    # level by level; inside a node distances are around the mean of all tokens, as at the top
    inside, tables = [list(range(200))], split_counts(20, 3)
    for level, children in zip([*found.levels, found], tables, strict=True):
        below = []
        for node, mine in enumerate(inside):
            first, parts = children[node], children[node + 1] - children[node]
            centroids, own, _ = lloyd(x[mine], parts, iterations, metric == "cosine")
            np.testing.assert_allclose(level.centroids[first:first + parts], centroids, atol=1e-12)
            below += [[t for t, c in zip(mine, own, strict=True) if c == part]
                      for part in range(parts)]
        np.testing.assert_array_equal(level.counts, [len(mine) for mine in below])
        inside = below
    for c, mine in enumerate(inside):
        assert (found.assignment[mine] == c).all()


def test_products_of_a_tree_grow_with_the_logarithm():
    flat, tree = ([kmeans(draw(n, 4), num_clusters=n // 16, iterations=2, tree=tree).pairs / n
                   for n in (512, 1024, 2048, 4096)] for tree in (False, True))
    assert [round(b / a, 3) for a, b in itertools.pairwise(flat)] == [2, 2, 2]
    # three rounds, at most two scores for each doubling: 8 children on log8(n / 16) levels
    assert max(tree) <= 3 * 8 * 3
    assert tree[-1] < flat[-1] / 10


@pytest.mark.parametrize(("error", "options"), [
    (OptionError, {"num_clusters": 0}), (OptionError, {"num_clusters": 2, "iterations": -1}),
    (OptionError, {"num_clusters": 2, "metric": "dot"}),
    (OptionError, {"num_clusters": 2, "branching": 1}),
    (OptionError, {"num_clusters": 2, "representative": "mode"}),
    (ShapeError, {"num_clusters": 2, "lengths": [1, 2, 3]}),
    (ShapeError, {"num_clusters": 2, "lengths": 9}),
    (OptionError, {"num_clusters": 2, "lengths": 1.5}),
    (ShapeError, {"num_clusters": 2, "start": np.zeros((2, 3, 4))}),
    (OptionError, {"num_clusters": 2, "start": np.zeros((2, 2, 4)), "tree": True})], ids=str)
def test_errors_of_kmeans(error, options):
    with pytest.raises(error):
        kmeans(np.zeros((2, 8, 4)), **options)


def test_wrong_arrays():
    with pytest.raises(DtypeError):
        kmeans(np.zeros((2, 8, 4), int), num_clusters=2)
    with pytest.raises(ShapeError):
        kmeans(np.zeros(4), num_clusters=2)


ASSIGNED = np.array([[0, 2, 2, -1, 0, 2], [1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("medoids", [None, [[4, -1, 1], [-1, 0, -1]]])
def test_means_of_segments(medoids, backend):
    x, dout = draw(2, 6, 3), draw(2, 3, 3, seed=1)
    x[0, 3] = np.nan
    with pyattn.use_backend(backend):
        y, saved = segment_means.forward(x, ASSIGNED, 3, medoids=medoids)
        dx = saved.backward(dout).x
    share = np.zeros((2, 3, 6))
    for h, c in np.ndindex(2, 3):
        mine = np.flatnonzero(ASSIGNED[h] == c)
        if medoids is None and mine.size:
            share[h, c, mine] = 1 / mine.size
        elif medoids is not None and medoids[h][c] >= 0:
            share[h, c, medoids[h][c]] = 1
    np.testing.assert_allclose(y, share @ np.nan_to_num(x), atol=1e-14)
    np.testing.assert_allclose(dx, np.swapaxes(share, 1, 2) @ dout, atol=1e-14)
    assert set(saved.decisions) == {"clusters"} | ({"medoids"} if medoids else set())


def test_gradients_of_means_are_derivatives():
    x = draw(2, 6, 3)
    gradcheck(_means, x)
    gradcheck(_means, x, medoids=[[4, -1, 1], [-1, 0, -1]])


class _Means:
    """`segment_means` of fixed clusters, which takes no decisions."""

    @staticmethod
    def __call__(x, medoids=None):
        return segment_means(x, ASSIGNED, 3, medoids=medoids)

    @staticmethod
    def forward(x, medoids=None, decisions=None):
        del decisions
        return segment_means.forward(x, ASSIGNED, 3, medoids=medoids)


_means = _Means()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_means_of_long_segments_are_exact_to_rounding(dtype):
    x = (1.1 + 0.01 * draw(1, 20000, 3)).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    y = segment_means(x, np.zeros((1, 20000), int), 1)
    assert y.dtype == x.dtype
    eps = float(ml_dtypes.finfo(x.dtype).eps)
    np.testing.assert_allclose(y.astype("f8"), x.astype("f8").mean(1, keepdims=True),
                               rtol=max(eps, 1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_may_stand_for_several_clusters(backend):
    x, dy = np.arange(12.0).reshape(2, 3, 2), np.arange(16.0).reshape(2, 4, 2)
    medoids = np.array([[1, 2, 1, -1], [0, 0, 0, 2]])
    with pyattn.use_backend(backend):
        y, saved = segment_means.forward(x, np.zeros((2, 3), int), 4, medoids=medoids)
        dx = saved.backward(dy).x
    want = np.zeros_like(x)
    for item, cluster in zip(*np.nonzero(medoids >= 0), strict=True):
        assert np.array_equal(y[item, cluster], x[item, medoids[item, cluster]])
        want[item, medoids[item, cluster]] += dy[item, cluster]
    assert np.array_equal(dx, want)


def test_means_of_nothing():
    for shape, given in (((0, 4, 3), (0, 4)), ((2, 0, 3), (2, 0))):
        y, saved = segment_means.forward(np.zeros(shape), np.zeros(given, int), 5)
        assert y.shape == (shape[0], 5, 3)
        assert not y.any()
        assert saved.backward(y).x.shape == shape


def test_errors_of_means():
    x = np.zeros((2, 6, 3))
    with pytest.raises(ShapeError):
        segment_means(x, ASSIGNED[:1], 3)
    with pytest.raises(OptionError):
        segment_means(x, ASSIGNED, 2)
    with pytest.raises(DtypeError):
        segment_means(x, ASSIGNED + 0.5, 3)
    with pytest.raises(ShapeError):
        segment_means.forward(x, ASSIGNED, 3)[1].backward(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_steps_of_the_average_in_closed_form(backend):
    x, y, first = draw(4, 2, 30, 3), draw(4, 2, 30, 3, seed=1), draw(2, 5, 3, seed=2)
    a, b = (np.random.default_rng(s).integers(-1, 4, (4, 2, 30)) for s in (3, 4))
    lam, eps = 0.9, 1e-5
    with pyattn.use_backend(backend):
        one = update_centroids(first, x, a, decay=lam)
        two = update_centroids(one, y, b, decay=lam)

    def totals(x, a):
        inside = a[..., None] == np.arange(5)
        return inside.sum((0, 2)), np.einsum("bhnc,bhnd->hcd", inside, x)

    (count_a, sum_a), (count_b, sum_b) = totals(x, a), totals(y, b)
    n = lam**2 + (1 - lam) * (lam * count_a + count_b)
    s = lam**2 * first + (1 - lam) * (lam * sum_a + sum_b)
    np.testing.assert_allclose(two.counts, n)
    np.testing.assert_allclose(two.sums, s)
    whole = n.sum(-1, keepdims=True)
    want = s / ((n + eps) / (whole + 5 * eps) * whole)[..., None]
    np.testing.assert_allclose(two.centroids[:, :4], want[:, :4])
    # nobody is in the last cluster
    np.testing.assert_array_equal(two.centroids[:, 4], first[:, 4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_average_of_directions(backend):
    x, first = draw(30, 3), draw(4, 3, seed=2)
    a = np.random.default_rng(3).integers(-1, 3, 30)
    with pyattn.use_backend(backend):
        new = update_centroids(Centroids.of(first), x, a, decay=0.75, form="directions")
    for c in range(3):
        want = 0.75 * first[c] + 0.25 * unit(x[a == c].sum(0))
        np.testing.assert_allclose(new.centroids[c], want)
    np.testing.assert_array_equal(new.centroids[3], first[3])


def test_padding_is_not_averaged():
    x = draw(2, 10, 3)
    x[:, 7:] = np.nan
    a = np.array([[0, 1, 2, 0, 1, 2, 0, -1, -1, -1]] * 2)
    got = update_centroids(draw(2, 3, 3, seed=1), x, a, decay=0.5)
    want = update_centroids(draw(2, 3, 3, seed=1), x[:, :7], a[:, :7], decay=0.5)
    np.testing.assert_array_equal(got.centroids, want.centroids)


def test_errors_of_averages():
    x, c = np.zeros((6, 3)), np.zeros((2, 3))
    for error, options in ((OptionError, {"decay": 1.5}), (OptionError, {"form": "mean"}),
                           (OptionError, {"epsilon": -1.0})):
        with pytest.raises(error):
            update_centroids(c, x, np.zeros(6, int), **options)
    with pytest.raises(ShapeError):
        update_centroids(c, np.zeros((6, 4)), np.zeros(6, int))


@pytest.mark.parametrize("backend", BACKENDS)
def test_commitment_loss_in_closed_form(backend):
    x, c = draw(3, 2, 20, 4), draw(2, 5, 4, seed=1)
    a = np.random.default_rng(3).integers(-1, 5, (3, 2, 20))
    x[a < 0] = np.nan
    own = np.stack([c[h][a[:, h]] for h in range(2)], axis=1)
    apart = np.where((a >= 0)[..., None], x - own, 0)
    size = 4 * (a >= 0).sum()
    with pyattn.use_backend(backend):
        loss, saved = commitment_loss.forward(x, c, a, beta=0.25, codebook=0.5)
        grads = saved.backward(2.0)
        none = commitment_loss.forward(x, c, a, beta=0.25)[1].backward(1.0).centroids
    np.testing.assert_allclose(loss, 0.75 * (apart**2).sum() / size)
    np.testing.assert_allclose(grads.x, 2 * 0.25 * 2 * apart / size)
    want = np.zeros_like(c)
    for b, h, t in np.ndindex(a.shape):
        if a[b, h, t] >= 0:
            want[h, a[b, h, t]] -= 2 * 0.5 * 2 * apart[b, h, t] / size
    np.testing.assert_allclose(grads.centroids, want, atol=1e-15)
    assert not none.any()


def test_the_gradient_of_the_loss_is_its_derivative():
    x, c, a = draw(12, 4), draw(3, 4, seed=1), np.arange(12) % 3

    class Loss:
        @staticmethod
        def forward(x, c, decisions=None):
            del decisions
            return commitment_loss.forward(x, c, a, beta=0.3)

        def __call__(self, x, c):
            return self.forward(x, c)[0]

    gradcheck(Loss(), x, c, wrt=["x"])


def test_commitment_to_nothing():
    loss, saved = commitment_loss.forward(np.zeros((2, 0, 4)), np.ones((2, 3, 4)),
                                          np.zeros((2, 0), int))
    assert loss == 0
    assert saved.backward(1.0).x.shape == (2, 0, 4)


def test_inputs_are_not_written_to():
    x, c = draw(2, 50, 4), draw(2, 6, 4, seed=1)
    a = np.zeros((2, 50), np.int32)
    for array in (x, c, a):
        array.flags.writeable = False
    kmeans(x, num_clusters=6, start=c)
    kmeans(x, num_clusters=6, metric="cosine", tree=True)
    segment_means.forward(x, a, 6)[1].backward(c)
    update_centroids(c, x, a)
    commitment_loss.forward(x, c, a, codebook=1.0)[1].backward(1.0)
