"""Which connections are cut while training, and how many."""

from __future__ import annotations

import numpy as np
import pytest

import pyattn
from pyattn.checks import OptionError, ShapeError
from pyattn.features import (
    connection_importance,
    prune,
    prune_weights,
    pruning_schedule,
    update_importance,
)

RNG = np.random.default_rng


def test_the_schedule_is_cubic_between_its_ends():
    assert pruning_schedule(0, 10, initial=0.2, final=0.9) == pytest.approx(0.2)
    assert pruning_schedule(10, 10, initial=0.2, final=0.9) == pytest.approx(0.9)
    assert pruning_schedule(25, 10, initial=0.2, final=0.9) == pytest.approx(0.9)
    for step in range(11):
        wanted = 0.9 + (0.2 - 0.9) * (1 - step / 10) ** 3
        assert pruning_schedule(step, 10, initial=0.2, final=0.9) == pytest.approx(wanted)
    assert all(pruning_schedule(step, 7, final=0.0) == 0 for step in range(9))


def top_by_sorting(importance, sparsity):
    """Row by row."""
    kept = np.zeros(importance.shape, bool)
    count = max(1, importance.shape[-1] - int(np.floor(sparsity * importance.shape[-1])))
    for index in np.ndindex(importance.shape[:-1]):
        row = list(importance[index])
        for j in sorted(range(len(row)), key=lambda j: (-row[j], j))[:count]:
            kept[*index, j] = True
    return kept


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_the_top_of_each_row_is_kept(sparsity):
    importance = RNG(0).integers(0, 5, (2, 3, 20, 30)).astype(float)
    found = prune(importance, sparsity).dense(20, 30)
    assert (found == top_by_sorting(importance, sparsity)).all()
    assert (found.sum(-1) >= 1).all()
    blocks = prune(importance, sparsity, block_size=4).dense(78, 120)
    assert (blocks[..., ::4, ::4] == top_by_sorting(importance, sparsity)).all()


def test_nan_counts_as_least():
    assert prune(np.array([[np.nan, 1.0, 0.0]]), 0.4).dense(1, 3).tolist() == [[False, True, True]]


def test_nothing_is_pruned_at_sparsity_0():
    q, k, v = RNG(0).standard_normal((3, 2, 40, 8))
    mask = prune(connection_importance(q, k, kind="weight"), 0.0)
    np.testing.assert_allclose(pyattn.attention(q, k, v, mask=mask), pyattn.attention(q, k, v),
                               rtol=0, atol=1e-13)


def test_pruned_pairs_get_no_gradient():
    q, k, v = RNG(0).standard_normal((3, 1, 40, 8))
    importance = RNG(1).random((1, 40, 40))
    importance[..., 7] = -1
    out, saved = pyattn.attention.forward(q, k, v, mask=prune(importance, 0.5))
    grads = saved.backward(np.ones_like(out))
    assert (grads.k[0, 7] == 0).all()
    assert (grads.v[0, 7] == 0).all()


def test_blocks_that_are_pruned_are_not_visited():
    x = np.zeros((1, 640, 4), np.float32)
    mask = prune(RNG(0).random((1, 10, 10)), 0.7, block_size=64)
    assert pyattn.attention.forward(x, x, x, mask=mask)[1].stats["tiles"] == 30


@pytest.mark.parametrize("size", [1, 3, 16, 100])
@pytest.mark.parametrize("kind", ["weight", "gradient"])
def test_importance_by_the_dense_formulas(kind, size):
    rng = RNG(0)
    q, k, v = (rng.standard_normal((2, h, n, w)) for h, n, w in ((4, 70, 8), (2, 83, 8),
                                                                (2, 83, 5)))
    dout, mask = rng.standard_normal((2, 4, 70, 5)), rng.random((70, 83)) < 0.6
    mask[5] = False
    found = connection_importance(q, k, v, dout, kind=kind, block_size=size, mask=mask)
    k, v = (np.repeat(x, 2, axis=1) for x in (k, v))
    p = np.exp(q @ np.swapaxes(k, -1, -2) / np.sqrt(8)) * mask
    p = p / np.where(p.sum(-1, keepdims=True) == 0, 1, p.sum(-1, keepdims=True))
    if kind == "gradient":
        p = abs(p * (dout @ np.swapaxes(v, -1, -2)))
    wanted = np.array([[[[p[b, h, r:r + size, c:c + size].mean() for c in range(0, 83, size)]
                         for r in range(0, 70, size)] for h in range(4)] for b in range(2)])
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-14)


def test_importance_of_weights_is_that_of_the_engine():
    q, k, v = RNG(0).standard_normal((3, 2, 50, 8))
    causal = pyattn.masks.causal()
    weights = pyattn.attention.forward(q, k, v, mask=causal, return_weights=True)[0][1]
    found = connection_importance(q, k, kind="weight", mask=causal)
    np.testing.assert_allclose(found, weights, rtol=0, atol=1e-13)


def test_importance_is_averaged_over_steps():
    first, second = RNG(0).random((2, 3, 4))
    held = update_importance(update_importance(None, first), second, decay=0.7)
    np.testing.assert_allclose(held, 0.7 * first + 0.3 * second)
    with pytest.raises(ShapeError, match="one shape"):
        update_importance(first, second[:2])


@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens(n):
    q = np.ones((2, n, 4))
    found = connection_importance(q, q, q, q)
    assert found.shape == (2, n, n)
    assert prune(found, 0.5).dense(n, n).all()


def test_weights_of_largest_magnitude():
    w = RNG(0).standard_normal((30, 20)).astype(np.float32)
    for sparsity in (0.0, 0.25, 1.0):
        kept = prune_weights(w, sparsity)
        assert kept.shape == w.shape
        assert kept.sum() == 600 - int(sparsity * 600)
        if 0 < sparsity < 1:
            assert abs(w[kept]).min() >= abs(w[~kept]).max()


def test_training_goes_on_while_connections_are_cut():
    """A step: importance from the gradient, averaged, and ever fewer pairs."""
    q, k, v = RNG(0).standard_normal((3, 2, 32, 8))
    held, mask, pairs = None, None, []
    for step in range(5):
        out, saved = pyattn.attention.forward(q, k, v, mask=mask)
        pairs.append(saved.stats["pairs"])
        held = update_importance(held, connection_importance(q, k, v, out - v, mask=mask))
        mask = prune(held, pruning_schedule(step, 4, final=0.75))
        q = q - 0.1 * saved.backward(out - v).q
    assert pairs[0] == 2 * 32 * 32
    assert pairs[-1] < pairs[2] < pairs[0]
    assert pyattn.attention.forward(q, k, v, mask=mask)[1].stats["pairs"] == 2 * 32 * 8


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: pruning_schedule(0, 0, final=0.5), OptionError, "steps"),
    (lambda: pruning_schedule(0, 1, final=1.5), OptionError, r"final must lie in 0\.\.1"),
    (lambda: prune(np.ones((2, 2)), -0.1), OptionError, "sparsity"),
    (lambda: prune(np.ones(2), 0.1), ShapeError, "importance must be"),
    (lambda: connection_importance(np.ones((1, 2, 2)), np.ones((1, 2, 2))), OptionError,
     "takes v and dout"),
    (lambda: connection_importance(np.ones((1, 2, 2)), np.ones((1, 2, 3)), kind="weight"),
     ShapeError, "one width"),
    (lambda: prune_weights(np.ones(3), 2), OptionError, "sparsity"),
])
def test_what_does_not_fit_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
