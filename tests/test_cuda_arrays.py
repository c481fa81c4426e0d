"""Every function on CuPy arrays, by a stand-in for CuPy that refuses what CuPy refuses.

The stand-in (strict_cupy.py) computes on the host, but no NumPy array meets one of its own: so what
passes here mixes no host and device arrays, and runs on a GPU by array operations alone. Results
are compared with those of the same call on NumPy arrays. How CuPy's functions are called is
compared with their signatures where CuPy is installed; nothing here needs it, or a GPU.
"""

from __future__ import annotations

import inspect

import ml_dtypes
import numpy as np
import pytest
import strict_cupy
from emulator.build import compiler
from emulator.device import EmulatedDevice
from pyattn.kernels.cuda import device
from table import BFLOAT16, CASES, Shape
from test_attention import judge

import pyattn
from pyattn import arrays, dispatch
from pyattn.testing import examples

try:
    import cupy as real_cupy
except ImportError:
    real_cupy = None


@pytest.fixture(scope="module")
def cupy():
    preference = dispatch.PREFERENCE["cupy"]
    with strict_cupy.standing_in() as module:
        dispatch.PREFERENCE["cupy"] = ("array_api",)
        yield module
        dispatch.PREFERENCE["cupy"] = preference


def on_device(x, asarray=strict_cupy.asarray):
    """Arrays, in any containers, copied to the stand-in, or by `asarray`."""
    if isinstance(x, np.ndarray):
        return asarray(x)
    if isinstance(x, dict):
        return {name: on_device(value, asarray) for name, value in x.items()}
    if type(x) in (tuple, list):
        return type(x)(on_device(value, asarray) for value in x)
    return x


def floats_on_device(x, asarray=strict_cupy.asarray):
    """Those with a gradient only: decisions and lengths are the host's."""
    return on_device(x, asarray) if getattr(x, "dtype", np.dtype(int)).kind == "f" else x


def on_host(x):
    if isinstance(x, strict_cupy.ndarray):
        return x.get()
    if isinstance(x, dict):
        return {name: on_host(value) for name, value in x.items()}
    if hasattr(x, "_fields"):
        return dict(zip(x._fields, map(on_host, x), strict=True))
    return type(x)(map(on_host, x)) if type(x) in (tuple, list) else x


def leaves(x):
    if isinstance(x, dict):
        return [leaf for value in x.values() for leaf in leaves(value)]
    return [leaf for value in x for leaf in leaves(value)] if isinstance(x, tuple | list) else [x]


def both_ways(operation, args, options):
    """Output and gradients."""
    out, saved = operation.forward(*args, **options)
    given = (out if isinstance(out, tuple) else (out,))
    pulled = [x * 0.5 + 0.25 for x in given]
    taken = len(inspect.signature(saved.backward).parameters)
    return given, saved.backward(*pulled[:taken])


def calls():
    found = {}
    rng = np.random.default_rng(0)
    for table, module in ((examples.VARIANTS, pyattn), (examples.LAYERS, pyattn.layers)):
        for name, make in table.items():
            found[name] = (getattr(module, name), *make(lambda *shape: rng.standard_normal(shape)))
    for name, (options, allowed) in examples.PATTERNS.items():
        n = allowed.shape[-1]
        qkv = tuple(rng.standard_normal((2, heads, n, 8)) for heads in (4, 2, 2))
        found[name] = getattr(pyattn, name), qkv, options
    q, k, v = (rng.standard_normal((2, heads, 70, 8)) for heads in (4, 2, 2))
    found["cross_modal_attention"] = (
        pyattn.cross_modal_attention, (q, k, v), {"modality_lengths": (30, 40)})
    found["merge"] = (pyattn.merge, (q, q[..., 0], q + 1, q[..., 1]), {})
    return found


CALLS = calls()


def test_every_variant_is_called():
    assert {*pyattn.VARIANTS} - {"attention"} <= {*CALLS}


@pytest.mark.parametrize("name", CALLS)
def test_no_host_array_is_mixed_in(cupy, name):
    operation, args, options = CALLS[name]
    with pyattn.use_backend("array_api"):
        want = both_ways(operation, args, options)
        options = {key: floats_on_device(x) for key, x in options.items()}
        got = both_ways(operation, on_device(args), options)
    assert {type(x) for x in leaves([got[0], list(leaves(got[1]))])} <= {strict_cupy.ndarray}
    for a, b in zip(leaves(on_host(got)), leaves(on_host(want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_attention(cupy, case, dtype):
    drawn = case.make(Shape((2,), 4, 2, 70, 133, 8, 8), dtype)
    options = {key: floats_on_device(x) for key, x in drawn.options.items()}
    (out, lse), saved = pyattn.attention.forward(
        **on_device(drawn.arrays), **options, return_lse=True)
    rng = np.random.default_rng(7)
    dout = rng.standard_normal(out.shape).astype(dtype)
    dlse = rng.standard_normal(lse.shape).astype(np.float32)
    grads = saved.backward(on_device(dout), on_device(dlse))
    judge(drawn, on_host(out), on_host(lse), dout, dlse, type(grads)(*map(on_host, grads)))


def test_lengths_and_masks_may_be_on_the_device(cupy):
    q = np.random.default_rng(0).standard_normal((2, 2, 9, 4))
    options = {"kv_lengths": np.array([5, 9]), "mask": np.tri(9, dtype=bool)}
    want = pyattn.attention(q, q, q, **options)
    got = pyattn.attention(*[on_device(q)] * 3, **on_device(options))
    np.testing.assert_allclose(got.get(), want, rtol=1e-12)


def test_saved_moves_between_host_and_device(cupy):
    q = np.random.default_rng(0).standard_normal((2, 9, 4))
    out, saved = pyattn.attention.forward(q, q, q, causal=True, dropout=0.3, rng=0)
    moved = saved.to(cupy)
    assert type(moved.q) is strict_cupy.ndarray
    np.testing.assert_allclose(moved.backward(on_device(out)).q.get(), saved.backward(out).q,
                               rtol=1e-12, atol=1e-12)
    assert type(moved.to(np).q) is np.ndarray


# what a library of another kind lends


class Lent:
    """An array on a GPU that is of no array-API library, as Numba's are."""

    def __init__(self, lent):
        self.lent, self.shape, self.dtype = lent, lent.shape, lent.dtype

    @property
    def __cuda_array_interface__(self):
        return {"shape": self.shape, "typestr": self.dtype.str, "version": 3}


def test_arrays_that_are_lent_are_taken_as_cupy_arrays(cupy):
    x = np.random.default_rng(0).standard_normal((2, 9, 4))
    out, saved = pyattn.attention.forward(Lent(x), Lent(x), v=Lent(x), causal=True)
    assert saved.q._memory is x
    assert type(out) is strict_cupy.ndarray
    grads = saved.backward(Lent(x))
    assert type(grads.v) is strict_cupy.ndarray
    params = pyattn.layers.init_transformer_block(0, 4, num_heads=2, dtype=np.float64)
    lent = {name: Lent(w) for name, w in params.items() if isinstance(w, np.ndarray)}
    assert type(pyattn.layers.transformer_block(
        Lent(x), {**params, **lent}, num_heads=2)) is strict_cupy.ndarray


def test_arguments_without_arrays_on_a_gpu_stay_as_they_are():
    for x in (np.ones(3), [1, 2], (np.ones(2), None), {"a": [np.ones(1)], "b": "text"}, object()):
        assert arrays.taken(x) is x


# what the stand-in must refuse


@pytest.mark.parametrize("mix", [
    lambda x, y: x + y, lambda x, y: y + x, lambda x, y: y * x, lambda x, y: np.exp(x),
    lambda x, y: np.asarray(x), lambda x, y: np.concatenate([x, x]), lambda x, y: x[y > 0],
    lambda x, y: x[[0, 1]], lambda x, y: x.__setitem__(0, y), lambda x, y: np.where(y > 0, x, y),
    lambda x, y: x.__iadd__(y), lambda x, y: np.add(y, x)])
def test_the_stand_in_refuses_to_mix(cupy, mix):
    with pytest.raises((TypeError, ValueError)):
        mix(on_device(np.ones((2, 2))), np.ones((2, 2)))


@pytest.mark.parametrize("mix", [
    lambda cp, x, y: cp.where(x > 0, x, y), lambda cp, x, y: cp.concatenate([x, y]),
    lambda cp, x, y: cp.take(x, y), lambda cp, x, y: cp.matmul(x, y)])
def test_its_functions_refuse_to_mix(cupy, mix):
    with pytest.raises(TypeError):
        mix(cupy, on_device(np.ones((2, 2))), np.ones((2, 2)))


def test_a_planted_mistake_is_noticed(cupy, monkeypatch):
    """The scores' mask stays on the host."""
    from pyattn.kernels.array_api import slabs

    monkeypatch.setattr(slabs.Slab, "array", lambda self, x: x)
    x = on_device(np.ones((1, 70, 4)))
    with pytest.raises((TypeError, AttributeError)):
        pyattn.attention(x, x, x, causal=True)


@pytest.mark.skipif(real_cupy is None, reason="CuPy is not installed")
def test_the_stand_in_has_nothing_that_cupy_lacks():
    stand_in = strict_cupy.module()
    for ours, theirs in ((stand_in, real_cupy), (stand_in.linalg, real_cupy.linalg)):
        assert [name for name in vars(ours) if not hasattr(theirs, name)] == []


@pytest.mark.skipif(real_cupy is None, reason="CuPy is not installed")
def test_functions_are_called_as_cupy_has_them(cupy):
    """After the tests above: what they called exists in CuPy and takes these arguments."""
    x = on_device(np.random.default_rng(0).standard_normal((1, 70, 4)))
    pyattn.attention(x, x, x, causal=True)
    assert strict_cupy.calls
    strict_cupy.require_signatures(real_cupy)


# launch code of kernels


class StrictDevice(EmulatedDevice):
    """Executes kernels on the stand-in's arrays, and takes no others."""

    generic = True

    def empty(self, shape, dtype):
        return strict_cupy.ndarray(super().empty(shape, dtype))

    def zeros(self, shape, dtype):
        return strict_cupy.ndarray(super().zeros(shape, dtype))

    def full(self, shape, value, dtype):
        return strict_cupy.ndarray(super().full(shape, value, dtype))

    def constant(self, x):
        assert type(x) is np.ndarray
        return strict_cupy.ndarray(super().constant(x))

    def address(self, array):
        assert type(array) is strict_cupy.ndarray
        return super().address(array._memory)


@pytest.fixture
def strict_device(cupy, monkeypatch):
    if compiler() is None:
        pytest.skip("a C++ compiler builds the kernels for the emulator; there is none")
    emulator = StrictDevice()
    monkeypatch.setitem(device._factories, "cupy", lambda array: emulator)
    monkeypatch.setattr(device, "_missing", lambda number: None)
    monkeypatch.setitem(dispatch.PREFERENCE, "cupy", ("cuda", "array_api"))
    return emulator


@pytest.mark.gate
@pytest.mark.parametrize("name", ["everything", "alibi_lengths", "bias_heads", "gate_keys", "sinks",
                                  "segments_causal"])
def test_softmax_kernels_meet_no_array_of_the_host(name, strict_device):
    """And without waiting for the device."""
    case = next(case for case in CASES if case.name == name)
    for capability, shape, dtype in (((8, 0), Shape((2,), 4, 1, 70, 133, 5, 7), np.float32),
                                     ((9, 0), Shape((1,), 2, 1, 130, 130, 64, 64), BFLOAT16)):
        strict_device.capability = capability
        drawn = case.make(shape, np.dtype(dtype))
        arrays = on_device(drawn.arrays)
        dout = np.random.default_rng(0).standard_normal(
            (*shape.batch, shape.heads, shape.n, shape.e)).astype(dtype)
        dout_there = on_device(dout)
        before = dict(strict_cupy.synchronisations)
        (out, lse), saved = pyattn.attention.forward(**arrays, **drawn.options, return_lse=True)
        grads = saved.backward(dout_there)
        assert strict_cupy.synchronisations == before
        judge(drawn, on_host(out), on_host(lse), dout, None,
              type(grads)(*(on_host(x) for x in grads)))
    assert strict_device.launches


# the kernels that a function launches, by the beginning of their names
LAUNCHED = {"graph_attention": "edges", "gat_attention": "edges", "bp_attention": "edges",
            "linear_attention": "linear", "performer_attention": "linear",
            "nsa_attention": "selected", "lsh_attention": "softmax",
            "routing_attention": "softmax", "additive_attention": "additive",
            "talking_heads_attention": "talking_heads"}


@pytest.mark.gate
@pytest.mark.parametrize("name", LAUNCHED)
def test_kernels_meet_no_array_of_the_host(name, strict_device):
    """And nothing waits for the device but the host for what content has decided."""
    operation, args, options = CALLS[name]
    with pyattn.use_backend("cpu"):
        want = both_ways(operation, args, options)
    before = len(strict_cupy.crossings)
    got = both_ways(operation, on_device(args),
                    {key: floats_on_device(x) for key, x in options.items()})
    waits = [x.by for x in strict_cupy.crossings[before:] if x.way != "to device"]
    assert [by for by in waits if by != ("arrays.py", "to_host", "decided")] == []
    for a, b in zip(leaves(on_host(got)), leaves(on_host(want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert any(launched.startswith(LAUNCHED[name]) for launched, _ in strict_device.launches)


# dispatch


def test_gpus_that_are_too_old_are_passed_over_with_the_reason(monkeypatch):
    monkeypatch.setitem(dispatch.PREFERENCE, "cupy", ("cuda", "array_api"))
    with strict_cupy.standing_in(capability=(7, 5)):
        device._missing.cache_clear()
        device._cupy_device.cache_clear()
        x = on_device(np.ones((1, 4, 8), np.float32))
        told = str(pyattn.explain(pyattn.attention, x, x, x))
        assert "not cuda: it needs compute capability 8.0; a stand-in has 7.5" in told
        with pytest.raises(pyattn.BackendError, match=r"compute capability 8\.0"), \
                pyattn.use_backend("cuda"):
            pyattn.attention(x, x, x)


def test_arrays_of_another_than_the_current_device_are_refused(cupy, monkeypatch):
    x = on_device(np.ones((1, 4, 8), np.float32))
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 1)
    with pytest.raises(pyattn.BackendError, match="on CUDA device 0, and 1 is current"):
        pyattn.attention(x, x, x)
