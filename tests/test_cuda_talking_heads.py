"""CUDA kernels of talking heads: the launch code and the kernels' text, in the emulator.

What any backend is tested by (test_talking_heads.py) is called here for this one. A C++ compiler
is needed, and without one all of it is skipped.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import strict_cupy
import test_talking_heads as rules
from pyattn.kernels.cuda import compile, talking_heads
from table import BFLOAT16
from test_cuda_arrays import cupy, on_device, strict_device  # noqa: F401  # fixtures
from test_talking_heads import Shape, draw, inside, judge

import pyattn
from pyattn import masks
from pyattn.checks import BackendError

pytestmark = pytest.mark.gate

DTYPES = [np.float16, BFLOAT16, np.float32, np.float64]
NAMES = ["float16", "bfloat16", "float32", "float64"]
SMALL = Shape((2,), (4, 2, 5, 6, 3), 33, 70, 20, 13)
SEVERAL_PANELS = Shape((1,), (6, 3, 8, 4, 2), 40, 50, 72, 80)
KINDS = tuple(talking_heads.MOST_HEADS_OF_TWO_PAIRS)
attention = pyattn.talking_heads_attention


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)


@pytest.fixture(autouse=True)
def device(emulated):
    """The emulator, and few kernels to be built."""
    emulated.generic = True
    return emulated


def everything(arguments, dout, **options):
    out, saved = attention.forward(*arguments, **options)
    return out, saved.lse, *saved.backward(dout)


def cotangent(shape, dtype=np.float64):
    rng = np.random.default_rng(3)
    return rng.standard_normal((*shape.batch, shape.heads[3], shape.n, shape.e)).astype(dtype)


# against dense formulas


@every_dtype
@pytest.mark.parametrize("shape", [
    SMALL, rules.SHAPES[0], rules.SHAPES[2], SEVERAL_PANELS], ids=str)
def test_against_the_rule(shape, dtype, device):
    device.seed = 1
    judge(draw(shape, dtype), inside(shape), "cuda")


@every_dtype
@pytest.mark.parametrize("causal", [True, False, "top_left"])
def test_causal_masked_and_padded(causal, dtype):
    rules.test_causal_masked_and_padded(SMALL, causal, "cuda", dtype)


@every_dtype
def test_a_window_and_no_bias(dtype):
    shape = Shape((1,), (3, 3, 3, 2, 1), 70, 150, 8, 8)
    arguments = draw(shape, dtype)
    mask = masks.window(20, 20)
    found = []
    for backend in ("cpu", "cuda"):
        with pyattn.use_backend(backend):
            out, saved = attention.forward(*arguments[:5], mask=mask, kv_lengths=140)
            found.append((out, *saved.backward(cotangent(shape, dtype))))
    accuracy = {2: 0.05, 4: 1e-5, 8: 1e-12}[np.dtype(dtype).itemsize]
    for x, y in zip(*found, strict=True):
        x, y = x.astype("f8"), y.astype("f8")
        np.testing.assert_allclose(x, y, rtol=0, atol=accuracy * abs(x).max())


@pytest.mark.parametrize("shape", rules.EMPTY, ids=str)
def test_nothing_to_do(shape):
    rules.test_nothing_to_do(shape, "cuda")


def test_broadcast_axes_and_strided_views():
    rules.test_broadcast_axes_and_strided_views("cuda")


def test_what_any_backend_keeps():
    rules.test_a_bias_does_not_revive_masked_pairs("cuda")
    rules.test_a_permutation_permutes_the_heads("cuda")
    rules.test_weights_multiply_from_the_right("cuda")


@pytest.mark.parametrize("pair", [("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
def test_one_backends_saved_in_anothers_backward(pair):
    arguments = draw(SMALL)
    with pyattn.use_backend(pair[0]):
        out, saved = attention.forward(*arguments, causal=True)
    found = []
    for backend in pair:
        with pyattn.use_backend(backend):
            found.append(saved.backward(out))
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-11)


# what is hidden, and what is not a number


@every_dtype
def test_what_no_one_may_see_has_no_say(dtype):
    """But for fp32, which multiplies in another way where something is not finite, to the bit."""
    shape = Shape((2,), (4, 2, 3, 4, 2), 28, 70, 6, 7)
    q, k, v, *weights = draw(shape, dtype)
    mask = np.random.default_rng(2).random((28, 70)) < 0.5
    mask[:, 40:45], mask[20:23] = False, False
    options = {"mask": mask, "kv_lengths": np.array([70, 50]), "q_lengths": np.array([25, 28])}
    dout, found = cotangent(shape, dtype), []
    for fill in (0, np.nan, np.inf):
        for x in (k, v):
            x[..., 40:45, :] = x[1, :, 50:] = fill
        for x in (q, dout):
            x[..., 20:23, :] = x[0, :, 25:] = fill
        with pyattn.use_backend("cuda"):
            found.append(everything((q, k, v, *weights), dout, **options))
    accuracy = 1e-4 if dtype == np.float32 else 0
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            np.testing.assert_allclose(x.astype("f8"), y.astype("f8"), rtol=accuracy, atol=accuracy)
    assert not found[0][0][:, :, 20:23].any()
    assert (found[0][1][:, :, 20:23] == -np.inf).all()


@every_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_goes_where_it_is_seen(bad, dtype):
    """Each operand alone; where numbers are not finite is where the CPU has them so."""
    shape = Shape((), (3, 1, 2, 4, 2), 40, 40, 5, 6)
    for poisoned in range(4):
        operands = [*draw(shape, dtype), cotangent(shape, dtype)]
        operands[(0, 1, 2, 7)[poisoned]][-1, 23, 2] = bad
        found = []
        for backend in ("cpu", "cuda"):
            with pyattn.use_backend(backend), np.errstate(all="ignore"):
                found.append(everything(operands[:7], operands[7], causal=True))
        for x, y in zip(*found, strict=True):
            np.testing.assert_array_equal(np.isfinite(x.astype("f8")), np.isfinite(y.astype("f8")))
        assert np.isfinite(found[1][0][:, :23].astype("f8")).all()


@every_dtype
def test_rows_without_a_finite_score(dtype):
    """Heads that only fill up a kernel's must not make NaN of -inf."""
    shape = Shape((), (1, 1, 1, 1, 1), 20, 30, 4, 4)
    q, k, v, _, w_post, *_ = draw(shape, dtype)
    k[..., 0] = 1
    q[:, 3, 0] = -np.inf
    with pyattn.use_backend("cuda"):
        out, lse, *grads = everything((q, k, v, np.ones((1, 1), dtype), w_post),
                                      cotangent(shape, dtype))
    assert lse[0, 3] == -np.inf
    assert not out[:, 3].any()
    assert np.isfinite(out.astype("f8")).all()
    assert np.isfinite(grads[2].astype("f8")).all()


# the device


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=str)
def test_the_order_of_threads_and_blocks_changes_no_bit(dtype, device):
    shape, found = Shape((2,), (4, 2, 3, 4, 2), 20, 40, 8, 8), []
    for device.seed in (0, 1, 2):
        with pyattn.use_backend("cuda"):
            found.append([x.tobytes() for x in everything(
                draw(shape, dtype), cotangent(shape, dtype), causal=True)])
    assert found[0] == found[1] == found[2]


def test_memory_is_that_of_the_operands(device, monkeypatch):
    """What a call asks for grows as the tokens do."""
    asked, empty = [], device.empty
    monkeypatch.setattr(device, "empty", lambda shape, dtype: (
        asked.append(np.dtype(dtype).itemsize * int(np.prod(shape))), empty(shape, dtype))[1])
    sums = []
    for n in (32, 64, 96):
        shape = Shape((), (2, 2, 2, 2, 2), n, n, 8, 8)
        asked.clear()
        with pyattn.use_backend("cuda"):
            everything(draw(shape, BFLOAT16), cotangent(shape, BFLOAT16), mask=masks.window(8, 8))
        sums.append(sum(asked))
    assert sums[2] - sums[1] == sums[1] - sums[0]


def test_launches_meet_no_array_of_the_host(strict_device):  # noqa: F811
    """And do not wait for the device."""
    strict_device.seed = 2
    arguments, dout = draw(SMALL, BFLOAT16), cotangent(SMALL, BFLOAT16)
    with pyattn.use_backend("cuda"):
        want = everything(arguments, dout, causal=True)
    there, dout = on_device(arguments), on_device(dout)
    before = dict(strict_cupy.synchronisations)
    got = everything(there, dout, causal=True)
    assert strict_cupy.synchronisations == before
    assert strict_device.launches
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x.get(), y)


@pytest.mark.parametrize(("dtype", "heads", "width"), [
    (np.float16, (8, 8, 8, 8, 8), 64), (BFLOAT16, (32, 2, 32, 32, 4), 16),
    (np.float32, (17, 1, 20, 18, 2), 24)], ids=str)
def test_kernels_as_gpus_get_them(dtype, heads, width, device):
    device.generic, device.multiprocessors = False, 1
    shape = Shape((1,), heads, 40, 40, width, width)
    judge(draw(shape, dtype), inside(shape, causal=True), "cuda", causal=True)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float64], ids=str)
def test_a_device_with_little_shared_memory(dtype, device):
    """Tokens that a block owns come again at each step."""
    s = talking_heads.Sizes(np.dtype(dtype).name, 6, 8, 4, 3, 2, 72, 80, True)
    fewest = talking_heads.Tiling(1, 8 if dtype == np.float64 else 4, False)
    device.shared_memory = max(talking_heads.shared_bytes(kind, fewest, s) for kind in KINDS)
    for kind in KINDS:
        assert not talking_heads.tiling(kind, s, device.shared_memory, True).resident
    operands = draw(SEVERAL_PANELS, dtype)
    judge(operands, inside(SEVERAL_PANELS, causal=True), "cuda", causal=True)


def test_bank_conflicts(device):
    """None while tiles are walked; a few where at the end of one the threads of a row meet."""
    device.access_conflicts = 150
    shape = Shape((1,), (8, 8, 8, 8, 8), 16, 64, 64, 64)
    with pyattn.use_backend("cuda"):
        everything(draw(shape, BFLOAT16), cotangent(shape, BFLOAT16))
    for name, counts in device.launches:
        if name.endswith(("forward", "queries", "keys")):
            assert counts["access_conflicts"] == 0, name


@pytest.mark.parametrize("shared", [99, 163, 227])
def test_tilings_fit(shared):
    """What README promises."""
    most = {("bfloat16", 163): 32, ("bfloat16", 99): 16, ("float32", 163): 32, ("float32", 99): 16,
            ("float64", 163): 14, ("float64", 99): 4}
    for name in ("bfloat16", "float32", "float64"):
        heads = most[name, min(shared, 163)]
        s = talking_heads.Sizes(name, heads, heads, heads, heads, heads, 512, 512)
        for kind in KINDS:
            x = talking_heads.tiling(kind, s, shared * 1024, False)
            assert x is not None
            assert talking_heads.shared_bytes(kind, x, s) <= shared * 1024


def test_what_does_not_fit_is_told(device):
    def told(heads, dtype):
        with pyattn.use_backend("cuda"), pytest.raises(BackendError) as error:
            attention(*draw(Shape((), heads, 4, 4, 4, 4), dtype))
        return str(error.value)

    assert "heads of the softmax of float64 must be at most 16; there are 17" in told(
        (1, 1, 17, 1, 1), np.float64)
    assert "heads must be at most 32; q has 33, the output 1" in told((33, 1, 2, 1, 1), BFLOAT16)
    device.shared_memory = 64 * 1024
    assert "32, 32 and 32 heads of bfloat16 do not fit the 65536 bytes" in told(
        (32, 1, 32, 32, 1), BFLOAT16)


def judge_forward(arguments, allowed, backend, **options):
    """As `judge`, but the output alone: fewer kernels to be built."""
    dtype, scale = arguments[0].dtype, arguments[0].shape[-1] ** -0.5
    with pyattn.use_backend(backend):
        out = attention(*arguments, **options)
    exact, rough = (rules.dense(arguments, allowed, scale, r)
                    for r in (oracle.exact(dtype), oracle.plain(dtype)))
    oracle.assert_close(out, exact, rough, factor=3, name="out", dtype=dtype)


def planted(name, *mistake, gate=True):
    return pytest.param(mistake, id=name, marks=[pytest.mark.gate] if gate else [])


@pytest.mark.parametrize("mistake", [
    planted("bias", "talking_heads.cuh", "seen >> o & 1 ? mixed.x[o] + bias : Sum(0)",
            "mixed.x[o] + bias"),
    planted("panels", "talking_heads.cuh", "if (number % parts == 0)\n", "if (true)\n"),
    planted("slot", "talking_heads.cuh", "__syncwarp();       // the next copy but one overwrites "
            "what was just read\n        }\n        ring.slot", "}\n        ring.slot"),
    planted("barrier", "talking_heads_forward.cu", "__syncthreads();        // the next",
            "// the next", gate=False),
    planted("delta", "talking_heads_backward_queries.cu", "load_shared<Sum>(deltas", "0 * (deltas"),
    planted("shares", "talking_heads_backward_keys.cu", "x.there ? share : 0", "x.there ? 1 : 0"),
    planted("hidden", "talking_heads_backward_weights.cu", "if (masked) {", "if (false) {"),
    planted("blocks", "talking_heads_join.cu", "block < a.blocks", "block < a.blocks - 1",
            gate=False)])
def test_mistakes_are_found(mistake, device, tmp_path):
    """By the float64 arithmetic, or by the race detector."""
    file, right, wrong = mistake
    text = (compile.SOURCES / file).read_text()
    assert text.count(right) == 1
    (tmp_path / file).write_text(text.replace(right, wrong))
    device.folders = (tmp_path,)
    shape = Shape((1,), (4, 2, 3, 2, 1), 33, 40, 80, 80)
    arguments = draw(shape, BFLOAT16)
    check = judge if "backward" in file or "join" in file else judge_forward
    with pytest.raises(AssertionError):
        check(arguments, inside(shape, causal=True), "cuda", causal=True)
