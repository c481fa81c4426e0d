"""Plans: parts that cover a mask's pairs once each, and attention that is the same by parts."""

from __future__ import annotations

import importlib
import pickle

import numpy as np
import pytest

import pyattn
from pyattn import masks
from pyattn.masks import (
    causal,
    dense,
    fixed,
    global_tokens,
    per_head,
    random_blocks,
    strided,
    window,
    window_2d,
)
from pyattn.masks.order import Order, residues
from pyattn.masks.placement import PlainFrame

planning = importlib.import_module("pyattn.masks.plan")
RNG = np.random.default_rng(0)
HEADS = 4
SCATTERED = [0, 5, 66, 129]
MASKS = {
    "window": lambda n, m: causal() & window(20, 0),
    "dilated": lambda n, m: window(5, 3, dilation=7),
    "strided": lambda n, m: causal() & (window(6, 0) | strided(7)),
    "fixed": lambda n, m: causal() & fixed(16, 3),
    "global": lambda n, m: window(9, 2) | global_tokens(SCATTERED),
    "global causal": lambda n, m: causal() & (window(9, 2) | global_tokens(SCATTERED)),
    "strided of an array": lambda n, m: dense(RNG.random((n, m)) < 0.3) & strided(5),
    "dilation by head": lambda n, m: per_head([window(5, 5, dilation=d) for d in (1, 2, 3, 2)]),
    "all of it by head": lambda n, m: per_head([
        causal() & (window(6, 0) | strided(7)), window(3, 3) | global_tokens(SCATTERED),
        causal(), fixed(8, 1)]),
    "rectangles": lambda n, m: window_2d((14, 15), (3, 2)),
    "rectangles and global": lambda n, m: (
        causal() & (window_2d((25, 8), (6, 1)) | global_tokens(SCATTERED))),
    "but for a rectangle": lambda n, m: window_2d((20, 10), 4) & ~window_2d((20, 10), 1),
    "complement": lambda n, m: ~strided(3) | (strided(6) & ~window(4, 4)),
}
LENGTHS = [(100, 100, None), (130, 200, None), (200, 130, None), (70, 150, 0), (150, 70, -3)]


def divided(mask, n, m, offset=None):
    """Return the parts whether they are worth it or not."""
    frame = PlainFrame(n, m, m - n if offset is None else offset)
    heads = [mask.at((h,)) for h in range(mask.lead[0])] if mask.lead else [mask]
    return planning._assemble([planning._branches(own, frame) for own in heads], frame, offset)


@pytest.fixture
def always(monkeypatch):
    """Let calls be done in parts however small they are."""
    monkeypatch.setattr(masks.plan, "parts",
                        lambda self, offset=None: divided(self.mask, self.n, self.m, offset))


def times_visited(parts, heads, n, m):
    """Count how often each pair is met, (heads, n, m), from the parts' tiles and orders."""
    count = np.zeros((heads, n, m), int)
    for part in parts:
        own = range(heads) if part.heads is None else part.heads
        queries, keys = (np.arange(length)[None] if order is None else order.index
                         for order, length in ((part.queries, n), (part.keys, m)))
        allowed = part.blocks.dense()
        allowed = np.broadcast_to(allowed, (part.items, len(own), *allowed.shape[-2:]))
        for item in range(part.items):
            query, key = (x[item % len(x)] for x in (queries, keys))
            s, t = np.flatnonzero(query >= 0), np.flatnonzero(key >= 0)
            for head, pairs in zip(own, allowed[item], strict=True):
                count[head, query[s][:, None], key[t]] += pairs[s[:, None], t]
    return count


@pytest.mark.parametrize(("n", "m", "offset"), LENGTHS)
@pytest.mark.parametrize("name", MASKS)
def test_parts_have_each_pair_once(name, n, m, offset):
    mask = MASKS[name](n, m)
    parts = divided(mask, n, m, offset)
    heads = mask.lead[0] if mask.lead else 1
    right = np.broadcast_to(mask.dense(n, m, offset=offset), (heads, n, m))
    np.testing.assert_array_equal(times_visited(parts, heads, n, m), right)
    kept = masks.plan(mask, n, m).parts(offset)
    np.testing.assert_array_equal(times_visited(kept, heads, n, m), right)


def normal(*shape):
    return np.random.default_rng([8, *shape]).standard_normal(shape)


def options(n, m):
    return {
        "none": {},
        "causal": {"causal": True},
        "top left": {"causal": "top_left"},
        "lengths": {"kv_lengths": [m, m - 20], "q_lengths": [n, n - 20]},
        "uneven lengths": {"kv_lengths": [m, 7], "q_lengths": [n, n - 3]},
        "pairs": {"bias": normal(2, HEADS, n, m), "gate": abs(normal(HEADS, 1, m)) % 1},
        "rows": {"bias": normal(HEADS, n, 1), "sinks": normal(HEADS), "softcap": 2.0,
                 "scale": normal(HEADS)},
        "columns": {"bias": normal(1, 1, m), "gate": abs(normal(n, m)) % 1},
        "distances": {"alibi_slopes": abs(normal(HEADS))},
        "dropout": {"dropout": 0.3, "rng": 1},
        "boolean": {"mask": np.random.default_rng(3).random((n, m)) < 0.7},
    }


@pytest.mark.parametrize(("option", "library"), [
    *((option, "numpy") for option in options(1, 30)),
    *((option, "array_api_strict") for option in ("none", "pairs", "dropout"))])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.usefixtures("always")
def test_attention_by_parts_is_attention(name, option, library):
    """In float64, with two heads to a key head, and a gradient of the log-sum-exp."""
    move = importlib.import_module(library).asarray
    n, m = (130, 200) if option != "top left" else (200, 130)
    mask = MASKS[name](n, m)
    given = {key: move(x) if isinstance(x, np.ndarray) and key != "mask" else x
             for key, x in options(n, m)[option].items()}
    if "mask" in given:
        mask = masks.restrict(mask, given.pop("mask"))
    arrays = [normal(2, HEADS, n, 8), normal(2, 2, m, 8), normal(2, 2, m, 6)]
    cotangents = [move(normal(2, HEADS, n, 6)), move(normal(2, HEADS, n))]
    results = []
    for taken in (mask, masks.plan(mask, n, m)):
        (out, lse), saved = pyattn.attention.forward(
            *map(move, arrays), mask=taken, return_lse=True, **given)
        grads = saved.backward(*cotangents)
        results.append({"out": out, "lse": lse, **grads._asdict()})
    right, got = results
    assert list(right) == list(got)
    for key, x in right.items():
        assert got[key].dtype == x.dtype, key
        np.testing.assert_allclose(np.asarray(got[key]), np.asarray(x), rtol=0, atol=1e-11,
                                   err_msg=key)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.usefixtures("always")
def test_partial_results_are_not_rounded(dtype):
    """What is merged and added up is float32, rounded once: errors are those of no parts."""
    n = 300
    mask = MASKS["global causal"](n, n)
    x = [normal(1, 2, n, 16 + i).astype(dtype)[..., :16] for i in range(4)]
    results = []
    for taken, arrays in ((mask, [y.astype(float) for y in x]), (mask, x),
                          (masks.plan(mask, n, n), x)):
        out, saved = pyattn.attention.forward(*arrays[:3], mask=taken)
        results.append((out, *saved.backward(arrays[3])))
    for right, whole, parts in zip(*results, strict=True):
        assert parts.dtype == whole.dtype == dtype
        usual, error = (abs(y.astype(float) - right).max() for y in (whole, parts))
        assert error <= 1.5 * usual


@pytest.mark.usefixtures("always")
def test_poison_in_masked_slots_reaches_nothing_by_parts():
    n = 200
    mask = window(3, 3, dilation=9) & ~global_tokens([7, 70])
    q, k, v, dout = (normal(1, 2, n, 8) for _ in range(4))
    results = []
    for value in (0.0, np.nan):
        for x in (q, k, v, dout):
            x[:, :, [7, 70]] = value
        k[:, :, 150:] = v[:, :, 150:] = value
        out, saved = pyattn.attention.forward(q, k, v, mask=masks.plan(mask, n, n), kv_lengths=150,
                                              causal="top_left")
        results.append((out, *saved.backward(dout)))
    for clean, dirty in zip(*results, strict=True):
        np.testing.assert_allclose(clean, dirty, rtol=0, atol=1e-13)


N = 16384
LARGE = {
    "window": causal() & window(256, 0),
    "dilated": window(64, 64, dilation=16),
    "dilation by head": per_head([window(64, 64, dilation=d) for d in (1, 1, 4, 4)]),
    "strided": causal() & (window(127, 0) | strided(128)),
    "fixed": causal() & fixed(128, 8),
    "global": window(128, 128) | global_tokens(np.arange(0, N, 1024)),
    "rectangles": window_2d((128, 128), 8),
    "random": random_blocks(3, 64, rng=0),
}


@pytest.mark.parametrize("name", LARGE)
def test_at_most_twice_the_pairs_are_executed(name):
    found = masks.plan(LARGE[name], N, N).density()
    assert found.pairs == LARGE[name].compile(N, N).count().pairs
    assert found.pairs <= found.executed <= 2 * found.pairs


def test_counters_are_those_of_the_parts():
    mask = LARGE["strided"]
    x = np.zeros((1, 1, N, 1), np.float32)
    stats = pyattn.attention.forward(x, x, x, mask=masks.plan(mask, N, N))[1].stats
    found = masks.plan(mask, N, N).density()
    assert (stats["pairs"], 4096 * stats["tiles"]) == found[:2]


I, J = np.arange(1500)[:, None], np.arange(1500)[None]
ARRAYS = {
    "keys and queries that are scattered": (
        (abs(I - J) <= 70) | np.isin(J, [5, 700, 1200]) | np.isin(I, [5, 700, 1200]), 3),
    "a stride": ((J <= I) & (((I - J) % 32 == 0) | (I - J < 32)), 2),
    "keys alone": (np.isin(J, RNG.choice(1500, 40, replace=False)) & (I >= 0), 1),
    "blocks": (np.kron(RNG.random((25, 25)) < 0.2, np.ones((60, 60))).astype(bool), 1),
    "no order at all": (RNG.random((1500, 1500)) < 0.02, 1),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_looked_through_for_an_order(name):
    pairs, parts = ARRAYS[name]
    found = masks.plan(dense(pairs), 1500, 1500)
    assert len(found.parts()) == parts
    np.testing.assert_array_equal(times_visited(found.parts(), 1, 1500, 1500)[0], pairs)
    in_place = 4096 * dense(pairs).compile(1500, 1500).count().tiles
    ordered = any(part.queries or part.keys for part in found.parts())
    assert ordered == (name not in ("blocks", "no order at all"))
    assert found.density().executed <= in_place / (1.35 if ordered else 1)


def test_what_is_left_in_place():
    cheap, item = window(3, 3), masks.lengths([5, 9])
    assert len(masks.plan(cheap, 500, 500).parts()) == 1
    assert len(masks.plan(strided(4) & item, 9, 9).parts()) == 1          # a batch axis
    x = normal(2, 1, 300, 4)
    mask = masks.plan(LARGE["strided"], 300, 300)
    for option in ({"segments": [100, 200]}, {"kv_lengths": [300, 100]}):
        right = pyattn.attention(x, x, x, mask=mask.mask, **option)
        np.testing.assert_array_equal(pyattn.attention(x, x, x, mask=mask, **option), right)


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("name", ["strided", "global", "dilated"])
@pytest.mark.usefixtures("always")
def test_no_tokens_or_one(name, n, m):
    mask = masks.plan(MASKS[name](n, m), n, m)
    if not n * m:
        mask = masks.plan(MASKS[name](n, m), n, m)
        planned = planning._parts(mask.mask, n, m, None)
        assert len(planned) == 1
        return
    q, k = normal(1, 1, n, 4), normal(1, 1, m, 4)
    np.testing.assert_allclose(pyattn.attention(q, k, k, mask=mask), k, rtol=0, atol=1e-15)


def test_a_plan_is_a_mask():
    mask = masks.plan(strided(5), 40, 40)
    assert repr(mask) == "plan(strided(5), 40, 40)"
    assert repr(mask & causal()) == "plan(strided(5) & causal(), 40, 40)"
    assert repr(mask & masks.plan(causal(), 40, 40)) == "plan(strided(5) & causal(), 40, 40)"
    assert mask == masks.plan(strided(5), 40, 40)
    np.testing.assert_array_equal(mask.dense(40, 40), strided(5).dense(40, 40))
    np.testing.assert_array_equal((mask | window(1, 1)).dense(40, 40),
                                  (strided(5) | window(1, 1)).dense(40, 40))
    assert mask.compile(40, 40) is strided(5).compile(40, 40)
    with pytest.raises(TypeError):
        _ = mask & True


@pytest.mark.usefixtures("always")
def test_what_is_saved_can_be_moved():
    x, mask = normal(1, 2, 100, 4), MASKS["strided"](100, 100)
    _, saved = pyattn.attention.forward(x, x, x, mask=masks.plan(mask, 100, 100))
    right = saved.backward(x)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(saved)).backward(x).q, right.q)
    with pyattn.use_backend("array_api"):
        np.testing.assert_allclose(saved.backward(x).k, right.k, rtol=0, atol=1e-13)


def test_orders():
    order = residues(10, 4, 3)
    # token i stands at i + 3: those of residue 0 are 1, 5, 9
    np.testing.assert_array_equal(order.index[0], [1, 5, 9])
    np.testing.assert_array_equal(order.index[1], [2, 6, -1])
    assert sorted(order.index[order.index >= 0]) == list(range(10))
    np.testing.assert_array_equal(order.lengths(np.array([10, 6, 0])), [[3, 2, 2, 3], [2, 1, 1, 2],
                                                                        [0, 0, 0, 0]])
    (places,) = order.places(10)
    np.testing.assert_array_equal(order.index.ravel()[places], np.arange(10))
    twice = Order(np.array([[0, 2], [2, 3]]))
    np.testing.assert_array_equal(twice.places(4), [[0, 4, 1, 3], [4, 4, 2, 4]])
