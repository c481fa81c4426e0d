"""Attention along the edges of a graph, against dense formulas and torch."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
import scipy.sparse as sp
from table import Shape

import pyattn
from pyattn.checks import DtypeError, OptionError, ShapeError
from pyattn.testing import gradcheck

BACKENDS = ["cpu", "array_api"]
FORMATS = ["csr", "csc", "coo", "lil", "dok", "bsr"]
SHAPES = [Shape((2,), 4, 2, 40, 40, 20, 13), Shape((), 2, 2, 9, 9, 8, 8),
          Shape((2, 2), 3, 1, 17, 17, 16, 16)]


def draw(s, dtype=np.float64):
    rng = np.random.default_rng([s.n, s.m])
    return tuple(rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e)))


def random_graph(n, m, seed=0, density=0.15):
    """A graph with isolated queries, and a hub."""
    rng = np.random.default_rng([seed, n, m])
    held = rng.random((n, m)) < density
    held[::5] = False
    held[3] = True
    row, column = np.nonzero(held)
    return sp.csr_array((rng.standard_normal(row.size), (row, column)), shape=(n, m))


def pattern(graph, self_loops):
    """bool (N, M), read entry by entry."""
    allowed = np.zeros(graph.shape, bool)
    csr = graph.tocsr()
    for i in range(csr.shape[0]):
        for at in range(csr.indptr[i], csr.indptr[i + 1]):
            allowed[i, csr.indices[at]] = True
        if self_loops:
            allowed[i, i] = True
    return allowed


def typed(graph, count, seed=1):
    """Types of the edges as a sparse array, as dense (N, M) with -1 for none, and in order."""
    csr = graph.tocsr()
    types = np.random.default_rng(seed).integers(0, count, csr.nnz)
    whole = np.full(csr.shape, -1)
    for i in range(csr.shape[0]):
        for at in range(csr.indptr[i], csr.indptr[i + 1]):
            whole[i, csr.indices[at]] = types[at]
    return sp.csr_array((types, csr.indices, csr.indptr), shape=csr.shape), whole, types


def judge(q, k, v, graphs, backend, *, self_loops, table=None, types=None, given=None,
          softcap=None):
    """`graphs` and `types` are what is given; the rule is spelled out pair by pair."""
    dtype, rng = q.dtype, np.random.default_rng(7)
    with pyattn.use_backend(backend):
        (out, lse), saved = pyattn.graph_attention.forward(
            q, k, v, graphs, table, edge_type=given, self_loops=self_loops, softcap=softcap,
            return_lse=True)
        dout = rng.standard_normal(out.shape).astype(dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        grads = saved.backward(dout, dlse)
    several = isinstance(graphs, list)
    items = [pattern(g, self_loops) for g in (graphs if several else [graphs])]
    lead = q.shape[:-3] if several else ()
    allowed = np.stack(items).reshape(*lead, 1, *items[0].shape)
    bias = number = None
    if table is not None:
        number = np.stack(types if several else [types]).reshape(*lead, *items[0].shape)
        rows = np.concatenate([table, np.zeros((1, table.shape[1]), table.dtype)])
        bias = np.moveaxis(rows[number], -1, -3)
        bias = np.broadcast_to(bias, (*q.shape[:-1], k.shape[-2]))
    problem = oracle.Dense(q, k, v, np.full(q.shape[-3], q.shape[-1] ** -0.5), allowed,
                           bias=bias, softcap=softcap)
    found = []
    for r in (oracle.exact(dtype), oracle.plain(dtype)):
        want = oracle.backward(problem, dout, dlse, r)
        if table is not None:
            ds = np.moveaxis(want["bias"], -3, -1)
            number = np.broadcast_to(number, ds.shape[:-1])
            want["bias_table"] = np.stack([ds[number == t].sum(axis=0)
                                           for t in range(len(table))])
        found.append((*oracle.forward(problem, r), want))
    exact, rough = found
    oracle.assert_close(out, exact[0], rough[0], factor=2, name="out", dtype=dtype)
    oracle.assert_close(lse, exact[1], rough[1], factor=2, name="lse", dtype=lse.dtype)
    for name, x in grads._asdict().items():
        oracle.assert_close(x, exact[2][name], rough[2][name], factor=3, name=name)
    return saved, allowed


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16],
                         ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("self_loops", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_rule(shape, self_loops, backend, dtype):
    graph = random_graph(shape.n, shape.m)
    saved, allowed = judge(*draw(shape, dtype), graph, backend, self_loops=self_loops)
    assert saved.stats["pairs"] == allowed.sum() * shape.heads * np.prod(shape.batch, dtype=int)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_bias_by_type(softcap, several, backend, dtype):
    shape, rng = SHAPES[0], np.random.default_rng(0)
    table = rng.standard_normal((6, shape.heads)).astype(dtype)
    table[2] = -np.inf                  # a type that masks
    graphs = [random_graph(shape.n, shape.m, seed) for seed in range(2)]
    kinds = [typed(g, 5, seed) for seed, g in enumerate(graphs)]
    given = [sparse for sparse, _, _ in kinds] if several else kinds[0][2]
    judge(*draw(shape, dtype), graphs if several else graphs[0], backend, self_loops=True,
          table=table, types=[x for _, x, _ in kinds] if several else kinds[0][1], given=given,
          softcap=softcap)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_for_each_item(backend):
    shape = SHAPES[2]
    graphs = [random_graph(shape.n, shape.m, seed) for seed in range(4)]
    judge(*draw(shape), graphs, backend, self_loops=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_keys_than_queries(backend):
    shape = Shape((2,), 4, 2, 20, 33, 8, 8)
    judge(*draw(shape), random_graph(20, 33), backend, self_loops=False)


@pytest.mark.parametrize("name", FORMATS)
def test_any_format_with_stored_zeros(name):
    shape = SHAPES[1]
    q, k, v = draw(shape)
    graph = random_graph(shape.n, shape.m)
    want = pyattn.graph_attention(q, k, v, graph)
    converted = graph.asformat(name)
    if name == "bsr":                   # blocks of 1, or zeros would be stored
        converted = graph.tobsr((1, 1))
    assert np.array_equal(pyattn.graph_attention(q, k, v, converted), want)
    zeros = sp.csr_array((np.zeros(graph.nnz), graph.indices, graph.indptr), shape=graph.shape)
    assert np.array_equal(pyattn.graph_attention(q, k, v, zeros), want)
    assert np.array_equal(pyattn.graph_attention(q, k, v, sp.csr_matrix(graph)), want)
    zeros.eliminate_zeros()
    assert np.array_equal(pyattn.graph_attention(q, k, v, zeros), v)


def test_unsorted_and_repeated_entries():
    q, k, v = draw(SHAPES[1])
    data, key, start = np.arange(4), np.array([5, 2, 5, 0]), np.array([0, 3] + [4] * 8)
    messy = sp.csr_array((data, key, start), shape=(9, 9))
    row, column = [0, 0, 1], [2, 5, 0]
    clean = sp.csr_array((np.ones(3), (row, column)), shape=(9, 9))
    assert np.array_equal(pyattn.graph_attention(q, k, v, messy),
                          pyattn.graph_attention(q, k, v, clean))
    table = np.random.default_rng(0).standard_normal((4, 2))
    # of an entry that is stored twice, the first has the type
    biased = pyattn.graph_attention(q, k, v, messy, table, edge_type=data)
    types = sp.csr_array((np.array([1, 0, 3]), (row, column)), shape=(9, 9))
    want = pyattn.graph_attention(q, k, v, clean, table, edge_type=types)
    assert np.array_equal(biased, want)
    # a sparse array of types may store its entries in another order than the graph
    turned = sp.csr_array((np.ones(3), np.array([5, 2, 0]), np.array([0, 2] + [3] * 8)),
                          shape=(9, 9))
    assert np.array_equal(pyattn.graph_attention(q, k, v, turned, table, edge_type=types), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_complete_graph_is_dense_attention(backend):
    q, k, v = draw(SHAPES[0])
    with pyattn.use_backend(backend):
        out, saved = pyattn.graph_attention.forward(q, k, v, sp.csr_array(np.ones((40, 40))))
        want, dense = pyattn.attention.forward(q, k, v)
        np.testing.assert_allclose(out, want, atol=1e-13)
        for x, y in zip(saved.backward(out), dense.backward(out), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-13)


def test_relabelling_the_nodes_relabels_the_output():
    shape, rng = SHAPES[0], np.random.default_rng(0)
    q, k, v = draw(shape)
    graph = random_graph(shape.n, shape.m)
    sparse, _, _ = typed(graph, 4)
    table = rng.standard_normal((4, shape.heads))
    new = rng.permutation(shape.n)
    out, saved = pyattn.graph_attention.forward(q, k, v, graph, table, edge_type=sparse)
    moved, again = pyattn.graph_attention.forward(
        q[..., new, :], k[..., new, :], v[..., new, :], graph[new][:, new], table,
        edge_type=sparse[new][:, new])
    np.testing.assert_allclose(moved, out[..., new, :], atol=1e-13)
    for name, x in saved.backward(out)._asdict().items():
        own = getattr(again.backward(moved), name)
        np.testing.assert_allclose(own, x if name == "bias_table" else x[..., new, :], atol=1e-12)


def test_nodes_without_edges():
    q, k, v = draw(SHAPES[1])
    empty = sp.csr_array((9, 9))
    out, saved = pyattn.graph_attention.forward(q, k, v, empty, self_loops=False)
    assert not out.any()
    assert not any(x.any() for x in saved.backward(np.ones_like(out)))
    np.testing.assert_allclose(pyattn.graph_attention(q, k, v, empty), v)


def test_gradients_stay_on_the_edges():
    q, k, v = draw(Shape((), 1, 1, 6, 6, 4, 4))
    graph = sp.csr_array((np.ones(2), ([0, 1], [2, 3])), shape=(6, 6))
    _, saved = pyattn.graph_attention.forward(q, k, v, graph, self_loops=False)
    dout = np.zeros_like(q)
    dout[..., 0, :] = 1
    grads = saved.backward(dout)
    for x, seen in ((grads.q, 0), (grads.k, 2), (grads.v, 2)):
        assert not np.delete(x, seen, axis=-2).any()


def test_finite_differences():
    shape, rng = SHAPES[1], np.random.default_rng(0)
    q, k, v = draw(shape)
    graph = random_graph(shape.n, shape.m)
    table = rng.standard_normal((3, shape.heads))
    gradcheck(pyattn.graph_attention, q, k, v, graph, table, edge_type=typed(graph, 3)[0],
              softcap=2.0, return_lse=True)
    a_query, a_key = rng.standard_normal((2, shape.groups, shape.d))
    gradcheck(pyattn.gat_attention, k, a_query, a_key, graph)


GAT = [(SHAPES[0], False), (SHAPES[0], True), (SHAPES[1], False), (SHAPES[2], True)]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("self_loops", [False, True])
@pytest.mark.parametrize(("shape", "several"), GAT)
def test_gat_against_torch(shape, several, self_loops, backend, dtype):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    h = rng.standard_normal((*shape.batch, shape.heads, shape.n, shape.d))
    a_query, a_key = rng.standard_normal((2, shape.heads, shape.d))
    items = int(np.prod(shape.batch, dtype=int))
    graphs = [random_graph(shape.n, shape.n, seed) for seed in range(items if several else 1)]
    with pyattn.use_backend(backend):
        given = [x.astype(dtype) for x in (h, a_query, a_key)]
        out, saved = pyattn.gat_attention.forward(
            *given, graphs if several else graphs[0], negative_slope=0.3, self_loops=self_loops)
        dout = rng.standard_normal(out.shape).astype(dtype)
        grads = saved.backward(dout)

    t = [torch.tensor(x, requires_grad=True) for x in (h, a_query, a_key)]
    score = torch.nn.functional.leaky_relu(
        (t[0] * t[1][:, None]).sum(-1)[..., :, None] + (t[0] * t[2][:, None]).sum(-1)[..., None, :],
        0.3)
    allowed = np.stack([pattern(g, self_loops) for g in graphs])
    allowed = allowed.reshape(*(shape.batch if several else ()), 1, shape.n, shape.n)
    allowed = torch.tensor(allowed)
    weights = torch.softmax(score.masked_fill(~allowed, -torch.inf), -1)
    weights = torch.where(allowed.any(-1, keepdim=True), weights, 0.0)
    want = weights @ t[0]
    want.backward(torch.tensor(dout.astype("f8")))
    tight = 1e-10 if dtype == np.float64 else 2e-5
    np.testing.assert_allclose(out, want.detach().numpy(), atol=tight)
    for x, like in zip(grads, t, strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(x, like.grad.numpy(), atol=tight * 30)


def test_gat_of_isolated_nodes_is_zero():
    h = np.ones((2, 5, 3))
    out = pyattn.gat_attention(h, h[:, 0], h[:, 0], sp.csr_array((5, 5)), self_loops=False)
    assert not out.any()


@pytest.mark.parametrize("batch", [(), (0,), (2,)])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_small_graphs(n, batch):
    x = np.ones((*batch, 2, n, 4))
    graph = sp.csr_array((n, n))
    a = np.ones((2, 4))
    graphs = [graph] * int(np.prod(batch, dtype=int))
    for given in (graph, graphs):
        out, saved = pyattn.graph_attention.forward(x, x, x, given)
        assert np.array_equal(out, x)
        assert saved.backward(out).k.shape == x.shape
        out, saved = pyattn.gat_attention.forward(x, a, a, given)
        assert np.array_equal(out, x)
        assert saved.backward(out).a_key.shape == a.shape


def test_arrays_of_another_library():
    q, k, v = draw(SHAPES[0])
    rng = np.random.default_rng(0)
    graph = random_graph(40, 40)
    table = rng.standard_normal((3, 4))
    sparse = typed(graph, 3)[0]
    out, saved = pyattn.graph_attention.forward(q, k, v, graph, table, edge_type=sparse)
    strict = [array_api_strict.asarray(x) for x in (q, k, v)]
    got, same = pyattn.graph_attention.forward(*strict, graph, array_api_strict.asarray(table),
                                               edge_type=sparse)
    np.testing.assert_allclose(np.asarray(got), out, atol=1e-13)
    for x, y in zip(same.backward(got), saved.backward(out), strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-12)
    a = rng.standard_normal((2, 2, 13))
    out, saved = pyattn.gat_attention.forward(v, *a, graph)
    got, same = pyattn.gat_attention.forward(
        strict[2], *(array_api_strict.asarray(x) for x in a), graph)
    np.testing.assert_allclose(np.asarray(got), out, atol=1e-13)
    for x, y in zip(same.backward(got), saved.backward(out), strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-12)


def test_work_is_that_of_the_edges():
    """Twice the nodes of the same degree, twice the work."""
    pairs = []
    for n in (500, 1000, 2000):
        ring = sp.diags_array([np.ones(n - 1), np.ones(1)], offsets=[-1, n - 1], shape=(n, n))
        x = np.ones((2, n, 4), np.float32)
        pairs.append(pyattn.graph_attention.forward(x, x, x, ring)[1].stats["pairs"])
    assert pairs == [2000, 4000, 8000]


def test_arguments_that_do_not_fit():
    q, k, v = draw(SHAPES[0])
    graph = random_graph(40, 40)
    table, types = np.zeros((3, 4)), np.zeros(graph.nnz, int)
    with pytest.raises(DtypeError, match=r"scipy\.sparse"):
        pyattn.graph_attention(q, k, v, np.ones((40, 40)))
    with pytest.raises(ShapeError, match="graph must be"):
        pyattn.graph_attention(q, k, v, random_graph(41, 40))
    with pytest.raises(ShapeError, match="sequence of 2"):
        pyattn.graph_attention(q, k, v, [graph])
    with pytest.raises(OptionError, match="self_loops"):
        pyattn.graph_attention(q[..., :30, :], k, v, random_graph(30, 40))
    with pytest.raises(OptionError, match="both or neither"):
        pyattn.graph_attention(q, k, v, graph, table)
    with pytest.raises(ShapeError, match=r"\(T, H\)"):
        pyattn.graph_attention(q, k, v, graph, table[:, :3], edge_type=types)
    with pytest.raises(OptionError, match=r"0\.\.2"):
        pyattn.graph_attention(q, k, v, graph, table, edge_type=types + 3)
    with pytest.raises(OptionError, match="negative"):
        pyattn.graph_attention(q, k, v, graph, table, edge_type=types - 1)
    with pytest.raises(DtypeError, match="integers"):
        pyattn.graph_attention(q, k, v, graph, table, edge_type=graph)
    with pytest.raises(ShapeError, match="entries of graph"):
        pyattn.graph_attention(q, k, v, graph, table, edge_type=sp.csr_array((40, 40), dtype=int))
    with pytest.raises(ShapeError, match="aligned"):
        pyattn.graph_attention(q, k, v, graph, table, edge_type=types[1:])
    with pytest.raises(ShapeError, match="edge_type must be a sequence"):
        pyattn.graph_attention(q, k, v, [graph, graph], table, edge_type=[types])
    with pytest.raises(ShapeError, match="a_key"):
        pyattn.gat_attention(v, np.zeros((2, 13)), np.zeros((4, 13)), graph)
