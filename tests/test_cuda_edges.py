"""CUDA kernels of attention over listed keys: launch code and the kernels' text, in the emulator.

What any backend is tested by (test_edges.py, test_graph.py and others) is called here for this.
`generic` devices get kernels that serve many widths; some tests take the kernels as GPUs get them.
Without a C++ compiler all of it is skipped.
"""

from __future__ import annotations

import contextlib

import numpy as np
import oracle
import pytest
import scipy.sparse as sp
import test_binary_partition
import test_edges as rules
import test_graph
import test_top_k
from pyattn.kernels.cuda import compile, edges
from table import BFLOAT16, Shape
from test_edges import draw, judge, lists

import pyattn
from pyattn import dispatch
from pyattn.checks import BackendError
from pyattn.engines import edges as engine
from pyattn.engines.edges import Edges

pytestmark = pytest.mark.gate

DTYPES = [np.float16, BFLOAT16, np.float32, np.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: np.dtype(x).name)
SMALL = Shape((2,), 4, 2, 33, 47, 20, 13)
SHARED = Shape((1,), 6, 1, 21, 30, 20, 13)
"""Six heads share a list: the last run of them is shorter than the others."""


@pytest.fixture(autouse=True)
def device(emulated):
    """The emulator, and kernels for all widths up to a few."""
    emulated.generic = True
    return emulated


@pytest.fixture
def short_pieces(device, monkeypatch):
    """Lists of more than 12 entries are cut: two steps."""
    monkeypatch.setattr(edges, "PIECE_EDGES", 12)
    device.multiprocessors = 1000


def names(device):
    return [name for name, _ in device.launches]


# against the oracle


@every_dtype
@pytest.mark.parametrize("kind", ["one", "item", "group", "head"])
def test_against_the_rule(kind, dtype):
    judge(*draw(SMALL, dtype), lists(SMALL, kind), "cuda")


@every_dtype
@pytest.mark.parametrize("shape", rules.SHAPES, ids=str)
def test_other_shapes(shape, dtype, device):
    for kind in ("one", "group", "head"):
        device.seed += 1
        judge(*draw(shape, dtype), lists(shape, kind), "cuda", softcap=1.5)


@every_dtype
def test_heads_that_share_a_list(dtype, device):
    edges = lists(SHARED, "group")
    judge(*draw(SHARED, dtype), edges, "cuda")
    judge(*draw(SHARED, dtype), edges, "cuda", softcap=2.0,
          bias=np.random.default_rng(0).standard_normal((1, 6, len(edges.key)), np.float32))


@pytest.mark.parametrize(("wide", "softcap", "dtype"), [
    ((False, False), None, np.float32), ((True, False), 1.5, np.float64),
    ((False, True), 1.5, np.float32), ((True, True), None, np.float64)])
def test_bias(wide, softcap, dtype):
    rules.test_bias(wide, softcap, "cuda", dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_may_be_the_bias_alone(dtype):
    rules.test_scores_may_be_the_bias_alone("cuda", dtype)


def test_heads_of_a_group_may_have_other_lists(short_pieces):
    rules.test_heads_of_a_group_may_have_other_lists("cuda")


@pytest.mark.parametrize("shape", rules.EMPTY, ids=str)
def test_nothing_to_do(shape):
    rules.test_nothing_to_do(shape, "cuda")


@pytest.mark.parametrize(("dtype", "d", "e", "heads"), [
    (np.float16, 8, 8, 1), (BFLOAT16, 64, 64, 4), (BFLOAT16, 136, 272, 2), (np.float32, 33, 64, 2),
    (np.float32, 256, 130, 1), (np.float64, 48, 8, 4), (np.float64, 512, 3, 1)], ids=str)
def test_kernels_as_gpus_get_them(dtype, d, e, heads, device):
    device.generic = False
    shape = Shape((1,), heads, 1, 9, 50, d, e)
    judge(*draw(shape, dtype), lists(shape, "one"), "cuda", softcap=2.0)


@pytest.mark.parametrize(("dtype", "width"), [(BFLOAT16, 8), (np.float32, 40)], ids=str)
def test_bias_alone_as_gpus_get_it(dtype, width, device):
    device.generic = False
    shape = Shape((1,), 2, 2, 9, 50, 1, width)
    edges = lists(shape, "head")
    bias = np.random.default_rng(0).standard_normal((1, 2, len(edges.key)), np.float32)
    judge(None, None, draw(shape, dtype)[2], edges, "cuda", bias=bias, scale=1.0)


def test_strided_and_read_only_arguments():
    rules.test_strided_and_read_only_arguments("cuda")


@pytest.mark.parametrize("pair", [("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
def test_one_backends_saved_in_anothers_backward(pair):
    edges = lists(SMALL, "group")
    with pyattn.use_backend(pair[0]):
        out, saved = engine.forward(*draw(SMALL), edges)
    found = []
    for backend in pair:
        with pyattn.use_backend(backend):
            found.append(saved.backward(out))
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)


# what is not listed, and what is not a number


def test_what_no_list_names_has_no_say():
    rules.test_what_no_list_names_has_no_say("cuda")


def test_keys_behind_a_bias_of_minus_infinity_have_no_say():
    rules.test_keys_behind_a_bias_of_minus_infinity_have_no_say("cuda")


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")   # the oracle's
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_listed_keys_that_are_not_finite_follow_the_formula(bad):
    rules.test_listed_keys_that_are_not_finite_follow_the_formula(bad, "cuda")


def test_what_queries_without_keys_hold_has_no_say():
    rules.test_what_queries_without_keys_hold_has_no_say("cuda")


@every_dtype
def test_rows_without_a_finite_score(dtype):
    """They count as rows that see no key, as on the CPU, whatever is in their own rows."""
    q, k, v = draw(SMALL, dtype)
    dout = np.ones((2, 4, 33, 13), dtype)
    k[..., 0] = 1
    q[..., 3, 0] = -np.inf
    dout[..., 3, :] = np.nan
    edges, found = lists(SMALL, "group"), []
    for backend in ("cpu", "cuda"):
        with pyattn.use_backend(backend):
            out, saved = engine.forward(q, k, v, edges)
            found.append((out, saved.lse, *saved.backward(dout)))
    out, lse, dq = found[1][:3]
    assert not out[..., 3, :].any()
    assert (lse[..., 3] == -np.inf).all()
    assert not dq[..., 3, :].any()
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x.astype("f8"), y.astype("f8"), atol=0.25, rtol=0.02)


# long lists


@every_dtype
def test_long_lists_are_done_in_pieces(dtype, short_pieces, device):
    edges = lists(SMALL, "group")
    judge(*draw(SMALL, dtype), edges, "cuda")
    assert names(device).count("edges_join") == 4       # out; dq, dk, dv


def test_pieces_that_see_nothing(short_pieces):
    """A hub whose first entries are all masked, and one that sees nothing at all."""
    edges = lists(SMALL, "item")
    bias = np.zeros((1, 1, len(edges.key)))
    for i, count in ((3, 20), (23, 47)):
        bias[..., edges.start[0, i]:edges.start[0, i] + count] = -np.inf
    saved = judge(*draw(SMALL), edges, "cuda", bias=bias)
    assert not saved.out[0, :, 23].any()
    assert np.isfinite(saved.lse[0, :, 3]).all()


def test_pieces():
    """Two lists of three rows; a line of each, and one of both."""
    start = np.array([[0, 5, 5, 7], [7, 9, 16, 17]])
    found = edges.pieces(start, np.array([[0], [1]]), 3)
    assert [tuple(x) for x in found.pieces.tolist()] == [
        (0, 0, 0, 3), (0, 0, 3, 2), (1, 0, 0, 3), (1, 0, 3, 3), (1, 0, 6, 1)]
    assert found.start.tolist() == [0, 2, 5]
    assert [tuple(x) for x in found.divided.tolist()] == [(0, 0, 2), (1, 0, 3)]
    assert found.divided_start.tolist() == [0, 1, 2]
    assert found.slots == 3
    found = edges.pieces(start, np.array([[1, 0]]), 4)
    assert [tuple(x) for x in found.pieces.tolist()] == [
        (0, 0, 0, 4), (0, 1, 2, 3), (1, 0, 0, 4), (1, 0, 4, 3)]
    assert [tuple(x) for x in found.divided.tolist()] == [(0, 0, 2), (1, 2, 4)]


def test_lists_that_are_all_short_have_no_pieces():
    found = edges.pieces(np.array([[0, 2, 4]]), np.array([[0]]), 2)
    assert (len(found.pieces), found.slots, found.start.tolist()) == (0, 0, [0, 0])


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=["bfloat16", "float32"])
def test_the_order_of_threads_and_blocks_changes_no_bit(dtype, short_pieces, device):
    edges, found = lists(SHARED, "group"), []
    for device.seed in (0, 1, 2):
        with pyattn.use_backend("cuda"):
            out, saved = engine.forward(*draw(SHARED, dtype), edges)
            found.append([x.tobytes() for x in (out, saved.lse, *saved.backward(out))])
    assert found[0] == found[1] == found[2]


def test_lists_are_copied_to_the_device_once(device, monkeypatch):
    copied, constant = [], device.constant
    monkeypatch.setattr(device, "constant", lambda x: copied.append(x) or constant(x))
    edges = lists(SMALL, "group")
    for _ in range(2):
        with pyattn.use_backend("cuda"):
            out, saved = engine.forward(*draw(SMALL), edges)
            saved.backward(out)
        count, copied[:] = len(copied), []
    assert count == 0


# the variants that are built on these lists


@pytest.fixture
def preferred(monkeypatch):
    """CUDA where it has kernels for NumPy arrays, without being forced."""
    monkeypatch.setitem(dispatch.PREFERENCE, "numpy", ("cuda", "cpu", "array_api"))
    monkeypatch.setattr(pyattn, "use_backend", lambda name: contextlib.nullcontext())


@every_dtype
def test_graph_attention(dtype, device):
    shape, rng = Shape((2,), 4, 2, 21, 21, 20, 13), np.random.default_rng(0)
    graphs = [test_graph.random_graph(21, 21, seed) for seed in range(2)]
    kinds = [test_graph.typed(graph, 5, seed) for seed, graph in enumerate(graphs)]
    table = rng.standard_normal((6, 4)).astype(dtype)
    table[2] = -np.inf                  # a type that masks
    test_graph.judge(*draw(shape, dtype), graphs, "cuda", self_loops=True, table=table,
                     types=[x for _, x, _ in kinds], given=[x for x, _, _ in kinds], softcap=2.0)
    assert "edges_backward_keys" in names(device)


def gat(h, a_query, a_key, allowed, dout, r, slope=0.2):
    """Output and gradients of `gat_attention`: its scores are made and undone here."""
    h, a_query, a_key = (x.astype(r.work) for x in (h, a_query, a_key))
    score = r((h * a_query[:, None]).sum(-1))[..., None] + r((h * a_key[:, None]).sum(-1))[
        ..., None, :]
    steep = np.where(score > 0, 1, slope)
    none = np.zeros((*h.shape[:-1], 1))
    problem = oracle.Dense(none, none, h, np.ones(h.shape[-3]), allowed, bias=r(score * steep))
    found = oracle.backward(problem, dout, np.zeros(h.shape[:-1]), r)
    dscore = found["bias"] * steep
    left, right = dscore.sum(-1)[..., None], dscore.sum(-2)[..., None]
    dh = found["v"] + left * a_query[:, None] + right * a_key[:, None]
    axes = (0, 2)
    return oracle.forward(problem, r)[0], {
        "h": dh, "a_query": (left * h).sum(axes), "a_key": (right * h).sum(axes)}


@every_dtype
def test_gat_attention(dtype, device):
    rng = np.random.default_rng(0)
    h, dout = rng.standard_normal((2, 2, 3, 21, 13)).astype(dtype)
    a_query, a_key = rng.standard_normal((2, 3, 13)).astype(dtype)
    graph = test_graph.random_graph(21, 21)
    with pyattn.use_backend("cuda"):
        out, saved = pyattn.gat_attention.forward(h, a_query, a_key, graph)
        grads = saved.backward(dout)
    allowed = test_graph.pattern(graph, True)
    exact, rough = (gat(h, a_query, a_key, allowed, dout, r)
                    for r in (oracle.exact(dtype), oracle.plain(dtype)))
    oracle.assert_close(out, exact[0], rough[0], factor=2, name="out", dtype=dtype)
    for name, x in grads._asdict().items():
        oracle.assert_close(x, exact[1][name], rough[1][name], factor=3, name=name, dtype=dtype)
    assert "edges_backward_keys" in names(device)


@every_dtype
def test_bp_attention(dtype, device):
    shape = Shape((2,), 4, 2, 19, 26, 20, 13)
    if np.dtype(dtype).itemsize > 2:
        test_binary_partition.judge(*draw(shape, dtype), "cuda", 2, levels=2)
    else:
        # means of keys are rounded there, which the oracle has not
        found = []
        for backend in ("cpu", "cuda"):
            with pyattn.use_backend(backend):
                out, saved = pyattn.bp_attention.forward(*draw(shape, dtype), step=2)
                found.append((out, saved.attended.lse, *saved.backward(out)))
        for x, y in zip(*found, strict=True):
            unit = float(np.finfo("f4").eps if x.dtype == np.float32 else 2.0**-10
                         if dtype == np.float16 else 2.0**-7)
            x, y = x.astype("f8"), y.astype("f8")
            assert abs(x - y).max() <= 2 * unit * abs(x).max()
    assert "edges_backward_keys" in names(device)


@every_dtype
def test_top_k_attention(dtype, preferred, device):
    shape = Shape((2,), 4, 2, 19, 40, 20, 13)
    test_top_k.judge(*draw(shape, dtype), "cuda", 7, softcap=2.0)
    assert "edges_backward_keys" in names(device)


# what a device has room for


def test_tilings_have_room_for_all_widths():
    for name, item in (("float16", 2), ("bfloat16", 2), ("float32", 4), ("float64", 8)):
        for width in (1, 7, 8, 63, 64, 65, 128, 200, 256, 512):
            for heads in (1, 2, 3, 64):
                for backward in (False, True):
                    found = edges.tiling(name, width, 9, heads, backward)
                    for chunks, own in ((found.d_chunks, width), (found.e_chunks, 9)):
                        assert found.lanes * chunks * 16 // item >= own
                    assert found.heads <= 4
                    assert found.at_once >= 1
    assert edges.tiling("bfloat16", 64, 64, 8, False) == (8, 1, 1, 4, 2, 2)
    assert edges.tiling("float32", 0, 8, 1, True) == (2, 0, 1, 1, 4, 4)


def test_what_does_not_fit_is_told():
    q = np.ones((1, 3, 600), np.float32)
    with pyattn.use_backend("cuda"), pytest.raises(BackendError, match="at most 512"):
        pyattn.graph_attention(q, q, q, sp.csr_array((3, 3)))


def planted(name, *mistake):
    return pytest.param(mistake, id=name)


@pytest.mark.parametrize("mistake", [
    planted("end of a list", "edges.cuh", "listed.entry[u] < task.of.count",
            "listed.entry[u] <= task.of.count"),
    planted("rescaling", "edges_forward.cu", "total[r] *= kept;", "total[r] *= 1;"),
    planted("teams", "edges.cuh", "for (int apart = LANES; apart < 32; apart *= 2)\n        x +=",
            "for (int apart = LANES; apart < 16; apart *= 2)\n        x +="),
    planted("slope", "edges_backward_queries.cu", ": dscore * slope", ": dscore"),
    planted("kept", "edges_backward_keys.cu", "kept[edge[u]]", "kept[query[u]]"),
    planted("join", "edges_join.cu", "int part = it.first; part < it.last; part++) {",
            "int part = it.first; part < it.last - 1; part++) {")])
def test_mistakes_are_found(mistake, short_pieces, device, tmp_path):
    """Each of the judges of this file, on a kernel with a mistake."""
    file, right, wrong = mistake
    text = (compile.SOURCES / file).read_text()
    assert text.count(right) == 1
    (tmp_path / file).write_text(text.replace(right, wrong))
    device.folders = (tmp_path,)
    with pytest.raises(AssertionError):
        judge(*draw(SMALL), lists(SMALL, "group"), "cuda", softcap=2.0)


def test_no_lists_at_all_are_read(device):
    """Queries with empty lists only."""
    none = Edges(np.zeros((1, 4), np.int64), np.zeros(0, np.int32), np.zeros((1, 2), np.int32), 5)
    q, k, v = draw(Shape((1,), 2, 1, 3, 5, 20, 13))
    with pyattn.use_backend("cuda"):
        out, saved = engine.forward(q, k, v, none)
        grads = saved.backward(np.ones_like(out))
    assert not any(x.any() for x in (out, *grads))
