"""Walks over coarse steps, decoded and compared with the mask itself."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from pyattn.kernels.cuda import walk

from pyattn import masks
from pyattn.masks.bits import unpack

TILE = 64


def decode(found, rows, columns, length, across):
    """Booleans (layouts, length, across), each tile set once at most."""
    layouts, lines = found.start.shape[0], found.start.shape[1] - 1
    steps = -(-across // (TILE * columns))
    shape = (layouts, lines * rows, steps * columns)
    tiles = np.zeros((*shape, TILE, TILE), bool)
    touched = np.zeros(shape, bool)
    for layout, line in itertools.product(range(layouts), range(lines)):
        reached = 0
        for run in range(found.start[layout, line], found.start[layout, line + 1]):
            assert found.first[run] >= reached
            reached = found.first[run] + found.count[run]
            for step, place in itertools.product(range(found.count[run]), range(rows * columns)):
                at = found.at[run, place]
                if at == walk.NONE:
                    continue
                row, column = divmod(place, columns)
                where = layout, line * rows + row, (found.first[run] + step) * columns + column
                assert not touched[where]
                touched[where] = True
                name = at if at == walk.FULL else found.names[at + step * columns]
                tiles[where] = True if name < 0 else unpack(found.bits[name][None])[0]
    pairs = tiles.transpose(0, 1, 3, 2, 4).reshape(layouts, shape[1] * TILE, shape[2] * TILE)
    return pairs[:, :length, :across]


def drawn(n, m, *lead, chance=0.5):
    return np.random.default_rng((n, m)).random((*lead, n, m)) < chance


MASKS = {
    "full": lambda n, m: masks.full(),
    "nothing": lambda n, m: ~masks.full(),
    "causal": lambda n, m: masks.causal(),
    "window": lambda n, m: masks.window(100, 30),
    "dilated": lambda n, m: masks.window(5, 5, dilation=20),
    "dense": lambda n, m: masks.dense(drawn(n, m)),
    "tiles": lambda n, m: masks.dense(
        np.kron(drawn(-(-n // TILE), -(-m // TILE)), np.ones((TILE, TILE), bool))[:n, :m]),
    "some tiles partial": lambda n, m: masks.dense(
        np.kron(drawn(-(-n // TILE), -(-m // TILE)), np.ones((TILE, TILE), bool))[:n, :m]
        & drawn(n, m, chance=0.9999)),
    "heads": lambda n, m: masks.per_head([masks.causal(), masks.window(70, 0), masks.full(),
                                          ~masks.full()]),
}


@pytest.mark.parametrize(("n", "m"), [(1, 1), (64, 200), (257, 130), (320, 576), (0, 65), (65, 0)])
@pytest.mark.parametrize("name", MASKS)
def test_a_walk_holds_the_pairs_of_its_mask(name, n, m):
    blocks = MASKS[name](n, m).compile(n, m)
    pairs = blocks.dense()
    layouts = np.zeros((blocks.rows.start.shape[0], n, m), bool)
    layouts[blocks.layout.ravel()] = pairs.reshape(blocks.layout.size, n, m)
    for rows, columns, transposed in itertools.product((1, 2), (1, 2), (False, True)):
        found = walk.coarse(blocks, rows, columns, transposed)
        length, across = (m, n) if transposed else (n, m)
        want = layouts.swapaxes(1, 2) if transposed else layouts
        np.testing.assert_array_equal(decode(found, rows, columns, length, across), want)
        assert found.start[-1, -1] == len(found.first)
        np.testing.assert_array_equal(
            found.steps.ravel(),
            [found.count[a:b].sum() for start in found.start
             for a, b in itertools.pairwise(start)])


def test_the_example_of_the_text():
    found = walk.coarse(masks.causal().compile(256, 256), 2, 2)
    full, none = walk.FULL, walk.NONE
    assert found.first.tolist() == [0, 0, 1]
    kinds = np.minimum(found.at, 0).tolist()
    assert kinds == [[0, none, full, 0], [full] * 4, [0, none, full, 0]]


def test_a_walk_is_kept_with_its_mask():
    blocks = masks.causal().compile(300, 300)
    assert walk.coarse(blocks, 2, 2) is walk.coarse(blocks, 2, 2)
    assert walk.coarse(blocks, 2, 2) is not walk.coarse(blocks, 2, 1)


def test_a_long_mask_takes_what_its_runs_take():
    blocks = masks.causal().compile(2**20, 2**20)
    tracemalloc.start()
    found = walk.coarse(blocks, 2, 2)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.steps.sum() == 2**13 * (2**13 + 1) // 2
    assert most < 40e6
