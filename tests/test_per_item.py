"""A mask for each batch item."""

import numpy as np
import pytest

import pyattn
from pyattn import masks
from pyattn.checks import DtypeError, ShapeError


def test_each_item_has_its_own_mask():
    parts = [masks.causal(), masks.window(3, 1), masks.causal()]
    blocks = masks.per_item(parts).compile(70, 90)
    assert blocks.layout.shape == (3, 1)
    assert blocks.layout.ravel().tolist() == [0, 1, 0]
    for item, part in enumerate(parts):
        np.testing.assert_array_equal(blocks.dense(70, 90)[item, 0], part.dense(70, 90))


def test_leading_axes_follow_the_batch_axis():
    keys = np.random.default_rng(0).random((2, 4, 5, 6)) < 0.5
    nested = masks.per_item([masks.dense(x) for x in keys])
    assert nested.lead == (2, 4)
    np.testing.assert_array_equal(nested.dense(5, 6), keys)
    heads = masks.per_head([masks.causal(), masks.full()])
    both = masks.per_item([masks.causal(), heads, masks.window(1, 1)])
    assert both.lead == (3, 2)
    np.testing.assert_array_equal(both.dense(5, 6)[1], heads.dense(5, 6))
    np.testing.assert_array_equal(both.dense(5, 6)[2, 1], masks.window(1, 1).dense(5, 6))
    twice = masks.per_item([masks.per_item([masks.causal()] * 3)] * 2)
    assert twice.lead == (2, 3, 1)


def test_it_combines_and_follows_the_offset_of_each_item():
    mask = masks.per_item([masks.global_tokens([0]), masks.global_tokens([2])]) & masks.causal()
    assert mask.lead == (2, 1)
    i, j = np.arange(4)[:, None], np.arange(6)
    for item, (offset, token) in enumerate([(2, 0), (0, 2)]):
        want = ((i + offset == token) | (j == token)) & (j <= i + offset)
        np.testing.assert_array_equal(mask.dense(4, 6, offset=[2, 0])[item, 0], want)


def test_attention_reads_it():
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 3, 9, 4))
    parts = [masks.window(1, 0), masks.window(4, 4)]
    out = pyattn.attention(q, k, v, mask=masks.per_item(parts))
    for item, part in enumerate(parts):
        alone = pyattn.attention(q[item], k[item], v[item], mask=part)
        np.testing.assert_array_equal(out[item], alone)
    with pytest.raises(ShapeError, match="leading axes of mask"):
        pyattn.attention(q, k, v, mask=masks.per_item([*parts, *parts]))


def test_values_decide_equality_and_repr_is_the_expression():
    make = [masks.per_item([masks.causal(), masks.window(w, 0)]) for w in (2, 2, 3)]
    assert make[0] == make[1] != make[2]
    assert make[0].compile(9, 9) is make[1].compile(9, 9)
    assert repr(make[0]) == "per_item([causal(), window(2, 0)])"
    assert masks.per_item([masks.causal()]) != masks.per_head([masks.causal()])


@pytest.mark.parametrize(("parts", "error", "says"), [
    ([], ShapeError, "at least one mask"),
    ([masks.causal(), 3], DtypeError, "item 1 is a int"),
    ([masks.lengths([1, 2]), masks.lengths([1, 2, 3])], ShapeError, "must broadcast"),
])
def test_errors(parts, error, says):
    with pytest.raises(error, match=says):
        masks.per_item(parts)
