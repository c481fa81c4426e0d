"""Gates of the softmax engine that are not given by strides: in blocks, as ramps, by offset."""

from __future__ import annotations

import dataclasses

import array_api_strict
import ml_dtypes
import numpy as np
import oracle
import pytest
from table import Shape, positions

import pyattn
from pyattn import arrays, masks
from pyattn.engines import softmax
from pyattn.engines.problem import GateForm

BACKENDS = ["cpu", "array_api"]
SHAPES = [Shape((), 1, 1, 1, 1, 4, 4), Shape((2,), 4, 2, 63, 63, 16, 16),
          Shape((2,), 4, 1, 70, 133, 5, 7), Shape((2, 2), 2, 1, 17, 29, 16, 16),
          Shape((1,), 2, 2, 133, 70, 16, 8), Shape((1,), 1, 1, 600, 600, 8, 8)]
PARTS = {"gate[blocks of 3]": ("blocks", 3, ("H", "N", "M")),
         "gate[blocks of 16]": ("blocks", 16, ("H", "N", "M")),
         "gate[blocks of 70]": ("blocks", 70, ("B", "1", "N", "M")),
         "gate[blocks of 200]": ("blocks", 200, ("H", "1", "M")),
         "ramp[heads]": ("ramp", 0, ("H", "1", "1")),
         "ramp[queries]": ("ramp", 0, ("B", "H", "N", "1")),
         "ramp[queries, heads alike]": ("ramp", 1, ("1", "N", "1")),
         "table[heads]": ("table", 0, ("H",)), "table[one]": ("table", 0, ("1",))}


@dataclasses.dataclass(frozen=True)
class Gate:
    array: np.ndarray
    form: GateForm
    dense: np.ndarray
    """The gate of each pair, (..., H, N, M)."""
    slopes: np.ndarray
    """d gate / d the number that it comes from."""
    source: np.ndarray
    """int (..., H, N, M): which number of the array, flat, a gate comes from."""

    def folded(self, dgate):
        """The gradient of the array from that of the dense gate."""
        total = np.zeros(self.array.size, dgate.dtype)
        np.add.at(total, self.source.ravel(), (dgate * self.slopes).ravel())
        return total.reshape(self.array.shape)


def drawn(name, s, options, dtype):
    """A gate, and the same spelled out pair by pair."""
    kind, number, axes = PARTS[name]
    rng = np.random.default_rng([len(name), s.n])
    i, j, _ = positions(s, options.get("alignment", "bottom_right"), options.get("q_lengths"),
                        options.get("kv_lengths"))
    full = (*s.batch, s.heads, s.n, s.m)
    sizes = {"B": s.batch, "H": (s.heads,), "N": (s.n,), "M": (s.m,), "1": (1,)}
    if kind == "table":
        # one number for each distance, first the most negative
        origin = 1 - s.n if options.get("alignment") == "top_left" else 1 - s.m
        array = rng.random((*sizes[axes[0]], s.n + s.m - 1))
        form, slopes = GateForm(by_offset=True), np.ones(full)
        column = np.clip(j - i - origin, 0, array.shape[1] - 1)
        head = np.arange(s.heads)[:, None, None] % array.shape[0]
        source = np.broadcast_to(head * array.shape[1] + column, full)
    else:
        lengths = sum((sizes[axis] for axis in axes), ())
        if kind == "blocks":
            form = GateForm(block=number)
            lengths = (*lengths[:-2], *(-(-size // number) for size in lengths[-2:]))
            array = rng.random(lengths)
            a, b = np.arange(s.n)[:, None] // number, np.arange(s.m) // number
        else:
            form = GateForm(ramp=7.5, shift=number)
            array = rng.uniform(0, 40, lengths)
            a, b = np.arange(s.n)[:, None], np.zeros(s.m, int)
        index = np.arange(array.size).reshape(array.shape)
        index = np.broadcast_to(index, (*full[:-2], *(1 if size == 1 else size
                                                      for size in array.shape[-2:])))
        source = index[..., a * (index.shape[-2] > 1), b * (index.shape[-1] > 1)]
    if kind != "ramp":
        array = np.where(array < 0.3, 0, array)
    array = array.astype(dtype)
    dense = array.astype(np.float64).ravel()[source]
    slopes = np.ones(full)
    if kind == "ramp":
        bare = (7.5 + dense - (i - j - number)) / 7.5
        dense, slopes = np.clip(bare, 0, 1), np.where((0 < bare) & (bare < 1), 1 / 7.5, 0)
    return Gate(array, form, dense, slopes, source)


def operands(s, dtype):
    rng = np.random.default_rng([s.n, s.m])
    return tuple(rng.standard_normal((*s.batch, h, n, w)).astype(dtype) for h, n, w in (
        (s.heads, s.n, s.d), (s.groups, s.m, s.d), (s.groups, s.m, s.e)))


def judge(name, s, dtype, backend, mask=None, allowed=True, **options):
    qkv = operands(s, dtype)
    gate = drawn(name, s, options, np.float64 if dtype == np.float64 else np.float32)
    given = (lambda distances: gate.array) if gate.form.by_offset else gate.array
    with pyattn.use_backend(backend):
        (out, lse), saved = softmax.forward(*qkv, mask=mask, gate=given, gate_form=gate.form,
                                            return_lse=True, **options)
        rng = np.random.default_rng(1)
        dout = rng.standard_normal(out.shape).astype(dtype)
        dlse = rng.standard_normal(lse.shape).astype(lse.dtype)
        grads = saved.backward(dout, dlse)
    _, _, inside = positions(s, options.get("alignment", "bottom_right"), options.get("q_lengths"),
                             options.get("kv_lengths"))
    problem = oracle.Dense(*qkv, np.full(s.heads, s.d ** -0.5), inside & allowed,
                           gate=gate.dense, softcap=options.get("softcap"))
    found = []
    for r in (oracle.exact(dtype), oracle.plain(dtype)):
        want = oracle.backward(problem, dout, dlse, r)
        want["gate"] = gate.folded(want["gate"])
        found.append((*oracle.forward(problem, r), want))
    exact, rough = found
    if dtype == np.float64:
        for key, x in {"out": out, "lse": lse, **grads._asdict()}.items():
            want = {"out": exact[0], "lse": exact[1], **exact[2]}[key]
            np.testing.assert_allclose(x, want.astype(dtype), rtol=1e-12, atol=1e-12, err_msg=key)
        return
    oracle.assert_close(out, exact[0], rough[0], factor=2, name="out", dtype=dtype)
    oracle.assert_close(lse, exact[1], rough[1], factor=2, name="lse", dtype=lse.dtype)
    for key, x in grads._asdict().items():
        oracle.assert_close(x, exact[2][key], rough[2][key], factor=3, name=key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_against_the_gate_pair_by_pair(shape, name, backend):
    judge(name, shape, np.float64, backend)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16],
                         ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PARTS)
def test_other_dtypes(name, backend, dtype):
    judge(name, SHAPES[2], dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PARTS)
def test_a_long_sequence_is_cut_into_chunks(name, backend):
    judge(name, SHAPES[-1], np.float64, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("alignment", ["bottom_right", "top_left"])
def test_causal_with_lengths_and_softcap(alignment, name, backend):
    s = SHAPES[2]
    lengths = {"q_lengths": np.array([70, 40]), "kv_lengths": np.array([90, 133])}
    i, j, _ = positions(s, alignment, **lengths)
    judge(name, s, np.float64, backend, mask=masks.causal(), allowed=j <= i, alignment=alignment,
          softcap=1.5, **lengths)


@pytest.mark.parametrize("name", PARTS)
def test_a_mask_that_is_done_in_parts(name):
    s = SHAPES[1]
    pattern = masks.per_head([masks.window(20, 20, 3), masks.window(9, 9), masks.strided(7),
                              masks.full()])
    allowed = pattern.dense(s.n, s.m)
    for backend in BACKENDS:
        judge(name, s, np.float64, backend, mask=masks.plan(pattern, s.n, s.m), allowed=allowed)


@pytest.mark.parametrize("name", PARTS)
def test_heads_with_layouts_of_their_own(name):
    s = SHAPES[1]
    pattern = masks.per_head([masks.causal(), masks.window(9, 9), masks.window(3, 0),
                              masks.causal() & ~masks.full()])
    judge(name, s, np.float64, "array_api", mask=pattern, allowed=pattern.dense(s.n, s.m))


@pytest.mark.parametrize("name", PARTS)
def test_few_queries_against_many_keys(name):
    judge(name, Shape((2,), 4, 2, 2, 300, 16, 16), np.float32, "cpu")


@pytest.mark.parametrize("name", PARTS)
def test_strict_arrays(name):
    s = SHAPES[3]
    gate = drawn(name, s, {}, np.float64)
    xp = array_api_strict
    qkv = operands(s, np.float64)
    found = []
    for to in (np.asarray, xp.asarray):
        array = to(gate.array)
        given = (lambda distances, array=array: array) if gate.form.by_offset else array
        out, saved = softmax.forward(*map(to, qkv), gate=given, gate_form=gate.form)
        grads = saved.backward(to(np.ones(out.shape)))
        found.append([arrays.to_host(out), *map(arrays.to_host, grads)])
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PARTS)
def test_a_backward_on_another_backend(name):
    s = SHAPES[2]
    gate = drawn(name, s, {}, np.float64)
    given = (lambda distances: gate.array) if gate.form.by_offset else gate.array
    out, saved = softmax.forward(*operands(s, np.float64), gate=given, gate_form=gate.form)
    found = []
    for backend in BACKENDS:
        with pyattn.use_backend(backend):
            found.append(saved.backward(np.ones_like(out)))
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", PARTS)
def test_the_number_of_threads_changes_no_bit(name):
    s = Shape((2,), 2, 1, 700, 700, 8, 8)
    gate = drawn(name, s, {}, np.float32)
    given = (lambda distances: gate.array) if gate.form.by_offset else gate.array
    found = []
    before = pyattn.get_num_threads()
    try:
        for threads in (1, 2, 2):
            pyattn.set_num_threads(threads)
            out, saved = softmax.forward(*operands(s, np.float32), gate=given,
                                         gate_form=gate.form)
            found.append(saved.backward(out))
    finally:
        pyattn.set_num_threads(before)
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            assert (x == y).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_whose_gate_is_closed_adds_nothing(backend):
    """Nor to the gradient of the gate, beside tokens that are not finite."""
    rng = np.random.default_rng(0)
    gate = np.ones((70, 70))
    gate[20] = 0
    for name in ("q", "k", "v", "dout"):
        given = {key: rng.standard_normal((1, 2, 70, 8)) for key in ("q", "k", "v", "dout")}
        given[name][..., 10, 3] = np.nan
        dout = given.pop("dout")
        with pyattn.use_backend(backend), np.errstate(all="ignore"):
            _, saved = pyattn.attention.forward(**given, gate=gate)
            dgate = saved.backward(dout).gate
        assert not dgate[20].any(), name
        assert np.isnan(dgate).any() or name in ("q", "dout"), name
