"""Attention on grids: Swin, axial and temporal attention, and the layers made of them.

The oracle is dense attention in float64 over pairs that loops over cells spell out.
"""

from __future__ import annotations

import functools
import itertools
import math
import pickle

import numpy as np
import pytest

import pyattn
from pyattn import layers, masks
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.features.windows import region_mask, windows
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
RTOL = {"float64": 1e-12, "float32": 2e-5}


def draw(*shape, seed=0, dtype="f8"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(got, wanted, dtype="float64", name=""):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape, name
    size = max(1.0, abs(wanted[np.isfinite(wanted)]).max(initial=0))
    np.testing.assert_allclose(got, wanted, rtol=RTOL[dtype], atol=RTOL[dtype] * size,
                               err_msg=name)


def dense(q, k, v, allowed, bias=0.0, dout=None, dlse=0.0):
    """Output and lse of textbook attention; with `dout`, gradients of q, k, v and bias instead."""
    q, k, v = (np.asarray(x, "f8") for x in (q, k, v))
    group = q.shape[-3] // k.shape[-3]
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3])
    wide = [np.broadcast_to(np.repeat(x, times, axis=-3), (*batch, q.shape[-3], *x.shape[-2:]))
            for x, times in ((q, 1), (k, group), (v, group))]
    scale = q.shape[-1] ** -0.5
    s = np.where(allowed, wide[0] @ wide[1].swapaxes(-1, -2) * scale + bias, -np.inf)
    top = np.maximum(s.max(-1, keepdims=True), -1e300)
    total = np.exp(s - top).sum(-1, keepdims=True)
    p = np.exp(s - top) / np.where(total > 0, total, 1)
    out = p @ wide[2]
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    if dout is None:
        return out, lse
    dp = dout @ wide[2].swapaxes(-1, -2)
    delta = (dout * out).sum(-1) - np.where(np.isfinite(lse), dlse, 0)
    ds = p * (dp - delta[..., None])
    grads = []
    for x, grad in ((q, ds @ wide[1] * scale), (k, ds.swapaxes(-1, -2) @ wide[0] * scale),
                    (v, p.swapaxes(-1, -2) @ dout)):
        grad = grad.reshape(*grad.shape[:-3], x.shape[-3], -1, *grad.shape[-2:]).sum(-3)
        grads.append(grad.sum(tuple(range(grad.ndim - x.ndim))))
    return *grads, ds


def cells(shape):
    return list(itertools.product(*map(range, shape)))


def sides(value, axes):
    return value if isinstance(value, tuple) else (value,) * axes


def swin_pairs(shape, window, shift):
    """Windows that begin at `shift` and not at 0: no padding, no rolling, no labels."""
    window, shift = sides(window, len(shape)), sides(shift, len(shape))
    if any(side <= reach for side, reach in zip(shape, window, strict=True)):
        shift = (0,) * len(shape)

    def home(cell):
        return tuple((x - s) // w for x, w, s in zip(cell, window, shift, strict=True))

    return np.array([[home(i) == home(j) for j in cells(shape)] for i in cells(shape)])


def table_rows(shape, window):
    """Which row of the table each pair of cells reads, where they share a window."""
    window = sides(window, len(shape))
    rows = np.zeros((math.prod(shape),) * 2, int)
    for (a, i), (b, j) in itertools.product(enumerate(cells(shape)), repeat=2):
        row = 0
        for x, y, w in zip(i, j, window, strict=True):
            row = row * (2 * w - 1) + min(max(x - y + w - 1, 0), 2 * w - 2)
        rows[a, b] = row
    return rows


def table_size(shape, window):
    return math.prod(2 * w - 1 for w in sides(window, len(shape)))


def line_pairs(shape, axis):
    def rest(cell):
        return cell[:axis] + cell[axis + 1:]

    return np.array([[rest(i) == rest(j) for j in cells(shape)] for i in cells(shape)])


def reach(operation, tokens, heads=1, **options):
    """Which keys each query has weight on."""
    q = np.zeros((heads, tokens, 2))
    return operation(q, q, np.broadcast_to(np.eye(tokens), (heads, tokens, tokens)),
                     **options)[0] > 0


# Swin

GRIDS = [
    ((4, 4), 2, 1), ((8, 8), 4, 2), ((8, 8), 4, 0), ((5, 7), 3, 1), ((5, 7), 3, 2), ((7, 5), 2, 0),
    ((3, 9), 4, 2), ((2, 2), 5, 0), ((1, 1), 1, 0), ((10,), 4, 1), ((6, 10), (3, 4), (0, 3)),
    ((4, 5, 6), (2, 3, 2), (1, 1, 0)), ((9, 9), 7, 3),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("shape", "window", "shift"), GRIDS, ids=str)
def test_swin_is_dense_attention_over_shifted_windows(shape, window, shift, dtype, backend):
    n = math.prod(shape)
    q, k, v = (draw(*lead, n, width, seed=seed, dtype=dtype)
               for seed, (lead, width) in enumerate([((2, 4), 5), ((2,), 5), ((2,), 3)]))
    table = draw(table_size(shape, window), 4, seed=3, dtype=dtype)
    dout, dlse = draw(2, 4, n, 3, seed=4, dtype=dtype), draw(2, 4, n, seed=5, dtype=dtype)
    with pyattn.use_backend(backend):
        (out, lse), saved = pyattn.swin_attention.forward(
            q, k, v, table, shape=shape, window=window, shift=shift, return_lse=True)
        grads = saved.backward(dout, dlse)
    pairs, rows = swin_pairs(shape, window, shift), table_rows(shape, window)
    bias = np.moveaxis(table[rows].astype("f8"), -1, 0)
    wanted = dense(q, k, v, pairs, bias)
    close(out, wanted[0], dtype, "out")
    close(lse, wanted[1], dtype, "lse")
    *wanted, ds = dense(q, k, v, pairs, bias, dout, dlse)
    dtable = np.zeros(table.shape)
    np.add.at(dtable, rows, np.moveaxis(ds.sum(0), 0, -1))
    assert grads._fields == ("q", "k", "v", "bias_table")
    for name, got, want in zip(grads._fields, grads, (*wanted, dtable), strict=True):
        close(got, want, dtype, name)
        assert got.dtype == dtype
    assert saved.stats["pairs"] == 2 * 4 * pairs.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "window", "shift"), [
    ((5, 7), 3, 1), ((5, 7), 3, 0), ((6, 6), 3, 1), ((9, 10), 4, 3)])
def test_reference_swin_lets_padding_take_part(shape, window, shift, backend):
    padded = tuple(-(-side // window) * window for side in shape)
    n, whole = math.prod(shape), cells(padded)
    real = np.array([all(x < side for x, side in zip(cell, shape, strict=True)) for cell in whole])
    arrays = [draw(2, n, 4, seed=seed) for seed in range(3)]
    filled = [np.zeros((2, len(whole), 4)) for _ in arrays]
    for x, y in zip(arrays, filled, strict=True):
        y[:, real] = x
    table = draw(table_size(shape, window), 2, seed=3)
    dout = draw(2, n, 4, seed=4)
    with pyattn.use_backend(backend):
        out, saved = pyattn.swin_attention.forward(*arrays, table, shape=shape, window=window,
                                                   shift=shift, reference=True)
        grads = saved.backward(dout)
    # the authors' way: the whole padded grid goes round, and three slices an axis are labelled
    label = np.zeros(padded, int)
    slices = (slice(0, -window), slice(-window, -shift or None),
              slice(-shift or padded[0] + padded[1], None))
    for number, (rows, columns) in enumerate(itertools.product(slices, repeat=2)):
        label[rows, columns] = number
    home = np.array([[cell[0] // window, cell[1] // window] for cell in whole])
    cell = np.roll(np.arange(len(whole)).reshape(padded), (-shift, -shift), (0, 1)).ravel()
    pairs = np.zeros((len(whole),) * 2, bool)
    rows = np.zeros(pairs.shape, int)
    for a, b in itertools.product(range(len(whole)), repeat=2):
        if (home[a] == home[b]).all() and (not shift or label.flat[a] == label.flat[b]):
            pairs[cell[a], cell[b]] = True
            far = np.array(whole[a]) - whole[b] + window - 1
            rows[cell[a], cell[b]] = far[0] * (2 * window - 1) + far[1]
    bias = np.moveaxis(table[rows], -1, 0)
    close(out, dense(*filled, pairs, bias)[0][:, real])
    wide = np.zeros((2, len(whole), 4))
    wide[:, real] = dout
    *wanted, ds = dense(*filled, pairs, bias, wide)
    for got, want in zip(grads[:3], wanted, strict=True):
        close(got, want[:, real])
    dtable = np.zeros(table.shape)
    np.add.at(dtable, rows, np.moveaxis(np.where(pairs, ds, 0), 0, -1))
    close(grads.bias_table, dtable)
    masked = pyattn.swin_attention(*arrays, table, shape=shape, window=window, shift=shift)
    assert np.allclose(out, masked) is bool(real.all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reference", [False, True])
def test_swin_gradients_by_differences(reference, backend):
    arrays = [draw(2, 2, 15, 4, seed=seed) for seed in range(3)]
    with pyattn.use_backend(backend):
        gradcheck(pyattn.swin_attention, *arrays, draw(9, 2), shape=(3, 5), window=2, shift=1,
                  reference=reference, sinks=draw(2), dropout=0.2, rng=1, return_lse=True)


def test_swin_sees_what_is_near_in_a_window():
    """After the roll a window holds pairs that were 5 or more apart, and just those are masked."""
    pairs = reach(pyattn.swin_attention, 64, bias_table=np.zeros((49, 1)), shape=(8, 8), window=4,
                  shift=2)
    cell = np.roll(np.arange(64).reshape(8, 8), (-2, -2), (0, 1))
    home = np.zeros(64, int)
    for rolled in cells((8, 8)):
        home[cell[rolled]] = rolled[0] // 4 * 2 + rolled[1] // 4
    place = np.array(cells((8, 8)))
    far = abs(place[:, None] - place).max(-1)
    together = home[:, None] == home
    assert np.array_equal(pairs, together & (far < 4))
    assert far[together & ~pairs].min() >= 5


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (2, 3, 2)])
def test_a_window_over_the_whole_grid_is_dense_attention_with_bias(shape):
    n = math.prod(shape)
    q, k, v = (draw(2, n, 4, seed=seed) for seed in range(3))
    table = draw(table_size(shape, 5), 2, seed=3)
    out = pyattn.swin_attention(q, k, v, table, shape=shape, window=5, shift=2)
    bias = np.moveaxis(table[table_rows(shape, 5)], -1, 0)
    close(out, pyattn.attention(q, k, v, bias=np.ascontiguousarray(bias)))


def test_two_layers_connect_neighbours_across_windows_when_the_second_is_shifted():
    plain, shifted = (reach(pyattn.swin_attention, 64, bias_table=np.zeros((49, 1)), shape=(8, 8),
                            window=4, shift=shift).astype(int) for shift in (0, 2))
    one, other = 3, 4                                          # of row 0, in different windows
    assert not (plain @ plain)[one, other]
    assert (shifted @ plain)[one, other]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["array", "per head", "mask"])
def test_a_mask_over_the_grid_is_intersected(case, backend):
    shape, n = (5, 7), 35
    mask = {"array": draw(2, 1, n, n) < 0.3, "per head": draw(2, 1, n) < 0.5,
            "mask": masks.causal()}[case]
    q, k, v, dout = (draw(2, 2, n, 4, seed=seed) for seed in range(4))
    seen = np.tri(n, dtype=bool) if case == "mask" else mask
    table = draw(25, 2)
    bias = np.moveaxis(table[table_rows(shape, 3)], -1, 0)
    calls = [(swin_pairs(shape, 3, 1), bias, functools.partial(
                  pyattn.swin_attention.forward, q, k, v, table, shape=shape, window=3, shift=1)),
             (line_pairs(shape, 1), 0, functools.partial(
                  pyattn.axial_attention.forward, q, k, v, shape=shape, axes=[1])),
             (line_pairs(shape, 0), 0, functools.partial(
                  pyattn.temporal_attention.forward, q, k, v, frames=5))]
    for pairs, bias, call in calls:
        with pyattn.use_backend(backend):
            out, saved = call(mask=mask)
            grads = saved.backward(dout)
        close(out, dense(q, k, v, pairs & seen, bias)[0])
        for got, want in zip(grads[:3], dense(q, k, v, pairs & seen, bias, dout)[:3], strict=True):
            close(got, want)


def test_leading_axes_broadcast():
    q, k, v = draw(3, 2, 12, 4), draw(2, 12, 4, seed=1), draw(1, 2, 12, 4, seed=2)
    dout = draw(3, 2, 12, 4, seed=3)
    calls = {
        "swin": (pyattn.swin_attention, {"bias_table": np.zeros((9, 2)), "shape": (3, 4),
                                         "window": 2, "shift": 1}),
        "axial": (pyattn.axial_attention, {"shape": (3, 4), "mode": "sequential"}),
        "temporal": (pyattn.temporal_attention, {"frames": 3})}
    for name, (operation, options) in calls.items():
        out, saved = operation.forward(q, k, v, **options)
        grads = saved.backward(dout)
        wide = [np.broadcast_to(x, q.shape) for x in (q, k, v)]
        want, same = operation.forward(*wide, **options)
        close(out, want, name=name)
        for x, got, full in zip((q, k, v), grads[:3], same.backward(dout)[:3], strict=True):
            assert got.shape == x.shape
            close(got, full if x is q else full.sum(0).reshape(x.shape), name=name)


def test_cost_is_linear_in_cells():
    tiles = []
    for side in (32, 64, 128):
        q = np.zeros((2, side * side, 1), np.float32)
        _, saved = pyattn.swin_attention.forward(q, q, q, np.zeros((225, 2)), shape=(side, side),
                                                 window=8, shift=4)
        tiles.append(saved.stats["tiles"])
    assert tiles == [2 * (side // 8) ** 2 for side in (32, 64, 128)]


def test_masks_of_windows_are_made_once():
    made = [region_mask(windows((8, 12), (4, 4), (2, 2)), False) for _ in range(2)]
    assert made[0] is made[1]
    assert region_mask(windows((8, 12), (4, 4), (0, 0)), False) is None
    layout = made[0].compile(16, 16).layout
    assert len(np.unique(layout)) == 4         # inside, at either edge, in the corner


# axial

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mode", ["sum", "sequential"])
@pytest.mark.parametrize(("shape", "axes"), [
    ((4, 5), None), ((5, 3), [1]), ((3, 2, 4), [2, 0]), ((6,), [0]), ((2, 66), [-1, 0]),
    ((1, 1), None)])
def test_axial_is_dense_attention_over_lines(shape, axes, mode, causal, dtype, backend):
    n, order = math.prod(shape), [*range(len(shape))] if axes is None else axes
    heads = 2 if mode == "sequential" else 1
    q, k, v = (draw(*lead, n, width, seed=seed, dtype=dtype) for seed, (lead, width) in
               enumerate([((3, 2), 5), ((3, heads), 5), ((3, heads), 4)]))
    dout = draw(3, 2, n, 4, seed=3, dtype=dtype)
    with pyattn.use_backend(backend):
        out, saved = pyattn.axial_attention.forward(q, k, v, shape=shape, axes=axes, mode=mode,
                                                    causal=causal)
        grads = saved.backward(dout)
    pairs = [line_pairs(shape, axis % len(shape)) & (np.tri(n, dtype=bool) | (not causal))
             for axis in order]
    values = [v.astype("f8")]
    if mode == "sum":
        wanted = sum(dense(q, k, v, allowed)[0] for allowed in pairs)
        each = [dense(q, k, v, allowed, dout=dout)[:3] for allowed in pairs]
        want = [sum(parts) for parts in zip(*each, strict=True)]
    else:
        for allowed in pairs:
            values.append(dense(q, k, values[-1], allowed)[0])
        wanted, want, dv = values[-1], [0, 0], dout
        for allowed, value in zip(pairs[::-1], values[-2::-1], strict=True):
            dq, dk, dv, _ = dense(q, k, value, allowed, dout=dv)
            want = [want[0] + dq, want[1] + dk]
        want = [*want, dv]
    close(out, wanted, dtype, "out")
    assert grads._fields == ("q", "k", "v")
    for name, got, gradient in zip("qkv", grads, want, strict=True):
        close(got, gradient, dtype, name)
        assert got.dtype == dtype
    assert saved.stats["pairs"] == 3 * 2 * sum(allowed.sum() for allowed in pairs)


@pytest.mark.parametrize("mode", ["sum", "sequential"])
def test_axial_along_one_axis_is_attention_itself(mode):
    q, k, v = (draw(2, 9, 4, seed=seed) for seed in range(3))
    close(pyattn.axial_attention(q, k, v, shape=(9,), mode=mode, causal=True),
          pyattn.attention(q, k, v, causal=True))


def test_axial_reach():
    along = [reach(pyattn.axial_attention, 12, shape=(3, 4), axes=[axis]) for axis in (0, 1)]
    for axis in (0, 1):
        assert np.array_equal(along[axis], line_pairs((3, 4), axis))
    both = {mode: reach(pyattn.axial_attention, 12, shape=(3, 4), mode=mode)
            for mode in ("sum", "sequential")}
    assert np.array_equal(both["sum"], along[0] | along[1])
    assert both["sequential"].all()
    causal = reach(pyattn.axial_attention, 12, shape=(3, 4), mode="sequential", causal=True)
    place = np.array(cells((3, 4)))
    assert np.array_equal(causal, (place[:, None] >= place).all(-1))


@pytest.mark.parametrize("mode", ["sum", "sequential"])
def test_axial_gradients_by_differences(mode):
    arrays = [draw(2, 2, 12, 4, seed=seed) for seed in range(3)]
    _, saved = pyattn.axial_attention.forward(*arrays, shape=(3, 4), mode=mode, dropout=0.3, rng=1)
    assert sorted(saved.decisions) == ["0.dropout_seed", "1.dropout_seed"]
    assert len(set(map(int, saved.decisions.values()))) == 2
    gradcheck(pyattn.axial_attention, *arrays, shape=(3, 4), mode=mode, dropout=0.3, rng=1,
              sinks=draw(2), alibi_slopes=abs(draw(2)))


def test_axial_tiles_grow_with_the_sides():
    counts = []
    for side in (64, 128, 256):
        q = np.zeros((1, side * side, 1), np.float32)
        _, saved = pyattn.axial_attention.forward(q, q, q, shape=(side, side))
        counts.append(saved.stats["pairs"])
    assert counts == [2 * side ** 3 for side in (64, 128, 256)]


# temporal

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("frames", "places"), [(1, 3), (5, 4), (66, 2), (7, 1)])
@pytest.mark.parametrize(("window", "causal"), [(None, False), (0, False), (1, False), (2, True),
                                                ((1, 0), False)])
def test_temporal_is_dense_attention_over_frames(frames, places, window, causal, dtype, backend):
    n = frames * places
    q, k, v = (draw(2, heads, n, 4, seed=seed, dtype=dtype)
               for seed, heads in enumerate((4, 2, 2)))
    dout, dlse = draw(2, 4, n, 4, seed=3, dtype=dtype), draw(2, 4, n, seed=4, dtype=dtype)
    with pyattn.use_backend(backend):
        (out, lse), saved = pyattn.temporal_attention.forward(
            q, k, v, frames=frames, window=window, causal=causal, return_lse=True)
        grads = saved.backward(dout, dlse)
    left, right = window if isinstance(window, tuple) else (n if window is None else window,) * 2

    def sees(i, j):
        ago = i // places - j // places
        return i % places == j % places and -(0 if causal else right) <= ago <= left

    pairs = np.array([[sees(i, j) for j in range(n)] for i in range(n)])
    for name, got, want in zip(("out", "lse"), (out, lse), dense(q, k, v, pairs), strict=True):
        close(got, want, dtype, name)
    for name, got, want in zip("qkv", grads, dense(q, k, v, pairs, 0.0, dout, dlse)[:3],
                               strict=True):
        close(got, want, dtype, name)
    assert saved.stats["pairs"] == 2 * 4 * pairs.sum()


def test_a_window_of_all_frames_is_no_window_and_frames_may_be_permuted():
    q, k, v = (draw(2, 12, 4, seed=seed) for seed in range(3))
    out = pyattn.temporal_attention(q, k, v, frames=4)
    assert np.array_equal(out, pyattn.temporal_attention(q, k, v, frames=4, window=3))
    order = np.array([2, 0, 3, 1])
    moved = [x.reshape(2, 4, 3, 4)[:, order].reshape(2, 12, 4) for x in (q, k, v)]
    close(pyattn.temporal_attention(*moved, frames=4),
          out.reshape(2, 4, 3, 4)[:, order].reshape(2, 12, 4))


# what all of them promise

CALLS = {
    "swin": (pyattn.swin_attention, {"bias_table": draw(9, 2).astype("f4")},
             {"shape": (3, 5), "window": 2, "shift": 1}),
    "swin-reference": (pyattn.swin_attention, {"bias_table": draw(9, 2).astype("f4")},
                       {"shape": (3, 5), "window": 2, "shift": 1, "reference": True}),
    "axial-sum": (pyattn.axial_attention, {}, {"shape": (3, 5)}),
    "axial-sequential": (pyattn.axial_attention, {}, {"shape": (3, 5), "mode": "sequential"}),
    "temporal": (pyattn.temporal_attention, {}, {"frames": 5, "window": 1}),
}


@pytest.mark.parametrize("case", CALLS)
def test_records_are_data_and_arguments_are_left_alone(case):
    operation, more, options = CALLS[case]
    arrays = {**dict(zip("qkv", draw(3, 2, 2, 15, 4, dtype="f4"), strict=True)), **more}
    for x in arrays.values():
        x.flags.writeable = False
    out, saved = operation.forward(**arrays, **options)
    dout = draw(*out.shape, seed=1, dtype="f4")
    dout.flags.writeable = False
    first = saved.backward(dout)
    for again in (saved.backward(dout), pickle.loads(pickle.dumps(saved)).backward(dout)):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(out, operation(**arrays, **options))
    strided = {name: np.asfortranarray(x) for name, x in arrays.items()}
    close(operation(**strided, **options), out, "float32")


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
@pytest.mark.parametrize("case", CALLS)
def test_other_array_libraries_give_the_same_numbers(case, library):
    xp = pytest.importorskip(library)
    operation, more, options = CALLS[case]
    arrays = {**dict(zip("qkv", draw(3, 2, 2, 15, 4, dtype="f4"), strict=True)), **more}
    dout = draw(2, 2, 15, 4, seed=1, dtype="f4")
    out, saved = operation.forward(**arrays, **options)
    got, other = operation.forward(**{name: xp.asarray(np.array(x)) for name, x in arrays.items()},
                                   **options)
    assert type(got) is type(xp.asarray(dout))
    close(got, out, "float32")
    for name, a, b in zip(other.backward(xp.asarray(dout))._fields,
                          other.backward(xp.asarray(dout)), saved.backward(dout), strict=True):
        close(a, b, "float32", name)


X = np.ones((2, 6, 4))
TABLE = np.zeros((9, 2))


@pytest.mark.parametrize(("error", "match", "call"), [
    (ShapeError, r"k must be .* with 6 tokens, the cells of shape \(2, 3\); got \(2, 5, 4\)",
     lambda: pyattn.swin_attention(X, X[:, :5], X, TABLE, shape=(2, 3), window=2)),
    (ShapeError, r"bias_table must have shape \(9, 2\).*got \(8, 2\)",
     lambda: pyattn.swin_attention(X, X, X, TABLE[1:], shape=(2, 3), window=2)),
    (OptionError, "shift must be less than window; got 2 and 2",
     lambda: pyattn.swin_attention(X, X, X, TABLE, shape=(2, 3), window=2, shift=2)),
    (OptionError, "shift must be at least 0",
     lambda: pyattn.swin_attention(X, X, X, TABLE, shape=(2, 3), window=2, shift=-1)),
    (OptionError, "window must be one integer, or one for each of the 2 axes",
     lambda: pyattn.swin_attention(X, X, X, TABLE, shape=(2, 3), window=(2,))),
    (OptionError, "shape must be at least 1",
     lambda: pyattn.swin_attention(X, X, X, TABLE, shape=(0, 3), window=2)),
    (OptionError, "shape must have at least one axis",
     lambda: pyattn.axial_attention(X, X, X, shape=())),
    (OptionError, "causal cannot be given here: windows have",
     lambda: pyattn.swin_attention(X, X, X, TABLE, shape=(2, 3), window=2, causal=True)),
    (OptionError, "mask must be left out with reference=True",
     lambda: pyattn.swin_attention(X, X, X, TABLE, shape=(2, 3), window=2, reference=True,
                                   mask=np.ones((6, 6), bool))),
    (DtypeError, "bias_table must be one of float16",
     lambda: pyattn.swin_attention(X, X, X, TABLE.astype(int), shape=(2, 3), window=2)),
    (OptionError, "axes must be one or more of the 2 axes of shape, none twice",
     lambda: pyattn.axial_attention(X, X, X, shape=(2, 3), axes=[0, -2])),
    (OptionError, "axes must be one or more",
     lambda: pyattn.axial_attention(X, X, X, shape=(2, 3), axes=[2])),
    (OptionError, "axes must be one or more",
     lambda: pyattn.axial_attention(X, X, X, shape=(2, 3), axes=[])),
    (OptionError, "mode must be one of 'sum', 'sequential'; got 'mean'",
     lambda: pyattn.axial_attention(X, X, X, shape=(2, 3), mode="mean")),
    (OptionError, "return_lse cannot be given here: every axis has a softmax",
     lambda: pyattn.axial_attention(X, X, X, shape=(2, 3), return_lse=True)),
    (ShapeError, "k must have the heads of q where axes are taken in sequence",
     lambda: pyattn.axial_attention(X, X[:1], X[:1], shape=(2, 3), mode="sequential")),
    (ShapeError, "a multiple of frames = 4; got",
     lambda: pyattn.temporal_attention(X, X, X, frames=4)),
    (OptionError, "frames must be at least 1",
     lambda: pyattn.temporal_attention(X, X, X, frames=0)),
    (OptionError, "bias cannot be given here: every place has",
     lambda: pyattn.temporal_attention(X, X, X, frames=2, bias=np.zeros((6, 6)))),
])
def test_errors_name_the_argument_the_rule_and_what_was_given(error, match, call):
    with pytest.raises(error, match=match):
        call()


# layers


def unsettled(params, seed=0):
    """Parameters none of which is 0 or 1, so that none can be forgotten unnoticed."""
    rng = np.random.default_rng(seed)
    if isinstance(params, dict):
        return {name: unsettled(x, rng) for name, x in params.items()}
    if isinstance(params, list):
        return [unsettled(x, rng) for x in params]
    return params + 0.3 * rng.standard_normal(params.shape)


def swin_params(window=2, width=4):
    return unsettled(layers.init_swin_block(0, width, num_heads=2, window=window, dtype="f8"))


ENCODER = {"patch": 2, "num_heads": (1, 2), "window": 2}


def encoder_params(image=(6, 10)):
    return unsettled(layers.init_swin(0, image=image, channels=1, width=4, depths=(2, 1),
                                      dtype="f8", **ENCODER))


def video_params():
    return unsettled(layers.init_timesformer_block(0, 4, num_heads=2, dtype="f8"))


LAYERS = {
    "swin_block": (layers.swin_block, {"x": draw(2, 4, 6, 4), "params": swin_params()},
                   {"num_heads": 2, "window": 2, "shift": 1}),
    "swin_block-padded": (layers.swin_block, {"x": draw(3, 5, 4), "params": swin_params()},
                          {"num_heads": 2, "window": 2, "shift": 1, "activation": "silu"}),
    "swin_block-reference": (layers.swin_block, {"x": draw(3, 5, 4), "params": swin_params()},
                             {"num_heads": 2, "window": 2, "shift": 1, "reference": True}),
    "swin_block-small": (layers.swin_block, {"x": draw(1, 2, 3, 4), "params": swin_params()},
                         {"num_heads": 2, "window": 4, "shift": 2, "dropout": 0.2, "rng": 1}),
    "patch_merging": (layers.patch_merging, {"x": draw(2, 4, 6, 3), "gamma": draw(12),
                                             "beta": draw(12), "w": draw(12, 5)}, {}),
    "patch_merging-odd": (layers.patch_merging, {"x": draw(3, 5, 3), "gamma": draw(12),
                                                 "beta": draw(12), "w": draw(12, 5)}, {}),
    "swin": (layers.swin, {"images": draw(2, 6, 10, 1), "params": encoder_params()},
             {**ENCODER, "dropout": 0.1, "rng": 2}),
    "timesformer_block": (layers.timesformer_block, {"x": draw(2, 13, 4), "params": video_params()},
                          {"frames": 3, "num_heads": 2}),
    "timesformer_block-window": (
        layers.timesformer_block, {"x": draw(9, 4), "params": video_params()},
        {"frames": 4, "num_heads": 2, "window": 1, "dropout": 0.2, "rng": 1}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_gradients_of_layers_by_differences(case):
    operation, arguments, options = LAYERS[case]
    found = gradcheck(operation, **arguments, **options)
    def count(x):
        return sum(map(count, x.values() if isinstance(x, dict) else x)) \
            if isinstance(x, dict | list) else 1
    assert len(found.arguments) == count(arguments)


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
@pytest.mark.parametrize("case", [name for name, (*_, o) in LAYERS.items() if "dropout" not in o])
def test_layers_on_other_array_libraries(case, library):
    xp = pytest.importorskip(library)
    operation, arguments, options = LAYERS[case]

    def moved(x):
        if isinstance(x, dict):
            return {name: moved(item) for name, item in x.items()}
        return [moved(item) for item in x] if isinstance(x, list) else xp.asarray(x)

    def flat(x):
        parts = x.values() if isinstance(x, dict) else x
        return [leaf for item in parts for leaf in flat(item)] \
            if isinstance(x, dict | list | tuple) else [x]

    out, saved = operation.forward(**arguments, **options)
    got, other = operation.forward(**moved(arguments), **options)
    np.testing.assert_allclose(np.asarray(got), out, rtol=1e-9, atol=1e-9)
    for a, b in zip(flat(other.backward(xp.asarray(out))), flat(saved.backward(out)), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-8, atol=1e-8 * abs(b).max())


@pytest.mark.parametrize("image", [(4, 6), (3, 5), (7, 4)])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_swin_block_is_a_transformer_block_around_swin_attention(image, shift):
    """Cutting into windows before the projections is cutting q, k and v."""
    params, x = swin_params(), draw(2, *image, 4)
    rest = {name: w for name, w in params.items() if name != "bias_table"}
    tokens = x.reshape(2, -1, 4)
    wanted, same = layers.transformer_block.forward(
        tokens, rest, num_heads=2, attention=pyattn.swin_attention, shape=image, window=2,
        shift=shift, bias_table=params["bias_table"])
    out, saved = layers.swin_block.forward(x, params, num_heads=2, window=2, shift=shift)
    close(out, wanted.reshape(x.shape))
    grads, others = saved.backward(out), same.backward(wanted)
    close(grads.x, others.x.reshape(x.shape))
    close(grads.params["bias_table"], others.bias_table)
    for name in rest:
        close(grads.params[name], others.params[name], name=name)


def test_a_reference_block_pads_behind_the_norm():
    """There padded cells have the biases of the projections for their keys and values."""
    params, x = swin_params(), draw(3, 5, 4)
    padded = np.zeros((4, 6, 4))
    padded[:3, :5] = layer_norm(x, params["norm1_gamma"], params["norm1_beta"])
    found = layers.multi_head(
        padded.reshape(24, 4), *(params[name] for name in ("w_qkv", "w_o", "b_qkv", "b_o")),
        num_heads=2, attention=pyattn.swin_attention, shape=(4, 6), window=2, shift=1,
        bias_table=params["bias_table"])
    middle = x + found.reshape(4, 6, 4)[:3, :5]
    fed = layers.feed_forward(layer_norm(middle, params["norm2_gamma"], params["norm2_beta"]),
                              *(params[name] for name in ("w1", "b1", "w2", "b2")))
    close(layers.swin_block(x, params, num_heads=2, window=2, shift=1, reference=True),
          middle + fed)


def test_a_swin_block_shrinks_its_window_to_the_shorter_side():
    params, x = swin_params(window=3), draw(3, 7, 4)
    options = {"num_heads": 2}
    assert np.array_equal(layers.swin_block(x, params, window=8, shift=4, **options),
                          layers.swin_block(x, params, window=3, shift=0, **options))


@pytest.mark.parametrize("image", [(4, 6), (5, 3), (1, 1)])
def test_patch_merging_takes_squares_column_by_column(image):
    x, w = draw(*image, 2), draw(8, 3)
    half = tuple(-(-side // 2) for side in image)
    wanted = np.zeros((*half, 3))
    for row, column in cells(half):
        square = []
        for right, down in itertools.product((0, 1), repeat=2):
            r, c = 2 * row + down, 2 * column + right
            square += [0, 0] if r >= image[0] or c >= image[1] else [*x[r, c]]
        square = np.array(square)
        normal = (square - square.mean()) / np.sqrt(square.var() + 1e-5)
        wanted[row, column] = normal @ w
    close(layers.patch_merging(x, np.ones(8), np.zeros(8), w), wanted)


def test_a_hierarchy_of_56_28_and_14():
    options = {"patch": 4, "num_heads": (1, 1, 2), "window": 7}
    params = layers.init_swin(0, image=(224, 224), channels=1, width=2, depths=(1, 2, 1), **options)
    images = draw(224, 224, 1, dtype="f4")
    out, saved = layers.swin.forward(images, params, **options)
    assert out.shape == (14, 14, 8)
    found = [stage[0].layout.shape for stage in saved.stages]
    assert found == [(56, 56), (28, 28), (14, 14)]
    # in the middle of the second block's windows the first block's meet
    shifts = [block.layout for block in saved.stages[1]]
    assert shifts == [windows((28, 28), (7, 7), (s, s)) for s in (0, 3)]
    assert saved.backward(out).images.shape == images.shape


def test_swin_replays_its_decisions():
    operation, arguments, options = LAYERS["swin"]
    out, saved = operation.forward(**arguments, **options)
    assert sorted(saved.decisions) == [f"{i}.dropout_seed" for i in range(3)]
    again = {**options, "rng": 7, "decisions": saved.decisions}
    assert np.array_equal(out, operation(**arguments, **again))


def layer_norm(x, gamma, beta):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gamma + beta


def self_attention(x, params, prefix, heads=2):
    """One sequence (N, C), by the textbook."""
    n, width = x.shape
    qkv = x @ params[f"{prefix}w_qkv"] + params[f"{prefix}b_qkv"]
    q, k, v = qkv.reshape(n, 3, heads, width // heads).transpose(1, 2, 0, 3)
    out = dense(q, k, v, np.ones((n, n), bool))[0]
    return out.swapaxes(0, 1).reshape(n, width) @ params[f"{prefix}w_o"] + params[f"{prefix}b_o"]


def timesformer_by_loops(x, params, frames, temporal=True):
    cls, video = x[0], x[1:].reshape(frames, -1, x.shape[-1]).copy()
    if temporal:
        for place in range(video.shape[1]):
            line = layer_norm(video[:, place], params["temporal_norm_gamma"],
                              params["temporal_norm_beta"])
            found = self_attention(line, params, "temporal_")
            video[:, place] += found @ params["w_temporal"] + params["b_temporal"]
    total = np.zeros_like(cls)
    for t in range(frames):
        tokens = np.concatenate([cls[None], video[t]])
        found = self_attention(layer_norm(tokens, params["norm1_gamma"], params["norm1_beta"]),
                               params, "")
        total += found[0] / frames
        video[t] = video[t] + found[1:]
    m = np.concatenate([(cls + total)[None], video.reshape(-1, x.shape[-1])])
    fed = layers.feed_forward(layer_norm(m, params["norm2_gamma"], params["norm2_beta"]),
                              *(params[name] for name in ("w1", "b1", "w2", "b2")))
    return m + fed


def test_timesformer_by_loops():
    params, x = video_params(), draw(2, 13, 4)
    out = layers.timesformer_block(x, params, frames=3, num_heads=2)
    for item in range(2):
        close(out[item], timesformer_by_loops(x[item], params, 3))
    assert np.array_equal(out, layers.timesformer_block(x, params, frames=3, num_heads=2, window=2))
    assert not np.allclose(
        out, layers.timesformer_block(x, params, frames=3, num_heads=2, window=1))


def test_timesformer_without_its_temporal_map_is_spatial_only():
    params, x = video_params(), draw(13, 4)
    params |= {name: 0 * params[name] for name in ("w_temporal", "b_temporal")}
    close(layers.timesformer_block(x, params, frames=3, num_heads=2),
          timesformer_by_loops(x, params, 3, temporal=False))
    fresh = layers.init_timesformer_block(0, 4, num_heads=2, first=False)
    assert not fresh["w_temporal"].any()


def test_timesformer_frames_may_be_permuted():
    params, x = video_params(), draw(13, 4)
    order = np.array([2, 0, 1])

    def moved(x):
        return np.concatenate([x[:1], x[1:].reshape(3, 4, 4)[order].reshape(12, 4)])

    close(layers.timesformer_block(moved(x), params, frames=3, num_heads=2),
          moved(layers.timesformer_block(x, params, frames=3, num_heads=2)))


@pytest.mark.parametrize(("error", "match", "call"), [
    (OptionError, r"missing \['bias_table'\], unknown \['table'\]", lambda: layers.swin_block(
        draw(4, 4, 4), {"table" if n == "bias_table" else n: w for n, w in swin_params().items()},
        num_heads=2, window=2)),
    (ShapeError, r"bias_table must have shape \(25, 2\), for windows of side 3",
     lambda: layers.swin_block(draw(4, 4, 4), swin_params(), num_heads=2, window=3)),
    (OptionError, "shift must be less than window", lambda: layers.swin_block(
        draw(4, 4, 4), swin_params(), num_heads=2, window=2, shift=2)),
    (ShapeError, r"x must be \(..., R, S, C\)", lambda: layers.swin_block(
        draw(4, 4), swin_params(), num_heads=2, window=2)),
    (ShapeError, r"x must be \(..., R, S, C\)", lambda: layers.patch_merging(
        draw(4, 4), np.ones(16), np.ones(16), np.eye(16))),
    (ShapeError, r"gamma must have shape", lambda: layers.patch_merging(
        draw(4, 4, 2), np.ones(4), np.ones(4), np.eye(8))),
    (OptionError, "num_heads must have an entry for each of 2 stages", lambda: layers.swin(
        draw(6, 10, 1), encoder_params(), **{**ENCODER, "num_heads": (2,)})),
    (OptionError, "depths and num_heads must have an entry for each stage", lambda:
        layers.init_swin(0, image=(8, 8), patch=2, width=4, depths=(1, 1), num_heads=(1,),
                         window=2)),
    (ShapeError, r"x must be \(..., 1 \+ frames \* places, C\) for 5 frames; got \(13, 4\)",
     lambda: layers.timesformer_block(draw(13, 4), video_params(), frames=5, num_heads=2)),
    (OptionError, "missing .'w_temporal'", lambda: layers.timesformer_block(
        draw(13, 4), {n: w for n, w in video_params().items() if n != "w_temporal"}, frames=3,
        num_heads=2)),
])
def test_errors_of_layers(error, match, call):
    with pytest.raises(error, match=match):
        call()
