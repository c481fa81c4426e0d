"""The kernels for Hopper: executed on the CPU, judged by the oracle, and compiled."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import re

import ml_dtypes
import numpy as np
import oracle
import pytest
from emulator.build import build, compiler
from emulator.device import EmulatedDevice, EmulatorError
from pyattn.kernels.array_api import softmax as plain
from pyattn.kernels.cuda import compile, hopper
from pyattn.kernels.cuda import device as devices

import pyattn
from bench import gpu_sass
from pyattn import dispatch, masks

BF16, F16 = ml_dtypes.bfloat16, np.float16

pytestmark = [
    pytest.mark.gate,
    pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler")]


class Engine:
    """What dispatch is given in place of a kernel module: it may not refuse."""

    INDEXED = False
    forward = staticmethod(hopper.forward)
    backward = staticmethod(hopper.backward)
    delta = staticmethod(plain.delta)


def usual_kernels():
    """Those that are launched where no table says otherwise."""
    return [hopper._kernel(name, width, dtype, hopper.BUILDS[name, width][0])
            for name, width in hopper.BUILDS for dtype in ("float16", "bfloat16")]


@pytest.fixture(scope="module")
def built():
    """Kernels that most tests take, built side by side."""
    def make(kernel):
        return build(kernel.file, kernel.name, kernel.macros)

    chosen = [kernel for kernel in usual_kernels()
              if dict(kernel.macros)["D"] == 64 or dict(kernel.macros)["BRAIN"]]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(make, chosen))


@pytest.fixture
def device(monkeypatch, built):
    """A Hopper, all of whose launches are emulated."""
    emulated = EmulatedDevice(capability=(9, 0))
    emulated.multiprocessors = 3
    monkeypatch.setitem(devices._factories, "numpy", lambda array: emulated)

    def kernel(engine, problem, array):
        assert engine == "softmax"
        reason = hopper.refuses(problem)
        assert reason is None, reason
        return Engine

    monkeypatch.setattr(dispatch, "kernel", kernel)
    monkeypatch.setattr(hopper, "WORST_FILL", 0)
    monkeypatch.setattr(hopper, "FEW", 0)
    return emulated


def random_blocks(n, m, seed=0):
    """Tiles full, empty and partial in any order."""
    rng = np.random.default_rng((seed, n, m))
    tiles = rng.random((-(-n // 64), -(-m // 64))) < 0.6
    pairs = np.kron(tiles, np.ones((64, 64), bool))[:n, :m]
    return masks.dense(pairs & (rng.random((n, m)) < 0.9995))


def with_empty_rows(n, m):
    pairs = np.random.default_rng((n, m)).random((n, m)) < 0.5
    pairs[[0, n // 2]] = False
    pairs[:, m // 3] = False
    return masks.dense(pairs)


MASKS = {
    "full": lambda n, m: masks.full(),
    "causal": lambda n, m: masks.causal(),
    "window": lambda n, m: masks.window(40, 20),
    "blocks": random_blocks,
    "empty rows": with_empty_rows,
    "heads": lambda n, m: masks.per_head([masks.causal(), ~masks.full()]),
}


@dataclasses.dataclass
class Drawn:
    arrays: dict
    options: dict
    dense: oracle.Dense
    dout: np.ndarray
    dlse: np.ndarray

    @property
    def dtype(self):
        return self.arrays["q"].dtype


def draw(name, n, m, d, dtype, *, batch=1, heads=2, groups=1, seed=0, **options):
    rng = np.random.default_rng((n, m, d, seed))
    arrays = {key: rng.standard_normal((batch, h, length, d)).astype(dtype)
              for key, h, length in (("q", heads, n), ("k", groups, m), ("v", groups, m))}
    mask = MASKS[name](n, m)
    dense = oracle.Dense(**arrays, scale=np.full(heads, d**-0.5),
                         allowed=mask.compile(n, m).dense())
    return Drawn(arrays, {"mask": mask, **options}, dense,
                 rng.standard_normal((batch, heads, n, d)).astype(dtype),
                 rng.standard_normal((batch, heads, n)).astype(np.float32))


def run(drawn):
    (out, lse), saved = pyattn.attention.forward(**drawn.arrays, **drawn.options, return_lse=True)
    return out, lse, saved.backward(drawn.dout, drawn.dlse)


def judge(drawn, out, lse, grads):
    arithmetics = oracle.exact(drawn.dtype), oracle.plain(drawn.dtype)
    want, rough = (oracle.forward(drawn.dense, r) for r in arithmetics)
    oracle.assert_close(out, want[0], rough[0], factor=2, name="out", dtype=drawn.dtype)
    oracle.assert_close(lse, want[1], rough[1], factor=2, name="lse", dtype=np.float32)
    want, rough = (oracle.backward(drawn.dense, drawn.dout, drawn.dlse, r) for r in arithmetics)
    for name in grads._fields:
        given = drawn.arrays.get(name, drawn.options.get(name))
        oracle.assert_close(getattr(grads, name), want[name], rough[name], factor=3,
                            name=f"d{name}", dtype=given.dtype)


CASES = list(itertools.product((1, 64, 65, 128, 130, 200, 257), (64, 128), MASKS))


@pytest.mark.parametrize(("n", "d", "name"), [
    pytest.param(*case, marks=() if case[0] in (1, 130) else pytest.mark.gate) for case in CASES])
def test_forward_and_backward(device, n, d, name):
    """Lengths take turns as those of queries and of keys; so do the other dimensions."""
    number = CASES.index((n, d, name))
    device.seed = number % 4
    m = (n, n, 257 - n // 2)[number // 5 % 3]
    dtype, batch = (BF16, F16)[d == 64 and number % 2], 1 + number // 7 % 2
    drawn = draw(name, n, m, d, dtype, batch=batch, groups=1 + number % 2, seed=number)
    judge(drawn, *run(drawn))


def count_keys(name, n, m, d):
    """With queries of 0 and values of 1, lse is the log of the keys a query sees: no pair hides."""
    drawn = draw(name, n, m, d, BF16)
    drawn.arrays["q"][...], drawn.arrays["v"][...] = 0, 1
    out, lse = pyattn.attention(**drawn.arrays, **drawn.options, return_lse=True)
    count = np.broadcast_to(drawn.dense.allowed, (1, 2, n, m)).sum(axis=-1)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, np.log(count), atol=2e-6)
    np.testing.assert_array_equal(out, np.broadcast_to((count > 0)[..., None], out.shape))


@pytest.mark.parametrize("name", MASKS)
def test_each_query_sees_the_keys_it_may(device, name):
    for n, m in ((130, 120), (65, 250), (200, 383)):
        count_keys(name, n, m, 64)


def test_many_heads_share_keys_and_blocks_take_many_items(device):
    device.multiprocessors = 2
    drawn = draw("causal", 140, 200, 64, BF16, batch=2, heads=6, groups=2)
    judge(drawn, *run(drawn))


@pytest.mark.parametrize("d", [64, 128])
def test_order_of_threads_and_blocks_does_not_matter(device, d):
    drawn = draw("blocks", 200, 257, d, BF16, heads=4, groups=2)
    first = None
    for device.seed, device.multiprocessors in ((0, 1), (1, 2), (2, 5), (3, 64)):
        out, lse, grads = run(drawn)
        found = [x.tobytes() for x in (out, lse, *grads)]
        first = first or found
        assert found == first


def test_views_are_read_where_they_lie(device):
    drawn = draw("causal", 130, 130, 64, BF16, heads=2, groups=2)
    wanted = run(drawn)
    for name, x in list(drawn.arrays.items()):
        # (B, N, H, D) with a wider row than needed
        wide = np.zeros((1, 130, 2, 80), x.dtype)
        wide[..., 8:72] = x.swapaxes(1, 2)
        drawn.arrays[name] = wide[..., 8:72].swapaxes(1, 2)
    drawn.dout = np.ascontiguousarray(drawn.dout.swapaxes(2, 3)).swapaxes(2, 3)
    out, lse, grads = run(drawn)
    for got, want in zip((out, lse, *grads), (wanted[0], wanted[1], *wanted[2]), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("d", [64, 128])
def test_padding_is_never_read(device, d):
    """Queries and keys beyond their lengths hold NaN."""
    n, m = 200, 260
    drawn = draw("full", n, m, d, BF16, batch=3, heads=2)
    lengths = {"q_lengths": np.array([200, 64, 130]), "kv_lengths": np.array([259, 128, 0])}
    seen = ((np.arange(n)[:, None] < lengths["q_lengths"][:, None, None, None])
            & (np.arange(m) < lengths["kv_lengths"][:, None, None, None]))
    drawn.dense = dataclasses.replace(drawn.dense, allowed=seen)
    for b, (q_length, kv_length) in enumerate(zip(*lengths.values(), strict=True)):
        blind = q_length if kv_length else 0
        drawn.dout[b, :, blind:] = drawn.dlse[b, :, blind:] = 0
    given = {name: x.copy() for name, x in drawn.arrays.items()}
    clean = dataclasses.replace(drawn, arrays=given, options={**drawn.options, **lengths})
    out, lse, grads = run(clean)
    judge(dataclasses.replace(clean, arrays=drawn.arrays), out, lse, grads)
    for b, (q_length, kv_length) in enumerate(zip(*lengths.values(), strict=True)):
        blind = q_length if kv_length else 0
        given["q"][b, :, blind:], given["k"][b, :, kv_length:] = np.nan, np.inf
        given["v"][b, :, kv_length:], clean.dout[b, :, blind:] = -np.inf, np.nan
    dirty = run(clean)
    for got, want in zip((*dirty[:2], *dirty[2]), (out, lse, *grads), strict=True):
        np.testing.assert_array_equal(got, want)


def test_scale_and_sinks(device):
    """A scale of each head, negative and zero ones among them, and a sink."""
    drawn = draw("causal", 130, 200, 64, BF16, heads=4, groups=2)
    scale = np.array([0.2, -0.3, 0.0, 1.0], np.float32)
    sinks = np.array([0.5, -3.0, 2.0, -np.inf], np.float32)
    drawn.options |= {"scale": scale, "sinks": sinks}
    drawn.dense = dataclasses.replace(drawn.dense, scale=scale, sinks=sinks)
    judge(drawn, *run(drawn))


@pytest.mark.parametrize("d", [64, 128])
def test_nan_reaches_those_who_see_it_and_no_one_else(device, d):
    n = 200
    clean = draw("window", n, n, d, BF16, heads=2, groups=1)
    allowed = np.abs(np.arange(n)[:, None] - np.arange(n))
    for token, (name, value) in zip(
            (3, 64, 100, 127, 128, 199, 70, 130), itertools.product(
                ("k", "v", "q", "dout"), (np.nan, np.inf)), strict=True):
        drawn = dataclasses.replace(clean, arrays={k: x.copy() for k, x in clean.arrays.items()},
                                    dout=clean.dout.copy())
        (drawn.dout if name == "dout" else drawn.arrays[name])[..., token, 7] = value
        drawn.dense = dataclasses.replace(clean.dense, **drawn.arrays)
        out, lse, grads = run(drawn)
        exact = oracle.exact(BF16)
        want = oracle.forward(drawn.dense, exact)
        np.testing.assert_array_equal(np.isfinite(out), np.isfinite(want[0]), err_msg=name)
        np.testing.assert_array_equal(np.isfinite(lse), np.isfinite(want[1]), err_msg=name)
        with np.errstate(all="ignore"):
            want = oracle.backward(drawn.dense, drawn.dout, drawn.dlse, exact)
        far = allowed[token] > 60
        for field in grads._fields:
            got = np.isfinite(getattr(grads, field).astype(np.float32))
            assert got[..., far, :].all(), (name, value, field)
            np.testing.assert_array_equal(got, np.isfinite(want[field]),
                                          err_msg=f"{name} {value} {field}")


@pytest.mark.parametrize("d", [64, 128])
def test_hidden_nan_changes_no_bit(device, d):
    """Each operand alone, then all: a bad one must not hide that another is not looked at."""
    clean = draw("empty rows", 130, 200, d, BF16, heads=2, groups=1)
    allowed = clean.dense.allowed
    blind, unseen = ~allowed.any(axis=1), ~allowed.any(axis=0)
    clean.dlse[..., blind] = 0
    clean.dout[..., blind, :] = 0
    wanted = run(clean)
    hidden = {"q": blind, "dout": blind, "k": unseen, "v": unseen}
    for names in (("q",), ("k",), ("v",), ("dout",), tuple(hidden)):
        dirty = dataclasses.replace(clean, arrays={k: x.copy() for k, x in clean.arrays.items()},
                                    dout=clean.dout.copy())
        for name in names:
            (dirty.dout if name == "dout" else dirty.arrays[name])[..., hidden[name], :] = np.nan
        out, lse, grads = run(dirty)
        for got, want in zip((out, lse, *grads), (*wanted[:2], *wanted[2]), strict=True):
            np.testing.assert_array_equal(got, want, err_msg=str(names))


@pytest.mark.parametrize("name", ["full", "causal"])
def test_rows_without_a_finite_score(device, name):
    """They count as rows that see no key, among full tiles too, whatever else of them there is."""
    drawn = draw(name, 128, 128, 64, BF16, heads=2)
    drawn.arrays["k"][..., 0], drawn.arrays["q"][..., 5, 0] = 1, -np.inf
    drawn.dout[..., 5, :], drawn.dlse[..., 5] = np.nan, 0
    out, lse, grads = run(drawn)
    assert not out[..., 5, :].any()
    assert (lse[..., 5] == -np.inf).all()
    assert not grads.q[..., 5, :].any()
    assert all(np.isfinite(x.astype(np.float32)).all() for x in grads)


@pytest.mark.parametrize("d", [64, 128])
def test_inf_with_a_weight_of_0_is_nan(device, d):
    """In partial tiles as in full ones, where the product says so."""
    for name in ("full", "causal"):
        drawn = draw(name, 128, 128, d, BF16)
        drawn.arrays["q"][...], drawn.arrays["k"][..., 0] = 0, 0
        drawn.arrays["q"][..., 0], drawn.arrays["k"][..., 10, 0] = 200, -100
        drawn.arrays["v"][..., (10, 11), :2] = np.inf
        drawn.dout[..., 30, :3] = np.inf
        out, _, grads = run(drawn)
        drawn.dense = dataclasses.replace(drawn.dense, **drawn.arrays)
        with np.errstate(all="ignore"):
            want = oracle.forward(drawn.dense, oracle.exact(BF16))[0]
            dv = oracle.backward(drawn.dense, drawn.dout, drawn.dlse, oracle.exact(BF16))["v"]
        for got, right in ((out, want), (grads.v, dv)):
            assert np.isnan(got).any()
            np.testing.assert_array_equal(np.isnan(got), np.isnan(right), err_msg=name)
            np.testing.assert_array_equal(np.isinf(got), np.isinf(right), err_msg=name)


def test_a_scale_of_0_makes_nan_of_inf(device):
    for name, value in itertools.product(("q", "k"), (np.inf, -np.inf)):
        drawn = draw("causal", 130, 130, 64, BF16)
        drawn.arrays[name][..., 70, 3] = value
        scale = np.zeros(2, np.float32)
        drawn.options["scale"] = scale
        drawn.dense = dataclasses.replace(drawn.dense, scale=scale, **drawn.arrays)
        out, lse, grads = run(drawn)
        with np.errstate(all="ignore"):
            want = oracle.forward(drawn.dense, oracle.exact(BF16))
            dv = oracle.backward(drawn.dense, drawn.dout, drawn.dlse, oracle.exact(BF16))["v"]
        for got, right in ((out, want[0]), (lse, want[1]), (grads.v, dv)):
            np.testing.assert_array_equal(np.isnan(got), np.isnan(right), err_msg=name)


def test_float16_of_width_128(device):
    drawn = draw("causal", 130, 200, 128, F16, heads=2)
    judge(drawn, *run(drawn))


REFUSED = {
    "compute capability": {"capability": (8, 0)},
    "bytes of shared memory": {"shared_memory": 99 * 1024},
    "float32": {"dtype": np.float32},
    "widths": {"d": 32},
    "softcap": {"softcap": 5.0},
    "dropout": {"dropout": 0.5, "rng": 0},
    "bias": {"bias": np.zeros((70, 70), np.float32)},
    "multiples of 16 bytes": {"odd": True},
    "few of the tiles": {"diagonal": True},
    "few queries": {"n": 64},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_serve_is_refused(monkeypatch, reason):
    options = dict(REFUSED[reason])
    emulated = EmulatedDevice(capability=options.pop("capability", (9, 0)))
    emulated.shared_memory = options.pop("shared_memory", emulated.shared_memory)
    monkeypatch.setitem(devices._factories, "numpy", lambda array: emulated)
    reasons = []

    def kernel(engine, problem, array):
        reasons.append(hopper.refuses(problem))
        return plain

    monkeypatch.setattr(dispatch, "kernel", kernel)
    n = 640 if options.pop("diagonal", False) else options.pop("n", 70)
    if n == 640:
        steps = np.arange(n) // 64
        options["mask"] = masks.dense(steps[:, None] == (steps * 7 + 3) % 10)
    shape = (1, 2, n, options.pop("d", 64))
    x = np.zeros(shape, options.pop("dtype", BF16))
    if options.pop("odd", False):
        x = np.zeros((*shape[:3], 68), BF16)[..., :64]
    pyattn.attention(x, x, x, **options)
    assert reason in reasons[0]


# ---- machine code

@pytest.mark.skipif(gpu_sass.lacking() is not None, reason=str(gpu_sass.lacking()))
@pytest.mark.parametrize("kernel", [kernel for kernel in usual_kernels()
                                    if dict(kernel.macros)["D"] == 128
                                    and dict(kernel.macros)["BRAIN"]], ids=lambda k: k.name)
def test_exponentials_run_beside_products(kernel):
    """The compiler may move the wait for the second of two products ahead of them; see `settle`."""
    source = compile.text(kernel.file)
    options = compile.options_for(kernel.macros, "sm_90a")
    code, log = compile.compiled(source, kernel.file, options)
    assert "C75" not in log
    told = gpu_sass.dumped(code, "-sass")
    found = re.findall(r"HGMMA|DEPBAR|MUFU\.EX2", told)
    runs = [(name, len(list(group))) for name, group in itertools.groupby(found)]
    names = [name for name, _ in runs]
    overlapped = [runs[i + 2][1] for i in range(len(runs) - 3)
                  if names[i:i + 4] == ["HGMMA", "DEPBAR", "MUFU.EX2", "DEPBAR"]
                  and runs[i + 1][1] == 1]
    assert max(overlapped, default=0) >= 28


# ---- mistakes in the kernels themselves: what the tests above would say of them

PLANTED = {
    "a masked pair kept": (
        "hopper_tiles.cuh", "if (!bits.get(i, h, e))", "if (!bits.get(i, h, e) && e)"),
    "keys beyond the last one": (
        "hopper_tiles.cuh", "return partial() || (step + 1) * C * TILE > tokens;",
        "return partial();"),
    "values not inspected": (
        "hopper_forward.cu",
        "if (read_note(shared + NOTES + turn.stage * NOTE).masked\n", "if (false\n"),
    "cleaned with no fence": ("hopper_tiles.cuh", "    async_proxy_fence();\n}", "}"),
    "inspection not waited for": (
        "hopper_forward.cu", "if (masked_before)\n", "if (false)\n"),
    "keys let go before they were read": (
        "hopper_forward.cu", "wgmma_wait<0>();\n            hold(scores);\n"
        "            release(at.k_empty + 8 * turn.stage);",
        "release(at.k_empty + 8 * turn.stage);\n            wgmma_wait<0>();\n"
        "            hold(scores);"),
    "values let go before they were read": (
        "hopper_forward.cu",
        "start_sums(sums, weights, shared + VALUES + before.stage * STAGE_BYTES);",
        "start_sums(sums, weights, shared + VALUES + before.stage * STAGE_BYTES);\n"
        "release(at.v_empty + 8 * before.stage);"),
    "sums do not shrink": ("hopper_forward.cu", "shrink(sums, state);", ""),
    "nobody has the first turn": (
        "hopper_forward.cu", "    if (group == GROUPS - 1)\n", "    if (false)\n"),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistakes_are_caught(device, tmp_path, mistake):
    file, right, wrong = PLANTED[mistake]
    source = (compile.SOURCES / file).read_text()
    assert source.count(right) == 1
    (tmp_path / file).write_text(source.replace(right, wrong))
    device.folders = (tmp_path,)
    device.multiprocessors = 1      # one block takes all: its stages are filled again and again

    def check():
        for (name, seed) in itertools.product(("causal", "full"), (0, 1, 2)):
            drawn = draw(name, 200, 700, 64, BF16)
            if name == "causal":
                drawn.arrays["v"][..., 600, 5] = np.nan
            device.seed = seed
            found = pyattn.attention(**drawn.arrays, **drawn.options, return_lse=True)
            want, rough = (oracle.forward(drawn.dense, r)
                           for r in (oracle.exact(BF16), oracle.plain(BF16)))
            for i, part in enumerate(("out", "lse")):
                oracle.assert_close(found[i], want[i], rough[i], factor=2, name=part)

        count_keys("full", 130, 250, 64)

    with pytest.raises(AssertionError):
        check()


# ---- the emulator's own rules, by a small kernel that makes mistakes

PROBE = np.dtype({"names": ["a", "b", "c", "out", "steps", "mistake"],
                  "formats": ["V128", "V128", "V128", "u8", "i4", "i4"],
                  "offsets": [0, 128, 256, 384, 392, 396], "itemsize": 448})

MISTAKES = {
    "ARRIVAL_COUNT": "deadlock", "PARITY": "race|uninitialised", "NO_EMPTY_WAIT": "race|arrivals",
    "EARLY_RELEASE": "race", "NO_WAIT": "sums of a product|operands|not a number",
    "LEADING_AND_STRIDE": "out of bounds|uninitialised|wrong", "STRIDE": "wrong",
    "SMALL_EXPECTATION": "race|deadlock", "GREAT_EXPECTATION": "deadlock",
    "NO_PROXY_FENCE": "missing proxy fence", "SUMS_TOUCHED": "sums of a product are touched",
    "OPERAND_TOUCHED": "operands of a product are touched", "NO_WGMMA_FENCE": "missing wgmma_fence",
    "REGISTERS": "more than 65536", "NO_MBARRIER_FENCE": "no mbarrier_fence",
    "NO_BARRIER_AFTER_INIT": "race|before it was initialised", "OTHER_BUFFER": "race|wrong",
    "NO_SECOND_LOAD": "deadlock",
}


@functools.cache
def probe_arrays():
    rng = np.random.default_rng(0)
    steps = 5
    a, b, c = (rng.standard_normal((1, 1, steps * rows, columns)).astype(BF16)
               for rows, columns in ((64, 64), (128, 64), (128, 128)))
    want = 0
    for i in range(steps):
        x, y, z = (array[0, 0, i * rows:(i + 1) * rows].astype(np.float32)
                   for array, rows in ((a, 64), (b, 128), (c, 128)))
        want = want + (x @ y.T).astype(BF16).astype(np.float32) @ z
    return a, b, c, want


def probe(mistake, seed):
    """Run the small kernel; raises what the emulator raises, or if the result is wrong."""
    names = ["RIGHT", "ARRIVAL_COUNT", "PARITY", "NO_EMPTY_WAIT", "EARLY_RELEASE", "NO_WAIT",
             "LEADING_AND_STRIDE", "STRIDE", "SMALL_EXPECTATION", "GREAT_EXPECTATION",
             "NO_PROXY_FENCE", "SUMS_TOUCHED", "OPERAND_TOUCHED", "NO_WGMMA_FENCE", "REGISTERS",
             "NO_MBARRIER_FENCE", "NO_BARRIER_AFTER_INIT", "OTHER_BUFFER", "NO_SECOND_LOAD"]
    emulated = EmulatedDevice(capability=(9, 0), folders=[PROBES])
    emulated.seed = seed
    a, b, c, want = probe_arrays()
    arguments = np.zeros((), PROBE)
    for name, array, rows in (("a", a, 64), ("b", b, 128), ("c", c, 128)):
        arguments[name] = np.frombuffer(emulated.tensor_map(array, rows, 64), "V128")[0]
    out = np.full((64, 128), np.nan, np.float32)
    arguments["out"], arguments["steps"] = emulated.address(out), 5
    arguments["mistake"] = names.index(mistake)
    kernel = devices.Kernel("hopper_probe.cu", "hopper_probe", (), 384)
    emulated.launch(kernel, 1, arguments, 2 * (64 + 128 + 256) * 128 + 32)
    if np.isnan(out).any():
        raise EmulatorError("the result is not a number")
    # sums in another order can round to another bf16
    if np.abs(out - want).max() > 0.02 * np.abs(want).max():
        raise EmulatorError("the result is wrong")


PROBES = oracle.__file__.replace("oracle.py", "cuda_probes")


@pytest.mark.parametrize("seed", range(4))
def test_the_small_kernel_is_right(seed):
    probe("RIGHT", seed)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake):
    for seed in (0, 1, 2):
        with pytest.raises(EmulatorError, match=MISTAKES[mistake]):
            probe(mistake, seed)
