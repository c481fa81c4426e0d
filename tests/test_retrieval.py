"""Tokens chosen through clusters and buckets, against loops over queries and tokens."""

from __future__ import annotations

import itertools

import array_api_strict
import numpy as np
import pytest

import pyattn
from pyattn.checks import OptionError, ShapeError
from pyattn.features.retrieval import (
    Groups,
    Index,
    find_medoids,
    group_keys,
    hash_tokens,
    select_from_buckets,
    select_tokens,
)

BACKENDS = ["cpu", "array_api"]


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def unit(x):
    norm = np.sqrt((x * x).sum(-1, keepdims=True))
    return x / np.where(norm > 0, norm, 1)


def grouped(q, groups):
    return unit(q).reshape(groups, -1, *q.shape[1:]).mean(1)


def best(candidates, count):
    """(score, number) pairs: the numbers of the highest, of equals the lowest."""
    return [c for _, c in sorted(candidates, key=lambda pair: (-pair[0], pair[1]))[:count]]


def choose(scores, tokens, rows, count, threshold, duplicate):
    taken = []
    for t in best([(scores[t], t) for t in sorted(set(tokens))], len(tokens)):
        if len(taken) == count or (threshold is not None and scores[t] < threshold):
            break
        if duplicate is None or all(rows[t] @ rows[o] <= duplicate for o in taken):
            taken.append(t)
    return sorted(taken)


def wanted(q, k, assignments, last, seen, keep, count, threshold=None, duplicate=None):
    """One batch item. `seen(level, node, last)`: is it a root for who sees up to `last`?"""
    groups, m, _ = k.shape
    rows, shared = unit(k), grouped(q, groups)
    found = []
    for g in range(groups):
        own = [a[g] for a in assignments]
        found.append([])
        for i, query in enumerate(shared[g]):
            kept = None
            for level in reversed(range(len(own))):
                nodes = sorted(set(own[level]) - {-1})
                candidates = []
                for c in nodes:
                    members = np.flatnonzero(own[level] == c)
                    parent = own[level + 1][members[0]] if level + 1 < len(own) else None
                    if seen(level, c, last[i]) or (kept is not None and parent in kept):
                        mean = unit(k[g, members].mean(0))
                        candidates.append((query @ mean, c))
                kept = best(candidates, keep)
            tokens = [t for t in range(m) if own[0][t] in kept]
            found[-1].append(choose(rows[g] @ query, tokens, rows[g], count, threshold, duplicate))
    return found


def assert_lists(got, want):
    for g, per_query in enumerate(want):
        for i, tokens in enumerate(per_query):
            row = got[g, i]
            np.testing.assert_array_equal(row[:len(tokens)], tokens)
            assert (row[len(tokens):] == -1).all()


SELECTIONS = [{}, {"threshold": 0.15}, {"duplicate_threshold": 0.4},
              {"threshold": 0.1, "duplicate_threshold": 0.3}]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", SELECTIONS, ids=str)
@pytest.mark.parametrize(("heads", "groups", "n", "m", "width"), [
    (1, 1, 1, 1, 2), (2, 2, 70, 70, 5), (4, 1, 65, 130, 16), (6, 2, 33, 90, 17)])
def test_two_stages_by_loops(heads, groups, n, m, width, options, backend):
    q, k = draw(heads, n, width), draw(groups, m, width, seed=1)
    with pyattn.use_backend(backend):
        found = group_keys(k, num_clusters=9)
        got = select_tokens(q, k, found, m - 1, num_top_clusters=3, num_selected=7, **options)
    want = wanted(q, k, found.assignments, [m - 1] * n, lambda *_: True, 3, 7,
                  options.get("threshold"), options.get("duplicate_threshold"))
    assert_lists(got.indices, want)
    assert got.indices.dtype == np.int32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", SELECTIONS[:3], ids=str)
def test_segments_by_loops(options, backend):
    q, k, segment, each = draw(4, 75, 8), draw(2, 75, 8, seed=1), 8, 3
    with pyattn.use_backend(backend):
        found = group_keys(k, num_clusters=each, segment=segment)
        got = select_tokens(q, k, found, np.arange(75), num_top_clusters=4, num_selected=6,
                            **options)
    for g in range(2):
        for t in range(72):
            assert found.assignments[0][g, t] // each == t // segment
        assert (found.assignments[0][g, 72:] == -1).all()
    want = wanted(q, k, found.assignments, range(75),
                  lambda _, c, last: (c // each + 1) * segment <= last + 1, 4, 6,
                  options.get("threshold"), options.get("duplicate_threshold"))
    assert_lists(got.indices, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tree_by_loops(backend):
    q, k = draw(2, 40, 6), draw(1, 200, 6, seed=1)
    with pyattn.use_backend(backend):
        found = group_keys(k, num_clusters=70, tree=True)
        got = select_tokens(q, k, found, 199, num_top_clusters=3, num_selected=5)
    assert found.nodes == (70, 64, 8)
    for below, above in itertools.pairwise(found.assignments):
        for c in range(70):
            assert len(set(above[0][below[0] == c])) <= 1
    want = wanted(q, k, found.assignments, [199] * 40, lambda level, *_: level == 2, 3, 5)
    assert_lists(got.indices, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_tree_over_segments_by_loops(metric, backend):
    n, segment, each = 400, 3, 2
    q, k = draw(2, n, 6), draw(1, n, 6, seed=1)
    with pyattn.use_backend(backend):
        found = group_keys(k, num_clusters=each, segment=segment, tree=True, metric=metric)
        got = select_tokens(q, k, found, np.arange(n), num_top_clusters=3, num_selected=5)
    assert found.nodes == (266, 32, 4)
    spans = [segment * 8**level for level in range(3)]
    for own, span in zip(found.assignments, spans, strict=True):
        over = n // span * span
        np.testing.assert_array_equal(own[0][:over] // each, np.arange(over) // span)
        assert (own[0][over:] == -1).all()

    def seen(level, c, last):
        """It is over, and what it is a part of is not."""
        over = (c // each + 1) * spans[level] <= last + 1
        return over and (level == 2 or (c // each // 8 + 1) * spans[level + 1] > last + 1)

    want = wanted(q, k, found.assignments, range(n), seen, 3, 5)
    assert_lists(got.indices, want)


def test_what_a_query_sees_of_a_tree_covers_the_past_once():
    n, segment, each = 700, 3, 2
    found = group_keys(draw(1, n, 4), num_clusters=each, segment=segment, tree=True)
    roots = found.roots(np.arange(n))
    for i in range(n):
        times = np.zeros(n, int)
        for own, (first, stop) in zip(found.assignments, roots, strict=True):
            times += (own[0] >= first[i]) & (own[0] < stop[i]) & (own[0] >= 0)
        over = (i + 1) // segment * segment
        np.testing.assert_array_equal(times, np.arange(n) < over)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", SELECTIONS, ids=str)
@pytest.mark.parametrize("heads", [2, 4])
def test_buckets_by_loops(heads, options, backend):
    q, k, candidates = draw(heads, 60, 5), draw(2, 60, 5, seed=1), 4
    lengths = [60, 41]
    with pyattn.use_backend(backend):
        buckets = hash_tokens(q, k, num_buckets=4, num_rounds=3, rng=0)
        got = select_from_buckets(q, k, buckets, np.arange(60), num_candidates=candidates,
                                  num_selected=5, lengths=lengths, **options)
    rows, shared = unit(k), grouped(q, 2)
    want = []
    for g in range(2):
        want.append([])
        for i in range(60):
            tokens = []
            for own, theirs in zip(buckets[0][g], buckets[1][g], strict=True):
                mine = [t for t in range(min(i + 1, lengths[g])) if theirs[t] == own[i]]
                tokens += mine[-candidates:]
            want[-1].append(choose(rows[g] @ shared[g, i], tokens, rows[g], 5,
                                   options.get("threshold"), options.get("duplicate_threshold")))
    assert_lists(got.indices, want)


def test_equal_vectors_hash_alike():
    k = draw(2, 30, 6)
    own, theirs = hash_tokens(k, k, num_buckets=8, num_rounds=2, rng=0)
    np.testing.assert_array_equal(own, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_enough_room_takes_every_token(backend):
    q, k = draw(2, 20, 4), draw(1, 20, 4, seed=1)
    with pyattn.use_backend(backend):
        all_of_them = select_tokens(q, k, group_keys(k, num_clusters=5), 19, num_top_clusters=99,
                                    num_selected=99).indices
        np.testing.assert_array_equal(all_of_them, np.tile(np.arange(20), (1, 20, 1)))
        past = select_tokens(q, k, group_keys(k, num_clusters=1, segment=1), np.arange(20),
                             num_top_clusters=99, num_selected=99).indices
    want = np.where(np.arange(20) <= np.arange(20)[:, None], np.arange(20), -1)
    np.testing.assert_array_equal(past[0], want)


@pytest.mark.parametrize("segment", [None, 8])
def test_longer_keys_change_no_choice(segment):
    q, k, found = draw(4, 90, 6), draw(2, 90, 6, seed=1), []
    last = 89 if segment is None else np.arange(90)
    for factor in (1, 3):
        groups = group_keys(factor * k, num_clusters=6, segment=segment)
        found.append(select_tokens(q, factor * k, groups, last, num_top_clusters=2,
                                   num_selected=5).indices)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("tree", [False, True])
def test_later_tokens_change_no_earlier_choice(tree):
    n, q, k = 150, draw(4, 150, 6), draw(2, 150, 6, seed=1)

    def select(q, k):
        groups = group_keys(k, num_clusters=2, segment=4, tree=tree)
        return select_tokens(q, k, groups, np.arange(n), num_top_clusters=2,
                             num_selected=5).indices

    usual = select(q, k)
    assert (usual[:, -1, :3] >= 0).all()
    for t in (0, 3, 64, 127, 149):
        q2, k2 = q.copy(), k.copy()
        q2[:, t:] += draw(4, n - t, 6, seed=t)
        k2[:, t:] = draw(2, n - t, 6, seed=t)
        np.testing.assert_array_equal(select(q2, k2)[:, :t], usual[:, :t])


def test_later_tokens_change_no_earlier_candidates():
    n, q, k = 90, draw(2, 90, 6), draw(2, 90, 6, seed=1)

    def select(q, k):
        buckets = hash_tokens(q, k, num_buckets=4, num_rounds=2, rng=0)
        return select_from_buckets(q, k, buckets, np.arange(n), num_candidates=5,
                                   num_selected=4).indices

    usual = select(q, k)
    for t in (1, 45, 89):
        k2 = k.copy()
        k2[:, t:] = draw(2, n - t, 6, seed=t)
        np.testing.assert_array_equal(select(q, k2)[:, :t], usual[:, :t])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["constant", "zeros", "duplicates", "none", "no heads"])
def test_degenerate_keys_never_fail(name, backend):
    k = {"constant": np.full((2, 40, 4), 1.1), "zeros": np.zeros((2, 40, 4)),
         "duplicates": np.repeat(draw(2, 2, 4), 20, axis=1), "none": np.zeros((2, 0, 4)),
         "no heads": np.zeros((0, 40, 4))}[name]
    groups, m, _ = k.shape
    q = draw(2 * groups, m, 4)
    with pyattn.use_backend(backend):
        for options, last in (({"num_clusters": 8}, m - 1),
                              ({"num_clusters": 8, "segment": 3}, np.arange(m)),
                              ({"num_clusters": 8, "segment": 3, "tree": True}, np.arange(m)),
                              ({"num_clusters": 8, "tree": True}, m - 1)):
            found = select_tokens(q, k, group_keys(k, **options), last, num_top_clusters=2,
                                  num_selected=3).indices
            assert found.shape == (groups, m, min(3, max(m, 1)))
            assert (found <= np.broadcast_to(last, (groups, m))[..., None]).all()
        buckets = hash_tokens(q, k, num_buckets=4, num_rounds=2, rng=0)
        select_from_buckets(q, k, buckets, np.arange(m), num_candidates=3, num_selected=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_token(backend):
    k = np.repeat(np.eye(2)[None], 40, axis=1)
    with pyattn.use_backend(backend):
        found = select_tokens(np.array([[[1.0, 0.1]]]), k, group_keys(k, num_clusters=1), 79,
                              num_top_clusters=1, num_selected=43).indices[0, 0]
    np.testing.assert_array_equal(found, np.arange(43))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_has_no_say(backend):
    q, k = draw(2, 2, 50, 5), draw(2, 1, 50, 5, seed=1)
    k[0, 0, 33:], q[0, :, 33:] = np.nan, np.nan
    last = np.array([[np.where(np.arange(50) < 33, np.arange(50), -1)], [np.arange(50)]])
    for options in ({"num_clusters": 3, "segment": 4}, {"num_clusters": 1, "segment": 2,
                                                        "tree": True}):
        with pyattn.use_backend(backend):
            groups = group_keys(k, lengths=[[33], [50]], **options)
            found = select_tokens(q, k, groups, last, num_top_clusters=2, num_selected=4).indices
            alone = select_tokens(q[0, :, :33], k[0, :, :33], group_keys(k[0, :, :33], **options),
                                  np.arange(33), num_top_clusters=2, num_selected=4).indices
        np.testing.assert_array_equal(found[0, :, :33], alone)
        assert (found[0, :, 33:] == -1).all()


def test_medoids_are_the_members_nearest_to_the_mean():
    k = draw(2, 60, 4)
    for metric in ("l2", "cosine"):
        groups = group_keys(k, num_clusters=3, segment=8, tree=True, metric=metric)
        for own, nodes, found in zip(groups.assignments, groups.nodes,
                                     find_medoids(k, groups, metric), strict=True):
            assert found.shape == (2, nodes)
            for h, c in np.ndindex(2, nodes):
                members = np.flatnonzero(own[h] == c)
                rows = unit(k[h]) if metric == "cosine" else k[h]
                if members.size:
                    mean = rows[members].mean(0)
                    mean = unit(mean) if metric == "cosine" else mean
                    apart = ((rows[members] - mean) ** 2).sum(-1)
                    assert ((rows[found[h, c]] - mean) ** 2).sum() <= apart.min() + 1e-12
                    assert found[h, c] in members
                else:
                    assert found[h, c] == -1


def test_a_tree_looks_at_logarithmically_many():
    """Scores for each query double their number of levels, not themselves."""
    found = {}
    for tree in (False, True):
        counts = []
        for n in (512, 1024, 2048, 4096, 8192):
            k = draw(1, n, 4)
            groups = group_keys(k, num_clusters=2, segment=8, tree=tree, iterations=2)
            index = Index(k, groups)
            scored = index.search(unit(k), np.arange(n)[None], 2).scored
            counts.append((scored + groups.pairs) / n)
        found[tree] = counts
    growth = [b / a for a, b in itertools.pairwise(found[False])]
    assert min(growth[1:]) > 1.8
    # a doubling adds a third of a level: its roots, and the children of two nodes
    steps = np.diff(found[True])
    assert steps.max() < (7 * 2 + 2 * 8) / 3 * 1.5
    assert found[True][-1] < found[False][-1] / 8


def test_arrays_of_other_libraries():
    q, k = draw(4, 40, 6), draw(2, 40, 6, seed=1)
    for options in ({"num_clusters": 5}, {"num_clusters": 2, "segment": 4, "tree": True}):
        want, got = (
            select_tokens(f(q), f(k), group_keys(f(k), **options), np.arange(40),
                          num_top_clusters=2, num_selected=5).indices
            for f in (np.asarray, array_api_strict.asarray))
        np.testing.assert_array_equal(got, want)


def test_threads_change_nothing():
    q, k, found = draw(4, 3000, 8, dtype=np.float32), draw(2, 3000, 8, dtype=np.float32), []
    usual = pyattn.get_num_threads()
    for count in (1, 2):
        pyattn.set_num_threads(count)
        groups = group_keys(k, num_clusters=4, segment=32, tree=True)
        found.append(select_tokens(q, k, groups, np.arange(3000), num_top_clusters=4,
                                   num_selected=20).indices)
    pyattn.set_num_threads(usual)
    np.testing.assert_array_equal(*found)


def test_errors():
    q, k = draw(2, 10, 4), draw(2, 10, 4)
    groups = group_keys(k, num_clusters=2)
    for options in ({"num_top_clusters": 0}, {"num_selected": 0}, {"threshold": "high"},
                    {"duplicate_threshold": np.nan}):
        with pytest.raises(OptionError):
            select_tokens(q, k, groups, 9, **{"num_top_clusters": 1, "num_selected": 1} | options)
    with pytest.raises(ShapeError):
        select_tokens(draw(3, 10, 4), k, groups, 9, num_top_clusters=1, num_selected=1)
    with pytest.raises(OptionError):
        group_keys(k, num_clusters=2, segment=0)
    with pytest.raises(OptionError):
        Groups((), ()).segments_seen(np.zeros(3), 0)
