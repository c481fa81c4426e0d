"""CUDA kernels of selected attention: the launch code and the kernels' text, in the emulator.

What any backend is tested by (test_selected.py) is called here for this one. A C++ compiler is
needed, and without one all of it is skipped.
"""

from __future__ import annotations

import numpy as np
import pytest
import test_selected as rules
from pyattn.kernels.cuda import compile, selected
from table import BFLOAT16, Shape
from test_selected import draw, judge, lists

import pyattn
from pyattn.checks import BackendError
from pyattn.engines import selected as engine

pytestmark = pytest.mark.gate

DTYPES = [np.float16, BFLOAT16, np.float32, np.float64]
NAMES = ["float16", "bfloat16", "float32", "float64"]
SMALL = [Shape((2,), 8, 2, 70, 70, 8, 8), Shape((1,), 16, 1, 90, 150, 16, 24)]
"""Bundles of four tokens, and of one."""
ROWS = (1, 16, 17, 33, 1000)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)


@pytest.fixture(autouse=True)
def device(emulated):
    """The emulator, and one kernel for calls with a softcap and without."""
    emulated.generic = True
    return emulated


def everything(saved, out, dout):
    return out, saved.lse, *saved.backward(dout)


# against the oracle


@every_dtype
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_against_the_rule(shape, dtype):
    judge(draw(shape, dtype), lists(shape, 64), "cuda", block_size=64, causal=True)


@every_dtype
@pytest.mark.parametrize("number", range(len(rules.SHAPES)))
def test_other_shapes(number, dtype, device):
    """Each form of causality in every shape, and in every dtype."""
    shape = rules.SHAPES[number]
    device.seed = 1 + number
    causal = (False, True, "top_left")[(number + DTYPES.index(dtype)) % 3]
    judge(draw(shape, dtype), lists(shape, 64), "cuda", block_size=64, causal=causal)


@pytest.mark.parametrize(("block_size", "dtype"), [
    (1, BFLOAT16), (24, np.float16), (96, np.float32), (1000, np.float64)], ids=str)
def test_blocks_of_any_size(block_size, dtype):
    rules.test_blocks_of_any_size(block_size, "cuda", dtype)


@every_dtype
@pytest.mark.parametrize("block_size", [7, 32, 48, 65, 128])
def test_all_sizes_of_blocks(block_size, dtype):
    rules.test_blocks_of_any_size(block_size, "cuda", dtype)


@pytest.mark.parametrize(("heads", "dtype"), [
    (20, BFLOAT16), (80, np.float32)], ids=str)
def test_many_heads(heads, dtype):
    """More rows than one warp has, and more than a block has."""
    shape = Shape((1,), heads, 1, 9, 129, 8, 16)
    judge(draw(shape, dtype), lists(shape, 64), "cuda", block_size=64, causal=True)


@pytest.mark.parametrize("options", [
    {"kv_lengths": [0, 129]}, {"kv_lengths": [130, 33], "q_lengths": [10, 70], "causal": True},
    {"kv_lengths": [130, 33], "q_lengths": [10, 70], "causal": "top_left"},
    {"q_lengths": [0, 70]}, {"scale": -0.7, "softcap": 1.5, "causal": True}], ids=str)
def test_lengths_and_softcap(options):
    rules.test_lengths_and_softcap(options, 40, "cuda")


@pytest.mark.parametrize(("dtype", "width", "heads"), [
    (np.float16, 64, 2), (BFLOAT16, 128, 16), (BFLOAT16, 192, 64), (BFLOAT16, 256, 16),
    (np.float32, 64, 2), (np.float32, 128, 16), (np.float64, 40, 32), (np.float64, 128, 16)],
    ids=str)
def test_kernels_as_gpus_get_them(dtype, width, heads, device):
    """With a softcap for 16 heads, without one for others."""
    device.generic = False
    shape = Shape((1,), heads, 1, 9, 150, width, min(width, 128))
    for block_size in (16, 64):
        judge(draw(shape, dtype), lists(shape, block_size), "cuda", block_size=block_size,
              softcap=2.0 if heads == 16 else None, causal=True)


def test_values_wider_than_a_launch_sums(device):
    device.generic = False
    shape = Shape((1,), 4, 1, 20, 70, 72, 136)
    judge(draw(shape), lists(shape, 64), "cuda", block_size=64)


@pytest.mark.parametrize("shape", [
    Shape((2,), 2, 1, 0, 5, 4, 4), Shape((2,), 2, 1, 5, 0, 4, 4), Shape((0,), 2, 2, 3, 3, 4, 4),
    Shape((1,), 0, 0, 3, 3, 4, 4)], ids=str)
def test_nothing_at_all(shape):
    rules.test_nothing_at_all(shape, "cuda")


def test_what_any_backend_keeps():
    rules.test_a_token_that_lists_nothing("cuda")
    rules.test_leading_axes_broadcast("cuda")


@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_all_blocks_are_dense(causal):
    for lengths in ((200, 200), (70, 200), (200, 70)):
        rules.test_all_blocks_are_dense(lengths, causal, "cuda")


def test_strided_and_read_only_arguments():
    shape = Shape((2,), 8, 2, 40, 70, 12, 7)
    arrays, blocks = draw(shape), lists(shape, 16)
    found = []
    turned = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in arrays]
    for x in (*turned, blocks):
        x.flags.writeable = False
    for backend, given in (("cpu", arrays), ("cuda", turned)):
        with pyattn.use_backend(backend):
            out, saved = engine.forward(*given, blocks, block_size=16)
            found.append(everything(saved, out, np.broadcast_to(1.0, out.shape)))
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("pair", [("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
def test_one_backends_saved_in_anothers_backward(pair):
    arrays, blocks = draw(SMALL[0]), lists(SMALL[0], 64)
    with pyattn.use_backend(pair[0]):
        out, saved = engine.forward(*arrays, blocks, block_size=64, causal=True)
    found = []
    for backend in pair:
        with pyattn.use_backend(backend):
            found.append(saved.backward(out))
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)


# what is hidden, and what is not a number


@every_dtype
def test_what_is_not_seen_is_never_read(dtype):
    rules.test_what_is_not_seen_is_never_read(24, "cuda", dtype)


@every_dtype
def test_blocks_that_are_not_seen_are_never_read(dtype):
    rules.test_what_is_not_seen_is_never_read(64, "cuda", dtype)


@every_dtype
def test_nan_goes_where_it_is_seen_and_nowhere_else(dtype):
    rules.test_nan_goes_where_it_is_seen_and_nowhere_else("cuda", dtype)


@every_dtype
def test_rows_without_a_finite_score(dtype):
    """They count as rows that see no key, whatever the rest of them and the values hold."""
    shape = Shape((1,), 16, 1, 6, 64, 16, 16)
    q, k, v = draw(shape, dtype)
    dout = np.ones((1, 16, 6, 16), dtype)
    blocks = np.zeros((1, 1, 6, 1), int)
    k[..., 0] = 1
    q[..., 2, 0] = -np.inf
    dout[..., 2, :] = np.nan
    found = []
    for backend in ("cpu", "cuda"):
        with pyattn.use_backend(backend):
            out, saved = engine.forward(q, k, v, blocks, block_size=64)
            found.append(everything(saved, out, dout))
    assert not found[1][0][..., 2, :].any()
    assert (found[1][1][..., 2] == -np.inf).all()
    assert not found[1][2][..., 2, :].any()
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x.astype("f8"), y.astype("f8"), atol=0.25, rtol=0.02)
        assert np.isfinite(y).all() or y.ndim == 3


@every_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "partial"])
def test_inf_with_a_weight_of_0_is_nan(dtype, causal):
    """Whether in full tiles, where the product says so, or in partial ones, where it is added."""
    shape = Shape((1,), 16, 1, 64, 64, 16, 16)
    q, k, v = draw(shape, dtype)
    q[...], k[..., 0] = 0, 0
    q[..., 0], k[..., 10, 0] = 50, -100
    v[..., (10, 11), :2] = np.inf
    dout = np.ones((1, 16, 64, 16), dtype)
    dout[..., 30, :3] = np.inf
    found = []
    for backend in ("cpu", "cuda"):
        with pyattn.use_backend(backend), np.errstate(all="ignore"):
            out, saved = engine.forward(q, k, v, np.zeros((1, 1, 64, 1), int), block_size=64,
                                        causal=causal)
            grads = saved.backward(dout)
            found.append((out, grads.v))
            assert np.isnan(grads.q).any()
            assert np.isnan(grads.k).any()
    for x, y in zip(*found, strict=True):
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        np.testing.assert_array_equal(np.isinf(x), np.isinf(y))
        assert np.isnan(y).any()


# the lists, from both sides


def test_bundles():
    """Two tokens each: 0 lists 1 and 5, 1 lists 1 and 3; 2 lists nothing."""
    blocks = np.array([[[[1, -1, 5], [-1, 1, 3], [-1, -1, -1]]]], np.int16)
    start, block, who = selected.bundles(blocks, 2)
    assert start.tolist() == [[0, 3, 3]]
    assert block.tolist() == [1, 3, 5]
    assert who.tolist() == [0b11, 0b10, 0b01]
    start, block, who = selected.bundles(np.concatenate([blocks, blocks]), 1)
    assert start.tolist() == [[0, 2, 4, 4], [4, 6, 8, 8]]
    assert block.tolist() == [1, 5, 1, 3] * 2
    assert who.tolist() == [1] * 8


def test_bundles_say_what_lists_say():
    for tokens, count in ((1, 3), (3, 5), (16, 4)):
        blocks = np.sort(np.random.default_rng(tokens).permuted(
            np.broadcast_to(np.arange(-2, 9, dtype=np.int16), (2, 3, 50, 11)),
            axis=-1)[..., :count])
        blocks[blocks < 0] = -1
        start, block, who = selected.bundles(blocks, tokens)
        for line, listed in enumerate(blocks.reshape(6, 50, count)):
            for number in range(start.shape[1] - 1):
                own = slice(start[line, number], start[line, number + 1])
                assert (np.diff(block[own]) > 0).all()
                for i, token in enumerate(range(number * tokens, min((number + 1) * tokens, 50))):
                    found = block[own][who[own] >> i & 1 == 1]
                    assert found.tolist() == [x for x in listed[token].tolist() if x >= 0]


def test_pieces():
    found = selected.pieces(np.array([[0, 5, 5], [5, 12, 14]]), 3)
    assert [tuple(x)[:5] for x in found.pieces.tolist()] == [
        (0, 0, 0, 3, -1), (0, 0, 3, 5, 0), (0, 1, 5, 5, -1), (1, 0, 5, 8, -1), (1, 0, 8, 11, 1),
        (1, 0, 11, 12, 2), (1, 1, 12, 14, -1)]
    assert found.divided.tolist() == [[0, 0, 0, 1], [1, 0, 1, 3]]
    assert found.parts == 3


@every_dtype
def test_a_block_that_every_token_lists(dtype, device, monkeypatch):
    monkeypatch.setattr(selected, "PIECE_COLUMNS", 100)
    device.multiprocessors = 100
    shape = Shape((2,), 4, 2, 150, 130, 8, 12)
    blocks = lists(shape, 64)
    blocks[..., 0] = 0
    judge(draw(shape, dtype), blocks, "cuda", block_size=64, causal=True)
    assert [name for name, _ in device.launches].count("selected_join") == 2


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=NAMES[1:3])
def test_the_order_of_threads_and_blocks_changes_no_bit(dtype, device, monkeypatch):
    monkeypatch.setattr(selected, "PIECE_COLUMNS", 64)
    device.multiprocessors = 100
    arrays, blocks = draw(SMALL[1], dtype), lists(SMALL[1], 64)
    found = []
    for device.seed in (0, 1, 2):
        with pyattn.use_backend("cuda"):
            out, saved = engine.forward(*arrays, blocks, block_size=64, causal=True)
            found.append([x.tobytes() for x in everything(saved, out, out)])
    assert found[0] == found[1] == found[2]


# what a device has room for


@pytest.mark.parametrize("shared", [99, 163, 227])
def test_tilings_fit(shared):
    """For any rows there is a tiling where there is one for few, which is what `refuses` asks."""
    room = shared * 1024
    for name in NAMES:
        for width in selected.WIDTHS:
            chunk = selected.chunk_of_values(name, width)
            for found in (
                    [selected.forward_tiling(name, rows, width, chunk, room) for rows in ROWS],
                    [selected.backward_tiling(name, rows, width, width, 64, room, False)
                     for rows in ROWS],
                    [selected.backward_tiling(name, rows, width, width, 64, room, True)
                     for rows in ROWS]):
                assert (None in found) == (found[0] is None)
                for x in found:
                    assert x is None or (x.load % (x.step * x.column_warps) == 0
                                         and x.step >= 16 and x.load <= 32 * x.warps)
    assert selected.forward_tiling("bfloat16", 16, 256, 256, room) is not None


def test_a_device_with_little_shared_memory(device):
    device.shared_memory = 99 * 1024
    for dtype, width in ((BFLOAT16, 128), (np.float32, 128), (np.float64, 64)):
        shape = Shape((1,), 16, 1, 5, 70, width, width)
        judge(draw(shape, dtype), lists(shape, 64), "cuda", block_size=64, causal=True)


def test_what_does_not_fit_is_told(device):
    blocks = np.zeros((4, 1), int)
    q = np.ones((1, 4, 600), np.float32)
    with pyattn.use_backend("cuda"), pytest.raises(BackendError, match="at most 512"):
        engine.forward(q, q, q, blocks, block_size=64)
    device.shared_memory = 99 * 1024
    q = np.ones((1, 4, 512))
    with pyattn.use_backend("cuda"), pytest.raises(BackendError, match="shared memory"):
        engine.forward(q, q, q, blocks, block_size=64)


def planted(name, *mistake, gate=True):
    return pytest.param(mistake, id=name, marks=[pytest.mark.gate] if gate else [])


@pytest.mark.parametrize("mistake", [
    planted("mask", "selected_bundle.cuh", "int(x.x) >= rows[h].seen", "int(x.x) > rows[h].seen"),
    planted("lists", "selected_bundle.cuh", "!(x.y >> rows[h].number & 1)", "!x.y"),
    planted("barrier", "selected_forward.cu", "__syncthreads();            // the next load",
            "// the next load", gate=False),
    planted("slope", "selected.cuh", "(pull - delta) * slope", "(pull - delta)"),
    planted("join", "selected_join.cu", "part < it.last", "part < it.last - 1", gate=False)])
def test_mistakes_are_found(mistake, device, monkeypatch, tmp_path):
    """Each of the judges of this file, on a kernel with a mistake."""
    monkeypatch.setattr(selected, "PIECE_COLUMNS", 8)
    device.multiprocessors = 1000
    file, right, wrong = mistake
    text = (compile.SOURCES / file).read_text()
    assert text.count(right) == 1
    (tmp_path / file).write_text(text.replace(right, wrong))
    device.folders = (tmp_path,)
    shape = Shape((1,), 4, 1, 40, 150, 8, 8)
    with pytest.raises(AssertionError):
        judge(draw(shape), lists(shape, 64), "cuda", block_size=64, causal=True, softcap=2.0)
